//! `/upstreams` and endpoint metrics: what operators see, and the operations on endpoints.

use std::net::SocketAddr;

use forebay::admin::upstreams::{Document, EndpointDetail, UpstreamDetail};

use crate::harness::client::{Client, get, request};
use crate::harness::gateway::Watched;
use crate::harness::metrics::Scrape;
use crate::harness::origin::Closed;
use crate::harness::wire::Response;
use crate::harness::{Gateway, Origin, Setup, eventually};

fn upstream(admin: SocketAddr) -> UpstreamDetail {
    let answer = get(admin, "/upstreams/app");
    assert_eq!(answer.status, 200, "{}", answer.text());
    serde_json::from_slice(&answer.body).expect("an upstream")
}

fn endpoint(admin: SocketAddr, address: impl ToString) -> EndpointDetail {
    let address = address.to_string();
    let found = upstream(admin).endpoints.into_iter().find(|endpoint| endpoint.status.endpoint == address);
    found.unwrap_or_else(|| panic!("no {address}"))
}

/// Runs an operation on an endpoint.
fn order(admin: SocketAddr, endpoint: impl ToString, what: &str) -> Response {
    let path = format!("/upstreams/app/endpoints/{}/{what}", endpoint.to_string());
    Client::connect(admin).ask("POST", &path, "", "")
}

/// The origins that respond to this many requests.
fn answers(gateway: &Gateway, count: usize) -> String {
    let mut client = gateway.client();
    (0..count).map(|_| client.get("/").text().to_owned()).collect()
}

#[test]
fn every_endpoint_is_shown_with_its_state_and_what_it_has() {
    let (origin, closed) = (Origin::scripted(), Closed::refusing());
    let setup = Setup::weighted(&[(&origin, 3)]).upstream("load_balancing: { policy: peak_ewma }");
    let (gateway, mut client, mut connection) = setup.asked(&origin);
    let busy = endpoint(gateway.admin(), origin.address());
    assert_eq!((&*busy.why, busy.available, busy.returned_seconds), ("nothing excludes it", true, None));
    let status = busy.status;
    assert_eq!((&*status.state, status.weight, status.inflight, status.selections), ("unknown", 3, 1, 1));
    assert_eq!((status.address, status.priority, status.latency_seconds), (origin.address().to_string(), 0, 0.0));
    connection.answer("done");
    client.response();
    eventually("it to be free", || (endpoint(gateway.admin(), origin.address()).status.inflight == 0).then_some(()));
    let shown = upstream(gateway.admin());
    assert_eq!((&*shown.policy, shown.available, shown.states["unknown"]), ("peak_ewma", 1, 1));
    assert!(shown.endpoints[0].status.latency_seconds > 0.0);

    let many = Setup::before_all(&[origin.address(), closed.address()]).start();
    let all: Document = serde_json::from_slice(&get(many.admin(), "/upstreams").body).expect("a document");
    assert_eq!(all.upstreams.iter().map(|shown| shown.endpoints.len()).collect::<Vec<_>>(), [2]);
}

#[test]
fn a_drained_endpoint_ends_what_it_has_and_gets_nothing_new_until_it_is_enabled() {
    let (slow, other) = (Origin::scripted(), Origin::named("other "));
    let setup = Setup::before_all(&[slow.address(), other.address()]);
    let gateway = setup.upstream("load_balancing: { policy: round_robin }").start();
    let mut clients = [gateway.client(), gateway.client()];
    clients.iter_mut().for_each(|client| client.send(request("GET", "/", "", "")));
    let mut connection = slow.accept();
    connection.request();

    let drained = order(gateway.admin(), slow.address(), "drain");
    assert_eq!(drained.status, 200, "{}", drained.text());
    assert_eq!(answers(&gateway, 10), "other ".repeat(10));
    let shown = endpoint(gateway.admin(), slow.address());
    assert_eq!((shown.drained, shown.available, shown.status.inflight), (true, false, 1));
    assert_eq!((&*shown.status.state, &*shown.why), ("draining", "the operator has drained it"));
    gateway.wait_metric("forebay_upstream_endpoints{upstream=\"app\",state=\"draining\"}", |count| count == 1.0);
    connection.answer("slow ");
    let mut texts = clients.map(|mut client| client.response().text().to_owned());
    texts.sort();
    assert_eq!(texts, ["other ", "slow "], "nobody was dropped");

    assert_eq!(order(gateway.admin(), slow.address(), "enable").status, 200);
    eventually("it to be chosen again", || {
        gateway.client().send(request("GET", "/", "", ""));
        (endpoint(gateway.admin(), slow.address()).status.inflight > 0).then_some(())
    });
}

#[test]
fn an_endpoint_gets_the_weight_that_is_ordered_and_then_its_own_again() {
    let [a, b] = ["a", "b"].map(Origin::named);
    let gateway = Setup::weighted(&[(&a, 1), (&b, 1)]).upstream("load_balancing: { policy: round_robin }").start();
    let share_of_a = |wanted: usize| {
        eventually("the share", || (answers(&gateway, 20).matches('a').count() == wanted).then_some(()));
    };
    share_of_a(10);
    let weighed = order(gateway.admin(), a.address(), "weight?weight=4");
    let weighed: Vec<EndpointDetail> = serde_json::from_slice(&weighed.body).expect("what has become of it");
    assert_eq!((weighed[0].status.weight, weighed[0].weight_ordered), (4, true));
    share_of_a(16);
    assert_eq!(order(gateway.admin(), a.address(), "weight?weight=configured").status, 200);
    share_of_a(10);
}

#[test]
fn what_cannot_be_ordered_is_told_and_changes_nothing() {
    let origin = Origin::named("origin");
    let gateway = Setup::before(&origin).start();
    let told = |method: &str, path: &str| {
        let answer = Client::connect(gateway.admin()).ask(method, path, "", "");
        (answer.status, answer.text().to_owned())
    };
    let here = format!("/upstreams/app/endpoints/{}", origin.address());
    for (method, path, status, says) in [
        ("GET", "/upstreams/shop", 404, "no upstream is called `shop`; there are: app"),
        ("POST", "/upstreams/shop/endpoints/x/drain", 404, "no upstream is called `shop`; there are: app"),
        ("POST", "/upstreams/app/endpoints/10.0.0.1:80/drain", 404, "`app` has no endpoint `10.0.0.1:80`"),
        ("POST", &format!("{here}/weight"), 400, "say which"),
        ("POST", &format!("{here}/weight?weight=0"), 400, "`0` is not a weight"),
        ("POST", &format!("{here}/weight?weight=-1"), 400, "`-1` is not a weight"),
        ("POST", &format!("{here}/weight?weight=9999999999"), 400, "`9999999999` is not a weight"),
        ("GET", &format!("{here}/drain"), 405, "only POST"),
    ] {
        let (is, text) = told(method, path);
        assert!(is == status && text.contains(says), "{method} {path}: {is} {text}");
    }
    let from_a_page = "Host: localhost\r\nOrigin: http://evil.example\r\n";
    let mut client = Client::connect(gateway.admin());
    client.send(format!("POST {here}/drain HTTP/1.1\r\n{from_a_page}\r\n"));
    assert_eq!(client.response().status, 403);
    assert!(endpoint(gateway.admin(), origin.address()).available);
}

#[test]
fn every_order_is_logged() {
    let origin = Origin::named("origin");
    let process = Setup::before(&origin).spawn();
    for (what, says) in [
        ("drain", "drained by order of the operator"),
        ("enable", "enabled by order of the operator"),
        ("weight?weight=3", "weighed by order of the operator"),
    ] {
        assert_eq!(order(process.admin(), origin.address(), what).status, 200);
        process.says(says);
    }
}

#[test]
fn failures_to_connect_are_counted_by_why_and_times_to_connect_and_to_answer_are_measured() {
    let (refusing, silent) = (Closed::refusing(), Closed::silent());
    let origin = Origin::named("origin");
    let setup = Setup::before_all(&[refusing.address(), silent.address(), origin.address()]);
    let gateway = setup.upstream("load_balancing: { policy: round_robin }, timeouts: { connect: 100ms }").start();
    answers(&gateway, 6);
    let failed = |why: &str| format!("forebay_upstream_connect_failures_total{{upstream=\"app\",reason=\"{why}\"}}");
    gateway.wait_metric(&failed("refused"), |count| count >= 2.0);
    gateway.wait_metric(&failed("timeout"), |count| count >= 2.0);
    assert_eq!(gateway.metric(&failed("tls")), 0.0);
    gateway.wait_metric("forebay_upstream_wait_seconds_count{upstream=\"app\"}", |count| count == 6.0);
    assert_eq!(gateway.metric("forebay_upstream_connect_seconds_count"), origin.connections() as f64);
}

#[test]
fn an_endpoint_is_counted_by_its_label_with_what_it_has() {
    let origin = Origin::scripted();
    let (gateway, _client, _connection) = Setup::before(&origin).asked(&origin);
    let of = |name: &str| format!("{name}{{upstream=\"app\",endpoint=\"{}\"}}", origin.address());
    let scrape = Scrape::of(gateway.admin());
    assert_eq!(scrape.samples(&of("forebay_endpoint_inflight")), [1.0]);
    assert_eq!(scrape.samples(&of("forebay_endpoint_available")), [1.0]);
    assert_eq!(scrape.samples("forebay_upstream_endpoints{upstream=\"app\",state=\"unknown\"}"), [1.0]);
    assert_eq!(scrape.samples("forebay_upstream_endpoints{upstream=\"app\",state=\"ejected\"}"), [0.0]);
    assert_eq!(scrape.samples("forebay_upstream_connect_failures_total{upstream=\"app\"}").iter().sum::<f64>(), 0.0);
}

#[test]
fn the_manual_names_every_field_of_an_upstream() {
    let shown = UpstreamDetail { endpoints: vec![EndpointDetail::default()], ..Default::default() };
    let shown = serde_json::to_value(&shown).expect("JSON");
    let fields =
        shown.as_object().expect("a map").keys().chain(shown["endpoints"][0].as_object().expect("a map").keys());
    let manual = include_str!("../../conf/manual/upstreams.md");
    for field in fields {
        assert!(manual.contains(&format!("`{field}`")), "conf/manual/upstreams.md says nothing of `{field}`");
    }
}
