//! Where a filter or a balancer takes the key of an exchange from: by what requests are told apart.

use std::borrow::Cow;
use std::net::IpAddr;

use http::header::COOKIE;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{Scope, field};
use crate::error::BuildError;

/// Where rate limits, hashes and the like take their key from.
///
/// In YAML: `client_ip`, `path`, `route`, `{ header: x }`, `{ cookie: x }` or `{ query: x }`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Key {
    /// The client's address.
    ClientIp,
    /// The path of the request, as it was sent.
    Path,
    /// The name of the route.
    Route,
    /// The value of a header; the first one, if there are several.
    Header(String),
    /// The value of a cookie; names are case-sensitive.
    Cookie(String),
    /// The value of a query argument, percent-decoded; the first one, if there are several.
    Query(String),
}

impl Key {
    /// Whether such a key can exist at all.
    ///
    /// # Errors
    /// A name that no header or cookie can have; the path is `header`, `cookie` or `query`.
    pub fn check(&self) -> Result<(), BuildError> {
        match self {
            Key::ClientIp | Key::Path | Key::Route => Ok(()),
            Key::Header(name) => field::name(name).map(drop).map_err(|message| BuildError::new("header", message)),
            // RFC 6265 §4.1.1: the name of a cookie is a token, as that of a header.
            Key::Cookie(name) => field::name(name)
                .map(drop)
                .map_err(|_| BuildError::new("cookie", format!("`{name}` is no name of a cookie"))),
            Key::Query(name) if name.is_empty() => Err(BuildError::new("query", "a query argument needs a name")),
            Key::Query(_) => Ok(()),
        }
    }

    /// The key of this exchange; empty if the client sent none. Borrowed where the bytes lie in the request as they are.
    pub fn of<'s>(&self, scope: &'s Scope<'_>) -> Cow<'s, [u8]> {
        let borrowed = match self {
            Key::ClientIp => return scope.client.map(octets).unwrap_or_default(),
            Key::Path => Some(scope.request.uri.path().as_bytes()),
            Key::Route => Some(scope.route.as_bytes()),
            Key::Header(name) => scope.request.headers.get(name).map(|value| value.as_bytes()),
            Key::Cookie(name) => cookie(scope, name.as_bytes()),
            Key::Query(name) => return argument(scope.request.uri.query().unwrap_or_default(), name.as_bytes()),
        };
        Cow::Borrowed(borrowed.unwrap_or_default())
    }
}

/// The octets of an address; one of IPv4 that came in by way of IPv6 (`::ffff:192.0.2.1`) is the same client.
fn octets(client: IpAddr) -> Cow<'static, [u8]> {
    match client.to_canonical() {
        IpAddr::V4(v4) => v4.octets().to_vec().into(),
        IpAddr::V6(v6) => v6.octets().to_vec().into(),
    }
}

/// RFC 6265 §4.2.1: pairs between semicolons. HTTP/2 may split them over several fields (RFC 9113 §8.2.3).
fn cookie<'s>(scope: &'s Scope<'_>, name: &[u8]) -> Option<&'s [u8]> {
    let fields = scope.request.headers.get_all(COOKIE).iter();
    let mut pairs = fields.flat_map(|field| field.as_bytes().split(|&byte| byte == b';'));
    pairs.find_map(|pair| pair.trim_ascii().strip_prefix(name)?.strip_prefix(b"="))
}

/// The value of the first argument of this name in `query`, both percent-decoded; empty if there is none.
fn argument<'q>(query: &'q str, name: &[u8]) -> Cow<'q, [u8]> {
    let pairs = query.split('&').map(|pair| pair.split_once('=').unwrap_or((pair, "")));
    pairs.into_iter().find(|(key, _)| *decoded(key) == *name).map(|(_, value)| decoded(value)).unwrap_or_default()
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
        assert!(matches!(argument("q=plain", b"q"), Cow::Borrowed(b"plain")));
        assert!(matches!(argument("q=a%20b", b"q"), Cow::Owned(_)));
    }

    #[test]
    fn a_key_that_cannot_exist_is_told() {
        let told = |key: Key| key.check().map_err(|error| error.to_string()).unwrap_err();
        assert_eq!(told(Key::Header("a b".into())), "header: `a b` is no header name");
        assert_eq!(told(Key::Cookie("a;b".into())), "cookie: `a;b` is no name of a cookie");
        assert_eq!(told(Key::Query(String::new())), "query: a query argument needs a name");
    }
}
