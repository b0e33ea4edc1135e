//! Metrics of filters: access control (`forebay_access_total`), loaded files (`forebay_filter_loads_total`),
//! password hashing, compression and error pages.

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
        decompress: counter DECOMPRESS,
        decompressed_bytes: counter DECOMPRESSED_BYTES,
        body_changes: counter BODY_CHANGES,
        body_replacements: counter BODY_REPLACEMENTS,
        error_pages: counter ERROR_PAGES,
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
    /// The outcome at an access control filter.
    Access {
        /// Allowed.
        Granted: "granted",
        /// Allowed because of a remembered result.
        Remembered: "remembered",
        /// Allowed without credentials, as configured.
        Anonymous: "anonymous",
        /// No credentials.
        Missing: "missing",
        /// Invalid credentials.
        Wrong: "wrong",
        /// Authenticated, but not allowed.
        Forbidden: "forbidden",
        /// The queue is full.
        Busy: "busy",
        /// The service did not respond.
        Unavailable: "unavailable",
        /// The service did not respond, and the route then allows requests.
        Open: "open",
    }
}

/// The counters of one filter of a route.
pub struct Admission(Box<[IntCounter]>);

impl Admission {
    pub(super) fn of(route: &str, filter: &str, family: &IntCounterVec) -> Self {
        let count = |access: &Access| family.with_label_values(&[route, filter, access.name()]);
        Admission(Access::ALL.iter().map(count).collect())
    }

    /// Counts an outcome.
    pub fn count(&self, access: Access) {
        self.0[access as usize].inc();
    }
}

/// Counts reloads of a filter's data.
pub struct Loads {
    ok: IntCounter,
    failed: IntCounter,
}

impl Loads {
    pub(super) fn of(route: &str, filter: &str, family: &IntCounterVec) -> Self {
        let count = |outcome| family.with_label_values(&[route, filter, outcome]);
        Loads { ok: count("ok"), failed: count("failed") }
    }

    /// Counts a reload; `ok`: it succeeded.
    pub fn count(&self, ok: bool) {
        if ok { self.ok.inc() } else { self.failed.inc() }
    }
}

/// The metrics of password hashing in all filters.
#[derive(Clone)]
pub struct PasswordMetrics {
    pub(super) seconds: Histogram,
    pub(super) waiting: IntGauge,
}

impl PasswordMetrics {
    /// Changes the number of waiting passwords.
    pub fn wait(&self, more: i64) {
        self.waiting.add(more);
    }

    /// Records the time of a password check.
    pub fn hashed(&self, took: Duration) {
        self.seconds.observe(took.as_secs_f64());
    }
}

/// The metrics of compression on a route.
pub struct CompressMetrics {
    passed: [[IntCounter; 2]; 3],
    busy: IntCounter,
}

/// The codings, by their header names.
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

    /// Counts a response that was not compressed because of the limit.
    pub fn busy(&self) {
        self.busy.inc();
    }
}

super::retry::labels! {
    /// The form of an error page. If a client accepts several equally, the first one applies.
    PageForm {
        /// HTML.
        Html: "html",
        /// A problem in JSON (RFC 9457).
        Problem: "problem",
        /// JSON.
        Json: "json",
        /// Plain text.
        Text: "text",
    }
}

/// The metrics of error pages on a route.
pub struct ErrorPageMetrics {
    /// For errors of the client (4xx) and of the server (5xx), in the order of [`PageForm`].
    pages: [Box<[IntCounter]>; 2],
}

impl ErrorPageMetrics {
    /// How many series it has.
    pub(super) const SERIES: u64 = 2 * PageForm::ALL.len() as u64;

    pub(super) fn of(route: &str, pages: &IntCounterVec) -> Self {
        let of_class = |class| {
            let count = |form: &PageForm| pages.with_label_values(&[route, class, form.name()]);
            PageForm::ALL.iter().map(count).collect()
        };
        ErrorPageMetrics { pages: ["4xx", "5xx"].map(of_class) }
    }

    /// Counts a page in this form; `server_error`: it replaces a response with a status of class 5xx, not 4xx.
    pub fn sent(&self, server_error: bool, form: PageForm) {
        self.pages[usize::from(server_error)][form as usize].inc();
    }
}
