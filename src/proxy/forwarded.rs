//! The hops before Forebay: read from `X-Forwarded-For` or `Forwarded` (RFC 7239), and reported to the endpoint in one
//! or both.
//!
//! Only trusted proxies are believed; such fields of other peers were removed (`header::names`). Most proxies write one
//! of the two fields and pass the other on unchanged, so that a client can forge it. The chain is therefore read from
//! exactly one field: `X-Forwarded-For` if present, else `Forwarded`. Every field that the endpoint receives is made of
//! this chain.

use std::borrow::Cow;
use std::fmt::Write;
use std::net::{IpAddr, SocketAddr};

use http::{HeaderMap, HeaderName, HeaderValue, header};
use pingora::Result;
use pingora::http::RequestHeader;

use crate::config::server::Forwarded;
use crate::printable::{address, digits};

/// `X-Forwarded-For`.
pub const X_FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
/// `X-Forwarded-Proto`.
pub const X_FORWARDED_PROTO: HeaderName = HeaderName::from_static("x-forwarded-proto");
/// `X-Forwarded-Host`.
pub const X_FORWARDED_HOST: HeaderName = HeaderName::from_static("x-forwarded-host");
/// `X-Forwarded-Port`.
pub const X_FORWARDED_PORT: HeaderName = HeaderName::from_static("x-forwarded-port");

/// The fields that Forebay adds to every request.
#[derive(Clone, Copy, Debug, Default)]
pub struct Additions {
    /// The format of the fields that name the client.
    pub forwarded: Forwarded,
    /// Whether `Via` is added.
    pub via: bool,
}

/// The identity of a hop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Node {
    /// An address with an optional port.
    Address(IpAddr, Option<u16>),
    /// No field names the hop in a valid form.
    Unknown,
}

/// The facts about Forebay's own hop.
#[derive(Clone, Copy, Debug)]
pub struct Own<'o> {
    /// The peer's address; `None` over a Unix socket.
    pub peer: Option<IpAddr>,
    /// `http` or `https`, by the client's connection.
    pub scheme: &'static str,
    /// The requested host.
    pub host: Option<&'o HeaderValue>,
    /// The local port of the connection.
    pub port: Option<u16>,
}

/// Finds the client: the first hop that is not a trusted proxy, starting with the nearest. An invalid element ends the
/// chain; the client is then the last hop before it. `None` if no client is named.
pub fn client(headers: &HeaderMap, is_trusted: impl Fn(IpAddr) -> bool) -> Option<IpAddr> {
    let mut client = None;
    for node in chain(headers).into_iter().rev() {
        let Node::Address(address, _) = node else { return client };
        client = Some(address);
        if !is_trusted(address) {
            return client;
        }
    }
    client
}

/// Whether the nearest proxy reports that its client used TLS; `None` if it does not report it.
pub fn is_https(headers: &HeaderMap) -> Option<bool> {
    let said = match last_item(headers, &X_FORWARDED_PROTO) {
        Some(proto) => Some(Cow::Borrowed(proto)),
        None => nearest(headers).and_then(|element| parameter(element, "proto")),
    };
    said.map(|proto| proto.eq_ignore_ascii_case("https"))
}

/// Writes the fields about the hops and Forebay for the endpoint. Removes a chain in a format that is not written,
/// since it would lack Forebay.
pub fn tell(request: &mut RequestHeader, format: Forwarded, own: Own<'_>) -> Result<()> {
    let standard = match format {
        Forwarded::XForwarded => None,
        Forwarded::Rfc7239 | Forwarded::Both => Some(standard(&request.headers, own)),
    };
    if format == Forwarded::Rfc7239 {
        request.remove_header(&X_FORWARDED_FOR);
    } else {
        x_forwarded(request, own)?;
    }
    match standard {
        Some(hops) => request.insert_header(header::FORWARDED, hops),
        None => {
            request.remove_header(&header::FORWARDED);
            Ok(())
        }
    }
}

/// Writes the fields of [`tell`] as lines of an HTTP/1 header. `false`: nothing was written, because the request
/// already has such a field or another format is configured.
pub fn lines(headers: &HeaderMap, format: Forwarded, own: Own<'_>, lines: &mut Vec<u8>) -> bool {
    let tells = |name: &HeaderName| name == header::FORWARDED || name.as_str().starts_with("x-forwarded-");
    if format != Forwarded::XForwarded || headers.keys().any(tells) {
        return false;
    }
    lines.reserve(192);
    if let Some(peer) = own.peer {
        lines.extend_from_slice(b"X-Forwarded-For: ");
        address(lines, peer);
        lines.extend_from_slice(b"\r\n");
    }
    lines.extend_from_slice(b"X-Forwarded-Proto: ");
    lines.extend_from_slice(own.scheme.as_bytes());
    if let Some(host) = own.host {
        lines.extend_from_slice(b"\r\nX-Forwarded-Host: ");
        lines.extend_from_slice(host.as_bytes());
    }
    if let Some(port) = own.port {
        lines.extend_from_slice(b"\r\nX-Forwarded-Port: ");
        digits(lines, port.into(), 1);
    }
    lines.extend_from_slice(b"\r\n");
    true
}

/// Writes `X-Forwarded-For` and its companion fields. Companion fields of a trusted proxy remain.
fn x_forwarded(request: &mut RequestHeader, own: Own<'_>) -> Result<()> {
    let nearest = nearest(&request.headers).filter(|_| !request.headers.contains_key(X_FORWARDED_FOR));
    let host =
        nearest.and_then(|element| parameter(element, "host")).and_then(|host| HeaderValue::from_str(&host).ok());
    let mut hops = joined(&request.headers, &X_FORWARDED_FOR);
    if hops.is_empty() && request.headers.contains_key(header::FORWARDED) {
        for node in chain(&request.headers) {
            match node {
                Node::Address(address, _) => append(&mut hops, format_args!("{address}")),
                Node::Unknown => append(&mut hops, format_args!("unknown")),
            }
        }
    }
    if let Some(peer) = own.peer {
        append(&mut hops, format_args!("{peer}"));
    }
    if !hops.is_empty() {
        request.insert_header(X_FORWARDED_FOR, hops)?;
    }
    let said = [
        (X_FORWARDED_PROTO, Some(HeaderValue::from_static(own.scheme))),
        (X_FORWARDED_HOST, host.or_else(|| own.host.cloned())),
        (X_FORWARDED_PORT, own.port.map(HeaderValue::from)),
    ];
    for (name, value) in said {
        if let Some(value) = value.filter(|_| !request.headers.contains_key(&name)) {
            request.insert_header(name, value)?;
        }
    }
    Ok(())
}

/// The value of `Forwarded`: one element per hop (RFC 7239 §4).
fn standard(headers: &HeaderMap, own: Own<'_>) -> String {
    let mut hops = String::with_capacity(80);
    if headers.contains_key(X_FORWARDED_FOR) {
        for node in chain(headers) {
            append_node(&mut hops, node);
        }
        // These fields describe the request as the nearest proxy received it.
        if let Some(host) = last_item(headers, &X_FORWARDED_HOST).filter(|host| is_quotable(host)) {
            let _ = write!(hops, ";host=\"{host}\"");
        }
        if let Some(proto) = last_item(headers, &X_FORWARDED_PROTO).filter(|proto| is_token(proto)) {
            let _ = write!(hops, ";proto={proto}");
        }
    } else {
        hops.push_str(&joined(headers, &header::FORWARDED));
    }
    append_node(&mut hops, own.peer.map_or(Node::Unknown, |peer| Node::Address(peer, None)));
    if let Some(host) = own.host.and_then(|host| host.to_str().ok()).filter(|host| is_quotable(host)) {
        let _ = write!(hops, ";host=\"{host}\"");
    }
    let _ = write!(hops, ";proto={}", own.scheme);
    hops
}

/// IPv6 addresses are in brackets, and values with a colon are quoted (RFC 7239 §4, §6).
fn append_node(hops: &mut String, node: Node) {
    match node {
        Node::Address(IpAddr::V4(address), None) => append(hops, format_args!("for={address}")),
        Node::Address(IpAddr::V6(address), None) => append(hops, format_args!("for=\"[{address}]\"")),
        Node::Address(address, Some(port)) => append(hops, format_args!("for=\"{}\"", SocketAddr::new(address, port))),
        Node::Unknown => append(hops, format_args!("for=unknown")),
    }
}

/// The hops that the fields name, the nearest last.
fn chain(headers: &HeaderMap) -> Vec<Node> {
    if headers.contains_key(X_FORWARDED_FOR) {
        let lines = headers.get_all(X_FORWARDED_FOR).iter();
        return lines.flat_map(|line| line.as_bytes().split(|&byte| byte == b',').map(node)).collect();
    }
    let mut chain = Vec::new();
    for line in headers.get_all(header::FORWARDED) {
        match line.to_str().ok().and_then(|line| split(line, ',')) {
            Some(elements) => chain.extend(
                elements
                    .into_iter()
                    .map(|element| parameter(element, "for").map_or(Node::Unknown, |named| node(named.as_bytes()))),
            ),
            None => chain.push(Node::Unknown),
        }
    }
    chain
}

/// The element of the nearest proxy in `Forwarded`.
fn nearest(headers: &HeaderMap) -> Option<&str> {
    let line = headers.get_all(header::FORWARDED).iter().next_back()?.to_str().ok()?;
    split(line, ',')?.pop()
}

/// The last member of a list, over all fields of this name: the one that the nearest proxy has added.
fn last_item<'h>(headers: &'h HeaderMap, name: &HeaderName) -> Option<&'h str> {
    let line = headers.get_all(name).iter().next_back()?.to_str().ok()?;
    line.rsplit(',').next().map(str::trim)
}

/// Parses a hop: an address with or without a port; IPv6 with or without brackets.
fn node(written: &[u8]) -> Node {
    let Ok(written) = std::str::from_utf8(written.trim_ascii()) else { return Node::Unknown };
    if let Ok(address) = written.parse::<IpAddr>() {
        return Node::Address(address.to_canonical(), None);
    }
    if let Ok(socket) = written.parse::<SocketAddr>() {
        return Node::Address(socket.ip().to_canonical(), Some(socket.port()));
    }
    let bracketed = written.strip_prefix('[').and_then(|rest| rest.strip_suffix(']'));
    match bracketed.and_then(|address| address.parse::<IpAddr>().ok()) {
        Some(address) => Node::Address(address.to_canonical(), None),
        None => Node::Unknown,
    }
}

/// The value of a parameter in an element of `Forwarded` (RFC 7239 §4), without its quotes.
fn parameter<'e>(element: &'e str, name: &str) -> Option<Cow<'e, str>> {
    let pairs = split(element, ';')?.into_iter().filter_map(|pair| pair.split_once('='));
    let (_, value) = pairs.into_iter().find(|(found, _)| found.trim().eq_ignore_ascii_case(name))?;
    let value = value.trim();
    let Some(quoted) = value.strip_prefix('"') else { return Some(Cow::Borrowed(value)) };
    let quoted = quoted.strip_suffix('"')?;
    if !quoted.contains('\\') {
        return Some(Cow::Borrowed(quoted));
    }
    let mut escaped = false;
    let plain = quoted.chars().filter(|&character| {
        escaped = character == '\\' && !escaped;
        !escaped
    });
    Some(Cow::Owned(plain.collect()))
}

/// The trimmed parts between separators outside quotes; `None` if a quote is not closed.
fn split(text: &str, separator: char) -> Option<Vec<&str>> {
    let (mut parts, mut begin, mut quoted, mut escaped) = (Vec::new(), 0, false, false);
    for (at, character) in text.char_indices() {
        match character {
            _ if escaped => escaped = false,
            '\\' if quoted => escaped = true,
            '"' => quoted = !quoted,
            _ if character == separator && !quoted => {
                parts.push(text[begin..at].trim());
                begin = at + 1;
            }
            _ => {}
        }
    }
    parts.push(text[begin..].trim());
    (!quoted).then_some(parts)
}

/// Whether the text can be quoted without escapes.
fn is_quotable(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_graphic() && byte != b'"' && byte != b'\\')
}

fn is_token(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"+-.".contains(&byte))
}

/// Joins the values of a list field.
fn joined(headers: &HeaderMap, name: &HeaderName) -> String {
    let mut list = String::with_capacity(40);
    for value in headers.get_all(name) {
        if let Ok(value) = value.to_str() {
            append(&mut list, format_args!("{value}"));
        }
    }
    list
}

fn append(list: &mut String, item: std::fmt::Arguments<'_>) {
    if !list.is_empty() {
        list.push_str(", ");
    }
    // Writing to a string cannot fail.
    let _ = list.write_fmt(item);
}

#[cfg(test)]
mod tests {
    use super::super::header::tests::request;
    use super::*;

    const FORWARDED: &str = "forwarded";
    const FOR: &str = "x-forwarded-for";

    fn seen(fields: &[(&'static str, &str)]) -> Option<String> {
        let trusted = |address: IpAddr| match address {
            IpAddr::V4(address) => address.octets()[0] == 10,
            IpAddr::V6(address) => address.segments()[0] == 0xfd00,
        };
        client(&request(fields).headers, trusted).map(|client| client.to_string())
    }

    fn told(format: Forwarded, fields: &[(&'static str, &str)]) -> (Option<String>, Option<String>) {
        let mut request = request(fields);
        let host = HeaderValue::from_static("shop:8080");
        let own = Own { peer: "10.0.0.9".parse().ok(), scheme: "http", host: Some(&host), port: Some(80) };
        tell(&mut request, format, own).expect("headers");
        let value = |name| request.headers.get(name).map(|value| value.to_str().expect("text").to_owned());
        (value(FOR), value(FORWARDED))
    }

    #[test]
    fn lines_say_what_fields_would() {
        let host = HeaderValue::from_static("shop:8080");
        let known = Own { peer: "10.0.0.9".parse().ok(), scheme: "https", host: Some(&host), port: Some(8443) };
        let unix = Own { peer: None, scheme: "http", host: None, port: None };
        let v6 = Own { peer: "2001:db8::1".parse().ok(), ..unix };
        for own in [known, unix, v6] {
            let mut told = request(&[("x-own", "1")]);
            tell(&mut told, Forwarded::XForwarded, own).expect("headers");
            told.remove_header("x-own");
            let fields =
                told.headers.iter().map(|(name, value)| format!("{name}: {}\r\n", value.to_str().expect("text")));
            let mut written = Vec::new();
            assert!(lines(&request(&[("x-own", "1")]).headers, Forwarded::XForwarded, own, &mut written));
            let mut lines: Vec<_> =
                String::from_utf8(written).expect("text").split_inclusive('\n').map(str::to_lowercase).collect();
            let mut fields: Vec<_> = fields.collect();
            lines.sort();
            fields.sort();
            assert_eq!(lines, fields);
        }
        let mut written = Vec::new();
        for said in ["forwarded", "x-forwarded-for", "x-forwarded-proto"] {
            let said = request(&[(said, "for=1.2.3.4")]);
            assert!(!lines(&said.headers, Forwarded::XForwarded, known, &mut written), "{said:?}");
        }
        assert!(!lines(&request(&[]).headers, Forwarded::Both, known, &mut written));
        assert!(written.is_empty());
    }

    #[test]
    fn the_client_is_the_last_address_that_no_trusted_proxy_has() {
        for (said, client) in [
            (&["1.2.3.4"][..], Some("1.2.3.4")),
            (&["6.6.6.6, 1.2.3.4, 10.0.0.7"], Some("1.2.3.4")),
            (&["6.6.6.6", "1.2.3.4", "10.0.0.7"], Some("1.2.3.4")),
            (&["1.2.3.4, fd00::7,10.0.0.7"], Some("1.2.3.4")),
            (&["10.0.0.1, 10.0.0.2"], Some("10.0.0.1")),
            (&["[2001:db8::1]:4711"], Some("2001:db8::1")),
            (&["[2001:db8::1]"], Some("2001:db8::1")),
            (&["1.2.3.4:80"], Some("1.2.3.4")),
            (&["::ffff:1.2.3.4"], Some("1.2.3.4")),
            (&["1.2.3.4, nonsense, 10.0.0.1"], Some("10.0.0.1")),
            (&["1.2.3.4, , 10.0.0.1"], Some("10.0.0.1")),
            (&["unknown"], None),
            (&[""], None),
            (&[], None),
        ] {
            let fields: Vec<_> = said.iter().map(|line| (FOR, *line)).collect();
            assert_eq!(seen(&fields).as_deref(), client, "{said:?}");
        }
    }

    #[test]
    fn forwarded_is_read_as_its_grammar_has_it() {
        for (said, client) in [
            (
                &["for=6.6.6.6, For=\"[2001:db8::1]:4711\";proto=https, for=10.0.0.1;proto=http"][..],
                Some("2001:db8::1"),
            ),
            (&["for=1.2.3.4", "proto=http; FOR = 10.0.0.1 ;by=x"], Some("1.2.3.4")),
            // A value in quotes, which a client may have chosen, is not a hop.
            (&["for=1.2.3.4;host=\"a, for=6.6.6.6\""], Some("1.2.3.4")),
            (&["for=1.2.3.4;host=\"a\\\", for=6.6.6.6, \\\"b\""], Some("1.2.3.4")),
            (&["for=1.2.3.4;host=\"a;for=6.6.6.6\""], Some("1.2.3.4")),
            (&["for=\"1.2.3.4\\:80\""], Some("1.2.3.4")),
            (&["for=1.2.3.4, for=_hidden, for=10.0.0.1"], Some("10.0.0.1")),
            (&["for=1.2.3.4, for=unknown"], None),
            (&["for=\"1.2.3.4"], None),
            (&["for=6.6.6.6, for=\"", "for=10.0.0.1"], Some("10.0.0.1")),
            (&["proto=https"], None),
        ] {
            let fields: Vec<_> = said.iter().map(|line| (FORWARDED, *line)).collect();
            assert_eq!(seen(&fields).as_deref(), client, "{said:?}");
        }
        let both = [(FORWARDED, "for=6.6.6.6"), (FOR, "1.2.3.4")];
        assert_eq!(seen(&both).as_deref(), Some("1.2.3.4"), "a client may have forged the other");
    }

    #[test]
    fn the_nearest_proxy_says_how_its_client_came() {
        let proto = "x-forwarded-proto";
        for (fields, https) in [
            (&[(proto, "HTTPS")][..], Some(true)),
            (&[(proto, "http")], Some(false)),
            (&[(proto, "https, http")], Some(false)),
            (&[(proto, "http"), (proto, "https")], Some(true)),
            (&[(proto, "http"), (FORWARDED, "for=1.2.3.4;proto=https")], Some(false)),
            (&[(FORWARDED, "for=1.2.3.4;Proto=HTTPS")], Some(true)),
            (&[(FORWARDED, "for=1.2.3.4;proto=https, for=10.0.0.1;proto=http")], Some(false)),
            (&[(FORWARDED, "for=1.2.3.4;host=\"a;proto=https\"")], None),
            (&[], None),
        ] {
            assert_eq!(is_https(&request(fields).headers), https, "{fields:?}");
        }
    }

    #[test]
    fn a_chain_goes_on_in_its_own_format() {
        let chain = [(FOR, "1.2.3.4"), (FOR, "10.0.0.1")];
        assert_eq!(told(Forwarded::XForwarded, &chain), (Some("1.2.3.4, 10.0.0.1, 10.0.0.9".into()), None));
        let chain = [(FORWARDED, "for=1.2.3.4;by=_a"), (FORWARDED, "For=10.0.0.1")];
        let own = "for=10.0.0.9;host=\"shop:8080\";proto=http";
        let expected = (None, Some(format!("for=1.2.3.4;by=_a, For=10.0.0.1, {own}")));
        assert_eq!(told(Forwarded::Rfc7239, &chain), expected);
        assert_eq!(told(Forwarded::Rfc7239, &[]), (None, Some(own.into())));
        assert_eq!(told(Forwarded::Both, &[]), (Some("10.0.0.9".into()), Some(own.into())));
    }

    #[test]
    fn a_chain_is_carried_over_from_one_format_to_the_other() {
        let own = "for=10.0.0.9;host=\"shop:8080\";proto=http";
        let said = [(FOR, "1.2.3.4, 2001:db8::1, [2001:db8::2]:80"), (FOR, "1.2.3.4:80, what")];
        let hops = "for=1.2.3.4, for=\"[2001:db8::1]\", for=\"[2001:db8::2]:80\", for=\"1.2.3.4:80\", for=unknown";
        assert_eq!(told(Forwarded::Rfc7239, &said), (None, Some(format!("{hops}, {own}"))));

        let said = [(FOR, "2001:db8::1"), ("x-forwarded-proto", "https"), ("x-forwarded-host", "a.example, b.example")];
        let hops = "for=\"[2001:db8::1]\";host=\"b.example\";proto=https";
        assert_eq!(told(Forwarded::Rfc7239, &said), (None, Some(format!("{hops}, {own}"))));

        let said =
            [(FORWARDED, "for=\"[2001:db8::1]:4711\";proto=https, for=_x"), (FORWARDED, "for=1.2.3.4;host=\"a\"")];
        let hops = "2001:db8::1, unknown, 1.2.3.4, 10.0.0.9";
        assert_eq!(told(Forwarded::XForwarded, &said), (Some(hops.into()), None));
    }

    #[test]
    fn both_formats_tell_of_one_chain() {
        let own = "for=10.0.0.9;host=\"shop:8080\";proto=http";
        // The proxy that wrote one field has passed the client's other field on.
        let said = [(FOR, "1.2.3.4"), (FORWARDED, "for=6.6.6.6;proto=https;host=bank")];
        let both = (Some("1.2.3.4, 10.0.0.9".to_owned()), Some(format!("for=1.2.3.4, {own}")));
        assert_eq!(told(Forwarded::Both, &said), both);
        assert_eq!(told(Forwarded::XForwarded, &said), (both.0, None));
        assert_eq!(told(Forwarded::Rfc7239, &said), (None, both.1));
        let said = [(FORWARDED, "for=1.2.3.4")];
        let both = (Some("1.2.3.4, 10.0.0.9".to_owned()), Some(format!("for=1.2.3.4, {own}")));
        assert_eq!(told(Forwarded::Both, &said), both);
    }

    #[test]
    fn what_a_trusted_proxy_says_of_host_and_scheme_stays() {
        let host = HeaderValue::from_static("shop");
        let own = Own { peer: None, scheme: "https", host: Some(&host), port: None };
        for (fields, named) in [
            (&[(FOR, "1.2.3.4"), ("x-forwarded-host", "bank"), ("x-forwarded-proto", "https")][..], "bank"),
            (&[(FORWARDED, "for=1.2.3.4;host=\"bank:81\";proto=https")], "bank:81"),
        ] {
            let mut request = request(fields);
            tell(&mut request, Forwarded::XForwarded, own).expect("headers");
            assert_eq!(request.headers["x-forwarded-host"], named);
            assert_eq!(request.headers["x-forwarded-proto"], "https");
            assert_eq!(request.headers[FOR], "1.2.3.4", "over a unix socket there is no address to add");
        }
    }
}
