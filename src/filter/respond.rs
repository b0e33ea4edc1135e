//! `respond`: a fixed response, without an upstream.
//!
//! ```yaml
//! - respond:
//!     status: 503
//!     headers: { Retry-After: "120" }
//!     body: "Back in two minutes."
//! ```
//!
//! The body and the header values may be `{ cel: "…" }`, which computes them for each request.

use std::collections::BTreeMap;

use async_trait::async_trait;
use bytes::Bytes;
use http::header::CONTENT_TYPE;
use http::{HeaderName, HeaderValue, StatusCode};
use schemars::JsonSchema;
use serde::Deserialize;

use super::field::Words;
use super::{Answer, Filter, FilterType, Scope, Stages, Surroundings, Verdict, field};
use crate::config::Text;
use crate::error::{BuildError, path};
use crate::expression::{self, Moment};

/// Sends a fixed response, without an upstream.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Settings {
    /// The status, 200 to 599.
    #[schemars(range(min = 200, max = 599))]
    pub status: u16,
    /// Header fields. Forebay adds `Content-Length`, and `Content-Type: text/plain; charset=utf-8` if there is a body
    /// and no such field.
    pub headers: BTreeMap<String, Text>,
    /// The body: text or `{ cel: … }`.
    pub body: Text,
}

impl Default for Settings {
    fn default() -> Self {
        Settings { status: 200, headers: BTreeMap::new(), body: Text::default() }
    }
}

/// Sends the same response to every request.
pub struct Respond {
    status: StatusCode,
    headers: Vec<(HeaderName, Words)>,
    body: Body,
}

enum Body {
    Fixed(Bytes),
    Made(expression::Value),
}

#[async_trait]
impl Filter for Respond {
    fn stages(&self) -> Stages {
        Stages::REQUEST
    }

    async fn request(&self, scope: &mut Scope<'_>) -> Verdict {
        let asked = scope.asked();
        let headers = self.headers.iter().filter_map(|(name, value)| Some((name.clone(), value.value(&asked)?)));
        let body = match &self.body {
            Body::Fixed(body) => body.clone(),
            Body::Made(made) => Bytes::from(made.of(&asked).into_owned()),
        };
        Verdict::Answer(Answer { status: self.status, headers: headers.collect(), body })
    }
}

impl FilterType for Respond {
    const KEY: &'static str = "respond";
    const ANSWERS: bool = true;
    type Settings = Settings;

    fn build(settings: &Settings, _: &Surroundings<'_>) -> Result<Self, BuildError> {
        let status = StatusCode::from_u16(settings.status).ok().filter(|_| (200..=599).contains(&settings.status));
        let status = status.ok_or_else(|| {
            BuildError::new("status", format!("`{}` is not a response status: write 200 to 599", settings.status))
        })?;
        // RFC 9110 §15.3.5, §15.3.6, §15.4.5.
        if matches!(settings.status, 204 | 205 | 304) && !settings.body.is_empty() {
            return Err(BuildError::new(
                "body",
                format!("an answer with status {status} has no body", status = settings.status),
            ));
        }
        let mut headers = settings.headers.iter().map(field).collect::<Result<Vec<_>, _>>()?;
        if !settings.body.is_empty() && !headers.iter().any(|(name, _)| name == CONTENT_TYPE) {
            headers.push((CONTENT_TYPE, Words::Fixed(HeaderValue::from_static("text/plain; charset=utf-8"))));
        }
        let body = match &settings.body {
            Text::Fixed(body) => Body::Fixed(Bytes::copy_from_slice(body.as_bytes())),
            Text::Made { cel } => {
                let made = expression::Value::build(cel, Moment::Request);
                Body::Made(made.map_err(|error| error.under("cel").under("body"))?)
            }
        };
        Ok(Respond { status, headers, body })
    }
}

fn field((written, value): (&String, &Text)) -> Result<(HeaderName, Words), BuildError> {
    let name = field::free_name(written).map_err(|message| BuildError::at_key(written, message).under("headers"))?;
    let value =
        Words::build(value, Moment::Request).map_err(|error| error.under(&path::key(written)).under("headers"))?;
    Ok((name, value))
}

#[cfg(test)]
mod tests {
    use super::super::rehearsal::{Rehearsal, chain, error, example};
    use super::*;

    fn answer(settings: &str) -> Answer {
        Rehearsal::of(&format!("- respond: {settings}")).answer()
    }

    #[test]
    fn the_example_builds() {
        assert!(chain(&example(include_str!("respond.rs"))).is_ok());
    }

    #[test]
    fn the_answer_is_what_was_written() {
        let answer = answer(r#"{ status: 418, headers: { X-Pot: tea, Content-Type: text/html }, body: "<p>short" }"#);
        assert_eq!(answer.status, 418);
        assert_eq!(answer.body, "<p>short");
        let headers: Vec<String> = answer.headers.iter().map(|(name, value)| format!("{name}: {value:?}")).collect();
        assert_eq!(headers, [r#"content-type: "text/html""#, r#"x-pot: "tea""#]);
    }

    #[test]
    fn by_default_it_is_an_empty_200() {
        let answer = answer("{}");
        assert_eq!((answer.status, answer.headers.len(), answer.body.len()), (StatusCode::OK, 0, 0));
    }

    #[test]
    fn a_body_is_plain_text_unless_told_otherwise() {
        assert_eq!(answer("{ body: hello }").headers, [(CONTENT_TYPE, "text/plain; charset=utf-8".parse().unwrap())]);
    }

    #[test]
    fn an_answer_is_made_for_each_request() {
        let settings = r#"{ headers: { X-You: { cel: "string(source.address)" }, X-No: { cel: 'request.headers["x"]' } },
                            body: { cel: '"You asked for " + request.path + ".\n"' } }"#;
        let answer = answer(settings);
        assert_eq!(answer.body, "You asked for /.\n");
        let headers: Vec<String> = answer.headers.iter().map(|(name, value)| format!("{name}: {value:?}")).collect();
        assert_eq!(headers, [r#"x-you: "192.0.2.1""#, r#"content-type: "text/plain; charset=utf-8""#]);
        let told = error("- respond: { body: { cel: request.size } }");
        assert!(told.starts_with("[0].respond.body.cel (at 1:1 of the expression): this is a whole number"), "{told}");
    }

    #[test]
    fn an_answer_without_content_may_have_no_body() {
        for status in [204, 205, 304] {
            assert_eq!(answer(&format!("{{ status: {status} }}")).status, status);
            let told = format!("[0].respond.body: an answer with status {status} has no body");
            assert_eq!(error(&format!("- respond: {{ status: {status}, body: x }}")), told);
        }
    }

    #[test]
    fn wrong_settings_are_told_with_their_place() {
        for status in ["101", "199", "600", "0"] {
            let told = format!("[0].respond.status: `{status}` is not a response status: write 200 to 599");
            assert_eq!(error(&format!("- respond: {{ status: {status} }}")), told);
        }
        let told = "[0].respond.headers.Content-Length: \
                    `Content-Length` belongs to the connection, and Forebay sets it itself";
        assert_eq!(error("- respond: { headers: { Content-Length: '3' } }"), told);
        let told = "[0].respond.headers.X-A: a header value is one line of text, without control characters";
        assert_eq!(error(r#"- respond: { headers: { X-A: "b\nc" } }"#), told);
        let told = "[0].respond.text: unknown field `text`, expected one of `status`, `headers`, `body`";
        assert_eq!(error("- respond: { text: x }"), told);
    }
}
