//! The accept limit: each round of the event loop accepts few connections; the kernel queues the others.

use std::task::Poll;

use super::coop::{OPERATIONS_PER_POLL, spend_budget};

/// Connections accepted per round of the event loop.
pub const ACCEPTS_PER_ROUND: usize = 4;

/// Limits the number of connections that the calling task accepts per poll. Await it after each accept.
///
/// Without it, a task would accept 128 connections, the number of operations that tokio permits in one poll. Each
/// accept therefore consumes more than one operation.
pub async fn limit_accepts() {
    std::future::poll_fn(|cx| {
        spend_budget(cx, OPERATIONS_PER_POLL / ACCEPTS_PER_ROUND);
        Poll::Ready(())
    })
    .await;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn few_connections_are_accepted_at_a_time() {
        let mut accepted = 0;
        let accept = async {
            loop {
                // A listener's socket consumes budget for each connection in this way.
                tokio::task::coop::consume_budget().await;
                limit_accepts().await;
                accepted += 1;
            }
        };
        {
            let mut accept = std::pin::pin!(accept);
            std::future::poll_fn(|cx| Poll::Ready(accept.as_mut().poll(cx).is_pending())).await;
        }
        assert_eq!(accepted, ACCEPTS_PER_ROUND);
    }
}
