//! A trace collector: it accepts OTLP over HTTP and decodes the messages that stories need.

use std::net::SocketAddr;

use prost::Message;

use super::wire::Request;
use super::{Origin, eventually};

/// A collector that accepts every export.
pub struct Collector {
    origin: Origin,
}

impl Collector {
    /// Listens on a loopback port.
    pub fn start() -> Collector {
        Collector { origin: Origin::answering(|_| super::ok("")) }
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.origin.address()
    }

    /// The received exports.
    pub fn exports(&self) -> Vec<Request> {
        self.origin.requests()
    }

    /// The resource attributes of all exports, as `key=value`.
    pub fn resources(&self) -> Vec<String> {
        let resources = self.decoded().into_iter().filter_map(|spans| spans.resource);
        resources.flat_map(|resource| resource.attributes).map(|pair| format!("{}={}", pair.key, pair.text())).collect()
    }

    /// All received spans.
    pub fn spans(&self) -> Vec<Span> {
        self.decoded().into_iter().flat_map(|spans| spans.scopes).flat_map(|scope| scope.spans).collect()
    }

    /// Waits for the spans of the exchange with this target; its own span comes first.
    pub fn exchange(&self, path: &str) -> Vec<Span> {
        eventually(&format!("the spans of {path}"), || {
            let spans = self.spans();
            let server = spans.iter().find(|span| span.kind == Span::SERVER && span.text("url.path") == path)?.clone();
            let rest = spans.into_iter().filter(|span| span.trace == server.trace && span.id != server.id);
            Some([server.clone()].into_iter().chain(rest).collect())
        })
    }

    fn decoded(&self) -> Vec<ResourceSpans> {
        let exports = self.exports();
        exports.iter().flat_map(|export| Export::decode(&*export.body).expect("an export").resources).collect()
    }
}

/// One span.
#[derive(Clone, PartialEq, Message)]
pub struct Span {
    #[prost(bytes = "vec", tag = "1")]
    pub trace: Vec<u8>,
    #[prost(bytes = "vec", tag = "2")]
    pub id: Vec<u8>,
    #[prost(string, tag = "3")]
    pub state: String,
    #[prost(bytes = "vec", tag = "4")]
    pub parent: Vec<u8>,
    #[prost(string, tag = "5")]
    pub name: String,
    #[prost(int32, tag = "6")]
    pub kind: i32,
    #[prost(fixed64, tag = "7")]
    pub begun_nanos: u64,
    #[prost(fixed64, tag = "8")]
    pub ended_nanos: u64,
    #[prost(message, repeated, tag = "9")]
    attributes: Vec<KeyValue>,
    #[prost(message, optional, tag = "15")]
    status: Option<Status>,
}

impl Span {
    /// The kind of a phase.
    pub const INTERNAL: i32 = 1;
    /// The kind of an exchange.
    pub const SERVER: i32 = 2;
    /// The kind of an attempt.
    pub const CLIENT: i32 = 3;

    /// An attribute as text; empty if it is missing.
    pub fn text(&self, key: &str) -> String {
        self.attributes.iter().find(|pair| pair.key == key).map(KeyValue::text).unwrap_or_default()
    }

    /// The id of the trace, as headers and logs write it.
    pub fn trace_id(&self) -> String {
        hex(&self.trace)
    }

    /// Its own id, as headers write it.
    pub fn span_id(&self) -> String {
        hex(&self.id)
    }

    /// The error status; `None` if there is none.
    pub fn error(&self) -> Option<&str> {
        self.status.as_ref().filter(|status| status.code == 2).map(|status| &*status.message)
    }

    /// For how long it lasted.
    pub fn nanos(&self) -> u64 {
        self.ended_nanos - self.begun_nanos
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[derive(Clone, PartialEq, Message)]
struct Export {
    #[prost(message, repeated, tag = "1")]
    resources: Vec<ResourceSpans>,
}

#[derive(Clone, PartialEq, Message)]
struct ResourceSpans {
    #[prost(message, optional, tag = "1")]
    resource: Option<Resource>,
    #[prost(message, repeated, tag = "2")]
    scopes: Vec<ScopeSpans>,
}

#[derive(Clone, PartialEq, Message)]
struct Resource {
    #[prost(message, repeated, tag = "1")]
    attributes: Vec<KeyValue>,
}

#[derive(Clone, PartialEq, Message)]
struct ScopeSpans {
    #[prost(message, repeated, tag = "2")]
    spans: Vec<Span>,
}

#[derive(Clone, PartialEq, Message)]
struct KeyValue {
    #[prost(string, tag = "1")]
    key: String,
    #[prost(message, optional, tag = "2")]
    value: Option<AnyValue>,
}

impl KeyValue {
    fn text(&self) -> String {
        match self.value.as_ref().and_then(|value| value.value.as_ref()) {
            Some(any_value::Value::Text(text)) => text.clone(),
            Some(any_value::Value::Bool(bool)) => bool.to_string(),
            Some(any_value::Value::Int(int)) => int.to_string(),
            None => String::new(),
        }
    }
}

#[derive(Clone, PartialEq, Message)]
struct AnyValue {
    #[prost(oneof = "any_value::Value", tags = "1, 2, 3")]
    value: Option<any_value::Value>,
}

mod any_value {
    #[derive(Clone, PartialEq, prost::Oneof)]
    pub enum Value {
        #[prost(string, tag = "1")]
        Text(String),
        #[prost(bool, tag = "2")]
        Bool(bool),
        #[prost(int64, tag = "3")]
        Int(i64),
    }
}

#[derive(Clone, PartialEq, Message)]
struct Status {
    #[prost(string, tag = "2")]
    message: String,
    #[prost(int32, tag = "3")]
    code: i32,
}
