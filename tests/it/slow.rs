//! Response buffering for slow clients: the backend is released, and the client gets the complete response.

use std::net::SocketAddr;
use std::thread;

use bytes::Bytes;
use forebay::origin::Running;
use forebay::phase::Phase;

use crate::harness::client::request;
use crate::harness::gateway::Watched;
use crate::harness::origin::{built_in, first_fails, response};
use crate::harness::{Ask, End, H2Origin, Leave, Nginx, Origin, Protocol, Setup, eventually, ms};

const SIZES: [u64; 6] = [0, 1, 63 << 10, 64 << 10, 65 << 10, 1 << 20];

const MIB: u64 = 1 << 20;

/// A gateway with both protocols and these response buffering settings.
fn before_all(addresses: &[SocketAddr], response: &str) -> Setup {
    let route = format!("buffering: {{ response: {{ {response} }} }}");
    Setup::before_all(addresses).listener("protocols: [http1, h2c]").spooling("").route(&route)
}

fn before(origin: &Running, response: &str) -> Setup {
    before_all(&[origin.address()], response)
}

#[test]
fn answers_of_every_size_and_framing_come_byte_for_byte_in_every_mode() {
    let origin = built_in();
    for mode in ["auto", "full", "stream", "auto, memory: 0B", "full, memory: 4KiB", "full, memory: 2MiB"] {
        let gateway = before(&origin, &format!("mode: {mode}")).start();
        for (framing, protocol) in
            ["bytes", "chunked", "until-close"].into_iter().flat_map(|framing| Protocol::BOTH.map(|p| (framing, p)))
        {
            for length in SIZES {
                Ask::get(format!("/{framing}/{length}")).over(protocol, gateway.web()).is_content(length);
            }
        }
        gateway.wait_at_rest();
    }
}

#[test]
fn answers_of_every_size_come_byte_for_byte_to_a_client_that_takes_little_at_once() {
    let origin = built_in();
    for mode in ["auto", "full", "stream", "auto, memory: 4KiB"] {
        let gateway = before(&origin, &format!("mode: {mode}")).start();
        for (length, protocol) in SIZES.into_iter().flat_map(|length| Protocol::BOTH.map(|p| (length, p))) {
            Ask::get(format!("/bytes/{length}")).narrow().over(protocol, gateway.web()).is_content(length);
            Ask::get(format!("/chunked/{length}")).narrow().over(protocol, gateway.web()).is_content(length);
        }
        gateway.wait_at_rest();
    }
}

#[test]
fn an_answer_of_300_mib_comes_byte_for_byte_from_disk_after_the_backend_is_done() {
    let origin = built_in();
    let gateway = before(&origin, "mode: auto, disk: 512MiB").start();
    let mut slow = Ask::get("/bytes/300MiB").begin(Protocol::Http1, gateway.web());
    assert_eq!(slow.status(), 200);
    eventually("the backend to be let go", || (origin.busy() == 0).then_some(()));
    gateway.wait_metric("forebay_spool_bytes{direction=\"response\",store=\"disk\"}", |bytes| bytes > 2e8);
    slow.answer().is_content(300 * MIB);
    gateway.wait_at_rest();
}

#[test]
fn an_answer_of_20_mib_comes_byte_for_byte_from_memory_and_from_disk() {
    let origin = built_in();
    for memory in ["32MiB", "64KiB"] {
        let gateway = before(&origin, &format!("mode: full, memory: {memory}")).start();
        for protocol in Protocol::BOTH {
            Ask::get("/chunked/20MiB").over(protocol, gateway.web()).is_content(20 * MIB);
        }
        let spilled = gateway.metric("forebay_spool_spills_total{direction=\"response\",reason=\"memory\"}");
        assert_eq!(spilled > 0.0, memory == "64KiB");
    }
}

#[test]
fn a_slow_reader_lets_the_backend_go_long_before_it_is_done() {
    for (mode, protocol) in ["auto", "full"].into_iter().flat_map(|mode| Protocol::BOTH.map(|p| (mode, p))) {
        let origin = built_in();
        let gateway = before(&origin, &format!("mode: {mode}")).start();
        let mut slow = Ask::get("/bytes/20MiB").reading(1_000, ms(1)).begin(protocol, gateway.web());
        assert_eq!(slow.read(100_000), 100_000);
        eventually("the backend to be let go", || (origin.busy() == 0).then_some(()));
        gateway.wait_phase(Phase::Write);
        gateway.wait_metric("forebay_slow_clients{direction=\"response\"}", |clients| clients == 1.0);
        assert_eq!(slow.read(100_000), 100_000);
        slow.hurry();
        slow.answer().is_content(20 * MIB);
        gateway.wait_at_rest();
        gateway.wait_metric("forebay_upstream_saved_seconds_total{route=\"all\"}", |saved| saved >= 0.1);
        assert_eq!(gateway.metric("forebay_upstream_held_seconds_count{route=\"all\"}"), 1.0);
        assert!(gateway.log_line().phase(Phase::Write).is_some_and(|spent| spent >= 100.0));
    }
}

#[test]
fn the_log_says_what_was_held_back_and_what_the_backend_was_spared() {
    for protocol in Protocol::BOTH {
        let origin = built_in();
        let gateway = before(&origin, "mode: full, memory: 64KiB").start();
        let mut slow = Ask::get("/bytes/4MiB").reading(1_000, ms(1)).begin(protocol, gateway.web());
        gateway.wait_phase(Phase::Write);
        assert_eq!(slow.read(100_000), 100_000);
        slow.hurry();
        slow.answer().is_content(4 * MIB);
        let line = gateway.log_line();
        let [buffered, spilled, held, saved] =
            ["buffered", "spilled", "held_ms", "saved_ms"].map(|field| line.number(field));
        assert_eq!(buffered, 4.0 * 1_048_576.0, "{protocol:?}");
        // All except the first 64 KiB, less at most one write and one chunk at the end.
        assert!(spilled <= buffered && spilled >= buffered - 196_608.0, "{spilled} bytes were spilled");
        let [connect, write] = [Phase::Connect, Phase::Write].map(|phase| line.phase(phase).expect("a phase"));
        assert!(held > 0.0 && held <= line.number("total_ms") - saved - connect, "{held} ms held");
        // At least the time to read 100 KB at the client's pace.
        assert!(saved >= 100.0 && saved <= write, "{saved} ms saved");
    }
}

#[test]
fn forty_slow_readers_hold_no_backend_and_a_fast_client_is_served_beside_them() {
    let origin = built_in();
    let gateway = before(&origin, "mode: auto").start();
    let ask = Ask::get("/bytes/4MiB");
    let mut slow: Vec<_> = (0..40).map(|n| ask.begin(Protocol::BOTH[n % 2], gateway.web())).collect();
    assert!(slow.iter_mut().all(|client| client.read(1_000) == 1_000));
    eventually("the backend to be let go", || (origin.busy() == 0).then_some(()));
    Ask::get("/bytes/1000").over(Protocol::Http1, gateway.web()).is_content(1_000);
    slow.into_iter().for_each(|client| client.answer().is_content(4 * MIB));
    gateway.wait_at_rest();
}

/// Responses that are never buffered, because of the route or the origin.
const STREAMED: [(&str, &str); 5] = [
    ("stream", ""),
    ("auto", "X-Accel-Buffering: no\r\n"),
    ("full", "X-Accel-Buffering: no\r\n"),
    ("auto", "Content-Type: text/event-stream\r\n"),
    ("full", "Content-Type: text/event-stream; charset=utf-8\r\n"),
];

#[test]
fn what_is_never_held_back_waits_for_its_reader() {
    for ((mode, fields), protocol) in STREAMED.into_iter().flat_map(|case| Protocol::BOTH.map(|p| (case, p))) {
        let origin = Origin::answering(move |_| response("200 OK", fields, vec![b'x'; 64 << 20]));
        let gateway = before_all(&[origin.address()], &format!("mode: {mode}")).start();
        let mut slow = Ask::get("/").narrow().begin(protocol, gateway.web());
        assert_eq!(slow.read(MIB), MIB);
        gateway.wait_phase(Phase::Receive);
        assert_eq!(origin.answered(), 0, "{mode} {fields} {protocol:?}");
        let held = gateway.metric("forebay_spool_bytes{direction=\"response\"}");
        assert!(held < 1e6, "{held} bytes are held back");
        drop(slow);
        gateway.wait_at_rest();
    }
}

#[test]
fn what_is_never_held_back_leaves_at_once() {
    for (mode, fields) in STREAMED {
        let origin = Origin::scripted();
        let setup = Setup::before(&origin).route(&format!("buffering: {{ response: {{ mode: {mode} }} }}"));
        let (_gateway, mut client, mut connection) = setup.asked(&origin);
        connection.send(format!("HTTP/1.1 200 OK\r\n{fields}Transfer-Encoding: chunked\r\n\r\n"));
        for event in ["7\r\ndata: 1\r\n", "7\r\ndata: 2\r\n"] {
            connection.send(event);
            let mut seen = Vec::new();
            while !seen.ends_with(event.as_bytes()) {
                seen.extend(client.bytes(1));
            }
        }
    }
}

#[test]
fn auto_lets_bytes_leave_as_they_come() {
    let origin = Origin::scripted();
    let (_gateway, mut client, mut connection) = Setup::before(&origin).asked(&origin);
    connection.send("HTTP/1.1 200 OK\r\nContent-Length: 8\r\n\r\nhalf");
    let mut seen = Vec::new();
    while !seen.ends_with(b"half") {
        seen.extend(client.bytes(1));
    }
    connection.send("rest");
    assert_eq!(client.bytes(4), b"rest");
}

#[test]
fn full_lets_nothing_leave_before_the_end() {
    let origin = Origin::scripted();
    let setup = Setup::before(&origin).route("buffering: { response: { mode: full } }");
    let (gateway, mut client, mut connection) = setup.asked(&origin);
    connection.send("HTTP/1.1 200 OK\r\nContent-Length: 8\r\n\r\nhalf");
    gateway.wait_metric("forebay_spool_bytes{direction=\"response\"}", |bytes| bytes >= 4.0);
    assert!(client.is_silent());
    connection.send("rest");
    assert_eq!(client.response().text(), "halfrest");
}

#[test]
fn an_answer_that_fails_half_way_is_a_clean_502_where_nothing_has_left() {
    for (fault, protocol) in ["/fault/half", "/fault/half/1MiB", "/fault/half-chunked"]
        .into_iter()
        .flat_map(|f| Protocol::BOTH.map(|p| (f, p)))
    {
        let origin = built_in();
        let gateway = before(&origin, "mode: full").start();
        Ask::post(10).to(fault).over(protocol, gateway.web()).refused(502, "receive.reset");
        assert_eq!((gateway.log_line().status(), gateway.log_line().reason()), (502, "receive.reset"));
        gateway.wait_at_rest();
        Ask::get("/bytes/10").over(protocol, gateway.web()).is_content(10);
    }
}

#[test]
fn an_answer_that_fails_half_way_is_asked_for_again_elsewhere_where_nothing_has_left() {
    for (fault, protocol) in
        ["/fault/half/200000", "/fault/half-chunked"].into_iter().flat_map(|f| Protocol::BOTH.map(|p| (f, p)))
    {
        let origins = first_fails(fault);
        let gateway = before_all(&origins.each_ref().map(Running::address), "mode: full, memory: 4KiB").start();
        Ask::get("/bytes/300000").over(protocol, gateway.web()).is_content(300_000);
        assert_eq!((gateway.log_line().number("attempts"), gateway.log_line().reason()), (2.0, ""));
        gateway.wait_at_rest();
    }
}

#[test]
fn half_an_answer_never_ends_as_a_whole_one_however_slowly_it_is_read() {
    for (fault, protocol) in
        ["/fault/half/2MiB", "/fault/half-chunked"].into_iter().flat_map(|fault| Protocol::BOTH.map(|p| (fault, p)))
    {
        let origin = built_in();
        let gateway = before(&origin, "mode: auto").start();
        let mut slow = Ask::get(fault).narrow().begin(protocol, gateway.web());
        if slow.status() == 502 {
            // It failed before any of it was sent, which is possible for a short response: so the client gets an
            // error.
            assert_eq!(fault, "/fault/half-chunked");
            slow.answer().refused(502, "receive.reset");
            assert_eq!((gateway.log_line().status(), gateway.log_line().reason()), (502, "receive.reset"));
            gateway.wait_at_rest();
            continue;
        }
        eventually("the backend to fail", || (origin.connections() == 0).then_some(()));
        let answer = slow.answer();
        assert_eq!(answer.end, End::Cut, "{fault} {protocol:?}");
        assert!(answer.length <= MIB, "{} bytes", answer.length);
        assert_eq!(gateway.log_line().reason(), "receive.reset");
        gateway.wait_at_rest();
    }
}

#[test]
fn a_client_that_goes_away_while_it_reads_lets_a_busy_backend_go_at_once() {
    for (how, protocol) in
        [Leave::Close, Leave::Reset, Leave::Stream].into_iter().flat_map(|how| Protocol::BOTH.map(|p| (how, p)))
    {
        let origin = built_in();
        let gateway = before(&origin, "mode: auto, disk: 1MiB").start();
        let mut slow = Ask::get("/bytes/64MiB").narrow().begin(protocol, gateway.web());
        assert_eq!(slow.read(1_000), 1_000);
        gateway.wait_metric("forebay_spool_bytes{direction=\"response\"}", |bytes| bytes > 1e6);
        assert_eq!(origin.busy(), 1, "the limits of the route hold");
        let _open = slow.leave(how);
        eventually("the backend to be let go", || (origin.connections() == 0).then_some(()));
        assert_eq!(gateway.log_line().reason(), "receive.aborted", "{how:?} {protocol:?}");
        gateway.wait_at_rest();
    }
}

#[test]
fn a_client_that_goes_away_after_the_backend_is_done_leaves_nothing_behind() {
    for (how, protocol) in
        [Leave::Close, Leave::Reset, Leave::Stream].into_iter().flat_map(|how| Protocol::BOTH.map(|p| (how, p)))
    {
        let origin = built_in();
        let process = before(&origin, "mode: auto").spawn();
        let mut slow = Ask::get("/bytes/20MiB").narrow().begin(protocol, process.web());
        assert_eq!(slow.read(1_000), 1_000);
        process.wait_phase(Phase::Write);
        assert_eq!(process.spool_files().len(), 1);
        let _open = slow.leave(how);
        assert_eq!(process.log_line().reason(), "write.aborted", "{how:?} {protocol:?}");
        process.wait_at_rest();
        eventually("its file to be closed", || process.spool_files().is_empty().then_some(()));
        assert!(process.stderr().lines().all(|line| !line.contains("panicked")), "{}", process.stderr());
    }
}

#[test]
fn a_client_that_goes_away_in_any_phase_leaves_nothing_behind() {
    let origin = built_in();
    // A client that closes its connection is gone; it has not only stopped sending.
    let route = "buffering: { request: { mode: full }, response: { mode: auto } }, client: { half_close: abort }";
    let setup = Setup::before_all(&[origin.address()]).listener("protocols: [http1, h2c]").spooling("").route(route);
    let process = setup.spawn();
    let idle = process.open_besides_loops().len();
    let get = |path: &str| Ask::get(path).narrow();
    for (phase, ask, sent) in [
        (Phase::Buffer, Ask::put(1_000), 500),
        (Phase::Buffer, Ask::put(MIB).chunked(), MIB),
        (Phase::Wait, get("/delay/1h"), 0),
        (Phase::Wait, Ask::put(MIB).to("/delay/1h"), MIB),
        (Phase::Receive, get("/drip/1000/1s"), 0),
        (Phase::Receive, get("/fault/stall"), 0),
        (Phase::Write, get("/bytes/20MiB"), 0),
    ] {
        for (how, protocol) in
            [Leave::Close, Leave::Reset, Leave::Stream].into_iter().flat_map(|how| Protocol::BOTH.map(|p| (how, p)))
        {
            let mut exchange = ask.begin(protocol, process.web());
            assert!(if phase == Phase::Buffer { exchange.send(sent) } else { exchange.finish_body() });
            process.wait_phase(phase);
            println!("{phase} {protocol:?}: the client goes away by {how:?}");
            let _open = exchange.leave(how);
            process.wait_at_rest();
        }
    }
    eventually("every file to be closed", || {
        let open = process.open_besides_loops();
        (open.len() <= idle + origin.connections() as usize && process.spool_files().is_empty()).then_some(())
    });
    assert!(!process.stderr().contains("panicked"), "{}", process.stderr());
}

#[test]
fn a_client_that_goes_away_while_a_backend_does_not_take_its_upload_lets_it_go() {
    for (how, protocol) in
        [Leave::Close, Leave::Reset, Leave::Stream].into_iter().flat_map(|how| Protocol::BOTH.map(|p| (how, p)))
    {
        let origin = built_in();
        let route = "buffering: { request: { mode: full } }, client: { half_close: abort }";
        let setup =
            Setup::before_all(&[origin.address()]).listener("protocols: [http1, h2c]").spooling("").route(route);
        let gateway = setup.start();
        let mut upload = Ask::put(32 * MIB).to("/fault/hang").begin(protocol, gateway.web());
        assert!(upload.finish_body());
        gateway.wait_phase(Phase::Send);
        let _open = upload.leave(how);
        eventually("the backend to be let go", || (origin.connections() == 0).then_some(()));
        assert_eq!(gateway.log_line().reason(), "send.aborted", "{how:?} {protocol:?}");
        gateway.wait_at_rest();
    }
}

#[test]
fn a_backend_that_breaks_off_in_any_phase_leaves_nothing_behind() {
    let origin = built_in();
    for mode in ["auto", "full", "stream"] {
        let both = format!("buffering: {{ request: {{ mode: {mode} }}, response: {{ mode: {mode} }} }}");
        let setup = Setup::before_all(&[origin.address()]).listener("protocols: [http1, h2c]").spooling("");
        let process = setup.route(&both).spawn();
        // A worker has started, and opened its files, once it has served a request.
        assert_eq!(process.client().get("/bytes/1").status, 200);
        process.wait_at_rest();
        let idle = process.open_besides_loops().len() - origin.connections() as usize;
        for fault in ["close", "reset", "reset/100000", "early", "garbage", "half", "half/1MiB", "half-chunked"] {
            for protocol in Protocol::BOTH {
                let mut exchange = Ask::put(MIB).to(format!("/fault/{fault}")).begin(protocol, process.web());
                exchange.finish_body();
                if exchange.try_status().is_some() {
                    let answer = exchange.answer();
                    assert!(answer.status >= 400 || answer.end == End::Cut, "{fault}: {}", answer.status);
                }
            }
        }
        process.wait_at_rest();
        eventually("every file to be closed", || {
            (process.open_besides_loops().len() <= idle + origin.connections() as usize).then_some(())
        });
        assert!(!process.stderr().contains("panicked"), "{}", process.stderr());
    }
}

#[test]
fn a_connection_goes_on_after_a_buffered_answer() {
    let origin = built_in();
    for mode in ["auto", "full"] {
        let gateway = before(&origin, &format!("mode: {mode}, memory: 4KiB")).start();
        let mut client = crate::harness::Client::slow(gateway.web());
        for path in ["/bytes/1MiB", "/chunked/1MiB", "/status/204", "/bytes/10", "/chunked/100000"] {
            let answer = client.get(path);
            assert_eq!(answer.end, End::Complete, "{path}");
        }
        assert_eq!(client.ask("HEAD", "/bytes/1MiB", "", "").value("content-length"), Some("1048576"));
        assert_eq!(client.get("/bytes/10").text().len(), 10);
        gateway.wait_metric("forebay_client_connections", |open| open == 1.0);
    }
}

#[test]
fn pipelined_answers_come_whole_and_in_order_to_a_slow_reader() {
    let origin = built_in();
    let gateway = before(&origin, "mode: auto, memory: 4KiB").start();
    let mut client = crate::harness::Client::slow(gateway.web());
    let paths = ["/bytes/300000", "/chunked/200000", "/bytes/1", "/bytes/100000"];
    client.send(paths.map(|path| request("GET", path, "", "")).concat());
    for length in [300_000, 200_000, 1, 100_000] {
        let answer = client.response();
        assert!(answer.end == End::Complete && answer.body == forebay::origin::content(length), "{length}");
    }
}

#[test]
fn ranges_heads_and_answers_without_a_body_are_as_without_buffering() {
    let nginx = Nginx::start();
    let tag = crate::harness::client::get(nginx.address(), "/large").value("etag").expect("a tag").to_owned();
    for (mode, protocol) in ["auto", "full"].into_iter().flat_map(|mode| Protocol::BOTH.map(|p| (mode, p))) {
        let gateway = before_all(&[nginx.address()], &format!("mode: {mode}, memory: 4KiB")).start();
        let range = Ask::get("/large").field("range", "bytes=1000-50999").narrow().over(protocol, gateway.web());
        assert_eq!((range.status, range.end), (206, End::Complete));
        assert!(range.body == nginx.file("/large")[1_000..51_000]);
        for (ask, status, length) in [
            (Ask::get("/large").method("HEAD"), 200, Some("20000000")),
            (Ask::get("/chunked").method("HEAD"), 200, None),
            (Ask::get("/nothing"), 204, None),
            (Ask::get("/large").field("if-none-match", &tag), 304, None),
        ] {
            let answer = ask.over(protocol, gateway.web());
            assert_eq!((answer.status, answer.length, answer.end), (status, 0, End::Complete), "{mode} {protocol:?}");
            assert_eq!(answer.value("content-length").filter(|_| length.is_some()), length);
        }
    }
}

#[test]
fn trailers_come_whole_however_the_answer_is_held() {
    let (h1, h2) = (built_in(), H2Origin::start());
    for (mode, protocol) in ["auto", "full", "stream"].into_iter().flat_map(|mode| Protocol::BOTH.map(|p| (mode, p))) {
        let mode = format!("mode: {mode}");
        let gateways = [before_all(&[h2.address()], &mode).upstream("protocol: h2c"), before(&h1, &mode)];
        for gateway in gateways.map(|setup| setup.start()) {
            let answer = Ask::get("/trailers").over(protocol, gateway.web());
            assert_eq!((answer.text(), answer.end), ("A trailer follows.\n", End::Complete), "{mode}");
            assert_eq!(answer.trailers, ["x-trailer: the end"], "{mode} {protocol:?}");
        }
    }
}

#[test]
fn trailers_follow_an_answer_that_was_held_back() {
    let origin = H2Origin::start();
    for mode in ["auto, memory: 4KiB", "full, memory: 4KiB", "auto", "stream"] {
        let gateway = before_all(&[origin.address()], &format!("mode: {mode}")).upstream("protocol: h2c").start();
        let ask = Ask::post(MIB).to("/echo").narrow();
        let mut echo = ask.begin(Protocol::Http2, gateway.web());
        assert!(echo.finish_body());
        let answer = echo.answer();
        answer.is_content(MIB);
        assert_eq!(answer.trailers, ["grpc-status: 0"], "{mode}");
    }
}

#[test]
fn interim_answers_pass_however_the_answer_is_held() {
    let origin = built_in();
    for mode in ["auto", "full", "stream"] {
        let gateway = before(&origin, &format!("mode: {mode}")).start();
        for protocol in Protocol::BOTH {
            let answer = Ask::get("/early-hints").over(protocol, gateway.web());
            assert_eq!((answer.status, answer.interim, answer.end), (200, vec![103], End::Complete), "{mode}");
        }
    }
}

#[test]
fn an_http_1_0_client_gets_a_held_answer_whole_and_the_end_of_the_connection() {
    let origin = built_in();
    for mode in ["auto", "full"] {
        let gateway = before(&origin, &format!("mode: {mode}, memory: 4KiB")).start();
        let mut client = crate::harness::Client::slow(gateway.web());
        client.send("GET /chunked/300000 HTTP/1.0\r\nHost: test\r\n\r\n");
        let answer = client.response();
        assert_eq!((answer.status, answer.value("transfer-encoding"), answer.end), (200, None, End::Complete));
        assert!(answer.body == forebay::origin::content(300_000), "{mode}");
        client.closed();
    }
}

#[test]
fn a_response_filter_sees_a_held_answer_as_it_sees_another() {
    let origin = built_in();
    let gateway =
        before(&origin, "mode: full, memory: 4KiB").filters("headers: { response: { set: { x-seen: \"1\" } } }");
    let gateway = gateway.start();
    for protocol in Protocol::BOTH {
        let answer = Ask::get("/bytes/300000").over(protocol, gateway.web());
        assert_eq!(answer.value("x-seen"), Some("1"));
        answer.is_content(300_000);
    }
}

#[test]
fn one_stream_that_is_not_read_holds_up_no_other_of_its_connection() {
    let origin = built_in();
    let gateway = before(&origin, "mode: auto").start();
    let client = crate::harness::H2Client::narrow(gateway.web(), 65_535);
    let get = |path| http::Request::get(format!("http://test{path}")).body(()).expect("a request");
    // A single stream would use up a connection window of its size, so this one reads a little less.
    let mut answer = client.step(client.begin(get("/bytes/60000"), true).0).expect("an answer").into_body();
    let stuck: Bytes = client.step(answer.data()).expect("a piece").expect("no reset");
    assert!(!stuck.is_empty());
    assert_eq!(client.get("/bytes/1000").body.len(), 1_000);
}

#[test]
fn a_stop_waits_for_a_slow_reader_until_its_deadline() {
    let origin = built_in();
    let mut process = before(&origin, "mode: auto").spawn();
    let mut slow = Ask::get("/bytes/4MiB").narrow().begin(Protocol::Http1, process.web());
    assert_eq!(slow.read(1_000), 1_000);
    process.wait_phase(Phase::Write);
    process.signal(libc::SIGTERM);
    let reader = thread::spawn(move || slow.answer());
    reader.join().expect("the reader").is_content(4 * MIB);
    assert_eq!(process.ended().code(), Some(0));
}
