//! How a client of HTTP/2 behaves: what it does often that costs the gateway work and a client that wants answers need
//! not do.
//!
//! [`Conduct`] counts frames by their kind and says when the connection is to end. It knows no socket and keeps no
//! payload. A `Bucket` bounds each kind: a rate in the long run, and ten seconds' worth of it at once. Where honest
//! clients send a kind of frame because of what they are sent, as credit and pings are, what was sent fills the bucket,
//! too.

use std::time::{Duration, Instant};

use h2::Reason;

use crate::client::frames::{ACK, END_HEADERS, END_STREAM, Head, PADDED, PRIORITY, Passed, kind};
use crate::config::listener as config;
use crate::config::units::Rate;
use crate::error::{Refusal, refusal};

/// A bucket holds what its rate lets through in this time.
const BURST: Duration = Duration::from_secs(10);
/// A stream that is reset within this time is reset early; one that is reset within three times as long may count so.
const EARLY: Duration = Duration::from_secs(1);
/// The share of streams that are reset early says something of a client once it has opened so many.
const STREAMS_MIN: u32 = 200;
/// The share is that of about so many streams: beyond them, older ones count half.
const STREAMS_MAX: u32 = 1_000;
/// A stream is reset once. So many more may be, as it can be reset by both ends at the same time.
const STRAY_RESETS: u64 = 100;
/// So many bytes of bodies that the client gets pay for one WINDOW_UPDATE.
const BYTES_OF_CREDIT: u32 = 32;
/// So many frames of priority may come with a stream: clients say it when they begin and once more when they know
/// better.
const PRIORITIES_OF_STREAM: f64 = 2.0;

/// Why a connection of HTTP/2 ends.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Offence {
    /// The reason in metrics and in the log.
    pub refusal: &'static Refusal,
    /// What the client is told (RFC 9113 §7).
    pub code: Reason,
}

impl Offence {
    /// It asks for too much.
    pub const fn excess(refusal: &'static Refusal) -> Offence {
        Offence { refusal, code: Reason::ENHANCE_YOUR_CALM }
    }

    /// It breaks the protocol.
    pub const fn of_protocol(code: Reason) -> Offence {
        Offence { refusal: &refusal::HEADER_H2_PROTOCOL, code }
    }
}

/// What a client may do, as the configuration says.
#[derive(Clone, Debug)]
pub struct Rules {
    resets: Allowance,
    /// From 0 to 1; at 1 it does not matter.
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
    /// Those of a listener.
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

    /// So many resets may come at once.
    pub fn resets_at_once(&self) -> usize {
        self.resets.most as usize
    }
}

/// What a bucket lets through.
#[derive(Clone, Copy, Debug)]
struct Allowance {
    /// At once.
    most: f64,
    /// In a second.
    rate: f64,
}

impl Allowance {
    fn new(rate: Rate) -> Allowance {
        let rate = rate.events as f64 / rate.per.as_secs_f64();
        Allowance { most: (rate * BURST.as_secs_f64()).max(1.0), rate }
    }
}

/// What is left of an allowance.
#[derive(Clone, Copy, Debug, Default)]
struct Bucket {
    /// What was taken and has not come back.
    spent: f64,
    /// When it was last looked at; `None`: never.
    at: Option<Instant>,
}

impl Bucket {
    /// Takes one. `false`: there is none.
    fn take(&mut self, allowance: Allowance, now: Instant) -> bool {
        let passed = self.at.replace(now).map_or(0.0, |at| now.saturating_duration_since(at).as_secs_f64());
        self.spent = (self.spent - passed * allowance.rate).max(0.0) + 1.0;
        self.spent <= allowance.most
    }

    /// Pays in. A client cannot save up more than its allowance.
    fn pay(&mut self, amount: f64) {
        self.spent = (self.spent - amount).max(0.0);
    }
}

/// Streams, and how many of them were reset early. An approximation in a few words: once in `EARLY` it is noted which
/// stream was the last.
#[derive(Debug, Default)]
struct Streams {
    /// How many have been opened.
    ever: u64,
    /// How many resets there were, of whatever.
    resets: u64,
    /// How many of late were opened, and reset early.
    opened: u32,
    reset_early: u32,
    /// The highest stream that the client has opened.
    last: u32,
    /// The highest stream at a time that is at least `EARLY` ago, once there is one.
    older: Option<u32>,
    /// The highest stream at a later time, and that time.
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

    /// Whether the stream is young.
    fn reset(&mut self, stream: u32, now: Instant) -> bool {
        self.tick(now);
        self.resets += 1;
        let early = self.older.is_none_or(|older| stream > older);
        self.reset_early += u32::from(early);
        early
    }

    /// Whether there are no more resets than streams, and no more early ones than this share.
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
            // After a pause, all that there was is older.
            self.older = Some(if passed < 2 * EARLY { last } else { self.last });
        }
        self.newer = Some((now, self.last));
    }
}

/// What a client has done on its connection.
#[derive(Debug, Default)]
pub struct Conduct {
    /// Its settings have come, which are the first frame of all.
    introduced: bool,
    /// CONTINUATION frames of the header block that is under way.
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
    /// The client has sent this.
    ///
    /// # Errors
    ///
    /// Its connection is to end.
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
                // The last one ends the block, and is none too many.
                self.continuations += u64::from(!head.has(END_HEADERS));
                (self.continuations <= rules.continuations, &refusal::HEADER_H2_CONTINUATION)
            }
            kind::RST_STREAM => {
                // What is given up late has been one of those that may be open at once, which bounds it.
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
            // The library ends the connection.
            kind::PUSH_PROMISE => return Ok(()),
            _ => return self.ignored(rules, now),
        };
        match within {
            (true, _) => Ok(()),
            (false, refusal) => Err(Offence::excess(refusal)),
        }
    }

    /// The gateway has sent this.
    pub fn sent(&mut self, head: &Head) {
        match head.kind {
            kind::DATA => {
                self.window_updates.pay(f64::from(head.length) / f64::from(BYTES_OF_CREDIT));
                // Clients measure with pings how much is on its way, once for each round of data.
                self.pings.pay(1.0);
            }
            kind::HEADERS => self.pings.pay(1.0),
            _ => {}
        }
    }

    /// A frame that says nothing to the gateway.
    fn ignored(&mut self, rules: &Rules, now: Instant) -> Result<(), Offence> {
        let within = self.unknown.take(rules.unknown, now);
        if within { Ok(()) } else { Err(Offence::excess(&refusal::HEADER_H2_UNKNOWN)) }
    }

    /// What the library is lenient about, or answers with another code than RFC 9113 asks for.
    fn check(&mut self, head: &Head) -> Result<(), Offence> {
        let is_settings = head.kind == kind::SETTINGS && !head.has(ACK);
        if !std::mem::replace(&mut self.introduced, true) && !is_settings {
            // §3.4
            return Err(Offence::of_protocol(Reason::PROTOCOL_ERROR));
        }
        let fits = match head.kind {
            // §6.3 asks for an error of the stream, and allows one of the connection (§5.4).
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

    /// A client that has said its settings.
    fn introduced(now: Instant) -> Conduct {
        let mut conduct = Conduct::default();
        conduct.received(head(kind::SETTINGS, 0, 0, 6), &rules(), now).expect("the first of all");
        conduct
    }

    /// How many times a client may do this, each so long after the one before, of at most 5,000; and why no more.
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
        // Each stream is given up when the 300 that follow it have come, three seconds later.
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
