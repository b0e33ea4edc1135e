//! Health of endpoints: how it is determined, what follows, and that clients do not notice.

use forebay::admin::upstreams::UpstreamDetail;

use crate::harness::client::{Client, get};
use crate::harness::gateway::Watched;
use crate::harness::moody::under_load;
use crate::harness::origin::{Closed, response};
use crate::harness::{Gateway, H2Origin, LogLine, Mood, Moody, Nginx, Origin, Setup, eventually, ms};

/// This many healthy backends, and a gateway in front of them with these upstream keys.
fn before<const N: usize>(keys: &str) -> ([Moody; N], Setup) {
    let backends = [(); N].map(|()| Moody::well());
    let setup = Setup::before_all(&backends.each_ref().map(Moody::address)).upstream(keys);
    (backends, setup)
}

/// Waits for this many ejections with this reason.
fn wait_ejected(gateway: &impl Watched, reason: &str, count: f64) {
    let ejections = format!("forebay_upstream_ejections_total{{upstream=\"app\",reason=\"{reason}\"}}");
    gateway.wait_metric(&ejections, |ejections| ejections >= count);
}

mod checks {
    use super::*;

    use std::net::TcpListener;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};

    /// A fast health check of this kind, without panic mode.
    fn check(probe: &str) -> String {
        let check = format!("{{ {probe}, interval: 20ms, timeout: 5s, unhealthy_after: 2, healthy_after: 2 }}");
        format!("health_check: {check}, load_balancing: {{ panic: 0% }}")
    }

    /// Waits for this many checks with this outcome.
    fn wait_checks(gateway: &impl Watched, outcome: &str, count: f64) {
        let checks = format!("forebay_upstream_health_checks_total{{upstream=\"app\",outcome=\"{outcome}\"}}");
        gateway.wait_metric(&checks, |checks| checks >= count);
    }

    /// Waits until requests get this status: some endpoint is available, or none.
    fn wait_status(gateway: &Gateway, status: u16) {
        eventually(&format!("an answer {status}"), || (gateway.client().get("/").status == status).then_some(()));
    }

    /// An origin with this response to health checks while it is sick, and normal responses otherwise.
    fn moody(well: &Arc<AtomicBool>, sick: &'static str) -> Origin {
        let well = Arc::clone(well);
        Origin::answering(move |request| match (request.target(), well.load(Ordering::Relaxed)) {
            ("/healthz", false) => response(sick, "", "I am so sick"),
            ("/healthz", true) => response("200 OK", "", "I am well"),
            _ => response("200 OK", "", "served"),
        })
    }

    #[test]
    fn an_endpoint_whose_checks_fail_gets_nothing_until_they_pass_again() {
        for (probe, sick) in [
            ("http: { path: /healthz }", "503 Service Unavailable"),
            ("http: { path: /healthz, statuses: [200, 300-399] }", "204 No Content"),
            ("http: { path: /healthz, body: am well }", "200 OK"),
        ] {
            let well = Arc::new(AtomicBool::new(true));
            let gateway = Setup::before(&moody(&well, sick)).upstream(&check(probe)).start();
            wait_checks(&gateway, "passed", 3.0);
            well.store(false, Ordering::Relaxed);
            wait_status(&gateway, 503);
            wait_checks(&gateway, "failed", 2.0);
            well.store(true, Ordering::Relaxed);
            wait_status(&gateway, 200);
            let is_refusal = |line: &LogLine| line.status() == 503;
            let refused = eventually("a refusal", || gateway.log_lines(1).into_iter().find(is_refusal));
            assert_eq!(refused.reason(), "select.no_endpoint", "{probe}");
        }
    }

    #[test]
    fn a_check_names_its_host_and_who_asks() {
        let origin = Origin::named("well");
        let _gateway =
            Setup::before(&origin).upstream(&check("http: { path: \"/up?deep=1\", host: shop.test }")).start();
        let asked = eventually("a check", || origin.requests().first().cloned());
        assert_eq!((asked.target(), asked.value("host")), ("/up?deep=1", Some("shop.test")));
        assert_eq!(asked.value("user-agent"), Some("Forebay health check"));
        let nameless = Origin::named("well");
        let _gateway = Setup::before(&nameless).upstream(&check("http: {}")).start();
        let asked = eventually("a check", || nameless.requests().first().cloned());
        assert_eq!((asked.target(), asked.value("host")), ("/", Some(&*nameless.address().to_string())));
    }

    #[test]
    fn changes_and_nothing_else_are_logged_with_what_is_wrong() {
        let (dead, alive) = (Closed::refusing(), Origin::named("alive"));
        let setup = Setup::before_all(&[dead.address(), alive.address()]).upstream(&check("tcp: {}"));
        let gateway = setup.spawn();
        gateway.says("the endpoint is unhealthy: the connection was refused");
        wait_checks(&gateway, "failed", 5.0);
        wait_checks(&gateway, "passed", 5.0);
        assert_eq!(gateway.stderr().matches("the endpoint is").count(), 1, "{}", gateway.stderr());
        assert_eq!((0..9).map(|_| gateway.client().get("/").text().to_owned()).collect::<String>(), "alive".repeat(9));
        assert_eq!(gateway.metric("forebay_upstream_connects_total{outcome=\"failed\"}"), 0.0);
    }

    #[test]
    fn who_accepts_and_never_answers_is_unhealthy() {
        let (hung, well) = (Origin::scripted(), Origin::named("well"));
        let setup = Setup::before_all(&[hung.address(), well.address()]);
        let written = "health_check: { http: {}, interval: 50ms, timeout: 200ms, unhealthy_after: 1 }";
        let gateway = setup.upstream(written).start();
        wait_checks(&gateway, "timeout", 2.0);
        assert_eq!((0..9).map(|_| gateway.client().get("/").text().to_owned()).collect::<String>(), "well".repeat(9));
    }

    #[test]
    fn all_upstreams_share_a_number_of_checks_and_take_turns() {
        let (silent, well) = ([(); 6].map(|()| Origin::scripted()), Origin::named("well"));
        let endpoints: Vec<String> = silent.iter().map(|one| format!("{{ address: \"{}\" }}", one.address())).collect();
        let silence = "health_check: { http: {}, interval: 1h, timeout: 1h, at_once: 10 }";
        let setup = Setup::before(&well)
            .upstream("health_check: { http: {}, interval: 20ms, timeout: 5s }")
            .also_upstream("silent", &format!("{silence}, endpoints: [ {} ]", endpoints.join(", ")))
            .server("threads: 1, health_checks: 3");
        let process = setup.spawn();
        let checks = |upstream: &str, outcome: &str| {
            let labels = format!("{{upstream=\"{upstream}\",outcome=\"{outcome}\"}}");
            process.metric(&format!("forebay_upstream_health_checks_total{labels}"))
        };
        // When both upstreams wait, silent endpoints have all places.
        let asked = |count: usize| {
            let mut asked = Vec::new();
            eventually(&format!("checks of {count} silent endpoints"), || {
                asked.extend(silent.iter().filter_map(Origin::try_accept));
                (asked.len() >= count).then_some(())
            });
            process.wait_metric("forebay_health_checks_waiting", |waiting| waiting == 2.0);
            assert_eq!(process.metric("forebay_health_checks_active"), 3.0);
            asked.extend(silent.iter().filter_map(Origin::try_accept));
            assert_eq!(asked.len(), count, "no more than there may be");
            asked
        };
        let mut held = asked(3);
        let before = checks("app", "passed");
        for mut ends in held.drain(..2) {
            ends.request();
            ends.answer("");
        }
        held.extend(asked(2));
        assert!(checks("app", "passed") > before, "its turn is between those of the other upstream");
        assert_eq!(checks("silent", "passed"), 2.0);
        assert_eq!([checks("silent", "failed"), checks("silent", "timeout"), checks("app", "timeout")], [0.0; 3]);

        setup.server("threads: 1, health_checks: 5").in_place_of(&process).write();
        let answer = Client::connect(process.admin()).ask("POST", "/reload", "", "");
        assert_eq!(answer.status, 200, "{}", answer.text());
        assert_eq!(answer.json()["needs_new_process"].as_array().map(Vec::len), Some(0));
        wait_checks(&process, "passed", checks("app", "passed") + 3.0);
        process.wait_metric("forebay_health_checks_active", |active| active >= 4.0);
    }

    #[test]
    fn a_check_that_waits_for_others_does_not_fail_by_its_time_limit() {
        let (silent, well) = (Origin::scripted(), Origin::named("well"));
        let written = "health_check: { http: {}, interval: 20ms, timeout: 2s }";
        let silence = format!("{written}, endpoints: [ {{ address: \"{}\" }} ]", silent.address());
        let setup = Setup::before(&well).upstream(written).also_upstream("silent", &silence);
        let gateway = setup.server("threads: 1, health_checks: 1").start();
        gateway.wait_metric("forebay_upstream_health_checks_total{outcome=\"timeout\"}", |late| late >= 3.0);
        wait_checks(&gateway, "passed", 3.0);
        assert_eq!(gateway.metric("forebay_upstream_health_checks_total{upstream=\"app\",outcome=\"timeout\"}"), 0.0);
    }

    #[test]
    fn who_was_never_checked_takes_requests_or_not_as_it_is_written() {
        for (initial, status) in [("healthy", 200), ("unhealthy", 503)] {
            let origin = Origin::answering(|request| match request.target() {
                // Its response to a check never ends.
                "/healthz" => b"HTTP/1.1 200 OK\r\nContent-Le".to_vec(),
                _ => response("200 OK", "", "served"),
            });
            let written = format!(
                "health_check: {{ http: {{ path: /healthz }}, timeout: 1m, initial: {initial} }}, load_balancing: {{ panic: 0% }}"
            );
            let gateway = Setup::before(&origin).upstream(&written).start();
            assert_eq!(gateway.client().get("/").status, status, "{initial}");
        }
    }

    #[test]
    fn a_check_goes_over_tls_where_exchanges_do_and_verifies_the_certificate() {
        let nginx = Nginx::start();
        let setup = Setup::before_all(&[nginx.h2()]).upstream("protocol: h2");
        for probe in ["http: { path: /protocol, body: HTTP/2.0 }", "tcp: {}"] {
            let setup = setup.clone().upstream(&check(probe));
            let trusting = setup.spawn_with(&[("SSL_CERT_FILE", &nginx.certificate())]);
            wait_checks(&trusting, "passed", 3.0);
            assert_eq!(trusting.metric("forebay_upstream_health_checks_total{outcome=\"failed\"}"), 0.0, "{probe}");
            let strict = setup.spawn();
            strict.says("the endpoint is unhealthy");
            // The error is logged before the roster is rebuilt.
            let refused = || (strict.client().get("/protocol").status == 503).then_some(());
            eventually(&format!("no endpoint, by {probe}"), refused);
        }
    }

    #[test]
    fn a_check_goes_through_a_unix_socket_where_exchanges_do() {
        let origin = Origin::named("behind a path");
        let inner = Setup::before(&origin);
        let path = inner.path("inner.sock");
        let _inner = inner.also_listener(&format!("{{ name: local, address: \"unix:{}\" }}", path.display())).start();
        for probe in ["http: { body: behind }", "tcp: {}"] {
            let gateway = Setup::before_all(&[format!("unix:{}", path.display())]).upstream(&check(probe)).start();
            wait_checks(&gateway, "passed", 3.0);
            assert_eq!(gateway.metric("forebay_upstream_health_checks_total{outcome=\"failed\"}"), 0.0, "{probe}");
        }
    }

    #[test]
    fn grpc_is_asked_by_its_own_health_protocol() {
        let origin = H2Origin::start();
        let setup = Setup::before_all(&[origin.address()]).upstream("protocol: h2c");
        for (service, outcome, status) in [("well", "passed", 200), ("sick", "failed", 503), ("other", "failed", 503)] {
            let gateway = setup.clone().upstream(&check(&format!("grpc: {{ service: {service} }}"))).start();
            wait_checks(&gateway, outcome, 3.0);
            assert_eq!(gateway.client().get("/trailers").status, status, "{service}");
        }
    }

    #[test]
    fn ten_thousand_endpoints_are_checked_a_few_at_once() {
        let listener = TcpListener::bind("0.0.0.0:0").expect("a port on every loopback address");
        let port = listener.local_addr().expect("its address").port();
        let open: Vec<String> = (0..10_000).map(|n| format!("127.1.{}.{}:{port}", n / 250, n % 250 + 1)).collect();
        std::thread::spawn(move || listener.incoming().for_each(drop));
        let written = "health_check: { tcp: {}, interval: 5s, timeout: 5s, at_once: 32, initial: unhealthy }";
        let gateway = Setup::before_all(&open).upstream(written).spawn();
        let passed = "forebay_upstream_health_checks_total{upstream=\"app\",outcome=\"passed\"}";
        let mut open_files = Vec::new();
        eventually("every endpoint to be checked", || {
            open_files.push(gateway.open_files().len());
            (gateway.metric(passed) >= 10_000.0).then_some(())
        });
        assert_eq!(gateway.metric("forebay_upstream_health_checks_total{outcome=\"failed\"}"), 0.0);
        assert!(open_files.len() > 2, "it was looked at while they were checked");
        assert!(open_files.iter().all(|&files| files < 150), "{open_files:?} files");
    }
}

mod outliers {
    use super::*;

    /// Rules with which an endpoint is ejected soon and stays out for long.
    fn rules(rules: &str) -> String {
        format!("outlier_detection: {{ {rules}, interval: 1s, base_ejection: 1m, max_ejection: 1m }}")
    }

    #[test]
    fn who_cannot_be_connected_to_is_ejected_and_costs_nobody_anything_any_more() {
        let ([mut dead, _alive], setup) = before(&rules("connect_failures: 3"));
        dead.kill();
        let gateway = setup.start();
        let figures = under_load(&gateway, 2, || wait_ejected(&gateway, "connect_failures", 1.0));
        assert_eq!(figures.failed, [0_u16; 0], "others are asked instead");
        let failed = gateway.metric("forebay_upstream_connects_total{outcome=\"failed\"}");
        for _ in 0..20 {
            assert_eq!(gateway.client().get("/").status, 200);
        }
        assert_eq!(gateway.metric("forebay_upstream_connects_total{outcome=\"failed\"}"), failed);
    }

    #[test]
    fn who_answers_500_again_and_again_is_ejected() {
        let ([sick, _well], setup) = before(&rules("consecutive_5xx: 5"));
        sick.set(Mood::Failing(1));
        let gateway = setup.start();
        under_load(&gateway, 2, || wait_ejected(&gateway, "consecutive_5xx", 1.0));
        let shown: UpstreamDetail =
            serde_json::from_slice(&get(gateway.admin(), "/upstreams/app").body).expect("an upstream");
        let shown = &shown.endpoints[0];
        assert_eq!(
            (&*shown.status.state, shown.ejections, shown.ejected_for.as_deref()),
            ("ejected", 1, Some("consecutive_5xx"))
        );
        assert!(shown.ejected_seconds.is_some() && shown.why.contains("consecutive_5xx"));
        assert!((0..20).all(|_| gateway.client().get("/").status == 200));
    }

    #[test]
    fn who_takes_requests_and_never_answers_is_ejected() {
        let keys = rules("consecutive_gateway_errors: 3") + ", timeouts: { wait: 300ms }";
        let ([hung, _well], setup) = before(&keys);
        hung.set(Mood::Hung);
        let gateway = setup.route("retry: { on: [timeout] }").start();
        let figures = under_load(&gateway, 2, || wait_ejected(&gateway, "consecutive_gateway_errors", 1.0));
        assert_eq!(figures.failed, [0_u16; 0], "the route says that it may be asked again");
        let hung_with = hung.requests();
        assert!((0..20).all(|_| gateway.client().get("/").status == 200));
        assert_eq!(hung.requests(), hung_with);
    }

    #[test]
    fn one_of_three_that_fails_a_fifth_of_its_requests_stands_out() {
        let ([sick, _b, _c], setup) = before(&rules("success_rate: { requests: 10 }"));
        sick.set(Mood::Failing(5));
        let gateway = setup.start();
        under_load(&gateway, 3, || wait_ejected(&gateway, "success_rate", 1.0));
        assert!((0..20).all(|_| gateway.client().get("/").status == 200));
    }

    #[test]
    fn one_of_three_that_is_much_slower_stands_out() {
        let keys =
            rules("latency: { requests: 5, factor: 4, margin: 200ms }") + ", load_balancing: { policy: round_robin }";
        let ([slow, _b, _c], setup) = before(&keys);
        slow.set(Mood::Well(ms(400)));
        let gateway = setup.start();
        under_load(&gateway, 12, || wait_ejected(&gateway, "latency", 1.0));
        let slow_had = slow.requests();
        assert!((0..20).all(|_| gateway.client().get("/").status == 200));
        assert_eq!(slow.requests(), slow_had);
    }

    #[test]
    fn an_ejection_ends_and_who_fails_again_is_out_for_longer() {
        let keys = "outlier_detection: { consecutive_5xx: 3, base_ejection: 100ms, max_ejection: 400ms }";
        let ([sick, well], setup) = before(keys);
        sick.set(Mood::Failing(1));
        let gateway = setup.spawn();
        let ask = || gateway.client().get("/").status;
        eventually("three ejections", || {
            ask();
            gateway.stderr().contains("is ejected for 0.4 s").then_some(())
        });
        for length in ["0.1", "0.2", "0.4"] {
            assert!(gateway.stderr().contains(&format!("is ejected for {length} s")), "{}", gateway.stderr());
        }
        sick.set(Mood::Well(ms(0)));
        let (asked, others) = (sick.requests(), well.requests());
        eventually("it to be asked again", || {
            ask();
            (sick.requests() > asked + 5 && well.requests() > others).then_some(())
        });
        assert!((0..20).all(|_| ask() == 200));
    }

    #[test]
    fn no_more_than_the_share_is_ejected_however_bad_all_are() {
        let ([one, other], setup) = before(&rules("consecutive_5xx: 3, max_ejected: 50%"));
        one.set(Mood::Failing(1));
        other.set(Mood::Failing(1));
        let gateway = setup.start();
        under_load(&gateway, 2, || wait_ejected(&gateway, "consecutive_5xx", 1.0));
        let before = one.requests() + other.requests();
        assert!((0..20).all(|_| gateway.client().get("/").status == 500));
        assert_eq!(one.requests() + other.requests(), before + 20, "one of them is asked, as bad as it is");
        assert_eq!(gateway.metric("forebay_upstream_ejections_total"), 1.0);
    }

    #[test]
    fn a_check_that_connects_takes_back_who_was_ejected_for_not_being_there() {
        let keys = rules("connect_failures: 1") + ", health_check: { tcp: {}, interval: 2s, unhealthy_after: 100 }";
        let ([mut killed, _alive], setup) = before(&keys);
        let gateway = setup.start();
        gateway.wait_metric("forebay_upstream_health_checks_total{outcome=\"passed\"}", |passed| passed >= 2.0);
        killed.kill();
        under_load(&gateway, 2, || wait_ejected(&gateway, "connect_failures", 1.0));
        killed.restart();
        under_load(&gateway, 2, || killed.wait_requests(5));
    }
}

mod tiers {
    use super::*;

    /// Backends of which the last is a backup; failures are detected soon.
    fn with_backup<const N: usize>(more: &str) -> ([Moody; N], Setup) {
        let backends = [(); N].map(|()| Moody::well());
        let setup =
            Setup::endpoints(backends.iter().enumerate().map(|(number, backend)| {
                format!("{{ address: \"{}\", backup: {} }}", backend.address(), number + 1 == N)
            }));
        let check = "health_check: { tcp: {}, interval: 50ms, timeout: 5s, unhealthy_after: 1, healthy_after: 1 }";
        (backends, setup.upstream(check).upstream(&format!("load_balancing: {{ {more} }}")))
    }

    fn wait_checks(gateway: &Gateway, outcome: &str, count: f64) {
        let checks = format!("forebay_upstream_health_checks_total{{outcome=\"{outcome}\"}}");
        gateway.wait_metric(&checks, |checks| checks >= count);
    }

    #[test]
    fn a_backup_serves_while_the_first_cannot_and_gives_back() {
        let ([mut first, backup], setup) = with_backup("policy: round_robin");
        let gateway = setup.start();
        wait_checks(&gateway, "passed", 2.0);
        assert!((0..10).all(|_| gateway.client().get("/").status == 200));
        assert_eq!((first.requests(), backup.requests()), (10, 0));
        first.kill();
        wait_checks(&gateway, "failed", 1.0);
        assert!((0..10).all(|_| gateway.client().get("/").status == 200));
        assert_eq!((first.requests(), backup.requests()), (10, 10));
        first.restart();
        under_load(&gateway, 1, || first.wait_requests(5));
        let spilled = backup.requests();
        assert!((0..10).all(|_| gateway.client().get("/").status == 200));
        assert_eq!(backup.requests(), spilled);
    }

    #[test]
    fn what_a_degraded_tier_cannot_carry_spills_over() {
        // Two of four are left: with overprovisioning 1.4 they carry 70 of 100.
        let ([mut a, mut b, _c, _d, backup], setup) = with_backup("policy: random");
        let gateway = setup.start();
        wait_checks(&gateway, "passed", 5.0);
        a.kill();
        b.kill();
        wait_checks(&gateway, "failed", 4.0);
        eventually("the backup to serve", || {
            gateway.client().get("/");
            (backup.requests() > 0).then_some(())
        });
        let before = backup.requests();
        let mut client = gateway.client();
        assert!((0..400).all(|_| client.get("/").status == 200));
        let spilled = backup.requests() - before;
        assert!((70..170).contains(&spilled), "{spilled} of 400, where 120 are due");
    }

    #[test]
    fn all_are_asked_rather_than_too_few_unless_that_is_forbidden() {
        for (panic, status) in [("30%", 200), ("0%", 503)] {
            let keys = format!(
                "health_check: {{ http: {{ statuses: [418] }}, interval: 50ms, timeout: 5s }}, load_balancing: {{ panic: {panic} }}"
            );
            let (_backends, setup) = before::<3>(&keys);
            let gateway = setup.spawn();
            gateway.wait_metric("forebay_upstream_health_checks_total{outcome=\"failed\"}", |failed| failed >= 3.0);
            eventually("the roster to follow", || (gateway.client().get("/").status == status).then_some(()));
            gateway.wait_metric("forebay_upstream_panic{upstream=\"app\"}", |panic| {
                panic == f64::from(u8::from(status == 200))
            });
            assert_eq!(gateway.stderr().contains("requests go to all of them"), status == 200);
        }
    }

    #[test]
    fn who_comes_back_gets_little_at_first() {
        let keys = "load_balancing: { policy: round_robin, slow_start: 10m }, \
             outlier_detection: { consecutive_5xx: 2, base_ejection: 100ms }";
        let ([sick, well], setup) = before(keys);
        let gateway = setup.spawn();
        sick.set(Mood::Failing(1));
        under_load_of(&gateway, 20);
        sick.set(Mood::Well(ms(0)));
        gateway.says("is tried again after its ejection");
        let (slow, whole) = (sick.requests(), well.requests());
        under_load_of(&gateway, 300);
        let share = (sick.requests() - slow) as f64 / (sick.requests() - slow + well.requests() - whole) as f64;
        assert!((0.01..0.25).contains(&share), "{share} where half would be its share");
    }

    fn under_load_of(gateway: &crate::harness::Process, requests: usize) {
        let mut client = gateway.client();
        (0..requests).for_each(|_| drop(client.get("/")));
    }
}

mod mishaps {
    use super::*;

    /// Settings that detect failures by requests and by checks.
    const WATCHFUL: &str = "health_check: { http: {}, interval: 100ms, timeout: 400ms, unhealthy_after: 2, healthy_after: 1 }, \
         timeouts: { connect: 500ms, wait: 1s }, \
         outlier_detection: { connect_failures: 2, consecutive_gateway_errors: 3, base_ejection: 200ms, max_ejection: 1s }";
    const AGAIN: &str = "retry: { attempts: 3, on: [connect_error, reset, timeout], budget: 100%, budget_least: 20 }";

    #[test]
    fn a_killed_backend_fails_no_request_and_neither_does_its_return() {
        let ([mut one, two, three], setup) = before(WATCHFUL);
        let gateway = setup.route(AGAIN).start();
        let figures = under_load(&gateway, 6, || {
            one.wait_requests(20);
            one.kill();
            two.wait_requests(50);
            three.wait_requests(50);
            one.restart();
            one.wait_requests(20);
        });
        assert_eq!(figures.failed, [0_u16; 0], "of {}", figures.times.len());
    }

    #[test]
    fn a_backend_that_hangs_fails_no_request() {
        let ([one, two, three], setup) = before(WATCHFUL);
        let gateway = setup.route(AGAIN).start();
        let figures = under_load(&gateway, 6, || {
            one.wait_requests(20);
            one.set(Mood::Hung);
            two.wait_requests(50);
            three.wait_requests(50);
            gateway.wait_metric("forebay_upstream_health_checks_total{outcome=\"timeout\"}", |checks| checks >= 2.0);
        });
        assert_eq!(figures.failed, [0_u16; 0], "of {}", figures.times.len());
        let hung_with = one.requests();
        assert!((0..20).all(|_| gateway.client().get("/").status == 200));
        assert!(one.requests() - hung_with < 10, "it is asked by checks alone");
    }

    #[test]
    fn a_backend_that_vanishes_fails_no_request() {
        let ([mut one, two, three], setup) = before(WATCHFUL);
        let gateway = setup.route(AGAIN).start();
        let figures = under_load(&gateway, 6, || {
            one.wait_requests(20);
            one.vanish();
            two.wait_requests(50);
            three.wait_requests(50);
            gateway.wait_metric("forebay_upstream_health_checks_total{outcome=\"timeout\"}", |checks| checks >= 2.0);
            one.restart();
            one.wait_requests(20);
        });
        assert_eq!(figures.failed, [0_u16; 0], "of {}", figures.times.len());
    }

    #[test]
    fn a_backend_that_is_a_hundred_times_slower_does_not_slow_99_of_100_requests() {
        for policy in ["least_request", "peak_ewma"] {
            let (backends, setup) = before::<3>(&format!("load_balancing: {{ policy: {policy} }}"));
            backends.iter().for_each(|backend| backend.set(Mood::Well(ms(10))));
            let gateway = setup.start();
            let some = || backends[1..].iter().for_each(|backend| backend.wait_requests(400));
            let healthy = under_load(&gateway, 6, some).percentile(99);
            backends[0].set(Mood::Well(ms(1_000)));
            let figures = under_load(&gateway, 6, some);
            assert_eq!(figures.failed, [0_u16; 0]);
            assert!(figures.percentile(98) < 2 * healthy.max(ms(20)), "{policy}: {:?}", figures.percentile(98));
            let slow = figures.times.iter().filter(|time| **time >= ms(1_000)).count();
            assert!(slow * 100 < 2 * figures.times.len(), "{policy}: {slow} slow ones of {}", figures.times.len());
        }
    }

    #[test]
    fn when_all_are_gone_it_says_so_and_when_they_are_back_it_serves() {
        let (mut backends, setup) = before::<3>(&format!("{WATCHFUL}, load_balancing: {{ panic: 0% }}"));
        let gateway = setup.start();
        under_load(&gateway, 2, || backends[0].wait_requests(5));
        backends.iter_mut().for_each(Moody::kill);
        let refused =
            |status| eventually("all to be gone", || (gateway.client().get("/").status == status).then_some(()));
        refused(503);
        let is_refusal = |line: &LogLine| line.status() == 503;
        let line = eventually("a refusal", || gateway.log_lines(1).into_iter().find(is_refusal));
        assert_eq!(line.reason(), "select.no_endpoint");
        backends.iter_mut().for_each(Moody::restart);
        refused(200);
        let figures = under_load(&gateway, 2, || backends.iter().for_each(|backend| backend.wait_requests(5)));
        assert_eq!(figures.failed, [0_u16; 0]);
    }
}
