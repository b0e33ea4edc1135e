//! Replaces `${VAR}` in scalars: from the environment, with a default, or from a file.
//!
//! Interpolation runs after parsing and only in values. So the content of a variable never becomes YAML, and line
//! numbers stay correct. Every inserted text is a secret: `report` prints `${VAR}` instead.

use std::path::Path;

use super::file;
use super::units::Size;

/// Limit on the size of a file in `${file:…}`.
const FILE_MAX: Size = Size::kib(1024);

/// The source of variables: the environment, except in tests.
pub(super) type Variables<'a> = &'a dyn Fn(&str) -> Option<String>;

/// An interpolated scalar.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Interpolated {
    /// The resulting text.
    pub text: String,
    /// The value of each `${…}`.
    pub pieces: Vec<String>,
    /// Whether the scalar was a single `${…}`; only then may it become a number or a boolean.
    pub whole: bool,
}

/// Why a `${…}` has no value.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Problem {
    /// The problem, as a sentence.
    pub title: String,
    /// How to fix it.
    pub label: String,
}

impl Problem {
    fn new(title: impl Into<String>, label: impl Into<String>) -> Self {
        Problem { title: title.into(), label: label.into() }
    }
}

/// Replaces each `${…}` in `text`; `None` if it has none.
pub(super) fn interpolate(text: &str, variables: Variables<'_>) -> Result<Option<Interpolated>, Problem> {
    let Some(first) = text.find("${") else { return Ok(None) };
    let mut result = Interpolated { text: String::with_capacity(text.len()), pieces: Vec::new(), whole: first == 0 };
    let mut rest = text;
    while let Some(at) = rest.find("${") {
        let (before, from) = rest.split_at(at);
        if let Some(before) = before.strip_suffix('$') {
            result.text.push_str(before);
            result.text.push_str("${");
            rest = &from[2..];
            continue;
        }
        result.text.push_str(before);
        let (inside, after) = from[2..].split_once('}').ok_or_else(|| {
            Problem::new("`${` without a `}`", "close it with `}`, or write `$${` for a literal `${`")
        })?;
        let piece = resolve(inside, variables)?;
        result.text.push_str(&piece);
        result.pieces.push(piece);
        result.whole &= before.is_empty() && after.is_empty();
        rest = after;
    }
    result.text.push_str(rest);
    result.whole &= !result.pieces.is_empty();
    Ok(Some(result))
}

/// The value of `inside`, the text between the braces.
fn resolve(inside: &str, variables: Variables<'_>) -> Result<String, Problem> {
    if inside.contains("${") {
        return Err(Problem::new("`${` inside of `${…}`", "one cannot be inside another"));
    }
    if let Some(path) = inside.strip_prefix("file:") {
        return read(path);
    }
    let name_end = inside.find(|c: char| c != '_' && !c.is_ascii_alphanumeric()).unwrap_or(inside.len());
    let (name, operator) = inside.split_at(name_end);
    if name.is_empty() || name.starts_with(|first: char| first.is_ascii_digit()) {
        return Err(unknown(inside));
    }
    let set = variables(name);
    let filled = || set.clone().filter(|value| !value.is_empty());
    if operator.is_empty() {
        let label = format!("set it, or write `${{{name}:-default}}`");
        set.ok_or_else(|| Problem::new(format!("the variable `{name}` is not set"), label))
    } else if let Some(default) = operator.strip_prefix(":-") {
        Ok(filled().unwrap_or_else(|| default.to_owned()))
    } else if let Some(why) = operator.strip_prefix(":?") {
        filled().ok_or_else(|| Problem::new(format!("the variable `{name}` is not set or empty"), why))
    } else {
        Err(unknown(inside))
    }
}

fn unknown(inside: &str) -> Problem {
    Problem::new(
        format!("`${{{inside}}}` is not understood"),
        "write `${NAME}`, `${NAME:-default}`, `${NAME:?why}` or `${file:/path}`, or `$${` for a literal `${`",
    )
}

/// The content of a file without trailing line ends.
fn read(path: &str) -> Result<String, Problem> {
    if !Path::new(path).is_absolute() {
        return Err(Problem::new(format!("`{path}` is not an absolute path"), "write `${file:/path}`"));
    }
    let failed = |why: &str| Problem::new(format!("the file `{path}` cannot be read"), why);
    let bytes = file::read(Path::new(path), FILE_MAX).map_err(|error| failed(&reason(&error.to_string())))?;
    let mut text = String::from_utf8(bytes).map_err(|_| failed("it is not UTF-8 text"))?;
    text.truncate(text.trim_end_matches(['\n', '\r']).len());
    Ok(text)
}

/// The system's error text without its number, for use inside a sentence.
pub(super) fn reason(error: &str) -> String {
    let words = error.split(" (os error").next().unwrap_or_default();
    let mut letters = words.chars();
    letters.next().map_or_else(String::new, |first| first.to_lowercase().chain(letters).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn variable(name: &str) -> Option<String> {
        match name {
            "PORT" => Some("8080".to_owned()),
            "EMPTY" => Some(String::new()),
            "TRICKY" => Some("${PORT}: [".to_owned()),
            _ => None,
        }
    }

    fn text(from: &str) -> Result<String, Problem> {
        interpolate(from, &variable).map(|done| done.map_or_else(|| from.to_owned(), |done| done.text))
    }

    #[test]
    fn variables_defaults_and_escapes() {
        assert_eq!(text("127.0.0.1:${PORT}"), Ok("127.0.0.1:8080".to_owned()));
        assert_eq!(text("${NONE:-a:b}/${EMPTY:-c}/${EMPTY}/${PORT:?why}"), Ok("a:b/c//8080".to_owned()));
        assert_eq!(text("$${PORT} $PORT $$ ${PORT}$"), Ok("${PORT} $PORT $$ 8080$".to_owned()));
        assert_eq!(text("plain"), Ok("plain".to_owned()));
    }

    #[test]
    fn what_was_put_in_is_not_read_again() {
        assert_eq!(text("${TRICKY}"), Ok("${PORT}: [".to_owned()));
    }

    #[test]
    fn only_a_lone_variable_is_the_whole_scalar() {
        let whole = |from| interpolate(from, &variable).unwrap().unwrap().whole;
        assert!(whole("${PORT}"));
        assert!(!whole("${PORT}0"));
        assert!(!whole("0${PORT}"));
        assert!(!whole("${PORT}${PORT}"));
        assert!(!whole("$${PORT}"));
    }

    #[test]
    fn what_cannot_be_resolved_says_what_to_do() {
        let problem = |from| text(from).map_err(|problem| (problem.title, problem.label)).unwrap_err();
        assert_eq!(problem("${NONE}").0, "the variable `NONE` is not set");
        assert_eq!(problem("${EMPTY:?set the port}").1, "set the port");
        assert_eq!(problem("${1}").0, "`${1}` is not understood");
        assert_eq!(problem("${PORT-1}").0, "`${PORT-1}` is not understood");
        assert_eq!(problem("${PORT").0, "`${` without a `}`");
        assert_eq!(problem("${A:-${PORT}}").0, "`${` inside of `${…}`");
        assert_eq!(problem("${file:secret}").0, "`secret` is not an absolute path");
        assert_eq!(problem("${file:/no/such}").1, "no such file or directory");
        assert_eq!(problem("${file:/dev/zero}").1, "it is a device and not a plain file");
        let file = tempfile::NamedTempFile::new().unwrap();
        let written = format!("${{file:{}}}", file.path().display());
        for (content, said) in [(&[b'x'; 1 << 21][..], "it is larger than 1MiB"), (b"\xff", "it is not UTF-8 text")] {
            std::fs::write(file.path(), content).unwrap();
            assert_eq!(text(&written).map_err(|problem| problem.label), Err(said.to_owned()));
        }
    }

    #[test]
    fn a_file_loses_the_line_end_behind_its_text() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "two\nlines\n").unwrap();
        assert_eq!(text(&format!("${{file:{}}}", file.path().display())), Ok("two\nlines".to_owned()));
    }
}
