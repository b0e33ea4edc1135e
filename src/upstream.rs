//! A named group of endpoints: which of them takes the next exchange, and how it is connected to.
//!
//! `proxy/select.rs` asks [`Upstream::select`] and hands [`Endpoint::peer`] to Pingora. Everything that may take
//! time, such as resolving names, is done at start or in the background ([`background`]).

pub mod balance;
mod discovery;
pub mod endpoint;
pub mod health;
pub mod latency;
pub mod outlier;
pub mod slow_start;
pub mod tiers;
pub mod window;

use std::cell::OnceCell;
use std::fmt;
use std::future::Future;
use std::io;
use std::panic;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use async_trait::async_trait;
use futures::FutureExt;
use futures::future::join_all;
use pingora::server::ShutdownWatch;
use pingora::services::background::{BackgroundService, GenBackgroundService};
use pingora_load_balancing::{Backends, LoadBalancer};
use prometheus::IntCounter;
use tokio::time::{Instant, MissedTickBehavior, interval_at};
use tracing::warn;

use crate::config;
use crate::config::upstream::Protocol;
use crate::error::BuildError;
use crate::metrics::UpstreamMetrics;
use balance::SmoothRoundRobin;
use discovery::{Directory, Discovery, Location, Place, Resolve, System};
use endpoint::Transport;

pub use balance::Split;
pub use endpoint::Endpoint;

/// How often names are resolved again.
const REFRESH_INTERVAL: Duration = Duration::from_secs(30);

/// A named group of endpoints that serve the same.
pub struct Upstream {
    /// Its name: a metric label and a log field.
    pub name: Arc<str>,
    /// How long its endpoints may take.
    pub timeouts: Timeouts,
    /// Its counters.
    pub metrics: UpstreamMetrics,
    protocol: Protocol,
    balancer: LoadBalancer<SmoothRoundRobin>,
    directory: Arc<Directory>,
}

/// How long the endpoints of an upstream may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timeouts {
    /// To accept a connection, TLS included.
    pub connect: Duration,
    /// Between two pieces of the request that the endpoint takes.
    pub send: Duration,
    /// From the last byte of the request to the end of the response header.
    pub wait: Duration,
    /// Between two pieces of the response.
    pub receive: Duration,
}

impl Upstream {
    /// Builds the upstream `name`, resolving the names in it: this may block for some seconds.
    ///
    /// `selections` gives the counter for the label of an endpoint.
    ///
    /// # Errors
    ///
    /// One for each address that cannot be understood, spoken to or resolved, at `upstreams.NAME.endpoints[i].address`.
    pub fn build(
        name: &str,
        written: &config::Upstream,
        metrics: UpstreamMetrics,
    ) -> Result<Upstream, Vec<BuildError>> {
        Self::build_with(name, written, metrics, Box::new(System))
    }

    fn build_with(
        name: &str,
        written: &config::Upstream,
        metrics: UpstreamMetrics,
        resolver: Box<dyn Resolve>,
    ) -> Result<Upstream, Vec<BuildError>> {
        let place = format!("upstreams.{name}");
        if written.endpoints.is_empty() {
            let message = "an upstream needs at least one endpoint, such as `- address: 127.0.0.1:3000`";
            return Err(vec![BuildError::new("endpoints", message).under(&place)]);
        }
        let timeouts = Timeouts::from(&written.timeouts);
        let transport = Transport { protocol: written.protocol, timeouts, idle: written.keepalive.idle.0 };
        let places = places(&written.endpoints, &transport, &|label| metrics.endpoint(label))
            .map_err(|errors| at(&place, errors))?;

        let directory = Arc::new(Directory::new(places, transport, resolver));
        resolve_now(&directory).map_err(|errors| at(&place, errors))?;

        let balancer = LoadBalancer::from_backends(Backends::new(Box::new(Discovery(Arc::clone(&directory)))));
        let protocol = written.protocol;
        let upstream = Upstream { name: name.into(), timeouts, metrics, protocol, balancer, directory };
        upstream.rebalance();
        Ok(upstream)
    }

    /// Whether an exchange has a connection to its endpoint for itself.
    pub fn is_http1(&self) -> bool {
        self.protocol == Protocol::Http1
    }

    /// The endpoint whose turn it is, but none of `tried`; `None` once all of them were tried.
    pub fn select(&self, tried: &[Arc<Endpoint>]) -> Option<Arc<Endpoint>> {
        let selected = OnceCell::new();
        self.balancer.select_with(b"", usize::MAX, |backend, ready| {
            // Asked anew for each, since a refresh may come between: what a schedule names, the directory knows by then.
            let endpoint = self.directory.at(&backend.addr).filter(|_| ready);
            let untried = endpoint.filter(|endpoint| tried.iter().all(|earlier| earlier.address != endpoint.address));
            untried.is_some_and(|endpoint| selected.set(endpoint).is_ok())
        });
        let endpoint = selected.into_inner()?;
        endpoint.selections.inc();
        Some(endpoint)
    }

    /// Whether there is an endpoint that is none of `tried`.
    pub fn has_more(&self, tried: &[Arc<Endpoint>]) -> bool {
        let backends = self.balancer.backends().get_backend();
        backends.iter().any(|backend| tried.iter().all(|earlier| earlier.address != backend.addr))
    }

    /// Whether it has names that must be resolved again from time to time.
    pub fn has_names(&self) -> bool {
        self.directory.has_names()
    }

    /// Resolves its names anew and takes what has changed into the balance. What cannot be resolved stays as it was.
    pub async fn refresh(&self) {
        let failures = self.directory.refresh().await;
        self.metrics.resolutions_failed.inc_by(failures.len() as u64);
        self.metrics.resolutions_ok.inc_by((self.directory.names() - failures.len()) as u64);
        for failure in failures {
            warn!(upstream = %self.name, "{}; its last known addresses stay in use", failure.message);
        }
        self.rebalance();
    }

    /// Brings the balancer up to what the directory knows.
    fn rebalance(&self) {
        // `Discovery` awaits nothing and never fails, so neither does this.
        let updated = self.balancer.update().now_or_never();
        debug_assert!(matches!(updated, Some(Ok(()))), "the directory had to be waited for");
    }
}

impl fmt::Debug for Upstream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Upstream").field("name", &self.name).finish_non_exhaustive()
    }
}

impl From<&config::upstream::Timeouts> for Timeouts {
    fn from(written: &config::upstream::Timeouts) -> Self {
        Timeouts { connect: written.connect.0, send: written.send.0, wait: written.wait.0, receive: written.receive.0 }
    }
}

/// Understands the `endpoints:` of an upstream, without resolving them.
fn places(
    written: &[config::upstream::Endpoint],
    transport: &Transport,
    selections: &dyn Fn(&str) -> IntCounter,
) -> Result<Vec<Place>, Vec<BuildError>> {
    let mut places = Vec::new();
    let mut errors = Vec::new();
    for (index, endpoint) in written.iter().enumerate() {
        let location = Location::parse(&endpoint.address).and_then(|location| {
            let objection = transport.objection(location.host().as_deref());
            objection.map_or(Ok(location), |objection| Err(objection.to_owned()))
        });
        match location {
            Ok(location) => places.push(Place {
                label: endpoint.address.0.as_str().into(),
                location,
                weight: endpoint.weight.get() as usize,
                selections: selections(&endpoint.address.0),
            }),
            Err(message) => errors.push(address_error(index, message)),
        }
    }
    if errors.is_empty() { Ok(places) } else { Err(errors) }
}

/// Resolves the names of a directory and waits for them.
fn resolve_now(directory: &Directory) -> Result<(), Vec<BuildError>> {
    if !directory.has_names() {
        return Ok(());
    }
    let failures = block_on(directory.refresh())
        .map_err(|error| vec![BuildError::new("endpoints", format!("no names can be resolved: {error}"))])?;
    if failures.is_empty() {
        return Ok(());
    }
    Err(failures.into_iter().map(|failure| address_error(failure.place, failure.message)).collect())
}

/// Runs a future to its end on a thread of its own, since the caller may be inside a runtime, which must not block.
fn block_on<T: Send>(future: impl Future<Output = T> + Send) -> io::Result<T> {
    let run = || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build()?;
        let result = runtime.block_on(future);
        // A resolver that hangs may keep its thread; nobody waits for it.
        runtime.shutdown_background();
        Ok(result)
    };
    thread::scope(|scope| scope.spawn(run).join()).unwrap_or_else(|panic| panic::resume_unwind(panic))
}

fn address_error(index: usize, message: String) -> BuildError {
    BuildError::new(format!("endpoints[{index}].address"), message)
}

fn at(place: &str, errors: Vec<BuildError>) -> Vec<BuildError> {
    errors.into_iter().map(|error| error.under(place)).collect()
}

/// Resolves the names of all upstreams again and again, in one thread.
pub struct Refresh {
    upstreams: Vec<Arc<Upstream>>,
    interval: Duration,
}

/// The service that keeps the names of `upstreams` resolved; `None` if they have none.
pub fn background<'a>(upstreams: impl IntoIterator<Item = &'a Arc<Upstream>>) -> Option<GenBackgroundService<Refresh>> {
    let upstreams: Vec<_> = upstreams.into_iter().filter(|upstream| upstream.has_names()).cloned().collect();
    let refresh = Refresh { upstreams, interval: REFRESH_INTERVAL };
    (!refresh.upstreams.is_empty()).then(|| GenBackgroundService::new("resolver".to_owned(), Arc::new(refresh)))
}

#[async_trait]
impl BackgroundService for Refresh {
    async fn start(&self, mut shutdown: ShutdownWatch) {
        let mut ticks = interval_at(Instant::now() + self.interval, self.interval);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                _ = ticks.tick() => {}
                _ = shutdown.changed() => return,
            }
            let mut round = Vec::new();
            for upstream in &self.upstreams {
                round.push(upstream.refresh().boxed());
            }
            tokio::select! {
                _ = join_all(round) => {}
                _ = shutdown.changed() => return,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    use std::collections::{BTreeMap, BTreeSet, HashMap};
    use std::net::SocketAddr;
    use std::num::NonZeroU32;
    use std::sync::Mutex;

    use crate::config::Address;
    use crate::config::upstream::{Keepalive, LoadBalancing};

    /// A resolver that answers what a test tells it to.
    #[derive(Default)]
    struct Script(Mutex<HashMap<&'static str, Vec<&'static str>>>);

    impl Script {
        /// `host` has these addresses from now on; none of them: it cannot be resolved.
        fn set(self: &Arc<Self>, host: &'static str, addresses: &[&'static str]) -> Arc<Self> {
            self.0.lock().unwrap().insert(host, addresses.to_vec());
            Arc::clone(self)
        }
    }

    #[async_trait]
    impl Resolve for Arc<Script> {
        async fn resolve(&self, host: &str, port: u16) -> io::Result<Vec<SocketAddr>> {
            match self.0.lock().unwrap().get(host) {
                Some(addresses) if !addresses.is_empty() => {
                    Ok(addresses.iter().map(|address| SocketAddr::new(address.parse().unwrap(), port)).collect())
                }
                _ => Err(io::Error::other("no such host")),
            }
        }
    }

    fn written(endpoints: &[(&str, u32)]) -> config::Upstream {
        let endpoint = |&(address, weight): &(&str, u32)| config::upstream::Endpoint {
            address: Address(address.to_owned()),
            weight: NonZeroU32::new(weight).unwrap(),
        };
        config::Upstream {
            protocol: Protocol::Http1,
            load_balancing: LoadBalancing::default(),
            endpoints: endpoints.iter().map(endpoint).collect(),
            keepalive: Keepalive::default(),
            timeouts: config::upstream::Timeouts::default(),
        }
    }

    fn metrics() -> UpstreamMetrics {
        crate::metrics::Metrics::new(100, Vec::new()).upstream("shop")
    }

    fn build(endpoints: &[(&str, u32)], resolver: &Arc<Script>) -> Result<Upstream, Vec<BuildError>> {
        Upstream::build_with("shop", &written(endpoints), metrics(), Box::new(Arc::clone(resolver)))
    }

    /// What `turns` selections give, as `label address`, with how often.
    fn selected(upstream: &Upstream, turns: usize) -> BTreeMap<String, usize> {
        let mut counts = BTreeMap::new();
        for _ in 0..turns {
            let endpoint = upstream.select(&[]).unwrap();
            *counts.entry(format!("{} {}", endpoint.label, endpoint.address)).or_default() += 1;
        }
        counts
    }

    fn counts(expected: &[(&str, usize)]) -> BTreeMap<String, usize> {
        expected.iter().map(|(endpoint, count)| (endpoint.to_string(), *count)).collect()
    }

    #[test]
    fn endpoints_take_turns_by_weight_and_each_selection_is_counted() {
        let upstream = build(&[("10.0.0.1:80", 5), ("unix:/run/b.sock", 1), ("[::1]:80", 1)], &Arc::default()).unwrap();
        let order: Vec<_> = (0..7).map(|_| upstream.select(&[]).unwrap()).collect();
        let labels: Vec<&str> = order.iter().map(|endpoint| &*endpoint.label).collect();
        let a = "10.0.0.1:80";
        assert_eq!(labels, [a, a, "[::1]:80", a, "unix:/run/b.sock", a, a]);
        assert_eq!(order[0].selections.get(), 5);
        assert!(!upstream.has_names());
    }

    #[test]
    fn an_endpoint_that_was_tried_is_not_selected_again_and_after_the_last_there_is_none() {
        let upstream = build(&[("10.0.0.1:80", 9), ("10.0.0.2:80", 1), ("10.0.0.3:80", 1)], &Arc::default()).unwrap();
        let mut tried = Vec::new();
        while let Some(endpoint) = upstream.select(&tried) {
            tried.push(endpoint);
        }
        let distinct: BTreeSet<String> = tried.iter().map(|endpoint| endpoint.address.to_string()).collect();
        assert_eq!((tried.len(), distinct.len()), (3, 3));
    }

    #[test]
    fn a_name_with_several_addresses_is_several_endpoints() {
        let script = Arc::<Script>::default().set("api.test", &["10.0.0.1", "10.0.0.2", "10.0.0.1"]);
        let upstream = build(&[("api.test:80", 2), ("10.0.0.3:80", 1)], &script).unwrap();
        let expected =
            counts(&[("10.0.0.3:80 10.0.0.3:80", 1), ("api.test:80 10.0.0.1:80", 2), ("api.test:80 10.0.0.2:80", 2)]);
        assert_eq!(selected(&upstream, 5), expected);
        assert!(upstream.has_names());
    }

    #[test]
    fn an_address_that_is_meant_twice_is_one_endpoint_with_both_weights() {
        let script = Arc::<Script>::default().set("a.test", &["10.0.0.1"]).set("b.test", &["10.0.0.1"]);
        let upstream = build(&[("a.test:80", 1), ("b.test:80", 2), ("10.0.0.2:80", 1)], &script).unwrap();
        assert_eq!(selected(&upstream, 4), counts(&[("10.0.0.2:80 10.0.0.2:80", 1), ("a.test:80 10.0.0.1:80", 3)]));
    }

    #[tokio::test]
    async fn a_refresh_takes_in_new_addresses_and_keeps_the_last_good_answer() {
        let script = Arc::<Script>::default().set("a.test", &["10.0.0.1"]).set("b.test", &["10.0.1.1"]);
        let upstream = build(&[("a.test:80", 1), ("b.test:80", 1)], &script).unwrap();
        let before = upstream.select(&[]).unwrap();

        script.set("a.test", &[]).set("b.test", &["10.0.1.2", "10.0.1.3"]);
        upstream.refresh().await;
        let expected = [("a.test:80 10.0.0.1:80", 1), ("b.test:80 10.0.1.2:80", 1), ("b.test:80 10.0.1.3:80", 1)];
        assert_eq!(selected(&upstream, 3), counts(&expected));
        let after = upstream.select(&[]).unwrap();
        assert!(Arc::ptr_eq(&before, &after), "an endpoint that stays is the same one");
    }

    #[tokio::test]
    async fn names_that_swap_their_addresses_swap_their_endpoints() {
        let script = Arc::<Script>::default().set("a.test", &["10.0.0.1"]).set("b.test", &["10.0.0.2"]);
        let upstream = build(&[("a.test:80", 1), ("b.test:80", 1)], &script).unwrap();
        script.set("a.test", &["10.0.0.2"]).set("b.test", &["10.0.0.1"]);
        upstream.refresh().await;
        assert_eq!(selected(&upstream, 2), counts(&[("a.test:80 10.0.0.2:80", 1), ("b.test:80 10.0.0.1:80", 1)]));
    }

    #[tokio::test]
    async fn between_the_directory_and_the_balancer_no_request_goes_without_an_endpoint() {
        let script = Arc::<Script>::default().set("a.test", &["10.0.0.1"]);
        let upstream = build(&[("a.test:80", 1)], &script).unwrap();
        script.set("a.test", &["10.0.0.2"]);
        assert!(upstream.directory.refresh().await.is_empty());
        assert_eq!(upstream.select(&[]).unwrap().address.to_string(), "10.0.0.1:80", "the balancer knows no other yet");
        upstream.rebalance();
        assert_eq!(upstream.select(&[]).unwrap().address.to_string(), "10.0.0.2:80");
    }

    #[tokio::test]
    async fn the_resolver_of_the_system_may_be_asked_from_within_a_runtime() {
        let upstream = Upstream::build("shop", &written(&[("localhost:80", 1)]), metrics()).unwrap();
        assert_eq!(&*upstream.select(&[]).unwrap().label, "localhost:80");
    }

    #[test]
    fn every_address_that_is_wrong_or_unknown_is_told_with_its_place() {
        let errors = build(&[("10.0.0.1:80", 1), ("api.test", 1), ("unix:", 1)], &Arc::default()).unwrap_err();
        let told: Vec<String> = errors.iter().map(ToString::to_string).collect();
        assert_eq!(
            told,
            [
                "upstreams.shop.endpoints[1].address: `api.test` is no address: write `host:port`, `[v6]:port` or `unix:/path`",
                "upstreams.shop.endpoints[2].address: `unix:` needs a path, such as `unix:/run/app.sock`",
            ]
        );

        let errors = build(&[("10.0.0.1:80", 1), ("api.test:80", 1)], &Arc::default()).unwrap_err();
        assert_eq!(
            errors[0].to_string(),
            "upstreams.shop.endpoints[1].address: `api.test` could not be resolved: no such host"
        );
        assert_eq!(build(&[], &Arc::default()).unwrap_err()[0].path, "upstreams.shop.endpoints");
    }

    #[test]
    fn h2_needs_a_name_to_verify_the_certificate_against() {
        let script = Arc::<Script>::default().set("api.test", &["10.0.0.1"]);
        let addresses = [("10.0.0.1:443", 1), ("api.test:443", 1), ("[::1]:443", 1), ("unix:/run/a.sock", 1)];
        let written = config::Upstream { protocol: Protocol::H2, ..written(&addresses) };
        let errors = Upstream::build_with("shop", &written, metrics(), Box::new(script)).unwrap_err();
        let places: Vec<&str> = errors.iter().map(|error| error.path.trim_start_matches("upstreams.shop.")).collect();
        assert_eq!(places, ["endpoints[0].address", "endpoints[2].address", "endpoints[3].address"]);
    }

    #[tokio::test]
    async fn names_are_resolved_again_in_the_background_until_the_process_stops() {
        let script = Arc::<Script>::default().set("a.test", &["10.0.0.1"]);
        let upstream = Arc::new(build(&[("a.test:80", 1)], &script).unwrap());
        let refresh = Refresh { upstreams: vec![Arc::clone(&upstream)], interval: Duration::from_millis(1) };
        let (stop, stopped) = tokio::sync::watch::channel(false);
        let running = tokio::spawn(async move { refresh.start(stopped).await });

        script.set("a.test", &["10.0.0.2"]);
        let refreshed = async {
            while upstream.select(&[]).unwrap().address.to_string() != "10.0.0.2:80" {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(Duration::from_secs(10), refreshed).await.unwrap();
        stop.send(true).unwrap();
        running.await.unwrap();
    }

    #[test]
    fn one_service_resolves_for_all_upstreams_and_there_is_none_without_names() {
        let script = Arc::<Script>::default().set("a.test", &["10.0.0.1"]);
        let named = Arc::new(build(&[("a.test:80", 1)], &script).unwrap());
        let literal = Arc::new(build(&[("10.0.0.9:80", 1)], &script).unwrap());
        assert!(background([&literal]).is_none());
        assert_eq!(background([&named, &literal, &named]).unwrap().task().upstreams.len(), 2);
    }
}
