//! The sender's side towards the client: its session, and the path past it.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use http::{HeaderMap, Method, Version};
use pingora::http::RequestHeader;
use pingora::protocols::http::{HttpTask, ServerSession};
use pingora::{Error, Result};

use super::past::Past;
use crate::client::http1;
use crate::client::http2::Control;
use crate::slow_client::waiting::Who;

/// A write in progress. It owns the session.
pub(super) type Write = Pin<Box<dyn Future<Output = (Box<ServerSession>, Result<bool>)> + Send>>;

/// The state of the session.
pub(super) enum State {
    /// No write is in progress.
    Idle(Box<ServerSession>),
    /// A write is in progress.
    Writing(Write),
    /// The session was released, or it was lost with an abandoned write.
    Gone,
}

/// The client of a response.
pub struct ClientSide {
    pub(super) state: State,
    /// On HTTP/1: the path past the session.
    pub(super) past: Option<Past>,
    /// On HTTP/2: the control of the client's stream.
    pub(super) control: Option<Control>,
    /// The client's HTTP version.
    pub(super) version: Version,
    /// The request method is HEAD.
    pub(super) head_only: bool,
    /// The connection closes after this response, and the response announces the close.
    pub(super) last_on_connection: bool,
    pub(super) who: Who,
}

impl ClientSide {
    pub(super) fn new(
        (session, past, control): (Box<ServerSession>, Option<Past>, Option<Control>),
        request: &RequestHeader,
        who: Who,
    ) -> Self {
        let (version, head_only) = (request.version, request.method == Method::HEAD);
        ClientSide { state: State::Idle(session), past, control, version, head_only, last_on_connection: false, who }
    }

    /// The session; `None` while a write is in progress.
    pub fn session(&mut self) -> Option<&mut ServerSession> {
        let sends = self.sends();
        match &mut self.state {
            State::Idle(session) if !sends => Some(session),
            _ => None,
        }
    }

    /// Whether bytes are being sent past the session.
    pub(super) fn sends(&self) -> bool {
        self.past.as_ref().is_some_and(|past| past.sends)
    }

    /// Total number of bytes that the client's host has acknowledged, while the socket accepts no more. `None`: it
    /// does, or it is unknown.
    pub(super) fn delivered_while_stalled(&self) -> Option<u64> {
        match (&self.past, &self.control) {
            (Some(past), _) => past.bypass.delivered_while_stalled(),
            (None, control) => control.as_ref()?.delivered_while_stalled(),
        }
    }

    /// Returns the session for good. `None`: a write in progress owns it.
    pub fn release(&mut self) -> Option<Box<ServerSession>> {
        if self.sends() {
            return None;
        }
        match std::mem::replace(&mut self.state, State::Gone) {
            State::Idle(mut session) => {
                if let Some(answered) = self.past.as_mut().and_then(|past| past.answered.take()) {
                    session.send_downstream_proxy_task(HttpTask::Header(answered, false));
                }
                Some(session)
            }
            other => {
                self.state = other;
                None
            }
        }
    }

    /// Puts back the session that [`ClientSide::release`] returned.
    pub fn put_back(&mut self, session: Box<ServerSession>) {
        self.state = State::Idle(session);
    }

    /// Whether the client uses HTTP/2.
    pub fn is_http2(&self) -> bool {
        self.control.is_some()
    }

    /// Whether the request body was read completely. `None`: only the session knows, and a write in progress owns it.
    pub fn body_is_read(&mut self) -> Option<bool> {
        match &self.past {
            Some(past) => Some(past.bypass.is_read()),
            None => self.session().map(|session| session.is_body_done()),
        }
    }

    /// Takes the trailers of a complete HTTP/1 request. A second call returns `None`. On HTTP/2 the stream has them.
    pub fn take_request_trailers(&self) -> Option<HeaderMap> {
        self.past.as_ref()?.bypass.take_trailers()
    }

    /// Whether bytes of the request body are unread that the session does not know of, so that the connection cannot be
    /// reused.
    pub(super) fn leaves_body(&self) -> bool {
        self.past.as_ref().is_some_and(|past| past.reads && !past.bypass.is_read())
    }

    /// Prevents further requests on the client's connection.
    pub fn end_after_answer(&self) {
        self.past.iter().for_each(|past| past.bypass.end_after_answer());
    }

    /// Closes the connection after this response; the response announces the close.
    pub fn close_after_answer(&mut self) {
        self.last_on_connection = true;
    }

    /// Ready when the client has closed its connection or stream. Pending while a write is in progress, which detects
    /// the close itself.
    pub fn poll_gone(&mut self, cx: &mut Context<'_>) -> Poll<Box<Error>> {
        if self.session().is_none() {
            return Poll::Pending;
        }
        if let Some(control) = &self.control {
            return control.poll_closed(cx);
        }
        if self.body_is_read() != Some(true) {
            // The read of the body detects the close.
            return Poll::Pending;
        }
        if let Some(past) = &self.past {
            return past.bypass.poll_gone(cx).map(http1::gone);
        }
        let Some(session) = self.session() else { return Poll::Pending };
        let mut idle = std::pin::pin!(session.read_body_or_idle(true));
        match ready!(idle.as_mut().poll(cx)) {
            Err(error) => Poll::Ready(error),
            // HTTP/1 delivers nothing after the body.
            Ok(_) => Poll::Pending,
        }
    }

    /// As [`ClientSide::poll_gone`], and also while the body is not being read. `reads`: the body is being read.
    pub fn poll_left(&mut self, cx: &mut Context<'_>, reads: bool) -> Poll<()> {
        if self.control.is_none() && self.body_is_read() == Some(false) {
            return match &self.past {
                Some(past) if !reads => past.bypass.poll_left(cx).map(drop),
                _ => Poll::Pending,
            };
        }
        self.poll_gone(cx).map(drop)
    }
}
