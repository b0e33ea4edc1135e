//! `acme:`: certificate authorities that issue certificates automatically (RFC 8555).

use std::fmt;
use std::net::IpAddr;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::address::is_label;
use super::units::Time;

/// The common authorities accept no more names per certificate.
pub const NAMES_MAX: usize = 100;

/// An issuer of certificates. For `letsencrypt` and `letsencrypt-staging`, `{}` is enough, and the entry is
/// optional.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Issuer {
    /// The URL of the ACME directory. `letsencrypt` and `letsencrypt-staging` have a default.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub directory: Option<String>,
    /// The contact address for problems with the account or a certificate.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub email: Option<String>,
    /// Agrees to the terms of service of the issuer. Most issuers require this.
    pub agree_to_terms: bool,
    /// The challenge that proves control of a name.
    pub challenge: Challenge,
    /// The directory for the account, keys and certificates. Forebay creates it. Several issuers can share one.
    pub store: String,
    /// A PEM file with the authorities that the directory's TLS certificate is verified against; by default those
    /// of the system.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ca: Option<String>,
    /// External account binding (EAB): an existing account with the issuer, for issuers that require one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub eab: Option<Eab>,
    /// Time limits.
    pub timeouts: Timeouts,
    /// When a failed order is retried.
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
    /// The well-known issuers and their directories.
    pub const WELL_KNOWN: [(&str, &str); 2] = [
        ("letsencrypt", "https://acme-v02.api.letsencrypt.org/directory"),
        ("letsencrypt-staging", "https://acme-staging-v02.api.letsencrypt.org/directory"),
    ];

    /// The directory URL of this issuer: the configured or the well-known one.
    pub fn directory(&self, name: &str) -> Option<&str> {
        let known = || Issuer::WELL_KNOWN.iter().find(|(known, _)| *known == name).map(|(_, directory)| *directory);
        self.directory.as_deref().or_else(known)
    }
}

/// How an issuer verifies that a name is served here.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Challenge {
    /// The issuer opens a TLS connection to port 443 of the name; a listener with `tls` answers it (RFC 8737).
    #[default]
    #[serde(rename = "tls_alpn_01")]
    TlsAlpn01,
    /// The issuer sends a request to port 80 of the name; every listener answers it before its routes (RFC 8555
    /// §8.3).
    #[serde(rename = "http_01")]
    Http01,
}

impl Challenge {
    /// The name in the configuration and in metric labels.
    pub fn name(self) -> &'static str {
        match self {
            Challenge::TlsAlpn01 => "tls_alpn_01",
            Challenge::Http01 => "http_01",
        }
    }
}

/// External account binding: an account with the issuer that the ACME account is bound to (RFC 8555 §7.3.4).
#[derive(Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Eab {
    /// The key identifier from the issuer.
    pub kid: String,
    /// The HMAC key from the issuer, in base64url. It is a secret: use `${file:/etc/forebay/eab.key}` or similar.
    pub key: String,
}

impl Eab {
    /// The decoded key. `None`: not base64url.
    pub fn key(&self) -> Option<Vec<u8>> {
        use base64::Engine;
        use base64::prelude::BASE64_URL_SAFE_NO_PAD;
        let bytes = BASE64_URL_SAFE_NO_PAD.decode(self.key.trim_end_matches('=')).ok()?;
        (!bytes.is_empty()).then_some(bytes)
    }
}

/// Hides the key.
impl fmt::Debug for Eab {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Eab").field("kid", &self.kid).finish_non_exhaustive()
    }
}

/// Time limits of an issuer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Timeouts {
    /// For one request, from name resolution to the last byte of the response.
    pub request: Time,
    /// For a whole order, from the first request to the certificate.
    pub order: Time,
}

impl Default for Timeouts {
    fn default() -> Self {
        Timeouts { request: Time::seconds(30), order: Time::seconds(300) }
    }
}

/// When a failed order is retried. The delay doubles each time, plus or minus a quarter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Retry {
    /// Delay after the first failure. It is also the least delay between a failed order and the next one for the
    /// same certificate.
    pub first: Time,
    /// Longest delay.
    pub max: Time,
}

impl Default for Retry {
    fn default() -> Self {
        Retry { first: Time::seconds(120), max: Time::seconds(6 * 3600) }
    }
}

/// Checks that a challenge can prove this name to an issuer.
///
/// # Errors
///
/// The reason, and how to fix it.
pub fn issuable(name: &str) -> Result<(), &'static str> {
    if name.starts_with("*.") || name.contains('*') {
        return Err("`tls_alpn_01` and `http_01` cannot prove a wildcard: list the names, or use a certificate file");
    }
    if name.trim_matches(['[', ']']).parse::<IpAddr>().is_ok() {
        return Err("an address is not a name: expected one such as `www.example.com`");
    }
    if !name.is_ascii() {
        return Err("expected ASCII, such as `xn--bcher-kva.example.com`");
    }
    let name = name.strip_suffix('.').unwrap_or(name);
    // Labels of a DNS name consist of letters, digits and hyphens (RFC 1123 §2.1).
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
