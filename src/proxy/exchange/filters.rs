//! The state that a route's filters keep for an exchange, and their results.

use std::sync::atomic::{AtomicU16, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use http::StatusCode;

use crate::filter::{Answer, Refused, States};

/// The filters of an exchange.
#[derive(Default)]
pub struct Filters {
    /// The filters' state. `None`: the route has no filters, or is not chosen yet.
    pub states: Option<Arc<FilterStates>>,
    /// The response of a filter in place of the endpoint's, until it is sent.
    pub answer: Option<Answer>,
    /// The refusal of a filter, until it takes effect.
    refused: Option<Refused>,
}

impl Filters {
    /// The status of the response; 0 until the response filters have seen its header.
    pub fn status(&self) -> u16 {
        self.states.as_ref().map_or(0, |states| states.status())
    }

    /// Number of attempts that began to send the request.
    pub fn attempt(&self) -> u32 {
        self.states.as_ref().map_or(0, |states| states.attempt.load(Ordering::Relaxed))
    }

    /// Records a refusal; only the first one counts.
    pub fn refuse(&mut self, refused: Refused) {
        self.refused.get_or_insert(refused);
    }

    /// Takes the refusal that was recorded here or in the shared state.
    pub fn take_refused(&mut self) -> Option<Refused> {
        self.refused.take().or_else(|| self.states.as_ref()?.take_refused())
    }
}

/// Filter states that the exchange and its response tap use alternately. Both belong to one task, so a lock never
/// blocks; it is not held while a filter runs.
pub struct FilterStates {
    states: Mutex<Option<States>>,
    refused: Mutex<Option<Refused>>,
    /// The status of the response; 0 until the response filters see its header.
    status: AtomicU16,
    /// Number of attempts that began to send the request.
    attempt: AtomicU32,
}

impl FilterStates {
    /// Shares `states`.
    pub fn new(states: States) -> Arc<Self> {
        Arc::new(FilterStates {
            states: Mutex::new(Some(states)),
            refused: Mutex::new(None),
            status: AtomicU16::new(0),
            attempt: AtomicU32::new(0),
        })
    }

    /// Takes the states for one stage. `None` while another stage has them, which cannot occur within one task.
    pub fn take(&self) -> Option<States> {
        self.states.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// Calls `look` with the states.
    pub(super) fn with(&self, look: impl FnOnce(&States) -> bool) -> bool {
        self.states.lock().unwrap_or_else(PoisonError::into_inner).as_ref().is_some_and(look)
    }

    /// Puts the states back.
    pub fn put(&self, states: States) {
        *self.states.lock().unwrap_or_else(PoisonError::into_inner) = Some(states);
    }

    /// Records a refusal by a filter that has no access to the exchange.
    pub fn refuse(&self, refused: Refused) {
        self.refused.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(refused);
    }

    /// The status of the response; 0 until the response filters have seen its header.
    pub fn status(&self) -> u16 {
        self.status.load(Ordering::Relaxed)
    }

    /// Counts the start of an attempt.
    pub fn begin_attempt(&self) {
        self.attempt.fetch_add(1, Ordering::Relaxed);
    }

    /// Records the status of a received response header.
    pub(super) fn answered(&self, status: StatusCode) {
        self.status.store(status.as_u16(), Ordering::Relaxed);
    }

    fn take_refused(&self) -> Option<Refused> {
        self.refused.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::refusal;

    #[test]
    fn the_first_refusal_counts_wherever_it_was_noted() {
        let mut filters = Filters { states: Some(FilterStates::new(States::default())), ..Filters::default() };
        let states = filters.states.clone().expect("states");
        assert!(filters.take_refused().is_none());
        states.refuse(Refused::from(&refusal::RECEIVE_ABORTED));
        filters.refuse(Refused::from(&refusal::ROUTE_NO_MATCH));
        filters.refuse(Refused::from(&refusal::INTERNAL));
        assert_eq!(filters.take_refused().map(|refused| refused.refusal), Some(&refusal::ROUTE_NO_MATCH));
        assert_eq!(filters.take_refused().map(|refused| refused.refusal), Some(&refusal::RECEIVE_ABORTED));
        assert!(filters.take_refused().is_none());
    }

    #[test]
    fn one_stage_at_a_time_has_the_states() {
        let states = FilterStates::new(States::default());
        let taken = states.take().expect("the states");
        assert!(states.take().is_none() && !states.with(|_| true));
        states.put(taken);
        assert!(states.with(|_| true));
        assert_eq!(states.status(), 0);
        states.answered(StatusCode::IM_A_TEAPOT);
        assert_eq!(states.status(), 418);
    }
}
