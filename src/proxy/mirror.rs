//! Mirrors: a copy of a request is sent to another upstream, and its response is discarded.
//!
//! `buffer` decides on the copy once the body is complete. The copy is sent after the original, in its own task, so
//! that it neither delays nor fails the original. It shares the body with the original's spool; the budget counts the
//! body while the copy needs it. The number of concurrent copies is limited, and requests that cannot be copied are
//! counted.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Instant;

use bytes::Bytes;
use http::{HeaderName, HeaderValue, header};
use pingora::connectors::http::Connector;
use pingora::http::RequestHeader;

use super::attempt::Attempt;
use super::blame;
use super::call::{self, Line, Load};
use crate::config;
use crate::metrics::Metrics;
use crate::metrics::mirror::{MirrorMetrics, MirrorOutcome};
use crate::spool::Held;
use crate::upstream::transport::proxy_protocol::ClientAddresses;
use crate::upstream::{Choice, Outcome, Upstream};

/// Marks a request as a copy, and names its route.
const MARK: HeaderName = HeaderName::from_static("x-forebay-mirror");

/// Maximum number of bytes of a discarded response that are read to keep the connection reusable.
const DISCARDED_BYTES: usize = 1 << 20;

/// Maximum size of a body changed by filters that is kept for a copy, in bytes.
const FILTERED_BYTES_MAX: usize = 1 << 20;

/// The mirror of a route.
pub struct Mirror {
    /// The upstream that receives the copies.
    pub upstream: Arc<Upstream>,
    /// Share of requests that are copied, from 0 to 1.
    pub share: f64,
    /// Maximum number of concurrent copies.
    pub most: u32,
    /// The name of the route.
    pub route: HeaderValue,
    /// Counts the outcomes of copies.
    pub metrics: MirrorMetrics,
    /// Connects to the upstreams of mirrors.
    pub connector: Arc<Connector>,
    /// Number of active copies.
    pub inflight: AtomicU32,
}

/// A request to be copied.
pub struct Copy {
    mirror: Arc<Mirror>,
    body: Option<Held>,
    /// The body of the current attempt as changed by filters, if they process it.
    filtered: Option<Vec<Bytes>>,
    request: Option<Box<RequestHeader>>,
}

/// The state of a request body when its copy is decided.
pub enum Body {
    /// There is no body.
    Empty,
    /// The body is completely in memory.
    Whole(Held),
    /// Part of the body is on disk, or there is not enough memory to keep it longer.
    Large,
    /// The body is streamed.
    Streamed,
}

impl Mirror {
    /// Builds the mirror of a route, if it has one. `connector` provides the connector.
    pub fn build(
        written: &config::Route,
        upstreams: &BTreeMap<String, Arc<Upstream>>,
        metrics: &Metrics,
        connector: impl FnOnce() -> Arc<Connector>,
    ) -> Option<Arc<Mirror>> {
        let (name, mirror) = (&written.name, written.mirror.as_ref()?);
        Some(Arc::new(Mirror {
            upstream: upstreams.get(&mirror.upstream)?.clone(),
            share: mirror.percent.ratio(),
            most: u32::try_from(mirror.in_flight.0).unwrap_or(u32::MAX),
            // Route names were checked: all their characters are valid in a header.
            route: HeaderValue::from_str(name).unwrap_or(HeaderValue::from_static("unnamed")),
            metrics: metrics.mirror(&mirror.upstream),
            connector: connector(),
            inflight: AtomicU32::new(0),
        }))
    }

    /// Draws whether the next request is copied.
    pub fn draws(&self) -> bool {
        self.share >= 1.0 || rand::random::<f64>() < self.share
    }

    /// Counts a request that was not copied.
    pub fn skip(&self, outcome: MirrorOutcome) {
        self.metrics.count(outcome);
    }

    /// Creates the copy of a request with this body, if possible.
    pub fn copy(self: &Arc<Self>, body: Body) -> Option<Box<Copy>> {
        let body = match body {
            Body::Empty => None,
            Body::Whole(held) => Some(held),
            Body::Large => {
                self.skip(MirrorOutcome::TooLarge);
                return None;
            }
            Body::Streamed => {
                self.skip(MirrorOutcome::Streamed);
                return None;
            }
        };
        Some(Box::new(Copy { mirror: Arc::clone(self), body, filtered: None, request: None }))
    }

    /// Takes a slot for an active copy.
    fn enter(self: &Arc<Self>) -> Option<Place> {
        let place = Place(Arc::clone(self));
        // Above the limit, dropping the slot returns it.
        (self.inflight.fetch_add(1, Ordering::Relaxed) < self.most).then_some(place)
    }
}

impl Copy {
    /// Stores the header of the original as sent. If the client named no host, the header's host is the original's
    /// endpoint, and is removed from the copy.
    pub fn note_header(&mut self, request: &RequestHeader, names_host: bool) {
        self.filtered = None;
        if self.request.is_none() {
            let request = self.request.insert(Box::new(request.clone()));
            if !names_host {
                request.remove_header(&header::HOST);
            }
        }
    }

    /// Stores a piece of the body after filters that may have changed it. `false`: the body is too large, so there is
    /// no copy.
    pub fn filtered(&mut self, piece: Option<&Bytes>) -> bool {
        let pieces = self.filtered.get_or_insert_default();
        pieces.extend(piece.filter(|piece| !piece.is_empty()).cloned());
        let fits = pieces.iter().map(Bytes::len).sum::<usize>() <= FILTERED_BYTES_MAX;
        if !fits {
            self.mirror.skip(MirrorOutcome::TooLarge);
        }
        fits
    }

    /// Sends the copy after its original. `addresses` are the two ends of the client's connection, for the endpoint.
    pub fn send(self, addresses: Option<ClientAddresses>) {
        let Copy { mirror, body, filtered, request: Some(request) } = self else { return };
        let load = filtered.map(Load::Made).or(body.map(Load::Held)).unwrap_or(Load::Nothing);
        let Some(place) = mirror.enter() else { return mirror.skip(MirrorOutcome::Busy) };
        tokio::spawn(async move {
            let outcome = attempt(&mirror, *request, load, addresses).await;
            mirror.metrics.count(outcome);
            drop(place);
        });
    }
}

/// A slot for one active copy.
struct Place(Arc<Mirror>);

impl Drop for Place {
    fn drop(&mut self) {
        self.0.inflight.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Sends the copy to an endpoint and discards the response, within the upstream's timeouts.
async fn attempt(
    mirror: &Mirror,
    mut request: RequestHeader,
    load: Load,
    addresses: Option<ClientAddresses>,
) -> MirrorOutcome {
    let upstream = &mirror.upstream;
    // Any endpoint is eligible: the request need not have the key of the mirror's upstream.
    let Choice::Leased(lease) = upstream.select(rand::random(), &[], Instant::now()) else {
        return MirrorOutcome::NoEndpoint;
    };
    let peer = lease.peer_for(|| addresses);
    let mut attempt = Attempt::new(Arc::clone(upstream), lease, None, Instant::now());
    if request.insert_header(MARK, mirror.route.clone()).is_err() {
        // The header already has the maximum number of fields.
        return MirrorOutcome::Failed;
    }
    let line = Line { connector: &mirror.connector, upstream, peer };
    let mut left = DISCARDED_BYTES;
    let take = |piece: Bytes| match left.checked_sub(piece.len()) {
        Some(rest) => {
            left = rest;
            true
        }
        None => false,
    };
    let answered = match line.converse(request, load, &mut attempt, take).await {
        Ok(header) => Ok(header.status),
        // A response that has begun counts, even without its end.
        Err(error) if call::is_overdue(&error) => attempt.status().ok_or(error),
        Err(error) => Err(error),
    };
    let now = Instant::now();
    match answered {
        Ok(status) => {
            attempt.end(Outcome::Answered(status), now);
            MirrorOutcome::Answered
        }
        Err(error) => {
            tracing::debug!(upstream = %upstream.name, %error, "a copy of a request failed");
            if !attempt.is_connected() {
                upstream.metrics.connects_failed.inc();
            }
            attempt.end(blame::row(call::fault(&attempt, &error)).outcome(), now);
            MirrorOutcome::Failed
        }
    }
}
