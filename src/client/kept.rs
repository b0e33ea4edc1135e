//! The beginning of a streamed request body, kept so that it can be sent to another endpoint.

use bytes::Bytes;
use pingora::protocols::http::body_buffer::FixedBuffer;

/// Maximum number of bytes kept, as in Pingora on HTTP/1.
const BYTES_MOST: usize = 64 << 10;

/// The body from its first byte, once keeping has begun; empty if the body exceeds the limit.
#[derive(Default)]
pub struct Kept(Option<FixedBuffer>);

impl Kept {
    /// Starts keeping. Further calls have no effect.
    pub fn begin(&mut self) {
        self.0.get_or_insert_with(|| FixedBuffer::new(BYTES_MOST));
    }

    /// Keeps a piece, if keeping has begun.
    pub fn push(&mut self, piece: &Bytes) {
        if let Some(buffer) = &mut self.0 {
            buffer.write_to_buffer(piece);
        }
    }

    /// Whether the body exceeds the limit.
    pub fn is_truncated(&self) -> bool {
        self.0.as_ref().is_some_and(FixedBuffer::is_truncated)
    }

    /// The complete body. `None` if nothing was kept, or not all of it.
    pub fn bytes(&self) -> Option<Bytes> {
        self.0.as_ref().filter(|buffer| !buffer.is_truncated())?.get_buffer()
    }
}
