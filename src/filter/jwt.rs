//! `jwt`: admits requests with a token that is signed with a known key (RFC 7519, RFC 7515).
//!
//! ```yaml
//! - jwt:
//!     keys: { file: { path: /etc/forebay/jwks.json, refresh: 60s, max_size: 16MiB } }
//!     # or: { service: { upstream: idp, path: /.well-known/jwks.json, refresh: 10m, retry: 10s, keep: 1d, timeout: 5s, max_size: 256KiB } }
//!     algorithms: [RS256, ES256] # accepted ones
//!     issuer: ["https://idp.example.com/"]   # one of these is in `iss`
//!     audience: [shop]           # one of these is in `aud`
//!     leeway: 60s                # tolerated difference between clocks
//!     require: [exp]             # required claims
//!     from: { header: Authorization }   # or { cookie: session }, { query: token }
//!     claims: { X-User: sub, X-Roles: realm_access.roles }   # claims as headers; the client's own are removed
//!     user: sub                  # the claim that is `auth.user` in expressions
//!     optional: false            # true: requests without a token pass
//!     forward: false             # true: the upstream gets the token as well
//!     max_token: 8KiB            # longer ones are refused unread
//!     realm: Restricted
//! ```
//!
//! A token is refused if its algorithm is not in `algorithms` or does not fit the key; `none` is never accepted. The
//! filter ignores keys in the token (`jku`, `jwk`, `x5u`, `x5c`), and refuses tokens with `crit` (RFC 7515 §4.1.11).
//! It refuses a token with `aud` if no audience is configured (RFC 7519 §4.1.3). Expressions of later filters can
//! read `jwt.claims`.

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

/// Admits requests with a valid token: signed with a known key, not expired, and meant for this audience. Answers
/// others with 401.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// The source of the keys.
    pub keys: KeysFrom,
    /// The accepted algorithms. `HS256` and the like need secret keys.
    #[serde(default = "Settings::algorithms")]
    pub algorithms: Vec<Signing>,
    /// The accepted issuers (`iss`). If empty, any issuer with a known key.
    #[serde(default)]
    pub issuer: Vec<String>,
    /// The accepted audiences (`aud`). If empty, tokens with an `aud` are refused.
    #[serde(default)]
    pub audience: Vec<String>,
    /// The tolerated difference between the clocks of the issuer and this machine, at most 10 minutes.
    #[serde(default = "Settings::leeway")]
    pub leeway: Time,
    /// The claims that a token must have. Without `exp` in this list, tokens without an expiry are accepted.
    #[serde(default = "Settings::require")]
    pub require: Vec<String>,
    /// Where requests contain the token. In `Authorization`, it follows `Bearer`.
    #[serde(default = "Settings::from")]
    pub from: Carrier,
    /// Headers for the upstream, with the claims that are their values. The client's own headers of these names are
    /// removed. Dots separate the names of nested claims; the items of a list are joined by `, `.
    #[serde(default)]
    pub claims: BTreeMap<String, String>,
    /// The claim that is `auth.user` in expressions.
    #[serde(default = "Settings::user")]
    pub user: String,
    /// Whether requests without a token pass. If a request has a token, it must be valid even then.
    #[serde(default)]
    pub optional: bool,
    /// Whether the token is also sent to the upstream.
    #[serde(default)]
    pub forward: bool,
    /// The length limit of a token. Longer tokens are refused unread.
    #[serde(default = "Settings::max_token")]
    pub max_token: Size,
    /// The realm in the challenge of a 401.
    #[serde(default = "Settings::realm")]
    pub realm: String,
}

/// The source of the keys.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum KeysFrom {
    /// A file with a JWK set. It is read again when it changes.
    File(Source),
    /// A service with a JWK set.
    Service(Asked),
}

/// A service with a JWK set.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Asked {
    /// The upstream with the service.
    pub upstream: String,
    /// The path of the JWK set.
    #[serde(default = "Asked::path")]
    pub path: String,
    /// Keys older than this are fetched again. They are also fetched when a token names an unknown key.
    #[serde(default = "Asked::refresh")]
    pub refresh: Time,
    /// The least time between two requests to the service, whatever tokens clients send.
    #[serde(default = "Asked::retry")]
    pub retry: Time,
    /// How long keys are used while the service does not answer. Afterwards requests are refused with 503.
    #[serde(default = "Asked::keep")]
    pub keep: Time,
    /// The time limit of the service's answer.
    #[serde(default = "Asked::timeout")]
    pub timeout: Time,
    /// The size limit of the service's answer.
    #[serde(default = "Asked::max_size")]
    pub max_size: Size,
}

/// Where requests contain the token.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Carrier {
    /// In a header. In `Authorization`, the token follows `Bearer`.
    Header(String),
    /// In a cookie.
    Cookie(String),
    /// In a query argument. Logs then contain the token.
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

/// The limits on all claims together, in bytes and in number. Claims beyond them are omitted.
const CLAIMS_BYTES_MAX: usize = 16 << 10;
const CLAIMS_MAX: usize = 256;
/// The depth limit of nested claims.
const DEPTH_MAX: usize = 4;

/// Admits requests with a token.
pub struct Jwt {
    keys: Keys,
    /// The requirements for a token of one algorithm.
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

/// Where requests contain the token.
enum Place {
    Header(HeaderName),
    Cookie(Box<[u8]>),
    Query(Key),
}

/// The token of a request.
#[derive(Debug, PartialEq, Eq)]
enum Shown {
    Nothing,
    /// There are several, and the backend could use another one.
    Several,
    Token(String),
}

/// Why a token is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Flaw {
    /// It is malformed, not signed, or its signature or algorithm is not accepted.
    Invalid,
    /// It names an unknown key.
    UnknownKey,
    /// It has expired, or is not valid yet.
    Expired,
    /// Its audience or issuer is another one.
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

/// The claims whose presence the library checks.
const REQUIRABLE: [&str; 5] = ["exp", "nbf", "iss", "aud", "sub"];

/// The requirements for a token of this algorithm.
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

    /// Removes the token from a request.
    fn remove(&self, request: &mut RequestHeader) {
        match self {
            Place::Header(name) => drop(request.remove_header(name)),
            Place::Cookie(name) => without_cookie(request, name),
            // The target is what the client asks for, and stays unchanged.
            Place::Query(_) => {}
        }
    }
}

/// The single value; `None` if there are several.
fn one<'h>(mut values: impl Iterator<Item = &'h [u8]>) -> Option<Option<&'h [u8]>> {
    let first = values.next();
    values.next().is_none().then_some(first)
}

/// Removes a cookie from a request, and keeps the others.
fn without_cookie(request: &mut RequestHeader, name: &[u8]) {
    let is_other = |pair: &&[u8]| pair.trim_ascii().strip_prefix(name).is_none_or(|rest| !rest.starts_with(b"="));
    let lines = request.headers.get_all(COOKIE).iter();
    let pairs = lines.flat_map(|line| line.as_bytes().split(|&byte| byte == b';')).filter(is_other);
    let left = pairs.map(<[u8]>::trim_ascii).filter(|pair| !pair.is_empty()).collect::<Vec<_>>().join(&b"; "[..]);
    request.remove_header(&COOKIE);
    if let Some(left) = HeaderValue::from_bytes(&left).ok().filter(|left| !left.is_empty()) {
        // The removed field has left room for it.
        let _ = request.insert_header(COOKIE, left);
    }
}

impl Jwt {
    /// The header of a token, and the requirements for its algorithm.
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

/// The claims of a token, if it is valid for one of these keys.
fn checked(token: &str, header: &Header, validation: &Validation, keys: &KeySet) -> Result<Map<String, Value>, Flaw> {
    let mut flaw = Flaw::UnknownKey;
    for key in keys.of(header.kid.as_deref(), header.alg) {
        match decode::<Map<String, Value>>(token, key, validation) {
            Ok(decoded) => return Ok(decoded.claims),
            Err(error) => match error.kind() {
                // If it names no key, it may belong to another one.
                ErrorKind::InvalidSignature => flaw = Flaw::Invalid,
                ErrorKind::ExpiredSignature | ErrorKind::ImmatureSignature => return Err(Flaw::Expired),
                ErrorKind::InvalidAudience | ErrorKind::InvalidIssuer => return Err(Flaw::Meant),
                _ => return Err(Flaw::Invalid),
            },
        }
    }
    Err(flaw)
}

/// The claims of a token as texts, sorted by name. Dots separate the names of nested claims.
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
        // If a name itself contains a dot, two claims may have the same name: the first one is kept.
        found.entry(name.into()).or_insert(values);
    }
}

/// A claim as text; `None` for objects and lists.
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
