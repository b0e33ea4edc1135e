//! The cooperative budget of a task: the number of operations in one poll (tokio's `coop`).

use std::task::{Context, Poll};

use tokio::task::coop::{has_budget_remaining, poll_proceed};

/// Operations per poll of a task.
pub const OPERATIONS_PER_POLL: usize = 128;

/// Consumes this many units of the task's budget, or the rest of it.
pub fn spend_budget(cx: &mut Context<'_>, units: usize) {
    for _ in 0..units {
        match poll_proceed(cx) {
            Poll::Ready(unit) => unit.made_progress(),
            Poll::Pending => return,
        }
    }
}

/// Consumes the rest of the task's budget, if it has one: this poll makes no further progress.
pub fn exhaust_budget(cx: &mut Context<'_>) {
    for _ in 0..OPERATIONS_PER_POLL {
        if !has_budget_remaining() {
            return;
        }
        spend_budget(cx, 1);
    }
}

/// Whether the task's budget is used up, so that the task continues in another poll. Wakes the task if so.
pub fn ends_for_lack_of_budget(cx: &Context<'_>) -> bool {
    let ends = !has_budget_remaining();
    if ends {
        cx.waker().wake_by_ref();
    }
    ends
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[tokio::test]
    async fn a_poll_that_ends_for_lack_of_budget_is_followed_by_another() {
        let mut polls = 0;
        let future = std::future::poll_fn(|cx| {
            polls += 1;
            if polls == 1 {
                assert!(!ends_for_lack_of_budget(cx));
                exhaust_budget(cx);
            }
            if ends_for_lack_of_budget(cx) { Poll::Pending } else { Poll::Ready(()) }
        });
        tokio::time::timeout(Duration::from_secs(10), future).await.expect("it was woken");
        assert_eq!(polls, 2);
    }

    #[tokio::test]
    async fn a_task_without_a_budget_continues() {
        tokio::task::unconstrained(std::future::poll_fn(|cx| {
            exhaust_budget(cx);
            Poll::Ready(())
        }))
        .await;
    }
}
