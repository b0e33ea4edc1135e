//! What filters do within the phases of an exchange that keeps a journal: the stages at which they are called, and the
//! requests that they send.
//!
//! An exchange that keeps a journal hands its chain a [`Notebook`]. A request of a filter finds that of its exchange
//! where it is polled ([`call`]), for a filter that asks for something knows of no journal.

use std::borrow::Cow;
use std::cell::RefCell;
use std::future::{Future, poll_fn};
use std::pin::pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// The most steps of one exchange. Further ones are counted.
pub const STEPS_MAX: usize = 128;

/// One thing that a filter did.
#[derive(Clone, Debug, PartialEq)]
pub struct Step {
    /// The filter, as it is called in metrics.
    pub filter: &'static str,
    /// At which stage (`request`, `request_body`, `response`, `response_body`); `call`: it has sent a request; `when`:
    /// its condition did not hold, so that it did nothing.
    pub stage: &'static str,
    /// The upstream that a request was sent to.
    pub upstream: Option<Box<str>>,
    /// When it began.
    pub begin: Instant,
    /// How long it took; all pieces of a body together.
    pub took: Duration,
    /// How many pieces there were; else 1.
    pub times: u32,
    /// What it came to: `continue`, `answer 302`, the reason of a refusal; of a request, the status of its answer, or
    /// why there is none; `dropped`, if it was not awaited.
    pub outcome: Cow<'static, str>,
}

/// Where the steps of one exchange are noted. Clones share it. One task uses it, so that its lock never waits.
#[derive(Clone, Debug, Default)]
pub struct Notebook(Arc<Mutex<Noted>>);

#[derive(Debug, Default)]
struct Noted {
    steps: Vec<Step>,
    left_out: u32,
}

thread_local! {
    /// Whose future is polled on this thread, and by which filter.
    static PRESENT: RefCell<Option<(Notebook, &'static str)>> = const { RefCell::new(None) };
}

impl Notebook {
    /// Runs a stage of a filter, and notes it with what `told` says that it came to.
    pub async fn stage<T>(
        &self,
        filter: &'static str,
        stage: &'static str,
        work: impl Future<Output = T>,
        told: impl FnOnce(&T) -> Cow<'static, str>,
    ) -> T {
        let mut noting = Noting::begin(self.clone(), filter, stage, None);
        let mut work = pin!(work);
        let done = poll_fn(|cx| {
            let before = PRESENT.replace(Some((self.clone(), filter)));
            let polled = work.as_mut().poll(cx);
            PRESENT.set(before);
            polled
        })
        .await;
        noting.comes_to(told(&done));
        done
    }

    /// A filter does nothing in this exchange, for its condition does not hold.
    pub fn skipped(&self, filter: &'static str) {
        Noting::begin(self.clone(), filter, "when", None).comes_to("skipped");
    }

    /// All that was noted, in the order in which it ended, and how many steps had no place.
    pub fn take(&self) -> (Vec<Step>, u32) {
        let noted = std::mem::take(&mut *self.noted());
        (noted.steps, noted.left_out)
    }

    fn note(&self, step: Step) {
        let Noted { steps, left_out } = &mut *self.noted();
        // The pieces of a body are one step.
        let of_body = step.stage.ends_with("_body");
        let same = |other: &&mut Step| other.filter == step.filter && other.stage == step.stage;
        if let Some(earlier) = steps.iter_mut().rev().find(same).filter(|_| of_body) {
            earlier.took += step.took;
            earlier.times += 1;
            earlier.outcome = step.outcome;
        } else if steps.len() < STEPS_MAX {
            steps.push(step);
        } else {
            *left_out += 1;
        }
    }

    fn noted(&self) -> MutexGuard<'_, Noted> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A filter sends a request to this upstream; `None`, if the exchange is not recorded. To be called where the filter is
/// polled.
pub fn call(upstream: &str) -> Option<Noting> {
    let (notebook, filter) = PRESENT.with_borrow(Clone::clone)?;
    Some(Noting::begin(notebook, filter, "call", Some(upstream.into())))
}

/// A step that is under way. It is noted when this is dropped.
#[derive(Debug)]
pub struct Noting {
    notebook: Notebook,
    step: Option<Step>,
}

impl Noting {
    fn begin(notebook: Notebook, filter: &'static str, stage: &'static str, upstream: Option<Box<str>>) -> Self {
        let (begin, took, outcome) = (Instant::now(), Duration::ZERO, Cow::from("dropped"));
        Noting { notebook, step: Some(Step { filter, stage, upstream, begin, took, times: 1, outcome }) }
    }

    /// It has come to this.
    pub fn comes_to(&mut self, outcome: impl Into<Cow<'static, str>>) {
        if let Some(step) = &mut self.step {
            step.outcome = outcome.into();
        }
    }
}

impl Drop for Noting {
    fn drop(&mut self) {
        if let Some(step) = self.step.take() {
            let took = step.begin.elapsed();
            self.notebook.note(Step { took, ..step });
        }
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt;

    use super::*;

    fn outcomes(notebook: &Notebook) -> Vec<(&'static str, &'static str, u32, String)> {
        let steps = notebook.take().0.into_iter();
        steps.map(|step| (step.filter, step.stage, step.times, step.outcome.into_owned())).collect()
    }

    #[test]
    fn stages_and_the_requests_within_them_are_noted() {
        let notebook = Notebook::default();
        let asks = async {
            let mut noting = call("auth").expect("an exchange that keeps a journal");
            noting.comes_to("200");
            drop(noting);
            7
        };
        let done = notebook.stage("jwt", "request", asks, |done| format!("answer {done}").into()).now_or_never();
        assert_eq!(done, Some(7));
        assert!(call("auth").is_none(), "behind it nothing is recorded");
        notebook.skipped("access");
        let noted = [
            ("jwt", "call", 1, "200".to_owned()),
            ("jwt", "request", 1, "answer 7".to_owned()),
            ("access", "when", 1, "skipped".to_owned()),
        ];
        assert_eq!(outcomes(&notebook), noted);
    }

    #[test]
    fn the_pieces_of_a_body_are_one_step_and_there_are_only_so_many() {
        let notebook = Notebook::default();
        for n in 0..5 {
            let piece =
                notebook.stage("body", "response_body", async {}, |()| if n < 4 { "continue" } else { "x" }.into());
            piece.now_or_never();
        }
        assert_eq!(outcomes(&notebook), [("body", "response_body", 5, "x".to_owned())]);
        (0..STEPS_MAX + 3).for_each(|_| notebook.skipped("a"));
        let (steps, left_out) = notebook.take();
        assert_eq!((steps.len(), left_out), (STEPS_MAX, 3));
    }

    #[test]
    fn what_is_not_awaited_was_dropped() {
        let notebook = Notebook::default();
        let stage = notebook.stage("a", "request", std::future::pending::<()>(), |()| "".into());
        assert_eq!(stage.now_or_never(), None);
        assert_eq!(outcomes(&notebook), [("a", "request", 1, "dropped".to_owned())]);
    }
}
