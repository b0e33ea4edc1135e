//! The choice of the driver for an exchange: a pure decision, made after the request filters.

use crate::upstream::Spoken;

/// The input of the decision.
#[derive(Clone, Copy, Debug)]
pub struct Facts {
    /// Whether Forebay's driver is enabled.
    pub on: bool,
    /// Whether workers share their tasks (work stealing). Idle connections belong to one worker.
    pub shares_tasks: bool,
    /// Whether the client requests an upgrade to another protocol.
    pub upgrade: bool,
    /// The protocols of the upstream.
    pub spoken: Spoken,
}

/// The driver of an exchange.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Course {
    /// Forebay's driver, for plain exchanges.
    Own,
    /// Pingora's driver, for this reason.
    Pingora(Reason),
}

/// The reason for Pingora's driver.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// Forebay's driver is disabled.
    Off,
    /// Workers share their tasks.
    WorkStealing,
    /// The client requests an upgrade to another protocol.
    Upgrade,
    /// The endpoint speaks HTTP/2.
    Http2,
    /// The endpoint speaks TLS.
    Tls,
    /// The connection to the endpoint begins with a PROXY protocol header.
    ProxyProtocol,
}

impl Reason {
    /// All reasons, in the order of precedence.
    pub const ALL: [Reason; 6] =
        [Reason::Off, Reason::WorkStealing, Reason::Upgrade, Reason::Http2, Reason::Tls, Reason::ProxyProtocol];

    /// The name in the log and in labels.
    pub fn name(self) -> &'static str {
        match self {
            Reason::Off => "off",
            Reason::WorkStealing => "work_stealing",
            Reason::Upgrade => "upgrade",
            Reason::Http2 => "http2",
            Reason::Tls => "tls",
            Reason::ProxyProtocol => "proxy_protocol",
        }
    }
}

impl Course {
    /// Chooses the driver. If several reasons apply, the first in [`Reason::ALL`] is given.
    pub fn choose(facts: Facts) -> Course {
        let Facts { on, shares_tasks, upgrade, spoken } = facts;
        match spoken {
            _ if !on => Course::Pingora(Reason::Off),
            _ if shares_tasks => Course::Pingora(Reason::WorkStealing),
            _ if upgrade => Course::Pingora(Reason::Upgrade),
            Spoken { http1: false, .. } => Course::Pingora(Reason::Http2),
            Spoken { tls: true, .. } => Course::Pingora(Reason::Tls),
            Spoken { proxy_protocol: true, .. } => Course::Pingora(Reason::ProxyProtocol),
            _ => Course::Own,
        }
    }

    /// The reason for Pingora's driver; `None` for Forebay's.
    pub fn reason(self) -> Option<Reason> {
        match self {
            Course::Own => None,
            Course::Pingora(reason) => Some(reason),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLAIN: Spoken = Spoken { http1: true, tls: false, proxy_protocol: false };
    const FACTS: Facts = Facts { on: true, shares_tasks: false, upgrade: false, spoken: PLAIN };

    #[test]
    fn a_plain_exchange_goes_by_our_driver_and_any_other_tells_why_not() {
        assert_eq!(Course::choose(FACTS), Course::Own);
        let http2 = Spoken { http1: false, ..PLAIN };
        for (facts, reason) in [
            (Facts { on: false, ..FACTS }, Reason::Off),
            (Facts { shares_tasks: true, ..FACTS }, Reason::WorkStealing),
            (Facts { upgrade: true, ..FACTS }, Reason::Upgrade),
            (Facts { spoken: http2, ..FACTS }, Reason::Http2),
            (Facts { spoken: Spoken { tls: true, ..PLAIN }, ..FACTS }, Reason::Tls),
            (Facts { spoken: Spoken { proxy_protocol: true, ..PLAIN }, ..FACTS }, Reason::ProxyProtocol),
        ] {
            assert_eq!(Course::choose(facts), Course::Pingora(reason), "{facts:?}");
        }
    }

    #[test]
    fn of_several_reasons_the_first_is_told() {
        let facts = Facts { upgrade: true, spoken: Spoken { tls: true, ..PLAIN }, ..FACTS };
        assert_eq!(Course::choose(facts), Course::Pingora(Reason::Upgrade));
        assert_eq!(Course::choose(Facts { on: false, ..facts }), Course::Pingora(Reason::Off));
        let names: std::collections::BTreeSet<_> = Reason::ALL.iter().map(|reason| reason.name()).collect();
        assert_eq!(names.len(), Reason::ALL.len());
    }
}
