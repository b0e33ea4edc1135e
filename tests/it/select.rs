//! Endpoint selection.

use crate::harness::gateway::Watched;
use crate::harness::origin::Closed;
use crate::harness::{Gateway, Origin, Setup};

/// Weighted origins with round robin.
fn in_turn(origins: &[(&Origin, u32)]) -> Setup {
    Setup::weighted(origins).upstream("load_balancing: { policy: round_robin }")
}

/// The origins that respond to this many requests.
fn answers(gateway: &Gateway, count: usize) -> String {
    let mut client = gateway.client();
    (0..count).map(|_| client.get("/").text().to_owned()).collect()
}

/// Asserts that each group of consecutive responses, wherever counting starts, contains these in some order.
fn each_round_is(order: &str, round: &str) {
    let sorted = |letters: &[u8]| {
        let mut letters = letters.to_vec();
        letters.sort_unstable();
        letters
    };
    for window in order.as_bytes().windows(round.len()) {
        assert_eq!(sorted(window), sorted(round.as_bytes()), "{order}");
    }
}

#[test]
fn equal_endpoints_take_turns() {
    let [a, b, c] = ["a", "b", "c"].map(Origin::named);
    let gateway = in_turn(&[(&a, 1), (&b, 1), (&c, 1)]).start();
    each_round_is(&answers(&gateway, 12), "abc");
}

#[test]
fn a_heavier_endpoint_comes_more_often_and_the_others_in_between() {
    let [a, b, c] = ["a", "b", "c"].map(Origin::named);
    let gateway = in_turn(&[(&a, 5), (&b, 1), (&c, 1)]).start();
    let order = answers(&gateway, 21);
    each_round_is(&order, "aaaaabc");
    assert!(!order.contains("bc") && !order.contains("cb"), "{order}");
    assert!(!order.contains("aaaaa"), "{order}");
}

#[test]
fn turns_are_shared_by_all_connections_of_a_worker() {
    let [a, b] = ["a", "b"].map(Origin::named);
    let gateway = in_turn(&[(&a, 3), (&b, 1)]).start();
    let order: String = (0..12).map(|_| answers(&gateway, 1)).collect();
    each_round_is(&order, "aaab");
}

#[test]
fn each_choice_is_counted_and_logged() {
    let [a, b] = ["a", "b"].map(Origin::named);
    let gateway = in_turn(&[(&a, 3), (&b, 1)]).start();
    answers(&gateway, 4);
    let chosen = |origin: &Origin| {
        format!("forebay_upstream_selections_total{{upstream=\"app\",endpoint=\"{}\"}}", origin.address())
    };
    gateway.wait_metric(&chosen(&a), |count| count == 3.0);
    gateway.wait_metric(&chosen(&b), |count| count == 1.0);
    let endpoints = gateway.log_lines(4).into_iter().map(|line| line.text("endpoint").to_owned());
    assert_eq!(endpoints.filter(|endpoint| *endpoint == b.address().to_string()).count(), 1);
}

#[test]
fn an_endpoint_may_be_named_and_its_name_is_resolved() {
    let origin = Origin::named("by name");
    let gateway = Setup::before_all(&[format!("localhost:{}", origin.address().port())]).start();
    assert_eq!(answers(&gateway, 1), "by name");
    assert_eq!(gateway.log_line().text("upstream"), "app");
}

#[test]
fn a_dead_endpoint_costs_no_request_as_long_as_another_lives() {
    let (dead, alive) = (Closed::refusing(), Origin::named("alive "));
    let gateway = Setup::before_all(&[dead.address(), alive.address()]).start();
    assert_eq!(answers(&gateway, 6), "alive ".repeat(6));
}
