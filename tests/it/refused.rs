//! Refused reloads: whatever is wrong with the new configuration or its files, the old one stays active, and the
//! operator gets the report of `forebay check`.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use forebay::error::BuildError;
use forebay::filter::{Filter, FilterType, Stages, Surroundings};
use schemars::JsonSchema;
use serde::Deserialize;

use crate::harness::client::Client;
use crate::harness::gateway::Watched;
use crate::harness::secure::Authority;
use crate::harness::{Origin, Process, Setup};

fn saying(text: &str) -> String {
    format!("{{ name: all, filters: [ {{ respond: {{ status: 200, body: \"{text}\" }} }} ] }}")
}

/// The report of `forebay check` for this file.
fn checked(file: &Path) -> String {
    let mut command = Command::new(env!("CARGO_BIN_EXE_forebay"));
    let output = command.args(["check", "-c"]).arg(file).output().expect("the program");
    assert_eq!(output.status.code(), Some(78));
    String::from_utf8(output.stderr).expect("text")
}

/// Asserts that each of these is refused with this text and with the report of `check`, counted, and changes
/// nothing.
fn are_refused(process: &Process, file: &Path, wrong: &[(Setup, &str)]) {
    let mut kept = process.client();
    let counted = "forebay_config_reloads_total{result=\"refused\"}";
    let before = process.metric(counted);
    for (number, (setup, told)) in wrong.iter().enumerate() {
        fs::write(file, setup.yaml()).expect("the file");
        for target in ["/reload?dry_run=yes", "/reload"] {
            let answer = Client::connect(process.admin()).ask("POST", target, "", "");
            let report = answer.json()["report"].as_str().map(str::to_owned).unwrap_or_default();
            assert_eq!(answer.status, 422, "{told}: {}", answer.text());
            assert!(report.contains(told), "{told} is missing in\n{report}");
            assert!(report.contains("forebay.yaml:"), "no place in\n{report}");
            assert_eq!(report.trim_end(), checked(file).trim_end());
        }
        assert_eq!(kept.get("/").text(), "still here", "on a kept connection, after {told}");
        assert_eq!(process.client().get("/").text(), "still here", "on a new one");
        assert_eq!(process.metric(counted), before + number as f64 + 1.0, "a dry run does not count");
        assert_eq!(process.metric("forebay_config_generation"), 1.0);
    }
    process.says("the new configuration is refused, the previous one stays in force");
}

#[test]
fn a_certificate_that_is_of_no_use() {
    let (origin, authority) = (Origin::named("origin"), Authority::new());
    let setup = Setup::before(&origin).routes(&saying("still here"));
    let process = setup.spawn();
    let (one, other) = (authority.issue(&["a.test"]), authority.issue(&["a.test"]));
    let file = |name: &str, content: &[u8]| -> PathBuf {
        fs::write(setup.path(name), content).expect("a file");
        setup.path(name)
    };
    let expired = file("expired.pem", authority.issue_for_years("a.test", [2019, 2020]).as_bytes());
    let whole = fs::read(&one.certificate).expect("a certificate");
    let half = file("half.pem", &whole[..whole.len() / 2]);
    let empty = file("empty.pem", b"");
    let with = |cert: &Path, key: &Path| {
        let pair = format!("{{ cert: \"{}\", key: \"{}\" }}", cert.display(), key.display());
        let listener = format!("{{ name: more, address: \"127.0.0.1:0\", tls: {{ certificates: [ {pair} ] }} }}");
        setup.clone().also_listener(&listener)
    };
    are_refused(
        &process,
        &setup.path("forebay.yaml"),
        &[
            (with(&one.certificate, &other.key), "key"),
            (with(&expired, &expired), "expired on 2020-01-01"),
            (with(&half, &one.key), "half.pem"),
            (with(&one.certificate, &half), "half.pem"),
            (with(&empty, &one.key), "empty.pem"),
            (with(&setup.path("none.pem"), &one.key), "none.pem"),
            (with(&setup.path(""), &one.key), "a directory"),
        ],
    );
    fs::write(setup.path("forebay.yaml"), with(&one.certificate, &one.key).yaml()).expect("the file");
    assert_eq!(Client::connect(process.admin()).ask("POST", "/reload", "", "").status, 200, "a right one is taken");
}

#[test]
fn a_certificate_that_expired_while_it_was_served_refuses_nothing_else() {
    let (origin, authority) = (Origin::named("origin"), Authority::new());
    let setup = Setup::before(&origin);
    let expired = setup.path("expired.pem");
    fs::write(&expired, authority.issue_for_years("a.test", [2019, 2020])).expect("a file");
    let pair = format!("{{ cert: \"{0}\", key: \"{0}\" }}", expired.display());
    let secure =
        |keys: &str| format!("{{ name: more, address: \"127.0.0.1:0\", tls: {{ certificates: [ {pair} ]{keys} }} }}");
    let process = setup.clone().also_listener(&secure("")).routes(&saying("one")).spawn();
    for (keys, said) in [("", "two"), (", min_version: \"1.3\"", "three")] {
        setup.clone().also_listener(&secure(keys)).routes(&saying(said)).write();
        let answer = Client::connect(process.admin()).ask("POST", "/reload", "", "");
        assert_eq!(answer.status, 200, "{}", answer.text());
        assert_eq!(process.client().get("/").text(), said);
    }
}

#[test]
fn a_name_that_leads_nowhere_and_a_file_that_cannot_be_read() {
    let origin = Origin::named("origin");
    let setup = Setup::before(&origin).routes(&saying("still here"));
    let process = setup.spawn();
    fs::create_dir(setup.path("folder")).expect("a directory");
    let route =
        |keys: &str| setup.clone().also_route(&format!("{{ name: more, match: {{ path: {{ exact: /x }} }}, {keys} }}"));
    let folder = setup.path("folder").display().to_string();
    let missing = setup.path("missing").display().to_string();
    are_refused(
        &process,
        &setup.path("forebay.yaml"),
        &[
            (
                setup.clone().also_upstream("far", "endpoints: [ { address: \"nowhere.invalid:80\" } ]"),
                "nowhere.invalid",
            ),
            (route("upstream: nowhere"), "unknown upstream `nowhere`"),
            (
                route(&format!("upstream: app, filters: [ {{ ip_set: {{ source: {{ path: \"{missing}\" }} }} }} ]")),
                "missing",
            ),
            (
                route(&format!("upstream: app, filters: [ {{ ip_set: {{ source: {{ path: \"{folder}\" }} }} }} ]")),
                "folder",
            ),
            (route("upstream: app, filters: [ { access: { when: 'nothing.known' } } ]"), "when"),
            (route(&format!("upstream: \"${{file:{missing}}}\"")), "missing"),
            (setup.clone().more(&format!("include: \"{missing}\"")), "missing"),
        ],
    );
}

/// A filter that a program adds, and that rejects some settings.
struct Fussy;

#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct FussySettings {
    /// The only value it accepts.
    word: String,
}

impl Filter for Fussy {
    fn stages(&self) -> Stages {
        Stages::REQUEST
    }
}

impl FilterType for Fussy {
    const KEY: &'static str = "fussy";
    type Settings = FussySettings;

    fn build(settings: &FussySettings, _: &Surroundings<'_>) -> Result<Self, BuildError> {
        match &*settings.word {
            "please" => Ok(Fussy),
            word => Err(BuildError::new("word", format!("`{word}` is not the word: say please"))),
        }
    }
}

#[test]
fn a_filter_of_a_program_of_ones_own_that_cannot_be_built() {
    let origin = Origin::named("origin");
    let setup = Setup::before(&origin).filter::<Fussy>();
    let gateway = setup.clone().filters("fussy: { word: please }").start_reloading();
    let mut kept = gateway.client();
    assert_eq!(kept.get("/").text(), "origin");
    setup.clone().filters("fussy: { word: now }").write();
    let answer = Client::connect(gateway.admin()).ask("POST", "/reload", "", "");
    assert_eq!(answer.status, 422);
    let report = answer.json()["report"].as_str().expect("a report").to_owned();
    for part in ["`now` is not the word", "say please", "forebay.yaml:"] {
        assert!(report.contains(part), "{part} is missing in\n{report}");
    }
    let builder = setup.builder();
    let config = builder.load(&setup.path("forebay.yaml")).unwrap_or_else(|e| panic!("{e}"));
    assert_eq!(config.report(&builder.check(&config)).to_string(), report, "as a check tells it");
    assert_eq!(kept.get("/").text(), "origin");
    assert_eq!(gateway.metric("forebay_config_reload_failed"), 1.0);
    setup.clone().filters("fussy: { word: please }").write();
    assert_eq!(Client::connect(gateway.admin()).ask("POST", "/reload", "", "").status, 200);
}
