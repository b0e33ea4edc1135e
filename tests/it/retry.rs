//! Retries over real sockets: which failed requests are sent again, by the rules of a route.

use std::sync::atomic::{AtomicBool, Ordering};

use forebay::origin::Running;
use forebay::phase::Phase;

use crate::harness::client::request;
use crate::harness::gateway::Watched;
use crate::harness::origin::{Closed, first_fails, response};
use crate::harness::{Ask, Gateway, H2Origin, Origin, Protocol, Setup, ok};

/// Two built-in origins behind a route with these rules; the first selected one responds once as for `path`.
fn behind(path: &str, rules: &str) -> ([Running; 2], Gateway) {
    let origins = first_fails(path);
    let setup = Setup::before_all(&origins.each_ref().map(Running::address));
    let gateway = setup.listener("protocols: [http1, h2c]").route(&format!("retry: {{ {rules} }}")).start();
    (origins, gateway)
}

/// An origin with this response to its first request, and `ok` to all others.
fn at_first(answer: Vec<u8>) -> Origin {
    let first = AtomicBool::new(true);
    Origin::answering(move |_| if first.swap(false, Ordering::Relaxed) { answer.clone() } else { ok("ok") })
}

fn made(gateway: &Gateway, reason: &str, count: f64) {
    gateway.wait_metric(&format!("forebay_retries_total{{upstream=\"app\",reason=\"{reason}\"}}"), |n| n == count);
}

fn refused(gateway: &Gateway, reason: &str, count: f64) {
    gateway
        .wait_metric(&format!("forebay_retries_refused_total{{upstream=\"app\",reason=\"{reason}\"}}"), |n| n == count);
}

#[test]
fn a_status_that_the_route_names_goes_to_the_next_endpoint_and_nothing_of_it_to_the_client() {
    for protocol in Protocol::BOTH {
        let (origins, gateway) = behind("/status/503", "on: [503]");
        let answer = Ask::get("/bytes/100").over(protocol, gateway.web());
        assert_eq!((answer.status, answer.length), (200, 100));
        assert_eq!(origins.each_ref().map(Running::requests), [1, 1]);
        let line = gateway.log_line();
        assert_eq!((line.status(), line.number("attempts"), line.reason()), (200, 2.0, ""));
        made(&gateway, "status", 1.0);
    }
}

#[test]
fn an_upload_is_replayed_after_a_status_that_the_route_names() {
    for protocol in Protocol::BOTH {
        let (_origins, gateway) = behind("/status/502", "on: [502]");
        Ask::put(1 << 20).over(protocol, gateway.web()).arrived(1 << 20, "content-length: 1048576");
        assert_eq!(gateway.log_line().number("attempts"), 2.0);
        gateway.wait_at_rest();
    }
}

#[test]
fn a_status_that_the_route_does_not_name_is_an_answer_like_others() {
    let (_origins, gateway) = behind("/status/503", "attempts: 3");
    assert_eq!(gateway.client().get("/").status, 503);
    assert_eq!(gateway.log_line().number("attempts"), 1.0);
}

#[test]
fn where_every_endpoint_was_tried_its_own_answer_goes_to_the_client() {
    let busy = || Origin::answering(|_| response("503 Service Unavailable", "X-Said: busy\r\n", "come again"));
    let origins = [busy(), busy()];
    let setup = Setup::before_all(&origins.each_ref().map(Origin::address));
    let gateway = setup.route("retry: { attempts: 10, on: [503] }").start();
    let answer = gateway.client().get("/");
    assert_eq!((answer.status, answer.value("x-said"), answer.text()), (503, Some("busy"), "come again"));
    let line = gateway.log_line();
    assert_eq!((line.number("attempts"), line.reason()), (2.0, ""));
    refused(&gateway, "no_endpoint", 1.0);
}

#[test]
fn there_are_no_more_attempts_than_the_route_allows() {
    let origins = [(); 3].map(|()| Origin::answering(|_| response("503 Busy", "", "")));
    let setup = Setup::before_all(&origins.each_ref().map(Origin::address));
    let gateway = setup.route("retry: { attempts: 2, on: [503] }").start();
    assert_eq!(gateway.client().get("/").status, 503);
    assert_eq!(origins.iter().map(|origin| origin.requests().len()).sum::<usize>(), 2);
    refused(&gateway, "attempts", 1.0);
}

#[test]
fn a_post_is_not_sent_again_for_its_status_unless_the_route_says_so() {
    let (origins, gateway) = behind("/status/503", "on: [503]");
    assert_eq!(gateway.client().ask("POST", "/", "", "pay").status, 503);
    assert_eq!(origins.each_ref().map(Running::requests).iter().sum::<u64>(), 1);
    refused(&gateway, "not_idempotent", 1.0);

    let (_origins, gateway) = behind("/status/503", "on: [503], non_idempotent: true");
    assert_eq!(gateway.client().ask("POST", "/echo", "", "pay").text(), "pay");
}

#[test]
fn what_took_too_long_is_sent_again_only_where_the_route_says_so() {
    for (on, status, attempts) in [("timeout", 200, 2.0), ("reset", 504, 1.0)] {
        let origins = first_fails("/fault/hang");
        let setup = Setup::before_all(&origins.each_ref().map(Running::address));
        let setup = setup.upstream("timeouts: { wait: 200ms }").route(&format!("retry: {{ on: [{on}] }}"));
        let gateway = setup.start();
        assert_eq!(gateway.client().get("/bytes/1").status, status);
        assert_eq!(gateway.log_line().number("attempts"), attempts);
    }
}

#[test]
fn a_hanging_header_is_sent_again_where_the_route_says_so() {
    let origins = first_fails("/fault/slow-header");
    let setup = Setup::before_all(&origins.each_ref().map(Running::address)).upstream("timeouts: { wait: 200ms }");
    let gateway = setup.route("retry: { on: [timeout] }").start();
    assert_eq!(gateway.client().get("/bytes/1").status, 200);
    made(&gateway, "timeout", 1.0);
}

#[test]
fn an_answer_that_breaks_off_before_any_of_it_has_left_is_asked_for_again() {
    for fault in ["/fault/half", "/fault/half-chunked"] {
        let origins = first_fails(fault);
        let setup = Setup::before_all(&origins.each_ref().map(Running::address));
        let gateway = setup.route("buffering: { response: { mode: full } }").start();
        let answer = Ask::get("/bytes/100").over(Protocol::Http1, gateway.web());
        assert_eq!((answer.status, answer.length), (200, 100), "{fault}");
        made(&gateway, "reset", 1.0);
    }
}

/// So large that its beginning is sent before its end arrives; otherwise it would be retried.
#[test]
fn an_answer_of_which_a_part_has_left_is_not_asked_for_again() {
    let (origins, gateway) = behind("/fault/half/2MiB", "attempts: 3");
    assert_eq!(gateway.client().get("/").status, 200);
    assert_eq!(gateway.log_line().reason(), "receive.reset");
    assert_eq!(origins.each_ref().map(Running::requests).iter().sum::<u64>(), 1);
    refused(&gateway, "answer_begun", 1.0);
}

#[test]
fn a_body_that_was_not_kept_cannot_be_sent_again() {
    let origins = first_fails("/fault/reset/200000");
    let setup = Setup::before_all(&origins.each_ref().map(Running::address));
    let gateway = setup.route("buffering: { request: { mode: stream } }").start();
    assert_eq!(Ask::put(1 << 20).over(Protocol::Http1, gateway.web()).status, 502);
    refused(&gateway, "not_replayable", 1.0);
}

#[test]
fn a_short_body_that_is_streamed_is_sent_again() {
    let origins = first_fails("/status/503");
    let setup = Setup::before_all(&origins.each_ref().map(Running::address)).route("retry: { on: [503] }");
    let gateway = setup.route("buffering: { request: { mode: stream } }").start();
    Ask::put(1000).over(Protocol::Http1, gateway.web()).arrived(1000, "content-length: 1000");
    assert_eq!(gateway.log_line().number("attempts"), 2.0);
}

#[test]
fn the_same_endpoint_is_asked_again_where_the_route_says_so() {
    let origin = at_first(response("503 Busy", "", ""));
    let gateway = Setup::before(&origin).route("retry: { on: [503], same_endpoint: true }").start();
    assert_eq!(gateway.client().get("/").text(), "ok");
    assert_eq!(origin.requests().len(), 2);
}

#[test]
fn an_endpoint_that_refuses_connections_for_a_moment_is_asked_again_where_the_route_says_so() {
    let closed = Closed::refusing();
    let rules = "retry: { same_endpoint: true, backoff: { base: 1ms, max: 1ms } }";
    let gateway = Setup::before_all(&[closed.address()]).route(rules).start();
    assert_eq!(gateway.client().get("/").status, 502);
    let line = gateway.log_line();
    assert_eq!((line.number("attempts"), line.reason()), (3.0, "connect.refused"));
    made(&gateway, "connect_error", 2.0);
    refused(&gateway, "attempts", 1.0);
}

#[test]
fn the_pause_that_an_endpoint_asks_for_is_kept() {
    let origin = at_first(response("503 Busy", "Retry-After: 1\r\n", ""));
    let rules = "retry: { on: [503], same_endpoint: true, backoff: { max: 2s } }";
    let gateway = Setup::before(&origin).route(rules).start();
    assert_eq!(gateway.client().get("/").text(), "ok");
    let waited = gateway.log_line().phase(Phase::Select).expect("time in select");
    assert!((995.0..3_000.0).contains(&waited), "{waited} ms");
}

#[test]
fn an_endpoint_that_asks_for_a_longer_pause_than_the_route_has_is_not_asked_again() {
    let origin = at_first(response("503 Busy", "Retry-After: 60\r\n", "later"));
    let gateway = Setup::before(&origin).route("retry: { on: [503], same_endpoint: true }").start();
    let answer = gateway.client().get("/");
    assert_eq!((answer.status, answer.value("retry-after"), answer.text()), (503, Some("60"), "later"));
    refused(&gateway, "retry_after", 1.0);
}

#[test]
fn of_what_an_upstream_has_under_way_only_so_much_is_sent_again() {
    let origin = Origin::scripted();
    let rules = "retry: { same_endpoint: true, attempts: 2, budget: 0%, budget_least: 1 }";
    let (gateway, mut first, connection) = Setup::before(&origin).route(rules).asked(&origin);
    connection.close();
    let mut again = origin.accept();
    again.request();

    let mut second = gateway.client();
    second.send(request("GET", "/second", "", ""));
    let mut connection = origin.accept();
    connection.request();
    connection.close();
    assert_eq!(second.response().status, 502, "the first one's repetition is all there may be");
    refused(&gateway, "budget", 1.0);

    again.answer("at last");
    assert_eq!(first.response().text(), "at last");
}

#[test]
fn a_request_whose_kept_connection_dies_under_it_is_sent_again_whatever_the_rules() {
    let origin = Origin::scripted();
    let (gateway, mut client, mut kept) = Setup::before(&origin).route("retry: { attempts: 1, on: [] }").asked(&origin);
    kept.answer("kept");
    assert_eq!(client.response().text(), "kept");

    client.send(request("GET", "/", "", ""));
    kept.request();
    kept.close();
    let mut fresh = origin.accept();
    fresh.request();
    fresh.answer("fresh");
    assert_eq!(client.response().text(), "fresh");
    made(&gateway, "stale", 1.0);
}

#[test]
fn a_fresh_connection_that_breaks_off_after_a_kept_one_did_is_a_failure() {
    let origin = Origin::scripted();
    let (gateway, mut client, mut kept) = Setup::before(&origin).asked(&origin);
    kept.answer("kept");
    client.response();
    client.send(request("GET", "/", "", ""));
    kept.request();
    kept.reset();
    let mut fresh = origin.accept();
    fresh.request();
    fresh.reset();
    assert_eq!(client.response().status, 502);
    assert_eq!(gateway.log_lines(2)[1].reason(), "wait.reset");
}

#[test]
fn what_an_http_2_endpoint_says_it_has_not_begun_is_sent_again_even_if_it_is_a_post() {
    for protocol in Protocol::BOTH {
        let origin = H2Origin::start();
        let setup = Setup::before_all(&[origin.address()]).upstream("protocol: h2c");
        let gateway = setup.listener("protocols: [http1, h2c]").start();
        Ask::post(1000).to("/refused-once").over(protocol, gateway.web()).arrived(1000, "content-length: 1000");
        assert_eq!(origin.paths().len(), 2);
        made(&gateway, "unprocessed", 1.0);
    }
}

#[test]
fn a_grpc_call_that_finds_its_service_unavailable_is_made_again() {
    let origin = H2Origin::start();
    let setup = Setup::before_all(&[origin.address()]).upstream("protocol: h2c").listener("protocols: [h2c]");
    let rules = "retry: { on: [grpc_unavailable], non_idempotent: true, same_endpoint: true }";
    let gateway = setup.route(rules).start();
    let call = Ask::post(100).to("/unavailable-once").grpc().chunked();
    let answer = call.over(Protocol::Http2, gateway.web());
    assert_eq!((answer.status, answer.length, &answer.trailers[..]), (200, 100, &["grpc-status: 0".to_owned()][..]));
    made(&gateway, "grpc", 1.0);
}

#[test]
fn a_client_that_goes_away_during_a_pause_is_not_served_any_more() {
    let origin = at_first(response("503 Busy", "Retry-After: 1\r\n", ""));
    let rules = "retry: { on: [503], same_endpoint: true, backoff: { max: 2s } }";
    let gateway = Setup::before(&origin).route(rules).start();
    let mut client = gateway.client();
    client.send(request("GET", "/", "", ""));
    made(&gateway, "status", 1.0);
    client.reset();
    let line = gateway.log_line();
    assert_eq!((line.status(), line.number("attempts")), (499, 1.0));
    gateway.wait_metric("forebay_phase_active", |count| count == 0.0);
}

#[test]
fn each_attempt_that_came_to_nothing_is_in_the_log() {
    let (closed, busy) = (Closed::refusing(), Origin::answering(|_| response("503 Busy", "", "")));
    let setup = Setup::before_all(&[closed.address(), busy.address()]).route("retry: { on: [connect_error, 503] }");
    // The refusing one would be ejected if it were chosen first five times in a row.
    let gateway = setup.upstream("outlier_detection: { connect_failures: unlimited }").start();
    // After both were chosen first, each result has occurred.
    let logged = crate::harness::eventually("a request to both", || {
        gateway.client().get("/");
        gateway.log_lines(1).into_iter().find(|line| line.number("attempts") == 2.0 && line.status() == 502)
    });
    let failed: Vec<_> =
        logged.list("failed").iter().map(|one| (one["phase"].as_str(), one["reason"].as_str())).collect();
    let expected = [(Some("wait"), Some("status 503")), (Some("connect"), Some("connect.refused"))];
    assert_eq!(failed, expected);
    assert_eq!(logged.list("failed")[0]["endpoint"], busy.address().to_string());
    assert!(logged.list("failed").iter().all(|one| one["ms"].as_f64().is_some_and(|ms| ms < 10_000.0)));
}

#[test]
fn an_exchange_without_trouble_has_no_list_of_failures() {
    let origin = Origin::named("well");
    let gateway = Setup::before(&origin).start();
    gateway.client().get("/");
    assert!(!gateway.log_line().has("failed"));
}

#[test]
fn a_sick_upstream_is_not_finished_off_by_retries() {
    let origins = [(); 3].map(|()| Origin::answering(|_| response("503 Busy", "", "")));
    let setup = Setup::before_all(&origins.each_ref().map(Origin::address));
    let gateway = setup.route("retry: { attempts: 3, on: [503], budget: 20%, budget_least: 0 }").start();
    for _ in 0..20 {
        assert_eq!(gateway.client().get("/").status, 503);
    }
    // With one request at a time, a fifth of it rounds down to zero.
    assert_eq!(origins.iter().map(|origin| origin.requests().len()).sum::<usize>(), 20);
    refused(&gateway, "budget", 20.0);
}

#[test]
fn no_idempotent_request_fails_while_endpoints_close_kept_connections_as_requests_come() {
    let origins = [1, 3].map(Origin::closing_after);
    let gateway = Setup::before_all(&origins.each_ref().map(Origin::address)).start();
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                let mut client = gateway.client();
                (0..50).for_each(|_| assert_eq!(client.get("/").text(), "ok"));
            });
        }
    });
    assert!(gateway.metric("forebay_retries_total{reason=\"stale\"}") >= 10.0, "hardly any of them was closed");
}

#[test]
fn a_client_that_leaves_between_two_attempts_ends_the_exchange() {
    let busy = Origin::answering(|_| response("503 Service Unavailable", "Retry-After: 50\r\n", ""));
    let rules = "retry: { on: [503], same_endpoint: true, backoff: { max: 60s } }";
    let gateway = Setup::before(&busy).route(rules).start();
    let mut client = gateway.client();
    client.send(request("GET", "/", "", ""));
    made(&gateway, "status", 1.0);
    gateway.wait_phase(Phase::Select);
    client.reset();
    let line = gateway.log_line();
    assert_eq!((line.status(), line.reason(), line.number("attempts")), (499, "select.aborted", 1.0));
    gateway.refused_once("select.aborted");
}
