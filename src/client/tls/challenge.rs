//! The certificate for the TLS-ALPN-01 challenge: it has the name, and the digest that the issuer expects (RFC 8737
//! §3).

use boring::asn1::{Asn1Integer, Asn1Time};
use boring::bn::BigNum;
use boring::ec::{EcGroup, EcKey};
use boring::error::ErrorStack;
use boring::hash::MessageDigest;
use boring::nid::Nid;
use boring::pkey::{PKey, Private};
use boring::ssl::{AlpnError, SslContext, SslMethod, SslOptions, SslVersion, select_next_proto};
use boring::x509::extension::SubjectAlternativeName;
use boring::x509::{X509, X509Extension, X509NameBuilder};

/// The protocol in ALPN form.
const ALPN: &[u8] = b"\x0aacme-tls/1";
/// id-pe-acmeIdentifier (RFC 8737 §6.1).
const ACME_IDENTIFIER: &str = "1.3.6.1.5.5.7.1.31";

/// The TLS context for a name's challenge; `digest` is that of the key authorization.
///
/// # Errors
///
/// If the library lacks random numbers or memory.
pub fn context(name: &str, digest: &[u8; 32]) -> Result<SslContext, ErrorStack> {
    let key = key()?;
    let certificate = certificate(name, digest, &key)?;
    let mut context = SslContext::builder(SslMethod::tls())?;
    context.set_min_proto_version(Some(SslVersion::TLS1_2))?;
    context.set_options(SslOptions::NO_TICKET | SslOptions::NO_RENEGOTIATION);
    context.set_certificate(&certificate)?;
    context.set_private_key(&key)?;
    context.set_alpn_select_callback(|_, offered| select_next_proto(ALPN, offered).ok_or(AlpnError::ALERT_FATAL));
    Ok(context.build())
}

/// A new key of the kind used for certificates from issuers.
///
/// # Errors
///
/// If the library lacks random numbers.
pub fn key() -> Result<PKey<Private>, ErrorStack> {
    let group = EcGroup::from_curve_name(Nid::X9_62_PRIME256V1)?;
    PKey::from_ec_key(EcKey::generate(&group)?)
}

fn certificate(name: &str, digest: &[u8; 32], key: &PKey<Private>) -> Result<X509, ErrorStack> {
    let mut certificate = X509::builder()?;
    certificate.set_version(2)?;
    certificate.set_serial_number(Asn1Integer::from_bn(BigNum::from_u32(1)?.as_ref())?.as_ref())?;
    let mut subject = X509NameBuilder::new()?;
    subject.append_entry_by_text("CN", "ACME challenge")?;
    let subject = subject.build();
    certificate.set_subject_name(&subject)?;
    certificate.set_issuer_name(&subject)?;
    certificate.set_not_before(Asn1Time::days_from_now(0)?.as_ref())?;
    certificate.set_not_after(Asn1Time::days_from_now(7)?.as_ref())?;
    certificate.set_pubkey(key)?;
    let names = SubjectAlternativeName::new().dns(name).build(&certificate.x509v3_context(None, None))?;
    certificate.append_extension(&names)?;
    // An OCTET STRING of 32 bytes in a critical extension.
    let hex: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
    let shown = X509Extension::new(None, None, ACME_IDENTIFIER, &format!("critical,DER:0420{hex}"))?;
    certificate.append_extension(&shown)?;
    certificate.sign(key, MessageDigest::sha256())?;
    Ok(certificate.build())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_certificate_has_the_name_and_the_digest_in_a_critical_extension() {
        let key = key().expect("a key");
        let made = certificate("a.test", &[0xab; 32], &key).expect("a certificate");
        let names = made.subject_alt_names().expect("names");
        assert_eq!(names.iter().map(|name| name.dnsname()).collect::<Vec<_>>(), [Some("a.test")]);
        let der = made.to_der().expect("DER");
        // The OID, `critical`, and an OCTET STRING that contains another (RFC 8737 §3).
        let oid = [0x06, 0x08, 0x2b, 0x06, 0x01, 0x05, 0x05, 0x07, 0x01, 0x1f];
        let extension = [&oid[..], &[0x01, 0x01, 0xff], &[0x04, 0x22, 0x04, 0x20], &[0xab; 32]].concat();
        assert!(memchr::memmem::find(&der, &extension).is_some(), "{der:02x?}");
        assert!(made.verify(&key).expect("a signature"));
        assert!(context("a.test", &[1; 32]).is_ok());
    }
}
