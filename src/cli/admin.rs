//! A client for the admin endpoint of a running gateway, over TCP or its unix socket.

use std::io::{self, BufRead, BufReader, ErrorKind, Read, Write};
use std::net::{TcpStream, ToSocketAddrs};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;
use pingora::tls::ssl::{SslConnector, SslMethod, SslStream, SslVerifyMode};
use pingora::tls::x509::X509;

use super::{ConfigFile, Failure};
use crate::acme::plan::Plan;
use crate::config::server::Admin;
use crate::config::units::Size;
use crate::config::{Config, file};
use crate::gateway::Builder;

/// Time limit to connect, and for each read.
const DEADLINE: Duration = Duration::from_secs(5);

/// Largest certificate file that is read.
const CERTIFICATE_MAX: Size = Size::kib(1024);

/// Longest response that is read whole.
const ANSWER_BYTES_MAX: u64 = 64 << 20;

/// Selects the gateway.
#[derive(Args)]
pub struct Where {
    #[command(flatten)]
    config: ConfigFile,
    /// The admin address, such as 127.0.0.1:9100 or unix:/run/forebay.sock, instead of the configured one
    #[arg(long, value_name = "ADDRESS", conflicts_with = "path")]
    admin: Option<String>,
}

/// An admin endpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AdminEndpoint {
    /// `host:port`, or `unix:/path`.
    pub address: String,
    /// The token, if it requires one.
    pub token: Option<String>,
    /// Its certificate, if it uses TLS. Only this certificate is trusted.
    pub certificate: Option<PathBuf>,
}

/// A connection to the endpoint.
trait Socket: Read + Write + Send {}
impl<S: Read + Write + Send> Socket for S {}

/// The body of a response, as a stream.
type Reader = BufReader<Box<dyn Read + Send>>;

/// The body of a response, line by line.
pub type Lines = io::Lines<Reader>;

impl Where {
    /// The endpoint from the command line, else from the configuration.
    pub fn find(self, builder: &Builder) -> Result<AdminEndpoint, Failure> {
        if let Some(address) = self.admin {
            let address = address.trim_start_matches("http://").trim_end_matches('/').to_owned();
            return match address.starts_with("unix:/")
                || address.rsplit_once(':').is_some_and(|(host, _)| host != "unix")
            {
                true => Ok(AdminEndpoint { address, token: token_of_environment(), certificate: None }),
                false => Err(Failure::Usage(format!(
                    "`{address}` is not an admin address: write one like 127.0.0.1:9100 or unix:/run/forebay.sock"
                ))),
            };
        }
        let (path, config) = self.config.load(builder)?;
        if !config.admin.enabled {
            return Err(Failure::Runtime(format!("{}: the admin endpoint is off", path.display())));
        }
        Ok(AdminEndpoint::of(&config))
    }
}

impl Where {
    /// The same, but the configuration may have errors elsewhere: the command is to ask the running gateway about
    /// them.
    pub fn find_running(self, builder: &Builder) -> Result<AdminEndpoint, Failure> {
        if self.admin.is_some() {
            return self.find(builder);
        }
        let path = self.config.find()?;
        let admin = match builder.load(&path) {
            Ok(config) => {
                if !config.admin.enabled {
                    return Err(Failure::Runtime(format!("{}: the admin endpoint is off", path.display())));
                }
                return Ok(AdminEndpoint::of(&config));
            }
            Err(report) => admin_of_wrong(&path).ok_or(Failure::Report(report))?,
        };
        Ok(AdminEndpoint { address: reachable(&admin), token: token_of_environment(), certificate: None })
    }
}

/// The admin address in an invalid configuration, if it can be read; the default if there is none.
fn admin_of_wrong(path: &Path) -> Option<String> {
    let (written, is_whole) = Config::readable(path)?;
    let admin = written.get("admin");
    let address = admin.and_then(|admin| admin.get("address")).and_then(|address| address.as_str());
    let address = address.filter(|address| !address.contains("${"));
    match (admin.and_then(|admin| admin.get("address")), address) {
        (Some(_), None) => None,
        // The address may be in the part that cannot be read.
        (None, _) if !is_whole => None,
        (_, address) => Some(address.map_or_else(|| Admin::default().address.0, str::to_owned)),
    }
}

/// The address under which this machine reaches the endpoint: loopback instead of a wildcard address.
pub fn reachable(address: &str) -> String {
    match address.rsplit_once(':') {
        Some(("0.0.0.0", port)) => format!("127.0.0.1:{port}"),
        Some(("[::]", port)) => format!("[::1]:{port}"),
        _ => address.to_owned(),
    }
}

/// The token for an endpoint given by `--admin`.
fn token_of_environment() -> Option<String> {
    std::env::var("FOREBAY_ADMIN_TOKEN").ok().filter(|token| !token.is_empty())
}

impl AdminEndpoint {
    /// The endpoint of a configuration.
    pub fn of(config: &Config) -> Self {
        let admin = &config.admin;
        // Loading the configuration reports these errors.
        let sources = Plan::of(config).map(|plan| plan.admin).unwrap_or_default();
        AdminEndpoint {
            address: reachable(&admin.address.0),
            token: admin.token.clone().or_else(token_of_environment),
            certificate: sources.first().map(|source| PathBuf::from(&source.cert)),
        }
    }

    /// The response body of a GET. Errors are texts for the user.
    pub fn get(&self, target: &str) -> Result<Vec<u8>, String> {
        let mut body = Vec::new();
        let answer = self.ask("GET", target, DEADLINE)?;
        answer.take(ANSWER_BYTES_MAX).read_to_end(&mut body).map_err(|error| self.failed(&error))?;
        Ok(body)
    }

    /// Status and body of a POST, whatever the status. Each read may take `patience`.
    pub fn post_whole(&self, target: &str, patience: Duration) -> Result<(u16, Vec<u8>), String> {
        let mut body = Vec::new();
        let (status, answer) = self.answer("POST", target, patience)?;
        answer.take(ANSWER_BYTES_MAX).read_to_end(&mut body).map_err(|error| self.failed(&error))?;
        Ok((status, body))
    }

    /// The text for an unexpected response.
    pub fn said(&self, status: u16, target: &str, body: &[u8]) -> String {
        let said = serde_json::from_slice::<serde_json::Value>(body).ok();
        let said = said.and_then(|said| Some(format!(": {}", said["error"].as_str()?))).unwrap_or_default();
        format!("the admin endpoint at {} answers {status} to {target}{said}", self.address)
    }

    /// Whether a server answers at the address.
    pub fn is_there(&self) -> bool {
        self.connect(DEADLINE).is_ok()
    }

    /// The response of a POST, line by line. Each line may take `patience`.
    pub fn post(&self, target: &str, patience: Duration) -> Result<Lines, String> {
        Ok(self.ask("POST", target, patience)?.lines())
    }

    /// The text for an error while reading the response.
    pub fn failed(&self, error: &io::Error) -> String {
        let why = match error.kind() {
            ErrorKind::WouldBlock | ErrorKind::TimedOut => "it does not answer".to_owned(),
            _ => super::plain(error),
        };
        format!("the admin endpoint at {}: {why}", self.address)
    }

    fn ask(&self, method: &str, target: &str, patience: Duration) -> Result<Reader, String> {
        let (status, mut answer) = self.answer(method, target, patience)?;
        if (200..300).contains(&status) {
            return Ok(answer);
        }
        let mut said = Vec::new();
        // The body only adds detail to the status.
        let _ = answer.by_ref().take(4096).read_to_end(&mut said);
        Err(self.said(status, target, &said))
    }

    /// Status and body of a response. Uses HTTP/1.0, so that a body without a length ends with the connection.
    fn answer(&self, method: &str, target: &str, patience: Duration) -> Result<(u16, Reader), String> {
        let asked = (|| {
            let mut socket = self.connect(patience)?;
            let host = if self.address.starts_with("unix:") { "localhost" } else { &*self.address };
            let length = if method == "POST" { "Content-Length: 0\r\n" } else { "" };
            let token =
                self.token.as_ref().map(|token| format!("Authorization: Bearer {token}\r\n")).unwrap_or_default();
            write!(socket, "{method} {target} HTTP/1.0\r\nHost: {host}\r\n{token}{length}\r\n")?;
            let mut answer = BufReader::new(socket);
            let head = head(&mut answer)?;
            io::Result::Ok((head, answer))
        })();
        let (Head { status, length }, answer) = asked.map_err(|error| self.failed(&error))?;
        // The server may keep the connection open after a body with a length.
        Ok((status, BufReader::new(Box::new(answer.take(length.unwrap_or(u64::MAX))))))
    }

    fn connect(&self, patience: Duration) -> io::Result<Box<dyn Socket>> {
        if let Some(path) = self.address.strip_prefix("unix:") {
            let socket = UnixStream::connect(path)?;
            socket.set_read_timeout(Some(patience))?;
            socket.set_write_timeout(Some(DEADLINE))?;
            return Ok(Box::new(socket));
        }
        let mut last = io::Error::from(ErrorKind::AddrNotAvailable);
        for address in self.address.to_socket_addrs()? {
            match TcpStream::connect_timeout(&address, DEADLINE) {
                Ok(socket) => {
                    socket.set_read_timeout(Some(patience))?;
                    socket.set_write_timeout(Some(DEADLINE))?;
                    return match &self.certificate {
                        Some(file) => secure(socket, file).map(|socket| Box::new(socket) as Box<dyn Socket>),
                        None => Ok(Box::new(socket)),
                    };
                }
                Err(error) => last = error,
            }
        }
        Err(last)
    }
}

/// TLS handshake with a server that must present the certificate in this file. Its names are not checked because
/// the endpoint is addressed by IP address.
fn secure(socket: TcpStream, certificate: &Path) -> io::Result<SslStream<TcpStream>> {
    let pem = file::read(certificate, CERTIFICATE_MAX).map_err(|error| io::Error::other(error.to_string()))?;
    let expected = X509::from_pem(&pem)?;
    let mut connector = SslConnector::builder(SslMethod::tls())?;
    connector.set_verify(SslVerifyMode::NONE);
    let mut configured = connector.build().configure()?;
    configured.set_use_server_name_indication(true);
    configured.set_verify_hostname(false);
    let names = expected.subject_alt_names();
    let name = names.iter().flatten().find_map(|name| name.dnsname().map(|name| name.replace('*', "any")));
    let stream = configured.connect(name.as_deref().unwrap_or("admin.invalid"), socket).map_err(io::Error::other)?;
    let shown = stream.ssl().peer_certificate().map(|shown| shown.to_der()).transpose()?;
    if shown == Some(expected.to_der()?) { Ok(stream) } else { Err(io::Error::other("it shows another certificate")) }
}

/// The parts of a response header that are used.
#[derive(Debug, PartialEq)]
struct Head {
    status: u16,
    length: Option<u64>,
}

/// Parses a response header (RFC 9112 §4, §6.2).
fn head(answer: &mut impl BufRead) -> io::Result<Head> {
    const HEAD_BYTES_MAX: u64 = 64 << 10;
    let mut head = answer.take(HEAD_BYTES_MAX);
    let strange = || io::Error::other("this is not an HTTP answer");
    let mut line = Vec::new();
    head.read_until(b'\n', &mut line)?;
    let status = line.strip_prefix(b"HTTP/1.").and_then(|rest| rest.get(2..5)).ok_or_else(strange)?;
    let status = std::str::from_utf8(status).ok().and_then(|status| status.parse().ok()).ok_or_else(strange)?;
    let mut length = None;
    while !matches!(&line[..], b"\r\n" | b"\n") {
        line.clear();
        if head.read_until(b'\n', &mut line)? == 0 {
            return Err(strange());
        }
        let field = std::str::from_utf8(&line).ok().and_then(|line| line.split_once(':'));
        if let Some((_, value)) = field.filter(|(name, _)| name.eq_ignore_ascii_case("content-length")) {
            length = Some(value.trim().parse().map_err(|_| strange())?);
        }
    }
    Ok(Head { status, length })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_admin_endpoint_on_every_address_is_asked_on_loopback() {
        assert_eq!(reachable("0.0.0.0:9100"), "127.0.0.1:9100");
        assert_eq!(reachable("[::]:9100"), "[::1]:9100");
        assert_eq!(reachable("10.0.0.1:9100"), "10.0.0.1:9100");
        assert_eq!(reachable("unix:/run/admin.sock"), "unix:/run/admin.sock");
    }

    #[test]
    fn the_status_is_that_of_the_first_line_and_the_body_follows_the_header() {
        let mut answer = &b"HTTP/1.1 403 Forbidden\r\nA: b\r\ncontent-length: 2\r\n\r\nno"[..];
        assert_eq!(head(&mut answer).unwrap(), Head { status: 403, length: Some(2) });
        assert_eq!(answer, b"no");
        for strange in [&b"SSH-2.0-OpenSSH_9.2\r\n"[..], b"", b"HTTP/1.1 2", b"HTTP/1.1 200 OK\r\nA: b\r\n"] {
            assert!(head(&mut &strange[..]).is_err());
        }
    }
}
