//! Chunked bodies: by the decoder alone, and through a whole exchange to an origin and back.
//!
//! What is a body is said by a decoder that was written for this test alone, after RFC 9112 §7.1 and without any
//! leniency.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use forebay::framing::chunked::Chunks;

use super::{corpus, mutate};
use crate::harness::gateway::Watched;
use crate::harness::{Client, End, Origin, Setup, ok};

const WORDS: &[&str] = &[
    "0\r\n\r\n",
    "0\r\n",
    "5\r\nhello\r\n",
    "\r\n",
    "\n",
    "\r",
    ";a=b",
    ";a=\"b;\\\"\"",
    ";a",
    ";=",
    "; a = b",
    ";a=\"",
    "00005",
    "5 ",
    " 5",
    "+5",
    "-5",
    "0x5",
    "5_0",
    "FFFFFFFFFFFFFFFF",
    "7fffffffffffffff",
    "fffffffffffffff",
    "Trailer: x\r\n",
    "Content-Length: 5\r\n",
    ": x\r\n",
    " folded\r\n",
    "\u{0}",
    "\u{e9}",
    "GET / HTTP/1.1\r\nHost: a\r\n\r\n",
];

/// What bytes are that should begin with a chunked body.
#[derive(Debug, PartialEq)]
pub enum Body {
    /// A body with this content, and how many bytes it took.
    Whole(Vec<u8>, usize),
    /// The beginning of one, with this content so far.
    Begun(Vec<u8>),
    /// Something else.
    Malformed,
}

impl Body {
    /// Reads it from the front of `bytes`.
    pub fn of(bytes: &[u8]) -> Body {
        let mut content = Vec::new();
        let mut rest = bytes;
        loop {
            let Some((line, after)) = line(rest) else { return Body::Begun(content) };
            let Some(size) = size(line) else { return Body::Malformed };
            rest = after;
            if size == 0 {
                break;
            }
            if rest.len() < size {
                content.extend_from_slice(rest);
                return Body::Begun(content);
            }
            content.extend_from_slice(&rest[..size]);
            rest = &rest[size..];
            match rest {
                [] | [b'\r'] => return Body::Begun(content),
                [b'\r', b'\n', after @ ..] => rest = after,
                _ => return Body::Malformed,
            }
        }
        loop {
            let Some((line, after)) = line(rest) else { return Body::Begun(content) };
            rest = after;
            if line.is_empty() {
                return Body::Whole(content, bytes.len() - rest.len());
            }
            if !is_trailer(line) {
                return Body::Malformed;
            }
        }
    }
}

/// Splits at the first CRLF.
fn line(bytes: &[u8]) -> Option<(&[u8], &[u8])> {
    let at = bytes.windows(2).position(|pair| pair == b"\r\n")?;
    Some((&bytes[..at], &bytes[at + 2..]))
}

/// The size that a line gives, if it is one with its extensions.
fn size(line: &[u8]) -> Option<usize> {
    let digits = line.iter().take_while(|byte| byte.is_ascii_hexdigit()).count();
    // More digits are more than anything can hold.
    let text = std::str::from_utf8(&line[..digits]).ok().filter(|text| (1..=15).contains(&text.len()))?;
    let mut rest = &line[digits..];
    while !rest.is_empty() {
        rest = blank(blank(rest).strip_prefix(b";")?);
        rest = token(rest)?;
        if let Some(value) = blank(rest).strip_prefix(b"=") {
            rest = quoted(blank(value)).or_else(|| token(blank(value)))?;
        }
    }
    usize::from_str_radix(text, 16).ok()
}

fn blank(text: &[u8]) -> &[u8] {
    &text[text.iter().take_while(|byte| matches!(byte, b' ' | b'\t')).count()..]
}

/// What follows a token; `None` if there is none.
fn token(text: &[u8]) -> Option<&[u8]> {
    let len = text.iter().take_while(|b| b.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(b)).count();
    (len > 0).then(|| &text[len..])
}

/// What follows a quoted string; `None` if there is none.
fn quoted(text: &[u8]) -> Option<&[u8]> {
    let mut rest = text.strip_prefix(b"\"")?;
    loop {
        rest = match rest {
            [b'"', rest @ ..] => return Some(rest),
            [b'\\', escaped, rest @ ..] if is_text(*escaped) => rest,
            [byte, rest @ ..] if is_text(*byte) && *byte != b'\\' => rest,
            _ => return None,
        };
    }
}

fn is_trailer(line: &[u8]) -> bool {
    token(line).and_then(|rest| rest.strip_prefix(b":")).is_some_and(|value| value.iter().copied().all(is_text))
}

fn is_text(byte: u8) -> bool {
    byte == b'\t' || byte >= b' ' && byte != 0x7f
}

/// More than this beside the data is refused for its amount.
const EXTRA_BYTES: usize = 8 * 1024;

#[test]
fn the_end_of_a_chunked_body_is_where_any_strict_reader_finds_it() {
    mutate::explore("chunks", WORDS, |bytes: &[u8]| {
        let body = Body::of(bytes);
        for size in [bytes.len().max(1), 1, 3, 64] {
            let (mut chunks, mut content, mut taken) = (Chunks::default(), Vec::new(), 0);
            let mut pieces = bytes.chunks(size);
            let refused = pieces.by_ref().any(|piece| {
                let mut piece = piece.to_vec();
                match chunks.unwrap(&mut piece) {
                    Ok((belongs, data)) => {
                        taken += belongs;
                        content.extend_from_slice(&piece[..data]);
                        false
                    }
                    Err(_) => true,
                }
            });
            match &body {
                _ if bytes.len() - content.len().min(bytes.len()) > EXTRA_BYTES => {}
                Body::Whole(whole, length) => {
                    assert!(!refused && chunks.ended(), "in pieces of {size}");
                    assert_eq!((&content, taken), (whole, *length), "in pieces of {size}");
                }
                Body::Begun(begun) => {
                    assert!(!chunks.ended(), "in pieces of {size}");
                    assert!(begun.starts_with(&content), "in pieces of {size}");
                }
                Body::Malformed => assert!(refused, "in pieces of {size}"),
            }
        }
    });
}

/// What came to the origin for each target: a body, and whether it was whole.
type Arrived = Arc<Mutex<HashMap<String, (Vec<u8>, End)>>>;

#[test]
fn a_body_goes_through_a_whole_exchange_as_it_is_or_not_at_all() {
    let arrived = Arrived::default();
    let noted = arrived.clone();
    let origin = Origin::answering(move |request| {
        noted.lock().unwrap().insert(request.target().to_owned(), (request.body.clone(), request.end));
        ok("arrived")
    });
    let modes = ["full", "auto", "stream"];
    let route = |mode| {
        let buffering = format!("buffering: {{ request: {{ mode: {mode} }} }}");
        format!("{{ name: {mode}, upstream: app, match: {{ path: {{ prefix: /{mode} }} }}, {buffering} }}\n")
    };
    let process = Setup::before(&origin).routes(&modes.map(route).concat()).spawn();

    let mut mutator = mutate::Mutator::new(corpus("chunks"), WORDS, mutate::seed());
    let (began, mut number) = (Instant::now(), 0);
    while began.elapsed() < mutate::budget() {
        let body = mutator.input();
        for mode in modes {
            number += 1;
            let target = format!("/{mode}/{number}");
            let mut client = Client::connect(process.web());
            client.send(format!("POST {target} HTTP/1.1\r\nHost: test\r\nTransfer-Encoding: chunked\r\n\r\n"));
            // What is refused before its end is not all taken.
            client.try_send(&body);
            client.try_end();
            let answer = client.rest();
            let told = || format!("{target} {:?} was answered {:?}", lossy(&body), lossy(&answer));
            let status = lossy(&answer).split(' ').nth(1).and_then(|status| status.parse::<u16>().ok());
            let came = arrived.lock().unwrap().remove(&target);
            match Body::of(&body) {
                Body::Whole(content, length) if length - content.len() <= EXTRA_BYTES => {
                    assert_eq!(status, Some(200), "{}", told());
                    assert_eq!(came, Some((content, End::Complete)), "{}", told());
                }
                Body::Whole(..) => {}
                Body::Begun(_) | Body::Malformed => {
                    assert!(status.is_none_or(|status| status >= 400), "{}", told());
                    assert!(came.is_none_or(|(_, end)| end == End::Cut), "{}", told());
                }
            }
        }
    }
    println!("{number} exchanges with FOREBAY_FUZZ_SEED={}", mutator.seed());
    process.wait_at_rest();
    assert!(!process.stderr().contains("panicked"), "{}", process.stderr());
}

/// For a message.
pub fn lossy(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}
