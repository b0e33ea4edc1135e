//! Expressions in CEL: conditions (`when:`) and values (`{ cel: "…" }`), checked when the file is loaded.
//!
//! The `cel` crate parses an expression and keeps the place of every node (`expression/parse.rs`). Forebay's planner
//! gives each node a type (`expression/planner.rs`) and builds the `plan` that is evaluated. So an unknown name, an
//! unknown function, a wrong type and an invalid pattern are errors of the file, with their place inside the
//! expression. Patterns and header names are prepared once, and the request is read without copying.
//!
//! Evaluation never fails. A missing header, cookie or argument reads as an empty text, so that a rule such as
//! `request.headers["x-token"] != "…"` also holds for a client that sends none. The cost of an evaluation is bounded
//! by the length of the expression and of its input: there are no loops, patterns take linear time, and growth of
//! texts is limited.
//!
//! `expression/names.rs` is the only list of names and functions; `conf/manual/expressions.md` is generated from it.

pub mod facts;
pub mod fields;
pub mod named;
pub mod names;
mod parse;
mod pattern;
mod plan;
mod planner;

use std::borrow::Cow;
use std::fmt;
use std::ops::Range;
use std::sync::Arc;
use std::thread;

pub(crate) use pattern::in_bytes;

pub use facts::{Asked, Author, Facts, Identity, Pace, Prefix, Secured};

use crate::error::{BuildError, Inside};
use plan::{Condition as Plan, Text};
use planner::{Kind, Plan as Planned, Planner};

/// The length limit of an expression, in bytes. At most a thousand nodes fit.
pub const BYTES_MAX: usize = 4096;

/// Parsing recurses deeper than the stack of a worker, or of a test without optimisation, allows. Only used pages
/// take memory.
const STACK_BYTES: usize = 64 << 20;

/// When an expression is evaluated, which determines what it can read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Moment {
    /// During route matching, before any filter has run.
    Match,
    /// During or after the request filters of the route, without a response.
    Request,
    /// The response header was received, or the exchange has ended.
    Response,
}

/// A mistake in an expression: its bytes, and a message that suggests a fix after a colon.
#[derive(Debug)]
struct Mistake {
    place: Range<usize>,
    message: String,
}

impl Mistake {
    fn new(place: Range<usize>, message: impl Into<String>) -> Self {
        Mistake { place, message: message.into() }
    }
}

/// A condition: `when:`.
#[derive(Clone)]
pub struct Condition(Arc<Source<Plan>>);

/// An expression with a text as its result: `{ cel: "…" }`.
#[derive(Clone)]
pub struct Value(Arc<Source<Text>>);

struct Source<P> {
    written: Box<str>,
    plan: P,
    reads_response: bool,
}

impl Condition {
    /// Builds the condition that is `written`, for evaluation at this moment.
    ///
    /// # Errors
    /// The mistake and its place inside; the path is empty.
    pub fn build(written: &str, moment: Moment) -> Result<Condition, BuildError> {
        built(written, moment, |planned, whole| match planned {
            Planned::Condition(plan) => Ok(plan),
            other => {
                let told = format!(
                    "this is {}, and a condition holds or does not: compare it, as in `request.method == \"GET\"`",
                    other.kind().told()
                );
                Err(Mistake::new(whole, told))
            }
        })
        .map(|source| Condition(Arc::new(source)))
    }

    /// Evaluates the condition. Never fails, and allocates only for computed text.
    pub fn holds(&self, asked: &Asked<'_>) -> bool {
        self.0.plan.holds(asked)
    }

    /// Whether it reads the response, so that it needs one for evaluation.
    pub fn reads_response(&self) -> bool {
        self.0.reads_response
    }
}

impl Value {
    /// Builds the expression that is `written`, for evaluation at this moment.
    ///
    /// # Errors
    /// The mistake and its place inside; the path is empty.
    pub fn build(written: &str, moment: Moment) -> Result<Value, BuildError> {
        built(written, moment, |planned, whole| match planned {
            Planned::Text(plan) => Ok(plan),
            other => {
                let kind = other.kind();
                let help = match kind {
                    Kind::Int | Kind::Double | Kind::Bool | Kind::Address => "write `string(…)` around it",
                    _ => "take an item of it",
                };
                Err(Mistake::new(whole, format!("this is {}, and text is expected here: {help}", kind.told())))
            }
        })
        .map(|source| Value(Arc::new(source)))
    }

    /// The same for text, numbers, conditions and addresses, which are converted as by `string(…)`.
    ///
    /// # Errors
    /// As [`Value::build`].
    pub fn shown(written: &str, moment: Moment) -> Result<Value, BuildError> {
        built(written, moment, |planned, whole| {
            planned.shown().map_err(|kind| {
                Mistake::new(whole, format!("this is {}, and text is expected here: take an item of it", kind.told()))
            })
        })
        .map(|source| Value(Arc::new(source)))
    }

    /// Evaluates to text. Never fails, and allocates only for computed text. Text from a request may not be UTF-8.
    pub fn of<'a>(&'a self, asked: &Asked<'a>) -> Cow<'a, [u8]> {
        self.0.plan.of(asked)
    }
}

/// Parses and plans on a thread whose stack suffices for any expression of [`BYTES_MAX`].
fn built<P: Send>(
    written: &str,
    moment: Moment,
    typed: impl FnOnce(Planned, Range<usize>) -> Result<P, Mistake> + Send,
) -> Result<Source<P>, BuildError> {
    build(written, moment, typed)
        .map_err(|mistake| BuildError::new("", mistake.message).inside(Inside::of(written, mistake.place)))
}

fn build<P: Send>(
    written: &str,
    moment: Moment,
    typed: impl FnOnce(Planned, Range<usize>) -> Result<P, Mistake> + Send,
) -> Result<Source<P>, Mistake> {
    let whole = 0..written.len();
    if written.len() > BYTES_MAX {
        let told = format!("this expression is longer than {BYTES_MAX} bytes: split it, or write a filter");
        return Err(Mistake::new(0..0, told));
    }
    if written.trim().is_empty() {
        return Err(Mistake::new(0..0, "this expression is empty: write one such as `request.method == \"GET\"`"));
    }
    let read = || {
        let tree = parse::tree(written)?;
        let mut planner = Planner::new(&tree, moment);
        let plan = typed(planner.plan(&tree.root)?, whole.clone())?;
        Ok(Source { written: written.into(), plan, reads_response: planner.reads_response })
    };
    let thread = thread::Builder::new().name("expression".to_owned()).stack_size(STACK_BYTES);
    thread::scope(|scope| match thread.spawn_scoped(scope, read) {
        Ok(running) => running.join().unwrap_or_else(|_| {
            Err(Mistake::new(whole.clone(), "this expression is not understood: write it in a simpler way"))
        }),
        Err(error) => Err(Mistake::new(whole.clone(), format!("no thread could be started to read this: {error}"))),
    })
}

impl<P> Source<P> {
    fn is(&self, other: &Self) -> bool {
        self.written == other.written
    }
}

/// Two of them are equal if they are written in the same way.
macro_rules! by_text {
    ($($kind:ty),*) => {$(
        impl PartialEq for $kind {
            fn eq(&self, other: &Self) -> bool {
                self.0.is(&other.0)
            }
        }

        impl Eq for $kind {}

        impl fmt::Debug for $kind {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0.written)
            }
        }
    )*};
}

by_text!(Condition, Value);

#[cfg(test)]
mod tests;
