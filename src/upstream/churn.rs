//! A test: thousands of endpoints are added and removed while other threads select. No busy endpoint may be dropped,
//! and no idle one kept.

use std::collections::BTreeSet;
use std::num::NonZeroU32;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Weak};
use std::thread;
use std::time::Instant;

use pingora::protocols::l4::socket::SocketAddr;

use super::*;
use crate::metrics::Metrics;

const ENDPOINTS: usize = 10_000;

/// The list that begins with this number.
fn listed(first: usize) -> Vec<Found> {
    (first..first + ENDPOINTS)
        .map(|number| {
            let address = format!("10.{}.{}.{}:80", number >> 16, number >> 8 & 255, number & 255);
            Found {
                label: address.as_str().into(),
                address: SocketAddr::Inet(address.parse().unwrap()),
                server_name: None,
                weight: NonZeroU32::new(1 + (number % 3) as u32).unwrap(),
                priority: 0,
                alternate: None,
            }
        })
        .collect()
}

fn upstream(policy: &str, metrics: &Metrics) -> Upstream {
    let yaml = format!("{{ load_balancing: {policy}, endpoints: [ {{ address: \"10.0.0.0:80\" }} ] }}");
    let written = config::filter::decode(&serde_yaml::from_str(&yaml).unwrap()).unwrap();
    let upstream = Upstream::build("app", &written, metrics.upstream("app")).unwrap();
    upstream.discovered(listed(0));
    upstream
}

/// Chooses in a loop, with up to ten endpoints at a time, until stopped.
fn choose(upstream: &Upstream, over: &AtomicBool, chosen: &AtomicUsize) {
    let mut busy: [Option<EndpointLease>; 10] = Default::default();
    let mut number = 0;
    while !over.load(Ordering::Relaxed) {
        let lease = upstream.select(rand::random(), &[], Instant::now()).lease().expect("one of thousands");
        assert!(!lease.endpoint().address.to_string().is_empty());
        busy[number % 10] = Some(lease);
        number += 1;
    }
    chosen.fetch_add(number, Ordering::Relaxed);
}

/// In each of these rounds all endpoints are replaced.
fn churn(policy: &str, rounds: usize) {
    let metrics = Metrics::new(0, Vec::new());
    let upstream = upstream(policy, &metrics);
    let first: Vec<Weak<Endpoint>> = upstream.members().iter().map(Arc::downgrade).collect();
    let kept = upstream.select(7, &[], Instant::now()).lease().unwrap();
    let (over, chosen) = (AtomicBool::new(false), AtomicUsize::new(0));
    thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| choose(&upstream, &over, &chosen));
        }
        for round in 1..=rounds {
            upstream.discovered(listed(round * ENDPOINTS / rounds));
            let members = upstream.members().len();
            assert!((ENDPOINTS..=ENDPOINTS + 30).contains(&members), "{policy}: {members} members in round {round}");
        }
        over.store(true, Ordering::Relaxed);
    });
    assert!(chosen.load(Ordering::Relaxed) > rounds, "{policy}: hardly anybody chose");
    assert_eq!((kept.inflight(), kept.availability().is_removed()), (1, true), "what is busy is remembered");
    assert_eq!(upstream.inflight(), 1);
    let alive = |endpoints: &[Weak<Endpoint>]| endpoints.iter().filter(|one| one.strong_count() > 0).count();
    drop(kept);
    upstream.discovered(listed(ENDPOINTS));
    assert_eq!((upstream.members().len(), alive(&first)), (ENDPOINTS, 0), "{policy}: all of the first are gone");
    let text = String::from_utf8(metrics.render()).unwrap();
    let series: BTreeSet<&str> = text.lines().filter(|line| line.starts_with("forebay_upstream_selections")).collect();
    assert_eq!(series.len(), ENDPOINTS, "{policy}: and their series with them");
}

#[test]
fn ten_thousand_endpoints_change_while_others_choose_by_load_and_none_is_leaked() {
    churn("{ policy: least_request, sticky: { cookie: { name: stay, secret: 0123456789abcdef } } }", 10);
}

#[test]
fn ten_thousand_endpoints_change_while_others_choose_by_hash_and_none_is_leaked() {
    churn("{ policy: ring_hash, hash_key: client_ip, bounded_load: 1.25 }", 3);
}
