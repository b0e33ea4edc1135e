//! Decodes content codings (RFC 9110 §8.4.1) within limits.
//!
//! A few bytes may decode to gigabytes. The output is counted while it is produced, and decoding stops at the first
//! byte beyond a limit, so that memory stays bounded.

use std::io::{self, Write};

use brotli::DecompressorWriter;
use flate2::write::MultiGzDecoder;
use flate2::{Decompress, FlushDecompress, Status};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use zstd::stream::raw::{self, DParameter, InBuffer, Operation, OutBuffer};

/// A content coding.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Coding {
    /// GZIP (RFC 1952).
    Gzip,
    /// The zlib format (RFC 1950), or the raw deflate data in it (RFC 1951), which some senders use under this name.
    Deflate,
    /// Brotli (RFC 7932).
    Br,
    /// Zstandard (RFC 8878), with a window of at most 8 MiB.
    Zstd,
}

impl Coding {
    /// Its name in headers.
    pub fn name(self) -> &'static str {
        match self {
            Coding::Gzip => "gzip",
            Coding::Deflate => "deflate",
            Coding::Br => "br",
            Coding::Zstd => "zstd",
        }
    }

    /// The coding of this list with this name, in any case.
    pub fn named(known: &[Coding], name: &[u8]) -> Option<Coding> {
        // RFC 9110 §8.4.1.3.
        let name = if name.eq_ignore_ascii_case(b"x-gzip") { b"gzip" } else { name };
        known.iter().copied().find(|coding| name.eq_ignore_ascii_case(coding.name().as_bytes()))
    }
}

/// The limits on the output.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    /// In bytes.
    pub size: u64,
    /// In bytes per byte of input.
    pub ratio: u64,
}

/// Smaller outputs have no limit on the ratio.
const RATIO_FROM: u64 = 64 << 10;

/// Why a body cannot be decoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flaw {
    /// It is not coded as its header announces, or is truncated.
    Malformed,
    /// It exceeds the size limit.
    Size,
    /// It exceeds the limit on the ratio.
    Ratio,
}

/// Decodes the codings of one body, piece by piece.
pub struct Decoder {
    /// In the order of decoding.
    layers: Vec<Layer>,
    bounds: Bounds,
    came: u64,
}

struct Layer {
    machine: Machine,
    /// There was input.
    begun: bool,
}

enum Machine {
    Gzip(Box<MultiGzDecoder<Sink>>),
    Deflate(Inflate),
    Br(Box<DecompressorWriter<Sink>>),
    Zstd(Zstd),
}

impl Decoder {
    /// A decoder for these codings, which are in the order in which they were applied.
    ///
    /// # Errors
    /// There is not enough memory.
    pub fn new(codings: &[Coding], bounds: Bounds) -> io::Result<Decoder> {
        let layer = |coding: &Coding| Ok(Layer { machine: Machine::new(*coding)?, begun: false });
        let layers = codings.iter().rev().map(layer).collect::<io::Result<_>>()?;
        Ok(Decoder { layers, bounds, came: 0 })
    }

    /// The output for this piece; `end`: it is the last one.
    ///
    /// # Errors
    /// The body cannot be decoded.
    pub fn piece(&mut self, piece: &[u8], end: bool) -> Result<Vec<u8>, Flaw> {
        self.came += piece.len() as u64;
        let allowance = self.bounds.size.min(RATIO_FROM.max(self.bounds.ratio.saturating_mul(self.came)));
        let mut passed: Option<Vec<u8>> = None;
        for layer in &mut self.layers {
            let piece = passed.as_deref().unwrap_or(piece);
            let decoded = layer.piece(piece, end, allowance).map_err(|flaw| match flaw {
                Flaw::Size if allowance < self.bounds.size => Flaw::Ratio,
                flaw => flaw,
            })?;
            passed = Some(decoded);
        }
        Ok(passed.unwrap_or_else(|| piece.to_vec()))
    }
}

impl Layer {
    fn piece(&mut self, piece: &[u8], end: bool, allowance: u64) -> Result<Vec<u8>, Flaw> {
        self.begun |= !piece.is_empty();
        self.machine.sink().allowance = allowance;
        // An empty body is valid for every coding.
        let ended = self.begun && end;
        let worked = self.machine.write(piece).and_then(|()| if ended { self.machine.end() } else { Ok(()) });
        let sink = self.machine.sink();
        match worked {
            Ok(()) => Ok(std::mem::take(&mut sink.bytes)),
            Err(_) if sink.exceeded => Err(Flaw::Size),
            Err(_) => Err(Flaw::Malformed),
        }
    }
}

impl Machine {
    fn new(coding: Coding) -> io::Result<Machine> {
        Ok(match coding {
            Coding::Gzip => Machine::Gzip(Box::new(MultiGzDecoder::new(Sink::default()))),
            Coding::Deflate => Machine::Deflate(Inflate::default()),
            Coding::Br => Machine::Br(Box::new(DecompressorWriter::new(Sink::default(), BUFFER))),
            Coding::Zstd => Machine::Zstd(Zstd::new()?),
        })
    }

    fn sink(&mut self) -> &mut Sink {
        match self {
            Machine::Gzip(gzip) => gzip.get_mut(),
            Machine::Deflate(inflate) => &mut inflate.sink,
            Machine::Br(brotli) => brotli.get_mut(),
            Machine::Zstd(zstd) => &mut zstd.sink,
        }
    }

    fn write(&mut self, piece: &[u8]) -> io::Result<()> {
        match self {
            Machine::Gzip(gzip) => gzip.write_all(piece),
            Machine::Deflate(inflate) => inflate.write(piece),
            Machine::Br(brotli) => brotli.write_all(piece),
            Machine::Zstd(zstd) => zstd.write(piece),
        }
    }

    fn end(&mut self) -> io::Result<()> {
        match self {
            Machine::Gzip(gzip) => gzip.try_finish(),
            Machine::Deflate(inflate) => inflate.end(),
            Machine::Br(brotli) => brotli.close(),
            Machine::Zstd(zstd) => zstd.end(),
        }
    }
}

/// What comes out at once, at most.
const BUFFER: usize = 16 << 10;

/// What has come out of a coding, of one piece; and of all.
#[derive(Default)]
struct Sink {
    bytes: Vec<u8>,
    total: u64,
    allowance: u64,
    exceeded: bool,
}

impl Write for Sink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let total = self.total + bytes.len() as u64;
        if self.exceeded || total > self.allowance {
            self.exceeded = true;
            return Err(io::Error::other("too much"));
        }
        self.total = total;
        self.bytes.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// `deflate`, in both of its forms: the first two bytes tell which.
#[derive(Default)]
struct Inflate {
    sink: Sink,
    state: Option<Decompress>,
    first: Option<u8>,
    ended: bool,
}

impl Inflate {
    fn write(&mut self, mut piece: &[u8]) -> io::Result<()> {
        if self.state.is_none() {
            let begun = self.first.take();
            let Some((&first, rest)) = begun.as_ref().map(|first| (first, piece)).or_else(|| piece.split_first())
            else {
                return Ok(());
            };
            let Some(&second) = rest.first() else {
                self.first = Some(first);
                return Ok(());
            };
            // RFC 1950 §2.2.
            let zlib = first & 0x0f == 8 && (u16::from(first) << 8 | u16::from(second)).is_multiple_of(31);
            self.state = Some(Decompress::new(zlib));
            self.inflate(&[first])?;
            piece = rest;
        }
        self.inflate(piece)
    }

    fn inflate(&mut self, mut piece: &[u8]) -> io::Result<()> {
        let Some(state) = &mut self.state else { return Ok(()) };
        let mut buffer = [0; BUFFER];
        loop {
            if self.ended {
                return if piece.is_empty() { Ok(()) } else { Err(corrupt()) };
            }
            let (taken, made) = (state.total_in(), state.total_out());
            let status = state.decompress(piece, &mut buffer, FlushDecompress::None).map_err(io::Error::other)?;
            let (taken, made) = ((state.total_in() - taken) as usize, (state.total_out() - made) as usize);
            self.sink.write_all(&buffer[..made])?;
            piece = &piece[taken..];
            self.ended = status == Status::StreamEnd;
            if !self.ended && taken == 0 && made == 0 {
                // It wants more, of which there is none yet.
                return if piece.is_empty() { Ok(()) } else { Err(corrupt()) };
            }
        }
    }

    fn end(&self) -> io::Result<()> {
        if self.ended { Ok(()) } else { Err(corrupt()) }
    }
}

/// A window of 8 MiB is what every decoder must have (RFC 8878 §3.1.1.1.2); a larger one would be memory that a client
/// decides on.
const WINDOW_LOG_MAX: u32 = 23;

struct Zstd {
    sink: Sink,
    state: raw::Decoder<'static>,
    /// The last frame is whole.
    ended: bool,
}

impl Zstd {
    fn new() -> io::Result<Zstd> {
        let mut state = raw::Decoder::new()?;
        state.set_parameter(DParameter::WindowLogMax(WINDOW_LOG_MAX))?;
        Ok(Zstd { sink: Sink::default(), state, ended: false })
    }

    fn write(&mut self, piece: &[u8]) -> io::Result<()> {
        let mut input = InBuffer::around(piece);
        let mut buffer = [0; BUFFER];
        while input.pos() < piece.len() || !self.ended {
            let before = input.pos();
            let mut output = OutBuffer::around(&mut buffer[..]);
            self.ended = self.state.run(&mut input, &mut output)? == 0;
            let made = output.pos();
            self.sink.write_all(&buffer[..made])?;
            if made == 0 && input.pos() == before {
                // It wants more, of which there is none yet.
                return if input.pos() == piece.len() { Ok(()) } else { Err(corrupt()) };
            }
        }
        Ok(())
    }

    fn end(&self) -> io::Result<()> {
        if self.ended { Ok(()) } else { Err(corrupt()) }
    }
}

fn corrupt() -> io::Error {
    io::ErrorKind::InvalidData.into()
}

#[cfg(test)]
mod tests {
    use flate2::Compression;
    use flate2::write::{DeflateEncoder, GzEncoder, ZlibEncoder};
    use proptest::prelude::*;

    use super::*;

    const ALL: [Coding; 4] = [Coding::Gzip, Coding::Deflate, Coding::Br, Coding::Zstd];
    const WIDE: Bounds = Bounds { size: 1 << 30, ratio: 1 << 30 };

    fn coded(coding: Coding, plain: &[u8]) -> Vec<u8> {
        let level = Compression::new(6);
        match coding {
            Coding::Gzip => {
                let mut encoder = GzEncoder::new(Vec::new(), level);
                encoder.write_all(plain).unwrap();
                encoder.finish().unwrap()
            }
            Coding::Deflate => {
                let mut encoder = ZlibEncoder::new(Vec::new(), level);
                encoder.write_all(plain).unwrap();
                encoder.finish().unwrap()
            }
            Coding::Br => {
                let mut encoder = brotli::CompressorWriter::new(Vec::new(), 4096, 5, 22);
                encoder.write_all(plain).unwrap();
                encoder.into_inner()
            }
            Coding::Zstd => zstd::encode_all(plain, 3).unwrap(),
        }
    }

    fn bare(plain: &[u8]) -> Vec<u8> {
        let mut encoder = DeflateEncoder::new(Vec::new(), Compression::new(6));
        encoder.write_all(plain).unwrap();
        encoder.finish().unwrap()
    }

    /// What comes of a body in pieces of this size, the end coming with the last or behind it.
    fn decoded(codings: &[Coding], bytes: &[u8], size: usize, bounds: Bounds) -> Result<Vec<u8>, Flaw> {
        let mut decoder = Decoder::new(codings, bounds).unwrap();
        let mut plain = Vec::new();
        for piece in bytes.chunks(size.max(1)) {
            plain.extend(decoder.piece(piece, false)?);
        }
        plain.extend(decoder.piece(&[], true)?);
        Ok(plain)
    }

    #[test]
    fn what_was_coded_comes_out_as_it_was_in_pieces_of_any_size() {
        let text: Vec<u8> = (0..60_000_u32).flat_map(|n| (n * n % 251).to_le_bytes()).collect();
        for coding in ALL {
            let body = coded(coding, &text);
            for size in [1, 7, 1000, body.len()] {
                assert!(decoded(&[coding], &body, size, WIDE).as_ref() == Ok(&text), "{coding:?} by {size}");
            }
            assert_eq!(decoded(&[coding], &coded(coding, b""), 1, WIDE), Ok(Vec::new()), "{coding:?}");
            assert_eq!(decoded(&[coding], b"", 1, WIDE), Ok(Vec::new()), "nothing at all");
        }
        for size in [1, 2, 1000] {
            assert!(decoded(&[Coding::Deflate], &bare(&text), size, WIDE).as_ref() == Ok(&text), "bare by {size}");
        }
        let twice = coded(Coding::Br, &coded(Coding::Gzip, &text));
        assert!(decoded(&[Coding::Gzip, Coding::Br], &twice, 100, WIDE).as_ref() == Ok(&text));
    }

    #[test]
    fn several_members_and_frames_are_one_body() {
        for coding in [Coding::Gzip, Coding::Zstd] {
            let two = [coded(coding, b"one "), coded(coding, b"two")].concat();
            for size in [1, 5, 1000] {
                assert_eq!(decoded(&[coding], &two, size, WIDE).as_deref(), Ok(&b"one two"[..]), "{coding:?}");
            }
        }
    }

    #[test]
    fn what_is_cut_off_or_followed_by_something_else_is_no_body() {
        for coding in ALL {
            let body = coded(coding, b"a body that is long enough to be cut in the middle");
            for cut in [1, 2, body.len() / 2, body.len() - 1] {
                assert_eq!(decoded(&[coding], &body[..cut], 3, WIDE), Err(Flaw::Malformed), "{coding:?} at {cut}");
            }
            let more = [&body[..], b"more"].concat();
            assert_eq!(decoded(&[coding], &more, 1000, WIDE), Err(Flaw::Malformed), "{coding:?}");
            assert_eq!(decoded(&[coding], b"plain text", 1000, WIDE), Err(Flaw::Malformed), "{coding:?}");
        }
    }

    #[test]
    fn a_bomb_ends_at_the_bound_and_takes_no_memory() {
        let zeros = vec![0; 32 << 20];
        for coding in ALL {
            let bomb = coded(coding, &zeros);
            assert!(bomb.len() < 64 << 10, "{coding:?}: {}", bomb.len());
            let bounds = Bounds { size: 1 << 20, ratio: 1 << 30 };
            assert_eq!(decoded(&[coding], &bomb, 4096, bounds), Err(Flaw::Size), "{coding:?}");
            let bounds = Bounds { size: 1 << 30, ratio: 20 };
            assert_eq!(decoded(&[coding], &bomb, 4096, bounds), Err(Flaw::Ratio), "{coding:?}");
            let mut decoder = Decoder::new(&[coding], Bounds { size: 100_000, ratio: 1 << 30 }).unwrap();
            assert_eq!(decoder.piece(&bomb, true), Err(Flaw::Size));
            assert!(decoder.layers[0].machine.sink().bytes.len() <= 100_000, "{coding:?}");
            // A second one inside: the ratio is that of both together.
            let nested = coded(Coding::Gzip, &bomb);
            let bounds = Bounds { size: 1 << 30, ratio: 100 };
            assert_eq!(decoded(&[coding, Coding::Gzip], &nested, 4096, bounds), Err(Flaw::Ratio), "{coding:?}");
        }
        // What is small may have any ratio.
        let small = coded(Coding::Gzip, &zeros[..64 << 10]);
        assert!(decoded(&[Coding::Gzip], &small, 4096, Bounds { size: 1 << 20, ratio: 2 }).is_ok());
    }

    proptest! {
        #[test]
        fn no_bytes_make_a_decoder_panic(bytes in prop::collection::vec(any::<u8>(), 0..600), size in 1..99_usize) {
            for coding in ALL {
                let _ = decoded(&[coding], &bytes, size, Bounds { size: 1 << 20, ratio: 100 });
            }
        }

        #[test]
        fn no_body_that_was_changed_makes_a_decoder_panic(at in 0..400_usize, to in any::<u8>(), size in 1..99_usize) {
            let text: Vec<u8> = (0..900_u32).flat_map(|n| (n * n % 251).to_le_bytes()).collect();
            for coding in ALL {
                let mut bytes = coded(coding, &text);
                let at = at % bytes.len();
                bytes[at] = to;
                let _ = decoded(&[coding], &bytes, size, Bounds { size: 1 << 20, ratio: 100 });
            }
        }
    }
}
