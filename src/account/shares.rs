//! Limits one client and one response to a part of a shared store, which shrinks as the store fills. Pure arithmetic.
//!
//! All responses together have a share of the disk. A response without room makes its endpoint wait for the client,
//! which costs a backend; an upload without room is refused. The rest beyond the responses' share is therefore for
//! uploads only. One client has a share, too, in each direction.
//!
//! Within these shares, each limit is proportional to the free space. Switches divide their buffers between ports in
//! this way ("dynamic thresholds"). It has two effects: however many take as much as they can, some space is left for
//! newcomers; and the largest holder reaches its limit first, which among responses is the one with the slowest client.

/// The limit that denies more; in the order of [`SPOOL_LIMITS`](crate::metrics::SPOOL_LIMITS).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Denial {
    /// The limit of all spools together.
    All,
    /// The limit of responses.
    Answers,
    /// The limit of one client.
    Client,
    /// The limit of one response while others need room, too.
    Spool,
    /// The limit of files, of all spools or of responses.
    Files,
}

/// The share of the client connections that one client alone may have. With connections of other clients, it is less.
pub const CONNECTIONS_OF_ONE_CLIENT: f64 = 0.75;

/// A shared store.
#[derive(Clone, Copy, Debug)]
pub struct Store {
    /// Total limit.
    pub limit: u64,
    /// Limit of responses.
    pub answers: u64,
    /// Units that one client may have per free unit.
    pub client_factor: f64,
}

/// The units in use.
#[derive(Clone, Copy, Debug, Default)]
pub struct InUse {
    /// By all spools.
    pub all: u64,
    /// By responses; used only for a response.
    pub answers: u64,
    /// By the client, in this direction.
    pub client: u64,
    /// By the response.
    pub spool: u64,
}

impl Store {
    /// A store with this limit. `answers` is the share of responses, `client` the share of its direction that one
    /// client alone may have; both are ratios.
    pub fn new(limit: u64, answers: f64, client: f64) -> Store {
        let client = client.clamp(0.0, 1.0);
        // For a single client, `client = factor × (all - client)`.
        let client_factor = if client < 1.0 { client / (1.0 - client) } else { f64::INFINITY };
        Store { limit, answers: (limit as f64 * answers.clamp(0.0, 1.0)) as u64, client_factor }
    }

    /// Whether a client that has `client` units may take `more`. A client without any is not limited by its own share.
    pub fn admits(&self, all: u64, client: u64, more: u64) -> Result<(), Denial> {
        self.admits_upload(InUse { all, client, ..InUse::default() }, more)
    }

    /// Whether an upload may take `more` units.
    pub fn admits_upload(&self, used: InUse, more: u64) -> Result<(), Denial> {
        let free = left(self.limit, used.all, more).ok_or(Denial::All)?;
        self.admits_client(used, more, free)
    }

    /// Whether a response may take `more` units.
    pub fn admits_answer(&self, used: InUse, more: u64) -> Result<(), Denial> {
        let free = left(self.limit, used.all, more).ok_or(Denial::All)?;
        let free = free.min(left(self.answers, used.answers, more).ok_or(Denial::Answers)?);
        self.admits_client(used, more, free)?;
        let too_much = used.spool > 0 && used.spool.saturating_add(more) > free;
        if too_much { Err(Denial::Spool) } else { Ok(()) }
    }

    fn admits_client(&self, used: InUse, more: u64, free: u64) -> Result<(), Denial> {
        let most = self.client_factor * free as f64;
        // Infinity times zero is NaN, which sets no limit here, either.
        let too_much = used.client > 0 && used.client.saturating_add(more) as f64 > most;
        if too_much { Err(Denial::Client) } else { Ok(()) }
    }
}

/// The rest of a limit after taking `more`; `None`: the limit would be exceeded.
fn left(limit: u64, used: u64, more: u64) -> Option<u64> {
    limit.checked_sub(used)?.checked_sub(more)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MIB: u64 = 1 << 20;
    const STORE: Store = Store { limit: 1_000, answers: 800, client_factor: 4.0 };

    /// The units of each client after all took pieces in turn until the limits.
    fn greedy(store: &Store, clients: usize, spools: usize, piece: u64, answers: bool) -> Vec<u64> {
        let mut has = vec![vec![0_u64; spools]; clients];
        loop {
            let before = has.clone();
            for client in 0..clients {
                for spool in 0..spools {
                    let all = has.iter().flatten().sum();
                    let used = InUse { all, answers: all, client: has[client].iter().sum(), spool: has[client][spool] };
                    let asked =
                        if answers { store.admits_answer(used, piece) } else { store.admits_upload(used, piece) };
                    has[client][spool] += if asked.is_ok() { piece } else { 0 };
                }
            }
            if has == before {
                return has.into_iter().map(|spools| spools.into_iter().sum()).collect();
            }
        }
    }

    #[test]
    fn answers_stop_at_their_share_and_uploads_go_on() {
        let used = InUse { all: 790, answers: 790, client: 0, spool: 0 };
        assert_eq!(STORE.admits_answer(used, 11), Err(Denial::Answers));
        assert_eq!(STORE.admits_upload(used, 40), Ok(()));
        let full = InUse { all: 1_000, answers: 800, ..used };
        assert_eq!(STORE.admits_answer(full, 1), Err(Denial::All));
        assert_eq!(STORE.admits_upload(full, 1), Err(Denial::All));
        assert_eq!(STORE.admits_upload(InUse::default(), u64::MAX), Err(Denial::All));
    }

    #[test]
    fn one_client_alone_has_its_share_and_no_more() {
        let store = Store::new(1_000, 0.8, 0.75);
        assert_eq!(greedy(&store, 1, 3, 1, false), [750]);
        assert_eq!(greedy(&store, 1, 1_000, 1, true), [600]);
    }

    #[test]
    fn the_more_clients_there_are_the_less_each_has_and_something_is_left_for_the_next() {
        let store = Store::new(1_000 * MIB, 0.8, 0.8);
        for clients in [2, 10, 100] {
            let has = greedy(&store, clients, 1, MIB, false);
            let (least, most) = (has.iter().min().unwrap(), has.iter().max().unwrap());
            assert!(most - least <= MIB, "{clients}: {has:?}");
            let all: u64 = has.iter().sum();
            assert!(store.admits_upload(InUse { all, ..InUse::default() }, MIB).is_ok(), "{clients}: {all}");
        }
    }

    #[test]
    fn who_holds_most_is_the_first_to_be_held() {
        // Sixteen stalled readers of different clients leave room for one that has just begun.
        let store = Store::new(8 << 30, 0.8, 1.0);
        let slow = greedy(&store, 16, 1, 256 << 10, true);
        let all: u64 = slow.iter().sum();
        assert!(slow.iter().all(|has| has.abs_diff(slow[0]) <= 256 << 10));
        let of = |spool| store.admits_answer(InUse { all, answers: all, client: spool, spool }, 256 << 10);
        assert_eq!((of(0), of(slow[0])), (Ok(()), Err(Denial::Spool)));
    }

    #[test]
    fn who_has_nothing_yet_gets_the_last_piece_and_who_has_something_does_not() {
        assert_eq!(STORE.admits(999, 0, 1), Ok(()));
        assert_eq!(STORE.admits(999, 1, 1), Err(Denial::Client));
        assert_eq!(STORE.admits(1_000, 0, 1), Err(Denial::All));
    }

    #[test]
    fn a_share_of_everything_limits_nothing() {
        let store = Store::new(1_000, 1.0, 1.0);
        assert_eq!(store.admits_upload(InUse { all: 999, client: 999, ..InUse::default() }, 1), Ok(()));
        assert_eq!(greedy(&store, 1, 1, 1, false), [1_000]);
    }

    proptest! {
        #[test]
        fn nothing_is_admitted_beyond_the_limits(
            limit in 0..10_000_u64, answers in 0.0..=1.0_f64, client in 0.0..=1.0_f64,
            used in 0..10_000_u64, more in 0..10_000_u64,
        ) {
            let store = Store::new(limit, answers, client);
            let used = InUse { all: used, answers: used, client: used, spool: used };
            if store.admits_upload(used, more).is_ok() {
                prop_assert!(used.all + more <= limit);
                prop_assert!(used.client == 0 || (used.client + more) as f64 <= client * limit as f64 + 1.0);
            }
            if store.admits_answer(used, more).is_ok() {
                prop_assert!(used.answers + more <= store.answers);
                prop_assert!(store.admits_upload(used, more).is_ok());
            }
        }
    }
}
