//! Mirrors: a copy of a request goes to another upstream, and its answer to nobody.
//!
//! What is copied is decided in `buffer`, once the body is whole; the copy leaves when the original has been sent, in a task of
//! its own, so that it never slows the original or fails it. The body is shared with the spool of the original, and counted by
//! the budget for as long as the copy needs it. There are only so many copies at a time; what cannot be copied is counted.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Instant;

use http::uri::Authority;
use http::{HeaderName, HeaderValue, Method, StatusCode, Version, header};
use pingora::connectors::http::Connector;
use pingora::http::RequestHeader;
use pingora::protocols::http::client::HttpSession;
use pingora::upstreams::peer::{HttpPeer, Peer};
use pingora::{Error, ErrorSource, ErrorType, Result};
use tokio::time::timeout;

use super::blame;
use super::exchange::{Attempt, Exchange};
use crate::client::spool::Held;
use crate::framing;
use crate::metrics::mirror::{Fate, MirrorMetrics};
use crate::party::{Fault, Party, What};
use crate::phase::Phase;
use crate::upstream::transport::final_status;
use crate::upstream::transport::greeting::Parties;
use crate::upstream::transport::tls::Flaw;
use crate::upstream::{Choice, Outcome, Timeouts, Upstream};

/// Says that a request is a copy, and of which route.
const MARK: HeaderName = HeaderName::from_static("x-forebay-mirror");

/// Of an answer that nobody reads, no more than this is read so that its connection can be kept.
const DISCARDED_BYTES: usize = 1 << 20;

/// Where the copies of a route go.
pub struct Mirror {
    /// The upstream that gets them.
    pub upstream: Arc<Upstream>,
    /// Of all requests, from 0 to 1.
    pub share: f64,
    /// So many at a time.
    pub most: u32,
    /// The name of the route.
    pub route: HeaderValue,
    /// What becomes of them.
    pub metrics: MirrorMetrics,
    /// Connects to upstreams of mirrors.
    pub connector: Arc<Connector>,
    /// Those that are under way.
    pub inflight: AtomicU32,
}

/// A request that is to be copied.
pub struct Copy {
    mirror: Arc<Mirror>,
    body: Option<Held>,
    request: Option<Box<RequestHeader>>,
}

/// What there is of a request's body when it is to be copied.
pub enum Body {
    /// There is none.
    Empty,
    /// It is here whole, in memory.
    Whole(Held),
    /// A part of it is on disk, or there is no memory to keep it for longer.
    Large,
    /// It is passed on as it comes.
    Streamed,
}

impl Mirror {
    /// Whether the next request is to be copied.
    pub fn draws(&self) -> bool {
        self.share >= 1.0 || rand::random::<f64>() < self.share
    }

    /// Notes that a request was not copied.
    pub fn leaves(&self, fate: Fate) {
        self.metrics.count(fate);
    }

    /// A copy of a request with this body, if there can be one.
    pub fn copy(self: &Arc<Self>, body: Body) -> Option<Box<Copy>> {
        let body = match body {
            Body::Empty => None,
            Body::Whole(held) => Some(held),
            Body::Large => {
                self.leaves(Fate::TooLarge);
                return None;
            }
            Body::Streamed => {
                self.leaves(Fate::Streamed);
                return None;
            }
        };
        Some(Box::new(Copy { mirror: Arc::clone(self), body, request: None }))
    }

    /// A place among those that are under way.
    fn enter(self: &Arc<Self>) -> Option<Place> {
        let place = Place(Arc::clone(self));
        // If it is one too many, dropping it takes it back.
        (self.inflight.fetch_add(1, Ordering::Relaxed) < self.most).then_some(place)
    }
}

/// One copy under way.
struct Place(Arc<Mirror>);

impl Drop for Place {
    fn drop(&mut self) {
        self.0.inflight.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Remembers the header that the original is sent with. If its client named no host, what it names is its endpoint and none of
/// the mirror's.
pub fn header(exchange: &mut Exchange, request: &RequestHeader, names_host: bool) {
    if let Some(copy) = exchange.copy.as_deref_mut().filter(|copy| copy.request.is_none()) {
        let request = copy.request.insert(Box::new(request.clone()));
        if !names_host {
            request.remove_header(&header::HOST);
        }
    }
}

/// The original has been sent: its copy follows.
pub fn send(exchange: &mut Exchange) {
    let Some(Copy { mirror, body, request: Some(request) }) = exchange.copy.take().map(|copy| *copy) else { return };
    let Some(place) = mirror.enter() else { return mirror.leaves(Fate::Busy) };
    let parties = exchange.parties();
    tokio::spawn(async move {
        let fate = attempt(&mirror, *request, body, parties).await;
        mirror.metrics.count(fate);
        drop(place);
    });
}

/// Sends the copy to some endpoint and reads the answer away, within the timeouts of that upstream.
async fn attempt(mirror: &Mirror, request: RequestHeader, body: Option<Held>, parties: Option<Parties>) -> Fate {
    let upstream = &mirror.upstream;
    // It goes anywhere: what endpoints are told apart by, requests of the other upstream need not have.
    let Choice::Engaged(engaged) = upstream.select(rand::random(), &[], Instant::now()) else {
        return Fate::NoEndpoint;
    };
    let peer = engaged.peer_for(|| parties);
    let mut attempt = Attempt::new(Arc::clone(upstream), engaged, None, Instant::now());
    let answered = exchange(mirror, &peer, request, body, &mut attempt).await;
    let now = Instant::now();
    match answered {
        Ok(status) => {
            attempt.end(Outcome::Answered(status), now);
            Fate::Answered
        }
        Err(error) => {
            tracing::debug!(upstream = %upstream.name, %error, "a copy of a request failed");
            if !attempt.is_connected() {
                upstream.metrics.connects_failed.inc();
            }
            attempt.end(blame::row(fault(&attempt, &error)).outcome(), now);
            Fate::Failed
        }
    }
}

/// Why a copy came to nothing. Its body was here from the start, so that the endpoint alone was waited for.
fn fault(attempt: &Attempt, error: &Error) -> Fault {
    use ErrorType::{ConnectionClosed, H2Error, ReadError, ReadTimedout, WriteError, WriteTimedout};
    let phase = match (attempt.is_connected(), attempt.status()) {
        (false, _) => return blame::connecting(error),
        (true, None) => Phase::Wait,
        (true, Some(_)) => Phase::Receive,
    };
    match error.etype() {
        // A header that this side would not write.
        _ if *error.esource() == ErrorSource::Internal => Fault::new(Party::Gateway, phase, What::Failed),
        ReadTimedout | WriteTimedout => Fault::new(Party::Endpoint, phase, What::Silent),
        ConnectionClosed | ReadError | WriteError | H2Error => Fault::new(Party::Endpoint, phase, What::Broke),
        _ => Fault::new(Party::Endpoint, phase, What::Malformed),
    }
}

async fn exchange(
    mirror: &Mirror,
    peer: &HttpPeer,
    mut request: RequestHeader,
    body: Option<Held>,
    attempt: &mut Attempt,
) -> Result<StatusCode> {
    let Timeouts { connect, send, wait, receive } = mirror.upstream.timeouts;
    let (mut session, reused) = mirror.connector.get_http_session(peer).await?;
    if let Some(flaw) = Flaw::of(session.digest()) {
        // Dropped with the session: it is not to be given to anybody else, either.
        return Error::e_explain(ErrorType::InvalidCert, flaw.to_string());
    }
    let metrics = &mirror.upstream.metrics;
    if reused {
        metrics.connects_reused.inc()
    } else {
        metrics.connects_new.inc()
    }
    let now = Instant::now();
    attempt.connected(reused, now);
    let transport = &mirror.upstream.transport;
    let outdated = transport.age(session.digest()).filter(|&age| transport.is_outdated(age, rand::random()));
    session.set_write_timeout(Some(send));
    session.set_read_timeout(Some(wait.max(receive)));
    let length = body.as_ref().map(|body| body.pieces.iter().map(|piece| piece.len() as u64).sum());
    let http2 = matches!(session, HttpSession::H2(_));
    let head = request.method == Method::HEAD;
    let own = attempt.endpoint().authority();
    prepare(&mut request, &own, http2.then_some(peer.is_tls()), length, &mirror.route).map_err(Error::into_in)?;
    let whole = async {
        session.write_request_header(Box::new(request)).await?;
        for piece in body.iter().flat_map(|body| &body.pieces) {
            session.write_request_body(piece.clone(), false).await?;
        }
        session.finish_request_body().await?;
        // It is sent: what it held in memory is not needed any more.
        drop(body);
        attempt.sent(Instant::now());
        let status = timeout(wait, final_status(&mut session, head)).await.map_err(|_| late())??;
        attempt.answered(status, Instant::now());
        let mut left = DISCARDED_BYTES;
        while let Some(piece) = timeout(receive, session.read_response_body()).await.map_err(|_| late())?? {
            let Some(rest) = left.checked_sub(piece.len()) else { break };
            left = rest;
        }
        Ok::<_, Box<Error>>(status)
    };
    // Each step has its limit; so have all of them together, however it trickles. An answer that has begun is one; nobody
    // waits for its end.
    let Ok(whole) = timeout(connect + send + wait + receive, whole).await else {
        return attempt.status().ok_or_else(late);
    };
    let status = whole?;
    let is_last = match outdated {
        // Further requests go over another connection, and this one ends with those that it has.
        Some(age) if http2 => {
            attempt.endpoint().renew(age, now);
            false
        }
        outdated => outdated.is_some() || (!http2 && mirror.upstream.has_surplus_connections()),
    };
    if session.response_done() && !is_last {
        mirror.connector.release_http_session(session, peer, peer.idle_timeout()).await;
    }
    Ok(status)
}

fn late() -> Box<Error> {
    Error::new_up(ErrorType::ReadTimedout)
}

/// Makes of the header of an original, which may have been sent over another protocol, that of a copy.
///
/// `own` is the host of an original that named none; `h2` says whether it goes over TLS, if it goes by HTTP/2.
fn prepare(
    request: &mut RequestHeader,
    own: &Authority,
    h2: Option<bool>,
    length: Option<u64>,
    route: &HeaderValue,
) -> Result<()> {
    request.insert_header(MARK, route.clone())?;
    for name in [header::CONNECTION, header::UPGRADE, header::EXPECT, header::TE, header::TRAILER] {
        request.remove_header(&name);
    }
    let version = if h2.is_some() { Version::HTTP_2 } else { Version::HTTP_11 };
    framing::request::apply(framing::request::send(version, length, framing::Body::None), request)?;
    request.set_version(version);
    let host = request.remove_header(&header::HOST);
    let host =
        host.as_ref().map(HeaderValue::as_bytes).or(request.uri.authority().map(|name| name.as_str().as_bytes()));
    let host = host.unwrap_or(own.as_str().as_bytes()).to_vec();
    let Some(tls) = h2 else { return request.insert_header(header::HOST, host) };
    let path = request.uri.path_and_query().cloned().unwrap_or_else(|| http::uri::PathAndQuery::from_static("/"));
    let scheme = if tls { "https" } else { "http" };
    let uri = http::Uri::builder().scheme(scheme).authority(host).path_and_query(path);
    request.set_uri(uri.build().map_err(|_| Error::new(ErrorType::InvalidHTTPHeader))?);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn original(version: Version) -> RequestHeader {
        let mut request = RequestHeader::build("PUT", b"/a?b=c", None).expect("a request");
        request.set_version(version);
        for (name, value) in [("host", "shop:8080"), ("transfer-encoding", "chunked"), ("x-own", "1")] {
            request.insert_header(name, value).expect("a header");
        }
        request
    }

    #[test]
    fn a_copy_is_marked_and_framed_for_the_protocol_that_it_is_sent_with() {
        let route = HeaderValue::from_static("all");
        let own = Authority::from_static("mirror:1");
        for version in [Version::HTTP_11, Version::HTTP_2] {
            let mut copy = original(version);
            prepare(&mut copy, &own, None, Some(3), &route).expect("a copy");
            let field = |name| copy.headers[name].to_str().expect("text");
            let fields = ["host", "content-length", "x-own", "x-forebay-mirror"].map(field);
            assert_eq!((copy.version, fields), (Version::HTTP_11, ["shop:8080", "3", "1", "all"]));
            assert!(!copy.headers.contains_key("transfer-encoding"));

            let mut copy = original(version);
            prepare(&mut copy, &own, Some(true), None, &route).expect("a copy");
            assert_eq!((copy.version, copy.uri.to_string().as_str()), (Version::HTTP_2, "https://shop:8080/a?b=c"));
            assert!(
                ["host", "content-length", "transfer-encoding"].iter().all(|name| !copy.headers.contains_key(*name))
            );
            // An original of HTTP/1.0 that named no host.
            let mut copy = original(version);
            copy.remove_header("host");
            prepare(&mut copy, &own, Some(false), None, &route).expect("a copy");
            assert_eq!(copy.uri.to_string(), "http://mirror:1/a?b=c");
        }
    }
}
