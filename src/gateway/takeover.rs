//! The new process's side of a takeover (`handover.rs`); the other side is `upgrade.rs`.
//!
//! The running process starts it, but it must outlive that process, and the service manager must learn of its end.
//! So it forks first and the parent half exits later, which makes the service manager its parent (an orphan is
//! adopted by the nearest subreaper, prctl(2) PR_SET_CHILD_SUBREAPER). The parent half stays until the new process
//! is ready: its exit status tells the running process why a start failed.

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, FromRawFd, OwnedFd};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use super::handover::{Channel, FromNew, FromOld, Heard, VARIABLE, VERSION};
use super::inherited::Inherited;
use super::lock;

/// Timeout for messages that the running process sends without waiting.
const PATIENCE: Duration = Duration::from_secs(10);

/// Timeout for the running process to permit accepting; it does so at once.
const GO: Duration = Duration::from_secs(60);

/// The process that this one takes over from. Clones share it.
#[derive(Clone)]
pub struct Predecessor(Arc<Inner>);

struct Inner {
    channel: Channel,
    /// The pipe that the parent half waits on.
    first_half: Mutex<Option<std::fs::File>>,
    inheritance: Mutex<Inheritance>,
}

/// The inheritance of a new process in addition to sockets.
#[derive(Debug, Default)]
pub struct Inheritance {
    /// The version of the previous process.
    pub version: String,
    /// Counters of upgrades.
    pub counted: Vec<(String, u64)>,
    /// The ends that report the exit of older processes.
    pub older_processes: Vec<OwnedFd>,
}

/// The result for a process that was ready.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Taken {
    /// The running process permits it to accept connections.
    Over,
    /// The running process has ended.
    Alone,
}

impl Predecessor {
    /// The process that started this one for a takeover, if any. Call it once, before any thread is started.
    ///
    /// # Errors
    ///
    /// The environment announces it, but standard input is not its socket.
    pub fn of_environment() -> Result<Option<Predecessor>, String> {
        match std::env::var(VARIABLE) {
            Err(_) => return Ok(None),
            Ok(version) if version == VERSION => {}
            Ok(version) => return Err(format!("{VARIABLE}={version}: this version of Forebay knows {VERSION}")),
        }
        let said = |error: io::Error| format!("{VARIABLE} is set, and standard input is not its socket: {error}");
        let channel = io::stdin().as_fd().try_clone_to_owned().and_then(Channel::of).map_err(said)?;
        let nothing = std::fs::File::open("/dev/null").map_err(|error| format!("/dev/null: {error}"))?;
        // Only this one copy may signal the exit of the process.
        replace_stdin(&nothing).map_err(said)?;
        let first_half = fork(&channel).map_err(|error| format!("this process cannot be detached: {error}"))?;
        let here = FromNew::Here { pid: std::process::id(), version: env!("CARGO_PKG_VERSION").to_owned() };
        channel.say(&here, &[], PATIENCE).map_err(said)?;
        let inner = Inner { channel, first_half: Mutex::new(Some(first_half)), inheritance: Mutex::default() };
        Ok(Some(Predecessor(Arc::new(inner))))
    }

    /// Receives the sockets.
    ///
    /// # Errors
    ///
    /// They do not arrive, or one does not match its label.
    pub fn pass_to(&self, inherited: &Inherited) -> Result<(), String> {
        let until = Instant::now() + PATIENCE;
        loop {
            match self.0.channel.hear(until) {
                Ok(Heard::Message(FromOld::Sockets { sockets }, with)) if sockets.len() == with.len() => {
                    for (passed, fd) in sockets.into_iter().zip(with) {
                        inherited.add(passed.label, passed.opener, fd)?;
                    }
                }
                Ok(Heard::Message(FromOld::All { version, counted }, older_processes)) => {
                    *lock(&self.0.inheritance) = Inheritance { version, counted, older_processes };
                    return Ok(());
                }
                Ok(Heard::Message(other, _)) => return Err(format!("the previous process sent {other:?}")),
                Ok(Heard::Closed) => return Err("the previous process has ended".to_owned()),
                Ok(Heard::Nothing) => return Err("the previous process passes no sockets".to_owned()),
                Err(error) => return Err(format!("the sockets could not be received: {error}")),
            }
        }
    }

    /// Takes the rest of the inheritance; once.
    pub fn inheritance(&self) -> Inheritance {
        std::mem::take(&mut *lock(&self.0.inheritance))
    }

    /// Reports why this process will not run.
    pub fn refuse(&self, configuration: bool, report: &str) {
        // If the previous process has ended, the log has the report.
        let _ = self.0.channel.say(&FromNew::refuses(configuration, report), &[], PATIENCE);
    }

    /// Reports that this process is ready, and waits for permission to accept connections. Blocks.
    ///
    /// # Errors
    ///
    /// The running process refuses and continues itself.
    pub fn take_over(&self) -> Result<Taken, String> {
        if let Some(mut first_half) = lock(&self.0.first_half).take() {
            // An error means that it has been killed.
            let _ = first_half.write_all(&[1]);
        }
        // An error means that the previous process has ended, which the next call detects.
        let _ = self.0.channel.say(&FromNew::Ready, &[], PATIENCE);
        match self.0.channel.hear(Instant::now() + GO) {
            Ok(Heard::Message(FromOld::Go, _)) => Ok(Taken::Over),
            Ok(Heard::Closed) => Ok(Taken::Alone),
            Ok(Heard::Message(other, _)) => Err(format!("the previous process sent {other:?}")),
            Ok(Heard::Nothing) => Err("the previous process does not answer".to_owned()),
            Err(error) => Err(format!("the previous process cannot be heard: {error}")),
        }
    }

    /// Reports that connections are accepted, and waits until the service manager knows this process. Blocks.
    pub fn begun(&self) {
        // If this fails, this process still serves.
        let _ = self.0.channel.say(&FromNew::Begun, &[], PATIENCE);
        let _ = self.0.channel.hear::<FromOld>(Instant::now() + PATIENCE);
    }

    /// The end that reports the exit of the previous process.
    ///
    /// # Errors
    ///
    /// The system has no descriptor left.
    pub fn end(&self) -> io::Result<OwnedFd> {
        self.0.channel.fd().try_clone_to_owned()
    }
}

fn replace_stdin(with: &impl AsFd) -> io::Result<()> {
    use std::os::fd::AsRawFd;
    // SAFETY: both numbers are of open files; that of the standard input is open before and after.
    let done = unsafe { libc::dup2(with.as_fd().as_raw_fd(), libc::STDIN_FILENO) };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Continues in a child process. The parent exits once a byte is written to the returned pipe, or with the child's
/// status if the child ends first.
fn fork(channel: &Channel) -> io::Result<std::fs::File> {
    use std::os::fd::AsRawFd;
    let mut ends = [0; 2];
    // SAFETY: the pointer is to room for two numbers.
    if unsafe { libc::pipe2(ends.as_mut_ptr(), libc::O_CLOEXEC) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: both were opened just now.
    let (reads, writes) = unsafe { (OwnedFd::from_raw_fd(ends[0]), OwnedFd::from_raw_fd(ends[1])) };
    // SAFETY: there is no other thread yet, so no lock or memory can be in an intermediate state in the copy.
    let child = unsafe { libc::fork() };
    match child {
        ..0 => Err(io::Error::last_os_error()),
        0 => Ok(writes.into()),
        child => {
            drop(writes);
            // An open copy would hide the exit of the child.
            // SAFETY: it is open, and this half never uses it again, since it does not return.
            unsafe { libc::close(channel.fd().as_raw_fd()) };
            let mut byte = [0];
            let ready = std::fs::File::from(reads).read(&mut byte).unwrap_or(0) == 1;
            let code = if ready { 0 } else { status(child) };
            // SAFETY: this ends the process without the exit handlers, which belong to the other half.
            unsafe { libc::_exit(code) }
        }
    }
}

/// The exit status of a child as a shell reports it: 128 plus the signal number for a signal.
fn status(child: libc::pid_t) -> libc::c_int {
    let mut status = 0;
    // SAFETY: the pointer is to a number that outlives the call.
    while unsafe { libc::waitpid(child, &raw mut status, 0) } < 0 {
        if io::Error::last_os_error().kind() != io::ErrorKind::Interrupted {
            return 1;
        }
    }
    if libc::WIFSIGNALED(status) { 128 + libc::WTERMSIG(status) } else { libc::WEXITSTATUS(status) }
}
