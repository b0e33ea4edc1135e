//! `retry:` of a route: when a failed request is sent again.

use std::borrow::Cow;
use std::fmt;
use std::str::FromStr;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::de::{self, Deserializer};
use serde::{Deserialize, Serialize, Serializer};

use crate::config::units::{Count, Percent, Scalar, Time};

/// Limit on `attempts`.
pub const ATTEMPTS_MAX: u64 = 10;

/// When a failed request is sent again. A failure on a reused connection that the peer had already closed does not
/// count as an attempt.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Retry {
    /// Attempts including the first: from 1 (no retry) to 10.
    pub attempts: Count,
    /// The failures that are retried: `connect_error` (no connection), `reset` (the connection broke, or the
    /// response was not valid HTTP), `timeout` (of `send` or `wait`), a status such as `503`, or a gRPC status such
    /// as `grpc_unavailable` (in a response without a message). After the last attempt the client gets its result.
    pub on: Vec<On>,
    /// Time limit from the choice of an endpoint to the response header; it counts as `timeout`. Without it, only
    /// the timeouts of the upstream apply.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub per_try_timeout: Option<Time>,
    /// The delay before the next attempt.
    pub backoff: Backoff,
    /// Retries as a share of the upstream's active requests.
    pub budget: Percent,
    /// Active retries that are always allowed, even if they exceed `budget`.
    pub budget_least: Count,
    /// Allows retries of requests with non-idempotent methods, such as `POST` (and so every gRPC call), after a
    /// part of the request may have been processed.
    pub non_idempotent: bool,
    /// Allows retries at an endpoint that already failed, after all endpoints were tried: useful if all backends
    /// share one address.
    pub same_endpoint: bool,
}

impl Default for Retry {
    fn default() -> Self {
        Retry {
            attempts: Count(3),
            on: vec![On::ConnectError, On::Reset],
            per_try_timeout: None,
            backoff: Backoff::default(),
            budget: Percent(50.0),
            budget_least: Count(3),
            non_idempotent: false,
            same_endpoint: false,
        }
    }
}

/// The delay before the next attempt: a random time up to `base`, then up to twice that and so on, up to `max`.
/// There is no delay if nothing was sent to the first endpoint and the next attempt uses another one.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Backoff {
    /// Longest delay before the second attempt.
    pub base: Time,
    /// Longest delay of all. If an endpoint's `Retry-After` asks for a longer one, that endpoint gets no retry.
    pub max: Time,
}

impl Default for Backoff {
    fn default() -> Self {
        Backoff { base: Time::milliseconds(25), max: Time::milliseconds(250) }
    }
}

/// A failure that is retried.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum On {
    /// No connection could be made.
    ConnectError,
    /// The connection broke, or the response was not valid HTTP.
    Reset,
    /// Sending the request or waiting for the response took too long.
    Timeout,
    /// The endpoint answered with this status, from 400 to 599.
    Status(u16),
    /// The endpoint answered a gRPC call with this status and without a message.
    Grpc(u8),
}

/// The gRPC statuses that are possibly transient.
const GRPC: [(&str, u8); 5] = [
    ("grpc_cancelled", 1),
    ("grpc_deadline_exceeded", 4),
    ("grpc_resource_exhausted", 8),
    ("grpc_internal", 13),
    ("grpc_unavailable", 14),
];

/// The failures that are written as words.
const WORDS: [(&str, On); 3] = [("connect_error", On::ConnectError), ("reset", On::Reset), ("timeout", On::Timeout)];

impl FromStr for On {
    type Err = String;

    fn from_str(text: &str) -> Result<On, String> {
        let word = WORDS.iter().find(|(word, _)| *word == text).map(|&(_, on)| on);
        let grpc = || GRPC.iter().find(|(word, _)| *word == text).map(|&(_, code)| On::Grpc(code));
        let status = || text.parse().ok().filter(|status| (400..600).contains(status)).map(On::Status);
        word.or_else(grpc).or_else(status).ok_or_else(|| {
            let words: Vec<&str> =
                WORDS.iter().map(|(word, _)| *word).chain(GRPC.iter().map(|(word, _)| *word)).collect();
            format!("`{text}` is not a retry condition: write a status from 400 to 599, `{}`", words.join("`, `"))
        })
    }
}

impl fmt::Display for On {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            On::Status(status) => status.fmt(f),
            On::Grpc(code) => GRPC.iter().find(|(_, of)| of == code).map_or("grpc", |(word, _)| word).fmt(f),
            word => WORDS.iter().find(|(_, on)| on == word).map_or("", |(word, _)| word).fmt(f),
        }
    }
}

impl<'de> Deserialize<'de> for On {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let expected = "a status such as `503`, or `connect_error`, `reset`, `timeout`, `grpc_unavailable` or the like";
        deserializer.deserialize_any(Scalar(expected))?.parse().map_err(de::Error::custom)
    }
}

impl Serialize for On {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            On::Status(status) => serializer.serialize_u16(*status),
            word => serializer.collect_str(word),
        }
    }
}

impl JsonSchema for On {
    fn schema_name() -> Cow<'static, str> {
        "On".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        let words: Vec<&str> = WORDS.iter().map(|(word, _)| *word).chain(GRPC.iter().map(|(word, _)| *word)).collect();
        json_schema!({
            "description": "What an attempt is repeated for.",
            "anyOf": [
                { "enum": words },
                { "type": "integer", "minimum": 400, "maximum": 599 },
            ],
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_printed_reads_back_the_same() {
        for text in ["connect_error", "reset", "timeout", "grpc_unavailable", "grpc_cancelled", "503", "429"] {
            assert_eq!(text.parse::<On>().map(|on| on.to_string()), Ok(text.to_owned()));
        }
        for text in ["200", "600", "5xx", "grpc_ok", ""] {
            assert!(text.parse::<On>().is_err(), "{text}");
        }
    }
}
