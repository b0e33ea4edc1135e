//! Queueing while all endpoints are at their limits: who waits, in which order, for how long, and what happens to
//! others.

use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex};

use forebay::phase::Phase;

use crate::harness::client::{H2Client, request};
use crate::harness::gateway::Watched;
use crate::harness::origin::{Connection, response};
use crate::harness::{Client, Gateway, Origin, Setup, eventually, may_open_files, ok};

const QUEUE: &str = "forebay_upstream_queue{upstream=\"app\"}";

/// A gateway that sends one request at a time to its only origin.
fn one_at_a_time(origin: &Origin, queue: &str) -> Setup {
    Setup::before(origin).upstream(&format!("limits: {{ endpoint: {{ requests: 1 }} }}, queue: {{ {queue} }}"))
}

/// A client that has requested a path.
fn asking(gateway: &Gateway, path: &str) -> Client {
    let mut client = gateway.client();
    client.send(request("GET", path, "", ""));
    client
}

/// This many clients that wait in order, for `/1` and on.
fn queued(gateway: &Gateway, count: usize) -> Vec<Client> {
    let one = |number| {
        let client = asking(gateway, &format!("/{number}"));
        gateway.wait_metric(QUEUE, |waiting| waiting == number as f64);
        client
    };
    (1..=count).map(one).collect()
}

/// Responds to the next request on this connection with its own target.
fn answer_next(connection: &mut Connection) -> String {
    let target = connection.request().target().to_owned();
    connection.answer(&target);
    target
}

fn rejected(gateway: &Gateway, reason: &str) {
    let selector = format!("forebay_upstream_rejected_total{{upstream=\"app\",reason=\"{reason}\"}}");
    gateway.wait_metric(&selector, |count| count == 1.0);
    gateway.refused_once(reason);
}

#[test]
fn when_one_endpoint_is_full_the_others_serve() {
    let (busy, free) = (Origin::scripted(), Origin::scripted());
    let limits = "load_balancing: { policy: random }, limits: { endpoint: { requests: 1 } }, queue: { size: 0 }";
    let gateway = Setup::before_all(&[busy.address(), free.address()]).upstream(limits).start();
    let mut clients = [asking(&gateway, "/"), asking(&gateway, "/")];
    for origin in [&busy, &free] {
        let mut connection = origin.accept();
        connection.request();
        connection.answer("served");
    }
    assert!(clients.iter_mut().all(|client| client.response().text() == "served"));
    assert!(gateway.log_lines(2).iter().all(|line| line.phase(Phase::Queue).is_none()));
}

#[test]
fn those_who_wait_are_served_in_the_order_in_which_they_came() {
    let origin = Origin::scripted();
    let (gateway, mut first, mut connection) = one_at_a_time(&origin, "").asked(&origin);
    let mut waiting = queued(&gateway, 4);
    connection.answer("first");
    assert_eq!(first.response().text(), "first");
    let served: Vec<String> = (0..4).map(|_| answer_next(&mut connection)).collect();
    assert_eq!(served, ["/1", "/2", "/3", "/4"]);
    for (client, target) in waiting.iter_mut().zip(served) {
        assert_eq!(client.response().text(), target);
        assert!(gateway.log_line_of(&target).phase(Phase::Queue).expect("time in the queue") > 0.0);
    }
    gateway.wait_metric("forebay_upstream_queue_seconds_count{upstream=\"app\"}", |count| count == 4.0);
    gateway.wait_metric(QUEUE, |waiting| waiting == 0.0);
    gateway.wait_at_rest();
    assert_eq!(origin.connections(), 1, "a limit of requests is one of connections over HTTP/1");
}

#[test]
fn a_limit_of_the_upstream_is_for_all_its_endpoints_together() {
    for limits in ["requests: 1", "connections: 1"] {
        let origins = [Origin::scripted(), Origin::scripted()];
        let gateway = Setup::before_all(&origins.each_ref().map(Origin::address))
            .upstream(&format!("load_balancing: {{ policy: round_robin }}, limits: {{ {limits} }}"))
            .start();
        let mut first = asking(&gateway, "/first");
        let mut connection = origins[0].accept();
        connection.request();
        let mut second = queued(&gateway, 1).remove(0);
        connection.answer("one");
        assert_eq!(first.response().text(), "one");
        assert_eq!(answer_next(&mut origins[1].accept()), "/1");
        assert_eq!(second.response().text(), "/1");
    }
}

#[test]
fn when_the_queue_is_full_a_client_is_told_at_once_to_come_again() {
    let origin = Origin::scripted();
    let (gateway, mut first, mut connection) = one_at_a_time(&origin, "size: 1").asked(&origin);
    let mut waiting = queued(&gateway, 1);
    let answer = gateway.client().get("/too-many");
    assert_eq!((answer.status, answer.value("retry-after")), (503, Some("5")));
    assert!(answer.text().contains("queue.full"), "{}", answer.text());
    let line = gateway.log_line_of("/too-many");
    assert_eq!((line.reason(), line.number("attempts")), ("queue.full", 0.0));
    rejected(&gateway, "queue.full");
    connection.answer("first");
    assert_eq!(answer_next(&mut connection), "/1");
    assert_eq!((first.response().status, waiting[0].response().status), (200, 200));
}

#[test]
fn with_a_queue_of_none_nobody_waits() {
    let origin = Origin::scripted();
    let (gateway, _first, _connection) = one_at_a_time(&origin, "size: 0").asked(&origin);
    assert!(gateway.client().get("/").text().contains("queue.full"));
}

#[test]
fn nobody_waits_for_longer_than_the_time_of_the_queue() {
    let origin = Origin::scripted();
    let (gateway, mut first, mut connection) = one_at_a_time(&origin, "timeout: 200ms").asked(&origin);
    let answer = gateway.client().get("/late");
    assert_eq!((answer.status, answer.value("retry-after")), (503, Some("5")));
    let line = gateway.log_line_of("/late");
    assert_eq!((line.status(), line.reason()), (503, "queue.timeout"));
    let spent = line.phase(Phase::Queue).expect("time in the queue");
    assert!((199.0..2_000.0).contains(&spent), "{spent} ms");
    rejected(&gateway, "queue.timeout");
    connection.answer("first");
    assert_eq!(first.response().text(), "first");
    gateway.wait_metric(QUEUE, |waiting| waiting == 0.0);
}

#[test]
fn a_client_that_goes_away_leaves_the_line_and_its_place_to_others() {
    let origin = Origin::scripted();
    let (gateway, mut first, mut connection) = one_at_a_time(&origin, "size: 2").asked(&origin);
    let mut waiting = queued(&gateway, 2);
    waiting.remove(0).reset();
    gateway.wait_metric(QUEUE, |waiting| waiting == 1.0);
    let line = gateway.log_line_of("/1");
    assert_eq!((line.status(), line.reason()), (499, "queue.aborted"));
    connection.answer("first");
    assert_eq!(answer_next(&mut connection), "/2");
    assert_eq!((first.response().status, waiting[0].response().status), (200, 200));
    gateway.wait_at_rest();
    assert_eq!(origin.requests().len(), 2, "nobody asked for the one who is gone");
}

#[test]
fn over_http_2_one_waits_and_leaves_in_the_same_way() {
    let origin = Origin::scripted();
    let (gateway, mut first, mut connection) =
        one_at_a_time(&origin, "").listener("protocols: [http1, h2c]").asked(&origin);
    let client = H2Client::connect(gateway.web());
    client.abandon("/gone", "it to wait", || gateway.metric(QUEUE) == 1.0);
    gateway.wait_metric(QUEUE, |waiting| waiting == 0.0);
    assert_eq!(gateway.log_line_of("/gone").reason(), "queue.aborted");
    let asked = http::Request::get("http://test/waits").body(()).expect("a request");
    let (response, _stream) = client.begin(asked, true);
    gateway.wait_metric(QUEUE, |waiting| waiting == 1.0);
    connection.answer("first");
    assert_eq!(answer_next(&mut connection), "/waits");
    assert_eq!(client.step(response).expect("an answer").status(), 200);
    assert_eq!(first.response().text(), "first");
    gateway.wait_at_rest();
}

#[test]
fn a_body_is_whole_before_its_request_waits_and_is_sent_when_it_is_served() {
    let origin = Origin::scripted();
    let (gateway, _first, mut connection) = one_at_a_time(&origin, "").asked(&origin);
    let mut upload = gateway.client();
    upload.send("POST /upload HTTP/1.1\r\nHost: test\r\nContent-Length: 8\r\n\r\nfour");
    gateway.wait_phase(Phase::Buffer);
    let mut other = queued(&gateway, 1);
    upload.send("more");
    gateway.wait_metric(QUEUE, |waiting| waiting == 2.0);
    connection.answer("first");
    assert_eq!(answer_next(&mut connection), "/1", "a slow upload keeps no place in line");
    let second = connection.request();
    assert_eq!((second.target(), &*second.body), ("/upload", &b"fourmore"[..]));
    connection.answer("second");
    assert_eq!((other[0].response().status, upload.response().text()), (200, "second"));
}

#[test]
fn a_websocket_that_waits_leaves_when_its_client_does_and_is_let_through_when_it_is_served() {
    let origin = Origin::scripted();
    let (gateway, _first, mut connection) = one_at_a_time(&origin, "").asked(&origin);
    let upgrade = "Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Key: x\r\nSec-WebSocket-Version: 13\r\n";
    let ask = |waiting: f64| {
        let mut client = gateway.client();
        client.send(request("GET", "/socket", upgrade, ""));
        gateway.wait_metric(QUEUE, |count| count == waiting);
        client
    };
    let (gone, stays) = (ask(1.0), ask(2.0));
    gone.reset();
    gateway.wait_metric(QUEUE, |waiting| waiting == 1.0);
    // Otherwise the connection might be reused or not, since the two drivers share none.
    connection.send(response("200 OK", "Connection: close\r\n", "first"));
    let mut connection = origin.accept();
    assert_eq!(connection.request().value("upgrade"), Some("websocket"));
    connection.send("HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\nhello");
    let mut socket = stays.into_wire();
    assert_eq!(socket.head().expect("an answer").status(), 101);
    assert_eq!(socket.exactly(5).0, b"hello");
}

#[test]
fn a_retry_waits_for_an_endpoint_that_was_not_tried_and_others_go_past_it() {
    let [a, b] = [Origin::scripted(), Origin::scripted()];
    let gateway = Setup::before_all(&[a.address(), b.address()])
        .upstream("load_balancing: { policy: round_robin }, limits: { endpoint: { requests: 1 } }")
        .start();
    let (mut fails, mut second) = (asking(&gateway, "/fails"), None);
    let mut first = a.accept();
    first.request();
    second.get_or_insert_with(|| asking(&gateway, "/second"));
    let mut busy = b.accept();
    busy.request();
    first.reset();
    gateway.wait_metric(QUEUE, |waiting| waiting == 1.0);
    let mut third = asking(&gateway, "/third");
    assert_eq!(answer_next(&mut a.accept()), "/third");
    assert_eq!(third.response().text(), "/third");
    busy.answer("second");
    assert_eq!(answer_next(&mut busy), "/fails", "its other attempt");
    assert_eq!(fails.response().text(), "/fails");
}

#[test]
fn limits_outlive_a_change_of_the_endpoints_and_a_new_one_serves_those_who_wait() {
    let [a, b] = [Origin::scripted(), Origin::scripted()];
    let setup = Setup::found("");
    let path = setup.path("endpoints.yaml");
    let list = |origins: &[&Origin]| {
        let lines: String = origins.iter().map(|origin| format!("- address: {}\n", origin.address())).collect();
        let beside = path.with_extension("new");
        std::fs::write(&beside, lines).and_then(|()| std::fs::rename(&beside, &path)).expect("a file of endpoints");
    };
    list(&[&a]);
    let keys = format!("file: {{ path: \"{}\", refresh: 200ms }}, queue: {{ timeout: 1m }}", path.display());
    let setup = setup.upstream(&keys).upstream("limits: { endpoint: { requests: 1 } }");
    let (gateway, mut first, mut at_a) = setup.asked(&a);
    let mut second = queued(&gateway, 1).remove(0);
    list(&[&a, &b]);
    let mut at_b = b.accept();
    assert_eq!(at_b.request().target(), "/1", "whoever waits hears of it");
    let mut third = asking(&gateway, "/third");
    gateway.wait_metric(QUEUE, |waiting| waiting == 1.0);
    list(&[&b]);
    gateway.wait_metric("forebay_upstream_endpoints{state=\"draining\"}", |count| count == 1.0);
    at_a.answer("first");
    assert_eq!(first.response().text(), "first");
    assert_eq!(gateway.metric(QUEUE), 1.0, "the one that is gone is given nothing");
    at_b.answer("second");
    assert_eq!((second.response().text(), &*answer_next(&mut at_b)), ("second", "/third"));
    assert_eq!(third.response().text(), "/third");
}

#[test]
fn a_thousand_who_wait_for_one_endpoint_are_all_served_in_order() {
    const BATCH: usize = 50;
    const BATCHES: usize = 20;
    may_open_files(6_000);
    let (free, held) = channel::<()>();
    let held = Mutex::new(held);
    let seen = Arc::new(Mutex::new(Vec::new()));
    let order = seen.clone();
    let origin = Origin::answering(move |request| {
        if request.target() == "/" {
            held.lock().unwrap().recv().expect("the word to go on");
        } else {
            order.lock().unwrap().push(request.target().trim_start_matches('/').parse::<usize>().unwrap());
        }
        ok(request.target())
    });
    let gateway = one_at_a_time(&origin, "size: 1k, timeout: 1m").server("threads: 2").start();
    let mut first = asking(&gateway, "/");
    eventually("the origin to be busy", || (origin.connections() == 1).then_some(()));
    let mut clients = Vec::new();
    for batch in 1..=BATCHES {
        clients.extend((0..BATCH).map(|number| asking(&gateway, &format!("/{}", (batch - 1) * BATCH + number))));
        gateway.wait_metric(QUEUE, |waiting| waiting == (batch * BATCH) as f64);
    }
    free.send(()).expect("the origin");
    assert_eq!(first.response().text(), "/");
    for (number, client) in clients.iter_mut().enumerate() {
        assert_eq!(client.response().text(), format!("/{number}"));
    }
    // The order within a batch is known only to the gateway.
    let batches: Vec<usize> = seen.lock().unwrap().iter().map(|number| number / BATCH).collect();
    assert!(batches.len() == BATCH * BATCHES && batches.is_sorted(), "{batches:?}");
    gateway.wait_metric(QUEUE, |waiting| waiting == 0.0);
    gateway.wait_at_rest();
}
