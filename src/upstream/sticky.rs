//! `load_balancing.sticky`: a cookie keeps a client on its endpoint.
//!
//! The cookie is `version, endpoint, expiry, HMAC-SHA256` in base64url, 39 characters. The endpoint is identified
//! by a keyed hash of its label and address. Every node with the same secret computes the same hash, also after a
//! restart, and it reveals nothing about the endpoint to others. No state is kept per client.
//!
//! `proxy/select.rs` reads the cookie and tries that endpoint first; `proxy/receive.rs` sets it in the response.

use std::time::{Duration, SystemTime};

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use hmac::{Hmac, Mac};
use http::HeaderValue;
use sha2::Sha256;

use crate::config::upstream::sticky::{SameSite, StickyCookie};
use crate::error::BuildError;

/// The first byte of every cookie, for future formats.
const VERSION: u8 = 1;
/// Version, endpoint, expiry.
const SAID_BYTES: usize = 1 + 8 + 4;
/// Half of SHA-256, which is a sufficient truncation (RFC 2104 §5).
const MAC_BYTES: usize = 16;
const COOKIE_BYTES: usize = SAID_BYTES + MAC_BYTES;
/// The length of the cookie in base64 without padding.
const COOKIE_LETTERS: usize = (COOKIE_BYTES * 8).div_ceil(6);

/// The session affinity of an upstream.
pub struct Sticky {
    /// The name of the cookie.
    pub name: Box<str>,
    /// The first secret signs; all verify.
    secrets: Box<[Secret]>,
    /// The upstream's name is signed, so that cookies of other upstreams with the same secret are rejected.
    upstream: Box<str>,
    ttl: Option<Duration>,
    same_site: SameSite,
}

/// HMAC-SHA256 with a secret, before any data.
type Secret = Hmac<Sha256>;

/// The name of an endpoint in cookies, for one of the secrets.
pub type Name = u64;

/// The content of a cookie with a valid signature.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StickyTarget {
    /// The endpoint that served the client.
    pub endpoint: Name,
    /// It must be renewed although it is valid: half of its time is over, or the signing secret has changed.
    pub is_old: bool,
}

impl Sticky {
    /// Builds it from the settings of the upstream with this name.
    ///
    /// # Errors
    ///
    /// If a secret is invalid.
    pub fn build(written: &StickyCookie, upstream: &str) -> Result<Sticky, BuildError> {
        let secrets = written.secret.0.iter().map(|secret| Secret::new_from_slice(secret.as_bytes()));
        let secrets: Box<[_]> = secrets
            .collect::<Result<_, _>>()
            .map_err(|error| BuildError::new("secret", format!("this cannot be a secret: {error}")))?;
        if secrets.is_empty() {
            return Err(BuildError::new("secret", "without a secret, anybody could choose an endpoint"));
        }
        Ok(Sticky {
            name: written.name.as_str().into(),
            secrets,
            upstream: upstream.into(),
            ttl: written.ttl.map(|ttl| ttl.0),
            same_site: written.same_site,
        })
    }

    /// The names of the endpoint with this identity: one per secret, in order.
    pub fn names(&self, identity: &str) -> Box<[Name]> {
        let name = |secret: &Secret| {
            let mac = mac(secret, &[b"endpoint", self.upstream.as_bytes(), identity.as_bytes()]);
            Name::from_be_bytes(first(&mac.finalize().into_bytes()))
        };
        self.secrets.iter().map(name).collect()
    }

    /// The content of a request's cookie; `None` if the signature is invalid or the cookie has expired.
    pub fn read(&self, cookie: &[u8], now: SystemTime) -> Option<StickyTarget> {
        let mut bytes = [0; COOKIE_BYTES + 3];
        if cookie.len() != COOKIE_LETTERS
            || URL_SAFE_NO_PAD.decode_slice(cookie, &mut bytes).ok()? != COOKIE_BYTES
            || bytes[0] != VERSION
        {
            return None;
        }
        let (said, signature) = bytes[..COOKIE_BYTES].split_at(SAID_BYTES);
        // Compares in constant time.
        let signed_by =
            self.secrets.iter().position(|secret| self.sign(secret, said).verify_truncated_left(signature).is_ok())?;
        let expiry = u32::from_be_bytes(first(&said[9..]));
        let left = match expiry {
            0 => None,
            expiry => Some(expiry.checked_sub(seconds(now)).filter(|&left| left > 0)?),
        };
        let old_age = match (left.map(u64::from), self.ttl.map(|ttl| ttl.as_secs())) {
            (Some(left), Some(ttl)) => left < ttl / 2 || left > ttl,
            (None, None) => false,
            _ => true,
        };
        Some(StickyTarget { endpoint: Name::from_be_bytes(first(&said[1..])), is_old: old_age || signed_by > 0 })
    }

    /// The `Set-Cookie` field for the endpoint with these names; `None` if it cannot be signed.
    pub fn write(&self, names: &[Name], https: bool, now: SystemTime) -> Option<HeaderValue> {
        let (&name, secret) = (names.first()?, self.secrets.first()?);
        let expiry = self.ttl.map_or(0, |ttl| seconds(now + ttl).max(1));
        let mut bytes = [0; COOKIE_BYTES];
        bytes[0] = VERSION;
        bytes[1..9].copy_from_slice(&name.to_be_bytes());
        bytes[9..SAID_BYTES].copy_from_slice(&expiry.to_be_bytes());
        let mac = self.sign(secret, &bytes[..SAID_BYTES]).finalize().into_bytes();
        bytes[SAID_BYTES..].copy_from_slice(&mac[..MAC_BYTES]);

        let mut field = format!("{}={}; Path=/", self.name, URL_SAFE_NO_PAD.encode(bytes));
        if let Some(ttl) = self.ttl {
            field += &format!("; Max-Age={}", ttl.as_secs());
        }
        if https || self.same_site == SameSite::None {
            field += "; Secure";
        }
        field += &format!("; HttpOnly; SameSite={}", self.same_site.name());
        HeaderValue::try_from(field).ok()
    }

    fn sign(&self, secret: &Secret, said: &[u8]) -> Secret {
        mac(secret, &[b"cookie", self.upstream.as_bytes(), said])
    }
}

/// HMAC-SHA256 of the parts, each with its length, so that parts cannot be confused.
fn mac(secret: &Secret, parts: &[&[u8]]) -> Secret {
    let mut mac = secret.clone();
    for part in parts {
        mac.update(&(part.len() as u64).to_be_bytes());
        mac.update(part);
    }
    mac
}

/// The first bytes, padded with zeros.
fn first<const N: usize>(bytes: &[u8]) -> [u8; N] {
    bytes.first_chunk().copied().unwrap_or([0; N])
}

/// Seconds since 1970; the field overflows in 2106.
fn seconds(time: SystemTime) -> u32 {
    let since = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    u32::try_from(since.as_secs()).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    use proptest::prelude::*;

    use crate::config::units::Time;
    use crate::config::upstream::sticky::Secrets;

    const NEW: &str = "a secret of 2026";
    const OLD: &str = "a secret of 2025";

    fn sticky(secrets: &[&str], ttl: Option<u64>, upstream: &str) -> Sticky {
        let written = StickyCookie {
            name: "stay".to_owned(),
            secret: Secrets(secrets.iter().map(|&secret| secret.to_owned()).collect()),
            ttl: ttl.map(Time::seconds),
            same_site: SameSite::Lax,
        };
        Sticky::build(&written, upstream).unwrap()
    }

    fn now() -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(1_795_000_000)
    }

    fn after(seconds: u64) -> SystemTime {
        now() + Duration::from_secs(seconds)
    }

    /// The value of the cookie that is set, and its attributes.
    fn set(sticky: &Sticky, identity: &str, https: bool) -> (String, String) {
        let field = sticky.write(&sticky.names(identity), https, now()).unwrap();
        let (pair, attributes) = field.to_str().unwrap().split_once("; ").unwrap();
        (pair.strip_prefix("stay=").unwrap().to_owned(), attributes.to_owned())
    }

    #[test]
    fn a_cookie_names_its_endpoint_on_every_node_with_the_secret_and_nowhere_else() {
        let one = sticky(&[NEW], None, "app");
        let (cookie, attributes) = set(&one, "a:80 10.0.0.1:80", false);
        assert_eq!((cookie.len(), &*attributes), (COOKIE_LETTERS, "Path=/; HttpOnly; SameSite=Lax"));
        let two = sticky(&[NEW], None, "app");
        let expected = StickyTarget { endpoint: two.names("a:80 10.0.0.1:80")[0], is_old: false };
        assert_eq!(two.read(cookie.as_bytes(), after(1 << 30)), Some(expected));
        assert_ne!(two.names("a:80 10.0.0.2:80")[0], expected.endpoint);
        assert_eq!(sticky(&[OLD], None, "app").read(cookie.as_bytes(), now()), None, "another secret");
        assert_eq!(sticky(&[NEW], None, "shop").read(cookie.as_bytes(), now()), None, "another upstream");
    }

    #[test]
    fn a_cookie_ends_and_is_set_anew_at_half_its_time() {
        let sticky = sticky(&[NEW], Some(3600), "app");
        let (cookie, attributes) = set(&sticky, "a", true);
        assert_eq!(attributes, "Path=/; Max-Age=3600; Secure; HttpOnly; SameSite=Lax");
        let is_old = |at| sticky.read(cookie.as_bytes(), after(at)).map(|stuck| stuck.is_old);
        assert_eq!([0, 1_799, 1_801, 3_599].map(is_old), [Some(false), Some(false), Some(true), Some(true)]);
        assert_eq!([3_600, 9_999].map(is_old), [None, None]);
    }

    #[test]
    fn a_cookie_of_an_older_secret_is_believed_and_replaced() {
        let (cookie, _) = set(&sticky(&[OLD], None, "app"), "a", false);
        let changed = sticky(&[NEW, OLD], None, "app");
        let stuck = changed.read(cookie.as_bytes(), now()).unwrap();
        assert_eq!((stuck.endpoint, stuck.is_old), (changed.names("a")[1], true));
    }

    #[test]
    fn one_that_was_set_under_another_ttl_is_replaced() {
        let (endless, _) = set(&sticky(&[NEW], None, "app"), "a", false);
        let (hourly, _) = set(&sticky(&[NEW], Some(3600), "app"), "a", false);
        let is_old = |ttl, cookie: &str| sticky(&[NEW], ttl, "app").read(cookie.as_bytes(), now()).unwrap().is_old;
        assert!(is_old(Some(3600), &endless) && is_old(None, &hourly));
    }

    proptest! {
        #[test]
        fn a_cookie_of_which_one_letter_is_changed_is_not_ours(place in 0..COOKIE_LETTERS, letter in "[A-Za-z0-9_-]") {
            let sticky = sticky(&[NEW], Some(3600), "app");
            let (mut cookie, _) = set(&sticky, "a", false);
            prop_assume!(cookie[place..=place] != letter);
            cookie.replace_range(place..=place, &letter);
            prop_assert_eq!(sticky.read(cookie.as_bytes(), now()), None);
        }

        #[test]
        fn anything_may_be_sent(cookie in prop::collection::vec(any::<u8>(), 0..100)) {
            prop_assert_eq!(sticky(&[NEW], None, "app").read(&cookie, now()), None);
        }
    }
}
