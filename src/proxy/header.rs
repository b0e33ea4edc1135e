//! Phase `header`, the part for all protocols: removes or refuses what must not pass, and identifies the client.
//!
//! Before this phase, `client` has parsed the header and, on HTTP/1, checked its framing. The next phase, `route`, sees
//! only what is meant for it: hop-by-hop fields ([`hop`]) and fields reserved for others ([`names`]) are removed, and
//! the path is canonical.

pub mod hop;
pub mod names;
pub mod path;

use std::borrow::Cow;
use std::net::IpAddr;

use http::uri::PathAndQuery;
use http::{HeaderMap, HeaderName, HeaderValue, Method, Uri, Version, header};
use ipnet::IpNet;
use pingora::http::RequestHeader;

use super::exchange::Exchange;
use super::forwarded;
use crate::client::connection::Connection;
use crate::client::head::is_host;
use crate::config::Config;
use crate::config::address::Proxy;
use crate::config::listener::OddNames;
use crate::error::{Refusal, refusal};
use crate::expression::Prefix;
use crate::framing::{self, LengthFields};
use path::Paths;

/// Proxies whose information about the client is trusted.
pub struct TrustedProxies {
    networks: Vec<IpNet>,
    unix: bool,
}

impl TrustedProxies {
    /// Builds the list from the configuration.
    pub fn new(written: &[Proxy]) -> Self {
        let network = |proxy: &Proxy| if let Proxy::Network(network) = proxy { Some(*network) } else { None };
        TrustedProxies { networks: written.iter().filter_map(network).collect(), unix: written.contains(&Proxy::Unix) }
    }

    fn contains(&self, address: IpAddr) -> bool {
        let address = address.to_canonical();
        self.networks.iter().any(|network| network.contains(&address))
    }

    /// Whether the peer of this connection is trusted. A TCP peer with an unknown address, because it has left, is not.
    fn is_peer_of(&self, connection: &Connection) -> bool {
        match connection.peer {
            Some(peer) => self.contains(peer.ip()),
            None => connection.listener.unix && self.unix,
        }
    }
}

/// The rules for all request headers.
pub struct Rules {
    /// Trusted proxies in front of Forebay.
    pub trusted: TrustedProxies,
    /// The rules for canonical paths.
    pub paths: Paths,
    /// The part of an address that identifies one client.
    pub prefix: Prefix,
}

impl Rules {
    /// The rules of this configuration.
    pub fn of(config: &Config) -> Rules {
        let [v4, v6] = config.client_prefix().bits();
        Rules {
            trusted: TrustedProxies::new(&config.trusted_proxies),
            paths: Paths::new(&config.paths),
            prefix: Prefix { v4, v6 },
        }
    }
}

/// Checks a new request header, and removes what is not meant for routes, filters and the endpoint.
pub fn check(exchange: &mut Exchange, request: &mut RequestHeader, rules: &Rules) -> Result<(), &'static Refusal> {
    let connection = exchange.client.connection.clone();
    exchange.client.peer_is_trusted =
        connection.as_ref().is_some_and(|connection| rules.trusted.is_peer_of(connection));
    exchange.client.prefix = rules.prefix;
    // The log line of a refusal here has the peer's address, not that of the client behind it.
    exchange.client.address = connection.as_ref().and_then(|connection| Some(connection.peer?.ip()));
    if matches!(request.method, Method::CONNECT | Method::TRACE) {
        return Err(&refusal::HEADER_METHOD);
    }
    if request.version == Version::HTTP_2 {
        let fields_max = connection.as_ref().map_or(usize::MAX, |connection| connection.listener.terms.head.fields);
        if request.headers.len() > fields_max {
            return Err(&refusal::HEADER_TOO_MANY);
        }
        check_authority(request)?;
        check_http2_form(request)?;
        check_values(&request.headers)?;
        join_cookies(request);
    } else if request.version == Version::HTTP_10 {
        // HTTP/1.0 has no expectations, but the endpoint receives HTTP/1.1 (RFC 9110 §10.1.1).
        request.remove_header(&header::EXPECT);
    }
    hop::end(request)?;
    let odd = match exchange.client.odd_names() {
        // gRPC metadata may have such names. The route decides later whether they pass.
        OddNames::Drop if exchange.request.grpc.is_some() => OddNames::Keep,
        odd => odd,
    };
    names::check(request, odd, exchange.client.peer_is_trusted)?;
    give_one_path(request, rules.paths)?;
    identify(exchange, &request.headers, &rules.trusted);
    introduce(exchange, request)?;
    let host = request.headers.get(header::HOST).and_then(|host| host.to_str().ok()).unwrap_or_default();
    // A connection without a client certificate may not be used for a host that requires one (RFC 9110 §15.5.20).
    match exchange.client.connection.as_ref() {
        Some(connection) if !connection.may_serve(without_port(host)) => Err(&refusal::HEADER_MISDIRECTED),
        _ => Ok(()),
    }
}

/// `:authority` takes precedence; a different `Host` is refused, and one of the two is required (RFC 9113 §8.3.1).
/// Afterwards, all code uses `Host`.
fn check_authority(request: &mut RequestHeader) -> Result<(), &'static Refusal> {
    let mut hosts = request.headers.get_all(header::HOST).iter();
    let host = hosts.next();
    if hosts.next().is_some() {
        return Err(&refusal::HEADER_HOST);
    }
    let authority = request.uri.authority().map(|authority| authority.as_str().as_bytes());
    match (authority, host) {
        (Some(authority), None) if is_host(authority) => {
            let value = http::HeaderValue::from_bytes(authority).map_err(|_| &refusal::HEADER_HOST)?;
            request.insert_header(header::HOST, value).map_err(|_| &refusal::HEADER_HOST)
        }
        (Some(authority), Some(host)) if is_host(authority) && authority.eq_ignore_ascii_case(host.as_bytes()) => {
            Ok(())
        }
        (None, Some(host)) if is_host(host.as_bytes()) => Ok(()),
        _ => Err(&refusal::HEADER_HOST),
    }
}

/// Refuses malformed requests that the HTTP/2 library accepts (RFC 9113 §8.3.1, §8.1.1), and requests that HTTP/1
/// cannot express (RFC 9112 §3.2): a scheme other than those of HTTP, no target, a target other than a path or `*` for
/// OPTIONS, spaces or line ends in the target, and a repeated length.
fn check_http2_form(request: &RequestHeader) -> Result<(), &'static Refusal> {
    let is_http = request
        .uri
        .scheme_str()
        .is_none_or(|scheme| scheme.eq_ignore_ascii_case("http") || scheme.eq_ignore_ascii_case("https"));
    // A missing path is displayed as `/`, but does not compare equal to it.
    let is_absent = |path: &PathAndQuery| path.as_str() == "/" && *path != PathAndQuery::from_static("/");
    if request.uri.path_and_query().is_none_or(is_absent) {
        return Err(&refusal::HEADER_MALFORMED);
    }
    let target = request.raw_path();
    let is_target = target.starts_with(b"/") || (target == b"*" && request.method == Method::OPTIONS);
    if !is_http || !is_target || target.iter().any(|byte| matches!(byte, 0..=b' ' | 0x7f)) {
        return Err(&refusal::HEADER_MALFORMED);
    }
    framing::request::read(request.version, &LengthFields::of(&request.headers)).map(drop)
}

/// A value must not begin or end with white space (RFC 9113 §8.2.1). The HTTP/2 library accepts it; HTTP/1 cannot
/// express it.
fn check_values(headers: &HeaderMap) -> Result<(), &'static Refusal> {
    let is_white = |byte: Option<&u8>| matches!(byte, Some(b' ' | b'\t'));
    let mut values = headers.values().map(HeaderValue::as_bytes);
    let is_wrong = values.any(|value| is_white(value.first()) || is_white(value.last()));
    if is_wrong { Err(&refusal::HEADER_MALFORMED) } else { Ok(()) }
}

/// HTTP/2 may split a cookie into several fields (RFC 9113 §8.2.3); HTTP/1 permits only one.
fn join_cookies(request: &mut RequestHeader) {
    let crumbs: Vec<_> = request.headers.get_all(header::COOKIE).iter().map(|crumb| crumb.as_bytes()).collect();
    if crumbs.len() > 1
        && let Ok(cookie) = HeaderValue::from_bytes(&crumbs.join(&b"; "[..]))
    {
        // The name and the value were valid before, so this cannot fail.
        let _ = request.insert_header(header::COOKIE, cookie);
    }
}

/// Makes the path canonical, for Forebay and for the endpoint.
fn give_one_path(request: &mut RequestHeader, paths: Paths) -> Result<(), &'static Refusal> {
    let target = request.raw_path();
    let (path, query) = target.split_at(target.iter().position(|&byte| byte == b'?').unwrap_or(target.len()));
    let path = paths.canonical(path).map_err(|_| &refusal::HEADER_PATH)?;
    let Cow::Owned(path) = path else { return Ok(()) };
    let target = [&path, query].concat();
    if request.uri.authority().is_none() {
        return request.set_raw_path(&target).map_err(|_| &refusal::HEADER_PATH);
    }
    // On HTTP/2 the URI contains `:authority`, which remains.
    let mut parts = request.uri.clone().into_parts();
    parts.path_and_query = Some(PathAndQuery::try_from(target).map_err(|_| &refusal::HEADER_PATH)?);
    request.set_uri(Uri::from_parts(parts).map_err(|_| &refusal::HEADER_PATH)?);
    Ok(())
}

/// Sets the client's address if a trusted peer names it; otherwise the peer is the client.
fn identify(exchange: &mut Exchange, headers: &HeaderMap, trusted: &TrustedProxies) {
    if !exchange.client.peer_is_trusted {
        return;
    }
    if let Some(client) = forwarded::client(headers, |address| trusted.contains(address)) {
        exchange.client.address = Some(client);
    }
    if let Some(https) = forwarded::is_https(headers) {
        exchange.request.scheme = if https { "https" } else { "http" };
    }
}

/// The client's identity from its certificate: subject, alternative names, SHA-256 fingerprint and serial number. Only
/// Forebay or a trusted proxy sets them, so that routes, filters, logs and upstreams may rely on them.
static CLIENT_CERTIFICATE: [HeaderName; 4] = [
    HeaderName::from_static("x-client-cert-subject"),
    HeaderName::from_static("x-client-cert-names"),
    HeaderName::from_static("x-client-cert-fingerprint"),
    HeaderName::from_static("x-client-cert-serial"),
];

/// Maximum length of such a field, in bytes; servers refuse longer ones.
const CERTIFICATE_FIELD_BYTES_MAX: usize = 8 << 10;

/// Sets the fields about the client's certificate. Fields that the client sent were removed ([`names`]), unless it is a
/// trusted proxy.
fn introduce(exchange: &Exchange, request: &mut RequestHeader) -> Result<(), &'static Refusal> {
    let proved = exchange.client.connection.as_ref().and_then(|connection| connection.tls()?.client.as_ref());
    let Some(client) = proved else { return Ok(()) };
    for name in &CLIENT_CERTIFICATE {
        request.remove_header(name);
    }
    let length_fields = [&client.subject, &client.names, &client.fingerprint, &client.serial];
    for (name, text) in CLIENT_CERTIFICATE.iter().zip(length_fields).filter(|(_, text)| !text.is_empty()) {
        // A truncated or changed value could identify another client.
        let whole = text.len() <= CERTIFICATE_FIELD_BYTES_MAX;
        let value =
            HeaderValue::from_bytes(text.as_bytes()).ok().filter(|_| whole).ok_or(&refusal::HEADER_MALFORMED)?;
        request.insert_header(name.clone(), value).map_err(|_| &refusal::HEADER_MALFORMED)?;
    }
    Ok(())
}

/// The name in a `Host`, without its port.
pub fn without_port(host: &str) -> &str {
    match host.bytes().rposition(|byte| byte == b':') {
        Some(colon) if !host.ends_with(']') => &host[..colon],
        _ => host,
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// A request with these header fields.
    pub fn request(fields: &[(&'static str, &str)]) -> RequestHeader {
        let mut request = RequestHeader::build("GET", b"/", None).expect("a request");
        for (name, value) in fields {
            request.append_header(*name, *value).expect("a header");
        }
        request
    }

    #[test]
    fn on_http2_authority_and_host_must_agree() {
        let mut agreed = request(&[("host", "Shop.example")]);
        agreed.set_uri("http://shop.example/".parse().expect("a URI"));
        assert_eq!(check_authority(&mut agreed), Ok(()));

        let mut disagreeing = request(&[("host", "evil.example")]);
        disagreeing.set_uri("http://shop.example/".parse().expect("a URI"));
        assert_eq!(check_authority(&mut disagreeing), Err(&refusal::HEADER_HOST));

        let mut alone = request(&[]);
        alone.set_uri("http://shop.example/".parse().expect("a URI"));
        assert_eq!(check_authority(&mut alone), Ok(()));
        assert_eq!(alone.headers.get("host").map(|host| host.as_bytes()), Some(&b"shop.example"[..]));

        assert_eq!(check_authority(&mut request(&[])), Err(&refusal::HEADER_HOST));
    }

    #[test]
    fn what_http_2_lets_pass_must_be_a_request_of_http_1_too() {
        let of = |method: &str, uri: &str, lengths: &[&'static str]| {
            let built = http::Request::builder().method(method).uri(uri).version(Version::HTTP_2).body(());
            let mut request = RequestHeader::from(built.expect("a request").into_parts().0);
            for length in lengths {
                request.append_header("content-length", *length).expect("a field");
            }
            check_http2_form(&request).err().map(|refusal| refusal.reason)
        };
        for uri in ["http://a/", "https://a/x?y", "HTTP://a/", "http://a/*"] {
            assert_eq!(of("GET", uri, &[]), None, "{uri}");
        }
        assert_eq!(of("GET", "ftp://a/", &[]), Some("header.malformed"));
        assert_eq!((of("OPTIONS", "*", &[]), of("GET", "*", &[])), (None, Some("header.malformed")));
        assert_eq!(
            (of("POST", "http://a/", &["5"]), of("POST", "http://a/", &["5", "5"])),
            (None, Some("header.framing"))
        );
        assert_eq!(of("POST", "http://a/", &["+5"]), Some("header.framing"));
    }

    fn one_path(target: &str, authority: bool) -> Result<String, &'static Refusal> {
        let mut request = RequestHeader::build("GET", target.as_bytes(), None).expect("a request");
        if authority {
            request.set_uri(format!("http://shop.example{target}").parse().expect("a URI"));
        }
        give_one_path(&mut request, Paths::new(&Default::default()))?;
        assert_eq!(request.uri.authority().is_some(), authority);
        assert_eq!(request.uri.path_and_query().map(|target| target.as_str().as_bytes()), Some(request.raw_path()));
        Ok(String::from_utf8_lossy(request.raw_path()).into_owned())
    }

    #[test]
    fn the_path_has_one_form_and_the_query_stays() {
        for authority in [false, true] {
            for (target, path) in [
                ("/a?b=//../%61", "/a?b=//../%61"),
                ("//%61/../b?c=/../d", "/b?c=/../d"),
                ("/x//y?", "/x/y?"),
                ("/a%2fb?%2f", "/a%2Fb?%2f"),
            ] {
                assert_eq!(one_path(target, authority).as_deref(), Ok(path), "{target}");
            }
            assert_eq!(one_path("/a/..%2fb?c", authority), Err(&refusal::HEADER_PATH));
        }
        let mut request = RequestHeader::build("GET", b"//\xff?\xff", None).expect("a request");
        assert_eq!(give_one_path(&mut request, Paths::new(&Default::default())), Ok(()));
        assert_eq!(request.raw_path(), b"/%FF?\xff");
        let mut options = RequestHeader::build("OPTIONS", b"*", None).expect("a request");
        assert_eq!(give_one_path(&mut options, Paths::new(&Default::default())), Ok(()));
        assert_eq!(options.raw_path(), b"*");
    }

    #[test]
    fn a_port_is_no_part_of_the_name() {
        assert_eq!(without_port("a.example:8080"), "a.example");
        assert_eq!(without_port("a.example"), "a.example");
        assert_eq!(without_port("[::1]:80"), "[::1]");
        assert_eq!(without_port("[::1]"), "[::1]");
    }
}
