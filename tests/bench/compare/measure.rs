//! The cells of the comparison: the work of each, and the figures measured during it.

use std::io::Write;
use std::net::SocketAddr;
use std::str::FromStr;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use clap::ValueEnum;

use crate::attacks::{ATTACK_COLUMNS, ATTACK_GOALS, Attack, Scene};
use crate::beside::{READER_COLUMNS, READER_GOALS, Stage, UPLOADER_COLUMNS, UPLOADER_GOALS};
use crate::failover::{self, FAILOVER_COLUMNS, FAILOVER_GOALS};
use crate::figures::{Column, Comparison, Goal, Row};
use crate::machine::{Machine, Noise, load_averages};
use crate::passwords::{self, PASSWORD_COLUMNS, PASSWORD_GOALS};
use crate::process::{open_and_ask, open_and_get, output_within};
use crate::proxies::{BULK_ORIGIN, CROWD_ORIGIN, Origins, Proxy, Running};
use crate::reload::{self, RELOAD_COLUMNS, RELOAD_GOALS};
use crate::secure::{KeyKind, Link};
use crate::shaking;
use crate::wrk::Summary;

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
    /// Uploads of 1 MiB on 16 connections, buffered in memory by Forebay.
    Upload,
    /// Uploads of 1 MiB on 16 connections, buffered on disk.
    Spill,
    /// A small GET through Forebay with its buffering on and off.
    Buffering,
    /// A small GET through Forebay without rules and with ten.
    Rules,
    /// A fast client beside 200 wrong passwords a second.
    Passwords,
    /// A fast client beside slow ones that have sent 16 KiB of 1 MiB and pause.
    Uploaders,
    /// A fast client beside slow ones that read 4 MiB at 20 KiB/s.
    Readers,
    /// One of three endpoints is killed, silent, slow or failing.
    Failover,
    /// A small GET by the clock, with a reload each second.
    Reload,
    /// A handshake with an ECDSA key and a small GET, 8 at a time.
    TlsEcdsa,
    /// The same with a key of RSA-2048.
    TlsRsa,
    /// The same with ECDSA, where each connection resumes the session of the one before.
    TlsResumed,
    /// A small GET on 64 keep-alive connections over TLS.
    TlsSmall,
    /// Answers of 1 MiB on 16 connections over TLS.
    #[value(name = "tls-1m")]
    TlsLarge,
    /// A small GET over TLS and HTTP/2, on 16 connections with 8 requests each.
    TlsH2,
    /// Memory for an idle connection of TLS, after one request.
    TlsIdle,
    /// A fast client beside attacks, one after the other.
    Attacks,
}

/// The cells with the common name `tls`.
const TLS_CELLS: [Cell; 7] =
    [Cell::TlsEcdsa, Cell::TlsRsa, Cell::TlsResumed, Cell::TlsSmall, Cell::TlsLarge, Cell::TlsH2, Cell::TlsIdle];

/// The cells of one word on the command line: a single cell, or `tls` for several.
#[derive(Clone, Debug)]
pub struct Chosen(pub Vec<Cell>);

impl FromStr for Chosen {
    type Err = String;

    fn from_str(word: &str) -> Result<Chosen, String> {
        if word == "tls" {
            return Ok(Chosen(TLS_CELLS.to_vec()));
        }
        <Cell as ValueEnum>::from_str(word, false).map(|cell| Chosen(vec![cell])).map_err(|_| {
            let cells: Vec<String> = Cell::value_variants().iter().map(|cell| cell.name()).collect();
            format!("there is no such cell: tls, {}", cells.join(", "))
        })
    }
}

/// The work of a cell.
enum Work {
    Load(Load),
    Hold,
    Crowd,
    Trouble,
    Reload,
    Guess,
    Attack,
}

/// The client that sends the requests.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Client {
    Wrk,
    /// HTTP/2, with this number of concurrent requests on each connection.
    H2load(usize),
    /// A handshake for each request.
    Shaking {
        resume: bool,
    },
}

/// Requests as fast as the proxy responds.
struct Load {
    client: Client,
    path: &'static str,
    connections: usize,
    /// Whether each request uses a new connection.
    new_connections: bool,
    /// Body size of each request, in bytes; more than 0 makes it a POST.
    body_bytes: usize,
    /// Factor of the number of rounds; more than 1 where a difference of a few percent matters.
    times_the_rounds: usize,
    /// Maximum duration of a sample in seconds, where many short rounds are more precise than a few long ones.
    seconds_max: u64,
}

/// The setting of the measurements, and their effort.
pub struct Bench {
    /// The CPUs.
    pub machine: Machine,
    /// The proxies' origin.
    pub origin: Running,
    /// The effort for each figure.
    pub effort: Effort,
}

/// The effort for each figure.
pub struct Effort {
    /// Seconds of load per sample.
    pub seconds: u64,
    /// Samples per figure.
    pub rounds: usize,
    /// Connections held open in the cell `idle`; the cell `stalled` has a tenth of them.
    pub connections: usize,
    /// Slow clients in the cells `uploaders` and `readers`.
    pub slow: usize,
    /// Samples per attack; each takes about 25 seconds.
    pub attack_rounds: usize,
    /// Silent TLS connections in the attack `idle`.
    pub idle: usize,
    /// The attacks.
    pub attacks: Vec<Attack>,
    /// Samples per figure in the cells with slow clients; each takes half a minute.
    pub slow_rounds: usize,
}

/// The figures under load. CPU time is first, since other programs affect it least.
const LOAD_COLUMNS: &[Column] = &[
    Column { key: "cpu_seconds_per_100k", heading: "CPU s/100k", decimals: 2, compared: true },
    Column { key: "requests_per_second", heading: "req/s", decimals: 0, compared: true },
    Column { key: "p50_ms", heading: "p50 ms", decimals: 2, compared: true },
    Column { key: "p99_ms", heading: "p99 ms", decimals: 2, compared: true },
    Column { key: "busy_percent", heading: "busy %", decimals: 0, compared: false },
    Column { key: "failed", heading: "failed", decimals: 0, compared: false },
];

/// The figures of open connections.
const MEMORY_COLUMNS: &[Column] =
    &[Column { key: "kib_per_connection", heading: "KiB/connection", decimals: 2, compared: true }];

/// The goals of cells under load.
const UPLOAD_GOALS: &[Goal] = &[cpu_goal("CPU per upload, x nginx's default", "nginx", 0.65, Some(0.5))];
const SPILL_GOALS: &[Goal] = &[cpu_goal("CPU per upload spilled to disk, x nginx's default", "nginx", 1.0, Some(0.8))];
const BUFFERING_GOALS: &[Goal] = &[cpu_goal("CPU per small GET, x buffering off", "buffering off", 1.05, None)];
const RULES_GOALS: &[Goal] = &[cpu_goal("CPU per small GET, x no rules", "no rules", 1.03, None)];
const ECDSA_GOALS: &[Goal] = &[cpu_goal("CPU per handshake and small GET, x nginx", "nginx", 0.75, None)];
const RSA_GOALS: &[Goal] = &[cpu_goal("CPU per handshake and small GET, x nginx", "nginx", 1.35, None)];
const TLS_SMALL_GOALS: &[Goal] = &[cpu_goal("CPU per small GET over TLS, x nginx", "nginx", 1.3, None)];
const TLS_LARGE_GOALS: &[Goal] = &[cpu_goal("CPU per 1 MiB over TLS, x nginx", "nginx", 1.0, None)];
const TLS_IDLE_GOALS: &[Goal] = &[Goal {
    what: "KiB of memory for an idle connection of TLS",
    column: MEMORY_COLUMNS[0].key,
    over: None,
    must: 8.0,
    aim: None,
}];

const fn cpu_goal(what: &'static str, over: &'static str, must: f64, aim: Option<f64>) -> Goal {
    Goal { what, column: LOAD_COLUMNS[0].key, over: Some(over), must, aim }
}

impl Cell {
    fn work(self) -> Work {
        let (path, connections) = match self {
            Cell::Small | Cell::Connect | Cell::Routes | Cell::Buffering | Cell::Rules => ("/small", 64),
            Cell::Many => ("/small", 512),
            Cell::Medium => ("/64k", 64),
            Cell::Large => ("/1m", 16),
            Cell::Upload | Cell::Spill => ("/upload", 16),
            Cell::Idle | Cell::Stalled => return Work::Hold,
            Cell::Uploaders | Cell::Readers => return Work::Crowd,
            Cell::Failover => return Work::Trouble,
            Cell::Reload => return Work::Reload,
            Cell::Passwords => return Work::Guess,
            Cell::Attacks => return Work::Attack,
            Cell::TlsIdle => return Work::Hold,
            Cell::TlsEcdsa | Cell::TlsRsa | Cell::TlsResumed => ("/small", 8),
            Cell::TlsSmall => ("/small", 64),
            Cell::TlsLarge => ("/1m", 16),
            Cell::TlsH2 => ("/small", 16),
        };
        let client = match self {
            Cell::TlsH2 => Client::H2load(8),
            Cell::TlsEcdsa | Cell::TlsRsa => Client::Shaking { resume: false },
            Cell::TlsResumed => Client::Shaking { resume: true },
            _ => Client::Wrk,
        };
        let body_bytes = if matches!(self, Cell::Upload | Cell::Spill) { 1 << 20 } else { 0 };
        Work::Load(Load {
            client,
            path,
            connections,
            new_connections: self == Cell::Connect,
            body_bytes,
            times_the_rounds: match self {
                Cell::Buffering => 2,
                Cell::Rules => 6,
                _ => 1,
            },
            seconds_max: if self == Cell::Rules { 2 } else { u64::MAX },
        })
    }

    /// The key type of the proxies' certificates, if clients use TLS.
    pub fn tls(self) -> Option<KeyKind> {
        match self {
            Cell::TlsRsa => Some(KeyKind::Rsa),
            Cell::Attacks => Some(KeyKind::Ecdsa),
            cell => TLS_CELLS.contains(&cell).then_some(KeyKind::Ecdsa),
        }
    }

    fn columns(self) -> &'static [Column] {
        match (self, self.work()) {
            (Cell::Uploaders, _) => UPLOADER_COLUMNS,
            (Cell::Readers, _) => READER_COLUMNS,
            (Cell::Failover, _) => FAILOVER_COLUMNS,
            (Cell::Reload, _) => RELOAD_COLUMNS,
            (Cell::Passwords, _) => PASSWORD_COLUMNS,
            (Cell::Attacks, _) => ATTACK_COLUMNS,
            (_, Work::Load(_)) => LOAD_COLUMNS,
            _ => MEMORY_COLUMNS,
        }
    }

    fn goals(self) -> &'static [Goal] {
        match self {
            Cell::Upload => UPLOAD_GOALS,
            Cell::Spill => SPILL_GOALS,
            Cell::Buffering => BUFFERING_GOALS,
            Cell::Rules => RULES_GOALS,
            Cell::Passwords => PASSWORD_GOALS,
            Cell::Uploaders => UPLOADER_GOALS,
            Cell::Readers => READER_GOALS,
            Cell::Failover => FAILOVER_GOALS,
            Cell::Reload => RELOAD_GOALS,
            Cell::TlsEcdsa => ECDSA_GOALS,
            Cell::TlsRsa => RSA_GOALS,
            Cell::TlsSmall | Cell::TlsH2 => TLS_SMALL_GOALS,
            Cell::TlsLarge => TLS_LARGE_GOALS,
            Cell::TlsIdle => TLS_IDLE_GOALS,
            Cell::Attacks => ATTACK_GOALS,
            _ => &[],
        }
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
            Cell::Upload => "uploads of 1 MiB in memory, 16 connections".to_owned(),
            Cell::Spill => "uploads of 1 MiB on disk, 16 connections".to_owned(),
            Cell::Buffering => "small GET, buffering on and off".to_owned(),
            Cell::Rules => "small GET, without rules and with ten".to_owned(),
            Cell::Passwords => "1,000 small GETs a second beside 200 wrong passwords a second".to_owned(),
            Cell::Uploaders => format!("{} uploaders that pause after 16 KiB of 1 MiB", effort.slow),
            Cell::Readers => format!("{} readers of 4 MiB at 20 KiB/s", effort.slow),
            Cell::Failover => "2,000 small GETs a second, one of three endpoints in trouble".to_owned(),
            Cell::Reload => "1,000 small GETs a second, a reload each second".to_owned(),
            Cell::TlsEcdsa => "TLS 1.3 handshake with ECDSA and a small GET".to_owned(),
            Cell::TlsRsa => "TLS 1.3 handshake with RSA-2048 and a small GET".to_owned(),
            Cell::TlsResumed => "TLS 1.3 handshake that resumes a session and a small GET".to_owned(),
            Cell::TlsSmall => "small GET over TLS, 64 connections".to_owned(),
            Cell::TlsLarge => "1 MiB answers over TLS, 16 connections".to_owned(),
            Cell::TlsH2 => "small GET over TLS and HTTP/2, 16 connections with 8 requests each".to_owned(),
            Cell::TlsIdle => format!("{} idle connections of TLS", effort.connections),
            Cell::Attacks => "attacks".to_owned(),
        }
    }

    /// The name on the command line.
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
    /// Compares `proxies`, measured in turn in each round, with the one at `base`.
    pub fn compare(&self, cell: Cell, proxies: &[Proxy], base: usize) -> Result<Vec<Comparison>> {
        if let Work::Attack = cell.work() {
            return self.attacked(proxies, base);
        }
        let title = cell.title(&self.effort);
        let row = |proxy: &Proxy| Row { name: proxy.name.clone(), samples: Vec::new(), judged: proxy.is_forebay() };
        let mut rows: Vec<Row> = proxies.iter().map(row).collect();
        // The base determines the goal and has none itself.
        rows[base].judged &= !matches!(cell, Cell::Buffering | Cell::Rules);
        match cell.work() {
            Work::Load(load) => self.under_load(&load, proxies, &mut rows),
            Work::Hold => self.while_held(cell, proxies, &mut rows),
            Work::Crowd => self.beside_a_crowd(cell, proxies, &mut rows),
            Work::Trouble => self.in_trouble(proxies, &mut rows),
            Work::Reload => self.in_rounds(proxies, &mut rows, reload::sample),
            Work::Guess => self.in_rounds(proxies, &mut rows, passwords::sample),
            Work::Attack => Ok(()),
        }
        .with_context(|| title.clone())?;
        Ok(vec![Comparison { cell: cell.name(), title, columns: cell.columns(), base, rows, goals: cell.goals() }])
    }

    /// Returns a comparison for each attack.
    fn attacked(&self, proxies: &[Proxy], base: usize) -> Result<Vec<Comparison>> {
        let mut comparisons = Vec::new();
        for attack in &self.effort.attacks {
            let row = |proxy: &Proxy| Row { name: proxy.name.clone(), samples: Vec::new(), judged: proxy.is_forebay() };
            let mut rows: Vec<Row> = proxies.iter().map(row).collect();
            let title = attack.title(self.effort.idle);
            eprintln!("  {title}:");
            for _ in 0..self.effort.attack_rounds {
                let noise = Noise::listen(self.origin.server.cpu_seconds()?)?;
                for (proxy, row) in proxies.iter().zip(rows.iter_mut()) {
                    let origins = Origins { rest: self.origin.server.address(), bulk: None };
                    let running = proxy.start(&self.machine, origins)?;
                    let scene = Scene { machine: &self.machine, proxy: &running, idle: self.effort.idle };
                    let sample = scene.attacked_by(*attack, proxy.is_forebay());
                    row.samples.push(sample.with_context(|| format!("{title}: {}", row.name))?);
                }
                let others = noise.cores(self.origin.server.cpu_seconds()?)?;
                eprintln!("    others kept {others:.2} cores busy");
            }
            let cell = format!("attacks {}", attack.name());
            let (columns, goals) = (Cell::Attacks.columns(), Cell::Attacks.goals());
            comparisons.push(Comparison { cell, title, columns, base, rows, goals });
        }
        Ok(comparisons)
    }

    /// All proxies run from the first round to the last, and idle while another one is measured.
    fn under_load(&self, load: &Load, proxies: &[Proxy], rows: &mut [Row]) -> Result<()> {
        // nginx responds to a POST before it has read the body.
        let uploads =
            if load.body_bytes > 0 { Some(Running::counting_origin(&self.machine, BULK_ORIGIN)?) } else { None };
        let origin = uploads.as_ref().unwrap_or(&self.origin);
        let origins = Origins { rest: origin.server.address(), bulk: None };
        let start = |proxy: &Proxy| proxy.start(&self.machine, origins);
        let running = proxies.iter().map(start).collect::<Result<Vec<_>>>()?;
        let servers_seconds =
            || running.iter().chain([origin]).map(|running| running.server.cpu_seconds()).sum::<Result<f64>>();
        for proxy in &running {
            // Fills buffers, pools and caches before the measurement.
            self.work(load, proxy, 1)?;
        }
        for round in 1..=self.effort.rounds * load.times_the_rounds {
            let before = load_averages()?;
            let noise = Noise::listen(servers_seconds()?)?;
            let mut turns: Vec<(&Running, &mut Row)> = running.iter().zip(rows.iter_mut()).collect();
            if round % 2 == 0 {
                // The first proxy of a round finds the machine as other work left it, so the order alternates.
                turns.reverse();
            }
            for (proxy, row) in turns {
                row.samples.push(self.load_sample(load, proxy).with_context(|| row.name.clone())?);
            }
            let others = noise.cores(servers_seconds()?)?;
            eprintln!("  round {round}: load average before it {before}; others kept {others:.2} cores busy");
        }
        Ok(())
    }

    /// Returns one figure per column of `LOAD_COLUMNS`.
    fn load_sample(&self, load: &Load, proxy: &Running) -> Result<Vec<f64>> {
        proxy.empty_logs()?;
        let before = proxy.server.cpu_seconds()?;
        let run = self.work(load, proxy, self.effort.seconds.min(load.seconds_max))?;
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

    fn work(&self, load: &Load, proxy: &Running, seconds: u64) -> Result<Summary> {
        let address = proxy.server.address();
        match load.client {
            Client::Wrk => self.wrk(load, address, proxy.server.manner().tls, seconds),
            Client::H2load(streams) => self.h2load(load, streams, address, seconds),
            Client::Shaking { resume } => shaking::load(self.machine.fast_client(), address, seconds, resume),
        }
    }

    fn h2load(&self, load: &Load, streams: usize, address: SocketAddr, seconds: u64) -> Result<Summary> {
        let log = tempfile::NamedTempFile::new()?;
        let mut command = self.machine.load("h2load");
        command.args(["-t1", "-c", &load.connections.to_string(), "-m", &streams.to_string()]);
        command.args(["-D", &seconds.to_string(), "--groups", "X25519:P-256"]).arg("--log-file").arg(log.path());
        command.arg(format!("https://{address}{}", load.path));
        let output = output_within(command, Duration::from_secs(seconds + 30))?;
        Summary::of_h2load(&output, &std::fs::read_to_string(log.path())?).map_err(|missing| anyhow!(missing))
    }

    fn wrk(&self, load: &Load, address: SocketAddr, tls: bool, seconds: u64) -> Result<Summary> {
        let mut command = self.machine.load("wrk");
        command.args(["--latency", "-t1"]).args(["-c", &load.connections.to_string(), "-d", &format!("{seconds}s")]);
        if load.new_connections {
            command.args(["-H", "Connection: close"]);
        }
        // The file is removed after wrk has ended.
        let mut script = tempfile::NamedTempFile::new()?;
        if load.body_bytes > 0 {
            write!(script, "wrk.method = 'POST' wrk.body = string.rep('x', {})", load.body_bytes)?;
            command.arg("-s").arg(script.path());
        }
        let scheme = if tls { "https" } else { "http" };
        command.arg(format!("{scheme}://{address}{}", load.path));
        let output = output_within(command, Duration::from_secs(seconds + 30))?;
        Summary::parse(&output).map_err(|missing| anyhow!(missing))
    }

    /// Each sample has a fresh process: memory left over from earlier load would hold the connections without growth.
    fn while_held(&self, cell: Cell, proxies: &[Proxy], rows: &mut [Row]) -> Result<()> {
        for round in 1..=self.effort.rounds {
            eprintln!("  round {round}: load average before it {}", load_averages()?);
            for (proxy, row) in proxies.iter().zip(rows.iter_mut()) {
                let origins = Origins { rest: self.origin.server.address(), bulk: None };
                let started = proxy.start(&self.machine, origins);
                let sample = started.and_then(|running| self.held_sample(cell, &running));
                row.samples.push(vec![sample.with_context(|| row.name.clone())?]);
            }
        }
        Ok(())
    }

    /// Returns the KiB that each open connection adds to the process.
    fn held_sample(&self, cell: Cell, proxy: &Running) -> Result<f64> {
        let (address, manner) = (proxy.server.address(), proxy.server.manner());
        for _ in 0..100 {
            // Memory that the first requests allocate permanently does not count.
            open_and_get(&manner, address, "/small")?;
        }
        let before = settled_bytes(proxy)?;
        let held: Vec<Link> = match cell {
            Cell::Stalled => (0..self.effort.stalled()).map(|_| Ok(open_and_ask(&manner, address, "/4m")?.0)).collect(),
            _ => (0..self.effort.connections).map(|_| open_and_get(&manner, address, "/small")).collect::<Result<_>>(),
        }?;
        let bytes = settled_bytes(proxy)? as f64 - before as f64;
        Ok(bytes / held.len() as f64 / 1024.0)
    }

    /// Each sample has a fresh process here, too, and a fresh origin for the slow clients.
    fn beside_a_crowd(&self, cell: Cell, proxies: &[Proxy], rows: &mut [Row]) -> Result<()> {
        for round in 1..=self.effort.slow_rounds {
            let before = load_averages()?;
            let noise = Noise::listen(self.origin.server.cpu_seconds()?)?;
            for (proxy, row) in proxies.iter().zip(rows.iter_mut()) {
                row.samples.push(self.crowd_sample(cell, proxy).with_context(|| row.name.clone())?);
            }
            // The proxies and their origins have ended and were waited for, so this process's time includes theirs.
            let others = noise.cores(self.origin.server.cpu_seconds()?)?;
            eprintln!("  round {round}: load average before it {before}; others kept {others:.2} cores busy");
        }
        Ok(())
    }

    /// Runs one round of half a minute for each proxy. One round suffices, since requests must not fail in any round.
    fn in_trouble(&self, proxies: &[Proxy], rows: &mut [Row]) -> Result<()> {
        for (proxy, row) in proxies.iter().zip(rows.iter_mut()) {
            let before = load_averages()?;
            let noise = Noise::listen(self.origin.server.cpu_seconds()?)?;
            row.samples.push(failover::sample(&self.machine, proxy).with_context(|| row.name.clone())?);
            let others = noise.cores(self.origin.server.cpu_seconds()?)?;
            eprintln!("  {}: load average before it {before}; others kept {others:.2} cores busy", proxy.name);
        }
        Ok(())
    }

    /// Each sample has a fresh process: older workers of nginx and HAProxy may still be finishing.
    fn in_rounds(
        &self,
        proxies: &[Proxy],
        rows: &mut [Row],
        sample: fn(&Machine, &Proxy, Origins) -> Result<Vec<f64>>,
    ) -> Result<()> {
        let origins = Origins { rest: self.origin.server.address(), bulk: None };
        for round in 1..=self.effort.slow_rounds {
            let before = load_averages()?;
            let noise = Noise::listen(self.origin.server.cpu_seconds()?)?;
            for (proxy, row) in proxies.iter().zip(rows.iter_mut()) {
                row.samples.push(sample(&self.machine, proxy, origins).with_context(|| row.name.clone())?);
            }
            let others = noise.cores(self.origin.server.cpu_seconds()?)?;
            eprintln!("  round {round}: load average before it {before}; others kept {others:.2} cores busy");
        }
        Ok(())
    }

    fn crowd_sample(&self, cell: Cell, proxy: &Proxy) -> Result<Vec<f64>> {
        let origin = Running::counting_origin(&self.machine, CROWD_ORIGIN)?;
        let origins = Origins { rest: self.origin.server.address(), bulk: Some(origin.server.address()) };
        let running = proxy.start(&self.machine, origins)?;
        let stage = Stage { machine: &self.machine, proxy: &running, origin: &origin, slow: self.effort.slow };
        eprintln!("    {}", proxy.name);
        if cell == Cell::Readers { stage.beside_readers() } else { stage.beside_uploaders() }
    }
}

/// Resident memory once it is stable, or after ten seconds at most.
pub fn settled_bytes(proxy: &Running) -> Result<u64> {
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
