//! When a worker counts as stalled, and what caused it: decisions without clock or thread.
//!
//! `heartbeat` probes every worker and evaluates the result here.

use std::time::Duration;

use super::worker::Activity;
use crate::metrics::LOOP;

/// The state of one worker at one moment.
#[derive(Clone, Copy, Debug, Default)]
pub struct Sample {
    /// How late it is; zero if it is not.
    pub late: Duration,
    /// The exchange that is being polled, and for how long.
    pub doing: Option<(Activity, Duration)>,
}

impl Sample {
    /// The cause of the delay: the exchange that was polled for most of the time, if there is one.
    fn blame(&self) -> Activity {
        match self.doing {
            Some((activity, polled)) if polled * 2 >= self.late => activity,
            _ => Activity::default(),
        }
    }
}

/// An event to report.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum News {
    /// A stall begins.
    Begins(Stall),
    /// A stall has ended.
    Ends(Stall),
}

/// One stall.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Stall {
    /// What was running when it was noticed; the default means no single exchange.
    pub activity: Activity,
    /// Its duration so far.
    pub lasted: Duration,
    /// Number of earlier stalls of this worker that were not logged because of [`QUIET`]; `None`: this one is not
    /// logged either.
    pub untold: Option<u64>,
}

impl Stall {
    /// The value of the label `where`.
    pub fn place(&self) -> &'static str {
        self.activity.place().name()
    }

    /// Whether no single exchange is the cause.
    pub fn is_crowd(&self) -> bool {
        self.place() == LOOP
    }
}

/// After a logged stall, further stalls of the same worker are only counted for this time: a filter that blocks on
/// each call would flood the log.
pub const QUIET: Duration = Duration::from_secs(1);

/// Tracks one worker.
#[derive(Debug)]
pub struct Watch {
    threshold: Duration,
    now: Option<Stall>,
    told_at: Option<Duration>,
    untold: u64,
}

impl Watch {
    /// Calls a worker stalled when it is late by more than `threshold`.
    pub fn new(threshold: Duration) -> Self {
        Watch { threshold, now: None, told_at: None, untold: 0 }
    }

    /// Whether the worker is stalled.
    pub fn is_stalled(&self) -> bool {
        self.now.is_some()
    }

    /// Evaluates the state at the time `now`, measured from any fixed point.
    pub fn take(&mut self, sample: Sample, now: Duration) -> Option<News> {
        match &mut self.now {
            None if sample.late > self.threshold => {
                let polled = sample
                    .doing
                    .filter(|_| sample.blame() != Activity::default())
                    .map_or(sample.late, |(_, time)| time);
                let stall = Stall { activity: sample.blame(), lasted: polled.max(sample.late), untold: self.tell(now) };
                self.now = Some(stall);
                Some(News::Begins(stall))
            }
            Some(stall) if sample.late > stall.lasted => {
                stall.lasted = sample.late;
                None
            }
            // A later probe is already due.
            Some(stall) if sample.late <= self.threshold => {
                let over = *stall;
                self.now = None;
                Some(News::Ends(over))
            }
            _ => None,
        }
    }

    /// The probe was answered after this time, which is the duration of the last stall, if there was one.
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
    use super::super::worker::PhaseOrFilter;
    use super::*;
    use crate::phase::Phase;

    fn ms(n: u64) -> Duration {
        Duration::from_millis(n)
    }

    fn late(late: u64, polled: u64) -> Sample {
        Sample { late: ms(late), doing: Some((Activity::at(PhaseOrFilter::phase(Phase::Route)), ms(polled))) }
    }

    #[test]
    fn a_stall_begins_beyond_the_threshold_and_ends_once() {
        let mut watch = Watch::new(ms(100));
        assert_eq!(watch.take(late(100, 100), ms(100)), None);
        let Some(News::Begins(stall)) = watch.take(late(110, 112), ms(110)) else { panic!("a stall") };
        assert_eq!((stall.place(), stall.lasted, stall.untold), ("route", ms(112), Some(0)));
        assert_eq!(watch.take(late(200, 202), ms(200)), None);
        assert!(watch.is_stalled());
        watch.came(ms(300));
        let Some(News::Ends(stall)) = watch.take(Sample::default(), ms(310)) else { panic!("its end") };
        assert_eq!((stall.place(), stall.lasted), ("route", ms(300)));
        assert_eq!(watch.take(Sample::default(), ms(320)), None);
    }

    #[test]
    fn what_has_run_for_little_of_the_time_is_not_to_blame() {
        let mut watch = Watch::new(ms(100));
        let Some(News::Begins(stall)) = watch.take(late(150, 20), ms(0)) else { panic!("a stall") };
        assert!(stall.is_crowd());
        assert_eq!((stall.place(), stall.lasted), ("loop", ms(150)));
        let nothing = Sample { late: ms(150), doing: None };
        let Some(News::Begins(stall)) = Watch::new(ms(100)).take(nothing, ms(0)) else { panic!("a stall") };
        assert!(stall.is_crowd());
    }

    #[test]
    fn one_stall_a_second_is_told_and_the_rest_is_counted() {
        let mut watch = Watch::new(ms(100));
        let mut told = Vec::new();
        for at in [0, 300, 600, 900, 1_200, 1_500] {
            if let Some(News::Begins(stall)) = watch.take(late(150, 150), ms(at)) {
                told.push(stall.untold);
            }
            watch.take(Sample::default(), ms(at + 10));
        }
        assert_eq!(told, [Some(0), None, None, None, Some(3), None]);
    }
}
