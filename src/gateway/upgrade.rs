//! Upgrade: a new process, of the same program or of another, takes over from this one (`forebay upgrade`, SIGUSR2).
//!
//! This process starts it, passes it the listening sockets and serves on. Only when the new one has loaded its
//! configuration, is ready and accepts connections does this one stop to accept, and ends what is under way. Whatever
//! goes wrong before ends the new process and changes nothing here. What the two say to each other is in `handover.rs`,
//! the other side in `takeover.rs`.
//!
//! One thread does an upgrade, so that nothing here waits on a worker. While it is under way no reload is done: the new
//! process has the sockets of this configuration.

use std::ffi::OsString;
use std::io;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread;
use std::time::{Duration, Instant};

use http::StatusCode;
use serde::{Deserialize, Serialize};
use tokio::sync::{oneshot, watch};

use crate::admin::answer::Answer;
use crate::admin::{Admin, Voucher};
use crate::config::server;
use crate::metrics::upgrade::UpgradeMetrics;

use super::elders::Elders;
use super::handover::{AT_ONCE, Channel, FromNew, FromOld, Heard, Passed, VARIABLE, VERSION};
use super::inherited::{Inherited, Label, Opener};
use super::lock;
use super::sockets::Station;
use super::supervisor::Supervisor;

/// For what the new process does without having to wait for anything.
const PROMPT: Duration = Duration::from_secs(10);

/// How long a process that has closed its end may take to end.
const END: Duration = Duration::from_secs(2);

/// How often is looked whether it has.
const LOOK: Duration = Duration::from_millis(10);

/// The longest time that `server.upgrade.deadline` may be, and what is said about it afterwards.
pub const LONGEST: Duration = Duration::from_secs(11 * 60);

/// What this process was started as, and so what a new one is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Program {
    /// The file.
    pub path: PathBuf,
    /// What follows on the command line.
    pub arguments: Vec<OsString>,
}

/// What came of an upgrade.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Outcome {
    /// What was done.
    pub result: Done,
    /// The process that serves now.
    pub pid: u32,
    /// Its version.
    pub version: String,
    /// Why nothing was done, if so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// What is wrong with the configuration, as `forebay check` prints it; empty if that is not why.
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
    /// The new process refuses its configuration.
    Refused,
    /// It could not be started, or ended before it was ready.
    Failed,
    /// It was not ready in time.
    TimedOut,
    /// It was not begun.
    Denied,
}

impl Done {
    /// What counts as a try, as metrics call it.
    pub const COUNTED: [Done; 4] = [Done::Done, Done::Refused, Done::Failed, Done::TimedOut];

    /// How metrics call it.
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

/// Reloads and upgrades are done one after the other.
#[derive(Clone, Default)]
pub struct Changing(Arc<Mutex<bool>>);

impl Changing {
    /// Waits until no other change is under way. `None`: another process has taken over, so nothing is to be changed.
    pub fn begin(&self) -> Option<MutexGuard<'_, bool>> {
        Some(lock(&self.0)).filter(|over| !**over)
    }
}

/// Does upgrades. Clones share it.
#[derive(Clone)]
pub struct Upgrades(Arc<Inner>);

struct Inner {
    program: Option<Program>,
    stations: Arc<Mutex<Vec<Station>>>,
    inherited: Inherited,
    times: Arc<Mutex<server::Upgrade>>,
    metrics: UpgradeMetrics,
    supervisor: Supervisor,
    elders: Elders,
    changing: Changing,
    state: Mutex<State>,
    handed_over: watch::Sender<bool>,
    /// The end by which the new process knows when this one ends.
    successor: Mutex<Option<Channel>>,
}

/// Where this process is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// It serves.
    Alone,
    /// It serves, and a new process is being started: the one that leads this group, once there is one.
    UnderWay(Option<i32>),
    /// Another one serves.
    HandedOver,
    /// It was told to stop.
    Stops,
}

/// Why an upgrade came to nothing.
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
    /// That of this process: the path as it was typed or looked up, so that a link in it is followed anew each time.
    /// `None`: there is no path.
    pub fn of_this_process(arguments: &[OsString]) -> Option<Program> {
        let (name, arguments) = arguments.split_first()?;
        let own = std::env::current_exe().ok();
        let typed = Path::new(name);
        let path = if typed.components().count() > 1 {
            std::path::absolute(typed).ok()
        } else {
            looked_up(typed, std::env::var_os("PATH").as_deref())
        };
        // What was typed may be anything: the caller of exec(3) chooses it.
        let is_own = |path: &PathBuf| path.canonicalize().ok() == own.as_ref().and_then(|own| own.canonicalize().ok());
        Some(Program { path: path.filter(is_own).or(own)?, arguments: arguments.to_vec() })
    }
}

/// The first file of this name in the directories of a search path.
fn looked_up(name: &Path, path: Option<&std::ffi::OsStr>) -> Option<PathBuf> {
    std::env::split_paths(path?).map(|directory| directory.join(name)).find(|file| file.is_file())
}

/// What upgrades are done with.
pub struct Needs {
    /// What is started.
    pub program: Option<Program>,
    /// The sockets that are passed.
    pub stations: Arc<Mutex<Vec<Station>>>,
    /// Further ones.
    pub inherited: Inherited,
    /// How long things may take.
    pub times: Arc<Mutex<server::Upgrade>>,
    /// What is counted.
    pub metrics: UpgradeMetrics,
    /// The service manager.
    pub supervisor: Supervisor,
    /// Older processes.
    pub elders: Elders,
    /// Excludes reloads.
    pub changing: Changing,
}

impl Upgrades {
    /// What does upgrades of this process.
    pub fn new(needs: Needs) -> Upgrades {
        let Needs { program, stations, inherited, times, metrics, supervisor, elders, changing } = needs;
        let (handed_over, _) = watch::channel(false);
        let state = Mutex::new(State::Alone);
        let inner = Inner {
            program,
            stations,
            inherited,
            times,
            metrics,
            supervisor,
            elders,
            changing,
            state,
            handed_over,
            successor: Mutex::default(),
        };
        Upgrades(Arc::new(inner))
    }

    /// Begins an upgrade to the program of this process, or to this one. What comes of it is in the log as well.
    ///
    /// # Errors
    ///
    /// It is not begun, and why.
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

    /// Whether another process has taken over.
    pub fn is_handed_over(&self) -> bool {
        *self.0.handed_over.borrow()
    }

    /// Waits until another process has taken over.
    pub async fn handed_over(&self) {
        // The sender lives as long as this.
        let _ = self.0.handed_over.subscribe().wait_for(|over| *over).await;
    }

    /// This process is to stop: a new one that is not ready yet is ended, and none is started any more. False:
    /// another process has taken over already.
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

    /// Begins, unless there is a reason not to.
    fn enter(&self) -> Result<Program, String> {
        let inner = &*self.0;
        let program = inner.program.clone().ok_or("this gateway was not started by the command line of Forebay")?;
        if std::process::id() == 1 {
            return Err("this is the first process of its container, which ends with it: replace the container".into());
        }
        let (most, draining) = (lock(&inner.times).processes.0, inner.elders.count());
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
        match allowed.and_then(|()| self.attempt(program, began)) {
            Ok((pid, version)) => {
                *changing = true;
                let seconds = began.elapsed().as_secs_f64();
                tracing::info!(by, program = %file, pid, version, seconds, "another process has taken over");
                let (result, error, report) = (Done::Done, None, String::new());
                self.stop_accepting();
                // The caller may have gone.
                let _ = reply.send(Outcome { result, pid, version, error, report, seconds });
                inner.handed_over.send_replace(true);
            }
            Err(Failed { result, error, report }) => {
                drop(changing);
                self.leave();
                if result != Done::Denied {
                    inner.metrics.count(result.name());
                }
                tracing::error!(by, program = %file, result = result.name(), "the upgrade failed, and this process serves on: {error}");
                // The caller may have gone.
                let _ = reply.send(outcome(result, Some(error), report, began));
            }
        }
    }

    /// Leaves new connections to the other process: who hears of the upgrade meets none of this one.
    fn stop_accepting(&self) {
        let stations = lock(&self.0.stations).clone();
        stations.iter().for_each(|station| station.clerk.hand_over());
        let began = Instant::now();
        while began.elapsed() < END && !stations.iter().all(|station| station.clerk.has_left()) {
            thread::sleep(LOOK);
        }
    }

    /// Starts a new process and has it take over. It has ended if that fails.
    fn attempt(&self, program: &Program, began: Instant) -> Result<(u32, String), Failed> {
        let deadline = lock(&self.0.times).deadline.0;
        let said = |doing: &str, error: io::Error| Failed::because(format!("{doing}: {error}"));
        let (channel, other_end) = Channel::pair().map_err(|error| said("no descriptor for a new process", error))?;
        let started = start(program, other_end.into_fd());
        let mut child =
            started.map_err(|error| said(&format!("`{}` cannot be started", program.path.display()), error))?;
        let group = i32::try_from(child.id()).unwrap_or(i32::MAX);
        let done = self.register(group).and_then(|()| self.converse(&channel, began + deadline, deadline));
        let result = done.map_err(|silence| {
            let status = match silence {
                Silence::Closed(_) => ended(&mut child),
                _ => None,
            };
            self.unregister();
            end(group);
            silence.told(status)
        });
        // Its first half has ended, or was ended just now.
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

    /// The number of the group is another's once its leader was waited for.
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
        self.pass(channel, until).map_err(Silence::Failed)?;
        match heard(channel, until, "ready", late("be ready"))? {
            FromNew::Ready => {}
            FromNew::Refuses { configuration, report } => return Err(Silence::Refused { configuration, report }),
            _ => return Err(Silence::Strange),
        }
        channel.say(&FromOld::Go, &[], PROMPT).map_err(Silence::Failed)?;
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
        // It serves in any case.
        let _ = channel.say(&FromOld::Main, &[], PROMPT);
        Ok((pid, version))
    }

    /// Passes all sockets.
    fn pass(&self, channel: &Channel, until: Instant) -> io::Result<()> {
        let inner = &*self.0;
        let mut passed = Vec::new();
        for Station { place, clerk } in lock(&inner.stations).iter().filter(|station| !station.place.is_managers) {
            let label = Label { listener: place.listener.clone(), written: place.written.clone() };
            if let Some(fd) = clerk.duplicate()? {
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
        // The one that is being done is counted by the new process.
        let counted = Done::COUNTED.map(|done| (done.name().to_owned(), inner.metrics.counted(done.name())));
        let all = FromOld::All { version: env!("CARGO_PKG_VERSION").to_owned(), counted: counted.into() };
        channel.say(&all, &inner.elders.duplicates()?, until.saturating_duration_since(Instant::now()))
    }
}

/// Why a new process does not take over.
enum Silence {
    /// It closed its end before it was this.
    Closed(&'static str),
    /// It did not do this in time.
    Late { deadline: Duration, doing: &'static str },
    /// It says that it will not run.
    Refused { configuration: bool, report: String },
    /// It sends what was not asked for.
    Strange,
    /// It cannot be spoken to.
    Failed(io::Error),
    /// This process is to stop.
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

/// Starts a process with this end as its standard input, as the leader of a group of its own, so that it can be ended
/// with all that it starts.
fn start(program: &Program, end: OwnedFd) -> io::Result<Child> {
    let mut command = Command::new(&program.path);
    command.args(&program.arguments).stdin(Stdio::from(end)).env(VARIABLE, VERSION).process_group(0);
    // They speak of this process.
    for variable in ["LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES", "WATCHDOG_PID"] {
        command.env_remove(variable);
    }
    command.spawn()
}

/// Waits a little for the end of a process that has closed its end.
fn ended(child: &mut Child) -> Option<ExitStatus> {
    let began = Instant::now();
    loop {
        match child.try_wait() {
            Ok(None) if began.elapsed() < END => thread::sleep(LOOK),
            Ok(status) => return status,
            Err(_) => return None,
        }
    }
}

/// Ends a group of processes at once. Its leader is a child that was not waited for, so that the number is no other's.
fn end(group: i32) {
    // SAFETY: it takes no memory of ours.
    unsafe { libc::killpg(group, libc::SIGKILL) };
}

fn outcome(result: Done, error: Option<String>, report: String, began: Instant) -> Outcome {
    let seconds = began.elapsed().as_secs_f64();
    Outcome { result, pid: std::process::id(), version: env!("CARGO_PKG_VERSION").to_owned(), error, report, seconds }
}

/// Whether who asks may name a program; else why not. Reads a file of the system.
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

/// The user of the client's end of a connection within this machine (proc(5), /proc/net/tcp).
fn owner(client: SocketAddr, server: SocketAddr) -> Option<u32> {
    let canonical = |address: SocketAddr| SocketAddr::new(address.ip().to_canonical(), address.port());
    let (client, server) = (canonical(client), canonical(server));
    // A client that writes an address of IPv4 in the way of IPv6 has an entry there.
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

/// An address as the kernel writes it there: 32-bit words in the byte order of the machine.
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

/// Adds what starts upgrades to the admin endpoint.
pub(super) fn add(admin: Admin, upgrades: Upgrades) -> Admin {
    let says = "starts a new process that takes over: ?binary=/path names another program";
    admin.post_within("/upgrade", says, LONGEST, move |ask| {
        let upgrades = upgrades.clone();
        async move {
            let binary = match ask.query("binary") {
                Some(path) if !path.starts_with('/') => {
                    return Answer::error(StatusCode::BAD_REQUEST, "`binary` is an absolute path");
                }
                path => path.map(|path| (PathBuf::from(path), ask.voucher())),
            };
            let outcome = match upgrades.begin("admin endpoint", binary) {
                Ok(answer) => answer.await.ok(),
                Err(denied) => Some(*denied),
            };
            let Some(outcome) = outcome else {
                return Answer::error(StatusCode::SERVICE_UNAVAILABLE, "the gateway stops");
            };
            let status = match outcome.result {
                Done::Done => StatusCode::OK,
                Done::Denied => StatusCode::CONFLICT,
                Done::Refused => StatusCode::UNPROCESSABLE_ENTITY,
                Done::Failed => StatusCode::BAD_GATEWAY,
                Done::TimedOut => StatusCode::GATEWAY_TIMEOUT,
            };
            Answer::json(&outcome).with_status(status)
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
        assert_eq!(looked_up(Path::new("forebay"), Some(folder.path().as_os_str())), Some(link));
        assert_eq!(Program::of_this_process(&[]), None);
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
