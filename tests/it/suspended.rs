//! A gateway that was suspended for longer than a limit: it blames no party that did its part in time, and gives each
//! the rest of its time.
//!
//! In each story the limit passes while the gateway is suspended. The other party goes on a fifth of the limit after
//! that, so a gateway that only looks at its sockets again would be too late.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Condvar, Mutex, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use forebay::phase::Phase;

use crate::harness::client::request;
use crate::harness::gateway::{Process, Watched};
use crate::harness::origin::{Connection, built_in, ok};
use crate::harness::secure::{Authority, Layers, Secure};
use crate::harness::tls::{Tls, pair};
use crate::harness::{Client, DEADLINE, H2Origin, Origin, Setup, eventually, ms};

/// Each limit.
const LIMIT: Duration = ms(2_500);
/// Limits that do not matter here.
const AMPLE: &str = "connect: 60s, send: 60s, wait: 60s, receive: 60s";

/// Suspends the gateway for longer than the limit, once its heartbeat runs, which recognizes that.
fn suspend(process: &Process, meanwhile: impl FnOnce()) {
    process.wait_metric("forebay_loop_lag_seconds_count", |count| count >= 1.0);
    process.signal(libc::SIGSTOP);
    let began = Instant::now();
    meanwhile();
    eventually("the limit to pass", || (began.elapsed() > LIMIT * 11 / 10).then_some(()));
    process.signal(libc::SIGCONT);
}

/// A relay that holds back the first bytes of each connection, except some, until the story opens it.
struct Gate {
    address: SocketAddr,
    seen: mpsc::Receiver<()>,
    open: Arc<(Mutex<bool>, Condvar)>,
}

impl Gate {
    /// A gate in front of `target`, which passes this many bytes at once.
    fn before(target: impl ToString, passes: usize) -> Gate {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = listener.local_addr().expect("an address");
        let (tell, seen) = mpsc::channel();
        let open = Arc::<(Mutex<bool>, Condvar)>::default();
        let (target, opened) = (target.to_string(), open.clone());
        thread::spawn(move || {
            while let Ok((near, _)) = listener.accept() {
                let (tell, target, opened) = (tell.clone(), target.clone(), opened.clone());
                thread::spawn(move || relay(near, &target, passes, &tell, &opened));
            }
        });
        Gate { address, seen, open }
    }

    /// Waits for the first bytes of a connection.
    fn wait(&self) {
        self.seen.recv_timeout(DEADLINE).expect("a connection");
    }

    /// Lets bytes pass, after a while.
    fn open(&self) {
        thread::sleep(LIMIT / 5);
        *self.open.0.lock().unwrap() = true;
        self.open.1.notify_all();
    }
}

/// A failure ends the connection, which the story notices.
fn relay(mut near: TcpStream, target: &str, passes: usize, tell: &mpsc::Sender<()>, open: &(Mutex<bool>, Condvar)) {
    let mut first = [0; 16384];
    let read = near.read(&mut first).unwrap_or(0);
    let Ok(mut far) = TcpStream::connect(target) else { return };
    let _ = far.write_all(&first[..passes.min(read)]);
    let _ = tell.send(());
    drop(open.1.wait_timeout_while(open.0.lock().unwrap(), DEADLINE, |open| !*open).unwrap());
    let _ = far.write_all(&first[passes.min(read)..read]);
    let (mut from, mut to) = (near.try_clone().expect("a socket"), far.try_clone().expect("a socket"));
    thread::spawn(move || std::io::copy(&mut from, &mut to));
    let _ = std::io::copy(&mut far, &mut near);
}

fn limit(key: &str) -> String {
    format!("{key}: {}ms", LIMIT.as_millis())
}

/// Requests something through a gate that opens after the suspension.
fn asked_through(gate: &Gate, process: &Process) -> u16 {
    let mut client = process.client();
    client.send(request("GET", "/", "", b""));
    gate.wait();
    suspend(process, || ());
    gate.open();
    client.response().status
}

#[test]
fn an_endpoint_has_its_time_for_the_handshake() {
    let authority = Authority::new();
    let origin = Secure::start(Layers::tls(&authority.issue(&["127.0.0.1"])));
    let gate = Gate::before(origin.address(), 0);
    let tls = format!("tls: {{ ca: \"{}\" }}", authority.file().display());
    let timeouts = format!("timeouts: {{ {}, send: 60s, wait: 60s, receive: 60s }}", limit("connect"));
    let setup = Setup::before_all(&[gate.address]).upstream(&tls).upstream(&timeouts);
    let process = setup.route("retry: { attempts: 1 }").spawn();
    assert_eq!(asked_through(&gate, &process), 200);
    assert_eq!(process.metric("forebay_upstream_connects_total{outcome=\"failed\"}"), 0.0);
}

#[test]
fn an_endpoint_has_its_time_over_http_2() {
    let origin = H2Origin::start();
    let gate = Gate::before(origin.address(), 0);
    let timeouts = format!("protocol: h2c, timeouts: {{ connect: 60s, send: 60s, {}, receive: 60s }}", limit("wait"));
    let process = Setup::before_all(&[gate.address]).upstream(&timeouts).route("retry: { attempts: 1 }").spawn();
    assert_eq!(asked_through(&gate, &process), 200);
}

#[test]
fn an_endpoint_has_its_time_in_the_deadline_of_an_exchange() {
    let origin = Origin::named("app");
    let gate = Gate::before(origin.address(), 0);
    let setup = Setup::before_all(&[gate.address]).upstream(&format!("timeouts: {{ {AMPLE} }}"));
    let process = setup.route(&limit("deadline")).spawn();
    assert_eq!(asked_through(&gate, &process), 200);
}

#[test]
fn a_service_that_a_filter_calls_has_its_time() {
    let (origin, service) = (Origin::named("app"), Origin::answering(|_| ok("yes")));
    let of_filter = (format!(", {}", limit("timeout")), format!("timeouts: {{ {AMPLE} }}"));
    let of_upstream = (
        ", timeout: 60s".to_owned(),
        format!("timeouts: {{ connect: 60s, send: 60s, {}, {} }}", limit("wait"), limit("receive")),
    );
    thread::scope(|scope| {
        for (filter, timeouts) in [of_filter, of_upstream] {
            let (origin, service) = (origin.address(), service.address());
            scope.spawn(move || {
                let gate = Gate::before(service, 0);
                let auth = format!("endpoints: [ {{ address: \"{}\" }} ], {timeouts}", gate.address);
                let filter = format!("forward_auth: {{ upstream: auth, path: /{filter} }}");
                let process = Setup::before_all(&[origin]).also_upstream("auth", &auth).filters(&filter).spawn();
                assert_eq!(asked_through(&gate, &process), 200, "{filter}, {timeouts}");
            });
        }
    });
}

#[test]
fn a_suspended_gateway_marks_no_endpoint_unhealthy() {
    let authority = Authority::new();
    let secure = Secure::start(Layers::tls(&authority.issue(&["127.0.0.1"])));
    let plain = Origin::named("app");
    let tls = format!("tls: {{ ca: \"{}\" }}", authority.file().display());
    let cases = [
        ("http: {}", plain.address().to_string(), "tls: off", "60s"),
        ("tcp: {}", secure.address().to_owned(), &*tls, "60s"),
        ("tcp: {}", secure.address().to_owned(), &*tls, "2500ms"),
    ];
    thread::scope(|scope| {
        for (probe, target, tls, connect) in cases {
            scope.spawn(move || {
                let gate = Gate::before(&target, 0);
                let terms = format!("interval: 1s, {}, unhealthy_after: 1", limit("timeout"));
                let mut setup = Setup::before_all(&[gate.address])
                    .upstream(&format!("health_check: {{ {probe}, {terms} }}, timeouts: {{ connect: {connect} }}"));
                if tls != "tls: off" {
                    setup = setup.upstream(tls);
                }
                let process = setup.spawn();
                gate.wait();
                suspend(&process, || ());
                gate.open();
                let checks =
                    |outcome| format!("forebay_upstream_health_checks_total{{upstream=\"app\",outcome=\"{outcome}\"}}");
                process.wait_metric(&checks("passed"), |passed| passed >= 1.0);
                for outcome in ["failed", "timeout"] {
                    assert_eq!(process.metric(&checks(outcome)), 0.0, "{probe}, {target}: {outcome}");
                }
            });
        }
    });
}

/// What a client sends before and after the suspension, and how the gateway shows that it has the first part.
struct Halves {
    listener: String,
    route: String,
    phase: Phase,
    first: &'static str,
    rest: &'static str,
}

#[test]
fn a_client_has_its_time_for_its_request() {
    let origin = Origin::named("app");
    let body = |client: &str| format!("client: {{ {client} }}");
    let halves = |listener: String, route: String, phase, first, rest| Halves { listener, route, phase, first, rest };
    const HEAD: &str = "POST / HTTP/1.1\r\nHost: test\r\nContent-Length: 4\r\n\r\nab";
    let trusting = format!("proxy_protocol: {{ from: [127.0.0.1], {} }}", limit("timeout"));
    let cases = [
        halves(
            format!("timeouts: {{ {} }}", limit("header")),
            String::new(),
            Phase::Header,
            "GET / HTTP/1.1\r\nHo",
            "st: test\r\n\r\n",
        ),
        halves(String::new(), body(&limit("body_idle")), Phase::Buffer, HEAD, "cd"),
        halves(String::new(), body(&limit("body_total")), Phase::Buffer, HEAD, "cd"),
        halves(
            String::new(),
            body(&format!("min_rate: {{ read: 1KiB/s, {} }}", limit("grace"))),
            Phase::Buffer,
            HEAD,
            "cd",
        ),
        halves(
            trusting,
            String::new(),
            Phase::Accept,
            "PROXY TCP4 203.0.113.7 ",
            "127.0.0.1 4000 80\r\nGET / HTTP/1.1\r\nHost: test\r\n\r\n",
        ),
    ];
    thread::scope(|scope| {
        for Halves { listener, route, phase, first, rest } in cases {
            let origin = origin.address();
            scope.spawn(move || {
                let mut setup = Setup::before_all(&[origin]);
                if !listener.is_empty() {
                    setup = setup.listener(&listener);
                }
                if !route.is_empty() {
                    setup = setup.route(&route);
                }
                let process = setup.spawn();
                let mut client = process.client();
                client.send(first);
                process.wait_phase(phase);
                suspend(&process, || ());
                thread::sleep(LIMIT / 5);
                client.send(rest);
                assert_eq!(client.response().status, 200, "{listener} {route}");
            });
        }
    });
}

#[test]
fn a_client_has_its_time_for_the_handshake() {
    let (authority, origin) = (Authority::new(), Origin::named("app"));
    let identity = pair(&authority.issue(&["a.test"]));
    let tls = format!("tls: {{ certificates: [ {{ {identity} }} ], {} }}", limit("handshake_timeout"));
    let process = Setup::before(&origin).listener(&tls).spawn();
    let gate = Gate::before(process.web(), 10);
    let client = Tls::to(gate.address, &authority, "a.test");
    let client = thread::spawn(move || client.get("/").map(|(got, _)| got.status));
    gate.wait();
    process.wait_phase(Phase::Handshake);
    suspend(&process, || ());
    gate.open();
    assert_eq!(client.join().expect("the client"), Ok(200));
}

#[test]
fn a_request_that_lies_in_the_socket_of_an_idle_connection_is_answered() {
    let origin = Origin::named("app");
    let process = Setup::before(&origin).listener(&format!("timeouts: {{ {} }}", limit("idle"))).spawn();
    let mut client = process.client();
    assert_eq!(client.get("/").status, 200);
    suspend(&process, || client.send(request("GET", "/", "", b"")));
    assert_eq!(client.response().status, 200);
    suspend(&process, || ());
    thread::sleep(LIMIT / 5);
    assert_eq!(client.get("/").status, 200);
}

#[test]
fn a_client_has_its_time_for_a_frame() {
    let origin = Origin::named("app");
    let listener = format!("protocols: [http1, h2c], timeouts: {{ {} }}", limit("header"));
    let process = Setup::before(&origin).listener(&listener).spawn();
    let mut client = process.client();
    client.send(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0");
    let frame = |client: &mut Client| {
        let head = client.bytes(9);
        client.bytes(usize::from(head[1]) << 8 | usize::from(head[2]));
        (head[3], head[4])
    };
    // It has read the SETTINGS, and so what follows at once.
    eventually("the acknowledgement", || (frame(&mut client) == (4, 1)).then_some(()));
    client.send(b"\0\0\x08\x06\0\0\0");
    process.wait_metric("forebay_client_connections", |count| count >= 1.0);
    suspend(&process, || ());
    thread::sleep(LIMIT / 5);
    client.send(b"\0\x0012345678");
    eventually("the answer to the PING", || (frame(&mut client) == (6, 1)).then_some(()));
}

#[test]
fn a_client_that_reads_while_the_gateway_is_suspended_gets_the_whole_response() {
    const LENGTH: usize = 8 << 20;
    let origin = built_in();
    let client_keys =
        [limit("write_idle"), format!("write_idle: 60s, min_rate: {{ write: 512KiB/s, {} }}", limit("grace"))];
    thread::scope(|scope| {
        for keys in client_keys {
            let address = origin.address();
            scope.spawn(move || {
                let process = Setup::before_all(&[address]).route(&format!("client: {{ {keys} }}")).spawn();
                let mut client = Client::with_receive_buffer(process.web(), 64 << 10);
                client.send(request("GET", "/bytes/8MiB", "", b""));
                let head = client.bytes(100).len();
                process.wait_metric("forebay_slow_clients", |slow| slow >= 1.0);
                let mut read = head;
                suspend(&process, || read += client.what_is_there().len());
                thread::sleep(LIMIT / 5);
                read += client.bytes(LENGTH - read).len();
                assert!(read >= LENGTH, "{keys}");
                assert_eq!(process.metric("forebay_refusals_total"), 0.0, "{keys}");
            });
        }
    });
}

#[test]
fn a_passed_connection_is_not_idle_while_the_gateway_is_suspended() {
    let origin = Origin::playing(echo);
    let listener = format!("{{ name: db, address: \"127.0.0.1:0\", tcp: {{ upstream: app, {} }} }}", limit("idle"));
    let process = Setup::before(&origin).also_listener(&listener).spawn();
    let mut client = Client::connect(process.listens("db"));
    is_echoed_after_a_suspension(&process, &mut client);
}

/// Sends back whatever comes.
fn echo(connection: Connection) {
    let mut wire = connection.into_wire();
    loop {
        let bytes = wire.what_is_there();
        if bytes.is_empty() || wire.send(bytes).is_err() {
            return;
        }
    }
}

/// What this client sends comes back, also after the gateway was suspended.
fn is_echoed_after_a_suspension(process: &Process, client: &mut Client) {
    client.send(b"first");
    assert_eq!(client.bytes(5), b"first");
    suspend(process, || ());
    thread::sleep(LIMIT / 5);
    client.send(b"later");
    assert_eq!(client.bytes(5), b"later");
}

/// An endpoint that agrees to another protocol, and then does `play`.
fn agreeing(play: impl Fn(Connection) + Send + Sync + 'static) -> Origin {
    Origin::playing(move |mut connection| {
        connection.header();
        connection.send("HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n");
        play(connection);
    })
}

/// A client whose endpoint has agreed to another protocol.
fn upgraded(process: &Process) -> Client {
    let mut client = process.client();
    client.send(request("GET", "/", "Connection: Upgrade\r\nUpgrade: websocket\r\n", b""));
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.extend(client.bytes(1));
    }
    assert!(head.starts_with(b"HTTP/1.1 101 "), "{}", String::from_utf8_lossy(&head));
    client
}

#[test]
fn a_tunnel_is_not_idle_while_the_gateway_is_suspended() {
    let origin = agreeing(echo);
    let timeouts = format!("timeouts: {{ connect: 60s, send: 60s, {}, {} }}", limit("wait"), limit("receive"));
    let process = Setup::before(&origin).upstream(&timeouts).spawn();
    let mut client = upgraded(&process);
    is_echoed_after_a_suspension(&process, &mut client);
    let silent_since = Instant::now();
    client.closed();
    assert!(silent_since.elapsed() >= LIMIT * 9 / 10, "{:?}", silent_since.elapsed());
    assert_eq!(process.log_line().reason(), "receive.timeout");
}

#[test]
fn an_endpoint_has_its_time_to_read_from_a_tunnel() {
    let piece = [b'x'; 64 << 10];
    let (open, opened) = mpsc::channel();
    let opened = Mutex::new(opened);
    let origin = agreeing(move |connection| {
        opened.lock().unwrap().recv_timeout(DEADLINE).expect("the story goes on");
        let mut wire = connection.into_wire();
        while !wire.what_is_there().ends_with(b"!") {}
        wire.send(b"all").expect("the gateway takes bytes");
        wire.rest();
    });
    let timeouts = format!("timeouts: {{ connect: 60s, {}, wait: 60s, receive: 60s }}", limit("send"));
    let process = Setup::before(&origin).upstream(&timeouts).spawn();
    let mut client = upgraded(&process);
    client.fill(&piece);
    suspend(&process, || ());
    thread::sleep(LIMIT / 5);
    open.send(()).expect("the endpoint waits");
    client.send(b"!");
    assert_eq!(client.bytes(3), b"all");
}
