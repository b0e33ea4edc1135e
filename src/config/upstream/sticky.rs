//! `load_balancing.sticky:` of an upstream: a client stays at its endpoint.

use std::fmt;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::de::{self, Deserializer, SeqAccess, Visitor};
use serde::{Deserialize, Serialize};

use crate::config::units::Time;

/// A client stays at the endpoint that has served it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Sticky {
    /// By a cookie that Forebay sets and signs.
    pub cookie: StickyCookie,
}

/// A signed cookie that names the endpoint, without telling who it is.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct StickyCookie {
    /// Its name. Upstreams that serve the same hosts need a name each.
    pub name: String,
    /// What it is signed with: at least 16 bytes that nobody can guess, the same on every node, such as
    /// `${FOREBAY_STICKY_SECRET}`. Or a list: the first signs, all others are still believed, so that secrets can be
    /// changed.
    pub secret: Secrets,
    /// How long it holds from when it was set; it is set anew when half of that is over. Without it, as long as the
    /// browser keeps it: to the end of its session.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ttl: Option<Time>,
    /// With which requests from other sites browsers send it.
    #[serde(default)]
    pub same_site: SameSite,
}

impl StickyCookie {
    /// The least number of bytes of a secret.
    pub const SECRET_BYTES_MIN: usize = 16;
    /// The most secrets that may be believed at once.
    pub const SECRETS_MAX: usize = 8;
}

/// With which requests from other sites a browser sends a cookie (RFC 6265bis §4.1.2.7).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum SameSite {
    /// When a link is followed.
    #[default]
    Lax,
    /// With none.
    Strict,
    /// With all. Browsers take such a cookie over HTTPS only, so it is always `Secure`.
    None,
}

impl SameSite {
    /// How the cookie says it.
    pub fn name(self) -> &'static str {
        match self {
            SameSite::Lax => "Lax",
            SameSite::Strict => "Strict",
            SameSite::None => "None",
        }
    }
}

/// One secret, or several of which the first signs.
#[derive(Clone, PartialEq, Eq, Serialize)]
pub struct Secrets(pub Vec<String>);

/// Shows none of them.
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
