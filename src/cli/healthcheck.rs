//! `forebay healthcheck`: checks whether a gateway is ready, for containers and scripts without curl.

use std::io;
use std::time::Duration;

use http::Uri;
use tokio::io::{AsyncBufReadExt, AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufReader};
use tokio::net::{TcpStream, UnixStream};
use tokio::time::timeout;

use super::admin::{AdminEndpoint, reachable};
use super::{ConfigFile, Failure, print};
use crate::gateway::Builder;

/// Time limit from name resolution to the status.
const DEADLINE: Duration = Duration::from_secs(3);

/// Longest status line that is read.
const LINE_BYTES_MAX: u64 = 1024;

/// Fails unless the response has a 2xx status within three seconds.
pub fn healthcheck(builder: &Builder, url: Option<Uri>, file: ConfigFile) -> Result<(), Failure> {
    let target = match url {
        Some(url) => Target::of_url(&url)?,
        None => {
            let (path, config) = file.load(builder)?;
            if !config.admin.enabled {
                return Err(Failure::Runtime(format!("{}: the admin endpoint is off", path.display())));
            }
            if config.admin.tls.is_some() {
                let endpoint = AdminEndpoint::of(&config);
                let ready = endpoint.get("/readyz").map_err(|why| Failure::Runtime(format!("not ready: {why}")));
                return ready.and_then(|_| print(&format!("https://{}/readyz answers 200", endpoint.address)));
            }
            Target::readyz(&config.admin.address.0)
        }
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let asked = runtime.and_then(|runtime| {
        runtime.block_on(async {
            timeout(DEADLINE, target.ask()).await.map_err(|_| io::ErrorKind::TimedOut.into()).flatten()
        })
    });
    match asked {
        Ok(status @ 200..300) => print(&format!("{} answers {status}", target.name)),
        Ok(status) => Err(Failure::Runtime(format!("not ready: {} answers {status}", target.name))),
        Err(error) if error.kind() == io::ErrorKind::TimedOut => {
            Err(Failure::Runtime(format!("not ready: {} did not answer within 3 s", target.name)))
        }
        Err(error) => Err(Failure::Runtime(format!("not ready: {}: {}", target.name, super::plain(&error)))),
    }
}

/// The request and its destination.
#[derive(Debug, PartialEq, Eq)]
struct Target {
    /// The name shown to the user.
    name: String,
    /// `host:port`, or `unix:/path`.
    address: String,
    /// The `Host` of the request.
    host: String,
    path: String,
}

impl Target {
    /// `/readyz` at an admin address.
    fn readyz(address: &str) -> Target {
        let address = reachable(address);
        let path = "/readyz".to_owned();
        if address.starts_with("unix:") {
            return Target { name: format!("{path} on {address}"), address, host: "localhost".to_owned(), path };
        }
        Target { name: format!("http://{address}{path}"), host: address.clone(), address, path }
    }

    fn of_url(url: &Uri) -> Result<Target, Failure> {
        let (Some("http"), Some(authority)) = (url.scheme_str(), url.authority()) else {
            return Err(Failure::Usage(format!(
                "`{url}` is not an address for --url: write one like http://127.0.0.1:9100/readyz"
            )));
        };
        Ok(Target {
            name: url.to_string(),
            address: format!("{}:{}", authority.host(), authority.port_u16().unwrap_or(80)),
            host: authority.to_string(),
            path: url.path_and_query().map_or("/", |path| path.as_str()).to_owned(),
        })
    }

    async fn ask(&self) -> io::Result<u16> {
        match self.address.strip_prefix("unix:") {
            Some(path) => self.ask_over(UnixStream::connect(path).await?).await,
            None => self.ask_over(TcpStream::connect(&self.address).await?).await,
        }
    }

    async fn ask_over(&self, mut stream: impl AsyncRead + AsyncWrite + Unpin) -> io::Result<u16> {
        let request = format!("GET {} HTTP/1.1\r\nHost: {}\r\nConnection: close\r\n\r\n", self.path, self.host);
        stream.write_all(request.as_bytes()).await?;
        let mut line = Vec::new();
        BufReader::new(stream.take(LINE_BYTES_MAX)).read_until(b'\n', &mut line).await?;
        status(&line).ok_or_else(|| io::Error::other("this is not an HTTP answer"))
    }
}

/// The status code in a status line (RFC 9112 §4).
fn status(line: &[u8]) -> Option<u16> {
    let rest = line.strip_prefix(b"HTTP/1.1 ").or_else(|| line.strip_prefix(b"HTTP/1.0 "))?;
    std::str::from_utf8(rest.get(..3)?).ok()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_admin_endpoint_on_every_address_is_asked_on_loopback() {
        assert_eq!(Target::readyz("0.0.0.0:9100").address, "127.0.0.1:9100");
        assert_eq!(Target::readyz("[::]:9100").name, "http://[::1]:9100/readyz");
        assert_eq!(Target::readyz("10.0.0.1:9100").address, "10.0.0.1:9100");
        assert_eq!(Target::readyz("unix:/run/admin.sock").address, "unix:/run/admin.sock");
    }

    #[test]
    fn a_url_is_taken_apart() {
        let target = Target::of_url(&Uri::from_static("http://shop.example/ready?full")).unwrap();
        assert_eq!(target.address, "shop.example:80");
        assert_eq!((target.host.as_str(), target.path.as_str()), ("shop.example", "/ready?full"));
        for wrong in ["https://127.0.0.1/", "/readyz", "127.0.0.1:9100"] {
            assert!(matches!(Target::of_url(&Uri::from_static(wrong)), Err(Failure::Usage(_))), "{wrong}");
        }
    }

    #[test]
    fn only_a_status_line_has_a_status() {
        assert_eq!(status(b"HTTP/1.1 204 No Content\r\n"), Some(204));
        assert_eq!(status(b"HTTP/1.1 20"), None);
        assert_eq!(status(b"SSH-2.0-OpenSSH_9.2\r\n"), None);
    }
}
