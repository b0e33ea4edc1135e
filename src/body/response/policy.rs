//! How and when a response is sent, as the configuration of a route says.

use std::sync::Arc;
use std::time::Duration;

use super::PIECE_MOST;
use crate::config;
use crate::config::route::BufferMode;
use crate::config::server::Resources;
use crate::metrics::RouteMetrics;
use crate::slow_client::min_rate::MinRate;
use crate::spool::Limits;

/// How a response is sent.
#[derive(Clone)]
pub struct ResponsePolicy {
    /// When it is sent: at once, while the upstream waits for the client (`Stream`); at once, and bytes that the client
    /// does not accept are spooled (`Auto`); after it is complete (`Full`).
    pub mode: BufferMode,
    /// Limits of its spool.
    pub limits: Limits,
    /// The minimum rate.
    pub min_rate: MinRate,
    /// Maximum time between two pieces that the client accepts.
    pub write_idle: Duration,
    /// Maximum time to wait for the disk.
    pub disk_max: Duration,
    /// The maximum rate.
    pub throttle: Option<Throttle>,
    /// The metrics of the route.
    pub route: Arc<RouteMetrics>,
}

impl ResponsePolicy {
    /// Builds the settings from a route's configuration.
    pub fn build(written: &config::Route, resources: &Resources, metrics: &Arc<RouteMetrics>) -> ResponsePolicy {
        let (client, response) = (&written.client, &written.buffering.response);
        ResponsePolicy {
            mode: response.mode,
            limits: Limits::build(response.memory, response.disk, resources),
            min_rate: MinRate::new(client.min_rate.write.0, client.min_rate.grace.0),
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
