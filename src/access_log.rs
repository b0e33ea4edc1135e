//! The access log: one line per exchange, with the time of every phase.
//!
//! A worker formats the line in a buffer of its thread and appends it to a queue. `access_log/writer.rs` takes
//! lines from the queue in batches; only its thread waits for the disk. `access_log/line.rs` formats lines. `proxy`
//! reports each finished exchange ([`Finished`]); `client` reports refused headers.

pub mod line;
mod writer;

use std::cell::RefCell;
use std::sync::Arc;

use prometheus::IntCounter;

use crate::config::server::{AccessLog as Settings, LogFormat, Query};
use crate::error::BuildError;
use crate::expression::named::{Named, NamedText};
use crate::finished::Finished;
use crate::metrics::AccessLogMetrics;
use writer::{Queue, Shared, Sink};

/// The content of a line about one exchange.
///
/// In JSON, durations end in `_ms`, and fields that are `None` are omitted, as are buffering fields if nothing was
/// buffered. In the combined format, `None` is `-`.
#[derive(Clone, Copy, Debug)]
pub struct Line<'a> {
    /// The exchange.
    pub finished: &'a Finished<'a>,
    /// Additional fields from the configuration.
    pub fields: &'a [NamedText<'a>],
}

/// The access log. Dropping it closes it.
pub struct AccessLog {
    /// Additional fields of each line.
    pub fields: Named,
    format: LogFormat,
    query: Query,
    shared: Arc<Shared>,
    dropped: IntCounter,
}

thread_local! {
    /// The buffer for this thread's line; reused, so that a line costs no allocation.
    static LINE: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// A larger buffer is freed after use.
const LINE_KEPT_BYTES: usize = 16 * 1024;

impl AccessLog {
    /// Opens the log and starts its thread; `None` if it is `off`.
    ///
    /// A file is created with mode 0640 or appended to. The error names the key `path` of the access log.
    pub fn open(settings: &Settings, fields: Named, metrics: AccessLogMetrics) -> Result<Option<Self>, BuildError> {
        if settings.path == "off" {
            return Ok(None);
        }
        let failed = |error: std::io::Error| {
            let message = format!(
                "`{}` cannot be opened for appending: {error}; write a file in a directory that Forebay may write to, \
                 or `stdout`, `stderr` or `off`",
                settings.path
            );
            BuildError::new("observability.access_log.path", message)
        };
        let sink = Sink::open(&settings.path).map_err(failed)?;
        let shared = Arc::new(Shared::new(Queue::new(settings.queue.0)));
        let dropped = metrics.dropped_full.clone();
        writer::start(shared.clone(), sink, metrics).map_err(failed)?;
        Ok(Some(AccessLog { fields, format: settings.format, query: settings.query, shared, dropped }))
    }

    /// Adds a line with these additional fields. Never blocks on the disk: if the queue is full, the line is
    /// dropped and counted.
    pub fn record(&self, finished: &Finished<'_>, fields: &[NamedText<'_>]) {
        let bare;
        let finished = match self.query {
            Query::Keep => finished,
            Query::Drop => {
                bare = finished.without_queries();
                &bare
            }
        };
        let whole = Line { finished, fields };
        LINE.with_borrow_mut(|line| {
            match self.format {
                LogFormat::Json => line::json(line, &whole),
                LogFormat::Combined => line::combined(line, &whole),
            }
            if !self.shared.push(line) {
                self.dropped.inc();
            }
            line.clear();
            line.shrink_to(LINE_KEPT_BYTES);
        });
    }

    /// Reopens the file by name (SIGUSR1), after the lines recorded so far were written to the old one.
    ///
    /// Returns at once. If the file cannot be opened, the old one stays in use and an error is logged.
    pub fn reopen(&self) {
        self.shared.reopen();
    }

    /// Writes the queue, for at most five seconds. Later lines are dropped and counted.
    pub fn close(&self) {
        if !self.shared.close() {
            tracing::error!("the access log was not written to its end: its output takes nothing");
        }
    }
}

impl Drop for AccessLog {
    fn drop(&mut self) {
        self.close();
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt;
    use std::path::Path;
    use std::time::Instant;

    use super::*;
    use crate::config::units::Count;
    use crate::finished::Request;
    use crate::metrics::Metrics;
    use crate::phase::{Clock, Phase};

    fn open(path: &Path) -> (AccessLog, Metrics) {
        let metrics = Metrics::new(0, Vec::new());
        let settings = Settings { path: path.to_str().unwrap().to_owned(), ..Settings::default() };
        let log = AccessLog::open(&settings, Named::default(), metrics.access_log()).unwrap().unwrap();
        (log, metrics)
    }

    fn record(log: &AccessLog, target: &str) {
        let clock = Clock::start(Phase::Header, Instant::now());
        let finished = line::tests::finished(&clock);
        let request = Request { target: target.as_bytes(), ..finished.request };
        log.record(&Finished { request, ..finished }, &[]);
    }

    /// The targets of all lines in the file.
    fn targets(path: &Path) -> Vec<String> {
        let lines = fs::read_to_string(path).unwrap();
        let lines = lines.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
        lines.map(|line| line["target"].as_str().unwrap().to_owned()).collect()
    }

    #[test]
    fn all_lines_are_in_the_file_once_it_is_closed_in_their_order() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("access.log");
        let (log, metrics) = open(&path);
        let written: Vec<String> = (0..1_000).map(|n| format!("/{n}")).collect();
        written.iter().for_each(|target| record(&log, target));
        log.close();

        assert_eq!(targets(&path), written);
        assert_eq!(metrics.access_log().lines.get(), 1_000);
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o137, 0, "others may read the log");
    }

    #[test]
    fn queries_are_in_no_line_where_they_are_to_be_dropped() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("access.log");
        let metrics = Metrics::new(0, Vec::new());
        let path_written = path.to_str().unwrap().to_owned();
        let settings = Settings { path: path_written, query: Query::Drop, ..Settings::default() };
        let log = AccessLog::open(&settings, Named::default(), metrics.access_log()).unwrap().unwrap();
        let clock = Clock::start(Phase::Header, Instant::now());
        for target in ["/cart?token=secret", "/cart?", "/cart"] {
            let referer = Some(&b"https://shop.example/login?token=secret"[..]);
            let finished = line::tests::finished(&clock);
            let request = Request { target: target.as_bytes(), referer, ..finished.request };
            log.record(&Finished { request, ..finished }, &[]);
        }
        log.close();

        assert_eq!(targets(&path), ["/cart"; 3]);
        let written = fs::read_to_string(&path).unwrap();
        assert!(
            written.contains(r#""referer":"https://shop.example/login""#) && !written.contains("secret"),
            "{written}"
        );
    }

    #[test]
    fn a_file_that_was_moved_away_keeps_the_lines_before_the_reopening() {
        let dir = tempfile::tempdir().unwrap();
        let (path, moved) = (dir.path().join("access.log"), dir.path().join("access.log.1"));
        let (log, _) = open(&path);
        record(&log, "/before");
        fs::rename(&path, &moved).unwrap();
        log.reopen();
        record(&log, "/after");
        drop(log);

        assert_eq!(targets(&moved), ["/before"]);
        assert_eq!(targets(&path), ["/after"]);
    }

    #[test]
    fn a_file_that_cannot_be_reopened_is_kept() {
        let dir = tempfile::tempdir().unwrap();
        let logs = dir.path().join("logs");
        fs::create_dir(&logs).unwrap();
        let (log, _) = open(&logs.join("access.log"));
        let moved = dir.path().join("moved");
        fs::rename(&logs, &moved).unwrap();
        log.reopen();
        record(&log, "/after");
        log.close();

        assert_eq!(targets(&moved.join("access.log")), ["/after"]);
    }

    #[test]
    fn lines_that_a_full_disk_refuses_are_counted() {
        let (log, metrics) = open(Path::new("/dev/full"));
        record(&log, "/1");
        record(&log, "/2");
        log.close();

        assert_eq!(metrics.access_log().dropped_failed.get(), 2);
        assert_eq!(metrics.access_log().lines.get(), 0);
    }

    #[test]
    fn a_line_after_the_end_is_counted_as_dropped() {
        let dir = tempfile::tempdir().unwrap();
        let (log, metrics) = open(&dir.path().join("access.log"));
        log.close();
        record(&log, "/late");

        assert_eq!(metrics.access_log().dropped_full.get(), 1);
    }

    #[test]
    fn a_log_that_is_off_is_none_and_one_that_cannot_be_opened_says_why() {
        let metrics = Metrics::new(0, Vec::new());
        let at = |path: &str| Settings { path: path.to_owned(), queue: Count::UNLIMITED, ..Settings::default() };
        let open = |path| AccessLog::open(&at(path), Named::default(), metrics.access_log());
        assert!(open("off").unwrap().is_none());
        assert!(open("stderr").unwrap().is_some());

        let error = open("/no/such/dir/a.log").err().unwrap();
        assert_eq!(error.path, "observability.access_log.path");
        assert!(error.message.starts_with("`/no/such/dir/a.log` cannot be opened"), "{error}");
    }
}
