//! What one client, and one answer, may have of that which all share, the fuller it is: pure arithmetic.
//!
//! Answers together have no more than their share of the disk: the endpoint of one that finds no room waits for its
//! client, which costs a backend, but an upload that finds none is refused; so what is beyond the share of answers is
//! for uploads alone. One client has no more than its share either, in each direction.
//!
//! Within these, the fuller it is the less each may have: so much in proportion to what is free. That is how switches
//! share a buffer between ports ("dynamic thresholds"), and it has two effects. However many take as much as they can,
//! something is left for the next to come. And who holds most is the first to get no more: of the answers, those whose
//! clients are slowest.

/// Which limit stands against more; in the order of [`SPOOL_LIMITS`](crate::metrics::SPOOL_LIMITS).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Denial {
    /// That of all together.
    All,
    /// That of answers.
    Answers,
    /// That of one client.
    Client,
    /// That of one answer, where others need room as well.
    Spool,
    /// That of files, of all or of answers.
    Files,
}

/// What one client alone may have of the connections that the open files allow. Others, who have come by then, leave it
/// less.
pub const CONNECTIONS_OF_ONE_CLIENT: f64 = 0.75;

/// A store that all share.
#[derive(Clone, Copy, Debug)]
pub struct Store {
    /// What all may have.
    pub limit: u64,
    /// What answers may have of it.
    pub answers: u64,
    /// How much one client may have for each that is left free.
    pub client_factor: f64,
}

/// What is in use.
#[derive(Clone, Copy, Debug, Default)]
pub struct InUse {
    /// By all.
    pub all: u64,
    /// By answers; only looked at for one of these.
    pub answers: u64,
    /// By the client, in this direction.
    pub client: u64,
    /// By the answer.
    pub spool: u64,
}

impl Store {
    /// A store of so much, of which answers may have a share, and one client alone a share of what its direction may
    /// have. Shares are ratios.
    pub fn new(limit: u64, answers: f64, client: f64) -> Store {
        let client = client.clamp(0.0, 1.0);
        // With nobody else, `client = factor × (all - client)`.
        let client_factor = if client < 1.0 { client / (1.0 - client) } else { f64::INFINITY };
        Store { limit, answers: (limit as f64 * answers.clamp(0.0, 1.0)) as u64, client_factor }
    }

    /// Whether so much more may be taken, by a client that has this much already. Who has nothing yet is not limited as
    /// one of many.
    pub fn admits(&self, all: u64, client: u64, more: u64) -> Result<(), Denial> {
        self.admits_upload(InUse { all, client, ..InUse::default() }, more)
    }

    /// Whether so much more may be taken for an upload.
    pub fn admits_upload(&self, used: InUse, more: u64) -> Result<(), Denial> {
        let free = left(self.limit, used.all, more).ok_or(Denial::All)?;
        self.admits_client(used, more, free)
    }

    /// Whether so much more may be taken for an answer.
    pub fn admits_answer(&self, used: InUse, more: u64) -> Result<(), Denial> {
        let free = left(self.limit, used.all, more).ok_or(Denial::All)?;
        let free = free.min(left(self.answers, used.answers, more).ok_or(Denial::Answers)?);
        self.admits_client(used, more, free)?;
        let too_much = used.spool > 0 && used.spool.saturating_add(more) > free;
        if too_much { Err(Denial::Spool) } else { Ok(()) }
    }

    fn admits_client(&self, used: InUse, more: u64, free: u64) -> Result<(), Denial> {
        let most = self.client_factor * free as f64;
        // Infinity times nothing is not a number, and limits nothing either.
        let too_much = used.client > 0 && used.client.saturating_add(more) as f64 > most;
        if too_much { Err(Denial::Client) } else { Ok(()) }
    }
}

/// What is left of a limit when so much more is taken; `None`: it does not go that far.
fn left(limit: u64, used: u64, more: u64) -> Option<u64> {
    limit.checked_sub(used)?.checked_sub(more)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MIB: u64 = 1 << 20;
    const STORE: Store = Store { limit: 1_000, answers: 800, client_factor: 4.0 };

    /// Clients that take in turns, in pieces, as much as they get; what each has then.
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
        // Sixteen readers that take nothing, of different clients, leave room for one that has only begun.
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
