//! Parses an HTTP/1 response from the bytes of an endpoint's connection. It performs no IO.
//!
//! The rules are those of Pingora's client, and stricter where RFC 9112 is: [`framing::answer`] determines the body's
//! framing, and chunks must follow the grammar.

use bytes::{Buf, Bytes, BytesMut};
use http::{HeaderMap, Version, header};
use pingora::http::ResponseHeader;
use pingora::{Error, ErrorType, Result};

use crate::client::fields;
use crate::framing::chunked::Chunks;
use crate::framing::{self, Body, LengthFields, answer};

/// Limits of a header, as in Pingora: number of fields, and bytes.
const FIELDS_MAX: usize = 256;
const HEADER_BYTES_MAX: usize = 1 << 20;

/// Initial read size for a body, in bytes.
const READ_LEAST: usize = 16 << 10;
/// Maximum read size for a body, in bytes.
const READ_MOST: usize = 64 << 10;

/// A part of a response.
#[derive(Debug)]
pub enum Part {
    /// An interim or final header.
    Header {
        /// The parsed header.
        header: Box<ResponseHeader>,
        /// The header as received.
        written: Bytes,
        /// Whether the response ends with this header.
        end: bool,
    },
    /// A piece of the body, which can be empty, and whether it is the last.
    Body(Bytes, bool),
}

/// The parser of one response.
#[derive(Debug)]
pub struct ResponseParser {
    head_only: bool,
    spells: bool,
    at: At,
    /// Whether the header permits further exchanges on the connection.
    keeps: bool,
    read_size: usize,
}

#[derive(Debug)]
enum At {
    Header(Scanner),
    Length(u64),
    Chunks(Chunks),
    UntilEnd,
    Ended,
}

impl ResponseParser {
    /// Creates a parser for the next response. `head_only`: the request method is HEAD. `spells`: the header records
    /// the spelling of its field names.
    pub fn new(head_only: bool, spells: bool) -> Self {
        ResponseParser { head_only, spells, at: At::Header(Scanner::default()), keeps: false, read_size: READ_LEAST }
    }

    /// Whether the response is complete.
    pub fn ended(&self) -> bool {
        match &self.at {
            At::Ended => true,
            At::Chunks(chunks) => chunks.ended(),
            At::Header(_) | At::Length(_) | At::UntilEnd => false,
        }
    }

    /// Whether the connection can be reused: the response is complete and its header permits it.
    pub fn keeps_connection(&self) -> bool {
        self.keeps && self.ended()
    }

    /// Whether the final header has not been received yet.
    pub fn is_in_header(&self) -> bool {
        matches!(self.at, At::Header(_))
    }

    /// Size of the next read, in bytes. `got` is the size of the last read; a full read doubles the next one.
    pub fn room(&mut self, got: usize) -> usize {
        if got >= self.read_size {
            self.read_size = (2 * self.read_size).min(READ_MOST);
        }
        match self.at {
            At::Length(left) => self.read_size.min(usize::try_from(left).unwrap_or(usize::MAX)),
            _ => self.read_size,
        }
    }

    /// Takes the trailers of a chunked body that has ended. A second call returns `None`.
    pub fn take_trailers(&mut self) -> Option<HeaderMap> {
        match &mut self.at {
            At::Chunks(chunks) if chunks.ended() => Some(chunks.take_trailers()).filter(|fields| !fields.is_empty()),
            _ => None,
        }
    }

    /// Takes the next part from `inbox`. `None`: more bytes are needed, or the response is complete.
    ///
    /// # Errors
    ///
    /// If the bytes are not a valid response, or its body contradicts its header.
    pub fn take(&mut self, inbox: &mut BytesMut) -> Result<Option<Part>> {
        if inbox.is_empty() || self.ended() {
            return Ok(None);
        }
        match &mut self.at {
            At::Header(scanner) => match scanner.cut(inbox)? {
                Some(written) => self.header(written).map(Some),
                None => Ok(None),
            },
            At::Length(left) => {
                let piece = inbox.split_to(inbox.len().min(usize::try_from(*left).unwrap_or(usize::MAX)));
                *left -= piece.len() as u64;
                if *left == 0 {
                    self.at = At::Ended;
                }
                Ok(Some(Part::Body(piece.freeze(), self.ended())))
            }
            At::Chunks(chunks) => {
                let (taken, data) = chunks.unwrap(inbox).map_err(|_| malformed("its chunks"))?;
                let piece = inbox.split_to(data).freeze();
                inbox.advance(taken - data);
                let ended = chunks.ended();
                Ok((ended || !piece.is_empty()).then_some(Part::Body(piece, ended)))
            }
            At::UntilEnd => Ok(Some(Part::Body(inbox.split().freeze(), false))),
            At::Ended => Ok(None),
        }
    }

    /// Reports that the endpoint closed its connection. `true`: the response is complete.
    pub fn close(&mut self) -> bool {
        if matches!(self.at, At::UntilEnd) {
            self.at = At::Ended;
        }
        self.ended()
    }

    fn header(&mut self, written: Bytes) -> Result<Part> {
        self.at = At::Header(Scanner::default());
        let mut fields = [const { std::mem::MaybeUninit::uninit() }; FIELDS_MAX];
        let mut parsed = httparse::Response::new(&mut []);
        match parser().parse_response_with_uninit_headers(&mut parsed, &written, &mut fields) {
            Ok(httparse::Status::Complete(end)) if end == written.len() => {}
            _ => return Err(malformed("its header")),
        }
        let mut length_fields = LengthFields::default();
        let (mut closes, mut stays, mut lengths, mut codings) = (false, false, false, false);
        for field in parsed.headers.iter() {
            match field.name.len() {
                10 if field.name.eq_ignore_ascii_case("connection") => {
                    closes |= framing::names([field.value], "close");
                    stays |= framing::names([field.value], "keep-alive");
                }
                14 if field.name.eq_ignore_ascii_case("content-length") => {
                    lengths = true;
                    length_fields.add_length(field.value);
                }
                17 if field.name.eq_ignore_ascii_case("transfer-encoding") => {
                    codings = true;
                    length_fields.add_coding(field.value);
                }
                _ => {}
            }
        }
        let mut header = Box::new(self.made_of(&parsed, &written)?);
        let (status, version) = (header.status.as_u16(), header.version);
        if matches!(status, 100..=199) && status != 101 {
            return Ok(Part::Header { header, written, end: false });
        }
        let framed = answer::frame(self.head_only, status, version, &length_fields, Version::HTTP_11)
            .map_err(|fault| malformed(fault.words()))?;
        // Transfer-Encoding overrides Content-Length (RFC 9112 §6.3).
        if lengths && codings {
            header.remove_header(&header::CONTENT_LENGTH);
        }
        if framed.read != Body::Chunked {
            // Only a chunked body can have trailers.
            header.remove_header(&header::TRAILER);
        }
        let persistent = if version == Version::HTTP_11 { !closes } else { stays && !closes && !codings };
        // A message with both fields may be an attempt at response splitting: close the connection (RFC 9112 §6.3).
        self.keeps = persistent && framed.read != Body::UntilEnd && status != 101 && !(lengths && codings);
        self.at = match framed.read {
            Body::None | Body::Length(0) => At::Ended,
            Body::Length(length) => At::Length(length),
            Body::Chunked => At::Chunks(Chunks::default()),
            Body::UntilEnd => At::UntilEnd,
        };
        Ok(Part::Header { header, written, end: framed.is_whole() })
    }

    /// Builds the header from its parsed form.
    fn made_of(&self, parsed: &httparse::Response<'_, '_>, written: &Bytes) -> Result<ResponseHeader> {
        let status = http::StatusCode::from_u16(parsed.code.unwrap_or_default());
        let status = status.map_err(|_| malformed("its status"))?;
        let version = if parsed.version == Some(1) { Version::HTTP_11 } else { Version::HTTP_10 };
        let mut header = if self.spells {
            let mut header = ResponseHeader::build(status, Some(parsed.headers.len()))?;
            for field in parsed.headers.iter() {
                let name = written.slice_ref(field.name.as_bytes());
                let value = fields::value(written, field.value).ok_or_else(|| malformed("its header"))?;
                header.append_header(name, value).map_err(|_| malformed("its header"))?;
            }
            header
        } else {
            let (mut parts, ()) = http::Response::new(()).into_parts();
            parts.status = status;
            parts.headers = fields::map(written, parsed.headers).ok_or_else(|| malformed("its header"))?;
            parts.into()
        };
        header.set_version(version);
        header.set_reason_phrase(parsed.reason).map_err(|_| malformed("its status"))?;
        Ok(header)
    }
}

/// The parser, with Pingora's settings: it accepts every endpoint that Pingora accepts.
fn parser() -> httparse::ParserConfig {
    let mut parser = httparse::ParserConfig::default();
    parser.allow_spaces_after_header_name_in_responses(true);
    parser.allow_obsolete_multiline_headers_in_responses(true);
    parser
}

/// Finds the end of a header in bytes that arrive piece by piece. It examines each byte once. Lines may end in LF
/// without CR.
#[derive(Debug, Default)]
struct Scanner {
    /// Number of bytes examined.
    seen: usize,
    /// Start of the current line.
    line: usize,
    /// Whether a non-empty line was found. Empty lines before it are skipped.
    begun: bool,
    /// Number of bytes that were parsed and found to be a valid start of a header.
    sound: usize,
}

impl Scanner {
    /// Splits the header off `inbox` if its end has arrived.
    fn cut(&mut self, inbox: &mut BytesMut) -> Result<Option<Bytes>> {
        while let Some(offset) = memchr::memchr(b'\n', &inbox[self.seen..]) {
            let end = self.seen + offset;
            let is_empty = matches!(&inbox[self.line..end], b"" | b"\r");
            (self.seen, self.line) = (end + 1, end + 1);
            if is_empty && self.begun {
                return Ok(Some(inbox.split_to(self.seen).freeze()));
            }
            self.begun |= !is_empty;
        }
        self.seen = inbox.len();
        // An invalid header is rejected before its end, which may never arrive. The check repeats each time the number
        // of bytes has doubled.
        if inbox.len() > 2 * self.sound {
            let mut fields = [const { std::mem::MaybeUninit::uninit() }; FIELDS_MAX];
            let mut parsed = httparse::Response::new(&mut []);
            if parser().parse_response_with_uninit_headers(&mut parsed, inbox, &mut fields).is_err() {
                return Err(malformed("its header"));
            }
            self.sound = inbox.len();
        }
        if inbox.len() > HEADER_BYTES_MAX { Err(malformed("its header is too large")) } else { Ok(None) }
    }
}

fn malformed(what: &'static str) -> Box<Error> {
    Error::explain(ErrorType::InvalidHTTPHeader, what).into_up()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The result of parsing bytes that arrive in pieces of this size on a connection that then closes: status, body,
    /// trailers, whether the connection can be reused, and the bytes left over.
    #[derive(Debug, PartialEq)]
    struct Read {
        interim: Vec<u16>,
        status: u16,
        fields: Vec<String>,
        body: Vec<u8>,
        trailers: Vec<String>,
        keeps: bool,
        left: Vec<u8>,
    }

    fn lines(fields: &HeaderMap) -> Vec<String> {
        fields.iter().map(|(name, value)| format!("{name}: {}", String::from_utf8_lossy(value.as_bytes()))).collect()
    }

    fn read(bytes: &[u8], size: usize, head_only: bool) -> Result<Read, String> {
        let (mut answer, mut inbox) = (ResponseParser::new(head_only, false), BytesMut::new());
        let (mut interim, mut found, mut body) = (Vec::new(), None, Vec::new());
        for piece in bytes.chunks(size) {
            inbox.extend_from_slice(piece);
            while let Some(part) = answer.take(&mut inbox).map_err(|error| error.to_string())? {
                match part {
                    Part::Header { header, end: false, .. } if header.status.is_informational() => {
                        interim.push(header.status.as_u16())
                    }
                    Part::Header { header, end, .. } => {
                        assert_eq!(end, answer.ended());
                        found = Some(header);
                    }
                    Part::Body(piece, end) => {
                        body.extend_from_slice(&piece);
                        assert_eq!(end, answer.ended());
                    }
                }
            }
        }
        if !answer.close() {
            return Err("cut".to_owned());
        }
        let header = found.expect("a header");
        let trailers = answer.take_trailers().map(|fields| lines(&fields)).unwrap_or_default();
        Ok(Read {
            interim,
            status: header.status.as_u16(),
            fields: lines(&header.headers),
            body,
            trailers,
            keeps: answer.keeps_connection(),
            left: inbox.to_vec(),
        })
    }

    /// Parses the bytes in pieces of several sizes; every size must give the same result.
    fn read_anyhow(bytes: &str, head_only: bool) -> Result<Read, String> {
        let whole = read(bytes.as_bytes(), bytes.len(), head_only);
        for size in [1, 2, 3, 7, 64] {
            assert_eq!(read(bytes.as_bytes(), size, head_only).is_ok(), whole.is_ok(), "{size} {bytes:?}");
            if let Ok(whole) = &whole {
                let in_pieces = read(bytes.as_bytes(), size, head_only).expect("the same");
                let left = (whole.left.clone(), in_pieces.left.clone());
                assert_eq!(
                    Read { left: left.0, ..in_pieces },
                    Read { left: left.1, ..read(bytes.as_bytes(), bytes.len(), head_only).expect("the same") }
                );
            }
        }
        whole
    }

    #[test]
    fn an_answer_ends_where_its_header_says() {
        for (bytes, head_only, body, keeps) in [
            ("HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabc", false, "abc", true),
            ("HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", false, "", true),
            ("HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\n", true, "", true),
            ("HTTP/1.1 204 No Content\r\n\r\n", false, "", true),
            ("HTTP/1.1 304 Not Modified\r\nContent-Length: 9\r\n\r\n", false, "", true),
            ("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n", false, "abc", true),
            ("HTTP/1.1 200 OK\r\n\r\nabc", false, "abc", false),
            ("HTTP/1.1 200 OK\r\n\r\n", false, "", false),
            ("HTTP/1.1 200 OK\r\nConnection: x, Close\r\nContent-Length: 3\r\n\r\nabc", false, "abc", false),
            ("HTTP/1.0 200 OK\r\nContent-Length: 3\r\n\r\nabc", false, "abc", false),
            ("HTTP/1.0 200 OK\r\nConnection: keep-alive\r\nContent-Length: 3\r\n\r\nabc", false, "abc", true),
            ("HTTP/1.1 200 OK\nContent-Length: 3\n\nabc", false, "abc", true),
            // Transfer-Encoding overrides Content-Length, and the connection cannot be reused.
            (
                "HTTP/1.1 200 OK\r\nContent-Length: 9\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n0\r\n\r\n",
                false,
                "a",
                false,
            ),
        ] {
            let read = read_anyhow(bytes, head_only).unwrap_or_else(|error| panic!("{bytes:?}: {error}"));
            assert_eq!((read.body, read.keeps, read.left.is_empty()), (body.into(), keeps, true), "{bytes:?}");
        }
    }

    #[test]
    fn a_header_that_is_none_is_the_fault_of_the_endpoint_whatever_is_wrong_with_it() {
        for line in ["099 Early", "000 None", "20 Short", "2000 Long", "abc Odd"] {
            let mut inbox = BytesMut::from(&*format!("HTTP/1.1 {line}\r\nContent-Length: 0\r\n\r\n"));
            let error = ResponseParser::new(false, false).take(&mut inbox).expect_err(line);
            assert_eq!(*error.esource(), pingora::ErrorSource::Upstream, "{line}");
            assert_eq!(*error.etype(), ErrorType::InvalidHTTPHeader, "{line}");
        }
    }

    #[test]
    fn what_is_no_answer_or_only_half_of_one_is_an_error() {
        for bytes in [
            "HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nabc",
            "HTTP/1.1 200 OK\r\nContent-Length: 3",
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n",
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\nabc\r\n0\r\n\r\n",
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n+3\r\nabc\r\n0\r\n\r\n",
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
            "HTTP/1.1 200 OK\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\nabc",
            "HTTP/1.1 200 OK\r\nContent-Length: +3\r\n\r\nabc",
            "HTTP/1.1 200 OK\r\nContent Length: 3\r\n\r\nabc",
            "HTTP/1.0 101 Switching Protocols\r\n\r\n",
            "HTTP/2 200 OK\r\n\r\n",
            "220 mail.example ESMTP\r\n",
            "",
        ] {
            assert!(read(bytes.as_bytes(), bytes.len().max(1), false).is_err(), "{bytes:?}");
        }
        let many = format!("HTTP/1.1 200 OK\r\n{}\r\n", "a: b\r\n".repeat(FIELDS_MAX + 1));
        assert!(read(many.as_bytes(), many.len(), false).is_err());
        let large = format!("HTTP/1.1 200 OK\r\na: {}", "x".repeat(HEADER_BYTES_MAX));
        assert!(read(large.as_bytes(), large.len(), false).is_err_and(|error| error.contains("too large")));
    }

    #[test]
    fn a_header_that_drips_is_looked_at_once_and_parsed_a_few_times() {
        let bytes = format!("HTTP/1.1 200 OK\r\n{}a: {}", "a: b\n".repeat(20), "x".repeat(20_000));
        let (mut scanner, mut inbox, mut parses) = (Scanner::default(), BytesMut::new(), Vec::new());
        for byte in bytes.bytes() {
            inbox.extend_from_slice(&[byte]);
            assert!(scanner.cut(&mut inbox).expect("a beginning").is_none());
            assert_eq!(scanner.seen, inbox.len());
            if parses.last() != Some(&scanner.sound) {
                parses.push(scanner.sound);
            }
        }
        assert!(parses.len() <= 16 && parses.last().is_some_and(|last| 2 * last >= bytes.len()), "{parses:?}");
        for end in ["\r", "\n", "\r"] {
            inbox.extend_from_slice(end.as_bytes());
            assert!(scanner.cut(&mut inbox).expect("a beginning").is_none());
        }
        inbox.extend_from_slice(b"\nbody");
        assert_eq!(scanner.cut(&mut inbox).expect("a header").expect("all of it"), (bytes + "\r\n\r\n").as_bytes());
        assert_eq!(&inbox[..], b"body");
    }

    #[test]
    fn what_is_no_header_is_found_out_before_its_end() {
        for bytes in
            ["220 mail.example ESMTP ready", "HTTP/1.1 200 OK\r\nno field at all, and so on, and so on, and on"]
        {
            let (mut scanner, mut inbox) = (Scanner::default(), BytesMut::new());
            let refused = bytes.bytes().any(|byte| {
                inbox.extend_from_slice(&[byte]);
                scanner.cut(&mut inbox).is_err()
            });
            assert!(refused, "{bytes:?}");
        }
    }

    #[test]
    fn interim_answers_come_before_the_final_one_and_bytes_behind_it_stay() {
        let bytes = "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\nabc";
        let read = read_anyhow(bytes, false).expect("an answer");
        assert_eq!(
            (read.interim, read.status, read.body, read.left),
            (vec![100, 103], 200, b"a".to_vec(), b"bc".to_vec())
        );
    }

    #[test]
    fn trailers_follow_chunks_and_are_announced_nowhere_else() {
        let chunked = "HTTP/1.1 200 OK\r\nTrailer: x\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n0\r\nX: y\r\n\r\n";
        let read = read_anyhow(chunked, false).expect("an answer");
        assert_eq!((&read.trailers[..], read.keeps), (&["x: y".to_owned()][..], true));
        assert!(read.fields.contains(&"trailer: x".to_owned()));
        let plain =
            read_anyhow("HTTP/1.1 200 OK\r\nTrailer: x\r\nContent-Length: 1\r\n\r\na", false).expect("an answer");
        assert_eq!(plain.fields, ["content-length: 1"]);
    }

    #[test]
    fn a_field_over_several_lines_becomes_one() {
        let read =
            read_anyhow("HTTP/1.1 200 OK\r\na: b\r\n\tc\r\nContent-Length: 0\r\n\r\n", false).expect("an answer");
        assert_eq!(read.fields, ["a: b  \tc", "content-length: 0"]);
    }

    proptest! {
        #[test]
        fn a_body_in_chunks_is_the_same_however_it_is_cut(
            pieces in prop::collection::vec(prop::collection::vec(any::<u8>(), 1..300), 0..8),
            size in 1usize..97,
        ) {
            let mut bytes = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n".to_vec();
            for piece in &pieces {
                bytes.extend_from_slice(format!("{:x}\r\n", piece.len()).as_bytes());
                bytes.extend_from_slice(piece);
                bytes.extend_from_slice(b"\r\n");
            }
            bytes.extend_from_slice(b"0\r\n\r\n");
            let read = read(&bytes, size, false).expect("an answer");
            prop_assert_eq!(read.body, pieces.concat());
            prop_assert!(read.keeps && read.left.is_empty());
        }
    }
}
