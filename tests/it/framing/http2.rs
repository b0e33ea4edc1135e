//! HTTP/2 frame by frame: lengths that differ from the data, in both directions, and invalid fields (RFC 9113 §8).

use crate::harness::client::Client;
use crate::harness::gateway::Watched;
use crate::harness::raw_h2::{Ended, Outcome, RawH2};
use crate::harness::wire::End;
use crate::harness::{Gateway, Origin, Setup, ok};

/// The first fields of a request; others follow.
const POST: [(&str, &str); 4] = [(":method", "POST"), (":scheme", "http"), (":authority", "a"), (":path", "/p")];

/// The result of a request.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Fate {
    /// The endpoint gets it, with this body.
    Passes(&'static str),
    /// The gateway answers with this status, and the endpoint does not get the request.
    Answered(u16),
    /// The library refuses the request: it resets the stream or ends the connection.
    Malformed,
}

use Fate::{Answered, Malformed, Passes};

type Fields = &'static [(&'static str, &'static str)];

/// Fields after those of `POST`, data, and the result. Without data, the request is only a header.
#[rustfmt::skip]
const BODIES: &[(Fields, &[&str], Fate)] = &[
    (&[], &[], Passes("")),
    (&[], &["body"], Passes("body")),
    (&[], &["", "bo", "", "dy", ""], Passes("body")),
    (&[("content-length", "4")], &["body"], Passes("body")),
    (&[("content-length", "4")], &["bo", "dy"], Passes("body")),
    (&[("content-length", "0")], &[], Passes("")),
    (&[("content-length", "0")], &[""], Passes("")),
    (&[("te", "trailers")], &["body"], Passes("body")),
    // Too short, too long.
    (&[("content-length", "5")], &["body"], Malformed),
    (&[("content-length", "3")], &["body"], Malformed),
    (&[("content-length", "4")], &["body", "!"], Malformed),
    (&[("content-length", "4")], &[], Malformed),
    (&[("content-length", "4")], &[""], Malformed),
    (&[("content-length", "0")], &["body"], Malformed),
    // No length.
    (&[("content-length", "4, 4")], &["body"], Malformed),
    (&[("content-length", "+4")], &["body"], Malformed),
    (&[("content-length", "-4")], &["body"], Malformed),
    (&[("content-length", "")], &["body"], Malformed),
    (&[("content-length", "x")], &["body"], Malformed),
    (&[("content-length", "99999999999999999999")], &["body"], Malformed),
    (&[("content-length", "4"), ("content-length", "5")], &["body"], Malformed),
    (&[("content-length", "4"), ("content-length", "4")], &["body"], Answered(400)),
    // Fields of HTTP/1 (RFC 9113 §8.2.2).
    (&[("transfer-encoding", "chunked")], &["body"], Malformed),
    (&[("connection", "close")], &["body"], Malformed),
    (&[("keep-alive", "timeout=5")], &["body"], Malformed),
    (&[("proxy-connection", "close")], &["body"], Malformed),
    (&[("upgrade", "websocket")], &["body"], Malformed),
    (&[("te", "gzip")], &["body"], Malformed),
    // Names and values (§8.2.1).
    (&[("X-Upper", "1")], &["body"], Malformed),
    (&[("x y", "1")], &["body"], Malformed),
    (&[("", "1")], &["body"], Malformed),
    (&[("x", "a\r\nb: c")], &["body"], Malformed),
    (&[("x", "a\0")], &["body"], Malformed),
    // Misplaced pseudo-headers (§8.3).
    (&[("x", "1"), (":path", "/q")], &["body"], Malformed),
    (&[(":path", "/q")], &["body"], Malformed),
    (&[(":method", "GET")], &["body"], Malformed),
    (&[(":scheme", "http")], &["body"], Malformed),
    (&[(":authority", "a")], &["body"], Malformed),
    (&[(":status", "200")], &["body"], Malformed),
    (&[(":other", "1")], &["body"], Malformed),
    (&[(":protocol", "websocket")], &["body"], Malformed),
];

/// The header of a request without a body, and the result. Requests that pass are answered with their target.
#[rustfmt::skip]
const TARGETS: &[(Fields, Fate)] = &[
    (&[(":method", "GET"), (":scheme", "http"), (":authority", "a"), (":path", "/x?y")], Passes("/x?y")),
    (&[(":method", "GET"), (":scheme", "https"), (":authority", "a"), (":path", "/x")], Passes("/x")),
    (&[(":method", "GET"), (":scheme", "http"), (":authority", "a:81"), (":path", "/x")], Passes("/x")),
    (&[(":path", "/x"), (":authority", "a"), (":scheme", "http"), (":method", "GET")], Passes("/x")),
    (&[(":method", "GET"), (":scheme", "http"), (":path", "/x"), ("host", "a")], Passes("/x")),
    (&[(":method", "GET"), (":scheme", "http"), (":authority", "a"), (":path", "/x"), ("host", "a")], Passes("/x")),
    (&[(":method", "OPTIONS"), (":scheme", "http"), (":authority", "a"), (":path", "*")], Passes("*")),
    (&[(":method", "GET"), (":scheme", "http"), (":authority", "a"), (":path", "*")], Answered(400)),
    (&[(":method", "GET"), (":scheme", "http"), (":authority", "a"), (":path", "http://b/x")], Malformed),
    (&[(":method", "GET"), (":scheme", "ftp"), (":authority", "a"), (":path", "/x")], Answered(400)),
    (&[(":method", "GET"), (":scheme", "http"), (":authority", "u@a"), (":path", "/x")], Answered(400)),
    (&[(":method", "GET"), (":scheme", "http"), (":authority", "a"), (":path", "/x"), ("host", "b")], Answered(400)),
    (&[(":method", "GET"), (":scheme", "http"), (":path", "/x"), ("host", "a"), ("host", "a")], Answered(400)),
    (&[(":method", "GET"), (":scheme", "http"), (":path", "/x")], Answered(400)),
    (&[(":method", "TRACE"), (":scheme", "http"), (":authority", "a"), (":path", "/x")], Answered(405)),
    (&[(":method", "CONNECT"), (":authority", "a:80")], Answered(405)),
    (&[(":method", "GET"), (":scheme", "http"), (":authority", "a"), (":path", "")], Malformed),
    (&[(":method", "GET"), (":scheme", "http"), (":authority", "a"), (":path", "/a b")], Malformed),
    (&[(":method", "GET"), (":scheme", "http"), (":authority", "a")], Malformed),
    (&[(":method", "GET"), (":authority", "a"), (":path", "/x")], Malformed),
    (&[(":scheme", "http"), (":authority", "a"), (":path", "/x")], Malformed),
    (&[(":method", ""), (":scheme", "http"), (":authority", "a"), (":path", "/x")], Malformed),
    (&[(":method", "G T"), (":scheme", "http"), (":authority", "a"), (":path", "/x")], Malformed),
];

fn h2c(origin: &Origin, mode: &str) -> Gateway {
    let route = format!("buffering: {{ request: {{ mode: {mode} }} }}");
    Setup::before(origin).listener("protocols: [http1, h2c]").route(&route).start()
}

/// Whether this is the result.
fn judge(fate: Fate, outcome: &Outcome, case: &str) {
    match fate {
        Passes(text) => {
            assert_eq!((outcome.status, outcome.end), (200, Ended::Whole), "{case}: {outcome:?}");
            assert_eq!(String::from_utf8_lossy(&outcome.body), text, "{case}");
        }
        Answered(status) => assert_eq!((outcome.status, outcome.end), (status, Ended::Whole), "{case}: {outcome:?}"),
        Malformed => assert!(outcome.status == 0 && outcome.end != Ended::Whole, "{case}: {outcome:?}"),
    }
}

#[test]
fn a_request_is_as_long_as_it_says_and_says_nothing_that_does_not_belong_there() {
    for mode in ["full", "stream"] {
        let origin = Origin::answering(|request| ok(&request.body));
        let gateway = h2c(&origin, mode);
        let mut passed = 0;
        for (fields, data, fate) in BODIES {
            if mode == "stream" && *fields == [("content-length", "0")] && data.concat() == "body" {
                // The request is complete with its header, before the gateway can detect the fault.
                continue;
            }
            let mut client = RawH2::client(gateway.web());
            client.headers(1, &[&POST[..], fields].concat(), data.is_empty());
            for (n, piece) in data.iter().enumerate() {
                client.data(1, piece.as_bytes(), n + 1 == data.len());
            }
            let case = format!("{fields:?} {data:?} {mode}");
            let outcome = client.outcome(1);
            match fate {
                // A streamed request may be refused before its end, by the side that sees the fault first.
                Malformed if mode == "stream" => assert_ne!(outcome.status, 200, "{case}: {outcome:?}"),
                // If the header is read before the data arrives, the gateway refuses what the library would reset.
                Malformed if outcome.status == 400 => assert_eq!(outcome.end, Ended::Whole, "{case}: {outcome:?}"),
                _ => judge(*fate, &outcome, &case),
            }
            passed += usize::from(matches!(fate, Passes(_)));
        }
        gateway.wait_at_rest();
        let requests = origin.requests();
        let whole = requests.iter().filter(|request| request.end == End::Complete);
        let whole: Vec<_> = whole.map(|request| String::from_utf8_lossy(&request.head.raw).into_owned()).collect();
        assert_eq!(whole.len(), passed, "the endpoint got others whole, too ({mode}): {whole:#?}");
    }
}

#[test]
fn a_target_has_a_form_that_every_version_can_say() {
    let origin = Origin::answering(|request| ok(request.target()));
    let gateway = h2c(&origin, "auto");
    for (fields, fate) in TARGETS {
        let mut client = RawH2::client(gateway.web());
        client.headers(1, fields, true);
        judge(*fate, &client.outcome(1), &format!("{fields:?}"));
    }
    let passing = TARGETS.iter().filter(|(_, fate)| matches!(fate, Passes(_))).count();
    assert_eq!(origin.requests().len(), passing);
}

#[test]
fn trailers_of_a_request_have_no_pseudo_headers_and_end_it() {
    let origin = Origin::answering(|request| ok(&request.body));
    let gateway = h2c(&origin, "full");
    for (fields, end, fate) in [
        (("x-sum", "1"), true, Passes("body")),
        // The library ignores them.
        ((":path", "/q"), true, Passes("body")),
        (("x-sum", "1"), false, Malformed),
    ] {
        let mut client = RawH2::client(gateway.web());
        client.headers(1, &POST, false);
        client.data(1, b"body", false);
        client.headers(1, &[fields], end);
        judge(fate, &client.outcome(1), &format!("{fields:?} {end}"));
    }
    let requests = origin.requests();
    assert_eq!(requests.iter().map(|request| request.target()).collect::<Vec<_>>(), ["/p", "/p"]);
}

/// An endpoint's response over HTTP/2: a header, data, and its end.
#[derive(Clone, Copy, Debug)]
enum Then {
    /// With the last data.
    End,
    /// By trailers with this field.
    Trailers(&'static str, &'static str),
    Reset(u32),
    GoAway,
    Close,
}

/// The response that a client reads.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Read {
    /// This status and body.
    Whole(u16, &'static str),
    /// 502, or a response that is visibly truncated.
    Failed,
    /// The same, or the announced response, if that much was sent before the rest arrived.
    Longer(&'static str),
}

use Read::{Failed, Longer, Whole};

/// A header, data, the end, and the client's result with GET.
type Row = (Fields, &'static [&'static str], Then, Read);

#[rustfmt::skip]
const ANSWERS: &[Row] = &[
    (&[(":status", "200")], &["body"], Then::End, Whole(200, "body")),
    (&[(":status", "200")], &[], Then::End, Whole(200, "")),
    (&[(":status", "200"), ("content-length", "4")], &["body"], Then::End, Whole(200, "body")),
    (&[(":status", "200"), ("content-length", "4")], &["bo", "dy"], Then::End, Whole(200, "body")),
    (&[(":status", "200"), ("content-length", "0")], &[], Then::End, Whole(200, "")),
    (&[(":status", "200"), ("content-length", "4"), ("content-length", "4")], &["body"], Then::End, Whole(200, "body")),
    (&[(":status", "204")], &[], Then::End, Whole(204, "")),
    (&[(":status", "204"), ("content-length", "4")], &[], Then::End, Whole(204, "")),
    (&[(":status", "304"), ("content-length", "4")], &[], Then::End, Whole(304, "")),
    (&[(":status", "200")], &["body"], Then::Trailers("x-sum", "1"), Whole(200, "body")),
    // Too short, too long.
    (&[(":status", "200"), ("content-length", "5")], &["body"], Then::End, Failed),
    (&[(":status", "200"), ("content-length", "3")], &["body"], Then::End, Failed),
    (&[(":status", "200"), ("content-length", "4")], &["body", "!"], Then::End, Longer("body")),
    (&[(":status", "200"), ("content-length", "4")], &[], Then::End, Failed),
    (&[(":status", "200"), ("content-length", "4")], &[""], Then::End, Failed),
    (&[(":status", "200"), ("content-length", "0")], &["body"], Then::End, Longer("")),
    (&[(":status", "200"), ("content-length", "5")], &["body"], Then::Trailers("x-sum", "1"), Failed),
    // No length.
    (&[(":status", "200"), ("content-length", "4, 5")], &["body"], Then::End, Failed),
    (&[(":status", "200"), ("content-length", "4"), ("content-length", "5")], &["body"], Then::End, Failed),
    (&[(":status", "200"), ("content-length", "+4")], &["body"], Then::End, Failed),
    (&[(":status", "200"), ("content-length", "")], &["body"], Then::End, Failed),
    // Invalid fields.
    (&[(":status", "200"), ("transfer-encoding", "chunked")], &["body"], Then::End, Failed),
    (&[(":status", "200"), ("connection", "close")], &["body"], Then::End, Failed),
    // The library ignores it.
    (&[(":status", "200"), (":path", "/")], &["body"], Then::End, Whole(200, "body")),
    (&[("x", "1"), (":status", "200")], &["body"], Then::End, Failed),
    (&[(":status", "200"), (":status", "200")], &["body"], Then::End, Failed),
    (&[(":status", "2000")], &["body"], Then::End, Failed),
    (&[(":status", "101")], &[], Then::End, Failed),
    (&[("x", "1")], &["body"], Then::End, Failed),
    // The library ignores it.
    (&[(":status", "200")], &["body"], Then::Trailers(":status", "200"), Whole(200, "body")),
    // Half of the announced length.
    (&[(":status", "200")], &["half"], Then::Reset(0), Failed),
    (&[(":status", "200")], &["half"], Then::Reset(2), Failed),
    (&[(":status", "200")], &["half"], Then::Reset(8), Failed),
    (&[(":status", "200")], &["half"], Then::Close, Failed),
    (&[(":status", "200")], &["half"], Then::GoAway, Failed),
    (&[(":status", "200"), ("content-length", "8")], &["half"], Then::Close, Failed),
    (&[(":status", "200")], &[], Then::Close, Failed),
];

/// Answers every request on a connection in this way.
fn serve(mut endpoint: RawH2, row: Row) {
    let (fields, data, then, _) = row;
    while let Some(stream) = endpoint.request() {
        let ends = matches!(then, Then::End);
        endpoint.headers(stream, fields, ends && data.is_empty());
        for (n, piece) in data.iter().enumerate() {
            endpoint.data(stream, piece.as_bytes(), ends && n + 1 == data.len());
        }
        match then {
            Then::End => {}
            Then::Trailers(name, value) => endpoint.headers(stream, &[(name, value)], true),
            Then::Reset(code) => endpoint.reset(stream, code),
            Then::GoAway => {
                endpoint.goaway(stream, 0);
                return;
            }
            Then::Close => return,
        }
    }
}

#[test]
fn an_answer_over_http_2_is_as_long_as_it_says_or_never_whole() {
    for row in ANSWERS {
        let origin = Origin::playing(|connection| serve(RawH2::server(connection), *row));
        let setup = Setup::before(&origin).upstream("protocol: h2c").route("retry: { attempts: 1 }");
        let gateway = setup.listener("protocols: [http1, h2c]").start();
        for version in ["1.0", "1.1", "2"] {
            let (status, body, whole) = read(&gateway, version);
            let case = format!("{row:?} HTTP/{version}: {status}, {body:?}, whole: {whole}");
            match row.3 {
                Whole(expected, text) => assert_eq!((status, &*body, whole), (expected, text, true), "{case}"),
                Failed => assert!(status == 502 || !whole, "{case}"),
                Longer(text) => assert!(status == 502 || !whole || body == text, "{case}"),
            }
        }
        gateway.wait_at_rest();
    }
}

/// Sends one request; returns the status, the body, and whether it was complete.
fn read(gateway: &Gateway, version: &str) -> (u16, String, bool) {
    let (status, body, whole) = if version == "2" {
        let mut client = RawH2::client(gateway.web());
        client.headers(1, &[(":method", "GET"), (":scheme", "http"), (":authority", "a"), (":path", "/")], true);
        let outcome = client.outcome(1);
        (outcome.status, outcome.body, outcome.end == Ended::Whole)
    } else {
        let mut client: Client = gateway.client();
        client.send(format!("GET / HTTP/{version}\r\nHost: a\r\nConnection: close\r\n\r\n"));
        let answer = client.response();
        (answer.status, answer.body, answer.end == End::Complete)
    };
    (status, String::from_utf8(body).expect("text"), whole)
}
