//! A pool of the sessions that hooks receive: one per active exchange of a worker, reused.
//!
//! Pingora creates a session for each request, with space for its cache and its modules. Here only the client's session
//! inside is replaced; the driver never touches Pingora's other parts. Sessions are large, so they are boxed, and
//! moving one moves a pointer.

use std::cell::RefCell;
use std::io::Cursor;
use std::thread::LocalKey;

use bytes::Bytes;
use pingora::Result;
use pingora::protocols::http::custom::server::Session as CustomSession;
use pingora::protocols::http::{HttpTask, ServerSession};
use pingora_proxy::Session;

/// Maximum number of idle sessions of each kind that a worker keeps.
const KEPT_MAX: usize = 64;

/// Idle sessions, boxed.
type Kept<S> = RefCell<Vec<Box<S>>>;

thread_local! {
    static KEPT: Kept<Session> = const { RefCell::new(Vec::new()) };
    static PLACEHOLDERS: Kept<ServerSession> = const { RefCell::new(Vec::new()) };
}

/// A session for hooks with this client. For Pingora's own sessions see [`of_pingora`].
pub fn take(client: Box<dyn CustomSession>) -> Box<Session> {
    let kept = KEPT.with_borrow_mut(Vec::pop);
    let mut session = kept.unwrap_or_else(|| Box::new(Session::new_h1(Box::new(Cursor::new(Vec::<u8>::new())))));
    put(&mut session.downstream_session, client);
    session
}

/// A session for hooks whose client is a Pingora session.
pub fn of_pingora(client: ServerSession) -> Box<Session> {
    let mut session = take(Box::new(()));
    *session.downstream_session = client;
    session
}

/// Returns a session to the pool and drops its client.
pub fn give_back(mut session: Box<Session>) {
    put(&mut session.downstream_session, Box::new(()));
    keep(&KEPT, session);
}

/// Takes the client's session and returns the rest to the pool.
pub fn take_client(mut session: Box<Session>) -> ServerSession {
    let client = std::mem::replace(&mut *session.downstream_session, ServerSession::new_custom(Box::new(())));
    keep(&KEPT, session);
    client
}

/// Reads the next piece of the request body, or, with `is_read`, waits until the client leaves.
///
/// Here and below, Pingora's own sessions are boxed: a future that can hold those of all their protocols is large, and
/// is copied to where it is polled.
pub async fn read_body_or_idle(client: &mut ServerSession, is_read: bool) -> Result<Option<Bytes>> {
    match client {
        ServerSession::Custom(own) => own.read_body_or_idle(is_read).await,
        pingoras => Box::pin(pingoras.read_body_or_idle(is_read)).await,
    }
}

/// Writes parts of the response. `true`: the response is complete.
pub async fn write(client: &mut ServerSession, parts: Vec<HttpTask>) -> Result<bool> {
    match client {
        ServerSession::Custom(own) => own.response_duplex_vec(parts).await,
        pingoras => Box::pin(pingoras.response_duplex_vec(parts)).await,
    }
}

/// Ends the body of the response.
pub async fn finish_body(client: &mut ServerSession) -> Result<()> {
    match client {
        ServerSession::Custom(own) => own.finish().await,
        pingoras => Box::pin(pingoras.finish_body()).await,
    }
}

/// Replaces the session in `place`, which is dropped.
pub fn put(place: &mut ServerSession, session: Box<dyn CustomSession>) {
    match place {
        ServerSession::Custom(custom) => *custom = session,
        other => *other = ServerSession::new_custom(session),
    }
}

/// A placeholder session without a client, used while the client's session is elsewhere.
pub fn placeholder() -> Box<ServerSession> {
    PLACEHOLDERS.with_borrow_mut(Vec::pop).unwrap_or_else(|| Box::new(ServerSession::new_custom(Box::new(()))))
}

/// Returns the box of a finished session to the pool of placeholders ([`placeholder`]).
pub fn put_away(mut session: Box<ServerSession>) {
    put(&mut session, Box::new(()));
    keep(&PLACEHOLDERS, session);
}

fn keep<S>(kept: &'static LocalKey<Kept<S>>, session: Box<S>) {
    // While the thread ends, the session is dropped.
    let _ = kept.try_with(|kept| {
        let mut kept = kept.borrow_mut();
        if kept.len() < KEPT_MAX {
            kept.push(session);
        }
    });
}
