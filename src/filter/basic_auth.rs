//! `basic_auth`: admits requests with the name and password of a user (RFC 7617).
//!
//! ```yaml
//! - basic_auth:
//!     users: { path: /etc/forebay/users.htpasswd, refresh: 60s, max_size: 16MiB }
//!     realm: Restricted          # shown by browsers
//!     user_header: X-Remote-User # for the upstream: the name; the client's own is removed
//!     forward: false             # true: the upstream gets the password as well
//!     threads: 1                 # that hash, with idle CPU time
//!     queue: 64                  # passwords that may wait for them; then 503
//!     remember: 10m              # how long a correct password is cached
//!     remembered: 10k            # how many of them
//! ```
//!
//! The file has the format of `htpasswd -B`, and may contain argon2 hashes; MD5 and SHA-1 are refused. It is read
//! again when it changes. A client with missing or wrong credentials gets 401 with a challenge. A wrong name takes as
//! long as a wrong password.

mod hashing;
mod users;

use std::num::NonZeroUsize;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use http::header::{AUTHORIZATION, RETRY_AFTER};
use http::{HeaderName, HeaderValue};
use schemars::JsonSchema;
use serde::Deserialize;
use zeroize::Zeroizing;

use super::auth::{Gate, Sealer, challenge, credentials, own_header, realm, set_own};
use super::listed::{Listed, Source};
use super::{Filter, FilterType, Scope, Stages, Surroundings, Verdict};
use crate::config::units::{Count, Time};
use crate::error::{BuildError, Refusal};
use crate::expression::Identity;
use crate::metrics::filters::Access;
use hashing::{Hashing, Known, Terms};
use users::Users;

/// Admits requests with the name and password of a user (RFC 7617), and answers others with 401.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// The file of users, in the format of `htpasswd -B`. It may also contain argon2 hashes.
    pub users: Source,
    /// The text that a browser shows when it asks for the password.
    #[serde(default = "Settings::realm")]
    pub realm: String,
    /// The header with the name of the user for the upstream. The client's own header of this name is removed.
    #[serde(default)]
    pub user_header: Option<String>,
    /// Whether `Authorization`, and so the password, is also sent to the upstream.
    #[serde(default)]
    pub forward: bool,
    /// The number of threads that hash passwords. They use only idle CPU time.
    #[serde(default = "Settings::threads")]
    pub threads: Count,
    /// The number of passwords that may wait for these threads. Further requests are answered with 503.
    #[serde(default = "Settings::queue")]
    pub queue: Count,
    /// How long a correct password is cached; `0s` disables the cache.
    #[serde(default = "Settings::remember")]
    pub remember: Time,
    /// The number of cached passwords, at about 100 bytes each.
    #[serde(default = "Settings::remembered")]
    pub remembered: Count,
}

impl Settings {
    fn realm() -> String {
        "Restricted".to_owned()
    }

    fn threads() -> Count {
        Count(1)
    }

    fn queue() -> Count {
        Count(64)
    }

    fn remember() -> Time {
        Time(Duration::from_secs(600))
    }

    fn remembered() -> Count {
        Count(10_000)
    }
}

static MISSING: Refusal = Refusal::new("route.basic_auth_missing", 401, "Show a name and a password.");
static WRONG: Refusal = Refusal::new("route.basic_auth_wrong", 401, "This name and password are not known here.");
static BUSY: Refusal = Refusal::new("route.basic_auth_busy", 503, "Too many passwords are being checked; try again.");

/// Admits users.
pub struct BasicAuth {
    users: Arc<Listed<Users>>,
    challenge: HeaderValue,
    user_header: Option<HeaderName>,
    forward: bool,
    /// The cache of correct passwords; it outlives a reload.
    checked: Arc<(Sealer, Hashing)>,
    gate: Gate,
}

#[async_trait]
impl Filter for BasicAuth {
    fn stages(&self) -> Stages {
        Stages::REQUEST
    }

    fn own_headers(&self) -> Vec<HeaderName> {
        self.user_header.iter().cloned().collect()
    }

    async fn request(&self, scope: &mut Scope<'_>) -> Verdict {
        set_own(scope.request, self.user_header.as_ref(), None);
        let shown = match credentials(&scope.request.headers, "Basic") {
            Ok(Some(shown)) => decoded(shown),
            Ok(None) => return self.gate.refuse(Access::Missing, &MISSING, challenge(&self.challenge)),
            Err(()) => None,
        };
        let Some((user, password)) = shown else { return self.wrong() };
        let (known, is_known) = {
            let users = self.users.now();
            let (stored, is_known) = users.of(&user);
            let kind = [u8::from(is_known)];
            let (sealer, hashing) = &*self.checked;
            let seal = sealer.seal(&[user.as_bytes(), &password, stored.text().as_bytes(), &kind]);
            (hashing.ask(seal, &password, stored), is_known)
        };
        let access = match known {
            Known::Right => Access::Remembered,
            Known::Busy => {
                return self.gate.refuse(Access::Busy, &BUSY, vec![(RETRY_AFTER, HeaderValue::from(1))]);
            }
            Known::Soon(right) => match right.await {
                Ok(true) => Access::Granted,
                _ => return self.wrong(),
            },
        };
        if !is_known {
            return self.wrong();
        }
        self.gate.count(access);
        if !self.forward {
            scope.request.remove_header(&AUTHORIZATION);
        }
        set_own(scope.request, self.user_header.as_ref(), Some(&user));
        scope.identify(Identity { user: user.into(), by: Self::KEY, claims: Vec::new() });
        Verdict::Continue
    }
}

impl FilterType for BasicAuth {
    const KEY: &'static str = "basic_auth";
    const REFUSALS: &'static [&'static Refusal] = &[&MISSING, &WRONG, &BUSY];
    type Settings = Settings;

    fn build(settings: &Settings, around: &Surroundings<'_>) -> Result<Self, BuildError> {
        let written = format!("Basic realm=\"{}\", charset=\"UTF-8\"", realm(&settings.realm)?);
        let challenge = HeaderValue::try_from(written).map_err(|error| BuildError::new("realm", error.to_string()))?;
        let number = |key: &str, Count(count): Count, most: usize| {
            usize::try_from(count)
                .ok()
                .filter(|count| (1..=most).contains(count))
                .ok_or_else(|| BuildError::new(key, format!("write a number from 1 to {most}")))
        };
        let remembered = number("remembered", settings.remembered, 10_000_000)?;
        let terms = Terms {
            threads: number("threads", settings.threads, 64)?,
            queue: number("queue", settings.queue, 100_000)?,
            remember: settings.remember.0,
            remembered: NonZeroUsize::new(remembered).unwrap_or(NonZeroUsize::MIN),
        };
        Ok(BasicAuth {
            users: Listed::build(&settings.users, around, Users::parse).map_err(|error| error.under("users"))?,
            challenge,
            user_header: own_header(settings.user_header.as_ref(), "user_header")?,
            forward: settings.forward,
            checked: around.keep(&format!("{terms:?}"), || {
                (Sealer::new(), Hashing::new(terms, around.metrics.map(|metrics| metrics.passwords())))
            }),
            gate: Gate::of(around),
        })
    }
}

impl BasicAuth {
    fn wrong(&self) -> Verdict {
        self.gate.refuse(Access::Wrong, &WRONG, challenge(&self.challenge))
    }
}

/// Decodes the name and the password from base64 (RFC 7617 §2). The name contains no colon, and neither contains
/// control characters.
fn decoded(shown: &str) -> Option<(String, Zeroizing<Vec<u8>>)> {
    let both = Zeroizing::new(STANDARD.decode(shown).ok()?);
    let colon = both.iter().position(|&byte| byte == b':')?;
    let (user, password) = (&both[..colon], &both[colon + 1..]);
    if both.iter().any(u8::is_ascii_control) {
        return None;
    }
    Some((std::str::from_utf8(user).ok()?.to_owned(), Zeroizing::new(password.to_vec())))
}

#[cfg(test)]
mod tests {
    use super::super::rehearsal::error;
    use super::*;

    #[test]
    fn names_and_passwords_are_decoded() {
        let of =
            |text: &str| decoded(text).map(|(user, password)| (user, String::from_utf8(password.to_vec()).unwrap()));
        // RFC 7617 §2 and §2.1.
        assert_eq!(of("QWxhZGRpbjpvcGVuIHNlc2FtZQ=="), Some(("Aladdin".into(), "open sesame".into())));
        assert_eq!(of("dGVzdDoxMjPCow=="), Some(("test".into(), "123£".into())));
        assert_eq!(of(&STANDARD.encode("ada:a:b")), Some(("ada".into(), "a:b".into())), "the first colon counts");
        assert_eq!(of(&STANDARD.encode(":")), Some((String::new(), String::new())));
        for wrong in ["", "!!", "QWxhZGRpbg==", &STANDARD.encode("a\0b:c"), &STANDARD.encode("a:b\n")] {
            assert_eq!(of(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn wrong_settings_are_told_with_their_place() {
        let told = error("- basic_auth: { users: { path: /nowhere/users } }");
        assert_eq!(
            told,
            "[0].basic_auth.users.path: `/nowhere/users` cannot be read: No such file or directory (os error 2)"
        );
        for (setting, at) in
            [("realm: ''", "realm"), ("threads: 0", "threads"), ("queue: 0", "queue"), ("remembered: 0", "remembered")]
        {
            let told = error(&format!("- basic_auth: {{ users: {{ path: x }}, {setting} }}"));
            assert!(told.starts_with(&format!("[0].basic_auth.{at}: ")), "{told}");
        }
    }
}
