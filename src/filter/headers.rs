//! `headers`: removes, sets and adds header fields, on the way to the upstream and on the way back.
//!
//! ```yaml
//! - headers:
//!     request:
//!       remove: [Cookie]
//!       set: { Host: app.internal, X-Edge: forebay }     # in place of what is there
//!     response:
//!       remove: [Server, X-Powered-By]
//!       set: { Strict-Transport-Security: max-age=31536000 }
//!       add: { Link: "</style.css>; rel=preload" }       # besides what is there
//! ```

use std::collections::BTreeMap;

use async_trait::async_trait;
use bytes::Bytes;
use http::header::HOST;
use http::uri::Authority;
use http::{HeaderName, Uri};
use pingora::http::{RequestHeader, ResponseHeader};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::field::{self, Field, Fields};
use super::{Filter, FilterType, Scope, Stages, Verdict};
use crate::error::BuildError;

/// Removes, sets and adds header fields. Fields that frame a message or belong to a connection cannot be touched.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Settings {
    /// What the upstream sees. `Host` can be set here.
    pub request: HeaderChanges,
    /// What the client sees.
    pub response: HeaderChanges,
}

/// Changes to the fields of one header, in this order: `remove`, `set`, `add`.
#[derive(Clone, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct HeaderChanges {
    /// Fields that are taken away.
    pub remove: Vec<String>,
    /// Fields that stand in place of all of the same name.
    pub set: BTreeMap<String, String>,
    /// Fields that are added to those of the same name.
    pub add: BTreeMap<String, String>,
}

/// Changes header fields.
pub struct Headers {
    request: Changes,
    response: Changes,
    /// The `Host` that `request` sets.
    host: Option<Authority>,
}

#[derive(Default)]
struct Changes {
    remove: Vec<HeaderName>,
    set: Vec<Field>,
    add: Vec<Field>,
}

#[async_trait]
impl Filter for Headers {
    fn stages(&self) -> Stages {
        let request = if self.request.is_empty() { Stages::NONE } else { Stages::REQUEST };
        let response = if self.response.is_empty() { Stages::NONE } else { Stages::RESPONSE };
        request | response
    }

    async fn request(&self, scope: &mut Scope<'_>) -> Verdict {
        self.request.apply(scope.request);
        if let Some(host) = &self.host {
            agree(scope.request, host);
        }
        Verdict::Continue
    }

    async fn response(&self, _: &mut Scope<'_>, response: &mut ResponseHeader) -> Verdict {
        self.response.apply(response);
        Verdict::Continue
    }
}

impl FilterType for Headers {
    const KEY: &'static str = "headers";
    type Settings = Settings;

    fn build(settings: &Settings) -> Result<Self, BuildError> {
        for (side, changes) in [("request", &settings.request), ("response", &settings.response)] {
            check_once(&changes.set).map_err(|error| error.under("set").under(side))?;
        }
        let mut written = settings.request.clone();
        let host = take_host(&mut written.set)?;
        let mut request = Changes::build(&written).map_err(|error| error.under("request"))?;
        if let Some((field, _)) = &host {
            request.set.push(field.clone());
        }
        let response = Changes::build(&settings.response).map_err(|error| error.under("response"))?;
        if request.is_empty() && response.is_empty() {
            let message = "nothing to do: write `request` or `response` with `remove`, `set` or `add`";
            return Err(BuildError::new("", message));
        }
        Ok(Headers { request, response, host: host.map(|(_, authority)| authority) })
    }
}

impl Changes {
    fn build(written: &HeaderChanges) -> Result<Changes, BuildError> {
        let remove = written.remove.iter().enumerate().map(|(index, name)| {
            field::free_name(name).map_err(|message| BuildError::new(format!("remove[{index}]"), message))
        });
        Ok(Changes {
            remove: remove.collect::<Result<_, _>>()?,
            set: fields(&written.set).map_err(|error| error.under("set"))?,
            add: fields(&written.add).map_err(|error| error.under("add"))?,
        })
    }

    fn is_empty(&self) -> bool {
        self.remove.is_empty() && self.set.is_empty() && self.add.is_empty()
    }

    fn apply(&self, header: &mut impl Fields) {
        self.remove.iter().for_each(|name| header.remove(name));
        self.set.iter().for_each(|field| header.set(field));
        self.add.iter().for_each(|field| header.add(field));
    }
}

/// Fields from names and values; errors stand at the name.
fn fields(written: &BTreeMap<String, String>) -> Result<Vec<Field>, BuildError> {
    let field = |(name, value): (&String, &String)| {
        let at = |message| BuildError::at_key(name, message);
        field::free_name(name).map_err(at)?;
        let value = field::value(value).map_err(at)?;
        Ok(Field { name: Bytes::copy_from_slice(name.as_bytes()), value })
    };
    written.iter().map(field).collect()
}

/// YAML tells `X-A` and `x-a` apart and HTTP does not: one of two such values would be lost.
fn check_once(set: &BTreeMap<String, String>) -> Result<(), BuildError> {
    let twin = |name: &&String| set.range::<String, _>(..*name).any(|(other, _)| other.eq_ignore_ascii_case(name));
    match set.keys().find(twin) {
        Some(name) => Err(BuildError::at_key(name, format!("`{name}` is set twice, for case makes no difference"))),
        None => Ok(()),
    }
}

/// Takes `Host`, in any case, from what is to be set on the request: it is checked as a host, not as any value.
fn take_host(set: &mut BTreeMap<String, String>) -> Result<Option<(Field, Authority)>, BuildError> {
    let Some(name) = set.keys().find(|name| name.eq_ignore_ascii_case(HOST.as_str())).cloned() else {
        return Ok(None);
    };
    let written = set.remove(&name).unwrap_or_default();
    let at = |message: String| BuildError::at_key(&name, message).under("request.set");
    let authority = field::host(&written).ok_or_else(|| {
        at(format!("`{written}` is no host: write a name or an address, with a port if need be: `app.internal:8080`"))
    })?;
    let value = field::value(&written).map_err(at)?;
    Ok(Some((Field { name: Bytes::from_static(b"Host"), value }, authority)))
}

/// Makes the request target say the same as `Host`, if it names a host at all: on HTTP/2 Pingora would put the
/// target's `:authority` back in its place.
fn agree(request: &mut RequestHeader, host: &Authority) {
    if request.uri.authority().is_none() {
        return;
    }
    let mut parts = request.uri.clone().into_parts();
    parts.authority = Some(host.clone());
    if let Ok(uri) = Uri::from_parts(parts) {
        request.set_uri(uri);
    }
}

#[cfg(test)]
mod tests {
    use super::super::rehearsal::{Rehearsal, chain, error, example, values};
    use super::*;

    #[test]
    fn the_example_builds() {
        assert!(chain(&example(include_str!("headers.rs"))).is_ok());
    }

    #[test]
    fn fields_are_removed_then_set_then_added() {
        let mut rehearsal = Rehearsal::of(
            "- headers: { request: { add: { X-A: added, X-B: added }, set: { X-A: set, X-C: set }, remove: [X-B, x-d] } }",
        );
        rehearsal = rehearsal.asking("/", &[("x-a", "1"), ("x-a", "2"), ("x-b", "3"), ("x-d", "4"), ("x-e", "5")]);
        let headers = &rehearsal.pass().headers;
        assert_eq!(values(headers, "x-a"), ["set", "added"]);
        assert_eq!(values(headers, "x-b"), ["added"]);
        assert_eq!(values(headers, "x-c"), ["set"]);
        assert_eq!(values(headers, "x-d"), [""; 0]);
        assert_eq!(values(headers, "x-e"), ["5"]);
    }

    #[test]
    fn the_response_is_changed_in_the_same_way() {
        let mut rehearsal =
            Rehearsal::of("- headers: { response: { remove: [Server], set: { X-A: b }, add: { Set-Cookie: c=d } } }");
        let headers = rehearsal.respond(&[("server", "x"), ("x-a", "1"), ("set-cookie", "a=b")]);
        assert_eq!(values(&headers, "server"), [""; 0]);
        assert_eq!(values(&headers, "x-a"), ["b"]);
        assert_eq!(values(&headers, "set-cookie"), ["a=b", "c=d"]);
    }

    #[test]
    fn a_side_that_is_left_alone_costs_nothing() {
        let wants = |yaml| chain(yaml).unwrap_or_default().wants(Stages::RESPONSE);
        assert!(wants("- headers: { response: { remove: [Server] } }"));
        assert!(!wants("- headers: { request: { remove: [Cookie] } }"));
    }

    #[test]
    fn names_go_out_as_they_were_written() {
        let mut wire = Vec::new();
        Rehearsal::of("- headers: { request: { set: { X-mIxEd: y } } }").pass().header_to_h1_wire(&mut wire);
        assert_eq!(wire, b"X-mIxEd: y\r\n");
    }

    #[test]
    fn host_can_be_set_and_the_target_of_http2_agrees() {
        let mut rehearsal = Rehearsal::of("- headers: { request: { set: { host: 'app.internal:8080' } } }");
        rehearsal = rehearsal.asking("/", &[("host", "shop.example.com")]);
        rehearsal.request.set_uri(Uri::from_static("http://shop.example.com/a?b"));
        let request = rehearsal.pass();
        assert_eq!(values(&request.headers, "host"), ["app.internal:8080"]);
        assert_eq!(request.uri, "http://app.internal:8080/a?b");
    }

    #[test]
    fn wrong_settings_are_told_with_their_place() {
        let told = "[0].headers: nothing to do: write `request` or `response` with `remove`, `set` or `add`";
        assert_eq!(error("- headers: {}"), told);
        assert_eq!(error("- headers: { request: { set: {} } }"), told);
        let told = "[0].headers.request.set.\"X Y\": `X Y` is no header name";
        assert_eq!(error("- headers: { request: { set: { X Y: z } } }"), told);
        let told = "[0].headers.response.add.X-Y: a header value is one line of text, without control characters";
        assert_eq!(error(r#"- headers: { response: { add: { X-Y: "a\r\nb: c" } } }"#), told);
        let told = "[0].headers.request.remove[1]: `TE` belongs to the connection, and Forebay sets it itself";
        assert_eq!(error("- headers: { request: { remove: [X-A, TE] } }"), told);
        let told = "[0].headers.response.set.Content-Length: \
                    `Content-Length` belongs to the connection, and Forebay sets it itself";
        assert_eq!(error("- headers: { response: { set: { Content-Length: '3' } } }"), told);
        let told = "[0].headers.request.set.X-Count: invalid type: integer `3`, expected a string";
        assert_eq!(error("- headers: { request: { set: { X-Count: 3 } } }"), told);
        let told = "[0].headers.requests: unknown field `requests`, expected `request` or `response`";
        assert_eq!(error("- headers: { requests: {} }"), told);
        let told = "[0].headers.request.delete: unknown field `delete`, expected one of `remove`, `set`, `add`";
        assert_eq!(error("- headers: { request: { delete: [] } }"), told);
    }

    #[test]
    fn host_is_set_on_requests_only_and_must_be_one() {
        let told = "[0].headers.request.set.Host: `a b` is no host: \
                    write a name or an address, with a port if need be: `app.internal:8080`";
        assert_eq!(error("- headers: { request: { set: { Host: a b } } }"), told);
        let told = "[0].headers.request.remove[0]: `Host` can only be set, and only on the request";
        assert_eq!(error("- headers: { request: { remove: [host] } }"), told);
        let told = "[0].headers.response.set.Host: `Host` can only be set, and only on the request";
        assert_eq!(error("- headers: { response: { set: { Host: a } } }"), told);
    }

    #[test]
    fn a_name_in_two_cases_is_set_twice() {
        let told = "[0].headers.request.set.host: `host` is set twice, for case makes no difference";
        assert_eq!(error("- headers: { request: { set: { host: a, HOST: b } } }"), told);
        let told = "[0].headers.response.set.x-a: `x-a` is set twice, for case makes no difference";
        assert_eq!(error("- headers: { response: { set: { X-A: b, X-B: b, x-a: b } } }"), told);
    }
}
