//! What is known of an exchange that is over.
//!
//! One value, of which each takes what it shows: the access log, recordings and spans. Its figures are what the metrics
//! of its route count. `proxy/finish.rs` makes it of an exchange; `client.rs` of a header that was refused and of a
//! connection that was passed on.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use crate::metrics::{Summary, UNROUTED};
use crate::phase::Phase;
use crate::spans::TraceId;

/// See the module.
#[derive(Clone, Copy, Debug)]
pub struct Finished<'e> {
    /// When it was over, on the clock of its phases.
    pub at: Instant,
    /// When it was over, by the time of day.
    pub time: SystemTime,
    /// Who asked.
    pub client: Client<'e>,
    /// What was asked.
    pub request: Request<'e>,
    /// Where it went.
    pub way: Way<'e>,
    /// Its status, its bytes and its times.
    pub summary: Summary<'e>,
    /// Bytes of both bodies that were held back for the slower side.
    pub buffered: u64,
    /// Those of them that were written to disk.
    pub spilled: u64,
    /// How a gRPC call went: the endpoint's `grpc-status`, or that of our own answer.
    pub grpc_status: Option<u16>,
    /// The trace that it belongs to.
    pub trace: Option<TraceId>,
}

/// The client of an exchange that is over.
#[derive(Clone, Copy, Debug, Default)]
pub struct Client<'e> {
    /// The name of the listener.
    pub listener: &'e str,
    /// Its address: the peer's, or what a trusted proxy said. `None` on a unix socket.
    pub address: Option<IpAddr>,
    /// Who connected: the client, or a proxy before it.
    pub peer: Option<SocketAddr>,
    /// The version of TLS that it spoke.
    pub tls: Option<&'e str>,
    /// Who it has proved to be, by a certificate.
    pub subject: Option<&'e str>,
}

/// The request of an exchange that is over.
#[derive(Clone, Copy, Debug, Default)]
pub struct Request<'e> {
    /// The method; empty if the header could not be understood.
    pub method: &'e str,
    /// The host that was asked for, as it was written.
    pub host: &'e [u8],
    /// The target: its path in its one form, and the query as it was written; both as they were written, if the header
    /// could not be understood.
    pub target: &'e [u8],
    /// The version, such as `HTTP/1.1`.
    pub protocol: &'static str,
    /// Its id.
    pub id: Option<&'e [u8]>,
    /// Its `Referer`.
    pub referer: Option<&'e [u8]>,
    /// Its `User-Agent`.
    pub user_agent: Option<&'e [u8]>,
}

/// The way of an exchange that is over.
#[derive(Clone, Copy, Debug)]
pub struct Way<'e> {
    /// The name of the route; `_none` if it took none.
    pub route: &'e str,
    /// The name of the upstream that was asked last.
    pub upstream: Option<&'e str>,
    /// The endpoint that was asked last, as written in the configuration.
    pub endpoint: Option<&'e str>,
    /// How many endpoints were asked.
    pub attempts: u32,
    /// The attempts that came to nothing, in their order.
    pub failed: &'e [Failed],
    /// Why it went by Pingora's driver and not by ours. `None`: it did not.
    pub handed_over: Option<&'static str>,
}

impl Default for Way<'_> {
    fn default() -> Self {
        Way { route: UNROUTED, upstream: None, endpoint: None, attempts: 0, failed: &[], handed_over: None }
    }
}

impl<'e> Finished<'e> {
    /// What was over just now, `at` this time, with these figures, as far as nothing more is known of it.
    pub fn new(at: Instant, client: Client<'e>, summary: Summary<'e>) -> Finished<'e> {
        Finished {
            at,
            time: SystemTime::now(),
            client,
            request: Request::default(),
            way: Way::default(),
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

    /// Why Forebay ended it, if it did: `phase.cause`.
    pub fn reason(&self) -> Option<&'static str> {
        self.summary.refusal.map(|refusal| refusal.reason)
    }

    /// The same without what may be secret: the query of its target, and that of the page that led to it.
    pub fn without_queries(&self) -> Finished<'e> {
        let referer = self.request.referer.map(without_query);
        Finished { request: Request { target: self.path(), referer, ..self.request }, ..*self }
    }
}

fn without_query(target: &[u8]) -> &[u8] {
    target.split(|&byte| byte == b'?').next().unwrap_or_default()
}

/// An attempt that came to nothing.
#[derive(Clone, Debug, PartialEq)]
pub struct Failed {
    /// The endpoint, as written in the configuration.
    pub endpoint: Arc<str>,
    /// In which phase.
    pub phase: Phase,
    /// Why.
    pub why: Why,
    /// From the choice of the endpoint on.
    pub took: Duration,
}

/// Why an attempt came to nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Why {
    /// For this reason.
    Refusal(&'static str),
    /// Its answer had this status.
    Status(u16),
    /// Its answer had this gRPC status.
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
        assert_eq!(finished.way.route, "_none");
    }
}
