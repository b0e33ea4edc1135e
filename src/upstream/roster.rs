//! The available endpoints by tier: rebuilt off the request path when they change, and otherwise read-only.
//!
//! A choice must cost the same with ten endpoints and with ten thousand, so expensive structures, such as a
//! schedule or a ring, are built here. Availability and load may change at any time and are read from the endpoints
//! for each choice.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rand::Rng;
use xxhash_rust::xxh3::xxh3_64_with_seed;

use super::admission::{Admission, EndpointLease};
use super::balance::{Balance, Candidates, Identity};
use super::endpoint::Endpoint;
use super::slow_start;
use super::sticky::Name;
use super::tiers::{self, Plan};
use crate::config::upstream::LoadBalancing;

/// The result of a choice.
#[derive(Debug)]
pub enum Choice {
    /// This endpoint.
    Leased(EndpointLease),
    /// All endpoints are at their limits: the exchange may queue.
    Full,
    /// There is no endpoint, or none that was not tried.
    NoEndpoint,
    /// The circuit breaker is open for this long.
    Away(Duration),
}

impl Choice {
    /// The endpoint, if there is one.
    pub fn lease(self) -> Option<EndpointLease> {
        match self {
            Choice::Leased(lease) => Some(lease),
            Choice::Full | Choice::NoEndpoint | Choice::Away(_) => None,
        }
    }
}

/// Overprovisioning factor: with less than five of seven endpoints available, further tiers serve as well. As in
/// Envoy's default.
const OVERPROVISIONING: f64 = 1.4;
/// The choice of the tier and the choice within it must be independent, although both use the same hash.
const TIER_SEED: u64 = 0x7469_6572;

/// The available endpoints.
#[derive(Debug, Default)]
pub struct Roster {
    /// In order of preference, including tiers without available endpoints.
    tiers: Box<[Tier]>,
    /// The tier and the endpoint for each name in sticky cookies.
    by_name: HashMap<Name, (usize, Arc<Endpoint>)>,
    plan: Plan,
    slow_start: Duration,
}

#[derive(Debug)]
struct Tier {
    priority: u8,
    /// Panic mode: all endpoints serve, available or not.
    panics: bool,
    members: Box<[Arc<Endpoint>]>,
    balance: Balance,
}

impl Roster {
    /// The roster of the available `endpoints`, which continues the rotation of `earlier`.
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

    /// Number of available endpoints.
    pub fn len(&self) -> usize {
        self.tiers.iter().map(|tier| tier.members.len()).sum()
    }

    /// Whether no endpoint is available.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether any tier is in panic mode.
    pub fn panics(&self) -> bool {
        self.tiers.iter().any(|tier| tier.panics)
    }

    /// Takes a place at the next endpoint, excluding `tried`.
    pub fn lease(&self, hash: u64, tried: &[Arc<Endpoint>], admission: &Arc<Admission>, now: Instant) -> Choice {
        loop {
            let endpoint = if admission.is_full() { None } else { self.pick(hash, tried, admission, now) };
            let Some(endpoint) = endpoint else {
                return if self.has_more(tried) { Choice::Full } else { Choice::NoEndpoint };
            };
            // If another exchange has just taken its last place, there is another endpoint or all are full.
            if let Some(lease) = admission.lease(endpoint) {
                return Choice::Leased(lease);
            }
        }
    }

    /// The next endpoint: from the chosen tier or, if all of it were tried, the first tier with an endpoint left.
    /// If the tier is full, other tiers serve that have a share anyway, but not backups for its failure.
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
            // All of them are in slow start, and the random choice rejected each one.
            let whole = Field { slow_start: Duration::ZERO, ..field };
            (!self.slow_start.is_zero()).then(|| tier.balance.pick(hash, &whole)).flatten()
        });
        tier.members.get(number?)
    }

    /// All available endpoints.
    pub fn members(&self) -> impl Iterator<Item = &Arc<Endpoint>> {
        self.tiers.iter().flat_map(|tier| &tier.members)
    }

    /// The endpoint with this name in sticky cookies, if it is available and not in `tried`.
    pub fn named(&self, name: Name, tried: &[Arc<Endpoint>]) -> Option<&Arc<Endpoint>> {
        let (tier, endpoint) = self.by_name.get(&name)?;
        admits(endpoint, self.tiers.get(*tier)?.panics, tried).then_some(endpoint)
    }

    /// The tier for this exchange.
    fn preferred(&self, hash: u64) -> usize {
        let [_, _, ..] = *self.tiers else { return 0 };
        let throw = match self.tiers[0].balance.hashes() || self.tiers[1].balance.hashes() {
            true => (xxh3_64_with_seed(&hash.to_le_bytes(), TIER_SEED) >> 32) as u32,
            false => rand::thread_rng().r#gen(),
        };
        self.plan.tier(throw).unwrap_or(0)
    }

    /// Whether there is an endpoint that is not in `tried`.
    pub fn has_more(&self, tried: &[Arc<Endpoint>]) -> bool {
        self.tiers.iter().any(|tier| tier.has_any(tried))
    }
}

impl Tier {
    /// Whether there is an endpoint that is not in `tried`.
    fn has_any(&self, tried: &[Arc<Endpoint>]) -> bool {
        self.members.iter().any(|endpoint| admits(endpoint, self.panics, tried))
    }
}

/// The members of a tier, as its policy sees them during a choice.
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

    /// Includes the other tiers: usually only one is busy, and a sum over one tier would cost time for each
    /// endpoint.
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
    /// Whether it is warm enough for this exchange: random during slow start.
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
