//! `ip_set`: admits or refuses clients by a file of addresses and networks that changes.
//!
//! ```yaml
//! - ip_set:
//!     source: { path: /etc/forebay/blocked.txt, refresh: 60s, max_size: 16MiB }
//!     action: deny               # or allow: clients outside of the file are refused
//! ```
//!
//! Each line has one address or network; `#` begins a comment. The file is read again when it changes. If it is then
//! invalid, the previous content stays in use and the error is logged. For a few networks that do not change, use
//! `access`.

use std::sync::Arc;

use async_trait::async_trait;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::access::{Network, Networks};
use super::auth::Gate;
use super::listed::{Listed, Source, lines};
use super::{Filter, FilterType, Scope, Stages, Surroundings, Verdict};
use crate::error::{BuildError, Refusal};
use crate::metrics::filters::Access;

/// Admits or refuses clients by a file of addresses and networks. The file is read again when it changes.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// The file. Each line has one address or network; `#` begins a comment.
    pub source: Source,
    /// The treatment of clients in the file.
    #[serde(default)]
    pub action: Action,
}

/// The treatment of clients whose address is in the file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Action {
    /// They are refused, and all others are admitted.
    #[default]
    Deny,
    /// They are admitted, and all others are refused.
    Allow,
}

static LISTED: Refusal = Refusal::new("route.ip_set", 403, "Access from this address is not allowed.");

/// Refuses clients by a file of addresses.
pub struct IpSet {
    networks: Arc<Listed<Networks>>,
    action: Action,
    gate: Gate,
}

#[async_trait]
impl Filter for IpSet {
    fn stages(&self) -> Stages {
        Stages::REQUEST
    }

    async fn request(&self, scope: &mut Scope<'_>) -> Verdict {
        // A client of a unix socket has no address, and is in no list.
        let listed = scope.facts.client.is_some_and(|client| self.networks.now().contain(client));
        if listed != (self.action == Action::Allow) {
            return self.gate.refuse(Access::Forbidden, &LISTED, Vec::new());
        }
        self.gate.count(Access::Granted);
        Verdict::Continue
    }
}

impl FilterType for IpSet {
    const KEY: &'static str = "ip_set";
    const REFUSALS: &'static [&'static Refusal] = &[&LISTED];
    type Settings = Settings;

    fn build(settings: &Settings, around: &Surroundings<'_>) -> Result<Self, BuildError> {
        let networks = Listed::build(&settings.source, around, networks).map_err(|error| error.under("source"))?;
        Ok(IpSet { networks, action: settings.action, gate: Gate::of(around) })
    }
}

/// The networks in the text of a file. The text may be empty; then it matches no client.
fn networks(text: &str) -> Result<Networks, String> {
    let network = |(number, line): (usize, &str)| {
        let written = line.split('#').next().unwrap_or_default().trim();
        Network::try_from(written.to_owned()).map_err(|told| format!("line {number}: {told}"))
    };
    lines(text).map(network).collect::<Result<Vec<_>, _>>().map(|networks| Networks::new(&networks))
}

#[cfg(test)]
mod tests {
    use super::super::rehearsal::{Rehearsal, error};
    use super::*;

    /// Whether a client is admitted.
    fn admits(action: &str, text: &str, client: &str) -> bool {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), text).unwrap();
        let filter = format!("- ip_set: {{ source: {{ path: {} }}, action: {action} }}", file.path().display());
        matches!(Rehearsal::of(&filter).from(client).verdict(), Verdict::Continue)
    }

    #[test]
    fn who_is_in_the_file_is_kept_out_or_let_in() {
        let text = "# bad ones\n192.0.2.7   # a bot\n10.0.0.0/8\n\n2001:db8::/32\n";
        for client in ["192.0.2.7", "10.200.0.1", "2001:db8::1", "::ffff:10.0.0.1"] {
            assert!(!admits("deny", text, client) && admits("allow", text, client), "{client}");
        }
        for client in ["192.0.2.8", "11.0.0.1", "2001:db9::1"] {
            assert!(admits("deny", text, client) && !admits("allow", text, client), "{client}");
        }
        assert!(admits("deny", "", "192.0.2.7") && !admits("allow", "", "192.0.2.7"));
    }

    #[test]
    fn a_line_that_is_no_network_is_told() {
        let told = networks("10.0.0.1\n\n10.0.0.256\n").map(drop).unwrap_err();
        assert!(told.starts_with("line 3: `10.0.0.256` is neither an address nor a network"), "{told}");
        let told = error("- ip_set: { source: { path: /nowhere/set } }");
        assert!(told.starts_with("[0].ip_set.source.path: `/nowhere/set` cannot be read"), "{told}");
    }
}
