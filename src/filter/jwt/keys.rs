//! The keys of tokens (RFC 7517): from a file, or from a service that rotates them.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use http::Method;
use http::uri::PathAndQuery;
use jsonwebtoken::jwk::{AlgorithmParameters, EllipticCurve, Jwk, KeyAlgorithm, KeyOperations, PublicKeyUse};
use jsonwebtoken::{Algorithm, DecodingKey};
use serde::Deserialize;

use super::crypto::Verifying;
use crate::filter::call::{Call, Caller};
use crate::filter::listed::Listed;
use crate::metrics::filters::Loads;

/// The limit on the keys of a set: a token without a key id is tried with each.
const KEYS_MAX: usize = 100;

/// Keys by their ids.
#[derive(Debug)]
pub struct KeySet(Vec<One>);

#[derive(Debug)]
struct One {
    id: Option<Box<str>>,
    /// The algorithms of the key: all of its kind, or the one that it names.
    algorithms: Vec<Algorithm>,
    key: DecodingKey,
}

impl KeySet {
    /// Parses a JWK set. Keys of unknown kinds and keys that are not for signatures are ignored (RFC 7517 §5).
    ///
    /// # Errors
    /// The mistake, or that the set has no usable key.
    pub fn parse(text: &str) -> Result<KeySet, String> {
        #[derive(Deserialize)]
        struct Set {
            keys: Vec<serde_json::Value>,
        }
        let set: Set = serde_json::from_str(text).map_err(|error| format!("this is not a JWK set: {error}"))?;
        if set.keys.len() > KEYS_MAX {
            return Err(format!("the JWK set has {} keys, and at most {KEYS_MAX} are taken", set.keys.len()));
        }
        let keys: Vec<One> =
            set.keys.into_iter().filter_map(|key| One::of(&serde_json::from_value(key).ok()?)).collect();
        if keys.is_empty() {
            return Err("no key of the JWK set is one for signatures of a known kind".to_owned());
        }
        Ok(KeySet(keys))
    }

    /// The candidate keys for a token of this algorithm: the one with its key id; without an id, all.
    pub fn of(&self, id: Option<&str>, algorithm: Algorithm) -> impl Iterator<Item = &DecodingKey> {
        let fits = move |one: &&One| {
            one.algorithms.contains(&algorithm) && id.is_none_or(|id| one.id.as_deref().is_some_and(|own| own == id))
        };
        self.0.iter().filter(fits).map(|one| &one.key)
    }
}

impl One {
    fn of(jwk: &Jwk) -> Option<One> {
        let common = &jwk.common;
        let signs = common.public_key_use.as_ref().is_none_or(|used| *used == PublicKeyUse::Signature);
        let verifies = common.key_operations.as_ref().is_none_or(|all| all.contains(&KeyOperations::Verify));
        if !signs || !verifies {
            return None;
        }
        let key = DecodingKey::from_jwk(jwk).ok()?;
        use Algorithm::{ES256, ES384, EdDSA, HS256, HS384, HS512, PS256, PS384, PS512, RS256, RS384, RS512};
        let of_kind: &[Algorithm] = match &jwk.algorithm {
            AlgorithmParameters::RSA(_) => &[RS256, RS384, RS512, PS256, PS384, PS512],
            AlgorithmParameters::EllipticCurve(key) if key.curve == EllipticCurve::P256 => &[ES256],
            AlgorithmParameters::EllipticCurve(key) if key.curve == EllipticCurve::P384 => &[ES384],
            AlgorithmParameters::OctetKeyPair(key) if key.curve == EllipticCurve::Ed25519 => &[EdDSA],
            AlgorithmParameters::OctetKey(_) => &[HS256, HS384, HS512],
            _ => return None,
        };
        let named =
            |algorithm: &&Algorithm| common.key_algorithm.is_none_or(|own| own == KeyAlgorithm::from(**algorithm));
        let fits = of_kind.iter().filter(named).filter(|algorithm| Verifying::new(**algorithm, &key).is_some());
        let algorithms: Vec<Algorithm> = fits.copied().collect();
        (!algorithms.is_empty()).then(|| One { id: common.key_id.as_deref().map(Box::from), algorithms, key })
    }
}

/// The source of keys.
pub enum Keys {
    /// A file.
    File(Arc<Listed<KeySet>>),
    /// A service.
    Service(Arc<Service>),
}

impl Keys {
    /// The current keys. Waits only if there are none yet. `None`: there are none.
    pub async fn now(&self) -> Option<Arc<KeySet>> {
        match self {
            Keys::File(listed) => Some(listed.now().clone()),
            Keys::Service(service) => service.now().await,
        }
    }

    /// The keys, if they have changed: the given ones lack the key of a token.
    pub async fn newer(&self, than: &Arc<KeySet>) -> Option<Arc<KeySet>> {
        let Keys::Service(service) = self else { return None };
        service.ask_again(than).await.filter(|keys| !Arc::ptr_eq(keys, than))
    }
}

/// How keys are fetched from a service.
#[derive(Clone, Copy, Debug)]
pub struct Terms {
    /// Keys of this age are fetched again.
    pub refresh: Duration,
    /// The least time between two fetches.
    pub retry: Duration,
    /// Keys of this age are no longer used: the service has not answered.
    pub keep: Duration,
    /// The time limit of an answer.
    pub timeout: Duration,
    /// The size limit of an answer.
    pub bytes_max: usize,
}

/// A service with keys.
pub struct Service {
    pub caller: Caller,
    pub target: PathAndQuery,
    pub terms: Terms,
    pub loads: Option<Loads>,
    /// One task fetches at a time; the others wait for its result.
    pub asking: tokio::sync::Mutex<()>,
    pub known: Arc<Mutex<Known>>,
}

/// The state of a service's keys.
#[derive(Clone, Default)]
pub struct Known {
    keys: Option<(Arc<KeySet>, Instant)>,
    /// The time of the last fetch.
    asked: Option<Instant>,
}

/// The decision about the keys.
#[derive(Debug, PartialEq, Eq)]
enum Step {
    Use,
    /// Use them, and fetch new ones in the background.
    Renew,
    /// There are none: fetch and wait.
    Ask,
    /// There are none, and it is too early for another fetch.
    Fail,
}

impl Known {
    fn step(&self, terms: &Terms, now: Instant) -> Step {
        let age = self.keys.as_ref().map(|(_, since)| now.saturating_duration_since(*since));
        let may_ask = self.may_ask(terms, now);
        match age {
            Some(age) if age < terms.refresh => Step::Use,
            Some(age) if age < terms.keep => {
                if may_ask {
                    Step::Renew
                } else {
                    Step::Use
                }
            }
            _ if may_ask => Step::Ask,
            _ => Step::Fail,
        }
    }

    fn may_ask(&self, terms: &Terms, now: Instant) -> bool {
        self.asked.is_none_or(|asked| now.saturating_duration_since(asked) >= terms.retry)
    }
}

impl Service {
    fn known(&self) -> Known {
        self.known.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    async fn now(self: &Arc<Self>) -> Option<Arc<KeySet>> {
        let known = self.known();
        match known.step(&self.terms, Instant::now()) {
            Step::Use => {}
            Step::Renew => drop(self.ask(known.asked)),
            Step::Ask => {
                let _ = self.ask(known.asked).await;
                return self.usable();
            }
            Step::Fail => return self.joined().await,
        }
        known.keys.map(|(keys, _)| keys)
    }

    async fn ask_again(self: &Arc<Self>, than: &Arc<KeySet>) -> Option<Arc<KeySet>> {
        let known = self.known();
        if known.keys.as_ref().is_none_or(|(keys, _)| !Arc::ptr_eq(keys, than)) {
            return self.usable();
        }
        if !known.may_ask(&self.terms, Instant::now()) {
            return self.joined().await;
        }
        let _ = self.ask(known.asked).await;
        self.usable()
    }

    /// The result for a task that waited while another one fetched.
    async fn joined(&self) -> Option<Arc<KeySet>> {
        drop(self.asking.lock().await);
        self.usable()
    }

    fn usable(&self) -> Option<Arc<KeySet>> {
        let now = Instant::now();
        let keys = self.known().keys.filter(|(_, since)| now.saturating_duration_since(*since) < self.terms.keep);
        keys.map(|(keys, _)| keys)
    }

    /// Fetches the keys, unless another task has done so since `asked`. Runs in its own task, since a waiting client
    /// may leave.
    fn ask(self: &Arc<Self>, asked: Option<Instant>) -> tokio::task::JoinHandle<()> {
        let service = self.clone();
        tokio::spawn(async move {
            let _turn = service.asking.lock().await;
            {
                let mut known = service.known.lock().unwrap_or_else(PoisonError::into_inner);
                if known.asked != asked {
                    return;
                }
                known.asked = Some(Instant::now());
            }
            let answer = service.answer().await;
            service.loads.iter().for_each(|loads| loads.count(answer.is_ok()));
            match answer {
                Ok(keys) => {
                    let mut known = service.known.lock().unwrap_or_else(PoisonError::into_inner);
                    known.keys = Some((Arc::new(keys), Instant::now()));
                }
                Err(told) => tracing::warn!("the keys of `jwt` could not be had: {told}; those of before stay in use"),
            }
        })
    }

    async fn answer(&self) -> Result<KeySet, String> {
        let mut call = Call::new(&Method::GET, self.target.clone()).map_err(|error| error.to_string())?;
        (call.deadline, call.answer_bytes_max) = (self.terms.timeout, self.terms.bytes_max);
        let answered = self.caller.send(call).await.map_err(|error| error.to_string())?;
        if answered.header.status != 200 {
            return Err(format!("the service answered {}", answered.header.status));
        }
        let text = std::str::from_utf8(&answered.body).map_err(|_| "the answer is not text".to_owned())?;
        KeySet::parse(text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TERMS: Terms = Terms {
        refresh: Duration::from_secs(100),
        retry: Duration::from_secs(10),
        keep: Duration::from_secs(1000),
        timeout: Duration::from_secs(1),
        bytes_max: 1000,
    };

    #[test]
    fn keys_are_used_renewed_and_given_up_by_their_age() {
        let start = Instant::now();
        let at = |seconds: u64| start + Duration::from_secs(seconds);
        let keys = || Arc::new(KeySet(Vec::new()));
        let known = |since: Option<u64>, asked: Option<u64>| Known {
            keys: since.map(|since| (keys(), at(since))),
            asked: asked.map(at),
        };
        let steps = [
            (known(None, None), 0, Step::Ask),
            (known(None, Some(0)), 9, Step::Fail),
            (known(None, Some(0)), 10, Step::Ask),
            (known(Some(0), Some(0)), 99, Step::Use),
            (known(Some(0), Some(0)), 100, Step::Renew),
            (known(Some(0), Some(95)), 100, Step::Use),
            (known(Some(0), Some(0)), 999, Step::Renew),
            (known(Some(0), Some(0)), 1000, Step::Ask),
            (known(Some(0), Some(995)), 1000, Step::Fail),
        ];
        for (known, now, step) in steps {
            assert_eq!(known.step(&TERMS, at(now)), step, "at {now}");
        }
    }

    #[test]
    fn a_set_that_is_none_is_told() {
        let told = |text: &str| KeySet::parse(text).map(drop).unwrap_err();
        assert!(told("<html>").starts_with("this is not a JWK set: "));
        assert!(told("[]").starts_with("this is not a JWK set: "));
        assert!(told(r#"{"keys":[]}"#).starts_with("no key of the JWK set"));
        assert!(told(r#"{"keys":[{"kty":"EC","crv":"P-256","x":"AA","y":"AA"},7,{}]}"#).starts_with("no key"));
        let many = vec!["{}"; KEYS_MAX + 1].join(",");
        assert!(told(&format!(r#"{{"keys":[{many}]}}"#)).starts_with("the JWK set has 101 keys"));
    }

    /// The key of RFC 7515 §A.3, a key of another curve, and unusable keys.
    #[test]
    fn a_key_is_for_its_own_algorithms() {
        let ec = r#""kty":"EC","x":"f83OJ3D2xF1Bg8vub9tLe1gHMzV76e8Tus9uPHvRVEU","y":"x_FEzRu9m36HLN_tue659LNpXW6pCyStikYjKIWI5a0""#;
        let set = format!(
            r#"{{"keys":[{{{ec},"crv":"P-256","kid":"a"}},{{{ec},"crv":"P-256","use":"enc","kid":"b"}},
                {{{ec},"crv":"P-384","kid":"c"}},{{"kty":"oct","k":"AAAA","kid":"d"}},
                {{"kty":"new","kid":"e"}},{{{ec},"crv":"P-256","alg":"RS256","kid":"f"}}]}}"#
        );
        let set = KeySet::parse(&set).unwrap();
        assert_eq!(set.0.len(), 1, "{set:?}");
        assert_eq!(set.of(Some("a"), Algorithm::ES256).count(), 1);
        assert_eq!(set.of(None, Algorithm::ES256).count(), 1);
        assert_eq!(set.of(Some("b"), Algorithm::ES256).count(), 0);
        assert_eq!(set.of(Some("a"), Algorithm::HS256).count(), 0);
        // A point that is not on the curve.
        let off = ec.replace("f83OJ3", "f83OJ4");
        assert!(KeySet::parse(&format!(r#"{{"keys":[{{{off},"crv":"P-256"}}]}}"#)).is_err());
    }
}
