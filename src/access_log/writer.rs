//! The queue between workers and the log file, and the thread that empties it.
//!
//! The queue is one byte buffer under a lock, not a channel of lines: a worker appends with a copy, no memory is
//! allocated in one thread and freed in another, and the writer takes everything by swapping in its empty buffer.
//! After the first line it waits for more, so that a busy log wakes it a hundred times a second instead of once per
//! line; each wake-up costs the worker a system call.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::mem;
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};

use crate::metrics::AccessLogMetrics;

/// How long lines are collected before they are written.
const GATHER: Duration = Duration::from_millis(10);

/// Time limit for closing the log.
const CLOSE: Duration = Duration::from_secs(5);

/// Assumed bytes per line: the limit on lines times this limits the buffer, because lines can be long.
const LINE_BYTES: usize = 1024;

/// A buffer that grew larger in a burst is freed.
const BATCH_KEPT_BYTES: usize = 1024 * 1024;

/// The lines that wait for the writer.
pub(super) struct Queue {
    batch: Batch,
    lines_max: usize,
    bytes_max: usize,
    closing: bool,
    closed: bool,
}

/// Complete lines, ready to write.
#[derive(Default)]
struct Batch {
    bytes: Vec<u8>,
    lines: usize,
    /// The file is reopened after this many bytes.
    reopen_at: Option<usize>,
}

/// The result of queueing a line.
#[derive(Debug, PartialEq)]
enum Push {
    Queued,
    /// Queued, and the writer must be woken.
    Wake,
    Dropped,
}

impl Queue {
    /// An empty queue for at most this many lines.
    pub(super) fn new(lines_max: u64) -> Self {
        let lines_max = usize::try_from(lines_max).unwrap_or(usize::MAX).max(1);
        let bytes_max = lines_max.saturating_mul(LINE_BYTES);
        Queue { batch: Batch::default(), lines_max, bytes_max, closing: false, closed: false }
    }

    fn push(&mut self, line: &[u8]) -> Push {
        let first = self.batch.lines == 0;
        // A line longer than the whole queue is accepted if it is alone.
        let fits = first || self.batch.bytes.len().saturating_add(line.len()) <= self.bytes_max;
        if self.closing || self.batch.lines >= self.lines_max || !fits {
            return Push::Dropped;
        }
        let hurried = self.is_urgent();
        self.batch.bytes.extend_from_slice(line);
        self.batch.lines += 1;
        if first || (self.is_urgent() && !hurried) { Push::Wake } else { Push::Queued }
    }

    /// Whether there is nothing to write.
    fn is_idle(&self) -> bool {
        self.batch.lines == 0 && self.batch.reopen_at.is_none() && !self.closing
    }

    /// Whether the writer should write immediately.
    fn is_urgent(&self) -> bool {
        self.closing
            || self.batch.reopen_at.is_some()
            || self.batch.lines >= self.lines_max / 2
            || self.batch.bytes.len() >= self.bytes_max / 2
    }
}

/// The queue and its waiters.
pub(super) struct Shared {
    queue: Mutex<Queue>,
    /// There is something to write.
    work: Condvar,
    /// The writer has ended.
    end: Condvar,
}

impl Shared {
    pub(super) fn new(queue: Queue) -> Self {
        Shared { queue: Mutex::new(queue), work: Condvar::new(), end: Condvar::new() }
    }

    /// Queues a line; `false`: it was dropped.
    pub(super) fn push(&self, line: &[u8]) -> bool {
        let pushed = self.lock().push(line);
        if pushed == Push::Wake {
            self.work.notify_one();
        }
        pushed != Push::Dropped
    }

    /// Reopens the file between the lines pushed before and after this call.
    pub(super) fn reopen(&self) {
        let mut queue = self.lock();
        let here = queue.batch.bytes.len();
        // The first of several in a batch is enough: the path then means the newest file for all.
        queue.batch.reopen_at.get_or_insert(here);
        drop(queue);
        self.work.notify_one();
    }

    /// Accepts no more lines and waits until all are written; `false` on timeout. Only the first call waits.
    pub(super) fn close(&self) -> bool {
        let mut queue = self.lock();
        if mem::replace(&mut queue.closing, true) {
            return true;
        }
        self.work.notify_one();
        let waited = self.end.wait_timeout_while(queue, CLOSE, |queue| !queue.closed);
        waited.unwrap_or_else(PoisonError::into_inner).0.closed
    }

    /// Waits for lines and moves them to `batch`, which is empty; `false`: these are the last.
    fn take(&self, batch: &mut Batch) -> bool {
        let queue = self.lock();
        let queue = self.work.wait_while(queue, |queue| queue.is_idle()).unwrap_or_else(PoisonError::into_inner);
        let gathered = self.work.wait_timeout_while(queue, GATHER, |queue| !queue.is_urgent());
        let mut queue = gathered.unwrap_or_else(PoisonError::into_inner).0;
        mem::swap(&mut queue.batch, batch);
        !queue.closing
    }

    fn end(&self) {
        self.lock().closed = true;
        self.end.notify_all();
    }

    /// The queue is consistent after every step, so a panic elsewhere does not corrupt it.
    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Starts the thread `access-log`, which ends when the queue is closed.
pub(super) fn start(shared: Arc<Shared>, sink: Sink, metrics: AccessLogMetrics) -> io::Result<()> {
    let mut writer = Writer { sink, metrics, failing: false };
    let run = move || {
        let mut batch = Batch::default();
        while shared.take(&mut batch) {
            writer.write(&batch);
            batch.clear();
        }
        writer.write(&batch);
        shared.end();
    };
    std::thread::Builder::new().name("access-log".to_owned()).spawn(run).map(drop)
}

impl Batch {
    fn clear(&mut self) {
        self.bytes.clear();
        self.bytes.shrink_to(BATCH_KEPT_BYTES);
        self.lines = 0;
        self.reopen_at = None;
    }
}

/// The state of the thread.
struct Writer {
    sink: Sink,
    metrics: AccessLogMetrics,
    /// Whether the last write failed; only the first failure and the first success are logged.
    failing: bool,
}

impl Writer {
    fn write(&mut self, batch: &Batch) {
        let (before, after) = batch.bytes.split_at(batch.reopen_at.unwrap_or(0));
        self.write_lines(before);
        if batch.reopen_at.is_some()
            && let Err(error) = self.sink.reopen()
        {
            tracing::error!("the access log could not be reopened, the old file is kept: {error}");
        }
        self.write_lines(after);
    }

    fn write_lines(&mut self, lines: &[u8]) {
        if lines.is_empty() {
            return;
        }
        let (written, result) = self.sink.write(lines);
        self.metrics.lines.inc_by(count(&lines[..written]));
        // Includes a partially written line.
        self.metrics.dropped_failed.inc_by(count(&lines[written..]));
        match &result {
            Err(error) if !self.failing => tracing::error!("the access log cannot be written, lines are lost: {error}"),
            Ok(()) if self.failing => tracing::info!("the access log can be written again"),
            _ => {}
        }
        self.failing = result.is_err();
    }
}

fn count(lines: &[u8]) -> u64 {
    lines.iter().filter(|&&byte| byte == b'\n').count() as u64
}

/// The output.
pub(super) struct Sink {
    file: File,
    /// The file's name; `None` for standard streams, which cannot be reopened.
    path: Option<PathBuf>,
    /// Whether the last line was written only in part.
    torn: bool,
}

impl Sink {
    /// Opens `stdout`, `stderr` or a file.
    pub(super) fn open(path: &str) -> io::Result<Self> {
        let (file, path) = match path {
            // Uses its own descriptor, without the locks and buffers of the standard library.
            "stdout" => (io::stdout().as_fd().try_clone_to_owned()?.into(), None),
            "stderr" => (io::stderr().as_fd().try_clone_to_owned()?.into(), None),
            path => (append(Path::new(path))?, Some(path.into())),
        };
        Ok(Sink { file, path, torn: false })
    }

    /// Reopens the file by name; on an error, keeps the old one.
    fn reopen(&mut self) -> io::Result<()> {
        if let Some(path) = &self.path {
            self.file = append(path)?;
            self.torn = false;
        }
        Ok(())
    }

    /// Writes complete lines; returns how many bytes were written.
    fn write(&mut self, lines: &[u8]) -> (usize, io::Result<()>) {
        if self.torn {
            // The rest of the partial line is lost; the next line must not be appended to it.
            if let Err(error) = self.file.write_all(b"\n") {
                return (0, Err(error));
            }
            self.torn = false;
        }
        let mut written = 0;
        while written < lines.len() {
            match self.file.write(&lines[written..]) {
                Ok(0) => return (written, Err(io::ErrorKind::WriteZero.into())),
                Ok(bytes) => written += bytes,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return (written, Err(error)),
            }
            self.torn = lines[written - 1] != b'\n';
        }
        (written, Ok(()))
    }
}

/// Opens a file for appending. A named pipe without a reader is an error, because opening it would block.
fn append(path: &Path) -> io::Result<File> {
    let nonblocking = libc::O_NONBLOCK;
    let file = OpenOptions::new().append(true).create(true).mode(0o640).custom_flags(nonblocking).open(path)?;
    let flags = fcntl_getfl(&file)?;
    fcntl_setfl(&file, flags.difference(OFlags::NONBLOCK))?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_queue_drops_and_an_emptied_one_takes_again() {
        let mut queue = Queue::new(2);
        assert_eq!(queue.push(b"a\n"), Push::Wake);
        assert_eq!(queue.push(b"b\n"), Push::Queued);
        assert_eq!(queue.push(b"c\n"), Push::Dropped);
        assert_eq!(mem::take(&mut queue.batch).bytes, b"a\nb\n");
        assert_eq!(queue.push(b"d\n"), Push::Wake);
    }

    #[test]
    fn a_named_pipe_is_written_to_if_somebody_reads_it_and_not_waited_for_if_nobody_does() {
        use rustix::fs::{CWD, FileType, Mode, mknodat};

        let dir = tempfile::tempdir().unwrap();
        let pipe = dir.path().join("pipe");
        mknodat(CWD, &pipe, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
        assert_eq!(append(&pipe).unwrap_err().raw_os_error(), Some(libc::ENXIO));
        let reader = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(&pipe).unwrap();
        let mut log = append(&pipe).unwrap();
        log.write_all(b"a line\n").unwrap();
        assert!(
            !fcntl_getfl(&log).unwrap().contains(OFlags::NONBLOCK),
            "a full pipe is waited for, by the log's thread"
        );
        let mut read = String::new();
        drop(log);
        io::Read::read_to_string(&mut &reader, &mut read).unwrap();
        assert_eq!(read, "a line\n");
    }

    #[test]
    fn long_lines_fill_the_queue_before_many_do_but_one_always_passes() {
        let mut queue = Queue::new(2);
        let line = vec![b'x'; 3 * LINE_BYTES];
        assert_eq!(queue.push(&line), Push::Wake);
        assert_eq!(queue.push(b"short\n"), Push::Dropped);
    }

    #[test]
    fn the_writer_is_woken_by_the_first_line_and_when_the_queue_is_half_full() {
        let mut queue = Queue::new(8);
        let pushes: Vec<Push> = (0..6).map(|_| queue.push(b"x\n")).collect();
        let expected = [Push::Wake, Push::Queued, Push::Queued, Push::Wake, Push::Queued, Push::Queued];
        assert_eq!(pushes, expected);
    }

    #[test]
    fn a_torn_line_is_not_joined_to_the_next() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("access.log");
        let mut sink = Sink::open(path.to_str().unwrap()).unwrap();
        sink.write(b"half a li").1.unwrap();
        sink.write(b"whole\n").1.unwrap();

        assert_eq!(std::fs::read(path).unwrap(), b"half a li\nwhole\n");
    }
}
