//! A hostile mix: two hundred clients with bad habits, drawn at random, all at once. Afterwards everything is where it
//! was.

mod habits;

use std::collections::BTreeMap;
use std::thread;
use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::mutate;
use crate::harness::gateway::{Process, Watched};
use crate::harness::metrics::Scrape;
use crate::harness::origin::built_in;
use crate::harness::{Ask, DEADLINE, Protocol, Setup, eventually, may_open_files};
use habits::{HABITS, Scene};

const CLIENTS: usize = 200;
/// How long they go on: long enough for each habit to be drawn some hundred times.
const TIME: Duration = Duration::from_secs(30);

/// Gauges that say what was learned or is the case right now, and not what is held.
const OF_THE_MOMENT: &[&str] = &["forebay_scheduler_share_ratio", "forebay_loop_run_queue"];

/// Every wait of a client is short here, every limit is low enough to be met, and no endpoint is given up.
fn strict(origin: std::net::SocketAddr) -> Setup {
    let limits = "limits: { connections: 150, connections_per_ip: unlimited, streams: 10 }";
    let listener = format!("protocols: [http1, h2c], {limits}, timeouts: {{ header: 1s, idle: 1s }}");
    let upstream = "limits: { requests: 40 }, queue: { size: 20, timeout: 1s }, keepalive: { idle: 300ms }, \
                    timeouts: { wait: 1s, receive: 1s, send: 1s }, \
                    outlier_detection: { consecutive_5xx: unlimited, consecutive_gateway_errors: unlimited, \
                    connect_failures: unlimited }";
    let route = "client: { body_idle: 500ms, body_total: 3s, write_idle: 500ms, \
                 min_rate: { read: 1KiB/s, write: 1KiB/s, grace: 1s } }, \
                 deadline: 3s, retry: { on: [reset, 503], attempts: 2 }, \
                 buffering: { request: { memory: 64KiB, disk: 2MiB }, response: { memory: 64KiB, disk: 4MiB } }";
    Setup::before_all(&[origin])
        .listener(&listener)
        .upstream(upstream)
        .route(route)
        .spooling("")
        .more("resources: { memory: 2MiB, disk: 32MiB, pause: 1s }")
}

#[test]
fn after_a_hostile_mix_everything_is_where_it_was() {
    may_open_files(4 * CLIENTS);
    let origin = built_in();
    let process = strict(origin.address()).spawn();
    for protocol in Protocol::BOTH {
        Ask::put(300_000).over(protocol, process.web()).arrived(300_000, "content-length: 300000");
        Ask::get("/bytes/300000").over(protocol, process.web()).is_content(300_000);
    }
    let before = at_rest(&process, None);

    let seed = mutate::seed();
    println!("FOREBAY_FUZZ_SEED={seed}");
    let until = Instant::now() + TIME.max(mutate::budget());
    let drawn: Vec<usize> = thread::scope(|scope| {
        let mix = |client: usize| {
            let scene = Scene { web: process.web(), until };
            scope.spawn(move || live(scene, StdRng::seed_from_u64(seed.wrapping_add(client as u64))))
        };
        let clients: Vec<_> = (0..CLIENTS).map(mix).collect();
        clients.into_iter().flat_map(|client| client.join().expect("a client")).collect()
    });
    for (index, (name, _)) in HABITS.iter().enumerate() {
        let times = drawn.iter().filter(|drawn| **drawn == index).count();
        println!("{times:5} × {name}");
        assert!(times > 0, "nobody drew `{name}`");
    }

    let after = at_rest(&process, Some(&before));
    assert_eq!(after, before);
    assert!(!process.stderr().contains("panicked"), "{}", process.stderr());
    assert_eq!(process.metric("forebay_refusals_total{reason=\"internal\"}"), 0.0);
    for protocol in Protocol::BOTH {
        Ask::get("/bytes/300000").over(protocol, process.web()).is_content(300_000);
    }
}

/// One client: one bad habit after the other, each on a connection of its own. Which ones.
fn live(scene: Scene, mut dice: StdRng) -> Vec<usize> {
    let mut drawn = Vec::new();
    while Instant::now() < scene.until {
        let habit = dice.gen_range(0..HABITS.len());
        drawn.push(habit);
        (HABITS[habit].1)(&scene, &mut dice);
    }
    drawn
}

/// What is held when nothing is under way: every gauge by its labels, and what is open. Waits until it is as `before`.
fn at_rest(process: &Process, before: Option<&BTreeMap<String, f64>>) -> BTreeMap<String, f64> {
    process.wait_at_rest();
    process.wait_metric("forebay_client_connections", |open| open == 0.0);
    process.wait_metric("forebay_upstream_connections", |open| open == 0.0);
    let began = Instant::now();
    eventually("everything to be where it was", || {
        let mut held = gauges(process);
        held.insert("open files".to_owned(), process.open_files().len() as f64);
        let same = before.is_none_or(|before| *before == held);
        // What differs is told by the story.
        (same || began.elapsed() > DEADLINE * 2 / 3).then_some(held)
    })
}

fn gauges(process: &Process) -> BTreeMap<String, f64> {
    let scrape = Scrape::of(process.admin());
    let text = scrape.text();
    let names = text.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.strip_suffix(" gauge"));
    let names: Vec<&str> = names.filter(|name| name.starts_with("forebay_") && !OF_THE_MOMENT.contains(name)).collect();
    let samples = text.lines().filter(|line| !line.starts_with('#')).filter_map(|line| line.rsplit_once(' '));
    samples
        .filter(|(series, _)| names.contains(&series.split('{').next().unwrap_or_default()))
        .map(|(series, value)| (series.to_owned(), value.parse().expect("a value")))
        // A series that began meanwhile is nothing as long as it counts nothing.
        .filter(|(_, value)| *value != 0.0)
        .collect()
}
