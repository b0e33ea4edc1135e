//! The sessions that hooks are given: one for each exchange under way on a worker, used again and again.
//!
//! Pingora makes one with each request, with room for its cache and its modules. Here only the client's own session in
//! it changes; what is Pingora's stays as it was made and is never touched by the driver. All of them are large, so
//! they stay where they are, and what changes is a pointer.

use std::cell::RefCell;
use std::io::Cursor;
use std::thread::LocalKey;

use pingora::protocols::http::ServerSession;
use pingora::protocols::http::custom::server::Session as CustomSession;
use pingora_proxy::Session;

/// The idle sessions of either kind that a worker keeps.
const KEPT_MAX: usize = 64;

/// Sessions that stay where they are.
type Kept<S> = RefCell<Vec<Box<S>>>;

thread_local! {
    static KEPT: Kept<Session> = const { RefCell::new(Vec::new()) };
    static NOBODY: Kept<ServerSession> = const { RefCell::new(Vec::new()) };
}

/// A session for hooks, of this client. Pingora's own are given to [`of_pingora`].
pub fn take(client: Box<dyn CustomSession>) -> Box<Session> {
    let kept = KEPT.with_borrow_mut(Vec::pop);
    let mut session = kept.unwrap_or_else(|| Box::new(Session::new_h1(Box::new(Cursor::new(Vec::<u8>::new())))));
    put(&mut session.downstream_session, client);
    session
}

/// A session for hooks, of a client whose session is Pingora's.
pub fn of_pingora(client: ServerSession) -> Box<Session> {
    let mut session = take(Box::new(()));
    *session.downstream_session = client;
    session
}

/// Keeps a session for the next exchange, and drops that of its client.
pub fn give_back(mut session: Box<Session>) {
    put(&mut session.downstream_session, Box::new(()));
    keep(&KEPT, session);
}

/// Takes the client's session out of one, and keeps the rest.
pub fn take_client(mut session: Box<Session>) -> ServerSession {
    let client = std::mem::replace(&mut *session.downstream_session, ServerSession::new_custom(Box::new(())));
    keep(&KEPT, session);
    client
}

/// Puts a session of ours in the place of whichever is there, which is dropped.
pub fn put(place: &mut ServerSession, session: Box<dyn CustomSession>) {
    match place {
        ServerSession::Custom(custom) => *custom = session,
        other => *other = ServerSession::new_custom(session),
    }
}

/// A session with nobody behind it, for the time in which the client's own is elsewhere.
pub fn nobody() -> Box<ServerSession> {
    NOBODY.with_borrow_mut(Vec::pop).unwrap_or_else(|| Box::new(ServerSession::new_custom(Box::new(()))))
}

/// Keeps the room of a session that has done its part. It is [`nobody`]'s from now on.
pub fn put_away(mut session: Box<ServerSession>) {
    put(&mut session, Box::new(()));
    keep(&NOBODY, session);
}

fn keep<S>(kept: &'static LocalKey<Kept<S>>, session: Box<S>) {
    // A thread that ends keeps nothing.
    let _ = kept.try_with(|kept| {
        let mut kept = kept.borrow_mut();
        if kept.len() < KEPT_MAX {
            kept.push(session);
        }
    });
}
