//! Follows the messages on a connection to an endpoint of HTTP/1, byte for byte, beside the library that reads and
//! writes them.
//!
//! Pingora passes over the trailers of an answer, ends the chunks of a request without any, and reads chunks less
//! strictly than RFC 9112 §7.1. So these types see the same bytes: [`Answer`] checks the chunks of an answer and keeps
//! its trailers, [`Request`] finds the place where those of a request belong.

use http::{HeaderMap, Version};

use super::chunked::{Chunks, Malformed};
use super::{Body, Said, answer};

/// The last chunk of a body without trailers.
pub const LAST_CHUNK: &[u8] = b"0\r\n\r\n";

/// The library's limits for a header: it fails with one that is larger.
const FIELDS_MAX: usize = 256;
const HEADER_BYTES_MAX: usize = 1 << 20;

/// An answer on its way in.
#[derive(Debug, Default)]
pub struct Answer {
    at: At,
    head_only: bool,
}

#[derive(Debug, Default)]
enum At {
    /// Nothing is expected, or nothing that is of interest.
    #[default]
    Elsewhere,
    /// In a header, of which this has come. It is empty as a rule: most headers come at once.
    Header(Vec<u8>),
    Chunks(Chunks),
    /// Behind a 101, by this number of bytes.
    Tunnel(u64),
}

impl Answer {
    /// An answer comes next. `head_only`: the request has the method HEAD.
    pub fn begin(&mut self, head_only: bool) {
        *self = Answer { at: At::Header(Vec::new()), head_only };
    }

    /// Takes bytes as they come.
    ///
    /// # Errors
    ///
    /// The body is in chunks that do not follow the grammar.
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

    /// Takes headers from their first byte: interim ones, and the final one with the beginning of its body.
    fn take_header(&mut self, mut bytes: &[u8]) -> Result<(), Malformed> {
        loop {
            let next = match header(bytes, self.head_only) {
                Read::Part if bytes.len() <= HEADER_BYTES_MAX => At::Header(bytes.to_vec()),
                // The library has the same opinion of it, and the last word.
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

    /// Bytes that have come behind a 101.
    pub fn tunneled(&self) -> u64 {
        if let At::Tunnel(passed) = self.at { passed } else { 0 }
    }

    /// Whether its body comes in chunks, as far as its header is here.
    pub fn is_chunked(&self) -> bool {
        matches!(self.at, At::Chunks(_))
    }

    /// The trailers of an answer that is here whole, once.
    pub fn take_trailers(&mut self) -> Option<HeaderMap> {
        match &mut self.at {
            At::Chunks(chunks) if chunks.ended() => Some(chunks.take_trailers()).filter(|fields| !fields.is_empty()),
            _ => None,
        }
    }
}

/// What bytes that begin with a header are, and where it ends.
enum Read {
    Part,
    Interim(usize),
    /// The header of a 101.
    Switch(usize),
    /// The header of an answer whose body is in chunks.
    Chunked(usize),
    /// Anything else.
    Nothing,
}

/// Reads a header as the library does, by the same parser with the same settings.
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
    let mut said = Said::default();
    for field in response.headers.iter() {
        match field.name.len() {
            14 if field.name.eq_ignore_ascii_case("content-length") => said.add_length(field.value),
            17 if field.name.eq_ignore_ascii_case("transfer-encoding") => said.add_coding(field.value),
            _ => {}
        }
    }
    let version = if response.version == Some(0) { Version::HTTP_10 } else { Version::HTTP_11 };
    match answer::frame(head_only, status, version, &said, Version::HTTP_11) {
        Ok(framed) if framed.read == Body::Chunked => Read::Chunked(end),
        _ => Read::Nothing,
    }
}

/// A request on its way out.
#[derive(Debug, Default)]
pub struct Request {
    at: Out,
}

#[derive(Debug, Default)]
enum Out {
    /// There is no place for trailers, or it is past.
    #[default]
    Elsewhere,
    Header(HeaderEnd),
    Chunks(Chunks),
}

const HEADER_END: &[u8] = b"\r\n\r\n";

/// Finds the end of a header that leaves in pieces: the number of bytes of the empty line at its end that have passed.
#[derive(Debug, Default)]
pub struct HeaderEnd(usize);

impl HeaderEnd {
    /// Tells how many of these bytes belong to the header: all of them until its end was found, and none behind it.
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
    /// A request goes out next; whether its body is in chunks.
    pub fn begin(&mut self, in_chunks: bool) {
        self.at = if in_chunks { Out::Header(HeaderEnd::default()) } else { Out::Elsewhere };
    }

    /// Takes bytes that have left.
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

    /// Whether these bytes, which are to leave next, are the last chunk: trailers belong into it.
    pub fn ends_with(&self, next: &[u8]) -> bool {
        next == LAST_CHUNK && matches!(&self.at, Out::Chunks(chunks) if chunks.is_between())
    }

    /// Another last chunk has left.
    pub fn ended(&mut self) {
        self.at = Out::Elsewhere;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is found in these bytes if they come in pieces of `cut`: whether the answer is in chunks, and its trailers.
    fn found(bytes: &[u8], cut: usize, head_only: bool) -> Result<(bool, Vec<String>), Malformed> {
        let mut answer = Answer::default();
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
        let mut answer = Answer::default();
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
        // Data that looks like it, and a value of the header that does.
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
