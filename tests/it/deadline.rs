//! Time limits for an exchange as a whole, and for one attempt.

use std::time::Instant;

use forebay::origin::Running;
use forebay::phase::Phase;

use crate::harness::client::request;
use crate::harness::gateway::Watched;
use crate::harness::origin::{Closed, built_in, first_fails};
use crate::harness::{Ask, Client, End, Gateway, H2Origin, Leave, Origin, Protocol, Setup, ms, ok};

const DEADLINE: &str = "deadline: 300ms";

/// A gateway in front of these with a deadline of 300 ms; all other time limits are long.
fn hurried(addresses: &[impl ToString]) -> Setup {
    Setup::before_all(addresses).route(DEADLINE).listener("protocols: [http1, h2c]")
}

/// Asserts that it ended for this reason. That proves that it ended in time: all other limits are longer than a
/// story.
fn over(gateway: &Gateway, reason: &str) {
    assert_eq!(gateway.log_line().reason(), reason);
    gateway.refused_once(reason);
}

#[test]
fn a_backend_that_does_not_answer_before_the_deadline_is_a_504() {
    for protocol in Protocol::BOTH {
        let origin = Origin::scripted();
        let gateway = hurried(&[origin.address()]).start();
        let began = Instant::now();
        let exchange = Ask::get("/").begin(protocol, gateway.web());
        let mut connection = origin.accept();
        connection.request();
        exchange.answer().refused(504, "wait.deadline");
        assert!(began.elapsed() >= ms(300));
        over(&gateway, "wait.deadline");
        connection.closed();
    }
}

#[test]
fn a_deadline_spans_all_attempts_and_the_pauses_between_them() {
    let origins = [Origin::scripted(), Origin::scripted(), Origin::scripted()];
    let rules = "retry: { attempts: 10, on: [timeout], per_try_timeout: 300ms, same_endpoint: true }";
    let setup = Setup::before_all(&origins.each_ref().map(Origin::address)).route("deadline: 1500ms");
    let gateway = setup.route(rules).start();
    assert_eq!(gateway.client().get("/").status, 504);
    let line = gateway.log_line();
    assert!((2.0..=5.0).contains(&line.number("attempts")), "{} attempts", line.number("attempts"));
    // If no further attempt fits before the deadline, the last failure is reported.
    assert!(line.reason().ends_with(".deadline") || line.reason() == "wait.timeout", "{}", line.reason());
    gateway.wait_metric("forebay_retries_refused_total{reason=\"deadline\"}", |count| count == 1.0);
}

#[test]
fn a_connection_that_does_not_come_about_before_the_deadline_is_a_504() {
    let silent = Closed::silent();
    let gateway = hurried(&[silent.address()]).start();
    assert_eq!(gateway.client().get("/").status, 504);
    over(&gateway, "connect.deadline");
}

#[test]
fn an_answer_that_does_not_end_before_the_deadline_is_cut() {
    for protocol in Protocol::BOTH {
        let origin = built_in();
        let gateway = hurried(&[origin.address()]).start();
        let answer = Ask::get("/fault/stall").over(protocol, gateway.web());
        assert_eq!((answer.status, answer.length, answer.end), (200, 500, End::Cut));
        over(&gateway, "receive.deadline");
        gateway.wait_at_rest();
    }
}

#[test]
fn a_backend_that_does_not_take_the_request_before_the_deadline_is_given_up() {
    let origin = Origin::scripted();
    let gateway = hurried(&[origin.address()]).start();
    let mut client = gateway.client();
    client.try_send(request("PUT", "/", "", vec![b'x'; 64 << 20]));
    assert_eq!(client.try_response_to("PUT").map(|answer| answer.status), Some(504));
    let _held = origin.accept();
    over(&gateway, "send.deadline");
}

/// An HTTP/2 endpoint that accepts a connection and reads no body: its windows keep their initial size.
fn takes_nothing() -> Origin {
    // An empty SETTINGS frame, and the acknowledgement of the gateway's (RFC 9113 §6.5).
    const SETTINGS: [u8; 18] = [0, 0, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 4, 1, 0, 0, 0, 0];
    Origin::playing(|connection| {
        let mut wire = connection.into_wire();
        if wire.send(SETTINGS).is_ok() {
            wire.rest();
        }
    })
}

#[test]
fn a_backend_of_http_2_that_takes_no_more_of_the_request_is_given_up_as_well() {
    let origin = takes_nothing();
    let keys =
        [("deadline: 300ms", "send.deadline"), ("retry: { attempts: 1, per_try_timeout: 300ms }", "send.timeout")];
    for (mode, (rule, reason)) in ["full", "stream"].into_iter().flat_map(|mode| keys.map(|key| (mode, key))) {
        // An incomplete stream has no deadline yet.
        if (mode, reason) == ("stream", "send.deadline") {
            continue;
        }
        let setup =
            Setup::before_all(&[origin.address()]).upstream("protocol: h2c, timeouts: { send: 60s, wait: 60s }");
        let gateway = setup.route(rule).route(&format!("buffering: {{ request: {{ mode: {mode} }} }}")).start();
        let mut client = gateway.client();
        client.try_send(request("PUT", "/", "", vec![b'x'; 200_000]));
        assert_eq!(client.try_response_to("PUT").map(|answer| answer.status), Some(504), "{mode}, {rule}");
        over(&gateway, reason);
        gateway.wait_metric("forebay_endpoint_inflight", |inflight| inflight == 0.0);
    }
}

#[test]
fn a_client_that_leaves_ends_what_a_backend_of_http_2_does_not_take() {
    let origin = takes_nothing();
    for (protocol, mode) in
        Protocol::BOTH.into_iter().flat_map(|protocol| ["full", "stream"].map(|mode| (protocol, mode)))
    {
        let setup = Setup::before_all(&[origin.address()]).listener("protocols: [http1, h2c]");
        let setup = setup.upstream("protocol: h2c, timeouts: { send: 60s, wait: 60s }");
        let gateway = setup.route(&format!("buffering: {{ request: {{ mode: {mode} }} }}")).start();
        let mut exchange = Ask::put(100_000).begin(protocol, gateway.web());
        exchange.finish_body();
        gateway.wait_metric("forebay_endpoint_inflight", |inflight| inflight == 1.0);
        let began = Instant::now();
        exchange.leave(Leave::Reset);
        gateway.wait_metric("forebay_endpoint_inflight", |inflight| inflight == 0.0);
        assert!(began.elapsed() < ms(10_000), "{protocol:?}, {mode}: {:?}", began.elapsed());
        assert!(gateway.log_line().reason().ends_with(".aborted"), "{protocol:?}, {mode}");
    }
}

#[test]
fn a_slow_upload_is_no_part_of_it() {
    for mode in ["full", "stream"] {
        let origin = Origin::answering(|request| ok(&request.body));
        let setup = hurried(&[origin.address()]).route(&format!("buffering: {{ request: {{ mode: {mode} }} }}"));
        let gateway = setup.start();
        let mut client = gateway.client();
        client.send("POST / HTTP/1.1\r\nHost: test\r\nContent-Length: 10\r\n\r\n");
        assert!(client.drip("ten bytes!", ms(60)), "the gateway spoke before the upload was over");
        assert_eq!(client.response().text(), "ten bytes!");
    }
}

#[test]
fn a_streamed_upload_that_is_over_has_a_deadline_for_its_answer() {
    let origin = Origin::scripted();
    let gateway = hurried(&[origin.address()]).route("buffering: { request: { mode: stream } }").start();
    let mut client = gateway.client();
    client.send(request("POST", "/", "", "all of it"));
    let mut connection = origin.accept();
    connection.request();
    assert_eq!(client.response().status, 504);
    assert_eq!(gateway.log_line().reason(), "wait.deadline");
}

#[test]
fn a_client_that_takes_slowly_what_is_held_for_it_is_not_cut() {
    let origin = built_in();
    let gateway = Setup::before_all(&[origin.address()]).route("deadline: 3s").start();
    let mut client = Client::slow(gateway.web());
    client.send(request("GET", "/bytes/4MiB", "", ""));
    gateway.wait_phase(Phase::Write);
    client.dawdle(ms(3_200));
    let answer = client.response();
    assert_eq!((answer.status, answer.body.len(), answer.end), (200, 4 << 20, End::Complete));
}

#[test]
fn a_client_for_which_the_backend_has_to_wait_is_cut() {
    let origin = built_in();
    let setup = hurried(&[origin.address()]).route("buffering: { response: { mode: stream } }");
    let gateway = setup.start();
    let mut client = Client::slow(gateway.web());
    client.send(request("GET", "/bytes/64MiB", "", ""));
    gateway.refused_once("receive.deadline");
    over(&gateway, "receive.deadline");
    assert_eq!(client.response().end, End::Cut);
}

#[test]
fn an_exchange_waits_in_the_queue_no_longer_than_its_deadline() {
    let origin = Origin::scripted();
    let patient = "{ name: patient, match: { path: { exact: /patient } }, upstream: app }";
    let setup = hurried(&[origin.address()]).upstream("limits: { endpoint: { requests: 1 } }").also_route(patient);
    let gateway = setup.start();
    let mut first = gateway.client();
    first.send(request("GET", "/patient", "", ""));
    let mut connection = origin.accept();
    connection.request();
    assert_eq!(gateway.client().get("/").status, 504);
    over(&gateway, "queue.deadline");
    connection.answer("the one before it");
    assert_eq!(first.response().text(), "the one before it");
}

#[test]
fn an_attempt_that_takes_too_long_is_followed_by_another_where_the_route_says_so() {
    for fault in ["/fault/hang", "/fault/slow-header"] {
        for protocol in Protocol::BOTH {
            let origins = first_fails(fault);
            let setup = Setup::before_all(&origins.each_ref().map(Running::address));
            let setup = setup.listener("protocols: [http1, h2c]");
            let gateway = setup.route("retry: { on: [timeout], per_try_timeout: 200ms }").start();
            let answer = Ask::get("/bytes/10").over(protocol, gateway.web());
            assert_eq!((answer.status, answer.length), (200, 10), "{fault}");
            let line = gateway.log_line();
            assert_eq!((line.number("attempts"), line.list("failed").len()), (2.0, 1));
            assert_eq!(line.list("failed")[0]["reason"], "wait.timeout");
        }
    }
}

#[test]
fn an_attempt_that_does_not_connect_in_its_time_is_followed_by_another() {
    let (silent, alive) = (Closed::silent(), Origin::named("alive"));
    let setup = Setup::before_all(&[silent.address(), alive.address()]).upstream("timeouts: { connect: 10m }");
    let gateway = setup.route("retry: { per_try_timeout: 200ms }").start();
    assert_eq!(gateway.client().get("/").text(), "alive");
}

#[test]
fn an_attempt_has_no_time_limit_once_its_answer_has_begun() {
    let origin = built_in();
    let gateway = Setup::before_all(&[origin.address()]).route("retry: { per_try_timeout: 200ms }").start();
    let answer = Ask::get("/drip/10/50ms").over(Protocol::Http1, gateway.web());
    assert_eq!((answer.status, answer.end), (200, End::Complete));
}

#[test]
fn a_grpc_call_ends_when_its_own_timeout_is_over() {
    let origin = H2Origin::start();
    let setup = Setup::before_all(&[origin.address()]).upstream("protocol: h2c").listener("protocols: [h2c]");
    let gateway = setup.start();
    let call = Ask::post(100).to("/echo").grpc().field("grpc-timeout", "300m");
    // The client never ends its side, and the origin echoes until it does.
    let mut exchange = call.chunked().begin(Protocol::Http2, gateway.web());
    assert_eq!(exchange.status(), 200);
    assert_eq!(exchange.answer().end, End::Cut);
    assert_eq!(gateway.log_line().reason(), "receive.deadline");
    gateway.wait_at_rest();
}

#[test]
fn that_a_client_is_impatient_says_nothing_against_an_endpoint() {
    let origin = H2Origin::start();
    let keys = "protocol: h2c, circuit_breaker: { consecutive: 3 }";
    let setup = Setup::before_all(&[origin.address()]).upstream(keys).listener("protocols: [h2c]");
    let gateway = setup.start();
    for n in 1..=5 {
        let call = Ask::post(100).to("/echo").grpc().field("grpc-timeout", "500m");
        let mut exchange = call.chunked().begin(Protocol::Http2, gateway.web());
        assert_eq!(exchange.status(), 200, "call {n}");
        assert_eq!(exchange.answer().end, End::Cut);
    }
    assert_eq!(gateway.metric("forebay_upstream_breaker_open"), 0.0);
}
