//! Checks meaning after decoding: duplicate names, unknown names, limits out of range, routes that no request can
//! reach.
//!
//! It checks every part that could be decoded, and skips parts that already have an error.

mod acme;
mod listeners;
mod process;
mod routes;
mod upstreams;

use std::collections::HashMap;
use std::hash::Hash;

use serde_yaml::Value as Yaml;

use super::address::{Address, Target};
use super::decode::Parts;
use super::filter::FilterKind;
use super::report::{Finding, FindingLocation};
use super::route::Route;
use super::units::{Count, Size, Time};
use crate::error::path::{self, join};

/// The label under which `/metrics` counts everything beyond a series limit.
const RESERVED_NAME: &str = "_other";
/// Each check uses a socket.
const CHECKS_AT_ONCE_MAX: u64 = 10_000;

/// All errors of `parts` that decoding cannot find; `written` is the file they come from.
pub(super) fn check(parts: &Parts, written: &Yaml, kinds: &[FilterKind]) -> Vec<Finding> {
    let mut check = Check { parts, written, kinds, findings: Vec::new(), compared: 0 };
    check.globals();
    check.listeners();
    check.upstreams();
    check.routes();
    check.unreachable_routes();
    check.findings
}

struct Check<'a> {
    parts: &'a Parts,
    written: &'a Yaml,
    kinds: &'a [FilterKind],
    findings: Vec<Finding>,
    /// Number of unknown names that were compared with the known ones.
    compared: usize,
}

fn value(path: impl Into<String>) -> FindingLocation {
    FindingLocation::Value(path.into())
}

impl Check<'_> {
    /// Adds a finding unless its place already has an error.
    fn wrong(&mut self, finding: Finding) {
        if !finding.path().is_some_and(|path| self.parts.broken.at(path)) {
            self.findings.push(finding);
        }
    }

    fn item(&self, list: &str, index: usize) -> String {
        self.parts.broken.item(list, index)
    }

    /// Whether the file has a value at `path`; otherwise a default applies.
    fn is_written(&self, path: &str) -> bool {
        let mut steps = path::follow(self.written, path);
        steps.by_ref().for_each(drop);
        steps.is_whole() && !steps.at().is_null()
    }

    fn name(&mut self, name: &str, location: FindingLocation) {
        let fine = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.');
        if name == RESERVED_NAME {
            let finding = Finding::error(location, format!("the name `{name}` is reserved"));
            self.wrong(finding.label("metrics use it for what is beyond a limit"));
        } else if name.is_empty() || !name.chars().all(fine) {
            let title =
                if name.is_empty() { "the name is empty".to_owned() } else { format!("`{name}` is not a name") };
            let finding = Finding::error(location, title);
            self.wrong(finding.label("expected letters, digits, `-`, `_` and `.` only: it becomes a metric's label"));
        }
    }

    fn twice(&mut self, again: String, first: String, title: String) {
        self.wrong(Finding::error(value(again), title).label("again here").also(value(first), "first here"));
    }

    /// The message does not repeat the number because it may come from a secret; the report shows the line.
    fn count(&mut self, path: &str, Count(count): Count, least: u64, most: u64) {
        if (least..=most).contains(&count) {
            return;
        }
        let range = if most == u64::MAX { format!("of at least {least}") } else { format!("from {least} to {most}") };
        self.wrong(
            Finding::error(value(path), format!("`{path}` is out of range")).label(format!("expected a count {range}")),
        );
    }

    fn time(&mut self, path: &str, Time(time): Time) {
        if time.is_zero() {
            let finding = Finding::error(value(path), format!("`{path}` leaves no time at all"));
            self.wrong(finding.label("expected more than `0s`"));
        }
    }
}

/// Values seen so far, and the path of each.
struct FirstPaths<T>(HashMap<T, String>);

impl<T> Default for FirstPaths<T> {
    fn default() -> Self {
        FirstPaths(HashMap::new())
    }
}

impl<T: Hash + Eq + Clone> FirstPaths<T> {
    /// The path where `thing` was first seen; `None` if it is new.
    fn first(&mut self, thing: &T, path: String) -> Option<String> {
        let first = self.0.get(thing).cloned();
        self.0.entry(thing.clone()).or_insert(path);
        first
    }
}

impl FirstPaths<String> {
    /// The same for addresses. Port 0 is a different port each time.
    fn first_address(&mut self, address: &Address, path: String) -> Option<String> {
        match address.target() {
            Ok(Target::Tcp(_, 0)) => None,
            _ => self.first(&address.0.to_ascii_lowercase(), path),
        }
    }
}

/// The upstreams that a filter calls: every `upstream` key in its settings, at any depth.
fn called(written: &serde_yaml::Value) -> Vec<&str> {
    match written {
        serde_yaml::Value::Mapping(map) => map
            .iter()
            .flat_map(|(key, value)| match (key.as_str(), value.as_str()) {
                (Some("upstream"), Some(name)) => vec![name],
                _ => called(value),
            })
            .collect(),
        serde_yaml::Value::Sequence(items) => items.iter().flat_map(called).collect(),
        _ => Vec::new(),
    }
}

/// The upstreams that a route uses.
fn asked(route: &Route) -> impl Iterator<Item = &str> {
    let copies = route.mirror.as_ref().map(|mirror| mirror.upstream.as_str());
    let sides = route.upstreams.iter().map(|side| side.name.as_str());
    route.upstream.as_deref().into_iter().chain(sides).chain(copies)
}

/// Finds sizes such as `64k`, alone or as a rate, which mean 64,000 bytes and are probably a mistake.
///
/// Only the schema knows which scalars are sizes.
pub(super) fn decimal_sizes(schema: &serde_json::Value, written: &Yaml) -> Vec<Finding> {
    let mut findings = Vec::new();
    sizes(schema, schema, written, String::new(), &mut |path, text, per| {
        let Some((number, binary)) = decimal(text) else { return };
        let (Ok(decimal), Ok(size)) = (text.parse::<Size>(), binary.parse::<Size>()) else { return };
        let title = format!("`{text}{per}` is {} bytes", decimal.0);
        let help = format!("write `{binary}{per}` for {} bytes, or `{number}B{per}` if this is what is meant", size.0);
        findings.push(Finding::warning(value(path), title).label("a decimal unit").help(help));
    });
    findings
}

/// Splits a size with a bare decimal unit into number and unit, and gives the same number with the binary unit.
fn decimal(text: &str) -> Option<(String, String)> {
    let digits = text.strip_suffix(['k', 'K', 'm', 'M', 'g', 'G', 't', 'T'])?.trim_end();
    let unit = text.chars().last()?.to_ascii_uppercase();
    digits.parse::<f64>().is_ok().then(|| (format!("{digits}{unit}"), format!("{digits}{unit}iB")))
}

/// Calls `found` for each scalar that is a size or a byte rate by `schema`, with the size and the unit of time.
fn sizes(
    root: &serde_json::Value,
    schema: &serde_json::Value,
    yaml: &Yaml,
    path: String,
    found: &mut impl FnMut(String, &str, &str),
) {
    if let Some(name) = schema["$ref"].as_str().and_then(|name| name.strip_prefix("#/$defs/")) {
        match yaml {
            Yaml::String(text) if name == "Size" => found(path.clone(), text, ""),
            Yaml::String(text) if name == "ByteRate" => {
                text.strip_suffix("/s").into_iter().for_each(|size| found(path.clone(), size.trim_end(), "/s"));
            }
            _ => sizes(root, &root["$defs"][name], yaml, path.clone(), found),
        }
    }
    for alternatives in ["anyOf", "oneOf", "allOf"] {
        for alternative in schema[alternatives].as_array().into_iter().flatten() {
            sizes(root, alternative, yaml, path.clone(), found);
        }
    }
    match yaml {
        Yaml::Mapping(map) => {
            for (key, inner) in map.iter().filter_map(|(key, inner)| Some((key.as_str()?, inner))) {
                let property = schema["properties"].get(key).unwrap_or(&schema["additionalProperties"]);
                sizes(root, property, inner, join(&path, &path::key(key)), found);
            }
        }
        Yaml::Sequence(items) => {
            for (index, item) in items.iter().enumerate() {
                sizes(root, &schema["items"], item, format!("{path}[{index}]"), found);
            }
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_bare_decimal_unit_is_doubtful() {
        assert_eq!(decimal("64k"), Some(("64K".to_owned(), "64KiB".to_owned())));
        assert_eq!(decimal("8 M"), Some(("8M".to_owned(), "8MiB".to_owned())));
        for text in ["64KiB", "64kB", "64", "${SIZE}", "k"] {
            assert_eq!(decimal(text), None, "{text}");
        }
    }
}
