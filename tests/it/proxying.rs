//! Messages pass unchanged, and connection-specific parts stay on their connection.
//!
//! The origin is the real nginx where bodies matter, and a raw one where headers matter.

use std::io::Write;
use std::net::TcpStream;
use std::process::Command;
use std::thread;

use bytes::Bytes;
use tempfile::NamedTempFile;
use tokio_tungstenite::tungstenite::{self, Message};

use crate::harness::client::{chunked, request};
use crate::harness::gateway::Watched;
use crate::harness::nginx::noise;
use crate::harness::origin::response;
use crate::harness::{Client, End, Gateway, H2Client, Nginx, Origin, Setup, ms, ok};

/// The output of `curl`, which must succeed.
fn curl(arguments: &[&str]) -> Vec<u8> {
    let output = Command::new("curl").args(["-sS", "--max-time", "20"]).args(arguments).output().expect("curl");
    assert!(output.status.success(), "curl {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    output.stdout
}

fn before_nginx() -> (Nginx, Gateway) {
    let nginx = Nginx::start();
    let gateway = Setup::before_all(&[nginx.address()]).start();
    (nginx, gateway)
}

#[test]
fn small_large_empty_and_chunked_answers_come_byte_for_byte() {
    let (nginx, gateway) = before_nginx();
    for path in ["/small", "/large", "/empty", "/chunked"] {
        let body = curl(&["--fail", &format!("http://{}{path}", gateway.web())]);
        assert!(body == nginx.file(path), "{path}: {} bytes came", body.len());
    }
}

#[test]
fn a_raw_client_gets_the_same_header_from_nginx_with_and_without_the_gateway() {
    let (nginx, gateway) = before_nginx();
    let (mut direct, mut through) = (Client::connect(nginx.address()), gateway.client());
    for (method, path) in
        [("GET", "/small"), ("HEAD", "/large"), ("HEAD", "/chunked"), ("GET", "/nothing"), ("GET", "/gone")]
    {
        let (expected, found) = (direct.ask(method, path, "", ""), through.ask(method, path, "", ""));
        assert_eq!((found.status, &found.body, found.end), (expected.status, &expected.body, End::Complete), "{path}");
        for name in ["server", "content-length", "content-type", "etag", "last-modified", "accept-ranges"] {
            assert_eq!(found.value(name), expected.value(name), "{name} of {method} {path}");
        }
    }
}

#[test]
fn an_unchanged_file_is_answered_304_without_a_body_and_the_connection_goes_on() {
    let (_nginx, gateway) = before_nginx();
    let mut client = gateway.client();
    let tag = client.get("/small").value("etag").expect("an ETag").to_owned();
    let answer = client.ask("GET", "/small", &format!("If-None-Match: {tag}\r\n"), "");
    assert_eq!((answer.status, answer.body.len()), (304, 0));
    assert_eq!(client.get("/small").text(), "a small file\n");
}

#[test]
fn a_part_of_a_file_is_answered_206() {
    let (nginx, gateway) = before_nginx();
    let answer = gateway.client().ask("GET", "/large", "Range: bytes=1000-1999\r\n", "");
    assert_eq!(answer.status, 206);
    assert_eq!(answer.body, nginx.file("/large")[1000..2000]);
}

#[test]
fn curl_uploads_with_a_length_and_in_chunks_reach_the_disk_byte_for_byte() {
    let (nginx, gateway) = before_nginx();
    let body = noise(3_000_000);
    let mut file = NamedTempFile::new().expect("a file");
    file.write_all(&body).expect("to write it");
    let file = file.path().to_str().expect("its name");
    for (name, framing) in [("length", "X-Framing: length"), ("chunks", "Transfer-Encoding: chunked")] {
        let url = format!("http://{}/put/{name}", gateway.web());
        curl(&["--fail", "-T", file, "-H", framing, &url]);
        assert!(nginx.file(&format!("/put/{name}")) == body, "{name}");
    }
}

#[test]
fn a_raw_client_uploads_in_odd_chunks() {
    let (nginx, gateway) = before_nginx();
    let body = noise(100_000);
    let mut client = gateway.client();
    client.send(request("PUT", "/put/odd", "Transfer-Encoding: chunked\r\n", ""));
    client.send(chunked(&body, 777));
    assert_eq!(client.response().status, 201);
    assert!(nginx.file("/put/odd") == body);
}

#[test]
fn an_upload_may_be_empty() {
    let origin = Origin::answering(|request| ok(format!("{} bytes", request.body.len())));
    let gateway = Setup::before(&origin).start();
    let mut client = gateway.client();
    assert_eq!(client.ask("POST", "/", "Content-Length: 0\r\n", "").text(), "0 bytes");
    client.send(request("POST", "/", "Transfer-Encoding: chunked\r\n", ""));
    client.send("0\r\n\r\n");
    assert_eq!(client.response().text(), "0 bytes");
}

#[test]
fn wrk_sees_no_failed_request() {
    let (_nginx, gateway) = before_nginx();
    let seconds = std::env::var("FOREBAY_WRK_SECONDS").unwrap_or_else(|_| "2".to_owned());
    let output = Command::new("wrk")
        .args(["-t1", "-c16", "--timeout", "8s", &format!("-d{seconds}s"), &format!("http://{}/small", gateway.web())])
        .output()
        .expect("wrk, which `make test` installs");
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(said.contains("requests in"), "{said}");
    assert!(!said.contains("Non-2xx") && !said.contains("Socket errors"), "{said}");
    gateway.wait_metric("forebay_exchanges_total{code=\"200\"}", |count| count > 100.0);
}

#[test]
fn an_answer_without_a_length_is_the_last_that_an_http_1_0_client_gets() {
    let origin = Origin::answering(|_| response("200 OK", "Transfer-Encoding: chunked\r\n", "2\r\nok\r\n0\r\n\r\n"));
    let gateway = Setup::before(&origin).start();
    let mut client = gateway.client();
    client.send("GET / HTTP/1.0\r\nHost: test\r\nConnection: keep-alive\r\n\r\n");
    let answer = client.response();
    assert_eq!((answer.text(), answer.value("connection")), ("ok", Some("close")));
    client.closed();
}

#[test]
fn an_http_1_0_client_gets_an_answer_without_chunks_and_a_closed_connection() {
    let (nginx, gateway) = before_nginx();
    let mut client = gateway.client();
    client.send("GET /chunked HTTP/1.0\r\nHost: test\r\n\r\n");
    let answer = client.response();
    assert_eq!((answer.status, answer.value("transfer-encoding")), (200, None));
    assert!(answer.body == nginx.file("/chunked"));
    client.closed();
    assert_eq!(curl(&["--fail", "--http1.0", &format!("http://{}/small", gateway.web())]), nginx.file("/small"));
}

#[test]
fn http_2_clients_get_and_upload_byte_for_byte() {
    let nginx = Nginx::start();
    let gateway = Setup::before_all(&[nginx.address()]).listener("protocols: [http1, h2c]").start();
    for path in ["/small", "/large", "/empty", "/chunked"] {
        let body = curl(&["--fail", "--http2-prior-knowledge", &format!("http://{}{path}", gateway.web())]);
        assert!(body == nginx.file(path), "{path}");
    }

    let (client, body) = (H2Client::connect(gateway.web()), noise(60_000));
    let put = http::Request::put("http://test/put/h2").body(()).expect("a request");
    assert_eq!(client.ask(put, &body).expect("an answer").status, 201);
    assert!(nginx.file("/put/h2") == body);
    assert_eq!(client.get("/nothing").status, 204);
    assert_eq!(gateway.client().get("/small").status, 200, "HTTP/1 on the same port");
}

#[test]
fn cookie_crumbs_of_http_2_reach_an_http_1_origin_as_one_field() {
    let origin = Origin::named("origin");
    let gateway = Setup::before(&origin).listener("protocols: [h2c]").start();
    let crumbs = http::Request::get("http://test/").header("cookie", "a=1").header("cookie", "b=2");
    H2Client::connect(gateway.web()).ask(crumbs.body(()).expect("a request"), b"").expect("an answer");
    assert_eq!(origin.request().value("cookie"), Some("a=1; b=2"));
    assert_eq!(origin.request().value("host"), Some("test"));
}

#[test]
fn an_upstream_may_speak_http_2_in_clear_text() {
    let nginx = Nginx::start();
    let gateway = Setup::before_all(&[nginx.h2c()]).upstream("protocol: h2c").start();
    let mut client = gateway.client();
    assert_eq!(client.get("/protocol").text(), "HTTP/2.0");
    assert!(client.get("/large").body == nginx.file("/large"));
    assert_eq!(client.ask("PUT", "/put/h2c", "", "over HTTP/2").status, 201);
    assert_eq!(nginx.file("/put/h2c"), b"over HTTP/2");
    assert_eq!(client.ask("HEAD", "/large", "", "").value("content-length"), Some("20000000"));
}

#[test]
fn an_upstream_may_speak_http_2_over_tls_and_its_certificate_is_verified() {
    let nginx = Nginx::start();
    let setup = Setup::before_all(&[nginx.h2()]).upstream("protocol: h2");
    let trusting = setup.spawn_with(&[("SSL_CERT_FILE", &nginx.certificate())]);
    assert_eq!(trusting.client().get("/protocol").text(), "HTTP/2.0");
    drop(trusting);

    let strict = setup.spawn();
    assert_eq!(strict.client().get("/protocol").status, 502);
    strict.refused_once("connect.tls");
}

#[test]
fn a_web_socket_passes_both_ways() {
    let origin = Origin::scripted();
    let gateway = Setup::before(&origin).start();
    let address = gateway.web();
    let browser = thread::spawn(move || {
        let stream = TcpStream::connect(address).expect("the gateway to accept");
        let (mut socket, _) = tungstenite::client("ws://test/chat", stream).expect("the upgrade to pass");
        socket.send(Message::text("hello")).expect("to send");
        let answer = socket.read().expect("an answer");
        socket.close(None).expect("to close");
        answer
    });

    let mut server = tungstenite::accept(origin.accept().into_socket()).expect("an upgrade at the origin");
    let heard = server.read().expect("a message at the origin");
    server.send(Message::text(format!("{heard} to you"))).expect("to answer");
    assert_eq!(browser.join().expect("the browser"), Message::text("hello to you"));
    drop(server);
    assert_eq!(gateway.log_line().status(), 101);
}

#[test]
fn a_refused_upgrade_is_an_ordinary_answer() {
    let origin = Origin::named("not here");
    let gateway = Setup::before(&origin).start();
    let upgrade =
        "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: eA==\r\n";
    let answer = gateway.client().ask("GET", "/chat", upgrade, "");
    assert_eq!((answer.status, answer.text()), (200, "not here"));
    assert_eq!(origin.request().value("upgrade"), Some("websocket"));
}

#[test]
fn pipelined_requests_are_answered_in_order() {
    let origin = Origin::answering(|request| ok(format!("{} {}", request.target(), request.body.len())));
    let gateway = Setup::before(&origin).start();
    let mut client = gateway.client();
    let mut burst = request("GET", "/first", "", "");
    burst.extend(request("POST", "/second", "", "a body"));
    burst.extend(request("POST", "/third", "Transfer-Encoding: chunked\r\n", ""));
    burst.extend(chunked(b"chunks", 4));
    burst.extend(request("GET", "/fourth", "", ""));
    client.send(burst);
    for expected in ["/first 0", "/second 6", "/third 6", "/fourth 0"] {
        assert_eq!(client.response().text(), expected);
    }
    assert_eq!(client.get("/fifth").text(), "/fifth 0");
}

#[test]
fn what_a_client_says_of_its_connection_stays_on_it() {
    let origin = Origin::named("origin");
    let gateway = Setup::before(&origin).start();
    let fields = "Connection: keep-alive, X-Secret\r\nX-Secret: 1\r\nKeep-Alive: timeout=9\r\n\
                  Proxy-Connection: keep-alive\r\nTE: trailers, deflate\r\nX-Public: 2\r\n";
    assert_eq!(gateway.client().ask("GET", "/", fields, "").status, 200);
    let request = origin.request();
    for name in ["x-secret", "keep-alive", "proxy-connection", "te"] {
        assert_eq!(request.value(name), None, "{name} reached the origin");
    }
    assert!(!request.value("connection").unwrap_or_default().to_ascii_lowercase().contains("x-secret"));
    assert_eq!(request.value("x-public"), Some("2"));
}

#[test]
fn a_client_cannot_nominate_what_the_gateway_itself_says() {
    let origin = Origin::named("origin");
    let gateway = Setup::before(&origin).start();
    // Nominating fields that a request needs is refused or ignored.
    for names in ["X-Forwarded-For", "Host", "Content-Length"] {
        let status = gateway.client().ask("POST", "/", &format!("Connection: {names}\r\n"), "body").status;
        assert!(status == 200 || status == 400, "{status}");
    }
    for request in origin.requests() {
        assert_eq!((request.value("host"), request.value("x-forwarded-for")), (Some("test"), Some("127.0.0.1")));
        assert_eq!(request.body, b"body");
    }
}

#[test]
fn what_an_origin_says_of_its_connection_stays_on_it() {
    let fields = "Connection: keep-alive, X-Internal\r\nX-Internal: 1\r\nKeep-Alive: timeout=9\r\n\
                  Proxy-Connection: keep-alive\r\nX-Public: 2\r\n";
    let origin = Origin::answering(move |_| response("200 OK", fields, "body"));
    let gateway = Setup::before(&origin).listener("protocols: [http1, h2c]").start();
    let answer = gateway.client().get("/");
    for name in ["x-internal", "keep-alive", "proxy-connection"] {
        assert_eq!(answer.value(name), None, "{name} reached the client");
    }
    assert_eq!(answer.value("x-public"), Some("2"));

    let answer = H2Client::connect(gateway.web()).get("/");
    assert_eq!((answer.status, answer.headers.get("connection"), answer.headers.get("x-internal")), (200, None, None));
}

#[test]
fn server_of_the_origin_is_left_alone_and_date_is_when_the_gateway_answered() {
    let fields = "Date: Mon, 01 Jan 2001 00:00:00 GMT\r\nServer: oddity/1\r\n";
    let origin = Origin::answering(move |_| response("299 Odd", fields, ""));
    let gateway = Setup::before(&origin).start();
    let answer = gateway.client().get("/");
    assert_eq!(answer.status, 299);
    // As in nginx; Pingora leaves no choice.
    assert!(answer.value("date").is_some_and(|date| date.ends_with(" GMT") && !date.contains("2001")));
    assert_eq!(answer.value("server"), Some("oddity/1"));
}

#[test]
fn several_fields_of_one_name_stay_several_and_in_order() {
    let origin = Origin::answering(|_| response("200 OK", "Set-Cookie: a=1\r\nSet-Cookie: b=2\r\n", ""));
    let gateway = Setup::before(&origin).start();
    let answer = gateway.client().ask("GET", "/", "X-Many: 1\r\nX-Many: 2\r\n", "");
    assert_eq!(answer.values("set-cookie"), ["a=1", "b=2"]);
    assert_eq!(origin.request().values("x-many"), ["1", "2"]);
}

#[test]
fn a_path_in_its_one_form_and_any_query_pass_unchanged() {
    let origin = Origin::answering(|request| ok(request.target()));
    let gateway = Setup::before(&origin).start();
    for target in ["/a/b.c/", "/%20%2F?q=%20+&&x%00%zz", "/?", "/a;b=c?d=[e]|{f}", "/@:!$&'()*+,=~?//a/../%61"] {
        assert_eq!(gateway.client().get(target).text(), target);
    }
}

#[test]
fn the_origin_is_told_who_asks_and_how() {
    let origin = Origin::named("origin");
    let gateway = Setup::before(&origin).start();
    gateway.client().get("/");
    let request = origin.request();
    assert_eq!(request.value("x-forwarded-for"), Some("127.0.0.1"));
    assert_eq!(request.value("x-forwarded-proto"), Some("http"));
    assert_eq!(request.value("x-forwarded-host"), Some("test"));
    assert_eq!(request.value("x-forwarded-port"), Some(gateway.web().port().to_string().as_str()));
    assert_eq!((request.value("forwarded"), request.value("via")), (None, None));
}

const SPOOF: &str = "X-Forwarded-For: 9.9.9.9, 6.6.6.6\r\nX-Forwarded-Proto: https\r\nX-Forwarded-Host: bank\r\n\
                     X-Forwarded-Port: 443\r\nForwarded: for=9.9.9.9;proto=https\r\n";

#[test]
fn a_stranger_cannot_pretend_to_be_a_proxy() {
    let origin = Origin::named("origin");
    let gateway = Setup::before(&origin).start();
    gateway.client().ask("GET", "/", SPOOF, "");
    let request = origin.request();
    assert_eq!(request.values("x-forwarded-for"), ["127.0.0.1"]);
    assert_eq!(request.values("x-forwarded-proto"), ["http"]);
    assert_eq!(request.values("x-forwarded-host"), ["test"]);
    assert_eq!(request.values("x-forwarded-port"), [gateway.web().port().to_string()]);
    assert!(request.values("forwarded").iter().all(|value| !value.contains("9.9.9.9")));
    assert_eq!(gateway.log_line().text("client"), "127.0.0.1");
}

#[test]
fn a_trusted_proxy_is_believed_up_to_the_first_address_that_nobody_vouches_for() {
    let origin = Origin::named("origin");
    let gateway = Setup::before(&origin).more("trusted_proxies: [ 127.0.0.0/8, 10.0.0.0/8 ]").start();
    let mut client = gateway.client();
    client.ask("GET", "/", SPOOF, "");
    client.ask("GET", "/", "X-Forwarded-For: 9.9.9.9, 6.6.6.6, 10.0.0.1\r\n", "");
    client.ask("GET", "/", "X-Forwarded-For: 9.9.9.9\r\nX-Forwarded-For: 7.7.7.7\r\n", "");

    let chains: Vec<String> = origin.requests().iter().map(|r| r.values("x-forwarded-for").join(", ")).collect();
    let expected =
        ["9.9.9.9, 6.6.6.6, 127.0.0.1", "9.9.9.9, 6.6.6.6, 10.0.0.1, 127.0.0.1", "9.9.9.9, 7.7.7.7, 127.0.0.1"];
    assert_eq!(chains, expected);
    assert_eq!(origin.requests()[0].values("x-forwarded-proto"), ["https"]);
    assert_eq!(origin.requests()[0].values("x-forwarded-host"), ["bank"]);
    let clients: Vec<String> = gateway.log_lines(3).iter().map(|line| line.text("client").to_owned()).collect();
    assert_eq!(clients, ["6.6.6.6", "6.6.6.6", "7.7.7.7"]);
}

#[test]
fn nonsense_from_a_trusted_proxy_is_not_taken_for_an_address() {
    let origin = Origin::named("origin");
    let gateway = Setup::before(&origin).more("trusted_proxies: [ 127.0.0.0/8 ]").start();
    gateway.client().ask("GET", "/", "X-Forwarded-For: unknown, \"quoted\"\r\n", "");
    assert_eq!(gateway.log_line().text("client"), "127.0.0.1");
}

#[test]
fn who_asks_can_be_told_as_rfc_7239_says() {
    let origin = Origin::named("origin");
    let gateway = Setup::before(&origin).more("forwarded: rfc7239").start();
    gateway.client().ask("GET", "/", "X-Forwarded-For: 9.9.9.9\r\n", "");
    let request = origin.request();
    let value = request.value("forwarded").expect("a Forwarded field").to_ascii_lowercase();
    let value = value.replace("\"test\"", "test");
    let mut pairs: Vec<&str> = value.split(';').collect();
    pairs.sort_unstable();
    assert_eq!(pairs, ["for=127.0.0.1", "host=test", "proto=http"]);
    assert_eq!(request.value("x-forwarded-for"), None, "a stranger's word was passed on");
}

#[test]
fn who_asks_can_be_told_both_ways() {
    let origin = Origin::named("origin");
    let gateway = Setup::before(&origin).more("forwarded: both\ntrusted_proxies: [ 127.0.0.0/8 ]").start();
    gateway.client().ask("GET", "/", "Forwarded: for=\"[2001:db8::1]:4711\";proto=https\r\n", "");
    let request = origin.request();
    let value = request.values("forwarded").join(", ").to_ascii_lowercase();
    assert!(value.starts_with("for=\"[2001:db8::1]:4711\";proto=https, "), "{value}");
    assert!(value.contains("for=127.0.0.1"), "{value}");
    assert!(request.value("x-forwarded-for").expect("a chain").ends_with("127.0.0.1"));
    assert_eq!(gateway.log_line().text("client"), "2001:db8::1");
}

#[test]
fn via_is_said_both_ways_if_wished() {
    let origin = Origin::answering(|_| response("200 OK", "Via: 1.0 inner\r\n", ""));
    let gateway = Setup::before(&origin).more("via: true").start();
    let answer = gateway.client().ask("GET", "/", "Via: 1.1 outer\r\n", "");
    assert_eq!(origin.request().values("via").join(", "), "1.1 outer, 1.1 forebay");
    assert_eq!(answer.values("via").join(", "), "1.0 inner, 1.1 forebay");
}

#[test]
fn a_client_that_asks_before_it_uploads_is_told_to_go_on_once() {
    let origin = Origin::scripted();
    let gateway = Setup::before(&origin).start();
    let mut client = gateway.client();
    let server = thread::spawn(move || {
        let mut connection = origin.accept();
        if connection.header().value("expect").is_some() {
            connection.send("HTTP/1.1 100 Continue\r\n\r\n");
        }
        let body = connection.bytes(4);
        connection.answer(&body);
    });

    client.send("POST / HTTP/1.1\r\nHost: test\r\nContent-Length: 4\r\nExpect: 100-continue\r\n\r\n");
    assert_eq!(client.response().status, 100);
    client.send("body");
    let answer = client.response();
    assert_eq!((answer.status, answer.text()), (200, "body"));
    server.join().expect("the origin");
}

#[test]
fn a_client_that_asks_before_it_uploads_may_be_turned_away_at_once() {
    let (_nginx, gateway) = before_nginx();
    let mut client = gateway.client();
    client.send("TRACE / HTTP/1.1\r\nHost: test\r\nContent-Length: 4\r\nExpect: 100-continue\r\n\r\n");
    assert_eq!(client.response().status, 405);
}

#[test]
fn many_exchanges_of_one_http_2_connection_run_at_once() {
    let origin = Origin::scripted();
    let gateway = Setup::before(&origin).listener("protocols: [h2c]").start();
    let client = H2Client::connect(gateway.web());
    let answers: Vec<_> = thread::scope(|scope| {
        let asked: Vec<_> = ["/0", "/1", "/2"].map(|path| scope.spawn(|| client.get(path))).into_iter().collect();
        let mut connections: Vec<_> = (0..3).map(|_| origin.accept()).collect();
        let requests: Vec<_> = connections.iter_mut().map(|connection| connection.request()).collect();
        for (connection, request) in connections.iter_mut().zip(&requests).rev() {
            connection.answer(request.target());
        }
        asked.into_iter().map(|asked| asked.join().expect("a client").body).collect()
    });
    assert_eq!(answers, [b"/0", b"/1", b"/2"]);
}

#[test]
fn an_early_answer_reaches_a_client_that_is_still_sending() {
    let origin = Origin::scripted();
    let gateway = Setup::before(&origin).route("buffering: { request: { mode: stream } }").start();
    let mut client = gateway.client();
    client.send("POST / HTTP/1.1\r\nHost: test\r\nContent-Length: 1000\r\n\r\nhalf");
    let mut connection = origin.accept();
    connection.header();
    connection.send(response("413 Content Too Large", "Connection: close\r\n", "too much"));
    let answer = client.response();
    assert_eq!((answer.status, answer.text()), (413, "too much"));
}

#[test]
fn a_client_that_has_its_early_answer_whole_may_leave_without_sending_the_rest() {
    let origin = Origin::scripted();
    let setup = Setup::before(&origin).listener("protocols: [http1, h2c]");
    let gateway = setup.route("buffering: { request: { mode: stream } }").start();
    let served = |number| {
        let line = gateway.log_lines(number).pop().expect("a line");
        assert_eq!((line.status(), line.reason(), line.number("sent")), (200, "", 8.0));
        gateway.wait_at_rest();
    };
    let answer = || {
        let mut connection = origin.accept();
        connection.header();
        connection.send(ok("in short"));
        connection
    };
    for (number, resets) in [(1, false), (2, true)] {
        let mut client = gateway.client();
        client.send("POST / HTTP/1.1\r\nHost: test\r\nContent-Length: 1000\r\n\r\nhalf");
        let _connection = answer();
        assert_eq!(client.response().text(), "in short");
        if resets {
            client.reset()
        } else {
            drop(client)
        }
        served(number);
    }
    let client = H2Client::connect(gateway.web());
    let post = http::Request::post("http://test/").body(()).expect("a request");
    let (response, mut body) = client.begin(post, false);
    body.send_data(Bytes::from_static(b"half"), false).expect("a stream");
    let _connection = answer();
    let mut came = client.step(response).expect("an answer").into_body();
    assert_eq!(client.step(came.data()).expect("a piece").expect("whole"), "in short");
    assert!(client.step(came.data()).is_none());
    body.send_reset(h2::Reason::NO_ERROR);
    served(3);
}

#[test]
fn an_interim_answer_is_not_taken_for_the_answer() {
    let origin = Origin::answering(|_| {
        [b"HTTP/1.1 103 Early Hints\r\nLink: </style.css>; rel=preload\r\n\r\n".to_vec(), ok("final")].concat()
    });
    let gateway = Setup::before(&origin).start();
    let mut client = gateway.client();
    client.send(request("GET", "/", "", ""));
    let mut answer = client.response();
    if answer.status == 103 {
        answer = client.response();
    }
    assert_eq!((answer.status, answer.text()), (200, "final"));
    assert_eq!(gateway.log_line().status(), 200);
}

#[test]
fn an_upload_that_takes_longer_than_any_header_may_is_not_cut() {
    let origin = Origin::answering(|request| ok(&request.body));
    let gateway = Setup::before(&origin).listener("timeouts: { header: 200ms, idle: 200ms }").start();
    let mut client = gateway.client();
    client.send("POST / HTTP/1.1\r\nHost: test\r\nContent-Length: 12\r\n\r\n");
    assert!(client.drip("twelve bytes", ms(50)), "the gateway spoke before the upload was over");
    assert_eq!(client.response().text(), "twelve bytes");
}

#[test]
fn a_body_sent_over_http_2_may_come_without_a_length() {
    let origin = Origin::answering(|request| ok(&request.body));
    let gateway = Setup::before(&origin).listener("protocols: [h2c]").start();
    let post = http::Request::post("http://test/").body(()).expect("a request");
    let answer = H2Client::connect(gateway.web()).ask(post, b"no length").expect("an answer");
    assert_eq!(Bytes::from(answer.body), "no length");
    // It is complete before the origin is chosen, so its length is known.
    assert_eq!(origin.request().value("content-length"), Some("9"));
}
