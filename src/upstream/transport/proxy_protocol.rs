//! The PROXY protocol header (version 2) at the beginning of a connection to an endpoint.
//!
//! It is sent once, so a kept connection must be reused only for the same client: [`ClientAddresses`] is part of the
//! connection key.

use std::net::{IpAddr, SocketAddr};

use ppp::v2::{Addresses, Builder, Command, Protocol, Version};

/// The two ends of a client's connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ClientAddresses {
    /// The client's address, as far as known; port 0 if only its IP address is known.
    pub client: SocketAddr,
    /// The address it connected to.
    pub gateway: SocketAddr,
}

/// The header for a client; `None`: a client without an address, on a unix socket.
pub(super) fn of(addresses: Option<ClientAddresses>) -> Box<[u8]> {
    let addresses = addresses.map_or(Addresses::Unspecified, |ClientAddresses { client, gateway }| {
        let (mut client, mut gateway) = (client, gateway);
        // The header has one address family for both.
        if client.is_ipv4() != gateway.is_ipv4() {
            client.set_ip(v6(client.ip()));
            gateway.set_ip(v6(gateway.ip()));
        }
        Addresses::from((client, gateway))
    });
    said(Command::Proxy, addresses)
}

/// The LOCAL header, for connections without a client, such as health checks.
pub(super) fn own() -> Box<[u8]> {
    said(Command::Local, Addresses::Unspecified)
}

fn said(command: Command, addresses: Addresses) -> Box<[u8]> {
    let protocol = if addresses == Addresses::Unspecified { Protocol::Unspecified } else { Protocol::Stream };
    let header = Builder::with_addresses(Version::Two | command, protocol, addresses).build();
    // Fails only above 64 KiB; addresses are shorter.
    header.unwrap_or_default().into()
}

fn v6(ip: IpAddr) -> IpAddr {
    match ip {
        IpAddr::V4(ip) => IpAddr::V6(ip.to_ipv6_mapped()),
        IpAddr::V6(_) => ip,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    use ppp::v2::{Header, IPv4, IPv6};

    fn read(bytes: &[u8]) -> (Command, Protocol, Addresses) {
        let header = Header::try_from(bytes).unwrap();
        assert_eq!(header.header.len(), bytes.len());
        (header.command, header.protocol, header.addresses)
    }

    fn addresses(client: &str, gateway: &str) -> Option<ClientAddresses> {
        Some(ClientAddresses { client: client.parse().unwrap(), gateway: gateway.parse().unwrap() })
    }

    #[test]
    fn both_ends_are_named() {
        let expected = Addresses::IPv4(IPv4::new([1, 2, 3, 4], [10, 0, 0, 1], 5555, 443));
        assert_eq!(read(&of(addresses("1.2.3.4:5555", "10.0.0.1:443"))), (Command::Proxy, Protocol::Stream, expected));
    }

    #[test]
    fn both_ends_are_of_one_family() {
        let (_, _, addresses) = read(&of(addresses("[2001:db8::1]:0", "10.0.0.1:443")));
        let gateway = "::ffff:10.0.0.1".parse::<std::net::Ipv6Addr>().unwrap();
        let client = "2001:db8::1".parse::<std::net::Ipv6Addr>().unwrap();
        assert_eq!(addresses, Addresses::IPv6(IPv6::new(client, gateway, 0, 443)));
    }

    #[test]
    fn nobody_in_particular_is_not_the_gateway_itself() {
        assert_eq!(read(&of(None)), (Command::Proxy, Protocol::Unspecified, Addresses::Unspecified));
        assert_eq!(read(&own()), (Command::Local, Protocol::Unspecified, Addresses::Unspecified));
    }
}
