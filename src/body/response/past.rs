//! The path past the client's session: bytes go straight to the socket, header and pieces in one system call.

use std::collections::VecDeque;

use bytes::Bytes;
use http::HeaderMap;
use pingora::http::ResponseHeader;

use crate::client::stream::Bypass;
use crate::client::trailers::last_chunk;
use crate::framing::Body;

/// Number of bytes kept when the client does not accept them.
pub(super) const SEND_LEFT: usize = 16 << 10;

/// The direct path to the socket of one of Forebay's own HTTP/1 sessions.
pub struct Past {
    pub(super) bypass: Bypass,
    /// The request body is read past the session, too.
    pub(super) reads: bool,
    /// The framing of the body; with a length, the bytes that remain.
    pub(super) framing: Body,
    /// The bytes being sent.
    pub(super) pieces: VecDeque<Bytes>,
    /// These bytes came from the spool, which has counted them.
    pub(super) was_spooled: bool,
    /// Whether a send is in progress, even of a header only.
    pub(super) sends: bool,
    /// The received bytes of response headers that were not sent yet.
    pub(super) written: VecDeque<Bytes>,
    /// The last header that was sent, for the session.
    pub(super) answered: Option<Box<ResponseHeader>>,
}

impl Past {
    /// Creates a path with nothing to send.
    pub fn new(bypass: Bypass, reads: bool) -> Self {
        let (pieces, written) = (VecDeque::new(), VecDeque::new());
        let (was_spooled, sends) = (false, false);
        Past { bypass, reads, framing: Body::None, pieces, was_spooled, sends, written, answered: None }
    }

    /// Queues a piece of the body in its framing.
    pub(super) fn push(&mut self, mut piece: Bytes) {
        match &mut self.framing {
            Body::None => return,
            Body::Length(left) => {
                // The client would take additional bytes for the next response.
                piece.truncate(usize::try_from(*left).unwrap_or(usize::MAX));
                *left -= piece.len() as u64;
            }
            Body::Chunked if !piece.is_empty() => {
                self.pieces.push_back(format!("{:x}\r\n", piece.len()).into());
                self.pieces.push_back(piece);
                piece = Bytes::from_static(b"\r\n");
            }
            Body::Chunked | Body::UntilEnd => {}
        }
        if !piece.is_empty() {
            self.pieces.push_back(piece);
        }
    }

    /// Queues the end of the body, with the trailers. `false`: the body is shorter than announced.
    pub(super) fn end(&mut self, trailers: Option<&HeaderMap>) -> bool {
        if self.framing == Body::Chunked {
            self.pieces.push_back(last_chunk(trailers));
        }
        !matches!(self.framing, Body::Length(1..))
    }

    /// Removes the bytes beyond [`SEND_LEFT`] from the queue and returns them in order. Returns nothing for a chunked
    /// body, whose framing is already queued.
    pub(super) fn spare(&mut self) -> Vec<Bytes> {
        let bytes: usize = self.pieces.iter().map(Bytes::len).sum();
        if self.framing == Body::Chunked || bytes <= SEND_LEFT {
            return Vec::new();
        }
        let (mut kept, mut spared) = (VecDeque::new(), Vec::new());
        let mut room = SEND_LEFT;
        for mut piece in self.pieces.drain(..) {
            let part = piece.split_to(piece.len().min(room));
            room -= part.len();
            if !part.is_empty() {
                // A copy, since a slice would keep the whole piece in memory.
                kept.push_back(if piece.is_empty() { part } else { Bytes::copy_from_slice(&part) });
            }
            if !piece.is_empty() {
                spared.push(piece);
            }
        }
        self.pieces = kept;
        if let Body::Length(left) = &mut self.framing {
            *left += spared.iter().map(|piece| piece.len() as u64).sum::<u64>();
        }
        spared
    }
}
