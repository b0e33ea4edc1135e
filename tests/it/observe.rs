//! What operators see: the access log, `/metrics` as Prometheus reads it, health and readiness.

use std::fs;
use std::time::{Duration, Instant};

use forebay::error::refusal;
use forebay::filter::Catalog;
use forebay::phase::Phase;

use crate::harness::client::{Client, get};
use crate::harness::gateway::{Watched, read_lines};
use crate::harness::metrics::{Prometheus, Scrape, promtool};
use crate::harness::{Origin, Setup, eventually, ms, ok};

#[test]
fn a_line_of_the_json_log_says_who_asked_what_and_what_became_of_it() {
    let origin = Origin::answering(|_| ok("0123456789"));
    let gateway = Setup::before(&origin).start();
    gateway.client().ask("POST", "/path?query", "User-Agent: story/1\r\nReferer: http://from/\r\n", "12345");
    let line = gateway.log_line();
    for (field, expected) in [
        ("client", "127.0.0.1"),
        ("listener", "web"),
        ("route", "all"),
        ("method", "POST"),
        ("host", "test"),
        ("target", "/path?query"),
        ("user_agent", "story/1"),
        ("upstream", "app"),
        ("endpoint", &*origin.address().to_string()),
        ("reason", ""),
    ] {
        assert_eq!(line.text(field), expected, "{field} in {line:?}");
    }
    assert_eq!((line.status(), line.number("attempts")), (200, 1.0));
    assert!(line.phase(Phase::Wait).is_some() && line.number("total_ms") > 0.0);
}

#[test]
fn a_line_of_the_log_is_one_line_whatever_the_client_sends() {
    let origin = Origin::named("origin");
    let gateway = Setup::before(&origin).start();
    let mut client = gateway.client();
    client.ask("GET", "/%0a?%0a%22'\\{}", "User-Agent: \"quoted\" \\ and \u{e9}\tend\r\n", "");
    client.get("/next");
    let lines = gateway.log_lines(2);
    assert_eq!(lines.len(), 2);
    assert_eq!(lines[0].text("target"), "/%0A?%0a%22'\\{}");
}

#[test]
fn the_combined_log_reads_like_that_of_nginx() {
    let origin = Origin::answering(|_| ok("0123456789"));
    let gateway = Setup::before(&origin).access_log("format: combined").start();
    gateway.client().ask("GET", "/path?q", "User-Agent: sto\"ry\r\nReferer: http://from/\r\n", "");
    let line = read_lines(&gateway.log_file(), 1).remove(0);
    assert!(line.starts_with("127.0.0.1 - - ["), "{line}");
    assert!(line.contains("] \"GET /path?q HTTP/1.1\" 200 "), "{line}");
    assert!(line.contains("\"http://from/\" \"sto"), "{line}");
    assert!(!line.contains("sto\"ry"), "a quote from outside must not end a field: {line}");
    assert!(line.contains("wait="), "the phases stand behind it: {line}");
}

#[test]
fn the_log_is_opened_anew_on_usr1() {
    let origin = Origin::answering(|request| ok(request.target()));
    let process = Setup::before(&origin).spawn();
    let mut client = process.client();
    client.get("/before");
    process.log_line_of("/before");

    let (file, rotated) = (process.log_file(), process.log_file().with_extension("1"));
    fs::rename(&file, &rotated).expect("to rotate the log");
    process.signal(libc::SIGUSR1);
    crate::harness::eventually("the new log file", || file.exists().then_some(()));
    client.get("/after");
    process.log_line_of("/after");
    let old = fs::read_to_string(&rotated).expect("the old log");
    assert!(old.contains("/before") && !old.contains("/after"), "{old}");
}

#[test]
fn lines_that_find_no_room_are_dropped_and_counted_and_hold_up_nobody() {
    let origin = Origin::named("origin");
    let setup = Setup::before(&origin);
    let pipe = setup.path("pipe");
    let name = std::ffi::CString::new(pipe.to_str().expect("a path of text")).expect("no NUL in it");
    // SAFETY: the name is a NUL-terminated string that outlives the call.
    assert_eq!(unsafe { libc::mkfifo(name.as_ptr(), 0o600) }, 0, "to make a pipe");
    let reader = fs::OpenOptions::new().read(true).write(true).open(&pipe).expect("the pipe");
    let gateway = setup.access_log_to(&pipe, "queue: 2").start();
    let mut client = gateway.client();
    let long = "a".repeat(8_000);
    for _ in 0..100 {
        assert_eq!(client.get(&format!("/{long}")).status, 200);
    }
    gateway.wait_metric("forebay_access_log_dropped_total{reason=\"full\"}", |count| count > 0.0);
    // The writer blocks on the full pipe; once it is drained, the writer can end with the gateway.
    std::thread::spawn(move || std::io::copy(&mut { reader }, &mut std::io::sink()));
}

#[test]
fn promtool_has_nothing_against_the_metrics() {
    let origin = Origin::named("origin");
    let gateway = Setup::before(&origin).listener("protocols: [http1, h2c]").start();
    gateway.client().get("/");
    gateway.log_lines(1);
    assert_eq!(promtool(Scrape::of(gateway.admin()).text()), "");
}

#[test]
fn a_real_prometheus_scrapes_every_phase() {
    let origin = Origin::named("origin");
    let gateway = Setup::before(&origin).start();
    for _ in 0..5 {
        gateway.client().get("/");
    }
    gateway.log_lines(5);
    let prometheus = Prometheus::scraping(gateway.admin());
    assert_eq!(prometheus.query("forebay_phase_seconds_count{phase=\"wait\",route=\"all\"} == 5"), [5.0]);
    assert_eq!(prometheus.query("sum(forebay_exchanges_total{code=\"200\"}) == 5"), [5.0]);
    assert_eq!(prometheus.query("count(forebay_build_info)"), [1.0]);
    assert_eq!(prometheus.query("up{job=\"forebay\"}"), [1.0]);
}

#[test]
fn each_metric_has_a_help_and_a_type() {
    let origin = Origin::named("origin");
    let gateway = Setup::before(&origin).start();
    gateway.client().get("/");
    gateway.log_lines(1);
    let scrape = Scrape::of(gateway.admin());
    for name in [
        "forebay_phase_seconds",
        "forebay_exchanges_total",
        "forebay_exchange_seconds",
        "forebay_own_seconds",
        "forebay_phase_active",
        "forebay_bytes_total",
        "forebay_client_connections",
        "forebay_refusals_total",
        "forebay_build_info",
    ] {
        assert!(scrape.text().contains(&format!("# HELP {name} ")), "{name} has no help");
        assert!(scrape.text().contains(&format!("# TYPE {name} ")), "{name} has no type");
    }
}

#[test]
fn a_gateway_that_runs_is_healthy_and_ready() {
    let origin = Origin::named("origin");
    let gateway = Setup::before(&origin).start();
    assert_eq!(get(gateway.admin(), "/healthz").status, 200);
    eventually("the gateway to be ready", || (get(gateway.admin(), "/readyz").status == 200).then_some(()));
    assert_eq!(get(gateway.admin(), "/nothing").status, 404);
    assert_eq!(Client::connect(gateway.admin()).ask("POST", "/metrics", "", "").status, 405);
}

#[test]
fn the_admin_endpoint_is_no_listener_and_proxies_nothing() {
    let origin = Origin::named("origin");
    let gateway = Setup::before(&origin).start();
    assert_ne!(get(gateway.admin(), "/").body, b"origin");
    assert_eq!(get(gateway.web(), "/metrics").text(), "origin");
    assert_eq!(origin.connections(), 1);
    assert_eq!(gateway.log_lines(1).len(), 1, "what the operator asks is no exchange");
}

#[test]
fn an_admin_endpoint_that_is_off_is_not_there() {
    let origin = Origin::named("origin");
    let setup = Setup::before(&origin);
    let yaml = setup.yaml().replace("admin: { address: \"127.0.0.1:0\", hosts: [test] }", "admin: { enabled: false }");
    let config = setup.builder().parse("test.yaml", &yaml).unwrap_or_else(|e| panic!("{e}"));
    let gateway = setup.builder().build(config).unwrap_or_else(|e| panic!("{e}"));
    assert_eq!(gateway.admin_address(), None);
}

/// Time limit of a scrape; debug builds are several times slower.
const SCRAPE: Duration = ms(if cfg!(debug_assertions) { 600 } else { 100 });

#[test]
fn two_thousand_routes_in_use_are_read_in_no_time_and_off_the_workers() {
    let origin = Origin::named("origin");
    let routes = (0..2_000).map(|n| format!("{{ name: r{n}, match: {{ path: {{ exact: /{n} }} }}, upstream: app }}"));
    let gateway = Setup::before(&origin).routes(&routes.collect::<Vec<_>>().join("\n")).start();
    let mut client = gateway.client();
    (0..2_000).for_each(|n| assert_eq!(client.get(&format!("/{n}")).status, 200));
    gateway.log_lines(2_000);

    let busy = |scrape: &Scrape| scrape.sum("forebay_loop_busy_seconds_total");
    let (begin, before) = (Instant::now(), Scrape::of(gateway.admin()));
    let times = (0..5).map(|_| {
        let begin = Instant::now();
        Scrape::of(gateway.admin());
        begin.elapsed()
    });
    let fastest = times.min().expect("five of them");
    let (after, all) = (Scrape::of(gateway.admin()), begin.elapsed());
    assert!(fastest < SCRAPE, "{fastest:?} for {} lines", after.text().lines().count());
    assert!(busy(&after) - busy(&before) < 0.3 * all.as_secs_f64(), "the worker had nothing to do with it");

    assert_eq!(after.sum("forebay_exchanges_total"), 2_000.0, "each is counted somewhere");
    let alone = after.samples("forebay_own_seconds_count").len() as f64 - 2.0;
    assert!(alone > 300.0 && alone + after.sum("forebay_routes_folded") == 2_000.0, "{alone} have series of their own");
    assert!(after.text().lines().count() < 100_000);
}

#[test]
fn routes_beyond_the_limit_of_series_are_counted_together() {
    let origin = Origin::named("origin");
    let routes = "{ name: one, match: { path: { exact: /1 } }, upstream: app }\n{ name: rest, upstream: app }";
    let setup = Setup::before(&origin).routes(routes).observability("metrics: { max_series: 1 }");
    let gateway = setup.start();
    get(gateway.web(), "/1");
    get(gateway.web(), "/2");
    gateway.wait_metric("forebay_exchanges_total{route=\"_other\",code=\"200\"}", |count| count == 2.0);
    assert_eq!(gateway.metric("forebay_exchanges_total{route=\"one\"}"), 0.0);
    assert_eq!(gateway.log_line().text("route"), "one", "the log knows better");
}

/// Reasons that no story can cause deliberately, and what covers them instead.
const WITHOUT_A_STORY: &[(&str, &str)] = &[
    ("internal", "a fault of the gateway itself: every story of the fuzz targets says that there was none"),
    ("select.deadline", "a race of two timers: `deadline::refusal` has a test"),
];

#[test]
fn every_reason_for_a_refusal_has_a_story() {
    let stories: String = fs::read_dir("tests/it")
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "rs") && !path.ends_with("observe.rs"))
        .map(|path| fs::read_to_string(path).unwrap())
        .collect();
    let rows = refusal::ALL.iter().copied().chain(Catalog::builtin().refusals());
    let untold = |reason: &&str| {
        let known = WITHOUT_A_STORY.iter().any(|(without, _)| without == reason);
        let forms = [format!("\"{reason}\""), format!("\\\"{reason}\\\""), format!(" {reason}: ")];
        !known && !forms.iter().any(|form| stories.contains(form))
    };
    let untold: Vec<&str> = rows.map(|row| row.reason).filter(untold).collect();
    assert!(untold.is_empty(), "no story of `tests/it` names these: {untold:?}");
}
