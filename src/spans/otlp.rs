//! Converts traces to spans and exports them with OTLP over HTTP, on its own thread.
//!
//! An exchange is a span of kind SERVER; its attempts are child spans of kind CLIENT. Phases are INTERNAL spans
//! below their attempt, or else below the exchange; filter steps are below their phase, and requests sent by
//! filters are of kind CLIENT. Names and attributes follow the OpenTelemetry semantic conventions for HTTP where
//! they exist, and otherwise begin with `forebay.`. Work of a connection before its first exchange is not included.

use std::borrow::Cow;
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use http::{Method, Uri};
use opentelemetry::trace::{SpanContext, SpanKind, Status, TraceFlags, TraceState};
use opentelemetry::{InstrumentationScope, KeyValue};
use opentelemetry_otlp::{Protocol, SpanExporter, WithExportConfig, WithHttpConfig};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::trace::{SpanData, SpanExporter as _};
use tokio::runtime::{Builder, Runtime};

use super::queue::Queue;
use super::{Attempt, SpanId, TraceData};
use crate::config::server::Tracing;
use crate::metrics::{Metrics, SpanMetrics};
use crate::party::wait::{NoClient, within};
use crate::phase::Phase;

/// Spans per export, unless a single exchange has more.
const BATCH_SPANS: usize = 512;

/// Starts the thread `spans`, which ends when the queue is closed.
pub fn start(settings: &Tracing, queue: Arc<Queue>, metrics: SpanMetrics) -> Result<(), String> {
    let (mut exporter, runtime) = (exporter(settings)?, runtime().map_err(|error| error.to_string())?);
    let resource = Resource::builder_empty().with_attributes([
        KeyValue::new("service.name", settings.service_name.clone()),
        KeyValue::new("service.version", Metrics::VERSION),
    ]);
    exporter.set_resource(&resource.build());
    let scope = InstrumentationScope::builder("forebay").with_version(Metrics::VERSION).build();
    let (gather, patience) = (settings.interval.0, settings.timeout.0);
    let mut sender = Sender { exporter, runtime, patience, metrics, failing: false };
    let run = move || {
        while let Some(traces) = queue.take(gather) {
            let mut batch = Vec::with_capacity(BATCH_SPANS);
            for trace in traces {
                spans(trace, &scope, &mut batch);
                if batch.len() >= BATCH_SPANS {
                    sender.send(std::mem::take(&mut batch));
                }
            }
            sender.send(batch);
        }
        queue.ended();
    };
    let started = std::thread::Builder::new().name("spans".to_owned()).spawn(run);
    started.map(drop).map_err(|error| error.to_string())
}

fn exporter(settings: &Tracing) -> Result<SpanExporter, String> {
    let written = settings.endpoint.parse::<Uri>().map_err(|error| error.to_string())?;
    let endpoint = settings.endpoint.trim_end_matches('/');
    let endpoint = if written.path() == "/" { format!("{endpoint}/v1/traces") } else { settings.endpoint.clone() };
    let builder = SpanExporter::builder().with_http().with_protocol(Protocol::HttpBinary).with_endpoint(endpoint);
    let headers = settings.headers.iter().map(|(name, value)| (name.clone(), value.clone())).collect();
    let built = builder.with_timeout(settings.timeout.0).with_headers(headers).build();
    built.map_err(|error| error.to_string())
}

/// The runtime of the thread's connections.
fn runtime() -> io::Result<Runtime> {
    Builder::new_current_thread().enable_all().build()
}

/// The state of the thread.
struct Sender {
    exporter: SpanExporter,
    runtime: Runtime,
    patience: Duration,
    metrics: SpanMetrics,
    /// Whether the last export failed; only the first failure and the first success are logged.
    failing: bool,
}

impl Sender {
    fn send(&mut self, batch: Vec<SpanData>) {
        let count = batch.len() as u64;
        if count == 0 {
            return;
        }
        let export = async { within(self.patience, NoClient::Export, self.exporter.export(batch)).await };
        let failure = match self.runtime.block_on(export) {
            Some(Ok(())) => None,
            Some(Err(error)) => Some(error.to_string()),
            None => Some(format!("the collector has not answered within {:?}", self.patience)),
        };
        match &failure {
            None => self.metrics.exported.inc_by(count),
            Some(_) => self.metrics.failed.inc_by(count),
        }
        match &failure {
            Some(error) if !self.failing => tracing::warn!("spans cannot be exported, they are lost: {error}"),
            None if self.failing => tracing::info!("spans can be exported again"),
            _ => {}
        }
        self.failing = failure.is_some();
    }
}

/// Converts one exchange to spans.
fn spans(trace: TraceData, scope: &InstrumentationScope, into: &mut Vec<SpanData>) {
    let state = trace.state.as_ref().and_then(|state| state.to_str().ok()?.parse().ok()).unwrap_or_default();
    let (ended, when) = trace.ended;
    let form = Form { trace: &trace, state, scope, ended, when };
    let notes = &trace.notes;
    let begun = trace.phases().next().map_or(ended, |span| span.begin.tick.at);
    let context = trace.context;

    let mut server = form.span(context.span, context.parent, SpanKind::Server, trace.server_name(), begun, ended);
    server.parent_span_is_remote = context.parent.is_some();
    server.attributes = trace.server_attributes();
    server.status = trace.server_status();
    into.push(server);

    for (index, attempt) in notes.attempts.iter().enumerate() {
        let (name, until) = (format!("{} {}", method(&trace.method), attempt.upstream), attempt.ended.unwrap_or(ended));
        let mut span = form.span(attempt.span, Some(context.span), SpanKind::Client, name, attempt.begun, until);
        span.attributes = attempt.attributes(&trace.method, index);
        span.status = attempt.outcome();
        into.push(span);
    }
    let mut phases: Vec<(Instant, SpanId)> = Vec::new();
    for visit in trace.phases() {
        let (phase, since, until) = (visit.phase, visit.begin.tick.at, visit.end.tick.at);
        let of_attempt = matches!(phase, Phase::Connect | Phase::Send | Phase::Wait | Phase::Receive);
        let attempt = notes.attempts.iter().rev().find(|attempt| of_attempt && attempt.begun <= since);
        let parent = attempt.map_or(context.span, |attempt| attempt.span);
        let id = SpanId::random();
        phases.push((since, id));
        let mut span = form.span(id, Some(parent), SpanKind::Internal, phase.name(), since, until);
        let own = visit.end.own.saturating_sub(visit.begin.own);
        span.attributes.push(KeyValue::new("forebay.own_seconds", own.as_secs_f64()));
        let worker = visit.begin.tick.cycle.or(visit.end.tick.cycle).map(|cycle| cycle.worker as i64);
        span.attributes.extend(worker.map(|worker| KeyValue::new("forebay.worker", worker)));
        into.push(span);
    }
    for step in trace.journal.steps().0 {
        let phase = phases.iter().rev().find(|(since, _)| *since <= step.begin);
        let parent = phase.map_or(context.span, |(_, id)| *id);
        let kind = if step.upstream.is_some() { SpanKind::Client } else { SpanKind::Internal };
        let name = format!("{} {}", step.filter, step.upstream.as_deref().unwrap_or(step.stage));
        let mut span = form.span(SpanId::random(), Some(parent), kind, name, step.begin, step.begin + step.took);
        span.attributes.extend([
            KeyValue::new("forebay.filter", step.filter),
            KeyValue::new("forebay.stage", step.stage),
            KeyValue::new("forebay.outcome", step.outcome.clone().into_owned()),
        ]);
        let upstream = step.upstream.as_deref().map(|upstream| KeyValue::new("forebay.upstream", upstream.to_owned()));
        span.attributes.extend(upstream);
        if step.times > 1 {
            span.attributes.push(KeyValue::new("forebay.pieces", i64::from(step.times)));
        }
        into.push(span);
    }
}

/// Common data of all spans of an exchange.
struct Form<'s> {
    trace: &'s TraceData,
    state: TraceState,
    scope: &'s InstrumentationScope,
    ended: Instant,
    when: SystemTime,
}

impl Form<'_> {
    fn span(
        &self,
        SpanId(id): SpanId,
        parent: Option<SpanId>,
        span_kind: SpanKind,
        name: impl Into<Cow<'static, str>>,
        begun: Instant,
        ended: Instant,
    ) -> SpanData {
        let (trace, flags) = (self.trace.context.trace.0.into(), TraceFlags::SAMPLED);
        SpanData {
            span_context: SpanContext::new(trace, id.into(), flags, false, self.state.clone()),
            parent_span_id: parent.map_or(opentelemetry::SpanId::INVALID, |SpanId(id)| id.into()),
            parent_span_is_remote: false,
            span_kind,
            name: name.into(),
            start_time: self.time(begun),
            end_time: self.time(ended.max(begun)),
            attributes: Vec::new(),
            dropped_attributes_count: 0,
            events: Default::default(),
            links: Default::default(),
            status: Status::Unset,
            instrumentation_scope: self.scope.clone(),
        }
    }

    /// The wall-clock time at the instant `at`.
    fn time(&self, at: Instant) -> SystemTime {
        self.when - self.ended.saturating_duration_since(at)
    }
}

impl TraceData {
    fn server_name(&self) -> String {
        format!("{} {}", method(&self.method), self.route)
    }

    fn server_attributes(&self) -> Vec<KeyValue> {
        let mut attributes = methods(&self.method);
        let (path, query) = match self.target.split_once('?') {
            Some((path, query)) => (path, Some(query)),
            None => (&*self.target, None),
        };
        let text = |text: &str| text.to_owned();
        attributes.extend([
            KeyValue::new("url.scheme", self.scheme),
            KeyValue::new("url.path", text(path)),
            KeyValue::new("network.protocol.version", self.version),
            KeyValue::new("forebay.route", text(&self.route)),
            KeyValue::new("forebay.listener", text(&self.listener)),
        ]);
        attributes.extend(query.map(|query| KeyValue::new("url.query", text(query))));
        attributes.extend(address(&self.host));
        attributes.extend(self.client.map(|client| KeyValue::new("client.address", client.to_string())));
        if let Some(peer) = self.peer {
            attributes.push(KeyValue::new("network.peer.address", peer.ip().to_string()));
            attributes.push(KeyValue::new("network.peer.port", i64::from(peer.port())));
        }
        attributes.extend(self.user_agent.as_deref().map(|agent| KeyValue::new("user_agent.original", text(agent))));
        attributes.extend(self.request_id.as_deref().map(|id| KeyValue::new("forebay.request_id", text(id))));
        if self.status > 0 {
            attributes.push(KeyValue::new("http.response.status_code", i64::from(self.status)));
        }
        if let Some(refusal) = self.refusal {
            attributes.push(KeyValue::new("forebay.reason", refusal.reason));
        }
        if self.failed() {
            let kind = self.refusal.map_or_else(|| self.status.to_string().into(), |refusal| Cow::from(refusal.reason));
            attributes.push(KeyValue::new("error.type", kind));
        }
        let further = self.attributes.iter().map(|(name, said)| KeyValue::new(name.to_string(), text(said)));
        attributes.extend(further);
        attributes
    }

    /// A 4xx is the client's error. A response that was cut is a failure whatever its status.
    fn failed(&self) -> bool {
        !(100..500).contains(&self.status) || self.refusal.is_some() && self.status < 400
    }

    fn server_status(&self) -> Status {
        if self.failed() { Status::error(self.refusal.map_or("", |refusal| refusal.reason)) } else { Status::Unset }
    }
}

impl Attempt {
    fn attributes(&self, method: &Method, index: usize) -> Vec<KeyValue> {
        let mut attributes = methods(method);
        attributes.extend(address(&self.endpoint));
        attributes.push(KeyValue::new("forebay.upstream", self.upstream.to_string()));
        attributes.push(KeyValue::new("forebay.endpoint", self.endpoint.to_string()));
        attributes.extend(self.reused.map(|reused| KeyValue::new("forebay.connection.reused", reused)));
        attributes.extend(self.status.map(|status| KeyValue::new("http.response.status_code", i64::from(status))));
        if index > 0 {
            attributes.push(KeyValue::new("http.request.resend_count", index as i64));
        }
        if let Some(failure) = self.failure {
            attributes.push(KeyValue::new("error.type", failure.reason));
        } else if let Some(status) = self.status.filter(|&status| status >= 400) {
            attributes.push(KeyValue::new("error.type", status.to_string()));
        }
        attributes
    }

    fn outcome(&self) -> Status {
        match (self.failure, self.status) {
            (Some(failure), _) => Status::error(failure.reason),
            (None, Some(400..)) => Status::error(""),
            _ => Status::Unset,
        }
    }
}

/// The method for the span's name: unknown methods share one name.
fn method(method: &Method) -> &'static str {
    match *method {
        Method::GET => "GET",
        Method::HEAD => "HEAD",
        Method::POST => "POST",
        Method::PUT => "PUT",
        Method::DELETE => "DELETE",
        Method::OPTIONS => "OPTIONS",
        Method::PATCH => "PATCH",
        Method::TRACE => "TRACE",
        Method::CONNECT => "CONNECT",
        _ => "HTTP",
    }
}

fn methods(written: &Method) -> Vec<KeyValue> {
    const KEY: &str = "http.request.method";
    match method(written) {
        "HTTP" => vec![
            KeyValue::new(KEY, "_OTHER"),
            KeyValue::new("http.request.method_original", written.as_str().to_owned()),
        ],
        known => vec![KeyValue::new(KEY, known)],
    }
}

/// `server.address`, and `server.port` if there is one.
fn address(written: &str) -> Vec<KeyValue> {
    let port = written.rsplit_once(':').and_then(|(host, port)| Some((host, port.parse::<u16>().ok()?)));
    let bare = |host: &str| host.trim_start_matches('[').trim_end_matches(']').to_owned();
    match port {
        Some((host, port)) => {
            vec![KeyValue::new("server.address", bare(host)), KeyValue::new("server.port", i64::from(port))]
        }
        None if written.is_empty() => Vec::new(),
        None => vec![KeyValue::new("server.address", bare(written))],
    }
}

#[cfg(test)]
pub(super) mod tests {
    use opentelemetry::Value;

    use super::super::{AttemptNotes, Context, TraceId};
    use super::*;
    use crate::error::refusal;
    use crate::phase::journal::{Journal, Note, Tick};

    fn ms(n: u64) -> Duration {
        Duration::from_millis(n)
    }

    /// A request that succeeded at the second attempt, after 10 ms.
    pub fn trace() -> TraceData {
        let begin = Instant::now();
        let note = |at| Note::early(Tick { at: begin + ms(at), cycle: None });
        let mut journal = Journal::begin(Phase::Accept, Note::early(Tick { at: begin - ms(5), cycle: None }));
        journal.enter(Phase::Header, note(0));
        journal.enter(Phase::Route, note(1));
        let mut notes = Box::new(AttemptNotes::default());
        for (attempt, at) in [("10.0.0.1:80", 2), ("[::1]:81", 5)] {
            journal.enter(Phase::Select, note(at));
            journal.enter(Phase::Connect, note(at));
            notes.attempt("app", attempt, begin + ms(at));
            if at == 2 {
                let first = notes.present().expect("it has just begun");
                first.failure = Some(&refusal::CONNECT_REFUSED);
                first.ended = Some(begin + ms(4));
            }
        }
        for (phase, at) in [(Phase::Send, 6), (Phase::Wait, 7), (Phase::Receive, 8), (Phase::Write, 9)] {
            journal.enter(phase, note(at));
        }
        journal.end(note(10));
        let second = notes.present().expect("it has not ended");
        (second.reused, second.status, second.ended) = (Some(true), Some(200), Some(begin + ms(9)));
        TraceData {
            context: Context { trace: TraceId(1), span: SpanId(2), parent: Some(SpanId(3)), sampled: true },
            notes,
            journal: Box::new(journal),
            state: Some("vendor=value".parse().expect("a value")),
            ended: (begin + ms(10), SystemTime::UNIX_EPOCH + ms(1_010)),
            listener: "web".into(),
            method: Method::GET,
            scheme: "http",
            host: "shop.example:8080".into(),
            target: "/path?query".into(),
            version: "1.1",
            client: "192.0.2.1".parse().ok(),
            peer: "192.0.2.2:4711".parse().ok(),
            user_agent: None,
            request_id: Some("id".into()),
            route: "all".into(),
            status: 200,
            attributes: Box::default(),
            refusal: None,
        }
    }

    fn made(trace: TraceData) -> Vec<SpanData> {
        let mut made = Vec::new();
        spans(trace, &InstrumentationScope::builder("test").build(), &mut made);
        made
    }

    fn attribute(span: &SpanData, key: &str) -> Option<Value> {
        span.attributes.iter().find(|pair| pair.key.as_str() == key).map(|pair| pair.value.clone())
    }

    #[test]
    fn phases_lie_below_their_attempt_and_attempts_below_the_exchange() {
        let spans = made(trace());
        let name_of = |id| spans.iter().find(|span| span.span_context.span_id() == id).map(|span| &*span.name);
        let tree: Vec<_> = spans.iter().map(|span| (&*span.name, name_of(span.parent_span_id))).collect();
        assert_eq!(tree[..3], [("GET all", None), ("GET app", Some("GET all")), ("GET app", Some("GET all"))]);
        let below =
            |phase| tree.iter().filter(|(name, _)| *name == phase).map(|(_, parent)| *parent).collect::<Vec<_>>();
        for phase in ["header", "route", "write"] {
            assert_eq!(below(phase), [Some("GET all")], "{phase}");
        }
        assert_eq!(below("select").len(), 2);
        assert_eq!(below("wait"), [Some("GET app")]);
        let connects: Vec<_> =
            spans.iter().filter(|span| span.name == "connect").map(|span| span.parent_span_id).collect();
        let attempts: Vec<_> = spans[1..3].iter().map(|span| span.span_context.span_id()).collect();
        assert_eq!(connects, attempts);
        assert_eq!((spans[0].parent_span_id, spans[0].parent_span_is_remote), (3.into(), true));
    }

    #[test]
    fn times_are_those_of_the_clock_on_the_wall_and_phases_lie_end_to_end() {
        let spans = made(trace());
        let at = |time: SystemTime| time.duration_since(SystemTime::UNIX_EPOCH).expect("after it").as_millis();
        assert_eq!((at(spans[0].start_time), at(spans[0].end_time)), (1_000, 1_010));
        let phases: Vec<_> = spans.iter().filter(|span| span.span_kind == SpanKind::Internal).collect();
        assert!(phases.windows(2).all(|pair| pair[0].end_time == pair[1].start_time));
        assert_eq!((at(phases[0].start_time), at(phases[phases.len() - 1].end_time)), (1_000, 1_010));
    }

    #[test]
    fn attributes_are_those_of_the_conventions() {
        let spans = made(trace());
        for (key, value) in [
            ("http.request.method", "GET".into()),
            ("url.scheme", "http".into()),
            ("url.path", "/path".into()),
            ("url.query", "query".into()),
            ("server.address", "shop.example".into()),
            ("server.port", 8080.into()),
            ("client.address", "192.0.2.1".into()),
            ("network.peer.address", "192.0.2.2".into()),
            ("network.protocol.version", "1.1".into()),
            ("http.response.status_code", 200.into()),
            ("forebay.route", Value::from("all")),
        ] {
            assert_eq!(attribute(&spans[0], key), Some(value), "{key}");
        }
        assert_eq!(attribute(&spans[1], "error.type"), Some("connect.refused".into()));
        assert_eq!(spans[1].status, Status::error("connect.refused"));
        assert_eq!(attribute(&spans[1], "http.request.resend_count"), None);
        assert_eq!(attribute(&spans[2], "http.request.resend_count"), Some(1.into()));
        assert_eq!(attribute(&spans[2], "server.address"), Some("::1".into()));
        assert_eq!(attribute(&spans[2], "forebay.connection.reused"), Some(true.into()));
        assert_eq!((&spans[0].status, &spans[2].status), (&Status::Unset, &Status::Unset));
    }

    #[test]
    fn a_failure_of_ours_is_an_error_and_one_of_the_client_is_none() {
        let status = |status, refusal| made(TraceData { status, refusal, ..trace() }).remove(0).status;
        assert_eq!(status(404, None), Status::Unset);
        assert_eq!(status(503, None), Status::error(""));
        assert_eq!(status(504, Some(&refusal::WAIT_TIMEOUT)), Status::error("wait.timeout"));
        assert_eq!(status(200, Some(&refusal::WAIT_TIMEOUT)), Status::error("wait.timeout"), "it was cut");
        assert_eq!(status(404, Some(&refusal::ROUTE_NO_MATCH)), Status::Unset);
    }

    #[test]
    fn a_method_of_a_strangers_own_makes_no_name_of_its_own() {
        let spans = made(TraceData { method: Method::from_bytes(b"BREW").expect("a method"), ..trace() });
        assert_eq!(spans[0].name, "HTTP all");
        assert_eq!(attribute(&spans[0], "http.request.method"), Some("_OTHER".into()));
        assert_eq!(attribute(&spans[0], "http.request.method_original"), Some("BREW".into()));
    }
}
