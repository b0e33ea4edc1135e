//! Parses the frame sequence of an HTTP/2 connection (RFC 9113 §4.1): the nine bytes of each frame header, and the end
//! of RST_STREAM and GOAWAY frames.
//!
//! It stores no other payload and allocates nothing. `client::http2` passes it the bytes of both directions. It reports
//! the frames, and whether the client has begun something without finishing it: a frame, or a header block that waits
//! for CONTINUATION. `timeouts.header` limits these on HTTP/2. The idle timeout applies to a quiet connection, and the
//! body's limits to a slow DATA frame.

const FRAME_HEADER_BYTES: usize = 9;
const PREFACE_BYTES: usize = 24;

/// The frame types (RFC 9113 §6).
pub mod kind {
    /// Bytes of a body.
    pub const DATA: u8 = 0x0;
    /// A header block, or its beginning.
    pub const HEADERS: u8 = 0x1;
    /// Priority signal, deprecated by RFC 9113.
    pub const PRIORITY: u8 = 0x2;
    /// Reset of a stream.
    pub const RST_STREAM: u8 = 0x3;
    /// Settings of one end for the other.
    pub const SETTINGS: u8 = 0x4;
    /// A server's announcement of a request.
    pub const PUSH_PROMISE: u8 = 0x5;
    /// A ping.
    pub const PING: u8 = 0x6;
    /// Announces that no further streams are accepted.
    pub const GOAWAY: u8 = 0x7;
    /// Flow-control credit.
    pub const WINDOW_UPDATE: u8 = 0x8;
    /// The continuation of a header block.
    pub const CONTINUATION: u8 = 0x9;
    /// Priority signal of RFC 9218.
    pub const PRIORITY_UPDATE: u8 = 0x10;
}

/// Flag of DATA and HEADERS: the stream ends.
pub const END_STREAM: u8 = 0x1;
/// Flag of SETTINGS and PING: acknowledgement.
pub const ACK: u8 = 0x1;
/// Flag of HEADERS and CONTINUATION: the header block ends.
pub const END_HEADERS: u8 = 0x4;
/// Flag of DATA and HEADERS: the first byte is the length of a padding.
pub const PADDED: u8 = 0x8;
/// Flag of HEADERS: five bytes of priority are present.
pub const PRIORITY: u8 = 0x20;

/// A frame header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Head {
    /// Length of the payload in bytes.
    pub length: u32,
    /// The frame type.
    pub kind: u8,
    /// The flags.
    pub flags: u8,
    /// The stream; 0 is the connection.
    pub stream: u32,
}

impl Head {
    /// Whether this flag is set.
    pub fn has(&self, flag: u8) -> bool {
        self.flags & flag != 0
    }
}

/// An event in the sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Passed {
    /// A frame header; the payload may still follow.
    Head(Head),
    /// A complete RST_STREAM: its stream and its code (RFC 9113 §6.4).
    Reset(u32, u32),
    /// A complete GOAWAY: its last eight bytes, the end of its debug data (RFC 9113 §6.8).
    Goodbye([u8; 8]),
}

/// The position of the next byte in the frame sequence.
#[derive(Debug)]
pub struct Frames {
    preface: usize,
    header: [u8; FRAME_HEADER_BYTES],
    filled: usize,
    payload: usize,
    /// The last bytes of the payload of a RST_STREAM or a GOAWAY.
    tail: u64,
    block: bool,
}

impl Frames {
    /// The frames of a client, which begin with its preface.
    pub fn of_client() -> Self {
        Frames { preface: PREFACE_BYTES, ..Frames::of_server() }
    }

    /// The frames of a server.
    pub fn of_server() -> Self {
        Frames { preface: 0, header: [0; FRAME_HEADER_BYTES], filled: 0, payload: 0, tail: 0, block: false }
    }

    /// Parses bytes as they arrive, and calls `show` for each event. After an error, further bytes are not parsed.
    ///
    /// # Errors
    ///
    /// The error of `show`.
    pub fn take<E>(&mut self, mut bytes: &[u8], mut show: impl FnMut(Passed) -> Result<(), E>) -> Result<(), E> {
        let preface = self.preface.min(bytes.len());
        self.preface -= preface;
        bytes = &bytes[preface..];
        while !bytes.is_empty() {
            if self.payload > 0 {
                let skipped = self.payload.min(bytes.len());
                self.payload -= skipped;
                if matches!(self.header[3], kind::RST_STREAM | kind::GOAWAY) {
                    self.tail = bytes[..skipped].iter().fold(self.tail, |tail, byte| tail << 8 | u64::from(*byte));
                    match (self.payload, self.head()) {
                        (0, Head { kind: kind::RST_STREAM, stream, .. }) => {
                            show(Passed::Reset(stream, self.tail as u32))?;
                        }
                        (0, _) => show(Passed::Goodbye(self.tail.to_be_bytes()))?,
                        _ => {}
                    }
                }
                bytes = &bytes[skipped..];
                continue;
            }
            if self.filled == FRAME_HEADER_BYTES {
                self.filled = 0;
            }
            let wanted = (FRAME_HEADER_BYTES - self.filled).min(bytes.len());
            self.header[self.filled..self.filled + wanted].copy_from_slice(&bytes[..wanted]);
            self.filled += wanted;
            bytes = &bytes[wanted..];
            if self.filled == FRAME_HEADER_BYTES {
                let head = self.head();
                self.payload = head.length as usize;
                self.tail = 0;
                if matches!(head.kind, kind::HEADERS | kind::PUSH_PROMISE | kind::CONTINUATION) {
                    self.block = !head.has(END_HEADERS);
                }
                show(Passed::Head(head))?;
            }
        }
        Ok(())
    }

    /// Whether a frame or a header block is incomplete. A DATA frame does not count.
    pub fn unfinished(&self) -> bool {
        let in_header = self.filled > 0 && self.filled < FRAME_HEADER_BYTES;
        let in_payload = self.payload > 0 && self.header[3] != kind::DATA;
        self.preface > 0 || self.block || in_header || in_payload
    }

    fn head(&self) -> Head {
        let [high, middle, low, kind, flags, stream @ ..] = self.header;
        Head {
            length: u32::from_be_bytes([0, high, middle, low]),
            kind,
            flags,
            stream: u32::from_be_bytes(stream) & (u32::MAX >> 1),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::kind::{CONTINUATION, DATA, GOAWAY, HEADERS, PING, RST_STREAM, SETTINGS};
    use super::*;
    use proptest::prelude::*;

    const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

    fn frame(kind: u8, flags: u8, payload: &[u8]) -> Vec<u8> {
        let length = payload.len();
        let mut bytes = vec![(length >> 16) as u8, (length >> 8) as u8, length as u8, kind, flags, 0, 0, 0, 1];
        bytes.extend_from_slice(payload);
        bytes
    }

    /// The events of these bytes, in pieces of this size.
    fn passed(frames: &mut Frames, bytes: &[u8], piece: usize) -> Vec<Passed> {
        let mut seen = Vec::new();
        for piece in bytes.chunks(piece) {
            let taken: Result<(), ()> = frames.take(piece, |passed| {
                seen.push(passed);
                Ok(())
            });
            taken.expect("nothing fails");
        }
        seen
    }

    fn after(parts: &[&[u8]]) -> bool {
        let (mut whole, mut single) = (Frames::of_client(), Frames::of_client());
        let bytes = parts.concat();
        assert_eq!(passed(&mut whole, &bytes, bytes.len()), passed(&mut single, &bytes, 1));
        assert_eq!(whole.unfinished(), single.unfinished(), "the cut must not matter");
        whole.unfinished()
    }

    #[test]
    fn whole_frames_leave_nothing_unfinished() {
        assert!(!after(&[
            PREFACE,
            &frame(SETTINGS, 0, &[0; 12]),
            &frame(HEADERS, END_HEADERS, b"block"),
            &frame(PING, 0, &[0; 8])
        ]));
    }

    #[test]
    fn a_partial_preface_frame_or_header_block_is_unfinished() {
        assert!(after(&[&PREFACE[..20]]));
        assert!(after(&[PREFACE, &frame(SETTINGS, 0, &[0; 12])[..5]]));
        assert!(after(&[PREFACE, &frame(SETTINGS, 0, &[0; 12])[..15]]));
        assert!(after(&[PREFACE, &frame(HEADERS, 0, b"block")]));
        assert!(after(&[PREFACE, &frame(HEADERS, 0, b"block"), &frame(CONTINUATION, 0, b"more")]));
        assert!(!after(&[PREFACE, &frame(HEADERS, 0, b"block"), &frame(CONTINUATION, END_HEADERS, b"")]));
    }

    #[test]
    fn a_slow_data_frame_is_not_the_headers_matter() {
        assert!(!after(&[PREFACE, &frame(DATA, 0, &[0; 100])[..50]]));
    }

    #[test]
    fn a_reset_and_a_goodbye_show_their_ends_once_they_are_whole() {
        let mut frames = Frames::of_server();
        let bytes = frame(RST_STREAM, 0, &[0, 0, 1, 7]);
        let head = Head { length: 4, kind: RST_STREAM, flags: 0, stream: 1 };
        assert_eq!(passed(&mut frames, &bytes[..12], 5), [Passed::Head(head)]);
        assert_eq!(passed(&mut frames, &bytes[12..], 5), [Passed::Reset(1, 0x107)]);
        let bytes = frame(GOAWAY, 0, b"\0\0\0\x07\0\0\0\x0btoo_many_resets");
        assert_eq!(passed(&mut frames, &bytes, 3)[1..], [Passed::Goodbye(*b"y_resets")]);
    }

    #[test]
    fn nothing_is_taken_after_an_error() {
        let mut frames = Frames::of_server();
        let bytes = [frame(PING, 0, &[0; 8]), frame(GOAWAY, 0, &[0; 8])].concat();
        let mut seen = 0;
        let taken = frames.take(&bytes, |_| {
            seen += 1;
            Err("enough")
        });
        assert_eq!((taken, seen), (Err("enough"), 1));
    }

    proptest! {
        #[test]
        fn any_bytes_are_followed_and_the_cut_does_not_matter(
            bytes in prop::collection::vec(any::<u8>(), 0..600), piece in 1usize..40,
        ) {
            let (mut whole, mut cut) = (Frames::of_client(), Frames::of_client());
            prop_assert_eq!(passed(&mut whole, &bytes, bytes.len().max(1)), passed(&mut cut, &bytes, piece));
            prop_assert_eq!(whole.unfinished(), cut.unfinished());
        }
    }
}
