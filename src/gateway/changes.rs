//! Compares two configurations and states the effect of each difference on the traffic.
//!
//! A pure comparison of effective values, defaults included. Things with a name (listeners, routes, upstreams) or
//! an address (endpoints) are matched by it, whatever their position in a list.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::config::Config;
use crate::error::path::{join, key};

/// One difference.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Change {
    /// The path, such as `upstreams.app.timeouts.connect`. List items are identified by name or address.
    pub path: String,
    /// The old value; `None`: it is added. Secrets are removed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from: Option<String>,
    /// The new value; `None`: it is removed. Secrets are removed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub to: Option<String>,
    /// File and line, such as `forebay.yaml:7`: of the new value, or else of the old one. `None`: it is a default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub at: Option<String>,
    /// The effect on the traffic.
    pub effect: Effect,
    /// Number of connections or exchanges that finish with the old value, where they can be counted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub drains: Option<u64>,
}

/// The effect of a difference on the traffic.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Effect {
    /// Applies from the next request.
    NextRequest,
    /// Applies to new connections of the listener; open ones keep the old value.
    NewConnections,
    /// The listener is opened.
    ListenerOpens,
    /// The listener closes; its connections end after the response to their next request.
    ListenerCloses,
    /// The endpoint can be chosen from the next request on.
    EndpointAdded,
    /// The endpoint gets no new requests and finishes its active ones.
    EndpointDrained,
    /// The upstream's health state starts over; connections with unchanged settings are kept.
    UpstreamRebuilt,
    /// No effect: it requires a new process.
    NewProcess,
}

impl Effect {
    /// The effect in words, shown after the difference.
    pub fn words(self) -> &'static str {
        match self {
            Effect::NextRequest => "from the next request on",
            Effect::NewConnections => "for new connections",
            Effect::ListenerOpens => "the listener opens",
            Effect::ListenerCloses => "the listener closes; its connections end with their next answer",
            Effect::EndpointAdded => "from the next request on",
            Effect::EndpointDrained => "the endpoint finishes its active requests",
            Effect::UpstreamRebuilt => "from the next request on; the upstream is rebuilt",
            Effect::NewProcess => "needs a new process",
        }
    }
}

/// Sections that require a new process: admin sockets, threads, disks, and one-time set-up.
const PROCESS: [&str; 3] = ["admin", "observability", "resources"];

/// Keys of an upstream that change only the endpoints or their choice: the rest of its state is kept.
const GENTLE: [&str; 6] = ["endpoints", "dns", "file", "load_balancing", "health_check", "outlier_detection"];

/// Changes at this depth are reported as a whole: their parts mean little alone.
const WHOLE_FROM: usize = 6;

/// Limit on differences in one log line.
const SUMMARY_MAX: usize = 8;

/// Limit on shown characters of a value.
const SHOWN_MAX: usize = 120;

/// The differences, sorted by path.
///
/// Named things are first compared in serialized form, and only different ones are compared in detail: of ten
/// thousand routes, few differ.
pub fn between(before: &Config, after: &Config) -> Vec<Change> {
    let mut found = Vec::new();
    if let Some((from, to)) = reordered(before, after) {
        let (path, at, effect) = ("routes".to_owned(), place(after, "routes"), Effect::NextRequest);
        found.push(Change { path, from: Some(from), to: Some(to), at, effect, drains: None });
    }
    let mut differences = Vec::new();
    let [was, is] = [before, after].map(|config| Part::of(config, String::new(), &config.without_named()));
    differ(&mut Vec::new(), Some(was.whole()), Some(is.whole()), &mut differences);
    for (section, items) in [("listeners", listeners as Items), ("routes", routes), ("upstreams", upstreams)] {
        let (had, has) = (items(before), items(after));
        let names: BTreeSet<&String> = had.keys().chain(has.keys()).collect();
        for name in names {
            let (was, is) = (had.get(name), has.get(name));
            if let (Some(was), Some(is)) = (was, is)
                && was.written == is.written
            {
                continue;
            }
            let part = |config, item: &Item<'_>| Part::of(config, item.path.clone(), item.item).with_named_endpoints();
            let (was, is) = (was.map(|item| part(before, item)), is.map(|item| part(after, item)));
            let mut steps = vec![section.to_owned(), name.clone()];
            differ(&mut steps, was.as_ref().map(Part::whole), is.as_ref().map(Part::whole), &mut differences);
        }
    }
    differences.sort_by(|(one, _), (other, _)| one.cmp(other));
    found.extend(differences.into_iter().map(|(_, change)| change));
    found
}

/// The paths of the changes that require a new process.
pub fn need_process(changes: &[Change]) -> Vec<String> {
    let needing = changes.iter().filter(|change| change.effect == Effect::NewProcess);
    needing.map(|change| change.path.clone()).collect()
}

/// Things of one kind, by name.
type Items = for<'c> fn(&'c Config) -> BTreeMap<String, Item<'c>>;

/// A named thing.
struct Item<'c> {
    path: String,
    item: &'c dyn Shown,
    /// Its effective value, serialized for comparison only.
    written: Vec<u8>,
}

/// A value that can be shown as JSON.
trait Shown {
    fn value(&self) -> Value;
}

impl<T: Serialize> Shown for T {
    fn value(&self) -> Value {
        // The error cannot happen: the value consists of structs and maps with text keys.
        serde_json::to_value(self).unwrap_or_default()
    }
}

fn item<T: Serialize>(path: String, item: &T) -> Item<'_> {
    Item { path, item, written: serde_json::to_vec(item).unwrap_or_default() }
}

fn listeners(config: &Config) -> BTreeMap<String, Item<'_>> {
    let all = config.listeners.iter().enumerate();
    all.map(|(index, listener)| (listener.name.clone(), item(format!("listeners[{index}]"), listener))).collect()
}

fn routes(config: &Config) -> BTreeMap<String, Item<'_>> {
    let all = config.routes.iter().enumerate();
    all.map(|(index, route)| (route.name.clone(), item(format!("routes[{index}]"), route))).collect()
}

fn upstreams(config: &Config) -> BTreeMap<String, Item<'_>> {
    let all = config.upstreams.iter();
    all.map(|(name, upstream)| (name.clone(), item(join("upstreams", &key(name)), upstream))).collect()
}

/// A part of a configuration: its effective value, and its form for display.
struct Part<'c> {
    config: &'c Config,
    /// Its path.
    path: String,
    real: Value,
    /// The value without secrets.
    shown: Value,
    /// The index of each endpoint by its name here; empty if the part has no endpoints.
    endpoints: HashMap<String, usize>,
}

/// A part of a [`Part`].
#[derive(Clone, Copy)]
struct Sides<'v> {
    part: &'v Part<'v>,
    real: &'v Value,
    shown: &'v Value,
}

impl<'c> Part<'c> {
    fn of(config: &'c Config, path: String, item: &dyn Shown) -> Part<'c> {
        let real = item.value();
        let mut shown = real.clone();
        config.conceal(&path, &mut shown);
        Part { config, path, real, shown, endpoints: HashMap::new() }
    }

    /// Turns the list of endpoints, if there is one, into a map by address.
    fn with_named_endpoints(mut self) -> Self {
        let Some(list) = self.real.get("endpoints").and_then(Value::as_array) else { return self };
        let mut names: Vec<String> = Vec::with_capacity(list.len());
        let mut known: HashMap<String, usize> = HashMap::new();
        for item in list {
            let name = item.get("address").and_then(Value::as_str).unwrap_or_default().to_owned();
            // If an address occurs twice, both entries count.
            let times = known.entry(name.clone()).and_modify(|times| *times += 1).or_insert(1);
            names.push(if *times == 1 { name } else { format!("{name} ({times})") });
        }
        self.endpoints = names.iter().cloned().enumerate().map(|(index, name)| (name, index)).collect();
        for side in [&mut self.real, &mut self.shown] {
            let Some(list) = side.get_mut("endpoints") else { continue };
            let items = if let Value::Array(items) = list.take() { items } else { Vec::new() };
            *list = Value::Object(names.iter().cloned().zip(items).collect::<Map<_, _>>());
        }
        self
    }

    fn whole(&self) -> Sides<'_> {
        Sides { part: self, real: &self.real, shown: &self.shown }
    }

    /// The position of the value at the end of these steps; the first steps lead to the part.
    fn place(&self, steps: &[String]) -> Option<String> {
        let inside = if self.path.is_empty() { steps } else { steps.get(2..)? };
        let mut path = self.path.clone();
        for (number, step) in inside.iter().enumerate() {
            path = match number == 1 && inside[0] == "endpoints" {
                true => format!("{path}[{}]", self.endpoints.get(step)?),
                false => join(&path, &key(step)),
            };
        }
        place(self.config, &path)
    }
}

/// The file and line of this path.
fn place(config: &Config, path: &str) -> Option<String> {
    config.place(path).map(|(file, line)| format!("{file}:{line}"))
}

impl<'v> Sides<'v> {
    /// Its entries, if it is a map.
    fn entries(self) -> Option<&'v Map<String, Value>> {
        self.real.as_object()
    }

    fn entry(self, name: &str) -> Option<Sides<'v>> {
        let real = self.real.get(name)?;
        Some(Sides { real, shown: self.shown.get(name).unwrap_or(&Value::Null), ..self })
    }

    /// One line of text, cut to a readable length.
    fn text(self) -> String {
        let text = self.shown.as_str().map_or_else(|| self.shown.to_string(), str::to_owned);
        match text.char_indices().nth(SHOWN_MAX) {
            Some((end, _)) => format!("{}…", &text[..end]),
            None => text,
        }
    }
}

/// The common routes in both orders, if the orders differ: the order decides between routes of equal rank.
fn reordered(before: &Config, after: &Config) -> Option<(String, String)> {
    fn both<'c>(these: &'c Config, others: &Config) -> Vec<&'c str> {
        let others: HashSet<&str> = others.routes.iter().map(|route| &*route.name).collect();
        these.routes.iter().map(|route| &*route.name).filter(|name| others.contains(name)).collect()
    }
    let (before, after) = (both(before, after), both(after, before));
    let moved = before.iter().zip(&after).position(|(one, other)| one != other)?;
    Some((format!("{} comes first", before[moved]), format!("{} comes first", after[moved])))
}

/// A change, and its path as a list of names.
type Difference = (Vec<String>, Change);

fn differ(steps: &mut Vec<String>, before: Option<Sides<'_>>, after: Option<Sides<'_>>, found: &mut Vec<Difference>) {
    if before.map(|before| before.real) == after.map(|after| after.real) {
        return;
    }
    if let (Some(was), Some(is)) = (before, after)
        && let (Some(had), Some(has)) = (was.entries(), is.entries())
        && steps.len() < WHOLE_FROM
    {
        let names: BTreeSet<&String> = had.keys().chain(has.keys()).collect();
        for name in names {
            steps.push(name.clone());
            differ(steps, was.entry(name), is.entry(name), found);
            steps.pop();
        }
        return;
    }
    let at = |side: Option<Sides<'_>>| side.and_then(|side| side.part.place(steps));
    let change = Change {
        path: steps.iter().fold(String::new(), |path, step| join(&path, &key(step))),
        at: at(after).or_else(|| at(before)),
        effect: effect(steps, before.is_some(), after.is_some()),
        from: before.map(Sides::text),
        to: after.map(Sides::text),
        drains: None,
    };
    found.push((steps.clone(), change));
}

fn effect(steps: &[String], was: bool, is: bool) -> Effect {
    let step = |number: usize| steps.get(number).map(String::as_str);
    match (step(0), step(2)) {
        (Some("server"), _) if matches!(step(1), Some("shutdown" | "upgrade" | "health_checks")) => Effect::NextRequest,
        (Some("server"), _) => Effect::NewProcess,
        (Some(section), _) if PROCESS.contains(&section) => Effect::NewProcess,
        (Some("listeners"), None) if !was => Effect::ListenerOpens,
        (Some("listeners"), None) if !is => Effect::ListenerCloses,
        (Some("listeners"), _) => Effect::NewConnections,
        (Some("upstreams"), Some("endpoints")) if steps.len() == 4 && !was => Effect::EndpointAdded,
        (Some("upstreams"), Some("endpoints")) if steps.len() == 4 && !is => Effect::EndpointDrained,
        (Some("upstreams"), Some(part)) if !GENTLE.contains(&part) => Effect::UpstreamRebuilt,
        _ => Effect::NextRequest,
    }
}

/// The differences for people, one per line.
pub fn told(changes: &[Change]) -> String {
    let mut text = String::new();
    for Change { path, from, to, at, effect, drains } in changes {
        let what = match (from, to) {
            (Some(from), Some(to)) => format!("~ {path}: {from} -> {to}"),
            (None, Some(to)) => format!("+ {path}: {to}"),
            (Some(_), None) => format!("- {path}"),
            (None, None) => continue,
        };
        let drains = drains.map(|count| format!(", {count} to end")).unwrap_or_default();
        let at = at.as_ref().map(|at| format!(", {at}")).unwrap_or_default();
        text.push_str(&format!("{what}  ({}{drains}){at}\n", effect.words()));
    }
    text
}

/// A short summary for one log line.
pub fn summary(changes: &[Change]) -> String {
    if changes.is_empty() {
        return "nothing differs".to_owned();
    }
    let mut paths: Vec<&str> = changes.iter().take(SUMMARY_MAX).map(|change| &*change.path).collect();
    let more = format!("{} more", changes.len().saturating_sub(SUMMARY_MAX));
    if changes.len() > SUMMARY_MAX {
        paths.push(&more);
    }
    paths.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::filter::Catalog;

    const BASE: &str = "
listeners: [ { name: web, address: 127.0.0.1:8080 } ]
upstreams:
  app: { endpoints: [ { address: 10.0.0.1:80 }, { address: 10.0.0.2:80 } ] }
routes: [ { name: all, upstream: app } ]
";

    fn config(text: &str) -> Config {
        Config::parse("test.yaml", text, Catalog::builtin().kinds()).unwrap_or_else(|report| panic!("{report}"))
    }

    /// The differences after replacing these words.
    fn after(pairs: &[(&str, &str)]) -> Vec<(String, Effect)> {
        let text = pairs.iter().fold(BASE.to_owned(), |text, (from, to)| {
            assert!(text.contains(from), "{from}");
            text.replace(from, to)
        });
        between(&config(BASE), &config(&text)).into_iter().map(|change| (change.path, change.effect)).collect()
    }

    fn only(path: &str, effect: Effect) -> Vec<(String, Effect)> {
        vec![(path.to_owned(), effect)]
    }

    #[test]
    fn nothing_differs_where_only_the_text_does() {
        assert_eq!(after(&[("\nroutes:", "\n# a word\nserver: {}\nroutes:")]), []);
    }

    #[test]
    fn each_difference_has_its_place_and_its_effect() {
        assert_eq!(
            after(&[("{ address: 10.0.0.1:80 }, ", "")]),
            only("upstreams.app.endpoints.\"10.0.0.1:80\"", Effect::EndpointDrained)
        );
        assert_eq!(
            after(&[("{ address: 10.0.0.1:80 }", "{ address: 10.0.0.3:80 }, { address: 10.0.0.1:80 }")]),
            only("upstreams.app.endpoints.\"10.0.0.3:80\"", Effect::EndpointAdded)
        );
        assert_eq!(
            after(&[("app: {", "app: { timeouts: { connect: 1s },")]),
            only("upstreams.app.timeouts.connect", Effect::UpstreamRebuilt)
        );
        assert_eq!(
            after(&[("address: 127.0.0.1:8080", "address: 127.0.0.1:8080, limits: { headers: 7 }")]),
            only("listeners.web.limits.headers", Effect::NewConnections)
        );
        assert_eq!(
            after(&[("[ { name: web,", "[ { name: more, address: 127.0.0.1:1 }, { name: web,")]),
            only("listeners.more", Effect::ListenerOpens)
        );
        assert_eq!(
            after(&[("\nroutes:", "\nserver: { threads: 3 }\nroutes:")]),
            only("server.threads", Effect::NewProcess)
        );
        assert_eq!(
            after(&[("\nroutes:", "\nserver: { health_checks: 3 }\nroutes:")]),
            only("server.health_checks", Effect::NextRequest)
        );
        assert_eq!(
            after(&[("\nroutes:", "\nresources: { memory: 256MiB }\nroutes:")]),
            only("resources.memory", Effect::NewProcess)
        );
        assert_eq!(after(&[("\nroutes:", "\nvia: true\nroutes:")]), only("via", Effect::NextRequest));
    }

    #[test]
    fn each_difference_tells_where_it_is_written() {
        let with = |text: &str| config(&BASE.replace("routes:", text));
        let at = |before: &Config, after: &Config| -> Vec<(String, Option<String>)> {
            between(before, after).into_iter().map(|change| (change.path, change.at)).collect()
        };
        let (without, via) = (config(BASE), with("via: true\nroutes:"));
        let expected = vec![("via".to_owned(), Some("test.yaml:5".to_owned()))];
        assert_eq!(at(&without, &via), expected);
        assert_eq!(at(&via, &without), expected, "as it was, if it is no longer written");
        let endpoint = config(&BASE.replace("{ address: 10.0.0.2:80 }", "{ address: 10.0.0.2:80, weight: 2 }"));
        let path = "upstreams.app.endpoints.\"10.0.0.2:80\".weight".to_owned();
        assert_eq!(at(&without, &endpoint), [(path, Some("test.yaml:4".to_owned()))]);
    }

    #[test]
    fn a_secret_is_never_shown() {
        let sticky = |secret: &str| {
            format!("app: {{ load_balancing: {{ sticky: {{ cookie: {{ name: at, secret: {secret} }} }} }},")
        };
        let with = |secret| config(&BASE.replace("app: {", &sticky(secret)));
        let changes = between(&with("0123456789abcdef"), &with("fedcba9876543210"));
        let text = told(&changes);
        assert!(text.contains("secret") && !text.contains("0123456789") && !text.contains("fedcba"), "{text}");
    }
}
