//! Verifies the signatures of tokens with BoringSSL, as the crypto provider of the `jsonwebtoken` crate.
//!
//! A key is only valid for the algorithms of its kind, so that a public key is never used as the secret of an HMAC
//! (RFC 8725 §2.1). `none` is not an algorithm.

use std::sync::Once;

use boring::bn::BigNum;
use boring::ec::{EcGroup, EcKey};
use boring::ecdsa::EcdsaSig;
use boring::error::ErrorStack;
use boring::hash::{MessageDigest, hash};
use boring::nid::Nid;
use boring::pkey::{PKey, Public};
use boring::rsa::{Padding, Rsa};
use boring::sign::{RsaPssSaltlen, Verifier as SignatureVerifier};
use hmac::{Hmac, Mac};
use jsonwebtoken::crypto::{CryptoProvider, JwtVerifier, KeyUtils};
use jsonwebtoken::errors::{Error, ErrorKind, new_error};
use jsonwebtoken::signature::{self, Verifier};
use jsonwebtoken::{Algorithm, AlgorithmFamily, DecodingKey, DecodingKeyKind};
use sha2::{Sha256, Sha384, Sha512};

static PROVIDER: CryptoProvider = CryptoProvider {
    signer_factory: |_, _| Err(new_error(ErrorKind::UnsupportedAlgorithm)),
    verifier_factory: |algorithm, key| match Verifying::new(*algorithm, key) {
        Some(verifying) => Ok(Box::new(verifying)),
        None => Err(new_error(ErrorKind::InvalidKeyFormat)),
    },
    key_utils: KeyUtils {
        rsa_pub_components_from_private_key: |_| unsupported(),
        rsa_pub_components_from_public_key: |_| unsupported(),
        ec_pub_components_from_private_key: |_, _| unsupported(),
        ed_pub_components_from_private_key: |_, _| unsupported(),
        compute_digest: |_, _| unsupported(),
    },
};

fn unsupported<T>() -> Result<T, Error> {
    Err(new_error(ErrorKind::UnsupportedAlgorithm))
}

/// Installs this provider. If the program has installed another one before, that one stays.
pub fn install() {
    static INSTALLED: Once = Once::new();
    INSTALLED.call_once(|| _ = PROVIDER.install_default());
}

/// A key for verifying signatures of one algorithm.
pub struct Verifying {
    algorithm: Algorithm,
    key: Key,
}

enum Key {
    Secret(Vec<u8>),
    Rsa(PKey<Public>),
    /// And the length of each of the two numbers of a signature.
    Ec(EcKey<Public>, usize),
    Ed(PKey<Public>),
}

/// The least size that RFC 7518 §3.3 requires; a much longer key would only take time.
const RSA_BITS: std::ops::RangeInclusive<u32> = 2048..=8192;

/// The DER form of an Ed25519 key is this prefix and its 32 bytes (RFC 8410 §4).
const ED25519: [u8; 12] = [0x30, 0x2a, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x03, 0x21, 0x00];

impl Verifying {
    /// `None`: the key is invalid, too short, or does not fit the algorithm.
    pub fn new(algorithm: Algorithm, key: &DecodingKey) -> Option<Verifying> {
        if key.family() != algorithm.family() {
            return None;
        }
        let key = match (algorithm.family(), key.kind()) {
            (AlgorithmFamily::Hmac, DecodingKeyKind::SecretOrDer(secret)) => {
                // RFC 7518 §3.2: a secret is at least as long as the hash.
                let least = match algorithm {
                    Algorithm::HS256 => 32,
                    Algorithm::HS384 => 48,
                    _ => 64,
                };
                (secret.len() >= least).then(|| Key::Secret(secret.clone()))?
            }
            (AlgorithmFamily::Rsa, DecodingKeyKind::RsaModulusExponent { n, e }) => rsa(n, e)?,
            (AlgorithmFamily::Ec, DecodingKeyKind::SecretOrDer(point)) => ec(algorithm, point)?,
            (AlgorithmFamily::Ed, DecodingKeyKind::SecretOrDer(key)) if key.len() == 32 => {
                Key::Ed(PKey::public_key_from_der(&[&ED25519[..], key].concat()).ok()?)
            }
            _ => return None,
        };
        Some(Verifying { algorithm, key })
    }

    fn is_right(&self, message: &[u8], signature: &[u8]) -> Result<bool, ErrorStack> {
        match &self.key {
            Key::Secret(secret) => Ok(match self.algorithm {
                Algorithm::HS256 => mac_is_right::<Hmac<Sha256>>(secret, message, signature),
                Algorithm::HS384 => mac_is_right::<Hmac<Sha384>>(secret, message, signature),
                _ => mac_is_right::<Hmac<Sha512>>(secret, message, signature),
            }),
            Key::Rsa(key) => {
                let digest = self.digest();
                let mut verifier = SignatureVerifier::new(digest, key)?;
                if matches!(self.algorithm, Algorithm::PS256 | Algorithm::PS384 | Algorithm::PS512) {
                    // RFC 7518 §3.5.
                    verifier.set_rsa_padding(Padding::PKCS1_PSS)?;
                    verifier.set_rsa_pss_saltlen(RsaPssSaltlen::DIGEST_LENGTH)?;
                    verifier.set_rsa_mgf1_md(digest)?;
                }
                verifier.verify_oneshot(signature, message)
            }
            Key::Ec(key, length) => {
                // RFC 7518 §3.4: two numbers of fixed length. BoringSSL refuses zeros, which some libraries once
                // accepted.
                let Some((r, s)) = signature.split_at_checked(*length).filter(|(_, s)| s.len() == *length) else {
                    return Ok(false);
                };
                let pair = EcdsaSig::from_private_components(BigNum::from_slice(r)?, BigNum::from_slice(s)?)?;
                pair.verify(&hash(self.digest(), message)?, key)
            }
            Key::Ed(key) => SignatureVerifier::new_without_digest(key)?.verify_oneshot(signature, message),
        }
    }

    fn digest(&self) -> MessageDigest {
        match self.algorithm {
            Algorithm::RS384 | Algorithm::PS384 | Algorithm::ES384 => MessageDigest::sha384(),
            Algorithm::RS512 | Algorithm::PS512 => MessageDigest::sha512(),
            _ => MessageDigest::sha256(),
        }
    }
}

fn rsa(n: &[u8], e: &[u8]) -> Option<Key> {
    let n = BigNum::from_slice(n).ok()?;
    let bits = u32::try_from(n.num_bits()).ok()?;
    if !RSA_BITS.contains(&bits) {
        return None;
    }
    let key = Rsa::from_public_components(n, BigNum::from_slice(e).ok()?).ok()?;
    PKey::from_rsa(key).ok().map(Key::Rsa)
}

/// BoringSSL checks that the point is on its curve.
fn ec(algorithm: Algorithm, point: &[u8]) -> Option<Key> {
    let (curve, length) = match algorithm {
        Algorithm::ES256 => (Nid::X9_62_PRIME256V1, 32),
        _ => (Nid::SECP384R1, 48),
    };
    let (&[4], coordinates) = point.split_at_checked(1)? else { return None };
    let (x, y) = coordinates.split_at_checked(length).filter(|(_, y)| y.len() == length)?;
    let group = EcGroup::from_curve_name(curve).ok()?;
    let (x, y) = (BigNum::from_slice(x).ok()?, BigNum::from_slice(y).ok()?);
    let key = EcKey::from_public_key_affine_coordinates(&group, &x, &y).ok()?;
    key.check_key().ok().map(|()| Key::Ec(key, length))
}

/// Compares in constant time.
fn mac_is_right<M: Mac + hmac::digest::KeyInit>(secret: &[u8], message: &[u8], signature: &[u8]) -> bool {
    <M as Mac>::new_from_slice(secret).is_ok_and(|mac| mac.chain_update(message).verify_slice(signature).is_ok())
}

impl Verifier<Vec<u8>> for Verifying {
    fn verify(&self, message: &[u8], signature: &Vec<u8>) -> Result<(), signature::Error> {
        match self.is_right(message, signature) {
            Ok(true) => Ok(()),
            _ => Err(signature::Error::new()),
        }
    }
}

impl JwtVerifier for Verifying {
    fn algorithm(&self) -> Algorithm {
        self.algorithm
    }
}
