//! The keys that tell requests apart, for rate limits and hash-based load balancing.
//!
//! `filter/key.rs` takes them from a request.

use http::HeaderName;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::error::BuildError;
use crate::expression::{self, Moment};

/// Where rate limits, hash policies and caches take their key from.
///
/// In YAML: `client_ip`, `path`, `route`, `{ header: x }`, `{ cookie: x }`, `{ query: x }` or `{ cel: "…" }`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Key {
    /// The client's address.
    ClientIp,
    /// The normalized path of the request; see `paths`.
    Path,
    /// The name of the route.
    Route,
    /// The value of a header field; the first one if there are several.
    Header(String),
    /// The value of a cookie; names are case-sensitive.
    Cookie(String),
    /// The value of a query argument, percent-decoded; the first one, if there are several.
    Query(String),
    /// The result of an expression; see `conf/manual/expressions.md`.
    Cel(String),
}

impl Key {
    /// Checks that requests can have such a key.
    ///
    /// # Errors
    ///
    /// The name is not a valid header or cookie name, or the expression has errors; the path is that of
    /// the choice.
    pub fn check(&self) -> Result<(), BuildError> {
        match self {
            Key::ClientIp | Key::Path | Key::Route => Ok(()),
            Key::Header(name) => header_name(name).map_err(|message| BuildError::new("header", message)),
            // RFC 6265 §4.1.1: the name of a cookie is a token, like that of a header field.
            Key::Cookie(name) => {
                header_name(name).map_err(|_| BuildError::new("cookie", format!("`{name}` is not a valid cookie name")))
            }
            Key::Query(name) if name.is_empty() => Err(BuildError::new("query", "a query argument needs a name")),
            Key::Query(_) => Ok(()),
            Key::Cel(written) => {
                expression::Value::build(written, Moment::Request).map(drop).map_err(|error| error.under("cel"))
            }
        }
    }
}

fn header_name(written: &str) -> Result<(), String> {
    HeaderName::try_from(written).map(drop).map_err(|_| format!("`{written}` is not a valid header name"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_that_cannot_exist_is_told() {
        let told = |key: Key| key.check().map_err(|error| error.to_string()).unwrap_err();
        assert_eq!(told(Key::Header("a b".into())), "header: `a b` is not a valid header name");
        assert_eq!(told(Key::Cookie("a;b".into())), "cookie: `a;b` is not a valid cookie name");
        assert_eq!(told(Key::Query(String::new())), "query: a query argument needs a name");
    }
}
