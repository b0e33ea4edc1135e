//! Refusals and errors of the configuration.
//!
//! A [`Refusal`] is for the client: Forebay's own response, or the reason why it ended an exchange early. A
//! [`BuildError`] is for the operator: an error in the configuration, with its path in the YAML.

pub mod grpc;
pub mod path;

use std::fmt;
use std::ops::Range;

/// The reason why Forebay itself ended an exchange or a connection.
///
/// One row has everything about it: the reason (`phase.cause`) is the metric label and the log field; the client
/// receives the status and the message. Once bytes of a response were sent, Forebay closes the connection instead, and
/// only the reason is used.
pub struct Refusal {
    /// `phase.cause`: the label of `forebay_refusals_total` and the `reason` of the access log.
    pub reason: &'static str,
    /// The status for the client. 499 (the client closed) is only logged.
    pub status: u16,
    /// One sentence for the client, without internal details.
    pub message: &'static str,
}

impl Refusal {
    /// Declares a refusal; meant for a `static`.
    pub const fn new(reason: &'static str, status: u16, message: &'static str) -> Self {
        Refusal { reason, status, message }
    }

    /// The body of its response, and the body's media type.
    pub fn body(&self, json: bool) -> (&'static str, String) {
        let Refusal { reason, status, message } = self;
        if json {
            // Reasons and messages are literals without quotes or backslashes; a test holds them to it.
            let body = format!(r#"{{"status":{status},"reason":"{reason}","message":"{message}"}}"#);
            ("application/json", body + "\n")
        } else {
            ("text/plain; charset=utf-8", format!("{status} {reason}: {message}\n"))
        }
    }

    /// The allowed methods, which a 405 must list (RFC 9110 §15.5.6).
    pub fn allow(&self) -> Option<&'static str> {
        (self.status == 405).then_some("GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS")
    }

    /// Seconds after which the client may retry, if the gateway was short of resources (RFC 9110 §10.2.3). Such a
    /// shortage passes as other exchanges end. The time is long enough that the same clients do not return at once, and
    /// short enough that they do not give up.
    pub fn retry_after(&self) -> Option<u32> {
        let passing = [
            &refusal::ROUTE_PRESSURE,
            &refusal::ROUTE_REQUESTS,
            &refusal::ROUTE_REQUESTS_PER_IP,
            &refusal::BUFFER_PRESSURE,
            &refusal::BUFFER_DISK_FULL,
            &refusal::BUFFER_PER_CLIENT,
            &refusal::QUEUE_FULL,
            &refusal::QUEUE_TIMEOUT,
            &refusal::CONNECT_EXHAUSTED,
        ];
        passing.contains(&self).then_some(5)
    }
}

impl PartialEq for Refusal {
    fn eq(&self, other: &Self) -> bool {
        self.reason == other.reason
    }
}

impl fmt::Debug for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.reason, self.status)
    }
}

macro_rules! refusals {
    ($($name:ident: $reason:literal, $status:literal, $message:literal;)*) => {
        /// Forebay's own refusals. A filter declares its refusals next to its code.
        pub mod refusal {
            use super::Refusal;
            $(
                #[doc = concat!("`", $reason, "`, ", $status, ": ", $message)]
                pub static $name: Refusal = Refusal::new($reason, $status, $message);
            )*
            /// All rows, in order.
            pub static ALL: &[&Refusal] = &[$(&$name),*];
        }
    };
}

refusals! {
    ACCEPT_CONNECTIONS: "accept.connections", 503, "The gateway has reached its limit of connections.";
    ACCEPT_CONNECTIONS_PER_IP: "accept.connections_per_ip", 429, "Too many connections from this address.";
    ACCEPT_RATE: "accept.rate", 503, "Connections come faster than the gateway takes them; try again later.";
    ACCEPT_RATE_PER_IP: "accept.rate_per_ip", 429, "Connections from this address come too fast; try again later.";
    ACCEPT_PROXY_PROTOCOL: "accept.proxy_protocol", 400, "This connection must begin with the PROXY protocol.";
    ACCEPT_PROXY_TIMEOUT: "accept.proxy_timeout", 408, "The header of the PROXY protocol did not arrive in time.";
    ACCEPT_PROXY_UNTRUSTED: "accept.proxy_untrusted", 403, "This address may not use the PROXY protocol.";
    HANDSHAKE_LIMIT: "handshake.limit", 503, "Too many TLS handshakes are under way.";
    HANDSHAKE_LIMIT_PER_IP: "handshake.limit_per_ip", 429, "Too many TLS handshakes of this address are under way.";
    HANDSHAKE_RATE: "handshake.rate", 503, "TLS handshakes come faster than the gateway does them.";
    HANDSHAKE_RATE_PER_IP: "handshake.rate_per_ip", 429, "TLS handshakes of this address come too fast.";
    HANDSHAKE_TIMEOUT: "handshake.timeout", 408, "The TLS handshake did not end in time.";
    HANDSHAKE_ABORTED: "handshake.aborted", 499, "The client went away in the middle of the TLS handshake.";
    HANDSHAKE_HTTP: "handshake.http", 400, "This port speaks TLS: use https instead of http.";
    HANDSHAKE_NOT_TLS: "handshake.not_tls", 400, "This port speaks TLS, and what was sent is something else.";
    HANDSHAKE_MALFORMED: "handshake.malformed", 400, "The ClientHello could not be understood.";
    HANDSHAKE_TOO_LARGE: "handshake.too_large", 400, "The ClientHello is too large.";
    HANDSHAKE_NO_NAME: "handshake.no_name", 400, "The client asked for no name.";
    HANDSHAKE_UNKNOWN_NAME: "handshake.unknown_name", 400, "Nothing is served under the name that was asked for.";
    HANDSHAKE_AWAITED: "handshake.awaited", 503, "The certificate of this name is still to be issued.";
    HANDSHAKE_VERSION: "handshake.version", 400, "No version of TLS could be agreed on.";
    HANDSHAKE_CIPHER: "handshake.cipher", 400, "No cipher suite, group or signature scheme could be agreed on.";
    HANDSHAKE_PROTOCOL: "handshake.protocol", 400, "No protocol could be agreed on by ALPN.";
    HANDSHAKE_NO_CERTIFICATE: "handshake.no_certificate", 400, "The client has shown no certificate.";
    HANDSHAKE_CERTIFICATE: "handshake.certificate", 400, "The certificate of the client is not accepted.";
    HANDSHAKE_ALERT: "handshake.alert", 400, "The client ended the TLS handshake with an alert.";
    HANDSHAKE_FAILED: "handshake.failed", 400, "The TLS handshake failed.";
    HANDSHAKE_RENEGOTIATION: "handshake.renegotiation", 400, "The client wanted to shake hands anew on its connection.";
    HEADER_TIMEOUT: "header.timeout", 408, "The request header did not arrive in time.";
    HEADER_ABORTED: "header.aborted", 499, "The client went away in the middle of its request header.";
    HEADER_TOO_LARGE: "header.too_large", 431, "The request header is too large.";
    HEADER_TOO_MANY: "header.too_many", 431, "The request has too many header fields.";
    HEADER_MALFORMED: "header.malformed", 400, "The request header could not be understood.";
    HEADER_VERSION: "header.version", 505, "This HTTP version is not supported.";
    HEADER_FRAMING: "header.framing", 400, "The length of the request body is ambiguous.";
    HEADER_ENCODING: "header.encoding", 501, "This transfer coding is not supported.";
    HEADER_HOST: "header.host", 400, "The Host of the request is missing, doubled or malformed.";
    HEADER_MISDIRECTED: "header.misdirected", 421, "This host is served over another connection.";
    HEADER_METHOD: "header.method", 405, "This method is not allowed.";
    HEADER_CONNECTION: "header.connection", 400, "The Connection field names what it must not.";
    HEADER_NAME: "header.name", 400, "A header field has a name that is not allowed here.";
    HEADER_PATH: "header.path", 400, "The path of the request can be read in more than one way.";
    HEADER_ALPN: "header.alpn", 400, "The client speaks another protocol than it has agreed on by ALPN.";
    HEADER_H2_PROTOCOL: "header.h2_protocol", 400, "The client broke the rules of HTTP/2.";
    HEADER_H2_STREAMS: "header.h2_streams", 429, "The client has more requests under way on one connection than it may.";
    HEADER_H2_RESETS: "header.h2_resets", 429, "The client gives up too many of its requests.";
    HEADER_H2_PROVOKED: "header.h2_provoked_resets", 429, "The client had too many of its requests reset by mistakes.";
    HEADER_H2_PINGS: "header.h2_pings", 429, "The client sends too many pings.";
    HEADER_H2_SETTINGS: "header.h2_settings", 429, "The client changes its settings too often.";
    HEADER_H2_WINDOW_UPDATES: "header.h2_window_updates", 429, "The client gives credit in too small pieces.";
    HEADER_H2_PRIORITY: "header.h2_priority", 429, "The client changes priorities too often.";
    HEADER_H2_CONTINUATION: "header.h2_continuation", 431, "The request header came in too many pieces.";
    HEADER_H2_EMPTY_DATA: "header.h2_empty_data", 429, "The client sends too many frames without content.";
    HEADER_H2_UNKNOWN: "header.h2_unknown_frames", 429, "The client sends too many unknown or useless frames.";
    ROUTE_NO_MATCH: "route.no_match", 404, "No route matches this request.";
    ROUTE_PRESSURE: "route.pressure", 503, "The gateway has no room for further requests; try again later.";
    ROUTE_REQUESTS: "route.requests", 503, "Too many requests are under way; try again later.";
    ROUTE_REQUESTS_PER_IP: "route.requests_per_ip", 429, "Too many requests of this address are under way; try again later.";
    ROUTE_FILTER_TIMEOUT: "route.filter_timeout", 504, "A filter of the gateway did not decide in time.";
    ROUTE_ABORTED: "route.aborted", 499, "The client went away while a filter waited.";
    BUFFER_TOO_LARGE: "buffer.too_large", 413, "The request body is larger than is allowed here.";
    BUFFER_TIMEOUT: "buffer.timeout", 408, "The request body did not arrive in time.";
    BUFFER_MIN_RATE: "buffer.min_rate", 408, "The request body arrives too slowly.";
    BUFFER_ABORTED: "buffer.aborted", 499, "The client went away in the middle of its request body.";
    BUFFER_MALFORMED: "buffer.malformed", 400, "The request body is not framed as its header says.";
    BUFFER_DISK_FULL: "buffer.disk_full", 503, "The gateway has no room for this request body; try again later.";
    BUFFER_DISK_FAILED: "buffer.disk_failed", 500, "The gateway could not keep the request body.";
    BUFFER_PER_CLIENT: "buffer.per_client", 429, "The gateway has no room for further request bodies of this address; try again later.";
    BUFFER_PRESSURE: "buffer.pressure", 503, "The gateway has no room for further request bodies; try again later.";
    QUEUE_FULL: "queue.full", 503, "Every backend is busy and too many wait already; try again later.";
    QUEUE_TIMEOUT: "queue.timeout", 503, "No backend had room in time; try again later.";
    QUEUE_ABORTED: "queue.aborted", 499, "The client went away while every backend was busy.";
    SELECT_BREAKER_OPEN: "select.breaker_open", 503, "The backend fails and is left alone for a while; try again later.";
    QUEUE_DEADLINE: "queue.deadline", 504, "No backend answered in the time that there was.";
    SELECT_NO_ENDPOINT: "select.no_endpoint", 503, "No backend is available.";
    SELECT_ABORTED: "select.aborted", 499, "The client went away before it was tried again.";
    SELECT_DEADLINE: "select.deadline", 504, "No backend answered in the time that there was.";
    CONNECT_REFUSED: "connect.refused", 502, "The backend refused the connection.";
    CONNECT_TIMEOUT: "connect.timeout", 504, "The backend did not accept the connection in time.";
    CONNECT_TLS: "connect.tls", 502, "No secure connection to the backend could be made.";
    CONNECT_FAILED: "connect.failed", 502, "The backend could not be reached.";
    CONNECT_EXHAUSTED: "connect.exhausted", 503, "The gateway has no room for further connections; try again later.";
    CONNECT_DEADLINE: "connect.deadline", 504, "No backend answered in the time that there was.";
    SEND_TIMEOUT: "send.timeout", 504, "The backend did not take the request in time.";
    SEND_RESET: "send.reset", 502, "The backend closed the connection while the request was sent.";
    SEND_BODY_TIMEOUT: "send.body_timeout", 408, "The request body did not arrive in time.";
    SEND_BODY_MALFORMED: "send.body_malformed", 400, "The request body is not framed as its header says.";
    SEND_TOO_LARGE: "send.too_large", 413, "The request body is larger than is allowed here.";
    SEND_BODY_TOTAL: "send.body_total", 408, "The request body took too long as a whole.";
    SEND_MIN_RATE: "send.min_rate", 408, "The request body arrives too slowly.";
    SEND_ABORTED: "send.aborted", 499, "The client went away while its request was being sent.";
    SEND_DEADLINE: "send.deadline", 504, "The backend did not answer in the time that there was.";
    WAIT_TIMEOUT: "wait.timeout", 504, "The backend did not answer in time.";
    WAIT_RESET: "wait.reset", 502, "The backend closed the connection without an answer.";
    WAIT_MALFORMED: "wait.malformed", 502, "The backend's answer could not be understood.";
    WAIT_ABORTED: "wait.aborted", 499, "The client went away while the backend was working.";
    WAIT_DEADLINE: "wait.deadline", 504, "The backend did not answer in the time that there was.";
    RECEIVE_TIMEOUT: "receive.timeout", 504, "The backend stopped sending its answer.";
    RECEIVE_RESET: "receive.reset", 502, "The backend closed the connection in the middle of its answer.";
    RECEIVE_MALFORMED: "receive.malformed", 502, "The backend's answer is not framed as its header says.";
    RECEIVE_ABORTED: "receive.aborted", 499, "The client went away while its answer was being sent.";
    RECEIVE_DEADLINE: "receive.deadline", 504, "The backend did not end its answer in the time that there was.";
    WRITE_TIMEOUT: "write.timeout", 408, "The client did not take its answer in time.";
    WRITE_MIN_RATE: "write.min_rate", 408, "The client took its answer too slowly.";
    WRITE_ABORTED: "write.aborted", 499, "The client went away before it had taken all of its answer.";
    WRITE_DISK_FAILED: "write.disk_failed", 500, "The gateway could not keep the answer.";
    FINISH_SHUTDOWN: "finish.shutdown", 503, "The gateway is shutting down.";
    INTERNAL: "internal", 500, "The gateway failed.";
}

/// An error in a configuration that is well-formed but cannot be built, such as an address that does not resolve, or an
/// invalid regex.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{path}{}: {message}", .inside.as_ref().map(Inside::told).unwrap_or_default())]
pub struct BuildError {
    /// The location in the YAML, such as `routes[2].match.path.regex`.
    pub path: String,
    /// The error, and what would be correct.
    pub message: String,
    /// The location within the text at `path`, if that is an expression.
    pub inside: Option<Inside>,
}

/// A range within a text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Inside {
    /// Its bytes.
    pub bytes: Range<usize>,
    /// The line of its start, from 1.
    pub line: usize,
    /// The column of its start in characters, from 1.
    pub column: usize,
}

impl Inside {
    /// The location of `bytes` in `text`.
    pub fn of(text: &str, bytes: Range<usize>) -> Self {
        let mut start = bytes.start.min(text.len());
        while !text.is_char_boundary(start) {
            start -= 1;
        }
        let before = &text[..start];
        let line_start = before.rfind('\n').map_or(0, |at| at + 1);
        let (line, column) = (1 + before.matches('\n').count(), 1 + before[line_start..].chars().count());
        Inside { bytes, line, column }
    }

    /// The location, as text.
    pub fn told(&self) -> String {
        format!(" (at {}:{} of the expression)", self.line, self.column)
    }
}

impl BuildError {
    /// Creates an error at `path`. Names in it are written by [`path::key`].
    pub fn new(path: impl Into<String>, message: impl Into<String>) -> Self {
        BuildError { path: path.into(), message: message.into(), inside: None }
    }

    /// The same error with a location within the text at its path.
    pub fn inside(mut self, inside: Inside) -> Self {
        self.inside = Some(inside);
        self
    }

    /// Creates an error at the entry `name`, which may be any text, such as the name of a header field.
    pub fn at_key(name: &str, message: impl Into<String>) -> Self {
        BuildError::new(path::key(name), message)
    }

    /// The same error seen from an outer level, with `path` prepended.
    pub fn under(self, path: &str) -> Self {
        BuildError { path: path::join(path, &self.path), ..self }
    }
}

/// The name in `known` that `wrong` most likely misspells.
pub fn nearest<'k>(wrong: &str, known: impl IntoIterator<Item = &'k str>) -> Option<&'k str> {
    let wrong = wrong.to_lowercase();
    let distance = |name: &str| {
        // A word that was left out or added, as in `hosts` for `host_names`, counts as one edit.
        let begun = wrong.len() >= 3 && (name.starts_with(&wrong) || wrong.starts_with(name));
        if begun { 1 } else { strsim::damerau_levenshtein(&wrong, &name.to_lowercase()) }
    };
    let (near, distance) =
        known.into_iter().map(|name| (name, distance(name))).min_by_key(|&(_, distance)| distance)?;
    (distance <= (wrong.chars().count() + 1) / 3).then_some(near)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::phase::Phase;

    #[test]
    fn every_reason_begins_with_a_phase_and_is_declared_once() {
        let mut reasons = std::collections::HashSet::new();
        for row in refusal::ALL {
            assert!(reasons.insert(row.reason), "{} is declared twice", row.reason);
            let phase = row.reason.split('.').next().unwrap_or_default();
            let known = Phase::ALL.iter().any(|p| p.name() == phase) || row.reason == "internal";
            assert!(known, "{} begins with no phase", row.reason);
            assert!((400..600).contains(&row.status), "{} has no error status", row.reason);
            let (_, json) = row.body(true);
            assert!(serde_json::from_str::<serde_json::Value>(&json).is_ok(), "{json} is no JSON");
        }
    }

    #[test]
    fn who_finds_no_room_is_told_when_to_come_again() {
        let told = refusal::ALL.iter().filter(|row| row.retry_after().is_some());
        assert_eq!(
            told.map(|row| (row.reason, row.status)).collect::<Vec<_>>(),
            [
                ("route.pressure", 503),
                ("route.requests", 503),
                ("route.requests_per_ip", 429),
                ("buffer.disk_full", 503),
                ("buffer.per_client", 429),
                ("buffer.pressure", 503),
                ("queue.full", 503),
                ("queue.timeout", 503),
                ("connect.exhausted", 503)
            ]
        );
    }

    #[test]
    fn a_path_grows_outwards() {
        let error = BuildError::new("regex", "unclosed group").under("path").under("routes[2].match");
        assert_eq!(error.path, "routes[2].match.path.regex");
    }
}
