//! Notifies the service manager (sd_notify(3)): ready, reloading, stopping, and that the workers are alive.
//!
//! The manager names a datagram socket in `$NOTIFY_SOCKET`; without it, nothing is sent. With `Type=notify-reload`
//! it sends SIGHUP for a reload and waits for its end, and with `WatchdogSec` it kills a process whose workers are
//! blocked.

use std::env;
use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use crate::metrics::Metrics;

/// Checks of the workers per watchdog interval: a short stall does not end the process.
const LOOKS: u32 = 4;

/// How long a message may wait for a manager that does not read. Signals, reloads and upgrades wait with it.
const PATIENCE: Duration = Duration::from_secs(1);

/// The service manager. Clones share its socket.
#[derive(Clone, Default)]
pub struct Supervisor(Option<Arc<Channel>>);

/// The socket of the service manager.
struct Channel {
    socket: UnixDatagram,
    address: SocketAddr,
    /// Another process notifies the manager instead.
    over: AtomicBool,
}

impl Supervisor {
    /// The manager named in the environment, if there is one.
    pub fn of_environment() -> Supervisor {
        let Some(name) = env::var_os("NOTIFY_SOCKET").filter(|name| !name.is_empty()) else { return Supervisor(None) };
        let channel = address(name.as_bytes()).and_then(|address| {
            let socket = UnixDatagram::unbound()?;
            socket.set_write_timeout(Some(PATIENCE))?;
            Ok(Channel { socket, address, over: AtomicBool::new(false) })
        });
        match channel {
            Ok(channel) => Supervisor(Some(Arc::new(channel))),
            Err(error) => {
                tracing::warn!(%error, "cannot notify the service manager");
                Supervisor(None)
            }
        }
    }

    /// Ready to serve, with the configuration of this number.
    pub fn ready(&self, generation: u64) {
        self.say(&format!(
            "READY=1\nMAINPID={}\nSTATUS=generation {generation} of the configuration runs",
            std::process::id()
        ));
    }

    /// A reload begins; [`Supervisor::ready`] reports its end.
    pub fn reloading(&self) {
        self.say(&format!("RELOADING=1\nMONOTONIC_USEC={}\nSTATUS=loading the configuration", monotonic().as_micros()));
    }

    /// Reports that `pid` is the main process from now on. This process sends nothing more.
    pub fn hand_over(&self, pid: u32) {
        self.say(&format!("MAINPID={pid}\nSTATUS=process {pid} takes over"));
        if let Some(channel) = &self.0 {
            channel.over.store(true, Ordering::Relaxed);
        }
    }

    /// The gateway stops.
    pub fn stopping(&self) {
        self.say("STOPPING=1\nSTATUS=stopping");
    }

    /// If the manager has a watchdog, notifies it regularly as long as no worker is blocked.
    ///
    /// # Errors
    ///
    /// The system has no thread left.
    pub fn watch(&self, metrics: Metrics) -> io::Result<()> {
        let Some(patience) = self.0.as_ref().and_then(|_| patience(|name| env::var(name).ok())) else { return Ok(()) };
        let supervisor = self.clone();
        let watch = move || loop {
            if metrics.stalled_workers() == 0 {
                supervisor.say("WATCHDOG=1");
            }
            thread::sleep(patience / LOOKS);
        };
        thread::Builder::new().name("watchdog".to_owned()).spawn(watch).map(drop)
    }

    fn say(&self, what: &str) {
        if let Some(Channel { socket, address, over }) = self.0.as_deref()
            && !over.load(Ordering::Relaxed)
            && let Err(error) = socket.send_to_addr(what.as_bytes(), address)
        {
            tracing::debug!(%error, "could not notify the service manager: {what}");
        }
    }
}

/// A path, or an abstract name if it begins with `@`.
fn address(name: &[u8]) -> io::Result<SocketAddr> {
    match name.strip_prefix(b"@") {
        Some(abstract_name) => SocketAddr::from_abstract_name(abstract_name),
        None => SocketAddr::from_pathname(std::ffi::OsStr::from_bytes(name)),
    }
}

/// The watchdog interval, if the manager watches this process.
fn patience(variable: impl Fn(&str) -> Option<String>) -> Option<Duration> {
    let of_another = variable("WATCHDOG_PID").is_some_and(|pid| pid != std::process::id().to_string());
    let micros = variable("WATCHDOG_USEC")?.parse().ok().filter(|&micros: &u64| micros > 0 && !of_another)?;
    Some(Duration::from_micros(micros))
}

/// The clock by which the manager matches reloads (CLOCK_MONOTONIC).
fn monotonic() -> Duration {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the pointer is to what this call fills, and outlives it. This clock always exists, so it cannot fail.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut now) };
    Duration::new(u64::try_from(now.tv_sec).unwrap_or_default(), u32::try_from(now.tv_nsec).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_watchdog_of_another_process_is_none_of_ours() {
        let own = std::process::id().to_string();
        let said = |micros: &str, pid: Option<&str>| {
            patience(|name| match name {
                "WATCHDOG_USEC" => Some(micros.to_owned()),
                _ => pid.map(str::to_owned),
            })
        };
        assert_eq!(said("3000000", None), Some(Duration::from_secs(3)));
        assert_eq!(said("3000000", Some(&own)), Some(Duration::from_secs(3)));
        assert_eq!(said("3000000", Some("1")), None);
        assert_eq!(said("0", None), None);
        assert_eq!(said("soon", None), None);
        assert_eq!(patience(|_| None), None);
    }

    #[test]
    fn a_manager_has_a_path_or_a_name() {
        assert_eq!(
            address(b"/run/notify").expect("an address").as_pathname(),
            Some(std::path::Path::new("/run/notify"))
        );
        assert_eq!(address(b"@notify").expect("an address").as_abstract_name(), Some(&b"notify"[..]));
    }
}
