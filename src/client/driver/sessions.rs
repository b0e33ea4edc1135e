//! The sessions that hooks are given: one for each exchange under way on a worker, used again and again.
//!
//! Pingora makes one with each request, with room for its cache and its modules. Here only the client's own session in
//! it changes; what is Pingora's stays as it was made and is never touched by the driver.

use std::cell::RefCell;
use std::io::Cursor;

use pingora::protocols::http::ServerSession;
use pingora_proxy::Session;

/// The idle sessions that a worker keeps.
const KEPT_MAX: usize = 64;

thread_local! {
    static KEPT: RefCell<Vec<Session>> = const { RefCell::new(Vec::new()) };
}

/// A session for hooks, of this client.
pub fn take(client: ServerSession) -> Session {
    let kept = KEPT.with_borrow_mut(Vec::pop);
    let mut session = kept.unwrap_or_else(|| Session::new_h1(Box::new(Cursor::new(Vec::<u8>::new()))));
    *session.downstream_session = client;
    session
}

/// Takes the client's session out again; the rest is kept for the next exchange.
pub fn give_back(mut session: Session) -> ServerSession {
    let client = std::mem::replace(&mut *session.downstream_session, ServerSession::new_custom(Box::new(())));
    KEPT.with_borrow_mut(|kept| {
        if kept.len() < KEPT_MAX {
            kept.push(session);
        }
    });
    client
}
