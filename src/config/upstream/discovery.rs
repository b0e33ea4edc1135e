//! Where the endpoints of an upstream are told of: `endpoints:`, `dns:` or `file:`.

use std::net::{IpAddr, SocketAddr};
use std::num::NonZeroU32;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::config::Address;
use crate::config::address::Target;
use crate::config::units::{Size, Time};

/// One server of an upstream.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Endpoint {
    /// `host:port`, `[v6]:port` or `unix:/path`. A host name is resolved at start and again in the background.
    pub address: Address,
    /// Its share of the requests, relative to its neighbours.
    #[serde(default = "Endpoint::default_weight")]
    pub weight: NonZeroU32,
    /// Whether it gets requests only where the others do not suffice: the same as `priority: 1`.
    #[serde(default)]
    pub backup: bool,
    /// The tier it stands in. Tier 0 serves first, and the next ones what those before them cannot.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub priority: Option<u8>,
}

impl Endpoint {
    pub(crate) fn default_weight() -> NonZeroU32 {
        NonZeroU32::MIN
    }

    /// Whether it has port 0, at which nothing can be reached.
    pub(crate) fn has_port_0(&self) -> bool {
        matches!(self.address.target(), Ok(Target::Tcp(_, 0)))
    }

    /// Whether it is said to stand in two tiers.
    pub(crate) fn has_two_tiers(&self) -> bool {
        self.backup && self.priority.is_some()
    }

    /// The tier it stands in.
    pub fn tier(&self) -> u8 {
        self.priority.unwrap_or(self.backup.into())
    }
}

/// Endpoints that are found by a name, which may come and go: every address of `name`, or what `srv` lists.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Dns {
    /// A host name; each of its addresses is an endpoint. It comes with a `port`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// The port of every endpoint.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub port: Option<u16>,
    /// The name of a service, such as `_http._tcp.shop.example.com`: its SRV records have hosts, ports, weights, and as
    /// priorities the tiers. In place of `name` and `port`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub srv: Option<String>,
    /// How long an answer is used at most. It is asked for again when its TTL is over, but not within a second.
    #[serde(default = "Dns::default_refresh")]
    pub refresh: Time,
    /// The servers that are asked, `IP` or `IP:port`, and nobody else; without them, whom the system asks: `/etc/hosts`
    /// and the servers in `/etc/resolv.conf`.
    #[serde(default)]
    pub servers: Vec<String>,
    /// How long one look-up may take, all servers and repetitions together.
    #[serde(default = "Dns::default_timeout")]
    pub timeout: Time,
}

impl Dns {
    /// What holds for names in `endpoints` as well.
    pub(crate) fn default_refresh() -> Time {
        Time::seconds(30)
    }

    pub(crate) fn default_timeout() -> Time {
        Time::seconds(5)
    }

    /// A server as it is written; `None` if it is none.
    pub fn server(written: &str) -> Option<SocketAddr> {
        written.parse().ok().or_else(|| written.parse().ok().map(|ip: IpAddr| SocketAddr::new(ip, 53)))
    }
}

/// Endpoints that a file lists, as `endpoints` would. It is read again when it changes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct FileSource {
    /// The file: a list in YAML. It must be there at start, if with an empty list: `[]`. Change it by renaming a new
    /// one to it.
    pub path: String,
    /// How often it is looked at, even if the system says nothing of a change.
    #[serde(default = "FileSource::default_refresh")]
    pub refresh: Time,
    /// How large it may be; a larger one is not read.
    #[serde(default = "FileSource::default_max_size")]
    pub max_size: Size,
}

impl FileSource {
    fn default_refresh() -> Time {
        Time::seconds(5)
    }

    fn default_max_size() -> Size {
        Size::kib(16 * 1024)
    }
}
