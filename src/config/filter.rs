//! `filters:` of a route: one-key maps, where the key is that of a registered filter, with an optional `when:`.
//!
//! Serde does not know the keys. An entry is kept as written, and the [`FilterKind`] of its key decodes it, with
//! the path of every error inside.

use std::any::Any;
use std::borrow::Cow;
use std::fmt;
use std::sync::Arc;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_path_to_error::Segment;
use serde_yaml::Value;

use crate::error::path::{self, join};

/// The settings of one filter, decoded to the type that its filter declared.
pub type Settings = Arc<dyn Any + Send + Sync>;

/// What the configuration knows of a registered filter. `filter::Catalog` creates these.
#[derive(Clone)]
pub struct FilterKind {
    /// Its key in YAML.
    pub key: &'static str,
    /// Whether it always responds itself, so that its route needs no upstream.
    pub answers: bool,
    /// Decodes the settings; errors carry the path inside them.
    pub decode: fn(Value) -> Result<Settings, DecodeError>,
    /// The JSON Schema of the settings.
    pub schema: fn(&mut SchemaGenerator) -> Schema,
}

/// An error in the settings of a filter.
#[derive(Clone, Debug)]
pub struct DecodeError {
    /// The path inside the settings, such as `rate` or `allow[2]`; empty for the whole.
    pub path: String,
    /// What was found and what was expected.
    pub message: String,
}

/// One entry of `filters:`: a key, its settings, and an optional `when:`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(transparent)]
pub struct FilterEntry {
    /// The map as written, without interpolated values.
    pub written: Value,
    /// The settings, after the check against the registered filters.
    #[serde(skip)]
    pub decoded: Option<Decoded>,
}

/// A decoded filter entry.
#[derive(Clone)]
pub struct Decoded {
    /// The registered key.
    pub key: &'static str,
    /// The settings, in the type that the filter declares.
    pub settings: Settings,
    /// The condition under which it runs; without one it always runs.
    pub when: Option<String>,
}

impl FilterEntry {
    /// The key next to the filter's own key: the condition under which it runs.
    pub const WHEN: &'static str = "when";
}

impl fmt::Debug for Decoded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.key)
    }
}

impl JsonSchema for FilterEntry {
    fn schema_name() -> Cow<'static, str> {
        "Filter".into()
    }

    /// A placeholder: `config::schema` replaces it with the registered filters.
    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({ "type": "object", "minProperties": 1, "maxProperties": 2 })
    }
}

/// Decodes a value like the configuration: enums are one-key maps, and errors carry their path.
///
/// # Errors
///
/// The first value that does not fit, with its path inside `value`.
pub fn decode<T: DeserializeOwned>(value: &Value) -> Result<T, DecodeError> {
    let mut track = serde_path_to_error::Track::new();
    let tracked = serde_path_to_error::Deserializer::new(value, &mut track);
    serde_yaml::with::singleton_map_recursive::deserialize(tracked)
        .map_err(|error: serde_yaml::Error| DecodeError { path: written(&track.path()), message: error.to_string() })
}

/// Formats the known part of a path in our notation.
fn written(path: &serde_path_to_error::Path) -> String {
    let mut text = String::new();
    for segment in path {
        text = match segment {
            Segment::Seq { index } => format!("{text}[{index}]"),
            Segment::Map { key: name } | Segment::Enum { variant: name } => join(&text, &path::key(name)),
            Segment::Unknown => break,
        };
    }
    text
}
