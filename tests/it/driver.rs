//! The two drivers: which exchanges use Forebay's own, that clients cannot tell the difference, and Forebay's own
//! connection pool.

use std::path::Path;

use crate::harness::client::request;
use crate::harness::gateway::Watched;
use crate::harness::secure::{Authority, Layers, Secure};
use crate::harness::{Client, End, H2Client, H2Origin, Origin, Process, Setup, eventually, ok};

/// Number of exchanges with this driver and reason.
fn driven(driver: &str, reason: &str) -> String {
    format!("forebay_driver_exchanges_total{{driver=\"{driver}\",reason=\"{reason}\"}}")
}

/// Asserts that one exchange used Pingora's driver, with this reason in the metric and the log.
fn is_handed_over(gateway: &impl Watched, reason: &str) {
    gateway.wait_metric(&driven("pingora", reason), |count| count == 1.0);
    assert_eq!(gateway.metric("forebay_driver_exchanges_total"), 1.0);
    assert_eq!(gateway.log_line().text("handed_over"), reason);
}

#[test]
fn a_plain_exchange_goes_by_our_driver_whatever_its_client_speaks() {
    let origin = Origin::named("origin");
    let gateway = Setup::before(&origin).listener("protocols: [http1, h2c]").start();
    assert_eq!(gateway.client().get("/").text(), "origin");
    assert_eq!(gateway.client().ask("POST", "/", "", "body").text(), "origin");
    assert_eq!(H2Client::connect(gateway.web()).get("/").status, 200);
    gateway.wait_metric(&driven("forebay", ""), |count| count == 3.0);
    assert_eq!(gateway.metric("forebay_driver_exchanges_total"), 3.0);
    assert!(gateway.log_lines(3).iter().all(|line| !line.has("handed_over")));
    assert_eq!(origin.connections(), 1, "they share what is kept");
}

#[test]
fn a_wish_for_another_protocol_is_left_to_the_driver_that_grants_it() {
    let origin = Origin::named("origin");
    let gateway = Setup::before(&origin).start();
    let mut client = gateway.client();
    client.send("GET / HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n");
    assert_eq!(client.response().text(), "origin");
    is_handed_over(&gateway, "upgrade");
}

#[test]
fn endpoints_of_http_2_are_asked_by_the_other_driver() {
    let origin = H2Origin::start();
    let gateway = Setup::before_all(&[origin.address()]).upstream("protocol: h2c").start();
    assert_eq!(gateway.client().get("/").status, 200);
    is_handed_over(&gateway, "http2");
}

#[test]
fn endpoints_behind_tls_are_asked_by_the_other_driver() {
    let authority = Authority::new();
    let origin = Secure::start(Layers::tls(&authority.issue(&["127.0.0.1"])));
    let tls = format!("tls: {{ ca: \"{}\" }}", authority.file().display());
    let gateway = Setup::before_all(&[origin.address()]).upstream(&tls).start();
    assert_eq!(gateway.client().get("/").status, 200);
    is_handed_over(&gateway, "tls");
}

#[test]
fn endpoints_that_are_told_of_the_client_are_asked_by_the_other_driver() {
    let origin = Secure::start(Layers::none().introduced());
    let gateway = Setup::before_all(&[origin.address()]).upstream("proxy_protocol: v2").start();
    assert_eq!(gateway.client().get("/").status, 200);
    is_handed_over(&gateway, "proxy_protocol");
}

#[test]
fn workers_that_share_their_tasks_keep_no_connections_of_their_own() {
    let origin = Origin::named("origin");
    let gateway = Setup::before(&origin).server("threads: 2, work_stealing: true").start();
    assert_eq!(gateway.client().get("/").text(), "origin");
    is_handed_over(&gateway, "work_stealing");
}

/// Responses of endpoints: to be passed on, reframed, or refused. Truncated responses are excluded: whether the
/// client gets their beginning or a 502 is a race in either driver.
const ANSWERS: &[&str] = &[
    "HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabc",
    "HTTP/1.1 200 Fine\r\nX-Mixed-Case: 1\r\nx-mixed-case: 2\r\nContent-Length: 0\r\n\r\n",
    "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n2;x=y\r\nde\r\n0\r\n\r\n",
    "HTTP/1.1 200 OK\r\nTrailer: x\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\nX: y\r\n\r\n",
    "HTTP/1.1 200 OK\r\nContent-Length: 9\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
    "HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nto the end",
    "HTTP/1.0 200 OK\r\n\r\nto the end",
    "HTTP/1.0 200 OK\r\nConnection: keep-alive\r\nContent-Length: 3\r\n\r\nabc",
    "HTTP/1.1 200 OK\r\nConnection: X-Own\r\nX-Own: 1\r\nKeep-Alive: timeout=5\r\nContent-Length: 0\r\n\r\n",
    "HTTP/1.1 204 No Content\r\nContent-Length: 0\r\n\r\n",
    "HTTP/1.1 304 Not Modified\r\nContent-Length: 7\r\nETag: x\r\n\r\n",
    "HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabc",
    "HTTP/1.1 302 Found\r\nLocation: /b\r\nSet-Cookie: a=1\r\nSet-Cookie: b=2\r\nContent-Length: 0\r\n\r\n",
    "HTTP/1.1 500 Internal Server Error\r\nContent-Length: 3\r\n\r\nabc",
    "HTTP/1.1 200 OK\r\nContent-Length: 3, 3\r\n\r\nabc",
    "HTTP/1.1 200 OK\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\nabc",
    "HTTP/1.1 200 OK\r\nContent-Length: -3\r\n\r\nabc",
    "HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
    "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: x\r\n\r\n",
    "HTTP/1.1 200 OK\r\nBad Name: 1\r\nContent-Length: 0\r\n\r\n",
    "HTTP/1.1 99 Low\r\nContent-Length: 0\r\n\r\n",
    "SSH-2.0-OpenSSH_9.2\r\n",
    "",
];

/// Requests each of the responses by number; returns what the client gets, without the date.
fn asked(gateway: &Process, method: &str, version: &str) -> Vec<String> {
    let ask = |number: usize| {
        let mut client = Client::connect(gateway.web());
        client.send(format!("{method} /{number} HTTP/{version}\r\nHost: a\r\n\r\n"));
        let Some(answer) = client.try_response_to(method) else { return format!("{number}: nothing") };
        let mut fields: Vec<String> =
            answer.head.fields.iter().map(|(name, value)| format!("{name}: {value}")).collect();
        fields.retain(|field| !field.to_ascii_lowercase().starts_with("date:"));
        let body = String::from_utf8_lossy(&answer.body).into_owned();
        format!("{number}: {} {fields:?} {body:?} {:?}", answer.status, answer.end)
    };
    (0..ANSWERS.len()).map(ask).collect()
}

#[test]
fn a_client_cannot_tell_the_two_drivers_apart() {
    let answer = |connection: crate::harness::origin::Connection| {
        let mut connection = connection;
        let Some(request) = connection.next_request() else { return };
        let number: usize = request.target().trim_start_matches('/').parse().expect("a number");
        connection.try_send(ANSWERS[number]);
    };
    let origin = Origin::playing(answer);
    let setup = Setup::before(&origin);
    let other = Setup::before(&origin);
    let own = setup.spawn();
    let pingora = other.spawn_with(&[("FOREBAY_TEST_DRIVER", Path::new("pingora"))]);
    for (method, version) in [("GET", "1.1"), ("HEAD", "1.1"), ("GET", "1.0")] {
        assert_eq!(asked(&own, method, version), asked(&pingora, method, version), "{method} {version}");
    }
    assert_eq!(own.metric(&driven("pingora", "off")), 0.0);
    assert_eq!(pingora.metric(&driven("forebay", "")), 0.0);
    let reasons = |gateway: &Process| {
        let mut lines: Vec<_> = gateway.log_lines(3 * ANSWERS.len()).iter().map(reason_of).collect();
        lines.sort();
        lines
    };
    assert_eq!(reasons(&own), reasons(&pingora));
}

fn reason_of(line: &crate::harness::LogLine) -> String {
    format!("{} {} {} {}", line.text("target"), line.status(), line.reason(), line.number("sent"))
}

#[test]
fn a_kept_connection_that_its_endpoint_closes_is_closed_without_being_asked_for() {
    let origin = Origin::scripted();
    let gateway = Setup::before(&origin).start();
    let mut client = gateway.client();
    client.send(request("GET", "/", "", ""));
    let mut connection = origin.accept();
    connection.request();
    connection.answer("kept");
    assert_eq!(client.response().text(), "kept");
    gateway.wait_metric("forebay_upstream_connections{upstream=\"app\"}", |open| open == 1.0);
    connection.close();
    gateway.wait_metric("forebay_upstream_connections{upstream=\"app\"}", |open| open == 0.0);
}

#[test]
fn a_connection_with_bytes_behind_its_answer_is_nobodys_next_answer() {
    let origin = Origin::playing(|mut connection| {
        while connection.next_request().is_some() {
            connection.send([ok("abc"), ok("evil")].concat());
        }
    });
    let gateway = Setup::before(&origin).start();
    let mut client = gateway.client();
    for _ in 0..3 {
        let answer = client.get("/");
        assert_eq!((answer.text(), answer.end), ("abc", End::Complete));
    }
    assert_eq!(origin.connections(), 3);
}

#[test]
fn bytes_that_come_while_a_connection_is_kept_are_nobodys_answer() {
    let origin = Origin::scripted();
    let gateway = Setup::before(&origin).start();
    let mut client = gateway.client();
    client.send(request("GET", "/", "", ""));
    let mut first = origin.accept();
    first.request();
    first.answer("first");
    assert_eq!(client.response().text(), "first");
    first.send(ok("evil"));
    // The connection's end shows whether they have arrived.
    gateway.wait_metric("forebay_upstream_connections{upstream=\"app\"}", |open| open == 0.0);
    client.send(request("GET", "/", "", ""));
    let mut second = origin.accept();
    second.request();
    second.answer("second");
    assert_eq!(client.response().text(), "second");
}

#[test]
fn each_worker_keeps_connections_of_its_own_and_together_no_more_than_allowed() {
    let origin = Origin::named("origin");
    let gateway = Setup::before(&origin).server("threads: 2, keepalive_pool: 2").start();
    for _ in 0..40 {
        assert_eq!(gateway.client().get("/").text(), "origin");
    }
    let open = "forebay_upstream_connections{upstream=\"app\"}";
    eventually("no more than two to stay", || (gateway.metric(open) <= 2.0).then_some(()));
    assert!(origin.connections() <= 2, "{}: one for each worker", origin.connections());
}
