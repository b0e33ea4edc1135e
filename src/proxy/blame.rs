//! What follows from a fault: one table from party, phase and what happened to the answer of the client, to a further
//! attempt, and to what is held against the endpoint.
//!
//! Faults are noted where they happen ([`Fault`]); what a library reports by itself, such as a connection that breaks
//! off, becomes one here. An endpoint is accused only of what it did or failed to do while it was waited for. What
//! circuit breakers, outlier detection, latency and probes make of an accusation, `upstream/ended.rs` says.

#[cfg(test)]
mod model;

use pingora::{Error, ErrorType};

use super::retry::Failure;
use crate::error::{Refusal, refusal};
use crate::party::{Fault, Party, What};
use crate::phase::Phase;
use crate::upstream::Outcome;
use crate::upstream::transport::dial;

/// What an endpoint is accused of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Charge {
    /// Nothing.
    Nothing,
    /// No connection to it could be made.
    Unconnected,
    /// It had a connection and did not answer as it should.
    Failed,
}

/// A row of the table.
pub struct Row {
    party: Party,
    phases: &'static [Phase],
    what: What,
    /// Reason, status and message.
    pub refusal: &'static Refusal,
    /// What the rules for a further attempt know it as. `None`: there is none.
    pub failure: Option<Failure>,
    /// What the endpoint is accused of.
    pub charge: Charge,
}

impl Row {
    /// What the attempt came to, for the upstream.
    pub fn outcome(&self) -> Outcome {
        match self.charge {
            Charge::Nothing => Outcome::Cancelled,
            Charge::Unconnected => Outcome::Connect(self.refusal),
            Charge::Failed => Outcome::Failed(self.refusal),
        }
    }
}

macro_rules! table {
    ($($party:ident $what:ident in $($phase:ident)*: $refusal:ident $failure:tt $charge:ident;)*) => {
        /// Every fault that can end an exchange, or an attempt of it, once its route is known.
        static TABLE: &[Row] = &[$(Row {
            party: Party::$party,
            phases: &[$(Phase::$phase),*],
            what: What::$what,
            refusal: &refusal::$refusal,
            failure: table!(@ $failure),
            charge: Charge::$charge,
        }),*];
    };
    (@ -) => { None };
    (@ $failure:ident) => { Some(Failure::$failure) };
}

table! {
    // While the request body is held back, its client is waited for, or room is.
    Client Silent in Buffer: BUFFER_TIMEOUT - Nothing;
    Client Late in Buffer: BUFFER_TIMEOUT - Nothing;
    Client Slow in Buffer: BUFFER_MIN_RATE - Nothing;
    Client TooLarge in Buffer: BUFFER_TOO_LARGE - Nothing;
    Client Malformed in Buffer: BUFFER_MALFORMED - Nothing;
    Client Left in Buffer: BUFFER_ABORTED - Nothing;
    Disk Full in Buffer: BUFFER_DISK_FULL - Nothing;
    Disk Failed in Buffer Send: BUFFER_DISK_FAILED - Nothing;
    Gateway Full in Buffer: BUFFER_PRESSURE - Nothing;
    Client Full in Buffer: BUFFER_PER_CLIENT - Nothing;

    // Until an endpoint is connected to.
    Gateway Full in Queue: QUEUE_FULL - Nothing;
    Gateway Silent in Queue: QUEUE_TIMEOUT - Nothing;
    Client Left in Queue: QUEUE_ABORTED - Nothing;
    Client Left in Select: SELECT_ABORTED - Nothing;
    Endpoint Refused in Connect: CONNECT_REFUSED Connect Unconnected;
    Endpoint Silent in Connect: CONNECT_TIMEOUT Connect Unconnected;
    Endpoint Insecure in Connect: CONNECT_TLS Connect Unconnected;
    Endpoint Unreachable in Connect: CONNECT_FAILED Connect Unconnected;
    Gateway Exhausted in Connect: CONNECT_EXHAUSTED Exhausted Nothing;

    // While the request is passed on, either end may be waited for.
    Client Silent in Send: SEND_BODY_TIMEOUT - Nothing;
    Client Late in Send: SEND_BODY_TOTAL - Nothing;
    Client Slow in Send: SEND_MIN_RATE - Nothing;
    Client TooLarge in Send: SEND_TOO_LARGE - Nothing;
    Client Malformed in Send: SEND_BODY_MALFORMED - Nothing;
    Client Left in Route Connect Send: SEND_ABORTED - Nothing;
    Endpoint Silent in Send: SEND_TIMEOUT Timeout Failed;
    Endpoint Broke in Send: SEND_RESET Reset Failed;
    Endpoint GaveUp in Send: SEND_RESET Reset Nothing;
    Endpoint Stale in Send: SEND_RESET Stale Nothing;
    Endpoint Unprocessed in Send: SEND_RESET Unprocessed Nothing;

    // The request is out: the endpoint is waited for.
    Endpoint Silent in Wait: WAIT_TIMEOUT Timeout Failed;
    Endpoint Broke in Wait: WAIT_RESET Reset Failed;
    Endpoint GaveUp in Wait: WAIT_RESET Reset Nothing;
    Endpoint Stale in Wait: WAIT_RESET Stale Nothing;
    Endpoint Unprocessed in Wait: WAIT_RESET Unprocessed Nothing;
    Endpoint Malformed in Send Wait: WAIT_MALFORMED Reset Failed;
    Client Left in Wait: WAIT_ABORTED - Nothing;

    // The answer comes, and goes to the client.
    Endpoint Silent in Receive: RECEIVE_TIMEOUT Timeout Failed;
    Endpoint Broke in Receive: RECEIVE_RESET Reset Failed;
    Endpoint GaveUp in Receive: RECEIVE_RESET Reset Nothing;
    Endpoint Unprocessed in Receive: RECEIVE_RESET Unprocessed Nothing;
    Endpoint Malformed in Receive: RECEIVE_MALFORMED Reset Failed;
    Endpoint Broke in Write: RECEIVE_RESET - Nothing;
    Endpoint GaveUp in Write: RECEIVE_RESET - Nothing;
    Client Left in Receive: RECEIVE_ABORTED - Nothing;
    Client Left in Write Finish: WRITE_ABORTED - Nothing;
    Client Silent in Wait Receive Write Finish: WRITE_TIMEOUT - Nothing;
    Client Slow in Receive Write: WRITE_MIN_RATE - Nothing;
    Disk Silent in Receive Write: WRITE_DISK_FAILED - Nothing;
    Disk Failed in Receive Write: WRITE_DISK_FAILED - Nothing;

    // The deadline of the exchange is over. An endpoint that was waited for for nearly all of that time is at fault.
    Gateway Overdue in Select: SELECT_DEADLINE - Nothing;
    Gateway Overdue in Queue: QUEUE_DEADLINE - Nothing;
    Client Overdue in Select: SELECT_DEADLINE - Nothing;
    Client Overdue in Queue: QUEUE_DEADLINE - Nothing;
    Endpoint Overdue in Connect: CONNECT_DEADLINE Connect Unconnected;
    Endpoint Overdue in Send: SEND_DEADLINE Timeout Failed;
    Endpoint Overdue in Wait: WAIT_DEADLINE Timeout Failed;
    Endpoint Overdue in Receive: RECEIVE_DEADLINE Timeout Failed;
    Client Overdue in Connect: CONNECT_DEADLINE Connect Nothing;
    Client Overdue in Send: SEND_DEADLINE Timeout Nothing;
    Client Overdue in Wait: WAIT_DEADLINE Timeout Nothing;
    Client Overdue in Receive: RECEIVE_DEADLINE Timeout Nothing;
    Disk Overdue in Send: SEND_DEADLINE Timeout Nothing;
    Disk Overdue in Wait: WAIT_DEADLINE Timeout Nothing;
    Disk Overdue in Receive: RECEIVE_DEADLINE Timeout Nothing;
    Gateway Overdue in Connect: CONNECT_DEADLINE Connect Nothing;
    Gateway Overdue in Send: SEND_DEADLINE Timeout Nothing;
    Gateway Overdue in Wait: WAIT_DEADLINE Timeout Nothing;
    Gateway Overdue in Receive: RECEIVE_DEADLINE Timeout Nothing;

    // The net beneath all clocks: nothing has come for long, and no clock of the endpoint has run for so long.
    Gateway Silent in Send Wait: WAIT_TIMEOUT Timeout Nothing;
    Gateway Silent in Receive: RECEIVE_TIMEOUT Timeout Nothing;

    // The time is over that a stop leaves.
    Gateway Stopped in Route Buffer Queue Select Connect Send Wait Receive Write Finish: FINISH_SHUTDOWN - Nothing;

    // A client whose header or framing is found wrong only by the library that passes it on.
    Client Malformed in Header Route Connect: HEADER_MALFORMED - Nothing;
    Client Silent in Header: HEADER_TIMEOUT - Nothing;
}

/// What there is for a fault that no row expects: it is the gateway's own.
static INTERNAL: Row = Row {
    party: Party::Gateway,
    phases: &Phase::ALL,
    what: What::Failed,
    refusal: &refusal::INTERNAL,
    failure: None,
    charge: Charge::Nothing,
};

/// What follows from this fault.
pub fn row(fault: Fault) -> &'static Row {
    let fits = |row: &&Row| row.party == fault.party && row.what == fault.what && row.phases.contains(&fault.phase);
    TABLE.iter().find(fits).unwrap_or(&INTERNAL)
}

/// Why no connection came about, as far as the error says: that there was no time left, it does not.
pub fn connecting(error: &Error) -> Fault {
    let (party, what) = match error.etype() {
        kind if *kind == dial::EXHAUSTED => (Party::Gateway, What::Exhausted),
        ErrorType::ConnectTimedout => (Party::Endpoint, What::Silent),
        ErrorType::ConnectRefused => (Party::Endpoint, What::Refused),
        ErrorType::TLSHandshakeFailure
        | ErrorType::TLSHandshakeTimedout
        | ErrorType::TLSWantX509Lookup
        | ErrorType::InvalidCert => (Party::Endpoint, What::Insecure),
        _ => (Party::Endpoint, What::Unreachable),
    };
    Fault::new(party, Phase::Connect, what)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every row for every phase that it is for.
    fn rows() -> impl Iterator<Item = (Fault, &'static Row)> {
        let faults =
            |row: &'static Row| row.phases.iter().map(move |&phase| (Fault::new(row.party, phase, row.what), row));
        TABLE.iter().flat_map(faults)
    }

    #[test]
    fn each_fault_has_one_row() {
        let mut known = std::collections::HashSet::new();
        for (fault, found) in rows() {
            assert!(known.insert(fault), "{fault:?} has two rows");
            assert!(std::ptr::eq(row(fault), found));
        }
    }

    #[test]
    fn only_endpoints_are_accused_and_only_of_what_they_did() {
        use What::{Broke, Insecure, Malformed, Overdue, Refused, Silent, Unreachable};
        for (fault, row) in rows().filter(|(_, row)| row.charge != Charge::Nothing) {
            assert_eq!(fault.party, Party::Endpoint, "{fault:?}");
            let acts = [Silent, Overdue, Broke, Malformed, Refused, Unreachable, Insecure];
            assert!(acts.contains(&fault.what), "{fault:?}");
            assert_eq!(row.charge == Charge::Unconnected, fault.phase == Phase::Connect, "{fault:?}");
        }
    }

    #[test]
    fn an_endpoint_at_fault_is_a_bad_gateway_and_no_other_party_is() {
        for (fault, row) in rows() {
            let status = row.refusal.status;
            match fault.party {
                Party::Endpoint => assert!(matches!(status, 502 | 504), "{fault:?} {status}"),
                _ if fault.what == What::Overdue => assert_eq!(status, 504, "{fault:?}"),
                Party::Client => assert!((400..500).contains(&status), "{fault:?} {status}"),
                Party::Disk | Party::Gateway => assert!(status >= 500, "{fault:?} {status}"),
            }
        }
    }

    #[test]
    fn a_reason_names_the_phase_in_which_it_is_found_or_the_one_that_waits_for_its_cause() {
        for (fault, row) in rows() {
            let named = row.refusal.reason.split('.').next().unwrap_or_default();
            let here = fault.phase.name() == named;
            let elsewhere = match (fault.phase, named) {
                // Streamed, a request has no phase of its own before; read back, a body comes from where it was held.
                (Phase::Route | Phase::Connect, "send" | "header") | (Phase::Send, "buffer" | "wait") => true,
                // An answer is written while it comes, and is settled once it is written.
                (Phase::Wait | Phase::Receive | Phase::Finish, "write") | (Phase::Write, "receive") => true,
                // Wherever it is when the gateway stops, that is its end.
                (_, "finish") => true,
                _ => false,
            };
            assert!(here || elsewhere, "{fault:?} is {}", row.refusal.reason);
        }
    }

    #[test]
    fn every_refusal_of_an_exchange_with_a_route_has_a_row_or_is_no_fault() {
        /// What the gateway decides without having waited.
        const DECISIONS: [&Refusal; 3] =
            [&refusal::SELECT_BREAKER_OPEN, &refusal::SELECT_NO_ENDPOINT, &refusal::INTERNAL];
        for refusal in refusal::ALL {
            let early =
                ["accept.", "handshake.", "header.", "route."].iter().any(|phase| refusal.reason.starts_with(phase));
            let known = rows().any(|(_, row)| row.refusal == *refusal) || DECISIONS.contains(refusal);
            assert!(early || known, "{} has no row", refusal.reason);
        }
    }

    #[test]
    fn a_fault_that_no_row_expects_is_the_gateways_own() {
        let unexpected = row(Fault::new(Party::Disk, Phase::Accept, What::Refused));
        assert_eq!((unexpected.refusal, unexpected.failure), (&refusal::INTERNAL, None));
        assert_eq!(unexpected.outcome(), Outcome::Cancelled);
    }

    #[test]
    fn an_error_of_a_connection_says_whose_it_is() {
        let fault = |kind| connecting(&Error::new_up(kind));
        let endpoint = |what| Fault::new(Party::Endpoint, Phase::Connect, what);
        assert_eq!(fault(ErrorType::ConnectRefused), endpoint(What::Refused));
        assert_eq!(fault(ErrorType::ConnectTimedout), endpoint(What::Silent));
        assert_eq!(fault(ErrorType::InvalidCert), endpoint(What::Insecure));
        assert_eq!(fault(ErrorType::ConnectNoRoute), endpoint(What::Unreachable));
        assert_eq!(fault(dial::EXHAUSTED), Fault::new(Party::Gateway, Phase::Connect, What::Exhausted));
    }
}
