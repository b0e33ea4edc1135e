//! `acme:`: authorities that issue certificates by themselves (RFC 8555), and how they are asked.

use std::fmt;
use std::net::IpAddr;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::address::is_label;
use super::units::Time;

/// The common authorities put no more names into one certificate.
pub const NAMES_MAX: usize = 100;

/// An issuer of certificates. `{}` is enough for `letsencrypt` and `letsencrypt-staging`, which may even be left out.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Issuer {
    /// The URL of its directory; the issuers `letsencrypt` and `letsencrypt-staging` have one already.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub directory: Option<String>,
    /// The address that it may write to, if something is wrong with the account or a certificate.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub email: Option<String>,
    /// Whether its terms of service are agreed to, without which most issue nothing. Naming an issuer agrees, unless
    /// this says otherwise.
    pub agree_to_terms: bool,
    /// How it is shown that the names are served here.
    pub challenge: Challenge,
    /// The directory where the account, keys and certificates are kept. Forebay makes it if there is none; several
    /// issuers may share one.
    pub store: String,
    /// A file with the certificates of the authorities that the directory's own certificate may be signed by, in PEM;
    /// by default those that the system trusts.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ca: Option<String>,
    /// The account with the issuer that this one is to belong to, where it asks for one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub eab: Option<Eab>,
    /// How long it may take.
    pub timeouts: Timeouts,
    /// When an order that failed is tried again.
    pub retry: Retry,
}

impl Default for Issuer {
    fn default() -> Self {
        Issuer {
            directory: None,
            email: None,
            agree_to_terms: true,
            challenge: Challenge::default(),
            store: "/var/lib/forebay/acme".to_owned(),
            ca: None,
            eab: None,
            timeouts: Timeouts::default(),
            retry: Retry::default(),
        }
    }
}

impl Issuer {
    /// The issuers whose directories are known, and these.
    pub const WELL_KNOWN: [(&str, &str); 2] = [
        ("letsencrypt", "https://acme-v02.api.letsencrypt.org/directory"),
        ("letsencrypt-staging", "https://acme-staging-v02.api.letsencrypt.org/directory"),
    ];

    /// The directory of the issuer of this name, if it is written or known.
    pub fn directory(&self, name: &str) -> Option<&str> {
        let known = || Issuer::WELL_KNOWN.iter().find(|(known, _)| *known == name).map(|(_, directory)| *directory);
        self.directory.as_deref().or_else(known)
    }
}

/// How an issuer makes sure that a name is served here.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Challenge {
    /// By a handshake with the name at port 443, which a listener with `tls` answers (RFC 8737).
    #[default]
    #[serde(rename = "tls_alpn_01")]
    TlsAlpn01,
    /// By a request to the name at port 80, which every listener answers before its routes (RFC 8555 §8.3).
    #[serde(rename = "http_01")]
    Http01,
}

impl Challenge {
    /// As it is written, and as the label of metrics.
    pub fn name(self) -> &'static str {
        match self {
            Challenge::TlsAlpn01 => "tls_alpn_01",
            Challenge::Http01 => "http_01",
        }
    }
}

/// An account of the issuer's own that the one of ACME is bound to (RFC 8555 §7.3.4).
#[derive(Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Eab {
    /// The identifier that the issuer gave.
    pub kid: String,
    /// The key that it gave with it, in base64url: a secret, such as `${file:/etc/forebay/eab.key}`.
    pub key: String,
}

impl Eab {
    /// The bytes of the key. `None`: it is not base64url.
    pub fn key(&self) -> Option<Vec<u8>> {
        use base64::Engine;
        use base64::prelude::BASE64_URL_SAFE_NO_PAD;
        let bytes = BASE64_URL_SAFE_NO_PAD.decode(self.key.trim_end_matches('=')).ok()?;
        (!bytes.is_empty()).then_some(bytes)
    }
}

/// Shows no key.
impl fmt::Debug for Eab {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Eab").field("kid", &self.kid).finish_non_exhaustive()
    }
}

/// How long an issuer may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Timeouts {
    /// For one request to it, from looking up its address to the last byte of its answer.
    pub request: Time,
    /// For a whole order, from the first request to the certificate.
    pub order: Time,
}

impl Default for Timeouts {
    fn default() -> Self {
        Timeouts { request: Time::seconds(30), order: Time::seconds(300) }
    }
}

/// When an order that failed is tried again: each time after twice the time, a quarter more or less.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Retry {
    /// After the first failure; an order is never begun sooner after the last one for the same certificate that failed.
    pub first: Time,
    /// At most.
    pub max: Time,
}

impl Default for Retry {
    fn default() -> Self {
        Retry { first: Time::seconds(120), max: Time::seconds(6 * 3600) }
    }
}

/// Whether an issuer can be asked for this name with the challenges that there are.
///
/// # Errors
///
/// Why not, and what would be right.
pub fn issuable(name: &str) -> Result<(), &'static str> {
    if name.starts_with("*.") || name.contains('*') {
        return Err("neither `tls_alpn_01` nor `http_01` proves a wildcard: write the names, or take a file");
    }
    if name.trim_matches(['[', ']']).parse::<IpAddr>().is_ok() {
        return Err("an address is not a name: expected one such as `www.example.com`");
    }
    if !name.is_ascii() {
        return Err("expected ASCII, such as `xn--bcher-kva.example.com`");
    }
    let name = name.strip_suffix('.').unwrap_or(name);
    // A name of DNS has labels of letters, digits and hyphens (RFC 1123 §2.1).
    let fine =
        |label: &str| is_label(label) && !label.contains('_') && !label.starts_with('-') && !label.ends_with('-');
    if name.len() > 253 || !name.split('.').all(fine) {
        return Err("expected a name such as `www.example.com`");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_directory_of_an_issuer_is_the_written_one_or_the_known_one() {
        let written = Issuer { directory: Some("https://ca.test/dir".to_owned()), ..Issuer::default() };
        assert_eq!(written.directory("letsencrypt"), Some("https://ca.test/dir"));
        let bare = Issuer::default();
        assert_eq!(bare.directory("letsencrypt"), Some("https://acme-v02.api.letsencrypt.org/directory"));
        assert_eq!(bare.directory("ours"), None);
    }

    #[test]
    fn an_issuer_is_asked_for_names_alone() {
        for name in ["www.example.com", "localhost", "a-b.test.", "xn--bcher-kva.example.com", "1.test"] {
            assert_eq!(issuable(name), Ok(()), "{name}");
        }
        let long = ["a"; 128].join(".");
        for name in [
            "*.example.com",
            "*",
            "10.0.0.1",
            "[::1]",
            "::1",
            "bücher.test",
            "a_b.test",
            "",
            "a..test",
            "-a.test",
            &long,
        ] {
            assert!(issuable(name).is_err(), "{name}");
        }
    }

    #[test]
    fn the_key_of_a_binding_is_base64url_with_its_padding_or_without() {
        let key = |text: &str| Eab { kid: "1".to_owned(), key: text.to_owned() }.key();
        assert_eq!([key("_-8"), key("_-8=")], [Some(vec![0xff, 0xef]), Some(vec![0xff, 0xef])]);
        assert_eq!([key("/+8"), key(""), key("a b")], [None, None, None]);
    }
}
