//! Access control of the admin endpoint: who may read, and who may make changes.
//!
//! Clients with the token or a required certificate may make changes. If neither is configured, a change must come
//! from this machine: from loopback or the unix socket. That alone is not safe because a local browser sends
//! requests for any web page. Browsers state the origin of a page (`Origin`, `Sec-Fetch-Site`), while programs such
//! as curl do not; so requests from a page must come from our own page. A page may also resolve its own name to
//! 127.0.0.1 (DNS rebinding). Then `Host` and `Origin` agree, and the browser lets the page read responses. A GET
//! does not show this, so requests for unknown host names are refused ([`Hosts`]).

use std::net::{IpAddr, SocketAddr};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use http::HeaderMap;
use http::header::{AUTHORIZATION, HOST, HeaderName, ORIGIN};
use http::uri::Authority;
use sha2::{Digest, Sha256};

use crate::config;
use crate::config::address::Target;

const SEC_FETCH_SITE: HeaderName = HeaderName::from_static("sec-fetch-site");

/// The origin of an admin request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Peer {
    /// The unix socket, whose permissions restrict access.
    Unix,
    /// TCP.
    Tcp(IpAddr),
    /// Unknown.
    Unknown,
}

/// How a client connected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Caller {
    /// Its address.
    pub peer: Peer,
    /// Whether it uses TLS.
    pub secure: bool,
    /// Whether it has authenticated.
    pub known: bool,
}

/// What entitles a client to operations that not every local user may run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Voucher {
    /// It has authenticated: by the token, a certificate, or the permissions of the unix socket.
    Shown,
    /// Its connection; for a local one, the system knows the user.
    Connection {
        /// The client's address.
        client: SocketAddr,
        /// Our address.
        server: SocketAddr,
    },
    /// Nothing.
    Nothing,
}

/// Whether the header fields contain the token.
pub fn shows(headers: &HeaderMap, token: &str) -> bool {
    let Some(said) = headers.get(AUTHORIZATION).and_then(|said| said.to_str().ok()) else { return false };
    let Some((scheme, shown)) = said.split_once(' ') else { return false };
    let shown = shown.trim();
    if scheme.eq_ignore_ascii_case("bearer") {
        return is_same(shown.as_bytes(), token.as_bytes());
    }
    // Browsers ask for a name and a password; the name is ignored.
    let decoded = if scheme.eq_ignore_ascii_case("basic") { STANDARD.decode(shown).ok() } else { None };
    let decoded = decoded.unwrap_or_default();
    let password = decoded.iter().position(|&byte| byte == b':').map(|colon| &decoded[colon + 1..]);
    password.is_some_and(|password| is_same(password, token.as_bytes()))
}

/// Compares in constant time: it compares digests, which a client cannot choose byte by byte.
fn is_same(one: &[u8], other: &[u8]) -> bool {
    Sha256::digest(one) == Sha256::digest(other)
}

/// The host names of the admin endpoint.
#[derive(Debug, Default)]
pub struct Hosts(Vec<String>);

impl Hosts {
    /// The configured names, the host of its address, and the name of this machine.
    pub fn new(written: &config::server::Admin) -> Hosts {
        let own = match written.address.target() {
            Ok(Target::Tcp(host, _)) => Some(host.to_owned()),
            _ => None,
        };
        let machine = nix::unistd::gethostname().ok().and_then(|name| name.into_string().ok());
        Hosts(written.hosts.iter().cloned().chain(own).chain(machine).map(|name| bare(&name)).collect())
    }

    /// Checks that a request names a known host; the error says why not. With TLS, the browser has already verified
    /// the name; and a page with a rebound name does not know the token.
    pub fn check(&self, caller: Caller, headers: &HeaderMap) -> Result<(), &'static str> {
        const WHY: &str = "unknown host: admin.hosts lists the names of this endpoint";
        let mut hosts = headers.get_all(HOST).iter();
        let host = match (hosts.next(), hosts.next()) {
            // Browsers always send it, and cannot use a unix socket.
            (None, _) => return Ok(()),
            _ if caller.peer == Peer::Unix || caller.secure || caller.known => return Ok(()),
            (Some(host), None) => host.to_str().map_err(|_| WHY)?,
            (Some(_), Some(_)) => return Err(WHY),
        };
        if self.know(host) { Ok(()) } else { Err(WHY) }
    }

    fn know(&self, host: &str) -> bool {
        is_address(host)
            || host.parse::<Authority>().is_ok_and(|authority| {
                let name = bare(authority.host());
                self.0.contains(&name)
            })
    }
}

/// The name in lower case, without a trailing dot.
fn bare(name: &str) -> String {
    name.strip_suffix('.').unwrap_or(name).to_ascii_lowercase()
}

/// Whether a client may make changes with a request with these headers; else why not.
pub fn check(caller: Caller, headers: &HeaderMap) -> Result<(), &'static str> {
    match caller.peer {
        _ if caller.known => {}
        Peer::Unix => {}
        Peer::Tcp(address) if address.to_canonical().is_loopback() => {}
        _ => return Err("changes are accepted over loopback or the unix socket only"),
    }
    let said = |name| headers.get_all(name).iter();
    if said(SEC_FETCH_SITE).any(|site| site != "same-origin" && site != "none") {
        return Err("changes are not accepted from other sites");
    }
    if said(ORIGIN).next().is_none() {
        return Ok(());
    }
    let host = headers.get(HOST).and_then(|host| host.to_str().ok()).unwrap_or_default();
    let ours = format!("{}://{host}", if caller.secure { "https" } else { "http" });
    // With a rebound name, a browser would not send the credentials of another name.
    if (!caller.known && !is_address(host)) || said(ORIGIN).any(|origin| *origin != *ours) {
        return Err("changes are not accepted from other sites");
    }
    Ok(())
}

/// Whether it is an IP address or `localhost`, which cannot be rebound.
fn is_address(host: &str) -> bool {
    let Ok(authority) = host.parse::<Authority>() else { return false };
    let name = authority.host().trim_start_matches('[').trim_end_matches(']');
    bare(name) == "localhost" || name.parse::<IpAddr>().is_ok()
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, Ipv6Addr};

    use super::*;

    const LOCAL: Peer = Peer::Tcp(IpAddr::V4(Ipv4Addr::LOCALHOST));

    fn headers(said: &[(&'static str, &'static str)]) -> HeaderMap {
        said.iter().map(|(name, value)| (name.parse().unwrap(), value.parse().unwrap())).collect()
    }

    fn plain(peer: Peer) -> Caller {
        Caller { peer, secure: false, known: false }
    }

    #[test]
    fn a_token_is_shown_as_a_bearer_or_as_a_password() {
        let token = "a token of 16 or more".replace(' ', "-");
        let shown = |value: String| {
            let mut headers = HeaderMap::new();
            headers.insert("authorization", value.parse().unwrap());
            shows(&headers, &token)
        };
        let basic = |pair: String| format!("Basic {}", STANDARD.encode(pair));
        assert!(shown(format!("Bearer {token}")) && shown(format!("bearer {token}")));
        assert!(shown(basic(format!("anybody:{token}"))) && shown(basic(format!(":{token}"))));
        for wrong in [
            format!("Bearer {token}x"),
            "Bearer ".to_owned(),
            token.clone(),
            format!("Basic {token}"),
            basic(token.clone()),
            basic(format!("{token}:")),
            format!("Digest {token}"),
        ] {
            assert!(!shown(wrong.clone()), "{wrong}");
        }
        assert!(!shows(&HeaderMap::new(), &token));
    }

    #[test]
    fn who_has_shown_the_token_may_come_from_anywhere_and_not_from_another_page() {
        let far = Peer::Tcp([192, 0, 2, 1].into());
        let known = Caller { peer: far, secure: true, known: true };
        assert_eq!(check(known, &headers(&[("host", "admin.example")])), Ok(()));
        let own = headers(&[("host", "admin.example"), ("origin", "https://admin.example")]);
        assert_eq!(check(known, &own), Ok(()));
        let foreign = headers(&[("host", "admin.example"), ("origin", "https://evil.example")]);
        assert!(check(known, &foreign).is_err());
        assert!(check(Caller { known: false, ..known }, &own).is_err());
    }

    #[test]
    fn a_change_comes_from_this_machine() {
        let curl = headers(&[("host", "127.0.0.1:9100")]);
        for peer in [LOCAL, Peer::Unix, Peer::Tcp(Ipv6Addr::LOCALHOST.into()), mapped([127, 0, 0, 1])] {
            assert_eq!(check(plain(peer), &curl), Ok(()), "{peer:?}");
        }
        for peer in [Peer::Unknown, Peer::Tcp([192, 0, 2, 1].into()), mapped([192, 0, 2, 1])] {
            assert!(check(plain(peer), &curl).is_err(), "{peer:?}");
        }
    }

    fn mapped(address: [u8; 4]) -> Peer {
        Peer::Tcp(Ipv4Addr::from(address).to_ipv6_mapped().into())
    }

    #[test]
    fn it_answers_to_addresses_and_to_names_that_it_knows() {
        let written = config::server::Admin {
            address: "Forebay.internal:9100".parse().unwrap(),
            hosts: vec!["Metrics.example".to_owned()],
            ..Default::default()
        };
        let hosts = Hosts::new(&written);
        let asked = |caller: Caller, said: &[(&'static str, &'static str)]| {
            let mut map = HeaderMap::new();
            for (name, value) in said {
                map.append(*name, value.parse().unwrap());
            }
            hosts.check(caller, &map).is_ok()
        };
        for host in ["127.0.0.1:9100", "[::1]:9100", "10.1.2.3", "localhost:9100", "LOCALHOST.", "forebay.internal:1"] {
            assert!(asked(plain(LOCAL), &[("host", host)]), "{host}");
        }
        for host in ["metrics.example", "metrics.example.:9100", "METRICS.example:80"] {
            assert!(asked(plain(LOCAL), &[("host", host)]), "{host}");
        }
        for host in ["evil.example", "127.0.0.1.evil.example", "localhost.evil.example", "x.metrics.example", "", "a b"]
        {
            assert!(!asked(plain(LOCAL), &[("host", host)]), "{host}");
            for caller in
                [plain(Peer::Unix), Caller { secure: true, ..plain(LOCAL) }, Caller { known: true, ..plain(LOCAL) }]
            {
                assert!(asked(caller, &[("host", host)]), "{host}");
            }
        }
        assert!(!asked(plain(LOCAL), &[("host", "127.0.0.1"), ("host", "evil.example")]));
        assert!(!asked(plain(Peer::Unknown), &[("host", "evil.example")]));
        assert!(asked(plain(LOCAL), &[]), "HTTP/1.0");
    }

    #[test]
    fn a_page_of_ours_may_change_things_and_no_other_page() {
        for host in ["127.0.0.1:9100", "[::1]:9100", "localhost:8888", "localhost"] {
            let origin: &'static str = format!("http://{host}").leak();
            let own = headers(&[("host", host), ("origin", origin), ("sec-fetch-site", "same-origin")]);
            assert_eq!(check(plain(LOCAL), &own), Ok(()), "{host}");
        }
        for foreign in [
            &[("host", "127.0.0.1:9100"), ("origin", "https://evil.example")][..],
            &[("host", "127.0.0.1:9100"), ("origin", "null")],
            &[("host", "127.0.0.1:9100"), ("origin", "http://127.0.0.1:9999")],
            &[("host", "127.0.0.1:9100"), ("origin", "")],
            // Rebound names.
            &[("host", "evil.example:9100"), ("origin", "http://evil.example:9100")],
            &[("host", "localhost.evil.example"), ("origin", "http://localhost.evil.example")],
            &[("origin", "http://")],
            &[("host", "127.0.0.1:9100"), ("sec-fetch-site", "cross-site")],
            &[("host", "127.0.0.1:9100"), ("sec-fetch-site", "same-site")],
            &[("host", "127.0.0.1"), ("origin", "http://127.0.0.1"), ("origin", "http://evil.example")],
        ] {
            let mut map = HeaderMap::new();
            for (name, value) in foreign {
                map.append(*name, value.parse().unwrap());
            }
            for peer in [LOCAL, Peer::Unix] {
                assert!(check(plain(peer), &map).is_err(), "{foreign:?}");
            }
        }
    }
}
