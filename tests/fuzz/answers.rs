//! Answers of an endpoint: whatever it sends, its client gets one answer that any strict reader reads alike, or half a
//! one that looks like half. The answer behind it is that to the next request.

use std::sync::{Arc, Mutex};
use std::time::Instant;

use super::bodies::{self, lossy};
use super::{corpus, mutate};
use crate::harness::gateway::Watched;
use crate::harness::{Client, Origin, Setup, ok};

const WORDS: &[&str] = &[
    "HTTP/1.1 200 OK\r\n",
    "HTTP/1.0 200 OK\r\n",
    "HTTP/1.1 100 Continue\r\n\r\n",
    "HTTP/1.1 204 No Content\r\n",
    "HTTP/1.1 304 Not Modified\r\n",
    "HTTP/1.1 101 Switching Protocols\r\n",
    "Content-Length: 5\r\n",
    "Content-Length: 0\r\n",
    "Content-Length: 99999999999999999999\r\n",
    "Transfer-Encoding: chunked\r\n",
    "Transfer-Encoding: identity\r\n",
    "Transfer-Encoding: gzip\r\n",
    "Connection: close\r\n",
    "Connection: keep-alive\r\n",
    "Trailer: T\r\n",
    "\r\n",
    "\r\n\r\n",
    "\n",
    "0\r\n\r\n",
    "5\r\nhello\r\n",
    ", ",
    "+",
    " :",
    "\0",
];

#[test]
fn whatever_an_endpoint_answers_its_client_reads_one_answer_and_the_next() {
    let given: Arc<Mutex<(Vec<u8>, bool)>> = Arc::default();
    let answer = given.clone();
    let origin = Origin::playing(move |mut connection| {
        while let Some(request) = connection.next_request() {
            if request.target() == "/next" {
                if connection.try_send(ok("next")) {
                    continue;
                }
                return;
            }
            let (bytes, closes) = answer.lock().unwrap().clone();
            if !connection.try_send(&bytes) || closes {
                return;
            }
        }
    });
    let timeouts = "timeouts: { wait: 100ms, receive: 100ms }, outlier_detection: { consecutive_5xx: unlimited, \
                    consecutive_gateway_errors: unlimited, connect_failures: unlimited }";
    let process = Setup::before(&origin).upstream(timeouts).route("retry: { attempts: 1 }").spawn();

    let mut mutator = mutate::Mutator::new(corpus("answers"), WORDS, mutate::seed());
    let (began, mut exchanges) = (Instant::now(), 0);
    while began.elapsed() < mutate::budget() {
        exchanges += 1;
        let bytes = mutator.input();
        *given.lock().unwrap() = (bytes.clone(), exchanges % 8 > 0);
        let method = if exchanges % 3 == 0 { "HEAD" } else { "GET" };
        let mut client = Client::connect(process.web());
        client.send(format!("{method} / HTTP/1.1\r\nHost: test\r\n\r\nGET /next HTTP/1.1\r\nHost: test\r\n\r\n"));
        client.end();
        let came = client.rest();
        let told = || format!("{method} of {:?} gave {:?}", lossy(&bytes), lossy(&came));
        let Some((rest, closes)) = one(&came, method).unwrap_or_else(|| panic!("{}", told())) else { continue };
        if !closes {
            let next = one(rest, "GET").flatten();
            assert_eq!(next.map(|(rest, _)| rest), Some(&[][..]), "{}", told());
            let is_next = rest.starts_with(b"HTTP/1.1 200 ") && rest.ends_with(b"\r\n\r\nnext");
            // On a machine that is busy the endpoint may be late.
            let is_late = rest.starts_with(b"HTTP/1.1 504 ") && lossy(rest).contains("504 wait.timeout: ");
            assert!(is_next || is_late, "{}", told());
        } else {
            assert!(rest.is_empty(), "{}", told());
        }
    }
    println!("{exchanges} exchanges with FOREBAY_FUZZ_SEED={}", mutator.seed());
    process.wait_at_rest();
    assert!(!process.stderr().contains("panicked"), "{}", process.stderr());
    assert_eq!(process.metric("forebay_refusals_total{reason=\"internal\"}"), 0.0);
}

/// Takes one answer, with its interim answers, off the front of what a client got: what follows, and whether it says
/// that the connection ends. `Some(None)`: it is cut. `None`: it is no answer (RFC 9112).
fn one<'b>(mut bytes: &'b [u8], method: &str) -> Option<Option<(&'b [u8], bool)>> {
    loop {
        let Some(end) = bytes.windows(4).position(|four| four == b"\r\n\r\n") else { return Some(None) };
        let (head, body) = (lossy(&bytes[..end]), &bytes[end + 4..]);
        let mut lines = head.split("\r\n");
        let status = lines.next()?.strip_prefix("HTTP/1.1 ")?.get(..3)?.parse::<u16>().ok()?;
        let fields: Vec<(String, &str)> = lines
            .map(|line| line.split_once(':').map(|(name, value)| (name.to_ascii_lowercase(), value.trim())))
            .collect::<Option<_>>()?;
        let values =
            |name: &'static str| fields.iter().filter(move |(found, _)| found == name).map(|(_, value)| *value);
        let (lengths, codings): (Vec<_>, Vec<_>) =
            (values("content-length").collect(), values("transfer-encoding").collect());
        match status {
            // Nothing was to be switched.
            101 => return None,
            100..=199 => {
                bytes = body;
                continue;
            }
            _ => {}
        }
        let closes = values("connection").any(|value| value.eq_ignore_ascii_case("close"));
        if method == "HEAD" || matches!(status, 204 | 304) {
            return Some(Some((body, closes)));
        }
        return match (&lengths[..], &codings[..]) {
            ([length], []) => {
                let length = length.parse::<usize>().ok()?;
                Some(body.get(length..).map(|rest| (rest, closes)))
            }
            ([], ["chunked"]) => match bodies::Body::of(body) {
                bodies::Body::Whole(_, taken) => Some(Some((&body[taken..], closes))),
                bodies::Body::Begun(_) => Some(None),
                bodies::Body::Malformed => None,
            },
            _ => None,
        };
    }
}
