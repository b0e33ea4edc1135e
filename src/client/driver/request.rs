//! Serialises an HTTP/1.1 request for an endpoint: its header, and its body with the framing of the header. It performs
//! no IO.

use std::collections::VecDeque;
use std::sync::PoisonError;

use bytes::{Buf, Bytes};
use http::{HeaderName, HeaderValue, Version, header};
use pingora::http::RequestHeader;
use pingora::{Error, ErrorType, Result};

use crate::client::fields;
use crate::client::trailers::last_chunk;
use crate::framing::{self, Body, LengthFields};
use crate::upstream::transport::http2::RequestTrailers;

/// Whether a field applies to one connection and is not forwarded (RFC 9110 §7.6.1), as in Pingora's driver.
fn is_hop_by_hop(name: &HeaderName) -> bool {
    match *name {
        header::PROXY_AUTHENTICATE
        | header::PROXY_AUTHORIZATION
        | header::TE
        | header::TRAILER
        | header::TRANSFER_ENCODING
        | header::CONNECTION
        | header::UPGRADE => true,
        _ => matches!(name.as_str(), "keep-alive" | "proxy-connection" | "http2-settings"),
    }
}

/// Parts of the header that the field map does not hold.
#[derive(Clone, Copy, Debug, Default)]
pub struct Written<'w> {
    /// The client's HTTP/1 header as received; it has the spelling of the field names.
    pub by_client: &'w [u8],
    /// Lines that are written after the fields of the map.
    pub lines: &'w [u8],
}

/// Builds the request for an endpoint, before hooks change it.
///
/// # Errors
///
/// None in practice: an accepted host is a valid field value.
pub fn towards_endpoint(client: &RequestHeader) -> Result<RequestHeader> {
    let mut request = copy(client);
    request.set_version(Version::HTTP_11);
    let own = request.headers.keys().filter(|name| is_hop_by_hop(name)).cloned();
    // If there is none, no Connection field names others, and nothing is allocated.
    let own: Vec<_> = own.collect();
    if !own.is_empty() {
        let named: Vec<_> = named_by_connection(&request).collect();
        for name in named.iter().chain(&own) {
            request.remove_header(name);
        }
    }
    if client.version == Version::HTTP_2 && !request.headers.contains_key(header::HOST) {
        let host = request.uri.authority().map_or("", |authority| authority.as_str()).to_owned();
        request.insert_header(header::HOST, host)?;
    }
    Ok(request)
}

/// Clones a header; cheaper than `clone` if the header has only standard parts.
fn copy(client: &RequestHeader) -> RequestHeader {
    let in_uri = || client.uri.path_and_query().is_some_and(|target| target.as_str().as_bytes() == client.raw_path());
    if client.has_case() || !client.extensions.is_empty() || !in_uri() {
        return client.clone();
    }
    let (mut parts, ()) = http::Request::new(()).into_parts();
    parts.method = client.method.clone();
    parts.uri = client.uri.clone();
    parts.headers = client.headers.clone();
    parts.into()
}

fn named_by_connection(request: &RequestHeader) -> impl Iterator<Item = HeaderName> {
    let options = request.headers.get_all(header::CONNECTION).iter().map(HeaderValue::as_bytes);
    options.flat_map(framing::items).filter_map(|name| HeaderName::from_bytes(name).ok())
}

/// Determines the framing of the body. `has_body`: the client sends a body, or may send one.
///
/// # Errors
///
/// If hooks left contradictory framing fields in the header.
pub fn frame(request: &mut RequestHeader, has_body: bool) -> Result<Body> {
    let length_fields = LengthFields::of(&request.headers);
    if has_body && !length_fields.is_any() {
        framing::request::apply(Body::Chunked, request)?;
        return Ok(Body::Chunked);
    }
    framing::request::read(Version::HTTP_11, &length_fields)
        .map_err(|refusal| Error::explain(ErrorType::InternalError, refusal.reason).into_in())
}

/// A request that is being sent.
#[derive(Debug)]
pub struct Outgoing {
    /// The header, and how much of it was sent. It becomes no `Bytes`, since most requests have nothing else.
    header: Vec<u8>,
    header_sent: usize,
    /// The bytes to send after it, in order.
    pieces: VecDeque<Bytes>,
    /// Number of bytes to send.
    queued: usize,
    body: Body,
    /// Whether the body is complete.
    ended: bool,
    trailers: Option<RequestTrailers>,
}

impl Outgoing {
    /// Serialises the header of a request, with the fields in `written`; `body` is the framing of its body.
    ///
    /// # Errors
    ///
    /// If HTTP/1 cannot represent the target.
    pub fn new(request: &RequestHeader, written: Written<'_>, body: Body) -> Result<Self> {
        let mut bytes = Vec::with_capacity(512);
        let target = request.raw_path();
        if target.iter().any(|byte| matches!(byte, 0 | b'\r' | b'\n' | b' ')) {
            return Error::e_explain(ErrorType::InvalidHTTPHeader, "HTTP/1 cannot express this target");
        }
        for part in [request.method.as_str().as_bytes(), b" ", target, b" HTTP/1.1\r\n"] {
            bytes.extend_from_slice(part);
        }
        fields::write_request(request, written.by_client, &mut bytes);
        bytes.extend_from_slice(written.lines);
        bytes.extend_from_slice(b"\r\n");
        let trailers = request.extensions.get::<RequestTrailers>().cloned();
        let queued = bytes.len();
        Ok(Outgoing { header: bytes, header_sent: 0, pieces: VecDeque::new(), queued, body, ended: false, trailers })
    }

    /// Queues a piece of the body; `end` with the last one.
    ///
    /// # Errors
    ///
    /// If the body is longer or shorter than announced: the endpoint would take the difference for the next request.
    pub fn push(&mut self, piece: Option<Bytes>, end: bool) -> Result<()> {
        if let Some(piece) = piece.filter(|piece| !piece.is_empty()) {
            match &mut self.body {
                Body::Length(left) if *left >= piece.len() as u64 => *left -= piece.len() as u64,
                Body::Chunked => self.queue(format!("{:x}\r\n", piece.len()).into()),
                Body::Length(_) | Body::None | Body::UntilEnd => return Err(misframed()),
            }
            self.queue(piece);
            if self.body == Body::Chunked {
                self.queue(Bytes::from_static(b"\r\n"));
            }
        }
        if end && !std::mem::replace(&mut self.ended, true) {
            match self.body {
                Body::Length(1..) => return Err(misframed()),
                Body::Chunked => self.queue(self.last_chunk()),
                _ => {}
            }
        }
        Ok(())
    }

    fn queue(&mut self, piece: Bytes) {
        self.queued += piece.len();
        self.pieces.push_back(piece);
    }

    fn last_chunk(&self) -> Bytes {
        let fields = self.trailers.as_ref().and_then(|slot| slot.lock().unwrap_or_else(PoisonError::into_inner).take());
        last_chunk(fields.as_ref())
    }

    /// The bytes to send, in order.
    pub fn pieces(&self) -> impl Iterator<Item = &[u8]> {
        let header = &self.header[self.header_sent..];
        Some(header).filter(|left| !left.is_empty()).into_iter().chain(self.pieces.iter().map(|piece| &piece[..]))
    }

    /// Number of bytes to send.
    pub fn queued(&self) -> usize {
        self.queued
    }

    /// Whether no bytes are queued.
    pub fn is_empty(&self) -> bool {
        self.queued == 0
    }

    /// Whether the complete request was sent.
    pub fn is_sent(&self) -> bool {
        self.ended && self.is_empty()
    }

    /// Removes the first `sent` bytes.
    pub fn advance(&mut self, mut sent: usize) {
        self.queued -= sent;
        let of_header = sent.min(self.header.len() - self.header_sent);
        sent -= of_header;
        self.header_sent += of_header;
        if self.header_sent == self.header.len() {
            // An exchange that waits for a response holds no buffer.
            (self.header, self.header_sent) = (Vec::new(), 0);
        }
        while let Some(piece) = self.pieces.front_mut() {
            if sent < piece.len() {
                return piece.advance(sent);
            }
            sent -= piece.len();
            self.pieces.pop_front();
        }
    }

    /// Discards the queue, since the endpoint accepts no more bytes.
    pub fn give_up(&mut self) {
        (self.header, self.header_sent) = (Vec::new(), 0);
        self.pieces.clear();
        self.queued = 0;
    }
}

fn misframed() -> Box<Error> {
    Error::explain(ErrorType::InternalError, "the request body is shorter or longer than announced").into_in()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(fields: &[(&'static str, &str)]) -> RequestHeader {
        let mut request = RequestHeader::build("POST", b"/a?b", None).expect("a request");
        for (name, value) in fields {
            request.append_header(*name, *value).expect("a field");
        }
        request
    }

    fn bytes(outgoing: &Outgoing) -> String {
        let bytes: Vec<u8> = outgoing.pieces().flat_map(<[u8]>::to_vec).collect();
        String::from_utf8(bytes).expect("text")
    }

    /// The serialised request with these fields and these pieces of a body.
    fn sent(fields: &[(&'static str, &str)], body: &[&'static str]) -> Result<String> {
        let mut request = towards_endpoint(&request(fields))?;
        let framing = frame(&mut request, !body.is_empty())?;
        let mut outgoing = Outgoing::new(&request, Written::default(), framing)?;
        for piece in body {
            outgoing.push(Some(Bytes::from_static(piece.as_bytes())), false)?;
        }
        outgoing.push(None, true)?;
        Ok(bytes(&outgoing))
    }

    #[test]
    fn a_body_leaves_as_its_header_says() {
        assert_eq!(sent(&[("host", "a")], &[]).expect("sent"), "POST /a?b HTTP/1.1\r\nhost: a\r\n\r\n");
        let length = sent(&[("content-length", "3")], &["ab", "c"]).expect("sent");
        assert_eq!(length, "POST /a?b HTTP/1.1\r\ncontent-length: 3\r\n\r\nabc");
        // The client's transfer coding applies to its own connection only.
        let chunked = sent(&[("transfer-encoding", "chunked")], &["ab", "c"]).expect("sent");
        assert!(chunked.ends_with("\r\n\r\n2\r\nab\r\n1\r\nc\r\n0\r\n\r\n"), "{chunked}");
        assert_eq!(chunked.to_ascii_lowercase().matches("transfer-encoding: chunked\r\n").count(), 1);
    }

    #[test]
    fn a_body_that_belies_its_length_never_leaves_whole() {
        for body in [&["ab"][..], &["abcd"], &["ab", "cd"]] {
            assert!(sent(&[("content-length", "3")], body).is_err(), "{body:?}");
        }
        let mut none = Outgoing::new(&request(&[]), Written::default(), Body::None).expect("a request");
        assert!(none.push(Some(Bytes::from_static(b"a")), false).is_err());
    }

    #[test]
    fn what_concerns_the_connection_of_the_client_does_not_leave() {
        let fields = [("connection", "x-own, close"), ("x-own", "1"), ("te", "trailers"), ("upgrade", "x"), ("x", "y")];
        assert_eq!(sent(&fields, &[]).expect("sent"), "POST /a?b HTTP/1.1\r\nx: y\r\n\r\n");
    }

    #[test]
    fn what_has_left_is_gone_from_the_front() {
        let mut outgoing = Outgoing::new(&request(&[]), Written::default(), Body::Length(4)).expect("a request");
        outgoing.push(Some(Bytes::from_static(b"abcd")), true).expect("as announced");
        let whole = bytes(&outgoing);
        outgoing.advance(whole.len() - 2);
        assert_eq!((bytes(&outgoing).as_str(), outgoing.is_sent()), ("cd", false));
        outgoing.advance(2);
        assert!(outgoing.is_sent());
    }

    #[test]
    fn trailers_stand_in_the_last_chunk() {
        let mut request = request(&[]);
        let slot = RequestTrailers::default();
        request.extensions_mut().insert(slot.clone());
        let mut outgoing = Outgoing::new(&request, Written::default(), Body::Chunked).expect("a request");
        let fields = [(HeaderName::from_static("x"), HeaderValue::from_static("y"))].into_iter().collect();
        *slot.lock().expect("not poisoned") = Some(fields);
        outgoing.push(None, true).expect("an end");
        assert!(bytes(&outgoing).ends_with("\r\n0\r\nx: y\r\n\r\n"));
    }
}
