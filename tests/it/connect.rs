//! Connections to endpoints: new, reused, and impossible ones.

use forebay::phase::Phase;

use crate::harness::client::request;
use crate::harness::gateway::Watched;
use crate::harness::origin::{Closed, response};
use crate::harness::{Origin, Setup, eventually};

#[test]
fn after_a_refused_connection_the_next_endpoint_is_asked() {
    let (dead, alive) = (Closed::refusing(), Origin::named("alive"));
    let in_turn = "load_balancing: { policy: round_robin }";
    let gateway = Setup::before_all(&[dead.address(), alive.address()]).upstream(in_turn).start();
    let mut client = gateway.client();
    for _ in 0..2 {
        let answer = client.ask("POST", "/", "", "nothing was sent yet, so a POST may go on");
        assert_eq!((answer.status, answer.text()), (200, "alive"));
    }
    let lines = gateway.log_lines(2);
    let attempts: f64 = lines.iter().map(|line| line.number("attempts")).sum();
    assert!((3.0..=4.0).contains(&attempts), "one of the two met the dead one, or both: {attempts}");
    assert!(lines.iter().all(|line| line.text("endpoint") == alive.address().to_string() && line.reason().is_empty()));
    gateway.wait_metric("forebay_retries_total{upstream=\"app\"}", |count| count == attempts - 2.0);
    let failed = "forebay_upstream_connects_total{upstream=\"app\",outcome=\"failed\"}";
    gateway.wait_metric(failed, |count| count == attempts - 2.0);
}

#[test]
fn if_every_endpoint_refuses_the_client_gets_502() {
    let dead = [Closed::refusing(), Closed::refusing()];
    let gateway = Setup::before_all(&dead.each_ref().map(Closed::address)).start();
    assert_eq!(gateway.client().get("/").status, 502);
    let line = gateway.log_line();
    assert_eq!((line.status(), line.reason(), line.number("attempts")), (502, "connect.refused", 2.0));
    gateway.refused_once("connect.refused");
}

#[test]
fn an_endpoint_that_cannot_be_reached_is_a_502() {
    // No connection can lead to the broadcast address, so nothing leaves this machine.
    let gateway = Setup::before_all(&["255.255.255.255:80"]).start();
    assert_eq!(gateway.client().get("/").status, 502);
    assert_eq!(gateway.log_line().reason(), "connect.failed");
    gateway.refused_once("connect.failed");
}

#[test]
fn an_endpoint_that_does_not_accept_in_time_is_given_up() {
    let silent = Closed::silent();
    let gateway = Setup::before_all(&[silent.address()]).upstream("timeouts: { connect: 200ms }").start();
    assert_eq!(gateway.client().get("/").status, 504);
    let line = gateway.log_line();
    assert_eq!(line.reason(), "connect.timeout");
    let spent = line.phase(Phase::Connect).expect("time in connect");
    assert!((195.0..2_000.0).contains(&spent), "{spent} ms");
}

#[test]
fn after_a_connection_that_was_not_accepted_in_time_the_next_endpoint_is_asked() {
    let (silent, alive) = (Closed::silent(), Origin::named("alive"));
    let gateway =
        Setup::before_all(&[silent.address(), alive.address()]).upstream("timeouts: { connect: 200ms }").start();
    assert_eq!(gateway.client().get("/").text(), "alive");
}

#[test]
fn a_connection_is_kept_and_used_again() {
    let origin = Origin::named("origin");
    let gateway = Setup::before(&origin).start();
    for _ in 0..5 {
        assert_eq!(gateway.client().get("/").status, 200);
    }
    assert_eq!(origin.connections(), 1);
    let connects = |outcome| format!("forebay_upstream_connects_total{{upstream=\"app\",outcome=\"{outcome}\"}}");
    gateway.wait_metric(&connects("new"), |count| count == 1.0);
    gateway.wait_metric(&connects("reused"), |count| count == 4.0);
}

#[test]
fn an_unused_connection_is_closed_after_its_time() {
    let origin = Origin::scripted();
    let gateway = Setup::before(&origin).upstream("keepalive: { idle: 200ms }").start();
    let mut client = gateway.client();
    client.send(request("GET", "/", "", ""));
    let mut connection = origin.accept();
    connection.request();
    connection.answer("first");
    assert_eq!(client.response().text(), "first");
    connection.closed();
}

#[test]
fn a_connection_that_the_origin_wants_closed_is_not_used_again() {
    let origin = Origin::answering(|_| response("200 OK", "Connection: close\r\n", "once"));
    let gateway = Setup::before(&origin).start();
    let mut client = gateway.client();
    assert_eq!(client.get("/").text(), "once");
    assert_eq!(client.get("/").text(), "once", "the client's connection is another matter");
    assert_eq!(origin.connections(), 2);
}

#[test]
fn a_kept_connection_that_the_origin_closed_meanwhile_costs_no_request() {
    let origin = Origin::scripted();
    let gateway = Setup::before(&origin).start();
    let mut client = gateway.client();
    for _ in 0..3 {
        client.send(request("GET", "/", "", ""));
        let mut connection = origin.accept();
        connection.request();
        connection.answer("fresh");
        connection.close();
        assert_eq!(client.response().text(), "fresh");
    }
}

#[test]
fn connections_to_two_upstreams_are_not_mixed_up() {
    let [a, b] = ["a", "b"].map(Origin::named);
    let routes = "{ name: b, match: { path: { exact: /b } }, upstream: b }\n{ name: a, upstream: app }";
    let gateway = Setup::before(&a).also("b", &b).routes(routes).start();
    let mut client = gateway.client();
    let answers: String = ["/", "/b", "/", "/b"].map(|path| client.get(path).text().to_owned()).concat();
    assert_eq!(answers, "abab");
    eventually("one connection each", || (a.connections() == 1 && b.connections() == 1).then_some(()));
}

#[test]
fn no_more_unused_connections_are_kept_than_allowed() {
    let [a, b] = [Origin::scripted(), Origin::scripted()];
    let routes = "{ name: b, match: { path: { exact: /b } }, upstream: b }\n{ name: a, upstream: app }";
    let gateway = Setup::before(&a).also("b", &b).routes(routes).server("threads: 1, keepalive_pool: 1").start();
    let mut client = gateway.client();
    let mut ask = |path: &str, origin: &Origin| {
        client.send(request("GET", path, "", ""));
        let mut connection = origin.accept();
        connection.request();
        connection.answer("kept");
        assert_eq!(client.response().text(), "kept");
        connection
    };
    let mut first = ask("/", &a);
    let _second = ask("/b", &b);
    first.closed();
}

#[test]
fn a_client_that_goes_away_while_a_connection_is_made_leaves_nothing_behind() {
    let silent = Closed::silent();
    let gateway = Setup::before_all(&[silent.address()]).upstream("timeouts: { connect: 300ms }").start();
    let mut client = gateway.client();
    client.send(request("GET", "/", "", ""));
    gateway.wait_phase(Phase::Connect);
    client.reset();
    gateway.log_line();
    gateway.wait_metric("forebay_phase_active", |count| count == 0.0);
    gateway.wait_metric("forebay_client_connections", |count| count == 0.0);
}
