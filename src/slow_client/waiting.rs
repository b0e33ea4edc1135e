//! Waits for clients: the gauge of clients that keep their exchanges waiting, and their entries in the list.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use pingora::http::RequestHeader;
use prometheus::IntGauge;

use super::Entry;
use crate::account::{Account, Accounts};
use crate::party::pauses::paused;

/// A wait for a client, counted until this is dropped.
pub struct Waiting {
    /// Start of the wait.
    pub since: Instant,
    slow: Option<IntGauge>,
    entry: Entry,
}

impl Waiting {
    /// Starts a wait.
    pub fn begin(gauge: Option<&IntGauge>, entry: &Entry) -> Self {
        if let Some(gauge) = gauge {
            gauge.inc();
        }
        let since = Instant::now();
        entry.begin(since);
        Waiting { since, slow: gauge.cloned(), entry: entry.clone() }
    }

    /// Duration of the wait so far, without the time for which the gateway did not run.
    pub fn lasted(&self) -> Duration {
        let now = Instant::now();
        now.saturating_duration_since(self.since).saturating_sub(paused(self.since, now, None))
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

/// The client of an exchange, as known at its start.
#[derive(Clone, Debug, Default)]
pub struct Who {
    /// The client's address.
    pub client: Option<IpAddr>,
    /// Its account, if its connection has one.
    pub account: Option<Arc<Account>>,
    /// The original target, if a filter may have changed it.
    pub target: Option<http::Uri>,
}

impl Who {
    /// The account for the client's held bodies. A look-up is needed only if a proxy names the client.
    pub fn account(&self, accounts: &Arc<Accounts>) -> Option<Arc<Account>> {
        self.account.clone().or_else(|| accounts.of(self.client?))
    }

    /// Method and path, without the query, which may be confidential.
    pub fn asked(&self, request: &RequestHeader) -> String {
        format!("{} {}", request.method, self.target.as_ref().unwrap_or(&request.uri).path())
    }
}
