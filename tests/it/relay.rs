//! Forwarded connections: by the server name of a TLS client, or all connections of a listener.

use forebay::phase::Phase;

use crate::harness::gateway::Watched;
use crate::harness::origin::Closed;
use crate::harness::secure::{Authority, Layers, Secure};
use crate::harness::tls::{Tls, pair};
use crate::harness::{Client, Origin, Setup};

#[test]
fn a_name_is_passed_through_and_the_others_are_served_here() {
    let authority = Authority::new();
    let there = Secure::start(Layers::tls(&authority.issue(&["there.test"])));
    let here = authority.issue(&["here.test"]);
    let origin = Origin::named("app");
    let keys = format!(
        "tls: {{ certificates: [ {{ {} }} ] }}, passthrough: [ {{ sni: [there.test, \"*.there.test\"], upstream: db }} ]",
        pair(&here)
    );
    let upstream = format!("endpoints: [ {{ address: \"{}\" }} ]", there.address());
    let gateway = Setup::before(&origin).listener(&keys).also_upstream("db", &upstream).start();
    let (got, passed) = Tls::to(gateway.web(), &authority, "there.test").get("/").expect("an answer");
    assert!(got.body.contains("\"name\":\"there.test\""), "{}", got.body);
    drop(passed);
    let (got, _) = Tls::to(gateway.web(), &authority, "here.test").get("/").expect("an answer");
    assert_eq!(got.body, "app");
    assert!(Tls::to(gateway.web(), &authority, "elsewhere.test").connect().is_err());
    let line = gateway.log_lines(2).into_iter().find(|line| line.text("protocol") == "TLS").expect("a line of it");
    assert_eq!((line.text("host"), line.text("upstream")), ("there.test", "db"));
    assert!(line.number("received") > 200.0 && line.number("sent") > 200.0 && line.phase(Phase::Receive).is_some());
    gateway.wait_metric("forebay_relayed_connections{name=\"there.test\"}", |open| open == 0.0);
    assert_eq!(gateway.metric("forebay_relayed_connections_total{listener=\"web\",name=\"there.test\"}"), 1.0);
}

#[test]
fn every_connection_of_a_tcp_listener_is_passed_on_and_one_that_is_refused_goes_elsewhere() {
    let (origin, closed) = (Origin::scripted(), Closed::refusing());
    let upstream = format!(
        "endpoints: [ {{ address: \"{}\" }}, {{ address: \"{}\" }} ], load_balancing: {{ policy: round_robin }}",
        closed.address(),
        origin.address()
    );
    let gateway = Setup::before(&origin)
        .also_upstream("db", &upstream)
        .also_listener("{ name: db, address: \"127.0.0.1:0\", tcp: { upstream: db } }")
        .start();
    for _ in 0..2 {
        let mut client = Client::connect(gateway.address("db"));
        client.send(b"what is this?");
        let mut connection = origin.accept();
        assert_eq!(connection.bytes(13), b"what is this?");
        connection.send(b"no HTTP");
        assert_eq!(client.bytes(7), b"no HTTP");
        connection.close();
        client.closed();
    }
    let lines = gateway.log_lines(2);
    assert!(lines.iter().all(|line| line.text("protocol") == "TCP" && line.number("sent") == 7.0));
    gateway.wait_at_rest();
}

/// A listener whose clients queue for one endpoint, and one that forwards `db.test` to it.
fn relaying(upstream: &str) -> Setup {
    // Longer than any test.
    let long = "timeouts: { connect: 60s }, queue: { size: 4, timeout: 60s }";
    let (tcp, sni) = ("tcp: { upstream: db }", "passthrough: [ { sni: [db.test], upstream: db } ]");
    Setup::before(&Origin::scripted())
        .also_upstream("db", &format!("{upstream}, {long}"))
        .also_listener(&format!("{{ name: db, address: \"127.0.0.1:0\", {tcp} }}"))
        .also_listener(&format!("{{ name: sni, address: \"127.0.0.1:0\", {sni} }}"))
}

/// The ClientHello of a client that sends this name (RFC 8446 §4.1.2).
fn client_hello(name: &str) -> Vec<u8> {
    fn counted(width: usize, parts: &[&[u8]]) -> Vec<u8> {
        let bytes = parts.concat();
        [&bytes.len().to_be_bytes()[8 - width..], &bytes].concat()
    }
    let host_name = counted(2, &[&[0], &counted(2, &[name.as_bytes()])]);
    let server_name = [&[0, 0][..], &counted(2, &[&host_name])].concat();
    let versions = [0, 43, 0, 3, 2, 3, 4];
    let extensions = counted(2, &[&server_name, &versions]);
    let hello = counted(3, &[&[3, 3], &[7; 32], &[0], &[0, 2, 0x13, 1], &[1, 0], &extensions]);
    [&[22, 3, 1][..], &counted(2, &[&[1], &hello])].concat()
}

type Leaves = fn(Client) -> Option<Client>;

/// The ways to leave: a FIN, after which the client keeps its socket until the gateway has noticed, and a RST.
const LEAVES: [Leaves; 2] = [
    |mut client| {
        client.end();
        Some(client)
    },
    |client| {
        client.reset();
        None
    },
];

/// The listener, the client's data, and how the client leaves.
fn visits() -> impl Iterator<Item = (&'static str, Vec<u8>, Leaves)> {
    let said = [("db", Vec::new()), ("sni", client_hello("db.test"))];
    said.into_iter().flat_map(|(listener, said)| LEAVES.map(|leave| (listener, said.clone(), leave)))
}

#[test]
fn a_client_that_leaves_the_queue_of_a_relay_gives_its_place_up() {
    const QUEUE: &str = "forebay_upstream_queue{upstream=\"db\"}";
    let origin = Origin::scripted();
    let one =
        format!("endpoints: [ {{ address: \"{}\" }} ], limits: {{ endpoint: {{ requests: 1 }} }}", origin.address());
    let gateway = relaying(&one).start();
    let first = Client::connect(gateway.address("db"));
    let connection = origin.accept();
    for (listener, said, leave) in visits() {
        let mut client = Client::connect(gateway.address(listener));
        client.send(said);
        gateway.wait_metric(QUEUE, |waiting| waiting == 1.0);
        let _kept = leave(client);
        gateway.wait_metric(QUEUE, |waiting| waiting == 0.0);
    }
    let lines = gateway.log_lines(4);
    assert!(lines.iter().all(|line| line.reason() == "queue.aborted" && line.number("attempts") == 0.0));
    gateway.wait_metric("forebay_refusals_total{reason=\"queue.aborted\"}", |count| count == 4.0);
    // A client that shuts down its sending side after sending data still waits for the response.
    let mut patient = Client::connect(gateway.address("db"));
    patient.send("all that I have to say");
    patient.end();
    gateway.wait_metric(QUEUE, |waiting| waiting == 1.0);
    drop(first);
    connection.close();
    let mut next = origin.accept();
    assert_eq!(next.bytes(22), b"all that I have to say");
    next.send("well");
    next.close();
    assert_eq!(patient.bytes(4), b"well");
    gateway.wait_metric(QUEUE, |waiting| waiting == 0.0);
}

#[test]
fn a_client_that_leaves_while_a_relay_connects_gives_its_permit_up() {
    let silent = Closed::silent();
    let one = format!("endpoints: [ {{ address: \"{}\" }} ]", silent.address());
    let gateway = relaying(&one).start();
    let busy = format!("forebay_endpoint_inflight{{upstream=\"db\",endpoint=\"{}\"}}", silent.address());
    for (listener, said, leave) in visits() {
        let mut client = Client::connect(gateway.address(listener));
        client.send(said);
        gateway.wait_metric(&busy, |permits| permits == 1.0);
        let _kept = leave(client);
        gateway.wait_metric(&busy, |permits| permits == 0.0);
    }
    let lines = gateway.log_lines(4);
    assert!(lines.iter().all(|line| line.reason() == "send.aborted" && line.number("attempts") == 1.0));
    gateway.wait_metric("forebay_refusals_total{reason=\"send.aborted\"}", |count| count == 4.0);
    gateway.wait_at_rest();
}

#[test]
fn a_client_that_breaks_off_ends_a_connection_that_is_passed_on_to_who_takes_nothing() {
    let origin = Origin::scripted();
    let one = format!("endpoints: [ {{ address: \"{}\" }} ]", origin.address());
    let gateway = relaying(&one).start();
    for ends_first in [false, true] {
        let mut client = Client::connect(gateway.address("db"));
        client.send("hello");
        let mut connection = origin.accept();
        connection.bytes(5);
        let mut wire = connection.into_wire();
        if ends_first {
            wire.end();
            client.closed();
        }
        client.fill(&[b'x'; 64 << 10]);
        client.reset();
        gateway.wait_metric("forebay_relayed_connections", |open| open == 0.0);
    }
    assert!(gateway.log_lines(2).iter().all(|line| line.reason() == "receive.aborted"));
}

#[test]
fn a_gateway_that_only_passes_connections_on_needs_no_routes() {
    let origin = Origin::scripted();
    let gateway = Setup::before(&origin).listener("tcp: { upstream: app }").routes("").start();
    let mut client = gateway.client();
    client.send(b"hello");
    assert_eq!(origin.accept().bytes(5), b"hello");
}

#[test]
fn silence_ends_a_connection_that_is_passed_on() {
    let origin = Origin::scripted();
    let gateway = Setup::before(&origin)
        .also_listener("{ name: db, address: \"127.0.0.1:0\", tcp: { upstream: app, idle: 200ms } }")
        .start();
    let mut client = Client::connect(gateway.address("db"));
    client.send(b"hello");
    let mut connection = origin.accept();
    connection.bytes(5);
    client.closed();
    connection.closed();
    assert_eq!(gateway.log_line().reason(), "receive.timeout");
}

#[test]
fn where_nobody_serves_the_connection_is_closed_and_counted() {
    let closed = Closed::refusing();
    let gateway = Setup::before_all(&[closed.address()])
        .also_listener("{ name: db, address: \"127.0.0.1:0\", tcp: { upstream: app } }")
        .start();
    Client::connect(gateway.address("db")).closed();
    assert_eq!(gateway.log_line().reason(), "connect.refused");
    gateway.wait_metric("forebay_refusals_total{reason=\"connect.refused\"}", |count| count == 1.0);
}

#[test]
fn the_upstream_is_told_of_the_client_by_the_proxy_protocol() {
    let origin = Secure::start(Layers::none().introduced());
    let gateway = Setup::before_all(&[origin.address()])
        .upstream("proxy_protocol: v2")
        .also_listener(
            "{ name: db, address: \"127.0.0.1:0\", proxy_protocol: { from: [127.0.0.1] }, tcp: { upstream: app } }",
        )
        .start();
    let mut client = Client::connect(gateway.address("db"));
    client.send(b"PROXY TCP4 203.0.113.7 192.0.2.1 4711 443\r\n");
    let answer = client.get("/");
    assert!(answer.text().contains("203.0.113.7:4711"), "{}", answer.text());
}
