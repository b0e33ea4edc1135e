//! When certificates are ordered: pure decisions, and the record that is saved between runs.

use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};

/// Random share of the lifetime that is added to two thirds of it, so that certificates issued together are not
/// renewed together.
const RENEWAL_SPREAD: f64 = 1.0 / 30.0;
/// Random variation of a retry delay.
const RETRY_SPREAD: f64 = 0.25;
/// Bounds on the issuer's interval for renewal window requests.
const ASK_MIN: Duration = Duration::from_secs(3600);
const ASK_MAX: Duration = Duration::from_secs(24 * 3600);

/// Delay after a failed renewal window request.
pub const ASK_AGAIN: Duration = Duration::from_secs(6 * 3600);

/// The saved state of a certificate. Times are seconds since 1970.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Record {
    /// The directory of its last order.
    pub directory: String,
    /// The serial number of the certificate, in hexadecimal.
    pub serial: Option<String>,
    /// When the next order is due.
    pub due: u64,
    /// When the last order began.
    pub attempted: u64,
    /// Failed orders since the last success.
    pub failures: u32,
    /// Why the last order failed.
    pub problem: Option<String>,
    /// When to request the renewal window next (RFC 9773); `None`: the issuer does not support it.
    pub ask: Option<u64>,
    /// The renewal window.
    pub window: Option<(u64, u64)>,
}

/// The current certificate.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Held {
    /// Its serial number, in hexadecimal.
    pub serial: String,
    /// Start of its validity, in seconds since 1970.
    pub not_before: u64,
    /// End of its validity, in seconds since 1970.
    pub not_after: u64,
    /// Whether it covers all wanted names.
    pub is_whole: bool,
}

impl Record {
    /// When the next order is due after a start with this record and certificate. After a failed order, the first
    /// delay applies again: the cause may have been fixed.
    pub fn at_start(&self, held: Option<&Held>, directory: &str, now: u64, first: Duration, random: f64) -> u64 {
        let from_elsewhere = !self.directory.is_empty() && self.directory != directory;
        if self.failures > 0 && !from_elsewhere {
            return self.due.min(self.attempted.saturating_add(first.as_secs())).max(self.due.min(now));
        }
        let Some(held) = held.filter(|held| held.is_whole && !from_elsewhere) else { return now };
        let is_known = self.serial.as_ref() == Some(&held.serial) && self.due <= held.not_after;
        if is_known { self.due } else { renewal(held.not_before, held.not_after, random) }
    }

    /// Stores the issuer's renewal window. If it changed, a random time in it becomes due: not before `soonest`,
    /// and not too close to the certificate's end.
    pub fn window(&mut self, window: (u64, u64), held: &Held, soonest: u64, random: f64) {
        if self.window == Some(window) {
            return;
        }
        let (start, end) = window;
        let point = start + (end.saturating_sub(start) as f64 * random) as u64;
        let latest = held.not_before + held.not_after.saturating_sub(held.not_before) / 6 * 5;
        self.due = point.min(latest).max(soonest);
        self.window = Some(window);
    }

    /// Schedules the next renewal window request after the issuer's interval, within bounds.
    pub fn ask_again(&mut self, now: u64, after: Duration) {
        self.ask = Some(now + after.clamp(ASK_MIN, ASK_MAX).as_secs());
    }
}

/// When a certificate is renewed: after two thirds of its lifetime plus up to a thirtieth of it. `random` is from 0
/// to 1.
pub fn renewal(not_before: u64, not_after: u64, random: f64) -> u64 {
    let life = not_after.saturating_sub(not_before);
    not_before + life / 3 * 2 + (life as f64 * RENEWAL_SPREAD * random) as u64
}

/// The delay after this number of failures in a row. `random` is from 0 to 1.
pub fn backoff(first: Duration, max: Duration, failures: u32, random: f64) -> Duration {
    let doubled = first.saturating_mul(1 << failures.saturating_sub(1).min(30));
    doubled.min(max).mul_f64(1.0 + RETRY_SPREAD * (2.0 * random - 1.0))
}

/// Seconds since 1970.
pub fn seconds(time: SystemTime) -> u64 {
    time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs()
}

#[cfg(test)]
mod tests {
    use super::*;

    const DAY: u64 = 86_400;
    const FIRST: Duration = Duration::from_secs(120);

    fn held(is_whole: bool) -> Held {
        Held { serial: "ab".to_owned(), not_before: 100 * DAY, not_after: 190 * DAY, is_whole }
    }

    fn record() -> Record {
        Record { directory: "d".to_owned(), serial: Some("ab".to_owned()), due: 161 * DAY, ..Record::default() }
    }

    #[test]
    fn a_certificate_is_renewed_at_two_thirds_of_its_life_and_a_little_later() {
        assert_eq!(renewal(100 * DAY, 190 * DAY, 0.0), 160 * DAY);
        assert_eq!(renewal(100 * DAY, 190 * DAY, 1.0), 163 * DAY);
        assert_eq!(renewal(10, 5, 0.5), 10, "one that ends before it begins");
    }

    #[test]
    fn waits_grow_and_are_capped_and_differ() {
        let wait = |failures, random| backoff(FIRST, Duration::from_secs(3600), failures, random).as_secs();
        assert_eq!([wait(1, 0.5), wait(2, 0.5), wait(3, 0.5), wait(5, 0.5)], [120, 240, 480, 1920]);
        assert_eq!([wait(6, 0.5), wait(99, 0.5), wait(u32::MAX, 0.5)], [3600; 3]);
        assert_eq!([wait(1, 0.0), wait(1, 1.0)], [90, 150]);
    }

    #[test]
    fn what_is_found_at_start_says_when_the_next_order_is_due() {
        let now = 150 * DAY;
        let due = |record: &Record, held: Option<&Held>| record.at_start(held, "d", now, FIRST, 0.0);
        assert_eq!(due(&record(), Some(&held(true))), 161 * DAY, "as it was drawn");
        assert_eq!(due(&Record::default(), Some(&held(true))), 160 * DAY, "put there by hand");
        assert_eq!(due(&record(), None), now, "none");
        assert_eq!(due(&record(), Some(&held(false))), now, "a name was added");
        assert_eq!(record().at_start(Some(&held(true)), "other", now, FIRST, 0.0), now, "of another directory");
        let other = Held { serial: "cd".to_owned(), ..held(true) };
        assert_eq!(due(&record(), Some(&other)), 160 * DAY, "replaced by hand");

        let failed = Record { failures: 7, attempted: now - 60, due: now + DAY, ..record() };
        assert_eq!(due(&failed, None), now + 60, "not sooner than the first wait after the last attempt");
        let long_ago = Record { attempted: now - DAY, ..failed };
        assert_eq!(due(&long_ago, Some(&held(true))), now);
    }

    #[test]
    fn the_window_of_an_issuer_is_drawn_from_once() {
        let mut record = record();
        let mut due = |window, soonest, random| {
            record.window(window, &held(true), soonest, random);
            record.due
        };
        assert_eq!(due((150 * DAY, 152 * DAY), 0, 0.5), 151 * DAY);
        assert_eq!(due((150 * DAY, 152 * DAY), 0, 0.9), 151 * DAY, "the same window");
        assert_eq!(due((100 * DAY, 100 * DAY), 120 * DAY, 0.9), 120 * DAY, "it is revoked: as soon as may be");
        assert_eq!(due((500 * DAY, 600 * DAY), 0, 0.0), 175 * DAY, "five sixths of its life");
        let asked = |after| {
            let mut record = Record::default();
            record.ask_again(DAY, after);
            record.ask
        };
        assert_eq!([asked(Duration::ZERO), asked(Duration::MAX)], [Some(DAY + 3600), Some(2 * DAY)]);
    }
}
