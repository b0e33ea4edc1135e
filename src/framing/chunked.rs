//! Parses a chunked body by the grammar of RFC 9112 §7.1, byte by byte, and finds its end.
//!
//! The parser decides which bytes belong to the body, so that a reader receives no byte of the next message. Everything
//! outside the grammar is an error: bare line feeds, signs, misplaced white space, and extensions that are not a token
//! with an optional token or quoted string. A lenient reader next to a strict one allows request smuggling.
//!
//! ```text
//! chunk     = chunk-size [ chunk-ext ] CRLF chunk-data CRLF
//! chunk-ext = *( BWS ";" BWS token [ BWS "=" BWS ( token / quoted-string ) ] )
//! ```

use http::{HeaderMap, HeaderName, HeaderValue};

use super::{is_token, trim};

/// Maximum number of bytes of chunk extensions in excess of the body's allowance, and of the trailer section.
const EXTRA_BYTES_MAX: usize = 16 * 1024;

/// Allowance for extensions per chunk, in bytes, in addition to two per byte of data. A sender may therefore sign any
/// number of chunks, but may not send mostly extensions.
const EXTRA_BYTES_PER_CHUNK: usize = 16;

/// Maximum number of digits of a chunk size; fifteen allow 2⁶⁰ bytes.
const DIGITS_MAX: u8 = 15;

/// The body violates RFC 9112 §7.1, or has too many bytes that are not data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Malformed;

/// The parser's state: the part of a chunked body that the next byte belongs to.
#[derive(Clone, Debug)]
pub struct Chunks {
    at: At,
    left: u64,
    extra: usize,
    /// The lines of the trailer section received so far.
    trailers: Vec<u8>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum At {
    FirstDigit,
    Digits(u8),
    /// White space that only another extension may follow.
    BeforeExtension,
    /// After the semicolon.
    ExtensionStart,
    ExtensionName,
    /// White space after a name; an equals sign or another extension follows.
    BeforeEquals,
    /// After the equals sign.
    ValueStart,
    ValueToken,
    Quoted,
    /// After a backslash in a quoted string.
    QuotedPair,
    /// After the closing quote.
    ValueEnd,
    SizeLf,
    Data,
    DataCr,
    DataLf,
    TrailerStart,
    TrailerName,
    Trailer,
    TrailerLf,
    LastLf,
    End,
}

impl Default for Chunks {
    fn default() -> Self {
        Chunks { at: At::FirstDigit, left: 0, extra: 0, trailers: Vec::new() }
    }
}

impl Chunks {
    /// Whether the body is complete.
    pub fn ended(&self) -> bool {
        self.at == At::End
    }

    /// Whether the next byte begins a chunk, which can be the last one.
    pub fn is_between(&self) -> bool {
        self.at == At::FirstDigit
    }

    /// Takes the trailers (RFC 9112 §7.1.2). A second call returns an empty map.
    pub fn take_trailers(&mut self) -> HeaderMap {
        let mut fields = HeaderMap::new();
        for line in std::mem::take(&mut self.trailers).split(|&byte| byte == b'\n') {
            let line = line.strip_suffix(b"\r").unwrap_or(line);
            let Some(colon) = memchr::memchr(b':', line) else { continue };
            let (name, value) =
                (HeaderName::from_bytes(&line[..colon]), HeaderValue::from_bytes(trim(&line[colon + 1..])));
            if let (Ok(name), Ok(value)) = (name, value) {
                // The limit on their bytes also limits their number, so this cannot fail.
                let _ = fields.try_append(name, value);
            }
        }
        fields
    }

    /// Parses the next `bytes`. Returns how many of them belong to this body.
    ///
    /// # Errors
    ///
    /// If the bytes violate the grammar.
    pub fn take(&mut self, bytes: &[u8]) -> Result<usize, Malformed> {
        let mut taken = 0;
        while taken < bytes.len() && !self.ended() {
            if self.at == At::Data {
                taken += self.data(bytes.len() - taken);
            } else {
                self.step(bytes[taken])?;
                taken += 1;
            }
        }
        Ok(taken)
    }

    /// Parses the next `bytes` and moves the data to the front. Returns how many of the bytes belong to this body, and
    /// the length of the data. The bytes between the two are garbage.
    ///
    /// # Errors
    ///
    /// If the bytes violate the grammar.
    pub fn unwrap(&mut self, bytes: &mut [u8]) -> Result<(usize, usize), Malformed> {
        let (mut taken, mut data) = (0, 0);
        while taken < bytes.len() && !self.ended() {
            if self.at == At::Data {
                let some = self.data(bytes.len() - taken);
                if taken != data {
                    bytes.copy_within(taken..taken + some, data);
                }
                taken += some;
                data += some;
            } else {
                self.step(bytes[taken])?;
                taken += 1;
            }
        }
        Ok((taken, data))
    }

    /// Consumes data of the current chunk; `there` is the number of available bytes. Returns the number of bytes
    /// consumed.
    fn data(&mut self, there: usize) -> usize {
        let some = self.left.min(there as u64);
        self.left -= some;
        self.extra = self.extra.saturating_sub((some as usize).saturating_mul(2));
        if self.left == 0 {
            self.at = At::DataCr;
        }
        some as usize
    }

    fn step(&mut self, byte: u8) -> Result<(), Malformed> {
        if matches!(self.at, At::TrailerStart | At::TrailerName | At::Trailer | At::TrailerLf) {
            self.trailers.push(byte);
        }
        self.at = match (self.at, byte) {
            (At::FirstDigit, _) => self.digit(byte, 1)?,
            (At::Digits(count), b'0'..=b'9' | b'a'..=b'f' | b'A'..=b'F') => self.digit(byte, count + 1)?,
            (At::Digits(_) | At::ExtensionName | At::ValueToken | At::ValueEnd, b'\r') => At::SizeLf,
            (At::Digits(_) | At::BeforeExtension, b';')
            | (At::ExtensionName | At::BeforeEquals | At::ValueToken | At::ValueEnd, b';') => {
                self.spend(At::ExtensionStart)?
            }
            (At::Digits(_) | At::BeforeExtension | At::ValueToken | At::ValueEnd, b' ' | b'\t') => {
                self.spend(At::BeforeExtension)?
            }
            (At::ExtensionStart, b' ' | b'\t') => self.spend(At::ExtensionStart)?,
            (At::ExtensionName | At::BeforeEquals, b' ' | b'\t') => self.spend(At::BeforeEquals)?,
            (At::ExtensionName | At::BeforeEquals, b'=') => self.spend(At::ValueStart)?,
            (At::ValueStart, b' ' | b'\t') => self.spend(At::ValueStart)?,
            (At::ValueStart, b'"') => self.spend(At::Quoted)?,
            (At::Quoted, b'"') => self.spend(At::ValueEnd)?,
            (At::Quoted, b'\\') => self.spend(At::QuotedPair)?,
            (At::Quoted | At::QuotedPair, b'\t' | b' '..=b'~' | 0x80..) => self.spend(At::Quoted)?,
            (At::ExtensionStart | At::ExtensionName, _) if is_token(byte) => self.spend(At::ExtensionName)?,
            (At::ValueStart | At::ValueToken, _) if is_token(byte) => self.spend(At::ValueToken)?,
            (At::SizeLf, b'\n') => self.begin(),
            (At::DataCr, b'\r') => At::DataLf,
            (At::DataLf, b'\n') => At::FirstDigit,
            (At::TrailerStart, b'\r') => At::LastLf,
            (At::TrailerStart | At::TrailerName, _) if is_token(byte) => self.spend(At::TrailerName)?,
            (At::TrailerName, b':') => self.spend(At::Trailer)?,
            (At::Trailer, b'\r') => At::TrailerLf,
            (At::Trailer, b'\t' | b' '..=b'~' | 0x80..) => self.spend(At::Trailer)?,
            (At::TrailerLf, b'\n') => At::TrailerStart,
            (At::LastLf, b'\n') => At::End,
            _ => return Err(Malformed),
        };
        Ok(())
    }

    /// Called after the size line of a chunk: data follows, or the trailer section after the last chunk.
    fn begin(&mut self) -> At {
        if self.left == 0 {
            self.extra = 0;
            return At::TrailerStart;
        }
        self.extra = self.extra.saturating_sub(EXTRA_BYTES_PER_CHUNK);
        At::Data
    }

    /// Parses one hexadecimal digit of a chunk's size.
    fn digit(&mut self, byte: u8, count: u8) -> Result<At, Malformed> {
        let digit = char::from(byte).to_digit(16).ok_or(Malformed)?;
        if count > DIGITS_MAX {
            return Err(Malformed);
        }
        self.left = self.left * 16 + u64::from(digit);
        Ok(At::Digits(count))
    }

    fn spend(&mut self, at: At) -> Result<At, Malformed> {
        self.extra += 1;
        if self.extra > EXTRA_BYTES_MAX { Err(Malformed) } else { Ok(at) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn end_of(bytes: &[u8]) -> Result<Option<usize>, Malformed> {
        let mut chunks = Chunks::default();
        let taken = chunks.take(bytes)?;
        Ok(chunks.ended().then_some(taken))
    }

    #[test]
    fn the_end_is_found_and_the_next_request_left_alone() {
        assert_eq!(end_of(b"0\r\n\r\nGET"), Ok(Some(5)));
        assert_eq!(end_of(b"3\r\nabc\r\n0\r\n\r\nGET"), Ok(Some(13)));
        assert_eq!(end_of(b"a;x=\"y\"\r\n0123456789\r\n00\r\nT: v\r\n\r\n"), Ok(Some(33)));
        assert_eq!(end_of(b"3\r\nab"), Ok(None));
    }

    #[test]
    fn the_data_is_moved_to_the_front() {
        let whole = *b"3\r\nabc\r\n5;x=y\r\ndefgh\r\n0\r\nT: v\r\n\r\nGET";
        for cut in 1..whole.len() {
            let mut chunks = Chunks::default();
            let mut data = Vec::new();
            let mut taken = 0;
            for part in whole.chunks(cut) {
                let mut part = part.to_vec();
                let (belongs, some) = chunks.unwrap(&mut part).expect("well formed");
                data.extend_from_slice(&part[..some]);
                taken += belongs;
            }
            assert_eq!((&data[..], &whole[taken..]), (&b"abcdefgh"[..], &b"GET"[..]), "{cut}");
        }
    }

    #[test]
    fn the_fields_of_the_trailer_section_are_kept() {
        let body = b"3\r\nabc\r\n0\r\nX-Sum:1\r\nx-sum: \t2 3 \r\nEmpty:\r\nA: b:c\r\n\r\nNext: 1\r\n\r\n";
        for cut in 1..body.len() {
            let mut chunks = Chunks::default();
            let taken: usize = body.chunks(cut).map(|part| chunks.take(part).expect("well formed")).sum();
            assert!(body[taken..].starts_with(b"Next"), "{cut}");
            let fields = chunks.take_trailers();
            let fields: Vec<_> =
                fields.iter().map(|(name, value)| format!("{name}={}", value.to_str().unwrap())).collect();
            assert_eq!(fields, ["x-sum=1", "x-sum=2 3", "empty=", "a=b:c"], "{cut}");
            assert!(chunks.take_trailers().is_empty(), "they are given once");
        }
        let mut none = Chunks::default();
        assert_eq!(none.take(b"0\r\n\r\n"), Ok(5));
        assert!(none.take_trailers().is_empty());
    }

    #[test]
    fn what_the_grammar_allows_is_taken() {
        let sizes = ["3", "03", "000000000000003"];
        let extensions = [
            ";x",
            ";x=y",
            ";x=\"y\"",
            " ;x",
            "\t;\tx",
            "; x = y",
            ";x =\t\"y z\" ;w",
            ";x;y=1;z=\"\"",
            ";x=\"a;b=c\"",
            ";x=\"\\\"\\\\\"",
            ";x=\"\u{e4}\\\u{e4}\"",
            ";!#$%&'*+-.^_`|~=1",
        ];
        let trailers = ["A:\r\n", "A: \t\r\n", "A: b c\td \r\nB:e\r\n", "A: \u{e4}:\"\r\n"];
        let bodies = sizes.iter().map(|size| format!("{size}\r\nabc\r\n00\r\n\r\n"));
        let bodies = bodies.chain(extensions.iter().map(|x| format!("3{x}\r\nabc\r\n0{x}\r\n\r\n")));
        let bodies = bodies.chain(trailers.iter().map(|fields| format!("0\r\n{fields}\r\n")));
        for body in bodies {
            assert_eq!(end_of(body.as_bytes()), Ok(Some(body.len())), "{body:?}");
        }
    }

    #[test]
    fn what_the_grammar_does_not_allow_is_refused() {
        let sizes = [
            "",
            " 3",
            "3 ",
            "3\t",
            "-3",
            "+3",
            "0x3",
            "3g",
            "3,",
            "\u{e4}",
            "3.0",
            "\"3\"",
            "1234567890abcdef",
            "0000000000000003",
            "fffffffffffffffff",
            "3\r\r",
            "3\0",
        ];
        let extensions = [
            ";",
            "; ",
            ";=",
            ";=y",
            ";x=",
            ";x= ",
            ";x==y",
            ";x y",
            ";x=y z",
            ";x ",
            ";x=y ",
            ";x=\"y",
            ";x=\"y\"z",
            ";x=\"y\" ",
            ";x=\"\\",
            ";x=\u{e4}",
            ";\u{e4}",
            ";x=\"\u{7f}\"",
            ";x\0",
            ";x=\"\0\"",
            ";x;",
            ";;x",
            ";x=y,z",
            ";x:y",
            ";(x)",
            ";x=\"a\rb\"",
            ";x=\"a\nb\"",
        ];
        let lines = sizes.iter().map(|size| (*size).to_owned()).chain(extensions.iter().map(|ext| format!("3{ext}")));
        for line in lines {
            for end in ["\r\nabc\r\n0\r\n\r\n", "\nabc\r\n0\r\n\r\n"] {
                let body = format!("{line}{end}");
                assert_eq!(end_of(body.as_bytes()), Err(Malformed), "{body:?}");
            }
            // The same rules apply to the last chunk.
            let last = format!("{}\r\n\r\n", line.replacen('3', "0", 1));
            assert_eq!(end_of(last.as_bytes()), Err(Malformed), "{last:?}");
        }
        for trailers in
            ["A\r\n", ": b\r\n", "A : b\r\n", " A: b\r\n", "A: b\r\n c\r\n", "A: b\n", "A: \0\r\n", "\u{e4}: b\r\n"]
        {
            let body = format!("0\r\n{trailers}\r\n");
            assert_eq!(end_of(body.as_bytes()), Err(Malformed), "{body:?}");
        }
    }

    #[test]
    fn what_is_odd_is_malformed() {
        for odd in [
            &b"\r\n"[..],
            b"3\nabc\r\n",
            b"3\r\nabcd\r\n",
            b"3\r\nabc\n0\r\n",
            b"-3\r\nabc",
            b"+3\r\nabc",
            b"0x3\r\nabc",
            b"g\r\n",
            b";x\r\n",
            b"1234567890abcdef\r\n",
            b"0\r\n\nGET",
            b"0\r\n folded\r\n\r\n",
            b"0\r\nno colon\r\n\r\n",
            b"0\r\n: nameless\r\n\r\n",
            b"3;\x00\r\nabc\r\n",
        ] {
            assert_eq!(end_of(odd), Err(Malformed), "{:?}", odd.escape_ascii().to_string());
        }
    }

    #[test]
    fn extensions_and_trailers_have_a_limit() {
        for begin in ["1;", "0;", "0\r\nT:", "0\r\nT"] {
            let endless = [begin.as_bytes(), &vec![b'x'; EXTRA_BYTES_MAX + 1]].concat();
            assert_eq!(end_of(&endless), Err(Malformed), "{begin}");
        }
        let many = |count: usize, extension: usize, data: usize| {
            let chunk = format!("{data:x};{}\r\n{}\r\n", "x".repeat(extension - 1), "d".repeat(data));
            let body = chunk.repeat(count) + "0\r\n\r\n";
            end_of(body.as_bytes()).map(|end| end == Some(body.len()))
        };
        // A sender that signs each chunk, and one that sends mostly extensions.
        assert_eq!(many(1_000, 90, 64), Ok(true));
        assert_eq!(many(1_000, 90, 1), Err(Malformed));
        let trailers = format!("1;{}\r\nd\r\n0\r\nT: {}\r\n\r\n", "x".repeat(16_000), "y".repeat(16_000));
        assert_eq!(end_of(trailers.as_bytes()), Ok(Some(trailers.len())), "each has a limit of its own");
    }

    proptest! {
        #[test]
        fn a_well_formed_body_ends_where_it_was_written_to_however_it_is_cut(
            pieces in prop::collection::vec(prop::collection::vec(any::<u8>(), 1..50), 0..8),
            tail in prop::collection::vec(any::<u8>(), 0..20),
            cut in 1usize..17,
        ) {
            let mut wire = Vec::new();
            for piece in &pieces {
                wire.extend_from_slice(format!("{:x}\r\n", piece.len()).as_bytes());
                wire.extend_from_slice(piece);
                wire.extend_from_slice(b"\r\n");
            }
            wire.extend_from_slice(b"0\r\n\r\n");
            let end = wire.len();
            wire.extend_from_slice(&tail);

            let mut chunks = Chunks::default();
            let mut taken = 0;
            for part in wire.chunks(cut) {
                taken += chunks.take(part).expect("well-formed");
                if chunks.ended() {
                    break;
                }
            }
            prop_assert_eq!(taken, end);
        }

        #[test]
        fn no_bytes_make_it_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = end_of(&bytes);
        }
    }
}
