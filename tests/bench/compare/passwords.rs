//! Wrong passwords come to one route while a fast client asks another: what the fast client notices.
//!
//! Both clients send by the clock. Times with and without wrong passwords alternate in one process, so that work of
//! others on the machine touches both alike. Each password is another one, so that nothing is remembered of it.

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

/// The first second does not count: connections are opened in it.
const WARM: Duration = Duration::from_secs(1);

/// How long the fast client is alone each time, and then beside wrong passwords.
const EACH: Duration = Duration::from_secs(3);

/// Between the two, and before the next time alone.
const SETTLE: Duration = Duration::from_millis(500);

/// How often both.
const TIMES: usize = 5;

/// 200 a second. An answer may take seconds, and holds up no other password meanwhile.
const GUESSES: Pace = Pace { interval: Duration::from_millis(5), connections: 400 };

/// What is measured. Medians over the times of a sample.
pub const PASSWORD_COLUMNS: &[Column] = &[
    Column { key: "p99_beside_ms", heading: "beside: p99 ms", decimals: 2, compared: true },
    Column { key: "p99_alone_ms", heading: "alone", decimals: 2, compared: true },
    Column { key: "p99_beside_over_alone", heading: "x alone", decimals: 2, compared: false },
    Column { key: "guesses", heading: "passwords", decimals: 0, compared: false },
    Column { key: "not_hashed", heading: "not hashed", decimals: 0, compared: false },
    Column { key: "cpu_beside_percent", heading: "busy beside %", decimals: 0, compared: false },
    Column { key: "failed", heading: "failed", decimals: 0, compared: false },
];

/// What must be reached: other clients notice nothing.
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

/// One figure per column of `PASSWORD_COLUMNS`, of a fresh process.
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
        // All answers have come when this is over, so that no password waits any more.
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

/// Waits for a time to be over that begins in so long.
fn next(fast: &FastClient, pause: Duration) -> Range<Duration> {
    let begin = fast.elapsed() + pause;
    fast.wait_until(begin + EACH);
    begin..begin + EACH
}

/// A request with a wrong password, another one each time.
fn guess(address: SocketAddr, due: Duration) -> String {
    let credentials = BASE64_STANDARD.encode(format!("ada:wrong-{}", due.as_nanos()));
    format!("GET {GUARDED} HTTP/1.1\r\nHost: {address}\r\nAuthorization: Basic {credentials}\r\n\r\n")
}

fn p99(log: &Log, windows: &[Range<Duration>]) -> Result<f64> {
    let each = windows.iter().filter_map(|window| p99_ms(&log.samples, window.clone())).collect();
    median(each).context("the fast client sent nothing")
}
