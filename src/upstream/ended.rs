//! What the end of an attempt means: what the proxy tells an upstream of each endpoint that it was given, exactly once.

use std::time::Duration;

use http::StatusCode;

use crate::error::Refusal;

/// How an attempt ended.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Ended {
    /// What came of it.
    pub outcome: Outcome,
    /// How long it took until a connection stood. `None`: it was kept from an earlier exchange, or none stood.
    pub connect: Option<Duration>,
    /// From the end of the request, as far as can be seen, to the end of the response header. `None`: there was none.
    pub wait: Option<Duration>,
    /// From the choice of the endpoint to its release.
    pub total: Duration,
}

/// What came of an attempt.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Outcome {
    /// The endpoint has answered, and to the end.
    Answered(StatusCode),
    /// No connection stood.
    Connect(&'static Refusal),
    /// It was connected and then failed: reset, timed out, malformed.
    Failed(&'static Refusal),
    /// Somebody else's doing, such as the client's, or a kept connection's that had died unnoticed: it counts against
    /// nobody.
    Cancelled,
}

impl Outcome {
    /// Why it failed, if it did.
    pub fn failure(&self) -> Option<&'static Refusal> {
        match self {
            Outcome::Connect(refusal) | Outcome::Failed(refusal) => Some(refusal),
            Outcome::Answered(_) | Outcome::Cancelled => None,
        }
    }
}
