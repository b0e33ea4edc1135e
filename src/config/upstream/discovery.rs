//! The sources of an upstream's endpoints: `endpoints:`, `dns:` or `file:`.

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
    /// `host:port`, `[v6]:port` or `unix:/path`. A host name is resolved at start and re-resolved in the
    /// background.
    pub address: Address,
    /// Its share of the requests, relative to the other endpoints.
    #[serde(default = "Endpoint::default_weight")]
    pub weight: NonZeroU32,
    /// Uses it only if the other endpoints do not suffice: the same as `priority: 1`.
    #[serde(default)]
    pub backup: bool,
    /// The tier of the endpoint. Tier 0 serves first; each further tier serves what the tiers before it cannot.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub priority: Option<u8>,
}

impl Endpoint {
    pub(crate) fn default_weight() -> NonZeroU32 {
        NonZeroU32::MIN
    }

    /// Whether the port is 0, which cannot be connected to.
    pub(crate) fn has_port_0(&self) -> bool {
        matches!(self.address.target(), Ok(Target::Tcp(_, 0)))
    }

    /// Whether `backup` and `priority` name different tiers.
    pub(crate) fn has_two_tiers(&self) -> bool {
        self.backup && self.priority.is_some()
    }

    /// The tier of the endpoint.
    pub fn tier(&self) -> u8 {
        self.priority.unwrap_or(self.backup.into())
    }
}

/// Endpoints from DNS: every address of `name`, or the records of `srv`. They may change at any time.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Dns {
    /// A host name; each of its addresses is an endpoint. Requires `port`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// The port of every endpoint.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub port: Option<u16>,
    /// The name of a service, such as `_http._tcp.shop.example.com`: its SRV records give hosts, ports, weights
    /// and, as priorities, tiers. Alternative to `name` and `port`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub srv: Option<String>,
    /// Longest use of a response. A new query is sent when the TTL ends, but not within a second.
    #[serde(default = "Dns::default_refresh")]
    pub refresh: Time,
    /// The DNS servers, `IP` or `IP:port`. By default those of the system: `/etc/hosts` and the servers in
    /// `/etc/resolv.conf`.
    #[serde(default)]
    pub servers: Vec<String>,
    /// Time limit for one look-up, all servers and retries together.
    #[serde(default = "Dns::default_timeout")]
    pub timeout: Time,
}

impl Dns {
    /// Names in `endpoints` use the same default.
    pub(crate) fn default_refresh() -> Time {
        Time::seconds(30)
    }

    pub(crate) fn default_timeout() -> Time {
        Time::seconds(5)
    }

    /// Parses a server address; `None` if it is invalid.
    pub fn server(written: &str) -> Option<SocketAddr> {
        written.parse().ok().or_else(|| written.parse().ok().map(|ip: IpAddr| SocketAddr::new(ip, 53)))
    }
}

/// Endpoints from a file, in the format of `endpoints`. The file is read again when it changes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct FileSource {
    /// The file: a YAML list. It must exist at start; it may hold an empty list (`[]`). To change it, rename a new
    /// file over it.
    pub path: String,
    /// How often the file is checked, in addition to file system notifications.
    #[serde(default = "FileSource::default_refresh")]
    pub refresh: Time,
    /// Largest size; a larger file is not read.
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
