//! An origin that becomes slow or fails now and then on command. Other failures need no command: a process can be
//! killed, restarted and stopped.
//!
//! It runs as a separate process on the origin's CPU: `main` starts it, `failover` sends the commands.

use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

/// The response time without a command. The time is slept, since the work of origins is not measured.
pub const PAUSE: Duration = Duration::from_millis(5);

/// The factor of the response time when it is slow.
pub const TIMES_SLOWER: u32 = 100;

/// A failing origin responds with 500 to each request whose number is a multiple of this: 20 %.
const FAILS_EVERY: usize = 5;

/// The path of health checks. They always pass while it runs: only requests show the failure.
pub const CHECKED: &str = "/healthz";

/// The paths of commands.
pub const BE_SLOW: &str = "/be/slow";
pub const BE_FAILING: &str = "/be/failing";

const WELL: u8 = 0;
const SLOW: u8 = 1;
const FAILING: u8 = 2;

/// Each connection has a thread, which sleeps most of the time.
const STACK_BYTES: usize = 128 << 10;

/// A connection ends if its header is not complete within this number of bytes.
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
        // A broken connection is the proxy's responsibility.
        thread::Builder::new().stack_size(STACK_BYTES).spawn(move || origin.converse(stream))?;
    }
}

impl Origin {
    /// Responds to the requests of one connection, which have no bodies.
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

    /// Applies a command at once. Commands do not count as requests.
    fn turn(&self, mood: u8) -> &'static str {
        self.mood.store(mood, Ordering::Relaxed);
        "200 OK"
    }

    /// The status for a path, after the response time.
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
