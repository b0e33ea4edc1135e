//! Filters beyond request headers: they replace the endpoint's response, see the bodies of Forebay's own responses,
//! change trailers, and have their own names in metrics.

use async_trait::async_trait;
use bytes::Bytes;
use forebay::error::BuildError;
use forebay::filter::{Answer, Filter, FilterType, Scope, Stages, Surroundings, Verdict};
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode};
use pingora::http::ResponseHeader;
use schemars::JsonSchema;
use serde::Deserialize;

use crate::harness::gateway::Watched;
use crate::harness::origin::response;
use crate::harness::{Ask, End, H2Client, H2Origin, Origin, Protocol, Setup, ok};

/// `extra: { answers: 500 }`: a custom filter that acts at a late stage.
struct Extra(ExtraSettings);

/// Its settings.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[derive(Default)]
struct ExtraSettings {
    /// Replaces responses of endpoints that have this status.
    answers: Option<u16>,
    /// Appends this and the response status to each body chunk.
    appends: Option<String>,
    /// Appends this to the first trailer, and adds one.
    trails: Option<String>,
    /// Its own name.
    name: Option<String>,
}

#[async_trait]
impl Filter for Extra {
    fn stages(&self) -> Stages {
        let response = if self.0.answers.is_some() { Stages::RESPONSE } else { Stages::NONE };
        let body = if self.0.appends.is_some() { Stages::RESPONSE_BODY } else { Stages::NONE };
        let trailers = Stages::REQUEST_TRAILERS | Stages::RESPONSE_TRAILERS;
        response | body | if self.0.trails.is_some() { trailers } else { Stages::NONE }
    }

    fn label(&self) -> Option<&str> {
        self.0.name.as_deref()
    }

    async fn response(&self, scope: &mut Scope<'_>, response: &mut ResponseHeader) -> Verdict {
        if self.0.answers != Some(response.status.as_u16()) {
            return Verdict::Continue;
        }
        let kind = (http::header::CONTENT_TYPE, HeaderValue::from_static("text/plain"));
        let body = format!("in place of {} for {}", scope.facts.status, scope.request.uri.path());
        Verdict::Answer(Answer { status: StatusCode::OK, headers: vec![kind], body: body.into() })
    }

    async fn response_body(&self, scope: &mut Scope<'_>, piece: &mut Option<Bytes>, end: bool) -> Verdict {
        if let Some(appends) = self.0.appends.as_ref().filter(|_| end) {
            let more = format!("{appends}{}", scope.facts.status);
            *piece = Some([piece.as_deref().unwrap_or_default(), more.as_bytes()].concat().into());
        }
        Verdict::Continue
    }

    fn request_trailers(&self, _: &mut Scope<'_>, trailers: &mut HeaderMap) {
        self.trail(trailers);
    }

    fn response_trailers(&self, _: &mut Scope<'_>, trailers: &mut HeaderMap) {
        self.trail(trailers);
    }
}

impl Extra {
    fn trail(&self, trailers: &mut HeaderMap) {
        let Some(trails) = &self.0.trails else { return };
        if let Some(first) = trailers.values_mut().next() {
            *first = HeaderValue::from_str(&format!("{}{trails}", first.to_str().expect("text"))).expect("a value");
        }
        trailers.insert(HeaderName::from_static("x-more"), HeaderValue::from_static("added"));
    }
}

impl FilterType for Extra {
    const KEY: &'static str = "extra";
    type Settings = ExtraSettings;

    fn build(settings: &ExtraSettings, _: &Surroundings<'_>) -> Result<Self, BuildError> {
        Ok(Extra(settings.clone()))
    }
}

fn before(origin: &Origin, filters: &str) -> Setup {
    Setup::before(origin).filter::<Extra>().listener("protocols: [http1, h2c]").filters(filters)
}

#[test]
fn a_filter_answers_in_place_of_the_endpoint() {
    let origin = Origin::answering(|request| match request.target() {
        "/good" => ok("good"),
        _ => response("500 Internal Server Error", "X-Secret: 1\r\n", "a stack trace"),
    });
    let set = |name: &str| format!("headers: {{ response: {{ set: {{ {name}: '1' }} }} }}");
    let filters = format!("{}, extra: {{ answers: 500 }}, {}", set("X-Outer"), set("X-Inner"));
    let gateway = before(&origin, &filters).start();
    for protocol in Protocol::BOTH {
        let answer = Ask::get("/bad").over(protocol, gateway.web());
        assert_eq!((answer.status, answer.text()), (200, "in place of 500 for /bad"), "{protocol:?}");
        assert_eq!(answer.value("x-outer"), Some("1"), "filters outside of it see what it answers");
        assert_eq!((answer.value("x-inner"), answer.value("x-secret")), (None, None), "{protocol:?}");
        assert_eq!(Ask::get("/good").over(protocol, gateway.web()).text(), "good");
    }
    let mut client = gateway.client();
    let answer = client.get("/bad");
    assert_eq!((answer.end, answer.value("connection")), (End::Complete, Some("close")));
    client.closed();
    let posted = gateway.client().ask("POST", "/bad", "", "a body");
    assert_eq!((posted.status, posted.text()), (200, "in place of 500 for /bad"));
    let head = gateway.client().ask("HEAD", "/bad", "", "");
    assert_eq!((head.status, head.body.len()), (200, 0));
    let lines = gateway.log_lines(7);
    assert!(lines.iter().all(|line| (line.status(), line.reason()) == (200, "")), "{lines:?}");
    gateway.wait_at_rest();
}

#[test]
fn an_endpoint_whose_answer_is_replaced_is_judged_by_what_it_said() {
    let origin = Origin::answering(|_| response("500 Internal Server Error", "", ""));
    let setup = before(&origin, "extra: { answers: 500 }");
    let gateway = setup.upstream("circuit_breaker: { consecutive: 2 }").start();
    let statuses = [(); 3].map(|()| gateway.client().get("/").status);
    assert_eq!(statuses, [200, 200, 503], "the breaker has counted two failures");
}

#[test]
fn a_filter_answers_in_place_of_a_refusal() {
    let origin = Origin::named("app");
    let gateway = before(&origin, "extra: { answers: 403 }, access: { allow: ['192.0.2.1'] }").start();
    let answer = gateway.client().get("/");
    assert_eq!((answer.status, answer.text()), (200, "in place of 403 for /"));
    gateway.refused_once("route.access");
}

#[test]
fn bodies_of_answers_of_our_own_pass_the_filters_of_bodies() {
    let origin = Origin::answering(|_| response("500 Internal Server Error", "", "trace"));
    let respond = "respond: { body: hello }";
    let gateway = before(&origin, &format!("extra: {{ appends: '!' }}, {respond}")).start();
    for protocol in Protocol::BOTH {
        let answer = Ask::get("/").over(protocol, gateway.web());
        assert_eq!((answer.text(), answer.value("content-length")), ("hello!200", Some("9")), "{protocol:?}");
    }
    let head = gateway.client().ask("HEAD", "/", "", "");
    assert_eq!((head.status, head.value("content-length")), (200, None), "nobody knows how long it would be");

    let gateway = before(&origin, "extra: { appends: '!' }, access: { allow: ['192.0.2.1'] }").start();
    let refused = gateway.client().get("/");
    assert!(refused.status == 403 && refused.text().ends_with("!403"), "{refused:?}");
    let replaced = "extra: { appends: '!' }, extra: { answers: 500 }, extra: { appends: '?' }";
    let gateway = before(&origin, replaced).start();
    assert_eq!(
        gateway.client().get("/").text(),
        "in place of 500 for /!200",
        "the inner one has nothing to do with it"
    );
    let gateway = before(&origin, "extra: { appends: '!' }").start();
    assert_eq!(gateway.client().get("/").text(), "trace!500", "the status is known while a body passes");
}

#[test]
fn a_filter_changes_the_trailers_of_requests_and_answers() {
    let origin = H2Origin::start();
    let setup = Setup::before_all(&[origin.address()]).upstream("protocol: h2c").listener("protocols: [http1, h2c]");
    let gateway = setup.filter::<Extra>().filters("extra: { trails: '!' }").start();
    for protocol in Protocol::BOTH {
        let mut trailers = Ask::get("/announced").over(protocol, gateway.web()).trailers;
        trailers.sort();
        assert_eq!(trailers, ["x-more: added", "x-trailer: the end!"], "{protocol:?}");
    }
    let client = H2Client::connect(gateway.web());
    let post = http::Request::post("http://test/request-trailers").body(()).expect("a request");
    let (answer, mut body) = client.begin(post, false);
    body.send_data("body".into(), false).expect("a stream");
    let sent = HeaderMap::from_iter([(HeaderName::from_static("x-sum"), HeaderValue::from_static("1"))]);
    body.send_trailers(sent).expect("a stream");
    let told = client.step(async move {
        let mut body = answer.await.expect("an answer").into_body();
        let piece = body.data().await.expect("a body").expect("a piece");
        String::from_utf8(piece.to_vec()).expect("text")
    });
    assert!(told.contains("x-sum: 1!") && told.contains("x-more: added"), "{told}");
}

#[test]
fn trailers_of_an_endpoint_of_http_1_pass_the_filter_as_well() {
    let origin = Origin::answering(|_| {
        let fields = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTrailer: X-Trailer\r\n\r\n";
        format!("{fields}4\r\nbody\r\n0\r\nX-Trailer: the end\r\n\r\n").into_bytes()
    });
    let gateway = before(&origin, "extra: { trails: '!' }").start();
    let mut trailers = Ask::get("/").over(Protocol::Http1, gateway.web()).trailers;
    trailers.sort();
    assert_eq!(trailers, ["x-more: added", "x-trailer: the end!"]);
}

#[test]
fn a_filter_has_its_own_name_in_metrics() {
    let origin = Origin::named("app");
    let named = "{ extra: { answers: 599, name: extra_one }, when: 'response.code == 599' }, extra: { answers: 599 }";
    let gateway = before(&origin, named).start();
    assert_eq!(gateway.client().get("/").status, 200);
    gateway.wait_metric("forebay_filter_skipped_total{filter=\"extra_one\",route=\"all\"}", |count| count == 1.0);
    gateway.wait_metric("forebay_filter_poll_seconds_count{filter=\"extra\"}", |count| count == 1.0);
}
