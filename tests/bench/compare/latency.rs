//! Latencies of a load with a fixed rate, and percentiles of a part of it. Pure; `fast` collects the samples.

use std::ops::Range;
use std::time::Duration;

/// One request.
#[derive(Clone, Copy, Debug)]
pub struct Sample {
    /// When the request was due, relative to the start. Latency is measured from this time, so that a stall affects
    /// every request that was due in it, and not only the active ones.
    pub due: Duration,
    /// The time until the response was complete, or failed.
    pub latency: Duration,
}

/// The 99th percentile in milliseconds of the requests that were due within `window`. `None` if none was due.
pub fn p99_ms(samples: &[Sample], window: Range<Duration>) -> Option<f64> {
    percentile_ms(samples, window, 99)
}

/// The percentile `share` of the requests that were due within `window`.
pub fn percentile_ms(samples: &[Sample], window: Range<Duration>, share: usize) -> Option<f64> {
    let within = samples.iter().filter(|sample| window.contains(&sample.due));
    let mut latencies: Vec<Duration> = within.map(|sample| sample.latency).collect();
    latencies.sort_unstable();
    let rank = (latencies.len() * share).div_ceil(100);
    Some(latencies.get(rank.checked_sub(1)?)?.as_secs_f64() * 1e3)
}
