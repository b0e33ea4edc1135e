//! `forward_auth`: asks a service whether to admit a request, as `auth_request` of nginx and `forward_auth` of Caddy
//! and Traefik.
//!
//! ```yaml
//! - forward_auth:
//!     upstream: auth             # an upstream of this file
//!     path: /verify              # the path of the request to it
//!     method: GET
//!     send: [Authorization, Cookie]   # headers of the request that it gets; all, if empty
//!     copy: [X-Auth-User]        # headers of its answer for the upstream; the client's own are removed
//!     copy_back: [Set-Cookie]    # headers of its answer for the client
//!     user: X-Auth-User          # the header that is `auth.user` in expressions
//!     timeout: 5s
//!     max_answer: 64KiB          # the size limit of its answer
//!     on_failure: refuse         # or pass: requests pass while it fails
//!     cache: { key: { header: Authorization }, time: 10s, entries: 10k }
//! ```
//!
//! The service gets the target of the request in `X-Forwarded-Method`, `-Proto`, `-Host`, `-Uri` and `-For`. If it
//! answers with 2xx, the request passes. The client gets any other answer up to 499, so that the service can ask for
//! a login. A status of 500 or more, or no answer, is a failure: the request is refused with 503, or passes if
//! `on_failure` is `pass`.

use std::num::NonZeroUsize;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use bytes::Bytes;
use http::header::{self, HOST, RETRY_AFTER};
use http::uri::PathAndQuery;
use http::{HeaderMap, HeaderName, HeaderValue, Method};
use lru::LruCache;
use pingora::http::ResponseHeader;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::auth::{Gate, Seal, Sealer};
use super::call::{Answered, Call, Caller};
use super::{Answer, Filter, FilterType, Key, Scope, Stages, Surroundings, Verdict, field};
use crate::config;
use crate::config::units::{Count, Size, Time};
use crate::error::{BuildError, Refusal};
use crate::expression::Identity;
use crate::metrics::filters::Access;

/// Asks a service of an upstream whether to admit a request, and for headers about the client.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// The upstream with the service.
    pub upstream: String,
    /// The path of the request to the service, with the query if there is one.
    #[serde(default = "Settings::path")]
    pub path: String,
    /// The method of the request to the service: `GET`, `HEAD` or `POST`. That request never has a body.
    #[serde(default = "Settings::method")]
    pub method: String,
    /// The headers of the client's request that the service gets; all of them, if empty.
    #[serde(default)]
    pub send: Vec<String>,
    /// The headers of the service's answer that the upstream gets. The client's own headers of these names are
    /// removed.
    #[serde(default)]
    pub copy: Vec<String>,
    /// The headers of the service's answer that the client gets with the response.
    #[serde(default)]
    pub copy_back: Vec<String>,
    /// The header of the service's answer that is `auth.user` in expressions.
    #[serde(default)]
    pub user: Option<String>,
    /// The time limit of the service.
    #[serde(default = "Settings::timeout")]
    pub timeout: Time,
    /// The size limit of the body of the service's answer.
    #[serde(default = "Settings::max_answer")]
    pub max_answer: Size,
    /// Whether requests pass while the service fails.
    #[serde(default)]
    pub on_failure: OnFailure,
    /// The cache of answers; without it, nothing is cached.
    #[serde(default)]
    pub cache: Option<Cache>,
}

/// The treatment of requests while the service fails.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum OnFailure {
    /// They are refused with 503.
    #[default]
    Refuse,
    /// They pass without an identity.
    Pass,
}

/// The cache of answers that let a request pass.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Cache {
    /// The key of the cache. All requests with the same key get the same answer, so it must contain all that the
    /// answer depends on. Requests without the key are not cached.
    pub key: config::Key,
    /// How long an answer is cached.
    #[serde(default = "Cache::time")]
    pub time: Time,
    /// The number of cached answers.
    #[serde(default = "Cache::entries")]
    pub entries: Count,
}

impl Settings {
    fn path() -> String {
        "/".to_owned()
    }

    fn method() -> String {
        "GET".to_owned()
    }

    fn timeout() -> Time {
        Time(Duration::from_secs(5))
    }

    fn max_answer() -> Size {
        Size(64 << 10)
    }
}

impl Cache {
    fn time() -> Time {
        Time(Duration::from_secs(10))
    }

    fn entries() -> Count {
        Count(10_000)
    }
}

static UNAVAILABLE: Refusal =
    Refusal::new("route.forward_auth", 503, "The authorization service is not available; try again later.");

/// The memory limit of the headers of a cached answer.
const GRANT_BYTES_MAX: usize = 16 << 10;

/// Asks a service.
pub struct ForwardAuth {
    caller: Caller,
    target: PathAndQuery,
    method: Method,
    send: Vec<HeaderName>,
    copy: Vec<HeaderName>,
    copy_back: Vec<HeaderName>,
    user: Option<HeaderName>,
    timeout: Duration,
    answer_bytes_max: usize,
    on_failure: OnFailure,
    /// Outlives a reload, if the settings stay the same.
    memory: Option<Arc<Memory>>,
    gate: Gate,
}

/// An answer that lets a request pass.
#[derive(Clone, Debug, Default)]
struct Grant {
    request: Fields,
    response: Fields,
    user: Box<str>,
}

type Fields = Vec<(HeaderName, HeaderValue)>;

struct Memory {
    key: Key,
    time: Duration,
    sealer: Sealer,
    grants: Mutex<LruCache<Seal, (Instant, Grant)>>,
}

#[async_trait]
impl Filter for ForwardAuth {
    fn stages(&self) -> Stages {
        Stages::REQUEST | if self.copy_back.is_empty() { Stages::NONE } else { Stages::RESPONSE }
    }

    fn own_headers(&self) -> Vec<HeaderName> {
        self.copy.clone()
    }

    async fn request(&self, scope: &mut Scope<'_>) -> Verdict {
        let seal = self.memory.as_ref().and_then(|memory| memory.seal(scope));
        let known = self.memory.as_ref().zip(seal).and_then(|(memory, seal)| memory.recall(&seal, Instant::now()));
        if let Some(grant) = known {
            return self.grant(scope, grant, Access::Remembered);
        }
        let Ok(call) = self.call(scope) else { return self.failed(scope, "the request has too many fields") };
        let answered = match self.caller.send(call).await {
            Ok(answered) => answered,
            Err(error) => return self.failed(scope, &error.to_string()),
        };
        let status = answered.header.status;
        if status.is_success() {
            let Some(grant) = self.granted(&answered.header.headers) else {
                return self.failed(scope, "the headers to copy are too large");
            };
            if let Some((memory, seal)) = self.memory.as_ref().zip(seal) {
                memory.keep(seal, grant.clone(), Instant::now());
            }
            return self.grant(scope, grant, Access::Granted);
        }
        if !(300..500).contains(&status.as_u16()) {
            return self.failed(scope, &format!("it answered {status}"));
        }
        self.gate.count(if status == 401 { Access::Missing } else { Access::Forbidden });
        Verdict::Answer(denied(answered))
    }

    async fn response(&self, scope: &mut Scope<'_>, response: &mut ResponseHeader) -> Verdict {
        for (name, value) in scope.kept::<Fields>().into_iter().flatten() {
            // Fields beyond the limit are omitted.
            let _ = response.append_header(name.clone(), value.clone());
        }
        Verdict::Continue
    }
}

impl FilterType for ForwardAuth {
    const KEY: &'static str = "forward_auth";
    const REFUSALS: &'static [&'static Refusal] = &[&UNAVAILABLE];
    type Settings = Settings;

    fn build(settings: &Settings, around: &Surroundings<'_>) -> Result<Self, BuildError> {
        let wrong = |key: &str, told: &str| BuildError::new(key, told);
        let target = settings.path.parse::<PathAndQuery>().ok().filter(|_| settings.path.starts_with('/'));
        let method = ["GET", "HEAD", "POST"].into_iter().find(|known| *known == settings.method);
        let method = method.and_then(|method| Method::from_bytes(method.as_bytes()).ok());
        if settings.timeout.0.is_zero() {
            return Err(wrong("timeout", "must be greater than 0"));
        }
        let memory = settings.cache.as_ref().map(Memory::build).transpose().map_err(|error| error.under("cache"))?;
        Ok(ForwardAuth {
            caller: around.caller(&settings.upstream).map_err(|error| error.under("upstream"))?,
            target: target.ok_or_else(|| wrong("path", "write a path such as `/verify`"))?,
            method: method.ok_or_else(|| wrong("method", "write `GET`, `HEAD` or `POST`"))?,
            send: names(&settings.send, "send")?,
            copy: names(&settings.copy, "copy")?,
            copy_back: names(&settings.copy_back, "copy_back")?,
            user: settings
                .user
                .as_ref()
                .map(|name| field::name(name).map_err(|told| wrong("user", &told)))
                .transpose()?,
            timeout: settings.timeout.0,
            answer_bytes_max: usize::try_from(settings.max_answer.0).unwrap_or(usize::MAX),
            on_failure: settings.on_failure,
            memory: memory.map(|memory| around.keep(&format!("{settings:?}"), || memory)),
            gate: Gate::of(around),
        })
    }
}

fn names(written: &[String], key: &str) -> Result<Vec<HeaderName>, BuildError> {
    let name = |(index, name): (usize, &String)| {
        field::free_name(name).map_err(|told| BuildError::new(format!("{key}[{index}]"), told))
    };
    written.iter().enumerate().map(name).collect()
}

/// Fields that the service gets only from Forebay.
const TOLD: [&str; 5] =
    ["x-forwarded-method", "x-forwarded-proto", "x-forwarded-host", "x-forwarded-uri", "x-forwarded-for"];

impl ForwardAuth {
    /// The request to the service.
    fn call(&self, scope: &Scope<'_>) -> pingora::Result<Call> {
        let mut call = Call::new(&self.method, self.target.clone())?;
        (call.deadline, call.answer_bytes_max) = (self.timeout, self.answer_bytes_max);
        let asked = &*scope.request;
        for (name, value) in &asked.headers {
            let goes = if self.send.is_empty() { may_go(name) } else { self.send.contains(name) };
            if goes && !TOLD.contains(&name.as_str()) {
                call.request.append_header(name.clone(), value.clone())?;
            }
        }
        let target = asked.uri.path_and_query().map_or("/", |target| target.as_str());
        call.request.insert_header(TOLD[0], asked.method.as_str())?;
        call.request.insert_header(TOLD[1], scope.facts.scheme)?;
        if let Some(host) = asked.headers.get(HOST) {
            call.request.insert_header(TOLD[2], host.clone())?;
        }
        call.request.insert_header(TOLD[3], target)?;
        if let Some(client) = scope.facts.client {
            call.request.insert_header(TOLD[4], client.to_canonical().to_string())?;
        }
        Ok(call)
    }

    /// The headers to copy from an answer; `None` if they are too large.
    fn granted(&self, answer: &HeaderMap) -> Option<Grant> {
        let fields = |names: &[HeaderName]| -> Fields {
            let of = |name: &HeaderName| {
                let name = name.clone();
                answer.get_all(&name).iter().map(move |value| (name.clone(), value.clone())).collect::<Vec<_>>()
            };
            names.iter().flat_map(of).collect()
        };
        let user = self.user.as_ref().and_then(|name| answer.get(name)?.to_str().ok()).unwrap_or_default();
        let grant = Grant { request: fields(&self.copy), response: fields(&self.copy_back), user: user.into() };
        let all = grant.request.iter().chain(&grant.response);
        let bytes: usize = all.map(|(name, value)| name.as_str().len() + value.len()).sum();
        (bytes <= GRANT_BYTES_MAX).then_some(grant)
    }

    /// Lets a request pass, with the headers and the identity from the service.
    fn grant(&self, scope: &mut Scope<'_>, grant: Grant, access: Access) -> Verdict {
        self.strip(scope);
        for (name, value) in grant.request {
            if scope.request.append_header(name, value).is_err() {
                return self.failed(scope, "there is no room for the headers to copy");
            }
        }
        self.gate.count(access);
        scope.keep(grant.response);
        scope.identify(Identity { user: grant.user, by: Self::KEY, claims: Vec::new() });
        Verdict::Continue
    }

    /// Removes the client's headers of the names that only the service may set.
    fn strip(&self, scope: &mut Scope<'_>) {
        for name in &self.copy {
            scope.request.remove_header(name);
        }
    }

    fn failed(&self, scope: &mut Scope<'_>, why: &str) -> Verdict {
        tracing::debug!(route = scope.facts.route, why, "forward_auth has no answer");
        self.strip(scope);
        match self.on_failure {
            OnFailure::Refuse => {
                self.gate.refuse(Access::Unavailable, &UNAVAILABLE, vec![(RETRY_AFTER, HeaderValue::from(5))])
            }
            OnFailure::Pass => {
                self.gate.count(Access::Open);
                Verdict::Continue
            }
        }
    }
}

/// Whether the service gets a field of a request if it gets all. It does not get fields about the body, which is not
/// sent, and about the connection.
fn may_go(name: &HeaderName) -> bool {
    field::free_name(name.as_str()).is_ok()
        && ![header::EXPECT, header::CONTENT_TYPE, header::CONTENT_ENCODING, header::RANGE, header::IF_RANGE]
            .contains(name)
        && !name.as_str().starts_with("if-")
}

/// The answer for a client that the service refuses.
fn denied(Answered { header, body }: Answered) -> Answer {
    let free = |name: &HeaderName| field::free_name(name.as_str()).is_ok() && *name != header::DATE;
    let headers = header.headers.iter().filter(|(name, _)| free(name));
    let headers = headers.map(|(name, value)| (name.clone(), value.clone())).collect();
    // RFC 9110 §15.4.5: a 304 is about the client's copy of another resource, and has no body.
    let body = if header.status == 304 { Bytes::new() } else { body };
    Answer { status: header.status, headers, body }
}

impl Memory {
    fn build(settings: &Cache) -> Result<Memory, BuildError> {
        let entries = usize::try_from(settings.entries.0).ok().filter(|&entries| entries <= 10_000_000);
        let entries = entries.and_then(NonZeroUsize::new);
        let entries = entries.ok_or_else(|| BuildError::new("entries", "write a number from 1 to 10M"))?;
        if settings.time.0.is_zero() {
            return Err(BuildError::new("time", "what is remembered for no time is not remembered: leave `cache` out"));
        }
        Ok(Memory {
            key: Key::build(&settings.key).map_err(|error| error.under("key"))?,
            time: settings.time.0,
            sealer: Sealer::new(),
            grants: Mutex::new(LruCache::new(entries)),
        })
    }

    /// The cache key of a request; `None` if it has none.
    fn seal(&self, scope: &Scope<'_>) -> Option<Seal> {
        let asked = scope.asked();
        Some(self.sealer.seal(&[&self.key.of(&asked)?.bytes()]))
    }

    fn recall(&self, seal: &Seal, now: Instant) -> Option<Grant> {
        let mut grants = self.grants.lock().unwrap_or_else(PoisonError::into_inner);
        let (since, grant) = grants.get(seal)?;
        if now.saturating_duration_since(*since) < self.time {
            return Some(grant.clone());
        }
        grants.pop(seal);
        None
    }

    fn keep(&self, seal: Seal, grant: Grant, now: Instant) {
        self.grants.lock().unwrap_or_else(PoisonError::into_inner).put(seal, (now, grant));
    }
}

#[cfg(test)]
mod tests {
    use super::super::rehearsal::error;
    use super::*;

    #[test]
    fn grants_are_remembered_for_a_while() {
        let written = Cache { key: config::Key::ClientIp, time: Time(Duration::from_secs(10)), entries: Count(1) };
        let memory = Memory::build(&written).unwrap();
        let now = Instant::now();
        let grant = Grant { user: "ada".into(), ..Grant::default() };
        memory.keep([1; 32], grant.clone(), now);
        assert_eq!(memory.recall(&[1; 32], now + Duration::from_secs(9)).unwrap().user, grant.user);
        assert!(memory.recall(&[2; 32], now).is_none());
        assert!(memory.recall(&[1; 32], now + Duration::from_secs(10)).is_none());
        memory.keep([1; 32], grant.clone(), now);
        memory.keep([2; 32], grant, now);
        assert!(memory.recall(&[1; 32], now).is_none(), "there is room for one");
    }

    #[test]
    fn fields_of_the_connection_and_of_the_body_stay() {
        for name in ["authorization", "cookie", "accept", "x-own"] {
            assert!(may_go(&HeaderName::from_static(name)), "{name}");
        }
        for name in ["host", "content-length", "transfer-encoding", "connection", "content-type", "if-match", "expect"]
        {
            assert!(!may_go(&HeaderName::from_static(name)), "{name}");
        }
    }

    #[test]
    fn what_a_client_gets_that_may_not_pass_is_framed_anew() {
        let mut header = ResponseHeader::build(302, None).unwrap();
        for (name, value) in
            [("location", "/login"), ("content-length", "9"), ("transfer-encoding", "chunked"), ("set-cookie", "a=b")]
        {
            header.append_header(name, value).unwrap();
        }
        let answer = denied(Answered { header, body: "moved".into() });
        let mut names: Vec<&str> = answer.headers.iter().map(|(name, _)| name.as_str()).collect();
        names.sort_unstable();
        assert_eq!((answer.status.as_u16(), names), (302, vec!["location", "set-cookie"]));
    }

    #[test]
    fn wrong_settings_are_told_with_their_place() {
        let told = error("- forward_auth: { upstream: auth }");
        assert_eq!(told, "[0].forward_auth.upstream: there is no upstream `auth`");
    }
}
