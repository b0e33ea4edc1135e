//! The addresses of one name over IPv4 and IPv6: which are servers of their own, and which are ways to the same.
//!
//! A name with both has, as a rule, one server with two addresses, or as many servers of each kind. Were each address
//! an endpoint, one family without a way to it would cost every other request an attempt. So the family with more
//! addresses makes the endpoints, and those of the other are asked where they do not answer (`transport/pair.rs`): by
//! turns, so that the load stays even whichever family it is that answers.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};

/// The address of an endpoint, and another way to the same server.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Way {
    pub address: SocketAddr,
    pub alternate: Option<SocketAddr>,
}

/// The endpoints of a name with these addresses. Where there are as many of both families, IPv6 is asked first (RFC
/// 6724); unless this machine has no way at all to the preferred family, which `is_reachable` says of one of its
/// addresses.
pub fn ways(addresses: &[IpAddr], port: u16, is_reachable: impl Fn(IpAddr) -> bool) -> Vec<Way> {
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
    first.iter().zip(others).map(|(&ip, alternate)| Way { address: at(ip), alternate }).collect()
}

/// Whether this machine has a route to that address: asked of the kernel, without sending anything.
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
        let said = |way: Way| match way.alternate {
            Some(alternate) => format!("{} or {}", way.address.ip(), alternate.ip()),
            None => way.address.ip().to_string(),
        };
        ways(&addresses, 80, is_reachable).into_iter().map(said).collect()
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
