//! The cost of selecting an endpoint: each policy alone, Pingora's `LoadBalancer` with the schedule, and the complete
//! `select`.
//!
//! `cargo bench --bench balance`

use std::hint::black_box;
use std::num::{NonZeroU32, NonZeroU64};
use std::sync::Arc;
use std::sync::atomic::AtomicU32;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Instant;

use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use forebay::config::upstream::LoadBalancing;
use forebay::config::upstream::balance::Policy;
use forebay::gateway::Gateway;
use forebay::metrics::Metrics;
use forebay::upstream::Upstream;
use forebay::upstream::balance::{Balance, Candidates, Identity, Schedule, SmoothRoundRobin};
use forebay::upstream::sticky::StickyTarget;
use futures::FutureExt;
use http::Extensions;
use pingora_load_balancing::selection::{BackendIter, BackendSelection, RoundRobin};
use pingora_load_balancing::{Backend, Backends, LoadBalancer, discovery};

const SIZES: [usize; 3] = [1, 10, 10_000];

fn address(number: usize) -> String {
    format!("10.0.{}.{}:80", number / 256, number % 256)
}

fn weight(number: usize) -> u32 {
    1 + number as u32 % 5
}

fn balancer<S>(number: usize, ext: &Extensions) -> LoadBalancer<S>
where
    S: BackendSelection + 'static,
    S::Iter: BackendIter,
{
    let backends = (0..number).map(|number| Backend {
        ext: ext.clone(),
        ..Backend::new_with_weight(&address(number), weight(number) as usize).expect("an address")
    });
    let balancer = LoadBalancer::from_backends(Backends::new(discovery::Static::new(backends.collect())));
    balancer.update().now_or_never().expect("nothing to wait for").expect("nothing to fail");
    balancer
}

fn upstream(number: usize, load_balancing: &str) -> Upstream {
    let endpoints = (0..number).map(|n| format!("{{ address: \"{}\", weight: {} }}", address(n), weight(n)));
    let yaml = format!(
        "listeners: [ {{ name: web, address: \"127.0.0.1:0\" }} ]\nroutes: [ {{ name: all, upstream: bench }} ]\n\
         upstreams: {{ bench: {{ load_balancing: {load_balancing}, endpoints: [ {} ] }} }}",
        endpoints.collect::<Vec<_>>().join(", ")
    );
    let config = Gateway::builder().parse("bench.yaml", &yaml).expect("the configuration of this bench is sound");
    let metrics = Metrics::new(0, Vec::new()).upstream("bench");
    Upstream::build("bench", &config.upstreams["bench"], metrics).expect("the upstream of this bench is sound")
}

fn pick(c: &mut Criterion) {
    let mut annotated = Extensions::new();
    annotated.insert(Arc::new(()));
    for number in SIZES {
        let mut group = c.benchmark_group("pick");
        let weights: Vec<NonZeroU64> =
            (0..number).map(|n| NonZeroU64::from(NonZeroU32::new(weight(n)).expect("at least 1"))).collect();
        let schedule = Schedule::new(&weights).expect("not empty");
        group.bench_function(BenchmarkId::new("schedule", number), |b| b.iter(|| schedule.pick()));

        let pingoras = balancer::<RoundRobin>(number, &Extensions::new());
        group.bench_function(BenchmarkId::new("pingora's round robin", number), |b| b.iter(|| pingoras.select(b"", 1)));
        let ours = balancer::<SmoothRoundRobin>(number, &Extensions::new());
        group.bench_function(BenchmarkId::new("ours in the balancer", number), |b| b.iter(|| ours.select(b"", 1)));
        let annotated = balancer::<SmoothRoundRobin>(number, &annotated);
        group.bench_function(BenchmarkId::new("ours with an extension", number), |b| {
            b.iter(|| annotated.select(b"", 1))
        });

        let (upstream, now) = (upstream(number, "{ policy: round_robin }"), Instant::now());
        group
            .bench_function(BenchmarkId::new("select", number), |b| b.iter(|| upstream.select(0, black_box(&[]), now)));
        let tried: Vec<_> =
            upstream.select(0, &[], Instant::now()).lease().iter().map(|one| one.endpoint().clone()).collect();
        group.bench_function(BenchmarkId::new("select again", number), |b| {
            b.iter(|| upstream.select(0, black_box(&tried), now))
        });
        group.finish();
    }
}

/// Equal members, some of which are rejected.
struct Members {
    inflight: Box<[AtomicU32]>,
    refused: Box<[bool]>,
}

impl Members {
    fn new(number: usize, refused: impl Fn(usize) -> bool) -> Members {
        Members {
            inflight: (0..number as u32).map(|number| AtomicU32::new(number % 7)).collect(),
            refused: (0..number).map(refused).collect(),
        }
    }
}

impl Candidates for Members {
    fn inflight(&self, number: usize) -> u32 {
        self.inflight[number].load(Relaxed)
    }

    fn inflight_of_all(&self) -> u64 {
        3 * self.inflight.len() as u64
    }

    fn latency(&self, number: usize) -> f64 {
        0.001 * (number % 10) as f64
    }

    fn admits(&self, number: usize) -> bool {
        !self.refused[number]
    }
}

const POLICIES: [(&str, Policy, Option<f64>); 8] = [
    ("round_robin", Policy::RoundRobin, None),
    ("random", Policy::Random, None),
    ("least_request", Policy::LeastRequest, None),
    ("peak_ewma", Policy::PeakEwma, None),
    ("ring_hash", Policy::RingHash, None),
    ("ring_hash, bounded load", Policy::RingHash, Some(1.25)),
    ("maglev", Policy::Maglev, None),
    ("maglev, bounded load", Policy::Maglev, Some(1.25)),
];

fn balance(policy: Policy, bounded_load: Option<f64>, number: usize) -> Balance {
    let names: Vec<String> = (0..number).map(address).collect();
    let identity = |(number, name)| Identity { name, weight: NonZeroU32::new(weight(number)).expect("at least 1") };
    let members: Vec<Identity<'_>> = names.iter().map(String::as_str).enumerate().map(identity).collect();
    Balance::new(&LoadBalancing { policy, bounded_load, ..LoadBalancing::default() }, &members)
}

/// The complete `select` with every policy, including the release of the endpoint; and that of a client with session
/// affinity.
fn select(c: &mut Criterion) {
    let mut group = c.benchmark_group("whole select");
    for (name, policy, bounded_load) in POLICIES {
        let hash_key = if policy.hashes() { ", hash_key: client_ip" } else { "" };
        let bounded = bounded_load.map_or(String::new(), |factor| format!(", bounded_load: {factor}"));
        let sticky = "sticky: { cookie: { name: stay, secret: 0123456789abcdef } }";
        let load_balancing = format!("{{ policy: {}{hash_key}{bounded}, {sticky} }}", policy.name());
        for number in [3, 100, 10_000] {
            let (upstream, now) = (upstream(number, &load_balancing), Instant::now());
            let mut key = 0u64;
            let mut hash = || {
                key = key.wrapping_add(0x9e37_79b9_7f4a_7c15);
                key
            };
            group.bench_function(BenchmarkId::new(name, number), |b| {
                b.iter(|| upstream.select(hash(), black_box(&[]), now))
            });
            if policy == Policy::RoundRobin {
                let endpoint = upstream.members()[number / 2].names[0];
                let stuck = StickyTarget { endpoint, is_old: false };
                group.bench_function(BenchmarkId::new("stuck to one", number), |b| {
                    b.iter(|| upstream.select_for(Some(&stuck), hash(), black_box(&[]), now))
                });
            }
        }
    }
    group.finish();
}

/// Every policy, with all members admitted and with every other one rejected.
fn policies(c: &mut Criterion) {
    let mut group = c.benchmark_group("policy");
    for (name, policy, bounded_load) in POLICIES {
        for number in [3, 100, 10_000] {
            let balance = balance(policy, bounded_load, number);
            let everybody = Members::new(number, |_| false);
            let mut key = 0u64;
            let mut hash = || {
                key = key.wrapping_add(0x9e37_79b9_7f4a_7c15);
                key
            };
            group.bench_function(BenchmarkId::new(name, number), |b| b.iter(|| balance.pick(hash(), &everybody)));
            let half = Members::new(number, |number| number % 2 == 0);
            group.bench_function(BenchmarkId::new(format!("{name}, half refused"), number), |b| {
                b.iter(|| balance.pick(hash(), &half))
            });
        }
    }
    group.finish();
    let mut group = c.benchmark_group("build a policy for 10,000");
    group.sample_size(10);
    for (name, policy, bounded_load) in POLICIES.into_iter().filter(|(_, _, bounded_load)| bounded_load.is_none()) {
        group.bench_function(name, |b| b.iter(|| balance(policy, bounded_load, 10_000)));
    }
    group.finish();
}

fn build(c: &mut Criterion) {
    let weights = |modulus: u64| (0..10_000u64).map(move |n| NonZeroU64::MIN.saturating_add(n % modulus));
    for modulus in [1, 5, 1_000] {
        let weights: Vec<NonZeroU64> = weights(modulus).collect();
        c.bench_function(&format!("build a schedule of 10,000, {modulus} weights"), |b| {
            b.iter(|| Schedule::new(black_box(&weights)))
        });
    }
}

criterion_group!(benches, policies, pick, select, build);
criterion_main!(benches);
