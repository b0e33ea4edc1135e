//! The destination of an exchange and its rules.

use std::sync::Arc;

use crate::client::driver::course::Course;
use crate::proxy::epoch::Epoch;
use crate::proxy::forwarded::Additions;
use crate::proxy::routes::Route;
use crate::upstream::Upstream;
use crate::upstream::sticky::StickyTarget;

/// The destination of an exchange. Each part is set in its phase and does not change afterwards.
#[derive(Default)]
pub struct Routing {
    /// The generation of the configuration, from phase `header` on.
    pub epoch: Option<Arc<Epoch>>,
    /// The fields that this generation adds to every request.
    pub additions: Additions,
    /// The route.
    pub route: Option<Arc<Route>>,
    /// The upstream.
    pub upstream: Option<Arc<Upstream>>,
    /// The hash of the exchange's key, for upstreams that balance by hash.
    pub hash: u64,
    /// The endpoint named by Forebay's sticky cookie.
    pub stuck: Option<StickyTarget>,
    /// The driver, once the filters have passed the exchange.
    pub course: Option<Course>,
}

impl Routing {
    /// Sets the generation of the configuration, and the fields that it adds.
    pub fn follow(&mut self, epoch: &Arc<Epoch>, additions: Additions) {
        (self.epoch, self.additions) = (Some(epoch.clone()), additions);
    }

    /// The name of the route; empty until it is chosen.
    pub fn route_name(&self) -> &str {
        self.route.as_ref().map_or("", |route| &route.name)
    }

    /// Whether route and upstream treat gRPC calls as such.
    pub fn is_of_grpc(&self) -> bool {
        let route = self.route.as_ref().is_some_and(|route| route.grpc.on);
        route && self.upstream.as_ref().is_some_and(|upstream| upstream.speaks_grpc())
    }
}
