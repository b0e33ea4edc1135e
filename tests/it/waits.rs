//! Wherever an exchange waits, it notices that its client has left, that the other side takes too long, and that
//! the gateway stops.
//!
//! [`Place`] lists all places where an exchange waits. Each test brings an exchange there, with only the tested
//! deadline nearby. Waits through `party/wait.rs` have a deadline and observe the client by their type; the last
//! test finds waits that bypass it.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Instant;

use bytes::Bytes;
use forebay::origin::Running;
use forebay::phase::Phase;
use h2::SendStream;
use h2::client::ResponseFuture;
use regex::Regex;

use crate::harness::client::request;
use crate::harness::gateway::{StillDisk, Watched};
use crate::harness::origin::{Closed, Connection, built_in};
use crate::harness::{Client, H2Client, Origin, Process, Protocol, Setup, eventually, ms};

const MIB: usize = 1 << 20;

/// Where an exchange waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    /// For the rest of its header.
    Header,
    /// For the rest of its body, which is buffered.
    Body,
    /// For memory, to hold more of its body.
    Memory,
    /// For the disk, to hold more of its body.
    UploadToDisk,
    /// For an endpoint below its limits.
    Queue,
    /// For the next attempt.
    Backoff,
    /// For a connection.
    Connect,
    /// For an endpoint that reads no more of its body.
    Send,
    /// For the response.
    Wait,
    /// For the rest of the response.
    Receive,
    /// For the disk, with full response buffering.
    AnswerToDisk,
    /// For the maximum rate to allow more.
    Throttle,
    /// For its client to read more.
    Write,
    /// For the disk, to read back the buffered response.
    AnswerFromDisk,
}

use Place::*;

const ALL: [Place; 14] = [
    Header,
    Body,
    Memory,
    UploadToDisk,
    Queue,
    Backoff,
    Connect,
    Send,
    Wait,
    Receive,
    AnswerToDisk,
    Throttle,
    Write,
    AnswerFromDisk,
];

impl Place {
    fn phase(self) -> Phase {
        match self {
            Header => Phase::Header,
            Body | Memory | UploadToDisk => Phase::Buffer,
            Queue => Phase::Queue,
            Backoff => Phase::Select,
            Connect => Phase::Connect,
            Send => Phase::Send,
            Wait => Phase::Wait,
            Receive | AnswerToDisk => Phase::Receive,
            Throttle | Write | AnswerFromDisk => Phase::Write,
        }
    }

    /// The path to request.
    fn path(self) -> &'static str {
        match self {
            AnswerToDisk | Write | AnswerFromDisk => "/bytes/8MiB",
            Throttle => "/bytes/300000",
            _ => "/asked",
        }
    }

    fn uploads(self) -> bool {
        matches!(self, Body | Memory | UploadToDisk | Send)
    }
}

/// A client at such a place.
enum Someone {
    One(Client),
    Two { client: H2Client, response: Option<ResponseFuture>, body: SendStream<Bytes> },
}

/// How a client leaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Leaving {
    /// Closes its connection.
    Fin,
    Reset,
    /// Sends a byte of its next request, then resets.
    ResetBehindAByte,
    /// Resets only its stream.
    Stream,
}

/// Deadlines that are nearby: of the listener, the upstream, the route, the resources, the stop.
#[derive(Clone, Copy, Default)]
struct Near {
    header: Option<&'static str>,
    client: Option<&'static str>,
    upstream: Option<&'static str>,
    queue: Option<&'static str>,
    pause: Option<&'static str>,
    stop: Option<&'static str>,
    /// A client that shuts down its sending side after its request is gone.
    aborts: bool,
}

/// A program, its backends, and whatever blocks an exchange.
struct Scene {
    place: Place,
    /// Continues before the program ends, which otherwise waits for its threads.
    disk: Option<StillDisk>,
    process: Process,
    origin: Origin,
    kept: Vec<Connection>,
    others: Vec<Client>,
    _built_in: Running,
    _silent: Option<Closed>,
}

/// The exchanges that block others.
const OTHERS: [&str; 2] = ["/first", "/bytes/32MiB"];

impl Scene {
    /// A scene where only the deadlines in `near` are nearby.
    fn set(place: Place, near: Near) -> Scene {
        let (origin, built_in) = (Origin::scripted(), built_in());
        let silent = (place == Connect).then(Closed::silent);
        let target = match (place, &silent) {
            (Memory | AnswerToDisk | Throttle | Write | AnswerFromDisk, _) => built_in.address(),
            (_, Some(silent)) => silent.address(),
            _ => origin.address(),
        };
        let [mode, answer] = match place {
            Send => ["stream", "auto"],
            AnswerToDisk => ["auto", "full"],
            _ => ["full", "auto"],
        };
        let limits = if place == Memory { "memory: 1MiB, disk: 0B" } else { "memory: 16KiB, disk: 64MiB" };
        let buffering =
            format!("buffering: {{ request: {{ mode: {mode}, {limits} }}, response: {{ mode: {answer}, {limits} }} }}");
        let client = if place == Throttle { "limit_rate: { rate: 512B/s }, " } else { "" };
        let half_close = if near.aborts { "half_close: abort, " } else { "" };
        let idle = near.client.unwrap_or("body_idle: 60s, write_idle: 60s");
        let client = format!("client: {{ {client}{half_close}{idle} }}");
        let retry = if place == Backoff {
            "attempts: 10, same_endpoint: true, backoff: { base: 60s, max: 60s }"
        } else {
            "attempts: 1"
        };
        let limits = if place == Queue { ", limits: { requests: 1 }" } else { "" };
        let upstream = format!("queue: {{ timeout: {} }}{limits}", near.queue.unwrap_or("60s"));
        let timeouts = near.upstream.unwrap_or("connect: 60s, send: 60s, wait: 60s, receive: 60s");
        let (header, pause) = (near.header.unwrap_or("60s"), near.pause.unwrap_or("60s"));
        let resources = "memory: 1MiB, responses: 100%, per_client: 100%, on_pressure: [pause]";
        let setup = Setup::before_all(&[target])
            .listener(&format!("protocols: [http1, h2c], timeouts: {{ header: {header} }}"))
            .upstream(&format!("timeouts: {{ {timeouts} }}, {upstream}"))
            .route(&format!("{buffering}, {client}, retry: {{ {retry} }}"))
            .more(&format!("resources: {{ {resources}, pause: {pause} }}"));
        let keys = format!("shutdown: {{ pause: 0s, deadline: {} }}", near.stop.unwrap_or("60s"));
        let process = setup.spooling(&keys).spawn();
        let (kept, others, disk) = (Vec::new(), Vec::new(), None);
        Scene { place, process, origin, kept, others, disk, _built_in: built_in, _silent: silent }
    }

    /// Asserts that everything is released, except what blocks others and the connection of a client that has reset
    /// only its stream.
    fn is_left(&mut self, connection: bool) {
        let others = self.others.len() as f64;
        if !connection {
            self.process.wait_metric("forebay_client_connections", |count| count <= others);
        }
        self.process.wait_metric("forebay_phase_active", |active| active <= others);
        self.process.wait_metric("forebay_upstream_queue", |queued| queued == 0.0);
        self.process.wait_metric("forebay_endpoint_inflight", |inflight| inflight <= others);
        self.process.wait_metric("forebay_scheduler_waiting", |waiting| waiting == 0.0);
        if self.place != Memory && self.disk.is_none() {
            self.process.wait_metric("forebay_spool_bytes", |bytes| bytes == 0.0);
        }
        if matches!(self.place, Wait | Receive | Send) {
            // No client waits for this endpoint's response.
            self.kept.pop().expect("its connection").into_wire().rest();
        }
    }

    /// Brings a client there, and waits until its exchange is there.
    fn enter(&mut self, protocol: Protocol) -> Someone {
        let someone = self.approach(protocol);
        // A pause that was seen may already be over.
        if !matches!(self.place, AnswerFromDisk | Backoff) {
            self.process.wait_phase(self.place.phase());
        }
        match self.place {
            Memory => drop(self.process.wait_metric("forebay_pressure{action=\"pause\"}", |paused| paused >= 1.0)),
            UploadToDisk | AnswerToDisk => drop(self.process.wait_metric("forebay_disk_queue", |queue| queue >= 1.0)),
            _ => {}
        }
        someone
    }

    /// Lets a client do what leads there.
    fn approach(&mut self, protocol: Protocol) -> Someone {
        if self.place == Queue && self.kept.is_empty() {
            let mut first = self.process.client();
            first.send(request("GET", OTHERS[0], "", ""));
            self.kept.push(self.origin.accept());
            self.others.push(first);
        }
        if self.place == Memory && self.others.is_empty() {
            self.hoard();
        }
        if matches!(self.place, UploadToDisk | AnswerToDisk) {
            self.disk.get_or_insert_with(|| self.process.still_disk());
        }
        let mut someone = self.ask(protocol);
        match self.place {
            Wait | Receive | Send => self.kept.push(self.origin.accept()),
            // The pause may be short, and is followed by another attempt.
            Backoff => eventually("a pause", || {
                self.origin.try_accept().into_iter().for_each(Connection::reset);
                (self.process.metric("forebay_phase_active{phase=\"select\"}") >= 1.0).then_some(())
            }),
            _ => {}
        }
        if matches!(self.place, Wait | Receive) {
            let connection = self.kept.last_mut().expect("it was just accepted");
            connection.header();
            if self.place == Receive {
                connection.send("HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf");
            }
        }
        if self.place == AnswerFromDisk {
            self.process.wait_phase(Phase::Write);
            let disk = "forebay_spool_bytes{direction=\"response\",store=\"disk\"}";
            self.process.wait_metric(disk, |bytes| bytes > 0.0);
            self.process.wait_metric("forebay_disk_queue", |queue| queue == 0.0);
            self.disk = Some(self.process.still_disk());
            someone.take(4 * MIB, &self.process);
        }
        someone
    }

    /// A client that reads nothing of its response uses all memory.
    fn hoard(&mut self) {
        let mut client = Client::slow(self.process.web());
        client.send(request("GET", OTHERS[1], "", ""));
        self.others.push(client);
        self.process.wait_metric("forebay_spool_bytes{store=\"memory\"}", |bytes| bytes >= 983_040.0);
    }

    fn ask(&self, protocol: Protocol) -> Someone {
        let path = self.place.path();
        let slow = matches!(self.place, Write | AnswerFromDisk);
        match (self.place, protocol) {
            (Header, _) => {
                let mut client = self.process.client();
                client.send(match protocol {
                    Protocol::Http1 => &b"GET / HTTP/1.1\r\nHost: te"[..],
                    Protocol::Http2 => &b"PRI * HTTP/2.0\r\n"[..],
                });
                Someone::One(client)
            }
            (_, Protocol::Http1) => {
                let mut client = if slow { Client::slow(self.process.web()) } else { self.process.client() };
                if self.place.uploads() {
                    let chunked = "Transfer-Encoding: chunked";
                    client.send(format!("POST {path} HTTP/1.1\r\nHost: test\r\n{chunked}\r\n\r\n3000000\r\n"));
                    match self.place {
                        Body => client.send("some"),
                        // Little enough for the kernel to buffer it together with the end of the connection.
                        Memory => client.send(vec![b'x'; 48 << 10]),
                        _ => client.fill(&vec![b'x'; 256 << 10]),
                    }
                } else {
                    client.send(request("GET", path, "", ""));
                }
                Someone::One(client)
            }
            (_, Protocol::Http2) => {
                let client = H2Client::with(self.process.web(), None, slow.then_some(1024));
                let asked = http::Request::builder().uri(format!("http://test{path}"));
                let asked = asked.method(if self.place.uploads() { "POST" } else { "GET" });
                let (response, mut body) = client.begin(asked.body(()).expect("a request"), !self.place.uploads());
                if self.place.uploads() {
                    let some = if self.place == Body { 4 } else { 16 * MIB };
                    body.send_data(Bytes::from(vec![b'x'; some]), false).expect("a stream");
                }
                Someone::Two { client, response: Some(response), body }
            }
        }
    }
}

impl Someone {
    /// Reads up to this many bytes, until the gateway needs the disk for more.
    fn take(&mut self, most: usize, process: &Process) {
        let asks = || process.metric("forebay_disk_queue") >= 1.0;
        match self {
            Someone::One(client) => {
                let mut taken = 0;
                eventually("the disk to be asked", || {
                    if !asks() && taken < most && !client.is_silent() {
                        taken += client.what_is_there().len();
                    }
                    asks().then_some(())
                });
            }
            Someone::Two { client, response, .. } => {
                let response = client.step(response.take().expect("once")).expect("an answer");
                let mut body = response.into_body();
                eventually("the disk to be asked", || {
                    let piece = client.soon(async { body.data().await });
                    if let Some(Some(Ok(piece))) = piece {
                        body.flow_control().release_capacity(piece.len()).expect("credit");
                    }
                    asks().then_some(())
                });
                std::mem::forget(body);
            }
        }
    }
}

impl Someone {
    /// Leaves; returns the connection if it stays open.
    fn leave(self, how: Leaving) -> Option<Someone> {
        match (self, how) {
            (someone, Leaving::Fin) => drop(someone),
            (Someone::One(mut client), Leaving::ResetBehindAByte) => {
                client.send("G");
                client.reset();
            }
            (Someone::Two { client, response, mut body }, Leaving::Stream) => {
                body.send_reset(h2::Reason::CANCEL);
                return Some(Someone::Two { client, response, body });
            }
            (Someone::One(client), _) => client.reset(),
            (Someone::Two { client, .. }, _) => client.reset(),
        }
        None
    }
}

/// How a client at this place can leave noticeably. If more bytes than the kernel buffers precede the end of a
/// connection, the end arrives only when there is room for them.
fn leavings(place: Place) -> Vec<(Protocol, Leaving)> {
    let mut all = vec![(Protocol::Http1, Leaving::Reset), (Protocol::Http2, Leaving::Reset)];
    all.push((Protocol::Http2, Leaving::Fin));
    if !matches!(place, UploadToDisk | Send) {
        all.push((Protocol::Http1, Leaving::Fin));
    }
    if place != Header {
        all.push((Protocol::Http2, Leaving::Stream));
    }
    if !place.uploads() && place != Header {
        all.push((Protocol::Http1, Leaving::ResetBehindAByte));
    }
    all
}

fn notices_that_its_client_leaves(place: Place) {
    let mut scene = Scene::set(place, Near { aborts: true, ..Near::default() });
    let leavings = leavings(place);
    for &(protocol, how) in &leavings {
        let someone = scene.enter(protocol);
        let begun = Instant::now();
        let stays = someone.leave(how);
        scene.is_left(stays.is_some());
        println!("{place:?}, {protocol:?}, {how:?}: nothing is held after {:?}", begun.elapsed());
        // The deadlines are a minute. A reset is checked four times a second; the rest is for a busy machine.
        assert!(begun.elapsed() < ms(10_000), "{place:?}, {protocol:?}, {how:?}: {:?}", begun.elapsed());
        if place == AnswerFromDisk {
            scene.disk = None;
        }
    }
    // With an incomplete header or preface there is no request to log.
    let logged = if place == Header { 0 } else { leavings.len() };
    for line in scene.process.log_lines(logged) {
        assert!(line.reason().ends_with(".aborted"), "{place:?}: {}", line.reason());
    }
}

macro_rules! places {
    ($($name:ident: $place:ident;)*) => {
        mod leaves {
            use super::*;
            $(
                #[test]
                fn $name() {
                    notices_that_its_client_leaves($place);
                }
            )*
        }

        mod stops {
            use super::*;
            $(
                #[test]
                fn $name() {
                    ends_and_is_logged_when_the_time_of_a_stop_is_over($place);
                }
            )*
        }

        #[test]
        fn every_place_is_tested() {
            assert_eq!([$($place),*], ALL);
        }
    };
}

places! {
    in_the_header: Header;
    while_its_body_comes: Body;
    while_there_is_no_memory: Memory;
    while_its_body_waits_for_the_disk: UploadToDisk;
    in_the_queue: Queue;
    before_it_is_tried_again: Backoff;
    while_a_connection_is_made: Connect;
    while_its_endpoint_takes_no_more: Send;
    while_its_endpoint_thinks: Wait;
    while_its_answer_pauses: Receive;
    while_its_answer_waits_for_the_disk: AnswerToDisk;
    while_its_answer_is_held_to_a_rate: Throttle;
    while_it_takes_nothing: Write;
    while_the_disk_gives_nothing_back: AnswerFromDisk;
}

fn ends_and_is_logged_when_the_time_of_a_stop_is_over(place: Place) {
    for protocol in Protocol::BOTH {
        let mut scene = Scene::set(place, Near { stop: Some("300ms"), ..Near::default() });
        let _someone = scene.enter(protocol);
        let begun = Instant::now();
        scene.process.signal(libc::SIGTERM);
        // A blocked disk also delays the end of the process.
        let lines = scene.process.log_lines(1 + scene.others.len());
        println!("{place:?}, {protocol:?}: logged after {:?}", begun.elapsed());
        assert!(begun.elapsed() < ms(10_000), "{place:?}, {protocol:?}: {:?}", begun.elapsed());
        for line in &lines {
            assert_eq!(line.reason(), "finish.shutdown", "{place:?}, {protocol:?}");
        }
        let asked = lines.iter().filter(|line| !OTHERS.contains(&line.text("target")));
        for line in asked.filter(|_| place != Header) {
            let upload = if place.uploads() { "POST" } else { "GET" };
            assert_eq!((line.text("method"), line.text("target")), (upload, place.path()), "{protocol:?}");
            assert!(line.phase(place.phase()).is_some(), "{place:?}, {protocol:?}");
        }
        drop(scene.disk.take());
        assert_eq!(scene.process.ended().code(), Some(0), "{place:?}, {protocol:?}");
    }
}

#[test]
fn each_wait_for_another_party_ends_by_a_deadline_of_its_own() {
    let near = Near::default();
    for (place, near, status, reason) in [
        (Header, Near { header: Some("300ms"), ..near }, 408, "header.timeout"),
        (Body, Near { client: Some("body_idle: 300ms"), ..near }, 408, "buffer.timeout"),
        (Memory, Near { pause: Some("300ms"), ..near }, 503, "buffer.pressure"),
        (UploadToDisk, Near { pause: Some("300ms"), ..near }, 500, "buffer.disk_failed"),
        (Queue, Near { queue: Some("300ms"), ..near }, 503, "queue.timeout"),
        (Connect, Near { upstream: Some("connect: 300ms"), ..near }, 504, "connect.timeout"),
        (Send, Near { upstream: Some("send: 300ms, connect: 60s"), ..near }, 504, "send.timeout"),
        (Wait, Near { upstream: Some("wait: 300ms"), ..near }, 504, "wait.timeout"),
        (Receive, Near { upstream: Some("receive: 300ms"), ..near }, 200, "receive.timeout"),
        (AnswerToDisk, Near { pause: Some("300ms"), ..near }, 500, "write.disk_failed"),
        (Write, Near { client: Some("write_idle: 300ms"), ..near }, 200, "write.timeout"),
        (AnswerFromDisk, Near { pause: Some("300ms"), ..near }, 200, "write.disk_failed"),
    ] {
        let mut scene = Scene::set(place, near);
        let _someone = scene.approach(Protocol::Http1);
        let others = scene.others.len();
        let line = eventually(&format!("the end of {place:?}"), || {
            let lines = scene.process.log_lines(0);
            lines.into_iter().find(|line| !OTHERS.contains(&line.text("target")))
        });
        assert_eq!((line.status(), line.reason()), (status, reason), "{place:?}");
        scene.process.wait_metric("forebay_endpoint_inflight", |inflight| inflight <= others as f64);
        scene.disk = None;
    }
}

#[test]
fn a_client_that_leaves_half_a_body_is_noticed_while_nobody_reads_from_it() {
    let silent = Closed::silent();
    let setup = Setup::before_all(&[silent.address()]).upstream("timeouts: { connect: 60s }");
    let process = setup.route("buffering: { request: { mode: stream } }").spawn();
    let (length, chunks) = ("Content-Length: 100", "Transfer-Encoding: chunked");
    for (framing, sent, resets) in [
        (length, "some", true),
        (length, "", true),
        (length, "", false),
        (length, "some", false),
        (chunks, "4\r\nsome\r\n", true),
        (chunks, "4\r\nsome\r\n", false),
        (chunks, "", false),
    ] {
        let mut client = process.client();
        client.send(format!("POST / HTTP/1.1\r\nHost: test\r\n{framing}\r\n\r\n{sent}"));
        process.wait_phase(Connect.phase());
        let begun = Instant::now();
        if resets {
            client.reset()
        } else {
            client.end()
        }
        process.wait_metric("forebay_phase_active", |active| active == 0.0);
        assert!(begun.elapsed() < ms(10_000), "{framing}, {sent:?}, {resets}: {:?}", begun.elapsed());
    }
    assert!(process.log_lines(7).iter().all(|line| line.reason() == "send.aborted"));
}

/// Waits in the source without that type, by file: their number, and why they are right.
const WAITS: &[(&str, usize, &str)] = &[
    ("acme.rs", 2, "the pauses of a background task"),
    ("acme/order.rs", 4, "`Issuers` bounds an order as a whole; a list of an answer that is here"),
    ("admin.rs", 1, "a stream for an operator goes on until its reader leaves, which writing finds out"),
    ("admin/seats.rs", 2, "the place of a connection may be needed, beside a wait that has a deadline"),
    ("admin/trace.rs", 1, "until the time of the recording is over, as its operator has said"),
    ("client.rs", 17, "a stop beside a wait that has both"),
    ("admin/reception.rs", 5, "it takes connections until it is closed"),
    ("client/acceptor.rs", 7, "it waits for connections, and its own end is beside that"),
    ("client/broken.rs", 1, "it is the interval in which an eye looks"),
    ("account/pool.rs", 1, "stored and polled by a spool, whose exchange waits for no longer than `resources.pause`"),
    ("client/inflight.rs", 1, "the time of a stop bounds it"),
    ("client/listener.rs", 1, "the end of a listener, beside waits that have a deadline"),
    ("client/cut.rs", 1, "ends with the exchange that it is beside"),
    ("client/descriptors.rs", 1, "the pause of a listener: connections wait in the kernel"),
    (
        "client/driver/attempt.rs",
        2,
        "client and endpoint at once; the control of the exchange has the clocks and the eye",
    ),
    ("client/driver/connection.rs", 1, "the deadline of a write to an endpoint; `Bodies::watch` has the eye"),
    ("client/driver/pool.rs", 1, "the pauses of a background task"),
    ("client/farewell.rs", 1, "a tick of what is itself a deadline"),
    ("client/http2.rs", 2, "a stop beside the frames of a connection, which reading and the guard bound"),
    ("client/http2/guard.rs", 1, "it is the deadline of a frame"),
    ("body/request.rs", 1, "the deadlines of a body; `Bodies::watch` has the eye"),
    ("client/relay.rs", 3, "a stop beside a wait that has both; the deadline of a passage"),
    ("spool/disk.rs", 1, "stored and polled by a spool, whose exchange waits for no longer than `resources.pause`"),
    ("body.rs", 1, "the deadlines of an attempt; `Bodies::watch` has the eye"),
    ("client/stream.rs", 1, "it is the deadline of a write"),
    ("client/tls/watch.rs", 4, "the pauses of a background task"),
    ("body/response.rs", 2, "the deadlines of an answer; `Bodies::watch` has the eye, and writing finds out by itself"),
    ("files.rs", 5, "the pauses of a background task"),
    ("filter/aside.rs", 1, "a turn of another thread: the chain bounds the filter, and sees its client"),
    ("gateway/stop.rs", 14, "the times of a stop and of a takeover"),
    ("gateway/supervisor.rs", 1, "the pauses of a wait that has a deadline"),
    ("gateway/upgrade.rs", 3, "the pauses of a thread in the background, in waits that have a deadline"),
    ("gateway/web.rs", 6, "it takes connections until it is stopped"),
    ("party/standstill.rs", 1, "the timer of a deadline that its owner names"),
    ("party/wait.rs", 2, "the timer itself"),
    ("recorder.rs", 1, "`admin/trace.rs` says until when"),
    ("scheduler.rs", 1, "the pause between two rounds"),
    ("scheduler/task.rs", 1, "it is the deadline of an exchange that is given up"),
    ("upkeep.rs", 4, "tasks in the background, until they are stopped"),
    ("upstream.rs", 3, "the pauses of a background task"),
    ("upstream/check.rs", 3, "the pauses of a background task"),
    ("upstream/check/places.rs", 1, "a turn of a background task: each check that has a place has a deadline"),
    ("upstream/discovery.rs", 3, "the pauses of a background task"),
    ("upstream/discovery/file.rs", 3, "the pauses of a background task"),
    ("upstream/ejector.rs", 3, "the pauses of a background task"),
    ("upstream/transport/http1.rs", 2, "the deadlines of a connection; `Bodies::watch` has the eye"),
    ("upstream/transport/http2.rs", 2, "the time for which a connection is kept while nobody uses it"),
    (
        "upstream/transport/happy_eyeballs.rs",
        1,
        "two connections that are being made, each with the deadline of its peer",
    ),
];

#[test]
fn nothing_waits_without_a_deadline_and_an_eye_on_its_client() {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let waits = [
        r"(?:^|[\s(:=])(?:timeout|timeout_at|sleep|sleep_until)\(",
        r"\.notified\(\)",
        r"\.(?:recv|changed|closed|ready|next)\(\)\.await",
        r"\.acquire\w*\([^)]*\)\.await",
        r"\.wait_for\(",
        r"\bselect!\s*\{",
        r"(?::|Instant,)\sTimer[,)]",
        r"(?::\s|Option<)Standstill[,>]",
    ];
    let waits = Regex::new(&waits.join("|")).expect("a pattern");
    let mut found: BTreeMap<String, Vec<String>> = BTreeMap::new();
    let tests = Regex::new(r"#\[cfg\(test\)\][^;{]*\{").expect("a pattern");
    // The other programs in the binary have no clients.
    for file in sources(&source)
        .into_iter()
        .filter(|file| !["cli", "origin", "origin.rs"].iter().any(|other| file.starts_with(source.join(other))))
    {
        let text = fs::read_to_string(&file).expect("a source file");
        let code = tests.split(&text).next().unwrap_or_default();
        let name = file.strip_prefix(&source).expect("a file of src").display().to_string();
        for line in code.lines().filter(|line| !line.trim_start().starts_with("//")) {
            if !line.contains("fn ") && waits.is_match(line) {
                found.entry(name.clone()).or_default().push(line.trim().to_owned());
            }
        }
    }
    let known: BTreeMap<&str, usize> = WAITS.iter().map(|(file, count, _)| (*file, *count)).collect();
    for (file, lines) in &found {
        let allowed = known.get(&**file).copied().unwrap_or_default();
        assert_eq!(lines.len(), allowed, "src/{file} waits by itself; use party/wait.rs, or say why not:\n{lines:#?}");
    }
    for (file, _, reason) in WAITS {
        assert!(found.contains_key(*file), "src/{file} does not wait by itself any more");
        assert!(reason.len() > 10, "src/{file} has no reason");
    }
}

fn sources(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).expect("a folder of sources").map(|entry| entry.expect("an entry").path());
    entries.flat_map(|path| if path.is_dir() { sources(&path) } else { vec![path] }).collect()
}
