//! The configuration as it was written: YAML to typed values, with every error at its place.
//!
//! These types say nothing of how Forebay runs; `gateway` builds the runtime from them. The request path sees none of
//! them.
//!
//! A file passes through `syntax` (YAML), `include` (further files), `interpolate` (`${…}`), `decode` (types) and `check` (meaning). What they
//! find goes through `place` (path to line and column) and `explain` (serde's words to ours) into a [`Report`].

// What may be written, a file a section.
pub mod acme;
pub mod address;
pub mod filter;
pub mod key;
pub mod listener;
pub mod memory;
pub mod paths;
pub mod route;
pub mod server;
pub mod text;
pub mod units;
pub mod upstream;

// How it is read.
mod check;
mod decode;
mod explain;
pub mod file;
pub mod include;
mod interpolate;
mod place;
mod report;
mod schema;
mod shown;
mod syntax;

// How it is written.
mod layout;
pub mod write;

use std::collections::{BTreeMap, BTreeSet};
use std::env;
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::xxh3_64;

pub use address::Address;
pub use filter::FilterKind;
pub use key::Key;
pub use layout::normal;
pub use listener::Listener;
pub use paths::Paths;
pub use report::Report;
pub use route::Route;
pub use schema::{schema, with_schema};
pub use text::Text;
pub use upstream::Upstream;

use crate::error::BuildError;
use file::Unreadable;
use report::{Finding, Source, Spot};
use units::Size;

/// All files of a configuration together may be so large.
const FILE_MAX: Size = Size::kib(16 * 1024);

/// A whole configuration.
///
/// Serialized, it shows what is in effect, secrets included.
#[derive(Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// The version of this format: 1.
    #[serde(default = "Config::version")]
    pub version: u32,
    /// Further files that belong to the configuration: names or patterns, relative to the file in which they stand. Lists
    /// are appended, sections are merged, and nothing is overridden.
    // They are followed before anything is decoded, so nothing is left to say of them here.
    #[serde(default, skip_serializing)]
    pub include: include::Include,
    /// How the process runs.
    #[serde(default)]
    pub server: server::Server,
    /// Proxies in front of Forebay whose word on the client is believed (`X-Forwarded-For`, `Forwarded` and the like);
    /// `unix` stands for whoever connects to a unix socket. Of others, these fields are dropped.
    #[serde(default)]
    pub trusted_proxies: Vec<address::Proxy>,
    /// How many leading bits of an IPv4 address are one client, where something is limited for each client.
    #[serde(default)]
    pub ipv4_prefix: address::Ipv4Prefix,
    /// How many leading bits of an IPv6 address are one client, where something is limited for each client.
    #[serde(default)]
    pub ipv6_prefix: address::Ipv6Prefix,
    /// Which headers tell the upstream who the client is.
    #[serde(default)]
    pub forwarded: server::Forwarded,
    /// Whether `Via` is added to requests and responses (RFC 9110 §7.6.3).
    #[serde(default)]
    pub via: bool,
    /// How the paths of requests are read.
    #[serde(default)]
    pub paths: Paths,
    /// Where clients connect.
    pub listeners: Vec<Listener>,
    /// Named groups of endpoints.
    #[serde(default)]
    pub upstreams: BTreeMap<String, Upstream>,
    /// Which request goes where.
    pub routes: Vec<Route>,
    /// Authorities that issue certificates by themselves, by the names by which certificates of listeners ask for them.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub acme: BTreeMap<String, acme::Issuer>,
    /// What all exchanges together may hold back.
    #[serde(default)]
    pub resources: server::Resources,
    /// The admin endpoint.
    #[serde(default)]
    pub admin: server::Admin,
    /// What is logged and counted.
    #[serde(default)]
    pub observability: server::Observability,
    /// Where it came from, for errors that are found later.
    #[serde(skip)]
    source: Arc<Source>,
    #[serde(skip)]
    warnings: Report,
}

impl Config {
    /// Reads and checks a file.
    ///
    /// # Errors
    ///
    /// Everything that is wrong with it. Warnings alone are no error; see [`Config::warnings`].
    pub fn load(path: &Path, kinds: &[FilterKind]) -> Result<Config, Report> {
        let file = path.display().to_string();
        let bytes = file::read(path, FILE_MAX).map_err(|error| {
            let help = match &error {
                Unreadable::TooLarge(most) => {
                    let title = format!("the file is larger than {most}");
                    return Report::unreadable(&file, title, "is it a configuration?");
                }
                Unreadable::System(error) if error.kind() == io::ErrorKind::NotFound => {
                    "name another file, or make this one"
                }
                Unreadable::System(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                    "let the user that Forebay runs as read it"
                }
                Unreadable::System(_) | Unreadable::NotPlain(_) => "it must be a file of text",
            };
            let why = interpolate::reason(&error.to_string());
            Report::unreadable(&file, format!("the file cannot be read: {why}"), help)
        })?;
        match String::from_utf8(bytes) {
            Ok(text) => Config::parse(&file, &text, kinds),
            Err(error) => {
                let (text, finding) = syntax::no_text(0, &error);
                Err(Report::new(Arc::new(Source::of(&file, &text)), vec![finding]))
            }
        }
    }

    /// Checks the text of a file; `file` is its name in the report.
    ///
    /// # Errors
    ///
    /// Everything that is wrong with it.
    pub fn parse(file: &str, text: &str, kinds: &[FilterKind]) -> Result<Config, Report> {
        decode::parse(file, text, kinds, &|name| env::var(name).ok())
    }

    /// What the files of a configuration say that may be wrong, as far as they can be read, and whether all of them can.
    pub fn readable(path: &Path) -> Option<(serde_yaml::Value, bool)> {
        let text = String::from_utf8(file::read(path, FILE_MAX).ok()?).ok()?;
        let gathered = include::gather(&path.display().to_string(), &text, &|name| env::var(name).ok());
        Some((gathered.written, !gathered.findings.iter().any(Finding::is_error)))
    }

    /// What works and is hardly meant: an upstream that nobody asks, a size in decimal units.
    pub fn warnings(&self) -> &Report {
        &self.warnings
    }

    /// The hash of its text, in hexadecimal: it tells one configuration from another.
    pub fn hash(&self) -> String {
        format!("{:016x}", xxh3_64(self.source.text.as_bytes()))
    }

    /// The file and the line, from 1, in which the value at this path begins; `None` if it is not written.
    pub fn place(&self, path: &str) -> Option<(&str, usize)> {
        let found = self.source.places.find(path).filter(|found| found.whole)?;
        Some(self.source.line(found.key.unwrap_or(found.value).start))
    }

    /// The names of its files, the main one first.
    pub fn files(&self) -> impl Iterator<Item = &str> {
        self.source.names()
    }

    /// The directories in which its files were looked for: a file that is changed, comes or goes does so in one of them.
    pub fn directories(&self) -> &BTreeSet<PathBuf> {
        &self.source.directories
    }

    /// The directory that its main file is in.
    pub fn directory(&self) -> &Path {
        Path::new(self.source.name(None)).parent().unwrap_or(Path::new(""))
    }

    /// Shows errors that were found when the configuration was built, at their places in its file.
    pub fn report(&self, errors: &[BuildError]) -> Report {
        Report::new(Arc::clone(&self.source), errors.iter().map(|error| finding(error, Finding::error)).collect())
    }

    /// The warnings of the file, with these, which were found when the configuration was built.
    pub fn warnings_with(&self, warnings: &[BuildError]) -> Report {
        self.warnings.with(warnings.iter().map(|warning| finding(warning, Finding::warning)).collect())
    }

    /// What is one client where something is limited for each.
    pub fn client_prefix(&self) -> address::ClientPrefix {
        address::ClientPrefix { v4: self.ipv4_prefix, v6: self.ipv6_prefix }
    }

    /// The issuer of this name: the one that is written, or one that is known without that.
    pub fn issuer(&self, name: &str) -> Option<acme::Issuer> {
        let known = || acme::Issuer::WELL_KNOWN.iter().any(|(known, _)| *known == name);
        self.acme.get(name).cloned().or_else(|| known().then(acme::Issuer::default))
    }

    fn version() -> u32 {
        1
    }
}

/// What was found when the configuration was built, at its place.
fn finding(error: &BuildError, kind: fn(Spot, String) -> Finding) -> Finding {
    let (title, label) = explain::halves(&error.message);
    let spot = match &error.inside {
        Some(inside) => Spot::Inside(error.path.clone(), inside.clone()),
        None => Spot::Value(error.path.clone()),
    };
    kind(spot, title.into()).label(label).foreign()
}

/// Reads a list of endpoints that is a file of its own; `file` is its name in what is said of it.
///
/// # Errors
///
/// The first thing that is wrong with it, with its place.
pub fn endpoints(file: &str, text: &str) -> Result<Vec<upstream::Endpoint>, String> {
    let line = |byte: usize| text.get(..byte).map_or(1, |before| before.matches('\n').count() + 1);
    place::survey(text).map_err(|stop| format!("{file}:{}: {}", line(stop.at.start), stop.title()))?;
    let yaml: serde_yaml::Value = serde_yaml::from_str(text).map_err(|error| {
        let at = syntax::place(text, &error).unwrap_or_default();
        format!("{file}:{}: this is no YAML: {error}", line(at))
    })?;
    if !yaml.is_sequence() {
        return Err(format!(
            "{file}:1: expected a list such as `- address: 127.0.0.1:3000`; one without endpoints is `[]`"
        ));
    }
    let wrong = |path: &str, message: &str| {
        let places = place::Places::of(text);
        let start = places.find(path).map_or(0, |found| found.key.unwrap_or(found.value).start);
        format!("{file}:{}: {path}: {message}", line(start))
    };
    let endpoints: Vec<upstream::Endpoint> =
        filter::decode(&yaml).map_err(|error| wrong(&error.path, &error.message))?;
    for (index, endpoint) in endpoints.iter().enumerate() {
        if endpoint.has_port_0() {
            return Err(wrong(&format!("[{index}].address"), "nothing can be reached at port 0"));
        }
        if endpoint.has_two_tiers() {
            return Err(wrong(
                &format!("[{index}].backup"),
                "an endpoint stands in one tier, and `priority` names another",
            ));
        }
    }
    Ok(endpoints)
}

/// Names what it holds and shows no value, for any of them may be a secret.
impl fmt::Debug for Config {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Config")
            .field("file", &self.source.name(None))
            .field("listeners", &self.listeners.len())
            .field("upstreams", &self.upstreams.len())
            .field("routes", &self.routes.len())
            .finish_non_exhaustive()
    }
}
