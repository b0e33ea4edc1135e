//! What concerns the client's connection alone, and ends here (RFC 9110 §7.6.1).
//!
//! It is removed before routes and filters see the request: else a client could have what a filter sets for the endpoint removed,
//! by naming it in `Connection`. Three of these fields say something that is needed later, and stay in one form each:
//! `TE: trailers`, `Upgrade: websocket` of a request that can be one, and `Transfer-Encoding`, which is framing.

use http::header::{
    CONNECTION, CONTENT_LENGTH, HOST, PROXY_AUTHENTICATE, PROXY_AUTHORIZATION, TE, TRANSFER_ENCODING, UPGRADE,
};
use http::{HeaderMap, HeaderName, HeaderValue, Method, Version};
use pingora::http::RequestHeader;

use super::names::is_hearsay;
use crate::error::{Refusal, refusal};
use crate::framing::is_token;

/// More options than these are none: each costs a look-up.
const OPTIONS_MAX: usize = 16;

const KEEP_ALIVE: HeaderName = HeaderName::from_static("keep-alive");
const PROXY_CONNECTION: HeaderName = HeaderName::from_static("proxy-connection");
const HTTP2_SETTINGS: HeaderName = HeaderName::from_static("http2-settings");

/// Fields that go whether `Connection` names them or not.
const ENDS_HERE: [HeaderName; 6] =
    [CONNECTION, KEEP_ALIVE, PROXY_CONNECTION, HTTP2_SETTINGS, PROXY_AUTHENTICATE, PROXY_AUTHORIZATION];

/// Removes what ends here.
///
/// # Errors
///
/// `Connection` names what concerns more than the connection, what is no token, or too much.
pub fn end(request: &mut RequestHeader) -> Result<(), &'static Refusal> {
    let known = |name: &HeaderName| ENDS_HERE.contains(name) || *name == TE || *name == UPGRADE;
    if !request.headers.keys().any(known) {
        return Ok(());
    }
    let named = named(&request.headers)?;
    let (websocket, trailers) = (is_websocket(request), takes_trailers(&request.headers));
    for name in ENDS_HERE.iter().chain(&named).chain([&TE, &UPGRADE]) {
        request.remove_header(name);
    }
    // A field of this name was there before; it cannot be refused now.
    if trailers {
        let _ = request.insert_header(TE, HeaderValue::from_static("trailers"));
    }
    if websocket {
        let _ = request.insert_header(UPGRADE, HeaderValue::from_static("websocket"));
    }
    Ok(())
}

/// The further fields that `Connection` names. Most requests name none.
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

/// What no client can mean for this connection alone: how the request is framed, where it goes, and what a proxy in front of us says
/// of the client. A proxy that passes `Connection` on as it came would have its own word removed.
fn is_protected(name: &HeaderName) -> bool {
    [HOST, CONTENT_LENGTH, TRANSFER_ENCODING].contains(name) || is_hearsay(name.as_str())
}

/// Whether this asks for a WebSocket (RFC 6455 §4.1), and for nothing else: over HTTP/1.1, by a GET without a body, and with an
/// `Upgrade` that `Connection` names (RFC 9110 §7.8).
fn is_websocket(request: &RequestHeader) -> bool {
    let headers = &request.headers;
    let mut protocols = members(headers, &UPGRADE);
    let websocket = protocols.next().is_some_and(|protocol| protocol.eq_ignore_ascii_case(b"websocket"));
    websocket
        && protocols.next().is_none()
        && members(headers, &CONNECTION).any(|option| option.eq_ignore_ascii_case(b"upgrade"))
        && request.version == Version::HTTP_11
        && request.method == Method::GET
        && !headers.contains_key(CONTENT_LENGTH)
        && !headers.contains_key(TRANSFER_ENCODING)
}

/// Whether `TE` names `trailers` (RFC 9110 §10.1.4).
pub fn takes_trailers(headers: &HeaderMap) -> bool {
    let mut codings = members(headers, &TE).filter_map(|coding| coding.split(|&byte| byte == b';').next());
    codings.any(|coding| coding.trim_ascii().eq_ignore_ascii_case(b"trailers"))
}

/// The members of a list, over all fields of this name (RFC 9110 §5.6.1).
pub fn members<'h>(headers: &'h HeaderMap, name: &HeaderName) -> impl Iterator<Item = &'h [u8]> {
    let members = headers.get_all(name).iter().flat_map(|value| value.as_bytes().split(|&byte| byte == b','));
    members.map(<[u8]>::trim_ascii).filter(|member| !member.is_empty())
}

#[cfg(test)]
mod tests {
    use super::super::tests::request;
    use super::*;

    /// What is left of these fields, in the order of their names.
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
    fn a_websocket_needs_an_upgrade_that_connection_names() {
        let with = |fields: &[(&'static str, &'static str)]| left(fields).contains(&"upgrade: websocket".to_owned());
        let upgrade = ("upgrade", "WebSocket");
        assert!(with(&[upgrade, ("connection", "Upgrade")]));
        assert!(with(&[upgrade, ("connection", "keep-alive, UPGRADE")]));
        assert!(with(&[upgrade, ("connection", "keep-alive"), ("connection", "upgrade")]));
        for fields in [
            &[upgrade][..],
            &[upgrade, ("connection", "keep-alive")],
            &[upgrade, ("connection", "upgraded")],
            &[upgrade, ("connection", "upgrade"), ("content-length", "0")],
            &[upgrade, ("connection", "upgrade"), ("transfer-encoding", "chunked")],
            &[("upgrade", "h2c"), ("connection", "upgrade, http2-settings"), ("http2-settings", "AAMAAABk")],
            &[("upgrade", "h2c, websocket"), ("connection", "upgrade")],
            &[("upgrade", "websocket"), ("upgrade", "h2c"), ("connection", "upgrade")],
            &[("upgrade", "websocket/13"), ("connection", "upgrade")],
            &[("upgrade", ""), ("connection", "upgrade")],
        ] {
            let left = left(fields);
            assert!(
                !left.iter().any(|field| field.starts_with("upgrade") || field.starts_with("http2")),
                "{fields:?}: {left:?}"
            );
        }
        for (method, version) in [("POST", Version::HTTP_11), ("GET", Version::HTTP_10), ("GET", Version::HTTP_2)] {
            let mut request = request(&[upgrade, ("connection", "upgrade")]);
            request.set_method(method.parse().expect("a method"));
            request.set_version(version);
            assert_eq!(end(&mut request), Ok(()));
            assert!(request.headers.is_empty(), "{method} {version:?}");
        }
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
