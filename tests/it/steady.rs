//! A peer that takes bytes slowly but steadily makes progress, although the kernel reports room in its buffer only
//! once a third of it is free. For large segments, as on loopback, this buffer has megabytes.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use socket2::{Domain, Socket, Type};

use crate::harness::client::request;
use crate::harness::frames::{END_HEADERS, END_STREAM, Frame, Frames, kind};
use crate::harness::gateway::Watched;
use crate::harness::origin::built_in;
use crate::harness::secure::Authority;
use crate::harness::tls::{Tls, pair};
use crate::harness::{Client, End, Gateway, Origin, Setup, ms, ok};

/// The limit for a peer that takes nothing.
const LIMIT: Duration = ms(2_000);
/// The time in which a reader is slow. A third of the kernel's buffer is not free again within the limit.
const SLOW: Duration = ms(5_000);
/// What a slow reader takes at once, and its pause after that: about 200 KiB per second.
const SIP: usize = 20 << 10;
const PAUSE: Duration = ms(100);
/// What is sent.
const LENGTH: usize = 12 << 20;

/// How a straw takes bytes from the gateway.
#[derive(Clone, Copy, Debug)]
enum Taking {
    Nothing,
    Sips,
    All,
}

/// A relay that takes bytes from the gateway as told, and passes the other direction on at once.
struct Straw {
    address: SocketAddr,
    taking: Arc<AtomicUsize>,
}

impl Straw {
    /// A straw for clients of the gateway at `gateway`.
    fn of_clients(gateway: SocketAddr) -> Straw {
        Straw::new(move |near, taking| {
            let socket = Socket::new(Domain::IPV4, Type::STREAM, None).expect("a socket");
            socket.set_recv_buffer_size(64 << 10).expect("a small buffer");
            socket.connect(&gateway.into()).expect("the gateway accepts");
            (TcpStream::from(socket), near, taking)
        })
    }

    /// A straw in front of the endpoint at `target`.
    fn of_endpoint(target: impl ToString) -> Straw {
        let target = target.to_string();
        Straw::new(move |near, taking| (near, TcpStream::connect(&target).expect("the endpoint accepts"), taking))
    }

    /// `ends` returns the connection to the gateway and the other one.
    fn new<E>(ends: E) -> Straw
    where
        E: Fn(TcpStream, Arc<AtomicUsize>) -> (TcpStream, TcpStream, Arc<AtomicUsize>) + Send + 'static,
    {
        let listener = Socket::new(Domain::IPV4, Type::STREAM, None).expect("a socket");
        // Accepted sockets inherit it.
        listener.set_recv_buffer_size(64 << 10).expect("a small buffer");
        listener.bind(&SocketAddr::from(([127, 0, 0, 1], 0)).into()).expect("a port");
        listener.listen(16).expect("a listener");
        let listener = TcpListener::from(listener);
        let (address, taking) = (listener.local_addr().expect("an address"), Arc::<AtomicUsize>::default());
        let told = taking.clone();
        thread::spawn(move || {
            while let Ok((near, _)) = listener.accept() {
                let (gateway, other, told) = ends(near, told.clone());
                let (mut from, mut to) = (other.try_clone().expect("a socket"), gateway.try_clone().expect("a socket"));
                thread::spawn(move || {
                    let _ = std::io::copy(&mut from, &mut to);
                    let _ = to.shutdown(Shutdown::Write);
                });
                thread::spawn(move || take(gateway, other, &told));
            }
        });
        let straw = Straw { address, taking };
        straw.takes(Taking::All);
        straw
    }

    fn takes(&self, taking: Taking) {
        self.taking.store(taking as usize, Ordering::Relaxed);
    }
}

/// A failure ends the connection, which the story notices.
fn take(mut gateway: TcpStream, mut other: TcpStream, taking: &AtomicUsize) {
    let mut space = [0; 64 << 10];
    loop {
        let (room, pause) = match taking.load(Ordering::Relaxed) {
            0 => (0, PAUSE),
            1 => (SIP, PAUSE),
            _ => (space.len(), Duration::ZERO),
        };
        let read = if room == 0 { Ok(1) } else { gateway.read(&mut space[..room]) };
        let passed = match read {
            Ok(0) | Err(_) => break,
            Ok(_) if room == 0 => Ok(()),
            Ok(read) => other.write_all(&space[..read]),
        };
        if passed.is_err() {
            break;
        }
        thread::sleep(pause);
    }
    let _ = other.shutdown(Shutdown::Write);
}

/// How a client reaches the gateway.
#[derive(Clone, Copy, Debug)]
enum Over {
    Http1,
    Tls,
    H2c,
    H2,
}

const EACH: [Over; 4] = [Over::Http1, Over::Tls, Over::H2c, Over::H2];

/// Requests a response through the straw; returns its bytes, about, and whether it came whole.
fn ask(over: Over, straw: &Straw, authority: &Authority) -> (usize, bool) {
    let path = format!("/bytes/{LENGTH}");
    let by_frames = |mut frames: Frames| {
        frames.send(&Frame::credit(0, 1 << 30));
        frames.send(&get(&path));
        frames.send(&Frame::credit(1, 1 << 30));
        let mut sum = 0;
        while let Some(frame) = frames.next() {
            if frame.stream == 1 {
                sum += frame.payload.len();
                if frame.ends_stream() || frame.kind == kind::RST_STREAM {
                    return (sum, frame.ends_stream());
                }
            }
        }
        (sum, false)
    };
    match over {
        Over::Http1 => {
            let mut client = Client::connect(straw.address);
            client.send(request("GET", &path, "", b""));
            let response = client.response();
            (response.body.len(), response.end == End::Complete)
        }
        Over::Tls => {
            let mut client = Tls::to(straw.address, authority, "a.test").connect().expect("a handshake");
            client.send(format!("GET {path} HTTP/1.1\r\nHost: a.test\r\nConnection: close\r\n\r\n"));
            let (all, _) = client.rest();
            (all.len(), all.len() > LENGTH)
        }
        Over::H2c => by_frames(Frames::connect(straw.address)),
        Over::H2 => {
            let client = Tls::to(straw.address, authority, "a.test").alpn(b"\x02h2");
            by_frames(Frames::over(client.connect().expect("a handshake")))
        }
    }
}

/// A GET of this path on stream 1.
fn get(path: &str) -> Frame {
    let mut block = Vec::new();
    for (name, value) in [(":method", "GET"), (":scheme", "http"), (":path", path), (":authority", "a.test")] {
        block.push(0);
        for text in [name, value] {
            block.push(u8::try_from(text.len()).expect("a short text"));
            block.extend_from_slice(text.as_bytes());
        }
    }
    Frame::new(kind::HEADERS, END_HEADERS | END_STREAM, 1, block)
}

/// A gateway with these limits for clients.
fn serving(over: Over, origin: SocketAddr, authority: &Authority, client: &str) -> Gateway {
    let tls = format!("tls: {{ certificates: [ {{ {} }} ] }}", pair(&authority.issue(&["a.test"])));
    let listener = match over {
        Over::Http1 => String::new(),
        Over::H2c => "protocols: [h2c]".to_owned(),
        Over::Tls => tls,
        Over::H2 => format!("{tls}, protocols: [h2]"),
    };
    let mut setup = Setup::before_all(&[origin]).route(&format!("client: {{ {client} }}"));
    if !listener.is_empty() {
        setup = setup.listener(&listener);
    }
    setup.start()
}

fn idle() -> String {
    format!("write_idle: {}ms", LIMIT.as_millis())
}

#[test]
fn a_client_that_reads_slowly_but_steadily_from_a_large_buffer_is_not_cut() {
    let (authority, origin) = (Authority::new(), built_in());
    let rate = "write_idle: 60s, min_rate: { write: 32KiB/s, grace: 500ms }".to_owned();
    thread::scope(|scope| {
        for keys in [idle(), rate] {
            for over in EACH {
                let (keys, authority, address) = (keys.clone(), &authority, origin.address());
                scope.spawn(move || {
                    let gateway = serving(over, address, authority, &keys);
                    let straw = Straw::of_clients(gateway.web());
                    straw.takes(Taking::Sips);
                    let asked = thread::scope(|scope| {
                        let asked = scope.spawn(|| ask(over, &straw, authority));
                        thread::sleep(SLOW);
                        straw.takes(Taking::All);
                        asked.join().expect("the client")
                    });
                    assert!(asked.1 && asked.0 >= LENGTH, "{over:?}, {keys}: {asked:?}");
                    assert_eq!(gateway.metric("forebay_refusals_total"), 0.0, "{over:?}, {keys}");
                });
            }
        }
    });
}

#[test]
fn a_client_that_stands_still_with_a_large_buffer_is_cut_in_time() {
    let (authority, origin) = (Authority::new(), built_in());
    let rate = format!("write_idle: 60s, min_rate: {{ write: 1MiB/s, grace: {}ms }}", LIMIT.as_millis());
    thread::scope(|scope| {
        for (keys, sips) in [(idle(), false), (idle(), true), (rate, false)] {
            for over in EACH {
                let (keys, authority, address) = (keys.clone(), &authority, origin.address());
                scope.spawn(move || {
                    let gateway = serving(over, address, authority, &keys);
                    let straw = Straw::of_clients(gateway.web());
                    thread::scope(|scope| {
                        straw.takes(Taking::Sips);
                        let asked = scope.spawn(|| ask(over, &straw, authority));
                        gateway.wait_metric("forebay_slow_clients", |slow| slow >= 1.0);
                        if sips {
                            thread::sleep(2 * LIMIT);
                        }
                        straw.takes(Taking::Nothing);
                        let still = Instant::now();
                        gateway.wait_metric("forebay_refusals_total", |cut| cut >= 1.0);
                        let lasted = still.elapsed();
                        // Time for which the gateway has no CPU does not count.
                        assert!(lasted < 5 * LIMIT, "{over:?}, {keys}, {sips}: {lasted:?}");
                        assert!(!sips || lasted >= LIMIT / 2, "{over:?}, {keys}: {lasted:?}");
                        straw.takes(Taking::All);
                        assert!(!asked.join().expect("the client").1, "{over:?}, {keys}");
                    });
                });
            }
        }
    });
}

/// Uploads through a gateway, with its own driver or Pingora's, to an endpoint behind a straw, which takes bytes like
/// this at first. Returns the status and how long it took.
fn upload(server: &str, taking: Taking) -> (u16, Duration) {
    let origin = Origin::answering(|_| ok("all"));
    let straw = Straw::of_endpoint(origin.address());
    let limit = LIMIT.as_millis();
    let timeouts = format!("timeouts: {{ connect: 60s, send: {limit}ms, wait: {limit}ms, receive: 60s }}");
    let setup = Setup::before_all(&[straw.address]).upstream(&timeouts).route("retry: { attempts: 1 }");
    let gateway = setup.server(server).start();
    let mut client = gateway.client();
    client.send(format!("POST / HTTP/1.1\r\nHost: test\r\nContent-Length: {LENGTH}\r\n\r\n"));
    client.send(vec![b'x'; LENGTH - 1]);
    straw.takes(taking);
    let began = Instant::now();
    thread::scope(|scope| {
        scope.spawn(|| {
            if matches!(taking, Taking::Sips) {
                thread::sleep(SLOW);
                straw.takes(Taking::All);
            }
        });
        client.send(b"x");
        (client.response().status, began.elapsed())
    })
}

/// Uploads with both drivers. A worker that shares its tasks uses Pingora's.
fn uploads(taking: Taking, judge: impl Fn(&str, u16, Duration) + Sync) {
    thread::scope(|scope| {
        for server in ["work_stealing: false", "work_stealing: true"] {
            let judge = &judge;
            scope.spawn(move || {
                let (status, took) = upload(server, taking);
                judge(server, status, took);
            });
        }
    });
}

#[test]
fn an_endpoint_that_reads_slowly_but_steadily_from_a_large_buffer_has_its_time() {
    uploads(Taking::Sips, |server, status, took| assert_eq!(status, 200, "{server}, {took:?}"));
}

#[test]
fn an_endpoint_that_stands_still_with_a_large_buffer_is_left_in_time() {
    uploads(Taking::Nothing, |server, status, took| {
        assert!(status == 504 && took < 5 * LIMIT, "{server}: {status}, {took:?}");
    });
}

#[test]
fn a_passed_connection_that_is_read_slowly_but_steadily_is_not_idle() {
    let origin = Origin::playing(|mut connection| {
        connection.bytes(5);
        connection.try_send(vec![b'x'; LENGTH]);
        connection.closed();
    });
    // The gateway can pass on no more until a third of a buffer is free.
    let listener =
        format!("{{ name: db, address: \"127.0.0.1:0\", tcp: {{ upstream: app, idle: {}ms }} }}", LIMIT.as_millis());
    let gateway = Setup::before(&origin).also_listener(&listener).start();
    let straw = Straw::of_clients(gateway.address("db"));
    straw.takes(Taking::Sips);
    let mut client = Client::connect(straw.address);
    client.send(b"first");
    let began = Instant::now();
    while began.elapsed() < SLOW {
        client.bytes(SIP);
    }
    assert_eq!(gateway.metric("forebay_refusals_total"), 0.0);
    straw.takes(Taking::Nothing);
    let still = Instant::now();
    gateway.wait_metric("forebay_refusals_total{reason=\"receive.timeout\"}", |cut| cut >= 1.0);
    assert!(still.elapsed() < 5 * LIMIT, "{:?}", still.elapsed());
}
