//! Configurations of several files: their merged content, and changes and errors in one of them.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use forebay::gateway::Gateway;

use crate::harness::client::Client;
use crate::harness::gateway::Watched;
use crate::harness::{Origin, Process, Setup, eventually};

/// A file with a route for paths below `/name` that responds with a text.
fn answering(name: &str, text: &str) -> String {
    format!(
        "routes:\n  - name: {name}\n    match: {{ path: {{ prefix: /{name} }} }}\n    filters: [ {{ respond: {{ status: 200, body: \"{text}\" }} }} ]\n"
    )
}

/// A setup whose main file includes `conf.d/*.yaml`, and that directory.
fn several(origin: &Origin) -> (Setup, PathBuf) {
    let setup = Setup::before(origin).more("include: conf.d/*.yaml");
    let directory = setup.path("conf.d");
    fs::create_dir_all(&directory).expect("a directory");
    (setup, directory)
}

fn write(directory: &Path, name: &str, text: &str) {
    fs::write(directory.join(name), text).expect("a file");
}

fn reload(process: &Process) -> (u16, serde_json::Value) {
    let answer = Client::connect(process.admin()).ask("POST", "/reload", "", "");
    (answer.status, answer.json())
}

fn forebay(arguments: &[&str], file: &Path) -> (Option<i32>, String, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_forebay"));
    let output = command.args(arguments).arg("-c").arg(file).output().expect("the program");
    let text = |bytes| String::from_utf8(bytes).expect("text");
    (output.status.code(), text(output.stdout), text(output.stderr))
}

#[test]
fn files_come_change_and_go_and_a_broken_one_changes_nothing() {
    let origin = Origin::named("origin");
    let (setup, conf_d) = several(&origin);
    write(&conf_d, "a.yaml", &answering("a", "one"));
    let process = setup.spawn();
    let mut kept = process.client();
    assert_eq!((kept.get("/a").text(), kept.get("/b").text()), ("one", "origin"));

    write(&conf_d, "a.yaml", &answering("a", "two"));
    write(&conf_d, "b.yaml", &answering("b", "new"));
    assert_eq!(reload(&process).0, 200);
    assert_eq!((kept.get("/a").text(), kept.get("/b").text()), ("two", "new"));

    write(&conf_d, "a.yaml", &answering("a", "three"));
    for (text, place, told) in [
        (answering("b", "x").replace("respond", "respnod"), "conf.d/b.yaml:4:18", "did you mean `respond`?"),
        ("routes: [".to_owned(), "conf.d/b.yaml:1:10", "invalid YAML"),
        (answering("a", "x"), "conf.d/b.yaml:2:11", "two routes have the name `a`"),
        ("routes: [{ name: b, upstream: nowhere }]".to_owned(), "conf.d/b.yaml:1:31", "nowhere"),
        ("admin: { address: \"127.0.0.1:1\" }".to_owned(), "conf.d/b.yaml:1:10", "is set in two places"),
    ] {
        write(&conf_d, "b.yaml", &text);
        let (status, outcome) = reload(&process);
        let report = outcome["report"].as_str().expect("a report");
        assert!(status == 422 && report.contains(place) && report.contains(told), "{status} {place} {told}: {report}");
        let (code, _, checked) = forebay(&["check"], &setup.path("forebay.yaml"));
        assert_eq!((code, checked.trim_end()), (Some(78), report.trim_end()), "`check` says the same");
        assert_eq!((kept.get("/a").text(), kept.get("/b").text()), ("two", "new"), "after {told}");
    }
    fs::remove_file(conf_d.join("b.yaml")).expect("a file to remove");
    assert_eq!(reload(&process).0, 200);
    assert_eq!((kept.get("/a").text(), kept.get("/b").text()), ("three", "origin"));
}

#[test]
fn a_gateway_that_watches_sees_every_file_and_directory() {
    let origin = Origin::named("origin");
    // The directory does not exist yet.
    let setup = Setup::before(&origin).more("include: conf.d/*.yaml");
    let conf_d = setup.path("conf.d");
    setup.write();
    let process = setup.spawn_at(&setup.path("forebay.yaml"), &["--watch"]);
    let says = |path: &str, text: &str| {
        eventually(text, || (process.client().get(path).text() == text).then_some(()));
    };
    says("/a", "origin");
    fs::create_dir(&conf_d).expect("a directory");
    write(&conf_d, "a.yaml", &answering("a", "one"));
    says("/a", "one");
    write(&conf_d, "a.yaml", &answering("a", "two"));
    says("/a", "two");
    write(&conf_d, "b.yaml", "routes: [");
    process.wait_metric("forebay_config_reloads_total{result=\"refused\"}", |count| count >= 1.0);
    assert_eq!(process.client().get("/a").text(), "two");
    write(&conf_d, "b.yaml", "include: ../more/b.yaml");
    process.wait_metric("forebay_config_reloads_total{result=\"refused\"}", |count| count >= 2.0);
    let more = setup.path("more");
    fs::create_dir(&more).expect("a directory");
    write(&more, "b.yaml", &answering("b", "far"));
    says("/b", "far");
    fs::rename(&conf_d, setup.path("gone")).expect("to rename it");
    says("/b", "origin");
}

#[test]
fn every_command_names_the_right_file() {
    let origin = Origin::named("origin");
    let (setup, conf_d) = several(&origin);
    write(&conf_d, "shop.yaml", &(answering("shop", "hello") + "    deadline: 7s\n"));
    let process = setup.spawn();
    let main = setup.path("forebay.yaml");
    let shop = conf_d.join("shop.yaml");
    let shop = shop.to_str().expect("text");

    let (code, told, _) = forebay(&["check"], &main);
    assert_eq!(code, Some(0));
    assert!(told.contains(&format!("included: {shop}")), "{told}");

    let (_, told, _) = forebay(&["dump"], &main);
    assert!(told.starts_with(&format!("# {}\n# {shop}\n", main.display())), "{told}");
    let again = Gateway::builder().parse("again.yaml", &told).unwrap_or_else(|report| panic!("{report}"));
    assert_eq!(again.routes.len(), 2, "a dump stands alone");

    let (code, told, _) = forebay(&["match", "http://a.test/shop", "--listener", "web"], &main);
    assert_eq!(code, Some(0));
    assert!(told.contains(&format!("routes[1], {shop} line 2")), "{told}");
    assert!(told.contains(&format!("routes[1].deadline = 7s ({shop} line 5)")), "{told}");
    let (_, told, _) = forebay(&["match", "http://a.test/shop", "--listener", "web", "--format", "json"], &main);
    let told: serde_json::Value = serde_json::from_str(&told).expect("JSON");
    assert_eq!((&told["outcome"]["route"]["file"], &told["outcome"]["route"]["line"]), (&shop.into(), &2.into()));

    write(&conf_d, "shop.yaml", &(answering("shop", "hello") + "    deadline: 9s\n"));
    let admin = process.admin().to_string();
    let output = Command::new(env!("CARGO_BIN_EXE_forebay")).args(["diff", "--admin", &admin]).output();
    let told = String::from_utf8(output.expect("the program").stdout).expect("text");
    assert!(
        told.contains(&format!("~ routes.shop.deadline: 7s -> 9s  (from the next request on), {shop}:5")),
        "{told}"
    );
}
