//! The input of expressions: facts of the exchange, the request, and the response if there is one.

use std::net::IpAddr;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use http::{HeaderMap, Method, Uri, Version};
use ipnet::IpNet;
use pingora::http::{RequestHeader, ResponseHeader};

use crate::error::Refusal;
use crate::phase::Phase;

/// Facts of an exchange, apart from its headers.
#[derive(Clone, Copy, Debug)]
pub struct Facts<'a> {
    /// The client's address: that of the peer, or the one given by a trusted proxy. `None` on a unix socket.
    pub client: Option<IpAddr>,
    /// The part of the address that identifies a client in limits.
    pub prefix: Prefix,
    /// The client's port; 0 behind a proxy or on a unix socket.
    pub port: u16,
    /// The scheme that the client used, `http` or `https`.
    pub scheme: &'static str,
    /// The name of the listener that accepted the client.
    pub listener: &'a str,
    /// The name of the route.
    pub route: &'a str,
    /// The path of the request for route matching: the client's path in its canonical form.
    pub path: &'a str,
    /// The TLS connection of the client.
    pub secured: Secured<'a>,
    /// The request ended with its header, whatever its fields announce; known from HTTP/2.
    pub ended: bool,
    /// The client's transfer rate.
    pub pace: Pace,
    /// The time of the first byte of the request.
    pub begun: Instant,
    /// The status of the response, once its header was received; 0 before.
    pub status: u16,
    /// The identity of the client, once a filter has determined it.
    pub identity: Option<&'a Identity>,
    /// The origin of the response, if it is known.
    pub author: Option<Author>,
    /// The number of attempts to send the request; from 1 on while its body passes.
    pub attempt: u32,
}

/// The origin of a response.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Author {
    /// An endpoint.
    Endpoint,
    /// Forebay, which refuses the request for this reason.
    Gateway(&'static Refusal),
    /// A filter that answers.
    Filter,
}

/// The identity of the client, as determined by a filter: `auth` and `jwt` in expressions.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Identity {
    /// The name of the user, key or subject; may be empty.
    pub user: Box<str>,
    /// The key of the filter that determined it.
    pub by: &'static str,
    /// Names and values of a token's claims, sorted by name. A list has several values.
    pub claims: Vec<(Box<str>, Vec<Box<str>>)>,
}

impl Identity {
    /// The values of a claim; empty if it is missing.
    pub fn claim(&self, name: &[u8]) -> &[Box<str>] {
        let place = self.claims.binary_search_by(|(known, _)| known.as_bytes().cmp(name));
        place.map_or(&[], |place| &self.claims[place].1)
    }
}

impl<'a> Facts<'a> {
    /// The facts of an exchange of which only the route and the path are known.
    pub fn of(route: &'a str, path: &'a str) -> Self {
        Facts {
            client: None,
            prefix: Prefix::default(),
            port: 0,
            scheme: "http",
            listener: "",
            route,
            path,
            secured: Secured::default(),
            ended: false,
            pace: Pace::default(),
            begun: Instant::now(),
            status: 0,
            identity: None,
            author: None,
            attempt: 0,
        }
    }

    /// The input of expressions for this request.
    #[inline]
    pub fn asked(self, request: &'a RequestHeader) -> Asked<'a> {
        Asked {
            facts: self,
            method: &request.method,
            target: &request.uri,
            version: request.version,
            headers: &request.headers,
            response: (self.status > 0).then_some(Response { code: self.status, headers: None }),
        }
    }
}

impl Facts<'_> {
    /// The same with this identity.
    pub(crate) fn of_whom<'i>(&self, identity: Option<&'i Identity>) -> Facts<'i>
    where
        Self: 'i,
    {
        Facts { identity: identity.or(self.identity), ..*self }
    }

    /// The reason for which Forebay refuses the request, if it does.
    pub fn refusal(&self) -> Option<&'static Refusal> {
        match self.author {
            Some(Author::Gateway(refusal)) => Some(refusal),
            Some(Author::Endpoint | Author::Filter) | None => None,
        }
    }

    /// The wall-clock time at which the exchange began.
    pub fn began_at(&self) -> SystemTime {
        SystemTime::now().checked_sub(self.begun.elapsed()).unwrap_or(UNIX_EPOCH)
    }
}

/// The part of an address that identifies a client in limits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Prefix {
    /// The bits of an IPv4 address, from 1 to 32.
    pub v4: u8,
    /// The bits of an IPv6 address, from 1 to 128.
    pub v6: u8,
}

impl Default for Prefix {
    fn default() -> Self {
        Prefix { v4: 32, v6: 64 }
    }
}

impl Prefix {
    /// The client with this address: an address, or a network such as `2001:db8::/64`. An IPv4 address in IPv6 form
    /// counts as IPv4.
    pub(super) fn network(self, address: IpAddr) -> String {
        let address = address.to_canonical();
        let (bits, all) = if address.is_ipv4() { (self.v4, 32) } else { (self.v6, 128) };
        match IpNet::new(address, bits) {
            Ok(network) if bits < all => network.trunc().to_string(),
            _ => address.to_string(),
        }
    }
}

/// Facts of the client's TLS connection; all are empty without TLS.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Secured<'a> {
    /// The version, such as `TLSv1.3`.
    pub version: &'a str,
    /// The server name from the client (SNI).
    pub sni: &'a str,
    /// The subject of the client's certificate.
    pub subject: &'a str,
    /// The alternative names of that certificate, separated by commas.
    pub names: &'a str,
    /// The SHA-256 of that certificate, in hexadecimal.
    pub fingerprint: &'a str,
}

/// The client's transfer in the last phase that waited for it: `header` while its request is received, `buffer` after
/// its body, `write` after the response.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Pace {
    /// The phase.
    pub phase: Phase,
    /// The duration.
    pub age: Duration,
    /// The bytes transferred in it; `None`: the size of the request header.
    pub bytes: Option<u64>,
}

impl Default for Pace {
    fn default() -> Self {
        Pace { phase: Phase::Header, age: Duration::ZERO, bytes: None }
    }
}

/// A client with at least this duration ...
const SLOW_AGE: Duration = Duration::from_secs(1);
/// ... and less than this number of bytes per second is slow.
const SLOW_RATE: f64 = 4096.0;

/// The input of expressions and keys.
#[derive(Clone, Copy, Debug)]
pub struct Asked<'a> {
    /// The facts of the exchange.
    pub facts: Facts<'a>,
    /// The method.
    pub method: &'a Method,
    /// The target of the request.
    pub target: &'a Uri,
    /// The client's HTTP version.
    pub version: Version,
    /// The header of the request.
    pub headers: &'a HeaderMap,
    /// The response, if there is one.
    pub response: Option<Response<'a>>,
}

/// A response as the input of expressions.
#[derive(Clone, Copy, Debug)]
pub struct Response<'a> {
    /// Its status; 0 if none was sent.
    pub code: u16,
    /// Its header, if it still exists.
    pub headers: Option<&'a HeaderMap>,
}

impl<'a> Asked<'a> {
    /// The same, with this response.
    pub fn answered(self, response: &'a ResponseHeader) -> Asked<'a> {
        let response = Response { code: response.status.as_u16(), headers: Some(&response.headers) };
        Asked { response: Some(response), ..self }
    }
}

impl Asked<'_> {
    /// The duration of the client's last phase, in seconds.
    pub(super) fn phase_age(&self) -> f64 {
        self.facts.pace.age.as_secs_f64()
    }

    /// The rate in bytes per second. A phase of less than a millisecond counts as one, since its rate would be
    /// meaningless.
    pub(super) fn rate(&self) -> f64 {
        let bytes = self.facts.pace.bytes.unwrap_or_else(|| self.header_bytes());
        bytes as f64 / self.phase_age().max(0.001)
    }

    #[inline(never)]
    pub(super) fn is_slow(&self) -> bool {
        self.facts.pace.age >= SLOW_AGE && self.rate() < SLOW_RATE
    }

    /// The approximate size of the header in HTTP/1: two bytes between name and value, and two after the value.
    fn header_bytes(&self) -> u64 {
        let fields = self.headers.iter().map(|(name, value)| name.as_str().len() + value.len() + 4);
        let line = self.method.as_str().len() + self.target.path_and_query().map_or(1, |it| it.as_str().len()) + 12;
        (line + fields.sum::<usize>()) as u64
    }
}
