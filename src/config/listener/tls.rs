//! `listeners[].tls`, `proxy_protocol` and other settings between the socket and HTTP.

use std::borrow::Cow;

use ipnet::IpNet;
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::de::{self, Deserializer, Visitor};
use serde::{Deserialize, Serialize};

use crate::config::address;
use crate::config::units::{Count, Time};

/// TLS towards clients. Only `certificates` is required.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Tls {
    /// The certificates. Forebay chooses by the requested server name and by the signatures that the client
    /// supports: ECDSA before RSA if a name has both. An exact name has priority over a wildcard.
    pub certificates: Vec<Certificate>,
    /// The name whose certificate is used if a client sends no server name or an unknown one. Without it, such
    /// clients are refused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub default: Option<String>,
    /// The oldest TLS version allowed: `"1.2"` or `"1.3"`.
    #[serde(default)]
    pub min_version: Version,
    /// The cipher suites of TLS 1.2 by their OpenSSL names, in order of preference; by default those of Mozilla's
    /// intermediate profile. Those of TLS 1.3 are fixed.
    #[serde(default = "Tls::default_ciphers")]
    pub ciphers: Vec<String>,
    /// The key exchange groups, in order of preference.
    #[serde(default = "Tls::default_groups")]
    pub groups: Vec<Group>,
    /// Session resumption.
    #[serde(default)]
    pub tickets: Tickets,
    /// Time limit for the first byte of a client, and again from there to the end of the handshake.
    #[serde(default = "Tls::default_handshake_timeout")]
    pub handshake_timeout: Time,
    /// Threads for handshakes with RSA keys, each of which takes about a millisecond of CPU; `0`: workers do them.
    #[serde(default = "Tls::default_handshake_threads")]
    pub handshake_threads: Count,
    /// How often certificate files are checked, in addition to file system notifications.
    #[serde(default = "Tls::default_refresh")]
    pub refresh: Time,
    /// `Strict-Transport-Security`: how long browsers must use HTTPS only. A time, or a map with options.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hsts: Option<Hsts>,
}

impl Tls {
    pub(crate) fn default_ciphers() -> Vec<String> {
        [
            "ECDHE-ECDSA-AES128-GCM-SHA256",
            "ECDHE-RSA-AES128-GCM-SHA256",
            "ECDHE-ECDSA-AES256-GCM-SHA384",
            "ECDHE-RSA-AES256-GCM-SHA384",
            "ECDHE-ECDSA-CHACHA20-POLY1305",
            "ECDHE-RSA-CHACHA20-POLY1305",
        ]
        .map(str::to_owned)
        .into()
    }

    pub(crate) fn default_groups() -> Vec<Group> {
        vec![Group::X25519MlKem768, Group::X25519, Group::P256]
    }

    pub(crate) fn default_handshake_timeout() -> Time {
        Time::seconds(10)
    }

    pub(crate) fn default_handshake_threads() -> Count {
        Count(1)
    }

    pub(crate) fn default_refresh() -> Time {
        Time::seconds(30)
    }
}

/// A certificate and its names: from files (`cert` and `key`), or from an issuer (`acme`).
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Certificate {
    /// A PEM file with the certificate and its intermediate certificates.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cert: Option<String>,
    /// A PEM file with the private key, without a password.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key: Option<String>,
    /// The issuer of the certificate: one of `acme`, `letsencrypt` or `letsencrypt-staging`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub acme: Option<String>,
    /// The names that the certificate is used for, such as `shop.example.com` or `*.example.com`; by default those
    /// in the certificate. With `acme`, the names to request, without wildcards; `auto`: the hosts of all routes
    /// that no other certificate covers.
    #[serde(default, skip_serializing_if = "CertificateNames::is_empty")]
    pub names: CertificateNames,
    /// A DER file with an OCSP response, which is stapled to the handshake.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub staple: Option<String>,
    /// Client certificates (mutual TLS).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub client: Option<ClientCertificates>,
}

/// The names of a certificate.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CertificateNames {
    /// The names that are written.
    These(Vec<String>),
    /// The hosts of all routes.
    Auto,
}

impl CertificateNames {
    /// Whether no names are written.
    pub fn is_empty(&self) -> bool {
        self.these().is_empty() && *self != CertificateNames::Auto
    }

    /// The names that are written.
    pub fn these(&self) -> &[String] {
        match self {
            CertificateNames::These(names) => names,
            CertificateNames::Auto => &[],
        }
    }
}

impl Default for CertificateNames {
    fn default() -> Self {
        CertificateNames::These(Vec::new())
    }
}

impl Serialize for CertificateNames {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            CertificateNames::These(names) => names.serialize(serializer),
            CertificateNames::Auto => serializer.serialize_str("auto"),
        }
    }
}

impl<'de> Deserialize<'de> for CertificateNames {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(CertificateNamesVisitor)
    }
}

struct CertificateNamesVisitor;

impl<'de> Visitor<'de> for CertificateNamesVisitor {
    type Value = CertificateNames;

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("a list of names such as `[shop.example.com]`, or `auto`")
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<CertificateNames, E> {
        match text {
            "auto" => Ok(CertificateNames::Auto),
            other => Err(E::invalid_value(de::Unexpected::Str(other), &self)),
        }
    }

    fn visit_seq<A: de::SeqAccess<'de>>(self, list: A) -> Result<CertificateNames, A::Error> {
        Vec::deserialize(de::value::SeqAccessDeserializer::new(list)).map(CertificateNames::These)
    }
}

impl JsonSchema for CertificateNames {
    fn schema_name() -> Cow<'static, str> {
        "CertificateNames".into()
    }

    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        let names = generator.subschema_for::<Vec<String>>();
        json_schema!({
            "description": "a list of names, or `auto`: the hosts of all routes",
            "anyOf": [names, { "const": "auto" }],
        })
    }
}

/// Client certificates (mutual TLS).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ClientCertificates {
    /// Whether a client certificate is required.
    #[serde(default)]
    pub mode: ClientMode,
    /// A PEM file with the trusted certificate authorities.
    pub ca: String,
    /// A PEM file with revocation lists (CRLs), one for each authority that signs client certificates.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub crl: Option<String>,
}

/// Whether a client certificate is required.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ClientMode {
    /// The client must present one.
    #[default]
    Required,
    /// The client may present one; it must be valid.
    Optional,
}

/// Session resumption with tickets (RFC 5077, RFC 8446 §4.6.1). The server keeps no session state.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Tickets {
    /// Enables tickets.
    pub enabled: bool,
    /// How long a key encrypts new tickets; the two keys before it still decrypt.
    pub rotate: Time,
    /// A file of 80-byte keys that several instances share, in nginx's format: the first key encrypts, all keys
    /// decrypt. Forebay only reads the file; the program that writes it rotates the keys.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub keys_file: Option<String>,
}

impl Default for Tickets {
    fn default() -> Self {
        Tickets { enabled: true, rotate: Time::seconds(8 * 3600), keys_file: None }
    }
}

/// `Strict-Transport-Security` (RFC 6797). It is hard to take back: a browser obeys it until `max_age` has passed.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Hsts {
    /// How long browsers must use HTTPS only.
    pub max_age: Time,
    /// Includes all subdomains.
    pub include_subdomains: bool,
    /// Allows browsers' preload lists to include the name.
    pub preload: bool,
}

#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct HstsFull {
    /// How long browsers must use HTTPS only.
    max_age: Time,
    /// Includes all subdomains.
    #[serde(default)]
    include_subdomains: bool,
    /// Allows browsers' preload lists to include the name.
    #[serde(default)]
    preload: bool,
}

impl Hsts {
    /// The value of the header field.
    pub fn value(&self) -> String {
        let mut value = format!("max-age={}", self.max_age.0.as_secs());
        if self.include_subdomains {
            value += "; includeSubDomains";
        }
        if self.preload {
            value += "; preload";
        }
        value
    }
}

impl<'de> Deserialize<'de> for Hsts {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(HstsVisitor)
    }
}

struct HstsVisitor;

impl<'de> Visitor<'de> for HstsVisitor {
    type Value = Hsts;

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("a time such as `1y`, or `{ max_age: 1y, include_subdomains: true }`")
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<Hsts, E> {
        let max_age = text.parse().map_err(E::custom)?;
        Ok(Hsts { max_age, include_subdomains: false, preload: false })
    }

    fn visit_map<A: de::MapAccess<'de>>(self, map: A) -> Result<Hsts, A::Error> {
        let full = HstsFull::deserialize(de::value::MapAccessDeserializer::new(map))?;
        let HstsFull { max_age, include_subdomains, preload } = full;
        Ok(Hsts { max_age, include_subdomains, preload })
    }
}

impl JsonSchema for Hsts {
    fn schema_name() -> Cow<'static, str> {
        "Hsts".into()
    }

    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        let (time, full) = (generator.subschema_for::<Time>(), generator.subschema_for::<HstsFull>());
        json_schema!({
            "description": "a time, or more than that",
            "anyOf": [time, full],
        })
    }
}

/// Redirects all clients to HTTPS: `true`, or a map with the port and the status.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct RedirectHttps {
    /// The HTTPS port.
    pub port: u16,
    /// 301, 302, 307 or 308.
    pub status: u16,
}

#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
struct RedirectWritten {
    /// The HTTPS port.
    port: u16,
    /// 301, 302, 307 or 308. With 307 and 308, clients repeat the request with the same method and body.
    status: u16,
}

impl Default for RedirectWritten {
    fn default() -> Self {
        RedirectWritten { port: 443, status: 308 }
    }
}

impl<'de> Deserialize<'de> for RedirectHttps {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(RedirectVisitor)
    }
}

struct RedirectVisitor;

impl<'de> Visitor<'de> for RedirectVisitor {
    type Value = RedirectHttps;

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("`true`, or `{ port: 8443, status: 301 }`; a listener that redirects nothing has no such key")
    }

    fn visit_bool<E: de::Error>(self, is: bool) -> Result<RedirectHttps, E> {
        let RedirectWritten { port, status } = RedirectWritten::default();
        if is { Ok(RedirectHttps { port, status }) } else { Err(E::invalid_value(de::Unexpected::Bool(is), &self)) }
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<RedirectHttps, E> {
        match text {
            "true" => self.visit_bool(true),
            other => Err(E::invalid_value(de::Unexpected::Str(other), &self)),
        }
    }

    fn visit_map<A: de::MapAccess<'de>>(self, map: A) -> Result<RedirectHttps, A::Error> {
        let written = RedirectWritten::deserialize(de::value::MapAccessDeserializer::new(map))?;
        Ok(RedirectHttps { port: written.port, status: written.status })
    }
}

impl JsonSchema for RedirectHttps {
    fn schema_name() -> Cow<'static, str> {
        "RedirectHttps".into()
    }

    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        let full = generator.subschema_for::<RedirectWritten>();
        json_schema!({
            "description": "`true`, or whereto and how",
            "anyOf": [{ "const": true }, full],
        })
    }
}

/// A version of TLS.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Version {
    /// TLS 1.2.
    #[default]
    Tls12,
    /// TLS 1.3.
    Tls13,
}

impl Version {
    fn name(self) -> &'static str {
        match self {
            Version::Tls12 => "1.2",
            Version::Tls13 => "1.3",
        }
    }
}

impl<'de> Deserialize<'de> for Version {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(VersionVisitor)
    }
}

struct VersionVisitor;

impl Visitor<'_> for VersionVisitor {
    type Value = Version;

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("`\"1.2\"` or `\"1.3\"`; older versions are insecure and not supported")
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<Version, E> {
        let known = [Version::Tls12, Version::Tls13].into_iter().find(|version| version.name() == text);
        known.ok_or_else(|| E::invalid_value(de::Unexpected::Str(text), &self))
    }

    /// YAML reads an unquoted version as a number.
    fn visit_f64<E: de::Error>(self, number: f64) -> Result<Version, E> {
        self.visit_str(&number.to_string())
    }
}

impl Serialize for Version {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.name())
    }
}

impl JsonSchema for Version {
    fn schema_name() -> Cow<'static, str> {
        "TlsVersion".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "description": "a version of TLS",
            "enum": ["1.2", "1.3", 1.2, 1.3],
        })
    }
}

/// A key exchange group.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
pub enum Group {
    /// X25519 combined with ML-KEM-768: protects recorded traffic against future quantum computers. TLS 1.3 only.
    #[serde(rename = "X25519MLKEM768")]
    X25519MlKem768,
    /// X25519.
    X25519,
    /// secp256r1.
    #[serde(rename = "P-256")]
    P256,
    /// secp384r1.
    #[serde(rename = "P-384")]
    P384,
    /// secp521r1.
    #[serde(rename = "P-521")]
    P521,
}

impl Group {
    /// The name in BoringSSL.
    pub fn name(self) -> &'static str {
        match self {
            Group::X25519MlKem768 => "X25519MLKEM768",
            Group::X25519 => "X25519",
            Group::P256 => "P-256",
            Group::P384 => "P-384",
            Group::P521 => "P-521",
        }
    }
}

/// The PROXY protocol, version 1 or 2, at the beginning of connections: a proxy in front of Forebay names the
/// client.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct ProxyProtocol {
    /// The proxies that use it. Their connections must begin with it, and other connections must not; on a unix
    /// socket all connections must.
    #[serde(deserialize_with = "address::networks")]
    #[schemars(with = "Vec<address::Network>")]
    pub from: Vec<IpNet>,
    /// Time limit for the header, from accepting the connection.
    pub timeout: Time,
}

impl Default for ProxyProtocol {
    fn default() -> Self {
        ProxyProtocol { from: Vec::new(), timeout: Time::seconds(5) }
    }
}

/// TLS server names whose connections are forwarded without decryption.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Passthrough {
    /// The server names (SNI), such as `db.example.com` or `*.db.example.com`.
    pub sni: Vec<String>,
    /// The upstream that the connections are forwarded to.
    pub upstream: String,
    /// Time limit without data in either direction.
    #[serde(default = "default_idle")]
    pub idle: Time,
}

/// Where the connections of a listener are forwarded to.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Tcp {
    /// The upstream that the connections are forwarded to.
    pub upstream: String,
    /// Time limit without data in either direction.
    #[serde(default = "default_idle")]
    pub idle: Time,
}

fn default_idle() -> Time {
    Time::seconds(600)
}
