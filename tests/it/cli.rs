//! The command line, run as its users run it: what it prints, and the code it exits with.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

const GOOD: &str = "\
listeners: [ { name: web, address: 127.0.0.1:0 } ]
upstreams: { app: { endpoints: [ { address: 127.0.0.1:3000 } ] } }
routes: [ { name: all, upstream: app } ]
";

const BAD: &str = "\
listeners: [ { name: web, adress: 127.0.0.1:0 } ]
routes: []
";

/// A command in an empty directory, without Forebay's environment variables.
fn forebay(directory: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_forebay"));
    command.args(arguments).current_dir(directory).stdin(Stdio::null());
    for name in ["FOREBAY_CONFIG", "FOREBAY_LOG", "FOREBAY_LOG_FORMAT", "NO_COLOR"] {
        command.env_remove(name);
    }
    command
}

/// The exit code, stdout and stderr of a command.
fn outcome(command: &mut Command) -> (i32, String, String) {
    let Output { status, stdout, stderr } = command.output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (status.code().expect("no signal ended it"), text(stdout), text(stderr))
}

fn run(arguments: &[&str]) -> (i32, String, String) {
    outcome(&mut forebay(tempfile::tempdir().unwrap().path(), arguments))
}

/// A directory with this file.
fn with_file(name: &str, text: &str) -> tempfile::TempDir {
    let directory = tempfile::tempdir().unwrap();
    std::fs::write(directory.path().join(name), text).unwrap();
    directory
}

#[test]
fn a_good_configuration_is_ok_and_counted() {
    let directory = with_file("good.yaml", GOOD);
    for arguments in [["check", "-c", "good.yaml"], ["validate", "-c", "good.yaml"], ["-t", "-c", "good.yaml"]] {
        let (code, stdout, stderr) = outcome(&mut forebay(directory.path(), &arguments));
        assert_eq!((code, stderr.as_str()), (0, ""), "{arguments:?}");
        assert_eq!(stdout, "good.yaml: ok (1 listener, 1 route, 1 upstream)\n");
    }
}

#[test]
fn a_bad_configuration_is_told_without_colours_and_exits_78() {
    let directory = with_file("bad.yaml", BAD);
    for arguments in [&["check", "-c", "bad.yaml"][..], &["-tc", "bad.yaml"], &["run", "-c", "bad.yaml"]] {
        let (code, stdout, stderr) = outcome(&mut forebay(directory.path(), arguments));
        assert_eq!((code, stdout.as_str()), (78, ""), "{arguments:?}");
        assert!(stderr.contains("bad.yaml") && stderr.contains("adress"), "{stderr}");
        assert!(!stderr.contains('\x1b'), "{stderr}");
    }
}

#[test]
fn what_is_strange_but_allowed_is_a_warning() {
    let text = format!("{GOOD}admin: {{ address: '0.0.0.0:9100' }}\n")
        .replace("{ app:", "{ spare: { endpoints: [ { address: 127.0.0.1:1 } ] }, app:");
    let directory = with_file("forebay.yaml", &text);
    let (code, _, stderr) = outcome(&mut forebay(directory.path(), &["check"]));
    assert_eq!(code, 0);
    for part in [
        "warning: no route uses the upstream `spare`",
        "--> ./forebay.yaml:2:14",
        "warning: everyone who can reach this machine can reach `admin`",
        "2 warnings",
    ] {
        assert!(stderr.contains(part), "{part:?} is missing in\n{stderr}");
    }
}

#[test]
fn the_option_wins_over_the_variable_and_that_over_the_file_beside_us() {
    let directory = with_file("forebay.yaml", GOOD);
    for name in ["named.yaml", "option.yaml"] {
        std::fs::write(directory.path().join(name), GOOD).unwrap();
    }
    let checked = |command: &mut Command| outcome(command).1.split(':').next().unwrap().to_owned();
    assert_eq!(checked(&mut forebay(directory.path(), &["check"])), "./forebay.yaml");
    assert_eq!(checked(forebay(directory.path(), &["check"]).env("FOREBAY_CONFIG", "")), "./forebay.yaml");
    assert_eq!(checked(forebay(directory.path(), &["check"]).env("FOREBAY_CONFIG", "named.yaml")), "named.yaml");
    let option = ["check", "-c", "option.yaml"];
    assert_eq!(checked(forebay(directory.path(), &option).env("FOREBAY_CONFIG", "named.yaml")), "option.yaml");
}

#[test]
fn a_named_file_that_is_missing_is_an_error_though_another_exists() {
    let directory = with_file("forebay.yaml", GOOD);
    let (code, _, stderr) = outcome(&mut forebay(directory.path(), &["check", "-c", "absent.yaml"]));
    assert_eq!(code, 78);
    assert!(stderr.contains("absent.yaml"), "{stderr}");
}

#[test]
fn wrong_usage_exits_2_and_help_0() {
    for wrong in [
        &[][..],
        &["bake"],
        &["check", "--colour"],
        &["-c", "forebay.yaml"],
        &["-t", "check"],
        &["run", "--listen", "127.0.0.1:0"],
        &["run", "--demo", "-c", "forebay.yaml"],
        &["healthcheck", "--url", "https://127.0.0.1/"],
    ] {
        let (code, stdout, stderr) = run(wrong);
        assert_eq!((code, stdout.as_str()), (2, ""), "{wrong:?}");
        assert_ne!(stderr, "", "{wrong:?}");
    }
    let (code, help, _) = run(&["--help"]);
    assert_eq!(code, 0);
    for word in ["run", "check", "schema", "origin", "healthcheck", "completions", "FOREBAY_CONFIG", "78"] {
        assert!(help.contains(word), "{word}");
    }
}

#[test]
fn the_help_of_the_origin_lists_its_paths() {
    assert!(run(&["origin", "--help"]).1.contains(forebay::origin::PATHS.trim_end()));
}

#[test]
fn the_version_is_the_crates() {
    let version = concat!("forebay ", env!("CARGO_PKG_VERSION"), "\n");
    assert_eq!(run(&["version"]).1, version);
    assert_eq!(run(&["--version"]).1, version);
}

#[test]
fn the_schema_is_json() {
    let (code, stdout, _) = run(&["schema"]);
    let schema: serde_json::Value = serde_json::from_str(&stdout).unwrap();
    assert_eq!(code, 0);
    assert!(schema["properties"]["listeners"].is_object());
}

#[test]
fn completions_are_there_for_every_shell() {
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let (code, stdout, _) = run(&["completions", shell]);
        assert_eq!(code, 0);
        assert!(stdout.contains("healthcheck"), "{shell}");
    }
}

#[test]
fn a_reader_that_goes_away_is_no_error() {
    let directory = tempfile::tempdir().unwrap();
    let mut schema =
        forebay(directory.path(), &["schema"]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    drop(schema.stdout.take());
    let Output { status, stderr, .. } = schema.wait_with_output().unwrap();
    assert_eq!((status.code(), stderr), (Some(0), Vec::new()));
}

#[test]
fn a_wrong_log_setting_is_told_by_its_name() {
    let directory = with_file("forebay.yaml", GOOD);
    for (name, value) in [("FOREBAY_LOG", "forebay=loud"), ("FOREBAY_LOG_FORMAT", "xml")] {
        let (code, _, stderr) = outcome(forebay(directory.path(), &["run"]).env(name, value));
        assert_eq!(code, 78);
        assert!(stderr.starts_with(&format!("forebay: ${name}: ")), "{stderr}");
    }
}

/// Starts a server on a free port that sends this response to every request. Returns its address.
fn server(answer: &'static str) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            let mut request = BufReader::new(stream.try_clone().unwrap()).lines().map_while(Result::ok);
            let first = request.next().unwrap_or_default();
            if first == "GET /readyz HTTP/1.1" && request.any(|line| line.is_empty()) {
                stream.write_all(answer.as_bytes()).unwrap();
            }
        }
    });
    address
}

#[test]
fn a_healthcheck_asks_the_admin_address_of_the_configuration() {
    let address = server("HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n");
    let directory = with_file("forebay.yaml", &format!("{GOOD}admin: {{ address: '{address}' }}\n"));
    let (code, stdout, stderr) = outcome(&mut forebay(directory.path(), &["healthcheck"]));
    assert_eq!((code, stderr.as_str()), (0, ""));
    assert_eq!(stdout, format!("http://{address}/readyz answers 200\n"));
}

#[test]
fn a_gateway_that_is_not_ready_fails_its_healthcheck() {
    let address = server("HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n");
    let url = format!("http://{address}/readyz");
    let (code, _, stderr) = run(&["healthcheck", "--url", &url]);
    assert_eq!((code, stderr), (1, format!("forebay: not ready: {url} answers 503\n")));
}

#[test]
fn a_gateway_that_is_not_there_fails_its_healthcheck() {
    let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let (code, _, stderr) = run(&["healthcheck", "--url", &format!("http://{free}/readyz")]);
    assert_eq!((code, stderr), (1, format!("forebay: not ready: http://{free}/readyz: connection refused\n")));
}

#[test]
fn a_healthcheck_waits_three_seconds_and_no_longer() {
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}/readyz", silent.local_addr().unwrap());
    let started = Instant::now();
    let (code, _, stderr) = run(&["healthcheck", "--url", &url]);
    assert_eq!((code, stderr), (1, format!("forebay: not ready: {url} did not answer within 3 s\n")));
    assert!((3..10).contains(&started.elapsed().as_secs()));
}

#[test]
fn an_address_in_use_is_told_with_its_listener() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let text = format!("{GOOD}admin: {{ enabled: false }}\n").replace("127.0.0.1:0", &address);
    let directory = with_file("forebay.yaml", &text);
    let (code, _, stderr) = outcome(&mut forebay(directory.path(), &["run"]));
    assert_eq!(code, 1);
    let told = format!(
        "forebay: cannot listen on {address} (listener web): address already in use; another process listens there\n"
    );
    assert!(stderr.ends_with(&told), "{stderr}");
}

#[test]
fn the_demo_says_which_address_is_taken_and_how_to_choose_another() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    for (option, other) in [("--listen", "--admin"), ("--admin", "--listen")] {
        let (code, _, stderr) = run(&["run", "--demo", option, &address, other, "127.0.0.1:0"]);
        assert_eq!(code, 1);
        assert!(
            stderr.contains(&address) && stderr.contains(&format!("choose another with {option} ADDRESS")),
            "{stderr}"
        );
    }
}

/// A process that is killed on drop.
struct Running(Child);

impl Running {
    fn start(command: &mut Command) -> Running {
        Running(command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap())
    }

    /// Returns its output, up to the first line that contains `word`.
    fn until(&mut self, word: &str) -> String {
        let mut text = String::new();
        for line in BufReader::new(self.0.stdout.as_mut().unwrap()).lines() {
            text += &(line.unwrap() + "\n");
            if text.contains(word) {
                return text;
            }
        }
        panic!("no `{word}` in {text}");
    }

    /// Sends SIGTERM; returns the exit code.
    fn terminate(&mut self) -> Option<i32> {
        let pid = self.0.id() as libc::pid_t;
        // SAFETY: kill has no pointers. The child was not waited for, so its id is not reused.
        assert_eq!(unsafe { libc::kill(pid, libc::SIGTERM) }, 0);
        let deadline = Instant::now() + crate::harness::DEADLINE;
        while Instant::now() < deadline {
            if let Some(status) = self.0.try_wait().unwrap() {
                return status.code();
            }
            thread::sleep(Duration::from_millis(10));
        }
        None
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn get(address: &str, path: &str) -> String {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    write!(stream, "GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}

/// The address in the first URL of a text.
fn address(text: &str) -> String {
    text.split_once("http://").unwrap().1.split(['/', ' ', ';']).next().unwrap().to_owned()
}

#[test]
fn the_origin_runs_alone_until_it_is_told_to_stop() {
    let directory = tempfile::tempdir().unwrap();
    let mut origin = Running::start(&mut forebay(directory.path(), &["origin"]));
    let address = address(&origin.until("listens on"));
    assert!(get(&address, "/").ends_with(forebay::origin::PATHS));
    assert_eq!(origin.terminate(), Some(0));
}

#[test]
fn the_demo_answers_through_the_gateway_and_prints_three_lines_to_try() {
    let directory = tempfile::tempdir().unwrap();
    let arguments = ["run", "--demo", "--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0"];
    let mut demo = Running::start(&mut forebay(directory.path(), &arguments));
    let text = demo.until("Ctrl-C");
    let lines: Vec<&str> = text.lines().filter(|line| line.starts_with("  curl ")).collect();
    assert_eq!(lines.len(), 3, "{text}");
    assert!(get(&address(lines[0]), "/bytes/16").ends_with("\r\n\r\n000000000000000\n"));
    assert_eq!(demo.terminate(), Some(0));
}

#[test]
fn certificates_are_listed_and_what_is_wrong_with_them_is_told_by_check_with_its_place() {
    use crate::harness::secure::Authority;
    use crate::harness::tls::pair;

    let authority = Authority::new();
    let (good, other) = (authority.issue(&["good.test", "*.good.test"]), authority.issue(&["other.test"]));
    let dir = tempfile::tempdir().expect("a directory");
    let file = dir.path().join("forebay.yaml");
    let write = |certificates: &str| {
        let yaml = format!(
            "listeners:\n  - name: web\n    address: 127.0.0.1:0\n    tls:\n      certificates:\n{certificates}\n\
             upstreams: {{ app: {{ endpoints: [ {{ address: 127.0.0.1:1 }} ] }} }}\nroutes: [ {{ name: all, upstream: app }} ]\n"
        );
        std::fs::write(&file, yaml).expect("a file");
    };
    let run = |command: &str| {
        let output = Command::new(env!("CARGO_BIN_EXE_forebay")).args([command, "-c"]).arg(&file).output();
        let output = output.expect("the program runs");
        (output.status.code(), String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned())
    };
    write(&format!("        - {{ {} }}", pair(&good)));
    let (code, said) = run("certs");
    assert_eq!(code, Some(0), "{said}");
    assert!(said.contains("good.test *.good.test") && said.contains("ECDSA P-256"), "{said}");
    assert_eq!(run("check").0, Some(0));

    write(&format!("        - {{ {}, names: [a.good.test, good.test, a.b.good.test] }}", pair(&good)));
    let warning = "it is not made out to `a.b.good.test`: clients that check names will not accept it";
    let (code, said) = run("check");
    assert_eq!(code, Some(0), "{said}");
    assert!(said.contains("warning") && said.contains(warning) && said.contains("forebay.yaml:6:"), "{said}");
    let (code, said) = run("certs");
    assert_eq!(code, Some(0), "{said}");
    assert!(said.contains(warning), "{said}");

    let crossed = format!("cert: \"{}\", key: \"{}\"", good.certificate.display(), other.key.display());
    write(&format!("        - {{ {} }}\n        - {{ {crossed} }}", pair(&good)));
    let (code, said) = run("check");
    assert_eq!(code, Some(78), "{said}");
    assert!(said.contains("is not the key of the first certificate in") && said.contains(":7:"), "{said}");
    let (code, said) = run("certs");
    assert!(code == Some(1) && said.contains("one certificate has a problem"), "{said}");
}
