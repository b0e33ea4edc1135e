//! `retry:` of a route: when a request that failed is sent again.

use std::borrow::Cow;
use std::fmt;
use std::str::FromStr;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::de::{self, Deserializer};
use serde::{Deserialize, Serialize, Serializer};

use crate::config::units::{Count, Percent, Scalar, Time};

/// How often an endpoint may be chosen for one exchange.
pub const ATTEMPTS_MAX: u64 = 10;

/// When a request that failed is sent again. A kept connection that had died unnoticed costs no attempt.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Retry {
    /// How often an endpoint is chosen at most, the first time included: from 1, which is no retry, to 10.
    pub attempts: Count,
    /// What an attempt is repeated for: `connect_error` (no connection came about), `reset` (it broke off, or what came
    /// was no HTTP), `timeout` (of sending or waiting), a status such as `503`, or `grpc_unavailable` and the like (a
    /// gRPC answer without a message). Without a further attempt the client gets what there is.
    pub on: Vec<On>,
    /// From the choice of an endpoint to the header of its answer; longer is a `timeout`. As long as the timeouts of
    /// the upstream allow, if absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub per_try_timeout: Option<Time>,
    /// How long the next attempt waits.
    pub backoff: Backoff,
    /// Of the requests that an upstream has under way, the share that may be repetitions of what it was sent already.
    pub budget: Percent,
    /// The number of retries that may be active however small that share is.
    pub budget_least: Count,
    /// Whether it may be sent twice though its method does not promise that this is the same as once, such as `POST`,
    /// which is the method of every gRPC call.
    pub non_idempotent: bool,
    /// Whether it may go to an endpoint that it was at already, once all were tried: for an upstream behind one
    /// address.
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

/// How long the next attempt waits: any time up to `base`, then up to twice that and so on, up to `max`. One that goes
/// to another endpoint because nothing was sent to the first waits for nothing.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Backoff {
    /// The longest wait for the second attempt.
    pub base: Time,
    /// The longest wait of all. An endpoint that asks for a longer one by `Retry-After` is not asked again.
    pub max: Time,
}

impl Default for Backoff {
    fn default() -> Self {
        Backoff { base: Time::milliseconds(25), max: Time::milliseconds(250) }
    }
}

/// What an attempt is repeated for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum On {
    /// No connection came about.
    ConnectError,
    /// It broke off, or what came was no HTTP.
    Reset,
    /// It took too long to send the request, or to wait for the answer.
    Timeout,
    /// The endpoint answered with this status, from 400 to 599.
    Status(u16),
    /// The endpoint answered a gRPC call with this status and nothing else.
    Grpc(u8),
}

/// The gRPC statuses that may pass by themselves.
const GRPC: [(&str, u8); 5] = [
    ("grpc_cancelled", 1),
    ("grpc_deadline_exceeded", 4),
    ("grpc_resource_exhausted", 8),
    ("grpc_internal", 13),
    ("grpc_unavailable", 14),
];

/// Those that are written in words.
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
            format!("`{text}` is nothing to retry on: write a status from 400 to 599, `{}`", words.join("`, `"))
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
