//! Whether endpoints are well: who says so, what follows, and that clients notice nothing.

use crate::harness::gateway::Watched;
use crate::harness::origin::{Closed, response};
use crate::harness::{Gateway, H2Origin, Nginx, Origin, Setup, eventually};

mod checks {
    use super::*;

    use std::net::TcpListener;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};

    /// A quick check by this probe.
    fn check(probe: &str) -> String {
        format!("health_check: {{ {probe}, interval: 20ms, timeout: 5s, unhealthy_after: 2, healthy_after: 2 }}")
    }

    /// Waits for so many checks of this outcome.
    fn wait_checks(gateway: &impl Watched, outcome: &str, count: f64) {
        let checks = format!("forebay_upstream_health_checks_total{{upstream=\"app\",outcome=\"{outcome}\"}}");
        gateway.wait_metric(&checks, |checks| checks >= count);
    }

    /// Waits until somebody is chosen again, or nobody any more.
    fn wait_status(gateway: &Gateway, status: u16) {
        eventually(&format!("an answer {status}"), || (gateway.client().get("/").status == status).then_some(()));
    }

    /// An origin that answers its checks like this while it is not well, and everything else in any case.
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
            let refused = gateway.log_lines(1).into_iter().find(|line| line.status() == 503).expect("a refusal");
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
    fn who_was_never_checked_takes_requests_or_not_as_it_is_written() {
        for (initial, status) in [("healthy", 200), ("unhealthy", 503)] {
            let origin = Origin::answering(|request| match request.target() {
                // Its answer to a check never ends.
                "/healthz" => b"HTTP/1.1 200 OK\r\nContent-Le".to_vec(),
                _ => response("200 OK", "", "served"),
            });
            let written = format!("health_check: {{ http: {{ path: /healthz }}, timeout: 1m, initial: {initial} }}");
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
            assert_eq!(strict.client().get("/protocol").status, 503, "{probe}");
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
        wait_checks(&gateway, "passed", 10_000.0);
        assert_eq!(gateway.metric("forebay_upstream_health_checks_total{outcome=\"failed\"}"), 0.0);
        assert!(gateway.open_files().len() < 150, "{} files", gateway.open_files().len());
    }
}
