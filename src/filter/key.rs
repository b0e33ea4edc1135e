//! Keys of exchanges, by which filters and balancers distinguish requests.
//!
//! `config::Key` is the configured form. It is prepared here once, and read from each request without a copy.

use std::borrow::Cow;
use std::net::IpAddr;

use http::{HeaderMap, HeaderName};
use xxhash_rust::xxh3::{Xxh3, xxh3_64};

use crate::config;
use crate::config::address::ClientPrefix;
use crate::error::BuildError;
use crate::expression::fields::{self, cookie, decoded};
use crate::expression::{self, Asked, Moment};

/// A key that is ready to be read from requests.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Key {
    /// The client's address.
    ClientIp,
    /// The leading bits of the client's address that identify a client.
    Client(ClientPrefix),
    /// The path of the request in its normal form.
    Path,
    /// The name of the route.
    Route,
    /// The value of a header; all values, if there are several fields of this name.
    Header(HeaderName),
    /// The value of a cookie.
    Cookie(Box<[u8]>),
    /// The value of a query argument, percent-decoded; the first one, if there are several.
    Query(Box<[u8]>),
    /// The result of an expression.
    Made(expression::Value),
}

/// The value of a key in one request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Value<'s> {
    /// Bytes of the request.
    Plain(&'s [u8]),
    /// A query argument with encoded characters.
    Encoded(&'s str),
    /// The octets of an address, and their number.
    Octets([u8; 16], usize),
    /// A computed text.
    Made(Vec<u8>),
}

impl Key {
    /// Prepares the key that is `written`.
    ///
    /// # Errors
    /// The name of a header or cookie, or the expression, is invalid. The path is that of the choice.
    pub fn build(written: &config::Key) -> Result<Key, BuildError> {
        if !matches!(written, config::Key::Cel(_)) {
            written.check()?;
        }
        Ok(match written {
            config::Key::ClientIp => Key::ClientIp,
            config::Key::Path => Key::Path,
            config::Key::Route => Key::Route,
            config::Key::Header(name) => {
                let name = HeaderName::try_from(name);
                Key::Header(name.map_err(|error| BuildError::new("header", error.to_string()))?)
            }
            config::Key::Cookie(name) => Key::Cookie(name.as_bytes().into()),
            config::Key::Query(name) => Key::Query(name.as_bytes().into()),
            config::Key::Cel(written) => {
                let made = expression::Value::build(written, Moment::Request);
                Key::Made(made.map_err(|error| error.under("cel"))?)
            }
        })
    }

    /// The same key for a limit per client: a client may have several addresses.
    pub fn for_limits(self, prefix: ClientPrefix) -> Key {
        if self == Key::ClientIp { Key::Client(prefix) } else { self }
    }

    /// The value of this key; `None` if the request has none, or an empty one. Several fields of one name are one
    /// list (RFC 9110 §5.3); of several cookies or arguments of one name, the first counts. This is not enough for
    /// limits; see [`Key::each`].
    pub fn of<'s>(&'s self, asked: &Asked<'s>) -> Option<Value<'s>> {
        let value = match self {
            Key::ClientIp => Value::from(asked.facts.client?),
            Key::Client(prefix) => Value::from(prefix.client(asked.facts.client?)),
            Key::Path => Value::Plain(asked.target.path().as_bytes()),
            Key::Route => Value::Plain(asked.facts.route.as_bytes()),
            Key::Header(name) => combined(asked.headers, name)?,
            Key::Cookie(name) => Value::Plain(cookie(asked.headers, name)?),
            Key::Query(name) => argument(fields::argument(asked.target.query()?, name)?),
            Key::Made(made) => match made.of(asked) {
                Cow::Borrowed(text) => Value::Plain(text),
                Cow::Owned(text) => Value::Made(text),
            },
        };
        (!value.is_empty()).then_some(value)
    }

    /// All values of this key in a request: there may be several headers, cookies or arguments of the name, and
    /// Forebay does not know which of them an endpoint uses. A limit must count all of them, since otherwise a client
    /// could hide the relevant value behind another one.
    pub fn each<'s>(&'s self, asked: &Asked<'s>) -> impl Iterator<Item = Value<'s>> {
        let Asked { headers, target, .. } = *asked;
        let (mut header, mut cookie, mut query, mut other) = (None, None, None, None);
        match self {
            Key::Header(name) => {
                header = Some(headers.get_all(name).iter().map(|value| Value::Plain(value.as_bytes())))
            }
            Key::Cookie(name) => cookie = Some(fields::cookies(headers, name).map(Value::Plain)),
            Key::Query(name) => query = target.query().map(|query| fields::arguments(query, name).map(argument)),
            _ => other = self.of(asked),
        }
        let several = header.into_iter().flatten().chain(cookie.into_iter().flatten());
        several.chain(query.into_iter().flatten()).chain(other).filter(|value| !value.is_empty())
    }
}

/// The values of all fields of this name.
fn combined<'s>(headers: &'s HeaderMap, name: &HeaderName) -> Option<Value<'s>> {
    let mut values = headers.get_all(name).iter();
    let first = values.next()?.as_bytes();
    let Some(second) = values.next() else { return Some(Value::Plain(first)) };
    let mut all = first.to_vec();
    for value in std::iter::once(second).chain(values) {
        all.extend_from_slice(b", ");
        all.extend_from_slice(value.as_bytes());
    }
    Some(Value::Made(all))
}

impl Value<'_> {
    /// The bytes; copied only if they are encoded.
    pub fn bytes(&self) -> Cow<'_, [u8]> {
        match self {
            Value::Plain(bytes) => Cow::Borrowed(bytes),
            Value::Encoded(text) => Cow::Owned(decoded(text).collect()),
            Value::Octets(octets, number) => Cow::Borrowed(&octets[..*number]),
            Value::Made(text) => Cow::Borrowed(text),
        }
    }

    /// The XXH3 of the bytes: the same on every node and after every start.
    pub fn hash(&self) -> u64 {
        let Value::Encoded(text) = self else { return xxh3_64(&self.bytes()) };
        let (mut state, mut bytes, mut buffer) = (Xxh3::new(), decoded(text), [0; 64]);
        loop {
            let filled = buffer.iter_mut().zip(&mut bytes).map(|(room, byte)| *room = byte).count();
            state.update(&buffer[..filled]);
            if filled < buffer.len() {
                return state.digest();
            }
        }
    }

    fn is_empty(&self) -> bool {
        match self {
            Value::Plain(bytes) => bytes.is_empty(),
            Value::Encoded(text) => text.is_empty(),
            Value::Octets(_, number) => *number == 0,
            Value::Made(text) => text.is_empty(),
        }
    }
}

/// An IPv4 address in IPv6 form (`::ffff:192.0.2.1`) is the same client.
impl From<IpAddr> for Value<'_> {
    fn from(client: IpAddr) -> Self {
        let mut octets = [0; 16];
        let number = match client.to_canonical() {
            IpAddr::V4(v4) => {
                octets[..4].copy_from_slice(&v4.octets());
                4
            }
            IpAddr::V6(v6) => {
                octets = v6.octets();
                16
            }
        };
        Value::Octets(octets, number)
    }
}

/// Keys, of which the first that a request has is used.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Keys(Box<[Key]>);

impl Keys {
    /// Prepares the keys that are `written`.
    ///
    /// # Errors
    /// The first invalid key; the path begins with its index.
    pub fn build(written: &[config::Key]) -> Result<Keys, BuildError> {
        let key = |(index, key)| Key::build(key).map_err(|error| error.under(&format!("[{index}]")));
        written.iter().enumerate().map(key).collect::<Result<_, _>>().map(Keys)
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The hash of the first of these keys that a request has; `None` if it has none of them.
    pub fn hash(&self, asked: &Asked<'_>) -> Option<u64> {
        self.0.iter().find_map(|key| key.of(asked)).map(|value| value.hash())
    }
}

/// The value of an argument as it was sent.
fn argument(value: &str) -> Value<'_> {
    let encoded = value.bytes().any(|byte| matches!(byte, b'%' | b'+'));
    if encoded { Value::Encoded(value) } else { Value::Plain(value.as_bytes()) }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::rehearsal::request;
    use super::*;
    use crate::expression::Facts;

    /// The key that `written` reads from a request.
    fn key(written: &str, client: Option<&str>, target: &str, headers: &[(&'static str, &str)]) -> String {
        let value = serde_yaml::from_str(written).unwrap();
        let key = serde_yaml::with::singleton_map_recursive::deserialize::<_, serde_yaml::Value>(value).unwrap();
        let request = request(target, headers);
        let client = client.map(|client| client.parse().unwrap());
        let facts = Facts { client, ..Facts::of("shop", "/") };
        let key = Key::build(&key).unwrap();
        let value = key.of(&facts.asked(&request));
        value.map(|value| String::from_utf8_lossy(&value.bytes()).into_owned()).unwrap_or_default()
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
        assert_eq!(key("header: X-Key", None, "/", &[("x-key", "one")]), "one");
        assert_eq!(key("header: X-Key", None, "/", &[("x-key", "one"), ("x-key", "two")]), "one, two");
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
    fn a_key_may_be_made_by_an_expression() {
        let made = "cel: 'request.headers[\"x-key\"].orValue(string(source.address))'";
        assert_eq!(key(made, Some("192.0.2.1"), "/", &[("x-key", "one")]), "one");
        assert_eq!(key(made, Some("192.0.2.1"), "/", &[]), "192.0.2.1");
        assert_eq!(key(made, None, "/", &[]), "");
        let wrong = Key::build(&config::Key::Cel("request.pth".into())).unwrap_err();
        let told = "cel (at 1:1 of the expression): nothing is called `request.pth`: did you mean `request.path`?";
        assert_eq!(wrong.to_string(), told);
    }

    #[test]
    fn half_an_escape_stands_for_itself() {
        assert_eq!(query("q", "/?q=100%"), "100%");
        assert_eq!(query("q", "/?q=%4"), "%4");
        assert_eq!(query("q", "/?q=%zz%+1"), "%zz% 1");
    }

    #[test]
    fn only_a_query_argument_that_was_encoded_is_decoded() {
        assert_eq!(argument("plain"), Value::Plain(b"plain"));
        assert_eq!(argument("a%20b"), Value::Encoded("a%20b"));
    }

    #[test]
    fn a_limit_by_a_key_sees_all_its_values() {
        let each = |written: &config::Key, target: &str, headers: &[(&'static str, &str)]| {
            let (key, request) = (Key::build(written).unwrap(), request(target, headers));
            let facts = Facts::of("shop", "/");
            let asked = facts.asked(&request);
            let texts = key.each(&asked).map(|value| String::from_utf8_lossy(&value.bytes()).into_owned());
            texts.collect::<Vec<_>>()
        };
        let fields = [("x-key", "one"), ("x-key", "two"), ("x-key", "")];
        assert_eq!(each(&config::Key::Header("X-Key".into()), "/", &fields), ["one", "two"]);
        let cookies = [("cookie", "sid=1; a=b"), ("cookie", "sid=2; sid=3")];
        assert_eq!(each(&config::Key::Cookie("sid".into()), "/", &cookies), ["1", "2", "3"]);
        assert_eq!(each(&config::Key::Query("q".into()), "/?q=1&q=a%20b&%71=3&q&r=4", &[]), ["1", "a b", "3"]);
        assert_eq!(each(&config::Key::Path, "/a?q=1", &[]), ["/a"]);
        assert!(each(&config::Key::Header("X-Other".into()), "/", &fields).is_empty());
        assert!(each(&config::Key::ClientIp, "/", &fields).is_empty());
    }

    #[test]
    fn the_first_key_that_an_exchange_has_is_hashed() {
        let keys = Keys::build(&[config::Key::Header("X-User".into()), config::Key::ClientIp]).unwrap();
        let hash = |client: Option<&str>, headers: &[(&'static str, &str)]| {
            let request = request("/", headers);
            let client = client.map(|client| client.parse().unwrap());
            let facts = Facts { client, ..Facts::of("shop", "/") };
            keys.hash(&facts.asked(&request))
        };
        assert_eq!(hash(Some("192.0.2.1"), &[("x-user", "ann")]), Some(xxh3_64(b"ann")));
        assert_eq!(hash(Some("192.0.2.1"), &[]), Some(xxh3_64(&[192, 0, 2, 1])));
        assert_eq!(hash(Some("192.0.2.1"), &[("x-user", "")]), Some(xxh3_64(&[192, 0, 2, 1])));
        assert_eq!(hash(None, &[]), None);
    }

    #[test]
    fn what_cannot_be_a_key_is_told_with_its_number() {
        let error = Keys::build(&[config::Key::Path, config::Key::Header("a b".into())]).unwrap_err();
        assert_eq!(error.to_string(), "[1].header: `a b` is not a valid header name");
    }

    proptest! {
        #[test]
        fn a_value_has_one_hash_however_it_is_encoded(value in ".{0,200}") {
            let encoded: String = value.bytes().map(|byte| format!("%{byte:02x}")).collect();
            prop_assert_eq!(Value::Encoded(&encoded).hash(), xxh3_64(value.as_bytes()));
            prop_assert_eq!(Value::Plain(value.as_bytes()).hash(), xxh3_64(value.as_bytes()));
        }
    }
}
