//! Client connections: limits on their number, their idle time, and their number of requests.

use std::net::{SocketAddr, TcpListener};

use crate::harness::client::get;
use crate::harness::gateway::Watched;
use crate::harness::{Client, H2Client, Origin, Setup, ms, ok};

#[test]
fn one_connection_too_many_is_answered_503_and_closed() {
    let origin = Origin::named("origin");
    let gateway = Setup::before(&origin).listener("limits: { connections: 2 }").start();
    let mut held = [gateway.client(), gateway.client()];
    for client in &mut held {
        assert_eq!(client.get("/").status, 200);
    }

    let mut third = gateway.client();
    let answer = third.get("/");
    assert_eq!((answer.status, answer.value("connection")), (503, Some("close")));
    third.closed();
    gateway.refused_once("accept.connections");
    assert_eq!(held[0].get("/").status, 200, "those that were in stay in");

    let [first, second] = held;
    drop(first);
    gateway.wait_metric("forebay_client_connections{listener=\"web\"}", |count| count == 1.0);
    assert_eq!(gateway.client().get("/").status, 200, "a place that is left is given away again");
    drop(second);
}

#[test]
fn one_connection_too_many_of_an_address_is_answered_429_and_closed() {
    let origin = Origin::named("origin");
    let gateway = Setup::before(&origin).listener("limits: { connections_per_ip: 1 }").start();
    let mut first = gateway.client();
    assert_eq!(first.get("/").status, 200);

    let mut second = gateway.client();
    assert_eq!(second.get("/").status, 429);
    second.closed();
    gateway.refused_once("accept.connections_per_ip");
    drop(first);
    gateway.wait_metric("forebay_client_connections{listener=\"web\"}", |count| count == 0.0);
    assert_eq!(gateway.client().get("/").status, 200);
}

#[test]
fn a_unix_socket_is_a_listener_like_any_other() {
    let origin = Origin::answering(|request| ok(request.value("x-forwarded-for").unwrap_or("nobody")));
    let setup = Setup::before(&origin);
    let path = setup.path("web.sock");
    let gateway = setup.also_listener(&format!("{{ name: local, address: \"unix:{}\" }}", path.display())).start();
    let mut client = Client::unix(&path);
    assert_eq!(client.get("/").text(), "nobody");
    assert_eq!(client.get("/").text(), "nobody");
    assert_eq!(gateway.client().get("/").text(), "127.0.0.1", "beside a TCP listener");
    gateway.wait_metric("forebay_client_connections{listener=\"local\",state=\"idle\"}", |count| count == 1.0);
    assert_eq!(gateway.log_lines(3)[0].text("listener"), "local");
}

#[test]
fn a_unix_socket_is_for_its_owner_and_its_group_unless_told_otherwise() {
    use std::os::unix::fs::PermissionsExt;
    let origin = Origin::named("origin");
    for (keys, mode) in [("", 0o660), ("mode: \"0600\"", 0o600), ("mode: \"0666\"", 0o666)] {
        let setup = Setup::before(&origin);
        let path = setup.path("web.sock");
        let listener = format!("{{ name: local, address: \"unix:{}\", {keys} }}", path.display());
        let _gateway = setup.also_listener(&listener).start();
        assert_eq!(Client::unix(&path).get("/").status, 200);
        assert_eq!(std::fs::metadata(&path).expect("its file").permissions().mode() & 0o777, mode);
    }
}

#[test]
fn who_comes_by_a_unix_socket_is_believed_only_if_that_is_said() {
    let origin = Origin::answering(|request| ok(request.value("x-forwarded-for").unwrap_or("none")));
    for (trusted, seen) in [("[]", "none"), ("[127.0.0.1]", "none"), ("[unix]", "192.0.2.1")] {
        let setup = Setup::before(&origin);
        let path = setup.path("web.sock");
        let setup = setup.also_listener(&format!("{{ name: local, address: \"unix:{}\" }}", path.display()));
        let gateway = setup.more(&format!("trusted_proxies: {trusted}")).start();
        let forged = "X-Forwarded-For: 192.0.2.1\r\n";
        assert_eq!(Client::unix(&path).ask("GET", "/", forged, "").text(), seen, "{trusted}");
        assert_eq!(gateway.log_line().has("client"), seen != "none", "{trusted}");
    }
}

#[test]
fn a_unix_socket_that_a_dead_process_left_is_taken_over() {
    let origin = Origin::named("origin");
    let setup = Setup::before(&origin);
    let path = setup.path("stale.sock");
    drop(std::os::unix::net::UnixListener::bind(&path).expect("a socket"));
    let _gateway = setup.also_listener(&format!("{{ name: local, address: \"unix:{}\" }}", path.display())).start();
    assert_eq!(Client::unix(&path).get("/").text(), "origin");
}

#[test]
fn a_unix_socket_may_lead_to_an_upstream_too() {
    let origin = Origin::named("behind a path");
    let inner = Setup::before(&origin);
    let path = inner.path("inner.sock");
    let _inner = inner.also_listener(&format!("{{ name: local, address: \"unix:{}\" }}", path.display())).start();
    let gateway = Setup::before_all(&[format!("unix:{}", path.display())]).start();
    assert_eq!(gateway.client().get("/").text(), "behind a path");
}

#[test]
fn a_connection_that_says_nothing_is_closed_after_the_idle_time() {
    let origin = Origin::named("origin");
    let gateway = Setup::before(&origin).listener("timeouts: { idle: 200ms }").start();
    gateway.client().closed();
    let mut client = gateway.client();
    assert_eq!(client.get("/").status, 200);
    client.closed();
    assert_eq!(gateway.log_lines(1).len(), 1, "an idle end is no exchange");
}

#[test]
fn an_idle_http_2_connection_is_closed_after_the_idle_time() {
    let origin = Origin::named("origin");
    let gateway = Setup::before(&origin).listener("protocols: [h2c], timeouts: { idle: 200ms }").start();
    let client = H2Client::connect(gateway.web());
    assert_eq!(client.get("/").status, 200);
    gateway.wait_metric("forebay_client_connections{listener=\"web\"}", |count| count == 0.0);
}

#[test]
fn a_connection_between_requests_is_counted_as_idle() {
    let origin = Origin::scripted();
    let gateway = Setup::before(&origin).start();
    let idle = "forebay_client_connections{listener=\"web\",state=\"idle\"}";
    let busy = "forebay_client_connections{listener=\"web\",state=\"active\"}";
    let mut client = gateway.client();
    client.send("GET / HTTP/1.1\r\nHost: test\r\n\r\n");
    let mut connection = origin.accept();
    connection.request();
    gateway.wait_metric(busy, |count| count == 1.0);
    assert_eq!(gateway.metric(idle), 0.0);

    connection.answer("done");
    assert_eq!(client.response().text(), "done");
    gateway.wait_metric(idle, |count| count == 1.0);
    assert_eq!(gateway.metric(busy), 0.0);
    drop(client);
    gateway.wait_metric("forebay_client_connections{listener=\"web\"}", |count| count == 0.0);
}

#[test]
fn the_last_request_of_a_connection_is_told_so() {
    let origin = Origin::named("origin");
    let gateway = Setup::before(&origin).listener("limits: { requests_per_connection: 2 }").start();
    let mut client = gateway.client();
    assert_ne!(client.get("/").value("connection"), Some("close"));
    assert_eq!(client.get("/").value("connection"), Some("close"));
    client.closed();
}

#[test]
fn a_client_that_wants_the_connection_closed_gets_it_closed() {
    let origin = Origin::named("origin");
    let gateway = Setup::before(&origin).start();
    let mut client = gateway.client();
    assert_eq!(client.ask("GET", "/", "Connection: close\r\n", "").text(), "origin");
    client.closed();
}

#[test]
fn an_http_1_0_client_may_keep_its_connection() {
    let origin = Origin::named("origin");
    let gateway = Setup::before(&origin).start();
    let mut client = gateway.client();
    for _ in 0..2 {
        client.send("GET / HTTP/1.0\r\nHost: test\r\nConnection: keep-alive\r\n\r\n");
        let answer = client.response();
        assert_eq!(answer.text(), "origin");
        if answer.value("connection") != Some("keep-alive") {
            return client.closed();
        }
    }
}

#[test]
fn a_listener_speaks_only_what_it_is_told_to() {
    let origin = Origin::named("origin");
    let both =
        Setup::before(&origin).also_listener("{ name: two, address: \"127.0.0.1:0\", protocols: [h2c] }").start();
    let mut client = both.client();
    client.send("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n");
    assert_eq!(client.response().status, 505);

    let two = both.address("two");
    let mut client = Client::connect(two);
    client.send("GET / HTTP/1.1\r\nHost: test\r\n\r\n");
    let answer = client.rest();
    assert!(!String::from_utf8_lossy(&answer).contains("200 OK"), "{answer:?}");
    assert_eq!(H2Client::connect(two).get("/").status, 200);
    assert_eq!(origin.connections(), 1);
}

#[test]
fn each_exchange_knows_its_listener() {
    let origin = Origin::named("origin");
    let gateway = Setup::before(&origin).also_listener("{ name: second, address: \"127.0.0.1:0\" }").start();
    get(gateway.web(), "/");
    get(gateway.address("second"), "/");
    let lines = gateway.log_lines(2);
    assert_eq!([lines[0].text("listener"), lines[1].text("listener")], ["web", "second"]);
}

#[test]
fn an_address_in_use_is_an_error_that_names_it() {
    let taken = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address: SocketAddr = taken.local_addr().expect("its address");
    let origin = Origin::named("origin");
    let setup = Setup::before(&origin).also_listener(&format!("{{ name: late, address: \"{address}\" }}"));
    let config = setup.builder().parse("test.yaml", &setup.yaml()).unwrap_or_else(|e| panic!("{e}"));
    let error = setup.builder().build(config).err().expect("a refusal to start").to_string();
    assert!(error.contains(&address.to_string()) && error.contains("late"), "{error}");
}

#[test]
fn a_connection_opened_and_left_alone_holds_up_nobody() {
    let origin = Origin::named("origin");
    let gateway = Setup::before(&origin).start();
    let silent: Vec<Client> = (0..50).map(|_| gateway.client()).collect();
    let mut dripping = gateway.client();
    assert!(dripping.drip("GET / HT", ms(1)));
    assert_eq!(gateway.client().get("/").text(), "origin");
    drop(silent);
}

#[test]
fn an_http_2_connection_may_have_so_many_streams_at_once() {
    let origin = Origin::named("origin");
    let gateway = Setup::before(&origin).listener("protocols: [h2c], limits: { streams: 7 }").start();
    let client = H2Client::connect(gateway.web());
    assert_eq!(client.get("/").status, 200);
    assert_eq!(client.streams_max(), 7);
}

#[test]
fn each_listener_has_its_own_limits_over_http_2_too() {
    let origin = Origin::named("origin");
    let wide = "{ name: wide, address: \"127.0.0.1:0\", protocols: [h2c], limits: { streams: 70 } }";
    let narrow = "protocols: [h2c], limits: { streams: 7 }, timeouts: { idle: 200ms }";
    let gateway = Setup::before(&origin).listener(narrow).also_listener(wide).start();
    let (narrow, wide) = (H2Client::connect(gateway.web()), H2Client::connect(gateway.address("wide")));
    assert_eq!((narrow.get("/").status, wide.get("/").status), (200, 200));
    assert_eq!((narrow.streams_max(), wide.streams_max()), (7, 70));
    gateway.wait_metric("forebay_client_connections{listener=\"web\"}", |count| count == 0.0);
    gateway.wait_metric("forebay_client_connections{listener=\"wide\"}", |count| count == 1.0);
}

#[test]
fn an_http_2_connection_may_make_so_many_requests_and_is_closed_then() {
    let origin = Origin::named("origin");
    let setup = Setup::before(&origin).listener("protocols: [h2c], limits: { requests_per_connection: 2 }");
    let gateway = setup.start();
    let client = H2Client::connect(gateway.web());
    assert_eq!((client.get("/").status, client.get("/").status), (200, 200));
    gateway.wait_metric("forebay_client_connections{listener=\"web\"}", |count| count == 0.0);
    let third = http::Request::get("http://test/").body(()).expect("a request");
    assert!(client.ask(third, b"").is_err());
    assert_eq!(origin.requests().len(), 2);
}

#[test]
fn workers_may_be_several_and_steal_from_each_other() {
    let origin = Origin::named("origin");
    for server in ["threads: 3", "threads: 3, work_stealing: true", "threads: auto"] {
        let gateway = Setup::before(&origin).server(server).start();
        let mut clients: Vec<Client> = (0..20).map(|_| gateway.client()).collect();
        for client in &mut clients {
            assert_eq!(client.get("/").text(), "origin", "{server}");
        }
    }
}

#[test]
fn an_idle_connection_keeps_no_buffers() {
    const CONNECTIONS: u64 = 400;
    let origin = Origin::named("origin");
    let process = Setup::before(&origin).spawn();
    let served = || {
        let mut client = process.client();
        assert_eq!(client.get("/").status, 200);
        client
    };
    drop((0..50).map(|_| served()).collect::<Vec<_>>());
    process.wait_metric("forebay_client_connections{listener=\"web\"}", |count| count == 0.0);

    let before = process.resident_bytes();
    let _held: Vec<Client> = (0..CONNECTIONS).map(|_| served()).collect();
    process.wait_metric("forebay_client_connections{state=\"idle\"}", |count| count == CONNECTIONS as f64);
    let each = process.resident_bytes().saturating_sub(before) / CONNECTIONS;
    assert!(each < 12 * 1024, "{each} bytes for each idle connection, in a build that is not optimised");
}
