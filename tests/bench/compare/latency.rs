//! Latencies of a load that is sent by the clock, whatever becomes of it, and percentiles of a part of it. Pure: `fast`
//! collects them.

use std::ops::Range;
use std::time::Duration;

/// One request.
#[derive(Clone, Copy, Debug)]
pub struct Sample {
    /// When it should have been sent, counted from the start. Latency is counted from there as well, so that a stall
    /// is felt by every request that was due in it, and not only by those that were under way.
    pub due: Duration,
    /// Until its answer was complete, or could no longer come.
    pub latency: Duration,
}

/// Latency, in milliseconds, that 99 % of the requests due within `window` stayed below. `None` if none was due.
pub fn p99_ms(samples: &[Sample], window: Range<Duration>) -> Option<f64> {
    percentile_ms(samples, window, 99)
}

/// The same for another share of the requests, in percent.
pub fn percentile_ms(samples: &[Sample], window: Range<Duration>, share: usize) -> Option<f64> {
    let within = samples.iter().filter(|sample| window.contains(&sample.due));
    let mut latencies: Vec<Duration> = within.map(|sample| sample.latency).collect();
    latencies.sort_unstable();
    let rank = (latencies.len() * share).div_ceil(100);
    Some(latencies.get(rank.checked_sub(1)?)?.as_secs_f64() * 1e3)
}
