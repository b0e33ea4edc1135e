//! HTTP/2 on a socket, frame by frame (RFC 9113 §4.1): a client without a library, which does what one would not do.

use std::io::{Read, Write};
use std::net::SocketAddr;

use socket2::Socket;

use super::{Client, DEADLINE};

/// What a client says first.
pub const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// Kinds of frames.
pub mod kind {
    pub const DATA: u8 = 0x0;
    pub const HEADERS: u8 = 0x1;
    pub const RST_STREAM: u8 = 0x3;
    pub const SETTINGS: u8 = 0x4;
    pub const PING: u8 = 0x6;
    pub const GOAWAY: u8 = 0x7;
    pub const WINDOW_UPDATE: u8 = 0x8;
}

/// The flag of DATA and HEADERS that ends a stream.
pub const END_STREAM: u8 = 0x1;
/// The flag of HEADERS that ends its block.
pub const END_HEADERS: u8 = 0x4;
/// The flag of SETTINGS and PING that answers one.
pub const ACK: u8 = 0x1;

/// A frame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    /// What it is.
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

    /// A GET of `/` on `http://test`, which is all of its stream. The fields are in the static table of HPACK, but for the name.
    pub fn get(stream: u32) -> Frame {
        Frame::new(kind::HEADERS, END_STREAM | END_HEADERS, stream, [0x82, 0x86, 0x84, 0x41, 4, b't', b'e', b's', b't'])
    }

    /// Credit for so many bytes.
    pub fn credit(stream: u32, bytes: u32) -> Frame {
        Frame::new(kind::WINDOW_UPDATE, 0, stream, bytes.to_be_bytes())
    }

    /// Whether it is the last of its stream.
    pub fn ends_stream(&self) -> bool {
        matches!(self.kind, kind::DATA | kind::HEADERS) && self.flags & END_STREAM != 0
    }

    fn bytes(&self) -> Vec<u8> {
        let length = u32::try_from(self.payload.len()).expect("a small frame").to_be_bytes();
        [&length[1..], &[self.kind, self.flags], &self.stream.to_be_bytes(), &self.payload].concat()
    }
}

/// A client that speaks frames.
pub struct Frames {
    socket: Socket,
}

impl Frames {
    /// Connects and sends preface and settings.
    pub fn connect(address: SocketAddr) -> Frames {
        Frames::with(Client::connect(address))
    }

    /// The same with a small receive buffer: most of what it does not read stays with the gateway.
    pub fn slow(address: SocketAddr) -> Frames {
        Frames::with(Client::with_receive_buffer(address, 8 << 10))
    }

    fn with(client: Client) -> Frames {
        let socket = client.into_wire().into_socket();
        socket.set_read_timeout(Some(DEADLINE)).expect("a read timeout");
        let mut frames = Frames { socket };
        frames.socket.write_all(PREFACE).expect("the gateway to take bytes");
        frames.send(&Frame::new(kind::SETTINGS, 0, 0, []));
        frames
    }

    /// Sends a frame.
    ///
    /// # Panics
    /// If the gateway has gone.
    pub fn send(&mut self, frame: &Frame) {
        self.socket.write_all(&frame.bytes()).expect("the gateway to take a frame");
    }

    /// Sends a frame, whether or not the gateway is still there.
    pub fn try_send(&mut self, frame: &Frame) -> bool {
        self.socket.write_all(&frame.bytes()).is_ok()
    }

    /// The next frame, settings and pings being answered; `None` if the connection has ended, in good order or not.
    ///
    /// # Panics
    /// If nothing comes.
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

    /// Waits for a frame of this kind.
    ///
    /// # Panics
    /// If the connection ends before.
    pub fn until(&mut self, kind: u8) -> Frame {
        loop {
            let frame = self.next().expect("a frame before the end of the connection");
            if frame.kind == kind {
                return frame;
            }
        }
    }

    /// Reads the answer on a stream and returns credit for it in small pieces: how much of a body came, and whether all of it.
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
        match self.socket.read_exact(bytes) {
            Ok(()) => Some(()),
            Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => panic!("nothing came for {DEADLINE:?}"),
            Err(_) => None,
        }
    }
}
