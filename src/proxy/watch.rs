//! Sees the client leave while filters wait. Its session, which they change the header of, is out of reach meanwhile.

use std::future::Future;
use std::os::fd::RawFd;
use std::task::{Context, Poll};
use std::time::Duration;

use super::exchange::Exchange;
use super::route::Route;
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
    /// The client of an exchange that takes this route.
    pub fn of(exchange: &Exchange, route: &Route) -> Watch {
        let socket = exchange.client.connection.as_ref().and_then(|connection| connection.socket());
        // In a tunnel each direction ends by itself.
        let aborts = route.half_close_aborts && exchange.switched.is_none();
        let way = exchange.client.connection.as_ref().and_then(|connection| connection.bypass());
        Watch { control: exchange.client.control.clone(), socket, aborts, way, look: Look::default() }
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
