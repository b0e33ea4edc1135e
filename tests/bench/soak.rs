//! A soak test: fast and slow clients for ten minutes, many of which leave in the middle, and a Forebay whose memory
//! must not grow.
//!
//! `cargo bench --profile dev --bench soak` starts `target/release/forebay` (or `FOREBAY_BIN`) with its built-in origin
//! as endpoint. It prints the resources of the process every 15 seconds. It fails if the memory grows by more than
//! [`GROWTH_MAX`] from the second fifth of the time to the last, if anything stays open after all clients have left, or
//! if a fast client ever gets a wrong response. `-- --seconds 60` makes it shorter, `-- --slow 500` sets the number of
//! slow clients.

use std::collections::VecDeque;
use std::fs;
use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, sleep};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use clap::Parser;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use socket2::{Domain, Socket, Type};

/// Limit on the growth of the memory, as a share of it.
const GROWTH_MAX: f64 = 0.15;

/// Time for the kernel to notice that clients have left, and for Forebay to release their resources.
const REST: Duration = Duration::from_secs(20);

const PATIENCE: Duration = Duration::from_secs(30);

#[derive(Parser)]
struct Options {
    /// How long the clients go on.
    #[arg(long, default_value_t = 600)]
    seconds: u64,
    /// How many slow clients there are at a time, half of them readers.
    #[arg(long, default_value_t = 200)]
    slow: usize,
    /// Cargo says so.
    #[arg(long, hide = true)]
    bench: bool,
}

fn main() -> Result<()> {
    let options = Options::parse();
    let binary = std::env::var("FOREBAY_BIN").unwrap_or_else(|_| "target/release/forebay".to_owned());
    let dir = tempfile::tempdir()?;
    let [origin_at, web, admin] = [free_address()?, free_address()?, free_address()?];
    let config = format!(
        "server: {{ threads: 1, spool_dir: {dir} }}
listeners: [ {{ name: web, address: \"{web}\", protocols: [http1] }} ]
upstreams: {{ app: {{ endpoints: [ {{ address: \"{origin_at}\" }} ] }} }}
admin: {{ address: \"{admin}\" }}
observability: {{ access_log: {{ path: \"{dir}/access.log\" }} }}
routes: [ {{ name: all, upstream: app }} ]
",
        dir = dir.path().display()
    );
    let file = dir.path().join("forebay.yaml");
    fs::write(&file, config)?;
    let origin = origin_at.to_string();
    let _origin = Running::start(Command::new(&binary).args(["origin", "--listen", &origin]), &[origin_at])?;
    let gateway = Running::start(Command::new(&binary).arg("run").arg("-c").arg(&file), &[web, admin])?;
    let idle = gateway.held(admin)?;
    println!("idle: {idle}");

    let (stop, counts) = (AtomicBool::new(false), Counts::default());
    let begin = Instant::now();
    let length = Duration::from_secs(options.seconds);
    let mut seen = Vec::new();
    thread::scope(|scope| -> Result<()> {
        let clients = [
            scope.spawn(|| fast(web, 1, &stop, &counts)),
            scope.spawn(|| fast(web, 2, &stop, &counts)),
            scope.spawn(|| crowd(web, options.slow / 2, 3, begin_reader, &stop, &counts)),
            scope.spawn(|| crowd(web, options.slow / 2, 4, begin_uploader, &stop, &counts)),
        ];
        while begin.elapsed() < length && clients.iter().all(|client| !client.is_finished()) {
            sleep(Duration::from_secs(15).min(length.saturating_sub(begin.elapsed())));
            let held = gateway.held(admin)?;
            println!("{:4} s: {held}; {counts}", begin.elapsed().as_secs());
            seen.push((begin.elapsed(), held.resident));
            // The log is not the subject of this test.
            fs::File::options().write(true).open(dir.path().join("access.log"))?.set_len(0)?;
        }
        stop.store(true, Ordering::Relaxed);
        clients.into_iter().try_for_each(|client| client.join().expect("a client panicked"))
    })?;

    let most = |from: u32, to: u32| {
        let within = |at: &Duration| *at > length * from / 5 && *at <= length * to / 5 + Duration::from_secs(2);
        seen.iter().filter(|(at, _)| within(at)).map(|(_, resident)| *resident).max().unwrap_or_default() as f64
    };
    let (early, late) = (most(1, 2), most(4, 5));
    println!("most in the second fifth {:.1} MB, in the last {:.1} MB", early / 1e6, late / 1e6);
    let after = gateway.at_rest(admin, &idle)?;
    println!("after: {after}");
    ensure!(late <= early * (1.0 + GROWTH_MAX), "the memory grows");
    println!("flat");
    Ok(())
}

#[derive(Default)]
struct Counts {
    asked: AtomicU64,
    read: AtomicU64,
    sent: AtomicU64,
    aborted: AtomicU64,
}

impl std::fmt::Display for Counts {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let [asked, read, sent, aborted] =
            [&self.asked, &self.read, &self.sent, &self.aborted].map(|count| count.load(Ordering::Relaxed));
        write!(f, "{asked} fast, {read} answers read slowly, {sent} bodies sent slowly, {aborted} given up")
    }
}

/// The resources of the process.
struct Held {
    resident: u64,
    descriptors: usize,
    spooled: f64,
    slow: f64,
}

impl std::fmt::Display for Held {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Held { resident, descriptors, spooled, slow } = self;
        write!(
            f,
            "{:.1} MB resident, {descriptors} descriptors, {:.1} MB spooled, {slow} slow",
            *resident as f64 / 1e6,
            spooled / 1e6
        )
    }
}

/// A process that is killed on drop.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Running {
    fn start(command: &mut Command, addresses: &[SocketAddr]) -> Result<Running> {
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn();
        let running = Running(child.with_context(|| format!("{:?}", command.get_program()))?);
        let deadline = Instant::now() + PATIENCE;
        while addresses.iter().any(|address| TcpStream::connect(address).is_err()) {
            ensure!(Instant::now() < deadline, "nobody listens on one of {addresses:?}");
            sleep(Duration::from_millis(50));
        }
        Ok(running)
    }

    fn held(&self, admin: SocketAddr) -> Result<Held> {
        let pid = self.0.id();
        let rollup = fs::read_to_string(format!("/proc/{pid}/smaps_rollup"))?;
        let resident = rollup.lines().find_map(|line| line.strip_prefix("Rss:")?.trim().strip_suffix(" kB"));
        let metrics = text(admin, "/metrics")?;
        let sum = |name: &str| -> f64 {
            let lines = metrics.lines().filter(|line| line.starts_with(name));
            lines.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum()
        };
        Ok(Held {
            resident: resident.context("no Rss")?.trim().parse::<u64>()? * 1024,
            descriptors: fs::read_dir(format!("/proc/{pid}/fd"))?.count(),
            spooled: sum("forebay_spool_bytes{"),
            slow: sum("forebay_slow_clients{"),
        })
    }

    /// Waits until all resources of clients that have left are released.
    fn at_rest(&self, admin: SocketAddr, idle: &Held) -> Result<Held> {
        let deadline = Instant::now() + REST;
        loop {
            let held = self.held(admin)?;
            // Connections to the origin stay open.
            if held.spooled == 0.0 && held.slow == 0.0 && held.descriptors < idle.descriptors + 64 {
                return Ok(held);
            }
            ensure!(Instant::now() < deadline, "something is left: {held}");
            sleep(Duration::from_millis(200));
        }
    }
}

/// A client that reads at once and must always get its response.
fn fast(web: SocketAddr, seed: u64, stop: &AtomicBool, counts: &Counts) -> Result<()> {
    let mut rng = StdRng::seed_from_u64(seed);
    while !stop.load(Ordering::Relaxed) {
        let mut stream = BufReader::new(TcpStream::connect(web)?);
        stream.get_ref().set_read_timeout(Some(PATIENCE))?;
        for _ in 0..50 {
            let bytes = [100, 2_000, 64 << 10, 1 << 20][rng.gen_range(0..4)];
            if rng.gen_bool(0.3) {
                let head = format!("PUT /echo HTTP/1.1\r\nHost: a\r\nContent-Length: {bytes}\r\n\r\n");
                stream.get_mut().write_all(head.as_bytes())?;
                stream.get_mut().write_all(&vec![b'x'; bytes])?;
            } else {
                write!(stream.get_mut(), "GET /bytes/{bytes} HTTP/1.1\r\nHost: a\r\n\r\n")?;
            }
            let (status, length) = header(&mut stream)?;
            ensure!(status == 200 && length == bytes, "{status} with {length} of {bytes} bytes");
            let read = std::io::copy(&mut Read::by_ref(&mut stream).take(length as u64), &mut std::io::sink())?;
            ensure!(read == length as u64, "{read} of {length} bytes");
            counts.asked.fetch_add(1, Ordering::Relaxed);
            sleep(Duration::from_millis(5));
        }
    }
    Ok(())
}

/// A client that sends or reads slowly.
struct Slow {
    stream: TcpStream,
    /// The number of bytes left to send or read, and the number at which it gives up.
    left: usize,
    gives_up_at: usize,
    reads: bool,
}

/// Runs `count` slow clients at a time. Each is followed by another one when it completes or gives up.
fn crowd(
    web: SocketAddr,
    count: usize,
    seed: u64,
    begin: fn(SocketAddr, &mut StdRng) -> Result<Slow>,
    stop: &AtomicBool,
    counts: &Counts,
) -> Result<()> {
    let mut rng = StdRng::seed_from_u64(seed);
    let mut clients = VecDeque::new();
    while !stop.load(Ordering::Relaxed) {
        while clients.len() < count {
            clients.push_back(begin(web, &mut rng)?);
        }
        let round = Instant::now();
        for _ in 0..clients.len() {
            let Some(mut client) = clients.pop_front() else { break };
            match client.go_on(&mut rng)? {
                Some(counter) => {
                    let counter = match (counter, client.reads) {
                        (false, _) => &counts.aborted,
                        (true, true) => &counts.read,
                        (true, false) => &counts.sent,
                    };
                    counter.fetch_add(1, Ordering::Relaxed);
                }
                None => clients.push_back(client),
            }
        }
        sleep(Duration::from_millis(100).saturating_sub(round.elapsed()));
    }
    Ok(())
}

fn begin_reader(web: SocketAddr, rng: &mut StdRng) -> Result<Slow> {
    let socket = Socket::new(Domain::for_address(web), Type::STREAM, None)?;
    socket.set_recv_buffer_size(16 << 10)?;
    socket.connect(&web.into())?;
    let mut stream = TcpStream::from(socket);
    let bytes = rng.gen_range(200_000..2_000_000_usize);
    write!(stream, "GET /bytes/{bytes} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")?;
    Slow::new(stream, bytes, true, rng)
}

fn begin_uploader(web: SocketAddr, rng: &mut StdRng) -> Result<Slow> {
    let mut stream = TcpStream::connect(web)?;
    let bytes = rng.gen_range(20_000..500_000_usize);
    write!(stream, "PUT /bytes/10 HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Length: {bytes}\r\n\r\n")?;
    Slow::new(stream, bytes, false, rng)
}

impl Slow {
    fn new(stream: TcpStream, bytes: usize, reads: bool, rng: &mut StdRng) -> Result<Slow> {
        stream.set_nonblocking(true)?;
        let gives_up_at = if rng.gen_bool(0.3) { rng.gen_range(0..bytes) } else { 0 };
        Ok(Slow { stream, left: bytes, gives_up_at, reads })
    }

    /// Performs a step, every tenth of a second. Returns whether it has ended, and if so, whether it completed.
    fn go_on(&mut self, rng: &mut StdRng) -> Result<Option<bool>> {
        let mut space = [b'x'; 20_000];
        let some = rng.gen_range(500..20_000).min(self.left.max(1));
        let moved = if self.reads || self.left == 0 {
            self.stream.read(&mut space[..some])
        } else {
            self.stream.write(&space[..some])
        };
        match moved {
            Ok(0) if self.reads => bail!("an answer was cut {} bytes before its end", self.left),
            // An uploader with no bytes left has read its response. A reader's bytes include the response header.
            Ok(moved) if self.left == 0 && !self.reads => return Ok((moved > 0).then_some(true).or(Some(false))),
            Ok(moved) => self.left = self.left.saturating_sub(moved),
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(error) => return Err(error).context("a slow client was cut off"),
        }
        if self.left > 0 && self.left < self.gives_up_at {
            return Ok(Some(false));
        }
        Ok((self.left == 0 && self.reads).then_some(true))
    }
}

fn free_address() -> Result<SocketAddr> {
    Ok(TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?)
}

fn header(stream: &mut BufReader<TcpStream>) -> Result<(u16, usize)> {
    let (mut line, mut status, mut length) = (String::new(), None, None);
    loop {
        line.clear();
        ensure!(stream.read_line(&mut line)? > 0, "the connection ended before an answer");
        let line = line.trim_end().to_ascii_lowercase();
        if line.is_empty() {
            return Ok((status.context("no status")?, length.context("no length")?));
        }
        status = status.or(line.strip_prefix("http/1.1 ").and_then(|rest| rest.get(..3)?.parse().ok()));
        length = length.or(line.strip_prefix("content-length:").and_then(|rest| rest.trim().parse().ok()));
    }
}

fn text(address: SocketAddr, path: &str) -> Result<String> {
    let mut stream = TcpStream::connect(address)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    write!(stream, "GET {path} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    Ok(text)
}
