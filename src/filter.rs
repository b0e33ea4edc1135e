//! What can be done to an exchange: the [`Filter`] trait, what a filter sees, and the list of all filters.
//!
//! A filter is one file: its settings, a YAML example, its code and its tests. Copy `filter/request_id.rs` and
//! change it. [`Catalog::builtin`] is the list of ours; a [`Chain`] is what the `filters:` of one route become.
//!
//! One from outside the crate registers in one line, `Gateway::builder().filter::<T>()`, and is then checked, listed
//! in the schema and run like ours. A whole one:
//!
//! ```
//! use async_trait::async_trait;
//! use forebay::config::filter::FilterEntry;
//! use forebay::error::{BuildError, Refusal};
//! use forebay::expression::Facts;
//! use forebay::filter::{Catalog, Filter, FilterType, Scope, Stages, Surroundings, Verdict, View};
//! use pingora::http::RequestHeader;
//!
//! /// `badge: { header: X-Badge }`: refuses who shows none.
//! struct Badge(http::HeaderName);
//!
//! static NO_BADGE: Refusal = Refusal::new("route.badge", 401, "Show your badge.");
//!
//! #[derive(serde::Deserialize, schemars::JsonSchema)]
//! #[serde(deny_unknown_fields)]
//! struct Settings {
//!     /// Where the badge is shown.
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
//! // In a gateway its configuration does this; in a test of the filter, four lines do:
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

/// What a filter decided at one stage.
#[derive(Debug)]
pub enum Verdict {
    /// The exchange goes on.
    Continue,
    /// Forebay refuses it, for this reason. After the response has begun, the connection is cut instead.
    Refuse(Refused),
    /// The filter answers itself. In [`Filter::request`], no upstream is asked; in [`Filter::response`], the client
    /// gets this in place of the endpoint's answer, of which the rest is not waited for. While a body passes it is an
    /// error of the filter, and the exchange is refused as `internal`.
    Answer(Answer),
}

impl From<&'static Refusal> for Verdict {
    fn from(refusal: &'static Refusal) -> Self {
        Verdict::Refuse(refusal.into())
    }
}

/// A refusal, with headers of its own such as `Retry-After`.
#[derive(Debug)]
pub struct Refused {
    /// Why, and with which status.
    pub refusal: &'static Refusal,
    /// Further response headers.
    pub headers: Vec<(HeaderName, HeaderValue)>,
}

impl From<&'static Refusal> for Refused {
    fn from(refusal: &'static Refusal) -> Self {
        Refused { refusal, headers: Vec::new() }
    }
}

impl Verdict {
    /// A refusal of what there is no room for now: the client may try again after some seconds.
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
    /// Its header as it leaves, but for `Content-Length`.
    ///
    /// # Errors
    /// It has too many fields.
    pub(crate) fn header(&self) -> pingora::Result<ResponseHeader> {
        let mut header = ResponseHeader::build(self.status, Some(self.headers.len() + 3))?;
        for (name, value) in &self.headers {
            header.append_header(name.clone(), value.clone())?;
        }
        Ok(header)
    }
}

/// What every filter of an exchange sees, whatever the stage.
pub struct Scope<'a> {
    /// What is known of the exchange: the client's address, the route and so on.
    pub facts: Facts<'a>,
    /// The request header. Changes made in [`Filter::request`] are what the upstream sees.
    pub request: &'a mut RequestHeader,
    /// What this filter keeps for this exchange, from stage to stage; see [`Scope::keep`].
    pub state: &'a mut Option<Box<dyn Any + Send + Sync>>,
    /// Who asks, as far as filters have found out; see [`Scope::identify`].
    pub identity: &'a mut Option<Arc<Identity>>,
    /// This filter has nothing to do with the body of the request; see [`Scope::leave_request_body`].
    pub(crate) leaves_request_body: &'a mut bool,
    /// This filter has nothing to do with the body of the response; see [`Scope::leave_body`].
    pub(crate) leaves_body: &'a mut bool,
    /// Nothing of the response is to leave yet; see [`Scope::hold_body`].
    pub(crate) holds_body: &'a mut bool,
}

impl Scope<'_> {
    /// What keys and expressions are asked of: the request is what filters before this one have made of it.
    pub fn asked(&self) -> Asked<'_> {
        let facts = Facts { identity: self.identity.as_deref().or(self.facts.identity), ..self.facts };
        Asked { facts, ..self.facts.asked(self.request) }
    }

    /// Tells the filters behind this one, keys, logs and spans who asks. In [`Filter::request`]; later nobody hears it.
    pub fn identify(&mut self, identity: Identity) {
        *self.identity = Some(Arc::new(identity));
    }

    /// In [`Filter::request`]: this filter is not to see the body of this request. If no other one wants to, the body
    /// keeps its length, which the endpoint can then be told.
    pub fn leave_request_body(&mut self) {
        *self.leaves_request_body = true;
    }

    /// In [`Filter::response`]: nothing of the response is to leave before all of its body has passed the filters. A
    /// filter that refuses it then has the client see that refusal, and not a part of a response that is cut. Under
    /// pressure the response leaves earlier all the same, as far as the filter lets it.
    pub fn hold_body(&mut self) {
        *self.holds_body = true;
    }

    /// In [`Filter::response`]: this filter is not to see the body of this response. If no other one wants to, the body
    /// keeps its length, which the client can then be told.
    pub fn leave_body(&mut self) {
        *self.leaves_body = true;
    }

    /// Keeps `value` until the exchange is over, in place of what this filter kept before.
    pub fn keep<T: Any + Send + Sync>(&mut self, value: T) {
        *self.state = Some(Box::new(value));
    }

    /// What this filter kept at an earlier stage, if it kept a `T`.
    pub fn kept<T: Any>(&mut self) -> Option<&mut T> {
        self.state.as_mut()?.downcast_mut()
    }
}

/// The stages at which a filter wants to be called; others cost nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stages(u8);

impl Stages {
    /// None of them.
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
    /// Each of them.
    pub const ALL: Stages = Stages(127);

    /// Whether every stage of `other` is among these.
    pub const fn contains(self, other: Stages) -> bool {
        self.0 & other.0 == other.0
    }

    /// Whether at least one stage of `other` is among these.
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

/// How an exchange ended, as [`Filter::end`] sees it.
#[derive(Clone, Copy, Debug)]
pub struct Outcome {
    /// The status the client got; 0 if none was sent.
    pub status: u16,
    /// Why Forebay ended it, if it did.
    pub refusal: Option<&'static Refusal>,
}

/// Something done to the exchanges of a route, at one or more stages of their life.
///
/// Every stage but the end and those of trailers may wait for something and may refuse; waiting holds up this exchange
/// only. A call that waits for longer than the `filter_timeout` of the route is dropped. The filters of a route are
/// layers round its upstream, the first one outermost: requests pass them in the order of the list, responses and the
/// end in the reverse. The first verdict other than [`Verdict::Continue`] ends a stage.
///
/// A filter with a `when:` is called at no stage of an exchange for which that does not hold. It is asked once:
/// before the request stage of the filter, or before the response stages if it reads the response. Where it reads the
/// response, [`Filter::request`] is called before it is asked, of a filter that only [prepares](Filter::prepares)
/// there.
#[async_trait]
pub trait Filter: Send + Sync + 'static {
    /// The stages this filter wants.
    fn stages(&self) -> Stages;

    /// Whether [`Filter::request`] does no more than to make ready for the response, such as to ask for one without a
    /// coding. It is then called even where a `when:` reads the response, which is asked once that is here.
    fn prepares(&self) -> bool {
        false
    }

    /// Its `when:` reads the response, which is here, and does not hold: undoes what [`Filter::request`] has made
    /// ready. Called once a response of a filter that [prepares](Filter::prepares). Must not wait.
    fn stand_down(&self, _scope: &mut Scope<'_>) {}

    /// What it is called in metrics and logs, where filters of one key are different things, such as plugins. `None`:
    /// by its key. Asked once, when it was built; each new one is kept for ever.
    fn label(&self) -> Option<&str> {
        None
    }

    /// The headers of the request that this filter alone says something in, such as the name of a user. It removes in
    /// [`Filter::request`] what a client has sent under these names; where it acts, they are removed from the trailers of
    /// the request as well. Asked once, when it was built.
    fn own_headers(&self) -> Vec<HeaderName> {
        Vec::new()
    }

    /// The request header is here, nothing has been sent to an upstream.
    async fn request(&self, _scope: &mut Scope<'_>) -> Verdict {
        Verdict::Continue
    }

    /// A piece of the request body passes; `end` with the last one, which may be `None`.
    /// To hold a piece back, leave `Some` empty piece in its place: `None` means the end. If the request is sent to
    /// another endpoint, its pieces pass again from the first: [`Facts::attempt`] tells one attempt from another.
    async fn request_body(&self, _scope: &mut Scope<'_>, _piece: &mut Option<Bytes>, _end: bool) -> Verdict {
        Verdict::Continue
    }

    /// The response header is here, nothing of it has been sent to the client. It is an endpoint's, another filter's,
    /// or a refusal of Forebay itself, on which a refusal has no effect. An exchange may have several, each in place of
    /// the one before: each begins anew.
    async fn response(&self, _scope: &mut Scope<'_>, _response: &mut ResponseHeader) -> Verdict {
        Verdict::Continue
    }

    /// A piece of the response body passes; `end` with the last one, which may be `None`.
    async fn response_body(&self, _scope: &mut Scope<'_>, _piece: &mut Option<Bytes>, _end: bool) -> Verdict {
        Verdict::Continue
    }

    /// The fields behind the body of the request are here (RFC 9110 §6.5), if there are any. They may come before the
    /// last pieces of the body have been seen. Must not wait.
    fn request_trailers(&self, _scope: &mut Scope<'_>, _trailers: &mut HeaderMap) {}

    /// The fields behind the body of the response are here, if there are any. They may come before the last pieces of
    /// the body have been seen. Must not wait.
    fn response_trailers(&self, _scope: &mut Scope<'_>, _trailers: &mut HeaderMap) {}

    /// The exchange is over, whatever way it ended, and even if an earlier filter ended it before this one was asked.
    fn end(&self, _scope: &mut Scope<'_>, _outcome: Outcome) {}
}

/// A filter that can be named in YAML.
pub trait FilterType: Filter + Sized {
    /// Its key under `filters:`.
    const KEY: &'static str;
    /// Whether it always answers itself, so that its route needs no upstream.
    const ANSWERS: bool = false;
    /// The refusals it may utter, so that they are counted from the start. No two may share a reason.
    const REFUSALS: &'static [&'static Refusal] = &[];
    /// What is written below its key. Use `deny_unknown_fields`, so that a typing error is found.
    type Settings: DeserializeOwned + JsonSchema + Send + Sync + 'static;

    /// Builds the filter of one route; errors carry the path inside the settings. `around` has what it may need
    /// besides: the upstreams that it calls, the directory of the configuration, and a place for metrics of its own.
    fn build(settings: &Self::Settings, around: &Surroundings<'_>) -> Result<Self, BuildError>;
}
