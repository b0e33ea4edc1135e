//! The cells with many slow clients: their cost for the proxy and the origin, and their effect on a concurrent fast
//! client. This module takes one sample of each; `measure` repeats it for each proxy and round.

use std::time::Duration;

use anyhow::{Context, Result, anyhow};

use crate::bulk::Counts;
use crate::fast::{FastClient, Log, Pace};
use crate::figures::{Column, Goal};
use crate::latency::p99_ms;
use crate::machine::Machine;
use crate::process::body_of;
use crate::proxies::Running;
use crate::slow::{Readers, Uploaders};

/// The first second of the fast client does not count, since buffers, pools and caches are being filled.
const WARM: Duration = Duration::from_secs(1);

/// How long the fast client is alone after that.
const ALONE: Duration = Duration::from_secs(5);

/// The period in which readers arrive. The fast client's latency in it is a separate figure.
const ARRIVAL: Duration = Duration::from_secs(4);

/// From this time on, all readers have arrived, and the fast client should not notice them any more.
const LATER: Duration = Duration::from_secs(3);

/// How long the fast client and the uploaders run together after that.
const BESIDE: Duration = Duration::from_secs(5);

/// When the cost of readers is measured.
const END: Duration = Duration::from_secs(25);

/// The figures for uploaders that pause. A KB is 1,000 bytes.
pub const UPLOADER_COLUMNS: &[Column] = &[
    Column { key: "kb_each", heading: "KB each", decimals: 1, compared: true },
    Column { key: "backends", heading: "backends", decimals: 0, compared: false },
    Column { key: "p99_alone_ms", heading: "p99 alone ms", decimals: 2, compared: false },
    Column { key: "p99_beside_ms", heading: "beside ms", decimals: 2, compared: true },
    Column { key: "p99_beside_over_alone", heading: "/ alone", decimals: 2, compared: false },
    Column { key: "lost", heading: "lost", decimals: 0, compared: false },
    Column { key: "failed", heading: "failed", decimals: 0, compared: false },
];

/// The goals for uploaders.
pub const UPLOADER_GOALS: &[Goal] = &[
    Goal { what: "backends opened for them", column: "backends", over: None, must: 0.0, aim: None },
    Goal { what: "KB of memory each", column: "kb_each", over: None, must: 48.0, aim: Some(24.0) },
    Goal {
        what: "a fast client's p99 beside them, x alone",
        column: "p99_beside_over_alone",
        over: None,
        must: 1.5,
        aim: None,
    },
];

/// The figures for slow readers.
pub const READER_COLUMNS: &[Column] = &[
    Column { key: "p99_arriving_ms", heading: "p99 0-4 s ms", decimals: 2, compared: true },
    Column { key: "p99_later_ms", heading: "3-25 s ms", decimals: 2, compared: true },
    Column { key: "p99_alone_ms", heading: "alone ms", decimals: 2, compared: false },
    Column { key: "p99_later_over_alone", heading: "later / alone", decimals: 2, compared: false },
    Column { key: "begun_at_3s", heading: "begun 3 s", decimals: 0, compared: false },
    Column { key: "busy_at_3s", heading: "busy 3 s", decimals: 0, compared: false },
    Column { key: "begun_at_25s", heading: "begun 25 s", decimals: 0, compared: false },
    Column { key: "busy_at_25s", heading: "busy 25 s", decimals: 0, compared: false },
    Column { key: "kb_each", heading: "KB each", decimals: 1, compared: true },
    Column { key: "peak_mb", heading: "peak MB", decimals: 0, compared: false },
    Column { key: "kib_per_second_each", heading: "KiB/s each", decimals: 1, compared: false },
    Column { key: "lost", heading: "lost", decimals: 0, compared: false },
    Column { key: "failed", heading: "failed", decimals: 0, compared: false },
];

/// The goals for slow readers.
pub const READER_GOALS: &[Goal] = &[
    Goal {
        what: "a fast client's p99 as they arrive, x haproxy's",
        column: "p99_arriving_ms",
        over: Some("haproxy"),
        must: 1.5,
        aim: None,
    },
    Goal {
        what: "a fast client's p99 from 3 s on, x alone",
        column: "p99_later_over_alone",
        over: None,
        must: 4.0,
        aim: None,
    },
    Goal { what: "backends busy with them after 25 s", column: "busy_at_25s", over: None, must: 10.0, aim: None },
    Goal { what: "KB of memory each after 25 s", column: "kb_each", over: None, must: 128.0, aim: None },
];

/// The setting of a sample. All processes are fresh, since a process that had such clients before has spare memory.
pub struct Stage<'a> {
    /// The CPUs.
    pub machine: &'a Machine,
    /// The measured proxy.
    pub proxy: &'a Running,
    /// The origin of the slow clients only.
    pub origin: &'a Running,
    /// Number of slow clients.
    pub slow: usize,
}

impl Stage<'_> {
    /// Returns one figure per column of `UPLOADER_COLUMNS`.
    pub fn beside_uploaders(&self) -> Result<Vec<f64>> {
        let address = self.proxy.server.address();
        let fast = self.fast_client_alone()?;
        let (counts, bytes) = (self.counts()?, self.proxy.server.resident_bytes()?);
        let uploaders = Uploaders::arrive(self.machine.slow_clients(), self.slow, address)?;
        let arrived = fast.elapsed();
        fast.wait_until(arrived + LATER + BESIDE);
        let backends = self.counts()?.bothered_since(&counts);
        let kb_each = self.kb_each_since(bytes)?;
        let lost = uploaders.lost();
        let log = fast.finish()?;
        self.warn(lost, &log);
        let alone = p99(&log, WARM, WARM + ALONE)?;
        let beside = p99(&log, arrived + LATER, arrived + LATER + BESIDE)?;
        let (lost, failed) = (lost as f64, log.failed as f64);
        Ok(vec![kb_each, backends as f64, alone, beside, beside / alone, lost, failed])
    }

    /// Returns one figure per column of `READER_COLUMNS`.
    pub fn beside_readers(&self) -> Result<Vec<f64>> {
        let fast = self.fast_client_alone()?;
        let bytes = self.proxy.server.resident_bytes()?;
        let arrival = fast.elapsed();
        let readers = Readers::arrive(self.machine.slow_clients(), self.slow, self.proxy.server.address())?;
        fast.wait_until(arrival + LATER);
        let counts_at_3s = self.counts()?;
        fast.wait_until(arrival + END);
        let counts_at_25s = self.counts()?;
        let kb_each = self.kb_each_since(bytes)?;
        let peak_mb = self.proxy.server.peak_bytes()? as f64 / 1e6;
        let tally = readers.finish()?;
        let log = fast.finish()?;
        self.warn(tally.lost, &log);
        eprintln!("    all readers had asked after {:.1} s", tally.arrived_within.as_secs_f64());
        let alone = p99(&log, WARM, WARM + ALONE)?;
        let later = p99(&log, arrival + LATER, arrival + END)?;
        Ok(vec![
            p99(&log, arrival, arrival + ARRIVAL)?,
            later,
            alone,
            later / alone,
            counts_at_3s.begun as f64,
            counts_at_3s.busy as f64,
            counts_at_25s.begun as f64,
            counts_at_25s.busy as f64,
            kb_each,
            peak_mb,
            tally.bytes as f64 / 1024.0 / tally.time.as_secs_f64() / self.slow as f64,
            tally.lost as f64,
            log.failed as f64,
        ])
    }

    /// Starts a fast client and waits until its time alone is over.
    fn fast_client_alone(&self) -> Result<FastClient> {
        let fast = FastClient::start(
            self.machine.fast_client(),
            self.proxy.server.address(),
            &self.proxy.server.manner(),
            Pace::USUAL,
        )?;
        fast.wait_until(WARM + ALONE);
        Ok(fast)
    }

    fn warn(&self, lost: usize, log: &Log) {
        if lost + log.failed > 0 {
            let Log { samples, failed } = log;
            eprintln!(
                "    lost {lost} of {} slow clients, failed {failed} of {} requests of the fast one",
                self.slow,
                samples.len()
            );
        }
    }

    fn counts(&self) -> Result<Counts> {
        body_of(self.origin.server.address(), "/counts")?.parse().map_err(|error| anyhow!("{error}"))
    }

    fn kb_each_since(&self, before: u64) -> Result<f64> {
        Ok((self.proxy.server.resident_bytes()? as f64 - before as f64) / self.slow as f64 / 1e3)
    }
}

fn p99(log: &Log, from: Duration, to: Duration) -> Result<f64> {
    p99_ms(&log.samples, from..to).context("the fast client sent nothing")
}
