//! The three actors of every story (client, gateway, origin), and how a story waits.
//!
//! Client and origin are plain sockets controlled by the story; the gateway between them is the real one, in this
//! process or as a program. Stories never sleep: they wait for a byte, a log line or a metric, and each wait fails
//! at [`DEADLINE`] with a message that says what is missing.

pub mod browser;
pub mod client;
pub mod collector;
pub mod dnsmasq;
pub mod exchange;
pub mod frames;
pub mod gateway;
pub mod grpcio;
pub mod h2_origin;
pub mod lateness;
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

use std::collections::BTreeSet;
use std::fs;
use std::net::{SocketAddr, TcpListener};
use std::path::Path;
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

/// Limit of any wait: long enough on a busy machine, short enough for a hung test run.
pub const DEADLINE: Duration = Duration::from_secs(45);

/// Calls `probe` until it returns a value.
///
/// # Panics
///
/// At [`DEADLINE`], with the name of what was missing.
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

/// Raises the limit on open files, up to the hard limit.
pub fn may_open_files(count: usize) {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).expect("the limit of open files");
    let wanted = count as u64;
    assert!(wanted <= hard, "this story opens {wanted} files, and the hard limit (`ulimit -Hn`) is {hard}");
    setrlimit(Resource::RLIMIT_NOFILE, soft.max(wanted), hard).expect("a higher limit of open files");
}

/// A free loopback port, for programs that cannot inherit a socket. Another process may take it, so callers must
/// retry.
pub fn free_port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a loopback port");
    listener.local_addr().expect("its address").port()
}

/// Whether this process listens on this TCP port.
///
/// A connection would not show it: the port may belong to another process by now, and a socket that connects to a port
/// from the range of its own can be connected to itself.
pub fn listens(pid: u32, port: u16) -> bool {
    const LISTEN: &str = "0A";
    let open = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
    let open: BTreeSet<_> = open.flat_map(|file| fs::read_link(file.path())).collect();
    let port = format!(":{port:04X}");
    ["tcp", "tcp6"].iter().any(|table| {
        let sockets = fs::read_to_string(format!("/proc/{pid}/net/{table}")).unwrap_or_default();
        sockets.lines().skip(1).any(|socket| {
            let fields: Vec<&str> = socket.split_whitespace().collect();
            let [_, local, _, state, _, _, _, _, _, inode, ..] = fields[..] else { return false };
            state == LISTEN && local.ends_with(&port) && open.contains(Path::new(&format!("socket:[{inode}]")))
        })
    })
}

/// Starts a program that listens on chosen ports, and waits until it does; retries if another process took a port.
///
/// # Panics
///
/// If it never listens: with its standard error, which `spawn` must pipe or send to a file.
pub fn listening<const PORTS: usize>(
    program: &str,
    mut spawn: impl FnMut([u16; PORTS]) -> Child,
) -> (Child, [SocketAddr; PORTS]) {
    for _ in 0..5 {
        let ports = [(); PORTS].map(|()| free_port());
        let mut child = spawn(ports);
        let up = eventually(&format!("{program} to listen on {ports:?}"), || {
            match child.try_wait().expect("the state of the child") {
                Some(_) => Some(false),
                None => ports.iter().all(|&port| listens(child.id(), port)).then_some(true),
            }
        });
        if up {
            return (child, ports.map(|port| SocketAddr::from(([127, 0, 0, 1], port))));
        }
    }
    panic!("{program} ended five times over before it listened");
}

/// Kills a child and waits for it, so that no process is left behind.
pub fn end(child: &mut Child) {
    let _ = child.kill();
    let _ = child.wait();
}
