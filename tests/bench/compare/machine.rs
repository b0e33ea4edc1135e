//! The machine of a run: its properties, the load of other programs, and the assignment of CPUs.

use std::ffi::OsStr;
use std::fs;
use std::io;
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::procfs;
use crate::proxies::Proxy;

/// The CPUs of a run: proxies, load and origin have one each if there are enough CPUs. Otherwise load and origin share
/// one, and on a machine with a single CPU all share it.
pub struct Machine {
    proxy_cpu: usize,
    load_cpu: usize,
    origin_cpu: usize,
    cores: usize,
}

impl Machine {
    /// Selects the first CPUs that this process may use, and raises the limit on open files as far as allowed.
    pub fn survey() -> Result<Machine> {
        allow_open_files().context("cannot raise the limit on open files")?;
        let status = fs::read_to_string("/proc/self/status")?;
        let cpus = procfs::allowed_cpus(&status).context("/proc/self/status names no CPUs")?;
        let proxy_cpu = *cpus.first().context("no CPU is allowed")?;
        let load_cpu = *cpus.get(1).unwrap_or(&proxy_cpu);
        Ok(Machine { proxy_cpu, load_cpu, origin_cpu: *cpus.get(2).unwrap_or(&load_cpu), cores: cpus.len() })
    }

    /// A command on the CPU of the proxies.
    pub fn proxy(&self, program: impl AsRef<OsStr>) -> Command {
        pinned(self.proxy_cpu, program)
    }

    /// A command on the CPU of the load.
    pub fn load(&self, program: impl AsRef<OsStr>) -> Command {
        pinned(self.load_cpu, program)
    }

    /// A command on the CPU of the origin.
    pub fn origin(&self, program: impl AsRef<OsStr>) -> Command {
        pinned(self.origin_cpu, program)
    }

    /// The place of the fast client.
    pub fn fast_client(&self) -> Place {
        Place { cpu: self.load_cpu, gives_way: false }
    }

    /// The place of the slow clients.
    pub fn slow_clients(&self) -> Place {
        Place { cpu: self.load_cpu, gives_way: true }
    }

    /// The properties that are shown above the figures and in the JSON.
    pub fn facts(&self, proxies: &[Proxy]) -> Result<Value> {
        let cpuinfo = fs::read_to_string("/proc/cpuinfo")?;
        let model = cpuinfo.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
        let mut versions = vec![format!("load: {}", said("wrk".as_ref(), "-v")?)];
        for proxy in proxies {
            let (program, question) = proxy.version();
            versions.push(format!("{}: {}", proxy.name, said(program, question)?));
        }
        Ok(json!({
            "cores": self.cores,
            "cpu": model.map_or("unknown", |(_, model)| model),
            "kernel": fs::read_to_string("/proc/sys/kernel/osrelease")?.trim(),
            "proxy_cpu": self.proxy_cpu,
            "load_cpu": self.load_cpu,
            "origin_cpu": self.origin_cpu,
            "versions": versions,
        }))
    }
}

/// `taskset` replaces itself by the program, so that the pid stays the same. Debian has nginx and haproxy in /usr/sbin,
/// which only root has in its path.
fn pinned(cpu: usize, program: impl AsRef<OsStr>) -> Command {
    let mut command = Command::new("taskset");
    command.args(["-c", &cpu.to_string()]).arg(program).env("PATH", path_with_sbin());
    command
}

fn path_with_sbin() -> String {
    format!("{}:/usr/sbin", std::env::var("PATH").unwrap_or_default())
}

/// The CPU of a thread of this process, and whether the thread has a lower priority there.
#[derive(Clone, Copy)]
pub struct Place {
    cpu: usize,
    gives_way: bool,
}

impl Place {
    /// Moves the calling thread to this place.
    pub fn take(self) -> io::Result<()> {
        // SAFETY: all zeros are a valid value: the empty set of bits.
        let mut cpus: libc::cpu_set_t = unsafe { std::mem::zeroed() };
        // SAFETY: sets a bit of a local variable; a CPU number beyond its end is a panic and no write.
        unsafe { libc::CPU_SET(self.cpu, &mut cpus) };
        // SAFETY: the pointer is to a local variable of the given size.
        if unsafe { libc::sched_setaffinity(0, size_of_val(&cpus), &cpus) } != 0 {
            return Err(io::Error::last_os_error());
        }
        if self.gives_way { lower_priority() } else { Ok(()) }
    }
}

/// Lowers the priority of the calling thread and of threads that it starts. The slow clients share a CPU with the fast
/// client, which must not wait for them, since the proxy is measured and not the clients.
fn lower_priority() -> io::Result<()> {
    // SAFETY: the call takes integers only.
    match unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, 10) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Gives this process the idle scheduling class, so that everything else on its CPU runs first. The origin of slow
/// clients uses it, since its threads would otherwise delay a fast client by milliseconds, independently of the proxy.
/// On an otherwise quiet machine, almost all of the CPU is still available.
pub fn give_way() -> io::Result<()> {
    let no_priority = libc::sched_param { sched_priority: 0 };
    // SAFETY: the pointer is to a local variable, which the kernel reads.
    match unsafe { libc::sched_setscheduler(0, libc::SCHED_IDLE, &no_priority) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// The first line that a program prints for its version, on stdout or stderr.
fn said(program: &OsStr, question: &str) -> Result<String> {
    let output = Command::new("env").arg(program).arg(question).env("PATH", path_with_sbin()).output()?;
    // 126 and 127 are from env: the program cannot be run, or does not exist.
    ensure!(
        !matches!(output.status.code(), Some(126 | 127)),
        "{} is not there or cannot be run. `make bench` installs nginx, haproxy and wrk and runs \
         `cargo build --release`; FOREBAY_BIN and FOREBAY_VARIANTS name other builds of Forebay",
        program.display()
    );
    let text = [output.stdout, output.stderr].concat();
    Ok(String::from_utf8_lossy(&text).lines().next().unwrap_or("says nothing").to_owned())
}

/// Raises the limit on open files. Open connections are files, here and in the proxies, which inherit the limit.
fn allow_open_files() -> io::Result<()> {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the pointer is to a local variable, which the kernel fills.
    if unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &mut limit) } != 0 {
        return Err(io::Error::last_os_error());
    }
    limit.rlim_cur = limit.rlim_max;
    // SAFETY: the pointer is to a local variable, which the kernel reads.
    if unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &limit) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// The load averages of the last 1, 5 and 15 minutes.
pub fn load_averages() -> Result<String> {
    let text = fs::read_to_string("/proc/loadavg")?;
    Ok(text.split_whitespace().take(3).collect::<Vec<_>>().join(" "))
}

/// The CPU time of programs outside of this run, which makes the figures noisy. The load average is unsuitable, since
/// it includes the run itself.
pub struct Noise {
    since: Instant,
    busy_seconds: f64,
    own_seconds: f64,
}

impl Noise {
    /// Starts the measurement. `servers_seconds`: CPU seconds that the servers of this run have used so far.
    pub fn listen(servers_seconds: f64) -> Result<Noise> {
        let (busy_seconds, own_seconds) = (busy_seconds()?, own_seconds()? + servers_seconds);
        Ok(Noise { since: Instant::now(), busy_seconds, own_seconds })
    }

    /// The average number of cores that other programs have used since then. `servers_seconds` as before.
    pub fn cores(&self, servers_seconds: f64) -> Result<f64> {
        let own = own_seconds()? + servers_seconds - self.own_seconds;
        let others = busy_seconds()? - self.busy_seconds - own;
        Ok(others.max(0.0) / self.since.elapsed().as_secs_f64())
    }
}

fn busy_seconds() -> Result<f64> {
    procfs::busy_seconds(&fs::read_to_string("/proc/stat")?).context("/proc/stat is not as proc(5) says")
}

/// CPU seconds of this process and of each wrk that it ran.
fn own_seconds() -> Result<f64> {
    let stat = fs::read_to_string("/proc/self/stat")?;
    procfs::cpu_seconds_with_children(&stat).context("/proc/self/stat is not as proc(5) says")
}
