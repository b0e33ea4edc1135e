//! `headers`: removes, sets and adds header fields of requests and responses.
//!
//! ```yaml
//! - headers:
//!     request:
//!       remove: [Cookie]
//!       set: { Host: app.internal, X-Edge: forebay }     # replaces
//!     response:
//!       remove: [Server, X-Powered-By]
//!       set: { Strict-Transport-Security: max-age=31536000 }
//!       add: { Link: "</style.css>; rel=preload" }       # adds
//! ```
//!
//! A value may be `{ cel: "…" }`, which computes it for each exchange. If the result is empty or not valid in a
//! header, the field is removed. So a client's field of the same name never takes its place.

use std::collections::BTreeMap;

use async_trait::async_trait;
use bytes::Bytes;
use http::header::HOST;
use http::uri::Authority;
use http::{HeaderName, HeaderValue, Uri};
use pingora::http::{RequestHeader, ResponseHeader};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::field::{self, Field, Fields, Words};
use super::{Filter, FilterType, Scope, Stages, Surroundings, Verdict};
use crate::config::Text;
use crate::error::path::{self, join};
use crate::error::{BuildError, Refusal};
use crate::expression::{self, Moment};

/// Removes, sets and adds header fields. Fields that frame a message or belong to a connection cannot be changed.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Settings {
    /// Changes to the request for the upstream. They may include `Host`.
    pub request: HeaderChanges,
    /// Changes to the response for the client.
    pub response: HeaderChanges,
}

/// Changes to the fields of one header, in the order `remove`, `set`, `add`.
#[derive(Clone, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct HeaderChanges {
    /// The fields to remove.
    pub remove: Vec<String>,
    /// The fields that replace all of the same name; a value is text or `{ cel: … }`.
    pub set: BTreeMap<String, Text>,
    /// The fields to add to those of the same name; a value is text or `{ cel: … }`.
    pub add: BTreeMap<String, Text>,
}

static UNFIT: Refusal = Refusal::new("route.headers", 400, "The request cannot be given a host.");

/// Changes header fields.
pub struct Headers {
    request: Changes,
    response: Changes,
    /// The `Host` of the request, if it is set.
    host: Option<Host>,
}

#[derive(Default)]
struct Changes {
    remove: Vec<HeaderName>,
    set: Vec<Change>,
    add: Vec<Change>,
}

/// A field and its value.
struct Change {
    name: HeaderName,
    /// The same name in the case in which it is sent.
    written: Bytes,
    value: Words,
}

/// A host, fixed or computed for each exchange.
enum Host {
    Fixed(Authority),
    Made(expression::Value),
}

#[async_trait]
impl Filter for Headers {
    fn stages(&self) -> Stages {
        let request = if self.request.is_empty() && self.host.is_none() { Stages::NONE } else { Stages::REQUEST };
        let response = if self.response.is_empty() { Stages::NONE } else { Stages::RESPONSE };
        request | response
    }

    fn own_headers(&self) -> Vec<HeaderName> {
        let Changes { remove, set, .. } = &self.request;
        remove.iter().chain(set.iter().map(|change| &change.name)).cloned().collect()
    }

    async fn request(&self, scope: &mut Scope<'_>) -> Verdict {
        let facts = scope.facts;
        self.request.apply(scope.request, |request, words| words.value(&facts.asked(request)));
        let host = match &self.host {
            None => return Verdict::Continue,
            Some(Host::Fixed(host)) => Some(host.clone()),
            Some(Host::Made(made)) => std::str::from_utf8(&made.of(&scope.asked())).ok().and_then(field::host),
        };
        match host.and_then(|host| Some((field::value(host.as_str()).ok()?, host))) {
            Some((value, host)) => {
                scope.request.set(&Field { name: Bytes::from_static(b"Host"), value });
                agree(scope.request, &host);
                Verdict::Continue
            }
            None => Verdict::from(&UNFIT),
        }
    }

    async fn response(&self, scope: &mut Scope<'_>, response: &mut ResponseHeader) -> Verdict {
        let asked = scope.asked();
        self.response.apply(response, |response, words| words.value(&asked.answered(response)));
        Verdict::Continue
    }
}

impl FilterType for Headers {
    const KEY: &'static str = "headers";
    const REFUSALS: &'static [&'static Refusal] = &[&UNFIT];
    type Settings = Settings;

    fn build(settings: &Settings, _: &Surroundings<'_>) -> Result<Self, BuildError> {
        for (side, changes) in [("request", &settings.request), ("response", &settings.response)] {
            check_once(&changes.set).map_err(|error| error.under("set").under(side))?;
        }
        let mut written = settings.request.clone();
        let host = take_host(&mut written.set)?;
        let request = Changes::build(&written, Moment::Request).map_err(|error| error.under("request"))?;
        let response = Changes::build(&settings.response, Moment::Response).map_err(|error| error.under("response"))?;
        if request.is_empty() && response.is_empty() && host.is_none() {
            let message = "nothing to do: write `request` or `response` with `remove`, `set` or `add`";
            return Err(BuildError::new("", message));
        }
        Ok(Headers { request, response, host })
    }
}

impl Changes {
    fn build(written: &HeaderChanges, moment: Moment) -> Result<Changes, BuildError> {
        let remove = written.remove.iter().enumerate().map(|(index, name)| {
            field::free_name(name).map_err(|message| BuildError::new(format!("remove[{index}]"), message))
        });
        Ok(Changes {
            remove: remove.collect::<Result<_, _>>()?,
            set: changes(&written.set, moment).map_err(|error| error.under("set"))?,
            add: changes(&written.add, moment).map_err(|error| error.under("add"))?,
        })
    }

    fn is_empty(&self) -> bool {
        self.remove.is_empty() && self.set.is_empty() && self.add.is_empty()
    }

    /// Each value sees the changes before it.
    fn apply<H: Fields>(&self, header: &mut H, value: impl Fn(&H, &Words) -> Option<HeaderValue>) {
        self.remove.iter().for_each(|name| header.remove(name));
        for change in &self.set {
            match value(header, &change.value) {
                Some(value) => header.set(&Field { name: change.written.clone(), value }),
                None => header.remove(&change.name),
            }
        }
        for change in &self.add {
            if let Some(value) = value(header, &change.value) {
                header.add(&Field { name: change.written.clone(), value });
            }
        }
    }
}

/// Parses fields with their values. The path of an error is the name.
fn changes(written: &BTreeMap<String, Text>, moment: Moment) -> Result<Vec<Change>, BuildError> {
    let change = |(written, value): (&String, &Text)| {
        let name = field::free_name(written).map_err(|message| BuildError::at_key(written, message))?;
        let value = Words::build(value, moment).map_err(|error| error.under(&path::key(written)))?;
        Ok(Change { name, written: Bytes::copy_from_slice(written.as_bytes()), value })
    };
    written.iter().map(change).collect()
}

/// YAML distinguishes `X-A` and `x-a`, but HTTP does not: one of two such values would be lost.
fn check_once(set: &BTreeMap<String, Text>) -> Result<(), BuildError> {
    let twin = |name: &&String| set.range::<String, _>(..*name).any(|(other, _)| other.eq_ignore_ascii_case(name));
    match set.keys().find(twin) {
        Some(name) => Err(BuildError::at_key(name, format!("`{name}` is set twice, for case makes no difference"))),
        None => Ok(()),
    }
}

/// Removes `Host`, in any case, from the fields to set on the request: it is checked as a host.
fn take_host(set: &mut BTreeMap<String, Text>) -> Result<Option<Host>, BuildError> {
    let Some(name) = set.keys().find(|name| name.eq_ignore_ascii_case(HOST.as_str())).cloned() else {
        return Ok(None);
    };
    let at = join("request.set", &path::key(&name));
    match set.remove(&name).unwrap_or_default() {
        Text::Made { cel } => match expression::Value::build(&cel, Moment::Request) {
            Ok(made) => Ok(Some(Host::Made(made))),
            Err(error) => Err(error.under("cel").under(&at)),
        },
        Text::Fixed(written) => match field::host(&written) {
            Some(host) => Ok(Some(Host::Fixed(host))),
            None => {
                let help = "write a name or an address, with a port if need be: `app.internal:8080`";
                Err(BuildError::new(at, format!("`{written}` is not a host: {help}")))
            }
        },
    }
}

/// Updates the host of the request target, if it has one, to that in `Host`: for HTTP/2, Pingora would restore the
/// target's `:authority`.
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
        let wants = |yaml: &str| chain(yaml).unwrap_or_default().wants(Stages::RESPONSE);
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
        let told = "[0].headers.request.set.\"X Y\": `X Y` is not a valid header name";
        assert_eq!(error("- headers: { request: { set: { X Y: z } } }"), told);
        let told = "[0].headers.response.add.X-Y: a header value is one line of text, without control characters";
        assert_eq!(error(r#"- headers: { response: { add: { X-Y: "a\r\nb: c" } } }"#), told);
        let told = "[0].headers.request.remove[1]: `TE` belongs to the connection, and Forebay sets it itself";
        assert_eq!(error("- headers: { request: { remove: [X-A, TE] } }"), told);
        let told = "[0].headers.response.set.Content-Length: \
                    `Content-Length` belongs to the connection, and Forebay sets it itself";
        assert_eq!(error("- headers: { response: { set: { Content-Length: '3' } } }"), told);
        let told = "[0].headers.request.set.X-Count: \
                    invalid type: integer `3`, expected text (put a number into quotes), or `{ cel: … }`";
        assert_eq!(error("- headers: { request: { set: { X-Count: 3 } } }"), told);
        let told = "[0].headers.requests: unknown field `requests`, expected `request` or `response`";
        assert_eq!(error("- headers: { requests: {} }"), told);
        let told = "[0].headers.request.delete: unknown field `delete`, expected one of `remove`, `set`, `add`";
        assert_eq!(error("- headers: { request: { delete: [] } }"), told);
    }

    #[test]
    fn a_value_is_made_for_each_exchange() {
        let mut rehearsal = Rehearsal::of(
            r#"- headers:
                request:
                  set: { X-Tenant: { cel: 'request.host.split(".")[0]' }, X-User: { cel: 'request.cookies["user"]' } }
                  add: { X-Seen: { cel: 'request.headers["x-tenant"] + "!"' } }
                response: { set: { X-Code: { cel: "string(response.code)" }, X-Kind: { cel: 'response.headers["x-kind"] + "2"' } } }"#,
        );
        rehearsal =
            rehearsal.asking("/", &[("host", "shop.example.com"), ("x-user", "forged"), ("x-tenant", "forged")]);
        let headers = &rehearsal.pass().headers;
        assert_eq!(values(headers, "x-tenant"), ["shop"]);
        assert_eq!(values(headers, "x-user"), [""; 0], "what makes nothing leaves nothing that a client sent");
        assert_eq!(values(headers, "x-seen"), ["shop!"]);
        let headers = rehearsal.respond(&[("x-kind", "a")]);
        assert_eq!((values(&headers, "x-code"), values(&headers, "x-kind")), (vec!["200"], vec!["a2"]));
    }

    #[test]
    fn a_value_that_would_be_another_field_is_none() {
        let filter = r#"- headers: { request: { set: { X-A: { cel: 'request.args["a"]' } } } }"#;
        let mut rehearsal = Rehearsal::of(filter).asking("/?a=b%0d%0aX-Admin:%201", &[("x-a", "1")]);
        let headers = &rehearsal.pass().headers;
        assert_eq!((values(headers, "x-a"), values(headers, "x-admin")), (vec![], vec![]));
    }

    #[test]
    fn a_host_that_is_made_is_a_host_or_the_request_is_refused() {
        let filter = r#"- headers: { request: { set: { Host: { cel: 'request.args["h"] + ".internal"' } } } }"#;
        let mut rehearsal = Rehearsal::of(filter).asking("/?h=app", &[("host", "x")]);
        assert_eq!(values(&rehearsal.pass().headers, "host"), ["app.internal"]);
        let mut rehearsal = Rehearsal::of(filter).asking("/?h=a%20b", &[("host", "x")]);
        assert_eq!(rehearsal.refused().refusal, &UNFIT);
    }

    #[test]
    fn a_wrong_expression_is_told_with_its_place() {
        let told = "[0].headers.request.set.X-A.cel (at 1:1 of the expression): \
                    nothing is called `request.pth`: did you mean `request.path`?";
        assert_eq!(error("- headers: { request: { set: { X-A: { cel: request.pth } } } }"), told);
        let early = error(r#"- headers: { request: { add: { X-A: { cel: 'response.headers["a"]' } } } }"#);
        assert!(early.contains("`response.headers` comes too early"), "{early}");
    }

    #[test]
    fn host_is_set_on_requests_only_and_must_be_one() {
        let told = "[0].headers.request.set.Host: `a b` is not a host: \
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
