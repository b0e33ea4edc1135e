//! Metrics of the filters that read bodies: `decompress` and `body`.

use prometheus::{IntCounter, IntCounterVec};

use super::Direction;

super::retry::labels! {
    /// The outcome of decoding a body.
    Decoding {
        /// Decoded.
        Decoded: "decoded",
        /// Forwarded unchanged, since its coding is unknown and `unknown: pass` is set.
        Passed: "passed",
        /// Refused, since its coding is unknown.
        Unknown: "unknown_coding",
        /// Refused, since `concurrent` is reached.
        Busy: "busy",
        /// Refused, since it is larger than `max_size`.
        TooLarge: "too_large",
        /// Refused, since it grows more than `max_ratio`.
        TooDense: "too_dense",
        /// Refused, since its bytes do not match its coding.
        Malformed: "malformed",
    }
}

super::retry::labels! {
    /// The coding of a body.
    BodyCoding {
        /// GZIP.
        Gzip: "gzip",
        /// The zlib format.
        Deflate: "deflate",
        /// Brotli.
        Br: "br",
        /// Zstandard.
        Zstd: "zstd",
        /// Two or more codings, one applied after the other.
        Several: "several",
    }
}

super::retry::labels! {
    /// The outcome of changing a body.
    BodyChange {
        /// At least one place was replaced.
        Changed: "changed",
        /// No place matched.
        Unchanged: "unchanged",
        /// Refused, since it is coded.
        Coded: "coded",
        /// Refused, since `concurrent` is reached.
        Busy: "busy",
        /// Refused, since it is or becomes larger than `max_size`.
        TooLarge: "too_large",
        /// Refused, since it is not JSON.
        NotJson: "not_json",
        /// Refused, since its changes take too much time.
        Costly: "costly",
    }
}

/// The metrics of a `decompress` filter for one direction of a route.
pub struct DecompressMetrics {
    outcomes: Box<[IntCounter]>,
    /// For each coding the bytes before and after.
    bytes: Box<[[IntCounter; 2]]>,
}

impl DecompressMetrics {
    /// How many series it has.
    pub(super) const SERIES: u64 = (Decoding::ALL.len() + 2 * BodyCoding::ALL.len()) as u64;

    pub(super) fn of(route: &str, direction: Direction, outcomes: &IntCounterVec, bytes: &IntCounterVec) -> Self {
        let direction = direction.name();
        let outcome = |outcome: &Decoding| outcomes.with_label_values(&[route, direction, outcome.name()]);
        let sides = |coding: &BodyCoding| {
            ["in", "out"].map(|side| bytes.with_label_values(&[route, direction, coding.name(), side]))
        };
        DecompressMetrics {
            outcomes: Decoding::ALL.iter().map(outcome).collect(),
            bytes: BodyCoding::ALL.iter().map(sides).collect(),
        }
    }

    /// Counts a body.
    pub fn count(&self, outcome: Decoding) {
        self.outcomes[outcome as usize].inc();
    }

    /// Counts bytes with this coding that were read.
    pub fn read(&self, coding: BodyCoding, bytes: usize) {
        self.bytes[coding as usize][0].inc_by(bytes as u64);
    }

    /// Counts bytes that were decoded from this coding.
    pub fn decoded(&self, coding: BodyCoding, bytes: usize) {
        self.bytes[coding as usize][1].inc_by(bytes as u64);
    }
}

/// The metrics of a `body` filter for one direction of a route.
pub struct BodyMetrics {
    outcomes: Box<[IntCounter]>,
    replacements: IntCounter,
}

impl BodyMetrics {
    /// How many series it has.
    pub(super) const SERIES: u64 = BodyChange::ALL.len() as u64 + 1;

    pub(super) fn of(route: &str, direction: Direction, outcomes: &IntCounterVec, places: &IntCounterVec) -> Self {
        let direction = direction.name();
        let outcome = |outcome: &BodyChange| outcomes.with_label_values(&[route, direction, outcome.name()]);
        BodyMetrics {
            outcomes: BodyChange::ALL.iter().map(outcome).collect(),
            replacements: places.with_label_values(&[route, direction]),
        }
    }

    /// Counts a body.
    pub fn count(&self, outcome: BodyChange) {
        self.outcomes[outcome as usize].inc();
    }

    /// Counts a body in which this many places were replaced.
    pub fn changed(&self, places: u64) {
        self.count(if places > 0 { BodyChange::Changed } else { BodyChange::Unchanged });
        self.replacements.inc_by(places);
    }
}
