//! Addresses and networks. Parsing checks the form only; nothing is resolved here.

use std::borrow::Cow;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::Path;
use std::str::FromStr;

use ipnet::IpNet;
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::de::{self, Deserialize, Deserializer};
use serde::{Serialize, Serializer};

use super::units::Scalar;

/// Longest path of a unix socket in bytes: `sun_path` of unix(7) without its final NUL.
const UNIX_PATH_BYTES_MAX: usize = 107;

/// `host:port`, `[v6]:port` or `unix:/path`, as written; the form is checked, the host is not resolved.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(transparent)]
pub struct Address(pub String);

/// The parts of an [`Address`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target<'a> {
    /// A host name or an IP address (IPv6 without brackets), and a port. Port 0 means any free port.
    Tcp(&'a str, u16),
    /// A unix socket.
    Unix(&'a Path),
}

impl Address {
    /// The path, if this is a unix socket.
    pub fn unix_path(&self) -> Option<&str> {
        self.0.strip_prefix("unix:")
    }

    /// Its port; `None` for a unix socket.
    pub fn port(&self) -> Option<u16> {
        match self.target() {
            Ok(Target::Tcp(_, port)) => Some(port),
            _ => None,
        }
    }

    /// Splits the address.
    ///
    /// # Errors
    ///
    /// What is wrong with the form. Addresses from a configuration were checked and give no error.
    pub fn target(&self) -> Result<Target<'_>, String> {
        let text = self.0.as_str();
        let wrong = |why: &str| Err(format!("`{text}` is not an address: {why}"));
        if let Some(path) = self.unix_path() {
            return match path {
                _ if !path.starts_with('/') => {
                    wrong("the path of a unix socket must be absolute, such as `unix:/run/app.sock`")
                }
                _ if path.len() > UNIX_PATH_BYTES_MAX => wrong("the path of a unix socket has at most 107 bytes"),
                _ if path.contains('\0') => {
                    wrong("the path of a unix socket holds a character that no file name may have")
                }
                _ => Ok(Target::Unix(Path::new(path))),
            };
        }
        if text.contains('/') {
            return wrong("write the host and the port only, without scheme and path");
        }
        let Some((host, port)) = text.rsplit_once(':') else {
            return wrong("write `host:port`, `[v6]:port` or `unix:/path`");
        };
        let (host, v6) = match host.strip_prefix('[').and_then(|host| host.strip_suffix(']')) {
            Some(inside) => (inside, inside.parse::<Ipv6Addr>().is_ok()),
            None => (host, false),
        };
        if host.is_empty() {
            return wrong("the host is missing; `0.0.0.0` or `[::]` means every address of the machine");
        }
        if !v6 && host.contains([':', '[', ']']) {
            return wrong("an IPv6 address needs brackets, such as `[::1]:8080`");
        }
        if !v6 && !host.split('.').all(is_label) {
            return wrong("the host must be a name or an IP address");
        }
        match port.parse() {
            // `parse` would take `+80` as well.
            Ok(number) if port.len() <= 5 && !port.starts_with('+') => Ok(Target::Tcp(host, number)),
            _ => wrong("the port must be a number from 0 to 65535"),
        }
    }
}

/// Whether this is a valid label of a host name.
pub(super) fn is_label(label: &str) -> bool {
    (1..=63).contains(&label.len()) && label.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_')
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for Address {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let address = Address(text.to_owned());
        address.target()?;
        Ok(address)
    }
}

impl<'de> Deserialize<'de> for Address {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(Scalar("an address such as `127.0.0.1:8080`"))?.parse().map_err(de::Error::custom)
    }
}

impl JsonSchema for Address {
    fn schema_name() -> Cow<'static, str> {
        "Address".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "type": "string",
            "pattern": r"^(unix:/.+|.+:[0-9]{1,5})$|\$\{",
            "description": "`host:port`, `[v6]:port` or `unix:/path`",
            "examples": ["127.0.0.1:8080", "[::1]:8080", "unix:/run/forebay.sock"],
        })
    }
}

/// An IP address or a network: `10.1.2.3`, `10.0.0.0/8`, `fd00::/8`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Network(pub IpNet);

impl FromStr for Network {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let net = text.parse::<IpNet>().or_else(|_| text.parse::<IpAddr>().map(IpNet::from));
        net.map(Network).map_err(|_| {
            format!("`{text}` is not a network: write an IP address, alone or with the length of its prefix, such as `10.0.0.0/8`")
        })
    }
}

impl<'de> Deserialize<'de> for Network {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(Scalar("a network such as `10.0.0.0/8`"))?.parse().map_err(de::Error::custom)
    }
}

impl Serialize for Network {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&self.0)
    }
}

impl JsonSchema for Network {
    fn schema_name() -> Cow<'static, str> {
        "Network".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "type": "string",
            "pattern": r"^[0-9a-fA-F.:]+(/[0-9]{1,3})?$|\$\{",
            "description": "an IP address or a network",
            "examples": ["10.0.0.0/8", "fd00::/8", "127.0.0.1"],
        })
    }
}

/// Number of leading bits that identify a client, wherever a limit applies per client.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ClientPrefix {
    /// Of an IPv4 address.
    pub v4: Ipv4Prefix,
    /// Of an IPv6 address.
    pub v6: Ipv6Prefix,
}

impl ClientPrefix {
    /// The client of this address, as the first address of its network. An IPv4-mapped address (`::ffff:192.0.2.1`)
    /// counts as IPv4.
    pub fn client(self, address: IpAddr) -> IpAddr {
        match address.to_canonical() {
            IpAddr::V4(v4) => {
                let host_bits = 32 - u32::from(self.v4.0);
                IpAddr::V4(Ipv4Addr::from_bits(v4.to_bits() >> host_bits << host_bits))
            }
            IpAddr::V6(v6) => {
                let host_bits = 128 - u32::from(self.v6.0);
                IpAddr::V6(Ipv6Addr::from_bits(v6.to_bits() >> host_bits << host_bits))
            }
        }
    }

    /// The bits of an IPv4 address and of an IPv6 address that tell clients apart.
    pub fn bits(self) -> [u8; 2] {
        [self.v4.0, self.v6.0]
    }
}

macro_rules! prefix {
    ($(#[$about:meta])* $name:ident, $version:literal, $default:literal of $bits:literal) => {
        $(#[$about])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub struct $name(u8);

        impl Default for $name {
            fn default() -> Self {
                $name($default)
            }
        }

        impl FromStr for $name {
            type Err = String;

            fn from_str(text: &str) -> Result<Self, String> {
                let bits = text.strip_prefix('/').unwrap_or(text).parse().ok().filter(|bits| (1..=$bits).contains(bits));
                bits.map($name).ok_or_else(|| {
                    let (version, most, default) = ($version, $bits, $default);
                    format!(
                        "`{text}` is not the length of an {version} prefix: write a number from 1 to {most}, such as `{default}`"
                    )
                })
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                let expected = Scalar(concat!("the length of a prefix such as `", $default, "`"));
                deserializer.deserialize_any(expected)?.parse().map_err(de::Error::custom)
            }
        }

        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                self.0.serialize(serializer)
            }
        }

        impl JsonSchema for $name {
            fn schema_name() -> Cow<'static, str> {
                stringify!($name).into()
            }

            fn json_schema(_: &mut SchemaGenerator) -> Schema {
                json_schema!({
                    "type": "integer",
                    "minimum": 1,
                    "maximum": $bits,
                    "description": concat!("how many leading bits of an ", $version, " address tell clients apart"),
                })
            }
        }
    };
}

prefix! {
    /// From 1 to 32 bits of an IPv4 address; 32 by default: each address is a client. Use fewer where a provider
    /// gives each customer a network, or where one client rents many addresses.
    Ipv4Prefix, "IPv4", 32 of 32
}

prefix! {
    /// From 1 to 128 bits of an IPv6 address; 64 by default. A client usually controls a whole /64 (RFC 4291
    /// §2.5.4, RFC 6177 §2) and could evade limits on single addresses.
    Ipv6Prefix, "IPv6", 64 of 128
}

/// Deserializes networks for fields of type `IpNet`.
pub(super) fn networks<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<IpNet>, D::Error> {
    Ok(Vec::<Network>::deserialize(deserializer)?.into_iter().map(|Network(net)| net).collect())
}

/// Proxies in front of Forebay: a network, or `unix`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Proxy {
    /// Peers with an address in this network.
    Network(IpNet),
    /// Peers on a unix socket.
    Unix,
}

impl FromStr for Proxy {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "unix" {
            return Ok(Proxy::Unix);
        }
        let network = text.parse().map(|Network(network)| Proxy::Network(network));
        network.map_err(|why: String| format!("{why}, or `unix`"))
    }
}

impl fmt::Display for Proxy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Proxy::Network(net) => net.fmt(f),
            Proxy::Unix => f.write_str("unix"),
        }
    }
}

impl<'de> Deserialize<'de> for Proxy {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(Scalar("a network such as `10.0.0.0/8`"))?.parse().map_err(de::Error::custom)
    }
}

impl Serialize for Proxy {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl JsonSchema for Proxy {
    fn schema_name() -> Cow<'static, str> {
        "Proxy".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "type": "string",
            "pattern": r"^[0-9a-fA-F.:]+(/[0-9]{1,3})?$|^unix$|\$\{",
            "description": "an IP address, a network, or `unix`",
            "examples": ["10.0.0.0/8", "fd00::/8", "127.0.0.1", "unix"],
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn why(text: &str) -> String {
        text.parse::<Address>().unwrap_err()
    }

    #[test]
    fn hosts_ports_and_sockets_are_told_apart() {
        let target = |text: &'static str| Box::leak(Box::new(Address(text.to_owned()))).target();
        assert_eq!(target("127.0.0.1:0"), Ok(Target::Tcp("127.0.0.1", 0)));
        assert_eq!(target("[::1]:8080"), Ok(Target::Tcp("::1", 8080)));
        assert_eq!(target("my_app.svc.local:80"), Ok(Target::Tcp("my_app.svc.local", 80)));
        assert_eq!(target("unix:/run/app.sock"), Ok(Target::Unix(Path::new("/run/app.sock"))));
    }

    #[test]
    fn a_client_is_an_ipv4_address_or_an_ipv6_network() {
        let client = |prefix: &str, address: &str| {
            let prefix = ClientPrefix { v6: prefix.parse().unwrap(), ..ClientPrefix::default() };
            prefix.client(address.parse().unwrap()).to_string()
        };
        for address in ["192.0.2.1", "::ffff:192.0.2.1"] {
            assert_eq!(client("64", address), "192.0.2.1");
            assert_eq!(client("1", address), "192.0.2.1");
        }
        for (prefix, network) in [("1", "128.0.0.0"), ("/24", "192.0.2.0"), ("31", "192.0.2.2"), ("32", "192.0.2.3")] {
            let prefix = ClientPrefix { v4: prefix.parse().unwrap(), ..ClientPrefix::default() };
            for address in ["192.0.2.3", "::ffff:192.0.2.3"] {
                assert_eq!(prefix.client(address.parse().unwrap()).to_string(), network);
            }
            assert_eq!(prefix.client("2001:db8::1".parse().unwrap()).to_string(), "2001:db8::");
        }
        assert_eq!(Ipv4Prefix::default(), "32".parse().unwrap());
        for prefix in ["0", "33", "64", "-1", ""] {
            assert!(prefix.parse::<Ipv4Prefix>().unwrap_err().contains("from 1 to 32"), "{prefix}");
        }
        for (prefix, network) in [
            ("1", "::"),
            ("48", "2001:db8:1::"),
            ("56", "2001:db8:1:200::"),
            ("/64", "2001:db8:1:2ff::"),
            ("128", "2001:db8:1:2ff:f::1"),
        ] {
            assert_eq!(client(prefix, "2001:db8:1:2ff:f::1"), network);
        }
        assert_eq!(Ipv6Prefix::default(), "64".parse().unwrap());
        for prefix in ["0", "129", "-1", "64.5", "/", ""] {
            assert!(prefix.parse::<Ipv6Prefix>().unwrap_err().contains("from 1 to 128"), "{prefix}");
        }
    }

    #[test]
    fn what_is_no_address_says_why() {
        assert!(why("localhost").contains("write `host:port`"));
        assert!(why(":8080").contains("the host is missing"));
        assert!(why("::1:8080").contains("needs brackets"));
        assert!(why("[::1:8080").contains("needs brackets"));
        assert!(why("http://a:80").contains("without scheme"));
        assert!(why("a b:80").contains("a name or an IP address"));
        for port in ["a:65536", "a:", "a:http", "a:-1", "a:+80", "a:000080"] {
            assert!(why(port).contains("from 0 to 65535"), "{port}");
        }
        assert!(why("unix:app.sock").contains("absolute"));
        assert!(why(&format!("unix:/{}", "a".repeat(107))).contains("107 bytes"));
    }

    #[test]
    fn a_network_may_be_a_single_address() {
        assert_eq!("10.0.0.0/8".parse(), Ok(Proxy::Network("10.0.0.0/8".parse().unwrap())));
        assert_eq!("::1".parse(), Ok(Proxy::Network("::1/128".parse().unwrap())));
        assert_eq!("unix".parse(), Ok(Proxy::Unix));
        assert!("10.0.0.0/99".parse::<Proxy>().unwrap_err().contains("`10.0.0.0/99` is not a network"));
    }
}
