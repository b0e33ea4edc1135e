//! Removes fields because of their names: names that backends may read as another field, and fields that only a proxy
//! in front of Forebay or Forebay itself may set.
//!
//! This happens before routes and filters see the request, so that a forged field cannot satisfy a condition, and a
//! field that a filter sets under such a name remains.

use http::{HeaderMap, HeaderName};
use pingora::http::RequestHeader;

use crate::config::listener::OddNames;
use crate::error::{Refusal, refusal};

/// Prefixes of fields by which a proxy describes the client; many applications trust them.
const HEARSAY_BEGINS: [&str; 3] = ["x-forwarded-", "x-forebay-", "x-client-cert-"];
/// Complete names of such fields.
const HEARSAY: [&str; 13] = [
    "forwarded",
    "x-original-forwarded-for",
    "x-original-host",
    "client-ip",
    "cf-connecting-ip",
    "cf-connecting-ipv6",
    "fastly-client-ip",
    "x-real-ip",
    "x-client-ip",
    "true-client-ip",
    "x-cluster-client-ip",
    "x-original-url",
    "x-rewrite-url",
];

/// Fields for framing and routing, and fields that a client must not send.
const GUARDED: [&str; 12] = [
    "connection",
    "content-length",
    "content-type",
    "cookie",
    "authorization",
    "host",
    "proxy",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
    "via",
];

/// Removes the fields that must not pass; `trusted`: the peer is a trusted proxy.
///
/// # Errors
///
/// If a field has an unusual name and the listener refuses such requests.
pub fn check(request: &mut RequestHeader, odd: OddNames, trusted: bool) -> Result<(), &'static Refusal> {
    if odd == OddNames::Refuse && request.headers.keys().any(|name| is_odd(name.as_str())) {
        return Err(&refusal::HEADER_NAME);
    }
    for name in &dropped(&request.headers, odd, trusted) {
        request.remove_header(name);
    }
    Ok(())
}

/// Removes the fields with unusual names that were kept for a route that allows them.
pub fn drop_odd(request: &mut RequestHeader, odd: OddNames) {
    for name in &dropped(&request.headers, odd, true) {
        request.remove_header(name);
    }
}

/// Removes such fields from trailers, which some backends merge into the header. The request was already forwarded, so
/// it is not refused.
pub fn strip(trailers: &mut HeaderMap, odd: OddNames, trusted: bool) {
    for name in &dropped(trailers, odd, trusted) {
        trailers.remove(name);
    }
}

/// The names of the fields to remove.
fn dropped(headers: &HeaderMap, odd: OddNames, trusted: bool) -> Vec<HeaderName> {
    let goes = |name: &str| match (is_odd(name), odd) {
        (true, OddNames::Drop | OddNames::Refuse) => true,
        (true, OddNames::Keep) => stands_for_more(name),
        // CGI turns it into the variable HTTP_PROXY, which many libraries use as their proxy (CVE-2016-5385).
        (false, _) => name == "proxy" || (!trusted && is_hearsay(name)),
    };
    headers.keys().filter(|name| goes(name.as_str())).cloned().collect()
}

/// Whether only a trusted proxy may send this field. The name is in lower case.
pub fn is_hearsay(name: &str) -> bool {
    // Most names differ in their first letter from all of these.
    matches!(name.as_bytes().first(), Some(b'c' | b'f' | b't' | b'x'))
        && (HEARSAY_BEGINS.iter().any(|begin| name.starts_with(begin)) || HEARSAY.contains(&name))
}

/// Whether the name has characters other than letters, digits and hyphens. CGI, WSGI, Rack and PHP treat `X_Edge` and
/// `X-Edge` as one name.
fn is_odd(name: &str) -> bool {
    /// Whether each byte is a letter, a digit or a hyphen. A table, since every byte of every name is looked up.
    static PLAIN: [bool; 256] = {
        let mut plain = [false; 256];
        let mut byte = 0;
        while byte < 256 {
            plain[byte] = (byte as u8).is_ascii_alphanumeric() || byte as u8 == b'-';
            byte += 1;
        }
        plain
    };
    !name.bytes().all(|byte| PLAIN[usize::from(byte)])
}

/// Whether a backend could take the name for a field that Forebay reads or sets.
fn stands_for_more(name: &str) -> bool {
    let plain: String = name.chars().map(|char| if char.is_ascii_alphanumeric() { char } else { '-' }).collect();
    is_hearsay(&plain) || GUARDED.contains(&&*plain)
}

#[cfg(test)]
mod tests {
    use super::super::tests::request;
    use super::*;

    fn left(odd: OddNames, trusted: bool, names: &[&'static str]) -> Vec<String> {
        let fields: Vec<_> = names.iter().map(|name| (*name, "1")).collect();
        let mut request = request(&fields);
        check(&mut request, odd, trusted).expect("no refusal");
        let mut left: Vec<_> = request.headers.keys().map(|name| name.as_str().to_owned()).collect();
        left.sort_unstable();
        left
    }

    #[test]
    fn a_stranger_cannot_say_what_a_proxy_says() {
        let names = [
            "x-forwarded-for",
            "X-Forwarded-Client-Cert",
            "forwarded",
            "x-real-ip",
            "true-client-ip",
            "client-ip",
            "cf-connecting-ip",
            "CF-Connecting-IPv6",
            "fastly-client-ip",
            "x-original-forwarded-for",
            "x-original-host",
            "x-original-url",
        ];
        let ours = ["x-forebay-mirror", "X-Forebay-Anything", "x-client-cert-subject"];
        assert_eq!(
            left(OddNames::Drop, false, &[&names[..], &ours, &["x-own", "x-forwarded"]].concat()),
            ["x-forwarded", "x-own"]
        );
        assert_eq!(left(OddNames::Drop, true, &[&names[..], &ours].concat()).len(), names.len() + ours.len());
    }

    #[test]
    fn each_name_of_hearsay_is_recognised_by_its_first_letter() {
        assert!(HEARSAY_BEGINS.iter().chain(&HEARSAY).all(|name| is_hearsay(name)));
        assert!(!["", "x-forwarded", "cookie", "accept", "forwarded-for", "host"].iter().any(|name| is_hearsay(name)));
    }

    #[test]
    fn nobody_can_set_the_proxy_of_a_cgi_program() {
        for trusted in [false, true] {
            assert_eq!(left(OddNames::Drop, trusted, &["Proxy", "proxy-x"]), ["proxy-x"]);
        }
    }

    #[test]
    fn names_that_a_backend_may_read_as_others_are_dropped() {
        let odd = [
            "X_Edge",
            "X_Forwarded_For",
            "Transfer_Encoding",
            "Content_Length",
            "x.edge",
            "x~edge",
            "_",
            "x-edge_",
            "HTTP_HOST",
        ];
        for trusted in [false, true] {
            assert_eq!(left(OddNames::Drop, trusted, &[&odd[..], &["X-Edge", "a1"]].concat()), ["a1", "x-edge"]);
        }
    }

    #[test]
    fn such_a_request_is_refused_where_that_is_said() {
        for name in ["X_Edge", "x.edge"] {
            assert_eq!(check(&mut request(&[(name, "1")]), OddNames::Refuse, true), Err(&refusal::HEADER_NAME));
        }
        assert_eq!(left(OddNames::Refuse, true, &["x-edge"]), ["x-edge"]);
    }

    #[test]
    fn where_they_are_kept_those_that_stand_for_more_still_go() {
        let odd = [
            "X_Forwarded_For",
            "x.real.ip",
            "Transfer_Encoding",
            "content_length",
            "HOST_",
            "_proxy",
            "x_client_cert_subject",
        ];
        assert_eq!(left(OddNames::Keep, true, &odd), ["_proxy", "host_"]);
        assert_eq!(left(OddNames::Keep, false, &["api_key", "x.y"]), ["api_key", "x.y"]);
    }

    #[test]
    fn trailers_have_no_other_names_than_headers_may_have() {
        let fields = [("x_edge", "1"), ("x-forwarded-for", "1"), ("proxy", "1"), ("x-checksum", "1"), ("grpc.x", "1")];
        for (odd, trusted, expected) in [
            (OddNames::Drop, false, &["x-checksum"][..]),
            (OddNames::Refuse, true, &["x-checksum", "x-forwarded-for"]),
            (OddNames::Keep, false, &["grpc.x", "x-checksum", "x_edge"]),
        ] {
            let mut trailers = request(&fields).headers.clone();
            strip(&mut trailers, odd, trusted);
            let mut left: Vec<_> = trailers.keys().map(|name| name.as_str()).collect();
            left.sort_unstable();
            assert_eq!(left, expected, "{odd:?}");
        }
    }
}
