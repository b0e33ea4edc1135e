//! An origin that gets into trouble when it is told to: it becomes slow, or fails now and then. What else may happen to
//! it needs no word of its own: a process can be killed, started again and stopped.
//!
//! It runs as a process of its own, on the origin's CPU: `main` starts it, `failover` tells it what to become.

use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

/// What an answer takes while it is well: time that is slept, for what is measured here is not the work of origins.
pub const PAUSE: Duration = Duration::from_millis(5);

/// A slow one takes so many times as long.
pub const TIMES_SLOWER: u32 = 100;

/// A failing one answers 500 to each request that has such a number: 20 %.
const FAILS_EVERY: usize = 5;

/// Where it is asked whether it is well. It is, as long as it runs: what goes wrong shows in requests alone.
pub const CHECKED: &str = "/healthz";

/// Where it is told what to become.
pub const BE_SLOW: &str = "/be/slow";
pub const BE_FAILING: &str = "/be/failing";

const WELL: u8 = 0;
const SLOW: u8 = 1;
const FAILING: u8 = 2;

/// A connection has a thread, which sleeps most of the time.
const STACK_BYTES: usize = 128 << 10;

/// A header that is not complete within so many bytes ends its connection.
const HEADER_BYTES: usize = 16 << 10;

#[derive(Default)]
struct Origin {
    mood: AtomicU8,
    requests: AtomicUsize,
}

/// Serves until the process ends.
pub fn serve(listener: TcpListener) -> io::Result<()> {
    let origin = Arc::new(Origin::default());
    loop {
        let (stream, _) = listener.accept()?;
        let origin = origin.clone();
        // A connection that breaks is the proxy's affair.
        thread::Builder::new().stack_size(STACK_BYTES).spawn(move || origin.converse(stream))?;
    }
}

impl Origin {
    /// Answers the requests of one connection, none of which has a body.
    fn converse(&self, mut stream: TcpStream) -> io::Result<()> {
        stream.set_nodelay(true)?;
        let (mut header, mut piece) = (Vec::new(), [0; 4096]);
        loop {
            header.clear();
            while !header.ends_with(b"\r\n\r\n") {
                match stream.read(&mut piece)? {
                    0 => return Ok(()),
                    read => header.extend_from_slice(&piece[..read]),
                }
                if header.len() > HEADER_BYTES {
                    return Ok(());
                }
            }
            let line = String::from_utf8_lossy(&header);
            let status = self.answer(line.split(' ').nth(1).unwrap_or_default());
            stream.write_all(format!("HTTP/1.1 {status}\r\nContent-Length: 2\r\n\r\nok").as_bytes())?;
        }
    }

    /// What is told is done at once, and does not count as a request.
    fn turn(&self, mood: u8) -> &'static str {
        self.mood.store(mood, Ordering::Relaxed);
        "200 OK"
    }

    /// The status for a path, after the time that it takes.
    fn answer(&self, path: &str) -> &'static str {
        match path {
            CHECKED => return "200 OK",
            BE_SLOW => return self.turn(SLOW),
            BE_FAILING => return self.turn(FAILING),
            _ => {}
        }
        let number = self.requests.fetch_add(1, Ordering::Relaxed);
        match self.mood.load(Ordering::Relaxed) {
            SLOW => thread::sleep(PAUSE * TIMES_SLOWER),
            FAILING if number.is_multiple_of(FAILS_EVERY) => {
                thread::sleep(PAUSE);
                return "500 Internal Server Error";
            }
            WELL | FAILING | 3.. => thread::sleep(PAUSE),
        }
        "200 OK"
    }
}
