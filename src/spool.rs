//! Buffers bytes for a slow side: one queue, in memory up to a limit and in a file beyond it.
//!
//! The session pushes what one side of an exchange sends and pops what the other accepts, for requests and responses.
//! In order, the bytes are in the head (memory), the file, and the tail (memory, until there is enough for an efficient
//! write). No call blocks: the results of the disk threads ([`disk`]) are polled, and the [`Budget`] grants shared
//! resources. A spool within its memory limit is a queue of pieces without copies.

pub mod budget;
pub mod disk;
#[cfg(test)]
mod faults;
mod jobs;
mod pieces;

use std::fs::File;
use std::io;
use std::ops::Range;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::Bytes;
use tokio::sync::oneshot;

use crate::account::shares::Denial;
use crate::account::{Account, Accounts};
use crate::config::server::Resources;
use crate::config::units::Size;
use crate::metrics::{Direction, RouteMetrics};
use crate::slow_client::SlowClients;
use budget::{Budget, Reservation, Wait};
use disk::{Disk, Permit, Read, Unwritten, Written};
use pieces::Pieces;

/// Write size, in bytes.
const CHUNK_BYTES: u64 = 256 * 1024;

/// Minimum write size when no more bytes arrive for now.
const SMALL_CHUNK_BYTES: u64 = 32 * 1024;

/// The resources that spools share.
pub struct Spools {
    /// The disk threads.
    pub disk: Disk,
    /// The limits of all spools.
    pub budget: Arc<Budget>,
    /// The list of slow clients.
    pub slow: SlowClients,
    /// The accounts of clients.
    pub accounts: Arc<Accounts>,
    chunk: u64,
    small_chunk: u64,
}

impl Spools {
    /// Creates the shared resources.
    pub fn new(disk: Disk, budget: Arc<Budget>, accounts: Arc<Accounts>) -> Self {
        let (chunk, small_chunk) = (CHUNK_BYTES, SMALL_CHUNK_BYTES);
        Spools { disk, budget, slow: SlowClients::default(), accounts, chunk, small_chunk }
    }
}

/// The limits of one spool, in bytes.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// In memory. A gathering chunk, a chunk being written and bytes just read back are additional.
    pub memory: u64,
    /// In its file; 0: no file.
    pub disk: u64,
}

impl Limits {
    /// Builds the limits from the configuration. The default may exceed the limit of all spools.
    pub fn build(memory: Size, disk: Size, resources: &Resources) -> Limits {
        Limits { memory: memory.0.min(resources.memory.0), disk: disk.0.min(resources.disk.0) }
    }
}

/// Whether another piece of at most 64 KiB may be pushed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Room {
    /// It may.
    Free,
    /// Not before the disk threads have finished; the task is woken then.
    Disk,
    /// Not before memory is released; the task is woken then. Without step pause it is not woken, and should not wait.
    Pressure,
    /// Not before bytes are popped: the spool's memory and disk are used up, or the disk of all spools.
    Full,
}

/// The reason why a spool cannot use its file.
#[derive(Debug, thiserror::Error)]
pub enum SpoolError {
    /// The file system is full, or a limit is reached.
    #[error("no space is left for spooled bodies: {0}")]
    Full(#[source] io::Error),
    /// The file could not be written or read.
    #[error("a spooled body could not be written or read: {0}")]
    Failed(#[source] io::Error),
}

impl From<io::Error> for SpoolError {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => SpoolError::Full(error),
            // No file descriptor is left.
            _ if matches!(error.raw_os_error(), Some(libc::EMFILE | libc::ENFILE)) => SpoolError::Full(error),
            _ => SpoolError::Failed(error),
        }
    }
}

/// The bytes of one direction of one exchange that one side has sent and the other has not accepted yet.
///
/// Dropping it at any time releases everything; resources in use by the disk threads follow when they have finished.
pub struct Spool {
    spools: Arc<Spools>,
    limits: Limits,
    direction: Direction,
    /// The route of the spool; taken when its first write is counted.
    route: Option<Arc<RouteMetrics>>,
    /// Whether popped bytes are kept, to be popped again.
    keeps: bool,
    /// Its part of the budget, without the part of the disk threads.
    reservation: Reservation,
    /// Position of the next byte to pop. Positions count from the first byte ever pushed.
    next: u64,
    /// The bytes before the file.
    head: Pieces,
    on_disk: OnDisk,
    /// The bytes after the file and after a write in progress.
    tail: Pieces,
    disk_faults: DiskFaults,
    pause: Option<Wait<()>>,
}

/// The part of a spool that is in its file, and what is under way between the file and memory.
#[derive(Default)]
struct OnDisk {
    /// The positions of the bytes in the file.
    stored: Range<u64>,
    file: Option<Arc<File>>,
    /// Position of the byte at the beginning of the file.
    base: u64,
    write: Option<Write>,
    write_turn: Turn,
    read: Option<Reading>,
    read_turn: Turn,
    /// Bytes that were read back and are popped next.
    fetched: Bytes,
    /// Number of bytes ever written.
    spilled: u64,
}

/// Why a spool may not write to its disk.
#[derive(Default)]
struct DiskFaults {
    /// The limit that denied more disk, if any.
    denied: Option<Denial>,
    /// The error that `room` has yet to return.
    failure: Option<SpoolError>,
    /// Whether writing has stopped because of an error.
    broken: bool,
}

/// A spool's bytes shared with another holder; counted until this is dropped.
pub struct Held {
    /// The bytes, in order.
    pub pieces: Vec<Bytes>,
    _reservation: Reservation,
}

/// A queued or active write of the bytes before the tail.
struct Write {
    bytes: u64,
    written: oneshot::Receiver<Written>,
}

/// A queued or active read of the bytes to pop next.
struct Reading {
    bytes: u64,
    read: oneshot::Receiver<Read>,
}

/// The result of an attempt to write.
#[derive(Clone, Copy, PartialEq)]
enum Flush {
    /// There is nothing to write, or a write is in progress.
    Done,
    /// The queue of the disk threads is full.
    Queues,
    /// The disk limit of all spools is reached.
    Denied,
}

/// The cause of a write.
#[derive(Clone, Copy, PartialEq)]
enum Cause {
    /// The spool exceeds its memory limit.
    Memory,
    /// Step spill applies.
    Pressure,
}

impl Spool {
    /// Creates a spool that releases popped bytes.
    pub fn consuming(
        spools: &Arc<Spools>,
        direction: Direction,
        limits: Limits,
        account: Option<&Arc<Account>>,
        route: Option<&Arc<RouteMetrics>>,
    ) -> Self {
        Spool::new(spools, direction, limits, account, route, false)
    }

    /// Creates a spool that keeps popped bytes, so that [`Spool::rewind`] can restart.
    pub fn keeping(
        spools: &Arc<Spools>,
        direction: Direction,
        limits: Limits,
        account: Option<&Arc<Account>>,
        route: Option<&Arc<RouteMetrics>>,
    ) -> Self {
        Spool::new(spools, direction, limits, account, route, true)
    }

    fn new(
        spools: &Arc<Spools>,
        direction: Direction,
        limits: Limits,
        account: Option<&Arc<Account>>,
        route: Option<&Arc<RouteMetrics>>,
        keeps: bool,
    ) -> Self {
        Spool {
            spools: spools.clone(),
            limits,
            direction,
            route: route.cloned(),
            keeps,
            reservation: Reservation::new(&spools.budget, direction, account),
            next: 0,
            head: Pieces::new(0),
            on_disk: OnDisk::default(),
            tail: Pieces::new(0),
            disk_faults: DiskFaults::default(),
            pause: None,
        }
    }

    /// Number of bytes ever pushed.
    pub fn pushed(&self) -> u64 {
        self.tail.end()
    }

    /// Number of bytes that are not popped yet; after a rewind, not popped again.
    pub fn unread(&self) -> u64 {
        self.pushed() - self.next
    }

    /// Number of bytes in memory and on disk.
    pub fn len(&self) -> u64 {
        if self.keeps { self.pushed() } else { self.unread() }
    }

    /// Whether the spool is empty.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Number of bytes in memory, including those of the disk threads.
    pub fn memory(&self) -> u64 {
        let writing = self.on_disk.write.as_ref().map_or(0, |write| write.bytes);
        let reading = self.on_disk.read.as_ref().map_or(0, |read| read.bytes);
        self.reservation.memory() + writing + reading
    }

    /// Number of bytes ever written to disk.
    pub fn spilled(&self) -> u64 {
        self.on_disk.spilled
    }

    /// Whether bytes that arrive now are for the file.
    pub fn needs_disk(&self) -> bool {
        self.disk_left() > 0 && (self.held() >= self.limits.memory || self.reservation.spills())
    }

    /// Whether the client's limit is what denies more.
    pub fn exceeds_client(&self) -> bool {
        self.disk_faults.denied == Some(Denial::Client) || self.reservation.is_client_full()
    }

    /// Appends a piece. It always fits: call [`Spool::room`] before receiving it, and [`Spool::room`] or
    /// [`Spool::idle`] afterwards, which start the writes.
    pub fn push(&mut self, piece: Bytes) {
        if !piece.is_empty() {
            self.reservation.grow_memory(piece.len() as u64);
            self.tail.push(piece);
        }
    }

    /// Whether another piece may be pushed; starts a write if one is due.
    ///
    /// # Errors
    ///
    /// Reports a failed write once. No bytes are lost: they stay in memory, and this spool no longer uses the disk.
    pub fn room(&mut self, cx: &mut Context<'_>) -> Result<Room, SpoolError> {
        self.settle(cx);
        let flush = self.flush(cx, false);
        if let Some(failure) = self.disk_faults.failure.take() {
            return Err(failure);
        }
        let can_write = self.disk_left() > 0 && flush != Flush::Denied;
        if !can_write && self.held() >= self.limits.memory.max(1) {
            self.pause = None;
            return Ok(Room::Full);
        }
        let writes = self.on_disk.write.is_some() || flush == Flush::Queues;
        if self.reservation.is_full() {
            return Ok(if writes { Room::Disk } else { self.pause(cx) });
        }
        self.pause = None;
        let gathered = if self.reservation.spills() { self.tail.len() } else { self.excess() };
        Ok(if writes && gathered >= self.spools.chunk { Room::Disk } else { Room::Free })
    }

    /// Reports that no more bytes arrive for now: bytes beyond the memory limit are written, even a small number.
    pub fn idle(&mut self, cx: &mut Context<'_>) {
        self.settle(cx);
        self.flush(cx, true);
    }

    /// Returns the next bytes in order, at most `max`, and reads them back if they are in the file. `None` if there are
    /// none now; the task is not woken when some arrive.
    ///
    /// # Errors
    ///
    /// If the file could not be read. The next call tries again.
    pub fn poll_next(&mut self, cx: &mut Context<'_>, max: usize) -> Poll<Result<Option<Bytes>, SpoolError>> {
        self.settle(cx);
        let max = max.max(1);
        if self.unread() == 0 {
            return Poll::Ready(Ok(None));
        }
        if self.on_disk.fetched.is_empty() && self.on_disk.stored.contains(&self.next) && !self.head.contains(self.next)
        {
            match self.fetch(cx, max) {
                Poll::Ready(Ok(())) => {}
                Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
                Poll::Pending => return Poll::Pending,
            }
        }
        let popped = if !self.on_disk.fetched.is_empty() {
            self.pop_fetched(max)
        } else if self.head.contains(self.next) {
            pop(&mut self.head, &mut self.reservation, self.next, max, self.keeps)
        } else if self.tail.contains(self.next) {
            pop(&mut self.tail, &mut self.reservation, self.next, max, self.keeps)
        } else {
            // They are being written: `settle` has registered the task.
            return Poll::Pending;
        };
        self.next += popped.len() as u64;
        Poll::Ready(Ok(Some(popped)))
    }

    /// Shares all bytes with another holder, without a copy, if they are completely in memory. The budget counts them
    /// separately, although they are the same memory while both exist.
    pub fn share_memory(&mut self) -> Option<Held> {
        if !self.on_disk.stored.is_empty() || self.on_disk.write.is_some() || self.reservation.spills() {
            return None;
        }
        let mut reservation = self.reservation.another();
        reservation.grow_memory(self.head.len() + self.tail.len());
        let mut pieces = Vec::new();
        for run in [&mut self.head, &mut self.tail] {
            let mut at = run.start();
            while run.contains(at) {
                let piece = run.copy(at, usize::MAX);
                at += piece.len() as u64;
                pieces.push(piece);
            }
        }
        Some(Held { pieces, _reservation: reservation })
    }

    /// Restarts at the first byte.
    pub fn rewind(&mut self) {
        debug_assert!(self.keeps, "a consuming spool has released its popped bytes");
        if !self.keeps {
            return;
        }
        self.next = 0;
        self.on_disk.read = None;
        self.on_disk.read_turn = Turn::default();
        self.reservation.shrink_memory(self.on_disk.fetched.len() as u64);
        self.on_disk.fetched = Bytes::new();
    }

    /// Number of bytes in memory that count for the spool's limit.
    fn held(&self) -> u64 {
        self.head.len() + self.tail.len()
    }

    /// Number of bytes in the tail beyond the limit.
    fn excess(&self) -> u64 {
        self.held().saturating_sub(self.limits.memory).min(self.tail.len())
    }

    /// Offset of the next write in the file.
    fn offset(&self) -> u64 {
        let empty = self.on_disk.stored.is_empty() && self.on_disk.write.is_none();
        if empty { 0 } else { self.tail.start() - self.on_disk.base }
    }

    /// Number of bytes that it may still write.
    fn disk_left(&self) -> u64 {
        if self.disk_faults.broken { 0 } else { self.limits.disk.saturating_sub(self.offset()) }
    }

    /// Number of bytes in the tail that should be written now, and the cause.
    fn due(&self, idle: bool) -> Option<(u64, Cause)> {
        let Spools { chunk, small_chunk, .. } = &*self.spools;
        let most = self.disk_left().min(*chunk);
        if most == 0 {
            return None;
        }
        let (full, spills) = (self.reservation.is_full(), self.reservation.spills());
        let worthwhile = match (full, spills, idle) {
            // Bytes that go to disk in any case are written at once.
            (true, false, _) => 1,
            (false, _, true) => *small_chunk,
            _ => *chunk,
        };
        let pressing = if full { 1 } else { *small_chunk };
        let excess = self.excess();
        if excess >= worthwhile.min(most) {
            Some((excess.min(most), Cause::Memory))
        } else if spills && self.tail.len() >= pressing.min(most) {
            Some((self.tail.len().min(most), Cause::Pressure))
        } else {
            None
        }
    }

    /// Writes what is due, until a write is in progress.
    fn flush(&mut self, cx: &mut Context<'_>, idle: bool) -> Flush {
        while self.on_disk.write.is_none() {
            let Some((bytes, cause)) = self.due(idle) else {
                self.on_disk.write_turn = Turn::default();
                break;
            };
            let Poll::Ready(permit) = self.on_disk.write_turn.poll(&self.spools.disk, cx) else { return Flush::Queues };
            let grown = (self.offset() + bytes).saturating_sub(self.reservation.disk());
            if let Err(denial) = self.reservation.grow_disk(grown) {
                if self.disk_faults.denied.replace(denial) != Some(denial) {
                    self.spools.budget.count_denial(self.direction, denial);
                }
                return Flush::Denied;
            }
            self.disk_faults.denied = None;
            self.write(permit, bytes, cause);
            self.count(cause);
            // The write may already be finished; otherwise the task is woken then.
            self.settle(cx);
        }
        Flush::Done
    }

    fn write(&mut self, permit: Permit, bytes: u64, cause: Cause) {
        if self.on_disk.stored.is_empty() {
            self.found(cause);
        }
        let offset = self.tail.start() - self.on_disk.base;
        let pieces = self.tail.take_front(bytes);
        let held = self.reservation.split_memory(bytes);
        let written = self.spools.disk.write(permit, self.on_disk.file.clone(), offset, pieces, held);
        self.on_disk.write = Some(Write { bytes, written });
    }

    /// Prepares the first write to an empty file: bytes that may stay in memory become the head.
    fn found(&mut self, cause: Cause) {
        let stay = match cause {
            Cause::Memory => self.limits.memory.min(self.tail.len()),
            Cause::Pressure => 0,
        };
        // Earlier bytes were popped, or the file would not be empty.
        debug_assert!(self.head.is_empty());
        self.head = self.tail.split_front(stay);
        // The head may stay for long, and the rest of its pieces is about to be released.
        self.head.compact();
        self.on_disk.base = self.tail.start();
        self.on_disk.stored = self.on_disk.base..self.on_disk.base;
    }

    fn count(&mut self, cause: Cause) {
        if cause == Cause::Pressure {
            self.spools.budget.count_spill();
        }
        if let Some(route) = self.route.take() {
            let spills = route.spills(self.direction);
            match cause {
                Cause::Memory => spills.memory.inc(),
                Cause::Pressure => spills.pressure.inc(),
            }
        }
    }

    /// Handles a finished write; otherwise registers the task.
    fn settle(&mut self, cx: &mut Context<'_>) {
        let Some(write) = &mut self.on_disk.write else { return };
        let Poll::Ready(written) = Pin::new(&mut write.written).poll(cx) else { return };
        let bytes = write.bytes;
        self.on_disk.write = None;
        match written {
            Ok(Ok(file)) => {
                self.on_disk.file = Some(file);
                self.on_disk.stored.end += bytes;
                self.on_disk.spilled += bytes;
            }
            Ok(Err(Unwritten { pieces, held, error })) => {
                self.reservation.join(held);
                self.tail.put_back(pieces);
                self.disk_faults.broken = true;
                self.disk_faults.failure = Some(error.into());
            }
            Err(_) => {
                // The unwritten bytes were lost with the thread. Without a file, no stale bytes are read in their
                // place.
                self.on_disk.file = None;
                self.on_disk.stored.end += bytes;
                self.disk_faults.broken = true;
                self.disk_faults.failure = Some(SpoolError::Failed(gone()));
            }
        }
    }

    /// Reads back the next bytes.
    fn fetch(&mut self, cx: &mut Context<'_>, max: usize) -> Poll<Result<(), SpoolError>> {
        if self.on_disk.read.is_none() {
            let Some(file) = self.on_disk.file.clone() else { return Poll::Ready(Err(SpoolError::Failed(gone()))) };
            let permit = std::task::ready!(self.on_disk.read_turn.poll(&self.spools.disk, cx));
            let left = self.on_disk.stored.end - self.next;
            let bytes = usize::try_from(left).unwrap_or(usize::MAX).min(max);
            self.reservation.grow_memory(bytes as u64);
            let held = self.reservation.split_memory(bytes as u64);
            let read = self.spools.disk.read(permit, file, self.next - self.on_disk.base, bytes, held);
            self.on_disk.read = Some(Reading { bytes: bytes as u64, read });
        }
        let Some(reading) = &mut self.on_disk.read else { return Poll::Pending };
        let read = std::task::ready!(Pin::new(&mut reading.read).poll(cx));
        self.on_disk.read = None;
        let (bytes, held) = read.unwrap_or_else(|_| Err(gone()))?;
        self.reservation.join(held);
        if !self.keeps {
            // An empty file is overwritten from its beginning.
            self.on_disk.stored.start += bytes.len() as u64;
        }
        self.on_disk.fetched = bytes;
        Poll::Ready(Ok(()))
    }

    fn pop_fetched(&mut self, max: usize) -> Bytes {
        let popped = self.on_disk.fetched.split_to(max.min(self.on_disk.fetched.len()));
        self.reservation.shrink_memory(popped.len() as u64);
        popped
    }

    /// Waits for memory.
    fn pause(&mut self, cx: &mut Context<'_>) -> Room {
        let budget = &self.spools.budget;
        if budget.pause_max().is_zero() {
            return Room::Pressure;
        }
        let pause = self.pause.get_or_insert_with(|| self.reservation.room());
        if pause.as_mut().poll(cx).is_pending() {
            return Room::Pressure;
        }
        self.pause = None;
        Room::Free
    }
}

impl Drop for Spool {
    fn drop(&mut self) {
        if let Some(write) = &mut self.on_disk.write {
            write.written.close();
            if let Ok(Ok(file)) = write.written.try_recv() {
                self.on_disk.file = Some(file);
            }
        }
        // Closing a large file takes time.
        if let Some(file) = self.on_disk.file.take() {
            self.spools.disk.close(file, self.reservation.split_disk());
        }
    }
}

/// Pops from memory.
fn pop(pieces: &mut Pieces, reservation: &mut Reservation, at: u64, max: usize, keeps: bool) -> Bytes {
    if keeps {
        return pieces.copy(at, max);
    }
    let popped = pieces.take(max);
    reservation.shrink_memory(popped.len() as u64);
    popped
}

fn gone() -> io::Error {
    io::Error::other("the disk threads have ended")
}

/// The permit to queue work for the disk, or the wait for it.
#[derive(Default)]
struct Turn(Option<Wait<Permit>>);

impl Turn {
    fn poll(&mut self, disk: &Disk, cx: &mut Context<'_>) -> Poll<Permit> {
        if self.0.is_none()
            && let Some(permit) = disk.try_permit()
        {
            return Poll::Ready(permit);
        }
        let wait = self.0.get_or_insert_with(|| Box::pin(disk.permit()));
        let permit = std::task::ready!(wait.as_mut().poll(cx));
        self.0 = None;
        Poll::Ready(permit)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::task::{Wake, Waker};
    use std::time::Duration;

    use proptest::prelude::*;

    use super::*;
    use crate::config::address::ClientPrefix;
    use crate::metrics::{Metrics, SpoolMetrics};
    use crate::spool::budget::Resources;
    use crate::spool::faults::{Faults, PATIENCE};

    const CHUNK: u64 = 1024;
    const LIMITS: Limits = Limits { memory: 1000, disk: 100_000 };
    const RESOURCES: Resources = Resources {
        memory: 1 << 30,
        disk: 1 << 30,
        files: 1 << 20,
        answers: 1.0,
        client: 1.0,
        spill: true,
        pause: true,
        shed: true,
        pause_max: Duration::from_secs(30),
    };

    struct Stage {
        spools: Arc<Spools>,
        faults: Faults,
        metrics: SpoolMetrics,
        route: Arc<RouteMetrics>,
    }

    fn stage(resources: Resources, chunk: u64) -> Stage {
        let all = Metrics::new(u64::MAX, Vec::new());
        let metrics = all.spools();
        let (faults, files) = Faults::new();
        let disk = Disk::start(files, disk::Terms { threads: 2, queue: 4, nice: 10 }, &metrics).unwrap();
        let budget = Budget::new(resources, metrics.clone());
        let accounts = Accounts::new(ClientPrefix::default(), &[], 1);
        let slow = SlowClients::default();
        let spools = Arc::new(Spools { disk, budget, slow, accounts, chunk, small_chunk: chunk / 8 });
        Stage { spools, faults, metrics, route: all.route("all") }
    }

    /// Shared resources with room for everything.
    pub fn spools() -> Arc<Spools> {
        stage(RESOURCES, CHUNK).spools
    }

    impl Stage {
        fn consuming(&self, limits: Limits) -> Spool {
            Spool::consuming(&self.spools, Direction::Response, limits, None, Some(&self.route))
        }

        fn keeping(&self, limits: Limits) -> Spool {
            Spool::keeping(&self.spools, Direction::Request, limits, None, Some(&self.route))
        }

        fn spills(&self, direction: Direction) -> (u64, u64) {
            let spills = self.route.spills(direction);
            (spills.memory.get(), spills.pressure.get())
        }

        /// After the last spool was dropped: waits for the disk threads to end, and checks that nothing is left.
        fn leaves_nothing_behind(self) {
            let budget = self.spools.budget.clone();
            self.faults.release();
            drop(self.spools);
            self.faults.wait_for_end();
            assert_eq!((budget.memory(), budget.disk(), self.faults.open()), (0, 0, 0));
            let gauges = self.metrics.memory.iter().chain(&self.metrics.disk).chain([&self.metrics.disk_queue]);
            assert!(gauges.into_iter().all(|gauge| gauge.get() == 0));
        }
    }

    #[derive(Default)]
    struct Wakes(AtomicUsize);

    impl Wake for Wakes {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::SeqCst);
        }
    }

    /// Polls once.
    fn now<T>(ask: impl FnOnce(&mut Context<'_>) -> T) -> T {
        ask(&mut Context::from_waker(Waker::noop()))
    }

    /// Polls again after each wake-up, until it is ready.
    async fn soon<T>(mut ask: impl FnMut(&mut Context<'_>) -> Poll<T>) -> T {
        tokio::time::timeout(PATIENCE, std::future::poll_fn(|cx| ask(cx))).await.expect("nobody was woken")
    }

    /// Waits for any result except `Disk`.
    async fn room(spool: &mut Spool) -> Result<Room, SpoolError> {
        soon(|cx| match spool.room(cx) {
            Ok(Room::Disk) => Poll::Pending,
            other => Poll::Ready(other),
        })
        .await
    }

    async fn written(spool: &mut Spool) {
        soon(|cx| {
            spool.idle(cx);
            if spool.on_disk.write.is_some() { Poll::Pending } else { Poll::Ready(()) }
        })
        .await;
    }

    /// The next bytes of a stream in which each position differs from its neighbours.
    fn piece(at: u64, bytes: usize) -> Bytes {
        (at..at + bytes as u64).map(byte).collect()
    }

    fn byte(at: u64) -> u8 {
        (at.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 56) as u8
    }

    fn push(spool: &mut Spool, bytes: usize) {
        spool.push(piece(spool.pushed(), bytes));
    }

    /// Pushes pieces of 100 bytes while permitted.
    async fn fill(spool: &mut Spool) -> Room {
        loop {
            match room(spool).await.unwrap() {
                Room::Free => push(spool, 100),
                other => return other,
            }
        }
    }

    async fn pop(spool: &mut Spool, max: usize) -> Option<Bytes> {
        let at = spool.next;
        let popped = soon(|cx| spool.poll_next(cx, max)).await.unwrap();
        if let Some(popped) = &popped {
            assert!((1..=max).contains(&popped.len()));
            assert!(*popped == piece(at, popped.len()), "other bytes came from {at} on");
        }
        popped
    }

    async fn drain(spool: &mut Spool) {
        while pop(spool, 700).await.is_some() {}
        assert_eq!(spool.unread(), 0);
    }

    #[test]
    fn a_spool_can_be_part_of_a_session_of_pingora() {
        fn fits<T: Send + Sync + Unpin + 'static>() {}
        fits::<Spool>();
    }

    #[tokio::test]
    async fn what_fits_in_memory_never_sees_the_disk_and_is_not_copied() {
        let stage = stage(RESOURCES, CHUNK);
        let mut spool = stage.consuming(LIMITS);
        let bytes = piece(0, 999);
        spool.push(bytes.clone());
        spool.push(Bytes::new());
        assert_eq!(now(|cx| spool.room(cx)).unwrap(), Room::Free);
        now(|cx| spool.idle(cx));
        assert_eq!((spool.len(), spool.memory(), stage.spools.budget.memory()), (999, 999, 999));
        assert_eq!(pop(&mut spool, 1000).await.unwrap().as_ptr(), bytes.as_ptr());
        assert_eq!(pop(&mut spool, 1000).await, None);
        assert_eq!((spool.len(), spool.pushed(), spool.memory(), stage.faults.calls()), (0, 999, 0, 0));
    }

    #[tokio::test]
    async fn what_exceeds_the_memory_is_written_and_comes_back_in_order() {
        let stage = stage(RESOURCES, CHUNK);
        let mut spool = stage.consuming(LIMITS);
        while spool.pushed() < 50_000 {
            assert_eq!(room(&mut spool).await.unwrap(), Room::Free);
            push(&mut spool, 100);
        }
        written(&mut spool).await;
        assert!(spool.memory() < LIMITS.memory + CHUNK / 8, "{} bytes", spool.memory());
        assert_eq!(spool.spilled() + spool.memory(), 50_000);
        assert_eq!((stage.spills(Direction::Response), stage.metrics.spill.times.get()), ((1, 0), 0));
        drain(&mut spool).await;
        assert_eq!((spool.memory(), spool.len(), stage.spools.budget.disk()), (0, 0, spool.spilled()));
        drop(spool);
        stage.leaves_nothing_behind();
    }

    #[tokio::test]
    async fn the_room_in_the_file_is_used_again_once_it_is_empty() {
        let stage = stage(RESOURCES, CHUNK);
        let limits = Limits { memory: 1000, disk: 3 * CHUNK };
        let mut spool = stage.consuming(limits);
        for _ in 0..5 {
            assert_eq!(fill(&mut spool).await, Room::Full);
            assert_eq!(stage.spools.budget.disk(), limits.disk);
            drain(&mut spool).await;
        }
        assert_eq!(spool.spilled(), 5 * limits.disk);
    }

    #[tokio::test]
    async fn without_disk_it_is_full_at_its_memory_until_something_is_popped() {
        let stage = stage(RESOURCES, CHUNK);
        let mut spool = stage.consuming(Limits { memory: 1000, disk: 0 });
        assert_eq!(fill(&mut spool).await, Room::Full);
        assert_eq!(spool.len(), 1000);
        pop(&mut spool, 1).await;
        assert_eq!(now(|cx| spool.room(cx)).unwrap(), Room::Free);
        push(&mut spool, 500);
        now(|cx| spool.idle(cx));
        drain(&mut spool).await;
        assert_eq!(stage.faults.calls(), 0);
    }

    #[tokio::test]
    async fn a_slow_disk_makes_the_producer_wait_and_nobody_else() {
        let stage = stage(RESOURCES, CHUNK);
        let mut spool = stage.consuming(LIMITS);
        stage.faults.hold();
        let wakes = Arc::new(Wakes::default());
        let waker = Waker::from(wakes.clone());
        let mut cx = Context::from_waker(&waker);
        while spool.room(&mut cx).unwrap() == Room::Free {
            push(&mut spool, 100);
        }
        assert_eq!(spool.room(&mut cx).unwrap(), Room::Disk);
        let most = LIMITS.memory + 2 * CHUNK + 100;
        assert!((most - 200..=most).contains(&spool.memory()), "{} bytes", spool.memory());
        assert_eq!(stage.spools.budget.memory(), spool.memory());
        pop(&mut spool, 1000).await;

        assert_eq!(wakes.0.load(Ordering::SeqCst), 0);
        stage.faults.release();
        assert_eq!(room(&mut spool).await.unwrap(), Room::Free);
        drain(&mut spool).await;
    }

    #[tokio::test]
    async fn bytes_that_are_being_written_are_waited_for() {
        let stage = stage(RESOURCES, CHUNK);
        let mut spool = stage.consuming(Limits { memory: 0, ..LIMITS });
        stage.faults.hold();
        push(&mut spool, 5000);
        assert_eq!(now(|cx| spool.room(cx)).unwrap(), Room::Disk);
        assert!(now(|cx| spool.poll_next(cx, 100)).is_pending());
        stage.faults.release();
        drain(&mut spool).await;
    }

    #[tokio::test]
    async fn a_read_takes_as_much_as_is_asked_for_and_no_more() {
        let stage = stage(RESOURCES, CHUNK);
        let mut spool = stage.consuming(Limits { memory: 0, ..LIMITS });
        push(&mut spool, CHUNK as usize);
        written(&mut spool).await;
        assert_eq!(spool.memory(), 0);
        assert_eq!(pop(&mut spool, 600).await.unwrap().len(), 600);
        assert_eq!(spool.memory(), 0);
        let calls = stage.faults.calls();
        stage.faults.hold();
        assert!(now(|cx| spool.poll_next(cx, 400)).is_pending());
        assert_eq!(spool.memory(), 400);
        stage.faults.release();
        assert_eq!(pop(&mut spool, 10).await.unwrap().len(), 10);
        assert_eq!(pop(&mut spool, 1000).await.unwrap().len(), 390);
        assert_eq!(stage.faults.calls(), calls + 1);
        drain(&mut spool).await;
    }

    #[tokio::test]
    async fn what_is_kept_can_be_popped_again_from_memory_and_from_disk() {
        let stage = stage(RESOURCES, CHUNK);
        let mut spool = stage.keeping(LIMITS);
        while spool.pushed() < 10_000 {
            assert_eq!(room(&mut spool).await.unwrap(), Room::Free);
            push(&mut spool, 100);
        }
        written(&mut spool).await;
        let memory = spool.memory();
        for popped in [0, 1, 500, 1500, 5000, 10_000] {
            while spool.next < popped {
                pop(&mut spool, 300).await;
            }
            assert_eq!((spool.len(), spool.pushed()), (10_000, 10_000));
            spool.rewind();
            assert_eq!((spool.unread(), spool.memory()), (10_000, memory));
        }
        drain(&mut spool).await;
        drop(spool);
        stage.leaves_nothing_behind();
    }

    #[tokio::test]
    async fn a_disk_that_is_full_is_said_once_and_nothing_is_lost() {
        let stage = stage(RESOURCES, CHUNK);
        let mut spool = stage.consuming(LIMITS);
        for outcome in [None, None, Some(io::ErrorKind::StorageFull)] {
            stage.faults.then_write(outcome);
        }
        let error = loop {
            match room(&mut spool).await {
                Ok(room) => assert_eq!(room, Room::Free),
                Err(error) => break error,
            }
            push(&mut spool, 100);
        };
        assert!(matches!(error, SpoolError::Full(_)), "{error}");
        assert_eq!(spool.spilled(), 2 * CHUNK);
        assert_eq!(now(|cx| spool.room(cx)).unwrap(), Room::Full);
        drain(&mut spool).await;
        assert_eq!(now(|cx| spool.room(cx)).unwrap(), Room::Free);
        assert_eq!(fill(&mut spool).await, Room::Full);
        assert_eq!(spool.len(), 1000);
        drain(&mut spool).await;
        drop(spool);
        stage.leaves_nothing_behind();
    }

    #[tokio::test]
    async fn a_read_that_failed_can_be_tried_again() {
        let stage = stage(RESOURCES, CHUNK);
        let mut spool = stage.consuming(Limits { memory: 0, ..LIMITS });
        push(&mut spool, 2000);
        written(&mut spool).await;
        stage.faults.then_read(Some(io::ErrorKind::Other));
        let failed = soon(|cx| spool.poll_next(cx, 100)).await;
        assert!(matches!(failed, Err(SpoolError::Failed(_))));
        drain(&mut spool).await;
        assert_eq!(stage.metrics.read.failures.get(), 1);
    }

    #[tokio::test]
    async fn when_the_disk_of_all_is_used_up_it_makes_do_with_its_memory() {
        let stage = stage(Resources { disk: 2 * CHUNK, ..RESOURCES }, CHUNK);
        let [mut one, mut other] = [stage.keeping(LIMITS), stage.consuming(LIMITS)];
        assert_eq!(fill(&mut one).await, Room::Full);
        assert_eq!(stage.spools.budget.disk(), 2 * CHUNK);
        assert_eq!(fill(&mut other).await, Room::Full);
        assert_eq!((other.spilled(), other.exceeds_client()), (0, false));
        let denials = stage.metrics.denials.map(|denials| denials[0].get());
        assert_eq!(denials, [1, 1], "each is counted once, however often it asks");
        drop(one);
        drain(&mut other).await;
    }

    #[tokio::test]
    async fn under_pressure_little_is_written_too_and_counted() {
        let stage = stage(Resources { memory: 4000, ..RESOURCES }, CHUNK);
        let mut hog = Reservation::new(&stage.spools.budget, Direction::Request, None);
        let mut spool = stage.consuming(LIMITS);
        push(&mut spool, 200);
        now(|cx| spool.idle(cx));
        assert_eq!(stage.faults.calls(), 0);
        hog.grow_memory(3000);
        written(&mut spool).await;
        assert_eq!((spool.memory(), spool.spilled()), (0, 200));
        assert_eq!((stage.spills(Direction::Response), stage.metrics.spill.times.get()), ((0, 1), 1));
        drain(&mut spool).await;
    }

    #[tokio::test]
    async fn when_memory_is_full_a_spool_writes_what_it_has_and_then_waits() {
        let stage = stage(Resources { memory: 4000, ..RESOURCES }, CHUNK);
        let mut hog = Reservation::new(&stage.spools.budget, Direction::Request, None);
        let mut spool = stage.consuming(LIMITS);
        push(&mut spool, 10);
        hog.grow_memory(4000);
        assert_eq!(room(&mut spool).await.unwrap(), Room::Pressure);
        assert_eq!((spool.memory(), spool.spilled()), (0, 10));
        assert_eq!(now(|cx| spool.room(cx)).unwrap(), Room::Pressure);
        assert_eq!((stage.metrics.pause.times.get(), stage.metrics.pause.now.get()), (1, 1));
        let waiting = soon(|cx| match spool.room(cx) {
            Ok(Room::Pressure) => {
                hog.shrink_memory(1000.min(hog.memory()));
                Poll::Pending
            }
            other => Poll::Ready(other),
        });
        assert_eq!(waiting.await.unwrap(), Room::Free);
        assert_eq!(stage.metrics.pause.now.get(), 0);
        drain(&mut spool).await;
    }

    #[tokio::test]
    async fn without_the_rung_pause_nobody_waits_for_memory() {
        let stage = stage(Resources { memory: 4000, pause: false, ..RESOURCES }, CHUNK);
        let mut spool = stage.consuming(Limits { memory: 5000, disk: 0 });
        push(&mut spool, 4000);
        assert_eq!(now(|cx| spool.room(cx)).unwrap(), Room::Pressure);
        assert_eq!((stage.metrics.pause.times.get(), stage.spools.budget.pause_max()), (0, Duration::ZERO));
    }

    #[tokio::test]
    async fn a_spool_that_is_dropped_while_it_writes_and_reads_leaves_nothing_behind() {
        let stage = stage(RESOURCES, CHUNK);
        let mut spool = stage.consuming(Limits { memory: 0, ..LIMITS });
        push(&mut spool, CHUNK as usize);
        written(&mut spool).await;
        stage.faults.hold();
        push(&mut spool, 3000);
        assert_eq!(now(|cx| spool.room(cx)).unwrap(), Room::Disk);
        assert!(now(|cx| spool.poll_next(cx, 500)).is_pending());
        stage.faults.wait_for_held(2);
        drop(spool);
        // Bytes of the disk threads are still counted.
        assert_eq!(stage.spools.budget.memory(), CHUNK + 500);
        stage.leaves_nothing_behind();
    }

    #[tokio::test]
    async fn files_are_closed_by_the_disk_threads_even_one_that_was_not_yet_noticed() {
        let stage = stage(RESOURCES, CHUNK);
        let limits = Limits { memory: 0, ..LIMITS };
        let [mut noticed, mut unnoticed] = [stage.consuming(limits), stage.consuming(limits)];
        push(&mut noticed, CHUNK as usize);
        written(&mut noticed).await;
        stage.faults.hold();
        push(&mut unnoticed, CHUNK as usize);
        assert_eq!(now(|cx| unnoticed.room(cx)).unwrap(), Room::Free);
        stage.faults.release();
        while stage.metrics.disk_queue.get() > 0 {
            std::thread::yield_now();
        }
        assert!(noticed.on_disk.file.is_some() && unnoticed.on_disk.file.is_none());

        stage.faults.hold();
        let mut others = [stage.consuming(limits), stage.consuming(limits)];
        for other in &mut others {
            push(other, CHUNK as usize);
            now(|cx| other.idle(cx));
        }
        stage.faults.wait_for_held(2);
        drop((noticed, unnoticed));
        // Both threads are busy, so no file was closed.
        assert_eq!(stage.faults.open(), 4);
        drop(others);
        stage.leaves_nothing_behind();
    }

    #[tokio::test]
    async fn a_rewind_forgets_what_was_being_read() {
        let stage = stage(RESOURCES, CHUNK);
        let mut spool = stage.keeping(Limits { memory: 0, ..LIMITS });
        push(&mut spool, CHUNK as usize);
        written(&mut spool).await;
        pop(&mut spool, 500).await;
        stage.faults.hold();
        assert!(now(|cx| spool.poll_next(cx, 100)).is_pending());
        spool.rewind();
        assert_eq!(spool.memory(), 0);
        stage.faults.release();
        drain(&mut spool).await;
        drop(spool);
        stage.leaves_nothing_behind();
    }

    #[derive(Clone, Debug)]
    enum Step {
        Push(usize),
        Pop(usize),
        /// Asks for bytes without waiting for them.
        Ask(usize),
        Idle,
        Rewind,
        Hold,
        Release,
        /// Memory used by others.
        Others(u64),
        FailWrite(bool),
        FailRead,
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let step = prop_oneof![
            6 => (1..200_usize).prop_map(Step::Push),
            8 => (1..20_000_usize).prop_map(Step::Push),
            8 => (1..20_000_usize).prop_map(Step::Pop),
            2 => (1..20_000_usize).prop_map(Step::Ask),
            2 => Just(Step::Idle),
            1 => Just(Step::Rewind),
            1 => Just(Step::Hold),
            1 => Just(Step::Release),
            1 => (0..=1_100_000_u64).prop_map(Step::Others),
        ];
        let fault = prop_oneof![3 => any::<bool>().prop_map(Step::FailWrite), 1 => Just(Step::FailRead)];
        prop::collection::vec(prop_oneof![60 => step, 1 => fault], 1..200)
    }

    fn any_limits() -> impl Strategy<Value = Limits> {
        let disk = prop_oneof![1 => Just(0), 4 => 1..=1_048_576_u64];
        (0..=204_800_u64, disk).prop_map(|(memory, disk)| Limits { memory, disk })
    }

    /// A spool together with a simple model of it.
    struct Trial {
        stage: Stage,
        spool: Spool,
        limits: Limits,
        sent: Vec<u8>,
        others: Reservation,
        /// Failures that were scheduled.
        faulty: bool,
        largest_pop: u64,
        /// Bytes of reads that a rewind abandoned.
        forgotten: u64,
    }

    impl Trial {
        fn new(keeps: bool, limits: Limits, chunk: u64) -> Self {
            let stage = stage(Resources { memory: 1_000_000, disk: 900_000, ..RESOURCES }, chunk);
            let spool = if keeps { stage.keeping(limits) } else { stage.consuming(limits) };
            let others = Reservation::new(&stage.spools.budget, Direction::Request, None);
            Trial { stage, spool, limits, sent: Vec::new(), others, faulty: false, largest_pop: 0, forgotten: 0 }
        }

        async fn step(&mut self, step: Step) {
            match step {
                Step::Push(bytes) => self.push(bytes).await,
                Step::Pop(max) => {
                    self.pop(max).await;
                }
                Step::Ask(max) => self.ask(max),
                Step::Idle => now(|cx| self.spool.idle(cx)),
                Step::Rewind if self.spool.keeps => {
                    self.forgotten += self.spool.on_disk.read.as_ref().map_or(0, |read| read.bytes);
                    self.spool.rewind();
                }
                Step::Rewind => {}
                Step::Hold => self.stage.faults.hold(),
                Step::Release => self.stage.faults.release(),
                Step::Others(bytes) => {
                    let have = self.others.memory();
                    self.others.grow_memory(bytes.saturating_sub(have));
                    self.others.shrink_memory(have.saturating_sub(bytes));
                }
                Step::FailWrite(full) => {
                    self.faulty = true;
                    self.stage.faults.then_write(Some(if full {
                        io::ErrorKind::StorageFull
                    } else {
                        io::ErrorKind::Other
                    }));
                }
                Step::FailRead => {
                    self.faulty = true;
                    self.stage.faults.then_read(Some(io::ErrorKind::Other));
                }
            }
            self.check();
        }

        async fn push(&mut self, bytes: usize) {
            let room = loop {
                match now(|cx| self.spool.room(cx)) {
                    Err(_) => assert!(self.faulty),
                    Ok(Room::Disk) => {
                        self.stage.faults.release();
                        let _ = room(&mut self.spool).await.map_err(|_| assert!(self.faulty));
                    }
                    // A waiter for memory is woken when some is released.
                    Ok(Room::Pressure) => {
                        let (spool, others) = (&mut self.spool, &mut self.others);
                        self.stage.faults.release();
                        soon(|cx| {
                            let room = spool.room(cx);
                            others.shrink_memory(others.memory());
                            if matches!(room, Ok(Room::Pressure)) { Poll::Pending } else { Poll::Ready(()) }
                        })
                        .await;
                    }
                    Ok(room) => break room,
                }
            };
            if room == Room::Free {
                self.sent.extend_from_slice(&piece(self.sent.len() as u64, bytes));
                self.spool.push(piece(self.spool.pushed(), bytes));
                let Limits { memory, .. } = self.limits;
                let most = memory + 2 * self.stage.spools.chunk + bytes as u64 + self.largest_pop;
                assert!(self.spool.memory() <= most, "{} bytes of {most}", self.spool.memory());
            } else {
                let held = self.spool.memory() + self.stage.spools.budget.disk();
                assert!(held >= self.limits.memory || self.spool.disk_faults.broken, "{room:?} with {held} bytes");
            }
        }

        async fn pop(&mut self, max: usize) -> bool {
            self.largest_pop = self.largest_pop.max(max as u64);
            let at = usize::try_from(self.spool.next).unwrap();
            let popped = loop {
                match now(|cx| self.spool.poll_next(cx, max)) {
                    Poll::Ready(Ok(popped)) => break popped,
                    Poll::Ready(Err(_)) => assert!(self.faulty),
                    Poll::Pending => {
                        self.stage.faults.release();
                        match soon(|cx| self.spool.poll_next(cx, max)).await {
                            Ok(popped) => break popped,
                            Err(_) => assert!(self.faulty),
                        }
                    }
                }
            };
            self.compare(at, max, popped.as_ref());
            popped.is_some()
        }

        fn ask(&mut self, max: usize) {
            self.largest_pop = self.largest_pop.max(max as u64);
            let at = usize::try_from(self.spool.next).unwrap();
            match now(|cx| self.spool.poll_next(cx, max)) {
                Poll::Ready(Ok(popped)) => self.compare(at, max, popped.as_ref()),
                Poll::Ready(Err(_)) => assert!(self.faulty),
                Poll::Pending => {}
            }
        }

        fn compare(&self, at: usize, max: usize, popped: Option<&Bytes>) {
            match popped {
                None => assert_eq!(at, self.sent.len()),
                Some(popped) => {
                    assert!((1..=max).contains(&popped.len()));
                    assert!(popped[..] == self.sent[at..at + popped.len()], "other bytes came from {at} on");
                }
            }
        }

        fn check(&self) {
            let spool = &self.spool;
            let sent = self.sent.len() as u64;
            assert_eq!((spool.pushed(), spool.unread()), (sent, sent - spool.next));
            assert_eq!(spool.len(), if spool.keeps { sent } else { sent - spool.next });
            assert!(self.stage.spools.budget.disk() <= self.limits.disk.min(900_000));
            // The disk threads release memory before the spool handles the result, and abandoned memory when they reach
            // it.
            let most = spool.memory() + self.others.memory() + self.forgotten;
            assert!(self.stage.spools.budget.memory() <= most);
            assert!(spool.memory() + spool.spilled() >= spool.unread());
        }

        async fn end(mut self, drained: bool) {
            if drained {
                self.spool.keeps.then(|| self.spool.rewind());
                while self.pop(10_000).await {}
                assert_eq!(self.spool.unread(), 0);
            }
            drop((self.spool, self.others));
            self.stage.leaves_nothing_behind();
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 96, ..ProptestConfig::default() })]

        /// Random pieces, limits, failures, pressure and a stalled disk, compared with a vector.
        #[test]
        fn every_byte_comes_out_once_and_in_order_within_the_limits(
            keeps: bool,
            drained: bool,
            limits in any_limits(),
            chunk in prop::sample::select(vec![1 << 10, 1 << 13, 1 << 16, CHUNK_BYTES]),
            steps in steps(),
        ) {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
            runtime.block_on(async {
                let mut trial = Trial::new(keeps, limits, chunk);
                for step in steps {
                    trial.step(step).await;
                }
                trial.end(drained).await;
            });
        }
    }
}
