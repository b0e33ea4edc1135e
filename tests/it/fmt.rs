//! `forebay fmt`: the normal form of files, which keeps their meaning.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use forebay::config::normal;
use serde_yaml::Value;

const ROOT: &str = env!("CARGO_MANIFEST_DIR");

/// Every YAML file below this directory of the project.
fn files(below: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut directories = vec![Path::new(ROOT).join(below)];
    while let Some(directory) = directories.pop() {
        for entry in fs::read_dir(directory).expect("a directory") {
            let path = entry.expect("an entry").path();
            match path.is_dir() {
                true => directories.push(path),
                false if path.extension().is_some_and(|extension| extension == "yaml") => found.push(path),
                false => {}
            }
        }
    }
    found
}

fn forebay(arguments: &[&str], input: &str) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_forebay"));
    command.arg("fmt").args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().expect("the program");
    child.stdin.take().expect("its input").write_all(input.as_bytes()).expect("to write");
    child.wait_with_output().expect("its output")
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).expect("text")
}

#[test]
fn every_file_that_is_shipped_is_in_its_normal_form() {
    let shipped =
        ["conf/forebay.yaml", "conf/full.yaml", "conf/packaging/forebay.yaml", "conf/packaging/container.yaml"];
    let shipped = shipped.iter().map(|name| Path::new(ROOT).join(name));
    let mut count = 0;
    for path in shipped.chain(files("conf/examples")) {
        let text = fs::read_to_string(&path).expect("a file");
        let formed = normal(&path.display().to_string(), &text).unwrap_or_else(|report| panic!("{report}"));
        assert_eq!(formed, text, "{}: `forebay fmt` changes it", path.display());
        count += 1;
    }
    assert!(count > 30, "{count} files");
}

/// The text with another indentation: that of each line times `times`, in maps and lists alike.
fn indented_by(text: &str, times: usize) -> String {
    let line = |line: &str| {
        let rest = line.trim_start_matches(' ');
        " ".repeat(times * (line.len() - rest.len())) + rest + "  \n"
    };
    text.lines().map(line).collect()
}

#[test]
fn what_was_indented_in_another_way_comes_back() {
    let mut count = 0;
    for path in files("conf/examples") {
        let text = fs::read_to_string(&path).expect("a file");
        let odd = indented_by(&text, 3);
        let before: Value = serde_yaml::from_str(&text).expect("YAML");
        // Lists of maps and block texts become invalid, or change, with this indentation.
        if serde_yaml::from_str::<Value>(&odd).ok().as_ref() != Some(&before) {
            continue;
        }
        let formed = normal(&path.display().to_string(), &odd).unwrap_or_else(|report| panic!("{report}"));
        assert_eq!(serde_yaml::from_str::<Value>(&formed).expect("YAML"), before, "{formed}");
        let letters = |text: &str| text.split_whitespace().collect::<String>();
        assert_eq!(letters(&formed), letters(&text), "comments and all");
        count += 1;
    }
    assert!(count > 3, "{count} files");
}

#[test]
fn files_are_formed_together_or_not_at_all() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = |name: &str| dir.path().join(name).display().to_string();
    let main = "include: [a.yaml]\nlisteners: [ { name: web, address: 127.0.0.1:0 } ]\nroutes:\n- name: all # it\n  filters: [ { respond: { status: 200 } } ]\n";
    fs::write(path("main.yaml"), main).expect("a file");
    fs::write(path("a.yaml"), "upstreams:\n     {}").expect("a file");

    let checked = forebay(&["--check", "-c", &path("main.yaml")], "");
    assert_eq!((checked.status.code(), text(&checked.stdout).lines().count()), (Some(1), 2));
    assert_eq!(fs::read_to_string(path("main.yaml")).expect("a file"), main, "nothing is changed");

    fs::write(path("b.yaml"), "routes: [\n").expect("a file");
    let refused = forebay(&[&path("a.yaml"), &path("b.yaml")], "");
    assert_eq!(refused.status.code(), Some(78));
    assert!(text(&refused.stderr).contains("b.yaml:2:1"), "{}", text(&refused.stderr));
    assert_eq!(fs::read_to_string(path("a.yaml")).expect("a file"), "upstreams:\n     {}", "nothing is changed");

    std::os::unix::fs::symlink("main.yaml", path("link.yaml")).expect("a link");
    let formed = forebay(&[&path("link.yaml"), &path("a.yaml")], "");
    assert_eq!((formed.status.code(), text(&formed.stdout).lines().count()), (Some(0), 2));
    let now = fs::read_to_string(path("main.yaml")).expect("a file");
    assert_eq!(now, main.replace("\n- name", "\n  - name").replace("\n  filters", "\n    filters"));
    assert!(fs::symlink_metadata(path("link.yaml")).expect("a link").is_symlink());
    assert_eq!(fs::read_to_string(path("a.yaml")).expect("a file"), "upstreams:\n  {}\n");
    let again = forebay(&["--check", "-c", &path("main.yaml")], "");
    assert_eq!((again.status.code(), text(&again.stdout)), (Some(0), String::new()));

    let piped = forebay(&["-"], "a:\n- b\n");
    assert_eq!((piped.status.code(), text(&piped.stdout)), (Some(0), "a:\n  - b\n".to_owned()));
}
