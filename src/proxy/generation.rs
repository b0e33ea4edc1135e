//! A generation of the configuration: the routes and rules for requests, built anew each time the file is loaded.
//!
//! An exchange looks its route up in the generation that is current when its header arrives, and keeps the result until
//! its end. A change of the configuration therefore never affects an active exchange. A replaced table is freed as soon
//! as no look-up uses it, however long exchanges last. A generation is immutable.

use std::sync::Arc;

use arc_swap::ArcSwap;

use super::epoch::Epoch;
use super::forwarded::Additions;
use super::header::Rules;
use super::routes::Route;
use super::routes::table::Table;

/// The routes and rules for requests.
pub struct Generation {
    /// Identifies the generation; every exchange that uses the generation holds this.
    pub epoch: Arc<Epoch>,
    /// The table of routes.
    pub routes: Table<Arc<Route>>,
    /// The rules for all request headers.
    pub rules: Rules,
    /// The fields that are added to every request.
    pub additions: Additions,
}

/// The generation for new exchanges; replaced atomically and read without a lock.
pub type Current = Arc<ArcSwap<Generation>>;
