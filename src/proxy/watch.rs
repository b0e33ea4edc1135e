//! Detects that the client leaves while filters wait. The filters borrow the session's header, so the session cannot be
//! polled meanwhile.

use std::future::Future;
use std::os::fd::RawFd;
use std::task::{Context, Poll};
use std::time::Duration;

use futures::FutureExt;

use crate::client::broken::{CloseCheck, Leaving};
use crate::client::http2::Control;
use crate::client::stream::Bypass;
use crate::error::{Refusal, refusal};
use crate::filter::Verdict;
use crate::party::wait::{ClientWatch, Ended, Wait};

/// A watch of the client; see the module.
pub struct Watch {
    control: Option<Control>,
    socket: Option<RawFd>,
    aborts: bool,
    /// The path past the session, which knows how much of the body is unread.
    bypass: Option<Bypass>,
    look: CloseCheck,
}

impl Watch {
    /// Watches an HTTP/2 stream, or the socket of a connection. `aborts`: a client that closes its sending side has
    /// left. `bypass` knows how much of the body is unread.
    pub fn new(control: Option<Control>, socket: Option<RawFd>, aborts: bool, bypass: Option<Bypass>) -> Watch {
        Watch { control, socket, aborts, bypass, look: CloseCheck::default() }
    }

    /// Returns the verdict of filters, or the refusal `left` once the client has left. Watches only while the filters
    /// wait. Each filter has its own deadline; `patience` limits all of them together.
    pub fn during(
        &mut self,
        patience: Duration,
        filters: impl Future<Output = Verdict>,
        left: &'static Refusal,
    ) -> impl Future<Output = Verdict> {
        Wait::at_most(patience, self).on(filters).map(|ended| match ended {
            Ended::Done(verdict) => verdict,
            Ended::Left(()) => left.into(),
            Ended::Late => Verdict::from(&refusal::ROUTE_FILTER_TIMEOUT),
        })
    }
}

impl ClientWatch for Watch {
    type Left = ();

    /// Ready once the client has reset its stream, or has left.
    fn poll_left(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if let Some(control) = &self.control {
            return control.poll_closed(cx).map(drop);
        }
        match (&self.bypass, self.socket) {
            (_, Some(socket)) if self.aborts => self.look.poll(cx, socket, Leaving::Ended).map(drop),
            (Some(bypass), _) => bypass.poll_left(cx).map(drop),
            (None, Some(socket)) => self.look.poll(cx, socket, Leaving::Broken).map(drop),
            (None, None) => Poll::Pending,
        }
    }
}
