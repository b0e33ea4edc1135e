//! A server of the comparison: started on its own CPU, queried for its figures, killed on drop.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::net::SocketAddr;
use std::os::unix::process::parent_id;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread::{self, sleep};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};

use crate::procfs;
use crate::secure::{Link, Manner};

/// Maximum time until the first response. A Forebay with 10,000 routes reads its file in that time.
const START_SECONDS: u64 = 20;

/// A running server, a single process. It is killed on drop, including after a panic.
pub struct Server {
    child: Child,
    address: SocketAddr,
    /// Whether it speaks TLS.
    tls: bool,
    /// The file with its stdout and stderr.
    output: PathBuf,
    /// Whether child processes do its work.
    has_workers: bool,
}

impl Server {
    /// Starts `command`, with its output in a file in `dir`, and waits until it responds to a GET at `address`, over
    /// TLS if `tls`.
    pub fn start(mut command: Command, address: SocketAddr, tls: bool, dir: &Path) -> Result<Server> {
        let output = dir.join("output.log");
        let file = File::options().create(true).append(true).open(&output)?;
        command.stdin(Stdio::null()).stdout(file.try_clone()?).stderr(file);
        let child = command.spawn().with_context(|| format!("cannot start {}", written_out(&command)))?;
        let mut server = Server { child, address, tls, output, has_workers: false };
        server.wait_until_it_answers().with_context(|| written_out(&command))?;
        Ok(server)
    }

    /// The address of its listener.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Marks it as a server whose child processes do the work.
    pub fn with_workers(&mut self) {
        self.has_workers = true;
    }

    /// How clients connect to it.
    pub fn manner(&self) -> Manner {
        Manner::of(self.tls)
    }

    /// CPU seconds of all its threads so far.
    pub fn cpu_seconds(&self) -> Result<f64> {
        self.figure("stat", procfs::cpu_seconds)
    }

    /// Its resident bytes.
    pub fn resident_bytes(&self) -> Result<u64> {
        self.figure("smaps_rollup", procfs::resident_bytes)
    }

    /// Its peak of resident bytes.
    pub fn peak_bytes(&self) -> Result<u64> {
        self.figure("status", procfs::peak_bytes)
    }

    /// Stops it with SIGSTOP, until it is killed.
    pub fn freeze(&self) -> io::Result<()> {
        self.signal(libc::SIGSTOP)
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: i32) -> io::Result<()> {
        // SAFETY: the call has no pointers. The child was not waited for, so its id is not reused.
        match unsafe { libc::kill(self.child.id() as libc::pid_t, signal) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }

    fn figure<T>(&self, file: &str, parse: fn(&str) -> Option<T>) -> Result<T> {
        let path = format!("/proc/{}/{file}", self.child.id());
        let text = fs::read_to_string(&path).with_context(|| format!("the server has ended? {path}"))?;
        parse(&text).ok_or_else(|| anyhow!("{path} is not as proc(5) says:\n{text}"))
    }

    fn wait_until_it_answers(&mut self) -> Result<()> {
        let deadline = Instant::now() + Duration::from_secs(START_SECONDS);
        loop {
            let error = match open_and_get(&self.manner(), self.address, "/small") {
                Ok(_) => return Ok(()),
                Err(error) => error,
            };
            if let Some(status) = self.child.try_wait()? {
                bail!("ended at once with {status}; it said:\n{}", self.last_words());
            }
            if Instant::now() > deadline {
                bail!("no answer within {START_SECONDS} s ({error:#}); it said:\n{}", self.last_words());
            }
            sleep(Duration::from_millis(20));
        }
    }

    fn last_words(&self) -> String {
        let output = fs::read(&self.output).unwrap_or_default();
        String::from_utf8_lossy(&output[output.len().saturating_sub(2_000)..]).into_owned()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if self.has_workers {
            // A killed master leaves its workers behind; with SIGTERM it ends them.
            let _ = self.signal(libc::SIGTERM);
            let deadline = Instant::now() + Duration::from_secs(5);
            while matches!(self.child.try_wait(), Ok(None)) && Instant::now() < deadline {
                sleep(Duration::from_millis(20));
            }
        }
        // Neither fails for a child that was not waited for; otherwise there is nothing to kill.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Ends this process soon after its parent has ended, for any reason.
pub fn end_with_parent() -> io::Result<()> {
    let parent = parent_id();
    let watch = move || {
        while parent_id() == parent {
            sleep(Duration::from_secs(1));
        }
        std::process::exit(0)
    };
    thread::Builder::new().name("watch".to_owned()).spawn(watch)?;
    Ok(())
}

/// Makes the kernel kill this process when the thread that started it ends, since a stopped process cannot check.
pub fn die_with_parent() -> io::Result<()> {
    // SAFETY: the call has no pointers and affects this process only.
    match unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Opens a connection, sends one GET, and reads the complete response, which must be a 200 with a `Content-Length`. The
/// connection stays open.
pub fn open_and_get(manner: &Manner, address: SocketAddr, path: &str) -> Result<Link> {
    get(manner.open(address)?, address, path)
}

/// Sends one GET on this connection, and reads the complete response, as [`open_and_get`] does.
pub fn get(link: Link, address: SocketAddr, path: &str) -> Result<Link> {
    Ok(ask_and_hear(link, address, path)?.0)
}

/// The response body of a GET on a new connection.
pub fn body_of(address: SocketAddr, path: &str) -> Result<String> {
    let answer = String::from_utf8(ask_and_hear(Manner::of(false).open(address)?, address, path)?.1)?;
    Ok(answer.split_once("\r\n\r\n").map(|(_, body)| body.to_owned()).unwrap_or_default())
}

fn ask_and_hear(link: Link, address: SocketAddr, path: &str) -> Result<(Link, Vec<u8>)> {
    let (mut stream, mut answer) = ask(link, address, path)?;
    let mut buffer = [0; 4096];
    while answer_is_short(&answer)? {
        let read = stream.read(&mut buffer)?;
        if read == 0 {
            bail!("{address} closed before the end of its answer");
        }
        answer.extend_from_slice(&buffer[..read]);
    }
    Ok((stream, answer))
}

/// Opens a connection, sends one GET, and reads only the first piece of the response.
pub fn open_and_ask(manner: &Manner, address: SocketAddr, path: &str) -> Result<(Link, Vec<u8>)> {
    ask(manner.open(address)?, address, path)
}

fn ask(mut stream: Link, address: SocketAddr, path: &str) -> Result<(Link, Vec<u8>)> {
    stream.write_all(format!("GET {path} HTTP/1.1\r\nHost: {address}\r\n\r\n").as_bytes())?;
    let mut first = vec![0; 4096];
    let read = stream.read(&mut first)?;
    first.truncate(read);
    if !first.starts_with(b"HTTP/1.1 200") {
        bail!("{address} answered {:?}", String::from_utf8_lossy(&first));
    }
    Ok((stream, first))
}

/// Whether bytes of this response are missing.
pub fn answer_is_short(answer: &[u8]) -> Result<bool> {
    let mut headers = [httparse::EMPTY_HEADER; 32];
    let mut response = httparse::Response::new(&mut headers);
    let httparse::Status::Complete(header_bytes) = response.parse(answer)? else { return Ok(true) };
    let length = response.headers.iter().find(|header| header.name.eq_ignore_ascii_case("content-length"));
    let length = length.context("an answer without Content-Length")?;
    Ok(answer.len() < header_bytes + std::str::from_utf8(length.value)?.parse::<usize>()?)
}

/// Runs `command` to its end and returns its stdout; kills it after `limit`. The output must fit into a pipe (64 KiB).
pub fn output_within(mut command: Command, limit: Duration) -> Result<String> {
    let command_line = written_out(&command);
    let spawned = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn();
    let mut child = spawned.with_context(|| format!("cannot start {command_line}"))?;
    let deadline = Instant::now() + limit;
    while child.try_wait()?.is_none() {
        if Instant::now() > deadline {
            child.kill()?;
            child.wait()?;
            bail!("{command_line} did not end within {limit:?}");
        }
        sleep(Duration::from_millis(20));
    }
    Ok(io::read_to_string(child.stdout.take().context("stdout is a pipe")?)?)
}

/// The command as one would type it; `Debug` would include the whole `PATH`.
fn written_out(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words.map(|word| word.to_string_lossy()).collect::<Vec<_>>().join(" ")
}
