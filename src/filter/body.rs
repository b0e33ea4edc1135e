//! `body`: changes bodies of requests and of answers, by pattern or by JSON Pointer (RFC 6901).
//!
//! ```yaml
//! - body:
//!     request:
//!       json:
//!         - { at: /tenant, set: { cel: "auth.user" } }   # there afterwards, whatever the client has sent
//!         - { at: /debug, remove: true }
//!     response:
//!       types: ["text/*", application/json]  # media types; without it, those that fit the changes
//!       max_size: 1MiB             # before and behind; what is larger is refused
//!       replace:
//!         - { text: "http://app.internal", with: "https://www.example.com" }
//!         - { pattern: "[0-9]{12}([0-9]{4})", with: "************$1" }
//!       json:
//!         - { at: "/users/*/email", replace: "hidden" }  # only where there is one
//!     concurrent: 1k               # bodies at a time; further ones are refused
//! ```
//!
//! A body is held until it is whole, changed, and passed on. One that is coded cannot be read: answers are asked for
//! plain, and `decompress` behind this filter (for answers) or before it (for requests) undoes what is coded all the
//! same. HEAD, 204, 206 and 304 have no whole body, so that nothing is changed.

mod json;
mod replace;

use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use http::header::{ACCEPT_ENCODING, CONTENT_LENGTH, ETAG, LAST_MODIFIED};
use http::{HeaderMap, HeaderValue, Method};
use pingora::http::ResponseHeader;
use schemars::JsonSchema;
use serde::{Deserialize, Deserializer, Serialize};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::aside::{ASIDE_BYTES, aside, places};
use super::representation::{self, DIGESTS, Type, is_coded};
use super::{Filter, FilterType, Refused, Scope, Stages, Surroundings, Verdict};
use crate::config::Text;
use crate::config::units::{Count, Size};
use crate::error::{BuildError, Refusal, refusal};
use crate::expression::{self, Asked, Moment};
use crate::metrics::Direction;
use crate::metrics::bodies::{BodyChange, BodyMetrics};
use json::{Change, Pointer, checked};
use replace::{Rule, Time};

/// Changes bodies of requests and of answers.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Settings {
    /// What is changed in bodies of requests.
    pub request: Option<Changes>,
    /// What is changed in bodies of answers.
    pub response: Option<Changes>,
    /// How many bodies are held and changed at a time; further ones are refused.
    pub concurrent: Count,
}

impl Default for Settings {
    fn default() -> Self {
        Settings { request: None, response: None, concurrent: Count(1000) }
    }
}

/// What is changed in a body: first `replace`, then `json`, each in its order.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Changes {
    /// The media types of bodies that are changed. Empty: those of text, or of JSON alone if there is no `replace`.
    pub types: Vec<String>,
    /// The size limit of a body, before it is changed and behind.
    pub max_size: Size,
    /// Text that is replaced.
    pub replace: Vec<Replacement>,
    /// Places in JSON that are changed.
    pub json: Vec<Edit>,
}

impl Default for Changes {
    fn default() -> Self {
        Changes { types: Vec::new(), max_size: Size(1 << 20), replace: Vec::new(), json: Vec::new() }
    }
}

/// Text that is replaced: `text` or `pattern`, and `with`.
#[derive(Clone, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Replacement {
    /// The text that is looked for, as it is.
    pub text: Option<String>,
    /// The pattern that is looked for (RE2 syntax).
    pub pattern: Option<String>,
    /// What is put in its place: text, in which `$1` stands for a group of the pattern, or `{ cel: … }`.
    pub with: Text,
    /// Only the first match is replaced.
    pub first: bool,
}

/// A change at one place, or at several: `at` and one of the others.
#[derive(Clone, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Edit {
    /// The place: a JSON Pointer such as `/user/email`, in which `*` is each item of a list or member of an object.
    pub at: String,
    /// What is there afterwards: any value, or `{ cel: … }`, which makes a text.
    #[serde(deserialize_with = "some")]
    pub set: Option<serde_json::Value>,
    /// What is there afterwards if there was something before: any value, or `{ cel: … }`.
    #[serde(deserialize_with = "some")]
    pub replace: Option<serde_json::Value>,
    /// What is there goes.
    pub remove: bool,
}

/// A value that is there, `null` included.
fn some<'de, D: Deserializer<'de>>(written: D) -> Result<Option<serde_json::Value>, D::Error> {
    serde_json::Value::deserialize(written).map(Some)
}

/// What is changed, made ready.
struct Plan {
    types: Vec<Type>,
    /// Places are looked for in every body; else in those whose media type says that they are JSON.
    all_json: bool,
    bytes_max: usize,
    rules: Vec<Rule>,
    edits: Vec<(Pointer, Deed)>,
    metrics: Option<BodyMetrics>,
}

/// A body after its changes.
#[derive(Debug, PartialEq, Eq)]
struct Changed {
    bytes: Vec<u8>,
    /// How many places were replaced, set or removed.
    places: u64,
}

/// What is done at a place.
enum Deed {
    Set(Value),
    Replace(Value),
    Remove,
}

/// A value that is put into JSON.
enum Value {
    Fixed(Vec<u8>),
    Made(expression::Value),
}

impl Value {
    /// The value as JSON, if this is what was made for the exchange.
    fn text<'v>(&'v self, made: &'v [u8]) -> &'v [u8] {
        match self {
            Value::Fixed(fixed) => fixed,
            Value::Made(_) => made,
        }
    }
}

/// What is wrong with a body.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Flaw {
    /// It is, or becomes, larger than it may be.
    Size,
    /// It is not JSON.
    Json,
    /// Its changes take too much time.
    Costly,
}

impl Flaw {
    fn outcome(self) -> BodyChange {
        match self {
            Flaw::Size => BodyChange::TooLarge,
            Flaw::Json => BodyChange::NotJson,
            Flaw::Costly => BodyChange::Costly,
        }
    }
}

static CODED: Refusal = Refusal::new("route.body_coded", 415, "A request body that is coded is not supported here.");
static BUSY: Refusal = Refusal::new("send.bodies", 503, "Too many bodies are being changed; try again later.");
static TOO_LARGE: Refusal = Refusal::new("send.body_size", 413, "The request body is too large to be changed.");
static NO_JSON: Refusal = Refusal::new("send.body_json", 400, "The request body is not JSON.");
static COSTLY: Refusal = Refusal::new("send.body_costly", 413, "The request body takes too long to be changed.");
static ANSWER_CODED: Refusal =
    Refusal::new("receive.body_coded", 502, "The backend's answer is coded, and cannot be changed.");
static ANSWER_BUSY: Refusal =
    Refusal::new("receive.bodies", 503, "Too many bodies are being changed; try again later.");
static ANSWER_TOO_LARGE: Refusal =
    Refusal::new("receive.body_size", 502, "The backend's answer is too large to be changed.");
static ANSWER_NO_JSON: Refusal = Refusal::new("receive.body_json", 502, "The backend's answer is not JSON.");
static ANSWER_COSTLY: Refusal =
    Refusal::new("receive.body_costly", 502, "The backend's answer takes too long to be changed.");

/// Changes bodies.
pub struct Body {
    request: Option<Arc<Plan>>,
    response: Option<Arc<Plan>>,
    places: Arc<Semaphore>,
}

/// What is kept for one exchange.
#[derive(Default)]
struct Kept {
    /// `Accept-Encoding` as the client has sent it, while the endpoint is asked for a plain answer.
    accepts: Option<Vec<HeaderValue>>,
    /// What is to be made of the body of the request, if anything is.
    work: Option<Work>,
    /// The attempt for which it is gathered.
    attempt: u32,
    incoming: Option<Gathered>,
    outgoing: Option<Gathered>,
}

/// The changes to one body.
#[derive(Clone)]
struct Work {
    plan: Arc<Plan>,
    is_json: bool,
    /// What the expressions of the plan make, rules first.
    made: Arc<[Option<Vec<u8>>]>,
}

/// A body that is gathered.
struct Gathered {
    work: Work,
    bytes: Vec<u8>,
    _place: OwnedSemaphorePermit,
}

#[async_trait]
impl Filter for Body {
    fn stages(&self) -> Stages {
        let request = self.request.as_ref().map_or(Stages::NONE, |_| Stages::REQUEST_BODY | Stages::REQUEST_TRAILERS);
        let response = self
            .response
            .as_ref()
            .map_or(Stages::NONE, |_| Stages::RESPONSE | Stages::RESPONSE_BODY | Stages::RESPONSE_TRAILERS);
        Stages::REQUEST | request | response
    }

    fn prepares(&self) -> bool {
        self.request.is_none()
    }

    fn stand_down(&self, scope: &mut Scope<'_>) {
        if let Some(accepts) = scope.kept::<Kept>().and_then(|kept| kept.accepts.take()) {
            representation::put_back(scope.request, accepts);
        }
    }

    async fn request(&self, scope: &mut Scope<'_>) -> Verdict {
        let mut kept = Kept::default();
        if let Some(plan) = &self.request {
            let headers = &scope.request.headers;
            match plan.is_for(headers) {
                None => scope.leave_request_body(),
                Some(_) if is_coded(headers) => {
                    plan.count(BodyChange::Coded);
                    // RFC 9110 §12.5.3: what would be accepted.
                    let headers = vec![(ACCEPT_ENCODING, HeaderValue::from_static("identity"))];
                    return Verdict::Refuse(Refused { refusal: &CODED, headers });
                }
                Some(_) if representation::length(headers).is_some_and(|length| length > plan.bytes_max as u64) => {
                    plan.count(BodyChange::TooLarge);
                    return Verdict::from(&TOO_LARGE);
                }
                Some(is_json) => {
                    kept.work = Some(plan.work(is_json, &scope.asked()));
                    scope.request.remove_header(&CONTENT_LENGTH);
                    representation::drop_digests(scope.request);
                }
            }
        }
        if self.response.is_some() && scope.request.headers.contains_key(ACCEPT_ENCODING) {
            kept.accepts = Some(representation::set_aside(scope.request));
        }
        scope.keep(kept);
        Verdict::Continue
    }

    async fn request_body(&self, scope: &mut Scope<'_>, piece: &mut Option<Bytes>, end: bool) -> Verdict {
        let attempt = scope.facts.attempt;
        let Some(kept) = scope.kept::<Kept>() else { return Verdict::Continue };
        let Some(work) = &kept.work else { return Verdict::Continue };
        if kept.incoming.is_none() || kept.attempt != attempt {
            // The pieces come again from the first.
            kept.attempt = attempt;
            kept.incoming = self.gather(work.clone());
        }
        let Some(gathered) = &mut kept.incoming else { return Verdict::busy(&BUSY) };
        match gathered.piece(piece, end).await {
            Ok(()) => {
                if end {
                    // Its place is free again, perhaps for the answer.
                    kept.incoming = None;
                }
                Verdict::Continue
            }
            Err(Some(flaw)) => Verdict::from(match flaw {
                Flaw::Size => &TOO_LARGE,
                Flaw::Json => &NO_JSON,
                Flaw::Costly => &COSTLY,
            }),
            Err(None) => Verdict::from(&refusal::INTERNAL),
        }
    }

    async fn response(&self, scope: &mut Scope<'_>, response: &mut ResponseHeader) -> Verdict {
        let kept = scope.kept::<Kept>();
        let (accepts, before) = kept.map(|kept| (kept.accepts.take(), kept.outgoing.take())).unwrap_or_default();
        // A response before, of the same exchange, may have been begun.
        drop(before);
        if let Some(accepts) = accepts {
            representation::put_back(scope.request, accepts);
        }
        let plan = self.response.as_ref().filter(|_| representation::is_whole(response));
        let Some((plan, is_json)) = plan.and_then(|plan| Some((plan, plan.is_for(&response.headers)?))) else {
            scope.leave_body();
            return Verdict::Continue;
        };
        if is_coded(&response.headers) {
            plan.count(BodyChange::Coded);
            return Verdict::from(&ANSWER_CODED);
        }
        if scope.request.method == Method::HEAD {
            scope.leave_body();
        } else {
            if representation::length(&response.headers).is_some_and(|length| length > plan.bytes_max as u64) {
                plan.count(BodyChange::TooLarge);
                return Verdict::from(&ANSWER_TOO_LARGE);
            }
            let asked = scope.asked();
            let work = plan.work(is_json, &asked.answered(response));
            let Some(gathered) = self.gather(work) else { return Verdict::busy(&ANSWER_BUSY) };
            match scope.kept::<Kept>() {
                Some(kept) => kept.outgoing = Some(gathered),
                None => scope.keep(Kept { outgoing: Some(gathered), ..Kept::default() }),
            }
            scope.hold_body();
        }
        response.remove_header(&CONTENT_LENGTH);
        representation::recoded(response);
        // It may be another one at any time: nothing that the endpoint says of its own validates it.
        for name in [ETAG, LAST_MODIFIED] {
            response.remove_header(&name);
        }
        Verdict::Continue
    }

    async fn response_body(&self, scope: &mut Scope<'_>, piece: &mut Option<Bytes>, end: bool) -> Verdict {
        let Some(gathered) = scope.kept::<Kept>().and_then(|kept| kept.outgoing.as_mut()) else {
            return Verdict::Continue;
        };
        match gathered.piece(piece, end).await {
            Ok(()) => Verdict::Continue,
            Err(Some(flaw)) => Verdict::from(match flaw {
                Flaw::Size => &ANSWER_TOO_LARGE,
                Flaw::Json => &ANSWER_NO_JSON,
                Flaw::Costly => &ANSWER_COSTLY,
            }),
            Err(None) => Verdict::from(&refusal::INTERNAL),
        }
    }

    fn request_trailers(&self, scope: &mut Scope<'_>, trailers: &mut HeaderMap) {
        if scope.kept::<Kept>().is_some_and(|kept| kept.work.is_some()) {
            drop_digests(trailers);
        }
    }

    fn response_trailers(&self, scope: &mut Scope<'_>, trailers: &mut HeaderMap) {
        if scope.kept::<Kept>().is_some_and(|kept| kept.outgoing.is_some()) {
            drop_digests(trailers);
        }
    }
}

/// Digests behind a body are those of the body as it came.
fn drop_digests(trailers: &mut HeaderMap) {
    DIGESTS.iter().for_each(|name| drop(trailers.remove(*name)));
}

impl FilterType for Body {
    const KEY: &'static str = "body";
    const REFUSALS: &'static [&'static Refusal] = &[
        &CODED,
        &BUSY,
        &TOO_LARGE,
        &NO_JSON,
        &COSTLY,
        &ANSWER_CODED,
        &ANSWER_BUSY,
        &ANSWER_TOO_LARGE,
        &ANSWER_NO_JSON,
        &ANSWER_COSTLY,
    ];
    type Settings = Settings;

    fn build(settings: &Settings, around: &Surroundings<'_>) -> Result<Self, BuildError> {
        let plan = |written: &Option<Changes>, direction: Direction, moment| {
            let Some(written) = written else { return Ok(None) };
            let plan = Plan::build(written, moment).map_err(|error| error.under(direction.name()))?;
            let metrics = around.metrics.map(|metrics| metrics.body(around.route, direction));
            Ok(Some(Arc::new(Plan { metrics, ..plan })))
        };
        let request = plan(&settings.request, Direction::Request, Moment::Request)?;
        let response = plan(&settings.response, Direction::Response, Moment::Response)?;
        if request.is_none() && response.is_none() {
            let told = "nothing to do: write `request` or `response` with `replace` or `json`";
            return Err(BuildError::new("", told));
        }
        Ok(Body { request, response, places: places(settings.concurrent)? })
    }
}

impl Body {
    /// Begins to gather a body; `None`, if too many are under way.
    fn gather(&self, work: Work) -> Option<Gathered> {
        let Ok(place) = self.places.clone().try_acquire_owned() else {
            work.plan.count(BodyChange::Busy);
            return None;
        };
        Some(Gathered { work, bytes: Vec::new(), _place: place })
    }
}

/// The media types of text; those of `compress` and of forms.
const TEXT: [&str; 7] = [
    "text/*",
    "application/json",
    "application/*+json",
    "application/javascript",
    "application/xml",
    "application/*+xml",
    "application/x-www-form-urlencoded",
];
const JSON: [&str; 2] = ["application/json", "application/*+json"];
/// More than this is a program.
const STEPS_MAX: usize = 50;

impl Plan {
    fn build(written: &Changes, moment: Moment) -> Result<Plan, BuildError> {
        if written.replace.is_empty() && written.json.is_empty() {
            return Err(BuildError::new("", "nothing to do: write `replace` or `json`"));
        }
        if written.replace.len() + written.json.len() > STEPS_MAX {
            return Err(BuildError::new("", format!("more than {STEPS_MAX} changes are too many: write a filter")));
        }
        let bytes_max = usize::try_from(written.max_size.0).ok().filter(|&bytes| bytes > 0);
        let bytes_max = bytes_max
            .ok_or_else(|| BuildError::new("max_size", "no body fits into nothing: write a size such as `1MiB`"))?;
        let types = match (&written.types[..], &written.replace[..]) {
            ([], []) => JSON.map(str::to_owned).into(),
            ([], _) => TEXT.map(str::to_owned).into(),
            (types, _) => types.to_vec(),
        };
        let rule = |(index, written): (usize, &Replacement)| {
            rule(written, moment).map_err(|error| error.under(&format!("replace[{index}]")))
        };
        let edit = |(index, written): (usize, &Edit)| {
            edit(written, moment).map_err(|error| error.under(&format!("json[{index}]")))
        };
        Ok(Plan {
            types: Type::all(&types)?,
            all_json: !written.types.is_empty() && written.replace.is_empty(),
            bytes_max,
            rules: written.replace.iter().enumerate().map(rule).collect::<Result<_, _>>()?,
            edits: written.json.iter().enumerate().map(edit).collect::<Result<_, _>>()?,
            metrics: None,
        })
    }

    fn count(&self, outcome: BodyChange) {
        self.metrics.iter().for_each(|metrics| metrics.count(outcome));
    }

    /// Whether a body of this header is changed, and if it is one of JSON.
    fn is_for(&self, headers: &HeaderMap) -> Option<bool> {
        let kind = representation::media_type(headers);
        let covered = kind != b"text/event-stream" && self.types.iter().any(|wanted| wanted.covers(&kind));
        let is_json = self.all_json || kind.ends_with(b"json");
        (covered && (is_json || !self.rules.is_empty())).then_some(is_json)
    }

    /// The changes to a body, with what is made for this exchange.
    fn work(self: &Arc<Self>, is_json: bool, asked: &Asked<'_>) -> Work {
        let text = |made: &expression::Value| made.of(asked).into_owned();
        let rules = self.rules.iter().map(|rule| rule.made().map(text));
        let edits = self.edits.iter().map(|(_, deed)| match deed {
            Deed::Set(Value::Made(made)) | Deed::Replace(Value::Made(made)) => {
                // `to_vec` of a text cannot fail.
                Some(serde_json::to_vec(&String::from_utf8_lossy(&made.of(asked))).unwrap_or_default())
            }
            Deed::Set(Value::Fixed(_)) | Deed::Replace(Value::Fixed(_)) | Deed::Remove => None,
        });
        Work { plan: self.clone(), is_json, made: rules.chain(edits).collect() }
    }
}

fn rule(written: &Replacement, moment: Moment) -> Result<Rule, BuildError> {
    let fixed = match &written.with {
        Text::Fixed(text) => text.as_str(),
        Text::Made { .. } => "",
    };
    let rule = match (&written.text, &written.pattern) {
        (Some(text), None) if text.is_empty() => Err(BuildError::new("text", "it is empty, so that it is everywhere")),
        (Some(text), None) => Rule::text(text, fixed, written.first).map_err(|told| BuildError::new("text", told)),
        (None, Some(pattern)) => Rule::pattern(pattern, fixed, written.first).map_err(|told| match told {
            Ok(told) => BuildError::new("pattern", told),
            Err(told) => BuildError::new("with", told),
        }),
        (Some(_), Some(_)) => Err(BuildError::new("pattern", "write either `text` or `pattern`")),
        (None, None) => Err(BuildError::new("", "nothing is looked for: write `text` or `pattern`")),
    }?;
    match &written.with {
        Text::Fixed(_) => Ok(rule),
        Text::Made { cel } => {
            let made = expression::Value::build(cel, moment);
            Ok(rule.making(made.map_err(|error| error.under("cel").under("with"))?))
        }
    }
}

fn edit(written: &Edit, moment: Moment) -> Result<(Pointer, Deed), BuildError> {
    let at = Pointer::read(&written.at).map_err(|told| BuildError::new("at", told))?;
    let value = |value: &serde_json::Value, key: &str| match value {
        serde_json::Value::Object(map) if map.len() == 1 && map.contains_key("cel") => {
            let Some(cel) = map["cel"].as_str() else {
                return Err(BuildError::new("cel", "expected an expression in quotes").under(key));
            };
            let made = expression::Value::build(cel, moment);
            made.map(Value::Made).map_err(|error| error.under("cel").under(key))
        }
        value => Ok(Value::Fixed(value.to_string().into_bytes())),
    };
    let deed = match (&written.set, &written.replace, written.remove) {
        (Some(set), None, false) => Deed::Set(value(set, "set")?),
        (None, Some(replace), false) => Deed::Replace(value(replace, "replace")?),
        (None, None, true) if at.is_whole() => {
            return Err(BuildError::new("at", "the whole cannot be taken away: `set` it to something"));
        }
        (None, None, true) => Deed::Remove,
        _ => return Err(BuildError::new("", "write one of `set`, `replace` and `remove: true`")),
    };
    Ok((at, deed))
}

impl Work {
    /// The body with all changes made.
    fn apply(&self, body: Vec<u8>) -> Result<Changed, Flaw> {
        // A message without a body has nothing in it.
        if body.is_empty() {
            return Ok(Changed { bytes: body, places: 0 });
        }
        let Plan { bytes_max, rules, edits, .. } = &*self.plan;
        let (time, mut body, mut places) = (Time::begin(), body, 0);
        let made = |index: usize| self.made.get(index).and_then(Option::as_deref).unwrap_or_default();
        for (index, rule) in rules.iter().enumerate() {
            if let Some(changed) = rule.apply(&body, made(index), *bytes_max, &time)? {
                body = changed.bytes;
                places += changed.places;
            }
        }
        if !self.is_json || edits.is_empty() {
            return Ok(Changed { bytes: body, places });
        }
        if !checked(&body) {
            return Err(Flaw::Json);
        }
        for (index, (at, deed)) in edits.iter().enumerate() {
            let made = made(rules.len() + index);
            let change = match deed {
                Deed::Set(to) => Change::Set(to.text(made)),
                Deed::Replace(to) => Change::Replace(to.text(made)),
                Deed::Remove => Change::Remove,
            };
            if let Some(changed) = at.apply(&body, change) {
                body = changed.bytes;
                places += changed.places;
            }
            if body.len() > *bytes_max {
                return Err(Flaw::Size);
            }
        }
        Ok(Changed { bytes: body, places })
    }
}

impl Gathered {
    /// Takes a piece, and leaves nothing in its place until the last: then, the changed body.
    ///
    /// # Errors
    /// What is wrong with the body; `None`, if that is this gateway.
    async fn piece(&mut self, piece: &mut Option<Bytes>, end: bool) -> Result<(), Option<Flaw>> {
        let outcome = self.gathered(piece, end).await;
        let metrics = self.work.plan.metrics.as_ref();
        metrics.iter().for_each(|metrics| match outcome {
            Ok(Some(places)) => metrics.changed(places),
            Err(Some(flaw)) => metrics.count(flaw.outcome()),
            Ok(None) | Err(None) => {}
        });
        outcome.map(drop)
    }

    /// The same without counting. With the last piece come the places that were changed.
    async fn gathered(&mut self, piece: &mut Option<Bytes>, end: bool) -> Result<Option<u64>, Option<Flaw>> {
        let taken = piece.replace(Bytes::new()).unwrap_or_default();
        if taken.len() > self.work.plan.bytes_max - self.bytes.len().min(self.work.plan.bytes_max) {
            return Err(Some(Flaw::Size));
        }
        self.bytes.extend_from_slice(&taken);
        if !end {
            return Ok(None);
        }
        let (work, body) = (self.work.clone(), std::mem::take(&mut self.bytes));
        let changed = if body.len() <= ASIDE_BYTES {
            work.apply(body)
        } else {
            aside(move || work.apply(body)).await.map_err(|error| {
                tracing::error!("a body could not be changed: {error}");
                None
            })?
        };
        let changed = changed.map_err(Some)?;
        *piece = Some(changed.bytes.into());
        Ok(Some(changed.places))
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt;

    use super::super::rehearsal::{Rehearsal, chain, error, example, request, values};
    use super::super::{States, View};
    use super::*;
    use crate::expression::Facts;

    #[test]
    fn the_example_builds() {
        assert!(chain(&example(include_str!("body.rs"))).is_ok());
    }

    /// What becomes of the body of a request with this media type, in pieces of four bytes.
    fn sent(changes: &str, kind: &str, body: &str) -> Result<String, &'static str> {
        let chain =
            chain(&format!("- body: {{ request: {{ {changes} }} }}")).unwrap_or_else(|error| panic!("{error:?}"));
        let mut request = request("/shop?q=1", &[("content-type", kind), ("content-digest", "x")]);
        let mut states = chain.states();
        let facts = Facts::of("all", "/shop");
        let view = |request| View { facts, request };
        let verdict = chain.request(&mut states, view(&mut request)).now_or_never().unwrap();
        if let Verdict::Refuse(refused) = verdict {
            return Err(refused.refusal.reason);
        }
        let changed = chain.sees_request_body(&states);
        assert_eq!(request.headers.contains_key("content-digest"), !changed);
        let mut passed = Vec::new();
        // An attempt before has seen a part of it.
        let mut part = Some(Bytes::from_static(b"{ \"lost\""));
        let early = View { facts: Facts { attempt: 1, ..facts }, request: &mut request };
        chain.request_body(&mut states, early, &mut part, false).now_or_never().unwrap();
        let pieces = body.as_bytes().chunks(4).map(|piece| (Some(Bytes::copy_from_slice(piece)), false));
        for (mut piece, end) in pieces.chain([(None, true)]) {
            let view = View { facts: Facts { attempt: 2, ..facts }, request: &mut request };
            match chain.request_body(&mut states, view, &mut piece, end).now_or_never().unwrap() {
                Verdict::Continue => passed.extend(piece.unwrap_or_default()),
                Verdict::Refuse(refused) => return Err(refused.refusal.reason),
                verdict => panic!("{verdict:?}"),
            }
        }
        Ok(String::from_utf8(passed).unwrap())
    }

    #[test]
    fn a_body_is_changed_by_text_pattern_and_place() {
        let changes = r#"replace: [ { text: a.b, with: c }, { pattern: "([0-9]+)-x", with: "$1" },
                                    { text: "{host}", with: { cel: request.path } } ],
                         json: [ { at: /n, set: { cel: request.query } }, { at: /s, replace: [1, { a: null }] }, { at: /z, set: null },
                                 { at: /t, replace: 0 }, { at: "/l/*", remove: true } ]"#;
        let told = sent(changes, "application/json; charset=utf-8", r#"{"k":"a.b axb 12-x {host}","s":0,"l":[1,2]}"#);
        assert_eq!(told.as_deref(), Ok(r#"{"k":"c axb 12 /shop","s":[1,{"a":null}],"l":[],"n":"q=1","z":null}"#));
        assert_eq!(sent(changes, "text/plain", "a.b {").as_deref(), Ok("c {"), "no JSON, and not said to be");
        assert_eq!(sent(changes, "image/png", "a.b").as_deref(), Ok("a.b"));
        assert_eq!(sent(changes, "application/json", "").as_deref(), Ok(""), "there is none");
        assert_eq!(sent("replace: [ { text: a, with: b, first: true } ]", "text/x", "aaa").as_deref(), Ok("baa"));
        assert_eq!(sent("types: ['*/*'], json: [ { at: '', set: 1 } ]", "", "[]").as_deref(), Ok("1"));
    }

    #[test]
    fn what_cannot_be_changed_is_refused() {
        let json = "json: [ { at: /a, set: 12345678 } ], max_size: 20B";
        assert_eq!(sent(json, "application/json", "{").err(), Some("send.body_json"));
        assert_eq!(sent(json, "application/json", r#"{"b":"0123456789012"}"#).err(), Some("send.body_size"));
        assert_eq!(sent(json, "application/json", r#"{"b":"0123456789"}"#).err(), Some("send.body_size"), "behind");
        let mut coded = Rehearsal::of("- body: { request: { replace: [ { text: a } ] } }")
            .asking("/", &[("content-type", "text/plain"), ("content-encoding", "gzip")]);
        let refused = coded.refused();
        assert_eq!((refused.refusal.reason, refused.refusal.status), ("route.body_coded", 415));
        let mut long = Rehearsal::of("- body: { request: { replace: [ { text: a } ], max_size: 9B } }")
            .asking("/", &[("content-type", "text/plain"), ("content-length", "10")]);
        assert_eq!(long.refused().refusal.reason, "send.body_size");
    }

    const RESPONSE: &str = "- body: { response: { replace: [ { text: a, with: b } ] } }";

    #[test]
    fn an_answer_is_asked_for_plain_and_says_nothing_of_what_it_was() {
        let mut rehearsal =
            Rehearsal::of(RESPONSE).asking("/", &[("accept-encoding", "gzip"), ("accept-encoding", "br")]);
        assert!(values(&rehearsal.pass().headers, "accept-encoding").is_empty());
        let headers = rehearsal.respond(&[
            ("content-type", "text/html"),
            ("content-length", "9"),
            ("etag", "\"a\""),
            ("last-modified", "x"),
            ("digest", "x"),
            ("vary", "Accept-Encoding"),
        ]);
        let left: Vec<&str> = headers.keys().map(|name| name.as_str()).collect();
        assert_eq!(left, ["content-type", "vary"]);
        assert_eq!(values(&rehearsal.request.headers, "accept-encoding"), ["gzip", "br"], "it is put back");
        for other in [("content-type", "image/png"), ("content-type", "text/event-stream"), ("content-range", "x")] {
            let mut fields = vec![("etag", "\"a\""), other];
            if other.0 == "content-range" {
                fields.push(("content-type", "text/html"));
            }
            assert_eq!(values(&Rehearsal::of(RESPONSE).respond(&fields), "etag"), ["\"a\""], "{other:?}");
        }
    }

    #[test]
    fn an_answer_is_refused_before_it_is_read_if_its_header_says_enough() {
        let chain = chain("- body: { response: { replace: [ { text: a } ], max_size: 9B } }").unwrap();
        let refused = |fields: &[(&'static str, &str)]| {
            let (mut request, mut response) = (request("/", &[]), ResponseHeader::build(200, None).unwrap());
            fields.iter().for_each(|(name, value)| response.append_header(*name, *value).map(drop).unwrap());
            let view = View { facts: Facts::of("all", "/"), request: &mut request };
            match chain.response(&mut States::default(), view, &mut response).now_or_never().unwrap() {
                Verdict::Refuse(refused) => Some(refused.refusal.reason),
                _ => None,
            }
        };
        let text = ("content-type", "text/plain");
        assert_eq!(refused(&[text, ("content-encoding", "gzip")]), Some("receive.body_coded"));
        assert_eq!(refused(&[text, ("content-length", "10")]), Some("receive.body_size"));
        assert_eq!(refused(&[text, ("content-length", "9"), ("content-encoding", "identity")]), None);
        assert_eq!(refused(&[("content-encoding", "gzip")]), None);
    }

    #[test]
    fn wrong_settings_are_told_with_their_place() {
        for (settings, told) in [
            ("", ": nothing to do"),
            ("response: {}", ".response: nothing to do"),
            ("response: { replace: [ { with: a } ] }", ".response.replace[0]: nothing is looked for"),
            ("response: { replace: [ { text: '' } ] }", ".response.replace[0].text: it is empty"),
            ("response: { replace: [ { text: a, pattern: b } ] }", ".response.replace[0].pattern: write either"),
            ("response: { replace: [ { pattern: (a } ] }", ".response.replace[0].pattern: unclosed group"),
            (
                "response: { replace: [ { pattern: a, with: $1 } ] }",
                ".response.replace[0].with: the pattern has no group",
            ),
            ("request: { replace: [ { text: a, with: { cel: x } } ] }", ".request.replace[0].with.cel (at 1:1"),
            (
                "request: { replace: [ { text: a, with: { cel: string(response.code) } } ] }",
                ".request.replace[0].with.cel (at 1:8 of the expression): `response.code` comes too early",
            ),
            ("request: { json: [ { at: a, set: 1 } ] }", ".request.json[0].at: `a` is not a JSON Pointer"),
            ("request: { json: [ { at: /a } ] }", ".request.json[0]: write one of"),
            ("request: { json: [ { at: /a, set: 1, remove: true } ] }", ".request.json[0]: write one of"),
            ("request: { json: [ { remove: true } ] }", ".request.json[0].at: the whole cannot be"),
            ("request: { json: [ { at: /a, set: { cel: x } } ] }", ".request.json[0].set.cel (at 1:1"),
            ("request: { json: [ { at: /a, set: 1 } ], types: [x] }", ".request.types[0]: `x` is not a media type"),
            ("request: { json: [ { at: /a, set: 1 } ], max_size: 0B }", ".request.max_size: "),
            ("request: { json: [ { at: /a, set: 1 } ] }, concurrent: 0", ".concurrent: "),
        ] {
            let found = error(&format!("- body: {{ {settings} }}"));
            assert!(found.starts_with(&format!("[0].body{told}")), "{found}");
        }
    }
}
