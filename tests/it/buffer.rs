//! Request buffering: slow, refused, aborted and replayed bodies, and what a backend sees of them.

use std::net::SocketAddr;
use std::path::Path;
use std::process::Command;
use std::thread;

use forebay::origin::Running;
use forebay::phase::Phase;
use tokio_tungstenite::tungstenite::{self, Message};

use crate::harness::client::{chunked, request};
use crate::harness::gateway::Watched;
use crate::harness::nginx::noise;
use crate::harness::origin::{Closed, built_in, first_fails};
use crate::harness::{Ask, Client, End, Gateway, H2Origin, Leave, Origin, Protocol, Setup, eventually, ms, ok};

/// Sizes around the memory limit, and around the chunk sizes of HTTP/2 and the disk.
const SIZES: [u64; 6] = [0, 1, 63 << 10, 64 << 10, 65 << 10, 1 << 20];

const MIB: u64 = 1 << 20;

/// How often an endpoint was chosen.
const SELECTIONS: &str = "forebay_upstream_selections_total";

/// A gateway with both protocols and these request buffering settings.
fn before_all(addresses: &[SocketAddr], request: &str) -> Setup {
    let route = format!("buffering: {{ request: {{ {request} }} }}");
    Setup::before_all(addresses).listener("protocols: [http1, h2c]").spooling("").route(&route)
}

fn before(origin: &Running, request: &str) -> Setup {
    before_all(&[origin.address()], request)
}

/// The framing of a body with a declared length.
fn with_length(length: u64) -> String {
    if length > 0 { format!("content-length: {length}") } else { "none".to_owned() }
}

/// An upload with and without a length reaches its origin whole, in both protocols, and with its length.
fn arrives(gateway: &Gateway, ask: &Ask, length: u64) {
    for protocol in Protocol::BOTH {
        ask.over(protocol, gateway.web()).arrived(length, &with_length(length));
        ask.clone().chunked().over(protocol, gateway.web()).arrived(length, &with_length(length));
    }
}

#[test]
fn uploads_of_every_size_arrive_byte_for_byte_from_memory_and_from_disk() {
    let origin = built_in();
    for mode in ["full", "auto"] {
        for memory in ["2MiB", "64KiB", "0B"] {
            let gateway = before(&origin, &format!("mode: {mode}, memory: {memory}")).start();
            SIZES.into_iter().for_each(|length| arrives(&gateway, &Ask::put(length), length));
            gateway.wait_at_rest();
            let spilled = gateway.metric("forebay_spool_spills_total{direction=\"request\"}");
            assert_eq!(spilled > 0.0, memory != "2MiB", "{spilled} bodies of {memory} spilled");
        }
    }
}

#[test]
fn the_log_says_how_much_of_an_upload_was_held_back_and_how_much_of_that_on_disk() {
    let origin = built_in();
    // All but the first 64 KiB are on disk, minus the bytes that arrived during the last write: up to 256 KiB, and the
    // chunk that exceeded them.
    for (memory, on_disk) in [("2MiB", 0..=0), ("64KiB", MIB - ((64 + 256 + 64) << 10)..=MIB)] {
        for protocol in Protocol::BOTH {
            let gateway = before(&origin, &format!("mode: full, memory: {memory}")).start();
            Ask::put(MIB).sending(100_000, ms(1)).over(protocol, gateway.web()).arrived(MIB, &with_length(MIB));
            let line = gateway.log_line();
            let spilled = if line.has("spilled") { line.number("spilled") } else { 0.0 };
            assert_eq!(line.number("buffered"), 1_048_576.0, "{memory} {protocol:?}");
            assert!(on_disk.contains(&(spilled as u64)), "{spilled} bytes of {memory} were spilled, {protocol:?}");
            assert!(line.number("held_ms") > 0.0);
        }
    }
    let gateway = before(&origin, "mode: full").start();
    Ask::get("/bytes/1000").over(Protocol::Http1, gateway.web()).is_content(1_000);
    assert!(!gateway.log_line().has("buffered"), "what passes at once is not held");
}

#[test]
fn uploads_of_every_size_are_streamed_byte_for_byte() {
    let origin = built_in();
    let gateway = before(&origin, "mode: stream").start();
    for (length, protocol) in SIZES.into_iter().flat_map(|length| Protocol::BOTH.map(|protocol| (length, protocol))) {
        Ask::put(length).over(protocol, gateway.web()).arrived(length, &with_length(length));
        if length > 0 {
            Ask::put(length).chunked().over(protocol, gateway.web()).arrived(length, "chunked");
        }
    }
}

#[test]
fn uploads_of_20_mib_arrive_byte_for_byte_from_memory_and_from_disk() {
    let origin = built_in();
    for memory in ["32MiB", "64KiB"] {
        let gateway = before(&origin, &format!("mode: full, memory: {memory}")).start();
        arrives(&gateway, &Ask::put(20 * MIB), 20 * MIB);
        gateway.wait_at_rest();
    }
}

#[test]
fn uploads_of_300_mib_arrive_byte_for_byte_from_disk() {
    let origin = built_in();
    let gateway = before(&origin, "disk: 512MiB").start();
    Ask::put(300 * MIB).over(Protocol::Http1, gateway.web()).arrived(300 * MIB, &with_length(300 * MIB));
    Ask::put(300 * MIB).chunked().over(Protocol::Http2, gateway.web()).arrived(300 * MIB, &with_length(300 * MIB));
    gateway.wait_at_rest();
}

#[test]
fn slow_uploads_arrive_byte_for_byte_in_every_mode() {
    let origin = built_in();
    for mode in ["full, memory: 1KiB", "auto, memory: 1KiB", "auto", "stream"] {
        let gateway = before(&origin, &format!("mode: {mode}")).start();
        for protocol in Protocol::BOTH {
            let ask = Ask::put(100_000).sending(5_000, ms(10));
            ask.over(protocol, gateway.web()).arrived(100_000, "content-length: 100000");
            let framing = if mode == "stream" { "chunked" } else { "content-length: 100000" };
            ask.chunked().over(protocol, gateway.web()).arrived(100_000, framing);
        }
    }
}

#[test]
fn a_body_that_is_cut_into_odd_chunks_with_extensions_arrives_with_its_length_or_with_its_trailers() {
    let origin = Origin::named("origin");
    let gateway = Setup::before(&origin).route("buffering: { request: { mode: full } }").start();
    let (mut client, body) = (gateway.client(), noise(100_000));
    for (trailer, framing) in [("", (Some("100003"), None)), ("X-Trailer: 1\r\n", (None, Some("chunked")))] {
        client.send(request("POST", "/", "Transfer-Encoding: chunked\r\n", ""));
        let chunks = chunked(&body, 777);
        client.send(&chunks[..chunks.len() - 5]);
        client.send(format!("3;name=value\r\nend\r\n0\r\n{trailer}\r\n"));
        assert_eq!(client.response().text(), "origin");
        let got = origin.requests().pop().expect("a request");
        assert_eq!((got.value("content-length"), got.value("transfer-encoding")), framing);
        assert!(got.body == [&body, &b"end"[..]].concat());
    }
}

#[test]
fn a_slow_upload_holds_no_upstream_connection() {
    for (mode, protocol) in ["full", "auto"].into_iter().flat_map(|mode| Protocol::BOTH.map(|p| (mode, p))) {
        let origin = built_in();
        let gateway = before(&origin, &format!("mode: {mode}")).start();
        let mut upload = Ask::put(1_000).begin(protocol, gateway.web());
        assert!(upload.send(999));
        gateway.wait_phase(Phase::Buffer);
        gateway.wait_metric("forebay_spool_bytes{direction=\"request\",store=\"memory\"}", |bytes| bytes >= 999.0);
        assert_eq!(origin.accepted(), 0, "{mode} {protocol:?}");
        assert!(upload.finish_body());
        upload.answer().arrived(1_000, "content-length: 1000");
        assert!(gateway.log_line().phase(Phase::Buffer).is_some_and(|spent| spent > 0.0));
        gateway.wait_at_rest();
    }
}

#[test]
fn many_slow_uploads_hold_no_upstream_connection_and_a_fast_client_is_served_beside_them() {
    let origin = built_in();
    let gateway = before(&origin, "").start();
    let mut uploads: Vec<_> = (0..200).map(|_| Ask::put(MIB).begin(Protocol::Http1, gateway.web())).collect();
    assert!(uploads.iter_mut().all(|upload| upload.send(100_000)));
    gateway.wait_metric("forebay_phase_active{phase=\"buffer\"}", |active| active == 200.0);
    gateway.wait_metric("forebay_spool_bytes{direction=\"request\"}", |bytes| bytes >= 200.0 * 100_000.0);
    Ask::get("/bytes/1000").over(Protocol::Http1, gateway.web()).is_content(1_000);
    assert_eq!((origin.requests(), origin.accepted()), (1, 1));
    drop(uploads);
    gateway.wait_at_rest();
    assert_eq!(origin.requests(), 1, "a body that was broken off reached the backend");
}

#[test]
fn the_phases_of_a_buffered_upload_come_in_order_and_buffer_before_select() {
    let origin = built_in();
    let gateway = before(&origin, "mode: full").start();
    Ask::put(1_000).sending(100, ms(10)).over(Protocol::Http1, gateway.web()).arrived(1_000, "content-length: 1000");
    use Phase::*;
    let line = gateway.log_line();
    let mut phases = line.phases();
    phases.retain(|phase| *phase != Write);
    assert_eq!(phases, [Accept, Header, Route, Buffer, Select, Connect, Send, Wait, Receive, Finish]);
    assert!(line.phase(Buffer).is_some_and(|spent| spent >= 90.0), "{line:?}");
    let sum: f64 = Phase::ALL.into_iter().filter_map(|phase| line.phase(phase)).sum();
    assert!((sum - line.number("total_ms")).abs() <= 0.02, "{line:?}");
}

#[test]
fn a_body_that_is_here_with_its_header_goes_straight_on() {
    let origin = built_in();
    let gateway = before(&origin, "mode: auto").start();
    let mut client = gateway.client();
    assert_eq!(client.ask("PUT", "/headers", "", "small").json()["body_bytes"], 5);
    assert_eq!(gateway.metric("forebay_spool_spills_total"), 0.0);
    // In one poll: a blocked worker would make the time meaningless.
    let line = gateway.log_line();
    let held = line.phase(Phase::Buffer).unwrap_or(0.0);
    assert!(held <= line.number("own_ms"), "{held} ms in buffer: {line:?}");
}

#[test]
fn stream_reaches_the_origin_before_the_body_is_complete() {
    for protocol in Protocol::BOTH {
        let origin = built_in();
        let gateway = before(&origin, "mode: stream").start();
        let mut upload = Ask::put(1_000).begin(protocol, gateway.web());
        assert!(upload.send(500));
        eventually("half of it at the origin", || (origin.body_bytes() == 500).then_some(()));
        gateway.wait_phase(Phase::Send);
        assert!(upload.finish_body());
        upload.answer().arrived(1_000, "content-length: 1000");
        assert_eq!(gateway.log_line().phase(Phase::Buffer), None);
    }
}

#[test]
fn a_body_that_outgrows_its_disk_is_streamed_by_auto() {
    let origin = built_in();
    let gateway = before(&origin, "mode: auto, memory: 64KiB, disk: 1MiB").start();
    for protocol in Protocol::BOTH {
        Ask::put(4 * MIB).over(protocol, gateway.web()).arrived(4 * MIB, &with_length(4 * MIB));
        Ask::put(4 * MIB).chunked().over(protocol, gateway.web()).arrived(4 * MIB, "chunked");
    }
    gateway.wait_at_rest();
}

#[test]
fn grpc_goes_both_ways_at_once_in_every_mode() {
    for (mode, kind) in [("auto", "application/grpc"), ("full", "application/grpc+proto")] {
        let origin = H2Origin::start();
        let gateway = before_all(&[origin.address()], &format!("mode: {mode}")).upstream("protocol: h2c").start();
        let ask = Ask::post(30).chunked().to("/echo").field("content-type", kind).field("te", "trailers");
        let mut call = ask.begin(Protocol::Http2, gateway.web());
        for said in [10, 20, 30] {
            assert!(call.send(10));
            assert_eq!((call.read(10), call.has_read()), (10, said), "{mode}");
        }
        assert!(call.finish_body());
        let answer = call.answer();
        answer.is_content(30);
        assert_eq!(answer.trailers, ["grpc-status: 0"]);
    }
}

#[test]
fn what_only_looks_like_grpc_is_held_back_as_anything_else() {
    let (h1, h2) = (built_in(), H2Origin::start());
    let [to_http1, to_h2c, never] =
        [(h1.address(), "", ""), (h2.address(), "protocol: h2c", ""), (h2.address(), "protocol: h2c", "grpc: never")]
            .map(|(address, upstream, route)| {
                before_all(&[address], "mode: auto").upstream(upstream).route(route).start()
            });
    let kind = |kind| Ask::post(10).to("/headers").field("content-type", kind);
    for (gateway, protocol, ask) in [
        (&to_http1, Protocol::Http1, kind("application/grpc").field("te", "trailers")),
        (&to_http1, Protocol::Http2, kind("application/grpc").field("te", "trailers")),
        (&to_h2c, Protocol::Http1, kind("application/grpc").field("te", "trailers")),
        (&to_h2c, Protocol::Http2, kind("application/grpc")),
        (&to_h2c, Protocol::Http2, kind("application/grpc-web").field("te", "trailers")),
        (&to_h2c, Protocol::Http2, Ask::put(10).grpc()),
        (&never, Protocol::Http2, Ask::post(10).grpc()),
    ] {
        let chosen = gateway.metric(SELECTIONS);
        let mut call = ask.begin(protocol, gateway.web());
        assert!(call.send(5));
        gateway.wait_phase(Phase::Buffer);
        assert_eq!(gateway.metric(SELECTIONS), chosen, "{protocol:?}");
        call.send(5);
        call.finish_body();
        assert_eq!(call.answer().status, 200);
        gateway.wait_at_rest();
    }
}

#[test]
fn a_grpc_client_that_falls_silent_is_let_go() {
    let origin = H2Origin::start();
    let setup = before_all(&[origin.address()], "mode: auto").upstream("protocol: h2c");
    let gateway = setup.route("client: { body_idle: 300ms }").start();
    let mut call = Ask::post(30).grpc().chunked().to("/echo").begin(Protocol::Http2, gateway.web());
    assert!(call.send(10));
    assert_eq!((call.read(10), call.answer().end), (10, End::Cut));
    assert_eq!(gateway.log_line().reason(), "send.body_timeout");
}

#[test]
fn a_grpc_client_may_be_silent_while_it_is_answered() {
    let origin = H2Origin::start();
    let setup = before_all(&[origin.address()], "mode: auto").upstream("protocol: h2c");
    let gateway = setup.route("client: { body_idle: 600ms }").start();
    let mut call = Ask::post(30).grpc().chunked().to("/ticks").begin(Protocol::Http2, gateway.web());
    // It takes a second, in which the client sends nothing.
    assert_eq!(call.read(20), 20);
}

#[test]
fn a_body_that_says_it_is_too_large_to_be_held_is_held_for_as_long_as_it_is_not() {
    let origin = built_in();
    let gateway = before(&origin, "memory: 64KiB, disk: 0B").start();
    for protocol in Protocol::BOTH {
        let chosen = gateway.metric(SELECTIONS);
        let mut upload = Ask::put(MIB).begin(protocol, gateway.web());
        assert!(upload.send(32 << 10));
        gateway.wait_phase(Phase::Buffer);
        assert_eq!(gateway.metric(SELECTIONS), chosen, "{protocol:?}");
        assert!(upload.finish_body());
        upload.answer().arrived(MIB, &format!("content-length: {MIB}"));
        gateway.wait_at_rest();
    }
}

#[test]
fn an_upgrade_is_never_held_back() {
    let origin = Origin::scripted();
    let full = "buffering: { request: { mode: full }, response: { mode: full } }";
    let gateway = Setup::before(&origin).route(full).start();
    let address = gateway.web();
    let browser = thread::spawn(move || {
        let stream = std::net::TcpStream::connect(address).expect("the gateway to accept");
        let (mut socket, _) = tungstenite::client("ws://test/chat", stream).expect("the upgrade to pass");
        socket.send(Message::text("hello")).expect("to send");
        socket.read().expect("an answer")
    });
    let mut server = tungstenite::accept(origin.accept().into_socket()).expect("an upgrade at the origin");
    let heard = server.read().expect("a message at the origin");
    server.send(Message::text(format!("{heard} to you"))).expect("to answer");
    assert_eq!(browser.join().expect("the browser"), Message::text("hello to you"));
}

const WAITING: &str = "Expect: 100-continue\r\nContent-Length: 10\r\n";

#[test]
fn a_client_that_waits_is_told_to_go_on_before_the_backend_is_asked() {
    for mode in ["full", "auto"] {
        let origin = Origin::named("origin");
        let gateway = Setup::before(&origin).route(&format!("buffering: {{ request: {{ mode: {mode} }} }}")).start();
        let mut client = gateway.client();
        client.send(request("POST", "/", WAITING, ""));
        assert_eq!(client.response().status, 100);
        assert_eq!(origin.connections(), 0);
        client.send("ten bytes!");
        assert_eq!(client.response().text(), "origin");
        let got = origin.request();
        assert_eq!((got.value("expect"), &*got.body), (None, &b"ten bytes!"[..]));
        assert_eq!(client.get("/").status, 200, "and the connection goes on");
    }
}

#[test]
fn a_client_that_is_refused_is_not_told_to_go_on() {
    let origin = Origin::named("origin");
    for (route, status) in [
        ("buffering: { request: { max_body: 9B } }", 413),
        ("filters: [ access: { deny: [127.0.0.1] } ]", 403),
        ("buffering: { request: { mode: stream, max_body: 9B } }", 413),
    ] {
        let gateway = Setup::before(&origin).route(route).start();
        let mut client = gateway.client();
        client.send(request("POST", "/", WAITING, ""));
        assert_eq!(client.response().status, status, "{route}");
        assert_eq!(origin.connections(), 0);
    }
}

#[test]
fn a_client_that_says_it_waits_and_does_not_is_served_too() {
    let origin = built_in();
    let gateway = before(&origin, "mode: full").start();
    for protocol in Protocol::BOTH {
        let answer = Ask::put(100_000).field("expect", "100-continue").over(protocol, gateway.web());
        answer.arrived(100_000, "content-length: 100000");
        assert!(answer.interim.iter().all(|status| *status == 100), "{:?}", answer.interim);
    }
}

#[test]
fn curl_uploads_with_expect_on_both_protocols() {
    let origin = built_in();
    let gateway = before(&origin, "mode: full").start();
    for protocol in ["--http1.1", "--http2-prior-knowledge"] {
        let url = format!("http://{}/headers", gateway.web());
        let expect = ["-sS", "--max-time", "20", protocol, "-H", "Expect: 100-continue", "--data-binary", "ten bytes!"];
        let output = Command::new("curl").args(expect).arg(url).output().expect("curl");
        let seen: serde_json::Value = serde_json::from_slice(&output.stdout).expect("what the origin saw");
        assert_eq!((&seen["body_bytes"], &seen["headers"]["expect"]), (&10.into(), &serde_json::Value::Null));
    }
}

#[test]
fn a_body_whose_length_is_too_large_is_refused_before_a_byte_of_it_is_read() {
    for (mode, protocol) in ["full", "auto", "stream"].into_iter().flat_map(|mode| Protocol::BOTH.map(|p| (mode, p))) {
        let origin = built_in();
        let gateway = before(&origin, &format!("mode: {mode}, max_body: 1000B")).start();
        let mut upload = Ask::put(1_001).begin(protocol, gateway.web());
        assert_eq!(upload.status(), 413, "{mode}");
        upload.answer().refused(413, ".too_large");
        assert_eq!(gateway.log_line().number("received"), 0.0);
        assert_eq!(origin.accepted(), 0);
        Ask::put(1_000).over(protocol, gateway.web()).arrived(1_000, "content-length: 1000");
    }
}

#[test]
fn a_body_that_crosses_its_limit_with_its_last_byte_is_refused() {
    for protocol in Protocol::BOTH {
        let origin = built_in();
        let gateway = before(&origin, "mode: full, memory: 64KiB, max_body: 200000B").start();
        let ask = Ask::put(200_001).chunked();
        let mut upload = ask.begin(protocol, gateway.web());
        assert!(upload.send(200_000));
        gateway.wait_metric("forebay_spool_bytes{direction=\"request\"}", |bytes| bytes >= 200_000.0);
        upload.finish_body();
        upload.answer().refused(413, "buffer.too_large");
        gateway.refused_once("buffer.too_large");
        gateway.wait_at_rest();
        assert_eq!(origin.accepted(), 0);
        Ask::put(200_000).chunked().over(protocol, gateway.web()).arrived(200_000, "content-length: 200000");
    }
}

#[test]
fn a_streamed_body_that_crosses_its_limit_never_ends_as_a_whole_one() {
    let origin = Origin::scripted();
    let gateway = Setup::before(&origin).route("buffering: { request: { mode: stream, max_body: 10B } }").start();
    let mut client = gateway.client();
    client.send("POST / HTTP/1.1\r\nHost: test\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nfirst\r\n");
    let mut connection = origin.accept();
    connection.header();
    client.send("6\r\nsecond\r\n0\r\n\r\n");
    assert_eq!(client.response().status, 413);
    assert!(!connection.bytes(1_000_000).ends_with(b"0\r\n\r\n"), "the origin was told that this was all");
    assert_eq!(gateway.log_line().reason(), "send.too_large");
}

#[test]
fn a_client_that_goes_away_while_it_uploads_never_reaches_the_backend() {
    for (length, protocol) in [1_000, MIB].into_iter().flat_map(|length| Protocol::BOTH.map(|p| (length, p))) {
        for how in [Leave::Close, Leave::Reset, Leave::Stream] {
            let origin = built_in();
            let gateway = before(&origin, "").start();
            let mut upload = Ask::put(length).begin(protocol, gateway.web());
            assert!(upload.send(length - 1));
            gateway.wait_phase(Phase::Buffer);
            let _open = upload.leave(how);
            let line = gateway.log_line();
            assert_eq!((line.status(), line.reason()), (499, "buffer.aborted"), "{how:?} {protocol:?}");
            gateway.wait_at_rest();
            assert_eq!(origin.accepted(), 0);
        }
    }
}

#[test]
fn a_chunked_body_without_its_last_chunk_never_reaches_the_backend() {
    for piece in ["4\r\nhalf\r\n", "4\r\nhalf", "4\r\n", "0\r\n", "4\r\nhalf\r\n0\r\nX-Trailer: 1\r\n"] {
        let origin = built_in();
        let gateway = before(&origin, "mode: full").start();
        let mut client = gateway.client();
        client.send(request("POST", "/headers", "Transfer-Encoding: chunked\r\n", ""));
        client.send(piece);
        gateway.wait_phase(Phase::Buffer);
        drop(client);
        assert_eq!(gateway.log_line().reason(), "buffer.aborted", "{piece:?}");
        assert_eq!(origin.accepted(), 0, "{piece:?}");
    }
}

#[test]
fn a_body_that_is_not_framed_as_its_header_says_never_reaches_the_backend() {
    for piece in ["nonsense\r\n", "-4\r\nhalf\r\n", "4\r\nhalf!0\r\n\r\n"] {
        let origin = built_in();
        let gateway = before(&origin, "mode: full").start();
        let mut client = gateway.client();
        client.send(request("POST", "/headers", "Transfer-Encoding: chunked\r\n", ""));
        client.send(piece);
        assert_eq!(client.response().status, 400, "{piece:?}");
        client.closed();
        assert_eq!(gateway.log_line().reason(), "buffer.malformed", "{piece:?}");
        assert_eq!(origin.accepted(), 0);
    }
}

#[test]
fn an_upload_of_any_method_goes_on_to_the_next_endpoint_where_the_first_refuses_the_connection() {
    let (refusing, origin) = (Closed::refusing(), built_in());
    let setup = before_all(&[refusing.address(), origin.address()], "mode: full, memory: 64KiB");
    let gateway = setup.upstream("load_balancing: { policy: round_robin }").start();
    for ask in [Ask::put(MIB), Ask::post(MIB), Ask::put(MIB).chunked(), Ask::post(MIB).chunked()] {
        for protocol in Protocol::BOTH {
            ask.over(protocol, gateway.web()).arrived(MIB, &with_length(MIB));
        }
    }
    assert!(gateway.log_lines(8).iter().any(|line| line.number("attempts") == 2.0), "none began where it is refused");
}

#[test]
fn an_idempotent_upload_is_replayed_byte_for_byte_where_the_first_endpoint_fails_in_the_middle_of_it() {
    for fault in ["/fault/reset/100000", "/fault/close", "/fault/reset"] {
        for (length, protocol) in [MIB, 20 * MIB].into_iter().flat_map(|length| Protocol::BOTH.map(|p| (length, p))) {
            let origins = first_fails(fault);
            let gateway = before_all(&origins.each_ref().map(Running::address), "mode: full").start();
            Ask::put(length).over(protocol, gateway.web()).arrived(length, &with_length(length));
            assert_eq!(gateway.log_line().number("attempts"), 2.0, "{fault}");
            assert_eq!(origins.each_ref().map(Running::requests), [1, 1], "{fault}");
            gateway.wait_at_rest();
        }
    }
}

#[test]
fn an_upload_of_20_mib_is_replayed_from_memory_too() {
    let origins = first_fails("/fault/reset/10000000");
    let gateway = before_all(&origins.each_ref().map(Running::address), "mode: full, memory: 32MiB").start();
    Ask::put(20 * MIB).over(Protocol::Http1, gateway.web()).arrived(20 * MIB, &with_length(20 * MIB));
    assert_eq!(gateway.metric("forebay_spool_spills_total{direction=\"request\"}"), 0.0);
}

#[test]
fn a_post_is_not_sent_twice_merely_because_it_is_buffered() {
    for (fault, protocol) in
        ["/fault/reset/1000", "/fault/close"].into_iter().flat_map(|fault| Protocol::BOTH.map(|p| (fault, p)))
    {
        let origins = first_fails(fault);
        let gateway = before_all(&origins.each_ref().map(Running::address), "mode: full").start();
        assert_eq!(Ask::post(MIB).over(protocol, gateway.web()).status, 502, "{fault}");
        assert_eq!(gateway.log_line().number("attempts"), 1.0);
        assert_eq!(origins.each_ref().map(Running::requests).iter().sum::<u64>(), 1);
        gateway.wait_at_rest();
    }
}

#[test]
fn a_post_is_sent_twice_where_the_route_says_so() {
    let origins = first_fails("/fault/reset/100000");
    let setup = before_all(&origins.each_ref().map(Running::address), "mode: full");
    let gateway = setup.route("retry: { non_idempotent: true }").start();
    Ask::post(MIB).over(Protocol::Http1, gateway.web()).arrived(MIB, &with_length(MIB));
    assert_eq!(gateway.log_line().number("attempts"), 2.0);
}

#[test]
fn an_answer_that_comes_before_the_body_was_taken_is_passed_on() {
    for (length, protocol) in [MIB, 20 * MIB].into_iter().flat_map(|length| Protocol::BOTH.map(|p| (length, p))) {
        let origin = built_in();
        let gateway = before(&origin, "mode: full").start();
        let answer = Ask::put(length).to("/fault/early").over(protocol, gateway.web());
        assert_eq!((answer.status, answer.length), (413, 0), "{length} {protocol:?}");
        gateway.wait_at_rest();
    }
}

#[test]
fn a_connection_goes_on_after_a_buffered_upload() {
    let origin = Origin::answering(|request| ok(format!("{} {}", request.target(), request.body.len())));
    let gateway = Setup::before(&origin).route("buffering: { request: { mode: full, memory: 1KiB } }").start();
    let mut client = gateway.client();
    for n in 0..3 {
        assert_eq!(client.ask("POST", "/length", "", vec![b'x'; 100_000]).text(), "/length 100000");
        client.send(request("POST", "/chunks", "Transfer-Encoding: chunked\r\n", ""));
        client.send(chunked(&[b'x'; 50_000], 4_000));
        assert_eq!(client.response().text(), "/chunks 50000");
        assert_eq!(client.get("/").text(), "/ 0", "after {n}");
    }
    assert_eq!(origin.connections(), 1);
}

#[test]
fn pipelined_uploads_are_buffered_and_answered_in_order() {
    let origin = Origin::answering(|request| ok(format!("{} {}", request.target(), request.body.len())));
    let gateway = Setup::before(&origin).route("buffering: { request: { mode: full } }").start();
    let mut client = gateway.client();
    let mut burst = request("POST", "/first", "", vec![b'x'; 100_000]);
    burst.extend(request("POST", "/second", "Transfer-Encoding: chunked\r\n", ""));
    burst.extend(chunked(&[b'x'; 100_000], 1_000));
    burst.extend(request("GET", "/third", "", ""));
    client.send(burst);
    for expected in ["/first 100000", "/second 100000", "/third 0"] {
        assert_eq!(client.response().text(), expected);
    }
}

#[test]
fn an_upload_to_an_http_2_upstream_arrives_byte_for_byte() {
    let origin = H2Origin::start();
    let gateway = before_all(&[origin.address()], "mode: full").upstream("protocol: h2c").start();
    for (length, protocol) in [0, 1, MIB].into_iter().flat_map(|length| Protocol::BOTH.map(|p| (length, p))) {
        let answer = Ask::put(length).chunked().over(protocol, gateway.web());
        answer.arrived(length, &format!("content-length: {length}"));
    }
}

#[test]
fn the_host_of_a_buffered_http_2_request_is_its_authority() {
    let origin = Origin::named("origin");
    let gateway = Setup::before(&origin)
        .listener("protocols: [h2c]")
        .route("buffering: { request: { mode: full }, response: { mode: full } }")
        .start();
    assert_eq!(Ask::put(1_000).over(Protocol::Http2, gateway.web()).text(), "origin");
    assert_eq!(origin.request().values("host"), ["test"]);
    let answer = Ask::put(10).field("host", "elsewhere").over(Protocol::Http2, gateway.web());
    assert!(answer.status == 400 || origin.requests().iter().all(|request| request.values("host") == ["test"]));
}

#[test]
fn a_spooled_body_lies_in_a_file_without_a_name_that_only_its_owner_may_read() {
    use std::os::unix::fs::MetadataExt;
    let origin = built_in();
    let setup = before(&origin, "mode: full");
    let mut process = setup.spawn();
    let mut upload = Ask::put(2 * MIB).begin(Protocol::Http1, process.web());
    assert!(upload.send(MIB));
    process.wait_metric("forebay_spool_bytes{direction=\"request\",store=\"disk\"}", |bytes| bytes > 0.0);
    let file = eventually("an open file", || process.spool_files().pop());
    assert_eq!((file.mode() & 0o777, file.nlink()), (0o600, 0));
    assert!(process.runs());
    drop(process);
    assert_eq!(std::fs::read_dir(setup.spool_dir()).expect("the spool directory").count(), 0, "left after a crash");
}

#[test]
fn nothing_is_left_open_after_uploads_that_came_and_uploads_that_did_not() {
    let origin = built_in();
    let process = before(&origin, "mode: full").spawn();
    let idle = process.open_besides_loops().len();
    for protocol in Protocol::BOTH {
        Ask::put(MIB).over(protocol, process.web()).arrived(MIB, &with_length(MIB));
        let mut upload = Ask::put(MIB).begin(protocol, process.web());
        assert!(upload.send(MIB - 1));
        process.wait_phase(Phase::Buffer);
        upload.leave(Leave::Reset);
    }
    process.wait_at_rest();
    eventually("every file to be closed", || {
        (process.open_besides_loops().len() <= idle + origin.connections() as usize && process.spool_files().is_empty())
            .then_some(())
    });
}

#[test]
fn an_upload_in_chunks_of_one_byte_takes_little_more_memory_than_its_bytes() {
    let origin = built_in();
    // Huge pages would make the memory vary by 2 MiB, since the kernel counts a whole page once a byte of it is
    // used.
    let environment = [("MIMALLOC_ALLOW_THP", Path::new("0"))];
    let process = before(&origin, "mode: full, memory: 1MiB").spawn_with(&environment);
    let before = process.resident_bytes();
    let mut client = Client::connect(process.web());
    client.send(request("PUT", "/headers", "Transfer-Encoding: chunked\r\n", ""));
    client.send(&chunked(&noise(500_000), 1)[..2_900_000]);
    process.wait_phase(Phase::Buffer);
    process.wait_metric("forebay_spool_bytes{direction=\"request\"}", |bytes| bytes >= 480_000.0);
    let grown = process.resident_bytes().saturating_sub(before);
    assert!(grown < 4 << 20, "{grown} bytes for half a million");
}
