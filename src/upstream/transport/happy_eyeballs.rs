//! Two addresses of one server, IPv6 and IPv4: which is tried first, and what happens if it does not respond.
//!
//! A listed address may be unreachable: a host may lack IPv6, or packets may be dropped. So the second address is tried
//! as well if the first has not responded after a delay (RFC 8305). The responding address is then tried first for some
//! time, so that a dead address does not delay every connection.

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::party::wait::{NoClient, within};

/// How long the address that responded is tried first (similar to RFC 8305 §8).
const KEPT: Duration = Duration::from_secs(600);

/// Two addresses of one server; the first is preferred.
#[derive(Debug)]
pub(super) struct Pair {
    first: SocketAddr,
    second: SocketAddr,
    /// When the second one last responded instead of the first, in milliseconds from `base`, plus 1; 0: never.
    turned: AtomicU64,
    base: Instant,
}

impl Pair {
    pub fn new(first: SocketAddr, second: SocketAddr, now: Instant) -> Pair {
        Pair { first, second, turned: AtomicU64::new(0), base: now }
    }

    /// Whether it consists of these two.
    pub fn is(&self, first: SocketAddr, second: SocketAddr) -> bool {
        self.first == first && self.second == second
    }

    /// The address to try first.
    pub fn preferred(&self, now: Instant) -> SocketAddr {
        let turned = self.turned.load(Ordering::Relaxed);
        let holds = turned > 0 && self.millis(now).saturating_sub(turned) < KEPT.as_millis() as u64;
        if holds { self.second } else { self.first }
    }

    /// The other address.
    pub fn other(&self, address: SocketAddr) -> SocketAddr {
        if address == self.first { self.second } else { self.first }
    }

    /// Reports that this address has responded, and the other one, tried before it, has not.
    pub fn prefer(&self, address: SocketAddr, now: Instant) {
        let turned = if address == self.second { self.millis(now) } else { 0 };
        self.turned.store(turned, Ordering::Relaxed);
    }

    fn millis(&self, now: Instant) -> u64 {
        u64::try_from(now.saturating_duration_since(self.base).as_millis()).unwrap_or(u64::MAX - 1) + 1
    }
}

/// The result of the first successful attempt, and whether that was the second. The second starts when the first
/// has failed or after `delay`. If both fail, returns the first error.
pub(super) async fn race<T>(
    first: impl Future<Output = io::Result<T>>,
    second: impl Future<Output = io::Result<T>>,
    delay: Duration,
) -> io::Result<(T, bool)> {
    let (mut first, mut second) = (pin!(first), pin!(second));
    match within(delay, NoClient::Within, &mut first).await {
        Some(Ok(made)) => return Ok((made, false)),
        Some(Err(error)) => return second.await.map(|made| (made, true)).map_err(|_| error),
        None => {}
    }
    tokio::select! {
        made = &mut first => match made {
            Ok(made) => Ok((made, false)),
            Err(error) => second.await.map(|made| (made, true)).map_err(|_| error),
        },
        made = &mut second => match made {
            Ok(made) => Ok((made, true)),
            Err(_) => first.await.map(|made| (made, false)),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    use std::future::{pending, ready};

    const DELAY: Duration = Duration::from_millis(250);

    fn failed(word: &'static str) -> io::Result<&'static str> {
        Err(io::Error::other(word))
    }

    async fn after(millis: u64, made: io::Result<&'static str>) -> io::Result<&'static str> {
        tokio::time::sleep(Duration::from_millis(millis)).await;
        made
    }

    async fn raced(
        first: impl Future<Output = io::Result<&'static str>>,
        second: impl Future<Output = io::Result<&'static str>>,
    ) -> (Result<&'static str, String>, u128) {
        let started = tokio::time::Instant::now();
        let made = race(first, second, DELAY).await;
        (made.map(|(made, _)| made).map_err(|error| error.to_string()), started.elapsed().as_millis())
    }

    #[tokio::test(start_paused = true)]
    async fn whoever_answers_first_is_taken() {
        assert_eq!(raced(after(100, Ok("v6")), pending()).await, (Ok("v6"), 100));
        assert_eq!(raced(pending(), after(10, Ok("v4"))).await, (Ok("v4"), 260), "v6 swallows everything");
        assert_eq!(raced(after(300, Ok("v6")), after(200, Ok("v4"))).await, (Ok("v6"), 300));
    }

    #[tokio::test(start_paused = true)]
    async fn what_fails_at_once_costs_nothing() {
        assert_eq!(raced(ready(failed("no route")), after(10, Ok("v4"))).await, (Ok("v4"), 10));
        assert_eq!(raced(after(300, Ok("v6")), ready(failed("refused"))).await, (Ok("v6"), 300));
        assert_eq!(raced(after(260, failed("reset")), after(100, Ok("v4"))).await, (Ok("v4"), 350));
    }

    #[tokio::test(start_paused = true)]
    async fn if_both_fail_it_is_as_if_there_were_only_the_first() {
        assert_eq!(raced(ready(failed("no route")), ready(failed("refused"))).await, (Err("no route".to_owned()), 0));
        let late = raced(after(400, failed("reset")), after(100, failed("refused"))).await;
        assert_eq!(late, (Err("reset".to_owned()), 400));
    }

    #[test]
    fn the_one_that_answered_is_asked_first_for_some_time() {
        let [v6, v4] = ["[::1]:80", "10.0.0.1:80"].map(|address| address.parse().unwrap());
        let start = Instant::now();
        let pair = Pair::new(v6, v4, start);
        let at = |seconds| start + Duration::from_secs(seconds);
        assert_eq!((pair.preferred(at(0)), pair.other(v6), pair.other(v4)), (v6, v4, v6));
        pair.prefer(v4, at(5));
        assert_eq!([pair.preferred(at(5)), pair.preferred(at(604)), pair.preferred(at(606))], [v4, v4, v6]);
        pair.prefer(v4, at(610));
        pair.prefer(v6, at(611));
        assert_eq!(pair.preferred(at(611)), v6);
    }
}
