//! `outlier_detection:` of an upstream: what passing requests say against an endpoint, and what follows.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::config::units::{Count, Percent, Time};

/// When an endpoint is ejected for what passing requests say against it, and for how long. Nobody is asked for this; so
/// an endpoint to which no connection can be made is ejected unless that is `unlimited`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct OutlierDetection {
    /// Ejected after this number of answers of 500 and above in a row; failures of any kind count.
    pub consecutive_5xx: Count,
    /// Ejected after this number of answers of 502, 503 and 504 in a row; failures of any kind count.
    pub consecutive_gateway_errors: Count,
    /// Ejected after this number of connections in a row that could not be made.
    pub connect_failures: Count,
    /// A success rate that is much worse than that of the others. Without it, rates are not compared.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub success_rate: Option<SuccessRate>,
    /// A time to the first byte that is much longer than that of the others. Without it, times are not compared.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub latency: Option<Latency>,
    /// How long an endpoint is ejected the first time; each further time twice as long.
    pub base_ejection: Time,
    /// How long at most.
    pub max_ejection: Time,
    /// The share of the endpoints that may be ejected at once; of several, one always may, unless it is 0%.
    pub max_ejected: Percent,
    /// How often endpoints are compared.
    pub interval: Time,
}

impl Default for OutlierDetection {
    fn default() -> Self {
        OutlierDetection {
            consecutive_5xx: Count::UNLIMITED,
            consecutive_gateway_errors: Count::UNLIMITED,
            connect_failures: Count(5),
            success_rate: None,
            latency: None,
            base_ejection: Time::seconds(10),
            max_ejection: Time::seconds(300),
            max_ejected: Percent(50.0),
            interval: Time::seconds(10),
        }
    }
}

/// When the success rate of an endpoint, the share of its answers below 500, is too bad.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct SuccessRate {
    /// How far its success rate must be below the mean of the others, in their standard deviations.
    #[schemars(extend("minimum" = 0))]
    pub factor: f64,
    /// And at least so much below it.
    pub margin: Percent,
    /// The number of endpoints that must have had enough requests.
    pub endpoints: Count,
    /// The number of requests within an interval that is enough.
    pub requests: Count,
}

impl Default for SuccessRate {
    fn default() -> Self {
        SuccessRate { factor: 1.9, margin: Percent(5.0), endpoints: Count(3), requests: Count(100) }
    }
}

/// When an endpoint is too slow.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Latency {
    /// How many times the median of all its mean latency must be.
    #[schemars(extend("minimum" = 1))]
    pub factor: f64,
    /// And at least so much above it.
    pub margin: Time,
    /// The number of endpoints that must have had enough requests.
    pub endpoints: Count,
    /// The number of requests within an interval that is enough.
    pub requests: Count,
}

impl Default for Latency {
    fn default() -> Self {
        Latency { factor: 3.0, margin: Time::milliseconds(50), endpoints: Count(3), requests: Count(100) }
    }
}
