//! The IPv4 and IPv6 addresses of a name: which are separate servers, and which are alternatives for the same
//! server.
//!
//! A name with both usually has one server with two addresses, or as many servers of each kind. If each address
//! were an endpoint, an unreachable family would cost every other request an attempt. So the family with more
//! addresses defines the endpoints, and the addresses of the other are their alternatives (`transport/pair.rs`),
//! distributed in rotation so that load stays even with either family.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};

/// The address of an endpoint, and an alternative address of the same server.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct AddressPair {
    pub address: SocketAddr,
    pub alternate: Option<SocketAddr>,
}

/// The endpoints for these addresses. If both families have equally many, IPv6 is preferred (RFC 6724), unless
/// `is_reachable` finds no route to one of its addresses.
pub fn address_pairs(addresses: &[IpAddr], port: u16, is_reachable: impl Fn(IpAddr) -> bool) -> Vec<AddressPair> {
    let distinct: BTreeSet<IpAddr> = addresses.iter().map(IpAddr::to_canonical).collect();
    let (v4, v6): (Vec<IpAddr>, Vec<IpAddr>) = distinct.into_iter().partition(IpAddr::is_ipv4);
    let (mut first, mut second) = if v4.len() > v6.len() { (v4, v6) } else { (v6, v4) };
    if let (Some(&preferred), Some(&other)) = (first.first(), second.first())
        && !is_reachable(preferred)
        && is_reachable(other)
    {
        std::mem::swap(&mut first, &mut second);
    }
    let at = |ip: IpAddr| SocketAddr::new(ip, port);
    let others = second.iter().cycle().map(|&ip| Some(at(ip))).chain(std::iter::repeat(None));
    first.iter().zip(others).map(|(&ip, alternate)| AddressPair { address: at(ip), alternate }).collect()
}

/// Whether the kernel has a route to that address; sends nothing.
pub fn is_reachable(address: IpAddr) -> bool {
    let any: SocketAddr =
        if address.is_ipv4() { ([0, 0, 0, 0], 0).into() } else { (std::net::Ipv6Addr::UNSPECIFIED, 0).into() };
    std::net::UdpSocket::bind(any).is_ok_and(|socket| socket.connect((address, 9)).is_ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn made(addresses: &[&str], is_reachable: impl Fn(IpAddr) -> bool) -> Vec<String> {
        let addresses: Vec<IpAddr> = addresses.iter().map(|address| address.parse().unwrap()).collect();
        let said = |pair: AddressPair| match pair.alternate {
            Some(alternate) => format!("{} or {}", pair.address.ip(), alternate.ip()),
            None => pair.address.ip().to_string(),
        };
        address_pairs(&addresses, 80, is_reachable).into_iter().map(said).collect()
    }

    #[test]
    fn addresses_of_one_family_are_endpoints_once_each() {
        assert_eq!(made(&["10.0.0.2", "10.0.0.1", "10.0.0.2"], |_| true), ["10.0.0.1", "10.0.0.2"]);
        assert_eq!(made(&["fd00::1", "::ffff:10.0.0.1"], |_| true), ["fd00::1 or 10.0.0.1"]);
        assert!(made(&[], |_| true).is_empty());
    }

    #[test]
    fn two_addresses_of_a_host_are_one_endpoint() {
        assert_eq!(made(&["10.0.0.1", "fd00::1"], |_| true), ["fd00::1 or 10.0.0.1"]);
        assert_eq!(
            made(&["10.0.0.1", "10.0.0.2", "fd00::1", "fd00::2"], |_| true),
            ["fd00::1 or 10.0.0.1", "fd00::2 or 10.0.0.2"]
        );
    }

    #[test]
    fn the_family_with_more_addresses_makes_the_endpoints() {
        let expected = ["10.0.0.1 or fd00::1", "10.0.0.2 or fd00::2", "10.0.0.3 or fd00::1"];
        assert_eq!(made(&["10.0.0.1", "10.0.0.2", "10.0.0.3", "fd00::1", "fd00::2"], |_| true), expected);
    }

    #[test]
    fn a_family_that_there_is_no_way_to_is_asked_last() {
        assert_eq!(made(&["10.0.0.1", "fd00::1"], |address| address.is_ipv4()), ["10.0.0.1 or fd00::1"]);
        assert_eq!(made(&["10.0.0.1", "fd00::1"], |_| false), ["fd00::1 or 10.0.0.1"]);
        assert!(is_reachable("127.0.0.1".parse().unwrap()));
    }
}
