//! The steps between an accepted socket and HTTP: the PROXY protocol, the ClientHello, the handshake.
//!
//! All steps run in the connection's own task, each with its own deadline. The result is a connection with the true
//! client and decrypted bytes, or a refusal.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::BytesMut;
use pingora::protocols::Stream;

use super::connection::Connection;
use super::hello::{self, Hello};
use super::listener::{Counted, Listener};
use super::names::Names;
use super::proxy_protocol::{self, Expected};
use super::relay::Relay;
use super::tls::certificate::ISSUED_KIND;
use super::tls::handshake::{self, Facts};
use super::tls::stream::{Raw, TlsStream};
use super::tls::{self, Tls};
use crate::error::{Refusal, refusal};
use crate::metrics::{ConnectionState, Metrics};
use crate::party::wait::{NoClient, within};
use crate::phase::Phase;

/// Time limit for a ClientHello if there is no `tls` block with its own.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);

/// The two ends of a connection, as far as they have addresses.
#[derive(Clone, Copy, Debug)]
pub struct Ends {
    /// The client's address.
    pub peer: Option<SocketAddr>,
    /// The local address.
    pub local: Option<SocketAddr>,
}

/// The result for an accepted connection.
pub enum Entered {
    /// The connection uses HTTP.
    Http {
        /// Its bytes, decrypted.
        io: Stream,
        /// The bytes that were already read.
        inbox: BytesMut,
        /// The connection.
        connection: Arc<Connection>,
    },
    /// The connection is passed through.
    Relay {
        /// The socket, and the bytes that were already read.
        raw: Box<Raw>,
        /// The destination.
        relay: Arc<Relay>,
        /// The requested server name, if it is TLS.
        name: Option<Box<str>>,
        /// The connection.
        connection: Arc<Connection>,
    },
}

/// A refused connection.
pub struct Refused {
    /// The reason.
    pub refusal: &'static Refusal,
    /// The socket, if the client can receive a response in clear text.
    pub answerable: Option<Stream>,
    /// The client's address, as far as known.
    pub peer: Option<SocketAddr>,
}

/// Whether any step is needed between the listener's sockets and HTTP.
pub fn is_needed(listener: &Listener) -> bool {
    listener.proxy_protocol.is_some() || speaks_tls(listener) || listener.relays.tcp.is_some()
}

/// Whether clients begin with a ClientHello.
pub fn speaks_tls(listener: &Listener) -> bool {
    listener.tls.is_some() || !listener.relays.passthrough.is_empty()
}

/// Runs the steps of a socket. `None`: the client closed the connection before it sent a byte.
///
/// # Errors
///
/// The refusal.
pub async fn enter(io: Stream, counted: Counted, ends: Ends, metrics: &Metrics) -> Result<Option<Entered>, Refused> {
    let listener = counted.listener().clone();
    let mut state = counted.state(ConnectionState::Idle);
    let mut raw = Raw::new(io);
    let ends = match &listener.proxy_protocol {
        None => ends,
        Some(expected) => {
            state.enter(ConnectionState::Handshake);
            let _seat = metrics.enter_phase(Phase::Accept, counted.accepted());
            match introduced(&mut raw, expected, ends, &counted, listener.terms.idle_timeout).await {
                Ok(Some(ends)) => ends,
                Ok(None) => return Ok(None),
                Err(refusal) => return Err(Refused { refusal, answerable: None, peer: ends.peer }),
            }
        }
    };
    let counted = match counted.admit(ends.peer.map(|peer| peer.ip())) {
        Ok(counted) => counted,
        Err(refusal) => {
            let is_http = !speaks_tls(&listener) && listener.relays.tcp.is_none();
            let answerable = is_http.then(|| raw.into_parts().0);
            return Err(Refused { refusal, answerable, peer: ends.peer });
        }
    };
    let connection = Connection::new(counted, ends.peer, ends.local);
    if let Some(relay) = &listener.relays.tcp {
        return Ok(Some(Entered::Relay { raw: Box::new(raw), relay: relay.clone(), name: None, connection }));
    }
    if !speaks_tls(&listener) {
        let (io, inbox) = raw.into_parts();
        return Ok(Some(Entered::Http { io, inbox, connection }));
    }
    let patience = listener.tls.as_ref().map_or(HANDSHAKE_TIMEOUT, |tls| tls.timeout);
    {
        state.enter(ConnectionState::Idle);
        let _seat = metrics.enter_phase(Phase::Accept, connection.accepted);
        // A client that sends nothing is treated like one that sends slowly.
        let patience = patience.min(listener.terms.idle_timeout);
        if raw.front().is_empty()
            && !within(patience, NoClient::ItsIo, raw.fill()).await.is_some_and(|read| read.unwrap_or(false))
        {
            return Ok(None);
        }
    }
    let _shaking =
        connection.begin_handshake().map_err(|refusal| Refused { refusal, answerable: None, peer: ends.peer })?;
    state.enter(ConnectionState::Handshake);
    let begun = Instant::now();
    let _seat = metrics.enter_phase(Phase::Handshake, begun);
    raw.set_owner(connection.clone());
    // Boxed, so that a waiting connection does not hold the memory of a handshake.
    let secured = Box::pin(secure(raw, listener.tls.as_deref(), &listener.relays.passthrough));
    let secured = within(patience, NoClient::ItsIo, secured).await;
    match secured.unwrap_or(Err((&refusal::HANDSHAKE_TIMEOUT, None))) {
        Ok(Secured::Here(stream, facts)) => {
            let took = begun.elapsed();
            if let Some(tls) = &listener.tls {
                tls.metrics.shaken(facts.version, facts.resumed, took);
            }
            connection.secure(*facts, begun, took);
            Ok(Some(Entered::Http { io: stream, inbox: BytesMut::new(), connection }))
        }
        // The challenge ends with the handshake (RFC 8737 §3).
        Ok(Secured::Proved) => Ok(None),
        Ok(Secured::Elsewhere(raw, relay, name)) => {
            Ok(Some(Entered::Relay { raw, relay, name: Some(name), connection }))
        }
        Err((refusal, answerable)) => Err(Refused { refusal, answerable, peer: ends.peer }),
    }
}

/// Reads the client's address if this peer must send the PROXY protocol; otherwise makes sure that it does not.
async fn introduced(
    raw: &mut Raw,
    expected: &Expected,
    ends: Ends,
    counted: &Counted,
    idle: Duration,
) -> Result<Option<Ends>, &'static Refusal> {
    if !expected.is_required_from(ends.peer.map(|peer| peer.ip())) {
        let look = async {
            while !proxy_protocol::rule_out(raw.front()).map_err(fault)? {
                if !raw.fill().await.unwrap_or(false) {
                    return Ok(None);
                }
            }
            Ok(Some(ends))
        };
        return within(idle, NoClient::ItsIo, look).await.unwrap_or(Ok(None));
    }
    let read = async {
        loop {
            if let Some(told) = proxy_protocol::read(raw.front()).map_err(fault)? {
                raw.skip(told.length);
                let canonical = |end: SocketAddr| SocketAddr::new(end.ip().to_canonical(), end.port());
                return Ok(Some(told.parties.map_or(ends, |(client, gateway)| Ends {
                    peer: Some(canonical(client)),
                    local: Some(canonical(gateway)),
                })));
            }
            if !raw.fill().await.unwrap_or(false) {
                // A health check that only connects is not an error of the proxy.
                return if raw.front().is_empty() { Ok(None) } else { Err(&refusal::ACCEPT_PROXY_PROTOCOL) };
            }
        }
    };
    let left = expected.timeout.saturating_sub(counted.accepted().elapsed());
    within(left, NoClient::ItsIo, read).await.unwrap_or(Err(&refusal::ACCEPT_PROXY_TIMEOUT))
}

fn fault(fault: proxy_protocol::Fault) -> &'static Refusal {
    match fault {
        proxy_protocol::Fault::Malformed => &refusal::ACCEPT_PROXY_PROTOCOL,
        proxy_protocol::Fault::Untrusted => &refusal::ACCEPT_PROXY_UNTRUSTED,
    }
}

/// The reason, and the socket if the client can receive a response in clear text.
type Failure = (&'static Refusal, Option<Stream>);

/// Runs a handshake on a socket that belongs to no listener.
///
/// # Errors
///
/// The reason of its failure.
pub async fn secure_with(io: Stream, tls: &Tls) -> Result<Stream, &'static Refusal> {
    let begun = Instant::now();
    let nowhere = Names::default();
    let secured = Box::pin(secure(Raw::new(io), Some(tls), &nowhere));
    let secured = within(tls.timeout, NoClient::ItsIo, secured).await;
    match secured.unwrap_or(Err((&refusal::HANDSHAKE_TIMEOUT, None))) {
        Ok(Secured::Here(stream, facts)) => {
            tls.metrics.shaken(facts.version, facts.resumed, begun.elapsed());
            Ok(stream)
        }
        Ok(Secured::Elsewhere(..) | Secured::Proved) => Err(&refusal::HANDSHAKE_FAILED),
        Err((refusal, answerable)) => {
            if let Some(io) = answerable {
                super::turn_away(io, refusal).await;
            }
            Err(refusal)
        }
    }
}

/// The result of a ClientHello.
enum Secured {
    /// A TLS connection.
    Here(Box<TlsStream>, Box<Facts>),
    /// A connection to pass through, with the requested name.
    Elsewhere(Box<Raw>, Arc<Relay>, Box<str>),
    /// A completed challenge of a certificate issuer.
    Proved,
}

async fn secure(mut raw: Raw, tls: Option<&Tls>, passthrough: &Names<Arc<Relay>>) -> Result<Secured, Failure> {
    let hello = match read_hello(&mut raw).await {
        Ok(hello) => hello,
        Err(why) if why == &refusal::HANDSHAKE_HTTP => return Err((why, Some(raw.into_parts().0))),
        Err(why) => {
            refuse(raw, why).await;
            return Err((why, None));
        }
    };
    if let Some(name) = &hello.name
        && let Some(relay) = passthrough.find(name)
    {
        return Ok(Secured::Elsewhere(Box::new(raw), relay.clone(), name.clone()));
    }
    if let Some(tls) = tls
        && let Some(context) = tls.challenges.tls(&hello)
    {
        let stream = handshake::shake(context, ISSUED_KIND, raw, None).await.map_err(|why| (why, None))?;
        tls.challenges.metrics.tls_alpn_01.inc();
        handshake::close(stream).await;
        return Ok(Secured::Proved);
    }
    // The table is borrowed for a look-up, and the context for the handshake: replacing the table meanwhile has no
    // effect on it.
    let found = match tls {
        Some(tls) => tls.table.load().find(hello.name.as_deref()).cloned(),
        None if hello.name.is_none() => Err(&refusal::HANDSHAKE_NO_NAME),
        None => Err(&refusal::HANDSHAKE_UNKNOWN_NAME),
    };
    let host = match found {
        Ok(host) => host,
        Err(why) => {
            refuse(raw, why).await;
            return Err((why, None));
        }
    };
    let (kind, context) = match host.choose(&hello).cloned() {
        Ok(chosen) => chosen,
        Err(why) => {
            refuse(raw, why).await;
            return Err((why, None));
        }
    };
    let threads = tls.and_then(|tls| tls.threads.as_ref());
    let stream = handshake::shake(context, kind, raw, threads).await.map_err(|why| (why, None))?;
    let (stream, facts) = handshake::complete(stream, &hello, host.policy()).map_err(|why| (why, None))?;
    Ok(Secured::Here(Box::new(stream), Box::new(facts)))
}

async fn read_hello(raw: &mut Raw) -> Result<Hello, &'static Refusal> {
    let mut reader = hello::Reader::default();
    loop {
        match reader.read(raw.front()) {
            Ok(Some(hello)) => return Ok(hello),
            Ok(None) => {}
            Err(hello::Fault::Http) => return Err(&refusal::HANDSHAKE_HTTP),
            Err(hello::Fault::NotTls) => return Err(&refusal::HANDSHAKE_NOT_TLS),
            Err(hello::Fault::Malformed) => return Err(&refusal::HANDSHAKE_MALFORMED),
            Err(hello::Fault::TooLarge) => return Err(&refusal::HANDSHAKE_TOO_LARGE),
        }
        if !raw.fill().await.unwrap_or(false) {
            return Err(&refusal::HANDSHAKE_ABORTED);
        }
    }
}

/// Sends a fatal alert to a TLS client that is refused before the library reads its bytes (RFC 8446 §6.2).
async fn refuse(mut raw: Raw, why: &'static Refusal) {
    const DECODE_ERROR: u8 = 50;
    const INTERNAL_ERROR: u8 = 80;
    const UNRECOGNIZED_NAME: u8 = 112;
    let alert = if why == &refusal::HANDSHAKE_UNKNOWN_NAME || why == &refusal::HANDSHAKE_NO_NAME {
        UNRECOGNIZED_NAME
    } else if why == &refusal::HANDSHAKE_MALFORMED || why == &refusal::HANDSHAKE_TOO_LARGE {
        DECODE_ERROR
    } else if why == &refusal::HANDSHAKE_AWAITED {
        INTERNAL_ERROR
    } else {
        return;
    };
    tls::handshake::alert(&mut raw, alert).await;
}
