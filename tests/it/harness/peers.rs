//! Other proxies in front of the same origin, for comparison: nginx and HAProxy.

use std::fs;
use std::net::SocketAddr;
use std::process::{Child, Command, Stdio};

use tempfile::TempDir;

use super::{end, listening};

/// A proxy that forwards everything to one origin over HTTP/1.1; it is killed on drop.
pub struct Peer {
    child: Child,
    address: SocketAddr,
    _dir: TempDir,
}

impl Peer {
    /// nginx with default response settings.
    pub fn nginx(origin: SocketAddr) -> Peer {
        Peer::start("/usr/sbin/nginx", &["-e", "stderr", "-c"], |dir, port| {
            let temporary: String = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
                .map(|kind| format!("{kind}_temp_path {dir}/{kind};"))
                .concat();
            format!(
                "daemon off; master_process off; pid {dir}/pid; error_log stderr crit; events {{}}
                 http {{ access_log off; {temporary}
                   server {{ listen 127.0.0.1:{port};
                     location / {{ proxy_pass http://{origin}; proxy_http_version 1.1; proxy_next_upstream off; }} }} }}"
            )
        })
    }

    /// HAProxy with default response settings.
    pub fn haproxy(origin: SocketAddr) -> Peer {
        Peer::start("/usr/sbin/haproxy", &["-q", "-db", "-f"], |_, port| {
            format!(
                "defaults\n mode http\n retries 0\n timeout connect 10s\n timeout client 10s\n timeout server 10s\n\
                 listen peer\n bind 127.0.0.1:{port}\n server origin {origin}\n"
            )
        })
    }

    fn start(program: &str, arguments: &[&str], config: impl Fn(&str, u16) -> String) -> Peer {
        let dir = tempfile::tempdir().expect("a directory");
        let (child, [address]) = listening(program, |[port]| {
            let file = dir.path().join("peer.conf");
            fs::write(&file, config(&dir.path().display().to_string(), port)).expect("its configuration");
            let log = fs::File::create(dir.path().join("log")).expect("its log");
            Command::new(program)
                .args(arguments)
                .arg(file)
                .stdout(Stdio::null())
                .stderr(log)
                .spawn()
                .unwrap_or_else(|error| panic!("{program}, which `make test` installs: {error}"))
        });
        Peer { child, address, _dir: dir }
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        end(&mut self.child);
    }
}
