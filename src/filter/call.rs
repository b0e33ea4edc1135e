//! Calls of filters: requests that a filter sends to an upstream while its exchange waits for the whole answer.
//!
//! A filter gets a [`Caller`] for each upstream in its settings when it is built ([`Surroundings::caller`]). So an
//! unknown name is an error of `check`, and no name is looked up during a request. A call uses the connections,
//! limits, queue and circuit breaker of its upstream like an exchange, and its result counts for the endpoints'
//! health (`proxy/call.rs`). It delays the exchange of its filter, but blocks no worker. If the client leaves, the
//! call is dropped.

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
    /// The header. `Content-Length` is set to the length of the body, and fields about the connection are removed.
    /// Without a `Host`, the endpoint's address is used.
    pub request: RequestHeader,
    /// The body.
    pub body: Bytes,
    /// The time limit for the whole call: waiting for an endpoint with room, connecting, and the complete answer. The
    /// timeouts of the upstream also apply.
    pub deadline: Duration,
    /// The size limit of the answer's body, in bytes. A larger body is [`CallError::TooLarge`].
    pub answer_bytes_max: usize,
}

impl Call {
    /// The default time limit of a call.
    pub const DEADLINE: Duration = Duration::from_secs(5);
    /// The default size limit of an answer's body.
    pub const ANSWER_BYTES_MAX: usize = 1 << 20;

    /// A request without a body for this path, with a query if there is one.
    ///
    /// # Errors
    /// The method is invalid.
    pub fn new(method: &Method, target: PathAndQuery) -> pingora::Result<Call> {
        let mut request = RequestHeader::build(method.clone(), target.as_str().as_bytes(), None)?;
        request.set_uri(Uri::from(target));
        Ok(Call { request, body: Bytes::new(), deadline: Call::DEADLINE, answer_bytes_max: Call::ANSWER_BYTES_MAX })
    }

    /// Sets this field of the header; it replaces other fields of that name.
    ///
    /// # Errors
    /// There are too many fields.
    pub fn with(mut self, name: HeaderName, value: HeaderValue) -> pingora::Result<Call> {
        self.request.insert_header(name, value)?;
        Ok(self)
    }
}

/// The complete answer to a call.
#[derive(Debug)]
pub struct Answered {
    /// The header.
    pub header: ResponseHeader,
    /// The body.
    pub body: Bytes,
}

/// Why a call has no answer.
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
    /// No endpoint could be reached, or the connection broke.
    Failed,
    /// The answer's body is larger than the call allows.
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

/// Sends calls to one upstream.
#[async_trait]
pub trait Calls: Send + Sync {
    /// Sends a call.
    async fn send(&self, call: Call) -> Result<Answered, CallError>;
}

/// Sends the calls of one filter to one upstream.
#[derive(Clone)]
pub struct Caller(Arc<dyn Calls>);

impl Caller {
    /// A caller that passes its calls to `calls`: an upstream, or a stand-in in tests of filters.
    pub fn new(calls: Arc<dyn Calls>) -> Caller {
        Caller(calls)
    }

    /// Sends a call and waits for the complete answer, whatever its status.
    ///
    /// # Errors
    /// The reason for having no answer.
    pub async fn send(&self, call: Call) -> Result<Answered, CallError> {
        self.0.send(call).await
    }
}

/// The upstreams that filters can call.
pub trait Callees {
    /// The sender of this filter's calls to the upstream of this name; `None` if there is no such upstream.
    fn caller(&self, upstream: &str, filter: &str) -> Option<Caller>;

    /// The names of all upstreams.
    fn names(&self) -> Vec<&str>;
}

/// No upstream.
impl Callees for () {
    fn caller(&self, _: &str, _: &str) -> Option<Caller> {
        None
    }

    fn names(&self) -> Vec<&str> {
        Vec::new()
    }
}

/// The surroundings of a filter when it is built.
#[derive(Clone, Copy)]
pub struct Surroundings<'a> {
    /// The directory of the configuration file, to which relative paths of other files refer.
    pub directory: &'a Path,
    /// The name of the filter's route.
    pub route: &'a str,
    /// The key of the filter: the label of its calls in metrics. It can be replaced.
    pub filter: &'a str,
    /// Where a filter registers its own metrics ([`Metrics::collect_too`]); `None` in tests of filters.
    pub metrics: Option<&'a Metrics>,
    /// The refusals of all filters, without those of Forebay itself.
    pub refusals: &'a [&'static Refusal],
    callees: &'a dyn Callees,
    keeping: Option<&'a Keeping<'a>>,
    files: Option<&'a Files>,
}

impl<'a> Surroundings<'a> {
    /// For the filters of a route.
    pub fn new(directory: &'a Path, route: &'a str, metrics: &'a Metrics, callees: &'a dyn Callees) -> Self {
        let (metrics, refusals) = (Some(metrics), &[] as &[_]);
        Surroundings { directory, route, filter: "", metrics, refusals, callees, keeping: None, files: None }
    }

    /// Adds what filters keep across reloads.
    pub fn keeping(self, keeping: &'a Keeping<'a>) -> Self {
        Surroundings { keeping: Some(keeping), ..self }
    }

    /// Adds the keeper of files.
    pub fn watching(self, files: &'a Files) -> Self {
        Surroundings { files: Some(files), ..self }
    }

    /// The value that outlives a reload: the one that this filter of this route had in the previous configuration
    /// under this name, or the result of `make`. `name` distinguishes values that must not be mixed up, such as two
    /// kinds of keys.
    pub fn keep<T: Any + Send + Sync>(&self, name: &str, make: impl FnOnce() -> T) -> Arc<T> {
        match self.keeping {
            Some(keeping) => keeping.keep(&format!("{}/{}/{name}", self.route, self.filter), make),
            None => Arc::new(make()),
        }
    }

    /// For tests of filters: the working directory, and these upstreams, such as `&()`.
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

    /// The same for the filter with this key, together with other filters' refusals.
    pub(super) fn of(self, filter: &'a str, refusals: &'a [&'static Refusal]) -> Self {
        Surroundings { filter, refusals, ..self }
    }

    /// Registers `keeper` to read a file when it may have changed, and at least every `refresh`, as long as the
    /// keeper lives. The caller has already read the file once, so that mistakes in it are errors of `check`. In
    /// tests of filters, no thread reads files.
    pub fn look_after<K: Keeper>(&self, file: &Path, refresh: Duration, keeper: &Arc<K>) {
        if let Some(files) = self.files {
            files.keep(&format!("`{}` of the route {}", self.filter, self.route), &[file], refresh, keeper);
        }
    }

    /// The sender of calls to the upstream of this name.
    ///
    /// # Errors
    /// There is no such upstream. The path is empty: put the path of the setting before it.
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
