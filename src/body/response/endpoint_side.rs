//! The sender's side towards the endpoint: what it needs to slow the endpoint down, or to stop it.

use std::task::{Context, Poll};

use crate::party::pauses::Pauses;
use crate::upstream::transport::http2::StreamHandle;
use crate::upstream::window::Window;

/// The connection or stream that a response comes from.
#[derive(Default)]
pub struct EndpointSide {
    /// The receive window of the endpoint's connection, if only this exchange uses the connection.
    pub(super) window: Option<Window>,
    /// Otherwise: the exchange's stream of the shared connection.
    pub(super) stream: Option<StreamHandle>,
}

impl EndpointSide {
    /// Aborts receiving from the endpoint: its connection or its stream.
    pub fn abort(&mut self) {
        self.window.iter_mut().for_each(Window::abort);
        self.stream.iter().for_each(StreamHandle::hang_up);
    }

    /// Sets the receive window of the endpoint's connection for this attempt. `None`: the connection no longer belongs
    /// to the exchange.
    pub fn set_window(&mut self, window: Option<Window>) {
        self.window = window;
    }

    /// Sets the stream of this attempt, on a connection that exchanges share.
    pub fn set_stream(&mut self, stream: StreamHandle) {
        self.stream = Some(stream);
    }

    /// Number of sent bytes that the endpoint's host has not acknowledged, if only this exchange uses the connection.
    pub fn unacknowledged(&self) -> Option<usize> {
        self.window.as_ref().map(Window::unacknowledged)
    }

    /// The pauses of the worker that drives the connection, if exchanges share it (HTTP/2) and its driver has begun.
    pub fn driver(&self) -> Option<&'static Pauses> {
        self.stream.as_ref()?.driver()
    }

    /// Ready when the endpoint has accepted the request body given so far, as far as this is visible. If the endpoint
    /// has `answered`, the request ends and need not be accepted.
    pub fn poll_taken(&self, cx: &mut Context<'_>, answered: bool) -> Poll<()> {
        let Some(stream) = &self.stream else { return Poll::Ready(()) };
        if answered {
            stream.end_request();
        }
        stream.poll_taken(cx)
    }

    /// Opens the receive window, since the rest is not received through this sender.
    pub fn open_window(&mut self) {
        if let Some(mut window) = self.window.take() {
            window.open();
        }
    }
}
