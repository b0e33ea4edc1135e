//! Parses text to YAML, and rejects invalid YAML, duplicate keys and values that cannot be a configuration.

use std::ops::Range;
use std::string::FromUtf8Error;

use serde::de::IgnoredAny;
use serde_yaml::{Mapping, Value};

use super::place::{SourceMap, Stop, Why};
use super::report::{Finding, FindingLocation};

/// Invalid YAML is parsed a second time for a better error message, up to this many bytes and brackets: the time of
/// that parser grows with the product of both.
const REREAD_MAX: (usize, usize) = (1024 * 1024, 4096);

/// Parses the text of a file to a map and resolves merge keys. The file begins at byte `base` of the joined text.
pub(super) fn read(text: &str, base: usize, places: &SourceMap, may_be_empty: bool) -> Result<Mapping, Vec<Finding>> {
    if let Some(stop) = &places.stop {
        return Err(vec![stopped(text, base, stop)]);
    }
    let value: Result<Value, _> = serde_yaml::from_str(text);
    if let Some(second) = &places.second_document {
        return Err(vec![
            Finding::error(FindingLocation::Bytes(second.clone()), "there is more than one YAML document in the file")
                .label("a second document begins here")
                .help("a configuration is one document: remove this line, or what is above or below it"),
        ]);
    }
    let mut value = value.map_err(|error| match places.duplicates.is_empty() {
        true => vec![invalid(text, &error).moved(base)],
        false => duplicates(places),
    })?;
    if !places.odd_keys.is_empty() {
        return Err(places.odd_keys.iter().map(|(at, found)| odd_key(text, base, at, found)).collect());
    }
    let bad_merges: Vec<_> =
        places.bad_merges.iter().map(|range| bad_merge(FindingLocation::Bytes(range.clone()))).collect();
    if !bad_merges.is_empty() {
        return Err(bad_merges);
    }
    value.apply_merge().map_err(|_| vec![bad_merge(FindingLocation::File)])?;
    match value {
        Value::Mapping(map) => Ok(map),
        Value::Null if may_be_empty => Ok(Mapping::new()),
        Value::Null => Err(vec![Finding::error(FindingLocation::File, "the file is empty").help(SMALLEST)]),
        other => {
            let found = match other {
                Value::Sequence(_) => "a list",
                Value::Tagged(_) => "a tagged value",
                _ => "a lone value",
            };
            let title = format!("the file must be a map of keys such as `listeners:`, not {found}");
            let at = places.find("").map_or(FindingLocation::File, |found| FindingLocation::Bytes(found.value));
            Err(vec![Finding::error(at, title).label("expected a key").help(SMALLEST)])
        }
    }
}

/// The error for a file that is not UTF-8, and its valid part. The file begins at byte `base`.
pub(super) fn no_text(base: usize, error: &FromUtf8Error) -> (String, Finding) {
    let at = error.utf8_error().valid_up_to();
    let text = String::from_utf8_lossy(error.as_bytes()).into_owned();
    let mark = base + at..base + at + char::REPLACEMENT_CHARACTER.len_utf8();
    let finding = Finding::error(FindingLocation::Bytes(mark), "the file is not UTF-8 text")
        .label(format!("the byte 0x{:02x} belongs to no character", error.as_bytes()[at]))
        .help("save the file in the encoding UTF-8");
    (text, finding)
}

const SMALLEST: &str = "a configuration has at least `listeners:` and `routes:`, and usually `upstreams:`";

fn duplicates(places: &SourceMap) -> Vec<Finding> {
    let duplicates = places.duplicates.iter();
    duplicates
        .map(|duplicate| {
            let again = FindingLocation::Bytes(duplicate.again.clone());
            Finding::error(again, format!("the key `{}` occurs twice in one map", duplicate.key))
                .label("again here")
                .also(FindingLocation::Bytes(duplicate.first.clone()), "first here")
                .help("remove one of them, or merge them")
        })
        .collect()
}

fn odd_key(text: &str, base: usize, at: &Range<usize>, found: &str) -> Finding {
    let key = &text[at.start - base..at.end - base];
    let finding =
        Finding::error(FindingLocation::Bytes(at.clone()), format!("a key must be text, and this one is {found}"));
    match found {
        "a list" | "a map" => finding.label("write a name, a colon, and then the value"),
        "empty" => finding.label("write a name before the colon"),
        _ => finding.label(format!("put it in quotes: `\"{key}\"`")),
    }
}

fn bad_merge(location: FindingLocation) -> Finding {
    Finding::error(location, "`<<` can merge maps only").label("expected an alias of a map, such as `*defaults`")
}

/// The error for a text that could not be parsed. Both parsers must accept it; libyaml's messages are better known.
fn stopped(text: &str, base: usize, stop: &Stop) -> Finding {
    let finding = Finding::error(FindingLocation::Bytes(stop.at.clone()), stop.title());
    let brackets = || text.bytes().filter(|byte| matches!(byte, b'[' | b'{')).count();
    match &stop.why {
        Why::Depth => finding.label("this goes too deep").help("is this a configuration?"),
        Why::Values(_) => finding.label("from here on it is too much"),
        Why::Circle => finding.label("this never ends"),
        Why::Syntax(_) if text.len() > REREAD_MAX.0 || brackets() > REREAD_MAX.1 => finding,
        Why::Syntax(_) => match serde_yaml::from_str::<IgnoredAny>(text) {
            Err(error) => invalid(text, &error).moved(base),
            Ok(_) => finding,
        },
    }
}

/// Rewords an error of libyaml.
fn invalid(text: &str, error: &serde_yaml::Error) -> Finding {
    let message = error.to_string();
    let (problem, context) = message.split_once(", while ").unwrap_or((&message, ""));
    if let Some((at, character)) = control(text).filter(|_| problem.starts_with("control characters")) {
        return Finding::error(
            FindingLocation::Bytes(at..at + character.len_utf8()),
            "invalid YAML: a control character",
        )
        .label(format!("this is U+{:04X}", u32::from(character)));
    }
    if let Some(number) = too_large(problem)
        && let Some(at) = place(text, error).filter(|at| text[*at..].starts_with(number))
    {
        return Finding::error(
            FindingLocation::Bytes(at..at + number.len()),
            format!("the number `{number}` is too large"),
        )
        .label("write a smaller one; or put it in quotes, if it is text");
    }
    let (problem, _) = position(problem);
    let (context, context_at) = position(context);
    let context = plain(context);
    let Some(at) = place(text, error) else {
        return Finding::error(FindingLocation::File, format!("invalid YAML: {problem}"));
    };
    let location = FindingLocation::Bytes(at..at + text[at..].chars().next().map_or(0, char::len_utf8));
    if text[at..].starts_with('\t') {
        return Finding::error(location, "invalid YAML: a tab cannot indent").label("use spaces");
    }
    if text[..at].ends_with('$') && text[at..].starts_with('{') {
        return Finding::error(location, "invalid YAML: a `${…}` inside `{ }` or `[ ]` needs quotes")
            .label("put the whole value in quotes, such as `\"${PORT}\"`");
    }
    let context_at = context_at.map(|(line, column)| byte(text, line, column));
    // If the end is missing, the position of the beginning is more useful.
    if let (true, Some(begin)) = (at >= text.trim_end().len(), context_at) {
        let title = format!("invalid YAML: the file ends in the middle of {context}");
        return Finding::error(FindingLocation::Bytes(begin..begin + 1), title).label("this is never closed");
    }
    let (problem, advice) = known(problem);
    let finding = Finding::error(location, format!("invalid YAML: {problem}")).label(advice);
    match context_at {
        Some(begin) => finding.also(FindingLocation::Bytes(begin..begin), format!("in {context} that begins here")),
        None => finding,
    }
}

/// The first character that YAML does not allow.
fn control(text: &str) -> Option<(usize, char)> {
    text.char_indices().find(|(_, c)| c.is_control() && !matches!(c, '\t' | '\n' | '\r' | '\u{85}'))
}

/// The number that a [`Value`] cannot hold.
fn too_large(problem: &str) -> Option<&str> {
    let (_, rest) = problem.split_once("integer `")?;
    let (number, rest) = rest.split_once('`')?;
    rest.contains("expected any YAML value").then_some(number)
}

/// The most common errors of libyaml, with advice.
fn known(problem: &str) -> (&str, &str) {
    match problem {
        "mapping values are not allowed in this context" => (
            "a key is not allowed here",
            "is this `: ` part of a value? Then put it in quotes; else indent the line as its neighbours",
        ),
        "found character that cannot start any token" => {
            ("no value begins with this character", "put the value in quotes")
        }
        "did not find expected key" => ("expected a key", "the indentation matches no line above"),
        "did not find expected '-' indicator" => ("expected a `-`", "the indentation matches no line above"),
        "did not find expected node content" => ("expected a value", "put the value in quotes, if this is one"),
        "did not find expected ',' or '}'" => ("expected `,` or `}`", "or is something not closed above?"),
        "did not find expected ',' or ']'" => ("expected `,` or `]`", "or is something not closed above?"),
        "unknown anchor" => ("unknown anchor", "no anchor of this name is above"),
        _ => (problem, ""),
    }
}

/// What libyaml was parsing, without the terms of the YAML specification.
fn plain(context: &str) -> &str {
    match context {
        "parsing a flow sequence" => "a list in `[ ]`",
        "parsing a flow mapping" => "a map in `{ }`",
        "parsing a block collection" => "a list",
        "parsing a block mapping" => "a map",
        "scanning a quoted scalar" => "a text in quotes",
        _ => "something",
    }
}

/// Splits `… at line 3 column 5` into the message and the numbers.
fn position(message: &str) -> (&str, Option<(usize, usize)>) {
    let Some((words, numbers)) = message.rsplit_once(" at line ") else { return (message, None) };
    let numbers =
        numbers.split_once(" column ").and_then(|(line, column)| Some((line.parse().ok()?, column.parse().ok()?)));
    (words, numbers)
}

/// The byte at a 1-based line and column, the column in characters. Line ends follow libyaml, which recognizes more
/// of them than editors do.
fn byte(text: &str, line: usize, column: usize) -> usize {
    let mut ends = text.char_indices().filter(|&(at, c)| match c {
        '\r' => !text[at + 1..].starts_with('\n'),
        _ => matches!(c, '\n' | '\u{85}' | '\u{2028}' | '\u{2029}'),
    });
    let start = match line.checked_sub(2) {
        Some(before) => ends.nth(before).map_or(text.len(), |(at, c)| at + c.len_utf8()),
        None => 0,
    };
    let rest = &text[start..];
    start + rest.char_indices().nth(column.saturating_sub(1)).map_or(rest.len(), |(at, _)| at)
}

/// The byte position of an error of libyaml.
pub(super) fn place(text: &str, error: &serde_yaml::Error) -> Option<usize> {
    error.location().map(|at| byte(text, at.line(), at.column()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_position_is_split_from_its_words() {
        assert_eq!(position("unknown anchor at line 3 column 14"), ("unknown anchor", Some((3, 14))));
        assert_eq!(position("scanning for the next token"), ("scanning for the next token", None));
    }

    #[test]
    fn lines_and_columns_are_counted_in_characters() {
        assert_eq!(byte("ä: 1\nbö: 2", 2, 3), 9);
        assert_eq!(byte("a", 7, 9), 1);
        assert_eq!(byte("a\rb\r\nc\u{85}d\u{2028}e", 5, 1), 12);
        assert_eq!(byte("a", 1, 0), 0);
    }
}
