//! Writes a request of HTTP/1.1 for an endpoint: its header, and its body as the header says. Pure: it makes bytes.

use std::collections::VecDeque;
use std::sync::PoisonError;

use bytes::{Buf, Bytes};
use http::{HeaderName, HeaderValue, Version, header};
use pingora::http::RequestHeader;
use pingora::{Error, ErrorType, Result};

use crate::client::fields;
use crate::client::trailers::last_chunk;
use crate::framing::{self, Body, Said};
use crate::upstream::transport::http2::RequestTrailers;

/// What concerns one connection and is not passed on (RFC 9110 §7.6.1), as Pingora's driver removes it.
static HOP_BY_HOP: [HeaderName; 10] = [
    HeaderName::from_static("keep-alive"),
    HeaderName::from_static("proxy-connection"),
    HeaderName::from_static("http2-settings"),
    header::PROXY_AUTHENTICATE,
    header::PROXY_AUTHORIZATION,
    header::TE,
    header::TRAILER,
    header::TRANSFER_ENCODING,
    header::CONNECTION,
    header::UPGRADE,
];

/// What is written of a header besides what the map has.
#[derive(Clone, Copy, Debug, Default)]
pub struct Written<'w> {
    /// The header that the client sent, on HTTP/1: so the names of its fields were spelled.
    pub by_client: &'w [u8],
    /// Lines that follow the fields of the map.
    pub lines: &'w [u8],
}

/// The request as its endpoint is to get it, but for what hooks change.
///
/// # Errors
///
/// None that can be met: a host that was accepted is a valid value.
pub fn towards_endpoint(client: &RequestHeader) -> Result<RequestHeader> {
    let mut request = copy(client);
    request.set_version(Version::HTTP_11);
    if request.headers.keys().any(|name| HOP_BY_HOP.contains(name)) {
        let named: Vec<_> = named_by_connection(&request).collect();
        for name in named.iter().chain(&HOP_BY_HOP) {
            request.remove_header(name);
        }
    }
    if client.version == Version::HTTP_2 && !request.headers.contains_key(header::HOST) {
        let host = request.uri.authority().map_or("", |authority| authority.as_str()).to_owned();
        request.insert_header(header::HOST, host)?;
    }
    Ok(request)
}

/// A clone, made with less ado where all of the request is in its parts.
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

/// How its body leaves. `has_body`: the client has one, or has not said that it has none.
///
/// # Errors
///
/// Hooks have made a header of it that says something else of its length than there is to say.
pub fn frame(request: &mut RequestHeader, has_body: bool) -> Result<Body> {
    let said = Said::of(&request.headers);
    if has_body && !said.is_anything() {
        framing::request::apply(Body::Chunked, request)?;
        return Ok(Body::Chunked);
    }
    framing::request::read(Version::HTTP_11, &said)
        .map_err(|refusal| Error::explain(ErrorType::InternalError, refusal.reason).into_in())
}

/// A request on its way out.
#[derive(Debug)]
pub struct Outgoing {
    /// What is to be sent, in order.
    pieces: VecDeque<Bytes>,
    /// How many bytes that are.
    queued: usize,
    body: Body,
    /// Nothing more is to come.
    ended: bool,
    trailers: Option<RequestTrailers>,
}

impl Outgoing {
    /// The header of a request and what is `written` with it, whose body leaves like this.
    ///
    /// # Errors
    ///
    /// Its target cannot be written.
    pub fn new(request: &RequestHeader, written: Written<'_>, body: Body) -> Result<Self> {
        let mut bytes = Vec::with_capacity(512);
        let target = request.raw_path();
        if target.iter().any(|byte| matches!(byte, 0 | b'\r' | b'\n' | b' ')) {
            return Error::e_explain(ErrorType::InvalidHTTPHeader, "HTTP/1 cannot say this target");
        }
        for part in [request.method.as_str().as_bytes(), b" ", target, b" HTTP/1.1\r\n"] {
            bytes.extend_from_slice(part);
        }
        fields::write_request(request, written.by_client, &mut bytes);
        bytes.extend_from_slice(written.lines);
        bytes.extend_from_slice(b"\r\n");
        let trailers = request.extensions.get::<RequestTrailers>().cloned();
        let queued = bytes.len();
        Ok(Outgoing { pieces: VecDeque::from([bytes.into()]), queued, body, ended: false, trailers })
    }

    /// Takes a piece of the body; `end` with the last one.
    ///
    /// # Errors
    ///
    /// The body is longer or shorter than its header says: what follows would be taken for the next request.
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

    /// What is to be sent, in order.
    pub fn pieces(&self) -> impl Iterator<Item = &Bytes> {
        self.pieces.iter()
    }

    /// How many bytes are to be sent.
    pub fn queued(&self) -> usize {
        self.queued
    }

    /// Nothing is to be sent for now.
    pub fn is_empty(&self) -> bool {
        self.pieces.is_empty()
    }

    /// All of the request has been sent.
    pub fn is_sent(&self) -> bool {
        self.ended && self.pieces.is_empty()
    }

    /// The bytes that have left.
    pub fn advance(&mut self, mut sent: usize) {
        self.queued -= sent;
        while let Some(piece) = self.pieces.front_mut() {
            if sent < piece.len() {
                return piece.advance(sent);
            }
            sent -= piece.len();
            self.pieces.pop_front();
        }
    }

    /// The endpoint takes nothing more.
    pub fn give_up(&mut self) {
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
        let bytes: Vec<u8> = outgoing.pieces().flat_map(|piece| piece.to_vec()).collect();
        String::from_utf8(bytes).expect("text")
    }

    /// What leaves of a request with these fields and pieces of a body.
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
        // Its own coding ended with the client's connection.
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
