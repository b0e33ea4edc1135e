//! `make bench`: Forebay, nginx and HAProxy, one worker each, side by side in one run.
//!
//! Figures of another day or another machine compare to nothing: a ratio to nginx can differ by a third between a
//! quiet machine and a busy one. So all proxies run at once and are measured in turn, in rounds, and ratios are taken
//! within a round. `../README.md` says how each is set up and how to read the table.
//!
//! From the top: `measure` does the work of one cell, `proxies` knows how each proxy is configured, `process` runs one
//! and reads its figures, `machine` knows the CPUs and the noise. `wrk`, `procfs` and `figures` are pure and tested.

mod figures;
mod machine;
mod measure;
mod process;
mod procfs;
mod proxies;
mod wrk;

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap::{Parser, ValueEnum};
use serde_json::{Value, json};

use figures::Comparison;
use machine::Machine;
use measure::{Bench, Cell, Effort};
use proxies::{Choice, Proxy, Running, Variant};

/// Compares Forebay, nginx and HAProxy, one worker each, and prints CPU, throughput, latency and memory.
#[derive(Parser)]
#[command(name = "compare", bin_name = "cargo bench --bench compare --")]
struct Options {
    /// What to measure; everything, if nothing is named.
    cells: Vec<Cell>,
    /// A smoke test: 1 second, 2 rounds.
    #[arg(long, conflicts_with_all = ["seconds", "rounds"])]
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
    /// What to compare. Ratios are to nginx, or to the first if nginx is not among them.
    #[arg(long, value_delimiter = ',', default_value = "forebay,nginx,haproxy")]
    proxies: Vec<Choice>,
    /// The Forebay to measure; else what `cargo build --release` has built.
    #[arg(long, env = "FOREBAY_BIN", default_value_os_t = release_build())]
    forebay: PathBuf,
    /// Further builds of Forebay to compare, such as ones with another allocator: `name=path` or a path.
    #[arg(long, env = "FOREBAY_VARIANTS", value_delimiter = ',')]
    variants: Vec<Variant>,
    /// Writes all figures, each sample among them, to this file too.
    #[arg(long)]
    json: Option<PathBuf>,
    /// Cargo says so when it runs benchmarks.
    #[arg(long, hide = true)]
    bench: bool,
}

impl Options {
    fn effort(&self) -> Effort {
        let (seconds, rounds) = if self.quick { (1, 2) } else { (self.seconds, self.rounds) };
        Effort { seconds, rounds: rounds.into(), connections: self.connections.into() }
    }

    fn cells(&self) -> Vec<Cell> {
        let wanted = |cell: &Cell| match cell {
            Cell::Routes if self.cells.is_empty() => self.proxies.contains(&Choice::Forebay),
            cell => self.cells.is_empty() || self.cells.contains(cell),
        };
        Cell::value_variants().iter().copied().filter(wanted).collect()
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

fn main() -> Result<()> {
    // `cargo test --benches` runs this file too, and wants no benchmark.
    if !std::env::args().any(|argument| argument == "--bench") {
        return Ok(());
    }
    let options = Options::parse();
    let (effort, proxies) = (options.effort(), options.proxies());
    let base = options.proxies.iter().position(|choice| *choice == Choice::Nginx).unwrap_or(0);
    let routes = [10, 10_000].map(|routes| Proxy::forebay_with_routes(&options.forebay, routes));

    let machine = Machine::survey()?;
    let facts = machine.facts(&proxies)?;
    print_facts(&facts, &effort);
    let origin = Running::origin(&machine)?;
    let bench = Bench { machine, origin, effort };
    let mut comparisons: Vec<Comparison> = Vec::new();
    for cell in options.cells() {
        eprintln!("{}:", cell.name());
        let (proxies, base) = if cell == Cell::Routes { (routes.as_slice(), 0) } else { (proxies.as_slice(), base) };
        let comparison = bench.compare(cell, proxies, base)?;
        println!("\n{}", comparison.table());
        comparisons.push(comparison);
    }
    println!("\nIn short:\n{}", figures::summary(&comparisons));
    if let Some(path) = &options.json {
        let cells: Vec<Value> = comparisons.iter().map(Comparison::json).collect();
        let Effort { seconds, rounds, connections } = bench.effort;
        let effort = json!({"seconds": seconds, "rounds": rounds, "connections": connections});
        let report = json!({"machine": facts, "effort": effort, "cells": cells});
        fs::write(path, format!("{report:#}\n")).with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(())
}

/// `release/forebay` in the target directory. The benchmark itself may be of another profile, and had better be: cargo
/// builds a Forebay along with it, with the features that tests switch on in shared dependencies, and in the release
/// profile that one would take the place of the one that users get.
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
}
