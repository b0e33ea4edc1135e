//! A simulated disk for tests: it can be held, accept a few bytes at a time, fill up and fail.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, IoSlice};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::Duration;

use super::disk::{Directory, Files};

/// Maximum wait of a test for an expected event.
pub const PATIENCE: Duration = Duration::from_secs(20);

#[derive(Default)]
struct Mood {
    held: bool,
    /// Number of held operations.
    waiting: usize,
    /// The errors of the next operations; `None`: success.
    writes: VecDeque<Option<io::ErrorKind>>,
    reads: VecDeque<Option<io::ErrorKind>>,
    /// Maximum number of bytes per call.
    short: Option<usize>,
    calls: usize,
}

/// The controls of the disk.
pub struct Faults {
    dir: tempfile::TempDir,
    mood: Arc<(Mutex<Mood>, Condvar)>,
    ended: Mutex<Receiver<()>>,
}

struct Moody {
    files: Directory,
    mood: Arc<(Mutex<Mood>, Condvar)>,
    ended: Sender<()>,
}

impl Faults {
    /// A working disk, and its controls.
    pub fn new() -> (Self, Arc<dyn Files>) {
        let dir = tempfile::tempdir().unwrap();
        let mood = Arc::default();
        let (ended, end) = channel();
        let files = Arc::new(Moody { files: Directory(dir.path().to_owned()), mood: Arc::clone(&mood), ended });
        (Faults { dir, mood, ended: Mutex::new(end) }, files)
    }

    fn mood(&self) -> MutexGuard<'_, Mood> {
        self.mood.0.lock().unwrap()
    }

    /// Holds all further operations.
    pub fn hold(&self) {
        self.mood().held = true;
    }

    /// Releases them.
    pub fn release(&self) {
        self.mood().held = false;
        self.mood.1.notify_all();
    }

    /// Waits until this number of operations is held.
    pub fn wait_for_held(&self, operations: usize) {
        let (mood, changed) = &*self.mood;
        let waiting = changed.wait_timeout_while(mood.lock().unwrap(), PATIENCE, |mood| mood.waiting < operations);
        assert!(!waiting.unwrap().1.timed_out(), "no {operations} operations came");
    }

    /// Sets the result of the next write without one.
    pub fn then_write(&self, outcome: Option<io::ErrorKind>) {
        self.mood().writes.push_back(outcome);
    }

    /// Sets the result of the next read without one.
    pub fn then_read(&self, outcome: Option<io::ErrorKind>) {
        self.mood().reads.push_back(outcome);
    }

    /// Limits each call to this number of bytes.
    pub fn take_at_most(&self, bytes: usize) {
        self.mood().short = Some(bytes);
    }

    /// Number of reads and writes started.
    pub fn calls(&self) -> usize {
        self.mood().calls
    }

    /// Number of its files that are open in this process.
    pub fn open(&self) -> usize {
        let links = std::fs::read_dir("/proc/self/fd").unwrap();
        let targets = links.filter_map(|link| std::fs::read_link(link.unwrap().path()).ok());
        targets.filter(|target| target.starts_with(self.dir.path())).count()
    }

    /// Waits until the threads have ended, after the last handle was dropped.
    pub fn wait_for_end(&self) {
        self.ended.lock().unwrap().recv_timeout(PATIENCE).expect("the threads should have ended");
    }
}

impl Moody {
    fn pass(&self, outcomes: impl Fn(&mut Mood) -> &mut VecDeque<Option<io::ErrorKind>>) -> io::Result<usize> {
        let (mood, changed) = &*self.mood;
        let mut mood = mood.lock().unwrap();
        mood.calls += 1;
        mood.waiting += 1;
        changed.notify_all();
        mood = changed.wait_while(mood, |mood| mood.held).unwrap();
        mood.waiting -= 1;
        match outcomes(&mut mood).pop_front().flatten() {
            Some(kind) => Err(kind.into()),
            None => Ok(mood.short.unwrap_or(usize::MAX)),
        }
    }
}

impl Files for Moody {
    fn create(&self) -> io::Result<File> {
        self.files.create()
    }

    fn write(&self, file: &File, pieces: &[IoSlice<'_>], offset: u64) -> io::Result<usize> {
        let most = self.pass(|mood| &mut mood.writes)?;
        if most < pieces[0].len() {
            return self.files.write(file, &[IoSlice::new(&pieces[0][..most])], offset);
        }
        self.files.write(file, pieces, offset)
    }

    fn read(&self, file: &File, buffer: &mut Vec<u8>, offset: u64) -> io::Result<usize> {
        let most = self.pass(|mood| &mut mood.reads)?;
        let mut some = Vec::with_capacity(most.min(buffer.capacity() - buffer.len()));
        let read = self.files.read(file, &mut some, offset)?;
        buffer.extend_from_slice(&some);
        Ok(read)
    }
}

impl Drop for Moody {
    fn drop(&mut self) {
        let _ = self.ended.send(());
    }
}
