//! The configuration is reloaded each second while a client sends requests: the effect on the client.
//!
//! The client sends at a fixed rate on keep-alive connections. Each reload changes a time of the route, so that no
//! proxy can skip it. nginx and HAProxy run with a master process here, as in production, which starts a new worker for
//! each reload. Forebay activates the new configuration in the running process.

use std::time::Duration;

use anyhow::{Context, Result};

use crate::fast::{FastClient, Log, Pace};
use crate::figures::{Column, Goal};
use crate::latency::p99_ms;
use crate::machine::Machine;
use crate::proxies::{Origins, Proxy};

/// The initial time that does not count, since connections are being opened.
const WARM: Duration = Duration::from_millis(500);

/// How long there are no reloads.
const WELL: Duration = Duration::from_secs(4);

/// Number of reloads.
const RELOADS: u32 = 10;

/// The time between two reloads.
const EACH: Duration = Duration::from_secs(1);

/// The figures. Failed are requests without a 200 response.
pub const RELOAD_COLUMNS: &[Column] = &[
    Column { key: "reload_p99_ms", heading: "reloads: p99 ms", decimals: 2, compared: true },
    Column { key: "well_p99_ms", heading: "before", decimals: 2, compared: true },
    Column { key: "reload_p99_over_well", heading: "x before", decimals: 2, compared: false },
    Column { key: "worst_ms", heading: "longest ms", decimals: 1, compared: false },
    Column { key: "failed", heading: "failed", decimals: 0, compared: false },
    Column { key: "requests", heading: "requests", decimals: 0, compared: false },
];

/// The goals.
pub const RELOAD_GOALS: &[Goal] = &[
    Goal { what: "failed with a reload each second", column: "failed", over: None, must: 0.0, aim: None },
    Goal {
        what: "p99 with a reload each second, x nginx",
        column: "reload_p99_ms",
        over: Some("nginx"),
        must: 2.0,
        aim: Some(1.0),
    },
];

/// Returns one figure per column of `RELOAD_COLUMNS`, from a fresh process.
pub fn sample(machine: &Machine, proxy: &Proxy, origins: Origins) -> Result<Vec<f64>> {
    let running = proxy.start_reloadable(machine, origins)?;
    let fast =
        FastClient::start(machine.fast_client(), running.server.address(), &running.server.manner(), Pace::USUAL)?;
    fast.wait_until(WARM + WELL);
    let begin = fast.elapsed();
    for number in 1..=RELOADS {
        proxy.reload(&running, number)?;
        fast.wait_until(begin + EACH * number);
    }
    let end = fast.elapsed();
    let log = fast.finish()?;
    let (well, reloading) = (p99(&log, WARM, begin)?, p99(&log, begin, end)?);
    let during = log.samples.iter().filter(|sample| (begin..end).contains(&sample.due));
    let worst = during.map(|sample| sample.latency).max().unwrap_or_default();
    Ok(vec![reloading, well, reloading / well, worst.as_secs_f64() * 1e3, log.failed as f64, log.samples.len() as f64])
}

fn p99(log: &Log, from: Duration, to: Duration) -> Result<f64> {
    p99_ms(&log.samples, from..to).context("the client sent nothing")
}
