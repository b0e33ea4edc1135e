//! Observes the HTTP/2 library's reads and writes: a stream of bytes that counts the frames that pass.
//!
//! The library refuses some requests without reporting it. A refusal is visible only in the bytes written: a
//! RST_STREAM, or a complete response, on a stream that was never handed out. The guard also detects offending clients
//! that the library would tolerate, before the library reads the frames. It then reads no further bytes, and the owner
//! of the connection ends it.

use std::collections::VecDeque;
use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use h2::Reason;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::client::conduct::{Conduct, Offence, Rules};
use crate::client::frames::{END_STREAM, Frames, Passed, kind};
use crate::error::{Refusal, refusal};
use crate::party::wait::Timer;

/// Maximum number of opened streams remembered that were not handed out. The library refuses a stream at once, so their
/// number is limited by one read, unless the client accepts no bytes.
const UNCLAIMED_MAX: usize = 1_024;

/// The observations about a connection, shared by the stream of bytes and the owner of the connection.
#[derive(Clone)]
pub struct Watch(Arc<Mutex<Observed>>);

struct Observed {
    rules: Rules,
    conduct: Conduct,
    received: Frames,
    sent: Frames,
    offence: Option<Offence>,
    /// Streams that the client opened and the library has not handed out, in order.
    unclaimed: VecDeque<u32>,
    last_opened: u32,
    /// The refusals that the library wrote since the last query, with their streams.
    verdicts: VecDeque<(u32, &'static Refusal)>,
    /// The library's limit that its GOAWAY reports.
    excess: Option<&'static Refusal>,
}

impl Watch {
    /// Creates a watch without observations.
    pub fn new(rules: &Rules) -> Watch {
        Watch(Arc::new(Mutex::new(Observed {
            rules: rules.clone(),
            conduct: Conduct::default(),
            received: Frames::of_client(),
            sent: Frames::of_server(),
            offence: None,
            unclaimed: VecDeque::new(),
            last_opened: 0,
            verdicts: VecDeque::new(),
            excess: None,
        })))
    }

    /// Reports that the library handed this stream out.
    pub fn claim(&self, stream: u32) {
        let mut seen = self.seen();
        if let Ok(place) = seen.unclaimed.binary_search(&stream) {
            seen.unclaimed.remove(place);
        }
    }

    /// Takes a refusal that the library wrote itself. Call it when the library has no more requests to hand out.
    pub fn refused(&self) -> Option<&'static Refusal> {
        let mut seen = self.seen();
        while let Some((stream, refusal)) = seen.verdicts.pop_front() {
            if let Ok(place) = seen.unclaimed.binary_search(&stream) {
                seen.unclaimed.remove(place);
                return Some(refusal);
            }
        }
        None
    }

    /// The offence for which the connection must end, if any.
    pub fn offence(&self) -> Option<Offence> {
        self.seen().offence
    }

    /// The reason for which the library ended the connection. `None` if this error comes from the client or the
    /// network.
    pub fn verdict(&self, error: &h2::Error) -> Option<&'static Refusal> {
        let by_library = error.is_library() && error.is_go_away();
        by_library.then(|| self.seen().excess.unwrap_or(&refusal::HEADER_H2_PROTOCOL))
    }

    fn seen(&self) -> MutexGuard<'_, Observed> {
        // One task uses the lock, so it never blocks.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Observed {
    fn read(&mut self, bytes: &[u8]) -> Result<(), Offence> {
        let now = Instant::now();
        let Observed { rules, conduct, received, unclaimed, last_opened, .. } = self;
        received.take(bytes, |passed| {
            conduct.received(passed, rules, now)?;
            if let Passed::Head(head) = passed
                && head.kind == kind::HEADERS
                && head.stream > *last_opened
            {
                *last_opened = head.stream;
                if unclaimed.len() == UNCLAIMED_MAX {
                    unclaimed.pop_front();
                }
                unclaimed.push_back(head.stream);
            }
            Ok(())
        })
    }

    fn written(&mut self, bytes: &[u8]) {
        let Observed { conduct, sent, verdicts, unclaimed, excess, .. } = self;
        let mut judge = |stream: u32, refusal| {
            // Only the library itself writes on a stream that was not handed out.
            if unclaimed.binary_search(&stream).is_ok() {
                verdicts.push_back((stream, refusal));
            }
        };
        let _: Result<(), ()> = sent.take(bytes, |passed| {
            match passed {
                Passed::Head(head) => {
                    conduct.sent(&head);
                    if head.kind == kind::HEADERS && head.has(END_STREAM) {
                        judge(head.stream, &refusal::HEADER_TOO_LARGE);
                    }
                }
                Passed::Reset(stream, code) if code == u32::from(Reason::REFUSED_STREAM) => {
                    judge(stream, &refusal::HEADER_H2_STREAMS);
                }
                Passed::Reset(stream, _) => judge(stream, &refusal::HEADER_MALFORMED),
                Passed::Goodbye(end) => *excess = excess_of_library(end),
            }
            Ok(())
        });
    }
}

/// The library's limit that a GOAWAY reports, by the last bytes of its debug data. h2 0.4.20 reports limits only in
/// this text, without a code.
fn excess_of_library(end: [u8; 8]) -> Option<&'static Refusal> {
    Some(match &end {
        // too_many_internal_resets
        b"l_resets" => &refusal::HEADER_H2_PROVOKED,
        // too_many_resets
        b"y_resets" => &refusal::HEADER_H2_RESETS,
        // too_many_continuations
        b"nuations" => &refusal::HEADER_H2_CONTINUATION,
        // header_list_way_too_large
        b"oo_large" => &refusal::HEADER_TOO_LARGE,
        // too_many_data_frames
        b"a_frames" => &refusal::HEADER_H2_EMPTY_DATA,
        _ => return None,
    })
}

/// The bytes of a connection, observed as they pass.
pub struct Guard<I> {
    io: I,
    watch: Watch,
    /// Time limit for a frame or header block that has begun.
    patience: Duration,
    /// Its beginning, and the timer of the limit.
    begun: Option<(Instant, Timer)>,
}

impl<I> Guard<I> {
    /// Observes the bytes of `io`. The client must complete each frame and header block within `patience`.
    pub fn new(io: I, watch: Watch, patience: Duration) -> Self {
        Guard { io, watch, patience, begun: None }
    }
}

impl<I: AsyncRead + Unpin> AsyncRead for Guard<I> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, out: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let Guard { io, watch, patience, begun } = &mut *self;
        let mut seen = watch.seen();
        if seen.offence.is_some() {
            // The owner of the connection checks for the offence when no more bytes are read.
            return Poll::Pending;
        }
        let before = out.filled().len();
        if let Poll::Ready(read) = Pin::new(io).poll_read(cx, out) {
            if let Err(offence) = seen.read(&out.filled()[before..]) {
                seen.offence = Some(offence);
                out.set_filled(before);
                return Poll::Pending;
            }
            if !seen.received.unfinished() {
                *begun = None;
            } else if begun.is_none() {
                *begun = Some((tokio::time::Instant::now().into_std(), Timer::default()));
            }
            return Poll::Ready(read);
        }
        if let Some((since, timer)) = begun
            && timer.poll_limit(cx, *since, *patience).is_ready()
        {
            seen.offence = Some(Offence::excess(&refusal::HEADER_TIMEOUT));
        }
        Poll::Pending
    }
}

impl<I: AsyncWrite + Unpin> AsyncWrite for Guard<I> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.io).poll_write(cx, bytes);
        if let Poll::Ready(Ok(written)) = written {
            self.watch.seen().written(&bytes[..written]);
        }
        written
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}
