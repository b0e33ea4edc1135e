//! Metrics of upstreams.

use std::sync::{Arc, Weak};

use prometheus::{Histogram, IntCounter, IntCounterVec, IntGauge};

use super::endpoints::{EndpointMetrics, Group};
use super::family::vectors;
use super::limits::LimitMetrics;
use super::retry::RetryMetrics;
use super::{Metrics, single};
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
        checks_active: gauge HEALTH_CHECKS_ACTIVE,
        checks_waiting: gauge HEALTH_CHECKS_WAITING,
        connections: gauge UPSTREAM_CONNECTIONS,
        ejections: counter UPSTREAM_EJECTIONS,
        panic: gauge UPSTREAM_PANIC,
        retries: counter RETRIES,
        retries_refused: counter RETRIES_REFUSED,
    }
}

impl Families {
    /// The metrics of the places that all health checks share.
    pub(super) fn check_places(&self) -> CheckPlaces {
        CheckPlaces { active: single(&self.checks_active), waiting: single(&self.checks_waiting) }
    }

    /// The metrics of the upstream with this name, including those of its limits.
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
    /// Exchanges with a new connection.
    pub connects_new: IntCounter,
    /// Exchanges with a reused connection.
    pub connects_reused: IntCounter,
    /// Failed attempts to connect.
    pub connects_failed: IntCounter,
    /// Results of endpoint look-ups.
    pub discoveries: DiscoveryMetrics,
    /// Connections that are open or being made.
    pub connections: IntGauge,
    /// Retries, made and prevented.
    pub retries: RetryMetrics,
    /// The metrics of its limits.
    pub limits: LimitMetrics,
    health_checks: IntCounterVec,
    /// Times to connect.
    pub connect_seconds: Histogram,
    /// Times from the end of a request to the response header.
    pub wait_seconds: Histogram,
    /// One counter per refusal of the phase `connect`.
    connect_failures: Box<[(&'static Refusal, IntCounter)]>,
    metrics: Metrics,
    /// 1 while a tier is in panic mode.
    pub panic: IntGauge,
    ejections: IntCounterVec,
    name: Box<str>,
}

/// Results of endpoint look-ups.
#[derive(Clone)]
pub struct DiscoveryMetrics {
    /// Endpoints were found.
    pub ok: IntCounter,
    /// The result was an empty list.
    pub none: IntCounter,
    /// No result, or an unreadable one.
    pub failed: IntCounter,
}

impl UpstreamMetrics {
    /// The metrics of the endpoints with this label, an address as written. Call once, when one is built.
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

    /// Counts an attempt without a connection.
    pub fn count_connect_failure(&self, why: &'static Refusal) {
        let counter = self.connect_failures.iter().find(|(refusal, _)| *refusal == why);
        counter.iter().for_each(|(_, count)| count.inc());
    }

    /// Counts the endpoints of this upstream on each scrape, as long as it exists.
    pub fn count_endpoints(&self, group: Weak<dyn Group>) {
        self.metrics.count_endpoints(group);
    }

    /// The counters of its ejections, for these reasons. Call once, at build time.
    pub fn ejections(&self, reasons: impl IntoIterator<Item = &'static str>) -> EjectionMetrics {
        let counter = |reason| (reason, self.ejections.with_label_values(&[&*self.name, reason]));
        EjectionMetrics(reasons.into_iter().map(counter).collect())
    }

    /// The metrics of the places that all health checks share.
    pub fn check_places(&self) -> CheckPlaces {
        self.metrics.check_places()
    }

    /// The metrics of its health checks. Call once, if it has any.
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

/// The metrics of the places that all health checks share.
#[derive(Clone)]
pub struct CheckPlaces {
    /// Active checks.
    pub active: IntGauge,
    /// Upstreams that wait for a place.
    pub waiting: IntGauge,
}

/// Counts ejections of one upstream.
pub struct EjectionMetrics(Vec<(&'static str, IntCounter)>);

impl EjectionMetrics {
    /// Counts an ejection for one of the declared reasons.
    pub fn count(&self, reason: &str) {
        if let Some((_, counter)) = self.0.iter().find(|(known, _)| *known == reason) {
            counter.inc();
        }
    }
}

/// The metrics of the health checks of one upstream.
pub struct HealthCheckMetrics {
    /// Passed checks.
    pub passed: IntCounter,
    /// Failed checks.
    pub failed: IntCounter,
    /// Checks that timed out.
    pub timed_out: IntCounter,
    /// Checks that started late because too many were active.
    pub late: IntCounter,
    /// Checks for which the gateway itself lacked a descriptor, port or memory.
    pub unable: IntCounter,
}
