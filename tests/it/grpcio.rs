//! gRPC by its C core at both ends (`python3-grpcio`), which shares no code with us and is strict where tonic is not.

use std::net::SocketAddr;

use serde_json::{Value, json};

use crate::grpc::{REFUSALS, Refusing};
use crate::harness::gateway::Watched;
use crate::harness::grpcio::{GrpcClient, GrpcServer};
use crate::harness::secure::Authority;
use crate::harness::{Gateway, Setup, free_port};
use crate::stop::refuses;

/// A server, a gateway before it and a client.
struct Trio {
    server: GrpcServer,
    gateway: Gateway,
    client: GrpcClient,
}

impl Trio {
    /// With h2c between all of them, and a gateway that differs so.
    fn with(differs: impl FnOnce(Setup) -> Setup) -> Trio {
        let server = GrpcServer::start();
        let gateway = differs(clear(server.address())).start();
        Trio { client: GrpcClient::to(gateway.web()), server, gateway }
    }

    fn clear() -> Trio {
        Trio::with(|setup| setup)
    }

    /// With TLS to the server.
    fn secure() -> Trio {
        let authority = Authority::new();
        let server = GrpcServer::secure(&authority.issue(&["127.0.0.1"]));
        let keys = format!("protocol: h2, tls: {{ ca: \"{}\" }}", authority.file().display());
        let gateway = Setup::before_all(&[server.address()]).upstream(&keys).listener("protocols: [h2c]").start();
        Trio { client: GrpcClient::to(gateway.web()), server, gateway }
    }
}

fn clear(server: SocketAddr) -> Setup {
    Setup::before_all(&[server]).upstream("protocol: h2c").listener("protocols: [h2c]")
}

fn ask(call: &str, method: &str, messages: &[&str]) -> Value {
    json!({ "call": call, "method": format!("/test.Peer/{method}"), "messages": messages })
}

/// The same, with further keys.
fn with(mut ask: Value, more: Value) -> Value {
    ask.as_object_mut().expect("an object").extend(more.as_object().expect("an object").clone());
    ask
}

/// That a call went well, and what was replied.
#[track_caller]
fn replied(outcome: &Value, replies: Value) {
    assert_eq!((&outcome["code"], &outcome["replies"]), (&json!(0), &replies), "{outcome}");
}

#[test]
fn every_kind_of_call_passes() {
    for mut trio in [Trio::clear(), Trio::secure()] {
        let client = &mut trio.client;
        replied(&client.say("one"), json!(["one"]));
        replied(&client.ask(&ask("join", "Join", &["a", "b", "c"])), json!(["abc"]));
        replied(&client.ask(&ask("join", "Join", &[])), json!([""]));
        replied(&client.ask(&ask("echo", "Echo", &["a", "b", "c"])), json!(["a", "b", "c"]));
        let repeated = client.ask(&ask("repeat", "Repeat", &["two"]));
        assert_eq!((&repeated["code"], &repeated["details"]), (&json!(11), &json!("three is enough")), "{repeated}");
        assert_eq!(repeated["replies"], json!(["two", "two", "two"]));
    }
}

#[test]
fn each_side_hears_what_the_other_says_before_it_says_more() {
    for mut trio in [Trio::clear(), Trio::secure()] {
        trio.client.ask(&ask("open", "Echo", &[]));
        for word in ["first", "second", "third"] {
            assert_eq!(trio.client.ask(&json!({ "say": word })), json!({ "reply": word }));
        }
        replied(&trio.client.ask(&json!({ "say": null })), json!([]));
    }
}

#[test]
fn large_messages_pass_both_ways() {
    let bytes = 3 << 20;
    let sum = (bytes / 256) * (0..256).sum::<u64>();
    for mut trio in [Trio::clear(), Trio::secure()] {
        for (call, method) in [("unary", "Say"), ("echo", "Echo"), ("join", "Join")] {
            let outcome = trio.client.ask(&with(ask(call, method, &[]), json!({ "size": bytes })));
            replied(&outcome, json!([{ "bytes": bytes, "sum": sum }]));
        }
    }
}

#[test]
fn metadata_and_details_pass_both_ways() {
    for mut trio in [Trio::clear(), Trio::secure()] {
        let said =
            with(ask("unary", "Say", &["one"]), json!({ "metadata": [["x-to", "there"], ["x-to", "and back"]] }));
        let outcome = trio.client.ask(&said);
        let back: Vec<&Value> =
            outcome["initial"].as_array().expect("pairs").iter().filter(|pair| pair[0] == "x-to").collect();
        assert_eq!(json!(back), json!([["x-to", "there"], ["x-to", "and back"]]), "{outcome}");
        assert_eq!(outcome["trailing"], json!([["x-after", "said"]]));

        let unknown = trio.client.say("unknown");
        assert_eq!((&unknown["code"], &unknown["details"]), (&json!(5), &json!("kein Wort: Gruß, 100 %\n")));
        assert_eq!(unknown["trailing"], json!([["x-why", "no such word"], ["x-raw-bin", "00ff"]]));
    }
}

#[test]
fn an_answer_without_messages_passes_and_the_log_says_how_calls_went() {
    let mut trio = Trio::clear();
    for (calls, (method, code)) in [("Early", 7), ("Nothing", 12), ("Say", 0)].into_iter().enumerate() {
        let outcome = trio.client.ask(&ask("unary", method, &["x"]));
        assert_eq!(outcome["code"], code, "{outcome}");
        let line = trio.gateway.log_lines(calls + 1).remove(calls);
        assert_eq!((line.number("status"), line.number("grpc_status")), (200.0, f64::from(code)), "{line:?}");
        assert!(!line.has("reason"), "{line:?}");
    }
}

#[test]
fn the_server_hears_that_a_call_is_given_up() {
    for mut trio in [Trio::clear(), Trio::secure()] {
        let outcome = trio.client.ask(&with(ask("repeat", "Repeat", &["forever"]), json!({ "cancel": 1 })));
        assert_eq!((&outcome["code"], &outcome["replies"]), (&json!(1), &json!(["forever"])), "{outcome}");
        trio.server.hears_of("repeat");
        trio.gateway.wait_metric("forebay_phase_active", |count| count == 0.0);
    }
}

#[test]
fn a_deadline_ends_a_call_at_both_ends_and_is_called_so() {
    let mut trio = Trio::clear();
    for (call, method, message, given_up) in
        [("unary", "Say", "never", "say"), ("repeat", "Repeat", "forever", "repeat")]
    {
        let outcome = trio.client.ask(&with(ask(call, method, &[message]), json!({ "timeout": 0.5 })));
        assert_eq!(outcome["code"], 4, "{outcome}");
        trio.server.hears_of(given_up);
    }
    let left = trio.client.ask(&with(ask("unary", "Say", &["deadline"]), json!({ "timeout": 60 })));
    let seconds: f64 = left["replies"][0].as_str().expect("a reply").parse().expect("seconds");
    assert!((30.0..=61.0).contains(&seconds), "the server knows of the deadline: {seconds}");
    replied(&trio.client.say("next"), json!(["next"]));
}

#[test]
fn a_hundred_calls_at_once_share_the_connections() {
    for mut trio in [Trio::clear(), Trio::secure()] {
        for (call, method) in [("unary", "Say"), ("echo", "Echo")] {
            let outcomes = trio.client.ask(&with(ask(call, method, &["x"]), json!({ "times": 100 })));
            let outcomes = outcomes.as_array().expect("a list");
            assert_eq!(outcomes.len(), 100);
            outcomes.iter().for_each(|outcome| replied(outcome, json!(["x"])));
        }
    }
}

#[test]
fn what_is_refused_has_the_status_of_its_reason() {
    for refusing in REFUSALS {
        let Refusing { reason, http_status, code, fields, .. } = refusing;
        let mut trio = Trio::with(|setup| refusing.setup(setup));
        let metadata: Vec<_> = (0..*fields).map(|n| [format!("x-{n}"), "1".to_owned()]).collect();
        let said = with(ask("unary", "Say", &[refusing.word]), json!({ "metadata": metadata }));
        (1..refusing.calls).for_each(|_| replied(&trio.client.ask(&said), json!([refusing.word])));
        let outcome = trio.client.ask(&said);
        assert_eq!(outcome["code"], *code, "{reason}: {outcome}");
        let details = outcome["details"].as_str().expect("text");
        assert!(details.starts_with(refusing.message()), "{reason}: {outcome}");
        if *http_status == 429 {
            let trailing = outcome["trailing"].as_array().expect("pairs");
            assert!(trailing.iter().any(|pair| pair[0] == "retry-after"), "{outcome}");
        }
        refusing.is_logged(&trio.gateway);
    }
}

#[test]
fn a_server_that_is_not_there_is_unavailable() {
    let gateway = clear(SocketAddr::from(([127, 0, 0, 1], free_port()))).start();
    let outcome = GrpcClient::to(gateway.web()).say("one");
    assert_eq!(outcome["code"], 14, "{outcome}");
    assert!(outcome["details"].as_str().expect("text").starts_with("connect.refused: "), "{outcome}");
}

#[test]
fn a_message_that_is_too_large_exhausts_a_resource() {
    let mut trio = Trio::with(|setup| setup.route("buffering: { request: { max_body: 64KiB } }"));
    for (call, method) in [("unary", "Say"), ("echo", "Echo")] {
        let outcome = trio.client.ask(&with(ask(call, method, &[]), json!({ "size": 3 << 20 })));
        assert_eq!(outcome["code"], 8, "{outcome}");
    }
    replied(&trio.client.say("small"), json!(["small"]));
}

#[test]
fn a_server_that_dies_in_the_middle_of_a_stream_leaves_no_call_that_looks_whole() {
    let mut trio = Trio::clear();
    trio.client.ask(&ask("open", "Echo", &[]));
    assert_eq!(trio.client.ask(&json!({ "say": "first" })), json!({ "reply": "first" }));
    drop(trio.server);
    let outcome = trio.client.ask(&json!({ "say": "second" }));
    assert_eq!(outcome["code"], 13, "INTERNAL_ERROR of HTTP/2 is INTERNAL: {outcome}");
    assert_eq!(trio.gateway.log_line().text("reason"), "receive.reset");
}

#[test]
fn calls_under_way_come_to_their_end_when_the_gateway_stops() {
    let server = GrpcServer::start();
    let mut gateway = clear(server.address()).spawn();
    let mut client = GrpcClient::to(gateway.web());
    client.ask(&ask("open", "Echo", &[]));
    assert_eq!(client.ask(&json!({ "say": "before" })), json!({ "reply": "before" }));
    gateway.signal(libc::SIGTERM);
    refuses(gateway.web());
    for word in ["after", "long after"] {
        assert_eq!(client.ask(&json!({ "say": word })), json!({ "reply": word }));
    }
    replied(&client.ask(&json!({ "say": null })), json!([]));
    assert!(gateway.ended().success());
    assert_eq!(client.say("too late")["code"], 14);
}
