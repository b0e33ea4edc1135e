//! Divides the process's open files, so that many clients cannot exhaust what other parts need.
//!
//! Each client connection, each connection to a backend and each spool file is an open file. A process at its limit can
//! neither accept nor connect, which affects all clients. [`Shares`] therefore assigns shares to clients and spools,
//! and leaves the rest to backends and to Forebay itself; [`Doorway`] stops accepting before the rest is exhausted. The
//! kernel gives a new descriptor the lowest free number: while a number below a line is free, all numbers above the
//! line remain available as reserve. Nothing has to be counted, and files opened by other parts of the process are
//! included.

use std::fmt;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::metrics::DoorwayMetrics;

/// Number of files that the runtime of a worker or of another service opens.
const FILES_PER_RUNTIME: u64 = 4;

/// Number of runtimes besides those of the workers.
const OTHER_RUNTIMES: u64 = 6;

/// Interval of the check for free descriptors.
const LOOK: Duration = Duration::from_millis(20);

/// Minimum interval between log lines about missing descriptors.
const COMPLAINT_INTERVAL: Duration = Duration::from_secs(60);

/// The division of the open files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shares {
    limit: u64,
    clients: u64,
    spools: u64,
    rest: u64,
}

impl Shares {
    /// Forebay itself needs `own` of `limit` open files. `clients` and `spools` are the shares of the others for client
    /// connections and spool files, as ratios.
    pub fn new(limit: u64, own: u64, clients: f64, spools: f64) -> Shares {
        let others = limit.saturating_sub(own);
        let share = |ratio: f64| (others as f64 * ratio) as u64;
        // At least one, since zero would refuse every client.
        let (clients, spools) = (share(clients).max(1), share(spools));
        Shares { limit, clients, spools, rest: others.saturating_sub(clients + spools) }
    }

    /// The number of files that Forebay itself will have open with this many workers; `opened` is the current number.
    pub fn own(opened: u64, workers: usize) -> u64 {
        opened + FILES_PER_RUNTIME * (workers as u64 + OTHER_RUNTIMES)
    }

    /// The process's limit of open files.
    pub fn limit(&self) -> u64 {
        self.limit
    }

    /// Maximum number of client connections, over all listeners.
    pub fn clients(&self) -> u64 {
        self.clients
    }

    /// Maximum number of spool files.
    pub fn spools(&self) -> u64 {
        self.spools
    }

    /// Maximum number of idle connections to backends.
    pub fn pool(&self) -> u64 {
        self.rest / 2
    }

    /// Maximum number of connections to the admin endpoint, where `written` are configured: a quarter of what is
    /// neither for clients nor for spools, and at least two, one for Prometheus and one for an operator.
    pub fn admin(&self, written: u64) -> u64 {
        written.min((self.rest / 4).max(2))
    }

    /// Maximum number of active requests per client where `written` are configured: a quarter of the client
    /// connections, unless it is unlimited. Each request can need a connection to a backend.
    pub fn requests_of_client(&self, written: u64) -> u64 {
        if written == u64::MAX { written } else { written.min((self.clients / 4).max(1)) }
    }

    /// Connections are accepted while a descriptor below this one is free. Half of what is neither for clients nor for
    /// spools is then left for the accepted connections.
    pub fn accepts_below(&self) -> RawFd {
        line(self.limit - (self.rest / 2).min(self.limit))
    }

    /// Connections to backends are opened while a descriptor below this one is free. The rest is for the admin
    /// endpoint, name look-ups and Forebay's own files.
    pub fn backends_below(&self) -> RawFd {
        line(self.limit - (self.rest / 8).min(self.limit))
    }
}

fn line(descriptor: u64) -> RawFd {
    RawFd::try_from(descriptor).unwrap_or(RawFd::MAX)
}

/// Admits connections while descriptors are free.
pub struct Doorway {
    below: RawFd,
    /// A descriptor that stays open as long as this does.
    known: OwnedFd,
    metrics: DoorwayMetrics,
    complained: Mutex<Option<Instant>>,
}

impl Doorway {
    /// Creates a doorway that admits connections while a descriptor below this one is free.
    ///
    /// # Errors
    ///
    /// If no file can be opened.
    pub fn new(below: RawFd, metrics: DoorwayMetrics) -> std::io::Result<Doorway> {
        let known = std::fs::File::open("/dev/null")?.into();
        Ok(Doorway { below, known, metrics, complained: Mutex::new(None) })
    }

    /// Ends when another connection may be accepted after the one with this descriptor, usually at once: the descriptor
    /// was the lowest free one, so the kernel is asked only if it is not below the line.
    pub async fn pass(&self, accepted: RawFd) {
        if accepted < self.below || !self.is_short() {
            return;
        }
        self.complain();
        let _pause = Pause::begin(&self.metrics);
        while self.is_short() {
            tokio::time::sleep(LOOK).await;
        }
    }

    /// Whether free descriptors are too few to accept a client.
    fn is_short(&self) -> bool {
        lowest_free(&self.known).is_none_or(|free| free >= self.below)
    }

    fn complain(&self) {
        let mut complained = self.complained.lock().unwrap_or_else(PoisonError::into_inner);
        if complained.is_none_or(|last| last.elapsed() >= COMPLAINT_INTERVAL) {
            *complained = Some(Instant::now());
            tracing::warn!(
                accepts_below = self.below,
                "few open files are left: no connection is accepted until some are closed; raise the limit of open files"
            );
        }
    }
}

impl fmt::Debug for Doorway {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Doorway").field("below", &self.below).finish_non_exhaustive()
    }
}

/// Counts a listener that does not accept until this is dropped.
struct Pause<'m>(&'m DoorwayMetrics);

impl<'m> Pause<'m> {
    fn begin(metrics: &'m DoorwayMetrics) -> Self {
        metrics.pauses.inc();
        metrics.paused.inc();
        Pause(metrics)
    }
}

impl Drop for Pause<'_> {
    fn drop(&mut self) {
        self.0.paused.dec();
    }
}

/// The number of the next descriptor; `None` if none is left.
pub fn lowest_free(known: &OwnedFd) -> Option<RawFd> {
    rustix::io::fcntl_dupfd_cloexec(known.as_fd(), 0).ok().map(|next| next.as_raw_fd())
}

#[cfg(test)]
pub(super) mod tests {
    use std::fs::File;

    use futures::FutureExt;

    use super::*;
    use crate::metrics::Metrics;

    /// A doorway that admits connections while a descriptor below this one is free.
    pub fn doorway(below: RawFd) -> Doorway {
        Doorway::new(below, Metrics::new(0, Vec::new()).doorway()).unwrap()
    }

    fn shares(limit: u64) -> Shares {
        Shares::new(limit, 96, 0.5, 0.25)
    }

    #[test]
    fn clients_and_spools_have_a_share_and_the_rest_is_for_others() {
        let shares = shares(4_096);
        assert_eq!((shares.limit(), shares.clients(), shares.spools(), shares.pool()), (4_096, 2_000, 1_000, 500));
        assert_eq!((shares.accepts_below(), shares.backends_below()), (3_596, 3_971));
    }

    #[test]
    fn however_many_there_are_each_has_its_part_and_none_is_given_twice() {
        for limit in [0, 1, 64, 97, 256, 1_024, 20_000, 1 << 20, u64::MAX] {
            let shares = shares(limit);
            assert!(shares.clients() >= 1, "{shares:?}");
            let given = shares.clients() as f64 + shares.spools() as f64 + shares.rest as f64;
            assert!(given <= (limit.max(1)) as f64 * 1.001, "{shares:?}");
            assert!(shares.accepts_below() <= shares.backends_below(), "{shares:?}");
            assert!(u64::try_from(shares.backends_below()).unwrap() <= limit, "{shares:?}");
        }
    }

    #[test]
    fn the_requests_of_one_client_are_a_quarter_of_all_connections_at_most_unless_they_are_not_limited() {
        let shares = shares(4_096);
        assert_eq!([100, 1_000, u64::MAX].map(|written| shares.requests_of_client(written)), [100, 500, u64::MAX]);
        assert_eq!(Shares::new(0, 0, 0.5, 0.25).requests_of_client(1_000), 1);
    }

    #[test]
    fn the_admin_endpoint_has_a_quarter_of_the_rest_at_most_and_never_none() {
        let of = |limit| shares(limit).admin(256);
        assert_eq!([0, 97, 256, 512, 4_096, 20_000].map(of), [2, 2, 10, 26, 250, 256]);
        assert_eq!(shares(20_000).admin(10), 10);
    }

    #[test]
    fn the_door_is_open_while_a_low_descriptor_is_free() {
        let open = doorway(RawFd::MAX);
        assert!(open.pass(RawFd::MAX - 1).now_or_never().is_some());
        assert_eq!((open.metrics.pauses.get(), open.metrics.paused.get()), (0, 0));
    }

    #[tokio::test]
    async fn the_door_is_shut_until_descriptors_come_back() {
        let held: Vec<File> = (0..64).map(|_| File::open("/dev/null").unwrap()).collect();
        let door = doorway(held[32].as_raw_fd());
        let [low, high] = [31, 33].map(|place: usize| held[place].as_raw_fd());
        assert!(door.pass(low).now_or_never().is_some(), "it was free itself");
        let mut pass = std::pin::pin!(door.pass(high));
        assert!(tokio::time::timeout(3 * LOOK, &mut pass).await.is_err());
        assert_eq!((door.metrics.pauses.get(), door.metrics.paused.get()), (1, 1));
        drop(held);
        tokio::time::timeout(Duration::from_secs(20), pass).await.expect("descriptors were free again");
        assert_eq!((door.metrics.pauses.get(), door.metrics.paused.get()), (1, 0));
    }
}
