//! What is counted of upstreams.

use std::sync::{Arc, Weak};

use prometheus::{Histogram, IntCounter, IntCounterVec, IntGauge};

use super::Metrics;
use super::endpoints::{EndpointMetrics, Group};
use super::family::vectors;
use super::limits::LimitMetrics;
use super::retry::RetryMetrics;
use crate::error::{Refusal, refusal};

vectors! {
    /// The families of all upstreams.
    struct Families {
        selections: counter UPSTREAM_SELECTIONS,
        connects: counter UPSTREAM_CONNECTS,
        connect_failures: counter UPSTREAM_CONNECT_FAILURES,
        connect_seconds: histogram UPSTREAM_CONNECT_SECONDS,
        wait_seconds: histogram UPSTREAM_WAIT_SECONDS,
        discoveries: counter UPSTREAM_DISCOVERIES,
        health_checks: counter UPSTREAM_HEALTH_CHECKS,
        connections: gauge UPSTREAM_CONNECTIONS,
        ejections: counter UPSTREAM_EJECTIONS,
        panic: gauge UPSTREAM_PANIC,
        retries: counter RETRIES,
        retries_refused: counter RETRIES_REFUSED,
    }
}

impl Families {
    /// Those of the upstream of this name, with those of its limits.
    pub(super) fn upstream(&self, name: &str, limits: LimitMetrics, metrics: Metrics) -> UpstreamMetrics {
        let connects = |outcome| self.connects.with_label_values(&[name, outcome]);
        let discoveries = |outcome| self.discoveries.with_label_values(&[name, outcome]);
        let connect_failures = refusal::ALL.iter().filter_map(|&refusal| {
            let reason = refusal.reason.strip_prefix("connect.")?;
            Some((refusal, self.connect_failures.with_label_values(&[name, reason])))
        });
        UpstreamMetrics {
            connects_new: connects("new"),
            connects_reused: connects("reused"),
            connects_failed: connects("failed"),
            discoveries: DiscoveryMetrics {
                ok: discoveries("ok"),
                none: discoveries("none"),
                failed: discoveries("failed"),
            },
            connections: self.connections.with_label_values(&[name]),
            retries: RetryMetrics::of(name, &self.retries, &self.retries_refused),
            limits,
            health_checks: self.health_checks.clone(),
            connect_failures: connect_failures.collect(),
            connect_seconds: self.connect_seconds.with_label_values(&[name]),
            wait_seconds: self.wait_seconds.with_label_values(&[name]),
            metrics,
            panic: self.panic.with_label_values(&[name]),
            ejections: self.ejections.clone(),
            name: name.into(),
        }
    }
}

/// The metrics of one upstream.
pub struct UpstreamMetrics {
    /// Exchanges for which a connection was made.
    pub connects_new: IntCounter,
    /// Exchanges that were given a connection that was kept.
    pub connects_reused: IntCounter,
    /// Attempts to connect that failed.
    pub connects_failed: IntCounter,
    /// What came of asking where its endpoints are.
    pub discoveries: DiscoveryMetrics,
    /// Connections that are open or being made.
    pub connections: IntGauge,
    /// Attempts that were repeated, and those that were not.
    pub retries: RetryMetrics,
    /// Of its limits.
    pub limits: LimitMetrics,
    health_checks: IntCounterVec,
    /// Times until new connections stood.
    pub connect_seconds: Histogram,
    /// Times from the end of a request to the header of its answer.
    pub wait_seconds: Histogram,
    /// For each refusal of the phase `connect`.
    connect_failures: Box<[(&'static Refusal, IntCounter)]>,
    metrics: Metrics,
    /// 1 while so few endpoints are available that all of them are asked.
    pub panic: IntGauge,
    ejections: IntCounterVec,
    name: Box<str>,
}

/// What came of asking where the endpoints of an upstream are.
#[derive(Clone)]
pub struct DiscoveryMetrics {
    /// They were told.
    pub ok: IntCounter,
    /// It was told that there are none.
    pub none: IntCounter,
    /// Nothing was told, or nothing that can be read.
    pub failed: IntCounter,
}

impl UpstreamMetrics {
    /// Those of the endpoints with this label, an address as written. Ask once, when one is built.
    pub fn endpoint(&self, label: &str) -> Arc<EndpointMetrics> {
        let key = (self.name.clone(), label.into());
        let mut known = self.metrics.endpoints();
        if let Some(endpoint) = known.get(&key).and_then(Weak::upgrade) {
            return endpoint;
        }
        let endpoint = Arc::new(EndpointMetrics::new(&self.name, label, &self.metrics));
        known.insert(key, Arc::downgrade(&endpoint));
        endpoint
    }

    /// Counts an attempt for which no connection came about.
    pub fn count_connect_failure(&self, why: &'static Refusal) {
        let counter = self.connect_failures.iter().find(|(refusal, _)| *refusal == why);
        counter.iter().for_each(|(_, count)| count.inc());
    }

    /// Counts the endpoints of this upstream on each scrape, for as long as there is one.
    pub fn count_endpoints(&self, group: Weak<dyn Group>) {
        self.metrics.count_endpoints(group);
    }

    /// Those of its ejections, for these reasons. Ask once, when it is built.
    pub fn ejections(&self, reasons: impl IntoIterator<Item = &'static str>) -> EjectionMetrics {
        let counter = |reason| (reason, self.ejections.with_label_values(&[&*self.name, reason]));
        EjectionMetrics(reasons.into_iter().map(counter).collect())
    }

    /// Those of its health checks. Ask once, if it has any.
    pub fn health_checks(&self) -> HealthCheckMetrics {
        let outcome = |outcome| self.health_checks.with_label_values(&[&*self.name, outcome]);
        HealthCheckMetrics {
            passed: outcome("passed"),
            failed: outcome("failed"),
            timed_out: outcome("timeout"),
            late: outcome("late"),
            unable: outcome("unable"),
        }
    }
}

/// How often endpoints of one upstream were ejected.
pub struct EjectionMetrics(Vec<(&'static str, IntCounter)>);

impl EjectionMetrics {
    /// Counts one more, for one of the reasons that were named.
    pub fn count(&self, reason: &str) {
        if let Some((_, counter)) = self.0.iter().find(|(known, _)| *known == reason) {
            counter.inc();
        }
    }
}

/// The metrics of the health checks of one upstream.
pub struct HealthCheckMetrics {
    /// Checks that passed.
    pub passed: IntCounter,
    /// Checks that said something bad.
    pub failed: IntCounter,
    /// Checks that said nothing in time.
    pub timed_out: IntCounter,
    /// Checks that began late, because too many were under way.
    pub late: IntCounter,
    /// Checks for which the gateway itself had no descriptor, port or memory.
    pub unable: IntCounter,
}
