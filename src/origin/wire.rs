//! One connection of the test origin: reads request headers and bodies, writes bytes, and waits one minute at most.
//!
//! Bodies are read piece by piece, so that an upload of any size needs no memory unless it is echoed.

use std::fmt;
use std::io;
use std::time::Duration;

use bytes::{Buf, Bytes, BytesMut};
use http::header::{CONNECTION, CONTENT_LENGTH, EXPECT, TRANSFER_ENCODING};
use http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, Uri};
use tokio::io::{AsyncReadExt, AsyncWriteExt, Interest};
use tokio::net::TcpStream;
use tokio::time::timeout;

/// Maximum time without progress of a peer, and maximum time for a whole header.
const IDLE: Duration = Duration::from_secs(60);

/// Maximum time for a fault that waits until the peer closes.
const PATIENCE: Duration = Duration::from_secs(600);

const HEADER_BYTES_MAX: usize = 64 * 1024;
const HEADER_FIELDS_MAX: usize = 128;

/// Maximum length of a line of chunked framing: a size with its extensions, or a trailer field.
const LINE_BYTES_MAX: usize = 8 * 1024;

/// Size of a read, in bytes.
const READ_BYTES: usize = 16 * 1024;

/// The reason why a connection ends.
#[derive(Debug)]
pub enum Broken {
    /// The socket failed, or the peer closed or made no progress.
    Io(io::Error),
    /// The request was invalid. The values are the response.
    Request(StatusCode, &'static str),
}

impl From<io::Error> for Broken {
    fn from(error: io::Error) -> Self {
        Broken::Io(error)
    }
}

/// A request header.
#[derive(Debug)]
pub struct Request {
    pub method: Method,
    pub target: Uri,
    /// HTTP/1.`minor`.
    pub minor: u8,
    pub headers: HeaderMap,
    pub framing: Framing,
}

impl Request {
    /// Whether the client keeps the connection open. HTTP/1.0 clients never do, since their `keep-alive` is not
    /// standardized.
    pub fn keeps_alive(&self) -> bool {
        self.minor == 1 && !self.names(CONNECTION, "close")
    }

    /// Whether the client waits for a 100 before it sends the body (RFC 9110 §10.1.1).
    pub fn waits_for_continue(&self) -> bool {
        self.minor == 1 && self.names(EXPECT, "100-continue") && !matches!(self.framing, Framing::Done)
    }

    /// Whether a comma-separated header field contains this word, ignoring case.
    pub fn names(&self, header: HeaderName, word: &str) -> bool {
        let values = self.headers.get_all(header);
        values
            .iter()
            .filter_map(|value| value.to_str().ok())
            .any(|value| value.split(',').any(|token| token.trim().eq_ignore_ascii_case(word)))
    }
}

/// The position in a request body (RFC 9112 §6).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Framing {
    /// This number of bytes of a body of known length is left.
    Length(u64),
    /// The size of a chunk is next.
    ChunkSize,
    /// This number of bytes of a chunk is left.
    Chunk(u64),
    /// The line end after a chunk is next.
    ChunkEnd,
    /// Trailer fields are next.
    Trailer,
    /// The body is complete.
    Done,
}

/// The framing of a body before its first byte: `content-length: 5`, `chunked`, or `none` without a body.
impl fmt::Display for Framing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Framing::Length(length) => write!(f, "content-length: {length}"),
            Framing::Done => f.write_str("none"),
            _ => f.write_str("chunked"),
        }
    }
}

impl Framing {
    fn of(headers: &HeaderMap) -> Result<Framing, Broken> {
        let bad = |why| Err(Broken::Request(StatusCode::BAD_REQUEST, why));
        let mut lengths = headers.get_all(CONTENT_LENGTH).iter();
        match (headers.get(TRANSFER_ENCODING), lengths.next(), lengths.next()) {
            (None, None, _) => Ok(Framing::Done),
            (None, Some(length), None) => match length.to_str().ok().and_then(digits) {
                Some(0) => Ok(Framing::Done),
                Some(length) => Ok(Framing::Length(length)),
                None => bad("Content-Length is not a number"),
            },
            (None, Some(_), Some(_)) => bad("Content-Length is given twice"),
            (Some(_), Some(_), _) => bad("Content-Length and Transfer-Encoding are both given"),
            (Some(coding), None, _) if coding.as_bytes().eq_ignore_ascii_case(b"chunked") => Ok(Framing::ChunkSize),
            (Some(_), None, _) => bad("the only transfer coding understood here is chunked"),
        }
    }
}

/// Parses a `Content-Length`: digits only, since `parse` would accept a sign.
fn digits(text: &str) -> Option<u64> {
    text.bytes().all(|byte| byte.is_ascii_digit()).then(|| text.parse().ok()).flatten()
}

/// A connection, and the bytes that were read and not used yet.
pub struct Wire {
    stream: TcpStream,
    unread: BytesMut,
}

impl Wire {
    pub fn new(stream: TcpStream) -> Self {
        // Without this option, the kernel would merge small pieces. A socket that rejects it is broken anyway.
        let _ = stream.set_nodelay(true);
        Wire { stream, unread: BytesMut::new() }
    }

    /// Reads the next request header; `None` if the peer closed or stayed idle.
    pub async fn request(&mut self) -> Result<Option<Request>, Broken> {
        let header = async {
            loop {
                if let Some(request) = self.parse()? {
                    return Ok(Some(request));
                }
                if self.unread.len() >= HEADER_BYTES_MAX {
                    return Err(Broken::Request(
                        StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE,
                        "more than 64 KiB of header",
                    ));
                }
                if self.fill().await? == 0 {
                    return Ok(None);
                }
            }
        };
        timeout(IDLE, header).await.unwrap_or(Ok(None))
    }

    fn parse(&mut self) -> Result<Option<Request>, Broken> {
        let mut fields = [httparse::EMPTY_HEADER; HEADER_FIELDS_MAX];
        let mut parsed = httparse::Request::new(&mut fields);
        let length = match parsed.parse(&self.unread) {
            Ok(httparse::Status::Complete(length)) => length,
            Ok(httparse::Status::Partial) => return Ok(None),
            Err(httparse::Error::TooManyHeaders) => {
                return Err(Broken::Request(
                    StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE,
                    "more than 128 header fields",
                ));
            }
            Err(_) => return Err(Broken::Request(StatusCode::BAD_REQUEST, "this is not an HTTP/1 request")),
        };
        let request = Request::from_parsed(&parsed)?;
        self.unread.advance(length);
        Ok(Some(request))
    }

    /// Reads the next piece of a body; `None` at its end.
    pub async fn piece(&mut self, framing: &mut Framing) -> Result<Option<Bytes>, Broken> {
        loop {
            match *framing {
                Framing::Done => return Ok(None),
                Framing::Length(left) => {
                    let piece = self.some(left).await?;
                    let left = left - piece.len() as u64;
                    *framing = if left == 0 { Framing::Done } else { Framing::Length(left) };
                    return Ok(Some(piece));
                }
                Framing::Chunk(left) => {
                    let piece = self.some(left).await?;
                    let left = left - piece.len() as u64;
                    *framing = if left == 0 { Framing::ChunkEnd } else { Framing::Chunk(left) };
                    return Ok(Some(piece));
                }
                Framing::ChunkSize => {
                    let line = self.line().await?;
                    *framing = match httparse::parse_chunk_size(&line) {
                        Ok(httparse::Status::Complete((_, 0))) => Framing::Trailer,
                        Ok(httparse::Status::Complete((_, size))) => Framing::Chunk(size),
                        _ => return Err(Broken::Request(StatusCode::BAD_REQUEST, "a chunk's size is not one")),
                    };
                }
                Framing::ChunkEnd if *self.line().await? == *b"\r\n" => *framing = Framing::ChunkSize,
                Framing::ChunkEnd => {
                    return Err(Broken::Request(StatusCode::BAD_REQUEST, "a chunk is longer than its size"));
                }
                Framing::Trailer if *self.line().await? == *b"\r\n" => *framing = Framing::Done,
                Framing::Trailer => {}
            }
        }
    }

    /// Reads exactly `length` bytes.
    pub async fn exactly(&mut self, length: usize) -> io::Result<Bytes> {
        while self.unread.len() < length {
            self.fill_or_fail().await?;
        }
        Ok(self.unread.split_to(length).freeze())
    }

    /// Reads at least one byte and at most `limit`.
    async fn some(&mut self, limit: u64) -> io::Result<Bytes> {
        if self.unread.is_empty() {
            self.fill_or_fail().await?;
        }
        let length = usize::try_from(limit).unwrap_or(usize::MAX).min(self.unread.len());
        Ok(self.unread.split_to(length).freeze())
    }

    /// Reads a line, including its end.
    async fn line(&mut self) -> Result<Bytes, Broken> {
        loop {
            if let Some(end) = self.unread.iter().position(|byte| *byte == b'\n') {
                return Ok(self.unread.split_to(end + 1).freeze());
            }
            if self.unread.len() > LINE_BYTES_MAX {
                return Err(Broken::Request(StatusCode::BAD_REQUEST, "a line of the chunked body is too long"));
            }
            self.fill_or_fail().await?;
        }
    }

    /// Sends all bytes. Fails if the peer accepts none for a minute.
    pub async fn send(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let sent = timeout(IDLE, self.stream.write(bytes)).await??;
            if sent == 0 {
                return Err(io::ErrorKind::WriteZero.into());
            }
            bytes = &bytes[sent..];
        }
        Ok(())
    }

    /// Waits for `time`.
    ///
    /// # Errors
    ///
    /// If the peer closes meanwhile.
    pub async fn pause(&mut self, time: Duration) -> io::Result<()> {
        if time.is_zero() {
            return Ok(());
        }
        tokio::select! {
            () = tokio::time::sleep(time) => Ok(()),
            gone = self.gone() => Err(gone),
        }
    }

    /// Completes when the peer has closed. Bytes received before are kept. After 64 KiB it reads no more, so that an
    /// upload stalls; from then on it detects only a reset.
    async fn gone(&mut self) -> io::Error {
        while self.unread.len() < HEADER_BYTES_MAX {
            self.unread.reserve(READ_BYTES);
            match self.stream.read_buf(&mut self.unread).await {
                Ok(0) => return io::ErrorKind::UnexpectedEof.into(),
                Ok(_) => {}
                Err(error) => return error,
            }
        }
        match self.stream.ready(Interest::ERROR).await {
            Ok(_) => io::ErrorKind::ConnectionReset.into(),
            Err(error) => error,
        }
    }

    /// Waits until the peer closes, for ten minutes at most.
    pub async fn hang(&mut self) {
        // The connection ends in both cases.
        let _ = timeout(PATIENCE, self.gone()).await;
    }

    /// Closes the connection such that the peer can read all sent bytes: closing with unread bytes would reset the
    /// connection (RFC 9112 §9.6).
    pub async fn close(&mut self) {
        let linger = async {
            self.stream.shutdown().await?;
            while self.fill().await? > 0 {
                self.unread.clear();
            }
            io::Result::Ok(())
        };
        // The connection ends in both cases.
        let _ = timeout(IDLE, linger).await;
    }

    /// Makes the next close send RST instead of FIN.
    pub fn reset(&mut self) -> io::Result<()> {
        self.stream.set_zero_linger()
    }

    async fn fill(&mut self) -> io::Result<usize> {
        self.unread.reserve(READ_BYTES);
        timeout(IDLE, self.stream.read_buf(&mut self.unread)).await?
    }

    async fn fill_or_fail(&mut self) -> io::Result<()> {
        match self.fill().await? {
            0 => Err(io::ErrorKind::UnexpectedEof.into()),
            _ => Ok(()),
        }
    }
}

impl Request {
    fn from_parsed(parsed: &httparse::Request<'_, '_>) -> Result<Request, Broken> {
        let bad = |why| Broken::Request(StatusCode::BAD_REQUEST, why);
        let mut headers = HeaderMap::with_capacity(parsed.headers.len());
        for field in parsed.headers.iter() {
            let name = HeaderName::from_bytes(field.name.as_bytes()).map_err(|_| bad("a header name is not one"))?;
            let value = HeaderValue::from_bytes(field.value).map_err(|_| bad("a header value is not one"))?;
            headers.append(name, value);
        }
        Ok(Request {
            method: parsed.method.unwrap_or_default().parse().map_err(|_| bad("the method is not one"))?,
            target: parsed.path.unwrap_or_default().parse().map_err(|_| bad("the target is not a path or URI"))?,
            minor: parsed.version.unwrap_or_default(),
            framing: Framing::of(&headers)?,
            headers,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn framing(fields: &[(&'static str, &'static str)]) -> Option<Framing> {
        let mut map = HeaderMap::new();
        for (name, value) in fields {
            map.append(*name, HeaderValue::from_static(value));
        }
        Framing::of(&map).ok()
    }

    #[test]
    fn the_header_says_how_the_body_ends() {
        assert_eq!(framing(&[]), Some(Framing::Done));
        assert_eq!(framing(&[("content-length", "0")]), Some(Framing::Done));
        assert_eq!(framing(&[("content-length", "12")]), Some(Framing::Length(12)));
        assert_eq!(framing(&[("transfer-encoding", "Chunked")]), Some(Framing::ChunkSize));
    }

    #[test]
    fn how_a_body_is_framed_can_be_told() {
        let told = [Framing::Length(12), Framing::ChunkSize, Framing::Done].map(|framing| framing.to_string());
        assert_eq!(told, ["content-length: 12", "chunked", "none"]);
    }

    #[test]
    fn an_ambiguous_length_is_refused() {
        assert_eq!(framing(&[("content-length", "+12")]), None);
        assert_eq!(framing(&[("content-length", "1, 1")]), None);
        assert_eq!(framing(&[("content-length", "1"), ("content-length", "1")]), None);
        assert_eq!(framing(&[("content-length", "1"), ("transfer-encoding", "chunked")]), None);
        assert_eq!(framing(&[("transfer-encoding", "gzip, chunked")]), None);
    }
}
