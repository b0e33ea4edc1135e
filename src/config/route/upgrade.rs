//! Protocols besides HTTP that a route allows.

use schemars::JsonSchema;
use serde::de::{self, Deserializer};
use serde::{Deserialize, Serialize};

use crate::framing::is_token;

/// The name of an upgrade protocol, with an optional version (RFC 9110 §7.8): `websocket`, `SPDY/3.1`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(transparent)]
pub struct Protocol(String);

impl Protocol {
    /// The protocol that browsers use.
    pub const WEBSOCKET: &str = "websocket";

    /// Parses a protocol name.
    ///
    /// # Errors
    ///
    /// The name is invalid, or it is HTTP or TLS in any version: requests inside such a tunnel would bypass routes
    /// and filters.
    pub fn parse(text: &str) -> Result<Protocol, String> {
        let mut parts = text.split('/');
        let is_part = |part: &str| !part.is_empty() && part.bytes().all(is_token);
        let name = parts.next().unwrap_or_default();
        if !is_part(name) || !parts.next().is_none_or(is_part) || parts.next().is_some() {
            let text = text.escape_debug();
            return Err(format!("`{text}` is not a protocol: write one such as `websocket` or `SPDY/3.1`"));
        }
        if ["h2c", "h2", "h3", "http", "tls"].iter().any(|known| name.eq_ignore_ascii_case(known)) {
            return Err(format!("`{text}` cannot be switched to: requests in it would bypass routes and filters"));
        }
        Ok(Protocol(text.to_owned()))
    }

    /// Compares names without regard to case; versions must be equal.
    pub fn is(&self, name: &[u8]) -> bool {
        self.0.as_bytes().eq_ignore_ascii_case(name)
    }
}

impl<'de> Deserialize<'de> for Protocol {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Protocol, D::Error> {
        Protocol::parse(&String::deserialize(deserializer)?).map_err(de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_protocol_has_a_name_and_perhaps_a_version_and_is_not_http() {
        for name in ["websocket", "tcp", "SPDY/3.1", "derp"] {
            assert!(Protocol::parse(name).is_ok_and(|protocol| protocol.is(name.to_uppercase().as_bytes())), "{name}");
        }
        for name in ["", "a b", "a,b", "a/b/c", "a/", "/1", "h2c", "H2C", "h2", "HTTP/2.0", "TLS/1.2"] {
            assert!(Protocol::parse(name).is_err(), "{name:?}");
        }
        assert!(!Protocol::parse("SPDY/3.1").expect("a protocol").is(b"SPDY"));
    }
}
