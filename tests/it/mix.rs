//! Clients of every kind at the same time, for stories in which no client may notice anything: reloads and upgrades.
//!
//! A client fails its story if a request fails, if a response is incomplete, or if a connection is refused or ends
//! instead of a response. Clients behave like real ones: after `Connection: close` or GOAWAY, the next request uses a
//! new connection.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;

use forebay::origin::{Running, content_from};
use serde_json::json;

use crate::harness::client::{Client, H2Client, get};
use crate::harness::frames::{Frame, Frames};
use crate::harness::grpcio::{GrpcClient, GrpcServer};
use crate::harness::origin::built_in;
use crate::harness::secure::Authority;
use crate::harness::tls::{Tls, pair};
use crate::harness::wire::Response;
use crate::harness::{Ask, Protocol, Setup, eventually, ms};

/// The kinds of clients.
const KINDS: [&str; 13] = [
    "kept",
    "short",
    "h2c",
    "slow http1",
    "slow http2",
    "tls kept",
    "tls h2",
    "grpc",
    "grpc stream",
    "websocket",
    "unix",
    "tls slow",
    "short websocket",
];

/// The servers of all clients.
pub struct Mix {
    origin: Running,
    grpc: GrpcServer,
    authority: Authority,
}

/// The progress of the clients.
pub struct Progress {
    over: AtomicBool,
    asked: [AtomicUsize; KINDS.len()],
}

/// Ends the clients on drop, even after a panic.
struct Over<'a>(&'a Progress);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        self.0.over.store(true, Ordering::Relaxed);
    }
}

impl Mix {
    /// Starts the servers.
    pub fn new() -> Mix {
        Mix { origin: built_in(), grpc: GrpcServer::start(), authority: Authority::new() }
    }

    /// A gateway in front of the servers: in clear text, with TLS (listener `secure`), and on a unix socket.
    pub fn setup(&self) -> Setup {
        let setup = Setup::before_all(&[self.origin.address().to_string()]);
        let tls = format!("tls: {{ certificates: [ {{ {} }} ] }}", pair(&self.authority.issue(&["test"])));
        let unix = setup.path("web.sock");
        let limits = "limits: { requests_per_connection: unlimited }";
        setup
            .listener(&format!("protocols: [http1, h2c], {limits}"))
            .also_listener(&format!("{{ name: secure, address: \"127.0.0.1:0\", protocols: [http1, h2], {tls} }}"))
            .also_listener(&format!("{{ name: local, address: \"unix:{}\" }}", unix.display()))
            .also_upstream("grpc", &format!("protocol: h2c, endpoints: [ {{ address: \"{}\" }} ]", self.grpc.address()))
            .also_route("{ name: grpc, match: { path: { prefix: /test.Peer } }, upstream: grpc }")
            .server("threads: 2, shutdown: { pause: 0s, deadline: 10m }, upgrade: { idle: 20s }")
    }

    /// Runs all clients in loops while `done` runs.
    pub fn ask_while(&self, setup: &Setup, web: SocketAddr, secure: SocketAddr, done: impl FnOnce(&Progress)) {
        let progress = &Progress { over: AtomicBool::new(false), asked: Default::default() };
        let (authority, unix) = (&self.authority, setup.path("web.sock"));
        let front_page = get(web, "/").body.len();
        thread::scope(|scope| {
            let _over = Over(progress);
            scope.spawn(|| kept(progress, 0, || Client::connect(web)));
            scope.spawn(|| progress.repeat(1, || is_content(&get(web, "/bytes/100"), 100)));
            scope.spawn(|| h2c(progress, 2, web));
            for (index, protocol) in [3, 4].into_iter().zip(Protocol::BOTH) {
                scope.spawn(move || {
                    progress.repeat(index, || {
                        let slowly = Ask::put(40_000).sending(8_000, ms(40)).over(protocol, web);
                        slowly.arrived(40_000, "content-length: 40000");
                        Ask::get("/bytes/40000").reading(10_000, ms(40)).over(protocol, web).is_content(40_000);
                    });
                });
            }
            scope.spawn(|| tls_kept(progress, 5, secure, authority));
            scope.spawn(|| {
                progress.repeat(6, || {
                    let tls = Tls::to(secure, authority, "test").alpn(b"\x02h2");
                    let mut client = Frames::over(tls.connect().expect("a handshake"));
                    // One request per connection, since a second one might exceed the last stream of a GOAWAY.
                    client.send(&Frame::get(1));
                    let (length, whole) = client.answer(1, 1 << 20);
                    assert_eq!((length, whole), (front_page, true));
                });
            });
            scope.spawn(|| {
                let mut client = GrpcClient::to(web);
                progress.repeat(7, || {
                    let said = client.say("word");
                    assert_eq!((&said["code"], &said["replies"]), (&json!(0), &json!(["word"])), "{said}");
                    let words = ["a", "b", "c"];
                    let ask = json!({ "call": "echo", "method": "/test.Peer/Echo", "messages": words });
                    let said = client.ask(&ask);
                    assert_eq!((&said["code"], &said["replies"]), (&json!(0), &json!(words)), "{said}");
                    // Without a pause, it would exceed `http2.window_updates` per second.
                    pause();
                });
            });
            scope.spawn(|| {
                let mut client = GrpcClient::to(web);
                client.ask(&json!({ "call": "open", "method": "/test.Peer/Echo" }));
                progress.repeat(8, || {
                    assert_eq!(client.ask(&json!({ "say": "still" })), json!({ "reply": "still" }));
                    pause();
                });
                assert_eq!(client.ask(&json!({ "say": null }))["code"], 0);
            });
            scope.spawn(|| {
                let mut socket = websocket(web);
                progress.repeat(9, || {
                    echoed(&mut socket);
                    pause();
                });
            });
            scope.spawn(|| kept(progress, 10, || Client::unix(&unix)));
            scope.spawn(|| progress.repeat(11, || tls_slow(secure, authority)));
            scope.spawn(|| progress.repeat(12, || echoed(&mut websocket(web))));
            progress.wait_for_each(2);
            done(progress);
        });
    }
}

impl Progress {
    fn repeat(&self, index: usize, mut ask: impl FnMut()) {
        while !self.over.load(Ordering::Relaxed) {
            ask();
            self.asked[index].fetch_add(1, Ordering::Relaxed);
            // Keeps the log of a story short enough to read.
            thread::park_timeout(ms(2));
        }
    }

    /// Number of requests of all clients.
    pub fn total(&self) -> usize {
        self.asked.iter().map(|asked| asked.load(Ordering::Relaxed)).sum()
    }

    /// Waits for `count` more requests, of all clients together.
    pub fn wait_for_more(&self, count: usize) {
        let before = self.total();
        eventually("clients to go on", || (self.total() >= before + count).then_some(()));
    }

    /// Waits for `count` more requests of each kind of client.
    pub fn wait_for_each(&self, count: usize) {
        for (kind, asked) in KINDS.iter().zip(&self.asked) {
            let before = asked.load(Ordering::Relaxed);
            eventually(&format!("clients of the kind `{kind}` to go on"), || {
                (asked.load(Ordering::Relaxed) >= before + count).then_some(())
            });
        }
    }
}

/// Pauses between the messages of a long-lived client.
fn pause() {
    thread::park_timeout(ms(40));
}

/// Asserts that the response has exactly these bytes.
fn is_content(answer: &Response, length: u64) {
    assert_eq!((answer.status, &answer.body[..]), (200, content_from(0, length)));
}

/// Sends a body over TLS in four pieces with pauses, and reads the response, which reports what arrived.
fn tls_slow(secure: SocketAddr, authority: &Authority) {
    let mut client = Tls::to(secure, authority, "test").connect().expect("a handshake");
    client.send("PUT /echo HTTP/1.1\r\nHost: test\r\nContent-Length: 8000\r\nConnection: close\r\n\r\n");
    for piece in content_from(0, 8_000).chunks(2_000) {
        client.send(piece);
        pause();
    }
    let answer = client.rest().0;
    let end = answer.windows(4).position(|four| four == b"\r\n\r\n").expect("a whole header");
    assert!(answer.starts_with(b"HTTP/1.1 200 "), "{}", String::from_utf8_lossy(&answer[..end]));
    assert_eq!(&answer[end + 4..], content_from(0, 8_000));
}

fn kept(progress: &Progress, index: usize, connect: impl Fn() -> Client) {
    let mut client = connect();
    progress.repeat(index, || {
        let answer = client.get("/bytes/10000");
        is_content(&answer, 10_000);
        if answer.value("connection") == Some("close") {
            client = connect();
        }
    });
}

fn h2c(progress: &Progress, index: usize, web: SocketAddr) {
    let request = || http::Request::get("http://test/bytes/10000").body(()).expect("a request");
    let mut client = H2Client::connect(web);
    progress.repeat(index, || {
        if client.is_leaving() {
            client = H2Client::connect(web);
        }
        let answer = match client.ask(request(), b"") {
            // GOAWAY arrived before the request was sent.
            Err(error) if error.is_go_away() && error.is_remote() => {
                client = H2Client::connect(web);
                client.ask(request(), b"")
            }
            answer => answer,
        };
        assert_eq!(answer.expect("an answer").body, content_from(0, 10_000));
    });
}

fn tls_kept(progress: &Progress, index: usize, secure: SocketAddr, authority: &Authority) {
    let connect = || Tls::to(secure, authority, "test").connect().expect("a handshake");
    let mut client = connect();
    progress.repeat(index, || {
        let answer = client.ask("GET /bytes/5000 HTTP/1.1\r\nHost: test\r\n\r\n").expect("an answer");
        assert_eq!((answer.status, answer.body.as_bytes()), (200, content_from(0, 5_000)));
        if answer.head.to_ascii_lowercase().contains("connection: close") {
            client = connect();
        }
    });
}

/// A WebSocket to the test origin.
pub fn websocket(web: SocketAddr) -> Client {
    let mut client = Client::connect(web);
    client.send(
        "GET /websocket HTTP/1.1\r\nHost: test\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
         Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n",
    );
    assert_eq!(client.response().status, 101);
    client
}

/// Sends a text message of five letters and reads its echo (RFC 6455 §5).
pub fn echoed(socket: &mut Client) {
    socket.send([0x81, 0x85, 0, 0, 0, 0, b's', b't', b'i', b'l', b'l']);
    assert_eq!(socket.bytes(7), [0x81, 5, b's', b't', b'i', b'l', b'l']);
}
