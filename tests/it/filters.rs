//! Filters end to end: the built-in ones, and a custom one.
//!
//! The custom filter [`Toll`] is defined only here: it registers in one line, has its own YAML key with validation
//! and schema, can wait, sees every stage and can refuse at each.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use forebay::error::{BuildError, Refusal};
use forebay::filter::{Filter, FilterType, Outcome, Scope, Stages, Surroundings, Verdict};
use pingora::http::ResponseHeader;
use schemars::JsonSchema;
use serde::Deserialize;

use crate::harness::client::request;
use crate::harness::gateway::Watched;
use crate::harness::{Client, End, Gateway, H2Origin, Origin, Setup, eventually, ok};

/// An origin that returns the path it received, and a gateway with these filters in front of it.
fn filtered(filters: &str) -> (Origin, Gateway) {
    let origin = Origin::answering(|request| ok(request.target()));
    let gateway = Setup::before(&origin).filters(filters).start();
    (origin, gateway)
}

#[test]
fn request_id_names_each_request_to_the_origin_and_to_the_client() {
    let (origin, gateway) = filtered("request_id: { header: X-Request-Id, response: true }");
    let mut client = gateway.client();
    let told: Vec<String> = (0..2)
        .map(|_| {
            let answer = client.ask("GET", "/", "X-Request-Id: mine\r\n", "");
            answer.value("x-request-id").expect("an id").to_owned()
        })
        .collect();
    let seen: Vec<String> =
        origin.requests().iter().map(|r| r.value("x-request-id").expect("an id").to_owned()).collect();
    assert_eq!(told, seen);
    assert_ne!(seen[0], seen[1]);
    assert!(seen.iter().all(|id| id.len() == 32 && id.bytes().all(|b| b.is_ascii_hexdigit())), "{seen:?}");
}

#[test]
fn headers_are_removed_set_and_added_both_ways() {
    let (origin, gateway) = filtered(
        "headers: { request: { remove: [Cookie], set: { X-Edge: forebay }, add: { X-Many: '2' } },
                    response: { remove: [Content-Type], set: { X-Frame-Options: DENY }, add: { Vary: Cookie } } }",
    );
    let answer = gateway.client().ask("GET", "/", "Cookie: a=1\r\nX-Edge: spoofed\r\nX-Many: 1\r\n", "");
    assert_eq!((answer.value("x-frame-options"), answer.value("vary")), (Some("DENY"), Some("Cookie")));
    let request = origin.request();
    assert_eq!((request.value("cookie"), request.value("x-edge")), (None, Some("forebay")));
    assert_eq!(request.values("x-many"), ["1", "2"]);
}

#[test]
fn rewrite_changes_the_path_and_leaves_the_query() {
    let (_origin, gateway) = filtered("rewrite: { path: { prefix: { from: /api, to: /v1 } } }");
    let mut client = gateway.client();
    assert_eq!(client.get("/api/users?x=/api").text(), "/v1/users?x=/api");
    assert_eq!(client.get("/apis").text(), "/apis");

    let (_origin, gateway) = filtered("rewrite: { path: { regex: { pattern: '/users/([0-9]+)', to: '/u/$1' } } }");
    assert_eq!(gateway.client().get("/users/42?x").text(), "/u/42?x");
    assert_eq!(gateway.log_line().text("target"), "/users/42?x", "the log says what the client asked for");
}

#[test]
fn a_path_that_would_be_too_long_is_not_rewritten_but_refused() {
    let origin = Origin::named("origin");
    let rewrite = format!("rewrite: {{ path: {{ prefix: {{ from: /, to: /{} }} }} }}", "x".repeat(100));
    let gateway = Setup::before(&origin).listener("limits: { header_bytes: 256KiB }").filters(&rewrite).start();
    assert_eq!(gateway.client().get(&format!("/{}", "y".repeat(65_500))).status, 400);
    gateway.refused_once("route.rewrite");
    assert_eq!(origin.connections(), 0);
}

#[test]
fn a_request_without_a_host_is_not_redirected_to_one() {
    let (_origin, gateway) = filtered("redirect: { to: 'https://{host}/' }");
    let mut client = gateway.client();
    client.send("GET / HTTP/1.0\r\n\r\n");
    assert_eq!(client.response().status, 400);
    gateway.refused_once("route.redirect");
}

#[test]
fn redirect_sends_the_client_elsewhere_and_asks_no_origin() {
    let (origin, gateway) = filtered("redirect: { to: 'https://{host}{path_and_query}', status: 301 }");
    let mut client = gateway.client();
    let answer = client.get("/a?b=c");
    assert_eq!((answer.status, answer.value("location")), (301, Some("https://test/a?b=c")));
    let answer = client.ask("POST", "/", "", "a body that nobody reads");
    assert_eq!(answer.status, 301);
    // The body is discarded, or the connection is closed; it is never parsed as a request.
    match answer.value("connection") {
        Some("close") => client.closed(),
        _ => assert_eq!(client.get("/").status, 301),
    }
    assert_eq!(origin.connections(), 0);
    assert_eq!(gateway.log_lines(2)[0].reason(), "");
}

#[test]
fn respond_answers_itself_and_its_route_needs_no_upstream() {
    let origin = Origin::named("origin");
    let routes = "{ name: ping, match: { path: { exact: /ping } }, filters: [ respond: { status: 200, body: pong } ] }\n\
                  { name: all, upstream: app }";
    let gateway = Setup::before(&origin).routes(routes).start();
    let mut client = gateway.client();
    assert_eq!(client.get("/ping").text(), "pong");
    let head = client.ask("HEAD", "/ping", "", "");
    assert_eq!((head.status, head.value("content-length"), head.body.len()), (200, Some("4"), 0));
    assert_eq!(client.get("/").text(), "origin");
}

#[test]
fn rate_limit_refuses_what_comes_too_fast_and_says_when_to_come_again() {
    let (origin, gateway) = filtered("rate_limit: { key: { header: X-Key }, rate: 1/h, burst: 2 }");
    let mut client = gateway.client();
    let mut ask = |key: &str| client.ask("GET", "/", &format!("X-Key: {key}\r\n"), "");
    let statuses = [ask("a").status, ask("a").status];
    let refused = ask("a");
    assert_eq!((statuses, refused.status), ([200, 200], 429));
    let seconds: u64 = refused.value("retry-after").and_then(|s| s.parse().ok()).expect("Retry-After");
    assert!((1_000..=3_600).contains(&seconds), "{seconds}");
    assert_eq!(ask("b").status, 200, "another key has a limit of its own");
    assert_eq!(origin.requests().len(), 3);
    let line = gateway.log_lines(4).swap_remove(2);
    assert_eq!(line.status(), 429);
    gateway.refused_once("route.rate_limit");
}

#[test]
fn access_lets_in_whom_it_may_and_nobody_else() {
    let (origin, gateway) = filtered("access: { deny: [ 127.0.0.0/8 ] }");
    assert_eq!(gateway.client().get("/").status, 403);
    gateway.refused_once("route.access");
    assert_eq!(origin.connections(), 0);
    let (_origin, gateway) = filtered("access: { allow: [ 127.0.0.1/32 ] }");
    assert_eq!(gateway.client().get("/").status, 200);
}

#[test]
fn access_believes_a_trusted_proxy() {
    let origin = Origin::named("origin");
    let setup = Setup::before(&origin).filters("access: { allow: [ 10.0.0.0/8 ] }");
    let gateway = setup.more("trusted_proxies: [ 127.0.0.0/8 ]").start();
    let mut client = gateway.client();
    assert_eq!(client.ask("GET", "/", "X-Forwarded-For: 10.1.2.3\r\n", "").status, 200);
    assert_eq!(client.ask("GET", "/", "X-Forwarded-For: 10.1.2.3, 9.9.9.9\r\n", "").status, 403);
}

#[test]
fn filters_run_in_order_on_the_way_in_and_in_reverse_on_the_way_out() {
    let set = |n: u8| {
        format!("headers: {{ request: {{ set: {{ X-Last: '{n}' }} }}, response: {{ set: {{ X-Last: '{n}' }} }} }}")
    };
    let (origin, gateway) = filtered(&format!("{}, {}", set(1), set(2)));
    assert_eq!(gateway.client().get("/").value("x-last"), Some("1"));
    assert_eq!(origin.request().value("x-last"), Some("2"));
}

/// The stages that each toll saw, by name, because tests in one process must not share a list.
static SEEN: Mutex<BTreeMap<String, Vec<String>>> = Mutex::new(BTreeMap::new());

static UNPAID: Refusal = Refusal::new("route.toll", 402, "Pay first.");

/// A custom filter: records every stage, waits at each, adds a response field, and refuses at a given stage.
struct Toll(TollSettings);

/// Its settings.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct TollSettings {
    /// The name for its records.
    name: String,
    /// The stage at which it refuses.
    #[serde(default)]
    refuse_at: Option<String>,
    /// The stage at which it waits forever.
    #[serde(default)]
    hang_at: Option<String>,
    /// How many body chunks it holds back.
    #[serde(default)]
    hold: usize,
}

impl Toll {
    async fn stage(&self, stage: &str, detail: &str) -> Verdict {
        tokio::time::sleep(Duration::from_millis(1)).await;
        self.note(format!("{stage} {detail}"));
        if self.0.hang_at.as_deref() == Some(stage) {
            std::future::pending::<()>().await;
        }
        if self.0.refuse_at.as_deref() == Some(stage) { Verdict::from(&UNPAID) } else { Verdict::Continue }
    }

    fn note(&self, what: String) {
        SEEN.lock().unwrap().entry(self.0.name.clone()).or_default().push(what);
    }
}

#[async_trait]
impl Filter for Toll {
    fn stages(&self) -> Stages {
        Stages::ALL
    }

    async fn request(&self, scope: &mut Scope<'_>) -> Verdict {
        *scope.state = Some(Box::new(Vec::<u8>::new()));
        self.stage("request", &format!("{} by {}", scope.request.uri.path(), scope.facts.route)).await
    }

    async fn request_body(&self, _: &mut Scope<'_>, piece: &mut Option<Bytes>, end: bool) -> Verdict {
        self.stage("request_body", &shown(piece.as_ref(), end)).await
    }

    async fn response(&self, _: &mut Scope<'_>, response: &mut ResponseHeader) -> Verdict {
        response.insert_header("X-Toll", "paid").expect("a header field");
        self.stage("response", response.status.as_str()).await
    }

    async fn response_body(&self, scope: &mut Scope<'_>, piece: &mut Option<Bytes>, end: bool) -> Verdict {
        let detail = shown(piece.as_ref(), end);
        let held =
            scope.state.as_mut().and_then(|state| state.downcast_mut::<Vec<u8>>()).expect("the state of this exchange");
        held.extend(piece.iter().flatten().map(u8::to_ascii_uppercase));
        *piece = Some(if end || held.len() > self.0.hold { std::mem::take(held).into() } else { Bytes::new() });
        self.stage("response_body", &detail).await
    }

    fn end(&self, _: &mut Scope<'_>, outcome: Outcome) {
        self.note(format!("end {} {}", outcome.status, outcome.refusal.map_or("", |refusal| refusal.reason)));
    }
}

impl FilterType for Toll {
    const KEY: &'static str = "toll";
    const REFUSALS: &'static [&'static Refusal] = &[&UNPAID];
    type Settings = TollSettings;

    fn build(settings: &TollSettings, _: &Surroundings<'_>) -> Result<Self, BuildError> {
        if settings.name.is_empty() {
            return Err(BuildError::new("name", "a toll needs a name"));
        }
        Ok(Toll(settings.clone()))
    }
}

fn shown(piece: Option<&Bytes>, end: bool) -> String {
    let text = piece.map_or_else(|| "nothing".to_owned(), |piece| String::from_utf8_lossy(piece).into_owned());
    if end { format!("{text}, the end") } else { text }
}

/// A gateway with the toll on its route, in front of an origin.
fn tolled(origin: &Origin, settings: &str) -> Gateway {
    Setup::before(origin).filter::<Toll>().filters(&format!("toll: {{ {settings} }}")).start()
}

/// The stages that this toll saw, once its exchange has ended.
fn notes(name: &str) -> Vec<String> {
    eventually("the end of the exchange at the filter", || {
        let notes = SEEN.lock().unwrap().get(name).cloned().unwrap_or_default();
        notes.last().is_some_and(|last| last.starts_with("end")).then_some(notes)
    })
}

#[test]
fn a_strangers_filter_sees_every_stage_and_may_wait_at_each() {
    let origin = Origin::answering(|_| ok("answer"));
    let gateway = tolled(&origin, "name: stages");
    let answer = gateway.client().ask("POST", "/gate", "", "body");
    assert_eq!((answer.status, answer.text(), answer.value("x-toll")), (200, "ANSWER", Some("paid")));
    assert_eq!(origin.request().body, b"body");

    let notes = notes("stages");
    assert_eq!(notes[0], "request /gate by all");
    let stages: Vec<&str> = notes.iter().filter_map(|note| note.split(' ').next()).collect();
    assert!(
        stages.is_sorted_by_key(|stage| {
            ["request", "request_body", "response", "response_body", "end"].iter().position(|s| s == stage)
        }),
        "{notes:?}"
    );
    for (stage, text) in [("request_body ", "body"), ("response_body ", "answer")] {
        let pieces: Vec<&str> = notes.iter().filter_map(|note| note.strip_prefix(stage)).collect();
        let whole: String =
            pieces.iter().map(|p| p.trim_end_matches(", the end").trim_end_matches("nothing")).collect();
        assert_eq!(whole, text, "{notes:?}");
        assert_eq!(pieces.iter().filter(|piece| piece.ends_with(", the end")).count(), 1, "{notes:?}");
        assert!(pieces.last().is_some_and(|piece| piece.ends_with(", the end")), "{notes:?}");
    }
    assert!(notes.contains(&"response 200".to_owned()));
    assert_eq!(notes.last().map(String::as_str), Some("end 200 "));
}

#[test]
fn a_filter_that_waits_for_too_long_is_given_up_at_every_stage() {
    for stage in ["request", "request_body", "response", "response_body"] {
        let origin = Origin::answering(|_| ok("answer"));
        let toll = format!("toll: {{ name: hung-{stage}, hang_at: {stage} }}");
        let setup = Setup::before(&origin).filter::<Toll>().filters(&toll);
        let breaker = "circuit_breaker: { consecutive: 1 }";
        let gateway = setup.upstream(breaker).route("filter_timeout: 200ms").start();
        for _ in 0..2 {
            let mut client = gateway.client();
            client.send(request("POST", "/", "", "body"));
            let answer = client.try_response_to("POST");
            // The response header may have been sent before the body arrives.
            let cut = stage == "response_body" && answer.as_ref().is_none_or(|answer| answer.end == End::Cut);
            let refused = answer
                .as_ref()
                .is_some_and(|a| a.status == 504 && a.text().to_lowercase().contains("route.filter_timeout"));
            assert!(cut || refused, "{stage}: {answer:?}");
        }
        let reasons: Vec<String> = gateway.log_lines(2).iter().map(|line| line.reason().to_owned()).collect();
        assert_eq!(reasons, ["route.filter_timeout"; 2], "{stage}: no endpoint is accused");
        gateway.wait_metric("forebay_refusals_total{reason=\"route.filter_timeout\"}", |count| count == 2.0);
        gateway.wait_at_rest();
    }
}

#[test]
fn a_client_that_leaves_ends_the_wait_of_a_filter() {
    let leave: [fn(Client) -> Option<Client>; 2] = [
        |mut client| {
            client.end();
            Some(client)
        },
        |client| {
            client.reset();
            None
        },
    ];
    let stages = [
        ("request", "route.aborted"),
        ("request_body", "send.aborted"),
        ("response", "receive.aborted"),
        ("response_body", "receive.aborted"),
    ];
    for (stage, reason) in stages {
        let origin = Origin::answering(|_| ok("answer"));
        let toll = format!("toll: {{ name: left-{stage}, hang_at: {stage} }}");
        let setup = Setup::before(&origin).filter::<Toll>().filters(&toll);
        let gateway = setup.route("client: { half_close: abort }, filter_timeout: 10m").start();
        for (index, leave) in leave.into_iter().enumerate() {
            let mut client = gateway.client();
            client.send(request("POST", &format!("/{index}"), "", "body"));
            eventually("the filter to wait", || {
                let seen = SEEN.lock().unwrap();
                let of_stage = |note: &&String| note.split(' ').next() == Some(stage);
                let count = seen.get(&format!("left-{stage}"))?.iter().filter(of_stage).count();
                (count > index).then_some(())
            });
            let _kept = leave(client);
            assert_eq!(gateway.log_line_of(&format!("/{index}")).reason(), reason, "{stage}");
            gateway.wait_at_rest();
        }
    }
}

#[test]
fn a_client_that_ends_half_a_body_ends_the_wait_of_a_filter_and_one_with_a_whole_body_does_not() {
    let origin = Origin::answering(|_| ok("answer"));
    let setup = Setup::before(&origin).filter::<Toll>().filters("toll: { name: halved, hang_at: request }");
    let gateway = setup.route("filter_timeout: 10m").start();
    let waits = |count: usize| {
        eventually("the filter to wait", || (SEEN.lock().unwrap().get("halved")?.len() >= count).then_some(()));
    };
    let mut whole = gateway.client();
    whole.send(request("POST", "/whole", "", "body"));
    waits(1);
    whole.end();
    let mut half = gateway.client();
    half.send("POST /half HTTP/1.1\r\nHost: test\r\nContent-Length: 8\r\n\r\nhalf");
    waits(2);
    half.end();
    assert_eq!(gateway.log_line_of("/half").reason(), "route.aborted");
    assert_eq!(gateway.log_lines(0).len(), 1, "the other was looked at as often");
    whole.reset();
    assert_eq!(gateway.log_line_of("/whole").reason(), "route.aborted");
    gateway.wait_at_rest();
}

#[test]
fn a_strangers_filter_may_refuse_the_request() {
    let origin = Origin::named("origin");
    let gateway = tolled(&origin, "name: refuse-request, refuse_at: request");
    let answer = gateway.client().get("/");
    assert_eq!((answer.status, answer.text().contains("PAY FIRST.")), (402, true));
    assert_eq!(origin.connections(), 0);
    assert_eq!(notes("refuse-request").last().map(String::as_str), Some("end 402 route.toll"));
    assert_eq!(gateway.log_line().reason(), "route.toll");
    gateway.refused_once("route.toll");
}

#[test]
fn a_strangers_filter_may_refuse_the_request_body() {
    let origin = Origin::answering(|_| ok("too late"));
    let gateway = tolled(&origin, "name: refuse-body, refuse_at: request_body");
    assert_eq!(gateway.client().ask("POST", "/", "", "body").status, 402);
    assert!(origin.requests().iter().all(|request| request.end == End::Cut), "the origin took it for whole");
    assert_eq!(gateway.log_line().reason(), "route.toll");
}

#[test]
fn a_strangers_filter_that_refuses_the_request_body_waits_for_no_endpoint() {
    let hung = H2Origin::start();
    let setup = Setup::before_all(&[hung.address()]).filters("toll: { name: refuse-hung, refuse_at: request_body }");
    let upstream = "protocol: h2c, timeouts: { connect: 10m, send: 10m, wait: 10m, receive: 10m }";
    for mode in ["stream", "full"] {
        let route = format!("buffering: {{ request: {{ mode: {mode} }} }}");
        let gateway = setup.clone().upstream(upstream).route(&route).filter::<Toll>().start();
        let answer = gateway.client().ask("POST", "/hung", "", "body");
        assert_eq!((answer.status, answer.text().contains("PAY FIRST.")), (402, true), "{mode}");
        assert_eq!(gateway.log_line().reason(), "route.toll");
        gateway.wait_at_rest();
    }
}

#[test]
fn a_strangers_filter_may_refuse_the_response() {
    let origin = Origin::answering(|_| ok("secret"));
    let gateway = tolled(&origin, "name: refuse-response, refuse_at: response");
    let answer = gateway.client().get("/");
    assert_eq!((answer.status, answer.text().contains("secret")), (402, false));
    assert_eq!(gateway.log_line().reason(), "route.toll");
}

#[test]
fn a_strangers_filter_may_refuse_in_the_middle_of_the_response() {
    let origin = Origin::answering(|_| ok("secret"));
    let gateway = tolled(&origin, "name: refuse-piece, refuse_at: response_body");
    let mut client = gateway.client();
    client.send(request("GET", "/", "", ""));
    let answer = client.try_response_to("GET");
    if let Some(answer) = answer {
        assert!(answer.status == 402 || answer.end == End::Cut, "{answer:?}");
        assert!(!answer.text().contains("SECRET"));
    }
    assert_eq!(gateway.log_line().reason(), "route.toll");
    assert!(notes("refuse-piece").last().is_some_and(|last| last.ends_with("route.toll")));
}

#[test]
fn a_strangers_filter_may_hold_pieces_back() {
    let origin = Origin::scripted();
    let gateway = tolled(&origin, "name: hold, hold: 100");
    let mut client: Client = gateway.client();
    client.send(request("GET", "/", "", ""));
    let mut connection = origin.accept();
    connection.request();
    connection.send("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n");
    for piece in ["4\r\none \r\n", "4\r\ntwo \r\n", "5\r\nthree\r\n", "0\r\n\r\n"] {
        connection.send(piece);
    }
    let answer = client.response();
    assert_eq!((answer.text(), answer.end), ("ONE TWO THREE", End::Complete));
}

#[test]
fn a_strangers_filter_is_told_of_an_exchange_that_failed() {
    let origin = Origin::scripted();
    let gateway = tolled(&origin, "name: failed");
    let mut client = gateway.client();
    client.send(request("GET", "/", "", ""));
    origin.accept().close();
    assert_eq!(client.response().status, 502);
    assert_eq!(notes("failed").last().map(String::as_str), Some("end 502 wait.reset"));
}

const WRONG: &str = "\
listeners: [ { name: web, address: 127.0.0.1:0 } ]
upstreams: { app: { endpoints: [ { address: 127.0.0.1:3000 } ] } }
routes:
  - name: all
    upstream: app
    filters:
      - toll: { name: gate, refuse_att: request }
      - tol: { name: gate }
";

#[test]
fn a_strangers_filter_is_checked_with_line_and_column() {
    let report = Setup::before_all(&["127.0.0.1:1"]).filter::<Toll>().builder().parse("mine.yaml", WRONG);
    let report = report.expect_err("errors").to_string();
    assert!(report.contains("mine.yaml:7:"), "{report}");
    assert!(report.contains("refuse_att") && report.contains("refuse_at"), "{report}");
    assert!(report.contains("mine.yaml:8:") && report.contains("`toll`"), "the nearest known key: {report}");
}

#[test]
fn a_strangers_filter_that_cannot_be_built_is_shown_at_its_place() {
    let builder = Setup::before_all(&["127.0.0.1:1"]).filter::<Toll>().builder();
    let text =
        WRONG.replace("refuse_att", "refuse_at").replace("      - tol: { name: gate }\n", "").replace("gate", "''");
    let config = builder.parse("mine.yaml", &text).unwrap_or_else(|e| panic!("{e}"));
    let errors = builder.check(&config);
    assert_eq!(errors.len(), 1, "{errors:?}");
    assert_eq!(errors[0].path, "routes[0].filters[0].toll.name");
    let report = config.report(&errors).to_string();
    assert!(report.contains("mine.yaml:7:") && report.contains("a toll needs a name"), "{report}");
}

#[test]
fn a_strangers_filter_is_in_the_schema() {
    let schema = Setup::before_all(&["127.0.0.1:1"]).filter::<Toll>().builder().schema().to_string();
    assert!(schema.contains("\"toll\"") && schema.contains("\"refuse_at\""));
    assert!(!Setup::before_all(&["127.0.0.1:1"]).builder().schema().to_string().contains("\"toll\""));
}
