//! Writing responses: slow clients get all of it, clients that stop reading are cut off.

use std::thread;

use crate::harness::client::request;
use crate::harness::frames::{Frame, Frames, kind};
use crate::harness::gateway::Watched;
use crate::harness::nginx::noise;
use crate::harness::{Client, End, Origin, Setup, ms, ok};

#[test]
fn a_slow_reader_gets_every_byte() {
    let body = noise(2_000_000);
    let answer = ok(&body);
    let origin = Origin::answering(move |_| answer.clone());
    let gateway = Setup::before(&origin).start();
    let mut client = Client::slow(gateway.web());
    let answer = client.get("/");
    assert_eq!(answer.end, End::Complete);
    assert!(answer.body == body);
}

#[test]
fn a_client_that_stops_reading_is_cut_and_the_backend_let_go() {
    let origin = Origin::scripted();
    let gateway = Setup::before(&origin)
        .route("client: { write_idle: 300ms }, buffering: { response: { mode: stream } }")
        .start();
    let mut client = Client::slow(gateway.web());
    client.send(request("GET", "/", "", ""));
    let mut connection = origin.accept();
    connection.request();
    let sender = std::thread::spawn(move || {
        connection.try_send(ok(vec![b'x'; 64 << 20]));
        connection.closed();
    });

    let line = gateway.log_line();
    assert_eq!((line.status(), line.reason()), (200, "write.timeout"));
    gateway.refused_once("write.timeout");
    sender.join().expect("the origin");
    assert_eq!(client.response().end, End::Cut);
}

#[test]
fn a_client_that_reads_a_little_now_and_then_is_not_cut() {
    let body = noise(1_000_000);
    let answer = ok(&body);
    let origin = Origin::answering(move |_| answer.clone());
    let gateway = Setup::before(&origin).route("client: { write_idle: 1s }").start();
    let mut client = Client::slow(gateway.web());
    client.send(request("GET", "/", "", ""));
    let header = ok("").len() + 6;
    let mut read = client.bytes(header).len();
    while read < header + body.len() {
        client.dawdle(ms(20));
        read += client.bytes((header + body.len() - read).min(100_000)).len();
    }
    assert_eq!(gateway.log_line().reason(), "");
}

#[test]
fn a_client_of_http_2_that_gives_credit_now_and_then_gets_all_of_a_filters_response() {
    const BODY: usize = 150_000;
    const CREDIT: u32 = 20_000;
    let origin = Origin::named("origin");
    let filters = format!("client: {{ write_idle: 1s }}, filters: [ {{ respond: {{ body: {} }} }} ]", "x".repeat(BODY));
    let gateway = Setup::before(&origin).listener("protocols: [http1, h2c]").route(&filters).start();
    let mut client = Frames::connect(gateway.web());
    client.send(&Frame::get(1));
    // The credit that each stream and connection begin with (RFC 9113 §6.9.2).
    let (mut read, mut credit) = (0, 65_535);
    while read < BODY {
        if read == credit {
            thread::sleep(ms(400));
            client.send(&Frame::credit(0, CREDIT));
            client.send(&Frame::credit(1, CREDIT));
            credit += CREDIT as usize;
        }
        read += client.until(kind::DATA).payload.len();
    }
    assert_eq!((read, gateway.log_line().reason()), (BODY, ""));
}

#[test]
fn what_was_sent_is_counted_in_bytes() {
    let origin = Origin::answering(|_| ok("0123456789"));
    let gateway = Setup::before(&origin).start();
    let answer = gateway.client().ask("POST", "/", "", "12345");
    let sent = (answer.head.raw.len() + answer.body.len()) as f64;
    let bytes = |direction| format!("forebay_bytes_total{{route=\"all\",direction=\"{direction}\"}}");
    let counted = gateway.wait_metric(&bytes("sent"), |count| count > 0.0);
    assert!(counted == sent || counted == 10.0, "{counted} bytes counted, {sent} sent");
    gateway.wait_metric(&bytes("received"), |count| count >= 5.0);
}

#[test]
fn a_client_that_is_refused_in_the_middle_of_its_upload_is_not_reset() {
    let origin = Origin::named("origin");
    let gateway = Setup::before(&origin).filters("{ access: { deny: [127.0.0.1] } }").start();
    let mut client = gateway.client();
    client.send("POST / HTTP/1.1\r\nHost: test\r\nContent-Length: 10000000\r\n\r\n");
    assert_eq!(client.response().status, 403);
    let piece = vec![b'x'; 64 * 1024];
    assert!((0..64).all(|_| client.try_send(&piece)), "the gateway reset the connection");
    client.closed();
}
