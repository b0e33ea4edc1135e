//! Attacks with a bounded load, each next to a client with normal requests: the client gets its responses in time,
//! the attack is counted, and its resources are released.
//!
//! All of 127.0.0.0/8 is local, so attackers and victims have different addresses. Bounds are generous because the
//! CPU may be shared.

use std::io::Write;
use std::net::Ipv4Addr;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crate::handshake::renegotiate;
use crate::harness::frames::{END_HEADERS, END_STREAM, Frame, Frames, code, kind};
use crate::harness::gateway::Watched;
use crate::harness::secure::Authority;
use crate::harness::tls::{Tls, pair};
use crate::harness::{Client, H2Client, Origin, Process, Setup, eventually, ms, ok};

/// Simultaneous attackers, each with its own address.
const ATTACKERS: u8 = 4;
/// Number of requests of the normal client.
const ASKED: usize = 20;
/// Limit for each of its responses.
const IN_TIME: Duration = Duration::from_secs(10);
/// Limit on the growth of the process by an attack, in bytes: the allocator keeps some of the freed memory.
const KEPT_BYTES: f64 = 96.0 * 1024.0 * 1024.0;

fn attacker(number: u8) -> Ipv4Addr {
    Ipv4Addr::new(127, 66, 6, number)
}

/// Runs attackers in loops while the normal client sends requests.
fn beside(process: &Process, reason: &str, attack: impl Fn(u8) + Sync, mut ask: impl FnMut()) {
    let memory = || process.metric("process_resident_memory_bytes");
    let selector = format!("forebay_refusals_total{{reason=\"{reason}\"}}");
    ask();
    let (before, over) = (memory(), AtomicBool::new(false));
    let mut longest = Duration::ZERO;
    thread::scope(|scope| {
        let (over, attack) = (&over, &attack);
        for number in 1..=ATTACKERS {
            scope.spawn(move || {
                while !over.load(Ordering::Relaxed) {
                    attack(number);
                }
            });
        }
        let asked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            process.wait_metric(&selector, |count| count >= 1.0);
            for _ in 0..ASKED {
                let begun = Instant::now();
                ask();
                longest = longest.max(begun.elapsed());
            }
            process.wait_metric(&selector, |count| count >= f64::from(ATTACKERS));
        }));
        over.store(true, Ordering::Relaxed);
        asked.expect("a client that is served beside the attack");
    });
    let (counted, during) = (process.metric(&selector), memory());
    println!("{reason}: counted {counted} times; the longest wait beside it was {longest:?}");
    assert!(longest < IN_TIME, "{reason}: {longest:?}");
    process.wait_metric("forebay_client_connections", |open| open <= 1.0);
    process.wait_at_rest();
    eventually(&format!("memory to return from {during} to about {before}"), || {
        (memory() < before + KEPT_BYTES).then_some(())
    });
}

/// A gateway for clear-text HTTP/2 in front of an origin with a response of 100 KB.
fn cleartext(keys: &str) -> (Origin, Process) {
    let origin = Origin::answering(|_| ok(vec![b'x'; 100_000]));
    let process = Setup::before(&origin).listener("protocols: [http1, h2c]").listener(keys).spawn();
    (origin, process)
}

/// Runs attacks over HTTP/2 with the frames of `flood` on each connection, until it is cut off.
fn flooded(reason: &str, keys: &str, flood: impl Fn(&mut Frames) + Sync) {
    let (_origin, process) = cleartext(keys);
    let web = process.web();
    let attack = |number| {
        let mut client = Frames::from(attacker(number), web);
        flood(&mut client);
        // A connection may end gracefully or with a reset.
        while client.next().is_some() {}
    };
    let client = H2Client::from(Ipv4Addr::new(127, 7, 7, 7), web);
    beside(&process, reason, attack, || {
        let answer = client.get("/");
        assert_eq!((answer.status, answer.body.len()), (200, 100_000));
    });
}

/// Sends these frames repeatedly until the gateway closes the connection.
fn again_and_again(client: &mut Frames, frames: &[Frame]) {
    for _ in 0..2_000 {
        if !client.try_send_all(frames) {
            return;
        }
    }
}

#[test]
fn rapid_reset() {
    flooded("header.h2_resets", "", |client| {
        let mut stream = 1;
        while client.try_send_all(&[Frame::get(stream), Frame::reset(stream, code::CANCEL)]) && stream < 9_999 {
            stream += 2;
        }
    });
}

#[test]
fn resets_that_keep_below_the_rate() {
    flooded("header.h2_resets", "http2: { resets: 100k/s }", |client| {
        for number in 0..600 {
            let stream = 2 * number + 1;
            if !client.try_send_all(&[Frame::get(stream), Frame::reset(stream, code::CANCEL)]) {
                return;
            }
            thread::park_timeout(ms(1));
        }
    });
}

#[test]
fn resets_that_the_gateway_is_made_to_send() {
    flooded("header.h2_provoked_resets", "", |client| {
        let mut stream = 1;
        let overflow = |stream| Frame::credit(stream, (1 << 31) - 1);
        while client.try_send_all(&[Frame::get(stream), overflow(stream)]) && stream < 9_999 {
            stream += 2;
        }
    });
}

#[test]
fn a_flood_of_continuation() {
    flooded("header.h2_continuation", "", |client| {
        client.try_send_all(&[Frame::new(kind::HEADERS, END_STREAM, 1, [0x82])]);
        again_and_again(client, &[Frame::new(kind::CONTINUATION, 0, 1, [])]);
    });
}

#[test]
fn a_flood_of_settings() {
    flooded("header.h2_settings", "", |client| {
        again_and_again(client, &[Frame::new(kind::SETTINGS, 0, 0, [0, 4, 0, 0, 0, 9, 0, 4, 0, 1, 0, 0])]);
    });
}

#[test]
fn a_flood_of_pings() {
    flooded("header.h2_pings", "", |client| again_and_again(client, &vec![Frame::ping([0; 8]); 50]));
}

#[test]
fn a_flood_of_empty_data() {
    flooded("header.h2_empty_data", "", |client| {
        client.try_send_all(&[Frame::post(1)]);
        again_and_again(client, &vec![Frame::new(kind::DATA, 0, 1, []); 50]);
    });
}

#[test]
fn credit_for_one_byte_at_a_time() {
    flooded("header.h2_window_updates", "", |client| {
        client.try_send_all(&[Frame::new(kind::SETTINGS, 0, 0, [0, 4, 0, 0, 0, 1]), Frame::get(1)]);
        for _ in 0..20_000 {
            if !client.try_send_all(&[Frame::credit(1, 1)]) {
                return;
            }
        }
    });
}

#[test]
fn a_header_list_that_grows_when_it_is_unpacked() {
    flooded("header.too_large", "", |client| {
        // A field of 4,000 bytes for HPACK's dynamic table, and then 10,000 references to it, one byte each: index
        // 63.
        let field = [&Frame::get(1).payload[..], &[0x40, 1, b'a', 0x7f, 0xa1, 0x1e], &[b'b'; 4_000]].concat();
        client.try_send_all(&[Frame::new(kind::HEADERS, END_STREAM | END_HEADERS, 1, field)]);
        let bomb = [&Frame::get(1).payload[..], &[0xbf; 10_000]].concat();
        client.try_send_all(&[Frame::new(kind::HEADERS, END_STREAM | END_HEADERS, 3, bomb)]);
    });
}

/// A gateway with TLS, and the authority that its clients trust.
fn secure(keys: &str) -> (Authority, Process) {
    let authority = Authority::new();
    let identity = authority.issue(&["a.test"]);
    let process = Setup::found("endpoints: [ { address: \"127.0.0.1:1\" } ]")
        .listener(&format!("tls: {{ certificates: [ {{ {} }} ], handshake_timeout: 2s }}, {keys}", pair(&identity)))
        .routes("{ name: all, filters: [ { respond: { body: served } } ], upstream: app }")
        .spawn();
    (authority, process)
}

#[test]
fn client_hellos_that_come_slowly() {
    let (authority, process) = secure("limits: { handshakes_per_ip: 30 }");
    let web = process.web();
    // The beginning of a ClientHello of 512 bytes, whose rest is sent byte by byte.
    let begun = [0x16, 3, 1, 2, 0, 1, 0, 1, 0xfc, 3, 3];
    let attack = |number| {
        let mut crowd: Vec<_> = (0..40)
            .map(|_| {
                let mut client = Client::from(attacker(number), web).into_wire().into_socket();
                let _ = client.write_all(&begun);
                client
            })
            .collect();
        for _ in 0..30 {
            thread::park_timeout(ms(100));
            crowd.retain_mut(|client| client.write_all(&[7]).is_ok());
        }
    };
    let client = Tls::to(web, &authority, "a.test").from(Ipv4Addr::new(127, 7, 7, 7));
    let ask = || assert_eq!(client.get("/").expect("an answer").0.body, "served");
    beside(&process, "handshake.limit_per_ip", attack, ask);
    assert!(process.metric("forebay_refusals_total{reason=\"handshake.timeout\"}") >= 1.0);
}

#[test]
fn handshakes_again_and_again_on_one_connection() {
    let (authority, process) = secure("");
    let web = process.web();
    let attack = |_| drop(renegotiate(web, &authority));
    let client = Tls::to(web, &authority, "a.test").from(Ipv4Addr::new(127, 7, 7, 7));
    let ask = || assert_eq!(client.get("/").expect("an answer").0.body, "served");
    beside(&process, "handshake.renegotiation", attack, ask);
}

/// Connections that send nothing after their first request.
const SILENT: usize = 500;
/// Limit on the memory of each in a debug build, whose allocator keeps more than that of a release build.
const SILENT_BYTES: f64 = 40.0 * 1024.0;

#[test]
fn a_crowd_of_silent_connections_costs_little_and_holds_up_nobody() {
    let (authority, process) = secure("");
    let client = Tls::to(process.web(), &authority, "a.test").from(Ipv4Addr::new(127, 7, 7, 7));
    let ask = || {
        let begun = Instant::now();
        assert_eq!(client.get("/").expect("an answer").0.body, "served");
        assert!(begun.elapsed() < IN_TIME, "{:?}", begun.elapsed());
    };
    ask();
    let memory = || process.metric("process_resident_memory_bytes");
    let (before, silent) = (memory(), Tls::to(process.web(), &authority, "a.test").from(attacker(1)));
    let crowd: Vec<_> = (0..SILENT)
        .map(|_| {
            let mut one = silent.connect().expect("a connection");
            one.ask("GET / HTTP/1.1\r\nHost: a.test\r\n\r\n").expect("an answer");
            one
        })
        .collect();
    process.wait_metric("forebay_client_connections{state=\"idle\"}", |idle| idle == SILENT as f64);
    let each = (memory() - before) / SILENT as f64;
    println!("{each:.0} bytes each");
    assert!(each < SILENT_BYTES, "{each:.0} bytes each");
    (0..ASKED).for_each(|_| ask());
    drop(crowd);
    process.wait_metric("forebay_client_connections", |open| open == 0.0);
    process.wait_at_rest();
}

/// Three hundred connections of slowhttptest over TLS in one of its modes, for four seconds, while others are served.
fn stands_up_to(mode: &[&str]) {
    let authority = Authority::new();
    let origin = Origin::answering(|_| ok(vec![b'x'; 100_000]));
    let tls = format!("tls: {{ certificates: [ {{ {} }} ], default: a.test }}", pair(&authority.issue(&["a.test"])));
    let process = Setup::before(&origin).listener(&tls).spawn();
    let url = format!("https://{}/", process.web());
    let mut tool = Command::new("slowhttptest")
        .args(["-c", "300", "-r", "150", "-l", "4", "-i", "1", "-p", "3", "-u", &url])
        .args(mode)
        .stdout(Stdio::null())
        .spawn()
        .expect("slowhttptest, which `make test` installs");
    let client = Tls::to(process.web(), &authority, "a.test").from(Ipv4Addr::new(127, 7, 7, 7));
    let (mut asked, mut longest) = (0_u32, Duration::ZERO);
    while tool.try_wait().expect("the state of slowhttptest").is_none() {
        let begun = Instant::now();
        assert_eq!(client.get("/").expect("an answer").0.body.len(), 100_000);
        (asked, longest) = (asked + 1, longest.max(begun.elapsed()));
        thread::park_timeout(ms(20));
    }
    println!("{asked} asked, the longest for {longest:?}");
    assert!(asked >= 2 && longest < IN_TIME, "{asked} asked, the longest for {longest:?}");
    let shaken = process.metric("forebay_tls_handshakes_total") - f64::from(asked);
    assert!(shaken > 200.0, "the attack did not come: {shaken}");
    process.wait_metric("forebay_client_connections", |open| open == 0.0);
    process.wait_at_rest();
}

#[test]
fn headers_that_come_slowly_over_tls() {
    stands_up_to(&["-H"]);
}

#[test]
fn bodies_that_come_slowly_over_tls() {
    stands_up_to(&["-B", "-s", "8192"]);
}

#[test]
fn answers_that_are_read_slowly_over_tls() {
    stands_up_to(&["-X", "-w", "1", "-y", "512", "-z", "32", "-k", "3"]);
}

#[test]
fn requests_for_many_ranges_over_tls() {
    stands_up_to(&["-R", "-t", "HEAD", "-a", "10", "-b", "3000"]);
}

#[test]
fn a_flood_of_handshakes() {
    let (authority, process) = secure("limits: { handshake_rate_per_ip: 5/s }");
    let web = process.web();
    let attack = |number| {
        // Both results are possible.
        let _ = Tls::to(web, &authority, "a.test").from(attacker(number)).connect();
    };
    let client = Tls::to(web, &authority, "a.test").from(Ipv4Addr::new(127, 7, 7, 7));
    let ask = || {
        thread::park_timeout(ms(250));
        assert_eq!(client.get("/").expect("an answer").0.body, "served");
    };
    beside(&process, "handshake.rate_per_ip", attack, ask);
}
