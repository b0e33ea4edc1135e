//! State of filters that outlives a reload, such as the request rates of clients.
//!
//! Every configuration builds its filters anew. A filter requests its lasting state by a name, and gets the state of
//! the same filter of the same route in the previous configuration. State that no filter requests any more is
//! dropped.

use std::any::Any;
use std::cell::RefCell;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError, Weak};

/// Any state of a filter.
type Thing = dyn Any + Send + Sync;

/// The state of the filters of all routes.
#[derive(Default)]
pub struct Kept(Mutex<HashMap<String, Weak<Thing>>>);

/// The same while the filters of one configuration are built.
pub struct Keeping<'k> {
    kept: &'k Kept,
    /// How often each name was requested before: each occurrence of a filter has its own state.
    asked: RefCell<HashMap<String, usize>>,
}

impl Kept {
    /// Starts to build filters.
    pub fn begin(&self) -> Keeping<'_> {
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        kept.retain(|_, thing| thing.strong_count() > 0);
        drop(kept);
        Keeping { kept: self, asked: RefCell::default() }
    }
}

impl Keeping<'_> {
    /// The state with this name and type, or a new one.
    pub(super) fn keep<T: Any + Send + Sync>(&self, name: &str, make: impl FnOnce() -> T) -> Arc<T> {
        let mut asked = self.asked.borrow_mut();
        let number = asked.entry(name.to_owned()).and_modify(|number| *number += 1).or_insert(1);
        let name = format!("{name} #{number}");
        let mut kept = self.kept.0.lock().unwrap_or_else(PoisonError::into_inner);
        let known = kept.get(&name).and_then(Weak::upgrade).and_then(|thing| thing.downcast::<T>().ok());
        known.unwrap_or_else(|| {
            let thing = Arc::new(make());
            let shared: Arc<Thing> = thing.clone();
            kept.insert(name, Arc::downgrade(&shared));
            thing
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_filter_gets_what_it_had_and_its_twin_something_of_its_own() {
        let kept = Kept::default();
        let first = kept.begin();
        let (one, twin) = (first.keep("all/limit", || 1), first.keep("all/limit", || 2));
        assert_eq!((*one, *twin), (1, 2));
        let second = kept.begin();
        let again = second.keep("all/limit", || 3);
        assert!(Arc::ptr_eq(&one, &again));
        assert!(Arc::ptr_eq(&twin, &second.keep("all/limit", || 4)));
        assert_eq!(*second.keep("all/limit", || 5), 5, "a third was never there");
        assert_eq!(*kept.begin().keep("all/limit", || "of another type"), "of another type");
        drop((one, again));
        assert_eq!(*kept.begin().keep("all/limit", || 6), 6, "no generation had it any more");
    }
}
