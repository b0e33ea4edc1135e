//! Ejects endpoints because of the results of requests, and takes them back after a time.
//!
//! Workers only count ([`Ejector::hear`]) in atomics of the endpoint, and flag one that fails too often. A
//! background loop decides, since an ejection depends on how many others are ejected and how fast they are.
//! `upstream/outlier.rs` has the rules.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::Notify;
use tokio::time::{MissedTickBehavior, interval_at, sleep_until};
use tracing::{info, warn};

use super::Upstream;
use super::ended::Ended;
use super::endpoint::Endpoint;
use super::outlier::{self, Reason, Rules, Sample};
use crate::config;
use crate::config::units::{Count, Time};
use crate::metrics::EjectionMetrics;

/// The outlier detection of an upstream.
pub(super) struct Ejector {
    rules: Rules,
    interval: Duration,
    metrics: EjectionMetrics,
    accused: Notify,
}

impl Ejector {
    /// Builds it with the configured rules.
    pub fn build(written: &config::upstream::OutlierDetection, metrics: EjectionMetrics) -> Ejector {
        let (rules, interval) = (rules(written), written.interval.0);
        Ejector { rules, interval, metrics, accused: Notify::new() }
    }

    /// An attempt at `endpoint` has ended. On the request path: takes no lock, and a success writes almost nothing.
    pub fn hear(&self, endpoint: &Endpoint, ended: &Ended) {
        let Some(pass) = ended.effects().outlier else { return };
        let guilty = endpoint.score.note(pass, ended.to_header(), &self.rules);
        if let Some(reason) = guilty.filter(|_| !endpoint.availability().is_ejected())
            && endpoint.ejection_signal.raise(reason)
        {
            self.accused.notify_one();
        }
    }

    /// Evaluates the endpoints of `upstream` in an endless loop.
    pub async fn run(&self, upstream: &Upstream) {
        let mut ticks = interval_at(tokio::time::Instant::now() + self.interval, self.interval);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let next = upstream.members().iter().filter_map(until).min();
            let next_return = async {
                match next {
                    Some(next) => sleep_until(next.into()).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = self.accused.notified() => self.hear_out(upstream, Instant::now()),
                _ = ticks.tick() => self.compare(upstream, Instant::now()),
                () = next_return => self.take_back(upstream, Instant::now()),
            }
        }
    }

    /// A health check has connected to this endpoint. Returns whether that ended an ejection.
    pub fn connected(&self, endpoint: &Endpoint, now: Instant) -> bool {
        let back = endpoint.availability().is_ejected() && endpoint.ejections().refute(now);
        if back {
            self.free(endpoint, now);
        }
        back
    }

    /// Evaluates flagged endpoints.
    fn hear_out(&self, upstream: &Upstream, now: Instant) {
        for endpoint in upstream.members().iter() {
            if let Some(reason) = endpoint.ejection_signal.reason() {
                self.eject(upstream, endpoint, reason, now);
            }
        }
    }

    /// Compares endpoints by their results since the last time.
    fn compare(&self, upstream: &Upstream, now: Instant) {
        let members = upstream.members();
        for endpoint in members.iter() {
            // An endpoint that could not be ejected must fail again to be flagged.
            endpoint.ejection_signal.drop();
        }
        if self.rules.success_rate.is_none() && self.rules.latency.is_none() {
            return;
        }
        let samples: Vec<Sample> = members.iter().map(|endpoint| endpoint.score.take()).collect();
        for (number, reason) in outlier::outliers(&samples, &self.rules) {
            self.eject(upstream, &members[number], reason, now);
        }
    }

    fn eject(&self, upstream: &Upstream, endpoint: &Endpoint, reason: Reason, now: Instant) {
        let (mut ejected, mut of) = (0, 0);
        for member in upstream.members().iter().map(|member| member.availability()) {
            of += usize::from(member.admits_in_panic());
            ejected += usize::from(member.admits_in_panic() && member.is_ejected());
        }
        if !outlier::may_eject(ejected, of, self.rules.max_ejected) {
            return;
        }
        let length = endpoint.ejections().eject(reason, now, self.rules.terms);
        endpoint.ejection_signal.drop();
        let Some(length) = length else { return };
        self.metrics.count(reason.name());
        warn!(
            upstream = %upstream.name, endpoint = %endpoint.label, address = %endpoint.address, reason = reason.name(),
            "the endpoint is ejected for {} s", length.as_secs_f64()
        );
        if endpoint.set_ejected(true, now).matters() {
            upstream.reassess();
        }
    }

    /// Takes back endpoints whose ejection has ended.
    fn take_back(&self, upstream: &Upstream, now: Instant) {
        for endpoint in upstream.members().iter().filter(|endpoint| endpoint.availability().is_ejected()) {
            if endpoint.ejections().expire(now) {
                self.free(endpoint, now);
                info!(
                    upstream = %upstream.name, endpoint = %endpoint.label, address = %endpoint.address,
                    "the endpoint is tried again after its ejection"
                );
                upstream.reassess();
            }
        }
    }

    fn free(&self, endpoint: &Endpoint, now: Instant) {
        endpoint.score.try_again(&self.rules);
        endpoint.ejection_signal.drop();
        endpoint.set_ejected(false, now);
    }
}

/// The end of its ejection, if it is ejected.
fn until(endpoint: &Arc<Endpoint>) -> Option<Instant> {
    let ejected = endpoint.availability().is_ejected();
    ejected.then(|| endpoint.ejections().current().map(|current| current.until)).flatten()
}

fn rules(written: &config::upstream::OutlierDetection) -> Rules {
    let count = |Count(count): Count| u32::try_from(count).unwrap_or(u32::MAX);
    let hosts = |count: Count| usize::try_from(count.0).unwrap_or(usize::MAX);
    let Time(base) = written.base_ejection;
    Rules {
        consecutive_5xx: count(written.consecutive_5xx),
        consecutive_gateway_errors: count(written.consecutive_gateway_errors),
        connect_failures: count(written.connect_failures),
        success_rate: written.success_rate.as_ref().map(|rate| outlier::SuccessRate {
            factor: rate.factor,
            margin: rate.margin.ratio(),
            hosts: hosts(rate.endpoints),
            requests: count(rate.requests),
        }),
        latency: written.latency.as_ref().map(|latency| outlier::Latency {
            factor: latency.factor,
            margin: latency.margin.0,
            hosts: hosts(latency.endpoints),
            requests: count(latency.requests),
        }),
        terms: outlier::Terms { base, max: written.max_ejection.0.max(base) },
        max_ejected: written.max_ejected.ratio(),
    }
}
