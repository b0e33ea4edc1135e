//! Sending requests to endpoints: clients that stall, and backends that do not read.

use forebay::phase::Phase;

use crate::harness::client::request;
use crate::harness::gateway::Watched;
use crate::harness::{Client, Gateway, H2Client, H2Origin, Origin, Setup, eventually, ms};

/// With buffering, a stalled upload would never reach this phase.
const STREAM: &str = "buffering: { request: { mode: stream } }";
const UPLOAD: &str = "POST /upload HTTP/1.1\r\nHost: test\r\nContent-Length: 1000\r\n\r\nthe first half";

#[test]
fn a_client_that_stops_sending_its_body_is_answered_408_and_the_backend_is_let_go() {
    let origin = Origin::scripted();
    let (gateway, mut client) = stopped(&origin);
    let mut connection = origin.accept();
    connection.header();
    assert_eq!(client.response().status, 408);
    client.closed();
    connection.closed();

    let line = gateway.log_line();
    assert_eq!((line.status(), line.reason()), (408, "send.body_timeout"));
    gateway.refused_once("send.body_timeout");
}

#[test]
fn the_time_in_which_a_refused_client_may_close_its_side_is_none_of_the_exchange() {
    let origin = Origin::scripted();
    let (gateway, mut client) = stopped(&origin);
    let mut connection = origin.accept();
    connection.header();
    assert_eq!(client.response().status, 408);
    // The gateway keeps reading for two seconds because the client does not close.
    client.closed();
    let written = gateway.log_line().phase(Phase::Write).expect("a phase");
    assert!(written < 2_000.0, "{written} ms of it in `write`");
}

/// A gateway that streams to `origin`, and a client that stops in the middle of its body.
fn stopped(origin: &Origin) -> (Gateway, Client) {
    let gateway = Setup::before(origin).route(STREAM).route("client: { body_idle: 200ms }").start();
    let mut client = gateway.client();
    client.send(UPLOAD);
    (gateway, client)
}

#[test]
fn a_client_that_sends_slowly_but_steadily_is_not_cut() {
    let origin = Origin::answering(|request| crate::harness::ok(&request.body));
    let gateway = Setup::before(&origin).route("client: { body_idle: 300ms }").start();
    let mut client = gateway.client();
    client.send("POST / HTTP/1.1\r\nHost: test\r\nContent-Length: 10\r\n\r\n");
    assert!(client.drip("ten bytes!", ms(50)));
    assert_eq!(client.response().text(), "ten bytes!");
}

#[test]
fn a_client_that_goes_away_in_the_middle_of_its_upload_lets_the_backend_go() {
    let origin = Origin::scripted();
    let gateway = Setup::before(&origin).route(STREAM).start();
    let mut client = gateway.client();
    client.send(UPLOAD);
    let mut connection = origin.accept();
    connection.header();
    gateway.wait_phase(Phase::Send);
    client.reset();
    connection.closed();

    let line = gateway.log_line();
    assert_eq!((line.status(), line.reason()), (499, "send.aborted"));
    gateway.refused_once("send.aborted");
    gateway.wait_metric("forebay_phase_active", |count| count == 0.0);
}

#[test]
fn a_client_that_ends_its_connection_in_the_middle_of_its_upload_is_no_whole_request() {
    let origin = Origin::scripted();
    let gateway = Setup::before(&origin).route(STREAM).start();
    let mut client = gateway.client();
    client.send("POST / HTTP/1.1\r\nHost: test\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n");
    let mut connection = origin.accept();
    connection.header();
    drop(client);
    let seen = connection.bytes(1_000_000);
    assert!(!seen.ends_with(b"0\r\n\r\n"), "the origin was told that this was all");
    assert_eq!(gateway.log_line().reason(), "send.aborted");
}

#[test]
fn a_streamed_body_that_is_not_framed_as_its_header_says_is_refused() {
    let origin = Origin::scripted();
    let gateway = Setup::before(&origin).route(STREAM).start();
    let mut client = gateway.client();
    client.send("POST / HTTP/1.1\r\nHost: test\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n");
    let mut connection = origin.accept();
    connection.header();
    client.send("no size\r\n");
    assert_eq!(client.response().status, 400);
    client.closed();
    connection.closed();
    let line = gateway.log_line();
    assert_eq!((line.status(), line.reason()), (400, "send.body_malformed"));
    gateway.refused_once("send.body_malformed");
}

#[test]
fn a_backend_that_does_not_take_the_request_is_given_up() {
    let origin = Origin::scripted();
    // After a failed send, Pingora waits for an early response for as long as the longer of `wait` and `receive`;
    // only then does the exchange end.
    let gateway = Setup::before(&origin).upstream("timeouts: { send: 300ms, wait: 300ms, receive: 300ms }").start();
    let mut client = gateway.client();
    client.try_send(request("POST", "/", "", vec![b'x'; 64 << 20]));
    let answer = client.try_response_to("POST");
    let _held = origin.accept();
    assert_eq!(answer.map(|answer| answer.status), Some(504));
    let line = gateway.log_line();
    assert_eq!((line.status(), line.reason()), (504, "send.timeout"));
}

#[test]
fn a_backend_that_resets_during_the_upload_is_a_502() {
    let origin = Origin::scripted();
    let gateway = Setup::before(&origin).route(STREAM).start();
    let mut client = gateway.client();
    client.send(UPLOAD);
    let mut connection = origin.accept();
    connection.header();
    connection.reset();
    client.try_send(vec![b'x'; 986]);
    assert_eq!(client.response().status, 502);
    let line = gateway.log_line();
    assert_eq!(line.status(), 502);
    assert!(["send.reset", "wait.reset"].contains(&line.reason()), "{}", line.reason());
}

#[test]
fn a_post_is_not_sent_twice() {
    let origins = [Origin::scripted(), Origin::scripted()];
    let gateway = Setup::before_all(&origins.each_ref().map(Origin::address)).start();
    let mut client = gateway.client();
    client.send(request("POST", "/pay", "", "once"));
    let asked = eventually("one of them to be asked", || origins.iter().find(|origin| origin.connections() > 0));
    let mut connection = asked.accept();
    connection.request();
    connection.close();
    assert_eq!(client.response().status, 502);
    let line = gateway.log_line();
    assert_eq!((line.reason(), line.number("attempts")), ("wait.reset", 1.0));
    assert_eq!(origins.iter().map(Origin::connections).sum::<usize>(), 1);
}

#[test]
fn a_post_is_not_sent_twice_even_if_a_kept_connection_dies_under_it() {
    let origin = Origin::scripted();
    let (_gateway, mut client, mut connection) = Setup::before(&origin).asked(&origin);
    connection.answer("kept");
    assert_eq!(client.response().text(), "kept");

    client.send(request("POST", "/pay", "", "once"));
    assert_eq!(connection.request().body, b"once");
    connection.close();
    assert_eq!(client.response().status, 502);
    assert_eq!(origin.connections(), 1);
}

#[test]
fn an_http_2_client_that_gives_up_its_stream_lets_the_backend_go() {
    let origin = Origin::scripted();
    let gateway = Setup::before(&origin).listener("protocols: [h2c]").start();
    let client = H2Client::connect(gateway.web());
    client.abandon("/", "the request at the origin", || origin.connections() == 1);
    origin.accept().closed();
    let line = gateway.log_line();
    assert_eq!(line.status(), 499);
    assert!(line.reason().ends_with(".aborted"), "{}", line.reason());
    gateway.wait_metric("forebay_phase_active", |count| count == 0.0);
}

#[test]
fn an_upload_is_passed_on_while_it_arrives() {
    let origin = Origin::scripted();
    let gateway = Setup::before(&origin).route(STREAM).start();
    let mut client = gateway.client();
    client.send("POST / HTTP/1.1\r\nHost: test\r\nContent-Length: 8\r\n\r\nhalf");
    let mut connection = origin.accept();
    connection.header();
    assert_eq!(connection.bytes(4), b"half");
    gateway.wait_phase(Phase::Send);
    client.send("rest");
    assert_eq!(connection.bytes(4), b"rest");
    gateway.wait_phase(Phase::Wait);
    connection.answer("all of it");
    assert_eq!(client.response().text(), "all of it");
    let spent = eventually("its log line", || gateway.log_line().phase(Phase::Send));
    assert!(spent > 0.0);
}

#[test]
fn an_http_2_endpoint_hears_that_trailers_are_accepted() {
    let origin = H2Origin::start();
    let setup = Setup::before_all(&[origin.address()]).upstream("protocol: h2c");
    let gateway = setup.listener("protocols: [http1, h2c]").start();
    let (mut http1, http2) = (gateway.client(), H2Client::connect(gateway.web()));
    for (name, value, te) in
        [("te", "trailers", "trailers"), ("te", "gzip, trailers", "trailers"), ("x-none", "", ""), ("te", "gzip", "")]
    {
        let told = http1.ask("GET", "/", &format!("{name}: {value}\r\n"), "").json();
        assert_eq!(told["te"].as_str().unwrap_or_default(), te, "HTTP/1.1, {name}: {value}");
        if value == "trailers" || name != "te" {
            let request = http::Request::get("http://test/").header(name, value).body(()).expect("a request");
            let told: serde_json::Value =
                serde_json::from_slice(&http2.ask(request, b"").expect("an answer").body).expect("JSON");
            assert_eq!(told["te"].as_str().unwrap_or_default(), te, "HTTP/2, {name}: {value}");
        }
    }
}
