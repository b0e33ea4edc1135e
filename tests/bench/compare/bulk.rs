//! The origin of slow clients: it sends large responses as fast as the kernel accepts them, reads uploads to their end,
//! and counts the resulting load, which nginx as an origin could not.
//!
//! It runs as a separate process on the origin's CPU, so that its descriptors and CPU time are separate: `main` starts
//! it, `proxies` configures the proxies for it, `beside` reads its counts.

use std::fmt;
use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::thread;

/// Size of the response to `GET /4m`.
pub const LARGE_BYTES: usize = 4 << 20;

/// Large responses are written in pieces of this size: the kernel may not schedule other threads before the end of a
/// write.
const PIECE_BYTES: usize = 128 << 10;

/// Each connection has a thread, so that the kernel schedules them. Waiting threads use no CPU time.
const STACK_BYTES: usize = 128 << 10;

/// A connection ends if its header is not complete within this number of bytes.
const HEADER_BYTES: usize = 16 << 10;

/// Interval in milliseconds between checks whether the rest of a response was sent.
const LOOK_MILLISECONDS: libc::c_int = 100;

/// The load on the origin since its start. Requests for `/small` and `/counts` do not count, nor do connections whose
/// first request is one of these.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Accepted connections.
    pub connections: i64,
    /// Requests with a complete header.
    pub begun: i64,
    /// Requests whose response has not left the origin's kernel completely: those that occupy a backend now.
    pub busy: i64,
}

impl Counts {
    /// The number of backends that were occupied since `before`: a request on a reused connection occupies one, and so
    /// does a new connection without a request.
    pub fn bothered_since(&self, before: &Counts) -> i64 {
        (self.connections - before.connections).max(self.begun - before.begun)
    }
}

impl fmt::Display for Counts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} {}", self.connections, self.begun, self.busy)
    }
}

impl FromStr for Counts {
    type Err = String;

    fn from_str(text: &str) -> Result<Counts, String> {
        let numbers: Option<Vec<i64>> = text.split_whitespace().map(|word| word.parse().ok()).collect();
        match numbers.as_deref() {
            Some(&[connections, begun, busy]) => Ok(Counts { connections, begun, busy }),
            _ => Err(format!("not three numbers: {text:?}")),
        }
    }
}

#[derive(Default)]
struct Origin {
    connections: AtomicI64,
    begun: AtomicI64,
    busy: AtomicI64,
    large_answer: Vec<u8>,
}

/// The number of connections that may arrive at once. With the usual 128, the kernel accepts some of them with SYN
/// cookies and small segments. After a loss, BBR then sends only 2 KB per second, and a proxy cannot read faster than
/// its endpoint sends.
const BACKLOG: libc::c_int = 4096;

/// Serves until the process ends.
pub fn serve(listener: TcpListener) -> io::Result<()> {
    socket2::SockRef::from(&listener).listen(BACKLOG)?;
    let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {LARGE_BYTES}\r\n\r\n");
    let large_answer = [head.into_bytes(), vec![b'x'; LARGE_BYTES]].concat();
    let origin = Arc::new(Origin { large_answer, ..Origin::default() });
    loop {
        let (stream, _) = listener.accept()?;
        origin.connections.fetch_add(1, Ordering::Relaxed);
        let origin = origin.clone();
        // A broken connection is the proxy's responsibility; its counts were already corrected.
        thread::Builder::new().stack_size(STACK_BYTES).spawn(move || origin.converse(stream))?;
    }
}

/// Counts a request as busy until this is dropped.
struct Busy<'a>(&'a Origin);

impl Drop for Busy<'_> {
    fn drop(&mut self) {
        self.0.busy.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A parsed request.
struct Request {
    path: String,
    body_bytes: usize,
    header_bytes: usize,
}

impl Origin {
    fn converse(&self, mut stream: TcpStream) -> io::Result<()> {
        stream.set_nodelay(true)?;
        let (mut received, mut first) = (Vec::new(), true);
        let mut sink = vec![0; 64 << 10];
        while let Some(request) = next_request(&mut stream, &mut received)? {
            received.drain(..request.header_bytes);
            let counted = !matches!(request.path.as_str(), "/small" | "/counts");
            if first && !counted {
                self.connections.fetch_sub(1, Ordering::Relaxed);
            }
            first = false;
            let busy = counted.then(|| self.begin());
            let mut missing = request.body_bytes - request.body_bytes.min(received.len());
            received.drain(..request.body_bytes.min(received.len()));
            while missing > 0 {
                let wanted = missing.min(sink.len());
                match stream.read(&mut sink[..wanted])? {
                    0 => return Ok(()),
                    read => missing -= read,
                }
            }
            match request.path.as_str() {
                "/4m" => self.large_answer.chunks(PIECE_BYTES).try_for_each(|piece| stream.write_all(piece))?,
                "/counts" => stream.write_all(&short_answer(&self.counts().to_string()))?,
                _ => stream.write_all(&short_answer("here"))?,
            }
            if busy.is_some() {
                wait_until_sent(&stream)?;
            }
        }
        Ok(())
    }

    fn begin(&self) -> Busy<'_> {
        self.begun.fetch_add(1, Ordering::Relaxed);
        self.busy.fetch_add(1, Ordering::Relaxed);
        Busy(self)
    }

    fn counts(&self) -> Counts {
        let [connections, begun, busy] =
            [&self.connections, &self.begun, &self.busy].map(|count| count.load(Ordering::Relaxed));
        Counts { connections, begun, busy }
    }
}

fn short_answer(body: &str) -> Vec<u8> {
    format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{body}", body.len()).into_bytes()
}

/// Reads a complete header. `None`: the connection ended before the next one.
fn next_request(stream: &mut TcpStream, received: &mut Vec<u8>) -> io::Result<Option<Request>> {
    let mut buffer = [0; 4096];
    loop {
        if let Some(request) = parsed(received)? {
            return Ok(Some(request));
        }
        let read = stream.read(&mut buffer)?;
        if read == 0 {
            return Ok(None);
        }
        received.extend_from_slice(&buffer[..read]);
        if received.len() > HEADER_BYTES && parsed(received)?.is_none() {
            return Err(io::Error::other("a header without end"));
        }
    }
}

/// Bodies have a `Content-Length`: the clients here send it, and proxies keep it.
fn parsed(received: &[u8]) -> io::Result<Option<Request>> {
    let mut headers = [httparse::EMPTY_HEADER; 32];
    let mut request = httparse::Request::new(&mut headers);
    let httparse::Status::Complete(header_bytes) = request.parse(received).map_err(io::Error::other)? else {
        return Ok(None);
    };
    let path = request.path.unwrap_or_default().to_owned();
    let named = |name: &str| request.headers.iter().find(|header| header.name.eq_ignore_ascii_case(name));
    if named("transfer-encoding").is_some() {
        return Err(io::Error::other("a chunked body"));
    }
    let length = named("content-length").map_or(Ok("0"), |header| std::str::from_utf8(header.value));
    let body_bytes = length.map_err(io::Error::other)?.parse().map_err(io::Error::other)?;
    Ok(Some(Request { path, body_bytes, header_bytes }))
}

/// Waits until all written bytes are acknowledged, or the peer sends something: it does so only after the complete
/// response, or after losing it.
fn wait_until_sent(stream: &TcpStream) -> io::Result<()> {
    let mut events = libc::pollfd { fd: stream.as_raw_fd(), events: libc::POLLIN, revents: 0 };
    loop {
        let mut unsent: libc::c_int = 0;
        // SAFETY: the pointer is to one int, which the kernel fills. TIOCOUTQ is SIOCOUTQ.
        if unsafe { libc::ioctl(stream.as_raw_fd(), libc::TIOCOUTQ, &mut unsent) } != 0 {
            return Err(io::Error::last_os_error());
        }
        if unsent == 0 {
            return Ok(());
        }
        // SAFETY: the pointer is to one pollfd, which the kernel reads and writes.
        if unsafe { libc::poll(&mut events, 1, LOOK_MILLISECONDS) } > 0 {
            return Ok(());
        }
    }
}
