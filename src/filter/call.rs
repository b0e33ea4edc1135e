//! What a filter can ask of others while its exchange waits: a request of its own to an upstream, and the whole answer
//! to it.
//!
//! A filter gets a [`Caller`] for each upstream that its settings name when it is built ([`Surroundings::caller`]). So
//! an unknown name is an error of `check`, and nothing is looked up on the way of a request. A call goes through the
//! connections, limits, queue and circuit breaker of its upstream as an exchange does, and its endpoints are judged by
//! what becomes of it (`proxy/call.rs`). It holds up the exchange whose filter waits for it, and no worker; if the
//! client goes away meanwhile, it is dropped.

use std::any::Any;
use std::fmt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use http::uri::PathAndQuery;
use http::{HeaderName, HeaderValue, Method, Uri};
use pingora::http::{RequestHeader, ResponseHeader};

use super::kept::Keeping;
use crate::error::{BuildError, Refusal, nearest};
use crate::files::{Files, Keeper};
use crate::metrics::Metrics;

/// A request that a filter sends to an upstream.
#[derive(Debug)]
pub struct Call {
    /// Its header. `Content-Length` is that of the body, and fields that concern a connection are left out. Without a
    /// `Host`, it gets that of the endpoint.
    pub request: RequestHeader,
    /// Its body.
    pub body: Bytes,
    /// All of it has to be done in this time: waiting for an endpoint with room, connecting, and the whole answer. The
    /// timeouts of the upstream hold besides.
    pub deadline: Duration,
    /// The length limit of an answer's body, in bytes; one that has more is [`CallError::TooLarge`].
    pub answer_bytes_max: usize,
}

impl Call {
    /// A call takes no longer than this, unless it says otherwise.
    pub const DEADLINE: Duration = Duration::from_secs(5);
    /// The body of an answer has no more bytes than this, unless its call says otherwise.
    pub const ANSWER_BYTES_MAX: usize = 1 << 20;

    /// A request for this path, and query if there is one, without a body.
    ///
    /// # Errors
    /// There is no such method.
    pub fn new(method: &Method, target: PathAndQuery) -> pingora::Result<Call> {
        let mut request = RequestHeader::build(method.clone(), target.as_str().as_bytes(), None)?;
        request.set_uri(Uri::from(target));
        Ok(Call { request, body: Bytes::new(), deadline: Call::DEADLINE, answer_bytes_max: Call::ANSWER_BYTES_MAX })
    }

    /// The same with this field in its header, in place of others of that name.
    ///
    /// # Errors
    /// There are too many.
    pub fn with(mut self, name: HeaderName, value: HeaderValue) -> pingora::Result<Call> {
        self.request.insert_header(name, value)?;
        Ok(self)
    }
}

/// The whole answer to a call.
#[derive(Debug)]
pub struct Answered {
    /// Its header.
    pub header: ResponseHeader,
    /// Its body.
    pub body: Bytes,
}

/// Why there is no answer to a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CallError {
    /// Every endpoint was busy, and none had room in time.
    Busy,
    /// The circuit breaker of the upstream is open.
    Away,
    /// No endpoint is available.
    NoEndpoint,
    /// It took too long.
    Late,
    /// No endpoint could be reached, or one broke off.
    Failed,
    /// The answer has more bytes than the call allows.
    TooLarge,
}

impl fmt::Display for CallError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            CallError::Busy => "every endpoint is busy",
            CallError::Away => "the circuit breaker is open",
            CallError::NoEndpoint => "no endpoint is available",
            CallError::Late => "it took too long",
            CallError::Failed => "no endpoint could be reached, or it broke off",
            CallError::TooLarge => "the answer is too large",
        })
    }
}

impl std::error::Error for CallError {}

/// What sends calls to one upstream.
#[async_trait]
pub trait Calls: Send + Sync {
    /// Sends a call.
    async fn send(&self, call: Call) -> Result<Answered, CallError>;
}

/// Sends the calls of one filter to one upstream.
#[derive(Clone)]
pub struct Caller(Arc<dyn Calls>);

impl Caller {
    /// One that hands its calls to `calls`: an upstream, or whatever stands for one in a test of a filter.
    pub fn new(calls: Arc<dyn Calls>) -> Caller {
        Caller(calls)
    }

    /// Sends a call and waits for the whole answer, whatever its status.
    ///
    /// # Errors
    /// Why there is none.
    pub async fn send(&self, call: Call) -> Result<Answered, CallError> {
        self.0.send(call).await
    }
}

/// The upstreams that filters can call.
pub trait Callees {
    /// What sends the calls of this filter to the upstream of this name; `None` if there is none.
    fn caller(&self, upstream: &str, filter: &str) -> Option<Caller>;

    /// The names of all of them.
    fn names(&self) -> Vec<&str>;
}

/// No upstream at all.
impl Callees for () {
    fn caller(&self, _: &str, _: &str) -> Option<Caller> {
        None
    }

    fn names(&self) -> Vec<&str> {
        Vec::new()
    }
}

/// What is around a filter when it is built.
#[derive(Clone, Copy)]
pub struct Surroundings<'a> {
    /// The directory of the configuration file; relative paths of other files begin here.
    pub directory: &'a Path,
    /// The name of the route that the filter is built for.
    pub route: &'a str,
    /// The key of the filter: its label in the metrics of its calls. Another one may be put in its place.
    pub filter: &'a str,
    /// Where a filter registers metrics of its own ([`Metrics::collect_too`]); `None` in a test of it.
    pub metrics: Option<&'a Metrics>,
    /// The refusals of all filters that there are, without those of Forebay itself.
    pub refusals: &'a [&'static Refusal],
    callees: &'a dyn Callees,
    keeping: Option<&'a Keeping<'a>>,
    files: Option<&'a Files>,
}

impl<'a> Surroundings<'a> {
    /// Those of the filters of a route.
    pub fn new(directory: &'a Path, route: &'a str, metrics: &'a Metrics, callees: &'a dyn Callees) -> Self {
        let (metrics, refusals) = (Some(metrics), &[] as &[_]);
        Surroundings { directory, route, filter: "", metrics, refusals, callees, keeping: None, files: None }
    }

    /// The same for filters that keep something from one configuration to the next.
    pub fn keeping(self, keeping: &'a Keeping<'a>) -> Self {
        Surroundings { keeping: Some(keeping), ..self }
    }

    /// The same for filters that go by files.
    pub fn watching(self, files: &'a Files) -> Self {
        Surroundings { files: Some(files), ..self }
    }

    /// What outlives a reload: the thing that this filter of this route had in the configuration before, if it had one
    /// of this name, else what `make` makes. `name` tells apart what must not be mixed up, such as two kinds of keys.
    pub fn keep<T: Any + Send + Sync>(&self, name: &str, make: impl FnOnce() -> T) -> Arc<T> {
        match self.keeping {
            Some(keeping) => keeping.keep(&format!("{}/{}/{name}", self.route, self.filter), make),
            None => Arc::new(make()),
        }
    }

    /// Those of a test of a filter: the working directory, and these to call, such as `&()`.
    pub fn rehearsal(callees: &'a dyn Callees) -> Self {
        Surroundings {
            directory: Path::new("."),
            route: "all",
            filter: "",
            metrics: None,
            refusals: &[],
            callees,
            keeping: None,
            files: None,
        }
    }

    /// The same for the filter of this key, beside others that have these refusals.
    pub(super) fn of(self, filter: &'a str, refusals: &'a [&'static Refusal]) -> Self {
        Surroundings { filter, refusals, ..self }
    }

    /// Has `keeper` look at a file whenever it may have changed, and every `refresh` besides, for as long as there is
    /// one. The caller has read it once, so that what is wrong with it is an error of `check`. In a test of a filter,
    /// no thread looks.
    pub fn look_after<K: Keeper>(&self, file: &Path, refresh: Duration, keeper: &Arc<K>) {
        if let Some(files) = self.files {
            files.keep(&format!("`{}` of the route {}", self.filter, self.route), &[file], refresh, keeper);
        }
    }

    /// What sends calls to the upstream of this name.
    ///
    /// # Errors
    /// There is none of this name; the path is empty, put that of the setting before it.
    pub fn caller(&self, upstream: &str) -> Result<Caller, BuildError> {
        self.callees.caller(upstream, self.filter).ok_or_else(|| {
            let help = match nearest(upstream, self.callees.names()) {
                Some(near) => format!(": did you mean `{near}`?"),
                None => String::new(),
            };
            BuildError::new("", format!("there is no upstream `{upstream}`{help}"))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_upstream_that_there_is_not_is_told_with_the_nearest_that_there_is() {
        struct Two;

        impl Callees for Two {
            fn caller(&self, _: &str, _: &str) -> Option<Caller> {
                None
            }

            fn names(&self) -> Vec<&str> {
                vec!["shop", "auth"]
            }
        }

        let told = |name| Surroundings::rehearsal(&Two).caller(name).err().map(|error| error.message);
        assert_eq!(told("aut").as_deref(), Some("there is no upstream `aut`: did you mean `auth`?"));
        assert_eq!(told("elsewhere").as_deref(), Some("there is no upstream `elsewhere`"));
    }

    #[test]
    fn a_call_is_for_the_target_that_it_names() {
        let call = Call::new(&Method::POST, PathAndQuery::from_static("/check?a=b")).unwrap();
        let call = call.with(http::header::HOST, HeaderValue::from_static("auth")).unwrap();
        assert_eq!((call.request.method.as_str(), call.request.raw_path()), ("POST", b"/check?a=b".as_slice()));
        assert_eq!(call.request.headers["host"], "auth");
    }
}
