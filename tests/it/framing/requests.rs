//! More than a hundred requests, each on its own connection and directly followed by a second one. The gateway reads
//! accepted requests exactly to their last byte. After a refused request it ends the connection, so that the rest
//! cannot be taken for another request.

use crate::harness::client::Client;
use crate::harness::gateway::Watched;
use crate::harness::{Gateway, H2Origin, Origin, Setup, ms, ok};

/// The result of a request.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Fate {
    /// The endpoint gets this target and this body.
    Passes(&'static str, &'static str),
    /// The gateway refuses the request for this reason, which determines the status (`src/error.rs`).
    Refused(&'static str),
}

use Fate::{Passes, Refused};

/// The endpoint's report on a request, as far as the table covers it.
fn echo(origin: &str) -> Origin {
    let name = origin.to_owned();
    Origin::answering(move |request| {
        let body = String::from_utf8_lossy(&request.body).into_owned();
        ok(format!("{name} {} {} {body}", request.method(), request.target()))
    })
}

const HOST: &str = "Host: a\r\n";

fn post(fields: &str, body: &str) -> String {
    format!("POST /p HTTP/1.1\r\n{HOST}{fields}\r\n{body}")
}

fn get(line: &str, fields: &str) -> String {
    format!("{line}\r\n{fields}\r\n")
}

/// A body in chunks.
fn chunks(body: &str) -> String {
    post("Transfer-Encoding: chunked\r\n", body)
}

#[rustfmt::skip]
fn table() -> Vec<(String, Fate)> {
    let framing = Refused("header.framing");
    let encoding = Refused("header.encoding");
    let malformed = Refused("header.malformed");
    let host = Refused("header.host");
    let unframed = Refused("buffer.malformed");
    vec![
        // The request line: methods, versions, the four forms of a target (RFC 9112 §3).
        (get("GET / HTTP/1.1", HOST), Passes("GET /", "")),
        (get("GET /a/b?c=d&e HTTP/1.1", HOST), Passes("GET /a/b?c=d&e", "")),
        (get("GET /%61%2Fb HTTP/1.1", HOST), Passes("GET /a%2Fb", "")),
        (get("GET //a HTTP/1.1", HOST), Passes("GET /a", "")),
        (get("GET /? HTTP/1.1", HOST), Passes("GET /?", "")),
        (get("GET /?a?b HTTP/1.1", HOST), Passes("GET /?a?b", "")),
        (get("GET /a:b@c HTTP/1.1", HOST), Passes("GET /a:b@c", "")),
        (get("GET /u?to=http://b/ HTTP/1.1", HOST), Passes("GET /u?to=http://b/", "")),
        (get("DELETE /x HTTP/1.1", HOST), Passes("DELETE /x", "")),
        (get("OPTIONS /x HTTP/1.1", HOST), Passes("OPTIONS /x", "")),
        (get("OPTIONS * HTTP/1.1", HOST), Passes("OPTIONS *", "")),
        (get("PROPFIND /x HTTP/1.1", HOST), Passes("PROPFIND /x", "")),
        (get("get /x HTTP/1.1", HOST), Passes("get /x", "")),
        (get("M-SEARCH!#$%&'*+.^_`|~ /x HTTP/1.1", HOST), Passes("M-SEARCH!#$%&'*+.^_`|~ /x", "")),
        (get("GET http://a/x?y HTTP/1.1", HOST), Passes("GET /x?y", "")),
        (get("GET HTTP://A/x HTTP/1.1", HOST), Passes("GET /x", "")),
        (get("GET https://a/x HTTP/1.1", HOST), Passes("GET /x", "")),
        (get("GET http://a HTTP/1.1", HOST), Passes("GET /", "")),
        (get("GET http://a?y HTTP/1.1", HOST), Passes("GET /?y", "")),
        (get("OPTIONS http://a HTTP/1.1", HOST), Passes("OPTIONS *", "")),
        (get("OPTIONS http://a/ HTTP/1.1", HOST), Passes("OPTIONS /", "")),
        (get("GET http://a:80/x HTTP/1.1", "Host: a:80\r\n"), Passes("GET /x", "")),
        (get("GET http://b/x HTTP/1.1", HOST), host),
        (get("GET http://u@a/x HTTP/1.1", HOST), host),
        (get("GET http:///x HTTP/1.1", HOST), host),
        (get("GET http://a:8x/x HTTP/1.1", HOST), host),
        (get("GET ftp://a/x HTTP/1.1", HOST), malformed),
        (get("GET a/x HTTP/1.1", HOST), malformed),
        (get("GET * HTTP/1.1", HOST), malformed),
        (get("GET ?a HTTP/1.1", HOST), malformed),
        (get("GET \\a HTTP/1.1", HOST), malformed),
        (get("GET /a#b HTTP/1.1", HOST), malformed),
        (get("GET http://a/x#y HTTP/1.1", HOST), malformed),
        (get("GET /a b HTTP/1.1", HOST), malformed),
        (get("GET  /a HTTP/1.1", HOST), malformed),
        (get("GET /a  HTTP/1.1", HOST), malformed),
        (get("GET /a\tHTTP/1.1", HOST), malformed),
        (get("GET /a\0 HTTP/1.1", HOST), malformed),
        (get("GET /a\x7f HTTP/1.1", HOST), malformed),
        (get("GET /<a> HTTP/1.1", HOST), malformed),
        (get("GET /a", HOST), malformed),
        (get("GET", HOST), malformed),
        (get("G@T / HTTP/1.1", HOST), malformed),
        (get(" GET / HTTP/1.1", HOST), malformed),
        (get("GET / HTTP/1.1 ", HOST), malformed),
        (get("GET / http/1.1", HOST), malformed),
        (get("GET / HTTP/1", HOST), malformed),
        (get("GET / HTTP/1.10", HOST), malformed),
        (get("GET / HTTP/1.2", HOST), Refused("header.version")),
        (get("GET / HTTP/0.9", HOST), Refused("header.version")),
        (get("GET / HTTP/2.0", HOST), Refused("header.version")),
        (get("GET / HTTP/3.0", HOST), Refused("header.version")),
        (get("CONNECT a:80 HTTP/1.1", "Host: a:80\r\n"), Refused("header.method")),
        (get("TRACE / HTTP/1.1", HOST), Refused("header.method")),
        // Empty lines before the request (RFC 9112 §2.2).
        (format!("\r\n{}", get("GET /x HTTP/1.1", HOST)), Passes("GET /x", "")),
        (format!("\r\n\r\n\r\n{}", get("GET /x HTTP/1.1", HOST)), Passes("GET /x", "")),
        (format!("\n{}", get("GET /x HTTP/1.1", HOST)), malformed),
        (format!("\r{}", get("GET /x HTTP/1.1", HOST)), malformed),
        (format!("\r\r\n{}", get("GET /x HTTP/1.1", HOST)), malformed),
        (format!(" \r\n{}", get("GET /x HTTP/1.1", HOST)), malformed),
        // Fields (RFC 9112 §5).
        (get("GET /x HTTP/1.1", "Host: a\r\nX-Y:\r\n"), Passes("GET /x", "")),
        (get("GET /x HTTP/1.1", "hOST:a\r\n"), Passes("GET /x", "")),
        (get("GET /x HTTP/1.1", "Host: \t a \t\r\n"), Passes("GET /x", "")),
        (get("GET /x HTTP/1.1", "Host: a\r\nA : b\r\n"), malformed),
        (get("GET /x HTTP/1.1", "Host: a\r\n A: b\r\n"), malformed),
        (get("GET /x HTTP/1.1", "Host: a\r\nA: b\r\n\tc\r\n"), malformed),
        (get("GET /x HTTP/1.1", "Host: a\r\nA\r\n"), malformed),
        (get("GET /x HTTP/1.1", "Host: a\r\n: b\r\n"), malformed),
        (get("GET /x HTTP/1.1", "Host: a\r\n:path: /y\r\n"), malformed),
        (get("GET /x HTTP/1.1", "Host: a\r\n:authority: b\r\n"), malformed),
        (get("GET /x HTTP/1.1", "Host: a\r\nA(b): c\r\n"), malformed),
        (get("GET /x HTTP/1.1", "Host: a\r\nA: \0\r\n"), malformed),
        (get("GET /x HTTP/1.1", "Host: a\r\nA: b\rC: d\r\n"), malformed),
        (get("GET /x HTTP/1.1", "Host: a\nA: b\r\n"), malformed),
        ("GET /x HTTP/1.1\nHost: a\n\n".to_owned(), malformed),
        // The host (RFC 9112 §3.2).
        (get("GET /x HTTP/1.1", "Host: a.example:8080\r\n"), Passes("GET /x", "")),
        (get("GET /x HTTP/1.1", "Host: [::1]:80\r\n"), Passes("GET /x", "")),
        (get("GET /x HTTP/1.1", "Host: [fe80::1%25ab]:80\r\n"), host),
        (get("GET /x HTTP/1.1", "Host: [:]\r\n"), host),
        (get("GET /x HTTP/1.1", "Host: a%2eb\r\n"), host),
        (get("GET http://a%2eb/x HTTP/1.0", ""), host),
        (get("GET /x HTTP/1.1", ""), host),
        (get("GET /x HTTP/1.1", "Host:\r\n"), host),
        (get("GET /x HTTP/1.1", "Host: a\r\nHost: a\r\n"), host),
        (get("GET /x HTTP/1.1", "Host: a\r\nhost: b\r\n"), host),
        (get("GET /x HTTP/1.1", "Host: a, b\r\n"), host),
        (get("GET /x HTTP/1.1", "Host: a b\r\n"), host),
        (get("GET /x HTTP/1.1", "Host: a/b\r\n"), host),
        (get("GET /x HTTP/1.1", "Host: u@a\r\n"), host),
        (get("GET /x HTTP/1.1", "Host: a:99999\r\n"), host),
        (get("GET /x HTTP/1.1", "Host: http://a\r\n"), host),
        // Lengths (RFC 9112 §6.2).
        (post("Content-Length: 4\r\n", "body"), Passes("POST /p", "body")),
        (post("Content-Length: 0\r\n", ""), Passes("POST /p", "")),
        (post("", ""), Passes("POST /p", "")),
        (post("content-length: 004\r\n", "body"), Passes("POST /p", "body")),
        (post("Content-Length:\t4 \r\n", "body"), Passes("POST /p", "body")),
        (format!("GET /g HTTP/1.1\r\n{HOST}Content-Length: 4\r\n\r\nbody"), Passes("GET /g", "body")),
        (format!("DELETE /d HTTP/1.1\r\n{HOST}Content-Length: 4\r\n\r\nbody"), Passes("DELETE /d", "body")),
        (post("Content-Length: 4\r\n", "GET "), Passes("POST /p", "GET ")),
        (post("Content-Length: 4\r\nContent-Length: 4\r\n", "body"), framing),
        (post("Content-Length: 4\r\nContent-Length: 0\r\n", "body"), framing),
        (post("Content-Length: 4, 4\r\n", "body"), framing),
        (post("Content-Length: 4,\r\n", "body"), framing),
        (post("Content-Length:\r\n", "body"), framing),
        (post("Content-Length: +4\r\n", "body"), framing),
        (post("Content-Length: -4\r\n", "body"), framing),
        (post("Content-Length: 4.0\r\n", "body"), framing),
        (post("Content-Length: 0x4\r\n", "body"), framing),
        (post("Content-Length: 4 4\r\n", "body"), framing),
        (post("Content-Length: four\r\n", "body"), framing),
        (post("Content-Length: 9223372036854775808\r\n", "body"), framing),
        (post("Content-Length: 99999999999999999999999\r\n", "body"), framing),
        (post("Content_Length: 4\r\n", ""), Passes("POST /p", "")),
        // Codings (RFC 9112 §6.1).
        (post("transfer-encoding: Chunked\r\n", "4\r\nbody\r\n0\r\n\r\n"), Passes("POST /p", "body")),
        (post("Transfer-Encoding:\tchunked \r\n", "4\r\nbody\r\n0\r\n\r\n"), Passes("POST /p", "body")),
        (post("Transfer-Encoding: chunked\r\nContent-Length: 4\r\n", "0\r\n\r\n"), framing),
        (post("Content-Length: 4\r\nTransfer-Encoding: chunked\r\n", "0\r\n\r\n"), framing),
        (post("Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n", "0\r\n\r\n"), framing),
        (post("Transfer-Encoding: gzip\r\nTransfer-Encoding: chunked\r\n", "0\r\n\r\n"), framing),
        (post("Transfer-Encoding: chunked, chunked\r\n", "0\r\n\r\n"), encoding),
        (post("Transfer-Encoding: gzip, chunked\r\n", "0\r\n\r\n"), encoding),
        (post("Transfer-Encoding: chunked, gzip\r\n", "0\r\n\r\n"), encoding),
        (post("Transfer-Encoding: identity\r\n", ""), encoding),
        (post("Transfer-Encoding: identity, chunked\r\n", "0\r\n\r\n"), encoding),
        (post("Transfer-Encoding:\r\n", ""), encoding),
        (post("Transfer-Encoding: ,chunked\r\n", "0\r\n\r\n"), encoding),
        (post("Transfer-Encoding: chunked;q=1\r\n", "0\r\n\r\n"), encoding),
        (post("Transfer-Encoding: \"chunked\"\r\n", "0\r\n\r\n"), encoding),
        (post("Transfer-Encoding: xchunked\r\n", "0\r\n\r\n"), encoding),
        (post("Transfer-Encoding: chunked\x0b\r\n", "0\r\n\r\n"), malformed),
        (post("Transfer-Encoding : chunked\r\n", "0\r\n\r\n"), malformed),
        (post("Transfer-Encoding\r\n", "0\r\n\r\n"), malformed),
        (format!("POST /p HTTP/1.0\r\n{HOST}Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n"), framing),
        // Chunks (RFC 9112 §7.1).
        (chunks("4\r\nbody\r\n0\r\n\r\n"), Passes("POST /p", "body")),
        (chunks("2\r\nbo\r\n02\r\ndy\r\n000\r\n\r\n"), Passes("POST /p", "body")),
        (chunks("0\r\n\r\n"), Passes("POST /p", "")),
        (chunks("A\r\n0123456789\r\n0\r\n\r\n"), Passes("POST /p", "0123456789")),
        (chunks("a\r\n0123456789\r\n0\r\n\r\n"), Passes("POST /p", "0123456789")),
        (chunks("4;x\r\nbody\r\n0;y=z\r\n\r\n"), Passes("POST /p", "body")),
        (chunks("4 ; x = \"y;\\\"z\" ;w\r\nbody\r\n0\r\n\r\n"), Passes("POST /p", "body")),
        (chunks("4\r\nbody\r\n0\r\nX-Sum: 1\r\nY:\r\n\r\n"), Passes("POST /p", "body")),
        (chunks("4\r\n\r\n\r\n\r\n0\r\n\r\n"), Passes("POST /p", "\r\n\r\n")),
        (chunks("\r\n4\r\nbody\r\n0\r\n\r\n"), unframed),
        (chunks("4\nbody\r\n0\r\n\r\n"), unframed),
        (chunks("4\r\nbody\n0\r\n\r\n"), unframed),
        (chunks("4\r\nbody0\r\n\r\n"), unframed),
        (chunks("4\r\nbody!\r\n0\r\n\r\n"), unframed),
        (chunks("4\rbody\r\n0\r\n\r\n"), unframed),
        (chunks(" 4\r\nbody\r\n0\r\n\r\n"), unframed),
        (chunks("4 \r\nbody\r\n0\r\n\r\n"), unframed),
        (chunks("4\t\r\nbody\r\n0\r\n\r\n"), unframed),
        (chunks("+4\r\nbody\r\n0\r\n\r\n"), unframed),
        (chunks("-4\r\nbody\r\n0\r\n\r\n"), unframed),
        (chunks("0x4\r\nbody\r\n0\r\n\r\n"), unframed),
        (chunks("4h\r\nbody\r\n0\r\n\r\n"), unframed),
        (chunks("ten\r\n"), unframed),
        (chunks(";x\r\n\r\n"), unframed),
        (chunks("0000000000000004\r\nbody\r\n0\r\n\r\n"), unframed),
        (chunks("10000000000000004\r\nbody\r\n0\r\n\r\n"), unframed),
        (chunks("fffffffffffffff4\r\nbody\r\n0\r\n\r\n"), unframed),
        (chunks("4;\r\nbody\r\n0\r\n\r\n"), unframed),
        (chunks("4;x \r\nbody\r\n0\r\n\r\n"), unframed),
        (chunks("4;x=\r\nbody\r\n0\r\n\r\n"), unframed),
        (chunks("4;x y\r\nbody\r\n0\r\n\r\n"), unframed),
        (chunks("4;x=\"y\r\nbody\r\n0\r\n\r\n"), unframed),
        (chunks("4;x=\"y\"z\r\nbody\r\n0\r\n\r\n"), unframed),
        (chunks("4;x\nbody\r\n0\r\n\r\n"), unframed),
        (chunks("4;x\0\r\nbody\r\n0\r\n\r\n"), unframed),
        (chunks("4;\u{e4}\r\nbody\r\n0\r\n\r\n"), unframed),
        (chunks("4,4\r\nbody\r\n0\r\n\r\n"), unframed),
        (chunks("0\r\n\n"), unframed),
        (chunks("0\n\r\n"), unframed),
        (chunks("0\r\nX Y: 1\r\n\r\n"), unframed),
        (chunks("0\r\n folded\r\n\r\n"), unframed),
        (chunks("0\r\nX: 1\r\n y\r\n\r\n"), unframed),
        (chunks("0\r\nno colon\r\n\r\n"), unframed),
        (chunks("0\r\nX: 1\n\r\n"), unframed),
        (chunks("0\r\nX: \0\r\n\r\n"), unframed),
    ]
}

fn start(mode: &str) -> (Origin, Gateway) {
    let origin = echo("echo");
    let keys = format!("buffering: {{ request: {{ mode: {mode} }} }}");
    let gateway = Setup::before(&origin).route(&keys).start();
    (origin, gateway)
}

/// Sends a request directly followed by another one, and returns both results; `None` if the connection ended before
/// the second response.
fn answers(gateway: &Gateway, sent: &str) -> (String, Option<String>) {
    let mut client = gateway.client();
    client.try_send(format!("{sent}GET /next HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"));
    let first = client.response();
    let second = client.try_response_to("GET").map(|second| second.text().to_owned());
    (format!("{} {}", first.status, first.text()), second)
}

#[test]
fn each_request_passes_to_its_last_byte_or_is_refused_with_its_connection() {
    let table = table();
    assert!(table.len() >= 120, "{} requests", table.len());
    let (origin, gateway) = start("full");
    let mut passed = 0;
    for (sent, fate) in &table {
        let (first, second) = answers(&gateway, sent);
        match fate {
            Passes(target, body) => {
                passed += 2;
                assert_eq!(first, format!("200 echo {target} {body}"), "{sent:?}");
                assert_eq!(second.as_deref(), Some("200 echo GET /next ").map(|text| &text[4..]), "{sent:?}");
            }
            Refused(reason) => {
                assert!(first.contains(&format!(" {reason}: ")), "{first} instead of {reason} for {sent:?}");
                assert_eq!(second, None, "{sent:?}");
            }
        }
    }
    // The endpoint got no byte of refused requests.
    assert_eq!(origin.requests().len(), passed);
    gateway.wait_at_rest();
}

#[test]
fn bodies_that_are_streamed_are_read_as_strictly_as_those_that_are_held() {
    let (origin, gateway) = start("stream");
    for (sent, fate) in table().iter().filter(|(sent, _)| sent.contains("Transfer-Encoding: chunked\r\n\r\n")) {
        let mut client = gateway.client();
        client.try_send(format!("{sent}GET /next HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"));
        match fate {
            Passes(target, body) => {
                assert_eq!(client.response().text(), format!("echo {target} {body}"), "{sent:?}");
                assert_eq!(client.response().text(), "echo GET /next ", "{sent:?}");
            }
            Refused(_) => {
                let answer = client.response();
                assert_eq!(answer.status, 400, "{sent:?}");
                assert!(client.try_response_to("GET").is_none(), "{sent:?}");
            }
        }
    }
    let whole = origin.requests().iter().filter(|request| request.target() == "/next").count();
    let passing = table()
        .into_iter()
        .filter(|(sent, fate)| sent.contains("Transfer-Encoding: chunked\r\n\r\n") && matches!(fate, Passes(..)));
    assert_eq!(whole, passing.count());
}

#[test]
fn a_streamed_body_has_one_end_however_its_last_chunk_comes() {
    let origin = Origin::scripted();
    let route = "buffering: { request: { mode: stream } }";
    let gateway = Setup::before(&origin).route(route).start();
    let mut client = gateway.client();
    let mut kept = None;
    // The number of bytes in the first read. Each further byte comes in its own read.
    for together in 0..=5 {
        client.send("PUT /x HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nbody\r\n");
        let connection = kept.get_or_insert_with(|| origin.accept());
        assert_eq!(connection.header().target(), "/x", "{together}");
        assert_eq!(connection.bytes(9), b"4\r\nbody\r\n", "{together}");
        let (first, rest) = b"0\r\n\r\n".split_at(together);
        client.send(first);
        assert!(client.drip(rest, ms(10)));
        assert_eq!(connection.bytes(5), b"0\r\n\r\n", "{together}");
        connection.answer("done");
        assert_eq!(client.response().text(), "done", "{together}");
        client.send("GET /next HTTP/1.1\r\nHost: a\r\n\r\n");
        // The rest of the body would be the beginning of this one.
        assert_eq!(connection.request().target(), "/next", "{together}");
        connection.answer("next");
        assert_eq!(client.response().text(), "next", "{together}");
    }
    assert_eq!(origin.connections(), 1);
}

#[test]
fn an_empty_line_may_come_in_pieces() {
    let (_origin, gateway) = start("auto");
    let request = "GET /x HTTP/1.1\r\nHost: a\r\n\r\n";
    let whole = format!("\r\n\r\n{request}");
    for cut in 1..8 {
        let mut client = gateway.client();
        // The gateway answers the first request before it can have the end of the second.
        client.send(format!("{request}{}", &whole[..cut]));
        assert_eq!(client.response().text(), "echo GET /x ", "{cut}");
        client.send(&whole[cut..]);
        assert_eq!(client.response().text(), "echo GET /x ", "{cut}");
    }
    let mut client = gateway.client();
    client.send(format!("{request}\r"));
    assert_eq!(client.response().text(), "echo GET /x ");
    client.send(request);
    assert_eq!(client.response().status, 400);
}

#[test]
fn an_empty_line_between_requests_begins_none() {
    let origin = echo("echo");
    let gateway = Setup::before(&origin).listener("timeouts: { header: 300ms, idle: 30s }").start();
    let mut client = gateway.client();
    client.send("POST /p HTTP/1.1\r\nHost: a\r\nContent-Length: 4\r\n\r\nbody\r\n");
    assert_eq!(client.response().text(), "echo POST /p body");
    // The time limit of the header starts with its first byte.
    client.dawdle(std::time::Duration::from_millis(900));
    client.send("GET /x HTTP/1.1\r\nHost: a\r\n\r\n");
    assert_eq!(client.response().text(), "echo GET /x ");
    assert!(gateway.log_lines(2).iter().all(|line| line.reason().is_empty()));
}

#[test]
fn the_word_close_counts_wherever_it_stands() {
    let (_origin, gateway) = start("auto");
    for fields in [
        "Connection: close\r\n",
        "connection: Close\r\n",
        "Connection: keep-alive, close\r\n",
        "Connection: x\r\nConnection: close\r\n",
        "Connection: keep-alive\r\nConnection: CLOSE\r\n",
    ] {
        let mut client = gateway.client();
        client.send(format!("GET /x HTTP/1.1\r\nHost: a\r\n{fields}\r\n"));
        assert_eq!(client.response().value("connection"), Some("close"), "{fields:?}");
        client.closed();
    }
    let mut client = gateway.client();
    client.send("GET /x HTTP/1.1\r\nHost: a\r\nConnection: closed, x-close\r\n\r\n");
    assert_ne!(client.response().value("connection"), Some("close"));
}

/// All bytes of a client whose header the gateway refuses before it has read its end.
fn refused(gateway: &Gateway, sent: &str) -> Vec<u8> {
    let mut client: Client = gateway.client();
    client.try_send(sent);
    client.rest()
}

#[test]
fn a_refusal_of_a_head_request_has_no_body() {
    let (_origin, gateway) = start("auto");
    for sent in [
        "HEAD / HTTP/1.1\r\n\r\n",
        "HEAD * HTTP/1.1\r\nHost: a\r\n\r\n",
        "HEAD / HTTP/1.1\r\nHost: a\r\nContent-Length: x\r\n\r\n",
    ] {
        let answer = String::from_utf8(refused(&gateway, sent)).expect("text");
        let (head, body) = answer.split_once("\r\n\r\n").expect("a header");
        assert!(head.starts_with("HTTP/1.1 400") && body.is_empty(), "{sent:?}: {answer}");
        let length = head.lines().find_map(|line| line.strip_prefix("Content-Length: ")).expect("a length");
        assert!(length.parse::<usize>().expect("a number") > 0, "the length that GET would have");
    }
    let origin = Origin::named("origin");
    let gateway =
        Setup::before(&origin).routes("{ name: some, match: { path: { exact: /some } }, upstream: app }").start();
    let answer = String::from_utf8(refused(&gateway, "HEAD /none HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"));
    assert!(answer.as_ref().is_ok_and(|answer| answer.starts_with("HTTP/1.1 404") && answer.ends_with("\r\n\r\n")));
}

#[test]
fn http_1_0_without_a_host_asks_for_that_of_its_endpoint() {
    let http1 = Origin::answering(|request| ok(request.head.value("host").expect("a host")));
    let h2c = H2Origin::start();
    for (protocol, address) in [("http1", http1.address()), ("h2c", h2c.address())] {
        let gateway = Setup::before_all(&[address]).upstream(&format!("protocol: {protocol}")).start();
        let named = |request: &str| {
            let mut client = gateway.client();
            client.send(request);
            let answer = client.response();
            assert_eq!(answer.status, 200, "{request:?} by {protocol}");
            match protocol {
                "h2c" => answer.json()["authority"].as_str().expect("an authority").to_owned(),
                _ => answer.text().to_owned(),
            }
        };
        assert_eq!(named("GET / HTTP/1.0\r\n\r\n"), address.to_string(), "{protocol}");
        assert_eq!(named("GET http://b:81/ HTTP/1.0\r\n\r\n"), "b:81", "{protocol}");
        assert_eq!(named("GET / HTTP/1.0\r\nHost: c\r\n\r\n"), "c", "{protocol}");
    }
}
