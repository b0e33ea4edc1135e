//! Parses a configuration file into typed values and reports every error with its position.
//!
//! These types describe only what was written. `gateway` builds the runtime types from them; the request path uses
//! no type of this module.
//!
//! A file passes through these modules in order: `syntax` (YAML), `include` (further files), `interpolate`
//! (`${…}`), `decode` (types) and `check` (meaning); `parse` calls them. `place` turns the path of a finding into line
//! and column, and `explain` rewords serde's errors. The result is a [`Report`].

// The format: one file per section.
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

// Reading.
mod check;
mod decode;
mod explain;
pub mod file;
pub mod include;
mod interpolate;
mod parse;
mod place;
mod report;
mod schema;
mod shown;
mod syntax;

// Writing.
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
use report::{Finding, FindingLocation, Source};
use units::Size;

/// Limit on the size of all files of a configuration together.
const FILE_MAX: Size = Size::kib(16 * 1024);

/// A whole configuration.
///
/// Serializing it shows the values in effect, secrets included.
#[derive(Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// The version of this format: 1.
    #[serde(default = "Config::version")]
    pub version: u32,
    /// Further files of the configuration: names or patterns, relative to the file that includes them. Lists are
    /// appended, sections are merged, and no value overrides another.
    // `include` runs before decoding, so this field is always empty here.
    #[serde(default, skip_serializing)]
    pub include: include::Include,
    /// Settings of the process.
    #[serde(default)]
    pub server: server::Server,
    /// Peers whose `X-Forwarded-For`, `Forwarded` and similar fields are trusted: addresses, networks, or `unix`
    /// for all peers on unix sockets. From other peers, these fields are removed.
    #[serde(default)]
    pub trusted_proxies: Vec<address::Proxy>,
    /// Number of leading bits that identify a client by its IPv4 address, wherever a limit applies per client.
    #[serde(default)]
    pub ipv4_prefix: address::Ipv4Prefix,
    /// Number of leading bits that identify a client by its IPv6 address, wherever a limit applies per client.
    #[serde(default)]
    pub ipv6_prefix: address::Ipv6Prefix,
    /// The header fields that tell the upstream who the client is.
    #[serde(default)]
    pub forwarded: server::Forwarded,
    /// Adds `Via` to requests and responses (RFC 9110 §7.6.3).
    #[serde(default)]
    pub via: bool,
    /// How request paths are normalized.
    #[serde(default)]
    pub paths: Paths,
    /// The sockets on which clients connect.
    pub listeners: Vec<Listener>,
    /// Named groups of endpoints.
    #[serde(default)]
    pub upstreams: BTreeMap<String, Upstream>,
    /// The rules that choose an upstream for each request.
    pub routes: Vec<Route>,
    /// ACME issuers, by name. Certificates of listeners refer to these names.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub acme: BTreeMap<String, acme::Issuer>,
    /// Limits on the bodies that all exchanges together buffer.
    #[serde(default)]
    pub resources: server::Resources,
    /// The admin endpoint.
    #[serde(default)]
    pub admin: server::Admin,
    /// Logs, metrics and traces.
    #[serde(default)]
    pub observability: server::Observability,
    /// The files it was read from, to give later errors a position.
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
    /// All errors that were found. Warnings alone are not an error; see [`Config::warnings`].
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

    /// Parses and checks a text; `file` is the name that the report shows.
    ///
    /// # Errors
    ///
    /// All errors that were found.
    pub fn parse(file: &str, text: &str, kinds: &[FilterKind]) -> Result<Config, Report> {
        parse::parse(file, text, kinds, &|name| env::var(name).ok())
    }

    /// The parsed files before decoding, as far as they can be read; `true`: all of them could be read.
    pub fn readable(path: &Path) -> Option<(serde_yaml::Value, bool)> {
        let text = String::from_utf8(file::read(path, FILE_MAX).ok()?).ok()?;
        let gathered = include::gather(&path.display().to_string(), &text, &|name| env::var(name).ok());
        Some((gathered.written, !gathered.findings.iter().any(Finding::is_error)))
    }

    /// Settings that are valid but probably a mistake: an upstream that no route uses, sizes in decimal units.
    pub fn warnings(&self) -> &Report {
        &self.warnings
    }

    /// A hash of the text, in hexadecimal. It identifies a configuration.
    pub fn hash(&self) -> String {
        format!("{:016x}", xxh3_64(self.source.text.as_bytes()))
    }

    /// The file and the 1-based line where the value at this path begins; `None`: it is not written.
    pub fn place(&self, path: &str) -> Option<(&str, usize)> {
        let found = self.source.places.find(path).filter(|found| found.whole)?;
        Some(self.source.line(found.key.unwrap_or(found.value).start))
    }

    /// The names of its files, the main one first.
    pub fn files(&self) -> impl Iterator<Item = &str> {
        self.source.names()
    }

    /// The directories that were searched for its files. Watching them reveals changed, new and deleted files.
    pub fn directories(&self) -> &BTreeSet<PathBuf> {
        &self.source.directories
    }

    /// The directory of the main file.
    pub fn directory(&self) -> &Path {
        Path::new(self.source.name(None)).parent().unwrap_or(Path::new(""))
    }

    /// Renders errors of the build step, each at its position in the file.
    pub fn report(&self, errors: &[BuildError]) -> Report {
        Report::new(Arc::clone(&self.source), errors.iter().map(|error| finding(error, Finding::error)).collect())
    }

    /// The warnings of the file together with those of the build step.
    pub fn warnings_with(&self, warnings: &[BuildError]) -> Report {
        self.warnings.with(warnings.iter().map(|warning| finding(warning, Finding::warning)).collect())
    }

    /// The prefix lengths that identify a client.
    pub fn client_prefix(&self) -> address::ClientPrefix {
        address::ClientPrefix { v4: self.ipv4_prefix, v6: self.ipv6_prefix }
    }

    /// The issuer of this name: a configured one or a well-known one.
    pub fn issuer(&self, name: &str) -> Option<acme::Issuer> {
        let known = || acme::Issuer::WELL_KNOWN.iter().any(|(known, _)| *known == name);
        self.acme.get(name).cloned().or_else(|| known().then(acme::Issuer::default))
    }

    fn version() -> u32 {
        1
    }
}

/// Turns an error of the build step into a finding with a position.
fn finding(error: &BuildError, kind: fn(FindingLocation, String) -> Finding) -> Finding {
    let (title, label) = explain::halves(&error.message);
    let location = match &error.inside {
        Some(inside) => FindingLocation::Inside(error.path.clone(), inside.clone()),
        None => FindingLocation::Value(error.path.clone()),
    };
    kind(location, title.into()).label(label).foreign()
}

/// Parses an endpoint list that is a file of its own; `file` is the name that errors show.
///
/// # Errors
///
/// The first error, with its position.
pub fn endpoints(file: &str, text: &str) -> Result<Vec<upstream::Endpoint>, String> {
    let line = |byte: usize| text.get(..byte).map_or(1, |before| before.matches('\n').count() + 1);
    place::survey(text).map_err(|stop| format!("{file}:{}: {}", line(stop.at.start), stop.title()))?;
    let yaml: serde_yaml::Value = serde_yaml::from_str(text).map_err(|error| {
        let at = syntax::place(text, &error).unwrap_or_default();
        format!("{file}:{}: this is not YAML: {error}", line(at))
    })?;
    if !yaml.is_sequence() {
        return Err(format!(
            "{file}:1: expected a list such as `- address: 127.0.0.1:3000`; one without endpoints is `[]`"
        ));
    }
    let wrong = |path: &str, message: &str| {
        let places = place::SourceMap::of(text);
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
                "an endpoint is in one tier, and `priority` names another",
            ));
        }
    }
    Ok(endpoints)
}

/// Shows only the names: any value may be a secret.
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
