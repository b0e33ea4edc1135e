//! `load_balancing:` of an upstream: how an endpoint is chosen.

use std::fmt;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::de::value::{MapAccessDeserializer, StrDeserializer};
use serde::de::{self, Deserializer, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Serialize};

use super::sticky::Sticky;
use crate::config::Key;
use crate::config::units::{Percent, Time};

/// How an endpoint is chosen, for each attempt.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct LoadBalancing {
    /// The policy.
    pub policy: Policy,
    /// What `ring_hash` and `maglev` hash: `client_ip`, `path`, `route`, `{ header: x }`, `{ cookie: x }`, `{
    /// query: x }`, `{ cel: "…" }`, or a list, of which the first key in the request is used. A request without any
    /// of them goes to a random endpoint. Required for these policies, not allowed for others.
    #[serde(skip_serializing_if = "HashKey::is_empty")]
    pub hash_key: HashKey,
    /// With `ring_hash` and `maglev`: an endpoint gets at most this factor times its share of the active requests;
    /// further requests go to the next endpoint. Greater than 1, such as 1.25. Without it, popular keys may
    /// overload an endpoint.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(extend("exclusiveMinimum" = 1))]
    pub bounded_load: Option<f64>,
    /// Keeps a client on the endpoint that served it before, with any policy, while that endpoint is available.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sticky: Option<Sticky>,
    /// How long the share of a new or recovered endpoint takes to grow from a tenth to its full weight.
    pub slow_start: Time,
    /// The least share of a tier's endpoints that must be available. If fewer are, and no other tier compensates,
    /// requests go to all endpoints of the tier: when that many seem to fail, the checks are more likely wrong. 0%:
    /// never.
    pub panic: Percent,
}

impl Default for LoadBalancing {
    fn default() -> Self {
        LoadBalancing {
            policy: Policy::default(),
            hash_key: HashKey::default(),
            bounded_load: None,
            sticky: None,
            slow_start: Time::seconds(0),
            panic: Percent(30.0),
        }
    }
}

/// The policy that chooses an endpoint.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Policy {
    /// In turn, by weight, interleaved: weights 3 and 1 give a, a, b, a and not a, a, a, b.
    RoundRobin,
    /// At random, by weight.
    Random,
    /// Picks two at random by weight and takes the one with fewer active requests relative to its weight.
    #[default]
    LeastRequest,
    /// Picks two at random by weight and takes the one that should finish first, by its latency and its active
    /// requests.
    PeakEwma,
    /// By the hash of a key, on a ring: when an endpoint leaves, only its keys move.
    RingHash,
    /// By the hash of a key, in a table: shares are more even than on a ring, but a few more keys move.
    Maglev,
}

impl Policy {
    /// The name in the configuration.
    pub fn name(self) -> &'static str {
        match self {
            Policy::RoundRobin => "round_robin",
            Policy::Random => "random",
            Policy::LeastRequest => "least_request",
            Policy::PeakEwma => "peak_ewma",
            Policy::RingHash => "ring_hash",
            Policy::Maglev => "maglev",
        }
    }

    /// Whether the choice depends on a key.
    pub fn hashes(self) -> bool {
        matches!(self, Policy::RingHash | Policy::Maglev)
    }
}

/// One key, or several of which the first one in the request is used.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HashKey(pub Vec<Key>);

impl HashKey {
    /// Whether there are no keys.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl Serialize for HashKey {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.0.serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for HashKey {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(OneOrSeveral)
    }
}

struct OneOrSeveral;

impl<'de> Visitor<'de> for OneOrSeveral {
    type Value = HashKey;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a key such as `client_ip` or `{ header: x-user }`, or a list of keys")
    }

    fn visit_str<E: de::Error>(self, key: &str) -> Result<HashKey, E> {
        Key::deserialize(StrDeserializer::new(key)).map(|key| HashKey(vec![key]))
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<HashKey, A::Error> {
        Key::deserialize(MapAccessDeserializer::new(map)).map(|key| HashKey(vec![key]))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<HashKey, A::Error> {
        let mut keys = Vec::new();
        while let Some(key) = list.next_element()? {
            keys.push(key);
        }
        Ok(HashKey(keys))
    }
}

impl JsonSchema for HashKey {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "HashKey".into()
    }

    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        let key = generator.subschema_for::<Key>();
        json_schema!({
            "description": "One key or several, of which the first that a request has counts.",
            "anyOf": [
                { "enum": ["client_ip", "path", "route"] },
                {
                    "type": "object",
                    "patternProperties": { "^(header|cookie|query|cel)$": { "type": "string" } },
                    "additionalProperties": false,
                    "minProperties": 1,
                    "maxProperties": 1,
                },
                { "type": "array", "items": key, "minItems": 1 },
            ],
        })
    }
}
