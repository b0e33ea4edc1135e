//! `api_key`: admits requests with a key from a file of hashed keys.
//!
//! ```yaml
//! - api_key:
//!     keys: { path: /etc/forebay/keys.txt, refresh: 60s, max_size: 16MiB }
//!     header: X-Api-Key          # where it is; in `Authorization`, after `Bearer`
//!     query: api_key             # or here, if there is no such header
//!     user_header: X-Api-Client  # for the upstream: the key's name; the client's own is removed
//!     forward: false             # true: the upstream gets the key as well
//! ```
//!
//! A line of the file is a name, a colon and the SHA-256 of the key in hexadecimal. A name may have several keys, so
//! that a key can be rotated. `printf %s "$KEY" | sha256sum` prints the hash. Unlike a password, a key is long and
//! random, so that a fast hash suffices: use at least 128 random bits.

use std::collections::HashMap;
use std::sync::Arc;

use async_trait::async_trait;
use boring::memcmp;
use http::header::AUTHORIZATION;
use http::uri::PathAndQuery;
use http::{HeaderName, HeaderValue, Uri};
use pingora::http::RequestHeader;
use schemars::JsonSchema;
use serde::Deserialize;
use sha2::{Digest, Sha256};

use super::auth::{Gate, challenge, credentials, own_header, set_own};
use super::listed::{Listed, Source, lines};
use super::{Filter, FilterType, Scope, Stages, Surroundings, Verdict, field};
use crate::error::{BuildError, Refusal};
use crate::expression::Identity;
use crate::expression::fields::{argument, decoded};
use crate::metrics::filters::Access;

/// Admits requests with a key from a file of hashed keys, and answers others with 401.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// The file. Each line is a name, a colon and the SHA-256 of a key in hexadecimal.
    pub keys: Source,
    /// The header with the key. In `Authorization`, the key follows `Bearer`.
    #[serde(default = "Settings::header")]
    pub header: String,
    /// The query argument that may contain the key instead. Logs then contain the key.
    #[serde(default)]
    pub query: Option<String>,
    /// The header with the name of the key for the upstream. The client's own header of this name is removed.
    #[serde(default)]
    pub user_header: Option<String>,
    /// Whether the key is also sent to the upstream.
    #[serde(default)]
    pub forward: bool,
}

impl Settings {
    fn header() -> String {
        "X-Api-Key".to_owned()
    }
}

static MISSING: Refusal = Refusal::new("route.api_key_missing", 401, "Show a key.");
static UNKNOWN: Refusal = Refusal::new("route.api_key_unknown", 401, "This key is not known here.");

/// Admits requests with a key.
pub struct ApiKey {
    keys: Arc<Listed<Keys>>,
    header: HeaderName,
    query: Option<String>,
    user_header: Option<HeaderName>,
    forward: bool,
    challenge: HeaderValue,
    gate: Gate,
}

#[async_trait]
impl Filter for ApiKey {
    fn stages(&self) -> Stages {
        Stages::REQUEST
    }

    fn own_headers(&self) -> Vec<HeaderName> {
        self.user_header.iter().cloned().collect()
    }

    async fn request(&self, scope: &mut Scope<'_>) -> Verdict {
        set_own(scope.request, self.user_header.as_ref(), None);
        let name = match self.shown(scope.request) {
            Shown::Nothing => return self.gate.refuse(Access::Missing, &MISSING, challenge(&self.challenge)),
            Shown::Several => None,
            Shown::Digest(digest) => self.keys.now().name(&digest).map(Box::<str>::from),
        };
        let Some(name) = name else {
            return self.gate.refuse(Access::Wrong, &UNKNOWN, challenge(&self.challenge));
        };
        self.gate.count(Access::Granted);
        if !self.forward {
            scope.request.remove_header(&self.header);
            if let Some(query) = &self.query {
                without_argument(scope.request, query);
            }
        }
        set_own(scope.request, self.user_header.as_ref(), Some(&name));
        scope.identify(Identity { user: name, by: Self::KEY, claims: Vec::new() });
        Verdict::Continue
    }
}

impl FilterType for ApiKey {
    const KEY: &'static str = "api_key";
    const REFUSALS: &'static [&'static Refusal] = &[&MISSING, &UNKNOWN];
    type Settings = Settings;

    fn build(settings: &Settings, around: &Surroundings<'_>) -> Result<Self, BuildError> {
        let header = field::free_name(&settings.header).map_err(|told| BuildError::new("header", told))?;
        if settings.query.as_ref().is_some_and(String::is_empty) {
            return Err(BuildError::new("query", "a query argument needs a name"));
        }
        // RFC 9110 §11.6.1 requires a challenge with each 401, but no scheme is registered for keys.
        let scheme = if header == AUTHORIZATION { "Bearer" } else { "ApiKey" };
        let written = HeaderValue::try_from(format!("{scheme} realm=\"keys\""));
        Ok(ApiKey {
            keys: Listed::build(&settings.keys, around, Keys::parse).map_err(|error| error.under("keys"))?,
            header,
            query: settings.query.clone(),
            user_header: own_header(settings.user_header.as_ref(), "user_header")?,
            forward: settings.forward,
            challenge: written.map_err(|error| BuildError::new("header", error.to_string()))?,
            gate: Gate::of(around),
        })
    }
}

/// The key of a request.
enum Shown {
    Nothing,
    /// There are several, and the backend could use another one.
    Several,
    Digest([u8; 32]),
}

impl Shown {
    fn of(key: &[u8]) -> Shown {
        Shown::Digest(Sha256::digest(key).into())
    }
}

impl ApiKey {
    fn shown(&self, request: &RequestHeader) -> Shown {
        if self.header == AUTHORIZATION {
            match credentials(&request.headers, "Bearer") {
                Ok(Some(key)) => return Shown::of(key.as_bytes()),
                Ok(None) => {}
                Err(()) => return Shown::Several,
            }
        } else {
            let mut fields = request.headers.get_all(&self.header).iter();
            match (fields.next(), fields.next()) {
                (Some(key), None) => return Shown::of(key.as_bytes()),
                (Some(_), Some(_)) => return Shown::Several,
                (None, _) => {}
            }
        }
        let query = request.uri.query().zip(self.query.as_ref());
        match query.and_then(|(query, name)| argument(query, name.as_bytes())) {
            Some(key) => Shown::of(&decoded(key).collect::<Vec<_>>()),
            None => Shown::Nothing,
        }
    }
}

/// The names of keys by their digests.
#[derive(Debug)]
struct Keys(HashMap<[u8; 32], Box<str>>);

impl Keys {
    fn parse(text: &str) -> Result<Keys, String> {
        let mut keys = HashMap::new();
        for (number, line) in lines(text) {
            let (name, digest) = line
                .rsplit_once(':')
                .filter(|(name, _)| !name.is_empty())
                .ok_or_else(|| format!("line {number} is not `name:sha256`"))?;
            let digest = hex(digest.trim()).ok_or_else(|| {
                format!("line {number}: expected 64 hexadecimal digits behind `{name}:`, the SHA-256 of the key")
            })?;
            if keys.insert(digest, name.into()).is_some() {
                return Err(format!("line {number}: the key of `{name}` is there twice"));
            }
        }
        if keys.is_empty() {
            // While a file is being written, it may be empty for a moment.
            return Err("there is no key in it".to_owned());
        }
        Ok(Keys(keys))
    }

    /// The name of the key with this digest. The map is indexed by a hash, with a seed of this process, of the digest
    /// of the received key, so that the time of a lookup reveals nothing about other keys. The final comparison takes
    /// constant time.
    fn name(&self, digest: &[u8; 32]) -> Option<&str> {
        let (known, name) = self.0.get_key_value(digest)?;
        memcmp::eq(known, digest).then_some(&**name)
    }
}

fn hex(text: &str) -> Option<[u8; 32]> {
    let digits = text.as_bytes();
    let mut bytes = [0; 32];
    if digits.len() != 64 {
        return None;
    }
    for (byte, pair) in bytes.iter_mut().zip(digits.chunks(2)) {
        let digit = |digit: u8| char::from(digit).to_digit(16).and_then(|digit| u8::try_from(digit).ok());
        *byte = digit(pair[0])? << 4 | digit(pair[1])?;
    }
    Some(bytes)
}

/// Removes an argument from the query of a request.
fn without_argument(request: &mut RequestHeader, name: &str) {
    let Some(query) = request.uri.query() else { return };
    let is_other = |pair: &&str| {
        let key = pair.split_once('=').map_or(*pair, |(key, _)| key);
        !decoded(key).eq(name.bytes())
    };
    let rest: Vec<&str> = query.split('&').filter(is_other).collect();
    if rest.len() == query.split('&').count() {
        return;
    }
    let mark = if rest.is_empty() { "" } else { "?" };
    let target = format!("{}{mark}{}", request.uri.path(), rest.join("&"));
    let mut parts = request.uri.clone().into_parts();
    parts.path_and_query = PathAndQuery::try_from(target).ok();
    if let Ok(uri) = Uri::from_parts(parts) {
        request.set_uri(uri);
    }
}

#[cfg(test)]
mod tests {
    use super::super::rehearsal::{Rehearsal, error, values};
    use super::*;

    /// `secret` and `other`, hashed by `sha256sum`.
    const FILE: &str = "shop:2bb80d537b1da3e38bd30361aa855686bde0eacd7162fef6a25fe97bf527a25b\n\
                        # the next one of the same\n\
                        shop:d9298a10d1b0735837dc4bd85dac641b0f3cef27a47e5d53a54f2f3f5b2fcffa\n";

    fn rehearsal(settings: &str) -> Rehearsal {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), FILE).unwrap();
        let user = "user_header: X-Api-Client";
        Rehearsal::of(&format!("- api_key: {{ keys: {{ path: {} }}, {user}, {settings} }}", file.path().display()))
    }

    #[test]
    fn a_client_with_a_key_is_let_in_and_the_upstream_gets_its_name_alone() {
        for key in ["secret", "other"] {
            let headers = [("x-api-key", key), ("x-api-client", "forged")];
            let mut rehearsal = rehearsal("query: key").asking("/", &headers);
            let headers = &rehearsal.pass().headers;
            assert_eq!(values(headers, "x-api-client"), ["shop"]);
            assert_eq!(values(headers, "x-api-key"), [""; 0]);
        }
        let mut bearer = rehearsal("header: Authorization").asking("/", &[("authorization", "bearer secret")]);
        assert_eq!(values(&bearer.pass().headers, "authorization"), [""; 0]);
        let mut forwarded = rehearsal("forward: true").asking("/", &[("x-api-key", "secret")]);
        assert_eq!(values(&forwarded.pass().headers, "x-api-key"), ["secret"]);
    }

    #[test]
    fn a_key_in_the_query_is_taken_out_of_it() {
        for (asked, left) in [
            ("/a?key=secret", "/a"),
            ("/a?x=1&key=s%65cret&y=2", "/a?x=1&y=2"),
            ("/a?%6bey=secret&key=secret&x", "/a?x"),
        ] {
            let mut rehearsal = rehearsal("query: key").asking(asked, &[]);
            assert_eq!(rehearsal.pass().uri, left, "{asked}");
        }
    }

    #[test]
    fn a_client_without_a_key_or_with_another_is_refused_with_a_challenge() {
        let refused = |headers: &[(&'static str, &str)], target: &str| {
            let refused = rehearsal("query: key").asking(target, headers).refused();
            let challenge = refused.headers[0].1.to_str().unwrap().to_owned();
            assert_eq!((refused.refusal.status, &*challenge), (401, "ApiKey realm=\"keys\""));
            refused.refusal.reason
        };
        assert_eq!(refused(&[("x-api-client", "shop")], "/"), "route.api_key_missing");
        assert_eq!(refused(&[("x-api-key", "Secret")], "/"), "route.api_key_unknown");
        assert_eq!(refused(&[("x-api-key", "")], "/"), "route.api_key_unknown");
        assert_eq!(refused(&[("x-api-key", "x"), ("x-api-key", "secret")], "/"), "route.api_key_unknown");
        assert_eq!(refused(&[("x-api-key", "x")], "/?key=secret"), "route.api_key_unknown");
    }

    #[test]
    fn what_is_wrong_in_the_file_is_told_with_its_line() {
        let told = |text: &str| Keys::parse(text).map(drop).unwrap_err();
        assert_eq!(told(" \n"), "there is no key in it");
        assert_eq!(told("# a\nsecret"), "line 2 is not `name:sha256`");
        assert!(told("shop:secret").starts_with("line 1: expected 64 hexadecimal digits behind `shop:`"));
        assert!(told(&format!("{FILE}{FILE}")).ends_with("the key of `shop` is there twice"));
        assert!(error("- api_key: { keys: { path: x }, header: Host }").starts_with("[0].api_key.header: "));
        assert!(error("- api_key: { keys: { path: x }, query: '' }").starts_with("[0].api_key.query: "));
    }
}
