//! The task of an exchange: it waits for a grant while its client is new, asks the exchange's control, polls the
//! exchange, and charges the time of the poll to one class.
//!
//! An exchange mostly waits for the client or its upstream. Its own time is the time in which its future is polled; it
//! is measured at that future ([`ExchangeTask`]), not derived from phases.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use tokio::time::Sleep;

use super::{CURRENT, Class, Grant, Schedulers};
use crate::eventloop::worker::{self, Activity, PhaseOrFilter};
use crate::party::wait::ClientWatch;
use crate::phase::Phase;

/// How long a cancelled exchange may take to end by itself: to tell its client, or to release its endpoint.
pub const CANCEL_GRACE: Duration = Duration::from_millis(500);

/// The client of an exchange, as the scheduler sees it. It detects that the client leaves while its exchange waits for
/// a grant.
pub trait Client: ClientWatch {
    /// Whether this is the first exchange of a connection, and its response has not begun.
    fn is_new(&self) -> bool;
}

/// The kind of work in the last poll of an exchange.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Work {
    /// A small exchange, or the small part of one.
    Small,
    /// A bulk transfer, without a grant.
    Bulk,
    /// A bulk transfer that used a grant of this class.
    Granted(Class),
}

/// Controls the task of an exchange.
pub trait ExchangeControl: Send + Sync {
    /// Ready: the exchange may be polled. Otherwise this does the work that is due meanwhile, and registers a wake-up.
    fn poll_ready(&self, cx: &mut Context<'_>, now: Instant) -> Poll<()>;

    /// The kind of work in the last poll. Called once after each poll.
    fn work(&self) -> Work;

    /// The exchange is pending. Registers a wake-up for its deadline.
    fn pending(&self, cx: &mut Context<'_>);

    /// The gateway stops: the exchange must end, and may still tell its client why.
    fn cancel(&self);

    /// If the exchange must end regardless of what it waits for: the time it still has to end by itself.
    fn grace(&self) -> Option<Duration>;
}

/// Attaches the control of the exchange on this thread. No effect outside an [`ExchangeTask`].
pub fn attach(control: Arc<dyn ExchangeControl>) {
    CURRENT.with(|current| *current.attached.borrow_mut() = Some(control));
}

/// The summed time of the polls of the exchange on this thread, including the current one. Zero outside an
/// [`ExchangeTask`].
pub fn own_time(now: Instant) -> Duration {
    let since = CURRENT.try_with(|current| current.since.get()).ok().flatten();
    since.map_or(Duration::ZERO, |since| now.saturating_duration_since(since))
}

/// The exchange had to end and did not do so in time: its future must be dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Abandoned;

/// The class that pays for a poll. A grant is paid for by its class only, also on a new connection.
fn payer(is_new: bool, work: Work) -> Option<Class> {
    match work {
        Work::Granted(class) => Some(class),
        Work::Small | Work::Bulk => is_new.then_some(Class::NewConnection),
    }
}

/// The future of an exchange, as a worker polls it; see the module. Code inside it calls [`own_time`] and [`attach`].
///
/// A cancelled exchange gets a moment to end by itself ([`CANCEL_GRACE`]). If it does not, because only dropping it
/// cancels what it waits for, the result is [`Abandoned`], and the caller drops it.
pub struct ExchangeTask<F, C> {
    /// `None` after it was dropped.
    future: Option<F>,
    client: C,
    schedulers: Arc<Schedulers>,
    turn: Turn,
    control: Option<Arc<dyn ExchangeControl>>,
    spent: Duration,
    /// Its place when it was last polled.
    at: Activity,
    cancelled: bool,
    /// The timer that starts when it is cancelled.
    grace: Option<Pin<Box<Sleep>>>,
}

/// Whether an exchange on a new connection may be polled.
enum Turn {
    /// Each poll needs a grant.
    Next,
    /// The grant for the next poll was asked for.
    Asked(Grant),
    /// The next poll continues one that had a grant.
    Continues,
    /// The exchange takes grants for bulk instead.
    Bulk,
}

impl<F, C: Client> ExchangeTask<F, C> {
    /// The task of an exchange, or of a part that precedes it.
    pub fn new(future: F, client: C, schedulers: Arc<Schedulers>) -> Self {
        ExchangeTask {
            future: Some(future),
            client,
            schedulers,
            turn: Turn::Next,
            control: None,
            spent: Duration::ZERO,
            at: Activity::at(PhaseOrFilter::phase(Phase::Header)),
            cancelled: false,
            grace: None,
        }
    }

    /// Its first poll directly follows the last poll of another task of the same connection, and needs no further
    /// grant.
    pub fn continues(mut self) -> Self {
        self.turn = Turn::Continues;
        self
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
        let since = begin.checked_sub(self.spent);
        let outer = CURRENT.with(|current| current.since.replace(since));
        let done = work(self);
        CURRENT.with(|current| current.since.set(outer));
        if let Some((worker, outer)) = worker {
            self.at = worker.end(outer);
        }
        done
    }

    /// Whether the exchange needs grants for new connections.
    fn is_new(&mut self) -> bool {
        let is_new = !matches!(self.turn, Turn::Bulk) && self.client.is_new();
        if !is_new && matches!(self.turn, Turn::Asked(_)) {
            self.turn = Turn::Next;
        }
        is_new
    }

    /// Ready when an exchange on a new connection may be polled.
    fn poll_turn(&mut self, cx: &mut Context<'_>, now: Instant) -> Poll<()> {
        if let Turn::Next = self.turn
            && let Some(grant) = self.schedulers.here().request_for_connection(now)
        {
            self.turn = Turn::Asked(grant);
        }
        // A poll of the exchange detects that its client has left, or that it is cancelled, and needs no grant for it.
        if let Turn::Asked(grant) = &mut self.turn
            && grant.poll(cx).is_pending()
            && !self.cancelled
        {
            ready!(self.client.poll_left(cx));
        }
        self.turn = Turn::Next;
        Poll::Ready(())
    }

    /// Polls the future, and takes the control that it attaches.
    fn poll_future(&mut self, cx: &mut Context<'_>, begin: Instant) -> Poll<F::Output>
    where
        F: Future + Unpin,
    {
        let polled = self.measured(begin, |own| match &mut own.future {
            Some(future) => Pin::new(future).poll(cx),
            None => Poll::Pending,
        });
        if let Some(control) = CURRENT.with(|current| current.attached.take()) {
            if self.cancelled {
                control.cancel();
                cx.waker().wake_by_ref();
            }
            self.control = Some(control);
        }
        polled
    }

    /// Charges a poll to the class that pays for it.
    fn charge(&mut self, is_new: bool, time: Duration) {
        let work = self.control.as_ref().map_or(Work::Small, |control| control.work());
        self.schedulers.with_here(|scheduler| match (payer(is_new, work), work) {
            (Some(class), _) => scheduler.charge(class, time),
            (None, Work::Small) => scheduler.count_small(time),
            (None, _) => {}
        });
        if let Work::Granted(_) = work {
            self.turn = Turn::Bulk;
        }
    }

    /// Ready when it is cancelled and its time to end is over.
    fn poll_grace(&mut self, cx: &mut Context<'_>) -> Poll<Abandoned> {
        let left = self.control.as_ref().and_then(|control| control.grace());
        let Some(left) = left.or(self.cancelled.then_some(CANCEL_GRACE)) else { return Poll::Pending };
        let grace = self.grace.get_or_insert_with(|| Box::pin(tokio::time::sleep(left)));
        grace.as_mut().poll(cx).map(|()| Abandoned)
    }
}

impl<F: Future + Unpin, C: Client + Unpin> Future for ExchangeTask<F, C> {
    type Output = Result<F::Output, Abandoned>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let begin = Instant::now();
        let is_new = self.is_new();
        if is_new && self.poll_turn(cx, begin).is_pending() {
            return self.poll_grace(cx).map(Err);
        }
        if self.control.as_ref().is_some_and(|control| control.poll_ready(cx, begin).is_pending()) {
            self.spent += begin.elapsed();
            return self.poll_grace(cx).map(Err);
        }
        let polled = self.poll_future(cx, begin);
        let time = begin.elapsed();
        self.spent += time;
        self.charge(is_new, time);
        match polled {
            Poll::Ready(ended) => Poll::Ready(Ok(ended)),
            Poll::Pending => {
                if let Some(control) = &self.control {
                    control.pending(cx);
                }
                self.poll_grace(cx).map(Err)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::super::tests::{charged, schedulers, waiting};
    use super::*;

    /// A client that is new as long as this is true.
    struct Arriving(Arc<AtomicBool>);

    impl ClientWatch for Arriving {
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

    fn task<F>(future: F, is_new: bool) -> ExchangeTask<F, Arriving> {
        ExchangeTask::new(future, Arriving(Arc::new(AtomicBool::new(is_new))), schedulers())
    }

    fn busy(time: Duration) {
        let begin = Instant::now();
        while begin.elapsed() < time {
            std::hint::spin_loop();
        }
    }

    fn poll<F: Future + Unpin>(future: &mut F) -> Poll<F::Output> {
        Pin::new(future).poll(&mut Context::from_waker(std::task::Waker::noop()))
    }

    #[tokio::test]
    async fn work_counts_and_waiting_does_not() {
        let exchange = async {
            busy(Duration::from_millis(5));
            tokio::time::sleep(Duration::from_millis(100)).await;
            busy(Duration::from_millis(5));
            own_time(Instant::now())
        };
        let own = task(Box::pin(exchange), false).await.expect("nothing cancels it");
        assert!(own >= Duration::from_millis(10), "{own:?}");
        assert!(own < Duration::from_millis(90), "{own:?}");
        assert_eq!(own_time(Instant::now()), Duration::ZERO);
    }

    #[tokio::test]
    async fn a_new_connection_waits_until_there_is_time_and_once_its_response_begins_no_more() {
        let schedulers = schedulers();
        let scheduler = schedulers.here();
        let new = Arc::new(AtomicBool::new(true));
        let mut polls = 0;
        let future = std::future::poll_fn(|_| {
            polls += 1;
            if polls == 4 { Poll::Ready(()) } else { Poll::Pending }
        });
        scheduler.charge(Class::NewConnection, Duration::from_secs(1));
        let mut task = ExchangeTask::new(future, Arriving(new.clone()), schedulers).continues();
        assert!(poll(&mut task).is_pending());
        assert_eq!(waiting(&scheduler), 0, "the first poll continues another one");
        assert!(poll(&mut task).is_pending());
        assert_eq!(waiting(&scheduler), 1);
        assert!(poll(&mut task).is_pending());
        new.store(false, Ordering::Relaxed);
        assert!(poll(&mut task).is_pending());
        assert_eq!(waiting(&scheduler), 0, "it has left the queue");
        assert!(poll(&mut task).is_pending());
        assert!(poll(&mut task).is_ready());
        drop(task);
        assert_eq!(polls, 4);
    }

    /// The control of an exchange that works in this way.
    struct Working(Mutex<Work>);

    impl ExchangeControl for Working {
        fn poll_ready(&self, _: &mut Context<'_>, _: Instant) -> Poll<()> {
            Poll::Ready(())
        }

        fn work(&self) -> Work {
            *self.0.lock().expect("no panic")
        }

        fn pending(&self, _: &mut Context<'_>) {}

        fn cancel(&self) {}

        fn grace(&self) -> Option<Duration> {
            None
        }
    }

    #[tokio::test]
    async fn an_upload_on_a_new_connection_is_charged_once() {
        const POLL: Duration = Duration::from_millis(1);
        let schedulers = schedulers();
        let scheduler = schedulers.here();
        let control = Arc::new(Working(Mutex::new(Work::Small)));
        let attached = control.clone();
        let future = std::future::poll_fn(|_| {
            attach(attached.clone());
            busy(POLL);
            Poll::<()>::Pending
        });
        let mut task = ExchangeTask::new(future, Arriving(Arc::new(AtomicBool::new(true))), schedulers);
        assert!(poll(&mut task).is_pending());
        let header = charged(&scheduler);
        assert!(header[0] >= POLL && header[1..] == [Duration::ZERO; 2], "{header:?}");

        *control.0.lock().expect("no panic") = Work::Granted(Class::Transfer);
        // The upload has its grant; its poll may wait for one more as a new connection.
        while charged(&scheduler)[1].is_zero() {
            let _ = poll(&mut task);
            tokio::task::yield_now().await;
        }
        assert!(poll(&mut task).is_pending());
        let body = charged(&scheduler);
        assert!(body[1] >= 2 * POLL, "the grant pays for both polls: {body:?}");
        assert_eq!(body[0], header[0], "the new connection does not pay for them, too");
        assert_eq!(waiting(&scheduler), 0, "a bulk transfer waits for grants of one class");
    }

    #[test]
    fn one_class_pays_for_a_poll() {
        for class in Class::ALL {
            assert_eq!([false, true].map(|is_new| payer(is_new, Work::Granted(class))), [Some(class); 2]);
        }
        for work in [Work::Small, Work::Bulk] {
            assert_eq!([false, true].map(|is_new| payer(is_new, work)), [None, Some(Class::NewConnection)]);
        }
    }

    /// Ends when cancelled, or ignores this.
    #[derive(Default)]
    struct Ending {
        listens: bool,
        cancelled: AtomicBool,
    }

    impl ExchangeControl for Ending {
        fn poll_ready(&self, _: &mut Context<'_>, _: Instant) -> Poll<()> {
            Poll::Ready(())
        }

        fn work(&self) -> Work {
            Work::Small
        }

        fn pending(&self, _: &mut Context<'_>) {}

        fn cancel(&self) {
            self.cancelled.store(true, Ordering::Relaxed);
        }

        fn grace(&self) -> Option<Duration> {
            self.cancelled.load(Ordering::Relaxed).then_some(CANCEL_GRACE)
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_cancelled_exchange_may_end_by_itself_and_else_is_over_a_moment_later() {
        let control = |listens| Some(Arc::new(Ending { listens, ..Ending::default() }));
        for (control, expected, after) in [
            (control(true), Ok("ended well"), Duration::ZERO),
            (control(false), Err(Abandoned), CANCEL_GRACE),
            (None, Err(Abandoned), CANCEL_GRACE),
        ] {
            let exchange = async move {
                if let Some(control) = &control {
                    attach(control.clone());
                }
                let listens = control.as_ref().filter(|control| control.listens);
                std::future::poll_fn(|_| match listens {
                    Some(control) if control.grace().is_some() => Poll::Ready("ended well"),
                    _ => Poll::Pending,
                })
                .await
            };
            let mut exchange = task(Box::pin(exchange), false);
            assert!(tokio::time::timeout(Duration::from_secs(60), &mut exchange).await.is_err(), "it waits");
            exchange.cancel();
            let begin = tokio::time::Instant::now();
            assert_eq!((&mut exchange).await, expected);
            assert!(begin.elapsed() >= after && begin.elapsed() < after + Duration::from_millis(10));
            exchange.end(|future| assert!(future.is_some()));
        }
    }

    #[tokio::test]
    async fn a_cancelled_exchange_does_not_wait_for_a_grant() {
        let schedulers = schedulers();
        schedulers.here().charge(Class::NewConnection, Duration::from_secs(1));
        let mut polls = 0;
        let future = std::future::poll_fn(|_| {
            polls += 1;
            Poll::Ready(())
        });
        let mut task = ExchangeTask::new(future, Arriving(Arc::new(AtomicBool::new(true))), schedulers);
        assert!(poll(&mut task).is_pending());
        task.cancel();
        assert!(poll(&mut task).is_ready());
        drop(task);
        assert_eq!(polls, 1);
    }
}
