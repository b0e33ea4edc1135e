//! Filters that call a configured upstream before they let a request pass.

use std::time::Duration;

use async_trait::async_trait;
use forebay::error::{BuildError, Refusal};
use forebay::filter::call::{Call, CallError, Caller};
use forebay::filter::{Filter, FilterType, Refused, Scope, Stages, Surroundings, Verdict};
use http::uri::PathAndQuery;
use http::{HeaderName, HeaderValue, Method};
use schemars::JsonSchema;
use serde::Deserialize;

use crate::harness::client::H2Client;
use crate::harness::gateway::Watched;
use crate::harness::h2_origin::H2Origin;
use crate::harness::origin::{Closed, response};
use crate::harness::{Gateway, Origin, Setup, ok};

/// `ask: { upstream: auth, path: /check }`: passes requests for which the upstream responds with 200, and copies
/// the response.
pub struct Ask {
    auth: Caller,
    settings: AskSettings,
}

static FORBIDDEN: Refusal = Refusal::new("route.ask_forbidden", 403, "The service says no.");
static SILENT: Refusal = Refusal::new("route.ask_silent", 503, "The service does not say.");

/// Its settings.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct AskSettings {
    /// The upstream to call.
    upstream: String,
    /// For what.
    path: String,
    /// How long it may take.
    #[serde(default)]
    millis: Option<u64>,
}

#[async_trait]
impl Filter for Ask {
    fn stages(&self) -> Stages {
        Stages::REQUEST
    }

    async fn request(&self, scope: &mut Scope<'_>) -> Verdict {
        let target: PathAndQuery = self.settings.path.parse().expect("a path");
        let mut call = Call::new(&Method::GET, target).expect("a call");
        call.answer_bytes_max = 100;
        call.deadline = self.settings.millis.map_or(call.deadline, Duration::from_millis);
        if let Some(user) = scope.request.headers.get("x-user") {
            call = call.with(HeaderName::from_static("x-user"), user.clone()).expect("room for a field");
        }
        let refused = |refusal, why: String| {
            let why = HeaderValue::from_str(&why).expect("a text");
            Verdict::Refuse(Refused { refusal, headers: vec![(HeaderName::from_static("x-why"), why)] })
        };
        match self.auth.send(call).await {
            Ok(answer) if answer.header.status == 200 => {
                if let Ok(said) = HeaderValue::from_bytes(&answer.body) {
                    scope.request.insert_header("X-Said", said).expect("room for a field");
                }
                Verdict::Continue
            }
            Ok(answer) => refused(&FORBIDDEN, answer.header.status.as_str().to_owned()),
            Err(error) => refused(&SILENT, error.to_string()),
        }
    }
}

impl FilterType for Ask {
    const KEY: &'static str = "ask";
    const REFUSALS: &'static [&'static Refusal] = &[&FORBIDDEN, &SILENT];
    type Settings = AskSettings;

    fn build(settings: &AskSettings, around: &Surroundings<'_>) -> Result<Self, BuildError> {
        let auth = around.caller(&settings.upstream).map_err(|error| error.under("upstream"))?;
        Ok(Ask { auth, settings: settings.clone() })
    }
}

/// A gateway with this filter, which calls `auth` with these upstream settings, in front of the origin.
fn asking(origin: &Origin, keys: &str, settings: &str) -> Setup {
    let setup = Setup::before(origin).filter::<Ask>().listener("protocols: [http1, h2c]").also_upstream("auth", keys);
    setup.filters(&format!("ask: {{ upstream: auth, path: /check{settings} }}"))
}

fn endpoint(address: impl ToString) -> String {
    format!("endpoints: [ {{ address: \"{}\" }} ]", address.to_string())
}

fn ended(gateway: &Gateway, outcome: &str, count: f64) {
    let counted = format!("forebay_filter_calls_total{{filter=\"ask\",upstream=\"auth\",outcome=\"{outcome}\"}}");
    gateway.wait_metric(&counted, |value| value == count);
}

/// The status, and the filter's text, for a request.
fn told(gateway: &Gateway) -> (u16, String) {
    let answer = gateway.client().get("/");
    (answer.status, answer.value("x-why").unwrap_or_default().to_owned())
}

#[test]
fn a_filter_asks_an_upstream_and_goes_by_its_answer() {
    let origin = Origin::named("app");
    let auth = Origin::answering(|request| match request.value("x-user") {
        Some("ada") => ok("ada is known"),
        _ => response("401 Unauthorized", "", "who?"),
    });
    let gateway = asking(&origin, &endpoint(auth.address()), "").start();
    let mut client = gateway.client();
    let mut ask = |user: &str| client.ask("GET", "/", &format!("X-User: {user}\r\nX-Said: forged\r\n"), "").status;
    assert_eq!([ask("ada"), ask("eve"), ask("ada")], [200, 403, 200]);
    assert_eq!(origin.requests()[0].value("x-said"), Some("ada is known"));
    let asked = &auth.requests()[0];
    let host = auth.address().to_string();
    assert_eq!((asked.target(), asked.value("host"), asked.value("connection")), ("/check", Some(&*host), None));
    assert_eq!((auth.connections(), origin.requests().len()), (1, 2), "the connection is kept");
    ended(&gateway, "answered", 3.0);
    gateway.wait_metric("forebay_filter_call_seconds_count{filter=\"ask\",upstream=\"auth\"}", |count| count == 3.0);
}

#[test]
fn a_call_goes_over_http_2_where_its_upstream_speaks_it() {
    let (origin, auth) = (Origin::named("app"), H2Origin::start());
    let keys = format!("{}, protocol: h2c", endpoint(auth.address()));
    let gateway = asking(&origin, &keys, "").start();
    // The response exceeds the filter's limit.
    assert_eq!(told(&gateway), (503, CallError::TooLarge.to_string()));
    assert_eq!(auth.paths(), ["/check"]);
    ended(&gateway, "too_large", 1.0);
}

#[test]
fn a_call_that_comes_to_nothing_says_why_and_ends_in_time() {
    let origin = Origin::named("app");
    let large = Origin::answering(|_| ok("x".repeat(101)));
    let gateway = asking(&origin, &endpoint(large.address()), "").start();
    assert_eq!(told(&gateway), (503, CallError::TooLarge.to_string()));
    ended(&gateway, "too_large", 1.0);

    let closed = Closed::refusing();
    let gateway = asking(&origin, &endpoint(closed.address()), "").start();
    assert_eq!(told(&gateway), (503, CallError::Failed.to_string()));
    ended(&gateway, "failed", 1.0);

    let silent = Origin::scripted();
    let gateway = asking(&origin, &endpoint(silent.address()), ", millis: 200").start();
    assert_eq!(told(&gateway), (503, CallError::Late.to_string()));
    ended(&gateway, "late", 1.0);

    let patient = Origin::scripted();
    let keys = format!("{}, timeouts: {{ wait: 100ms }}", endpoint(patient.address()));
    let gateway = asking(&origin, &keys, "").start();
    assert_eq!(told(&gateway), (503, CallError::Late.to_string()), "the upstream's own times hold as well");
    assert_eq!(origin.requests().len(), 0);
}

#[test]
fn a_kept_connection_that_died_unnoticed_is_replaced_once() {
    let origin = Origin::named("app");
    let auth = Origin::closing_after(1);
    let gateway = asking(&origin, &endpoint(auth.address()), "").start();
    for _ in 0..4 {
        assert_eq!(gateway.client().get("/").status, 200);
    }
    ended(&gateway, "answered", 4.0);
}

#[test]
fn a_client_that_goes_away_while_a_filter_waits_ends_the_call() {
    let (origin, auth) = (Origin::named("app"), Origin::scripted());
    let gateway = asking(&origin, &endpoint(auth.address()), "").start();
    let mut client = gateway.client();
    client.send("GET / HTTP/1.1\r\nHost: test\r\n\r\n");
    let mut asked = auth.accept();
    asked.request();
    client.reset();
    asked.closed();
    ended(&gateway, "dropped", 1.0);
    assert_eq!(gateway.log_line().reason(), "route.aborted");

    let over_http2 = H2Client::connect(gateway.web());
    let met = std::cell::RefCell::new(None);
    over_http2.abandon("/", "the call", || {
        let mut met = met.borrow_mut();
        *met = met.take().or_else(|| auth.try_accept());
        met.is_some()
    });
    ended(&gateway, "dropped", 2.0);
    assert_eq!(origin.requests().len(), 0);
}

#[test]
fn an_upstream_that_a_filter_names_and_that_there_is_not_is_an_error_of_check() {
    let builder = Setup::before_all(&["127.0.0.1:1"]).filter::<Ask>().builder();
    let text = "listeners: [ { name: web, address: 127.0.0.1:0 } ]\n\
                upstreams: { auth: { endpoints: [ { address: 127.0.0.1:1 } ] } }\n\
                routes:\n  - name: all\n    filters:\n      - ask: { upstream: aut, path: /check }\n    upstream: auth\n";
    let config = builder.parse("mine.yaml", text).unwrap_or_else(|e| panic!("{e}"));
    let errors = builder.check(&config);
    assert_eq!(errors[0].path, "routes[0].filters[0].ask.upstream");
    let report = config.report(&errors).to_string();
    assert!(report.contains("there is no upstream `aut`") && report.contains("did you mean `auth`?"), "{report}");
    assert!(report.contains("mine.yaml:6:26"), "{report}");
}
