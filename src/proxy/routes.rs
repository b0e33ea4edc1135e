//! A route at run time: the treatment of its requests.

pub mod table;

use std::collections::BTreeMap;
use std::sync::Arc;

use super::mirror::Mirror;
use super::retry::Rules;
use super::upgrade::Upgrades;
use crate::body::request::RequestPolicy;
use crate::body::response::ResponsePolicy;
use crate::config;
use crate::config::route::{BufferMode, Grpc, GrpcWeb, HalfClose};
use crate::config::server::Resources;
use crate::eventloop::worker::RouteTag;
use crate::filter::Chain;
use crate::metrics::{Metrics, RouteMetrics};
use crate::party::UpstreamTimeouts;
use crate::upstream::{Split, Timeouts, Upstream};

/// A route at run time.
pub struct Route {
    /// Its name in metrics and logs.
    pub name: String,
    /// Its filters.
    pub chain: Chain,
    /// The destination of its requests.
    pub destination: Destination,
    /// The treatment of gRPC.
    pub grpc: GrpcTerms,
    /// Whether its request bodies are held back until they are complete.
    pub holds_bodies: bool,
    /// How its request bodies are received.
    pub request_policy: RequestPolicy,
    /// How its responses are sent.
    pub response_policy: ResponsePolicy,
    /// The mirror that receives copies of its requests.
    pub mirror: Option<Arc<Mirror>>,
    /// Maximum time of a whole exchange.
    pub deadline: Option<std::time::Duration>,
    /// When failed requests are sent again.
    pub retry: Rules,
    /// Protocols that its clients may switch to.
    pub upgrades: Upgrades,
    /// Maximum time between two pieces of a response that the client accepts.
    pub write_idle: std::time::Duration,
    /// Whether a client that closes its sending side after its request counts as gone.
    pub half_close_aborts: bool,
    /// Names the route in reports about a stalled worker.
    pub tag: RouteTag,
    /// Its metrics.
    pub metrics: Arc<RouteMetrics>,
}

/// A route's treatment of gRPC.
#[derive(Clone, Copy, Debug)]
pub struct GrpcTerms {
    /// Whether gRPC calls are treated as such.
    pub on: bool,
    /// Whether, in addition, all its upstreams speak gRPC.
    pub only: bool,
    /// Whether gRPC-Web calls are bridged to gRPC.
    pub web: bool,
}

/// The destination of a route's requests.
pub enum Destination {
    /// None: a filter responds to all of them.
    Nowhere,
    /// One upstream.
    One(Arc<Upstream>),
    /// Several upstreams, by weight.
    Split(Split<Arc<Upstream>>),
}

impl Destination {
    /// The upstream of the next request.
    pub fn next(&self) -> Option<&Arc<Upstream>> {
        match self {
            Destination::Nowhere => None,
            Destination::One(upstream) => Some(upstream),
            Destination::Split(split) => Some(split.pick()),
        }
    }
}

impl Route {
    /// Builds the route from its configuration, with its filters. Its mirror is added later, if it has one.
    pub fn build(
        written: &config::Route,
        chain: Chain,
        upstreams: &BTreeMap<String, Arc<Upstream>>,
        resources: &Resources,
        metrics: &Metrics,
    ) -> Route {
        let metrics = metrics.route(&written.name);
        // The configuration was checked: a missing upstream has an error of its own that is reported.
        let named = |name: &String| upstreams.get(name).cloned();
        let destination = if let Some(name) = &written.upstream {
            named(name).map_or(Destination::Nowhere, Destination::One)
        } else {
            let sides = written.upstreams.iter().filter_map(|side| Some((named(&side.name)?, side.weight)));
            Split::new(sides).map_or(Destination::Nowhere, Destination::Split)
        };
        let grpc = written.grpc == Grpc::Auto;
        let mut asked = written.upstream.iter().chain(written.upstreams.iter().map(|side| &side.name));
        let only_grpc = grpc && asked.all(|name| upstreams.get(name).is_some_and(|upstream| upstream.speaks_grpc()));
        Route {
            name: written.name.clone(),
            chain,
            destination,
            grpc: GrpcTerms { on: grpc, only: only_grpc, web: written.grpc_web == GrpcWeb::Bridge },
            holds_bodies: written.buffering.request.mode != BufferMode::Stream,
            request_policy: RequestPolicy::build(written, resources, &metrics),
            response_policy: ResponsePolicy::build(written, resources, &metrics),
            write_idle: written.client.write_idle.0,
            half_close_aborts: written.client.half_close == HalfClose::Abort,
            mirror: None,
            deadline: written.deadline.map(|time| time.0),
            retry: Rules::new(&written.retry),
            upgrades: Upgrades::new(&written.upgrades),
            tag: RouteTag::new(&written.name),
            metrics,
        }
    }

    /// The time limits of the upstream.
    pub fn patience(&self, timeouts: Timeouts) -> UpstreamTimeouts {
        UpstreamTimeouts { send: timeouts.send, wait: timeouts.wait, receive: timeouts.receive }
    }
}
