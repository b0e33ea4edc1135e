//! Where an exchange goes, and by what rules.

use std::sync::Arc;

use crate::client::driver::course::Course;
use crate::proxy::epoch::Epoch;
use crate::proxy::forwarded::Additions;
use crate::proxy::routes::Route;
use crate::upstream::Upstream;
use crate::upstream::sticky::Stuck;

/// The way of an exchange. Each part is known from its phase on, and does not change afterwards.
#[derive(Default)]
pub struct Routing {
    /// The generation of the configuration that it goes by, once its header is here.
    pub epoch: Option<Arc<Epoch>>,
    /// What that adds to every request.
    pub additions: Additions,
    /// The route it took.
    pub route: Option<Arc<Route>>,
    /// The upstream it goes to.
    pub upstream: Option<Arc<Upstream>>,
    /// The hash of its key, for upstreams that go by one.
    pub hash: u64,
    /// Where its client stays, by a cookie of ours.
    pub stuck: Option<Stuck>,
    /// By which driver, once its filters have let it pass.
    pub course: Option<Course>,
}

impl Routing {
    /// It goes by this generation, which adds this to every request.
    pub fn follow(&mut self, epoch: &Arc<Epoch>, additions: Additions) {
        (self.epoch, self.additions) = (Some(epoch.clone()), additions);
    }

    /// The name of the route; empty before one is taken.
    pub fn route_name(&self) -> &str {
        self.route.as_ref().map_or("", |route| &route.name)
    }

    /// Whether its route and its upstream take gRPC calls for what they are.
    pub fn is_of_grpc(&self) -> bool {
        let route = self.route.as_ref().is_some_and(|route| route.grpc.on);
        route && self.upstream.as_ref().is_some_and(|upstream| upstream.speaks_grpc())
    }
}
