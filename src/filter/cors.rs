//! `cors`: tells browsers which pages of other origins may read the responses of a route (Fetch standard, CORS
//! protocol).
//!
//! ```yaml
//! - cors:
//!     origins: ["https://app.example.com", "https://*.example.org"]   # or "*"
//!     methods: [GET, HEAD, POST] # that a page may use
//!     headers: [Content-Type]    # that a page may send; "*": all that it asks for
//!     expose: [X-Request-Id]     # that a page may read, besides the usual ones
//!     credentials: false         # true: with cookies; not together with `origins: ["*"]`
//!     max_age: 10m               # how long browsers may cache the answer to a preflight
//! ```
//!
//! A preflight (`OPTIONS` with `Origin` and `Access-Control-Request-Method`) is answered with 204 and not sent to an
//! upstream. A preflight never has credentials, so place this filter before those that authenticate. CORS headers of
//! the upstream are replaced. The filter refuses no request: the browser prevents a page from reading the response.

use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use http::header::{
    ACCESS_CONTROL_ALLOW_CREDENTIALS, ACCESS_CONTROL_ALLOW_HEADERS, ACCESS_CONTROL_ALLOW_METHODS,
    ACCESS_CONTROL_ALLOW_ORIGIN, ACCESS_CONTROL_EXPOSE_HEADERS, ACCESS_CONTROL_MAX_AGE, ACCESS_CONTROL_REQUEST_HEADERS,
    ACCESS_CONTROL_REQUEST_METHOD, ORIGIN, VARY,
};
use http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, Uri};
use pingora::http::ResponseHeader;
use schemars::JsonSchema;
use serde::Deserialize;

use super::{Answer, Filter, FilterType, Scope, Stages, Surroundings, Verdict, field};
use crate::config::units::Time;
use crate::error::BuildError;

/// Tells browsers which pages of other origins may read the responses of a route. Forebay answers preflights itself.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// The origins: `https://app.example.com`, `https://*.example.org` for all names below it, `null`, or `*`.
    pub origins: Vec<String>,
    /// The methods that a page may use.
    #[serde(default = "Settings::methods")]
    pub methods: Vec<String>,
    /// The headers that a page may send, in addition to those that are always allowed; `*`: all that it asks for.
    #[serde(default)]
    pub headers: Vec<String>,
    /// The response headers that a page may read, in addition to those that are always allowed.
    #[serde(default)]
    pub expose: Vec<String>,
    /// Whether a page may send credentials such as cookies. Not allowed together with the origin `*`.
    #[serde(default)]
    pub credentials: bool,
    /// How long a browser may cache the answer to a preflight.
    #[serde(default = "Settings::max_age")]
    pub max_age: Time,
}

impl Settings {
    fn methods() -> Vec<String> {
        ["GET", "HEAD", "POST"].map(str::to_owned).into()
    }

    fn max_age() -> Time {
        Time(Duration::from_secs(600))
    }
}

/// Answers preflights, and adds CORS headers to responses.
pub struct Cors {
    origins: Origins,
    methods: HeaderValue,
    /// `None`: the headers that the preflight asks for.
    headers: Option<HeaderValue>,
    expose: Option<HeaderValue>,
    credentials: bool,
    max_age: HeaderValue,
}

#[async_trait]
impl Filter for Cors {
    fn stages(&self) -> Stages {
        Stages::REQUEST | Stages::RESPONSE
    }

    async fn request(&self, scope: &mut Scope<'_>) -> Verdict {
        let asked = &scope.request.headers;
        let preflight = scope.request.method == Method::OPTIONS
            && asked.contains_key(ORIGIN)
            && asked.contains_key(ACCESS_CONTROL_REQUEST_METHOD);
        if !preflight {
            return Verdict::Continue;
        }
        Verdict::Answer(Answer { status: StatusCode::NO_CONTENT, headers: self.preflight(asked), body: Bytes::new() })
    }

    async fn response(&self, scope: &mut Scope<'_>, response: &mut ResponseHeader) -> Verdict {
        for name in [&ACCESS_CONTROL_ALLOW_ORIGIN, &ACCESS_CONTROL_ALLOW_CREDENTIALS, &ACCESS_CONTROL_EXPOSE_HEADERS] {
            response.remove_header(name);
        }
        if !self.origins.all {
            vary_by_origin(response);
        }
        let Some(origin) = self.origins.allow(&scope.request.headers) else { return Verdict::Continue };
        let credentials = self.credentials.then(|| HeaderValue::from_static("true"));
        let fields = [
            (ACCESS_CONTROL_ALLOW_ORIGIN, Some(origin)),
            (ACCESS_CONTROL_ALLOW_CREDENTIALS, credentials),
            (ACCESS_CONTROL_EXPOSE_HEADERS, self.expose.clone()),
        ];
        for (name, value) in fields {
            if let Some(value) = value {
                // Three fields with fixed names: the header has room for them.
                let _ = response.insert_header(name, value);
            }
        }
        Verdict::Continue
    }
}

impl FilterType for Cors {
    const KEY: &'static str = "cors";
    type Settings = Settings;

    fn build(settings: &Settings, _: &Surroundings<'_>) -> Result<Self, BuildError> {
        let origins = Origins::build(&settings.origins)?;
        if origins.all && settings.credentials {
            let told = "with the origin `*` any page could act for a logged-in user: name the origins";
            return Err(BuildError::new("credentials", told));
        }
        for (index, method) in settings.methods.iter().enumerate() {
            let known =
                Method::from_bytes(method.as_bytes()).is_ok_and(|known| known.as_str() == method.to_uppercase());
            if !known {
                return Err(BuildError::new(format!("methods[{index}]"), format!("`{method}` is not a method")));
            }
        }
        if settings.max_age.0 > Duration::from_secs(86_400) {
            return Err(BuildError::new("max_age", "no browser remembers it for longer than `1d`"));
        }
        let any = settings.headers.iter().any(|name| name == "*");
        let headers = if any { None } else { Some(list(&settings.headers, "headers")?) };
        let expose = list(&settings.expose, "expose")?;
        Ok(Cors {
            origins,
            methods: joined(&settings.methods).map_err(|error| BuildError::new("methods", error.to_string()))?,
            headers,
            expose: Some(expose).filter(|expose| !expose.is_empty()),
            credentials: settings.credentials,
            max_age: HeaderValue::from(settings.max_age.0.as_secs()),
        })
    }
}

impl Cors {
    /// The header of the answer to a preflight, without the fields that [`Filter::response`] adds to each response.
    fn preflight(&self, asked: &HeaderMap) -> Vec<(HeaderName, HeaderValue)> {
        let vary = "Access-Control-Request-Method, Access-Control-Request-Headers";
        let mut fields = vec![(VARY, HeaderValue::from_static(vary))];
        if self.origins.allow(asked).is_none() {
            return fields;
        }
        fields.push((ACCESS_CONTROL_ALLOW_METHODS, self.methods.clone()));
        let headers = match &self.headers {
            Some(headers) => Some(headers.clone()),
            None => asked.get(ACCESS_CONTROL_REQUEST_HEADERS).cloned(),
        };
        if let Some(headers) = headers.filter(|headers| !headers.is_empty()) {
            fields.push((ACCESS_CONTROL_ALLOW_HEADERS, headers));
        }
        fields.push((ACCESS_CONTROL_MAX_AGE, self.max_age.clone()));
        fields
    }
}

/// A cache must not use the response for one origin for another.
fn vary_by_origin(response: &mut ResponseHeader) {
    let mut names = response.headers.get_all(VARY).iter().flat_map(|line| line.as_bytes().split(|&byte| byte == b','));
    let named = |name: &[u8]| name.trim_ascii().eq_ignore_ascii_case(b"origin") || name.trim_ascii() == b"*";
    if !names.any(named) {
        // One more field. If the header has no room for it, the response already has too many.
        let _ = response.append_header(VARY, HeaderValue::from_static("Origin"));
    }
}

/// The allowed origins.
#[derive(Debug, Default)]
struct Origins {
    all: bool,
    exact: Vec<Box<str>>,
    /// The text before `*.` and the text after it, with the dot.
    below: Vec<(Box<str>, Box<str>)>,
}

impl Origins {
    fn build(written: &[String]) -> Result<Origins, BuildError> {
        let mut origins = Origins::default();
        for (index, origin) in written.iter().enumerate() {
            let wrong = |told: String| BuildError::new(format!("origins[{index}]"), told);
            if origin == "*" {
                origins.all = true;
                continue;
            }
            if origin == "null" {
                origins.exact.push("null".into());
                continue;
            }
            let plain = origin.replacen("://*.", "://", 1);
            let sound = plain.parse::<Uri>().ok().filter(|uri| {
                let names = uri.scheme_str().zip(uri.authority());
                let same = names.is_some_and(|(scheme, name)| format!("{scheme}://{name}") == plain);
                same && !plain.contains(['*', '@'])
            });
            if sound.is_none() {
                let help = "write `https://app.example.com`, with a port if need be and without a path";
                return Err(wrong(format!("`{origin}` is not an origin: {help}")));
            }
            let origin = origin.to_ascii_lowercase();
            match origin.split_once("*.") {
                Some((before, behind)) => origins.below.push((before.into(), format!(".{behind}").into())),
                None => origins.exact.push(origin.into()),
            }
        }
        if written.is_empty() {
            return Err(BuildError::new("origins", "no origin is named, so that this would do nothing"));
        }
        Ok(origins)
    }

    /// The `Access-Control-Allow-Origin` for the origin of the request, if it is allowed. `None` if the request has
    /// several.
    fn allow(&self, headers: &HeaderMap) -> Option<HeaderValue> {
        let mut named = headers.get_all(ORIGIN).iter();
        let (Some(origin), None) = (named.next(), named.next()) else { return None };
        if self.all {
            return Some(HeaderValue::from_static("*"));
        }
        let written = origin.to_str().ok()?.to_ascii_lowercase();
        let is_below = |(before, behind): &(Box<str>, Box<str>)| {
            let name = written.strip_prefix(&**before).and_then(|rest| rest.strip_suffix(&**behind));
            name.is_some_and(|name| {
                !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-._".contains(&byte))
            })
        };
        let known = self.exact.iter().any(|exact| **exact == written) || self.below.iter().any(is_below);
        known.then(|| origin.clone())
    }
}

fn joined(names: &[String]) -> Result<HeaderValue, http::header::InvalidHeaderValue> {
    HeaderValue::try_from(names.join(", "))
}

/// A list of header names.
fn list(names: &[String], key: &str) -> Result<HeaderValue, BuildError> {
    for (index, name) in names.iter().enumerate() {
        field::name(name).map_err(|told| BuildError::new(format!("{key}[{index}]"), told))?;
    }
    joined(names).map_err(|error| BuildError::new(key, error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::super::rehearsal::{Rehearsal, chain, error, example, values};
    use super::*;

    const ORIGINS: &str = r#"origins: ["https://app.example.com", "https://*.example.org:8443", "null"]"#;

    fn cors(settings: &str) -> Rehearsal {
        Rehearsal::of(&format!("- cors: {{ {settings} }}"))
    }

    /// The allowed origin in the response to this origin.
    fn allowed(settings: &str, origin: &str) -> Option<String> {
        let headers = cors(settings).asking("/", &[("origin", origin)]).respond(&[]);
        headers.get(ACCESS_CONTROL_ALLOW_ORIGIN).map(|origin| origin.to_str().unwrap().to_owned())
    }

    #[test]
    fn the_example_builds() {
        assert!(chain(&example(include_str!("cors.rs"))).is_ok());
    }

    #[test]
    fn origins_are_let_in_whole_and_by_their_names() {
        for origin in ["https://app.example.com", "https://a.example.org:8443", "https://a.b.example.org:8443", "null"]
        {
            assert_eq!(allowed(ORIGINS, origin).as_deref(), Some(origin));
        }
        for origin in [
            "http://app.example.com",
            "https://app.example.com:8443",
            "https://app.example.com.evil.test",
            "https://evilapp.example.com",
            "https://example.org:8443",
            "https://.example.org:8443",
            "https://evil.test/.example.org:8443",
            "https://evil.test@a.example.org:8443",
            "https://a.example.org",
            "",
        ] {
            assert_eq!(allowed(ORIGINS, origin), None, "{origin}");
        }
        assert_eq!(allowed("origins: ['*']", "https://any.test").as_deref(), Some("*"));
    }

    #[test]
    fn what_the_upstream_says_on_the_matter_is_replaced() {
        let mut rehearsal = cors(&format!("{ORIGINS}, credentials: true, expose: [X-A, X-B]"))
            .asking("/", &[("origin", "https://app.example.com")]);
        let headers = rehearsal.respond(&[("access-control-allow-origin", "*"), ("vary", "Accept")]);
        assert_eq!(values(&headers, "access-control-allow-origin"), ["https://app.example.com"]);
        assert_eq!(values(&headers, "access-control-allow-credentials"), ["true"]);
        assert_eq!(values(&headers, "access-control-expose-headers"), ["X-A, X-B"]);
        assert_eq!(values(&headers, "vary"), ["Accept", "Origin"]);
        let headers = cors(ORIGINS).respond(&[("access-control-allow-origin", "*"), ("vary", "accept, origin")]);
        assert_eq!(values(&headers, "access-control-allow-origin"), [""; 0], "no origin asks");
        assert_eq!(values(&headers, "vary"), ["accept, origin"]);
        assert_eq!(values(&cors("origins: ['*']").respond(&[]), "vary"), [""; 0]);
    }

    #[test]
    fn a_preflight_is_answered_and_anything_else_passes() {
        let asking = |settings: &str, origin: &str| {
            let fields = [
                ("origin", origin),
                ("access-control-request-method", "PUT"),
                ("access-control-request-headers", "x-a, x-b"),
            ];
            let mut rehearsal = cors(settings).asking("/", &fields);
            rehearsal.request.set_method(Method::OPTIONS);
            rehearsal
        };
        let answer = asking(&format!("{ORIGINS}, methods: [PUT, DELETE], headers: [X-A]"), "null").answer();
        assert_eq!((answer.status.as_u16(), answer.body.len()), (204, 0));
        let of = |answer: &Answer, name: HeaderName| {
            let found = answer.headers.iter().find(|(found, _)| *found == name);
            found.map(|(_, value)| value.to_str().unwrap().to_owned())
        };
        assert_eq!(of(&answer, ACCESS_CONTROL_ALLOW_METHODS).as_deref(), Some("PUT, DELETE"));
        assert_eq!(of(&answer, ACCESS_CONTROL_ALLOW_HEADERS).as_deref(), Some("X-A"));
        assert_eq!(of(&answer, ACCESS_CONTROL_MAX_AGE).as_deref(), Some("600"));
        let any = asking(&format!("{ORIGINS}, headers: ['*']"), "null").answer();
        assert_eq!(of(&any, ACCESS_CONTROL_ALLOW_HEADERS).as_deref(), Some("x-a, x-b"));
        let stranger = asking(ORIGINS, "https://evil.test").answer();
        assert_eq!((stranger.status.as_u16(), of(&stranger, ACCESS_CONTROL_ALLOW_METHODS)), (204, None));
        let mut plain = cors(ORIGINS).asking("/", &[("origin", "null")]);
        plain.request.set_method(Method::OPTIONS);
        plain.pass();
    }

    #[test]
    fn wrong_settings_are_told_with_their_place() {
        for origin in ["app.example.com", "https://a.test/", "https://*", "https://a.*.test", "https://u@a.test", "*.a"]
        {
            let told = error(&format!("- cors: {{ origins: ['{origin}'] }}"));
            assert!(told.starts_with(&format!("[0].cors.origins[0]: `{origin}` is not an origin")), "{told}");
        }
        assert!(error("- cors: { origins: [] }").starts_with("[0].cors.origins: "));
        assert!(error("- cors: { origins: ['*'], credentials: true }").starts_with("[0].cors.credentials: "));
        assert!(error("- cors: { origins: ['*'], methods: ['G T'] }").starts_with("[0].cors.methods[0]: "));
        assert!(error("- cors: { origins: ['*'], methods: [get] }").starts_with("[0].cors.methods[0]: "));
        assert!(error("- cors: { origins: ['*'], expose: ['a b'] }").starts_with("[0].cors.expose[0]: "));
        assert!(error("- cors: { origins: ['*'], max_age: 2d }").starts_with("[0].cors.max_age: "));
    }
}
