//! Upgrades from HTTP to other protocols: which are allowed, and how the tunnel behaves once an endpoint has
//! accepted one.

use std::thread;

use crate::harness::client::request;
use crate::harness::gateway::Watched;
use crate::harness::{Client, Gateway, H2Client, Origin, Setup, ok};

fn asking(method: &str, protocol: &str, fields: &str) -> String {
    format!("{method} /attach HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: {protocol}\r\n{fields}\r\n")
}

fn agreeing(protocol: &str) -> String {
    format!("HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: {protocol}\r\n\r\n")
}

/// An origin that returns the upgrade it received.
fn echo() -> Origin {
    Origin::answering(|request| {
        let field = |name| request.value(name).unwrap_or("none").to_owned();
        ok(format!("{} {}", field("upgrade"), field("connection")))
    })
}

fn heard(gateway: &Gateway, method: &str, protocol: &str, fields: &str) -> String {
    let mut client = gateway.client();
    client.send(asking(method, protocol, fields));
    client.response().text().to_owned()
}

#[test]
fn a_protocol_passes_where_its_route_allows_it() {
    let origin = Origin::scripted();
    let gateway = Setup::before(&origin).route("upgrades: [tcp, SPDY/3.1]").start();
    for (method, protocol, fields) in
        [("GET", "tcp", ""), ("POST", "TCP", "Content-Length: 0\r\n"), ("POST", "SPDY/3.1", "X-Own: 1\r\n")]
    {
        let mut client = gateway.client();
        client.send(asking(method, protocol, fields));
        let mut connection = origin.accept();
        let asked = connection.request();
        assert_eq!((asked.value("upgrade"), asked.value("connection")), (Some(protocol), Some("Upgrade")));
        connection.send(format!("{}from the endpoint", agreeing(protocol)));
        let answer = client.response();
        assert_eq!((answer.status, answer.value("upgrade")), (101, Some(protocol)));
        assert_eq!(client.bytes(17), b"from the endpoint");
        client.send("from the client");
        assert_eq!(connection.bytes(15), b"from the client");
        connection.send("and back");
        connection.close();
        assert_eq!(client.rest(), b"and back");
    }
    assert!(gateway.log_lines(3).iter().all(|line| line.status() == 101 && line.reason().is_empty()));
}

#[test]
fn one_that_a_route_does_not_allow_is_an_ordinary_request() {
    let origin = echo();
    let gateway = Setup::before(&origin).start();
    assert_eq!(heard(&gateway, "GET", "tcp", ""), "none none");
    assert_eq!(
        heard(&gateway, "GET", "websocket", ""),
        "websocket Upgrade",
        "it is allowed unless it is written otherwise"
    );
    let gateway = Setup::before(&origin).route("upgrades: []").start();
    assert_eq!(heard(&gateway, "GET", "websocket", ""), "none none");
    let gateway = Setup::before(&origin).route("upgrades: [tcp, websocket]").start();
    assert_eq!(heard(&gateway, "GET", "tcp", ""), "tcp Upgrade");
    for (method, protocol, fields) in [
        ("GET", "h2c", "HTTP2-Settings: AAMAAABkAAQAAP__\r\n"),
        ("GET", "TLS/1.0", ""),
        ("GET", "tcp, h2c", ""),
        ("GET", "tcp, websocket", ""),
        ("GET", "spdy/3.1", ""),
        ("POST", "websocket", ""),
    ] {
        assert_eq!(heard(&gateway, method, protocol, fields), "none none", "{method} {protocol}");
    }
}

#[test]
fn a_426_names_the_protocols_that_it_requires() {
    let required = "HTTP/1.1 426 Upgrade Required\r\nConnection: Upgrade, X-Own\r\nX-Own: 1\r\nUpgrade: websocket\r\n\
        Content-Length: 3\r\n\r\nno.";
    let origin = Origin::answering(move |_| required.into());
    let gateway = Setup::before(&origin).listener("protocols: [http1, h2c]").route("upgrades: [tcp]").start();
    // One uses the gateway's own session, the other a session that might have become a tunnel.
    for asked in [request("GET", "/", "", ""), asking("GET", "tcp", "").into_bytes()] {
        let mut client = gateway.client();
        for _ in 0..2 {
            client.send(&asked);
            let answer = client.response();
            assert_eq!((answer.status, answer.text(), answer.value("upgrade")), (426, "no.", Some("websocket")));
            let lists = answer.values("connection");
            let mut options: Vec<_> = lists.iter().flat_map(|list| list.split(", ")).collect();
            options.sort_unstable();
            assert_eq!((options, answer.value("x-own")), (vec!["keep-alive", "upgrade"], None));
        }
    }
    let mut old = gateway.client();
    old.send("GET / HTTP/1.0\r\n\r\n");
    let answer = old.response();
    assert_eq!((answer.status, answer.value("upgrade"), answer.value("connection")), (426, None, Some("close")));
    let answer = H2Client::connect(gateway.web()).get("/");
    assert_eq!((answer.status, answer.headers.get("upgrade"), answer.headers.get("connection")), (426, None, None));
}

#[test]
fn an_answer_that_requires_no_upgrade_offers_none() {
    let origin = Origin::answering(|_| {
        b"HTTP/1.1 200 OK\r\nConnection: Upgrade\r\nUpgrade: h2,h2c\r\nContent-Length: 2\r\n\r\nok".to_vec()
    });
    let gateway = Setup::before(&origin).start();
    for asked in [request("GET", "/", "", ""), asking("GET", "websocket", "").into_bytes()] {
        let mut client = gateway.client();
        client.send(asked);
        let answer = client.response();
        assert_eq!((answer.value("upgrade"), answer.value("connection")), (None, Some("keep-alive")));
    }
}

#[test]
fn the_operator_is_told_of_a_protocol_that_is_not_allowed() {
    let origin = echo();
    let process = Setup::before(&origin).spawn();
    let mut client = process.client();
    client.send(asking("GET", "tcp", ""));
    assert_eq!(client.response().text(), "none none");
    process.says("a client asks for a protocol that its route does not allow");
    process.says("protocol=\"tcp\"");
}

#[test]
fn an_endpoint_that_agrees_to_another_protocol_is_a_502() {
    let origin = Origin::scripted();
    let gateway = Setup::before(&origin).route("upgrades: [tcp, websocket]").start();
    for (asked, agreed) in [("tcp", "websocket"), ("websocket", "tcp"), ("tcp", "tcp, websocket"), ("tcp", "")] {
        let mut client = gateway.client();
        client.send(asking("GET", asked, ""));
        let mut connection = origin.accept();
        connection.request();
        connection.send(agreeing(agreed));
        assert_eq!(client.response().status, 502, "{asked} {agreed}");
        connection.closed();
    }
}

#[test]
fn behind_a_101_there_is_nothing_but_the_tunnel() {
    let origin = Origin::scripted();
    let setup = Setup::before(&origin).upstream("timeouts: { wait: 300ms, receive: 300ms }");
    let gateway = setup.route("upgrades: [websocket, tcp]").start();
    for protocol in ["websocket", "tcp"] {
        let begin = || {
            let mut client: Client = gateway.client();
            client.send(asking("GET", protocol, ""));
            let mut connection = origin.accept();
            connection.request();
            connection.send(format!("{}first", agreeing(protocol)));
            assert_eq!(client.response().status, 101);
            assert_eq!(client.bytes(5), b"first");
            (client, connection)
        };
        // The endpoint resets, closes, or is silent for too long.
        let (mut client, connection) = begin();
        connection.reset();
        assert_eq!(client.rest(), b"", "{protocol}, reset");
        let (mut client, connection) = begin();
        connection.close();
        assert_eq!(client.rest(), b"", "{protocol}, closed");
        let (mut client, mut connection) = begin();
        assert_eq!(client.rest(), b"", "{protocol}, silent");
        connection.closed();
        // The client resets its connection.
        let (client, mut connection) = begin();
        client.reset();
        connection.closed();
    }
    gateway.wait_at_rest();
}

/// Both directions are complete, whichever side ends first.
#[test]
fn each_direction_of_a_tunnel_ends_by_itself() {
    const MUCH: usize = 3 << 20;
    let origin = Origin::scripted();
    let gateway = Setup::before(&origin).route("upgrades: [tcp]").start();
    let begin = |greeting: &str| {
        let mut client: Client = gateway.client();
        client.send(asking("GET", "tcp", ""));
        let mut connection = origin.accept();
        connection.request();
        let hint = if greeting.is_empty() { "" } else { "HTTP/1.1 103 Early Hints\r\nLink: a\r\n\r\n" };
        connection.send(format!("{hint}{}{greeting}", agreeing("tcp")));
        if !hint.is_empty() {
            assert_eq!(client.response().status, 103);
        }
        assert_eq!(client.response().status, 101);
        assert_eq!(client.bytes(greeting.len()), greeting.as_bytes());
        (client, connection.into_wire())
    };
    let body: Vec<u8> = (0..MUCH).map(|n| (n / 7) as u8).collect();

    // A program's input ends before it writes anything.
    for greeting in ["", "ready"] {
        let (mut client, mut connection) = begin(greeting);
        client.send("input");
        client.end();
        assert_eq!(connection.rest(), b"input");
        connection.send("output").expect("the gateway takes it");
        thread::scope(|scope| {
            scope.spawn(|| connection.send(&body).expect("the gateway takes it"));
            assert_eq!(client.bytes(6), b"output");
            assert!(client.bytes(MUCH) == body, "all of it");
        });
        drop(connection);
        assert_eq!(client.rest(), b"");
    }

    // The endpoint ends its direction and keeps reading.
    for greeting in ["", "bye"] {
        let (mut client, mut connection) = begin(greeting);
        connection.send("last words").expect("the gateway takes it");
        connection.end();
        assert_eq!(client.rest(), b"last words");
        thread::scope(|scope| {
            scope.spawn(|| {
                client.send(&body);
                client.end();
            });
            assert!(connection.rest() == body, "all of it");
        });
    }
    gateway.wait_at_rest();
}

#[test]
fn a_route_may_take_the_end_of_a_client_for_that_of_its_tunnel() {
    let origin = Origin::scripted();
    let gateway = Setup::before(&origin).route("upgrades: [tcp], client: { half_close: abort }").start();
    let mut client: Client = gateway.client();
    client.send(asking("GET", "tcp", ""));
    let mut connection = origin.accept();
    connection.request();
    connection.send(agreeing("tcp"));
    assert_eq!(client.response().status, 101);
    client.end();
    connection.closed();
    assert_eq!(client.rest(), b"");
    gateway.wait_at_rest();
}
