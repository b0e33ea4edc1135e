//! Reports errors of a configuration file in the style of rustc: position, line, caret, advice.
//!
//! The stages of the pipeline create findings, each with a path. A [`Report`] looks up the paths in the file's
//! [`SourceMap`], removes secrets from the texts, and draws.

use std::borrow::Cow;
use std::collections::{BTreeSet, HashSet};
use std::fmt;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;

use annotate_snippets::{AnnotationKind, Group, Level, Origin, Renderer, Snippet};

use super::place::SourceMap;
use crate::error::{Inside, nearest, path};

/// Texts of findings are cut after this many characters, since values in them may have any length.
const WORDS_MAX: usize = 240;

/// Places of one finding that are further apart than this, in bytes, are drawn separately.
const NEAR: usize = 16 * 1024;

/// The files of a configuration and their positions.
#[derive(Default)]
pub(super) struct Source {
    /// The files in reading order; the first one is the main file.
    files: Vec<File>,
    /// The texts of all files, joined with line breaks.
    pub text: String,
    /// The line ends in `text`. Searching for them at each lookup would take quadratic time.
    line_ends: Vec<usize>,
    /// The positions of all values in `text`.
    pub places: SourceMap,
    /// The values that were inserted from outside.
    pub secrets: Vec<Secret>,
    /// The directories that were searched for files.
    pub directories: BTreeSet<PathBuf>,
}

/// A file of a configuration.
struct File {
    /// The name to show.
    name: String,
    /// Its range in the joined text.
    bytes: Range<usize>,
}

/// A scalar that contains a `${…}`.
pub(super) struct Secret {
    /// Its path.
    pub path: String,
    /// The text as written.
    pub written: String,
    /// The text after interpolation.
    pub whole: String,
    /// The value of each `${…}`.
    pub pieces: Vec<String>,
}

/// What a finding points at.
#[derive(Clone, Debug)]
pub(super) enum FindingLocation {
    /// The value at this path.
    Value(String),
    /// The key at this path.
    Key(String),
    /// A part of the scalar at this path.
    Inside(String, Inside),
    /// These bytes of the joined text.
    Bytes(Range<usize>),
    /// The main file as a whole.
    File,
}

impl FindingLocation {
    fn path(&self) -> Option<&str> {
        match self {
            FindingLocation::Value(path) | FindingLocation::Key(path) | FindingLocation::Inside(path, _) => Some(path),
            FindingLocation::Bytes(_) | FindingLocation::File => None,
        }
    }
}

/// One error or warning.
#[derive(Clone, Debug)]
pub(super) struct Finding {
    location: FindingLocation,
    title: String,
    label: String,
    also: Option<(FindingLocation, String)>,
    help: Option<String>,
    warning: bool,
    foreign: bool,
}

impl Finding {
    /// An error at `location`; the title states the problem in a sentence.
    pub fn error(location: FindingLocation, title: impl Into<String>) -> Self {
        let title = title.into();
        Finding { location, title, label: String::new(), also: None, help: None, warning: false, foreign: false }
    }

    /// A warning: valid, but probably a mistake.
    pub fn warning(location: FindingLocation, title: impl Into<String>) -> Self {
        Finding { warning: true, ..Finding::error(location, title) }
    }

    /// The text beside the caret: what was expected.
    pub fn label(mut self, label: impl Into<String>) -> Self {
        self.label = label.into();
        self
    }

    /// A second, related place.
    pub fn also(mut self, location: FindingLocation, label: impl Into<String>) -> Self {
        self.also = Some((location, label.into()));
        self
    }

    /// How to fix it.
    pub fn help(mut self, help: impl Into<String>) -> Self {
        self.help = Some(help.into());
        self
    }

    /// Suggests the most similar of `known`, if one is similar enough.
    pub fn nearest<'k>(self, wrong: &str, known: impl IntoIterator<Item = &'k str>) -> Self {
        match nearest(wrong, known) {
            Some(near) => self.help(format!("did you mean `{near}`?")),
            None => self,
        }
    }

    /// Marks texts from code that does not know the secrets: they are searched for parts of secrets.
    pub fn foreign(mut self) -> Self {
        self.foreign = true;
        self
    }

    /// Shifts the position of a finding from a text that has this number of bytes before it.
    pub fn moved(mut self, by: usize) -> Self {
        let also = self.also.as_mut().map(|(location, _)| location);
        for location in std::iter::once(&mut self.location).chain(also) {
            if let FindingLocation::Bytes(range) = location {
                *range = range.start + by..range.end + by;
            }
        }
        self
    }

    /// Whether it is an error, not a warning.
    pub fn is_error(&self) -> bool {
        !self.warning
    }

    /// Its path, if it has one.
    pub fn path(&self) -> Option<&str> {
        self.location.path()
    }
}

/// The errors and warnings of a configuration, in the order of their positions.
///
/// `Display` prints like rustc, without colour; see [`Report::render`] for colours.
#[derive(Clone, Default)]
pub struct Report {
    source: Arc<Source>,
    findings: Vec<Drawn>,
}

/// A finding with positions and without secrets.
#[derive(Clone)]
struct Drawn {
    spots: Vec<(Range<usize>, String)>,
    title: String,
    help: Option<String>,
    warning: bool,
}

impl Report {
    pub(super) fn new(source: Arc<Source>, findings: Vec<Finding>) -> Self {
        Report { source, findings: Vec::new() }.with(findings)
    }

    /// The same report with more findings about the same file.
    pub(super) fn with(&self, more: Vec<Finding>) -> Self {
        let source = Arc::clone(&self.source);
        let more = more.into_iter().map(|finding| source.place(finding));
        let mut findings: Vec<Drawn> = self.findings.iter().cloned().chain(more).collect();
        // An error in an anchored value is reported once, not at each alias.
        let mut seen = HashSet::new();
        findings.retain(|finding| seen.insert((finding.start(), finding.title.clone())));
        findings.sort_by_key(Drawn::start);
        Report { source, findings }
    }

    /// A report without a position: the file could not be read.
    pub(super) fn unreadable(file: &str, title: String, help: &str) -> Self {
        let source = Source::of(file, "");
        Report::new(Arc::new(source), vec![Finding::error(FindingLocation::File, title).help(help)])
    }

    /// The directories that were searched for files, as far as the configuration could be read.
    pub fn directories(&self) -> &BTreeSet<PathBuf> {
        &self.source.directories
    }

    /// The files of the report.
    pub(super) fn source(&self) -> Arc<Source> {
        Arc::clone(&self.source)
    }

    /// Number of errors and warnings.
    pub fn len(&self) -> usize {
        self.findings.len()
    }

    /// Whether nothing is wrong.
    pub fn is_empty(&self) -> bool {
        self.findings.is_empty()
    }

    /// Number of errors.
    pub fn errors(&self) -> usize {
        self.findings.iter().filter(|finding| !finding.warning).count()
    }

    /// Number of warnings. Warnings alone do not reject a file.
    pub fn warnings(&self) -> usize {
        self.len() - self.errors()
    }

    /// Draws all findings, with terminal colours or without, and a summary line. Empty if there are no findings.
    pub fn render(&self, color: bool) -> String {
        if self.is_empty() {
            return String::new();
        }
        let renderer = if color { Renderer::styled() } else { Renderer::plain() };
        let mut text = String::new();
        for finding in &self.findings {
            text.push_str(&finding.draw(&self.source, &renderer));
            text.push_str("\n\n");
        }
        let level = if self.errors() > 0 { Level::ERROR } else { Level::WARNING };
        text.push_str(&renderer.render(&[Group::with_title(level.primary_title(self.summary()))]));
        text.push('\n');
        text
    }

    /// A hash of the texts, in hexadecimal.
    pub fn hash(&self) -> String {
        format!("{:016x}", xxhash_rust::xxh3::xxh3_64(self.to_string().as_bytes()))
    }

    fn summary(&self) -> String {
        let count = |number: usize, noun: &str| match number {
            0 => None,
            1 => Some(format!("1 {noun}")),
            _ => Some(format!("{number} {noun}s")),
        };
        let counts = [count(self.errors(), "error"), count(self.warnings(), "warning")];
        let counts = counts.into_iter().flatten().collect::<Vec<_>>().join(" and ");
        let found: BTreeSet<&str> = self.findings.iter().map(|finding| self.source.name(finding.start())).collect();
        match found.len() {
            0 | 1 => format!("{counts} in {}", found.first().unwrap_or(&self.source.name(None))),
            files => format!("{counts} in {files} files"),
        }
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.render(false))
    }
}

/// Uses `Display`, so that a failed `unwrap` in a test shows a readable report.
impl fmt::Debug for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl std::error::Error for Report {}

impl Drawn {
    fn start(&self) -> Option<usize> {
        self.spots.first().map(|(range, _)| range.start)
    }

    fn draw(&self, source: &Source, renderer: &Renderer) -> String {
        let level = if self.warning { Level::WARNING } else { Level::ERROR };
        let mut group = Group::with_title(level.primary_title(&self.title));
        let mut kind = AnnotationKind::Primary;
        let mut rest: Vec<&(Range<usize>, String)> = self.spots.iter().collect();
        if rest.is_empty() {
            group = group.element(Origin::path(source.name(None)));
        }
        // Places close together are drawn as one block. The lines between them must be few because each finding
        // repeats them.
        while let Some((first, _)) = rest.first() {
            let file = source.file(first.start);
            let near = first.start.saturating_sub(NEAR)..first.start.saturating_add(NEAR);
            let (here, elsewhere): (Vec<_>, Vec<_>) = rest.into_iter().partition(|(range, _)| {
                near.contains(&range.start) && file.bytes.start == source.file(range.start).bytes.start
            });
            rest = elsewhere;
            let window = source.window(&here);
            let mut annotations = Vec::new();
            for (range, label) in here {
                let label = Some(label.as_str()).filter(|label| !label.is_empty());
                annotations.push(kind.span(range.start - window.start..range.end - window.start).label(label));
                kind = AnnotationKind::Context;
            }
            let shown = Snippet::source(printable(&source.text[window.clone()])).path(&file.name);
            group = group.element(shown.line_start(source.line(window.start).1).annotations(annotations));
        }
        if let Some(help) = &self.help {
            group = group.element(Level::HELP.message(help));
        }
        renderer.render(&[group])
    }
}

impl Source {
    /// A configuration of one file.
    pub fn of(name: &str, text: &str) -> Source {
        let mut source = Source::default();
        source.add(name, text);
        source
    }

    /// Adds a file and returns its offset in the joined text.
    pub fn add(&mut self, name: &str, text: &str) -> usize {
        if !self.files.is_empty() {
            self.line_ends.push(self.text.len());
            self.text.push('\n');
        }
        let base = self.text.len();
        self.text.push_str(text);
        self.line_ends.extend(text.match_indices('\n').map(|(at, _)| base + at));
        self.files.push(File { name: name.to_owned(), bytes: base..self.text.len() });
        base
    }

    /// The names of the files, the main one first.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.files.iter().map(|file| &*file.name)
    }

    /// The name of the file with this byte; the main file for `None`.
    pub fn name(&self, at: Option<usize>) -> &str {
        match at {
            Some(at) => &self.file(at).name,
            None => self.files.first().map_or("", |file| &file.name),
        }
    }

    /// The name of the file with this byte, and its 1-based line.
    pub fn line(&self, at: usize) -> (&str, usize) {
        let file = self.file(at);
        let before = |at: usize| self.line_ends.partition_point(|&end| end < at);
        (&file.name, 1 + before(at) - before(file.bytes.start))
    }

    fn file(&self, at: usize) -> &File {
        let behind = self.files.partition_point(|file| file.bytes.start <= at);
        &self.files[behind.saturating_sub(1)]
    }

    /// Looks up the positions of a finding and removes secrets from its texts.
    fn place(&self, finding: Finding) -> Drawn {
        let Finding { location, mut title, label, also, mut help, warning, foreign } = finding;
        let mut spots = Vec::new();
        let mut secrets = self.secrets_at(&location);
        match self.range(&location) {
            Some(range) => spots.push((range, label)),
            // Without a caret, the label moves to the help.
            None => help = help.or(Some(label).filter(|label| !label.is_empty())),
        }
        if let Some(path) = self.unwritten(&location) {
            title = format!("`{path}`: {title}");
        }
        if let FindingLocation::Inside(path, inside) = &location
            && self.places.inside(&self.text, path, &inside.bytes).is_none()
        {
            title.push_str(&inside.told());
        }
        if let Some((location, label)) = also {
            secrets.extend(self.secrets_at(&location));
            spots.extend(self.range(&location).map(|range| (range, label)));
        }
        let redact = |words: String| tidy(&redact(&words, &secrets, foreign));
        let spots = spots.into_iter().map(|(range, label)| (range, redact(label))).collect();
        Drawn { title: redact(title), help: help.map(redact), spots, warning }
    }

    /// The secrets that texts about `location` may contain.
    fn secrets_at(&self, location: &FindingLocation) -> Vec<&Secret> {
        let Some(path) = location.path() else { return Vec::new() };
        self.secrets.iter().filter(|secret| secret.concerns(path)).collect()
    }

    /// The path of a location that is not in the file, such as a default; the text must then name the path.
    fn unwritten<'s>(&self, location: &'s FindingLocation) -> Option<&'s str> {
        location.path().filter(|path| self.places.find(path).is_none_or(|found| !found.whole))
    }

    /// The bytes to underline: at most the first line of a location.
    fn range(&self, location: &FindingLocation) -> Option<Range<usize>> {
        let range = match location {
            FindingLocation::Bytes(range) => range.clone(),
            FindingLocation::Value(path) => self.places.find(path)?.value,
            FindingLocation::Inside(path, inside) => {
                let found = self.places.inside(&self.text, path, &inside.bytes);
                found.or_else(|| Some(self.places.find(path)?.value))?
            }
            FindingLocation::Key(path) => {
                let found = self.places.find(path)?;
                found.key.filter(|_| found.whole).unwrap_or(found.value)
            }
            FindingLocation::File => return None,
        };
        // A parser may report a position behind the last character in units of its own.
        let start = self.text.floor_char_boundary(range.start);
        let line_end = self.text[start..].find(['\n', '\r']).map_or(self.text.len(), |at| start + at);
        Some(start..self.text.ceil_char_boundary(range.end.clamp(start, line_end)))
    }

    /// The whole lines around all `spots`, so that the renderer need not scan the whole file.
    fn window(&self, spots: &[&(Range<usize>, String)]) -> Range<usize> {
        let start = spots.iter().map(|(range, _)| range.start).min().unwrap_or_default();
        let end = spots.iter().map(|(range, _)| range.end).max().unwrap_or_default();
        let line_start = self.text[..start].rfind('\n').map_or(0, |at| at + 1);
        let line_end = self.text[end..].find('\n').map_or(self.text.len(), |at| end + at);
        line_start..line_end
    }
}

impl Secret {
    /// Whether texts about `path` may contain this secret: its value is at the path or inside it.
    fn concerns(&self, path: &str) -> bool {
        path::is_within(&self.path, path)
    }
}

/// Replaces each quoted secret by what was written. If a part of a secret remains, which happens only in foreign
/// texts, the whole text is replaced.
fn redact(words: &str, secrets: &[&Secret], foreign: bool) -> String {
    let mut known = words.to_owned();
    let mut strange = words.to_owned();
    for secret in secrets {
        for (open, close) in [("`", "`"), ("\"", "\"")] {
            let escaped = format!("{:?}", secret.whole);
            for whole in [secret.whole.as_str(), escaped.trim_matches('"')] {
                let quoted = format!("{open}{whole}{close}");
                known = known.replace(&quoted, &format!("`{}`", secret.written));
                strange = strange.replace(&quoted, "");
            }
        }
    }
    let left = |piece: &String| {
        piece.len() >= 4 && strange.contains(piece.as_str())
            || foreign
                && strange.split(|c: char| !c.is_alphanumeric()).any(|word| word.len() >= 5 && piece.contains(word))
    };
    match secrets.iter().find(|secret| secret.pieces.iter().any(left)) {
        Some(secret) => format!("the value of `{}` does not fit here", secret.written),
        None => known,
    }
}

/// Puts a text on one line and limits its length.
fn tidy(words: &str) -> String {
    let mut tidy = String::with_capacity(words.len());
    for (at, c) in words.chars().enumerate() {
        if at == WORDS_MAX {
            tidy.push('…');
            break;
        }
        if c.is_control() { tidy.extend(c.escape_default()) } else { tidy.push(c) }
    }
    tidy
}

/// Lines of a file, made safe for a terminal. The renderer replaces control characters except C1, which terminals
/// also interpret; the replacement has the same length.
fn printable(text: &str) -> Cow<'_, str> {
    if text.contains(is_c1) { text.replace(is_c1, "\u{b7}").into() } else { text.into() }
}

fn is_c1(c: char) -> bool {
    ('\u{80}'..='\u{9f}').contains(&c)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn source(text: &str) -> Source {
        Source { places: SourceMap::of(text), ..Source::of("f.yaml", text) }
    }

    fn value(path: &str) -> FindingLocation {
        FindingLocation::Value(path.to_owned())
    }

    #[test]
    fn findings_come_in_the_order_of_the_file_and_once_each() {
        let twice = Finding::error(value("b"), "second");
        let findings = vec![twice.clone(), Finding::error(value("a"), "first"), twice];
        let report = Report::new(Arc::new(source("a: 1\nb: 2\n")), findings);
        assert_eq!(report.findings.iter().map(|f| f.title.as_str()).collect::<Vec<_>>(), ["first", "second"]);
    }

    #[test]
    fn what_is_shown_of_a_file_steers_no_terminal() {
        let text = "a: \u{1b}[31m\u{9b}31m\u{85}\u{202e}\u{7f} \nb: 1\n";
        let report = Report::new(Arc::new(source(text)), vec![Finding::error(FindingLocation::Bytes(3..7), "wrong")]);
        let said = report.to_string();
        assert!(said.contains("31m") && !said.chars().any(|c| c.is_control() && c != '\n'), "{said:?}");
        assert!(!said.contains('\u{202e}'), "{said:?}");
    }

    #[test]
    fn a_value_of_many_lines_is_underlined_on_its_first() {
        let source = source("a: |\n  one\n  two\n");
        assert_eq!(&source.text[source.range(&value("a")).unwrap()], "one");
    }

    #[test]
    fn the_near_is_told_from_the_far() {
        let known = ["address", "name", "timeouts"];
        assert_eq!(nearest("adress", known), Some("address"));
        assert_eq!(nearest("Timeout", known), Some("timeouts"));
        assert_eq!(nearest("naem", known), Some("name"));
        assert_eq!(nearest("adnim", ["version", "admin"]), Some("admin"));
        assert_eq!(nearest("colour", known), None);
        assert_eq!(nearest("x", []), None);
    }

    #[test]
    fn colours_are_there_when_asked_for_only() {
        let report = Report::new(Arc::new(source("a: 1\n")), vec![Finding::error(value("a"), "wrong")]);
        assert!(report.render(true).contains('\u{1b}'));
        assert!(!report.render(false).contains('\u{1b}'));
    }

    fn secret(whole: &str, piece: &str) -> Secret {
        Secret {
            path: "a".to_owned(),
            written: "${S}".to_owned(),
            whole: whole.to_owned(),
            pieces: vec![piece.to_owned()],
        }
    }

    #[test]
    fn a_secret_gives_way_to_what_was_written() {
        let secret = secret("12\n", "12\n");
        assert_eq!(redact("`12\n` is none", &[&secret], false), "`${S}` is none");
        assert_eq!(redact("invalid \"12\\n\"", &[&secret], false), "invalid `${S}`");
        assert_eq!(redact("expected 1 to 256", &[&secret], false), "expected 1 to 256");
    }

    #[test]
    fn words_that_still_hold_a_part_of_a_secret_go() {
        let secret = secret("user:hunter2", "user:hunter2");
        assert_eq!(redact("no host hunter2", &[&secret], true), "the value of `${S}` does not fit here");
        assert_eq!(redact("user:hunter2 is none", &[&secret], false), "the value of `${S}` does not fit here");
        assert_eq!(redact("`user:hunter2` has no port", &[&secret], true), "`${S}` has no port");
    }
}
