//! Where the endpoints of an upstream are: literal addresses, unix sockets, and names, which are resolved at start
//! and again in the background, never while an exchange waits.
//!
//! A [`Directory`] holds the last good answer of every name, and tells what it found to `Upstream::discovered`.

use std::collections::BTreeSet;
use std::io;
use std::net;
use std::num::NonZeroU32;
use std::os::unix::net::SocketAddr as UnixSocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use futures::future::FutureExt;
use futures::stream::{self, StreamExt};
use pingora::protocols::l4::socket::SocketAddr;

use super::endpoint::Found;
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
    pub host: Option<Arc<str>>,
    pub weight: NonZeroU32,
}

/// A name that could not be resolved.
#[derive(Debug)]
pub(super) struct Unresolved {
    /// Which of the places it is.
    pub place: usize,
    /// What was tried and what came of it.
    pub message: String,
}

/// Where an upstream's endpoints are, as far as is known.
pub(super) struct Directory {
    places: Vec<Place>,
    resolver: Box<dyn Resolve>,
    /// The last good answer for each place, in the order of the places.
    answers: Mutex<Vec<Vec<SocketAddr>>>,
}

impl Directory {
    /// A directory that knows the literal addresses; names are unknown until [`Directory::refresh`].
    pub fn new(places: Vec<Place>, resolver: Box<dyn Resolve>) -> Directory {
        let answers = places
            .iter()
            .map(|place| match &place.location {
                Location::Literal(address) => vec![address.clone()],
                Location::Name { .. } => Vec::new(),
            })
            .collect();
        Directory { places, resolver, answers: Mutex::new(answers) }
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

        let mut answers = self.answers.lock().unwrap_or_else(PoisonError::into_inner);
        let mut failures = Vec::new();
        for (place, answer) in resolved {
            match answer {
                Ok(addresses) => answers[place] = addresses,
                Err(message) => failures.push(Unresolved { place, message }),
            }
        }
        failures.sort_by_key(|failure| failure.place);
        failures
    }

    /// Each place with each of its addresses.
    pub fn found(&self) -> Vec<Found> {
        let answers = self.answers.lock().unwrap_or_else(PoisonError::into_inner);
        let places = self.places.iter().zip(&*answers);
        places
            .flat_map(|(place, addresses)| {
                addresses.iter().map(|address| Found {
                    label: Arc::clone(&place.label),
                    address: address.clone(),
                    server_name: place.host.clone(),
                    weight: place.weight,
                    priority: 0,
                    alternate: None,
                })
            })
            .collect()
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
