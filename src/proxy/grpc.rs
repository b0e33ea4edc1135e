//! The differences between a gRPC call and other requests: its refusals, cut responses and log fields.
//!
//! Routes and filters treat a call as any other request. Its refusals are gRPC responses (`write`). Its result is in
//! `grpc-status`, in the header or the trailers of the response.

pub mod web;

use h2::Reason;
use http::{HeaderMap, HeaderName, HeaderValue, Method, Version, header};
use pingora::Error;
use pingora::http::{RequestHeader, ResponseHeader};

use crate::error::Refusal;
use crate::error::grpc::{Code, encode};
use crate::filter::{Answer, Refused};
use crate::framing::takes_trailers;

/// Fields with the status and the message of a call.
pub const GRPC_STATUS: HeaderName = HeaderName::from_static("grpc-status");
const GRPC_MESSAGE: HeaderName = HeaderName::from_static("grpc-message");

/// Maximum length of a filter's body that is used as the message, in bytes. A longer one is a page, which gRPC clients
/// do not show.
const MESSAGE_BYTES: usize = 1 << 10;

/// The facts about an exchange that is a gRPC call.
#[derive(Clone, Copy, Debug, Default)]
pub struct Call {
    /// The `grpc-status`, of the endpoint or of Forebay.
    pub status: Option<u16>,
    /// The HTTP status that Forebay's response replaces.
    pub stands_for: Option<u16>,
    /// Whether the call is a bridged gRPC-Web call.
    pub web: bool,
    /// Whether the response is gRPC-Web, too: the trailers are in the body.
    pub answers_web: bool,
}

impl Call {
    /// The call, if the request is one.
    pub fn of(request: &RequestHeader) -> Option<Call> {
        is_grpc(request).then(Call::default)
    }

    /// The gRPC-Web call, if the request is one.
    pub fn of_web(request: &RequestHeader) -> Option<Call> {
        web::is_call(request).then(|| Call { web: true, ..Call::default() })
    }

    /// Records the status of the call, if these fields contain it.
    pub fn note(&mut self, fields: &HeaderMap) {
        let status = fields.get(&GRPC_STATUS).and_then(|status| status.to_str().ok()?.parse().ok());
        self.status = status.or(self.status);
    }

    /// Records Forebay's own response in place of one with an HTTP status.
    pub fn refused(&mut self, code: Code, status: u16) {
        *self = Call { status: Some(code as u16), stands_for: Some(status), ..*self };
    }
}

/// A complete response that consists of a header only ("Trailers-Only").
pub struct TrailersOnly {
    /// Its gRPC status code.
    pub code: Code,
    /// The HTTP status that it replaces.
    pub stands_for: u16,
    /// The header.
    pub header: ResponseHeader,
}

/// The response to a refused call.
///
/// # Errors
///
/// None in practice: all fields are well-formed.
pub fn refusal(refused: &Refused) -> pingora::Result<TrailersOnly> {
    let Refused { refusal, headers } = refused;
    let mut answer = trailers_only(refusal.grpc_code(), refusal.status, &refusal.grpc_message(), headers)?;
    if let Some(seconds) = refusal.retry_after() {
        answer.header.insert_header(header::RETRY_AFTER, HeaderValue::from(seconds))?;
    }
    Ok(answer)
}

/// The gRPC response that replaces a filter's response, if that is an error and not gRPC.
///
/// # Errors
///
/// None in practice, as above.
pub fn answer(answer: &Answer) -> pingora::Result<Option<TrailersOnly>> {
    let is_grpc = answer.headers.iter().any(|(name, _)| *name == GRPC_STATUS);
    if is_grpc || answer.status.as_u16() < 400 {
        return Ok(None);
    }
    let text = std::str::from_utf8(&answer.body).ok().map(str::trim);
    let text = text.filter(|text| !text.is_empty() && text.len() <= MESSAGE_BYTES);
    let message = text.or(answer.status.canonical_reason()).unwrap_or_default();
    let status = answer.status.as_u16();
    trailers_only(Code::of_http(status), status, &encode(message), &answer.headers).map(Some)
}

fn trailers_only(
    code: Code,
    stands_for: u16,
    message: &str,
    headers: &[(HeaderName, HeaderValue)],
) -> pingora::Result<TrailersOnly> {
    let mut header = ResponseHeader::build(200, Some(headers.len() + 4))?;
    header.insert_header(header::CONTENT_TYPE, HeaderValue::from_static("application/grpc"))?;
    header.insert_header(GRPC_STATUS, HeaderValue::from(code as u16))?;
    header.insert_header(GRPC_MESSAGE, message)?;
    for (name, value) in headers {
        // These fields describe a body, and there is none.
        if ![header::CONTENT_TYPE, header::CONTENT_ENCODING, header::CONTENT_LENGTH].contains(name) {
            header.append_header(name.clone(), value.clone())?;
        }
    }
    Ok(TrailersOnly { code, stands_for, header })
}

/// The code for the reset of a stream whose response had begun (RFC 9113 §7), so that a gRPC client derives the right
/// status.
///
/// `CANCEL` means that the rest is no longer wanted: clients report DEADLINE_EXCEEDED if their deadline has passed, and
/// CANCELLED otherwise. The endpoint's code for the stream is passed on; a code for its connection is not.
pub fn reset_code(refusal: &Refusal, error: Option<&Error>) -> Reason {
    let told =
        error.and_then(endpoint_reset).filter(|&code| matches!(code, Reason::CANCEL | Reason::ENHANCE_YOUR_CALM));
    let time_is_over = matches!(refusal.grpc_code(), Code::DeadlineExceeded | Code::Cancelled);
    told.unwrap_or(if time_is_over { Reason::CANCEL } else { Reason::INTERNAL_ERROR })
}

/// The code of the endpoint's stream reset, if that is the cause.
fn endpoint_reset(error: &Error) -> Option<Reason> {
    let mut cause: &(dyn std::error::Error + 'static) = error.cause.as_deref()?;
    loop {
        if let Some(error) = cause.downcast_ref::<h2::Error>() {
            return error.reason().filter(|_| error.is_reset() && error.is_remote());
        }
        cause = cause.source()?;
    }
}

/// Whether a request has the form of a gRPC call: an HTTP/2 POST that accepts trailers, with the media type
/// `application/grpc`, alone, with a suffix (`+proto`) or with parameters. Route and upstream decide whether it is
/// treated as one.
fn is_grpc(request: &RequestHeader) -> bool {
    request.version == Version::HTTP_2
        && request.method == Method::POST
        && takes_trailers(&request.headers)
        && is_grpc_type(&request.headers)
}

/// Whether the media type is that of gRPC.
pub fn is_grpc_type(headers: &HeaderMap) -> bool {
    const GRPC: &[u8] = b"application/grpc";
    let mut kinds = headers.get_all(header::CONTENT_TYPE).iter();
    // Two Content-Type fields are invalid: an endpoint could use either.
    let (Some(kind), None) = (kinds.next(), kinds.next()) else { return false };
    let Some((kind, rest)) = kind.as_bytes().split_at_checked(GRPC.len()) else { return false };
    kind.eq_ignore_ascii_case(GRPC) && matches!(rest.trim_ascii_start().first(), None | Some(b'+' | b';'))
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use http::StatusCode;
    use pingora::ErrorType;

    use super::*;
    use crate::error::refusal as refusals;
    use crate::proxy::header::tests::request;

    fn fields(answer: &TrailersOnly) -> Vec<(&str, &str)> {
        let fields = answer.header.headers.iter();
        fields.map(|(name, value)| (name.as_str(), value.to_str().expect("text"))).collect()
    }

    #[test]
    fn a_refusal_keeps_its_fields_and_its_http_status() {
        let headers = vec![(header::RETRY_AFTER, HeaderValue::from_static("7"))];
        static LIMITED: Refusal = Refusal::new("route.limited", 429, "Slow down: 50 % is enough.");
        let answer = refusal(&Refused { refusal: &LIMITED, headers }).expect("an answer");
        assert_eq!((answer.header.status.as_u16(), answer.stands_for), (200, 429));
        assert_eq!(
            fields(&answer),
            [
                ("content-type", "application/grpc"),
                ("grpc-status", "8"),
                ("grpc-message", "route.limited: Slow down: 50 %25 is enough."),
                ("retry-after", "7"),
            ]
        );
        let full = refusal(&Refused::from(&refusals::QUEUE_FULL)).expect("an answer");
        assert!(fields(&full).contains(&("retry-after", "5")), "as over HTTP");
    }

    #[test]
    fn an_error_that_a_filter_answers_is_one_of_grpc() {
        let of = |status, body: &str, headers| {
            let answer = Answer {
                status: StatusCode::from_u16(status).expect("a status"),
                headers,
                body: Bytes::copy_from_slice(body.as_bytes()),
            };
            super::answer(&answer).expect("an answer")
        };
        let closed =
            of(503, "Back in two minutes.\n", vec![(header::CONTENT_TYPE, HeaderValue::from_static("text/plain"))]);
        assert_eq!(
            fields(&closed.expect("gRPC")),
            [("content-type", "application/grpc"), ("grpc-status", "14"), ("grpc-message", "Back in two minutes.")]
        );
        let page = of(401, &"<p>".repeat(400), Vec::new()).expect("gRPC");
        assert!(fields(&page).contains(&("grpc-message", "Unauthorized")), "a page is no message");
        let own = vec![(GRPC_STATUS, HeaderValue::from_static("5"))];
        assert!(of(404, "", own).is_none(), "it speaks gRPC itself");
        assert!(of(200, "", Vec::new()).is_none() && of(302, "", Vec::new()).is_none(), "no error");
    }

    #[test]
    fn how_a_call_went_is_said_in_the_header_or_later() {
        let fields = |status: &str| HeaderMap::from_iter([(GRPC_STATUS, status.parse().expect("a value"))]);
        let mut call = Call::default();
        call.note(&HeaderMap::new());
        assert_eq!(call.status, None);
        call.note(&fields("5"));
        call.note(&fields("five"));
        assert_eq!(call.status, Some(5));
        call.refused(Code::DeadlineExceeded, 504);
        assert_eq!((call.status, call.stands_for), (Some(4), Some(504)));
    }

    #[test]
    fn a_call_that_is_cut_is_reset_with_a_code_that_says_why() {
        for (refusal, code) in [
            (&refusals::RECEIVE_DEADLINE, Reason::CANCEL),
            (&refusals::RECEIVE_TIMEOUT, Reason::CANCEL),
            (&refusals::WRITE_TIMEOUT, Reason::CANCEL),
            (&refusals::RECEIVE_ABORTED, Reason::CANCEL),
            (&refusals::RECEIVE_RESET, Reason::INTERNAL_ERROR),
            (&refusals::WRITE_DISK_FAILED, Reason::INTERNAL_ERROR),
            (&refusals::INTERNAL, Reason::INTERNAL_ERROR),
        ] {
            assert_eq!(reset_code(refusal, None), code, "{refusal:?}");
        }
        let broken = Error::because(ErrorType::ReadError, "reading", h2::Error::from(Reason::CANCEL));
        assert_eq!(
            reset_code(&refusals::RECEIVE_RESET, Some(&broken)),
            Reason::INTERNAL_ERROR,
            "not the endpoint's word"
        );
    }

    #[test]
    fn a_grpc_call_is_known_by_its_whole_form() {
        let call = |version, method: &str, te: &[&str], kinds: &[&str]| {
            let fields = te.iter().map(|te| ("te", *te)).chain(kinds.iter().map(|kind| ("content-type", *kind)));
            let mut request = request(&fields.collect::<Vec<_>>());
            request.set_version(version);
            request.set_method(method.parse().expect("a method"));
            is_grpc(&request)
        };
        let of = |kind| call(Version::HTTP_2, "POST", &["trailers"], &[kind]);
        for kind in ["application/grpc", "Application/gRPC", "application/grpc+proto", "application/grpc;charset=utf-8"]
        {
            assert!(of(kind), "{kind}");
        }
        for kind in ["application/grpc ; v=1", "application/grpc+json; v=1"] {
            assert!(of(kind), "{kind}");
        }
        for kind in
            ["application/grpc-web", "application/grpc-web+proto", "application/grpcx", "application/grp", "", "x"]
        {
            assert!(!of(kind), "{kind}");
        }
        assert!(!of("text/plain; x=application/grpc"));
        let kind = ["application/grpc"];
        assert!(call(Version::HTTP_2, "POST", &["gzip, Trailers;q=1"], &kind));
        assert!(call(Version::HTTP_2, "POST", &["gzip", "trailers"], &kind));
        assert!(!call(Version::HTTP_2, "POST", &["xtrailers"], &kind));
        assert!(!call(Version::HTTP_2, "POST", &[], &kind));
        assert!(!call(Version::HTTP_2, "GET", &["trailers"], &kind));
        assert!(!call(Version::HTTP_11, "POST", &["trailers"], &kind));
        assert!(!call(Version::HTTP_2, "POST", &["trailers"], &[]));
        assert!(!call(Version::HTTP_2, "POST", &["trailers"], &["application/grpc", "text/plain"]));
    }
}
