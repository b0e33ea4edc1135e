//! What is asked, beside the header that Pingora keeps.

use http::{HeaderMap, HeaderValue, Uri};

use crate::proxy::grpc::Call;

/// The request of an exchange.
#[derive(Default)]
pub struct Request {
    /// `http` or `https`, as the client spoke it.
    pub scheme: &'static str,
    /// It ended with its header, whatever that announces: HTTP/2 says so.
    pub ended_with_header: bool,
    /// The target before filters, if one might change it. Its path is in the one form of paths.
    pub target: Option<Uri>,
    /// What followed the body, once that is whole.
    pub trailers: Option<HeaderMap>,
    /// It is a gRPC call, and this is known of it.
    pub grpc: Option<Call>,
    /// The protocol besides HTTP that the client asks for, as its route allows.
    pub upgrade: Option<HeaderValue>,
}

impl Request {
    /// A request over TLS, or in clear text.
    pub fn new(secure: bool) -> Request {
        Request { scheme: if secure { "https" } else { "http" }, ..Request::default() }
    }

    /// Whether it is a call of gRPC-Web that is bridged.
    pub fn is_grpc_web(&self) -> bool {
        self.grpc.is_some_and(|call| call.web)
    }
}
