//! The incoming PROXY protocol: the client that a proxy in front of Forebay names (haproxy.org, proxy-protocol.txt).
//!
//! Its header precedes all other bytes of a connection, TLS included. [`Expected`] defines the trusted peers, [`read`]
//! parses the header; both know no socket. `client/entrance.rs` reads the bytes within a time limit.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use ipnet::IpNet;
use ppp::{PartialResult, v1, v2};

use crate::config::listener::ProxyProtocol;

/// Maximum length of a version 1 header, with its line end.
const V1_BYTES_MAX: usize = 107;
/// Maximum length of a version 2 header: addresses, and additional fields (TLVs), which are ignored.
const V2_BYTES_MAX: usize = 4096;
const V1_START: &[u8] = b"PROXY ";
const V2_START: &[u8] = v2::PROTOCOL_PREFIX;
const V2_FIXED_BYTES: usize = V2_START.len() + 4;

/// The peers that must send the PROXY protocol on a listener.
#[derive(Clone, Debug)]
pub struct Expected {
    from: Vec<IpNet>,
    /// Maximum time for a header, from accept on.
    pub timeout: Duration,
}

/// The content of a header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Introduction {
    /// Length of the header in bytes; the client's bytes follow.
    pub length: usize,
    /// The client, and the address that it connected to. `None`: the connection is the proxy's own, as in a health
    /// check.
    pub parties: Option<(SocketAddr, SocketAddr)>,
}

/// The reason for closing a connection before its first byte of TLS or HTTP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// A required header is missing or malformed.
    Malformed,
    /// The peer sent a header without permission.
    Untrusted,
}

impl Expected {
    /// Builds the rules of a listener.
    pub fn build(written: &ProxyProtocol) -> Self {
        Expected { from: written.from.clone(), timeout: written.timeout.0 }
    }

    /// Whether a connection from this peer must begin with a header. On a Unix socket every connection must: the
    /// socket's permissions control which local processes can connect.
    pub fn is_required_from(&self, peer: Option<IpAddr>) -> bool {
        peer.is_none_or(|peer| {
            let peer = peer.to_canonical();
            self.from.iter().any(|network| network.contains(&peer))
        })
    }
}

/// Parses the header at the beginning of `bytes`. `None`: more bytes are needed.
///
/// # Errors
///
/// [`Fault::Malformed`], if there is no valid header of version 1 or 2.
pub fn read(bytes: &[u8]) -> Result<Option<Introduction>, Fault> {
    if bytes.starts_with(V2_START) {
        return read_v2(bytes);
    }
    if bytes.starts_with(V1_START) {
        return read_v1(bytes);
    }
    if may_become_header(bytes) { Ok(None) } else { Err(Fault::Malformed) }
}

/// Checks the first bytes of a peer that must not send the PROXY protocol. `false`: more bytes are needed.
///
/// # Errors
///
/// [`Fault::Untrusted`], if they begin a header.
pub fn rule_out(bytes: &[u8]) -> Result<bool, Fault> {
    if bytes.starts_with(V1_START) || bytes.starts_with(V2_START) {
        return Err(Fault::Untrusted);
    }
    Ok(!may_become_header(bytes))
}

fn may_become_header(bytes: &[u8]) -> bool {
    V1_START.starts_with(bytes) || V2_START.starts_with(bytes)
}

fn read_v1(bytes: &[u8]) -> Result<Option<Introduction>, Fault> {
    let line = &bytes[..bytes.len().min(V1_BYTES_MAX)];
    // The parser needs the complete line: it takes the first half of an address for an invalid one.
    let Some(end) = line.iter().position(|&byte| byte == b'\n') else {
        return if line.len() < V1_BYTES_MAX { Ok(None) } else { Err(Fault::Malformed) };
    };
    let length = end + 1;
    // The library accepts a bare line feed after `UNKNOWN`.
    if !bytes[..length].ends_with(b"\r\n") {
        return Err(Fault::Malformed);
    }
    let header = v1::Header::try_from(&bytes[..length]).map_err(|_| Fault::Malformed)?;
    if header.header.len() != length {
        return Err(Fault::Malformed);
    }
    let parties = match header.addresses {
        // The library accepts a port with a sign.
        v1::Addresses::Tcp4(_) | v1::Addresses::Tcp6(_) if line[..length].contains(&b'+') => {
            return Err(Fault::Malformed);
        }
        v1::Addresses::Tcp4(it) => {
            Some(((it.source_address, it.source_port).into(), (it.destination_address, it.destination_port).into()))
        }
        v1::Addresses::Tcp6(it) => {
            Some(((it.source_address, it.source_port).into(), (it.destination_address, it.destination_port).into()))
        }
        v1::Addresses::Unknown => None,
    };
    Ok(Some(Introduction { length, parties }))
}

fn read_v2(bytes: &[u8]) -> Result<Option<Introduction>, Fault> {
    // Version 2 with a known command; checked as soon as the byte arrives.
    if bytes.get(V2_START.len()).is_some_and(|version| !matches!(version, 0x20 | 0x21)) {
        return Err(Fault::Malformed);
    }
    let Some(fixed) = bytes.get(..V2_FIXED_BYTES) else { return Ok(None) };
    let length = V2_FIXED_BYTES + usize::from(u16::from_be_bytes([fixed[14], fixed[15]]));
    if length > V2_BYTES_MAX {
        return Err(Fault::Malformed);
    }
    let header = match v2::Header::try_from(bytes) {
        Ok(header) => header,
        Err(error) if error.is_incomplete() => return Ok(None),
        Err(_) => return Err(Fault::Malformed),
    };
    if header.command == v2::Command::Local {
        return Ok(Some(Introduction { length, parties: None }));
    }
    let parties = match (header.protocol, header.addresses) {
        (v2::Protocol::Datagram, _) => return Err(Fault::Malformed),
        (_, v2::Addresses::IPv4(it)) => {
            Some(((it.source_address, it.source_port).into(), (it.destination_address, it.destination_port).into()))
        }
        (_, v2::Addresses::IPv6(it)) => {
            Some(((it.source_address, it.source_port).into(), (it.destination_address, it.destination_port).into()))
        }
        // A client on a Unix socket of the proxy's host, or of a kind that the proxy cannot name.
        (_, v2::Addresses::Unix(_) | v2::Addresses::Unspecified) => None,
    };
    Ok(Some(Introduction { length, parties }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn said(bytes: &[u8]) -> Result<Option<(usize, Option<String>)>, Fault> {
        let shown = |(client, gateway): (SocketAddr, SocketAddr)| format!("{client} {gateway}");
        read(bytes).map(|read| read.map(|it| (it.length, it.parties.map(shown))))
    }

    /// A version 2 header with this command and kind, and the bytes after the fixed part.
    fn binary(command: u8, kind: u8, rest: &[u8]) -> Vec<u8> {
        let length = u16::try_from(rest.len()).expect("a length").to_be_bytes();
        [V2_START, &[command, kind], &length, rest].concat()
    }

    const FOUR: [u8; 12] = [203, 0, 113, 7, 10, 0, 0, 1, 0x12, 0x67, 0x01, 0xbb];

    #[test]
    fn both_versions_tell_who_the_client_is() {
        let line = b"PROXY TCP4 203.0.113.7 10.0.0.1 4711 443\r\nGET /";
        let told = Some("203.0.113.7:4711 10.0.0.1:443".to_owned());
        assert_eq!(said(line), Ok(Some((42, told.clone()))));
        assert_eq!(said(&binary(0x21, 0x11, &FOUR)), Ok(Some((28, told.clone()))));
        // With additional fields of the proxy after the addresses.
        assert_eq!(said(&binary(0x21, 0x11, &[&FOUR[..], &[4, 0, 1, 9]].concat())), Ok(Some((32, told))));

        let six = Some("[2001:db8::1]:4711 [::1]:443".to_owned());
        assert_eq!(said(b"PROXY TCP6 2001:db8::1 ::1 4711 443\r\n"), Ok(Some((37, six.clone()))));
        let client: std::net::Ipv6Addr = "2001:db8::1".parse().expect("an address");
        let gateway = std::net::Ipv6Addr::LOCALHOST;
        let rest = [&client.octets()[..], &gateway.octets(), &FOUR[8..]].concat();
        assert_eq!(said(&binary(0x21, 0x21, &rest)), Ok(Some((52, six))));
    }

    #[test]
    fn a_proxy_may_speak_for_itself() {
        assert_eq!(said(b"PROXY UNKNOWN\r\n"), Ok(Some((15, None))));
        assert_eq!(said(b"PROXY UNKNOWN ffff::1 ffff::2 1 2\r\n"), Ok(Some((35, None))));
        assert_eq!(said(&binary(0x20, 0x00, &[])), Ok(Some((16, None))));
        assert_eq!(said(&binary(0x20, 0x11, &FOUR)), Ok(Some((28, None))), "a health check of the proxy's");
        assert_eq!(said(&binary(0x21, 0x00, &[1, 2, 3])), Ok(Some((19, None))));
        assert_eq!(said(&binary(0x21, 0x31, &[0; 216])), Ok(Some((232, None))));
    }

    #[test]
    fn whatever_is_no_header_is_refused_as_soon_as_that_is_clear() {
        for wrong in [
            &b"GET / HTTP/1.1\r\n"[..],
            b"PROPFIND / HTTP/1.1\r\n",
            b"\x16\x03\x01",
            b"\r\n\r\nG",
            b"PROXY TCP4 1.2.3.4 5.6.7.8 1\r\n",
            b"PROXY TCP4 1.2.3.4 5.6.7.8 1 65536\r\n",
            b"PROXY TCP4 ::1 ::1 1 2\r\n",
            b"PROXY UDP4 1.2.3.4 5.6.7.8 1 2\r\n",
            b"PROXY TCP4 1.2.3.4 5.6.7.8 1 2\n",
            b"PROXY TCP4 1.2.3.4 5.6.7.8 1 2\rX\n",
            b"PROXY TCP4 1.2.3.4 5.6.7.8 1 2 3\r\n",
            b"PROXY UNKNOWN\xff\xfe\r\n",
            b"PROXY UNKNOWN \n",
            b"PROXY TCP4 192.0.2.1 192.0.2.2 +51000 443\r\n",
            &[&b"PROXY UNKNOWN "[..], &[b'x'; 100]].concat(),
            &binary(0x31, 0x11, &FOUR),
            &binary(0x22, 0x11, &FOUR),
            &binary(0x21, 0x12, &FOUR),
            &binary(0x21, 0x41, &FOUR),
            &binary(0x21, 0x11, &FOUR[..11]),
            &[V2_START, &[0x21, 0x11, 0xff, 0xff]].concat(),
        ] {
            assert_eq!(read(wrong), Err(Fault::Malformed), "{}", String::from_utf8_lossy(wrong));
        }
    }

    #[test]
    fn who_may_not_say_it_is_found_out_by_the_first_bytes() {
        for (bytes, found) in [
            (&b""[..], Ok(false)),
            (b"P", Ok(false)),
            (b"PROX", Ok(false)),
            (b"PROXY ", Err(Fault::Untrusted)),
            (b"PROXY TCP4 1.2.3.4 5.6.7.8 1 2\r\n", Err(Fault::Untrusted)),
            (V2_START, Err(Fault::Untrusted)),
            (b"\r\n\r\n", Ok(false)),
            (b"\r\nGET", Ok(true)),
            (b"POST", Ok(true)),
            (b"PRI * HTTP/2.0", Ok(true)),
            (b"\x16", Ok(true)),
        ] {
            assert_eq!(rule_out(bytes), found, "{}", String::from_utf8_lossy(bytes));
        }
    }

    #[test]
    fn a_header_is_required_from_trusted_addresses_and_on_unix_sockets() {
        let written =
            ProxyProtocol { from: vec!["10.0.0.0/8".parse().expect("a network")], ..ProxyProtocol::default() };
        let expected = Expected::build(&written);
        let required = |peer: &str| expected.is_required_from(Some(peer.parse().expect("an address")));
        assert!(required("10.1.2.3") && required("::ffff:10.1.2.3") && expected.is_required_from(None));
        assert!(!required("11.1.2.3") && !required("::1"));
    }

    proptest! {
        #[test]
        fn a_header_that_comes_byte_by_byte_is_the_same(binary_form: bool, more in prop::collection::vec(any::<u8>(), 0..40)) {
            let header = match binary_form {
                true => binary(0x21, 0x11, &FOUR),
                false => b"PROXY TCP4 203.0.113.7 10.0.0.1 4711 443\r\n".to_vec(),
            };
            let whole = [&header[..], &more].concat();
            for cut in 0..header.len() {
                prop_assert_eq!(read(&whole[..cut]), Ok(None));
            }
            prop_assert_eq!(read(&whole).map(|read| read.map(|it| it.length)), Ok(Some(header.len())));
        }

        #[test]
        fn anything_may_be_sent(bytes in prop::collection::vec(any::<u8>(), 0..300), form in 0usize..3) {
            let start = [&b""[..], V1_START, V2_START][form];
            let bytes = [start, &bytes[..]].concat();
            if let Ok(Some(told)) = read(&bytes) {
                prop_assert!(told.length <= bytes.len());
            }
            let _ = rule_out(&bytes);
        }
    }
}
