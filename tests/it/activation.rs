//! Sockets that a service manager opens (`LISTEN_FDS`), with launchers that share no code with Forebay.

use std::net::{SocketAddr, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::{fs, thread};

use crate::harness::client::{Client, get};
use crate::harness::{Origin, Process, Setup, eventually, free_port};

/// A launcher: opens sockets (each a path or a loopback port), names them, and executes the program that follows.
const LAUNCHER: &str = r#"
import os, socket, sys
separator = sys.argv.index("--")
names, words = [], sys.argv[1:separator]
opened = []
for word in words:
    name, place = word.split("=", 1)
    if place.startswith("/"):
        one = socket.socket(socket.AF_UNIX)
        one.bind(place)
        os.chmod(place, 0o600)
    elif place == "udp":
        one = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        one.bind(("127.0.0.1", 0))
    elif place.startswith("any:"):
        one = socket.socket(socket.AF_INET6)
        one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        one.bind(("::", int(place[4:])))
    else:
        one = socket.socket()
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        one.bind(("127.0.0.1", int(place)))
    if place != "udp":
        one.listen(128)
    opened.append(os.dup(one.fileno()))
    names.append(name)
high = [os.dup2(fd, 100 + number, inheritable=False) for number, fd in enumerate(opened)]
for number, fd in enumerate(high):
    os.dup2(fd, 3 + number, inheritable=True)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS=str(len(high)), LISTEN_FDNAMES=":".join(names))
os.execv(sys.argv[separator + 1], sys.argv[separator + 1:])
"#;

/// A setup that is started with these sockets: `name=port`, `name=any:port` or `name=/path`.
pub fn activated(setup: &Setup, sockets: &[String]) -> Setup {
    let words: Vec<&str> = ["python3", "-c", LAUNCHER].into_iter().chain(sockets.iter().map(String::as_str)).collect();
    setup.clone().launched_by(&[&words[..], &["--"]].concat())
}

fn at(port: u16) -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], port))
}

/// A configuration whose listener `web` is at this address.
pub fn listening_at(origin: &Origin, address: &str) -> Setup {
    Setup::whole(&format!(
        "listeners: [ {{ name: web, address: '{address}' }} ]\n\
         upstreams: {{ app: {{ endpoints: [ {{ address: '{}' }} ] }} }}\n\
         routes: [ {{ name: all, upstream: app }} ]\n",
        origin.address()
    ))
}

fn reload(process: &Process) -> u16 {
    Client::connect(process.admin()).ask("POST", "/reload", "", "").status
}

#[test]
fn a_listener_takes_the_socket_at_its_address_whatever_its_name() {
    let origin = Origin::named("origin");
    let port = free_port();
    let setup = listening_at(&origin, &format!("127.0.0.1:{port}"));
    let process = activated(&setup, &[format!("something=any:{}", free_port()), format!("other={port}")]).spawn();
    assert_eq!(process.web(), at(port));
    assert_eq!(process.client().get("/").text(), "origin");
    process.says("no listener has the address of this socket");
    let descriptors = process.open_files();
    let listening = descriptors.iter().filter(|open| open.starts_with("socket:")).count();
    assert!(listening >= 3, "{descriptors:?}");
}

#[test]
fn one_socket_for_every_address_serves_a_listener_on_every_address_of_ipv4() {
    let origin = Origin::named("origin");
    let port = free_port();
    let setup = listening_at(&origin, &format!("0.0.0.0:{port}"));
    let _process = activated(&setup, &[format!("web=any:{port}")]).spawn();
    assert_eq!(get(at(port), "/").text(), "origin");
}

#[test]
fn a_listener_that_goes_and_comes_back_finds_its_socket_again() {
    let origin = Origin::named("origin");
    let port = free_port();
    let setup = Setup::before(&origin);
    let with_more = setup.clone().also_listener(&format!("{{ name: more, address: '127.0.0.1:{port}' }}"));
    let process = activated(&with_more, &[format!("more={port}")]).spawn();
    assert_eq!(get(at(port), "/").text(), "origin");
    setup.write();
    assert_eq!(reload(&process), 200);
    // The manager's socket stays open: a client waits until the listener exists again.
    let waiting = TcpStream::connect(at(port)).expect("a connection that waits");
    with_more.write();
    assert_eq!(reload(&process), 200);
    drop(waiting);
    assert_eq!(get(at(port), "/").text(), "origin");
}

#[test]
fn the_file_of_a_unix_socket_stays_as_the_manager_made_it() {
    let origin = Origin::named("origin");
    let setup = Setup::before(&origin);
    let path = setup.path("web.sock");
    let setup = setup.also_listener(&format!("{{ name: local, address: 'unix:{}', mode: 0666 }}", path.display()));
    let mut process = activated(&setup, &[format!("local={}", path.display())]).spawn();
    assert_eq!(Client::unix(&path).get("/").text(), "origin");
    assert_eq!(reload(&process), 200);
    let mode = |path: &Path| fs::metadata(path).expect("its file").permissions().mode() & 0o777;
    assert_eq!(mode(&path), 0o600);
    process.signal(libc::SIGTERM);
    assert_eq!(process.ended().code(), Some(0));
    assert!(path.exists(), "the manager listens there still");
}

#[test]
fn what_is_no_listening_socket_is_refused_at_start() {
    let origin = Origin::named("origin");
    let setup = Setup::before(&origin);
    setup.write();
    let output = activated(&setup, &["web=udp".to_owned()]).output(&["check"]);
    assert!(output.status.success(), "only `run` takes sockets");
    let output = activated(&setup, &["web=udp".to_owned()]).output(&["run"]);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && said.contains("it is not a stream socket"), "{said}");
}

#[test]
fn systemd_starts_it_with_the_first_connection() {
    let origin = Origin::named("origin");
    let port = free_port();
    let setup = listening_at(&origin, &format!("127.0.0.1:{port}"));
    let address = at(port).to_string();
    let activated = setup.launched_by(&["systemd-socket-activate", "-l", &address]);
    // The connection that triggers the start is the first one to be served.
    let first = thread::spawn(move || {
        eventually("systemd to listen", || TcpStream::connect(at(port)).ok());
        get(at(port), "/")
    });
    let _process = activated.spawn();
    assert_eq!(first.join().expect("an answer").text(), "origin");
}
