//! One of three endpoints fails while a client sends requests: it is killed and restarted, stops responding, becomes a
//! hundred times slower, or responds with 500 to a fifth of its requests.
//!
//! The client sends at a fixed rate, on enough connections that a waiting request delays no other. `several` has the
//! configurations of the proxies, and `moody` is the endpoint.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::fast::{FastClient, Log, Pace};
use crate::figures::{Column, Goal};
use crate::latency::p99_ms;
use crate::machine::Machine;
use crate::moody::{BE_FAILING, BE_SLOW};
use crate::process::body_of;
use crate::proxies::{Proxy, Running};
use crate::secure::Manner;

/// 2,000 requests per second, with more than a second between two on the same connection. A response takes 5 ms, so ten
/// requests are active, enough for policies that count them.
const PACE: Pace = Pace { interval: Duration::from_micros(500), connections: 2_048 };

/// The initial time that does not count: each connection sends its first request in it.
const WARM: Duration = Duration::from_millis(1_200);

/// How long all endpoints work before one of them fails.
const WELL: Duration = Duration::from_secs(2);

/// Duration of the failure.
const TROUBLE: Duration = Duration::from_secs(4);

/// How long the measurement continues after a restart.
const BACK: Duration = Duration::from_secs(2);

/// The figures. Failed are requests without a 200 response, over the whole case.
pub const FAILOVER_COLUMNS: &[Column] = &[
    Column { key: "slow_p99_ms", heading: "slow: p99 ms", decimals: 1, compared: true },
    Column { key: "slow_well_p99_ms", heading: "before", decimals: 1, compared: false },
    Column { key: "slow_p99_over_well", heading: "x before", decimals: 2, compared: false },
    Column { key: "slow_failed", heading: "failed", decimals: 0, compared: false },
    Column { key: "killed_p99_ms", heading: "killed: p99 ms", decimals: 1, compared: false },
    Column { key: "back_p99_ms", heading: "back", decimals: 1, compared: false },
    Column { key: "killed_failed", heading: "failed", decimals: 0, compared: false },
    Column { key: "silent_p99_ms", heading: "silent: p99 ms", decimals: 1, compared: false },
    Column { key: "silent_failed", heading: "failed", decimals: 0, compared: false },
    Column { key: "failing_p99_ms", heading: "500s: p99 ms", decimals: 1, compared: false },
    Column { key: "failing_failed", heading: "failed", decimals: 0, compared: false },
    Column { key: "requests", heading: "requests", decimals: 0, compared: false },
];

/// The goals.
pub const FAILOVER_GOALS: &[Goal] = &[
    goal("p99 with an endpoint 100 times slower, x before", "slow_p99_over_well", 2.0),
    goal("failed with an endpoint 100 times slower", "slow_failed", 0.0),
    goal("failed with an endpoint killed and started again", "killed_failed", 0.0),
    goal("failed with an endpoint that says nothing", "silent_failed", 0.0),
];

const fn goal(what: &'static str, column: &'static str, must: f64) -> Goal {
    Goal { what, column, over: None, must, aim: None }
}

/// Runs all cases for one proxy, each with fresh processes, since an endpoint ejected in one case would be missing in
/// the next. Returns one figure per column of `FAILOVER_COLUMNS`.
pub fn sample(machine: &Machine, proxy: &Proxy) -> Result<Vec<f64>> {
    let slow = Scene::set(machine, proxy)?.told(BE_SLOW)?;
    let killed = Scene::set(machine, proxy)?.killed_and_back()?;
    let silent = Scene::set(machine, proxy)?.silent()?;
    let failing = Scene::set(machine, proxy)?.told(BE_FAILING)?;
    let requests = [&slow, &killed, &silent, &failing].map(|case| case.log.samples.len()).iter().sum::<usize>();
    let (well_ms, slow_ms) = (slow.well_ms()?, slow.trouble_ms()?);
    Ok(vec![
        slow_ms,
        well_ms,
        slow_ms / well_ms,
        slow.log.failed as f64,
        killed.trouble_ms()?,
        killed.back_ms()?,
        killed.log.failed as f64,
        silent.trouble_ms()?,
        silent.log.failed as f64,
        failing.trouble_ms()?,
        failing.log.failed as f64,
        requests as f64,
    ])
}

/// A proxy in front of three working endpoints, and a client that has sent requests for a while.
struct Scene<'a> {
    machine: &'a Machine,
    fast: FastClient,
    _proxy: Running,
    endpoints: [Option<Running>; 3],
}

/// The client's view: when the failure began and ended, and its log.
struct Case {
    came: Duration,
    went: Duration,
    log: Log,
}

impl<'a> Scene<'a> {
    fn set(machine: &'a Machine, proxy: &Proxy) -> Result<Scene<'a>> {
        let endpoint = || Running::moody_origin(machine, None);
        let endpoints = [endpoint()?, endpoint()?, endpoint()?];
        let addresses: Vec<SocketAddr> = endpoints.iter().map(|endpoint| endpoint.server.address()).collect();
        let proxy = proxy.start_before(machine, &addresses)?;
        let fast = FastClient::start(machine.fast_client(), proxy.server.address(), &Manner::of(false), PACE)?;
        fast.wait_until(WARM + WELL);
        Ok(Scene { machine, fast, _proxy: proxy, endpoints: endpoints.map(Some) })
    }

    /// Sends a command to the first endpoint.
    fn told(self, path: &str) -> Result<Case> {
        let came = self.fast.elapsed();
        body_of(self.first()?.server.address(), path)?;
        self.over(came)
    }

    /// The first endpoint stops responding and accepting; its open connections stay open. The kernel still buffers some
    /// bytes.
    fn silent(self) -> Result<Case> {
        let came = self.fast.elapsed();
        self.first()?.server.freeze()?;
        self.over(came)
    }

    /// The endpoint's connections are reset and new ones are refused until it is restarted.
    fn killed_and_back(mut self) -> Result<Case> {
        let address = self.first()?.server.address();
        let came = self.fast.elapsed();
        self.endpoints[0] = None;
        self.fast.wait_until(came + TROUBLE);
        let went = self.fast.elapsed();
        self.endpoints[0] = Some(Running::moody_origin(self.machine, Some(address))?);
        self.fast.wait_until(went + BACK);
        Ok(Case { came, went, log: self.fast.finish()? })
    }

    fn first(&self) -> Result<&Running> {
        self.endpoints[0].as_ref().context("the first endpoint is gone")
    }

    fn over(self, came: Duration) -> Result<Case> {
        self.fast.wait_until(came + TROUBLE);
        let went = self.fast.elapsed();
        Ok(Case { came, went, log: self.fast.finish()? })
    }
}

impl Case {
    fn well_ms(&self) -> Result<f64> {
        self.p99(WARM, self.came)
    }

    fn trouble_ms(&self) -> Result<f64> {
        self.p99(self.came, self.went)
    }

    fn back_ms(&self) -> Result<f64> {
        self.p99(self.went, self.went + BACK)
    }

    fn p99(&self, from: Duration, to: Duration) -> Result<f64> {
        p99_ms(&self.log.samples, from..to).context("the fast client sent nothing")
    }
}
