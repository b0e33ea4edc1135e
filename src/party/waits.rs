//! How long an exchange has waited for each party.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::Party;

/// The party that an exchange waits for, since when, and the time that it has waited for each party in the current
/// attempt. Only the exchange's task writes it; other threads may read it at any time.
#[derive(Debug)]
pub struct Waits {
    began: Instant,
    /// Nanoseconds from `began` to the start of the present wait, times four, plus the number of the party. One word
    /// keeps the party and its start consistent for readers.
    now: AtomicU64,
    /// Nanoseconds of the completed waits, per party.
    spent: [AtomicU64; 4],
    /// Total lag of the worker in nanoseconds, at the last check.
    lag: AtomicU64,
    /// The part of it that fell into waits of the exchange, in all attempts, in nanoseconds.
    lost: AtomicU64,
    /// Nanoseconds from `began` until which the pauses of another worker were noted.
    noted: AtomicU64,
}

/// Reports how long an endpoint was delayed.
pub trait DelaysEndpoint: Send + Sync {
    /// The time of the current attempt that was spent waiting for other parties than the endpoint.
    fn endpoint_delay(&self, now: Instant) -> Duration;
}

impl Waits {
    /// The waits of an exchange that has no endpoint yet.
    pub fn new(began: Instant) -> Waits {
        let now = AtomicU64::new(Party::Gateway as u64);
        Waits {
            began,
            now,
            spent: Default::default(),
            lag: AtomicU64::new(0),
            lost: AtomicU64::new(0),
            noted: AtomicU64::new(0),
        }
    }

    /// Starts an attempt: the exchange waits for its endpoint, and the times of earlier attempts are reset. `lag`: the
    /// total lag of the worker.
    pub fn begin_attempt(&self, lag: Duration, now: Instant) {
        self.lag.store(nanos(lag), Ordering::Relaxed);
        self.spent.iter().for_each(|spent| spent.store(0, Ordering::Relaxed));
        self.now.store(self.word(Party::Endpoint, now), Ordering::Relaxed);
    }

    /// Starts to wait for `party`. If the exchange already waits for it, the present wait continues.
    pub fn turn_to(&self, party: Party, now: Instant) {
        if self.party() != party {
            self.restart(party, now);
        }
    }

    /// Starts to wait for `party`. If the exchange already waits for it, the party has made progress, and a new wait
    /// begins.
    pub fn restart(&self, party: Party, now: Instant) {
        let (before, since) = self.present();
        let lasted = now.saturating_duration_since(since);
        self.spent[before as usize].fetch_add(nanos(lasted), Ordering::Relaxed);
        self.now.store(self.word(party, now), Ordering::Relaxed);
    }

    /// Reports the total lag of the worker. The new part of it does not count for the present wait: its party may have
    /// waited for bytes from the gateway, or may have done its part without the gateway noticing.
    pub fn note_lag(&self, lag: Duration, now: Instant) {
        let lag = nanos(lag);
        let late = lag.saturating_sub(self.lag.fetch_max(lag, Ordering::Relaxed));
        if late > 0 {
            self.lose(Duration::from_nanos(late), now);
        }
    }

    /// Asks how long another worker, on which the party depends, did not run while this one did. That time does not
    /// count for the present wait, either. Returns whether there is such time. `paused` gets the time since which it
    /// was not asked.
    pub fn note_other(&self, now: Instant, paused: impl FnOnce(Instant) -> Duration) -> bool {
        let until = nanos(now.saturating_duration_since(self.began));
        let noted = self.began + Duration::from_nanos(self.noted.swap(until, Ordering::Relaxed));
        let late = paused(self.present().1.max(noted));
        self.lose(late, now);
        !late.is_zero()
    }

    fn lose(&self, late: Duration, now: Instant) {
        let (party, since) = self.present();
        let late = late.min(now.saturating_duration_since(since));
        self.spent[Party::Gateway as usize].fetch_add(nanos(late), Ordering::Relaxed);
        self.lost.fetch_add(nanos(late), Ordering::Relaxed);
        self.now.store(self.word(party, since + late), Ordering::Relaxed);
    }

    /// The time of all waits for which the worker did not run.
    pub fn lost(&self) -> Duration {
        Duration::from_nanos(self.lost.load(Ordering::Relaxed))
    }

    /// The party that the exchange waits for.
    pub fn party(&self) -> Party {
        self.present().0
    }

    /// The party that the exchange waits for, and since when.
    pub fn present(&self) -> (Party, Instant) {
        let word = self.now.load(Ordering::Relaxed);
        (Party::ALL[(word & 3) as usize], self.began + Duration::from_nanos(word >> 2))
    }

    /// The time spent waiting for `party` in the current attempt, including the present wait.
    pub fn spent(&self, party: Party, now: Instant) -> Duration {
        let (present, since) = self.present();
        let lasts = if present == party { nanos(now.saturating_duration_since(since)) } else { 0 };
        Duration::from_nanos(self.spent[party as usize].load(Ordering::Relaxed).saturating_add(lasts))
    }

    fn word(&self, party: Party, now: Instant) -> u64 {
        nanos(now.saturating_duration_since(self.began)) << 2 | party as u64
    }
}

impl DelaysEndpoint for Waits {
    fn endpoint_delay(&self, now: Instant) -> Duration {
        let others = Party::ALL.into_iter().filter(|&party| party != Party::Endpoint);
        others.map(|party| self.spent(party, now)).sum()
    }
}

/// Limited to 146 years, which leaves two bits for the party.
fn nanos(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX).min(u64::MAX >> 2)
}

#[cfg(test)]
mod tests {
    use super::*;

    use proptest::prelude::*;

    fn ms(millis: u64) -> Duration {
        Duration::from_millis(millis)
    }

    #[test]
    fn a_wait_that_goes_on_keeps_its_beginning_and_one_that_begins_anew_does_not() {
        let began = Instant::now();
        let waits = Waits::new(began);
        waits.begin_attempt(ms(0), began + ms(10));
        waits.turn_to(Party::Endpoint, began + ms(20));
        assert_eq!(waits.present(), (Party::Endpoint, began + ms(10)));
        waits.restart(Party::Endpoint, began + ms(30));
        assert_eq!(waits.present(), (Party::Endpoint, began + ms(30)));
        assert_eq!(waits.spent(Party::Endpoint, began + ms(35)), ms(25));
        assert_eq!(waits.endpoint_delay(began + ms(35)), ms(0));
    }

    #[test]
    fn an_attempt_knows_nothing_of_the_one_before() {
        let began = Instant::now();
        let waits = Waits::new(began);
        waits.begin_attempt(ms(0), began);
        waits.turn_to(Party::Client, began + ms(5));
        waits.begin_attempt(ms(0), began + ms(50));
        assert_eq!(waits.endpoint_delay(began + ms(60)), ms(0));
        assert_eq!(waits.spent(Party::Endpoint, began + ms(60)), ms(10));
    }

    #[test]
    fn time_in_which_the_worker_was_stalled_is_the_gateways() {
        let began = Instant::now();
        let waits = Waits::new(began);
        waits.begin_attempt(ms(900), began);
        waits.note_lag(ms(900), began + ms(10));
        assert_eq!(waits.endpoint_delay(began + ms(10)), ms(0), "it was late before");
        waits.note_lag(ms(960), began + ms(100));
        assert_eq!(waits.present(), (Party::Endpoint, began + ms(60)), "its clock did not run");
        assert_eq!(waits.spent(Party::Endpoint, began + ms(100)), ms(40));
        assert_eq!(waits.spent(Party::Gateway, began + ms(100)), ms(60));
        waits.note_lag(ms(940), began + ms(100));
        waits.note_lag(ms(960), began + ms(100));
        assert_eq!(waits.spent(Party::Gateway, began + ms(100)), ms(60), "a lag that was counted before");
        waits.turn_to(Party::Client, began + ms(110));
        waits.note_lag(ms(9_000), began + ms(120));
        assert_eq!(waits.lost(), ms(70));
        assert_eq!(Party::ALL.map(|party| waits.spent(party, began + ms(120))), [0, 50, 0, 70].map(ms));
    }

    #[test]
    fn time_in_which_another_worker_was_stalled_is_the_gateways_too_and_counts_once() {
        let began = Instant::now();
        let waits = Waits::new(began);
        waits.begin_attempt(ms(0), began + ms(10));
        assert!(waits.note_other(began + ms(100), |since| {
            assert_eq!(since, began + ms(10));
            ms(50)
        }));
        assert_eq!(waits.present(), (Party::Endpoint, began + ms(60)));
        assert!(!waits.note_other(began + ms(200), |since| {
            assert_eq!(since, began + ms(100), "what was before is noted");
            ms(0)
        }));
        assert_eq!((waits.lost(), waits.endpoint_delay(began + ms(200))), (ms(50), ms(50)));
    }

    proptest! {
        #[test]
        fn what_was_waited_for_all_parties_adds_up_to_the_time_that_passed(
            turns in prop::collection::vec((0usize..4, any::<bool>(), 0u64..1_000), 0..50),
        ) {
            let began = Instant::now();
            let waits = Waits::new(began);
            waits.begin_attempt(ms(0), began);
            let (mut now, mut expected, mut party) = (began, [ms(0); 4], Party::Endpoint);
            for (next, anew, millis) in turns {
                now += ms(millis);
                expected[party as usize] += ms(millis);
                party = Party::ALL[next];
                if anew { waits.restart(party, now) } else { waits.turn_to(party, now) }
                prop_assert_eq!(waits.party(), party);
            }
            prop_assert_eq!(Party::ALL.map(|party| waits.spent(party, now)), expected);
            prop_assert_eq!(waits.endpoint_delay(now) + waits.spent(Party::Endpoint, now), now - began);
        }
    }
}
