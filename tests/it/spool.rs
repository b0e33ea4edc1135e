//! Limits on buffered bodies: above them, bodies go to disk, then wait, then are refused; and disks that are full
//! or missing.

use std::path::Path;
use std::process::Command;
use std::thread;

use forebay::origin::Running;
use forebay::phase::Phase;

use crate::harness::client::request;
use crate::harness::exchange::{Answer, Exchange};
use crate::harness::gateway::Watched;
use crate::harness::origin::built_in;
use crate::harness::{Ask, Client, End, Gateway, Leave, Protocol, Setup, eventually, may_open_files, ms};

const MIB: u64 = 1 << 20;

/// A gateway with both protocols and full buffering, which shares 1 MiB of memory, and these further settings.
fn sharing(origin: &Running, resources: &str, request: &str, response: &str) -> Setup {
    let buffering = format!("buffering: {{ request: {{ mode: full, {request} }}, response: {{ {response} }} }}");
    let setup = Setup::before_all(&[origin.address()]).listener("protocols: [http1, h2c]").spooling("");
    // All clients have the same address here.
    let shares = "responses: 100%, per_client: 100%";
    setup.route(&buffering).more(&format!("resources: {{ memory: 1MiB, {shares}, {resources} }}"))
}

/// A client that reads nothing of a response that fills all shared memory, or all but a sixteenth if the measure
/// `pause` prevents more.
fn hoarder(gateway: &Gateway) -> Exchange {
    let mut hoarder = Ask::get("/bytes/32MiB").narrow().begin(Protocol::Http1, gateway.web());
    assert_eq!(hoarder.status(), 200);
    gateway.wait_metric("forebay_spool_bytes{direction=\"response\",store=\"memory\"}", |bytes| bytes >= 983_040.0);
    hoarder
}

fn times(gateway: &Gateway, action: &str) -> f64 {
    gateway.metric(&format!("forebay_pressure_total{{action=\"{action}\"}}"))
}

/// Complete, or refused temporarily.
fn arrived_or_will_later(answer: &Answer, length: u64) -> bool {
    if answer.status == 503 {
        answer.refused(503, ".pressure");
        return false;
    }
    answer.arrived(length, &format!("content-length: {length}"));
    true
}

#[test]
fn the_limits_are_told() {
    let origin = built_in();
    let gateway = sharing(&origin, "disk: 8MiB", "memory: 64KiB, disk: 8MiB", "memory: 64KiB, disk: 8MiB").start();
    assert_eq!(gateway.metric("forebay_spool_limit_bytes{store=\"memory\"}"), 1_048_576.0);
    assert_eq!(gateway.metric("forebay_spool_limit_bytes{store=\"disk\"}"), 8_388_608.0);
}

#[test]
fn under_pressure_bodies_go_to_disk_before_their_own_memory_is_used_up() {
    let origin = built_in();
    let gateway = sharing(&origin, "on_pressure: [spill, pause]", "memory: 1MiB", "").start();
    let ask = Ask::put(400_000);
    let mut uploads: Vec<_> = (0..16).map(|n| ask.begin(Protocol::BOTH[n % 2], gateway.web())).collect();
    assert!(uploads.iter_mut().all(|upload| upload.send(300_000)));
    gateway.wait_metric("forebay_spool_bytes{direction=\"request\"}", |bytes| bytes >= 16.0 * 300_000.0);
    assert!(gateway.metric("forebay_spool_spills_total{direction=\"request\",reason=\"pressure\"}") > 0.0);
    assert!(times(&gateway, "spill") > 0.0);
    // A request that was admitted while there was room may add one more chunk.
    gateway.wait_metric("forebay_spool_bytes{store=\"memory\"}", |bytes| bytes <= 1_048_576.0 + 65_536.0);
    for mut upload in uploads {
        assert!(upload.finish_body());
        upload.answer().arrived(400_000, "content-length: 400000");
    }
    gateway.wait_at_rest();
}

#[test]
fn under_pressure_who_floods_waits_until_others_let_go() {
    let origin = built_in();
    let gateway = sharing(&origin, "on_pressure: [pause], disk: 0B", "memory: 1MiB, disk: 0B", "memory: 1MiB").start();
    let hoarder = hoarder(&gateway);
    let mut upload = Ask::put(400_000).begin(Protocol::Http1, gateway.web());
    let sender = thread::spawn(move || {
        assert!(upload.finish_body());
        upload.answer()
    });
    gateway.wait_metric("forebay_pressure{action=\"pause\"}", |paused| paused >= 1.0);
    assert_eq!(origin.body_bytes(), 0);
    drop(hoarder);
    sender.join().expect("the upload").arrived(400_000, "content-length: 400000");
    assert!(times(&gateway, "pause") >= 1.0);
    gateway.wait_at_rest();
}

#[test]
fn under_pressure_who_waits_too_long_is_refused() {
    let origin = built_in();
    let resources = "on_pressure: [pause], pause: 300ms, disk: 0B";
    let gateway = sharing(&origin, resources, "memory: 1MiB, disk: 0B", "memory: 1MiB").start();
    let hoarder = hoarder(&gateway);
    for protocol in Protocol::BOTH {
        let mut upload = Ask::put(400_000).begin(protocol, gateway.web());
        upload.send(100_000);
        upload.answer().refused(503, "buffer.pressure");
    }
    hoarder.answer().is_content(32 * MIB);
    gateway.wait_at_rest();
    assert_eq!(origin.body_bytes(), 0);
}

#[test]
fn under_pressure_new_exchanges_are_turned_away_until_it_is_over() {
    let origin = built_in();
    let gateway = sharing(&origin, "on_pressure: [shed], disk: 0B", "", "memory: 1MiB").start();
    let hoarder = hoarder(&gateway);
    gateway.wait_metric("forebay_pressure{action=\"shed\"}", |sheds| sheds == 1.0);
    for protocol in Protocol::BOTH {
        Ask::get("/bytes/10").over(protocol, gateway.web()).refused(503, "route.pressure");
    }
    assert_eq!(times(&gateway, "shed"), 2.0);
    assert_eq!(origin.requests(), 1);
    hoarder.answer().is_content(32 * MIB);
    gateway.wait_at_rest();
    for protocol in Protocol::BOTH {
        Ask::get("/bytes/10").over(protocol, gateway.web()).is_content(10);
    }
}

#[test]
fn many_at_once_over_the_budget_lose_nothing_and_corrupt_nothing() {
    let origin = built_in();
    let gateway = sharing(&origin, "", "memory: 512KiB", "memory: 512KiB").start();
    let whole: usize = thread::scope(|scope| {
        let clients = (0..32).map(|n| {
            let gateway = &gateway;
            scope.spawn(move || {
                let ask = Ask::put(MIB).sending(50_000, ms(5));
                arrived_or_will_later(&ask.over(Protocol::BOTH[n % 2], gateway.web()), MIB)
            })
        });
        let readers = (0..32).map(|n| {
            let gateway = &gateway;
            scope.spawn(move || {
                let answer = Ask::get("/bytes/1MiB").narrow().over(Protocol::BOTH[n % 2], gateway.web());
                let refused = answer.status == 503;
                if refused {
                    answer.refused(503, ".pressure")
                } else {
                    answer.is_content(MIB)
                }
                !refused
            })
        });
        let all: Vec<_> = clients.chain(readers).collect();
        all.into_iter().map(|client| usize::from(client.join().expect("a client"))).sum()
    });
    assert!(whole > 0, "all of them were turned away");
    gateway.wait_at_rest();
    arrived_or_will_later(&Ask::put(MIB).over(Protocol::Http1, gateway.web()), MIB);
}

#[test]
fn the_disk_that_all_share_is_bounded() {
    let origin = built_in();
    let gateway = sharing(&origin, "disk: 2MiB", "memory: 64KiB, disk: 2MiB", "").start();
    for protocol in Protocol::BOTH {
        let mut first = Ask::put(2 * MIB).begin(protocol, gateway.web());
        assert!(first.send(3 * MIB / 2));
        // The rest may still be under way, and would look like room for the second.
        let of_first = |bytes: f64| (1.57e6..1.58e6).contains(&bytes);
        gateway.wait_metric("forebay_spool_bytes", of_first);
        let mut second = Ask::put(2 * MIB).begin(protocol, gateway.web());
        second.finish_body();
        second.answer().refused(503, "buffer.disk_full");
        // Its file is closed by the disk threads, later.
        gateway.wait_metric("forebay_spool_bytes", of_first);
        assert!(first.finish_body());
        first.answer().arrived(2 * MIB, "content-length: 2097152");
        Ask::get("/bytes/8MiB").narrow().over(protocol, gateway.web()).is_content(8 * MIB);
        gateway.wait_at_rest();
    }
}

#[test]
fn a_body_that_could_never_be_held_is_refused_before_a_byte_of_it_is_read() {
    let origin = built_in();
    let gateway = sharing(&origin, "disk: 2MiB", "memory: 64KiB, disk: 2MiB", "").start();
    for protocol in Protocol::BOTH {
        let mut upload = Ask::put(8 * MIB).begin(protocol, gateway.web());
        assert_eq!(upload.status(), 413);
        upload.answer().refused(413, "buffer.too_large");
        let mut upload = Ask::put(8 * MIB).chunked().begin(protocol, gateway.web());
        upload.send(4 * MIB);
        assert!([413, 503].contains(&upload.status()));
    }
    gateway.wait_at_rest();
    assert_eq!(origin.requests(), 0);
}

/// A program whose spool directory is a 4 MiB disk.
fn on_a_small_disk(origin: &Running, request: &str) -> Setup {
    let buffering = format!("buffering: {{ request: {{ mode: full, {request} }} }}");
    let setup = Setup::before_all(&[origin.address()]).listener("protocols: [http1, h2c]").spooling("").tmpfs("4m");
    setup.route(&buffering)
}

#[test]
fn an_upload_that_a_full_disk_has_no_room_for_is_refused() {
    let origin = built_in();
    let process = on_a_small_disk(&origin, "on_disk_full: refuse").spawn();
    for ask in [Ask::put(20 * MIB), Ask::put(20 * MIB).chunked()] {
        for protocol in Protocol::BOTH {
            let mut upload = ask.begin(protocol, process.web());
            upload.send(8 * MIB);
            upload.answer().refused(503, "buffer.disk_full");
            process.wait_at_rest();
            eventually("its file to be closed", || process.spool_files().is_empty().then_some(()));
            assert_eq!(origin.requests(), 0);
        }
    }
    assert!(process.metric("forebay_disk_failures_total{operation=\"write\"}") > 0.0);
    Ask::put(MIB).over(Protocol::Http1, process.web()).arrived(MIB, "content-length: 1048576");
    assert!(!process.stderr().contains("panicked"), "{}", process.stderr());
}

#[test]
fn an_upload_that_a_full_disk_has_no_room_for_is_streamed_where_the_route_says_so() {
    let origin = built_in();
    let process = on_a_small_disk(&origin, "on_disk_full: stream").spawn();
    for protocol in Protocol::BOTH {
        Ask::put(20 * MIB).over(protocol, process.web()).arrived(20 * MIB, "content-length: 20971520");
        Ask::put(20 * MIB).chunked().over(protocol, process.web()).arrived(20 * MIB, "chunked");
        process.wait_at_rest();
    }
    assert!(!process.stderr().contains("panicked"), "{}", process.stderr());
}

#[test]
fn an_answer_that_a_full_disk_has_no_room_for_waits_for_its_reader() {
    let origin = built_in();
    let process = on_a_small_disk(&origin, "").spawn();
    for protocol in Protocol::BOTH {
        let mut slow = Ask::get("/bytes/32MiB").narrow().begin(protocol, process.web());
        assert_eq!(slow.read(1_000), 1_000);
        process.wait_metric("forebay_disk_failures_total{operation=\"write\"}", |count| count > 0.0);
        slow.answer().is_content(32 * MIB);
        process.wait_at_rest();
    }
    assert!(!process.stderr().contains("panicked"), "{}", process.stderr());
}

/// A program that writes all but the first 64 KiB of a body to disk, with this time limit for the disk.
fn that_spools(origin: &Running, patience: &str) -> Setup {
    let limits = "memory: 64KiB, disk: 64MiB";
    let buffering = format!("buffering: {{ request: {{ mode: full, {limits} }}, response: {{ {limits} }} }}");
    let setup = Setup::before_all(&[origin.address()]).listener("protocols: [http1, h2c]").spooling("");
    setup.route(&buffering).more(&format!("resources: {{ pause: {patience} }}"))
}

#[test]
fn while_the_disk_stands_still_who_needs_it_waits_and_the_worker_goes_on() {
    let origin = built_in();
    let process = that_spools(&origin, "60s").spawn();
    for protocol in Protocol::BOTH {
        let still = process.still_disk();
        let (web, earlier) = (process.web(), origin.body_bytes());
        let upload = thread::spawn(move || Ask::put(4 * MIB).over(protocol, web));
        let mut slow = Ask::get("/bytes/32MiB").narrow().begin(protocol, web);
        assert_eq!(slow.read(1_000), 1_000);
        process.wait_metric("forebay_disk_queue", |queued| queued >= 2.0);
        for _ in 0..20 {
            Ask::get("/bytes/1000").over(protocol, web).is_content(1_000);
        }
        assert_eq!(origin.body_bytes(), earlier, "of an upload that waits for the disk");
        // In memory meanwhile: 64 KiB each, pending writes, and the data for the next write.
        assert!(process.metric("forebay_spool_bytes{store=\"memory\"}") <= 2.0 * 1_048_576.0);
        drop(still);
        upload.join().expect("the upload").arrived(4 * MIB, "content-length: 4194304");
        slow.answer().is_content(32 * MIB);
        process.wait_at_rest();
    }
}

#[test]
fn who_waits_for_the_disk_for_too_long_is_refused() {
    let origin = built_in();
    // Long enough for the disk threads, which have the lowest priority, on a busy machine.
    let process = that_spools(&origin, "3s").spawn();
    for protocol in Protocol::BOTH {
        let still = process.still_disk();
        let mut upload = Ask::put(4 * MIB).begin(protocol, process.web());
        upload.send(2 * MIB);
        upload.answer().refused(500, "buffer.disk_failed");
        drop(still);
        process.wait_at_rest();
    }
    assert_eq!(origin.requests(), 0);
    Ask::put(4 * MIB).over(Protocol::Http1, process.web()).arrived(4 * MIB, "content-length: 4194304");
}

#[test]
fn a_crowd_that_waits_for_the_disk_for_too_long_is_refused_and_holds_up_nobody_who_does_without() {
    let origin = built_in();
    let process = that_spools(&origin, "1s").spawn();
    let still = process.still_disk();
    let begin = || {
        let mut upload = Ask::put(4 * MIB).begin(Protocol::Http1, process.web());
        upload.send(MIB);
        upload
    };
    // More than may move data without turns, and more than the disk threads can handle at once.
    let uploads: Vec<_> = (0..60).map(|_| begin()).collect();
    process.wait_metric("forebay_scheduler_waiting{class=\"transfer\"}", |waiting| waiting > 0.0);
    for _ in 0..20 {
        Ask::put(50_000).over(Protocol::Http1, process.web()).arrived(50_000, "content-length: 50000");
    }
    for upload in uploads {
        upload.answer().refused(500, "buffer.disk_failed");
    }
    drop(still);
    process.wait_at_rest();
    assert_eq!(origin.requests(), 20);
}

#[test]
fn an_answer_that_the_disk_does_not_give_back_is_cut() {
    let origin = built_in();
    let process = that_spools(&origin, "300ms").spawn();
    for (protocol, count) in Protocol::BOTH.into_iter().zip([1, 2]) {
        let mut slow = Ask::get("/bytes/32MiB").narrow().begin(protocol, process.web());
        assert_eq!(slow.read(1_000), 1_000);
        process.wait_phase(Phase::Write);
        let still = process.still_disk();
        assert_eq!(slow.answer().end, End::Cut);
        assert_eq!(process.log_lines(count)[count - 1].reason(), "write.disk_failed");
        drop(still);
        process.wait_at_rest();
    }
}

/// A program with full response buffering, and this time limit for the disk.
fn that_holds_answers(origin: &Running, patience: &str) -> Setup {
    let setup = Setup::before_all(&[origin.address()]).listener("protocols: [http1, h2c]").spooling("");
    let setup = setup.route("buffering: { response: { mode: full, memory: 64KiB, disk: 64MiB } }");
    setup.more(&format!("resources: {{ pause: {patience} }}"))
}

#[test]
fn a_full_answer_that_the_disk_does_not_take_is_given_up_in_time() {
    let origin = built_in();
    let process = that_holds_answers(&origin, "3s").spawn();
    for protocol in Protocol::BOTH {
        let still = process.still_disk();
        Ask::get("/bytes/32MiB").over(protocol, process.web()).refused(500, "write.disk_failed");
        drop(still);
        process.wait_at_rest();
    }
    Ask::get("/bytes/4MiB").over(Protocol::Http1, process.web()).is_content(4 * MIB);
}

#[test]
fn a_full_answer_that_waits_for_the_disk_ends_with_its_client() {
    let origin = built_in();
    let process = that_holds_answers(&origin, "10m").spawn();
    for (protocol, how) in
        [(Protocol::Http1, Leave::Reset), (Protocol::Http2, Leave::Reset), (Protocol::Http2, Leave::Stream)]
    {
        let still = process.still_disk();
        let asked = Ask::get("/bytes/32MiB").begin(protocol, process.web());
        process.wait_metric("forebay_disk_queue", |queued| queued >= 1.0);
        let _connection = asked.leave(how);
        process.wait_metric("forebay_endpoint_inflight", |inflight| inflight == 0.0);
        process.wait_metric("forebay_phase_active", |active| active == 0.0);
        drop(still);
        // Left-over queue entries must not be counted as work of the next one.
        process.wait_metric("forebay_disk_queue", |queued| queued == 0.0);
    }
    for line in process.log_lines(3) {
        assert_eq!(line.reason(), "receive.aborted");
    }
}

/// The output of `forebay` for this configuration, and its exit code.
fn forebay(command: &str, setup: &Setup) -> (Option<i32>, String) {
    let file = setup.path("forebay.yaml");
    std::fs::write(&file, setup.yaml()).expect("a configuration file");
    let program = Command::new(env!("CARGO_BIN_EXE_forebay")).arg(command).arg("-c").arg(&file).output();
    let output = program.expect("the program");
    (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
}

#[test]
fn a_spool_directory_that_cannot_be_used_is_found_before_anything_listens() {
    let origin = built_in();
    let setup = Setup::before_all(&[origin.address()]);
    let file = setup.path("a-file");
    std::fs::write(&file, "not a directory").expect("a file");
    // Not even root can write to /proc.
    for dir in [&setup.path("absent"), &file, Path::new("/proc")] {
        let setup = setup.clone().server(&format!("threads: 1, spool_dir: \"{}\"", dir.display()));
        for command in ["check", "run"] {
            let (code, said) = forebay(command, &setup);
            assert_eq!(code, Some(78), "{command} {}: {said}", dir.display());
            assert!(said.contains("server.spool_dir") && said.contains(&*dir.to_string_lossy()), "{said}");
            assert!(!said.contains("listening"), "{said}");
        }
    }
}

/// Memory per buffering client, in addition to the bytes that `resources.memory` counts. A debug build needed 113 KB
/// for an upload and 211 KB for a reader.
const CLIENT_BYTES: u64 = 240 * 1024;

const CLIENTS: usize = 2_000;

/// A program with 64 MiB for bodies, after a warm-up, and its memory then.
fn sharing_64_mib(origin: &Running) -> (crate::harness::Process, u64) {
    may_open_files(3 * CLIENTS);
    let limits = "protocols: [http1, h2c], limits: { connections: 100k }";
    let setup = Setup::before_all(&[origin.address()])
        .listener(limits)
        .spooling("")
        // All clients have the same address here, and no exchange must fail because a busy machine delays the disk
        // threads.
        .more(
            "resources: { memory: 64MiB, responses: 100%, per_client: 100%, on_pressure: [spill, pause], pause: 10m }",
        );
    let patient = "client: { body_idle: 10m, write_idle: 10m, min_rate: { read: 0B/s, write: 0B/s } }";
    let process = setup.route(&format!("buffering: {{ request: {{ mode: full }} }}, {patient}")).spawn();
    Ask::put(4 * MIB).over(Protocol::Http1, process.web()).arrived(4 * MIB, "content-length: 4194304");
    process.wait_at_rest();
    let idle = process.resident_bytes();
    (process, idle)
}

fn stays_within_its_memory(process: &crate::harness::Process, idle: u64) {
    let held = process.metric("forebay_spool_bytes{store=\"memory\"}");
    // Requests admitted while there was room may add what one read returns: some chunks of 64 KiB.
    assert!(held <= 68.0 * 1_048_576.0, "{held} bytes in memory");
    let grown = process.resident_bytes().saturating_sub(idle);
    let each = grown.saturating_sub(64 * MIB) / CLIENTS as u64;
    assert!(each <= CLIENT_BYTES, "{grown} bytes more than idle: 64 MiB and {each} a client");
    println!("{CLIENTS} clients: {grown} bytes more than idle, {held} of them counted; {each} a client beside 64 MiB");
}

#[test]
fn two_thousand_slow_uploads_stay_within_the_memory_there_is() {
    let origin = built_in();
    let (process, idle) = sharing_64_mib(&origin);
    let piece = vec![b'x'; 100_000];
    let _uploads: Vec<Client> = (0..CLIENTS)
        .map(|_| {
            let mut client = process.client();
            client.send("PUT /headers HTTP/1.1\r\nHost: test\r\nContent-Length: 1000000\r\n\r\n");
            client.send(&piece);
            client
        })
        .collect();
    let all = (CLIENTS * piece.len()) as f64;
    process.wait_metric("forebay_phase_active{phase=\"buffer\"}", |active| active == CLIENTS as f64);
    process.wait_metric("forebay_spool_bytes{direction=\"request\"}", |bytes| bytes >= all);
    stays_within_its_memory(&process, idle);
    assert_eq!(origin.requests(), 1, "the first, which warmed it up");
}

#[test]
fn two_thousand_slow_readers_stay_within_the_memory_there_is() {
    let origin = built_in();
    let (process, idle) = sharing_64_mib(&origin);
    let _readers: Vec<Client> = (0..CLIENTS)
        .map(|_| {
            let mut client = Client::slow(process.web());
            client.send(request("GET", "/bytes/300000", "", ""));
            client
        })
        .collect();
    process.wait_metric(&format!("forebay_phase_active{{phase=\"{}\"}}", Phase::Write), |n| n == CLIENTS as f64);
    assert_eq!(origin.busy(), 0);
    stays_within_its_memory(&process, idle);
}
