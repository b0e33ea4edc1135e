//! The manual: generated parts equal the code, and every configuration, command and link in it and in the README
//! works.
//!
//! `UPDATE_MANUAL=1 cargo nextest run --locked -E 'test(manual)'` regenerates the generated pages.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use forebay::error::{Refusal, refusal};
use forebay::filter::Catalog;
use forebay::gateway::Gateway;
use forebay::metrics::family;
use forebay::phase::Phase;
use regex::Regex;
use serde_json::Value;

use crate::harness::browser::Browser;
use crate::harness::client::get;
use crate::harness::{Origin, Setup};

const ROOT: &str = env!("CARGO_MANIFEST_DIR");
const MADE: &str = "Made of the code by a test: change it there.";

/// Compares a page of the manual with its expected content, or writes it on request.
fn keep(name: &str, made: &str) {
    let path = Path::new(ROOT).join("conf/manual").join(name);
    if std::env::var_os("UPDATE_MANUAL").is_some() {
        let beside = path.with_extension("new");
        fs::write(&beside, made).and_then(|()| fs::rename(&beside, &path)).expect("the page");
    }
    let there = fs::read_to_string(&path).unwrap_or_default();
    assert!(
        there == made,
        "conf/manual/{name} is out of step with the code; this brings it back:\nUPDATE_MANUAL=1 cargo nextest run \
         --locked -E \
         'test(manual)'"
    );
}

fn cell(text: &str) -> String {
    text.replace('|', "\\|").split_whitespace().collect::<Vec<_>>().join(" ")
}

// Generated pages.

#[test]
fn the_page_of_reasons_has_every_refusal() {
    let mut all: Vec<&Refusal> = refusal::ALL.to_vec();
    all.extend(Catalog::builtin().refusals().iter().copied());
    let mut seen = BTreeSet::new();
    all.retain(|row| seen.insert(row.reason));
    let mut page = format!(
        "# Reasons\n\n<!-- {MADE} -->\n\nWhere Forebay itself ends an exchange, it says why. The reason is the field \
         `reason` of the access log, the \
         label of `forebay_refusals_total`, and in the body of the answer: a client that accepts JSON gets \
         `{{\"status\":504,\"reason\":\"wait.timeout\",\"message\":\"…\"}}`, any other gets a line of text. The word \
          before the dot is the phase \
         in which it happened. Once a part of an answer has left, the connection is cut in place of the status. 499 \
         is for the log: the client \
         has gone. A filter of your own adds its reasons to these.\n"
    );
    for phase in Phase::ALL.iter().map(|phase| phase.name()).chain(["internal"]) {
        let rows: Vec<_> = all.iter().filter(|row| row.reason.split('.').next() == Some(phase)).collect();
        if rows.is_empty() {
            continue;
        }
        page += &format!("\n## {phase}\n\n| reason | status | message to the client |\n|---|---|---|\n");
        for row in rows {
            page += &format!("| `{}` | {} | {} |\n", row.reason, row.status, cell(row.message));
        }
    }
    assert_eq!(page.matches("\n| `").count(), all.len(), "every reason begins with a phase");
    keep("reasons.md", &page);
}

#[test]
fn the_page_of_metrics_has_every_metric() {
    let mut page = format!(
        "# Metrics\n\n<!-- {MADE} -->\n\n`GET /metrics` of the admin endpoint has them in the text format of \
         Prometheus. \
         [The reference](../../dashboards/metrics.md) says in addition what they are good for and which board shows \
         them; \
         [the boards](../../dashboards/README.md) are for Grafana.\n\n| name | type | labels | what it tells \
          |\n|---|---|---|---|\n"
    );
    for family in family::ALL {
        let labels: Vec<_> = family.labels.iter().map(|label| format!("`{label}`")).collect();
        page += &format!(
            "| `{}` | {} | {} | {} |\n",
            family.name,
            family.kind.name(),
            labels.join(", "),
            cell(family.help)
        );
    }
    keep("metrics.md", &page);
}

#[test]
fn the_page_of_keys_has_every_key() {
    let schema = Gateway::builder().schema();
    let mut page = format!(
        "# Keys\n\n<!-- {MADE} -->\n\nEvery key of a configuration, as `forebay schema` has it. \
         [full.yaml](../full.yaml) shows them in a file. \
         Sizes (`64KiB`), times (`1m30s`), counts (`50k`, `unlimited`), rates (`10/s`, `512B/s`) and shares (`20%`) \
         have units. `${{VAR}}`, \
         `${{VAR:-default}}`, `${{VAR:?why}}` and `${{file:/path}}` stand for what comes from outside, in every \
         value. `[]` stands for each item of \
         a list, `*` for a name of yours.\n"
    );
    let top = schema["properties"].as_object().expect("keys");
    let root = Keys { schema: &schema };
    for (key, property) in top {
        page += &format!("\n## {key}\n\n{}\n", root.text(property));
        let mut rows = Vec::new();
        root.rows(key, property, &[], &mut rows);
        if rows.is_empty() {
            page += &format!("\n{}\n", root.form(property));
            continue;
        }
        page += "\n| key | value | default | |\n|---|---|---|---|\n";
        for row in rows {
            page += &row;
        }
    }
    page += "\n## Filters\n\nOne of these is an item of `routes[].filters`, with `when` beside it or not.\n";
    for filter in schema["$defs"]["Filter"]["oneOf"].as_array().expect("filters") {
        let name = filter["required"][0].as_str().expect("a name");
        let settings = &filter["properties"][name];
        page += &format!("\n### {name}\n\n{}\n\n| key | value | default | |\n|---|---|---|---|\n", root.text(settings));
        let mut rows = Vec::new();
        root.rows(name, settings, &[], &mut rows);
        rows.iter().for_each(|row| page += row);
    }
    for key in [
        "`listeners[].limits.connections`",
        "`routes[].buffering.request.mode`",
        "`upstreams.*.timeouts.wait`",
        "`rate_limit.rate`",
    ] {
        assert!(page.contains(key), "{key} is missing");
    }
    keep("keys.md", &page);
}

/// The type of a schema; of several types, the first that is not null.
fn kind(schema: &Value) -> Option<&str> {
    let several = || schema["type"].as_array()?.iter().filter_map(Value::as_str).find(|one| *one != "null");
    schema["type"].as_str().or_else(several)
}

struct Keys<'s> {
    schema: &'s Value,
}

impl<'s> Keys<'s> {
    /// The targets of a schema's references, and its own alternatives except `${…}` and null.
    fn followed(&self, schema: &'s Value) -> Vec<&'s Value> {
        if let Some(name) = schema["$ref"].as_str() {
            let target = self.schema.pointer(name.trim_start_matches('#')).expect("a definition");
            return if name.ends_with("/Interpolated") { Vec::new() } else { self.followed(target) };
        }
        let alternatives = ["anyOf", "oneOf", "allOf"].into_iter().filter_map(|key| schema[key].as_array()).flatten();
        let mut all: Vec<&Value> =
            alternatives.filter(|one| one["type"] != "null").flat_map(|one| self.followed(one)).collect();
        if all.is_empty() || schema["properties"].is_object() {
            all.push(schema);
        }
        all
    }

    fn text(&self, schema: &'s Value) -> String {
        let own = schema["description"].as_str();
        let target = || {
            let name = schema["$ref"].as_str()?;
            self.schema.pointer(name.trim_start_matches('#'))?["description"].as_str()
        };
        let mut text = own.or_else(target).unwrap_or_default().replace("\n\n", " ").replace('\n', " ");
        // The meaning of each choice.
        for one in self.choices(schema) {
            if let (Some(word), Some(means)) = (one["const"].as_str(), one["description"].as_str())
                && !text.contains(&format!("`{word}`:"))
            {
                text += &format!(" `{word}`: {}", means.replace('\n', " "));
            }
        }
        text
    }

    fn choices(&self, schema: &'s Value) -> Vec<&'s Value> {
        self.followed(schema).into_iter().filter(|one| one["const"].is_string()).collect()
    }

    /// The accepted forms.
    fn form(&self, schema: &'s Value) -> String {
        let mut forms: Vec<String> = Vec::new();
        for one in self.followed(schema) {
            let form = if let Some(word) = one["const"].as_str() {
                format!("`{word}`")
            } else if let Some(words) = one["enum"].as_array() {
                words
                    .iter()
                    .map(|word| format!("`{}`", word.as_str().map_or_else(|| word.to_string(), str::to_owned)))
                    .collect::<Vec<_>>()
                    .join(", ")
            } else if one["items"].is_object() {
                format!("list of {}", self.form(&one["items"]).replace(", ", " or "))
            } else if one["properties"].is_object() || one["additionalProperties"].is_object() {
                "map".to_owned()
            } else if let Some(examples) = one["examples"].as_array() {
                examples
                    .iter()
                    .filter_map(Value::as_str)
                    .take(2)
                    .map(|example| format!("`{example}`"))
                    .collect::<Vec<_>>()
                    .join(", ")
            } else {
                match kind(one) {
                    Some("boolean") => "`true`, `false`".to_owned(),
                    Some("integer" | "number") => "number".to_owned(),
                    Some("object") => "map".to_owned(),
                    _ => "text".to_owned(),
                }
            };
            if !forms.contains(&form) {
                forms.push(form);
            }
        }
        forms.join(", ")
    }

    /// The rows for the keys inside a key.
    fn rows(&self, path: &str, schema: &'s Value, above: &[&'s Value], rows: &mut Vec<String>) {
        for one in self.followed(schema) {
            // A type may contain itself.
            if above.iter().any(|other| std::ptr::eq(*other, one)) {
                continue;
            }
            let above: Vec<&Value> = above.iter().copied().chain([one]).collect();
            if one["items"].is_object() {
                self.rows(&format!("{path}[]"), &one["items"], &above, rows);
            }
            if one["additionalProperties"].is_object() {
                self.rows(&format!("{path}.*"), &one["additionalProperties"], &above, rows);
            }
            for (key, property) in one["properties"].as_object().into_iter().flatten() {
                let path = format!("{path}.{key}");
                let needed = one["required"].as_array().is_some_and(|needed| needed.iter().any(|it| it == key));
                let default = match &property["default"] {
                    Value::Null if needed => "none".to_owned(),
                    Value::Null | Value::Object(_) => String::new(),
                    Value::Array(list) if list.is_empty() => "`[]`".to_owned(),
                    Value::String(text) if text.is_empty() => String::new(),
                    Value::String(text) => format!("`{text}`"),
                    Value::Array(list) if list.iter().any(Value::is_object) => String::new(),
                    other => format!("`{}`", other.to_string().replace('"', "").replace(',', ", ")),
                };
                let row =
                    format!("| `{path}` | {} | {default} | {} |\n", self.form(property), cell(&self.text(property)));
                if !rows.contains(&row) {
                    rows.push(row);
                }
                if !path.ends_with(".filters") {
                    self.rows(&path, property, &above, rows);
                }
            }
        }
    }
}

// Hand-written pages.

/// All pages for readers: path from the root, and text.
fn pages() -> Vec<(String, String)> {
    fn markdown(folder: &Path, found: &mut Vec<PathBuf>) {
        for entry in fs::read_dir(folder).expect("a folder").flatten() {
            let path = entry.path();
            if path.is_dir() {
                markdown(&path, found);
            } else if path.extension().is_some_and(|extension| extension == "md") {
                found.push(path);
            }
        }
    }
    let root = Path::new(ROOT);
    let mut found: Vec<PathBuf> =
        ["README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "SECURITY.md"].map(|name| root.join(name)).into();
    for folder in ["conf", "dashboards", "tests"] {
        markdown(&root.join(folder), &mut found);
    }
    found.sort();
    let named = |path: PathBuf| {
        let text = fs::read_to_string(&path).expect("a page");
        (path.strip_prefix(root).expect("below the root").display().to_string(), text)
    };
    found.into_iter().map(named).collect()
}

/// The pages of the README and the manual.
fn manual() -> impl Iterator<Item = (String, String)> {
    pages().into_iter().filter(|(name, _)| name == "README.md" || name.starts_with("conf/"))
}

/// The blocks in a language, with their line and the text before them.
fn blocks<'p>(page: &'p str, language: &str) -> Vec<(usize, String, &'p str)> {
    let mut found = Vec::new();
    let (mut inside, mut before) = (None::<(usize, String)>, "");
    for (number, line) in page.lines().enumerate() {
        match &mut inside {
            Some((begin, text)) if line.trim() == "```" => {
                found.push((*begin, std::mem::take(text), before));
                inside = None;
                before = line;
            }
            Some((_, text)) => *text += &format!("{line}\n"),
            None if line.trim() == format!("```{language}") => inside = Some((number + 1, String::new())),
            None if line.trim_start().starts_with("```") => {
                // Another language: its end looks like a beginning.
                inside = Some((usize::MAX, String::new()));
            }
            None if line.trim().is_empty() => {}
            None => before = line,
        }
    }
    found.retain(|(begin, _, _)| *begin != usize::MAX);
    found
}

#[test]
fn every_link_leads_somewhere() {
    let link = Regex::new(r"\]\(([^)\s]+)\)").expect("a pattern");
    let code = Regex::new(r"(?s)```.*?```|`[^`\n]*`").expect("a pattern");
    let pages = pages();
    let mut broken = Vec::new();
    for (name, text) in &pages {
        for found in link.captures_iter(&code.replace_all(text, "")) {
            let target = &found[1];
            if target.contains("://") || target.starts_with("mailto:") {
                continue;
            }
            let (path, anchor) = target.split_once('#').unwrap_or((target, ""));
            let file = match path {
                "" => Path::new(ROOT).join(name),
                path => Path::new(ROOT).join(name).parent().expect("a folder").join(path),
            };
            let anchors = || anchors(&fs::read_to_string(&file).unwrap_or_default());
            if !file.exists() || (!anchor.is_empty() && !anchors().contains(anchor)) {
                broken.push(format!("{name}: {target}"));
            }
        }
    }
    assert!(pages.len() > 20 && broken.is_empty(), "{broken:#?}");
}

/// The anchors of the headings of a page, as in GitHub and mdbook.
fn anchors(page: &str) -> BTreeSet<String> {
    let headings = page.lines().filter(|line| line.starts_with('#')).map(|line| line.trim_start_matches('#').trim());
    headings
        .map(|heading| {
            let kept = heading
                .to_lowercase()
                .chars()
                .filter(|c| c.is_alphanumeric() || " -_".contains(*c))
                .collect::<String>();
            kept.replace(' ', "-")
        })
        .collect()
}

#[test]
fn the_summary_has_every_page_of_the_manual_once() {
    let summary = fs::read_to_string(format!("{ROOT}/conf/manual/SUMMARY.md")).expect("the summary");
    let link = Regex::new(r"\]\(([^)]+)\)").expect("a pattern");
    let listed: Vec<String> = link.captures_iter(&summary).map(|found| found[1].to_owned()).collect();
    let distinct: BTreeSet<_> = listed.iter().cloned().collect();
    assert_eq!(distinct.len(), listed.len(), "a page is listed twice");
    let pages = pages();
    let there: BTreeSet<String> = pages
        .iter()
        .filter_map(|(name, _)| name.strip_prefix("conf/manual/").map(str::to_owned))
        .filter(|name| name != "SUMMARY.md" && !name.contains('/'))
        .collect();
    let of_manual: BTreeSet<String> = distinct.into_iter().filter(|name| !name.contains('/')).collect();
    assert_eq!(of_manual, there);
    for (name, text) in pages.iter().filter(|(name, _)| name.starts_with("conf/manual/")) {
        assert!(text.starts_with("# "), "{name} begins with its title");
    }
}

/// The files below a directory whose names end so.
fn below(directory: &Path, end: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(directory).expect("a directory").map(|entry| entry.expect("an entry").path()) {
        if entry.is_dir() {
            found.extend(below(&entry, end));
        } else if entry.to_string_lossy().ends_with(end) {
            found.push(entry);
        }
    }
    found
}

#[test]
fn the_manual_as_html_has_every_page_and_its_links_lead_somewhere() {
    let dir = tempfile::tempdir().expect("a directory");
    let made = Command::new(format!("{ROOT}/conf/packaging/manual.py")).arg(dir.path()).output().expect("the script");
    let said = [made.stdout, made.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).concat();
    assert!(made.status.success() && !said.contains("WARN") && !said.contains("ERROR"), "{said}");
    for page in below(&Path::new(ROOT).join("conf/manual"), ".md") {
        let name = page.file_name().expect("a name").to_string_lossy().replace(".md", ".html");
        assert!(name == "SUMMARY.html" || dir.path().join(&name).exists(), "{name}");
    }
    assert!(dir.path().join("conf/examples/canary.yaml.html").exists());

    let link = Regex::new(r#"(?:href|src)="([^"]+)""#).expect("a pattern");
    let id = Regex::new(r#"\bid="([^"]+)""#).expect("a pattern");
    let mut ids: BTreeMap<PathBuf, BTreeSet<String>> = BTreeMap::new();
    let mut links = BTreeSet::new();
    for page in below(dir.path(), ".html") {
        let text = fs::read_to_string(&page).expect("a page");
        // The page for addresses that do not exist links to the place where the manual is published.
        if !page.ends_with("404.html") {
            links.extend(link.captures_iter(&text).map(|found| (page.clone(), found[1].to_owned())));
        }
        ids.insert(page, id.captures_iter(&text).map(|found| found[1].to_owned()).collect());
    }
    assert!(links.len() > 2000, "{}", links.len());
    let leads = |page: &Path, target: &str| {
        let (path, anchor) = target.split_once('#').unwrap_or((target, ""));
        let file = match path {
            "" => page.to_owned(),
            path => page.parent().expect("a directory").join(path).canonicalize().unwrap_or_default(),
        };
        file.exists() && (anchor.is_empty() || ids.get(&file).is_some_and(|ids| ids.contains(anchor)))
    };
    let elsewhere = |target: &str| target.contains("://") || target.starts_with("mailto:");
    let broken: Vec<_> = links.iter().filter(|(page, target)| !elsewhere(target) && !leads(page, target)).collect();
    assert!(broken.is_empty(), "{broken:#?}");

    let mut browser = Browser::start();
    browser.open(&format!("file://{}", dir.path().join("cookbook.html").display()));
    browser.wait_text("main h1", |title| title == "Cookbook");
    browser.wait_text("#mdbook-sidebar", |pages| pages.contains("First steps") && pages.contains("Canary"));
    browser.eval("document.querySelector('main a[href$=\"canary.yaml.html\"]').click()");
    browser.wait_text("main code.language-yaml", |file| file.contains("one request of ten"));
    browser.wait_text("main code .hljs-attr", |key| key.starts_with("listeners"));
    assert_eq!(browser.complaints(), Vec::<String>::new());
}

/// The configurations that a YAML block may be a part of.
fn wrapped(block: &str) -> Vec<String> {
    const CERTIFICATES: &str = "[ { cert: a.pem, key: a.key } ]";
    let list = Regex::new(r"\[ ?… ?\]").expect("a pattern").replace_all(block, CERTIFICATES).into_owned();
    let map = Regex::new(r"\{ ?… ?\}").expect("a pattern");
    let block = map.replace_all(&list, format!("{{ certificates: {CERTIFICATES} }}")).into_owned();
    // Values of environment variables.
    let outside = Regex::new(r"\$\{(file:[^}]*|[A-Z_]+)\}").expect("a pattern");
    let block = outside.replace_all(&block, "0123456789abcdef").into_owned();
    let (listeners, routes) = (
        "listeners: [ { name: w, address: 127.0.0.1:1 } ]\n",
        "routes: [ { name: r, filters: [ { respond: {} } ] } ]\n",
    );
    let depth =
        block.lines().find(|line| !line.trim().is_empty()).map_or(0, |line| line.len() - line.trim_start().len());
    let flat: String = block.lines().map(|line| format!("{}\n", line.get(depth..).unwrap_or_default())).collect();
    let deeper = |by: usize| flat.lines().map(|line| format!("{}{line}\n", " ".repeat(by))).collect::<String>();
    let secure =
        |tls: &str| format!("{routes}listeners:\n  - name: w\n    address: 127.0.0.1:1\n    tls:\n      {tls}");
    let upstream = |keys: &str| format!("upstreams:\n  u:\n    endpoints: [ {{ address: 127.0.0.1:2 }} ]\n{keys}");
    vec![
        completed(&block),
        format!("{listeners}routes:\n  - name: r\n    upstream: u\n    filters:\n{}{}", deeper(6), upstream("")),
        format!("{listeners}routes:\n  - name: r\n    upstream: u\n{}{}", deeper(4), upstream("")),
        format!("{listeners}routes:\n{}{}", deeper(2), upstream("")),
        format!("{listeners}{routes}{}", upstream(&deeper(4))),
        format!("{listeners}{routes}upstreams:\n{}", deeper(2)),
        format!("{routes}listeners:\n  - name: w\n    address: 127.0.0.1:1\n{}", deeper(4)),
        format!("{routes}listeners:\n{}", deeper(2)),
        secure(&format!("certificates:\n{}", deeper(8))),
        secure(&format!("certificates: [ {{ cert: a, key: b }} ]\n{}", deeper(6))),
    ]
    .into_iter()
    .map(|text| completed(&text))
    .collect()
}

/// The text with the parts that a complete file needs.
fn completed(text: &str) -> String {
    let Ok(Value::Object(mut file)) = serde_yaml::from_str::<Value>(text) else { return text.to_owned() };
    let listener = serde_json::json!([{ "name": "added", "address": "127.0.0.1:1" }]);
    file.entry("listeners").or_insert(listener);
    let route =
        serde_json::json!([{ "name": "added", "match": { "hosts": ["added.test"] }, "filters": [{ "respond": {} }] }]);
    file.entry("routes").or_insert(route);
    for listener in file["listeners"].as_array_mut().into_iter().flatten() {
        if let Some(listener) = listener.as_object_mut() {
            listener.entry("name").or_insert("added".into());
            listener.entry("address").or_insert("127.0.0.1:1".into());
        }
    }
    for upstream in
        file.get_mut("upstreams").and_then(Value::as_object_mut).into_iter().flat_map(|map| map.values_mut())
    {
        if let Some(upstream) = upstream.as_object_mut()
            && !["endpoints", "dns", "file"].iter().any(|source| upstream.contains_key(*source))
        {
            upstream.insert("endpoints".into(), serde_json::json!([{ "address": "127.0.0.1:2" }]));
        }
    }
    // Upstreams that are only referred to.
    let mut named = BTreeSet::new();
    let whole = Value::Object(file.clone());
    name_upstreams(&whole["routes"], &mut named);
    name_upstreams(&whole["listeners"], &mut named);
    let upstreams = file.entry("upstreams").or_insert(Value::Object(Default::default()));
    if let Some(upstreams) = upstreams.as_object_mut() {
        for name in named {
            upstreams.entry(name).or_insert(serde_json::json!({ "endpoints": [{ "address": "127.0.0.1:2" }] }));
        }
    }
    for route in file["routes"].as_array_mut().into_iter().flatten().filter_map(Value::as_object_mut) {
        route.entry("name").or_insert("added".into());
    }
    serde_yaml::to_string(&Value::Object(file)).expect("YAML")
}

fn name_upstreams(value: &Value, named: &mut BTreeSet<String>) {
    match value {
        Value::Array(list) => list.iter().for_each(|item| name_upstreams(item, named)),
        Value::Object(map) => {
            for (key, value) in map {
                match value.as_str() {
                    Some(name) if key == "upstream" => drop(named.insert(name.to_owned())),
                    _ if key == "upstreams" => {
                        let names = value.as_array().into_iter().flatten().filter_map(|one| one["name"].as_str());
                        named.extend(names.map(str::to_owned));
                    }
                    _ => name_upstreams(value, named),
                }
            }
        }
        _ => {}
    }
}

#[test]
fn every_configuration_in_the_readme_and_the_manual_is_right() {
    let builder = Gateway::builder();
    let (mut count, mut wrong) = (0, Vec::new());
    for (name, page) in manual() {
        for (line, block, before) in blocks(&page, "yaml") {
            // Lists of endpoints and files of other programs are marked.
            if before.contains("<!-- not Forebay's -->") {
                continue;
            }
            // Helm values may contain a configuration.
            let block = match name.ends_with("kubernetes.md") {
                true => match serde_yaml::from_str::<Value>(&block).expect("YAML").get("config") {
                    Some(config) => serde_yaml::to_string(config).expect("YAML"),
                    None => continue,
                },
                false => block,
            };
            count += 1;
            let tries: Vec<_> =
                wrapped(&block).iter().map(|text| builder.parse("block.yaml", text).map(drop)).collect();
            if tries.iter().all(Result::is_err) {
                let first = tries.into_iter().next().and_then(Result::err).map(|report| report.to_string());
                wrong.push(format!("{name}:{line}:\n{block}{}", first.unwrap_or_default()));
            }
        }
    }
    assert!(count > 30 && wrong.is_empty(), "{} of {count}:\n{}", wrong.len(), wrong.join("\n"));
}

/// The commands of a page: lines that begin with `$ `, without comments and pipes.
fn commands(page: &str) -> Vec<String> {
    let console = blocks(page, "console").into_iter().flat_map(|(_, block, _)| {
        block.lines().filter_map(|line| line.strip_prefix("$ ")).map(str::to_owned).collect::<Vec<_>>()
    });
    console.map(|line| line.split(" # ").next().unwrap_or_default().trim().to_owned()).collect()
}

#[test]
fn every_command_in_the_readme_and_the_manual_is_one() {
    let dir = tempfile::tempdir().expect("a directory");
    // The file for commands that take one.
    let good = fs::read_to_string(format!("{ROOT}/conf/forebay.yaml")).expect("the smallest file");
    fs::write(dir.path().join("forebay.yaml"), good).expect("a file");
    std::os::unix::fs::symlink(format!("{ROOT}/conf"), dir.path().join("conf")).expect("a link");
    let make = fs::read_to_string(format!("{ROOT}/Makefile")).expect("the Makefile");
    let mut count: BTreeMap<&str, usize> = BTreeMap::new();
    let mut wrong = Vec::new();
    let mut seen = BTreeSet::new();
    for (name, page) in manual() {
        for command in commands(&page) {
            let words: Vec<&str> = command.split('|').next().unwrap_or_default().split_whitespace().collect();
            if !seen.insert(command.clone()) {
                continue;
            }
            match words.as_slice() {
                ["make", target, ..] => {
                    *count.entry("make").or_default() += 1;
                    if !make.contains(&format!("\n{target}:")) {
                        wrong.push(format!("{name}: {command}: there is no such target"));
                    }
                }
                ["forebay", arguments @ ..] => {
                    *count.entry("forebay").or_default() += 1;
                    if let Some(error) = usage(dir.path(), arguments) {
                        wrong.push(format!("{name}: {command}: {error}"));
                    }
                }
                _ => {}
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
    assert!(count["make"] >= 2 && count["forebay"] >= 6, "{count:?}");
}

/// The usage error of a command, if any. A command that would run or listen is checked without doing so.
fn usage(dir: &Path, arguments: &[&str]) -> Option<String> {
    let arguments: Vec<String> = arguments.iter().map(|word| word.trim_matches(['\'', '"']).to_owned()).collect();
    let mut arguments: Vec<&str> = arguments.iter().map(String::as_str).take_while(|word| *word != ">").collect();
    match arguments.first().copied() {
        Some("run") if arguments.contains(&"--demo") => arguments.push("--help"),
        Some("run") => arguments[0] = "check",
        Some("proxy") => {
            // A temporary certificate is created only for a run.
            let bare = |at: usize, words: &[&str]| words.get(at + 1).is_none_or(|next| next.starts_with("--"));
            if let Some(at) = arguments.iter().position(|word| *word == "--tls").filter(|at| bare(*at, &arguments)) {
                arguments.remove(at);
            }
            if !arguments.contains(&"--print") {
                arguments.push("--print");
            }
        }
        Some("init" | "import" | "timeline" | "origin" | "top") => arguments.push("--help"),
        _ => {}
    }
    let output = Command::new(env!("CARGO_BIN_EXE_forebay"))
        .args(&arguments)
        .current_dir(dir)
        .env_remove("FOREBAY_CONFIG")
        // No running gateway must be contacted.
        .env("FOREBAY_ADMIN_TOKEN", "0123456789abcdef")
        .stdin(Stdio::null())
        .output()
        .expect("the program");
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    let missing =
        ["certs", "check", "-t"].contains(arguments.first().unwrap_or(&"")) && output.status.code() == Some(78);
    (output.status.code() == Some(2) || (missing && !error.contains("/etc/") && !error.contains("FILE")))
        .then_some(error)
}

#[test]
fn every_path_of_the_admin_endpoint_in_the_pages_is_there() {
    let origin = Origin::named("app");
    let gateway = Setup::before(&origin).start();
    let asked = Regex::new(r"curl ((?:-[sifN]+ )*)'?(?:http://)?(?:localhost|127\.0\.0\.1):9100(/[a-z/_]*)")
        .expect("a pattern");
    let mut paths = BTreeSet::new();
    for (_, page) in pages() {
        for command in commands(&page) {
            paths.extend(asked.captures_iter(&command).map(|found| found[2].to_owned()));
        }
    }
    assert!(paths.len() >= 2, "{paths:?}");
    for path in paths {
        let status = get(gateway.admin(), &path).status;
        assert_ne!(status, 404, "{path}");
    }
}
