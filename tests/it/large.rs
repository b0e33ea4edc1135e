//! Configurations with thousands of routes and endpoints: the cost grows linearly.

use std::fmt::Write;
use std::fs;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Instant;

use forebay::gateway::Gateway;
use forebay::gateway::changes::between;

use crate::harness::client::Client;
use crate::harness::gateway::Process;
use crate::harness::{Origin, Setup, eventually, ms};

/// This many routes, each with a host, a path and a filter, and as many endpoints: half of them in one upstream,
/// the others in upstreams of ten. `word` is what the routes send to their upstreams.
fn parts(count: usize, word: &str) -> (String, String) {
    let (mut upstreams, mut routes) = (String::from("one: { endpoints: ["), String::new());
    let address = |number: usize| {
        format!("{{ address: \"127.{}.{}.{}:3000\" }}, ", number >> 16, number >> 8 & 255, number & 255)
    };
    (0..count / 2).for_each(|number| upstreams += &address(number));
    upstreams += "] }\n";
    for group in 0..count / 20 {
        let endpoints: String = (0..10).map(|number| address(count + group * 10 + number)).collect();
        writeln!(upstreams, "  u{group}: {{ endpoints: [{endpoints}] }}").expect("a string grows");
    }
    for number in 0..count {
        let upstream = if number % 2 == 0 { "one".to_owned() } else { format!("u{}", number % (count / 20)) };
        writeln!(
            routes,
            "  - {{ name: r{number}, match: {{ hosts: [h{}.test], path: {{ prefix: /p{number} }} }}, upstream: {upstream}, \
             filters: [ {{ headers: {{ request: {{ set: {{ X-Word: {word}{number} }} }} }} }} ] }}",
            number / 10
        )
        .expect("a string grows");
    }
    (upstreams, routes)
}

fn whole(count: usize) -> String {
    saying(count, "w")
}

fn saying(count: usize, word: &str) -> String {
    let (upstreams, routes) = parts(count, word);
    format!("listeners: [ {{ name: web, address: 127.0.0.1:0 }} ]\nupstreams:\n  {upstreams}routes:\n{routes}")
}

/// The CPU time of this thread for the work, in nanoseconds, so that other processes do not matter.
fn cost(work: impl FnOnce()) -> u64 {
    let spent = || {
        let stat = fs::read_to_string("/proc/thread-self/schedstat").expect("the time of this thread");
        stat.split(' ').next().and_then(|spent| spent.parse::<u64>().ok()).expect("a number")
    };
    let before = spent();
    work();
    spent() - before
}

/// Asserts that four times the size costs four times as much, and less than six, which leaves room for cache
/// effects.
fn grows_in_proportion(what: &str, mut work: impl FnMut(usize)) {
    let least = |count: usize, work: &mut dyn FnMut(usize)| (0..2).map(|_| cost(|| work(count))).min().expect("two");
    let (small, large) = (least(500, &mut work), least(2_000, &mut work));
    let ratio = large as f64 / small as f64;
    assert!(ratio < 6.0, "{what}: {ratio:.1} times as long for four times as much: {small} and {large} ns");
}

#[test]
fn a_large_file_is_read_and_checked_in_proportion() {
    let builder = Gateway::builder();
    grows_in_proportion("reading", |count| {
        let config = builder.parse("large.yaml", &whole(count)).unwrap_or_else(|e| panic!("{e}"));
        assert_eq!(config.routes.len(), count);
    });
}

#[test]
fn all_that_is_wrong_with_a_large_file_is_told_in_proportion() {
    let builder = Gateway::builder();
    grows_in_proportion("routes to upstreams that there are not", |count| {
        let text = whole(count).replace("upstream: ", "upstream: x");
        let report = builder.parse("large.yaml", &text).expect_err("all routes lead nowhere");
        assert_eq!(report.errors(), count);
        assert!(report.to_string().len() > count * 50);
    });
    grows_in_proportion("endpoints with an unknown key", |count| {
        let text = whole(count).replace(":3000\" }", ":3000\", wieght: 2 }");
        let report = builder.parse("large.yaml", &text).expect_err("all endpoints are wrong");
        assert!(report.errors() >= 100, "{}", report.errors());
    });
}

#[test]
fn a_large_configuration_is_built_in_proportion() {
    let builder = Gateway::builder();
    let configs =
        [500, 2_000].map(|count| builder.parse("large.yaml", &whole(count)).unwrap_or_else(|e| panic!("{e}")));
    grows_in_proportion("building", |count| {
        let config = configs.iter().find(|config| config.routes.len() == count).expect("one of this size");
        let errors = builder.check(config);
        assert!(errors.is_empty(), "{errors:?}");
    });
}

#[test]
fn large_configurations_are_compared_in_proportion() {
    let builder = Gateway::builder();
    let read = |count, word: &str| builder.parse("large.yaml", &saying(count, word)).unwrap_or_else(|e| panic!("{e}"));
    let pairs = [500, 2_000].map(|count| (read(count, "w"), read(count, "v")));
    grows_in_proportion("comparing where every route differs", |count| {
        let (before, after) = pairs.iter().find(|(before, _)| before.routes.len() == count).expect("a pair");
        let changes = between(before, after);
        assert_eq!(changes.len(), count);
        let last = changes.last().and_then(|change| change.at.as_deref()).unwrap_or_default();
        assert!(last.starts_with("large.yaml:"), "{last}");
    });
}

#[test]
fn a_large_configuration_is_put_on_while_clients_are_served() {
    const COUNT: usize = 400;
    let origin = Origin::named("origin");
    let setup = Setup::before(&origin).more("include: large.yaml");
    let write = |word: &str| {
        let (upstreams, routes) = parts(COUNT, word);
        fs::write(setup.path("large.yaml"), format!("upstreams:\n  {upstreams}routes:\n{routes}")).expect("a file");
    };
    write("w");
    let process = setup.spawn();
    let mut kept = process.client();
    assert_eq!(kept.get("/").text(), "origin");
    write("v");
    let answer = Client::connect(process.admin()).ask("POST", "/reload", "", "");
    assert_eq!(answer.status, 200, "{}", answer.text());
    let outcome = answer.json();
    assert_eq!(outcome["changes"].as_array().map(Vec::len), Some(COUNT));
    let (seconds, swap) =
        (outcome["seconds"].as_f64().expect("seconds"), outcome["swap_seconds"].as_f64().expect("seconds"));
    assert!(swap < seconds / 2.0, "the swap is the smaller part: {swap} s of {seconds} s");
    assert_eq!(kept.get("/").text(), "origin");
    let series = process.scrape().text().lines().filter(|line| line.starts_with("forebay_endpoint_available{")).count();
    assert_eq!(series, COUNT + 1, "every endpoint is there once");
}

#[test]
fn thousands_of_routes_and_endpoints_are_started_reloaded_and_checked_beside_a_client() {
    // An unoptimized build takes ten times as long for each of them, and shares its CPU with other tests.
    const COUNT: usize = if cfg!(debug_assertions) { 2_000 } else { 10_000 };
    const SWAP_SECONDS: f64 = if cfg!(debug_assertions) { 1.0 } else { 0.1 };
    const START_CPU_SECONDS: f64 = if cfg!(debug_assertions) { 20.0 } else { 1.0 };
    // A bound of the histogram.
    const TURN_SECONDS: &str = if cfg!(debug_assertions) { "0.05" } else { "0.005" };
    const AT_ONCE: usize = 32;
    let origin = Origin::named("origin");
    let setup = Setup::before(&origin)
        .more("include: large.yaml")
        .server(&format!("threads: 2, health_checks: {AT_ONCE}"))
        .observability("event_loop: { stall_threshold: 2s, heartbeat: 1ms }");
    // No endpoint listens, so every check is refused at once.
    let checks = "health_check: { tcp: {}, interval: 5s, timeout: 5s, at_once: 1000 }, endpoints:";
    let write = |word: &str| {
        let (upstreams, routes) = parts(COUNT, word);
        let upstreams = upstreams.replace("endpoints:", checks);
        fs::write(setup.path("large.yaml"), format!("upstreams:\n  {upstreams}routes:\n{routes}")).expect("a file");
    };
    write("w");
    let began = Instant::now();
    let process = setup.spawn();
    let started = began.elapsed();
    let start_cpu: f64 = threads(&process).iter().map(|thread| thread.ran).sum();
    println!("started in {started:.3?}, {start_cpu:.3} s of CPU time");
    assert!(start_cpu < START_CPU_SECONDS, "the start takes {start_cpu} s of CPU time");
    let idle = process.open_files().len();
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        let served = scope.spawn(|| {
            let mut kept = process.client();
            let mut served = 0;
            while !over.load(Ordering::Relaxed) {
                assert_eq!(kept.get("/").text(), "origin");
                served += 1;
                thread::park_timeout(ms(5));
            }
            served
        });
        let _over = Over(&over);
        let mut swaps = Vec::new();
        for word in ["v", "u", "w"] {
            write(word);
            let answer = Client::connect(process.admin()).ask("POST", "/reload", "", "");
            assert_eq!(answer.status, 200, "{}", answer.text());
            let outcome = answer.json();
            assert_eq!(outcome["changes"].as_array().map(Vec::len), Some(COUNT));
            let figure = |name: &str| outcome[name].as_f64().expect("seconds");
            println!("reload {:.3} s, swap {:.4} s", figure("seconds"), figure("swap_seconds"));
            swaps.push(figure("swap_seconds"));
        }
        let quickest = swaps.iter().copied().fold(f64::INFINITY, f64::min);
        assert!(quickest < SWAP_SECONDS, "other processes only lengthen it: {swaps:?}");
        let checked = || process.scrape().sum("forebay_upstream_health_checks_total");
        let before = checked();
        let mut most = 0;
        eventually("every endpoint to be checked once more", || {
            most = most.max(process.open_files().len());
            (checked() >= before + COUNT as f64).then_some(())
        });
        println!("{idle} open files at first, {most} at most");
        assert!(most < idle + AT_ONCE * 2, "{most} open files");
        over.store(true, Ordering::Relaxed);
        assert!(served.join().expect("every response") > 100);
    });
    let scrape = process.scrape();
    assert_eq!(scrape.sum("forebay_stalls_total"), 0.0, "no worker was late");
    let longer = |name: &str| {
        scrape.sum(&format!("{name}_count")) - scrape.sum(&format!("{name}_bucket{{le=\"{TURN_SECONDS}\"}}"))
    };
    let (late, busy) = (longer("forebay_loop_lag_seconds"), longer("forebay_loop_lag_busy_seconds"));
    println!("late by more than {TURN_SECONDS} s: {late} times, by its own work: {busy} times");
    for Thread { name, ran, waited } in threads(&process) {
        println!("{name:<16} ran {ran:.3} s, waited {waited:.3} s for a core");
    }
    assert!(scrape.sum("forebay_loop_lag_busy_seconds_count") > 100.0);
    // The lag itself also depends on what other processes do.
    assert_eq!(busy, 0.0, "no turn of a worker takes more CPU time");
}

/// The times of a thread, in seconds.
struct Thread {
    name: String,
    ran: f64,
    waited: f64,
}

/// The threads of a gateway that have not ended.
fn threads(process: &Process) -> Vec<Thread> {
    let tasks = fs::read_dir(format!("/proc/{}/task", process.pid())).expect("its threads").flatten();
    let thread = |task: fs::DirEntry| {
        let read = |file: &str| fs::read_to_string(task.path().join(file)).ok();
        let (name, times) = (read("comm")?, read("schedstat")?);
        let mut seconds = times.split(' ').map(|nanos| nanos.parse::<f64>().expect("nanoseconds") / 1e9);
        Some(Thread { name: name.trim().to_owned(), ran: seconds.next()?, waited: seconds.next()? })
    };
    tasks.filter_map(thread).collect()
}

/// Ends the client of a story, even after a panic.
struct Over<'o>(&'o AtomicBool);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}
