//! What filters count of those who come to them and of the files that they read: `forebay_access_total`,
//! `forebay_filter_loads_total`, the hashing of passwords, and what is compressed.

use std::time::Duration;

use prometheus::{Histogram, IntCounter, IntCounterVec, IntGauge};

use super::family::vectors;

vectors! {
    /// The families of filters, of their calls and of mirrors.
    struct Families {
        access: counter ACCESS,
        loads: counter FILTER_LOADS,
        compressed_bytes: counter COMPRESSED_BYTES,
        compress_busy: counter COMPRESS_BUSY,
        password_seconds: histogram PASSWORD_SECONDS,
        password_waiting: gauge PASSWORD_WAITING,
        poll: histogram FILTER_POLL_SECONDS,
        skipped: counter FILTER_SKIPPED,
        calls: counter FILTER_CALLS,
        call_seconds: histogram FILTER_CALL_SECONDS,
        mirrored: counter MIRROR,
    }
}

super::retry::labels! {
    /// What became of a request at a filter that lets some in and others not.
    Access {
        /// It was let in.
        Granted: "granted",
        /// It was let in, by what was remembered of an earlier one.
        Remembered: "remembered",
        /// It was let in without having shown anything, as the filter allows.
        Anonymous: "anonymous",
        /// It has shown nothing.
        Missing: "missing",
        /// It has shown something that is not accepted.
        Wrong: "wrong",
        /// It is known who asks, and that is not allowed.
        Forbidden: "forbidden",
        /// Too many wait already.
        Busy: "busy",
        /// The service gave no answer.
        Unavailable: "unavailable",
        /// The service gave no answer, and the route lets requests in all the same.
        Open: "open",
    }
}

/// Those of one filter of a route.
pub struct Admission(Box<[IntCounter]>);

impl Admission {
    pub(super) fn of(route: &str, filter: &str, family: &IntCounterVec) -> Self {
        let count = |access: &Access| family.with_label_values(&[route, filter, access.name()]);
        Admission(Access::ALL.iter().map(count).collect())
    }

    /// This has become of a request.
    pub fn count(&self, access: Access) {
        self.0[access as usize].inc();
    }
}

/// How often a filter of a route has read what it goes by again.
pub struct Loads {
    ok: IntCounter,
    failed: IntCounter,
}

impl Loads {
    pub(super) fn of(route: &str, filter: &str, family: &IntCounterVec) -> Self {
        let count = |outcome| family.with_label_values(&[route, filter, outcome]);
        Loads { ok: count("ok"), failed: count("failed") }
    }

    /// It was read, or could not be.
    pub fn count(&self, ok: bool) {
        if ok { self.ok.inc() } else { self.failed.inc() }
    }
}

/// Those of hashing passwords, over all filters.
#[derive(Clone)]
pub struct PasswordMetrics {
    pub(super) seconds: Histogram,
    pub(super) waiting: IntGauge,
}

impl PasswordMetrics {
    /// Changes the number of passwords that wait to be hashed.
    pub fn wait(&self, more: i64) {
        self.waiting.add(more);
    }

    /// One was hashed in this time.
    pub fn hashed(&self, took: Duration) {
        self.seconds.observe(took.as_secs_f64());
    }
}

/// Those of answers that are compressed on a route.
pub struct CompressMetrics {
    passed: [[IntCounter; 2]; 3],
    busy: IntCounter,
}

/// The codings, as they are called in headers.
const CODINGS: [&str; 3] = ["zstd", "br", "gzip"];

impl CompressMetrics {
    pub(super) fn of(route: &str, bytes: &IntCounterVec, busy: &IntCounterVec) -> Self {
        let count = |coding| ["in", "out"].map(|side| bytes.with_label_values(&[route, coding, side]));
        CompressMetrics { passed: CODINGS.map(count), busy: busy.with_label_values(&[route]) }
    }

    /// Counts bytes before and after compression with this coding.
    pub fn passed(&self, coding: &str, before: usize, after: usize) {
        if let Some(place) = CODINGS.iter().position(|known| *known == coding) {
            let [came, went] = &self.passed[place];
            came.inc_by(before as u64);
            went.inc_by(after as u64);
        }
    }

    /// An answer has left as it is, since too many are compressed.
    pub fn busy(&self) {
        self.busy.inc();
    }
}
