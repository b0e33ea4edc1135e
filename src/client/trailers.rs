//! Trailer fields (RFC 9110 §6.5): which may pass, which may be announced, and their HTTP/1 form.

use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, header};

/// Fields that must not be in trailers, because they are needed before the content or concern the connection (RFC 9110
/// §6.5.1): framing, routing, request modifiers, authentication, response and cache control, and content format.
static NEVER: [HeaderName; 42] = [
    header::TRANSFER_ENCODING,
    header::CONTENT_LENGTH,
    header::TRAILER,
    header::CONNECTION,
    header::UPGRADE,
    header::TE,
    HeaderName::from_static("keep-alive"),
    HeaderName::from_static("proxy-connection"),
    header::HOST,
    header::FORWARDED,
    header::VIA,
    header::CACHE_CONTROL,
    header::EXPECT,
    header::MAX_FORWARDS,
    header::PRAGMA,
    header::RANGE,
    header::IF_MATCH,
    header::IF_NONE_MATCH,
    header::IF_MODIFIED_SINCE,
    header::IF_UNMODIFIED_SINCE,
    header::IF_RANGE,
    header::AUTHORIZATION,
    header::WWW_AUTHENTICATE,
    header::PROXY_AUTHORIZATION,
    header::PROXY_AUTHENTICATE,
    HeaderName::from_static("authentication-info"),
    HeaderName::from_static("proxy-authentication-info"),
    header::COOKIE,
    header::SET_COOKIE,
    header::AGE,
    header::DATE,
    header::EXPIRES,
    header::LOCATION,
    header::RETRY_AFTER,
    header::VARY,
    header::WARNING,
    header::CONTENT_ENCODING,
    header::CONTENT_TYPE,
    header::CONTENT_RANGE,
    HeaderName::from_static("x-forwarded-for"),
    HeaderName::from_static("x-forwarded-host"),
    HeaderName::from_static("x-forwarded-proto"),
];

/// Number of leading entries of `NEVER` that concern framing or one connection.
const OF_CONNECTION: usize = 8;

/// Removes the fields that must not be in trailers. In a gRPC call other fields are metadata, whatever their names.
pub fn strip(trailers: &mut HeaderMap, is_grpc: bool) {
    for name in &NEVER[..if is_grpc { OF_CONNECTION } else { NEVER.len() }] {
        while trailers.remove(name).is_some() {}
    }
}

/// The remaining value of `Trailer`, which announces names; `None`: nothing remains. `may_pass`: trailers are possible.
pub fn announcement(headers: &HeaderMap, may_pass: bool) -> Option<HeaderValue> {
    if !may_pass {
        return None;
    }
    let named = headers.get_all(header::TRAILER).iter().flat_map(|names| names.as_bytes().split(|&byte| byte == b','));
    let names = named
        .map(<[u8]>::trim_ascii)
        .filter(|name| HeaderName::from_bytes(name).is_ok_and(|name| !NEVER.contains(&name)));
    let names: Vec<&[u8]> = names.collect();
    HeaderValue::from_bytes(&names.join(&b", "[..])).ok().filter(|names| !names.is_empty())
}

/// The end of a chunked body: the last chunk, the trailers, and an empty line (RFC 9112 §7.1).
pub fn last_chunk(trailers: Option<&HeaderMap>) -> Bytes {
    let Some(trailers) = trailers.filter(|trailers| !trailers.is_empty()) else {
        return Bytes::from_static(b"0\r\n\r\n");
    };
    let mut bytes = b"0\r\n".to_vec();
    for (name, value) in trailers {
        bytes.extend_from_slice(name.as_str().as_bytes());
        bytes.extend_from_slice(b": ");
        bytes.extend_from_slice(value.as_bytes());
        bytes.extend_from_slice(b"\r\n");
    }
    bytes.extend_from_slice(b"\r\n");
    bytes.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fields(fields: &[(&str, &str)]) -> HeaderMap {
        let field = |(name, value): &(&str, &str)| (name.parse::<HeaderName>().unwrap(), value.parse().unwrap());
        fields.iter().map(field).collect()
    }

    #[test]
    fn what_must_be_known_before_the_content_is_dropped() {
        let mut trailers = fields(&[
            ("x-sum", "1"),
            ("content-length", "3"),
            ("set-cookie", "a=b"),
            ("transfer-encoding", "chunked"),
            ("authorization", "Basic x"),
            ("digest", "sha-256=x"),
        ]);
        trailers.append("set-cookie", "c=d".parse().unwrap());
        strip(&mut trailers, false);
        let mut left: Vec<_> = trailers.keys().map(HeaderName::as_str).collect();
        left.sort_unstable();
        assert_eq!(left, ["digest", "x-sum"]);
    }

    #[test]
    fn metadata_of_grpc_may_have_any_name_but_those_of_the_connection() {
        let mut trailers =
            fields(&[("grpc-status", "0"), ("retry-after", "3"), ("content-length", "3"), ("connection", "close")]);
        strip(&mut trailers, true);
        let mut left: Vec<_> = trailers.keys().map(HeaderName::as_str).collect();
        left.sort_unstable();
        assert_eq!(left, ["grpc-status", "retry-after"]);
    }

    #[test]
    fn only_what_may_come_is_announced() {
        for (announced, left) in [
            (&[("trailer", "X-Sum")][..], Some("X-Sum")),
            (&[("trailer", "X-Sum, Content-Length,,X-Time")], Some("X-Sum, X-Time")),
            (&[("trailer", "a b, Host")], None),
            (&[], None),
        ] {
            let left = left.map(|names: &str| names.parse::<HeaderValue>().unwrap());
            assert_eq!(announcement(&fields(announced), true), left, "{announced:?}");
            assert_eq!(announcement(&fields(announced), false), None);
        }
        let mut several = fields(&[("trailer", "X-A")]);
        several.append("trailer", "X-B, Age".parse().unwrap());
        assert_eq!(announcement(&several, true), Some(HeaderValue::from_static("X-A, X-B")));
    }

    #[test]
    fn the_last_chunk_has_the_trailers_behind_it() {
        assert_eq!(last_chunk(None), "0\r\n\r\n");
        assert_eq!(last_chunk(Some(&HeaderMap::new())), "0\r\n\r\n");
        let mut trailers = fields(&[("x-a", "1")]);
        trailers.append("x-a", "2".parse().unwrap());
        assert_eq!(last_chunk(Some(&trailers)), "0\r\nx-a: 1\r\nx-a: 2\r\n\r\n");
    }
}
