//! `rate_limit`: limits the request rate of each client, session or other key.
//!
//! ```yaml
//! - rate_limit:
//!     key: client_ip             # or { header: X-Api-Key }, { cookie: sid }, { query: token }, path, route, { cel: "…" }
//!     rate: 10/s                 # the long-term rate
//!     burst: 20                  # requests at once, after a pause
//!     ipv4_prefix: 32            # leading bits of an IPv4 address that are one client
//!     ipv6_prefix: 64            # leading bits of an IPv6 address that are one client
//!     max_keys: 100k             # remembered keys
//! ```
//!
//! If a request has several headers, cookies or arguments of the configured name, each value counts. The request
//! passes if none of them is over its limit. So a client cannot hide the value that its backend uses behind another
//! one. A request with more than 16 values is refused.
//!
//! The algorithm is GCRA (`gcra.rs`). Keys are stored as 64-bit SipHash values with a seed of this process, never as
//! sent: clients choose them, and 100,000 cookies of 8 KiB would be 800 MB, while the hashes take about 8 MB. The
//! probability that any two of 100,000 keys share a limit is one in four thousand million, and without the seed no
//! client can cause it. When `max_keys` is reached, the least recently used key is forgotten, and its limit starts
//! again: too many keys can make the limit lenient, but never the memory large.

use std::hash::{BuildHasher, RandomState};
use std::sync::{Arc, Once};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use http::HeaderValue;
use http::header::RETRY_AFTER;
use schemars::JsonSchema;
use serde::Deserialize;

use super::gcra::{Gcra, Keys, nanoseconds};
use super::{Filter, FilterType, Key, Refused, Scope, Stages, Surroundings, Verdict};
use crate::config;
use crate::config::address::{ClientPrefix, Ipv4Prefix, Ipv6Prefix};
use crate::config::units::{Count, Rate};
use crate::error::{BuildError, Refusal};

/// Limits the requests per time for each key. Requests above the limit are answered with 429 and `Retry-After`. Each
/// occurrence of the filter counts separately.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// The key. Requests without the key (no such header, or a client on a unix socket) share one limit. A request
    /// with several headers, cookies or arguments of this name counts for each value.
    #[serde(default = "Settings::key")]
    pub key: config::Key,
    /// The long-term rate, such as `10/s`; at most one per microsecond.
    pub rate: Rate,
    /// The number of requests that may come at once after a pause. Default: the number in `rate`.
    #[serde(default)]
    pub burst: Option<Count>,
    /// The number of remembered keys, at about 80 bytes each.
    #[serde(default = "Settings::max_keys")]
    pub max_keys: Count,
    /// The number of leading bits of an IPv4 address that identify one client of `client_ip`.
    #[serde(default)]
    pub ipv4_prefix: Ipv4Prefix,
    /// The number of leading bits of an IPv6 address that identify one client of `client_ip`. A host usually has a
    /// whole network of addresses.
    #[serde(default)]
    pub ipv6_prefix: Ipv6Prefix,
}

impl Settings {
    fn key() -> config::Key {
        config::Key::ClientIp
    }

    fn max_keys() -> Count {
        Count(100_000)
    }
}

static LIMITED: Refusal = Refusal::new("route.rate_limit", 429, "Too many requests; try again later.");

/// The limit on the values of a key in one request. More have no good reason, and each takes memory.
const VALUES_MAX: usize = 16;

/// Refuses requests above a rate.
pub struct RateLimit {
    key: Key,
    limit: Gcra,
    shared: Arc<Shared>,
}

/// The time at which each key may come again. It outlives a reload, even one that changes the rate.
struct Shared {
    started: Instant,
    seed: RandomState,
    keys: Keys,
    full: Once,
}

#[async_trait]
impl Filter for RateLimit {
    fn stages(&self) -> Stages {
        Stages::REQUEST
    }

    async fn request(&self, scope: &mut Scope<'_>) -> Verdict {
        let asked = scope.asked();
        let (mut hashes, mut count) = ([0; VALUES_MAX], 0);
        for value in self.key.each(&asked) {
            let hash = self.hash(&value.bytes());
            if hashes[..count].contains(&hash) {
                continue;
            }
            let Some(place) = hashes.get_mut(count) else { return limited(Duration::ZERO) };
            *place = hash;
            count += 1;
        }
        if count == 0 {
            (hashes[0], count) = (self.hash(b""), 1);
        }
        let now = self.shared.started.elapsed();
        // The request counts for each key, whichever key refuses it.
        let waits = hashes[..count].iter().filter_map(|&hash| self.admit(hash, now).err());
        waits.max().map_or(Verdict::Continue, limited)
    }
}

impl FilterType for RateLimit {
    const KEY: &'static str = "rate_limit";
    const REFUSALS: &'static [&'static Refusal] = &[&LIMITED];
    type Settings = Settings;

    fn build(settings: &Settings, around: &Surroundings<'_>) -> Result<Self, BuildError> {
        let prefix = ClientPrefix { v4: settings.ipv4_prefix, v6: settings.ipv6_prefix };
        let key = Key::build(&settings.key).map_err(|error| error.under("key"))?.for_limits(prefix);
        let Count(burst) = settings.burst.unwrap_or(Count(settings.rate.events));
        if burst == 0 || burst == Count::UNLIMITED.0 {
            return Err(BuildError::new("burst", "a limit needs a number here, of at least 1"));
        }
        let limit = Gcra::new(settings.rate, burst)
            .ok_or_else(|| BuildError::new("rate", format!("`{}` is more than one a microsecond", settings.rate)))?;
        let keys = match settings.max_keys {
            Count(0) | Count::UNLIMITED => None,
            Count(number) => usize::try_from(number).ok(),
        };
        let keys =
            keys.ok_or_else(|| BuildError::new("max_keys", "memory has an end: write a number of at least 1"))?;
        let shared =
            || Shared { started: Instant::now(), seed: RandomState::new(), keys: Keys::new(keys), full: Once::new() };
        let of = format!("{:?} {prefix:?} {keys}", settings.key);
        Ok(RateLimit { key, limit, shared: around.keep(&of, shared) })
    }
}

/// The key is over its limit, and may come again after this time.
fn limited(wait: Duration) -> Verdict {
    let seconds = wait.as_secs() + u64::from(wait.subsec_nanos() > 0);
    let headers = vec![(RETRY_AFTER, HeaderValue::from(seconds.max(1)))];
    Verdict::Refuse(Refused { refusal: &LIMITED, headers })
}

impl RateLimit {
    fn hash(&self, key: &[u8]) -> u64 {
        self.shared.seed.hash_one(key)
    }

    /// Admits a request at `now` whose key has this hash, or returns how long it must wait.
    fn admit(&self, key: u64, now: Duration) -> Result<(), Duration> {
        let Shared { keys, full, .. } = &*self.shared;
        let (admitted, forgotten) = keys.with(key, |due| self.limit.admit(due, nanoseconds(now)));
        if forgotten {
            full.call_once(|| {
                tracing::warn!(max_keys = keys.max(), "rate_limit remembers no more keys; the oldest begin anew");
            });
        }
        admitted.map_err(Duration::from_nanos)
    }
}

#[cfg(test)]
mod tests {
    use super::super::rehearsal::{Rehearsal, chain, error, example, request};
    use super::*;

    /// A filter with these settings and `rate: 1/s`.
    fn limit(settings: &str) -> Rehearsal {
        Rehearsal::of(&format!("- rate_limit: {{ rate: 1/s, {settings} }}"))
    }

    /// The number of requests out of ten that pass.
    fn passed(rehearsal: &mut Rehearsal) -> usize {
        (0..10).filter(|_| matches!(rehearsal.verdict(), Verdict::Continue)).count()
    }

    fn filter(yaml: &str) -> RateLimit {
        let settings = serde_yaml::from_str(yaml).unwrap();
        RateLimit::build(&settings, &Surroundings::rehearsal(&())).unwrap()
    }

    #[test]
    fn the_example_builds() {
        assert!(chain(&example(include_str!("rate_limit.rs"))).is_ok());
    }

    #[test]
    fn a_burst_passes_and_the_rest_is_told_when_to_come_again() {
        let mut rehearsal = limit("burst: 3");
        assert_eq!(passed(&mut rehearsal), 3);
        let refused = rehearsal.refused();
        assert_eq!((refused.refusal.reason, refused.refusal.status), ("route.rate_limit", 429));
        assert_eq!(refused.headers, [(RETRY_AFTER, HeaderValue::from(1))]);
    }

    #[test]
    fn retry_after_is_in_whole_seconds_rounded_up() {
        let mut rehearsal = Rehearsal::of("- rate_limit: { rate: 1/h, burst: 1 }");
        rehearsal.pass();
        assert_eq!(rehearsal.refused().headers, [(RETRY_AFTER, HeaderValue::from(3600))]);
        let mut rehearsal = Rehearsal::of("- rate_limit: { rate: 2/s, burst: 1 }");
        rehearsal.pass();
        assert_eq!(rehearsal.refused().headers, [(RETRY_AFTER, HeaderValue::from(1))]);
    }

    #[test]
    fn without_a_burst_as_many_pass_as_the_rate_names() {
        assert_eq!(passed(&mut Rehearsal::of("- rate_limit: { rate: 6/h }")), 6);
    }

    #[test]
    fn clients_are_counted_apart_and_those_without_address_together() {
        let mut rehearsal = limit("burst: 2");
        assert_eq!(passed(&mut rehearsal), 2);
        rehearsal = rehearsal.from("2001:db8::1");
        assert_eq!(passed(&mut rehearsal), 2);
        rehearsal.client = None;
        assert_eq!(passed(&mut rehearsal), 2);
        assert_eq!(passed(&mut rehearsal), 0);
    }

    #[test]
    fn all_addresses_of_an_ipv6_network_are_one_client() {
        let passed_of_40 = |settings: &str, address: &dyn Fn(u16) -> String| {
            let mut rehearsal = Rehearsal::of(&format!("- rate_limit: {{ rate: 1/m, {settings} }}"));
            let mut passes = |n| {
                rehearsal.client = Some(address(n).parse().unwrap());
                matches!(rehearsal.verdict(), Verdict::Continue)
            };
            (0..40).filter(|&n| passes(n)).count()
        };
        let (one_64, one_48) = (|n| format!("2001:db8:1:2::{n:x}"), |n| format!("2001:db8:1:{n:x}::1"));
        assert_eq!((passed_of_40("", &one_64), passed_of_40("", &one_48)), (1, 40));
        assert_eq!(passed_of_40("ipv6_prefix: 48", &one_48), 1);
        assert_eq!(passed_of_40("ipv6_prefix: 128", &one_64), 40);
        assert_eq!(passed_of_40("", &|n| format!("192.0.2.{n}")), 40, "an IPv4 address is one client");
        assert_eq!(passed_of_40("ipv4_prefix: 29", &|n| format!("192.0.2.{n}")), 5);
        assert_eq!(passed_of_40("ipv6_prefix: 1", &|n| format!("::ffff:192.0.2.{n}")), 40);
    }

    #[test]
    fn headers_and_cookies_are_counted_apart_whoever_sends_them() {
        for (key, name, one, two) in [("header: x-key", "x-key", "1", "2"), ("cookie: sid", "cookie", "sid=1", "sid=2")]
        {
            let mut rehearsal = limit(&format!("burst: 2, key: {{ {key} }}"));
            rehearsal = rehearsal.asking("/", &[(name, one)]);
            assert_eq!(passed(&mut rehearsal), 2, "{key}");
            rehearsal = rehearsal.asking("/", &[(name, two)]);
            assert_eq!(passed(&mut rehearsal), 2, "{key}");
            rehearsal = rehearsal.asking("/", &[(name, one)]).from("198.51.100.1");
            assert_eq!(passed(&mut rehearsal), 0, "{key}");
        }
    }

    #[test]
    fn a_second_value_hides_no_first_one() {
        let passes = |key: &str, asks: &dyn Fn(usize) -> (String, Vec<(&'static str, String)>)| {
            let mut rehearsal = limit(&format!("burst: 2, key: {{ {key} }}"));
            let mut passes = |n| {
                let (target, fields) = asks(n);
                let fields: Vec<_> = fields.iter().map(|(name, value)| (*name, &**value)).collect();
                rehearsal.request = request(&target, &fields);
                matches!(rehearsal.verdict(), Verdict::Continue)
            };
            (0..10).filter(|&n| passes(n)).count()
        };
        let fields = |values: [String; 2], name| values.map(|value| (name, value)).to_vec();
        for first in [false, true] {
            let pair =
                |n: usize| if first { ["real".to_owned(), n.to_string()] } else { [n.to_string(), "real".into()] };
            let headers = passes("header: x-key", &|n| ("/".into(), fields(pair(n), "x-key")));
            let cookies = |n| pair(n).map(|value| format!("sid={value}"));
            let jars = passes("cookie: sid", &|n| ("/".into(), fields(cookies(n), "cookie")));
            let jar = passes("cookie: sid", &|n| ("/".into(), vec![("cookie", cookies(n).join("; "))]));
            let queries = passes("query: q", &|n| (format!("/?q={}&q={}", pair(n)[0], pair(n)[1]), Vec::new()));
            assert_eq!([headers, jars, jar, queries], [2; 4], "the real one comes first: {first}");
        }
        let twice = passes("header: x-key", &|_| ("/".into(), fields(["real".into(), "real".into()], "x-key")));
        assert_eq!(twice, 2, "the same value counts once");
        let many = |n: usize| (0..17).map(|value| ("x-key", format!("{n}-{value}"))).collect();
        assert_eq!(passes("header: x-key", &|n| ("/".into(), many(n))), 0, "more than a request may have");
    }

    #[test]
    fn a_limit_frees_itself_in_time() {
        let filter = filter("{ rate: 10/s, burst: 2 }");
        let at = |millis| filter.admit(filter.hash(b"a"), Duration::from_millis(millis));
        assert_eq!([at(0), at(0)], [Ok(()), Ok(())]);
        assert_eq!(at(30), Err(Duration::from_millis(70)));
        assert_eq!(at(100), Ok(()));
        assert_eq!(at(199), Err(Duration::from_millis(1)));
        assert_eq!([at(5000), at(5000)], [Ok(()), Ok(())]);
        assert_eq!(at(5000), Err(Duration::from_millis(100)));
    }

    #[test]
    fn the_key_unseen_for_longest_is_forgotten_and_no_other() {
        let filter = filter("{ rate: 1/h, burst: 1, max_keys: 2 }");
        let admits = |key: &[u8]| filter.admit(filter.hash(key), Duration::ZERO).is_ok();
        assert!(admits(b"a") && admits(b"b"));
        assert!(!admits(b"a"), "known, and from now on the last one seen");
        assert!(admits(b"c"), "new, and takes the place of b");
        assert!(!admits(b"a"));
        assert!(admits(b"b"), "forgotten");
    }

    #[test]
    fn wrong_settings_are_told_with_their_place() {
        assert_eq!(error("- rate_limit: {}"), "[0].rate_limit: missing field `rate`");
        let told =
            "[0].rate_limit.rate: `10` is not a rate: write a number per `s`, `m` or `h`, such as `10/s` or `600/m`";
        assert_eq!(error("- rate_limit: { rate: 10 }"), told);
        let told = "[0].rate_limit.rate: `2M/s` is more than one a microsecond";
        assert_eq!(error("- rate_limit: { rate: 2M/s }"), told);
        for burst in ["0", "unlimited"] {
            let told = "[0].rate_limit.burst: a limit needs a number here, of at least 1";
            assert_eq!(error(&format!("- rate_limit: {{ rate: 1/s, burst: {burst} }}")), told);
        }
        for keys in ["0", "unlimited"] {
            let told = "[0].rate_limit.max_keys: memory has an end: write a number of at least 1";
            assert_eq!(error(&format!("- rate_limit: {{ rate: 1/s, max_keys: {keys} }}")), told);
        }
        let told = "[0].rate_limit.brust: unknown field `brust`, expected one of `key`, `rate`, `burst`, `max_keys`, `ipv4_prefix`, `ipv6_prefix`";
        assert_eq!(error("- rate_limit: { rate: 1/s, brust: 2 }"), told);
    }

    #[test]
    fn wrong_keys_are_told_with_their_place() {
        let told = |key| error(&format!("- rate_limit: {{ rate: 1/s, key: {key} }}"));
        assert_eq!(told("{ header: a b }"), "[0].rate_limit.key.header: `a b` is not a valid header name");
        assert_eq!(told("{ cookie: '' }"), "[0].rate_limit.key.cookie: `` is not a valid cookie name");
        assert_eq!(told("{ query: '' }"), "[0].rate_limit.key.query: a query argument needs a name");
        let unknown =
            "unknown variant `ip`, expected one of `client_ip`, `path`, `route`, `header`, `cookie`, `query`, `cel`";
        assert_eq!(told("ip"), format!("[0].rate_limit.key: {unknown}"));
    }
}
