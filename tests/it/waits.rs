//! Whatever an exchange waits for, it notices that the gateway's time is over.
//!
//! [`Place`] is every place in which an exchange waits. Each test brings an exchange there, with all deadlines far
//! away.

use std::time::Instant;

use bytes::Bytes;
use forebay::origin::Running;
use forebay::phase::Phase;
use h2::SendStream;
use h2::client::ResponseFuture;

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
    /// For the rest of its body, which is held back.
    Body,
    /// For memory, to hold more of its body.
    Memory,
    /// For the disk, to hold more of its body.
    UploadToDisk,
    /// For an endpoint that has room.
    Queue,
    /// Until it is tried again.
    Backoff,
    /// For a connection.
    Connect,
    /// For an endpoint that takes no more of its body.
    Send,
    /// For the answer.
    Wait,
    /// For the rest of the answer.
    Receive,
    /// For the disk, to hold an answer until it is whole.
    AnswerToDisk,
    /// For leave to send more, by a maximum rate.
    Throttle,
    /// For its client to take more.
    Write,
    /// For the disk, to give back what is held of the answer.
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

    /// What is asked for.
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

/// Who waits there.
enum Someone {
    One(Client),
    Two { client: H2Client, response: Option<ResponseFuture>, _body: SendStream<Bytes> },
}

/// A program, what stands behind it, and what keeps an exchange waiting.
struct Scene {
    place: Place,
    /// Goes on before the program ends, which else waits for its threads.
    disk: Option<StillDisk>,
    process: Process,
    origin: Origin,
    kept: Vec<Connection>,
    others: Vec<Client>,
    _built_in: Running,
    _silent: Option<Closed>,
}

/// What keeps others waiting.
const OTHERS: [&str; 2] = ["/first", "/bytes/32MiB"];

impl Scene {
    /// One with all deadlines far away but that of a stop.
    fn set(place: Place, stop: &str) -> Scene {
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
        let client = format!("client: {{ {client}body_idle: 60s, write_idle: 60s }}");
        let retry = if place == Backoff {
            "attempts: 10, same_endpoint: true, backoff: { base: 60s, max: 60s }"
        } else {
            "attempts: 1"
        };
        let limits = if place == Queue { ", limits: { requests: 1 }" } else { "" };
        let upstream = format!("queue: {{ timeout: 60s }}{limits}");
        let timeouts = "connect: 60s, send: 60s, wait: 60s, receive: 60s";
        let setup = Setup::before_all(&[target])
            .listener("protocols: [http1, h2c], timeouts: { header: 60s }")
            .upstream(&format!("timeouts: {{ {timeouts} }}, {upstream}"))
            .route(&format!("{buffering}, {client}, retry: {{ {retry} }}"))
            .more("resources: { memory: 1MiB, responses: 100%, per_client: 100%, pause: 60s, on_pressure: [pause] }");
        let keys = format!("shutdown: {{ pause: 0s, deadline: {stop} }}");
        let process = setup.spooling(&keys).spawn();
        let (kept, others, disk) = (Vec::new(), Vec::new(), None);
        Scene { place, process, origin, kept, others, disk, _built_in: built_in, _silent: silent }
    }

    /// Brings somebody there.
    fn enter(&mut self, protocol: Protocol) -> Someone {
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
            // The pause may be short, and then there is another attempt.
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
        self.process.wait_phase(self.place.phase());
        match self.place {
            Memory => drop(self.process.wait_metric("forebay_pressure{rung=\"pause\"}", |paused| paused >= 1.0)),
            UploadToDisk | AnswerToDisk => drop(self.process.wait_metric("forebay_disk_queue", |queue| queue >= 1.0)),
            AnswerFromDisk => {
                let disk = "forebay_spool_bytes{direction=\"response\",store=\"disk\"}";
                self.process.wait_metric(disk, |bytes| bytes > 0.0);
                self.process.wait_metric("forebay_disk_queue", |queue| queue == 0.0);
                self.disk = Some(self.process.still_disk());
                someone.take(4 * MIB, &self.process);
            }
            _ => {}
        }
        someone
    }

    /// Somebody who takes nothing of an answer takes all memory there is.
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
                    if self.place == Body { client.send("some") } else { client.fill(&vec![b'x'; 256 << 10]) }
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
                Someone::Two { client, response: Some(response), _body: body }
            }
        }
    }
}

impl Someone {
    /// Reads up to so many bytes, until the gateway has to ask the disk for more.
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

macro_rules! places {
    ($($name:ident: $place:ident;)*) => {
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
        let mut scene = Scene::set(place, "300ms");
        let _someone = scene.enter(protocol);
        let begun = Instant::now();
        scene.process.signal(libc::SIGTERM);
        // A disk that stands still holds up the end of the process as well.
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
