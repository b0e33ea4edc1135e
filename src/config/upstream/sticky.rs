//! `load_balancing.sticky:` of an upstream: session affinity.

use std::fmt;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::de::{self, Deserializer, SeqAccess, Visitor};
use serde::{Deserialize, Serialize};

use crate::config::units::Time;

/// Session affinity: a client stays on the endpoint that served it before.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Sticky {
    /// With a cookie that Forebay sets and signs.
    pub cookie: StickyCookie,
}

/// A signed cookie that identifies the endpoint without revealing its address.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct StickyCookie {
    /// The name of the cookie. Upstreams that serve the same hosts need different names.
    pub name: String,
    /// The signing key: at least 16 bytes, random, the same on every node, such as `${FOREBAY_STICKY_SECRET}`. Or a
    /// list for rotation: the first key signs, all keys verify.
    pub secret: Secrets,
    /// The lifetime of the cookie; it is renewed after half of it. Without it, the cookie lasts for the browser
    /// session.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ttl: Option<Time>,
    /// The `SameSite` attribute: which cross-site requests carry the cookie.
    #[serde(default)]
    pub same_site: SameSite,
}

impl StickyCookie {
    /// Least length of a secret in bytes.
    pub const SECRET_BYTES_MIN: usize = 16;
    /// Limit on secrets.
    pub const SECRETS_MAX: usize = 8;
}

/// Which cross-site requests carry the cookie (RFC 6265bis §4.1.2.7).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum SameSite {
    /// Top-level navigation, such as a followed link.
    #[default]
    Lax,
    /// None of them.
    Strict,
    /// All of them. Browsers accept such a cookie only over HTTPS, so it is always `Secure`.
    None,
}

impl SameSite {
    /// The value of the attribute.
    pub fn name(self) -> &'static str {
        match self {
            SameSite::Lax => "Lax",
            SameSite::Strict => "Strict",
            SameSite::None => "None",
        }
    }
}

/// One secret, or several of which the first one signs.
#[derive(Clone, PartialEq, Eq, Serialize)]
pub struct Secrets(pub Vec<String>);

/// Hides the secrets.
impl fmt::Debug for Secrets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} secrets", self.0.len())
    }
}

impl<'de> Deserialize<'de> for Secrets {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(OneOrSeveral)
    }
}

struct OneOrSeveral;

impl<'de> Visitor<'de> for OneOrSeveral {
    type Value = Secrets;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a secret, or a list of secrets")
    }

    fn visit_str<E: de::Error>(self, secret: &str) -> Result<Secrets, E> {
        Ok(Secrets(vec![secret.to_owned()]))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Secrets, A::Error> {
        let mut secrets = Vec::new();
        while let Some(secret) = list.next_element()? {
            secrets.push(secret);
        }
        Ok(Secrets(secrets))
    }
}

impl JsonSchema for Secrets {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "Secrets".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        let secret = json_schema!({ "type": "string", "minLength": 1 });
        json_schema!({
            "description": "One secret, or several of which the first signs.",
            "anyOf": [ secret, { "type": "array", "items": secret, "minItems": 1, "maxItems": StickyCookie::SECRETS_MAX } ],
        })
    }
}
