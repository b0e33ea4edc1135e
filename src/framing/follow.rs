//! Follows the messages on a connection to an HTTP/1 endpoint, byte by byte, in parallel to the library that reads and
//! writes them.
//!
//! Pingora discards the trailers of a response, ends a chunked request without trailers, and parses chunks less
//! strictly than RFC 9112 §7.1. The types here see the same bytes: [`ResponseFollower`] checks the chunks of a
//! response and keeps its trailers, and [`Request`] finds the position for the trailers of a request.

use http::{HeaderMap, Version};

use super::chunked::{Chunks, Malformed};
use super::{Body, LengthFields, answer};

/// The last chunk of a body without trailers.
pub const LAST_CHUNK: &[u8] = b"0\r\n\r\n";

/// Pingora's limits for a header. It refuses a larger one.
const FIELDS_MAX: usize = 256;
const HEADER_BYTES_MAX: usize = 1 << 20;

/// The follower of received responses.
#[derive(Debug, Default)]
pub struct ResponseFollower {
    at: At,
    head_only: bool,
}

#[derive(Debug, Default)]
enum At {
    /// No response is expected, or the rest of it is irrelevant.
    #[default]
    Elsewhere,
    /// In a header, with the bytes received so far. Usually empty, since most headers arrive in one read.
    Header(Vec<u8>),
    Chunks(Chunks),
    /// After a 101, with the number of bytes since.
    Tunnel(u64),
}

impl ResponseFollower {
    /// Starts the next response. `head_only`: the request method is HEAD.
    pub fn begin(&mut self, head_only: bool) {
        *self = ResponseFollower { at: At::Header(Vec::new()), head_only };
    }

    /// Processes received bytes.
    ///
    /// # Errors
    ///
    /// If the body is chunked and violates the grammar.
    pub fn take(&mut self, bytes: &[u8]) -> Result<(), Malformed> {
        match &mut self.at {
            At::Elsewhere => Ok(()),
            At::Chunks(chunks) => chunks.take(bytes).map(drop),
            At::Tunnel(passed) => {
                *passed += bytes.len() as u64;
                Ok(())
            }
            At::Header(begun) if begun.is_empty() => self.take_header(bytes),
            At::Header(begun) => {
                let mut begun = std::mem::take(begun);
                begun.extend_from_slice(bytes);
                self.take_header(&begun)
            }
        }
    }

    /// Processes headers from their first byte: interim headers, and the final one with the first bytes of its body.
    fn take_header(&mut self, mut bytes: &[u8]) -> Result<(), Malformed> {
        loop {
            let next = match header(bytes, self.head_only) {
                Read::Part if bytes.len() <= HEADER_BYTES_MAX => At::Header(bytes.to_vec()),
                // Pingora parses the header by the same rules and reports the error.
                Read::Part | Read::Nothing => At::Elsewhere,
                Read::Interim(end) => {
                    bytes = &bytes[end..];
                    continue;
                }
                Read::Chunked(end) => {
                    let mut chunks = Chunks::default();
                    chunks.take(&bytes[end..])?;
                    At::Chunks(chunks)
                }
                Read::Switch(end) => At::Tunnel((bytes.len() - end) as u64),
            };
            self.at = next;
            return Ok(());
        }
    }

    /// Number of bytes received after a 101.
    pub fn tunneled(&self) -> u64 {
        if let At::Tunnel(passed) = self.at { passed } else { 0 }
    }

    /// Whether the body is chunked. `false` until the header is complete.
    pub fn is_chunked(&self) -> bool {
        matches!(self.at, At::Chunks(_))
    }

    /// Takes the trailers of a complete response. A second call returns `None`.
    pub fn take_trailers(&mut self) -> Option<HeaderMap> {
        match &mut self.at {
            At::Chunks(chunks) if chunks.ended() => Some(chunks.take_trailers()).filter(|fields| !fields.is_empty()),
            _ => None,
        }
    }
}

/// The result of parsing a header, with the header's length.
enum Read {
    Part,
    Interim(usize),
    /// The header of a 101.
    Switch(usize),
    /// The header of a response with a chunked body.
    Chunked(usize),
    /// Anything else.
    Nothing,
}

/// Parses a header with Pingora's parser and its settings.
fn header(bytes: &[u8], head_only: bool) -> Read {
    let mut parser = httparse::ParserConfig::default();
    parser.allow_spaces_after_header_name_in_responses(true);
    parser.allow_obsolete_multiline_headers_in_responses(true);
    let mut fields = [const { std::mem::MaybeUninit::uninit() }; FIELDS_MAX];
    let mut response = httparse::Response::new(&mut []);
    let end = match parser.parse_response_with_uninit_headers(&mut response, bytes, &mut fields) {
        Ok(httparse::Status::Complete(end)) => end,
        Ok(httparse::Status::Partial) => return Read::Part,
        Err(_) => return Read::Nothing,
    };
    let status = response.code.unwrap_or_default();
    if matches!(status, 100..=199) {
        return if status == 101 { Read::Switch(end) } else { Read::Interim(end) };
    }
    let mut length_fields = LengthFields::default();
    for field in response.headers.iter() {
        match field.name.len() {
            14 if field.name.eq_ignore_ascii_case("content-length") => length_fields.add_length(field.value),
            17 if field.name.eq_ignore_ascii_case("transfer-encoding") => length_fields.add_coding(field.value),
            _ => {}
        }
    }
    let version = if response.version == Some(0) { Version::HTTP_10 } else { Version::HTTP_11 };
    match answer::frame(head_only, status, version, &length_fields, Version::HTTP_11) {
        Ok(framed) if framed.read == Body::Chunked => Read::Chunked(end),
        _ => Read::Nothing,
    }
}

/// The follower of sent requests.
#[derive(Debug, Default)]
pub struct Request {
    at: Out,
}

#[derive(Debug, Default)]
enum Out {
    /// Trailers are impossible, or their position has passed.
    #[default]
    Elsewhere,
    Header(HeaderEnd),
    Chunks(Chunks),
}

const HEADER_END: &[u8] = b"\r\n\r\n";

/// Finds the end of a header that is sent in pieces. The number counts the matched bytes of `HEADER_END`.
#[derive(Debug, Default)]
pub struct HeaderEnd(usize);

impl HeaderEnd {
    /// Returns how many of `bytes` belong to the header: none once the end was found.
    pub fn take(&mut self, bytes: &[u8]) -> usize {
        let mut taken = 0;
        while taken < bytes.len() && !self.is_found() {
            self.0 = match bytes[taken] {
                byte if byte == HEADER_END[self.0] => self.0 + 1,
                b'\r' => 1,
                _ => 0,
            };
            taken += 1;
        }
        taken
    }

    /// Whether the header has ended.
    pub fn is_found(&self) -> bool {
        self.0 == HEADER_END.len()
    }
}

impl Request {
    /// Starts the next request. `in_chunks`: its body is chunked.
    pub fn begin(&mut self, in_chunks: bool) {
        self.at = if in_chunks { Out::Header(HeaderEnd::default()) } else { Out::Elsewhere };
    }

    /// Processes bytes that were sent.
    pub fn take(&mut self, mut bytes: &[u8]) {
        if let Out::Header(end) = &mut self.at {
            let taken = end.take(bytes);
            if !end.is_found() {
                return;
            }
            bytes = &bytes[taken..];
            self.at = Out::Chunks(Chunks::default());
        }
        if let Out::Chunks(chunks) = &mut self.at
            && (chunks.take(bytes).is_err() || chunks.ended())
        {
            self.at = Out::Elsewhere;
        }
    }

    /// Whether `next`, the bytes to send next, is the last chunk, which trailers have to follow.
    pub fn ends_with(&self, next: &[u8]) -> bool {
        next == LAST_CHUNK && matches!(&self.at, Out::Chunks(chunks) if chunks.is_between())
    }

    /// Reports that another last chunk, with trailers, was sent.
    pub fn ended(&mut self) {
        self.at = Out::Elsewhere;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Parses `bytes` in pieces of `cut` bytes. Returns whether the response is chunked, and its trailers.
    fn found(bytes: &[u8], cut: usize, head_only: bool) -> Result<(bool, Vec<String>), Malformed> {
        let mut answer = ResponseFollower::default();
        answer.begin(head_only);
        for part in bytes.chunks(cut) {
            answer.take(part)?;
        }
        let chunked = answer.is_chunked();
        let fields = answer.take_trailers().unwrap_or_default();
        Ok((chunked, fields.iter().map(|(name, value)| format!("{name}={}", value.to_str().unwrap())).collect()))
    }

    const CHUNKED: &str = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n";

    #[test]
    fn trailers_of_an_answer_in_chunks_are_found_however_it_is_cut() {
        for (head, body) in [
            (CHUNKED.to_owned(), "4\r\nbody\r\n0\r\nX-Sum: 1\r\n\r\n"),
            (CHUNKED.to_owned(), "4\r\nbody\r\n0\r\nX-Sum: 1\r\n\r\nmore"),
            (CHUNKED.to_owned(), "0\r\nX-Sum: 1\r\n\r\n"),
            (
                format!("HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Hints\r\nLink: a\r\n\r\n{CHUNKED}"),
                "0\r\nX-Sum:1\r\n\r\n",
            ),
            ("HTTP/1.0 500 No\nTransfer-Encoding : Chunked\n\n".to_owned(), "0\r\nX-Sum:1\r\n\r\n"),
        ] {
            let bytes = format!("{head}{body}");
            for cut in 1..=bytes.len() {
                assert_eq!(
                    found(bytes.as_bytes(), cut, false),
                    Ok((true, vec!["x-sum=1".to_owned()])),
                    "{bytes:?} {cut}"
                );
            }
        }
    }

    #[test]
    fn an_answer_without_chunks_has_no_trailers() {
        for head in [
            "HTTP/1.1 200 OK\r\nContent-Length: 40\r\n\r\n",
            "HTTP/1.1 200 OK\r\n\r\n",
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: identity\r\n\r\n",
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n",
            "HTTP/1.1 204 No Content\r\nTransfer-Encoding: chunked\r\n\r\n",
            "HTTP/1.1 101 Switching Protocols\r\nTransfer-Encoding: chunked\r\n\r\n",
            "no header\r\n\r\n",
        ] {
            let bytes = format!("{head}4\r\nbody\r\n0\r\nX-Sum: 1\r\n\r\nzz\r\n");
            for cut in [1, 7, bytes.len()] {
                assert_eq!(found(bytes.as_bytes(), cut, false), Ok((false, Vec::new())), "{head:?} {cut}");
            }
        }
        let head = format!("{CHUNKED}HTTP/1.1 200 OK\r\n\r\n");
        assert_eq!(found(head.as_bytes(), head.len(), true), Ok((false, Vec::new())));
    }

    #[test]
    fn trailers_are_known_once_the_answer_is_whole() {
        let mut answer = ResponseFollower::default();
        assert_eq!(answer.take(b"anything"), Ok(()), "nothing is asked for");
        answer.begin(false);
        let bytes = format!("{CHUNKED}0\r\nX-Sum: 1\r\n\r\n");
        for byte in bytes.as_bytes() {
            assert_eq!(answer.take_trailers(), None);
            answer.take(&[*byte]).expect("well formed");
        }
        assert_eq!(answer.take_trailers().map(|fields| fields.len()), Some(1));
        assert_eq!(answer.take_trailers(), None);
        answer.begin(false);
        assert!(!answer.is_chunked());
    }

    #[test]
    fn chunks_of_an_answer_follow_the_grammar() {
        for body in [
            "4\nbody\r\n0\r\n\r\n",
            "+4\r\nbody\r\n",
            "4 \r\nbody\r\n",
            ";x\r\n",
            "4;\r\n",
            "4\r\nbody!\r\n",
            "0\r\nno colon\r\n\r\n",
        ] {
            let bytes = format!("{CHUNKED}{body}");
            for cut in [1, 5, bytes.len()] {
                assert_eq!(found(bytes.as_bytes(), cut, false), Err(Malformed), "{body:?} {cut}");
            }
        }
    }

    #[test]
    fn the_last_chunk_of_a_request_is_found_and_nothing_that_looks_like_it() {
        // A header value and data that look like the last chunk.
        let head = b"PUT / HTTP/1.1\r\nTransfer-Encoding: chunked\r\nX: 0\r\n\r\n";
        let data = b"5\r\n0\r\n\r\n\r\n";
        for cut in 1..=head.len() {
            let mut request = Request::default();
            request.begin(true);
            head.chunks(cut).for_each(|part| {
                assert!(!request.ends_with(part));
                request.take(part);
            });
            assert!(request.ends_with(LAST_CHUNK), "a body may be empty");
            request.take(&data[..3]);
            assert!(!request.ends_with(LAST_CHUNK), "it is data");
            request.take(&data[3..]);
            assert!(request.ends_with(LAST_CHUNK) && !request.ends_with(b"0\r\n"));
            request.ended();
            assert!(!request.ends_with(LAST_CHUNK));
        }
        let mut request = Request::default();
        request.begin(false);
        request.take(head);
        assert!(!request.ends_with(LAST_CHUNK), "it is not in chunks");
    }
}
