//! The share of each client address in shared resources: connections, active requests, and held bytes.
//!
//! One IPv4 address is one client, and so is one IPv6 network ([`ClientPrefix`]): a client with one of its addresses
//! usually has all of them. A connection looks its account up once and keeps it; an account is freed with its last
//! holder. Addresses that act for many clients have no account: trusted proxies, and Unix sockets, which have no
//! address.

pub mod pool;
pub mod shares;

use std::collections::HashMap;
use std::fmt;
use std::hash::{BuildHasher, RandomState};
use std::net::IpAddr;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use arc_swap::ArcSwap;
use ipnet::IpNet;

use crate::config::address::{ClientPrefix, Proxy};
use crate::metrics::Direction;
use pool::Held;

/// Number of locks that share the accounts, so that workers rarely contend.
const SHARDS: usize = 16;

/// The accounts of all connected clients.
pub struct Accounts {
    terms: ArcSwap<Terms>,
    /// Highest number of listeners so far.
    listeners: AtomicUsize,
    shards: [Mutex<HashMap<IpAddr, Weak<Account>>>; SHARDS],
    seed: RandomState,
}

/// The rules for which addresses are one client, and which have no account.
struct Terms {
    prefix: ClientPrefix,
    /// Addresses that act for many clients.
    exempt: Vec<IpNet>,
}

impl Terms {
    fn new(prefix: ClientPrefix, exempt: &[Proxy]) -> Terms {
        let networks = exempt.iter().filter_map(|proxy| match proxy {
            Proxy::Network(network) => Some(*network),
            Proxy::Unix => None,
        });
        Terms { prefix, exempt: networks.collect() }
    }
}

impl Accounts {
    /// Creates an empty set. Each of the `listeners` has its own limits; addresses of `exempt` proxies have no account.
    pub fn new(prefix: ClientPrefix, exempt: &[Proxy], listeners: usize) -> Arc<Self> {
        let terms = ArcSwap::from_pointee(Terms::new(prefix, exempt));
        let shards = std::array::from_fn(|_| Mutex::default());
        Arc::new(Accounts { terms, listeners: AtomicUsize::new(listeners), shards, seed: RandomState::new() })
    }

    /// Changes the rules; existing connections keep their accounts.
    pub fn set_terms(&self, prefix: ClientPrefix, exempt: &[Proxy]) {
        self.terms.store(Arc::new(Terms::new(prefix, exempt)));
    }

    /// Announces a listener with this number.
    pub fn has_listener(&self, number: usize) {
        self.listeners.fetch_max(number + 1, Ordering::Relaxed);
    }

    /// The account of the client at this address; `None` if the address acts for many clients.
    pub fn of(self: &Arc<Self>, address: IpAddr) -> Option<Arc<Account>> {
        let address = address.to_canonical();
        let terms = self.terms.load();
        if terms.exempt.iter().any(|network| network.contains(&address)) {
            return None;
        }
        let client = terms.prefix.client(address);
        let mut accounts = self.shard(client);
        if let Some(known) = accounts.get(&client).and_then(Weak::upgrade) {
            return Some(known);
        }
        let tallies = (0..self.listeners.load(Ordering::Relaxed)).map(|_| Tally::default()).collect();
        let more = Mutex::default();
        let account = Arc::new(Account { client, tallies, more, held: Default::default(), accounts: self.clone() });
        accounts.insert(client, Arc::downgrade(&account));
        Some(account)
    }

    /// Number of accounts.
    pub fn count(&self) -> usize {
        self.shards.iter().map(|shard| lock(shard).len()).sum()
    }

    fn shard(&self, client: IpAddr) -> MutexGuard<'_, HashMap<IpAddr, Weak<Account>>> {
        lock(&self.shards[(self.seed.hash_one(client) % SHARDS as u64) as usize])
    }
}

/// Each connection locks at its start and at its end, for one look-up.
fn lock<T>(shard: &Mutex<T>) -> MutexGuard<'_, T> {
    shard.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The resources that one client uses.
pub struct Account {
    client: IpAddr,
    /// Counts for each listener that existed when the account was opened.
    tallies: Box<[Tally]>,
    /// Counts for listeners added since, by number; locked for a look-up.
    more: Mutex<Vec<(usize, Arc<Tally>)>>,
    /// Held body bytes, by direction.
    held: [Held; 2],
    accounts: Arc<Accounts>,
}

#[derive(Default)]
struct Tally {
    connections: AtomicU64,
    handshakes: AtomicU64,
    requests: AtomicU64,
}

/// A resource that is limited per client and listener.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Quota {
    /// Open connections.
    Connections,
    /// TLS handshakes in progress.
    Handshakes,
    /// Active requests.
    Requests,
}

impl Account {
    /// The client: the first address of its network.
    pub fn client(&self) -> IpAddr {
        self.client
    }

    /// Counts one more use at the listener of this number; `None` if the limit `most` is reached.
    pub fn enter(self: &Arc<Self>, what: Quota, listener: usize, most: u64) -> Option<Counting> {
        let more = |count: u64| (count < most).then_some(count + 1);
        let entered =
            self.at(listener, |tally| tally.of(what).fetch_update(Ordering::Relaxed, Ordering::Relaxed, more).is_ok());
        entered.then(|| Counting { account: self.clone(), what, listener })
    }

    /// Bytes of the client's bodies that spools hold.
    pub fn held(&self, direction: Direction) -> &Held {
        &self.held[direction as usize]
    }

    /// Number of uses at all listeners.
    pub fn count(&self, what: Quota) -> u64 {
        let count = |tally: &Tally| tally.of(what).load(Ordering::Relaxed);
        let more: u64 = lock(&self.more).iter().map(|(_, tally)| count(tally)).sum();
        self.tallies.iter().map(count).sum::<u64>() + more
    }

    fn at<T>(&self, listener: usize, then: impl FnOnce(&Tally) -> T) -> T {
        if let Some(tally) = self.tallies.get(listener) {
            return then(tally);
        }
        let mut more = lock(&self.more);
        let known = more.iter().find(|(number, _)| *number == listener).map(|(_, tally)| tally.clone());
        let tally = known.unwrap_or_else(|| {
            let tally = Arc::<Tally>::default();
            more.push((listener, tally.clone()));
            tally
        });
        drop(more);
        then(&tally)
    }
}

impl Tally {
    fn of(&self, what: Quota) -> &AtomicU64 {
        match what {
            Quota::Connections => &self.connections,
            Quota::Handshakes => &self.handshakes,
            Quota::Requests => &self.requests,
        }
    }
}

impl fmt::Debug for Account {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Account").field(&self.client).finish()
    }
}

impl Drop for Account {
    fn drop(&mut self) {
        let mut accounts = self.accounts.shard(self.client);
        // Another account may have been opened after the last holder of this one was dropped.
        if accounts.get(&self.client).is_some_and(|known| known.strong_count() == 0) {
            accounts.remove(&self.client);
        }
    }
}

/// One counted use; released on drop.
pub struct Counting {
    account: Arc<Account>,
    what: Quota,
    listener: usize,
}

impl Counting {
    /// The account of this use.
    pub fn account(&self) -> &Arc<Account> {
        &self.account
    }
}

impl Drop for Counting {
    fn drop(&mut self) {
        self.account.at(self.listener, |tally| tally.of(self.what).fetch_sub(1, Ordering::Relaxed));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn accounts(exempt: &[&str]) -> Arc<Accounts> {
        let exempt: Vec<Proxy> = exempt.iter().map(|network| network.parse().unwrap()).collect();
        Accounts::new(ClientPrefix::default(), &exempt, 2)
    }

    fn account(accounts: &Arc<Accounts>, address: &str) -> Arc<Account> {
        accounts.of(address.parse().unwrap()).unwrap()
    }

    #[test]
    fn a_client_may_have_so_many_at_each_listener_and_gives_them_back() {
        let accounts = accounts(&[]);
        let account = account(&accounts, "192.0.2.1");
        let enter = |listener| account.enter(Quota::Connections, listener, 2);
        let (first, second) = (enter(0), enter(0));
        assert!(first.is_some() && second.is_some() && enter(0).is_none());
        assert!(enter(1).is_some(), "another listener");
        assert!(account.enter(Quota::Requests, 0, 1).is_some(), "requests are counted apart");
        drop(first);
        assert!(enter(0).is_some(), "a place that is given back");
        let third = account.enter(Quota::Connections, 1, u64::MAX);
        assert_eq!((account.count(Quota::Connections), account.count(Quota::Requests)), (2, 0));
        drop((second, third));
        assert_eq!(account.count(Quota::Connections), 0);
    }

    #[test]
    fn a_listener_that_is_added_has_limits_of_its_own_for_clients_that_are_known() {
        let accounts = accounts(&[]);
        let account = account(&accounts, "192.0.2.1");
        let before = account.enter(Quota::Connections, 1, 1);
        accounts.has_listener(7);
        let enter = || account.enter(Quota::Connections, 7, 1);
        let first = enter();
        assert!(before.is_some() && first.is_some() && enter().is_none());
        assert_eq!(account.count(Quota::Connections), 2);
        drop(first);
        assert!(enter().is_some());
    }

    #[test]
    fn all_addresses_of_an_ipv6_network_have_one_account_between_them() {
        let accounts = accounts(&[]);
        let one = account(&accounts, "2001:db8:0:1::1");
        assert!(Arc::ptr_eq(&one, &account(&accounts, "2001:db8:0:1:ffff:ffff:ffff:ffff")));
        assert!(!Arc::ptr_eq(&one, &account(&accounts, "2001:db8:0:2::1")));
        let four = account(&accounts, "192.0.2.1");
        assert!(Arc::ptr_eq(&four, &account(&accounts, "::ffff:192.0.2.1")));
        assert!(!Arc::ptr_eq(&four, &account(&accounts, "192.0.2.2")));
    }

    #[test]
    fn all_addresses_of_an_ipv4_network_have_one_account_where_that_is_written() {
        let accounts = accounts(&[]);
        let one = account(&accounts, "192.0.2.1");
        accounts.set_terms(ClientPrefix { v4: "24".parse().unwrap(), ..ClientPrefix::default() }, &[]);
        let other = account(&accounts, "192.0.2.1");
        assert!(!Arc::ptr_eq(&one, &other) && Arc::ptr_eq(&other, &account(&accounts, "192.0.2.255")));
        assert!(!Arc::ptr_eq(&other, &account(&accounts, "192.0.3.1")));
        assert_eq!(other.client().to_string(), "192.0.2.0");
    }

    #[test]
    fn who_speaks_for_many_has_none() {
        let accounts = accounts(&["10.0.0.0/8", "fd00::/8"]);
        for address in ["10.1.2.3", "::ffff:10.1.2.3", "fd00::1"] {
            assert!(accounts.of(address.parse().unwrap()).is_none(), "{address}");
        }
        assert!(accounts.of("11.1.2.3".parse().unwrap()).is_some());
    }

    #[test]
    fn an_account_is_gone_with_the_last_who_keeps_it() {
        let accounts = accounts(&[]);
        let (one, other) = (account(&accounts, "192.0.2.1"), account(&accounts, "192.0.2.2"));
        let counted = one.enter(Quota::Connections, 0, 9);
        drop((one, other));
        assert_eq!(accounts.count(), 1, "what is counted keeps it");
        drop(counted);
        assert_eq!(accounts.count(), 0);
    }

    #[test]
    fn accounts_that_come_and_go_on_many_threads_count_right() {
        let accounts = accounts(&[]);
        let most = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..4)
                .map(|_| {
                    scope.spawn(|| {
                        let one = |n: u32| {
                            let counted = account(&accounts, ["192.0.2.1", "::1"][n as usize % 2]);
                            let counted = counted.enter(Quota::Requests, 0, 3);
                            let seen = counted.as_ref().map(|counted| counted.account().count(Quota::Requests));
                            seen.unwrap_or_default()
                        };
                        (0..20_000).map(one).max().unwrap()
                    })
                })
                .collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).max().unwrap()
        });
        assert!((1..=3).contains(&most), "{most}");
        assert_eq!(accounts.count(), 0);
    }
}
