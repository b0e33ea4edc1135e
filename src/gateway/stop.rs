//! Signals, the start of service, and the order of a graceful stop.
//!
//! Pingora would sleep through its whole grace period and then drop the rest. So Pingora's own watch stays silent,
//! and ours is set at each step: not ready, and every response closes its connection; pause; no new connections,
//! and idle ones close; active exchanges finish, or are cut and logged; exit. The admin endpoint responds until the
//! end.
//!
//! If another process has taken over, there is no pause, because the address is still served: this process stops
//! accepting at once, and open connections end after the response to their next request.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use super::inherited::Inherited;
use super::lock;
use super::older_processes::OlderProcesses;
use super::pid_file::PidFile;
use super::process::Endings;
use super::reload::Reloads;
use super::sockets::OpenSocket;
use super::stage::Ledger;
use super::supervisor::Supervisor;
use super::takeover::{Predecessor, Taken};
use super::upgrade::Upgrades;
use async_trait::async_trait;
use pingora::server::{ShutdownSignal, ShutdownSignalWatch};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::Notify;

use crate::access_log::AccessLog;
use crate::acme::Acme;
use crate::admin::reception::Reception;
use crate::admin::reply::Reply;
use crate::admin::{Admin, Ready};
use crate::config::server::{Shutdown, Upgrade};
use crate::metrics::Metrics;
use crate::metrics::upgrade::UpgradeMetrics;
use crate::upkeep::InUse;
use crate::upstream::Upstream;

/// Time for a just accepted connection to become an exchange before the last one is looked for.
const SETTLE: Duration = Duration::from_millis(20);

/// Time for cut exchanges to tell their clients and to be logged: twice the limit of each.
const CUT: Duration = Duration::from_secs(1);

/// Time for the last responses of the admin endpoint.
const ANSWERS: Duration = Duration::from_secs(2);

/// How often a replaced process checks whether its clients have left.
const LOOK: Duration = Duration::from_millis(50);

/// How long a new process waits for the first health checks before it takes over: an endpoint that is down would
/// get requests until its first check.
const CHECKED: Duration = Duration::from_secs(5);

/// Stops a running gateway from within the process, like SIGTERM from outside.
#[derive(Clone)]
pub struct Handle(pub(super) Arc<Notify>);

impl Handle {
    /// Starts a graceful stop.
    pub fn stop(&self) {
        self.0.notify_one();
    }
}

/// Adds the stop endpoint to the admin endpoint.
pub(super) fn add(admin: Admin, handle: Handle) -> Admin {
    admin.post("/stop", "stops gracefully, as SIGTERM does", move |_| {
        tracing::info!("the admin endpoint is asked to stop the gateway");
        handle.stop();
        std::future::ready(Reply::text("stopping\n"))
    })
}

/// The shutdown signal that Pingora's main loop waits for.
pub struct Stop {
    pub(super) asked: Arc<Notify>,
    /// Signals the steps to the rest of the process.
    pub(super) endings: Endings,
    pub(super) times: Arc<Mutex<Shutdown>>,
    /// Sockets that were open before this process started.
    pub(super) inherited: Inherited,
    /// The process that this one takes over from.
    pub(super) predecessor: Option<Predecessor>,
    /// Starts new processes that take over from this one.
    pub(super) upgrades: Upgrades,
    pub(super) upgrade: Arc<Mutex<Upgrade>>,
    /// Older processes, and counters of upgrades.
    pub(super) older_processes: OlderProcesses,
    pub(super) upgrade_metrics: UpgradeMetrics,
    pub(super) pid_file: Option<Arc<PidFile>>,
    /// Counts client connections.
    pub(super) ledger: Arc<Ledger>,
    /// The active upstreams.
    pub(super) upstreams: InUse<Upstream>,
    /// The active ACME client.
    pub(super) acme: InUse<Acme>,
    pub(super) metrics: Metrics,
    /// The admin endpoint, if there is one.
    pub(super) reception: Option<Arc<Reception>>,
    pub(super) log: Option<Arc<AccessLog>>,
    /// Logged once signals are handled: tools that wait for these lines may then send one.
    pub(super) open_sockets: Arc<Mutex<Vec<OpenSocket>>>,
    /// Reloads the configuration, if it comes from a file.
    pub(super) reloads: Option<Reloads>,
    /// The service manager.
    pub(super) supervisor: Supervisor,
}

struct Signals {
    terminate: Signal,
    interrupt: Signal,
    hangup: Signal,
    user1: Signal,
    user2: Signal,
}

impl Signals {
    fn install() -> std::io::Result<Signals> {
        Ok(Signals {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
            hangup: signal(SignalKind::hangup())?,
            user1: signal(SignalKind::user_defined1())?,
            user2: signal(SignalKind::user_defined2())?,
        })
    }
}

#[async_trait]
impl ShutdownSignalWatch for Stop {
    async fn recv(&self) -> ShutdownSignal {
        self.wait_and_drain().await;
        // Also if there was no drain: listeners whose watch is dropped would report an error.
        self.close_listeners();
        self.end_answers().await;
        ShutdownSignal::FastShutdown
    }
}

impl Stop {
    /// Handles signals until one stops the gateway, and then the stop.
    async fn wait_and_drain(&self) {
        let mut signals = match Signals::install() {
            Ok(signals) => signals,
            Err(error) => {
                tracing::error!(%error, "signals cannot be received; stopping");
                return;
            }
        };
        if let Some(predecessor) = self.predecessor.clone() {
            let allowed = tokio::select! {
                allowed = self.may_take_over(&predecessor) => allowed,
                _ = signals.terminate.recv() => return,
                _ = signals.interrupt.recv() => return,
            };
            match allowed {
                Ok(taken) => tokio::select! {
                    biased;
                    () = self.take_over(predecessor, taken) => {}
                    // The process serves already, so the loop below drains it.
                    _ = signals.terminate.recv() => self.asked.notify_one(),
                },
                Err(why) => {
                    tracing::error!("this process does not take over: {why}");
                    return;
                }
            }
        } else {
            self.serve();
        }
        self.settle();
        self.supervisor.ready(1);
        if let Err(error) = self.supervisor.watch(self.metrics.clone()) {
            tracing::error!(%error, "the watchdog of the service manager is not fed: no thread can be started");
        }
        let mut handed_over = false;
        loop {
            tokio::select! {
                _ = signals.terminate.recv() => break,
                _ = self.asked.notified() => break,
                () = self.upgrades.handed_over() => {
                    handed_over = true;
                    break;
                }
                _ = signals.interrupt.recv() => {
                    self.upgrades.stop();
                    tracing::info!("interrupted; stopping at once");
                    return;
                }
                _ = signals.user2.recv() => {
                    // The result is logged.
                    let _ = self.upgrades.begin("SIGUSR2", None);
                }
                _ = signals.hangup.recv() => {
                    match &self.reloads {
                        Some(reloads) => reloads.begin("SIGHUP"),
                        None => tracing::warn!("SIGHUP: this gateway has no file to load again"),
                    }
                }
                _ = signals.user1.recv() => {
                    tracing::info!("SIGUSR1: reopening the access log");
                    if let Some(log) = &self.log {
                        log.reopen();
                    }
                }
            }
        }
        let handed_over = handed_over || !self.upgrades.stop();
        tokio::select! {
            () = self.drain(), if !handed_over => {}
            () = self.leave(), if handed_over => {}
            _ = signals.interrupt.recv() => tracing::info!("interrupted; stopping at once"),
        }
    }

    /// Accepts connections.
    fn serve(&self) {
        for OpenSocket { place, .. } in lock(&self.open_sockets).iter() {
            tracing::info!(listener = place.listener, address = place.address, "listening");
        }
        if let Some(file) = &self.pid_file
            && let Err(error) = file.put()
        {
            tracing::error!(%error, "server.pid_file: the file cannot be put in its place");
        }
        self.endings.begin.send_replace(true);
        self.endings.readiness.set(Ready::Ready);
    }

    /// Closes the sockets of the previous process that no listener uses. This waits until that process has handed over:
    /// it would continue to serve on them if this process failed.
    fn settle(&self) {
        for file in self.inherited.settle() {
            // The receiver may already be gone.
            let _ = fs::remove_file(file);
        }
    }

    /// Waits for the permission of the previous process to accept connections. Asks for it once everything that
    /// requests need is ready.
    async fn may_take_over(&self, predecessor: &Predecessor) -> Result<Taken, String> {
        // Endpoints that are unchecked by then are checked while serving.
        let _ = tokio::time::timeout(CHECKED, self.checked()).await;
        let asked = predecessor.clone();
        let waited = tokio::task::spawn_blocking(move || asked.take_over()).await;
        waited.map_err(|error| error.to_string())?
    }

    /// Takes over from the previous process, and waits until the service manager knows this one. The first poll begins
    /// to accept connections.
    async fn take_over(&self, predecessor: Predecessor, taken: Taken) {
        if taken == Taken::Alone {
            tracing::warn!("the previous process has ended; this one serves in its place");
        }
        for OpenSocket { place, .. } in lock(&self.open_sockets).iter() {
            if let Some((file, mode)) = &place.file
                && let Err(error) = fs::set_permissions(file, fs::Permissions::from_mode(mode.0))
            {
                tracing::warn!(listener = place.listener, %error, "the mode of the socket stays as it is");
            }
        }
        self.serve();
        let inheritance = predecessor.inheritance();
        tracing::info!(version = inheritance.version, "this process has taken over");
        self.upgrade_metrics.begin(inheritance.counted.iter().map(|(result, counted)| (&**result, *counted)));
        self.upgrade_metrics.count(UpgradeMetrics::DONE);
        let mut ends = inheritance.older_processes;
        let watched = predecessor.end().and_then(|end| {
            ends.push(end);
            self.older_processes.watch(ends, self.upgrade_metrics.clone())
        });
        if let Err(error) = watched {
            tracing::warn!(%error, "cannot watch for the end of the previous processes");
        }
        // This process serves whether or not the previous one answers.
        let _ = tokio::task::spawn_blocking(move || predecessor.begun()).await;
    }

    /// Waits for the first check of every endpoint with health checks.
    async fn checked(&self) {
        while self.upstreams.now().iter().any(|upstream| upstream.is_unchecked()) {
            tokio::time::sleep(LOOK).await;
        }
    }

    /// Finishes active exchanges while another process serves.
    async fn leave(&self) {
        let began = Instant::now();
        let (idle, deadline) = (lock(&self.upgrade).idle.0, lock(&self.times).deadline.0);
        let connections = self.ledger.open();
        self.endings.readiness.set(Ready::HandedOver);
        self.acme.set(Vec::new());
        // A connection ends after the response to its next request. Connections without one are closed after this
        // time.
        self.endings.stopping.send_replace(true);
        tracing::info!(
            ?deadline,
            connections,
            inflight = self.endings.inflight.count(),
            "leaving new connections to the other process"
        );
        tokio::time::sleep(SETTLE).await;
        while self.ledger.open() > 0 && began.elapsed() < idle.min(deadline) {
            tokio::time::sleep(LOOK).await;
        }
        self.close_listeners();
        self.end_by(deadline.saturating_sub(began.elapsed())).await;
    }

    /// Lets the admin endpoint finish its responses, including that to the stop request.
    async fn end_answers(&self) {
        if let Some(reception) = &self.reception {
            reception.close();
            // A client that does not read its response must not delay the exit.
            let _ = tokio::time::timeout(ANSWERS, reception.answering().drained()).await;
        }
    }

    fn close_listeners(&self) {
        // An error would mean that no service is left.
        let _ = self.endings.listeners.send(true);
    }

    async fn drain(&self) {
        let (pause, deadline) = {
            let times = lock(&self.times);
            (times.pause.0, times.deadline.0)
        };
        tracing::info!(?pause, ?deadline, inflight = self.endings.inflight.count(), "stopping");
        self.endings.readiness.set(Ready::Stopping);
        self.supervisor.stopping();
        // From now on responses close their connections, and a load balancer that has noticed sends new ones
        // elsewhere. Idle connections stay open meanwhile: closing them could lose a request that is already on its
        // way.
        self.endings.stopping.send_replace(true);
        tokio::time::sleep(pause).await;
        self.close_listeners();
        tokio::time::sleep(SETTLE).await;
        self.end_by(deadline).await;
    }

    /// Waits until the last exchange has ended; cuts the rest at the deadline.
    async fn end_by(&self, deadline: Duration) {
        if tokio::time::timeout(deadline, self.endings.inflight.drained()).await.is_ok() {
            tracing::info!("the last exchange has ended");
            return;
        }
        tracing::warn!(cut = self.endings.inflight.count(), "the deadline is over; the rest is cut");
        self.endings.cut.now();
        // The remaining connections belong to clients that are slow to close them.
        let _ = tokio::time::timeout(CUT, self.endings.inflight.drained()).await;
    }
}
