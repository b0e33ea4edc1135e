//! Request headers of clients never turn off a protection.

use std::collections::BTreeSet;
use std::io::Write;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream};
use std::time::Duration;

use bytes::Bytes;
use forebay::phase::Phase;
use forebay::proxy::trust::{TABLE, markdown};
use socket2::{Domain, Socket, Type};
use tokio::runtime::Builder;

use crate::harness::client::request;
use crate::harness::gateway::Watched;
use crate::harness::origin::{built_in, response};
use crate::harness::{
    Ask, Client, End, Gateway, H2Client, H2Origin, Origin, Protocol, Setup, eventually, may_open_files, ms, ok,
};

/// Header lines with CRLF that clients might use to be treated differently. If they have no framing, a chunked body
/// follows.
const TRIES: &[(&str, &[&str])] = &[
    ("Accept", &["Accept: application/json\r\n"]),
    ("Connection", &["Connection: close\r\n", "Connection: X-Own\r\nX-Own: 1\r\n", "Connection: upgrade\r\n"]),
    (
        "Content-Length",
        &["Content-Length: 300000000\r\n", "Content-Length: 1073741824\r\n", "Content-Length: 1000\r\n"],
    ),
    (
        "Content-Type",
        &["Content-Type: application/grpc\r\n", "Content-Type: application/grpc+proto\r\nTE: trailers\r\n"],
    ),
    ("Expect", &["Expect: 100-continue\r\n", "Expect: 100-continue\r\nContent-Length: 300000000\r\n"]),
    ("Forwarded, X-Forwarded-For", &["X-Forwarded-For: 10.0.0.1\r\n", "Forwarded: for=10.0.0.1\r\n"]),
    ("grpc-timeout", &["grpc-timeout: 99999999H\r\nContent-Type: application/grpc\r\nTE: trailers\r\n"]),
    ("Host", &[""]),
    (
        "HTTP2-Settings, Keep-Alive, Proxy-Authenticate, Proxy-Authorization, Proxy-Connection",
        &[
            "Keep-Alive: timeout=86400\r\nProxy-Connection: keep-alive\r\n",
            "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAAP__\r\n",
        ],
    ),
    ("Proxy", &["Proxy: http://127.0.0.1:1/\r\n"]),
    ("TE", &["TE: trailers\r\n", "TE: gzip, trailers\r\n"]),
    ("traceparent, tracestate", &["traceparent: 00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01\r\n"]),
    ("Transfer-Encoding", &["Transfer-Encoding: chunked\r\n"]),
    (
        "Upgrade",
        &[
            "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: eA==\r\n",
            "Upgrade: websocket\r\n",
            "Connection: Upgrade\r\nUpgrade: echo\r\n",
        ],
    ),
    ("X-Client-Cert-*", &["X-Client-Cert-Subject: CN=admin\r\n"]),
    ("X-Forebay-*", &["X-Forebay-Mirror: all\r\n"]),
    (
        "X-Forwarded-*, X-Real-IP, X-Client-IP, Client-IP, True-Client-IP, X-Cluster-Client-IP, CF-Connecting-IP, CF-Connecting-IPv6, Fastly-Client-IP, X-Original-Forwarded-For, X-Original-Host, X-Original-URL, X-Rewrite-URL",
        &["X-Forwarded-Proto: https\r\nX-Real-IP: 10.0.0.1\r\n"],
    ),
    ("X-Request-Id", &["X-Request-Id: mine\r\n"]),
    (
        "any whose name has other characters than letters, digits and hyphens",
        &[
            "Content_Length: 0\r\nTransfer_Encoding: identity\r\n",
            "X_Accel_Buffering: no\r\n",
            "x.accel.buffering: no\r\n",
        ],
    ),
    // Fields with a meaning only in responses are ignored in requests.
    (
        "",
        &[
            "X-Accel-Buffering: no\r\n",
            "Accept: text/event-stream\r\nContent-Type: text/event-stream\r\n",
            "Priority: u=0, i\r\n",
        ],
    ),
];

const CLIENTS: usize = 1_000;

/// The counter of endpoint selections.
const SELECTIONS: &str = "forebay_upstream_selections_total";

fn tries() -> impl Iterator<Item = &'static str> + Clone {
    TRIES.iter().flat_map(|(_, tries)| tries.iter().copied())
}

#[test]
fn the_manual_has_the_table_and_the_walk_has_each_row_of_it() {
    let manual = include_str!("../../conf/manual/security.md");
    assert!(manual.contains(&markdown()), "conf/manual/security.md is to have this:\n\n{}", markdown());
    let walked: BTreeSet<_> = TRIES.iter().map(|(fields, _)| *fields).filter(|fields| !fields.is_empty()).collect();
    assert_eq!(walked, TABLE.iter().map(|row| row.fields).collect());
    let full = include_str!("../../conf/full.yaml");
    for key in TABLE.iter().flat_map(|row| row.keys) {
        let last = key.rsplit('.').next().expect("a key");
        assert!(full.contains(&format!("{last}:")), "conf/full.yaml has no `{key}`");
    }
}

/// A loopback address, shared by ten clients each.
fn from(number: usize) -> SocketAddr {
    let number = u8::try_from(1 + number / 10).expect("few enough");
    SocketAddr::new(IpAddr::V4(Ipv4Addr::new(127, 0, 1, number)), 0)
}

fn connected(number: usize, address: SocketAddr) -> TcpStream {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None).expect("a socket");
    socket.bind(&from(number).into()).expect("an address of the loopback");
    socket.connect(&address.into()).expect("the gateway to accept");
    socket.set_tcp_nodelay(true).expect("no delay");
    socket.into()
}

/// Asserts that the gateway waits for every client in the phase `buffer`, no endpoint was chosen for them, and
/// another client is served.
fn none_holds_an_endpoint(gateway: &Gateway, origin: &Origin) {
    gateway.wait_metric("forebay_phase_active{phase=\"buffer\"}", |count| count == CLIENTS as f64);
    assert_eq!((gateway.metric(SELECTIONS), origin.connections()), (0.0, 0));
    assert_eq!(gateway.client().get("/").status, 200);
    assert_eq!(gateway.metric(SELECTIONS), 1.0);
}

#[test]
fn a_thousand_clients_that_send_a_byte_a_second_hold_no_endpoint_over_http_1_whatever_they_say() {
    may_open_files(4_096);
    let origin = Origin::named("origin");
    let gateway = Setup::before(&origin).start();
    let begin = |number: usize, lines: &str| {
        let framed = lines.contains("Content-Length:") || lines.contains("Transfer-Encoding:");
        let framing = if framed { "" } else { "Transfer-Encoding: chunked\r\n" };
        let mut client = connected(number, gateway.web());
        client
            .write_all(format!("POST / HTTP/1.1\r\nHost: test\r\n{lines}{framing}\r\n").as_bytes())
            .expect("a header");
        client
    };
    let mut clients: Vec<_> = tries().cycle().take(CLIENTS).enumerate().map(|(n, lines)| begin(n, lines)).collect();
    // A chunk size, then the chunk.
    for byte in "ff\r\n".bytes().chain([b'x'; 2]) {
        clients.iter_mut().for_each(|client| client.write_all(&[byte]).expect("the gateway to listen"));
        std::thread::sleep(ms(if byte == b'x' { 1_000 } else { 0 }));
    }
    none_holds_an_endpoint(&gateway, &origin);
}

#[test]
fn a_thousand_clients_that_send_a_byte_a_second_hold_no_endpoint_over_http_2_whatever_they_say() {
    may_open_files(4_096);
    let origin = Origin::named("origin");
    let gateway = Setup::before(&origin).listener("protocols: [http1, h2c]").start();
    let address = gateway.web();
    let runtime = Builder::new_multi_thread().worker_threads(1).enable_all().build().expect("a runtime");
    let _streams = runtime.block_on(async {
        let mut streams = Vec::new();
        let mut said = tries().cycle();
        for number in 0..CLIENTS / 50 {
            let stream = connected(number * 10, address);
            stream.set_nonblocking(true).expect("a socket that never blocks");
            let stream = tokio::net::TcpStream::from_std(stream).expect("a stream");
            let (mut send, connection) = h2::client::handshake(stream).await.expect("a handshake");
            tokio::spawn(connection);
            for lines in said.by_ref().take(50) {
                let mut request = http::Request::post("http://test/");
                for line in lines.split("\r\n").filter(|line| !line.is_empty()) {
                    let (name, value) = line.split_once(": ").expect("a field");
                    // RFC 9113 §8.2.2: these fields make an HTTP/2 request malformed.
                    let of_http1 = ["connection", "keep-alive", "proxy-connection", "upgrade", "transfer-encoding"];
                    let te = name == "TE" && value != "trailers";
                    if !te && !of_http1.contains(&&*name.to_ascii_lowercase()) {
                        request = request.header(name, value);
                    }
                }
                send = send.ready().await.expect("room for a stream");
                let (answer, body) = send.send_request(request.body(()).expect("a request"), false).expect("a stream");
                streams.push((answer, body, send.clone()));
            }
        }
        for _ in 0..2 {
            for (_, body, _) in &mut streams {
                body.send_data(Bytes::from_static(b"x"), false).expect("the gateway to listen");
            }
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
        streams
    });
    none_holds_an_endpoint(&gateway, &origin);
}

const UPGRADE: &str =
    "Connection: keep-alive, Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: eA==\r\n";

#[test]
fn a_websocket_that_the_backend_does_not_speak_is_an_exchange_like_any_other() {
    let origin = built_in();
    let gateway = Setup::before_all(&[origin.address()]).route("buffering: { response: { memory: 4MiB } }").start();
    let mut slow = Client::slow(gateway.web());
    slow.send(request("GET", "/bytes/2000000", UPGRADE, ""));
    // The endpoint is released with the last byte of its response, of which the client has read almost nothing.
    gateway.wait_phase(Phase::Write);
    eventually("the backend to be free", || (origin.busy() == 0).then_some(()));
    assert_eq!((slow.response().body.len(), slow.get("/headers").status), (2_000_000, 200));
}

#[test]
fn a_deadline_holds_for_a_websocket_until_the_backend_has_agreed_to_it() {
    let origin = Origin::scripted();
    let gateway = Setup::before(&origin).route("deadline: 300ms").start();
    let mut client = gateway.client();
    client.send(request("GET", "/", UPGRADE, ""));
    let mut silent = origin.accept();
    silent.request();
    assert_eq!(client.response().status, 504);
    assert_eq!(gateway.log_line().reason(), "wait.deadline");
    silent.closed();

    let mut client = gateway.client();
    client.send(request("GET", "/", UPGRADE, ""));
    let mut agrees = origin.accept();
    assert_eq!(agrees.request().value("connection"), Some("Upgrade"));
    agrees.send("HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n");
    assert_eq!(client.response().status, 101);
    client.dawdle(ms(600));
    client.send("hello");
    assert_eq!(agrees.bytes(5), b"hello");
    agrees.send("to you");
    assert_eq!(client.bytes(6), b"to you");
}

#[test]
fn an_upgrade_that_connection_does_not_name_is_none() {
    let origin = Origin::named("origin");
    let gateway = Setup::before(&origin).start();
    for fields in [
        "Upgrade: websocket\r\n",
        "Upgrade: websocket\r\nConnection: keep-alive\r\n",
        "Upgrade: websocket\r\nConnection: upgrades\r\n",
        "Connection: Upgrade\r\n",
    ] {
        assert_eq!(gateway.client().ask("GET", "/", fields, "").status, 200);
    }
    let mut client = gateway.client();
    client.send(format!("GET / HTTP/1.0\r\nHost: test\r\n{UPGRADE}\r\n"));
    assert_eq!(client.response().status, 200);
    for seen in origin.requests() {
        assert_eq!((seen.value("upgrade"), seen.value("connection")), (None, None), "{:?}", seen.fields);
    }
}

#[test]
fn a_switch_to_what_nobody_asked_for_is_a_502() {
    for said in ["Upgrade: h2c\r\nConnection: Upgrade\r\n", "", "Upgrade: websocket, h2c\r\n"] {
        let origin = Origin::scripted();
        let gateway = Setup::before(&origin).start();
        let mut client = gateway.client();
        client.send(request("GET", "/", UPGRADE, ""));
        let mut connection = origin.accept();
        connection.request();
        connection.send(format!("HTTP/1.1 101 Switching Protocols\r\n{said}\r\n"));
        assert_eq!(client.response().status, 502, "{said}");
        assert_eq!(gateway.log_line().reason(), "wait.malformed", "{said}");
    }
}

#[test]
fn a_client_cannot_have_removed_what_a_filter_sets() {
    let origin = Origin::named("origin");
    let filters =
        "headers: { request: { set: { X-Edge: forebay, X-Forwarded-Host: edge, X-Role: guest } } }, request_id: {}";
    let filters = filters.replace(", request_id", " }, { request_id");
    let gateway = Setup::before(&origin).filters(&format!("{{ {filters} }}")).start();
    let fields = "Connection: X-Edge, X-Role, X-Request-Id, X-Own\r\nX-Own: 1\r\nX-Role: admin\r\n";
    assert_eq!(gateway.client().ask("GET", "/", fields, "").status, 200);
    let seen = origin.request();
    assert_eq!(
        (seen.value("x-edge"), seen.value("x-role"), seen.value("x-own")),
        (Some("forebay"), Some("guest"), None)
    );
    assert_eq!((seen.value("x-forwarded-host"), seen.value("connection")), (Some("edge"), None));
    assert!(seen.value("x-request-id").is_some());
}

#[test]
fn what_connection_must_not_name_is_refused() {
    let origin = Origin::named("origin");
    let gateway = Setup::before(&origin).start();
    for named in ["Host", "close, Content-Length", "X-Forwarded-For", "\"x\"", ":path"] {
        let answer = gateway.client().ask("POST", "/", &format!("Connection: {named}\r\n"), "body");
        assert_eq!(answer.status, 400, "{named}");
        assert!(answer.text().contains("header.connection"), "{}", answer.text());
    }
    assert_eq!(origin.connections(), 0);
    assert!(gateway.log_lines(5).iter().all(|line| line.text("client") == "127.0.0.1"), "who sends them is known");
}

#[test]
fn no_field_under_another_name_reaches_a_backend() {
    let origin = Origin::named("origin");
    let forged = "X_Forwarded_For: 6.6.6.6\r\nTransfer_Encoding: chunked\r\nContent_Length: 7\r\nX.Real.IP: 6.6.6.6\r\n\
                  Proxy: http://6.6.6.6/\r\nX-Forebay-Mirror: all\r\nX-Original-URL: /admin\r\nX-Own: 1\r\n";
    for (keys, status, odd) in
        [("", 200, None), ("odd_header_names: keep", 200, Some("1")), ("odd_header_names: refuse", 400, None)]
    {
        let gateway = Setup::before(&origin).listener(&format!("protocols: [http1, h2c], {keys}")).start();
        let fields = format!("{forged}x_own: 1\r\n");
        let answer = gateway.client().ask("GET", "/", &fields, "");
        assert_eq!(answer.status, status, "{keys}");
        if status == 400 {
            assert!(answer.text().contains("header.name"), "{}", answer.text());
            continue;
        }
        let mut ask = Ask::get("/");
        for line in fields.split("\r\n").filter(|line| !line.is_empty()) {
            let (name, value) = line.split_once(": ").expect("a field");
            ask = ask.field(&name.to_ascii_lowercase(), value);
        }
        assert_eq!(ask.over(Protocol::Http2, gateway.web()).status, 200);
        let requests = origin.requests();
        for seen in &requests[requests.len() - 2..] {
            assert_eq!((seen.value("x-own"), seen.value("x_own")), (Some("1"), odd), "{keys}");
            assert!(!String::from_utf8_lossy(&seen.raw).contains("6.6.6.6"), "{keys}: {:?}", seen.fields);
            for name in ["transfer_encoding", "content_length", "proxy", "x-forebay-mirror", "x-original-url"] {
                assert_eq!(seen.value(name), None, "{keys}: {name}");
            }
        }
    }
}

#[test]
fn metadata_of_grpc_may_have_odd_names_where_grpc_is_spoken() {
    let origin = Origin::answering(|request| ok(request.value("x_user").unwrap_or("none")));
    let rpc = H2Origin::start();
    let call =
        Ask::post(1).grpc().to("/fields").field("x_user", "ann").field("x.user", "ann").field("x_real_ip", "6.6.6.6");
    let to_http1 = Setup::before(&origin).listener("protocols: [h2c]").start();
    assert_eq!(call.over(Protocol::Http2, to_http1.web()).text(), "none");
    let to_grpc = Setup::before_all(&[rpc.address()]).upstream("protocol: h2c").listener("protocols: [h2c]").start();
    let seen = call.over(Protocol::Http2, to_grpc.web());
    let names: Vec<_> = seen.text().split(' ').filter(|name| name.contains(['_', '.'])).collect();
    assert_eq!(names, ["x.user", "x_user"]);
}

#[test]
fn a_route_cannot_be_had_by_what_only_a_proxy_may_say() {
    let origin = Origin::answering(|request| response("200 OK", "", request.target()));
    let routes = "{ name: secure, match: { headers: { x-forwarded-proto: https } }, upstream: app, filters: [ { respond: { status: 204 } } ] }\n\
                  { name: all, upstream: app }";
    for (trusted, status) in [("", 200), ("trusted_proxies: [127.0.0.1]", 204)] {
        let routes = routes.replace("upstream: app, filters", "filters");
        let gateway = Setup::before(&origin).routes(&routes).more(trusted).start();
        assert_eq!(gateway.client().ask("GET", "/", "X-Forwarded-Proto: https\r\n", "").status, status, "{trusted}");
    }
}

#[test]
fn a_chain_of_proxies_goes_on_in_the_format_that_is_written() {
    let origin = Origin::named("origin");
    let gateway = Setup::before(&origin).more("forwarded: rfc7239\ntrusted_proxies: [127.0.0.1]").start();
    gateway.client().ask("GET", "/", "X-Forwarded-For: 2001:db8::1, 127.0.0.1\r\nX-Forwarded-Proto: https\r\n", "");
    let seen = origin.request();
    let expected = "for=\"[2001:db8::1]\", for=127.0.0.1;proto=https, for=127.0.0.1;host=\"test\";proto=https";
    assert_eq!((seen.value("forwarded"), seen.value("x-forwarded-for")), (Some(expected), None));
    assert_eq!(gateway.log_line().text("client"), "2001:db8::1");
}

/// The routes `admin`, which refuses all requests, `files`, which rewrites, and `all`.
fn guarded(origin: &Origin) -> Setup {
    Setup::before(origin).listener("protocols: [http1, h2c]").routes(
        "{ name: admin, match: { path: { prefix: /admin } }, filters: [ { respond: { status: 403 } } ] }\n\
         { name: files, match: { path: { prefix: /files } }, upstream: app, filters: [ { rewrite: { path: { prefix: { from: /files, to: /static } } } } ] }\n\
         { name: all, upstream: app }",
    )
}

#[test]
fn a_route_cannot_be_gone_round_by_writing_its_path_in_another_way() {
    let origin = Origin::answering(|request| ok(request.target()));
    let gateway = guarded(&origin).start();
    let h2 = H2Client::connect(gateway.web());
    for path in [
        "/admin",
        "//admin",
        "/./admin",
        "/x/../admin",
        "/x/%2e%2E/admin",
        "/%61dmin",
        "/x/..//admin//y",
        "/admin/",
        "/admin/%2e",
        "///%2e/a%64min?x=//",
    ] {
        assert_eq!((gateway.client().get(path).status, h2.get(path).status), (403, 403), "{path}");
    }
    for path in ["/x/..%2fadmin", "/x%5C..%5cadmin", "/x/..;/admin", "/x\\..\\admin", "/admin%00"] {
        assert_eq!(gateway.client().get(path).status, 400, "{path}");
    }
    assert_eq!(h2.get("/x/..%2fadmin").status, 400);
    let lines = gateway.log_lines(26);
    assert_eq!(lines.iter().filter(|line| line.reason() == "header.path").count(), 6);
    assert_eq!(origin.connections(), 0);
}

#[test]
fn route_filters_log_and_backend_have_one_path() {
    let origin = Origin::answering(|request| ok(request.target()));
    let gateway = guarded(&origin).start();
    let h2 = H2Client::connect(gateway.web());
    for (sent, seen, route, logged) in [
        ("/x/../files/a?q=/../", "/static/a?q=/../", "files", "/files/a?q=/../"),
        ("//files//%61", "/static/a", "files", "/files/a"),
        ("/files/../x", "/x", "all", "/x"),
        ("/%7Eme/caf%c3%a9/a%2fb", "/~me/caf%C3%A9/a%2Fb", "all", "/~me/caf%C3%A9/a%2Fb"),
        ("/a|b", "/a%7Cb", "all", "/a%7Cb"),
        ("/plain?a=%2f//b", "/plain?a=%2f//b", "all", "/plain?a=%2f//b"),
    ] {
        let lines = gateway.log_lines(0).len();
        assert_eq!(gateway.client().get(sent).text(), seen, "{sent}");
        assert_eq!(String::from_utf8_lossy(&h2.get(sent).body), seen, "{sent}");
        for line in &gateway.log_lines(lines + 2)[lines..] {
            assert_eq!((line.text("route"), line.text("target")), (route, logged), "{sent}");
        }
    }
}

#[test]
fn a_limit_by_path_counts_all_ways_to_write_it_as_one() {
    let origin = Origin::named("origin");
    let gateway = Setup::before(&origin).filters("{ rate_limit: { key: path, rate: 1/h, burst: 1 } }").start();
    assert_eq!(gateway.client().get("/a").status, 200);
    for path in ["/a", "//a", "/%61", "/x/../a", "/./a?q"] {
        assert_eq!(gateway.client().get(path).status, 429, "{path}");
    }
    assert_eq!(gateway.client().get("/b").status, 200);
}

#[test]
fn paths_are_read_as_is_written() {
    let origin = Origin::answering(|request| ok(request.target()));
    let asked = |paths: &str, sent: &str| {
        let gateway = Setup::before(&origin).more(&format!("paths: {{ {paths} }}")).start();
        let answer = gateway.client().get(sent);
        if answer.status == 200 { answer.text().to_owned() } else { answer.status.to_string() }
    };
    for (paths, sent, seen) in [
        ("merge_slashes: false", "/a//b", "/a//b"),
        ("merge_slashes: false", "//a/../b", "//b"),
        ("merge_slashes: true", "/a//b", "/a/b"),
        ("encoded_slash: keep", "/a%2fb", "/a%2Fb"),
        ("encoded_slash: decode", "/a%2fb%5cc", "/a/b/c"),
        ("encoded_slash: decode", "/x/..%2fb", "/b"),
        ("encoded_slash: refuse", "/a%2fb", "400"),
        ("dot_segments: refuse", "/a/%2e%2e/b", "400"),
        ("dot_segments: resolve", "/a/../b", "/b"),
    ] {
        assert_eq!(asked(paths, sent), seen, "{paths} {sent}");
    }
}

#[test]
fn a_route_is_found_however_its_path_is_written_in_the_configuration() {
    let origin = Origin::answering(|request| ok(request.target()));
    let routes = "{ name: cafe, match: { path: { prefix: \"/caf\u{e9}//%61/\" } }, filters: [ { respond: { status: 204 } } ] }\n\
                  { name: all, upstream: app }";
    let gateway = Setup::before(&origin).routes(routes).start();
    assert_eq!(gateway.client().get("/caf%C3%A9/a/b").status, 204);
    let setup = Setup::before(&origin).more("paths: { encoded_slash: refuse }");
    let setup = setup.routes("{ name: all, match: { path: { exact: /a%2Fb } }, upstream: app }");
    let config = setup.builder().parse("test.yaml", &setup.yaml()).expect("a configuration");
    let error = setup.builder().check(&config).remove(0);
    assert_eq!(error.path, "routes[0].match.path.exact");
    assert!(error.message.contains("is met by no request"), "{error}");
}

#[test]
fn a_page_that_has_pointed_its_name_at_the_admin_endpoint_is_shown_nothing() {
    let origin = Origin::named("origin");
    let gateway = Setup::before(&origin).start();
    let asked = |host: &str, path: &str| {
        let mut client = Client::connect(gateway.admin_address());
        client.send(format!("GET {path} HTTP/1.1\r\nHost: {host}\r\n\r\n"));
        let answer = client.response();
        assert_eq!(answer.end, End::Complete);
        (answer.status, answer.text().to_owned())
    };
    for path in ["/", "/metrics", "/status", "/readyz"] {
        for host in ["rebound.example", "rebound.example:9100", "127.0.0.1.rebound.example"] {
            let (status, text) = asked(host, path);
            assert_eq!(status, 403, "{host}{path}");
            assert!(text.contains("admin.hosts") && !text.contains("forebay_"), "{text}");
        }
        for host in ["127.0.0.1:1", "[::1]", "localhost", "LOCALHOST:9100", "test"] {
            assert_eq!(asked(host, path).0, 200, "{host}{path}");
        }
    }
}
