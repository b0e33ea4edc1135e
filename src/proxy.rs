//! An exchange from its route to its end: `impl ProxyHttp`, which defines only the order of the phases.
//!
//! Pingora calls these hooks in the order of this file. Each hook calls the module of its phase; the decisions of a
//! phase are kept in [`exchange::Exchange`]. A phase never calls another.

pub mod again;
pub mod attempt;
pub mod blame;
pub mod buffer;
pub mod call;
pub mod connect;
pub mod deadline;
pub mod epoch;
pub mod exchange;
pub mod fault;
pub mod finish;
pub mod forwarded;
pub mod generation;
pub mod grpc;
pub mod header;
pub mod https;
pub mod mirror;
pub mod queue;
pub mod receive;
pub mod retry;
pub mod route;
pub mod routes;
pub mod select;
pub mod send;
pub mod trust;
pub mod upgrade;
pub mod watch;
pub mod write;

use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use bytes::Bytes;
use http::HeaderMap;
use http::header::{HOST, UPGRADE};
use pingora::http::{RequestHeader, ResponseHeader};
use pingora::protocols::Digest;
use pingora::server::ShutdownWatch;
use pingora::upstreams::peer::HttpPeer;
use pingora::{Error, ErrorType, Result};
use pingora_proxy::{FailToProxy, ProxyHttp, ProxyWarnLogContext, Session};

use crate::client::challenges::Challenges;
use crate::client::driver::course::{Course, Facts, Reason};
use crate::client::driver::{Driven, handover};
use crate::client::start::ExchangeStart;
use crate::error::{Refusal, refusal};
use crate::filter::{Answer, Refused, Stages, Verdict};
use crate::metrics::Metrics;
use crate::metrics::driver::DriverMetrics;
use crate::phase::Phase;
use crate::scheduler::Schedulers;
use crate::spool::Spools;
use crate::upstream::Upstream;
use crate::upstream::transport::dial::Dialer;
use attempt::Attempt;
use exchange::{Carried, Exchange};
use finish::Settler;
use generation::Current;

/// The gateway, as Pingora's driver and Forebay's own driver see it. Clones share their parts.
#[derive(Clone)]
pub struct Proxy {
    /// The current generation of the configuration.
    pub current: Current,
    /// Gauges of the phases.
    pub metrics: Metrics,
    /// Signals that the gateway stops: responses then announce the close of their connection.
    pub stopping: ShutdownWatch,
    /// Reports finished exchanges.
    pub settler: Arc<Settler>,
    /// The resources that spools for bodies share.
    pub spools: Arc<Spools>,
    /// The schedulers that give grants for bulk transfers.
    pub schedulers: Arc<Schedulers>,
    /// Pending challenges of certificate issuers.
    pub challenges: Arc<Challenges>,
    /// The rules for the choice of the driver.
    pub steering: Steering,
}

/// The facts about the choice of the driver that hold for all exchanges.
#[derive(Clone)]
pub struct Steering {
    /// Whether Forebay's own driver is enabled.
    pub on: bool,
    /// Whether workers share their tasks (work stealing).
    pub shares_tasks: bool,
    /// Counts exchanges by driver.
    pub metrics: Arc<DriverMetrics>,
}

impl Steering {
    /// Chooses the driver of this exchange, and counts the choice.
    fn steer(&self, exchange: &Exchange, upstream: &Upstream) -> Course {
        let (upgrade, spoken) = (exchange.request.upgrade.is_some(), upstream.spoken());
        let course = Course::choose(Facts { on: self.on, shares_tasks: self.shares_tasks, upgrade, spoken });
        self.metrics.driven(course.reason().map(Reason::name)).inc();
        course
    }
}

#[async_trait]
impl ProxyHttp for Proxy {
    type CTX = Carried;

    fn new_ctx(&self) -> Carried {
        // Pingora's driver continues an exchange that Forebay's driver started.
        if let Some(exchange) = handover::begun() {
            return exchange;
        }
        Carried::new(Exchange::begin(None, &self.metrics))
    }

    /// Phases `header`, `route` and `buffer`.
    async fn request_filter(&self, session: &mut Session, exchange: &mut Carried) -> Result<bool> {
        if exchange.routing.course.is_some() {
            // The exchange has passed the request filters already.
            return Ok(false);
        }
        exchange.request.ended_with_header = exchange.client.control.is_some() && session.is_body_empty();
        let written = session.as_downstream().to_h1_raw();
        let verdict = self.route(session.req_header_mut(), &written, exchange).await;
        if self.is_ending(exchange) {
            write::end_connection(exchange, session.as_downstream_mut());
        }
        match verdict {
            Verdict::Continue => {}
            Verdict::Refuse(refused) => return Box::pin(refuse(session, exchange, refused)).await,
            Verdict::Answer(answer) => {
                exchange.enter(Phase::Write);
                Box::pin(write::answer(exchange, session.as_downstream_mut(), answer))
                    .await
                    .map_err(|error| error.into_down())?;
                return Ok(true);
            }
        }
        let Some(route) = exchange.routing.route.clone() else { return Ok(false) };
        let Some(upstream) = route.destination.next().cloned() else {
            return Box::pin(refuse(session, exchange, plain(&refusal::SELECT_NO_ENDPOINT))).await;
        };
        if self.spools.budget.sheds() {
            self.spools.budget.count_shed();
            return Box::pin(refuse(session, exchange, plain(&refusal::ROUTE_PRESSURE))).await;
        }
        exchange.routing.upstream = Some(upstream.clone());
        if upstream.has_affinity() {
            let asked = exchange.asked(session.req_header());
            (exchange.routing.hash, exchange.routing.stuck) = (upstream.hash(&asked), upstream.stuck(&asked));
        }
        patience_for_writing(session, exchange, route.write_idle);
        exchange.client.connection.iter().for_each(|client| client.set_half_close_aborts(route.half_close_aborts));
        exchange.request.upgrade = session.get_header(UPGRADE).filter(|_| session.is_upgrade_req()).cloned();
        let client = &mut session.downstream_session;
        buffer::request(exchange, client, &route, &upstream, &self.spools, &self.schedulers).await?;
        if session.is_body_empty() || exchange.bodies.as_ref().is_some_and(|bodies| bodies.length().is_some()) {
            exchange.request_is_whole(Instant::now);
        }
        exchange.routing.course = Some(self.steering.steer(exchange, &upstream));
        Ok(false)
    }

    /// Phase `select`, including `queue`.
    async fn upstream_peer(&self, session: &mut Session, exchange: &mut Carried) -> Result<Box<HttpPeer>> {
        select::next(exchange, session.as_downstream_mut()).await.map_err(|refused| {
            exchange.filters.refuse(refused);
            Error::new_up(ErrorType::ConnectError)
        })
    }

    /// Phase `connect` failed.
    fn fail_to_connect(
        &self,
        session: &mut Session,
        _peer: &HttpPeer,
        exchange: &mut Carried,
        error: Box<Error>,
    ) -> Box<Error> {
        connect::failed(exchange, session.as_downstream(), error)
    }

    /// Phase `connect` ends; `send` begins.
    async fn connected_to_upstream(
        &self,
        _session: &mut Session,
        reused: bool,
        peer: &HttpPeer,
        socket: std::os::fd::RawFd,
        digest: Option<&Digest>,
        exchange: &mut Carried,
    ) -> Result<()> {
        connect::made(exchange, reused, peer, socket, digest)
    }

    /// Phase `send`: the header.
    async fn upstream_request_filter(
        &self,
        session: &mut Session,
        request: &mut RequestHeader,
        exchange: &mut Carried,
    ) -> Result<()> {
        if exchange.bodies.as_ref().is_some_and(|bodies| bodies.length().is_some()) {
            send::note_trailers(exchange, session.req_header_mut());
        }
        send::header(exchange, session.req_header(), request)?;
        if tells_hops_in_fields(exchange) {
            send::hops(exchange, session.req_header(), request, None)?;
        }
        if let Some(copy) = &mut exchange.copy {
            copy.note_header(request, session.req_header().headers.contains_key(HOST));
        }
        let empty = session.is_body_empty();
        send::prepare_trailers(exchange, session.req_header(), request, !empty)?;
        send::hold_stream(exchange, request);
        if empty {
            // Over HTTP/2, Pingora calls no further hook for a request without a body.
            send::ended(exchange);
        }
        Ok(())
    }

    /// Phase `send`: the body, piece by piece. The last piece begins `wait`.
    async fn request_body_filter(
        &self,
        session: &mut Session,
        piece: &mut Option<Bytes>,
        end: bool,
        exchange: &mut Carried,
    ) -> Result<()> {
        send::piece(exchange, session.req_header_mut(), piece, end).await
    }

    /// An interim (1xx) or final response header was received, before any other processing. It may end `wait` or switch
    /// to another protocol.
    async fn upstream_response_filter(
        &self,
        session: &mut Session,
        response: &mut ResponseHeader,
        exchange: &mut Carried,
    ) -> Result<()> {
        receive::frame(session.req_header(), response)?;
        receive::switch(exchange, &mut session.downstream_session, response)
    }

    /// Phase `wait` ends and `receive` begins, unless another attempt follows.
    async fn response_filter(
        &self,
        session: &mut Session,
        response: &mut ResponseHeader,
        exchange: &mut Carried,
    ) -> Result<()> {
        again::answered(exchange, session.as_downstream(), response)?;
        if self.is_ending(exchange)
            && let Some(bodies) = &exchange.bodies
        {
            bodies.close_after_answer();
        }
        let via = exchange.routing.additions.via;
        receive::header(exchange, session.req_header_mut(), response, via).await
    }

    /// The trailers of a response.
    async fn response_trailer_filter(
        &self,
        session: &mut Session,
        trailers: &mut HeaderMap,
        exchange: &mut Carried,
    ) -> Result<Option<Bytes>> {
        Ok(receive::trailers(exchange, session.req_header_mut(), trailers))
    }

    /// The last piece ends `receive`; `write` begins.
    fn response_body_filter(
        &self,
        session: &mut Session,
        piece: &mut Option<Bytes>,
        end: bool,
        exchange: &mut Carried,
    ) -> Result<Option<Duration>> {
        if let Some(switched) = &mut exchange.switched {
            switched.sent += piece.as_ref().map_or(0, |piece| piece.len() as u64);
        }
        if end {
            receive::ended(exchange, session.req_header_mut());
        }
        Ok(None)
    }

    /// An attempt failed after its connection was established.
    fn error_while_proxy(
        &self,
        _peer: &HttpPeer,
        session: &mut Session,
        error: Box<Error>,
        exchange: &mut Carried,
        reused: bool,
    ) -> Box<Error> {
        if exchange.phase() == Phase::Connect {
            // The connection was established but must not be used.
            return connect::failed(exchange, session.as_downstream(), error);
        }
        send::failed(exchange, session.as_downstream_mut(), error, reused)
    }

    /// The exchange failed: the client gets a refusal, or a cut response if one had begun.
    async fn fail_to_proxy(&self, session: &mut Session, error: &Error, exchange: &mut Carried) -> FailToProxy {
        if let Some(answer) = exchange.filters.answer.take() {
            return self.answer_instead(session, exchange, error, answer).await;
        }
        let earlier = exchange.filters.take_refused().or_else(|| exchange.refusal.map(plain));
        let fault = || exchange.attempts.failure.unwrap_or_else(|| fault::of(exchange, error, false));
        if earlier.is_none() && fault::is_served(exchange, fault()) {
            exchange.enter(Phase::Write);
            exchange.client.closes = exchange.client.control.is_none();
            return FailToProxy { error_code: 0, can_reuse_downstream: false };
        }
        let refused = earlier.unwrap_or_else(|| plain(blame::row(fault()).refusal));
        exchange.refusal = Some(refused.refusal);
        exchange.enter(Phase::Write);
        tracing::debug!(reason = refused.refusal.reason, %error, "an exchange failed");
        if write::cut_if_begun(exchange, &mut session.downstream_session, Some(error)).await {
            return FailToProxy { error_code: refused.refusal.status, can_reuse_downstream: false };
        }
        let client = session.as_downstream_mut();
        if write::is_heard(refused.refusal) {
            write::end_connection(exchange, client);
            exchange.client.closes =
                write::refuse(exchange, client, &refused).await.is_ok() && exchange.client.control.is_none();
        }
        FailToProxy { error_code: refused.refusal.status, can_reuse_downstream: false }
    }

    /// The rest of `write`, with the upstream released, and `finish`.
    async fn logging(&self, session: &mut Session, _error: Option<&Error>, exchange: &mut Carried) {
        let now = Instant::now();
        exchange.release(Attempt::outcome, now);
        write::drain(exchange, &mut session.downstream_session, now).await;
        self.settler.settle(exchange, session.as_downstream_mut());
        if exchange.client.closes {
            // The exchange does not wait for the client to close its side.
            session.as_downstream_mut().shutdown().await;
        }
    }

    /// The access log and the metrics already report the error.
    fn suppress_error_log(&self, _session: &Session, _exchange: &Carried, _error: &Error) -> bool {
        true
    }

    fn suppress_proxy_warn_log(&self, _: &Session, _: &Carried, _: &Error, _: ProxyWarnLogContext) -> bool {
        true
    }
}

impl Driven for Proxy {
    fn begin(&self, begin: ExchangeStart) -> Carried {
        Carried::new(Exchange::begin(Some(begin), &self.metrics))
    }

    fn course(exchange: &Carried) -> Course {
        // Without an upstream there is no endpoint; `select` then reports this to Pingora's driver.
        exchange.routing.course.unwrap_or(Course::Own)
    }

    fn dialer(exchange: &Carried) -> Option<Arc<Dialer>> {
        exchange.attempts.endpoint().map(|endpoint| endpoint.dialer().clone())
    }

    fn keeps_connection(exchange: &Carried) -> bool {
        exchange.attempts.present.as_ref().is_some_and(|attempt| !attempt.has_closed())
    }

    fn tell_hops(
        exchange: &Carried,
        client: &RequestHeader,
        request: &mut RequestHeader,
        lines: &mut Vec<u8>,
    ) -> Result<()> {
        if tells_hops_in_fields(exchange) { Ok(()) } else { send::hops(exchange, client, request, Some(lines)) }
    }

    fn spells_answer(exchange: &Carried) -> bool {
        exchange.routing.route.as_ref().is_some_and(|route| route.chain.wants(Stages::RESPONSE))
    }

    fn answer_came_in(exchange: &Carried, header: Bytes) {
        exchange.bodies.iter().for_each(|bodies| bodies.answer_came_in(header.clone()));
    }
}

/// Whether the forwarding fields are set in the request itself: Pingora's driver writes no other lines, and a mirrored
/// copy is made of the fields.
fn tells_hops_in_fields(exchange: &Carried) -> bool {
    let is_copied = exchange.routing.route.as_ref().is_some_and(|route| route.mirror.is_some());
    is_copied || Proxy::course(exchange) != Course::Own
}

impl Proxy {
    /// Whether responses announce the close of the connection.
    fn is_ending(&self, exchange: &Exchange) -> bool {
        let leaves = || exchange.client.connection.as_ref().is_some_and(|connection| connection.listener.is_leaving());
        *self.stopping.borrow() || leaves()
    }

    /// Sends a filter's response in place of the endpoint's. An HTTP/1 connection of the client closes afterwards, as
    /// after a refusal.
    async fn answer_instead(
        &self,
        session: &mut Session,
        exchange: &mut Exchange,
        error: &Error,
        answer: Answer,
    ) -> FailToProxy {
        exchange.enter(Phase::Write);
        let status = answer.status.as_u16();
        if write::cut_if_begun(exchange, &mut session.downstream_session, Some(error)).await {
            exchange.refusal = Some(&refusal::INTERNAL);
            return FailToProxy { error_code: status, can_reuse_downstream: false };
        }
        let client = session.as_downstream_mut();
        write::end_connection(exchange, client);
        let written = write::answer_instead(exchange, client, answer).await;
        exchange.client.closes = written.is_ok() && exchange.client.control.is_none();
        if let Err(error) = &written {
            tracing::debug!(%error, "a client did not accept the response of a filter");
        }
        FailToProxy { error_code: status, can_reuse_downstream: false }
    }

    async fn route(&self, request: &mut RequestHeader, written: &[u8], exchange: &mut Exchange) -> Verdict {
        let generation = self.current.load();
        exchange.routing.follow(&generation.epoch, generation.additions);
        let trace = |exchange: &mut Exchange, request: &RequestHeader| {
            if let Some(tracer) = &self.settler.tracer {
                exchange.trace(tracer.place(&request.headers, exchange.client.peer_is_trusted));
            }
        };
        let decided = route::decide(exchange, &generation, &self.challenges, request, trace);
        // Filters may wait for long, so the generation is released first.
        drop(generation);
        match decided {
            Ok(route) => route::take(exchange, route, request, written).await,
            Err(verdict) => verdict,
        }
    }
}

/// HTTP/1 has one exchange at a time, so the stream enforces the limit for every write. HTTP/2 has a limit per stream,
/// and one for the connection.
fn patience_for_writing(session: &mut Session, exchange: &Exchange, idle: Duration) {
    let connection = exchange.client.connection.as_ref();
    if exchange.client.control.is_some() {
        session.set_write_timeout(Some(idle));
        connection.inspect(|connection| connection.extend_write_idle(idle));
    } else {
        connection.inspect(|connection| connection.set_write_idle(idle));
    }
}

/// Sends a refusal in regular operation: the connection may be reused.
async fn refuse(session: &mut Session, exchange: &mut Exchange, refused: Refused) -> Result<bool> {
    exchange.refusal = Some(refused.refusal);
    exchange.enter(Phase::Write);
    write::refuse(exchange, session.as_downstream_mut(), &refused).await.map_err(|error| error.into_down())?;
    Ok(true)
}

fn plain(refusal: &'static Refusal) -> Refused {
    Refused { refusal, headers: Vec::new() }
}
