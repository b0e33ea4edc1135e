//! The common way to wait: for an event, until a deadline, and only while the client is connected.
//!
//! A [`Wait`] requires a time limit and a [`ClientWatch`]. A wait without a client, such as that of a health check,
//! gives the reason as a [`NoClient`]. Which of the three comes first is one pure decision ([`Ended::of`]); the rest is
//! a timer. The limit does not run while the gateway itself does not ([`pauses`]). A test (`tests/it/waits.rs`)
//! looks for waits in the source that do not use this module.

use std::cell::RefCell;
use std::convert::Infallible;
use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use futures::FutureExt;
use pin_project_lite::pin_project;
use tokio::runtime::{Handle, Id};
use tokio::time::Sleep;

use super::pauses::{self, Grant, Pauses};

/// An upper bound for waits without a limit in the configuration.
pub const FAR: Duration = Duration::from_secs(24 * 3600);

/// Detects when the client of a wait has left.
pub trait ClientWatch {
    /// The result once the client has left.
    type Left;

    /// Ready once the client has left, or the exchange must end for another reason. Wakes the task then.
    fn poll_left(&mut self, cx: &mut Context<'_>) -> Poll<Self::Left>;
}

impl<E: ClientWatch> ClientWatch for &mut E {
    type Left = E::Left;

    fn poll_left(&mut self, cx: &mut Context<'_>) -> Poll<E::Left> {
        (**self).poll_left(cx)
    }
}

/// The reason why a wait has no client to watch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NoClient {
    /// The gateway checks an endpoint's health.
    HealthCheck,
    /// The gateway resolves endpoints.
    Discovery,
    /// The gateway requests a certificate from an issuer.
    Issuer,
    /// The gateway exports records to a collector.
    Export,
    /// A copy for a mirror: the client receives the response to the original.
    Mirror,
    /// The wait is part of another wait, which watches the client and drops this one.
    Within,
    /// An operator's request, which only its deadline cancels.
    Operator,
    /// IO with the client itself, which reports when the client has left.
    ItsIo,
}

impl ClientWatch for NoClient {
    type Left = Infallible;

    fn poll_left(&mut self, _: &mut Context<'_>) -> Poll<Infallible> {
        Poll::Pending
    }
}

/// The outcome of a wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended<T, L = Infallible> {
    /// The awaited event happened.
    Done(T),
    /// The client has left.
    Left(L),
    /// The deadline has passed.
    Late,
}

impl<T, L> Ended<T, L> {
    /// The outcome of a wait in this state. `None`: the wait continues. A result takes precedence, even if the client
    /// has left or the deadline has passed, since it may be consumed already. A client that has left takes precedence
    /// over the deadline.
    pub fn of(done: Poll<T>, left: Poll<L>, late: bool) -> Option<Self> {
        match (done, left) {
            (Poll::Ready(done), _) => Some(Ended::Done(done)),
            (Poll::Pending, Poll::Ready(left)) => Some(Ended::Left(left)),
            (Poll::Pending, Poll::Pending) => late.then_some(Ended::Late),
        }
    }
}

impl<T> Ended<T> {
    /// The result, if it was in time.
    pub fn in_time(self) -> Option<T> {
        match self {
            Ended::Done(done) => Some(done),
            Ended::Late => None,
        }
    }
}

/// A wait; see the module.
pub struct Wait<E> {
    limit: Duration,
    /// The first poll that was pending; most waits are ready at once and need no clock.
    since: Option<Instant>,
    eye: E,
    timer: Timer,
    /// The pauses of another worker that this wait depends on.
    other: Option<&'static Pauses>,
}

impl<E: ClientWatch> Wait<E> {
    /// Waits for `time` at most, measured from the first pending poll, and as long as `eye` sees the client.
    pub fn at_most(time: Duration, eye: E) -> Self {
        Wait { limit: time.min(FAR), since: None, eye, timer: Timer::default(), other: None }
    }

    /// The wait also depends on the worker with these pauses.
    pub fn beside(self, other: Option<&'static Pauses>) -> Self {
        Wait { other, ..self }
    }

    /// Checks `done`, the result of a poll of the awaited event, and then the client and the clock.
    pub fn poll<T>(&mut self, cx: &mut Context<'_>, done: Poll<T>) -> Poll<Ended<T, E::Left>> {
        if done.is_ready() {
            return Ended::of(done, Poll::Pending, false).map_or(Poll::Pending, Poll::Ready);
        }
        let since = *self.since.get_or_insert_with(|| tokio::time::Instant::now().into_std());
        let left = self.eye.poll_left(cx);
        let late = left.is_pending() && self.timer.poll_limit_beside(cx, since, self.limit, self.other).is_ready();
        Ended::of(done, left, late).map_or(Poll::Pending, Poll::Ready)
    }

    /// Waits for `future`.
    pub fn on<F: Future>(self, future: F) -> Waiting<E, F> {
        Waiting { wait: self, future }
    }

    /// Waits until `poll` is ready. Further such waits have what is left of the limit.
    pub async fn until<T>(&mut self, mut poll: impl FnMut(&mut Context<'_>) -> Poll<T>) -> Ended<T, E::Left> {
        poll_fn(|cx| {
            let done = poll(cx);
            self.poll(cx, done)
        })
        .await
    }

    /// Waits for the limit only. `Some`: the client has left.
    pub async fn out(self) -> Option<E::Left> {
        match self.on(std::future::pending::<Infallible>()).await {
            Ended::Left(left) => Some(left),
            Ended::Late => None,
        }
    }
}

pin_project! {
    /// The future of [`Wait::on`]. It stores the awaited future once, where an async function would store it twice, as
    /// its argument and while it waits. Futures of filters and exchanges have many layers, each of which would double.
    #[must_use = "futures do nothing unless polled"]
    pub struct Waiting<E, F> {
        wait: Wait<E>,
        #[pin]
        future: F,
    }
}

impl<E: ClientWatch, F: Future> Future for Waiting<E, F> {
    type Output = Ended<F::Output, E::Left>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let waiting = self.project();
        let done = waiting.future.poll(cx);
        waiting.wait.poll(cx, done)
    }
}

/// Waits for `future` for `time` at most, without a client. `None`: the time is over.
pub fn within<F: Future>(time: Duration, reason: NoClient, future: F) -> impl Future<Output = Option<F::Output>> {
    Wait::at_most(time, reason).on(future).map(Ended::in_time)
}

/// A deadline that may move. It costs nothing before its first poll.
///
/// Most deadlines are distant and never reached, and each exchange has several. Setting a timer of the runtime for each
/// would cost more than the rest of a wait. Therefore, when a deadline is dropped, its timer stays set, and the next
/// deadline on the same thread takes it over. The timer is reset only if it would fire too late, or once it fires. Its
/// task may therefore be woken early, and then polls the deadline again, as after every wake-up.
#[derive(Default)]
pub struct Timer {
    set: Option<Set>,
    /// The extension of a limit, which is rare.
    grant: Option<Box<Grant>>,
}

/// A timer of a runtime.
struct Set {
    runtime: Id,
    sleep: Pin<Box<Sleep>>,
}

/// Maximum number of spare timers per thread. Each keeps the memory of the task that last polled it, and may cause one
/// spurious wake-up of that task.
const SPARE_MAX: usize = 16;

thread_local! {
    /// Timers whose deadline was dropped.
    static SPARE: RefCell<Vec<Set>> = const { RefCell::new(Vec::new()) };
}

impl Timer {
    /// Ready once another party has exceeded this limit, which runs from `since`. Time for which the gateway itself did
    /// not run does not count: each party has its time while the gateway runs, and no more than that.
    pub fn poll_limit(&mut self, cx: &mut Context<'_>, since: Instant, limit: Duration) -> Poll<()> {
        self.poll_limit_beside(cx, since, limit, None)
    }

    /// The same if the party is reached through another worker.
    fn poll_limit_beside(
        &mut self,
        cx: &mut Context<'_>,
        since: Instant,
        limit: Duration,
        other: Option<&Pauses>,
    ) -> Poll<()> {
        let due = since + limit;
        loop {
            let grant = self.grant.as_deref().copied().filter(|grant| grant.due == due);
            let grant = grant.unwrap_or(Grant { due, until: due });
            ready!(self.poll(cx, grant.until));
            let now = tokio::time::Instant::now().into_std();
            match grant.more(pauses::paused(since, now, other), now) {
                Some(more) => self.grant = Some(Box::new(more)),
                None => return Poll::Ready(()),
            }
        }
    }

    /// Ready once `due` has passed.
    pub fn poll(&mut self, cx: &mut Context<'_>, due: Instant) -> Poll<()> {
        let due = tokio::time::Instant::from_std(due);
        let sleep = &mut self.set.get_or_insert_with(|| Set::take_over(due)).sleep;
        if sleep.deadline() > due {
            sleep.as_mut().reset(due);
        }
        ready!(sleep.as_mut().poll(cx));
        if sleep.deadline() == due {
            return Poll::Ready(());
        }
        // The timer fired for an earlier deadline.
        sleep.as_mut().reset(due);
        sleep.as_mut().poll(cx)
    }
}

impl Drop for Timer {
    fn drop(&mut self) {
        let Some(set) = self.set.take() else { return };
        // A surplus timer is dropped after the borrow: it may hold the last reference to a task that has timers itself.
        let _surplus = SPARE.try_with(|spare| {
            let mut spare = spare.borrow_mut();
            if spare.len() < SPARE_MAX {
                spare.push(set);
                None
            } else {
                Some(set)
            }
        });
    }
}

impl Set {
    /// Takes over a spare timer, or creates one.
    fn take_over(due: tokio::time::Instant) -> Set {
        let runtime = Handle::current().id();
        let spare = SPARE.try_with(|spare| spare.borrow_mut().pop()).ok().flatten();
        let new = || Set { runtime, sleep: Box::pin(tokio::time::sleep_until(due)) };
        spare.filter(|spare| spare.runtime == runtime).unwrap_or_else(new)
    }
}

#[cfg(test)]
mod tests {
    use std::pin::pin;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::task::{Wake, Waker};

    use futures::channel::oneshot;

    use super::*;

    /// An eye that sees the client leave when it is notified.
    struct Told(oneshot::Receiver<()>);

    impl ClientWatch for Told {
        type Left = &'static str;

        fn poll_left(&mut self, cx: &mut Context<'_>) -> Poll<&'static str> {
            Pin::new(&mut self.0).poll(cx).map(|_| "left")
        }
    }

    const LONG: Duration = Duration::from_secs(60);

    #[test]
    fn what_is_here_counts_then_the_client_then_the_clock() {
        let here = [Poll::Ready(1), Poll::Pending];
        let left = [Poll::Ready("left"), Poll::Pending];
        let ended = |done: usize, gone: usize, late| Ended::of(here[done], left[gone], late);
        for late in [false, true] {
            assert_eq!(ended(0, 0, late), Some(Ended::Done(1)));
            assert_eq!(ended(0, 1, late), Some(Ended::Done(1)));
            assert_eq!(ended(1, 0, late), Some(Ended::Left("left")));
        }
        assert_eq!(ended(1, 1, true), Some(Ended::Late));
        assert_eq!(ended(1, 1, false), None);
    }

    #[tokio::test(start_paused = true)]
    async fn a_wait_ends_with_what_it_is_for_with_its_client_or_by_its_deadline() {
        let (_stays, eye) = oneshot::channel();
        assert_eq!(Wait::at_most(LONG, Told(eye)).on(async { 7 }).await, Ended::Done(7));

        let (goes, eye) = oneshot::channel();
        tokio::spawn(async move {
            tokio::time::sleep(LONG / 2).await;
            goes.send(())
        });
        let began = tokio::time::Instant::now();
        let wait = Wait::at_most(LONG, Told(eye));
        assert_eq!(wait.on(std::future::pending::<()>()).await, Ended::Left("left"));
        assert_eq!(began.elapsed(), LONG / 2);

        let (_stays, eye) = oneshot::channel();
        let began = tokio::time::Instant::now();
        assert_eq!(Wait::at_most(LONG, Told(eye)).on(std::future::pending::<()>()).await, Ended::Late);
        assert!(began.elapsed() >= LONG);
        assert_eq!(within(LONG, NoClient::HealthCheck, std::future::pending::<()>()).await, None);
    }

    #[tokio::test(start_paused = true)]
    async fn a_deadline_holds_for_all_that_is_waited_for_by_turns() {
        let mut wait = Wait::at_most(LONG, NoClient::Within);
        let began = tokio::time::Instant::now();
        for (time, ended) in [(LONG / 3, Ended::Done(())), (LONG, Ended::Late)] {
            let mut sleep = pin!(tokio::time::sleep(time));
            assert_eq!(wait.until(|cx| sleep.as_mut().poll(cx)).await, ended);
        }
        let lasted = began.elapsed();
        assert!(lasted >= LONG && lasted < LONG + Duration::from_millis(10), "{lasted:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_timer_that_is_taken_over_rings_when_it_is_due_and_not_before() {
        for (left, due) in [(LONG, LONG / 2), (LONG / 2, LONG), (LONG, LONG), (Duration::ZERO, LONG)] {
            let mut before = Timer::default();
            let at = tokio::time::Instant::now().into_std() + left;
            let rang = poll_fn(|cx| Poll::Ready(before.poll(cx, at).is_ready())).await;
            assert_eq!(rang, left.is_zero());
            drop(before);
            assert_eq!(SPARE.with_borrow(Vec::len), 1);
            let began = tokio::time::Instant::now();
            assert_eq!(Wait::at_most(due, NoClient::Within).out().await, None);
            let lasted = began.elapsed();
            assert!(lasted >= due && lasted < due + Duration::from_millis(10), "{left:?} {due:?}: {lasted:?}");
        }
    }

    #[derive(Default)]
    struct Wakes(AtomicUsize);

    impl Wake for Wakes {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_timer_that_is_taken_over_wakes_the_task_that_has_it_now() {
        let step = LONG / 20;
        for (left, due) in [(LONG, LONG / 2), (LONG / 2, LONG), (LONG, LONG)] {
            let [before, now] = [(); 2].map(|()| Arc::new(Wakes::default()));
            let [old, new] = [&before, &now].map(|wakes| Waker::from(wakes.clone()));
            let began = tokio::time::Instant::now();
            let at = |time| began.into_std() + time;
            let mut timer = Timer::default();
            assert!(timer.poll(&mut Context::from_waker(&old), at(left)).is_pending());
            drop(timer);
            let mut timer = Timer::default();
            // Polls after each wake-up only.
            let mut polls = 0;
            while timer.poll(&mut Context::from_waker(&new), at(due)).is_pending() {
                polls += 1;
                assert!(polls <= 2 && began.elapsed() < due + step, "{left:?} {due:?}");
                while now.0.swap(0, Ordering::Relaxed) == 0 {
                    assert!(began.elapsed() < 2 * LONG, "{left:?} {due:?}: nothing wakes it");
                    tokio::time::advance(step).await;
                }
            }
            assert!(began.elapsed() >= due && began.elapsed() < due + 2 * step, "{left:?} {due:?}");
            assert_eq!(before.0.load(Ordering::Relaxed), 0, "{left:?} {due:?}: the task before");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_deadline_that_moves_is_met_where_it_is_last() {
        let (mut timer, began) = (Timer::default(), tokio::time::Instant::now());
        let at = |time| began.into_std() + time;
        for due in [LONG, LONG / 2, 2 * LONG] {
            assert!(poll_fn(|cx| Poll::Ready(timer.poll(cx, at(due)))).await.is_pending());
        }
        poll_fn(|cx| timer.poll(cx, at(2 * LONG))).await;
        assert!(began.elapsed() >= 2 * LONG && began.elapsed() < 2 * LONG + Duration::from_millis(10));
    }
}
