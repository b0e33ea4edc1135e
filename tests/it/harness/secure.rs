//! A backend behind TLS, a unix socket or the PROXY protocol, and certificate authorities.
//!
//! It responds to each request with facts about its connection, as JSON: the SNI, the client certificate, the
//! negotiated protocol, and the PROXY protocol header.

use std::fs;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use pingora::tls::nid::Nid;
use pingora::tls::ssl::{self, AlpnError, NameType, SslAcceptor, SslFiletype, SslMethod, SslRef, SslVerifyMode};
use pingora::tls::x509::X509;
use ppp::v2::{Addresses, Command, Header};
use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, DnType, IsCa, Issuer, KeyIdMethod, KeyPair,
    RevokedCertParams,
};
use serde_json::{Value, json};
use tempfile::TempDir;

/// A certificate authority with a directory for its files.
pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
    issued: AtomicUsize,
    dir: TempDir,
}

/// Files of a certificate and its key.
#[derive(Clone)]
pub struct Identity {
    /// The certificate.
    pub certificate: PathBuf,
    /// Its key.
    pub key: PathBuf,
}

impl Authority {
    /// A new authority.
    pub fn new() -> Authority {
        let (dir, key) = (tempfile::tempdir().expect("a directory"), KeyPair::generate().expect("a key"));
        let mut params = CertificateParams::new(Vec::new()).expect("parameters");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name.push(DnType::CommonName, "an authority of a test");
        let certificate = params.self_signed(&key).expect("its certificate");
        fs::write(dir.path().join("ca.pem"), certificate.pem()).expect("a file");
        fs::write(dir.path().join("ca.key"), key.serialize_pem()).expect("a file");
        Authority { issuer: Issuer::new(params, key), issued: AtomicUsize::new(0), dir }
    }

    /// The file of its CA certificate.
    pub fn file(&self) -> PathBuf {
        self.dir.path().join("ca.pem")
    }

    /// Its CA certificate and key.
    pub fn identity(&self) -> Identity {
        Identity { certificate: self.file(), key: self.dir.path().join("ca.key") }
    }

    /// Issues a certificate for a server or a client with these names; the first is also the common name.
    pub fn issue(&self, names: &[&str]) -> Identity {
        self.issue_with(names, KeyPair::generate().expect("a key"))
    }

    /// The same with an RSA key.
    pub fn issue_rsa(&self, names: &[&str]) -> Identity {
        let made = process::Command::new("openssl")
            .args(["genpkey", "-quiet", "-algorithm", "RSA", "-pkeyopt", "rsa_keygen_bits:2048"])
            .output()
            .expect("openssl runs");
        let pem = String::from_utf8(made.stdout).expect("PEM");
        self.issue_with(names, KeyPair::from_pem_and_sign_algo(&pem, &rcgen::PKCS_RSA_SHA256).expect("a key of RSA"))
    }

    /// A certificate that is valid from January 1 of one year to January 1 of another, with its key, in PEM.
    pub fn issue_for_years(&self, name: &str, [from, to]: [i32; 2]) -> String {
        let key = KeyPair::generate().expect("a key");
        let mut params = CertificateParams::new(vec![name.to_owned()]).expect("parameters");
        (params.not_before, params.not_after) = (rcgen::date_time_ymd(from, 1, 1), rcgen::date_time_ymd(to, 1, 1));
        params.signed_by(&key, &self.issuer).expect("a certificate").pem() + &key.serialize_pem()
    }

    /// A revocation list in PEM, in a file with this name.
    pub fn revoking(&self, name: &str, revoked: &[&Identity]) -> PathBuf {
        let entry = |identity: &&Identity| {
            let pem = fs::read(&identity.certificate).expect("a certificate");
            let serial = X509::from_pem(&pem).and_then(|one| one.serial_number().to_bn()).expect("a number").to_vec();
            RevokedCertParams {
                serial_number: serial.into(),
                revocation_time: rcgen::date_time_ymd(2025, 1, 1),
                reason_code: None,
                invalidity_date: None,
            }
        };
        let list = CertificateRevocationListParams {
            this_update: rcgen::date_time_ymd(2025, 1, 1),
            next_update: rcgen::date_time_ymd(2049, 1, 1),
            crl_number: 1_u64.into(),
            issuing_distribution_point: None,
            revoked_certs: revoked.iter().map(entry).collect(),
            key_identifier_method: KeyIdMethod::Sha256,
        };
        let path = self.dir.path().join(name);
        let pem = list.signed_by(&self.issuer).and_then(|list| list.pem()).expect("a list");
        fs::write(&path, pem).expect("a file");
        path
    }

    fn issue_with(&self, names: &[&str], key: KeyPair) -> Identity {
        let names: Vec<String> = names.iter().map(ToString::to_string).collect();
        let number = self.issued.fetch_add(1, Ordering::Relaxed);
        // Each certificate has its own files, even if names are repeated.
        let file = self.dir.path().join(format!("{}-{number}", names[0].replace([':', '*'], "_")));
        let mut params = CertificateParams::new(names.clone()).expect("parameters");
        params.distinguished_name.push(DnType::CommonName, &*names[0]);
        let signed = params.signed_by(&key, &self.issuer).expect("a certificate");
        let named = |what: &str| PathBuf::from(format!("{}.{what}", file.display()));
        let identity = Identity { certificate: named("cert.pem"), key: named("key.pem") };
        fs::write(&identity.certificate, signed.pem()).expect("a file");
        fs::write(&identity.key, key.serialize_pem()).expect("a file");
        identity
    }
}

/// The layers between the origin's socket and HTTP.
#[derive(Clone)]
pub struct Layers {
    tls: Option<Arc<SslAcceptor>>,
    proxy: bool,
}

impl Layers {
    /// No layers.
    pub fn none() -> Layers {
        Layers { tls: None, proxy: false }
    }

    /// TLS with this identity; negotiates HTTP/1.1.
    pub fn tls(identity: &Identity) -> Layers {
        Layers::with_tls(identity, None)
    }

    /// TLS with this identity, which requires a client certificate from this authority.
    pub fn mutual_tls(identity: &Identity, authority: &Authority) -> Layers {
        Layers::with_tls(identity, Some(authority))
    }

    /// Expects the PROXY protocol first.
    pub fn introduced(mut self) -> Layers {
        self.proxy = true;
        self
    }

    fn with_tls(identity: &Identity, clients: Option<&Authority>) -> Layers {
        let mut acceptor = SslAcceptor::mozilla_intermediate_v5(SslMethod::tls()).expect("TLS");
        acceptor.set_certificate_chain_file(&identity.certificate).expect("a certificate");
        acceptor.set_private_key_file(&identity.key, SslFiletype::PEM).expect("a key");
        acceptor.set_alpn_select_callback(|_, offered| {
            ssl::select_next_proto(b"\x08http/1.1", offered).ok_or(AlpnError::NOACK)
        });
        if let Some(authority) = clients {
            acceptor.set_ca_file(authority.file()).expect("an authority");
            acceptor.set_verify(SslVerifyMode::PEER | SslVerifyMode::FAIL_IF_NO_PEER_CERT);
        }
        Layers { tls: Some(Arc::new(acceptor.build())), proxy: false }
    }
}

/// An origin with such layers.
pub struct Secure {
    address: String,
    connections: Arc<AtomicUsize>,
}

impl Secure {
    /// Listens on a loopback port.
    pub fn start(layers: Layers) -> Secure {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port for the origin");
        let address = listener.local_addr().expect("its address").to_string();
        Secure::serve(address, layers, move || listener.accept().map(|(stream, _)| stream))
    }

    /// Listens on a unix socket at this path.
    pub fn on_unix(path: &Path, layers: Layers) -> Secure {
        let listener = UnixListener::bind(path).expect("a unix socket for the origin");
        let address = format!("unix:{}", path.display());
        Secure::serve(address, layers, move || listener.accept().map(|(stream, _)| stream))
    }

    fn serve<S: Read + Write + Send + 'static>(
        address: String,
        layers: Layers,
        accept: impl Fn() -> io::Result<S> + Send + 'static,
    ) -> Secure {
        let connections = Arc::<AtomicUsize>::default();
        let counted = connections.clone();
        thread::spawn(move || {
            while let Ok(stream) = accept() {
                let number = counted.fetch_add(1, Ordering::Relaxed) + 1;
                let layers = layers.clone();
                // A failed connection is up to the gateway; the story checks the effect.
                thread::spawn(move || converse(stream, &layers, number));
            }
        });
        Secure { address, connections }
    }

    /// Where it listens.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// The port it listens on.
    pub fn port(&self) -> u16 {
        self.address.parse::<SocketAddr>().expect("no unix socket").port()
    }

    /// Number of connections made to it.
    pub fn connections(&self) -> usize {
        self.connections.load(Ordering::Relaxed)
    }
}

fn converse<S: Read + Write>(mut stream: S, layers: &Layers, number: usize) -> Option<()> {
    let proxy = if layers.proxy { introduced(&mut stream)? } else { Value::Null };
    let mut facts = json!({ "connection": number, "proxy": proxy });
    match &layers.tls {
        None => answer(stream, &facts),
        Some(acceptor) => {
            let stream = acceptor.accept(stream).ok()?;
            facts["tls"] = agreed(stream.ssl());
            answer(stream, &facts)
        }
    }
}

/// The content of the PROXY protocol header.
fn introduced(stream: &mut impl Read) -> Option<Value> {
    let mut bytes = vec![0; 16];
    stream.read_exact(&mut bytes).ok()?;
    let length = u16::from_be_bytes([bytes[14], bytes[15]]);
    bytes.resize(16 + usize::from(length), 0);
    stream.read_exact(&mut bytes[16..]).ok()?;
    let header = Header::try_from(&bytes[..]).expect("a header of the PROXY protocol, version 2");
    let command = if header.command == Command::Local { "local" } else { "proxy" };
    Some(match header.addresses {
        Addresses::IPv4(it) => json!({
            "command": command,
            "client": SocketAddr::from((it.source_address, it.source_port)).to_string(),
            "gateway": SocketAddr::from((it.destination_address, it.destination_port)).to_string(),
        }),
        other => json!({ "command": command, "addresses": format!("{other:?}") }),
    })
}

fn agreed(ssl: &SslRef) -> Value {
    let shown = ssl.peer_certificate().and_then(|certificate| {
        let name = certificate.subject_name().entries_by_nid(Nid::COMMONNAME).next()?;
        Some(String::from_utf8_lossy(name.data().as_slice()).into_owned())
    });
    json!({
        "name": ssl.servername(NameType::HOST_NAME),
        "client": shown,
        "alpn": ssl.selected_alpn_protocol().map(String::from_utf8_lossy),
    })
}

/// Responds to requests without bodies until the peer closes.
fn answer(mut stream: impl Read + Write, facts: &Value) -> Option<()> {
    let body = facts.to_string();
    let answer = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{body}", body.len());
    let mut read = Vec::new();
    loop {
        let mut piece = [0; 4096];
        let count = stream.read(&mut piece).ok().filter(|count| *count > 0)?;
        read.extend_from_slice(&piece[..count]);
        if read.ends_with(b"\r\n\r\n") {
            read.clear();
            stream.write_all(answer.as_bytes()).ok()?;
            stream.flush().ok()?;
        }
    }
}
