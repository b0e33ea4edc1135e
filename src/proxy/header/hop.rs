//! Removes fields that concern only the client's connection (RFC 9110 §7.6.1).
//!
//! This happens before routes and filters see the request. Otherwise a client could name a field in `Connection` and
//! thereby remove what a filter sets for the endpoint. Three of these fields are needed later and remain in one form
//! each: `TE: trailers`, an allowed `Upgrade` ([`crate::proxy::upgrade`]), and `Transfer-Encoding`, which is framing.

use http::header::{
    CONNECTION, CONTENT_LENGTH, HOST, PROXY_AUTHENTICATE, PROXY_AUTHORIZATION, TE, TRANSFER_ENCODING, UPGRADE,
};
use http::{HeaderMap, HeaderName, HeaderValue};
use pingora::http::RequestHeader;

use super::names::is_hearsay;
use crate::error::{Refusal, refusal};
use crate::framing::{is_token, members, takes_trailers};
use crate::proxy::upgrade;

/// Maximum number of connection options: each costs a look-up.
const OPTIONS_MAX: usize = 16;

/// Removes the hop-by-hop fields.
///
/// # Errors
///
/// If `Connection` names a field that concerns more than the connection, an invalid token, or too many options.
pub fn end(request: &mut RequestHeader) -> Result<(), &'static Refusal> {
    let own: Vec<_> = request.headers.keys().filter(|name| ends_here(name)).cloned().collect();
    if own.is_empty() {
        return Ok(());
    }
    let named = named(&request.headers)?;
    let upgrade = own.contains(&UPGRADE).then(|| upgrade::wish(request)).flatten();
    let trailers = own.contains(&TE) && takes_trailers(&request.headers);
    for name in own.iter().chain(&named) {
        request.remove_header(name);
    }
    // The name and the value were valid before, so this cannot fail.
    if trailers {
        let _ = request.insert_header(TE, HeaderValue::from_static("trailers"));
    }
    if let Some(protocol) = upgrade {
        let _ = request.insert_header(UPGRADE, protocol);
    }
    Ok(())
}

/// Whether the field is removed or changed even if `Connection` does not name it.
fn ends_here(name: &HeaderName) -> bool {
    match *name {
        CONNECTION | PROXY_AUTHENTICATE | PROXY_AUTHORIZATION | TE | UPGRADE => true,
        _ => matches!(name.as_str(), "keep-alive" | "proxy-connection" | "http2-settings"),
    }
}

/// The additional fields that `Connection` names. Most requests name none.
fn named(headers: &HeaderMap) -> Result<Vec<HeaderName>, &'static Refusal> {
    let mut named = Vec::new();
    for (count, option) in members(headers, &CONNECTION).enumerate() {
        if count == OPTIONS_MAX || !option.iter().copied().all(is_token) {
            return Err(&refusal::HEADER_CONNECTION);
        }
        if option.eq_ignore_ascii_case(b"close") || option.eq_ignore_ascii_case(b"keep-alive") {
            continue;
        }
        let name = HeaderName::from_bytes(option).map_err(|_| &refusal::HEADER_CONNECTION)?;
        if is_protected(&name) {
            return Err(&refusal::HEADER_CONNECTION);
        }
        named.push(name);
    }
    Ok(named)
}

/// Whether a field concerns more than one connection: framing, destination, and information about the client from a
/// proxy in front of Forebay. Removing them would let a client delete what a proxy that passes `Connection` on has
/// added.
fn is_protected(name: &HeaderName) -> bool {
    [HOST, CONTENT_LENGTH, TRANSFER_ENCODING].contains(name) || is_hearsay(name.as_str())
}

#[cfg(test)]
mod tests {
    use super::super::tests::request;
    use super::*;

    /// The remaining fields, sorted by name.
    fn left(fields: &[(&'static str, &str)]) -> Vec<String> {
        let mut request = request(fields);
        end(&mut request).expect("nothing that is protected is named");
        let mut left: Vec<_> =
            request.headers.iter().map(|(name, value)| format!("{name}: {}", value.to_str().expect("text"))).collect();
        left.sort_unstable();
        left
    }

    #[test]
    fn what_connection_names_ends_here_and_so_does_what_always_does() {
        let none: &[&str] = &[];
        assert_eq!(left(&[("x-own", "1")]), ["x-own: 1"]);
        assert_eq!(left(&[("connection", "keep-alive"), ("keep-alive", "timeout=5"), ("x-own", "1")]), ["x-own: 1"]);
        assert_eq!(
            left(&[("connection", "X-Edge,, x-role ,close"), ("x-edge", "1"), ("x-role", "2"), ("x-own", "3")]),
            ["x-own: 3"]
        );
        assert_eq!(left(&[("connection", "close"), ("connection", "x-edge"), ("x-edge", "1"), ("x-edge", "2")]), none);
        assert_eq!(
            left(&[("proxy-connection", "keep-alive"), ("proxy-authorization", "x"), ("http2-settings", "x")]),
            none
        );
        assert_eq!(left(&[("connection", "authorization, cookie"), ("authorization", "x"), ("cookie", "a=b")]), none);
        assert_eq!(left(&[("transfer-encoding", "chunked"), ("connection", "close")]), ["transfer-encoding: chunked"]);
    }

    #[test]
    fn of_te_trailers_stay() {
        let none: &[&str] = &[];
        assert_eq!(left(&[("te", "trailers")]), ["te: trailers"]);
        assert_eq!(left(&[("te", "gzip;q=0.5, Trailers"), ("connection", "TE")]), ["te: trailers"]);
        assert_eq!(left(&[("te", "gzip"), ("te", "trailers;x=1")]), ["te: trailers"]);
        assert_eq!(left(&[("te", "gzip, xtrailers")]), none);
    }

    #[test]
    fn an_upgrade_stays_that_may_pass() {
        let of = |method: &str, fields: &[(&'static str, &str)]| {
            let mut request = request(fields);
            request.set_method(method.parse().expect("a method"));
            end(&mut request).expect("nothing that is protected is named");
            (request.headers.get("upgrade").cloned(), request.headers.len())
        };
        let asks = [("connection", "keep-alive, UPGRADE"), ("upgrade", "WebSocket")];
        assert_eq!(of("GET", &asks), (Some(HeaderValue::from_static("websocket")), 1));
        assert_eq!(of("POST", &asks), (None, 0));
        let h2c = [("connection", "upgrade, http2-settings"), ("upgrade", "h2c"), ("http2-settings", "AAMAAABk")];
        assert_eq!(of("GET", &h2c), (None, 0));
    }

    #[test]
    fn connection_must_not_name_what_concerns_more_than_the_connection() {
        for named in [
            "host",
            "Content-Length",
            "close, Transfer-Encoding",
            "X-Forwarded-For",
            "x-forwarded-proto",
            "Forwarded",
            "X-Real-IP",
            "X-Forebay-Mirror",
            "\"X-Forwarded-For\"",
            ":authority",
            "a b",
            "a;b",
            "a/b",
            "a,b,c,d,e,f,g,h,i,j,k,l,m,n,o,p,q",
        ] {
            let mut request = request(&[("connection", named)]);
            assert_eq!(end(&mut request), Err(&refusal::HEADER_CONNECTION), "{named}");
        }
        let mut many = request(&[("connection", "a,b,c,d,e,f,g,h,i,j,k,l,m,n,o,p")]);
        assert_eq!(end(&mut many), Ok(()));
    }
}
