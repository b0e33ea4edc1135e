//! The task of an exchange: it is polled when the scheduler and the exchange itself permit it, and its polls are timed.
//!
//! An exchange mostly waits for the client or its upstream. Its own time is the time in which its future is polled; it
//! is measured at that future ([`ExchangeTask`]), not derived from phases.

use std::cell::{Cell, RefCell};
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use tokio::time::Sleep;

use super::{Class, Grant, Schedulers};
use crate::eventloop::worker::{self, Spot, Word};
use crate::party::wait::Eye;
use crate::phase::Phase;

thread_local! {
    /// Now minus the own time of the exchange that this thread polls: its start, had it never waited.
    static POLLED_SINCE: Cell<Option<Instant>> = const { Cell::new(None) };
}

/// Controls the task of an exchange.
pub trait ExchangeControl: Send + Sync {
    /// Ready: the exchange may be polled. Otherwise this does the work that is due meanwhile, and registers a wake-up.
    fn poll_ready(&self, cx: &mut Context<'_>, now: Instant) -> Poll<()>;

    /// Reports that the exchange was polled for this time.
    fn polled(&self, time: Duration);

    /// The exchange is pending. Registers a wake-up for its deadline.
    fn pending(&self, cx: &mut Context<'_>);

    /// The gateway stops: the exchange must end, and may still tell its client why.
    fn cancel(&self);

    /// If the exchange must end regardless of what it waits for: the time it still has to end by itself.
    fn grace(&self) -> Option<Duration>;
}

/// How long an abandoned exchange may take to end by itself: to tell its client, or to release its endpoint.
pub const CANCEL_GRACE: Duration = Duration::from_millis(500);

/// The exchange had to end and did not do so in time: its future must be dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Abandoned;

thread_local! {
    /// The control that the currently polled exchange has just attached.
    static ATTACHED: RefCell<Option<Arc<dyn ExchangeControl>>> = const { RefCell::new(None) };
}

/// Attaches the control of the exchange on this thread. No effect outside a [`ExchangeTask`] future.
pub fn attach(control: Arc<dyn ExchangeControl>) {
    ATTACHED.set(Some(control));
}

/// The future of an exchange: its polls are timed, and its control is asked before each. Code inside it calls
/// [`own_time`].
///
/// An abandoned exchange gets a moment to end by itself ([`CANCEL_GRACE`]). If it does not, because only dropping it
/// cancels what it waits for, the result is [`Abandoned`], and the caller drops it.
pub struct ExchangeTask<F> {
    /// `None` after it was dropped.
    future: Option<F>,
    spent: Duration,
    control: Option<Arc<dyn ExchangeControl>>,
    /// Its place when it was last polled.
    at: Word,
    cancelled: bool,
    /// The timer that starts when it is abandoned.
    grace: Option<Pin<Box<Sleep>>>,
}

impl<F> ExchangeTask<F> {
    /// Times the polls of `future`.
    pub fn new(future: F) -> Self {
        let (control, at) = (None, Word::at(Spot::phase(Phase::Header)));
        ExchangeTask { future: Some(future), spent: Duration::ZERO, control, at, cancelled: false, grace: None }
    }

    /// The gateway stops: the exchange must end. Poll it again afterwards.
    pub fn cancel(&mut self) {
        self.cancelled = true;
        if let Some(control) = &self.control {
            control.cancel();
        }
    }

    /// Drops the future and counts the clean-up as part of the exchange.
    pub fn end(&mut self, end: impl FnOnce(Option<F>)) {
        let future = self.future.take();
        self.measured(Instant::now(), |_| end(future));
    }

    /// Counts the time of `work` as part of the exchange.
    fn measured<T>(&mut self, begin: Instant, work: impl FnOnce(&mut Self) -> T) -> T {
        let worker = worker::here().map(|worker| (worker, worker.begin(self.at, begin)));
        let outer = POLLED_SINCE.replace(begin.checked_sub(self.spent));
        let done = work(self);
        POLLED_SINCE.set(outer);
        if let Some((worker, outer)) = worker {
            self.at = worker.end(outer);
        }
        done
    }

    /// Ready when it is abandoned and its time to end is over.
    fn poll_grace(&mut self, cx: &mut Context<'_>) -> Poll<Abandoned> {
        let control = self.control.as_ref().and_then(|control| control.grace());
        let Some(left) = control.or(self.cancelled.then_some(CANCEL_GRACE)) else { return Poll::Pending };
        let grace = self.grace.get_or_insert_with(|| Box::pin(tokio::time::sleep(left)));
        grace.as_mut().poll(cx).map(|()| Abandoned)
    }
}

impl<F: Future + Unpin> Future for ExchangeTask<F> {
    type Output = Result<F::Output, Abandoned>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let begin = Instant::now();
        let closed = self.control.as_ref().is_some_and(|control| control.poll_ready(cx, begin).is_pending());
        if closed {
            self.spent += begin.elapsed();
            return self.poll_grace(cx).map(Err);
        }
        let polled = self.measured(begin, |own| match &mut own.future {
            Some(future) => Pin::new(future).poll(cx),
            None => Poll::Pending,
        });
        if let Some(control) = ATTACHED.take() {
            if self.cancelled {
                control.cancel();
                cx.waker().wake_by_ref();
            }
            self.control = Some(control);
        }
        let time = begin.elapsed();
        if let Some(control) = &self.control {
            control.polled(time);
            if polled.is_pending() {
                control.pending(cx);
            }
        }
        self.spent += time;
        match polled {
            Poll::Ready(ended) => Poll::Ready(Ok(ended)),
            Poll::Pending => self.poll_grace(cx).map(Err),
        }
    }
}

/// The summed time of the polls of the exchange on this thread, including the current one. Zero outside a
/// [`ExchangeTask`] future.
pub fn own_time(now: Instant) -> Duration {
    POLLED_SINCE.get().map_or(Duration::ZERO, |since| now.saturating_duration_since(since))
}

/// The client of an exchange, as the scheduler sees it. It detects that the client leaves while its exchange waits for
/// a grant.
pub trait Client: Eye {
    /// Whether this is the first exchange of a connection, and its response has not begun.
    fn is_new(&self) -> bool;
}

/// The first exchange of a connection, polled when there is time for new connections.
pub struct NewcomerTask<F, C> {
    future: F,
    client: C,
    schedulers: Arc<Schedulers>,
    grant: Option<Grant>,
}

impl<F, C> NewcomerTask<F, C> {
    /// Wraps the exchange of `future`. It waits for grants as long as its client is new.
    pub fn new(future: F, client: C, schedulers: Arc<Schedulers>) -> Self {
        NewcomerTask { future, client, schedulers, grant: None }
    }
}

impl<F: Future + Unpin, C: Client + Unpin> Future for NewcomerTask<F, C> {
    type Output = F::Output;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<F::Output> {
        if !self.client.is_new() {
            self.grant = None;
            return Pin::new(&mut self.future).poll(cx);
        }
        let scheduler = self.schedulers.here();
        let begin = Instant::now();
        if self.grant.is_none() {
            self.grant = scheduler.request_for_newcomer(begin);
        }
        let NewcomerTask { grant: asked, client, .. } = &mut *self;
        if let Some(grant) = asked {
            if grant.poll(cx).is_pending() {
                // If the client has left, the poll detects this, and needs no grant.
                ready!(client.poll_left(cx));
            }
            *asked = None;
        }
        let polled = Pin::new(&mut self.future).poll(cx);
        scheduler.charge(Class::Newcomer, begin.elapsed());
        polled
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::super::tests::{schedulers, waiting};
    use super::*;

    /// A client that is new as long as this is true.
    struct Arriving(Arc<AtomicBool>);

    impl Eye for Arriving {
        type Left = ();

        fn poll_left(&mut self, _: &mut Context<'_>) -> Poll<()> {
            Poll::Pending
        }
    }

    impl Client for Arriving {
        fn is_new(&self) -> bool {
            self.0.load(Ordering::Relaxed)
        }
    }

    #[tokio::test]
    async fn a_new_connection_waits_until_there_is_time_and_once_its_response_begins_no_more() {
        let schedulers = schedulers();
        let scheduler = schedulers.here();
        let new = Arc::new(AtomicBool::new(true));
        let mut polls = 0;
        let future = std::future::poll_fn(|_| {
            polls += 1;
            if polls == 3 { Poll::Ready(()) } else { Poll::Pending }
        });
        let mut task = NewcomerTask::new(future, Arriving(new.clone()), schedulers);
        let mut poll = || Pin::new(&mut task).poll(&mut Context::from_waker(std::task::Waker::noop()));
        assert!(poll().is_pending());
        assert_eq!(waiting(&scheduler), 0, "there was time");
        scheduler.charge(Class::Newcomer, Duration::from_secs(1));
        assert!(poll().is_pending());
        assert_eq!(waiting(&scheduler), 1);
        new.store(false, Ordering::Relaxed);
        assert!(poll().is_pending());
        assert_eq!(waiting(&scheduler), 0, "it has left the queue");
        assert!(poll().is_ready());
        assert_eq!(polls, 3);
    }

    fn busy(time: Duration) {
        let begin = Instant::now();
        while begin.elapsed() < time {
            std::hint::spin_loop();
        }
    }

    #[tokio::test]
    async fn work_counts_and_waiting_does_not() {
        let exchange = async {
            busy(Duration::from_millis(5));
            tokio::time::sleep(Duration::from_millis(100)).await;
            busy(Duration::from_millis(5));
            own_time(Instant::now())
        };
        let own = ExchangeTask::new(Box::pin(exchange)).await.expect("nobody gives it up");
        assert!(own >= Duration::from_millis(10), "{own:?}");
        assert!(own < Duration::from_millis(90), "{own:?}");
        assert_eq!(own_time(Instant::now()), Duration::ZERO);
    }

    /// Ends when cancelled, or ignores the stop.
    #[derive(Default)]
    struct Ending {
        listens: bool,
        told: AtomicBool,
    }

    impl ExchangeControl for Ending {
        fn poll_ready(&self, _: &mut Context<'_>, _: Instant) -> Poll<()> {
            Poll::Ready(())
        }

        fn polled(&self, _: Duration) {}

        fn pending(&self, _: &mut Context<'_>) {}

        fn cancel(&self) {
            self.told.store(true, Ordering::Relaxed);
        }

        fn grace(&self) -> Option<Duration> {
            self.told.load(Ordering::Relaxed).then_some(CANCEL_GRACE)
        }
    }

    #[tokio::test(start_paused = true)]
    async fn an_exchange_that_is_given_up_may_end_by_itself_and_else_is_over_a_moment_later() {
        let control_of = |listens| Some(Arc::new(Ending { listens, ..Ending::default() }));
        for (control, expected, after) in [
            (control_of(true), Ok("ended well"), Duration::ZERO),
            (control_of(false), Err(Abandoned), CANCEL_GRACE),
            (None, Err(Abandoned), CANCEL_GRACE),
        ] {
            let mut exchange = ExchangeTask::new(Box::pin(async move {
                if let Some(control) = &control {
                    attach(control.clone());
                }
                let listens = control.as_ref().filter(|control| control.listens);
                std::future::poll_fn(|_| match listens {
                    Some(control) if control.grace().is_some() => Poll::Ready("ended well"),
                    _ => Poll::Pending,
                })
                .await
            }));
            assert!(tokio::time::timeout(Duration::from_secs(60), &mut exchange).await.is_err(), "it waits");
            exchange.cancel();
            let begin = tokio::time::Instant::now();
            assert_eq!((&mut exchange).await, expected);
            assert!(begin.elapsed() >= after && begin.elapsed() < after + Duration::from_millis(10));
            exchange.end(|future| assert!(future.is_some()));
        }
    }
}
