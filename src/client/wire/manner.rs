//! How and when a response is sent, as the configuration of a route says.

use std::sync::Arc;
use std::time::Duration;

use super::PIECE_MOST;
use crate::config;
use crate::config::route::BufferMode;
use crate::config::server::Resources;
use crate::metrics::RouteMetrics;
use crate::slow_client::pace::Pace;
use crate::spool::Limits;

/// When a response is sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Leave {
    /// At once; the upstream waits for the client.
    Stream,
    /// At once; bytes that the client does not accept are spooled.
    Auto,
    /// After the response is complete.
    Full,
}

/// How a response is sent.
#[derive(Clone)]
pub struct Manner {
    /// When it is sent.
    pub leave: Leave,
    /// Limits of its spool.
    pub limits: Limits,
    /// The minimum rate.
    pub pace: Pace,
    /// Maximum time between two pieces that the client accepts.
    pub write_idle: Duration,
    /// Maximum time to wait for the disk.
    pub disk_max: Duration,
    /// The maximum rate.
    pub throttle: Option<Throttle>,
    /// The metrics of the route.
    pub route: Arc<RouteMetrics>,
}

impl Manner {
    /// Builds the settings from a route's configuration.
    pub fn build(written: &config::Route, resources: &Resources, metrics: &Arc<RouteMetrics>) -> Manner {
        let (client, response) = (&written.client, &written.buffering.response);
        Manner {
            leave: match response.mode {
                BufferMode::Auto => Leave::Auto,
                BufferMode::Full => Leave::Full,
                BufferMode::Stream => Leave::Stream,
            },
            limits: Limits::build(response.memory, response.disk, resources),
            pace: Pace::new(client.min_rate.write.0, client.min_rate.grace.0),
            disk_max: resources.pause.0,
            write_idle: client.write_idle.0,
            throttle: client.limit_rate.as_ref().map(|limit| Throttle { rate: limit.rate.0, after: limit.after.0 }),
            route: metrics.clone(),
        }
    }
}

/// A maximum rate that applies after an initial burst.
#[derive(Clone, Copy, Debug)]
pub struct Throttle {
    /// Bytes per second.
    pub rate: u64,
    /// Number of initial bytes without a limit.
    pub after: u64,
}

impl Throttle {
    /// The earliest time at which `sent` bytes may have been sent, relative to the first byte.
    pub(super) fn due(&self, sent: u64) -> Duration {
        Duration::from_secs_f64(sent.saturating_sub(self.after) as f64 / self.rate as f64)
    }

    /// Size of a piece, in bytes: about a tenth of a second's worth, for an even flow.
    pub(super) fn piece(&self) -> usize {
        usize::try_from(self.rate / 10).unwrap_or(usize::MAX).clamp(1 << 10, PIECE_MOST)
    }
}
