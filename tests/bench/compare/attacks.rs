//! The cell `attacks`: the cost of each attack for the proxy, its effect on a concurrent fast client, and whether it
//! was detected.
//!
//! The fast client speaks TLS on keep-alive connections. An attack begins after a time in which the fast client is
//! alone, has a bounded load (`hostile`), and ends before the last measurement of memory. nginx has the same clients;
//! it has no counters.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use clap::ValueEnum;

use crate::counts::Counts;
use crate::fast::{FastClient, Log, Pace};
use crate::figures::{Column, Goal};
use crate::hostile::{Attackers, attacker, connect_from};
use crate::latency::p99_ms;
use crate::machine::Machine;
use crate::measure::settled_bytes;
use crate::process::get;
use crate::proxies::Running;
use crate::secure::Link;

/// The first second of the fast client does not count. After it, the client is alone.
const WARM: Duration = Duration::from_secs(1);
const ALONE: Duration = Duration::from_secs(4);
/// Duration of an attack: longer than the deadlines of headers and handshakes.
pub const LENGTH: Duration = Duration::from_secs(15);
/// How long silent connections exist before memory is measured.
const SILENCE: Duration = Duration::from_secs(4);

/// A way to attack.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Attack {
    /// slowhttptest -H over TLS.
    SlowHeaders,
    /// slowhttptest -B over TLS.
    SlowBody,
    /// slowhttptest -R over TLS.
    SlowRange,
    /// slowhttptest -X over TLS.
    SlowRead,
    /// ClientHellos whose bytes come one by one.
    SlowHello,
    /// Handshakes, and nothing behind them.
    Handshakes,
    /// Handshakes again and again on one connection of TLS 1.2.
    Renegotiation,
    /// Requests of HTTP/2 that are given up at once.
    RapidReset,
    /// The same below any rate, on many connections.
    PacedReset,
    /// Header blocks that do not end.
    Continuation,
    /// Changes of settings.
    Settings,
    /// Pings.
    Pings,
    /// Pieces of a body without content.
    EmptyData,
    /// Credit for one byte at a time.
    TinyWindow,
    /// Header lists that grow when they are unpacked.
    HpackBomb,
    /// Connections of TLS that say nothing.
    Idle,
}

impl Attack {
    /// The name on the command line.
    pub fn name(self) -> String {
        self.to_possible_value().map_or_else(String::new, |value| value.get_name().to_owned())
    }

    /// A description. `idle`: the number of silent connections.
    pub fn title(self, idle: usize) -> String {
        match self {
            Attack::SlowHeaders => "1,000 headers that come slowly (slowhttptest -H)".to_owned(),
            Attack::SlowBody => "1,000 bodies that come slowly (slowhttptest -B)".to_owned(),
            Attack::SlowRange => "1,000 requests for many ranges (slowhttptest -R)".to_owned(),
            Attack::SlowRead => "1,000 answers that are read slowly (slowhttptest -X)".to_owned(),
            Attack::SlowHello => "1,000 ClientHellos, a byte of each every 100 ms".to_owned(),
            Attack::Handshakes => "up to 200 handshakes a second".to_owned(),
            Attack::Renegotiation => "renegotiation, TLS 1.2".to_owned(),
            Attack::RapidReset => "up to 8,000 requests a second that are given up at once".to_owned(),
            Attack::PacedReset => "128 connections that give up 20 requests a second each".to_owned(),
            Attack::Continuation => "up to 20,000 CONTINUATION a second".to_owned(),
            Attack::Settings => "up to 20,000 SETTINGS a second".to_owned(),
            Attack::Pings => "up to 20,000 PING a second".to_owned(),
            Attack::EmptyData => "up to 20,000 empty DATA a second".to_owned(),
            Attack::TinyWindow => "up to 20,000 times credit for one byte a second".to_owned(),
            Attack::HpackBomb => "up to 400 header lists of 40 MB a second, packed into 10 KB".to_owned(),
            Attack::Idle => format!("{idle} connections of TLS that say nothing"),
        }
    }
}

/// The figures of an attack. A MB is 1,000,000 bytes.
pub const ATTACK_COLUMNS: &[Column] = &[
    Column { key: "p99_beside_ms", heading: "p99 beside ms", decimals: 2, compared: true },
    Column { key: "p99_alone_ms", heading: "alone ms", decimals: 2, compared: false },
    Column { key: "busy_percent", heading: "busy %", decimals: 0, compared: false },
    Column { key: "before_mb", heading: "MB before", decimals: 1, compared: false },
    Column { key: "peak_mb", heading: "peak +MB", decimals: 1, compared: false },
    Column { key: "end_mb", heading: "at its end +MB", decimals: 1, compared: false },
    Column { key: "kept_mb", heading: "after +MB", decimals: 1, compared: false },
    Column { key: "kb_each", heading: "KB each", decimals: 1, compared: false },
    Column { key: "failed", heading: "failed", decimals: 0, compared: false },
    Column { key: "uncounted", heading: "uncounted", decimals: 0, compared: false },
];

/// The goals for attacks.
pub const ATTACK_GOALS: &[Goal] = &[
    Goal { what: "a fast client's p99, x nginx", column: "p99_beside_ms", over: Some("nginx"), must: 1.5, aim: None },
    Goal { what: "MB at the peak more than before", column: "peak_mb", over: None, must: 128.0, aim: None },
    Goal { what: "MB after it more than before", column: "kept_mb", over: None, must: 32.0, aim: None },
    Goal { what: "requests of the fast client that failed", column: "failed", over: None, must: 0.0, aim: None },
    Goal { what: "unseen by any counter", column: "uncounted", over: None, must: 0.0, aim: None },
];

/// The setting: a fresh proxy, and the number of silent connections for that attack.
pub struct Scene<'a> {
    /// The CPUs.
    pub machine: &'a Machine,
    /// The attacked proxy.
    pub proxy: &'a Running,
    /// Number of silent connections.
    pub idle: usize,
}

impl Scene<'_> {
    /// Returns one figure per column of [`ATTACK_COLUMNS`]. `counts`: whether the proxy has counters.
    pub fn attacked_by(&self, attack: Attack, counts: bool) -> Result<Vec<f64>> {
        let server = &self.proxy.server;
        let (address, manner) = (server.address(), server.manner());
        let fast = FastClient::start(self.machine.fast_client(), address, &manner, Pace::USUAL)?;
        fast.wait_until(WARM + ALONE);
        let seen = || if counts { self.proxy.metrics().map(|text| Counts::of(&text)) } else { Ok(Counts::default()) };
        let (seen_before, before) = (seen()?, server.resident_bytes()? as f64);
        let (came, cpu) = (fast.elapsed(), server.cpu_seconds()?);
        let mut kb_each = f64::NAN;
        let (end, connections, cut);
        if attack == Attack::Idle {
            let held = self.silent(address)?;
            let arrived = fast.elapsed();
            eprintln!("    {} were there after {:.1} s", held.len(), (arrived - came).as_secs_f64());
            fast.wait_until(arrived + SILENCE);
            end = server.resident_bytes()? as f64;
            kb_each = (end - before) / held.len() as f64 / 1e3;
            let alive = held.iter().filter(|link| is_open(link)).count();
            (connections, cut) = (held.len() as u64, (held.len() - alive) as u64);
        } else {
            let attackers = Attackers::begin(attack, self.machine, address)?;
            fast.wait_until(came + LENGTH);
            end = server.resident_bytes()? as f64;
            (connections, cut) = attackers.finish()?;
        }
        let (went, busy) = (fast.elapsed(), server.cpu_seconds()? - cpu);
        let log = fast.finish()?;
        // The resources of closed connections are released within seconds.
        let settled = Instant::now();
        let mut after = settled_bytes(self.proxy)? as f64;
        while after - before > 8e6 && settled.elapsed() < Duration::from_secs(10) {
            after = settled_bytes(self.proxy)? as f64;
        }
        let more = seen()?.since(&seen_before);
        if connections > 0 {
            eprintln!("    {connections} connections, of which {cut} were cut off");
        }
        if counts {
            eprintln!("    counted: {more}");
        }
        // Connections that look like any other are counted as such; all others are refused.
        let expects = |name: &str| match attack {
            Attack::Handshakes | Attack::Idle | Attack::SlowRange => name.starts_with("handshakes"),
            _ => !name.starts_with("handshakes"),
        };
        let uncounted = if counts { f64::from(!more.names().any(expects)) } else { f64::NAN };
        let mb = |bytes: f64| (bytes - before) / 1e6;
        Ok(vec![
            p99(&log, came, went)?,
            p99(&log, WARM, WARM + ALONE)?,
            busy / (went - came).as_secs_f64() * 100.0,
            before / 1e6,
            mb(server.peak_bytes()? as f64).max(0.0),
            mb(end),
            mb(after),
            kb_each,
            log.failed as f64,
            uncounted,
        ])
    }

    /// Opens silent TLS connections from four addresses as fast as the proxy accepts them, each after one request.
    fn silent(&self, address: SocketAddr) -> Result<Vec<Link>> {
        let (place, manner, idle) = (self.machine.slow_clients(), self.proxy.server.manner(), self.idle);
        let come = || -> Result<Vec<Link>> {
            place.take()?;
            let open = |from| connect_from(attacker(from), address).and_then(|socket| manner.secure(socket));
            (1..=4).cycle().take(idle).map(|from| get(open(from)?, address, "/small")).collect()
        };
        std::thread::scope(|scope| scope.spawn(come).join()).map_err(|_| anyhow::anyhow!("a client panicked"))?
    }
}

fn is_open(link: &Link) -> bool {
    let socket = link.socket();
    let silent = socket.set_nonblocking(true).and_then(|()| socket.peek(&mut [0]));
    // Everything expected was read; further bytes would announce a close.
    matches!(silent, Err(error) if error.kind() == std::io::ErrorKind::WouldBlock)
}

fn p99(log: &Log, from: Duration, to: Duration) -> Result<f64> {
    p99_ms(&log.samples, from..to).context("the fast client sent nothing")
}
