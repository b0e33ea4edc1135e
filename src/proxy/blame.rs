//! The consequences of a fault: one table maps party, phase and event to the client's response, to a further attempt,
//! and to the charge against the endpoint.
//!
//! Faults are recorded where they occur ([`Fault`]); errors of libraries, such as a broken connection, are converted
//! here. An endpoint is charged only for its acts and omissions while it was waited for. `upstream/ended.rs` defines
//! the effect of a charge on circuit breakers, outlier detection, latency and probes.

#[cfg(test)]
mod model;

use pingora::{Error, ErrorType};

use super::retry::Failure;
use crate::error::{Refusal, refusal};
use crate::party::{Fault, Party, What};
use crate::phase::Phase;
use crate::upstream::Outcome;
use crate::upstream::transport::dial;

/// A charge against an endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Charge {
    /// No charge.
    Nothing,
    /// A connection to the endpoint could not be opened.
    Unconnected,
    /// The endpoint was connected and did not respond correctly.
    Failed,
}

/// A row of the table.
pub struct Row {
    party: Party,
    phases: &'static [Phase],
    what: What,
    /// Reason, status and message.
    pub refusal: &'static Refusal,
    /// The failure for the retry rules. `None`: no further attempt.
    pub failure: Option<Failure>,
    /// The charge against the endpoint.
    pub charge: Charge,
}

impl Row {
    /// The outcome of the attempt, for the upstream.
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
        /// Every fault that can end an exchange or an attempt, once the route is known.
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
    // While the request body is held back, the exchange waits for its client or for room.
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

    // Before an endpoint is connected.
    Gateway Full in Queue: QUEUE_FULL - Nothing;
    Gateway Silent in Queue: QUEUE_TIMEOUT - Nothing;
    Client Left in Queue: QUEUE_ABORTED - Nothing;
    Client Left in Select: SELECT_ABORTED - Nothing;
    Endpoint Refused in Connect: CONNECT_REFUSED Connect Unconnected;
    Endpoint Silent in Connect: CONNECT_TIMEOUT Connect Unconnected;
    Endpoint Insecure in Connect: CONNECT_TLS Connect Unconnected;
    Endpoint Unreachable in Connect: CONNECT_FAILED Connect Unconnected;
    Gateway Exhausted in Connect: CONNECT_EXHAUSTED Exhausted Nothing;

    // While the request is passed on, either side may be waited for.
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

    // The request was sent: the endpoint is waited for.
    Endpoint Silent in Wait: WAIT_TIMEOUT Timeout Failed;
    Endpoint Broke in Wait: WAIT_RESET Reset Failed;
    Endpoint GaveUp in Wait: WAIT_RESET Reset Nothing;
    Endpoint Stale in Wait: WAIT_RESET Stale Nothing;
    Endpoint Unprocessed in Wait: WAIT_RESET Unprocessed Nothing;
    Endpoint Malformed in Send Wait: WAIT_MALFORMED Reset Failed;
    Client Left in Wait: WAIT_ABORTED - Nothing;

    // The response is received and sent to the client.
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

    // The deadline of the exchange has passed. An endpoint that used nearly all of this time is at fault.
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

    // The last resort of all clocks: nothing was received for long, and no clock of the endpoint ran for so long.
    Gateway Silent in Send Wait: WAIT_TIMEOUT Timeout Nothing;
    Gateway Silent in Receive: RECEIVE_TIMEOUT Timeout Nothing;

    // The grace period of a shutdown has passed.
    Gateway Stopped in Route Buffer Queue Select Connect Send Wait Receive Write Finish: FINISH_SHUTDOWN - Nothing;

    // Errors in a client's header or framing that only the library finds when it forwards the request.
    Client Malformed in Header Route Connect: HEADER_MALFORMED - Nothing;
    Client Silent in Header: HEADER_TIMEOUT - Nothing;
}

/// The row for faults that the table does not contain: an internal error.
static INTERNAL: Row = Row {
    party: Party::Gateway,
    phases: &Phase::ALL,
    what: What::Failed,
    refusal: &refusal::INTERNAL,
    failure: None,
    charge: Charge::Nothing,
};

/// The consequences of this fault.
pub fn row(fault: Fault) -> &'static Row {
    let fits = |row: &&Row| row.party == fault.party && row.what == fault.what && row.phases.contains(&fault.phase);
    TABLE.iter().find(fits).unwrap_or(&INTERNAL)
}

/// The fault for a failed connect, as far as the error determines it. It does not contain an expired deadline.
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

    /// Each row with each of its phases.
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
                // A streamed request has no phase of its own before; a held body is read back from its spool.
                (Phase::Route | Phase::Connect, "send" | "header") | (Phase::Send, "buffer" | "wait") => true,
                // A response is written while it is received, and is settled after it was written.
                (Phase::Wait | Phase::Receive | Phase::Finish, "write") | (Phase::Write, "receive") => true,
                // A shutdown ends an exchange in any phase.
                (_, "finish") => true,
                _ => false,
            };
            assert!(here || elsewhere, "{fault:?} is {}", row.refusal.reason);
        }
    }

    #[test]
    fn every_refusal_of_an_exchange_with_a_route_has_a_row_or_is_no_fault() {
        /// Refusals that Forebay decides without a wait.
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
