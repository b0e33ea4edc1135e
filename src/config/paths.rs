//! `paths:`: how the paths of requests are read.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// How the paths of requests are read: by routes, filters, keys, the log and, so that no part reads them differently,
/// the upstream.
///
/// It holds for all listeners, for routes do: were a path read differently on two of them, a route that guards it could
/// be gone round through the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Paths {
    /// Whether several slashes in a row are one: `//admin` is `/admin`.
    pub merge_slashes: bool,
    /// What becomes of `%2F`; and of `%5C` and backslashes, which some backends take for slashes.
    pub encoded_slash: EncodedSlash,
    /// What becomes of `.` and `..` segments, encoded or not.
    pub dot_segments: DotSegments,
}

impl Default for Paths {
    fn default() -> Self {
        Paths { merge_slashes: true, encoded_slash: EncodedSlash::Keep, dot_segments: DotSegments::Resolve }
    }
}

/// What becomes of a slash that is encoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum EncodedSlash {
    /// It stays, and parts no segments. Where it would part dot segments from others, the request is refused with 400.
    Keep,
    /// It is a slash like any other.
    Decode,
    /// The request is refused with 400.
    Refuse,
}

/// What becomes of `.` and `..` segments.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum DotSegments {
    /// They are followed: `/x/../files` is `/files`.
    Resolve,
    /// The request is refused with 400.
    Refuse,
}
