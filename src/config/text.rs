//! A text that is fixed, or computed by an expression for each exchange.

use std::collections::BTreeMap;
use std::fmt;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::de::value::MapAccessDeserializer;
use serde::de::{self, Deserializer, MapAccess, Visitor};
use serde::{Deserialize, Serialize};

use crate::error::{BuildError, path};
use crate::expression::named::{Named, Words};
use crate::expression::{self, Moment};

/// A fixed text, or `{ cel: "…" }`; see `conf/manual/expressions.md`.
#[derive(Clone, PartialEq, Eq, Serialize)]
#[serde(untagged)]
pub enum Text {
    /// A fixed text.
    Fixed(String),
    /// The result of an expression.
    Made {
        /// The expression.
        cel: String,
    },
}

impl Default for Text {
    fn default() -> Self {
        Text::Fixed(String::new())
    }
}

impl Text {
    /// Whether it is empty for every exchange.
    pub fn is_empty(&self) -> bool {
        matches!(self, Text::Fixed(text) if text.is_empty())
    }
}

/// Prepares named texts that are evaluated when an exchange has ended.
///
/// # Errors
///
/// All invalid expressions; their paths begin with the name.
pub fn named(written: &BTreeMap<String, Text>) -> Result<Named, Vec<BuildError>> {
    let (mut named, mut errors) = (Vec::new(), Vec::new());
    for (name, text) in written {
        let words = match text {
            Text::Fixed(text) => Ok(Words::Fixed(text.as_str().into())),
            Text::Made { cel } => expression::Value::build(cel, Moment::Response).map(Words::Made),
        };
        match words {
            Ok(words) => named.push((name.as_str().into(), words)),
            Err(error) => errors.push(error.under("cel").under(&path::key(name))),
        }
    }
    if errors.is_empty() { Ok(named.into_iter().collect()) } else { Err(errors) }
}

/// Hides the text: it may be a secret.
impl fmt::Debug for Text {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Text::Fixed(_) => "Fixed(…)",
            Text::Made { .. } => "Made(…)",
        })
    }
}

impl<'de> Deserialize<'de> for Text {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(FixedOrMade)
    }
}

struct FixedOrMade;

impl<'de> Visitor<'de> for FixedOrMade {
    type Value = Text;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("text (put a number into quotes), or `{ cel: … }`")
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<Text, E> {
        Ok(Text::Fixed(text.to_owned()))
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Text, A::Error> {
        #[derive(Deserialize)]
        #[serde(deny_unknown_fields)]
        struct Written {
            cel: String,
        }
        let Written { cel } = Written::deserialize(MapAccessDeserializer::new(map))?;
        Ok(Text::Made { cel })
    }
}

impl JsonSchema for Text {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "Text".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "description": "A text, or an expression in CEL that makes one for each exchange.",
            "anyOf": [
                { "type": "string" },
                {
                    "type": "object",
                    "patternProperties": { "^cel$": { "type": "string" } },
                    "additionalProperties": false,
                    "minProperties": 1,
                },
            ],
        })
    }
}
