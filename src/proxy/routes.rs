//! A route as it runs: how its requests are treated.

pub mod table;

use std::collections::BTreeMap;
use std::sync::Arc;

use super::mirror::Mirror;
use super::retry::Rules;
use super::upgrade::Upgrades;
use crate::client::intake::IntakeTerms;
use crate::client::wire::Manner;
use crate::config;
use crate::config::route::{BufferMode, Grpc, GrpcWeb, HalfClose};
use crate::config::server::Resources;
use crate::eventloop::worker::RouteTag;
use crate::filter::Chain;
use crate::metrics::{Metrics, RouteMetrics};
use crate::party::Patience;
use crate::upstream::{Split, Timeouts, Upstream};

/// A route as it runs.
pub struct Route {
    /// Its name in metrics and logs.
    pub name: String,
    /// Its filters.
    pub chain: Chain,
    /// Where its requests go.
    pub destination: Destination,
    /// How it treats gRPC.
    pub grpc: GrpcTerms,
    /// Whether its request bodies are held back until they are whole.
    pub holds_bodies: bool,
    /// How its request bodies are taken.
    pub intake: IntakeTerms,
    /// How its answers leave.
    pub manner: Manner,
    /// Who gets copies of its requests.
    pub mirror: Option<Arc<Mirror>>,
    /// How long an exchange may take as a whole.
    pub deadline: Option<std::time::Duration>,
    /// When a request that failed is sent again.
    pub retry: Rules,
    /// Protocols that its clients may switch to.
    pub upgrades: Upgrades,
    /// How long its clients may take between two pieces of a response.
    pub write_idle: std::time::Duration,
    /// Whether a client that closes its sending side behind its request is gone.
    pub half_close_aborts: bool,
    /// Names it where a worker is found stalled.
    pub tag: RouteTag,
    /// Its counters.
    pub metrics: Arc<RouteMetrics>,
}

/// How a route treats gRPC.
#[derive(Clone, Copy, Debug)]
pub struct GrpcTerms {
    /// Calls are treated as such.
    pub on: bool,
    /// They are, and each of its upstreams speaks gRPC.
    pub only: bool,
    /// Calls of gRPC-Web become calls of gRPC.
    pub web: bool,
}

/// Where the requests of a route go.
pub enum Destination {
    /// Nowhere: a filter answers all of them.
    Nowhere,
    /// To one upstream.
    One(Arc<Upstream>),
    /// To several, by weight.
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
    /// The route that is written, with its filters. Its mirror is added where it has one.
    pub fn build(
        written: &config::Route,
        chain: Chain,
        upstreams: &BTreeMap<String, Arc<Upstream>>,
        resources: &Resources,
        metrics: &Metrics,
    ) -> Route {
        let metrics = metrics.route(&written.name);
        // The configuration was checked: a name that is not there belongs to an upstream whose own error is reported.
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
            intake: IntakeTerms::build(written, resources, &metrics),
            manner: Manner::build(written, resources, &metrics),
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

    /// How long the upstream may take.
    pub fn patience(&self, timeouts: Timeouts) -> Patience {
        Patience { send: timeouts.send, wait: timeouts.wait, receive: timeouts.receive }
    }
}
