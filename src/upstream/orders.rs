//! The operator's orders for endpoints: drain, enable, set the weight.
//!
//! An order holds until it is undone, or until no upstream of this name is left: a reload never puts an endpoint
//! back into service. It is stored by the endpoint's identity, since a name may lose an address and get it back,
//! and the operator meant that machine. The admin endpoint issues orders (`admin/upstreams.rs`), and
//! `Upstream::discovered` applies them to new endpoints.

use std::collections::HashMap;
use std::num::NonZeroU32;
use std::time::Instant;

use super::endpoint::Endpoint;

/// An order for an endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// It gets no new requests.
    Drain,
    /// It gets requests again.
    Enable,
    /// It gets this weight; `None`: that of its source.
    Weigh(Option<NonZeroU32>),
}

/// The orders, by identity of the endpoints.
#[derive(Debug, Default)]
pub(super) struct Overrides(HashMap<Box<str>, Standing>);

/// The orders for one endpoint.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Standing {
    drained: bool,
    weight: Option<NonZeroU32>,
}

impl Overrides {
    /// Carries out an order and stores it.
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

    /// Applies stored orders to a new endpoint.
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
