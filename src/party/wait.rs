//! The one way to wait: for something, no longer than until a deadline, and only while the client is there.
//!
//! A [`Wait`] cannot be made without a deadline and an [`Eye`] on the client. A wait that has no client, such as that
//! of a health check, says so by the name of its [`NoClient`]. Which of the three comes first is one pure decision
//! ([`Ended::of`]); the rest is a timer. A test (`tests/it/waits.rs`) looks for waits in the source that go round this.

use std::cell::RefCell;
use std::convert::Infallible;
use std::future::{Future, poll_fn};
use std::pin::{Pin, pin};
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use tokio::runtime::{Handle, Id};
use tokio::time::Sleep;

/// Longer than anything is waited for that has no limit in the configuration.
pub const FAR: Duration = Duration::from_secs(24 * 3600);

/// Notices when the client that waits has left.
pub trait Eye {
    /// What is seen when there is not.
    type Left;

    /// Ready once the client has left, or the exchange is to end for another reason. Wakes the task then.
    fn poll_left(&mut self, cx: &mut Context<'_>) -> Poll<Self::Left>;
}

impl<E: Eye> Eye for &mut E {
    type Left = E::Left;

    fn poll_left(&mut self, cx: &mut Context<'_>) -> Poll<E::Left> {
        (**self).poll_left(cx)
    }
}

/// Why a wait has no client to look after.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NoClient {
    /// The gateway asks an endpoint how it is.
    HealthCheck,
    /// The gateway asks where endpoints are.
    Discovery,
    /// The gateway asks an issuer for a certificate.
    Issuer,
    /// The gateway sends what it has recorded to a collector.
    Export,
    /// A copy for a mirror: the client of the original has its answer from elsewhere.
    Mirror,
    /// It is a part of another wait, which has the eye and drops this one.
    Within,
    /// An operator asks, and is cut off by this deadline alone.
    Operator,
    /// It is the client that is read from or written to, which finds out by itself.
    ItsIo,
}

impl Eye for NoClient {
    type Left = Infallible;

    fn poll_left(&mut self, _: &mut Context<'_>) -> Poll<Infallible> {
        Poll::Pending
    }
}

/// How a wait ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended<T, L = Infallible> {
    /// What was waited for is here.
    Done(T),
    /// The client has left.
    Left(L),
    /// The deadline is over.
    Late,
}

impl<T, L> Ended<T, L> {
    /// How a wait ends that has come to this; `None`: it goes on. What is here counts even if the client has left or
    /// the deadline is over: somebody may have taken it already. A client that has left is not told that it is late.
    pub fn of(done: Poll<T>, left: Poll<L>, late: bool) -> Option<Self> {
        match (done, left) {
            (Poll::Ready(done), _) => Some(Ended::Done(done)),
            (Poll::Pending, Poll::Ready(left)) => Some(Ended::Left(left)),
            (Poll::Pending, Poll::Pending) => late.then_some(Ended::Late),
        }
    }
}

impl<T> Ended<T> {
    /// What was waited for, if it came in time.
    pub fn in_time(self) -> Option<T> {
        match self {
            Ended::Done(done) => Some(done),
            Ended::Late => None,
        }
    }
}

/// When a wait is over at the latest.
#[derive(Clone, Copy)]
enum Due {
    At(Instant),
    /// So long after it is first found that there is something to wait for: most of the time there is not.
    After(Duration),
}

/// See the module.
pub struct Wait<E> {
    due: Due,
    eye: E,
    timer: Timer,
}

impl<E: Eye> Wait<E> {
    /// Waits until `due` at most, for as long as `eye` sees somebody.
    pub fn until(due: Instant, eye: E) -> Self {
        Wait { due: Due::At(due), eye, timer: Timer::default() }
    }

    /// Waits for so long at most, from the first look on that finds nothing.
    pub fn at_most(time: Duration, eye: E) -> Self {
        Wait { due: Due::After(time.min(FAR)), eye, timer: Timer::default() }
    }

    /// Looks at what is waited for, which was just polled, and then at the client and the clock.
    pub fn poll<T>(&mut self, cx: &mut Context<'_>, done: Poll<T>) -> Poll<Ended<T, E::Left>> {
        if done.is_ready() {
            return Ended::of(done, Poll::Pending, false).map_or(Poll::Pending, Poll::Ready);
        }
        let due = match self.due {
            Due::At(due) => due,
            Due::After(time) => tokio::time::Instant::now().into_std() + time,
        };
        self.due = Due::At(due);
        let left = self.eye.poll_left(cx);
        let late = left.is_pending() && self.timer.poll(cx, due).is_ready();
        Ended::of(done, left, late).map_or(Poll::Pending, Poll::Ready)
    }

    /// Waits for `future`.
    pub async fn on<F: Future>(&mut self, future: F) -> Ended<F::Output, E::Left> {
        let mut future = pin!(future);
        poll_fn(|cx| {
            let done = future.as_mut().poll(cx);
            self.poll(cx, done)
        })
        .await
    }

    /// Waits for the deadline alone. `Some`: the client has left.
    pub async fn out(&mut self) -> Option<E::Left> {
        match self.on(std::future::pending::<Infallible>()).await {
            Ended::Left(left) => Some(left),
            Ended::Late => None,
        }
    }
}

/// Waits for `future` for at most this time, where no client waits; `None`: it took longer.
pub async fn within<F: Future>(time: Duration, reason: NoClient, future: F) -> Option<F::Output> {
    Wait::at_most(time, reason).on(future).await.in_time()
}

/// A deadline that may move. Costs nothing until it is first polled.
///
/// Most deadlines are far off and never met, and each exchange has several. To set a timer of the runtime for each
/// would cost more than the rest of a wait. So a timer that is set is kept when its deadline is no longer of interest,
/// and the next deadline on this thread takes it over. It is set anew only if it would ring too late, or once it rings.
/// So it may wake its task early; then it is to be polled again, as after each wake.
#[derive(Default)]
pub struct Timer(Option<Set>);

/// A timer of a runtime.
struct Set {
    runtime: Id,
    sleep: Pin<Box<Sleep>>,
}

/// How many timers a thread keeps to be taken over. Each keeps the memory of the task that has polled it last, and may
/// wake that once in vain.
const SPARE_MAX: usize = 16;

thread_local! {
    /// Timers whose deadline is no longer of interest.
    static SPARE: RefCell<Vec<Set>> = const { RefCell::new(Vec::new()) };
}

impl Timer {
    /// Ready once it is `due`.
    pub fn poll(&mut self, cx: &mut Context<'_>, due: Instant) -> Poll<()> {
        let due = tokio::time::Instant::from_std(due);
        let sleep = &mut self.0.get_or_insert_with(|| Set::take_over(due)).sleep;
        if sleep.deadline() > due {
            sleep.as_mut().reset(due);
        }
        ready!(sleep.as_mut().poll(cx));
        if sleep.deadline() == due {
            return Poll::Ready(());
        }
        // It has rung for an earlier deadline.
        sleep.as_mut().reset(due);
        sleep.as_mut().poll(cx)
    }
}

impl Drop for Timer {
    fn drop(&mut self) {
        let Some(set) = self.0.take() else { return };
        // A timer that is not kept is dropped after the borrow: it may hold the last reference to a task that has
        // timers of its own.
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
    /// A timer that another deadline has left, or a new one.
    fn take_over(due: tokio::time::Instant) -> Set {
        let runtime = Handle::current().id();
        let spare = SPARE.try_with(|spare| spare.borrow_mut().pop()).ok().flatten();
        let new = || Set { runtime, sleep: Box::pin(tokio::time::sleep_until(due)) };
        spare.filter(|spare| spare.runtime == runtime).unwrap_or_else(new)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::task::{Wake, Waker};

    use futures::channel::oneshot;

    use super::*;

    /// Sees the client leave when it is notified.
    struct Told(oneshot::Receiver<()>);

    impl Eye for Told {
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
        let mut wait = Wait::at_most(LONG, Told(eye));
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
        assert_eq!(wait.on(tokio::time::sleep(LONG / 3)).await, Ended::Done(()));
        assert_eq!(wait.on(tokio::time::sleep(LONG)).await, Ended::Late);
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
            // As often as it is woken, and never in between.
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
