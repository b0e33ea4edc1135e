//! Upgrade: a new process, of the same or another program, takes over from this one (`forebay upgrade`, SIGUSR2).
//!
//! This process starts it, passes it the listening sockets and continues to serve. Once the new one has loaded its
//! configuration, is ready and accepts connections, this one stops accepting and finishes its active exchanges. Any
//! earlier failure ends the new process and changes nothing here. `handover.rs` has the protocol, `takeover.rs` the
//! other side.
//!
//! A thread runs each upgrade, so that no worker blocks. Reloads wait meanwhile: the new process has the sockets of
//! this configuration.

use std::ffi::{OsStr, OsString};
use std::io;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, Weak};
use std::thread;
use std::time::{Duration, Instant};

use http::StatusCode;
use rustix::process::{Pid, WaitId, WaitIdOptions, waitid};
use serde::{Deserialize, Serialize};
use tokio::sync::{oneshot, watch};

use crate::admin::reply::Reply;
use crate::admin::{Admin, Voucher};
use crate::config::server;
use crate::metrics::upgrade::UpgradeMetrics;

use super::handover::{AT_ONCE, Channel, FromNew, FromOld, Heard, Passed, VARIABLE, VERSION};
use super::inherited::{Inherited, Label};
use super::lock;
use super::older_processes::OlderProcesses;
use super::pid_file::PidFile;
use super::sockets::{OpenSocket, Opener};
use super::supervisor::Supervisor;

/// Timeout for steps of the new process that do not wait.
const PROMPT: Duration = Duration::from_secs(10);

/// How long a process that has closed its end may take to exit.
const END: Duration = Duration::from_secs(2);

/// How often its exit is checked.
const LOOK: Duration = Duration::from_millis(10);

/// The longest upgrade: the greatest `server.upgrade.deadline` plus the final messages.
pub const LONGEST: Duration = Duration::from_secs(11 * 60);

/// The command of this process, and of a new one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Program {
    /// The file.
    pub path: PathBuf,
    /// The command line arguments.
    pub arguments: Vec<OsString>,
}

/// The result of an upgrade.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Outcome {
    /// What was done.
    pub result: Done,
    /// The serving process.
    pub pid: u32,
    /// Its version.
    pub version: String,
    /// Why nothing was done, if so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// The configuration errors, as `forebay check` prints them; empty if they are not the reason.
    pub report: String,
    /// How long it took.
    pub seconds: f64,
}

/// What was done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Done {
    /// The new process serves.
    Done,
    /// The new process rejected its configuration.
    Refused,
    /// It could not be started, or exited before it was ready.
    Failed,
    /// It was not ready before the deadline.
    TimedOut,
    /// The upgrade was not started.
    Denied,
}

impl Done {
    /// The results that count as attempts, as in metrics.
    pub const COUNTED: [Done; 4] = [Done::Done, Done::Refused, Done::Failed, Done::TimedOut];

    /// The name in metrics.
    pub const fn name(self) -> &'static str {
        match self {
            Done::Done => "done",
            Done::Refused => "refused",
            Done::Failed => "failed",
            Done::TimedOut => "timed_out",
            Done::Denied => "denied",
        }
    }
}

/// Serializes reloads and upgrades.
#[derive(Clone, Default)]
pub struct Changing(Arc<Mutex<bool>>);

impl Changing {
    /// Waits for other changes to finish. `None`: another process has taken over, so no change is allowed.
    pub fn begin(&self) -> Option<MutexGuard<'_, bool>> {
        Some(lock(&self.0)).filter(|over| !**over)
    }
}

/// Runs upgrades. Clones share it.
#[derive(Clone)]
pub struct Upgrades(Arc<Inner>);

struct Inner {
    program: Option<Program>,
    open_sockets: Arc<Mutex<Vec<OpenSocket>>>,
    inherited: Inherited,
    times: Arc<Mutex<server::Upgrade>>,
    metrics: UpgradeMetrics,
    supervisor: Supervisor,
    older_processes: OlderProcesses,
    changing: Changing,
    pid_file: Weak<PidFile>,
    state: Mutex<State>,
    handed_over: watch::Sender<bool>,
    /// The end that shows the new process when this one exits.
    successor: Mutex<Option<Channel>>,
}

/// The state of this process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// It serves.
    Alone,
    /// It serves while a new process starts, which leads this process group once it exists.
    UnderWay(Option<i32>),
    /// Another process serves.
    HandedOver,
    /// A stop was requested.
    Stops,
}

/// Why an upgrade failed.
struct Failed {
    result: Done,
    error: String,
    report: String,
}

impl Failed {
    fn because(error: impl Into<String>) -> Failed {
        Failed { result: Done::Failed, error: error.into(), report: String::new() }
    }
}

impl Program {
    /// The program of this process: its path as typed or found in `PATH`, so that a symbolic link is resolved again
    /// each time. `None`: the path is unknown.
    pub fn of_this_process(arguments: &[OsString]) -> Option<Program> {
        let (name, arguments) = arguments.split_first()?;
        let own = std::env::current_exe().ok().map(in_place);
        let typed = Path::new(name);
        let path = if typed.components().count() > 1 {
            std::path::absolute(typed).ok()
        } else {
            looked_up(typed, std::env::var_os("PATH").as_deref())
        };
        // The typed name is arbitrary: the caller of exec(3) chooses it.
        let is_own = |path: &PathBuf| path.canonicalize().ok() == own.as_ref().and_then(|own| own.canonicalize().ok());
        Some(Program { path: path.filter(is_own).or(own)?, arguments: arguments.to_vec() })
    }
}

/// The path that the kernel reports for a running program (proc(5), /proc/pid/exe). The kernel marks a file that was
/// replaced or removed since; the result is the path without the mark.
fn in_place(path: PathBuf) -> PathBuf {
    if path.exists() {
        return path;
    }
    let stripped = path.as_os_str().as_bytes().strip_suffix(b" (deleted)").map(OsStr::from_bytes);
    stripped.map_or(path.clone(), PathBuf::from)
}

/// The first file of this name in the search path.
fn looked_up(name: &Path, path: Option<&OsStr>) -> Option<PathBuf> {
    std::env::split_paths(path?).map(|directory| directory.join(name)).find(|file| file.is_file())
}

/// The parts that upgrades use.
pub struct Needs {
    /// The program to start.
    pub program: Option<Program>,
    /// The sockets to pass on.
    pub open_sockets: Arc<Mutex<Vec<OpenSocket>>>,
    /// Inherited sockets without a listener.
    pub inherited: Inherited,
    /// Time limits.
    pub times: Arc<Mutex<server::Upgrade>>,
    /// The metrics.
    pub metrics: UpgradeMetrics,
    /// The service manager.
    pub supervisor: Supervisor,
    /// Older processes.
    pub older_processes: OlderProcesses,
    /// Excludes reloads.
    pub changing: Changing,
    /// `server.pid_file`, which the stop of the process owns and removes.
    pub pid_file: Weak<PidFile>,
}

impl Upgrades {
    /// The upgrades of this process.
    pub fn new(needs: Needs) -> Upgrades {
        let Needs { program, open_sockets, inherited, times, metrics, supervisor, older_processes, changing, pid_file } =
            needs;
        let (handed_over, _) = watch::channel(false);
        let state = Mutex::new(State::Alone);
        let inner = Inner {
            program,
            open_sockets,
            inherited,
            times,
            metrics,
            supervisor,
            older_processes,
            changing,
            pid_file,
            state,
            handed_over,
            successor: Mutex::default(),
        };
        Upgrades(Arc::new(inner))
    }

    /// Starts an upgrade to this program, or to the current one. The result is also logged.
    ///
    /// # Errors
    ///
    /// Why it was not started.
    pub fn begin(
        &self,
        by: &'static str,
        binary: Option<(PathBuf, Voucher)>,
    ) -> Result<oneshot::Receiver<Outcome>, Box<Outcome>> {
        let (reply, answer) = oneshot::channel();
        let begun = self.enter().and_then(|mut program| {
            if let Some((path, _)) = &binary {
                program.path = path.clone();
            }
            let voucher = binary.map(|(_, voucher)| voucher);
            let this = self.clone();
            let run = move || this.run(by, &program, voucher, reply);
            thread::Builder::new().name("upgrade".to_owned()).spawn(run).map_err(|error| {
                self.leave();
                format!("no thread can be started: {error}")
            })
        });
        begun.map(|_| answer).map_err(|error| {
            tracing::warn!(by, "no upgrade is begun: {error}");
            Box::new(outcome(Done::Denied, Some(error), String::new(), Instant::now()))
        })
    }

    /// Whether another process has taken over, and with it the files of sockets.
    pub fn is_handed_over(&self) -> bool {
        *lock(&self.0.state) == State::HandedOver
    }

    /// Waits until another process has taken over.
    pub async fn handed_over(&self) {
        // The sender lives as long as this.
        let _ = self.0.handed_over.subscribe().wait_for(|over| *over).await;
    }

    /// Reports that this process stops. Kills a new process that is not ready yet, and allows no further upgrade.
    /// `false`: another process has already taken over.
    pub fn stop(&self) -> bool {
        let mut state = lock(&self.0.state);
        match *state {
            State::HandedOver => return false,
            State::UnderWay(Some(group)) => end(group),
            _ => {}
        }
        *state = State::Stops;
        true
    }

    /// Begins an upgrade unless something prevents it.
    fn enter(&self) -> Result<Program, String> {
        let inner = &*self.0;
        let program = inner.program.clone().ok_or("this gateway was not started by the command line of Forebay")?;
        if std::process::id() == 1 {
            return Err("this is the first process of its container, which ends with it: replace the container".into());
        }
        let (most, draining) = (lock(&inner.times).processes.0, inner.older_processes.count());
        if draining as u64 >= most {
            return Err(format!("{draining} older processes still drain, and server.upgrade.processes is {most}"));
        }
        let mut state = lock(&inner.state);
        match *state {
            State::Alone => *state = State::UnderWay(None),
            State::UnderWay(_) => return Err("another upgrade is under way".to_owned()),
            State::HandedOver => return Err("another process has taken over already".to_owned()),
            State::Stops => return Err("this process stops".to_owned()),
        }
        Ok(program)
    }

    fn leave(&self) {
        let mut state = lock(&self.0.state);
        if matches!(*state, State::UnderWay(_)) {
            *state = State::Alone;
        }
    }

    fn run(&self, by: &'static str, program: &Program, voucher: Option<Voucher>, reply: oneshot::Sender<Outcome>) {
        let inner = &*self.0;
        let began = Instant::now();
        let Some(mut changing) = inner.changing.begin() else { return self.leave() };
        let file = program.path.display();
        let allowed = voucher.map_or(Ok(()), vouched).map_err(|error| Failed {
            result: Done::Denied,
            error,
            report: String::new(),
        });
        tracing::info!(by, program = %file, "a new process is started to take over");
        match allowed.and_then(|()| self.attempt(program)) {
            Ok((pid, version)) => {
                *changing = true;
                let seconds = began.elapsed().as_secs_f64();
                tracing::info!(by, program = %file, pid, version, seconds, "another process has taken over");
                let (result, error, report) = (Done::Done, None, String::new());
                self.stop_accepting();
                // The caller may be gone.
                let _ = reply.send(Outcome { result, pid, version, error, report, seconds });
                inner.handed_over.send_replace(true);
            }
            Err(Failed { result, error, report }) => {
                // The new process may already have replaced it.
                if let Some(Err(error)) = inner.pid_file.upgrade().map(|file| file.keep()) {
                    tracing::error!(%error, "server.pid_file: the number of this process is not there");
                }
                drop(changing);
                self.leave();
                if result != Done::Denied {
                    inner.metrics.count(result.name());
                }
                tracing::error!(
                    by, program = %file, result = result.name(),
                    "the upgrade failed, and this process continues: {error}"
                );
                // The caller may be gone.
                let _ = reply.send(outcome(result, Some(error), report, began));
            }
        }
    }

    /// Stops accepting before the upgrade is reported, so that new connections reach only the new process.
    fn stop_accepting(&self) {
        let open_sockets = lock(&self.0.open_sockets).clone();
        open_sockets.iter().for_each(|open_socket| open_socket.acceptor.hand_over());
        let began = Instant::now();
        while began.elapsed() < END && !open_sockets.iter().all(|open_socket| open_socket.acceptor.has_left()) {
            thread::sleep(LOOK);
        }
    }

    /// Starts a new process and lets it take over. On failure, it has been ended.
    fn attempt(&self, program: &Program) -> Result<(u32, String), Failed> {
        let deadline = lock(&self.0.times).deadline.0;
        let until = Instant::now() + deadline;
        let said = |doing: &str, error: io::Error| Failed::because(format!("{doing}: {error}"));
        let (channel, other_end) = Channel::pair().map_err(|error| said("no descriptor for a new process", error))?;
        let started = start(program, other_end.into_fd());
        let mut child =
            started.map_err(|error| said(&format!("`{}` cannot be started", program.path.display()), error))?;
        let group = i32::try_from(child.id()).unwrap_or(i32::MAX);
        let done = self.register(group).and_then(|()| self.converse(&channel, until, deadline));
        let result = done.map_err(|silence| {
            let by_itself = matches!(silence, Silence::Closed(_)) && ends(&child);
            end(group);
            self.unregister();
            silence.told(child.wait().ok().filter(|_| by_itself))
        });
        // Its parent half has exited or was just killed.
        let _ = child.wait();
        let (pid, version) = result?;
        *lock(&self.0.successor) = Some(channel);
        Ok((pid, version))
    }

    fn register(&self, group: i32) -> Result<(), Silence> {
        let mut state = lock(&self.0.state);
        match *state {
            State::UnderWay(_) => *state = State::UnderWay(Some(group)),
            _ => return Err(Silence::Stops),
        }
        Ok(())
    }

    /// After the leader was waited for, its number may be reused.
    fn unregister(&self) {
        let mut state = lock(&self.0.state);
        if matches!(*state, State::UnderWay(_)) {
            *state = State::UnderWay(None);
        }
    }

    fn converse(&self, channel: &Channel, until: Instant, deadline: Duration) -> Result<(u32, String), Silence> {
        let inner = &*self.0;
        let late = |doing| Silence::Late { deadline, doing };
        let FromNew::Here { pid, version } = heard(channel, until, "started", late("say that it is a Forebay"))? else {
            return Err(Silence::Strange);
        };
        let unheard = |before| {
            move |error: io::Error| match error.kind() {
                io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => Silence::Closed(before),
                _ => Silence::Failed(error),
            }
        };
        self.pass(channel, until).map_err(unheard("ready"))?;
        match heard(channel, until, "ready", late("be ready"))? {
            FromNew::Ready => {}
            FromNew::Refuses { configuration, report } => return Err(Silence::Refused { configuration, report }),
            _ => return Err(Silence::Strange),
        }
        channel.say(&FromOld::Go, &[], PROMPT).map_err(unheard("accepting connections"))?;
        let slow = late("accept connections");
        let FromNew::Begun = heard(channel, Instant::now() + PROMPT, "accepting connections", slow)? else {
            return Err(Silence::Strange);
        };
        let mut state = lock(&inner.state);
        if !matches!(*state, State::UnderWay(_)) {
            return Err(Silence::Stops);
        }
        *state = State::HandedOver;
        drop(state);
        inner.supervisor.hand_over(pid);
        // The new process serves in any case.
        let _ = channel.say(&FromOld::Main, &[], PROMPT);
        Ok((pid, version))
    }

    /// Passes all sockets.
    fn pass(&self, channel: &Channel, until: Instant) -> io::Result<()> {
        let inner = &*self.0;
        let mut passed = Vec::new();
        for OpenSocket { place, acceptor } in
            lock(&inner.open_sockets).iter().filter(|open_socket| !open_socket.place.is_managers)
        {
            let label = Label { listener: place.listener.clone(), written: place.written.clone() };
            if let Some(fd) = acceptor.duplicate()? {
                passed.push((Passed { label, opener: Opener::Predecessor }, fd));
            }
        }
        let of_manager = inner.inherited.of_manager()?.into_iter();
        passed.extend(of_manager.map(|(label, fd)| (Passed { label, opener: Opener::ServiceManager }, fd)));
        let mut passed = passed.into_iter().peekable();
        while passed.peek().is_some() {
            let (sockets, fds): (Vec<Passed>, Vec<OwnedFd>) = passed.by_ref().take(AT_ONCE).unzip();
            channel.say(&FromOld::Sockets { sockets }, &fds, until.saturating_duration_since(Instant::now()))?;
        }
        // The new process counts the current upgrade itself.
        let counted = Done::COUNTED.map(|done| (done.name().to_owned(), inner.metrics.counted(done.name())));
        let all = FromOld::All { version: env!("CARGO_PKG_VERSION").to_owned(), counted: counted.into() };
        channel.say(&all, &inner.older_processes.duplicates()?, until.saturating_duration_since(Instant::now()))
    }
}

/// Why a new process does not take over.
enum Silence {
    /// It closed its end before this step.
    Closed(&'static str),
    /// It did not complete this step in time.
    Late { deadline: Duration, doing: &'static str },
    /// It reports that it will not run.
    Refused { configuration: bool, report: String },
    /// It sent an unexpected message.
    Strange,
    /// Communication failed.
    Failed(io::Error),
    /// This process stops.
    Stops,
}

impl Silence {
    fn told(self, status: Option<ExitStatus>) -> Failed {
        match self {
            Silence::Closed(before) => Failed::because(match status {
                Some(status) => format!("the new process ended with {status} before it was {before}"),
                None => format!("the new process closed its standard input before it was {before}"),
            }),
            Silence::Late { deadline, doing } => Failed {
                result: Done::TimedOut,
                error: format!("the new process did not {doing} within {deadline:?} (server.upgrade.deadline)"),
                report: String::new(),
            },
            Silence::Refused { configuration: true, report } => {
                Failed { result: Done::Refused, error: "the new process refuses its configuration".to_owned(), report }
            }
            Silence::Refused { configuration: false, report } => {
                Failed::because(format!("the new process cannot run: {}", report.trim_end()))
            }
            Silence::Strange => Failed::because("the new process sent a message that was not asked for"),
            Silence::Failed(error) => Failed::because(format!("the new process cannot be spoken to: {error}")),
            Silence::Stops => Failed::because("this process was told to stop"),
        }
    }
}

fn heard(channel: &Channel, until: Instant, before: &'static str, late: Silence) -> Result<FromNew, Silence> {
    match channel.hear(until) {
        Ok(Heard::Message(message, _)) => Ok(message),
        Ok(Heard::Closed) => Err(Silence::Closed(before)),
        Ok(Heard::Nothing) => Err(late),
        Err(error) => Err(Silence::Failed(error)),
    }
}

/// Starts a process with this end as standard input, in its own process group, so that it can be killed together
/// with its children.
fn start(program: &Program, end: OwnedFd) -> io::Result<Child> {
    let mut command = Command::new(&program.path);
    command.args(&program.arguments).stdin(Stdio::from(end)).env(VARIABLE, VERSION).process_group(0);
    // These variables refer to this process.
    for variable in ["LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES", "WATCHDOG_PID"] {
        command.env_remove(variable);
    }
    command.spawn()
}

/// Waits briefly for the exit of a process that has closed its end. Returns whether it has exited. The process stays a
/// zombie, so that the kernel cannot reuse its number.
fn ends(child: &Child) -> bool {
    let Some(pid) = i32::try_from(child.id()).ok().and_then(Pid::from_raw) else { return false };
    let began = Instant::now();
    let look = WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT;
    loop {
        match waitid(WaitId::Pid(pid), look) {
            Ok(None) if began.elapsed() < END => thread::sleep(LOOK),
            told => return matches!(told, Ok(Some(_))),
        }
    }
}

/// Kills a process group. Its leader is a child that was not yet waited for, so the number cannot be reused.
fn end(group: i32) {
    // SAFETY: the call has no pointers.
    unsafe { libc::killpg(group, libc::SIGKILL) };
}

fn outcome(result: Done, error: Option<String>, report: String, began: Instant) -> Outcome {
    let seconds = began.elapsed().as_secs_f64();
    Outcome { result, pid: std::process::id(), version: env!("CARGO_PKG_VERSION").to_owned(), error, report, seconds }
}

/// Whether the caller may name a program; else why not. Reads a system file.
fn vouched(voucher: Voucher) -> Result<(), String> {
    const WHY: &str = "another program is started for its own user and for root only: as one of these, by the token \
        (admin.token), or by a unix socket";
    match voucher {
        Voucher::Shown => Ok(()),
        Voucher::Connection { client, server } => match owner(client, server) {
            // SAFETY: it has no arguments and cannot fail.
            Some(user) if user == 0 || user == unsafe { libc::geteuid() } => Ok(()),
            _ => Err(WHY.to_owned()),
        },
        Voucher::Nothing => Err(WHY.to_owned()),
    }
}

/// The user at the client's end of a local connection (proc(5), /proc/net/tcp).
fn owner(client: SocketAddr, server: SocketAddr) -> Option<u32> {
    let canonical = |address: SocketAddr| SocketAddr::new(address.ip().to_canonical(), address.port());
    let (client, server) = (canonical(client), canonical(server));
    // An IPv4-mapped client address is listed as IPv6.
    ["/proc/net/tcp", "/proc/net/tcp6"].iter().find_map(|file| {
        use std::io::BufRead;
        let lines = io::BufReader::new(std::fs::File::open(file).ok()?).lines().skip(1).map_while(Result::ok);
        lines.into_iter().find_map(|line| {
            let mut words = line.split_whitespace().skip(1);
            let ends = (address(words.next()?)?, address(words.next()?)?);
            let user = words.nth(4)?;
            (ends == (client, server)).then(|| user.parse().ok()).flatten()
        })
    })
}

/// An address as the kernel formats it: 32-bit words in host byte order.
fn address(word: &str) -> Option<SocketAddr> {
    let (host, port) = word.split_once(':')?;
    let words: Vec<[u8; 4]> = (0..host.len() / 8)
        .map(|index| Some(u32::from_str_radix(host.get(index * 8..index * 8 + 8)?, 16).ok()?.to_ne_bytes()))
        .collect::<Option<_>>()?;
    let bytes = words.concat();
    let ip = match bytes.len() {
        4 => std::net::IpAddr::from(<[u8; 4]>::try_from(bytes).ok()?),
        16 => std::net::IpAddr::from(<[u8; 16]>::try_from(bytes).ok()?).to_canonical(),
        _ => return None,
    };
    Some(SocketAddr::new(ip, u16::from_str_radix(port, 16).ok()?))
}

/// Adds the upgrade endpoint to the admin endpoint.
pub(super) fn add(admin: Admin, upgrades: Upgrades) -> Admin {
    let says = "starts a new process that takes over: ?binary=/path names another program";
    admin.post_within("/upgrade", says, LONGEST, move |ask| {
        let upgrades = upgrades.clone();
        async move {
            let binary = match ask.query("binary") {
                Some(path) if !path.starts_with('/') => {
                    return Reply::error(StatusCode::BAD_REQUEST, "`binary` is an absolute path");
                }
                path => path.map(|path| (PathBuf::from(path), ask.voucher())),
            };
            let outcome = match upgrades.begin("admin endpoint", binary) {
                Ok(answer) => answer.await.ok(),
                Err(denied) => Some(*denied),
            };
            let Some(outcome) = outcome else {
                return Reply::error(StatusCode::SERVICE_UNAVAILABLE, "the gateway stops");
            };
            let status = match outcome.result {
                Done::Done => StatusCode::OK,
                Done::Denied => StatusCode::CONFLICT,
                Done::Refused => StatusCode::UNPROCESSABLE_ENTITY,
                Done::Failed => StatusCode::BAD_GATEWAY,
                Done::TimedOut => StatusCode::GATEWAY_TIMEOUT,
            };
            Reply::json(&outcome).with_status(status)
        }
    })
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream};

    use super::*;

    #[test]
    fn the_program_is_the_one_that_was_typed_if_that_is_what_runs() {
        let own = std::env::current_exe().expect("a path");
        let folder = tempfile::tempdir().expect("a folder");
        let link = folder.path().join("forebay");
        std::os::unix::fs::symlink(&own, &link).expect("a link");
        let arguments = |name: &Path| [name.as_os_str().to_owned(), "run".into()];
        let started = |name: &Path| Program::of_this_process(&arguments(name)).expect("a program");
        assert_eq!(started(&link), Program { path: link.clone(), arguments: vec!["run".into()] });
        assert_eq!(started(Path::new("/bin/true")).path, own);
        assert_eq!(started(Path::new("no-program-of-this-name")).path, own);
        assert_eq!(looked_up(Path::new("forebay"), Some(folder.path().as_os_str())), Some(link.clone()));
        assert_eq!(Program::of_this_process(&[]), None);
        // The kernel's mark is removed, unless a file has this very name.
        let marked = folder.path().join("forebay (deleted)");
        assert_eq!(in_place(marked.clone()), link);
        std::fs::write(&marked, "").expect("a file");
        assert_eq!(in_place(marked.clone()), marked);
    }

    #[test]
    fn the_user_of_a_connection_is_found_at_both_families() {
        // SAFETY: it has no arguments and cannot fail.
        let own = unsafe { libc::geteuid() };
        for host in ["127.0.0.1:0", "[::1]:0"] {
            let Ok(listener) = TcpListener::bind(host) else { continue };
            let client = TcpStream::connect(listener.local_addr().expect("its address")).expect("a connection");
            let (server, _) = listener.accept().expect("a connection");
            let ends = (client.local_addr().expect("an address"), server.local_addr().expect("an address"));
            assert_eq!(owner(ends.0, ends.1), Some(own), "{ends:?}");
            assert!(vouched(Voucher::Connection { client: ends.0, server: ends.1 }).is_ok());
            assert!(vouched(Voucher::Connection { client: ends.1, server: ends.1 }).is_err());
        }
        assert!(vouched(Voucher::Nothing).is_err());
    }

    #[test]
    fn an_address_is_read_as_the_kernel_writes_it() {
        let loopback = u32::from_ne_bytes([127, 0, 0, 1]);
        assert_eq!(address(&format!("{loopback:08X}:1F90")), "127.0.0.1:8080".parse().ok());
        assert_eq!(address("00000000000000000000000000000000:0050"), "[::]:80".parse().ok());
        assert_eq!(address("0:0"), None);
        assert_eq!(address("nothing"), None);
    }
}
