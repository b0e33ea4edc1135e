//! A health check with a GET request: the status, and optionally a text in the body.

use std::time::Duration;

use async_trait::async_trait;
use http::uri::{Authority, Scheme, Uri};
use http::{HeaderValue, header};
use memchr::memmem;
use pingora::connectors::http::Connector;
use pingora::http::RequestHeader;
use pingora::protocols::http::client::HttpSession;
use pingora::upstreams::peer::HttpPeer;
use pingora::{OrErr, Result};
use pingora_load_balancing::Backend;
use pingora_load_balancing::health_check::HealthCheck;

use super::connector::connector;
use super::target::{endpoint, sound, wrong};
use crate::config::upstream::health::{HttpCheck, Statuses};
use crate::upstream::endpoint::Endpoint;
use crate::upstream::transport::final_status;
use crate::upstream::transport::limit::{connected, take_limit};
use crate::upstream::transport::tls::Flaw;

/// At most this much of a body is searched for the text.
const BODY_BYTES_MAX: usize = 64 * 1024;

/// Identifies health checks, so that applications can exclude them from statistics.
pub(super) const USER_AGENT: HeaderValue = HeaderValue::from_static("Forebay health check");

/// A GET health check.
pub struct Http {
    connector: &'static Connector,
    path: String,
    host: Option<Authority>,
    statuses: Vec<Statuses>,
    body: Option<memmem::Finder<'static>>,
}

impl Http {
    /// The configured check, already validated.
    pub fn new(written: &HttpCheck) -> Http {
        Http {
            connector: connector(),
            path: written.path.clone(),
            host: written.host.as_deref().and_then(|host| host.parse().ok()),
            statuses: written.statuses.clone(),
            body: written.body.as_ref().map(|text| memmem::Finder::new(text).into_owned()),
        }
    }

    fn judge(&self, status: u16) -> Result<()> {
        if self.statuses.iter().any(|statuses| statuses.contains(status)) {
            return Ok(());
        }
        let expected: Vec<String> = self.statuses.iter().map(ToString::to_string).collect();
        wrong(format!("it answered {status} instead of {}", expected.join(", ")))
    }
}

#[async_trait]
impl HealthCheck for Http {
    async fn check(&self, target: &Backend) -> Result<()> {
        let endpoint = endpoint(target)?;
        let (peer, limit) = alone(endpoint);
        let (mut session, _) = connected(limit, self.connector.get_http_session(&peer)).await?;
        sound(Flaw::of(session.digest()))?;
        let host = host(self.host.as_ref(), endpoint);
        let is_h2 = matches!(session, HttpSession::H2(_));
        let mut request = request("GET", &self.path, &host, is_h2.then_some(peer.is_tls()))?;
        if !is_h2 {
            request.insert_header(header::CONNECTION, "close")?;
        }
        session.write_request_header(Box::new(request)).await?;
        session.finish_request_body().await?;
        self.judge(final_status(&mut session, false).await?.as_u16())?;
        let Some(wanted) = &self.body else { return Ok(()) };
        let mut body = Vec::new();
        while body.len() < BODY_BYTES_MAX
            && let Some(piece) = session.read_response_body().await?
        {
            body.extend_from_slice(&piece[..piece.len().min(BODY_BYTES_MAX - body.len())]);
        }
        match wanted.find(&body) {
            Some(_) => Ok(()),
            None => wrong("the body of its response lacks the expected text"),
        }
    }

    /// Not used: `upstream/health.rs` counts.
    fn health_threshold(&self, _: bool) -> usize {
        1
    }
}

/// A peer with a separate connection, and the time limit of the connection.
pub(super) fn alone(endpoint: &Endpoint) -> (HttpPeer, Duration) {
    let mut peer = *endpoint.peer();
    peer.options.max_h2_streams = 1;
    let limit = take_limit(&mut peer);
    (peer, limit)
}

/// The host of the request: the configured one, or the endpoint's address as written, if that is a valid host.
pub(super) fn host(written: Option<&Authority>, endpoint: &Endpoint) -> Authority {
    written.cloned().unwrap_or_else(|| endpoint.authority())
}

/// A request without a body; `h2`: HTTP/2, and whether it uses TLS.
pub(super) fn request(method: &str, path: &str, host: &Authority, h2: Option<bool>) -> Result<RequestHeader> {
    let mut request = RequestHeader::build(method, path.as_bytes(), None)?;
    match h2 {
        None => request.insert_header(header::HOST, host.as_str())?,
        Some(tls) => {
            // Pingora would derive the authority from the host and always use `https`.
            let scheme = if tls { Scheme::HTTPS } else { Scheme::HTTP };
            let uri = Uri::builder().scheme(scheme).authority(host.clone()).path_and_query(path).build();
            request.set_uri(uri.or_err(pingora::ErrorType::InvalidHTTPHeader, "the path of a health check")?);
        }
    }
    request.insert_header(header::USER_AGENT, USER_AGENT)?;
    Ok(request)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_status_is_good_or_is_told_with_what_was_expected() {
        let written = HttpCheck {
            statuses: vec![Statuses { first: 200, last: 299 }, Statuses { first: 404, last: 404 }],
            ..HttpCheck::default()
        };
        let check = Http::new(&written);
        assert!(check.judge(204).is_ok() && check.judge(404).is_ok() && check.judge(302).is_err());
        let error = check.judge(503).unwrap_err();
        assert_eq!(error.context.as_ref().map(|text| text.as_str()), Some("it answered 503 instead of 200-299, 404"));
    }

    #[test]
    fn a_request_of_http_2_names_its_host_in_the_target() {
        let host = Authority::from_static("shop.test:81");
        let one = request("GET", "/up?a=1", &host, None).unwrap();
        assert_eq!(
            (one.uri.to_string().as_str(), one.headers.get("host").unwrap().as_bytes()),
            ("/up?a=1", &b"shop.test:81"[..])
        );
        for (tls, target) in [(false, "http://shop.test:81/up?a=1"), (true, "https://shop.test:81/up?a=1")] {
            let two = request("GET", "/up?a=1", &host, Some(tls)).unwrap();
            assert_eq!(two.uri.to_string(), target);
            assert!(!two.headers.contains_key("host"));
        }
    }
}
