//! Parses and checks a request header as raw bytes. The checks are stricter than Pingora's, so that an irregular
//! request is refused with a reason before anything is allocated for it.
//!
//! There are two pure steps: [`Scanner`] finds the end as bytes arrive, and [`inspect`] checks the complete header.
//! Framing (RFC 9112 §6) and `Host` (§3.2) are checked here, since request smuggling depends on two readings of one
//! request.

use std::mem::MaybeUninit;
use std::net::Ipv6Addr;

use bytes::{Bytes, BytesMut};
use http::uri::PathAndQuery;
use http::{Method, Version};
use pingora::http::RequestHeader;

use super::fields;
use crate::error::{Refusal, refusal};
use crate::framing::{self, Body, LengthFields, decimal, is_token};

/// Maximum number of header fields that the parser accepts; `limits.headers` is at most this. Pingora has the same
/// limit.
pub const FIELDS_MAX: usize = 256;

/// Length of the longest target that `http::Uri` can hold, in bytes. Pingora would respond to a longer one without
/// Forebay's refusal.
const TARGET_BYTES_MAX: usize = u16::MAX as usize - 1;

/// Limits of a listener for request headers.
#[derive(Clone, Copy, Debug)]
pub struct HeadLimits {
    /// Maximum number of fields.
    pub fields: usize,
    /// Maximum size in bytes, including request line and empty line.
    pub bytes: usize,
}

/// Finds the end of a header in bytes that arrive piece by piece. It examines each byte once.
#[derive(Debug, Default)]
pub struct Scanner {
    line: usize,
    seen: usize,
    fields: usize,
}

impl Scanner {
    /// Examines the bytes added since the last call. `Some`: the length of the complete header, including its empty
    /// line.
    ///
    /// Lines must end in CRLF and must not be folded (RFC 9112 §2.2, §5.2).
    pub fn scan(&mut self, bytes: &[u8], limits: HeadLimits) -> Result<Option<usize>, &'static Refusal> {
        if self.seen == 0 && bytes.first().is_some_and(|first| !is_token(*first)) {
            return Err(&refusal::HEADER_MALFORMED);
        }
        while let Some(offset) = memchr::memchr(b'\n', &bytes[self.seen..]) {
            let newline = self.seen + offset;
            self.seen = newline + 1;
            let Some(line) = bytes[self.line..newline].strip_suffix(b"\r") else {
                return Err(&refusal::HEADER_MALFORMED);
            };
            if self.seen > limits.bytes {
                return Err(&refusal::HEADER_TOO_LARGE);
            }
            if line.is_empty() {
                return Ok(Some(self.seen));
            }
            if self.line > 0 {
                self.fields += 1;
                if self.fields > limits.fields {
                    return Err(&refusal::HEADER_TOO_MANY);
                }
                if matches!(line[0], b' ' | b'\t') {
                    return Err(&refusal::HEADER_MALFORMED);
                }
            }
            self.line = self.seen;
        }
        self.seen = bytes.len();
        if self.seen > limits.bytes { Err(&refusal::HEADER_TOO_LARGE) } else { Ok(None) }
    }
}

/// The result of checking a header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Head {
    /// The framing of the body.
    pub body: Body,
    /// Whether a `Connection` field requests the close of the connection after this request.
    pub closes: bool,
    /// Whether version and fields permit another request on the connection (RFC 9112 §9.3).
    pub persists: bool,
    /// Whether the request asks for another protocol.
    pub upgrades: bool,
    /// The form of the target.
    pub target: Target,
}

/// The form of a target (RFC 9112 §3.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// A path, or `*`.
    Origin,
    /// A URL, with or without a `Host` field.
    Absolute {
        /// Whether a `Host` field is present.
        names_host: bool,
    },
}

/// Checks a complete header.
///
/// # Errors
///
/// The refusal for the client.
pub fn inspect(header: &[u8]) -> Result<Head, &'static Refusal> {
    parsed(header, check)
}

/// A request of HTTP/1.
#[derive(Debug)]
pub struct Request {
    /// The header as received, with the target in origin form.
    pub written: Bytes,
    /// The result of checking the header.
    pub head: Head,
    /// The header for later phases. Its values are slices of `written`; [`fields`] finds the spelling of the names
    /// there.
    pub header: RequestHeader,
}

/// Parses a complete header and checks it.
///
/// # Errors
///
/// The refusal for the client.
pub fn read(mut written: Bytes) -> Result<Request, &'static Refusal> {
    let checked = parsed(&written, |request| {
        let head = check(request)?;
        let header = if head.target == Target::Origin { Some(header(request, &written)?) } else { None };
        Ok((head, header))
    })?;
    let head = match checked {
        (head, Some(header)) => return Ok(Request { written, head, header }),
        (head, None) => head,
    };
    written = in_origin_form(&written, head.target == Target::Absolute { names_host: true }).freeze();
    let header = parsed(&written, |request| header(request, &written))?;
    Ok(Request { written, head, header })
}

/// Parses a header and returns the result of `read`.
fn parsed<T>(
    header: &[u8],
    read: impl FnOnce(&httparse::Request<'_, '_>) -> Result<T, &'static Refusal>,
) -> Result<T, &'static Refusal> {
    let mut fields = [const { MaybeUninit::uninit() }; FIELDS_MAX];
    let mut request = httparse::Request::new(&mut []);
    match request.parse_with_uninit_headers(header, &mut fields) {
        Ok(httparse::Status::Complete(_)) => read(&request),
        Ok(httparse::Status::Partial) => Err(&refusal::HEADER_MALFORMED),
        Err(httparse::Error::TooManyHeaders) => Err(&refusal::HEADER_TOO_MANY),
        Err(_) => Err(malformed_or_version(header)),
    }
}

/// Builds the header of a checked request in origin form.
fn header(request: &httparse::Request<'_, '_>, written: &Bytes) -> Result<RequestHeader, &'static Refusal> {
    let (method, target) = (request.method.unwrap_or_default(), request.path.unwrap_or_default());
    let (mut parts, ()) = http::Request::new(()).into_parts();
    let target = PathAndQuery::from_maybe_shared(written.slice_ref(target.as_bytes()));
    parts.uri = target.map_err(|_| &refusal::HEADER_MALFORMED)?.into();
    parts.method = Method::from_bytes(method.as_bytes()).map_err(|_| &refusal::HEADER_MALFORMED)?;
    parts.version = if request.version == Some(0) { Version::HTTP_10 } else { Version::HTTP_11 };
    parts.headers = fields::map(written, request.headers).ok_or(&refusal::HEADER_MALFORMED)?;
    Ok(parts.into())
}

fn check(request: &httparse::Request<'_, '_>) -> Result<Head, &'static Refusal> {
    let (Some(method), Some(target), Some(minor)) = (request.method, request.path, request.version) else {
        return Err(&refusal::HEADER_MALFORMED);
    };
    if matches!(method, "CONNECT" | "TRACE") {
        return Err(&refusal::HEADER_METHOD);
    }
    let behind_scheme = absolute(target);
    if !(target.starts_with('/') || behind_scheme.is_some() || (target == "*" && method == "OPTIONS")) {
        return Err(&refusal::HEADER_MALFORMED);
    }
    if target.len() > TARGET_BYTES_MAX {
        return Err(&refusal::HEADER_TOO_LARGE);
    }
    if !is_uri(target) {
        return Err(&refusal::HEADER_MALFORMED);
    }

    let mut length_fields = LengthFields::default();
    let mut hosts = Values::default();
    let (mut closes, mut stays, mut upgrades) = (false, false, false);
    for field in request.headers.iter() {
        match field.name.len() {
            4 if field.name.eq_ignore_ascii_case("host") => hosts.add(field.value),
            7 => upgrades |= field.name.eq_ignore_ascii_case("upgrade"),
            10 if field.name.eq_ignore_ascii_case("connection") => {
                closes |= framing::names([field.value], "close");
                stays |= framing::names([field.value], "keep-alive");
            }
            14 if field.name.eq_ignore_ascii_case("content-length") => length_fields.add_length(field.value),
            17 if field.name.eq_ignore_ascii_case("transfer-encoding") => length_fields.add_coding(field.value),
            _ => {}
        }
    }
    check_host(&hosts, behind_scheme, minor)?;
    let version = if minor == 0 { Version::HTTP_10 } else { Version::HTTP_11 };
    let target = behind_scheme.map_or(Target::Origin, |_| Target::Absolute { names_host: hosts.first.is_some() });
    let persists = !closes && (version == Version::HTTP_11 || stays);
    Ok(Head { body: framing::request::read(version, &length_fields)?, closes, persists, upgrades, target })
}

/// Converts a checked header with an absolute target to origin form, since an origin receives only the path (RFC 9112
/// §3.2.1). The target's authority equals `Host`, as checked, or becomes `Host` if the field is absent, as HTTP/1.0
/// permits.
///
/// Later phases know only this form. Pingora would compare target and `Host` byte for byte, and respond without
/// Forebay's refusal.
pub fn in_origin_form(header: &[u8], names_host: bool) -> BytesMut {
    let mut words = header.splitn(3, |&byte| byte == b' ');
    let mut word = || words.next().unwrap_or_default();
    let (method, target, rest) = (word(), word(), word());
    let Some((version, fields)) = memchr::memmem::find(rest, b"\r\n").map(|end| rest.split_at(end + 2)) else {
        return header.into();
    };
    let authority = memchr::memmem::find(target, b"://").map_or(target, |scheme| &target[scheme + 3..]);
    let (authority, path) =
        authority.split_at(authority.iter().position(|byte| b"/?".contains(byte)).unwrap_or(authority.len()));
    let path: &[&[u8]] = match path.first() {
        Some(b'/') => &[path],
        Some(_) => &[b"/", path],
        // The request concerns the server as a whole (RFC 9112 §3.2.4).
        None if method == b"OPTIONS" => &[b"*"],
        None => &[b"/"],
    };
    let host: &[&[u8]] = if names_host { &[] } else { &[b"Host: ", authority, b"\r\n"] };
    let mut formed = BytesMut::with_capacity(header.len() + host.len() * authority.len());
    [&[method, b" "], path, &[b" ", version], host, &[fields]]
        .into_iter()
        .flatten()
        .for_each(|part| formed.extend_from_slice(part));
    formed
}

/// Method and target of an unchecked request line, for the log line of a refusal.
pub fn request_line(bytes: &[u8]) -> (&str, &[u8]) {
    let line = bytes.split(|&byte| byte == b'\r' || byte == b'\n').next().unwrap_or_default();
    let mut words = line.splitn(3, |&byte| byte == b' ');
    let method = words.next().unwrap_or_default();
    match std::str::from_utf8(method) {
        Ok(method) if !method.is_empty() && method.len() <= 32 && method.bytes().all(is_token) => {
            (method, words.next().unwrap_or_default())
        }
        _ => ("", b""),
    }
}

/// Whether a refused header accepts JSON in `Accept`.
pub fn wants_json(bytes: &[u8]) -> bool {
    bytes
        .split(|&byte| byte == b'\n')
        .filter(|line| line.len() > 7 && line[..7].eq_ignore_ascii_case(b"accept:"))
        .any(|line| accepts_json(line[7..].trim_ascii()))
}

/// Whether an `Accept` value lists JSON explicitly (RFC 9110 §12.5.1).
pub fn accepts_json(accept: &[u8]) -> bool {
    framing::items(accept).any(|range| framing::is_media_type(range, "application/json"))
}

/// The value of a field that may occur once, and whether it occurred more often.
#[derive(Default)]
struct Values<'h> {
    first: Option<&'h [u8]>,
    more: bool,
}

impl<'h> Values<'h> {
    fn add(&mut self, value: &'h [u8]) {
        self.more |= self.first.is_some();
        self.first = self.first.or(Some(value));
    }
}

/// The part after the scheme of an absolute target (RFC 9112 §3.2.2). `None` for other forms.
fn absolute(target: &str) -> Option<&str> {
    // Fast path: almost all targets are paths.
    let (scheme, rest) = Some(target).filter(|target| !target.starts_with('/'))?.split_once("://")?;
    (scheme.eq_ignore_ascii_case("http") || scheme.eq_ignore_ascii_case("https")).then_some(rest)
}

/// HTTP/1.1 requires exactly one well-formed `Host`, and an absolute target must not contradict it (RFC 9112 §3.2).
///
/// `behind_scheme` is the part after the scheme of an absolute target.
fn check_host(hosts: &Values<'_>, behind_scheme: Option<&str>, minor: u8) -> Result<(), &'static Refusal> {
    let authority = behind_scheme.map(|rest| rest.split(['/', '?', '#']).next().unwrap_or_default().as_bytes());
    let is_one = match (hosts.first, authority) {
        (None, None) => minor == 0,
        (None, Some(authority)) => minor == 0 && is_host(authority),
        (Some(host), authority) => {
            !hosts.more && is_host(host) && authority.is_none_or(|authority| authority.eq_ignore_ascii_case(host))
        }
    };
    if is_one { Ok(()) } else { Err(&refusal::HEADER_HOST) }
}

/// Whether the bytes are a non-empty `host` or `host:port` (RFC 3986 §3.2.2). Percent-encoding is refused: `a%2eb`
/// would differ for routes and for an endpoint that decodes it, and HTTP/2 cannot carry it.
pub fn is_host(bytes: &[u8]) -> bool {
    let (name, port) = match bytes.iter().rposition(|&byte| byte == b':') {
        Some(colon) if !bytes.ends_with(b"]") => (&bytes[..colon], Some(&bytes[colon + 1..])),
        _ => (bytes, None),
    };
    let name_is_valid = match name.strip_prefix(b"[").and_then(|rest| rest.strip_suffix(b"]")) {
        // IPv6 (RFC 3986 §3.2.2) without a zone, which is valid only on one host (RFC 6874 §4).
        Some(literal) => std::str::from_utf8(literal).is_ok_and(|literal| literal.parse::<Ipv6Addr>().is_ok()),
        None => {
            !name.is_empty()
                && name.iter().all(|byte| byte.is_ascii_alphanumeric() || b"-._~!$&'()*+,;=".contains(byte))
        }
    };
    name_is_valid && port.is_none_or(|port| decimal(port).is_some_and(|port| port <= 65_535))
}

/// Whether `http::Uri` can hold the whole target. `httparse` accepts more, and Pingora would respond to it without
/// Forebay's refusal. A fragment is refused, too (RFC 9112 §3.2 has none): the endpoint would see it, and routes would
/// not. RFC 3986 §2 permits none of the refused characters.
fn is_uri(target: &str) -> bool {
    let (path, query) = target.split_once('?').unwrap_or((target, ""));
    !target.contains('#') && !path.contains(['<', '>', '`']) && !query.contains(['<', '>', '"'])
}

/// Distinguishes a well-formed request of another HTTP version from invalid bytes.
fn malformed_or_version(bytes: &[u8]) -> &'static Refusal {
    let line = bytes.split(|&byte| byte == b'\r').next().unwrap_or_default();
    let version = line.rsplit(|&byte| byte == b' ').next().unwrap_or_default();
    match version.strip_prefix(b"HTTP/") {
        Some([major, b'.', minor])
            if major.is_ascii_digit() && minor.is_ascii_digit() && !matches!((major, minor), (b'1', b'0' | b'1')) =>
        {
            &refusal::HEADER_VERSION
        }
        _ => &refusal::HEADER_MALFORMED,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: HeadLimits = HeadLimits { fields: 4, bytes: 200 };

    fn reason(header: &str) -> &'static str {
        inspect(header.as_bytes()).err().map_or("accepted", |refusal| refusal.reason)
    }

    fn with(fields: &str) -> String {
        format!("POST / HTTP/1.1\r\nHost: a\r\n{fields}\r\n")
    }

    #[test]
    fn the_end_is_found_however_the_bytes_arrive() {
        let bytes = b"GET / HTTP/1.1\r\nHost: a\r\n\r\nbody";
        for step in 1..bytes.len() {
            let mut scanner = Scanner::default();
            let end = (0..=bytes.len()).step_by(step).chain([bytes.len()]).find_map(|n| {
                scanner.scan(&bytes[..n], LIMITS).unwrap_or_else(|refusal| panic!("{refusal:?} at step {step}"))
            });
            assert_eq!(end, Some(bytes.len() - 4), "step {step}");
        }
    }

    #[test]
    fn a_header_over_a_limit_is_refused_as_soon_as_it_shows() {
        let many = "GET / HTTP/1.1\r\na: 1\r\nb: 2\r\nc: 3\r\nd: 4\r\ne: 5\r\n";
        assert_eq!(Scanner::default().scan(many.as_bytes(), LIMITS), Err(&refusal::HEADER_TOO_MANY));
        let large = format!("GET /{} HTTP/1.1", "x".repeat(200));
        assert_eq!(Scanner::default().scan(large.as_bytes(), LIMITS), Err(&refusal::HEADER_TOO_LARGE));
    }

    #[test]
    fn bare_line_feeds_folds_and_garbage_are_malformed() {
        for garbage in ["GET / HTTP/1.1\nHost: a\n\n", "GET / HTTP/1.1\r\nA: b\r\n c\r\n", "\u{16}\u{3}\u{1}", " GET"] {
            assert_eq!(
                Scanner::default().scan(garbage.as_bytes(), LIMITS),
                Err(&refusal::HEADER_MALFORMED),
                "{garbage:?}"
            );
        }
    }

    #[test]
    fn a_body_ends_by_its_length_or_its_last_chunk() {
        let body = |fields| inspect(with(fields).as_bytes()).map(|head| head.body);
        assert_eq!(body(""), Ok(Body::None));
        assert_eq!(body("Content-Length: 12\r\n"), Ok(Body::Length(12)));
        assert_eq!(body("Transfer-Encoding: Chunked\r\n"), Ok(Body::Chunked));
    }

    #[test]
    fn ambiguous_framing_is_refused() {
        for fields in [
            "Content-Length: 1\r\nTransfer-Encoding: chunked\r\n",
            "Content-Length: 1\r\nContent-Length: 1\r\n",
            "Content-Length: 1, 1\r\n",
            "Content-Length: +1\r\n",
            "Content-Length: 0x1\r\n",
            "Content-Length: 99999999999999999999\r\n",
            "Content-Length:\r\n",
            "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n",
        ] {
            assert_eq!(reason(&with(fields)), "header.framing", "{fields:?}");
        }
        assert_eq!(reason("POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n"), "header.framing");
        for coding in ["gzip", "gzip, chunked", "chunked, chunked", "xchunked", "identity", ""] {
            assert_eq!(reason(&with(&format!("Transfer-Encoding: {coding}\r\n"))), "header.encoding", "{coding:?}");
        }
    }

    #[test]
    fn host_must_be_there_once_and_well_formed() {
        assert_eq!(reason("GET / HTTP/1.1\r\n\r\n"), "header.host");
        assert_eq!(reason("GET / HTTP/1.0\r\n\r\n"), "accepted");
        assert_eq!(reason("GET / HTTP/1.1\r\nHost: a\r\nHost: a\r\n\r\n"), "header.host");
        for host in ["", "a b", "a/b", "user@a", "a:", "a:70000", "a:8x", "[::1", "a\u{e9}"] {
            assert_eq!(reason(&format!("GET / HTTP/1.1\r\nHost: {host}\r\n\r\n")), "header.host", "{host:?}");
        }
        for host in
            ["[]", "[.]", "[:]", "[%]", "[1.2.3.4]", "[::1]:", "[::1]x", "[fe80::1%25ab]", "[1::2::3]", "[v1.a]"]
        {
            assert_eq!(reason(&format!("GET / HTTP/1.1\r\nHost: {host}\r\n\r\n")), "header.host", "{host:?}");
        }
        for host in
            ["a", "a.example:8080", "[::1]", "[::1]:80", "[::ffff:1.2.3.4]", "127.0.0.1", "xn--bcher-kva.example"]
        {
            assert_eq!(reason(&format!("GET / HTTP/1.1\r\nHost: {host}\r\n\r\n")), "accepted", "{host:?}");
        }
    }

    #[test]
    fn an_absolute_target_must_agree_with_host() {
        assert_eq!(reason("GET http://a/x HTTP/1.1\r\nHost: A\r\n\r\n"), "accepted");
        assert_eq!(reason("GET http://b/x HTTP/1.1\r\nHost: a\r\n\r\n"), "header.host");
        assert_eq!(reason("GET http://b@a/x HTTP/1.1\r\nHost: a\r\n\r\n"), "header.host");
        assert_eq!(reason("GET /to?u=http://b/ HTTP/1.1\r\nHost: a\r\n\r\n"), "accepted");
    }

    #[test]
    fn an_absolute_target_becomes_a_path() {
        let formed =
            |header: &str, names_host| String::from_utf8(in_origin_form(header.as_bytes(), names_host).to_vec());
        for (line, origin) in [
            ("GET http://a/x?y HTTP/1.1", "GET /x?y HTTP/1.1"),
            ("GET HTTP://A:80 HTTP/1.1", "GET / HTTP/1.1"),
            ("GET https://[::1]:80?y HTTP/1.1", "GET /?y HTTP/1.1"),
            ("OPTIONS http://a HTTP/1.1", "OPTIONS * HTTP/1.1"),
            ("OPTIONS http://a/ HTTP/1.1", "OPTIONS / HTTP/1.1"),
            ("GET http://a/x?u=http://b/ HTTP/1.1", "GET /x?u=http://b/ HTTP/1.1"),
        ] {
            let fields = "Host: a\r\nX: http://b c\r\n\r\n";
            let expected = format!("{origin}\r\n{fields}");
            assert_eq!(formed(&format!("{line}\r\n{fields}"), true).as_deref(), Ok(&*expected));
        }
        let without = formed("GET http://a:81/x HTTP/1.0\r\nX: 1\r\n\r\n", false);
        assert_eq!(without.as_deref(), Ok("GET /x HTTP/1.0\r\nHost: a:81\r\nX: 1\r\n\r\n"));
        assert_eq!(reason("GET http:///x HTTP/1.0\r\n\r\n"), "header.host");
        assert_eq!(reason("GET http://u@a/x HTTP/1.0\r\n\r\n"), "header.host");
    }

    #[test]
    fn a_target_is_a_path_or_absolute_or_for_options_a_star() {
        assert_eq!(reason("GET nowhere HTTP/1.1\r\nHost: a\r\n\r\n"), "header.malformed");
        assert_eq!(reason("GET ftp://a/ HTTP/1.1\r\nHost: a\r\n\r\n"), "header.malformed");
        assert_eq!(reason("GET * HTTP/1.1\r\nHost: a\r\n\r\n"), "header.malformed");
        assert_eq!(reason("OPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n"), "accepted");
    }

    #[test]
    fn what_is_accepted_pingora_can_make_a_request_of() {
        let long = |length: usize| format!("/{}", "a".repeat(length - 1));
        let bytes = (0x21..0x7f_u8).map(char::from).flat_map(|byte| [format!("/a{byte}b"), format!("/?a{byte}b")]);
        for target in bytes.chain([long(TARGET_BYTES_MAX), long(TARGET_BYTES_MAX + 1), "//".into(), "/%".into()]) {
            let accepted = reason(&format!("GET {target} HTTP/1.1\r\nHost: a\r\n\r\n")) == "accepted";
            let made = pingora::http::RequestHeader::build("GET", target.as_bytes(), None).is_ok();
            // `http::Uri` would cut off a fragment.
            assert_eq!(accepted, made && !target.contains('#'), "{}", &target[..target.len().min(9)]);
        }
        assert_eq!(reason(&format!("GET {} HTTP/1.1\r\nHost: a\r\n\r\n", long(65_535))), "header.too_large");
    }

    #[test]
    fn other_versions_methods_and_garbage_are_told_apart() {
        assert_eq!(reason("GET / HTTP/2.0\r\nHost: a\r\n\r\n"), "header.version");
        assert_eq!(reason("GET / HTTP/0.9\r\n\r\n"), "header.version");
        assert_eq!(reason("GET / HTPT/1.1\r\nHost: a\r\n\r\n"), "header.malformed");
        assert_eq!(reason("GET /\r\n\r\n"), "header.malformed");
        assert_eq!(reason("CONNECT a:1 HTTP/1.1\r\nHost: a:1\r\n\r\n"), "header.method");
        assert_eq!(reason("TRACE / HTTP/1.1\r\nHost: a\r\n\r\n"), "header.method");
        for fields in ["A : b\r\n", "A\u{0}: b\r\n", "A: \u{0}\r\n", "A\r\n", ": b\r\n"] {
            assert_eq!(reason(&with(fields)), "header.malformed", "{fields:?}");
        }
    }

    #[test]
    fn json_is_asked_for_by_name_in_whatever_case() {
        for accept in ["application/json", "text/html, Application/JSON;q=0.9", "*/*,application/json"] {
            assert!(wants_json(format!("GET /\r\nACCEPT: {accept}\r\n").as_bytes()), "{accept}");
        }
        for accept in ["*/*", "application/jsonx", "text/plain;a=application/json"] {
            assert!(!wants_json(format!("GET /\r\nAccept: {accept}\r\n").as_bytes()), "{accept}");
        }
    }

    #[test]
    fn the_log_line_of_garbage_names_no_method() {
        assert_eq!(request_line(b"GET /a?b HTTP/1.1\r\nHost"), ("GET", &b"/a?b"[..]));
        assert_eq!(request_line(b"\x16\x03 x"), ("", &b""[..]));
    }
}
