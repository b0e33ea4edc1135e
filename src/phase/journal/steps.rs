//! The steps of filters within an exchange that keeps a journal: the stages of filters, and the requests that filters
//! send.
//!
//! An exchange with a journal passes a [`Notebook`] to its filter chain. A request of a filter finds the notebook
//! through the thread that polls the filter ([`call`]), since filters do not know of journals.

use std::borrow::Cow;
use std::cell::RefCell;
use std::future::{Future, poll_fn};
use std::pin::pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Maximum number of steps per exchange. Further steps are only counted.
pub const STEPS_MAX: usize = 128;

/// One step of a filter.
#[derive(Clone, Debug, PartialEq)]
pub struct Step {
    /// The filter's name, as in metrics.
    pub filter: &'static str,
    /// The stage (`request`, `request_body`, `response`, `response_body`); `call`: it sent a request; `when`: its
    /// condition was false, and it was skipped.
    pub stage: &'static str,
    /// The upstream of the request that it sent.
    pub upstream: Option<Box<str>>,
    /// Start time.
    pub begin: Instant,
    /// Duration; for a body, the sum over all pieces. Zero for a filter that was skipped.
    pub took: Duration,
    /// Number of body pieces; otherwise 1.
    pub times: u32,
    /// The outcome: `continue`, `answer 302`, or the reason of a refusal. For a request: the status of its response, or
    /// why there is none; `dropped` if the filter did not await it.
    pub outcome: Cow<'static, str>,
}

/// The steps of one exchange. Clones share them. Only one task uses the notebook, so its lock is never contended.
#[derive(Clone, Debug, Default)]
pub struct Notebook(Arc<Mutex<Noted>>);

#[derive(Debug, Default)]
struct Noted {
    steps: Vec<Step>,
    left_out: u32,
}

thread_local! {
    /// The notebook of the exchange that is polled on this thread, and its current filter.
    static PRESENT: RefCell<Option<(Notebook, &'static str)>> = const { RefCell::new(None) };
}

impl Notebook {
    /// Runs a stage of a filter and records it. `told` returns the outcome.
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

    /// Records that a filter was skipped because its condition is false.
    pub fn skipped(&self, filter: &'static str) {
        let (begin, took, outcome) = (Instant::now(), Duration::ZERO, Cow::from("skipped"));
        self.note(Step { filter, stage: "when", upstream: None, begin, took, times: 1, outcome });
    }

    /// Takes all steps, in the order in which they ended, and the number of steps beyond the limit.
    pub fn take(&self) -> (Vec<Step>, u32) {
        let noted = std::mem::take(&mut *self.noted());
        (noted.steps, noted.left_out)
    }

    fn note(&self, step: Step) {
        let Noted { steps, left_out } = &mut *self.noted();
        // All pieces of a body are one step.
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

/// Records that a filter sends a request to this upstream. `None` if the exchange keeps no journal. Must be called
/// within a poll of the filter.
pub fn call(upstream: &str) -> Option<Noting> {
    let (notebook, filter) = PRESENT.with_borrow(Clone::clone)?;
    Some(Noting::begin(notebook, filter, "call", Some(upstream.into())))
}

/// A step in progress. It is recorded on drop.
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

    /// Sets the outcome.
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
