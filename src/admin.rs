//! The admin endpoint: `/metrics` for Prometheus, `/healthz` and `/readyz` for supervisors and load balancers, and
//! the entries that other modules add to its [`table`].
//!
//! It is a separate Pingora service with its own thread, because writing a hundred thousand series takes tens of
//! milliseconds, which must not block a worker. It listens on loopback by default; for other addresses there are a
//! token and TLS (`guard`, `reception`).

mod guard;
pub mod page;
pub mod reception;
pub mod reply;
pub mod seats;
pub mod status;
pub mod table;
pub mod trace;
pub mod upstreams;

use std::future::{Future, ready};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures::StreamExt;
use http::{HeaderMap, HeaderValue, Method, StatusCode, header};
use pingora::http::ResponseHeader;
use pingora::protocols::Stream;
use pingora::protocols::http::ServerSession;
use pingora::protocols::l4::socket::SocketAddr;
use pingora::server::ShutdownWatch;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::client::inflight::Inflight;
use crate::metrics::{AdminMetrics, Metrics, StreamGuard};
use crate::party::wait::{NoClient, within};
use guard::{Caller, Peer};
pub use guard::{Hosts, Voucher};
use page::Page;
use reply::{Body, Pieces, Reply};
use seats::{Seat, Seats};
use table::{Ask, Found, Table};

/// Whether the gateway accepts exchanges, as shown by `/readyz`. Clones share it.
#[derive(Clone, Debug, Default)]
pub struct Readiness(Arc<AtomicU8>);

/// The states of [`Readiness`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Ready {
    /// Not all listeners are open yet.
    Starting,
    /// Exchanges are accepted.
    Ready,
    /// The gateway is stopping; active exchanges finish.
    Stopping,
    /// Another process has taken over. Clients with a connection to this process still get "ready", because the
    /// address is served.
    HandedOver,
}

impl Readiness {
    /// The state [`Ready::Starting`].
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets the state for all clones.
    pub fn set(&self, ready: Ready) {
        self.0.store(ready as u8, Ordering::Release);
    }

    /// The current state.
    pub fn now(&self) -> Ready {
        match self.0.load(Ordering::Acquire) {
            0 => Ready::Starting,
            1 => Ready::Ready,
            2 => Ready::Stopping,
            _ => Ready::HandedOver,
        }
    }
}

/// The admin endpoint's table and settings.
pub struct Admin {
    table: Table,
    page: Page,
    metrics: AdminMetrics,
    streams: Arc<Semaphore>,
    seats: Arc<Seats>,
    /// The requests that are being answered.
    answering: Arc<Inflight>,
    token: Option<String>,
    /// `None`: no TLS; else whether all TLS clients have presented a certificate.
    tls: Option<bool>,
    hosts: Hosts,
}

/// Time limit for a request header, from the connection or the last response: longer than a scrape interval.
const REQUEST: Duration = Duration::from_secs(75);

/// Time limit for a whole request body.
const BODY: Duration = Duration::from_secs(10);

/// Longest request body.
const BODY_BYTES_MAX: usize = 64 << 10;

/// Time limit for a client to read a response, or a part of a streaming one.
const ANSWER: Duration = Duration::from_secs(30);

/// How long an idle connection is kept.
const KEPT_SECONDS: u64 = 65;

impl Admin {
    /// An admin endpoint with these limits on connections and streaming responses, for requests to these hosts.
    pub fn new(metrics: Metrics, readiness: Readiness, seats_max: usize, streams_max: usize, hosts: Hosts) -> Self {
        let admin = Admin {
            table: Table::default(),
            page: Page::new(),
            metrics: metrics.admin(),
            streams: Arc::new(Semaphore::new(streams_max.min(Semaphore::MAX_PERMITS))),
            seats: Seats::new(seats_max, metrics.admin()),
            answering: Arc::default(),
            token: None,
            tls: None,
            hosts,
        };
        let scrape = move |_: &Ask| Reply::whole(prometheus::TEXT_FORMAT, metrics.render());
        let readyz = move |_: &Ask| match readiness.now() {
            Ready::Starting => Reply::text("starting\n").with_status(StatusCode::SERVICE_UNAVAILABLE),
            Ready::Ready | Ready::HandedOver => Reply::text("ready\n"),
            Ready::Stopping => Reply::text("stopping\n").with_status(StatusCode::SERVICE_UNAVAILABLE),
        };
        admin
            .get("/metrics", "what it counts, for Prometheus", scrape)
            .get("/healthz", "200 while the process lives", |_| Reply::text("ok\n"))
            .get("/readyz", "200 while exchanges are accepted, else 503 with the reason", readyz)
    }

    /// Requires this token.
    pub fn with_token(mut self, token: Option<String>) -> Self {
        self.token = token;
        self
    }

    /// States that TLS is used, and whether all TLS clients have presented a certificate.
    pub fn with_tls(mut self, certified: Option<bool>) -> Self {
        self.tls = certified;
        self
    }

    /// The origin of a request.
    fn caller(&self, http: &ServerSession) -> Caller {
        let peer = peer(http);
        let headers = &http.req_header().headers;
        let known = self.tls == Some(true) || self.token.as_ref().is_some_and(|token| guard::shows(headers, token));
        Caller { peer, secure: self.tls.is_some(), known }
    }

    /// Adds a page at `path`; see [`table`]. `says` is its description in the index.
    pub fn get(
        mut self,
        path: &'static str,
        says: &'static str,
        answer: impl Fn(&Ask) -> Reply + Send + Sync + 'static,
    ) -> Self {
        self.table.add(Method::GET, path, says, ANSWER, move |ask| ready(answer(&ask)));
        self
    }

    /// Adds an operation at `path`. Its response may take up to half a minute.
    pub fn post<F>(
        self,
        path: &'static str,
        says: &'static str,
        answer: impl Fn(Ask) -> F + Send + Sync + 'static,
    ) -> Self
    where
        F: Future<Output = Reply> + Send + 'static,
    {
        self.post_within(path, says, ANSWER, answer)
    }

    /// The same with another time limit.
    pub fn post_within<F>(
        mut self,
        path: &'static str,
        says: &'static str,
        patience: Duration,
        answer: impl Fn(Ask) -> F + Send + Sync + 'static,
    ) -> Self
    where
        F: Future<Output = Reply> + Send + 'static,
    {
        self.table.add(Method::POST, path, says, patience, answer);
        self
    }

    /// The path in the table, and the response. The body of a request is read only if the client may make changes.
    async fn answer(&self, http: &mut ServerSession) -> (&'static str, Reply) {
        let caller = self.caller(http);
        let request = http.req_header();
        let (method, uri) = (request.method.clone(), request.uri.clone());
        if let Err(why) = self.hosts.check(caller, &request.headers) {
            return ("_other", Reply::error(StatusCode::FORBIDDEN, why));
        }
        // The state for load balancers and supervisors is not secret.
        let open = matches!(uri.path(), "/healthz" | "/readyz");
        if self.token.is_some() && !caller.known && caller.peer != Peer::Unix && !open {
            let answer = Reply::error(StatusCode::UNAUTHORIZED, "a token is required: admin.token");
            let ways = HeaderValue::from_static("Bearer, Basic realm=\"forebay\"");
            return ("_other", answer.with_header(header::WWW_AUTHENTICATE, ways));
        }
        let (entry, parts) = match self.table.find(&method, uri.path()) {
            Found::Entry(entry, parts) => (entry, parts),
            Found::Nothing if uri.path() == "/" && matches!(method, Method::GET | Method::HEAD) => {
                let page = wants_html(&http.req_header().headers);
                return ("/", if page { self.page.answer() } else { Reply::text(self.table.index()) });
            }
            Found::Nothing => {
                return ("_other", Reply::text("not found; see /\n").with_status(StatusCode::NOT_FOUND));
            }
            Found::Methods(methods) => {
                let answer = Reply::text(format!("only {methods}\n")).with_status(StatusCode::METHOD_NOT_ALLOWED);
                let allow = HeaderValue::from_str(&methods).unwrap_or(HeaderValue::from_static("GET, HEAD"));
                return ("_other", answer.with_header(header::ALLOW, allow));
            }
        };
        let html = wants_html(&request.headers);
        let mut body = Bytes::new();
        if entry.method == Method::POST {
            if let Err(why) = guard::check(caller, &http.req_header().headers) {
                return (entry.path, Reply::error(StatusCode::FORBIDDEN, why));
            }
            match read_body(http).await {
                Ok(read) => body = read,
                Err(answer) => return (entry.path, answer),
            }
        }
        let voucher = voucher(http, caller);
        let ask = Ask::new(parts, &uri, html, voucher, body);
        let answer = within(entry.patience, NoClient::Operator, (entry.answer)(ask)).await;
        let late = || Reply::error(StatusCode::GATEWAY_TIMEOUT, "this takes too long; it may still complete");
        (entry.path, answer.unwrap_or_else(late))
    }

    /// Admits a streaming response, unless there are too many: then returns an error response.
    fn admit(&self, answer: Reply) -> (Reply, Option<Open>) {
        if !answer.goes_on() {
            return (answer, None);
        }
        match self.streams.clone().try_acquire_owned() {
            Ok(permit) => (answer, Some(Open { _permit: permit, _counted: self.metrics.stream() })),
            Err(_) => {
                let full = Reply::error(StatusCode::SERVICE_UNAVAILABLE, "too many streams are open: admin.streams");
                (full.with_header(header::RETRY_AFTER, HeaderValue::from_static("5")), None)
            }
        }
    }
}

/// An active streaming response.
struct Open {
    _permit: OwnedSemaphorePermit,
    _counted: StreamGuard,
}

fn peer(http: &ServerSession) -> Peer {
    match (http.client_addr(), http.server_addr()) {
        (_, Some(SocketAddr::Unix(_))) | (Some(SocketAddr::Unix(_)), _) => Peer::Unix,
        (Some(SocketAddr::Inet(address)), _) => Peer::Tcp(address.ip()),
        _ => Peer::Unknown,
    }
}

fn voucher(http: &ServerSession, caller: Caller) -> Voucher {
    match (http.client_addr(), http.server_addr()) {
        _ if caller.known || caller.peer == Peer::Unix => Voucher::Shown,
        (Some(SocketAddr::Inet(client)), Some(SocketAddr::Inet(server))) => {
            Voucher::Connection { client: *client, server: *server }
        }
        _ => Voucher::Nothing,
    }
}

fn wants_html(headers: &HeaderMap) -> bool {
    headers.get(header::ACCEPT).is_some_and(|accept| memchr::memmem::find(accept.as_bytes(), b"text/html").is_some())
}

/// Reads the body of a request if its method allows one.
async fn read_body(http: &mut ServerSession) -> Result<Bytes, Reply> {
    let too_large = || {
        let what = format!("a body has at most {BODY_BYTES_MAX} bytes");
        Err(Reply::error(StatusCode::PAYLOAD_TOO_LARGE, &what))
    };
    let headers = &http.req_header().headers;
    let length = headers.get(header::CONTENT_LENGTH).and_then(|length| length.to_str().ok()?.parse::<usize>().ok());
    if length.is_some_and(|length| length > BODY_BYTES_MAX) {
        return too_large();
    }
    let expects =
        headers.get(header::EXPECT).is_some_and(|expect| expect.as_bytes().eq_ignore_ascii_case(b"100-continue"));
    let read = async {
        if expects {
            http.write_continue_response().await?;
        }
        let mut body = BytesMut::new();
        while let Some(piece) = http.read_request_body().await? {
            body.extend_from_slice(&piece);
            if body.len() > BODY_BYTES_MAX {
                break;
            }
        }
        Ok::<_, Box<pingora::Error>>(body.freeze())
    };
    match within(BODY, NoClient::Operator, read).await {
        Some(Ok(body)) if body.len() > BODY_BYTES_MAX => too_large(),
        Some(Ok(body)) => Ok(body),
        Some(Err(error)) => Err(Reply::error(StatusCode::BAD_REQUEST, &format!("the body could not be read: {error}"))),
        None => Err(Reply::error(StatusCode::REQUEST_TIMEOUT, "the body did not come in time")),
    }
}

impl Admin {
    /// Handles one request. Returns the connection if it can be reused.
    async fn serve(&self, mut http: ServerSession, seat: &Seat, shutdown: &ShutdownWatch) -> Option<Stream> {
        match seat.wait(within(REQUEST, NoClient::Operator, http.read_request())).await? {
            Some(Ok(true)) => {}
            // Port scans and closed connections are not worth a log line.
            Some(Ok(false)) | None => return None,
            Some(Err(error)) => {
                tracing::debug!("a request to the admin endpoint could not be read: {error}");
                return None;
            }
        }
        let _answering = self.answering.enter();
        let (path, answer) = self.answer(&mut http).await;
        let (answer, _open) = self.admit(answer);
        self.metrics.count(path, answer.0.status().as_u16());
        // The rest of a body is not read, so the connection cannot be reused.
        let whole = http.is_body_empty() || http.is_body_done();
        http.set_keepalive((!*shutdown.borrow() && whole && !answer.goes_on()).then_some(KEPT_SECONDS));
        let (parts, body) = answer.0.into_parts();
        let header = ResponseHeader::from(parts);
        let sent = match body {
            Body::Whole(body) => in_time(send(http, header, body)).await,
            Body::Stream(pieces) => stream(http, header, pieces, shutdown.clone()).await,
        };
        sent.unwrap_or_else(|error| {
            tracing::debug!("an answer of the admin endpoint could not be sent: {error}");
            None
        })
    }
}

/// The connection after a response, if it can be reused.
type Sent = pingora::Result<Option<Stream>>;

async fn send(mut http: ServerSession, mut header: ResponseHeader, body: Bytes) -> Sent {
    header.insert_header(header::CONTENT_LENGTH, body.len())?;
    let head = http.req_header().method == Method::HEAD;
    http.write_response_header(Box::new(header)).await?;
    if !head {
        http.write_response_body(body, true).await?;
    }
    // Only the stream matters: Pingora does not read ahead.
    Ok(http.finish().await?.map(|kept| kept.into_parts().0))
}

/// Streams data until it ends, the client leaves or stops reading, or the gateway stops.
async fn stream(
    mut http: ServerSession,
    mut header: ResponseHeader,
    mut pieces: Pieces,
    mut stop: ShutdownWatch,
) -> Sent {
    if http.req_header().method == Method::HEAD {
        pieces = Box::pin(futures::stream::empty());
    }
    if http.req_header().version == http::Version::HTTP_11 {
        header.insert_header(header::TRANSFER_ENCODING, "chunked")?;
    }
    in_time(http.write_response_header(Box::new(header))).await?;
    loop {
        let piece = tokio::select! {
            piece = pieces.next() => piece,
            // The client sends nothing more, so this completes when it disconnects.
            _ = http.read_body_or_idle(true) => return Ok(None),
            _ = stop.changed() => None,
        };
        let Some(piece) = piece else { break };
        in_time(http.write_response_body(piece, false)).await?;
    }
    in_time(http.finish()).await?;
    Ok(None)
}

/// Sends a part of a response, within the time limit of the client.
async fn in_time<T>(part: impl Future<Output = pingora::Result<T>>) -> pingora::Result<T> {
    let slow = || pingora::Error::e_explain(pingora::ErrorType::WriteTimedout, "the client did not read it in time");
    within(ANSWER, NoClient::Operator, part).await.unwrap_or_else(slow)
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
    use tokio::sync::watch;

    use super::*;

    fn admin() -> (Admin, Readiness) {
        let readiness = Readiness::new();
        (Admin::new(Metrics::new(0, Vec::new()), readiness.clone(), 8, 1, Hosts::default()), readiness)
    }

    /// Sends these bytes to an admin endpoint that serves one request in the background.
    async fn begin(admin: &Arc<Admin>, sent: &[u8]) -> (DuplexStream, tokio::task::JoinHandle<bool>) {
        let (mut client, server) = tokio::io::duplex(1 << 20);
        client.write_all(sent).await.unwrap();
        let admin = admin.clone();
        let served = tokio::spawn(async move {
            let (_keep, shutdown) = watch::channel(false);
            let session = ServerSession::new_http1(Box::new(server));
            let seat = admin.seats.take().expect("a seat");
            admin.serve(session, &seat, &shutdown).await.is_some()
        });
        (client, served)
    }

    /// The response to these bytes, up to the end of the connection or of the response, and whether the connection
    /// can be reused.
    async fn exchange_with(admin: Admin, sent: &[u8]) -> (String, bool) {
        let (mut client, served) = begin(&Arc::new(admin), sent).await;
        let kept = served.await.unwrap();
        let mut received = Vec::new();
        // The other end is dropped by now.
        client.read_to_end(&mut received).await.unwrap();
        (String::from_utf8(received).unwrap(), kept)
    }

    async fn exchange(sent: &str) -> (String, bool) {
        exchange_with(admin().0, sent.as_bytes()).await
    }

    async fn get(admin: Admin, path: &str) -> String {
        exchange_with(admin, format!("GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n").as_bytes()).await.0
    }

    #[tokio::test]
    async fn readyz_follows_the_gateway_and_healthz_does_not() {
        for (ready, status, text) in [
            (Ready::Starting, 503, "starting\n"),
            (Ready::Ready, 200, "ready\n"),
            (Ready::Stopping, 503, "stopping\n"),
            (Ready::HandedOver, 200, "ready\n"),
        ] {
            let (one, readiness) = admin();
            readiness.set(ready);
            let answer = get(one, "/readyz").await;
            assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")) && answer.ends_with(text), "{answer}");
            let (one, readiness) = admin();
            readiness.set(ready);
            assert!(get(one, "/healthz").await.starts_with("HTTP/1.1 200 "));
        }
    }

    #[tokio::test]
    async fn a_page_that_has_pointed_its_name_here_is_shown_nothing() {
        for request in ["GET /metrics", "GET /", "GET /healthz", "HEAD /metrics", "GET /nothing", "POST /metrics"] {
            let (answer, _) = exchange(&format!("{request} HTTP/1.1\r\nHost: rebound.example\r\n\r\n")).await;
            assert!(answer.starts_with("HTTP/1.1 403 "), "{request}: {answer}");
            assert!(!answer.contains("forebay_"), "{request}: {answer}");
        }
    }

    #[tokio::test]
    async fn metrics_come_in_the_text_format() {
        let answer = get(admin().0, "/metrics").await;
        assert!(answer.to_ascii_lowercase().contains("content-type: text/plain; version=0.0.4\r\n"), "{answer}");
        assert!(answer.contains("forebay_build_info{"));
    }

    #[tokio::test]
    async fn the_index_names_every_path() {
        let index = get(admin().0.get("/added", "what was added", |_| Reply::text("")), "/").await;
        for path in ["/metrics", "/healthz", "/readyz", "/added"] {
            assert!(index.contains(&format!("GET  {path} ")), "{path} is missing in {index}");
        }
    }

    #[tokio::test]
    async fn other_paths_are_not_found_and_other_methods_not_allowed() {
        assert!(get(admin().0, "/metrics/").await.starts_with("HTTP/1.1 404 "));
        assert!(exchange("POST /config HTTP/1.1\r\nHost: localhost\r\n\r\n").await.0.starts_with("HTTP/1.1 404 "));
        let (answer, _) = exchange("POST /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n").await;
        assert!(answer.starts_with("HTTP/1.1 405 "), "{answer}");
        assert!(answer.to_ascii_lowercase().contains("allow: get, head\r\n"), "{answer}");
    }

    #[tokio::test]
    async fn a_connection_is_kept_between_scrapes() {
        let (answer, kept) = exchange("GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n").await;
        assert!(answer.starts_with("HTTP/1.1 200 OK\r\n") && answer.ends_with("\r\n\r\nok\n"), "{answer}");
        assert!(kept);
    }

    #[tokio::test]
    async fn head_gets_the_length_without_the_body() {
        let (answer, kept) = exchange("HEAD /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n").await;
        assert!(
            answer.to_ascii_lowercase().contains("content-length: 3\r\n") && answer.ends_with("\r\n\r\n"),
            "{answer}"
        );
        assert!(kept);
    }

    #[tokio::test]
    async fn a_request_whose_body_is_not_read_closes_its_connection() {
        let (answer, kept) =
            exchange("POST /metrics HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n").await;
        assert!(answer.starts_with("HTTP/1.1 405 "), "{answer}");
        assert!(!kept);
    }

    #[tokio::test]
    async fn a_change_from_nobody_knows_where_is_not_made() {
        let admin = admin().0.post("/change", "changes it", |_| async { unreachable!("it was made") });
        let request = "POST /change HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n";
        let (answer, _) = exchange_with(admin, request.as_bytes()).await;
        assert!(
            answer.starts_with("HTTP/1.1 403 ") && answer.contains("\"error\": \"changes are accepted"),
            "{answer}"
        );
    }

    #[tokio::test]
    async fn streams_are_as_many_as_may_be_and_end_with_their_clients() {
        let admin = admin().0.get("/events", "goes on", |_| {
            let first = futures::stream::iter([reply::event("one", "1")]);
            Reply::events(Box::pin(first.chain(futures::stream::pending())))
        });
        let admin = Arc::new(admin);
        let request = b"GET /events HTTP/1.1\r\nHost: localhost\r\n\r\n";
        let (mut client, served) = begin(&admin, request).await;
        let mut received = String::new();
        while !received.contains("event: one\ndata: 1\n\n") {
            let mut piece = [0; 1024];
            let length = client.read(&mut piece).await.unwrap();
            received.push_str(std::str::from_utf8(&piece[..length]).unwrap());
        }
        assert!(received.to_ascii_lowercase().contains("content-type: text/event-stream\r\n"), "{received}");
        let (mut second, refused) = begin(&admin, request).await;
        assert!(refused.await.unwrap(), "its connection is of use still");
        let mut answer = String::new();
        second.read_to_string(&mut answer).await.unwrap();
        assert!(answer.starts_with("HTTP/1.1 503 ") && answer.contains("admin.streams"), "{answer}");
        drop(client);
        assert!(!served.await.unwrap());
        assert_eq!(admin.streams.available_permits(), 1);
    }

    #[tokio::test]
    async fn garbage_gets_no_answer() {
        assert_eq!(exchange("\x16\x03\x01 no http\r\n\r\n").await, (String::new(), false));
    }

    #[tokio::test(start_paused = true)]
    async fn a_header_that_never_ends_is_cut() {
        let (_client, server) = tokio::io::duplex(1024);
        let (_keep, shutdown) = watch::channel(false);
        let session = ServerSession::new_http1(Box::new(server));
        let admin = admin().0;
        let seat = admin.seats.take().expect("a seat");
        assert!(admin.serve(session, &seat, &shutdown).await.is_none());
    }
}
