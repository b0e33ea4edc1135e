//! Outlier detection: when an endpoint is ejected because of the results of requests, and for how long.
//!
//! [`Score`] belongs to an endpoint and counts failures in a row on the request path. [`outliers`] compares
//! endpoints with their peers, at intervals, in the background. [`Ejections`] determines how long an endpoint stays
//! out: longer each time, until it has behaved well for a while. Nothing here uses sockets or a clock.

use std::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// The rules.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rules {
    /// Responses of 500 and above in a row, or failures; `u32::MAX` for never.
    pub consecutive_5xx: u32,
    /// Responses of 502, 503 and 504 in a row, or failures; `u32::MAX` for never.
    pub consecutive_gateway_errors: u32,
    /// Failed connections in a row; `u32::MAX` for never.
    pub connect_failures: u32,
    /// The success rate, compared with the peers.
    pub success_rate: Option<SuccessRate>,
    /// The time to first byte, compared with the peers.
    pub latency: Option<Latency>,
    /// How long an endpoint is ejected.
    pub terms: Terms,
    /// The share of endpoints that may be ejected at once, 0 to 1.
    pub max_ejected: f64,
}

/// When the success rate is too low.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SuccessRate {
    /// Least distance below the mean of its peers, in their standard deviations.
    pub factor: f64,
    /// Least distance below the mean, 0 to 1: the deviation of peers without failures is 0.
    pub margin: f64,
    /// Least number of endpoints with enough requests.
    pub hosts: usize,
    /// Least number of requests per interval for an endpoint to be compared.
    pub requests: u32,
}

/// When an endpoint is too slow.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Latency {
    /// The factor above the median of all endpoints.
    pub factor: f64,
    /// Least distance above the median.
    pub margin: Duration,
    /// As in [`SuccessRate`].
    pub hosts: usize,
    /// As in [`SuccessRate`].
    pub requests: u32,
}

/// How long an endpoint is ejected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Terms {
    /// The first time; the time doubles each further time.
    pub base: Duration,
    /// At most.
    pub max: Duration,
}

/// Why an endpoint is ejected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// Too many responses of 500 and above in a row.
    Consecutive5xx,
    /// Too many gateway errors in a row.
    ConsecutiveGatewayErrors,
    /// Too many failed connections in a row.
    ConnectFailures,
    /// Its success rate is too low.
    SuccessRate,
    /// It is too slow.
    Latency,
}

impl Reason {
    /// All reasons.
    pub const ALL: [Reason; 5] = [
        Reason::Consecutive5xx,
        Reason::ConsecutiveGatewayErrors,
        Reason::ConnectFailures,
        Reason::SuccessRate,
        Reason::Latency,
    ];

    /// The YAML key, the metric label and the word in the log.
    pub fn name(self) -> &'static str {
        match self {
            Reason::Consecutive5xx => "consecutive_5xx",
            Reason::ConsecutiveGatewayErrors => "consecutive_gateway_errors",
            Reason::ConnectFailures => "connect_failures",
            Reason::SuccessRate => "success_rate",
            Reason::Latency => "latency",
        }
    }
}

/// The result of an attempt, as far as its endpoint is responsible.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pass {
    /// A response with this status.
    Answered(u16),
    /// No connection could be made.
    Unconnected,
    /// Connected, but no complete response: reset, timeout, malformed.
    Failed,
}

/// The counters of an endpoint. Workers count concurrently; a success after a success writes only the sums for
/// comparisons, if these are configured.
#[derive(Debug, Default)]
pub struct Score {
    server_errors: AtomicU32,
    gateway_errors: AtomicU32,
    connect_failures: AtomicU32,
    passes: AtomicU32,
    good: AtomicU32,
    micros: AtomicU64,
}

/// The results of an endpoint within an interval.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Sample {
    /// Number of attempts.
    pub passes: u32,
    /// Number of attempts with a response below 500.
    pub good: u32,
    /// Mean time to first byte, or to the failure.
    pub latency: Duration,
}

impl Score {
    /// Counts an attempt with this time to first byte or failure. Returns the reason for an ejection, if there is
    /// one.
    pub fn note(&self, pass: Pass, latency: Duration, rules: &Rules) -> Option<Reason> {
        let (server_error, gateway_error, unconnected) = match pass {
            Pass::Answered(status) => (status >= 500, (502..=504).contains(&status), false),
            Pass::Failed => (true, true, false),
            Pass::Unconnected => (true, true, true),
        };
        if rules.success_rate.is_some() || rules.latency.is_some() {
            self.passes.fetch_add(1, Ordering::Relaxed);
            self.good.fetch_add(u32::from(!server_error), Ordering::Relaxed);
            self.micros.fetch_add(u64::try_from(latency.as_micros()).unwrap_or(u64::MAX), Ordering::Relaxed);
        }
        let unconnected = in_a_row(&self.connect_failures, unconnected) >= rules.connect_failures;
        let gateway_errors = in_a_row(&self.gateway_errors, gateway_error) >= rules.consecutive_gateway_errors;
        let server_errors = in_a_row(&self.server_errors, server_error) >= rules.consecutive_5xx;
        // The most specific first.
        match (unconnected, gateway_errors, server_errors) {
            (true, _, _) => Some(Reason::ConnectFailures),
            (_, true, _) => Some(Reason::ConsecutiveGatewayErrors),
            (_, _, true) => Some(Reason::Consecutive5xx),
            _ => None,
        }
    }

    /// Ends an interval.
    pub fn take(&self) -> Sample {
        let passes = self.passes.swap(0, Ordering::Relaxed);
        let good = self.good.swap(0, Ordering::Relaxed);
        let micros = self.micros.swap(0, Ordering::Relaxed);
        // A concurrent worker may have updated only one of the sums.
        let latency = Duration::from_micros(micros / u64::from(passes.max(1)));
        Sample { passes, good: good.min(passes), latency }
    }

    /// After an ejection, one more failure of any kind ejects again; one success clears the counters.
    pub fn try_again(&self, rules: &Rules) {
        self.server_errors.store(on_trial(rules.consecutive_5xx), Ordering::Relaxed);
        self.gateway_errors.store(on_trial(rules.consecutive_gateway_errors), Ordering::Relaxed);
        self.connect_failures.store(on_trial(rules.connect_failures), Ordering::Relaxed);
        self.take();
    }
}

/// One below the threshold; 0 without a threshold.
fn on_trial(enough: u32) -> u32 {
    if enough == u32::MAX { 0 } else { enough.saturating_sub(1) }
}

/// Increments the count, or resets it.
fn in_a_row(count: &AtomicU32, another: bool) -> u32 {
    if another {
        return count.fetch_add(1, Ordering::Relaxed).saturating_add(1);
    }
    // Avoids a write, so that the cache line stays shared by all workers.
    if count.load(Ordering::Relaxed) != 0 {
        count.store(0, Ordering::Relaxed);
    }
    0
}

/// The endpoints that are worse than their peers, with reasons; the worst first, since not all of them may be
/// ejected.
pub fn outliers(samples: &[Sample], rules: &Rules) -> Vec<(usize, Reason)> {
    let mut found = Vec::new();
    if let Some(rule) = &rules.success_rate {
        found.extend(unsuccessful(samples, rule).into_iter().map(|number| (number, Reason::SuccessRate)));
    }
    if let Some(rule) = &rules.latency {
        let slow = slow(samples, rule).into_iter().filter(|number| found.iter().all(|(known, _)| known != number));
        found.extend(slow.map(|number| (number, Reason::Latency)).collect::<Vec<_>>());
    }
    found
}

/// Compares each endpoint with the others, not with a mean that includes it: among few endpoints, the worst one
/// would widen the deviation so much that it could never exceed it (of five, by at most 1.8 times).
fn unsuccessful(samples: &[Sample], rule: &SuccessRate) -> Vec<usize> {
    let rates: Vec<(usize, f64)> = samples
        .iter()
        .enumerate()
        .filter(|(_, sample)| sample.passes >= rule.requests.max(1))
        .map(|(number, sample)| (number, f64::from(sample.good) / f64::from(sample.passes)))
        .collect();
    if rates.len() < rule.hosts.max(2) {
        return Vec::new();
    }
    let sum: f64 = rates.iter().map(|(_, rate)| rate).sum();
    let squares: f64 = rates.iter().map(|(_, rate)| rate * rate).sum();
    let peers = (rates.len() - 1) as f64;
    let mut found: Vec<(usize, f64)> = rates
        .into_iter()
        .filter(|(_, rate)| {
            let mean = (sum - rate) / peers;
            let deviation = ((squares - rate * rate) / peers - mean * mean).max(0.0).sqrt();
            *rate < mean - (rule.factor * deviation).max(rule.margin)
        })
        .collect();
    found.sort_by(|(_, one), (_, other)| one.total_cmp(other));
    found.into_iter().map(|(number, _)| number).collect()
}

fn slow(samples: &[Sample], rule: &Latency) -> Vec<usize> {
    let mut latencies: Vec<(usize, Duration)> = samples
        .iter()
        .enumerate()
        .filter(|(_, sample)| sample.passes >= rule.requests.max(1))
        .map(|(number, sample)| (number, sample.latency))
        .collect();
    // The median of two would be one of them.
    if latencies.len() < rule.hosts.max(3) {
        return Vec::new();
    }
    latencies.sort_by_key(|&(_, latency)| std::cmp::Reverse(latency));
    let median = latencies[latencies.len() / 2].1;
    let bound = median.mul_f64(rule.factor.max(1.0)).max(median.saturating_add(rule.margin));
    latencies.into_iter().take_while(|&(_, latency)| latency > bound).map(|(number, _)| number).collect()
}

/// A pending reason for ejection.
#[derive(Debug, Default)]
pub struct EjectionSignal(AtomicU8);

impl EjectionSignal {
    /// Sets the reason; returns whether it is new.
    pub(super) fn raise(&self, reason: Reason) -> bool {
        let number = Reason::ALL.iter().position(|known| *known == reason).map_or(0, |place| place + 1) as u8;
        self.0.compare_exchange(0, number, Ordering::Relaxed, Ordering::Relaxed).is_ok()
    }

    /// The pending reason.
    pub(super) fn reason(&self) -> Option<Reason> {
        let place = self.0.load(Ordering::Relaxed).checked_sub(1)?;
        Reason::ALL.get(usize::from(place)).copied()
    }

    /// It was evaluated.
    pub(super) fn drop(&self) {
        self.0.store(0, Ordering::Relaxed);
    }
}

/// Whether one more of `of` endpoints may be ejected in addition to `ejected`. If any may be ejected, the first one
/// of several always may.
pub fn may_eject(ejected: usize, of: usize, max_ejected: f64) -> bool {
    let most = (of as f64 * max_ejected).floor() as usize;
    let at_least = usize::from(max_ejected > 0.0 && of > 1);
    ejected < most.max(at_least).min(of)
}

/// The ejections of an endpoint.
#[derive(Clone, Debug, Default)]
pub struct Ejections {
    /// Their number, reduced by good behaviour.
    weight: u32,
    /// Their total number.
    times: u64,
    current: Option<Current>,
    ended: Option<Instant>,
}

/// The current ejection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Current {
    /// Why.
    pub reason: Reason,
    /// Its scheduled end.
    pub until: Instant,
}

impl Ejections {
    /// The current ejection.
    pub fn current(&self) -> Option<Current> {
        self.current
    }

    /// Total number of ejections.
    pub fn times(&self) -> u64 {
        self.times
    }

    /// Ejects the endpoint and returns for how long; `None` if it is already ejected.
    pub fn eject(&mut self, reason: Reason, now: Instant, terms: Terms) -> Option<Duration> {
        if self.current.is_some() {
            return None;
        }
        if let Some(ended) = self.ended {
            // Good behaviour for as long as one ejection reduces the weight by one.
            let good = now.saturating_duration_since(ended).as_nanos() / terms.base.as_nanos().max(1);
            self.weight = self.weight.saturating_sub(u32::try_from(good).unwrap_or(u32::MAX));
        }
        let length = 2_u32.checked_pow(self.weight).and_then(|times| terms.base.checked_mul(times));
        let length = length.unwrap_or(terms.max).min(terms.max);
        self.weight = self.weight.saturating_add(1);
        self.times += 1;
        self.current = Some(Current { reason, until: now + length });
        Some(length)
    }

    /// Ends the current ejection if its time is over; returns whether it did.
    pub fn expire(&mut self, now: Instant) -> bool {
        self.end_if(now, |current| current.until <= now)
    }

    /// A check has connected to it, which disproves connect failures. Returns whether that ended an ejection.
    pub fn refute(&mut self, now: Instant) -> bool {
        self.end_if(now, |current| current.reason == Reason::ConnectFailures)
    }

    fn end_if(&mut self, now: Instant, over: impl FnOnce(&Current) -> bool) -> bool {
        let ends = self.current.as_ref().is_some_and(over);
        if ends {
            (self.current, self.ended) = (None, Some(now));
        }
        ends
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    use proptest::prelude::*;

    const SECOND: Duration = Duration::from_secs(1);
    const TERMS: Terms = Terms { base: Duration::from_secs(30), max: Duration::from_secs(300) };
    const RULES: Rules = Rules {
        consecutive_5xx: 5,
        consecutive_gateway_errors: 3,
        connect_failures: 2,
        success_rate: Some(SuccessRate { factor: 1.9, margin: 0.05, hosts: 3, requests: 100 }),
        latency: Some(Latency { factor: 3.0, margin: Duration::from_millis(10), hosts: 3, requests: 100 }),
        terms: TERMS,
        max_ejected: 0.5,
    };

    /// The reason for ejection after these results.
    fn after(passes: &[Pass]) -> Option<Reason> {
        let score = Score::default();
        passes.iter().map(|&pass| score.note(pass, SECOND, &RULES)).last().flatten()
    }

    fn times(count: usize, pass: Pass) -> Vec<Pass> {
        vec![pass; count]
    }

    #[test]
    fn so_many_failures_in_a_row_are_enough() {
        use Pass::{Answered, Failed, Unconnected};
        assert_eq!(after(&times(4, Answered(500))), None);
        assert_eq!(after(&times(5, Answered(500))), Some(Reason::Consecutive5xx));
        assert_eq!(after(&times(2, Answered(503))), None);
        assert_eq!(after(&times(3, Answered(503))), Some(Reason::ConsecutiveGatewayErrors));
        assert_eq!(after(&times(3, Failed)), Some(Reason::ConsecutiveGatewayErrors));
        assert_eq!(after(&times(2, Unconnected)), Some(Reason::ConnectFailures));
        assert_eq!(after(&[Failed, Unconnected, Answered(504)]), Some(Reason::ConsecutiveGatewayErrors));
        assert_eq!(after(&times(9, Answered(404))), None);
    }

    #[test]
    fn one_good_pass_in_between_begins_the_count_anew() {
        use Pass::{Answered, Unconnected};
        assert_eq!(after(&[Unconnected, Answered(200), Unconnected]), None);
        let mut passes = times(4, Answered(500));
        passes.extend([Answered(200), Answered(500)]);
        assert_eq!(after(&passes), None);
        // A 500 is a response, but not a gateway error.
        assert_eq!(after(&[Answered(502), Answered(502), Answered(500), Answered(502)]), None);
    }

    #[test]
    fn back_from_an_ejection_one_more_failure_is_enough_and_one_good_pass_clears_it() {
        let score = Score::default();
        score.try_again(&RULES);
        assert_eq!(score.note(Pass::Unconnected, SECOND, &RULES), Some(Reason::ConnectFailures));
        score.try_again(&RULES);
        assert_eq!(score.note(Pass::Answered(200), SECOND, &RULES), None);
        assert_eq!(score.note(Pass::Unconnected, SECOND, &RULES), None);
        let never = Rules { consecutive_5xx: u32::MAX, ..RULES };
        score.try_again(&never);
        assert_eq!(score.note(Pass::Answered(500), SECOND, &never), None);
    }

    #[test]
    fn an_interval_is_summed_up_and_begins_anew() {
        let score = Score::default();
        score.note(Pass::Answered(200), SECOND, &RULES);
        score.note(Pass::Answered(500), 3 * SECOND, &RULES);
        assert_eq!(score.take(), Sample { passes: 2, good: 1, latency: 2 * SECOND });
        assert_eq!(score.take(), Sample::default());
    }

    fn rate(good: u32) -> Sample {
        Sample { passes: 100, good, latency: SECOND }
    }

    fn latency(millis: u64) -> Sample {
        Sample { passes: 100, good: 100, latency: Duration::from_millis(millis) }
    }

    #[test]
    fn one_of_three_that_fails_a_fifth_of_its_requests_stands_out() {
        assert_eq!(outliers(&[rate(100), rate(80), rate(99)], &RULES), [(1, Reason::SuccessRate)]);
    }

    #[test]
    fn little_more_than_the_others_fail_is_no_outlier_nor_is_what_all_do() {
        assert_eq!(outliers(&[rate(100), rate(96), rate(100)], &RULES), []);
        assert_eq!(outliers(&[rate(50), rate(52), rate(48)], &RULES), []);
        assert_eq!(outliers(&[rate(90), rate(75), rate(60), rate(52)], &RULES), [], "the others differ as much");
    }

    #[test]
    fn too_few_endpoints_or_requests_are_not_compared() {
        assert_eq!(outliers(&[rate(100), rate(0)], &RULES), []);
        let idle = Sample { passes: 99, good: 0, latency: SECOND };
        assert_eq!(outliers(&[rate(100), rate(100), idle], &RULES), []);
    }

    #[test]
    fn an_endpoint_of_many_times_the_median_latency_stands_out_if_that_matters_at_all() {
        let slow = [latency(20), latency(22), latency(2_000), latency(60)];
        assert_eq!(
            outliers(&slow, &RULES),
            [(2, Reason::Latency)],
            "the median is 22, 90 is above three times as much"
        );
        assert_eq!(outliers(&[latency(1), latency(1), latency(9)], &RULES), [], "10 ms matter, 8 do not");
    }

    #[test]
    fn the_worst_come_first_and_nobody_twice() {
        let bad = Sample { passes: 100, good: 10, latency: 9 * SECOND };
        let samples = [rate(100), rate(100), rate(100), rate(100), rate(100), rate(100), rate(50), bad];
        assert_eq!(outliers(&samples, &RULES), [(7, Reason::SuccessRate)]);
        let two =
            Rules { success_rate: Some(SuccessRate { factor: 1.0, margin: 0.05, hosts: 3, requests: 1 }), ..RULES };
        assert_eq!(outliers(&samples, &two), [(7, Reason::SuccessRate), (6, Reason::SuccessRate)]);
    }

    #[test]
    fn so_many_may_be_ejected_and_one_of_several_always() {
        assert!(may_eject(0, 2, 0.5) && !may_eject(1, 2, 0.5));
        assert!(may_eject(0, 3, 0.1) && !may_eject(1, 3, 0.1), "the first of several may");
        assert!(!may_eject(0, 1, 0.5) && may_eject(0, 1, 1.0), "the only one may not, unless all may");
        assert!(!may_eject(0, 10, 0.0));
        assert!(!may_eject(0, 0, 1.0));
    }

    #[test]
    fn each_ejection_is_twice_as_long_up_to_a_limit() {
        let (mut ejections, mut now) = (Ejections::default(), Instant::now());
        let lengths = [(); 6].map(|()| {
            let length = ejections.eject(Reason::Latency, now, TERMS).expect("it was not ejected");
            assert_eq!(ejections.eject(Reason::Latency, now, TERMS), None, "it is already");
            now += length;
            assert!(ejections.expire(now) && ejections.current().is_none());
            length.as_secs()
        });
        assert_eq!(lengths, [30, 60, 120, 240, 300, 300]);
        assert_eq!(ejections.times(), 6);
    }

    #[test]
    fn good_behaviour_makes_up_for_earlier_times() {
        let (mut ejections, mut now) = (Ejections::default(), Instant::now());
        for expected in [30, 60, 120] {
            assert_eq!(ejections.eject(Reason::SuccessRate, now, TERMS), Some(expected * SECOND));
            assert!(!ejections.expire(now + (expected - 1) * SECOND));
            now += expected * SECOND;
            assert!(ejections.expire(now));
        }
        // Two of three ejections are made up for.
        assert_eq!(ejections.eject(Reason::SuccessRate, now + 2 * TERMS.base, TERMS), Some(60 * SECOND));
    }

    #[test]
    fn a_check_that_connects_ends_an_ejection_for_connect_failures_and_no_other() {
        let (mut ejections, now) = (Ejections::default(), Instant::now());
        ejections.eject(Reason::ConnectFailures, now, TERMS);
        assert!(ejections.refute(now) && !ejections.refute(now));
        ejections.eject(Reason::ConsecutiveGatewayErrors, now, TERMS);
        assert!(!ejections.refute(now));
    }

    proptest! {
        #[test]
        fn never_more_than_the_share_is_ejected_but_for_the_first(of in 0usize..200, share in 0.0f64..=1.0) {
            let ejected = (0..).take_while(|&ejected| may_eject(ejected, of, share)).count();
            prop_assert!(ejected <= of);
            prop_assert!(ejected as f64 <= (of as f64 * share).max(1.0));
        }

        #[test]
        fn an_endpoint_that_is_as_good_as_the_best_never_stands_out(
            rates in prop::collection::vec(0u32..=100, 3..40),
        ) {
            let samples: Vec<Sample> = rates.iter().map(|&good| rate(good)).collect();
            let best = rates.iter().max().copied().unwrap_or_default();
            for (number, _) in outliers(&samples, &RULES) {
                prop_assert!(rates[number] < best);
            }
        }

        #[test]
        fn an_ejection_always_ends_and_within_the_limit(waits in prop::collection::vec(0u64..1_000, 1..60)) {
            let (mut ejections, mut now) = (Ejections::default(), Instant::now());
            for wait in waits {
                let length = ejections.eject(Reason::Consecutive5xx, now, TERMS).expect("the last one has ended");
                prop_assert!(length >= TERMS.base && length <= TERMS.max);
                now += length;
                prop_assert!(ejections.expire(now));
                now += Duration::from_secs(wait);
            }
        }
    }
}
