//! TLS to endpoints: verification of their certificates, and Forebay's client certificate.
//!
//! Pingora verifies chains and host names. Two checks are made after the handshake, before the connection is used:
//! that a certificate contains the IP address, if there is no name, and that HTTP/2 was negotiated if required.
//! `proxy/connect.rs` refuses a connection with such a [`Flaw`].

use std::any::Any;
use std::hash::Hasher;
use std::net::IpAddr;
use std::path::Path;
use std::sync::Arc;

use pingora::protocols::Digest;
use pingora::protocols::tls::{CaType, HandshakeCompleteHook, SslDigest};
use pingora::tls::pkey::PKey;
use pingora::tls::ssl::SslRef;
use pingora::tls::x509::X509;
use pingora::upstreams::peer::HttpPeer;
use pingora::utils::tls::CertKey;
use xxhash_rust::xxh3::Xxh3;

use crate::config;
use crate::config::file;
use crate::config::units::Size;
use crate::config::upstream::Protocol;
use crate::error::BuildError;

/// Largest PEM file; the system's CA bundle has a quarter of a MiB.
const PEM_MAX: Size = Size::kib(16 * 1024);

/// The TLS settings of an upstream.
#[derive(Debug)]
pub struct Tls {
    verify: bool,
    server_name: Option<Box<str>>,
    /// `None`: the system's authorities.
    ca: Option<Arc<CaType>>,
    identity: Option<Arc<CertKey>>,
    h2: bool,
}

/// Why a connection must not be used although its handshake succeeded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flaw {
    /// The certificate is valid, but does not contain this address.
    Address(IpAddr),
    /// The endpoint did not negotiate HTTP/2.
    NoHttp2,
}

impl Flaw {
    /// The flaw of this connection, if there is one.
    pub fn of(digest: Option<&Digest>) -> Option<Flaw> {
        Flaw::of_tls(digest?.ssl_digest.as_deref())
    }

    /// As [`Flaw::of`], from the TLS digest.
    pub fn of_tls(digest: Option<&SslDigest>) -> Option<Flaw> {
        digest?.extension.get::<Flaw>().copied()
    }
}

impl std::fmt::Display for Flaw {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Flaw::Address(address) => write!(f, "the certificate is not made out to {address}"),
            Flaw::NoHttp2 => f.write_str("HTTP/2 was not agreed on (ALPN)"),
        }
    }
}

impl Tls {
    /// Reads the files; adds their content to `key`.
    pub fn build(written: &config::upstream::Tls, protocol: Protocol, key: &mut Xxh3) -> Result<Tls, Vec<BuildError>> {
        let mut errors = Vec::new();
        let ca = written.ca.as_ref().and_then(|path| certificates("ca", path, key).map_err(|e| errors.push(e)).ok());
        let identity = match (&written.certificate, &written.key) {
            (Some(certificate), Some(private)) => {
                identity(certificate, private, key).map_err(|found| errors.extend(found)).ok()
            }
            _ => None,
        };
        if !errors.is_empty() {
            return Err(errors.into_iter().map(|error| error.under("tls")).collect());
        }
        Ok(Tls {
            verify: written.verify,
            server_name: written.server_name.as_deref().map(Into::into),
            ca: ca.map(|certificates| Arc::new(certificates.into_boxed_slice())),
            identity: identity.map(Arc::new),
            h2: protocol != Protocol::Http1,
        })
    }

    /// Why an endpoint at `host` (`None`: a unix socket) cannot be connected to, if so. Without a name, Pingora
    /// would verify nothing at all, so this is an error.
    pub fn objection(&self, host: Option<&str>) -> Option<&'static str> {
        (self.verify && self.server_name.is_none() && host.is_none()).then_some(
            "a unix socket has no name that its certificate could be made out to: write `tls: { server_name: … }`",
        )
    }

    /// Sets the TLS options of a peer with the name `host`.
    pub fn set_up(&self, peer: &mut HttpPeer, host: Option<&str>) {
        let name = self.server_name.as_deref().or(host).unwrap_or_default();
        let address = name.parse::<IpAddr>().ok();
        // An IP address is not sent as SNI (RFC 6066 §3), and Pingora does not compare it with the certificate.
        name.clone_into(&mut peer.sni);
        peer.options.verify_cert = self.verify;
        peer.options.verify_hostname = self.verify && address.is_none();
        peer.options.ca.clone_from(&self.ca);
        peer.client_cert_key.clone_from(&self.identity);
        let address = address.filter(|_| self.verify);
        peer.options.upstream_tls_handshake_complete_hook =
            (self.h2 || address.is_some()).then(|| inspection(address, self.h2));
    }
}

/// Checks the result of a handshake.
fn inspection(address: Option<IpAddr>, h2: bool) -> HandshakeCompleteHook {
    Arc::new(move |ssl: &SslRef| {
        let stranger = address.filter(|&address| !ssl.peer_certificate().is_some_and(|shown| names(&shown, address)));
        let flaw = match stranger {
            Some(address) => Some(Flaw::Address(address)),
            None => (h2 && ssl.selected_alpn_protocol() != Some(b"h2")).then_some(Flaw::NoHttp2),
        };
        flaw.map(|flaw| Arc::new(flaw) as Arc<dyn Any + Send + Sync>)
    })
}

/// Whether a certificate contains this IP address (RFC 9110 §4.3.5).
fn names(certificate: &X509, address: IpAddr) -> bool {
    let named = |bytes: &[u8]| match address {
        IpAddr::V4(address) => bytes == address.octets(),
        IpAddr::V6(address) => bytes == address.octets(),
    };
    let names = certificate.subject_alt_names();
    names.is_some_and(|names| names.iter().any(|name| name.ipaddress().is_some_and(named)))
}

fn identity(certificate: &str, private: &str, key: &mut Xxh3) -> Result<CertKey, Vec<BuildError>> {
    let certificates = certificates("certificate", certificate, key);
    let private_key = read("key", private).and_then(|pem| {
        // Without a callback, the library would ask for the password on the terminal.
        PKey::private_key_from_pem_callback(&pem, |_| Ok(0)).map_err(|_| {
            let message = format!("`{private}` holds no private key in PEM, or one with a password");
            BuildError::new("key", message)
        })
    });
    let (certificates, private_key) = match (certificates, private_key) {
        (Ok(certificates), Ok(private_key)) => (certificates, private_key),
        (certificates, private_key) => {
            return Err([certificates.err(), private_key.err()].into_iter().flatten().collect());
        }
    };
    if !certificates[0].public_key().is_ok_and(|public| public.public_eq(&private_key)) {
        let message = format!("`{private}` is not the key of the first certificate in `{certificate}`");
        return Err(vec![BuildError::new("key", message)]);
    }
    Ok(CertKey::new(certificates, private_key))
}

/// The certificates in a file; at least one.
fn certificates(at: &str, path: &str, key: &mut Xxh3) -> Result<Vec<X509>, BuildError> {
    let pem = read(at, path)?;
    key.write(&pem);
    match X509::stack_from_pem(&pem) {
        Ok(certificates) if !certificates.is_empty() => Ok(certificates),
        Ok(_) => Err(BuildError::new(at, format!("`{path}` holds no certificate in PEM"))),
        Err(error) => Err(BuildError::new(at, format!("`{path}` holds no certificates in PEM: {error}"))),
    }
}

fn read(at: &str, path: &str) -> Result<Vec<u8>, BuildError> {
    file::read(Path::new(path), PEM_MAX)
        .map_err(|error| BuildError::new(at, format!("`{path}` cannot be read: {error}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    use std::fs;

    use pingora::protocols::l4::socket::SocketAddr;
    use pingora::upstreams::peer::Peer;

    use super::super::tests::transport;

    fn written(yaml: &str) -> config::upstream::Tls {
        config::filter::decode(&serde_yaml::from_str(yaml).unwrap()).unwrap()
    }

    fn build(yaml: &str) -> Result<Tls, Vec<String>> {
        let built = Tls::build(&written(yaml), Protocol::Http1, &mut Xxh3::new());
        built.map_err(|errors| errors.iter().map(ToString::to_string).collect())
    }

    fn put(dir: &Path, name: &str, text: &str) -> String {
        let path = dir.join(name);
        fs::write(&path, text).unwrap();
        path.display().to_string()
    }

    #[test]
    fn files_that_are_not_what_they_should_be_are_told_with_their_place() {
        let dir = tempfile::tempdir().unwrap();
        let [one, two] = [(); 2].map(|()| rcgen::generate_simple_self_signed(["a.test".to_owned()]).unwrap());
        let certificate = put(dir.path(), "cert.pem", &one.cert.pem());
        let key = put(dir.path(), "key.pem", &one.signing_key.serialize_pem());
        let other = put(dir.path(), "other.pem", &two.signing_key.serialize_pem());
        let nonsense = put(dir.path(), "nonsense.pem", "no PEM at all");
        let missing = dir.path().join("missing.pem").display().to_string();

        assert!(build(&format!("{{ ca: {certificate}, certificate: {certificate}, key: {key} }}")).is_ok());
        let said = |yaml: String| build(&yaml).unwrap_err();
        assert_eq!(
            said(format!("{{ ca: {nonsense} }}")),
            [format!("tls.ca: `{nonsense}` holds no certificate in PEM")]
        );
        assert_eq!(
            said(format!("{{ ca: {missing}, certificate: {key}, key: {certificate} }}")),
            [
                format!("tls.ca: `{missing}` cannot be read: No such file or directory (os error 2)"),
                format!("tls.certificate: `{key}` holds no certificate in PEM"),
                format!("tls.key: `{certificate}` holds no private key in PEM, or one with a password"),
            ]
        );
        assert_eq!(
            said("{ ca: /dev/zero }".to_owned()),
            ["tls.ca: `/dev/zero` cannot be read: it is a device and not a plain file"]
        );
        assert_eq!(
            said(format!("{{ certificate: {certificate}, key: {other} }}")),
            [format!("tls.key: `{other}` is not the key of the first certificate in `{certificate}`")]
        );
    }

    #[test]
    fn an_endpoint_without_a_name_cannot_be_verified() {
        assert!(transport("tls: {}").objection(None).is_some());
        assert!(transport("protocol: h2").objection(None).is_some());
        for verifiable in ["tls: { server_name: a.test }", "tls: { verify: false }", "protocol: h2c", ""] {
            assert!(transport(verifiable).objection(None).is_none(), "{verifiable}");
        }
        assert!(transport("tls: {}").objection(Some("10.0.0.1")).is_none(), "an address may stand in a certificate");
    }

    #[test]
    fn an_address_is_looked_for_by_ourselves_and_a_name_by_pingora() {
        let peer = |yaml: &str, host: &str| {
            let (transport, address) = (transport(yaml), SocketAddr::Inet("10.0.0.1:443".parse().unwrap()));
            let dialer = transport.dialer(&address, None);
            let peer = transport.peer(address, Some(host), dialer);
            let inspected = peer.options.upstream_tls_handshake_complete_hook.is_some();
            (peer.sni.clone(), peer.verify_cert(), peer.verify_hostname(), inspected)
        };
        assert_eq!(peer("tls: {}", "a.test"), ("a.test".to_owned(), true, true, false));
        assert_eq!(peer("tls: {}", "10.0.0.1"), ("10.0.0.1".to_owned(), true, false, true));
        assert_eq!(peer("tls: { server_name: b.test }", "10.0.0.1"), ("b.test".to_owned(), true, true, false));
        assert_eq!(peer("tls: { verify: false }", "10.0.0.1"), ("10.0.0.1".to_owned(), false, false, false));
        assert_eq!(peer("protocol: h2", "a.test"), ("a.test".to_owned(), true, true, true), "for ALPN");
    }

    #[test]
    fn a_certificate_names_addresses_in_its_alternative_names_only() {
        let names_of = |names: &[&str]| {
            let made = rcgen::generate_simple_self_signed(names.iter().map(ToString::to_string).collect::<Vec<_>>());
            X509::from_pem(made.unwrap().cert.pem().as_bytes()).unwrap()
        };
        let certificate = names_of(&["10.0.0.1", "::1", "a.test"]);
        assert!(names(&certificate, "10.0.0.1".parse().unwrap()) && names(&certificate, "::1".parse().unwrap()));
        assert!(!names(&certificate, "10.0.0.2".parse().unwrap()));
        assert!(!names(&names_of(&["a.test"]), "10.0.0.1".parse().unwrap()));
    }
}
