//! `outlier_detection:` of an upstream: passive health checks.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::config::units::{Count, Percent, Time};

/// When an endpoint is ejected because of the results of requests, and for how long. By default only failed
/// connections count; `connect_failures: unlimited` turns that off.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct OutlierDetection {
    /// Ejects after this many responses of 500 and above in a row; failures of any kind count.
    pub consecutive_5xx: Count,
    /// Ejects after this many responses of 502, 503 and 504 in a row; failures of any kind count.
    pub consecutive_gateway_errors: Count,
    /// Ejects after this many failed connections in a row.
    pub connect_failures: Count,
    /// Ejects endpoints whose success rate is far below that of the others. Without it, rates are not compared.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub success_rate: Option<SuccessRate>,
    /// Ejects endpoints whose time to first byte is far above that of the others. Without it, times are not
    /// compared.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub latency: Option<Latency>,
    /// How long an endpoint is ejected the first time; the time doubles each further time.
    pub base_ejection: Time,
    /// Longest ejection.
    pub max_ejection: Time,
    /// The share of endpoints that may be ejected at once. One of several always may, unless this is 0%.
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

/// When a success rate, the share of responses below 500, is too low.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct SuccessRate {
    /// Least distance below the mean of the others, in their standard deviations.
    #[schemars(extend("minimum" = 0))]
    pub factor: f64,
    /// Least distance below the mean, in percentage points.
    pub margin: Percent,
    /// Least number of endpoints with enough requests.
    pub endpoints: Count,
    /// Least number of requests per interval for an endpoint to be compared.
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
    /// The factor above the median of all endpoints that its mean latency must reach.
    #[schemars(extend("minimum" = 1))]
    pub factor: f64,
    /// Least distance above the median.
    pub margin: Time,
    /// Least number of endpoints with enough requests.
    pub endpoints: Count,
    /// Least number of requests per interval for an endpoint to be compared.
    pub requests: Count,
}

impl Default for Latency {
    fn default() -> Self {
        Latency { factor: 3.0, margin: Time::milliseconds(50), endpoints: Count(3), requests: Count(100) }
    }
}
