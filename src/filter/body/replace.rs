//! Replaces text in a body: by patterns of bounded cost, one after another.

use std::time::{Duration, Instant};

use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeValLike;
use regex::bytes::Regex;

use super::{Changed, Flaw};
use crate::expression;
use crate::filter::groups::{self, Piece};

/// A pattern and its replacement.
#[derive(Debug)]
pub(super) struct Rule {
    pattern: Regex,
    with: With,
    /// Only the first match is replaced.
    first: bool,
}

/// The replacement of a match.
#[derive(Debug)]
enum With {
    /// Text and groups.
    Pieces(Vec<Piece>),
    /// The result of an expression for each exchange, unchanged.
    Made(expression::Value),
}

impl Rule {
    /// Prepares a pattern. In the replacement, `$1` inserts a group.
    ///
    /// # Errors
    /// The mistake in the pattern (`Ok`), or in the replacement (`Err`).
    pub fn pattern(written: &str, with: &str, first: bool) -> Result<Rule, Result<String, String>> {
        let pattern = expression::in_bytes(written).map_err(Ok)?;
        let names: Vec<_> = pattern.capture_names().collect();
        let pieces = groups::pieces(with, &names).map_err(Err)?;
        Ok(Rule { with: With::Pieces(pieces), pattern, first })
    }

    /// Prepares a literal text and its literal replacement.
    ///
    /// # Errors
    /// It is too long.
    pub fn text(written: &str, with: &str, first: bool) -> Result<Rule, String> {
        let pattern = expression::in_bytes(&regex::escape(written))?;
        Ok(Rule { pattern, with: With::Pieces(vec![Piece::Text(with.to_owned())]), first })
    }

    /// The same with the result of an expression as the replacement.
    pub fn making(self, made: expression::Value) -> Rule {
        Rule { with: With::Made(made), ..self }
    }

    /// The expression for the replacement, if there is one.
    pub fn made(&self) -> Option<&expression::Value> {
        match &self.with {
            With::Pieces(_) => None,
            With::Made(made) => Some(made),
        }
    }

    /// The body with all matches replaced; `None` if there are none. `made` is the result of this rule's expression.
    ///
    /// # Errors
    /// The result is larger than `bytes_max`, or the replacement takes too much time.
    pub fn apply(&self, body: &[u8], made: &[u8], bytes_max: usize, time: &Time) -> Result<Option<Changed>, Flaw> {
        let (mut changed, mut rest, mut places) = (Vec::new(), 0, 0);
        let mut locations = self.pattern.capture_locations();
        let grouped =
            matches!(&self.with, With::Pieces(pieces) if pieces.iter().any(|it| matches!(it, Piece::Group(_))));
        for found in self.pattern.find_iter(body) {
            changed.extend_from_slice(&body[rest..found.start()]);
            (rest, places) = (found.end(), places + 1);
            match &self.with {
                With::Made(_) => changed.extend_from_slice(made),
                With::Pieces(pieces) => {
                    if grouped {
                        // The same match again, with its groups.
                        self.pattern.captures_read_at(&mut locations, body, found.start());
                    }
                    for piece in pieces {
                        match piece {
                            Piece::Text(text) => changed.extend_from_slice(text.as_bytes()),
                            Piece::Group(0) => changed.extend_from_slice(found.as_bytes()),
                            Piece::Group(group) => {
                                let place = locations.get(*group);
                                changed.extend_from_slice(place.map_or(&[], |(start, end)| &body[start..end]));
                            }
                        }
                    }
                }
            }
            if changed.len() > bytes_max {
                return Err(Flaw::Size);
            }
            if time.is_over() {
                return Err(Flaw::Costly);
            }
            if self.first {
                break;
            }
        }
        if places == 0 {
            return Ok(None);
        }
        changed.extend_from_slice(&body[rest..]);
        if changed.len() > bytes_max { Err(Flaw::Size) } else { Ok(Some(Changed { bytes: changed, places })) }
    }
}

/// The limit on a thread's CPU time for the changes to one body. Each search is linear in the body, but a pattern
/// that reads far ahead and matches little may start a search at every byte.
pub(super) struct Time {
    begun: Instant,
    used: Duration,
}

/// A body of many mebibytes takes a second.
const TIME_MAX: Duration = Duration::from_secs(1);

impl Time {
    /// From now on, on this thread.
    pub fn begin() -> Time {
        Time { begun: Instant::now(), used: used() }
    }

    fn is_over(&self) -> bool {
        // The clock of the thread is dearer; and a thread that others keep from running has used nothing.
        self.begun.elapsed() > TIME_MAX && used().saturating_sub(self.used) > TIME_MAX
    }
}

fn used() -> Duration {
    let usage = getrusage(UsageWho::RUSAGE_THREAD);
    usage.map_or(Duration::ZERO, |usage| {
        let micros = usage.user_time().num_microseconds() + usage.system_time().num_microseconds();
        Duration::from_micros(u64::try_from(micros).unwrap_or_default())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn replaced(rule: &Rule, body: &str) -> Option<String> {
        let changed = rule.apply(body.as_bytes(), b"made", 1 << 20, &Time::begin()).unwrap();
        changed.map(|changed| String::from_utf8_lossy(&changed.bytes).into_owned())
    }

    fn pattern(written: &str, with: &str) -> Rule {
        Rule::pattern(written, with, false).unwrap()
    }

    #[test]
    fn matches_are_replaced_with_their_groups() {
        let hosts = pattern(r"https?://([a-z]+)\.intern(?:al)?\b", "https://$1.example/${0}$$");
        let body = "a http://shop.intern, https://api.internal/x b";
        let told = "a https://shop.example/http://shop.intern$, https://api.example/https://api.internal$/x b";
        assert_eq!(replaced(&hosts, body).as_deref(), Some(told));
        assert_eq!(replaced(&hosts, "nothing here"), None);
        assert_eq!(replaced(&pattern("a|(b)", "[$1]"), "ab").as_deref(), Some("[][b]"));
        assert_eq!(replaced(&pattern("^", "> "), "ab").as_deref(), Some("> ab"));
        assert_eq!(replaced(&pattern("a.b", "x"), "a\nb acb").as_deref(), Some("a\nb x"), "a line break is no `.`");
        assert_eq!(replaced(&pattern("b$", ""), "ab").as_deref(), Some("a"));
    }

    #[test]
    fn a_text_is_looked_for_as_it_is() {
        let text = |first| Rule::text("$1 (a.b)", "$1", first).unwrap();
        assert_eq!(replaced(&text(false), "$1 (a.b) $1 (a.b) axb").as_deref(), Some("$1 $1 axb"));
        assert_eq!(replaced(&text(true), "$1 (a.b) $1 (a.b)").as_deref(), Some("$1 $1 (a.b)"));
        let made = text(false).making(expression::Value::build("'x'", expression::Moment::Request).unwrap());
        assert_eq!(replaced(&made, "$1 (a.b)").as_deref(), Some("made"));
    }

    #[test]
    fn bytes_that_are_no_text_stay() {
        let changed = pattern("é+", "e").apply(b"\xff\xc3\xa9\xc3\xa9\xfe", b"", 100, &Time::begin()).unwrap();
        assert_eq!(changed, Some(Changed { bytes: b"\xffe\xfe".to_vec(), places: 1 }));
    }

    #[test]
    fn what_grows_too_much_is_no_body() {
        let rule = pattern("(a)", "$1$1$1");
        let apply = |most| rule.apply(&[b'a'; 100], b"", most, &Time::begin());
        assert_eq!(apply(300).unwrap().map(|changed| (changed.bytes.len(), changed.places)), Some((300, 100)));
        assert_eq!((apply(299), apply(10)), (Err(Flaw::Size), Err(Flaw::Size)));
    }

    #[test]
    fn no_body_keeps_a_thread_for_long() {
        // For each match, all of the rest is read in search of a longer one.
        let rule = pattern("a[ab]*c|a", "x");
        let body = "ab".repeat(2 << 20);
        let time = Time::begin();
        let outcome =
            rule.apply(body.as_bytes(), b"", 1 << 30, &time).map(|changed| changed.map(|changed| changed.places));
        assert_eq!(outcome, Err(Flaw::Costly));
        // It is over with the first search that ends behind its time.
        assert!(used() - time.used < 10 * TIME_MAX, "{:?}", used() - time.used);
    }

    #[test]
    fn patterns_that_cost_too_much_are_refused() {
        for costly in [r"[ab]*a[ab]{4000}[^ab]", r"([ab]{1,60}){1,60}[^a-z]"] {
            assert!(matches!(Rule::pattern(costly, "", false), Err(Ok(told)) if told.contains("too long")), "{costly}");
        }
        assert!(matches!(Rule::pattern("(a", "", false), Err(Ok(_))));
        assert!(matches!(Rule::pattern("(a)", "$2", false), Err(Err(_))));
    }
}
