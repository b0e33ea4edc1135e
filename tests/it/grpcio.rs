//! gRPC with its C core on both ends (`python3-grpcio`), which shares no code with Forebay and is stricter than
//! tonic.

use std::net::SocketAddr;

use serde_json::{Value, json};

use crate::grpc::{REFUSALS, Refusing};
use crate::harness::client::request;
use crate::harness::gateway::Watched;
use crate::harness::grpcio::{GrpcClient, GrpcServer};
use crate::harness::secure::Authority;
use crate::harness::{Ask, Gateway, H2Client, H2Origin, Protocol, Setup, free_port};
use crate::stop::refuses;

/// A server, a gateway in front of it and a client.
struct Trio {
    server: GrpcServer,
    gateway: Gateway,
    client: GrpcClient,
}

impl Trio {
    /// With h2c on all connections, and these gateway settings.
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

/// The call `ask` with additional keys.
fn with(mut ask: Value, more: Value) -> Value {
    ask.as_object_mut().expect("an object").extend(more.as_object().expect("an object").clone());
    ask
}

/// Asserts that a call succeeded with this reply.
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

/// A gRPC message in wire format.
fn message(flags: u8, content: &[u8]) -> Vec<u8> {
    let length = u32::try_from(content.len()).expect("a short message").to_be_bytes();
    [&[flags][..], &length, content].concat()
}

/// The messages in a gRPC-Web response: flags and content.
fn messages(mut body: &[u8]) -> Vec<(u8, String)> {
    let mut messages = Vec::new();
    while let [flags, a, b, c, d, rest @ ..] = body {
        let (content, after) = rest.split_at(u32::from_be_bytes([*a, *b, *c, *d]) as usize);
        messages.push((*flags, String::from_utf8_lossy(content).into_owned()));
        body = after;
    }
    messages
}

/// A gateway that bridges gRPC-Web, for HTTP/1 and HTTP/2 clients.
fn bridge(server: SocketAddr) -> Setup {
    let setup = Setup::before_all(&[server]).upstream("protocol: h2c").route("grpc_web: bridge");
    setup.listener("protocols: [http1, h2c]")
}

/// A bridge in front of a C core server.
fn bridging() -> (GrpcServer, Gateway) {
    let server = GrpcServer::start();
    let gateway = bridge(server.address()).start();
    (server, gateway)
}

const WEB: &str = "Content-Type: application/grpc-web+proto\r\nX-Grpc-Web: 1\r\n";

#[test]
fn a_browser_speaks_to_a_server_of_grpc_over_http_1_and_2() {
    let (_server, gateway) = bridging();
    let said = |last: &[(u8, String)]| {
        assert_eq!(last[0], (0, "a word".to_owned()));
        assert_eq!(last[1].0, 0x80);
        let lines: Vec<&str> = last[1].1.split_terminator("\r\n").collect();
        assert!(lines.contains(&"grpc-status: 0") && lines.contains(&"x-after: said"), "{lines:?}");
        assert_eq!(last.len(), 2);
    };
    let mut client = gateway.client();
    for _ in 0..2 {
        let fields = format!("{WEB}X-Meta: kept\r\n");
        let answer = client.ask("POST", "/test.Peer/Say", &fields, message(0, b"a word"));
        assert_eq!((answer.status, answer.value("content-type")), (200, Some("application/grpc-web")));
        assert_eq!(answer.value("x-meta"), Some("kept"));
        said(&messages(&answer.body));
    }
    let over_http2 = H2Client::connect(gateway.web());
    let request = http::Request::post("http://test/test.Peer/Say").header("content-type", "application/grpc-web");
    let answer = over_http2.ask(request.body(()).expect("a request"), &message(0, b"a word")).expect("an answer");
    assert_eq!(
        (answer.status, &answer.headers["content-type"]),
        (200, &"application/grpc-web".parse().expect("a value"))
    );
    said(&messages(&answer.body));
    let line = gateway.log_line();
    assert_eq!((line.status(), line.number("grpc_status")), (200, 0.0));
}

#[test]
fn messages_of_a_server_reach_a_browser_one_by_one_with_their_status_behind() {
    let (_server, gateway) = bridging();
    let answer = gateway.client().ask("POST", "/test.Peer/Repeat", WEB, message(0, b"again"));
    let got = messages(&answer.body);
    assert_eq!(got[..3], vec![(0, "again".to_owned()); 3]);
    assert!(
        got[3].1.contains("grpc-status: 11\r\n") && got[3].1.contains("grpc-message: three is enough\r\n"),
        "{got:?}"
    );

    // An open stream delivers its first message immediately.
    let mut client = gateway.client();
    client.send(request("POST", "/test.Peer/Repeat", WEB, message(0, b"forever")));
    let mut wire = client.into_wire();
    let head = wire.head().expect("a header");
    assert_eq!(head.status(), 200);
    let mut left = head.response_framing("POST").begin();
    assert_eq!(wire.piece(&mut left, 12), message(0, b"forever"));
}

#[test]
fn a_browser_learns_why_its_call_is_refused() {
    let (server, gateway) = bridging();
    let answer = gateway.client().ask("POST", "/test.Peer/Early", WEB, message(0, b""));
    let in_header = answer.value("grpc-status") == Some("7");
    let in_body =
        messages(&answer.body).iter().any(|(flags, text)| *flags == 0x80 && text.contains("grpc-status: 7\r\n"));
    assert!(in_header || in_body, "{:?}", answer.text());

    // The gateway's own refusals have their gRPC status in the header.
    let lost = bridge(SocketAddr::from(([127, 0, 0, 1], 1))).start();
    let denying = bridge(server.address()).filters("access: { deny: [127.0.0.0/8] }").start();
    let mut client = denying.client();
    for (answer, status) in [
        (lost.client().ask("POST", "/test.Peer/Say", WEB, message(0, b"a word")), "14"),
        (client.ask("POST", "/test.Peer/Say", WEB, ""), "7"),
        (client.ask("POST", "/test.Peer/Say", WEB, ""), "7"),
    ] {
        assert_eq!((answer.status, answer.value("grpc-status")), (200, Some(status)));
        assert_eq!(answer.value("content-type"), Some("application/grpc-web"));
        assert_eq!((answer.value("content-length"), answer.text()), (Some("0"), ""));
    }
}

#[test]
fn what_is_not_binary_grpc_web_passes_a_bridge_as_it_came() {
    let origin = H2Origin::start();
    let gateway = bridge(origin.address()).start();
    for protocol in Protocol::BOTH {
        let text = |path| {
            let kind = "application/grpc-web-text+proto";
            Ask::post(10).to(path).field("content-type", kind).over(protocol, gateway.web())
        };
        let echo = text("/echo");
        echo.is_content(10);
        assert_eq!(echo.trailers, ["grpc-status: 0"], "{protocol:?}");
        let told: Value = serde_json::from_str(text("/headers").text()).expect("JSON");
        assert_eq!(told["content_type"], "application/grpc-web-text+proto", "{protocol:?}");
    }
    assert_eq!(Trio::with(|setup| setup.route("grpc_web: bridge")).client.say("gRPC")["code"], json!(0));
}
