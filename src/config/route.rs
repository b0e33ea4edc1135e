//! `routes:`: which request goes where, and through which filters.

use std::collections::BTreeMap;
use std::fmt;
use std::num::NonZeroU32;

use schemars::JsonSchema;
use serde::de::value::MapAccessDeserializer;
use serde::de::{self, Deserializer, MapAccess, Visitor};
use serde::{Deserialize, Serialize};

use super::filter::FilterEntry;
use super::units::Time;

/// Requests of one kind and what becomes of them.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Route {
    /// Its name in metrics and logs.
    pub name: String,
    /// Which requests it takes. All of them if nothing is said.
    #[serde(default, rename = "match")]
    pub matches: Match,
    /// What is done to them, in order.
    #[serde(default)]
    pub filters: Vec<FilterEntry>,
    /// Where they go; or see `upstreams`.
    #[serde(default)]
    pub upstream: Option<String>,
    /// Where they go, by weight; or see `upstream`.
    #[serde(default)]
    pub upstreams: Vec<Split>,
    /// How long the client may take.
    #[serde(default)]
    pub client: Client,
}

/// One side of a split.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Split {
    /// The upstream.
    pub name: String,
    /// Its share of the requests, relative to its neighbours.
    #[serde(default = "super::upstream::Endpoint::default_weight")]
    pub weight: NonZeroU32,
}

/// Which requests a route takes: all that is said must hold.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Match {
    /// Host names, exact (`shop.example.com`) or by suffix (`*.example.com`, any number of labels). Any, if empty.
    /// Without port; lower-cased when read.
    #[serde(deserialize_with = "lower_cased")]
    pub hosts: Vec<String>,
    /// The path. Any, if absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub path: Option<PathMatch>,
    /// Methods, such as `GET`. Any, if empty.
    pub methods: Vec<String>,
    /// Headers by name; all must match.
    pub headers: BTreeMap<String, ValueMatch>,
    /// Query arguments by name; all must match.
    pub queries: BTreeMap<String, ValueMatch>,
}

/// A condition on the path.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum PathMatch {
    /// This path and no other.
    Exact(String),
    /// This path and what is below it, by whole segments: `/api` takes `/api` and `/api/v1`, not `/apis`.
    Prefix(String),
    /// Paths that this regular expression matches as a whole.
    Regex(String),
}

/// A condition on the value of a header or a query argument.
#[derive(Clone, PartialEq, Eq, Hash, Serialize, JsonSchema)]
#[serde(untagged)]
#[schemars(deny_unknown_fields)]
pub enum ValueMatch {
    /// Exactly this value.
    Exact(String),
    /// Values that this regular expression matches as a whole.
    Regex {
        /// The regular expression.
        regex: String,
    },
    /// Whether it is there at all.
    Present {
        /// `true`: it must be there; `false`: it must not.
        present: bool,
    },
}

/// Shows no value: what a header must hold may be a secret.
impl fmt::Debug for ValueMatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ValueMatch::Exact(_) => f.write_str("Exact(…)"),
            ValueMatch::Regex { .. } => f.write_str("Regex(…)"),
            ValueMatch::Present { present } => write!(f, "Present({present})"),
        }
    }
}

fn lower_cased<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<String>, D::Error> {
    let hosts = Vec::<String>::deserialize(deserializer)?;
    Ok(hosts.into_iter().map(|host| host.to_ascii_lowercase()).collect())
}

impl<'de> Deserialize<'de> for PathMatch {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        /// All the keys there are, so that an unknown one is found as in any other map.
        #[derive(Deserialize)]
        #[serde(deny_unknown_fields, expecting = "`{ exact: … }`, `{ prefix: … }` or `{ regex: … }`")]
        struct Written {
            exact: Option<String>,
            prefix: Option<String>,
            regex: Option<String>,
        }

        match Written::deserialize(deserializer)? {
            Written { exact: Some(path), prefix: None, regex: None } => Ok(PathMatch::Exact(path)),
            Written { exact: None, prefix: Some(path), regex: None } => Ok(PathMatch::Prefix(path)),
            Written { exact: None, prefix: None, regex: Some(pattern) } => Ok(PathMatch::Regex(pattern)),
            _ => Err(de::Error::custom("a path has one condition: write one of `exact`, `prefix` and `regex`")),
        }
    }
}

impl<'de> Deserialize<'de> for ValueMatch {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(ValueCondition)
    }
}

struct ValueCondition;

impl<'de> Visitor<'de> for ValueCondition {
    type Value = ValueMatch;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a value as text (a number stands in quotes), or `{ regex: … }`, or `{ present: true | false }`")
    }

    fn visit_str<E: de::Error>(self, value: &str) -> Result<ValueMatch, E> {
        Ok(ValueMatch::Exact(value.to_owned()))
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<ValueMatch, A::Error> {
        #[derive(Deserialize)]
        #[serde(deny_unknown_fields)]
        struct Written {
            regex: Option<String>,
            present: Option<bool>,
        }

        match Written::deserialize(MapAccessDeserializer::new(map))? {
            Written { regex: Some(regex), present: None } => Ok(ValueMatch::Regex { regex }),
            Written { regex: None, present: Some(present) } => Ok(ValueMatch::Present { present }),
            _ => Err(de::Error::custom(
                "a value has one condition: write one of `regex` and `present`, or the value itself",
            )),
        }
    }
}

/// How long the client of an exchange may take.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Client {
    /// Between two pieces of the request body.
    pub body_idle: Time,
    /// Between two pieces of the response that it takes.
    pub write_idle: Time,
}

impl Default for Client {
    fn default() -> Self {
        Client { body_idle: Time::seconds(60), write_idle: Time::seconds(60) }
    }
}
