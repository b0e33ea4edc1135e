//! Phase `header`, the part that holds for every protocol: what may not pass, and who the client is.
//!
//! Before it, `client` has read the header and, on HTTP/1, checked its framing. After it comes `route`.

use std::net::IpAddr;

use http::{HeaderMap, HeaderName, HeaderValue, Method, header};
use ipnet::IpNet;
use pingora::http::RequestHeader;

use super::exchange::Exchange;
use super::route::without_port;
use crate::client::connection::Connection;
use crate::client::head::is_host;
use crate::config::address::Proxy;
use crate::error::{Refusal, refusal};

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

/// Looks at a request header that has just arrived.
pub fn check(
    exchange: &mut Exchange,
    request: &mut RequestHeader,
    trusted: &TrustedProxies,
) -> Result<(), &'static Refusal> {
    if matches!(request.method, Method::CONNECT | Method::TRACE) {
        return Err(&refusal::HEADER_METHOD);
    }
    if request.version == http::Version::HTTP_2 {
        let fields_max = exchange.connection.as_ref().map_or(usize::MAX, |connection| connection.listener.head.fields);
        if request.headers.len() > fields_max {
            return Err(&refusal::HEADER_TOO_MANY);
        }
        check_authority(request)?;
        check_http1_form(request)?;
        join_cookies(request);
    } else {
        make_origin_form(request)?;
    }
    drop_other_upgrades(request);
    identify(exchange, request, trusted);
    introduce(exchange, request)?;
    let host = request.headers.get(header::HOST).and_then(|host| host.to_str().ok()).unwrap_or_default();
    // RFC 9110 §15.5.20. A connection on which nothing was asked of the client opens no door of a host that asks.
    match exchange.connection.as_ref() {
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

/// What the HTTP/2 library lets pass and a request of HTTP/1 cannot say (RFC 9112 §3.2, §6.3): a target that is no
/// path, but for `*` of OPTIONS; spaces and line ends in it; and a length that stands twice.
fn check_http1_form(request: &RequestHeader) -> Result<(), &'static Refusal> {
    let target = request.raw_path();
    let is_target = target.starts_with(b"/") || (target == b"*" && request.method == Method::OPTIONS);
    if !is_target || target.iter().any(|byte| matches!(byte, 0..=b' ' | 0x7f)) {
        return Err(&refusal::HEADER_MALFORMED);
    }
    let lengths = request.headers.get_all(header::CONTENT_LENGTH).iter().count();
    if lengths > 1 { Err(&refusal::HEADER_FRAMING) } else { Ok(()) }
}

/// Whether this is a gRPC call, by its form: a POST over HTTP/2 that takes trailers, of the media type `application/grpc`, alone
/// or with a suffix (`+proto`) or parameters. Whether it is treated as one, the route and its upstream say.
pub fn is_grpc(request: &RequestHeader) -> bool {
    request.version == http::Version::HTTP_2
        && request.method == Method::POST
        && takes_trailers(&request.headers)
        && is_grpc_type(&request.headers)
}

/// Whether the media type is that of gRPC.
pub fn is_grpc_type(headers: &HeaderMap) -> bool {
    const GRPC: &[u8] = b"application/grpc";
    let mut kinds = headers.get_all(header::CONTENT_TYPE).iter();
    // Two media types are none: an endpoint may read either.
    let (Some(kind), None) = (kinds.next(), kinds.next()) else { return false };
    let Some((kind, rest)) = kind.as_bytes().split_at_checked(GRPC.len()) else { return false };
    kind.eq_ignore_ascii_case(GRPC) && matches!(rest.trim_ascii_start().first(), None | Some(b'+' | b';'))
}

/// Whether `TE` names `trailers` (RFC 9110 §10.1.4).
pub fn takes_trailers(headers: &HeaderMap) -> bool {
    tokens(headers, &header::TE).any(|token| token.eq_ignore_ascii_case(b"trailers"))
}

/// The members of a list of tokens, over all fields of this name, without their parameters (RFC 9110 §5.6.1).
fn tokens<'h>(headers: &'h HeaderMap, name: &HeaderName) -> impl Iterator<Item = &'h [u8]> {
    let members = headers.get_all(name).iter().flat_map(|value| value.as_bytes().split(|&byte| byte == b','));
    let tokens = members.map(|member| member.split(|&byte| byte == b';').next().unwrap_or_default().trim_ascii());
    tokens.filter(|token| !token.is_empty())
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

/// RFC 9112 §3.2.1: an origin gets the path alone. The authority of an absolute target is that of `Host`; it was checked.
fn make_origin_form(request: &mut RequestHeader) -> Result<(), &'static Refusal> {
    let target = request.raw_path();
    if target.starts_with(b"/") {
        return Ok(());
    }
    let Some(scheme) = memchr::memmem::find(target, b"://") else { return Ok(()) };
    let rest = &target[scheme + 3..];
    let path = match rest.iter().position(|byte| b"/?".contains(byte)) {
        Some(slash) if rest[slash] == b'/' => rest[slash..].to_vec(),
        Some(query) => [b"/", &rest[query..]].concat(),
        None => b"/".to_vec(),
    };
    request.set_raw_path(&path).map_err(|_| &refusal::HEADER_MALFORMED)
}

/// Only WebSocket is an upgrade that passes, as with Pingora. One to h2c above all would let the client speak past the
/// routes and filters (RFC 9113 §3.1 has abolished it).
fn drop_other_upgrades(request: &mut RequestHeader) {
    const HTTP2_SETTINGS: HeaderName = HeaderName::from_static("http2-settings");
    let Some(upgrade) = request.headers.get(header::UPGRADE) else { return };
    let websocket = upgrade.as_bytes().eq_ignore_ascii_case(b"websocket")
        // RFC 6455 §4.1. Whatever else says so would go round the limits for request bodies.
        && request.method == Method::GET
        && !request.headers.contains_key(header::CONTENT_LENGTH)
        && !request.headers.contains_key(header::TRANSFER_ENCODING);
    if !websocket {
        request.remove_header(&header::UPGRADE);
        request.remove_header(&HTTP2_SETTINGS);
    }
}

/// Finds the client: the peer, or, where the peer is trusted, the last address in `X-Forwarded-For` that is not.
fn identify(exchange: &mut Exchange, request: &RequestHeader, trusted: &TrustedProxies) {
    let Some(connection) = &exchange.connection else { return };
    let peer = connection.peer.map(|peer| peer.ip());
    exchange.client = peer;
    exchange.peer_is_trusted = trusted.is_peer_of(connection);
    if !exchange.peer_is_trusted {
        return;
    }
    if let Some(client) = forwarded_client(request, trusted) {
        exchange.client = Some(client);
    }
    if let Some(https) = forwarded_https(request) {
        exchange.scheme = if https { "https" } else { "http" };
    }
}

/// Who a client has proved to be by its certificate: its subject, its further names, its SHA-256 and its number. Set by
/// Forebay alone, or by a proxy that is trusted: routes, filters, logs and upstreams may rely on them.
const CLIENT_CERTIFICATE: [HeaderName; 4] = [
    HeaderName::from_static("x-client-cert-subject"),
    HeaderName::from_static("x-client-cert-names"),
    HeaderName::from_static("x-client-cert-fingerprint"),
    HeaderName::from_static("x-client-cert-serial"),
];

/// Longer, and no origin would take it.
const CERTIFICATE_FIELD_BYTES_MAX: usize = 8 << 10;

/// Says who the client has proved to be, in place of what it says itself.
fn introduce(exchange: &Exchange, request: &mut RequestHeader) -> Result<(), &'static Refusal> {
    let proved = exchange.connection.as_ref().and_then(|connection| connection.tls()?.client.as_ref());
    if proved.is_none() && exchange.peer_is_trusted {
        return Ok(());
    }
    for name in &CLIENT_CERTIFICATE {
        request.remove_header(name);
    }
    let Some(client) = proved else { return Ok(()) };
    let said = [&client.subject, &client.names, &client.fingerprint, &client.serial];
    for (name, text) in CLIENT_CERTIFICATE.iter().zip(said).filter(|(_, text)| !text.is_empty()) {
        // Cut or changed, it might be somebody else's.
        let whole = text.len() <= CERTIFICATE_FIELD_BYTES_MAX;
        let value =
            HeaderValue::from_bytes(text.as_bytes()).ok().filter(|_| whole).ok_or(&refusal::HEADER_MALFORMED)?;
        request.insert_header(name.clone(), value).map_err(|_| &refusal::HEADER_MALFORMED)?;
    }
    Ok(())
}

/// Whether the nearest proxy says that its client came by TLS; `None` if it does not say.
fn forwarded_https(request: &RequestHeader) -> Option<bool> {
    if let Some(proto) = request.headers.get(X_FORWARDED_PROTO) {
        return Some(proto.as_bytes().eq_ignore_ascii_case(b"https"));
    }
    let last = request.headers.get_all(header::FORWARDED).iter().next_back();
    let element = last.and_then(|value| value.to_str().ok()?.rsplit(',').next());
    element.and_then(|element| parameter(element, "proto")).map(|proto| proto.eq_ignore_ascii_case("https"))
}

/// `X-Forwarded-Proto`.
pub const X_FORWARDED_PROTO: HeaderName = HeaderName::from_static("x-forwarded-proto");
/// `X-Forwarded-For`.
pub const X_FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");

/// Walks from the nearest hop outwards; stops at the first address that is not a trusted proxy, or at nonsense.
/// `X-Forwarded-For` is asked first, `Forwarded` (RFC 7239) if there is none.
fn forwarded_client(request: &RequestHeader, trusted: &TrustedProxies) -> Option<IpAddr> {
    let standard = !request.headers.contains_key(X_FORWARDED_FOR);
    let name = if standard { header::FORWARDED } else { X_FORWARDED_FOR };
    let mut client = None;
    for value in request.headers.get_all(name).iter().rev() {
        for hop in value.to_str().ok()?.rsplit(',') {
            let hop = if standard { parameter(hop, "for").unwrap_or_default() } else { hop.trim() };
            let Some(address) = hop_address(hop) else { return client };
            client = Some(address);
            if !trusted.contains(address) {
                return client;
            }
        }
    }
    client
}

/// The value of a parameter in an element of `Forwarded` (RFC 7239 §4), without its quotes.
fn parameter<'e>(element: &'e str, name: &str) -> Option<&'e str> {
    let mut pairs = element.split(';').filter_map(|pair| pair.trim().split_once('='));
    pairs.find(|(found, _)| found.eq_ignore_ascii_case(name)).map(|(_, value)| value.trim_matches('"'))
}

/// An address as it stands in `X-Forwarded-For`: bare, or with a port as some proxies write it.
fn hop_address(hop: &str) -> Option<IpAddr> {
    let bare = hop.parse().ok();
    let with_port = || hop.parse::<std::net::SocketAddr>().ok().map(|address| address.ip());
    let bracketed = || hop.strip_prefix('[')?.strip_suffix(']')?.parse().ok();
    bare.or_else(with_port).or_else(bracketed).map(|address: IpAddr| address.to_canonical())
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

    fn client_behind(trusted: &[&str], forwarded: &[&str]) -> Option<String> {
        let networks: Vec<Proxy> = trusted.iter().map(|network| network.parse().expect("a network")).collect();
        let fields: Vec<_> = forwarded.iter().map(|value| ("x-forwarded-for", *value)).collect();
        forwarded_client(&request(&fields), &TrustedProxies::new(&networks)).map(|client| client.to_string())
    }

    #[test]
    fn the_client_is_the_last_address_that_no_trusted_proxy_has() {
        let trusted = ["10.0.0.0/8", "fd00::/8"];
        assert_eq!(client_behind(&trusted, &["1.2.3.4"]), Some("1.2.3.4".into()));
        assert_eq!(client_behind(&trusted, &["6.6.6.6, 1.2.3.4, 10.0.0.7"]), Some("1.2.3.4".into()));
        assert_eq!(client_behind(&trusted, &["6.6.6.6", "1.2.3.4", "10.0.0.7"]), Some("1.2.3.4".into()));
        assert_eq!(client_behind(&trusted, &["10.0.0.1, 10.0.0.2"]), Some("10.0.0.1".into()));
        assert_eq!(client_behind(&trusted, &["[2001:db8::1]:4711"]), Some("2001:db8::1".into()));
        assert_eq!(client_behind(&trusted, &["::ffff:1.2.3.4"]), Some("1.2.3.4".into()));
        assert_eq!(client_behind(&trusted, &["nonsense, 10.0.0.1"]), Some("10.0.0.1".into()));
        assert_eq!(client_behind(&trusted, &[]), None);
    }

    #[test]
    fn forwarded_is_believed_where_there_is_no_x_forwarded_for() {
        let trusted = TrustedProxies::new(&["10.0.0.0/8".parse().expect("a network")]);
        let said =
            request(&[("forwarded", "for=6.6.6.6, For=\"[2001:db8::1]:4711\";proto=https, for=10.0.0.1;proto=http")]);
        assert_eq!(forwarded_client(&said, &trusted), "2001:db8::1".parse().ok());
        assert_eq!(forwarded_https(&said), Some(false));
        assert_eq!(forwarded_https(&request(&[("forwarded", "for=1.2.3.4;Proto=HTTPS")])), Some(true));
        assert_eq!(forwarded_https(&request(&[("forwarded", "for=1.2.3.4")])), None);
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
    fn a_grpc_call_is_known_by_its_whole_form() {
        let call = |version, method: &str, te: &[&str], kinds: &[&str]| {
            let fields = te.iter().map(|te| ("te", *te)).chain(kinds.iter().map(|kind| ("content-type", *kind)));
            let mut request = request(&fields.collect::<Vec<_>>());
            request.set_version(version);
            request.set_method(method.parse().expect("a method"));
            is_grpc(&request)
        };
        let of = |kind| call(http::Version::HTTP_2, "POST", &["trailers"], &[kind]);
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
        assert!(call(http::Version::HTTP_2, "POST", &["gzip, Trailers;q=1"], &kind));
        assert!(call(http::Version::HTTP_2, "POST", &["gzip", "trailers"], &kind));
        assert!(!call(http::Version::HTTP_2, "POST", &["xtrailers"], &kind));
        assert!(!call(http::Version::HTTP_2, "POST", &[], &kind));
        assert!(!call(http::Version::HTTP_2, "GET", &["trailers"], &kind));
        assert!(!call(http::Version::HTTP_11, "POST", &["trailers"], &kind));
        assert!(!call(http::Version::HTTP_2, "POST", &["trailers"], &[]));
        assert!(!call(http::Version::HTTP_2, "POST", &["trailers"], &["application/grpc", "text/plain"]));
    }

    #[test]
    fn an_origin_gets_the_path_of_an_absolute_target() {
        for (target, path) in
            [("http://a/x?y", "/x?y"), ("http://a", "/"), ("http://a?y", "/?y"), ("/p?u=http://b/", "/p?u=http://b/")]
        {
            let mut request = RequestHeader::build("GET", target.as_bytes(), None).expect("a request");
            assert_eq!(make_origin_form(&mut request), Ok(()));
            assert_eq!(String::from_utf8_lossy(request.raw_path()), path, "{target}");
        }
    }

    #[test]
    fn an_upgrade_to_anything_but_websocket_is_dropped() {
        for other in ["H2C", "h2c, websocket", "echo"] {
            let mut request = request(&[("upgrade", other), ("http2-settings", "AAMAAABk")]);
            drop_other_upgrades(&mut request);
            assert!(request.headers.get("upgrade").is_none() && request.headers.get("http2-settings").is_none());
        }
        let mut websocket = request(&[("upgrade", "WebSocket")]);
        drop_other_upgrades(&mut websocket);
        assert!(websocket.headers.get("upgrade").is_some());
    }
}
