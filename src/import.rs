//! Converts `nginx.conf` to a Forebay configuration: directives with an equivalent are translated, all others are
//! reported.
//!
//! [`grammar`] parses the file, `location` preserves the order of locations, `text` turns variables into
//! expressions, and `translate` does the rest. Nothing is guessed: if a directive that protects something has no
//! equivalent, the location is closed.

pub mod grammar;
mod known;
mod location;
mod text;
mod translate;

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

use grammar::{Directive, Fault, Place};

/// The result of an import.
#[derive(Debug)]
pub struct Imported {
    /// The text of the configuration.
    pub yaml: String,
    /// The result for each directive, in the order of the files.
    pub rows: Vec<Row>,
}

/// The result for one directive.
#[derive(Clone, Debug, PartialEq)]
pub struct Row {
    /// Its position.
    pub place: Place,
    /// The directive in normal form.
    pub line: String,
    /// The result.
    pub fate: Fate,
    /// Why, or how it differs; may be empty.
    pub why: String,
}

/// The result for a directive.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Fate {
    /// Translated.
    Translated,
    /// Not needed: Forebay behaves this way by default, or does not need it.
    BuiltIn,
    /// Translated with a difference.
    Differs,
    /// Without an equivalent.
    Lost,
}

/// A failed import.
#[derive(Debug)]
pub enum Error {
    /// The file cannot be read.
    Unreadable(PathBuf, std::io::Error),
    /// Not valid nginx syntax.
    Fault(Fault),
    /// No `server` in the file.
    NoServer(String),
}

/// Limit on the size of all files together.
const BYTES_MAX: u64 = 16 << 20;

/// Reads a file and its includes, and translates them.
///
/// # Errors
///
/// The file is missing, has invalid syntax, or contains no `server`.
pub fn file(path: &Path) -> Result<Imported, Error> {
    let unreadable = |error| Error::Unreadable(path.to_owned(), error);
    if fs::metadata(path).map_err(unreadable)?.len() > BYTES_MAX {
        return Err(unreadable(std::io::Error::other("the file is larger than 16MiB")));
    }
    let text = fs::read(path).map_err(unreadable)?;
    let folder = path.parent().unwrap_or(Path::new("")).to_owned();
    let name = path.display().to_string();
    self::text(&name, &String::from_utf8_lossy(&text), &|pattern| included(&folder, pattern))
}

/// Translates the text of a file.
///
/// # Errors
///
/// As for [`file()`].
pub fn text(name: &str, text: &str, files: grammar::Files<'_>) -> Result<Imported, Error> {
    let mut missing = Vec::new();
    let directives = grammar::read(name, text, files, &mut missing).map_err(Error::Fault)?;
    let mut imported = translate::all(name, &directives).ok_or_else(|| Error::NoServer(name.to_owned()))?;
    for (directive, why) in missing {
        // MIME types and FastCGI parameters are in every installation, and not used here.
        let needless =
            ["mime.types", "fastcgi_params", "fastcgi.conf", "uwsgi_params", "scgi_params", "modules-enabled"];
        let fate =
            if needless.iter().any(|file| directive.word(0).contains(file)) { Fate::BuiltIn } else { Fate::Lost };
        imported.rows.push(Row::of(&directive, fate, why));
    }
    imported.rows.sort_by(|one, other| (one.place.line, &one.line).cmp(&(other.place.line, &other.line)));
    imported.rows.sort_by_key(|row| (*row.place.file != *name, row.place.file.clone()));
    Ok(imported)
}

/// The files of an `include`, relative to the folder of the first file.
fn included(folder: &Path, pattern: &str) -> Result<Vec<(String, String)>, String> {
    let path = folder.join(pattern);
    let mut found = vec![PathBuf::new()];
    for part in path.components() {
        let part = part.as_os_str().to_string_lossy();
        let wild = part.contains(['*', '?']);
        found = found
            .into_iter()
            .flat_map(|at| {
                if !wild {
                    return vec![at.join(&*part)];
                }
                let at = if at.as_os_str().is_empty() { PathBuf::from(".") } else { at };
                let entries = fs::read_dir(&at).into_iter().flatten().flatten();
                let named = entries.filter(|entry| matches(&part, &entry.file_name().to_string_lossy()));
                let mut paths: Vec<PathBuf> = named.map(|entry| entry.path()).collect();
                paths.sort();
                paths
            })
            .collect();
    }
    if !pattern.contains(['*', '?']) && !path.is_file() {
        return Err("there is no such file here".to_owned());
    }
    let read = |path: PathBuf| {
        let bytes = fs::metadata(&path).map(|file| file.len()).unwrap_or_default();
        let text = if bytes > BYTES_MAX { Err(std::io::Error::other("it is too large")) } else { fs::read(&path) };
        let text = text.map_err(|error| format!("{} cannot be read: {error}", path.display()))?;
        Ok((path.display().to_string(), String::from_utf8_lossy(&text).into_owned()))
    };
    found.into_iter().filter(|path| path.is_file()).map(read).collect()
}

/// Whether a name matches a pattern with `*` and `?`.
fn matches(pattern: &str, name: &str) -> bool {
    // A leading dot must be matched explicitly.
    if name.starts_with('.') && !pattern.starts_with('.') {
        return false;
    }
    let escaped = regex::escape(pattern).replace(r"\*", ".*").replace(r"\?", ".");
    regex::Regex::new(&format!(r"\A(?s:{escaped})\z")).is_ok_and(|pattern| pattern.is_match(name))
}

impl Row {
    fn of(directive: &Directive, fate: Fate, why: impl Into<String>) -> Row {
        Row { place: directive.place.clone(), line: directive.line(), fate, why: why.into() }
    }
}

impl Imported {
    /// Number of directives with this result.
    pub fn count(&self, fate: Fate) -> usize {
        self.rows.iter().filter(|row| row.fate == fate).count()
    }

    /// The report: no equivalent, different, not needed, and a summary.
    pub fn report(&self) -> String {
        let mut report = String::new();
        for (fate, title) in [
            (Fate::Lost, "Without an equivalent:"),
            (Fate::Differs, "Translated, with a difference:"),
            (Fate::BuiltIn, "Not needed:"),
        ] {
            // Self-evident results have no reason.
            let told = |row: &&Row| row.fate == fate && (fate != Fate::BuiltIn || !row.why.is_empty());
            let rows: Vec<&Row> = self.rows.iter().filter(told).collect();
            if rows.is_empty() {
                continue;
            }
            // Writing to a string cannot fail.
            let _ = writeln!(report, "{title}");
            for Row { place, line, why, .. } in rows {
                let _ = writeln!(report, "  {}:{}: {line}", place.file, place.line);
                if !why.is_empty() {
                    let _ = writeln!(report, "      {why}");
                }
            }
            report.push('\n');
        }
        let _ = writeln!(
            report,
            "{} directives: {} translated, {} of them with a difference; {} not needed; {} without an equivalent",
            self.rows.len(),
            self.count(Fate::Translated) + self.count(Fate::Differs),
            self.count(Fate::Differs),
            self.count(Fate::BuiltIn),
            self.count(Fate::Lost),
        );
        report
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_included_by_patterns() {
        let dir = tempfile::tempdir().expect("a directory");
        fs::create_dir(dir.path().join("sites")).expect("a folder");
        for (name, text) in
            [("sites/b.conf", "b;"), ("sites/a.conf", "a;"), ("sites/.hidden.conf", "h;"), ("one", "o;")]
        {
            fs::write(dir.path().join(name), text).expect("a file");
        }
        let texts = |pattern: &str| {
            included(dir.path(), pattern).map(|files| files.into_iter().map(|(_, text)| text).collect::<Vec<_>>())
        };
        assert_eq!(texts("sites/*.conf"), Ok(vec!["a;".into(), "b;".into()]));
        assert_eq!(texts("s?tes/b.conf"), Ok(vec!["b;".into()]));
        assert_eq!(texts("one"), Ok(vec!["o;".into()]));
        assert_eq!(texts("nothing/*.conf"), Ok(vec![]));
        assert!(texts("nothing").is_err());
    }

    #[test]
    fn a_file_without_a_server_is_told() {
        let import = |text: &str| super::text("nginx.conf", text, &|_| Ok(Vec::new()));
        assert!(matches!(import("events { }"), Err(Error::NoServer(_))));
        assert!(matches!(import("http { server { "), Err(Error::Fault(_))));
    }
}
