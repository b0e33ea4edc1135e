//! The end of an exchange: phases add up to the total in log and metrics, and all resources are released.

use forebay::phase::Phase;

use crate::harness::client::request;
use crate::harness::gateway::Watched;
use crate::harness::metrics::Scrape;
use crate::harness::{Gateway, H2Client, LogLine, Origin, Setup, ok};

/// Asserts that the phases of a log line add up to its total, within rounding.
fn adds_up(line: &LogLine) {
    let sum: f64 = Phase::ALL.into_iter().filter_map(|phase| line.phase(phase)).sum();
    let total = line.number("total_ms");
    assert!((sum - total).abs() <= 0.02, "the phases add up to {sum} ms of {total} ms: {line:?}");
}

/// Asserts that the phases in the metrics add up, within floating-point error.
fn metrics_add_up(gateway: &Gateway, route: &str, count: f64) {
    gateway.wait_metric(&format!("forebay_exchange_seconds_count{{route=\"{route}\"}}"), |n| n == count);
    let scrape = Scrape::of(gateway.admin());
    let phases = scrape.sum(&format!("forebay_phase_seconds_sum{{route=\"{route}\"}}"));
    let total = scrape.sum(&format!("forebay_exchange_seconds_sum{{route=\"{route}\"}}"));
    assert!(total > 0.0 && (phases - total).abs() < 1e-6, "{phases} s of {total} s");
}

#[test]
fn the_phases_of_an_exchange_add_up_to_its_total() {
    let origin = Origin::answering(|request| ok(request.target()));
    let gateway = Setup::before(&origin).listener("protocols: [http1, h2c]").start();
    let mut client = gateway.client();
    client.get("/first");
    client.ask("POST", "/second", "", "with a body");
    H2Client::connect(gateway.web()).get("/third");
    gateway.log_lines(3).iter().for_each(adds_up);
    metrics_add_up(&gateway, "all", 3.0);
}

#[test]
fn the_phases_of_an_exchange_that_failed_add_up_too() {
    let origin = Origin::scripted();
    let gateway = Setup::before(&origin).upstream("timeouts: { wait: 200ms }").start();
    assert_eq!(gateway.client().get("/hangs").status, 504);
    origin.accept();
    let mut client = gateway.client();
    client.send(request("GET", "/aborted", "", ""));
    let mut connection = origin.accept();
    connection.request();
    gateway.wait_phase(Phase::Wait);
    client.reset();
    gateway.log_lines(2).iter().for_each(adds_up);
    metrics_add_up(&gateway, "all", 2.0);
}

#[test]
fn an_exchange_passes_its_phases_in_order() {
    let origin = Origin::named("origin");
    let gateway = Setup::before(&origin).start();
    let mut client = gateway.client();
    client.get("/first");
    client.get("/second");
    use Phase::*;
    let expected = [Header, Route, Select, Connect, Send, Wait, Receive, Finish];
    let lines = gateway.log_lines(2);
    let mut first = lines[0].phases();
    assert_eq!(first.remove(0), Accept, "the first exchange of a connection bears its accept");
    for mut phases in [first, lines[1].phases()] {
        phases.retain(|phase| *phase != Write);
        assert_eq!(phases, expected);
    }
}

#[test]
fn an_exchange_that_no_upstream_is_asked_for_has_no_phases_of_one() {
    let origin = Origin::named("origin");
    let gateway = Setup::before(&origin).filters("respond: { status: 200, body: pong }").start();
    gateway.client().get("/");
    let line = gateway.log_line();
    for phase in [Phase::Select, Phase::Connect, Phase::Send, Phase::Wait, Phase::Receive] {
        assert_eq!(line.phase(phase), None, "{phase}");
    }
    adds_up(&line);
}

#[test]
fn idle_time_between_two_requests_belongs_to_neither() {
    let origin = Origin::named("origin");
    let gateway = Setup::before(&origin).start();
    let mut client = gateway.client();
    client.get("/first");
    client.dawdle(crate::harness::ms(300));
    client.get("/second");
    let line = gateway.log_lines(2).remove(1);
    assert!(line.number("total_ms") < 250.0, "{line:?}");
    adds_up(&line);
}

#[test]
fn what_forebay_itself_cost_is_more_than_nothing_and_less_than_the_total() {
    let origin = Origin::scripted();
    let (gateway, mut client, mut connection) = Setup::before(&origin).asked(&origin);
    connection.drip("HTTP/1.1 200", crate::harness::ms(20));
    connection.send(" OK\r\nContent-Length: 0\r\n\r\n");
    client.response();
    gateway.wait_metric("forebay_own_seconds_count{route=\"all\"}", |count| count == 1.0);
    let own = gateway.metric("forebay_own_seconds_sum{route=\"all\"}");
    let total = gateway.metric("forebay_exchange_seconds_sum{route=\"all\"}");
    assert!(own > 0.0 && own < total / 2.0, "{own} s of {total} s, most of which the origin took");
}

#[test]
fn nothing_is_active_when_all_is_done() {
    let origin = Origin::named("origin");
    let gateway = Setup::before(&origin).listener("protocols: [http1, h2c]").start();
    gateway.client().get("/");
    H2Client::connect(gateway.web()).get("/");
    gateway.log_lines(2);
    gateway.wait_metric("forebay_phase_active", |count| count == 0.0);
    gateway.wait_metric("forebay_client_connections", |count| count == 0.0);
}

#[test]
fn a_connection_goes_on_after_an_answer_of_every_kind() {
    let origin = Origin::answering(|request| match request.target() {
        "/204" => b"HTTP/1.1 204 No Content\r\n\r\n".to_vec(),
        "/304" => b"HTTP/1.1 304 Not Modified\r\nContent-Length: 99\r\n\r\n".to_vec(),
        "/chunked" => {
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\nX-Trailer: 1\r\n\r\n".to_vec()
        }
        _ if request.method() == "HEAD" => b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n".to_vec(),
        _ => ok("plain"),
    });
    let gateway = Setup::before(&origin).start();
    let mut client = gateway.client();
    for (method, path, status, body) in [
        ("GET", "/204", 204, ""),
        ("GET", "/304", 304, ""),
        ("HEAD", "/", 200, ""),
        ("GET", "/chunked", 200, "abc"),
        ("GET", "/", 200, "plain"),
    ] {
        let answer = client.ask(method, path, "", "");
        assert_eq!((answer.status, answer.text()), (status, body), "{method} {path}");
    }
    assert_eq!(origin.connections(), 1);
}
