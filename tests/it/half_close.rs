//! Clients that shut down their sending side: after a complete request they wait for the response (RFC 9112 §9.6),
//! in the middle of one they are gone. A reset always means that they are gone.

use std::time::Instant;

use forebay::phase::Phase;

use crate::harness::client::{Client, chunked, request};
use crate::harness::gateway::Watched;
use crate::harness::origin::{Connection, built_in};
use crate::harness::wire::End;
use crate::harness::{Gateway, Origin, Setup, eventually, ms, ok};

const MODES: [&str; 3] = ["auto", "full", "stream"];
const QUEUE: &str = "forebay_upstream_queue{upstream=\"app\"}";

/// Buffers both directions in this mode.
fn buffering(mode: &str) -> String {
    format!("buffering: {{ request: {{ mode: {mode} }}, response: {{ mode: {mode} }} }}")
}

fn start(origin: &Origin, mode: &str) -> Gateway {
    Setup::before(origin).route(&buffering(mode)).start()
}

/// A gateway, a client that has sent this and shut down its sending side, and the backend with its request.
fn ended(origin: &Origin, mode: &str, sent: impl AsRef<[u8]>) -> (Gateway, Client, Connection) {
    let gateway = start(origin, mode);
    let mut client = gateway.client();
    client.send(sent);
    client.end();
    let mut connection = origin.accept();
    connection.request();
    gateway.wait_phase(Phase::Wait);
    (gateway, client, connection)
}

/// Asserts that the response is complete, closes the connection, and is followed by its end.
fn is_answered(client: &mut Client, body: &str) {
    let answer = client.response();
    assert_eq!((answer.status, answer.text(), answer.end), (200, body, End::Complete));
    assert_eq!(answer.value("connection"), Some("close"));
    client.closed();
}

#[test]
fn a_client_that_closes_its_sending_side_behind_its_request_gets_its_answer() {
    let whole = [
        request("GET", "/", "", ""),
        request("POST", "/", "", "a body"),
        [request("POST", "/", "Transfer-Encoding: chunked\r\n", ""), chunked(b"a body", 4)].concat(),
    ];
    for (mode, sent) in MODES.into_iter().flat_map(|mode| whole.iter().map(move |sent| (mode, sent))) {
        let origin = Origin::scripted();
        let (gateway, mut client, mut connection) = ended(&origin, mode, sent);
        connection.answer("yours");
        is_answered(&mut client, "yours");
        assert_eq!((gateway.log_line().status(), gateway.log_line().reason()), (200, ""), "{mode}");
        gateway.wait_at_rest();
    }
}

#[test]
fn a_request_and_its_end_in_one_packet_are_a_request() {
    let origin = Origin::named("origin");
    let gateway = Setup::before(&origin).start();
    // The end arrives before the gateway first reads.
    let clients: Vec<Client> = (0..20)
        .map(|_| {
            let mut client = gateway.client();
            client.send(request("GET", "/", "", ""));
            client.end();
            client
        })
        .collect();
    clients.into_iter().for_each(|mut client| is_answered(&mut client, "origin"));
}

#[test]
fn every_request_before_the_end_is_answered() {
    let origin = Origin::answering(|request| ok(request.target()));
    let gateway = Setup::before(&origin).start();
    let mut client = gateway.client();
    let asked = [request("GET", "/1", "", ""), request("POST", "/2", "", "body"), request("GET", "/3", "", "")];
    client.send(asked.concat());
    client.end();
    assert_eq!([client.response().text(), client.response().text()], ["/1", "/2"]);
    is_answered(&mut client, "/3");
}

#[test]
fn a_client_that_closes_its_sending_side_while_its_answer_comes_gets_the_rest_of_it() {
    for mode in MODES {
        let origin = Origin::scripted();
        let gateway = start(&origin, mode);
        let mut client = gateway.client();
        client.send(request("GET", "/", "", ""));
        let mut connection = origin.accept();
        connection.request();
        connection.send("HTTP/1.1 200 OK\r\nContent-Length: 8\r\n\r\nhalf");
        gateway.wait_phase(Phase::Receive);
        client.end();
        connection.send("rest");
        let answer = client.response();
        assert_eq!((answer.text(), answer.end), ("halfrest", End::Complete), "{mode}");
        client.closed();
    }
}

#[test]
fn a_slow_client_that_has_closed_its_sending_side_gets_all_of_a_large_answer() {
    for mode in MODES {
        let origin = built_in();
        let gateway = Setup::before_all(&[origin.address()]).spooling("").route(&buffering(mode)).start();
        let mut client = Client::slow(gateway.web());
        client.send(request("GET", "/bytes/8MiB", "", ""));
        client.end();
        let answer = client.response();
        assert_eq!((answer.body.len(), answer.end), (8 << 20, End::Complete), "{mode}");
        gateway.wait_at_rest();
    }
}

#[test]
fn a_client_that_has_closed_its_sending_side_keeps_its_place_in_the_queue() {
    let origin = Origin::scripted();
    let one = "limits: { endpoint: { requests: 1 } }, queue: { size: 2 }";
    let (gateway, mut first, mut connection) = Setup::before(&origin).upstream(one).asked(&origin);
    let mut second = gateway.client();
    second.send(request("GET", "/second", "", ""));
    second.end();
    gateway.wait_metric(QUEUE, |waiting| waiting == 1.0);
    connection.answer("first");
    assert_eq!(first.response().text(), "first");
    assert_eq!(connection.request().target(), "/second");
    connection.answer("second");
    is_answered(&mut second, "second");
}

#[test]
fn what_forebay_itself_answers_reaches_a_client_that_has_closed_its_sending_side() {
    let origin = Origin::scripted();
    let (gateway, mut client, connection) = ended(&origin, "auto", request("GET", "/", "", ""));
    connection.reset();
    assert_eq!(client.response().status, 502);
    client.closed();
    assert_eq!(gateway.log_line().reason(), "wait.reset");
}

#[test]
fn a_client_of_a_unix_socket_that_has_only_stopped_sending_gets_its_answer() {
    let origin = Origin::scripted();
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("web.sock");
    let unix = format!("{{ name: local, address: \"unix:{}\" }}", path.display());
    let gateway = Setup::before(&origin).also_listener(&unix).start();
    let mut client = Client::unix(&path);
    client.send(request("GET", "/", "", ""));
    client.end();
    let mut connection = origin.accept();
    connection.request();
    gateway.wait_phase(Phase::Wait);
    connection.answer("yours");
    is_answered(&mut client, "yours");
    // A full close means that the client is gone, which a unix socket reports.
    let mut gone = Client::unix(&path);
    gone.send(request("GET", "/gone", "", ""));
    connection.request();
    drop(gone);
    connection.closed();
    assert_eq!(gateway.log_line_of("/gone").reason(), "wait.aborted");
}

#[test]
fn a_reset_behind_the_end_is_noticed_wherever_the_exchange_is() {
    for mode in MODES {
        let origin = Origin::scripted();
        let (gateway, client, mut connection) = ended(&origin, mode, request("GET", "/", "", ""));
        client.reset();
        connection.closed();
        assert_eq!((gateway.log_line().status(), gateway.log_line().reason()), (499, "wait.aborted"), "{mode}");
        gateway.wait_at_rest();

        let (gateway, client, mut connection) = ended(&origin, mode, request("GET", "/", "", ""));
        connection.send("HTTP/1.1 200 OK\r\nContent-Length: 8\r\n\r\nhalf");
        gateway.wait_phase(Phase::Receive);
        client.reset();
        connection.closed();
        assert_eq!(gateway.log_line().reason(), "receive.aborted", "{mode}");
        gateway.wait_at_rest();
    }
}

#[test]
fn a_reset_behind_the_end_leaves_the_queue_to_others() {
    let origin = Origin::scripted();
    let one = "limits: { endpoint: { requests: 1 } }, queue: { size: 2 }";
    let (gateway, _first, _connection) = Setup::before(&origin).upstream(one).asked(&origin);
    let mut gone = gateway.client();
    gone.send(request("GET", "/gone", "", ""));
    gone.end();
    gateway.wait_metric(QUEUE, |waiting| waiting == 1.0);
    gone.reset();
    gateway.wait_metric(QUEUE, |waiting| waiting == 0.0);
    assert_eq!(gateway.log_line_of("/gone").reason(), "queue.aborted");
}

#[test]
fn a_reset_is_noticed_behind_the_beginning_of_the_next_request() {
    for next in ["G", "GET /next HTTP/1.1\r\nHost: test\r\n\r\n"] {
        let origin = Origin::scripted();
        let (gateway, mut client, mut connection) = Setup::before(&origin).asked(&origin);
        client.send(next);
        gateway.wait_phase(Phase::Wait);
        client.reset();
        connection.closed();
        assert_eq!(gateway.log_line().reason(), "wait.aborted", "{next:?}");
        gateway.wait_at_rest();
    }
}

#[test]
fn half_a_request_and_then_the_end_is_no_request() {
    let halves = [
        ("GET / HTTP/1.1\r\nHost: test\r\n".to_owned(), "header.aborted"),
        ("POST / HTTP/1.1\r\nHost: test\r\nContent-Length: 8\r\n\r\nhalf".to_owned(), "buffer.aborted"),
        (
            "POST / HTTP/1.1\r\nHost: test\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n".to_owned(),
            "buffer.aborted",
        ),
        (
            "POST / HTTP/1.1\r\nHost: test\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n0\r\n".to_owned(),
            "buffer.aborted",
        ),
    ];
    for (half, reason) in halves {
        let origin = Origin::scripted();
        let gateway = start(&origin, "full");
        let mut client = gateway.client();
        client.send(&half);
        client.end();
        client.closed();
        assert_eq!((gateway.log_line().status(), gateway.log_line().reason()), (499, reason), "{half:?}");
        assert_eq!(origin.connections(), 0, "{half:?}");
    }
}

#[test]
fn a_route_may_take_the_end_for_an_abort() {
    let origin = Origin::scripted();
    let gateway = Setup::before(&origin).route("client: { half_close: abort }").start();
    let mut client = gateway.client();
    client.send(request("GET", "/", "", ""));
    let mut connection = origin.accept();
    connection.request();
    gateway.wait_phase(Phase::Wait);
    client.end();
    connection.closed();
    client.closed();
    assert_eq!((gateway.log_line().status(), gateway.log_line().reason()), (499, "wait.aborted"));
    eventually("nothing to be left", || (gateway.metric("forebay_phase_active") == 0.0).then_some(()));
}

#[test]
fn such_a_route_sees_the_end_behind_the_beginning_of_the_next_request() {
    for next in ["G", "GET /next HTTP/1.1\r\nHost: test\r\n\r\n"] {
        let origin = Origin::scripted();
        let abort = "client: { half_close: abort }";
        let (gateway, mut client, mut connection) = Setup::before(&origin).route(abort).asked(&origin);
        client.send(next);
        gateway.wait_phase(Phase::Wait);
        client.end();
        connection.closed();
        client.closed();
        assert_eq!((gateway.log_line().status(), gateway.log_line().reason()), (499, "wait.aborted"), "{next:?}");
        gateway.wait_at_rest();
    }
}

#[test]
fn such_a_route_sees_the_end_of_a_client_that_takes_nothing() {
    for mode in MODES {
        let origin = built_in();
        let abort = format!("client: {{ half_close: abort, write_idle: 60s }}, {}", buffering(mode));
        let gateway = Setup::before_all(&[origin.address()]).spooling("").route(&abort).start();
        let mut client = Client::slow(gateway.web());
        client.send(request("GET", "/bytes/32MiB", "", ""));
        gateway.wait_metric("forebay_slow_clients{direction=\"response\"}", |slow| slow == 1.0);
        let begun = Instant::now();
        client.end();
        let line = gateway.log_line();
        assert!(line.reason().ends_with(".aborted"), "{mode}: {}", line.reason());
        assert!(begun.elapsed() < ms(10_000), "{mode}: {:?}", begun.elapsed());
        gateway.wait_at_rest();
    }
}

#[test]
fn the_end_of_half_a_body_leaves_the_queue_to_others_and_that_of_a_whole_one_keeps_its_place() {
    let post = |path: &str, fields: &str| format!("POST {path} HTTP/1.1\r\nHost: test\r\n{fields}\r\n\r\n");
    let (length, chunks) = ("Content-Length: 100", "Transfer-Encoding: chunked");
    let whole = [(length, vec![b'x'; 100]), (chunks, chunked(&[b'x'; 100], 30))];
    for (fields, body) in whole {
        let origin = Origin::scripted();
        let one = "limits: { endpoint: { requests: 1 } }, queue: { size: 4, timeout: 60s }";
        let setup = Setup::before(&origin).upstream(one).route("buffering: { request: { mode: stream } }");
        let (gateway, mut first, mut connection) = setup.asked(&origin);
        let queue = |waiting| gateway.wait_metric(QUEUE, move |found| found == f64::from(waiting));
        let mut whole = gateway.client();
        whole.send(post("/whole", fields));
        queue(1);
        // The body is not read before there is an endpoint.
        whole.send(&body);
        whole.end();
        let mut left = 0;
        for cut in [0, 50, body.len() - 1] {
            let mut half = gateway.client();
            half.send(post("/half", fields));
            queue(2);
            half.send(&body[..cut]);
            half.end();
            queue(1);
            left += 1;
            let line = gateway.log_lines(left).pop().expect("a line");
            assert_eq!((line.text("target"), line.reason()), ("/half", "queue.aborted"), "{fields} {cut}");
        }
        connection.answer("first");
        assert_eq!(first.response().text(), "first");
        let request = connection.request();
        assert_eq!((request.target(), &request.body[..]), ("/whole", &[b'x'; 100][..]));
        connection.answer("whole");
        is_answered(&mut whole, "whole");
    }
}

#[test]
fn such_a_route_leaves_the_queue_to_others_at_an_end_behind_the_beginning_of_the_next_request() {
    let origin = Origin::scripted();
    let one = "limits: { endpoint: { requests: 1 } }, queue: { size: 2, timeout: 60s }";
    let setup = Setup::before(&origin).upstream(one).route("client: { half_close: abort }");
    let (gateway, _first, _connection) = setup.asked(&origin);
    let mut gone = gateway.client();
    gone.send(request("GET", "/gone", "", ""));
    gateway.wait_metric(QUEUE, |waiting| waiting == 1.0);
    gone.send("G");
    gone.end();
    gateway.wait_metric(QUEUE, |waiting| waiting == 0.0);
    assert_eq!(gateway.log_line_of("/gone").reason(), "queue.aborted");
}
