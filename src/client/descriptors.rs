//! How the open files that the process may have are shared out, so that no crowd of clients uses up what others need.
//!
//! Each client connection is an open file, and so are each connection to a backend and each spool file. A process that
//! has as many as it may can neither accept nor connect, and says so to everybody. [`Shares`] therefore gives clients
//! and spools a share each and leaves the rest to backends and to Forebay itself; [`Doorway`] stops accepting before
//! that rest is used up. The kernel gives a new descriptor the lowest number that is free: as long as one below a line
//! is free, what is above the line is free as well. So nothing has to be counted, and what others in the process open
//! counts, too.

use std::fmt;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::metrics::DoorwayMetrics;

/// What a runtime of a worker, and of each service beside them, opens for itself.
const FILES_PER_RUNTIME: u64 = 4;

/// Runtimes beside those of the workers.
const OTHER_RUNTIMES: u64 = 6;

/// How often is looked whether there are descriptors again.
const LOOK: Duration = Duration::from_millis(20);

/// The log says no more than once in this time that there are none.
const COMPLAINT_INTERVAL: Duration = Duration::from_secs(60);

/// What of the open files is for whom.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shares {
    limit: u64,
    clients: u64,
    spools: u64,
    rest: u64,
}

impl Shares {
    /// Of `limit` open files Forebay itself needs `own`; `clients` and `spools`, as ratios, are what connections of
    /// clients and spool files may have of the others.
    pub fn new(limit: u64, own: u64, clients: f64, spools: f64) -> Shares {
        let others = limit.saturating_sub(own);
        let share = |ratio: f64| (others as f64 * ratio) as u64;
        // With none at all nobody would be served.
        let (clients, spools) = (share(clients).max(1), share(spools));
        Shares { limit, clients, spools, rest: others.saturating_sub(clients + spools) }
    }

    /// What Forebay itself will have opened with so many workers, where `opened` are open now.
    pub fn own(opened: u64, workers: usize) -> u64 {
        opened + FILES_PER_RUNTIME * (workers as u64 + OTHER_RUNTIMES)
    }

    /// All open files that the process may have.
    pub fn limit(&self) -> u64 {
        self.limit
    }

    /// Connections of clients, over all listeners.
    pub fn clients(&self) -> u64 {
        self.clients
    }

    /// Spool files.
    pub fn spools(&self) -> u64 {
        self.spools
    }

    /// Connections to backends that may be kept while nobody uses them.
    pub fn pool(&self) -> u64 {
        self.rest / 2
    }

    /// Connections to the admin endpoint, where `written` are allowed: no more than a quarter of what is neither for
    /// clients nor for spools, and at least two, one for Prometheus and one for its operator.
    pub fn admin(&self, written: u64) -> u64 {
        written.min((self.rest / 4).max(2))
    }

    /// How many requests one client may have under way where `written` are allowed: no more than a quarter as many as
    /// there may be connections, unless it is not limited at all. Each can take a connection to a backend.
    pub fn requests_of_client(&self, written: u64) -> u64 {
        if written == u64::MAX { written } else { written.min((self.clients / 4).max(1)) }
    }

    /// Connections are accepted while a descriptor below this one is free. Half of what is neither for clients nor for
    /// spools is then left to those who were accepted.
    pub fn accepts_below(&self) -> RawFd {
        line(self.limit - (self.rest / 2).min(self.limit))
    }

    /// A connection to a backend is made while a descriptor below this one is free. What is above is for the admin
    /// endpoint, name look-ups and files of Forebay itself.
    pub fn backends_below(&self) -> RawFd {
        line(self.limit - (self.rest / 8).min(self.limit))
    }
}

fn line(descriptor: u64) -> RawFd {
    RawFd::try_from(descriptor).unwrap_or(RawFd::MAX)
}

/// Lets connections in while there are descriptors.
pub struct Doorway {
    below: RawFd,
    /// One that is open for as long as this is there.
    known: OwnedFd,
    metrics: DoorwayMetrics,
    complained: Mutex<Option<Instant>>,
}

impl Doorway {
    /// One that accepts while a descriptor below this one is free.
    ///
    /// # Errors
    /// That no file can be opened at all.
    pub fn new(below: RawFd, metrics: DoorwayMetrics) -> std::io::Result<Doorway> {
        let known = std::fs::File::open("/dev/null")?.into();
        Ok(Doorway { below, known, metrics, complained: Mutex::new(None) })
    }

    /// Ends when a further connection may be accepted: at once, mostly.
    pub async fn pass(&self) {
        if !self.is_short() {
            return;
        }
        self.complain();
        let _pause = Pause::begin(&self.metrics);
        while self.is_short() {
            tokio::time::sleep(LOOK).await;
        }
    }

    /// Whether descriptors are so few that none is to be taken for a client.
    fn is_short(&self) -> bool {
        lowest_free(&self.known).is_none_or(|free| free >= self.below)
    }

    fn complain(&self) {
        let mut complained = self.complained.lock().unwrap_or_else(PoisonError::into_inner);
        if complained.is_none_or(|last| last.elapsed() >= COMPLAINT_INTERVAL) {
            *complained = Some(Instant::now());
            tracing::warn!(
                accepts_below = self.below,
                "open files run out: no connection is accepted until some are closed; raise the limit of open files"
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

/// The number that the next descriptor gets; `None` if there is none left.
pub fn lowest_free(known: &OwnedFd) -> Option<RawFd> {
    rustix::io::fcntl_dupfd_cloexec(known.as_fd(), 0).ok().map(|next| next.as_raw_fd())
}

#[cfg(test)]
pub(super) mod tests {
    use std::fs::File;

    use futures::FutureExt;

    use super::*;
    use crate::metrics::Metrics;

    /// One that accepts while a descriptor below this one is free.
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
        assert!(open.pass().now_or_never().is_some());
        assert_eq!((open.metrics.pauses.get(), open.metrics.paused.get()), (0, 0));
    }

    #[tokio::test]
    async fn the_door_is_shut_until_descriptors_come_back() {
        let held: Vec<File> = (0..64).map(|_| File::open("/dev/null").unwrap()).collect();
        let door = doorway(held[32].as_raw_fd());
        let mut pass = std::pin::pin!(door.pass());
        assert!(tokio::time::timeout(3 * LOOK, &mut pass).await.is_err());
        assert_eq!((door.metrics.pauses.get(), door.metrics.paused.get()), (1, 1));
        drop(held);
        tokio::time::timeout(Duration::from_secs(20), pass).await.expect("descriptors were free again");
        assert_eq!((door.metrics.pauses.get(), door.metrics.paused.get()), (1, 0));
    }
}
