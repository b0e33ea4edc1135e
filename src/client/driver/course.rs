//! Which driver an exchange goes by: a pure decision, made once its request filters have let it pass.

use crate::upstream::Spoken;

/// What the decision is made of.
#[derive(Clone, Copy, Debug)]
pub struct Facts {
    /// Our driver is in use at all.
    pub on: bool,
    /// Workers share their tasks. Kept connections belong to a worker.
    pub shares_tasks: bool,
    /// The client asks for another protocol.
    pub upgrade: bool,
    /// What the upstream speaks.
    pub spoken: Spoken,
}

/// Which driver an exchange goes by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Course {
    /// By ours: the exchange is plain.
    Own,
    /// By Pingora's, for this reason.
    Pingora(Reason),
}

/// Why an exchange goes by Pingora's driver.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// Our driver is not in use.
    Off,
    /// Workers share their tasks.
    WorkStealing,
    /// The client asks for another protocol.
    Upgrade,
    /// The endpoint speaks HTTP/2.
    Http2,
    /// The endpoint speaks TLS.
    Tls,
    /// The endpoint first gets the client's address by the PROXY protocol.
    ProxyProtocol,
}

impl Reason {
    /// All of them.
    pub const ALL: [Reason; 6] =
        [Reason::Off, Reason::WorkStealing, Reason::Upgrade, Reason::Http2, Reason::Tls, Reason::ProxyProtocol];

    /// The word for it in the log and in a label.
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
    /// Decides. Of several reasons, the first in the order of [`Reason::ALL`] is given.
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

    /// Why it does not go by ours.
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
