//! What an entry of the admin endpoint answers: text, JSON, or a stream of events that goes on.

use std::pin::Pin;

use bytes::Bytes;
use futures::Stream;
use http::header::{self, HeaderName, HeaderValue};
use http::{Response, StatusCode};
use serde::Serialize;

/// What comes until whoever asked goes away, or until it ends.
pub type Pieces = Pin<Box<dyn Stream<Item = Bytes> + Send>>;

/// An answer of the admin endpoint.
pub struct Answer(pub(super) Box<Response<Body>>);

pub(super) enum Body {
    Whole(Bytes),
    /// One of the few that may be under way at once.
    Stream(Pieces),
}

impl Answer {
    /// 200 with this body.
    pub fn whole(content_type: &'static str, body: impl Into<Bytes>) -> Self {
        Answer::new(content_type, Body::Whole(body.into()))
    }

    /// 200 with this text.
    pub fn text(text: impl Into<String>) -> Self {
        Answer::whole("text/plain; charset=utf-8", text.into())
    }

    /// 200 with this as JSON, laid out for people.
    pub fn json(value: &impl Serialize) -> Self {
        match serde_json::to_vec_pretty(value) {
            Ok(mut body) => {
                body.push(b'\n');
                Answer::whole("application/json", body)
            }
            // Not reached: what is shown are structs and maps whose keys are text.
            Err(error) => Answer::error(StatusCode::INTERNAL_SERVER_ERROR, &error.to_string()),
        }
    }

    /// What was wrong, as JSON: `{"error": "…"}`.
    pub fn error(status: StatusCode, what: &str) -> Self {
        let body = format!("{:#}\n", serde_json::json!({ "error": what }));
        Answer::whole("application/json", body).with_status(status)
    }

    /// Server-sent events: make each with [`event`].
    pub fn events(events: Pieces) -> Self {
        Answer::new("text/event-stream", Body::Stream(events))
    }

    /// Lines of JSON, each for itself (NDJSON).
    pub fn lines(lines: Pieces) -> Self {
        Answer::new("application/x-ndjson", Body::Stream(lines))
    }

    /// With this status.
    pub fn with_status(mut self, status: StatusCode) -> Self {
        *self.0.status_mut() = status;
        self
    }

    /// With this header.
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
        Answer(Box::new(response))
    }
}

/// One server-sent event. `data` is one line, as compact JSON is.
pub fn event(name: &str, data: &str) -> Bytes {
    debug_assert!(!data.contains('\n'), "an event of several lines");
    Bytes::from(format!("event: {name}\ndata: {data}\n\n"))
}
