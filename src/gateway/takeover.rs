//! The side of a new process that takes over from a running one (`handover.rs`); the other side is `upgrade.rs`.
//!
//! It is started by the running process and is to outlive it, and the service manager is to hear of its end. So it
//! forks before it does anything else and its first half ends, which makes the service manager its parent (a process
//! whose parent has ended is given to the nearest one above that takes such processes, prctl(2) PR_SET_CHILD_SUBREAPER).
//! The first half stays until the new process is ready: by its exit status the running one learns how it failed.

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, FromRawFd, OwnedFd};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use super::handover::{Channel, FromNew, FromOld, Heard, VARIABLE, VERSION};
use super::inherited::Inherited;
use super::lock;

/// For what the running process says without having to wait for anything.
const PATIENCE: Duration = Duration::from_secs(10);

/// How long the running process may take to say that connections may be accepted; it does so at once.
const GO: Duration = Duration::from_secs(60);

/// The process that this one takes over from. Clones share it.
#[derive(Clone)]
pub struct Predecessor(Arc<Inner>);

struct Inner {
    channel: Channel,
    /// What the first half of this process waits at.
    first_half: Mutex<Option<std::fs::File>>,
    legacy: Mutex<Legacy>,
}

/// What is left to a new process besides sockets.
#[derive(Debug, Default)]
pub struct Legacy {
    /// The version of the process before.
    pub version: String,
    /// What was counted of upgrades.
    pub counted: Vec<(String, u64)>,
    /// The ends by which is known when older processes end.
    pub elders: Vec<OwnedFd>,
}

/// What became of a process that was ready.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Taken {
    /// The running process lets it accept connections.
    Over,
    /// The running process has ended, so that it is alone.
    Alone,
}

impl Predecessor {
    /// The process that started this one to be replaced by it, if one did. To be called once, before there is any other
    /// thread.
    ///
    /// # Errors
    ///
    /// The environment says so, and the standard input is not the socket for it.
    pub fn of_environment() -> Result<Option<Predecessor>, String> {
        match std::env::var(VARIABLE) {
            Err(_) => return Ok(None),
            Ok(version) if version == VERSION => {}
            Ok(version) => return Err(format!("{VARIABLE}={version}: this version of Forebay knows {VERSION}")),
        }
        let said = |error: io::Error| format!("{VARIABLE} is set, and standard input is no socket for it: {error}");
        let channel = io::stdin().as_fd().try_clone_to_owned().and_then(Channel::of).map_err(said)?;
        let nothing = std::fs::File::open("/dev/null").map_err(|error| format!("/dev/null: {error}"))?;
        // Only this one end is to tell when the process ends.
        replace_stdin(&nothing).map_err(said)?;
        let first_half = fork(&channel).map_err(|error| format!("this process cannot be made its own: {error}"))?;
        let here = FromNew::Here { pid: std::process::id(), version: env!("CARGO_PKG_VERSION").to_owned() };
        channel.say(&here, &[], PATIENCE).map_err(said)?;
        let inner = Inner { channel, first_half: Mutex::new(Some(first_half)), legacy: Mutex::default() };
        Ok(Some(Predecessor(Arc::new(inner))))
    }

    /// Receives the sockets.
    ///
    /// # Errors
    ///
    /// They do not come, or one is not what it is called.
    pub fn pass_to(&self, inherited: &Inherited) -> Result<(), String> {
        let until = Instant::now() + PATIENCE;
        loop {
            match self.0.channel.hear(until) {
                Ok(Heard::Message(FromOld::Sockets { sockets }, with)) if sockets.len() == with.len() => {
                    for (passed, fd) in sockets.into_iter().zip(with) {
                        inherited.add(passed.label, passed.opener, fd)?;
                    }
                }
                Ok(Heard::Message(FromOld::All { version, counted }, elders)) => {
                    *lock(&self.0.legacy) = Legacy { version, counted, elders };
                    return Ok(());
                }
                Ok(Heard::Message(other, _)) => return Err(format!("the process before said {other:?}")),
                Ok(Heard::Closed) => return Err("the process before has ended".to_owned()),
                Ok(Heard::Nothing) => return Err("the process before passes no sockets".to_owned()),
                Err(error) => return Err(format!("the sockets could not be received: {error}")),
            }
        }
    }

    /// What else is left to this process; once.
    pub fn legacy(&self) -> Legacy {
        std::mem::take(&mut *lock(&self.0.legacy))
    }

    /// Says why this process will not run.
    pub fn refuse(&self, configuration: bool, report: &str) {
        // If the process before has ended, the log has it.
        let _ = self.0.channel.say(&FromNew::refuses(configuration, report), &[], PATIENCE);
    }

    /// Says that this process is ready, and waits until it may accept connections. Blocks.
    ///
    /// # Errors
    ///
    /// The running process does not let it: it goes on itself.
    pub fn take_over(&self) -> Result<Taken, String> {
        if let Some(mut first_half) = lock(&self.0.first_half).take() {
            // An error means that it has been ended.
            let _ = first_half.write_all(&[1]);
        }
        // An error means that the process before has ended, which the next call finds.
        let _ = self.0.channel.say(&FromNew::Ready, &[], PATIENCE);
        match self.0.channel.hear(Instant::now() + GO) {
            Ok(Heard::Message(FromOld::Go, _)) => Ok(Taken::Over),
            Ok(Heard::Closed) => Ok(Taken::Alone),
            Ok(Heard::Message(other, _)) => Err(format!("the process before said {other:?}")),
            Ok(Heard::Nothing) => Err("the process before does not answer".to_owned()),
            Err(error) => Err(format!("the process before cannot be heard: {error}")),
        }
    }

    /// Says that connections are accepted, and waits until the service manager knows this process. Blocks.
    pub fn begun(&self) {
        // Whatever goes wrong here, this process serves.
        let _ = self.0.channel.say(&FromNew::Begun, &[], PATIENCE);
        let _ = self.0.channel.hear::<FromOld>(Instant::now() + PATIENCE);
    }

    /// The end by which is known when the process before ends.
    ///
    /// # Errors
    ///
    /// The system has no further descriptor.
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

/// Goes on as a process whose parent ends as soon as a byte is written to what is returned. If this process ends
/// before, its parent ends with the same status.
fn fork(channel: &Channel) -> io::Result<std::fs::File> {
    use std::os::fd::AsRawFd;
    let mut ends = [0; 2];
    // SAFETY: the pointer is to room for two numbers.
    if unsafe { libc::pipe2(ends.as_mut_ptr(), libc::O_CLOEXEC) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: both were opened just now.
    let (reads, writes) = unsafe { (OwnedFd::from_raw_fd(ends[0]), OwnedFd::from_raw_fd(ends[1])) };
    // SAFETY: there is no other thread yet, so that nothing can be half done in the copy.
    let child = unsafe { libc::fork() };
    match child {
        ..0 => Err(io::Error::last_os_error()),
        0 => Ok(writes.into()),
        child => {
            drop(writes);
            // Its end would hide that the other half has ended.
            // SAFETY: it is open, and this half never uses it again, for it does not return.
            unsafe { libc::close(channel.fd().as_raw_fd()) };
            let mut byte = [0];
            let ready = std::fs::File::from(reads).read(&mut byte).unwrap_or(0) == 1;
            let code = if ready { 0 } else { status(child) };
            // SAFETY: it ends this process, without what is to be done at the end of the other half.
            unsafe { libc::_exit(code) }
        }
    }
}

/// With what a child has ended, as a shell says it: 128 and the number of the signal if it was one.
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
