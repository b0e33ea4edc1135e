//! Requests that Forebay itself sends to an upstream: the calls of filters, and the copies for mirrors.
//!
//! `Line::converse` sends a request with a complete body to one endpoint. A call is such a request whose endpoint is
//! chosen as for an exchange: by the upstream's policy, within its limits, and after a wait in its queue if needed.

use std::collections::BTreeMap;
use std::future::poll_fn;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use bytes::{Bytes, BytesMut};
use http::uri::Authority;
use http::{HeaderValue, Method, Version, header};
use pingora::connectors::ConnectorOptions;
use pingora::connectors::http::Connector;
use pingora::http::{RequestHeader, ResponseHeader};
use pingora::protocols::http::client::HttpSession;
use pingora::upstreams::peer::{HttpPeer, Peer};
use pingora::{Error, ErrorSource, ErrorType, Result};

use super::attempt::Attempt;
use super::blame;
use crate::error::{Refusal, refusal};
use crate::filter::call::{Answered, Call, CallError, Callees, Caller, Calls};
use crate::framing;
use crate::metrics::Metrics;
use crate::metrics::call::{CallMetrics, End};
use crate::party::wait::{NoClient, within};
use crate::party::{Fault, Party, What};
use crate::phase::Phase;
use crate::phase::journal::steps;
use crate::spool::Held;
use crate::upstream::transport::tls::Flaw;
use crate::upstream::transport::{connector, final_status, limit};
use crate::upstream::{Choice, EndpointLease, Outcome, Timeouts, Upstream};

/// Maximum number of idle connections for calls, over all upstreams.
const POOL: usize = 128;

/// The error type for a request that exceeded the sum of its upstream's timeouts.
const OVERDUE: ErrorType = ErrorType::Custom("overdue");

/// The connection parameters of one endpoint.
pub(super) struct Line<'a> {
    pub connector: &'a Connector,
    pub upstream: &'a Upstream,
    pub peer: Box<HttpPeer>,
}

/// The body of a request that Forebay sends; freed once it was sent.
pub(super) enum Load {
    /// A body that an exchange holds.
    Held(Held),
    /// A body that filters have changed.
    Made(Vec<Bytes>),
    /// A body in one piece.
    Whole(Bytes),
    /// No body.
    Nothing,
}

impl Load {
    fn pieces(&self) -> &[Bytes] {
        match self {
            Load::Held(held) => &held.pieces,
            Load::Made(pieces) => pieces,
            Load::Whole(body) => std::slice::from_ref(body),
            Load::Nothing => &[],
        }
    }

    fn length(&self) -> Option<u64> {
        match self {
            Load::Nothing => None,
            load => Some(load.pieces().iter().map(|piece| piece.len() as u64).sum()),
        }
    }
}

impl Line<'_> {
    /// Sends a request and reads the response, within the upstream's timeouts. Passes each piece of the response body
    /// to `take` until it returns that no more is wanted.
    pub async fn converse(
        self,
        mut request: RequestHeader,
        load: Load,
        attempt: &mut Attempt,
        mut take: impl FnMut(Bytes) -> bool,
    ) -> Result<ResponseHeader> {
        let Line { connector, upstream, mut peer } = self;
        limit::take_limit(&mut peer);
        let Timeouts { connect, send, wait, receive } = upstream.timeouts;
        let (mut session, reused) = limit::connected(connect, connector.get_http_session(&*peer)).await?;
        if let Some(flaw) = Flaw::of(session.digest()) {
            // Dropping the session closes the connection, so that no other request gets it.
            return Error::e_explain(ErrorType::InvalidCert, flaw.to_string());
        }
        let metrics = &upstream.metrics;
        if reused {
            metrics.connects_reused.inc()
        } else {
            metrics.connects_new.inc()
        }
        let now = Instant::now();
        attempt.connected(reused, now);
        let transport = &upstream.transport;
        let outdated = transport.age(session.digest()).filter(|&age| transport.is_outdated(age, rand::random()));
        let http2 = matches!(session, HttpSession::H2(_));
        let (head, own) = (request.method == Method::HEAD, attempt.endpoint().authority());
        prepare(&mut request, &own, http2.then_some(peer.is_tls()), load.length()).map_err(Error::into_in)?;
        let whole = async {
            sent(send, session.write_request_header(Box::new(request))).await?;
            for piece in load.pieces().iter().filter(|piece| !piece.is_empty()) {
                sent(send, session.write_request_body(piece.clone(), false)).await?;
            }
            sent(send, session.finish_request_body()).await?;
            // The body was sent, so its memory is freed.
            drop(load);
            attempt.sent(Instant::now());
            let status = within(wait, NoClient::Within, final_status(&mut session, head)).await.ok_or_else(late)??;
            attempt.answered(status, Instant::now());
            let header = session.response_header().cloned();
            let header = header.ok_or_else(|| Error::new_up(ErrorType::InvalidHTTPHeader))?;
            while let Some(piece) =
                within(receive, NoClient::Within, session.read_response_body()).await.ok_or_else(late)??
            {
                if !take(piece) {
                    break;
                }
            }
            Ok::<_, Box<Error>>(header)
        };
        // Each step has a limit, and so has their sum, which also bounds a slow trickle.
        let Some(whole) = within(connect + send + wait + receive, NoClient::Within, whole).await else {
            return Err(Error::new_up(OVERDUE));
        };
        let header = whole?;
        let is_last = match outdated {
            // Further requests use another connection, and this one closes after its current ones.
            Some(age) if http2 => {
                attempt.endpoint().renew(age, now);
                false
            }
            outdated => outdated.is_some() || (!http2 && upstream.has_surplus_connections()),
        };
        if session.response_done() && !is_last {
            connector.release_http_session(session, &*peer, peer.idle_timeout()).await;
        }
        Ok(header)
    }
}

/// Whether a request exceeded the sum of its upstream's timeouts.
pub(super) fn is_overdue(error: &Error) -> bool {
    *error.etype() == OVERDUE
}

fn late() -> Box<Error> {
    Error::new_up(ErrorType::ReadTimedout)
}

/// Waits until a piece of a request is sent. Pingora's own limits would also run while the gateway does not.
async fn sent<T>(limit: Duration, sends: impl Future<Output = Result<T>>) -> Result<T> {
    let sent = within(limit, NoClient::Within, sends).await;
    sent.ok_or_else(|| Error::new_up(ErrorType::WriteTimedout))?
}

/// The fault of a failed request. Its body was complete from the start, so the exchange waited only for the endpoint.
pub(super) fn fault(attempt: &Attempt, error: &Error) -> Fault {
    use ErrorType::{ConnectionClosed, H2Error, ReadError, ReadTimedout, WriteError, WriteTimedout};
    let phase = match (attempt.is_connected(), attempt.status()) {
        (false, _) => return blame::connecting(error),
        (true, None) => Phase::Wait,
        (true, Some(_)) => Phase::Receive,
    };
    match error.etype() {
        // A header that Forebay itself could not write.
        _ if *error.esource() == ErrorSource::Internal => Fault::new(Party::Gateway, phase, What::Failed),
        _ if is_overdue(error) => Fault::new(Party::Endpoint, phase, What::Silent),
        ReadTimedout | WriteTimedout => Fault::new(Party::Endpoint, phase, What::Silent),
        ConnectionClosed | ReadError | WriteError | H2Error => Fault::new(Party::Endpoint, phase, What::Broke),
        _ => Fault::new(Party::Endpoint, phase, What::Malformed),
    }
}

/// Converts a header, which may be meant for another protocol version, for this connection.
///
/// `own` is the host for a header without one; `h2` says whether an HTTP/2 connection uses TLS.
fn prepare(request: &mut RequestHeader, own: &Authority, h2: Option<bool>, length: Option<u64>) -> Result<()> {
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

/// The connections of all calls, kept across configurations. They are created for the first filter that makes calls.
#[derive(Default)]
pub struct Lines(OnceLock<Arc<Connector>>);

impl Lines {
    fn connector(&self) -> Arc<Connector> {
        self.0.get_or_init(|| Arc::new(Connector::new(Some(ConnectorOptions::new(POOL))))).clone()
    }
}

/// The upstreams of a configuration, for filters that call them.
pub struct Directory<'a> {
    upstreams: &'a BTreeMap<String, Arc<Upstream>>,
    metrics: &'a Metrics,
    lines: &'a Lines,
}

impl<'a> Directory<'a> {
    /// A directory of these upstreams; calls use the connections of `lines`.
    pub fn new(upstreams: &'a BTreeMap<String, Arc<Upstream>>, metrics: &'a Metrics, lines: &'a Lines) -> Self {
        Directory { upstreams, metrics, lines }
    }
}

impl Callees for Directory<'_> {
    fn caller(&self, upstream: &str, filter: &str) -> Option<Caller> {
        let upstream = self.upstreams.get(upstream)?.clone();
        let metrics = self.metrics.calls(filter, &upstream.name);
        let connector = self.lines.connector();
        Some(Caller::new(Arc::new(Callee { upstream, connector, metrics })))
    }

    fn names(&self) -> Vec<&str> {
        self.upstreams.keys().map(String::as_str).collect()
    }
}

/// One upstream, for one filter.
struct Callee {
    upstream: Arc<Upstream>,
    connector: Arc<Connector>,
    metrics: CallMetrics,
}

/// Counts a call, even if its end is not awaited.
struct Counting<'a> {
    metrics: &'a CallMetrics,
    begun: Instant,
    end: End,
}

impl Drop for Counting<'_> {
    fn drop(&mut self) {
        self.metrics.ended(self.end, self.begun.elapsed());
    }
}

#[async_trait]
impl Calls for Callee {
    async fn send(&self, call: Call) -> Result<Answered, CallError> {
        let mut counting = Counting { metrics: &self.metrics, begun: Instant::now(), end: End::Dropped };
        let mut noting = steps::call(&self.upstream.name);
        let answered = within(call.deadline, NoClient::Within, self.answered(call)).await;
        let answered = answered.unwrap_or(Err(CallError::Late));
        counting.end = match &answered {
            Ok(_) => End::Answered,
            Err(CallError::Busy) => End::Busy,
            Err(CallError::Away) => End::Away,
            Err(CallError::NoEndpoint) => End::NoEndpoint,
            Err(CallError::Late) => End::Late,
            Err(CallError::Failed) => End::Failed,
            Err(CallError::TooLarge) => End::TooLarge,
        };
        if let Some(noting) = &mut noting {
            match &answered {
                Ok(answer) => noting.comes_to(answer.header.status.as_u16().to_string()),
                Err(_) => noting.comes_to(counting.end.name()),
            }
        }
        answered
    }
}

impl Callee {
    async fn answered(&self, call: Call) -> Result<Answered, CallError> {
        let Call { request, body, answer_bytes_max, .. } = call;
        let mut fresh = false;
        loop {
            let lease = self.lease().await?;
            let mut peer = lease.peer_for(|| None);
            if fresh {
                connector::separate(&mut peer);
            }
            let mut attempt = Attempt::new(self.upstream.clone(), lease, None, Instant::now());
            // A method that defines a meaning for a body announces an empty one (RFC 9110 §8.6).
            let bodiless = body.is_empty() && !matches!(request.method, Method::POST | Method::PUT | Method::PATCH);
            let load = if bodiless { Load::Nothing } else { Load::Whole(body.clone()) };
            let line = Line { connector: &self.connector, upstream: &self.upstream, peer };
            let (mut taken, mut too_large) = (BytesMut::new(), false);
            let take = |piece: Bytes| {
                too_large = piece.len() > answer_bytes_max - taken.len();
                if !too_large {
                    taken.extend_from_slice(&piece);
                }
                !too_large
            };
            let said = line.converse(request.clone(), load, &mut attempt, take).await;
            let now = Instant::now();
            let error = match said {
                Ok(header) => {
                    attempt.end(Outcome::Answered(header.status), now);
                    return if too_large {
                        Err(CallError::TooLarge)
                    } else {
                        Ok(Answered { header, body: taken.freeze() })
                    };
                }
                Err(error) => error,
            };
            tracing::debug!(upstream = %self.upstream.name, %error, "a call of a filter failed");
            if !attempt.is_connected() {
                self.upstream.metrics.connects_failed.inc();
            }
            let fault = fault(&attempt, &error);
            let stale = attempt.is_reused() && attempt.status().is_none() && fault.what == What::Broke;
            attempt.end(blame::row(fault).outcome(), now);
            if stale && !fresh && request.method.is_idempotent() {
                // An idle connection was dead: the endpoint has not processed the request.
                fresh = true;
                continue;
            }
            return Err(if fault.what == What::Silent { CallError::Late } else { CallError::Failed });
        }
    }

    /// Chooses an endpoint; waits for one with room if needed.
    async fn lease(&self) -> Result<EndpointLease, CallError> {
        let (upstream, now) = (&self.upstream, Instant::now());
        let choice = match upstream.select(rand::random(), &[], now) {
            Choice::Full => {
                let patience = upstream.admission.queue().timeout;
                let Some(place) = upstream.queue(&[], now) else {
                    return Err(self.reject(&refusal::QUEUE_FULL, CallError::Busy));
                };
                match within(patience, NoClient::Within, in_line(upstream, place)).await {
                    Some(choice) => choice,
                    None => return Err(self.reject(&refusal::QUEUE_TIMEOUT, CallError::Busy)),
                }
            }
            choice => choice,
        };
        match choice {
            Choice::Leased(lease) => Ok(lease),
            Choice::Away(_) => Err(self.reject(&refusal::SELECT_BREAKER_OPEN, CallError::Away)),
            Choice::Full | Choice::NoEndpoint => Err(self.reject(&refusal::SELECT_NO_ENDPOINT, CallError::NoEndpoint)),
        }
    }

    fn reject(&self, refusal: &'static Refusal, error: CallError) -> CallError {
        self.upstream.metrics.limits.reject(refusal);
        error
    }
}

/// Waits in the queue until a turn yields an endpoint.
async fn in_line(upstream: &Upstream, mut place: crate::upstream::queue::Place) -> Choice {
    loop {
        poll_fn(|cx| place.poll_turn(cx)).await;
        match upstream.select_in_turn(None, rand::random(), &[], Instant::now()) {
            Choice::Full => {
                place.missed();
                // Many turns may be free, and each examines all endpoints: let other tasks run first.
                tokio::task::yield_now().await;
            }
            Choice::Leased(lease) => {
                place.served();
                return Choice::Leased(lease);
            }
            other => return other,
        }
    }
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
    fn a_request_is_framed_for_the_protocol_that_it_is_sent_with() {
        let own = Authority::from_static("mirror:1");
        for version in [Version::HTTP_11, Version::HTTP_2] {
            let mut request = original(version);
            prepare(&mut request, &own, None, Some(3)).expect("a request");
            let field = |name| request.headers[name].to_str().expect("text");
            let fields = ["host", "content-length", "x-own"].map(field);
            assert_eq!((request.version, fields), (Version::HTTP_11, ["shop:8080", "3", "1"]));
            assert!(!request.headers.contains_key("transfer-encoding"));

            let mut request = original(version);
            prepare(&mut request, &own, Some(true), None).expect("a request");
            assert_eq!(
                (request.version, request.uri.to_string().as_str()),
                (Version::HTTP_2, "https://shop:8080/a?b=c")
            );
            assert!(
                ["host", "content-length", "transfer-encoding"].iter().all(|name| !request.headers.contains_key(*name))
            );
            // An HTTP/1.0 request without a host.
            let mut request = original(version);
            request.remove_header("host");
            prepare(&mut request, &own, Some(false), None).expect("a request");
            assert_eq!(request.uri.to_string(), "http://mirror:1/a?b=c");
        }
    }
}
