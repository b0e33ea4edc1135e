//! gRPC with its C core, which Python, C++, Ruby, PHP and C# use: a server and a client program in `tests/peers`.

use std::io::{BufRead, BufReader, Write};
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::thread;

use serde_json::{Value, json};

use super::secure::Identity;
use super::{DEADLINE, end};

/// Debian's Python, for which `make test` installs modules; another one may come first in `PATH`.
const PYTHON: &str = "/usr/bin/python3";

/// A program with a line-based protocol.
struct Peer {
    child: Child,
    stdin: ChildStdin,
    lines: Receiver<String>,
}

impl Peer {
    fn start(program: &str, arguments: &[&Path]) -> Peer {
        let program = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/peers").join(program);
        let mut child = Command::new(PYTHON)
            .arg(program)
            .args(arguments)
            // Proxy settings do not apply to loopback; fork support is off so that no thread is left behind.
            .envs([("no_proxy", "127.0.0.1"), ("GRPC_ENABLE_FORK_SUPPORT", "0"), ("PYTHONDONTWRITEBYTECODE", "1")])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("python3, which `make test` installs");
        let (stdin, stdout) = (child.stdin.take().expect("piped"), child.stdout.take().expect("piped"));
        let (sender, lines) = channel();
        thread::spawn(move || {
            BufReader::new(stdout).lines().map_while(Result::ok).try_for_each(|line| sender.send(line))
        });
        Peer { child, stdin, lines }
    }

    fn line(&self) -> String {
        self.lines.recv_timeout(DEADLINE).expect("a line of the peer; has it what it needs (python3-grpcio)?")
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        end(&mut self.child);
    }
}

/// A server of `test.Peer`.
pub struct GrpcServer {
    peer: Peer,
    address: SocketAddr,
}

impl GrpcServer {
    /// In clear text.
    pub fn start() -> GrpcServer {
        GrpcServer::with(&[])
    }

    /// Over TLS.
    pub fn secure(identity: &Identity) -> GrpcServer {
        GrpcServer::with(&[&identity.key, &identity.certificate])
    }

    fn with(arguments: &[&Path]) -> GrpcServer {
        let peer = Peer::start("grpc_server.py", arguments);
        let line = peer.line();
        let port = line.strip_prefix("listening on ").and_then(|port| port.parse().ok()).expect("its port");
        GrpcServer { peer, address: SocketAddr::from(([127, 0, 0, 1], port)) }
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Waits until it reports that a call of this method was cancelled.
    pub fn hears_of(&self, method: &str) {
        assert_eq!(self.peer.line(), format!("given up {method}"));
    }
}

/// A client with one channel.
pub struct GrpcClient(Peer);

impl GrpcClient {
    /// For the gateway at this address; it connects with its first call.
    pub fn to(gateway: SocketAddr) -> GrpcClient {
        GrpcClient(Peer::start("grpc_client.py", &[Path::new(&gateway.to_string())]))
    }

    /// Makes a call as described in `tests/peers/grpc_client.py`, and returns its result.
    pub fn ask(&mut self, ask: &Value) -> Value {
        self.begin(ask);
        self.outcome()
    }

    /// Starts a call without waiting for it.
    pub fn begin(&mut self, ask: &Value) {
        writeln!(self.0.stdin, "{ask}").expect("the client to listen");
    }

    /// The result of the started call.
    pub fn outcome(&mut self) -> Value {
        serde_json::from_str(&self.0.line()).expect("JSON")
    }

    /// One unary call of `Say`.
    pub fn say(&mut self, text: &str) -> Value {
        self.ask(&json!({ "call": "unary", "method": "/test.Peer/Say", "messages": [text] }))
    }
}
