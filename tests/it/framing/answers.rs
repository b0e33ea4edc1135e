//! Responses of an endpoint, byte by byte, and what clients of HTTP/1.0, HTTP/1.1 and HTTP/2 read with GET and HEAD:
//! the body, or an error if the response is malformed; then the next response, and nothing in between.

use http::Request;

use crate::harness::client::Client;
use crate::harness::gateway::Watched;
use crate::harness::wire::End;
use crate::harness::{Gateway, H2Client, Origin, Setup, ok};

/// The response that a client reads.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Read {
    /// This body with GET; with HEAD, a header with this length, if any.
    Body(&'static str, Option<u64>),
    /// A header with this status and this length, without a body, for every method.
    NoBody(u16, Option<u64>),
    /// 502 with GET; a header with HEAD, unless the header is malformed.
    BadBody,
    /// 502 for every method.
    Bad,
    /// With GET, 502 or a response that is visibly truncated.
    Half,
}

use Read::{Bad, BadBody, Body, Half, NoBody};

#[rustfmt::skip]
const TABLE: &[(&str, Read)] = &[
    // A length.
    ("HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nbody", Body("body", Some(4))),
    ("HTTP/1.0 200 OK\r\nContent-Length: 4\r\n\r\nbody", Body("body", Some(4))),
    ("HTTP/1.1 200\r\ncontent-length:4\r\n\r\nbody", Body("body", Some(4))),
    ("HTTP/1.1 200 OK\r\nContent-Length: 004\r\n\r\nbody", Body("body", Some(4))),
    ("HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", Body("", Some(0))),
    ("HTTP/1.1 200 OK\r\nContent-Length: 4, 4\r\n\r\nbody", Body("body", Some(4))),
    ("HTTP/1.1 200 OK\r\nContent-Length: 4\r\nContent-Length: 4\r\n\r\nbody", Body("body", Some(4))),
    ("HTTP/1.1 200 OK\r\nContent-Length: 4\r\nContent-Length: 04, 4\r\n\r\nbody", Body("body", Some(4))),
    ("HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nbody and more", Body("body", Some(4))),
    ("HTTP/1.1 200 OK\r\nContent-Length: 4\r\nConnection: close\r\n\r\nbody", Body("body", Some(4))),
    ("HTTP/1.1 200 OK\r\nContent-Length: 4\r\nConnection: content-length\r\n\r\nbody", Body("body", Some(4))),
    // Invalid lengths.
    ("HTTP/1.1 200 OK\r\nContent-Length: 4, 5\r\n\r\nbody!", Bad),
    ("HTTP/1.1 200 OK\r\nContent-Length: 4\r\nContent-Length: 5\r\n\r\nbody!", Bad),
    ("HTTP/1.1 200 OK\r\nContent-Length:\r\n\r\nbody", Bad),
    ("HTTP/1.1 200 OK\r\nContent-Length: 4,\r\n\r\nbody", Bad),
    ("HTTP/1.1 200 OK\r\nContent-Length: +4\r\n\r\nbody", Bad),
    ("HTTP/1.1 200 OK\r\nContent-Length: -4\r\n\r\nbody", Bad),
    ("HTTP/1.1 200 OK\r\nContent-Length: 4 4\r\n\r\nbody", Bad),
    ("HTTP/1.1 200 OK\r\nContent-Length: 0x4\r\n\r\nbody", Bad),
    ("HTTP/1.1 200 OK\r\nContent-Length: four\r\n\r\nbody", Bad),
    ("HTTP/1.1 200 OK\r\nContent-Length: 99999999999999999999\r\n\r\nbody", Bad),
    // Bodies that end with the connection.
    ("HTTP/1.1 200 OK\r\n\r\nbody", Body("body", None)),
    ("HTTP/1.0 200 OK\r\n\r\nbody", Body("body", None)),
    ("HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nbody", Body("body", None)),
    ("HTTP/1.1 200 OK\r\nConnection: keep-alive\r\n\r\nbody", Body("body", None)),
    ("HTTP/1.1 200 OK\r\n\r\n", Body("", None)),
    // Chunks.
    ("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nbody\r\n0\r\n\r\n", Body("body", None)),
    ("HTTP/1.1 200 OK\r\ntransfer-encoding:CHUNKED\r\n\r\n2\r\nbo\r\n2\r\ndy\r\n0\r\n\r\n", Body("body", None)),
    ("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", Body("", None)),
    ("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4;x=\"y\"\r\nbody\r\n0;z\r\nT: 1\r\n\r\n", Body("body", None)),
    ("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nContent-Length: 9\r\n\r\n4\r\nbody\r\n0\r\n\r\n", Body("body", None)),
    ("HTTP/1.1 200 OK\r\nContent-Length: 1, 2\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nbody\r\n0\r\n\r\n", Body("body", None)),
    ("HTTP/1.1 200 OK\r\nTransfer-Encoding: , chunked\r\n\r\n4\r\nbody\r\n0\r\n\r\n", Body("body", None)),
    ("HTTP/1.1 200 OK\r\nTransfer-Encoding: identity\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nbody\r\n0\r\n\r\n", Body("body", None)),
    ("HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nbody\r\n0\r\n\r\n", Body("body", None)),
    ("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nConnection: transfer-encoding\r\n\r\n4\r\nbody\r\n0\r\n\r\n", Body("body", None)),
    ("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nbody\r\n0\r\n\r\nmore", Body("body", None)),
    // Invalid codings: the body ends with the connection.
    ("HTTP/1.1 200 OK\r\nTransfer-Encoding:\r\n\r\nbody", Body("body", None)),
    ("HTTP/1.1 200 OK\r\nTransfer-Encoding: identity\r\n\r\nbody", Body("body", None)),
    ("HTTP/1.1 200 OK\r\nTransfer-Encoding: Identity\r\nContent-Length: 2\r\n\r\nbody", Body("body", None)),
    ("HTTP/1.0 200 OK\r\nTransfer-Encoding: identity\r\n\r\nbody", Body("body", None)),
    // Codings that the client did not request, and ambiguous ones.
    ("HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\n4\r\nbody\r\n0\r\n\r\n", BadBody),
    ("HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n4\r\nbody\r\n0\r\n\r\n", BadBody),
    ("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked, gzip\r\n\r\n4\r\nbody\r\n0\r\n\r\n", BadBody),
    ("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked, chunked\r\n\r\n4\r\nbody\r\n0\r\n\r\n", BadBody),
    ("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nbody\r\n0\r\n\r\n", BadBody),
    ("HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nbody\r\n0\r\n\r\n", BadBody),
    ("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: gzip\r\n\r\n4\r\nbody\r\n0\r\n\r\n", BadBody),
    ("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked,\r\n\r\n4\r\nbody\r\n0\r\n\r\n", BadBody),
    ("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding:\r\n\r\n4\r\nbody\r\n0\r\n\r\n", BadBody),
    ("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked, identity\r\n\r\n4\r\nbody\r\n0\r\n\r\n", BadBody),
    ("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked;q=1\r\n\r\n4\r\nbody\r\n0\r\n\r\n", BadBody),
    ("HTTP/1.1 200 OK\r\nTransfer-Encoding: xchunked\r\n\r\n4\r\nbody\r\n0\r\n\r\n", BadBody),
    ("HTTP/1.1 200 OK\r\nTransfer-Encoding: \"chunked\"\r\n\r\n4\r\nbody\r\n0\r\n\r\n", BadBody),
    ("HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\nContent-Length: 4\r\n\r\nbody", BadBody),
    ("HTTP/1.0 200 OK\r\nTransfer-Encoding: deflate\r\n\r\nbody", BadBody),
    // Responses without a body, whatever their header announces and whatever follows.
    ("HTTP/1.1 204 No Content\r\n\r\n", NoBody(204, None)),
    ("HTTP/1.1 204 No Content\r\nContent-Length: 4\r\n\r\nbody", NoBody(204, None)),
    ("HTTP/1.1 204 No Content\r\nContent-Length: 0\r\n\r\n", NoBody(204, None)),
    ("HTTP/1.1 204 No Content\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nbody\r\n0\r\n\r\n", NoBody(204, None)),
    ("HTTP/1.1 204 No Content\r\nTransfer-Encoding: gzip\r\n\r\nbody", NoBody(204, None)),
    ("HTTP/1.1 304 Not Modified\r\n\r\n", NoBody(304, None)),
    ("HTTP/1.1 304 Not Modified\r\nContent-Length: 4\r\n\r\n", NoBody(304, Some(4))),
    ("HTTP/1.1 304 Not Modified\r\nContent-Length: 4\r\nContent-Length: 4\r\n\r\nbody", NoBody(304, Some(4))),
    ("HTTP/1.1 304 Not Modified\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nbody\r\n0\r\n\r\n", NoBody(304, None)),
    ("HTTP/1.1 204 No Content\r\nContent-Length: 4\r\nContent-Length: 5\r\n\r\n", Bad),
    // Bodies that are not framed as announced.
    ("HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nbody", Half),
    ("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nbody", Half),
    ("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nbody\r\n", Half),
    ("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nbody\r\n0\r\n", Half),
    ("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nbody\r\n0\r\nT: 1\r\n", Half),
    ("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nbody!\r\n0\r\n\r\n", Half),
    ("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nbody0\r\n\r\n", Half),
    ("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n+4\r\nbody\r\n0\r\n\r\n", Half),
    ("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0x4\r\nbody\r\n0\r\n\r\n", Half),
    ("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\nbody\r\n0\r\n\r\n", Half),
    ("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n10000000000000004\r\nbody\r\n0\r\n\r\n", Half),
    ("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4 \r\nbody\r\n0\r\n\r\n", Half),
    ("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4;\r\nbody\r\n0\r\n\r\n", Half),
    ("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4;x y\r\nbody\r\n0\r\n\r\n", Half),
    ("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nbody\r\n;x\r\n\r\n", Half),
    ("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nbody\r\n0\r\nno colon\r\n\r\n", Half),
    ("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0000000000000004\r\nbody\r\n0\r\n\r\n", Half),
    // Headers that are not HTTP/1.
    ("HTTP/2.0 200 OK\r\nContent-Length: 4\r\n\r\nbody", Bad),
    ("HTTP/1.1 20 OK\r\nContent-Length: 4\r\n\r\nbody", Bad),
    ("HTTP/1.1 200 OK\r\nA: \0\r\n\r\nbody", Bad),
    ("HTTP/1.1 200 OK\r\n:status: 204\r\nContent-Length: 4\r\n\r\nbody", Bad),
    ("", Bad),
];

/// An origin whose connections end with their response: paths from `/0` on are the rows of the table, and others are
/// `next`.
fn origin() -> Origin {
    Origin::answering_once(|request| {
        let row = request.target()[1..].parse().ok().and_then(|row: usize| TABLE.get(row));
        row.map_or_else(|| ok("next"), |(answer, _)| answer.as_bytes().to_vec())
    })
}

fn gateway(origin: &Origin, mode: &str) -> Gateway {
    let route = format!("buffering: {{ response: {{ mode: {mode} }} }}");
    Setup::before(origin).listener("protocols: [http1, h2c]").route(&route).start()
}

/// A client's result: status, announced lengths, body, and whether it was complete.
#[derive(Debug)]
struct Seen {
    status: u16,
    lengths: Vec<u64>,
    body: String,
    end: End,
}

/// The expected result of a row with this method.
fn judge(read: Read, head: bool, seen: &Seen, case: &str) {
    let lengths: Vec<Option<u64>> = seen.lengths.iter().map(|length| Some(*length)).collect();
    let says = |length: Option<u64>| lengths == length.map_or(Vec::new(), |length| vec![Some(length)]);
    match (read, head) {
        (Body(_, length), true) => {
            assert_eq!((seen.status, &*seen.body), (200, ""), "{case}: {seen:?}");
            assert!(says(length), "{case}: {seen:?}");
        }
        (Body(body, length), false) => {
            assert_eq!((seen.status, &*seen.body, seen.end), (200, body, End::Complete), "{case}: {seen:?}");
            // An empty response of unknown length may be announced as empty.
            assert!(says(length) || (body.is_empty() && says(Some(0))), "{case}: {seen:?}");
        }
        (NoBody(status, length), _) => {
            assert_eq!((seen.status, &*seen.body, seen.end), (status, "", End::Complete), "{case}: {seen:?}");
            assert!(says(length), "{case}: {seen:?}");
        }
        (BadBody, true) => {
            assert_eq!((seen.status, &*seen.body), (200, ""), "{case}: {seen:?}");
            assert!(says(None), "{case}: {seen:?}");
        }
        (Half, true) => assert_eq!((seen.status, &*seen.body), (200, ""), "{case}: {seen:?}"),
        (Half, false) => assert!(seen.status == 502 || seen.end == End::Cut, "{case}: {seen:?}"),
        (Bad | BadBody, _) => assert_eq!(seen.status, 502, "{case}: {seen:?}"),
    }
}

/// Reads over HTTP/1. If the connection stays open, requests another response on it.
fn by_http1(gateway: &Gateway, row: usize, method: &str, version: &str) -> Seen {
    let mut client: Client = gateway.client();
    client.send(format!("{method} /{row} HTTP/{version}\r\nHost: a\r\nConnection: keep-alive\r\n\r\n"));
    let answer = client.response_to(method);
    assert_eq!(answer.first_line.split(' ').next(), Some("HTTP/1.1"), "our version, and not the endpoint's");
    let codings = answer.values("transfer-encoding");
    assert!(codings.is_empty() || (version == "1.1" && codings == ["chunked"]), "{codings:?} for HTTP/{version}");
    if answer.end == End::Complete && answer.value("connection") == Some("keep-alive") {
        client.send("GET /next HTTP/1.1\r\nHost: a\r\n\r\n");
        assert_eq!(client.response().text(), "next", "{method} row {row} by HTTP/{version}");
    } else {
        assert_eq!(client.rest(), b"", "{method} row {row} by HTTP/{version}");
    }
    let lengths = answer.values("content-length").iter().map(|length| length.parse().expect("a length")).collect();
    Seen { status: answer.status, lengths, body: answer.text().to_owned(), end: answer.end }
}

fn by_http2(client: &H2Client, row: usize, method: &str) -> Seen {
    let request = Request::builder().method(method).uri(format!("http://a/{row}")).body(()).expect("a request");
    let Ok(answer) = client.ask(request, b"") else {
        return Seen { status: 0, lengths: Vec::new(), body: String::new(), end: End::Cut };
    };
    assert!(!answer.headers.contains_key("transfer-encoding") && !answer.headers.contains_key("connection"));
    let lengths = answer.headers.get_all("content-length").iter();
    let lengths = lengths.map(|length| length.to_str().expect("text").parse().expect("a length")).collect();
    Seen { status: answer.status, lengths, body: String::from_utf8(answer.body).expect("text"), end: answer.end }
}

#[test]
fn each_answer_reaches_each_client_as_it_was_meant_or_not_at_all() {
    assert!(TABLE.len() >= 60, "{} answers", TABLE.len());
    for mode in ["auto", "full"] {
        let origin = origin();
        let gateway = gateway(&origin, mode);
        let http2 = H2Client::connect(gateway.web());
        for (row, (answer, read)) in TABLE.iter().enumerate() {
            for method in ["GET", "HEAD"] {
                for version in ["1.0", "1.1"] {
                    let case = format!("{method} {answer:?} by HTTP/{version}, {mode}");
                    judge(*read, method == "HEAD", &by_http1(&gateway, row, method, version), &case);
                }
                let case = format!("{method} {answer:?} by HTTP/2, {mode}");
                judge(*read, method == "HEAD", &by_http2(&http2, row, method), &case);
            }
        }
        assert_eq!(http2.get("/next").body, b"next", "the connection has lived through all of it");
        gateway.wait_at_rest();
    }
}

#[test]
fn interim_answers_have_no_body_and_are_not_for_http_1_0() {
    for interim in [
        "HTTP/1.1 100 Continue\r\n\r\n",
        "HTTP/1.1 103 Early Hints\r\nLink: </a>\r\nContent-Length: 4\r\n\r\n",
        "HTTP/1.1 102 Processing\r\nTransfer-Encoding: chunked\r\n\r\n",
        "HTTP/1.0 199 Odd\r\n\r\n",
    ] {
        let answer = format!("{interim}HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nbody");
        let origin = Origin::answering_once(move |_| answer.clone().into_bytes());
        let gateway = gateway(&origin, "auto");
        let mut old = gateway.client();
        old.send("GET / HTTP/1.0\r\nHost: a\r\n\r\n");
        assert_eq!(old.response().text(), "body", "{interim:?}");
        old.closed();
        let mut new = gateway.client();
        new.send("GET / HTTP/1.1\r\nHost: a\r\n\r\n");
        let first = new.response();
        assert!((100..200).contains(&first.status), "{interim:?}: {}", first.status);
        assert!(first.values("content-length").is_empty() && first.values("transfer-encoding").is_empty());
        assert_eq!(new.response().text(), "body", "{interim:?}");
        let http2 = H2Client::connect(gateway.web());
        assert_eq!(http2.get("/").body, b"body", "{interim:?}");
    }
}

#[test]
fn a_client_of_http_1_0_that_expects_is_not_told_to_go_on() {
    for mode in ["full", "stream"] {
        let origin = Origin::answering(|request| {
            assert_eq!(request.value("expect"), None, "HTTP/1.0 knows no expectations");
            ok(&request.body)
        });
        let gateway = Setup::before(&origin).route(&format!("buffering: {{ request: {{ mode: {mode} }} }}")).start();
        let mut client = gateway.client();
        client.send("POST / HTTP/1.0\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 4\r\n\r\n");
        gateway.wait_metric("forebay_phase_active", |count| count >= 1.0);
        assert!(client.is_silent());
        client.send("body");
        assert_eq!(client.response().text(), "body");
    }
}
