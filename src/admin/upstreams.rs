//! `/upstreams`: the current state of every endpoint, and operations on endpoints.
//!
//! GET shows one or all upstreams. POST drains or enables an endpoint, or changes its weight, until that is undone;
//! every change is logged. An endpoint is identified by its address as written, which means all addresses of that
//! name, or by a resolved address. `conf/manual/upstreams.md` documents every field.

use std::collections::BTreeMap;
use std::future::ready;
use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::Instant;

use http::StatusCode;
use serde::{Deserialize, Serialize};

use super::Admin;
use super::reply::Reply;
use super::status::{self, EndpointStatus, Shown};
use super::table::Ask;
use crate::upstream::availability::State;
use crate::upstream::orders::Order;
use crate::upstream::{Endpoint, Upstream};

/// All upstreams. As in [`super::status`], fields may be added, but not removed or given another meaning.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(default)]
pub struct Document {
    /// Sorted by name.
    pub upstreams: Vec<UpstreamDetail>,
}

/// An upstream with all its endpoints.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(default)]
pub struct UpstreamDetail {
    /// Its name.
    pub upstream: String,
    /// The load balancing policy.
    pub policy: String,
    /// Connections used by exchanges, by kind: `new`, `reused`, `failed`.
    pub connects: BTreeMap<String, u64>,
    /// Attempts after the first one of an exchange.
    pub retries: u64,
    /// Number of endpoints by state; states without endpoints are omitted.
    pub states: BTreeMap<String, u64>,
    /// Number of available endpoints.
    pub available: usize,
    /// Number of active exchanges.
    pub inflight: u32,
    /// Exchanges in the queue.
    pub queued: u32,
    /// The state of its circuit breaker: `closed`, `half_open` or `open`; `None` if it has none.
    pub breaker: Option<String>,
    /// All endpoints, including removed ones that are still in use.
    pub endpoints: Vec<EndpointDetail>,
}

/// An endpoint.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(default)]
pub struct EndpointDetail {
    /// The fields that `/status` also has.
    #[serde(flatten)]
    pub status: EndpointStatus,
    /// The reason for its state, in words.
    pub why: String,
    /// Whether it gets requests.
    pub available: bool,
    /// Whether the operator has drained it.
    pub drained: bool,
    /// Whether the operator has set its weight.
    pub weight_ordered: bool,
    /// Time since it last became available; `None` if it was never unavailable.
    pub returned_seconds: Option<f64>,
    /// Number of ejections.
    pub ejections: u64,
    /// The reason for its ejection, as the key in `outlier_detection`.
    pub ejected_for: Option<String>,
    /// Seconds until its ejection ends.
    pub ejected_seconds: Option<f64>,
    /// Why its last failed health check failed, however long ago.
    pub health_error: Option<String>,
    /// Seconds since that check.
    pub health_error_seconds: Option<f64>,
}

/// Adds the pages and operations to the admin endpoint.
pub fn add(admin: Admin, shown: &Shown) -> Admin {
    let [all, one, drain, enable, weight] = [(); 5].map(|()| shown.clone());
    admin
        .get("/upstreams", "every endpoint, as JSON: state, weight, load, latency", move |_| {
            Reply::json(&Document { upstreams: all.load().upstreams.iter().map(|upstream| detail(upstream)).collect() })
        })
        .get("/upstreams/{upstream}", "the same of one upstream", move |ask| {
            asked(&one.load().upstreams, ask).map_or_else(|unknown| unknown, |upstream| Reply::json(&detail(upstream)))
        })
        .post(
            "/upstreams/{upstream}/endpoints/{endpoint}/drain",
            "drain an endpoint: it gets no new requests",
            move |ask| ready(ordered(&drain.load().upstreams, &ask, |_| Ok(Order::Drain))),
        )
        .post("/upstreams/{upstream}/endpoints/{endpoint}/enable", "undo that", move |ask| {
            ready(ordered(&enable.load().upstreams, &ask, |_| Ok(Order::Enable)))
        })
        .post(
            "/upstreams/{upstream}/endpoints/{endpoint}/weight",
            "give it another ?weight=, or `configured`",
            move |ask| ready(ordered(&weight.load().upstreams, &ask, weighed)),
        )
}

/// The upstream in the path.
fn asked<'u>(upstreams: &'u [Arc<Upstream>], ask: &Ask) -> Result<&'u Arc<Upstream>, Reply> {
    let name = ask.part("upstream");
    upstreams.iter().find(|upstream| *upstream.name == *name).ok_or_else(|| {
        let names: Vec<&str> = upstreams.iter().map(|upstream| &*upstream.name).collect();
        let known = if names.is_empty() { "none".to_owned() } else { names.join(", ") };
        Reply::error(StatusCode::NOT_FOUND, &format!("no upstream is called `{name}`; there are: {known}"))
    })
}

/// Executes an operation and returns the state of the endpoints concerned.
fn ordered(upstreams: &[Arc<Upstream>], ask: &Ask, order: impl Fn(&Ask) -> Result<Order, String>) -> Reply {
    let upstream = match asked(upstreams, ask) {
        Ok(upstream) => upstream,
        Err(unknown) => return unknown,
    };
    let order = match order(ask) {
        Ok(order) => order,
        Err(what) => return Reply::error(StatusCode::BAD_REQUEST, &what),
    };
    let name = ask.part("endpoint");
    let meant = upstream.order(name, order);
    if meant.is_empty() {
        let what = format!("`{}` has no endpoint `{name}`; /upstreams/{0} lists them", upstream.name);
        return Reply::error(StatusCode::NOT_FOUND, &what);
    }
    for endpoint in &meant {
        let (upstream, endpoint, address) = (&*upstream.name, &*endpoint.label, &endpoint.address);
        match order {
            Order::Drain => tracing::info!(upstream, endpoint, %address, "drained by order of the operator"),
            Order::Enable => tracing::info!(upstream, endpoint, %address, "enabled by order of the operator"),
            Order::Weigh(weight) => {
                let weight = weight.map_or("configured".to_owned(), |weight| weight.to_string());
                tracing::info!(upstream, endpoint, %address, weight, "weighed by order of the operator");
            }
        }
    }
    let now = Instant::now();
    Reply::json(&meant.iter().map(|endpoint| described(endpoint, now)).collect::<Vec<_>>())
}

fn weighed(ask: &Ask) -> Result<Order, String> {
    let written = ask.query("weight").ok_or("say which: `?weight=5`, or `?weight=configured`")?;
    if written == "configured" {
        return Ok(Order::Weigh(None));
    }
    let weight = written.parse().ok().and_then(NonZeroU32::new);
    weight.map(|weight| Order::Weigh(Some(weight))).ok_or_else(|| {
        format!(
            "`{written}` is not a weight: write a whole number from 1 to {}, or `configured`; to give it nothing, \
             drain it",
            u32::MAX
        )
    })
}

fn detail(upstream: &Upstream) -> UpstreamDetail {
    let now = Instant::now();
    let status = status::grouped(upstream, 0, now);
    let endpoints: Vec<_> = upstream.members().iter().map(|endpoint| described(endpoint, now)).collect();
    UpstreamDetail {
        upstream: status.upstream,
        policy: upstream.policy().name().to_owned(),
        connects: status.connects,
        retries: status.retries,
        states: status.states,
        available: endpoints.iter().filter(|endpoint| endpoint.available).count(),
        inflight: upstream.inflight(),
        queued: upstream.queued(),
        breaker: upstream.breaker().map(|state| state.name().to_owned()),
        endpoints,
    }
}

fn described(endpoint: &Endpoint, now: Instant) -> EndpointDetail {
    let availability = endpoint.availability();
    let failure = endpoint.checks().last_failure().cloned();
    let (ejections, ejected) = {
        let ejections = endpoint.ejections();
        (ejections.times(), ejections.current())
    };
    EndpointDetail {
        status: status::served(endpoint, now),
        why: why(endpoint),
        available: availability.admits(),
        drained: availability.is_drained(),
        weight_ordered: endpoint.weight_ordered().is_some(),
        returned_seconds: endpoint.age(now).map(|age| age.as_secs_f64()),
        ejections,
        ejected_for: ejected.map(|current| current.reason.name().to_owned()),
        ejected_seconds: ejected.map(|current| current.until.saturating_duration_since(now).as_secs_f64()),
        health_error_seconds: failure.as_ref().map(|failure| (now - failure.at).as_secs_f64()),
        health_error: failure.map(|failure| failure.message),
    }
}

/// The reasons for an endpoint's state; there may be several.
fn why(endpoint: &Endpoint) -> String {
    let availability = endpoint.availability();
    let mut reasons = Vec::new();
    if availability.is_removed() {
        reasons.push("its source has removed it; it finishes its active requests".to_owned());
    }
    if availability.is_drained() {
        reasons.push("the operator has drained it".to_owned());
    }
    if availability.is_ejected() {
        let of =
            endpoint.ejections().current().map_or(String::new(), |current| format!(" ({})", current.reason.name()));
        reasons.push(format!("outlier detection has ejected it{of}"));
    }
    let failure = || endpoint.checks().last_failure().map_or(String::new(), |failure| format!(": {}", failure.message));
    if availability.is_unhealthy() {
        reasons.push(format!("its health checks fail{}", failure()));
    }
    if reasons.is_empty() {
        reasons.push(match availability.state() {
            State::Healthy => "its last health checks passed".to_owned(),
            _ if availability.admits() => "nothing excludes it".to_owned(),
            _ => format!("no health check has passed yet{}", failure()),
        });
    }
    reasons.join("; ")
}
