//! The idle connections to endpoints that a worker keeps.
//!
//! They belong to the thread: to take one or to give one back takes neither a lock nor a task nor a turn of the event
//! loop. One that its endpoint has closed shows by the readiness that tokio knows of anyway. While there are any, one
//! task of the worker looks after all of them in intervals, and closes those that are dead, have been idle for too long
//! or lead to an endpoint that was removed.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use super::connection::Connection;

/// How often idle connections are checked.
const INTERVAL: Duration = Duration::from_millis(250);
/// One that may be idle for less is not kept.
const LEAST_IDLE: Duration = Duration::from_millis(10);
/// For how long one is kept where nothing is said of it.
const MOST_IDLE: Duration = Duration::from_secs(24 * 3600);

thread_local! {
    static POOL: RefCell<Pool<Connection>> = RefCell::default();
}

/// A connection that was kept for this key and is alive, if there is one.
pub fn take(key: u64) -> Option<Connection> {
    POOL.with_borrow_mut(|pool| pool.take(key, Instant::now(), Connection::is_dead))
}

/// Keeps a connection for this key, for as long as it may be idle. A worker keeps `most` of them; the one that nobody
/// has used for longest makes room.
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

/// Ends once nothing is kept.
async fn look_after() {
    /// Whoever comes later begins anew, also where the runtime ends before this does.
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

/// What is kept: connections by who may use them, in the order in which they were given back.
struct Pool<C> {
    kept: BTreeMap<u64, Vec<Kept<C>>>,
    count: usize,
    /// How often something was kept.
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
    /// The one that was given back last, if it is alive: it is the least likely to be closed meanwhile.
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

    /// Drops what is dead or too old; says how many are left.
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
