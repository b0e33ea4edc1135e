//! The gateway of a story: in this process, or as a program if signals or exit codes matter.

use std::collections::{BTreeSet, HashMap};
use std::env;
use std::fmt::{self, Write as _};
use std::fs;
use std::io::{BufRead, BufReader};
use std::marker::PhantomData;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::{Arc, Mutex, Once};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use forebay::config::Config;
use forebay::filter::FilterType;
use forebay::gateway::{Builder, stop::Handle};
use forebay::phase::Phase;
use serde_json::Value;
use tempfile::TempDir;

use super::client::{Client, get, request};
use super::metrics::Scrape;
use super::origin::Connection;
use super::{DEADLINE, Origin, end, eventually};

/// A configuration under construction: one listener `web`, one upstream `app`, one route `all`, one worker; a story
/// changes what it needs.
#[derive(Clone)]
pub struct Setup {
    upstreams: String,
    listener: String,
    listeners: String,
    upstream: String,
    route: String,
    routes: Option<String>,
    more_routes: String,
    server: String,
    log: PathBuf,
    access_log: String,
    observability: String,
    admin: String,
    more: String,
    filters: Vec<fn(Builder) -> Builder>,
    tmpfs: Option<&'static str>,
    open_files: Option<usize>,
    launcher: Vec<String>,
    program: PathBuf,
    whole: Option<String>,
    dir: Arc<TempDir>,
}

/// A running gateway in this process. It runs until the process ends, unless a story stops it.
///
/// Pingora identifies a thread's runtime by a thread number that may be reused (`pingora_runtime::current_handle`).
/// A gateway that starts after another one has stopped may get the dead runtime, so two stories must not share a
/// process.
pub struct Gateway {
    handle: Handle,
    thread: Option<JoinHandle<()>>,
    listeners: HashMap<String, SocketAddr>,
    admin: SocketAddr,
    /// Dropped before its directory.
    _shown: ShownAtFailure,
    dir: Arc<TempDir>,
}

/// A running `forebay` program.
pub struct Process {
    child: Child,
    web: SocketAddr,
    admin: SocketAddr,
    stderr: Arc<Mutex<String>>,
    /// Dropped before its directory.
    _shown: ShownAtFailure,
    dir: Arc<TempDir>,
}

/// Shows the end of the access log if its test fails.
struct ShownAtFailure(PathBuf);

impl Drop for ShownAtFailure {
    fn drop(&mut self) {
        if !thread::panicking() {
            return;
        }
        // The log gathers lines for 10 ms.
        thread::sleep(Duration::from_millis(50));
        let log = fs::read_to_string(&self.0).unwrap_or_default();
        let lines: Vec<&str> = log.lines().collect();
        eprintln!("the access log ends with:\n{}", lines[lines.len().saturating_sub(20)..].join("\n"));
    }
}

/// One line of the access log.
#[derive(Clone, Debug)]
pub struct LogLine {
    text: String,
    value: Value,
}

impl Setup {
    /// A gateway in front of one origin.
    pub fn before(origin: &Origin) -> Setup {
        Setup::before_all(&[origin.address().to_string()])
    }

    /// A gateway in front of the endpoints at these addresses.
    pub fn before_all(addresses: &[impl ToString]) -> Setup {
        Setup::new(&endpoints(addresses))
    }

    /// A gateway in front of origins with weights.
    pub fn weighted(origins: &[(&Origin, u32)]) -> Setup {
        let written = origins.iter().map(|(o, weight)| format!("{{ address: \"{}\", weight: {weight} }}", o.address()));
        Setup::new(&written.collect::<Vec<_>>().join(", "))
    }

    /// A gateway whose upstream has these discovery keys.
    pub fn found(keys: &str) -> Setup {
        Setup { upstream: keys.to_owned(), ..Setup::new("") }
    }

    /// A gateway with endpoints written in full.
    pub fn endpoints(written: impl IntoIterator<Item = String>) -> Setup {
        Setup::new(&written.into_iter().collect::<Vec<_>>().join(", "))
    }

    fn new(endpoints: &str) -> Setup {
        without_public_certificates();
        let dir = Arc::new(tempfile::tempdir().expect("a directory"));
        Setup {
            log: log_path(&dir),
            dir,
            upstreams: String::new(),
            listener: String::new(),
            listeners: String::new(),
            upstream: format!("endpoints: [ {endpoints} ]"),
            route: String::new(),
            routes: None,
            more_routes: String::new(),
            server: "threads: 1".to_owned(),
            access_log: String::new(),
            observability: String::new(),
            admin: String::new(),
            more: String::new(),
            filters: Vec::new(),
            tmpfs: None,
            open_files: None,
            launcher: Vec::new(),
            program: PathBuf::from(env!("CARGO_BIN_EXE_forebay")),
            whole: None,
        }
    }

    /// Adds keys to the listener `web`, such as `limits: { headers: 5 }`.
    pub fn listener(mut self, keys: &str) -> Setup {
        add(&mut self.listener, keys);
        self
    }

    /// Adds a listener.
    pub fn also_listener(mut self, written: &str) -> Setup {
        add(&mut self.listeners, written);
        self
    }

    /// Adds keys to the upstream `app`.
    pub fn upstream(mut self, keys: &str) -> Setup {
        add(&mut self.upstream, keys);
        self
    }

    /// Adds an upstream.
    pub fn also(self, name: &str, origin: &Origin) -> Setup {
        self.also_at(name, origin.address())
    }

    /// Adds an upstream with an endpoint at this address.
    pub fn also_at(mut self, name: &str, address: SocketAddr) -> Setup {
        add(&mut self.upstreams, &format!("{name}: {{ endpoints: [ {} ] }}", endpoints(&[address])));
        self
    }

    /// Adds an upstream with these keys.
    pub fn also_upstream(mut self, name: &str, keys: &str) -> Setup {
        add(&mut self.upstreams, &format!("{name}: {{ {keys} }}"));
        self
    }

    /// Adds keys to the route `all`.
    pub fn route(mut self, keys: &str) -> Setup {
        add(&mut self.route, keys);
        self
    }

    /// Sets the filters of the route `all`.
    pub fn filters(self, written: &str) -> Setup {
        self.route(&format!("filters: [ {written} ]"))
    }

    /// Adds a route.
    pub fn also_route(mut self, written: &str) -> Setup {
        add(&mut self.more_routes, written);
        self
    }

    /// Replaces the route `all` by these, one per line.
    pub fn routes(mut self, written: &str) -> Setup {
        self.routes = Some(written.trim().replace('\n', ",\n "));
        self
    }

    /// Replaces `threads: 1` in `server` by these keys.
    pub fn server(mut self, keys: &str) -> Setup {
        self.server = keys.to_owned();
        self
    }

    /// Adds keys to the access log.
    pub fn access_log(mut self, keys: &str) -> Setup {
        add(&mut self.access_log, keys);
        self
    }

    /// Sets the path and adds keys of the access log.
    pub fn access_log_to(mut self, path: &Path, keys: &str) -> Setup {
        self.log = path.to_owned();
        self.access_log(keys)
    }

    /// Adds keys to `observability`.
    pub fn observability(mut self, keys: &str) -> Setup {
        add(&mut self.observability, keys);
        self
    }

    /// Adds lines at the top level.
    pub fn more(mut self, lines: &str) -> Setup {
        self.more.push_str(lines);
        self.more.push('\n');
        self
    }

    /// Registers a filter.
    pub fn filter<T: FilterType>(mut self) -> Setup {
        self.filters.push(Builder::filter::<T>);
        self
    }

    /// Adds keys to `admin`.
    pub fn admin(mut self, keys: &str) -> Setup {
        add(&mut self.admin, keys);
        self
    }

    /// Sets keys of `server` in addition to one worker and a separate `spool` directory.
    pub fn spooling(self, keys: &str) -> Setup {
        let spool = self.spool_dir();
        let keys = joined(&["threads: 1", &format!("spool_dir: \"{}\"", spool.display()), keys]);
        self.server(&keys)
    }

    /// Mounts a tmpfs of this size (`4m`) on the `spool` directory. Only the program sees it, so the gateway must
    /// be spawned.
    pub fn tmpfs(self, size: &'static str) -> Setup {
        self.spool_dir();
        Setup { tmpfs: Some(size), ..self }
    }

    /// Limits the open files of the program, which must be spawned.
    pub fn open_files(self, count: usize) -> Setup {
        Setup { open_files: Some(count), ..self }
    }

    /// Starts the program through this launcher; its command line is appended.
    pub fn launched_by(self, command: &[&str]) -> Setup {
        Setup { launcher: command.iter().map(|word| (*word).to_owned()).collect(), ..self }
    }

    /// Starts the program from this path.
    pub fn started_from(self, program: &Path) -> Setup {
        Setup { program: program.to_owned(), ..self }
    }

    /// The directory for spooled bodies.
    pub fn spool_dir(&self) -> PathBuf {
        let spool = self.path("spool");
        fs::create_dir_all(&spool).expect("a directory for spooled bodies");
        spool
    }

    /// A path in this gateway's directory.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// A gateway with this file; only one worker, an admin endpoint and the access log are added.
    ///
    /// # Panics
    ///
    /// If it is not YAML.
    pub fn whole(written: &str) -> Setup {
        let setup = Setup::new("");
        let mut file: serde_yaml::Value = serde_yaml::from_str(written).unwrap_or_else(|e| panic!("{written}\n{e}"));
        put(&mut file, &["server", "threads"], 1.into());
        put(&mut file, &["server", "shutdown", "pause"], "0s".into());
        put(&mut file, &["admin", "address"], "127.0.0.1:0".into());
        put(&mut file, &["admin", "hosts"], vec![serde_yaml::Value::from("test")].into());
        put(&mut file, &["observability", "access_log", "path"], setup.log.display().to_string().into());
        Setup { whole: Some(serde_yaml::to_string(&file).expect("YAML")), ..setup }
    }

    /// The resulting file.
    pub fn yaml(&self) -> String {
        if let Some(whole) = &self.whole {
            return whole.clone();
        }
        let mut yaml = String::new();
        let route = format!("{{ name: all, {} }}", joined(&["upstream: app", &self.route]));
        let route = if self.route.contains("upstreams:") { route.replace("upstream: app, ", "") } else { route };
        let listener = format!("{{ {} }}", joined(&["name: web, address: \"127.0.0.1:0\"", &self.listener]));
        let log = format!("path: {}", self.log.display());
        let log = format!("access_log: {{ {} }}", joined(&[&log, &self.access_log]));
        for (key, value) in [
            ("listeners", format!("[ {} ]", joined(&[&listener, &self.listeners]))),
            ("upstreams", format!("{{ {} }}", joined(&[&format!("app: {{ {} }}", self.upstream), &self.upstreams]))),
            ("routes", format!("[ {} ]", joined(&[self.routes.as_ref().unwrap_or(&route), &self.more_routes]))),
            ("server", format!("{{ {} }}", self.server_keys())),
            ("admin", format!("{{ {} }}", joined(&["address: \"127.0.0.1:0\", hosts: [test]", &self.admin]))),
            ("observability", format!("{{ {} }}", joined(&[&log, &self.observability]))),
        ] {
            writeln!(yaml, "{key}: {value}").expect("a string grows");
        }
        yaml + &self.more
    }

    /// The keys of `server`. By default, the shutdown has no pause.
    fn server_keys(&self) -> String {
        if self.server.contains("pause:") {
            self.server.clone()
        } else if self.server.contains("shutdown: {") {
            self.server.replace("shutdown: {", "shutdown: { pause: 0s,")
        } else {
            joined(&[&self.server, "shutdown: { pause: 0s }"])
        }
    }

    /// The builder with this setup's filters.
    pub fn builder(&self) -> Builder {
        self.filters.iter().fold(forebay::gateway::Gateway::builder(), |builder, register| register(builder))
    }

    /// Starts it and sends a request that has reached `origin` and has no response yet.
    pub fn asked(&self, origin: &Origin) -> (Gateway, Client, Connection) {
        let gateway = self.start();
        let mut client = gateway.client();
        client.send(request("GET", "/", "", ""));
        let mut connection = origin.accept();
        connection.request();
        (gateway, client, connection)
    }

    /// Starts it in this process.
    ///
    /// # Panics
    ///
    /// If it does not start; with its report.
    pub fn start(&self) -> Gateway {
        let builder = self.builder();
        let config = builder.parse("test.yaml", &self.yaml()).unwrap_or_else(|e| panic!("{}\n{e}", self.yaml()));
        self.run(builder, config)
    }

    /// The same from a file, `forebay.yaml`, which it reloads on request.
    pub fn start_reloading(&self) -> Gateway {
        let file = self.path("forebay.yaml");
        self.write();
        let builder = self.builder().reloading(&file);
        let config = builder.load(&file).unwrap_or_else(|e| panic!("{e}"));
        self.run(builder, config)
    }

    fn run(&self, builder: Builder, config: Config) -> Gateway {
        let names: Vec<String> = config.listeners.iter().map(|listener| listener.name.clone()).collect();
        let gateway = builder.build(config).unwrap_or_else(|e| panic!("{}\n{e}", self.yaml()));
        let listeners = names.into_iter().filter_map(|name| Some((name.clone(), gateway.address(&name)?))).collect();
        let (handle, admin) = (gateway.handle(), gateway.admin_address().expect("an admin endpoint"));
        let thread = Some(thread::spawn(move || gateway.run()));
        let _shown = ShownAtFailure(log_path(&self.dir));
        Gateway { handle, thread, listeners, admin, _shown, dir: self.dir.clone() }
    }

    /// Starts the program.
    pub fn spawn(&self) -> Process {
        self.spawn_with(&[])
    }

    /// Writes the configuration file of a spawned program.
    pub fn write(&self) {
        fs::write(self.path("forebay.yaml"), self.yaml()).expect("a configuration file");
    }

    /// Makes this the next configuration of a running program.
    pub fn in_place_of(mut self, process: &Process) -> Setup {
        self.dir = process.dir.clone();
        self.log = log_path(&self.dir);
        self
    }

    /// Starts the program with these environment variables.
    pub fn spawn_with(&self, environment: &[(&str, &Path)]) -> Process {
        self.write();
        self.spawned(&self.path("forebay.yaml"), &[], environment)
    }

    /// Starts the program with an existing file and these arguments.
    pub fn spawn_at(&self, file: &Path, arguments: &[&str]) -> Process {
        self.spawned(file, arguments, &[])
    }

    /// Runs a command of the program with its file, and waits for its end.
    pub fn output(&self, arguments: &[&str]) -> Output {
        self.write();
        self.program().args(arguments).arg("-c").arg(self.path("forebay.yaml")).output().expect("the program")
    }

    /// Starts another program with our command line.
    pub fn spawn_program(&self, program: &Path) -> Process {
        self.write();
        self.started(Command::new(program), &self.path("forebay.yaml"), &[], &[])
    }

    fn spawned(&self, file: &Path, arguments: &[&str], environment: &[(&str, &Path)]) -> Process {
        self.started(self.program(), file, arguments, environment)
    }

    fn started(&self, mut program: Command, file: &Path, arguments: &[&str], environment: &[(&str, &Path)]) -> Process {
        let mut child = program
            .args(["run", "-c"])
            .arg(file)
            .args(arguments)
            .envs(environment.iter().copied())
            .stderr(Stdio::piped())
            .spawn()
            .expect("the program");
        let stderr = Arc::new(Mutex::new(String::new()));
        collect(child.stderr.take().expect("its standard error"), stderr.clone());
        let [web, admin] = ["web", "admin"].map(|name| announced(&mut child, &stderr, name));
        eventually("the program to be ready", || (get(admin, "/readyz").status == 200).then_some(()));
        let _shown = ShownAtFailure(log_path(&self.dir));
        Process { child, web, admin, stderr, _shown, dir: self.dir.clone() }
    }
}

impl Setup {
    /// The program, with its own tmpfs if configured.
    fn program(&self) -> Command {
        const MOUNT: &str = r#"mount -t tmpfs -o "size=$1" tmpfs "$2" && shift 2 && exec "$@""#;
        if let [launcher, arguments @ ..] = &self.launcher[..] {
            let mut command = Command::new(launcher);
            command.args(arguments).arg(&self.program);
            return command;
        }
        if let Some(count) = self.open_files {
            let mut command = Command::new("prlimit");
            command.arg(format!("--nofile={count}:{count}")).arg(&self.program);
            return command;
        }
        let Some(size) = self.tmpfs else { return Command::new(&self.program) };
        let mut command = Command::new("unshare");
        // Without root, it needs a user namespace; where there are none, the story fails.
        command.args([if may_mount() { "-m" } else { "-Urm" }, "sh", "-c", MOUNT, "sh", size]);
        command.arg(self.path("spool")).arg(&self.program);
        command
    }
}

/// Leaves this process and all that it starts without the system's certificates, unless a test names others: to read
/// them takes half the time of a gateway's start.
fn without_public_certificates() {
    static ONCE: Once = Once::new();
    // SAFETY: as Pingora does with the same variable when the first gateway starts: other threads hardly read it.
    ONCE.call_once(|| unsafe { env::set_var("SSL_CERT_FILE", "/dev/null") });
}

/// Whether this process can mount in its own namespace without a user namespace.
fn may_mount() -> bool {
    Command::new("unshare").args(["-m", "true"]).output().expect("unshare, of util-linux").status.success()
}

impl Gateway {
    /// Where the listener `web` is bound.
    pub fn web(&self) -> SocketAddr {
        self.address("web")
    }

    /// Where another listener is bound.
    pub fn address(&self, listener: &str) -> SocketAddr {
        self.listeners[listener]
    }

    /// Where the admin endpoint is bound.
    pub fn admin(&self) -> SocketAddr {
        self.admin
    }

    /// A new client of the listener `web`.
    pub fn client(&self) -> Client {
        Client::connect(self.web())
    }

    /// Starts a graceful stop.
    pub fn stop(&self) {
        self.handle.stop();
    }

    /// Waits until it has stopped.
    pub fn stopped(&mut self) {
        let thread = self.thread.take().expect("to be asked once");
        eventually("the gateway to stop", || thread.is_finished().then_some(()));
        thread.join().expect("the gateway not to panic");
    }
}

impl Process {
    /// Where the listener `web` is bound.
    pub fn web(&self) -> SocketAddr {
        self.web
    }

    /// A new client of the listener `web`.
    pub fn client(&self) -> Client {
        Client::connect(self.web)
    }

    /// Where the admin endpoint is bound.
    pub fn admin(&self) -> SocketAddr {
        self.admin
    }

    /// The PID.
    pub fn pid(&self) -> u64 {
        self.child.id().into()
    }

    /// The address of a listener that was opened later.
    pub fn listens(&self, listener: &str) -> SocketAddr {
        eventually(&format!("the program to listen at `{listener}`"), || address_told(&self.stderr(), listener))
    }

    /// Its metrics.
    pub fn scrape(&self) -> Scrape {
        Scrape::of(self.admin)
    }

    /// Its standard error so far.
    pub fn stderr(&self) -> String {
        self.stderr.lock().unwrap().clone()
    }

    /// Waits for a text on standard error.
    pub fn says(&self, what: &str) {
        eventually(&format!("`{what}` on standard error"), || self.stderr().contains(what).then_some(()));
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: i32) {
        let pid = i32::try_from(self.child.id()).expect("a process id");
        // SAFETY: kill has no memory effects; the process is our child and not yet waited for, so the id is its own.
        assert_eq!(unsafe { libc::kill(pid, signal) }, 0, "to signal the program");
    }

    /// Stops its disk threads, like an unresponsive disk, until the result is dropped.
    pub fn still_disk(&self) -> StillDisk {
        let tasks = PathBuf::from(format!("/proc/{}/task", self.child.id()));
        let named_disk = |task: &PathBuf| fs::read(task.join("comm")).is_ok_and(|name| name.starts_with(b"disk-"));
        let threads = || -> Vec<i32> {
            let tasks = fs::read_dir(&tasks).expect("its threads").flatten().map(|task| task.path());
            tasks.filter(named_disk).filter_map(|task| task.file_name()?.to_str()?.parse().ok()).collect()
        };
        // A thread names itself when it first runs, which on a busy machine may be after the process is ready.
        let all = || Some(threads()).filter(|threads| threads.len() == DISK_THREADS);
        let threads = eventually("the names of its disk threads", all);
        for &thread in &threads {
            trace(libc::PTRACE_SEIZE, thread);
            trace(libc::PTRACE_INTERRUPT, thread);
            // SAFETY: no pointer is passed; this thread traces that thread.
            let stopped = unsafe { libc::waitpid(thread, std::ptr::null_mut(), libc::__WALL) };
            assert_eq!(stopped, thread, "a thread that is interrupted stops");
        }
        StillDisk { threads, tracer: PhantomData }
    }

    /// Its resident memory.
    pub fn resident_bytes(&self) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.child.id())).expect("its status");
        let resident = status.lines().find_map(|line| line.strip_prefix("VmRSS:")?.trim().strip_suffix("kB"));
        resident.and_then(|kib| kib.trim().parse::<u64>().ok()).expect("its resident set") * 1024
    }

    /// The words of a line of `/proc/PID/status`.
    pub fn status(&self, line: &str) -> Vec<String> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.child.id())).expect("its status");
        let found = status.lines().find_map(|one| one.strip_prefix(line)?.strip_prefix(':'));
        found.expect("a line of its status").split_whitespace().map(str::to_owned).collect()
    }

    /// The targets of its file descriptors: a path, or a type and a number.
    pub fn open_files(&self) -> Vec<String> {
        let open = fs::read_dir(format!("/proc/{}/fd", self.child.id())).expect("its open files");
        // Descriptors closed meanwhile are skipped.
        open.flatten().flat_map(|file| fs::read_link(file.path())).map(|to| to.display().to_string()).collect()
    }

    /// Its open files and sockets, each once, without those of event loops.
    ///
    /// Each loop has descriptors of its own and a copy of the socket for signals. The last loops begin after the
    /// process is ready, so a count of all descriptors is not yet final then.
    pub fn open_besides_loops(&self) -> BTreeSet<String> {
        self.open_files().into_iter().filter(|target| !target.starts_with("anon_inode:")).collect()
    }

    /// Its open files in the spool directory.
    pub fn spool_files(&self) -> Vec<fs::Metadata> {
        let spool = self.dir.path().join("spool");
        let open = fs::read_dir(format!("/proc/{}/fd", self.child.id())).expect("its open files");
        let spooled = open.flatten().filter(|file| fs::read_link(file.path()).is_ok_and(|to| to.starts_with(&spool)));
        spooled.flat_map(|file| fs::metadata(file.path())).collect()
    }

    /// The tmpfs mounts for spooled bodies that only it sees, as lines of `/proc/PID/mounts`.
    pub fn spool_disks(&self) -> Vec<String> {
        let spool = self.dir.path().join("spool").display().to_string();
        let mounts = fs::read_to_string(format!("/proc/{}/mounts", self.child.id())).expect("what it sees mounted");
        mounts.lines().filter(|line| line.contains(&spool)).map(str::to_owned).collect()
    }

    /// Whether it runs.
    pub fn runs(&mut self) -> bool {
        self.child.try_wait().expect("the state of the child").is_none()
    }

    /// Waits until it ends.
    pub fn ended(&mut self) -> ExitStatus {
        eventually("the program to end", || self.child.try_wait().expect("the state of the child"))
    }
}

/// The default of `server.disk_threads`, which no test changes.
const DISK_THREADS: usize = 2;

/// An unresponsive disk, while this lives. It must stay on the thread that created it.
pub struct StillDisk {
    threads: Vec<i32>,
    tracer: PhantomData<*const ()>,
}

impl Drop for StillDisk {
    fn drop(&mut self) {
        for &thread in &self.threads {
            let none = std::ptr::null_mut::<libc::c_void>();
            // SAFETY: no pointer is passed; the thread is one that this thread traces.
            if unsafe { libc::ptrace(libc::PTRACE_DETACH, thread, none, none) } != 0 {
                // It has ended with its process, which has not ended before its tracer knows.
                // SAFETY: as above.
                unsafe { libc::waitpid(thread, std::ptr::null_mut(), libc::__WALL) };
            }
        }
    }
}

fn trace(request: libc::c_uint, thread: i32) {
    let none = std::ptr::null_mut::<libc::c_void>();
    // SAFETY: these requests take no pointer, and change nothing but whether that thread of a child of ours runs.
    assert_eq!(unsafe { libc::ptrace(request, thread, none, none) }, 0, "{}", std::io::Error::last_os_error());
}

impl Drop for Process {
    fn drop(&mut self) {
        end(&mut self.child);
    }
}

/// Metrics that are zero when the gateway is idle.
const AT_REST: [&str; 6] = [
    "forebay_phase_active",
    "forebay_spool_bytes",
    "forebay_slow_clients",
    "forebay_pressure",
    "forebay_scheduler_waiting",
    "forebay_disk_queue",
];

/// The observable state of a gateway, in this process or as a program.
pub trait Watched {
    /// The address of its admin endpoint.
    fn admin_address(&self) -> SocketAddr;
    /// Its access log.
    fn log_file(&self) -> PathBuf;

    /// The sum of the samples that match a selector.
    fn metric(&self, selector: &str) -> f64 {
        Scrape::of(self.admin_address()).sum(selector)
    }

    /// Waits until the sum of the samples that match a selector satisfies `wanted`.
    fn wait_metric(&self, selector: &str, wanted: impl Fn(f64) -> bool) -> f64 {
        let mut last = f64::NAN;
        let found = || {
            last = self.metric(selector);
            wanted(last).then_some(last)
        };
        eventually(&format!("{selector} to be as wanted"), found)
    }

    /// Waits until this gateway has counted exactly one refusal, with this reason.
    fn refused_once(&self, reason: &str) {
        let selector = format!("forebay_refusals_total{{reason=\"{reason}\"}}");
        self.wait_metric(&selector, |count| count >= 1.0);
        let all = self.metric("forebay_refusals_total");
        assert_eq!((self.metric(&selector), all), (1.0, 1.0), "one refusal, of `{reason}`");
    }

    /// Waits until an exchange is in this phase.
    fn wait_phase(&self, phase: Phase) {
        self.wait_metric(&format!("forebay_phase_active{{phase=\"{phase}\"}}"), |count| count >= 1.0);
    }

    /// Waits until the gateway is idle: no exchange, no spooled byte, no slow client.
    fn wait_at_rest(&self) {
        for gauge in AT_REST {
            self.wait_metric(gauge, |count| count == 0.0);
        }
    }

    /// Waits for this many lines in the access log, and returns all lines.
    fn log_lines(&self, count: usize) -> Vec<LogLine> {
        read_lines(&self.log_file(), count).iter().map(|line| LogLine::parse(line)).collect()
    }

    /// Waits for the first line of the access log.
    fn log_line(&self) -> LogLine {
        self.log_lines(1).remove(0)
    }

    /// Waits for a line of the access log with this status.
    fn log_line_of_status(&self, status: u64) -> LogLine {
        eventually(&format!("a log line with {status}"), || {
            self.log_lines(0).into_iter().find(|line| line.status() == status)
        })
    }

    /// Waits for a line of the access log with this target.
    fn log_line_of(&self, target: &str) -> LogLine {
        eventually(&format!("a log line of {target}"), || {
            self.log_lines(0).into_iter().find(|line| line.text("target") == target)
        })
    }
}

impl Watched for Gateway {
    fn admin_address(&self) -> SocketAddr {
        self.admin
    }

    fn log_file(&self) -> PathBuf {
        log_path(&self.dir)
    }
}

impl Watched for Process {
    fn admin_address(&self) -> SocketAddr {
        self.admin
    }

    fn log_file(&self) -> PathBuf {
        log_path(&self.dir)
    }
}

impl fmt::Display for LogLine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl LogLine {
    fn parse(line: &str) -> LogLine {
        let value = serde_json::from_str(line).unwrap_or_else(|e| panic!("`{line}` is no JSON: {e}"));
        LogLine { text: line.to_owned(), value }
    }

    /// A text field; empty if it is missing.
    pub fn text(&self, field: &str) -> &str {
        self.value[field].as_str().unwrap_or_default()
    }

    /// A numeric field.
    ///
    /// # Panics
    ///
    /// If it is missing.
    pub fn number(&self, field: &str) -> f64 {
        self.value[field].as_f64().unwrap_or_else(|| panic!("no number `{field}` in {}", self.text))
    }

    /// A field with several values; empty if it is missing.
    pub fn list(&self, field: &str) -> &[Value] {
        self.value[field].as_array().map_or(&[], Vec::as_slice)
    }

    /// Whether it has a field.
    pub fn has(&self, field: &str) -> bool {
        self.value.get(field).is_some()
    }

    /// The status sent to the client.
    pub fn status(&self) -> u64 {
        self.value["status"].as_u64().unwrap_or_else(|| panic!("no status in {}", self.text))
    }

    /// Why Forebay refused or cut the exchange; empty if it did not.
    pub fn reason(&self) -> &str {
        self.text("reason")
    }

    /// The milliseconds of a phase; `None` if it was never entered.
    pub fn phase(&self, phase: Phase) -> Option<f64> {
        self.value["phases"][phase.name()].as_f64()
    }

    /// The phases that were entered, in the order in which the line names them.
    pub fn phases(&self) -> Vec<Phase> {
        let start = self.text.find("\"phases\"").unwrap_or_else(|| panic!("no phases in {}", self.text));
        let mut found: Vec<(usize, Phase)> = Phase::ALL
            .into_iter()
            .filter_map(|phase| Some((self.text[start..].find(&format!("\"{phase}\":"))?, phase)))
            .collect();
        found.sort();
        found.into_iter().map(|(_, phase)| phase).collect()
    }
}

/// Waits for this many complete lines of a file, and returns all lines.
pub fn read_lines(file: &Path, count: usize) -> Vec<String> {
    eventually(&format!("{count} lines in the access log"), || {
        let text = fs::read_to_string(file).unwrap_or_default();
        let whole = text.rfind('\n').map_or("", |end| &text[..end]);
        let lines: Vec<String> = whole.lines().map(str::to_owned).collect();
        (lines.len() >= count).then_some(lines)
    })
}

/// Sets a value at a path of keys; creates missing maps.
fn put(at: &mut serde_yaml::Value, path: &[&str], value: serde_yaml::Value) {
    let Some((key, rest)) = path.split_first() else {
        *at = value;
        return;
    };
    if !at.is_mapping() {
        *at = serde_yaml::Value::Mapping(Default::default());
    }
    let map = at.as_mapping_mut().expect("a map");
    put(map.entry((*key).into()).or_insert(serde_yaml::Value::Null), rest, value);
}

fn log_path(dir: &TempDir) -> PathBuf {
    dir.path().join("access.log")
}

fn endpoints(addresses: &[impl ToString]) -> String {
    let written: Vec<String> =
        addresses.iter().map(|address| format!("{{ address: \"{}\" }}", address.to_string())).collect();
    written.join(", ")
}

fn joined(parts: &[&str]) -> String {
    parts.iter().filter(|part| !part.is_empty()).copied().collect::<Vec<_>>().join(", ")
}

fn add(to: &mut String, keys: &str) {
    *to = joined(&[to, keys]);
}

/// Reads standard error on a thread, so that the program never blocks on it, and shows it if the test fails.
fn collect(stderr: impl std::io::Read + Send + 'static, into: Arc<Mutex<String>>) {
    thread::spawn(move || {
        for line in BufReader::new(stderr).lines().map_while(Result::ok) {
            eprintln!("forebay: {line}");
            into.lock().unwrap().push_str(&(line + "\n"));
        }
    });
}

/// The address that the program announces: `listening listener=web address=127.0.0.1:43210`.
fn announced(child: &mut Child, stderr: &Mutex<String>, listener: &str) -> SocketAddr {
    eventually(&format!("the program to listen at `{listener}` within {DEADLINE:?}"), || {
        let said = stderr.lock().unwrap().clone();
        if let Some(status) = child.try_wait().expect("the state of the child") {
            panic!("the program ended with {status} before it listened:\n{said}");
        }
        address_told(&said, listener)
    })
}

/// The address in the announcement of a listener.
fn address_told(said: &str, listener: &str) -> Option<SocketAddr> {
    said.lines().find_map(|line| {
        let word = |key: &str| line.split_whitespace().find_map(|word| word.strip_prefix(key));
        let named = word("listener=")?.trim_matches('"') == listener;
        named.then(|| word("address=")?.trim_matches('"').parse().ok()).flatten()
    })
}
