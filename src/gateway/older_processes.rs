//! Counts the older processes that are still finishing while this one serves.
//!
//! Each older process holds one end of a silent socket, and this process the other. When the process exits, its end
//! closes. A further new process inherits these ends.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Instant;

use super::lock;
use crate::metrics::upgrade::UpgradeMetrics;

/// The older processes. Clones share them.
#[derive(Clone, Default)]
pub struct OlderProcesses(Arc<Mutex<Vec<OwnedFd>>>);

impl OlderProcesses {
    /// Watches the processes behind these ends, on a thread.
    ///
    /// # Errors
    ///
    /// The system has no thread or descriptor left.
    pub fn watch(&self, ends: Vec<OwnedFd>, metrics: UpgradeMetrics) -> io::Result<()> {
        let mut watched = ends.iter().map(OwnedFd::try_clone).collect::<io::Result<Vec<_>>>()?;
        lock(&self.0).extend(ends);
        metrics.draining.set(i64::try_from(watched.len()).unwrap_or(i64::MAX));
        let this = self.clone();
        let run = move || {
            let began = Instant::now();
            while !watched.is_empty() {
                let mut asked: Vec<libc::pollfd> = watched.iter().map(asking).collect();
                poll(&mut asked, -1);
                let before = watched.len();
                let mut gone = asked.iter().map(|asked| asked.revents != 0);
                watched.retain(|_| !gone.next().unwrap_or(false));
                this.drop_ended();
                metrics.draining.set(i64::try_from(watched.len()).unwrap_or(i64::MAX));
                if watched.len() < before {
                    let seconds = began.elapsed().as_secs_f64();
                    tracing::info!(seconds, draining = watched.len(), "an older process has ended");
                }
            }
        };
        thread::Builder::new().name("older_processes".to_owned()).spawn(run).map(drop)
    }

    /// Number of older processes.
    pub fn count(&self) -> usize {
        self.drop_ended();
        lock(&self.0).len()
    }

    /// Duplicates of the ends, for another process.
    ///
    /// # Errors
    ///
    /// The system has no descriptor left.
    pub fn duplicates(&self) -> io::Result<Vec<OwnedFd>> {
        self.drop_ended();
        lock(&self.0).iter().map(OwnedFd::try_clone).collect()
    }

    fn drop_ended(&self) {
        let mut ends = lock(&self.0);
        let mut asked: Vec<libc::pollfd> = ends.iter().map(asking).collect();
        poll(&mut asked, 0);
        let mut gone = asked.iter().map(|asked| asked.revents != 0);
        ends.retain(|_| !gone.next().unwrap_or(false));
    }
}

/// Polls for a closed peer; the kernel always reports that.
fn asking(end: &OwnedFd) -> libc::pollfd {
    libc::pollfd { fd: end.as_raw_fd(), events: 0, revents: 0 }
}

/// Polls for this number of milliseconds; -1 waits without limit. An interruption returns early.
fn poll(asked: &mut [libc::pollfd], milliseconds: libc::c_int) {
    let count = libc::nfds_t::try_from(asked.len()).unwrap_or(libc::nfds_t::MAX);
    // SAFETY: the pointer is to that number of entries, which outlive the call.
    unsafe { libc::poll(asked.as_mut_ptr(), count, milliseconds) };
}

#[cfg(test)]
mod tests {
    use super::super::handover::Channel;
    use super::*;
    use crate::metrics::Metrics;

    #[test]
    fn a_process_counts_until_its_end_closes() {
        let (one, other) = (Channel::pair().expect("a pair"), Channel::pair().expect("a pair"));
        let older_processes = OlderProcesses::default();
        let metrics = Metrics::new(0, Vec::new()).upgrades();
        older_processes.watch(vec![one.0.into_fd(), other.0.into_fd()], metrics.clone()).expect("a thread");
        assert_eq!((older_processes.count(), metrics.draining.get()), (2, 2));
        drop(one.1);
        assert_eq!(older_processes.count(), 1);
        assert_eq!(older_processes.duplicates().expect("descriptors").len(), 1);
        drop(other.1);
        assert_eq!(older_processes.count(), 0);
    }
}
