//! Trailers: between all versions that support them, without forbidden fields, and announced as received.

use crate::harness::gateway::Watched;
use crate::harness::wire::Request;
use crate::harness::{Ask, End, Gateway, H2Client, H2Origin, Origin, Protocol, Setup, ok};

fn before(origin: &H2Origin) -> Setup {
    Setup::before_all(&[origin.address()]).upstream("protocol: h2c").listener("protocols: [http1, h2c]")
}

#[test]
fn they_pass_without_what_must_not_be_in_them_and_are_announced_so() {
    let origin = H2Origin::start();
    let gateway = before(&origin).start();
    for protocol in Protocol::BOTH {
        let answer = Ask::get("/announced").over(protocol, gateway.web());
        assert_eq!((answer.text(), answer.end), ("body", End::Complete));
        assert_eq!(answer.trailers, ["x-trailer: the end"], "{protocol:?}");
        assert_eq!(answer.value("trailer"), Some("X-Trailer"), "{protocol:?}");
    }
}

#[test]
fn over_http_1_they_need_a_chunked_body() {
    let origin = H2Origin::start();
    let gateway = before(&origin).start();
    let with_length = Ask::get("/announced-with-length").over(Protocol::Http2, gateway.web());
    assert_eq!(
        (with_length.value("trailer"), &with_length.trailers[..]),
        (Some("X-Trailer"), &["x-trailer: the end".to_owned()][..])
    );
    let mut client = gateway.client();
    for (path, version) in [("/announced-with-length", "1.1"), ("/announced", "1.0"), ("/announced-with-length", "1.0")]
    {
        let mut old = gateway.client();
        let asked = if version == "1.0" { &mut old } else { &mut client };
        asked.send(format!("GET {path} HTTP/{version}\r\nHost: test\r\n\r\n"));
        let answer = asked.response();
        assert_eq!((answer.text(), answer.value("trailer")), ("body", None), "{path} {version}");
    }
    let head = client.ask("HEAD", "/announced", "", "");
    assert_eq!((head.status, head.value("trailer")), (200, None), "there is no body for them to follow");
    assert_eq!(client.get("/announced").status, 200, "and the connection is where it should be");
}

/// An HTTP/1 request with the body `body` and these trailers.
fn post(trailers: &str) -> String {
    let fields = "Host: test\r\nTransfer-Encoding: chunked\r\nTrailer: X-Sum, Host\r\n";
    format!("POST /request-trailers HTTP/1.1\r\n{fields}\r\n4\r\nbody\r\n0\r\n{trailers}\r\n")
}

/// Fields that are allowed in trailers, and some that are not.
const FIELDS: [(&str, &str); 4] = [("x-sum", "1"), ("authorization", "no"), ("x-time", "2"), ("content-length", "3")];

/// The endpoint's report on the trailers from an HTTP/1 or HTTP/2 client.
fn told(gateway: &Gateway, protocol: Protocol) -> String {
    if protocol == Protocol::Http1 {
        let mut client = gateway.client();
        client.send(post(&FIELDS.map(|(name, value)| format!("{name}: {value}\r\n")).concat()));
        let told = client.response().text().to_owned();
        // No byte of the first request is left.
        assert_eq!(client.ask("POST", "/request-trailers", "", "").text(), "announced none; ");
        return told;
    }
    let client = H2Client::connect(gateway.web());
    let post = http::Request::post("http://test/request-trailers").header("trailer", "X-Sum, Host");
    let (answer, mut body) = client.begin(post.body(()).expect("a request"), false);
    body.send_data("body".into(), false).expect("a stream");
    let fields = FIELDS.map(|(name, value)| (name.parse().expect("a name"), value.parse().expect("a value")));
    body.send_trailers(http::HeaderMap::from_iter(fields)).expect("a stream");
    client.step(async move {
        let mut body = answer.await.expect("an answer").into_body();
        let piece = body.data().await.expect("a body").expect("a piece");
        String::from_utf8(piece.to_vec()).expect("text")
    })
}

#[test]
fn those_of_a_request_reach_an_endpoint_of_http_2() {
    let origin = H2Origin::start();
    for mode in ["full", "auto", "stream"] {
        let gateway = before(&origin).route(&format!("buffering: {{ request: {{ mode: {mode} }} }}")).start();
        for protocol in Protocol::BOTH {
            assert_eq!(told(&gateway, protocol), "announced X-Sum; x-sum: 1, x-time: 2", "{mode} {protocol:?}");
        }
    }
}

/// The report of an HTTP/1 endpoint on a request.
fn tells(request: &Request) -> Vec<u8> {
    let mut trailers = request.trailers.clone();
    trailers.sort();
    ok(format!("announced {}; {}", request.value("trailer").unwrap_or("none"), trailers.join(", ")))
}

#[test]
fn those_of_a_request_reach_an_endpoint_of_http_1() {
    let origin = Origin::answering(tells);
    for mode in ["full", "auto", "stream"] {
        let route = format!("buffering: {{ request: {{ mode: {mode} }} }}");
        let gateway = Setup::before(&origin).listener("protocols: [http1, h2c]").route(&route).start();
        for protocol in Protocol::BOTH {
            assert_eq!(told(&gateway, protocol), "announced X-Sum; x-sum: 1, x-time: 2", "{mode} {protocol:?}");
        }
        // A buffered body without trailers is sent with its length.
        let mut client = gateway.client();
        client.send(post(""));
        let announced = if mode == "stream" { "X-Sum" } else { "none" };
        assert_eq!(client.response().text(), format!("announced {announced}; "), "{mode}");
    }
    let bodies: Vec<_> = origin.requests().iter().map(|request| (request.body.clone(), request.end)).collect();
    assert_eq!(bodies.iter().filter(|body| **body == (b"body".to_vec(), End::Complete)).count(), 9);
}

#[test]
fn a_request_without_a_body_may_have_trailers() {
    let origin = Origin::answering(tells);
    for mode in ["full", "stream"] {
        let gateway = Setup::before(&origin).route(&format!("buffering: {{ request: {{ mode: {mode} }} }}")).start();
        let mut client = gateway.client();
        for _ in 0..2 {
            client.send("POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nX-Sum: 1\r\n\r\n");
            assert_eq!(client.response().text(), "announced none; x-sum: 1", "{mode}");
        }
    }
}

#[test]
fn a_request_that_is_sent_again_has_its_trailers_again() {
    let origin = Origin::scripted();
    let retry = "retry: { attempts: 2, on: [reset], non_idempotent: true, same_endpoint: true }";
    let gateway = Setup::before(&origin).route(retry).start();
    let mut client = gateway.client();
    client.send(post("X-Sum: 1\r\n"));
    for attempt in 1..=2 {
        let mut connection = origin.accept();
        let request = connection.request();
        assert_eq!((request.trailers, request.body), (vec!["x-sum: 1".to_owned()], b"body".to_vec()), "{attempt}");
        if attempt == 2 {
            connection.answer("done");
        }
    }
    assert_eq!(client.response().text(), "done");
}

#[test]
fn those_of_an_endpoint_of_http_1_reach_clients_of_both_versions() {
    let fields = "Transfer-Encoding: chunked\r\nTrailer: X-Sum, Content-Length\r\nTrailer: Set-Cookie\r\n";
    let trailers = "X-Sum: 1\r\nSet-Cookie: a=b\r\nX-Time: 2\r\n";
    let origin = Origin::answering(move |request| match request.target() {
        "/with-length" => b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\nTrailer: X-Sum\r\n\r\nbody".to_vec(),
        "/empty" => format!("HTTP/1.1 200 OK\r\n{fields}\r\n0\r\n{trailers}\r\n").into_bytes(),
        _ => format!("HTTP/1.1 200 OK\r\n{fields}\r\n4\r\nbody\r\n0\r\n{trailers}\r\n").into_bytes(),
    });
    for mode in ["full", "auto", "stream"] {
        let route = format!("buffering: {{ response: {{ mode: {mode} }} }}");
        let gateway = Setup::before(&origin).listener("protocols: [http1, h2c]").route(&route).start();
        for protocol in Protocol::BOTH {
            for (path, body) in [("/", "body"), ("/empty", "")] {
                let answer = Ask::get(path).over(protocol, gateway.web());
                assert_eq!((answer.text(), answer.end), (body, End::Complete), "{mode} {protocol:?}");
                assert_eq!(answer.trailers, ["x-sum: 1", "x-time: 2"], "{mode} {protocol:?}");
                assert_eq!(answer.value("trailer"), Some("X-Sum"), "{mode} {protocol:?}");
            }
            let with_length = Ask::get("/with-length").over(protocol, gateway.web());
            assert_eq!((with_length.text(), with_length.value("trailer")), ("body", None));
        }
        let mut client = gateway.client();
        for method in ["GET", "HEAD", "GET"] {
            let answer = client.ask(method, "/", "", "");
            assert_eq!(answer.value("trailer"), Some("X-Sum").filter(|_| method == "GET"), "{mode} {method}");
        }
        let mut old = gateway.client();
        old.send("GET / HTTP/1.0\r\nHost: test\r\n\r\n");
        let answer = old.response();
        assert_eq!((answer.text(), answer.value("trailer")), ("body", None), "{mode}");
        gateway.wait_at_rest();
    }
    assert_eq!(origin.connections(), 3, "each gateway has kept its connection");
}

#[test]
fn they_pass_over_a_connection_that_is_kept_and_do_not_stay_on_it() {
    let origin = Origin::answering(tells);
    let gateway = Setup::before(&origin).route("buffering: { request: { mode: stream } }").start();
    for sum in 0..5 {
        let mut client = gateway.client();
        client.send(post(&format!("X-Sum: {sum}\r\n")));
        assert_eq!(client.response().text(), format!("announced X-Sum; x-sum: {sum}"));
        // A request without trailers follows on the same connection.
        assert_eq!(client.get("/").text(), "announced none; ");
    }
    assert_eq!(origin.connections(), 1);
}

#[test]
fn what_a_filter_alone_may_say_is_not_said_in_trailers() {
    let origin = Origin::answering(tells);
    for mode in ["full", "stream"] {
        let setup = Setup::before(&origin).route(&format!("buffering: {{ request: {{ mode: {mode} }} }}"));
        let users = setup.path("users");
        let hash = "$2b$04$NSVZohxgRPqCbGvPPBsZ2eTV7ov/7NXV8xzCnRBdxJMN.OtQAfoCC";
        std::fs::write(&users, format!("ada:{hash}\n")).expect("a file");
        let gateway = setup.filters(&format!(
            "basic_auth: {{ users: {{ path: \"{}\" }}, user_header: X-User }},
             headers: {{ request: {{ set: {{ X-Edge: '1' }}, remove: [X-Debug] }} }},
             request_id: {{ header: X-Request-Id }},
             {{ headers: {{ request: {{ set: {{ X-Other: '1' }} }} }}, when: 'request.path == \"/other\"' }}",
            users.display()
        ));
        let gateway = gateway.start();
        let mut client = gateway.client();
        client.send(
            "POST / HTTP/1.1\r\nHost: test\r\nAuthorization: Basic YWRhOnNlY3JldA==\r\nTransfer-Encoding: chunked\r\n\r\n\
             4\r\nbody\r\n0\r\nX-User: root\r\nX-Edge: 2\r\nX-Debug: 1\r\nX-Request-Id: mine\r\nX-Other: mine\r\nX-Sum: 1\r\n\r\n",
        );
        assert_eq!(client.response().text(), "announced none; x-other: mine, x-sum: 1", "{mode}");
    }
}
