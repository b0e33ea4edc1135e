//! What the phases are told of an exchange that begins.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::connection::Connection;
use super::http2::Control;
use super::stream::WeakBypass;
use crate::phase::journal::Cycle;

/// The facts about the start of an exchange, from before Pingora creates its context.
pub struct ExchangeStart {
    /// The connection.
    pub connection: Arc<Connection>,
    /// Time from accept to the first byte, without the handshake; for the first exchange only.
    pub accept: Option<Duration>,
    /// Duration of the handshake; for the first exchange only.
    pub handshake: Option<Duration>,
    /// Time of the first byte of the header.
    pub header_since: Instant,
    /// The worker's cycle of that byte; `None` if no recording needs it.
    pub header_in: Option<Cycle>,
    /// Time at which the header was complete.
    pub header_done: Instant,
    /// The control of the stream, on HTTP/2.
    pub control: Option<Control>,
    /// The path past the session, on HTTP/1.
    pub bypass: Option<WeakBypass>,
}
