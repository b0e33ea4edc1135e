//! `paths:`: how request paths are normalized.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// How request paths are normalized. Routes, filters, keys, the log and the upstream all use the result, so that no
/// part reads a path differently.
///
/// It applies to all listeners because routes do. If two listeners normalized differently, a client could bypass a
/// route that guards a path.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Paths {
    /// Merges repeated slashes: `//admin` becomes `/admin`.
    pub merge_slashes: bool,
    /// What happens to `%2F`, and to `%5C` and backslashes, which some backends treat as slashes.
    pub encoded_slash: EncodedSlash,
    /// What happens to `.` and `..` segments, encoded or not.
    pub dot_segments: DotSegments,
}

impl Default for Paths {
    fn default() -> Self {
        Paths { merge_slashes: true, encoded_slash: EncodedSlash::Keep, dot_segments: DotSegments::Resolve }
    }
}

/// What happens to encoded slashes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum EncodedSlash {
    /// Stays encoded and does not separate segments. If it would separate dot segments, the request gets 400.
    Keep,
    /// Becomes a slash.
    Decode,
    /// The request gets 400.
    Refuse,
}

/// What happens to `.` and `..` segments.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum DotSegments {
    /// They are resolved: `/x/../files` becomes `/files`.
    Resolve,
    /// The request gets 400.
    Refuse,
}
