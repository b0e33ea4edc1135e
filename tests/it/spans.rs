//! Traces: `traceparent` from the client to the endpoint, spans to a collector, the id in the log.

use std::net::SocketAddr;

use forebay::phase::Phase;

use crate::harness::client::request;
use crate::harness::collector::{Collector, Span};
use crate::harness::gateway::{Watched, read_lines};
use crate::harness::origin::{Closed, response};
use crate::harness::{Gateway, H2Client, Origin, Setup};

const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
const SPAN: &str = "00f067aa0ba902b7";

/// The tracing settings for this collector, with a short interval.
fn tracing(collector: SocketAddr, keys: &str) -> String {
    format!("tracing: {{ endpoint: \"http://{collector}\", interval: 20ms, {keys} }}")
}

/// A gateway that records all traces.
fn recording(origin: &Origin, collector: &Collector) -> Setup {
    Setup::before(origin).observability(&tracing(collector.address(), "sample: 100%"))
}

/// A client that is part of a trace requests `/`.
fn ask(gateway: &Gateway, traceparent: &str) {
    let fields = format!("traceparent: {traceparent}\r\ntracestate: vendor=value\r\n");
    assert_eq!(gateway.client().ask("GET", "/", &fields, "").status, 200);
}

/// The parts of `traceparent` in the last request that reached the origin.
fn told(origin: &Origin) -> Vec<String> {
    let requests = origin.requests();
    let parent = requests.last().expect("a request").head.value("traceparent").expect("a traceparent").to_owned();
    parent.split('-').map(str::to_owned).collect()
}

#[test]
fn an_exchange_is_a_span_with_its_attempt_and_its_phases_below() {
    let (origin, collector) = (Origin::named("origin"), Collector::start());
    let gateway = recording(&origin, &collector).start();
    gateway.client().get("/path?query");
    let spans = collector.exchange("/path");
    let (server, attempt) = (&spans[0], &spans[1]);
    assert_eq!((&*server.name, server.kind, server.parent.len()), ("GET all", Span::SERVER, 0));
    assert_eq!((&*attempt.name, attempt.kind, &attempt.parent), ("GET app", Span::CLIENT, &server.id));
    let below = |parent: &Span| {
        let below = spans.iter().filter(|span| span.kind == Span::INTERNAL && span.parent == parent.id);
        below.map(|span| span.name.clone()).collect::<Vec<_>>()
    };
    assert_eq!(below(server), ["header", "route", "select", "write", "finish"]);
    assert_eq!(below(attempt), ["connect", "send", "wait", "receive"]);
    let phases: u64 = spans.iter().filter(|span| span.kind == Span::INTERNAL).map(Span::nanos).sum();
    assert_eq!(phases, server.nanos(), "the phases add up");
    assert_eq!(told(&origin), ["00", &server.trace_id(), &attempt.span_id(), "01"]);
    assert_eq!(gateway.log_line().text("trace_id"), server.trace_id());
}

#[test]
fn spans_say_what_the_conventions_for_http_want() {
    let (origin, collector) = (Origin::named("origin"), Collector::start());
    let keys = "sample: 100%, service_name: edge, headers: { x-key: secret }";
    let gateway = Setup::before(&origin).observability(&tracing(collector.address(), keys)).start();
    gateway.client().ask("POST", "/path?query", "User-Agent: story/1\r\n", "12345");
    let spans = collector.exchange("/path");
    for (key, value) in [
        ("http.request.method", "POST"),
        ("http.response.status_code", "200"),
        ("url.scheme", "http"),
        ("url.query", "query"),
        ("server.address", "test"),
        ("network.protocol.version", "1.1"),
        ("client.address", "127.0.0.1"),
        ("user_agent.original", "story/1"),
        ("forebay.route", "all"),
    ] {
        assert_eq!(spans[0].text(key), value, "{key}");
    }
    assert_eq!(spans[1].text("server.port"), origin.address().port().to_string());
    assert_eq!(
        (spans[1].text("forebay.connection.reused"), spans[1].text("http.request.resend_count")),
        ("false".into(), String::new())
    );
    let export = collector.exports().remove(0);
    assert_eq!((export.target(), export.head.value("x-key")), ("/v1/traces", Some("secret")));
    assert!(collector.resources().contains(&"service.name=edge".to_owned()));
}

#[test]
fn a_trace_that_began_elsewhere_goes_on_here() {
    let (origin, collector) = (Origin::named("origin"), Collector::start());
    let setup = Setup::before(&origin).observability(&tracing(collector.address(), "sample: 0%"));
    let gateway = setup.more("trusted_proxies: [127.0.0.1]").start();
    ask(&gateway, &format!("00-{TRACE}-{SPAN}-01"));
    let spans = collector.exchange("/");
    assert_eq!((&*spans[0].trace_id(), &*spans[0].state), (TRACE, "vendor=value"));
    assert_eq!(spans[0].parent, [0x00, 0xf0, 0x67, 0xaa, 0x0b, 0xa9, 0x02, 0xb7]);
    assert_eq!(told(&origin), ["00", TRACE, &spans[1].span_id(), "01"]);
    assert_eq!(origin.request().head.value("tracestate"), Some("vendor=value"));
    assert_eq!(gateway.log_line().text("trace_id"), TRACE);
}

#[test]
fn a_trace_that_is_not_recorded_passes_as_it_came() {
    let (origin, collector) = (Origin::named("origin"), Collector::start());
    let gateway = recording(&origin, &collector).more("trusted_proxies: [127.0.0.1]").start();
    ask(&gateway, &format!("00-{TRACE}-{SPAN}-00"));
    assert_eq!(told(&origin), ["00", TRACE, SPAN, "00"]);
    assert_eq!(gateway.log_line().text("trace_id"), TRACE);
    gateway.client().get("/next");
    collector.exchange("/next");
    assert!(collector.spans().iter().all(|span| span.trace_id() != TRACE), "its client said that nobody records it");
}

#[test]
fn a_malformed_traceparent_is_replaced_and_its_state_is_gone() {
    let (origin, collector) = (Origin::named("origin"), Collector::start());
    let gateway = recording(&origin, &collector).start();
    ask(&gateway, &format!("00-{}-{SPAN}-01", TRACE.to_uppercase()));
    let spans = collector.exchange("/");
    assert_eq!(told(&origin), ["00", &spans[0].trace_id(), &spans[1].span_id(), "01"]);
    assert_ne!(spans[0].trace_id(), TRACE);
    assert_eq!(origin.request().head.value("tracestate"), None);
}

#[test]
fn a_stranger_cannot_have_its_requests_recorded_unless_that_is_said() {
    let (origin, collector) = (Origin::named("origin"), Collector::start());
    for (parent, spans) in [("", 0.0), ("parent: trusted_proxies", 0.0), ("parent: always", 11.0)] {
        let keys = tracing(collector.address(), &format!("sample: 0%, {parent}"));
        let gateway = Setup::before(&origin).observability(&keys).start();
        ask(&gateway, &format!("00-{TRACE}-{SPAN}-01"));
        assert_eq!(
            (gateway.log_line().text("trace_id") == TRACE, told(&origin)[3] == "01"),
            (spans > 0.0, spans > 0.0)
        );
        gateway.wait_metric("forebay_spans_total{outcome=\"exported\"}", |exported| exported == spans);
    }
}

#[test]
fn a_span_has_no_query_where_it_is_to_be_dropped() {
    let (origin, collector) = (Origin::named("origin"), Collector::start());
    let keys = tracing(collector.address(), "sample: 100%, query: drop");
    let gateway = Setup::before(&origin).observability(&keys).access_log("query: drop").start();
    gateway.client().ask("GET", "/login?token=secret", "Referer: http://test/?token=secret\r\n", "");
    let spans = collector.exchange("/login");
    assert_eq!((&*spans[0].text("url.path"), spans[0].text("url.query")), ("/login", String::new()));
    let line = gateway.log_line();
    assert_eq!((line.text("target"), line.text("referer")), ("/login", "http://test/"));
    assert_eq!(origin.request().target(), "/login?token=secret");
}

#[test]
fn nobodys_word_is_taken_for_it_where_that_is_said() {
    let (origin, collector) = (Origin::named("origin"), Collector::start());
    let setup = Setup::before(&origin).observability(&tracing(collector.address(), "sample: 0%, parent: never"));
    let gateway = setup.start();
    ask(&gateway, &format!("00-{TRACE}-{SPAN}-01"));
    let line = gateway.log_line();
    let told = told(&origin);
    assert_ne!(line.text("trace_id"), TRACE);
    assert_eq!((&*told[1], &*told[3]), (line.text("trace_id"), "00"), "a new trace, and nobody need record it");
    assert_eq!(gateway.metric("forebay_spans_total"), 0.0);
}

#[test]
fn the_share_that_is_written_is_recorded() {
    let (origin, collector) = (Origin::named("origin"), Collector::start());
    let setup = Setup::before(&origin).observability(&tracing(collector.address(), "sample: 50%"));
    let gateway = setup.start();
    let mut client = gateway.client();
    (0..200).for_each(|_| assert_eq!(client.get("/").status, 200));
    let flags =
        origin.requests().into_iter().map(|request| request.head.value("traceparent").expect("one").ends_with("01"));
    let recorded = flags.filter(|recorded| *recorded).count();
    // The standard deviation is 7.
    assert!((50..150).contains(&recorded), "{recorded} of 200");
    gateway.wait_metric("forebay_spans_total{outcome=\"exported\"}", |spans| spans == 11.0 * recorded as f64);
    let servers = collector.spans().iter().filter(|span| span.kind == Span::SERVER).count();
    assert_eq!(servers, recorded);
}

#[test]
fn each_attempt_is_seen_and_why_it_failed() {
    let (origin, closed, collector) = (Origin::named("origin"), Closed::refusing(), Collector::start());
    let setup =
        Setup::before_all(&[closed.address(), origin.address()]).upstream("load_balancing: { policy: round_robin }");
    let gateway = setup.observability(&tracing(collector.address(), "sample: 100%")).start();
    (0..2).for_each(|n| assert_eq!(gateway.client().get(&format!("/{n}")).status, 200));
    let spans = (0..2).map(|n| collector.exchange(&format!("/{n}"))).find(|spans| spans[2].kind == Span::CLIENT);
    let spans = spans.expect("one of the two was sent to the closed port first");
    let (first, second) = (&spans[1], &spans[2]);
    assert_eq!(
        (first.error(), &*first.text("forebay.endpoint")),
        (Some("connect.refused"), &*closed.address().to_string())
    );
    assert_eq!((second.error(), &*second.text("http.request.resend_count")), (None, "1"));
    assert!(first.ended_nanos <= second.begun_nanos);
    let connects: Vec<_> = spans.iter().filter(|span| span.name == "connect").map(|span| &span.parent).collect();
    assert_eq!(connects, [&first.id, &second.id]);
    assert_eq!(spans[0].error(), None, "the client saw nothing of it");
}

#[test]
fn a_failure_is_an_error_and_a_refusal_of_the_client_is_none() {
    let (origin, collector) = (Origin::answering(|_| response("503 Service Unavailable", "", "")), Collector::start());
    let routes = "{ name: one, match: { path: { exact: /one } }, upstream: app }";
    let gateway = recording(&origin, &collector).routes(routes).start();
    gateway.client().get("/one");
    gateway.client().get("/none");
    let failed = collector.exchange("/one");
    assert_eq!((failed[0].error(), &*failed[0].text("error.type")), (Some(""), "503"));
    let refused = collector.exchange("/none");
    assert_eq!((refused[0].error(), &*refused[0].text("forebay.reason")), (None, "route.no_match"));
    assert!(refused.iter().all(|span| span.kind != Span::CLIENT), "nobody was asked");
}

#[test]
fn an_upload_that_is_waited_for_shows_so() {
    let (origin, collector) = (Origin::named("origin"), Collector::start());
    let gateway = recording(&origin, &collector).start();
    let mut client = gateway.client();
    let upload = request("POST", "/upload", "", "12345");
    let (first, rest) = upload.split_at(upload.len() - 2);
    client.send(first);
    gateway.wait_phase(Phase::Buffer);
    client.send(rest);
    client.response();
    let spans = collector.exchange("/upload");
    let buffer = spans.iter().find(|span| span.name == "buffer").expect("the phase");
    let select = spans.iter().find(|span| span.name == "select").expect("the phase");
    assert_eq!((&buffer.parent, buffer.ended_nanos), (&spans[0].id, select.begun_nanos));
}

#[test]
fn streams_of_http2_are_traced_alike() {
    let (origin, collector) = (Origin::named("origin"), Collector::start());
    let gateway = recording(&origin, &collector).listener("protocols: [h2c]").start();
    H2Client::connect(gateway.web()).get("/h2");
    let spans = collector.exchange("/h2");
    assert_eq!(spans[0].text("network.protocol.version"), "2");
    assert_eq!(told(&origin)[1..3], [spans[0].trace_id(), spans[1].span_id()]);
}

#[test]
fn what_is_queued_is_exported_when_the_gateway_stops() {
    let (origin, collector) = (Origin::named("origin"), Collector::start());
    let keys = format!("tracing: {{ endpoint: \"http://{}\", sample: 100%, interval: 1m }}", collector.address());
    let mut gateway = Setup::before(&origin).observability(&keys).start();
    gateway.client().get("/last");
    gateway.log_lines(1);
    assert_eq!(collector.exports().len(), 0, "spans gather for a minute");
    gateway.stop();
    gateway.stopped();
    assert_eq!(collector.exchange("/last").len(), 11);
}

#[test]
fn a_collector_that_is_not_there_harms_nobody() {
    let (origin, closed) = (Origin::named("origin"), Closed::refusing());
    let keys = tracing(closed.address(), "sample: 100%, timeout: 100ms");
    let mut gateway = Setup::before(&origin).observability(&keys).start();
    let mut client = gateway.client();
    (0..50).for_each(|_| assert_eq!(client.get("/").status, 200));
    gateway.wait_metric("forebay_spans_total{outcome=\"failed\"}", |spans| spans >= 11.0);
    assert_eq!(gateway.metric("forebay_spans_total{outcome=\"exported\"}"), 0.0);
    gateway.stop();
    gateway.stopped();
}

#[test]
fn a_collector_that_does_not_answer_loses_spans_that_are_counted_and_holds_up_nobody() {
    let (origin, silent) = (Origin::named("origin"), Origin::scripted());
    let keys = tracing(silent.address(), "sample: 100%, queue: 2, timeout: 1s");
    let mut gateway = Setup::before(&origin).observability(&keys).start();
    let mut client = gateway.client();
    client.get("/first");
    let mut export = silent.accept();
    assert_eq!(export.request().target(), "/v1/traces");
    (0..50).for_each(|_| assert_eq!(client.get("/").status, 200));
    gateway.wait_metric("forebay_spans_total{outcome=\"dropped\"}", |spans| spans >= 11.0);
    gateway.wait_metric("forebay_spans_total{outcome=\"failed\"}", |spans| spans >= 11.0);
    gateway.stop();
    gateway.stopped();
}

#[test]
fn without_tracing_a_traceparent_passes_as_it_came_and_stands_in_the_log() {
    let origin = Origin::named("origin");
    let gateway = Setup::before(&origin).start();
    ask(&gateway, &format!("00-{TRACE}-{SPAN}-01"));
    assert_eq!(told(&origin), ["00", TRACE, SPAN, "01"]);
    ask(&gateway, "malformed");
    assert_eq!(told(&origin), ["malformed"]);
    let lines = gateway.log_lines(2);
    assert_eq!((lines[0].text("trace_id"), lines[1].has("trace_id")), (TRACE, false));
}

#[test]
fn the_combined_log_names_the_trace_too() {
    let origin = Origin::named("origin");
    let gateway = Setup::before(&origin).access_log("format: combined").start();
    ask(&gateway, &format!("00-{TRACE}-{SPAN}-01"));
    let line = read_lines(&gateway.log_file(), 1).remove(0);
    assert!(line.ends_with(&format!(" trace_id={TRACE}")), "{line}");
}

#[test]
fn what_a_filter_did_is_a_span_below_its_phase() {
    let (origin, collector) = (Origin::named("origin"), Collector::start());
    let auth = Origin::answering(|_| response("204 No Content", "", ""));
    let setup = recording(&origin, &collector).also("auth", &auth);
    let gateway = setup.filters("forward_auth: { upstream: auth, path: /check }").start();
    gateway.client().get("/path");
    let spans = collector.exchange("/path");
    let named = |name: &str| spans.iter().find(|span| span.name == name).unwrap_or_else(|| panic!("no {name}"));
    let (route, stage, call) = (named("route"), named("forward_auth request"), named("forward_auth auth"));
    assert_eq!((&stage.parent, stage.kind), (&route.id, Span::INTERNAL));
    assert_eq!((&call.parent, call.kind), (&route.id, Span::CLIENT));
    assert_eq!((&*stage.text("forebay.outcome"), &*call.text("forebay.outcome")), ("continue", "204"));
    assert_eq!(call.text("forebay.upstream"), "auth");
    assert!(call.nanos() <= stage.nanos(), "{} of {}", call.nanos(), stage.nanos());
}
