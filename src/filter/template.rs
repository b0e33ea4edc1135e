//! Text with embedded expressions: `<h1>{{ response.code }}</h1>`.
//!
//! Each `{{ … }}` is an expression in CEL. Its result is escaped for the format of the template, so that no input of
//! a client can become markup of the page.

use std::borrow::Cow;
use std::fmt::Write;

use crate::error::{BuildError, Inside};
use crate::expression::{Asked, Moment, Value};

/// The length limit of a template.
const BYTES_MAX: usize = 256 << 10;
/// The limit on its expressions.
const VALUES_MAX: usize = 100;
/// The result of an expression is truncated at this length.
const VALUE_BYTES_MAX: usize = 4 << 10;

/// The format of a template.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Form {
    /// HTML: `<`, `>`, `&` and both quotes are escaped.
    Html,
    /// JSON: values are inside quotes, or are numbers.
    Json,
    /// Plain text: nothing is escaped.
    Text,
}

/// A parsed template.
#[derive(Debug)]
pub(super) struct Template {
    form: Form,
    parts: Vec<Part>,
}

#[derive(Debug)]
enum Part {
    Text(Box<str>),
    Value(Value),
}

impl Template {
    /// Parses the template `written`. Its expressions can read the response if `moment` allows it.
    ///
    /// # Errors
    /// The mistake and its place; the path is empty.
    pub fn build(written: &str, form: Form, moment: Moment) -> Result<Template, BuildError> {
        let wrong = |at: usize, told: String| BuildError::new("", told).inside(Inside::of(written, at..at + 2));
        if written.len() > BYTES_MAX {
            return Err(BuildError::new("", format!("it is longer than {} KiB", BYTES_MAX >> 10)));
        }
        let (mut parts, mut rest, mut values) = (Vec::new(), 0, 0);
        while let Some(open) = written[rest..].find("{{").map(|at| rest + at) {
            let close = end_of(written, open + 2)
                .ok_or_else(|| wrong(open, "this `{{` has no `}}`: an expression stands between the two".to_owned()))?;
            values += 1;
            if values > VALUES_MAX {
                return Err(wrong(open, format!("more than {VALUES_MAX} expressions are too many")));
            }
            if open > rest {
                parts.push(Part::Text(written[rest..open].into()));
            }
            let value =
                Value::shown(&written[open + 2..close], moment).map_err(|error| moved(error, written, open + 2))?;
            parts.push(Part::Value(value));
            rest = close + 2;
        }
        if rest < written.len() {
            parts.push(Part::Text(written[rest..].into()));
        }
        let template = Template { form, parts };
        if form == Form::Json {
            let filled = template.with(|_| "0".into());
            serde_json::from_str::<serde::de::IgnoredAny>(&filled).map_err(|error| {
                BuildError::new("", format!("with a number in place of each expression, this is not JSON: {error}"))
            })?;
        }
        Ok(template)
    }

    /// Parses the text of a file. The message of an error contains the place.
    ///
    /// # Errors
    /// The mistake.
    pub fn of_file(written: &str, form: Form, moment: Moment) -> Result<Template, String> {
        Template::build(written, form, moment).map_err(|error| match error.inside {
            Some(inside) => format!("line {}, column {}: {}", inside.line, inside.column, error.message),
            None => error.message,
        })
    }

    /// The text for this exchange.
    pub fn of(&self, asked: &Asked<'_>) -> String {
        self.with(|value| {
            let made = value.of(asked);
            let made = String::from_utf8_lossy(&made);
            let end = made.floor_char_boundary(VALUE_BYTES_MAX);
            Cow::Owned(escaped(&made[..end], self.form))
        })
    }

    fn with<'t>(&'t self, mut value: impl FnMut(&'t Value) -> Cow<'t, str>) -> String {
        let mut text = String::new();
        for part in &self.parts {
            match part {
                Part::Text(part) => text.push_str(part),
                Part::Value(made) => text.push_str(&value(made)),
            }
        }
        text
    }
}

/// The end of the expression that begins at `begin`: the first `}}` outside of quotes.
fn end_of(written: &str, begin: usize) -> Option<usize> {
    let bytes = written.as_bytes();
    let (mut at, mut quote) = (begin, None);
    while at < bytes.len() {
        match (quote, bytes[at]) {
            (Some(_), b'\\') => at += 1,
            (Some(open), byte) if byte == open => quote = None,
            (None, byte @ (b'"' | b'\'')) => quote = Some(byte),
            (None, b'}') if bytes.get(at + 1) == Some(&b'}') => return Some(at),
            _ => {}
        }
        at += 1;
    }
    None
}

/// An error of the expression at `begin` of a template, with its place in the template.
fn moved(error: BuildError, written: &str, begin: usize) -> BuildError {
    let bytes = error.inside.as_ref().map_or(0..0, |inside| inside.bytes.clone());
    error.inside(Inside::of(written, begin + bytes.start..begin + bytes.end))
}

fn escaped(text: &str, form: Form) -> String {
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        match (form, c) {
            (Form::Html, '<') => escaped.push_str("&lt;"),
            (Form::Html, '>') => escaped.push_str("&gt;"),
            (Form::Html, '&') => escaped.push_str("&amp;"),
            (Form::Html, '"') => escaped.push_str("&quot;"),
            (Form::Html, '\'') => escaped.push_str("&#39;"),
            (Form::Json, '"' | '\\') => escaped.extend(['\\', c]),
            // Writing to a string cannot fail.
            (Form::Json, '\0'..='\x1f') => _ = write!(escaped, "\\u{:04x}", c as u32),
            (_, c) => escaped.push(c),
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::super::rehearsal::request;
    use super::*;
    use crate::expression::Facts;

    fn filled(written: &str, form: Form) -> String {
        let template = Template::build(written, form, Moment::Response).unwrap_or_else(|error| panic!("{error}"));
        let request = request("/a?b=%3Cb%3E%22%5C%0a", &[("x-long", &"ä".repeat(3000)), ("x", "<i a='1'>&\"")]);
        let facts = Facts { status: 404, ..Facts::of("shop", "/a") };
        template.of(&facts.asked(&request))
    }

    #[test]
    fn what_expressions_make_is_escaped_for_the_form() {
        let text = r#"{{ request.headers.x }}, {{request.args["b"]}}, {{ response.code }} at {{ request.path }}"#;
        assert_eq!(filled(text, Form::Text), "<i a='1'>&\", <b>\"\\\n, 404 at /a");
        let html = "&lt;i a=&#39;1&#39;&gt;&amp;&quot;, &lt;b&gt;&quot;\\\n, 404 at /a";
        assert_eq!(filled(text, Form::Html), html);
        let json = filled(r#"{"a":"{{ request.args["b"] }}","b":{"c":{{ response.code }}}}"#, Form::Json);
        assert_eq!(json, "{\"a\":\"<b>\\\"\\\\\\u000a\",\"b\":{\"c\":404}}");
        assert!(serde_json::from_str::<serde_json::Value>(&json).is_ok());
    }

    #[test]
    fn braces_of_other_languages_are_text() {
        assert_eq!(filled("a { b } }} {c}", Form::Html), "a { b } }} {c}");
        assert_eq!(filled(r#"{{ "{{" }} {{ '}}' }}{{ "\"}}" }}"#, Form::Text), "{{ }}\"}}");
        assert_eq!(filled("", Form::Text), "");
    }

    #[test]
    fn a_value_is_cut_off_before_it_is_too_long() {
        assert_eq!(filled("{{ request.headers[\"x-long\"] }}", Form::Text).len(), VALUE_BYTES_MAX);
    }

    #[test]
    fn a_mistake_is_told_with_its_place_in_the_whole() {
        let told =
            |written: &str, form| Template::build(written, form, Moment::Response).map(drop).unwrap_err().to_string();
        let told_text = told("<p>\n  {{ request.pth }}", Form::Html);
        assert!(told_text.starts_with(" (at 2:6 of the expression): nothing is called `request.pth`"), "{told_text}");
        assert!(
            told("a {{ request.path", Form::Html).starts_with(" (at 1:3 of the expression): this `{{` has no `}}`")
        );
        assert!(told("{{ }}", Form::Html).contains("this expression is empty"));
        assert!(told("{{ request.headers }}", Form::Html).contains("this is a map"));
        assert!(told(r#"{"a": {{ response.code }} x}"#, Form::Json).contains("this is not JSON"));
        assert!(told(&"{{ 1 }}".repeat(101), Form::Text).contains("more than 100 expressions"));
        assert!(told(&"x".repeat(BYTES_MAX + 1), Form::Text).contains("longer than 256 KiB"));
        let file = Template::of_file("\n{{ x }}", Form::Text, Moment::Response).map(drop).unwrap_err();
        assert!(file.starts_with("line 2, column 4: nothing is called `x`"), "{file}");
    }
}
