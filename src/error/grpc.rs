//! The mapping of refusals to gRPC: a status code, and a message for a header field.
//!
//! gRPC responds to every call with HTTP 200 and reports the result in `grpc-status`. For any other HTTP status, a
//! client derives a code itself, sometimes a wrong one: 504 becomes UNAVAILABLE, which means "try again".

use std::fmt::Write;

use super::Refusal;

/// The codes of gRPC (`google.rpc.Code`) that Forebay uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Code {
    /// The client cancelled the call.
    Cancelled = 1,
    /// An unknown error.
    Unknown = 2,
    /// The deadline of the call has passed.
    DeadlineExceeded = 4,
    /// The caller may not do this.
    PermissionDenied = 7,
    /// A limit was reached, such as a rate, a size or a quota.
    ResourceExhausted = 8,
    /// The system is not in the state that the call requires.
    FailedPrecondition = 9,
    /// The call conflicts with another one.
    Aborted = 10,
    /// The requested range is beyond the end.
    OutOfRange = 11,
    /// The method does not exist.
    Unimplemented = 12,
    /// An internal invariant is violated.
    Internal = 13,
    /// The service is unavailable; a retry may help.
    Unavailable = 14,
    /// The caller is not authenticated.
    Unauthenticated = 16,
}

impl Code {
    /// The code for an HTTP status of 400 and above.
    pub fn of_http(status: u16) -> Code {
        match status {
            400 | 500 => Code::Internal,
            401 => Code::Unauthenticated,
            403 => Code::PermissionDenied,
            404 | 405 | 501 | 505 => Code::Unimplemented,
            408 | 504 => Code::DeadlineExceeded,
            409 => Code::Aborted,
            412 => Code::FailedPrecondition,
            413 | 414 | 429 | 431 => Code::ResourceExhausted,
            416 => Code::OutOfRange,
            499 => Code::Cancelled,
            421 | 502 | 503 => Code::Unavailable,
            _ => Code::Unknown,
        }
    }
}

impl Refusal {
    /// The value of `grpc-status`.
    pub fn grpc_code(&self) -> Code {
        let (phase, cause) = self.reason.split_once('.').unwrap_or((self.reason, ""));
        match (phase, cause) {
            (_, "deadline") => Code::DeadlineExceeded,
            // No byte of the call was sent to a server, so a retry is safe, even after a timeout.
            ("connect", _) => Code::Unavailable,
            _ => Code::of_http(self.status),
        }
    }

    /// The value of `grpc-message`.
    pub fn grpc_message(&self) -> String {
        encode(&format!("{}: {}", self.reason, self.message))
    }
}

/// Encodes a message for `grpc-message`: printable ASCII is kept, and all other bytes are percent-encoded
/// (PROTOCOL-HTTP2, "Status-Message").
pub fn encode(message: &str) -> String {
    let mut encoded = String::with_capacity(message.len());
    for byte in message.bytes() {
        if matches!(byte, b' '..=b'~') && byte != b'%' {
            encoded.push(byte.into());
        } else {
            // Writing to a string cannot fail.
            let _ = write!(encoded, "%{byte:02X}");
        }
    }
    encoded
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::refusal;

    #[test]
    fn every_refusal_has_its_code() {
        use Code::*;
        let table = [
            ("accept.connections", Unavailable),
            ("accept.connections_per_ip", ResourceExhausted),
            ("header.too_large", ResourceExhausted),
            ("header.too_many", ResourceExhausted),
            ("header.malformed", Internal),
            ("header.framing", Internal),
            ("header.host", Internal),
            ("header.method", Unimplemented),
            ("route.no_match", Unimplemented),
            ("route.pressure", Unavailable),
            ("buffer.too_large", ResourceExhausted),
            ("buffer.timeout", DeadlineExceeded),
            ("buffer.min_rate", DeadlineExceeded),
            ("buffer.malformed", Internal),
            ("buffer.disk_full", Unavailable),
            ("buffer.disk_failed", Internal),
            ("queue.full", Unavailable),
            ("queue.timeout", Unavailable),
            ("queue.deadline", DeadlineExceeded),
            ("select.breaker_open", Unavailable),
            ("select.no_endpoint", Unavailable),
            ("select.deadline", DeadlineExceeded),
            ("connect.refused", Unavailable),
            ("connect.timeout", Unavailable),
            ("connect.tls", Unavailable),
            ("connect.failed", Unavailable),
            ("connect.deadline", DeadlineExceeded),
            ("send.timeout", DeadlineExceeded),
            ("send.reset", Unavailable),
            ("send.body_timeout", DeadlineExceeded),
            ("send.too_large", ResourceExhausted),
            ("send.deadline", DeadlineExceeded),
            ("wait.timeout", DeadlineExceeded),
            ("wait.reset", Unavailable),
            ("wait.malformed", Unavailable),
            ("wait.aborted", Cancelled),
            ("wait.deadline", DeadlineExceeded),
            ("receive.deadline", DeadlineExceeded),
            ("finish.shutdown", Unavailable),
            ("internal", Internal),
        ];
        for (reason, code) in table {
            let refusal = refusal::ALL.iter().find(|refusal| refusal.reason == reason);
            assert_eq!(refusal.expect(reason).grpc_code(), code, "{reason}");
        }
    }

    #[test]
    fn every_refusal_says_that_something_went_wrong() {
        for refusal in refusal::ALL {
            assert_ne!(refusal.grpc_code(), Code::Unknown, "{refusal:?}");
            assert!(refusal.grpc_message().starts_with(refusal.reason), "{refusal:?}");
        }
    }

    #[test]
    fn a_filter_s_refusal_goes_by_its_status() {
        use Code::*;
        let table = [
            (400, Internal),
            (401, Unauthenticated),
            (403, PermissionDenied),
            (404, Unimplemented),
            (408, DeadlineExceeded),
            (409, Aborted),
            (412, FailedPrecondition),
            (413, ResourceExhausted),
            (416, OutOfRange),
            (418, Unknown),
            (429, ResourceExhausted),
            (431, ResourceExhausted),
            (500, Internal),
            (501, Unimplemented),
            (502, Unavailable),
            (503, Unavailable),
            (504, DeadlineExceeded),
            (599, Unknown),
        ];
        for (status, code) in table {
            assert_eq!(Refusal::new("route.test", status, "").grpc_code(), code, "{status}");
        }
    }

    #[test]
    fn a_message_is_printable_ascii() {
        assert_eq!(encode("50 % of ~all~"), "50 %25 of ~all~");
        assert_eq!(encode("Grüße\r\n"), "Gr%C3%BC%C3%9Fe%0D%0A");
        assert_eq!(encode("\u{7f}"), "%7F");
    }
}
