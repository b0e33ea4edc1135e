//! Responses of the admin endpoint: text, JSON, or a stream of events.

use std::pin::Pin;

use bytes::Bytes;
use futures::Stream;
use http::header::{self, HeaderName, HeaderValue};
use http::{Response, StatusCode};
use serde::Serialize;

/// A stream of data that ends by itself or when the client disconnects.
pub type Pieces = Pin<Box<dyn Stream<Item = Bytes> + Send>>;

/// A response of the admin endpoint.
pub struct Reply(pub(super) Box<Response<Body>>);

pub(super) enum Body {
    Whole(Bytes),
    /// A stream; their number is limited.
    Stream(Pieces),
}

impl Reply {
    /// A 200 response with this body.
    pub fn whole(content_type: &'static str, body: impl Into<Bytes>) -> Self {
        Reply::new(content_type, Body::Whole(body.into()))
    }

    /// A 200 response with this text.
    pub fn text(text: impl Into<String>) -> Self {
        Reply::whole("text/plain; charset=utf-8", text.into())
    }

    /// A 200 response with this value as indented JSON.
    pub fn json(value: &impl Serialize) -> Self {
        match serde_json::to_vec_pretty(value) {
            Ok(mut body) => {
                body.push(b'\n');
                Reply::whole("application/json", body)
            }
            // Cannot happen: the values are structs and maps with text keys.
            Err(error) => Reply::error(StatusCode::INTERNAL_SERVER_ERROR, &error.to_string()),
        }
    }

    /// An error as JSON: `{"error": "…"}`.
    pub fn error(status: StatusCode, what: &str) -> Self {
        let body = format!("{:#}\n", serde_json::json!({ "error": what }));
        Reply::whole("application/json", body).with_status(status)
    }

    /// Server-sent events; create each with [`event`].
    pub fn events(events: Pieces) -> Self {
        Reply::new("text/event-stream", Body::Stream(events))
    }

    /// Lines of JSON (NDJSON).
    pub fn lines(lines: Pieces) -> Self {
        Reply::new("application/x-ndjson", Body::Stream(lines))
    }

    /// Sets the status.
    pub fn with_status(mut self, status: StatusCode) -> Self {
        *self.0.status_mut() = status;
        self
    }

    /// Adds a header field.
    pub fn with_header(mut self, name: HeaderName, value: HeaderValue) -> Self {
        self.0.headers_mut().insert(name, value);
        self
    }

    pub(super) fn goes_on(&self) -> bool {
        matches!(self.0.body(), Body::Stream(_))
    }

    fn new(content_type: &'static str, body: Body) -> Self {
        let mut response = Response::new(body);
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(content_type));
        headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
        headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
        Reply(Box::new(response))
    }
}

/// One server-sent event. `data` must be a single line, such as compact JSON.
pub fn event(name: &str, data: &str) -> Bytes {
    debug_assert!(!data.contains('\n'), "an event of several lines");
    Bytes::from(format!("event: {name}\ndata: {data}\n\n"))
}
