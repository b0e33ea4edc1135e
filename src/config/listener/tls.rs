//! `listeners[].tls`, `proxy_protocol` and what else stands between a client's socket and HTTP.

use std::borrow::Cow;

use ipnet::IpNet;
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::de::{self, Deserializer, Visitor};
use serde::{Deserialize, Serialize};

use crate::config::address;
use crate::config::units::{Count, Time};

/// TLS towards clients. Only `certificates` must be written.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Tls {
    /// The certificates. A client gets one that is made out to the name it asks for, with a key that it can verify:
    /// ECDSA before RSA where a name has both. A name that is written out goes before a wildcard.
    pub certificates: Vec<Certificate>,
    /// The name whose certificate a client gets that asks for none or for one that is not here. Without it such a
    /// client is refused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub default: Option<String>,
    /// The oldest version that is spoken: `"1.2"` or `"1.3"`.
    #[serde(default)]
    pub min_version: Version,
    /// The cipher suites of TLS 1.2, the preferred ones first, by the names that OpenSSL gives them; by default those
    /// of Mozilla's intermediate profile. Those of TLS 1.3 are fixed.
    #[serde(default = "Tls::default_ciphers")]
    pub ciphers: Vec<String>,
    /// The groups for the key exchange, the preferred ones first.
    #[serde(default = "Tls::default_groups")]
    pub groups: Vec<Group>,
    /// With what clients resume their sessions.
    #[serde(default)]
    pub tickets: Tickets,
    /// How long a client may take from its first byte to the end of the handshake, and to its first byte.
    #[serde(default = "Tls::default_handshake_timeout")]
    pub handshake_timeout: Time,
    /// Threads for handshakes with RSA keys, each of which takes a worker about a millisecond; `0`: workers do it
    /// themselves.
    #[serde(default = "Tls::default_handshake_threads")]
    pub handshake_threads: Count,
    /// How often the files are looked at, besides when the system tells that one has changed.
    #[serde(default = "Tls::default_refresh")]
    pub refresh: Time,
    /// For how long browsers are to come by HTTPS alone (`Strict-Transport-Security`): a time, or more than that.
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

/// A certificate with its key, and whom it is shown to: files (`cert` and `key`), or one that Forebay gets (`acme`).
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Certificate {
    /// A file with the certificate and those between it and its authority, in PEM.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cert: Option<String>,
    /// A file with its private key, in PEM and without a password.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key: Option<String>,
    /// The issuer that Forebay gets it from: one of `acme`, `letsencrypt` or `letsencrypt-staging`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub acme: Option<String>,
    /// The names that it is used for, such as `shop.example.com` or `*.example.com`; by default those that are in it.
    /// An issuer is asked for these, none of them a wildcard; `auto`: for the hosts of all routes that no other
    /// certificate is for.
    #[serde(default, skip_serializing_if = "CertificateNames::is_empty")]
    pub names: CertificateNames,
    /// A file with the answer of its authority that it is not revoked (OCSP), in DER, which is shown with it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub staple: Option<String>,
    /// Whether clients show certificates, too.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub client: Option<ClientCertificates>,
}

/// The names of a certificate.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CertificateNames {
    /// These.
    These(Vec<String>),
    /// The hosts of all routes.
    Auto,
}

impl CertificateNames {
    /// Whether none are written.
    pub fn is_empty(&self) -> bool {
        self.these().is_empty() && *self != CertificateNames::Auto
    }

    /// Those that are written.
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

/// The certificates of clients.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ClientCertificates {
    /// Whether a client must have one.
    #[serde(default)]
    pub mode: ClientMode,
    /// A file with the certificates of the authorities that are trusted, in PEM.
    pub ca: String,
    /// A file with the lists of what they have revoked, in PEM: one of each authority that signs certificates of
    /// clients.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub crl: Option<String>,
}

/// Whether a client must show a certificate.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ClientMode {
    /// It must.
    #[default]
    Required,
    /// It may; one that it shows must be valid.
    Optional,
}

/// With what clients resume their sessions: tickets (RFC 5077, RFC 8446 §4.6.1). Nothing is kept of sessions.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Tickets {
    /// Whether there are any.
    pub enabled: bool,
    /// How long a key makes tickets; two older keys are still known.
    pub rotate: Time,
    /// A file of 80-byte keys that several Forebays share, as nginx has them: the first makes tickets, all are known.
    /// Forebay only reads it; the program that writes it rotates the keys.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub keys_file: Option<String>,
}

impl Default for Tickets {
    fn default() -> Self {
        Tickets { enabled: true, rotate: Time::seconds(8 * 3600), keys_file: None }
    }
}

/// `Strict-Transport-Security` (RFC 6797). It is hard to take back: a browser keeps to it for as long as it was told.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Hsts {
    /// For how long.
    pub max_age: Time,
    /// For all names below those of the certificates, too.
    pub include_subdomains: bool,
    /// Whether the name may go into the lists that browsers come with.
    pub preload: bool,
}

#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct HstsFull {
    /// For how long.
    max_age: Time,
    /// For all names below those of the certificates, too.
    #[serde(default)]
    include_subdomains: bool,
    /// Whether the name may go into the lists that browsers come with.
    #[serde(default)]
    preload: bool,
}

impl Hsts {
    /// As it stands in the header.
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

/// A listener in clear text that sends all its clients to HTTPS: `true`, or whereto and how.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct RedirectHttps {
    /// The port of HTTPS.
    pub port: u16,
    /// 301, 302, 307 or 308.
    pub status: u16,
}

#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
struct RedirectWritten {
    /// The port of HTTPS.
    port: u16,
    /// 301, 302, 307 or 308. With the last two, a client repeats its request with its method and its body.
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
        f.write_str("`\"1.2\"` or `\"1.3\"`; older versions are broken, and BoringSSL is told not to speak them")
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<Version, E> {
        let known = [Version::Tls12, Version::Tls13].into_iter().find(|version| version.name() == text);
        known.ok_or_else(|| E::invalid_value(de::Unexpected::Str(text), &self))
    }

    /// YAML takes what is written without quotation marks for a number.
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

/// A group for the key exchange.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
pub enum Group {
    /// X25519 and ML-KEM-768 together: what was recorded today cannot be read by a quantum computer later. TLS 1.3
    /// only.
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
    /// As BoringSSL calls it.
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

/// The PROXY protocol, version 1 or 2, at the beginning of connections: which client a proxy in front of Forebay speaks
/// for.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct ProxyProtocol {
    /// The proxies that speak it. Every connection of theirs must begin with it, and no other may; on a unix socket
    /// every connection must.
    #[serde(deserialize_with = "address::networks")]
    #[schemars(with = "Vec<address::Network>")]
    pub from: Vec<IpNet>,
    /// How long it may take, from the acceptance of the connection on.
    pub timeout: Time,
}

impl Default for ProxyProtocol {
    fn default() -> Self {
        ProxyProtocol { from: Vec::new(), timeout: Time::seconds(5) }
    }
}

/// Names of TLS that are passed through: their connections are not decrypted here.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Passthrough {
    /// The names that clients ask for (SNI), such as `db.example.com` or `*.db.example.com`.
    pub sni: Vec<String>,
    /// The upstream whose endpoints get the bytes.
    pub upstream: String,
    /// How long neither side may say anything.
    #[serde(default = "default_idle")]
    pub idle: Time,
}

/// Where every connection of a listener is passed on to.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Tcp {
    /// The upstream whose endpoints get the bytes.
    pub upstream: String,
    /// How long neither side may say anything.
    #[serde(default = "default_idle")]
    pub idle: Time,
}

fn default_idle() -> Time {
    Time::seconds(600)
}
