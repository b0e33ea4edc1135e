//! A client that speaks raw HTTP/2 frames (RFC 9113 §4.1), to send what a library would not.

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr};

use super::{Client, DEADLINE};

/// The client connection preface.
pub const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// Frame types.
pub mod kind {
    pub const DATA: u8 = 0x0;
    pub const HEADERS: u8 = 0x1;
    pub const PRIORITY: u8 = 0x2;
    pub const RST_STREAM: u8 = 0x3;
    pub const SETTINGS: u8 = 0x4;
    pub const PUSH_PROMISE: u8 = 0x5;
    pub const PING: u8 = 0x6;
    pub const GOAWAY: u8 = 0x7;
    pub const WINDOW_UPDATE: u8 = 0x8;
    pub const CONTINUATION: u8 = 0x9;
}

/// Error codes (RFC 9113 §7).
pub mod code {
    pub const NO_ERROR: u32 = 0x0;
    pub const PROTOCOL_ERROR: u32 = 0x1;
    pub const FLOW_CONTROL_ERROR: u32 = 0x3;
    pub const STREAM_CLOSED: u32 = 0x5;
    pub const FRAME_SIZE_ERROR: u32 = 0x6;
    pub const REFUSED_STREAM: u32 = 0x7;
    pub const CANCEL: u32 = 0x8;
    pub const COMPRESSION_ERROR: u32 = 0x9;
    pub const ENHANCE_YOUR_CALM: u32 = 0xb;
}

/// The flag of DATA and HEADERS that ends a stream.
pub const END_STREAM: u8 = 0x1;
/// The flag of HEADERS that ends its block.
pub const END_HEADERS: u8 = 0x4;
/// The acknowledgement flag of SETTINGS and PING.
pub const ACK: u8 = 0x1;

/// A frame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    /// Its type.
    pub kind: u8,
    /// Its flags.
    pub flags: u8,
    /// Its stream, 0 for the connection.
    pub stream: u32,
    /// Its payload.
    pub payload: Vec<u8>,
}

impl Frame {
    /// A frame.
    pub fn new(kind: u8, flags: u8, stream: u32, payload: impl Into<Vec<u8>>) -> Frame {
        Frame { kind, flags, stream, payload: payload.into() }
    }

    /// A GET of `/` on `http://test` without a body. All fields are in HPACK's static table, except the host.
    pub fn get(stream: u32) -> Frame {
        Frame::new(kind::HEADERS, END_STREAM | END_HEADERS, stream, [0x82, 0x86, 0x84, 0x41, 4, b't', b'e', b's', b't'])
    }

    /// The header of a POST to `/` on `http://test`; its body follows.
    pub fn post(stream: u32) -> Frame {
        Frame::new(kind::HEADERS, END_HEADERS, stream, [0x83, 0x86, 0x84, 0x41, 4, b't', b'e', b's', b't'])
    }

    /// A RST_STREAM.
    pub fn reset(stream: u32, code: u32) -> Frame {
        Frame::new(kind::RST_STREAM, 0, stream, code.to_be_bytes())
    }

    /// A PING.
    pub fn ping(payload: [u8; 8]) -> Frame {
        Frame::new(kind::PING, 0, 0, payload)
    }

    /// A WINDOW_UPDATE.
    pub fn credit(stream: u32, bytes: u32) -> Frame {
        Frame::new(kind::WINDOW_UPDATE, 0, stream, bytes.to_be_bytes())
    }

    /// Whether it is the last of its stream.
    pub fn ends_stream(&self) -> bool {
        matches!(self.kind, kind::DATA | kind::HEADERS) && self.flags & END_STREAM != 0
    }

    /// The error code of a RST_STREAM or a GOAWAY.
    ///
    /// # Panics
    ///
    /// If it is neither.
    pub fn code(&self) -> u32 {
        let at = match self.kind {
            kind::RST_STREAM => 0,
            kind::GOAWAY => 4,
            kind => panic!("a frame of kind {kind:#x} has no code"),
        };
        u32::from_be_bytes(self.payload[at..at + 4].try_into().expect("four bytes"))
    }

    /// The status in these HEADERS: it comes first, as an index of HPACK's table or Huffman-coded.
    pub fn status(&self) -> Option<u16> {
        let status = match self.payload[..] {
            [number @ 0x88..=0x8e, ..] => [200, 204, 206, 304, 400, 404, 500][usize::from(number) - 0x88],
            [0x48 | 0x08, 0x82, a, b, ..] => digits(u32::from_be_bytes([a, b, 0xff, 0xff]))?,
            [0x48 | 0x08, 0x83, a, b, c, ..] => digits(u32::from_be_bytes([a, b, c, 0xff]))?,
            [0x48 | 0x08, 3, a, b, c, ..] => std::str::from_utf8(&[a, b, c]).ok()?.parse().ok()?,
            _ => return None,
        };
        Some(status)
    }

    /// The frame's wire format.
    pub fn bytes(&self) -> Vec<u8> {
        let length = u32::try_from(self.payload.len()).expect("a small frame").to_be_bytes();
        [&length[1..], &[self.kind, self.flags], &self.stream.to_be_bytes(), &self.payload].concat()
    }
}

/// Three Huffman-coded digits: 0 to 2 have five bits, 3 to 9 have six.
fn digits(mut bits: u32) -> Option<u16> {
    let mut number = 0;
    for _ in 0..3 {
        let (digit, length) = match (bits >> 27, bits >> 26) {
            (short @ 0..=2, _) => (short, 5),
            (_, long @ 0x19..=0x1f) => (long - 0x19 + 3, 6),
            _ => return None,
        };
        number = 10 * number + u16::try_from(digit).ok()?;
        bits <<= length;
    }
    Some(number)
}

/// The transport of frames: a socket, or TLS.
pub trait Pipe: Read + Write + Send {}

impl<P: Read + Write + Send> Pipe for P {}

/// A client that speaks frames.
pub struct Frames {
    pipe: Box<dyn Pipe>,
}

impl Frames {
    /// Connects and sends preface and settings.
    pub fn connect(address: SocketAddr) -> Frames {
        Frames::with(Client::connect(address))
    }

    /// The same from an address of this machine.
    pub fn from(own: impl Into<IpAddr>, address: SocketAddr) -> Frames {
        Frames::with(Client::from(own, address))
    }

    /// The same with a small receive buffer: most unread data stays in the gateway.
    pub fn slow(address: SocketAddr) -> Frames {
        Frames::with(Client::with_receive_buffer(address, 8 << 10))
    }

    fn with(client: Client) -> Frames {
        let socket = client.into_wire().into_socket();
        socket.set_read_timeout(Some(DEADLINE)).expect("a read timeout");
        Frames::over(socket)
    }

    /// Sends preface and settings over this transport.
    pub fn over(pipe: impl Pipe + 'static) -> Frames {
        let mut frames = Frames::silent(pipe);
        frames.send_bytes(PREFACE);
        frames.send(&Frame::new(kind::SETTINGS, 0, 0, []));
        frames
    }

    /// Sends nothing yet.
    pub fn silent(pipe: impl Pipe + 'static) -> Frames {
        Frames { pipe: Box::new(pipe) }
    }

    /// Sends raw bytes.
    ///
    /// # Panics
    ///
    /// If the gateway has gone.
    pub fn send_bytes(&mut self, bytes: &[u8]) {
        self.pipe.write_all(bytes).expect("the gateway to take bytes");
    }

    /// Sends many frames at once, even if the gateway has gone.
    pub fn try_send_all<'f>(&mut self, frames: impl IntoIterator<Item = &'f Frame>) -> bool {
        let bytes: Vec<u8> = frames.into_iter().flat_map(Frame::bytes).collect();
        self.pipe.write_all(&bytes).is_ok()
    }

    /// Sends a frame.
    ///
    /// # Panics
    /// If the gateway has gone.
    pub fn send(&mut self, frame: &Frame) {
        self.pipe.write_all(&frame.bytes()).expect("the gateway to take a frame");
    }

    /// Sends a frame, even if the gateway has gone.
    pub fn try_send(&mut self, frame: &Frame) -> bool {
        self.pipe.write_all(&frame.bytes()).is_ok()
    }

    /// The next frame; settings and pings are answered. `None` if the connection has ended in any way.
    ///
    /// # Panics
    ///
    /// On timeout.
    pub fn next(&mut self) -> Option<Frame> {
        let mut header = [0; 9];
        self.exactly(&mut header)?;
        let [a, b, c, kind, flags, stream @ ..] = header;
        let mut frame =
            Frame::new(kind, flags, u32::from_be_bytes(stream), vec![0; u32::from_be_bytes([0, a, b, c]) as usize]);
        self.exactly(&mut frame.payload)?;
        if matches!(kind, kind::SETTINGS | kind::PING) && flags & ACK == 0 {
            let payload = if kind == kind::PING { frame.payload.clone() } else { Vec::new() };
            self.try_send(&Frame::new(kind, ACK, 0, payload));
        }
        Some(frame)
    }

    /// Waits for a frame of this type.
    ///
    /// # Panics
    ///
    /// If the connection ends first.
    pub fn until(&mut self, kind: u8) -> Frame {
        loop {
            let frame = self.next().expect("a frame before the end of the connection");
            if frame.kind == kind {
                return frame;
            }
        }
    }

    /// Waits until the gateway ends the connection, and returns the error code.
    ///
    /// # Panics
    ///
    /// If there was no GOAWAY.
    pub fn goodbye(&mut self) -> u32 {
        let mut code = None;
        while let Some(frame) = self.next() {
            if frame.kind == kind::GOAWAY {
                code = Some(frame.code());
            }
        }
        code.expect("a GOAWAY before the end of the connection")
    }

    /// Reads the response on a stream and returns credit in small steps. Returns the body's length, and whether it
    /// was complete.
    pub fn answer(&mut self, stream: u32, piece: usize) -> (usize, bool) {
        let (mut body, mut owed) = (0, 0);
        while let Some(frame) = self.next() {
            if frame.stream != stream {
                continue;
            }
            if frame.kind == kind::DATA {
                body += frame.payload.len();
                owed += frame.payload.len();
            }
            if frame.ends_stream() {
                return (body, true);
            }
            while owed >= piece {
                owed -= piece;
                let bytes = u32::try_from(piece).expect("a small piece");
                let sent = [stream, 0].map(|stream| self.try_send(&Frame::credit(stream, bytes)));
                if sent != [true, true] {
                    break;
                }
            }
        }
        (body, false)
    }

    fn exactly(&mut self, bytes: &mut [u8]) -> Option<()> {
        match self.pipe.read_exact(bytes) {
            Ok(()) => Some(()),
            Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => panic!("nothing came for {DEADLINE:?}"),
            Err(_) => None,
        }
    }
}
