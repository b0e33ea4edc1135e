//! An endpoint that responds in time is never blamed, whatever its clients do; one that does not is.

use std::net::SocketAddr;

use bytes::Bytes;

use crate::harness::client::{H2Client, request};
use crate::harness::gateway::Watched;
use crate::harness::origin::response;
use crate::harness::{Client, Gateway, H2Origin, Origin, Setup, eventually, ms, ok};

/// A single failure has consequences.
const STRICT: &str = "\
    circuit_breaker: { consecutive: 1, min_requests: unlimited, open: 90s, max_open: 90s }, \
    outlier_detection: { consecutive_gateway_errors: 1, connect_failures: 1, max_ejected: 100% }";
/// An endpoint has little time, and the clients of these stories take more.
const IMPATIENT: &str = "timeouts: { connect: 5s, send: 200ms, wait: 200ms, receive: 200ms }";
const LONGER: std::time::Duration = ms(700);

const STREAM: &str = "buffering: { request: { mode: stream }, response: { mode: stream } }";

/// An origin that responds once a request is complete, and the upstream settings it needs.
enum Backend {
    Http1(Origin),
    Http2(H2Origin),
}

impl Backend {
    fn both() -> [Backend; 2] {
        [Backend::Http1(Origin::answering(|request| ok(&request.body))), Backend::Http2(H2Origin::start())]
    }

    fn setup(&self) -> Setup {
        let (address, protocol): (SocketAddr, _) = match self {
            Backend::Http1(origin) => (origin.address(), "protocol: http1"),
            Backend::Http2(origin) => (origin.address(), "protocol: h2c"),
        };
        Setup::before_all(&[address]).upstream(protocol).upstream(STRICT).upstream(IMPATIENT).route(STREAM)
    }
}

/// Whether the endpoint of the only upstream was accused of something.
fn is_accused(gateway: &Gateway) -> bool {
    gateway.metric("forebay_upstream_breaker_open") != 0.0 || gateway.metric("forebay_upstream_ejections_total") != 0.0
}

/// Uploads a hundred bytes with a pause in the middle.
fn upload_slowly(client: &mut Client, fields: &str) -> u16 {
    client.send(format!("POST / HTTP/1.1\r\nHost: test\r\n{fields}Content-Length: 100\r\n\r\n"));
    client.send("x");
    client.dawdle(LONGER);
    client.send([b'y'; 99]);
    client.response().status
}

#[test]
fn a_client_may_take_longer_to_send_its_body_than_the_endpoint_to_answer() {
    for backend in Backend::both() {
        let gateway = backend.setup().start();
        for fields in ["", "Content-Type: application/grpc\r\nTE: trailers\r\n"] {
            assert_eq!(upload_slowly(&mut gateway.client(), fields), 200, "{fields}");
        }
        assert!(!is_accused(&gateway));
    }
}

#[test]
fn the_time_of_an_attempt_does_not_run_while_its_client_is_waited_for() {
    for backend in Backend::both() {
        let gateway = backend.setup().route("retry: { per_try_timeout: 200ms }").start();
        assert_eq!(upload_slowly(&mut gateway.client(), ""), 200);
        assert!(!is_accused(&gateway));
    }
}

#[test]
fn a_client_that_stops_in_the_middle_of_its_body_is_what_is_waited_for() {
    for backend in Backend::both() {
        let gateway = backend.setup().route("client: { body_idle: 700ms }").start();
        let mut client = gateway.client();
        client.send("POST / HTTP/1.1\r\nHost: test\r\nContent-Length: 100\r\n\r\nx");
        assert_eq!(client.response().status, 408);
        assert_eq!(gateway.log_line().reason(), "send.body_timeout");
        assert_eq!(gateway.client().get("/").status, 200);
        assert!(!is_accused(&gateway));
    }
}

#[test]
fn both_ends_of_a_stream_may_be_silent_while_the_client_has_not_ended_it() {
    let origin = H2Origin::start();
    let backend = Backend::Http2(origin);
    let gateway = backend.setup().listener("protocols: [h2c]").start();
    let client = H2Client::connect(gateway.web());
    let request = http::Request::post("http://test/echo").header("content-type", "application/grpc");
    let (response, mut send) = client.begin(request.header("te", "trailers").body(()).expect("a request"), false);
    send.send_data(Bytes::from_static(b"one"), false).expect("room");
    let mut body = client.step(response).expect("an answer").into_body();
    assert_eq!(&client.step(body.data()).expect("a piece").expect("the first one")[..], b"one");
    std::thread::sleep(LONGER);
    send.send_data(Bytes::from_static(b"two"), true).expect("room");
    assert_eq!(&client.step(body.data()).expect("a piece").expect("the second one")[..], b"two");
    client.step(body.trailers()).expect("an end");
    let line = gateway.log_line();
    assert_eq!((line.status(), line.reason()), (200, ""));
    assert!(!is_accused(&gateway));
}

#[test]
fn an_endpoint_that_gives_a_client_up_that_dawdles_is_not_accused() {
    let origin = Origin::scripted();
    let setup = Setup::before(&origin).upstream(STRICT).route(STREAM);
    let gateway = setup.start();
    let mut client = gateway.client();
    client.send("POST /slow HTTP/1.1\r\nHost: test\r\nContent-Length: 100\r\n\r\nx");
    let mut connection = origin.accept();
    connection.header();
    client.dawdle(ms(1_300));
    connection.reset();
    client.try_send("y");
    assert_eq!(client.response().status, 502);
    assert!(gateway.log_line_of("/slow").reason().ends_with(".reset"));
    assert!(!is_accused(&gateway));

    let mut client = gateway.client();
    client.send(request("GET", "/prompt", "", ""));
    let mut connection = origin.accept();
    connection.request();
    connection.reset();
    assert_eq!(client.response().status, 502);
    assert!(is_accused(&gateway), "this client kept it waiting for nothing");
}

#[test]
fn a_deadline_that_a_reader_uses_up_is_not_held_against_the_endpoint() {
    let origin = Origin::answering(|_| ok(vec![b'x'; 8 << 20]));
    let gateway = Setup::before(&origin).upstream(STRICT).route(STREAM).route("deadline: 600ms").start();
    let mut client = Client::slow(gateway.web());
    client.send(request("GET", "/", "", ""));
    let line = gateway.log_line();
    assert_eq!(line.reason(), "receive.deadline");
    assert!(!is_accused(&gateway));
    drop(client);
}

#[test]
fn a_deadline_that_the_endpoint_uses_up_is_held_against_it() {
    let origin = Origin::scripted();
    // The gateway's own time must be less than a tenth of it, also on a busy machine.
    let setup = Setup::before(&origin).upstream(STRICT).route("deadline: 5s");
    let (gateway, mut client, _connection) = setup.asked(&origin);
    assert_eq!(client.response().status, 504);
    assert_eq!(gateway.log_line().reason(), "wait.deadline");
    assert!(is_accused(&gateway));
}

#[test]
fn an_endpoint_that_is_silent_is_accused_over_both_protocols() {
    let mute = Origin::scripted();
    for backend in [Backend::Http1(mute), Backend::Http2(H2Origin::start())] {
        let gateway = backend.setup().start();
        assert_eq!(gateway.client().get("/hung").status, 504);
        assert_eq!(gateway.log_line().reason(), "wait.timeout");
        assert!(is_accused(&gateway));
    }
}

#[test]
fn an_endpoint_that_answers_without_taking_all_of_a_request_is_heard_to_the_end() {
    let origin = H2Origin::start();
    let setup = Setup::before_all(&[origin.address()]).upstream("protocol: h2c").upstream(STRICT).route(STREAM);
    let gateway = setup.upstream("timeouts: { send: 1s }").start();
    let mut client = Client::slow(gateway.web());
    // More than the window of a stream; this endpoint reads none of it.
    client.send(request("POST", "/large", "", vec![b'x'; 100_000]));
    client.bytes(100);
    client.dawdle(ms(1_500));
    let (mut wire, length) = (client.into_wire(), 16 << 20);
    let mut taken = 100;
    while taken < length {
        let piece = wire.what_is_there();
        assert!(!piece.is_empty(), "cut after {taken} bytes");
        taken += piece.len();
    }
    drop(wire);
    gateway.wait_metric("forebay_phase_active", |active| active == 0.0);
    assert!(!is_accused(&gateway));
}

#[test]
fn what_happens_in_a_tunnel_is_not_held_against_the_endpoint() {
    const UPGRADE: &str = "GET / HTTP/1.1\r\nHost: test\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
                           Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n";
    let origin = Origin::scripted();
    let gateway = Setup::before(&origin).upstream(STRICT).upstream(IMPATIENT).start();
    for resets in [false, true] {
        let mut client = gateway.client();
        client.send(UPGRADE);
        let mut connection = origin.accept();
        connection.header();
        connection.send("HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n");
        assert_eq!(client.response().status, 101);
        if resets {
            connection.reset();
            client.rest();
        } else {
            // Neither side sends anything: the tunnel is closed.
            client.rest();
            connection.closed();
        }
    }
    gateway.log_lines(2);
    assert!(!is_accused(&gateway));
    let mut client = gateway.client();
    client.send(request("GET", "/", "", ""));
    let mut connection = origin.accept();
    connection.request();
    connection.send(response("200 OK", "", "well"));
    assert_eq!(client.response().text(), "well");
}

/// A breaker that is open for a moment, and lets one request through then.
const ONE_PROBE: &str = "circuit_breaker: { consecutive: 1, min_requests: unlimited, open: 1ms, max_open: 1ms, \
                         probes: 1, probe_client: 300ms }";

#[test]
fn a_probe_that_dawdles_does_not_keep_all_others_out() {
    let origin = Origin::scripted();
    let (gateway, mut client, mut connection) = Setup::before(&origin).upstream(ONE_PROBE).route(STREAM).asked(&origin);
    connection.send(response("500 Internal Server Error", "", "sick"));
    assert_eq!(client.response().text(), "sick");
    client.dawdle(ms(20));
    client.send("POST /slow HTTP/1.1\r\nHost: test\r\nContent-Length: 100\r\n\r\nx");
    connection.header();
    gateway.wait_metric("forebay_upstream_breaker_open", |state| state == 1.0);
    assert_eq!(gateway.client().get("/").status, 503, "it may take its time, and is the only one");
    client.dawdle(ms(600));
    let mut other = gateway.client();
    other.send(request("GET", "/", "", ""));
    let mut connection = origin.accept();
    connection.request();
    connection.answer("well");
    assert_eq!(other.response().text(), "well");
    gateway.wait_metric("forebay_upstream_breaker_open", |state| state == 0.0);
    assert_eq!(gateway.metric("forebay_upstream_breaker_probes_replaced_total"), 1.0);
}

#[test]
fn an_upload_that_is_given_up_does_not_make_its_endpoint_slow() {
    // One is so much slower that even a late response of the other does not make it the better choice.
    let endpoint = |pause| {
        Origin::answering(move |_| {
            std::thread::sleep(pause);
            ok("well")
        })
    };
    let origins = [endpoint(ms(5)), endpoint(ms(400))];
    let setup = Setup::before_all(&origins.each_ref().map(Origin::address)).route(STREAM);
    let gateway = setup.upstream("load_balancing: { policy: peak_ewma }").start();
    let mut client = gateway.client();
    // Waits until both have a latency.
    while origins.iter().any(|origin| origin.answered() == 0) {
        client.get("/");
    }
    let mut slow = gateway.client();
    slow.send("POST / HTTP/1.1\r\nHost: test\r\nContent-Length: 100\r\n\r\nx");
    slow.dawdle(ms(1_500));
    slow.reset();
    let uploads = |origin: &Origin| origin.requests().iter().any(|request| request.method() == "POST");
    let asked = eventually("the upload at its endpoint", || origins.iter().position(uploads));
    assert_eq!(asked, 0, "the faster one is asked");
    // If the latency included the upload, the slower endpoint would be chosen for the next half minute.
    let before = origins[0].answered();
    (0..30).for_each(|_| assert_eq!(client.get("/").status, 200));
    let asked = origins[0].answered() - before;
    assert!(asked >= 25, "{asked} of 30");
}

#[test]
fn a_client_that_leaves_while_the_rest_of_its_answer_is_held_back_is_no_failure_of_the_gateway() {
    let origin = Origin::answering(|_| ok(vec![b'x'; 1 << 20]));
    let gateway = Setup::before(&origin).route("client: { limit_rate: { rate: 16KiB/s, after: 16KiB } }").start();
    let mut client = gateway.client();
    client.send(request("GET", "/", "", ""));
    client.bytes(1_000);
    gateway.wait_phase(forebay::phase::Phase::Write);
    drop(client);
    assert_eq!(gateway.log_line().reason(), "write.aborted");
}

#[test]
fn readers_that_take_nothing_keep_no_answers_from_others_on_a_connection_that_all_share() {
    let origin = H2Origin::start();
    let setup = Setup::before_all(&[origin.address()]).upstream("protocol: h2c").upstream(STRICT).route(STREAM);
    let gateway = setup.upstream("timeouts: { receive: 5s }").start();
    let mut client = gateway.client();
    assert_eq!(client.get("/first").status, 200);
    let slow: Vec<Client> = (0..3)
        .map(|_| {
            let mut slow = Client::slow(gateway.web());
            slow.send(request("GET", "/large", "", ""));
            slow.bytes(100);
            slow
        })
        .collect();
    for _ in 0..2 {
        assert_eq!(client.get("/large").body.len(), 16 << 20);
    }
    assert_eq!(gateway.metric("forebay_upstream_connects_total{outcome=\"new\"}"), 1.0);
    assert!(!is_accused(&gateway));
    drop(slow);
}

#[test]
fn an_endpoint_is_not_accused_of_what_the_gateway_lacks() {
    let origin = Origin::scripted();
    // Reaching resource limits requires that the configured limits are off.
    let limits = "protocols: [http1, h2c], limits: { requests_per_ip: unlimited }";
    let gateway = Setup::before(&origin).upstream(STRICT).listener(limits).open_files(200).spawn();
    let clients: Vec<H2Client> = (0..3).map(|_| H2Client::connect(gateway.web())).collect();
    let ask = |client: &H2Client| client.begin(http::Request::get("http://test/").body(()).expect("a request"), true).0;
    let answers: Vec<_> = clients.iter().flat_map(|client| (0..100).map(|_| ask(client)).collect::<Vec<_>>()).collect();
    let (refused, _, others) = clients[0].step(futures::future::select_all(answers));
    assert_eq!(refused.expect("an answer").status(), 503);
    drop((others, clients));
    gateway.wait_metric("forebay_refusals_total{reason=\"connect.exhausted\"}", |count| count >= 1.0);
    gateway.wait_metric("forebay_phase_active", |count| count == 0.0);
    assert_eq!(gateway.metric("forebay_refusals_total{reason=\"connect.failed\"}"), 0.0);
    assert!(gateway.metric("forebay_upstream_breaker_open") == 0.0);
    assert!(gateway.metric("forebay_upstream_ejections_total") == 0.0);
    let mut client = gateway.client();
    client.send(request("GET", "/after", "", ""));
    let mut connection = eventually("the request at the origin", || {
        // Earlier connections belong to clients that have left.
        let mut connection = origin.accept();
        connection.next_request().filter(|request| request.target() == "/after").map(|_| connection)
    });
    connection.answer("well");
    assert_eq!(client.response().text(), "well");
}
