//! `request_id`: gives every request an id, so that the log lines of all systems about it can be correlated.
//!
//! This is the filter to copy: settings, an example, code and tests.
//!
//! ```yaml
//! - request_id:
//!     header: X-Request-Id
//!     trust: never               # or always: keep the client's id
//!     response: true             # the client gets it, too
//! ```

use std::fmt::Write;

use async_trait::async_trait;
use bytes::Bytes;
use http::{HeaderName, HeaderValue};
use pingora::http::{RequestHeader, ResponseHeader};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::field::{self, Field, Fields};
use super::{Filter, FilterType, Scope, Stages, Surroundings, Verdict};
use crate::error::BuildError;

/// Gives every request an id of 32 hex digits (128 random bits), in a header for the upstream.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Settings {
    /// The header with the id.
    pub header: String,
    /// Whether the client's id is kept.
    pub trust: Trust,
    /// Whether the response also has the id.
    pub response: bool,
}

/// Whose ids are trusted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Trust {
    /// Every request gets a new id.
    Never,
    /// The client's id is kept if it is well-formed: 1 to 128 characters of `A-Z a-z 0-9 . _ -`.
    Always,
}

impl Default for Settings {
    fn default() -> Self {
        Settings { header: "X-Request-Id".to_owned(), trust: Trust::Never, response: true }
    }
}

/// Gives requests their ids.
pub struct RequestId {
    name: HeaderName,
    /// The same name, in the case in which it is sent.
    written: Bytes,
    trust: Trust,
    response: bool,
}

#[async_trait]
impl Filter for RequestId {
    fn stages(&self) -> Stages {
        if self.response { Stages::REQUEST | Stages::RESPONSE } else { Stages::REQUEST }
    }

    fn own_headers(&self) -> Vec<HeaderName> {
        vec![self.name.clone()]
    }

    async fn request(&self, scope: &mut Scope<'_>) -> Verdict {
        let sent = (self.trust == Trust::Always).then(|| self.sent(scope.request)).flatten();
        let field = Field { name: self.written.clone(), value: sent.unwrap_or_else(fresh) };
        scope.request.set(&field);
        if self.response {
            // Stored here instead of reading the request later, where a following filter may have removed it.
            scope.keep(field);
        }
        Verdict::Continue
    }

    async fn response(&self, scope: &mut Scope<'_>, response: &mut ResponseHeader) -> Verdict {
        if let Some(field) = scope.kept::<Field>() {
            response.set(field);
        }
        Verdict::Continue
    }
}

impl FilterType for RequestId {
    const KEY: &'static str = "request_id";
    type Settings = Settings;

    fn build(settings: &Settings, _: &Surroundings<'_>) -> Result<Self, BuildError> {
        let name = field::free_name(&settings.header).map_err(|message| BuildError::new("header", message))?;
        let written = Bytes::copy_from_slice(settings.header.as_bytes());
        Ok(RequestId { name, written, trust: settings.trust, response: settings.response })
    }
}

impl RequestId {
    /// The client's id, if there is exactly one and it is well-formed, since it is logged.
    fn sent(&self, request: &RequestHeader) -> Option<HeaderValue> {
        let mut values = request.headers.get_all(&self.name).iter();
        let (Some(value), None) = (values.next(), values.next()) else { return None };
        let letter = |byte: &u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-');
        ((1..=128).contains(&value.len()) && value.as_bytes().iter().all(letter)).then(|| value.clone())
    }
}

/// A new id. The generator is cryptographic, so that ids cannot be guessed; each thread has its own.
fn fresh() -> HeaderValue {
    let mut digits = String::with_capacity(32);
    let _ = write!(digits, "{:032x}", rand::random::<u128>());
    HeaderValue::try_from(digits).expect("hex digits are visible ASCII")
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::super::rehearsal::{Rehearsal, chain, error, example, values};

    fn id(rehearsal: &mut Rehearsal) -> String {
        values(&rehearsal.pass().headers, "x-request-id").join("|")
    }

    #[test]
    fn the_example_builds() {
        assert!(chain(&example(include_str!("request_id.rs"))).is_ok());
    }

    #[test]
    fn the_upstream_and_the_client_get_the_same_fresh_id() {
        let mut rehearsal = Rehearsal::of("- request_id: {}").asking("/", &[("x-request-id", "mine")]);
        let id = id(&mut rehearsal);
        assert_eq!(id.len(), 32);
        assert!(id.bytes().all(|byte| byte.is_ascii_hexdigit()));
        assert_eq!(values(&rehearsal.respond(&[("x-request-id", "of the upstream")]), "x-request-id"), [id]);
    }

    #[test]
    fn no_two_requests_have_one_id() {
        let mut rehearsal = Rehearsal::of("- request_id: {}");
        let ids: HashSet<String> = (0..1000).map(|_| id(&mut rehearsal)).collect();
        assert_eq!(ids.len(), 1000);
    }

    #[test]
    fn the_name_goes_out_as_it_was_written() {
        let mut rehearsal = Rehearsal::of("- request_id: { header: X-TRACE }");
        let mut wire = Vec::new();
        rehearsal.pass().header_to_h1_wire(&mut wire);
        assert!(wire.starts_with(b"X-TRACE: "));
    }

    #[test]
    fn a_trusted_id_is_kept_if_it_is_one_and_well_formed() {
        let asking = |headers: &[(&'static str, &str)]| {
            id(&mut Rehearsal::of("- request_id: { trust: always }").asking("/", headers))
        };
        assert_eq!(asking(&[("x-request-id", "a.B_3-")]), "a.B_3-");
        for bad in ["", "a b", "<script>", "é", &"x".repeat(129)] {
            assert_eq!(asking(&[("x-request-id", bad)]).len(), 32, "{bad}");
        }
        assert_eq!(asking(&[("x-request-id", "a"), ("x-request-id", "b")]).len(), 32);
        assert_eq!(asking(&[]).len(), 32);
    }

    #[test]
    fn the_response_can_be_left_alone() {
        let mut rehearsal = Rehearsal::of("- request_id: { response: false }");
        rehearsal.pass();
        assert!(rehearsal.respond(&[]).is_empty());
    }

    #[test]
    fn the_id_survives_its_removal_from_the_request() {
        let mut rehearsal =
            Rehearsal::of("[ { request_id: {} }, { headers: { request: { remove: [X-Request-Id] } } } ]");
        assert!(rehearsal.pass().headers.is_empty());
        assert_eq!(rehearsal.respond(&[]).len(), 1);
    }

    #[test]
    fn wrong_settings_are_told_with_their_place() {
        let told = "[0].request_id.header: `X Id` is not a valid header name";
        assert_eq!(error("- request_id: { header: X Id }"), told);
        let told = "[0].request_id.header: `Connection` belongs to the connection, and Forebay sets it itself";
        assert_eq!(error("- request_id: { header: Connection }"), told);
        let told = "[0].request_id.trust: unknown variant `yes`, expected `never` or `always`";
        assert_eq!(error("- request_id: { trust: 'yes' }"), told);
        let told = "[0].request_id.heder: unknown field `heder`, expected one of `header`, `trust`, `response`";
        assert_eq!(error("- request_id: { heder: x }"), told);
    }
}
