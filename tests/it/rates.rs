//! Rate limits and limits on expensive things: connections, TLS handshakes, requests. Rates are per hour here, so
//! that stories need not hurry.

use std::io::{Read, Write};
use std::net::Ipv4Addr;

use crate::harness::client::request;
use crate::harness::gateway::Watched;
use crate::harness::secure::Authority;
use crate::harness::tls::{Tls, pair};
use crate::harness::{Client, Gateway, H2Client, Origin, Setup};

/// The address of the client with this number.
fn stranger(number: u8) -> Ipv4Addr {
    Ipv4Addr::new(127, 2, 0, number)
}

fn refused(gateway: &Gateway, reason: &str, count: f64) {
    gateway.wait_metric(&format!("forebay_refusals_total{{reason=\"{reason}\"}}"), |counted| counted == count);
}

#[test]
fn connections_of_one_address_that_come_too_fast_are_answered_429_and_others_are_served() {
    let origin = Origin::named("origin");
    let setup = Setup::before(&origin).listener("limits: { connection_rate_per_ip: 2/h }");
    let gateway = setup.start();
    let get = |number| Client::from(stranger(number), gateway.web()).get("/");
    assert_eq!([1, 1, 1, 2, 2, 2, 3].map(|number| get(number).status), [200, 200, 429, 200, 200, 429, 200]);
    let late = get(1);
    assert_eq!((late.status, late.value("connection")), (429, Some("close")));
    assert_eq!(gateway.log_line_of_status(429).reason(), "accept.rate_per_ip");
    refused(&gateway, "accept.rate_per_ip", 3.0);
    // A trusted proxy has no rate of its own.
    let gateway = setup.more("trusted_proxies: [127.2.0.1]").start();
    let statuses: Vec<u16> = (0..5).map(|_| Client::from(stranger(1), gateway.web()).get("/").status).collect();
    assert_eq!(statuses, [200; 5]);
}

#[test]
fn connections_of_all_together_that_come_too_fast_are_answered_503() {
    let origin = Origin::named("origin");
    let limits = "limits: { connection_rate: 4/h, connection_rate_per_ip: 2/h }";
    let gateway = Setup::before(&origin).listener(limits).start();
    let get = |number| Client::from(stranger(number), gateway.web()).get("/").status;
    // Requests above the rate of an address do not count against the common rate.
    assert_eq!([1, 1, 1, 1, 2, 3, 4].map(get), [200, 200, 429, 429, 200, 200, 503]);
    refused(&gateway, "accept.rate", 1.0);
    gateway.wait_metric("forebay_client_connections", |open| open == 0.0);
}

/// A gateway with TLS and these limits, and the authority that its clients trust.
fn secure(limits: &str) -> (Authority, Gateway) {
    let authority = Authority::new();
    let identity = authority.issue(&["a.test"]);
    let gateway = Setup::found("endpoints: [ { address: \"127.0.0.1:1\" } ]")
        .listener(&format!("tls: {{ certificates: [ {{ {} }} ] }}, limits: {{ {limits} }}", pair(&identity)))
        .routes("{ name: all, filters: [ { respond: { body: served } } ], upstream: app }")
        .start();
    (authority, gateway)
}

#[test]
fn handshakes_that_come_too_fast_are_closed_without_a_word() {
    let (authority, gateway) = secure("handshake_rate: 4/h, handshake_rate_per_ip: 2/h");
    let shakes = |number| Tls::to(gateway.web(), &authority, "a.test").from(stranger(number)).get("/").is_ok();
    assert_eq!([1, 1, 1, 2, 3, 4].map(shakes), [true, true, false, true, true, false]);
    refused(&gateway, "handshake.rate_per_ip", 1.0);
    refused(&gateway, "handshake.rate", 1.0);
    gateway.wait_metric("forebay_client_connections", |open| open == 0.0);
}

#[test]
fn so_many_handshakes_are_under_way_at_once_and_no_more() {
    let (authority, gateway) = secure("handshakes: 3, handshakes_per_ip: 2");
    // The beginning of a ClientHello.
    let begin = |number| {
        let mut client = Client::from(stranger(number), gateway.web()).into_wire().into_socket();
        client.write_all(&[0x16, 3, 1, 2, 0, 1]).expect("the gateway to take bytes");
        client
    };
    let under_way = |count: f64| {
        gateway.wait_metric("forebay_client_connections{state=\"handshake\"}", |open| open == count);
    };
    let first = [begin(1), begin(1)];
    under_way(2.0);
    assert!(matches!(begin(1).read(&mut [0]), Ok(0) | Err(_)), "the third of one address is closed");
    refused(&gateway, "handshake.limit_per_ip", 1.0);
    let other = begin(2);
    under_way(3.0);
    assert!(matches!(begin(3).read(&mut [0]), Ok(0) | Err(_)), "the fourth of all is closed");
    refused(&gateway, "handshake.limit", 1.0);
    drop((first, other));
    under_way(0.0);
    let shaken: Vec<_> =
        (0..3).map(|_| Tls::to(gateway.web(), &authority, "a.test").from(stranger(1)).connect()).collect();
    assert!(shaken.iter().all(Result::is_ok), "connections whose handshake is done do not count");
}

#[test]
fn so_many_requests_are_under_way_at_once_and_no_more() {
    let origin = Origin::scripted();
    let listener = "protocols: [http1, h2c], limits: { requests: 2 }";
    let gateway = Setup::before(&origin).listener(listener).upstream("keepalive: { pool: 0 }").start();
    let mut one = Client::from(stranger(1), gateway.web());
    one.send(request("GET", "/", "", ""));
    let two = H2Client::from(stranger(2), gateway.web());
    let (answer, _) = two.begin(http::Request::get("http://test/").body(()).expect("a request"), true);
    let mut backends = [origin.accept(), origin.accept()];
    backends.iter_mut().for_each(|backend| drop(backend.request()));

    let late = Client::from(stranger(3), gateway.web()).get("/");
    assert_eq!((late.status, late.value("retry-after")), (503, Some("5")));
    assert_eq!(gateway.log_line_of_status(503).reason(), "route.requests");
    refused(&gateway, "route.requests", 1.0);

    backends.iter_mut().for_each(|backend| backend.answer("done"));
    assert_eq!(one.response().text(), "done");
    assert_eq!(two.step(answer).expect("an answer").status(), 200);
    gateway.wait_at_rest();
    one.send(request("GET", "/", "", ""));
    let mut backend = origin.accept();
    backend.request();
    backend.answer("a place that was given back");
    assert_eq!(one.response().status, 200);
}
