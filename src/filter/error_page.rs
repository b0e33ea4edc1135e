//! `error_page`: what a client sees in the place of an error (RFC 9110 §15.5, §15.6).
//!
//! ```yaml
//! - error_page:
//!     endpoints: true            # errors of endpoints as well, not only those of Forebay
//!     pages:                     # the first one that is for the error
//!       - on: [404]
//!         html: "<h1>Nothing is here</h1><p>{{ request.path }}"
//!         problem: { type: "https://errors.example/not-found" }
//!       - on: [5xx, "queue.*", route.rate_limit]   # statuses, classes of them, reasons
//!         html: "<h1>{{ response.code }}</h1><p>{{ response.message }}"
//!         json: '{ "error": "{{ response.reason }}", "id": "{{ request.id }}" }'
//!         problem: { detail: "{{ response.message }}", members: { id: "{{ request.id }}" } }
//!         text: "Sorry, try again later.\n"
//! ```
//!
//! Each `{{ … }}` is an expression, and what it makes is escaped. A client gets the form that its `Accept` likes best:
//! HTML, a problem (RFC 9457), JSON or text, in this order if it likes several the same. A text may be in a file:
//! `html: { path: pages/404.html }`. The status stays, and so do the fields that are not about the body, such as
//! `Retry-After`, `WWW-Authenticate` and `Set-Cookie`. gRPC calls never get a page.

use std::collections::BTreeMap;
use std::str::FromStr;
use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use http::header::{
    ACCEPT_RANGES, CONTENT_DISPOSITION, CONTENT_ENCODING, CONTENT_LANGUAGE, CONTENT_LENGTH, CONTENT_LOCATION,
    CONTENT_RANGE, CONTENT_TYPE, ETAG, LAST_MODIFIED, TRAILER, TRANSFER_ENCODING, VARY,
};
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode};
use pingora::http::ResponseHeader;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::listed::{Listed, Source};
use super::template::{Form, Template};
use super::{Answer, Filter, FilterType, Scope, Stages, Surroundings, Verdict, accept};
use crate::error::{BuildError, Refusal, nearest, path, refusal};
use crate::expression::{Asked, Author, Moment};
use crate::metrics::filters::{ErrorPageMetrics, PageForm};
use crate::phase::Phase;

/// Gives clients pages in the place of errors.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// The pages; an error gets the first one that is for it.
    pub pages: Vec<Page>,
    /// Whether errors of endpoints get pages as well, and not only those of Forebay.
    #[serde(default)]
    pub endpoints: bool,
}

/// A page, in one form or in several.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Page {
    /// Which errors it is for: statuses (`404`), classes of them (`5xx`), reasons of Forebay (`wait.timeout`) and all
    /// reasons of a phase (`queue.*`). Empty: all.
    pub on: Vec<On>,
    /// The status that the client gets; that of the error, if there is none.
    pub status: Option<u16>,
    /// The page for people: text with `{{ … }}` in it, or the file that holds it.
    pub html: Option<Written>,
    /// A problem in JSON, by RFC 9457.
    pub problem: Option<Problem>,
    /// The page for programs: JSON with `{{ … }}` in its texts, or the file that holds it.
    pub json: Option<Written>,
    /// Plain text with `{{ … }}` in it, or the file that holds it.
    pub text: Option<Written>,
}

/// An error that a page is for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(untagged, expecting = "a status such as `404`, a class such as `5xx`, or a reason such as `wait.timeout`")]
pub enum On {
    /// A status.
    Status(u16),
    /// A class of statuses or a reason.
    Words(String),
}

/// A text with `{{ … }}` in it.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(untagged, expecting = "a text, or `{ path: … }` for a file")]
pub enum Written {
    /// The text itself.
    Here(String),
    /// The file that holds it.
    File(Source),
}

/// The members of a problem (RFC 9457 §3.1). `status` is added, and `reason` where Forebay has one. A text may have
/// `{{ … }}` in it.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Problem {
    /// What kind of problem it is: a URI.
    pub r#type: String,
    /// That kind in a few words; those of the status, if there are none.
    pub title: Option<String>,
    /// What went wrong this time; the message of the reason, if there is nothing.
    pub detail: Option<String>,
    /// This one occurrence: a URI.
    pub instance: Option<String>,
    /// Further members, all of them texts.
    pub members: BTreeMap<String, String>,
}

impl Default for Problem {
    fn default() -> Self {
        let (title, detail, instance) = (None, None, None);
        Problem { r#type: "about:blank".to_owned(), title, detail, instance, members: BTreeMap::new() }
    }
}

/// Answers in the place of errors.
pub struct ErrorPage {
    pages: Vec<Ready>,
    endpoints: bool,
    metrics: Option<ErrorPageMetrics>,
}

/// A page as it is used.
struct Ready {
    on: Vec<Which>,
    status: Option<StatusCode>,
    forms: Vec<(PageForm, Content)>,
}

/// Which errors a page is for.
#[derive(Debug, PartialEq, Eq)]
enum Which {
    Status(u16),
    Class(u16),
    Reason(String),
    /// With the dot behind it.
    Phase(String),
}

enum Content {
    Fixed(Template),
    File(Arc<Listed<Template>>),
    Problem(Members),
}

struct Members {
    kind: Template,
    title: Option<Template>,
    detail: Option<Template>,
    instance: Option<Template>,
    further: Vec<(String, Template)>,
}

#[async_trait]
impl Filter for ErrorPage {
    fn stages(&self) -> Stages {
        Stages::RESPONSE
    }

    async fn response(&self, scope: &mut Scope<'_>, response: &mut ResponseHeader) -> Verdict {
        if !self.replaces(scope, response) {
            return Verdict::Continue;
        }
        let (status, reason) = (response.status.as_u16(), scope.facts.refusal().map(|refusal| refusal.reason));
        let Some(page) = self.pages.iter().find(|page| page.is_for(status, reason)) else { return Verdict::Continue };
        let asked = scope.asked();
        let (media, answer) = page.answer(&scope.request.headers, &asked.answered(response), response);
        let server_error = response.status.is_server_error();
        self.metrics.iter().for_each(|metrics| metrics.sent(server_error, media));
        Verdict::Answer(answer)
    }
}

impl FilterType for ErrorPage {
    const KEY: &'static str = "error_page";
    type Settings = Settings;

    fn build(settings: &Settings, around: &Surroundings<'_>) -> Result<Self, BuildError> {
        if settings.pages.is_empty() {
            return Err(BuildError::new("pages", "there is no page, so that this would do nothing"));
        }
        let ready = |(index, page): (usize, &Page)| {
            Ready::build(page, around).map_err(|error| error.under(&format!("pages[{index}]")))
        };
        let pages = settings.pages.iter().enumerate().map(ready).collect::<Result<_, _>>()?;
        let metrics = around.metrics.map(|metrics| metrics.error_pages(around.route));
        Ok(ErrorPage { pages, endpoints: settings.endpoints, metrics })
    }
}

impl ErrorPage {
    /// Whether a response is an error that may get a page.
    fn replaces(&self, scope: &Scope<'_>, response: &ResponseHeader) -> bool {
        let status = response.status;
        let is_error = status.is_client_error() || status.is_server_error();
        let ours = match scope.facts.author {
            Some(Author::Gateway(_)) => true,
            Some(Author::Endpoint) => self.endpoints,
            // What an operator has written as a body is to be seen.
            Some(Author::Filter) | None => response.headers.get(CONTENT_LENGTH).is_some_and(|length| length == "0"),
        };
        is_error && ours && !is_grpc(&scope.request.headers)
    }
}

/// A call of gRPC, or of gRPC-Web: it reads none of this.
fn is_grpc(headers: &HeaderMap) -> bool {
    let kind = headers.get(CONTENT_TYPE).map(HeaderValue::as_bytes).unwrap_or_default();
    kind.get(..16).is_some_and(|kind| kind.eq_ignore_ascii_case(b"application/grpc"))
}

impl Ready {
    fn build(page: &Page, around: &Surroundings<'_>) -> Result<Ready, BuildError> {
        let which = |(index, on): (usize, &On)| {
            Which::build(on, around.refusals).map_err(|told| BuildError::new(format!("on[{index}]"), told))
        };
        let status = page.status.map(|status| {
            let known = StatusCode::from_u16(status).ok().filter(|_| (200..=599).contains(&status));
            let told = || format!("`{status}` cannot be the status of an answer with a body: write 200 to 599");
            known.filter(|_| !matches!(status, 204 | 205 | 304)).ok_or_else(|| BuildError::new("status", told()))
        });
        let mut forms = Vec::new();
        let texts = [(PageForm::Html, &page.html), (PageForm::Json, &page.json), (PageForm::Text, &page.text)];
        for (media, written) in texts {
            if let Some(written) = written {
                let content = Content::build(media, written, around).map_err(|error| error.under(media.name()))?;
                forms.push((media, content));
            }
        }
        if let Some(problem) = &page.problem {
            let members = Members::build(problem).map_err(|error| error.under("problem"))?;
            let place = forms.iter().position(|(media, _)| *media != PageForm::Html).unwrap_or(forms.len());
            forms.insert(place, (PageForm::Problem, Content::Problem(members)));
        }
        if forms.is_empty() {
            return Err(BuildError::new("", "this page says nothing: write `html`, `problem`, `json` or `text`"));
        }
        Ok(Ready {
            on: page.on.iter().enumerate().map(which).collect::<Result<_, _>>()?,
            status: status.transpose()?,
            forms,
        })
    }

    fn is_for(&self, status: u16, reason: Option<&str>) -> bool {
        self.on.is_empty() || self.on.iter().any(|which| which.covers(status, reason))
    }

    /// The answer in the form that the client likes best. One that accepts none of them gets the first: an error in a
    /// form that it did not ask for is better than none (RFC 9110 §12.4.1).
    fn answer(&self, accepts: &HeaderMap, asked: &Asked<'_>, response: &ResponseHeader) -> (PageForm, Answer) {
        let forms: Vec<&[&str]> = self.forms.iter().map(|(media, _)| media.types()).collect();
        let (media, content) = &self.forms[accept::best(accepts, &forms).unwrap_or_default()];
        let status = self.status.unwrap_or(response.status);
        let body = match content {
            Content::Fixed(template) => template.of(asked),
            Content::File(listed) => listed.now().of(asked),
            Content::Problem(members) => members.of(asked, status),
        };
        let kept = response.headers.iter().filter(|(name, _)| !is_of_body(name, response.status));
        let mut headers: Vec<(HeaderName, HeaderValue)> =
            kept.map(|(name, value)| (name.clone(), value.clone())).collect();
        headers.push((CONTENT_TYPE, HeaderValue::from_static(media.content_type())));
        if self.forms.len() > 1 {
            headers.push((VARY, HeaderValue::from_static("Accept")));
        }
        (*media, Answer { status, headers, body: Bytes::from(body) })
    }
}

/// Whether a field is about the body that is gone (RFC 9110 §8), or marks it off.
fn is_of_body(name: &HeaderName, status: StatusCode) -> bool {
    // A 416 says with it how long the whole is.
    let range = *name == CONTENT_RANGE && status != StatusCode::RANGE_NOT_SATISFIABLE;
    let known = [
        ACCEPT_RANGES,
        CONTENT_DISPOSITION,
        CONTENT_ENCODING,
        CONTENT_LANGUAGE,
        CONTENT_LENGTH,
        CONTENT_LOCATION,
        CONTENT_TYPE,
        ETAG,
        LAST_MODIFIED,
        TRAILER,
        TRANSFER_ENCODING,
    ];
    range || known.contains(name) || ["content-md5", "content-digest", "repr-digest", "digest"].contains(&name.as_str())
}

impl Which {
    fn build(on: &On, filters: &[&'static Refusal]) -> Result<Which, String> {
        let written = match on {
            On::Status(status) => return Which::status(*status),
            On::Words(written) => written.trim(),
        };
        if let Ok(status) = u16::from_str(written) {
            return Which::status(status);
        }
        match written.to_ascii_lowercase().as_str() {
            "4xx" => return Ok(Which::Class(4)),
            "5xx" => return Ok(Which::Class(5)),
            _ => {}
        }
        if let Some(phase) = written.strip_suffix(".*") {
            if Phase::ALL.iter().any(|known| known.name() == phase) {
                return Ok(Which::Phase(format!("{phase}.")));
            }
            return Err(format!(
                "`{phase}` is not a phase{}",
                hint(phase, Phase::ALL.iter().map(|phase| phase.name()))
            ));
        }
        let reasons = || refusal::ALL.iter().chain(filters).map(|refusal| refusal.reason);
        if reasons().any(|reason| reason == written) {
            return Ok(Which::Reason(written.to_owned()));
        }
        Err(format!("`{written}` is neither a status, a class such as `5xx` nor a reason{}", hint(written, reasons())))
    }

    fn status(status: u16) -> Result<Which, String> {
        if (400..=599).contains(&status) {
            return Ok(Which::Status(status));
        }
        Err(format!("`{status}` is not the status of an error: write 400 to 599"))
    }

    fn covers(&self, status: u16, reason: Option<&str>) -> bool {
        match self {
            Which::Status(wanted) => *wanted == status,
            Which::Class(class) => *class == status / 100,
            Which::Reason(wanted) => reason == Some(wanted),
            Which::Phase(phase) => reason.is_some_and(|reason| reason.starts_with(phase)),
        }
    }
}

fn hint<'k>(wrong: &str, known: impl IntoIterator<Item = &'k str>) -> String {
    nearest(wrong, known).map(|near| format!(": did you mean `{near}`?")).unwrap_or_default()
}

impl PageForm {
    fn content_type(self) -> &'static str {
        match self {
            PageForm::Html => "text/html; charset=utf-8",
            PageForm::Problem => "application/problem+json",
            PageForm::Json => "application/json",
            PageForm::Text => "text/plain; charset=utf-8",
        }
    }

    /// What a client may ask for to get it, the closest first.
    fn types(self) -> &'static [&'static str] {
        match self {
            PageForm::Html => &["text/html", "application/xhtml+xml"],
            PageForm::Problem => &["application/problem+json", "application/json"],
            PageForm::Json => &["application/json", "application/problem+json"],
            PageForm::Text => &["text/plain"],
        }
    }

    fn form(self) -> Form {
        match self {
            PageForm::Html => Form::Html,
            PageForm::Problem | PageForm::Json => Form::Json,
            PageForm::Text => Form::Text,
        }
    }

    /// What reads a file of this form.
    fn parse(self) -> fn(&str) -> Result<Template, String> {
        match self.form() {
            Form::Html => |text| Template::of_file(text, Form::Html, Moment::Response),
            Form::Json => |text| Template::of_file(text, Form::Json, Moment::Response),
            Form::Text => |text| Template::of_file(text, Form::Text, Moment::Response),
        }
    }
}

impl Content {
    fn build(media: PageForm, written: &Written, around: &Surroundings<'_>) -> Result<Content, BuildError> {
        match written {
            Written::Here(text) => Template::build(text, media.form(), Moment::Response).map(Content::Fixed),
            Written::File(source) => Listed::build(source, around, media.parse()).map(Content::File),
        }
    }
}

impl Members {
    const OWN: [&'static str; 6] = ["type", "title", "status", "detail", "instance", "reason"];

    fn build(problem: &Problem) -> Result<Members, BuildError> {
        // JSON is made of the texts as a whole, so that nothing is to be escaped in them.
        let template = |key: &str, written: &str| {
            Template::build(written, Form::Text, Moment::Response).map_err(|error| error.under(key))
        };
        let maybe =
            |key: &str, written: &Option<String>| written.as_ref().map(|written| template(key, written)).transpose();
        let further = |(name, written): (&String, &String)| {
            if Members::OWN.contains(&name.as_str()) {
                let told =
                    format!("`{name}` is a member that a problem has anyway; those with a key stand beside this");
                return Err(BuildError::at_key(name, told).under("members"));
            }
            let made = template(&path::key(name), written).map_err(|error| error.under("members"))?;
            Ok((name.clone(), made))
        };
        Ok(Members {
            kind: template("type", &problem.r#type)?,
            title: maybe("title", &problem.title)?,
            detail: maybe("detail", &problem.detail)?,
            instance: maybe("instance", &problem.instance)?,
            further: problem.members.iter().map(further).collect::<Result<_, _>>()?,
        })
    }

    fn of(&self, asked: &Asked<'_>, status: StatusCode) -> String {
        let refusal = asked.facts.refusal();
        let text = |template: &Option<Template>| template.as_ref().map(|template| template.of(asked));
        let title = text(&self.title).or_else(|| status.canonical_reason().map(str::to_owned));
        let detail = text(&self.detail).or_else(|| refusal.map(|refusal| refusal.message.to_owned()));
        let own = [
            ("type", Some(json!(self.kind.of(asked)))),
            ("title", title.map(|title| json!(title))),
            ("status", Some(json!(status.as_u16()))),
            ("detail", detail.filter(|detail| !detail.is_empty()).map(|detail| json!(detail))),
            ("instance", text(&self.instance).map(|instance| json!(instance))),
            ("reason", refusal.map(|refusal| json!(refusal.reason))),
        ];
        let own = own.into_iter().filter_map(|(name, value)| Some((json!(name), value?)));
        let further = self.further.iter().map(|(name, value)| (json!(name), json!(value.of(asked))));
        let members: Vec<String> = own.chain(further).map(|(name, value)| format!("{name}:{value}")).collect();
        format!("{{{}}}\n", members.join(","))
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt;

    use super::super::View;
    use super::super::rehearsal::{chain, error, example, request, values};
    use super::*;
    use crate::expression::Facts;

    static CLOSED: Refusal = Refusal::new("route.closed", 403, "Nobody may \"enter\".");

    fn answer(page: &str, author: Author, status: u16, asked: &[(&'static str, &str)]) -> Option<Answer> {
        let chain = chain(&format!("- error_page: {{ {page} }}")).unwrap_or_else(|errors| panic!("{errors:?}"));
        let mut request = request("/a?b=%3Ci%3E", asked);
        let mut response = ResponseHeader::build(status, None).unwrap();
        for (name, value) in [
            ("content-type", "text/plain"),
            ("content-length", "7"),
            ("content-encoding", "gzip"),
            ("etag", "\"a\""),
            ("retry-after", "7"),
            ("www-authenticate", "Basic"),
            ("www-authenticate", "Bearer"),
            ("vary", "Origin"),
        ] {
            response.append_header(name, value).unwrap();
        }
        let facts = Facts { author: Some(author), ..Facts::of("shop", "/a") };
        let view = View { facts, request: &mut request };
        match chain.response(&mut chain.states(), view, &mut response).now_or_never().unwrap() {
            Verdict::Answer(answer) => Some(answer),
            Verdict::Continue => None,
            Verdict::Refuse(refused) => panic!("{refused:?}"),
        }
    }

    fn body(page: &str, accept: &str) -> String {
        let answer = answer(page, Author::Gateway(&CLOSED), 403, &[("accept", accept)]).expect("a page");
        String::from_utf8(answer.body.into()).unwrap()
    }

    #[test]
    fn the_example_builds() {
        assert!(chain(&example(include_str!("error_page.rs"))).is_ok());
    }

    #[test]
    fn what_is_not_about_the_body_stays() {
        let page = "pages: [ { html: '<h1>{{ response.code }}</h1>', text: no } ]";
        let answer = answer(page, Author::Gateway(&CLOSED), 403, &[]).expect("a page");
        assert_eq!((answer.status.as_u16(), &answer.body[..]), (403, &b"<h1>403</h1>"[..]));
        let headers = HeaderMap::from_iter(answer.headers.clone());
        assert_eq!(values(&headers, "retry-after"), ["7"]);
        let all = |name: &str| -> Vec<&str> {
            answer.headers.iter().filter(|(known, _)| known == name).map(|(_, value)| value.to_str().unwrap()).collect()
        };
        assert_eq!(all("www-authenticate"), ["Basic", "Bearer"]);
        assert_eq!((all("content-type"), all("vary")), (vec!["text/html; charset=utf-8"], vec!["Origin", "Accept"]));
        for gone in ["content-length", "content-encoding", "etag"] {
            assert!(all(gone).is_empty(), "{gone}");
        }
    }

    #[test]
    fn the_form_is_what_the_client_likes_best_and_always_well_formed() {
        let page = r#"pages: [ { html: "<p>{{ request.args.b }}", json: '{"why":"{{ response.message }}"}',
                                   problem: { members: { path: "{{ request.path }}" } } } ]"#;
        assert_eq!(body(page, "text/html"), "<p>&lt;i&gt;");
        assert_eq!(body(page, "application/json"), r#"{"why":"Nobody may \"enter\"."}"#);
        let problem = r#"{"type":"about:blank","title":"Forbidden","status":403,"detail":"Nobody may \"enter\".","reason":"route.closed","path":"/a"}"#;
        assert_eq!(body(page, "application/problem+json"), format!("{problem}\n"));
        assert_eq!(body(page, "image/png"), "<p>&lt;i&gt;", "better than nothing");
        let problem = "pages: [ { problem: { type: 'urn:x', title: T, detail: D, instance: 'urn:y' }, status: 500 } ]";
        let told =
            r#"{"type":"urn:x","title":"T","status":500,"detail":"D","instance":"urn:y","reason":"route.closed"}"#;
        assert_eq!(body(problem, "*/*"), format!("{told}\n"));
    }

    #[test]
    fn a_page_is_for_statuses_classes_and_reasons() {
        let gets = |on: &str, author, status| {
            answer(&format!("endpoints: true, pages: [ {{ on: [{on}], text: x }} ]"), author, status, &[]).is_some()
        };
        let timeout = Author::Gateway(&refusal::WAIT_TIMEOUT);
        for on in ["", "504", "'504'", "5xx", "5XX", "wait.timeout", "wait.*", "404, wait.timeout"] {
            assert!(gets(on, timeout, 504), "{on}");
        }
        for on in ["503", "4xx", "wait.reset", "queue.*"] {
            assert!(!gets(on, timeout, 504), "{on}");
        }
        assert!(gets("5xx", Author::Endpoint, 504) && !gets("wait.timeout", Author::Endpoint, 504));
        for status in [200, 204, 304, 399] {
            assert!(!gets("", Author::Endpoint, status), "{status}");
        }
        let first = "pages: [ { on: [403], text: one }, { text: two } ]";
        assert_eq!(body(first, "*/*"), "one");
    }

    #[test]
    fn whose_errors_get_a_page_and_whose_do_not() {
        let gets = |keys: &str, author, asked: &[(&'static str, &str)]| {
            answer(&format!("{keys} pages: [ {{ text: x }} ]"), author, 404, asked).is_some()
        };
        assert!(gets("", Author::Gateway(&CLOSED), &[]));
        assert!(!gets("", Author::Endpoint, &[]) && gets("endpoints: true,", Author::Endpoint, &[]));
        assert!(!gets("endpoints: true,", Author::Filter, &[]), "it has a body of its own");
        for kind in ["application/grpc", "Application/gRPC+proto", "application/grpc-web-text"] {
            assert!(!gets("endpoints: true,", Author::Gateway(&CLOSED), &[("content-type", kind)]), "{kind}");
        }
    }

    #[test]
    fn wrong_settings_are_told_with_their_place() {
        for (settings, told) in [
            ("pages: []", "pages: there is no page"),
            ("pages: [ {} ]", "pages[0]: this page says nothing"),
            ("pages: [ { on: [200], text: x } ]", "pages[0].on[0]: `200` is not the status of an error"),
            ("pages: [ { on: [3xx], text: x } ]", "pages[0].on[0]: `3xx` is neither a status"),
            (
                "pages: [ { on: [wait.timout], text: x } ]",
                "pages[0].on[0]: `wait.timout` is neither a status, a class such as `5xx` nor a reason: did you mean `wait.timeout`?",
            ),
            ("pages: [ { on: [wiat.*], text: x } ]", "pages[0].on[0]: `wiat` is not a phase: did you mean `wait`?"),
            (
                "pages: [ { status: 304, text: x } ]",
                "pages[0].status: `304` cannot be the status of an answer with a body",
            ),
            ("pages: [ { html: '{{ request.pth }}' } ]", "pages[0].html (at 1:4 of the expression): nothing is called"),
            ("pages: [ { json: '{' } ]", "pages[0].json: with a number in place of each expression, this is not JSON"),
            ("pages: [ { html: { path: /nowhere/x } } ]", "pages[0].html.path: `/nowhere/x` cannot be read"),
            ("pages: [ { problem: { members: { status: x } } } ]", "pages[0].problem.members.status: `status` is a"),
            ("pages: [ { problem: { detail: '{{ x }}' } } ]", "pages[0].problem.detail (at 1:4 of the expression)"),
        ] {
            let found = error(&format!("- error_page: {{ {settings} }}"));
            assert!(found.starts_with(&format!("[0].error_page.{told}")), "{found}");
        }
        // Reasons of other filters are known as well.
        assert!(chain("- error_page: { pages: [ { on: [route.rate_limit], text: x } ] }").is_ok());
    }
}
