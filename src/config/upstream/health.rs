//! `health_check:` of an upstream: active health checks.

use std::fmt;
use std::ops::RangeInclusive;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::de::{self, Deserializer, Visitor};
use serde::{Deserialize, Serialize, Serializer};

use crate::config::units::{Count, Percent, Time};

/// Active health checks: exactly one of `http`, `tcp` and `grpc`. Each check uses a new connection, with the
/// upstream's protocol and TLS settings.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct HealthCheck {
    /// Sends a GET request.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub http: Option<HttpCheck>,
    /// Connects, TLS handshake included: `tcp: {}`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tcp: Option<TcpCheck>,
    /// Calls `grpc.health.v1.Health/Check`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub grpc: Option<GrpcCheck>,
    /// Time from the start of one check of an endpoint to the start of the next.
    pub interval: Time,
    /// Random variation of each interval, so that the checks of many gateways do not coincide.
    pub jitter: Percent,
    /// Time limit of a check; after it the check has failed.
    pub timeout: Time,
    /// Failed checks in a row that make an endpoint unhealthy. The very first check decides alone.
    pub unhealthy_after: Count,
    /// Passed checks in a row that make it healthy again.
    pub healthy_after: Count,
    /// The state of an endpoint before its first check has ended.
    pub initial: Initial,
    /// Limit on simultaneous checks of the upstream; further ones start late.
    pub at_once: Count,
}

impl Default for HealthCheck {
    fn default() -> Self {
        HealthCheck {
            http: None,
            tcp: None,
            grpc: None,
            interval: Time::seconds(5),
            jitter: Percent(10.0),
            timeout: Time::seconds(1),
            unhealthy_after: Count(3),
            healthy_after: Count(2),
            initial: Initial::Healthy,
            at_once: Count(256),
        }
    }
}

impl HealthCheck {
    /// The kinds of checks that are configured.
    pub fn kinds(&self) -> impl Iterator<Item = &'static str> {
        let (http, tcp, grpc) = (self.http.is_some(), self.tcp.is_some(), self.grpc.is_some());
        [(http, "http"), (tcp, "tcp"), (grpc, "grpc")].into_iter().filter_map(|(asked, kind)| asked.then_some(kind))
    }
}

/// A check with a GET request.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct HttpCheck {
    /// The request target, path and query.
    pub path: String,
    /// The `Host` of the request; by default the endpoint's address as written.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub host: Option<String>,
    /// The statuses of a healthy endpoint: single ones such as 200, and ranges such as 200-299.
    pub statuses: Vec<Statuses>,
    /// Text that the first 64KiB of the body must contain. Without it, the body is not read.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub body: Option<String>,
}

impl Default for HttpCheck {
    fn default() -> Self {
        HttpCheck { path: "/".to_owned(), host: None, statuses: vec![Statuses { first: 200, last: 399 }], body: None }
    }
}

/// A check that only connects.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct TcpCheck {}

/// A check that calls `grpc.health.v1.Health/Check`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct GrpcCheck {
    /// The service that must be serving; empty: the server as a whole.
    pub service: String,
    /// The `:authority` of the call; by default the endpoint's address as written.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub host: Option<String>,
}

/// The state of an endpoint before its first check has ended.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Initial {
    /// It gets requests.
    #[default]
    Healthy,
    /// It gets no requests.
    Unhealthy,
}

/// A status or a range of statuses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Statuses {
    /// The lowest.
    pub first: u16,
    /// The highest.
    pub last: u16,
}

impl Statuses {
    /// Whether the range contains this status.
    pub fn contains(self, status: u16) -> bool {
        (self.first..=self.last).contains(&status)
    }

    fn parse(text: &str) -> Option<Statuses> {
        const POSSIBLE: RangeInclusive<u16> = 100..=599;
        let (first, last) = text.split_once('-').unwrap_or((text, text));
        let (first, last) = (first.trim().parse().ok()?, last.trim().parse().ok()?);
        (POSSIBLE.contains(&first) && POSSIBLE.contains(&last) && first <= last).then_some(Statuses { first, last })
    }
}

impl fmt::Display for Statuses {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.first == self.last {
            true => write!(f, "{}", self.first),
            false => write!(f, "{}-{}", self.first, self.last),
        }
    }
}

impl Serialize for Statuses {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self.first == self.last {
            true => serializer.serialize_u16(self.first),
            false => serializer.collect_str(self),
        }
    }
}

impl<'de> Deserialize<'de> for Statuses {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(Written)
    }
}

struct Written;

impl Visitor<'_> for Written {
    type Value = Statuses;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a status such as 200, or a range such as 200-299")
    }

    fn visit_u64<E: de::Error>(self, status: u64) -> Result<Statuses, E> {
        self.visit_str(&status.to_string())
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<Statuses, E> {
        let none =
            || E::custom(format!("`{text}` is not a status: write one from 100 to 599, or a range such as `200-299`"));
        Statuses::parse(text).ok_or_else(none)
    }
}

impl JsonSchema for Statuses {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "Statuses".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "description": "A status such as 200, or a range such as 200-299.",
            "type": ["integer", "string"],
            "minimum": 100,
            "maximum": 599,
            "pattern": r"^[1-5][0-9]{2}( ?- ?[1-5][0-9]{2})?$|\$\{",
            "examples": [200, "200-299"],
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn statuses_are_one_or_a_range() {
        let range = |text: &str| Statuses::parse(text).map(|found| (found.first, found.last));
        assert_eq!(
            (range("204"), range("200-299"), range("200 - 399")),
            (Some((204, 204)), Some((200, 299)), Some((200, 399)))
        );
        for text in ["", "2xx", "99", "600", "299-200", "200-", "-299", "200-299-300"] {
            assert_eq!(range(text), None, "{text}");
        }
        assert_eq!(
            range("200-299").zip(range("204")).map(|_| Statuses { first: 200, last: 299 }.to_string()).as_deref(),
            Some("200-299")
        );
    }
}
