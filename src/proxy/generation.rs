//! A generation of the configuration: what requests go by, made whole each time the file is loaded.
//!
//! An exchange looks its route up in the generation that is current when its header is here, and keeps what it found to
//! its end. So a change of the configuration never meets an exchange half-way, and a table that was replaced is free as
//! soon as no look-up is under way in it, however long an exchange goes on. Everything here is read only.

use std::sync::Arc;

use arc_swap::ArcSwap;

use super::epoch::Epoch;
use super::forwarded::Additions;
use super::header::Rules;
use super::routes::Route;
use super::routes::table::Table;

/// What requests go by.
pub struct Generation {
    /// Tells it from others; every exchange that goes by it keeps this.
    pub epoch: Arc<Epoch>,
    /// Which request goes where.
    pub routes: Table<Arc<Route>>,
    /// What holds for the headers of all requests.
    pub rules: Rules,
    /// What is added to every request.
    pub additions: Additions,
}

/// The generation that the next exchange takes; changed in one step, and read without a lock.
pub type Current = Arc<ArcSwap<Generation>>;
