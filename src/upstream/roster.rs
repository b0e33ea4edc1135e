//! Who may be chosen now, tier by tier: made whenever that changes, off the request path, and then only read.
//!
//! Choosing must cost the same with ten endpoints and with ten thousand, so all that takes time, such as a schedule or
//! a ring, is worked out here. What may change at any moment, availability and load, is read from the endpoints with
//! each choice.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rand::Rng;
use xxhash_rust::xxh3::xxh3_64_with_seed;

use super::admission::{Admission, Engaged};
use super::balance::{Balance, Candidates, Identity};
use super::endpoint::Endpoint;
use super::slow_start;
use super::sticky::Name;
use super::tiers::{self, Plan};
use crate::config::upstream::LoadBalancing;

/// What came of a choice.
#[derive(Debug)]
pub enum Choice {
    /// This one serves.
    Engaged(Engaged),
    /// There is somebody, and all of them are full: it may wait.
    Full,
    /// There is no endpoint, or none left that was not tried.
    Nobody,
    /// None is asked, for this long.
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

/// By so much more than their share the endpoints left of a tier may carry before others serve as well: with less than
/// five of seven left, others do. It is what Envoy does by default.
const OVERPROVISIONING: f64 = 1.4;
/// Who is in which tier by a hash must have nothing to do with who is where within it by the same hash.
const TIER_SEED: u64 = 0x7469_6572;

/// The endpoints that may be chosen.
#[derive(Debug, Default)]
pub struct Roster {
    /// In the order in which they are to serve, with those of which none is available.
    tiers: Box<[Tier]>,
    /// The number of the tier, and who is there, by what sticky cookies call them.
    by_name: HashMap<Name, (usize, Arc<Endpoint>)>,
    plan: Plan,
    slow_start: Duration,
}

#[derive(Debug)]
struct Tier {
    priority: u8,
    /// Whether all serve, available or not.
    panics: bool,
    members: Box<[Arc<Endpoint>]>,
    balance: Balance,
}

impl Roster {
    /// The roster of those of `endpoints` that are available, which takes turns where `earlier` has left off.
    pub fn new(policy: &LoadBalancing, endpoints: &[Arc<Endpoint>], earlier: &Roster) -> Roster {
        let mut standing: Vec<&Arc<Endpoint>> =
            endpoints.iter().filter(|endpoint| endpoint.availability().admits_in_panic()).collect();
        standing.sort_by_key(|endpoint| endpoint.priority());
        let ranks: Vec<&[&Arc<Endpoint>]> = standing.chunk_by(|a, b| a.priority() == b.priority()).collect();
        let strengths: Vec<tiers::Tier> = ranks
            .iter()
            .map(|rank| {
                let available = rank.iter().filter(|endpoint| endpoint.availability().admits()).count();
                tiers::Tier { available, total: rank.len() }
            })
            .collect();
        let terms = tiers::Terms { overprovisioning: OVERPROVISIONING, panic: policy.panic.ratio() };
        let plan = Plan::new(&strengths, terms);
        let tiers = ranks.iter().enumerate().map(|(number, rank)| {
            let (priority, panics) = (rank[0].priority(), plan.panics(number));
            let serve = rank.iter().filter(|endpoint| panics || endpoint.availability().admits());
            let members: Box<[Arc<Endpoint>]> = serve.map(|&endpoint| Arc::clone(endpoint)).collect();
            let named = members.iter().map(|member| Identity { name: &member.identity, weight: member.weight() });
            let balance = Balance::new(policy, &named.collect::<Vec<_>>());
            let balance = match earlier.tiers.iter().find(|tier| tier.priority == priority) {
                Some(before) => balance.after(&before.balance),
                None => balance,
            };
            Tier { priority, panics, members, balance }
        });
        let tiers: Box<[Tier]> = tiers.collect();
        let by_name = tiers
            .iter()
            .enumerate()
            .flat_map(|(number, tier)| tier.members.iter().map(move |endpoint| (number, endpoint)))
            .flat_map(|(number, endpoint)| {
                endpoint.names.iter().map(move |&name| (name, (number, Arc::clone(endpoint))))
            })
            .collect();
        Roster { tiers, by_name, plan, slow_start: policy.slow_start.0 }
    }

    /// How many endpoints may be chosen.
    pub fn len(&self) -> usize {
        self.tiers.iter().map(|tier| tier.members.len()).sum()
    }

    /// Whether none may be chosen.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether some tier has so few available endpoints that all of it serves.
    pub fn panics(&self) -> bool {
        self.tiers.iter().any(|tier| tier.panics)
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

    /// The endpoint that is to serve next: of the tier whose turn it is or, if none is left there, of the first that
    /// has anybody. Should that be full, others serve that are given a share anyhow, but none that is there for when it
    /// fails.
    fn pick(&self, hash: u64, tried: &[Arc<Endpoint>], admission: &Admission, now: Instant) -> Option<&Arc<Endpoint>> {
        let preferred = self.preferred(hash);
        let others = (0..self.tiers.len()).filter(|&number| number != preferred);
        let mut left = [preferred].into_iter().chain(others).filter_map(|number| {
            let tier = self.tiers.get(number).filter(|tier| tier.has_any(tried))?;
            Some((number, tier))
        });
        let (_, first) = left.next()?;
        self.pick_of(first, hash, tried, admission, now).or_else(|| {
            let serves = left.filter(|&(number, _)| self.plan.share(number) > 0.0);
            serves.map(|(_, tier)| tier).find_map(|tier| self.pick_of(tier, hash, tried, admission, now))
        })
    }

    fn pick_of<'r>(
        &self,
        tier: &'r Tier,
        hash: u64,
        tried: &[Arc<Endpoint>],
        admission: &Admission,
        now: Instant,
    ) -> Option<&'r Arc<Endpoint>> {
        let field = Field { tier, tried, admission, now, slow_start: self.slow_start };
        let number = tier.balance.pick(hash, &field).or_else(|| {
            // All of them have just come back, and the dice were against everybody.
            let whole = Field { slow_start: Duration::ZERO, ..field };
            (!self.slow_start.is_zero()).then(|| tier.balance.pick(hash, &whole)).flatten()
        });
        tier.members.get(number?)
    }

    /// All that may be chosen.
    pub fn members(&self) -> impl Iterator<Item = &Arc<Endpoint>> {
        self.tiers.iter().flat_map(|tier| &tier.members)
    }

    /// The endpoint that sticky cookies call so, if it may be chosen and is none of `tried`.
    pub fn named(&self, name: Name, tried: &[Arc<Endpoint>]) -> Option<&Arc<Endpoint>> {
        let (tier, endpoint) = self.by_name.get(&name)?;
        admits(endpoint, self.tiers.get(*tier)?.panics, tried).then_some(endpoint)
    }

    /// The tier whose turn it is.
    fn preferred(&self, hash: u64) -> usize {
        let [_, _, ..] = *self.tiers else { return 0 };
        let throw = match self.tiers[0].balance.hashes() || self.tiers[1].balance.hashes() {
            true => (xxh3_64_with_seed(&hash.to_le_bytes(), TIER_SEED) >> 32) as u32,
            false => rand::thread_rng().r#gen(),
        };
        self.plan.tier(throw).unwrap_or(0)
    }

    /// Whether there is an endpoint that is none of `tried`.
    pub fn has_more(&self, tried: &[Arc<Endpoint>]) -> bool {
        self.tiers.iter().any(|tier| tier.has_any(tried))
    }
}

impl Tier {
    /// Whether there is an endpoint that is none of `tried`.
    fn has_any(&self, tried: &[Arc<Endpoint>]) -> bool {
        self.members.iter().any(|endpoint| admits(endpoint, self.panics, tried))
    }
}

/// The members of a tier as its policy sees them at the moment of a choice.
struct Field<'a> {
    tier: &'a Tier,
    tried: &'a [Arc<Endpoint>],
    admission: &'a Admission,
    now: Instant,
    slow_start: Duration,
}

impl Candidates for Field<'_> {
    fn inflight(&self, number: usize) -> u32 {
        self.tier.members[number].inflight()
    }

    /// Of the other tiers as well: few are busy at a time, and a sum over one would cost more the more endpoints there
    /// are.
    fn inflight_of_all(&self) -> u64 {
        self.admission.inflight().into()
    }

    fn latency(&self, number: usize) -> f64 {
        self.tier.members[number].latency(self.now)
    }

    fn admits(&self, number: usize) -> bool {
        let endpoint = &self.tier.members[number];
        self.admission.has_room(endpoint) && admits(endpoint, self.tier.panics, self.tried) && self.is_warm(endpoint)
    }
}

impl Field<'_> {
    /// Whether it is warm enough for this one: a throw of dice while it starts slowly.
    fn is_warm(&self, endpoint: &Endpoint) -> bool {
        if self.slow_start.is_zero() {
            return true;
        }
        let share = endpoint.age(self.now).map_or(1.0, |age| slow_start::share(age, self.slow_start));
        share >= 1.0 || rand::thread_rng().gen_bool(share)
    }
}

fn admits(endpoint: &Endpoint, panics: bool, tried: &[Arc<Endpoint>]) -> bool {
    let availability = endpoint.availability();
    let available = if panics { availability.admits_in_panic() } else { availability.admits() };
    available && tried.iter().all(|earlier| earlier.address != endpoint.address)
}
