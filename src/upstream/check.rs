//! Active health checks, in the background and never on a worker.
//!
//! One loop per upstream with a `health_check`: it takes due endpoints from the [`Agenda`] and checks them with the
//! [`Probe`]. The number of active checks is limited, per upstream and over all upstreams ([`Places`]). Results go to
//! the endpoint's `Record` (`upstream/health.rs`), changes to the roster. Drained endpoints are still checked; removed
//! ones are not. A check uses the same protocol and TLS settings as exchanges, but a new connection: a reused one would
//! hide that new connections fail.

mod agenda;
mod connector;
mod grpc;
mod http;
mod places;
mod probe;
mod target;

use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::future::{Fuse, FusedFuture, FutureExt};
use futures::stream::{FuturesUnordered, StreamExt};
use pingora::Error;
use pingora::ErrorType::{
    ConnectNoRoute, ConnectRefused, ConnectTimedout, ConnectionClosed, Custom, InvalidHTTPHeader, ReadError, WriteError,
};
use rand::Rng;
use tokio::sync::Notify;
use tokio::time::sleep_until;
use tracing::{debug, info, warn};

use super::Upstream;
use super::endpoint::Endpoint;
use super::health::{Failure, Health, Thresholds};
use super::transport::dial::EXHAUSTED;
use crate::config;
use crate::config::upstream::health::Initial;
use crate::metrics::HealthCheckMetrics;
use crate::party::wait::{NoClient, within};
use agenda::{Agenda, Turn};
use places::Place;
use probe::Probe;

pub use places::Places;

/// The health checks of an upstream.
pub(super) struct Checks {
    terms: Terms,
    probe: Probe,
    metrics: HealthCheckMetrics,
    places: Arc<Places>,
    members_changed: Notify,
}

#[derive(Clone, Copy, Debug)]
struct Terms {
    interval: Duration,
    /// Random variation of the interval.
    jitter: f64,
    timeout: Duration,
    thresholds: Thresholds,
    unknown_is_healthy: bool,
    at_once: usize,
}

/// The result of a check.
enum Verdict {
    Passed,
    /// The reason for a failure.
    Failed(String),
    /// Timeout.
    Late(String),
    /// The gateway itself lacked a descriptor, port or memory: the check says nothing about the endpoint.
    Unable,
}

impl Checks {
    /// The configured checks, on these places.
    pub fn build(written: &config::upstream::HealthCheck, metrics: HealthCheckMetrics, places: &Arc<Places>) -> Checks {
        let count = |count: config::units::Count| u32::try_from(count.0).unwrap_or(u32::MAX);
        let terms = Terms {
            interval: written.interval.0,
            jitter: written.jitter.ratio(),
            timeout: written.timeout.0,
            thresholds: Thresholds {
                unhealthy_after: count(written.unhealthy_after),
                healthy_after: count(written.healthy_after),
            },
            unknown_is_healthy: written.initial == Initial::Healthy,
            at_once: count(written.at_once) as usize,
        };
        let (probe, places) = (Probe::build(written), places.clone());
        Checks { terms, probe, metrics, places, members_changed: Notify::new() }
    }

    /// Sets the initial state of a new endpoint.
    pub fn introduce(&self, endpoint: &Endpoint, now: Instant) {
        endpoint.set_health(Health::Unknown, self.terms.unknown_is_healthy, now);
    }

    /// Applies again the result of checks that another upstream object has recorded.
    pub fn judge(&self, endpoint: &Endpoint, now: Instant) {
        let health = endpoint.checks().health();
        endpoint.set_health(health, self.terms.unknown_is_healthy, now);
    }

    /// Reports that the list of endpoints has changed.
    pub fn members_changed(&self) {
        self.members_changed.notify_one();
    }

    /// Checks the endpoints of `upstream` in an endless loop.
    pub async fn run(&self, upstream: &Upstream) {
        let mut agenda = Agenda::default();
        self.take_in(&mut agenda, upstream);
        let mut under_way = FuturesUnordered::new();
        let mut place = pin!(Fuse::terminated());
        loop {
            // Other due checks wait until one ends, or until a place is free.
            let next = agenda.next().filter(|_| under_way.len() < self.terms.at_once && place.is_terminated());
            let next_due = async {
                match next {
                    Some(next) => sleep_until(next.into()).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                place = &mut place, if !place.is_terminated() => {
                    let now = Instant::now();
                    // The endpoint that was due may have been removed.
                    if let Some(turn) = agenda.take(now) {
                        under_way.push(self.check(turn, now, place));
                    }
                }
                Some((turn, began, verdict)) = under_way.next(), if !under_way.is_empty() => {
                    let now = Instant::now();
                    self.note(upstream, &turn.who, verdict, now);
                    agenda.again(turn, (began + self.pause()).max(now));
                }
                () = next_due => place.set(self.places.take().fuse()),
                () = self.members_changed.notified() => self.take_in(&mut agenda, upstream),
            }
        }
    }

    /// Updates the agenda. The first checks of many new endpoints are spread.
    fn take_in(&self, agenda: &mut Agenda<Arc<Endpoint>>, upstream: &Upstream) {
        let now = Instant::now();
        let first = || now + self.places.first_check(now, self.terms.interval);
        agenda.keep(&present(upstream), first);
    }

    async fn check(
        &self,
        turn: Turn<Arc<Endpoint>>,
        began: Instant,
        _place: Place,
    ) -> (Turn<Arc<Endpoint>>, Instant, Verdict) {
        if began > turn.due + self.terms.interval {
            self.metrics.late.inc();
        }
        let verdict = match within(self.terms.timeout, NoClient::HealthCheck, self.probe.ask(&turn.who)).await {
            Some(Ok(())) => Verdict::Passed,
            Some(Err(error)) if error.etype == EXHAUSTED => Verdict::Unable,
            Some(Err(error)) => Verdict::Failed(words(&error)),
            None => Verdict::Late(format!("no answer within {}", config::units::Time(self.terms.timeout))),
        };
        (turn, began, verdict)
    }

    /// The next interval, with its random variation.
    fn pause(&self) -> Duration {
        let jitter = self.terms.jitter;
        self.terms.interval.mul_f64(1.0 + jitter * rand::thread_rng().gen_range(-1.0..=1.0))
    }

    fn note(&self, upstream: &Upstream, endpoint: &Endpoint, verdict: Verdict, now: Instant) {
        let (count, problem) = match verdict {
            Verdict::Passed => (&self.metrics.passed, None),
            Verdict::Failed(problem) => (&self.metrics.failed, Some(problem)),
            Verdict::Late(problem) => (&self.metrics.timed_out, Some(problem)),
            Verdict::Unable => return self.metrics.unable.inc(),
        };
        count.inc();
        if problem.is_none() && upstream.ejector.connected(endpoint, now) {
            upstream.reassess();
        }
        let (before, after) = {
            let mut record = endpoint.checks();
            let before = record.health();
            match problem.clone() {
                None => record.passed(self.terms.thresholds),
                Some(message) => record.failed(Failure { message, at: now }, self.terms.thresholds),
            };
            (before, record.health())
        };
        if before == after {
            return;
        }
        let (upstream_name, label, address) = (&upstream.name, &endpoint.label, &endpoint.address);
        match (before, problem) {
            (_, Some(problem)) => {
                warn!(upstream = %upstream_name, endpoint = %label, %address, "the endpoint is unhealthy: {problem}");
            }
            (Health::Unknown, None) => {
                debug!(upstream = %upstream_name, endpoint = %label, %address, "the endpoint is healthy");
            }
            (_, None) => info!(upstream = %upstream_name, endpoint = %label, %address, "the endpoint is healthy again"),
        }
        if endpoint.set_health(after, self.terms.unknown_is_healthy, now).matters() {
            upstream.reassess();
        }
    }
}

/// The endpoints to check, with their identities.
fn present(upstream: &Upstream) -> Vec<(usize, Arc<Endpoint>)> {
    let members = upstream.members();
    let named = members.iter().filter(|endpoint| !endpoint.availability().is_removed());
    named.map(|endpoint| (Arc::as_ptr(endpoint) as usize, Arc::clone(endpoint))).collect()
}

/// The text of an error for operators.
fn words(error: &Error) -> String {
    let context = error.context.as_ref().map(|context| context.as_str());
    match (&error.etype, context) {
        (Custom(_), Some(context)) => context.to_owned(),
        (ConnectRefused, _) => "the connection was refused".to_owned(),
        (ConnectTimedout, _) => "no connection in time".to_owned(),
        (ConnectNoRoute, _) => "there is no route to it".to_owned(),
        (ConnectionClosed, _) => "it closed the connection without an answer".to_owned(),
        (ReadError | WriteError, _) => "the connection broke off".to_owned(),
        (InvalidHTTPHeader, _) => "its answer could not be understood".to_owned(),
        _ => error.to_string().trim().to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    use pingora::ErrorType;

    #[test]
    fn what_is_wrong_is_told_in_words() {
        let told = |kind, context: &'static str| words(&Error::explain(kind, context));
        assert_eq!(told(Custom("status"), "it answered 503"), "it answered 503");
        assert_eq!(told(ConnectRefused, "Fail to connect to 127.0.0.1:1"), "the connection was refused");
        assert_eq!(
            told(ConnectionClosed, "while reading response headers, bytes already read: 0"),
            "it closed the connection without an answer"
        );
        assert_eq!(told(InvalidHTTPHeader, "buf: hello"), "its answer could not be understood");
        assert_eq!(told(ReadError, "while reading response headers"), "the connection broke off");
        assert_eq!(told(ErrorType::H1Error, "no header"), "H1Error context: no header");
    }
}
