//! Where everything stands in a configuration file: from a path such as `routes[2].match.path` to bytes of the text.
//!
//! `serde_yaml` forgets places once it has made a value, so the text is read a second time, by a parser that reports
//! events with their spans. What that yields is a tree of the same shape as the value, aliases and merge keys
//! followed: an error inside of what an anchor brought points at where the anchor stands. `report` draws the places.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

use saphyr_parser::{Event, Parser, ScalarStyle, Span};

/// Nodes deeper than this have no place of their own; `serde_yaml` refuses to go deeper, too.
const DEPTH_MAX: usize = 128;

/// The places of a file.
#[derive(Default)]
pub(super) struct Places {
    root: Option<Arc<Node>>,
    /// Keys that stand in their map already.
    pub duplicates: Vec<Duplicate>,
    /// Values of `<<` that are neither a map nor a list of maps.
    pub bad_merges: Vec<Range<usize>>,
    /// Where a second document begins.
    pub second_document: Option<Range<usize>>,
}

/// A key that its map has twice.
pub(super) struct Duplicate {
    pub key: String,
    pub first: Range<usize>,
    pub again: Range<usize>,
}

/// What a path leads to.
pub(super) struct Found {
    /// The key, unless it is an item of a list or the whole file.
    pub key: Option<Range<usize>>,
    /// The value, or what stands for it best on one line.
    pub value: Range<usize>,
    /// Whether the path was followed to its end; if not, this is as far as it led.
    pub whole: bool,
}

struct Node {
    /// All of a scalar or a flow collection; the beginning of a block collection.
    span: Range<usize>,
    inside: Inside,
}

enum Inside {
    Scalar(String),
    List(Vec<Arc<Node>>),
    Map(Vec<Entry>),
}

#[derive(Clone)]
struct Entry {
    name: String,
    key: Range<usize>,
    node: Arc<Node>,
}

impl Places {
    /// Reads `text`, as far as it can be read.
    pub fn of(text: &str) -> Places {
        let mut reading = Reading::new(text);
        for (event, span) in Parser::new_from_str(text).map_while(Result::ok) {
            reading.event(event, span);
        }
        reading.places
    }

    /// Follows `path` as far as it leads; `None` if that is nowhere.
    pub fn find(&self, path: &str) -> Option<Found> {
        let mut node = self.root.as_deref()?;
        let mut key = None;
        let mut rest = path;
        while let Some((inner, inner_key, after)) = node.step(rest) {
            (node, key, rest) = (inner, inner_key, after);
        }
        let nowhere = !path.is_empty() && rest.len() == path.len();
        (!nowhere).then(|| Found { value: node.caret(key.clone()), key, whole: rest.is_empty() })
    }
}

impl Node {
    /// Takes the first step of `path`: the node it leads to, its key, and the rest of the path.
    fn step<'n, 'p>(&'n self, path: &'p str) -> Option<(&'n Node, Option<Range<usize>>, &'p str)> {
        match &self.inside {
            Inside::Scalar(_) => None,
            Inside::List(items) => {
                let (index, rest) = path.strip_prefix('[')?.split_once(']')?;
                Some((items.get(index.parse::<usize>().ok()?)?, None, rest))
            }
            // Names may hold dots, so the longest one that fits is meant.
            Inside::Map(entries) => {
                let path = path.strip_prefix('.').unwrap_or(path);
                let begins = |entry: &&Entry| {
                    path.strip_prefix(entry.name.as_str())
                        .is_some_and(|rest| rest.is_empty() || rest.starts_with(['.', '[']))
                };
                let entry = entries.iter().filter(begins).max_by_key(|entry| entry.name.len())?;
                Some((&entry.node, Some(entry.key.clone()), &path[entry.name.len()..]))
            }
        }
    }

    /// What to underline for this value: itself where it has a visible extent, else its key, else its first child.
    fn caret(&self, key: Option<Range<usize>>) -> Range<usize> {
        if self.span.len() > 1 || (self.span.len() == 1 && matches!(self.inside, Inside::Scalar(_))) {
            return self.span.clone();
        }
        key.unwrap_or_else(|| match &self.inside {
            Inside::Map(entries) if !entries.is_empty() => entries[0].key.clone(),
            Inside::List(items) if !items.is_empty() => items[0].caret(None),
            _ => self.span.clone(),
        })
    }
}

/// The tree while it grows: collections that are still open, the innermost last.
struct Reading<'t> {
    text: &'t str,
    /// The byte at which each character begins; `None` if every character is one byte. The parser counts characters.
    bytes: Option<Vec<usize>>,
    open: Vec<Open>,
    /// Collections open beyond [`DEPTH_MAX`].
    too_deep: usize,
    anchors: HashMap<usize, Arc<Node>>,
    documents: usize,
    places: Places,
}

struct Open {
    anchor: usize,
    start: usize,
    inside: Inside,
    /// The key of a map whose value comes next.
    key: Option<(String, Range<usize>)>,
    /// Where each name of a map stands among its entries.
    names: HashMap<String, usize>,
}

impl<'t> Reading<'t> {
    fn new(text: &'t str) -> Self {
        let bytes = (!text.is_ascii()).then(|| text.char_indices().map(|(byte, _)| byte).collect());
        Reading {
            text,
            bytes,
            open: Vec::new(),
            too_deep: 0,
            anchors: HashMap::new(),
            documents: 0,
            places: Places::default(),
        }
    }

    fn event(&mut self, event: Event<'_>, span: Span) {
        let span = self.byte(span.start.index())..self.byte(span.end.index());
        match event {
            Event::DocumentStart(_) => {
                self.documents += 1;
                if self.documents == 2 {
                    self.places.second_document = Some(span);
                }
            }
            Event::Scalar(text, style, anchor, _) => {
                let span = self.scalar_span(span, style);
                self.node(anchor, Node { span, inside: Inside::Scalar(text.into_owned()) });
            }
            Event::Alias(anchor) => match self.anchors.get(&anchor) {
                Some(node) => self.put(Arc::clone(node), span),
                None => self.node(0, Node { span, inside: Inside::Scalar(String::new()) }),
            },
            Event::SequenceStart(anchor, _) => self.begin(anchor, span.start, Inside::List(Vec::new())),
            Event::MappingStart(anchor, _) => self.begin(anchor, span.start, Inside::Map(Vec::new())),
            Event::SequenceEnd | Event::MappingEnd => self.end(span),
            Event::StreamStart | Event::StreamEnd | Event::DocumentEnd | Event::Nothing => {}
        }
    }

    fn byte(&self, index: usize) -> usize {
        match &self.bytes {
            Some(bytes) => bytes.get(index).copied().unwrap_or(self.text.len()),
            None => index.min(self.text.len()),
        }
    }

    /// The parser's spans of quoted scalars run on to the next token: ends them at the closing quote.
    fn scalar_span(&self, span: Range<usize>, style: ScalarStyle) -> Range<usize> {
        let quote = match style {
            ScalarStyle::SingleQuoted => '\'',
            ScalarStyle::DoubleQuoted => '"',
            _ => return span.start..span.start + self.text[span.clone()].trim_end().len(),
        };
        span.start..span.start + quoted_len(&self.text[span.clone()], quote)
    }

    fn begin(&mut self, anchor: usize, start: usize, inside: Inside) {
        if self.open.len() >= DEPTH_MAX {
            self.too_deep += 1;
        } else {
            self.open.push(Open { anchor, start, inside, key: None, names: HashMap::new() });
        }
    }

    fn end(&mut self, span: Range<usize>) {
        if self.too_deep > 0 {
            self.too_deep -= 1;
            return;
        }
        let Some(mut open) = self.open.pop() else { return };
        if let Inside::Map(entries) = &mut open.inside {
            self.merge(entries, &open.names);
        }
        // Only the end of a flow collection, its bracket, has an extent.
        let end = if span.is_empty() { open.start } else { span.end };
        self.node(open.anchor, Node { span: open.start..end, inside: open.inside });
    }

    /// Follows `<<`: entries of the merged maps stand behind the map's own.
    fn merge(&mut self, entries: &mut Vec<Entry>, names: &HashMap<String, usize>) {
        let Some(merge) = names.get("<<").map(|&at| entries[at].clone()) else { return };
        let sources = match &merge.node.inside {
            Inside::List(items) => items.clone(),
            _ => vec![Arc::clone(&merge.node)],
        };
        for source in sources {
            match &source.inside {
                Inside::Map(merged) => {
                    let fresh = merged.iter().filter(|entry| !names.contains_key(&entry.name)).cloned();
                    entries.extend(fresh.collect::<Vec<_>>());
                }
                _ => self.places.bad_merges.push(source.caret(Some(merge.key.clone()))),
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

    /// Puts a node where it belongs: the root, an item, a key, or the value of the key before it.
    fn put(&mut self, node: Arc<Node>, span: Range<usize>) {
        if self.too_deep > 0 {
            return;
        }
        let Some(open) = self.open.last_mut() else {
            self.places.root.get_or_insert(node);
            return;
        };
        match &mut open.inside {
            Inside::Scalar(_) => {}
            Inside::List(items) => items.push(node),
            Inside::Map(entries) => match open.key.take() {
                None => {
                    let name = match &node.inside {
                        Inside::Scalar(text) => text.clone(),
                        _ => "?".to_owned(),
                    };
                    open.key = Some((name, span));
                }
                Some((name, key)) => match open.names.get(&name) {
                    Some(&at) => {
                        self.places.duplicates.push(Duplicate {
                            key: name,
                            first: entries[at].key.clone(),
                            again: key,
                        });
                    }
                    None => {
                        open.names.insert(name.clone(), entries.len());
                        entries.push(Entry { name, key, node });
                    }
                },
            },
        }
    }
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
        &text[Places::of(text).find(path).unwrap().value]
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
    fn names_with_dots_are_told_from_paths() {
        let text = "a: {b: 1}\na.b: 2\na.b.c: {d: 3}\n";
        assert_eq!(value(text, "a.b"), "2");
        assert_eq!(value(text, "a.b.c.d"), "3");
    }

    #[test]
    fn a_path_that_leads_nowhere_ends_at_the_last_known_place() {
        let text = "a:\n  b: 1\n";
        let found = Places::of(text).find("a.x.y").unwrap();
        assert_eq!(&text[found.value], "a");
        assert!(!found.whole);
        assert!(Places::of(text).find("x.y").is_none());
    }

    #[test]
    fn aliases_and_merges_lead_to_their_anchor() {
        let text = "base: &b {x: 1, y: 2}\none:\n  <<: *b\n  y: 3\ntwo: *b\n";
        assert_eq!(value(text, "one.x"), "1");
        assert_eq!(value(text, "one.y"), "3");
        assert_eq!(value(text, "two.y"), "2");
    }

    #[test]
    fn every_duplicate_is_found() {
        let text = "a: 1\nb: {c: 1, c: 2}\na: 3\n";
        let found: Vec<_> = Places::of(text).duplicates.iter().map(|d| (d.key.clone(), d.again.start)).collect();
        assert_eq!(found, [("c".to_owned(), 15), ("a".to_owned(), 21)]);
    }

    #[test]
    fn a_very_deep_file_is_no_danger() {
        let text = "[".repeat(100_000);
        assert!(Places::of(&text).find("[0][0]").is_none());
    }
}
