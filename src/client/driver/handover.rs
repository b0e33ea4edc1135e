//! Hands a started exchange over to Pingora's driver, together with its context.
//!
//! Pingora's driver creates the context of a session with `ProxyHttp::new_ctx`, which has no argument. A thread-local
//! variable therefore holds the existing context while the driver's future is polled.

use std::any::Any;
use std::cell::RefCell;
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};

type Exchange = Box<dyn Any + Send>;

thread_local! {
    static BEGUN: RefCell<Option<Exchange>> = const { RefCell::new(None) };
}

/// Takes the context of the exchange whose future is being polled. `None` if it was taken, or if there is none.
pub fn begun<T: Any>() -> Option<T> {
    BEGUN.take()?.downcast().ok().map(|exchange| *exchange)
}

/// A future of Pingora's driver that continues an exchange.
pub struct HandedOver<F> {
    future: F,
    exchange: Option<Exchange>,
}

impl<F> HandedOver<F> {
    /// Wraps `future`, which continues `exchange`.
    pub fn new(exchange: impl Any + Send, future: F) -> Self {
        HandedOver { future, exchange: Some(Box::new(exchange)) }
    }
}

impl<F: Future + Unpin> Future for HandedOver<F> {
    type Output = F::Output;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<F::Output> {
        if self.exchange.is_none() {
            return Pin::new(&mut self.future).poll(cx);
        }
        BEGUN.set(self.exchange.take());
        let polled = Pin::new(&mut self.future).poll(cx);
        self.exchange = BEGUN.take();
        polled
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn an_exchange_is_handed_to_the_future_that_asks_for_it_and_to_no_other() {
        let later = HandedOver::new(
            7_u32,
            Box::pin(async {
                tokio::task::yield_now().await;
                begun::<u32>()
            }),
        );
        let other = async { begun::<u32>() };
        assert_eq!(tokio::join!(later, other), (Some(7), None));
        assert_eq!(begun::<u32>(), None);
    }
}
