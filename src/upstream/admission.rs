//! Who is let in: what an upstream and its endpoints may have under way at once, whether the upstream is asked at all,
//! and the line of those who wait.
//!
//! Each exchange that has an endpoint is counted there and at the upstream, in one step with the question whether there
//! is room; so no limit is exceeded, not even for a moment, and what is counted is released by its holder
//! ([`Engaged`]).

use std::ops::Deref;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use http::StatusCode;

use super::breaker::{Breaker, Leave, Verdict};
use super::ended::Ended;
use super::endpoint::Endpoint;
use super::queue::Queue;
use super::transport::H2_STREAMS_MAX;
use crate::config;
use crate::config::units::Count;
use crate::config::upstream::Protocol;
use crate::metrics::LimitMetrics;
use crate::party::KeepsWaiting;

/// How many exchanges may be under way at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// At all endpoints together.
    pub all: u32,
    /// At each of them.
    pub each: u32,
}

impl Limits {
    /// The stricter of two limits each: of requests, and of connections, which a hundred requests share over HTTP/2.
    pub fn new(written: &config::upstream::Limits, protocol: Protocol) -> Limits {
        let shared = match protocol {
            Protocol::Http1 => 1,
            Protocol::H2 | Protocol::H2c => H2_STREAMS_MAX as u64,
        };
        let limit = |Count(requests): Count, Count(connections): Count| {
            u32::try_from(requests.min(connections.saturating_mul(shared))).unwrap_or(u32::MAX)
        };
        Limits {
            all: limit(written.requests, written.connections),
            each: limit(written.endpoint.requests, written.endpoint.connections),
        }
    }
}

/// What one upstream has under way, and who waits for it.
#[derive(Debug)]
pub struct Admission {
    limits: Limits,
    inflight: AtomicU32,
    queue: Arc<Queue>,
    breaker: Option<Breaker>,
    /// What is counted of all this.
    pub metrics: LimitMetrics,
}

impl Admission {
    /// That of an upstream that is written so.
    pub fn new(written: &config::Upstream, metrics: LimitMetrics, now: Instant) -> Arc<Admission> {
        let breaker = written.circuit_breaker.as_ref();
        Arc::new(Admission {
            limits: Limits::new(&written.limits, written.protocol),
            inflight: AtomicU32::new(0),
            queue: Arc::new(Queue::new(&written.queue, metrics.queue.clone())),
            breaker: breaker.map(|written| {
                let (gauge, replaced) = (metrics.breaker.clone(), metrics.probes_replaced.clone());
                Breaker::new(written.into(), gauge, replaced, now)
            }),
            metrics,
        })
    }

    /// Exchanges that have one of its endpoints now.
    pub fn inflight(&self) -> u32 {
        self.inflight.load(Ordering::Relaxed)
    }

    /// The line of those who wait.
    pub fn queue(&self) -> &Arc<Queue> {
        &self.queue
    }

    /// The breaker, if there is one.
    pub fn breaker(&self) -> Option<&Breaker> {
        self.breaker.as_ref()
    }

    /// Whether no further exchange may have an endpoint, whichever that is.
    pub fn is_full(&self) -> bool {
        self.inflight.load(Ordering::SeqCst) >= self.limits.all
    }

    /// Whether this endpoint may have another exchange.
    pub fn has_room(&self, endpoint: &Endpoint) -> bool {
        endpoint.inflight.load(Ordering::SeqCst) < self.limits.each
    }

    /// How many more these endpoints may have.
    pub fn room<'e>(&self, endpoints: impl Iterator<Item = &'e Arc<Endpoint>>) -> u32 {
        let most = self.limits.all.saturating_sub(self.inflight());
        let each = endpoints.map(|endpoint| self.limits.each.saturating_sub(endpoint.inflight()));
        each.fold(0, u32::saturating_add).min(most)
    }

    /// Leave of the breaker, or how long to stay away.
    pub(super) fn leave(&self, now: Instant) -> Result<Option<Leave>, Duration> {
        self.breaker.as_ref().map(|breaker| breaker.admit(now)).transpose()
    }

    /// A leave that was not used.
    pub(super) fn unused(&self, leave: Option<&Leave>, now: Instant) {
        if let (Some(breaker), Some(leave)) = (&self.breaker, leave) {
            breaker.note(leave, Verdict::Neither, now);
        }
    }

    /// Takes a place at this endpoint; `None` if somebody else has just taken the last one.
    pub(super) fn engage(self: &Arc<Self>, endpoint: &Arc<Endpoint>) -> Option<Engaged> {
        if !take(&endpoint.inflight, self.limits.each) {
            return None;
        }
        if !take(&self.inflight, self.limits.all) {
            endpoint.inflight.fetch_sub(1, Ordering::SeqCst);
            // Somebody may have seen the endpoint full meanwhile.
            self.queue.freed();
            return None;
        }
        Some(Engaged { endpoint: Arc::clone(endpoint), admission: Arc::clone(self), leave: None })
    }
}

/// Counts one more, unless that would be too many.
fn take(count: &AtomicU32, most: u32) -> bool {
    if most == u32::MAX {
        count.fetch_add(1, Ordering::SeqCst);
        return true;
    }
    let one_more = |count| Some(count + 1).filter(|&count| count <= most);
    count.fetch_update(Ordering::SeqCst, Ordering::SeqCst, one_more).is_ok()
}

/// An endpoint that an exchange has: it counts as in flight there, and at its upstream, until this is dropped.
#[derive(Debug)]
pub struct Engaged {
    endpoint: Arc<Endpoint>,
    admission: Arc<Admission>,
    /// Of the breaker, which is still to hear what became of it.
    leave: Option<Leave>,
}

impl Engaged {
    /// With leave of the breaker.
    pub(super) fn with(mut self, leave: Option<Leave>) -> Self {
        self.leave = leave;
        self
    }

    /// The endpoint, to be remembered beyond this.
    pub fn endpoint(&self) -> &Arc<Endpoint> {
        &self.endpoint
    }

    /// The response header is here. A breaker that waits for this one alone need not wait for the rest, which may take
    /// hours.
    pub fn answered(&mut self, status: StatusCode, now: Instant) {
        if self.is_probe() {
            let verdict = if status.is_server_error() { Verdict::Bad } else { Verdict::Good };
            self.note(verdict, now);
        }
    }

    /// Whether a breaker lets few others through until it has heard what came of this one.
    pub fn is_probe(&self) -> bool {
        self.leave.as_ref().is_some_and(Leave::is_probe)
    }

    /// If it is a probe: says who can tell how long its endpoint is kept waiting. A probe whose client dawdles gives
    /// its place to another one.
    pub fn watch(&self, exchange: Arc<dyn KeepsWaiting>) {
        if let (Some(breaker), Some(leave)) = (&self.admission.breaker, &self.leave) {
            breaker.watch(leave, exchange);
        }
    }

    /// It is over.
    pub(super) fn ended(&mut self, ended: &Ended, now: Instant) {
        self.note(ended.seen().breaker, now);
    }

    fn note(&mut self, verdict: Verdict, now: Instant) {
        let (Some(breaker), Some(leave)) = (&self.admission.breaker, self.leave.take()) else { return };
        if breaker.note(&leave, verdict, now) {
            // None in line will be served: each is refused now.
            self.admission.queue.changed(u32::MAX);
        }
    }
}

impl Deref for Engaged {
    type Target = Endpoint;

    fn deref(&self) -> &Endpoint {
        &self.endpoint
    }
}

impl Drop for Engaged {
    fn drop(&mut self) {
        if self.leave.is_some() {
            self.note(Verdict::Neither, Instant::now());
        }
        self.endpoint.inflight.fetch_sub(1, Ordering::SeqCst);
        self.admission.inflight.fetch_sub(1, Ordering::SeqCst);
        self.admission.queue.freed();
    }
}
