//! A configuration and a list of endpoints: whatever an editor or a tool has left in the file, there is an answer in
//! time, and it can be shown.

use std::fs;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::LazyLock;
use std::time::{Duration, Instant};

use forebay::config::{self, Config};
use forebay::gateway::{Builder, Gateway};
use serde_yaml::Serializer;
use serde_yaml::with::singleton_map_recursive;

use super::mutate;

const WORDS: &[&str] = &[
    "listeners:",
    "upstreams: ",
    "routes: ",
    "name: ",
    "address: ",
    "127.0.0.1:80",
    "unix:/run/x",
    "endpoints: ",
    "match: ",
    "hosts: ",
    "path: { prefix: / }",
    "regex: ",
    "filters: ",
    "- ",
    "\n  ",
    "\n",
    ": ",
    "{ ",
    " }",
    "[ ",
    " ]",
    ", ",
    "&a ",
    "*a",
    "<<: *a",
    "? ",
    "!!str ",
    "| ",
    "> ",
    "\"",
    "'",
    "# ",
    "---\n",
    "...\n",
    "%YAML 1.2\n",
    "${HOME}",
    "${X:-y}",
    "$${",
    "\t",
    "null",
    "~",
    "true",
    "1e400",
    "-1",
    "0x10",
    "18446744073709551616",
    "16MiB",
    "1/s",
    "0s",
    "99999999999h",
    "my.app",
    "\u{e9}",
    "\u{feff}",
    "\u{85}",
    "\u{2028}",
    "\u{202e}",
    "\u{1b}[31m",
];

/// Far more than any of these inputs takes on a busy machine, and far less than what is not linear.
const PATIENCE: Duration = Duration::from_secs(20);

static BUILDER: LazyLock<Builder> = LazyLock::new(Gateway::builder);

#[test]
fn any_text_is_a_configuration_or_is_told_why_not() {
    mutate::explore("config", WORDS, check);
    // The files that other tests are about are a corpus of their own.
    for folder in ["conf", "tests/it/config/wrong"] {
        mutate::explore_from("config", files(Path::new(folder)), WORDS, check);
    }
}

#[test]
fn any_text_is_a_list_of_endpoints_or_is_told_why_not() {
    mutate::explore("endpoints", WORDS, check_endpoints);
}

fn files(folder: &Path) -> Vec<Vec<u8>> {
    let paths = fs::read_dir(folder).expect("a folder").map(|entry| entry.expect("an entry").path());
    let yaml = paths.filter(|path| path.extension().is_some_and(|extension| extension == "yaml"));
    yaml.map(|path| fs::read(path).expect("a file")).collect()
}

fn check(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    let began = Instant::now();
    match BUILDER.parse("fuzz.yaml", text) {
        Err(report) => {
            assert!(report.errors() > 0);
            shown(&report.to_string());
        }
        Ok(config) => {
            assert_eq!(config.warnings().errors(), 0);
            shown(&config.warnings().to_string());
            if is_local(&config) {
                shown(&config.report(&BUILDER.check(&config)).to_string());
            }
            written_again(&config);
        }
    }
    assert!(began.elapsed() < PATIENCE, "{:?}", began.elapsed());
}

fn check_endpoints(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    let began = Instant::now();
    if let Err(said) = config::endpoints("fuzz.yaml", text) {
        let line = said.strip_prefix("fuzz.yaml:").and_then(|rest| rest.split(':').next());
        let line: usize = line.and_then(|line| line.parse().ok()).unwrap_or_else(|| panic!("no line: {said}"));
        assert!((1..=text.lines().count() + 1).contains(&line), "{said}");
    }
    assert!(began.elapsed() < PATIENCE, "{:?}", began.elapsed());
}

/// What is said fits a terminal, whatever stands in the file.
fn shown(said: &str) {
    assert!(!said.chars().any(|c| c.is_control() && c != '\n'), "{said:?}");
}

/// Whether nothing has to be looked up to build it, and no file to be read.
fn is_local(config: &Config) -> bool {
    config.upstreams.values().all(|upstream| {
        let literal = |address: &str| address.parse::<SocketAddr>().is_ok() || address.starts_with("unix:");
        upstream.dns.is_none()
            && upstream.file.is_none()
            && upstream.endpoints.iter().all(|one| literal(&one.address.0))
    })
}

/// What is in effect, written as a file, is in effect again.
fn written_again(config: &Config) {
    let written = written(config);
    // `${` would be taken for a variable.
    if written.contains("${") {
        return;
    }
    let again = BUILDER.parse("again.yaml", &written).unwrap_or_else(|report| panic!("{written}\n{report}"));
    assert_eq!(self::written(&again), written);
}

/// As it is read: a choice with a value is a map of one key, and no tag.
fn written(config: &Config) -> String {
    let mut bytes = Vec::new();
    singleton_map_recursive::serialize(config, &mut Serializer::new(&mut bytes)).expect("what can be written");
    String::from_utf8(bytes).expect("text")
}
