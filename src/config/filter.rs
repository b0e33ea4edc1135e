//! `filters:` of a route: maps of one key, which is that of a registered filter, ours or yours, and perhaps
//! `when:` beside it.
//!
//! The keys are not known to serde, so an entry is kept as it was written and decoded by the [`FilterKind`] of its
//! key, with the path of every error inside.

use std::any::Any;
use std::borrow::Cow;
use std::fmt;
use std::sync::Arc;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Serialize};
use serde_yaml::Value;

pub use super::decode::decode;

/// The settings of one filter, decoded to the type that its filter declared.
pub type Settings = Arc<dyn Any + Send + Sync>;

/// What the configuration needs to know of a registered filter. `filter::Catalog` makes these.
#[derive(Clone)]
pub struct FilterKind {
    /// Its key in YAML.
    pub key: &'static str,
    /// Whether it always answers itself, so that its route needs no upstream.
    pub answers: bool,
    /// Decodes the settings; the error carries the path inside them.
    pub decode: fn(Value) -> Result<Settings, DecodeError>,
    /// The JSON Schema of the settings.
    pub schema: fn(&mut SchemaGenerator) -> Schema,
}

/// Settings that could not be decoded.
#[derive(Clone, Debug)]
pub struct DecodeError {
    /// Where in the settings, such as `rate` or `allow[2]`; empty for the whole.
    pub path: String,
    /// What was found and what was expected.
    pub message: String,
}

/// One entry of `filters:`: a key and its settings, and perhaps `when:`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(transparent)]
pub struct FilterEntry {
    /// The map, as written: what `${…}` stands for is not in it.
    pub written: Value,
    /// The settings, once the configuration was checked against the registered filters.
    #[serde(skip)]
    pub decoded: Option<Decoded>,
}

/// A filter entry whose key and settings were understood.
#[derive(Clone)]
pub struct Decoded {
    /// The registered key.
    pub key: &'static str,
    /// The settings of the type that its filter declared.
    pub settings: Settings,
    /// The condition under which it acts; always, if there is none.
    pub when: Option<String>,
}

impl FilterEntry {
    /// The key of an entry that stands beside its filter: the condition under which it acts.
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

    /// A placeholder: `config::schema` puts the registered filters in its place.
    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({ "type": "object", "minProperties": 1, "maxProperties": 2 })
    }
}
