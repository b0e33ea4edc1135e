//! The [`Filter`] trait, the view that a filter has of an exchange, and the list of filters.
//!
//! A filter is one file: its settings, a YAML example, its code and its tests. To write one, copy
//! `filter/request_id.rs`. [`Catalog::builtin`] lists the filters of Forebay; a [`Chain`] holds the filters of one
//! route.
//!
//! Another crate registers a filter with `Gateway::builder().filter::<T>()`. Forebay then checks it, lists it in the
//! schema and runs it like its own. A complete example:
//!
//! ```
//! use async_trait::async_trait;
//! use forebay::config::filter::FilterEntry;
//! use forebay::error::{BuildError, Refusal};
//! use forebay::expression::Facts;
//! use forebay::filter::{Catalog, Filter, FilterType, Scope, Stages, Surroundings, Verdict, View};
//! use pingora::http::RequestHeader;
//!
//! /// `badge: { header: X-Badge }`: refuses requests without a badge.
//! struct Badge(http::HeaderName);
//!
//! static NO_BADGE: Refusal = Refusal::new("route.badge", 401, "Show your badge.");
//!
//! #[derive(serde::Deserialize, schemars::JsonSchema)]
//! #[serde(deny_unknown_fields)]
//! struct Settings {
//!     /// The header with the badge.
//!     header: String,
//! }
//!
//! #[async_trait]
//! impl Filter for Badge {
//!     fn stages(&self) -> Stages {
//!         Stages::REQUEST
//!     }
//!
//!     async fn request(&self, scope: &mut Scope<'_>) -> Verdict {
//!         if scope.request.headers.contains_key(&self.0) { Verdict::Continue } else { Verdict::from(&NO_BADGE) }
//!     }
//! }
//!
//! impl FilterType for Badge {
//!     const KEY: &'static str = "badge";
//!     const REFUSALS: &'static [&'static Refusal] = &[&NO_BADGE];
//!     type Settings = Settings;
//!
//!     fn build(settings: &Settings, _: &Surroundings<'_>) -> Result<Self, BuildError> {
//!         let name = settings.header.parse();
//!         let invalid = || BuildError::new("header", format!("`{}` is not a valid header name", settings.header));
//!         name.map(Badge).map_err(|_| invalid())
//!     }
//! }
//!
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! // A gateway builds this from its configuration; a test of the filter needs four lines:
//! let filters: Vec<FilterEntry> = serde_yaml::from_str("[ { badge: { header: X-Badge } } ]")?;
//! let chain = Catalog::builtin().with::<Badge>().chain(&filters).map_err(|errors| errors[0].clone())?;
//! let mut request = RequestHeader::build("GET", b"/", None)?;
//! let view = View { facts: Facts::of("all", "/"), request: &mut request };
//! assert!(matches!(chain.request(&mut chain.states(), view).await, Verdict::Refuse(refused) if refused.refusal ==
//! &NO_BADGE));
//! # Ok(())
//! # }
//! ```

mod accept;
pub mod access;
pub mod api_key;
mod aside;
mod auth;
pub mod basic_auth;
pub mod body;
pub mod call;
mod catalog;
mod chain;
pub mod compress;
pub mod cors;
pub mod decompress;
pub mod error_page;
mod field;
pub mod forward_auth;
pub mod gcra;
mod groups;
pub mod headers;
pub mod ip_set;
pub mod jwt;
pub mod kept;
pub mod key;
pub mod listed;
pub mod rate_limit;
pub mod redirect;
#[cfg(test)]
mod rehearsal;
mod representation;
pub mod request_id;
pub mod respond;
pub mod rewrite;
mod template;

use std::any::Any;
use std::ops::BitOr;
use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use http::header::RETRY_AFTER;
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode};
use pingora::http::{RequestHeader, ResponseHeader};
use schemars::JsonSchema;
use serde::de::DeserializeOwned;

use crate::error::{BuildError, Refusal};
use crate::expression::{Asked, Facts, Identity};

pub use call::Surroundings;
pub use catalog::Catalog;
pub use chain::{Chain, States, View};
pub use key::Key;

/// The decision of a filter at one stage.
#[derive(Debug)]
pub enum Verdict {
    /// The exchange continues.
    Continue,
    /// Forebay refuses the exchange for this reason. Once the response has begun, it cuts the connection instead.
    Refuse(Refused),
    /// The filter answers. In [`Filter::request`], Forebay does not contact the upstream. In [`Filter::response`],
    /// the client gets this answer instead of the endpoint's, and Forebay does not wait for the rest of the latter.
    /// In a body stage it is a fault of the filter, and the exchange is refused as `internal`.
    Answer(Answer),
}

impl From<&'static Refusal> for Verdict {
    fn from(refusal: &'static Refusal) -> Self {
        Verdict::Refuse(refusal.into())
    }
}

/// A refusal, with additional headers such as `Retry-After`.
#[derive(Debug)]
pub struct Refused {
    /// The reason and the status.
    pub refusal: &'static Refusal,
    /// Additional response headers.
    pub headers: Vec<(HeaderName, HeaderValue)>,
}

impl From<&'static Refusal> for Refused {
    fn from(refusal: &'static Refusal) -> Self {
        Refused { refusal, headers: Vec::new() }
    }
}

impl Verdict {
    /// A refusal for lack of capacity: the client may retry after some seconds.
    fn busy(refusal: &'static Refusal) -> Verdict {
        Verdict::Refuse(Refused { refusal, headers: vec![(RETRY_AFTER, HeaderValue::from_static("5"))] })
    }
}

/// A complete answer made by a filter.
#[derive(Debug)]
pub struct Answer {
    /// Its status.
    pub status: StatusCode,
    /// Its headers; `Content-Length` is added.
    pub headers: Vec<(HeaderName, HeaderValue)>,
    /// Its body.
    pub body: Bytes,
}

impl Answer {
    /// The header to send, without `Content-Length`.
    ///
    /// # Errors
    /// The header has too many fields.
    pub(crate) fn header(&self) -> pingora::Result<ResponseHeader> {
        let mut header = ResponseHeader::build(self.status, Some(self.headers.len() + 3))?;
        for (name, value) in &self.headers {
            header.append_header(name.clone(), value.clone())?;
        }
        Ok(header)
    }
}

/// The exchange as a filter sees it at any stage.
pub struct Scope<'a> {
    /// The facts of the exchange, such as the client's address and the route.
    pub facts: Facts<'a>,
    /// The request header. The upstream gets the changes made in [`Filter::request`].
    pub request: &'a mut RequestHeader,
    /// The state of this filter for this exchange, kept from stage to stage; see [`Scope::keep`].
    pub state: &'a mut Option<Box<dyn Any + Send + Sync>>,
    /// The identity of the client, once a filter has determined it; see [`Scope::identify`].
    pub identity: &'a mut Option<Arc<Identity>>,
    /// This filter does not process the request body; see [`Scope::leave_request_body`].
    pub(crate) leaves_request_body: &'a mut bool,
    /// This filter does not process the response body; see [`Scope::leave_body`].
    pub(crate) leaves_body: &'a mut bool,
    /// The response must not be sent yet; see [`Scope::hold_body`].
    pub(crate) holds_body: &'a mut bool,
}

impl Scope<'_> {
    /// The input of keys and expressions: the request as previous filters have changed it.
    pub fn asked(&self) -> Asked<'_> {
        let facts = Facts { identity: self.identity.as_deref().or(self.facts.identity), ..self.facts };
        Asked { facts, ..self.facts.asked(self.request) }
    }

    /// Sets the identity of the client for the following filters, keys, logs and spans. Takes effect only in
    /// [`Filter::request`].
    pub fn identify(&mut self, identity: Identity) {
        *self.identity = Some(Arc::new(identity));
    }

    /// In [`Filter::request`]: excludes this filter from the body of this request. If no other filter reads the body,
    /// its length stays known and can be sent to the endpoint.
    pub fn leave_request_body(&mut self) {
        *self.leaves_request_body = true;
    }

    /// In [`Filter::response`]: no part of the response is sent before its whole body has passed the filters. If this
    /// filter then refuses the response, the client gets the refusal instead of a truncated response. When memory is
    /// short, the response is sent earlier, as far as the filter passes it on.
    pub fn hold_body(&mut self) {
        *self.holds_body = true;
    }

    /// In [`Filter::response`]: excludes this filter from the body of this response. If no other filter reads the
    /// body, its length stays known and can be sent to the client.
    pub fn leave_body(&mut self) {
        *self.leaves_body = true;
    }

    /// Keeps `value` until the end of the exchange, and replaces what this filter kept before.
    pub fn keep<T: Any + Send + Sync>(&mut self, value: T) {
        *self.state = Some(Box::new(value));
    }

    /// The value that this filter kept at an earlier stage, if it is a `T`.
    pub fn kept<T: Any>(&mut self) -> Option<&mut T> {
        self.state.as_mut()?.downcast_mut()
    }
}

/// The stages at which a filter is called. Other stages cost nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stages(u8);

impl Stages {
    /// No stage.
    pub const NONE: Stages = Stages(0);
    /// [`Filter::request`].
    pub const REQUEST: Stages = Stages(1);
    /// [`Filter::request_body`].
    pub const REQUEST_BODY: Stages = Stages(2);
    /// [`Filter::response`].
    pub const RESPONSE: Stages = Stages(4);
    /// [`Filter::response_body`].
    pub const RESPONSE_BODY: Stages = Stages(8);
    /// [`Filter::end`].
    pub const END: Stages = Stages(16);
    /// [`Filter::request_trailers`].
    pub const REQUEST_TRAILERS: Stages = Stages(32);
    /// [`Filter::response_trailers`].
    pub const RESPONSE_TRAILERS: Stages = Stages(64);
    /// All stages.
    pub const ALL: Stages = Stages(127);

    /// Whether this contains every stage of `other`.
    pub const fn contains(self, other: Stages) -> bool {
        self.0 & other.0 == other.0
    }

    /// Whether this contains at least one stage of `other`.
    pub const fn intersects(self, other: Stages) -> bool {
        self.0 & other.0 != 0
    }
}

impl BitOr for Stages {
    type Output = Stages;

    fn bitor(self, other: Stages) -> Stages {
        Stages(self.0 | other.0)
    }
}

/// The end of an exchange, for [`Filter::end`].
#[derive(Clone, Copy, Debug)]
pub struct Outcome {
    /// The status sent to the client; 0 if none was sent.
    pub status: u16,
    /// The reason, if Forebay ended the exchange.
    pub refusal: Option<&'static Refusal>,
}

/// Processes the exchanges of a route at one or more stages.
///
/// Every stage except the end and the trailers may wait and may refuse. Waiting delays only this exchange. A call
/// that waits longer than the `filter_timeout` of the route is dropped. The filters of a route are layers around its
/// upstream, with the first filter outermost: requests pass them in the order of the list, responses and the end in
/// reverse order. The first verdict other than [`Verdict::Continue`] ends a stage.
///
/// If a filter has a `when:` that does not hold for an exchange, it is called at no stage. The condition is evaluated
/// once: before the request stage of the filter, or before the response stages if it reads the response. In the
/// latter case, [`Filter::request`] is called before the evaluation, but only for a filter that
/// [prepares](Filter::prepares).
#[async_trait]
pub trait Filter: Send + Sync + 'static {
    /// The stages at which this filter is called.
    fn stages(&self) -> Stages;

    /// Whether [`Filter::request`] only prepares for the response, for example by removing `Accept-Encoding`. It is
    /// then called even if the `when:` reads the response and so cannot be evaluated yet.
    fn prepares(&self) -> bool {
        false
    }

    /// Undoes what [`Filter::request`] has prepared, because the `when:` reads the response and does not hold. Called
    /// once per response, for a filter that [prepares](Filter::prepares). Must not wait.
    fn stand_down(&self, _scope: &mut Scope<'_>) {}

    /// The name of this filter in metrics and logs, for filters that share a key, such as plugins. `None`: its key.
    /// Called once, after the filter was built. Each new name is stored for the life of the process.
    fn label(&self) -> Option<&str> {
        None
    }

    /// The request headers that only this filter may set, such as the name of a user. In [`Filter::request`] it
    /// removes these headers of the client; Forebay also removes them from the request trailers. Called once, after
    /// the filter was built.
    fn own_headers(&self) -> Vec<HeaderName> {
        Vec::new()
    }

    /// The request header was received, and nothing was sent to an upstream.
    async fn request(&self, _scope: &mut Scope<'_>) -> Verdict {
        Verdict::Continue
    }

    /// A piece of the request body; `end` is set with the last one, which may be `None`. To hold a piece back, leave
    /// an empty `Some` in its place: `None` means the end. If the request is sent to another endpoint, its pieces
    /// pass again from the first; [`Facts::attempt`] is then another number.
    async fn request_body(&self, _scope: &mut Scope<'_>, _piece: &mut Option<Bytes>, _end: bool) -> Verdict {
        Verdict::Continue
    }

    /// The response header was received, and nothing of it was sent to the client. It comes from an endpoint, another
    /// filter or a refusal of Forebay; a refusal cannot be refused again. If an exchange has several responses, each
    /// replaces the previous one, and the stage runs again.
    async fn response(&self, _scope: &mut Scope<'_>, _response: &mut ResponseHeader) -> Verdict {
        Verdict::Continue
    }

    /// A piece of the response body; `end` is set with the last one, which may be `None`.
    async fn response_body(&self, _scope: &mut Scope<'_>, _piece: &mut Option<Bytes>, _end: bool) -> Verdict {
        Verdict::Continue
    }

    /// The trailer fields of the request (RFC 9110 §6.5), if there are any. The last pieces of the body may come
    /// later. Must not wait.
    fn request_trailers(&self, _scope: &mut Scope<'_>, _trailers: &mut HeaderMap) {}

    /// The trailer fields of the response, if there are any. The last pieces of the body may come later. Must not
    /// wait.
    fn response_trailers(&self, _scope: &mut Scope<'_>, _trailers: &mut HeaderMap) {}

    /// The exchange has ended, in any way. Called even if an earlier filter ended the exchange before this one was
    /// called.
    fn end(&self, _scope: &mut Scope<'_>, _outcome: Outcome) {}
}

/// A filter with a key in YAML.
pub trait FilterType: Filter + Sized {
    /// Its key under `filters:`.
    const KEY: &'static str;
    /// Whether it always answers, so that its route needs no upstream.
    const ANSWERS: bool = false;
    /// Its refusals, so that they are counted from the start. Each needs a reason of its own.
    const REFUSALS: &'static [&'static Refusal] = &[];
    /// Its settings. Use `deny_unknown_fields`, so that misspelt keys are errors.
    type Settings: DeserializeOwned + JsonSchema + Send + Sync + 'static;

    /// Builds the filter of one route. The path of an error is relative to the settings. `around` has the upstreams
    /// that the filter may call, the directory of the configuration, and a registry for its metrics.
    fn build(settings: &Self::Settings, around: &Surroundings<'_>) -> Result<Self, BuildError>;
}
