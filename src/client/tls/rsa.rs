//! RSA signatures for handshakes, made by AWS-LC.
//!
//! The signature is most of the cost of a handshake with an RSA key. BoringSSL has no code for it that uses AVX-512
//! IFMA; AWS-LC has, and needs about half the time. AWS-LC does nothing else here: TLS, certificates and the other keys
//! are BoringSSL's. The symbols of AWS-LC have a prefix, so a program can contain both.
//!
//! [`Signer::of`] alone decides which keys AWS-LC signs with. Both libraries blind the private operation, and check its
//! result with the public key before they return it.

use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::signature::{self as aws, RsaEncoding, RsaKeyPair};
use boring::hash::MessageDigest;
use boring::pkey::{Id, PKey, Private};
use boring::rsa::Padding;
use boring::sign::{Signer as BoringSigner, Verifier};
use boring::ssl::{PrivateKeyMethod, PrivateKeyMethodError, SslRef, SslSignatureAlgorithm};
use zeroize::Zeroizing;

/// The lengths of the keys that AWS-LC signs with, in bits. Its fast code is for 2048, 3072 and 4096.
const BITS: std::ops::RangeInclusive<u32> = 2048..=4096;

/// A private key, as BoringSSL calls it during handshakes.
pub struct Signer {
    /// The key in AWS-LC.
    pair: RsaKeyPair,
    /// The key in BoringSSL, for what AWS-LC does not do.
    key: PKey<Private>,
}

impl Signer {
    /// The signer with this key. `None`: BoringSSL signs, since the key is not RSA or has an unusual length, AWS-LC
    /// does not accept it, or a signature by AWS-LC was not valid.
    pub fn of(key: &PKey<Private>) -> Option<Signer> {
        if key.id() != Id::RSA || !BITS.contains(&key.bits()) {
            return None;
        }
        let der = Zeroizing::new(key.private_key_to_der_pkcs8().ok()?);
        let signer = Signer { pair: pair(&der)?, key: key.clone() };
        signer.is_sound().then_some(signer)
    }

    /// Whether BoringSSL accepts a signature by AWS-LC.
    fn is_sound(&self) -> bool {
        const MESSAGE: &[u8] = b"Forebay";
        let mut signature = vec![0; self.pair.public_modulus_len()];
        self.sign(MESSAGE, SslSignatureAlgorithm::RSA_PKCS1_SHA256, &mut signature).is_some()
            && Verifier::new(MessageDigest::sha256(), &self.key)
                .and_then(|mut verifier| verifier.verify_oneshot(&signature, MESSAGE))
                .unwrap_or(false)
    }

    /// Signs a message; returns the length of the signature, which is at the start of `out`.
    fn sign(&self, message: &[u8], scheme: SslSignatureAlgorithm, out: &mut [u8]) -> Option<usize> {
        let length = self.pair.public_modulus_len();
        let out = out.get_mut(..length)?;
        match encoding(scheme) {
            // AWS-LC has a generator of its own and ignores this one.
            Some(encoding) => self.pair.sign(encoding, &SystemRandom::new(), message, out).ok()?,
            // The last resort of old clients of TLS 1.2.
            None if scheme == SslSignatureAlgorithm::RSA_PKCS1_SHA1 => {
                let mut signer = BoringSigner::new(MessageDigest::sha1(), &self.key).ok()?;
                out.copy_from_slice(&signer.sign_oneshot_to_vec(message).ok()?);
            }
            None => return None,
        }
        Some(length)
    }
}

/// The key in AWS-LC, which checks that its numbers are consistent. `None`: it does not accept the key.
fn pair(pkcs8: &[u8]) -> Option<RsaKeyPair> {
    RsaKeyPair::from_pkcs8(pkcs8).ok()
}

/// Hash and padding of a signature scheme (RFC 8446 §4.2.3). `None`: AWS-LC does not sign with it.
fn encoding(scheme: SslSignatureAlgorithm) -> Option<&'static dyn RsaEncoding> {
    Some(match scheme {
        SslSignatureAlgorithm::RSA_PSS_RSAE_SHA256 => &aws::RSA_PSS_SHA256,
        SslSignatureAlgorithm::RSA_PSS_RSAE_SHA384 => &aws::RSA_PSS_SHA384,
        SslSignatureAlgorithm::RSA_PSS_RSAE_SHA512 => &aws::RSA_PSS_SHA512,
        SslSignatureAlgorithm::RSA_PKCS1_SHA256 => &aws::RSA_PKCS1_SHA256,
        SslSignatureAlgorithm::RSA_PKCS1_SHA384 => &aws::RSA_PKCS1_SHA384,
        SslSignatureAlgorithm::RSA_PKCS1_SHA512 => &aws::RSA_PKCS1_SHA512,
        _ => return None,
    })
}

impl PrivateKeyMethod for Signer {
    fn sign(
        &self,
        _: &mut SslRef,
        message: &[u8],
        scheme: SslSignatureAlgorithm,
        out: &mut [u8],
    ) -> Result<usize, PrivateKeyMethodError> {
        self.sign(message, scheme, out).ok_or(PrivateKeyMethodError::FAILURE)
    }

    /// Only suites without forward secrecy call this, which `ciphers` must list.
    fn decrypt(&self, _: &mut SslRef, input: &[u8], out: &mut [u8]) -> Result<usize, PrivateKeyMethodError> {
        let rsa = self.key.rsa().map_err(|_| PrivateKeyMethodError::FAILURE)?;
        if out.len() < rsa.size() as usize {
            return Err(PrivateKeyMethodError::FAILURE);
        }
        rsa.private_decrypt(input, out, Padding::NONE).map_err(|_| PrivateKeyMethodError::FAILURE)
    }

    /// Never called, since no operation is left pending.
    fn complete(&self, _: &mut SslRef, _: &mut [u8]) -> Result<usize, PrivateKeyMethodError> {
        Err(PrivateKeyMethodError::FAILURE)
    }
}

#[cfg(test)]
mod tests {
    use std::pin::Pin;

    use boring::ec::{EcGroup, EcKey};
    use boring::nid::Nid;
    use boring::rsa::Rsa;
    use boring::sign::RsaPssSaltlen;
    use boring::ssl::{Ssl, SslConnector, SslMethod, SslVerifyMode, SslVersion};
    use pingora::tls::tokio_ssl::SslStream;

    use super::super::certificate::Source;
    use super::super::certificate::tests::{load, put};
    use super::super::context::Terms;
    use super::*;
    use crate::config::listener::Protocol;

    const SCHEMES: [SslSignatureAlgorithm; 7] = [
        SslSignatureAlgorithm::RSA_PSS_RSAE_SHA256,
        SslSignatureAlgorithm::RSA_PSS_RSAE_SHA384,
        SslSignatureAlgorithm::RSA_PSS_RSAE_SHA512,
        SslSignatureAlgorithm::RSA_PKCS1_SHA256,
        SslSignatureAlgorithm::RSA_PKCS1_SHA384,
        SslSignatureAlgorithm::RSA_PKCS1_SHA512,
        SslSignatureAlgorithm::RSA_PKCS1_SHA1,
    ];

    fn key(bits: u32) -> PKey<Private> {
        PKey::from_rsa(Rsa::generate(bits).expect("a key")).expect("a key")
    }

    /// Whether BoringSSL accepts the signature with the public key alone.
    fn verifies(key: &PKey<Private>, scheme: SslSignatureAlgorithm, message: &[u8], signature: &[u8]) -> bool {
        let public = key.public_key_to_der().and_then(|der| PKey::public_key_from_der(&der)).expect("a public key");
        let digest = match scheme {
            SslSignatureAlgorithm::RSA_PSS_RSAE_SHA256 | SslSignatureAlgorithm::RSA_PKCS1_SHA256 => {
                MessageDigest::sha256()
            }
            SslSignatureAlgorithm::RSA_PSS_RSAE_SHA384 | SslSignatureAlgorithm::RSA_PKCS1_SHA384 => {
                MessageDigest::sha384()
            }
            SslSignatureAlgorithm::RSA_PKCS1_SHA1 => MessageDigest::sha1(),
            _ => MessageDigest::sha512(),
        };
        let mut verifier = Verifier::new(digest, &public).expect("a verifier");
        if SCHEMES[..3].contains(&scheme) {
            verifier.set_rsa_padding(Padding::PKCS1_PSS).expect("a padding");
            verifier.set_rsa_pss_saltlen(RsaPssSaltlen::DIGEST_LENGTH).expect("a length");
        }
        verifier.verify_oneshot(signature, message).unwrap_or(false)
    }

    #[test]
    fn boringssl_accepts_the_signatures_of_each_scheme_and_length() {
        for bits in [2048, 3072, 4096] {
            let key = key(bits);
            let signer = Signer::of(&key).expect("a signer");
            for scheme in SCHEMES {
                for length in [0, 1, 130, 5000] {
                    let message = vec![7; length];
                    let mut out = vec![0; 1024];
                    let written = signer.sign(&message, scheme, &mut out).expect("a signature");
                    assert_eq!(written, bits as usize / 8);
                    assert!(verifies(&key, scheme, &message, &out[..written]), "{bits} {scheme:?} {length}");
                    assert!(!verifies(&key, scheme, &[8], &out[..written]), "of another message");
                }
            }
            assert_eq!(signer.sign(b"", SslSignatureAlgorithm::RSA_PSS_RSAE_SHA256, &mut [0; 255]), None, "no room");
            assert_eq!(signer.sign(b"", SslSignatureAlgorithm::ED25519, &mut [0; 1024]), None);
        }
    }

    #[test]
    fn other_keys_are_left_to_boringssl() {
        let group = EcGroup::from_curve_name(Nid::X9_62_PRIME256V1).expect("a curve");
        let curve = PKey::from_ec_key(EcKey::generate(&group).expect("a key")).expect("a key");
        assert!(Signer::of(&curve).is_none());
        assert!(Signer::of(&key(1024)).is_none());
    }

    #[test]
    fn a_key_whose_numbers_contradict_each_other_never_signs() {
        let key = key(2048);
        let rsa = key.rsa().expect("a key");
        let der = key.private_key_to_der_pkcs8().expect("DER");
        assert!(pair(&der).is_some());
        let numbers = [Some(rsa.n()), Some(rsa.d()), rsa.p(), rsa.q(), rsa.dmp1(), rsa.dmq1(), rsa.iqmp()];
        for (index, number) in numbers.into_iter().enumerate() {
            let number = number.expect("a number").to_vec();
            let at = der.windows(number.len()).position(|part| part == number).expect("its place");
            for byte in [at + number.len() - 1, at + number.len() / 2] {
                let mut wrong = der.clone();
                // The lowest bit stays, so that odd numbers remain odd.
                wrong[byte] ^= 2;
                assert!(pair(&wrong).is_none(), "number {index}, byte {byte}");
            }
        }
        assert!(pair(&der[..der.len() - 1]).is_none());

        // The key of another certificate, as a fault of AWS-LC would show.
        let other = Signer { pair: pair(&der).expect("a key"), key: self::key(2048) };
        assert!(!other.is_sound());
    }

    /// A handshake between a context with an RSA key and a client with these schemes and suites.
    async fn shake(terms: &str, version: SslVersion, schemes: &str, suites: &str) -> Result<(), String> {
        let dir = tempfile::tempdir().expect("a directory");
        let pem = String::from_utf8(key(2048).private_key_to_pem_pkcs8().expect("PEM")).expect("text");
        let pair = rcgen::KeyPair::from_pem_and_sign_algo(&pem, &rcgen::PKCS_RSA_SHA256).expect("a key");
        let params = rcgen::CertificateParams::new(vec!["a.test".to_owned()]).expect("parameters");
        let cert = params.self_signed(&pair).expect("a certificate").pem();
        let cert = put(dir.path(), "cert", cert.as_bytes());
        let key = put(dir.path(), "key", pem.as_bytes());
        let source = Source { cert, key, names: Vec::new(), staple: None, client: None, issued: false };
        let loaded = load(&source).expect("a certificate");
        assert!(Signer::of(&loaded.key).is_some());
        let written = serde_yaml::from_str(&format!("{{ certificates: [], {terms} }}")).expect("keys of TLS");
        let terms = Terms::build(&written, &[Protocol::Http1], None).unwrap_or_else(|_| panic!("terms"));
        let server = Ssl::new(&terms.context(&loaded, None).expect("a context")).expect("a server");

        let mut connector = SslConnector::builder(SslMethod::tls()).expect("TLS");
        connector.set_verify(SslVerifyMode::NONE);
        connector.set_min_proto_version(Some(version)).expect("a version");
        connector.set_max_proto_version(Some(version)).expect("a version");
        connector.set_sigalgs_list(schemes).expect("schemes");
        connector.set_strict_cipher_list(suites).expect("suites");
        let client = connector.build().configure().and_then(|client| client.into_ssl("a.test")).expect("a client");
        let (one, other) = tokio::io::duplex(1 << 16);
        let mut server = SslStream::new(server, one).expect("a server");
        let mut client = SslStream::new(client, other).expect("a client");
        let (accepted, connected) = tokio::join!(Pin::new(&mut server).accept(), Pin::new(&mut client).connect());
        connected.and(accepted).map_err(|error| error.to_string())
    }

    #[tokio::test]
    async fn clients_of_both_versions_accept_the_signature_of_each_scheme() {
        const SUITE: &str = "ECDHE-RSA-AES128-GCM-SHA256";
        for hash in ["sha256", "sha384", "sha512"] {
            for version in [SslVersion::TLS1_2, SslVersion::TLS1_3] {
                assert_eq!(shake("", version, &format!("rsa_pss_rsae_{hash}"), SUITE).await, Ok(()));
            }
            assert_eq!(shake("", SslVersion::TLS1_2, &format!("rsa_pkcs1_{hash}"), SUITE).await, Ok(()));
        }
        assert_eq!(shake("", SslVersion::TLS1_2, "rsa_pkcs1_sha1", SUITE).await, Ok(()));
        // Without forward secrecy, the key decrypts.
        const OLD: &str = "AES128-GCM-SHA256";
        let terms = format!("ciphers: [{OLD}]");
        assert_eq!(shake(&terms, SslVersion::TLS1_2, "rsa_pkcs1_sha256", OLD).await, Ok(()));
    }
}
