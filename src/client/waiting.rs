//! What waiting takes: a timer that is set anew without being made anew, the gauge of those who are waited for, and the
//! list of who they are.

use std::net::IpAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use pingora::http::RequestHeader;
use prometheus::IntGauge;
use tokio::time::Sleep;

use super::account::{Account, Accounts};
use super::slow::Entry;

/// A deadline that may move. Costs nothing until it is first polled.
#[derive(Default)]
pub struct Timer(Option<Pin<Box<Sleep>>>);

impl Timer {
    /// Ready once it is `due`.
    pub fn poll(&mut self, cx: &mut Context<'_>, due: Instant) -> Poll<()> {
        let due = tokio::time::Instant::from_std(due);
        let timer = self.0.get_or_insert_with(|| Box::pin(tokio::time::sleep_until(due)));
        if timer.deadline() != due {
            timer.as_mut().reset(due);
        }
        timer.as_mut().poll(cx)
    }
}

/// A deadline that mostly moves away before it is met, and often: the timer beneath is only set anew when it fires.
#[derive(Default)]
pub struct Alarm {
    timer: Timer,
    set: Option<Instant>,
}

impl Alarm {
    /// Ready once it is `due`.
    pub fn poll(&mut self, cx: &mut Context<'_>, due: Instant) -> Poll<()> {
        let set = self.set.filter(|&set| set <= due);
        let early = *self.set.insert(set.unwrap_or(due));
        if self.timer.poll(cx, early).is_pending() {
            return Poll::Pending;
        }
        self.set = Some(due);
        self.timer.poll(cx, due)
    }
}

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
