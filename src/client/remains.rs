//! Collects the parts of an exchange that was dropped before its end, so that it can still be settled.
//!
//! A cancelled exchange ends by itself if possible. If Pingora waits for something that nothing aborts, such as a
//! connect, only dropping the exchange ends the wait. Its parts are dropped one after the other. Each leaves its facts
//! here, and [`collect`] returns them to the code that dropped the exchange.

use std::any::Any;
use std::cell::{Cell, RefCell};

use pingora::http::RequestHeader;

/// The remains of an exchange.
#[derive(Default)]
pub struct Remains {
    /// The exchange, of a type that only the proxy knows. `None` if it was settled.
    pub exchange: Option<Box<dyn Any>>,
    /// The request header. `None` if Pingora's own session had it.
    pub request: Option<RequestHeader>,
}

/// Settles dropped exchanges: counts and logs them.
pub trait SettlesExchanges: Send + Sync {
    /// Settles one exchange.
    fn settle(&self, remains: Remains);
}

thread_local! {
    /// Whether dropped parts must leave their facts, and the facts left so far.
    static COLLECTS: Cell<bool> = const { Cell::new(false) };
    static LEFT: RefCell<Remains> = const { RefCell::new(Remains { exchange: None, request: None }) };
}

/// Drops an exchange and returns its remains.
pub fn collect(drop: impl FnOnce()) -> Remains {
    COLLECTS.set(true);
    drop();
    COLLECTS.set(false);
    LEFT.take()
}

/// Whether dropped parts must leave their facts. It can also be called while a thread ends.
pub fn are_wanted() -> bool {
    COLLECTS.try_with(Cell::get).unwrap_or(false)
}

/// Leaves the exchange.
pub fn leave(exchange: Box<dyn Any>) {
    LEFT.with_borrow_mut(|left| left.exchange = Some(exchange));
}

/// Leaves the request of a session that is being dropped, if remains are wanted. Only the first one counts, since an
/// inner session has a stub. `true`: the request was left.
pub fn leave_request(request: &mut RequestHeader) -> bool {
    if !are_wanted() {
        return false;
    }
    LEFT.with_borrow_mut(|left| {
        left.request.get_or_insert_with(|| std::mem::replace(request, stub()));
    });
    true
}

/// A stub that replaces a request moved elsewhere. It allocates no memory.
pub fn stub() -> RequestHeader {
    http::Request::new(()).into_parts().0.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Part(u8);

    impl Drop for Part {
        fn drop(&mut self) {
            if are_wanted() {
                leave(Box::new(self.0));
            }
        }
    }

    #[test]
    fn what_is_dropped_leaves_something_to_whoever_collects_and_to_nobody_else() {
        drop(Part(1));
        let remains = collect(|| drop(Part(2)));
        let left = remains.exchange.and_then(|left| left.downcast::<u8>().ok());
        assert_eq!((left.as_deref(), remains.request.is_none()), (Some(&2), true));
        assert!(collect(|| ()).exchange.is_none());
    }
}
