//! Certificates from files: read, checked, and refused with the place of the error.
//!
//! A private key is read into memory that is overwritten when it is freed; so is the library's own copy.

use std::io::Read;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::Path;

use boring::asn1::{Asn1Time, Asn1TimeRef};
use pingora::tls::pkey::{Id, PKey, Private};
use pingora::tls::x509::X509;
use sha2::{Digest, Sha256};
use zeroize::Zeroizing;

use super::staple::{self, Staple};
use crate::client::hello::KeyKind;
use crate::client::names::Names;
use crate::config::file;
use crate::config::listener::tls::{Certificate, ClientCertificates, ClientMode};
use crate::error::BuildError;

/// Maximum size of a file with certificates or a key, and of a revocation list, in bytes.
const FILE_BYTES_MAX: u64 = 1 << 20;
const CRL_BYTES_MAX: u64 = 64 << 20;
/// Minimum length of RSA keys; clients refuse shorter ones, too.
const RSA_BITS_MIN: u32 = 2048;

/// The kind of keys for certificates from issuers: all clients support it, and it costs the least.
pub const ISSUED_KIND: KeyKind = KeyKind::P256;

/// The source of a certificate, and its use.
#[derive(Clone, Debug, PartialEq)]
pub struct Source {
    /// PEM file with the certificate and its intermediates.
    pub cert: String,
    /// PEM file with its private key; can be the same file.
    pub key: String,
    /// The names that it is used for; if empty, those in the certificate.
    pub names: Vec<String>,
    /// File with an OCSP response.
    pub staple: Option<String>,
    /// The requirements for client certificates.
    pub client: Option<ClientCertificates>,
    /// Whether Forebay obtains it from an issuer: it may be missing, or not cover all names.
    pub issued: bool,
}

impl Source {
    /// The source with the configured files.
    pub fn written(written: &Certificate) -> Source {
        Source {
            cert: written.cert.clone().unwrap_or_default(),
            key: written.key.clone().unwrap_or_default(),
            names: written.names.these().to_vec(),
            staple: written.staple.clone(),
            client: written.client.clone(),
            issued: false,
        }
    }

    /// The source for a certificate from an issuer, for these names. The file also has its key.
    pub fn issued(path: &str, names: Vec<String>, written: &Certificate) -> Source {
        Source { cert: path.to_owned(), key: path.to_owned(), names, issued: true, ..Source::written(written) }
    }
}

/// The contents of one certificate's files, not checked yet.
pub struct Files {
    cert: Zeroizing<Vec<u8>>,
    key: Zeroizing<Vec<u8>>,
    staple: Option<Vec<u8>>,
    ca: Option<Vec<u8>>,
    crl: Option<Vec<u8>>,
    /// Whether the issuer has not issued the certificate yet.
    pub awaited: bool,
}

/// A certificate with its key, and everything that is sent with it or required of clients.
pub struct Loaded {
    /// The certificate and its intermediates.
    pub chain: Vec<X509>,
    /// Its private key.
    pub key: PKey<Private>,
    /// The kind of its key.
    pub kind: KeyKind,
    /// The names that it is used for, in lower case.
    pub names: Vec<Box<str>>,
    /// Names that it should be valid for and is not, in lower case.
    pub missing: Vec<Box<str>>,
    /// Names that it is used for although it is not valid for them: clients will not accept it.
    pub foreign: Vec<Box<str>>,
    /// Start of its validity, in seconds since 1970.
    pub not_before: i64,
    /// End of its validity, in seconds since 1970.
    pub not_after: i64,
    /// Its serial number, in hexadecimal.
    pub serial: String,
    /// Its issuer.
    pub issuer: String,
    /// Its OCSP response.
    pub staple: Option<Staple>,
    /// The requirements for clients.
    pub clients: Option<Clients>,
}

/// The requirements for client certificates.
pub struct Clients {
    /// Whether a certificate is required.
    pub mode: ClientMode,
    /// The trusted authorities.
    pub authorities: Vec<X509>,
    /// Their revocation lists, in PEM.
    pub crl: Option<Vec<u8>>,
}

impl Clients {
    /// Parses the files. `None`: there are no requirements.
    ///
    /// # Errors
    ///
    /// All errors in the files.
    pub fn parse(source: &Source, files: &Files) -> Result<Option<Clients>, Vec<BuildError>> {
        let (Some(client), Some(ca)) = (&source.client, &files.ca) else { return Ok(None) };
        let authorities = certificates("client.ca", &client.ca, ca).map_err(|error| vec![error])?;
        if let (Some(path), Some(pem)) = (&client.crl, &files.crl)
            && count(pem, b"-----BEGIN X509 CRL-----") == 0
        {
            let message = format!("`{path}` holds no list of revoked certificates in PEM");
            return Err(vec![BuildError::new("client.crl", message)]);
        }
        Ok(Some(Clients { mode: client.mode, authorities, crl: files.crl.clone() }))
    }
}

impl Files {
    /// Reads the configured files.
    ///
    /// # Errors
    ///
    /// Every unreadable file, with its configuration key.
    pub fn read(source: &Source) -> Result<Files, Vec<BuildError>> {
        let mut errors = Vec::new();
        let mut whole = |at: &str, path: &str, max: u64| {
            read(at, path, max).map_err(|error| errors.push(error)).unwrap_or_default()
        };
        let client = source.client.as_ref();
        let awaited = source.issued && is_missing(&source.cert);
        let (cert, key) = if awaited {
            (Zeroizing::default(), Zeroizing::default())
        } else if source.cert == source.key {
            // Read once, so that certificate and key match.
            let both = whole("cert", &source.cert, FILE_BYTES_MAX);
            (both.clone(), both)
        } else {
            (whole("cert", &source.cert, FILE_BYTES_MAX), whole("key", &source.key, FILE_BYTES_MAX))
        };
        let files = Files {
            cert,
            key,
            awaited,
            staple: source.staple.as_ref().map(|path| whole("staple", path, FILE_BYTES_MAX).to_vec()),
            ca: client.map(|client| whole("client.ca", &client.ca, FILE_BYTES_MAX).to_vec()),
            crl: client.and_then(|it| it.crl.as_ref()).map(|path| whole("client.crl", path, CRL_BYTES_MAX).to_vec()),
        };
        if errors.is_empty() { Ok(files) } else { Err(errors) }
    }

    /// Digest of the contents.
    pub fn digest(&self) -> [u8; 32] {
        let parts = [Some(&*self.cert), Some(&*self.key), self.staple.as_ref(), self.ca.as_ref(), self.crl.as_ref()];
        digest(parts.map(|part| part.map(Vec::as_slice)))
    }

    /// Digest of the requirements for clients; a session under other requirements is invalid.
    pub fn policy(&self, source: &Source) -> Option<[u8; 32]> {
        let client = source.client.as_ref()?;
        let mode: &[u8] = if client.mode == ClientMode::Required { b"required" } else { b"optional" };
        Some(digest([Some(mode), self.ca.as_deref(), self.crl.as_deref()]))
    }
}

/// SHA-256 of the parts, with unambiguous boundaries.
fn digest<'p>(parts: impl IntoIterator<Item = Option<&'p [u8]>>) -> [u8; 32] {
    let mut hash = Sha256::new();
    for part in parts {
        hash.update(part.map_or(u64::MAX, |part| part.len() as u64).to_be_bytes());
        hash.update(part.unwrap_or_default());
    }
    hash.finalize().into()
}

impl Loaded {
    /// Parses the files.
    ///
    /// # Errors
    ///
    /// All errors in the files, except expiry: see [`Loaded::problem`].
    pub fn parse(written: &Source, files: &Files) -> Result<Loaded, Vec<BuildError>> {
        let mut errors = Vec::new();
        let chain = certificates("cert", &written.cert, &files.cert).map_err(|error| errors.push(error)).ok();
        let key = private_key(&written.key, &files.key).map_err(|error| errors.push(error)).ok();
        let clients = Clients::parse(written, files).map_err(|found| errors.extend(found)).ok().flatten();
        let (Some(chain), Some(key)) = (chain, key) else { return Err(errors) };
        let leaf = &chain[0];
        if !leaf.public_key().is_ok_and(|public| public.public_eq(&key)) {
            let belongs = chain.iter().any(|one| one.public_key().is_ok_and(|public| public.public_eq(&key)));
            let message = match belongs {
                true => {
                    format!("`{}` is the key of a certificate in `{}` that must stand first", written.key, written.cert)
                }
                false => format!("`{}` is not the key of the first certificate in `{}`", written.key, written.cert),
            };
            errors.push(BuildError::new("key", message));
        }
        let kind = kind(&key).map_err(|what| {
            errors.push(BuildError::new("key", format!("`{}` is {what}", written.key)));
        });
        let names = names(written, leaf).map_err(|found| errors.extend(found));
        let serial = serial(leaf);
        let staple = files.staple.as_ref().zip(written.staple.as_ref()).and_then(|(der, path)| {
            let wrong = |what| BuildError::new("staple", format!("`{path}` {what}"));
            staple::parse(der, &serial).map_err(|what| errors.push(wrong(what))).ok()
        });
        match (kind, names) {
            (Ok(kind), Ok((names, missing))) if errors.is_empty() => Ok(Loaded {
                foreign: foreign(&names, leaf),
                missing,
                not_before: seconds(leaf.not_before()),
                not_after: seconds(leaf.not_after()),
                issuer: text(leaf.issuer_name()),
                chain,
                key,
                kind,
                names,
                serial,
                staple,
                clients,
            }),
            _ => Err(errors),
        }
    }

    /// The reason why clients would not accept it at this time, in seconds since 1970, if any.
    pub fn problem(&self, now: i64) -> Option<String> {
        if now > self.not_after {
            return Some(format!("it expired on {}", date(self.not_after)));
        }
        if now < self.not_before {
            return Some(format!("it is not valid before {}", date(self.not_before)));
        }
        let staple = self.staple.as_ref()?;
        (now > staple.next_update).then(|| format!("its staple expired on {}", date(staple.next_update)))
    }
}

/// The serial number of a certificate, in hexadecimal.
pub(super) fn serial(certificate: &X509) -> String {
    let number = certificate.serial_number().to_bn().and_then(|number| Ok(number.to_hex_str()?.to_string()));
    number.unwrap_or_default().to_ascii_lowercase()
}

/// A distinguished name in one line, such as `CN=Ada,O=Example`.
pub(super) fn text(name: &pingora::tls::x509::X509NameRef) -> String {
    let entries = name.entries().map(|entry| {
        let key = entry.object().nid().short_name().unwrap_or("?");
        let value = String::from_utf8_lossy(entry.data().as_slice()).into_owned();
        // Characters that would end the value are escaped (RFC 4514 §2.4).
        let escaped = value.replace('\\', "\\\\").replace(',', "\\,").replace('+', "\\+").replace('"', "\\\"");
        format!("{key}={escaped}")
    });
    entries.collect::<Vec<_>>().join(",")
}

/// `2026-11-29T16:00:00Z`.
pub fn date(seconds: i64) -> String {
    let since = std::time::Duration::from_secs(u64::try_from(seconds).unwrap_or(0).min(253_402_300_799));
    humantime::format_rfc3339_seconds(std::time::SystemTime::UNIX_EPOCH + since).to_string()
}

/// Seconds since 1970. The maximum for an unreadable time, which the library would have refused.
fn seconds(time: &Asn1TimeRef) -> i64 {
    let since = Asn1Time::from_unix(0).and_then(|epoch| epoch.diff(time));
    since.map_or(i64::MAX, |since| i64::from(since.days) * 86_400 + i64::from(since.secs))
}

/// The certificates in a file; at least one.
fn certificates(at: &str, path: &str, pem: &[u8]) -> Result<Vec<X509>, BuildError> {
    let wrong = |what: String| BuildError::new(at, format!("`{path}` {what}"));
    let begun = count(pem, b"-----BEGIN CERTIFICATE-----") + count(pem, b"-----BEGIN TRUSTED CERTIFICATE-----");
    if begun == 0 {
        return Err(wrong("holds no certificate in PEM".to_owned()));
    }
    let found =
        X509::stack_from_pem(pem).map_err(|_| wrong("holds a certificate that is cut short or garbled".to_owned()))?;
    // The library skips what it does not recognise.
    if found.len() == begun {
        return Ok(found);
    }
    Err(wrong("holds a certificate that is cut short or garbled".to_owned()))
}

fn private_key(path: &str, pem: &[u8]) -> Result<PKey<Private>, BuildError> {
    let wrong = |what: &str| BuildError::new("key", format!("`{path}` {what}"));
    if count(pem, b"PRIVATE KEY-----") == 0 {
        return Err(wrong("holds no private key in PEM"));
    }
    if count(pem, b"BEGIN ENCRYPTED PRIVATE KEY") + count(pem, b"Proc-Type: 4,ENCRYPTED") > 0 {
        return Err(wrong("is encrypted: remove its password, and allow only Forebay to read the file"));
    }
    // Without a callback the library would ask for a password at the terminal.
    PKey::private_key_from_pem_callback(pem, |_| Ok(0)).map_err(|_| wrong("holds a key that is cut short or garbled"))
}

fn kind(key: &PKey<Private>) -> Result<KeyKind, String> {
    match (key.id(), key.bits()) {
        (Id::EC, 256) => Ok(KeyKind::P256),
        (Id::EC, 384) => Ok(KeyKind::P384),
        (Id::EC, 521) => Ok(KeyKind::P521),
        (Id::ED25519, _) => Ok(KeyKind::Ed25519),
        (Id::RSA, RSA_BITS_MIN..) => Ok(KeyKind::Rsa),
        (Id::RSA, bits) => Err(format!("an RSA key of {bits} bits: at least {RSA_BITS_MIN} are needed")),
        _ => Err("a key of a kind that TLS has no use for: take ECDSA P-256 or RSA".to_owned()),
    }
}

/// The names that a certificate is used for, and the missing ones.
type Split = (Vec<Box<str>>, Vec<Box<str>>);

fn names(source: &Source, leaf: &X509) -> Result<Split, Vec<BuildError>> {
    if !source.names.is_empty() {
        let wrong = |index: usize, message| BuildError::new(format!("names[{index}]"), message);
        let checked =
            source.names.iter().enumerate().map(|(index, name)| host(name).map_err(|what| wrong(index, what)));
        let (good, bad): (Vec<_>, Vec<_>) = checked.partition(Result::is_ok);
        let bad: Vec<_> = bad.into_iter().filter_map(Result::err).collect();
        if !bad.is_empty() {
            return Err(bad);
        }
        let good = good.into_iter().flatten();
        if !source.issued {
            return Ok((good.collect(), Vec::new()));
        }
        let own = own_names(leaf);
        return Ok(good.partition(|name| own.contains(name)));
    }
    let names = own_names(leaf);
    if names.is_empty() {
        let message =
            format!("the certificate in `{}` is made out to no host: say with `names` which it is for", source.cert);
        return Err(vec![BuildError::new("cert", message)]);
    }
    Ok((names, Vec::new()))
}

/// The names that the certificate does not cover, directly or by a wildcard (RFC 9525 §6.3).
fn foreign(names: &[Box<str>], leaf: &X509) -> Vec<Box<str>> {
    let mut own = Names::default();
    for name in own_names(leaf) {
        own.insert(&name, ());
    }
    names.iter().filter(|name| own.find(name).is_none()).cloned().collect()
}

/// The names in a certificate.
fn own_names(leaf: &X509) -> Vec<Box<str>> {
    let alternatives = leaf.subject_alt_names();
    let mut names: Vec<Box<str>> = Vec::new();
    for alternative in alternatives.iter().flatten() {
        let name = alternative.dnsname().map(str::to_owned).or_else(|| alternative.ipaddress().and_then(address));
        let Some(name) = name.and_then(|name| host(&name).ok()) else { continue };
        if !names.contains(&name) {
            names.push(name);
        }
    }
    names
}

fn is_missing(path: &str) -> bool {
    use std::io::ErrorKind::{NotADirectory, NotFound};
    std::fs::metadata(path).is_err_and(|error| [NotFound, NotADirectory].contains(&error.kind()))
}

fn address(octets: &[u8]) -> Option<String> {
    match octets.len() {
        4 => Some(IpAddr::from(Ipv4Addr::from(<[u8; 4]>::try_from(octets).ok()?)).to_string()),
        16 => Some(IpAddr::from(Ipv6Addr::from(<[u8; 16]>::try_from(octets).ok()?)).to_string()),
        _ => None,
    }
}

/// A host name in look-up form: in lower case, with an optional `*` as its first label.
pub(super) fn host(written: &str) -> Result<Box<str>, String> {
    let name = written.strip_suffix('.').unwrap_or(written).to_ascii_lowercase();
    let rest = name.strip_prefix("*.").unwrap_or(&name);
    let is_label = |label: &str| {
        !label.is_empty()
            && label.len() <= 63
            && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_".contains(&byte))
    };
    if rest.parse::<IpAddr>().is_ok() || (name.len() <= 253 && rest.split('.').all(is_label)) {
        return Ok(name.into());
    }
    Err(format!("`{written}` is not a valid host name: write one such as `shop.example.com` or `*.example.com`"))
}

fn count(text: &[u8], what: &[u8]) -> usize {
    memchr::memmem::find_iter(text, what).count()
}

/// A complete file, in memory that is overwritten when it is freed.
pub(super) fn read(at: &str, path: &str, max: u64) -> Result<Zeroizing<Vec<u8>>, BuildError> {
    let wrong = |what: String| BuildError::new(at, format!("`{path}` {what}"));
    let (file, length) = file::open(Path::new(path)).map_err(|error| wrong(format!("cannot be read: {error}")))?;
    // Allocates the full size at once: growing a vector would leave copies of parts of a key.
    let room = usize::try_from(length.min(max)).unwrap_or(usize::MAX).saturating_add(1);
    let mut bytes = Zeroizing::new(Vec::with_capacity(room));
    file.take(max + 1).read_to_end(&mut bytes).map_err(|error| wrong(format!("cannot be read: {error}")))?;
    if bytes.len() as u64 > max {
        return Err(wrong(format!("is larger than {}", crate::config::units::Size(max))));
    }
    Ok(bytes)
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    use std::process::Command;

    use crate::config::listener::tls::ClientCertificates;

    /// Writes a certificate for these names, with a key of this kind, into `dir`.
    pub fn issue(dir: &Path, file: &str, names: &[&str]) -> Source {
        let key = rcgen::KeyPair::generate().expect("a key");
        let names: Vec<String> = names.iter().map(ToString::to_string).collect();
        let params = rcgen::CertificateParams::new(names).expect("parameters");
        let (cert, pem) = (params.self_signed(&key).expect("a certificate"), key.serialize_pem());
        Source {
            cert: put(dir, &format!("{file}.pem"), cert.pem().as_bytes()),
            key: put(dir, &format!("{file}.key"), pem.as_bytes()),
            names: Vec::new(),
            staple: None,
            client: None,
            issued: false,
        }
    }

    pub fn put(dir: &Path, name: &str, bytes: &[u8]) -> String {
        let path = dir.join(name);
        std::fs::write(&path, bytes).expect("a file");
        path.display().to_string()
    }

    pub fn load(written: &Source) -> Result<Loaded, Vec<String>> {
        let loaded = Files::read(written).and_then(|files| Loaded::parse(written, &files));
        loaded.map_err(|errors| errors.iter().map(ToString::to_string).collect())
    }

    fn openssl(arguments: &[&str]) -> Vec<u8> {
        let output = Command::new("openssl").args(arguments).output().expect("openssl runs");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        output.stdout
    }

    #[test]
    fn a_certificate_is_used_for_the_names_in_it_or_those_that_are_written() {
        let dir = tempfile::tempdir().expect("a directory");
        let mut written = issue(dir.path(), "a", &["Shop.Example.com", "*.example.com", "10.0.0.1"]);
        let loaded = load(&written).expect("a certificate");
        let names: Vec<&str> = loaded.names.iter().map(|name| &**name).collect();
        assert_eq!(names, ["shop.example.com", "*.example.com", "10.0.0.1"]);
        assert_eq!(loaded.kind, KeyKind::P256);

        assert_eq!(loaded.foreign, []);
        written.names = vec!["B.test.".to_owned()];
        let loaded = load(&written).expect("a certificate");
        assert_eq!((&loaded.names[..], &loaded.foreign[..]), (&["b.test".into()][..], &["b.test".into()][..]));
        for (name, foreign) in [
            ("shop.example.com", false),
            ("a.example.com", false),
            ("*.example.com", false),
            ("example.com", true),
            ("a.b.example.com", true),
            ("*.b.example.com", true),
            ("10.0.0.1", false),
            ("10.0.0.2", true),
        ] {
            written.names = vec![name.to_owned()];
            assert_eq!(load(&written).expect("a certificate").foreign.len(), usize::from(foreign), "{name}");
        }
        written.names = vec!["good.test".to_owned(), "a b".to_owned(), "a.*.test".to_owned()];
        assert_eq!(
            load(&written).err().expect("an error"),
            [
                "names[1]: `a b` is not a valid host name: write one such as `shop.example.com` or `*.example.com`",
                "names[2]: `a.*.test` is not a valid host name: write one such as `shop.example.com` or `*.example.com`"
            ]
        );
        let nameless = issue(dir.path(), "nameless", &[]);
        let told = load(&nameless).err().expect("an error");
        assert!(told[0].ends_with("is made out to no host: say with `names` which it is for"), "{told:?}");
    }

    #[test]
    fn files_that_are_not_what_they_should_be_are_told_with_their_place() {
        let dir = tempfile::tempdir().expect("a directory");
        let (one, two) = (issue(dir.path(), "one", &["a.test"]), issue(dir.path(), "two", &["a.test"]));
        let told = |cert: &str, key: &str| {
            let written = Source { cert: cert.to_owned(), key: key.to_owned(), ..one.clone() };
            load(&written).err().unwrap_or_default()
        };
        let text = |path: &str| std::fs::read(path).expect("a file");
        let part = |path: &str, share: usize| text(path)[..text(path).len() * share / 100].to_vec();
        assert_eq!(told(&one.cert, &one.key), [""; 0]);
        assert_eq!(
            told(&one.cert, &two.key),
            [format!("key: `{}` is not the key of the first certificate in `{}`", two.key, one.cert)]
        );
        let nonsense = put(dir.path(), "nonsense", b"no PEM at all");
        assert_eq!(
            told(&nonsense, &nonsense),
            [
                format!("cert: `{nonsense}` holds no certificate in PEM"),
                format!("key: `{nonsense}` holds no private key in PEM")
            ]
        );
        let (cut, cut_key) =
            (put(dir.path(), "cut", &part(&one.cert, 60)), put(dir.path(), "cut.key", &part(&one.key, 60)));
        assert_eq!(
            told(&cut, &cut_key),
            [
                format!("cert: `{cut}` holds a certificate that is cut short or garbled"),
                format!("key: `{cut_key}` holds no private key in PEM")
                    .replace("holds no private key in PEM", "holds a key that is cut short or garbled"),
            ]
        );
        // The second certificate of a chain is truncated: the library alone would have skipped it.
        let half = put(dir.path(), "half", &[text(&one.cert), part(&two.cert, 60)].concat());
        assert_eq!(told(&half, &one.key), [format!("cert: `{half}` holds a certificate that is cut short or garbled")]);
        let wrong_order = put(dir.path(), "order", &[text(&two.cert), text(&one.cert)].concat());
        assert_eq!(
            told(&wrong_order, &one.key),
            [format!("key: `{}` is the key of a certificate in `{wrong_order}` that must stand first", one.key)]
        );
        let missing = dir.path().join("missing").display().to_string();
        assert_eq!(
            told(&missing, &one.key),
            [format!("cert: `{missing}` cannot be read: No such file or directory (os error 2)")]
        );

        let key = dir.path().join("encrypted.key").display().to_string();
        openssl(&["pkey", "-in", &one.key, "-aes128", "-passout", "pass:secret", "-out", &key]);
        let encrypted =
            format!("key: `{key}` is encrypted: remove its password, and allow only Forebay to read the file");
        assert_eq!(told(&one.cert, &key), [encrypted]);
    }

    #[test]
    fn keys_that_clients_would_not_take_are_refused() {
        let dir = tempfile::tempdir().expect("a directory");
        let made = |kind: &[&str]| {
            let (cert, key) = (dir.path().join("made.pem"), dir.path().join("made.key"));
            let (cert, key) = (cert.display().to_string(), key.display().to_string());
            let base = ["req", "-x509", "-nodes", "-subj", "/CN=a.test", "-addext", "subjectAltName=DNS:a.test"];
            openssl(&[&base[..], &["-keyout", &key, "-out", &cert], kind].concat());
            let written = Source { cert, key, names: Vec::new(), staple: None, client: None, issued: false };
            load(&written).map(|loaded| loaded.kind)
        };
        assert_eq!(made(&["-newkey", "rsa:2048"]), Ok(KeyKind::Rsa));
        assert_eq!(made(&["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-384"]), Ok(KeyKind::P384));
        assert_eq!(made(&["-newkey", "ed25519"]), Ok(KeyKind::Ed25519));
        let weak = made(&["-newkey", "rsa:1024"]).expect_err("an error");
        assert!(weak[0].ends_with("is an RSA key of 1024 bits: at least 2048 are needed"), "{weak:?}");
        let odd = made(&["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:secp224r1"]).expect_err("an error");
        assert!(odd[0].contains("take ECDSA P-256 or RSA"), "{odd:?}");
    }

    #[test]
    fn what_is_asked_of_clients_is_told_apart_by_its_contents() {
        let dir = tempfile::tempdir().expect("a directory");
        let (one, two) = (issue(dir.path(), "one", &["a.test"]), issue(dir.path(), "two", &["b.test"]));
        let with = |client: Option<ClientCertificates>| {
            let written = Source { client, ..one.clone() };
            Files::read(&written).expect("files").policy(&written)
        };
        let asks = |mode, ca: &str| Some(ClientCertificates { mode, ca: ca.to_owned(), crl: None });
        assert_eq!(with(None), None);
        let required = with(asks(ClientMode::Required, &one.cert));
        assert_eq!(with(asks(ClientMode::Required, &one.cert)), required);
        assert_ne!(with(asks(ClientMode::Optional, &one.cert)), required);
        assert_ne!(with(asks(ClientMode::Required, &two.cert)), required);
    }

    #[test]
    fn the_time_of_a_certificate_is_read_and_its_end_is_told() {
        let dir = tempfile::tempdir().expect("a directory");
        let key = rcgen::KeyPair::generate().expect("a key");
        let mut params = rcgen::CertificateParams::new(vec!["a.test".to_owned()]).expect("parameters");
        params.not_before = rcgen::date_time_ymd(2020, 1, 1);
        params.not_after = rcgen::date_time_ymd(2021, 1, 1);
        let cert = params.self_signed(&key).expect("a certificate");
        let written = Source {
            cert: put(dir.path(), "old.pem", cert.pem().as_bytes()),
            key: put(dir.path(), "old.key", key.serialize_pem().as_bytes()),
            names: Vec::new(),
            staple: None,
            client: None,
            issued: false,
        };
        let loaded = load(&written).expect("a certificate");
        assert_eq!((loaded.not_before, loaded.not_after), (1_577_836_800, 1_609_459_200));
        assert_eq!(loaded.problem(1_600_000_000), None);
        assert_eq!(loaded.problem(1_700_000_000).as_deref(), Some("it expired on 2021-01-01T00:00:00Z"));
        assert_eq!(loaded.problem(1_500_000_000).as_deref(), Some("it is not valid before 2020-01-01T00:00:00Z"));
    }
}
