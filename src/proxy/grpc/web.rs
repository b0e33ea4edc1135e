//! gRPC-Web: calls of browsers, which cannot read trailers (`routes[].grpc_web`).
//!
//! A call has the media type of gRPC-Web and otherwise equals a gRPC call. Its response has the trailers at the end of
//! its body: a message whose flags have the highest bit set, with one line per field (gRPC, PROTOCOL-WEB). Only the
//! binary form is bridged. The base64 form (`application/grpc-web-text`) passes unchanged.

use bytes::{BufMut, Bytes, BytesMut};
use http::{HeaderMap, HeaderName, HeaderValue, Method, header};
use pingora::Result;
use pingora::http::{RequestHeader, ResponseHeader};

const GRPC: &str = "application/grpc";
const GRPC_WEB: &str = "application/grpc-web";
/// gRPC-Web clients mark their calls with it. gRPC servers do not use it.
const X_GRPC_WEB: HeaderName = HeaderName::from_static("x-grpc-web");
/// The flags of the message with the trailers.
const TRAILERS: u8 = 0x80;
/// Size of flags and length, in bytes.
const PREFIX_BYTES: usize = 5;

/// Whether the request is a gRPC-Web call in the binary form.
pub fn is_call(request: &RequestHeader) -> bool {
    let mut kinds = request.headers.get_all(header::CONTENT_TYPE).iter();
    match (kinds.next(), kinds.next()) {
        (Some(kind), None) => request.method == Method::POST && exchanged(kind, GRPC_WEB, GRPC).is_some(),
        _ => false,
    }
}

/// Converts the header of a call to gRPC.
///
/// # Errors
///
/// None in practice: all fields are well-formed.
pub fn to_endpoint(request: &mut RequestHeader) -> Result<()> {
    if let Some(kind) = request.headers.get(header::CONTENT_TYPE).and_then(|kind| exchanged(kind, GRPC_WEB, GRPC)) {
        request.insert_header(header::CONTENT_TYPE, kind)?;
    }
    request.remove_header(&X_GRPC_WEB);
    request.insert_header(header::TE, HeaderValue::from_static("trailers"))
}

/// Converts the header of a gRPC response to gRPC-Web, which announces no HTTP trailers. `false`: the response is not
/// gRPC, and remains unchanged.
///
/// # Errors
///
/// None in practice, as above.
pub fn to_client(response: &mut ResponseHeader) -> Result<bool> {
    let kind = response.headers.get(header::CONTENT_TYPE).and_then(|kind| exchanged(kind, GRPC, GRPC_WEB));
    let Some(kind) = kind else { return Ok(false) };
    response.insert_header(header::CONTENT_TYPE, kind)?;
    response.remove_header(&header::TRAILER);
    Ok(true)
}

/// The last message of a response.
pub fn last_message(trailers: &HeaderMap) -> Bytes {
    let lines: usize = trailers.iter().map(|(name, value)| name.as_str().len() + value.len() + 4).sum();
    let mut message = BytesMut::with_capacity(PREFIX_BYTES + lines);
    message.put_u8(TRAILERS);
    // Trailers have a limit like header lists, far below this.
    message.put_u32(u32::try_from(lines).unwrap_or(u32::MAX));
    for (name, value) in trailers {
        message.put_slice(name.as_str().as_bytes());
        message.put_slice(b": ");
        message.put_slice(value.as_bytes());
        message.put_slice(b"\r\n");
    }
    message.freeze()
}

/// The media type with its beginning `from` replaced by `to`, if it is `from` alone or with a suffix or parameters.
fn exchanged(kind: &HeaderValue, from: &str, to: &str) -> Option<HeaderValue> {
    let (beginning, rest) = kind.to_str().ok()?.split_at_checked(from.len())?;
    let ends = matches!(rest.trim_start().as_bytes().first(), None | Some(b'+' | b';'));
    let is_it = beginning.eq_ignore_ascii_case(from) && ends;
    is_it.then(|| HeaderValue::try_from(format!("{to}{rest}")).ok()).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_call_is_known_by_its_media_type_and_gets_that_of_grpc() {
        let seen = |method: &str, kinds: &[&str]| {
            let mut request = RequestHeader::build(method, b"/a.B/C", None).expect("a request");
            kinds.iter().for_each(|kind| _ = request.append_header("content-type", *kind).expect("a field"));
            request.insert_header("x-grpc-web", "1").expect("a field");
            is_call(&request).then(|| {
                to_endpoint(&mut request).expect("well-formed");
                assert_eq!(request.headers["te"], "trailers");
                assert!(!request.headers.contains_key("x-grpc-web"));
                request.headers["content-type"].to_str().expect("text").to_owned()
            })
        };
        let post = |kind| seen("POST", &[kind]);
        assert_eq!(post("application/grpc-web").as_deref(), Some("application/grpc"));
        assert_eq!(post("Application/gRPC-Web+proto").as_deref(), Some("application/grpc+proto"));
        assert_eq!(post("application/grpc-web; a=b").as_deref(), Some("application/grpc; a=b"));
        for other in ["application/grpc-web-text", "application/grpc-webx", "application/grpc", "text/plain", "é"] {
            assert_eq!(post(other), None, "{other}");
        }
        assert_eq!(seen("GET", &["application/grpc-web"]), None);
        assert_eq!(seen("POST", &["application/grpc-web", "application/grpc-web"]), None);
    }

    #[test]
    fn an_answer_of_grpc_gets_the_media_type_of_its_client_and_another_one_does_not() {
        for (kind, made) in [
            ("application/grpc+proto", "application/grpc-web+proto"),
            ("application/grpc", "application/grpc-web"),
            ("text/html", "text/html"),
        ] {
            let mut response = ResponseHeader::build(200, None).expect("a response");
            response.insert_header("content-type", kind).expect("a field");
            response.insert_header("trailer", "grpc-status").expect("a field");
            let bridged = kind != made;
            assert_eq!(to_client(&mut response).expect("well-formed"), bridged);
            assert_eq!(response.headers["content-type"], made);
            assert_eq!(response.headers.contains_key("trailer"), !bridged);
        }
    }

    #[test]
    fn trailers_become_a_message_with_a_line_for_each_field() {
        let mut trailers = HeaderMap::new();
        trailers.insert("grpc-status", HeaderValue::from_static("5"));
        trailers.append("x-meta", HeaderValue::from_static("a"));
        trailers.append("x-meta", HeaderValue::from_static("b"));
        let message = last_message(&trailers);
        assert_eq!(&message[..5], [0x80, 0, 0, 0, 38]);
        assert_eq!(&message[5..], b"grpc-status: 5\r\nx-meta: a\r\nx-meta: b\r\n");
        assert_eq!(&last_message(&HeaderMap::new())[..], [0x80, 0, 0, 0, 0]);
    }
}
