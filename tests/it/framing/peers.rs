//! The same responses through nginx, HAProxy and Forebay, and the reasons for differences that an HTTP/1.1 client
//! sees.
//!
//! The table shows the results of all three. Where Forebay differs from both others, it gives the reason.

use crate::harness::client::Client;
use crate::harness::peers::Peer;
use crate::harness::wire::End;
use crate::harness::{Origin, Setup};

/// A response, the client's results through nginx, HAProxy and Forebay, and the reason for a difference.
///
/// `200 body`: the status and the decoded body. `200 half`: a part of the body, and then an end of the connection
/// that the framing shows to be early. `502`: the proxy's own response. `-`: no response.
struct Row {
    answer: &'static str,
    nginx: &'static str,
    haproxy: &'static str,
    forebay: &'static str,
    why: &'static str,
}

const fn row(answer: &'static str, [nginx, haproxy, forebay]: [&'static str; 3], why: &'static str) -> Row {
    Row { answer, nginx, haproxy, forebay, why }
}

/// All three pass it on.
const fn passes(answer: &'static str, read: &'static str) -> Row {
    row(answer, [read, read, read], "")
}

const CHUNKS: &str = "4\r\nbody\r\n0\r\n\r\n";

const FAULTY_LENGTH: &str =
    "nginx 1.22 passes over a length that it cannot read; Forebay and HAProxy take it for a fault (RFC 9110 §8.6)";
const CODED: &str = "nginx 1.22 looks for the letters `chunked` and nothing else, and the client gets coded bytes for plain ones; Forebay and \
    HAProxy refuse a coding that no client asked for (RFC 9112 §6.1)";
const LISTED: &str = "an empty element of a list is none (RFC 9110 §5.6.1), so that this is `chunked` and nothing else; HAProxy refuses any \
    list that does not begin with it";
const UNCLEAR: &str = "by its last word it is no chunks, by RFC 9110 §5.6.1 it is; nginx 1.22 and HAProxy read chunks, and HAProxy passes the \
    field on for the client to decide. Forebay's library reads to the end of the connection, so it is refused";
const IDENTITY: &str = "earlier versions of HTTP had a name for no coding; the end of the connection tells (RFC 9112 §6.3). HAProxy refuses it";
const BROKEN: &str = "once its chunks are found to be none, nginx closes without a word, since it has begun with the answer; HAProxy, which \
    had waited for the first piece, and Forebay, which drops what has not left, say 502";
const GRAMMAR: &str = "Forebay holds to the grammar of RFC 9112 §7.1: no white space behind a size, no extension without a name, sizes of up to 15 \
    digits. nginx and HAProxy forgive these";
const HALF: &str = "Forebay, too, passes on what has come, unless nothing of it had left when the endpoint broke off: then it says 502";

#[rustfmt::skip]
fn table() -> Vec<Row> {
    vec![
        passes("HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nbody", "200 body"),
        passes("HTTP/1.0 200 OK\r\nContent-Length: 4\r\n\r\nbody", "200 body"),
        passes("HTTP/1.1 200 OK\r\nContent-Length: 004\r\n\r\nbody", "200 body"),
        passes("HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", "200 "),
        passes("HTTP/1.1 200 OK\r\nContent-Length: 4\r\nContent-Length: 4\r\n\r\nbody", "200 body"),
        passes("HTTP/1.1 200 OK\r\nContent-Length: 4, 4\r\n\r\nbody", "200 body"),
        passes("HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nbody and more", "200 body"),
        row("HTTP/1.1 200 OK\r\nContent-Length: 4, 5\r\n\r\nbody!", ["200 body!", "502", "502"], FAULTY_LENGTH),
        row("HTTP/1.1 200 OK\r\nContent-Length: 4\r\nContent-Length: 5\r\n\r\nbody!", ["200 body!", "502", "502"], FAULTY_LENGTH),
        row("HTTP/1.1 200 OK\r\nContent-Length:\r\n\r\nbody", ["200 body", "502", "502"], FAULTY_LENGTH),
        row("HTTP/1.1 200 OK\r\nContent-Length: 4,\r\n\r\nbody", ["200 body", "502", "502"], FAULTY_LENGTH),
        row("HTTP/1.1 200 OK\r\nContent-Length: +4\r\n\r\nbody", ["200 body", "502", "502"], FAULTY_LENGTH),
        row("HTTP/1.1 200 OK\r\nContent-Length: 0x4\r\n\r\nbody", ["200 body", "502", "502"], FAULTY_LENGTH),
        row("HTTP/1.1 200 OK\r\nContent-Length: 99999999999999999999\r\n\r\nbody", ["200 body", "502", "502"], FAULTY_LENGTH),
        passes("HTTP/1.1 200 OK\r\n\r\nbody", "200 body"),
        passes("HTTP/1.0 200 OK\r\n\r\nbody", "200 body"),
        passes("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nbody\r\n0\r\n\r\n", "200 body"),
        passes("HTTP/1.1 200 OK\r\nTransfer-Encoding: CHUNKED\r\n\r\n4;x=\"y\"\r\nbody\r\n0\r\nT: 1\r\n\r\n", "200 body"),
        passes("HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nbody\r\n0\r\n\r\n", "200 body"),
        passes("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nContent-Length: 9\r\n\r\n4\r\nbody\r\n0\r\n\r\n", "200 body"),
        row("HTTP/1.1 200 OK\r\nContent-Length: 1, 2\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nbody\r\n0\r\n\r\n", ["200 body", "502", "200 body"],
            "beside a coding a length does not count, whatever it is (RFC 9112 §6.3); HAProxy reads it all the same"),
        row("HTTP/1.1 200 OK\r\nTransfer-Encoding: , chunked\r\n\r\n4\r\nbody\r\n0\r\n\r\n", ["200 body", "502", "200 body"], LISTED),
        row("HTTP/1.1 200 OK\r\nTransfer-Encoding: identity\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nbody\r\n0\r\n\r\n",
            ["200 body", "502", "200 body"], IDENTITY),
        passes("HTTP/1.1 200 OK\r\nTransfer-Encoding:\r\n\r\nbody", "200 body"),
        row("HTTP/1.1 200 OK\r\nTransfer-Encoding: identity\r\n\r\nbody", ["200 body", "502", "200 body"], IDENTITY),
        row("HTTP/1.1 200 OK\r\nTransfer-Encoding: identity\r\nContent-Length: 2\r\n\r\nbody", ["200 bo", "502", "200 body"],
            "beside a coding a length does not count, even if the coding is none (RFC 9112 §6.3); nginx 1.22 goes by the length"),
        row("HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\nbody", ["200 body", "502", "502"], CODED),
        row("HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n4\r\nbody\r\n0\r\n\r\n", ["200 body", "502", "502"], CODED),
        row("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked, gzip\r\n\r\n4\r\nbody\r\n0\r\n\r\n", ["200 body", "502", "502"], CODED),
        row("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked, chunked\r\n\r\n4\r\nbody\r\n0\r\n\r\n", ["200 body", "502", "502"], CODED),
        row("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nbody\r\n0\r\n\r\n", ["200 body", "502", "502"], CODED),
        row("HTTP/1.1 200 OK\r\nTransfer-Encoding: xchunked\r\n\r\n4\r\nbody\r\n0\r\n\r\n", ["200 body", "502", "502"], CODED),
        row("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked;q=1\r\n\r\n4\r\nbody\r\n0\r\n\r\n", ["200 body", "502", "502"], CODED),
        row("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked,\r\n\r\n4\r\nbody\r\n0\r\n\r\n", ["200 body", "200 body", "502"], UNCLEAR),
        row("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding:\r\n\r\n4\r\nbody\r\n0\r\n\r\n", ["200 body", "200 body", "502"], UNCLEAR),
        row("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked, identity\r\n\r\n4\r\nbody\r\n0\r\n\r\n", ["200 body", "502", "502"], UNCLEAR),
        passes("HTTP/1.1 204 No Content\r\nContent-Length: 4\r\n\r\nbody", "204 "),
        passes("HTTP/1.1 204 No Content\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nbody\r\n0\r\n\r\n", "204 "),
        row("HTTP/1.1 204 No Content\r\nTransfer-Encoding: gzip\r\n\r\nbody", ["204 ", "502", "204 "],
            "there is no body that could be coded; HAProxy looks at the coding first"),
        passes("HTTP/1.1 304 Not Modified\r\nContent-Length: 4\r\n\r\nbody", "304 "),
        row("HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nbody", ["200 half", "200 half", "502"], HALF),
        row("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nbody\r\n", ["200 half", "200 half", "502"], HALF),
        row("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nbody\r\n0\r\n", ["200 half", "200 half", "502"], HALF),
        row("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nbody", ["-", "502", "502"], BROKEN),
        row("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nbody!\r\n0\r\n\r\n", ["-", "502", "502"], BROKEN),
        row("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n+4\r\nbody\r\n0\r\n\r\n", ["-", "502", "502"], BROKEN),
        row("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\nbody\r\n0\r\n\r\n", ["200 body", "200 body", "502"],
            "a size ends with CRLF (RFC 9112 §7.1); nginx and HAProxy forgive a bare line feed"),
        row("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4 \r\nbody\r\n0\r\n\r\n", ["200 body", "200 body", "502"], GRAMMAR),
        row("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4;\r\nbody\r\n0\r\n\r\n", ["200 body", "200 body", "502"], GRAMMAR),
        row("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0000000000000004\r\nbody\r\n0\r\n\r\n", ["200 body", "200 body", "502"], GRAMMAR),
        row("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nbody\r\n0\r\nno colon\r\n\r\n", ["200 body", "502", "502"],
            "nginx 1.22 passes over trailers, whatever they are (RFC 9112 §7.1.2)"),
        passes("HTTP/1.1 200 OK\r\nNo colon\r\n\r\nbody", "502"),
        passes("", "502"),
    ]
}

/// The client's result, in the notation of the table.
fn got(mut client: Client, row: usize) -> String {
    client.send(format!("GET /{row} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"));
    let bytes = client.rest();
    let text = String::from_utf8(bytes).expect("text");
    let Some((head, rest)) = text.split_once("\r\n\r\n") else { return "-".to_owned() };
    let status = head.split(' ').nth(1).expect("a status");
    if status.starts_with('5') || ["204", "304"].contains(&status) {
        assert!(status.starts_with('5') || rest.is_empty(), "a body behind {head}");
        return if status.starts_with('5') { status.to_owned() } else { format!("{status} ") };
    }
    let field = |name: &str| {
        let of_name = |line: &&str| line.split(':').next().is_some_and(|found| found.eq_ignore_ascii_case(name));
        head.lines().find(of_name).and_then(|line| line.split_once(':')).map(|(_, value)| value.trim().to_lowercase())
    };
    let (body, end) = match (field("transfer-encoding"), field("content-length")) {
        (Some(coding), _) if coding.starts_with("chunked") => match unchunked(rest) {
            Some(body) => (body, End::Complete),
            None => (String::new(), End::Cut),
        },
        (_, Some(length)) => {
            let length: usize = length.parse().expect("a length");
            (rest.to_owned(), if rest.len() == length { End::Complete } else { End::Cut })
        }
        _ => (rest.to_owned(), End::Complete),
    };
    if end == End::Cut { format!("{status} half") } else { format!("{status} {body}") }
}

/// The content of a chunked body, if it is complete.
fn unchunked(mut rest: &str) -> Option<String> {
    let mut body = String::new();
    loop {
        let (size, data) = rest.split_once("\r\n")?;
        let size = usize::from_str_radix(size.split(';').next()?, 16).ok()?;
        if size == 0 {
            return data.ends_with("\r\n").then_some(body);
        }
        body.push_str(data.get(..size)?);
        rest = data.get(size..)?.strip_prefix("\r\n")?;
    }
}

#[test]
fn the_same_answers_through_nginx_haproxy_and_forebay() {
    let answers: Vec<&str> = table().iter().map(|row| row.answer).collect();
    let origin = Origin::answering_once(move |request| {
        answers[request.target()[1..].parse::<usize>().expect("a row")].as_bytes().to_vec()
    });
    let (nginx, haproxy) = (Peer::nginx(origin.address()), Peer::haproxy(origin.address()));
    let full = "buffering: { response: { mode: full } }, retry: { attempts: 1 }";
    let forebay = Setup::before(&origin).route(full).start();
    let mut wrong = Vec::new();
    for (number, row) in table().iter().enumerate() {
        let seen = [nginx.address(), haproxy.address(), forebay.web()].map(|proxy| got(Client::connect(proxy), number));
        if seen != [row.nginx, row.haproxy, row.forebay] {
            wrong.push(format!("{:?}: {seen:?} instead of {:?}", row.answer, [row.nginx, row.haproxy, row.forebay]));
        }
        let agrees = row.forebay == row.nginx || row.forebay == row.haproxy;
        assert!(
            !row.why.is_empty() || (row.nginx == row.haproxy && agrees),
            "{:?} differs without a reason",
            row.answer
        );
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert!(table().iter().any(|row| row.answer.ends_with(CHUNKS)));
}
