//! Phase `header`, the part that holds for every protocol: what may not pass, and who the client is.
//!
//! Before it, `client` has read the header and, on HTTP/1, checked its framing. After it comes `route`, which sees of
//! the header what is meant for it: what ends here ([`hop`]) and what only others may say ([`names`]) is gone, and the
//! path has its one form.

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
use crate::framing::{self, Said};
use path::Paths;

/// Proxies whose word on the client is believed.
pub struct TrustedProxies {
    networks: Vec<IpNet>,
    unix: bool,
}

impl TrustedProxies {
    /// These.
    pub fn new(written: &[Proxy]) -> Self {
        let network = |proxy: &Proxy| if let Proxy::Network(network) = proxy { Some(*network) } else { None };
        TrustedProxies { networks: written.iter().filter_map(network).collect(), unix: written.contains(&Proxy::Unix) }
    }

    fn contains(&self, address: IpAddr) -> bool {
        let address = address.to_canonical();
        self.networks.iter().any(|network| network.contains(&address))
    }

    /// Whether the peer of this connection is one. One over TCP whose address is not known, for it has gone, is none.
    fn is_peer_of(&self, connection: &Connection) -> bool {
        match connection.peer {
            Some(peer) => self.contains(peer.ip()),
            None => connection.listener.unix && self.unix,
        }
    }
}

/// What holds for the headers of all requests.
pub struct Rules {
    /// Proxies in front of us that are believed.
    pub trusted: TrustedProxies,
    /// How paths are read.
    pub paths: Paths,
    /// How much of an address is one client.
    pub prefix: Prefix,
}

impl Rules {
    /// Those of this configuration.
    pub fn of(config: &Config) -> Rules {
        let [v4, v6] = config.client_prefix().bits();
        Rules {
            trusted: TrustedProxies::new(&config.trusted_proxies),
            paths: Paths::new(&config.paths),
            prefix: Prefix { v4, v6 },
        }
    }
}

/// Looks at a request header that has just arrived, and leaves of it what is meant for routes, filters and the
/// endpoint.
pub fn check(exchange: &mut Exchange, request: &mut RequestHeader, rules: &Rules) -> Result<(), &'static Refusal> {
    let connection = exchange.client.connection.clone();
    exchange.client.peer_is_trusted =
        connection.as_ref().is_some_and(|connection| rules.trusted.is_peer_of(connection));
    exchange.client.prefix = rules.prefix;
    // A request that is refused here has its peer in the log, not the client that it spoke for.
    exchange.client.address = connection.as_ref().and_then(|connection| Some(connection.peer?.ip()));
    if matches!(request.method, Method::CONNECT | Method::TRACE) {
        return Err(&refusal::HEADER_METHOD);
    }
    if request.version == Version::HTTP_2 {
        let fields_max = connection.as_ref().map_or(usize::MAX, |connection| connection.listener.head.fields);
        if request.headers.len() > fields_max {
            return Err(&refusal::HEADER_TOO_MANY);
        }
        check_authority(request)?;
        check_http2_form(request)?;
        check_values(&request.headers)?;
        join_cookies(request);
    } else if request.version == Version::HTTP_10 {
        // RFC 9110 §10.1.1: it knows no expectations, and its endpoint, which gets HTTP/1.1, does.
        request.remove_header(&header::EXPECT);
    }
    hop::end(request)?;
    let odd = match exchange.client.odd_names() {
        // Metadata may have such names. Whether they may pass, the route says once it is found.
        OddNames::Drop if exchange.request.grpc.is_some() => OddNames::Keep,
        odd => odd,
    };
    names::check(request, odd, exchange.client.peer_is_trusted)?;
    give_one_path(request, rules.paths)?;
    identify(exchange, &request.headers, &rules.trusted);
    introduce(exchange, request)?;
    let host = request.headers.get(header::HOST).and_then(|host| host.to_str().ok()).unwrap_or_default();
    // RFC 9110 §15.5.20. A connection on which nothing was asked of the client opens no door of a host that asks.
    match exchange.client.connection.as_ref() {
        Some(connection) if !connection.may_serve(without_port(host)) => Err(&refusal::HEADER_MISDIRECTED),
        _ => Ok(()),
    }
}

/// RFC 9113 §8.3.1: `:authority` decides; a `Host` that disagrees with it is refused. One of the two must be there.
/// Afterwards `Host` is what everything else looks at.
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

/// What the HTTP/2 library lets pass and is no request all the same (RFC 9113 §8.3.1, §8.1.1), or one that HTTP/1
/// cannot say (RFC 9112 §3.2): another scheme than those of HTTP, no target at all, a target that is neither a path nor
/// `*` for OPTIONS, spaces and line ends in it, a length that stands twice.
fn check_http2_form(request: &RequestHeader) -> Result<(), &'static Refusal> {
    let is_http = request
        .uri
        .scheme_str()
        .is_none_or(|scheme| scheme.eq_ignore_ascii_case("http") || scheme.eq_ignore_ascii_case("https"));
    // An absent one is shown as `/`, and is not equal to it.
    let is_absent = |path: &PathAndQuery| path.as_str() == "/" && *path != PathAndQuery::from_static("/");
    if request.uri.path_and_query().is_none_or(is_absent) {
        return Err(&refusal::HEADER_MALFORMED);
    }
    let target = request.raw_path();
    let is_target = target.starts_with(b"/") || (target == b"*" && request.method == Method::OPTIONS);
    if !is_http || !is_target || target.iter().any(|byte| matches!(byte, 0..=b' ' | 0x7f)) {
        return Err(&refusal::HEADER_MALFORMED);
    }
    framing::request::read(request.version, &Said::of(&request.headers)).map(drop)
}

/// RFC 9113 §8.2.1: no value begins or ends with white space. The HTTP/2 library lets it pass; HTTP/1 cannot say it.
fn check_values(headers: &HeaderMap) -> Result<(), &'static Refusal> {
    let is_white = |byte: Option<&u8>| matches!(byte, Some(b' ' | b'\t'));
    let mut values = headers.values().map(HeaderValue::as_bytes);
    let is_wrong = values.any(|value| is_white(value.first()) || is_white(value.last()));
    if is_wrong { Err(&refusal::HEADER_MALFORMED) } else { Ok(()) }
}

/// RFC 9113 §8.2.3: HTTP/2 may cut a cookie into crumbs; HTTP/1 knows one field.
fn join_cookies(request: &mut RequestHeader) {
    let crumbs: Vec<_> = request.headers.get_all(header::COOKIE).iter().map(|crumb| crumb.as_bytes()).collect();
    if crumbs.len() > 1
        && let Ok(cookie) = HeaderValue::from_bytes(&crumbs.join(&b"; "[..]))
    {
        // A header of this name and value was there before; it cannot be refused now.
        let _ = request.insert_header(header::COOKIE, cookie);
    }
}

/// Brings the path into the one form in which everything here, and the endpoint, sees it.
fn give_one_path(request: &mut RequestHeader, paths: Paths) -> Result<(), &'static Refusal> {
    let target = request.raw_path();
    let (path, query) = target.split_at(target.iter().position(|&byte| byte == b'?').unwrap_or(target.len()));
    let path = paths.canonical(path).map_err(|_| &refusal::HEADER_PATH)?;
    let Cow::Owned(path) = path else { return Ok(()) };
    let target = [&path, query].concat();
    if request.uri.authority().is_none() {
        return request.set_raw_path(&target).map_err(|_| &refusal::HEADER_PATH);
    }
    // On HTTP/2 the URI has the `:authority`, which stays.
    let mut parts = request.uri.clone().into_parts();
    parts.path_and_query = Some(PathAndQuery::try_from(target).map_err(|_| &refusal::HEADER_PATH)?);
    request.set_uri(Uri::from_parts(parts).map_err(|_| &refusal::HEADER_PATH)?);
    Ok(())
}

/// Finds the client where a trusted peer names it; else it stays the peer.
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

/// Who a client has proved to be by its certificate: its subject, its further names, its SHA-256 and its number. Set by
/// Forebay alone, or by a proxy that is trusted: routes, filters, logs and upstreams may rely on them.
static CLIENT_CERTIFICATE: [HeaderName; 4] = [
    HeaderName::from_static("x-client-cert-subject"),
    HeaderName::from_static("x-client-cert-names"),
    HeaderName::from_static("x-client-cert-fingerprint"),
    HeaderName::from_static("x-client-cert-serial"),
];

/// Longer, and no origin would take it.
const CERTIFICATE_FIELD_BYTES_MAX: usize = 8 << 10;

/// Says who the client has proved to be. What it says of the kind itself has been removed ([`names`]), unless it is a
/// trusted proxy.
fn introduce(exchange: &Exchange, request: &mut RequestHeader) -> Result<(), &'static Refusal> {
    let proved = exchange.client.connection.as_ref().and_then(|connection| connection.tls()?.client.as_ref());
    let Some(client) = proved else { return Ok(()) };
    for name in &CLIENT_CERTIFICATE {
        request.remove_header(name);
    }
    let said = [&client.subject, &client.names, &client.fingerprint, &client.serial];
    for (name, text) in CLIENT_CERTIFICATE.iter().zip(said).filter(|(_, text)| !text.is_empty()) {
        // Cut or changed, it might be another client's.
        let whole = text.len() <= CERTIFICATE_FIELD_BYTES_MAX;
        let value =
            HeaderValue::from_bytes(text.as_bytes()).ok().filter(|_| whole).ok_or(&refusal::HEADER_MALFORMED)?;
        request.insert_header(name.clone(), value).map_err(|_| &refusal::HEADER_MALFORMED)?;
    }
    Ok(())
}

/// The name in a `Host`, without its port.
pub fn without_port(host: &str) -> &str {
    match host.rfind(':') {
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
