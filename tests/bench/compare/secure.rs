//! TLS in the comparison: the certificates of the proxies, and a client with or without TLS.
//!
//! The clients here send a key share of X25519 and resume sessions only on request, so that all proxies do the same
//! work for a handshake, whatever else their libraries support.

use std::cell::Cell;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};
use pingora::tls::ssl::{SslConnector, SslMethod, SslSession, SslSessionCacheMode, SslStream, SslVerifyMode};
use tempfile::TempDir;

/// The name in the certificates and in SNI.
pub const NAME: &str = "bench.test";

/// Maximum time of a connect, a read or a write.
const PATIENCE: Duration = Duration::from_secs(10);

/// The type of a certificate's key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KeyKind {
    /// ECDSA with P-256.
    Ecdsa,
    /// RSA with 2,048 bits.
    Rsa,
}

/// A certificate and its key, in files that are removed on drop.
#[derive(Debug)]
pub struct Identity {
    /// The certificate.
    pub cert: PathBuf,
    /// Its key.
    pub key: PathBuf,
    /// Both in one file, for HAProxy.
    pub both: PathBuf,
    _dir: TempDir,
}

impl Identity {
    /// Creates a self-signed certificate.
    pub fn make(kind: KeyKind) -> Result<Identity> {
        let dir = tempfile::tempdir()?;
        let [cert, key, both] = ["cert.pem", "key.pem", "both.pem"].map(|name| dir.path().join(name));
        let algorithm: &[&str] = match kind {
            KeyKind::Ecdsa => &["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"],
            KeyKind::Rsa => &["-newkey", "rsa:2048"],
        };
        let made = Command::new("openssl")
            .args(["req", "-x509", "-nodes", "-days", "30", "-subj"])
            .arg(format!("/CN={NAME}"))
            .arg("-addext")
            .arg(format!("subjectAltName=DNS:{NAME}"))
            .args(algorithm)
            .args([Path::new("-keyout"), &key, Path::new("-out"), &cert])
            .output()
            .context("cannot start openssl, which `make bench` installs")?;
        ensure!(made.status.success(), "openssl: {}", String::from_utf8_lossy(&made.stderr));
        std::fs::write(&both, [std::fs::read(&cert)?, std::fs::read(&key)?].concat())?;
        Ok(Identity { cert, key, both, _dir: dir })
    }
}

/// A connection to a proxy.
pub enum Link {
    /// In clear text.
    Plain(TcpStream),
    /// Over TLS.
    Tls(Box<SslStream<TcpStream>>),
}

/// How a client connects.
#[derive(Clone, Default)]
pub struct Manner {
    /// Whether it uses TLS.
    pub tls: bool,
    /// The protocols that it offers by ALPN, in wire format; empty for none.
    pub alpn: &'static [u8],
    /// The session to resume.
    pub session: Option<SslSession>,
}

impl Manner {
    /// TLS or clear text, HTTP/1.1 without ALPN.
    pub fn of(tls: bool) -> Manner {
        Manner { tls, ..Manner::default() }
    }

    /// HTTP/2 over TLS.
    pub fn h2() -> Manner {
        Manner { tls: true, alpn: b"\x02h2", session: None }
    }

    /// Connects and performs the handshake.
    pub fn open(&self, address: SocketAddr) -> Result<Link> {
        self.secure(TcpStream::connect_timeout(&address, PATIENCE)?)
    }

    /// Performs the handshake on this connection, with blocking IO and time limits.
    pub fn secure(&self, socket: TcpStream) -> Result<Link> {
        socket.set_nodelay(true)?;
        socket.set_read_timeout(Some(PATIENCE))?;
        socket.set_write_timeout(Some(PATIENCE))?;
        if !self.tls {
            return Ok(Link::Plain(socket));
        }
        let mut asked = connector()?.configure()?.verify_hostname(false);
        if !self.alpn.is_empty() {
            asked.set_alpn_protos(self.alpn)?;
        }
        if let Some(session) = &self.session {
            // SAFETY: a session is used by one connection at a time.
            unsafe { asked.set_session(session)? };
        }
        let stream = asked.connect(NAME, socket).map_err(|error| anyhow!("the handshake failed: {error}"))?;
        Ok(Link::Tls(Box::new(stream)))
    }
}

thread_local! {
    /// The last session that a server has sent to a client of this thread.
    static TOLD: Cell<Option<SslSession>> = const { Cell::new(None) };
}

/// Takes the last session that a server has sent to a client of this thread. With TLS 1.3 it arrives with the first
/// response.
pub fn told_session() -> Option<SslSession> {
    TOLD.take()
}

fn connector() -> Result<&'static SslConnector> {
    static CONNECTOR: OnceLock<SslConnector> = OnceLock::new();
    if let Some(made) = CONNECTOR.get() {
        return Ok(made);
    }
    let mut connector = SslConnector::builder(SslMethod::tls())?;
    connector.set_verify(SslVerifyMode::NONE);
    // The first is that of the key share; the second is that of the certificates.
    connector.set_curves_list("X25519:P-256")?;
    // In the context's own cache, other connections would not find the session.
    connector.set_session_cache_mode(SslSessionCacheMode::CLIENT | SslSessionCacheMode::NO_INTERNAL);
    connector.set_new_session_callback(|_, session| TOLD.set(Some(session)));
    Ok(CONNECTOR.get_or_init(|| connector.build()))
}

impl Link {
    /// The underlying socket.
    pub fn socket(&self) -> &TcpStream {
        match self {
            Link::Plain(socket) => socket,
            Link::Tls(stream) => stream.get_ref(),
        }
    }
}

impl Read for Link {
    fn read(&mut self, space: &mut [u8]) -> io::Result<usize> {
        match self {
            Link::Plain(socket) => socket.read(space),
            Link::Tls(stream) => stream.read(space),
        }
    }
}

impl Write for Link {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Link::Plain(socket) => socket.write(bytes),
            Link::Tls(stream) => stream.write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
