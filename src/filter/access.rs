//! `access`: admits or refuses clients by their address.
//!
//! ```yaml
//! - access:
//!     allow: [10.0.0.0/8, "2001:db8::/32"]   # all, if empty
//!     deny: [10.0.13.37]                     # takes precedence over `allow`
//! ```
//!
//! The address is that of the client behind `trusted_proxies`. A client of a unix socket has none and is in no list, so
//! `deny` admits it and `allow` refuses it.

use std::net::IpAddr;

use async_trait::async_trait;
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{Filter, FilterType, Scope, Stages, Surroundings, Verdict};
use crate::error::{BuildError, Refusal};

/// Admits or refuses clients by their address. `deny` takes precedence over `allow`. If `allow` is not empty, clients
/// outside of it are refused with 403.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Settings {
    /// The admitted clients; all, if empty.
    pub allow: Vec<Network>,
    /// The refused clients, even if they are in `allow`.
    pub deny: Vec<Network>,
}

/// An address such as `10.0.13.37`, or a network such as `10.0.0.0/8` or `2001:db8::/32`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(try_from = "String")]
pub struct Network(#[schemars(with = "String")] IpNet);

impl TryFrom<String> for Network {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let network = text.parse().or_else(|_| text.parse::<IpAddr>().map(IpNet::from));
        network.map(Network).map_err(|_| {
            format!("`{text}` is neither an address nor a network: write `192.0.2.1`, `10.0.0.0/8` or `2001:db8::/32`")
        })
    }
}

static DENIED: Refusal = Refusal::new("route.access", 403, "Access from this address is not allowed.");

/// Refuses clients by their address.
pub struct Access {
    /// `None` admits all clients.
    allow: Option<Networks>,
    deny: Networks,
}

#[async_trait]
impl Filter for Access {
    fn stages(&self) -> Stages {
        Stages::REQUEST
    }

    async fn request(&self, scope: &mut Scope<'_>) -> Verdict {
        if self.admits(scope.facts.client) { Verdict::Continue } else { Verdict::from(&DENIED) }
    }
}

impl FilterType for Access {
    const KEY: &'static str = "access";
    const REFUSALS: &'static [&'static Refusal] = &[&DENIED];
    type Settings = Settings;

    fn build(settings: &Settings, _: &Surroundings<'_>) -> Result<Self, BuildError> {
        if settings.allow.is_empty() && settings.deny.is_empty() {
            return Err(BuildError::new("", "neither `allow` nor `deny` names anyone, so this would let everyone in"));
        }
        let allow = (!settings.allow.is_empty()).then(|| Networks::new(&settings.allow));
        Ok(Access { allow, deny: Networks::new(&settings.deny) })
    }
}

impl Access {
    fn admits(&self, client: Option<IpAddr>) -> bool {
        let denied = client.is_some_and(|client| self.deny.contain(client));
        let allowed = self.allow.as_ref().is_none_or(|allow| client.is_some_and(|client| allow.contain(client)));
        allowed && !denied
    }
}

/// A set of addresses as sorted networks that do not overlap, for binary search even in lists of thousands.
#[derive(Debug, Default)]
pub(super) struct Networks {
    v4: Vec<Ipv4Net>,
    v6: Vec<Ipv6Net>,
}

impl Networks {
    pub fn new(written: &[Network]) -> Networks {
        let (mut v4, mut v6) = (Vec::new(), Vec::new());
        for Network(network) in written {
            match network {
                IpNet::V4(network) => v4.push(network.trunc()),
                IpNet::V6(network) => match mapped(network) {
                    Some(network) => v4.push(network),
                    None => v6.push(network.trunc()),
                },
            }
        }
        let (mut v4, mut v6) = (Ipv4Net::aggregate(&v4), Ipv6Net::aggregate(&v6));
        v4.sort_unstable();
        v6.sort_unstable();
        Networks { v4, v6 }
    }

    /// An IPv4 address in IPv6 form is looked up as IPv4.
    pub fn contain(&self, client: IpAddr) -> bool {
        match client.to_canonical() {
            IpAddr::V4(client) => {
                let behind = self.v4.partition_point(|network| network.network() <= client);
                self.v4[..behind].last().is_some_and(|network| network.contains(&client))
            }
            IpAddr::V6(client) => {
                let behind = self.v6.partition_point(|network| network.network() <= client);
                self.v6[..behind].last().is_some_and(|network| network.contains(&client))
            }
        }
    }
}

/// The IPv4 network of an IPv6 network within `::ffff:0:0/96`.
fn mapped(network: &Ipv6Net) -> Option<Ipv4Net> {
    let length = network.prefix_len().checked_sub(96)?;
    Ipv4Net::new(network.addr().to_ipv4_mapped()?, length).ok().map(|network| network.trunc())
}

#[cfg(test)]
mod tests {
    use super::super::rehearsal::{Rehearsal, chain, error, example};
    use super::*;

    /// Whether a client is admitted.
    fn admits(settings: &str, client: &str) -> bool {
        let mut rehearsal = Rehearsal::of(&format!("- access: {settings}")).from(client);
        matches!(rehearsal.verdict(), Verdict::Continue)
    }

    #[test]
    fn the_example_builds() {
        assert!(chain(&example(include_str!("access.rs"))).is_ok());
    }

    #[test]
    fn who_is_not_allowed_is_refused() {
        let settings = "{ allow: [10.0.0.0/8, 192.0.2.7, '2001:db8::/32'] }";
        for client in ["10.0.0.0", "10.255.255.255", "192.0.2.7", "2001:db8::1"] {
            assert!(admits(settings, client), "{client}");
        }
        for client in ["9.255.255.255", "11.0.0.0", "192.0.2.6", "192.0.2.8", "2001:db9::"] {
            assert!(!admits(settings, client), "{client}");
        }
        let refused = Rehearsal::of(&format!("- access: {settings}")).from("11.0.0.0").refused();
        assert_eq!((refused.refusal.reason, refused.refusal.status), ("route.access", 403));
    }

    #[test]
    fn who_is_denied_is_refused_and_everyone_else_comes_in() {
        let settings = "{ deny: [192.0.2.0/24, '::1'] }";
        assert!(!admits(settings, "192.0.2.1"));
        assert!(!admits(settings, "::1"));
        assert!(admits(settings, "198.51.100.1"));
        assert!(admits(settings, "::2"));
    }

    #[test]
    fn deny_goes_before_allow() {
        let settings = "{ allow: [10.0.0.0/8], deny: [10.0.13.0/24] }";
        assert!(admits(settings, "10.0.12.1"));
        assert!(!admits(settings, "10.0.13.1"));
        assert!(!admits(settings, "192.0.2.1"));
    }

    #[test]
    fn ipv4_within_ipv6_is_ipv4_on_both_sides() {
        assert!(!admits("{ deny: [192.0.2.0/24] }", "::ffff:192.0.2.1"));
        assert!(!admits("{ deny: ['::ffff:192.0.2.0/120'] }", "192.0.2.1"));
        assert!(!admits("{ deny: ['::ffff:192.0.2.1'] }", "::ffff:192.0.2.1"));
        assert!(!admits("{ allow: ['::/0'] }", "::ffff:192.0.2.1"), "::/0 is all of IPv6 and nothing of IPv4");
    }

    #[test]
    fn a_client_without_address_is_in_no_list() {
        let verdict = |settings: &str| {
            let mut rehearsal = Rehearsal::of(&format!("- access: {settings}"));
            rehearsal.client = None;
            rehearsal.verdict()
        };
        assert!(matches!(verdict("{ deny: [0.0.0.0/0] }"), Verdict::Continue));
        assert!(matches!(verdict("{ allow: [0.0.0.0/0, '::/0'] }"), Verdict::Refuse(_)));
    }

    #[test]
    fn networks_that_overlap_or_touch_are_one_set() {
        let written = "{ allow: [10.1.0.0/16, 10.0.0.0/8, 10.2.3.4, 11.0.0.0/8, 0.0.0.0/32, 255.255.255.255] }";
        for client in ["10.0.0.1", "10.1.2.3", "10.2.3.5", "11.9.9.9", "0.0.0.0", "255.255.255.255"] {
            assert!(admits(written, client), "{client}");
        }
        assert!(!admits(written, "12.0.0.0"));
        assert!(admits("{ allow: [0.0.0.0/0] }", "203.0.113.9"));
    }

    #[test]
    fn bits_behind_the_prefix_do_not_matter() {
        assert!(admits("{ allow: [10.1.2.3/8] }", "10.9.9.9"));
    }

    #[test]
    fn wrong_settings_are_told_with_their_place() {
        let told = "[0].access: neither `allow` nor `deny` names anyone, so this would let everyone in";
        assert_eq!(error("- access: {}"), told);
        assert_eq!(error("- access: { allow: [], deny: [] }"), told);
        for wrong in ["10.0.0.300", "10.0.0.0/33", "example.com", ""] {
            let told = format!(
                "[0].access.allow[1]: `{wrong}` is neither an address nor a network: \
                 write `192.0.2.1`, `10.0.0.0/8` or `2001:db8::/32`"
            );
            assert_eq!(error(&format!("- access: {{ allow: [10.0.0.0/8, '{wrong}'] }}")), told);
        }
        let told = "[0].access.alow: unknown field `alow`, expected `allow` or `deny`";
        assert_eq!(error("- access: { alow: [] }"), told);
    }
}
