//! Rewords serde's decode errors for operators.
//!
//! `serde_yaml` gives errors only as text. This is the only place that parses that text.

use serde_yaml::Value;

use super::report::{Finding, FindingLocation};
use crate::error::nearest;
use crate::error::path::{self, parent};

/// The kinds of decode errors.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Complaint<'m> {
    /// A map has an unknown key.
    UnknownKey { key: &'m str, known: Vec<&'m str> },
    /// A map lacks a key.
    MissingKey(&'m str),
    /// An unknown variant of a choice.
    UnknownChoice { choice: &'m str, known: Vec<&'m str> },
    /// A value of another kind was expected.
    Mismatch { found: &'m str, expected: &'m str },
    /// An error from one of our own types, with its own wording.
    Other(&'m str),
}

impl<'m> Complaint<'m> {
    /// Parses the text of an error.
    pub fn of(message: &'m str) -> Self {
        if let Some((key, rest)) = message.strip_prefix("unknown field `").and_then(|rest| rest.split_once("`, ")) {
            return Complaint::UnknownKey { key, known: quoted(rest) };
        }
        if let Some((choice, rest)) = message.strip_prefix("unknown variant `").and_then(|rest| rest.split_once("`, "))
        {
            return Complaint::UnknownChoice { choice, known: quoted(rest) };
        }
        if let Some(key) = message.strip_prefix("missing field `").and_then(|rest| rest.strip_suffix('`')) {
            return Complaint::MissingKey(key);
        }
        let mismatch =
            ["invalid type: ", "invalid value: ", "invalid length "].iter().find_map(|p| message.strip_prefix(p));
        match mismatch.and_then(|rest| rest.rsplit_once(", expected ")) {
            Some((found, expected)) => Complaint::Mismatch { found, expected },
            None => Complaint::Other(message),
        }
    }

    /// The finding for this error about `value` at `path`.
    pub fn finding(&self, path: &str, value: Option<&Value>) -> Finding {
        match self {
            Complaint::UnknownKey { key, known } => unknown_key(path, key, known),
            Complaint::MissingKey(key) => {
                Finding::error(FindingLocation::Value(path.to_owned()), format!("missing key `{key}`{}", within(path)))
                    .label(format!("`{key}` is required here"))
            }
            // A choice that is written as a one-key map is itself part of the path.
            Complaint::UnknownChoice { choice, known } => match parent(path, choice) {
                Some(_) => unknown_key(path, choice, known),
                None => Finding::error(
                    FindingLocation::Value(path.to_owned()),
                    format!("unknown value `{choice}` for `{path}`"),
                )
                .label(expected(known))
                .nearest(choice, known.iter().copied()),
            },
            Complaint::Mismatch { found, expected } => mismatch(path, value, found, expected),
            Complaint::Other(message) => {
                let (title, label) = halves(message);
                Finding::error(FindingLocation::Value(path.to_owned()), title).label(label)
            }
        }
    }

    /// The path of the key that the unknown key at `path` was probably meant to be.
    pub fn meant(&self, path: &str) -> Option<String> {
        match self {
            Complaint::UnknownKey { key, known } => {
                let near = nearest(key, known.iter().copied())?;
                Some(path::join(parent(path, key)?, &path::key(near)))
            }
            _ => None,
        }
    }
}

fn unknown_key(path: &str, key: &str, known: &[&str]) -> Finding {
    let map = parent(path, key).unwrap_or(path);
    let label = match nearest(key, known.iter().copied()) {
        Some(_) => "no such key here".to_owned(),
        None => expected(known),
    };
    Finding::error(FindingLocation::Key(path.to_owned()), format!("unknown key `{key}`{}", within(map)))
        .label(label)
        .nearest(key, known.iter().copied())
}

fn mismatch(path: &str, value: Option<&Value>, found: &str, expected: &str) -> Finding {
    let location = FindingLocation::Value(path.to_owned());
    let subject = if path.is_empty() { "the file".to_owned() } else { format!("`{path}`") };
    match (found, expected, value) {
        ("unit variant", _, Some(Value::String(choice))) => {
            Finding::error(location, format!("`{choice}` needs a value")).label(format!("write `{{ {choice}: … }}`"))
        }
        (_, "unit variant", _) => {
            Finding::error(location, format!("{subject} takes no value here")).label("write the key alone, as text")
        }
        (_, "map with a single key", _) => Finding::error(location, format!("{subject} must be a map of one key"))
            .label("write exactly one of its choices"),
        ("unit value", ..) => Finding::error(location, format!("{subject} is empty"))
            .label(format!("expected {}", kind(expected)))
            .help("give it a value, or leave the key out"),
        _ => {
            let expected = kind(expected);
            Finding::error(location, format!("{subject} must be {expected}, not {}", thing(found)))
                .label(format!("expected {expected}"))
        }
    }
}

/// The expected kind, without the names of our types.
fn kind(expected: &str) -> &str {
    match expected {
        "a string" => "text",
        "a boolean" => "`true` or `false`",
        "a sequence" => "a list",
        "a nonzero u32" | "a nonzero u64" | "a nonzero usize" => "a whole number of at least 1",
        "u8" => "a whole number from 0 to 255",
        "u16" => "a whole number from 0 to 65535",
        "u32" | "u64" | "usize" | "i32" | "i64" => "a whole number",
        "f32" | "f64" => "a number",
        _ if expected.starts_with("struct ") => "a map",
        _ => expected,
    }
}

/// The found kind, in an operator's terms.
fn thing(found: &str) -> String {
    match found.split_once(' ') {
        _ if found == "sequence" => "a list".to_owned(),
        _ if found == "map" => "a map".to_owned(),
        Some(("string", text)) => format!("the text {text}"),
        Some(("integer", number)) => format!("the number {number}"),
        Some(("floating", number)) => format!("the number {}", number.trim_start_matches("point ")),
        Some(("boolean", value)) => value.to_owned(),
        _ => found.to_owned(),
    }
}

/// Splits a message of the form `problem: advice`; a colon inside quotes does not count.
pub(super) fn halves(message: &str) -> (&str, &str) {
    let mut quoted = false;
    for (at, c) in message.char_indices() {
        match c {
            '`' => quoted = !quoted,
            ':' if !quoted && message[at + 1..].starts_with(' ') => return (&message[..at], &message[at + 2..]),
            _ => {}
        }
    }
    (message, "")
}

/// `expected one of …`.
pub(super) fn expected(known: &[&str]) -> String {
    match known {
        [] => "no keys are known here".to_owned(),
        [one] => format!("expected `{one}`"),
        [one, other] => format!("expected `{one}` or `{other}`"),
        _ => format!("expected one of `{}`", known.join("`, `")),
    }
}

/// The names in backticks.
fn quoted(text: &str) -> Vec<&str> {
    text.split('`').skip(1).step_by(2).collect()
}

fn within(path: &str) -> String {
    if path.is_empty() { String::new() } else { format!(" in `{path}`") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_form_of_serdes_errors_is_read() {
        assert_eq!(
            Complaint::of("unknown field `a`, expected one of `b`, `c`, `d`"),
            Complaint::UnknownKey { key: "a", known: vec!["b", "c", "d"] }
        );
        assert_eq!(
            Complaint::of("unknown variant `a`, expected `b` or `c`"),
            Complaint::UnknownChoice { choice: "a", known: vec!["b", "c"] }
        );
        assert_eq!(
            Complaint::of("unknown field `a`, there are no fields"),
            Complaint::UnknownKey { key: "a", known: vec![] }
        );
        assert_eq!(Complaint::of("missing field `a`"), Complaint::MissingKey("a"));
        assert_eq!(
            Complaint::of("invalid type: string \"a, expected b\", expected u16"),
            Complaint::Mismatch { found: "string \"a, expected b\"", expected: "u16" }
        );
        assert_eq!(Complaint::of("`x` is none: y"), Complaint::Other("`x` is none: y"));
    }

    #[test]
    fn a_message_of_ours_has_two_halves() {
        assert_eq!(halves("`a: b` is none: write `c: d`"), ("`a: b` is none", "write `c: d`"));
        assert_eq!(halves("all of it"), ("all of it", ""));
    }

    #[test]
    fn the_meant_key_is_known_by_its_path() {
        let complaint = Complaint::of("unknown field `adress`, expected `name` or `address`");
        assert_eq!(complaint.meant("listeners[0].adress"), Some("listeners[0].address".to_owned()));
        assert_eq!(complaint.meant("adress"), Some("address".to_owned()));
    }
}
