//! `decompress`: undoes the coding of bodies, for filters that must read them (RFC 9110 §8.4).
//!
//! ```yaml
//! - decompress:
//!     request: true              # bodies of requests
//!     response: true             # bodies of answers
//!     codings: [gzip, deflate, br, zstd]
//!     max_size: 8MiB             # what a body may be when it is decoded
//!     max_ratio: 100             # and how many times as large as it came, from 64 KiB on
//!     unknown: refuse            # other codings; or pass: such bodies stay as they are
//!     concurrent: 1k             # bodies at a time
//! ```
//!
//! Filters behind this one see bodies of requests as they are; filters before it, those of answers. An endpoint is asked
//! only for codings that can be undone. HEAD, 204, 206 and 304 have no whole body, so that nothing is decoded.

mod decoder;

use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;
use bytes::Bytes;
use http::header::{ACCEPT_ENCODING, CONTENT_ENCODING, CONTENT_LENGTH};
use http::{HeaderMap, HeaderValue, Method};
use pingora::http::ResponseHeader;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::aside::{aside, places};
use super::representation::{self, is_coded, items};
use super::{Filter, FilterType, Refused, Scope, Stages, Surroundings, Verdict};
use crate::config::units::{Count, Size};
use crate::error::{BuildError, Refusal, refusal};
use crate::metrics::Direction;
use crate::metrics::bodies::{BodyCoding, Decoding, DecompressMetrics};
use decoder::{Bounds, Coding, Decoder, Flaw};

/// Undoes the coding of bodies, for filters that must read them.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Settings {
    /// Whether bodies of requests are decoded.
    pub request: bool,
    /// Whether bodies of answers are decoded.
    pub response: bool,
    /// The codings that are undone.
    pub codings: Vec<Coding>,
    /// The size limit of a body when it is decoded.
    pub max_size: Size,
    /// How many times as large as it came a body may be when it is decoded, from 64 KiB on.
    #[schemars(range(min = 1))]
    pub max_ratio: u32,
    /// What becomes of a body with another coding.
    pub unknown: Unknown,
    /// How many bodies are decoded at a time, at up to some 8 MiB each; further ones are refused.
    pub concurrent: Count,
}

/// What becomes of a body with a coding that cannot be undone.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Unknown {
    /// It is refused: 415 for a request, 502 for an answer.
    #[default]
    Refuse,
    /// It stays as it is.
    Pass,
}

impl Default for Settings {
    fn default() -> Self {
        Settings {
            request: true,
            response: true,
            codings: vec![Coding::Gzip, Coding::Deflate, Coding::Br, Coding::Zstd],
            max_size: Size(8 << 20),
            max_ratio: 100,
            unknown: Unknown::Refuse,
            concurrent: Count(1000),
        }
    }
}

static UNKNOWN: Refusal = Refusal::new("route.coding", 415, "The coding of the request body is not supported here.");
static BUSY: Refusal = Refusal::new("route.decoders", 503, "Too many bodies are being decoded; try again later.");
static TOO_LARGE: Refusal = Refusal::new("send.decoded_size", 413, "The request body is too large when it is decoded.");
static TOO_DENSE: Refusal =
    Refusal::new("send.decoded_ratio", 413, "The request body grows too much when it is decoded.");
static MALFORMED: Refusal =
    Refusal::new("send.decoded_malformed", 400, "The request body is not coded as its header says.");
static ANSWER_UNKNOWN: Refusal =
    Refusal::new("receive.coding", 502, "The backend's answer has a coding that is not supported here.");
static ANSWER_BUSY: Refusal =
    Refusal::new("receive.decoders", 503, "Too many bodies are being decoded; try again later.");
static ANSWER_TOO_LARGE: Refusal =
    Refusal::new("receive.decoded_size", 502, "The backend's answer is too large when it is decoded.");
static ANSWER_TOO_DENSE: Refusal =
    Refusal::new("receive.decoded_ratio", 502, "The backend's answer grows too much when it is decoded.");
static ANSWER_MALFORMED: Refusal =
    Refusal::new("receive.decoded_malformed", 502, "The backend's answer is not coded as its header says.");

/// Undoes the coding of bodies.
pub struct Decompress {
    stages: Stages,
    codings: Vec<Coding>,
    bounds: Bounds,
    unknown: Unknown,
    places: Arc<Semaphore>,
    metrics: Both,
}

/// The metrics of each direction that is decoded.
struct Both {
    request: Option<Arc<DecompressMetrics>>,
    response: Option<Arc<DecompressMetrics>>,
}

/// What is kept for one exchange.
#[derive(Default)]
struct Kept {
    /// `Accept-Encoding` as the client has sent it, while the endpoint is asked for something else.
    accepts: Option<Vec<HeaderValue>>,
    /// The codings of the request's body, while that is to be decoded.
    request: Vec<Coding>,
    /// The attempt for which it is decoded.
    attempt: u32,
    incoming: Option<Body>,
    outgoing: Option<Body>,
}

/// A body that is under way.
struct Body {
    /// `None` while another thread has it, and behind its end. There is one task, so that the lock never waits: it is
    /// there since a decoder is for one thread at a time.
    decoder: Mutex<Option<Decoder>>,
    coding: BodyCoding,
    metrics: Option<Arc<DecompressMetrics>>,
    _place: OwnedSemaphorePermit,
}

/// What this filter makes of a body.
enum Plan {
    /// It is not coded.
    Plain,
    Decode(Vec<Coding>),
    /// It has a coding that is not known.
    Unknown,
}

#[async_trait]
impl Filter for Decompress {
    fn stages(&self) -> Stages {
        self.stages
    }

    fn prepares(&self) -> bool {
        !self.stages.contains(Stages::REQUEST_BODY)
    }

    fn stand_down(&self, scope: &mut Scope<'_>) {
        if let Some(accepts) = scope.kept::<Kept>().and_then(|kept| kept.accepts.take()) {
            representation::put_back(scope.request, accepts);
        }
    }

    async fn request(&self, scope: &mut Scope<'_>) -> Verdict {
        let mut kept = Kept::default();
        if self.stages.contains(Stages::REQUEST_BODY) {
            match self.plan(&scope.request.headers) {
                Plan::Decode(codings) => {
                    if self.places.available_permits() == 0 {
                        count(&self.metrics.request, Decoding::Busy);
                        return Verdict::busy(&BUSY);
                    }
                    scope.request.remove_header(&CONTENT_ENCODING);
                    scope.request.remove_header(&CONTENT_LENGTH);
                    representation::drop_digests(scope.request);
                    kept.request = codings;
                }
                Plan::Unknown if self.unknown == Unknown::Refuse => {
                    count(&self.metrics.request, Decoding::Unknown);
                    let known = self.codings.iter().map(|coding| coding.name()).collect::<Vec<_>>().join(", ");
                    // RFC 9110 §12.5.3: what would be accepted.
                    let headers = HeaderValue::from_str(&known).map(|known| (ACCEPT_ENCODING, known));
                    return Verdict::Refuse(Refused { refusal: &UNKNOWN, headers: headers.into_iter().collect() });
                }
                Plan::Unknown => {
                    count(&self.metrics.request, Decoding::Passed);
                    scope.leave_request_body();
                }
                Plan::Plain => scope.leave_request_body(),
            }
        }
        if self.stages.contains(Stages::RESPONSE_BODY)
            && let Some(narrowed) = self.narrowed(&scope.request.headers)
        {
            kept.accepts = Some(representation::set_aside(scope.request));
            // In the place of what is there.
            let _ = scope.request.insert_header(ACCEPT_ENCODING, narrowed);
        }
        scope.keep(kept);
        Verdict::Continue
    }

    async fn request_body(&self, scope: &mut Scope<'_>, piece: &mut Option<Bytes>, end: bool) -> Verdict {
        let attempt = scope.facts.attempt;
        let Some(kept) = scope.kept::<Kept>().filter(|kept| !kept.request.is_empty()) else {
            return Verdict::Continue;
        };
        if kept.incoming.is_none() || kept.attempt != attempt {
            // The pieces come again from the first.
            kept.attempt = attempt;
            kept.incoming = match self.begin(&kept.request, &self.metrics.request) {
                Ok(body) => body,
                Err(()) => return Verdict::from(&refusal::INTERNAL),
            };
        }
        let Some(body) = &mut kept.incoming else { return Verdict::busy(&BUSY) };
        match body.piece(piece, end).await {
            Ok(()) => {
                if end {
                    // Its place is free again, perhaps for the answer.
                    kept.incoming = None;
                }
                Verdict::Continue
            }
            Err(Some(flaw)) => Verdict::from(match flaw {
                Flaw::Malformed => &MALFORMED,
                Flaw::Size => &TOO_LARGE,
                Flaw::Ratio => &TOO_DENSE,
            }),
            Err(None) => Verdict::from(&refusal::INTERNAL),
        }
    }

    async fn response(&self, scope: &mut Scope<'_>, response: &mut ResponseHeader) -> Verdict {
        let kept = scope.kept::<Kept>();
        let (accepts, body) = kept.map(|kept| (kept.accepts.take(), kept.outgoing.take())).unwrap_or_default();
        // A response before, of the same exchange, may have been begun.
        drop(body);
        if let Some(accepts) = accepts {
            representation::put_back(scope.request, accepts);
        }
        if !representation::is_whole(response) {
            scope.leave_body();
            return Verdict::Continue;
        }
        let codings = match self.plan(&response.headers) {
            Plan::Decode(codings) => codings,
            Plan::Unknown if self.unknown == Unknown::Refuse => {
                count(&self.metrics.response, Decoding::Unknown);
                return Verdict::from(&ANSWER_UNKNOWN);
            }
            Plan::Plain => {
                representation::unvary(response, "accept-encoding");
                scope.leave_body();
                return Verdict::Continue;
            }
            Plan::Unknown => {
                count(&self.metrics.response, Decoding::Passed);
                scope.leave_body();
                return Verdict::Continue;
            }
        };
        if scope.request.method == Method::HEAD {
            scope.leave_body();
        } else {
            match self.begin(&codings, &self.metrics.response) {
                Ok(Some(body)) => match scope.kept::<Kept>() {
                    Some(kept) => kept.outgoing = Some(body),
                    None => scope.keep(Kept { outgoing: Some(body), ..Kept::default() }),
                },
                Ok(None) => return Verdict::busy(&ANSWER_BUSY),
                Err(()) => return Verdict::from(&refusal::INTERNAL),
            }
        }
        response.remove_header(&CONTENT_ENCODING);
        response.remove_header(&CONTENT_LENGTH);
        representation::recoded(response);
        representation::unvary(response, "accept-encoding");
        Verdict::Continue
    }

    async fn response_body(&self, scope: &mut Scope<'_>, piece: &mut Option<Bytes>, end: bool) -> Verdict {
        let Some(body) = scope.kept::<Kept>().and_then(|kept| kept.outgoing.as_mut()) else {
            return Verdict::Continue;
        };
        match body.piece(piece, end).await {
            Ok(()) => Verdict::Continue,
            Err(Some(flaw)) => Verdict::from(match flaw {
                Flaw::Malformed => &ANSWER_MALFORMED,
                Flaw::Size => &ANSWER_TOO_LARGE,
                Flaw::Ratio => &ANSWER_TOO_DENSE,
            }),
            Err(None) => Verdict::from(&refusal::INTERNAL),
        }
    }
}

impl FilterType for Decompress {
    const KEY: &'static str = "decompress";
    const REFUSALS: &'static [&'static Refusal] = &[
        &UNKNOWN,
        &BUSY,
        &TOO_LARGE,
        &TOO_DENSE,
        &MALFORMED,
        &ANSWER_UNKNOWN,
        &ANSWER_BUSY,
        &ANSWER_TOO_LARGE,
        &ANSWER_TOO_DENSE,
        &ANSWER_MALFORMED,
    ];
    type Settings = Settings;

    fn build(settings: &Settings, around: &Surroundings<'_>) -> Result<Self, BuildError> {
        let wrong = |key: &str, told: &str| Err(BuildError::new(key, told));
        if !settings.request && !settings.response {
            return wrong("", "nothing to do: both `request` and `response` are false");
        }
        if settings.codings.is_empty() {
            return wrong("codings", "no coding is named, so that this would do nothing");
        }
        if settings.max_size.0 == 0 {
            return wrong("max_size", "no body fits into nothing: write a size such as `8MiB`");
        }
        if settings.max_ratio == 0 {
            return wrong("max_ratio", "write 1 or more");
        }
        let of_request = if settings.request { Stages::REQUEST | Stages::REQUEST_BODY } else { Stages::REQUEST };
        let of_response = if settings.response { Stages::RESPONSE | Stages::RESPONSE_BODY } else { Stages::NONE };
        let metrics = |asked: bool, direction| {
            let metrics = around.metrics.filter(|_| asked);
            metrics.map(|metrics| Arc::new(metrics.decompress(around.route, direction)))
        };
        Ok(Decompress {
            stages: of_request | of_response,
            codings: settings.codings.clone(),
            bounds: Bounds { size: settings.max_size.0, ratio: settings.max_ratio.into() },
            unknown: settings.unknown,
            places: places(settings.concurrent)?,
            metrics: Both {
                request: metrics(settings.request, Direction::Request),
                response: metrics(settings.response, Direction::Response),
            },
        })
    }
}

impl Decompress {
    /// What is to be done with a body of this header.
    fn plan(&self, headers: &HeaderMap) -> Plan {
        if !is_coded(headers) {
            return Plan::Plain;
        }
        let mut codings = Vec::new();
        for name in items(headers, &CONTENT_ENCODING) {
            if name.is_empty() || name.eq_ignore_ascii_case(b"identity") {
                continue;
            }
            match Coding::named(&self.codings, name) {
                Some(coding) if codings.len() < LAYERS_MAX => codings.push(coding),
                _ => return Plan::Unknown,
            }
        }
        Plan::Decode(codings)
    }

    /// Begins with a body. `None`: too many are under way.
    fn begin(&self, codings: &[Coding], metrics: &Option<Arc<DecompressMetrics>>) -> Result<Option<Body>, ()> {
        let Ok(place) = self.places.clone().try_acquire_owned() else {
            count(metrics, Decoding::Busy);
            return Ok(None);
        };
        match Decoder::new(codings, self.bounds) {
            Ok(decoder) => {
                let (decoder, coding) = (Mutex::new(Some(decoder)), label(codings));
                Ok(Some(Body { decoder, coding, metrics: metrics.clone(), _place: place }))
            }
            Err(error) => {
                tracing::error!("a body could not be decoded: {error}");
                Err(())
            }
        }
    }

    /// What the endpoint is asked for in place of what the client accepts: of that, what can be undone. `None`: all of
    /// it can.
    fn narrowed(&self, headers: &HeaderMap) -> Option<HeaderValue> {
        let asked: Vec<&[u8]> = items(headers, &ACCEPT_ENCODING).filter(|item| !item.is_empty()).collect();
        let name = |item: &&[u8]| item.split(|&byte| byte == b';').next().unwrap_or_default().trim_ascii().to_vec();
        let known = |item: &&[u8]| {
            let name = name(item);
            name.eq_ignore_ascii_case(b"identity") || Coding::named(&self.codings, &name).is_some()
        };
        if asked.iter().all(known) {
            return None;
        }
        let mut left: Vec<Vec<u8>> = asked.iter().filter(|item| known(item)).map(|item| item.to_vec()).collect();
        // `*` is any other one: those of them that are known.
        if let Some(any) = asked.iter().find(|item| name(item) == b"*") {
            let weight = any.iter().position(|&byte| byte == b';').map_or(&b""[..], |at| &any[at..]);
            for coding in &self.codings {
                if !asked.iter().any(|item| Coding::named(&[*coding], &name(item)).is_some()) {
                    left.push([coding.name().as_bytes(), weight].concat());
                }
            }
        }
        let left = if left.is_empty() { b"identity".to_vec() } else { left.join(&b", "[..]) };
        HeaderValue::from_bytes(&left).ok()
    }
}

fn count(metrics: &Option<Arc<DecompressMetrics>>, outcome: Decoding) {
    metrics.iter().for_each(|metrics| metrics.count(outcome));
}

/// The label of a body with these codings.
fn label(codings: &[Coding]) -> BodyCoding {
    match codings {
        [Coding::Gzip] => BodyCoding::Gzip,
        [Coding::Deflate] => BodyCoding::Deflate,
        [Coding::Br] => BodyCoding::Br,
        [Coding::Zstd] => BodyCoding::Zstd,
        _ => BodyCoding::Several,
    }
}

impl Flaw {
    fn outcome(self) -> Decoding {
        match self {
            Flaw::Malformed => Decoding::Malformed,
            Flaw::Size => Decoding::TooLarge,
            Flaw::Ratio => Decoding::TooDense,
        }
    }
}

/// The most codings that one body may have on top of each other. More have no use.
const LAYERS_MAX: usize = 3;

/// A smaller piece is decoded on the worker. Each byte may stand for many.
const ASIDE_BYTES: usize = 4 << 10;

impl Body {
    /// Puts in the place of a piece what it stands for.
    ///
    /// # Errors
    /// What is wrong with it; `None`, if that is this gateway.
    async fn piece(&mut self, piece: &mut Option<Bytes>, end: bool) -> Result<(), Option<Flaw>> {
        let read = piece.as_ref().map_or(0, Bytes::len);
        let outcome = self.decoded(piece, end).await;
        let Some(metrics) = &self.metrics else { return outcome };
        metrics.read(self.coding, read);
        match outcome {
            Ok(()) => {
                metrics.decoded(self.coding, piece.as_ref().map_or(0, Bytes::len));
                if end {
                    metrics.count(Decoding::Decoded);
                }
            }
            Err(Some(flaw)) => metrics.count(flaw.outcome()),
            Err(None) => {}
        }
        outcome
    }

    /// The same without counting.
    async fn decoded(&mut self, piece: &mut Option<Bytes>, end: bool) -> Result<(), Option<Flaw>> {
        let place = self.decoder.get_mut().unwrap_or_else(PoisonError::into_inner);
        let mut decoder = place.take().ok_or(None)?;
        let taken = piece.take().unwrap_or_default();
        let decoded = if taken.len() <= ASIDE_BYTES {
            let decoded = decoder.piece(&taken, end).map_err(Some)?;
            *place = Some(decoder);
            decoded
        } else {
            let work = move || (decoder.piece(&taken, end), decoder);
            let (decoded, decoder) = aside(work).await.map_err(|error| {
                tracing::error!("a body could not be decoded: {error}");
                None
            })?;
            *place = Some(decoder);
            decoded.map_err(Some)?
        };
        *piece = Some(decoded.into());
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::rehearsal::{Rehearsal, chain, error, example, values};
    use super::*;

    fn decompress(settings: &str) -> Rehearsal {
        Rehearsal::of(&format!("- decompress: {{ {settings} }}"))
    }

    #[test]
    fn the_example_builds() {
        assert!(chain(&example(include_str!("decompress.rs"))).is_ok());
    }

    #[test]
    fn an_endpoint_is_asked_only_for_what_can_be_undone() {
        for (accepts, asked) in [
            ("gzip, deflate, br, zstd", "gzip, deflate, br, zstd"),
            ("gzip;q=0.5, identity", "gzip;q=0.5, identity"),
            ("compress, GZIP;q=0.7", "GZIP;q=0.7"),
            ("compress", "identity"),
            ("br;q=0, *;q=0.3", "br;q=0, gzip;q=0.3, deflate;q=0.3, zstd;q=0.3"),
            ("*", "gzip, deflate, br, zstd"),
        ] {
            let mut rehearsal = decompress("").asking("/", &[("accept-encoding", accepts)]);
            assert_eq!(values(&rehearsal.pass().headers, "accept-encoding"), [asked], "{accepts}");
            rehearsal.respond(&[]);
            assert_eq!(values(&rehearsal.request.headers, "accept-encoding"), [accepts], "it is put back");
        }
        assert!(values(&decompress("").pass().headers, "accept-encoding").is_empty());
        let mut only = decompress("codings: [gzip]").asking("/", &[("accept-encoding", "br, x-gzip")]);
        assert_eq!(values(&only.pass().headers, "accept-encoding"), ["x-gzip"]);
        let mut not = decompress("response: false").asking("/", &[("accept-encoding", "compress")]);
        assert_eq!(values(&not.pass().headers, "accept-encoding"), ["compress"]);
    }

    #[test]
    fn an_answer_is_marked_as_plain() {
        let headers = decompress("").respond(&[
            ("content-encoding", "gzip"),
            ("content-length", "100"),
            ("etag", "\"a\""),
            ("accept-ranges", "bytes"),
            ("content-digest", "sha-256=:x:"),
            ("vary", "Origin, Accept-Encoding"),
        ]);
        let left: Vec<String> = headers.iter().map(|(name, value)| format!("{name}: {value:?}")).collect();
        assert_eq!(left, ["vary: \"Origin\"", "etag: \"W/\\\"a\\\"\""]);
        let plain = decompress("").respond(&[("content-length", "100"), ("etag", "\"a\"")]);
        assert_eq!((values(&plain, "content-length"), values(&plain, "etag")), (vec!["100"], vec!["\"a\""]));
        let partial = [("content-encoding", "gzip"), ("content-range", "bytes 0-9/100")];
        assert_eq!(values(&decompress("").respond(&partial), "content-encoding"), ["gzip"]);
        let unknown = decompress("unknown: pass").respond(&[("content-encoding", "compress")]);
        assert_eq!(values(&unknown, "content-encoding"), ["compress"]);
    }

    #[test]
    fn a_request_is_marked_as_plain_or_refused() {
        let coded = |settings: &str, coding: &str| {
            decompress(settings).asking("/", &[("content-encoding", coding), ("content-length", "9"), ("digest", "x")])
        };
        for coding in ["gzip", "X-GZIP", "deflate", "identity, br", "gzip, zstd"] {
            let mut rehearsal = coded("", coding);
            assert!(rehearsal.pass().headers.is_empty(), "{coding}: {:?}", rehearsal.request);
        }
        for coding in ["compress", "gzip, x", "gzip, gzip, gzip, gzip"] {
            let refused = coded("", coding).refused();
            assert_eq!((refused.refusal.reason, refused.refusal.status), ("route.coding", 415));
            assert_eq!(refused.headers, [(ACCEPT_ENCODING, HeaderValue::from_static("gzip, deflate, br, zstd"))]);
            assert_eq!(values(&coded("unknown: pass", coding).pass().headers, "content-encoding"), [coding]);
        }
        assert_eq!(values(&coded("request: false", "gzip").pass().headers, "content-encoding"), ["gzip"]);
        assert_eq!(values(&coded("", "identity").pass().headers, "content-length"), ["9"]);
    }

    #[test]
    fn wrong_settings_are_told_with_their_place() {
        for (setting, at) in [
            ("request: false, response: false", ": nothing to do"),
            ("codings: []", ".codings: "),
            ("codings: [compress]", ".codings[0]: "),
            ("max_size: 0B", ".max_size: "),
            ("max_ratio: 0", ".max_ratio: "),
            ("concurrent: 0", ".concurrent: "),
            ("unknown: drop", ".unknown: "),
        ] {
            let told = error(&format!("- decompress: {{ {setting} }}"));
            assert!(told.starts_with(&format!("[0].decompress{at}")), "{told}");
        }
    }
}
