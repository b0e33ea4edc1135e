//! Decodes what was written to typed values without stopping at the first error.
//!
//! The steps are: `${…}`, then each listener, upstream, route and filter to its type. A value that does not fit is
//! reported, removed, and the rest is decoded again, so that one run finds all errors. Removed values are remembered
//! to suppress follow-up errors.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use serde_yaml::{Mapping, Value};

use super::explain::{Complaint, expected};
use super::filter::{DecodeError, Decoded, FilterEntry, FilterKind, decode};
use super::interpolate::{Variables, interpolate};
use super::report::{Finding, FindingLocation, Secret};
use super::{Config, Listener, Route, Upstream};
use crate::error::path::{self, PathStep, Tree, join};

/// Limit on reported errors per listener, upstream or route. Decoding restarts after each error, so without a limit
/// ten thousand bad endpoints would take quadratic time.
const ERRORS_MAX: usize = 100;

/// The decoded parts of a file. A part with an error is `None`, so that the indexes of the others stay correct.
pub(super) struct Parts {
    /// All keys except the three below.
    pub rest: Option<Config>,
    pub listeners: Option<Vec<Option<Listener>>>,
    pub upstreams: BTreeMap<String, Option<Upstream>>,
    pub routes: Option<Vec<Option<Route>>>,
    pub broken: Broken,
}

/// The paths that already have an error.
#[derive(Default)]
pub(super) struct Broken {
    paths: BTreeSet<String>,
    /// Indexes of removed list items, by path as written: the items behind them have moved.
    gone: HashMap<String, BTreeSet<usize>>,
}

impl Broken {
    /// Whether the value at `path` has an error.
    pub fn at(&self, path: &str) -> bool {
        self.paths.contains(path)
    }

    /// Whether the value at `path`, or anything inside it, has an error.
    pub fn within(&self, path: &str) -> bool {
        let mut begin = self.paths.range(path.to_owned()..).take_while(|broken| broken.starts_with(path));
        begin.any(|broken| path::is_within(broken, path))
    }

    /// The written path of the item that is now at `index` of `list`.
    pub fn item(&self, list: &str, index: usize) -> String {
        format!("{list}[{}]", self.written_index(list, index))
    }

    fn written_index(&self, list: &str, index: usize) -> usize {
        let gone = self.gone.get(list).into_iter().flatten();
        gone.fold(index, |index, &gone| index + usize::from(gone <= index))
    }

    /// The written path of what `steps` lead to from `at`.
    fn path(&self, at: &str, steps: &[PathStep<'_>]) -> String {
        steps.iter().fold(at.to_owned(), |path, step| match step {
            PathStep::Key(name) => join(&path, &path::key(name)),
            PathStep::Index(index) => self.item(&path, *index),
        })
    }
}

impl Parts {
    /// The configuration; `None` if a part has an error.
    pub fn config(self) -> Option<Config> {
        Some(Config {
            listeners: self.listeners?.into_iter().collect::<Option<_>>()?,
            upstreams: self
                .upstreams
                .into_iter()
                .map(|(name, upstream)| Some((name, upstream?)))
                .collect::<Option<_>>()?,
            // `check` reports missing routes where they are required.
            routes: self.routes.unwrap_or_default().into_iter().collect::<Option<_>>()?,
            ..self.rest?
        })
    }
}

/// Decodes one configuration.
#[derive(Default)]
pub(super) struct Decoding<'k> {
    kinds: &'k [FilterKind],
    /// The errors so far.
    pub findings: Vec<Finding>,
    /// The values that reports must not show.
    pub secrets: Vec<Secret>,
    broken: Broken,
    /// The original text of scalars that interpolation turned into numbers or booleans.
    texts: HashMap<String, String>,
}

impl<'k> Decoding<'k> {
    /// With these kinds of filters.
    pub fn new(kinds: &'k [FilterKind]) -> Self {
        Decoding { kinds, ..Decoding::default() }
    }

    /// Decodes every part.
    pub fn parts(&mut self, written: &Value, variables: Variables<'_>) -> Parts {
        let mut root = written.as_mapping().cloned().unwrap_or_default();
        self.interpolate_map(&mut root, "", variables);

        let listeners = self.take_list(&mut root, "listeners");
        let routes = self.take_list(&mut root, "routes");
        let upstreams = self.take_map(&mut root, "upstreams");
        let listeners = listeners.map(|listeners| {
            let decoded = listeners.into_iter().enumerate();
            decoded.map(|(index, listener)| self.all(listener, &format!("listeners[{index}]"), decode)).collect()
        });
        let upstreams = upstreams
            .into_iter()
            .map(|(name, upstream)| {
                let upstream = self.all(upstream, &join("upstreams", &path::key(&name)), decode);
                (name, upstream)
            })
            .collect();
        let written_routes = written.get("routes").and_then(Value::as_sequence);
        let routes = routes.map(|routes| {
            let decoded = routes.into_iter().enumerate();
            decoded
                .map(|(index, route)| self.route(route, index, written_routes.and_then(|routes| routes.get(index))))
                .collect()
        });
        let rest = self.all(Value::Mapping(root), "", decode);
        Parts { rest, listeners, upstreams, routes, broken: std::mem::take(&mut self.broken) }
    }

    /// Interpolates every scalar below `value`. Rejects YAML tags, which would choose types from outside.
    fn interpolate(&mut self, value: &mut Value, path: String, variables: Variables<'_>) {
        match value {
            Value::Mapping(map) => self.interpolate_map(map, &path, variables),
            Value::Sequence(items) => {
                for (index, item) in items.iter_mut().enumerate() {
                    self.interpolate(item, format!("{path}[{index}]"), variables);
                }
            }
            Value::Tagged(tagged) => {
                let tag = tagged.tag.to_string();
                let title = format!("the YAML tag `{tag}` means nothing here");
                let label = format!("write a key and its value instead: `{}: …`", tag.trim_start_matches('!'));
                self.broken(path.clone(), Finding::error(FindingLocation::Value(path), title).label(label));
                *value = Value::Null;
            }
            Value::String(text) => match interpolate(text, variables) {
                Ok(None) => {}
                Err(problem) => {
                    let finding =
                        Finding::error(FindingLocation::Value(path.clone()), problem.title).label(problem.label);
                    self.broken(path, finding);
                }
                Ok(Some(done)) => {
                    let read = Some(&done.text).filter(|_| done.whole).and_then(|text| scalar(text));
                    if read.is_some() {
                        self.texts.insert(path.clone(), done.text.clone());
                    }
                    let (written, whole) = (std::mem::take(text), done.text.clone());
                    *value = read.unwrap_or(Value::String(done.text));
                    self.secrets.push(Secret { path, written, whole, pieces: done.pieces });
                }
            },
            Value::Null | Value::Bool(_) | Value::Number(_) => {}
        }
    }

    fn interpolate_map(&mut self, map: &mut Mapping, path: &str, variables: Variables<'_>) {
        for (key, inner) in map {
            self.interpolate(inner, join(path, &path::key(key.as_str().unwrap_or("?"))), variables);
        }
    }

    fn broken(&mut self, path: String, finding: Finding) {
        self.broken.paths.insert(path);
        self.findings.push(finding);
    }

    /// Moves a list out of a map and leaves an empty one. `None` if the key is missing.
    fn take_list(&mut self, map: &mut Mapping, key: &str) -> Option<Vec<Value>> {
        match map.insert(key.into(), Value::Sequence(Vec::new()))? {
            Value::Sequence(items) => Some(items),
            other => {
                self.mismatch(key.to_owned(), &other, "a sequence");
                Some(Vec::new())
            }
        }
    }

    /// Moves a map out of a map and leaves an empty one.
    fn take_map(&mut self, map: &mut Mapping, key: &str) -> BTreeMap<String, Value> {
        let entries = match map.insert(key.into(), Value::Mapping(Mapping::new())) {
            Some(Value::Mapping(entries)) => entries,
            Some(other) => {
                self.mismatch(key.to_owned(), &other, "a map");
                Mapping::new()
            }
            None => Mapping::new(),
        };
        let mut named = BTreeMap::new();
        for (name, value) in entries {
            // `syntax` has already rejected other keys.
            if let Value::String(name) = name {
                named.insert(name, value);
            }
        }
        named
    }

    /// Reports a value of the wrong kind; `check` then skips this part.
    fn mismatch(&mut self, path: String, value: &Value, expected: &str) {
        let found = match value {
            Value::Null => return,
            Value::Bool(value) => format!("boolean `{value}`"),
            Value::Number(number) => format!("integer `{number}`"),
            Value::String(text) => format!("string {text:?}"),
            Value::Sequence(_) => "sequence".to_owned(),
            Value::Mapping(_) | Value::Tagged(_) => "map".to_owned(),
        };
        if !self.broken.at(&path) {
            let finding = Complaint::Mismatch { found: &found, expected }.finding(&path, None);
            self.broken(path, finding);
        }
    }

    fn route(&mut self, mut route: Value, index: usize, written: Option<&Value>) -> Option<Route> {
        let path = format!("routes[{index}]");
        let filters = route.as_mapping_mut().and_then(|route| route.remove("filters")).unwrap_or(Value::Null);
        let written = written.and_then(|route| route.get("filters")).and_then(Value::as_sequence);
        let mut entries = Some(Vec::new());
        if let Value::Sequence(filters) = filters {
            for (at, filter) in filters.into_iter().enumerate() {
                let written = written.and_then(|filters| filters.get(at)).cloned().unwrap_or_default();
                let decoded = self.filter(filter, &format!("{path}.filters[{at}]"));
                entries = entries.zip(decoded).map(|(mut entries, decoded)| {
                    entries.push(FilterEntry { written, decoded: Some(decoded) });
                    entries
                });
            }
        } else {
            self.mismatch(format!("{path}.filters"), &filters, "a sequence");
        }
        let route: Route = self.all(route, &path, decode)?;
        // A filter with an error was reported; the route is still checked without it.
        Some(Route { filters: entries.unwrap_or_default(), ..route })
    }

    fn filter(&mut self, mut entry: Value, path: &str) -> Option<Decoded> {
        let when = match entry.as_mapping_mut().and_then(|entry| entry.remove(FilterEntry::WHEN)) {
            None => None,
            Some(Value::String(when)) => Some(when),
            Some(other) => {
                let at = join(path, FilterEntry::WHEN);
                if let Some(text) = self.texts.remove(&at) {
                    return self.filter_under(entry, Some(text), path);
                }
                self.mismatch(at.clone(), &other, "a string");
                if other.is_null() && !self.broken.at(&at) {
                    let finding = Finding::error(FindingLocation::Key(at.clone()), "a condition is missing");
                    self.broken(at, finding.label("expected an expression such as `request.method == \"GET\"`"));
                }
                None
            }
        };
        self.filter_under(entry, when, path)
    }

    /// Decodes the filter of an entry whose `when` was taken out.
    fn filter_under(&mut self, entry: Value, when: Option<String>, path: &str) -> Option<Decoded> {
        let known: Vec<&str> = self.kinds.iter().map(|kind| kind.key).collect();
        let unknown = |location: FindingLocation, key: &str| {
            Finding::error(location, format!("unknown filter `{key}`"))
                .label(expected(&known))
                .nearest(key, known.iter().copied())
        };
        let finding = match &entry {
            Value::Mapping(map) if map.len() == 1 => match map.iter().next() {
                Some((Value::String(key), settings)) => match self.kinds.iter().find(|kind| kind.key == key) {
                    Some(kind) => {
                        let decoded = self.settings(kind, settings.clone(), &join(path, &path::key(key)))?;
                        return Some(Decoded { when, ..decoded });
                    }
                    None => unknown(FindingLocation::Key(join(path, &path::key(key))), key),
                },
                _ => Finding::error(FindingLocation::Value(path.to_owned()), "the name of a filter must be text"),
            },
            Value::String(key) if known.contains(&key.as_str()) => {
                Finding::error(FindingLocation::Value(path.to_owned()), format!("the filter `{key}` has no settings"))
                    .label(format!("write `{key}: {{}}`"))
            }
            Value::String(key) => unknown(FindingLocation::Value(path.to_owned()), key),
            Value::Null if self.broken.at(path) => return None,
            _ => Finding::error(FindingLocation::Value(path.to_owned()), "a filter must be a map of one key")
                .label("expected the name of a filter and its settings")
                .help("begin each filter with a `-` of its own and indent its settings below its name"),
        };
        self.broken(path.to_owned(), finding);
        None
    }

    fn settings(&mut self, kind: &FilterKind, mut settings: Value, path: &str) -> Option<Decoded> {
        if settings.is_null() {
            settings = Value::Mapping(Mapping::new());
        }
        let settings = self.all(settings, path, |settings| (kind.decode)(settings.clone()))?;
        Some(Decoded { key: kind.key, settings, when: None })
    }

    /// Decodes the `value` at `at` and reports every error in it. A bad value is removed and its default applies;
    /// `None` if the remainder is not enough.
    fn all<T>(&mut self, mut value: Value, at: &str, decode: impl Fn(&Value) -> Result<T, DecodeError>) -> Option<T> {
        for _ in 0..ERRORS_MAX {
            let error = match decode(&value) {
                Ok(decoded) => return Some(decoded),
                Err(error) => error,
            };
            let steps: Vec<PathStep<'_>> = path::follow(&value, &error.path).map(|(step, _)| step).collect();
            let path = self.broken.path(at, &steps);
            if let Some(text) = self.texts.remove(&path) {
                *walk(&mut value, &steps)? = Value::String(text);
                continue;
            }
            let message = with_choices(&mut value, &steps, error.message, &decode);
            let found = walk(&mut value, &steps).cloned();
            self.note(&path, &message, found.as_ref());
            remove(&mut value, &steps)?;
            if let Some((PathStep::Index(index), list)) = steps.split_last() {
                let list = self.broken.path(at, list);
                let index = self.broken.written_index(&list, *index);
                self.broken.gone.entry(list).or_default().insert(index);
            }
        }
        let title = format!("`{at}` may have more errors than are shown");
        let finding =
            Finding::error(FindingLocation::Key(at.to_owned()), title).label(format!("{ERRORS_MAX} of them are"));
        self.broken(at.to_owned(), finding);
        None
    }

    /// Reports a decode error unless it follows from an earlier one.
    fn note(&mut self, path: &str, message: &str, value: Option<&Value>) {
        let complaint = Complaint::of(message);
        let known = match &complaint {
            Complaint::MissingKey(key) => self.broken.at(&join(path, &path::key(key))),
            Complaint::UnknownKey { .. } => false,
            _ => self.broken.within(path),
        };
        if !known {
            let finding = complaint.finding(path, value);
            self.findings.push(match complaint {
                Complaint::Other(_) => finding.foreign(),
                _ => finding,
            });
        }
        self.broken.paths.extend(complaint.meant(path));
        self.broken.paths.insert(path.to_owned());
    }
}

/// Parses a scalar that YAML reads as a number or a boolean.
fn scalar(text: &str) -> Option<Value> {
    serde_yaml::from_str(text).ok().filter(|value: &Value| value.is_number() || value.is_bool())
}

/// Serde lists the choices of an enum only when the value is a text: decodes again with a text.
fn with_choices<T>(
    value: &mut Value,
    steps: &[PathStep<'_>],
    message: String,
    decode: impl Fn(&Value) -> Result<T, DecodeError>,
) -> String {
    let Some((found, _)) = message.rsplit_once(", expected enum ") else { return message };
    let Some(node) = walk(value, steps) else { return message };
    let original = std::mem::replace(node, Value::String(String::new()));
    let choices = decode(value).err().map(|error| error.message);
    if let Some(node) = walk(value, steps) {
        *node = original;
    }
    match choices.as_deref().and_then(|choices| choices.strip_prefix("unknown variant ``, expected ")) {
        Some(choices) => format!("{found}, expected {choices}"),
        None => message,
    }
}

impl Tree for Value {
    fn child(&self, step: &PathStep<'_>) -> Option<&Self> {
        match step {
            PathStep::Key(name) => self.get(&**name),
            PathStep::Index(index) => self.get(*index),
        }
    }
}

fn walk<'v>(value: &'v mut Value, steps: &[PathStep<'_>]) -> Option<&'v mut Value> {
    steps.iter().try_fold(value, |value, step| match step {
        PathStep::Key(name) => value.get_mut(&**name),
        PathStep::Index(index) => value.get_mut(*index),
    })
}

/// Removes what `steps` lead to; `None` if nothing would be left.
fn remove(value: &mut Value, steps: &[PathStep<'_>]) -> Option<()> {
    let (last, outer) = steps.split_last()?;
    match (last, walk(value, outer)?) {
        (PathStep::Key(name), Value::Mapping(map)) => _ = map.remove(&**name)?,
        (PathStep::Index(index), Value::Sequence(items)) => _ = items.remove(*index),
        _ => return None,
    }
    Some(())
}
