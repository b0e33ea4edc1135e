//! A circuit breaker: when no requests are sent to an upstream, and how it recovers.
//!
//! While *closed*, it counts failures. Enough failures *open* it: requests are refused with `Retry-After`. After a
//! time it is *half-open*: a few probes are let through. If all succeed it closes; at the first failure it opens
//! again, for twice as long.
//!
//! Outlier detection excludes an endpoint that is worse than its peers; the breaker is for when all are bad.
//! Nothing here uses sockets or a clock. While closed, admission is one atomic load, and counting one atomic
//! operation.

use std::fmt;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use prometheus::{IntCounter, IntGauge};

use crate::config::upstream::limits as written;
use crate::party::DelaysEndpoint;

/// When it opens, and for how long.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Terms {
    /// The share of failures within `window` that opens it, 0 to 1.
    pub failures: f64,
    /// The time over which the share is computed.
    pub window: Duration,
    /// Least number of attempts for the share to count; `u32::MAX`: it never counts.
    pub min_requests: u32,
    /// Failures in a row that open it; `u32::MAX`: never.
    pub consecutive: u32,
    /// How long it is open the first time; the time doubles each further time.
    pub open: Duration,
    /// Longest open time.
    pub max_open: Duration,
    /// Number of probes while half-open; all must succeed.
    pub probes: u32,
    /// How long a probe may delay its endpoint before another one replaces it.
    pub probe_client: Duration,
}

impl From<&written::CircuitBreaker> for Terms {
    fn from(written: &written::CircuitBreaker) -> Self {
        let count = |count: crate::config::units::Count| u32::try_from(count.0).unwrap_or(u32::MAX);
        Terms {
            failures: written.failures.ratio(),
            window: written.window.0,
            min_requests: count(written.min_requests),
            consecutive: count(written.consecutive),
            open: written.open.0,
            max_open: written.max_open.0,
            probes: count(written.probes),
            probe_client: written.probe_client.0,
        }
    }
}

/// Its state. The numbers are the values of `forebay_upstream_breaker_open`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// All requests are let through.
    Closed = 0,
    /// A few probes are let through.
    HalfOpen = 1,
    /// No requests are let through.
    Open = 2,
}

impl State {
    /// The name of the state.
    pub fn name(self) -> &'static str {
        match self {
            State::Closed => "closed",
            State::HalfOpen => "half_open",
            State::Open => "open",
        }
    }
}

/// The result of an attempt, as far as the upstream is responsible.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Success.
    Good,
    /// Failure.
    Bad,
    /// Another party ended it.
    Neither,
}

/// Permission for one attempt. Its result must be reported to [`Breaker::note`], once.
#[derive(Debug, PartialEq, Eq)]
pub struct Admitted {
    /// The round in which it was given: its result does not count in later ones.
    round: u64,
    /// The number of the probe, if it is one.
    probe: Option<u64>,
}

impl Admitted {
    /// Whether this is a probe, whose result decides.
    pub fn is_probe(&self) -> bool {
        self.probe.is_some()
    }
}

/// The circuit breaker; see the module.
#[derive(Debug)]
pub struct Breaker {
    terms: Terms,
    base: Instant,
    /// The round, incremented with each change, with the state in the two lowest bits.
    state: AtomicU64,
    /// The end of the open state, in nanoseconds after `base`.
    until: AtomicU64,
    window: Window,
    in_a_row: AtomicU32,
    /// Held briefly while the state changes or a probe starts.
    trial: Mutex<Trial>,
    gauge: IntGauge,
    replaced: IntCounter,
}

#[derive(Debug, Default)]
struct Trial {
    /// The active probes.
    places: Vec<Place>,
    /// Number of probes started.
    given: u64,
    /// Number of successful probes.
    good: u32,
    /// How often it has opened, reduced by good behaviour.
    weight: u32,
    /// When it last closed.
    closed: Option<Instant>,
}

/// An active probe.
struct Place {
    number: u64,
    /// Measures how long it delays its endpoint.
    exchange: Option<Arc<dyn DelaysEndpoint>>,
}

impl fmt::Debug for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Place").field("number", &self.number).finish_non_exhaustive()
    }
}

/// Retry delay while probes are active, since their end is unknown.
const SOON: Duration = Duration::from_secs(1);

impl Breaker {
    /// A closed breaker. `gauge` shows its state, `replaced` counts replaced probes.
    pub fn new(terms: Terms, gauge: IntGauge, replaced: IntCounter, now: Instant) -> Breaker {
        gauge.set(State::Closed as i64);
        Breaker {
            terms,
            base: now,
            state: AtomicU64::new(State::Closed as u64),
            until: AtomicU64::new(0),
            window: Window::new(terms.window),
            in_a_row: AtomicU32::new(0),
            trial: Mutex::default(),
            gauge,
            replaced,
        }
    }

    /// The current state. After its time, an open breaker becomes half-open only with the next request.
    pub fn state(&self) -> State {
        read(self.state.load(Ordering::Acquire)).1
    }

    /// Permission for an attempt, or how long to stay away.
    pub fn admit(&self, now: Instant) -> Result<Admitted, Duration> {
        match read(self.state.load(Ordering::Acquire)) {
            (round, State::Closed) => Ok(Admitted { round, probe: None }),
            (_, State::Open) => match self.left(now) {
                Some(left) => Err(left),
                None => self.probe(now),
            },
            (_, State::HalfOpen) => self.probe(now),
        }
    }

    /// Reports the result of an attempt. Returns whether the breaker has opened because of it.
    pub fn note(&self, admitted: &Admitted, verdict: Verdict, now: Instant) -> bool {
        let (round, state) = read(self.state.load(Ordering::Acquire));
        if admitted.round != round {
            return false;
        }
        match (state, verdict) {
            (State::Closed, Verdict::Good) => {
                // Avoids a write, so that the cache line stays shared by all workers.
                if self.in_a_row.load(Ordering::Relaxed) != 0 {
                    self.in_a_row.store(0, Ordering::Relaxed);
                }
                self.window.count(false, self.since(now));
                false
            }
            (State::Closed, Verdict::Bad) => {
                let in_a_row = self.in_a_row.fetch_add(1, Ordering::Relaxed).saturating_add(1);
                self.window.count(true, self.since(now));
                let (passes, failures) = self.window.sum(self.since(now));
                let share = passes >= self.terms.min_requests.max(1)
                    && self.terms.min_requests != u32::MAX
                    && f64::from(failures) >= self.terms.failures * f64::from(passes);
                (share || in_a_row >= self.terms.consecutive) && self.open(round, now)
            }
            (State::HalfOpen, verdict) => self.tried(admitted, verdict, now),
            (State::Closed, Verdict::Neither) | (State::Open, _) => false,
        }
    }

    /// Starts a probe, unless all are active.
    fn probe(&self, now: Instant) -> Result<Admitted, Duration> {
        // The thread that holds the lock starts a probe. More requests arrive than probes are needed, so this one need
        // not wait.
        let Ok(mut trial) = self.trial.try_lock() else { return Err(SOON) };
        let (mut round, state) = read(self.state.load(Ordering::Acquire));
        match state {
            State::Closed => return Ok(Admitted { round, probe: None }),
            State::Open => {
                if let Some(left) = self.left(now) {
                    return Err(left);
                }
                trial.places.clear();
                trial.good = 0;
                round = self.enter(round, State::HalfOpen);
            }
            State::HalfOpen => {}
        }
        if trial.places.len() as u64 + u64::from(trial.good) >= u64::from(self.terms.probes) {
            // The result of a replaced probe still counts, but is not waited for.
            let Some(place) = trial.places.iter().position(|place| self.dawdles(place, now)) else { return Err(SOON) };
            trial.places.swap_remove(place);
            self.replaced.inc();
        }
        trial.given += 1;
        let number = trial.given;
        trial.places.push(Place { number, exchange: None });
        Ok(Admitted { round, probe: Some(number) })
    }

    /// Whether this probe is delayed by others than its endpoint.
    fn dawdles(&self, place: &Place, now: Instant) -> bool {
        place.exchange.as_ref().is_some_and(|exchange| exchange.endpoint_delay(now) > self.terms.probe_client)
    }

    /// Registers the exchange of a probe, which measures how long it delays its endpoint.
    pub fn watch(&self, admitted: &Admitted, exchange: Arc<dyn DelaysEndpoint>) {
        let mut trial = self.trial();
        if let Some(place) = trial.places.iter_mut().find(|place| admitted.probe == Some(place.number)) {
            place.exchange = Some(exchange);
        }
    }

    /// The result of a probe. Returns whether the breaker has opened because of it.
    fn tried(&self, admitted: &Admitted, verdict: Verdict, now: Instant) -> bool {
        let round = admitted.round;
        let mut trial = self.trial();
        if read(self.state.load(Ordering::Acquire)).0 != round {
            return false;
        }
        trial.places.retain(|place| admitted.probe != Some(place.number));
        match verdict {
            Verdict::Neither => false,
            Verdict::Bad => {
                self.open_for(&mut trial, round, now);
                true
            }
            Verdict::Good => {
                trial.good += 1;
                if trial.good >= self.terms.probes {
                    trial.closed = Some(now);
                    self.in_a_row.store(0, Ordering::Relaxed);
                    self.window.clear();
                    self.enter(round, State::Closed);
                }
                false
            }
        }
    }

    /// Opens the breaker, unless another worker has.
    fn open(&self, round: u64, now: Instant) -> bool {
        let mut trial = self.trial();
        if read(self.state.load(Ordering::Acquire)).0 != round {
            return false;
        }
        if let Some(closed) = trial.closed {
            // Good behaviour for as long as one open time reduces the weight by one.
            let good = now.saturating_duration_since(closed).as_nanos() / self.terms.open.as_nanos().max(1);
            trial.weight = trial.weight.saturating_sub(u32::try_from(good).unwrap_or(u32::MAX));
        }
        self.open_for(&mut trial, round, now);
        true
    }

    fn open_for(&self, trial: &mut Trial, round: u64, now: Instant) {
        let Terms { open, max_open, .. } = self.terms;
        let length = 2_u32.checked_pow(trial.weight).and_then(|times| open.checked_mul(times));
        let length = length.unwrap_or(max_open).min(max_open);
        trial.weight = trial.weight.saturating_add(1);
        self.until.store(self.since(now).saturating_add(nanos(length)), Ordering::Release);
        self.enter(round, State::Open);
    }

    /// Enters `state`; the lock is held.
    fn enter(&self, round: u64, state: State) -> u64 {
        let round = round + 1;
        self.state.store(round << 2 | state as u64, Ordering::Release);
        self.gauge.set(state as i64);
        round
    }

    /// Remaining open time.
    fn left(&self, now: Instant) -> Option<Duration> {
        let left = self.until.load(Ordering::Acquire).checked_sub(self.since(now))?;
        Some(Duration::from_nanos(left)).filter(|left| !left.is_zero())
    }

    fn since(&self, now: Instant) -> u64 {
        nanos(now.saturating_duration_since(self.base))
    }

    fn trial(&self) -> MutexGuard<'_, Trial> {
        self.trial.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn nanos(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

fn read(word: u64) -> (u64, State) {
    let state = match word & 3 {
        0 => State::Closed,
        1 => State::HalfOpen,
        _ => State::Open,
    };
    (word >> 2, state)
}

/// Number of parts of the window: old counts expire by an eighth at a time.
const PARTS: u64 = 8;
/// Attempts and failures have twenty bits each, the number of the part has the rest.
const COUNT_BITS: u32 = 20;
const COUNT_MOST: u64 = (1 << COUNT_BITS) - 1;
const NUMBER_MOST: u64 = (1 << (64 - 2 * COUNT_BITS)) - 1;

/// Recent attempts and failures.
#[derive(Debug)]
struct Window {
    /// Length of a part in nanoseconds.
    part: u64,
    parts: [AtomicU64; PARTS as usize],
}

impl Window {
    fn new(window: Duration) -> Window {
        Window { part: (nanos(window) / PARTS).max(1), parts: Default::default() }
    }

    /// Counts an attempt at `since`, nanoseconds from the beginning.
    fn count(&self, failed: bool, since: u64) {
        let number = self.number(since);
        let one = 1 << COUNT_BITS | u64::from(failed);
        let word = &self.parts[(number % PARTS) as usize];
        // A full part keeps its ratio.
        let add = |word: u64| match word >> (2 * COUNT_BITS) == number {
            true if word >> COUNT_BITS & COUNT_MOST == COUNT_MOST => None,
            true => Some(word + one),
            false => Some(number << (2 * COUNT_BITS) | one),
        };
        let _ = word.fetch_update(Ordering::Relaxed, Ordering::Relaxed, add);
    }

    /// Number of attempts, and of failures.
    fn sum(&self, since: u64) -> (u32, u32) {
        let number = self.number(since);
        let (mut passes, mut failures) = (0, 0);
        for word in &self.parts {
            let word = word.load(Ordering::Relaxed);
            if number.wrapping_sub(word >> (2 * COUNT_BITS)) & NUMBER_MOST < PARTS {
                passes += word >> COUNT_BITS & COUNT_MOST;
                failures += word & COUNT_MOST;
            }
        }
        (passes as u32, failures as u32)
    }

    fn clear(&self) {
        self.parts.iter().for_each(|word| word.store(0, Ordering::Relaxed));
    }

    fn number(&self, since: u64) -> u64 {
        (since / self.part) & NUMBER_MOST
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    use proptest::prelude::*;

    const TERMS: Terms = Terms {
        failures: 0.5,
        window: Duration::from_secs(8),
        min_requests: 10,
        consecutive: u32::MAX,
        open: Duration::from_secs(4),
        max_open: Duration::from_secs(20),
        probes: 2,
        probe_client: Duration::from_secs(1),
    };

    /// A breaker and a clock.
    struct Story {
        breaker: Breaker,
        now: Instant,
    }

    impl Story {
        fn new(terms: Terms) -> Story {
            let now = Instant::now();
            let gauge = IntGauge::new("open", "of a test").unwrap();
            let replaced = IntCounter::new("replaced", "of a test").unwrap();
            Story { breaker: Breaker::new(terms, gauge, replaced, now), now }
        }

        fn later(&mut self, millis: u64) {
            self.now += Duration::from_millis(millis);
        }

        fn admitted(&self) -> Admitted {
            self.breaker.admit(self.now).expect("it lets through")
        }

        /// For how many milliseconds it refuses requests.
        fn away(&self) -> u128 {
            self.breaker.admit(self.now).expect_err("it lets none through").as_millis()
        }

        fn note(&self, admitted: &Admitted, verdict: Verdict) -> bool {
            self.breaker.note(admitted, verdict, self.now)
        }

        /// A whole attempt.
        fn passes(&self, verdict: Verdict) -> bool {
            self.note(&self.admitted(), verdict)
        }

        /// Lets its open time pass.
        fn opened(terms: Terms) -> Story {
            let mut story = Story::new(terms);
            let leaves: Vec<_> = (0..10).map(|_| story.admitted()).collect();
            assert!(leaves.iter().any(|admitted| story.note(admitted, Verdict::Bad)));
            story.later(4_000);
            story
        }

        fn state(&self) -> State {
            assert_eq!(self.breaker.gauge.get(), self.breaker.state() as i64);
            self.breaker.state()
        }
    }

    use Verdict::{Bad, Good, Neither};

    #[test]
    fn it_opens_when_half_of_enough_attempts_fail() {
        let story = Story::new(TERMS);
        let opened: Vec<bool> =
            [Good, Bad, Good, Bad, Good, Bad, Good, Neither, Bad, Good].map(|v| story.passes(v)).into();
        assert!(!opened.contains(&true), "nine of ten say nothing");
        assert!(story.passes(Bad), "five of ten");
        assert_eq!((story.state(), story.away()), (State::Open, 4_000));
    }

    #[test]
    fn it_opens_after_failures_in_a_row_however_few_they_are_among_all() {
        let story = Story::new(Terms { consecutive: 3, min_requests: u32::MAX, ..TERMS });
        (0..100).for_each(|_| assert!(!story.passes(Good)));
        assert!(![Bad, Bad, Good, Bad, Neither, Bad].map(|v| story.passes(v)).contains(&true));
        assert!(story.passes(Bad));
    }

    #[test]
    fn what_is_older_than_the_window_is_forgotten() {
        let mut story = Story::new(TERMS);
        (0..9).for_each(|_| assert!(!story.passes(Bad)));
        story.later(7_000);
        assert_eq!(story.breaker.window.sum(story.breaker.since(story.now)), (9, 9));
        story.later(1_000);
        assert_eq!(story.breaker.window.sum(story.breaker.since(story.now)), (0, 0));
        assert!(!story.passes(Bad), "nine others are long gone");
    }

    #[test]
    fn after_its_time_a_few_are_let_through_and_if_they_go_well_it_closes() {
        let story = Story::opened(TERMS);
        let [one, other] = [story.admitted(), story.admitted()];
        assert!(one.is_probe() && other.is_probe());
        assert_eq!((story.state(), story.away()), (State::HalfOpen, 1_000));
        assert!(!story.note(&one, Good));
        assert_eq!(story.away(), 1_000, "the other one is still under way");
        assert!(!story.note(&other, Good));
        assert_eq!(story.state(), State::Closed);
        assert!(!story.admitted().is_probe());
        assert!(!story.passes(Bad), "what was counted before is forgotten");
    }

    #[test]
    fn a_probe_that_fails_opens_it_again_for_longer_up_to_a_limit() {
        let mut story = Story::opened(TERMS);
        for length in [8_000, 16_000, 20_000, 20_000] {
            assert!(story.passes(Bad));
            assert_eq!((story.state(), story.away()), (State::Open, length));
            story.later(length as u64 - 1);
            assert_eq!(story.away(), 1);
            story.later(1);
        }
    }

    #[test]
    fn a_probe_that_says_nothing_makes_room_for_another() {
        let story = Story::opened(TERMS);
        let probes = [story.admitted(), story.admitted()];
        assert!(!story.note(&probes[0], Neither));
        assert!(story.admitted().is_probe());
        story.away();
    }

    /// An exchange that has delayed its endpoint by this number of milliseconds.
    struct Slow(AtomicU64);

    impl DelaysEndpoint for Slow {
        fn endpoint_delay(&self, _: Instant) -> Duration {
            Duration::from_millis(self.0.load(Ordering::Relaxed))
        }
    }

    #[test]
    fn a_probe_whose_client_dawdles_makes_room_for_another_and_is_still_heard() {
        for (verdict, state) in [(Good, State::Closed), (Bad, State::Open), (Neither, State::HalfOpen)] {
            let story = Story::opened(Terms { probes: 1, ..TERMS });
            let (admitted, slow) = (story.admitted(), Arc::new(Slow(AtomicU64::new(1_000))));
            story.breaker.watch(&admitted, slow.clone());
            assert_eq!(story.away(), 1_000, "it may take its time");
            slow.0.store(1_001, Ordering::Relaxed);
            let other = story.admitted();
            assert!(other.is_probe());
            assert_eq!((story.away(), story.breaker.replaced.get()), (1_000, 1), "one place is one place");
            assert_eq!(story.note(&admitted, verdict), verdict == Bad);
            assert_eq!(story.state(), state);
            story.note(&other, Neither);
        }
    }

    #[test]
    fn good_behaviour_makes_up_for_how_often_it_opened() {
        for (good_millis, length) in [(0, 8_000), (4_000, 4_000), (3_600_000, 4_000)] {
            let mut story = Story::opened(TERMS);
            (0..2).for_each(|_| assert!(!story.passes(Good)));
            story.later(good_millis);
            assert!((0..10).any(|_| story.passes(Bad)));
            assert_eq!(story.away(), length);
            story.later(length as u64);
        }
    }

    #[test]
    fn what_began_before_says_nothing_of_what_came_after() {
        let mut story = Story::new(Terms { consecutive: 1, ..TERMS });
        let old: Vec<Admitted> = (0..9).map(|_| story.admitted()).collect();
        assert!(story.passes(Bad));
        assert!(!story.note(&old[0], Bad), "it is open already");
        story.later(4_000);
        let probe = story.admitted();
        assert!(!story.note(&old[1], Bad) && !story.note(&old[2], Good));
        assert_eq!(story.state(), State::HalfOpen);
        assert!(!story.note(&probe, Good) && !story.passes(Good));
        assert_eq!(story.state(), State::Closed);
        assert!(!story.note(&old[3], Bad), "a failure of before");
        assert_eq!(story.state(), State::Closed);
    }

    #[test]
    fn a_window_counts_on_when_its_numbers_have_gone_round_and_a_full_part_keeps_its_share() {
        let window = Window::new(Duration::from_nanos(8));
        for since in [NUMBER_MOST - 1, NUMBER_MOST, NUMBER_MOST + 1, NUMBER_MOST + 2] {
            window.count(true, since);
        }
        assert_eq!(window.sum(NUMBER_MOST + 2), (4, 4));
        let window = Window::new(Duration::from_secs(8));
        (0..=COUNT_MOST + 10).for_each(|count| window.count(count % 2 == 0, 0));
        let (passes, failures) = window.sum(0);
        assert_eq!((u64::from(passes), failures), (COUNT_MOST, 1 << (COUNT_BITS - 1)));
    }

    /// A test event.
    #[derive(Clone, Debug)]
    enum Event {
        Ask,
        End(usize, Verdict),
        Later(u64),
    }

    fn events() -> impl Strategy<Value = Vec<Event>> {
        let verdict = prop_oneof![Just(Good), Just(Bad), Just(Neither)];
        let event = prop_oneof![
            4 => Just(Event::Ask),
            4 => (0usize..8, verdict).prop_map(|(which, verdict)| Event::End(which, verdict)),
            1 => (0u64..6_000).prop_map(Event::Later),
        ];
        prop::collection::vec(event, 1..400)
    }

    proptest! {
        #[test]
        fn whatever_happens_it_lets_no_more_than_its_probes_through_and_always_comes_back(
            events in events(),
            consecutive in prop_oneof![Just(u32::MAX), 1u32..5],
            probes in 1u32..4,
        ) {
            let mut story = Story::new(Terms { consecutive, probes, ..TERMS });
            let mut under_way: Vec<Admitted> = Vec::new();
            for event in events {
                match event {
                    Event::Ask => match story.breaker.admit(story.now) {
                        Ok(admitted) => {
                            prop_assert_ne!(story.state(), State::Open);
                            under_way.push(admitted);
                        }
                        Err(left) => {
                            prop_assert_ne!(story.state(), State::Closed);
                            prop_assert!(left > Duration::ZERO && left <= TERMS.max_open);
                        }
                    },
                    Event::End(which, verdict) if !under_way.is_empty() => {
                        let admitted = under_way.swap_remove(which % under_way.len());
                        let before = story.state();
                        let opened = story.note(&admitted, verdict);
                        prop_assert_eq!(opened, before != State::Open && story.state() == State::Open);
                    }
                    Event::End(..) => {}
                    Event::Later(millis) => story.later(millis),
                }
                let round = read(story.breaker.state.load(Ordering::Relaxed)).0;
                let out = under_way.iter().filter(|admitted| admitted.is_probe() && admitted.round == round).count();
                prop_assert!(out as u32 <= probes);
            }
            // Active attempts end successfully, and the breaker closes.
            for admitted in under_way {
                story.note(&admitted, Neither);
            }
            story.later(20_000);
            for _ in 0..probes {
                story.passes(Good);
            }
            prop_assert_eq!(story.state(), State::Closed);
        }
    }
}
