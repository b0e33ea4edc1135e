//! The admin endpoint: `/metrics` for Prometheus, `/healthz` and `/readyz` for whoever keeps Forebay running.
//!
//! It is a Pingora service of its own, with a thread of its own: writing down a hundred thousand series takes tens of
//! milliseconds, in which no worker may stand still. It has no authentication, which is why it listens on loopback
//! unless told otherwise, and only ever reads.

use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use http::{Method, Response, StatusCode, header};
use pingora::apps::{HttpPersistentSettings, HttpServerApp, ReusedHttpStream};
use pingora::http::ResponseHeader;
use pingora::protocols::http::ServerSession;
use pingora::server::ShutdownWatch;
use pingora::services::listening::Service;
use tokio::time::timeout;

use crate::metrics::Metrics;

/// Whether the gateway takes exchanges, as `/readyz` tells load balancers. Clones share it.
#[derive(Clone, Debug, Default)]
pub struct Readiness(Arc<AtomicU8>);

/// What [`Readiness`] can be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Ready {
    /// Not all listeners are open yet.
    Starting,
    /// Exchanges are taken.
    Ready,
    /// It was told to stop; exchanges in flight end.
    Stopping,
}

impl Readiness {
    /// One that is [`Ready::Starting`].
    pub fn new() -> Self {
        Self::default()
    }

    /// Changes it for everyone who shares it.
    pub fn set(&self, ready: Ready) {
        self.0.store(ready as u8, Ordering::Release);
    }

    /// What it is now.
    pub fn now(&self) -> Ready {
        match self.0.load(Ordering::Acquire) {
            0 => Ready::Starting,
            1 => Ready::Ready,
            _ => Ready::Stopping,
        }
    }
}

/// What answers on the admin endpoint.
pub struct Admin {
    metrics: Metrics,
    readiness: Readiness,
}

/// From the connection, or the answer before, to the last byte of a request header: longer than scrapes lie apart.
const REQUEST: Duration = Duration::from_secs(75);

/// How long a client may take for an answer.
const ANSWER: Duration = Duration::from_secs(30);

/// How long a connection is kept between two requests.
const KEPT_SECONDS: u64 = 65;

const INDEX: &str = "Forebay's admin endpoint\n\n\
    /metrics  what it counts, for Prometheus\n\
    /healthz  200 while the process lives\n\
    /readyz   200 while exchanges are taken, else 503 and why not\n";

impl Admin {
    /// One that shows these.
    pub fn new(metrics: Metrics, readiness: Readiness) -> Self {
        Admin { metrics, readiness }
    }

    /// What is answered; to HEAD as to GET.
    fn answer(&self, method: &Method, path: &str) -> Response<Vec<u8>> {
        let text = |status, body: &str| respond(status, "text/plain; charset=utf-8", body.as_bytes().to_vec());
        let known = matches!(path, "/" | "/metrics" | "/healthz" | "/readyz");
        if known && method != Method::GET && method != Method::HEAD {
            let mut response = text(StatusCode::METHOD_NOT_ALLOWED, "only GET and HEAD\n");
            response.headers_mut().insert(header::ALLOW, header::HeaderValue::from_static("GET, HEAD"));
            return response;
        }
        match path {
            "/" => text(StatusCode::OK, INDEX),
            "/metrics" => respond(StatusCode::OK, prometheus::TEXT_FORMAT, self.metrics.render()),
            "/healthz" => text(StatusCode::OK, "ok\n"),
            "/readyz" => match self.readiness.now() {
                Ready::Starting => text(StatusCode::SERVICE_UNAVAILABLE, "starting\n"),
                Ready::Ready => text(StatusCode::OK, "ready\n"),
                Ready::Stopping => text(StatusCode::SERVICE_UNAVAILABLE, "stopping\n"),
            },
            _ => text(StatusCode::NOT_FOUND, "not found; see /\n"),
        }
    }
}

fn respond(status: StatusCode, content_type: &'static str, body: Vec<u8>) -> Response<Vec<u8>> {
    let length = body.len();
    let mut response = Response::new(body);
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, header::HeaderValue::from_static(content_type));
    headers.insert(header::CONTENT_LENGTH, length.into());
    headers.insert(header::CACHE_CONTROL, header::HeaderValue::from_static("no-store"));
    response
}

#[async_trait]
impl HttpServerApp for Admin {
    async fn process_new_http(
        self: &Arc<Self>,
        mut http: ServerSession,
        shutdown: &ShutdownWatch,
    ) -> Option<ReusedHttpStream> {
        match timeout(REQUEST, http.read_request()).await {
            Ok(Ok(true)) => {}
            // Nobody learns anything from a word about a port scan or a scraper that went away.
            Ok(Ok(false)) | Err(_) => return None,
            Ok(Err(error)) => {
                tracing::debug!("a request to the admin endpoint could not be read: {error}");
                return None;
            }
        }
        // A body is never read, so the connection cannot be kept after one.
        let keep = !*shutdown.borrow() && http.is_body_empty();
        http.set_keepalive(keep.then_some(KEPT_SECONDS));
        let request = http.req_header();
        let head = request.method == Method::HEAD;
        let response = self.answer(&request.method, request.uri.path());
        match timeout(ANSWER, send(http, response, head)).await {
            Ok(Ok(reused)) => reused,
            Ok(Err(error)) => {
                tracing::debug!("an answer of the admin endpoint could not be sent: {error}");
                None
            }
            Err(_) => {
                tracing::debug!("an answer of the admin endpoint was not taken in time");
                None
            }
        }
    }
}

async fn send(
    mut http: ServerSession,
    response: Response<Vec<u8>>,
    head: bool,
) -> pingora::Result<Option<ReusedHttpStream>> {
    let (parts, body) = response.into_parts();
    http.write_response_header(Box::new(ResponseHeader::from(parts))).await?;
    if !head {
        http.write_response_body(body.into(), true).await?;
    }
    let settings = HttpPersistentSettings::for_session(&http);
    let stream = http.finish().await?;
    Ok(stream.map(|stream| ReusedHttpStream::from_reusable_stream(stream, settings)))
}

/// The admin endpoint as a Pingora service: on `host:port` or, if `unix`, on a socket file that its group may use.
pub fn service(address: &str, unix: bool, admin: Admin) -> Service<Admin> {
    let mut service = Service::new("admin".to_owned(), admin);
    service.threads = Some(1);
    if unix {
        service.add_uds(address, Some(Permissions::from_mode(0o660)));
    } else {
        service.add_tcp(address);
    }
    service
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::sync::watch;

    use super::*;

    fn admin() -> (Arc<Admin>, Readiness) {
        let readiness = Readiness::new();
        (Arc::new(Admin::new(Metrics::new(0, Vec::new()), readiness.clone())), readiness)
    }

    fn body(response: Response<Vec<u8>>) -> String {
        String::from_utf8(response.into_body()).unwrap()
    }

    #[test]
    fn readyz_follows_the_gateway_and_healthz_does_not() {
        let (admin, readiness) = admin();
        for (ready, status, text) in
            [(Ready::Starting, 503, "starting\n"), (Ready::Ready, 200, "ready\n"), (Ready::Stopping, 503, "stopping\n")]
        {
            readiness.set(ready);
            let response = admin.answer(&Method::GET, "/readyz");
            assert_eq!(response.status(), status);
            assert_eq!(body(response), text);
            assert_eq!(admin.answer(&Method::GET, "/healthz").status(), 200);
        }
    }

    #[test]
    fn metrics_come_in_the_text_format() {
        let response = admin().0.answer(&Method::GET, "/metrics");
        assert_eq!(response.headers()[header::CONTENT_TYPE], "text/plain; version=0.0.4");
        assert!(body(response).contains("forebay_build_info{"));
    }

    #[test]
    fn the_index_names_every_path() {
        let index = body(admin().0.answer(&Method::GET, "/"));
        for path in ["/metrics", "/healthz", "/readyz"] {
            assert!(index.contains(path), "{path} is missing");
        }
    }

    #[test]
    fn other_paths_are_not_found_and_other_methods_not_allowed() {
        let (admin, _) = admin();
        assert_eq!(admin.answer(&Method::GET, "/metrics/").status(), 404);
        assert_eq!(admin.answer(&Method::POST, "/config").status(), 404);
        let response = admin.answer(&Method::POST, "/metrics");
        assert_eq!(response.status(), 405);
        assert_eq!(response.headers()[header::ALLOW], "GET, HEAD");
    }

    /// What comes back when these bytes are sent, up to the end of the connection or of the answer to them.
    async fn exchange(sent: &[u8]) -> (String, bool) {
        let (mut client, server) = tokio::io::duplex(1 << 20);
        client.write_all(sent).await.unwrap();
        let (_keep, shutdown) = watch::channel(false);
        let session = ServerSession::new_http1(Box::new(server));
        let kept = admin().0.process_new_http(session, &shutdown).await.is_some();
        let mut received = Vec::new();
        // The other end is dropped by now, kept or not.
        client.read_to_end(&mut received).await.unwrap();
        (String::from_utf8(received).unwrap(), kept)
    }

    #[tokio::test]
    async fn a_connection_is_kept_between_scrapes() {
        let (answer, kept) = exchange(b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n").await;
        assert!(answer.starts_with("HTTP/1.1 200 OK\r\n") && answer.ends_with("\r\n\r\nok\n"), "{answer}");
        assert!(kept);
    }

    #[tokio::test]
    async fn head_gets_the_length_without_the_body() {
        let (answer, kept) = exchange(b"HEAD /healthz HTTP/1.1\r\nHost: a\r\n\r\n").await;
        assert!(
            answer.to_ascii_lowercase().contains("content-length: 3\r\n") && answer.ends_with("\r\n\r\n"),
            "{answer}"
        );
        assert!(kept);
    }

    #[tokio::test]
    async fn a_request_with_a_body_closes_its_connection() {
        let (answer, kept) = exchange(b"POST /metrics HTTP/1.1\r\nHost: a\r\nContent-Length: 1000\r\n\r\n").await;
        assert!(answer.starts_with("HTTP/1.1 405 "), "{answer}");
        assert!(!kept);
    }

    #[tokio::test]
    async fn garbage_gets_no_answer() {
        assert_eq!(exchange(b"\x16\x03\x01 no http\r\n\r\n").await, (String::new(), false));
    }

    #[tokio::test(start_paused = true)]
    async fn a_header_that_never_ends_is_cut() {
        let (_client, server) = tokio::io::duplex(1024);
        let (_keep, shutdown) = watch::channel(false);
        let session = ServerSession::new_http1(Box::new(server));
        assert!(admin().0.process_new_http(session, &shutdown).await.is_none());
    }
}
