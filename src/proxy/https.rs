//! From HTTP to HTTPS: responses to the challenges of certificate issuers, redirects from a listener in clear text, and
//! `Strict-Transport-Security`, which makes browsers use HTTPS (RFC 6797).

use bytes::Bytes;
use http::uri::Authority;
use http::{HeaderName, HeaderValue, Method, StatusCode, header};
use pingora::http::{RequestHeader, ResponseHeader};

use super::exchange::Exchange;
use crate::client::challenges::Challenges;
use crate::client::listener::Redirect;
use crate::error::refusal;
use crate::filter::{Answer, Verdict};

/// Responds to an issuer's HTTP challenge (RFC 8555 §8.3). `None`: the request is for something else, or for a token
/// that no order waits for.
pub fn prove(challenges: &Challenges, request: &RequestHeader) -> Option<Verdict> {
    let answer = challenges.http(request.uri.path())?;
    if ![Method::GET, Method::HEAD].contains(&request.method) {
        return None;
    }
    challenges.metrics.http_01.inc();
    let headers = vec![(header::CONTENT_TYPE, HeaderValue::from_static("application/octet-stream"))];
    Some(Verdict::Answer(Answer { status: StatusCode::OK, headers, body: Bytes::copy_from_slice(answer.as_bytes()) }))
}

/// Responds on a listener that only redirects to HTTPS. `None`: the listener serves requests.
pub fn redirect(exchange: &Exchange, request: &RequestHeader) -> Option<Verdict> {
    let redirect = exchange.client.connection.as_ref()?.listener.https.redirect?;
    let host = request.headers.get(header::HOST).and_then(|host| host.to_str().ok()).unwrap_or_default();
    let target = request.uri.path_and_query().map_or("/", |target| target.as_str());
    let Some(location) = location(redirect, host, target) else {
        return Some(Verdict::from(&refusal::HEADER_HOST));
    };
    let status = StatusCode::from_u16(redirect.status).unwrap_or(StatusCode::PERMANENT_REDIRECT);
    Some(Verdict::Answer(Answer { status, headers: vec![(header::LOCATION, location)], body: Bytes::new() }))
}

/// The HTTPS URL of the requested resource. `None`: the request names no valid host.
fn location(redirect: Redirect, host: &str, target: &str) -> Option<HeaderValue> {
    let authority = Authority::try_from(host).ok()?;
    let name = authority.host();
    if name.is_empty() || host.contains('@') {
        return None;
    }
    // The target of `OPTIONS *` has no path.
    let target = if target.starts_with('/') { target } else { "/" };
    let mut place = format!("https://{name}");
    if redirect.port != 443 {
        place += &format!(":{}", redirect.port);
    }
    for byte in target.bytes() {
        // URLs contain ASCII only (RFC 3986 §2).
        match byte {
            byte if byte.is_ascii_graphic() => place.push(char::from(byte)),
            byte => place += &format!("%{byte:02X}"),
        }
    }
    HeaderValue::try_from(place).ok()
}

/// Sets `Strict-Transport-Security` if the listener requires it. It must not be sent in clear text (RFC 6797 §7.2).
pub fn insist(exchange: &Exchange, response: &mut ResponseHeader) {
    let connection = exchange.client.connection.as_ref().filter(|connection| connection.tls().is_some());
    if let Some(hsts) = connection.and_then(|connection| connection.listener.https.hsts.clone()) {
        // This replaces the upstream's own field: a browser uses only the first.
        let name: HeaderName = header::STRICT_TRANSPORT_SECURITY;
        let _ = response.insert_header(name, hsts);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_secure_place_has_the_same_host_and_target() {
        let to = |port, host: &str, target: &str| {
            location(Redirect { port, status: 308 }, host, target).map(|place| place.to_str().unwrap().to_owned())
        };
        assert_eq!(to(443, "a.test", "/x?y=1").as_deref(), Some("https://a.test/x?y=1"));
        assert_eq!(to(443, "a.test:80", "/").as_deref(), Some("https://a.test/"));
        assert_eq!(to(8443, "a.test:8080", "/").as_deref(), Some("https://a.test:8443/"));
        assert_eq!(to(443, "[::1]:80", "*").as_deref(), Some("https://[::1]/"));
        assert_eq!(to(443, "a.test", "/ä").as_deref(), Some("https://a.test/%C3%A4"));
        assert_eq!(to(443, "a.test", "//evil.test/").as_deref(), Some("https://a.test//evil.test/"));
        for wrong in ["", "evil.test@a.test", "a b", "a/b"] {
            assert_eq!(to(443, wrong, "/"), None, "{wrong}");
        }
    }
}
