//! What waiting takes: a timer that is set anew without being made anew, and the gauge of those who are waited for.

use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use prometheus::IntGauge;
use tokio::time::Sleep;

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

/// A client is waited for, and counted among those, until this is dropped.
pub struct Waiting {
    /// Since when.
    pub since: Instant,
    slow: IntGauge,
}

impl Waiting {
    /// One more, from now on.
    pub fn begin(gauge: &IntGauge) -> Self {
        gauge.inc();
        Waiting { since: Instant::now(), slow: gauge.clone() }
    }

    /// For how long.
    pub fn lasted(&self) -> Duration {
        self.since.elapsed()
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        self.slow.dec();
    }
}
