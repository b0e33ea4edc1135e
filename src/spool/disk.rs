//! The disk threads: they write the files of spools and read them back, so that no worker waits for the disk.
//!
//! Without work stealing, each worker has its own blocking pool, so `spawn_blocking` would create one pool per worker,
//! without control over its priority. These are a few threads of our own, with a lower priority than the workers and
//! one shared queue. [`Permit`]s limit the queue: a task without a permit awaits one, and no worker ever blocks.
//!
//! Files have no name: they vanish when they are closed, even after a crash. Closing one returns its pages and blocks
//! to the kernel, which takes long enough to be done here, too.

use std::fs::{File, OpenOptions};
use std::io::{self, IoSlice};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use rustix::buffer::spare_capacity;
use rustix::fs::OFlags;
use rustix::io::Errno;
use rustix::process::setpriority_process;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};

use crate::metrics::{OperationMetrics, SpoolMetrics};
use crate::spool::budget::Reservation;
use crate::spool::jobs::{self, Receiver, Sender};

/// Maximum number of bytes per system call. Most kernels do not interrupt a call for a worker on the same CPU, and
/// writing 256 KiB takes a millisecond on slow memory.
const CALL_BYTES: usize = 64 << 10;
/// Maximum number of pieces per system call (`IOV_MAX`).
const PIECES_MAX: usize = 1024;

/// The disk threads and their queue. Clones share both; the threads end when the last clone is dropped and the queue is
/// empty.
#[derive(Clone)]
pub struct Disk {
    queue: Sender<Job>,
    slots: Arc<Semaphore>,
    backlog: Backlog,
    metrics: SpoolMetrics,
}

/// The settings of the disk threads.
#[derive(Clone, Copy, Debug)]
pub struct Terms {
    /// Number of threads; at least one.
    pub threads: usize,
    /// Maximum number of queued jobs.
    pub queue: usize,
    /// The threads' niceness, from 0 to 19 (setpriority(2)).
    pub nice: i32,
}

/// Number of jobs per thread that keep it busy for some milliseconds.
const DEEP_PER_THREAD: usize = 8;

/// The backlog of the disk threads. Clones share it.
#[derive(Clone)]
pub struct Backlog {
    slots: Arc<Semaphore>,
    /// The backlog is deep if fewer slots are free.
    least: usize,
}

impl Backlog {
    /// The backlog of a queue with these free slots and this number of threads.
    pub fn new(slots: &Arc<Semaphore>, threads: usize) -> Self {
        let deep = threads.saturating_mul(DEEP_PER_THREAD);
        let least = (slots.available_permits() + 1).saturating_sub(deep).max(1);
        Backlog { slots: slots.clone(), least }
    }

    /// Whether further jobs would only wait.
    pub fn is_deep(&self) -> bool {
        self.slots.available_permits() < self.least
    }
}

/// The permit to queue one job; returned when the job is done.
pub struct Permit(#[expect(dead_code, reason = "it is held")] OwnedSemaphorePermit);

/// The result of a write: the file, which may be new, or the unwritten pieces and the error.
pub(super) type Written = Result<Arc<File>, Unwritten>;

/// A failed write. Some bytes may have reached the file.
pub(super) struct Unwritten {
    pub pieces: Vec<Bytes>,
    pub held: Reservation,
    pub error: io::Error,
}

/// The bytes read, and their share of the budget.
pub(super) type Read = io::Result<(Bytes, Reservation)>;

impl Disk {
    /// Starts the threads for files in `dir`.
    ///
    /// # Errors
    ///
    /// If a file cannot be created or written there, or a thread cannot be started.
    pub fn open(dir: &Path, terms: Terms, metrics: &SpoolMetrics) -> io::Result<Disk> {
        Disk::probe(dir)?;
        Disk::start(Arc::new(Directory(dir.to_owned())), terms, metrics)
    }

    /// Creates a file in `dir`, writes to it and removes it.
    ///
    /// # Errors
    ///
    /// If one of the steps fails.
    pub fn probe(dir: &Path) -> io::Result<()> {
        create_unlinked(dir)?.write_all_at(b"forebay", 0)
    }

    /// Starts the threads on these files.
    pub(super) fn start(files: Arc<dyn Files>, terms: Terms, metrics: &SpoolMetrics) -> io::Result<Disk> {
        let Terms { threads, queue, nice } = terms;
        let (sender, receiver) = jobs::queue();
        let threads = threads.max(1);
        for number in 0..threads {
            let (files, receiver, metrics) = (files.clone(), receiver.clone(), metrics.clone());
            let work = move || Worker { files, metrics }.run(&receiver, nice);
            std::thread::Builder::new().name(format!("disk-{number}")).spawn(work)?;
        }
        let slots = Arc::new(Semaphore::new(queue.clamp(1, Semaphore::MAX_PERMITS)));
        let backlog = Backlog::new(&slots, threads);
        Ok(Disk { queue: sender, slots, backlog, metrics: metrics.clone() })
    }

    /// The backlog.
    pub fn backlog(&self) -> Backlog {
        self.backlog.clone()
    }

    /// Takes a permit if one is free now.
    pub fn try_permit(&self) -> Option<Permit> {
        self.slots.clone().try_acquire_owned().ok().map(Permit)
    }

    /// Waits for a permit. Waiters are served in order.
    pub fn permit(&self) -> impl Future<Output = Permit> + Send + 'static {
        let slots = self.slots.clone();
        async move { Permit(slots.acquire_owned().await.expect("this semaphore is never closed")) }
    }

    /// Writes the pieces in order at `offset` of the file, or of a new one. `held` is their share of the budget: it is
    /// released after the write, or returned with an error.
    pub(super) fn write(
        &self,
        permit: Permit,
        file: Option<Arc<File>>,
        offset: u64,
        pieces: Vec<Bytes>,
        held: Reservation,
    ) -> oneshot::Receiver<Written> {
        let (answer, written) = oneshot::channel();
        self.submit(permit, Work::Write { file, offset, pieces, held, answer });
        written
    }

    /// Reads exactly `bytes` from `offset` on; `held` is their share of the budget.
    pub(super) fn read(
        &self,
        permit: Permit,
        file: Arc<File>,
        offset: u64,
        bytes: usize,
        held: Reservation,
    ) -> oneshot::Receiver<Read> {
        let (answer, read) = oneshot::channel();
        // The worker allocates the buffer and will free it, which suits allocators.
        let buffer = Vec::with_capacity(bytes);
        self.submit(permit, Work::Read { file, offset, bytes, buffer, held, answer });
        read
    }

    /// Closes a file, possibly the last handle, and then releases its reservation. It needs no permit: the number of
    /// files limits these jobs.
    pub(super) fn close(&self, file: Arc<File>, held: Reservation) {
        self.queue(Job { work: Work::Close { file, held }, since: None, permit: None });
    }

    fn submit(&self, permit: Permit, work: Work) {
        self.metrics.disk_queue.inc();
        self.queue(Job { work, since: Some(Instant::now()), permit: Some(permit) });
    }

    fn queue(&self, job: Job) {
        // If the threads have ended, the job is dropped, and its waiter receives an error.
        self.queue.send(job);
    }
}

struct Job {
    work: Work,
    since: Option<Instant>,
    permit: Option<Permit>,
}

enum Work {
    Write {
        file: Option<Arc<File>>,
        offset: u64,
        pieces: Vec<Bytes>,
        held: Reservation,
        answer: oneshot::Sender<Written>,
    },
    Read {
        file: Arc<File>,
        offset: u64,
        bytes: usize,
        buffer: Vec<u8>,
        held: Reservation,
        answer: oneshot::Sender<Read>,
    },
    Close {
        file: Arc<File>,
        held: Reservation,
    },
}

/// The state of one thread.
struct Worker {
    files: Arc<dyn Files>,
    metrics: SpoolMetrics,
}

impl Worker {
    fn run(&self, queue: &Receiver<Job>, nice: i32) {
        // On Linux "the calling process" is the calling thread here.
        if let Err(error) = setpriority_process(None, nice) {
            tracing::warn!("a disk thread has the same priority as the workers: {error}");
        }
        while let Some(job) = queue.next() {
            self.work(job);
        }
    }

    /// Runs one job. Releases its reservation and its permit before it sends the result.
    fn work(&self, Job { work, since, permit }: Job) {
        let done = |operation: &OperationMetrics, failed: bool| {
            self.metrics.disk_queue.dec();
            if let Some(since) = since {
                operation.seconds.observe(since.elapsed().as_secs_f64());
            }
            if failed {
                operation.failures.inc();
            }
        };
        match work {
            Work::Write { file, offset, pieces, held, answer } => {
                if answer.is_closed() {
                    self.metrics.disk_queue.dec();
                    return;
                }
                let written = self.write(file, offset, &pieces);
                done(&self.metrics.write, written.is_err());
                let written = match written {
                    Ok(file) => {
                        drop((pieces, held));
                        Ok(file)
                    }
                    Err(error) => Err(Unwritten { pieces, held, error }),
                };
                drop(permit);
                // If the waiter is gone, the file is closed here.
                let _ = answer.send(written);
            }
            Work::Read { file, offset, bytes, buffer, held, answer } => {
                if answer.is_closed() {
                    self.metrics.disk_queue.dec();
                    return;
                }
                let read = self.read(&file, offset, bytes, buffer);
                done(&self.metrics.read, read.is_err());
                drop((permit, file));
                let _ = answer.send(read.map(|bytes| (bytes, held)));
            }
            Work::Close { file, held } => drop((file, held)),
        }
    }

    fn write(&self, file: Option<Arc<File>>, mut offset: u64, pieces: &[Bytes]) -> io::Result<Arc<File>> {
        let file = match file {
            Some(file) => file,
            None => Arc::new(self.files.create()?),
        };
        let mut slices: Vec<_> = pieces.iter().flat_map(|piece| piece.chunks(CALL_BYTES)).map(IoSlice::new).collect();
        let mut left = &mut slices[..];
        // An empty first slice would look like a file that accepts no bytes.
        IoSlice::advance_slices(&mut left, 0);
        while !left.is_empty() {
            let mut room = CALL_BYTES;
            let fit = |piece: &&IoSlice<'_>| room.checked_sub(piece.len()).map(|less| room = less).is_some();
            let some = left.iter().take(PIECES_MAX).take_while(fit).count();
            match self.files.write(&file, &left[..some], offset) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(written) => {
                    offset += written as u64;
                    IoSlice::advance_slices(&mut left, written);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(file)
    }

    /// Fills `buffer`, which has the capacity for `bytes`.
    fn read(&self, file: &File, mut offset: u64, bytes: usize, mut buffer: Vec<u8>) -> io::Result<Bytes> {
        while buffer.len() < bytes {
            match self.files.read(file, &mut buffer, offset) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(read) => offset += read as u64,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        // A vector's capacity may exceed the requested one.
        buffer.truncate(bytes);
        Ok(buffer.into())
    }
}

/// The system calls, one method each, so that tests can simulate a slow, full or failing disk.
pub(super) trait Files: Send + Sync {
    /// Creates a file without a name.
    fn create(&self) -> io::Result<File>;
    /// Writes some of the pieces at `offset`.
    fn write(&self, file: &File, pieces: &[IoSlice<'_>], offset: u64) -> io::Result<usize>;
    /// Appends some bytes from `offset` on to the buffer, at most its free capacity.
    fn read(&self, file: &File, buffer: &mut Vec<u8>, offset: u64) -> io::Result<usize>;
}

/// Real files in this folder.
pub(super) struct Directory(pub PathBuf);

impl Files for Directory {
    fn create(&self) -> io::Result<File> {
        create_unlinked(&self.0)
    }

    fn write(&self, file: &File, pieces: &[IoSlice<'_>], offset: u64) -> io::Result<usize> {
        Ok(rustix::io::pwritev(file, pieces, offset)?)
    }

    fn read(&self, file: &File, buffer: &mut Vec<u8>, offset: u64) -> io::Result<usize> {
        Ok(rustix::io::pread(file, spare_capacity(buffer), offset)?)
    }
}

/// Creates a file that other processes cannot open and that vanishes when it is closed.
fn create_unlinked(dir: &Path) -> io::Result<File> {
    let flags = (OFlags::TMPFILE | OFlags::EXCL).bits();
    // `tempfile_in` would leave the mode of such a file to the umask.
    let made = OpenOptions::new().read(true).write(true).mode(0o600).custom_flags(flags.cast_signed()).open(dir);
    made.or_else(|error| match Errno::from_io_error(&error) {
        // The file system or the kernel does not support files without a name, or the folder is missing.
        Some(Errno::OPNOTSUPP | Errno::ISDIR | Errno::NOENT) => create_named(dir),
        _ => Err(error),
    })
}

/// Fallback that creates a file with a name and removes the name at once.
fn create_named(dir: &Path) -> io::Result<File> {
    tempfile::Builder::new().prefix("forebay-").tempfile_in(dir).map(|file| file.into_file())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;
    use std::sync::{Mutex, mpsc};
    use std::task::{Context, Waker};

    use super::*;
    use crate::metrics::{Direction, Metrics};
    use crate::spool::budget::{Budget, Resources};
    use crate::spool::faults::{Faults, PATIENCE};

    fn budget(metrics: &SpoolMetrics) -> Arc<Budget> {
        let resources = Resources {
            memory: 1 << 30,
            disk: 1 << 30,
            files: 1 << 20,
            answers: 1.0,
            client: 1.0,
            spill: true,
            pause: true,
            shed: true,
            pause_max: PATIENCE,
        };
        Budget::new(resources, metrics.clone())
    }

    struct Stage {
        disk: Disk,
        faults: Faults,
        budget: Arc<Budget>,
        metrics: SpoolMetrics,
    }

    fn stage(threads: usize, queue: usize) -> Stage {
        let metrics = Metrics::new(u64::MAX, Vec::new()).spools();
        let (faults, files) = Faults::new();
        let disk = Disk::start(files, Terms { threads, queue, nice: 10 }, &metrics).unwrap();
        Stage { disk, faults, budget: budget(&metrics), metrics }
    }

    impl Stage {
        fn share(&self, bytes: u64) -> Reservation {
            let mut reservation = Reservation::new(&self.budget, Direction::Request, None);
            reservation.grow_memory(bytes);
            reservation
        }

        fn write(&self, file: Option<Arc<File>>, offset: u64, pieces: &[&'static [u8]]) -> oneshot::Receiver<Written> {
            let pieces: Vec<Bytes> = pieces.iter().map(|piece| Bytes::from_static(piece)).collect();
            let held = self.share(pieces.iter().map(|piece| piece.len() as u64).sum());
            self.disk.write(self.disk.try_permit().unwrap(), file, offset, pieces, held)
        }

        fn read(&self, file: Arc<File>, offset: u64, bytes: usize) -> Read {
            let held = self.share(bytes as u64);
            self.disk.read(self.disk.try_permit().unwrap(), file, offset, bytes, held).blocking_recv().unwrap()
        }
    }

    fn text(read: Read) -> String {
        String::from_utf8(read.unwrap().0.to_vec()).unwrap()
    }

    #[test]
    fn a_file_has_no_name_and_is_for_nobody_else() {
        let dir = tempfile::tempdir().unwrap();
        for made in [create_unlinked(dir.path()), create_named(dir.path())] {
            let file = made.unwrap();
            let fd = std::os::fd::AsRawFd::as_raw_fd(&file);
            let link = std::fs::read_link(format!("/proc/self/fd/{fd}")).unwrap();
            assert!(link.to_string_lossy().ends_with(" (deleted)"), "{link:?}");
            let metadata = std::fs::metadata(format!("/proc/self/fd/{fd}")).unwrap();
            assert_eq!((metadata.mode() & 0o7777, metadata.nlink()), (0o600, 0));
            assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
        }
    }

    #[test]
    fn a_folder_that_is_none_is_found_out_at_once() {
        let dir = tempfile::tempdir().unwrap();
        let metrics = Metrics::new(u64::MAX, Vec::new()).spools();
        assert!(Disk::probe(dir.path()).is_ok());
        let missing = dir.path().join("missing");
        assert_eq!(
            Disk::open(&missing, Terms { threads: 1, queue: 1, nice: 10 }, &metrics).err().unwrap().kind(),
            io::ErrorKind::NotFound
        );
        let file = dir.path().join("file");
        std::fs::write(&file, "").unwrap();
        assert_eq!(Disk::probe(&file).unwrap_err().kind(), io::ErrorKind::NotADirectory);
    }

    /// The niceness and the name of the calling thread.
    fn nice_and_name() -> (i32, String) {
        let stat = std::fs::read_to_string("/proc/thread-self/stat").unwrap();
        let (before, after) = stat.rsplit_once(") ").unwrap();
        // It is the 19th field; the first field after the name is the third.
        let nice = after.split(' ').nth(16).unwrap().parse().unwrap();
        (nice, before.split_once('(').unwrap().1.to_owned())
    }

    #[test]
    fn the_threads_are_as_nice_as_they_are_told_to_be() {
        struct Asking(Mutex<mpsc::Sender<(i32, String)>>);
        impl Files for Asking {
            fn create(&self) -> io::Result<File> {
                self.0.lock().unwrap().send(nice_and_name()).unwrap();
                Err(io::ErrorKind::Other.into())
            }
            fn write(&self, _: &File, _: &[IoSlice<'_>], _: u64) -> io::Result<usize> {
                unreachable!("there is no file")
            }
            fn read(&self, _: &File, _: &mut Vec<u8>, _: u64) -> io::Result<usize> {
                unreachable!("there is no file")
            }
        }
        let metrics = Metrics::new(u64::MAX, Vec::new()).spools();
        let (sender, answers) = mpsc::channel();
        let disk = Disk::start(Arc::new(Asking(Mutex::new(sender))), Terms { threads: 1, queue: 1, nice: 7 }, &metrics)
            .unwrap();
        let held = Reservation::new(&budget(&metrics), Direction::Request, None);
        let _written = disk.write(disk.try_permit().unwrap(), None, 0, vec![Bytes::from_static(b"x")], held);

        assert_eq!(answers.recv_timeout(PATIENCE).unwrap(), (7, "disk-0".to_owned()));
    }

    #[test]
    fn pieces_are_written_whole_and_read_back_however_little_a_call_takes() {
        let stage = stage(1, 8);
        stage.faults.take_at_most(3);
        stage.faults.then_write(Some(io::ErrorKind::Interrupted));
        stage.faults.then_read(Some(io::ErrorKind::Interrupted));
        let file = stage.write(None, 0, &[b"one two", b" ", b"three"]).blocking_recv().unwrap().ok().unwrap();
        let file = stage.write(Some(file), 4, &[b"2wo"]).blocking_recv().unwrap().ok().unwrap();
        assert_eq!(text(stage.read(file.clone(), 0, 13)), "one 2wo three");
        assert_eq!(text(stage.read(file, 8, 5)), "three");
        assert_eq!(stage.budget.memory(), 0);
        assert_eq!(stage.metrics.write.seconds.get_sample_count(), 2);
        assert_eq!(stage.metrics.read.seconds.get_sample_count(), 2);
        assert_eq!(stage.metrics.disk_queue.get(), 0);
    }

    #[test]
    fn more_pieces_than_a_call_can_take_are_written() {
        let stage = stage(1, 8);
        let file = stage.write(None, 0, &[&b"ab"[..]; 3 * PIECES_MAX / 2]).blocking_recv().unwrap().ok().unwrap();
        assert_eq!(text(stage.read(file, 0, 3 * PIECES_MAX)), "ab".repeat(3 * PIECES_MAX / 2));
    }

    #[test]
    fn a_failure_is_an_answer_that_brings_everything_back() {
        let stage = stage(1, 8);
        stage.faults.then_write(Some(io::ErrorKind::StorageFull));
        let Err(unwritten) = stage.write(None, 0, &[b"a", b"b"]).blocking_recv().unwrap() else { panic!("it failed") };
        assert_eq!(
            (unwritten.error.kind(), &unwritten.pieces[..]),
            (io::ErrorKind::StorageFull, &["a", "b"].map(Bytes::from)[..])
        );
        assert_eq!(stage.budget.memory(), 2);
        drop(unwritten);
        assert_eq!(stage.budget.memory(), 0);

        let file = stage.write(None, 0, &[b"ab"]).blocking_recv().unwrap().ok().unwrap();
        let read = stage.read(file, 1, 2);
        assert_eq!(read.err().unwrap().kind(), io::ErrorKind::UnexpectedEof);
        assert_eq!((stage.metrics.write.failures.get(), stage.metrics.read.failures.get()), (1, 1));
        assert_eq!(stage.budget.memory(), 0);
    }

    #[tokio::test]
    async fn a_full_queue_makes_a_future_wait_and_no_thread() {
        let stage = stage(2, 3);
        stage.faults.hold();
        let writes: Vec<_> = (0..3).map(|_| stage.write(None, 0, &[b"x"])).collect();
        stage.faults.wait_for_held(2);
        assert_eq!(stage.metrics.disk_queue.get(), 3);
        assert!(stage.disk.try_permit().is_none());
        let mut permit = std::pin::pin!(stage.disk.permit());
        assert!(permit.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_pending());

        stage.faults.release();
        tokio::time::timeout(PATIENCE, permit).await.unwrap();
        for write in writes {
            assert!(write.await.unwrap().is_ok());
        }
        assert_eq!(stage.metrics.disk_queue.get(), 0);
    }

    #[test]
    fn what_nobody_waits_for_any_more_is_not_written_and_all_of_it_ends() {
        let stage = stage(1, 8);
        stage.faults.hold();
        let first = stage.write(None, 0, &[b"first"]);
        stage.faults.wait_for_held(1);
        drop((first, stage.write(None, 0, &[b"second"])));
        assert_eq!(stage.budget.memory(), 11);
        stage.faults.release();
        let Stage { disk, faults, budget, metrics } = stage;
        drop(disk);
        faults.wait_for_end();
        assert_eq!((budget.memory(), metrics.disk_queue.get(), faults.calls(), faults.open()), (0, 0, 1, 0));
    }
}
