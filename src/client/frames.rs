//! Follows the frames of an HTTP/2 connection (RFC 9113 §4.1) just far enough to know whether the client has begun
//! something and not finished it: a frame, or a header block that waits for CONTINUATION.
//!
//! That is what `timeouts.header` bounds on HTTP/2. A connection that is merely quiet is the idle timeout's, and a
//! slow DATA frame is the body's.

const FRAME_HEADER_BYTES: usize = 9;
const PREFACE_BYTES: usize = 24;
const DATA: u8 = 0x0;
const HEADERS: u8 = 0x1;
const PUSH_PROMISE: u8 = 0x5;
const CONTINUATION: u8 = 0x9;
const END_HEADERS: u8 = 0x4;

/// Where in the sequence of frames the next byte stands.
#[derive(Debug)]
pub struct Frames {
    preface: usize,
    header: [u8; FRAME_HEADER_BYTES],
    filled: usize,
    payload: usize,
    block: bool,
}

impl Default for Frames {
    fn default() -> Self {
        Frames { preface: PREFACE_BYTES, header: [0; FRAME_HEADER_BYTES], filled: 0, payload: 0, block: false }
    }
}

impl Frames {
    /// Takes bytes as they come from the client, preface included.
    pub fn take(&mut self, mut bytes: &[u8]) {
        let preface = self.preface.min(bytes.len());
        self.preface -= preface;
        bytes = &bytes[preface..];
        while !bytes.is_empty() {
            if self.payload > 0 {
                let skipped = self.payload.min(bytes.len());
                self.payload -= skipped;
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
                self.begin_frame();
            }
        }
    }

    /// Whether the client has begun a frame or a header block and not finished it. DATA may take its time.
    pub fn unfinished(&self) -> bool {
        let in_header = self.filled > 0 && self.filled < FRAME_HEADER_BYTES;
        let in_payload = self.payload > 0 && self.header[3] != DATA;
        self.preface > 0 || self.block || in_header || in_payload
    }

    fn begin_frame(&mut self) {
        let [high, middle, low, kind, flags, ..] = self.header;
        self.payload = usize::from(high) << 16 | usize::from(middle) << 8 | usize::from(low);
        if matches!(kind, HEADERS | PUSH_PROMISE | CONTINUATION) {
            self.block = flags & END_HEADERS == 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

    fn frame(kind: u8, flags: u8, payload: &[u8]) -> Vec<u8> {
        let length = payload.len();
        let mut bytes = vec![(length >> 16) as u8, (length >> 8) as u8, length as u8, kind, flags, 0, 0, 0, 1];
        bytes.extend_from_slice(payload);
        bytes
    }

    fn after(parts: &[&[u8]]) -> bool {
        let mut whole = Frames::default();
        let mut single = Frames::default();
        for byte in parts.concat() {
            single.take(&[byte]);
        }
        whole.take(&parts.concat());
        assert_eq!(whole.unfinished(), single.unfinished(), "the cut must not matter");
        whole.unfinished()
    }

    #[test]
    fn whole_frames_leave_nothing_unfinished() {
        assert!(!after(&[
            PREFACE,
            &frame(0x4, 0, &[0; 12]),
            &frame(HEADERS, END_HEADERS, b"block"),
            &frame(0x6, 0, &[0; 8])
        ]));
    }

    #[test]
    fn a_partial_preface_frame_or_header_block_is_unfinished() {
        assert!(after(&[&PREFACE[..20]]));
        assert!(after(&[PREFACE, &frame(0x4, 0, &[0; 12])[..5]]));
        assert!(after(&[PREFACE, &frame(0x4, 0, &[0; 12])[..15]]));
        assert!(after(&[PREFACE, &frame(HEADERS, 0, b"block")]));
        assert!(after(&[PREFACE, &frame(HEADERS, 0, b"block"), &frame(CONTINUATION, 0, b"more")]));
        assert!(!after(&[PREFACE, &frame(HEADERS, 0, b"block"), &frame(CONTINUATION, END_HEADERS, b"")]));
    }

    #[test]
    fn a_slow_data_frame_is_not_the_headers_matter() {
        assert!(!after(&[PREFACE, &frame(DATA, 0, &[0; 100])[..50]]));
    }
}
