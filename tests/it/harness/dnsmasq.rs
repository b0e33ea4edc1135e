//! A real DNS server, dnsmasq, with the records that a story sets.

use std::fs;
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

use super::{end, eventually, listening, listens};

/// A server for names below `test`; it is killed on drop.
pub struct Dnsmasq {
    child: Child,
    dir: TempDir,
    address: SocketAddr,
    services: Vec<String>,
}

impl Dnsmasq {
    /// A server with these lines in `/etc/hosts` format.
    pub fn knowing(hosts: &str) -> Dnsmasq {
        Dnsmasq::serving(hosts, &[])
    }

    /// The same with services: `name,host,port,priority,weight`. `empty.test` exists, but has no address.
    pub fn serving(hosts: &str, services: &[&str]) -> Dnsmasq {
        let (dir, services) =
            (tempfile::tempdir().expect("a directory"), services.iter().map(|it| format!("--srv-host={it}")));
        let services: Vec<String> = services.collect();
        put(dir.path(), hosts);
        let (child, [address]) = listening("dnsmasq", |[port]| spawn(dir.path(), port, &services));
        Dnsmasq { child, dir, address, services }
    }

    /// Where it is asked.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Replaces the records.
    pub fn tell(&self, hosts: &str) {
        put(self.dir.path(), hosts);
        kill_process(Pid::from_child(&self.child), Signal::HUP).expect("to tell it to read them");
    }

    /// Kills it.
    pub fn kill(&mut self) {
        end(&mut self.child);
    }

    /// Starts it again at the same address, with these lines.
    pub fn start_again(&mut self, hosts: &str) {
        put(self.dir.path(), hosts);
        eventually("dnsmasq to listen again", || {
            if self.child.try_wait().expect("the state of the child").is_some() {
                self.child = spawn(self.dir.path(), self.address.port(), &self.services);
            }
            listens(self.child.id(), self.address.port()).then_some(())
        });
    }
}

impl Drop for Dnsmasq {
    fn drop(&mut self) {
        end(&mut self.child);
    }
}

fn put(dir: &Path, hosts: &str) {
    fs::write(dir.join("hosts"), hosts).expect("a file of hosts");
}

fn spawn(dir: &Path, port: u16, services: &[String]) -> Child {
    let log = fs::File::create(dir.join("log")).expect("its log");
    Command::new("/usr/sbin/dnsmasq")
        .args([
            "--keep-in-foreground",
            "--conf-file=/dev/null",
            "--pid-file",
            "--user=",
            "--log-facility=-",
            "--local-ttl=0",
        ])
        .args(["--no-resolv", "--no-hosts", "--bind-interfaces", "--listen-address=127.0.0.1", "--local=/test/"])
        .arg("--txt-record=empty.test,there is this")
        .arg(format!("--addn-hosts={}", dir.join("hosts").display()))
        .arg(format!("--port={port}"))
        .args(services)
        .stdout(Stdio::null())
        .stderr(log)
        .spawn()
        .expect("dnsmasq, which `make test` installs")
}
