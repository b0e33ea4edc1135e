//! TLS in the comparison: the certificates that the proxies show, and a client that speaks it or does not.
//!
//! Clients of ours send a key share of X25519 and resume no session unless they are to: all proxies then do the same
//! work for a handshake, whatever else their libraries know.

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

/// The name in the certificates, which our clients ask for.
pub const NAME: &str = "bench.test";

/// How long a connect, a read or a write may take.
const PATIENCE: Duration = Duration::from_secs(10);

/// What a certificate is signed with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KeyKind {
    /// ECDSA with P-256.
    Ecdsa,
    /// RSA with 2,048 bits.
    Rsa,
}

/// A certificate and its key, as files that go with it.
#[derive(Debug)]
pub struct Identity {
    /// The certificate.
    pub cert: PathBuf,
    /// Its key.
    pub key: PathBuf,
    /// Both in one file, as HAProxy wants them.
    pub both: PathBuf,
    _dir: TempDir,
}

impl Identity {
    /// One that is signed by itself.
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
    /// By TLS.
    Tls(Box<SslStream<TcpStream>>),
}

/// How a client connects.
#[derive(Clone, Default)]
pub struct Manner {
    /// Whether it speaks TLS.
    pub tls: bool,
    /// What it offers by ALPN, as it goes over the wire; nothing, if that is empty.
    pub alpn: &'static [u8],
    /// What it resumes.
    pub session: Option<SslSession>,
}

impl Manner {
    /// By TLS or in clear text, HTTP/1.1 without ALPN.
    pub fn of(tls: bool) -> Manner {
        Manner { tls, ..Manner::default() }
    }

    /// HTTP/2 over TLS.
    pub fn h2() -> Manner {
        Manner { tls: true, alpn: b"\x02h2", session: None }
    }

    /// Connects and shakes hands.
    pub fn open(&self, address: SocketAddr) -> Result<Link> {
        self.secure(TcpStream::connect_timeout(&address, PATIENCE)?)
    }

    /// Shakes hands on this connection. It waits for its socket, for so long.
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
    /// The session that a server has last told a client of this thread of.
    static TOLD: Cell<Option<SslSession>> = const { Cell::new(None) };
}

/// The session that a server has last told a client of this thread of, once. With TLS 1.3 it comes with the first
/// answer.
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
    // The first is the one of the key share; the second is that of the certificates.
    connector.set_curves_list("X25519:P-256")?;
    // Kept in the context's own cache it would be found by no other connection.
    connector.set_session_cache_mode(SslSessionCacheMode::CLIENT | SslSessionCacheMode::NO_INTERNAL);
    connector.set_new_session_callback(|_, session| TOLD.set(Some(session)));
    Ok(CONNECTOR.get_or_init(|| connector.build()))
}

impl Link {
    /// The socket beneath.
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
