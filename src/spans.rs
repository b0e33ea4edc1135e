//! Traces: the trace context of each exchange, and the spans of recorded exchanges.
//!
//! `proxy` asks the [`Tracer`] for a context when a header has arrived (`spans/context.rs`), gives each attempt its
//! own span to pass on to the endpoint, and reports the whole [`TraceData`] in the phase `finish`. A worker puts it
//! into a queue (`spans/queue.rs`); a thread turns it into spans (`spans/otlp.rs`, with the feature `otel`) and
//! sends them to a collector. If tracing is off, none of this runs and `traceparent` passes unchanged.

pub mod context;
#[cfg(feature = "otel")]
mod otlp;
mod queue;

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use http::{HeaderMap, HeaderValue, Method};
use pingora::http::RequestHeader;
use prometheus::IntCounter;

use crate::config::server::{Query, Tracing};
use crate::error::{BuildError, Refusal};
use crate::expression::named::Named;
use crate::metrics::SpanMetrics;
use crate::phase::Phase;
use crate::phase::journal::{Journal, Span};
pub use context::{Context, SpanId, TraceId, TraceParent};
use context::{Sampler, TRACEPARENT, TRACESTATE};
use queue::Queue;

/// One attempt of a recorded exchange.
#[derive(Clone, Debug)]
pub struct Attempt {
    /// Its span, which is sent to the endpoint.
    pub span: SpanId,
    /// The name of the upstream.
    pub upstream: Box<str>,
    /// The endpoint as written in the configuration.
    pub endpoint: Box<str>,
    /// When the endpoint was chosen.
    pub begun: Instant,
    /// Whether its connection was reused; `None` if there was no connection.
    pub reused: Option<bool>,
    /// When the endpoint was released.
    pub ended: Option<Instant>,
    /// The status of the response.
    pub status: Option<u16>,
    /// Why it failed, if it did.
    pub failure: Option<&'static Refusal>,
}

/// Notes on a recorded exchange, besides its journal.
#[derive(Debug, Default)]
pub struct AttemptNotes {
    attempts: Vec<Attempt>,
}

/// Limit on recorded attempts; ten attempts and a free one are possible.
const ATTEMPTS_MAX: usize = 16;

impl AttemptNotes {
    /// Records a new attempt.
    pub fn attempt(&mut self, upstream: &str, endpoint: &str, begun: Instant) {
        if self.attempts.len() < ATTEMPTS_MAX {
            let (upstream, endpoint, span) = (upstream.into(), endpoint.into(), SpanId::random());
            let (reused, ended, status, failure) = (None, None, None, None);
            self.attempts.push(Attempt { span, upstream, endpoint, begun, reused, ended, status, failure });
        }
    }

    /// The current attempt.
    pub fn present(&mut self) -> Option<&mut Attempt> {
        self.attempts.last_mut().filter(|attempt| attempt.ended.is_none())
    }

    /// The span of the current attempt.
    pub fn span(&self) -> Option<SpanId> {
        self.attempts.last().filter(|attempt| attempt.ended.is_none()).map(|attempt| attempt.span)
    }
}

/// Everything that spans need of a recorded exchange, when it has ended.
#[derive(Debug)]
pub struct TraceData {
    /// Its trace context.
    pub context: Context,
    /// Its attempts.
    pub notes: Box<AttemptNotes>,
    /// Its phases.
    pub journal: Box<Journal>,
    /// `tracestate` as received.
    pub state: Option<HeaderValue>,
    /// When it ended.
    pub ended: (Instant, SystemTime),
    /// The name of the listener.
    pub listener: Box<str>,
    /// The method.
    pub method: Method,
    /// `http` or `https`.
    pub scheme: &'static str,
    /// The host of the request.
    pub host: Box<str>,
    /// The normalized path, and the query as received.
    pub target: Box<str>,
    /// The version, such as `1.1`.
    pub version: &'static str,
    /// The client.
    pub client: Option<IpAddr>,
    /// The peer of the connection: the client, or a proxy in front.
    pub peer: Option<SocketAddr>,
    /// `User-Agent`.
    pub user_agent: Option<Box<str>>,
    /// The id of the request.
    pub request_id: Option<Box<str>>,
    /// The name of the route.
    pub route: Box<str>,
    /// The status sent to the client; 0 if none was sent.
    pub status: u16,
    /// Why Forebay refused or cut it, if it did.
    pub refusal: Option<&'static Refusal>,
    /// Additional attributes from the configuration.
    pub attributes: Box<[(Box<str>, Box<str>)]>,
}

impl TraceData {
    /// The phases that become spans: from the first byte of the header on.
    fn phases(&self) -> impl Iterator<Item = Span> + '_ {
        self.journal.spans().filter(|span| span.phase >= Phase::Header)
    }

    /// How many spans the trace becomes.
    fn spans(&self) -> u64 {
        (1 + self.phases().count() + self.notes.attempts.len() + self.journal.steps().0.len()) as u64
    }
}

/// Assigns trace contexts and queues the traces of recorded exchanges.
pub struct Tracer {
    /// Additional attributes of each exchange's span.
    pub attributes: Named,
    sampler: Sampler,
    query: Query,
    queue: Arc<Queue>,
    dropped: IntCounter,
    patience: Duration,
}

impl Tracer {
    /// Starts tracing, with its own thread; `None` if it is `off`.
    pub fn start(
        settings: &Tracing,
        attributes: Named,
        metrics: SpanMetrics,
    ) -> Result<Option<Arc<Tracer>>, BuildError> {
        if !settings.is_on() {
            return Ok(None);
        }
        let queue = Arc::new(Queue::new(usize::try_from(settings.queue.0).unwrap_or(usize::MAX)));
        let dropped = metrics.dropped.clone();
        export(settings, queue.clone(), metrics)
            .map_err(|error| BuildError::new("observability.tracing.endpoint", error))?;
        let (sampler, query, patience) = (Sampler::new(settings), settings.query, settings.timeout.0);
        Ok(Some(Arc::new(Tracer { attributes, sampler, query, queue, dropped, patience })))
    }

    /// The trace context of a new exchange; `peer_is_trusted`: the peer is a trusted proxy.
    pub fn place(&self, headers: &HeaderMap, peer_is_trusted: bool) -> Context {
        self.sampler.place(headers, peer_is_trusted)
    }

    /// Queues the trace of an exchange. Never blocks: if the queue is full, the trace is dropped and counted.
    pub fn tell(&self, mut trace: TraceData) {
        if let (Query::Drop, Some((path, _))) = (self.query, trace.target.split_once('?')) {
            trace.target = path.into();
        }
        let spans = trace.spans();
        if !self.queue.push(trace) {
            self.dropped.inc_by(spans);
        }
    }

    /// Exports the queue, within the time limit of one export. Later traces are dropped.
    pub fn close(&self) {
        if !self.queue.close(self.patience) {
            tracing::warn!("not all spans were exported: the collector takes too long");
        }
    }
}

#[cfg(feature = "otel")]
use otlp::start as export;

/// The configuration check has already reported it.
#[cfg(not(feature = "otel"))]
fn export(_: &Tracing, _: Arc<Queue>, _: SpanMetrics) -> Result<(), String> {
    Err("this Forebay was built without tracing: build it with the feature `otel`".to_owned())
}

/// Sets the trace header for an endpoint: with the attempt's span if it is recorded; else with the client's trusted
/// context, or a new unsampled one. Removes headers of other traces.
pub fn pass_on(context: Context, attempt: Option<SpanId>, request: &mut RequestHeader) -> pingora::Result<()> {
    let Context { trace, span, parent, sampled } = context;
    if parent.is_none() {
        request.remove_header(&TRACESTATE);
    } else if !sampled {
        return Ok(());
    }
    request.insert_header(TRACEPARENT, TraceParent { trace, span: attempt.unwrap_or(span), sampled }.header())
}

#[cfg(test)]
mod tests {
    use super::*;

    const CAME: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-00";

    fn passed_on(parent: Option<SpanId>, sampled: bool, attempt: Option<SpanId>) -> (String, bool) {
        let mut request = RequestHeader::build("GET", b"/", None).expect("a request");
        request.insert_header(TRACEPARENT, CAME).expect("a header");
        request.insert_header(TRACESTATE, "vendor=1").expect("a header");
        let context = Context { trace: TraceId(7), span: SpanId(8), parent, sampled };
        pass_on(context, attempt, &mut request).expect("headers");
        let parent = request.headers[TRACEPARENT].to_str().expect("text").to_owned();
        (parent, request.headers.contains_key(TRACESTATE))
    }

    #[test]
    fn an_endpoint_is_told_of_the_attempt_or_else_of_what_it_can_believe() {
        let (parent, attempt) = (Some(SpanId(1)), Some(SpanId(9)));
        let told = |span, flags| format!("00-{:032x}-{span:016x}-{flags}", 7);
        assert_eq!(passed_on(parent, true, attempt), (told(9, "01"), true));
        assert_eq!(passed_on(None, true, attempt), (told(9, "01"), false));
        assert_eq!(passed_on(None, false, None), (told(8, "00"), false));
        assert_eq!(passed_on(parent, false, None), (CAME.to_owned(), true), "as it came");
    }
}
