//! TLS clients: each states what it offers and reports the result, with the certificates it trusts and presents.

use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use pingora::tls::ssl::{
    SslConnector, SslFiletype, SslMethod, SslSession, SslSessionCacheMode, SslStream, SslVerifyMode, SslVersion,
    StatusType,
};
use socket2::{Domain, Socket, Type};

use super::DEADLINE;
use super::secure::{Authority, Identity};

/// The settings of a client.
#[derive(Clone)]
pub struct Tls {
    address: SocketAddr,
    own: Option<Ipv4Addr>,
    name: Option<String>,
    verifies: bool,
    authority: PathBuf,
    version: Option<SslVersion>,
    rsa_only: bool,
    alpn: &'static [u8],
    identity: Option<Identity>,
    session: Option<SslSession>,
    before: Vec<u8>,
    drip: bool,
}

/// An established connection.
pub struct Secured {
    stream: SslStream<Tap>,
    session: Arc<Mutex<Option<SslSession>>>,
}

/// A parsed response.
#[derive(Debug)]
pub struct Got {
    /// Its status.
    pub status: u16,
    /// The whole header as text.
    pub head: String,
    /// Its body.
    pub body: String,
}

/// A socket that counts received records, and optionally sends its ClientHello byte by byte.
struct Tap {
    socket: TcpStream,
    crumbs: usize,
    seen: Vec<u8>,
}

impl Read for Tap {
    fn read(&mut self, space: &mut [u8]) -> io::Result<usize> {
        let read = self.socket.read(space)?;
        self.seen.extend_from_slice(&space[..read]);
        Ok(read)
    }
}

impl Write for Tap {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.crumbs == 0 || bytes.is_empty() {
            return self.socket.write(bytes);
        }
        self.crumbs -= 1;
        std::thread::sleep(Duration::from_micros(200));
        self.socket.write(&bytes[..1])
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Tls {
    /// A client that trusts this authority and sends this name.
    pub fn to(address: SocketAddr, authority: &Authority, name: &str) -> Tls {
        Tls::trusting(address, &authority.file(), name)
    }

    /// A client that trusts certificates below the root in this file, and sends this name.
    pub fn trusting(address: SocketAddr, root: &Path, name: &str) -> Tls {
        Tls {
            address,
            own: None,
            name: Some(name.to_owned()),
            verifies: true,
            authority: root.to_owned(),
            version: None,
            rsa_only: false,
            alpn: b"\x08http/1.1",
            identity: None,
            session: None,
            before: Vec::new(),
            drip: false,
        }
    }

    /// Uses this local address.
    pub fn from(mut self, own: Ipv4Addr) -> Tls {
        self.own = Some(own);
        self
    }

    /// Sends no name, and accepts any certificate.
    pub fn nameless(mut self) -> Tls {
        self.name = None;
        self.unverified()
    }

    /// Accepts any certificate.
    pub fn unverified(mut self) -> Tls {
        self.verifies = false;
        self
    }

    /// Offers only this version.
    pub fn version(mut self, version: SslVersion) -> Tls {
        self.version = Some(version);
        self
    }

    /// Can verify only RSA signatures.
    pub fn rsa_only(mut self) -> Tls {
        self.rsa_only = true;
        self
    }

    /// Offers these protocols, in wire format.
    pub fn alpn(mut self, offered: &'static [u8]) -> Tls {
        self.alpn = offered;
        self
    }

    /// Presents this certificate on request.
    pub fn showing(mut self, identity: &Identity) -> Tls {
        self.identity = Some(identity.clone());
        self
    }

    /// Resumes this session.
    pub fn resuming(mut self, session: SslSession) -> Tls {
        self.session = Some(session);
        self
    }

    /// Sends these bytes before TLS.
    pub fn after(mut self, bytes: impl Into<Vec<u8>>) -> Tls {
        self.before = bytes.into();
        self
    }

    /// Sends its ClientHello byte by byte.
    pub fn dripping(mut self) -> Tls {
        self.drip = true;
        self
    }

    /// Performs the handshake.
    ///
    /// # Errors
    ///
    /// The library's error, which names the server's alert.
    pub fn connect(&self) -> Result<Secured, String> {
        let mut connector = SslConnector::builder(SslMethod::tls()).expect("TLS");
        connector.set_ca_file(&self.authority).expect("an authority");
        connector.set_min_proto_version(self.version).expect("a version");
        connector.set_max_proto_version(self.version).expect("a version");
        if self.rsa_only {
            connector.set_sigalgs_list("rsa_pss_rsae_sha256:rsa_pkcs1_sha256").expect("schemes");
        }
        connector.set_alpn_protos(self.alpn).expect("protocols");
        if let Some(identity) = &self.identity {
            connector.set_certificate_chain_file(&identity.certificate).expect("a certificate");
            connector.set_private_key_file(&identity.key, SslFiletype::PEM).expect("a key");
        }
        // In the context's own cache, a session would be dropped with its context.
        connector.set_session_cache_mode(SslSessionCacheMode::CLIENT | SslSessionCacheMode::NO_INTERNAL);
        let session = Arc::new(Mutex::new(None));
        let kept = session.clone();
        connector.set_new_session_callback(move |_, session| *kept.lock().unwrap() = Some(session));
        if !self.verifies {
            connector.set_verify(SslVerifyMode::NONE);
        }
        let mut configured = connector.build().configure().expect("a configuration");
        configured.set_status_type(StatusType::OCSP).expect("to ask for a staple");
        configured.set_use_server_name_indication(self.name.is_some());
        configured.set_verify_hostname(self.verifies);
        if let Some(session) = &self.session {
            // SAFETY: a session is used by one connection at a time.
            unsafe { configured.set_session(session).expect("a session") };
        }
        let socket = Socket::new(Domain::for_address(self.address), Type::STREAM, None).expect("a socket");
        if let Some(own) = self.own {
            socket.bind(&SocketAddr::from((own, 0)).into()).expect("an address of this machine");
        }
        socket.connect(&self.address.into()).map_err(|error| error.to_string())?;
        let mut socket = TcpStream::from(socket);
        socket.set_nodelay(true).expect("no delay");
        socket.set_read_timeout(Some(DEADLINE)).expect("a read timeout");
        socket.set_write_timeout(Some(DEADLINE)).expect("a write timeout");
        socket.write_all(&self.before).expect("the gateway to take bytes");
        let tap = Tap { socket, crumbs: if self.drip { 400 } else { 0 }, seen: Vec::new() };
        let name = self.name.as_deref().unwrap_or("nobody.test");
        let stream = configured.connect(name, tap).map_err(|error| error.to_string())?;
        Ok(Secured { stream, session })
    }

    /// Requests a path over a connection that is closed afterwards.
    ///
    /// # Errors
    ///
    /// As [`Tls::connect`], or an error of the request.
    pub fn get(&self, path: &str) -> Result<(Got, Secured), String> {
        let mut connection = self.connect()?;
        let name = self.name.as_deref().unwrap_or("nobody.test");
        let got = connection.ask(&format!("GET {path} HTTP/1.1\r\nHost: {name}\r\nConnection: close\r\n\r\n"))?;
        Ok((got, connection))
    }
}

impl Read for Secured {
    fn read(&mut self, space: &mut [u8]) -> io::Result<usize> {
        self.stream.read(space)
    }
}

impl Write for Secured {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.stream.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.stream.flush()
    }
}

impl Secured {
    /// The negotiated version.
    pub fn version(&self) -> &'static str {
        self.stream.ssl().version_str()
    }

    /// The negotiated protocol.
    pub fn alpn(&self) -> Option<Vec<u8>> {
        self.stream.ssl().selected_alpn_protocol().map(<[u8]>::to_vec)
    }

    /// Whether a session was resumed.
    pub fn resumed(&self) -> bool {
        self.stream.ssl().session_reused()
    }

    /// The stapled OCSP response.
    pub fn staple(&self) -> Option<Vec<u8>> {
        self.stream.ssl().ocsp_status().map(<[u8]>::to_vec)
    }

    /// The key exchange group.
    pub fn group(&self) -> Option<&'static str> {
        self.stream.ssl().curve_name()
    }

    /// The serial number of the server's certificate, in hexadecimal.
    pub fn serial(&self) -> String {
        let shown = self.stream.ssl().peer_certificate().expect("a certificate of the server");
        shown.serial_number().to_bn().and_then(|number| number.to_hex_str()).expect("a number").to_string()
    }

    /// The server's certificate, in DER.
    pub fn certificate(&self) -> Vec<u8> {
        let shown = self.stream.ssl().peer_certificate().expect("a certificate of the server");
        shown.to_der().expect("DER")
    }

    /// Whether the server's certificate has an RSA key.
    pub fn is_rsa(&self) -> bool {
        let shown = self.stream.ssl().peer_certificate().expect("a certificate of the server");
        shown.public_key().expect("a key").rsa().is_ok()
    }

    /// The session, for resumption.
    ///
    /// # Panics
    ///
    /// If the server sent no ticket.
    pub fn session(&self) -> SslSession {
        if self.version() == "TLSv1.2" {
            // The callback is not called for a renewed TLS 1.2 ticket.
            return self.stream.ssl().session().expect("a session").to_owned();
        }
        self.session.lock().unwrap().take().expect("a ticket")
    }

    /// Sends bytes.
    pub fn send(&mut self, bytes: impl AsRef<[u8]>) {
        self.stream.write_all(bytes.as_ref()).expect("the gateway to take bytes");
    }

    /// Reads this many bytes.
    pub fn bytes(&mut self, count: usize) -> Vec<u8> {
        let mut bytes = vec![0; count];
        self.stream.read_exact(&mut bytes).expect("bytes");
        bytes
    }

    /// Reads to the end; `true`: the server sent `close_notify`.
    pub fn rest(&mut self) -> (Vec<u8>, bool) {
        let (mut all, mut space) = (Vec::new(), [0; 16384]);
        while let Ok(length @ 1..) = self.stream.read(&mut space) {
            all.extend_from_slice(&space[..length]);
        }
        let said = self.stream.get_shutdown().contains(pingora::tls::ssl::ShutdownState::RECEIVED);
        (all, said)
    }

    /// Resets the list of received records.
    pub fn forget_records(&mut self) {
        self.stream.get_mut().seen.clear();
    }

    /// The lengths of the received records.
    pub fn records(&self) -> Vec<usize> {
        let (mut rest, mut lengths) = (&self.stream.get_ref().seen[..], Vec::new());
        while let [_, _, _, high, low, after @ ..] = rest {
            let length = usize::from(u16::from_be_bytes([*high, *low]));
            lengths.push(length);
            rest = after.get(length..).unwrap_or_default();
        }
        lengths
    }

    /// Sends a request and reads a response with a length.
    ///
    /// # Errors
    ///
    /// What was received instead.
    pub fn ask(&mut self, request: &str) -> Result<Got, String> {
        self.stream.write_all(request.as_bytes()).map_err(|error| error.to_string())?;
        let mut read = Vec::new();
        loop {
            if let Some(end) = read.windows(4).position(|four| four == b"\r\n\r\n") {
                let head = String::from_utf8_lossy(&read[..end + 4]).into_owned();
                let length = head.lines().find_map(|line| {
                    let (name, value) = line.split_once(':')?;
                    name.eq_ignore_ascii_case("content-length").then(|| value.trim().parse::<usize>().ok())?
                });
                let length = length.unwrap_or(0);
                if read.len() >= end + 4 + length {
                    let status = head.split(' ').nth(1).and_then(|status| status.parse().ok());
                    let body = String::from_utf8_lossy(&read[end + 4..end + 4 + length]).into_owned();
                    return Ok(Got { status: status.unwrap_or(0), head, body });
                }
            }
            let mut space = [0; 4096];
            match self.stream.read(&mut space) {
                Ok(0) => return Err(format!("the end after {:?}", String::from_utf8_lossy(&read))),
                Ok(length) => read.extend_from_slice(&space[..length]),
                Err(error) => return Err(format!("{error} after {:?}", String::from_utf8_lossy(&read))),
            }
        }
    }
}

/// The keys of this certificate for a configuration: `cert: …, key: …`.
pub fn pair(identity: &Identity) -> String {
    format!("cert: \"{}\", key: \"{}\"", identity.certificate.display(), identity.key.display())
}

/// Replaces a certificate and its key like an ACME client: new files beside the old ones, then renamed.
pub fn replace(old: &Identity, new: &Identity) {
    for (from, to) in [(&new.certificate, &old.certificate), (&new.key, &old.key)] {
        swap_file(from, to);
    }
}

/// Atomically replaces a file by the content of another one.
pub fn swap_file(from: &Path, to: &Path) {
    let beside = to.with_extension("new");
    std::fs::copy(from, &beside).expect("a copy");
    std::fs::rename(&beside, to).expect("to take its place");
}
