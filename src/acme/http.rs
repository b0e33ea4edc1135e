//! The HTTP client for issuers: HTTP/1.1 over TLS with the common TLS library, one connection per request.
//!
//! An order takes a dozen requests every other month. Keeping connections would save little, and a stale one would
//! fail an order.

use std::future::Future;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use bytes::{Bytes, BytesMut};
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode, Uri, header};
use http_body_util::{BodyExt, Collected};
use instant_acme::{BodyWrapper, BytesResponse, Error, HttpClient};
use pingora::ErrorType;
use pingora::connectors::http::Connector;
use pingora::http::RequestHeader;
use pingora::upstreams::peer::HttpPeer;
use serde::Deserialize;
use xxhash_rust::xxh3::Xxh3;

use crate::config;
use crate::config::acme::Issuer;
use crate::config::upstream::Protocol;
use crate::error::BuildError;
use crate::party::wait::{NoClient, within};
use crate::upstream::transport::final_status;
use crate::upstream::transport::tls::{Flaw, Tls};

/// Longest response. A certificate chain has a few KiB.
const BODY_BYTES_MAX: usize = 1 << 20;
/// Required by RFC 8555 §6.1.
const USER_AGENT: HeaderValue = HeaderValue::from_static(concat!("forebay/", env!("CARGO_PKG_VERSION")));
const PROBLEM: &str = "application/problem+json";

/// The client for one issuer. Clones share its state.
#[derive(Clone)]
pub struct Http(Arc<Inner>);

struct Inner {
    connector: Connector,
    tls: Tls,
    timeout: Duration,
    /// The issuer asked to send no requests until then.
    busy_until: Mutex<Option<SystemTime>>,
}

impl Http {
    /// The client for this issuer.
    ///
    /// # Errors
    ///
    /// The CA file is missing or invalid.
    pub fn build(written: &Issuer) -> Result<Http, Vec<BuildError>> {
        let trust = config::upstream::Tls { ca: written.ca.clone(), ..config::upstream::Tls::default() };
        let tls = Tls::build(&trust, Protocol::Http1, &mut Xxh3::new()).map_err(|errors| {
            let at_ca = |error: BuildError| BuildError::new("ca", error.message);
            errors.into_iter().map(at_ca).collect::<Vec<_>>()
        })?;
        let (connector, timeout) = (Connector::new(None), written.timeouts.request.0);
        Ok(Http(Arc::new(Inner { connector, tls, timeout, busy_until: Mutex::new(None) })))
    }

    /// Until when the issuer asked to send no requests, if it did since the last call (RFC 8555 §6.6).
    pub fn take_busy_until(&self) -> Option<SystemTime> {
        self.0.busy_until.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

impl HttpClient for Http {
    fn request(
        &self,
        request: Request<BodyWrapper<Bytes>>,
    ) -> Pin<Box<dyn Future<Output = Result<BytesResponse, Error>> + Send>> {
        let this = self.0.clone();
        Box::pin(async move {
            let patience = config::units::Time(this.timeout);
            let host = request.uri().host().unwrap_or_default().to_owned();
            let answered = within(this.timeout, NoClient::Issuer, this.ask(request)).await;
            answered.unwrap_or_else(|| Err(other(format!("`{host}` did not answer within {patience}"))))
        })
    }
}

impl Inner {
    async fn ask(&self, request: Request<BodyWrapper<Bytes>>) -> Result<BytesResponse, Error> {
        let (parts, body) = request.into_parts();
        let Ok(body) = body.collect().await.map(Collected::to_bytes);
        let host = parts.uri.host().filter(|_| parts.uri.scheme_str() == Some("https"));
        let Some(host) = host else { return Err(other(format!("`{}` is not an https URL", parts.uri))) };
        let bare = host.trim_matches(['[', ']']);
        let port = parts.uri.port_u16().unwrap_or(443);
        // Runs on the blocking threads of the runtime.
        let found = tokio::net::lookup_host((bare, port)).await;
        let found = found.map_err(|error| other(format!("the name `{bare}` cannot be looked up: {error}")))?;
        let mut failed = other(format!("the name `{bare}` has no address"));
        for address in found {
            let peer = self.peer(address, bare);
            let mut session = match self.connector.get_http_session(&peer).await {
                Ok((session, _)) => session,
                Err(error) => {
                    failed = other(unreachable(host, address, &error));
                    continue;
                }
            };
            if let Some(flaw) = Flaw::of(session.digest()) {
                return Err(other(format!("`{host}` is not trusted: {flaw}")));
            }
            let broke = |error: Box<pingora::Error>| other(format!("the connection to `{host}` broke: {error}"));
            let header = header(&parts, host, port, body.len()).map_err(broke)?;
            session.write_request_header(Box::new(header)).await.map_err(broke)?;
            if !body.is_empty() {
                session.write_request_body(body.clone(), true).await.map_err(broke)?;
            }
            session.finish_request_body().await.map_err(broke)?;
            let status = final_status(&mut session, parts.method == Method::HEAD).await.map_err(broke)?;
            let headers = session.response_header().map(|header| header.headers.clone()).unwrap_or_default();
            let mut answer = BytesMut::new();
            while let Some(piece) = session.read_response_body().await.map_err(broke)? {
                if answer.len() + piece.len() > BODY_BYTES_MAX {
                    return Err(other(format!("the answer of `{host}` is larger than 1MiB")));
                }
                answer.extend_from_slice(&piece);
            }
            return self.answer(host, status, headers, answer.freeze());
        }
        Err(failed)
    }

    fn peer(&self, address: SocketAddr, host: &str) -> HttpPeer {
        let mut peer = HttpPeer::new(address, true, String::new());
        self.tls.set_up(&mut peer, Some(host));
        // `request` limits the time of the whole request.
        peer
    }

    fn answer(&self, host: &str, status: StatusCode, headers: HeaderMap, body: Bytes) -> Result<BytesResponse, Error> {
        if [StatusCode::TOO_MANY_REQUESTS, StatusCode::SERVICE_UNAVAILABLE].contains(&status) {
            let until = retry_after(&headers, SystemTime::now());
            *self.busy_until.lock().unwrap_or_else(PoisonError::into_inner) = until;
        }
        // A proxy in between may respond instead, without a problem document.
        let media = headers.get(header::CONTENT_TYPE).and_then(|media| media.to_str().ok()).unwrap_or_default();
        if (status.is_client_error() || status.is_server_error()) && !media.starts_with(PROBLEM) {
            return Err(other(format!("`{host}` answered {status}")));
        }
        check_directory(&body)?;
        let mut response = Response::new(());
        (*response.status_mut(), *response.headers_mut()) = (status, headers);
        let (parts, ()) = response.into_parts();
        Ok(BytesResponse { parts, body: Box::new(body) })
    }
}

/// The nonce URL of a directory (RFC 8555 §7.1.1). The library assumes that it is valid and would panic otherwise.
#[derive(Deserialize)]
struct Directory {
    #[serde(rename = "newNonce")]
    new_nonce: Option<String>,
}

/// Rejects a directory that would make the library panic.
fn check_directory(body: &[u8]) -> Result<(), Error> {
    // The library checks the other fields itself.
    let Ok(Directory { new_nonce: Some(address) }) = serde_json::from_slice(body) else { return Ok(()) };
    match address.parse::<Uri>() {
        Ok(_) => Ok(()),
        Err(_) => Err(other(format!("`{address}` is not an https URL"))),
    }
}

fn header(parts: &http::request::Parts, host: &str, port: u16, length: usize) -> pingora::Result<RequestHeader> {
    let target = parts.uri.path_and_query().map_or("/", |target| target.as_str());
    let mut request = RequestHeader::build(parts.method.clone(), target.as_bytes(), None)?;
    for (name, value) in &parts.headers {
        request.append_header(name.clone(), value.clone())?;
    }
    let authority = if port == 443 { host.to_owned() } else { format!("{host}:{port}") };
    request.insert_header(header::HOST, authority)?;
    request.insert_header(header::USER_AGENT, USER_AGENT)?;
    request.insert_header(header::CONNECTION, "close")?;
    if length > 0 {
        request.insert_header(header::CONTENT_LENGTH, length)?;
    }
    Ok(request)
}

/// Parses `Retry-After` (RFC 9110 §10.2.3).
fn retry_after(headers: &HeaderMap, now: SystemTime) -> Option<SystemTime> {
    let value = headers.get(header::RETRY_AFTER)?.to_str().ok()?.trim();
    match value.parse() {
        Ok(seconds) => now.checked_add(Duration::from_secs(seconds)),
        Err(_) => httpdate::parse_http_date(value).ok(),
    }
}

fn unreachable(host: &str, address: SocketAddr, error: &pingora::Error) -> String {
    match error.etype() {
        ErrorType::ConnectRefused => format!("`{host}` at {address} refused the connection"),
        ErrorType::ConnectTimedout | ErrorType::TLSHandshakeTimedout => {
            format!("`{host}` at {address} did not accept the connection in time")
        }
        ErrorType::InvalidCert | ErrorType::TLSHandshakeFailure => {
            format!("`{host}` at {address} is not trusted; name its authority with `ca` if it is private: {error}")
        }
        _ => format!("`{host}` at {address} cannot be reached: {error}"),
    }
}

fn other(what: String) -> Error {
    Error::Other(what.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_issuer_that_is_busy_says_until_when() {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1000);
        let until = |value: &'static str| {
            let headers = HeaderMap::from_iter([(header::RETRY_AFTER, HeaderValue::from_static(value))]);
            retry_after(&headers, now)
        };
        assert_eq!(until("30"), Some(now + Duration::from_secs(30)));
        assert_eq!(until("Thu, 01 Jan 1970 00:20:00 GMT"), Some(SystemTime::UNIX_EPOCH + Duration::from_secs(1200)));
        assert_eq!([until("soon"), until("99999999999999999999"), until("18446744073709551615")], [None; 3]);
    }

    #[test]
    fn what_is_no_problem_of_the_issuers_own_is_told_by_its_status() {
        let http = Http::build(&Issuer::default()).expect("a way");
        let answer = |status: u16, media: &'static str| {
            let mut headers = HeaderMap::new();
            headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(media));
            headers.insert(header::RETRY_AFTER, HeaderValue::from_static("60"));
            let status = StatusCode::from_u16(status).expect("a status");
            http.0.answer("ca.test", status, headers, Bytes::new()).map(|answer| answer.parts.status.as_u16())
        };
        assert_eq!(answer(502, "text/html").expect_err("an error").to_string(), "`ca.test` answered 502 Bad Gateway");
        assert_eq!(http.take_busy_until(), None);
        assert_eq!(answer(429, "application/problem+json; charset=utf-8").expect("an answer"), 429);
        assert!(http.take_busy_until().is_some() && http.take_busy_until().is_none());
    }

    #[test]
    fn a_directory_with_an_address_that_is_none_is_refused_before_the_library_sees_it() {
        let http = Http::build(&Issuer::default()).expect("a way");
        let answer = |body: &'static str| {
            let body = Bytes::from_static(body.as_bytes());
            let answer = http.0.answer("ca.test", StatusCode::OK, HeaderMap::new(), body);
            answer.err().map(|error| error.to_string())
        };
        for address in ["file:///etc/passwd", "https://a b/", "", "https://"] {
            let body: &'static str = format!(r#"{{ "newNonce": "{address}", "newOrder": "x" }}"#).leak();
            assert_eq!(answer(body), Some(format!("`{address}` is not an https URL")));
        }
        for body in [r#"{ "newNonce": "https://ca.test/nonce" }"#, r#"{ "status": "valid" }"#, "[]", "{", ""] {
            assert_eq!(answer(body), None, "{body}");
        }
    }

    #[test]
    fn an_authority_that_is_none_is_told_with_its_key() {
        let written = Issuer { ca: Some("/nonexistent/ca.pem".to_owned()), ..Issuer::default() };
        let errors = Http::build(&written).err().expect("an error");
        assert_eq!(errors.iter().map(|error| &*error.path).collect::<Vec<_>>(), ["ca"]);
    }
}
