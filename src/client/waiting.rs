//! Who is waited for: the gauge of clients that keep their exchanges waiting, and the list of who they are.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use pingora::http::RequestHeader;
use prometheus::IntGauge;

use super::account::{Account, Accounts};
use super::slow::Entry;

/// A client is waited for, and counted among those, until this is dropped.
pub struct Waiting {
    /// Since when.
    pub since: Instant,
    slow: Option<IntGauge>,
    entry: Entry,
}

impl Waiting {
    /// One more, from now on.
    pub fn begin(gauge: Option<&IntGauge>, entry: &Entry) -> Self {
        if let Some(gauge) = gauge {
            gauge.inc();
        }
        let since = Instant::now();
        entry.begin(since);
        Waiting { since, slow: gauge.cloned(), entry: entry.clone() }
    }

    /// For how long.
    pub fn lasted(&self) -> Duration {
        self.since.elapsed()
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        if let Some(slow) = &self.slow {
            slow.dec();
        }
        self.entry.end(Instant::now());
    }
}

/// Whom one waits for, as far as it is at hand when an exchange begins.
#[derive(Clone, Debug, Default)]
pub struct Who {
    /// The client's address.
    pub client: Option<IpAddr>,
    /// Its account, if its connection has it.
    pub account: Option<Arc<Account>>,
    /// What it asked for, where a filter may have changed that.
    pub target: Option<http::Uri>,
}

impl Who {
    /// On whose account its bodies are held. Looked for only where a proxy speaks for the client.
    pub fn account(&self, accounts: &Arc<Accounts>) -> Option<Arc<Account>> {
        self.account.clone().or_else(|| accounts.of(self.client?))
    }

    /// Method and path, without the query: that may hold what is nobody's business.
    pub fn asked(&self, request: &RequestHeader) -> String {
        format!("{} {}", request.method, self.target.as_ref().unwrap_or(&request.uri).path())
    }
}
