//! What the operator orders of endpoints: to take one out, to put it back, to give it another weight.
//!
//! An order holds until it is undone, or no upstream of this name is left: a reload, perhaps of somebody else's making,
//! puts nothing back into service. It is kept by the endpoint's identity and not in the endpoint alone, for a name may
//! lose an address and find it again: an operator who drained it meant that machine. The admin endpoint gives orders
//! (`admin/upstreams.rs`), `Upstream::discovered` repeats them to endpoints that come.

use std::collections::HashMap;
use std::num::NonZeroU32;
use std::time::Instant;

use super::endpoint::Endpoint;

/// What can be ordered of an endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// It is given nothing new.
    Drain,
    /// It may be given something again.
    Enable,
    /// It gets this share; `None`: that of its source.
    Weigh(Option<NonZeroU32>),
}

/// The orders that hold, by the identity of the endpoints.
#[derive(Debug, Default)]
pub(super) struct Orders(HashMap<Box<str>, Standing>);

/// What holds for one endpoint.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Standing {
    drained: bool,
    weight: Option<NonZeroU32>,
}

impl Orders {
    /// Carries out an order, and remembers it.
    pub fn give(&mut self, endpoint: &Endpoint, order: Order, now: Instant) {
        let standing = self.0.entry(endpoint.identity.clone()).or_default();
        match order {
            Order::Drain => standing.drained = true,
            Order::Enable => standing.drained = false,
            Order::Weigh(weight) => standing.weight = weight,
        }
        let standing = *standing;
        if standing == Standing::default() {
            self.0.remove(&endpoint.identity);
        }
        standing.apply(endpoint, now);
    }

    /// Repeats what holds for this endpoint, which has just come.
    pub fn repeat(&self, endpoint: &Endpoint, now: Instant) {
        if let Some(standing) = self.0.get(&endpoint.identity) {
            standing.apply(endpoint, now);
        }
    }
}

impl Standing {
    fn apply(self, endpoint: &Endpoint, now: Instant) {
        endpoint.set_draining(self.drained, now);
        endpoint.set_weight(self.weight);
    }
}
