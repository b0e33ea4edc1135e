//! The PROXY protocol on the way in: which client a proxy in front of Forebay speaks for (haproxy.org,
//! proxy-protocol.txt).
//!
//! It comes before everything else of a connection, TLS included. [`Expected`] says from whom it is believed, [`read`]
//! takes it apart; neither knows a socket. `client/entrance.rs` reads the bytes and bounds the time.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use ipnet::IpNet;
use ppp::{PartialResult, v1, v2};

use crate::config::listener::ProxyProtocol;

/// The longest header of version 1, with its line end.
const V1_BYTES_MAX: usize = 107;
/// The longest header of version 2 that is taken: addresses and some fields of the proxy's own (TLVs), which are
/// skipped.
const V2_BYTES_MAX: usize = 4096;
const V1_START: &[u8] = b"PROXY ";
const V2_START: &[u8] = v2::PROTOCOL_PREFIX;
const V2_FIXED_BYTES: usize = V2_START.len() + 4;

/// Who is to speak the PROXY protocol on a listener.
#[derive(Clone, Debug)]
pub struct Expected {
    from: Vec<IpNet>,
    /// How long a header may take from the acceptance of its connection on.
    pub timeout: Duration,
}

/// What a header says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Introduction {
    /// The bytes that it takes; what follows is the client's.
    pub length: usize,
    /// The client, and the address that it connected to. `None`: the proxy speaks for itself, as in a health check.
    pub parties: Option<(SocketAddr, SocketAddr)>,
}

/// Why a connection is given up before its first byte of TLS or HTTP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// It should begin with a header and does not, or the header cannot be understood.
    Malformed,
    /// It begins with one, and its peer may not say who its client is.
    Untrusted,
}

impl Expected {
    /// What is written of a listener.
    pub fn build(written: &ProxyProtocol) -> Self {
        Expected { from: written.from.clone(), timeout: written.timeout.0 }
    }

    /// Whether a connection from here must begin with a header. On a unix socket every one must: whoever can reach it
    /// is on this host and was let in by its permissions.
    pub fn is_required_from(&self, peer: Option<IpAddr>) -> bool {
        peer.is_none_or(|peer| {
            let peer = peer.to_canonical();
            self.from.iter().any(|network| network.contains(&peer))
        })
    }
}

/// Reads the header at the beginning of `bytes`. `None`: more bytes are needed.
///
/// # Errors
///
/// [`Fault::Malformed`], if there is none or it is none of version 1 or 2.
pub fn read(bytes: &[u8]) -> Result<Option<Introduction>, Fault> {
    if bytes.starts_with(V2_START) {
        return read_v2(bytes);
    }
    if bytes.starts_with(V1_START) {
        return read_v1(bytes);
    }
    if may_become_header(bytes) { Ok(None) } else { Err(Fault::Malformed) }
}

/// Looks at the first bytes of somebody who may not speak the PROXY protocol. `false`: more bytes are needed.
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
    // The whole line first: the library takes the first half of an address for a wrong one.
    let Some(end) = line.iter().position(|&byte| byte == b'\n') else {
        return if line.len() < V1_BYTES_MAX { Ok(None) } else { Err(Fault::Malformed) };
    };
    let length = end + 1;
    // The library takes a bare line feed behind `UNKNOWN`.
    if !bytes[..length].ends_with(b"\r\n") {
        return Err(Fault::Malformed);
    }
    let header = v1::Header::try_from(&bytes[..length]).map_err(|_| Fault::Malformed)?;
    if header.header.len() != length {
        return Err(Fault::Malformed);
    }
    let parties = match header.addresses {
        // The library takes a port with a sign.
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
    // Version 2, and a command that there is: known as soon as it is here.
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
        // A client on a unix socket of the proxy's host, or one of a kind that the proxy cannot name.
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

    /// A header of version 2 with this command and kind, and what follows the fixed part.
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
        // With fields of the proxy's own behind the addresses.
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
