//! Admission: the limits of an upstream and its endpoints, the circuit breaker, and the queue.
//!
//! An exchange is counted at its endpoint and at the upstream in the same atomic step as the limit is checked, so
//! limits are never exceeded. The holder releases the counts ([`EndpointLease`]).

use std::ops::Deref;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use http::StatusCode;

use super::breaker::{Admitted, Breaker, Verdict};
use super::ended::Ended;
use super::endpoint::Endpoint;
use super::queue::Queue;
use super::transport::H2_STREAMS_MAX;
use crate::config;
use crate::config::units::Count;
use crate::config::upstream::Protocol;
use crate::metrics::LimitMetrics;
use crate::party::DelaysEndpoint;

/// Limits on active exchanges.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// All endpoints together.
    pub all: u32,
    /// Each endpoint.
    pub each: u32,
}

impl Limits {
    /// The stricter of the limits on requests and on connections; over HTTP/2, a hundred requests share a
    /// connection.
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

/// The active exchanges of an upstream, and its queue.
#[derive(Debug)]
pub struct Admission {
    limits: Limits,
    inflight: AtomicU32,
    queue: Arc<Queue>,
    breaker: Option<Breaker>,
    /// Metrics of the limits.
    pub metrics: LimitMetrics,
}

impl Admission {
    /// For an upstream with these settings.
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

    /// Number of exchanges with one of its endpoints.
    pub fn inflight(&self) -> u32 {
        self.inflight.load(Ordering::Relaxed)
    }

    /// The queue.
    pub fn queue(&self) -> &Arc<Queue> {
        &self.queue
    }

    /// The circuit breaker, if there is one.
    pub fn breaker(&self) -> Option<&Breaker> {
        self.breaker.as_ref()
    }

    /// Whether the upstream's own limit is reached.
    pub fn is_full(&self) -> bool {
        self.inflight.load(Ordering::SeqCst) >= self.limits.all
    }

    /// Whether this endpoint is below the limits.
    pub fn has_room(&self, endpoint: &Endpoint) -> bool {
        endpoint.inflight.load(Ordering::SeqCst) < self.limits.each
    }

    /// How many more exchanges these endpoints may have.
    pub fn room<'e>(&self, endpoints: impl Iterator<Item = &'e Arc<Endpoint>>) -> u32 {
        let most = self.limits.all.saturating_sub(self.inflight());
        let each = endpoints.map(|endpoint| self.limits.each.saturating_sub(endpoint.inflight()));
        each.fold(0, u32::saturating_add).min(most)
    }

    /// Permission of the circuit breaker, or how long it stays open.
    pub(super) fn admit(&self, now: Instant) -> Result<Option<Admitted>, Duration> {
        self.breaker.as_ref().map(|breaker| breaker.admit(now)).transpose()
    }

    /// Returns an unused permission.
    pub(super) fn unused(&self, admitted: Option<&Admitted>, now: Instant) {
        if let (Some(breaker), Some(admitted)) = (&self.breaker, admitted) {
            breaker.note(admitted, Verdict::Neither, now);
        }
    }

    /// Takes a place at this endpoint; `None` if another exchange has just taken the last one.
    pub(super) fn lease(self: &Arc<Self>, endpoint: &Arc<Endpoint>) -> Option<EndpointLease> {
        if !take(&endpoint.inflight, self.limits.each) {
            return None;
        }
        if !take(&self.inflight, self.limits.all) {
            endpoint.inflight.fetch_sub(1, Ordering::SeqCst);
            // Another exchange may have seen the endpoint full meanwhile.
            self.queue.freed();
            return None;
        }
        Some(EndpointLease { endpoint: Arc::clone(endpoint), admission: Arc::clone(self), admitted: None })
    }
}

/// Increments the count, unless it is at its limit.
fn take(count: &AtomicU32, most: u32) -> bool {
    if most == u32::MAX {
        count.fetch_add(1, Ordering::SeqCst);
        return true;
    }
    let one_more = |count| Some(count + 1).filter(|&count| count <= most);
    count.fetch_update(Ordering::SeqCst, Ordering::SeqCst, one_more).is_ok()
}

/// An endpoint in use by an exchange: it counts as active there and at the upstream until this is dropped.
#[derive(Debug)]
pub struct EndpointLease {
    endpoint: Arc<Endpoint>,
    admission: Arc<Admission>,
    /// The permission of the circuit breaker, which needs the result.
    admitted: Option<Admitted>,
}

impl EndpointLease {
    /// Adds the permission of the circuit breaker.
    pub(super) fn with(mut self, admitted: Option<Admitted>) -> Self {
        self.admitted = admitted;
        self
    }

    /// The endpoint, to be kept longer than this.
    pub fn endpoint(&self) -> &Arc<Endpoint> {
        &self.endpoint
    }

    /// The response header has arrived. A half-open breaker need not wait for the body, which may take hours.
    pub fn answered(&mut self, status: StatusCode, now: Instant) {
        if self.is_probe() {
            let verdict = if status.is_server_error() { Verdict::Bad } else { Verdict::Good };
            self.note(verdict, now);
        }
    }

    /// Whether this is a probe of a half-open breaker.
    pub fn is_probe(&self) -> bool {
        self.admitted.as_ref().is_some_and(Admitted::is_probe)
    }

    /// For a probe: registers the exchange, which measures how long it delays its endpoint. A probe with a slow client
    /// loses its place to another one.
    pub fn watch(&self, exchange: Arc<dyn DelaysEndpoint>) {
        if let (Some(breaker), Some(admitted)) = (&self.admission.breaker, &self.admitted) {
            breaker.watch(admitted, exchange);
        }
    }

    /// The attempt has ended.
    pub(super) fn ended(&mut self, ended: &Ended, now: Instant) {
        self.note(ended.effects().breaker, now);
    }

    fn note(&mut self, verdict: Verdict, now: Instant) {
        let (Some(breaker), Some(admitted)) = (&self.admission.breaker, self.admitted.take()) else { return };
        if breaker.note(&admitted, verdict, now) {
            // The breaker is open now: all queued exchanges are refused.
            self.admission.queue.changed(u32::MAX);
        }
    }
}

impl Deref for EndpointLease {
    type Target = Endpoint;

    fn deref(&self) -> &Endpoint {
        &self.endpoint
    }
}

impl Drop for EndpointLease {
    fn drop(&mut self) {
        if self.admitted.is_some() {
            self.note(Verdict::Neither, Instant::now());
        }
        self.endpoint.inflight.fetch_sub(1, Ordering::SeqCst);
        self.admission.inflight.fetch_sub(1, Ordering::SeqCst);
        self.admission.queue.freed();
    }
}
