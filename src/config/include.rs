//! `include:`: a configuration of several files, read as if it were one.
//!
//! A pattern is relative to the file that contains it. Its matches are read in order of their names, and each file
//! once, at its first inclusion. Lists are appended, sections are merged, and no value overrides another: a value
//! that is set twice is an error that shows both places. This happens before interpolation and decoding, so all
//! later steps see one document, and one tree of places that knows the file of each value.

use std::collections::HashSet;
use std::fs;
use std::io;
use std::ops::Range;
use std::path::{Component, Path, PathBuf};

use glob::{MatchOptions, Pattern};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_yaml::{Mapping, Value};

use super::file::{self, Unreadable};
use super::interpolate::{Variables, interpolate, reason};
use super::place::{Place, SourceMap};
use super::report::{Finding, FindingLocation, Source};
use super::units::Size;
use super::{FILE_MAX, syntax};
use crate::error::path::{self, join};

/// The key in YAML.
const INCLUDE: &str = "include";
/// Limit on the files of a configuration.
const FILES_MAX: usize = 1000;
/// Limit on nested includes.
const LEVELS_MAX: usize = 8;
/// Limit on the directory entries that are compared with patterns.
const ENTRIES_MAX: usize = 100_000;
/// Maps of named things: each entry must be in one file as a whole.
const NAMED: [&str; 2] = ["upstreams", "acme"];
/// `*` and `?` match no hidden file, as in a shell; Kubernetes keeps its own files in hidden ones.
const VISIBLE: MatchOptions =
    MatchOptions { case_sensitive: true, require_literal_separator: true, require_literal_leading_dot: true };

/// Further files of a configuration.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum Include {
    /// A file, or a pattern such as `conf.d/*.yaml`.
    One(String),
    /// Several of them.
    Several(Vec<String>),
}

impl Default for Include {
    fn default() -> Self {
        Include::Several(Vec::new())
    }
}

/// A configuration with all its files.
pub(super) struct Gathered {
    /// The files.
    pub source: Source,
    /// Their merged content.
    pub written: Value,
    /// Errors of the files themselves. If one of them is an error, the rest is not checked.
    pub findings: Vec<Finding>,
}

/// Reads and merges all included files; `name` and `text` are those of the main file.
pub(super) fn gather(name: &str, text: &str, variables: Variables<'_>) -> Gathered {
    let mut gathering = Gathering {
        variables,
        source: Source::default(),
        written: Mapping::new(),
        findings: Vec::new(),
        above: Vec::new(),
        read: HashSet::new(),
        entries: 0,
        full: false,
    };
    let identity = fs::canonicalize(name).unwrap_or_else(|_| PathBuf::from(name));
    gathering.look(parent(Path::new(name)));
    gathering.file(name, text, identity);
    let Gathering { source, written, findings, .. } = gathering;
    Gathered { source, written: Value::Mapping(written), findings }
}

struct Gathering<'v> {
    variables: Variables<'v>,
    source: Source,
    written: Mapping,
    findings: Vec<Finding>,
    /// The chain of files whose includes are being read, as canonical paths, the main file first.
    above: Vec<PathBuf>,
    /// The files that have been read.
    read: HashSet<PathBuf>,
    entries: usize,
    /// A limit was reached, so no further file is read.
    full: bool,
}

/// What is wrong with a pattern, and how to fix it.
struct Problem {
    title: String,
    label: String,
}

fn problem(title: impl Into<String>, label: impl Into<String>) -> Problem {
    Problem { title: title.into(), label: label.into() }
}

impl Gathering<'_> {
    /// Merges the text of a file, and then the files it includes.
    fn file(&mut self, name: &str, text: &str, identity: PathBuf) {
        let text = text.strip_prefix('\u{feff}').unwrap_or(text);
        self.read.insert(identity.clone());
        let base = self.source.add(name, text);
        let places = SourceMap::behind(text, base, self.source.places.values);
        let values = self.source.places.values + places.values;
        let mut map = match syntax::read(text, base, &places, base > 0) {
            Ok(map) => map,
            Err(found) => return self.findings.extend(found),
        };
        let patterns = map.remove(INCLUDE).map(|include| self.patterns(&include, &places)).unwrap_or_default();
        match (self.source.places.root_mut(), places.root()) {
            (Some(at), Some(there)) => merge(&mut self.written, at, map, there, "", &mut self.findings),
            (None, Some(_)) => (self.written, self.source.places) = (map, places),
            (_, None) => {}
        }
        self.source.places.values = values;
        self.above.push(identity);
        for (pattern, at) in patterns {
            if let Err(Problem { title, label }) = self.follow(Path::new(name), &pattern, &at) {
                self.findings.push(Finding::error(FindingLocation::Bytes(at), title).label(label));
            }
        }
        self.above.pop();
    }

    /// The patterns in the value of `include`, and their positions.
    fn patterns(&mut self, include: &Value, places: &SourceMap) -> Vec<(String, Range<usize>)> {
        let at = |path: &str| places.find(path).map_or(0..0, |found| found.value);
        let mut patterns = Vec::new();
        let mut one = |value: &Value, path: &str| match value {
            Value::String(text) if !text.is_empty() => patterns.push((text.clone(), at(path))),
            _ => {
                let finding = Finding::error(FindingLocation::Bytes(at(path)), format!("`{path}` names no file"));
                self.findings.push(finding.label("expected a text such as `conf.d/*.yaml`, or a list of such"));
            }
        };
        match include {
            Value::Null => {}
            Value::Sequence(items) => {
                items.iter().enumerate().for_each(|(index, item)| one(item, &format!("{INCLUDE}[{index}]")));
            }
            other => one(other, INCLUDE),
        }
        patterns
    }

    /// Reads all matches of a pattern.
    fn follow(&mut self, name: &Path, written: &str, at: &Range<usize>) -> Result<(), Problem> {
        let interpolated = interpolate(written, self.variables).map_err(|found| problem(found.title, found.label))?;
        let pattern = parent(name).join(interpolated.map_or_else(|| written.to_owned(), |done| done.text));
        let is_plain = !has_signs(&pattern.to_string_lossy());
        let found = if is_plain {
            self.look(parent(&pattern));
            vec![pattern]
        } else {
            self.matches(&pattern)?
        };
        if found.is_empty() {
            let finding =
                Finding::warning(FindingLocation::Bytes(at.clone()), format!("no file is included by `{written}`"));
            self.findings.push(finding.label("nothing has such a name"));
        }
        for path in found {
            self.include(&path, is_plain, at)?;
        }
        Ok(())
    }

    fn include(&mut self, path: &Path, is_plain: bool, at: &Range<usize>) -> Result<(), Problem> {
        if self.full {
            return Ok(());
        }
        let shown = path.display();
        let identity = fs::canonicalize(path).map_err(|error| unreadable(path, &error.into()))?;
        if let Some(level) = self.above.iter().position(|above| *above == identity) {
            let title = match level + 1 == self.above.len() {
                true => format!("the file `{shown}` includes itself"),
                false => format!("the file `{shown}` is included by a file that it includes"),
            };
            let label = if is_plain { "take it out" } else { "keep what is included in a directory of its own" };
            return Err(problem(title, label));
        }
        if self.read.contains(&identity) {
            return Ok(());
        }
        if self.above.len() > LEVELS_MAX {
            return Err(problem(
                format!("`{shown}` is included at more than {LEVELS_MAX} levels"),
                "include it from a file further up",
            ));
        }
        if self.read.len() == FILES_MAX {
            self.full = true;
            return Err(problem(format!("more than {FILES_MAX} files are included"), "join some of them"));
        }
        let most = Size(FILE_MAX.0.saturating_sub(self.source.text.len() as u64));
        let bytes = file::read(path, most).map_err(|error| {
            self.full |= matches!(error, Unreadable::TooLarge(_));
            unreadable(path, &error)
        })?;
        match String::from_utf8(bytes) {
            Ok(text) => self.file(&path.to_string_lossy(), &text, identity),
            Err(error) => {
                let base = self.source.text.len() + 1;
                let (text, finding) = syntax::no_text(base, &error);
                self.source.add(&path.to_string_lossy(), &text);
                self.findings.push(finding);
                let at = Finding::error(FindingLocation::Bytes(at.clone()), format!("`{shown}` cannot be included"));
                self.findings.push(at.label("it is not UTF-8 text"));
            }
        }
        Ok(())
    }

    /// The files that match a pattern, sorted by name.
    fn matches(&mut self, pattern: &Path) -> Result<Vec<PathBuf>, Problem> {
        let mut found = vec![PathBuf::new()];
        for component in pattern.components() {
            let text = component.as_os_str().to_string_lossy();
            if !matches!(component, Component::Normal(_)) || !has_signs(&text) {
                found.iter_mut().for_each(|path| path.push(component));
                continue;
            }
            if text.contains("**") {
                return Err(problem(format!("`{text}` is not known here"), "name each directory, or write `*` for it"));
            }
            let wanted = Pattern::new(&text)
                .map_err(|error| problem(format!("`{text}` is not a pattern"), error.msg.to_owned()))?;
            let mut inner = Vec::new();
            for directory in found {
                self.look(&directory);
                inner.extend(self.entries(&directory, &wanted)?);
            }
            found = inner;
        }
        found.iter().for_each(|path| self.look(parent(path)));
        found.retain(|path| fs::symlink_metadata(path).is_ok() && !path.is_dir());
        found.sort();
        Ok(found)
    }

    /// The matching entries of a directory; empty if the directory does not exist.
    fn entries(&mut self, directory: &Path, wanted: &Pattern) -> Result<Vec<PathBuf>, Problem> {
        let failed = |error: io::Error| {
            let title =
                format!("the directory `{}` cannot be read: {}", directory.display(), reason(&error.to_string()));
            problem(title, "let the user that Forebay runs as read it")
        };
        let entries = match fs::read_dir(here(directory)) {
            Ok(entries) => entries,
            Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
                return Ok(Vec::new());
            }
            Err(error) => return Err(failed(error)),
        };
        let mut found = Vec::new();
        for entry in entries {
            self.entries += 1;
            if self.entries > ENTRIES_MAX {
                return Err(problem(
                    format!("the directories of `include` have more than {ENTRIES_MAX} entries"),
                    "keep what is included in a directory of its own",
                ));
            }
            let name = entry.map_err(failed)?.file_name();
            if name.to_str().is_some_and(|name| wanted.matches_with(name, VISIBLE)) {
                found.push(directory.join(name));
            }
        }
        Ok(found)
    }

    /// Records a searched directory; if it does not exist, the nearest parent.
    fn look(&mut self, directory: &Path) {
        let there = directory.ancestors().map(here).find(|directory| directory.is_dir());
        self.source.directories.extend(there.map(Path::to_owned));
    }
}

/// Merges a map of another file into a map, with its places; `path` is the path of both.
fn merge(into: &mut Mapping, at: &mut Place, from: Mapping, there: &Place, path: &str, findings: &mut Vec<Finding>) {
    for (key, value) in from {
        // `syntax` has already rejected other keys.
        let Value::String(name) = &key else { continue };
        let (inner, Some(place)) = (join(path, &path::key(name)), there.entry(name)) else { continue };
        let (Some(known), Some(known_place)) =
            (into.get_mut(&key).filter(|known| !known.is_null()), at.entry_mut(name))
        else {
            at.insert(name, place.clone());
            into.insert(key, value);
            continue;
        };
        match (known, value) {
            // A key without a value sets nothing.
            (_, Value::Null) => {}
            (Value::Sequence(items), Value::Sequence(more)) if path.is_empty() => {
                items.extend(more);
                known_place.append(place);
            }
            (Value::Mapping(known), Value::Mapping(more)) if !NAMED.contains(&path) => {
                merge(known, known_place, more, place, &inner, findings);
            }
            // Every file may state the format version.
            (known, value) if inner == "version" && *known == value => {}
            _ => {
                let again =
                    Finding::error(FindingLocation::Bytes(place.named()), format!("`{inner}` is set in two places"));
                let again = again.label("again here").also(FindingLocation::Bytes(known_place.named()), "first here");
                findings.push(
                    again.help("take one of them out: files that are included add to others and override nothing"),
                );
            }
        }
    }
}

fn unreadable(path: &Path, error: &Unreadable) -> Problem {
    let path = path.display();
    let label = match error {
        Unreadable::TooLarge(_) => {
            return problem(
                format!("with `{path}` the configuration is larger than {FILE_MAX}"),
                "is all of it configuration?",
            );
        }
        Unreadable::NotPlain("a directory") => "to include what is in it, write `/*.yaml` behind it",
        Unreadable::System(error) if error.kind() == io::ErrorKind::NotFound => {
            "make it, or name another; a pattern such as `*.yaml` may find nothing"
        }
        Unreadable::System(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            "let the user that Forebay runs as read it"
        }
        Unreadable::System(_) | Unreadable::NotPlain(_) => "it must be a file of text",
    };
    problem(format!("`{path}` cannot be read: {}", reason(&error.to_string())), label)
}

/// Whether a text contains wildcards.
fn has_signs(text: &str) -> bool {
    text.contains(['*', '?', '['])
}

fn parent(path: &Path) -> &Path {
    path.parent().unwrap_or(Path::new(""))
}

/// A usable name of a directory: an empty path means the current directory.
fn here(directory: &Path) -> &Path {
    if directory.as_os_str().is_empty() { Path::new(".") } else { directory }
}

#[cfg(test)]
mod tests {
    use super::super::Config;
    use super::super::report::Report;
    use super::*;

    const MAIN: &str = "listeners: [{ name: web, address: 127.0.0.1:80 }]\n\
                        upstreams: { app: { endpoints: [{ address: 127.0.0.1:3000 }] } }\n\
                        routes: [{ name: main, match: { hosts: [main.test] }, upstream: app }]\n";

    /// Creates a directory with a main file, which begins with `top`, and further files.
    fn directory(top: &str, files: &[(&str, &str)]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for (name, text) in files.iter().chain(&[("main.yaml", &*format!("{top}\n{MAIN}"))]) {
            let path = dir.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        dir
    }

    fn load(dir: &tempfile::TempDir) -> Result<Config, Report> {
        Config::load(&dir.path().join("main.yaml"), &[])
    }

    /// The report without the directory name.
    fn said(dir: &tempfile::TempDir) -> String {
        let said = match load(dir) {
            Ok(config) => config.warnings().to_string(),
            Err(report) => report.to_string(),
        };
        said.replace(&format!("{}/", dir.path().display()), "")
    }

    fn route(name: &str) -> String {
        format!("routes: [{{ name: {name}, match: {{ hosts: [{name}.test] }}, upstream: app }}]\n")
    }

    #[test]
    fn lists_are_appended_in_the_order_of_the_names_and_sections_are_merged() {
        let dir = directory(
            "include: [conf.d/*.yaml, more/?.yaml]\nserver: { disk_threads: 3 }\nversion: 1",
            &[
                ("conf.d/b.yaml", &route("b")),
                ("conf.d/a.yaml", &(route("a") + "upstreams: { two: { endpoints: [{ address: 127.0.0.1:2 }] } }\n")),
                ("conf.d/.hidden.yaml", "no: key\n"),
                ("conf.d/a.yaml~", "no: key\n"),
                ("conf.d/empty.yaml", "# routes:\n"),
                ("more/c.yaml", &format!("version: 1\nserver: {{ shutdown: {{ deadline: 7s }} }}\n{}", route("c"))),
                ("more/cc.yaml", "no: key\n"),
            ],
        );
        let config = load(&dir).unwrap_or_else(|report| panic!("{report}"));
        let names: Vec<&str> = config.routes.iter().map(|route| &*route.name).collect();
        assert_eq!(names, ["main", "a", "b", "c"]);
        assert_eq!(config.upstreams.keys().collect::<Vec<_>>(), ["app", "two"]);
        assert_eq!((config.server.disk_threads.0, config.server.shutdown.deadline.0.as_secs()), (3, 7));
        let files: Vec<_> = config.files().map(|file| Path::new(file).file_name().unwrap().to_owned()).collect();
        assert_eq!(files, ["main.yaml", "a.yaml", "b.yaml", "empty.yaml", "c.yaml"]);
        let (file, line) = config.place("routes[2].upstream").expect("a place");
        assert!(file.ends_with("conf.d/b.yaml") && line == 1, "{file}:{line}");
        let (file, line) = config.place("server.shutdown.deadline").expect("a place");
        assert!(file.ends_with("more/c.yaml") && line == 2, "{file}:{line}");
    }

    #[test]
    fn a_file_may_include_others_beside_it_and_is_read_once() {
        let dir = directory(
            "include: [a/one.yaml, a/b/two.yaml, '*/*.yaml']",
            &[("a/one.yaml", &(route("one") + "include: b/two.yaml\n")), ("a/b/two.yaml", &route("two"))],
        );
        let config = load(&dir).unwrap_or_else(|report| panic!("{report}"));
        assert_eq!(config.routes.iter().map(|route| &*route.name).collect::<Vec<_>>(), ["main", "one", "two"]);
    }

    #[test]
    fn what_is_set_twice_is_shown_at_both_places() {
        let files = [
            ("a.yaml", "admin: { address: 127.0.0.1:1 }\n"),
            ("b.yaml", "version: 1\nupstreams:\n  app: { endpoints: [] }\nadmin:\n  address: 127.0.0.1:2\n"),
        ];
        let said = said(&directory("include: [a.yaml, b.yaml]", &files));
        for part in [
            "`upstreams.app` is set in two places",
            " --> b.yaml:3:3",
            "::: main.yaml:3:14",
            "`admin.address` is set in two places",
            " --> b.yaml:5:3",
            "::: a.yaml:1:10",
            "2 errors in b.yaml",
        ] {
            assert!(said.contains(part), "{part}: {said}");
        }
    }

    #[test]
    fn every_error_names_its_file() {
        let files = [
            ("conf.d/syntax.yaml", "routes: [\n"),
            ("conf.d/tab.yaml", "# one\nroutes:\n\t- name: x\n"),
            ("conf.d/twice.yaml", "routes: []\nroutes: []\n"),
            ("conf.d/list.yaml", "- name: x\n"),
        ];
        let text = said(&directory("include: conf.d/*.yaml", &files));
        for place in ["syntax.yaml:2:1", "tab.yaml:3:1", "twice.yaml:2:1", "list.yaml:1:3", "4 errors in 4 files"] {
            assert!(text.contains(place), "{place}: {text}");
        }
        let files = [
            ("conf.d/a.yaml", "# ä\nroutes:\n  - { name: a, upstraem: app }\n"),
            ("conf.d/b.yaml", "routes:\n  - { name: a, upstream: nowhere, match: { hosts: ['${NOT_SET_HERE}'] } }\n"),
            ("conf.d/c.yaml", "upstreams:\n  c: { endpoints: [{ address: 127.0.0.1:0 }] }\n"),
        ];
        let text = said(&directory("include: conf.d/*.yaml", &files));
        for place in ["a.yaml:3:16", "b.yaml:2:52", "c.yaml:2:31"] {
            assert!(text.contains(place), "{place}: {text}");
        }
    }

    #[test]
    fn what_cannot_be_included_is_an_error_where_it_is_named() {
        let files = [("a.yaml", "include: b.yaml\n"), ("b.yaml", "include: a.yaml\n"), ("d/x.yaml", "")];
        for (include, expected) in [
            ("none.yaml", "`none.yaml` cannot be read: no such file or directory"),
            ("d", "`d` cannot be read: it is a directory and not a plain file"),
            ("'*.yaml'", "the file `main.yaml` includes itself"),
            ("main.yaml", "the file `main.yaml` includes itself"),
            ("a.yaml", "the file `a.yaml` is included by a file that it includes"),
            ("d/**/*.yaml", "`**` is not known here"),
            ("'d/[.yaml'", "`[.yaml` is not a pattern"),
            ("[7]", "`include[0]` names no file"),
            ("{ a: b }", "`include` names no file"),
            ("'${NOT_SET_HERE}/*.yaml'", "the variable `NOT_SET_HERE` is not set"),
            ("/dev/null", "`/dev/null` cannot be read: it is a device and not a plain file"),
        ] {
            let said = said(&directory(&format!("include: {include}"), &files));
            assert!(said.starts_with("error") && said.contains(expected), "{include}: {said}");
            let place = if include == "a.yaml" { "b.yaml:1:10" } else { "main.yaml:1:" };
            assert!(said.contains(place), "{include}: {said}");
        }
    }

    #[test]
    fn a_pattern_may_find_nothing_and_that_is_told() {
        let dir = directory("include: conf.d/*.yaml", &[]);
        let said = said(&dir);
        assert!(said.starts_with("warning: no file is included by `conf.d/*.yaml`"), "{said}");
        let config = load(&dir).expect("a warning is no error");
        assert!(config.directories().contains(dir.path()), "the directory in which `conf.d` would be made");
    }

    #[test]
    fn files_are_bounded_in_number_levels_and_size() {
        let many: Vec<(String, String)> = (0..FILES_MAX).map(|n| (format!("d/{n}.yaml"), String::new())).collect();
        let many: Vec<(&str, &str)> = many.iter().map(|(name, text)| (&**name, &**text)).collect();
        let text = said(&directory("include: d/*.yaml", &many));
        assert!(text.contains("more than 1000 files are included") && text.contains("1 error in main.yaml"), "{text}");

        let deep: Vec<(String, String)> =
            (0..=LEVELS_MAX).map(|n| (format!("{n}.yaml"), format!("include: {}.yaml\n", n + 1))).collect();
        let deep: Vec<(&str, &str)> = deep.iter().map(|(name, text)| (&**name, &**text)).collect();
        let text = said(&directory("include: 0.yaml", &deep));
        assert!(text.contains("`8.yaml` is included at more than 8 levels"), "{text}");

        let large = format!("# {}\n", "x".repeat(9 << 20));
        let text = said(&directory("include: d/*", &[("d/a", &large), ("d/b", &large), ("d/c", &large)]));
        assert!(text.contains("with `d/b` the configuration is larger than 16MiB"), "{text}");
        assert!(text.contains("1 error in"), "{text}");
    }

    #[test]
    fn aliases_of_all_files_together_are_bounded() {
        let bomb = format!("x: &a [{}]\ny: [{}]\n", "1, ".repeat(300), "*a, ".repeat(300));
        let files: Vec<(String, &str)> = (0..3).map(|n| (format!("d/{n}.yaml"), &*bomb)).collect();
        let files: Vec<(&str, &str)> = files.iter().map(|(name, text)| (&**name, *text)).collect();
        let text = said(&directory("include: d/*", &files));
        assert!(text.contains("has more than 100000 values") && text.contains("d/1.yaml:3:"), "{text}");
    }
}
