//! `jwt`: lets those in who show a token that somebody known has signed (RFC 7519, RFC 7515).
//!
//! ```yaml
//! - jwt:
//!     keys: { file: { path: /etc/forebay/jwks.json, refresh: 60s, max_size: 16MiB } }
//!     # or: { service: { upstream: idp, path: /.well-known/jwks.json, refresh: 10m, retry: 10s, keep: 1d, timeout: 5s, max_size: 256KiB } }
//!     algorithms: [RS256, ES256] # with which tokens may be signed
//!     issuer: ["https://idp.example.com/"]   # one of these is in `iss`
//!     audience: [shop]           # one of these is in `aud`
//!     leeway: 60s                # how far clocks may be apart
//!     require: [exp]             # claims that must be there
//!     from: { header: Authorization }   # or { cookie: session }, { query: token }
//!     claims: { X-User: sub, X-Roles: realm_access.roles }   # claims to headers; a client's own are removed
//!     user: sub                  # the claim that is `auth.user` in expressions
//!     optional: false            # true: requests without a token pass
//!     forward: false             # true: the upstream gets the token as well
//!     max_token: 8KiB            # a longer one is refused unread
//!     realm: Restricted
//! ```
//!
//! A token is refused if it is signed with another algorithm than those written here, or with one that is not that of
//! the key; `none` is no algorithm. What a token says of keys itself (`jku`, `jwk`, `x5u`, `x5c`) is not looked at, and
//! one with `crit` is refused (RFC 7515 §4.1.11). A token with `aud` is refused where no audience is written (RFC 7519
//! §4.1.3). Expressions behind this read `jwt.claims`.

mod crypto;
mod keys;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use http::header::{AUTHORIZATION, COOKIE, RETRY_AFTER};
use http::uri::PathAndQuery;
use http::{HeaderName, HeaderValue};
use jsonwebtoken::errors::ErrorKind;
use jsonwebtoken::{Algorithm, Header, Validation, decode, decode_header};
use pingora::http::RequestHeader;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::auth::{Gate, challenge, credentials, realm, set_own};
use super::listed::{Listed, Source};
use super::{Filter, FilterType, Key, Scope, Stages, Surroundings, Verdict, field};
use crate::config;
use crate::config::units::{Size, Time};
use crate::error::{BuildError, Refusal, path};
use crate::expression::Identity;
use crate::expression::fields::cookies;
use crate::metrics::filters::Access;
use keys::{KeySet, Keys, Known, Service, Terms};

/// Lets those in who show a token that is signed with a known key, in force, and meant for us; others are answered 401.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// Where the keys come from.
    pub keys: KeysFrom,
    /// The algorithms with which tokens may be signed. `HS256` and the like need keys that are secret.
    #[serde(default = "Settings::algorithms")]
    pub algorithms: Vec<Signing>,
    /// Who may have made a token: one of these is its `iss`. Anybody who has a key, if empty.
    #[serde(default)]
    pub issuer: Vec<String>,
    /// Whom a token may be meant for: one of these is in its `aud`. If empty, one that has an `aud` is refused.
    #[serde(default)]
    pub audience: Vec<String>,
    /// How far the clocks of who makes tokens and of this machine may be apart, at most 10 minutes.
    #[serde(default = "Settings::leeway")]
    pub leeway: Time,
    /// Claims that a token must have. Without `exp` among them, one without an end is accepted.
    #[serde(default = "Settings::require")]
    pub require: Vec<String>,
    /// Where the token is shown; in `Authorization`, behind `Bearer`.
    #[serde(default = "Settings::from")]
    pub from: Carrier,
    /// Headers that the upstream gets, with the claims that are their values. What a client sends under these names is
    /// removed. A claim inside of others is written with dots; the items of a list are joined by `, `.
    #[serde(default)]
    pub claims: BTreeMap<String, String>,
    /// The claim that is `auth.user` in expressions.
    #[serde(default = "Settings::user")]
    pub user: String,
    /// Whether requests without a token pass. One that is shown must be right all the same.
    #[serde(default)]
    pub optional: bool,
    /// Whether the upstream gets the token as well.
    #[serde(default)]
    pub forward: bool,
    /// A longer token is refused unread.
    #[serde(default = "Settings::max_token")]
    pub max_token: Size,
    /// What the challenge of a 401 calls this place.
    #[serde(default = "Settings::realm")]
    pub realm: String,
}

/// Where the keys come from.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum KeysFrom {
    /// A file with a JWK set; it is read again when it changes.
    File(Source),
    /// A service that has a JWK set.
    Service(Asked),
}

/// A service that has a JWK set.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Asked {
    /// The upstream that is asked.
    pub upstream: String,
    /// For which path.
    #[serde(default = "Asked::path")]
    pub path: String,
    /// Keys that are older are asked for anew; so they are when a token names one that is not there.
    #[serde(default = "Asked::refresh")]
    pub refresh: Time,
    /// The service is not asked more often than this, whatever clients show.
    #[serde(default = "Asked::retry")]
    pub retry: Time,
    /// How long keys are of use while the service does not answer; then requests are answered 503.
    #[serde(default = "Asked::keep")]
    pub keep: Time,
    /// How long its answer may take.
    #[serde(default = "Asked::timeout")]
    pub timeout: Time,
    /// How much it may have.
    #[serde(default = "Asked::max_size")]
    pub max_size: Size,
}

/// Where a token is shown.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Carrier {
    /// In a header; in `Authorization`, behind `Bearer`.
    Header(String),
    /// In a cookie.
    Cookie(String),
    /// In an argument of the query, which stands in logs.
    Query(String),
}

/// An algorithm of signatures (RFC 7518 §3.1, RFC 8037).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[expect(missing_docs, reason = "they are called what the RFC calls them")]
pub enum Signing {
    RS256,
    RS384,
    RS512,
    PS256,
    PS384,
    PS512,
    ES256,
    ES384,
    EdDSA,
    HS256,
    HS384,
    HS512,
}

impl From<Signing> for Algorithm {
    fn from(signing: Signing) -> Algorithm {
        match signing {
            Signing::RS256 => Algorithm::RS256,
            Signing::RS384 => Algorithm::RS384,
            Signing::RS512 => Algorithm::RS512,
            Signing::PS256 => Algorithm::PS256,
            Signing::PS384 => Algorithm::PS384,
            Signing::PS512 => Algorithm::PS512,
            Signing::ES256 => Algorithm::ES256,
            Signing::ES384 => Algorithm::ES384,
            Signing::EdDSA => Algorithm::EdDSA,
            Signing::HS256 => Algorithm::HS256,
            Signing::HS384 => Algorithm::HS384,
            Signing::HS512 => Algorithm::HS512,
        }
    }
}

impl Settings {
    fn algorithms() -> Vec<Signing> {
        vec![Signing::RS256, Signing::ES256]
    }

    fn leeway() -> Time {
        Time(Duration::from_secs(60))
    }

    fn require() -> Vec<String> {
        vec!["exp".to_owned()]
    }

    fn from() -> Carrier {
        Carrier::Header("Authorization".to_owned())
    }

    fn user() -> String {
        "sub".to_owned()
    }

    fn max_token() -> Size {
        Size(8 << 10)
    }

    fn realm() -> String {
        "Restricted".to_owned()
    }
}

impl Asked {
    fn path() -> String {
        "/.well-known/jwks.json".to_owned()
    }

    fn refresh() -> Time {
        Time(Duration::from_secs(600))
    }

    fn retry() -> Time {
        Time(Duration::from_secs(10))
    }

    fn keep() -> Time {
        Time(Duration::from_secs(86_400))
    }

    fn timeout() -> Time {
        Time(Duration::from_secs(5))
    }

    fn max_size() -> Size {
        Size(256 << 10)
    }
}

static MISSING: Refusal = Refusal::new("route.jwt_missing", 401, "Show a token.");
static INVALID: Refusal = Refusal::new("route.jwt_invalid", 401, "This token is not accepted.");
static EXPIRED: Refusal = Refusal::new("route.jwt_expired", 401, "This token has expired, or is not valid yet.");
static MEANT: Refusal =
    Refusal::new("route.jwt_audience", 401, "The issuer or the audience of this token is not accepted here.");
static UNAVAILABLE: Refusal =
    Refusal::new("route.jwt_unavailable", 503, "The keys for tokens are not available; try again later.");

/// What claims may have together, in bytes and in number; what exceeds it is left out.
const CLAIMS_BYTES_MAX: usize = 16 << 10;
const CLAIMS_MAX: usize = 256;
/// Claims inside of claims, so deep.
const DEPTH_MAX: usize = 4;

/// Lets those in who have a token.
pub struct Jwt {
    keys: Keys,
    /// What is asked of a token that is signed with an algorithm.
    validations: Vec<Validation>,
    from: Place,
    claims: Vec<(HeaderName, Box<str>)>,
    user: Box<str>,
    optional: bool,
    forward: bool,
    token_bytes_max: usize,
    missing: HeaderValue,
    invalid: HeaderValue,
    gate: Gate,
}

/// Where a token is shown.
enum Place {
    Header(HeaderName),
    Cookie(Box<[u8]>),
    Query(Key),
}

/// What a request shows.
#[derive(Debug, PartialEq, Eq)]
enum Shown {
    Nothing,
    /// More than one: the backend could take another one for the token.
    Several,
    Token(String),
}

/// Why a token is not accepted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Flaw {
    /// It is none, is signed in a way that is not accepted, or not at all.
    Invalid,
    /// The key that it names is not known.
    UnknownKey,
    /// It is not in force any more, or not yet.
    Expired,
    /// It is meant for others, or made by others.
    Meant,
}

#[async_trait]
impl Filter for Jwt {
    fn stages(&self) -> Stages {
        Stages::REQUEST
    }

    fn own_headers(&self) -> Vec<HeaderName> {
        self.claims.iter().map(|(name, _)| name.clone()).collect()
    }

    async fn request(&self, scope: &mut Scope<'_>) -> Verdict {
        for (name, _) in &self.claims {
            set_own(scope.request, Some(name), None);
        }
        let token = match self.from.shown(scope) {
            Shown::Token(token) => token,
            Shown::Several => return self.flawed(Flaw::Invalid),
            Shown::Nothing if self.optional => {
                self.gate.count(Access::Anonymous);
                return Verdict::Continue;
            }
            Shown::Nothing => return self.gate.refuse(Access::Missing, &MISSING, challenge(&self.missing)),
        };
        let (header, validation) = match self.header(&token) {
            Ok(known) => known,
            Err(flaw) => return self.flawed(flaw),
        };
        let Some(keys) = self.keys.now().await else {
            return self.gate.refuse(Access::Unavailable, &UNAVAILABLE, vec![(RETRY_AFTER, HeaderValue::from(5))]);
        };
        let mut checked = checked(&token, &header, validation, &keys);
        if checked == Err(Flaw::UnknownKey)
            && let Some(keys) = self.keys.newer(&keys).await
        {
            checked = self::checked(&token, &header, validation, &keys);
        }
        match checked {
            Ok(claims) => self.accept(scope, &claims),
            Err(flaw) => self.flawed(flaw),
        }
    }
}

impl FilterType for Jwt {
    const KEY: &'static str = "jwt";
    const REFUSALS: &'static [&'static Refusal] = &[&MISSING, &INVALID, &EXPIRED, &MEANT, &UNAVAILABLE];
    type Settings = Settings;

    fn build(settings: &Settings, around: &Surroundings<'_>) -> Result<Self, BuildError> {
        crypto::install();
        if settings.algorithms.is_empty() {
            return Err(BuildError::new("algorithms", "no algorithm is named, so that no token would be accepted"));
        }
        if settings.leeway.0 > Duration::from_secs(600) {
            return Err(BuildError::new("leeway", "clocks that are further apart than `10m` are to be set"));
        }
        if let Some(index) = settings.require.iter().position(|claim| !REQUIRABLE.contains(&claim.as_str())) {
            let told = format!("one of `{}` can be asked for; for others, write `when:`", REQUIRABLE.join("`, `"));
            return Err(BuildError::new(format!("require[{index}]"), told));
        }
        let realm = realm(&settings.realm)?;
        let challenge =
            |text: String| HeaderValue::try_from(text).map_err(|error| BuildError::new("realm", error.to_string()));
        let claim = |(written, claim): (&String, &String)| {
            let name = field::free_name(written).map_err(|told| BuildError::at_key(written, told).under("claims"))?;
            if claim.is_empty() {
                return Err(BuildError::new(path::key(written), "a claim needs a name").under("claims"));
            }
            Ok((name, claim.as_str().into()))
        };
        Ok(Jwt {
            validations: settings.algorithms.iter().map(|&signing| validation(settings, signing.into())).collect(),
            from: Place::build(&settings.from).map_err(|error| error.under("from"))?,
            claims: settings.claims.iter().map(claim).collect::<Result<_, _>>()?,
            user: settings.user.as_str().into(),
            optional: settings.optional,
            forward: settings.forward,
            token_bytes_max: usize::try_from(settings.max_token.0).unwrap_or(usize::MAX),
            missing: challenge(format!("Bearer realm=\"{realm}\""))?,
            invalid: challenge(format!("Bearer realm=\"{realm}\", error=\"invalid_token\""))?,
            keys: keys(&settings.keys, around).map_err(|error| error.under("keys"))?,
            gate: Gate::of(around),
        })
    }
}

/// The claims whose presence the library looks at.
const REQUIRABLE: [&str; 5] = ["exp", "nbf", "iss", "aud", "sub"];

/// What is asked of a token that is signed with this algorithm.
fn validation(settings: &Settings, algorithm: Algorithm) -> Validation {
    let mut validation = Validation::new(algorithm);
    let mut required = settings.require.clone();
    if !settings.issuer.is_empty() {
        validation.set_issuer(&settings.issuer);
        required.push("iss".to_owned());
    }
    if !settings.audience.is_empty() {
        validation.set_audience(&settings.audience);
        required.push("aud".to_owned());
    }
    validation.set_required_spec_claims(&required);
    validation.leeway = settings.leeway.0.as_secs();
    validation.validate_nbf = true;
    validation
}

fn keys(written: &KeysFrom, around: &Surroundings<'_>) -> Result<Keys, BuildError> {
    let asked = match written {
        KeysFrom::File(source) => {
            let listed = Listed::build(source, around, KeySet::parse).map_err(|error| error.under("file"))?;
            return Ok(Keys::File(listed));
        }
        KeysFrom::Service(asked) => asked,
    };
    let wrong = |key: &str, told: &str| BuildError::new(key, told).under("service");
    let caller = around.caller(&asked.upstream).map_err(|error| error.under("upstream").under("service"))?;
    let target = asked.path.parse::<PathAndQuery>().ok().filter(|_| asked.path.starts_with('/'));
    let target = target.ok_or_else(|| wrong("path", "write a path such as `/.well-known/jwks.json`"))?;
    for (key, time) in
        [("refresh", asked.refresh), ("retry", asked.retry), ("keep", asked.keep), ("timeout", asked.timeout)]
    {
        if time.0.is_zero() {
            return Err(wrong(key, "no time is too short: write `1s` or more"));
        }
    }
    if asked.keep.0 < asked.refresh.0 {
        return Err(wrong("keep", "this is shorter than `refresh`, so that keys would be of no use in between"));
    }
    Ok(Keys::Service(Arc::new(Service {
        caller,
        target,
        terms: Terms {
            refresh: asked.refresh.0,
            retry: asked.retry.0,
            keep: asked.keep.0,
            timeout: asked.timeout.0,
            bytes_max: usize::try_from(asked.max_size.0).unwrap_or(usize::MAX),
        },
        loads: around.metrics.map(|metrics| metrics.loads(around.route, around.filter)),
        asking: tokio::sync::Mutex::new(()),
        // They outlive a reload, if the service stays the same.
        known: around.keep(&format!("{asked:?}"), || Mutex::new(Known::default())),
    })))
}

impl Place {
    fn build(written: &Carrier) -> Result<Place, BuildError> {
        let key = |key: config::Key| Key::build(&key);
        Ok(match written {
            Carrier::Header(name) => {
                Place::Header(field::free_name(name).map_err(|told| BuildError::new("header", told))?)
            }
            Carrier::Cookie(name) => {
                key(config::Key::Cookie(name.clone()))?;
                Place::Cookie(name.as_bytes().into())
            }
            Carrier::Query(name) => Place::Query(key(config::Key::Query(name.clone()))?),
        })
    }

    fn shown(&self, scope: &Scope<'_>) -> Shown {
        let headers = &scope.request.headers;
        let text = |bytes: &[u8]| match std::str::from_utf8(bytes) {
            Ok(text) => Shown::Token(text.to_owned()),
            Err(_) => Shown::Several,
        };
        match self {
            Place::Header(name) if *name == AUTHORIZATION => match credentials(headers, "Bearer") {
                Ok(Some(token)) => Shown::Token(token.to_owned()),
                Ok(None) => Shown::Nothing,
                Err(()) => Shown::Several,
            },
            Place::Header(name) => one(headers.get_all(name).iter().map(HeaderValue::as_bytes))
                .map_or(Shown::Several, |it| it.map_or(Shown::Nothing, text)),
            Place::Cookie(name) => {
                one(cookies(headers, name)).map_or(Shown::Several, |it| it.map_or(Shown::Nothing, text))
            }
            Place::Query(key) => key.of(&scope.asked()).map_or(Shown::Nothing, |value| text(&value.bytes())),
        }
    }

    /// Takes the token out of a request.
    fn remove(&self, request: &mut RequestHeader) {
        match self {
            Place::Header(name) => drop(request.remove_header(name)),
            Place::Cookie(name) => without_cookie(request, name),
            // What stands in the target is what the client asks for; it stays.
            Place::Query(_) => {}
        }
    }
}

/// The only one of some values; `None` if there are several.
fn one<'h>(mut values: impl Iterator<Item = &'h [u8]>) -> Option<Option<&'h [u8]>> {
    let first = values.next();
    values.next().is_none().then_some(first)
}

/// Takes a cookie out of a request, and leaves the others.
fn without_cookie(request: &mut RequestHeader, name: &[u8]) {
    let is_other = |pair: &&[u8]| pair.trim_ascii().strip_prefix(name).is_none_or(|rest| !rest.starts_with(b"="));
    let lines = request.headers.get_all(COOKIE).iter();
    let pairs = lines.flat_map(|line| line.as_bytes().split(|&byte| byte == b';')).filter(is_other);
    let left = pairs.map(<[u8]>::trim_ascii).filter(|pair| !pair.is_empty()).collect::<Vec<_>>().join(&b"; "[..]);
    request.remove_header(&COOKIE);
    if let Some(left) = HeaderValue::from_bytes(&left).ok().filter(|left| !left.is_empty()) {
        // What was taken away has left room for it.
        let _ = request.insert_header(COOKIE, left);
    }
}

impl Jwt {
    /// The header of a token, and what is asked of one with its algorithm.
    fn header(&self, token: &str) -> Result<(Header, &Validation), Flaw> {
        if token.len() > self.token_bytes_max {
            return Err(Flaw::Invalid);
        }
        let header = decode_header(token).map_err(|_| Flaw::Invalid)?;
        if header.crit.is_some() {
            return Err(Flaw::Invalid);
        }
        let validation = self.validations.iter().find(|validation| validation.algorithms.contains(&header.alg));
        validation.map(|validation| (header, validation)).ok_or(Flaw::Invalid)
    }

    fn accept(&self, scope: &mut Scope<'_>, claims: &Map<String, Value>) -> Verdict {
        let user = claims.get(&*self.user).and_then(Value::as_str).unwrap_or_default();
        let identity = Identity { user: user.into(), by: Self::KEY, claims: flat(claims) };
        if !self.forward {
            self.from.remove(scope.request);
        }
        for (name, claim) in &self.claims {
            set_own(scope.request, Some(name), Some(&identity.claim(claim.as_bytes()).join(", ")));
        }
        self.gate.count(Access::Granted);
        scope.identify(identity);
        Verdict::Continue
    }

    fn flawed(&self, flaw: Flaw) -> Verdict {
        let (access, refusal) = match flaw {
            Flaw::Invalid | Flaw::UnknownKey => (Access::Wrong, &INVALID),
            Flaw::Expired => (Access::Wrong, &EXPIRED),
            Flaw::Meant => (Access::Forbidden, &MEANT),
        };
        self.gate.refuse(access, refusal, challenge(&self.invalid))
    }
}

/// The claims of a token that is signed with one of these keys, in force, and meant for us.
fn checked(token: &str, header: &Header, validation: &Validation, keys: &KeySet) -> Result<Map<String, Value>, Flaw> {
    let mut flaw = Flaw::UnknownKey;
    for key in keys.of(header.kid.as_deref(), header.alg) {
        match decode::<Map<String, Value>>(token, key, validation) {
            Ok(decoded) => return Ok(decoded.claims),
            Err(error) => match error.kind() {
                // Perhaps it is another key's, if it names none.
                ErrorKind::InvalidSignature => flaw = Flaw::Invalid,
                ErrorKind::ExpiredSignature | ErrorKind::ImmatureSignature => return Err(Flaw::Expired),
                ErrorKind::InvalidAudience | ErrorKind::InvalidIssuer => return Err(Flaw::Meant),
                _ => return Err(Flaw::Invalid),
            },
        }
    }
    Err(flaw)
}

/// The claims of a token by their names, those inside of others with dots; as texts, in the order of their names.
fn flat(claims: &Map<String, Value>) -> Vec<(Box<str>, Vec<Box<str>>)> {
    let (mut found, mut left) = (BTreeMap::new(), CLAIMS_BYTES_MAX);
    flatten(claims, "", DEPTH_MAX, &mut left, &mut found);
    found.into_iter().collect()
}

fn flatten(
    claims: &Map<String, Value>,
    within: &str,
    depth: usize,
    left: &mut usize,
    found: &mut BTreeMap<Box<str>, Vec<Box<str>>>,
) {
    for (name, value) in claims {
        let name = if within.is_empty() { name.clone() } else { format!("{within}.{name}") };
        let values: Vec<Box<str>> = match value {
            Value::Object(inner) => {
                if depth > 1 {
                    flatten(inner, &name, depth - 1, left, found);
                }
                continue;
            }
            Value::Array(items) => items.iter().filter_map(text).collect(),
            value => text(value).into_iter().collect(),
        };
        let bytes = name.len() + values.iter().map(|value| value.len()).sum::<usize>();
        if values.is_empty() || bytes > *left || found.len() >= CLAIMS_MAX {
            continue;
        }
        *left -= bytes;
        // A name with a dot of its own gives way to none: the first one stays.
        found.entry(name.into()).or_insert(values);
    }
}

/// A claim as text; none for what has parts.
fn text(value: &Value) -> Option<Box<str>> {
    match value {
        Value::String(text) => Some(text.as_str().into()),
        Value::Number(number) => Some(number.to_string().into()),
        Value::Bool(truth) => Some(truth.to_string().into()),
        Value::Null | Value::Array(_) | Value::Object(_) => None,
    }
}

#[cfg(test)]
mod tests;
