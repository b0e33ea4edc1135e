//! The normal form of a file (`forebay fmt`): indentation and empty lines.
//!
//! Only white space changes: two columns per level, with lists indented below their key; comments indented like the
//! line they belong to; no trailing blanks; at most one empty line in a row. Order, quotes, long lines and flow
//! style stay. A comment behind a value keeps its column, since such comments are usually aligned.
//!
//! The formatter reads line by line and keeps a stack of open lists and maps. It checks the result before use: the
//! result has the same characters apart from white space, parses to the same values, and is its own normal form.

use std::sync::Arc;

use serde_yaml::Value;

use super::place::SourceMap;
use super::report::{Finding, FindingLocation, Report, Source};
use super::syntax;

/// Columns per level.
const STEP: usize = 2;

/// The normal form of the text of file `name`.
///
/// # Errors
///
/// The text is not valid YAML for a configuration, or uses a construct that the formatter cannot indent.
pub fn normal(name: &str, text: &str) -> Result<String, Report> {
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let report = |findings| Report::new(Arc::new(Source::of(name, text)), findings);
    syntax::read(text, 0, &SourceMap::of(text), true).map_err(report)?;
    let unknown = |line: usize| {
        let at = text.split_inclusive('\n').take(line).map(str::len).sum();
        let finding = Finding::error(FindingLocation::Bytes(at..at + 1), "this file is left as it is");
        report(vec![finding.label("from here on, it cannot be indented without a change of what it says")])
    };
    let normal = lay_out(text).map_err(unknown)?;
    let is_proved = stands_for(text) == stands_for(&normal)
        && letters(text).eq(letters(&normal))
        && lay_out(&normal).is_ok_and(|again| again == normal);
    if is_proved { Ok(normal) } else { Err(unknown(0)) }
}

fn stands_for(text: &str) -> Option<Value> {
    serde_yaml::from_str(text).ok()
}

fn letters(text: &str) -> impl Iterator<Item = char> {
    text.chars().filter(|c| !c.is_whitespace())
}

/// Indents all lines; the error is the 0-based number of a line that it cannot handle.
fn lay_out(text: &str) -> Result<String, usize> {
    let lines = text.strip_suffix('\n').unwrap_or(text).split('\n');
    let lines: Vec<&str> = lines.map(|line| line.strip_suffix('\r').unwrap_or(line)).collect();
    let mut layout =
        Layout { lines, next: 0, levels: Vec::new(), pending: Vec::new(), plain: None, out: String::new() };
    while layout.next < layout.lines.len() {
        let number = layout.next;
        layout.line().ok_or(number)?;
    }
    // Drops empty lines at the end, except those that belong to a block scalar.
    let full = layout.pending.iter().rposition(|pending| matches!(pending, Pending::Comment { .. }));
    layout.pending.truncate(full.map_or(0, |last| last + 1));
    let levels = std::mem::take(&mut layout.levels);
    layout.flush(None, &levels);
    Ok(layout.out)
}

struct Layout<'t> {
    lines: Vec<&'t str>,
    /// The next line to read.
    next: usize,
    /// The open lists and maps, the innermost last.
    levels: Vec<Level>,
    /// Empty lines and comments before a line that is not yet read.
    pending: Vec<Pending<'t>>,
    /// The owner's columns if the last value is a plain scalar, which may continue on the next line.
    plain: Option<(Option<usize>, usize)>,
    out: String,
}

/// A list or a map in block style.
#[derive(Clone, Copy)]
struct Level {
    kind: Kind,
    /// The column in the input.
    was: usize,
    /// The column in the output.
    is: usize,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    List,
    Map,
    Scalar,
}

enum Pending<'t> {
    Empty,
    Comment { was: usize, text: &'t str },
}

/// The scanner's state inside a value that begins with a quote or a bracket.
#[derive(Default)]
struct Inside {
    /// Number of open brackets.
    depth: usize,
    quote: Option<char>,
    /// Inside a plain scalar, where a quote is an ordinary character.
    plain: bool,
}

impl Inside {
    fn is_over(&self) -> bool {
        self.depth == 0 && self.quote.is_none()
    }

    /// Scans a line up to the end of the value and returns the end of the content before a comment. `None`: other
    /// content follows the value.
    fn read(&mut self, text: &str) -> Option<usize> {
        let mut letters = text.char_indices().peekable();
        let mut before = ' ';
        while let Some((at, letter)) = letters.next() {
            match (self.quote, letter) {
                (Some('"'), '\\') => _ = letters.next(),
                (Some('\''), '\'') if letters.next_if(|&(_, next)| next == '\'').is_some() => {}
                (Some(quote), _) if quote == letter => self.quote = None,
                (Some(_), _) => {}
                (None, '#') if before.is_whitespace() => return Some(at),
                (None, '"' | '\'') if !self.plain => self.quote = Some(letter),
                (None, '[' | '{') => (self.depth, self.plain) = (self.depth + 1, false),
                (None, ']' | '}') => (self.depth, self.plain) = (self.depth.checked_sub(1)?, false),
                (None, ',') => self.plain = false,
                (None, ':') => self.plain &= !letters.peek().is_none_or(|(_, next)| next.is_whitespace()),
                (None, _) => self.plain |= !letter.is_whitespace(),
            }
            before = letter;
            if self.is_over() {
                let end = at + letter.len_utf8();
                let rest = text[end..].trim_start();
                return (rest.is_empty() || rest.starts_with('#')).then_some(end);
            }
        }
        Some(text.len())
    }
}

impl<'t> Layout<'t> {
    /// Reads a line and the lines that continue its value. `None`: it cannot handle the line.
    fn line(&mut self) -> Option<()> {
        let line = self.lines[self.next];
        let text = line.trim_start_matches(' ');
        let was = line.len() - text.len();
        let text = text.trim_end_matches([' ', '\t']);
        if text.is_empty() {
            self.pending.push(Pending::Empty);
            self.next += 1;
            return Some(());
        }
        if text.starts_with('#') {
            self.pending.push(Pending::Comment { was, text });
            self.next += 1;
            return Some(());
        }
        if text.contains('\r') || text.starts_with('\t') {
            return None;
        }
        if was == 0 && (text.starts_with("---") || text.starts_with("...") || text.starts_with('%')) {
            let rest = text.trim_start_matches(['-', '.']).trim_start();
            if !(rest.is_empty() || rest.starts_with('#') || text.starts_with('%')) {
                return None;
            }
            (self.plain, self.next) = (None, self.next + 1);
            let levels = std::mem::take(&mut self.levels);
            self.flush(Some((0, 0)), &levels);
            self.put(0, text);
            return Some(());
        }
        if let Some((owner, is)) = self.plain
            && owner.is_none_or(|owner| was > owner)
        {
            if self.pending.iter().any(|pending| matches!(pending, Pending::Comment { .. })) {
                return None;
            }
            // An empty line inside a scalar is part of it.
            self.pending.drain(..).for_each(|_| self.out.push('\n'));
            if text.contains(" #") {
                self.plain = None;
            }
            self.next += 1;
            self.put(is, text);
            return Some(());
        }
        self.plain = None;
        self.content(was, text)
    }

    /// Reads a line with list items or a map entry.
    fn content(&mut self, was: usize, text: &'t str) -> Option<()> {
        let (mut rest, mut dashes, mut column) = (text, String::new(), was);
        let before = self.levels.clone();
        let mut first = None;
        loop {
            let is_item = rest == "-" || rest.starts_with("- ");
            let kind = match is_item {
                true => Kind::List,
                false if key(rest)?.is_some() => Kind::Map,
                false => Kind::Scalar,
            };
            let is = self.enter(kind, column, first.is_none())?;
            if first.is_none() {
                first = Some(is);
                self.flush(Some((was, is)), &before);
            }
            if !is_item {
                break;
            }
            let inner = rest[1..].trim_start_matches(' ');
            column += rest.len() - inner.len();
            rest = inner;
            if rest.is_empty() || rest.starts_with('#') {
                dashes.push('-');
                break;
            }
            dashes.push_str("- ");
        }
        let value = match key(rest)? {
            Some(colon) => colon + 1,
            None => 0,
        };
        self.value(first?, &dashes, column, rest, value)
    }

    /// The output column of a list, map or scalar at this input column. Closes the levels that end here.
    fn enter(&mut self, kind: Kind, was: usize, begins_line: bool) -> Option<usize> {
        while begins_line && self.levels.last().is_some_and(|level| level.was > was) {
            self.levels.pop();
        }
        if begins_line
            && kind != Kind::List
            && self.levels.last().is_some_and(|level| level.was == was && level.kind == Kind::List)
        {
            self.levels.pop();
        }
        let is = match self.levels.last() {
            Some(level) if level.was == was && level.kind == kind => return Some(level.is),
            // A list may be in the same column as its key.
            Some(level) if level.was < was || (kind == Kind::List && level.kind == Kind::Map) => level.is + STEP,
            Some(_) => return None,
            None => 0,
        };
        if kind != Kind::Scalar {
            self.levels.push(Level { kind, was, is });
        }
        Some(is)
    }

    /// Writes a line and all lines that continue its value. The value begins at the byte `value` of `rest`; `rest`
    /// is in `column`, behind the dashes of list items.
    fn value(&mut self, is: usize, dashes: &str, column: usize, rest: &'t str, value: usize) -> Option<()> {
        let mut at = value + blanks(&rest[value..]);
        // Anchors and tags come before the value.
        while rest[at..].starts_with(['&', '!']) {
            at += rest[at..].find(' ').unwrap_or(rest.len() - at);
            at += blanks(&rest[at..]);
        }
        let owner = self.levels.last().copied();
        let inner = owner.map_or(0, |owner| owner.is + STEP);
        self.next += 1;
        let head = rest[at..].chars().next();
        match head {
            None | Some('#') => self.put_with_comment(is, dashes, column, rest, at),
            Some('|' | '>') => {
                let header = rest[at..].split(" #").next().unwrap_or_default();
                self.put_with_comment(is, dashes, column, rest, at + header.len());
                self.block(owner, header.trim_end())
            }
            Some('"' | '\'' | '[' | '{') => {
                let mut inside = Inside::default();
                let end = inside.read(&rest[at..])?;
                match inside.quote {
                    // A trailing blank may be escaped with a backslash.
                    Some(_) => {
                        let line = self.lines[self.next - 1];
                        let begin = line.trim_end_matches([' ', '\t']).len() - rest.len();
                        self.put(is, &format!("{dashes}{}", &line[begin..]));
                    }
                    None => self.put_with_comment(is, dashes, column, rest, at + end)?,
                }
                let brackets = owner.map_or(0, |owner| if owner.kind == Kind::List { inner } else { owner.is });
                self.continued(inside, inner, brackets)
            }
            Some(_) => {
                let end = at + rest[at..].find(" #").unwrap_or(rest.len() - at);
                if end == rest.len() {
                    self.plain = Some((owner.map(|owner| owner.was), inner));
                }
                self.put_with_comment(is, dashes, column, rest, end)
            }
        }
    }

    /// Writes the continuation lines of a quoted scalar, in column `inner`, or of a flow collection, relative to
    /// column `brackets`.
    fn continued(&mut self, mut inside: Inside, inner: usize, brackets: usize) -> Option<()> {
        while !inside.is_over() {
            let line = *self.lines.get(self.next)?;
            self.next += 1;
            let text = line.trim_start_matches([' ', '\t']);
            let was = line.len() - text.len();
            let quoted = inside.quote.is_some();
            if text.is_empty() {
                // In a quoted scalar the empty line is content; otherwise it is only layout.
                if quoted || !self.out.ends_with("\n\n") {
                    self.out.push('\n');
                }
                continue;
            }
            let closes = usize::from(!quoted && text.starts_with([']', '}']));
            let is = match inside.depth {
                0 => inner,
                depth => brackets + STEP * (depth - closes),
            };
            let end = inside.read(text)?;
            match inside.quote {
                Some(_) => self.put(is, text),
                None => self.put_with_comment(is, "", was, text.trim_end_matches([' ', '\t']), end)?,
            }
        }
        Some(())
    }

    /// Writes the lines of a block scalar that belongs to `owner`.
    fn block(&mut self, owner: Option<Level>, header: &str) -> Option<()> {
        let (was, is) = owner.map(|owner| (owner.was, owner.is))?;
        let digit = header.chars().find_map(|c| c.to_digit(10)).and_then(|digit| usize::try_from(digit).ok());
        let begins = self.next;
        let indent = |line: &str| line.len() - line.trim_start_matches(' ').len();
        let is_empty = |line: &str| line.trim_matches(' ').is_empty();
        let first = self.lines[begins..].iter().find(|line| !is_empty(line)).map_or(0, |line| indent(line));
        let (had, has) = match digit {
            Some(digit) => (was + digit, is + digit),
            None => (first, is + STEP),
        };
        let within = |line: &&&str| is_empty(line) || (indent(line) >= had && had > was);
        let mut count = self.lines[begins..].iter().take_while(within).count();
        if !header.contains('+') {
            let text = &self.lines[begins..begins + count];
            count -= text.iter().rev().take_while(|line| is_empty(line)).count();
        }
        self.next = begins + count;
        for number in begins..self.next {
            let line = self.lines[number];
            match line.get(had..) {
                Some(text) if !is_empty(line) || !text.is_empty() => {
                    self.out.extend(std::iter::repeat_n(' ', has));
                    self.out.push_str(text);
                    self.out.push('\n');
                }
                _ => self.out.push('\n'),
            }
        }
        Some(())
    }

    /// Writes the pending empty lines and comments. `next` has the input and output column of the next line, if
    /// there is one; `before` are the lists and maps that were open before it.
    fn flush(&mut self, next: Option<(usize, usize)>, before: &[Level]) {
        for pending in std::mem::take(&mut self.pending) {
            match pending {
                Pending::Empty => {
                    if !self.out.is_empty() && !self.out.ends_with("\n\n") {
                        self.out.push('\n');
                    }
                }
                Pending::Comment { was, text } => {
                    let of_level = before.iter().rev().find(|level| level.was == was).map(|level| level.is);
                    let is = match next {
                        Some((column, is)) if column == was => is,
                        Some((_, is)) => of_level.unwrap_or(is),
                        None => {
                            let outer =
                                || before.iter().rev().find(|level| level.was < was).map_or(0, |level| level.is);
                            of_level.unwrap_or_else(outer)
                        }
                    };
                    self.put(is, text);
                }
            }
        }
    }

    /// Writes a line whose value ends at the byte `end` of `rest`, with an optional comment. The comment keeps its
    /// column unless exactly one blank preceded it.
    fn put_with_comment(&mut self, is: usize, dashes: &str, column: usize, rest: &str, end: usize) -> Option<()> {
        let content = rest[..end].trim_end_matches([' ', '\t']);
        let comment = rest[end..].trim_start_matches([' ', '\t']);
        if comment.is_empty() {
            self.put(is, &format!("{dashes}{content}"));
            return Some(());
        }
        if !comment.starts_with('#') {
            return None;
        }
        let width = |text: &str| text.chars().count();
        let was = column + width(&rest[..rest.len() - comment.len()]);
        let has = is + width(dashes) + width(content);
        let stood_close = content.is_empty() || was == column + width(content) + 1;
        let blanks = if stood_close { 1 } else { was.saturating_sub(has).max(1) };
        self.put(is, &format!("{dashes}{content}{:blanks$}{comment}", ""));
        Some(())
    }

    fn put(&mut self, column: usize, text: &str) {
        self.out.extend(std::iter::repeat_n(' ', column));
        self.out.push_str(text);
        self.out.push('\n');
    }
}

fn blanks(text: &str) -> usize {
    text.len() - text.trim_start_matches([' ', '\t']).len()
}

/// The position of the colon if the line begins with a key. `None`: the key has a form that no configuration uses.
fn key(text: &str) -> Option<Option<usize>> {
    if text == "?" || text.starts_with("? ") {
        return None;
    }
    let mut at = 0;
    while text[at..].starts_with(['&', '!']) {
        at += text[at..].find(' ').unwrap_or(text.len() - at);
        at += blanks(&text[at..]);
    }
    let is_end = |at: usize| text[at + 1..].chars().next().is_none_or(|next| next == ' ' || next == '\t');
    match text[at..].chars().next() {
        None | Some('#' | '[' | '{' | '|' | '>') => Some(None),
        Some('"' | '\'') => {
            let end = quoted_len(&text[at..]).map(|length| at + length);
            let colon = end.map(|end| end + blanks(&text[end..]));
            Some(colon.filter(|&colon| text[colon..].starts_with(':') && is_end(colon)))
        }
        Some(_) => {
            let comment = text.find(" #").unwrap_or(text.len());
            Some(text[..comment].match_indices(':').map(|(at, _)| at).find(|&at| is_end(at)))
        }
    }
}

/// The length in bytes of the quoted scalar at the beginning of `text`; `None` if it continues on the next line.
fn quoted_len(text: &str) -> Option<usize> {
    let mut letters = text.char_indices().peekable();
    let (_, quote) = letters.next()?;
    while let Some((at, letter)) = letters.next() {
        if letter == '\\' && quote == '"' {
            letters.next();
        } else if letter == quote && letters.next_if(|&(_, next)| next == quote && quote == '\'').is_none() {
            return Some(at + 1);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn laid_out(text: &str) -> String {
        normal("f.yaml", text).unwrap_or_else(|report| panic!("{report}"))
    }

    #[test]
    fn lines_are_indented_by_their_level() {
        let text = "
a:
    b:   1
    c:
    -  d: 2
       e: 3
    - 
       f: 4
    -   - x
        - y
    # of the list
# of the file


g: {h: 1,
        i: [
    1, 2
         ]}
\"j\" : &anchor
            k: !!str 5
l: *anchor
";
        let normal = "\
a:
  b:   1
  c:
    - d: 2
      e: 3
    -
      f: 4
    - - x
      - y
    # of the list
# of the file

g: {h: 1,
  i: [
    1, 2
  ]}
\"j\" : &anchor
  k: !!str 5
l: *anchor
";
        assert_eq!(laid_out(text), normal);
    }

    #[test]
    fn a_comment_goes_with_what_it_belongs_to() {
        let text = "\
a:
   # of b
   b: 1   # one
   c: 2 # two
      # deeper
   d:
   # of the items
   - x      # three
   # - y
   # z: 1
# end of a
e: 1
   # at the end
";
        let normal = "\
a:
  # of b
  b: 1    # one
  c: 2 # two
  # deeper
  d:
    # of the items
    - x     # three
    # - y
    # z: 1
# end of a
e: 1
# at the end
";
        assert_eq!(laid_out(text), normal);
    }

    #[test]
    fn texts_of_several_lines_stay_what_they_are() {
        let text = "\
a:
     - |
         one
           two   \u{20}

         three


     - >2-
         four
     - |+
       five


     - b: \"six
              seven \\\u{20}

         eight\"
       c: nine
          ten

          eleven # end
       d: 'it''s # no comment
            here'
e: |
   # no comment
# a comment
";
        let normal = "\
a:
  - |
    one
      two   \u{20}

    three

  - >2-
      four
  - |+
    five


  - b: \"six
      seven \\\u{20}

      eight\"
    c: nine
      ten

      eleven # end
    d: 'it''s # no comment
      here'
e: |
  # no comment
# a comment
";
        assert_eq!(laid_out(text), normal);
    }

    #[test]
    fn what_is_not_understood_is_left_as_it_is() {
        for text in ["? a\n: b\n", "[a]: b\n", "a: b\rc: d\n", "--- {a: 1}\n"] {
            let report = normal("f.yaml", text).expect_err(text);
            assert!(report.errors() == 1, "{report}");
        }
        let report = normal("f.yaml", "a: 1\n b: 2\n").expect_err("it is no YAML");
        assert!(report.to_string().contains("invalid YAML"), "{report}");
        assert_eq!(laid_out(""), "");
        assert_eq!(laid_out("\n# alone\r\n\n"), "# alone\n");
    }

    /// Generates documents: maps and lists in both styles, scalars in all styles, comments, empty lines, odd
    /// indentation.
    fn document() -> impl Strategy<Value = String> {
        let scalar = prop_oneof![
            "[a-z0-9./*-]{1,8}",
            "'[ a-z#:{}\\[\\],\"]{0,8}'",
            "\"[ a-z#:{}\\[\\],']{0,8}\"",
            Just("{ a: 1, b: [x, 'y, z'] }".to_owned()),
            Just("[\n      one, # first\n   two\n      ]".to_owned()),
            Just("'a\n\n        b  '".to_owned()),
            Just("\"a \\\n        b\"".to_owned()),
            Just(String::new()),
        ];
        let comment = prop_oneof![Just(String::new()), Just("  # c".to_owned()), Just(" # it's {".to_owned())];
        let leaf = (scalar, comment).prop_map(|(scalar, comment)| {
            let comment = if scalar.contains('\n') { String::new() } else { comment };
            vec![format!("{scalar}{comment}")]
        });
        let block = ("[|>]", "[-+]?", 1usize..4, prop::collection::vec("[ a-z#:-]{0,6}", 1..4)).prop_map(
            |(style, chomp, by, lines)| {
                let indent = " ".repeat(by);
                let mut all = vec![format!("{style}{chomp}")];
                all.push(format!("{indent}x"));
                all.extend(
                    lines
                        .iter()
                        .map(|line| if line.trim().is_empty() { String::new() } else { format!("{indent}y{line}") }),
                );
                all
            },
        );
        let value = prop_oneof![3 => leaf, 1 => block];
        let nested = value.prop_recursive(4, 24, 4, |inner| {
            let entry = (inner, 1usize..5, prop_oneof![Just(""), Just("# c"), Just("  # d"), Just("\n\n")]);
            (prop::collection::vec(entry, 1..4), any::<bool>()).prop_map(|(entries, is_list)| {
                let mut lines = vec![String::new()];
                for (number, (value, by, before)) in entries.into_iter().enumerate() {
                    let indent = " ".repeat(by);
                    let head = if is_list { "-".to_owned() } else { format!("k{number}:") };
                    lines.extend(before.split('\n').filter(|line| !line.is_empty()).map(str::to_owned));
                    if before.starts_with('\n') {
                        lines.push(String::new());
                    }
                    let (first, rest) = value.split_first().expect("a line");
                    lines.push(format!("{head} {first}"));
                    lines.extend(rest.iter().map(|line| match line.is_empty() {
                        true => String::new(),
                        false => format!("{indent}{line}"),
                    }));
                }
                lines
            })
        });
        prop::collection::vec((nested, "[a-d]"), 1..4).prop_map(|entries| {
            let mut text = String::new();
            for (number, (value, name)) in entries.iter().enumerate() {
                text += &format!("{name}{number}: ");
                value.iter().enumerate().for_each(|(at, line)| {
                    let indent = if at == 0 || line.is_empty() { "" } else { "   " };
                    text += &format!("{indent}{line}\n");
                });
            }
            text
        })
    }

    proptest! {
        #[test]
        fn no_document_changes_what_it_stands_for(text in document()) {
            let Some(before) = stands_for(&text) else { return Ok(()) };
            prop_assume!(before.is_mapping());
            match lay_out(&text) {
                Err(line) => prop_assert!(false, "line {line} of\n{text}"),
                Ok(normal) => {
                    prop_assert_eq!(stands_for(&normal), Some(before), "{}\n->\n{}", text, normal);
                    prop_assert!(letters(&text).eq(letters(&normal)), "{}\n->\n{}", text, normal);
                    prop_assert_eq!(lay_out(&normal), Ok(normal.clone()), "{}\n->\n{}", text, normal);
                }
            }
        }

        #[test]
        fn no_text_brings_it_down(text in "([ \n:#'\"|>{}\\[\\],&*!?%-]|[a-c]|ä|\t|\r|--- ){0,40}") {
            if let Ok(normal) = normal("f.yaml", &text) {
                prop_assert_eq!(stands_for(&text), stands_for(&normal));
            }
        }
    }
}
