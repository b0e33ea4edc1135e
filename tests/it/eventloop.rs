//! Monitoring of the event loops: what workers do, how late they are, and what stalls them.

use std::io;
use std::sync::{Arc, Condvar, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use forebay::error::BuildError;
use forebay::filter::{Filter, FilterType, Scope, Stages, Surroundings, Verdict};

use crate::harness::gateway::Watched;
use crate::harness::metrics::Scrape;
use crate::harness::raw_h2::RawH2;
use crate::harness::{Client, DEADLINE, Origin, Setup, eventually, may_open_files};

/// A filter that blocks the worker: for as many milliseconds as a header field says, then until the story wakes it
/// by name.
struct Sleepy;

/// The names that were called.
static CALLED: (Mutex<Vec<&str>>, Condvar) = (Mutex::new(Vec::new()), Condvar::new());

fn wake(name: &'static str) {
    CALLED.0.lock().unwrap().push(name);
    CALLED.1.notify_all();
}

#[derive(serde::Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields)]
struct Nothing {}

#[async_trait]
impl Filter for Sleepy {
    fn stages(&self) -> Stages {
        Stages::REQUEST
    }

    async fn request(&self, scope: &mut Scope<'_>) -> Verdict {
        let sleep = scope.request.headers.get("x-sleep").and_then(|value| value.to_str().ok()?.parse().ok());
        thread::sleep(Duration::from_millis(sleep.unwrap_or(0)));
        if let Some(name) = scope.request.headers.get("x-until") {
            let called = CALLED.0.lock().unwrap();
            drop(CALLED.1.wait_timeout_while(called, DEADLINE, |called| !called.iter().any(|c| name == c)).unwrap());
        }
        Verdict::Continue
    }
}

impl FilterType for Sleepy {
    const KEY: &'static str = "sleepy";
    type Settings = Nothing;

    fn build(_: &Nothing, _: &Surroundings<'_>) -> Result<Self, BuildError> {
        Ok(Sleepy)
    }
}

fn sleepy(origin: &Origin) -> Setup {
    Setup::before(origin).filter::<Sleepy>().filters("{ sleepy: {} }")
}

/// A busy machine may delay any worker, which is not the subject of these stories.
fn patient(setup: Setup) -> Setup {
    setup.observability("event_loop: { stall_threshold: 3s }")
}

/// The log of this process.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl Log {
    fn start() -> Log {
        let log = Log::default();
        let writer = log.clone();
        let subscriber = tracing_subscriber::fmt().with_ansi(false).with_max_level(tracing::Level::WARN);
        subscriber.with_writer(move || writer.clone()).try_init().expect("to be the only one who listens");
        log
    }

    fn line_with(&self, words: &[&str]) -> Option<String> {
        let text = String::from_utf8_lossy(&self.0.lock().unwrap()).into_owned();
        text.lines().find(|line| words.iter().all(|word| line.contains(word))).map(str::to_owned)
    }
}

impl io::Write for Log {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn a_filter_that_sleeps_on_the_worker_is_named_while_it_sleeps() {
    let log = Log::start();
    let origin = Origin::named("origin");
    let gateway = sleepy(&origin).start();
    gateway.client().get("/");
    let mut client = gateway.client();
    client.send("GET / HTTP/1.1\r\nHost: test\r\nX-Sleep: 1000\r\nX-Until: one\r\n\r\n");
    gateway.wait_metric("forebay_stalled_workers", |stalled| stalled == 1.0);
    eventually("the log to name the filter", || {
        log.line_with(&["a worker is stalled", "worker=\"0\"", "where=\"sleepy\"", "route=\"all\"", "lasted="])
    });
    assert_eq!(gateway.metric("forebay_stalls_total{where=\"sleepy\"}"), 1.0);
    wake("one");
    assert_eq!(client.response().status, 200);
    gateway.wait_metric("forebay_stalled_workers", |stalled| stalled == 0.0);
    gateway.wait_metric("forebay_loop_lag_seconds_count{worker=\"0\"}", |count| count > 10.0);
    let scrape = Scrape::of(gateway.admin());
    assert_eq!(scrape.sum("forebay_stalls_total{where=\"sleepy\"}"), 1.0, "one call is one stall");
    let short = scrape.sum("forebay_filter_poll_seconds_bucket{filter=\"sleepy\",le=\"0.25\"}");
    assert_eq!((scrape.sum("forebay_filter_poll_seconds_count{filter=\"sleepy\"}"), short), (2.0, 1.0));
    assert!(scrape.sum("forebay_loop_lag_seconds_sum") > 0.9, "{}", scrape.text());
    let busy = scrape.sum("forebay_loop_lag_busy_seconds_sum");
    assert!(busy > 0.0 && busy < 0.5, "it sleeps, which takes no CPU time: {busy} s");
    log.line_with(&["the worker goes on", "where=\"sleepy\""]).expect("the end to be told as well");
}

#[test]
fn a_poll_of_a_few_milliseconds_moves_the_histograms_and_is_no_stall() {
    let origin = Origin::named("origin");
    let gateway = patient(sleepy(&origin)).start();
    let mut client = gateway.client();
    for _ in 0..3 {
        client.ask("GET", "/", "X-Sleep: 5\r\n", "");
    }
    gateway.log_lines(3);
    let scrape = Scrape::of(gateway.admin());
    let long = |name: &str, bound: &str| {
        scrape.sum(&format!("{name}_count")) - scrape.sum(&format!("{name}_bucket{{le=\"{bound}\"}}"))
    };
    assert!(long("forebay_filter_poll_seconds", "0.0025") >= 3.0, "{}", scrape.text());
    assert!(long("forebay_loop_poll_seconds", "0.004194304") >= 3.0, "{}", scrape.text());
    assert_eq!(scrape.sum("forebay_stalls_total"), 0.0);
}

#[test]
fn a_thousand_idle_connections_stall_nobody() {
    may_open_files(3_000);
    let origin = Origin::named("origin");
    let gateway = patient(sleepy(&origin)).start();
    let _idle: Vec<Client> = (0..1_000).map(|_| gateway.client()).collect();
    gateway.wait_metric("forebay_phase_active{phase=\"accept\"}", |idle| idle == 1_000.0);
    let before = Scrape::of(gateway.admin());
    let beats = "forebay_loop_lag_seconds_count";
    gateway.wait_metric(beats, |count| count >= before.sum(beats) + 50.0);
    let after = Scrape::of(gateway.admin());
    assert!(after.sum("forebay_loop_descriptors") > 1_000.0, "each is watched");
    assert!(after.sum("forebay_loop_tasks") > 1_000.0, "each has a task");
    let grown = |selector: &str| after.sum(selector) - before.sum(selector);
    let short = grown("forebay_loop_poll_seconds_bucket{le=\"0.004194304\"}");
    assert!(short > 0.9 * grown("forebay_loop_poll_seconds_count"), "polls are short: {}", after.text());
    assert_eq!((after.sum("forebay_stalls_total"), after.sum("forebay_filter_poll_seconds_count")), (0.0, 0.0));
    assert!(grown("forebay_loop_wait_seconds_total") > grown("forebay_loop_busy_seconds_total"));
}

#[test]
fn every_worker_is_seen_though_it_has_nothing_to_do() {
    let origin = Origin::named("origin");
    let gateway = Setup::before(&origin).server("threads: 3").start();
    gateway.wait_metric("forebay_loop_lag_seconds_count{worker=\"2\"}", |count| count > 3.0);
    let begin = Instant::now();
    let before = Scrape::of(gateway.admin());
    gateway.wait_metric("forebay_loop_lag_seconds_count{worker=\"2\"}", |count| count > 20.0);
    let after = Scrape::of(gateway.admin());
    let passed = begin.elapsed().as_secs_f64();
    for worker in ["0", "1", "2"] {
        let grown = |name: &str| {
            let selector = format!("forebay_loop_{name}{{worker=\"{worker}\"}}");
            after.sum(&selector) - before.sum(&selector)
        };
        let told = grown("wait_seconds_total") + grown("busy_seconds_total");
        assert!((0.1..passed + 0.01).contains(&told), "worker {worker}: {told} of {passed} s");
        assert!(grown("wakeups_total") > 2.0 && grown("polls_total") > 2.0, "{}", after.text());
    }
}

#[test]
fn workers_that_share_their_tasks_are_seen_one_by_one_and_together() {
    let origin = Origin::named("origin");
    let gateway = Setup::before(&origin).server("threads: 2, work_stealing: true").filter::<Sleepy>();
    let gateway = gateway.filters("{ sleepy: {} }").start();
    let mut client = gateway.client();
    client.send("GET / HTTP/1.1\r\nHost: test\r\nX-Sleep: 700\r\nX-Until: two\r\n\r\n");
    gateway.wait_metric("forebay_stalled_workers", |stalled| stalled == 1.0);
    assert_eq!(gateway.metric("forebay_stalls_total{where=\"sleepy\"}"), 1.0);
    wake("two");
    assert_eq!(client.response().status, 200);
    gateway.wait_metric("forebay_stalled_workers", |stalled| stalled == 0.0);
    let scrape = Scrape::of(gateway.admin());
    assert_eq!(scrape.samples("forebay_loop_busy_seconds_total").len(), 2);
    assert_eq!(scrape.samples("forebay_loop_tasks{worker=\"all\"}").len(), 1);
    assert!(scrape.sum("forebay_loop_busy_seconds_total") > 0.69, "{}", scrape.text());
}

#[test]
fn an_endpoint_is_not_accused_of_a_stall_of_the_worker_that_drives_its_connection() {
    const OTHERS: usize = 8;
    let origin = Origin::scripted();
    let timeouts = "protocol: h2c, timeouts: { connect: 60s, send: 60s, wait: 2s, receive: 60s }";
    let setup = sleepy(&origin).server("threads: 2").upstream(timeouts).route("retry: { attempts: 1 }");
    let gateway = setup.observability("event_loop: { stall_threshold: 200ms }").start();
    let mut first = gateway.client();
    first.send("GET / HTTP/1.1\r\nHost: test\r\n\r\n");
    let mut endpoint = RawH2::server(origin.accept());
    let answer = |endpoint: &mut RawH2, stream| endpoint.headers(stream, &[(":status", "200")], true);
    let stream = endpoint.request().expect("a request");
    answer(&mut endpoint, stream);
    assert_eq!(first.response().status, 200);
    let lag = |worker: usize| gateway.metric(&format!("forebay_loop_lag_seconds_sum{{worker=\"{worker}\"}}"));
    // Which worker drives the connection is unknown, so each is stalled at least once.
    let mut stalled = [false; 2];
    for round in 0..40 {
        if stalled == [true; 2] {
            return;
        }
        let (before, begun) = ([0, 1].map(lag), Instant::now());
        let mut others = [(); OTHERS].map(|()| gateway.client());
        others.iter_mut().for_each(|client| client.send("GET / HTTP/1.1\r\nHost: test\r\n\r\n"));
        let streams = [(); OTHERS].map(|()| endpoint.request().expect("a request"));
        let mut sleeper = gateway.client();
        sleeper.send("GET / HTTP/1.1\r\nHost: test\r\nX-Sleep: 3000\r\n\r\n");
        gateway.wait_metric("forebay_stalled_workers", |stalled| stalled == 1.0);
        streams.into_iter().for_each(|stream| answer(&mut endpoint, stream));
        // On a busy machine this endpoint may be late itself.
        let in_time = begun.elapsed() < Duration::from_secs(1);
        let stream = endpoint.request().expect("the request of the sleeper");
        answer(&mut endpoint, stream);
        let statuses = others.map(|mut client| client.response().status);
        assert_eq!(sleeper.response().status, 200);
        if in_time {
            assert_eq!(statuses, [200; OTHERS], "round {round}");
            let lags = [0, 1].map(lag);
            stalled = [0, 1].map(|worker| stalled[worker] || lags[worker] - before[worker] > 2.0);
        }
    }
    panic!("one worker was never stalled while the endpoint was in time");
}

#[test]
fn a_stall_of_one_worker_holds_up_no_client_of_another() {
    // Which worker accepts connections and which one stalls is drawn, so several stalls are needed to see both cases.
    const STALLS: [&str; 6] = ["stall 1", "stall 2", "stall 3", "stall 4", "stall 5", "stall 6"];
    let origin = Origin::named("origin");
    let gateway = sleepy(&origin).server("threads: 2").observability("event_loop: { stall_threshold: 200ms }").start();
    for stall in STALLS {
        // That all of them share a worker is very unlikely.
        let mut clients = [(); 20].map(|()| gateway.client());
        clients.iter_mut().for_each(|client| assert_eq!(client.get("/").status, 200));
        let [sleeper, others @ ..] = &mut clients;
        sleeper.send(format!("GET / HTTP/1.1\r\nHost: test\r\nX-Until: {stall}\r\n\r\n"));
        gateway.wait_metric("forebay_stalled_workers", |stalled| stalled == 1.0);
        let begun = Instant::now();
        others.iter_mut().for_each(|client| client.send("GET / HTTP/1.1\r\nHost: test\r\n\r\n"));
        eventually("a response by the other worker", || {
            others.iter_mut().any(|client| !client.is_silent()).then_some(())
        });
        assert!(begun.elapsed() < DEADLINE / 2, "the response came once the stall had ended");
        wake(stall);
        clients.iter_mut().for_each(|client| assert_eq!(client.response().status, 200));
        gateway.wait_metric("forebay_stalled_workers", |stalled| stalled == 0.0);
    }
}
