//! The facts about a request besides the header, which Pingora keeps.

use http::{HeaderMap, HeaderValue, Uri};

use crate::proxy::grpc::Call;

/// The request of an exchange.
#[derive(Default)]
pub struct Request {
    /// `http` or `https`, by the client's connection.
    pub scheme: &'static str,
    /// Whether the request ended with its header, as HTTP/2 signals, whatever length the header announces.
    pub ended_with_header: bool,
    /// The target before filters, if a filter may change it. Its path is canonical.
    pub target: Option<Uri>,
    /// The trailers, once the body is complete.
    pub trailers: Option<HeaderMap>,
    /// The facts about a gRPC call; `None` for other requests.
    pub grpc: Option<Call>,
    /// The protocol other than HTTP that the client requests and the route allows.
    pub upgrade: Option<HeaderValue>,
}

impl Request {
    /// A request over TLS (`secure`) or in clear text.
    pub fn new(secure: bool) -> Request {
        Request { scheme: if secure { "https" } else { "http" }, ..Request::default() }
    }

    /// Whether the request is a gRPC-Web call that Forebay bridges.
    pub fn is_grpc_web(&self) -> bool {
        self.grpc.is_some_and(|call| call.web)
    }
}
