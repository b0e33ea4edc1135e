//! Who may be chosen now, tier by tier: made whenever that changes, off the request path, and then only read.
//!
//! Choosing must cost the same with ten endpoints and with ten thousand, so all that takes time, such as a schedule or a
//! ring, is worked out here. What may change at any moment, availability and load, is read from the endpoints with each choice.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::admission::{Admission, Engaged};
use super::balance::{Balance, Candidates, Identity};
use super::endpoint::Endpoint;
use super::sticky::Name;
use crate::config::upstream::LoadBalancing;

/// What came of a choice.
#[derive(Debug)]
pub enum Choice {
    /// This one serves.
    Engaged(Engaged),
    /// There is somebody, and all of them are full: it may wait.
    Full,
    /// There is nobody, or nobody left that was not tried.
    Nobody,
    /// Nobody is asked, for so long.
    Away(Duration),
}

impl Choice {
    /// The one that serves, if any does.
    pub fn engaged(self) -> Option<Engaged> {
        match self {
            Choice::Engaged(engaged) => Some(engaged),
            Choice::Full | Choice::Nobody | Choice::Away(_) => None,
        }
    }
}

/// The endpoints that may be chosen.
#[derive(Debug, Default)]
pub struct Roster {
    /// In the order in which they are to serve; none of them is empty.
    tiers: Box<[Tier]>,
    /// The same by what sticky cookies call them.
    by_name: HashMap<Name, Arc<Endpoint>>,
}

#[derive(Debug)]
struct Tier {
    priority: u8,
    members: Box<[Arc<Endpoint>]>,
    balance: Balance,
}

impl Roster {
    /// The roster of those of `endpoints` that are available, which takes turns where `earlier` has left off.
    pub fn new(policy: &LoadBalancing, endpoints: &[Arc<Endpoint>], earlier: &Roster) -> Roster {
        let mut available: Vec<&Arc<Endpoint>> =
            endpoints.iter().filter(|endpoint| endpoint.availability().admits()).collect();
        available.sort_by_key(|endpoint| endpoint.priority());
        let tiers = available.chunk_by(|a, b| a.priority() == b.priority()).map(|members| {
            let priority = members[0].priority();
            let named = members.iter().map(|member| Identity { name: &member.identity, weight: member.weight() });
            let balance = Balance::new(policy, &named.collect::<Vec<_>>());
            let before = earlier.tiers.iter().find(|tier| tier.priority == priority);
            let balance = match before {
                Some(before) => balance.after(&before.balance),
                None => balance,
            };
            Tier { priority, members: members.iter().map(|&member| Arc::clone(member)).collect(), balance }
        });
        let tiers = tiers.collect();
        let by_name = available
            .iter()
            .flat_map(|&endpoint| endpoint.names.iter().map(move |&name| (name, Arc::clone(endpoint))))
            .collect();
        Roster { tiers, by_name }
    }

    /// How many endpoints may be chosen.
    pub fn len(&self) -> usize {
        self.tiers.iter().map(|tier| tier.members.len()).sum()
    }

    /// Whether nobody may be chosen.
    pub fn is_empty(&self) -> bool {
        self.tiers.is_empty()
    }

    /// Takes a place at the endpoint that is to serve next, which is none of `tried`.
    pub fn engage(&self, hash: u64, tried: &[Arc<Endpoint>], admission: &Arc<Admission>, now: Instant) -> Choice {
        loop {
            let endpoint = if admission.is_full() { None } else { self.pick(hash, tried, admission, now) };
            let Some(endpoint) = endpoint else {
                return if self.has_more(tried) { Choice::Full } else { Choice::Nobody };
            };
            // If somebody else has just taken its last place, there is another one or all are full.
            if let Some(engaged) = admission.engage(endpoint) {
                return Choice::Engaged(engaged);
            }
        }
    }

    /// The endpoint that is to serve next. Only the first tier that has anybody left is asked: that it is full does not make the
    /// next one serve, which is there for when it fails.
    fn pick(&self, hash: u64, tried: &[Arc<Endpoint>], admission: &Admission, now: Instant) -> Option<&Arc<Endpoint>> {
        let tier = self.tiers.iter().find(|tier| tier.members.iter().any(|endpoint| admits(endpoint, tried)))?;
        let number = tier.balance.pick(hash, &Field { members: &tier.members, tried, admission, now })?;
        tier.members.get(number)
    }

    /// All that may be chosen.
    pub fn members(&self) -> impl Iterator<Item = &Arc<Endpoint>> {
        self.tiers.iter().flat_map(|tier| &tier.members)
    }

    /// The endpoint that sticky cookies call so, if it may be chosen and is none of `tried`.
    pub fn named(&self, name: Name, tried: &[Arc<Endpoint>]) -> Option<&Arc<Endpoint>> {
        self.by_name.get(&name).filter(|endpoint| admits(endpoint, tried))
    }

    /// Whether there is an endpoint that is none of `tried`.
    pub fn has_more(&self, tried: &[Arc<Endpoint>]) -> bool {
        self.members().any(|endpoint| admits(endpoint, tried))
    }
}

/// The members of a tier as its policy sees them at the moment of a choice.
struct Field<'a> {
    members: &'a [Arc<Endpoint>],
    tried: &'a [Arc<Endpoint>],
    admission: &'a Admission,
    now: Instant,
}

impl Candidates for Field<'_> {
    fn inflight(&self, number: usize) -> u32 {
        self.members[number].inflight()
    }

    /// Of the other tiers as well: few are busy at a time, and a sum over one would cost more the more endpoints there are.
    fn inflight_of_all(&self) -> u64 {
        self.admission.inflight().into()
    }

    fn latency(&self, number: usize) -> f64 {
        self.members[number].latency(self.now)
    }

    fn admits(&self, number: usize) -> bool {
        let endpoint = &self.members[number];
        self.admission.has_room(endpoint) && admits(endpoint, self.tried)
    }
}

fn admits(endpoint: &Endpoint, tried: &[Arc<Endpoint>]) -> bool {
    endpoint.availability().admits() && tried.iter().all(|earlier| earlier.address != endpoint.address)
}
