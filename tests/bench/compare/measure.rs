//! The cells of the comparison: which work is done, and what is measured while it is.

use std::net::{SocketAddr, TcpStream};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use clap::ValueEnum;

use crate::figures::{Column, Comparison, Row};
use crate::machine::{Machine, Noise, load_averages};
use crate::process::{open_and_ask, open_and_get, output_within};
use crate::proxies::{Proxy, Running};
use crate::wrk;

/// A kind of work.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Cell {
    /// A small GET on 64 keep-alive connections.
    Small,
    /// A small GET on 512 keep-alive connections.
    Many,
    /// A small GET on a new connection each, 64 at a time.
    Connect,
    /// Answers of 64 KiB on 64 connections.
    #[value(name = "64k")]
    Medium,
    /// Answers of 1 MiB on 16 connections.
    #[value(name = "1m")]
    Large,
    /// A small GET through Forebay with 10 and with 10,000 routes.
    Routes,
    /// Memory for an idle keep-alive connection, after one request.
    Idle,
    /// Memory for a client that asks for 4 MiB and reads no more than their beginning.
    Stalled,
}

/// Requests as fast as the proxy answers.
struct Load {
    path: &'static str,
    connections: usize,
    /// Whether each request comes on a connection of its own.
    new_connections: bool,
}

/// Where it is done, and how much of it.
pub struct Bench {
    /// The CPUs.
    pub machine: Machine,
    /// Where the proxies send their requests.
    pub origin: Running,
    /// How much is done for each figure.
    pub effort: Effort,
}

/// How much is done for each figure.
pub struct Effort {
    /// Seconds of load per sample.
    pub seconds: u64,
    /// Samples per figure.
    pub rounds: usize,
    /// Connections held open in the cell `idle`; the cell `stalled` has a tenth of them.
    pub connections: usize,
}

/// What is measured under load. The CPU time comes first: it is the figure that others' work disturbs least.
const LOAD_COLUMNS: &[Column] = &[
    Column { key: "cpu_seconds_per_100k", heading: "CPU s/100k", decimals: 2, compared: true },
    Column { key: "requests_per_second", heading: "req/s", decimals: 0, compared: true },
    Column { key: "p50_ms", heading: "p50 ms", decimals: 2, compared: true },
    Column { key: "p99_ms", heading: "p99 ms", decimals: 2, compared: true },
    Column { key: "busy_percent", heading: "busy %", decimals: 0, compared: false },
    Column { key: "failed", heading: "failed", decimals: 0, compared: false },
];

/// What is measured with connections held open.
const MEMORY_COLUMNS: &[Column] =
    &[Column { key: "kib_per_connection", heading: "KiB/connection", decimals: 2, compared: true }];

impl Cell {
    /// The load, or `None` where connections are held instead.
    fn load(self) -> Option<Load> {
        let (path, connections) = match self {
            Cell::Small | Cell::Connect | Cell::Routes => ("/small", 64),
            Cell::Many => ("/small", 512),
            Cell::Medium => ("/64k", 64),
            Cell::Large => ("/1m", 16),
            Cell::Idle | Cell::Stalled => return None,
        };
        Some(Load { path, connections, new_connections: self == Cell::Connect })
    }

    fn title(self, effort: &Effort) -> String {
        match self {
            Cell::Small => "small GET, 64 connections".to_owned(),
            Cell::Many => "small GET, 512 connections".to_owned(),
            Cell::Connect => "new connection per request".to_owned(),
            Cell::Medium => "64 KiB answers, 64 connections".to_owned(),
            Cell::Large => "1 MiB answers, 16 connections".to_owned(),
            Cell::Routes => "small GET, many routes".to_owned(),
            Cell::Idle => format!("{} idle connections", effort.connections),
            Cell::Stalled => format!("{} stalled readers of 4 MiB", effort.stalled()),
        }
    }

    /// As on the command line.
    pub fn name(self) -> String {
        self.to_possible_value().map_or_else(String::new, |value| value.get_name().to_owned())
    }
}

impl Effort {
    fn stalled(&self) -> usize {
        self.connections.div_ceil(10)
    }
}

impl Bench {
    /// Compares `proxies`, in turn in each round, to the one at `base`.
    pub fn compare(&self, cell: Cell, proxies: &[Proxy], base: usize) -> Result<Comparison> {
        let (title, load) = (cell.title(&self.effort), cell.load());
        let columns = if load.is_some() { LOAD_COLUMNS } else { MEMORY_COLUMNS };
        let mut rows: Vec<Row> =
            proxies.iter().map(|proxy| Row { name: proxy.name.clone(), samples: Vec::new() }).collect();
        match load {
            Some(load) => self.under_load(&load, proxies, &mut rows),
            None => self.while_held(cell, proxies, &mut rows),
        }
        .with_context(|| title.clone())?;
        Ok(Comparison { cell: cell.name(), title, columns, base, rows })
    }

    /// Every proxy runs from the first round to the last, and idles while another is measured.
    fn under_load(&self, load: &Load, proxies: &[Proxy], rows: &mut [Row]) -> Result<()> {
        let running = proxies.iter().map(|proxy| self.start(proxy)).collect::<Result<Vec<_>>>()?;
        let servers_seconds =
            || running.iter().chain([&self.origin]).map(|running| running.server.cpu_seconds()).sum::<Result<f64>>();
        for proxy in &running {
            // Buffers, pools and caches are filled before anything counts.
            self.wrk(load, proxy.server.address(), 1)?;
        }
        for round in 1..=self.effort.rounds {
            let before = load_averages()?;
            let noise = Noise::listen(servers_seconds()?)?;
            for (proxy, row) in running.iter().zip(rows.iter_mut()) {
                row.samples.push(self.load_sample(load, proxy).with_context(|| row.name.clone())?);
            }
            let others = noise.cores(servers_seconds()?)?;
            eprintln!("  round {round}: load average before it {before}; others kept {others:.2} cores busy");
        }
        Ok(())
    }

    /// One figure per column of `LOAD_COLUMNS`.
    fn load_sample(&self, load: &Load, proxy: &Running) -> Result<Vec<f64>> {
        proxy.empty_logs()?;
        let before = proxy.server.cpu_seconds()?;
        let run = self.wrk(load, proxy.server.address(), self.effort.seconds)?;
        let cpu_seconds = proxy.server.cpu_seconds()? - before;
        if run.failed > 0 {
            eprintln!("  {} of {} requests failed: these figures say little", run.failed, run.requests);
        }
        Ok(vec![
            cpu_seconds / run.requests as f64 * 1e5,
            run.requests as f64 / run.seconds,
            run.p50_ms,
            run.p99_ms,
            cpu_seconds / run.seconds * 100.0,
            run.failed as f64,
        ])
    }

    fn wrk(&self, load: &Load, address: SocketAddr, seconds: u64) -> Result<wrk::Summary> {
        let mut command = self.machine.load("wrk");
        command.args(["--latency", "-t1"]).args(["-c", &load.connections.to_string(), "-d", &format!("{seconds}s")]);
        if load.new_connections {
            command.args(["-H", "Connection: close"]);
        }
        command.arg(format!("http://{address}{}", load.path));
        let output = output_within(command, Duration::from_secs(seconds + 30))?;
        wrk::Summary::parse(&output).map_err(|missing| anyhow!(missing))
    }

    /// Every sample has a fresh process: memory that load has left behind would take in the connections for nothing.
    fn while_held(&self, cell: Cell, proxies: &[Proxy], rows: &mut [Row]) -> Result<()> {
        for round in 1..=self.effort.rounds {
            eprintln!("  round {round}: load average before it {}", load_averages()?);
            for (proxy, row) in proxies.iter().zip(rows.iter_mut()) {
                let sample = self.start(proxy).and_then(|running| self.held_sample(cell, &running));
                row.samples.push(vec![sample.with_context(|| row.name.clone())?]);
            }
        }
        Ok(())
    }

    /// KiB that each held connection adds to the process.
    fn held_sample(&self, cell: Cell, proxy: &Running) -> Result<f64> {
        let address = proxy.server.address();
        for _ in 0..100 {
            // What is made for the first requests and kept is not counted.
            open_and_get(address, "/small")?;
        }
        let before = settled_bytes(proxy)?;
        let held: Vec<TcpStream> = match cell {
            Cell::Stalled => (0..self.effort.stalled()).map(|_| Ok(open_and_ask(address, "/4m")?.0)).collect(),
            _ => (0..self.effort.connections).map(|_| open_and_get(address, "/small")).collect::<Result<_>>(),
        }?;
        let bytes = settled_bytes(proxy)? as f64 - before as f64;
        Ok(bytes / held.len() as f64 / 1024.0)
    }

    fn start(&self, proxy: &Proxy) -> Result<Running> {
        proxy.start(&self.machine, self.origin.server.address())
    }
}

/// Resident memory once it stands still, or after ten seconds, if it never does.
fn settled_bytes(proxy: &Running) -> Result<u64> {
    let deadline = Instant::now() + Duration::from_secs(10);
    let mut last = proxy.server.resident_bytes()?;
    loop {
        sleep(Duration::from_millis(500));
        let now = proxy.server.resident_bytes()?;
        if now == last || Instant::now() > deadline {
            return Ok(now);
        }
        last = now;
    }
}
