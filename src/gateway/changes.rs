//! What differs between two configurations, and what each difference does to the traffic when it is applied.
//!
//! A pure comparison of what is in effect: defaults count as if they were written. Things that have a name (listeners,
//! routes, upstreams) or an address (endpoints) are compared with the ones of that name, wherever they stand in a list.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::config::Config;
use crate::error::path::{join, key};

/// One difference.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Change {
    /// Where, such as `upstreams.app.timeouts.connect`. Items of a list are called by their name or address.
    pub path: String,
    /// What it was; `None`: it is added. Secrets are left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from: Option<String>,
    /// What it is now; `None`: it is removed. Secrets are left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub to: Option<String>,
    /// The file and line in which it is written, such as `forebay.yaml:7`: as it is now, or else as it was. `None`: it is
    /// a default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub at: Option<String>,
    /// What becomes of the traffic.
    pub effect: Effect,
    /// How many connections or exchanges end on what was before, where that can be counted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub drains: Option<u64>,
}

/// What becomes of the traffic when a difference is applied.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Effect {
    /// The next request goes by it.
    NextRequest,
    /// New connections of the listener go by it; those that are open keep what they began with.
    NewConnections,
    /// The listener is opened.
    ListenerOpens,
    /// The listener is closed; its connections end with the answer to their next request.
    ListenerCloses,
    /// The endpoint may be chosen from the next request on.
    EndpointAdded,
    /// The endpoint gets no further requests, and ends those that it has.
    EndpointDrained,
    /// The upstream begins anew with what it knows of its endpoints' health; connections that would be made in the same
    /// way are kept.
    UpstreamRebuilt,
    /// Nothing: only a new process can change it.
    NewProcess,
}

impl Effect {
    /// It in words, behind the difference.
    pub fn words(self) -> &'static str {
        match self {
            Effect::NextRequest => "from the next request on",
            Effect::NewConnections => "for new connections",
            Effect::ListenerOpens => "the listener opens",
            Effect::ListenerCloses => "the listener closes; its connections end with their next answer",
            Effect::EndpointAdded => "from the next request on",
            Effect::EndpointDrained => "the endpoint ends what it has",
            Effect::UpstreamRebuilt => "from the next request on; the upstream is made anew",
            Effect::NewProcess => "needs a new process",
        }
    }
}

/// What only a new process can change: sockets of its own, threads, disks, and what is set up once.
const PROCESS: [&str; 3] = ["admin", "observability", "resources"];

/// The keys of an upstream that say where its endpoints are, or who of them is chosen: the rest stays as it is.
const GENTLE: [&str; 6] = ["endpoints", "dns", "file", "load_balancing", "health_check", "outlier_detection"];

/// Below this depth a change is reported as a whole: its parts mean little alone.
const WHOLE_FROM: usize = 6;

/// Differences that one line of the log names.
const SUMMARY_MAX: usize = 8;

/// Characters of a value that are shown.
const SHOWN_MAX: usize = 120;

/// What differs, in the order of the paths.
pub fn between(before: &Config, after: &Config) -> Vec<Change> {
    let (before, after) = (Named::of(before), Named::of(after));
    let mut found = Vec::new();
    if let Some((from, to)) = reordered(&before.routes, &after.routes) {
        let (path, at, effect) = ("routes".to_owned(), after.place(&["routes".to_owned()]), Effect::NextRequest);
        found.push(Change { path, from: Some(from), to: Some(to), at, effect, drains: None });
    }
    let place = |steps: &[String]| after.place(steps).or_else(|| before.place(steps));
    differ(&mut Vec::new(), Some(before.sides()), Some(after.sides()), &place, &mut found);
    found
}

/// The paths among these that only a new process can change.
pub fn need_process(changes: &[Change]) -> Vec<String> {
    let needing = changes.iter().filter(|change| change.effect == Effect::NewProcess);
    needing.map(|change| change.path.clone()).collect()
}

/// A configuration with its lists of named things as maps.
struct Named<'c> {
    config: &'c Config,
    /// As it is in effect.
    real: Value,
    /// The same without secrets.
    shown: Value,
    /// The names of the routes, in their order.
    routes: Vec<String>,
    /// By the paths of lists, where in them each name is.
    indices: HashMap<String, HashMap<String, usize>>,
}

/// A part of a configuration: as it is in effect, and as it may be shown.
#[derive(Clone, Copy)]
struct Sides<'v> {
    real: &'v Value,
    shown: &'v Value,
}

impl<'c> Named<'c> {
    fn of(config: &'c Config) -> Named<'c> {
        let mut named = Named {
            config,
            // Not reached, the error: a configuration is made of structs and maps whose keys are text.
            real: serde_json::to_value(config).unwrap_or_default(),
            shown: config.shown(),
            routes: Vec::new(),
            indices: HashMap::new(),
        };
        named.call("/listeners", "listeners", "name");
        named.routes = named.call("/routes", "routes", "name");
        let upstreams = named.real.get("upstreams").and_then(Value::as_object);
        let upstreams: Vec<String> = upstreams.into_iter().flatten().map(|(name, _)| name.clone()).collect();
        for name in upstreams {
            let path = format!("{}.endpoints", join("upstreams", &key(&name)));
            let name = name.replace('~', "~0").replace('/', "~1");
            named.call(&format!("/upstreams/{name}/endpoints"), &path, "address");
        }
        named
    }

    fn sides(&self) -> Sides<'_> {
        Sides { real: &self.real, shown: &self.shown }
    }

    /// Where the value to which these steps lead is written.
    fn place(&self, steps: &[String]) -> Option<String> {
        let (mut named, mut path) = (String::new(), String::new());
        for step in steps {
            path = match self.indices.get(&named) {
                Some(indices) => format!("{path}[{}]", indices.get(step)?),
                None => join(&path, &key(step)),
            };
            named = join(&named, &key(step));
        }
        self.config.place(&path).map(|(file, line)| format!("{file}:{line}"))
    }

    /// Makes the list at this place, which is a JSON pointer for `path`, a map by this entry of its items; returns their
    /// names in the order of the list.
    fn call(&mut self, place: &str, path: &str, entry: &str) -> Vec<String> {
        let Some(list) = self.real.pointer(place).and_then(Value::as_array) else { return Vec::new() };
        let mut names: Vec<String> = Vec::with_capacity(list.len());
        let mut known: BTreeMap<String, usize> = BTreeMap::new();
        for item in list {
            let name = item.get(entry).and_then(Value::as_str).unwrap_or_default().to_owned();
            // Of an address that is there twice, both count.
            let times = known.entry(name.clone()).and_modify(|times| *times += 1).or_insert(1);
            names.push(if *times == 1 { name } else { format!("{name} ({times})") });
        }
        let indices = names.iter().cloned().enumerate().map(|(index, name)| (name, index)).collect();
        self.indices.insert(path.to_owned(), indices);
        for side in [&mut self.real, &mut self.shown] {
            let Some(list) = side.pointer_mut(place) else { continue };
            let items = if let Value::Array(items) = list.take() { items } else { Vec::new() };
            *list = Value::Object(names.iter().cloned().zip(items).collect::<Map<_, _>>());
        }
        names
    }
}

impl<'v> Sides<'v> {
    /// Its entries, if it is a map.
    fn entries(self) -> Option<&'v Map<String, Value>> {
        self.real.as_object()
    }

    fn entry(self, name: &str) -> Option<Sides<'v>> {
        let real = self.real.get(name)?;
        Some(Sides { real, shown: self.shown.get(name).unwrap_or(&Value::Null) })
    }

    /// It in one line, cut where it is too long to be read.
    fn text(self) -> String {
        let text = self.shown.as_str().map_or_else(|| self.shown.to_string(), str::to_owned);
        match text.char_indices().nth(SHOWN_MAX) {
            Some((end, _)) => format!("{}…", &text[..end]),
            None => text,
        }
    }
}

/// The routes that both have, if they stand in another order: that decides between two that take the same request.
fn reordered(before: &[String], after: &[String]) -> Option<(String, String)> {
    let both = |these: &[String], others: &[String]| -> Vec<String> {
        let others: BTreeSet<&String> = others.iter().collect();
        these.iter().filter(|name| others.contains(name)).cloned().collect()
    };
    let (before, after) = (both(before, after), both(after, before));
    let moved = before.iter().zip(&after).position(|(one, other)| one != other)?;
    Some((format!("{} comes first", before[moved]), format!("{} comes first", after[moved])))
}

fn differ(
    steps: &mut Vec<String>,
    before: Option<Sides<'_>>,
    after: Option<Sides<'_>>,
    place: &dyn Fn(&[String]) -> Option<String>,
    found: &mut Vec<Change>,
) {
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
            differ(steps, was.entry(name), is.entry(name), place, found);
            steps.pop();
        }
        return;
    }
    found.push(Change {
        path: steps.iter().fold(String::new(), |path, step| join(&path, &key(step))),
        at: place(steps),
        effect: effect(steps, before.is_some(), after.is_some()),
        from: before.map(Sides::text),
        to: after.map(Sides::text),
        drains: None,
    });
}

fn effect(steps: &[String], was: bool, is: bool) -> Effect {
    let step = |number: usize| steps.get(number).map(String::as_str);
    match (step(0), step(2)) {
        (Some("server"), _) if step(1) == Some("shutdown") => Effect::NextRequest,
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

/// The differences as they are read by people, one a line.
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

/// What differs in a few words, for one line in the log.
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

    /// What differs once these words are replaced.
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
