//! Module dependencies: top-level modules import only downwards, without cycles, and few use Pingora's `Session`.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use regex::Regex;

/// The levels, from the bottom. A module may import from its own level and from lower ones.
const LEVELS: [&[&str]; 9] = [
    &["phase", "party", "error", "framing", "net", "printable", "upkeep", "files"],
    &["expression"],
    &["config", "metrics"],
    &[
        "account",
        "client",
        "filter",
        "upstream",
        "access_log",
        "eventloop",
        "finished",
        "import",
        "origin",
        "recorder",
        "slow_client",
        "spans",
        "spool",
        "scheduler",
    ],
    &["body"],
    &["acme", "admin", "proxy"],
    &["gateway"],
    &["cli"],
    &["main"],
];

/// The code of each top-level module, file and folder, without comments and tests.
fn modules() -> BTreeMap<String, String> {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut modules: BTreeMap<String, String> = BTreeMap::new();
    for file in files(&src) {
        let inner = file.strip_prefix(&src).expect("a file of src").with_extension("");
        let top = inner.iter().next().expect("a name").to_string_lossy().into_owned();
        let text = fs::read_to_string(&file).expect("a source file");
        let code = text.split("#[cfg(test)]\nmod tests").next().unwrap_or_default();
        let lines = code.lines().filter(|line| !line.trim_start().starts_with("//"));
        modules.entry(top).or_default().extend(lines.map(|line| format!("{line}\n")));
    }
    modules.remove("lib");
    modules
}

fn files(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).expect("a folder of sources").map(|entry| entry.expect("an entry").path());
    entries.flat_map(|path| if path.is_dir() { files(&path) } else { vec![path] }).collect()
}

/// The top-level modules used by this code, as `crate::x` or, in `main`, as `forebay::x`, including braces.
fn imports(code: &str) -> BTreeSet<String> {
    let path = Regex::new(r"\b(?:crate|forebay)::(?:(\w+)|\{([^;]*)\})").expect("a pattern");
    let word = Regex::new(r"(?:^|,)\s*(\w+)").expect("a pattern");
    let nested = Regex::new(r"\{[^{}]*\}").expect("a pattern");
    path.captures_iter(code)
        .flat_map(|found| match (found.get(1), found.get(2)) {
            (Some(one), _) => vec![one.as_str().to_owned()],
            (_, Some(list)) => {
                let flat = nested.replace_all(list.as_str(), "");
                word.captures_iter(&flat).map(|name| name[1].to_owned()).collect()
            }
            _ => Vec::new(),
        })
        .filter(|name| LEVELS.iter().any(|level| level.contains(&name.as_str())))
        .collect()
}

fn level(module: &str) -> usize {
    let found = LEVELS.iter().position(|level| level.contains(&module));
    found.unwrap_or_else(|| panic!("`{module}` has no level: put it where it belongs in tests/it/imports.rs"))
}

#[test]
fn imports_point_down_and_never_round_in_a_circle() {
    let modules = modules();
    let mut edges: BTreeMap<&str, BTreeSet<String>> = BTreeMap::new();
    for (module, code) in &modules {
        let mut imported = imports(code);
        imported.remove(module);
        for other in &imported {
            assert!(level(other) <= level(module), "`{module}` imports `{other}`, which stands above it");
        }
        edges.insert(module, imported);
    }
    // Repeatedly removes modules without remaining imports; a cycle stays.
    while let Some(free) = edges.iter().find(|(_, to)| to.iter().all(|t| !edges.contains_key(t.as_str()))) {
        let free = *free.0;
        edges.remove(free);
    }
    assert!(edges.is_empty(), "these import each other: {edges:?}");
}

/// The paths of all modules below `src`, each with its code.
fn all_modules() -> Vec<(Vec<String>, String)> {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let for_tests = Regex::new(r"#\[cfg\(test\)\]\s+(?:pub(?:\(\w+\))? )?mod (\w+);").expect("a pattern");
    let sources = files(&src).into_iter().map(|file| {
        let inner = file.strip_prefix(&src).expect("a file of src").with_extension("");
        let path: Vec<_> = inner.iter().map(|name| name.to_string_lossy().into_owned()).collect();
        (path, fs::read_to_string(&file).expect("a source file"))
    });
    let sources: Vec<_> = sources.collect();
    let tests: BTreeSet<Vec<String>> = sources
        .iter()
        .flat_map(|(path, text)| {
            let named = for_tests.captures_iter(text).map(|found| found[1].to_owned());
            named.map(|name| path.iter().cloned().chain([name]).collect()).collect::<Vec<_>>()
        })
        .collect();
    let code = |text: &str| {
        let code = text.split("#[cfg(test)]\nmod tests").next().unwrap_or_default();
        code.lines().filter(|line| !line.trim_start().starts_with("//")).map(|line| format!("{line}\n")).collect()
    };
    let sources = sources.into_iter().filter(|(path, _)| !tests.contains(path));
    sources.map(|(path, text)| (path, code(&text))).collect()
}

/// The paths that this module names with `crate`, `super` or `self`, from the root of the crate.
fn named_paths(module: &[String], code: &str) -> Vec<Vec<String>> {
    fn expand(prefix: &str, tree: &str, paths: &mut Vec<String>) {
        let (mut depth, mut begin) = (0, 0);
        for (index, letter) in tree.char_indices().chain([(tree.len(), ',')]) {
            match letter {
                '{' => depth += 1,
                '}' => depth -= 1,
                ',' if depth == 0 => {
                    let one = tree[begin..index].trim();
                    begin = index + 1;
                    match one.strip_suffix('}').and_then(|one| one.split_once('{')) {
                        Some((more, inner)) => expand(&format!("{prefix}{more}"), inner, paths),
                        None => paths.push(format!("{prefix}{one}")),
                    }
                }
                _ => {}
            }
        }
    }
    let tree = Regex::new(r"\buse\s+([^;]+);").expect("a pattern");
    let inline = Regex::new(r"\b(?:crate|super|self)(?:::\w+)+").expect("a pattern");
    let mut paths = Vec::new();
    tree.captures_iter(code).for_each(|found| expand("", &found[1], &mut paths));
    paths.extend(inline.find_iter(code).map(|found| found.as_str().to_owned()));
    let absolute = |path: String| {
        let steps: Vec<_> = path.split("::").map(str::to_owned).collect();
        let up = steps.iter().take_while(|step| *step == "super").count();
        match steps[0].as_str() {
            "crate" => Some(steps[1..].to_vec()),
            "super" => Some([&module[..module.len().checked_sub(up)?], &steps[up..]].concat()),
            "self" => Some([module, &steps[1..]].concat()),
            _ => None,
        }
    };
    paths.into_iter().filter_map(absolute).collect()
}

/// A module that imports none of the others, or that none of the others imports.
fn outside_a_circle<'m>(edges: &BTreeMap<&'m str, BTreeSet<String>>) -> Option<&'m str> {
    let imported: BTreeSet<&str> = edges.values().flatten().map(String::as_str).collect();
    let imports_none = |to: &BTreeSet<String>| to.iter().all(|to| !edges.contains_key(to.as_str()));
    edges.iter().find(|(name, to)| imports_none(to) || !imported.contains(*name)).map(|(name, _)| *name)
}

#[test]
fn the_modules_of_a_folder_never_import_each_other_in_a_circle() {
    let modules = all_modules();
    let folders: BTreeSet<&[String]> = modules.iter().map(|(path, _)| &path[..path.len() - 1]).collect();
    for folder in folders {
        let mut edges: BTreeMap<&str, BTreeSet<String>> = BTreeMap::new();
        for (path, code) in modules.iter().filter(|(path, _)| path.starts_with(folder) && path.len() > folder.len()) {
            let own = &path[folder.len()];
            let named = named_paths(path, code).into_iter().filter(|to| to.starts_with(folder));
            let named = named.filter_map(|to| to.get(folder.len()).cloned()).filter(|to| to != own);
            edges.entry(own).or_default().extend(named);
        }
        while let Some(name) = outside_a_circle(&edges) {
            edges.remove(name);
        }
        let folder = folder.join("/");
        assert!(edges.is_empty(), "in `src/{folder}`: {edges:?}");
    }
}

#[test]
fn only_proxy_body_and_client_know_the_session_of_pingora() {
    let session = Regex::new(r"\bSession\b").expect("a pattern");
    // Connections to endpoints also use this name.
    let to_endpoints = Regex::new(r"(?:client::|Connected::|type )Session\b").expect("a pattern");
    for (module, code) in modules() {
        if !["proxy", "body", "client"].contains(&module.as_str()) {
            let code = to_endpoints.replace_all(&code, "");
            assert!(!session.is_match(&code), "`{module}` names a Session");
        }
    }
}

#[test]
fn no_file_is_called_mod() {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    assert!(files(&src).iter().all(|file| !file.ends_with("mod.rs")), "`foo.rs` stands beside `foo/`");
}

#[test]
fn imports_are_found_however_they_are_written() {
    let code = "use crate::phase::{Phase, Clock};\nuse crate::{config::{self, Config}, metrics};\nfn f() { crate::error::x() }";
    assert_eq!(imports(code).into_iter().collect::<Vec<_>>(), ["config", "error", "metrics", "phase"]);
}
