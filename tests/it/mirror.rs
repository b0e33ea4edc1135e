//! Mirroring: copies reach the other upstream, and the original exchange is not affected.

use crate::harness::client::request;
use crate::harness::gateway::Watched;
use crate::harness::origin::Closed;
use crate::harness::secure::{Authority, Layers, Secure};
use crate::harness::{Ask, Gateway, H2Origin, Origin, Protocol, Setup, eventually, ok};

/// A gateway that sends requests to `origin` and copies of all of them to `copies`, with these mirror keys.
fn mirrored(origin: &Origin, copies: &Origin, keys: &str) -> Setup {
    let setup = Setup::before(origin).also("copies", copies).listener("protocols: [http1, h2c]");
    setup.route(&format!("mirror: {{ upstream: copies, {keys} }}"))
}

/// Waits for this many copies with this outcome.
fn outcome(gateway: &Gateway, outcome: &str, count: f64) {
    let selector = format!("forebay_mirror_total{{upstream=\"copies\",outcome=\"{outcome}\"}}");
    gateway.wait_metric(&selector, |n| n == count);
}

#[test]
fn a_copy_of_a_request_arrives_elsewhere_and_its_answer_nowhere() {
    for protocol in Protocol::BOTH {
        let (origin, copies) = (Origin::named("origin"), Origin::answering(|_| ok("nobody reads this")));
        let gateway = mirrored(&origin, &copies, "percent: 100%").start();
        let answer = Ask::post(10_000).to("/a?b=c").field("x-own", "1").over(protocol, gateway.web());
        assert_eq!((answer.status, answer.text()), (200, "origin"));
        outcome(&gateway, "answered", 1.0);
        let (original, copy) = (origin.request(), copies.request());
        assert_eq!((copy.method(), copy.target()), ("POST", "/a?b=c"));
        assert_eq!((copy.value("host"), copy.value("x-own")), (Some("test"), Some("1")));
        assert_eq!(copy.value("x-forebay-mirror"), Some("all"));
        assert!(
            original.value("x-forebay-mirror").is_none() && copy.body == original.body && copy.body.len() == 10_000
        );
        gateway.wait_at_rest();
    }
}

#[test]
fn original_and_copy_tell_of_each_hop_once_and_name_fields_as_they_were_written() {
    for (protocol, method) in Protocol::BOTH.into_iter().flat_map(|protocol| [(protocol, "GET"), (protocol, "POST")]) {
        let (origin, copies) = (Origin::named("origin"), Origin::named("copy"));
        let gateway = mirrored(&origin, &copies, "percent: 100%").start();
        let ask = if method == "GET" { Ask::get("/") } else { Ask::post(1_000).to("/") };
        let answer = ask.field("x-oWn", "1").over(protocol, gateway.web());
        assert_eq!(answer.text(), "origin");
        outcome(&gateway, "answered", 1.0);
        for request in [origin.request(), copies.request()] {
            for name in ["X-Forwarded-For", "X-Forwarded-Proto", "X-Forwarded-Host", "X-Forwarded-Port"] {
                assert_eq!(request.values(name).len(), 1, "{protocol:?} {method} {name}");
            }
            assert_eq!(request.value("x-forwarded-for"), Some("127.0.0.1"));
            let spelled = if protocol == Protocol::Http1 { "x-oWn" } else { "x-own" };
            assert!(
                request.head.fields.iter().any(|(name, _)| name == spelled),
                "{protocol:?}: {:?}",
                request.head.fields
            );
        }
    }
}

#[test]
fn a_copy_goes_over_http_2_and_by_kept_connections_as_its_upstream_says() {
    let (origin, copies) = (Origin::named("origin"), H2Origin::start());
    let other = format!("protocol: h2c, endpoints: [ {{ address: \"{}\" }} ]", copies.address());
    let gateway = Setup::before(&origin).also_upstream("copies", &other).route("mirror: { upstream: copies }").start();
    for _ in 0..3 {
        assert_eq!(gateway.client().ask("PUT", "/", "", vec![b'x'; 5000]).text(), "origin");
        assert_eq!(gateway.client().get("/").text(), "origin");
    }
    outcome(&gateway, "answered", 6.0);
    assert_eq!(copies.paths().len(), 6);
}

#[test]
fn connections_for_copies_are_kept() {
    let (origin, copies) = (Origin::named("origin"), Origin::named("copy"));
    let gateway = mirrored(&origin, &copies, "").start();
    for n in 1..=5 {
        gateway.client().get("/");
        outcome(&gateway, "answered", f64::from(n));
    }
    assert_eq!(copies.connections(), 1);
}

#[test]
fn a_mirror_that_hangs_or_is_dead_neither_slows_the_original_nor_fails_it() {
    let (origin, silent) = (Origin::named("origin"), Origin::scripted());
    let gateway = mirrored(&origin, &silent, "in_flight: 2").start();
    for _ in 0..5 {
        assert_eq!(gateway.client().get("/").text(), "origin");
    }
    outcome(&gateway, "busy", 3.0);

    let closed = Closed::refusing();
    let setup = Setup::before(&origin).also_at("copies", closed.address());
    let gateway = setup.route("mirror: { upstream: copies }").start();
    assert_eq!(gateway.client().get("/").text(), "origin");
    outcome(&gateway, "failed", 1.0);
    gateway.wait_at_rest();
}

#[test]
fn a_copy_has_the_timeouts_of_its_upstream_and_makes_place_for_others_afterwards() {
    let (origin, silent) = (Origin::named("origin"), Origin::scripted());
    let other = format!("endpoints: [ {{ address: \"{}\" }} ], timeouts: {{ wait: 100ms }}", silent.address());
    let gateway = Setup::before(&origin)
        .also_upstream("copies", &other)
        .route("mirror: { upstream: copies, in_flight: 1 }")
        .start();
    for n in 1..=2 {
        gateway.client().get("/");
        outcome(&gateway, "failed", f64::from(n));
    }
}

#[test]
fn what_cannot_be_copied_is_counted() {
    let (origin, copies) = (Origin::answering(|request| ok(&request.body)), Origin::named("copy"));
    let gateway = mirrored(&origin, &copies, "").route("buffering: { request: { memory: 16KiB } }").start();
    assert_eq!(Ask::put(1 << 20).over(Protocol::Http1, gateway.web()).status, 200);
    outcome(&gateway, "too_large", 1.0);
    let upgrade = "Connection: Upgrade\r\nUpgrade: websocket\r\n";
    assert_eq!(gateway.client().ask("GET", "/", upgrade, "").status, 200);
    outcome(&gateway, "upgrade", 1.0);

    let rpc = H2Origin::start();
    let setup = Setup::before_all(&[rpc.address()]).upstream("protocol: h2c").also("copies", &copies);
    let gateway = setup.listener("protocols: [h2c]").route("mirror: { upstream: copies }").start();
    assert_eq!(Ask::post(10).grpc().over(Protocol::Http2, gateway.web()).status, 200);
    outcome(&gateway, "grpc", 1.0);

    let gateway = mirrored(&origin, &copies, "").route("buffering: { request: { mode: stream } }").start();
    assert_eq!(Ask::put(1000).over(Protocol::Http1, gateway.web()).status, 200);
    outcome(&gateway, "streamed", 1.0);
    assert!(copies.requests().is_empty());
}

#[test]
fn only_the_share_that_is_asked_for_is_copied() {
    let (origin, copies) = (Origin::named("origin"), Origin::named("copy"));
    let gateway = mirrored(&origin, &copies, "percent: 50%").start();
    let mut client = gateway.client();
    (0..200).for_each(|_| assert_eq!(client.get("/").status, 200));
    let copied = eventually("the last copies", || {
        let (copied, busy) = (gateway.metric("forebay_mirror_total"), copies.requests().len() as f64);
        (copied == busy).then_some(copied)
    });
    assert!((60.0..140.0).contains(&copied), "{copied} of 200");
}

#[test]
fn a_request_that_is_sent_again_is_copied_once() {
    let (origin, copies) = (Origin::scripted(), Origin::named("copy"));
    let gateway = mirrored(&origin, &copies, "").route("retry: { same_endpoint: true }").start();
    let mut client = gateway.client();
    client.send(request("PUT", "/", "", "once"));
    let mut connection = origin.accept();
    connection.request();
    connection.close();
    let mut connection = origin.accept();
    connection.request();
    connection.answer("twice");
    assert_eq!(client.response().text(), "twice");
    outcome(&gateway, "answered", 1.0);
    assert_eq!(copies.requests().len(), 1);
}

#[test]
fn copies_under_way_do_not_hold_up_the_end() {
    let (origin, silent) = (Origin::named("origin"), Origin::scripted());
    let mut process = mirrored(&origin, &silent, "").spawn();
    assert_eq!(process.client().get("/").text(), "origin");
    silent.accept().request();
    process.signal(libc::SIGTERM);
    assert!(process.ended().success());
}

#[test]
fn no_copy_goes_to_whom_its_upstream_does_not_trust() {
    let authority = Authority::new();
    let elsewhere = Secure::start(Layers::tls(&authority.issue(&["127.0.0.2", "localhost"])));
    let tls = format!("tls: {{ ca: \"{}\" }}", authority.file().display());
    let other = format!("{tls}, endpoints: [ {{ address: \"{}\" }} ]", elsewhere.address());
    let origin = Origin::named("origin");
    let gateway = Setup::before(&origin).also_upstream("copies", &other).route("mirror: { upstream: copies }").start();
    for n in 1..=2 {
        assert_eq!(gateway.client().get("/").text(), "origin");
        outcome(&gateway, "failed", f64::from(n));
    }
    let refused = "forebay_upstream_connect_failures_total{upstream=\"copies\",reason=\"tls\"}";
    assert_eq!(gateway.metric(refused), 2.0);
    assert_eq!(elsewhere.connections(), 2, "nor is its connection kept for the next one");
}
