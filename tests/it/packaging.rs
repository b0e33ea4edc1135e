//! Packages, images and charts, checked with the tools that read them.
//!
//! `make package-test` builds, installs and purges the package itself; it needs root and a release build.

mod kubernetes;

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::{Component, Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use regex::Regex;
use serde_json::Value as Json;
use tempfile::TempDir;

const PROGRAM: &str = env!("CARGO_BIN_EXE_forebay");

/// A file in this repository.
fn tree(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

fn text(path: &str) -> String {
    fs::read_to_string(tree(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// A tool from PyPI, installed by `make test`.
fn pypi(name: &str) -> PathBuf {
    let asked = said(Command::new(tree("conf/packaging/install-tools.sh")).args(["--directory", "test"]));
    let path = Path::new(asked.trim()).join("bin").join(name);
    assert!(path.exists(), "{} is missing: `conf/packaging/install-tools.sh test` installs it", path.display());
    path
}

/// The stdout and stderr of a command, which must succeed.
fn said(command: &mut Command) -> String {
    let Output { status, stdout, stderr } = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let said = [stdout, stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).concat();
    assert!(status.success(), "{command:?} ended with {status}:\n{said}");
    said
}

/// The values of a setting in the unit, in order.
fn unit(setting: &str) -> Vec<String> {
    let unit = text("conf/packaging/forebay.service");
    let values = unit.lines().filter_map(|line| line.strip_prefix(setting)?.strip_prefix('='));
    values.map(str::to_owned).collect()
}

/// A copy of the unit that starts the program of this build, because `verify` checks that it exists.
fn unit_here(directory: &TempDir) -> PathBuf {
    let unit = text("conf/packaging/forebay.service");
    assert!(unit.contains("=/usr/bin/forebay "));
    let path = directory.path().join("forebay.service");
    fs::write(&path, unit.replace("=/usr/bin/forebay ", &format!("={PROGRAM} "))).unwrap();
    path
}

#[test]
fn systemd_accepts_the_unit_and_finds_it_hardened() {
    let directory = tempfile::tempdir().unwrap();
    let path = unit_here(&directory);
    // It reports unknown settings, but still succeeds.
    assert_eq!(said(Command::new("systemd-analyze").args(["verify", "--man=no"]).arg(&path)), "");
    let socket = directory.path().join("forebay.socket");
    fs::copy(tree("conf/examples/forebay.socket"), &socket).unwrap();
    assert_eq!(said(Command::new("systemd-analyze").args(["verify", "--man=no"]).arg(&socket)), "");
    let mut judge = Command::new("systemd-analyze");
    // In tenths: 2.5 of 10.
    said(judge.args(["security", "--no-pager", "--offline=true", "--threshold=25"]).arg(&path));
}

#[test]
fn the_unit_gives_a_stop_the_time_that_the_configuration_takes() {
    let whole: u64 = unit("TimeoutStopSec")[0].parse().unwrap();
    let default = forebay::config::server::Shutdown::default();
    assert!(default.pause.0 + default.deadline.0 < Duration::from_secs(whole), "{default:?} and {whole} s");
    assert_eq!(unit("RestartPreventExitStatus"), ["78"]);
}

#[test]
fn the_unit_has_a_watchdog_that_outlasts_a_stall_and_its_main_process_alone_may_speak() {
    let patience: u64 = unit("WatchdogSec")[0].parse().unwrap();
    let stall = forebay::config::server::EventLoop::default().stall_threshold.0;
    assert!(Duration::from_secs(patience) > 100 * stall, "{patience} s and {stall:?}");
    assert_eq!(unit("NotifyAccess"), ["main"]);
}

/// A shipped configuration, run by this build on free ports and with its own directories.
struct Shipped {
    process: Child,
    web: String,
    config: PathBuf,
    directory: TempDir,
}

impl Shipped {
    /// Starts it with exactly these arguments; $FOREBAY_CONFIG names the file.
    fn start(path: &str, arguments: &[&str]) -> Shipped {
        let directory = tempfile::tempdir().unwrap();
        let config = directory.path().join("forebay.yaml");
        fs::write(&config, here(&text(path), directory.path())).unwrap();
        let mut command = forebay(arguments);
        command.env("FOREBAY_CONFIG", &config).stdout(Stdio::null()).stderr(Stdio::piped());
        let mut process = command.spawn().unwrap();
        let mut log = BufReader::new(process.stderr.take().unwrap());
        let mut seen = String::new();
        let web = loop {
            let from = seen.len();
            assert_ne!(log.read_line(&mut seen).unwrap(), 0, "{path}: it ended:\n{seen}");
            let address =
                seen[from..].split_once("listener=\"web\" address=\"").and_then(|(_, rest)| rest.split_once('"'));
            if let Some((address, _)) = address {
                break address.to_owned();
            }
        };
        // A full pipe would block the program.
        std::thread::spawn(move || std::io::copy(&mut log, &mut std::io::sink()));
        Shipped { process, web, config, directory }
    }

    fn get(&self) -> String {
        let mut stream = TcpStream::connect(&self.web).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        stream.write_all(b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n").unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    }

    fn stop(&mut self) {
        // Neither fails for a child that was not waited for; otherwise there is nothing to kill.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

impl Drop for Shipped {
    fn drop(&mut self) {
        self.stop();
    }
}

/// A configuration with directories below `directory` and free addresses.
fn here(config: &str, directory: &Path) -> String {
    let directory = directory.display();
    config
        .replace("127.0.0.1:8080", "127.0.0.1:0")
        .replace("0.0.0.0:8080", "127.0.0.1:0")
        .replace("127.0.0.1:9100", &format!("unix:{directory}/admin.sock"))
        .replace("0.0.0.0:9100", &format!("unix:{directory}/admin.sock"))
        .replace("/var/lib/forebay/spool", &directory.to_string())
        .replace("/var/log/forebay", &directory.to_string())
}

fn forebay(arguments: &[&str]) -> Command {
    let mut command = Command::new(PROGRAM);
    command.args(arguments).stdin(Stdio::null()).current_dir("/");
    for name in ["FOREBAY_CONFIG", "FOREBAY_LOG", "FOREBAY_LOG_FORMAT"] {
        command.env_remove(name);
    }
    command
}

#[test]
fn the_configuration_of_the_package_is_right_and_answers() {
    let shipped = Shipped::start("conf/packaging/forebay.yaml", &["run"]);
    said(forebay(&["check"]).env("FOREBAY_CONFIG", &shipped.config));
    let answer = shipped.get();
    assert!(answer.starts_with("HTTP/1.1 200") && answer.contains("Forebay is running."), "{answer}");
    assert!(shipped.directory.path().join("access.log").exists(), "its log is where logrotate looks for it");
}

#[test]
fn the_directories_of_the_package_are_those_that_its_configuration_names() {
    let config: Json = serde_yaml::from_str(&text("conf/packaging/forebay.yaml")).unwrap();
    let spool = config["server"]["spool_dir"].as_str().unwrap();
    let log = Path::new(config["observability"]["access_log"]["path"].as_str().unwrap()).parent().unwrap();
    let made = text("conf/packaging/forebay.tmpfile");
    let made: Vec<_> = made.lines().filter(|line| line.starts_with("d ")).collect();
    for directory in [spool, log.to_str().unwrap()] {
        assert!(made.iter().any(|line| line.split_whitespace().nth(1) == Some(directory)), "{directory}: {made:?}");
    }
    assert!(unit("StateDirectory")[0].split(' ').any(|state| Path::new("/var/lib").join(state) == Path::new(spool)));
    assert_eq!(unit("ReadWritePaths"), [format!("-{}", log.display())]);
    assert!(text("conf/packaging/forebay.logrotate").starts_with(&format!("{}/*.log ", log.display())));
    let users = text("conf/packaging/forebay.sysusers");
    assert!(users.starts_with(&format!("u {} ", unit("User")[0])), "{users}");
}

/// The words of a Dockerfile instruction in list form.
fn instruction(name: &str) -> Vec<String> {
    let dockerfile = text("Dockerfile");
    let line = dockerfile.lines().rfind(|line| line.starts_with(name));
    let line = line.unwrap_or_else(|| panic!("the Dockerfile has no {name}"));
    let list = &line[line.find('[').expect("a list")..];
    serde_json::from_str(list).unwrap_or_else(|error| panic!("{line}: {error}"))
}

#[test]
fn hadolint_accepts_the_dockerfile() {
    assert_eq!(said(Command::new(pypi("hadolint")).arg(tree("Dockerfile"))), "");
}

#[test]
fn a_container_runs_and_is_healthy_by_the_commands_of_its_image() {
    assert_eq!(instruction("ENTRYPOINT"), ["forebay"]);
    let command = instruction("CMD");
    let arguments: Vec<_> = command.iter().map(String::as_str).collect();
    let mut shipped = Shipped::start("conf/packaging/container.yaml", &arguments);
    assert!(shipped.get().starts_with("HTTP/1.1 200"));
    let check = instruction("HEALTHCHECK");
    assert_eq!(check[0], "forebay");
    let arguments: Vec<_> = check[1..].iter().map(String::as_str).collect();
    said(forebay(&arguments).env("FOREBAY_CONFIG", &shipped.config));
    shipped.stop();
    let after = forebay(&arguments).env("FOREBAY_CONFIG", &shipped.config).output().unwrap();
    assert_eq!(after.status.code(), Some(1), "{after:?}");
}

#[test]
fn each_command_has_a_page_that_roff_prints_without_a_word() {
    let directory = tempfile::tempdir().unwrap();
    said(&mut forebay(&["man", directory.path().to_str().unwrap()]));
    let help = said(&mut forebay(&["--help"]));
    let (_, commands) = help.split_once("Commands:\n").unwrap();
    let commands = commands.lines().take_while(|line| !line.is_empty());
    let commands = commands.filter_map(|line| line.strip_prefix("  ").filter(|line| !line.starts_with(' ')));
    let mut expected: BTreeSet<_> =
        commands.filter_map(|line| Some(format!("forebay-{}.1", line.split(' ').next()?))).collect();
    assert!(expected.contains("forebay-run.1"), "{expected:?}");
    expected.extend(["forebay.1", "forebay.yaml.5"].map(str::to_owned));
    expected.remove("forebay-help.1");
    let pages: BTreeSet<_> = fs::read_dir(directory.path())
        .unwrap()
        .map(|page| page.unwrap().file_name().into_string().unwrap())
        .filter(|name| name != "forebay-help.1")
        .collect();
    assert_eq!(pages, expected);
    for page in &pages {
        let mut roff = Command::new("groff");
        roff.args(["-man", "-Tutf8", "-ww", "-z"]).arg(directory.path().join(page));
        assert_eq!(said(&mut roff), "", "{page}");
    }
    let mut roff = Command::new("groff");
    let shown =
        said(roff.args(["-man", "-Tascii", "-P-cbou", "-rLL=200n"]).arg(directory.path().join("forebay.yaml.5")));
    for line in
        ["listeners:", "spool_dir: /tmp", "${FOREBAY_ADMIN_TOKEN:-0123456789abcdef}", "/[a-z]+/.*\\\\.(png|svg)"]
    {
        assert!(shown.contains(line), "{line:?} is not in\n{shown}");
    }
}

#[test]
fn bash_takes_the_completions() {
    let directory = tempfile::tempdir().unwrap();
    let script = directory.path().join("forebay.bash");
    fs::write(&script, said(&mut forebay(&["completions", "bash"]))).unwrap();
    let try_it =
        "source \"$1\"; COMP_WORDS=(forebay che); COMP_CWORD=1; _forebay forebay che forebay; echo ${COMPREPLY[*]}";
    let completed = said(Command::new("bash").args(["--norc", "-ec", try_it, "bash"]).arg(&script));
    assert_eq!(completed.trim(), "check");
}

#[test]
fn shellcheck_accepts_every_script() {
    let listed = said(Command::new("git").args(["ls-files", "-co", "--exclude-standard"]).current_dir(tree(".")));
    let shell = |path: &&str| {
        let text = fs::read(tree(path)).unwrap_or_default();
        let first = text.split(|byte| *byte == b'\n').next().unwrap_or_default();
        first.starts_with(b"#!") && first.ends_with(b"sh")
    };
    let ours = |path: &&str| path.starts_with("conf/") || path.starts_with(".ci/");
    let scripts: Vec<_> = listed.lines().filter(ours).filter(shell).collect();
    assert!(scripts.contains(&"conf/packaging/debian/postinst") && scripts.contains(&"conf/packaging/package.sh"));
    said(Command::new("shellcheck").args(scripts).current_dir(tree(".")));
}

/// `cargo install --path .` runs this script in place of cmake.
#[test]
fn a_build_without_its_tools_names_the_packages_that_bring_them() {
    let cmake = tree("conf/packaging/cmake.sh");
    assert!(said(Command::new(&cmake).arg("--version")).contains("cmake version"));
    assert!(text(".cargo/config.toml").contains("CMAKE = { value = \"conf/packaging/cmake.sh\", relative = true }"));
    let bare = tempfile::tempdir().unwrap();
    for tool in ["bash", "dirname"] {
        std::os::unix::fs::symlink(Path::new("/usr/bin").join(tool), bare.path().join(tool)).unwrap();
    }
    let output = Command::new(&cmake).env("PATH", bare.path()).arg("--version").output().unwrap();
    assert!(!output.status.success());
    let told = String::from_utf8(output.stdout).unwrap();
    for line in told.lines() {
        assert!(line.starts_with("cargo::error="), "{line}");
        assert!(line.contains(" clang cmake g++ git "), "{line}");
    }
    assert!(told.contains("apt-get install"), "{told}");
}

/// The package metadata in Cargo.toml.
fn package() -> Json {
    let mut cargo = Command::new(std::env::var("CARGO").unwrap_or_else(|_| "cargo".to_owned()));
    let asked = cargo.args(["metadata", "--no-deps", "--offline", "--format-version=1"]).current_dir(tree("."));
    let output = asked.stderr(Stdio::inherit()).output().unwrap();
    let described: Json = serde_json::from_slice(&output.stdout).unwrap();
    described["packages"][0]["metadata"]["deb"].clone()
}

/// The files of the package: the source and the installed path of each. Files that package.sh creates come from
/// `target/dist`, except the pages of the manual, which come from `conf/manual` here.
fn installed(deb: &Json) -> Vec<(PathBuf, PathBuf)> {
    let mut files = Vec::new();
    for asset in deb["assets"].as_array().unwrap() {
        let [source, place] = [&asset[0], &asset[1]].map(|path| path.as_str().unwrap());
        let source = source.replace("target/dist/manual/", "conf/manual/");
        let (directory, name) = source.rsplit_once('/').unwrap_or((".", &source));
        let sources = match name.strip_prefix('*') {
            Some(_) if source.starts_with("target/") => Vec::new(),
            Some(end) => {
                let there = fs::read_dir(tree(directory)).unwrap().map(|file| file.unwrap().path());
                there.filter(|file| file.is_file() && file.to_string_lossy().ends_with(end)).collect()
            }
            None => vec![tree(&source)],
        };
        assert!(source.starts_with("target/") || !sources.is_empty(), "{source}");
        for source in sources {
            let place = match place.strip_suffix('/') {
                Some(directory) => Path::new(directory).join(source.file_name().unwrap()),
                None => PathBuf::from(place),
            };
            files.push((source, place));
        }
    }
    files
}

/// A path without `..` and `.`.
fn plain(path: &Path) -> PathBuf {
    let mut plain = PathBuf::new();
    for part in path.components() {
        match part {
            Component::ParentDir => drop(plain.pop()),
            Component::CurDir => {}
            part => plain.push(part),
        }
    }
    plain
}

#[test]
fn every_file_that_the_package_brings_is_there() {
    let deb = package();
    for (source, _) in installed(&deb) {
        assert!(source.starts_with(tree("target")) || source.is_file(), "{}", source.display());
    }
    let changelog = text(deb["changelog"].as_str().unwrap());
    assert!(changelog.starts_with(&format!("forebay ({}-1) ", env!("CARGO_PKG_VERSION"))), "{changelog}");
}

/// cargo-deb installs and enables each unit in this directory.
#[test]
fn the_package_enables_the_service_and_nothing_else() {
    let units = fs::read_dir(tree(package()["systemd-units"]["unit-scripts"].as_str().unwrap())).unwrap();
    let units = units.map(|file| file.unwrap().file_name().into_string().unwrap());
    let kinds = [".service", ".socket", ".timer", ".path", ".target", ".mount"];
    let units: Vec<_> = units.filter(|name| kinds.iter().any(|kind| name.ends_with(kind))).collect();
    assert_eq!(units, ["forebay.service"]);
}

#[test]
fn what_an_installed_page_or_example_links_to_is_installed() {
    let files = installed(&package());
    let places: BTreeSet<_> = files.iter().map(|(_, place)| place.clone()).collect();
    let link = Regex::new(r"\]\(([^)\s#]+)[^)\s]*\)|\$schema=(\S+)").unwrap();
    let code = Regex::new(r"(?s)```.*?```|`[^`\n]*`").unwrap();
    let mut links = 0;
    for (source, place) in &files {
        let text = match source.extension().and_then(OsStr::to_str) {
            Some("md") => said(Command::new("sed").arg("-f").arg(tree("conf/packaging/manual.sed")).arg(source)),
            Some("yaml") => fs::read_to_string(source).unwrap(),
            _ => continue,
        };
        let directory = Path::new("/").join(place.parent().unwrap());
        for found in link.captures_iter(&code.replace_all(&text, "")) {
            let target = found.get(1).or(found.get(2)).unwrap().as_str();
            if target.contains("://") || target.starts_with("mailto:") {
                continue;
            }
            let leads = plain(&directory.join(target));
            let leads = leads.strip_prefix("/").unwrap();
            assert!(places.contains(leads), "{}: {target} would be {}", place.display(), leads.display());
            links += 1;
        }
    }
    assert!(links > 150, "{links}");
}

#[test]
fn the_first_run_is_built_fast_and_says_how_long_it_takes() {
    let make = |targets: &[&str]| said(Command::new("make").arg("-n").args(targets).current_dir(tree(".")));
    let run = make(&["run"]);
    assert!(run.contains("--profile fast") && run.contains("minutes") && !run.contains("--release"), "{run}");
    let release = make(&["package"]);
    assert!(release.contains("release.sh") && release.contains("package.sh"), "{release}");
    let targets = text("Makefile");
    let targets = targets.lines().find_map(|line| line.strip_prefix(".PHONY: ")).unwrap();
    let help = said(Command::new("make").arg("help").current_dir(tree(".")));
    for target in targets.split(' ').filter(|target| *target != "quick") {
        assert!(help.lines().any(|line| line.starts_with(&format!("  make {target} "))), "{target}: {help}");
    }
}
