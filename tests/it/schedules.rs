//! Random schedules of clients, endpoints, the disk and the gateway's load, over real sockets: an endpoint that
//! responds in time is never blamed, whatever the others do.
//!
//! Each endpoint measures its own delay from the moment it has what it waits for, and a thread measures how late it is
//! woken. So a machine that is too busy to run an endpoint in time is distinguished from a gateway with wrong blame.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use bytes::Bytes;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use crate::fuzz::mutate;
use crate::harness::client::{H2Client, request};
use crate::harness::gateway::{Process, Watched};
use crate::harness::lateness::Lateness;
use crate::harness::origin::{Connection, response};
use crate::harness::wire::Left;
use crate::harness::{Client, DEADLINE, H2Origin, Origin, Setup, eventually, ms};

const SCHEDULES: usize = 36;
/// Simultaneous clients.
const CLIENTS: usize = 12;
/// The gateway's time limit for endpoints; clients may be slower.
const PATIENCE: Duration = ms(2_500);
/// A client leaves when it has read for this long. One with a small receive buffer gets 2 KiB/s on a bad day.
const READS_AT_MOST: Duration = ms(20_000);
/// Longest pause of an endpoint.
const PAUSE_OF_ENDPOINT: u64 = 200;
/// An endpoint that was later than this, for lack of CPU, did not respond in time.
const IN_TIME: Duration = ms(1_500);
const BODY_MOST: usize = 1 << 20;

/// A single failure has consequences.
const STRICT: &str = "circuit_breaker: { consecutive: 1, min_requests: unlimited, open: 90s, max_open: 90s }, \
    outlier_detection: { consecutive_gateway_errors: 1, consecutive_5xx: 1, connect_failures: 1, max_ejected: 100% }";

/// Reasons that only an endpoint can cause.
const ACCUSING: [&str; 12] = [
    "connect.refused",
    "connect.timeout",
    "connect.failed",
    "send.timeout",
    "send.reset",
    "wait.timeout",
    "wait.reset",
    "wait.malformed",
    "receive.timeout",
    "receive.reset",
    "receive.malformed",
    "select.breaker_open",
];

/// Random numbers that depend only on the seed.
struct Dice(StdRng);

impl Dice {
    fn of(seed: u64, who: u64) -> Dice {
        Dice(StdRng::seed_from_u64(seed ^ who.wrapping_mul(0x9e37_79b9_7f4a_7c15)))
    }

    fn chance(&mut self, percent: u32) -> bool {
        self.0.gen_range(0..100) < percent
    }

    fn one<T: Copy>(&mut self, of: &[T]) -> T {
        of[self.0.gen_range(0..of.len())]
    }

    /// Usually short, sometimes up to `most`.
    fn pause(&mut self, most: u64) {
        let most = if self.chance(80) { most / 20 } else { most };
        thread::sleep(ms(self.0.gen_range(0..=most)));
    }

    /// Usually small, sometimes up to `most`.
    fn size(&mut self, most: usize) -> usize {
        let most = if self.chance(50) { most / 64 } else { most };
        self.0.gen_range(0..=most)
    }
}

/// Records how late this thread is woken, until `over`.
fn watch(lateness: &Lateness, over: &AtomicBool) {
    while !over.load(Ordering::Relaxed) {
        let due = Instant::now() + ms(50);
        thread::sleep(ms(50));
        lateness.note(due);
    }
}

/// An HTTP/1 endpoint that reads and writes at its own pace, and never idles for long while it is waited for.
fn paced(seed: u64, lateness: Arc<Lateness>) -> Origin {
    let connections = AtomicU64::new(0);
    Origin::playing(move |connection| {
        let dice = Dice::of(seed, 1_000 + connections.fetch_add(1, Ordering::Relaxed));
        // The connection ends when the gateway abandons the exchange.
        let _ = converse(connection, dice, &lateness);
    })
}

fn converse(connection: Connection, mut dice: Dice, lateness: &Lateness) -> std::io::Result<()> {
    let mut wire = connection.into_wire();
    while let Some(head) = wire.head() {
        let mut left = head.request_framing().begin();
        while !matches!(left, Left::Nothing(_)) {
            let piece = wire.piece(&mut left, 64 << 10);
            let began = Instant::now();
            if !piece.is_empty() && dice.chance(20) {
                dice.pause(PAUSE_OF_ENDPOINT);
            }
            lateness.note(began);
        }
        if matches!(left, Left::Nothing(crate::harness::End::Cut)) {
            return Ok(());
        }
        let began = Instant::now();
        dice.pause(PAUSE_OF_ENDPOINT);
        let body = vec![b'x'; dice.size(4 * BODY_MOST)];
        let whole = response("200 OK", "", &body);
        if head.method() == "HEAD" {
            wire.send(&whole[..whole.len() - body.len()])?;
            continue;
        }
        lateness.note(began);
        for piece in whole.chunks(dice.one(&[1 << 10, 64 << 10, 1 << 20])) {
            // While the gateway does not read, it is not waiting for the endpoint.
            wire.send(piece)?;
            let began = Instant::now();
            if dice.chance(2) {
                dice.pause(PAUSE_OF_ENDPOINT);
            }
            lateness.note(began);
        }
    }
    Ok(())
}

/// Requests to an HTTP/2 endpoint, which responds at once. 16 MiB is a lot for a busy machine.
const OF_HTTP2: [&str; 10] =
    ["/echo", "/echo", "/echo", "/ticks", "/ticks", "/trailers", "/other", "/other", "/other", "/large"];

/// The behaviour of a client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Habit {
    /// Completes the exchange.
    Patient,
    /// Leaves before it has sent everything.
    GivesUp,
    /// Leaves before it has read everything.
    Stops,
    /// Shuts down its sending side after its request.
    HalfCloses,
}

/// An HTTP/1 client whose pauses may exceed the endpoints' time limit.
fn ask(address: SocketAddr, target: &str, dice: &mut Dice) -> Option<()> {
    let longest = PATIENCE.as_millis() as u64 * 13 / 10;
    let habit = dice.one(&[Habit::Patient, Habit::Patient, Habit::GivesUp, Habit::Stops, Habit::HalfCloses]);
    let mut client = if dice.chance(50) { Client::slow(address) } else { Client::connect(address) };
    let uploads = dice.chance(60);
    let body = vec![b'y'; if uploads { dice.size(BODY_MOST) } else { 0 }];
    let whole = request(if uploads { "POST" } else { "GET" }, target, "", &body);
    // At most one pause is long.
    let long = dice.0.gen_range(0..4);
    let leaves = if habit == Habit::GivesUp { dice.0.gen_range(0..whole.len()) } else { whole.len() };
    for (n, piece) in whole[..leaves].chunks((leaves / 4).max(16 << 10)).enumerate() {
        if n > 0 {
            dice.pause(if n == long { longest } else { 20 });
        }
        if !client.try_send(piece) {
            return None;
        }
    }
    match habit {
        Habit::GivesUp => {
            dice.pause(longest / 4);
            if dice.chance(50) {
                client.reset()
            } else {
                drop(client)
            }
            return None;
        }
        Habit::HalfCloses => drop(client.try_end()),
        Habit::Patient | Habit::Stops => {}
    }
    let mut wire = client.into_wire();
    if dice.chance(30) {
        dice.pause(longest);
    }
    let head = wire.head()?;
    let mut left = head.response_framing("GET").begin();
    let (mut taken, mut pauses, began) = (0, 0, Instant::now());
    while !matches!(left, Left::Nothing(_)) {
        taken += wire.piece(&mut left, 64 << 10).len();
        if habit == Habit::Stops && taken > 1_000 {
            dice.pause(longest / 4);
            wire.reset();
            return None;
        }
        if began.elapsed() > READS_AT_MOST {
            wire.reset();
            return None;
        }
        if pauses < 4 && dice.chance(10) {
            pauses += 1;
            dice.pause(if pauses == 1 { longest } else { 200 });
        }
    }
    Some(())
}

/// An HTTP/2 client that cancels a stream or reads it slowly.
fn ask_by_stream(address: SocketAddr, target: &str, dice: &mut Dice) -> Option<()> {
    let longest = PATIENCE.as_millis() as u64 * 13 / 10;
    let client = H2Client::with(address, None, dice.chance(50).then_some(16 << 10));
    let uploads = dice.chance(60);
    let asked = http::Request::builder().method(if uploads { "POST" } else { "GET" });
    let asked = asked.uri(format!("http://test{target}")).body(()).expect("a request");
    let (response, mut send) = client.begin(asked, !uploads);
    if uploads {
        let pieces = dice.0.gen_range(1..5);
        for piece in 0..pieces {
            let data = Bytes::from(vec![b'y'; dice.size(64 << 10)]);
            send.send_data(data, piece + 1 == pieces).ok()?;
            client.soon(std::future::pending::<()>());
            dice.pause(if piece == 0 { longest } else { 50 });
            if dice.chance(10) {
                send.send_reset(h2::Reason::CANCEL);
                client.soon(std::future::pending::<()>());
                return None;
            }
        }
    }
    let mut body = client.step(response).ok()?.into_body();
    let mut pauses = 0;
    while let Some(piece) = client.step(body.data()) {
        let piece = piece.ok()?;
        if pauses < 4 && dice.chance(5) {
            pauses += 1;
            dice.pause(if pauses == 1 { longest } else { 200 });
            if dice.chance(20) {
                return None;
            }
        }
        body.flow_control().release_capacity(piece.len()).ok()?;
    }
    Some(())
}

fn gateway(endpoint: SocketAddr, protocol: &str) -> Process {
    let timeouts =
        format!("timeouts: {{ connect: 20s, send: {0}ms, wait: {0}ms, receive: {0}ms }}", PATIENCE.as_millis());
    let limits =
        "request: { mode: MODE, memory: 64KiB, disk: 64MiB }, response: { mode: MODE, memory: 64KiB, disk: 64MiB }";
    let clocks = "client: { body_idle: 20s, write_idle: 20s }, retry: { attempts: 1 }";
    let setup = Setup::before_all(&[endpoint])
        .listener("protocols: [http1, h2c]")
        .upstream(&format!("protocol: {protocol}, {timeouts}"))
        .upstream(STRICT)
        .route(&format!("buffering: {{ {} }}, {clocks}", limits.replace("MODE", "auto")));
    ["full", "stream"]
        .into_iter()
        .fold(setup, |setup, mode| {
            let buffering = limits.replace("MODE", mode);
            let matched = format!("match: {{ queries: {{ mode: {mode} }} }}");
            setup.also_route(&format!(
                "{{ name: {mode}, {matched}, buffering: {{ {buffering} }}, {clocks}, upstream: app }}"
            ))
        })
        .spooling("")
        .more("resources: { memory: 8MiB, pause: 20s }")
        .spawn()
}

/// Stops the disk now and then, and sometimes the whole gateway for longer than the endpoints' time limit.
fn disturb(process: &Process, mut dice: Dice, over: &AtomicBool) {
    let longest = PATIENCE.as_millis() as u64 * 12 / 10;
    while !over.load(Ordering::Relaxed) {
        match dice.one(&[0, 0, 1, 2]) {
            0 => {
                let still = process.still_disk();
                dice.pause(1_000);
                drop(still);
            }
            1 => {
                process.signal(libc::SIGSTOP);
                dice.pause(longest);
                process.signal(libc::SIGCONT);
            }
            _ => {}
        }
        dice.pause(1_000);
    }
}

fn an_endpoint_is_never_accused(seed: u64, over_http2: bool) {
    let lateness = Arc::new(Lateness::default());
    let paced = paced(seed, lateness.clone());
    let h2 = H2Origin::start();
    let (endpoint, protocol) = if over_http2 { (h2.address(), "h2c") } else { (paced.address(), "http1") };
    let process = gateway(endpoint, protocol);
    let (over, whole, web) = (AtomicBool::new(false), AtomicU64::new(0), process.web());
    let visit = &|schedule: usize| {
        let mut dice = Dice::of(seed, schedule as u64);
        let path = if over_http2 { dice.one(&OF_HTTP2) } else { "/any" };
        let target = format!("{path}?mode={}&schedule={schedule}", dice.one(&["full", "stream", "auto"]));
        let ask: fn(SocketAddr, &str, &mut Dice) -> Option<()> = if dice.chance(50) { ask } else { ask_by_stream };
        if ask(web, &target, &mut dice).is_some() {
            whole.fetch_add(1, Ordering::Relaxed);
        }
    };
    thread::scope(|scope| {
        scope.spawn(|| watch(&lateness, &over));
        scope.spawn(|| disturb(&process, Dice::of(seed, 999), &over));
        let clients =
            (0..CLIENTS).map(|client| scope.spawn(move || (client..SCHEDULES).step_by(CLIENTS).for_each(visit)));
        let clients: Vec<_> = clients.collect();
        let ended: Vec<_> = clients.into_iter().map(|client| client.join()).collect();
        over.store(true, Ordering::Relaxed);
        ended.into_iter().for_each(|client| client.expect("a client"));
    });
    process.wait_metric("forebay_phase_active", |active| active == 0.0);
    let late = lateness.worst().max(h2.late());
    let whole = whole.load(Ordering::Relaxed);
    println!("over {protocol}: {whole} of {SCHEDULES} were answered whole; the endpoint was {late:?} late at most");
    let accused: Vec<_> = process
        .log_lines(0)
        .into_iter()
        .filter(|line| ACCUSING.contains(&line.reason()) || line.status() == 502 || line.number("attempts") > 1.0)
        .map(|line| line.to_string())
        .collect();
    if late > IN_TIME {
        return println!("the machine was too busy to run the endpoint in time, which was accused of {accused:#?}");
    }
    assert!(accused.is_empty(), "{protocol}, FOREBAY_FUZZ_SEED={seed}: {accused:#?}");
    for metric in ["forebay_upstream_breaker_open", "forebay_upstream_ejections_total", "forebay_retries_total"] {
        assert_eq!(process.metric(metric), 0.0, "{protocol}, FOREBAY_FUZZ_SEED={seed}: {metric}");
    }
    assert!(whole > 0, "no client got a complete response");
}

#[test]
fn an_endpoint_of_http_1_that_answers_in_time_is_never_accused() {
    let seed = mutate::seed();
    println!("FOREBAY_FUZZ_SEED={seed}");
    an_endpoint_is_never_accused(seed, false);
}

#[test]
fn an_endpoint_of_http_2_that_answers_in_time_is_never_accused() {
    let seed = mutate::seed();
    println!("FOREBAY_FUZZ_SEED={seed}");
    an_endpoint_is_never_accused(seed, true);
}

#[test]
fn an_endpoint_is_not_accused_of_the_time_for_which_the_gateway_was_suspended() {
    let (tell, received) = mpsc::channel();
    let (resume, resumed) = mpsc::channel::<()>();
    let (tell, resumed) = (Mutex::new(tell), Mutex::new(resumed));
    let origin = Origin::playing(move |connection| {
        let mut wire = connection.into_wire();
        while wire.head().is_some() {
            tell.lock().unwrap().send(()).expect("the story");
            resumed.lock().unwrap().recv().expect("the story");
            // Its response comes late enough that a gateway which only looks twice has given up.
            thread::sleep(PATIENCE / 5);
            let _ = wire.send(response("200 OK", "", b"late"));
        }
    });
    let process = gateway(origin.address(), "http1");
    let mut client = Client::connect(process.web());
    client.send(request("GET", "/suspended", "", b""));
    received.recv_timeout(DEADLINE).expect("the request");
    process.signal(libc::SIGSTOP);
    let began = Instant::now();
    eventually("the endpoint's limit to pass", || (began.elapsed() > PATIENCE * 11 / 10).then_some(()));
    process.signal(libc::SIGCONT);
    resume.send(()).expect("the origin");
    let head = client.into_wire().head().expect("a response");
    assert_eq!(head.status(), 200);
    assert_eq!(process.metric("forebay_upstream_breaker_open"), 0.0);
}
