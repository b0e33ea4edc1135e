//! `make bench`: compares Forebay, nginx and HAProxy, with one worker each, in one run.
//!
//! Figures of another day or another machine are not comparable: a ratio to nginx can differ by a third between a quiet
//! machine and a busy one. Therefore all proxies run at the same time and are measured in turn, in rounds, and ratios
//! are computed within a round. `../README.md` describes the setup of each proxy and the table.
//!
//! From the top: `measure` does the work of one cell, `proxies` configures each proxy, `process` runs one and reads its
//! figures, `machine` has the CPUs and the noise. For cells with slow clients, `beside` runs the sample, `slow` and
//! `fast` are its clients and `bulk` is its origin. For failing endpoints, `failover` runs the cases, `several` has the
//! configurations and `moody` is the endpoint. For TLS, `secure` connects and `shaking` repeats handshakes. `reload`
//! reloads the configurations, and `passwords` sends wrong passwords to Forebay. For attacks, `attacks` runs the sample
//! and `hostile` is the attackers. `wrk`, `h2load`, `counts`, `procfs`, `latency` and `figures` are pure. These, `bulk`
//! and `moody` have tests.

mod attacks;
mod beside;
mod bulk;
mod counts;
mod failover;
mod fast;
mod figures;
mod h2load;
mod hostile;
mod latency;
mod machine;
mod measure;
mod moody;
mod passwords;
mod process;
mod procfs;
mod proxies;
mod reload;
#[path = "../rules.rs"]
mod rules;
mod secure;
mod several;
mod shaking;
mod slow;
mod wrk;

use std::fs;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result};
use clap::{Parser, ValueEnum};
use serde_json::{Value, json};

use attacks::Attack;
use figures::Comparison;
use machine::Machine;
use measure::{Bench, Cell, Chosen, Effort};
use proxies::{BULK_ORIGIN, CROWD_ORIGIN, Choice, Keys, MOODY_ORIGIN, Proxy, Rules, Running, Variant};
use secure::Identity;

/// Compares Forebay, nginx and HAProxy, one worker each, and prints CPU, throughput, latency and memory.
#[derive(Parser)]
#[command(name = "compare", bin_name = "cargo bench --bench compare --")]
struct Options {
    /// What to measure; everything but `attacks`, if nothing is named. `tls` is all cells of TLS.
    cells: Vec<Chosen>,
    /// A smoke test: 1 second, 2 rounds, 1 round with slow clients.
    #[arg(long, conflicts_with_all = ["seconds", "rounds", "slow_rounds", "attack_rounds"])]
    quick: bool,
    /// Seconds of load per sample.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u64).range(1..=600))]
    seconds: u64,
    /// Samples per figure; the median is shown.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u16).range(1..=1000))]
    rounds: u16,
    /// Connections held open in the cell `idle`; `stalled` holds a tenth.
    #[arg(long, default_value_t = 2_000, value_parser = clap::value_parser!(u16).range(1..=7_000))]
    connections: u16,
    /// Slow clients in the cells `uploaders` and `readers`.
    #[arg(long, default_value_t = 1_000, value_parser = clap::value_parser!(u16).range(1..=3_000))]
    slow: u16,
    /// Samples per figure in these cells: one takes 15 and 32 seconds for each proxy.
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u16).range(1..=100))]
    slow_rounds: u16,
    /// Samples per attack: one takes some 25 seconds for each proxy.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=100))]
    attack_rounds: u16,
    /// The attacks of the cell `attacks`; all, if none is named.
    #[arg(long, value_delimiter = ',')]
    attack: Vec<Attack>,
    /// Connections of TLS that say nothing, in the attack `idle`.
    #[arg(long, default_value_t = 10_000, value_parser = clap::value_parser!(u16).range(1..=12_000))]
    idle: u16,
    /// What to compare. Ratios are to nginx, or to the first if nginx is not among them.
    #[arg(long, value_delimiter = ',', default_value = "forebay,nginx,haproxy")]
    proxies: Vec<Choice>,
    /// The Forebay to measure; else what `cargo build --release` has built.
    #[arg(long, env = "FOREBAY_BIN", default_value_os_t = release_build())]
    forebay: PathBuf,
    /// Further builds of Forebay to compare, such as ones with another allocator: `name=path` or a path.
    #[arg(long, env = "FOREBAY_VARIANTS", value_delimiter = ',')]
    variants: Vec<Variant>,
    /// Leaves out the keys of buffering, for builds of Forebay that do not know them.
    #[arg(long)]
    no_buffering_keys: bool,
    /// Writes all figures, each sample among them, to this file too.
    #[arg(long)]
    json: Option<PathBuf>,
    /// Cargo says so when it runs benchmarks.
    #[arg(long, hide = true)]
    bench: bool,
}

impl Options {
    fn effort(&self) -> Effort {
        let (seconds, rounds, slow_rounds) =
            if self.quick { (1, 2, 1) } else { (self.seconds, self.rounds, self.slow_rounds) };
        Effort {
            seconds,
            rounds: rounds.into(),
            connections: self.connections.into(),
            slow: self.slow.into(),
            slow_rounds: slow_rounds.into(),
            attack_rounds: self.attack_rounds.into(),
            idle: self.idle.into(),
            attacks: if self.attack.is_empty() { Attack::value_variants().to_vec() } else { self.attack.clone() },
        }
    }

    fn cells(&self) -> Vec<Cell> {
        let wanted = |cell: &Cell| match cell {
            Cell::Routes | Cell::Buffering | Cell::Rules | Cell::Passwords if self.cells.is_empty() => {
                self.proxies.contains(&Choice::Forebay)
            }
            Cell::Attacks if self.cells.is_empty() => false,
            cell => self.cells.is_empty() || self.cells.iter().any(|Chosen(cells)| cells.contains(cell)),
        };
        Cell::value_variants().iter().copied().filter(wanted).collect()
    }

    /// The proxies of a cell.
    fn proxies_of(&self, cell: Cell) -> Result<Vec<Proxy>> {
        let Some(kind) = cell.tls() else { return Ok(self.in_clear_text(cell)) };
        let identity = Arc::new(Identity::make(kind)?);
        let keys = match cell {
            Cell::Attacks => Keys { server: Some(MANY_CLIENTS), listener: Some(LONG_IDLE), ..Keys::default() },
            _ => Keys { listener: Some(MANY_REQUESTS), ..Keys::default() },
        };
        let proxies = self.proxies().into_iter().map(|proxy| {
            let proxy = if cell == Cell::Attacks { proxy.with_long_idle() } else { proxy };
            proxy.with_keys(keys).with_tls(&identity)
        });
        // With this number of connections, HAProxy would need more open files than a usual limit allows.
        Ok(proxies.filter(|proxy| cell != Cell::Attacks || proxy.name != "haproxy").collect())
    }

    fn in_clear_text(&self, cell: Cell) -> Vec<Proxy> {
        let with_route = |route| move |proxy: Proxy| proxy.with_keys(self.buffering_keys(Some(route)));
        let proxies = self.proxies().into_iter();
        match cell {
            Cell::Routes => {
                [10, 10_000].map(|routes| Proxy::forebay_with_routes(&self.forebay, routes)).into_iter().collect()
            }
            Cell::Buffering => vec![
                Proxy::forebay(&self.forebay)
                    .named("buffering off")
                    .with_keys(self.buffering_keys(Some(BUFFERING_OFF))),
                Proxy::forebay(&self.forebay).named("buffering on").with_keys(self.buffering_keys(None)),
            ],
            Cell::Rules => {
                let with = |name: &str, rules| {
                    Proxy::forebay(&self.forebay).named(name).with_keys(Keys { rules, ..Keys::default() })
                };
                vec![
                    with("no rules", None),
                    with("on filters", Some(Rules::OnFilters)),
                    with("on routes", Some(Rules::OnRoutes)),
                ]
            }
            Cell::Passwords => {
                let builds =
                    [Proxy::forebay(&self.forebay)].into_iter().chain(self.variants.iter().map(Proxy::variant));
                builds.map(|proxy| proxy.with_keys(Keys { guarded: true, ..Keys::default() })).collect()
            }
            Cell::Uploaders | Cell::Readers => {
                proxies.map(|proxy| proxy.with_keys(self.buffering_keys(None))).collect()
            }
            Cell::Upload if self.proxies.contains(&Choice::Nginx) => {
                proxies.map(with_route(IN_MEMORY)).chain([Proxy::nginx_with_memory()]).collect()
            }
            Cell::Upload => proxies.map(with_route(IN_MEMORY)).collect(),
            Cell::Spill => proxies.map(with_route(ON_DISK)).collect(),
            Cell::Failover => proxies.flat_map(by_policy).collect(),
            _ => proxies.collect(),
        }
    }

    /// The index of the proxy that the others are compared with.
    fn base_of(&self, proxies: &[Proxy]) -> usize {
        proxies.iter().position(|proxy| proxy.name == "nginx").unwrap_or(0)
    }

    fn buffering_keys(&self, route: Option<&'static str>) -> Keys {
        if self.no_buffering_keys {
            Keys::default()
        } else {
            Keys { server: Some(SPOOL_DIR), route, ..Keys::default() }
        }
    }

    fn proxies(&self) -> Vec<Proxy> {
        let chosen = self.proxies.iter().map(|choice| match choice {
            Choice::Forebay => Proxy::forebay(&self.forebay),
            Choice::Nginx => Proxy::nginx(),
            Choice::Haproxy => Proxy::haproxy(),
        });
        chosen.chain(self.variants.iter().map(Proxy::variant)).collect()
    }
}

/// The directory in which Forebay spools, next to nginx's temporary files.
const SPOOL_DIR: &str = "spool_dir: \"{dir}\"";
const IN_MEMORY: &str = "buffering: { request: { mode: full, memory: 2MiB } }";
const ON_DISK: &str = "buffering: { request: { mode: full, memory: 64KiB } }";
/// As `keepalive_requests` of nginx: an HTTP/2 client must not reconnect during a measurement.
const MANY_REQUESTS: &str = "limits: { requests_per_connection: unlimited }";
/// Silent clients may take minutes to connect on a machine with other work. nginx: `keepalive_timeout`.
const LONG_IDLE: &str = "timeouts: { idle: 10m }";
/// With 20,000 open files, this allows more than 10,000 client connections.
const MANY_CLIENTS: &str = "open_files: { clients: 80%, spools: 5% }";
const BUFFERING_OFF: &str = "buffering: { request: { mode: stream }, response: { mode: stream } }";

/// A Forebay for each policy that considers its endpoints' state; any other proxy unchanged.
fn by_policy(proxy: Proxy) -> Vec<Proxy> {
    if !proxy.is_forebay() {
        return vec![proxy];
    }
    let with = |policy: &str, upstream| {
        let named = proxy.clone().named(&format!("{} {policy}", proxy.name));
        named.with_keys(Keys { upstream: Some(upstream), ..Keys::default() })
    };
    vec![
        with("least_request", "load_balancing: { policy: least_request }"),
        with("peak_ewma", "load_balancing: { policy: peak_ewma }"),
    ]
}

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if let [mode, address] = arguments.as_slice()
        && (mode == BULK_ORIGIN || mode == CROWD_ORIGIN)
    {
        if mode == CROWD_ORIGIN {
            machine::give_way()?;
        }
        process::end_with_parent()?;
        return Ok(bulk::serve(TcpListener::bind(address.as_str())?)?);
    }
    if let [mode, address] = arguments.as_slice()
        && mode == MOODY_ORIGIN
    {
        process::die_with_parent()?;
        return Ok(moody::serve(TcpListener::bind(address.as_str())?)?);
    }
    // `cargo test --benches` runs this file, too, but must not run a benchmark.
    if !arguments.iter().any(|argument| argument == "--bench") {
        return Ok(());
    }
    let options = Options::parse();
    let effort = options.effort();
    let machine = Machine::survey()?;
    let facts = machine.facts(&options.proxies())?;
    print_facts(&facts, &effort);
    let origin = Running::origin(&machine)?;
    let bench = Bench { machine, origin, effort };
    let mut comparisons: Vec<Comparison> = Vec::new();
    for cell in options.cells() {
        eprintln!("{}:", cell.name());
        let proxies = options.proxies_of(cell)?;
        for comparison in bench.compare(cell, &proxies, options.base_of(&proxies))? {
            println!("\n{}", comparison.table());
            comparisons.push(comparison);
        }
    }
    println!("\nIn short:\n{}", figures::summary(&comparisons));
    if comparisons.iter().any(|comparison| !comparison.goals.is_empty()) {
        println!("\nWhat must be reached:\n{}", figures::verdicts(&comparisons));
    }
    if let Some(path) = &options.json {
        let cells: Vec<Value> = comparisons.iter().map(Comparison::json).collect();
        let Effort { seconds, rounds, connections, slow, slow_rounds, attack_rounds, idle, .. } = bench.effort;
        let effort = json!({
            "seconds": seconds,
            "rounds": rounds,
            "connections": connections,
            "slow": slow,
            "slow_rounds": slow_rounds,
            "attack_rounds": attack_rounds,
            "idle": idle,
        });
        let report = json!({"machine": facts, "effort": effort, "cells": cells});
        fs::write(path, format!("{report:#}\n")).with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(())
}

/// `release/forebay` in the target directory. The benchmark itself should be built with another profile: cargo builds a
/// Forebay along with it, with the features that tests enable in shared dependencies. With the release profile, that
/// build would replace the one for users.
fn release_build() -> PathBuf {
    let built_along = Path::new(env!("CARGO_BIN_EXE_forebay"));
    let target = built_along.ancestors().nth(2).unwrap_or(built_along);
    target.join("release/forebay")
}

fn print_facts(facts: &Value, effort: &Effort) {
    let text = |key: &str| facts[key].as_str().unwrap_or_default();
    println!("{} cores of {}, Linux {}", facts["cores"], text("cpu"), text("kernel"));
    let cpus = ["proxy_cpu", "load_cpu", "origin_cpu"].map(|key| &facts[key]);
    println!("proxies on CPU {}, wrk on CPU {}, origin on CPU {}", cpus[0], cpus[1], cpus[2]);
    for version in facts["versions"].as_array().into_iter().flatten().filter_map(Value::as_str) {
        println!("  {version}");
    }
    println!("{} rounds of {} s per proxy and cell", effort.rounds, effort.seconds);
    println!("{} rounds with {} slow clients", effort.slow_rounds, effort.slow);
}
