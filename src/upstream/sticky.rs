//! `load_balancing.sticky`: a client stays at its endpoint, by a cookie that names it.
//!
//! The cookie says which endpoint, until when, and that we said so: `version, endpoint, expiry, HMAC-SHA256` in
//! base64url, 39 characters. The endpoint is named by a keyed hash of its label and address, which every node with the
//! same secret works out alike, today and after a restart, and which reveals to no other where it is. Nothing is kept
//! of clients.
//!
//! `proxy/select.rs` reads it and asks the upstream for that endpoint first; `proxy/receive.rs` sets it with the
//! answer.

use std::time::{Duration, SystemTime};

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use hmac::{Hmac, Mac};
use http::HeaderValue;
use sha2::Sha256;

use crate::config::upstream::sticky::{SameSite, StickyCookie};
use crate::error::BuildError;

/// The first byte of every cookie, so that a later layout can tell its own.
const VERSION: u8 = 1;
/// Version, endpoint, expiry.
const SAID_BYTES: usize = 1 + 8 + 4;
/// Half of SHA-256, which is as much as anybody can make use of (RFC 2104 §5).
const MAC_BYTES: usize = 16;
const COOKIE_BYTES: usize = SAID_BYTES + MAC_BYTES;
/// The length of this many bytes in base64 without padding.
const COOKIE_LETTERS: usize = (COOKIE_BYTES * 8).div_ceil(6);

/// How the clients of an upstream stay where they are.
pub struct Sticky {
    /// The name of the cookie.
    pub name: Box<str>,
    /// The first signs; all are believed.
    secrets: Box<[Secret]>,
    /// Of which upstream it tells: cookies of others, which may have the same secret, are not for us.
    upstream: Box<str>,
    ttl: Option<Duration>,
    same_site: SameSite,
}

/// HMAC-SHA256 under a secret, with nothing signed yet.
type Secret = Hmac<Sha256>;

/// An endpoint as cookies call it: under one of the secrets.
pub type Name = u64;

/// What a cookie says that we have signed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stuck {
    /// Where the client was served.
    pub endpoint: Name,
    /// It is to be set anew, though it holds: half of its time is over, or another secret signs now.
    pub is_old: bool,
}

impl Sticky {
    /// What is `written`, for the upstream of this name.
    ///
    /// # Errors
    /// A secret that cannot be one.
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

    /// What cookies call the endpoint of this identity: one name for each secret, in their order.
    pub fn names(&self, identity: &str) -> Box<[Name]> {
        let name = |secret: &Secret| {
            let mac = mac(secret, &[b"endpoint", self.upstream.as_bytes(), identity.as_bytes()]);
            Name::from_be_bytes(first(&mac.finalize().into_bytes()))
        };
        self.secrets.iter().map(name).collect()
    }

    /// What the cookie of a request says; `None` if we have not said it, or not for now.
    pub fn read(&self, cookie: &[u8], now: SystemTime) -> Option<Stuck> {
        let mut bytes = [0; COOKIE_BYTES + 3];
        if cookie.len() != COOKIE_LETTERS
            || URL_SAFE_NO_PAD.decode_slice(cookie, &mut bytes).ok()? != COOKIE_BYTES
            || bytes[0] != VERSION
        {
            return None;
        }
        let (said, signature) = bytes[..COOKIE_BYTES].split_at(SAID_BYTES);
        // The comparison takes as long whatever the signature is.
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
        Some(Stuck { endpoint: Name::from_be_bytes(first(&said[1..])), is_old: old_age || signed_by > 0 })
    }

    /// The field `Set-Cookie` that has a client stay at the endpoint with these names; `None` if it cannot be signed.
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

/// HMAC-SHA256 of the parts, of which none can pass for a part of another.
fn mac(secret: &Secret, parts: &[&[u8]]) -> Secret {
    let mut mac = secret.clone();
    for part in parts {
        mac.update(&(part.len() as u64).to_be_bytes());
        mac.update(part);
    }
    mac
}

/// The first bytes; zeros where there are none.
fn first<const N: usize>(bytes: &[u8]) -> [u8; N] {
    bytes.first_chunk().copied().unwrap_or([0; N])
}

/// Seconds since 1970, which end in 2106 for this cookie.
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

    /// The value of the cookie that is set, and the attributes behind it.
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
        let expected = Stuck { endpoint: two.names("a:80 10.0.0.1:80")[0], is_old: false };
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
