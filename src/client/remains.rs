//! What is left of an exchange that was dropped before it had ended, so that it is settled all the same.
//!
//! An exchange that is given up ends by itself where it can. Where Pingora waits for something that nothing breaks off,
//! such as a connection that is being made, only dropping the whole ends the wait. Its parts are dropped one after the
//! other; each leaves here what it knows, and [`collect`] gives that to whoever dropped them.

use std::any::Any;
use std::cell::{Cell, RefCell};

use pingora::http::RequestHeader;

/// What is left of an exchange.
#[derive(Default)]
pub struct Remains {
    /// The exchange itself, of a type that only the proxy knows. `None` if it had settled.
    pub exchange: Option<Box<dyn Any>>,
    /// Its request. `None` if Pingora's own session had it.
    pub request: Option<RequestHeader>,
}

/// Settles exchanges that were dropped: counts and logs them.
pub trait Undertaker: Send + Sync {
    /// Settles one.
    fn settle(&self, remains: Remains);
}

thread_local! {
    /// Whether what is dropped is to leave something.
    static COLLECTS: Cell<bool> = const { Cell::new(false) };
    static LEFT: RefCell<Remains> = const { RefCell::new(Remains { exchange: None, request: None }) };
}

/// Drops an exchange; what it leaves.
pub fn collect(drop: impl FnOnce()) -> Remains {
    COLLECTS.set(true);
    drop();
    COLLECTS.set(false);
    LEFT.take()
}

/// Whether what is dropped now is to leave something. Also asked when a thread ends.
pub fn are_wanted() -> bool {
    COLLECTS.try_with(Cell::get).unwrap_or(false)
}

/// The exchange is left.
pub fn leave(exchange: Box<dyn Any>) {
    LEFT.with_borrow_mut(|left| left.exchange = Some(exchange));
}

/// A session is dropped: if what is dropped is to leave something, it leaves its request. The first one counts, for a
/// session within has only a stub of it. `true`: it was left.
pub fn leave_request(request: &mut RequestHeader) -> bool {
    if !are_wanted() {
        return false;
    }
    LEFT.with_borrow_mut(|left| {
        left.request.get_or_insert_with(|| std::mem::replace(request, stub()));
    });
    true
}

/// What is left in the place of a request that somebody else has. Takes no memory.
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
