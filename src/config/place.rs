//! Positions in a configuration file: from a path such as `routes[2].match.path` to bytes of the text.
//!
//! `serde_yaml` values have no positions, so a second parser reads the text and reports events with their spans.
//! The result is a tree of the same shape as the value, with aliases and merge keys resolved: an error in an
//! aliased value points at the anchor. `report` draws the positions.
//!
//! A configuration may have several files. A position is a byte range in the concatenation of their texts; see
//! [`Source`](super::report::Source).
//!
//! This parser runs first, in one pass. [`Bounds`] stop it where a text nests too deeply or its aliases expand too
//! far: `serde_yaml` takes time quadratic in the depth, and memory for every value that an alias repeats.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::ops::Range;
use std::sync::Arc;

use saphyr_parser::{Event, Parser, ScalarStyle, ScanError, Span};
use serde_yaml::Value;

use crate::error::path::{self, PathStep, Tree};

/// Limit on nested lists and maps, aliases expanded. `serde_yaml` has the same limit.
const DEPTH_MAX: usize = 128;
/// Every text may have this many values, aliases expanded; a longer text may have as many as it has bytes.
const VALUES_LEAST: usize = 100_000;

/// The positions of a file.
#[derive(Default)]
pub(super) struct SourceMap {
    root: Option<Place>,
    /// Keys that occur twice in their map.
    pub duplicates: Vec<Duplicate>,
    /// Keys that are not text, and their kind.
    pub odd_keys: Vec<(Range<usize>, String)>,
    /// Values of `<<` that are neither a map nor a list of maps.
    pub bad_merges: Vec<Range<usize>>,
    /// The beginning of a second document.
    pub second_document: Option<Range<usize>>,
    /// Why parsing stopped before the end.
    pub stop: Option<Stop>,
    /// Number of values, aliases expanded.
    pub values: usize,
}

/// Where parsing stopped, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Stop {
    /// The bytes that could not be parsed.
    pub at: Range<usize>,
    /// The reason.
    pub why: Why,
}

/// Why parsing stopped.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Why {
    /// More than `DEPTH_MAX` levels of lists and maps.
    Depth,
    /// More values than this, aliases expanded.
    Values(usize),
    /// An alias inside the value of its own anchor.
    Circle,
    /// Invalid YAML, in the parser's words.
    Syntax(String),
}

impl Stop {
    /// The error, as a sentence.
    pub fn title(&self) -> String {
        match &self.why {
            Why::Depth => format!("lists and maps are nested in more than {DEPTH_MAX} levels"),
            Why::Values(most) => format!("with aliases expanded, the file has more than {most} values"),
            Why::Circle => "an alias is inside the value of its own anchor".to_owned(),
            Why::Syntax(words) => format!("invalid YAML: {words}"),
        }
    }
}

/// A key that occurs twice in its map.
pub(super) struct Duplicate {
    pub key: String,
    pub first: Range<usize>,
    pub again: Range<usize>,
}

/// The target of a path.
pub(super) struct Found {
    /// The key; `None` for a list item or the whole file.
    pub key: Option<Range<usize>>,
    /// The value, or the best part of it to underline on one line.
    pub value: Range<usize>,
    /// Whether the whole path was found; otherwise this is its deepest part that exists.
    pub whole: bool,
}

/// A node and its key, if it has one.
#[derive(Clone)]
pub(super) struct Place {
    key: Option<Range<usize>>,
    node: Arc<Node>,
}

#[derive(Clone)]
struct Node {
    /// The whole of a scalar or a flow collection; the beginning of a block collection.
    span: Range<usize>,
    inside: Inside,
}

#[derive(Clone)]
enum Inside {
    Scalar(String, ScalarStyle),
    List(Vec<Place>),
    Map {
        /// The first key in the text.
        first: Option<Range<usize>>,
        entries: HashMap<String, Place>,
    },
}

/// Checks the bounds without recording positions.
///
/// # Errors
///
/// Where a bound is exceeded, or where the YAML is invalid.
pub(super) fn survey(text: &str) -> Result<(), Stop> {
    let characters = Characters::of(text, 0);
    let mut bounds = Bounds::new(text.len(), 0);
    for next in Parser::new_from_str(text) {
        let (event, span) = next.map_err(|error| characters.syntax(&error))?;
        bounds.event(&event).map_err(|why| Stop { at: characters.bytes(span), why })?;
    }
    Ok(())
}

impl SourceMap {
    /// Parses `text`, as far as possible.
    pub fn of(text: &str) -> SourceMap {
        SourceMap::behind(text, 0, 0)
    }

    /// The same for a text behind `base` other bytes, which have this number of values.
    pub fn behind(text: &str, base: usize, values: usize) -> SourceMap {
        let mut reading = Reading::new(text, base);
        let mut bounds = Bounds::new(base + text.len(), values);
        for next in Parser::new_from_str(text) {
            let stop = match next {
                Ok((event, span)) => match bounds.event(&event) {
                    Ok(()) => {
                        reading.event(event, span);
                        continue;
                    }
                    Err(why) => Stop { at: reading.characters.bytes(span), why },
                },
                Err(error) => reading.characters.syntax(&error),
            };
            reading.places.stop = Some(stop);
            break;
        }
        reading.places.values = bounds.values - values;
        reading.places
    }

    /// The root node; `None` for an empty text.
    pub fn root(&self) -> Option<&Place> {
        self.root.as_ref()
    }

    /// The root node, mutable.
    pub fn root_mut(&mut self) -> Option<&mut Place> {
        self.root.as_mut()
    }

    /// The bytes of the file `text` for a part of the scalar at `path`. `None` if they are unknown: the scalar
    /// contains a `${…}` or comes from elsewhere.
    pub fn inside(&self, text: &str, path: &str, part: &Range<usize>) -> Option<Range<usize>> {
        let mut steps = path::follow(self.root.as_ref()?, path);
        steps.by_ref().for_each(drop);
        let node = &*steps.at().node;
        let Inside::Scalar(scalar, style) = &node.inside else { return None };
        if !steps.is_whole() || scalar.contains("${") {
            return None;
        }
        let written = text.get(node.span.clone())?;
        let inner = aligned(written, *style, scalar, part)?;
        Some(node.span.start + inner.start..node.span.start + inner.end)
    }

    /// Follows `path` as far as it exists; `None` if nothing of it does.
    pub fn find(&self, path: &str) -> Option<Found> {
        let mut steps = path::follow(self.root.as_ref()?, path);
        let taken = steps.by_ref().count();
        let place = steps.at();
        let nowhere = taken == 0 && !steps.is_whole();
        (!nowhere).then(|| Found { value: place.caret(), key: place.key.clone(), whole: steps.is_whole() })
    }
}

impl Tree for Place {
    fn child(&self, step: &PathStep<'_>) -> Option<&Self> {
        match (&self.node.inside, step) {
            (Inside::List(items), PathStep::Index(index)) => items.get(*index),
            (Inside::Map { entries, .. }, PathStep::Key(name)) => entries.get(&**name),
            _ => None,
        }
    }
}

impl Place {
    /// The entry of this name.
    pub fn entry(&self, name: &str) -> Option<&Place> {
        match &self.node.inside {
            Inside::Map { entries, .. } => entries.get(name),
            _ => None,
        }
    }

    /// The same, mutable.
    pub fn entry_mut(&mut self, name: &str) -> Option<&mut Place> {
        match &mut Arc::make_mut(&mut self.node).inside {
            Inside::Map { entries, .. } => entries.get_mut(name),
            _ => None,
        }
    }

    /// Inserts `place` under this name if this is a map.
    pub fn insert(&mut self, name: &str, place: Place) {
        if let Inside::Map { entries, .. } = &mut Arc::make_mut(&mut self.node).inside {
            entries.insert(name.to_owned(), place);
        }
    }

    /// Appends the items of another list.
    pub fn append(&mut self, other: &Place) {
        if let (Inside::List(items), Inside::List(more)) =
            (&mut Arc::make_mut(&mut self.node).inside, &other.node.inside)
        {
            items.extend(more.iter().cloned());
        }
    }

    /// The key, or else the part of the value to underline.
    pub fn named(&self) -> Range<usize> {
        self.key.clone().unwrap_or_else(|| self.caret())
    }

    /// What to underline: the value if it has a visible extent, else its key, else its first child.
    fn caret(&self) -> Range<usize> {
        let Node { span, inside } = &*self.node;
        if span.len() > 1 || (span.len() == 1 && matches!(inside, Inside::Scalar(..))) {
            return span.clone();
        }
        self.key.clone().unwrap_or_else(|| match inside {
            Inside::Map { first: Some(first), .. } => first.clone(),
            Inside::List(items) if !items.is_empty() => items[0].caret(),
            _ => span.clone(),
        })
    }
}

/// Converts the parser's character offsets to byte offsets.
struct Characters<'t> {
    text: &'t str,
    /// Number of bytes in the files before this one.
    base: usize,
    /// The byte offset of each character; `None` if every character is one byte.
    starts: Option<Vec<usize>>,
}

impl<'t> Characters<'t> {
    fn of(text: &'t str, base: usize) -> Self {
        let starts = (!text.is_ascii()).then(|| text.char_indices().map(|(byte, _)| byte).collect());
        Characters { text, base, starts }
    }

    fn byte(&self, index: usize) -> usize {
        self.base
            + match &self.starts {
                Some(starts) => starts.get(index).copied().unwrap_or(self.text.len()),
                None => index.min(self.text.len()),
            }
    }

    fn bytes(&self, span: Span) -> Range<usize> {
        self.byte(span.start.index())..self.byte(span.end.index())
    }

    fn syntax(&self, error: &ScanError) -> Stop {
        let index = error.marker().index();
        let why = match error.info() {
            // The parser has its own depth limit for flow collections. It reads ahead of its events, so it may
            // trigger first.
            "recursion limit exceeded" => Why::Depth,
            words => Why::Syntax(words.to_owned()),
        };
        Stop { at: self.byte(index)..self.byte(index + 1), why }
    }
}

/// Bounds on the cost of a text for any reader: its depth and its number of values.
struct Bounds {
    values_max: usize,
    /// The open collections, the innermost last.
    open: Vec<(usize, Extent)>,
    /// The extent of each anchor.
    anchors: HashMap<usize, Extent>,
    /// Values outside the open collections.
    values: usize,
}

/// The extent of a value, aliases expanded.
#[derive(Clone, Copy)]
struct Extent {
    /// The value itself and those inside it.
    values: usize,
    /// Levels of lists and maps; 0 for a scalar.
    depth: usize,
}

impl Bounds {
    /// The bounds for a text of this length after files with this number of values.
    fn new(bytes: usize, values: usize) -> Self {
        Bounds { values_max: bytes.max(VALUES_LEAST), open: Vec::new(), anchors: HashMap::new(), values }
    }

    fn event(&mut self, event: &Event<'_>) -> Result<(), Why> {
        match event {
            Event::Scalar(_, _, anchor, _) => self.value(*anchor, Extent { values: 1, depth: 0 }),
            Event::Alias(anchor) => {
                let extent = *self.anchors.get(anchor).ok_or(Why::Circle)?;
                self.value(0, extent)
            }
            Event::SequenceStart(anchor, _) | Event::MappingStart(anchor, _) => {
                self.open.push((*anchor, Extent { values: 1, depth: 1 }));
                if self.open.len() > DEPTH_MAX { Err(Why::Depth) } else { Ok(()) }
            }
            Event::SequenceEnd | Event::MappingEnd => match self.open.pop() {
                Some((anchor, extent)) => self.value(anchor, extent),
                None => Ok(()),
            },
            Event::StreamStart | Event::StreamEnd | Event::DocumentStart(_) | Event::DocumentEnd | Event::Nothing => {
                Ok(())
            }
        }
    }

    /// Adds a complete value to its parent.
    fn value(&mut self, anchor: usize, extent: Extent) -> Result<(), Why> {
        if anchor != 0 {
            self.anchors.insert(anchor, extent);
        }
        if self.open.len() + extent.depth > DEPTH_MAX {
            return Err(Why::Depth);
        }
        let values = match self.open.last_mut() {
            Some((_, outer)) => {
                outer.depth = outer.depth.max(extent.depth + 1);
                &mut outer.values
            }
            None => &mut self.values,
        };
        *values = values.saturating_add(extent.values);
        if *values > self.values_max { Err(Why::Values(self.values_max)) } else { Ok(()) }
    }
}

/// The tree under construction: the open collections, the innermost last.
struct Reading<'t> {
    characters: Characters<'t>,
    open: Vec<Open>,
    anchors: HashMap<usize, Arc<Node>>,
    documents: usize,
    places: SourceMap,
}

struct Open {
    anchor: usize,
    start: usize,
    inside: Inside,
    /// The key whose value comes next.
    key: Option<(String, Range<usize>)>,
}

impl<'t> Reading<'t> {
    fn new(text: &'t str, base: usize) -> Self {
        Reading {
            characters: Characters::of(text, base),
            open: Vec::new(),
            anchors: HashMap::new(),
            documents: 0,
            places: SourceMap::default(),
        }
    }

    fn event(&mut self, event: Event<'_>, span: Span) {
        let span = self.characters.bytes(span);
        match event {
            Event::DocumentStart(_) => {
                self.documents += 1;
                if self.documents == 2 {
                    self.places.second_document = Some(span);
                }
            }
            Event::Scalar(text, style, anchor, tag) => {
                let span = self.scalar_span(span, style);
                if self.awaits_key() && style == ScalarStyle::Plain && tag.is_none() {
                    self.places.odd_keys.extend(other_than_text(&text).map(|found| (span.clone(), found)));
                }
                self.node(anchor, Node { span, inside: Inside::Scalar(text.into_owned(), style) });
            }
            Event::Alias(anchor) => {
                if let Some(node) = self.anchors.get(&anchor) {
                    self.put(Arc::clone(node), span);
                }
            }
            Event::SequenceStart(anchor, _) => {
                self.compound_key(&span, "a list");
                self.begin(anchor, span.start, Inside::List(Vec::new()));
            }
            Event::MappingStart(anchor, _) => {
                self.compound_key(&span, "a map");
                self.begin(anchor, span.start, Inside::Map { first: None, entries: HashMap::new() });
            }
            Event::SequenceEnd | Event::MappingEnd => self.end(span),
            Event::StreamStart | Event::StreamEnd | Event::DocumentEnd | Event::Nothing => {}
        }
    }

    /// The parser's span of a quoted scalar extends to the next token: this ends it at the closing quote.
    fn scalar_span(&self, span: Range<usize>, style: ScalarStyle) -> Range<usize> {
        let base = self.characters.base;
        let written = &self.characters.text[span.start - base..span.end - base];
        let len = match style {
            ScalarStyle::SingleQuoted => quoted_len(written, '\''),
            ScalarStyle::DoubleQuoted => quoted_len(written, '"'),
            _ => written.trim_end().len(),
        };
        span.start..span.start + len
    }

    /// Whether a key comes next.
    fn awaits_key(&self) -> bool {
        self.open.last().is_some_and(|open| matches!(open.inside, Inside::Map { .. }) && open.key.is_none())
    }

    /// Records a list or a map in the place of a key.
    fn compound_key(&mut self, span: &Range<usize>, found: &str) {
        if self.awaits_key() {
            self.places.odd_keys.push((span.clone(), found.to_owned()));
        }
    }

    fn begin(&mut self, anchor: usize, start: usize, inside: Inside) {
        self.open.push(Open { anchor, start, inside, key: None });
    }

    fn end(&mut self, span: Range<usize>) {
        let Some(mut open) = self.open.pop() else { return };
        if let Inside::Map { entries, .. } = &mut open.inside {
            self.merge(entries);
        }
        // Only the closing bracket of a flow collection has an extent.
        let end = if span.is_empty() { open.start } else { span.end };
        self.node(open.anchor, Node { span: open.start..end, inside: open.inside });
    }

    /// Applies `<<`: the map's own entries win, then those of the maps that are merged first.
    fn merge(&mut self, entries: &mut HashMap<String, Place>) {
        let Some(merge) = entries.get("<<").cloned() else { return };
        let sources = match &merge.node.inside {
            Inside::List(items) => items.as_slice(),
            _ => std::slice::from_ref(&merge),
        };
        for source in sources {
            match &source.node.inside {
                Inside::Map { entries: merged, .. } => {
                    for (name, place) in merged {
                        entries.entry(name.clone()).or_insert_with(|| place.clone());
                    }
                }
                _ => {
                    let key = source.key.clone().or(merge.key.clone());
                    self.places.bad_merges.push(Place { key, ..source.clone() }.caret());
                }
            }
        }
    }

    fn node(&mut self, anchor: usize, node: Node) {
        let node = Arc::new(node);
        if anchor != 0 {
            self.anchors.insert(anchor, Arc::clone(&node));
        }
        let span = node.span.clone();
        self.put(node, span);
    }

    /// Adds a node as the root, an item, a key, or the value of the previous key.
    fn put(&mut self, node: Arc<Node>, span: Range<usize>) {
        let Some(open) = self.open.last_mut() else {
            self.places.root.get_or_insert(Place { key: None, node });
            return;
        };
        match &mut open.inside {
            Inside::Scalar(..) => {}
            Inside::List(items) => items.push(Place { key: None, node }),
            Inside::Map { first, entries } => match open.key.take() {
                None => {
                    first.get_or_insert_with(|| span.clone());
                    let name = match &node.inside {
                        Inside::Scalar(text, _) => text.clone(),
                        _ => "?".to_owned(),
                    };
                    open.key = Some((name, span));
                }
                Some((name, key)) => match entries.entry(name) {
                    Entry::Occupied(there) => {
                        if let Some(first) = there.get().key.clone() {
                            let duplicate = Duplicate { key: there.key().clone(), first, again: key };
                            self.places.duplicates.push(duplicate);
                        }
                    }
                    Entry::Vacant(free) => _ = free.insert(Place { key: Some(key), node }),
                },
            },
        }
    }
}

/// The type of a plain scalar that is not text.
fn other_than_text(scalar: &str) -> Option<String> {
    let is_word = scalar.starts_with(|first: char| first.is_ascii_alphabetic() || first == '_');
    if is_word && !["null", "true", "false"].iter().any(|word| scalar.eq_ignore_ascii_case(word)) {
        return None;
    }
    match serde_yaml::from_str(scalar).ok()? {
        Value::Null => Some("empty".to_owned()),
        Value::Bool(value) => Some(format!("`{value}`")),
        Value::Number(_) => Some(format!("the number `{scalar}`")),
        _ => None,
    }
}

/// The bytes of `written`, with its quotes and indentation, for a part of the scalar that was parsed from it. Walks
/// both texts side by side; `None` if they do not correspond.
fn aligned(written: &str, style: ScalarStyle, scalar: &str, part: &Range<usize>) -> Option<Range<usize>> {
    let quote = match style {
        ScalarStyle::SingleQuoted => Some('\''),
        ScalarStyle::DoubleQuoted => Some('"'),
        ScalarStyle::Plain | ScalarStyle::Literal | ScalarStyle::Folded => None,
    };
    let mut at = quote.map_or(0, char::len_utf8);
    let (mut start, mut end) = (None, None);
    for (place, c) in scalar.char_indices() {
        let behind = loop {
            let rest = &written[at..];
            let Some(next) = rest.chars().next() else {
                // The span of a block scalar ends before its last line breaks.
                if c.is_whitespace() { break at } else { return None }
            };
            match (quote, next) {
                // The span of a block scalar begins behind its leading empty lines.
                (None, _) if at == 0 && c == '\n' => break 0,
                (Some('\''), '\'') if c == '\'' => break at + 2,
                (Some('"'), '\\') if rest[1..].starts_with(['\n', '\r']) => {
                    at += 1 + rest[1..].len() - rest[1..].trim_start().len();
                }
                (Some('"'), '\\') => {
                    let digits = match rest[1..].chars().next()? {
                        'x' => 2,
                        'u' => 4,
                        'U' => 8,
                        _ => 0,
                    };
                    break at + 1 + rest[1..].chars().next()?.len_utf8() + digits;
                }
                // A folded line: the break and the blanks around it are one blank, or one break.
                _ if c == ' ' && matches!(next, '\n' | '\r') => break at + rest.len() - rest.trim_start().len(),
                _ if next == c => break at + c.len_utf8(),
                (_, '\r') if c == '\n' => break at + if rest.starts_with("\r\n") { 2 } else { 1 },
                _ if next.is_whitespace() => at += next.len_utf8(),
                _ => return None,
            }
        };
        if place == part.start {
            start = Some(at);
        }
        at = behind;
        if place + c.len_utf8() == part.end {
            end = Some(at);
        }
    }
    // A part at the very end begins behind the last character.
    let start = start.or((part.start >= scalar.len()).then_some(at))?;
    let end = end.unwrap_or(start).max(start);
    (end <= written.len()).then_some(start..end)
}

/// The bytes of `text` up to the quote that closes its first one.
fn quoted_len(text: &str, quote: char) -> usize {
    let mut chars = text.char_indices().skip_while(|&(_, c)| c != quote).skip(1).peekable();
    while let Some((at, c)) = chars.next() {
        if c == '\\' && quote == '"' {
            chars.next();
        } else if c == quote && chars.next_if(|&(_, next)| next == quote && quote == '\'').is_none() {
            return at + 1;
        }
    }
    text.len()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn value<'t>(text: &'t str, path: &str) -> &'t str {
        &text[SourceMap::of(text).find(path).unwrap().value]
    }

    #[test]
    fn a_path_leads_to_its_value() {
        let text = "a: {b: [10,  20]}\nc:\n  - d: 'it''s'   # a 'comment'\n    e: \"ü\"\n";
        assert_eq!(value(text, "a.b[1]"), "20");
        assert_eq!(value(text, "c[0].d"), "'it''s'");
        assert_eq!(value(text, "c[0].e"), "\"ü\"");
        assert_eq!(value(text, "a"), "{b: [10,  20]}");
    }

    #[test]
    fn a_block_stands_for_itself_by_its_key_and_an_item_by_its_first() {
        let text = "a:\n  b:\n    - c: 1\n      d: 2\n";
        assert_eq!(value(text, "a.b"), "b");
        assert_eq!(value(text, "a.b[0]"), "c");
    }

    #[test]
    fn names_are_told_from_paths_whatever_stands_in_them() {
        let text = "a: {b: 1}\na.b: {c: 2}\na.b.c: 3\na[0]: 4\na: b: 5\n\"two words\": {ü.ä: 6}\n\"\": 7\n";
        let text = &text.replace("a: b: 5", "'a\"b': 5");
        assert_eq!(value(text, "a.b"), "1");
        assert_eq!(value(text, "\"a.b\".c"), "2");
        assert_eq!(value(text, "\"a.b.c\""), "3");
        assert_eq!(value(text, "\"a[0]\""), "4");
        assert_eq!(value(text, r#""a\"b""#), "5");
        assert_eq!(value(text, "\"two words\".\"ü.ä\""), "6");
        assert_eq!(value(text, "\"\""), "7");
        assert!(!SourceMap::of(text).find("a.b.c").unwrap().whole, "`a.b` has no `c`; another name begins like it");
    }

    #[test]
    fn a_path_that_leads_nowhere_ends_at_the_last_known_place() {
        let text = "a:\n  b: 1\n";
        let found = SourceMap::of(text).find("a.x.y").unwrap();
        assert_eq!(&text[found.value], "a");
        assert!(!found.whole);
        assert!(SourceMap::of(text).find("x.y").is_none());
    }

    #[test]
    fn aliases_and_merges_lead_to_their_anchor() {
        let text = "base: &b {x: 1, y: 2}\none:\n  <<: *b\n  y: 3\ntwo: *b\n";
        assert_eq!(value(text, "one.x"), "1");
        assert_eq!(value(text, "one.y"), "3");
        assert_eq!(value(text, "two.y"), "2");
    }

    #[test]
    fn a_part_of_a_scalar_is_found_however_it_is_written() {
        for (text, part, expected) in [
            ("a: one two three", "two", "two"),
            ("a: 'it''s two'", "two", "two"),
            ("a: \"say \\\"one\\\" two\"", "two", "two"),
            ("a: \"say \\\"one\\\" two\"", "\"one\"", "\\\"one\\\""),
            ("a: \"\\u00e4 \\x41 two\"", "two", "two"),
            ("a: |\n  one\n  ü two\n  three\n", "two", "two"),
            ("a: |\n  one\n    two\n", "two", "two"),
            ("a: |\r\n  one\r\n  two\r\n", "two", "two"),
            ("a: >-\r  one\r  two\r", "two", "two"),
            ("a: |2- # two\n\n    one\n  two\n", "two", "two"),
            ("a: |\n  \"one\" two\n  three\n", "two", "two"),
            ("a: >-\n  'one'\n  | two\n  > three\n", "three", "three"),
            ("a: >-\n  one\n  two\n\n  three\n", "three", "three"),
            ("a: >-\n  one\n  two\n", "one two", "one\n  two"),
            ("a: one\n  two\n  three", "three", "three"),
            ("a: \"one\n  two \\\n  three\"", "three", "three"),
        ] {
            let places = SourceMap::of(text);
            let root = places.root.as_ref().expect("a map");
            let Some(Inside::Scalar(scalar, _)) =
                root.child(&PathStep::Key("a".into())).map(|place| &place.node.inside)
            else {
                panic!("{text} has no scalar")
            };
            let from = scalar.find(part).unwrap_or_else(|| panic!("{scalar}"));
            let found = places.inside(text, "a", &(from..from + part.len()));
            assert_eq!(found.map(|found| &text[found]), Some(expected), "{text}");
        }
        let text = "a: 'x ${Y} z'";
        assert_eq!(SourceMap::of(text).inside(text, "a", &(0..1)), None);
        let text = "a: 'x'";
        assert_eq!(SourceMap::of(text).inside(text, "a", &(1..1)).map(|found| found.start), Some(5));
    }

    #[test]
    fn every_duplicate_is_found() {
        let text = "a: 1\nb: {c: 1, c: 2}\na: 3\n";
        let found: Vec<_> = SourceMap::of(text).duplicates.iter().map(|d| (d.key.clone(), d.again.start)).collect();
        assert_eq!(found, [("c".to_owned(), 15), ("a".to_owned(), 21)]);
    }

    #[test]
    fn of_merged_maps_the_first_wins() {
        let text = "one: &o {x: 1}\ntwo: &t {x: 2, y: 3}\nboth: {<<: [*o, *t]}\n";
        assert_eq!((value(text, "both.x"), value(text, "both.y")), ("1", "3"));
    }

    /// Why both readers stopped.
    fn stopped(text: &str) -> Option<Why> {
        let stop = SourceMap::of(text).stop;
        assert_eq!(survey(text).err(), stop);
        stop.map(|stop| stop.why)
    }

    #[test]
    fn a_text_may_nest_so_deep_and_no_deeper() {
        let nested = |depth| "[".repeat(depth) + &"]".repeat(depth);
        assert_eq!(stopped(&nested(DEPTH_MAX)), None);
        assert!(serde_yaml::from_str::<serde_yaml::Value>(&nested(DEPTH_MAX)).is_ok(), "our bound is serde_yaml's");
        assert_eq!(stopped(&nested(DEPTH_MAX + 1)), Some(Why::Depth));
        assert!(serde_yaml::from_str::<serde_yaml::Value>(&nested(DEPTH_MAX + 1)).is_err());
        let by_alias = |outer| format!("a: &a {}\nb: {}*a{}\n", nested(100), "[".repeat(outer), "]".repeat(outer));
        assert_eq!(stopped(&by_alias(27)), None);
        assert_eq!(stopped(&by_alias(28)), Some(Why::Depth));
    }

    #[test]
    fn a_hostile_text_is_given_up_in_one_pass() {
        let began = std::time::Instant::now();
        for repeated in ["[", "{a: ", "- ", "? ", "[[{", "a: [", "[?", "{? "] {
            for end in ["", "\n", "x"] {
                let text = repeated.repeat(4_000_000 / repeated.len()) + end;
                assert_eq!(stopped(&text), Some(Why::Depth), "{repeated:?} {end:?}");
            }
        }
        let bombs = [
            "a: &a [1,1,1,1,1,1,1,1,1,1]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b,*b,*b,*b,*b,*b,*b]\n\
             d: &d [*c,*c,*c,*c,*c,*c,*c,*c,*c,*c]\ne: &e [*d,*d,*d,*d,*d,*d,*d,*d,*d,*d]\nf: [*e,*e,*e,*e,*e,*e,*e,*e,*e,*e]",
            &format!("a: &a {{{}}}\nb: [{}]", "k: v, ".repeat(100_000), "{<<: *a}, ".repeat(100_000)),
        ];
        for bomb in bombs {
            assert!(matches!(stopped(bomb), Some(Why::Values(_))));
        }
        // Takes seconds without optimization on a busy machine; hours if anything were quadratic.
        assert!(began.elapsed().as_secs() < 120, "{:?}", began.elapsed());
    }

    #[test]
    fn an_alias_inside_of_what_it_stands_for_leads_nowhere() {
        assert_eq!(stopped("a: &a [1, *a]\n"), Some(Why::Circle));
        assert_eq!(stopped("a: &a {b: 1}\nc: [*a, *a]\n"), None);
    }

    #[test]
    fn what_is_no_yaml_stops_where_it_is_none() {
        let Some(Stop { at, why: Why::Syntax(_) }) = SourceMap::of("ä: 1\nb: \"x").stop else { panic!("no stop") };
        assert!(at.start >= 3, "{at:?}");
    }
}
