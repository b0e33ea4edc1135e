//! Limits on the code: types with few fields, functions that fit on a screen. A reader should be able to keep the
//! path of a byte in mind.
//!
//! A type or function above the limit is listed with its current size, so that it can shrink but not grow. When one
//! of them has shrunk, its row must be updated or removed.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use regex::Regex;

/// Limit on the fields of a type in these folders, which an exchange and its bytes pass.
const FIELDS_MAX: usize = 16;
const ON_THE_WAY: &[&str] = &[
    "access_log",
    "client",
    "eventloop",
    "filter",
    "finished",
    "framing",
    "metrics",
    "party",
    "phase",
    "proxy",
    "scheduler",
    "upstream",
];

/// Limit on the lines of a function, including its signature and braces.
const LINES_MAX: usize = 75;

/// Functions above the limit, by file and name.
const LONG: &[(&str, usize)] = &[
    ("client/http2.rs serve", 79),
    ("expression/planner.rs named", 90),
    ("import/translate/place.rs request_fields", 76),
    ("import/translate/place.rs rewrite", 86),
    ("import/translate/place.rs routes", 80),
    ("import/translate/upstream.rs endpoints", 90),
];

/// The files with unsafe code, and its purpose. Only `net.rs` calls socket functions.
const UNSAFE: &[(&str, &str)] = &[
    ("client/stream.rs", "bytes are read into memory that was not cleared first"),
    ("client/tls/context.rs", "calls of BoringSSL that the crate lacks"),
    ("client/tls/handshake.rs", "a call of BoringSSL that the crate lacks"),
    ("eventloop/cpu.rs", "the CPU time of a thread"),
    ("filter/basic_auth/hashing/desk.rs", "the priority of a thread"),
    ("gateway/handover.rs", "descriptors come from another process"),
    ("gateway/inherited.rs", "descriptors come from the environment"),
    ("gateway/older_processes.rs", "processes are waited for"),
    ("gateway/privileges.rs", "users, and what a process may do"),
    ("gateway/process.rs", "a proxy of Pingora is taken out of its service"),
    ("gateway/supervisor.rs", "the clock that systemd reads"),
    ("gateway/takeover.rs", "a process is forked"),
    ("gateway/upgrade.rs", "signals to a group of processes, and whose a file is"),
    ("main.rs", "the allocator"),
    ("net.rs", "sockets"),
];

/// The source files: path below `src`, and lines without unit tests.
fn sources() -> BTreeMap<String, Vec<String>> {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let tests = Regex::new(r"#\[cfg\(test\)\]\n(?:pub(?:\([^)]*\))? )?mod tests \{").expect("a pattern");
    let read = |path: PathBuf| {
        let text = fs::read_to_string(&path).expect("a source file");
        let code = tests.splitn(&text, 2).next().unwrap_or_default().lines().map(str::to_owned).collect();
        (path.strip_prefix(&src).expect("a file of src").to_string_lossy().into_owned(), code)
    };
    files(&src).into_iter().filter(|path| path.extension().is_some_and(|ending| ending == "rs")).map(read).collect()
}

fn files(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).expect("a folder of sources").map(|entry| entry.expect("an entry").path());
    entries.flat_map(|path| if path.is_dir() { files(&path) } else { vec![path] }).collect()
}

/// The items whose first line matches `begins`: name, and lines up to the closing brace. rustfmt aligns that brace
/// with the item's first letter.
fn blocks(lines: &[String], begins: &Regex) -> Vec<(String, usize)> {
    let mut found = Vec::new();
    for (at, line) in lines.iter().enumerate() {
        let Some(head) = begins.captures(line) else { continue };
        let close = format!("{}}}", &head["indent"]);
        let one_line = line.ends_with('}') || line.ends_with(';');
        let end = lines[at..].iter().position(|line| *line == close).filter(|_| !one_line);
        found.push((head["name"].to_owned(), end.map_or(1, |end| end + 1)));
    }
    found
}

/// The types in these lines and the number of their fields.
fn fields(lines: &[String]) -> Vec<(String, usize)> {
    let head = Regex::new(r"^(?P<indent>\s*)(?:pub(?:\([^)]*\))? )?struct (?P<name>\w+).*\{$").expect("a pattern");
    let field = Regex::new(r"^\s+(?:pub(?:\([^)]*\))? )?[a-z_]\w*:").expect("a pattern");
    let sizes = blocks(lines, &head);
    let places = lines.iter().enumerate().filter(|(_, line)| head.is_match(line)).map(|(at, _)| at);
    let count = |at: usize, size: usize| lines[at..at + size].iter().filter(|line| field.is_match(line)).count();
    places.zip(sizes).map(|(at, (name, size))| (name, count(at, size))).collect()
}

fn functions(lines: &[String]) -> Vec<(String, usize)> {
    let head = r"^(?P<indent>\s*)(?:pub(?:\([^)]*\))? )?(?:const |async |unsafe )*fn (?P<name>\w+)";
    blocks(lines, &Regex::new(head).expect("a pattern"))
}

/// The items in `found` that exceed `max` and differ from `known`.
fn wrong(found: Vec<(String, usize)>, max: usize, known: &[(&str, usize)]) -> Vec<String> {
    let large: BTreeMap<_, _> = found.into_iter().filter(|(_, size)| *size > max).collect();
    let known: BTreeMap<_, _> = known.iter().map(|(name, size)| (name.to_string(), *size)).collect();
    let grown = large.iter().filter(|(name, size)| known.get(*name).is_none_or(|most| *size > most));
    let grown =
        grown.map(|(name, size)| format!("{name} has {size}, and {} are the most", known.get(name).unwrap_or(&max)));
    let shrunk = known.iter().filter(|(name, most)| large.get(*name).is_none_or(|size| size < most));
    let shrunk = shrunk.map(|(name, _)| format!("{name} has {:?} now: say so in its row", large.get(name)));
    grown.chain(shrunk).collect()
}

#[test]
fn no_type_on_the_way_of_a_byte_has_many_fields() {
    let on_the_way = |path: &str| ON_THE_WAY.contains(&path.split(['/', '.']).next().unwrap_or_default());
    let types = sources().into_iter().filter(|(path, _)| on_the_way(path));
    let found = types.flat_map(|(path, lines)| named(&path, fields(&lines))).collect();
    let wrong = wrong(found, FIELDS_MAX, &[]);
    assert!(wrong.is_empty(), "group fields into types that own a decision:\n{}", wrong.join("\n"));
}

#[test]
fn an_exchange_has_twelve_parts() {
    let exchange = fields(&sources()["proxy/exchange.rs"]);
    let exchange = exchange.iter().find(|(name, _)| name == "Exchange").expect("the type");
    assert!(exchange.1 <= 12, "it has {} fields: a new one belongs into one of its parts", exchange.1);
}

#[test]
fn no_function_is_longer_than_a_screen() {
    let found = sources().into_iter().flat_map(|(path, lines)| named(&path, functions(&lines))).collect();
    let wrong = wrong(found, LINES_MAX, LONG);
    assert!(wrong.is_empty(), "cut it where a name appears that a reader would want:\n{}", wrong.join("\n"));
}

#[test]
fn unsafe_code_is_where_its_reason_is_known() {
    let is_unsafe = Regex::new(r"^[^/]*\bunsafe\b").expect("a pattern");
    let found = sources().into_iter().filter(|(_, lines)| lines.iter().any(|line| is_unsafe.is_match(line)));
    let found: Vec<String> = found.map(|(path, _)| path).collect();
    let known: Vec<&str> = UNSAFE.iter().map(|(path, _)| *path).collect();
    assert_eq!(found, known, "a file came or went: say so in the list, and keep sockets in net.rs");
}

fn named(path: &str, found: Vec<(String, usize)>) -> Vec<(String, usize)> {
    found.into_iter().map(|(name, size)| (format!("{path} {name}"), size)).collect()
}

#[test]
fn fields_and_lines_are_counted() {
    let code = "pub struct A<'a> {\n    /// One.\n    pub one: u8,\n    two: fn(u8) -> u8,\n}\nstruct B;\nimpl A<'_> {\n    \
                pub(super) async fn f(\n        &self,\n    ) {\n        if x {\n        }\n    }\n    fn g(&self) {}\n}";
    let lines: Vec<String> = code.lines().map(str::to_owned).collect();
    assert_eq!(fields(&lines), [("A".to_owned(), 2)]);
    assert_eq!(functions(&lines), [("f".to_owned(), 6), ("g".to_owned(), 1)]);
    let found = || vec![("a f".to_owned(), 9), ("a g".to_owned(), 4)];
    assert_eq!(wrong(found(), 8, &[("a f", 9)]), Vec::<String>::new());
    assert_eq!(wrong(found(), 8, &[]).len(), 1, "it is too long");
    assert_eq!(wrong(found(), 8, &[("a f", 10)]).len(), 1, "it has shrunk");
    assert_eq!(wrong(found(), 9, &[("a f", 9)]).len(), 1, "it has shrunk below the limit");
}
