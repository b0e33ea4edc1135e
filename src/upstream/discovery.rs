//! Where the endpoints of an upstream are: literal addresses, unix sockets, and names, which are resolved at start
//! and again in the background, never while an exchange waits.
//!
//! A [`Directory`] holds the last good answer of every name. Pingora's `LoadBalancer` asks it for the addresses
//! ([`Discovery`]), `select` asks it which endpoint stands behind an address.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::io;
use std::net;
use std::os::unix::net::SocketAddr as UnixSocketAddr;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use async_trait::async_trait;
use futures::future::FutureExt;
use futures::stream::{self, StreamExt};
use http::Extensions;
use pingora::protocols::l4::socket::SocketAddr;
use pingora_load_balancing::Backend;
use pingora_load_balancing::discovery::ServiceDiscovery;
use prometheus::IntCounter;

use super::endpoint::{Endpoint, Transport};
use crate::config::Address;

/// How long one name may take to resolve.
const RESOLVE_TIMEOUT: Duration = Duration::from_secs(5);

/// How many names of an upstream are resolved at a time; each takes a thread of the blocking pool meanwhile.
const RESOLVE_AT_ONCE: usize = 64;

/// Turns a name into addresses.
#[async_trait]
pub(super) trait Resolve: Send + Sync {
    /// The addresses of `host`, each with `port`.
    async fn resolve(&self, host: &str, port: u16) -> io::Result<Vec<net::SocketAddr>>;
}

/// The system's own resolver: `/etc/hosts`, DNS and whatever else `nsswitch.conf` names.
pub(super) struct System;

#[async_trait]
impl Resolve for System {
    async fn resolve(&self, host: &str, port: u16) -> io::Result<Vec<net::SocketAddr>> {
        Ok(tokio::net::lookup_host((host, port)).await?.collect())
    }
}

/// An address as it was written, understood but not resolved.
#[derive(Clone, Debug)]
pub(super) enum Location {
    Literal(SocketAddr),
    Name { host: String, port: u16 },
}

impl Location {
    /// Reads `host:port`, `[v6]:port` or `unix:/path`.
    pub fn parse(written: &Address) -> Result<Location, String> {
        let address = written.0.as_str();
        if let Some(path) = written.unix_path() {
            return match UnixSocketAddr::from_pathname(path) {
                // The empty path would make an unnamed socket, on which Pingora panics.
                Ok(socket) if !path.is_empty() => Ok(Location::Literal(SocketAddr::Unix(socket))),
                Ok(_) => Err("`unix:` needs a path, such as `unix:/run/app.sock`".to_owned()),
                Err(error) => Err(format!("`{path}` cannot be the path of a unix socket: {error}")),
            };
        }
        if let Ok(socket) = address.parse() {
            return Ok(Location::Literal(SocketAddr::Inet(socket)));
        }
        match address.rsplit_once(':').map(|(host, port)| (host, port.parse())) {
            Some((host, Ok(port))) if !host.is_empty() && !host.contains([':', '/', '[', ']']) => {
                Ok(Location::Name { host: host.to_owned(), port })
            }
            _ => Err(format!("`{address}` is no address: write `host:port`, `[v6]:port` or `unix:/path`")),
        }
    }

    /// The host, for the server name and the certificate; `None` for a unix socket.
    pub fn host(&self) -> Option<String> {
        match self {
            Location::Literal(address) => address.as_inet().map(|socket| socket.ip().to_string()),
            Location::Name { host, .. } => Some(host.clone()),
        }
    }
}

/// One entry of `endpoints:`.
#[derive(Debug)]
pub(super) struct Place {
    pub label: Arc<str>,
    pub location: Location,
    pub weight: usize,
    pub selections: IntCounter,
}

/// A name that could not be resolved.
#[derive(Debug)]
pub(super) struct Unresolved {
    /// Which of the places it is.
    pub place: usize,
    /// What was tried and what came of it.
    pub message: String,
}

/// What is known of an upstream's endpoints.
pub(super) struct Directory {
    places: Vec<Place>,
    transport: Transport,
    resolver: Box<dyn Resolve>,
    known: ArcSwap<Known>,
}

/// The state after one round of resolving.
#[derive(Default)]
struct Known {
    /// The last good answer for each place, in the order of the places.
    answers: Vec<Vec<SocketAddr>>,
    /// The endpoints of these answers *and* of those of the round before: a pick may still come from the schedule
    /// that was in force until just now.
    endpoints: HashMap<SocketAddr, Arc<Endpoint>>,
}

impl Directory {
    /// A directory that knows the literal addresses; names are unknown until [`Directory::refresh`].
    pub fn new(places: Vec<Place>, transport: Transport, resolver: Box<dyn Resolve>) -> Directory {
        let answers = places
            .iter()
            .map(|place| match &place.location {
                Location::Literal(address) => vec![address.clone()],
                Location::Name { .. } => Vec::new(),
            })
            .collect();
        let directory = Directory { places, transport, resolver, known: ArcSwap::default() };
        directory.publish(answers);
        directory
    }

    /// Whether anything must be resolved.
    pub fn has_names(&self) -> bool {
        self.names() > 0
    }

    /// How many names there are.
    pub fn names(&self) -> usize {
        self.places.iter().filter(|place| matches!(place.location, Location::Name { .. })).count()
    }

    /// Resolves every name anew. Those that cannot be resolved keep their last good answer and are told.
    pub async fn refresh(&self) -> Vec<Unresolved> {
        let mut resolving = Vec::new();
        for (place, entry) in self.places.iter().enumerate() {
            if let Location::Name { host, port } = &entry.location {
                resolving.push(async move { (place, self.resolve(host, *port).await) }.boxed());
            }
        }
        let resolved: Vec<_> = stream::iter(resolving).buffer_unordered(RESOLVE_AT_ONCE).collect().await;

        let mut answers = self.known.load().answers.clone();
        let mut failures = Vec::new();
        for (place, answer) in resolved {
            match answer {
                Ok(addresses) => answers[place] = addresses,
                Err(message) => failures.push(Unresolved { place, message }),
            }
        }
        self.publish(answers);
        failures.sort_by_key(|failure| failure.place);
        failures
    }

    /// The endpoint at this address.
    pub fn at(&self, address: &SocketAddr) -> Option<Arc<Endpoint>> {
        self.known.load().endpoints.get(address).cloned()
    }

    async fn resolve(&self, host: &str, port: u16) -> Result<Vec<SocketAddr>, String> {
        match tokio::time::timeout(RESOLVE_TIMEOUT, self.resolver.resolve(host, port)).await {
            Ok(Ok(addresses)) if addresses.is_empty() => Err(format!("`{host}` was resolved and has no address")),
            Ok(Ok(addresses)) => {
                // Once each: a host that `/etc/hosts` names twice has no double share.
                let distinct: BTreeSet<net::SocketAddr> = addresses.into_iter().collect();
                Ok(distinct.into_iter().map(SocketAddr::Inet).collect())
            }
            Ok(Err(error)) => Err(format!("`{host}` could not be resolved: {error}")),
            Err(_) => Err(format!("`{host}` could not be resolved within {} s", RESOLVE_TIMEOUT.as_secs())),
        }
    }

    /// Makes endpoints of the answers, keeping those that are known already.
    fn publish(&self, answers: Vec<Vec<SocketAddr>>) {
        let before = self.known.load();
        let mut endpoints = HashMap::new();
        for (place, address) in entries(&self.places, &answers) {
            endpoints.entry(address.clone()).or_insert_with(|| match before.endpoints.get(address) {
                Some(endpoint) if Arc::ptr_eq(&endpoint.label, &place.label) => Arc::clone(endpoint),
                _ => self.endpoint(place, address),
            });
        }
        for address in before.answers.iter().flatten() {
            if let Some(endpoint) = before.endpoints.get(address) {
                endpoints.entry(address.clone()).or_insert_with(|| Arc::clone(endpoint));
            }
        }
        self.known.store(Arc::new(Known { answers, endpoints }));
    }

    fn endpoint(&self, place: &Place, address: &SocketAddr) -> Arc<Endpoint> {
        let server_name = place.location.host().unwrap_or_default();
        let selections = place.selections.clone();
        Arc::new(Endpoint::new(&place.label, address.clone(), &server_name, &self.transport, selections))
    }

    /// What is known, as Pingora wants it. Places that share an address are one backend with the sum of their
    /// weights and the label of the first.
    fn backends(&self) -> BTreeSet<Backend> {
        let known = self.known.load();
        let mut weights: BTreeMap<&SocketAddr, usize> = BTreeMap::new();
        for (place, address) in entries(&self.places, &known.answers) {
            *weights.entry(address).or_default() += place.weight;
        }
        let backend = |(address, weight): (&SocketAddr, usize)| Backend {
            addr: address.clone(),
            weight,
            // Not the place for the endpoint: it is copied with each pick, at three allocations, and a backend whose
            // address and weight stay the same would keep it although its name has changed.
            ext: Extensions::new(),
        };
        weights.into_iter().map(backend).collect()
    }
}

/// Each place with each of its addresses.
fn entries<'a>(
    places: &'a [Place],
    answers: &'a [Vec<SocketAddr>],
) -> impl Iterator<Item = (&'a Place, &'a SocketAddr)> {
    places.iter().zip(answers).flat_map(|(place, addresses)| addresses.iter().map(move |address| (place, address)))
}

/// A [`Directory`] as Pingora's `LoadBalancer` sees it. Tells what is known and awaits nothing.
pub(super) struct Discovery(pub Arc<Directory>);

#[async_trait]
impl ServiceDiscovery for Discovery {
    async fn discover(&self) -> pingora::Result<(BTreeSet<Backend>, HashMap<u64, bool>)> {
        Ok((self.0.backends(), HashMap::new()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_as_they_are_written() {
        let read = |text: &str| Location::parse(&Address(text.to_owned())).map(|location| format!("{location:?}"));
        for (text, expected) in [
            ("127.0.0.1:80", "Literal(Inet(127.0.0.1:80))"),
            ("[::1]:8080", "Literal(Inet([::1]:8080))"),
            ("api.test:443", "Name { host: \"api.test\", port: 443 }"),
            ("unix:/run/app.sock", "Literal(Unix(\"/run/app.sock\" (pathname)))"),
        ] {
            assert_eq!(read(text).unwrap(), expected);
        }
        for text in
            ["api.test", "api.test:", "api.test:http", "api.test:70000", ":80", "::1:80", "unix:", "http://a:80"]
        {
            assert!(read(text).is_err(), "{text} was taken for an address");
        }
        assert!(read(&format!("unix:/{}", "x".repeat(200))).is_err(), "longer than a socket's path may be");
    }
}
