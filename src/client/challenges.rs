//! Responses to the challenges of certificate issuers while an order is in progress (`acme.rs`).
//!
//! A request for a token is answered before any route (HTTP-01). A handshake with the protocol `acme-tls/1` gets a
//! challenge certificate before any other (TLS-ALPN-01). Tokens and names without an order are not answered here:
//! routes and certificates decide.

use std::collections::HashMap;
use std::sync::Arc;

use arc_swap::ArcSwap;
use boring::ssl::SslContext;

use super::hello::Hello;
use crate::metrics::ChallengeMetrics;

/// Path prefix of tokens (RFC 8555 §8.3).
const WELL_KNOWN: &str = "/.well-known/acme-challenge/";

/// All pending challenges. Workers read them without a lock; each order changes them a few times.
pub struct Challenges {
    tokens: ArcSwap<HashMap<Box<str>, Arc<str>>>,
    names: ArcSwap<HashMap<Box<str>, SslContext>>,
    /// Counts the responses.
    pub metrics: ChallengeMetrics,
}

/// Challenges that are answered until this is dropped.
pub struct Awaited {
    challenges: Arc<Challenges>,
    tokens: Vec<Box<str>>,
    names: Vec<Box<str>>,
}

impl Challenges {
    /// Creates an empty set.
    pub fn new(metrics: ChallengeMetrics) -> Arc<Challenges> {
        Arc::new(Challenges { tokens: ArcSwap::default(), names: ArcSwap::default(), metrics })
    }

    /// The response to a request for this path, if it names a pending token.
    pub fn http(&self, path: &str) -> Option<Arc<str>> {
        let token = path.strip_prefix(WELL_KNOWN)?;
        self.tokens.load().get(token).cloned()
    }

    /// The TLS context for an issuer's handshake, if it names a pending name.
    pub fn tls(&self, hello: &Hello) -> Option<SslContext> {
        let name = hello.name.as_deref().filter(|_| hello.acme)?;
        self.names.load().get(name).cloned()
    }

    /// Creates a set of challenges to add to.
    pub fn wait(self: &Arc<Self>) -> Awaited {
        Awaited { challenges: self.clone(), tokens: Vec::new(), names: Vec::new() }
    }
}

impl Awaited {
    /// Adds a token and its response.
    pub fn token(&mut self, token: &str, answer: &str) {
        change(&self.challenges.tokens, |tokens| drop(tokens.insert(token.into(), answer.into())));
        self.tokens.push(token.into());
    }

    /// Adds a name and its TLS context.
    pub fn name(&mut self, name: &str, context: &SslContext) {
        change(&self.challenges.names, |names| drop(names.insert(name.into(), context.clone())));
        self.names.push(name.into());
    }
}

impl Drop for Awaited {
    fn drop(&mut self) {
        change(&self.challenges.tokens, |tokens| tokens.retain(|token, _| !self.tokens.contains(token)));
        change(&self.challenges.names, |names| names.retain(|name, _| !self.names.contains(name)));
    }
}

fn change<V: Clone>(map: &ArcSwap<HashMap<Box<str>, V>>, change: impl Fn(&mut HashMap<Box<str>, V>)) {
    map.rcu(|before| {
        let mut next = HashMap::clone(before);
        change(&mut next);
        next
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::Metrics;
    use pingora::tls::ssl::SslMethod;

    #[test]
    fn what_is_waited_for_is_answered_and_nothing_else() {
        let challenges = Challenges::new(Metrics::new(10, Vec::new()).challenges());
        let context = SslContext::builder(SslMethod::tls()).expect("a context").build();
        let acme = |name: Option<&str>, acme| {
            let mut hello = Hello::default();
            (hello.name, hello.acme) = (name.map(Into::into), acme);
            hello
        };
        let mut first = challenges.wait();
        first.token("abc", "abc.key");
        first.name("a.test", &context);
        let mut second = challenges.wait();
        second.token("def", "def.key");

        assert_eq!(challenges.http("/.well-known/acme-challenge/abc").as_deref(), Some("abc.key"));
        for path in ["/.well-known/acme-challenge/", "/.well-known/acme-challenge/x", "/abc", "abc", ""] {
            assert_eq!(challenges.http(path), None, "{path}");
        }
        assert!(challenges.tls(&acme(Some("a.test"), true)).is_some());
        assert!(
            challenges.tls(&acme(Some("a.test"), false)).is_none()
                && challenges.tls(&acme(Some("b.test"), true)).is_none()
        );
        assert!(challenges.tls(&acme(None, true)).is_none());

        drop(first);
        assert_eq!(challenges.http("/.well-known/acme-challenge/abc"), None);
        assert!(challenges.tls(&acme(Some("a.test"), true)).is_none());
        assert_eq!(challenges.http("/.well-known/acme-challenge/def").as_deref(), Some("def.key"));
    }
}
