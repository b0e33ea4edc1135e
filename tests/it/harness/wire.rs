//! A strict, byte-exact HTTP/1 implementation on a socket, shared by clients and origins of stories.
//!
//! The parser rejects everything that a careful peer would reject, so reading a message also checks its form.

use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr};
use std::ops::Deref;
use std::time::Duration;

use socket2::Socket;

use super::DEADLINE;

/// One end of a connection.
pub struct Wire {
    socket: Socket,
    read: Vec<u8>,
    was_reset: bool,
    trailers: Vec<String>,
}

/// How a message ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// Complete according to its framing.
    Complete,
    /// The connection ended early.
    Cut,
}

/// The first line and the header fields of a message.
#[derive(Clone, Debug)]
pub struct Head {
    /// The bytes, including the empty line.
    pub raw: Vec<u8>,
    /// The request line or the status line.
    pub first_line: String,
    /// The fields in order, with names as sent.
    pub fields: Vec<(String, String)>,
}

/// A request as received by an origin.
#[derive(Clone, Debug)]
pub struct Request {
    /// Its header.
    pub head: Head,
    /// Its body without framing.
    pub body: Vec<u8>,
    /// Whether the body was complete.
    pub end: End,
    /// Its trailer fields, each as a line.
    pub trailers: Vec<String>,
}

/// A response as received by a client.
#[derive(Clone, Debug)]
pub struct Response {
    /// Its status.
    pub status: u16,
    /// Its header.
    pub head: Head,
    /// Its body without framing.
    pub body: Vec<u8>,
    /// Whether the body was complete.
    pub end: End,
}

/// The unread rest of a body.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Left {
    /// This many bytes.
    Bytes(usize),
    /// A chunk size and everything after it.
    Chunks,
    /// This many bytes of a chunk, and everything after it.
    Chunk(usize),
    /// Everything until the connection ends.
    Close,
    /// Nothing: the body ended like this.
    Nothing(End),
}

/// The framing of a body.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Framing {
    /// No body.
    Empty,
    /// A length.
    Length(usize),
    /// After the last chunk.
    Chunked,
    /// Until the connection ends: responses only.
    Close,
}

impl Wire {
    /// Takes over a connected socket.
    pub fn new(socket: impl Into<Socket>) -> Wire {
        let socket = socket.into();
        socket.set_read_timeout(Some(DEADLINE)).expect("a read timeout");
        socket.set_write_timeout(Some(DEADLINE)).expect("a write timeout");
        Wire { socket, read: Vec::new(), was_reset: false, trailers: Vec::new() }
    }

    /// The address of this end.
    ///
    /// # Panics
    /// If it is a unix socket.
    pub fn address(&self) -> SocketAddr {
        self.socket.local_addr().ok().and_then(|address| address.as_socket()).expect("a TCP socket")
    }

    /// Sends all bytes, if the peer accepts them.
    pub fn send(&mut self, bytes: impl AsRef<[u8]>) -> io::Result<()> {
        self.socket.write_all(bytes.as_ref())
    }

    /// Sends byte by byte with pauses as long as the peer is silent; returns whether all was sent.
    pub fn drip(&mut self, bytes: impl AsRef<[u8]>, pause: Duration) -> bool {
        self.socket.set_read_timeout(Some(pause)).expect("a read timeout");
        let mut bytes = bytes.as_ref().iter().enumerate();
        let all = bytes.all(|(n, byte)| (n == 0 || self.silent()) && self.send([*byte]).is_ok());
        self.socket.set_read_timeout(Some(DEADLINE)).expect("a read timeout");
        all
    }

    /// Whether the peer sends nothing, and does not close, during the read timeout.
    fn silent(&mut self) -> bool {
        let mut piece = [0; 4096];
        match self.socket.read(&mut piece) {
            Ok(count) => {
                self.read.extend_from_slice(&piece[..count]);
                false
            }
            Err(e) => e.kind() == io::ErrorKind::WouldBlock,
        }
    }

    /// The socket, for another protocol. There must be no unread data.
    pub fn into_socket(self) -> Socket {
        assert!(self.read.is_empty(), "bytes were read already");
        self.socket
    }

    /// Shuts down the sending side; reading still works.
    pub fn end(&mut self) {
        assert!(self.try_end(), "a connection");
    }

    /// The same; returns whether there was a connection.
    pub fn try_end(&mut self) -> bool {
        self.socket.shutdown(Shutdown::Write).is_ok()
    }

    /// Closes with a reset.
    pub fn reset(self) {
        self.socket.set_linger(Some(Duration::ZERO)).expect("linger");
    }

    /// Whether nothing unread has arrived, not even an end.
    pub fn is_silent(&mut self) -> bool {
        self.socket.set_nonblocking(true).expect("a socket that does not block");
        let silent = self.read.is_empty() && self.silent();
        self.socket.set_nonblocking(false).expect("a socket that blocks");
        silent
    }

    /// Sends this repeatedly until the peer accepts nothing for a while, or has gone.
    pub fn fill_up(&mut self, piece: &[u8]) {
        self.socket.set_write_timeout(Some(Duration::from_millis(300))).expect("a write timeout");
        while self.socket.write(piece).is_ok() {}
        self.socket.set_write_timeout(None).expect("no write timeout");
    }

    /// The available bytes, once there are any; empty if the peer has gone.
    pub fn what_is_there(&mut self) -> Vec<u8> {
        if self.read.is_empty() {
            self.fill();
        }
        std::mem::take(&mut self.read)
    }

    /// Waits until the peer has closed or reset; returns the bytes before that.
    pub fn rest(&mut self) -> Vec<u8> {
        while self.fill() {}
        std::mem::take(&mut self.read)
    }

    /// Reads a header; `None` if the peer closed before its first byte.
    ///
    /// # Panics
    ///
    /// If it is incomplete, malformed, or does not arrive.
    pub fn head(&mut self) -> Option<Head> {
        loop {
            if let Some(end) = find(&self.read, b"\r\n\r\n") {
                return Some(Head::parse(self.read.drain(..end + 4).collect()));
            }
            if !self.fill() {
                assert!(self.read.is_empty(), "a header was cut: {:?}", String::from_utf8_lossy(&self.read));
                return None;
            }
        }
    }

    /// Reads a body.
    ///
    /// # Panics
    ///
    /// If its chunks are malformed, or on timeout.
    pub fn body(&mut self, framing: Framing) -> (Vec<u8>, End) {
        let (mut body, mut left) = (Vec::new(), framing.begin());
        loop {
            body.append(&mut self.piece(&mut left, usize::MAX));
            if let Left::Nothing(end) = left {
                return (body, end);
            }
        }
    }

    /// Reads a part of a body, at most `max` bytes at once from the socket. It is empty only at the end of the
    /// body; `left` shows the end with the last part or after it.
    ///
    /// # Panics
    ///
    /// If its chunks are malformed, or on timeout.
    pub fn piece(&mut self, left: &mut Left, max: usize) -> Vec<u8> {
        loop {
            *left = match *left {
                Left::Nothing(_) => return Vec::new(),
                Left::Bytes(0) => Left::Nothing(End::Complete),
                Left::Chunk(0) => match self.line() {
                    Some(line) => {
                        assert_eq!(line, "", "a chunk is longer than its size");
                        Left::Chunks
                    }
                    None => Left::Nothing(End::Cut),
                },
                Left::Bytes(length) | Left::Chunk(length) => {
                    let piece = self.some(length.min(max));
                    *left = match (&*left, length - piece.len()) {
                        _ if piece.is_empty() => Left::Nothing(End::Cut),
                        (Left::Bytes(_), 0) => Left::Nothing(End::Complete),
                        (Left::Bytes(_), rest) => Left::Bytes(rest),
                        (_, rest) => Left::Chunk(rest),
                    };
                    return piece;
                }
                Left::Chunks => self.chunk(),
                Left::Close => match self.some(max) {
                    piece if piece.is_empty() && self.was_reset => Left::Nothing(End::Cut),
                    piece if piece.is_empty() => Left::Nothing(End::Complete),
                    piece => return piece,
                },
            }
        }
    }

    /// Between 1 and `max` bytes; none at the end of the connection.
    fn some(&mut self, max: usize) -> Vec<u8> {
        if self.read.is_empty() {
            self.fill_at_most(max);
        }
        self.take(max.min(self.read.len()))
    }

    /// The trailer fields of the last body, each as a line.
    pub fn trailers(&self) -> &[String] {
        &self.trailers
    }

    /// Reads this many bytes, or fewer if the connection ends.
    pub fn exactly(&mut self, length: usize) -> (Vec<u8>, End) {
        while self.read.len() < length {
            if !self.fill() {
                return (std::mem::take(&mut self.read), End::Cut);
            }
        }
        (self.take(length), End::Complete)
    }

    /// Takes this many of the read bytes. Copies, because collecting a drain is slow in debug builds.
    fn take(&mut self, length: usize) -> Vec<u8> {
        let taken = self.read[..length].to_vec();
        self.read.drain(..length);
        taken
    }

    /// Reads a chunk size, or the trailer fields after the last chunk.
    fn chunk(&mut self) -> Left {
        let Some(line) = self.line() else { return Left::Nothing(End::Cut) };
        let size = line.split(';').next().unwrap_or_default();
        let size = usize::from_str_radix(size, 16).unwrap_or_else(|_| panic!("`{line}` is no chunk size"));
        if size > 0 {
            return Left::Chunk(size);
        }
        self.trailers.clear();
        while let Some(line) = self.line() {
            if line.is_empty() {
                return Left::Nothing(End::Complete);
            }
            self.trailers.push(line);
        }
        Left::Nothing(End::Cut)
    }

    /// A line. Bytes of a field value that are not UTF-8 (obs-text, RFC 9110 §5.5) become `U+FFFD`.
    fn line(&mut self) -> Option<String> {
        loop {
            if let Some(end) = find(&self.read, b"\r\n") {
                let line: Vec<u8> = self.read.drain(..end + 2).collect();
                return Some(String::from_utf8_lossy(&line[..end]).into_owned());
            }
            if !self.fill() {
                return None;
            }
        }
    }

    /// Reads available bytes; `false` at the end of the connection, orderly or reset.
    fn fill(&mut self) -> bool {
        self.fill_at_most(usize::MAX)
    }

    fn fill_at_most(&mut self, max: usize) -> bool {
        let mut piece = [0; 16 * 1024];
        let size = max.min(piece.len());
        match self.socket.read(&mut piece[..size]) {
            Ok(count) => {
                self.read.extend_from_slice(&piece[..count]);
                count > 0
            }
            Err(e) if matches!(e.kind(), io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe) => {
                self.was_reset = true;
                false
            }
            Err(e) => panic!("waited {DEADLINE:?} for a byte after {} unread ones: {e}", self.read.len()),
        }
    }
}

impl Framing {
    /// The rest of an unread body with this framing.
    pub fn begin(self) -> Left {
        match self {
            Framing::Empty => Left::Nothing(End::Complete),
            Framing::Length(length) => Left::Bytes(length),
            Framing::Chunked => Left::Chunks,
            Framing::Close => Left::Close,
        }
    }
}

impl Head {
    fn parse(raw: Vec<u8>) -> Head {
        // `U+FFFD` replaces bytes that are not UTF-8 (obs-text, RFC 9110 §5.5); `raw` has them.
        let text = String::from_utf8_lossy(&raw).into_owned();
        let mut lines = text.strip_suffix("\r\n\r\n").expect("an empty line").split("\r\n");
        let first_line = lines.next().unwrap_or_default().to_owned();
        let fields = lines
            .map(|line| {
                let (name, value) = line.split_once(':').unwrap_or_else(|| panic!("`{line}` is no header field"));
                let token = !name.is_empty() && name.bytes().all(|b| b.is_ascii_graphic());
                assert!(token && !value.contains(['\r', '\n']), "`{line}` is no header field");
                (name.to_owned(), value.trim_matches([' ', '\t']).to_owned())
            })
            .collect();
        Head { raw, first_line, fields }
    }

    /// The value of a field that occurs at most once.
    ///
    /// # Panics
    ///
    /// If it occurs more than once.
    pub fn value(&self, name: &str) -> Option<&str> {
        let values = self.values(name);
        assert!(values.len() < 2, "{name} is there more than once: {values:?}");
        values.first().copied()
    }

    /// All values of a field, in order.
    pub fn values(&self, name: &str) -> Vec<&str> {
        self.fields.iter().filter(|(n, _)| n.eq_ignore_ascii_case(name)).map(|(_, value)| value.as_str()).collect()
    }

    /// The framing of the body, unless status or method exclude one.
    fn framing(&self) -> Option<Framing> {
        match (self.value("transfer-encoding"), self.value("content-length")) {
            (Some(coding), None) => {
                assert_eq!(coding, "chunked", "an unknown transfer coding");
                Some(Framing::Chunked)
            }
            (None, Some(length)) => Some(Framing::Length(length.parse().expect("a Content-Length"))),
            (None, None) => None,
            (Some(_), Some(_)) => panic!("Content-Length beside Transfer-Encoding: {:?}", self.fields),
        }
    }

    /// The framing of a request with this header (RFC 9112 §6.3).
    pub fn request_framing(&self) -> Framing {
        self.framing().unwrap_or(Framing::Empty)
    }

    /// The framing of a response with this header to a request with this method (RFC 9112 §6.3).
    pub fn response_framing(&self, method: &str) -> Framing {
        let status = self.status();
        if method == "HEAD" || status < 200 || status == 204 || status == 304 {
            return Framing::Empty;
        }
        self.framing().unwrap_or(Framing::Close)
    }

    /// The status of a response.
    ///
    /// # Panics
    ///
    /// If the first line is not an HTTP/1 status line.
    pub fn status(&self) -> u16 {
        let mut words = self.first_line.splitn(3, ' ');
        let version = words.next().unwrap_or_default();
        assert!(matches!(version, "HTTP/1.1" | "HTTP/1.0"), "`{}` is no status line", self.first_line);
        words.next().and_then(|code| code.parse().ok()).unwrap_or_else(|| panic!("no status in `{}`", self.first_line))
    }

    /// The method of a request.
    pub fn method(&self) -> &str {
        self.first_line.split(' ').next().unwrap_or_default()
    }

    /// The target of a request.
    pub fn target(&self) -> &str {
        self.first_line.split(' ').nth(1).unwrap_or_default()
    }
}

impl Response {
    /// The body as text.
    pub fn text(&self) -> &str {
        std::str::from_utf8(&self.body).expect("a body of text")
    }

    /// The body as JSON.
    pub fn json(&self) -> serde_json::Value {
        serde_json::from_slice(&self.body).expect("a body of JSON")
    }
}

impl Deref for Request {
    type Target = Head;

    fn deref(&self) -> &Head {
        &self.head
    }
}

impl Deref for Response {
    type Target = Head;

    fn deref(&self) -> &Head {
        &self.head
    }
}

/// The position of `wanted`.
pub(super) fn find(bytes: &[u8], wanted: &[u8]) -> Option<usize> {
    bytes.windows(wanted.len()).position(|window| window == wanted)
}
