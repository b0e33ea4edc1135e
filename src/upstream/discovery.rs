//! Endpoint discovery: literal addresses, names, SRV records, or a file. Look-ups happen at start and in the
//! background, never while an exchange waits.
//!
//! A [`Discovery`] stores the last good answer for each name ([`memory`]) and reports the result to
//! `Upstream::discovered`.

mod family;
mod file;
mod location;
mod memory;
mod resolver;

use std::collections::{BTreeMap, BTreeSet};
use std::num::NonZeroU32;
use std::pin::pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use futures::stream::{self, FuturesUnordered, StreamExt};
use pingora::protocols::l4::socket::SocketAddr;
use tokio::time::sleep_until;
use tracing::{info, warn};

use super::Upstream;
use super::endpoint::Found;
use super::transport::Transport;
use crate::config;
use crate::config::upstream::{Dns, Endpoint};
use crate::error::BuildError;
use crate::metrics::DiscoveryMetrics;
use family::{AddressPair, address_pairs, is_reachable};
use file::{Contents, Listed, aside};
use location::Location;
use memory::{Kind, Memory};
use resolver::Resolver;

pub(super) use memory::QueryResult;
pub(super) use resolver::{Resolve, Service};

/// Look-ups of an upstream that run at once.
const AT_ONCE: usize = 64;

/// The known endpoints of an upstream.
pub(super) struct Discovery {
    resolver: Box<dyn Resolve>,
    refresh: Duration,
    listing: Mutex<Listing>,
    file: Option<Listed>,
    metrics: DiscoveryMetrics,
}

/// The current list; that of a file may change.
#[derive(Default)]
struct Listing {
    /// Distinguishes it from earlier lists: look-ups for those are ignored.
    generation: u64,
    entries: Vec<Entry>,
    /// The hash of the file when last read, and whether its list was valid.
    look: Option<(u64, bool)>,
}

/// One entry of a list, or a name of `dns`.
struct Entry {
    label: Arc<str>,
    server_name: Option<Arc<str>>,
    weight: NonZeroU32,
    /// Its tier; priorities of SRV records are added to it.
    tier: u8,
    what: What,
}

enum What {
    Literal(SocketAddr),
    Asked {
        question: Question,
        memory: Memory<Target>,
        next: Instant,
        /// Its path in the configuration, if the name must exist at start.
        place: Option<String>,
    },
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Question {
    Addresses { host: Arc<str>, port: u16 },
    Services(Arc<str>),
}

/// An address found under a name.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Target {
    pair: AddressPair,
    weight: Option<NonZeroU32>,
    tier: u8,
}

/// The list and the index in it.
type Place = (u64, usize);

impl Discovery {
    /// Parses the settings and reads the file; resolves nothing yet. `resolver` replaces the configured one.
    pub fn build(
        written: &config::Upstream,
        transport: &Transport,
        metrics: DiscoveryMetrics,
        resolver: Option<Box<dyn Resolve>>,
    ) -> Result<Discovery, Vec<BuildError>> {
        let (mut refresh, mut timeout, mut servers) = (Dns::default_refresh().0, Dns::default_timeout().0, Vec::new());
        let mut listing = Listing::default();
        let mut file = None;
        if let Some(dns) = &written.dns {
            (refresh, timeout) = (dns.refresh.0, dns.timeout.0);
            // The configuration was checked: all are valid.
            servers = dns.servers.iter().filter_map(|server| Dns::server(server)).collect();
            let entry =
                named(dns).ok_or_else(|| vec![BuildError::new("dns", "expected a `name` and a `port`, or `srv`")])?;
            if let Some(objection) = transport.objection(entry.server_name.as_deref()) {
                return Err(vec![BuildError::new("dns", objection)]);
            }
            listing.entries = vec![entry];
        } else if let Some(source) = &written.file {
            let listed = Listed::new(source);
            let contents = listed.changed(None);
            let wrong = |why: String| vec![BuildError::new("file.path", why)];
            if let Some(Contents { hash, listed }) = contents {
                listing.entries =
                    listed.and_then(|listed| entries_of_file(&source.path, &listed, transport)).map_err(wrong)?;
                listing.look = Some((hash, true));
            }
            file = Some(listed);
        } else {
            if written.endpoints.is_empty() {
                let message = "an upstream needs at least one endpoint, such as `- address: 127.0.0.1:3000`";
                return Err(vec![BuildError::new("endpoints", message)]);
            }
            listing.entries = entries(&written.endpoints, transport)?;
        }
        let resolver = resolver.unwrap_or_else(|| Box::new(Resolver::new(servers, timeout)));
        Ok(Discovery { resolver, refresh, listing: Mutex::new(listing), file, metrics })
    }

    /// Copies what `before` knows of common names.
    pub fn remember(&self, before: &Discovery) {
        let before = before.listing();
        self.listing().learn_from(&before);
    }

    /// All known endpoints.
    pub fn found(&self) -> Vec<Found> {
        let listing = self.listing();
        listing.entries.iter().flat_map(Entry::found).collect()
    }

    /// Resolves all names in parallel.
    ///
    /// # Errors
    ///
    /// One per name in `endpoints` that does not exist, which is probably misspelt. A missing answer is not an
    /// error.
    pub async fn look(&self, upstream: &str) -> Vec<BuildError> {
        let asking: Vec<(Place, Question)> = self.listing().questions().collect();
        let answers: Vec<_> = stream::iter(asking.into_iter().map(|(place, question)| self.ask(place, question)))
            .buffer_unordered(AT_ONCE)
            .collect()
            .await;
        let mut errors = BTreeMap::new();
        for (place, answer) in answers {
            if let (QueryResult::None(why), Some(at)) = (&answer, self.listing().must_be(place)) {
                errors.insert(place, BuildError::new(at, why.clone()));
            }
            self.note(upstream, place, answer);
        }
        errors.into_values().collect()
    }

    /// Keeps the list up to date, in an endless loop.
    pub async fn keep(&self, upstream: &Upstream) {
        let watch = self.file.as_ref().map(Listed::watch);
        if watch.is_none() && self.listing().questions().next().is_none() {
            return;
        }
        let mut due = self.listing().due();
        let mut under_way = FuturesUnordered::new();
        // Kept across iterations: if it restarted with each answer, it would lose events and never reach its
        // refresh.
        let changed = || async {
            match &watch {
                Some(watch) => watch.changed().await,
                None => std::future::pending().await,
            }
        };
        let mut change = pin!(changed());
        loop {
            let now = Instant::now();
            while under_way.len() < AT_ONCE
                && let Some(&(next, place)) = due.first()
                && next <= now
            {
                due.pop_first();
                if let Some(question) = self.listing().question(place) {
                    under_way.push(self.ask(place, question));
                }
            }
            let next = due.first().filter(|_| under_way.len() < AT_ONCE).map(|(next, _)| *next);
            tokio::select! {
                Some((place, answer)) = under_way.next(), if !under_way.is_empty() => {
                    if let Some((next, changed)) = self.note(&upstream.name, place, answer) {
                        due.insert((next, place));
                        if changed {
                            upstream.discovered(self.found());
                        }
                    }
                }
                () = async { match next { Some(next) => sleep_until(next.into()).await, None => std::future::pending().await } } => {}
                () = &mut change => {
                    change.set(changed());
                    if self.look_again(&upstream.name, &upstream.transport).await {
                        due = self.listing().due();
                        upstream.discovered(self.found());
                    }
                }
            }
        }
    }

    async fn ask(&self, place: Place, question: Question) -> (Place, QueryResult<Target>) {
        let answer = match question {
            Question::Addresses { host, port } => match self.resolver.addresses(&host).await {
                QueryResult::Found(addresses, ttl) => {
                    let target = |pair| Target { pair, weight: None, tier: 0 };
                    let targets = address_pairs(&addresses, port, is_reachable).into_iter().map(target);
                    QueryResult::Found(targets.collect(), ttl)
                }
                QueryResult::None(why) => QueryResult::None(why),
                QueryResult::Failed(why) => QueryResult::Failed(why),
            },
            Question::Services(name) => match self.resolver.services(&name).await {
                QueryResult::Found(services, ttl) => QueryResult::Found(targets(&services), ttl),
                QueryResult::None(why) => QueryResult::None(why),
                QueryResult::Failed(why) => QueryResult::Failed(why),
            },
        };
        (place, answer)
    }

    /// Processes an answer: when to ask again, and whether the result changed. `None` if it is outdated.
    fn note(&self, upstream: &str, place: Place, answer: QueryResult<Target>) -> Option<(Instant, bool)> {
        let mut listing = self.listing();
        let entry = listing.entry(place)?;
        let label = entry.label.clone();
        let What::Asked { memory, next, .. } = &mut entry.what else { return None };
        let why = match &answer {
            QueryResult::Found(..) => String::new(),
            QueryResult::None(why) | QueryResult::Failed(why) => why.clone(),
        };
        let learned = memory.learn(answer, Instant::now(), self.refresh);
        *next = learned.next;
        let known = memory.good().len();
        drop(listing);
        match learned.kind {
            Kind::Found => self.metrics.ok.inc(),
            Kind::None => self.metrics.none.inc(),
            Kind::Failed => self.metrics.failed.inc(),
        }
        match learned.kind {
            Kind::None if learned.changed => {
                warn!(upstream, name = %label, "{why}, and has been for long: it has no endpoints")
            }
            Kind::None | Kind::Failed if learned.is_news => {
                warn!(upstream, name = %label, "{why}; what is known of it stays: {known} endpoints");
            }
            Kind::Found if learned.changed => info!(upstream, name = %label, "found: {known} endpoints"),
            _ => {}
        }
        Some((learned.next, learned.changed))
    }

    /// Reads the file again; returns whether the list changed.
    async fn look_again(&self, upstream: &str, transport: &Transport) -> bool {
        let Some(file) = self.file.clone() else { return false };
        let last = self.listing().look;
        let (path, number) = (file.path().to_owned(), last.map(|(hash, _)| hash));
        let Ok(contents) = aside(move || file.changed(number)).await else { return false };
        let Some(Contents { hash, listed }) = contents else {
            let good = last.is_some_and(|(_, good)| good);
            if good {
                self.metrics.ok.inc()
            } else {
                self.metrics.failed.inc()
            }
            return false;
        };
        let entries = listed.and_then(|listed| entries_of_file(&path, &listed, transport));
        let mut listing = self.listing();
        listing.look = Some((hash, entries.is_ok()));
        match entries {
            Ok(mut entries) => {
                self.metrics.ok.inc();
                info!(upstream, file = path, "the file lists {} endpoints now", entries.len());
                listing.hand_down(&mut entries);
                listing.entries = entries;
                listing.generation += 1;
                true
            }
            Err(why) => {
                self.metrics.failed.inc();
                warn!(upstream, "{why}; the last good list stays in use");
                false
            }
        }
    }

    fn listing(&self) -> MutexGuard<'_, Listing> {
        self.listing.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Listing {
    fn entry(&mut self, (generation, index): Place) -> Option<&mut Entry> {
        self.entries.get_mut(index).filter(|_| generation == self.generation)
    }

    fn question(&self, (generation, index): Place) -> Option<Question> {
        match &self.entries.get(index).filter(|_| generation == self.generation)?.what {
            What::Asked { question, .. } => Some(question.clone()),
            What::Literal(_) => None,
        }
    }

    fn questions(&self) -> impl Iterator<Item = (Place, Question)> {
        let generation = self.generation;
        self.entries.iter().enumerate().filter_map(move |(index, entry)| match &entry.what {
            What::Asked { question, .. } => Some(((generation, index), question.clone())),
            What::Literal(_) => None,
        })
    }

    /// The path of a name that must exist.
    fn must_be(&self, (_, index): Place) -> Option<String> {
        match &self.entries.get(index)?.what {
            What::Asked { place, .. } => place.clone(),
            What::Literal(_) => None,
        }
    }

    /// When each name is due.
    fn due(&self) -> BTreeSet<(Instant, Place)> {
        let entries = self.entries.iter().enumerate();
        let asked = entries.filter_map(|(index, entry)| match &entry.what {
            What::Asked { next, .. } => Some((*next, (self.generation, index))),
            What::Literal(_) => None,
        });
        asked.collect()
    }

    /// Copies what another list knows of common names.
    fn learn_from(&mut self, other: &Listing) {
        let mut known = BTreeMap::new();
        for entry in &other.entries {
            if let What::Asked { question, memory, .. } = &entry.what {
                known.insert(question.clone(), memory);
            }
        }
        for entry in &mut self.entries {
            if let What::Asked { question, memory, .. } = &mut entry.what
                && let Some(&earlier) = known.get(&*question)
            {
                *memory = earlier.clone();
            }
        }
    }

    /// Keeps what is known of names that stay.
    fn hand_down(&mut self, entries: &mut [Entry]) {
        let mut known = BTreeMap::new();
        for entry in &mut self.entries {
            if let What::Asked { question: Question::Addresses { host, port }, memory, next, .. } = &mut entry.what {
                known.insert((host.clone(), *port), (std::mem::take(memory), *next));
            }
        }
        for entry in entries {
            if let What::Asked { question: Question::Addresses { host, port }, memory, next, .. } = &mut entry.what
                && let Some(earlier) = known.remove(&(host.clone(), *port))
            {
                (*memory, *next) = earlier;
            }
        }
    }
}

impl Entry {
    fn found(&self) -> impl Iterator<Item = Found> {
        let found = |address: SocketAddr, alternate, weight: Option<NonZeroU32>, priority| Found {
            label: self.label.clone(),
            address,
            server_name: self.server_name.clone(),
            weight: weight.unwrap_or(self.weight),
            priority,
            alternate,
        };
        let (literal, targets) = match &self.what {
            What::Literal(address) => (Some(address.clone()), &[][..]),
            What::Asked { memory, .. } => (None, memory.good()),
        };
        let targets = targets.iter().map(move |target| {
            let AddressPair { address, alternate } = target.pair;
            found(SocketAddr::Inet(address), alternate, target.weight, self.tier.saturating_add(target.tier))
        });
        literal.into_iter().map(move |address| found(address, None, None, self.tier)).chain(targets)
    }
}

/// Parses the `endpoints:` of an upstream, without resolving names.
fn entries(written: &[Endpoint], transport: &Transport) -> Result<Vec<Entry>, Vec<BuildError>> {
    let mut entries = Vec::new();
    let mut errors = Vec::new();
    for (index, endpoint) in written.iter().enumerate() {
        let place = format!("endpoints[{index}].address");
        match entry(endpoint, endpoint.address.0.as_str().into(), Some(&place), transport) {
            Ok(entry) => entries.push(entry),
            Err(message) => errors.push(BuildError::new(place, message)),
        }
    }
    if errors.is_empty() { Ok(entries) } else { Err(errors) }
}

/// As [`entries`], for a file. All its endpoints share one label, since labels come from the configuration and the
/// file's content changes.
fn entries_of_file(path: &str, listed: &[Endpoint], transport: &Transport) -> Result<Vec<Entry>, String> {
    let label: Arc<str> = path.into();
    let made = listed.iter().enumerate().map(|(index, endpoint)| {
        entry(endpoint, label.clone(), None, transport)
            .map_err(|message| format!("{path}: [{index}].address: {message}"))
    });
    made.collect()
}

fn entry(endpoint: &Endpoint, label: Arc<str>, place: Option<&str>, transport: &Transport) -> Result<Entry, String> {
    let location = Location::parse(&endpoint.address)?;
    let server_name: Option<Arc<str>> = location.host().map(Into::into);
    if let Some(objection) = transport.objection(server_name.as_deref()) {
        return Err(objection.to_owned());
    }
    let what = match location {
        Location::Literal(address) => What::Literal(address),
        Location::Name { host, port } => asked(Question::Addresses { host: host.into(), port }, place),
    };
    Ok(Entry { label, server_name, weight: endpoint.weight, tier: endpoint.tier(), what })
}

/// The entry for `dns`.
fn named(dns: &Dns) -> Option<Entry> {
    let (label, server_name, question) = match (&dns.name, dns.port, &dns.srv) {
        (Some(name), Some(port), None) => {
            (format!("{name}:{port}"), name.as_str(), Question::Addresses { host: name.as_str().into(), port })
        }
        // The DNS answer could name any host, so certificates must be issued for the domain of the service (RFC
        // 6125 §6.2.1).
        (None, None, Some(srv)) => (srv.clone(), domain(srv), Question::Services(srv.as_str().into())),
        _ => return None,
    };
    let server_name = Some(server_name.trim_end_matches('.').into());
    Some(Entry { label: label.into(), server_name, weight: NonZeroU32::MIN, tier: 0, what: asked(question, None) })
}

/// The domain of a service name: the part after `_service._proto.`.
fn domain(srv: &str) -> &str {
    let mut rest = srv;
    while let Some((label, domain)) = rest.split_once('.').filter(|(label, _)| label.starts_with('_')) {
        let _ = label;
        rest = domain;
    }
    rest
}

fn asked(question: Question, place: Option<&str>) -> What {
    What::Asked { question, memory: Memory::default(), next: Instant::now(), place: place.map(str::to_owned) }
}

/// The endpoints of SRV records: each priority is a tier, the lowest first.
fn targets(services: &[Service]) -> Vec<Target> {
    let priorities: BTreeSet<u16> = services.iter().map(|service| service.priority).collect();
    let tier = |priority| u8::try_from(priorities.range(..priority).count()).unwrap_or(u8::MAX);
    let mut targets: Vec<Target> = services
        .iter()
        .flat_map(|service| {
            // Weight 0 means: hardly ever to be chosen (RFC 2782).
            let (weight, tier) = (NonZeroU32::new(service.weight.into()), tier(service.priority));
            let weight = Some(weight.unwrap_or(NonZeroU32::MIN));
            address_pairs(&service.addresses, service.port, is_reachable).into_iter().map(move |pair| Target {
                pair,
                weight,
                tier,
            })
        })
        .collect();
    // DNS answers have no fixed order.
    targets.sort_by_key(|target| (target.tier, target.pair));
    targets
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn priorities_of_a_service_are_tiers_and_its_weights_are_weights() {
        let service =
            |priority, weight, port| Service { priority, weight, port, addresses: vec!["10.0.0.1".parse().unwrap()] };
        let found = targets(&[service(20, 5, 3), service(10, 0, 2), service(10, 60, 1), service(30, 7, 4)]);
        let told: Vec<_> = found
            .iter()
            .map(|target| (target.pair.address.port(), target.tier, target.weight.map(NonZeroU32::get)))
            .collect();
        assert_eq!(told, [(1, 0, Some(60)), (2, 0, Some(1)), (3, 1, Some(5)), (4, 2, Some(7))]);
    }

    #[test]
    fn a_service_is_verified_by_its_domain() {
        assert_eq!(domain("_http._tcp.shop.example.com"), "shop.example.com");
        assert_eq!(domain("shop.example.com"), "shop.example.com");
    }
}
