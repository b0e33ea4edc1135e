//! Slow clients: one below the minimum rate is refused or cut; one above it may take as long as it needs.

use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use forebay::origin::Running;
use forebay::phase::Phase;

use crate::harness::gateway::Watched;
use crate::harness::origin::built_in;
use crate::harness::{Ask, End, Gateway, Leave, Protocol, Setup, eventually, ms};

/// A gateway with both protocols, these client limits, and buffering in this mode.
fn before(origin: &Running, mode: &str, client: &str) -> Gateway {
    let buffering = format!("buffering: {{ request: {{ mode: {mode} }}, response: {{ mode: {mode} }} }}");
    let setup = Setup::before_all(&[origin.address()]).listener("protocols: [http1, h2c]").spooling("");
    setup.route(&buffering).route(&format!("client: {{ {client} }}")).start()
}

/// Asserts that an upload of this many bytes, with a pause after each and then silence, is refused with this
/// reason.
fn upload_is_refused(mode: &str, client: &str, sent: u64, pause: Duration, reason: &str) {
    for protocol in Protocol::BOTH {
        let origin = built_in();
        let gateway = before(&origin, mode, client);
        let mut upload = Ask::put(1_000).sending(1, pause).begin(protocol, gateway.web());
        upload.send(sent);
        assert_eq!(upload.status(), 408, "{reason} {protocol:?}");
        upload.answer().refused(408, reason);
        let line = gateway.log_line();
        assert_eq!((line.status(), line.reason()), (408, reason));
        gateway.refused_once(reason);
        gateway.wait_at_rest();
        assert_eq!(origin.accepted() == 0, mode != "stream", "{mode}: what the backend heard");
    }
}

#[test]
fn an_upload_that_trickles_is_refused_after_its_grace() {
    let slow = "min_rate: { read: 1KiB/s, grace: 300ms }";
    upload_is_refused("full", slow, 40, ms(20), "buffer.min_rate");
    upload_is_refused("auto", slow, 40, ms(20), "buffer.min_rate");
    upload_is_refused("stream", slow, 40, ms(20), "send.min_rate");
}

#[test]
fn an_upload_that_stands_still_is_refused_for_its_rate_before_its_idle_time_is_over() {
    upload_is_refused("full", "body_idle: 30s, min_rate: { read: 1KiB/s, grace: 300ms }", 1, ms(0), "buffer.min_rate");
}

#[test]
fn an_upload_that_stands_still_is_refused_after_its_idle_time() {
    upload_is_refused("full", "body_idle: 300ms", 10, ms(1), "buffer.timeout");
    upload_is_refused("auto", "body_idle: 300ms", 10, ms(1), "buffer.timeout");
    upload_is_refused("stream", "body_idle: 300ms", 10, ms(1), "send.body_timeout");
}

#[test]
fn an_upload_that_takes_too_long_as_a_whole_is_refused() {
    upload_is_refused("full", "body_total: 400ms", 60, ms(10), "buffer.timeout");
    upload_is_refused("stream", "body_total: 400ms", 60, ms(10), "send.body_total");
}

#[test]
fn a_slow_honest_upload_lives() {
    let origin = built_in();
    for mode in ["full", "auto", "stream"] {
        let gateway = before(&origin, mode, "body_idle: 500ms, min_rate: { read: 1KiB/s, grace: 200ms }");
        for protocol in Protocol::BOTH {
            // About 10 KB/s, for one and a half seconds.
            let answer = Ask::put(15_000).sending(100, ms(10)).over(protocol, gateway.web());
            answer.arrived(15_000, "content-length: 15000");
        }
    }
}

#[test]
fn the_time_of_a_slow_backend_is_not_the_clients() {
    let origin = built_in();
    for mode in ["full", "auto", "stream"] {
        let strict = "body_idle: 300ms, write_idle: 300ms, min_rate: { read: 1MiB/s, write: 1MiB/s, grace: 100ms }";
        let gateway = before(&origin, mode, strict);
        for protocol in Protocol::BOTH {
            let answer = Ask::put(1_000).to("/headers?delay=600ms").over(protocol, gateway.web());
            answer.arrived(1_000, "content-length: 1000");
            let answer = Ask::get("/drip/3/400ms").over(protocol, gateway.web());
            assert_eq!((answer.text().lines().count(), answer.end), (3, End::Complete), "{mode} {protocol:?}");
        }
    }
}

#[test]
fn a_reader_that_trickles_is_cut_after_its_grace() {
    for (mode, protocol) in ["auto", "full", "stream"].into_iter().flat_map(|mode| Protocol::BOTH.map(|p| (mode, p))) {
        let origin = built_in();
        let gateway = before(&origin, mode, "min_rate: { write: 1MiB/s, grace: 300ms }");
        let mut slow = Ask::get("/bytes/32MiB").reading(100, ms(10)).begin(protocol, gateway.web());
        slow.read(10_000);
        let line = gateway.log_line();
        assert_eq!((line.status(), line.reason()), (200, "write.min_rate"), "{mode} {protocol:?}");
        eventually("the backend to be let go", || (origin.connections() == 0 || origin.busy() == 0).then_some(()));
        slow.hurry();
        assert_eq!(slow.answer().end, End::Cut);
        gateway.wait_at_rest();
    }
}

#[test]
fn a_reader_that_stops_is_cut_after_its_idle_time() {
    for (mode, protocol) in ["auto", "full", "stream"].into_iter().flat_map(|mode| Protocol::BOTH.map(|p| (mode, p))) {
        let origin = built_in();
        let gateway = before(&origin, mode, "write_idle: 300ms");
        let mut slow = Ask::get("/bytes/32MiB").narrow().begin(protocol, gateway.web());
        assert_eq!(slow.read(1_000), 1_000);
        let line = gateway.log_line();
        assert_eq!((line.status(), line.reason()), (200, "write.timeout"), "{mode} {protocol:?}");
        assert_eq!(slow.answer().end, End::Cut);
        gateway.wait_at_rest();
    }
}

#[test]
fn a_slow_honest_reader_lives() {
    let origin = built_in();
    let lives = |mode, protocol| {
        let gateway = before(&origin, mode, "write_idle: 1500ms, min_rate: { write: 10KiB/s, grace: 1500ms }");
        // At most 100 KB/s, for longer than its grace, which covers what a kernel acknowledges at once; then the
        // rest, which the kernel cannot buffer.
        let mut slow = Ask::get("/bytes/8MiB").reading(1_000, ms(10)).begin(protocol, gateway.web());
        let read = slow.read(250_000);
        let cut = ["write.timeout", "write.min_rate"]
            .map(|reason| (reason, gateway.metric(&format!("forebay_refusals_total{{reason=\"{reason}\"}}"))));
        assert_eq!(read, 250_000, "{mode} {protocol:?}: {cut:?}");
        slow.hurry();
        let answer = slow.answer();
        assert_eq!(gateway.log_line().reason(), "", "{mode} {protocol:?}");
        answer.is_content(8 << 20);
    };
    thread::scope(|scope| {
        for (mode, protocol) in
            ["auto", "full", "stream"].into_iter().flat_map(|mode| Protocol::BOTH.map(|protocol| (mode, protocol)))
        {
            scope.spawn(move || lives(mode, protocol));
        }
    });
}

/// The duration of a response of this size.
fn seconds_of(gateway: &Gateway, protocol: Protocol, length: u64) -> f64 {
    let started = Instant::now();
    Ask::get(format!("/bytes/{length}")).over(protocol, gateway.web()).is_content(length);
    started.elapsed().as_secs_f64()
}

#[test]
fn answers_are_held_to_their_rate_after_a_first_burst() {
    let origin = built_in();
    for mode in ["auto", "full", "stream"] {
        let gateway = before(&origin, mode, "limit_rate: { rate: 50KiB/s, after: 200KiB }");
        for protocol in Protocol::BOTH {
            let burst = seconds_of(&gateway, protocol, 200 << 10);
            assert!(burst < 3.0, "the burst took {burst} s with {mode} {protocol:?}, and 4 s at that rate");
            let limited = seconds_of(&gateway, protocol, 275 << 10);
            assert!((1.0..5.0).contains(&limited), "{limited} s for 75 KiB at 50 KiB/s with {mode} {protocol:?}");
        }
    }
}

#[test]
fn a_held_rate_holds_no_backend_and_is_no_trickle() {
    let origin = built_in();
    let gateway = before(&origin, "auto", "limit_rate: { rate: 200KiB/s }, min_rate: { write: 1MiB/s, grace: 100ms }");
    for protocol in Protocol::BOTH {
        let mut limited = Ask::get("/bytes/300KiB").begin(protocol, gateway.web());
        assert_eq!(limited.status(), 200);
        eventually("the backend to be let go", || (origin.busy() == 0).then_some(()));
        assert!(limited.read(300 << 10) == 300 << 10);
        limited.answer().is_content(300 << 10);
    }
}

#[test]
fn uploads_are_not_held_to_the_rate_of_answers() {
    let origin = built_in();
    let gateway = before(&origin, "full", "limit_rate: { rate: 100KiB/s, after: 10KiB }");
    let started = Instant::now();
    Ask::put(4 << 20).over(Protocol::Http1, gateway.web()).arrived(4 << 20, "content-length: 4194304");
    assert!(started.elapsed() < ms(30_000), "{:?}, and 40 s at that rate", started.elapsed());
}

#[test]
fn a_client_that_goes_away_while_it_is_held_to_a_rate_leaves_nothing_behind() {
    let origin = built_in();
    let gateway = before(&origin, "auto", "limit_rate: { rate: 1KiB/s }");
    for (how, protocol) in
        [Leave::Close, Leave::Reset, Leave::Stream].into_iter().flat_map(|how| Protocol::BOTH.map(|p| (how, p)))
    {
        let mut limited = Ask::get("/bytes/1MiB").begin(protocol, gateway.web());
        assert_eq!(limited.status(), 200);
        gateway.wait_phase(Phase::Write);
        let _open = limited.leave(how);
        gateway.wait_at_rest();
    }
}

/// Runs a thousand connections of slowhttptest in one of its modes, for five seconds. Other clients are served
/// meanwhile: within milliseconds on an idle machine, and several times before the attack ends on any machine.
fn stands_up_to(mode: &[&str]) {
    let origin = built_in();
    let gateway = before(&origin, "auto", "body_idle: 60s");
    let url = format!("http://{}/bytes/100000", gateway.web());
    let mut attack = Command::new("slowhttptest")
        .args(["-c", "1000", "-r", "500", "-l", "5", "-i", "1", "-p", "3", "-u", &url])
        .args(mode)
        .stdout(std::process::Stdio::null())
        .spawn()
        .expect("slowhttptest, which `make test` installs");
    let (mut asked, mut slowest) = (0_u32, Duration::ZERO);
    while attack.try_wait().expect("the state of slowhttptest").is_none() {
        let started = Instant::now();
        Ask::get("/bytes/1000").over(Protocol::Http1, gateway.web()).is_content(1_000);
        (asked, slowest) = (asked + 1, slowest.max(started.elapsed()));
        std::thread::sleep(ms(10));
    }
    assert!(asked >= 3, "{asked} asked, the slowest of them for {slowest:?}");
    println!("{asked} asked, the slowest of them for {slowest:?}");
    assert!(gateway.metric("forebay_client_connections_total") - f64::from(asked) > 900.0, "the attack did not come");
    gateway.wait_at_rest();
}

#[test]
fn others_are_served_while_a_thousand_headers_come_slowly() {
    stands_up_to(&["-H"]);
}

#[test]
fn others_are_served_while_a_thousand_bodies_come_slowly() {
    stands_up_to(&["-B", "-s", "8192"]);
}

#[test]
fn others_are_served_while_a_thousand_answers_are_read_slowly() {
    stands_up_to(&["-X", "-w", "1", "-y", "512", "-z", "32", "-k", "3"]);
}

#[test]
fn others_are_served_while_a_thousand_ask_for_many_ranges() {
    stands_up_to(&["-R", "-t", "HEAD", "-a", "10", "-b", "3000"]);
}
