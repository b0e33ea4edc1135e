//! A parsed address: a literal one, a unix socket, or a name to be resolved.

use std::os::unix::net::SocketAddr as UnixSocketAddr;

use pingora::protocols::l4::socket::SocketAddr;

use crate::config::Address;

/// A parsed address, not resolved yet.
#[derive(Clone, Debug)]
pub enum Location {
    Literal(SocketAddr),
    Name { host: String, port: u16 },
}

impl Location {
    /// Parses `host:port`, `[v6]:port` or `unix:/path`.
    pub fn parse(written: &Address) -> Result<Location, String> {
        let address = written.0.as_str();
        if let Some(path) = written.unix_path() {
            return match UnixSocketAddr::from_pathname(path) {
                // An empty path would create an unnamed socket, on which Pingora panics.
                Ok(socket) if !path.is_empty() => Ok(Location::Literal(SocketAddr::Unix(socket))),
                Ok(_) => Err("`unix:` needs a path, such as `unix:/run/app.sock`".to_owned()),
                Err(error) => Err(format!("`{path}` cannot be the path of a unix socket: {error}")),
            };
        }
        if let Ok(socket) = address.parse() {
            return Ok(Location::Literal(SocketAddr::Inet(socket)));
        }
        match address.rsplit_once(':').map(|(host, port)| (host, port.parse())) {
            Some((host, Ok(port))) if !host.is_empty() && !host.contains([':', '/', '[', ']']) => {
                Ok(Location::Name { host: host.to_owned(), port })
            }
            _ => Err(format!("`{address}` is not an address: write `host:port`, `[v6]:port` or `unix:/path`")),
        }
    }

    /// The host, for SNI and certificate verification; `None` for a unix socket.
    pub fn host(&self) -> Option<String> {
        match self {
            Location::Literal(address) => address.as_inet().map(|socket| socket.ip().to_string()),
            Location::Name { host, .. } => Some(host.clone()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_as_they_are_written() {
        let read = |text: &str| Location::parse(&Address(text.to_owned())).map(|location| format!("{location:?}"));
        for (text, expected) in [
            ("127.0.0.1:80", "Literal(Inet(127.0.0.1:80))"),
            ("[::1]:8080", "Literal(Inet([::1]:8080))"),
            ("api.test:443", "Name { host: \"api.test\", port: 443 }"),
            ("unix:/run/app.sock", "Literal(Unix(\"/run/app.sock\" (pathname)))"),
        ] {
            assert_eq!(read(text).unwrap(), expected);
        }
        for text in
            ["api.test", "api.test:", "api.test:http", "api.test:70000", ":80", "::1:80", "unix:", "http://a:80"]
        {
            assert!(read(text).is_err(), "{text} was taken for an address");
        }
        assert!(read(&format!("unix:/{}", "x".repeat(200))).is_err(), "longer than a socket's path may be");
    }
}
