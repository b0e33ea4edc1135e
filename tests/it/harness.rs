//! The three actors of every story, and how a story waits.
//!
//! A client and an origin are sockets that do exactly what they are told; the gateway between them is the real one,
//! in this process or as the program. Nobody sleeps and hopes: a story waits for a byte, a log line or a metric, and
//! each wait ends at [`DEADLINE`] with a sentence that says what did not come.

pub mod browser;
pub mod client;
pub mod collector;
pub mod dnsmasq;
pub mod exchange;
pub mod frames;
pub mod gateway;
pub mod grpcio;
pub mod h2_origin;
pub mod metrics;
pub mod moody;
pub mod nginx;
pub mod origin;
pub mod pebble;
pub mod peers;
pub mod raw_h2;
pub mod secure;
pub mod tls;
pub mod wire;

use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::Child;
use std::time::{Duration, Instant};

pub use client::{Client, H2Client};
pub use exchange::{Ask, Leave, Protocol};
pub use gateway::{Gateway, LogLine, Process, Setup};
pub use h2_origin::H2Origin;
pub use moody::{Mood, Moody};
pub use nginx::Nginx;
pub use origin::{Origin, ok};
pub use wire::End;

/// How long any wait may take: long beside what is waited for, also where others have the CPU; short beside a hung test
/// run.
pub const DEADLINE: Duration = Duration::from_secs(45);

/// Asks `probe` again and again until it has an answer.
///
/// # Panics
/// At [`DEADLINE`], naming what was waited for.
pub fn eventually<T>(what: &str, mut probe: impl FnMut() -> Option<T>) -> T {
    let started = Instant::now();
    loop {
        if let Some(found) = probe() {
            return found;
        }
        assert!(started.elapsed() < DEADLINE, "waited {DEADLINE:?} in vain for {what}");
        std::thread::park_timeout(Duration::from_millis(5));
    }
}

/// Milliseconds, for stories with clocks in them.
pub const fn ms(milliseconds: u64) -> Duration {
    Duration::from_millis(milliseconds)
}

/// Lets this process open so many files, as far as its hard limit goes.
pub fn may_open_files(count: usize) {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).expect("the limit of open files");
    let wanted = count as u64;
    assert!(wanted <= hard, "this story opens {wanted} files, and the hard limit (`ulimit -Hn`) is {hard}");
    setrlimit(Resource::RLIMIT_NOFILE, soft.max(wanted), hard).expect("a higher limit of open files");
}

/// A loopback port that nobody has just now. For programs that cannot be handed a socket; who starts one retries.
pub fn free_port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a loopback port");
    listener.local_addr().expect("its address").port()
}

/// Starts a program that listens on a port chosen for it, and waits until it does; with another port if this one was
/// taken in between.
///
/// # Panics
/// If it never listens: with what it said on standard error, which `spawn` must pipe or send to a file.
pub fn listening(program: &str, mut spawn: impl FnMut(u16) -> Child) -> (Child, SocketAddr) {
    for _ in 0..5 {
        let address = SocketAddr::from(([127, 0, 0, 1], free_port()));
        let mut child = spawn(address.port());
        let up = eventually(&format!("{program} to listen on {address}"), || {
            match child.try_wait().expect("the state of the child") {
                Some(_) => Some(false),
                None => TcpStream::connect(address).is_ok().then_some(true),
            }
        });
        if up {
            return (child, address);
        }
    }
    panic!("{program} ended five times over before it listened");
}

/// Ends a child and waits for it, so that no test leaves a process behind.
pub fn end(child: &mut Child) {
    let _ = child.kill();
    let _ = child.wait();
}
