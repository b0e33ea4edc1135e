//! Other protocols that clients request with `Upgrade` (RFC 9110 §7.8), and which of them are allowed.
//!
//! After a 101, Forebay cannot check, buffer or refuse anything. A protocol therefore passes only if its route allows
//! it, and only protocols other than HTTP can be allowed. `h2c` never passes: its requests would bypass all routes and
//! filters.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use http::header::{CONNECTION, CONTENT_LENGTH, TRANSFER_ENCODING, UPGRADE};
use http::{HeaderMap, HeaderValue, Method, Version};
use pingora::http::{RequestHeader, ResponseHeader};

use crate::config::route::Protocol;
use crate::framing::members;

/// Minimum interval between log lines about a route's disallowed protocols.
const TOLD_EVERY: Duration = Duration::from_secs(60);

/// The single protocol other than HTTP that a request asks for: over HTTP/1.1, by an `Upgrade` that `Connection` lists,
/// without a body, which would be read as the other protocol. A WebSocket requires a GET (RFC 6455 §4.1).
pub fn wish(request: &RequestHeader) -> Option<HeaderValue> {
    let headers = &request.headers;
    let named = || members(headers, &CONNECTION).any(|option| option.eq_ignore_ascii_case(b"upgrade"));
    let protocol = one(headers)?;
    Protocol::parse(std::str::from_utf8(protocol).ok()?).ok()?;
    if request.version != Version::HTTP_11 || headers.contains_key(TRANSFER_ENCODING) || !named() {
        return None;
    }
    if protocol.eq_ignore_ascii_case(Protocol::WEBSOCKET.as_bytes()) {
        let asks = request.method == Method::GET && !headers.contains_key(CONTENT_LENGTH);
        return asks.then_some(HeaderValue::from_static(Protocol::WEBSOCKET));
    }
    let is_empty = headers.get(CONTENT_LENGTH).is_none_or(|length| length.as_bytes() == b"0");
    HeaderValue::from_bytes(protocol).ok().filter(|_| is_empty)
}

/// Whether the response switches to exactly this protocol.
pub fn agrees(response: &ResponseHeader, protocol: &HeaderValue) -> bool {
    one(&response.headers).is_some_and(|named| named.eq_ignore_ascii_case(protocol.as_bytes()))
}

/// The protocol in `Upgrade`, if there is exactly one.
fn one(headers: &HeaderMap) -> Option<&[u8]> {
    let mut named = members(headers, &UPGRADE);
    named.next().filter(|_| named.next().is_none())
}

/// The protocols that a route allows.
#[derive(Debug)]
pub struct Upgrades {
    allowed: Vec<Protocol>,
    began: Instant,
    /// Time of the last log line, in milliseconds after `began`; 0: never.
    told: AtomicU64,
}

impl Upgrades {
    /// Creates the list of allowed protocols.
    pub fn new(allowed: &[Protocol]) -> Upgrades {
        Upgrades { allowed: allowed.to_vec(), began: Instant::now(), told: AtomicU64::new(0) }
    }

    /// Whether this protocol is allowed.
    pub fn allow(&self, protocol: &HeaderValue) -> bool {
        self.allowed.iter().any(|allowed| allowed.is(protocol.as_bytes()))
    }

    /// Whether a disallowed protocol may be logged now.
    pub fn may_tell(&self, now: Instant) -> bool {
        let since = now.saturating_duration_since(self.began).as_millis();
        let now = u64::try_from(since).unwrap_or(u64::MAX).saturating_add(1);
        let last = self.told.load(Ordering::Relaxed);
        let due = last == 0 || u128::from(now - last.min(now)) >= TOLD_EVERY.as_millis();
        due && self.told.compare_exchange(last, now, Ordering::Relaxed, Ordering::Relaxed).is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::super::header::tests::request;
    use super::*;

    fn wished(method: &str, fields: &[(&'static str, &str)]) -> Option<String> {
        let mut request = request(fields);
        request.set_method(method.parse().expect("a method"));
        wish(&request).map(|name| name.to_str().expect("text").to_owned())
    }

    #[test]
    fn one_protocol_is_asked_for_that_leaves_http() {
        let asks = ("connection", "keep-alive, Upgrade");
        for (written, read) in [("WebSocket", "websocket"), ("tcp", "tcp"), ("SPDY/3.1", "SPDY/3.1"), (" x ,", "x")] {
            assert_eq!(wished("GET", &[asks, ("upgrade", written)]).as_deref(), Some(read), "{written}");
            assert_eq!(wished("GET", &[("upgrade", written)]), None, "`Connection` does not name it");
        }
        for written in ["", "h2c", "H2C", "h2c, websocket", "HTTP/2.0", "TLS/1.0", "a, b", "a/b/c", "a/", "/1", "a b"] {
            assert_eq!(wished("GET", &[asks, ("upgrade", written)]), None, "{written:?}");
        }
        assert_eq!(wished("GET", &[asks, ("upgrade", "a"), ("upgrade", "b")]), None);
        let mut old = request(&[asks, ("upgrade", "tcp")]);
        old.set_version(Version::HTTP_10);
        assert_eq!(wish(&old), None);
    }

    #[test]
    fn a_request_with_a_body_asks_for_none() {
        let asks = |protocol: &'static str| [("connection", "upgrade"), ("upgrade", protocol)];
        let with = |protocol, field| [&asks(protocol)[..], &[field]].concat();
        assert_eq!(wished("POST", &asks("tcp")).as_deref(), Some("tcp"));
        assert_eq!(wished("POST", &with("tcp", ("content-length", "0"))).as_deref(), Some("tcp"));
        assert_eq!(wished("POST", &with("tcp", ("content-length", "1"))), None);
        assert_eq!(wished("POST", &with("tcp", ("transfer-encoding", "chunked"))), None);
        assert_eq!(wished("POST", &asks("websocket")), None);
        assert_eq!(wished("GET", &with("websocket", ("content-length", "0"))), None);
    }

    #[test]
    fn a_route_allows_what_it_names_in_whatever_case() {
        let allowed = ["websocket", "SPDY/3.1"].map(|name| Protocol::parse(name).expect("a protocol"));
        let upgrades = Upgrades::new(&allowed);
        let allow = |name| upgrades.allow(&HeaderValue::from_static(name));
        assert!(allow("websocket") && allow("WebSocket") && allow("spdy/3.1"));
        assert!(!allow("spdy") && !allow("SPDY/3") && !allow("tcp"));
        let now = Instant::now();
        let told = [0, 1, 61, 62].map(|seconds| upgrades.may_tell(now + Duration::from_secs(seconds)));
        assert_eq!(told, [true, false, true, false]);
    }

    #[test]
    fn an_answer_switches_to_what_was_asked_for_and_to_nothing_else() {
        let switches = |named: &[&'static str]| {
            let mut response = ResponseHeader::build(101, None).expect("a response");
            named.iter().for_each(|name| response.append_header("upgrade", *name).map(drop).expect("a field"));
            agrees(&response, &HeaderValue::from_static("tcp"))
        };
        assert!(switches(&["tcp"]) && switches(&["TCP"]));
        assert!(!switches(&[]) && !switches(&["tcp, x"]) && !switches(&["tcp", "tcp"]) && !switches(&["websocket"]));
    }
}
