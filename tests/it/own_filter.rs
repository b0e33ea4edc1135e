//! `conf/examples/own-filter`: builds, checks and runs a separate crate that depends on Forebay.
//!
//! It uses the target directory, the lock file and the features of this build, so that everything except Forebay's
//! library and the crate itself is already compiled; no registry is contacted. Cargo identifies a library by its
//! path relative to the workspace, so it compiles Forebay's library again.

use std::env;
use std::ffi::OsString;
use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::harness::gateway::Watched;
use crate::harness::{Origin, Setup, eventually};

const ROOT: &str = env!("CARGO_MANIFEST_DIR");
/// About forty seconds on two idle cores; much more on busy ones.
const BUILD_MAX: Duration = Duration::from_secs(840);

/// The target directory of this build, and its profile.
fn target() -> (PathBuf, Option<OsString>) {
    let test = env::current_exe().expect("the path of this program");
    let profile = test.parent().and_then(Path::parent).expect("the directory of the profile");
    let name = profile.file_name().expect("a name").to_owned();
    (profile.parent().expect("the target").to_owned(), Some(name).filter(|name| name != "debug"))
}

/// Copies the crate below the target directory, with everything it needs.
fn copied() -> PathBuf {
    let (from, copy) = (Path::new(ROOT).join("conf/examples/own-filter"), target().0.join("tmp/own-filter"));
    fs::create_dir_all(copy.join("src")).expect("a directory");
    fs::copy(from.join("src/main.rs"), copy.join("src/main.rs")).expect("the program");
    fs::copy(Path::new(ROOT).join("Cargo.lock"), copy.join("Cargo.lock")).expect("the lock file");
    let manifest = fs::read_to_string(from.join("Cargo.toml")).expect("the manifest");
    let manifest = manifest.replace("\"../../..\"", &format!("{ROOT:?}"));
    assert!(manifest.contains(ROOT), "{manifest}");
    // Forebay's tests enable features of shared libraries, which are compiled with them.
    let ours = fs::read_to_string(Path::new(ROOT).join("Cargo.toml")).expect("our manifest");
    let (_, further) = ours.split_once("\n[dev-dependencies]\n").expect("our dependencies for tests");
    let further = further.split("\n[").next().unwrap_or_default();
    let further = further.lines().filter(|line| !line.trim_start().starts_with('#'));
    let named =
        |line: &&str| line.split_whitespace().next().is_some_and(|name| !manifest.contains(&format!("\n{name} = ")));
    let further: Vec<&str> = further.filter(named).collect();
    let manifest = manifest.replace("[dependencies]\n", &format!("[dependencies]\n{}\n", further.join("\n")));
    fs::write(copy.join("Cargo.toml"), manifest).expect("the manifest");
    copy
}

/// Builds the program and returns its path.
fn built() -> PathBuf {
    let (target, profile) = target();
    let copy = copied();
    let mut cargo = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.args(["build", "--offline"]).current_dir(&copy).env("CARGO_TARGET_DIR", &target);
    // Cargo's variables about this package must not reach that build, or libraries would be rebuilt.
    let told = ["CARGO_PKG_", "CARGO_MANIFEST_", "CARGO_BIN_EXE_", "CARGO_CRATE_NAME", "CARGO_PRIMARY_PACKAGE"];
    for (name, _) in env::vars().filter(|(name, _)| told.iter().any(|begin| name.starts_with(begin))) {
        cargo.env_remove(name);
    }
    if let Some(profile) = &profile {
        cargo.arg("--profile").arg(profile);
    }
    let mut cargo = cargo.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().expect("cargo");
    let mut says = cargo.stderr.take().expect("what it says");
    let says = std::thread::spawn(move || {
        let mut text = String::new();
        let _ = says.read_to_string(&mut text);
        text
    });
    let begun = Instant::now();
    let status = loop {
        match cargo.try_wait().expect("cargo") {
            Some(status) => break status,
            None if begun.elapsed() > BUILD_MAX => {
                cargo.kill().and_then(|()| cargo.wait()).expect("the end of cargo");
                panic!("the crate was not built in {BUILD_MAX:?}");
            }
            None => std::thread::park_timeout(Duration::from_millis(100)),
        }
    };
    let says = says.join().expect("what it says");
    assert!(status.success(), "{says}");
    // Shared libraries are not compiled again.
    let compiled: Vec<&str> = says.lines().filter_map(|line| line.trim().strip_prefix("Compiling ")).collect();
    println!("built in {:?}: {compiled:?}", begun.elapsed());
    assert!(compiled.len() <= 2, "more than the two crates was compiled: {compiled:#?}");
    target.join(profile.as_deref().unwrap_or("debug".as_ref())).join("own-filter")
}

#[test]
fn a_crate_with_a_filter_of_its_own_is_built_checked_and_run() {
    let program = built();
    let dir = tempfile::tempdir().expect("a directory");
    let written = fs::read_to_string(format!("{ROOT}/conf/examples/own-filter/forebay.yaml")).expect("the file");
    let run = |file: &Path, command: &str| {
        let output = Command::new(&program).args([command, "-c"]).arg(file).output().expect("the program");
        let said = [output.stdout, output.stderr].concat();
        (output.status.code(), String::from_utf8_lossy(&said).into_owned())
    };
    let write = |text: &str| {
        let file = dir.path().join("forebay.yaml");
        fs::write(&file, text).expect("a file");
        file
    };
    let (code, said) = run(&write(&written), "check");
    assert_eq!(code, Some(0), "{said}");
    let (code, said) = run(&write(&written.replace("gold, silver", "")), "check");
    assert!(code == Some(78) && said.contains("no badge is listed"), "{said}");
    let (code, said) = run(&write(&written.replace("known:", "knwon:")), "check");
    assert!(code == Some(78) && said.contains("knwon"), "{said}");
    let schema = Command::new(&program).arg("schema").output().expect("the program").stdout;
    assert!(String::from_utf8_lossy(&schema).contains("Where a client shows its badge."));

    let origin = Origin::named("app");
    let text = written.replace("127.0.0.1:3000", &origin.address().to_string());
    let text = text.replace("127.0.0.1:8080", "127.0.0.1:0").replace("127.0.0.1:9090", "127.0.0.1:0");
    let setup = Setup::whole(&text);
    let gateway = setup.spawn_program(&program);
    let mut client = gateway.client();
    let mut ask = |path: &str, badge: &str| client.ask("GET", path, badge, "");
    assert_eq!(ask("/", "").status, 401);
    assert_eq!(ask("/", "X-Badge: tin\r\n").status, 403);
    let first = ask("/", "X-Badge: gold\r\n");
    assert_eq!((first.text(), first.value("x-guest")), ("app", Some("1")));
    assert_eq!(ask("/", "X-Badge: silver\r\n").value("x-guest"), Some("2"));
    assert_eq!(ask("/healthz", "").status, 200, "its condition does not hold");
    // Its kept state survives a reload, even with other settings.
    fs::write(setup.path("forebay.yaml"), setup.yaml().replace("- gold", "- tin")).expect("a file");
    gateway.signal(libc::SIGHUP);
    let guest = eventually("the new settings", || {
        let answer = gateway.client().ask("GET", "/", "X-Badge: tin\r\n", "");
        (answer.status == 200).then(|| answer.value("x-guest").map(str::to_owned))
    });
    assert_eq!(guest.as_deref(), Some("3"));
    gateway.wait_metric("forebay_refusals_total{reason=\"route.badge_missing\"}", |count| count == 1.0);
}
