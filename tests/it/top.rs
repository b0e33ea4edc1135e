//! `forebay top` in a real terminal: tmux runs it, sends keys, and returns the screen.

use std::net::SocketAddr;
use std::process::{Command, Output};

use tempfile::TempDir;

use crate::harness::client::get;
use crate::harness::{Origin, Setup, eventually, free_port, ms};

const PROGRAM: &str = env!("CARGO_BIN_EXE_forebay");

/// A terminal in which a program runs.
struct Screen {
    dir: TempDir,
}

impl Screen {
    fn running(width: u16, height: u16, command: &str) -> Screen {
        let screen = Screen { dir: tempfile::tempdir().expect("a directory") };
        let (width, height) = (width.to_string(), height.to_string());
        // The shell stays open after the program ends, with its output and exit code.
        let shell = format!("{command}; echo exit code $?; exec sleep 60");
        let started = screen.tmux(&["-f", "/dev/null", "new-session", "-d", "-x", &width, "-y", &height, &shell]);
        assert!(started.status.success(), "tmux: {}", String::from_utf8_lossy(&started.stderr));
        screen
    }

    fn tmux(&self, arguments: &[&str]) -> Output {
        let socket = self.dir.path().join("tmux");
        let mut command = Command::new("tmux");
        command.arg("-S").arg(socket).args(arguments).env("TERM", "xterm-256color").env("LC_ALL", "C.UTF-8");
        command.env_remove("TMUX").output().expect("tmux: conf/packaging/install-tools.sh test")
    }

    fn text(&self) -> String {
        String::from_utf8(self.tmux(&["capture-pane", "-p"]).stdout).expect("UTF-8")
    }

    fn keys(&self, keys: &[&str]) {
        let arguments: Vec<&str> = ["send-keys"].iter().chain(keys).copied().collect();
        assert!(self.tmux(&arguments).status.success());
    }

    /// Waits until this text is on the screen.
    fn shows(&self, what: &str) -> String {
        eventually(&format!("`{what}` on the screen"), || {
            let text = self.text();
            text.contains(what).then_some(text)
        })
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        self.tmux(&["kill-server"]);
    }
}

fn top(admin: SocketAddr) -> String {
    format!("{PROGRAM} top --interval 200ms --admin {admin}")
}

#[test]
fn top_shows_loop_routes_upstreams_and_slow_clients_and_leaves_the_terminal_as_it_was() {
    let origin = Origin::named("origin");
    let gateway = Setup::before(&origin).start();
    let screen = Screen::running(120, 30, &top(gateway.admin()));
    screen.shows("sockets");
    let mut client = gateway.client();
    client.send("POST /slow HTTP/1.1\r\nHost: test\r\nContent-Length: 8\r\n\r\nhalf");
    get(gateway.web(), "/");
    assert!(screen.shows("slow 1").contains("buffer"));
    screen.keys(&["2"]);
    screen.shows("leads to");
    screen.keys(&["Tab"]);
    screen.shows(&origin.address().to_string());
    screen.keys(&["4"]);
    screen.shows("POST /slow");
    screen.keys(&["p"]);
    screen.shows("paused");
    client.send("body");
    assert_eq!(client.response().status, 200);
    client.dawdle(ms(500));
    assert!(screen.text().contains("POST /slow"), "it stands still:\n{}", screen.text());
    screen.keys(&["p"]);
    screen.shows("There are no slow clients.");
    screen.keys(&["q"]);
    let end = screen.shows("exit code 0");
    assert!(!end.contains("There are no slow clients."), "the screen is given back:\n{end}");
}

#[test]
fn top_fits_a_small_terminal_and_says_when_the_gateway_is_gone() {
    let origin = Origin::named("origin");
    let process = Setup::before(&origin).spawn();
    let screen = Screen::running(44, 10, &top(process.admin()));
    screen.shows("worker");
    get(process.web(), "/");
    screen.keys(&["2"]);
    screen.shows("all ");
    screen.tmux(&["resize-window", "-x", "60", "-y", "20"]);
    screen.shows("5xx");
    drop(process);
    let text = screen.shows("no answer for");
    assert!(text.contains("all "), "what was known last stays:\n{text}");
    screen.keys(&["C-c"]);
    screen.shows("exit code 0");
}

#[test]
fn top_says_what_is_wrong_before_it_touches_the_terminal() {
    let nobody = format!("127.0.0.1:{}", free_port());
    let screen = Screen::running(120, 10, &format!("{PROGRAM} top --admin {nobody}"));
    screen.shows(&format!("forebay: the admin endpoint at {nobody}: connection refused"));
    screen.shows("exit code 1");
    let piped = Command::new(PROGRAM).args(["top", "--admin", &nobody]).output().expect("the program");
    assert_eq!(piped.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&piped.stderr).contains("needs a terminal"));
}

#[test]
fn top_asks_a_unix_socket_that_the_configuration_names() {
    let origin = Origin::named("origin");
    let dir = tempfile::tempdir().expect("a directory");
    let socket = dir.path().join("admin.sock");
    let file = dir.path().join("forebay.yaml");
    let yaml = format!(
        "listeners: [ {{ name: web, address: 127.0.0.1:0 }} ]\nupstreams: {{ app: {{ endpoints: [ {{ address: \"{}\" }} ] }} }}\n\
         routes: [ {{ name: all, upstream: app }} ]\nadmin: {{ address: \"unix:{}\" }}\n",
        origin.address(),
        socket.display()
    );
    std::fs::write(&file, yaml).expect("a configuration");
    let mut child =
        Command::new(PROGRAM).args(["run", "-c"]).arg(&file).stdout(std::process::Stdio::null()).spawn().expect("it");
    eventually("the admin socket", || socket.exists().then_some(()));
    let screen = Screen::running(100, 20, &format!("{PROGRAM} top -c {}", file.display()));
    screen.shows("sockets");
    drop(screen);
    crate::harness::end(&mut child);
}
