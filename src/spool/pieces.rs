//! Bytes in memory, in order, as the pieces in which they arrived.
//!
//! Large pieces are kept unchanged. Consecutive small ones are copied together, since each would cost an allocation.
//! Every byte has a position, counted from the first byte that the spool ever received.

use std::collections::VecDeque;

use bytes::{BufMut, Bytes, BytesMut};

/// A smaller piece is copied to the previous one, if that was small, too.
const SMALL_BYTES: usize = 4 * 1024;

/// Size of the first buffer for small pieces; each further buffer has twice the size, up to the maximum.
const FIRST_BUFFER_BYTES: usize = 1024;
const BUFFER_BYTES_MAX: usize = 16 * 1024;

/// A sequence of bytes.
pub(super) struct Pieces {
    start: u64,
    end: u64,
    /// The pieces with their positions.
    queue: VecDeque<(u64, Bytes)>,
    /// The last small pieces, joined.
    open: BytesMut,
    buffer_bytes: usize,
}

impl Pieces {
    /// Creates an empty sequence at this position.
    pub fn new(at: u64) -> Self {
        let (queue, open) = (VecDeque::new(), BytesMut::new());
        Pieces { start: at, end: at, queue, open, buffer_bytes: FIRST_BUFFER_BYTES }
    }

    /// Position of the first byte.
    pub fn start(&self) -> u64 {
        self.start
    }

    /// Position after the last byte.
    pub fn end(&self) -> u64 {
        self.end
    }

    pub fn len(&self) -> u64 {
        self.end - self.start
    }

    pub fn is_empty(&self) -> bool {
        self.start == self.end
    }

    pub fn contains(&self, at: u64) -> bool {
        (self.start..self.end).contains(&at)
    }

    /// Appends a piece.
    pub fn push(&mut self, piece: Bytes) {
        let at = self.end;
        self.end += piece.len() as u64;
        if piece.len() < SMALL_BYTES && self.ends_small() {
            if self.open.capacity() - self.open.len() < piece.len() {
                self.close();
                self.open = BytesMut::with_capacity(self.buffer_bytes.max(piece.len()));
                self.buffer_bytes = (2 * self.buffer_bytes).min(BUFFER_BYTES_MAX);
            }
            self.open.put_slice(&piece);
        } else {
            self.close();
            self.queue.push_back((at, piece));
        }
    }

    fn ends_small(&self) -> bool {
        !self.open.is_empty() || self.queue.back().is_some_and(|(_, last)| last.len() < SMALL_BYTES)
    }

    /// Moves the open buffer's bytes to the other pieces. Its free capacity remains for further small pieces.
    fn close(&mut self) {
        if let Some((at, bytes)) = self.split_open() {
            self.queue.push_back((at, bytes));
        }
    }

    fn split_open(&mut self) -> Option<(u64, Bytes)> {
        let bytes = self.open.len() as u64;
        // `end` already includes a piece that is being pushed, so the position comes from the queue.
        let at = self.queue.back().map_or(self.start, |(at, last)| at + last.len() as u64);
        (bytes > 0).then(|| (at, self.open.split().freeze()))
    }

    /// Returns some bytes from this position on, at most `max`, without removing them. Empty if they are not here.
    pub fn copy(&mut self, at: u64, max: usize) -> Bytes {
        if self.queue.back().is_none_or(|(last_at, last)| *last_at + last.len() as u64 <= at) {
            self.close();
        }
        let after = self.queue.partition_point(|(piece_at, _)| *piece_at <= at);
        let Some((piece_at, piece)) = after.checked_sub(1).and_then(|index| self.queue.get(index)) else {
            return Bytes::new();
        };
        let from = usize::try_from(at - piece_at).unwrap_or(usize::MAX).min(piece.len());
        piece.slice(from..piece.len().min(from.saturating_add(max)))
    }

    /// Takes some bytes off the front, at most `max`. Empty if there are none.
    pub fn take(&mut self, max: usize) -> Bytes {
        if self.queue.is_empty() {
            self.close();
        }
        let Some((at, piece)) = self.queue.front_mut() else { return Bytes::new() };
        let taken = if piece.len() <= max {
            self.queue.pop_front().map(|(_, piece)| piece).unwrap_or_default()
        } else {
            *at += max as u64;
            piece.split_to(max)
        };
        self.start += taken.len() as u64;
        taken
    }

    /// Takes this many bytes off the front, or all.
    pub fn take_front(&mut self, bytes: u64) -> Vec<Bytes> {
        let until = self.end.min(self.start.saturating_add(bytes));
        let mut taken = Vec::new();
        while self.start < until {
            taken.push(self.take(usize::try_from(until - self.start).unwrap_or(usize::MAX)));
        }
        taken
    }

    /// Takes this many bytes off the front, or all, as a sequence of their own.
    pub fn split_front(&mut self, bytes: u64) -> Pieces {
        let taken = self.take_front(bytes);
        let mut front = Pieces::new(self.start);
        front.put_back(taken);
        front
    }

    /// Copies the bytes into one new piece, so that larger buffers are not kept in memory.
    pub fn compact(&mut self) {
        if self.start < self.end {
            let mut whole = BytesMut::with_capacity(usize::try_from(self.len()).unwrap_or_default());
            for piece in self.take_front(u64::MAX) {
                whole.extend_from_slice(&piece);
            }
            self.put_back(vec![whole.freeze()]);
        }
    }

    /// Puts pieces back at the front.
    pub fn put_back(&mut self, pieces: Vec<Bytes>) {
        for piece in pieces.into_iter().rev() {
            self.start -= piece.len() as u64;
            self.queue.push_front((self.start, piece));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(pieces: &mut Pieces) -> Vec<u8> {
        pieces.take_front(u64::MAX).concat()
    }

    #[test]
    fn a_piece_that_stands_alone_and_one_that_is_large_are_not_copied() {
        let (small, large) = (Bytes::from(vec![1; 10]), Bytes::from(vec![2; SMALL_BYTES]));
        let mut pieces = Pieces::new(0);
        pieces.push(small.clone());
        pieces.push(large.clone());
        pieces.push(small.clone());
        let taken: Vec<_> = [(); 3].map(|()| pieces.take(usize::MAX).as_ptr()).into();
        assert_eq!(taken, [small.as_ptr(), large.as_ptr(), small.as_ptr()]);
    }

    #[test]
    fn a_trickle_of_small_pieces_is_copied_together() {
        let mut pieces = Pieces::new(0);
        let sent: Vec<u8> = (0..100_000_u32).map(|n| n as u8).collect();
        for piece in sent.chunks(100) {
            pieces.push(Bytes::copy_from_slice(piece));
        }
        assert_eq!((pieces.start(), pieces.end()), (0, 100_000));
        assert!(pieces.queue.len() < 12, "{} pieces", pieces.queue.len());
        assert!(pieces.open.capacity() <= BUFFER_BYTES_MAX);
        assert_eq!(all(&mut pieces), sent);
    }

    #[test]
    fn the_room_of_a_buffer_that_was_emptied_is_used_again() {
        let mut pieces = Pieces::new(0);
        pieces.push(Bytes::from_static(b"alone"));
        for _ in 0..1000 {
            pieces.push(Bytes::from_static(b"together"));
            pieces.take(usize::MAX);
        }
        assert!(pieces.buffer_bytes <= 4 * FIRST_BUFFER_BYTES, "{} bytes", pieces.buffer_bytes);
    }

    #[test]
    fn copies_are_found_by_position_and_leave_everything_in_place() {
        let mut pieces = Pieces::new(10);
        for piece in ["ab", "cd", "e"] {
            pieces.push(Bytes::from(piece));
        }
        let copies = [10, 11, 12, 14].map(|at| pieces.copy(at, 2));
        assert_eq!(copies, ["ab", "b", "cd", "e"].map(Bytes::from));
        assert_eq!(pieces.copy(15, 2), "");
        pieces.push(Bytes::from("f"));
        assert_eq!(pieces.copy(15, 2), "f");
        assert_eq!(all(&mut pieces), b"abcdef");
    }

    #[test]
    fn what_was_taken_can_be_put_back() {
        let mut pieces = Pieces::new(0);
        for piece in ["ab", "cd", "ef"] {
            pieces.push(Bytes::from(piece));
        }
        let taken = pieces.take_front(3);
        assert_eq!((taken.concat(), pieces.start()), (b"abc".to_vec(), 3));
        pieces.put_back(taken);
        let mut front = pieces.split_front(5);
        assert_eq!((front.start(), front.end(), pieces.start(), pieces.end()), (0, 5, 5, 6));
        assert_eq!((all(&mut front), all(&mut pieces)), (b"abcde".to_vec(), b"f".to_vec()));
    }
}
