//! From HTTP to HTTPS: how an issuer of certificates is shown that a name is served here, a listener in clear text that
//! sends its clients to the secure one, and `Strict-Transport-Security`, by which browsers come there by themselves
//! (RFC 6797).

use bytes::Bytes;
use http::uri::Authority;
use http::{HeaderName, HeaderValue, Method, StatusCode, header};
use pingora::http::{RequestHeader, ResponseHeader};

use super::exchange::Exchange;
use crate::client::challenges::Challenges;
use crate::client::connection::Redirect;
use crate::error::refusal;
use crate::filter::{Answer, Verdict};

/// Answers an issuer of certificates that checks that a name is served here (RFC 8555 §8.3). `None`: this request asks
/// for something else, or for a token that no order waits for.
pub fn prove(challenges: &Challenges, request: &RequestHeader) -> Option<Verdict> {
    let answer = challenges.http(request.uri.path())?;
    if ![Method::GET, Method::HEAD].contains(&request.method) {
        return None;
    }
    challenges.metrics.http_01.inc();
    let headers = vec![(header::CONTENT_TYPE, HeaderValue::from_static("application/octet-stream"))];
    Some(Verdict::Answer(Answer { status: StatusCode::OK, headers, body: Bytes::copy_from_slice(answer.as_bytes()) }))
}

/// Answers a request on a listener that does nothing but send its clients to HTTPS. `None`: this one serves requests.
pub fn redirect(exchange: &Exchange, request: &RequestHeader) -> Option<Verdict> {
    let redirect = exchange.client.connection.as_ref()?.listener.redirect?;
    let host = request.headers.get(header::HOST).and_then(|host| host.to_str().ok()).unwrap_or_default();
    let target = request.uri.path_and_query().map_or("/", |target| target.as_str());
    let Some(location) = location(redirect, host, target) else {
        return Some(Verdict::from(&refusal::HEADER_HOST));
    };
    let status = StatusCode::from_u16(redirect.status).unwrap_or(StatusCode::PERMANENT_REDIRECT);
    Some(Verdict::Answer(Answer { status, headers: vec![(header::LOCATION, location)], body: Bytes::new() }))
}

/// The secure place of what was asked for. `None`: no host was named, or none that could be one.
fn location(redirect: Redirect, host: &str, target: &str) -> Option<HeaderValue> {
    let authority = Authority::try_from(host).ok()?;
    let name = authority.host();
    if name.is_empty() || host.contains('@') {
        return None;
    }
    // `OPTIONS *` has no path.
    let target = if target.starts_with('/') { target } else { "/" };
    let mut place = format!("https://{name}");
    if redirect.port != 443 {
        place += &format!(":{}", redirect.port);
    }
    for byte in target.bytes() {
        // What is not ASCII is no part of a URL (RFC 3986 §2).
        match byte {
            byte if byte.is_ascii_graphic() => place.push(char::from(byte)),
            byte => place += &format!("%{byte:02X}"),
        }
    }
    HeaderValue::try_from(place).ok()
}

/// Has browsers come by HTTPS from now on, where the listener says so. Over clear text it would mean nothing (RFC 6797
/// §7.2).
pub fn insist(exchange: &Exchange, response: &mut ResponseHeader) {
    let connection = exchange.client.connection.as_ref().filter(|connection| connection.tls().is_some());
    if let Some(hsts) = connection.and_then(|connection| connection.listener.hsts.clone()) {
        // In place of an upstream's own: a browser goes by the first of two.
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
