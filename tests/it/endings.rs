//! The end of a connection: the client receives complete responses, however slowly it reads.

use std::process::Command;
use std::time::Instant;

use crate::harness::client::request;
use crate::harness::frames::{Frame, Frames, kind};
use crate::harness::gateway::Watched;
use crate::harness::nginx::noise;
use crate::harness::{Client, End, H2Client, Origin, Setup, ms, ok};

/// More than the buffers between gateway and client hold.
const BODY_BYTES: usize = 300_000;
/// A size that the kernel buffers for a client that reads nothing.
const SENT_BYTES: usize = 8_000;
/// The number of bytes that a client reads before it returns credit for them.
const CREDIT_BYTES: usize = 4096;

/// An origin with a large response, and a gateway with HTTP/2 in front of it.
fn large() -> (Origin, Setup) {
    let answer = ok(noise(BODY_BYTES));
    let origin = Origin::answering(move |_| answer.clone());
    let setup = Setup::before(&origin).listener("protocols: [http1, h2c]");
    (origin, setup)
}

#[test]
fn the_last_answer_of_an_http_2_connection_reaches_a_client_that_returns_credit_in_small_pieces() {
    let (_origin, setup) = large();
    let gateway = setup.listener("limits: { requests_per_connection: 1 }").start();
    for _ in 0..5 {
        let mut client = Frames::slow(gateway.web());
        client.send(&Frame::get(1));
        assert_eq!(client.answer(1, CREDIT_BYTES), (BODY_BYTES, true));
    }
}

#[test]
fn the_last_answer_of_an_http_2_connection_reaches_curl() {
    let (_origin, setup) = large();
    let gateway = setup.listener("limits: { requests_per_connection: 1 }").start();
    for _ in 0..5 {
        let url = format!("http://{}/", gateway.web());
        let arguments = ["-sS", "--fail", "--max-time", "20", "--http2-prior-knowledge", "--limit-rate", "2M", &url];
        let output = Command::new("curl").args(arguments).output().expect("curl");
        let error = String::from_utf8_lossy(&output.stderr);
        assert_eq!((output.status.code(), output.stdout.len()), (Some(0), BODY_BYTES), "{error}");
    }
}

#[test]
fn answers_that_http_2_clients_still_read_at_a_stop_reach_them() {
    let (_origin, setup) = large();
    let mut process = setup.server("threads: 1, shutdown: { pause: 0s, deadline: 60s }").spawn();
    let mut clients: Vec<Frames> = (0..5).map(|_| Frames::slow(process.web())).collect();
    for client in &mut clients {
        client.send(&Frame::get(1));
        client.until(kind::HEADERS);
    }
    process.signal(libc::SIGTERM);
    let readers = clients.into_iter().map(|mut client| std::thread::spawn(move || client.answer(1, CREDIT_BYTES)));
    for reader in readers.collect::<Vec<_>>() {
        assert_eq!(reader.join().expect("a client"), (BODY_BYTES, true));
    }
    assert_eq!(process.ended().code(), Some(0));
}

#[test]
fn an_idle_http_2_connection_gets_a_goaway_before_it_is_closed() {
    let origin = Origin::named("origin");
    let gateway = Setup::before(&origin).listener("protocols: [h2c], timeouts: { idle: 300ms }").start();
    let mut client = Frames::connect(gateway.web());
    client.send(&Frame::get(1));
    client.until(kind::DATA);
    let last = loop {
        let frame = client.until(kind::GOAWAY);
        // The first GOAWAY only announces the second (RFC 9113 §6.8).
        if frame.payload[..4] != [0x7f, 0xff, 0xff, 0xff] {
            break frame;
        }
    };
    assert_eq!(last.payload, [0, 0, 0, 1, 0, 0, 0, 0], "stream 1 was the last, and nothing is wrong");
    assert_eq!(client.next(), None);
}

#[test]
fn an_http_2_connection_with_a_stream_is_not_idle() {
    let origin = Origin::scripted();
    let gateway = Setup::before(&origin).listener("protocols: [h2c], timeouts: { idle: 300ms }").start();
    let client = H2Client::connect(gateway.web());
    let request = http::Request::get("http://test/").body(()).expect("a request");
    let (response, _) = client.begin(request, true);
    let mut connection = origin.accept();
    connection.request();
    std::thread::sleep(ms(1_000));
    connection.answer("late");
    assert_eq!(client.step(response).expect("an answer").status(), 200);
}

#[test]
fn an_idle_http_2_client_that_answers_no_ping_is_closed_all_the_same() {
    let origin = Origin::named("origin");
    let gateway = Setup::before(&origin).listener("protocols: [h2c], timeouts: { idle: 300ms }").start();
    let mut client = gateway.client();
    client.send("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n");
    client.send([0, 0, 0, 4, 0, 0, 0, 0, 0]);
    let begin = Instant::now();
    client.rest();
    assert!(begin.elapsed() < ms(10_000), "{:?}", begin.elapsed());
    gateway.wait_metric("forebay_client_connections{listener=\"web\"}", |count| count == 0.0);
}

#[test]
fn a_request_behind_the_last_one_does_not_cost_a_client_the_end_of_its_answer() {
    let (_origin, setup) = large();
    let gateway = setup.listener("limits: { requests_per_connection: 1 }").start();
    for _ in 0..5 {
        let mut client = Client::slow(gateway.web());
        client.send(request("GET", "/", "", "").repeat(2));
        let answer = client.response();
        assert_eq!(
            (answer.value("connection"), answer.end, answer.body.len()),
            (Some("close"), End::Complete, BODY_BYTES)
        );
    }
}

#[test]
fn a_request_that_crosses_a_stop_does_not_cost_a_client_the_end_of_its_answer() {
    // The response fits into the kernel's buffers, so that the gateway has completed it.
    let answer = ok(noise(SENT_BYTES));
    let origin = Origin::answering(move |_| answer.clone());
    let setup = Setup::before(&origin).server("threads: 1, shutdown: { pause: 0s, deadline: 60s }");
    let mut process = setup.spawn();
    let mut clients: Vec<Client> = (0..5).map(|_| Client::slow(process.web())).collect();
    for client in &mut clients {
        client.send(request("GET", "/", "", ""));
    }
    process.wait_metric("forebay_client_connections{listener=\"web\",state=\"idle\"}", |count| count == 5.0);
    process.signal(libc::SIGTERM);
    process.says("stopping");
    for client in &mut clients {
        client.try_send(request("GET", "/", "", ""));
        let answer = client.response();
        assert_eq!((answer.end, answer.body.len()), (End::Complete, SENT_BYTES));
    }
    drop(clients);
    assert_eq!(process.ended().code(), Some(0));
}
