//! What an expression is asked of: facts of the exchange, the request, and the response where there is one.

use std::net::IpAddr;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use http::{HeaderMap, Method, Uri, Version};
use ipnet::IpNet;
use pingora::http::{RequestHeader, ResponseHeader};

use crate::error::Refusal;
use crate::phase::Phase;

/// What is known of an exchange beside its headers.
#[derive(Clone, Copy, Debug)]
pub struct Facts<'a> {
    /// The client's address: the peer's, or what a trusted proxy said. `None` on a unix socket.
    pub client: Option<IpAddr>,
    /// How much of that address is one client, where limits are per client.
    pub prefix: Prefix,
    /// The client's port; 0 if a proxy stands between, or on a unix socket.
    pub port: u16,
    /// `http` or `https`, as the client spoke it.
    pub scheme: &'static str,
    /// The name of the listener that the client came to.
    pub listener: &'a str,
    /// The name of the route.
    pub route: &'a str,
    /// The path of the request as routes see it: the client's, in its canonical form.
    pub path: &'a str,
    /// The TLS connection of the client.
    pub secured: Secured<'a>,
    /// The request ended with its header, whatever that announces: HTTP/2 says so.
    pub ended: bool,
    /// How fast the client is.
    pub pace: Pace,
    /// When the first byte of the request came.
    pub begun: Instant,
    /// The status of the response, from when its header is here; 0 before.
    pub status: u16,
    /// Who asks, once a filter has found out.
    pub identity: Option<&'a Identity>,
    /// Who has made the response, where that is known.
    pub author: Option<Author>,
    /// How often the request has been sent, or begun to be; from 1 on while its body passes.
    pub attempt: u32,
}

/// Who has made a response.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Author {
    /// An endpoint.
    Endpoint,
    /// Forebay, which refuses the request for this reason.
    Gateway(&'static Refusal),
    /// A filter, which answers itself.
    Filter,
}

/// Who asks, as a filter has found out: what `auth` and `jwt` are in expressions.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Identity {
    /// The name of the user, of the key or of the subject; may be empty.
    pub user: Box<str>,
    /// The key of the filter that found out.
    pub by: &'static str,
    /// Names and values of the claims of a token, in the order of their names. One that is a list has several values.
    pub claims: Vec<(Box<str>, Vec<Box<str>>)>,
}

impl Identity {
    /// The values of a claim; none, if it is not there.
    pub fn claim(&self, name: &[u8]) -> &[Box<str>] {
        let place = self.claims.binary_search_by(|(known, _)| known.as_bytes().cmp(name));
        place.map_or(&[], |place| &self.claims[place].1)
    }
}

impl<'a> Facts<'a> {
    /// Those of an exchange of which nothing is known but its route and the path that it asks for.
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

    /// What expressions are asked of, with this request.
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
    /// The same, if this is who asks.
    pub(crate) fn of_whom<'i>(&self, identity: Option<&'i Identity>) -> Facts<'i>
    where
        Self: 'i,
    {
        Facts { identity: identity.or(self.identity), ..*self }
    }

    /// Why Forebay refuses the request, if it does.
    pub fn refusal(&self) -> Option<&'static Refusal> {
        match self.author {
            Some(Author::Gateway(refusal)) => Some(refusal),
            Some(Author::Endpoint | Author::Filter) | None => None,
        }
    }

    /// The time of day at which the exchange began.
    pub fn began_at(&self) -> SystemTime {
        SystemTime::now().checked_sub(self.begun.elapsed()).unwrap_or(UNIX_EPOCH)
    }
}

/// How much of an address is one client, where limits are per client.
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
    /// The client that has this address: an address, or a network such as `2001:db8::/64`. One of IPv4 that came in by
    /// way of IPv6 is one of IPv4.
    pub(super) fn network(self, address: IpAddr) -> String {
        let address = address.to_canonical();
        let (bits, all) = if address.is_ipv4() { (self.v4, 32) } else { (self.v6, 128) };
        match IpNet::new(address, bits) {
            Ok(network) if bits < all => network.trunc().to_string(),
            _ => address.to_string(),
        }
    }
}

/// What is known of the client's TLS connection; all empty in clear text.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Secured<'a> {
    /// The version, such as `TLSv1.3`.
    pub version: &'a str,
    /// The server name that the client asked for (SNI).
    pub sni: &'a str,
    /// The subject of the client's certificate.
    pub subject: &'a str,
    /// The further names of that certificate, with a comma between two.
    pub names: &'a str,
    /// SHA-256 of that certificate, in hexadecimal.
    pub fingerprint: &'a str,
}

/// How the client did in the last phase in which it was waited for: `header` while its request comes, `buffer`
/// once its body has come, `write` once it has taken the answer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Pace {
    /// That phase.
    pub phase: Phase,
    /// How long it lasted.
    pub age: Duration,
    /// The bytes that the client moved in it; `None` if they are those of the request header.
    pub bytes: Option<u64>,
}

impl Default for Pace {
    fn default() -> Self {
        Pace { phase: Phase::Header, age: Duration::ZERO, bytes: None }
    }
}

/// A client that took at least so long ...
const SLOW_AGE: Duration = Duration::from_secs(1);
/// ... and moved less than so many bytes a second is slow.
const SLOW_RATE: f64 = 4096.0;

/// What an expression, or a key, is looked for in.
#[derive(Clone, Copy, Debug)]
pub struct Asked<'a> {
    /// What is known of the exchange.
    pub facts: Facts<'a>,
    /// The method.
    pub method: &'a Method,
    /// The target of the request.
    pub target: &'a Uri,
    /// The version of HTTP that the client speaks.
    pub version: Version,
    /// The header of the request.
    pub headers: &'a HeaderMap,
    /// The response, where there is one.
    pub response: Option<Response<'a>>,
}

/// A response as it is asked about.
#[derive(Clone, Copy, Debug)]
pub struct Response<'a> {
    /// Its status; 0 if none was sent.
    pub code: u16,
    /// Its header, if there is one left.
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
    /// Seconds of the client's last phase.
    pub(super) fn phase_age(&self) -> f64 {
        self.facts.pace.age.as_secs_f64()
    }

    /// Bytes a second. A phase of less than a millisecond counts as one: nobody can tell a rate by it.
    pub(super) fn rate(&self) -> f64 {
        let bytes = self.facts.pace.bytes.unwrap_or_else(|| self.header_bytes());
        bytes as f64 / self.phase_age().max(0.001)
    }

    pub(super) fn is_slow(&self) -> bool {
        self.facts.pace.age >= SLOW_AGE && self.rate() < SLOW_RATE
    }

    /// About what the header takes on HTTP/1: two bytes stand between a name and its value, two behind it.
    fn header_bytes(&self) -> u64 {
        let fields = self.headers.iter().map(|(name, value)| name.as_str().len() + value.len() + 4);
        let line = self.method.as_str().len() + self.target.path_and_query().map_or(1, |it| it.as_str().len()) + 12;
        (line + fields.sum::<usize>()) as u64
    }
}
