//! Reload: reads the file again, builds its configuration separately, and activates it in one step.
//!
//! One thread does this, off the workers: on SIGHUP, for the admin endpoint, and for the file watcher. Requests
//! that arrive meanwhile are combined into one reload. It also keeps replaced parts until no exchange uses them, so
//! that no worker has to free a large table, and then removes their metrics series.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Weak};
use std::thread;
use std::time::{Duration, Instant};

use http::StatusCode;
use serde::{Deserialize, Serialize};
use tokio::sync::oneshot;

use crate::admin::Admin;
use crate::admin::reply::Reply;
use crate::client::listener::Listener;
use crate::config::server::Server;
use crate::config::{Config, Report};
use crate::error::BuildError;
use crate::error::path::{self, PathStep};
use crate::metrics::config::ConfigMetrics;
use crate::proxy::epoch::Epoch;
use crate::proxy::generation::Generation;
use crate::upstream::Upstream;

use super::changes::{self, Change, Effect};
use super::follow::Watched;
use super::running::Running;
use super::stage::{Obstacle, Stage, prepare};
use super::supervisor::Supervisor;
use super::upgrade::Changing;

/// How often it checks whether replaced parts are still in use.
const LOOK: Duration = Duration::from_millis(500);

/// The result of a reload.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Outcome {
    /// The action.
    pub result: Done,
    /// The number of the active configuration.
    pub generation: u64,
    /// The hash of its text.
    pub hash: String,
    /// Differences from the previous configuration.
    pub changes: Vec<Change>,
    /// The differences that require a new process.
    pub needs_new_process: Vec<String>,
    /// Errors or warnings, as `forebay check` shows them; empty if there are none.
    pub report: String,
    /// The reason if nothing was done.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// How long it took.
    pub seconds: f64,
    /// Duration of the activation, if there was one; no request is blocked by it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub swap_seconds: Option<f64>,
}

/// The action of a reload.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Done {
    /// The configuration is active.
    Applied,
    /// The configuration is valid; nothing was changed.
    Checked,
    /// The configuration is invalid; nothing was changed.
    Refused,
}

/// Requests reloads. Clones share the thread that does them.
#[derive(Clone)]
pub struct Reloads(Sender<Order>);

struct Order {
    what: What,
    /// The requester, for the log.
    by: &'static str,
    reply: oneshot::Sender<Outcome>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum What {
    /// Loads the file.
    Apply,
    /// Loads the file unless its text is that of the last attempt.
    ApplyIfChanged,
    /// Checks the file; changes nothing.
    Check,
}

impl Reloads {
    /// Loads the file and returns the result. `None`: the gateway stops.
    pub async fn apply(&self, by: &'static str) -> Option<Outcome> {
        self.ask(What::Apply, by).await.ok()
    }

    /// Returns what a reload would do; changes nothing.
    pub async fn check(&self, by: &'static str) -> Option<Outcome> {
        self.ask(What::Check, by).await.ok()
    }

    /// Loads the file if its text differs from that of the last attempt. The result is logged.
    pub fn apply_if_changed(&self, by: &'static str) {
        // The result is not awaited.
        drop(self.ask(What::ApplyIfChanged, by));
    }

    /// Starts to load the file. The result is logged.
    pub fn begin(&self, by: &'static str) {
        // The result is not awaited.
        drop(self.ask(What::Apply, by));
    }

    fn ask(&self, what: What, by: &'static str) -> oneshot::Receiver<Outcome> {
        let (reply, answer) = oneshot::channel();
        // An error means that the gateway stops; the receiver then also gets an error.
        let _ = self.0.send(Order { what, by, reply });
        answer
    }
}

/// Loads the configuration file.
pub type Load = Box<dyn Fn(&Path) -> Result<Config, Report> + Send>;

/// The state of reloads.
pub struct Engine {
    path: PathBuf,
    load: Load,
    stage: Stage,
    metrics: ConfigMetrics,
    running: Running,
    retired: Vec<Retired>,
    leaving: Vec<Arc<Listener>>,
    /// The hash of the last attempt's text.
    tried: String,
    supervisor: Supervisor,
    /// The watched directories, if the files are watched.
    watched: Option<Watched>,
    changing: Changing,
}

/// Replaced parts that may still be in use.
struct Retired {
    epoch: Weak<Epoch>,
    generation: Option<Arc<Generation>>,
    /// Dropped here and not on a worker: there may be thousands of endpoints.
    _upstreams: Vec<Arc<Upstream>>,
    names: Names,
}

impl Engine {
    /// The reload engine of a gateway with this configuration and file.
    pub fn new(
        path: PathBuf,
        load: Load,
        stage: Stage,
        metrics: ConfigMetrics,
        running: Running,
        supervisor: Supervisor,
        changing: Changing,
    ) -> Engine {
        let tried = running.config.hash();
        Engine {
            path,
            load,
            stage,
            metrics,
            running,
            retired: Vec::new(),
            leaving: Vec::new(),
            tried,
            supervisor,
            changing,
            watched: None,
        }
    }

    /// Updates these watched directories with each attempt.
    pub fn telling(self, watched: Option<Watched>) -> Engine {
        Engine { watched, ..self }
    }

    /// Starts the thread.
    ///
    /// # Errors
    ///
    /// The system has no thread left.
    pub fn start(self) -> std::io::Result<Reloads> {
        let (sender, orders) = channel();
        thread::Builder::new().name("reload".to_owned()).spawn(move || self.run(&orders))?;
        Ok(Reloads(sender))
    }

    fn run(mut self, orders: &Receiver<Order>) {
        loop {
            let busy = !self.retired.is_empty() || !self.leaving.is_empty();
            let order = match busy {
                true => orders.recv_timeout(LOOK),
                false => orders.recv().map_err(|_| RecvTimeoutError::Disconnected),
            };
            match order {
                Ok(order) => {
                    // One reload answers all requests that have arrived meanwhile.
                    let asked: Vec<Order> = [order].into_iter().chain(orders.try_iter()).collect();
                    self.answer(asked);
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return,
            }
            self.clean_up();
        }
    }

    fn answer(&mut self, asked: Vec<Order>) {
        let changing = self.changing.clone();
        // The dropped reply shows the caller that the gateway stops.
        let Some(_changing) = changing.begin() else { return };
        let (checks, applies): (Vec<_>, Vec<_>) = asked.into_iter().partition(|order| order.what == What::Check);
        if let Some(first) = checks.first() {
            let outcome = self.try_once(What::Check, first.by);
            reply(checks, outcome.as_ref());
        }
        if let Some(first) = applies.first() {
            let asked = applies.iter().any(|order| order.what == What::Apply);
            let outcome = self.try_once(if asked { What::Apply } else { What::ApplyIfChanged }, first.by);
            reply(applies, outcome.as_ref());
        }
    }

    /// Tries the file. `None`: its text is that of the last attempt.
    fn try_once(&mut self, what: What, by: &'static str) -> Option<Outcome> {
        let began = Instant::now();
        let loaded = (self.load)(&self.path);
        if let Some(watched) = &self.watched {
            match &loaded {
                Ok(config) => watched.set(config.directories()),
                // It may have failed before it reached all included files.
                Err(report) => watched.add(report.directories()),
            }
        }
        if what != What::Check {
            let hash = match &loaded {
                Ok(config) => config.hash(),
                Err(report) => report.hash(),
            };
            if what == What::ApplyIfChanged && hash == self.tried {
                return None;
            }
            self.tried = hash;
            self.supervisor.reloading();
        }
        let (mut changes, mut report, mut result) = (Vec::new(), String::new(), Done::Refused);
        let mut swap_seconds = None;
        let tried = loaded.map_err(|found| found.to_string()).and_then(|config| {
            changes = changes::between(&self.running.config, &config);
            self.count_drains(&mut changes);
            report = config.warnings().to_string();
            let names = names(&config);
            self.build(config).inspect_err(|_| self.forget_unused(&names))
        });
        match tried {
            Err(found) => report = found,
            Ok(running) if what == What::Check => {
                result = Done::Checked;
                let names = names(&running.config);
                drop(running);
                self.forget_unused(&names);
            }
            Ok(running) => {
                result = Done::Applied;
                swap_seconds = Some(self.put_on(running).as_secs_f64());
            }
        }
        let needs_new_process = changes::need_process(&changes);
        let outcome = Outcome {
            result,
            generation: self.running.generation.epoch.number,
            hash: self.running.config.hash(),
            changes,
            needs_new_process,
            report,
            error: (result == Done::Refused).then(|| "the configuration is refused: see `report`".to_owned()),
            seconds: began.elapsed().as_secs_f64(),
            swap_seconds,
        };
        self.tell(&outcome, what, by);
        if what != What::Check {
            self.supervisor.ready(outcome.generation);
        }
        Some(outcome)
    }

    /// Builds a configuration next to the active one; settings that require a new process keep their old values.
    fn build(&self, mut config: Config) -> Result<Running, String> {
        let as_written = config.clone();
        let runs = &self.running.config;
        let server = config.server;
        config.server = Server {
            shutdown: server.shutdown,
            upgrade: server.upgrade,
            health_checks: server.health_checks,
            ..runs.server.clone()
        };
        config.resources = runs.resources.clone();
        config.admin = runs.admin.clone();
        config.observability = runs.observability.clone();
        let stage = &self.stage;
        let built = prepare(&stage.base, &stage.common, stage.user.as_ref(), config, Some(&self.running));
        built.map_err(|obstacle| {
            let errors = match obstacle {
                Obstacle::Wrong(errors) => errors,
                Obstacle::Listen { index, source } => {
                    let path = format!("listeners[{index}].address");
                    vec![BuildError::new(path, format!("this address cannot be listened on: {source}"))]
                }
            };
            as_written.report(&errors).to_string()
        })
    }

    /// Activates a configuration; returns the duration of the switch itself.
    fn put_on(&mut self, running: Running) -> Duration {
        let begins = Instant::now();
        self.stage.put_on(&running, Some(&self.running));
        let took = begins.elapsed();
        let number = running.generation.epoch.number;
        self.metrics.show(number, &running.config.hash());
        self.metrics.applied.inc();
        let before = std::mem::replace(&mut self.running, running);
        self.retire(before);
        took
    }

    fn retire(&mut self, before: Running) {
        let names = names(&before.config);
        let Running { generation, upstreams, listeners, .. } = before;
        let stays: BTreeSet<*const Listener> =
            self.running.listeners.iter().map(|open_listener| Arc::as_ptr(&open_listener.listener)).collect();
        let left = listeners.into_iter().map(|open_listener| open_listener.listener);
        self.leaving.extend(left.filter(|listener| !stays.contains(&Arc::as_ptr(listener))));
        self.retired.push(Retired {
            epoch: Arc::downgrade(&generation.epoch),
            generation: Some(generation),
            _upstreams: upstreams.into_values().collect(),
            names,
        });
    }

    /// Frees parts that are no longer used.
    fn clean_up(&mut self) {
        for retired in &mut self.retired {
            // A look-up may hold the table for a moment.
            if retired.generation.as_ref().is_some_and(|generation| Arc::strong_count(generation) == 1) {
                retired.generation = None;
            }
        }
        let (over, rest) = std::mem::take(&mut self.retired)
            .into_iter()
            .partition(|retired: &Retired| retired.generation.is_none() && retired.epoch.strong_count() == 0);
        self.retired = rest;
        let over: Vec<Retired> = over;
        let (gone, rest) = std::mem::take(&mut self.leaving)
            .into_iter()
            .partition(|listener: &Arc<Listener>| Arc::strong_count(listener) == 1);
        self.leaving = rest;
        let gone: Vec<Arc<Listener>> = gone;
        if over.is_empty() && gone.is_empty() {
            return;
        }
        let mut names = Names::default();
        for retired in &over {
            names.iter_mut().zip(&retired.names).for_each(|(all, names)| all.extend(names.iter().cloned()));
        }
        // A listener is in use until its last connection ends, which may be later than its last exchange.
        names[LISTENER].extend(gone.iter().map(|listener| listener.name.clone()));
        names[LISTENER].retain(|name| self.leaving.iter().all(|listener| listener.name != *name));
        drop((over, gone));
        self.forget_unused(&names);
    }

    /// Removes the metrics series of these names that are no longer used.
    fn forget_unused(&self, gone: &Names) {
        let retired = self.retired.iter().map(|retired| &retired.names);
        let running = names(&self.running.config);
        let used: Vec<&Names> = retired.chain([&running]).collect();
        for (number, label) in LABELS.into_iter().enumerate() {
            let left =
                |name: &&String| number == LISTENER && self.leaving.iter().any(|listener| listener.name == **name);
            let gone: BTreeSet<&str> = gone[number]
                .iter()
                .filter(|name| used.iter().all(|used| !used[number].contains(*name)) && !left(name))
                .map(String::as_str)
                .collect();
            if !gone.is_empty() {
                self.stage.base.metrics.forget(label, &gone);
            }
        }
    }

    /// Counts the connections and exchanges that each change ends.
    fn count_drains(&self, changes: &mut [Change]) {
        for change in changes {
            let steps = path_names(&change.path);
            let name = |number: usize| steps.get(number).map(String::as_str);
            change.drains = match change.effect {
                Effect::ListenerCloses => {
                    let found = self.running.listeners.iter().find(|one| Some(&*one.listener.name) == name(1));
                    found.map(|open_listener| open_listener.listener.connections_open())
                }
                Effect::EndpointDrained => name(1).and_then(|upstream| {
                    let members = self.running.upstreams.get(upstream)?.members();
                    let called = members.iter().filter(|endpoint| Some(&*endpoint.label) == name(3));
                    Some(called.map(|endpoint| u64::from(endpoint.inflight())).sum())
                }),
                Effect::UpstreamRebuilt => {
                    name(1).and_then(|upstream| Some(self.running.upstreams.get(upstream)?.inflight().into()))
                }
                _ => None,
            };
        }
    }

    fn tell(&self, outcome: &Outcome, what: What, by: &'static str) {
        let Outcome { result, generation, changes, needs_new_process, report, seconds, .. } = outcome;
        let file = self.path.display();
        match result {
            _ if what == What::Check => {
                tracing::info!(by, %file, ?result, "the configuration was checked; nothing was changed");
            }
            Done::Checked => {}
            Done::Refused => {
                self.metrics.refuse();
                tracing::error!(by, %file, generation, "the new configuration is refused, the previous one stays in force:\n{report}");
            }
            Done::Applied => {
                tracing::info!(by, %file, generation, seconds, changes = changes::summary(changes), "the configuration was reloaded");
                if !report.is_empty() {
                    tracing::warn!("\n{report}");
                }
                if !needs_new_process.is_empty() {
                    let paths = needs_new_process.join(", ");
                    tracing::warn!(paths, "these need a new process; everything else is applied");
                }
            }
        }
    }
}

/// The metric labels that hold names from the configuration.
const LABELS: [&str; 4] = ["upstream", "route", "listener", "issuer"];
/// The index of listeners in them.
const LISTENER: usize = 2;

/// The names in a configuration, by label.
type Names = [BTreeSet<String>; LABELS.len()];

fn names(config: &Config) -> Names {
    [
        config.upstreams.keys().cloned().collect(),
        config.routes.iter().map(|route| route.name.clone()).collect(),
        config.listeners.iter().map(|listener| listener.name.clone()).collect(),
        config.acme.keys().cloned().collect(),
    ]
}

/// Adds the reload endpoints to the admin endpoint.
pub fn add(admin: Admin, reloads: Option<Reloads>) -> Admin {
    let says = "loads the configuration again, and says what changes: ?dry_run=yes changes nothing";
    admin.post("/reload", says, move |ask| {
        let reloads = reloads.clone();
        async move {
            let dry_run = match ask.query("dry_run") {
                None => false,
                Some(word) if word == "no" => false,
                Some(word) if word == "yes" => true,
                Some(_) => return Reply::error(StatusCode::BAD_REQUEST, "`dry_run` is `yes` or `no`"),
            };
            let Some(reloads) = reloads else {
                return Reply::error(StatusCode::CONFLICT, "this gateway has no file to load again");
            };
            let by = "admin endpoint";
            match if dry_run { reloads.check(by).await } else { reloads.apply(by).await } {
                Some(outcome) if outcome.result == Done::Refused => {
                    Reply::json(&outcome).with_status(StatusCode::UNPROCESSABLE_ENTITY)
                }
                Some(outcome) => Reply::json(&outcome),
                None => Reply::error(StatusCode::SERVICE_UNAVAILABLE, "the gateway stops"),
            }
        }
    })
}

/// The names in a path.
fn path_names(path: &str) -> Vec<String> {
    let name = |step| match step {
        PathStep::Key(name) => Some(name.into_owned()),
        PathStep::Index(_) => None,
    };
    path::steps(path).filter_map(name).collect()
}

fn reply(asked: Vec<Order>, outcome: Option<&Outcome>) {
    for order in asked {
        if let Some(outcome) = outcome {
            // The caller may be gone.
            let _ = order.reply.send(outcome.clone());
        }
    }
}
