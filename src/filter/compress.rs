//! `compress`: compresses responses for clients that can decode them (RFC 9110 §8.4).
//!
//! ```yaml
//! - compress:
//!     codings: [zstd, br, gzip]  # offered; the first, if a client prefers several equally
//!     types: ["text/*", application/json]   # media types; by default those of text
//!     min_size: 1KiB             # responses that are known to be smaller stay as they are
//!     gzip_level: 5              # 1 to 9
//!     br_level: 4                # 0 to 9
//!     zstd_level: 3              # 1 to 12
//!     concurrent: 1k             # responses at a time; more are sent uncompressed
//! ```
//!
//! A response is not compressed if it is already encoded, is a partial response, must not be transformed
//! (`Cache-Control: no-transform`) or is an event stream. Large pieces are compressed on separate threads, so that no
//! worker is blocked.

mod coding;

use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;
use bytes::Bytes;
use http::header::{CACHE_CONTROL, CONTENT_ENCODING, CONTENT_LENGTH};
use http::{HeaderMap, Method};
use pingora::http::ResponseHeader;
use schemars::JsonSchema;
use serde::Deserialize;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::aside::{ASIDE_BYTES, aside, places};
use super::representation::{self, Type, items};
use super::{Filter, FilterType, Scope, Stages, Surroundings, Verdict};
use crate::config::units::{Count, Size};
use crate::error::{BuildError, refusal};
use crate::metrics::filters::CompressMetrics;
use coding::{Coding, Encoder, Levels};

/// Compresses responses for clients that can decode them.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Settings {
    /// The offered codings. If a client prefers several equally, the first of them is used.
    pub codings: Vec<Coding>,
    /// The media types of responses that are compressed, such as `text/*`.
    pub types: Vec<String>,
    /// A response that is known to be smaller is not compressed.
    pub min_size: Size,
    /// The compression level of gzip, 1 to 9.
    #[schemars(range(min = 1, max = 9))]
    pub gzip_level: u32,
    /// The compression level of Brotli, 0 to 9.
    #[schemars(range(max = 9))]
    pub br_level: u32,
    /// The compression level of Zstandard, 1 to 12.
    #[schemars(range(min = 1, max = 12))]
    pub zstd_level: i32,
    /// The number of responses that are compressed at a time, with up to 2 MiB each; more are sent uncompressed.
    pub concurrent: Count,
}

impl Default for Settings {
    fn default() -> Self {
        let types = [
            "text/*",
            "application/json",
            "application/*+json",
            "application/javascript",
            "application/xml",
            "application/*+xml",
            "application/wasm",
            "image/svg+xml",
            "font/ttf",
        ];
        Settings {
            codings: vec![Coding::Zstd, Coding::Br, Coding::Gzip],
            types: types.map(str::to_owned).into(),
            min_size: Size(1 << 10),
            gzip_level: 5,
            br_level: 4,
            zstd_level: 3,
            concurrent: Count(1000),
        }
    }
}

/// Compresses responses.
pub struct Compress {
    codings: Vec<Coding>,
    types: Vec<Type>,
    bytes_min: u64,
    levels: Levels,
    places: Arc<Semaphore>,
    metrics: Option<CompressMetrics>,
}

/// The present body.
struct Body {
    /// `None` while another thread has it. Only one task uses it, so the lock is never contended; it is needed
    /// because an encoder is not `Sync`.
    encoder: Mutex<Option<Encoder>>,
    coding: Coding,
    /// The body may arrive slowly, so no part of it is held back.
    flush: bool,
    _place: OwnedSemaphorePermit,
}

#[async_trait]
impl Filter for Compress {
    fn stages(&self) -> Stages {
        Stages::RESPONSE | Stages::RESPONSE_BODY
    }

    async fn response(&self, scope: &mut Scope<'_>, response: &mut ResponseHeader) -> Verdict {
        // A previous response of the same exchange may have been started.
        *scope.state = None;
        let body = self.begin(&scope.request.method, &scope.request.headers, response);
        match body {
            Some(body) => scope.keep(body),
            None => scope.leave_body(),
        }
        Verdict::Continue
    }

    async fn response_body(&self, scope: &mut Scope<'_>, piece: &mut Option<Bytes>, end: bool) -> Verdict {
        let Some(body) = scope.kept::<Body>() else { return Verdict::Continue };
        let place = body.encoder.get_mut().unwrap_or_else(PoisonError::into_inner);
        let Some(encoder) = place.take() else { return Verdict::from(&refusal::INTERNAL) };
        let (taken, flush) = (piece.take().unwrap_or_default(), body.flush);
        let before = taken.len();
        let coded = match coded(encoder, taken, flush, end).await {
            Ok((encoder, coded)) => {
                *place = encoder;
                coded
            }
            Err(error) => {
                tracing::error!("an answer could not be compressed: {error}");
                return Verdict::from(&refusal::INTERNAL);
            }
        };
        self.metrics.iter().for_each(|metrics| metrics.passed(body.coding.name(), before, coded.len()));
        *piece = Some(coded);
        Verdict::Continue
    }
}

/// Encodes a piece, here or on another thread. Returns the encoder, unless this was the end.
async fn coded(encoder: Encoder, piece: Bytes, flush: bool, end: bool) -> std::io::Result<(Option<Encoder>, Bytes)> {
    let work = move |mut encoder: Encoder, piece: &[u8]| {
        let mut coded = encoder.piece(piece, flush && !end && !piece.is_empty())?;
        if end {
            coded.extend(encoder.end()?);
            return Ok((None, Bytes::from(coded)));
        }
        Ok((Some(encoder), Bytes::from(coded)))
    };
    if piece.len() <= ASIDE_BYTES {
        return work(encoder, &piece);
    }
    aside(move || work(encoder, &piece)).await?
}

impl FilterType for Compress {
    const KEY: &'static str = "compress";
    type Settings = Settings;

    fn build(settings: &Settings, around: &Surroundings<'_>) -> Result<Self, BuildError> {
        let wrong = |key: &str, told: &str| BuildError::new(key, told);
        if settings.codings.is_empty() {
            return Err(wrong("codings", "no coding is named, so that this would do nothing"));
        }
        for (key, sound) in [
            ("gzip_level", (1..=9).contains(&settings.gzip_level)),
            ("br_level", settings.br_level <= 9),
            ("zstd_level", (1..=12).contains(&settings.zstd_level)),
        ] {
            if !sound {
                return Err(wrong(
                    key,
                    "there is no such level: more than 9 (12 for zstd) would cost more than it saves",
                ));
            }
        }
        Ok(Compress {
            codings: settings.codings.clone(),
            types: Type::all(&settings.types)?,
            bytes_min: settings.min_size.0,
            levels: Levels { gzip: settings.gzip_level, br: settings.br_level, zstd: settings.zstd_level },
            places: places(settings.concurrent)?,
            metrics: around.metrics.map(|metrics| metrics.compress(around.route)),
        })
    }
}

impl Compress {
    /// Changes the header of a response that is compressed, and starts its encoder.
    fn begin(&self, method: &Method, asked: &HeaderMap, response: &mut ResponseHeader) -> Option<Body> {
        if !self.fits(response) {
            return None;
        }
        // A cache must not give it to a client that cannot decode it, nor the plain response to one that can.
        representation::vary(response, "Accept-Encoding");
        let coding = Coding::chosen(&self.codings, asked)?;
        if *method == Method::HEAD {
            // There is no body, and the length of the encoded one is unknown.
            response.remove_header(&CONTENT_LENGTH);
            mark(response, coding);
            return None;
        }
        let Ok(place) = self.places.clone().try_acquire_owned() else {
            self.metrics.iter().for_each(|metrics| metrics.busy());
            return None;
        };
        let encoder = Encoder::new(coding, self.levels).ok()?;
        let flush = !response.headers.contains_key(CONTENT_LENGTH);
        mark(response, coding);
        Some(Body { encoder: Mutex::new(Some(encoder)), coding, flush, _place: place })
    }

    /// Whether a response may be compressed, regardless of its client.
    fn fits(&self, response: &ResponseHeader) -> bool {
        let headers = &response.headers;
        if !representation::is_whole(response) || headers.contains_key(CONTENT_ENCODING) {
            return false;
        }
        if items(headers, &CACHE_CONTROL).any(|directive| directive.eq_ignore_ascii_case(b"no-transform")) {
            return false;
        }
        if representation::length(headers).is_some_and(|length| length < self.bytes_min) {
            return false;
        }
        let kind = representation::media_type(headers);
        kind != b"text/event-stream" && self.types.iter().any(|wanted| wanted.covers(&kind))
    }
}

/// Sets the coding of a response, and removes the fields that are no longer true.
fn mark(response: &mut ResponseHeader, coding: Coding) {
    // A field with a fixed name replaces others: there is room for it.
    let _ = response.insert_header(CONTENT_ENCODING, coding.name());
    representation::recoded(response);
}

#[cfg(test)]
mod tests {
    use super::super::rehearsal::{Rehearsal, chain, error, example, values};
    use super::*;

    fn compress(settings: &str, accept: &str) -> Rehearsal {
        Rehearsal::of(&format!("- compress: {{ {settings} }}")).asking("/", &[("accept-encoding", accept)])
    }

    #[test]
    fn the_example_builds() {
        assert!(chain(&example(include_str!("compress.rs"))).is_ok());
    }

    const HTML: (&str, &str) = ("content-type", "Text/HTML; charset=utf-8");

    #[test]
    fn an_answer_is_marked_and_what_does_not_hold_any_more_is_gone() {
        let headers =
            compress("", "br").respond(&[HTML, ("etag", "\"a\""), ("accept-ranges", "bytes"), ("vary", "Origin")]);
        assert_eq!((values(&headers, "content-encoding"), values(&headers, "etag")), (vec!["br"], vec!["W/\"a\""]));
        assert_eq!(
            (values(&headers, "accept-ranges"), values(&headers, "vary")),
            (vec![], vec!["Origin", "Accept-Encoding"])
        );
        let plain = compress("", "").respond(&[HTML, ("etag", "\"a\"")]);
        assert_eq!((values(&plain, "content-encoding"), values(&plain, "vary")), (vec![], vec!["Accept-Encoding"]));
        assert_eq!(values(&plain, "etag"), ["\"a\""]);
    }

    #[test]
    fn what_must_not_or_need_not_be_smaller_leaves_as_it_is() {
        for fields in [
            &[HTML, ("content-encoding", "gzip")][..],
            &[HTML, ("cache-control", "public, No-Transform")],
            &[HTML, ("content-length", "1023")],
            &[HTML, ("content-range", "bytes 0-9/100")],
            &[("content-type", "image/png")],
            &[("content-type", "text/event-stream")],
            &[("content-type", "application/grpc+proto")],
            &[],
        ] {
            let before: Vec<_> = fields.iter().map(|(name, _)| *name).collect();
            let headers = compress("", "gzip").respond(fields);
            let after: Vec<_> = before.iter().filter(|name| headers.contains_key(**name)).collect();
            assert_eq!((after.len(), headers.len()), (before.len(), before.len()), "{fields:?}");
        }
        for kind in ["application/problem+json", "text/csv", "image/svg+xml"] {
            let headers = compress("", "gzip").respond(&[("content-type", kind), ("content-length", "1024")]);
            assert_eq!(values(&headers, "content-encoding"), ["gzip"], "{kind}");
        }
    }

    #[test]
    fn so_many_are_compressed_at_a_time_and_no_more() {
        let chain = chain("- compress: { concurrent: 1 }").unwrap();
        let mut request = super::super::rehearsal::request("/", &[("accept-encoding", "gzip")]);
        let mut coded = |states: &mut super::super::States| {
            let mut response = ResponseHeader::build(200, None).unwrap();
            response.insert_header(HTML.0, HTML.1).unwrap();
            let view = super::super::View { facts: crate::expression::Facts::of("all", "/"), request: &mut request };
            futures::FutureExt::now_or_never(chain.response(states, view, &mut response)).unwrap();
            response.headers.contains_key(CONTENT_ENCODING)
        };
        let (mut one, mut other) = (chain.states(), chain.states());
        assert!(coded(&mut one) && !coded(&mut other));
        drop(one);
        assert!(coded(&mut other), "there is room again");
    }

    #[test]
    fn wrong_settings_are_told_with_their_place() {
        for (setting, at) in [
            ("codings: []", "codings"),
            ("types: []", "types"),
            ("types: [html]", "types[0]"),
            ("gzip_level: 0", "gzip_level"),
            ("br_level: 11", "br_level"),
            ("zstd_level: 22", "zstd_level"),
            ("concurrent: 0", "concurrent"),
        ] {
            let told = error(&format!("- compress: {{ {setting} }}"));
            assert!(told.starts_with(&format!("[0].compress.{at}: ")), "{told}");
        }
        assert!(error("- compress: { codings: [deflate] }").starts_with("[0].compress.codings[0]: "));
    }
}
