//! A performance gate that is insensitive to noise: the number of instructions that Forebay's worker needs per
//! exchange.
//!
//! `cargo bench --profile dev --bench instructions` (`make gate`) starts `target/fast/forebay` (or `FOREBAY_BIN`)
//! under callgrind, twice for each cell, with fewer and with more requests. The difference of the counts, divided by
//! the difference of the requests, excludes the cost of the start. The gate fails if a cell exceeds its bound. Only
//! instructions in user mode count, so other load on the machine has no effect; system calls are not included.
//!
//! The cell `rules` is `small` with ten routes before it whose conditions are all evaluated. `skipped` is `small` on a
//! route with ten filters whose conditions are all evaluated. Each is compared with `small` in the same run.
//!
//! `-- small upload` measures only these cells; `-- --keep DIR` keeps the output of callgrind for `callgrind_annotate`.

#[path = "rules.rs"]
mod rules;

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread::{self, sleep};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use bytes::Bytes;
use clap::Parser;
use rules::RULES;

/// The numbers of requests in the two runs.
const FEWER: usize = 1_000;
const MORE: usize = 3_000;
/// Simultaneous clients; callgrind is so slow that all of them always wait.
const CLIENTS: usize = 16;
/// The same where each request has a connection of its own. More new connections would wait for turns, and the count
/// would include the rounds of the event loop that pass meanwhile, which depend on the time.
const CONNECTING: usize = 1;
/// The number of the first thread in callgrind.
const FIRST_THREAD: &str = "01";
/// Limit of a single wait: callgrind makes a program about fifty times slower.
const PATIENCE: Duration = Duration::from_secs(120);
/// On processors with fast `rep movs`, glibc copies with it, and callgrind counts it once per byte. Without it, the
/// counts are equal on all machines.
const TUNABLES: &str = "glibc.cpu.x86_rep_movsb_threshold=1073741824:glibc.cpu.x86_rep_stosb_threshold=1073741824";

/// A cell, and its bound in thousands of instructions.
struct Cell {
    name: &'static str,
    work: Work,
    bound: f64,
}

#[derive(Clone, Copy, PartialEq)]
enum Work {
    /// Requests on keep-alive connections.
    Kept,
    /// Each request on a new connection.
    Connecting,
    /// Each request on an HTTP/2 stream: four at a time on each of four connections.
    Http2,
}

/// Bounds on the thousands of instructions that ten rules add to a request, for rules on routes and on filters.
/// Measured: 3.0 each, 1.046 times `small`. System calls, about 0.4 of the CPU time of a small request, are not
/// included.
const RULES_MOST: [(&str, f64); 2] = [("rules", 3.2), ("skipped", 3.2)];

const CELLS: &[Cell] = &[
    Cell { name: "small", work: Work::Kept, bound: 67.5 },
    Cell { name: "rules", work: Work::Kept, bound: 70.5 },
    Cell { name: "skipped", work: Work::Kept, bound: 70.5 },
    Cell { name: "connect", work: Work::Connecting, bound: 85.0 },
    Cell { name: "1m", work: Work::Kept, bound: 150.0 },
    Cell { name: "h2c", work: Work::Http2, bound: 87.0 },
    Cell { name: "upload", work: Work::Kept, bound: 91.0 },
];

#[derive(Parser)]
struct Options {
    /// The cells to measure; all of them if none is named.
    cells: Vec<String>,
    /// Where to leave what callgrind writes.
    #[arg(long)]
    keep: Option<PathBuf>,
    /// Cargo says so.
    #[arg(long, hide = true)]
    bench: bool,
}

fn main() -> Result<()> {
    let options = Options::parse();
    let dir = tempfile::tempdir()?;
    let out = options.keep.clone().unwrap_or_else(|| dir.path().to_owned());
    fs::create_dir_all(&out)?;
    let origin = origin()?;
    let (mut exceeded, mut small) = (Vec::new(), None);
    println!("{:8} {:>12} {:>12} {:>10}", "cell", "worker", "all threads", "bound");
    for cell in CELLS {
        if !options.cells.is_empty() && !options.cells.iter().any(|named| named == cell.name) {
            continue;
        }
        let [fewer, more] = [FEWER, MORE].map(|count| run(cell, count, origin, dir.path(), &out));
        let (fewer, spent) = (fewer?, more?);
        let each = |instructions: u64| instructions as f64 / (MORE - FEWER) as f64 / 1_000.0;
        let worker = each(busiest(&spent).saturating_sub(busiest(&fewer)));
        let all = each(spent.values().sum::<u64>().saturating_sub(fewer.values().sum()));
        println!("{:8} {worker:>11.1}k {all:>11.1}k {:>9.1}k", cell.name, cell.bound);
        if cell.name == "small" {
            small = Some(worker);
        }
        let most = RULES_MOST.iter().find(|(name, _)| *name == cell.name);
        if let (Some(small), Some((_, most))) = (small, most) {
            let more = worker - small;
            println!("{:8} {more:>11.1}k more than `small` {most:>9.1}k", "");
            if more > *most {
                exceeded.push(format!("{}: {more:.1}k more than `small`, bound {most}k", cell.name));
            }
        }
        if worker > cell.bound {
            exceeded.push(format!("{}: {worker:.1}k, bound {:.1}k", cell.name, cell.bound));
        }
    }
    ensure!(exceeded.is_empty(), "too many instructions: {}", exceeded.join("; "));
    Ok(())
}

/// The instructions of the worker: of the thread with the most instructions except the first, which starts the others.
/// Thread numbers may differ between runs.
fn busiest(spent: &BTreeMap<String, u64>) -> u64 {
    spent.iter().filter(|(thread, _)| *thread != FIRST_THREAD).map(|(_, spent)| *spent).max().unwrap_or_default()
}

/// The instructions of each thread, by its number, of a Forebay that has served `count` requests.
fn run(cell: &Cell, count: usize, origin: SocketAddr, dir: &Path, out: &Path) -> Result<BTreeMap<String, u64>> {
    let [web, admin] = [free_address()?, free_address()?];
    let file = dir.join(format!("{}.yaml", cell.name));
    let each = |name: &str, written: fn(usize, &str) -> String| -> String {
        let rules = if cell.name == name { &RULES[..] } else { &[] };
        rules.iter().enumerate().map(|(number, when)| written(number, when)).collect()
    };
    let routes = each("rules", |number, when| {
        format!("  - {{ name: rule-{number}, match: {{ when: '{when}' }}, upstream: app }}\n")
    });
    let filters =
        each("skipped", |_, when| format!("{{ headers: {{ request: {{ set: {{ X-A: b }} }} }}, when: '{when}' }}, "));
    let config = format!(
        "server: {{ threads: 1, spool_dir: {dir} }}
listeners: [ {{ name: web, address: \"{web}\", protocols: [http1, h2c] }} ]
upstreams: {{ app: {{ endpoints: [ {{ address: \"{origin}\" }} ] }} }}
admin: {{ address: \"{admin}\" }}
observability: {{ access_log: {{ path: \"{dir}/access.log\" }}, event_loop: {{ heartbeat: 1s, stall_threshold: 1m }} }}
routes:
{routes}  - {{ name: all, upstream: app, filters: [ {filters} ] }}
",
        dir = dir.display()
    );
    fs::write(&file, config)?;
    let written = out.join(format!("{}.{count}.out", cell.name));
    let binary = std::env::var("FOREBAY_BIN").unwrap_or_else(|_| "target/fast/forebay".to_owned());
    let mut command = Command::new("valgrind");
    command.args(["-q", "--tool=callgrind", "--separate-threads=yes"]);
    command.arg(format!("--callgrind-out-file={}", written.display())).arg(binary);
    command.env("GLIBC_TUNABLES", TUNABLES);
    command.arg("run").arg("-c").arg(&file).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let mut forebay = Forebay(command.spawn().context("valgrind")?);
    forebay.wait_until_it_listens(web)?;
    match cell.work {
        Work::Http2 => http2(web, count)?,
        work => http1(web, cell.name, work, count)?,
    }
    forebay.stop()?;
    threads(&written)
}

/// The output of callgrind for each thread; it numbers threads in the order of their start.
fn threads(written: &Path) -> Result<BTreeMap<String, u64>> {
    let (dir, name) = (written.parent().context("a folder")?, written.file_name().context("a name")?);
    let prefix = format!("{}-", name.to_string_lossy());
    let mut found = BTreeMap::new();
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        if let Some(thread) = name.strip_prefix(&prefix) {
            let total = total(&fs::read_to_string(&path)?).with_context(|| path.display().to_string())?;
            found.insert(thread.to_owned(), total);
        }
    }
    ensure!(!found.is_empty(), "callgrind wrote nothing to {}", written.display());
    Ok(found)
}

fn total(text: &str) -> Option<u64> {
    text.lines().rev().find_map(|line| line.strip_prefix("totals: ")?.trim().parse().ok())
}

struct Forebay(Child);

impl Forebay {
    fn wait_until_it_listens(&mut self, address: SocketAddr) -> Result<()> {
        let begin = Instant::now();
        while TcpStream::connect(address).is_err() {
            if let Some(status) = self.0.try_wait()? {
                bail!("valgrind ended with {status} before Forebay listened");
            }
            ensure!(begin.elapsed() < PATIENCE, "Forebay does not listen");
            sleep(Duration::from_millis(50));
        }
        Ok(())
    }

    fn stop(&mut self) -> Result<()> {
        let pid = i32::try_from(self.0.id())?;
        // SAFETY: kill has no memory effects. The child was not waited for, so its id is not reused.
        ensure!(unsafe { libc::kill(pid, libc::SIGTERM) } == 0, "Forebay cannot be stopped");
        let begin = Instant::now();
        while self.0.try_wait()?.is_none() {
            ensure!(begin.elapsed() < PATIENCE, "Forebay does not stop");
            sleep(Duration::from_millis(50));
        }
        Ok(())
    }
}

impl Drop for Forebay {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn free_address() -> Result<SocketAddr> {
    Ok(TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?)
}

/// An origin: 100 bytes with five fields, or 1 MiB at `/1m`. It reads requests to their end.
fn origin() -> Result<SocketAddr> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let address = listener.local_addr()?;
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            thread::spawn(move || answer(stream));
        }
    });
    Ok(address)
}

fn answer(stream: TcpStream) -> Result<()> {
    stream.set_nodelay(true)?;
    let fields = "Content-Type: text/plain\r\nCache-Control: no-store\r\nETag: \"1\"\r\nServer: origin";
    let whole = |body: &str| format!("HTTP/1.1 200 OK\r\n{fields}\r\nContent-Length: {}\r\n\r\n{body}", body.len());
    let (small, large) = (whole(&"x".repeat(100)), whole(&"x".repeat(1 << 20)));
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut stream = stream;
    loop {
        let (mut is_large, mut length, mut first) = (false, 0, true);
        loop {
            let mut line = String::new();
            if reader.read_line(&mut line)? == 0 {
                return Ok(());
            }
            is_large |= first && line.contains("/1m");
            first = false;
            if let Some(said) = line.to_ascii_lowercase().strip_prefix("content-length:") {
                length = said.trim().parse()?;
            }
            if line == "\r\n" {
                break;
            }
        }
        std::io::copy(&mut (&mut reader).take(length), &mut std::io::sink())?;
        stream.write_all(if is_large { large.as_bytes() } else { small.as_bytes() })?;
    }
}

/// Makes `count` requests with all clients together.
fn http1(web: SocketAddr, cell: &str, work: Work, count: usize) -> Result<()> {
    let body = if cell == "upload" { "x".repeat(64 << 10) } else { String::new() };
    let (method, length) = match body.len() {
        0 => ("GET", String::new()),
        length => ("POST", format!("Content-Length: {length}\r\n")),
    };
    let closes = if work == Work::Connecting { "Connection: close\r\n" } else { "" };
    let request = format!(
        "{method} /{cell} HTTP/1.1\r\nHost: {web}\r\nUser-Agent: bench\r\nAccept: */*\r\n{length}{closes}\r\n{body}"
    );
    let clients = if work == Work::Connecting { CONNECTING } else { CLIENTS };
    thread::scope(|scope| {
        let client = |number: usize| {
            let share = count / clients + usize::from(number < count % clients);
            let request = request.as_bytes();
            scope.spawn(move || -> Result<()> {
                let mut kept = None;
                for _ in 0..share {
                    let mut connection = match kept.take() {
                        Some(connection) => connection,
                        None => connect(web)?,
                    };
                    connection.get_mut().write_all(request)?;
                    read_answer(&mut connection)?;
                    kept = Some(connection).filter(|_| work == Work::Kept);
                }
                Ok(())
            })
        };
        let all: Vec<_> = (0..clients).map(client).collect();
        all.into_iter().try_for_each(|client| client.join().expect("a client"))
    })
}

fn connect(web: SocketAddr) -> Result<BufReader<TcpStream>> {
    let stream = TcpStream::connect(web)?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    Ok(BufReader::new(stream))
}

fn read_answer(connection: &mut BufReader<TcpStream>) -> Result<()> {
    let mut length = None;
    for number in 0.. {
        let mut line = String::new();
        ensure!(connection.read_line(&mut line)? > 0, "the connection was closed");
        ensure!(number > 0 || line.contains(" 200 "), "{line}");
        if let Some(said) = line.to_ascii_lowercase().strip_prefix("content-length:") {
            length = Some(said.trim().parse()?);
        }
        if line == "\r\n" {
            break;
        }
    }
    let length: u64 = length.context("no length")?;
    let read = std::io::copy(&mut connection.take(length), &mut std::io::sink())?;
    ensure!(read == length, "half an answer");
    Ok(())
}

/// Uses four connections, with four streams at a time on each.
fn http2(web: SocketAddr, count: usize) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let mut clients = Vec::new();
        for number in 0..CLIENTS / 4 {
            let stream = tokio::net::TcpStream::connect(web).await?;
            stream.set_nodelay(true)?;
            let (send, connection) = h2::client::handshake(stream).await?;
            tokio::spawn(connection);
            for stream in 0..4 {
                let number = 4 * number + stream;
                let share = count / CLIENTS + usize::from(number < count % CLIENTS);
                clients.push(tokio::spawn(ask(send.clone(), web, share)));
            }
        }
        for client in clients {
            client.await??;
        }
        Ok(())
    })
}

async fn ask(send: h2::client::SendRequest<Bytes>, web: SocketAddr, count: usize) -> Result<()> {
    for _ in 0..count {
        let request = http::Request::get(format!("http://{web}/small")).header("user-agent", "bench").body(())?;
        let (answer, _) = send.clone().ready().await?.send_request(request, true)?;
        let answer = answer.await?;
        ensure!(answer.status() == 200, "{}", answer.status());
        let mut body = answer.into_body();
        while let Some(piece) = body.data().await {
            body.flow_control().release_capacity(piece?.len())?;
        }
    }
    Ok(())
}
