//! A failing upstream gets no requests for a while, and recovers.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::harness::client::request;
use crate::harness::gateway::Watched;
use crate::harness::origin::{Closed, response};
use crate::harness::{Gateway, Origin, Setup, eventually, ms, ok};

const OPEN: &str = "forebay_upstream_breaker_open{upstream=\"app\"}";

/// An origin that responds with 500 while it is sick.
fn sick() -> (Origin, Arc<AtomicBool>) {
    let sick = Arc::new(AtomicBool::new(true));
    let still = sick.clone();
    let answer = move |_: &_| match still.load(Ordering::SeqCst) {
        true => response("500 Internal Server Error", "", "sick"),
        false => ok("well"),
    };
    (Origin::answering(answer), sick)
}

/// What the upstream `app` needs for a breaker.
fn breaker(setup: Setup, keys: &str) -> Gateway {
    setup.upstream(&format!("circuit_breaker: {{ {keys} }}")).start()
}

/// Sends requests until the breaker opens; returns how many reached the origin.
fn open_it(gateway: &Gateway, origin: &Origin) -> usize {
    while gateway.client().get("/").text() == "sick" {}
    gateway.wait_metric(OPEN, |state| state == 2.0);
    origin.requests().len()
}

#[test]
fn when_half_of_the_requests_fail_nobody_asks_for_a_while() {
    let (origin, _) = sick();
    let gateway = breaker(Setup::before(&origin), "failures: 50%, min_requests: 4, open: 90s, max_open: 90s");
    assert_eq!(open_it(&gateway, &origin), 4);
    let answer = gateway.client().get("/away");
    let retry_after: u64 = answer.value("retry-after").and_then(|text| text.parse().ok()).expect("Retry-After");
    assert!(answer.status == 503 && (60..=90).contains(&retry_after), "{} {retry_after}", answer.status);
    assert!(answer.text().contains("select.breaker_open"), "{}", answer.text());
    let line = gateway.log_line_of("/away");
    assert_eq!((line.reason(), line.number("attempts")), ("select.breaker_open", 0.0));
    let rejected = "forebay_upstream_rejected_total{upstream=\"app\",reason=\"select.breaker_open\"}";
    gateway.wait_metric(rejected, |count| count == 2.0);
    assert_eq!(origin.requests().len(), 4);
}

#[test]
fn a_probe_that_goes_well_heals_it() {
    let (origin, sick) = sick();
    let gateway = breaker(Setup::before(&origin), "consecutive: 3, min_requests: unlimited, open: 100ms, probes: 1");
    assert_eq!(open_it(&gateway, &origin), 3);
    sick.store(false, Ordering::SeqCst);
    eventually("a probe", || (gateway.client().get("/").status == 200).then_some(()));
    gateway.wait_metric(OPEN, |state| state == 0.0);
    assert_eq!(gateway.client().get("/").text(), "well");
}

#[test]
fn while_a_probe_is_under_way_all_others_are_turned_away_and_one_that_fails_opens_it_again() {
    let origin = Origin::scripted();
    let keys = "consecutive: 1, min_requests: unlimited, open: 1ms, max_open: 1ms, probes: 1";
    let setup = Setup::before(&origin).upstream(&format!("circuit_breaker: {{ {keys} }}"));
    let (gateway, mut client, mut connection) = setup.asked(&origin);
    connection.send(response("503 Service Unavailable", "", "sick"));
    assert_eq!(client.response().text(), "sick");
    for (state, status) in [(2.0, "500 Internal Server Error"), (0.0, "404 Not Found")] {
        // It is open for a millisecond.
        client.dawdle(ms(20));
        client.send(request("GET", "/probe", "", ""));
        connection.request();
        gateway.wait_metric(OPEN, |state| state == 1.0);
        let turned_away = gateway.client().get("/");
        assert_eq!((turned_away.status, turned_away.value("retry-after")), (503, Some("1")));
        connection.send(response(status, "", "what came of it"));
        assert_eq!(client.response().text(), "what came of it");
        gateway.wait_metric(OPEN, |now| now == state);
    }
}

#[test]
fn connections_that_cannot_be_made_open_it_and_clients_that_leave_do_not() {
    let closed = Closed::refusing();
    let keys = "consecutive: 2, min_requests: unlimited, open: 90s, max_open: 90s";
    let gateway = breaker(Setup::before_all(&[closed.address()]), keys);
    let statuses = [(); 3].map(|()| gateway.client().get("/").status);
    assert_eq!(statuses, [502, 502, 503]);

    let origin = Origin::scripted();
    let gateway = breaker(Setup::before(&origin), keys);
    for number in 1..=3 {
        let mut client = gateway.client();
        client.send(request("GET", "/", "", ""));
        let mut connection = origin.accept();
        connection.request();
        client.reset();
        connection.closed();
        gateway.log_lines(number);
    }
    assert_eq!(gateway.metric(OPEN), 0.0);
}

#[test]
fn those_who_wait_in_line_are_told_when_it_opens() {
    let origin = Origin::scripted();
    let keys = "circuit_breaker: { consecutive: 1, open: 90s, max_open: 90s }, limits: { requests: 1 }, queue: { timeout: 90s }";
    let (gateway, mut first, connection) = Setup::before(&origin).upstream(keys).asked(&origin);
    let mut waiting = gateway.client();
    waiting.send(request("GET", "/", "", ""));
    gateway.wait_metric("forebay_upstream_queue", |waiting| waiting == 1.0);
    connection.reset();
    assert_eq!(first.response().status, 502);
    assert!(waiting.response().text().contains("select.breaker_open"));
    gateway.wait_metric("forebay_upstream_queue", |waiting| waiting == 0.0);
    gateway.wait_at_rest();
}

#[test]
fn without_a_breaker_everybody_hears_from_the_upstream_itself() {
    let (origin, _) = sick();
    let gateway = Setup::before(&origin).start();
    let mut client = gateway.client();
    assert!((0..60).all(|_| client.get("/").status == 500));
    assert_eq!(gateway.metric(OPEN), 0.0);
}
