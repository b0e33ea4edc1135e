//! When a worker counts as stalled, and what is to blame: decisions without a clock or a thread.
//!
//! `heartbeat` asks every worker for a sign of life and looks at it here.

use std::time::Duration;

use super::worker::Word;
use crate::metrics::LOOP;

/// What is seen of one worker at one moment.
#[derive(Clone, Copy, Debug, Default)]
pub struct Look {
    /// For how long it has been late; zero if it is not.
    pub late: Duration,
    /// The exchange that is polled, and for how long it has been.
    pub doing: Option<(Word, Duration)>,
}

impl Look {
    /// What the worker is late for: the exchange that has been polled for most of the time, if there is one.
    fn blame(&self) -> Word {
        match self.doing {
            Some((word, polled)) if polled * 2 >= self.late => word,
            _ => Word::default(),
        }
    }
}

/// Something about a worker that is worth telling.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum News {
    /// It is stalled.
    Begins(Stall),
    /// It goes on.
    Ends(Stall),
}

/// One stall.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Stall {
    /// What was running when it was noticed; the default is nothing in particular.
    pub word: Word,
    /// For how long it has lasted.
    pub lasted: Duration,
    /// How many stalls of this worker before it were not told, for there was one less than [`QUIET`] ago; `None`: nor
    /// is this one.
    pub untold: Option<u64>,
}

impl Stall {
    /// The value of the label `where`.
    pub fn place(&self) -> &'static str {
        self.word.spot().name()
    }

    /// Whether nothing in particular is to blame.
    pub fn is_crowd(&self) -> bool {
        self.place() == LOOP
    }
}

/// After a stall was told, further ones of the same worker are counted only, for so long: a filter that blocks whenever
/// it is called would fill the log.
pub const QUIET: Duration = Duration::from_secs(1);

/// Keeps in mind how one worker does.
#[derive(Debug)]
pub struct Watch {
    threshold: Duration,
    now: Option<Stall>,
    told_at: Option<Duration>,
    untold: u64,
}

impl Watch {
    /// One that calls a worker stalled when it is late by more than `threshold`.
    pub fn new(threshold: Duration) -> Self {
        Watch { threshold, now: None, told_at: None, untold: 0 }
    }

    /// Whether the worker is stalled.
    pub fn is_stalled(&self) -> bool {
        self.now.is_some()
    }

    /// Takes a look, `now` since whatever time.
    pub fn look(&mut self, look: Look, now: Duration) -> Option<News> {
        match &mut self.now {
            None if look.late > self.threshold => {
                let polled = look.doing.filter(|_| look.blame() != Word::default()).map_or(look.late, |(_, time)| time);
                let stall = Stall { word: look.blame(), lasted: polled.max(look.late), untold: self.tell(now) };
                self.now = Some(stall);
                Some(News::Begins(stall))
            }
            Some(stall) if look.late > stall.lasted => {
                stall.lasted = look.late;
                None
            }
            // A later sign of life is awaited already.
            Some(stall) if look.late <= self.threshold => {
                let over = *stall;
                self.now = None;
                Some(News::Ends(over))
            }
            _ => None,
        }
    }

    /// The sign of life came after so long: the last stall has lasted that long, if there is one.
    pub fn came(&mut self, late: Duration) {
        if let Some(stall) = &mut self.now {
            stall.lasted = stall.lasted.max(late);
        }
    }

    fn tell(&mut self, now: Duration) -> Option<u64> {
        if self.told_at.is_some_and(|told| now < told + QUIET) {
            self.untold += 1;
            return None;
        }
        self.told_at = Some(now);
        Some(std::mem::take(&mut self.untold))
    }
}

#[cfg(test)]
mod tests {
    use super::super::worker::Spot;
    use super::*;
    use crate::phase::Phase;

    fn ms(n: u64) -> Duration {
        Duration::from_millis(n)
    }

    fn late(late: u64, polled: u64) -> Look {
        Look { late: ms(late), doing: Some((Word::at(Spot::phase(Phase::Route)), ms(polled))) }
    }

    #[test]
    fn a_stall_begins_beyond_the_threshold_and_ends_once() {
        let mut watch = Watch::new(ms(100));
        assert_eq!(watch.look(late(100, 100), ms(100)), None);
        let Some(News::Begins(stall)) = watch.look(late(110, 112), ms(110)) else { panic!("a stall") };
        assert_eq!((stall.place(), stall.lasted, stall.untold), ("route", ms(112), Some(0)));
        assert_eq!(watch.look(late(200, 202), ms(200)), None);
        assert!(watch.is_stalled());
        watch.came(ms(300));
        let Some(News::Ends(stall)) = watch.look(Look::default(), ms(310)) else { panic!("its end") };
        assert_eq!((stall.place(), stall.lasted), ("route", ms(300)));
        assert_eq!(watch.look(Look::default(), ms(320)), None);
    }

    #[test]
    fn what_has_run_for_little_of_the_time_is_not_to_blame() {
        let mut watch = Watch::new(ms(100));
        let Some(News::Begins(stall)) = watch.look(late(150, 20), ms(0)) else { panic!("a stall") };
        assert!(stall.is_crowd());
        assert_eq!((stall.place(), stall.lasted), ("loop", ms(150)));
        let nothing = Look { late: ms(150), doing: None };
        let Some(News::Begins(stall)) = Watch::new(ms(100)).look(nothing, ms(0)) else { panic!("a stall") };
        assert!(stall.is_crowd());
    }

    #[test]
    fn one_stall_a_second_is_told_and_the_rest_is_counted() {
        let mut watch = Watch::new(ms(100));
        let mut told = Vec::new();
        for at in [0, 300, 600, 900, 1_200, 1_500] {
            if let Some(News::Begins(stall)) = watch.look(late(150, 150), ms(at)) {
                told.push(stall.untold);
            }
            watch.look(Look::default(), ms(at + 10));
        }
        assert_eq!(told, [Some(0), None, None, None, Some(3), None]);
    }
}
