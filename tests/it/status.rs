//! `/status`: the gateway's current state for operators, `forebay top` and the status page.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use forebay::admin::status::{Document, RouteStatus, SlowClientStatus};

use crate::harness::client::{get, request};
use crate::harness::gateway::Watched;
use crate::harness::nginx::noise;
use crate::harness::{Client, Origin, Setup, eventually, ms, ok};

fn status(admin: SocketAddr) -> Document {
    let answer = get(admin, "/status");
    assert_eq!(answer.status, 200, "{}", answer.text());
    serde_json::from_slice(&answer.body).expect("a status document")
}

fn route(document: &Document, name: &str) -> RouteStatus {
    document.routes.iter().find(|route| route.route == name).cloned().unwrap_or_else(|| panic!("no {name}"))
}

/// Waits for a slow client that satisfies `is_it`.
fn slow_client(admin: SocketAddr, is_it: impl Fn(&SlowClientStatus) -> bool) -> SlowClientStatus {
    eventually("a slow client", || status(admin).slow_clients.longest.into_iter().find(|slow| is_it(slow)))
}

#[test]
fn the_status_tells_of_workers_listeners_phases_routes_and_upstreams() {
    let origin = Origin::named("origin");
    let routes = "{ name: one, match: { path: { prefix: /1 } }, upstream: app }\n{ name: idle, match: { path: { exact: /2 } }, upstream: app }";
    let gateway = Setup::before(&origin).routes(routes).start();
    for path in ["/1", "/1/2", "/nowhere"] {
        get(gateway.web(), path);
    }
    gateway.log_lines(3);
    gateway.wait_at_rest();
    let document = status(gateway.admin());
    assert_eq!((&*document.version, document.generation, &*document.state), (env!("CARGO_PKG_VERSION"), 1, "ready"));
    assert_eq!(document.workers.len(), 1);
    assert!(document.workers[0].wakeups > Some(0) && document.workers[0].lag.is_some(), "{:?}", document.workers);
    assert_eq!(document.phases.len(), forebay::phase::Phase::COUNT);
    let listener = &document.listeners[0];
    assert_eq!((&*listener.listener, listener.address.clone()), ("web", gateway.web().to_string()));
    assert_eq!((listener.accepted, listener.requests["http1"]), (3, 3));

    let names: Vec<_> = document.routes.iter().map(|route| (&*route.route, route.exchanges)).collect();
    assert_eq!(names, [("one", 2), ("_none", 1), ("idle", 0)], "the busiest first");
    let one = route(&document, "one");
    assert_eq!((one.upstreams, one.codes), (vec!["app".to_owned()], BTreeMap::from([("2xx".to_owned(), 2)])));
    assert_eq!(one.seconds.buckets.len(), document.bounds.exchange_seconds.len() + 1);
    assert_eq!(one.seconds.buckets.iter().sum::<u64>(), 2);
    assert!(one.p99_seconds >= one.p50_seconds && one.p50_seconds > Some(0.0));
    assert_eq!(document.upstreams[0].connects["new"] + document.upstreams[0].connects["reused"], 2);
    assert_eq!(document.refusals.get("route.no_match"), Some(&1));
}

#[test]
fn a_client_that_reads_slowly_is_named_with_what_waits_for_it() {
    let large = noise(4_000_000);
    let answer = ok(&large);
    let origin = Origin::answering(move |_| answer.clone());
    let gateway = Setup::before(&origin).start();
    let mut client = Client::slow(gateway.web());
    client.send(request("GET", "/large?secret=1", "", ""));
    let slow = slow_client(gateway.admin(), |slow| slow.phase == "write" && slow.target.is_some());
    assert_eq!((slow.route.as_deref(), slow.target.as_deref()), (Some("all"), Some("GET /large")));
    assert_eq!((&*slow.direction, slow.client), ("response", Some([127, 0, 0, 1].into())));
    assert!(slow.bytes > Some(1_000_000) && slow.silent_seconds <= slow.waited_seconds, "{slow:?}");
    assert!(status(gateway.admin()).spools.memory.response_bytes > 0);
    drop(client);
    gateway.wait_at_rest();
    assert!(status(gateway.admin()).slow_clients.longest.is_empty());
}

#[test]
fn a_client_that_sends_slowly_is_named_in_the_header_and_in_the_body() {
    let origin = Origin::answering(|request| ok(&request.body));
    let gateway = Setup::before(&origin).start();
    let mut client = gateway.client();
    client.send("POST /slow HTTP/1.1\r\nHost: test\r\n");
    let slow = slow_client(gateway.admin(), |slow| slow.phase == "header");
    assert_eq!((&*slow.direction, slow.route, slow.target, slow.bytes), ("request", None, None, None));
    client.dawdle(ms(50));
    client.send("Content-Length: 8\r\n\r\nhal");
    // The poll that lists the client names its request a moment later.
    let slow = slow_client(gateway.admin(), |slow| slow.phase == "buffer" && slow.target.is_some());
    assert_eq!((slow.target.as_deref(), slow.bytes), (Some("POST /slow"), Some(5)));
    client.send("fbody");
    assert_eq!(client.response().text(), "halfbody");
    eventually("nobody to be slow", || status(gateway.admin()).slow_clients.longest.is_empty().then_some(()));
}

#[test]
fn the_list_of_slow_clients_is_as_long_as_it_may_be() {
    let origin = Origin::named("origin");
    let gateway = Setup::before(&origin).start();
    let clients: Vec<Client> = (0..30)
        .map(|n| {
            let mut client = gateway.client();
            client.send(format!("POST /{n} HTTP/1.1\r\nHost: test\r\nContent-Length: 8\r\n\r\nhalf"));
            client
        })
        .collect();
    gateway.wait_metric("forebay_phase_active{phase=\"buffer\"}", |count| count == 30.0);
    let document = status(gateway.admin());
    assert_eq!((document.slow_clients.request, document.slow_clients.longest.len()), (30, 20));
    let waited: Vec<f64> = document.slow_clients.longest.iter().map(|slow| slow.waited_seconds).collect();
    assert!(waited.is_sorted_by(|a, b| a >= b), "{waited:?}");
    let fewer: Document = serde_json::from_slice(&get(gateway.admin(), "/status?slow=3&routes=0").body).unwrap();
    assert_eq!((fewer.slow_clients.longest.len(), fewer.routes.len(), fewer.routes_total), (3, 0, 1));
    assert_eq!(get(gateway.admin(), "/status?slow=many").status, 400);
    drop(clients);
}

#[test]
fn the_status_comes_again_and_again_to_whoever_stays() {
    let origin = Origin::named("origin");
    let gateway = Setup::before(&origin).admin("streams: 1").start();
    let mut wire = Client::connect(gateway.admin());
    wire.send(request("GET", "/status/events", "Accept: text/event-stream\r\n", ""));
    let mut wire = wire.into_wire();
    let head = wire.head().expect("an answer");
    assert_eq!((head.status(), head.value("content-type")), (200, Some("text/event-stream")));
    let mut text = String::new();
    while text.matches("event: status\ndata: {").count() < 2 {
        text.push_str(&String::from_utf8_lossy(&wire.exactly(1).0));
    }
    gateway.wait_metric("forebay_admin_streams", |count| count == 1.0);
    let second = get(gateway.admin(), "/status/events");
    assert_eq!((second.status, second.text().contains("admin.streams")), (503, true));
    assert_eq!(get(gateway.admin(), "/status").status, 200, "what does not go on is answered");
    drop(wire);
    gateway.wait_metric("forebay_admin_streams", |count| count == 0.0);
}

#[test]
fn an_upstream_says_who_waits_in_line_and_what_its_breaker_does() {
    let origin = Origin::scripted();
    let keys = "limits: { requests: 1 }, circuit_breaker: { consecutive: 1, open: 90s, max_open: 90s }";
    let gateway = Setup::before(&origin).upstream(keys).start();
    let upstream = || status(gateway.admin()).upstreams.remove(0);
    assert_eq!((upstream().inflight, upstream().queued, upstream().breaker.as_deref()), (0, 0, Some("closed")));
    let mut client = gateway.client();
    client.send(request("GET", "/", "", ""));
    let mut connection = origin.accept();
    connection.request();
    let mut second = gateway.client();
    second.send(request("GET", "/", "", ""));
    eventually("one to wait in line", || (upstream().queued == 1).then_some(()));
    assert_eq!((upstream().inflight, upstream().endpoints[0].inflight), (1, 1));
    drop(connection);
    assert_eq!(client.response().status, 502);
    eventually("an open breaker", || (upstream().breaker.as_deref() == Some("open")).then_some(()));
}

/// All fields that a document can have, at any depth.
fn fields(value: &serde_json::Value, found: &mut std::collections::BTreeSet<String>) {
    match value {
        serde_json::Value::Object(map) => {
            for (name, value) in map {
                found.insert(name.clone());
                // The keys of these maps come from the configuration or closed sets.
                if !["codes", "connections", "requests", "connects", "refusals", "states"].contains(&&**name) {
                    fields(value, found);
                }
            }
        }
        serde_json::Value::Array(items) => items.iter().for_each(|item| fields(item, found)),
        _ => {}
    }
}

#[test]
fn the_manual_names_every_field() {
    use forebay::admin::status::*;
    let document = Document {
        workers: vec![WorkerStatus {
            doing: Some(Doing::default()),
            lag: Some(Times::default()),
            ..Default::default()
        }],
        listeners: vec![Default::default()],
        phases: vec![Default::default()],
        routes: vec![RouteStatus { folded: true, ..Default::default() }],
        upstreams: vec![UpstreamStatus { endpoints: vec![Default::default()], ..Default::default() }],
        slow_clients: SlowStatus { longest: vec![Default::default()], ..Default::default() },
        ..Document::default()
    };
    let mut found = Default::default();
    fields(&serde_json::to_value(&document).expect("JSON"), &mut found);
    let manual = include_str!("../../conf/manual/status.md");
    for field in found {
        let named = [
            format!("`{field}`"),
            format!("…{field}`"),
            format!("`….{field}"),
            format!("`{field}[]`"),
            format!(".{field}`"),
        ];
        assert!(named.iter().any(|name| manual.contains(name)), "conf/manual/status.md says nothing of `{field}`");
    }
}

#[test]
fn filters_that_were_skipped_are_told_with_their_conditions() {
    let origin = Origin::named("origin");
    let filters = "{ headers: { request: { set: { X-A: b } } }, when: 'request.path == \"/a\"' }, request_id: {}";
    let gateway = Setup::before(&origin).filters(filters).start();
    for path in ["/a", "/b", "/c"] {
        assert_eq!(get(gateway.web(), path).status, 200);
    }
    let row = eventually("both to be counted", || {
        let row = route(&status(gateway.admin()), "all");
        (row.exchanges == 3).then_some(row)
    });
    let told: Vec<_> = row.conditional.iter().map(|it| (&*it.filter, &*it.when, it.skipped)).collect();
    assert_eq!(told, [("headers", "request.path == \"/a\"", 2)]);
}
