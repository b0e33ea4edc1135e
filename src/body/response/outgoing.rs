//! The part of a response that was received and not sent yet, and how far both have come.

use std::collections::VecDeque;

use pingora::protocols::http::HttpTask;

use crate::framing::Body;
use crate::phase::Phase;
use crate::spool::Spool;

/// Size from which a response is bulk and takes turns with others, in bytes: of the announced length, or of the bytes
/// received if none is announced.
const BULK_BYTES: u64 = 32 << 10;

/// The facts about a sent header that the log and the handling of a cut response need.
#[derive(Clone, Copy)]
pub(super) struct Head {
    pub(super) status: u16,
    /// The framing of the body.
    pub(super) body: Body,
    pub(super) length: Option<u64>,
}

/// The response on its way: `ready`, then the spool, then `last`.
#[derive(Default)]
pub(super) struct Outgoing {
    /// Sent before the spool: headers, and body pieces that have just been received.
    pub(super) ready: VecDeque<HttpTask>,
    /// Boxed, since most clients take a response as it comes.
    pub(super) spool: Option<Box<Spool>>,
    /// Sent after the spool: trailers or the end.
    pub(super) last: Option<HttpTask>,
    /// Whether the response was received completely.
    pub(super) ended: bool,
    /// Whether the end was given to the session.
    pub(super) end_written: bool,
    /// Part of the final response was given to the session.
    pub(super) begun: bool,
    pub(super) head: Option<Head>,
    /// Body bytes received from the upstream, and body bytes accepted by the session.
    pub(super) came: u64,
    pub(super) gone: u64,
    /// Bytes held by earlier spools, and those of them that were on disk.
    pub(super) spooled_before: (u64, u64),
    /// Body bytes of the write in progress.
    pub(super) writing: u64,
    /// Size of the next piece, in bytes.
    pub(super) piece: usize,
}

impl Outgoing {
    /// Takes the task that ends the response.
    pub(super) fn end_task(&mut self) -> HttpTask {
        self.last.take().unwrap_or(HttpTask::Done)
    }

    /// Body bytes that were received and that the client has not accepted.
    pub(super) fn left(&self) -> u64 {
        let ready: u64 = self.ready.iter().map(|task| body_len(task) as u64).sum();
        ready + self.writing + self.spool.as_ref().map_or(0, |spool| spool.unread())
    }

    /// The phase of a wait for the client.
    pub(super) fn phase(&self) -> Phase {
        if self.ended { Phase::Write } else { Phase::Receive }
    }

    /// Whether the body would contradict the announced length (RFC 9113 §8.1.1).
    pub(super) fn is_misframed(&self) -> bool {
        let Some(Head { body: Body::Length(length), .. }) = self.head else { return false };
        let sent = self.gone + self.writing;
        sent > length || (self.end_written && sent < length)
    }

    /// Whether the response is bulk. One with a large announced length takes turns from its first piece on. Under load
    /// its receive window stays small until then, and it holds little memory.
    pub(super) fn is_bulk(&self) -> bool {
        let announced = self.head.and_then(|head| head.length).unwrap_or_default();
        self.came > BULK_BYTES || (self.came > 0 && announced > BULK_BYTES)
    }

    /// Body bytes that the announced response still lacks; the maximum if no length is announced.
    pub(super) fn missing(&self) -> u64 {
        let length = self.head.and_then(|head| head.length);
        length.map_or(u64::MAX, |length| length.saturating_sub(self.came))
    }

    /// Bytes in the spool that were not read yet.
    pub(super) fn unread(&self) -> u64 {
        self.spool.as_ref().map_or(0, |spool| spool.unread())
    }

    /// Bytes that were spooled, and those of them that were on disk.
    pub(super) fn spooled(&self) -> (u64, u64) {
        let now = self.spool.as_ref().map_or((0, 0), |spool| (spool.pushed(), spool.spilled()));
        (self.spooled_before.0 + now.0, self.spooled_before.1 + now.1)
    }

    /// Drops what was not sent.
    pub(super) fn clear(&mut self) {
        self.spooled_before = self.spooled();
        self.ready.clear();
        self.spool = None;
        self.last = None;
    }
}

/// Number of body bytes of a task.
pub(super) fn body_len(task: &HttpTask) -> usize {
    match task {
        HttpTask::Body(Some(piece), _) => piece.len(),
        _ => 0,
    }
}
