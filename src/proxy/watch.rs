//! Sees the client leave while filters wait. Its session, which they change the header of, is out of reach meanwhile.

use std::future::Future;
use std::os::fd::RawFd;
use std::task::{Context, Poll};
use std::time::Duration;

use crate::client::broken::{Leaving, Look};
use crate::client::http2::Control;
use crate::client::stream::Bypass;
use crate::error::{Refusal, refusal};
use crate::filter::Verdict;
use crate::party::wait::{Ended, Eye, Wait};

/// See the module.
pub struct Watch {
    control: Option<Control>,
    socket: Option<RawFd>,
    aborts: bool,
    /// The way past its session, which knows how much of the body is still to come.
    way: Option<Bypass>,
    look: Look,
}

impl Watch {
    /// Looks at a stream of HTTP/2, or at the socket of a connection. `aborts`: a client that closes its sending side
    /// has left. `way` knows how much of the body is still to come.
    pub fn new(control: Option<Control>, socket: Option<RawFd>, aborts: bool, way: Option<Bypass>) -> Watch {
        Watch { control, socket, aborts, way, look: Look::default() }
    }

    /// The verdict of filters; the refusal `left` once the client has left. Looks only while they wait. Each filter has
    /// a deadline of its own; `patience` is that of all of them together.
    pub async fn during(
        &mut self,
        patience: Duration,
        filters: impl Future<Output = Verdict>,
        left: &'static Refusal,
    ) -> Verdict {
        match Wait::at_most(patience, self).on(filters).await {
            Ended::Done(verdict) => verdict,
            Ended::Left(()) => left.into(),
            Ended::Late => Verdict::from(&refusal::ROUTE_FILTER_TIMEOUT),
        }
    }
}

impl Eye for Watch {
    type Left = ();

    /// Ready once the client has given its stream up, or has left.
    fn poll_left(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if let Some(control) = &self.control {
            return control.poll_closed(cx).map(drop);
        }
        match (&self.way, self.socket) {
            (_, Some(socket)) if self.aborts => self.look.poll(cx, socket, Leaving::Ended).map(drop),
            (Some(way), _) => way.poll_left(cx).map(drop),
            (None, Some(socket)) => self.look.poll(cx, socket, Leaving::Broken).map(drop),
            (None, None) => Poll::Pending,
        }
    }
}
