//! The record of a completed exchange.
//!
//! The access log, recordings and spans all use this value, and each takes the parts that it shows. Its figures are
//! those that the route's metrics count. `proxy/finish.rs` creates it for an exchange; `client.rs` creates it for a
//! refused header and for a relayed connection.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use crate::metrics::{Summary, UNROUTED};
use crate::phase::Phase;
use crate::spans::TraceId;

/// The record; see the module.
#[derive(Clone, Copy, Debug)]
pub struct Finished<'e> {
    /// When it completed, on the clock of its phases.
    pub at: Instant,
    /// When it completed, as wall-clock time.
    pub time: SystemTime,
    /// The client.
    pub client: Client<'e>,
    /// The request.
    pub request: Request<'e>,
    /// The route, the upstream and the attempts.
    pub routing: Routing<'e>,
    /// Its status, its bytes and its times.
    pub summary: Summary<'e>,
    /// Bytes of both bodies that were buffered for the slower side.
    pub buffered: u64,
    /// Number of buffered bytes that were written to disk.
    pub spilled: u64,
    /// The result of a gRPC call: the endpoint's `grpc-status`, or that of Forebay's own response.
    pub grpc_status: Option<u16>,
    /// The trace that it belongs to.
    pub trace: Option<TraceId>,
}

/// The client of a completed exchange.
#[derive(Clone, Copy, Debug, Default)]
pub struct Client<'e> {
    /// The name of the listener.
    pub listener: &'e str,
    /// The client's address: the peer's, or the one that a trusted proxy reported. `None` on a unix socket.
    pub address: Option<IpAddr>,
    /// The address of the peer: the client, or a proxy in front of Forebay.
    pub peer: Option<SocketAddr>,
    /// The version of TLS.
    pub tls: Option<&'e str>,
    /// The subject of the client's verified certificate.
    pub subject: Option<&'e str>,
}

/// The request of a completed exchange.
#[derive(Clone, Copy, Debug, Default)]
pub struct Request<'e> {
    /// The method; empty if the header is invalid.
    pub method: &'e str,
    /// The requested host, as received.
    pub host: &'e [u8],
    /// The target: the normalized path, and the query as received. If the header is invalid, both are as received.
    pub target: &'e [u8],
    /// The version, such as `HTTP/1.1`.
    pub protocol: &'static str,
    /// The request id.
    pub id: Option<&'e [u8]>,
    /// Its `Referer`.
    pub referer: Option<&'e [u8]>,
    /// Its `User-Agent`.
    pub user_agent: Option<&'e [u8]>,
}

/// The route and the attempts of a completed exchange.
#[derive(Clone, Copy, Debug)]
pub struct Routing<'e> {
    /// The name of the route; `_none` without a route.
    pub route: &'e str,
    /// The name of the upstream of the last attempt.
    pub upstream: Option<&'e str>,
    /// The endpoint of the last attempt, as written in the configuration.
    pub endpoint: Option<&'e str>,
    /// Number of attempts.
    pub attempts: u32,
    /// The failed attempts, in order.
    pub failed: &'e [Failed],
    /// The reason why Pingora's driver ran it. `None`: Forebay's driver ran it.
    pub handed_over: Option<&'static str>,
}

impl Default for Routing<'_> {
    fn default() -> Self {
        Routing { route: UNROUTED, upstream: None, endpoint: None, attempts: 0, failed: &[], handed_over: None }
    }
}

impl<'e> Finished<'e> {
    /// Creates the record of an exchange that completed at `at`, now. The fields without a parameter are empty.
    pub fn new(at: Instant, client: Client<'e>, summary: Summary<'e>) -> Finished<'e> {
        Finished {
            at,
            time: SystemTime::now(),
            client,
            request: Request::default(),
            routing: Routing::default(),
            summary,
            buffered: 0,
            spilled: 0,
            grpc_status: None,
            trace: None,
        }
    }

    /// The path, without the query.
    pub fn path(&self) -> &'e [u8] {
        without_query(self.request.target)
    }

    /// The reason if Forebay ended it itself: `phase.cause`.
    pub fn reason(&self) -> Option<&'static str> {
        self.summary.refusal.map(|refusal| refusal.reason)
    }

    /// A copy without the queries of its target and its referrer, which may be secret.
    pub fn without_queries(&self) -> Finished<'e> {
        let referer = self.request.referer.map(without_query);
        Finished { request: Request { target: self.path(), referer, ..self.request }, ..*self }
    }
}

fn without_query(target: &[u8]) -> &[u8] {
    target.split(|&byte| byte == b'?').next().unwrap_or_default()
}

/// A failed attempt.
#[derive(Clone, Debug, PartialEq)]
pub struct Failed {
    /// The endpoint, as written in the configuration.
    pub endpoint: Arc<str>,
    /// The phase of the failure.
    pub phase: Phase,
    /// The reason.
    pub why: Why,
    /// Duration, from the selection of the endpoint.
    pub took: Duration,
}

/// The reason why an attempt failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Why {
    /// A refusal with this reason.
    Refusal(&'static str),
    /// A response with this status.
    Status(u16),
    /// A response with this gRPC status.
    Grpc(u8),
}

impl fmt::Display for Why {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Why::Refusal(reason) => f.write_str(reason),
            Why::Status(status) => write!(f, "status {status}"),
            Why::Grpc(code) => write!(f, "grpc-status {code}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::refusal;
    use crate::phase::Clock;

    #[test]
    fn what_may_be_secret_is_left_out_and_the_rest_stays() {
        let clock = Clock::start(Phase::Header, Instant::now());
        let summary = Summary { refusal: Some(&refusal::ROUTE_NO_MATCH), ..Summary::new(&clock) };
        let request = Request { target: b"/a?key=1?2", referer: Some(b"https://b/?c"), ..Request::default() };
        let finished = Finished { request, ..Finished::new(Instant::now(), Client::default(), summary) };
        assert_eq!((finished.path(), finished.reason()), (&b"/a"[..], Some("route.no_match")));
        let bare = finished.without_queries().request;
        assert_eq!((bare.target, bare.referer), (&b"/a"[..], Some(&b"https://b/"[..])));
        assert_eq!(finished.routing.route, "_none");
    }
}
