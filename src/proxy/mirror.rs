//! Mirrors: a copy of a request goes to another upstream, whose answer is discarded.
//!
//! What is copied is decided in `buffer`, once the body is whole; the copy leaves when the original has been sent, in a
//! task of its own, so that it never slows the original or fails it. The body is shared with the spool of the original,
//! and counted by the budget for as long as the copy needs it. The number of copies at a time is bounded; what cannot
//! be copied is counted.

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
use crate::client::spool::Held;
use crate::config;
use crate::metrics::Metrics;
use crate::metrics::mirror::{Fate, MirrorMetrics};
use crate::upstream::transport::greeting::Parties;
use crate::upstream::{Choice, Outcome, Upstream};

/// Says that a request is a copy, and of which route.
const MARK: HeaderName = HeaderName::from_static("x-forebay-mirror");

/// At most this much of a discarded answer is read, so that its connection can be kept.
const DISCARDED_BYTES: usize = 1 << 20;

/// Of a body that filters have changed, no more than this is kept for a copy.
const FILTERED_BYTES_MAX: usize = 1 << 20;

/// Where the copies of a route go.
pub struct Mirror {
    /// The upstream that gets them.
    pub upstream: Arc<Upstream>,
    /// Of all requests, from 0 to 1.
    pub share: f64,
    /// How many there may be at a time.
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
    /// What filters have made of the body in the present attempt, if there are any for it.
    filtered: Option<Vec<Bytes>>,
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
    /// Who gets copies of the requests of a route, if it says so. `connector` is asked for what connects to it.
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
            // Names have been checked: they are all letters that a header may have.
            route: HeaderValue::from_str(name).unwrap_or(HeaderValue::from_static("unnamed")),
            metrics: metrics.mirror(&mirror.upstream),
            connector: connector(),
            inflight: AtomicU32::new(0),
        }))
    }

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
        Some(Box::new(Copy { mirror: Arc::clone(self), body, filtered: None, request: None }))
    }

    /// A place among those that are under way.
    fn enter(self: &Arc<Self>) -> Option<Place> {
        let place = Place(Arc::clone(self));
        // If it is one too many, dropping it takes it back.
        (self.inflight.fetch_add(1, Ordering::Relaxed) < self.most).then_some(place)
    }
}

impl Copy {
    /// Remembers the header that the original is sent with. If its client named no host, what it names is its endpoint
    /// and none of the mirror's.
    pub fn note_header(&mut self, request: &RequestHeader, names_host: bool) {
        self.filtered = None;
        if self.request.is_none() {
            let request = self.request.insert(Box::new(request.clone()));
            if !names_host {
                request.remove_header(&header::HOST);
            }
        }
    }

    /// A piece of the body has passed filters that may have changed it: the copy gets what they have made of it. `false`:
    /// that is too much, so that there is to be no copy.
    pub fn filtered(&mut self, piece: Option<&Bytes>) -> bool {
        let pieces = self.filtered.get_or_insert_default();
        pieces.extend(piece.filter(|piece| !piece.is_empty()).cloned());
        let fits = pieces.iter().map(Bytes::len).sum::<usize>() <= FILTERED_BYTES_MAX;
        if !fits {
            self.mirror.leaves(Fate::TooLarge);
        }
        fits
    }

    /// The original has been sent: its copy follows, to an endpoint that may be told of these ends of its client's
    /// connection.
    pub fn send(self, parties: Option<Parties>) {
        let Copy { mirror, body, filtered, request: Some(request) } = self else { return };
        let load = filtered.map(Load::Made).or(body.map(Load::Held)).unwrap_or(Load::Nothing);
        let Some(place) = mirror.enter() else { return mirror.leaves(Fate::Busy) };
        tokio::spawn(async move {
            let fate = attempt(&mirror, *request, load, parties).await;
            mirror.metrics.count(fate);
            drop(place);
        });
    }
}

/// One copy under way.
struct Place(Arc<Mirror>);

impl Drop for Place {
    fn drop(&mut self) {
        self.0.inflight.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Sends the copy to some endpoint and reads the answer away, within the timeouts of that upstream.
async fn attempt(mirror: &Mirror, mut request: RequestHeader, load: Load, parties: Option<Parties>) -> Fate {
    let upstream = &mirror.upstream;
    // It goes anywhere: what endpoints are told apart by, requests of the other upstream need not have.
    let Choice::Engaged(engaged) = upstream.select(rand::random(), &[], Instant::now()) else {
        return Fate::NoEndpoint;
    };
    let peer = engaged.peer_for(|| parties);
    let mut attempt = Attempt::new(Arc::clone(upstream), engaged, None, Instant::now());
    if request.insert_header(MARK, mirror.route.clone()).is_err() {
        // It has as many fields as it may have.
        return Fate::Failed;
    }
    let line = Line { connector: &mirror.connector, upstream, peer: &peer };
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
        // An answer that has begun is one; its end is not waited for.
        Err(error) if call::is_overdue(&error) => attempt.status().ok_or(error),
        Err(error) => Err(error),
    };
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
            attempt.end(blame::row(call::fault(&attempt, &error)).outcome(), now);
            Fate::Failed
        }
    }
}
