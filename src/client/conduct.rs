//! Limits the behaviour of HTTP/2 clients: frames that cost the gateway work and that a regular client seldom sends.
//!
//! [`Conduct`] counts frames by kind and decides when the connection ends. It knows no socket and stores no payload. A
//! `Bucket` limits each kind: a long-term rate, and a burst of ten seconds' worth. Clients send some kinds, such as
//! credit and pings, in response to received frames; for these kinds, frames sent to the client refill the bucket, too.

use std::time::{Duration, Instant};

use h2::Reason;

use crate::client::frames::{ACK, END_HEADERS, END_STREAM, Head, PADDED, PRIORITY, Passed, kind};
use crate::config::listener as config;
use crate::config::units::Rate;
use crate::error::{Refusal, refusal};

/// A bucket holds the frames that its rate permits in this time.
const BURST: Duration = Duration::from_secs(10);
/// A stream that is reset within this time counts as reset early. One that is reset within three times this time may
/// count so, too.
const EARLY: Duration = Duration::from_secs(1);
/// Minimum number of opened streams before the share of early resets is checked.
const STREAMS_MIN: u32 = 200;
/// The share covers about this many recent streams: older ones count half.
const STREAMS_MAX: u32 = 1_000;
/// A stream is reset once. This many more resets are tolerated, since both ends can reset a stream at the same time.
const STRAY_RESETS: u64 = 100;
/// Bytes of response bodies that pay for one WINDOW_UPDATE.
const BYTES_OF_CREDIT: u32 = 32;
/// Priority frames that each stream pays for: clients send one at the start and often one update.
const PRIORITIES_OF_STREAM: f64 = 2.0;

/// The reason for which an HTTP/2 connection is ended.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Offence {
    /// The reason in metrics and in the log.
    pub refusal: &'static Refusal,
    /// The error code for the client (RFC 9113 §7).
    pub code: Reason,
}

impl Offence {
    /// The offence of a client that exceeds a limit.
    pub const fn excess(refusal: &'static Refusal) -> Offence {
        Offence { refusal, code: Reason::ENHANCE_YOUR_CALM }
    }

    /// The offence of a client that violates the protocol.
    pub const fn of_protocol(code: Reason) -> Offence {
        Offence { refusal: &refusal::HEADER_H2_PROTOCOL, code }
    }
}

/// The limits for a client, from the configuration.
#[derive(Clone, Debug)]
pub struct Rules {
    resets: Allowance,
    /// From 0 to 1; 1 disables the check.
    reset_share: f64,
    pings: Allowance,
    settings: Allowance,
    window_updates: Allowance,
    priorities: Allowance,
    unknown: Allowance,
    continuations: u64,
    empty_data: u64,
}

impl Rules {
    /// Builds the limits of a listener.
    pub fn build(written: &config::Http2) -> Rules {
        Rules {
            resets: Allowance::new(written.resets),
            reset_share: written.reset_share.ratio(),
            pings: Allowance::new(written.pings),
            settings: Allowance::new(written.settings),
            window_updates: Allowance::new(written.window_updates),
            priorities: Allowance::new(written.priorities),
            unknown: Allowance::new(written.unknown_frames),
            continuations: written.continuations.0,
            empty_data: written.empty_data.0,
        }
    }

    /// Maximum number of resets in a burst.
    pub fn resets_at_once(&self) -> usize {
        self.resets.most as usize
    }
}

/// The limits of a bucket.
#[derive(Clone, Copy, Debug)]
struct Allowance {
    /// Maximum burst.
    most: f64,
    /// Rate per second.
    rate: f64,
}

impl Allowance {
    fn new(rate: Rate) -> Allowance {
        let rate = rate.events as f64 / rate.per.as_secs_f64();
        Allowance { most: (rate * BURST.as_secs_f64()).max(1.0), rate }
    }
}

/// The state of an allowance.
#[derive(Clone, Copy, Debug, Default)]
struct Bucket {
    /// Number of units taken that have not been refilled.
    spent: f64,
    /// The time of the last update; `None` before the first.
    at: Option<Instant>,
}

impl Bucket {
    /// Takes one unit. `false`: the bucket is empty.
    fn take(&mut self, allowance: Allowance, now: Instant) -> bool {
        let passed = self.at.replace(now).map_or(0.0, |at| now.saturating_duration_since(at).as_secs_f64());
        self.spent = (self.spent - passed * allowance.rate).max(0.0) + 1.0;
        self.spent <= allowance.most
    }

    /// Refills the bucket, up to its allowance at most.
    fn pay(&mut self, amount: f64) {
        self.spent = (self.spent - amount).max(0.0);
    }
}

/// Counts streams and early resets. An approximation with little state: it records the highest stream once per `EARLY`.
#[derive(Debug, Default)]
struct Streams {
    /// Number of streams opened in total.
    ever: u64,
    /// Number of resets in total, of any stream.
    resets: u64,
    /// Numbers of recent streams: opened, and reset early.
    opened: u32,
    reset_early: u32,
    /// The highest stream that the client has opened.
    last: u32,
    /// The highest stream at a time at least `EARLY` ago, if known.
    older: Option<u32>,
    /// A later time, and the highest stream at that time.
    newer: Option<(Instant, u32)>,
}

impl Streams {
    fn open(&mut self, stream: u32, now: Instant) {
        self.tick(now);
        self.last = stream;
        if self.opened >= STREAMS_MAX {
            self.opened /= 2;
            self.reset_early /= 2;
        }
        self.opened += 1;
        self.ever += 1;
    }

    /// Counts a reset. Returns whether it was early.
    fn reset(&mut self, stream: u32, now: Instant) -> bool {
        self.tick(now);
        self.resets += 1;
        let early = self.older.is_none_or(|older| stream > older);
        self.reset_early += u32::from(early);
        early
    }

    /// Whether resets do not exceed streams, and early resets do not exceed this share.
    fn are_credible(&self, share: f64) -> bool {
        let seldom = self.opened < STREAMS_MIN || f64::from(self.reset_early) <= share * f64::from(self.opened);
        seldom && self.resets <= self.ever + STRAY_RESETS
    }

    fn tick(&mut self, now: Instant) {
        if let Some((at, last)) = self.newer {
            let passed = now.saturating_duration_since(at);
            if passed < EARLY {
                return;
            }
            // After a pause, all earlier streams are old.
            self.older = Some(if passed < 2 * EARLY { last } else { self.last });
        }
        self.newer = Some((now, self.last));
    }
}

/// The behaviour of a client on its connection.
#[derive(Debug, Default)]
pub struct Conduct {
    /// The client's SETTINGS frame, the first of all, was received.
    introduced: bool,
    /// Number of CONTINUATION frames in the current header block.
    continuations: u64,
    empty_data: u64,
    streams: Streams,
    resets: Bucket,
    pings: Bucket,
    settings: Bucket,
    window_updates: Bucket,
    priorities: Bucket,
    unknown: Bucket,
}

impl Conduct {
    /// Counts a received frame.
    ///
    /// # Errors
    ///
    /// The offence for which the connection must end.
    pub fn received(&mut self, passed: Passed, rules: &Rules, now: Instant) -> Result<(), Offence> {
        let head = match passed {
            Passed::Head(head) => head,
            Passed::Reset(..) | Passed::Goodbye(_) => return Ok(()),
        };
        self.check(&head)?;
        let within = match head.kind {
            kind::DATA => {
                self.empty_data += u64::from(head.length == 0 && !head.has(END_STREAM));
                (self.empty_data <= rules.empty_data, &refusal::HEADER_H2_EMPTY_DATA)
            }
            kind::HEADERS => {
                if head.stream > self.streams.last {
                    self.streams.open(head.stream, now);
                    self.priorities.pay(PRIORITIES_OF_STREAM);
                }
                self.continuations = 0;
                return Ok(());
            }
            kind::CONTINUATION => {
                // The last one ends the block and does not count.
                self.continuations += u64::from(!head.has(END_HEADERS));
                (self.continuations <= rules.continuations, &refusal::HEADER_H2_CONTINUATION)
            }
            kind::RST_STREAM => {
                // Late resets are limited by the number of concurrent streams.
                let early = self.streams.reset(head.stream, now);
                let within = !early || self.resets.take(rules.resets, now);
                (within && self.streams.are_credible(rules.reset_share), &refusal::HEADER_H2_RESETS)
            }
            kind::PING if head.has(ACK) => return self.ignored(rules, now),
            kind::PING => (self.pings.take(rules.pings, now), &refusal::HEADER_H2_PINGS),
            kind::SETTINGS => (self.settings.take(rules.settings, now), &refusal::HEADER_H2_SETTINGS),
            kind::WINDOW_UPDATE => {
                (self.window_updates.take(rules.window_updates, now), &refusal::HEADER_H2_WINDOW_UPDATES)
            }
            kind::PRIORITY | kind::PRIORITY_UPDATE => {
                (self.priorities.take(rules.priorities, now), &refusal::HEADER_H2_PRIORITY)
            }
            // The library ends the connection itself.
            kind::PUSH_PROMISE => return Ok(()),
            _ => return self.ignored(rules, now),
        };
        match within {
            (true, _) => Ok(()),
            (false, refusal) => Err(Offence::excess(refusal)),
        }
    }

    /// Counts a frame that the gateway sent.
    pub fn sent(&mut self, head: &Head) {
        match head.kind {
            kind::DATA => {
                self.window_updates.pay(f64::from(head.length) / f64::from(BYTES_OF_CREDIT));
                // Clients send one ping per round of data to measure the bandwidth-delay product.
                self.pings.pay(1.0);
            }
            kind::HEADERS => self.pings.pay(1.0),
            _ => {}
        }
    }

    /// Counts a frame that the gateway ignores.
    fn ignored(&mut self, rules: &Rules, now: Instant) -> Result<(), Offence> {
        let within = self.unknown.take(rules.unknown, now);
        if within { Ok(()) } else { Err(Offence::excess(&refusal::HEADER_H2_UNKNOWN)) }
    }

    /// Checks what the library tolerates, or reports with another code than RFC 9113 requires.
    fn check(&mut self, head: &Head) -> Result<(), Offence> {
        let is_settings = head.kind == kind::SETTINGS && !head.has(ACK);
        if !std::mem::replace(&mut self.introduced, true) && !is_settings {
            // §3.4
            return Err(Offence::of_protocol(Reason::PROTOCOL_ERROR));
        }
        let fits = match head.kind {
            // §6.3 requires a stream error; §5.4 permits a connection error instead.
            kind::PRIORITY => head.length == 5,
            kind::RST_STREAM | kind::WINDOW_UPDATE => head.length == 4,
            kind::SETTINGS if head.has(ACK) => head.length == 0,
            kind::SETTINGS => head.length.is_multiple_of(6),
            kind::PING => head.length == 8,
            kind::GOAWAY => head.length >= 8,
            kind::DATA => head.length >= u32::from(head.has(PADDED)),
            kind::HEADERS => head.length >= u32::from(head.has(PADDED)) + if head.has(PRIORITY) { 5 } else { 0 },
            _ => true,
        };
        if fits { Ok(()) } else { Err(Offence::of_protocol(Reason::FRAME_SIZE_ERROR)) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rules() -> Rules {
        Rules::build(&config::Http2::default())
    }

    fn head(kind: u8, flags: u8, stream: u32, length: u32) -> Passed {
        Passed::Head(Head { length, kind, flags, stream })
    }

    /// A client whose settings were received.
    fn introduced(now: Instant) -> Conduct {
        let mut conduct = Conduct::default();
        conduct.received(head(kind::SETTINGS, 0, 0, 6), &rules(), now).expect("the first of all");
        conduct
    }

    /// Repeats an action at this interval, at most 5,000 times. Returns how often it was permitted, and the refusal.
    fn times(
        every: Duration,
        mut act: impl FnMut(&mut Conduct, u32, Instant) -> Result<(), Offence>,
    ) -> (u32, &'static str) {
        let mut now = Instant::now();
        let mut conduct = introduced(now);
        for time in 0..5_000 {
            if let Err(offence) = act(&mut conduct, time, now) {
                assert_eq!(offence.code, Reason::ENHANCE_YOUR_CALM);
                return (time, offence.refusal.reason);
            }
            now += every;
        }
        (5_000, "")
    }

    const AT_ONCE: Duration = Duration::ZERO;

    #[test]
    fn each_kind_of_frame_has_a_limit_and_a_reason() {
        let frame = |kind, flags, stream, length| {
            times(AT_ONCE, |conduct, _, now| conduct.received(head(kind, flags, stream, length), &rules(), now))
        };
        let resets = |reset_share| {
            let rules = Rules { reset_share, ..rules() };
            times(AT_ONCE, |conduct, time, now| {
                conduct.received(head(kind::HEADERS, END_HEADERS, 2 * time + 1, 10), &rules, now)?;
                conduct.received(head(kind::RST_STREAM, 0, 2 * time + 1, 4), &rules, now)
            })
        };
        assert_eq!([resets(0.75), resets(1.0)], [(199, "header.h2_resets"), (200, "header.h2_resets")]);
        assert_eq!(frame(kind::PING, 0, 0, 8), (100, "header.h2_pings"));
        assert_eq!(frame(kind::SETTINGS, 0, 0, 0), (49, "header.h2_settings"));
        assert_eq!(frame(kind::WINDOW_UPDATE, 0, 1, 4), (1_000, "header.h2_window_updates"));
        assert_eq!(frame(kind::PRIORITY, 0, 1, 5), (400, "header.h2_priority"));
        assert_eq!(frame(kind::PRIORITY_UPDATE, 0, 0, 5), (400, "header.h2_priority"));
        assert_eq!(frame(kind::CONTINUATION, 0, 1, 1), (5, "header.h2_continuation"));
        assert_eq!(frame(kind::DATA, 0, 1, 0), (100, "header.h2_empty_data"));
        for (kind, flags, length) in [(0xbb, 0, 9), (kind::GOAWAY, 0, 8), (kind::PING, ACK, 8)] {
            assert_eq!(frame(kind, flags, 0, length), (100, "header.h2_unknown_frames"), "{kind:#x}");
        }
    }

    #[test]
    fn what_comes_at_the_rate_comes_for_ever() {
        let paced = |kind, length, a_second| {
            let every = Duration::from_secs(1) / a_second;
            times(every, |conduct, _, now| conduct.received(head(kind, 0, 1, length), &rules(), now)).0
        };
        let resets = |a_second| {
            let rules = Rules { reset_share: 1.0, ..rules() };
            times(Duration::from_secs(1) / a_second, |conduct, time, now| {
                conduct.received(head(kind::HEADERS, END_HEADERS, 2 * time + 1, 10), &rules, now)?;
                conduct.received(head(kind::RST_STREAM, 0, 2 * time + 1, 4), &rules, now)
            })
            .0
        };
        assert_eq!(resets(20), 5_000);
        assert!(resets(30) < 1_000);
        assert_eq!(paced(kind::PING, 8, 10), 5_000);
        assert!(paced(kind::PING, 8, 15) < 500);
    }

    #[test]
    fn resets_that_keep_to_the_rate_are_noticed_by_their_share() {
        let abuse = times(Duration::from_millis(60), |conduct, time, now| {
            conduct.received(head(kind::HEADERS, END_HEADERS, 2 * time + 1, 10), &rules(), now)?;
            conduct.received(head(kind::RST_STREAM, 0, 2 * time + 1, 4), &rules(), now)
        });
        assert_eq!(abuse, (199, "header.h2_resets"));
        let half = times(Duration::from_millis(60), |conduct, time, now| {
            conduct.received(head(kind::HEADERS, END_HEADERS, 2 * time + 1, 10), &rules(), now)?;
            if time % 2 == 0 {
                conduct.received(head(kind::RST_STREAM, 0, 2 * time + 1, 4), &rules(), now)?;
            }
            Ok(())
        });
        assert_eq!(half.0, 5_000, "whoever wants half of its answers may go on");
    }

    #[test]
    fn streams_that_are_reset_late_are_not_held_against_a_client() {
        // Each stream is reset after the 300 streams that follow it, three seconds later.
        let late = times(Duration::from_millis(10), |conduct, time, now| {
            conduct.received(head(kind::HEADERS, END_HEADERS, 2 * time + 1, 10), &rules(), now)?;
            match time.checked_sub(300) {
                Some(earlier) => conduct.received(head(kind::RST_STREAM, 0, 2 * earlier + 1, 4), &rules(), now),
                None => Ok(()),
            }
        });
        assert_eq!(late.0, 5_000);
    }

    #[test]
    fn a_stream_is_reset_once() {
        let begin = Instant::now();
        let mut conduct = introduced(begin);
        conduct.received(head(kind::HEADERS, END_HEADERS, 1, 10), &rules(), begin).expect("a stream");
        let later = begin + Duration::from_secs(60);
        let mut reset = || conduct.received(head(kind::RST_STREAM, 0, 1, 4), &rules(), later);
        assert_eq!((0..200).take_while(|_| reset().is_ok()).count(), 101);
    }

    #[test]
    fn a_pause_makes_older_streams_old() {
        let begin = Instant::now();
        let mut conduct = introduced(begin);
        for stream in 0..300 {
            conduct.received(head(kind::HEADERS, END_HEADERS, 2 * stream + 1, 10), &rules(), begin).expect("a stream");
        }
        let later = begin + Duration::from_secs(60);
        for stream in 0..190 {
            conduct.received(head(kind::RST_STREAM, 0, 2 * stream + 1, 4), &rules(), later).expect("a late reset");
        }
        assert_eq!(conduct.streams.reset_early, 0);
    }

    #[test]
    fn what_a_client_is_sent_pays_for_credit_and_pings() {
        let data = |length| Head { length, kind: kind::DATA, flags: 0, stream: 1 };
        let credit = |length: u32| {
            times(AT_ONCE, |conduct, _, now| {
                conduct.sent(&data(length));
                conduct.received(head(kind::WINDOW_UPDATE, 0, 1, 4), &rules(), now)?;
                conduct.received(head(kind::WINDOW_UPDATE, 0, 0, 4), &rules(), now)
            })
            .0
        };
        assert_eq!(credit(64), 5_000, "two of them for each piece of an answer");
        assert!(credit(1) < 600, "two of them for each byte");
        let pings = times(AT_ONCE, |conduct, _, now| {
            conduct.sent(&data(1));
            conduct.received(head(kind::PING, 0, 0, 8), &rules(), now)
        });
        assert_eq!(pings.0, 5_000);
        let saved_up = times(AT_ONCE, |conduct, time, now| {
            if time == 0 {
                (0..500).for_each(|_| conduct.sent(&data(16_384)));
            }
            conduct.received(head(kind::PING, 0, 0, 8), &rules(), now)
        });
        assert_eq!(saved_up.0, 100, "nothing is saved up");
    }

    #[test]
    fn frames_of_a_wrong_size_and_a_wrong_beginning_break_the_protocol() {
        let now = Instant::now();
        for (kind, flags, length) in [
            (kind::PRIORITY, 0, 4),
            (kind::RST_STREAM, 0, 5),
            (kind::WINDOW_UPDATE, 0, 3),
            (kind::SETTINGS, 0, 7),
            (kind::SETTINGS, ACK, 6),
            (kind::PING, 0, 7),
            (kind::GOAWAY, 0, 7),
            (kind::DATA, PADDED, 0),
            (kind::HEADERS, PADDED | PRIORITY, 5),
        ] {
            let offence = introduced(now).received(head(kind, flags, 1, length), &rules(), now);
            assert_eq!(offence, Err(Offence::of_protocol(Reason::FRAME_SIZE_ERROR)), "{kind:#x} of {length}");
        }
        for first in [head(kind::PING, 0, 0, 8), head(kind::SETTINGS, ACK, 0, 0)] {
            let offence = Conduct::default().received(first, &rules(), now);
            assert_eq!(offence, Err(Offence::of_protocol(Reason::PROTOCOL_ERROR)));
        }
    }
}
