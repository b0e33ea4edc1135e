//! The driver of plain exchanges: it connects a client's session with an HTTP/1 endpoint, over Forebay's own sockets.
//!
//! It calls the hooks of any [`ProxyHttp`] in the order of Pingora's driver, so that both drivers share one description
//! of the phases. It differs in two points: each worker owns its connections to endpoints ([`pool`]), and the task that
//! reads a message also forwards it, without channels. Pingora's driver runs every exchange that is not plain
//! ([`course`], [`handover`]). The driver does not call Pingora's caches, modules and subrequests.

pub mod answer;
pub mod attempt;
pub mod connection;
pub mod course;
pub mod handover;
pub mod pool;
pub mod request;
pub mod sessions;

use std::sync::Arc;

use bytes::Bytes;
use pingora::apps::HttpServerApp;
use pingora::http::RequestHeader;
use pingora::protocols::Stream;
use pingora::protocols::http::ServerSession;
use pingora::server::ShutdownWatch;
use pingora::upstreams::peer::{HttpPeer, Peer};
use pingora::{Error, ErrorType, Result};
use pingora_proxy::{HttpProxy, ProxyHttp, ProxyWarnLogContext, Session};

use self::connection::Connection;
use self::course::Course;
use self::handover::HandedOver;
use super::fields;
use super::start::ExchangeStart;
use crate::upstream::transport::connector::Endpoints;
use crate::upstream::transport::dial::Dialer;

/// The interface between the driver and a proxy, in addition to Pingora's hooks.
pub trait Driven: ProxyHttp {
    /// Begins an exchange: the counterpart of `new_ctx`, with the facts about its start.
    fn begin(&self, begin: ExchangeStart) -> Self::CTX;

    /// The driver for an exchange that passed its request filters.
    fn course(exchange: &Self::CTX) -> Course;

    /// The dialer that connects to the selected endpoint.
    fn dialer(exchange: &Self::CTX) -> Option<Arc<Dialer>>;

    /// Whether the endpoint's connection may be reused after a successful exchange.
    fn keeps_connection(exchange: &Self::CTX) -> bool;

    /// Last change to the request of a `client`: adds the fields about earlier hops (forwarding fields). They are
    /// either set in `request` or appended to `lines`, which are written after the header's fields. A line costs a
    /// tenth of a field.
    ///
    /// # Errors
    ///
    /// If a value cannot be written as a field.
    fn tell_hops(
        exchange: &Self::CTX,
        client: &RequestHeader,
        request: &mut RequestHeader,
        lines: &mut Vec<u8>,
    ) -> Result<()>;

    /// Whether a hook that preserves the spelling of field names changes the response's fields. If so, the response
    /// header records the spelling ([`ResponseHeader::has_case`](pingora::http::ResponseHeader::has_case)).
    fn spells_answer(exchange: &Self::CTX) -> bool;

    /// Reports the response header as received, in bytes.
    fn answer_came_in(exchange: &Self::CTX, header: Bytes);
}

/// Limits of the driver.
#[derive(Clone, Copy, Debug)]
pub struct Terms {
    /// Maximum number of idle connections that a worker keeps.
    pub pool: usize,
    /// Maximum number of attempts per exchange.
    pub attempts: usize,
}

/// The driver; see the module.
pub struct Driver<P> {
    proxy: P,
    pingora: Arc<HttpProxy<P, Endpoints>>,
    terms: Terms,
}

/// The outcome of an exchange or of one attempt.
struct Ended {
    /// Whether the client's connection may be reused.
    keeps_client: bool,
    error: Option<Box<Error>>,
}

impl Ended {
    fn failed(error: Box<Error>) -> Self {
        Ended { keeps_client: false, error: Some(error) }
    }
}

impl<P> Driver<P>
where
    P: Driven + Send + Sync + 'static,
    P::CTX: Send + Sync + 'static,
{
    /// Creates a driver for this proxy. `pingora` runs the exchanges that are not plain; it serves the same proxy.
    pub fn new(proxy: P, pingora: Arc<HttpProxy<P, Endpoints>>, terms: Terms) -> Self {
        Driver { proxy, pingora, terms }
    }

    /// Runs the exchange of a session. Returns the client's stream if it may be reused. For one of Forebay's own
    /// sessions it returns `None`, since the session keeps its stream.
    ///
    /// Steps that most exchanges do not take are boxed, here and below: the future of an exchange is as large as its
    /// largest step, and parts of it are copied to where they are polled.
    pub async fn run(
        &self,
        begin: ExchangeStart,
        mut session: Box<Session>,
        shutdown: &ShutdownWatch,
    ) -> Option<Stream> {
        if !session.as_downstream().is_custom() && !Box::pin(read_request(session.as_downstream_mut(), shutdown)).await
        {
            return None;
        }
        let mut exchange = self.proxy.begin(begin);
        match self.admit(&mut session, &mut exchange).await {
            Ok(true) => {}
            Ok(false) => {
                self.proxy.logging(&mut session, None, &mut exchange).await;
                return finish(session).await;
            }
            Err(error) => return Box::pin(self.fail(session, &mut exchange, error)).await,
        }
        if let Course::Pingora(_) = P::course(&exchange) {
            let written = session.as_downstream().to_h1_raw();
            if fields::spell_out(session.req_header_mut(), &written).is_err() {
                return None;
            }
            let client = sessions::take_client(session);
            let further = self.pingora.process_new_http(client, shutdown);
            let (stream, _) = HandedOver::new(exchange, further).await?.consume();
            return Some(stream);
        }
        let Ended { keeps_client, error } = self.attempts(&mut session, &mut exchange).await;
        if let Some(error) = &error {
            let told = self.proxy.fail_to_proxy(&mut session, error, &mut exchange).await;
            if !self.proxy.suppress_error_log(&session, &exchange, error) {
                tracing::error!(%error, status = told.error_code, "an exchange failed");
            }
        }
        self.proxy.logging(&mut session, error.as_deref(), &mut exchange).await;
        if let Some(error) = error {
            session.on_proxy_failure(error);
        }
        if keeps_client { finish(session).await } else { None }
    }

    /// Runs the request filters. `false`: a filter has responded to the request.
    async fn admit(&self, session: &mut Session, exchange: &mut P::CTX) -> Result<bool> {
        self.proxy.early_request_filter(session, exchange).await?;
        if self.proxy.request_filter(session, exchange).await? {
            return Ok(false);
        }
        let passes = self.proxy.proxy_upstream_filter(session, exchange).await?;
        if !passes && session.response_written().is_none() {
            Box::pin(session.respond_error(502)).await?;
        }
        Ok(passes)
    }

    /// Ends an exchange that failed before its first attempt.
    async fn fail(&self, mut session: Box<Session>, exchange: &mut P::CTX, error: Box<Error>) -> Option<Stream> {
        let told = self.proxy.fail_to_proxy(&mut session, &error, exchange).await;
        if !self.proxy.suppress_error_log(&session, exchange, &error) {
            tracing::error!(%error, status = told.error_code, "a request failed");
        }
        self.proxy.logging(&mut session, Some(&error), exchange).await;
        session.on_proxy_failure(error);
        if told.can_reuse_downstream { finish(session).await } else { None }
    }

    /// Makes attempts until one succeeds, the error does not permit a retry, or the limit is reached.
    async fn attempts(&self, session: &mut Session, exchange: &mut P::CTX) -> Ended {
        let mut ended = Ended { keeps_client: false, error: None };
        for _ in 0..self.terms.attempts {
            ended = self.attempt(session, exchange).await;
            let Some(error) = ended.error.as_ref().filter(|error| error.retry()) else { break };
            let context = ProxyWarnLogContext::UpstreamRetry;
            if !self.proxy.suppress_proxy_warn_log(session, exchange, error, context) {
                tracing::warn!(%error, "an attempt failed");
            }
        }
        ended
    }

    async fn attempt(&self, session: &mut Session, exchange: &mut P::CTX) -> Ended {
        let peer = match self.proxy.upstream_peer(session, exchange).await {
            Ok(peer) => peer,
            Err(error) => return Ended::failed(error),
        };
        let key = peer.reuse_hash();
        let (mut connection, reused) = match self.connect(exchange, &peer, key).await {
            Ok(connected) => connected,
            Err(mut error) => {
                error.as_up();
                return Ended::failed(self.proxy.fail_to_connect(session, &peer, exchange, error).into_up());
            }
        };
        let over = attempt::Over { reused, peer: &peer };
        let attempt::Outcome { keeps_client, keeps_connection, error } =
            attempt::run(&self.proxy, session, exchange, &mut connection, over).await;
        if keeps_connection && P::keeps_connection(exchange) {
            pool::put(key, connection, peer.idle_timeout(), self.terms.pool);
        } else {
            drop(connection);
        }
        let error = error.map(|error| self.proxy.error_while_proxy(&peer, session, error, exchange, reused));
        Ended { keeps_client, error }
    }

    async fn connect(&self, exchange: &P::CTX, peer: &HttpPeer, key: u64) -> Result<(Connection, bool)> {
        if let Some(kept) = pool::take(key) {
            return Ok((kept, true));
        }
        let dialer = P::dialer(exchange).ok_or_else(|| Error::new_in(ErrorType::InternalError))?;
        Ok((Box::pin(Connection::open(&dialer, peer)).await?, false))
    }
}

/// Reads the request of a Pingora session. `false`: there is no request.
async fn read_request(client: &mut ServerSession, shutdown: &ShutdownWatch) -> bool {
    match client.read_request().await {
        Ok(true) => {}
        Ok(false) => return false,
        Err(error) => {
            if *error.etype() == ErrorType::InvalidHTTPHeader {
                // An error here means that the client has closed its connection.
                let _ = client.respond_error(400).await;
            }
            client.shutdown().await;
            return false;
        }
    }
    if *shutdown.borrow() {
        client.set_keepalive(None);
    }
    true
}

/// Finishes an exchange. Returns the client's stream if it may be reused.
async fn finish(mut session: Box<Session>) -> Option<Stream> {
    if let ServerSession::Custom(client) = session.as_downstream_mut() {
        // If this fails, the connection closes.
        let _ = client.finish().await;
        sessions::give_back(session);
        return None;
    }
    let reusable = Box::pin(sessions::take_client(session).finish()).await.ok()??;
    Some(reusable.into_parts().0)
}
