//! Limits the open connections to the admin endpoint, and chooses which one is closed for a new one.
//!
//! Each uses an open file outside the shares of clients and spools ([`crate::client::descriptors`]). Without a
//! limit, silent connections could use up the open files of backends and listeners. With a plain limit, they could
//! lock out Prometheus and the operator. So a new connection replaces the one that has waited longest for a
//! request. A connection counts as waiting until its header is complete, TLS handshake included. If all have an
//! active request, which takes a limited time, the new connection is closed.

use std::collections::BTreeMap;
use std::future::Future;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

use crate::metrics::AdminMetrics;

/// The limit and the open connections.
pub struct Seats {
    most: usize,
    metrics: AdminMetrics,
    taken: Mutex<Taken>,
}

#[derive(Default)]
struct Taken {
    /// Number of open connections, including those that are closing.
    open: usize,
    /// The connections that wait for a request, longest wait first.
    waiting: BTreeMap<u64, Arc<Notify>>,
    turn: u64,
}

/// One connection.
pub struct Seat(Arc<Seats>);

impl Seats {
    /// A limit of this number, and at least one.
    pub fn new(most: usize, metrics: AdminMetrics) -> Arc<Seats> {
        Arc::new(Seats { most: most.max(1), metrics, taken: Mutex::default() })
    }

    /// A seat for a new connection. `None`: close it, because all others have an active request.
    pub fn take(self: &Arc<Self>) -> Option<Seat> {
        let mut taken = self.taken();
        if taken.open >= self.most {
            self.metrics.closed();
            let (_, go) = taken.waiting.pop_first()?;
            go.notify_one();
        }
        taken.open += 1;
        self.metrics.set_connections(taken.open);
        Some(Seat(Arc::clone(self)))
    }

    fn taken(&self) -> MutexGuard<'_, Taken> {
        // The state is consistent at every point where a panic is possible.
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Seat {
    /// Waits for the next request. `None`: another connection needs the seat.
    pub async fn wait<T>(&self, coming: impl Future<Output = T>) -> Option<T> {
        let waiting = Waiting::begin(&self.0);
        tokio::select! {
            biased;
            come = coming => Some(come),
            () = waiting.go.notified() => None,
        }
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        let mut taken = self.0.taken();
        taken.open -= 1;
        self.0.metrics.set_connections(taken.open);
    }
}

/// A connection that waits for a request.
struct Waiting<'s> {
    seats: &'s Seats,
    turn: u64,
    go: Arc<Notify>,
}

impl<'s> Waiting<'s> {
    fn begin(seats: &'s Seats) -> Waiting<'s> {
        let go = Arc::new(Notify::new());
        let mut taken = seats.taken();
        taken.turn += 1;
        let turn = taken.turn;
        taken.waiting.insert(turn, Arc::clone(&go));
        Waiting { seats, turn, go }
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.seats.taken().waiting.remove(&self.turn);
    }
}

#[cfg(test)]
mod tests {
    use std::future::{pending, ready};

    use futures::FutureExt;

    use super::*;
    use crate::metrics::Metrics;

    fn seats(most: usize) -> (Arc<Seats>, Metrics) {
        let metrics = Metrics::new(0, Vec::new());
        (Seats::new(most, metrics.admin()), metrics)
    }

    fn open(metrics: &Metrics) -> String {
        let text = String::from_utf8(metrics.render()).expect("text");
        text.lines().filter(|line| line.starts_with("forebay_admin_connections")).collect::<Vec<_>>().join(" ")
    }

    #[tokio::test]
    async fn a_new_connection_takes_the_place_of_the_one_that_has_waited_longest() {
        let (seats, metrics) = seats(2);
        let (first, second) = (seats.take().expect("free"), seats.take().expect("free"));
        let mut later = Box::pin(second.wait(pending::<()>()));
        assert_eq!(later.as_mut().now_or_never(), None);
        // The first one has had a request since, so its wait is shorter.
        assert_eq!(first.wait(ready(1)).await, Some(1));
        let mut longest = later;
        let mut shorter = Box::pin(first.wait(pending::<()>()));
        assert_eq!(shorter.as_mut().now_or_never(), None);
        let third = seats.take();
        assert!(third.is_some());
        assert_eq!(longest.as_mut().now_or_never(), Some(None), "it has to go");
        assert_eq!(shorter.as_mut().now_or_never(), None, "and no other");
        drop((longest, shorter));
        drop((first, second, third));
        assert_eq!(open(&metrics), "forebay_admin_connections 0 forebay_admin_connections_closed_total 1");
    }

    #[tokio::test]
    async fn a_connection_with_a_request_under_way_gives_way_to_none() {
        let (seats, metrics) = seats(1);
        let busy = seats.take().expect("free");
        assert!(seats.take().is_none());
        assert_eq!(open(&metrics), "forebay_admin_connections 1 forebay_admin_connections_closed_total 1");
        drop(busy);
        assert!(seats.take().is_some(), "its place is given away");
    }

    #[tokio::test]
    async fn a_request_that_comes_as_its_connection_is_told_to_go_is_answered() {
        let (seats, _metrics) = seats(1);
        let seat = seats.take().expect("free");
        let notify = Notify::new();
        let mut waiting = Box::pin(seat.wait(notify.notified()));
        assert_eq!(waiting.as_mut().now_or_never(), None);
        notify.notify_one();
        let _second = seats.take().expect("the place of the first");
        assert_eq!(waiting.await, Some(()));
    }
}
