//! A model of an attempt in which client, endpoint, disk and gateway take the times of a random schedule. It shows that
//! an endpoint within its limits is never charged, whatever the others do, and that an endpoint beyond them is.
//!
//! The clocks, the table, the breaker, the score and the average are the real ones. The model replaces the parts
//! between them: the session, the event loop and its heartbeat.

use std::sync::Arc;
use std::time::{Duration, Instant};

use http::StatusCode;
use prometheus::{IntCounter, IntGauge};
use proptest::prelude::*;

use super::row;
use crate::party::limits::{Checked, DELAY_MAX};
use crate::party::{Bounds, Deadline, DelaysEndpoint, Fault, Party, Recheck, Stage, UpstreamTimeouts, Waits, What};
use crate::proxy::fault::breakage;
use crate::upstream::breaker::{self, Breaker};
use crate::upstream::latency::Latency;
use crate::upstream::outlier::{self, Score};
use crate::upstream::{Ended, Outcome};

const SEND: u64 = 300;
const WAIT: u64 = 600;
const RECEIVE: u64 = 450;
const PATIENCE: UpstreamTimeouts = UpstreamTimeouts { send: ms(SEND), wait: ms(WAIT), receive: ms(RECEIVE) };

/// The part of a stall that the heartbeat cannot see, by its interval.
const UNSEEN: u64 = 10;
/// Shorter stalls are ignored.
const STALL_LEAST: u64 = 20;

const fn ms(millis: u64) -> Duration {
    Duration::from_millis(millis)
}

/// An event of an attempt, in the order of the schedule.
#[derive(Clone, Copy, Debug)]
enum Step {
    /// This party is waited for, and acts after this many milliseconds.
    Wait(Party, u64),
    /// The last piece of the request is passed on.
    Whole,
    /// The response header arrives after this many milliseconds.
    Header(u64),
    /// The client leaves.
    Leave,
    /// The client exceeds one of its own limits.
    Breach(What),
    /// The endpoint closes the connection.
    Break,
}

#[derive(Clone, Debug)]
struct Schedule {
    steps: Vec<Step>,
    /// The stalls of the loop: start in milliseconds after the previous stall, and duration.
    stalls: Vec<(u64, u64)>,
    /// The endpoint's bytes pass through another task, as over HTTP/2.
    by_another_task: bool,
    /// The deadline of the exchange, and whether the client set it.
    deadline: Option<(u64, bool)>,
    attempt: Option<u64>,
}

/// The result of an attempt.
struct Played {
    outcome: Outcome,
    fault: Option<Fault>,
    ended: Ended,
    endpoint_delay: Duration,
}

/// An attempt in progress.
struct Attempt<'s> {
    schedule: &'s Schedule,
    began: Instant,
    now: u64,
    waits: Arc<Waits>,
    bounds: Bounds,
    recheck: Recheck,
    stage: Stage,
    whole: bool,
    given: u64,
    answered: Option<Duration>,
}

impl<'s> Attempt<'s> {
    fn new(schedule: &'s Schedule, began: Instant) -> Self {
        let waits = Arc::new(Waits::new(began));
        waits.begin_attempt(Duration::ZERO, began);
        let deadline = schedule.deadline.map(|(length, is_clients)| Deadline {
            due: began + ms(length),
            length: ms(length),
            is_clients,
        });
        let bounds = Bounds { patience: PATIENCE, attempt: schedule.attempt.map(ms), deadline };
        Attempt {
            schedule,
            began,
            now: 0,
            waits,
            bounds,
            recheck: Recheck::default(),
            stage: Stage::Sending,
            whole: false,
            given: 0,
            answered: None,
        }
    }

    fn at(&self, millis: u64) -> Instant {
        self.began + ms(millis)
    }

    /// The time at which the loop handles an event of time `time`, and the delay of the loop measured by then.
    fn round(&self, time: u64) -> (u64, u64) {
        let (mut end, mut lag, mut time) = (0, 0, time);
        for &(after, length) in &self.schedule.stalls {
            let begin = end + after;
            end = begin + length;
            if begin > time {
                break;
            }
            time = time.max(end);
            lag += if length >= STALL_LEAST { length.saturating_sub(UNSEEN) } else { 0 };
        }
        (time, lag)
    }

    /// Advances until `event` occurs and the exchange handles it. An error: a clock expired first.
    fn pass(&mut self, event: u64, by_endpoint: bool) -> Result<(), Fault> {
        let mut handed_over = !(by_endpoint && self.schedule.by_another_task);
        let mut next = event;
        loop {
            let due = self.bounds.due(self.stage, self.whole, &self.waits);
            let alarm =
                due.map(|(due, _)| self.recheck.next(due).saturating_duration_since(self.began).as_millis() as u64);
            let (now, lag) = self.round(alarm.map_or(next, |alarm| alarm.min(next)).max(self.now));
            self.now = now;
            self.waits.note_lag(ms(lag), self.at(now));
            // The control runs before the exchange.
            if let Some((due, fault)) = self.bounds.due(self.stage, self.whole, &self.waits)
                && self.recheck.next(due) <= self.at(now)
                && self.recheck.at(due, self.at(now)) == Checked::Over
            {
                return Err(fault);
            }
            if now >= event {
                if handed_over {
                    return Ok(());
                }
                // The other task runs before this one is polled again.
                handed_over = true;
                next = now + 1;
            }
        }
    }

    fn step(&mut self, step: Step) -> Result<(), Fault> {
        let client = |attempt: &Self, what| Fault::new(Party::Client, attempt.stage.phase(), what);
        match step {
            Step::Wait(party, time) => {
                self.waits.turn_to(party, self.at(self.now));
                self.pass(self.now + time, party == Party::Endpoint)?;
                match self.stage {
                    // The endpoint received the expected piece, or accepted one.
                    Stage::Sending => {
                        self.given = self.now;
                        self.waits.restart(Party::Endpoint, self.at(self.now));
                    }
                    Stage::Receiving => self.waits.restart(self.answering(), self.at(self.now)),
                    _ => {}
                }
            }
            Step::Whole => {
                self.whole = true;
                if self.stage == Stage::Sending {
                    self.stage = Stage::Waiting;
                }
                if self.answered.is_none() {
                    self.given = self.now;
                }
                self.waits.restart(Party::Endpoint, self.at(self.now));
            }
            Step::Header(time) => {
                self.waits.turn_to(Party::Endpoint, self.at(self.now));
                self.pass(self.now + time, true)?;
                let own = self.waits.spent(Party::Endpoint, self.at(self.now));
                self.answered = Some(ms(self.now - self.given).min(own));
                self.stage = Stage::Receiving;
                self.waits.restart(self.answering(), self.at(self.now));
            }
            Step::Leave => return Err(client(self, What::Left)),
            Step::Breach(what) => return Err(client(self, what)),
            Step::Break => {
                let what = breakage(self.waits.endpoint_delay(self.at(self.now)));
                return Err(Fault::new(Party::Endpoint, self.stage.phase(), what));
            }
        }
        Ok(())
    }

    fn answering(&self) -> Party {
        if self.whole { Party::Endpoint } else { Party::Client }
    }

    fn play(mut self) -> Played {
        let steps = self.schedule.steps.clone();
        let fault = steps.into_iter().try_for_each(|step| self.step(step)).err();
        let outcome = match fault {
            Some(fault) => row(fault).outcome(),
            None => Outcome::Answered(StatusCode::OK),
        };
        let now = self.at(self.now);
        let own = self.waits.spent(Party::Endpoint, now);
        let ended = Ended { outcome, connect: None, wait: self.answered, own };
        Played { outcome, fault, ended, endpoint_delay: self.waits.endpoint_delay(now) }
    }
}

/// Builds a schedule from random numbers in which the endpoint uses at most `share` of each limit, in thousandths.
fn keeping(raw: &[(u8, u64)], share: u64) -> Vec<Step> {
    let (mut steps, mut whole, mut answered) = (Vec::new(), false, false);
    for &(kind, time) in raw {
        let limit = match (answered, whole) {
            (true, true) => RECEIVE,
            // While the client may still send, the endpoint need not respond.
            (true, false) => u64::MAX,
            (false, true) => WAIT,
            (false, false) => SEND,
        };
        let own = time.min((limit / 1000).saturating_mul(share).max(limit.min(10_000) * share / 1000)).min(limit - 1);
        match kind {
            0..=2 => steps.push(Step::Wait(Party::Client, time)),
            3..=5 if answered || !whole => steps.push(Step::Wait(Party::Endpoint, own)),
            6 => steps.push(Step::Wait(Party::Disk, time)),
            7 => steps.push(Step::Wait(Party::Gateway, time)),
            8 if !whole => {
                whole = true;
                steps.push(Step::Whole);
            }
            9 if !answered => {
                answered = true;
                steps.push(Step::Header(own));
            }
            10 => return [steps, vec![Step::Leave]].concat(),
            11 => {
                let what = [What::Silent, What::Slow, What::Left][time as usize % 3];
                // In between, a client with nothing to send can only leave.
                let owes = !whole || answered;
                return [steps, vec![Step::Breach(if owes { what } else { What::Left })]].concat();
            }
            _ => {}
        }
    }
    if !whole {
        steps.push(Step::Whole);
    }
    if !answered {
        steps.push(Step::Header(WAIT / 2));
    }
    steps
}

/// The time for which a schedule waits for the endpoint: until its header, and in total.
fn own_millis(steps: &[Step]) -> (u64, u64) {
    let (mut to_header, mut all, mut answered) = (0, 0, false);
    for step in steps {
        let time = match *step {
            Step::Wait(Party::Endpoint, time) | Step::Header(time) => time,
            _ => continue,
        };
        all += time;
        to_header += if answered { 0 } else { time };
        answered |= matches!(step, Step::Header(_));
    }
    (to_header, all)
}

prop_compose! {
    /// A schedule in which the endpoint keeps its limits and the others act freely.
    fn schedules()(
        raw in prop::collection::vec((0u8..12, prop_oneof![0u64..50, 0u64..1_000, 0u64..20_000]), 0..40),
        stalls in prop::collection::vec((1u64..5_000, prop_oneof![0u64..30, 0u64..8_000]), 0..6),
        by_another_task in any::<bool>(),
        deadline in prop::option::of((0u64..3_000, any::<bool>())),
        attempt in prop::option::of(1u64..500),
    ) -> Schedule {
        let steps = keeping(&raw, 999);
        let (to_header, all) = own_millis(&steps);
        // A small part of each stall is unseen, and each check takes a millisecond.
        let unseen = stalls.len() as u64 * (UNSEEN + STALL_LEAST) + 3 * steps.len() as u64 + 5;
        let deadline = deadline.map(|(more, is_clients)| ((all + unseen) * 10 / 9 + 1 + more, is_clients));
        let attempt = attempt.map(|more| to_header + unseen + more);
        Schedule { steps, stalls, by_another_task, deadline, attempt }
    }
}

fn play(schedule: &Schedule, began: Instant) -> Played {
    Attempt::new(schedule, began).play()
}

/// A breaker that one failure opens for a millisecond, with one probe.
fn breaker(now: Instant) -> Breaker {
    let terms = breaker::Terms {
        failures: 1.0,
        window: ms(10_000),
        min_requests: u32::MAX,
        consecutive: 1,
        open: ms(1),
        max_open: ms(1),
        probes: 1,
        probe_client: DELAY_MAX,
    };
    let (gauge, replaced) = (IntGauge::new("open", "of a test"), IntCounter::new("replaced", "of a test"));
    Breaker::new(terms, gauge.expect("a gauge"), replaced.expect("a counter"), now)
}

/// One failure ejects an endpoint.
const STRICT: outlier::Rules = outlier::Rules {
    consecutive_5xx: 1,
    consecutive_gateway_errors: 1,
    connect_failures: 1,
    success_rate: None,
    latency: None,
    terms: outlier::Terms { base: ms(1), max: ms(1) },
    max_ejected: 1.0,
};

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2_000))]

    #[test]
    fn an_endpoint_that_answers_in_time_is_never_accused(schedules in prop::collection::vec(schedules(), 1..5)) {
        let began = Instant::now();
        let (breaker, score, latency) = (breaker(began), Score::default(), Latency::new(began));
        let mut slowest = 0;
        for schedule in &schedules {
            let leave = breaker.admit(began);
            prop_assert!(leave.as_ref().is_ok_and(|leave| !leave.is_probe()), "the breaker has opened");
            let played = play(schedule, began);
            let fault = played.fault;
            prop_assert!(fault.is_none_or(|fault| row(fault).refusal.reason != "internal"), "{fault:?} has no row");
            prop_assert_eq!(played.outcome.failure(), None, "{:?}", fault);
            let seen = played.ended.effects();
            prop_assert!(!breaker.note(&leave.expect("it is closed"), seen.breaker, began));
            let guilty = seen.outlier.and_then(|pass| score.note(pass, played.ended.to_header(), &STRICT));
            prop_assert_eq!(guilty, None);
            match seen.latency {
                crate::upstream::ended::Lesson::Took(time) => latency.observe(time, began),
                crate::upstream::ended::Lesson::AtLeast(time) => latency.observe_failure(time, began),
            }
            let unseen = schedule.stalls.len() as u64 * (UNSEEN + STALL_LEAST) + 3 * schedule.steps.len() as u64;
            slowest = slowest.max(own_millis(&schedule.steps).1 + unseen);
        }
        prop_assert!(latency.seconds(began) <= slowest as f64 / 1e3, "{} s learned of {slowest} ms", latency.seconds(began));
    }

    #[test]
    fn an_endpoint_that_is_late_is_accused_whatever_was_before(
        mut schedule in schedules(),
        late in 0usize..3,
    ) {
        // Schedules that end before the endpoint can act prove nothing here.
        schedule.steps.retain(|step| !matches!(step, Step::Leave | Step::Breach(_) | Step::Whole | Step::Header(_)));
        (schedule.deadline, schedule.attempt) = (None, None);
        let waits = |steps: &mut Vec<Step>| steps.retain(|step| !matches!(step, Step::Wait(Party::Endpoint, SEND..)));
        waits(&mut schedule.steps);
        schedule.steps.extend(match late {
            0 => vec![Step::Wait(Party::Endpoint, SEND + 10_000)],
            1 => vec![Step::Whole, Step::Header(WAIT + 10_000)],
            _ => vec![Step::Whole, Step::Header(1), Step::Wait(Party::Endpoint, RECEIVE + 10_000)],
        });
        schedule.stalls.retain(|&(_, length)| length < 1_000);
        let played = play(&schedule, Instant::now());
        let fault = played.fault.expect("it is late");
        prop_assert_eq!((fault.party, fault.what), (Party::Endpoint, What::Silent));
        prop_assert!(matches!(played.outcome, Outcome::Failed(_)));
    }

    #[test]
    fn an_endpoint_that_breaks_off_is_accused_unless_others_kept_it_waiting(mut schedule in schedules()) {
        schedule.steps.retain(|step| !matches!(step, Step::Leave | Step::Breach(_)));
        (schedule.deadline, schedule.attempt) = (None, None);
        schedule.steps.push(Step::Break);
        let played = play(&schedule, Instant::now());
        prop_assert_eq!(played.outcome.failure().is_none(), played.endpoint_delay > DELAY_MAX);
    }

    #[test]
    fn a_probe_keeps_others_out_for_no_longer_than_its_client_may_take(schedule in schedules()) {
        let began = Instant::now();
        let breaker = breaker(began);
        let first = breaker.admit(began).expect("it is closed");
        prop_assert!(breaker.note(&first, breaker::Verdict::Bad, began));
        let half_open = began + ms(2);
        let probe = breaker.admit(half_open).expect("a probe");
        let mut attempt = Attempt::new(&schedule, half_open);
        breaker.watch(&probe, attempt.waits.clone());
        for &step in &schedule.steps {
            if attempt.step(step).is_err() {
                break;
            }
            let now = attempt.at(attempt.now);
            match breaker.admit(now) {
                // Another probe has taken its place; this attempt continues to its end, so that there are two.
                Ok(_) => {
                    prop_assert!(attempt.waits.endpoint_delay(now) > DELAY_MAX);
                    break;
                }
                Err(_) => prop_assert!(attempt.waits.endpoint_delay(now) <= DELAY_MAX),
            }
        }
    }
}
