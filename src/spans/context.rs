//! W3C Trace Context, level 1: the trace that a request belongs to (`traceparent`), and which peers may set it.
//!
//! `tracestate` is forwarded unchanged, but never without a well-formed and trusted `traceparent` (§3.3.1.3 and
//! §4.3 of the recommendation).

use std::fmt;

use http::{HeaderMap, HeaderName, HeaderValue};

use crate::config;
use crate::config::server::Parent as Believed;

/// `traceparent`.
pub const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");
/// `tracestate`.
pub const TRACESTATE: HeaderName = HeaderName::from_static("tracestate");

/// The length of `traceparent` in version 00: `00-<trace>-<span>-<flags>`.
const LENGTH: usize = 55;
/// The sampled flag: the sender records this trace.
const SAMPLED: u8 = 1;

/// A trace id; not zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct TraceId(pub u128);

/// A span id; not zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SpanId(pub u64);

impl TraceId {
    /// A random id.
    pub fn random() -> Self {
        TraceId(rand::random::<u128>().max(1))
    }
}

impl SpanId {
    /// A random id.
    pub fn random() -> Self {
        SpanId(rand::random::<u64>().max(1))
    }
}

impl fmt::Display for TraceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

impl fmt::Display for SpanId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

/// A parsed `traceparent`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TraceParent {
    /// The trace id.
    pub trace: TraceId,
    /// The sender's span.
    pub span: SpanId,
    /// Whether the sender records the trace.
    pub sampled: bool,
}

impl TraceParent {
    /// The `traceparent` of these headers. `None` if it is missing, repeated or malformed.
    pub fn of(headers: &HeaderMap) -> Option<TraceParent> {
        let value = headers.get(TRACEPARENT)?;
        let alone = headers.get_all(TRACEPARENT).iter().nth(1).is_none();
        TraceParent::parse(value.as_bytes()).filter(|_| alone)
    }

    /// Parses the header value. Additional parts of later versions are ignored, as §4.3 requires.
    pub fn parse(value: &[u8]) -> Option<TraceParent> {
        let (version, rest) = (hex(value.get(..2)?)?, value.get(2..LENGTH)?);
        let longer = value.get(LENGTH).is_some_and(|&next| version == 0 || next != b'-');
        if version == 0xff || longer || [rest[0], rest[33], rest[50]] != *b"---" {
            return None;
        }
        let (trace, span, flags) = (hex(&rest[1..33])?, hex(&rest[34..50])?, hex(&rest[51..])?);
        let span = u64::try_from(span).ok()?;
        let sampled = flags as u8 & SAMPLED != 0;
        (trace != 0 && span != 0).then_some(TraceParent { trace: TraceId(trace), span: SpanId(span), sampled })
    }

    /// The header value in version 00.
    pub fn header(&self) -> HeaderValue {
        let text = format!("00-{}-{}-{:02x}", self.trace, self.span, u8::from(self.sampled));
        HeaderValue::try_from(text).expect("hexadecimal digits and dashes may stand in a header")
    }
}

/// Parses at most 32 lower-case hexadecimal digits.
fn hex(digits: &[u8]) -> Option<u128> {
    digits.iter().try_fold(0, |number, &digit| match digit {
        b'0'..=b'9' => Some(number << 4 | u128::from(digit - b'0')),
        b'a'..=b'f' => Some(number << 4 | u128::from(digit - b'a' + 10)),
        _ => None,
    })
}

/// The trace context of an exchange.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Context {
    /// The trace id.
    pub trace: TraceId,
    /// The span of the exchange.
    pub span: SpanId,
    /// The client's span; `None` if the trace starts here.
    pub parent: Option<SpanId>,
    /// Whether it is recorded.
    pub sampled: bool,
}

/// Decides the trace of an exchange, and whether it is recorded.
#[derive(Clone, Copy, Debug)]
pub struct Sampler {
    believed: Believed,
    /// The number of sampled traces per 2^63 that start here.
    share: u64,
}

impl Sampler {
    /// The configured sampler.
    pub fn new(written: &config::server::Tracing) -> Sampler {
        const ALL: f64 = (1u64 << 63) as f64;
        Sampler { believed: written.parent, share: (written.sample.ratio() * ALL) as u64 }
    }

    /// The trace context of a new exchange; `peer_is_trusted`: the peer is a trusted proxy.
    pub fn place(&self, headers: &HeaderMap, peer_is_trusted: bool) -> Context {
        let believed = match self.believed {
            Believed::Always => true,
            Believed::TrustedProxies => peer_is_trusted,
            Believed::Never => false,
        };
        let span = SpanId::random();
        match TraceParent::of(headers).filter(|_| believed) {
            Some(parent) => Context { trace: parent.trace, span, parent: Some(parent.span), sampled: parent.sampled },
            None => {
                let trace = TraceId::random();
                Context { trace, span, parent: None, sampled: self.takes(trace) }
            }
        }
    }

    /// Based on the id, so that other samplers with the same rate select the same traces.
    fn takes(&self, TraceId(trace): TraceId) -> bool {
        (trace as u64 >> 1) < self.share
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::config::units::Percent;

    const GOOD: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

    fn headers(values: &[&str]) -> HeaderMap {
        values.iter().map(|value| (TRACEPARENT, HeaderValue::from_str(value).expect("a value"))).collect()
    }

    fn sampler(sample: f64, parent: Believed) -> Sampler {
        Sampler::new(&config::server::Tracing { sample: Percent(sample), parent, ..Default::default() })
    }

    #[test]
    fn a_traceparent_is_read_and_written_the_same() {
        let parent = TraceParent::parse(GOOD.as_bytes()).expect("a parent");
        assert_eq!(parent.trace.to_string(), "4bf92f3577b34da6a3ce929d0e0e4736");
        assert_eq!(parent.span.to_string(), "00f067aa0ba902b7");
        assert!(parent.sampled);
        assert_eq!(parent.header(), GOOD);
    }

    #[test]
    fn what_a_later_version_adds_is_left_alone() {
        let later = GOOD.replacen("00", "cc", 1);
        for text in [later.clone(), format!("{later}-"), format!("{later}-what-the-future-brings")] {
            let parent = TraceParent::parse(text.as_bytes()).expect("a parent");
            assert_eq!(parent.header(), GOOD, "it is passed on in the version that we know");
        }
        assert_eq!(TraceParent::parse(format!("{later}.").as_bytes()), None);
    }

    #[test]
    fn of_the_flags_only_the_one_we_know_counts() {
        for (flags, sampled) in [("00", false), ("01", true), ("02", false), ("ff", true)] {
            let text = format!("{}{flags}", &GOOD[..53]);
            assert_eq!(TraceParent::parse(text.as_bytes()).map(|parent| parent.sampled), Some(sampled), "{text}");
        }
    }

    #[test]
    fn what_is_malformed_is_none() {
        for text in [
            "",
            "00",
            "ff-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
            "0-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
            "0x-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
            "00-00000000000000000000000000000000-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-0000000000000000-01",
            "00-4BF92F3577B34DA6A3CE929D0E0E4736-00F067AA0BA902B7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e473-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e47360-0f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-1",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-0g",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-more",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01 ",
            "00_4bf92f3577b34da6a3ce929d0e0e4736_00f067aa0ba902b7_01",
        ] {
            assert_eq!(TraceParent::parse(text.as_bytes()), None, "{text}");
        }
    }

    #[test]
    fn two_are_none() {
        assert!(TraceParent::of(&headers(&[GOOD])).is_some());
        assert_eq!(TraceParent::of(&headers(&[GOOD, GOOD])), None);
        assert_eq!(TraceParent::of(&headers(&[])), None);
    }

    #[test]
    fn the_parent_decides_if_it_is_believed_and_the_share_if_there_is_none() {
        let parent = headers(&[GOOD]);
        let place = sampler(0.0, Believed::Always).place(&parent, false);
        assert!(place.sampled && place.trace.to_string() == GOOD[3..35]);
        assert_eq!(place.parent.map(|span| span.to_string()).as_deref(), Some("00f067aa0ba902b7"));
        let unsampled = headers(&[&GOOD.replace("-01", "-00")]);
        assert!(!sampler(100.0, Believed::Always).place(&unsampled, false).sampled);

        let new = sampler(0.0, Believed::Never).place(&parent, true);
        assert!(!new.sampled && new.parent.is_none() && new.trace.to_string() != GOOD[3..35]);
        assert!(sampler(0.0, Believed::TrustedProxies).place(&parent, true).sampled);
        assert!(!sampler(0.0, Believed::TrustedProxies).place(&parent, false).sampled);
    }

    #[test]
    fn the_share_is_what_is_written() {
        let none = headers(&[]);
        let taken =
            |sample| (0..4_000).filter(|_| sampler(sample, Believed::Always).place(&none, false).sampled).count();
        assert_eq!((taken(0.0), taken(100.0)), (0, 4_000));
        // The standard deviation is 27.
        assert!((800..1_200).contains(&taken(25.0)));
    }

    proptest! {
        #[test]
        fn whatever_comes_is_understood_or_not_and_what_is_understood_is_well_formed(value: Vec<u8>, at in 0usize..56, byte: u8) {
            let mut nearly = GOOD.as_bytes().to_vec();
            nearly.insert(at.min(nearly.len()), byte);
            for value in [value, nearly] {
                if let Some(parent) = TraceParent::parse(&value) {
                    prop_assert_eq!(TraceParent::parse(parent.header().as_bytes()), Some(parent));
                }
            }
        }
    }
}
