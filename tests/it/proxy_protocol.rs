//! The PROXY protocol from clients: the true client behind a proxy, on plain and TLS ports.

use ppp::v2::{Builder, Command, IPv4, Protocol, Version};

use crate::harness::client::request;
use crate::harness::gateway::Watched;
use crate::harness::secure::Authority;
use crate::harness::tls::{Tls, pair};
use crate::harness::wire::Request;
use crate::harness::{Client, Gateway, Origin, Setup, ms};

const LINE: &str = "PROXY TCP4 203.0.113.7 192.0.2.1 4711 443\r\n";
const TRUSTING: &str = "proxy_protocol: { from: [127.0.0.1] }";

fn binary(command: Command) -> Vec<u8> {
    let addresses = IPv4::new([203, 0, 113, 7], [192, 0, 2, 1], 4711, 443);
    let header = Builder::with_addresses(Version::Two | command, Protocol::Stream, addresses);
    header.build().expect("a header")
}

fn gateway(origin: &Origin, keys: &str) -> Gateway {
    Setup::before(origin).listener(keys).start()
}

/// The last request that the origin received.
fn last(origin: &Origin) -> Request {
    origin.requests().pop().expect("a request")
}

/// A client that has sent these bytes.
fn begun(gateway: &Gateway, bytes: impl AsRef<[u8]>) -> Client {
    let mut client = gateway.client();
    client.send(bytes);
    client
}

#[test]
fn the_client_is_the_one_that_a_trusted_proxy_tells_of() {
    let origin = Origin::named("app");
    let gateway = gateway(&origin, TRUSTING);
    for header in [LINE.as_bytes().to_vec(), binary(Command::Proxy)] {
        let mut client = begun(&gateway, header);
        assert_eq!(client.get("/").status, 200);
        assert_eq!(client.get("/again").status, 200, "the header stands once");
        for request in origin.requests().iter().rev().take(2) {
            assert_eq!(request.head.value("x-forwarded-for"), Some("203.0.113.7"));
            assert_eq!(request.head.value("x-forwarded-port"), Some("443"));
        }
    }
    assert!(gateway.log_lines(4).iter().all(|line| line.text("client") == "203.0.113.7"));
}

#[test]
fn the_header_may_come_in_pieces_and_with_the_request() {
    let origin = Origin::named("app");
    let gateway = gateway(&origin, TRUSTING);
    let mut client = gateway.client();
    assert!(client.drip(binary(Command::Proxy), ms(1)));
    assert_eq!(client.get("/").status, 200);
    let together = [binary(Command::Proxy), request("GET", "/", "", "")].concat();
    assert_eq!(begun(&gateway, together).response().status, 200);
}

#[test]
fn a_proxy_may_speak_for_itself() {
    let origin = Origin::named("app");
    let gateway = gateway(&origin, TRUSTING);
    for header in [b"PROXY UNKNOWN\r\n".to_vec(), binary(Command::Local)] {
        assert_eq!(begun(&gateway, header).get("/").status, 200);
        assert_eq!(last(&origin).head.value("x-forwarded-for"), Some("127.0.0.1"));
    }
}

#[test]
fn a_connection_of_a_trusted_proxy_without_the_header_is_closed() {
    let origin = Origin::named("app");
    let gateway = gateway(&origin, TRUSTING);
    for (count, wrong) in
        [&b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"[..], b"PROXY TCP5 1 2 3 4\r\n", b"\r\n\r\n\0\r\nQUIT\n\x31"]
            .into_iter()
            .enumerate()
    {
        begun(&gateway, wrong).closed();
        gateway
            .wait_metric("forebay_refusals_total{reason=\"accept.proxy_protocol\"}", |seen| seen == 1.0 + count as f64);
    }
    assert_eq!(origin.answered(), 0);
    gateway.wait_metric("forebay_client_connections", |open| open == 0.0);
}

#[test]
fn who_is_not_trusted_is_served_without_the_header_and_refused_with_it() {
    let origin = Origin::named("app");
    let gateway = gateway(&origin, "proxy_protocol: { from: [192.0.2.0/24] }");
    assert_eq!(gateway.client().get("/").status, 200);
    for header in [LINE.as_bytes().to_vec(), binary(Command::Proxy)] {
        begun(&gateway, header).closed();
    }
    gateway.wait_metric("forebay_refusals_total{reason=\"accept.proxy_untrusted\"}", |seen| seen == 2.0);
    assert_eq!(last(&origin).head.value("x-forwarded-for"), Some("127.0.0.1"));
}

#[test]
fn a_header_that_does_not_come_is_not_waited_for_long() {
    let origin = Origin::named("app");
    let gateway = gateway(&origin, "proxy_protocol: { from: [127.0.0.1], timeout: 200ms }");
    begun(&gateway, &LINE[..20]).closed();
    gateway.client().closed();
    gateway.wait_metric("forebay_refusals_total{reason=\"accept.proxy_timeout\"}", |seen| seen == 2.0);
}

#[test]
fn limits_by_address_are_of_the_true_client() {
    let origin = Origin::named("app");
    let gateway = gateway(&origin, &format!("{TRUSTING}, limits: {{ connections_per_ip: 1 }}"));
    let mut first = begun(&gateway, LINE);
    assert_eq!(first.get("/").status, 200);
    assert_eq!(begun(&gateway, LINE).response().status, 429);
    let other = LINE.replace("203.0.113.7", "203.0.113.8");
    assert_eq!(begun(&gateway, other).get("/").status, 200);
}

#[test]
fn it_comes_before_tls() {
    let (authority, origin) = (Authority::new(), Origin::named("app"));
    let tls = format!("tls: {{ certificates: [ {{ {} }} ] }}", pair(&authority.issue(&["a.test"])));
    let gateway = gateway(&origin, &format!("{TRUSTING}, {tls}"));
    let client = Tls::to(gateway.web(), &authority, "a.test");
    for header in [LINE.as_bytes().to_vec(), binary(Command::Proxy)] {
        assert_eq!(client.clone().after(header).get("/").unwrap().0.status, 200);
        assert_eq!(last(&origin).head.value("x-forwarded-for"), Some("203.0.113.7"));
    }
    assert!(client.get("/").is_err());
    gateway.wait_metric("forebay_refusals_total{reason=\"accept.proxy_protocol\"}", |seen| seen == 1.0);
}
