//! Upgrade: a new process takes over the sockets of a running one, and failures change nothing.

use std::collections::BTreeSet;
use std::fs;
use std::io::Read;
use std::net::{SocketAddr, TcpListener};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::Instant;

use forebay::gateway::handover::{Channel, FromNew, FromOld, Heard, VARIABLE, VERSION};
use forebay::phase::Phase;
use serde_json::Value;

use crate::activation::listening_at;
use crate::harness::client::{Client, get, request};
use crate::harness::gateway::Watched;
use crate::harness::origin::{Closed, built_in};
use crate::harness::{DEADLINE, Origin, Process, Setup, eventually, free_port, ms};
use crate::mix::{Mix, echoed, websocket};
use crate::stop::refuses;

const PROGRAM: &str = env!("CARGO_BIN_EXE_forebay");

/// Processes started after the story's own; they are killed with it.
#[derive(Default)]
struct Heirs(Vec<u64>);

impl Drop for Heirs {
    fn drop(&mut self) {
        for &pid in &self.0 {
            kill(pid, libc::SIGKILL);
        }
        // This also closes what they inherited, such as standard error.
        for &pid in &self.0 {
            let killed = Instant::now();
            while runs(pid) && killed.elapsed() < DEADLINE {
                thread::park_timeout(ms(5));
            }
        }
    }
}

impl Heirs {
    /// Makes the serving process start one that takes over; returns its PID.
    fn upgraded(&mut self, process: &Process) -> u64 {
        let (status, outcome) = upgrade(process, "/upgrade");
        assert_eq!((status, &outcome["result"]), (200, &"done".into()), "{outcome}");
        let pid = outcome["pid"].as_u64().expect("a number");
        self.0.push(pid);
        pid
    }
}

impl Heirs {
    /// Records the process that has taken over, from the log.
    fn noted(&mut self, process: &Process) {
        let said = eventually("the number of the process that has taken over", || {
            let stderr = process.stderr();
            let line = stderr.lines().find(|line| line.contains("another process has taken over"))?;
            line.split_whitespace().find_map(|word| word.strip_prefix("pid=")?.parse().ok())
        });
        self.0.push(said);
    }
}

fn kill(pid: u64, signal: i32) {
    let pid = i32::try_from(pid).expect("the number of a process");
    // SAFETY: kill has no memory effects. The process may have ended, and then nothing happens: its number is not
    // reused so soon.
    unsafe { libc::kill(pid, signal) };
}

/// Requests an upgrade; returns the status and the result.
fn upgrade(process: &Process, target: &str) -> (u16, Value) {
    let answer = Client::connect(process.admin()).ask("POST", target, "", "");
    (answer.status, answer.json())
}

/// A program that runs these shell lines.
fn script(setup: &Setup, lines: &str) -> PathBuf {
    let path = setup.path("script");
    fs::write(&path, format!("#!/bin/sh\n{lines}\n")).expect("a file");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).expect("a mode");
    path
}

fn with_binary(path: &Path) -> String {
    format!("/upgrade?binary={}", path.display())
}

/// Whether a process is still running; a zombie is not.
fn runs(pid: u64) -> bool {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    status.lines().any(|line| line.starts_with("State:") && !line.contains('Z'))
}

/// Waits until a process has ended.
pub fn ends(pid: u64) {
    eventually(&format!("process {pid} to end"), || (!runs(pid)).then_some(()));
}

/// The child processes of this one, and their children.
fn descendants(pid: u64) -> BTreeSet<u64> {
    let mut found = BTreeSet::from([pid]);
    loop {
        let before = found.len();
        for entry in fs::read_dir("/proc").expect("processes").flatten() {
            let stat = fs::read_to_string(entry.path().join("stat")).unwrap_or_default();
            let parent = stat.rsplit(')').next().and_then(|rest| rest.split_whitespace().nth(1)?.parse().ok());
            if let (Some(parent), Ok(own)) = (parent, entry.file_name().to_string_lossy().parse())
                && found.contains(&parent)
            {
                found.insert(own);
            }
        }
        if found.len() == before {
            found.remove(&pid);
            return found;
        }
    }
}

/// Asserts that nothing has changed: the process serves, counts this failure, and is ready.
fn serves_on(process: &Process, result: &str, count: f64) {
    assert_eq!(process.client().get("/").status, 200);
    assert_eq!(get(process.admin(), "/readyz").status, 200);
    let selector = format!("forebay_upgrades_total{{result=\"{result}\"}}");
    assert_eq!((process.metric(&selector), process.metric("forebay_upgrade_failed")), (count, 1.0));
    process.says("the upgrade failed, and this process continues");
}

#[test]
fn twenty_upgrades_in_a_row_are_noticed_by_no_client() {
    let mix = Mix::new();
    let setup = mix.setup();
    let process = setup.spawn();
    let secure = process.listens("secure");
    let mut heirs = Heirs::default();
    mix.ask_while(&setup, process.web(), secure, |progress| {
        for _ in 0..20 {
            heirs.upgraded(&process);
            progress.wait_for_more(20);
        }
        progress.wait_for_each(2);
    });
    assert_eq!(process.metric("forebay_upgrades_total{result=\"done\"}"), 20.0, "it goes on from process to process");
    let done: BTreeSet<u64> = heirs.0.iter().copied().collect();
    assert_eq!(done.len(), 20);
    let last = heirs.0[19];
    for &pid in &heirs.0[..19] {
        ends(pid);
    }
    process.wait_metric("forebay_upgrade_draining_processes", |count| count == 0.0);
    assert!(runs(last));
    let lines = process.log_lines(0);
    assert!(lines.len() > 200, "{} lines", lines.len());
    for line in lines {
        assert!(line.reason().is_empty() && [101, 200].contains(&line.status()), "{line:?}");
    }
}

#[test]
fn a_kept_connection_is_served_once_more_and_a_new_one_goes_to_the_new_process() {
    let origin = Origin::named("origin");
    let setup = Setup::before(&origin).server("threads: 1, shutdown: { deadline: 10m }, upgrade: { idle: 10m }");
    let mut process = setup.spawn();
    let mut kept = process.client();
    let mut admin = Client::connect(process.admin());
    assert_ne!(kept.get("/").value("connection"), Some("close"));
    assert_eq!(admin.get("/readyz").status, 200);
    let mut heirs = Heirs::default();
    let pid = heirs.upgraded(&process);
    process.says("leaving new connections to the other process");
    // A load balancer with an open connection must not consider the address down.
    let ready = admin.get("/readyz");
    assert_eq!((ready.status, ready.text()), (200, "ready\n"));
    admin.closed();
    let last = kept.get("/");
    assert_eq!((last.status, last.value("connection")), (200, Some("close")));
    kept.closed();
    assert_eq!(process.ended().code(), Some(0));
    assert!(runs(pid));
    assert_eq!(process.client().get("/").text(), "origin");
    assert_eq!(process.metric("forebay_config_generation"), 1.0);
    process.wait_metric("forebay_upgrade_draining_processes", |count| count == 0.0);
}

#[test]
fn what_is_under_way_ends_in_the_old_process_and_survives_until_its_deadline() {
    let origin = built_in();
    let setup = Setup::before_all(&[origin.address().to_string()]);
    let setup = setup.server("threads: 1, shutdown: { deadline: 3s }, upgrade: { idle: 0s }");
    let mut process = setup.spawn();
    let mut socket = websocket(process.web());
    let mut heirs = Heirs::default();
    heirs.upgraded(&process);
    echoed(&mut socket);
    assert!(process.runs());
    assert_eq!(process.metric("forebay_upgrade_draining_processes"), 1.0);
    socket.rest();
    let line = process.log_line_of("/websocket");
    assert_eq!((line.status(), line.reason()), (101, "finish.shutdown"));
    process.says("the deadline is over; the rest is cut");
    assert_eq!(process.ended().code(), Some(0));
    assert_eq!(get(process.web(), "/bytes/10").body.len(), 10);
}

#[test]
fn the_new_process_has_the_new_configuration_and_the_old_ends_its_requests_by_the_old() {
    let (old, new) = (Origin::scripted(), Origin::named("new"));
    let process = Setup::before(&old).spawn();
    let mut client = process.client();
    client.send(request("GET", "/", "", ""));
    let mut connection = old.accept();
    connection.request();
    process.wait_phase(Phase::Wait);
    Setup::before(&new).in_place_of(&process).server("threads: 2").write();
    let mut heirs = Heirs::default();
    heirs.upgraded(&process);
    assert_eq!(process.client().get("/").text(), "new");
    assert_eq!(process.metric("forebay_workers"), 2.0, "what only a new process can change has changed");
    connection.answer("from the old one");
    assert_eq!(client.response().text(), "from the old one");
}

#[test]
fn a_program_that_ends_at_once_changes_nothing() {
    let origin = Origin::named("origin");
    let setup = Setup::before(&origin);
    let process = setup.spawn();
    for (number, lines) in ["exit 1", "kill -SEGV $$"].into_iter().enumerate() {
        let (status, outcome) = upgrade(&process, &with_binary(&script(&setup, lines)));
        assert_eq!((status, &outcome["result"]), (502, &"failed".into()), "{outcome}");
        let why = outcome["error"].as_str().expect("a reason");
        assert!(why.contains(["exit status: 1", "signal: 11"][number]), "{why}");
        assert!(why.contains("before it was started"), "{why}");
        serves_on(&process, "failed", number as f64 + 1.0);
    }
    let (status, outcome) = upgrade(&process, "/upgrade?binary=/no/such/program");
    assert_eq!(status, 502, "{outcome}");
    assert!(outcome["error"].as_str().is_some_and(|why| why.contains("cannot be started")), "{outcome}");
    let mut heirs = Heirs::default();
    heirs.upgraded(&process);
    assert_eq!(process.metric("forebay_upgrade_failed"), 0.0);
    assert_eq!(process.metric("forebay_upgrades_total{result=\"failed\"}"), 3.0, "the count goes on");
}

#[test]
fn a_program_that_hangs_is_ended_at_the_deadline_with_all_that_it_has_started() {
    let origin = Origin::named("origin");
    let setup = Setup::before(&origin).server("threads: 1, upgrade: { deadline: 1s }");
    let process = setup.spawn();
    let pids = setup.path("pids");
    let hangs = script(&setup, &format!("sleep 1000 & echo $$ $! > {}; wait", pids.display()));
    let (status, outcome) = upgrade(&process, &with_binary(&hangs));
    assert_eq!((status, &outcome["result"]), (504, &"timed_out".into()), "{outcome}");
    assert!(outcome["error"].as_str().is_some_and(|why| why.contains("server.upgrade.deadline")), "{outcome}");
    serves_on(&process, "timed_out", 1.0);
    let pids = fs::read_to_string(pids).expect("its numbers");
    for pid in pids.split_whitespace() {
        ends(pid.parse().expect("a number"));
    }
}

#[test]
fn a_file_that_is_refused_is_told_as_check_tells_it() {
    let origin = Origin::named("origin");
    let setup = Setup::before(&origin);
    let process = setup.spawn();
    let file = setup.path("forebay.yaml");
    for (number, (text, told)) in
        [(setup.yaml().replace("routes:", "ruotes:"), "did you mean `routes`?"), ("#".repeat(50 << 20), "larger than")]
            .into_iter()
            .enumerate()
    {
        fs::write(&file, text).expect("a file");
        let (status, outcome) = upgrade(&process, "/upgrade");
        assert_eq!((status, &outcome["result"]), (422, &"refused".into()), "{outcome}");
        assert!(outcome["report"].as_str().is_some_and(|report| report.contains(told)), "{outcome}");
        serves_on(&process, "refused", number as f64 + 1.0);
    }
    fs::remove_file(&file).expect("to remove the file");
    assert_eq!(upgrade(&process, "/upgrade").0, 422);
    assert_eq!(process.client().get("/").text(), "origin");
    setup.write();
    Heirs::default().upgraded(&process);
}

#[test]
fn a_listener_that_cannot_be_bound_leaves_the_old_process_with_all_its_sockets() {
    let origin = Origin::named("origin");
    let taken = TcpListener::bind("127.0.0.1:0").expect("a socket");
    let address = taken.local_addr().expect("its address");
    let setup = Setup::before(&origin);
    let unix = setup.path("web.sock");
    let setup = setup.also_listener(&format!("{{ name: local, address: \"unix:{}\" }}", unix.display()));
    let process = setup.spawn();
    setup.clone().also_listener(&format!("{{ name: more, address: \"{address}\" }}")).write();
    let (status, outcome) = upgrade(&process, "/upgrade");
    assert_eq!((status, &outcome["result"]), (502, &"failed".into()), "{outcome}");
    let why = outcome["error"].as_str().expect("a reason");
    assert!(why.contains("listener more") && why.contains("address already in use"), "{why}");
    serves_on(&process, "failed", 1.0);
    assert_eq!(Client::unix(&unix).get("/").text(), "origin");
    drop(taken);
    let mut heirs = Heirs::default();
    heirs.upgraded(&process);
    assert_eq!(get(address, "/").text(), "origin");
    assert_eq!(Client::unix(&unix).get("/").text(), "origin");
}

#[test]
fn a_second_upgrade_is_refused_while_one_is_under_way_and_so_is_one_of_a_process_that_stops() {
    let origin = Origin::scripted();
    let setup = Setup::before(&origin).server("threads: 1, shutdown: { deadline: 10m }");
    let mut process = setup.spawn();
    let pid = setup.path("pid");
    let hangs = script(&setup, &format!("echo $$ > {}; exec sleep 1000", pid.display()));
    thread::scope(|scope| {
        let first = scope.spawn(|| upgrade(&process, &with_binary(&hangs)));
        let read = || fs::read_to_string(&pid).ok()?.trim().parse::<u64>().ok();
        let hanging = eventually("the program to start", read);
        let (status, outcome) = upgrade(&process, "/upgrade");
        assert_eq!((status, &outcome["result"]), (409, &"denied".into()), "{outcome}");
        assert_eq!(outcome["error"], "another upgrade is under way");
        kill(hanging, libc::SIGKILL);
        let (status, outcome) = first.join().expect("an answer");
        assert_eq!(status, 502, "{outcome}");
        assert!(outcome["error"].as_str().is_some_and(|why| why.contains("signal: 9")), "{outcome}");
    });
    let mut client = process.client();
    client.send(request("GET", "/", "", ""));
    let mut connection = origin.accept();
    connection.request();
    // A stop kills the new process in any state.
    fs::remove_file(&pid).expect("a file");
    let admin = process.admin();
    thread::scope(|scope| {
        let ask = with_binary(&hangs);
        scope.spawn(move || {
            let mut client = Client::connect(admin);
            client.send(format!("POST {ask} HTTP/1.1\r\nHost: test\r\nContent-Length: 0\r\n\r\n"));
            client.rest();
        });
        let read = || fs::read_to_string(&pid).ok()?.trim().parse::<u64>().ok();
        let hanging = eventually("the program to start", read);
        process.signal(libc::SIGTERM);
        ends(hanging);
        eventually("it to stop", || (get(admin, "/readyz").status == 503).then_some(()));
        let (status, outcome) = upgrade(&process, "/upgrade");
        assert_eq!((status, &outcome["error"]), (409, &"this process stops".into()), "{outcome}");
        connection.answer("done");
        assert_eq!(client.response().text(), "done");
    });
    assert_eq!(process.ended().code(), Some(0));
}

/// Writes a configuration with an endpoint that never responds: a new process waits a while for its first check.
fn keep_from_being_ready(setup: &Setup, silent: &Closed) {
    let health = "health_check: { http: { path: / }, interval: 60s, timeout: 30s }";
    let keys = format!("{health}, endpoints: [ {{ address: \"{}\" }} ]", silent.address());
    setup
        .clone()
        .also_upstream("silent", &keys)
        .also_route("{ name: silent, match: { path: { exact: /silent } }, upstream: silent }")
        .write();
}

#[test]
fn a_new_process_that_is_killed_before_it_is_ready_changes_nothing() {
    let origin = Origin::named("origin");
    let silent = Closed::silent();
    let setup = Setup::before(&origin);
    let process = setup.spawn();
    keep_from_being_ready(&setup, &silent);
    thread::scope(|scope| {
        let asked = scope.spawn(|| upgrade(&process, "/upgrade"));
        let heir = eventually("the new process to fork", || {
            let found = descendants(process.pid());
            (found.len() == 2).then(|| found.into_iter().max()).flatten()
        });
        eventually("it to have all sockets", || {
            (process.stderr().matches("forebay starts").count() == 2).then_some(())
        });
        kill(heir, libc::SIGKILL);
        let (status, outcome) = asked.join().expect("an answer");
        assert_eq!((status, &outcome["result"]), (502, &"failed".into()), "{outcome}");
        assert!(outcome["error"].as_str().is_some_and(|why| why.contains("exit status: 137")), "{outcome}");
    });
    serves_on(&process, "failed", 1.0);
    assert_eq!(descendants(process.pid()).len(), 0);
    setup.write();
    Heirs::default().upgraded(&process);
}

#[test]
fn a_new_process_that_is_stopped_before_it_is_ready_leaves_the_sockets_to_the_old_one() {
    let origin = Origin::named("origin");
    let silent = Closed::silent();
    let setup = Setup::before(&origin);
    let (unix, pids) = (setup.path("web.sock"), setup.path("forebay.pid"));
    let setup = setup
        .also_listener(&format!("{{ name: local, address: \"unix:{}\" }}", unix.display()))
        .server(&format!("threads: 1, pid_file: \"{}\"", pids.display()));
    let process = setup.spawn();
    keep_from_being_ready(&setup, &silent);
    thread::scope(|scope| {
        let asked = scope.spawn(|| upgrade(&process, "/upgrade"));
        eventually("the new process to have all sockets", || {
            (process.stderr().matches("forebay starts").count() == 2).then_some(())
        });
        let heir = descendants(process.pid()).into_iter().max().expect("the new process");
        kill(heir, libc::SIGTERM);
        let (status, outcome) = asked.join().expect("an answer");
        assert_eq!((status, &outcome["result"]), (502, &"failed".into()), "{outcome}");
    });
    serves_on(&process, "failed", 1.0);
    assert_eq!(Client::unix(&unix).get("/").text(), "origin");
    assert_eq!(fs::read_to_string(&pids).expect("a number").trim(), process.pid().to_string());
}

#[test]
fn a_new_process_that_ends_at_any_step_changes_nothing() {
    let origin = Origin::named("origin");
    let setup = Setup::before(&origin);
    let pids = setup.path("forebay.pid");
    let setup = setup.server(&format!("threads: 1, pid_file: \"{}\"", pids.display()));
    let process = setup.spawn();
    // A program that follows the protocol and exits after the step in its name.
    let speaks = |last: &str| {
        let path = setup.path(last);
        let program = format!(
            "#!/usr/bin/python3\n\
             import json, os, socket\n\
             old = socket.socket(fileno=0)\n\
             def say(**what):\n    old.send(json.dumps(what).encode())\n    what['says'] == '{last}' and os._exit(3)\n\
             def hear(what):\n    \
                 while json.loads(socket.recv_fds(old, 1 << 18, 64)[0])['says'] != what: pass\n    \
                 what == '{last}' and os._exit(3)\n\
             say(says='here', pid=os.getpid(), version='0')\n\
             hear('all')\n\
             say(says='ready')\n\
             hear('go')\n\
             open('{}', 'w').write(str(os.getpid()))\n\
             say(says='nonsense')\n",
            pids.display()
        );
        fs::write(&path, program).expect("a file");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).expect("a mode");
        path
    };
    for (number, (last, told)) in
        [("here", "ended with exit status: 3"), ("all", "before it was ready"), ("go", "accepting"), ("none", "spoken")]
            .into_iter()
            .enumerate()
    {
        let (status, outcome) = upgrade(&process, &with_binary(&speaks(last)));
        assert_eq!((status, &outcome["result"]), (502, &"failed".into()), "{last}: {outcome}");
        assert!(outcome["error"].as_str().is_some_and(|why| why.contains(told)), "{last}: {outcome}");
        serves_on(&process, "failed", number as f64 + 1.0);
        assert_eq!(fs::read_to_string(&pids).expect("a number").trim(), process.pid().to_string(), "{last}");
        assert_eq!(descendants(process.pid()).len(), 0, "{last}");
    }
    Heirs::default().upgraded(&process);
}

#[test]
fn a_new_process_that_is_stopped_as_soon_as_it_serves_drains() {
    let origin = Origin::scripted();
    let web = SocketAddr::from(([127, 0, 0, 1], free_port()));
    let setup = listening_at(&origin, &web.to_string());
    setup.write();
    let (old, end) = Channel::pair().expect("a pair");
    let mut first_half = Command::new(PROGRAM)
        .arg("run")
        .arg("-c")
        .arg(setup.path("forebay.yaml"))
        .stdin(Stdio::from(end.into_fd()))
        .stderr(Stdio::null())
        .stdout(Stdio::null())
        .env(VARIABLE, VERSION)
        .spawn()
        .expect("the program");
    let heard = || match old.hear::<FromNew>(Instant::now() + DEADLINE) {
        Ok(Heard::Message(message, _)) => message,
        other => panic!("{other:?}"),
    };
    let FromNew::Here { pid, .. } = heard() else { panic!("another word") };
    let _heirs = Heirs(vec![pid.into()]);
    let all = FromOld::All { version: "0".to_owned(), counted: Vec::new() };
    old.say(&all, &[], DEADLINE).expect("room");
    assert_eq!(heard(), FromNew::Ready);
    old.say(&FromOld::Go, &[], DEADLINE).expect("room");
    assert_eq!(heard(), FromNew::Begun);
    first_half.wait().expect("its end");
    let mut client = Client::connect(web);
    client.send(request("GET", "/", "", ""));
    let mut connection = origin.accept();
    connection.request();
    // SIGTERM comes before the last message of the old process.
    kill(pid.into(), libc::SIGTERM);
    refuses(web);
    connection.answer("served");
    assert_eq!(client.response().text(), "served");
    drop(old);
    ends(pid.into());
}

#[test]
fn the_addresses_are_free_once_the_new_process_has_ended() {
    let origin = built_in();
    let setup = Setup::before_all(&[origin.address().to_string()]);
    let process = setup.server("threads: 1, shutdown: { deadline: 10m }, upgrade: { idle: 0s }").spawn();
    let mut socket = websocket(process.web());
    let mut heirs = Heirs::default();
    let heir = heirs.upgraded(&process);
    kill(heir, libc::SIGKILL);
    ends(heir);
    refuses(process.web());
    refuses(process.admin());
    echoed(&mut socket);
}

#[test]
fn a_new_program_inherits_the_standard_streams_and_nothing_more() {
    let origin = Origin::named("origin");
    let setup = Setup::before(&origin);
    let process = setup.spawn();
    let _kept = process.client().get("/");
    let open = setup.path("open");
    let lists = format!("exec > {}\nfor one in /proc/$$/fd/*; do echo ${{one##*/}}; done\nexit 1", open.display());
    let program = script(&setup, &lists);
    let further = || -> Vec<String> {
        let listed = fs::read_to_string(&open).expect("a list");
        listed.lines().filter(|number| !["0", "1", "2"].contains(number)).map(str::to_owned).collect()
    };
    // The descriptors that every child of this process inherits.
    assert_eq!(Command::new(&program).status().expect("a program").code(), Some(1));
    let before = further();
    assert_eq!(upgrade(&process, &with_binary(&program)).0, 502);
    assert_eq!(further(), before);
}

#[test]
fn no_upgrade_is_begun_while_as_many_older_processes_drain_as_there_may_be() {
    let origin = built_in();
    let setup = Setup::before_all(&[origin.address().to_string()]);
    let setup = setup.server("threads: 1, shutdown: { deadline: 10m }, upgrade: { idle: 0s, processes: 1 }");
    let process = setup.spawn();
    let socket = websocket(process.web());
    let mut heirs = Heirs::default();
    heirs.upgraded(&process);
    let (status, outcome) = upgrade(&process, "/upgrade");
    assert_eq!((status, &outcome["result"]), (409, &"denied".into()), "{outcome}");
    assert!(outcome["error"].as_str().is_some_and(|why| why.contains("server.upgrade.processes is 1")), "{outcome}");
    drop(socket);
    process.wait_metric("forebay_upgrade_draining_processes", |count| count == 0.0);
    heirs.upgraded(&process);
}

#[test]
fn the_new_process_serves_on_if_the_old_one_is_killed_while_it_drains() {
    let origin = Origin::scripted();
    let setup = Setup::before(&origin).server("threads: 1, shutdown: { deadline: 10m }");
    let mut process = setup.spawn();
    let mut client = process.client();
    client.send(request("GET", "/", "", ""));
    let mut connection = origin.accept();
    connection.request();
    let mut heirs = Heirs::default();
    heirs.upgraded(&process);
    assert_eq!(process.metric("forebay_upgrade_draining_processes"), 1.0);
    process.signal(libc::SIGKILL);
    process.ended();
    process.wait_metric("forebay_upgrade_draining_processes", |count| count == 0.0);
    process.says("an older process has ended");
    let mut next = process.client();
    next.send(request("GET", "/", "", ""));
    let mut connection = origin.accept();
    connection.request();
    connection.answer("served");
    assert_eq!(next.response().text(), "served");
}

#[test]
fn the_file_of_a_unix_socket_outlives_the_old_process_and_goes_with_its_listener() {
    let origin = Origin::named("origin");
    let setup = Setup::before(&origin);
    let (stays, goes) = (setup.path("stays.sock"), setup.path("goes.sock"));
    let unix = |name: &str, path: &Path, mode| {
        format!("{{ name: {name}, address: \"unix:{}\", mode: {mode} }}", path.display())
    };
    let mut process = setup
        .clone()
        .also_listener(&unix("stays", &stays, "0600"))
        .also_listener(&unix("goes", &goes, "0600"))
        .also_listener("{ name: more, address: \"127.0.0.1:0\" }")
        .spawn();
    let more = process.listens("more");
    let mut heirs = Heirs::default();
    let first = heirs.upgraded(&process);
    assert_eq!(process.ended().code(), Some(0));
    for path in [&stays, &goes] {
        assert_eq!(Client::unix(path).get("/").text(), "origin");
    }
    setup.also_listener(&unix("stays", &stays, "0666")).write();
    let second = heirs.upgraded(&process);
    ends(first);
    eventually("the file that no listener has any more to go", || (!goes.exists()).then_some(()));
    refuses(more);
    assert_eq!(Client::unix(&stays).get("/").text(), "origin");
    assert_eq!(fs::metadata(&stays).expect("its file").permissions().mode() & 0o777, 0o666);
    kill(second, libc::SIGTERM);
    ends(second);
    assert!(!stays.exists(), "it goes with the last process");
}

#[test]
fn the_pid_file_names_the_process_that_serves() {
    let origin = Origin::named("origin");
    let setup = Setup::before(&origin);
    let file = setup.path("forebay.pid");
    let setup = setup.server(&format!("threads: 1, pid_file: \"{}\"", file.display()));
    let mut process = setup.spawn();
    let written = || fs::read_to_string(&file).ok().and_then(|text| text.trim().parse::<u64>().ok());
    assert_eq!(written(), Some(process.pid()));
    let (status, _) = upgrade(&process, "/upgrade?binary=/bin/false");
    assert_eq!((status, written()), (502, Some(process.pid())));
    let mut heirs = Heirs::default();
    let heir = heirs.upgraded(&process);
    assert_eq!(process.ended().code(), Some(0));
    assert_eq!(written(), Some(heir));
    kill(heir, libc::SIGTERM);
    ends(heir);
    assert!(!file.exists());
}

#[test]
fn a_signal_starts_what_is_at_the_path_now_and_the_command_line_tells_what_came_of_it() {
    let origin = Origin::named("origin");
    let setup = Setup::before(&origin);
    let link = setup.path("forebay");
    symlink(PROGRAM, &link).expect("a link");
    let process = setup.clone().started_from(&link).spawn();
    let marker = setup.path("marker");
    let next = script(&setup, &format!("echo $$ > {}; exec {PROGRAM} \"$@\"", marker.display()));
    fs::remove_file(&link).expect("the link");
    symlink(&next, &link).expect("a link");
    process.signal(libc::SIGUSR2);
    process.says("this process has taken over");
    let mut heirs = Heirs::default();
    heirs.noted(&process);
    assert!(marker.exists(), "the new program was started");
    let status = get(process.admin(), "/status").json();
    assert_eq!(status["state"], "ready");

    let asked = |arguments: &[&str]| {
        let mut command = std::process::Command::new(PROGRAM);
        command.arg("upgrade").args(arguments).arg("--admin").arg(process.admin().to_string());
        let output = command.output().expect("the program");
        let text = |bytes| String::from_utf8(bytes).expect("text");
        (output.status.code(), text(output.stdout), text(output.stderr))
    };
    let (code, told, _) = asked(&["--binary", PROGRAM]);
    assert_eq!(code, Some(0), "{told}");
    let pid = told.strip_prefix("process ").and_then(|rest| rest.split(' ').next()?.parse().ok());
    heirs.0.push(pid.unwrap_or_else(|| panic!("no number in {told}")));
    assert!(told.ends_with(") has taken over\n"), "{told}");
    let (code, _, told) = asked(&["--binary", "/bin/false"]);
    assert!(code == Some(1) && told.contains("ended with exit status: 1"), "{told}");
    fs::write(setup.path("forebay.yaml"), "listeners: [").expect("a file");
    let (code, _, told) = asked(&[]);
    assert!(code == Some(78) && told.contains("forebay.yaml"), "{told}");
    let (code, _, told) = asked(&["--binary", "/no/such/program"]);
    assert!(code == Some(1) && told.contains("no such file"), "{told}");
}

#[test]
fn sockets_of_a_service_manager_go_from_process_to_process() {
    let origin = Origin::named("origin");
    let port = free_port();
    let setup = Setup::before(&origin);
    let with_more = setup.clone().also_listener(&format!("{{ name: more, address: '127.0.0.1:{port}' }}"));
    let mut process = crate::activation::activated(&with_more, &[format!("more={port}")]).spawn();
    let at = SocketAddr::from(([127, 0, 0, 1], port));
    let mut heirs = Heirs::default();
    for yaml in [&with_more, &setup, &with_more] {
        yaml.write();
        heirs.upgraded(&process);
    }
    process.ended();
    assert_eq!(get(at, "/").text(), "origin");
}

#[test]
fn another_program_is_started_for_its_own_user_only() {
    let origin = Origin::named("origin");
    let process = Setup::before(&origin).spawn();
    // SAFETY: it has no arguments and cannot fail.
    if unsafe { libc::geteuid() } != 0 {
        // Only root can send requests as another user.
        return;
    }
    let ask = format!(
        "import socket; s = socket.create_connection(('127.0.0.1', {})); \
         s.sendall(b'POST /upgrade?binary=/bin/true HTTP/1.1\\r\\nHost: localhost\\r\\nConnection: close\\r\\nContent-Length: 0\\r\\n\\r\\n'); \
         print(s.makefile().read())",
        process.admin().port()
    );
    let mut asked = std::process::Command::new("setpriv")
        .args(["--reuid=65534", "--regid=65534", "--clear-groups", "/usr/bin/python3", "-c", &ask])
        .stdout(std::process::Stdio::piped())
        .spawn()
        .expect("setpriv, of util-linux");
    let mut told = String::new();
    asked.stdout.take().expect("piped").read_to_string(&mut told).expect("text");
    asked.wait().expect("its end");
    assert!(told.contains(" 409 ") && told.contains("for its own user and for root only"), "{told}");
    assert_eq!(process.metric("forebay_upgrades_total"), 0.0, "nothing was tried");
}
