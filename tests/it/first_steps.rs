//! `forebay init` and `forebay proxy`: from nothing to a working gateway.

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};

use crate::harness::secure::Authority;
use crate::harness::tls::Tls;
use crate::harness::{Client, Origin, end, eventually, origin};

/// A running `forebay`, killed on drop; its first lines are read up to `Ctrl-C`.
struct Running {
    child: Child,
    said: String,
}

impl Running {
    fn start(directory: &Path, arguments: &[&str]) -> Running {
        let mut child =
            command(directory, arguments).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("it");
        let mut said = String::new();
        for line in BufReader::new(child.stdout.take().expect("its output")).lines() {
            said += &(line.expect("a line") + "\n");
            if said.contains("Ctrl-C") {
                return Running { child, said };
            }
        }
        end(&mut child);
        let mut error = String::new();
        let _ = child.stderr.take().expect("its errors").read_to_string(&mut error);
        panic!("{arguments:?} ended: {said}{error}");
    }

    /// The address in the first printed URL.
    fn address(&self) -> SocketAddr {
        let url = self.said.split("://").nth(1).expect("a URL").split([' ', '/', '\n']).next().expect("an address");
        url.parse().unwrap_or_else(|_| panic!("{}", self.said))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        end(&mut self.child);
    }
}

fn command(directory: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_forebay"));
    command.args(arguments).current_dir(directory).stdin(Stdio::null()).env_remove("FOREBAY_CONFIG");
    command
}

/// Its exit code, stdout and stderr.
fn run(directory: &Path, arguments: &[&str]) -> (i32, String, String) {
    let Output { status, stdout, stderr } = command(directory, arguments).output().expect("the program");
    let text = |bytes| String::from_utf8(bytes).expect("text");
    (status.code().expect("an exit code"), text(stdout), text(stderr))
}

#[test]
fn init_writes_a_file_that_checks_and_never_writes_over_one() {
    let dir = tempfile::tempdir().expect("a directory");
    let (code, said, error) = run(dir.path(), &["init"]);
    assert_eq!((code, &*error), (0, ""), "{said}");
    assert!(said.contains("forebay run -c forebay.yaml"), "{said}");
    // The printed commands work as they are.
    assert_eq!(run(dir.path(), &["check", "-c", "forebay.yaml"]).0, 0);
    let written = fs::read_to_string(dir.path().join("forebay.yaml")).expect("the file");
    assert!(written.lines().count() < 40, "a small file");
    let (code, _, error) = run(dir.path(), &["init", "--to", "127.0.0.1:9"]);
    assert_eq!((code, &*error), (1, "forebay: forebay.yaml exists already, and is left as it is; name another file\n"));
    assert_eq!(fs::read_to_string(dir.path().join("forebay.yaml")).expect("the file"), written);
    let (code, _, error) = run(dir.path(), &["init", "no/such/folder.yaml"]);
    assert_eq!(code, 1, "{error}");
    assert!(error.contains("no such file or directory"), "{error}");
}

#[test]
fn what_init_writes_answers_when_it_runs() {
    let backend = Origin::named("mine");
    let dir = tempfile::tempdir().expect("a directory");
    let to = backend.address().to_string();
    let (code, _, error) = run(dir.path(), &["init", "mine.yaml", "--from", "127.0.0.1:0", "--to", &to]);
    assert_eq!(code, 0, "{error}");
    let file = dir.path().join("mine.yaml");
    let written = fs::read_to_string(&file).expect("the file");
    assert!(written.contains(&to));
    fs::write(&file, written.replace("127.0.0.1:9100", "127.0.0.1:0")).expect("another admin address");
    let mut child = command(dir.path(), &["run", "-c", "mine.yaml"])
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the program");
    let mut lines = BufReader::new(child.stderr.take().expect("its log")).lines();
    let address = lines.find_map(|line| {
        let line = line.ok()?;
        let named = line.contains("listener=\"web\"") || line.contains("listener=web");
        let word = line.split_whitespace().find_map(|word| word.strip_prefix("address="));
        named.then(|| word?.trim_matches('"').parse().ok()).flatten()
    });
    let answer = Client::connect(address.expect("an address of the listener")).get("/");
    end(&mut child);
    assert_eq!((answer.status, answer.text()), (200, "mine"));
}

#[test]
fn a_proxy_needs_no_file() {
    let backend = Origin::named("backend");
    let dir = tempfile::tempdir().expect("a directory");
    let to = format!("http://{}/", backend.address());
    let log = dir.path().join("access.log");
    let log = log.to_str().expect("a path");
    let arguments = ["proxy", "--from", "127.0.0.1:0", "--to", &to, "--limit", "1/h", "--log", log, "--change-host"];
    let running = Running::start(dir.path(), &arguments);
    let mut client = Client::connect(running.address());
    let answer = client.get("/a?b=c");
    assert_eq!((answer.status, answer.text()), (200, "backend"));
    let request = backend.request();
    assert_eq!(request.target(), "/a?b=c");
    assert_eq!(request.value("host"), Some(&*backend.address().to_string()));
    assert_eq!(client.get("/again").status, 429);
    eventually("two lines in the access log", || {
        let lines = fs::read_to_string(log).unwrap_or_default();
        (lines.matches("\"reason\":\"route.rate_limit\"").count() == 1 && lines.lines().count() == 2).then_some(())
    });
}

#[test]
fn a_proxy_shares_requests_among_its_backends() {
    let (one, two) = (Origin::named("one"), Origin::named("two"));
    let dir = tempfile::tempdir().expect("a directory");
    let (first, second) = (one.address().to_string(), two.address().to_string());
    let arguments =
        ["proxy", "--from", "127.0.0.1:0", "--to", &first, "--to", &second, "--log", "off", "--admin", "127.0.0.1:0"];
    let running = Running::start(dir.path(), &arguments);
    assert!(running.said.contains("status page"), "{}", running.said);
    let mut client = Client::connect(running.address());
    for _ in 0..20 {
        assert_eq!(client.get("/").status, 200);
    }
    assert!(
        one.requests().len() >= 3 && two.requests().len() >= 3,
        "{} and {}",
        one.requests().len(),
        two.requests().len()
    );
}

#[test]
fn a_proxy_speaks_https_with_files_and_with_a_certificate_of_its_own() {
    let backend = origin::built_in();
    let dir = tempfile::tempdir().expect("a directory");
    let to = backend.address().to_string();
    let authority = Authority::new();
    let identity = authority.issue(&["shop.test"]);
    let files = format!("{},{}", identity.certificate.display(), identity.key.display());
    let running = Running::start(dir.path(), &["proxy", "--from", "127.0.0.1:0", "--to", &to, "--tls", &files]);
    let (got, _) = Tls::to(running.address(), &authority, "shop.test").get("/bytes/5").expect("an answer over TLS");
    assert_eq!(got.status, 200);

    let running = Running::start(dir.path(), &["proxy", "--from", "127.0.0.1:0", "--to", &to, "--tls"]);
    assert!(running.said.contains("https://127.0.0.1:"), "{}", running.said);
    let (got, _) = Tls::to(running.address(), &authority, "localhost").unverified().get("/bytes/5").expect("an answer");
    assert_eq!(got.status, 200);
}

#[test]
fn what_a_proxy_prints_is_a_file_that_does_the_same() {
    let backend = Origin::named("printed");
    let dir = tempfile::tempdir().expect("a directory");
    let to = backend.address().to_string();
    let (code, printed, error) = run(
        dir.path(),
        &["proxy", "--from", "127.0.0.1:0", "--to", &to, "--deadline", "5s", "--log", "off", "--print"],
    );
    assert_eq!((code, &*error), (0, ""));
    fs::write(dir.path().join("forebay.yaml"), &printed).expect("a file");
    let (code, said, error) = run(dir.path(), &["check"]);
    assert_eq!((code, &*said), (0, "./forebay.yaml: ok (1 listener, 1 route, 1 upstream)\n"), "{error}");
    for (wrong, told) in [
        (&["proxy"][..], "--to <BACKEND>"),
        (&["proxy", "--to", &to, "--tls", "--print"], "--print has no files to name"),
        (&["proxy", "--to", "ftp://a"], "is not a backend scheme"),
        (&["proxy", "--to", &to, "--change-host", "--to", "127.0.0.1:1"], "--change-host needs one backend"),
    ] {
        let (code, out, error) = run(dir.path(), wrong);
        assert_eq!((code, &*out), (2, ""), "{wrong:?}");
        assert!(error.contains(told), "{wrong:?}: {error}");
    }
}

#[test]
fn a_proxy_tells_which_address_is_taken() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = taken.local_addr().expect("its address").to_string();
    let dir = tempfile::tempdir().expect("a directory");
    let (code, _, error) = run(dir.path(), &["proxy", "--from", &address, "--to", "127.0.0.1:1"]);
    assert_eq!(code, 1);
    assert!(error.contains(&format!("cannot listen on {address}")), "{error}");
}
