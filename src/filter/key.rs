//! What the key of an exchange is: by what a filter or a balancer tells requests apart.

use std::borrow::Cow;
use std::net::IpAddr;

use http::header::COOKIE;
use pingora::http::RequestHeader;
use xxhash_rust::xxh3::xxh3_64;

use super::Scope;

pub use crate::config::Key;

impl Key {
    /// The key of this exchange; empty if the client sent none. Borrowed where the bytes lie in the request as they are.
    pub fn of<'s>(&self, scope: &'s Scope<'_>) -> Cow<'s, [u8]> {
        self.found(scope.client, scope.route, scope.request).unwrap_or_default()
    }

    /// The key of an exchange; `None` if it has none.
    fn found<'s>(&self, client: Option<IpAddr>, route: &'s str, request: &'s RequestHeader) -> Option<Cow<'s, [u8]>> {
        let borrowed = match self {
            Key::ClientIp => return client.map(octets),
            Key::Path => Some(request.uri.path().as_bytes()),
            Key::Route => Some(route.as_bytes()),
            Key::Header(name) => request.headers.get(name).map(|value| value.as_bytes()),
            Key::Cookie(name) => cookie(request, name.as_bytes()),
            Key::Query(name) => return argument(request.uri.query().unwrap_or_default(), name.as_bytes()),
        };
        borrowed.map(Cow::Borrowed)
    }
}

/// The hash of the first of `keys` that an exchange has; `None` if it has none of them. The same on every node.
pub fn hash(keys: &[Key], client: Option<IpAddr>, route: &str, request: &RequestHeader) -> Option<u64> {
    let mut found = keys.iter().filter_map(|key| key.found(client, route, request));
    found.find(|key| !key.is_empty()).map(|key| xxh3_64(&key))
}

/// The octets of an address; one of IPv4 that came in by way of IPv6 (`::ffff:192.0.2.1`) is the same client.
fn octets(client: IpAddr) -> Cow<'static, [u8]> {
    match client.to_canonical() {
        IpAddr::V4(v4) => v4.octets().to_vec().into(),
        IpAddr::V6(v6) => v6.octets().to_vec().into(),
    }
}

/// RFC 6265 §4.2.1: pairs between semicolons. HTTP/2 may split them over several fields (RFC 9113 §8.2.3).
fn cookie<'s>(request: &'s RequestHeader, name: &[u8]) -> Option<&'s [u8]> {
    let fields = request.headers.get_all(COOKIE).iter();
    let mut pairs = fields.flat_map(|field| field.as_bytes().split(|&byte| byte == b';'));
    pairs.find_map(|pair| pair.trim_ascii().strip_prefix(name)?.strip_prefix(b"="))
}

/// The value of the first argument of this name in `query`, both percent-decoded.
fn argument<'q>(query: &'q str, name: &[u8]) -> Option<Cow<'q, [u8]>> {
    let pairs = query.split('&').map(|pair| pair.split_once('=').unwrap_or((pair, "")));
    pairs.into_iter().find(|(key, _)| *decoded(key) == *name).map(|(_, value)| decoded(value))
}

/// Undoes `%41` and `+`, as forms write them. A `%` without two hex digits stands for itself.
fn decoded(text: &str) -> Cow<'_, [u8]> {
    let mut rest = text.as_bytes();
    if !rest.iter().any(|byte| matches!(byte, b'%' | b'+')) {
        return Cow::Borrowed(rest);
    }
    let mut plain = Vec::with_capacity(rest.len());
    while let Some((&byte, after)) = rest.split_first() {
        let escaped = if byte == b'%' { after.split_at_checked(2).and_then(hex) } else { None };
        let (byte, after) = escaped.unwrap_or((if byte == b'+' { b' ' } else { byte }, after));
        plain.push(byte);
        rest = after;
    }
    Cow::Owned(plain)
}

/// The byte that two hex digits stand for, and what follows them.
fn hex<'t>((digits, after): (&'t [u8], &'t [u8])) -> Option<(u8, &'t [u8])> {
    let digit = |byte: u8| char::from(byte).to_digit(16).and_then(|digit| u8::try_from(digit).ok());
    Some((digit(digits[0])? << 4 | digit(digits[1])?, after))
}

#[cfg(test)]
mod tests {
    use super::super::rehearsal::request;
    use super::*;

    /// The key that `written` takes from a request.
    fn key(written: &str, client: Option<&str>, target: &str, headers: &[(&'static str, &str)]) -> String {
        let value = serde_yaml::from_str(written).unwrap();
        let key: Key = serde_yaml::with::singleton_map_recursive::deserialize::<_, serde_yaml::Value>(value).unwrap();
        key.check().unwrap();
        let (mut request, mut state) = (request(target, headers), None);
        let client = client.map(|client| client.parse().unwrap());
        let scope = Scope { client, scheme: "http", route: "shop", request: &mut request, state: &mut state };
        String::from_utf8_lossy(&key.of(&scope)).into_owned()
    }

    fn query(name: &str, target: &str) -> String {
        key(&format!("query: {name}"), None, target, &[])
    }

    fn cookie(fields: &[&str]) -> String {
        let fields: Vec<_> = fields.iter().map(|field| ("cookie", *field)).collect();
        key("cookie: sid", None, "/", &fields)
    }

    #[test]
    fn an_address_of_ipv4_is_the_same_client_by_whichever_way_it_comes() {
        let (direct, mapped) = (Some("65.66.67.68"), Some("::ffff:65.66.67.68"));
        assert_eq!(key("client_ip", direct, "/", &[]), "ABCD");
        assert_eq!(key("client_ip", mapped, "/", &[]), "ABCD");
        assert_eq!(key("client_ip", Some("2001:db8::1"), "/", &[]).chars().count(), 16);
        assert_eq!(key("client_ip", None, "/", &[]), "");
    }

    #[test]
    fn path_route_and_header_are_taken_as_they_are() {
        assert_eq!(key("path", None, "/a%20b?c=d", &[]), "/a%20b");
        assert_eq!(key("route", None, "/", &[]), "shop");
        assert_eq!(key("header: X-Key", None, "/", &[("x-key", "one"), ("x-key", "two")]), "one");
        assert_eq!(key("header: X-Key", None, "/", &[]), "");
    }

    #[test]
    fn a_cookie_is_found_in_any_field_by_its_exact_name() {
        assert_eq!(cookie(&["a=b; sid=1=2; c=d"]), "1=2");
        assert_eq!(cookie(&["a=b", "sid=3"]), "3");
        assert_eq!(cookie(&["sid=\"4\";x=y"]), "\"4\"");
        assert_eq!(cookie(&["SID=5; xsid=6; sidx=7; sid"]), "");
        assert_eq!(cookie(&[]), "");
    }

    #[test]
    fn a_query_argument_is_decoded() {
        assert_eq!(query("q", "/?a=b&q=x%2Fy+z&q=2"), "x/y z");
        assert_eq!(query("a b", "/?a+b=1"), "1");
        assert_eq!(query("a b", "/?%61%20b=2"), "2");
        assert_eq!(query("q", "/?q"), "");
        assert_eq!(query("q", "/?qq=1"), "");
        assert_eq!(query("q", "/"), "");
    }

    #[test]
    fn half_an_escape_stands_for_itself() {
        assert_eq!(query("q", "/?q=100%"), "100%");
        assert_eq!(query("q", "/?q=%4"), "%4");
        assert_eq!(query("q", "/?q=%zz%+1"), "%zz% 1");
    }

    #[test]
    fn only_a_query_argument_that_was_encoded_is_copied() {
        assert!(matches!(argument("q=plain", b"q"), Some(Cow::Borrowed(b"plain"))));
        assert!(matches!(argument("q=a%20b", b"q"), Some(Cow::Owned(_))));
    }

    #[test]
    fn the_first_key_that_an_exchange_has_is_hashed() {
        let keys = [Key::Header("x-user".into()), Key::ClientIp];
        let client = Some("192.0.2.1".parse().unwrap());
        let by_header = hash(&keys, client, "shop", &request("/", &[("x-user", "ann")]));
        assert_eq!(by_header, Some(xxh3_64(b"ann")));
        assert_eq!(hash(&keys, client, "shop", &request("/", &[])), Some(xxh3_64(&[192, 0, 2, 1])));
        assert_eq!(hash(&keys, None, "shop", &request("/", &[])), None);
    }
}
