//! Wrong passwords on one route while a fast client uses another: the effect on the fast client.
//!
//! Both clients send at a fixed rate. Periods with and without wrong passwords alternate in one process, so that other
//! load on the machine affects both. Each password is different, so that no result is remembered.

use std::net::SocketAddr;
use std::ops::Range;
use std::time::Duration;

use anyhow::{Context, Result};
use base64::Engine;
use base64::prelude::BASE64_STANDARD;

use crate::fast::{FastClient, Log, Pace, Question};
use crate::figures::{Column, Goal, median};
use crate::latency::p99_ms;
use crate::machine::Machine;
use crate::proxies::{GUARDED, Origins, Proxy};

/// The first second does not count, since connections are being opened.
const WARM: Duration = Duration::from_secs(1);

/// Duration of each period: the fast client alone, and with wrong passwords.
const EACH: Duration = Duration::from_secs(3);

/// The pause between two periods.
const SETTLE: Duration = Duration::from_millis(500);

/// Number of periods of each kind.
const TIMES: usize = 5;

/// 200 per second. A response may take seconds; it delays no other password meanwhile.
const GUESSES: Pace = Pace { interval: Duration::from_millis(5), connections: 400 };

/// The figures: medians over the periods of a sample.
pub const PASSWORD_COLUMNS: &[Column] = &[
    Column { key: "p99_beside_ms", heading: "beside: p99 ms", decimals: 2, compared: true },
    Column { key: "p99_alone_ms", heading: "alone", decimals: 2, compared: true },
    Column { key: "p99_beside_over_alone", heading: "x alone", decimals: 2, compared: false },
    Column { key: "guesses", heading: "passwords", decimals: 0, compared: false },
    Column { key: "not_hashed", heading: "not hashed", decimals: 0, compared: false },
    Column { key: "cpu_beside_percent", heading: "busy beside %", decimals: 0, compared: false },
    Column { key: "failed", heading: "failed", decimals: 0, compared: false },
];

/// The goals: other clients notice nothing.
pub const PASSWORD_GOALS: &[Goal] = &[
    Goal {
        what: "a fast client's p99 beside 200 wrong passwords a second, x alone",
        column: "p99_beside_over_alone",
        over: None,
        must: 1.2,
        aim: Some(1.05),
    },
    Goal { what: "failed beside wrong passwords", column: "failed", over: None, must: 0.0, aim: None },
];

/// Returns one figure per column of `PASSWORD_COLUMNS`, from a fresh process.
pub fn sample(machine: &Machine, proxy: &Proxy, origins: Origins) -> Result<Vec<f64>> {
    let running = proxy.start(machine, origins)?;
    let (address, manner) = (running.server.address(), running.server.manner());
    let fast = FastClient::start(machine.fast_client(), address, &manner, Pace::USUAL)?;
    fast.wait_until(WARM);
    let (mut alone, mut beside, mut cpu) = (Vec::new(), Vec::new(), Vec::new());
    let (mut guesses, mut not_hashed) = (0, 0);
    for _ in 0..TIMES {
        alone.push(next(&fast, Duration::ZERO));
        let question = Question { header: guess, answer: b"HTTP/1.1 401" };
        let wrong = FastClient::asking(machine.slow_clients(), address, &manner, GUESSES, question)?;
        let before = running.server.cpu_seconds()?;
        beside.push(next(&fast, SETTLE));
        cpu.push((running.server.cpu_seconds()? - before) / (SETTLE + EACH).as_secs_f64() * 100.0);
        // All responses are received after this, so that no password is pending.
        let log = wrong.finish()?;
        guesses += log.samples.len();
        not_hashed += log.failed;
        fast.wait_until(fast.elapsed() + SETTLE);
    }
    let log = fast.finish()?;
    let (alone, beside) = (p99(&log, &alone)?, p99(&log, &beside)?);
    let cpu = median(cpu).context("a figure")?;
    let counts = [guesses, not_hashed].map(|count| count as f64);
    Ok(vec![beside, alone, beside / alone, counts[0], counts[1], cpu, log.failed as f64])
}

/// Waits for the end of a period that begins after `pause`.
fn next(fast: &FastClient, pause: Duration) -> Range<Duration> {
    let begin = fast.elapsed() + pause;
    fast.wait_until(begin + EACH);
    begin..begin + EACH
}

/// A request with a wrong password, different each time.
fn guess(address: SocketAddr, due: Duration) -> String {
    let credentials = BASE64_STANDARD.encode(format!("ada:wrong-{}", due.as_nanos()));
    format!("GET {GUARDED} HTTP/1.1\r\nHost: {address}\r\nAuthorization: Basic {credentials}\r\n\r\n")
}

fn p99(log: &Log, windows: &[Range<Duration>]) -> Result<f64> {
    let each = windows.iter().filter_map(|window| p99_ms(&log.samples, window.clone())).collect();
    median(each).context("the fast client sent nothing")
}
