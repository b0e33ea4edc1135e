//! Where the endpoints of an upstream are told of: `endpoints:`.

use std::num::NonZeroU32;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::config::Address;

/// One server of an upstream.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Endpoint {
    /// `host:port`, `[v6]:port` or `unix:/path`. A host name is resolved at start and again in the background.
    pub address: Address,
    /// Its share of the requests, relative to its neighbours.
    #[serde(default = "Endpoint::default_weight")]
    pub weight: NonZeroU32,
}

impl Endpoint {
    pub(crate) fn default_weight() -> NonZeroU32 {
        NonZeroU32::MIN
    }
}
