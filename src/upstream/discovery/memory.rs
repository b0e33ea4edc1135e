//! The memory of a name's look-ups: the last good answer, how new answers change it, and the time of the next query.
//!
//! A failure says nothing about the name, so the last good answer stays valid. An answer without records may be a short
//! mistake: it takes effect once it has been repeated for the maximum time of use of an answer (`refresh`).

use std::time::{Duration, Instant};

/// Shortest interval of queries. TTLs are whole seconds, and 0 means "do not cache".
const TTL_MIN: Duration = Duration::from_secs(1);

/// The result of a query.
#[derive(Clone, Debug, PartialEq)]
pub enum QueryResult<T> {
    /// These records, with their TTL.
    Found(Vec<T>, Duration),
    /// There are none, with the reason.
    None(String),
    /// Unknown, with the error.
    Failed(String),
}

/// The kind of a result.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Found,
    None,
    Failed,
}

/// The memory of one name.
#[derive(Clone, Debug)]
pub struct Memory<T> {
    good: Vec<T>,
    /// Since when answers have had no records.
    none_since: Option<Instant>,
    failures: u32,
    last: Option<Kind>,
}

/// The effect of a result.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Learned {
    /// The kind of the result.
    pub kind: Kind,
    /// Whether the previous result was of another kind.
    pub is_news: bool,
    /// Whether the known records changed.
    pub changed: bool,
    /// When to ask again.
    pub next: Instant,
}

impl<T> Default for Memory<T> {
    fn default() -> Self {
        Memory { good: Vec::new(), none_since: None, failures: 0, last: None }
    }
}

impl<T: PartialEq> Memory<T> {
    /// The known records.
    pub fn good(&self) -> &[T] {
        &self.good
    }

    /// Processes a result.
    pub fn learn(&mut self, answer: QueryResult<T>, now: Instant, refresh: Duration) -> Learned {
        let soon = TTL_MIN.min(refresh);
        let (kind, changed, pause) = match answer {
            QueryResult::Found(found, ttl) => {
                self.none_since = None;
                let changed = self.good != found;
                self.good = found;
                (Kind::Found, changed, ttl.clamp(soon, refresh))
            }
            QueryResult::None(_) => {
                let since = *self.none_since.get_or_insert(now);
                let believed = now.saturating_duration_since(since) >= refresh && !self.good.is_empty();
                if believed {
                    self.good.clear();
                }
                (Kind::None, believed, if self.good.is_empty() { refresh } else { soon })
            }
            QueryResult::Failed(_) => (Kind::Failed, false, (soon * 2_u32.pow(self.failures.min(10))).min(refresh)),
        };
        self.failures = if kind == Kind::Failed { self.failures.saturating_add(1) } else { 0 };
        let is_news = self.last.replace(kind) != Some(kind);
        Learned { kind, is_news, changed, next: now + pause }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const REFRESH: Duration = Duration::from_secs(30);

    /// For each answer, given at its second: the known records, and the seconds until the next query.
    fn learned(answers: &[(u64, QueryResult<u8>)]) -> Vec<(Vec<u8>, f64)> {
        let (start, mut memory) = (Instant::now(), Memory::default());
        let mut learn = |(second, answer): &(u64, QueryResult<u8>)| {
            let now = start + Duration::from_secs(*second);
            let learned = memory.learn(answer.clone(), now, REFRESH);
            (memory.good().to_vec(), (learned.next - now).as_secs_f64())
        };
        answers.iter().map(&mut learn).collect()
    }

    fn found(what: &[u8], ttl: u64) -> QueryResult<u8> {
        QueryResult::Found(what.to_vec(), Duration::from_secs(ttl))
    }

    fn none() -> QueryResult<u8> {
        QueryResult::None(String::new())
    }

    fn failed() -> QueryResult<u8> {
        QueryResult::Failed(String::new())
    }

    #[test]
    fn an_answer_is_used_as_long_as_it_says_within_bounds() {
        let all = [(0, found(&[1], 0)), (1, found(&[1, 2], 7)), (8, found(&[2], 86_400))];
        assert_eq!(learned(&all), [(vec![1], 1.0), (vec![1, 2], 7.0), (vec![2], 30.0)]);
    }

    #[test]
    fn a_server_that_fails_changes_nothing_and_is_asked_less_and_less() {
        let all: Vec<_> = [(0, found(&[1], 7))].into_iter().chain((0..7).map(|n| (10 + n, failed()))).collect();
        let pauses: Vec<f64> = learned(&all).iter().map(|(_, pause)| *pause).collect();
        assert_eq!(pauses, [7.0, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0]);
        assert!(learned(&all).iter().all(|(known, _)| known == &[1]));
    }

    #[test]
    fn that_there_is_nothing_is_believed_when_it_was_said_for_long_enough() {
        let all = [(0, found(&[1], 5)), (5, none()), (20, failed()), (34, none()), (35, none()), (65, found(&[3], 5))];
        let known: Vec<_> = learned(&all).into_iter().map(|(known, pause)| (known.len(), pause)).collect();
        assert_eq!(known, [(1, 5.0), (1, 1.0), (1, 1.0), (1, 1.0), (0, 30.0), (1, 5.0)]);
        let taken_back = [(0, found(&[1], 5)), (5, none()), (6, found(&[1], 5)), (11, none()), (36, none())];
        assert!(learned(&taken_back).iter().all(|(known, _)| known == &[1]));
    }

    #[test]
    fn what_is_no_news_is_known_to_be_none() {
        let mut memory = Memory::default();
        let mut news = |answer| memory.learn(answer, Instant::now(), REFRESH).is_news;
        let said = [found(&[1], 1), found(&[2], 1), failed(), failed(), none(), found(&[2], 1)].map(&mut news);
        assert_eq!(said, [true, false, true, false, true, true]);
    }
}
