//! Raw HTTP/2 frames, to send what no library would. Fields are sent as literals (RFC 7541 §6.2.2), so any name and
//! value is possible; of a response, status, body and end are decoded.

use std::net::SocketAddr;

use super::client::Client;
use super::frames::{ACK, END_HEADERS, END_STREAM, Frame, PREFACE, kind};
use super::origin::Connection;
use super::wire::{End, Wire};

/// One end of a connection.
pub struct RawH2 {
    wire: Wire,
}

/// What was received on a stream.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Outcome {
    /// The status; 0 without a header.
    pub status: u16,
    /// The data.
    pub body: Vec<u8>,
    /// How it ended.
    pub end: Ended,
}

/// How a stream ended.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Ended {
    /// Complete.
    Whole,
    /// Reset with this code.
    Reset(u32),
    /// The connection ended.
    #[default]
    Closed,
}

impl RawH2 {
    /// Connects as a client.
    pub fn client(address: SocketAddr) -> RawH2 {
        let mut raw = RawH2 { wire: Client::connect(address).into_wire() };
        raw.raw(PREFACE);
        raw.send(kind::SETTINGS, 0, 0, b"");
        raw
    }

    /// Accepts a connection as a server.
    ///
    /// # Panics
    ///
    /// If it does not begin with the preface.
    pub fn server(connection: Connection) -> RawH2 {
        let mut raw = RawH2 { wire: connection.into_wire() };
        assert_eq!(raw.wire.exactly(PREFACE.len()).0, PREFACE, "the preface");
        raw.send(kind::SETTINGS, 0, 0, b"");
        raw
    }

    /// Sends a header block with these fields in order.
    pub fn headers(&mut self, stream: u32, fields: &[(&str, &str)], end: bool) {
        let block: Vec<u8> = fields.iter().flat_map(|(name, value)| literal(name, value)).collect();
        let flags = END_HEADERS | if end { END_STREAM } else { 0 };
        self.send(kind::HEADERS, flags, stream, &block);
    }

    /// Sends data.
    pub fn data(&mut self, stream: u32, data: &[u8], end: bool) {
        self.send(kind::DATA, if end { END_STREAM } else { 0 }, stream, data);
    }

    /// Resets a stream.
    pub fn reset(&mut self, stream: u32, code: u32) {
        self.send(kind::RST_STREAM, 0, stream, &code.to_be_bytes());
    }

    /// Sends GOAWAY.
    pub fn goaway(&mut self, last: u32, code: u32) {
        self.send(kind::GOAWAY, 0, 0, &[last.to_be_bytes(), code.to_be_bytes()].concat());
    }

    /// Waits for a request, reads it to its end, and returns its stream. `None`: the peer has closed.
    pub fn request(&mut self) -> Option<u32> {
        let mut begun = 0;
        loop {
            let frame = self.next()?;
            if frame.kind == kind::HEADERS && begun == 0 {
                begun = frame.stream;
            }
            if begun > 0 && frame.stream == begun && frame.flags & END_STREAM > 0 {
                return Some(begun);
            }
        }
    }

    /// Reads a stream to its end.
    pub fn outcome(&mut self, stream: u32) -> Outcome {
        let mut outcome = Outcome::default();
        while let Some(frame) = self.next() {
            match frame.kind {
                kind::HEADERS if frame.stream == stream && outcome.status < 200 => {
                    outcome.status = status(&frame.payload)
                }
                kind::DATA if frame.stream == stream => outcome.body.extend(frame.payload),
                kind::RST_STREAM if frame.stream == stream => {
                    let code = frame.payload.try_into().map(u32::from_be_bytes);
                    outcome.end = Ended::Reset(code.expect("a code"));
                    return outcome;
                }
                _ => {}
            }
            if frame.stream == stream && frame.flags & END_STREAM > 0 {
                outcome.end = Ended::Whole;
                return outcome;
            }
        }
        outcome
    }

    /// The next frame; settings are acknowledged.
    fn next(&mut self) -> Option<Frame> {
        loop {
            let (header, end) = self.wire.exactly(9);
            if end == End::Cut {
                return None;
            }
            let number = |bytes: &[u8]| bytes.iter().fold(0_u32, |number, byte| number << 8 | u32::from(*byte));
            let (payload, end) = self.wire.exactly(number(&header[..3]) as usize);
            if end == End::Cut {
                return None;
            }
            let frame =
                Frame { kind: header[3], flags: header[4], stream: number(&header[5..]) & 0x7fff_ffff, payload };
            if frame.kind == kind::SETTINGS && frame.flags & ACK == 0 {
                self.send(kind::SETTINGS, ACK, 0, b"");
                continue;
            }
            return Some(frame);
        }
    }

    fn send(&mut self, kind: u8, flags: u8, stream: u32, payload: &[u8]) {
        let length = u32::try_from(payload.len()).expect("a short payload").to_be_bytes();
        self.raw(&[&length[1..], &[kind, flags], &stream.to_be_bytes(), payload].concat());
    }

    /// Sends if the peer still accepts data: it may have closed already.
    fn raw(&mut self, bytes: &[u8]) {
        let _ = self.wire.send(bytes);
    }
}

/// A literal field without Huffman coding.
fn literal(name: &str, value: &str) -> Vec<u8> {
    let text = |text: &str| {
        let length = u8::try_from(text.len()).expect("a short text");
        assert!(length < 127, "a short text");
        [&[length], text.as_bytes()].concat()
    };
    [vec![0], text(name), text(value)].concat()
}

/// The status at the beginning of a header block, the first of its connection.
fn status(block: &[u8]) -> u16 {
    let block: &[u8] = match block {
        // A dynamic table size update.
        [0x20..=0x3e, rest @ ..] => rest,
        block => block,
    };
    match block {
        [indexed @ 0x88..=0x8e, ..] => [200, 204, 206, 304, 400, 404, 500][usize::from(indexed - 0x88)],
        // A literal with the name `:status`, Huffman-coded or not.
        [0x08 | 0x18 | 0x48, length, rest @ ..] if length & 0x80 > 0 => digits(&rest[..usize::from(length & 0x7f)]),
        [0x08 | 0x18 | 0x48, 3, a, b, c, ..] => {
            [a, b, c].iter().fold(0, |number, digit| number * 10 + u16::from(**digit - b'0'))
        }
        other => panic!("no status at the beginning of {other:x?}"),
    }
}

/// Three Huffman-coded digits (RFC 7541 appendix B): five bits for 0 to 2, six for the others.
fn digits(codes: &[u8]) -> u16 {
    let bits = codes.iter().fold(0_u32, |bits, byte| bits << 8 | u32::from(*byte)) << (32 - 8 * codes.len());
    let (mut number, mut at) = (0, 0);
    for _ in 0..3 {
        let five = (bits << at) >> 27;
        let (digit, width) = if five < 3 { (five, 5) } else { (((bits << at) >> 26) - 0x19 + 3, 6) };
        number = number * 10 + u16::try_from(digit).expect("a digit");
        at += width;
    }
    number
}
