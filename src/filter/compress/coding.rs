//! Content codings: negotiation with the client (RFC 9110 §12.5.3), and encoders.

use std::io::{self, Write};

use brotli::CompressorWriter;
use flate2::Compression;
use flate2::write::GzEncoder;
use http::HeaderMap;
use http::header::ACCEPT_ENCODING;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// A content coding.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Coding {
    /// Zstandard (RFC 8878).
    Zstd,
    /// Brotli (RFC 7932).
    Br,
    /// GZIP (RFC 1952).
    Gzip,
}

impl Coding {
    /// Its name in headers.
    pub fn name(self) -> &'static str {
        match self {
            Coding::Zstd => "zstd",
            Coding::Br => "br",
            Coding::Gzip => "gzip",
        }
    }

    /// The coding of this list that the client prefers, the first of several equals; `None` if it accepts none of
    /// them.
    pub fn chosen(offered: &[Coding], headers: &HeaderMap) -> Option<Coding> {
        let mut best: Option<(Coding, u16)> = None;
        for &coding in offered {
            let weight = weight_of(headers, coding);
            if weight > 0 && best.is_none_or(|(_, most)| weight > most) {
                best = Some((coding, weight));
            }
        }
        let (coding, weight) = best?;
        // If the client prefers the plain response, it gets that.
        (weight >= identity_weight(headers)).then_some(coding)
    }
}

/// The weight of a coding for the client, in thousandths; 0: not accepted.
fn weight_of(headers: &HeaderMap, coding: Coding) -> u16 {
    let mut any = 0;
    for (name, weight) in accepted(headers) {
        // RFC 9110 §8.4.1.3: `x-gzip` is the same coding.
        if name.eq_ignore_ascii_case(coding.name()) || (coding == Coding::Gzip && name.eq_ignore_ascii_case("x-gzip")) {
            return weight;
        }
        if name == "*" {
            any = weight;
        }
    }
    any
}

/// The weight of the plain response, if the client gives one.
fn identity_weight(headers: &HeaderMap) -> u16 {
    accepted(headers).find(|(name, _)| name.eq_ignore_ascii_case("identity")).map_or(0, |(_, weight)| weight)
}

/// The codings that the client lists, with their weights.
fn accepted(headers: &HeaderMap) -> impl Iterator<Item = (&str, u16)> {
    let lines = headers.get_all(ACCEPT_ENCODING).iter().filter_map(|line| line.to_str().ok());
    lines.flat_map(|line| line.split(',')).filter_map(|item| {
        let mut parts = item.split(';').map(str::trim);
        let name = parts.next().filter(|name| !name.is_empty())?;
        let weight = parts.find_map(|part| part.strip_prefix("q=").or_else(|| part.strip_prefix("Q=")));
        let weight = weight.map_or(Some(1.0), |weight| weight.parse::<f32>().ok())?;
        // The RFC allows 0 to 1 with three decimals.
        let thousandths = (weight.clamp(0.0, 1.0) * 1000.0).round();
        Some((name, thousandths as u16))
    })
}

/// The compression level of each coding.
#[derive(Clone, Copy, Debug)]
pub struct Levels {
    pub gzip: u32,
    pub br: u32,
    pub zstd: i32,
}

/// A window of 512 KiB: a larger one saves little, and each response in progress has its own.
const BROTLI_WINDOW: u32 = 19;

/// Compresses one body, piece by piece.
pub enum Encoder {
    Gzip(GzEncoder<Vec<u8>>),
    Br(Box<CompressorWriter<Vec<u8>>>),
    Zstd(zstd::Encoder<'static, Vec<u8>>),
}

impl Encoder {
    /// A new encoder.
    ///
    /// # Errors
    /// There is not enough memory.
    pub fn new(coding: Coding, levels: Levels) -> io::Result<Encoder> {
        Ok(match coding {
            Coding::Gzip => Encoder::Gzip(GzEncoder::new(Vec::new(), Compression::new(levels.gzip))),
            Coding::Br => Encoder::Br(Box::new(CompressorWriter::new(Vec::new(), 4096, levels.br, BROTLI_WINDOW))),
            Coding::Zstd => Encoder::Zstd(zstd::Encoder::new(Vec::new(), levels.zstd)?),
        })
    }

    /// The output for this piece. `flush`: includes all input so far, so that a client can decode it.
    ///
    /// # Errors
    /// The library failed.
    pub fn piece(&mut self, piece: &[u8], flush: bool) -> io::Result<Vec<u8>> {
        let writer: &mut dyn Write = match self {
            Encoder::Gzip(encoder) => encoder,
            Encoder::Br(encoder) => encoder,
            Encoder::Zstd(encoder) => encoder,
        };
        writer.write_all(piece)?;
        if flush {
            writer.flush()?;
        }
        Ok(std::mem::take(match self {
            Encoder::Gzip(encoder) => encoder.get_mut(),
            Encoder::Br(encoder) => encoder.get_mut(),
            Encoder::Zstd(encoder) => encoder.get_mut(),
        }))
    }

    /// The rest of the output, with the end.
    ///
    /// # Errors
    /// The library failed.
    pub fn end(self) -> io::Result<Vec<u8>> {
        match self {
            Encoder::Gzip(encoder) => encoder.finish(),
            Encoder::Br(encoder) => Ok(encoder.into_inner()),
            Encoder::Zstd(encoder) => encoder.finish(),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;

    const ALL: [Coding; 3] = [Coding::Zstd, Coding::Br, Coding::Gzip];

    #[test]
    fn the_client_says_which_coding_it_likes_best() {
        let chosen = |accept: &[&str]| {
            let mut headers = HeaderMap::new();
            accept.iter().for_each(|line| _ = headers.append(ACCEPT_ENCODING, line.parse().unwrap()));
            Coding::chosen(&ALL, &headers).map(Coding::name)
        };
        for (accept, coding) in [
            ("gzip, deflate, br, zstd", Some("zstd")),
            ("gzip, deflate, br", Some("br")),
            ("gzip;q=1.0, br;q=0.9", Some("gzip")),
            ("GZIP", Some("gzip")),
            ("x-gzip", Some("gzip")),
            ("*", Some("zstd")),
            ("*;q=0.5, zstd;q=0", Some("br")),
            ("zstd;q=0, br;q=0.0, gzip;q=0.001", Some("gzip")),
            ("identity, gzip;q=0.5", None),
            ("identity;q=0.5, gzip", Some("gzip")),
            ("deflate, compress", None),
            ("gzip;q=junk", None),
            ("gzip;q=7", Some("gzip")),
            ("", None),
            (",,;q=1,", None),
        ] {
            assert_eq!(chosen(&[accept]), coding, "{accept}");
        }
        assert_eq!(chosen(&["br;q=0.1", "gzip"]), Some("gzip"));
        assert_eq!(chosen(&[]), None, "who says nothing gets the answer as it is");
    }

    fn decoded(coding: Coding, bytes: &[u8]) -> Vec<u8> {
        let mut plain = Vec::new();
        match coding {
            Coding::Gzip => flate2::read::MultiGzDecoder::new(bytes).read_to_end(&mut plain).map(drop),
            Coding::Br => brotli::Decompressor::new(bytes, 4096).read_to_end(&mut plain).map(drop),
            Coding::Zstd => zstd::Decoder::new(bytes).unwrap().read_to_end(&mut plain).map(drop),
        }
        .unwrap();
        plain
    }

    #[test]
    fn what_was_made_smaller_is_the_same_again_and_can_be_read_on_the_way() {
        let levels = Levels { gzip: 5, br: 4, zstd: 3 };
        let text = "a body that says the same again and again. ".repeat(200);
        for coding in ALL {
            let mut encoder = Encoder::new(coding, levels).unwrap();
            let mut coded = Vec::new();
            for piece in text.as_bytes().chunks(1000) {
                let flushed = encoder.piece(piece, true).unwrap();
                assert!(!flushed.is_empty(), "{coding:?} holds a piece back");
                coded.extend(flushed);
            }
            coded.extend(encoder.end().unwrap());
            assert!(coded.len() < text.len() / 3, "{coding:?}: {}", coded.len());
            assert_eq!(decoded(coding, &coded), text.as_bytes());
            let empty = Encoder::new(coding, levels).unwrap().end().unwrap();
            assert_eq!(decoded(coding, &empty), b"");
        }
    }
}
