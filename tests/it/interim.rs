//! Interim responses (1xx): any number of them is forwarded, in order and immediately, to clients that support
//! them.

use bytes::Bytes;
use http::Request;

use crate::harness::client::{H2Client, request};
use crate::harness::gateway::Watched;
use crate::harness::origin::Connection;
use crate::harness::{H2Origin, Origin, Setup, ok};

const HINTS: &str = "HTTP/1.1 103 Early Hints\r\nLink: </a.css>\r\nLink: </b.css>\r\n\r\n";
const MORE_HINTS: &str = "HTTP/1.1 103 Early Hints\r\nLink: </c.css>\r\nConnection: x-own, close\r\nX-Own: 1\r\n\
    Keep-Alive: timeout=5\r\nTransfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\n";

fn before(origin: &Origin) -> Setup {
    Setup::before(origin).listener("protocols: [http1, h2c]")
}

fn asked(origin: &Origin) -> Connection {
    let mut connection = origin.accept();
    connection.request();
    connection
}

fn get(path: &str) -> Request<()> {
    Request::get(format!("http://test{path}")).body(()).expect("a request")
}

#[test]
fn each_passes_over_http_1_before_the_next_is_said() {
    let origin = Origin::scripted();
    let gateway = before(&origin).start();
    let mut client = gateway.client();
    client.send(request("GET", "/", "", ""));
    let mut connection = asked(&origin);
    connection.send(HINTS);
    let hints = client.response();
    assert_eq!((hints.status, hints.values("link")), (103, vec!["</a.css>", "</b.css>"]));
    connection.send("HTTP/1.1 102 Processing\r\n\r\n");
    assert_eq!(client.response().status, 102);
    connection.send(MORE_HINTS);
    let more = client.response();
    assert_eq!((more.status, more.value("link")), (103, Some("</c.css>")));
    for name in ["connection", "x-own", "keep-alive", "transfer-encoding", "content-length"] {
        assert_eq!(more.value(name), None, "{name} is about a connection or a body");
    }
    connection.send(ok("final"));
    assert_eq!(client.response().text(), "final");
    assert_eq!(gateway.log_line().status(), 200);
}

#[test]
fn each_passes_over_http_2_before_the_next_is_said() {
    let origin = Origin::scripted();
    let gateway = before(&origin).start();
    let client = H2Client::connect(gateway.web());
    let (mut answer, _) = client.begin(get("/"), true);
    let mut connection = asked(&origin);
    connection.send(HINTS);
    let hints = client.interim(&mut answer).expect("an interim answer");
    let links: Vec<_> = hints.headers().get_all("link").iter().map(|link| link.as_bytes()).collect();
    assert_eq!((hints.status().as_u16(), links), (103, vec![&b"</a.css>"[..], b"</b.css>"]));
    connection.send("HTTP/1.1 102 Processing\r\n\r\n");
    assert_eq!(client.interim(&mut answer).expect("an interim answer").status(), 102);
    connection.send(MORE_HINTS);
    let more = client.interim(&mut answer).expect("an interim answer");
    assert_eq!((more.status().as_u16(), more.headers().len()), (103, 1), "{more:?}");
    connection.send(ok("final"));
    assert!(client.interim(&mut answer).is_none());
    let head = client.step(answer).expect("an answer");
    assert_eq!((head.status().as_u16(), &head.headers()["content-length"]), (200, &"5".parse().expect("a value")));
}

#[test]
fn a_client_of_http_1_0_gets_none() {
    let origin = Origin::answering(|_| [HINTS.as_bytes(), &ok("final")].concat());
    let gateway = before(&origin).start();
    let mut client = gateway.client();
    client.send("POST / HTTP/1.0\r\nHost: test\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\nok");
    let answer = client.response();
    assert_eq!((answer.status, answer.text()), (200, "final"));
    assert_eq!(origin.request().value("expect"), None, "it does not mean it");
}

#[test]
fn what_was_hinted_before_an_attempt_failed_is_no_answer() {
    let origin = Origin::scripted();
    let retry = "retry: { attempts: 2, on: [reset], same_endpoint: true }";
    let gateway = before(&origin).route(retry).start();
    let client = H2Client::connect(gateway.web());
    let (mut answer, _) = client.begin(get("/"), true);
    let mut connection = asked(&origin);
    connection.send(HINTS);
    assert_eq!(client.interim(&mut answer).expect("an interim answer").status(), 103);
    drop(connection);
    asked(&origin).send(ok("from the second attempt"));
    assert!(client.interim(&mut answer).is_none());
    assert_eq!(client.step(answer).expect("an answer").status(), 200);
}

#[test]
fn an_endpoint_that_hints_for_ever_is_given_up() {
    let origin = Origin::answering(|_| HINTS.repeat(1_100).into_bytes());
    let gateway = before(&origin).start();
    let client = H2Client::connect(gateway.web());
    let (mut answer, _) = client.begin(get("/"), true);
    let mut hints = 0;
    while client.interim(&mut answer).is_some() {
        hints += 1;
    }
    assert!((900..=1_000).contains(&hints), "{hints}");
    assert_eq!(client.step(answer).expect("an answer").status(), 502);
    assert_eq!(gateway.log_line().reason(), "wait.malformed");
}

#[test]
fn a_client_of_http_2_that_waits_is_told_to_go_on() {
    for (route, upstream) in
        [("buffering: { request: { mode: full } }", ""), ("buffering: { request: { mode: stream } }", "protocol: h2c")]
    {
        let (origin, h2_origin) = (Origin::named("origin"), H2Origin::start());
        let address = if upstream.is_empty() { origin.address() } else { h2_origin.address() };
        let gateway =
            Setup::before_all(&[address]).upstream(upstream).route(route).listener("protocols: [h2c]").start();
        let client = H2Client::connect(gateway.web());
        let waiting = Request::post("http://test/").header("expect", "100-continue").header("content-length", "10");
        let (mut answer, mut body) = client.begin(waiting.body(()).expect("a request"), false);
        assert_eq!(client.interim(&mut answer).expect("an interim answer").status(), 100, "{route}");
        body.send_data(Bytes::from_static(b"ten bytes!"), true).expect("a stream");
        assert!(client.interim(&mut answer).is_none(), "it is told once");
        assert_eq!(client.step(answer).expect("an answer").status(), 200);
        if upstream.is_empty() {
            let got = origin.request();
            assert_eq!((got.value("expect"), &*got.body), (None, &b"ten bytes!"[..]));
        }
    }
}

#[test]
fn what_an_endpoint_says_of_a_streamed_body_reaches_a_client_of_http_2() {
    let origin = Origin::scripted();
    let gateway = before(&origin).route("buffering: { request: { mode: stream } }").start();
    let client = H2Client::connect(gateway.web());
    let waiting = Request::post("http://test/").header("expect", "100-continue").header("content-length", "10");
    let (mut answer, mut body) = client.begin(waiting.body(()).expect("a request"), false);
    let mut connection = origin.accept();
    assert_eq!(connection.header().value("expect"), Some("100-continue"));
    connection.send("HTTP/1.1 100 Continue\r\n\r\n");
    assert_eq!(client.interim(&mut answer).expect("an interim answer").status(), 100);
    body.send_data(Bytes::from_static(b"ten bytes!"), true).expect("a stream");
    connection.send(ok("final"));
    assert_eq!(client.step(answer).expect("an answer").status(), 200);
}

#[test]
fn those_of_an_http_2_endpoint_pass_before_the_request_is_whole() {
    let origin = H2Origin::start();
    let setup = Setup::before_all(&[origin.address()]).upstream("protocol: h2c").listener("protocols: [http1, h2c]");
    let gateway = setup.route("buffering: { request: { mode: stream } }").start();
    let post = request("POST", "/hints", "Content-Length: 2\r\n", "");
    let mut client = gateway.client();
    client.send(post);
    for link in ["</a.css>", "</b.css>"] {
        let hints = client.response();
        assert_eq!((hints.status, hints.value("link")), (103, Some(link)));
    }
    client.send("ok");
    assert_eq!(client.response().status, 200);

    let client = H2Client::connect(gateway.web());
    let post = Request::post("http://test/hints").body(()).expect("a request");
    let (mut answer, mut body) = client.begin(post, false);
    for link in ["</a.css>", "</b.css>"] {
        let hints = client.interim(&mut answer).expect("an interim answer");
        assert_eq!((hints.status().as_u16(), hints.headers()["link"].as_bytes()), (103, link.as_bytes()));
    }
    body.send_data(Bytes::from_static(b"ok"), true).expect("a stream");
    assert!(client.interim(&mut answer).is_none());
    assert_eq!(client.step(answer).expect("an answer").status(), 200);
}

#[test]
fn a_client_that_is_refused_is_not_told_to_go_on() {
    let origin = Origin::named("origin");
    let gateway = before(&origin).route("buffering: { request: { max_body: 9B } }").start();
    let client = H2Client::connect(gateway.web());
    let waiting = Request::post("http://test/").header("expect", "100-continue").header("content-length", "10");
    let (mut answer, _body) = client.begin(waiting.body(()).expect("a request"), false);
    assert!(client.interim(&mut answer).is_none());
    assert_eq!(client.step(answer).expect("an answer").status(), 413);
}

#[test]
fn a_health_check_waits_for_the_answer_behind_it() {
    let origin = Origin::answering(|request| {
        let healthy = request.target() != "/healthz" || request.value("user-agent") == Some("Forebay health check");
        [HINTS.as_bytes(), if healthy { b"HTTP/1.1 204 No Content\r\n\r\n" } else { b"HTTP/1.1 500 No\r\n\r\n" }]
            .concat()
    });
    let check = "health_check: { http: { path: /healthz, statuses: [204] }, interval: 50ms, timeout: 10s }";
    let gateway = before(&origin).upstream(check).start();
    gateway
        .wait_metric("forebay_upstream_health_checks_total{upstream=\"app\",outcome=\"passed\"}", |count| count >= 2.0);
}
