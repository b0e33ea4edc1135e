//! How policies distribute requests over real sockets: by load, by weight, by key.

use std::collections::BTreeSet;
use std::thread;

use crate::harness::gateway::Watched;
use crate::harness::origin::Closed;
use crate::harness::{Client, Gateway, Origin, Setup, ms, ok};

const NAMES: [&str; 4] = ["a", "b", "c", "d"];

/// Four origins that respond with their names.
fn origins() -> [Origin; 4] {
    NAMES.map(Origin::named)
}

/// A gateway in front of these, with a hash policy and a key.
fn by_key(origins: &[Origin], policy: &str, key: &str) -> Setup {
    let addresses: Vec<_> = origins.iter().map(Origin::address).collect();
    Setup::before_all(&addresses).upstream(&format!("load_balancing: {{ policy: {policy}, hash_key: {key} }}"))
}

/// The origin that responds to each user, identified by this header field.
fn homes(gateway: &Gateway, users: usize, field: impl Fn(usize) -> String) -> Vec<String> {
    let mut client = gateway.client();
    (0..users).map(|user| client.ask("GET", "/", &field(user), "").text().to_owned()).collect()
}

fn by_header(user: usize) -> String {
    format!("X-User: user-{user}\r\n")
}

/// The distinct origins.
fn distinct(answers: &[String]) -> BTreeSet<&str> {
    answers.iter().map(String::as_str).collect()
}

#[test]
fn a_user_has_one_endpoint_at_every_gateway_of_the_same_configuration() {
    let origins = origins();
    for policy in ["ring_hash", "maglev"] {
        let [one, two] = [(); 2].map(|()| by_key(&origins, policy, "{ header: x-user }").start());
        let first = homes(&one, 60, by_header);
        assert_eq!(distinct(&first).len(), 4, "{policy} uses all of them: {first:?}");
        assert_eq!(homes(&one, 60, by_header), first, "{policy}, again");
        assert_eq!(homes(&two, 60, by_header), first, "{policy}, at another gateway");
    }
}

#[test]
fn an_endpoint_leaves_and_the_users_of_the_others_stay_where_they_are() {
    let origins = origins();
    let key = "{ cookie: session }";
    let field = |user: usize| format!("Cookie: a=b; session=user-{user}\r\n");
    for (policy, others_that_move_max) in [("ring_hash", 0), ("maglev", 6)] {
        let before = homes(&by_key(&origins, policy, key).start(), 120, field);
        let after = homes(&by_key(&origins[..3], policy, key).start(), 120, field);
        let moved = before.iter().zip(&after).filter(|(was, is)| was != is && *was != "d").count();
        assert!(moved <= others_that_move_max, "{policy} moved {moved} users of endpoints that stay");
        let left: Vec<_> = after.iter().zip(&before).filter(|(_, was)| *was == "d").map(|(is, _)| is.clone()).collect();
        assert_eq!(distinct(&left).len(), 3, "{policy} shares out the users of the one that left: {left:?}");
    }
}

#[test]
fn a_query_argument_is_the_same_user_however_it_is_encoded() {
    let origins = origins();
    let gateway = by_key(&origins, "ring_hash", "{ query: user }").start();
    let mut client = gateway.client();
    let mut ask = |path: String| client.get(&path).text().to_owned();
    let mut homes = BTreeSet::new();
    for user in 0..30 {
        let home = ask(format!("/?user=ann%20{user}&v=1"));
        assert_eq!(ask(format!("/other?v=2&user=%61nn+{user}")), home, "user {user}");
        homes.insert(home);
    }
    assert!(homes.len() > 1, "{homes:?}");
}

#[test]
fn a_path_has_one_endpoint_as_it_was_sent_whatever_filters_make_of_it() {
    let origins = origins();
    let plain = by_key(&origins, "maglev", "path").start();
    let rewrite = "{ rewrite: { path: { regex: { pattern: '/.*', to: /one } } } }";
    let rewritten = by_key(&origins, "maglev", "path").filters(rewrite).start();
    let ask = |client: &mut Client, path: usize| client.get(&format!("/{path}?{path}")).text().to_owned();
    let (mut one, mut two) = (plain.client(), rewritten.client());
    let homes: Vec<_> = (0..30).map(|path| ask(&mut one, path)).collect();
    assert_eq!((0..30).map(|path| ask(&mut two, path)).collect::<Vec<_>>(), homes);
    assert_eq!(distinct(&homes).len(), 4, "{homes:?}");
}

#[test]
fn a_client_is_told_by_its_address_and_all_requests_of_a_route_go_together() {
    let origins = origins();
    let by_address = by_key(&origins, "ring_hash", "client_ip").more("trusted_proxies: [127.0.0.1]").start();
    let forwarded = |user: usize| format!("X-Forwarded-For: 192.0.2.{user}\r\n");
    let first = homes(&by_address, 60, forwarded);
    assert_eq!(homes(&by_address, 60, forwarded), first);
    assert_eq!(distinct(&first).len(), 4);
    assert_eq!(distinct(&homes(&by_address, 30, |_| String::new())).len(), 1, "this client itself");

    let by_route = by_key(&origins, "ring_hash", "route").start();
    assert_eq!(distinct(&homes(&by_route, 30, by_header)).len(), 1);
}

#[test]
fn the_next_key_counts_where_one_is_missing_and_who_has_none_goes_anywhere() {
    let origins = origins();
    let gateway = by_key(&origins, "ring_hash", "[ { header: x-user }, { cookie: session } ]").start();
    let by_both = |user: usize| format!("X-User: user-{user}\r\nCookie: session=other\r\n");
    let by_cookie = |user: usize| format!("X-User: \r\nCookie: session=user-{user}\r\n");
    let homes_of_users = homes(&gateway, 40, by_header);
    assert_eq!(homes(&gateway, 40, by_both), homes_of_users, "the first goes before the second");
    assert_eq!(homes(&gateway, 40, by_cookie), homes_of_users, "the same value has the same hash");
    assert_eq!(distinct(&homes(&gateway, 100, |_| String::new())).len(), 4, "who has none");
}

#[test]
fn a_request_that_its_endpoint_fails_goes_on_to_another_and_always_the_same() {
    let (origins, dead) = (origins(), Closed::refusing());
    let addresses: Vec<_> = origins.iter().map(Origin::address).chain([dead.address()]).collect();
    let setup = Setup::before_all(&addresses);
    let gateway = setup.upstream("load_balancing: { policy: ring_hash, hash_key: { header: x-user } }").start();
    let first = homes(&gateway, 60, by_header);
    assert_eq!(homes(&gateway, 60, by_header), first);
    assert_eq!(distinct(&first).len(), 4);
    gateway.wait_metric("forebay_upstream_connects_total{outcome=\"failed\"}", |failed| failed >= 2.0);
}

/// The shares of origins with weights 3, 2 and 1 for this many requests in sequence, each by a different user.
fn shares(policy: &str, count: usize) -> [f64; 3] {
    let [a, b, c] = ["a", "b", "c"].map(Origin::named);
    let key = if matches!(policy, "ring_hash" | "maglev") { ", hash_key: { header: x-user }" } else { "" };
    let setup = Setup::weighted(&[(&a, 3), (&b, 2), (&c, 1)]);
    let gateway = setup.upstream(&format!("load_balancing: {{ policy: {policy}{key} }}")).start();
    let answers = homes(&gateway, count, by_header);
    ["a", "b", "c"].map(|name| answers.iter().filter(|answer| *answer == name).count() as f64 / count as f64)
}

#[test]
fn every_policy_with_weights_shares_out_by_them() {
    for (policy, most_off) in [("round_robin", 0.0), ("random", 0.1), ("least_request", 0.12), ("maglev", 0.1)] {
        let shares = shares(policy, 600);
        for (share, expected) in shares.iter().zip([1.0 / 2.0, 1.0 / 3.0, 1.0 / 6.0]) {
            assert!((share - expected).abs() <= most_off + 1e-9, "{policy}: {shares:?}");
        }
    }
    // On a ring, shares are as uneven as its arcs.
    let shares = shares("ring_hash", 600);
    assert!(shares[0] > shares[1] && shares[1] > shares[2] && shares[2] > 0.05, "ring_hash: {shares:?}");
}

/// How many of 240 requests, six at a time, go to the one of three origins that takes 30 ms for each.
fn slow_ones(load_balancing: &str) -> usize {
    let slow = Origin::answering(|_| {
        thread::sleep(ms(30));
        ok("slow")
    });
    let [b, c] = ["b", "c"].map(Origin::named);
    let setup = Setup::before_all(&[slow.address(), b.address(), c.address()]);
    let gateway = setup.upstream(load_balancing).start();
    thread::scope(|scope| {
        let clients: Vec<_> = (0..6).map(|_| scope.spawn(|| homes(&gateway, 40, by_header))).collect();
        let answers = clients.into_iter().flat_map(|client| client.join().expect("answers"));
        answers.filter(|answer| answer == "slow").count()
    })
}

#[test]
fn a_slow_endpoint_gets_less_unless_it_is_given_its_turn_whatever_it_does() {
    assert_eq!(slow_ones("load_balancing: { policy: round_robin }"), 80);
    let by_default = slow_ones("protocol: http1");
    assert!(by_default < 50, "least_request, which is the default, gave it {by_default} of 240");
    let by_latency = slow_ones("load_balancing: { policy: peak_ewma }");
    assert!(by_latency < 40, "peak_ewma gave it {by_latency} of 240");
}
