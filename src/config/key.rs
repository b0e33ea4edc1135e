//! By what requests are told apart: the keys of rate limits and of balancing by hash.
//!
//! `filter/key.rs` takes them from a request.

use http::HeaderName;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::error::BuildError;
use crate::expression::{self, Moment};

/// Where rate limits, hashes and the like take their key from.
///
/// In YAML: `client_ip`, `path`, `route`, `{ header: x }`, `{ cookie: x }`, `{ query: x }` or `{ cel: "…" }`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Key {
    /// The client's address.
    ClientIp,
    /// The path of the request, in the one form that `paths` gives it.
    Path,
    /// The name of the route.
    Route,
    /// The value of a header; the first one, if there are several.
    Header(String),
    /// The value of a cookie; names are case-sensitive.
    Cookie(String),
    /// The value of a query argument, percent-decoded; the first one, if there are several.
    Query(String),
    /// What an expression makes; see `conf/manual/expressions.md`.
    Cel(String),
}

impl Key {
    /// Whether such a key can exist at all.
    ///
    /// # Errors
    /// A name that no header or cookie can have, or an expression that is none; the path is that of the choice.
    pub fn check(&self) -> Result<(), BuildError> {
        match self {
            Key::ClientIp | Key::Path | Key::Route => Ok(()),
            Key::Header(name) => header_name(name).map_err(|message| BuildError::new("header", message)),
            // RFC 6265 §4.1.1: the name of a cookie is a token, as that of a header.
            Key::Cookie(name) => {
                header_name(name).map_err(|_| BuildError::new("cookie", format!("`{name}` is no name of a cookie")))
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
    HeaderName::try_from(written).map(drop).map_err(|_| format!("`{written}` is no header name"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_that_cannot_exist_is_told() {
        let told = |key: Key| key.check().map_err(|error| error.to_string()).unwrap_err();
        assert_eq!(told(Key::Header("a b".into())), "header: `a b` is no header name");
        assert_eq!(told(Key::Cookie("a;b".into())), "cookie: `a;b` is no name of a cookie");
        assert_eq!(told(Key::Query(String::new())), "query: a query argument needs a name");
    }
}
