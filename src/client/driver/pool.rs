//! The pool of idle connections to endpoints; each worker has one.
//!
//! The pool belongs to the worker's thread, so that taking and returning a connection needs no lock, no task and no
//! turn of the event loop. A connection that its endpoint closed is recognised by tokio's readiness. While the pool is
//! not empty, one task per worker checks it periodically. It closes connections that are dead, were idle for too long
//! or lead to a removed endpoint.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use super::connection::Connection;

/// Interval of the check.
const INTERVAL: Duration = Duration::from_millis(250);
/// Minimum idle time: a connection with a shorter limit is closed at once.
const LEAST_IDLE: Duration = Duration::from_millis(10);
/// Maximum idle time; also the default.
const MOST_IDLE: Duration = Duration::from_secs(24 * 3600);

thread_local! {
    static POOL: RefCell<Pool<Connection>> = RefCell::default();
}

/// Takes a live idle connection for this key.
pub fn take(key: u64) -> Option<Connection> {
    POOL.with_borrow_mut(|pool| pool.take(key, Instant::now(), Connection::is_dead))
}

/// Keeps a connection for this key, for at most the time `idle`. A worker keeps at most `most` connections; if the pool
/// is full, the one that was idle for longest is closed.
pub fn put(key: u64, connection: Connection, idle: Option<Duration>, most: usize) {
    let idle = idle.unwrap_or(MOST_IDLE).min(MOST_IDLE);
    if idle < LEAST_IDLE || most == 0 {
        return;
    }
    let begins = POOL.with_borrow_mut(|pool| {
        pool.put(key, connection, Instant::now() + idle, most);
        !std::mem::replace(&mut pool.is_looked_after, true)
    });
    if begins {
        tokio::spawn(look_after());
    }
}

/// Checks the pool until it is empty.
async fn look_after() {
    /// Resets the flag on every exit, also when the runtime ends first. The next connection then starts a new task.
    struct Looking;
    impl Drop for Looking {
        fn drop(&mut self) {
            let _ = POOL.try_with(|pool| pool.borrow_mut().is_looked_after = false);
        }
    }
    let _looking = Looking;
    loop {
        tokio::time::sleep(INTERVAL).await;
        let is_of_no_use = |connection: &Connection| connection.is_dead() || connection.is_abandoned();
        if POOL.with_borrow_mut(|pool| pool.clear_out(Instant::now(), is_of_no_use)) == 0 {
            return;
        }
    }
}

/// The idle connections by key, in the order in which they were returned.
struct Pool<C> {
    kept: BTreeMap<u64, Vec<Kept<C>>>,
    count: usize,
    /// Number of connections returned so far.
    turn: u64,
    is_looked_after: bool,
}

struct Kept<C> {
    connection: C,
    until: Instant,
    turn: u64,
}

impl<C> Default for Pool<C> {
    fn default() -> Self {
        Pool { kept: BTreeMap::new(), count: 0, turn: 0, is_looked_after: false }
    }
}

impl<C> Pool<C> {
    /// Takes the connection that was returned last, if it is alive: it is the least likely to have been closed.
    fn take(&mut self, key: u64, now: Instant, is_dead: impl Fn(&C) -> bool) -> Option<C> {
        let kept = self.kept.get_mut(&key)?;
        while let Some(last) = kept.pop() {
            self.count -= 1;
            if last.until > now && !is_dead(&last.connection) {
                return Some(last.connection);
            }
        }
        None
    }

    fn put(&mut self, key: u64, connection: C, until: Instant, most: usize) {
        while self.count >= most {
            self.drop_oldest();
        }
        self.turn += 1;
        self.kept.entry(key).or_default().push(Kept { connection, until, turn: self.turn });
        self.count += 1;
    }

    fn drop_oldest(&mut self) {
        let first = |kept: &Vec<Kept<C>>| kept.first().map_or(u64::MAX, |kept| kept.turn);
        if let Some(kept) = self.kept.values_mut().filter(|kept| !kept.is_empty()).min_by_key(|kept| first(kept)) {
            kept.remove(0);
        }
        self.count = self.count.saturating_sub(1);
    }

    /// Drops dead and expired connections; returns how many remain.
    fn clear_out(&mut self, now: Instant, is_dead: impl Fn(&C) -> bool) -> usize {
        self.kept.retain(|_, kept| {
            kept.retain(|kept| kept.until > now && !is_dead(&kept.connection));
            !kept.is_empty()
        });
        self.count = self.kept.values().map(Vec::len).sum();
        self.count
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NEVER: fn(&&str) -> bool = |_| false;

    #[test]
    fn the_last_that_was_given_back_is_taken_first_and_none_twice() {
        let (mut pool, now) = (Pool::default(), Instant::now());
        let later = now + Duration::from_secs(1);
        pool.put(1, "a", later, 9);
        pool.put(1, "b", later, 9);
        pool.put(2, "c", later, 9);
        let taken = [1, 1, 1, 2, 3].map(|key| pool.take(key, now, NEVER));
        assert_eq!(taken, [Some("b"), Some("a"), None, Some("c"), None]);
        assert_eq!(pool.count, 0);
    }

    #[test]
    fn a_connection_that_is_dead_or_was_idle_for_too_long_is_not_used() {
        let (mut pool, now) = (Pool::default(), Instant::now());
        let at = |seconds| now + Duration::from_secs(seconds);
        for (name, until) in [("lives", at(9)), ("dead", at(9)), ("old", at(1))] {
            pool.put(1, name, until, 9);
        }
        let is_dead = |name: &&str| *name == "dead";
        assert_eq!(pool.take(1, at(1), is_dead), Some("lives"));
        for (name, until) in [("lives", at(9)), ("dead", at(9)), ("old", at(1))] {
            pool.put(1, name, until, 9);
        }
        assert_eq!((pool.clear_out(at(1), is_dead), pool.clear_out(at(9), is_dead)), (1, 0));
        assert!(pool.kept.is_empty());
    }

    #[test]
    fn when_there_are_too_many_the_oldest_goes_whosever_it_is() {
        let (mut pool, now) = (Pool::default(), Instant::now());
        let later = now + Duration::from_secs(1);
        for (key, name) in [(1, "a"), (2, "b"), (1, "c"), (2, "d")] {
            pool.put(key, name, later, 2);
        }
        assert_eq!(pool.count, 2);
        assert_eq!([1, 1, 2, 2].map(|key| pool.take(key, now, NEVER)), [Some("c"), None, Some("d"), None]);
    }
}
