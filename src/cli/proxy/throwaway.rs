//! A temporary certificate for `localhost`, to try HTTPS without a certificate.

use std::fs;
use std::io::{Error, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use boring::asn1::{Asn1Integer, Asn1Time};
use boring::bn::{BigNum, MsbOption};
use boring::error::ErrorStack;
use boring::hash::MessageDigest;
use boring::x509::extension::{BasicConstraints, SubjectAlternativeName};
use boring::x509::{X509, X509NameBuilder};
use tempfile::TempDir;

use super::super::Failure;
use crate::client::tls::challenge;

/// Validity in days.
const DAYS: u32 = 30;

/// A certificate and its key in a directory that is deleted on drop.
pub struct Throwaway(TempDir);

impl Throwaway {
    /// Creates a certificate.
    pub fn make() -> Result<Throwaway, Failure> {
        let (certificate, key) =
            pair().map_err(|error| Failure::Runtime(format!("cannot make a certificate: {error}")))?;
        let dir = tempfile::tempdir().map_err(Failure::io("make a directory for a certificate"))?;
        let made = Throwaway(dir);
        write(&made.key(), &key)
            .and_then(|()| write(&made.certificate(), &certificate))
            .map_err(Failure::io("write a certificate"))?;
        Ok(made)
    }

    /// The file of the certificate.
    pub fn certificate(&self) -> String {
        self.file("localhost.pem")
    }

    /// The file of its key.
    pub fn key(&self) -> String {
        self.file("localhost.key")
    }

    fn file(&self, name: &str) -> String {
        self.0.path().join(name).display().to_string()
    }
}

fn write(path: &str, pem: &[u8]) -> Result<(), Error> {
    fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(Path::new(path))?.write_all(pem)
}

/// A self-signed certificate and its key, in PEM.
fn pair() -> Result<(Vec<u8>, Vec<u8>), ErrorStack> {
    let key = challenge::key()?;
    let mut certificate = X509::builder()?;
    certificate.set_version(2)?;
    // Serial numbers must differ between runs, or browsers confuse the certificates (RFC 5280 §4.1.2.2).
    let mut serial = BigNum::new()?;
    serial.rand(127, MsbOption::MAYBE_ZERO, false)?;
    certificate.set_serial_number(Asn1Integer::from_bn(&serial)?.as_ref())?;
    let mut subject = X509NameBuilder::new()?;
    subject.append_entry_by_text("CN", "localhost")?;
    let subject = subject.build();
    certificate.set_subject_name(&subject)?;
    certificate.set_issuer_name(&subject)?;
    certificate.set_not_before(Asn1Time::days_from_now(0)?.as_ref())?;
    certificate.set_not_after(Asn1Time::days_from_now(DAYS)?.as_ref())?;
    certificate.set_pubkey(&key)?;
    let no_authority = BasicConstraints::new().build()?;
    certificate.append_extension(&no_authority)?;
    let names = SubjectAlternativeName::new()
        .dns("localhost")
        .ip("127.0.0.1")
        .ip("::1")
        .build(&certificate.x509v3_context(None, None))?;
    certificate.append_extension(&names)?;
    certificate.sign(&key, MessageDigest::sha256())?;
    Ok((certificate.build().to_pem()?, key.private_key_to_pem_pkcs8()?))
}
