//! Signals, the begin of service, and the order of a graceful stop.
//!
//! Pingora would sleep through its whole grace period and then drop what is left. So Pingora's own watch is kept still,
//! and a watch of ours is flipped when it is time: not ready, and every answer says so; pause; no new connections, and
//! idle ones close; the exchanges in flight end, or are cut and logged; exit. The admin endpoint answers to the end.
//!
//! Where another process has taken over there is nothing to announce, for the address serves on: connections are left to
//! it at once, and those that are open end with the answer to their next request.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use super::elders::Elders;
use super::inherited::Inherited;
use super::lock;
use super::pid_file::PidFile;
use super::process::Endings;
use super::reload::Reloads;
use super::sockets::Station;
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
use crate::admin::answer::Answer;
use crate::admin::reception::Reception;
use crate::admin::{Admin, Ready};
use crate::config::server::{Shutdown, Upgrade};
use crate::metrics::Metrics;
use crate::metrics::upgrade::UpgradeMetrics;
use crate::upkeep::InUse;
use crate::upstream::Upstream;

/// Lets a connection that was just accepted become an exchange before the last one is looked for.
const SETTLE: Duration = Duration::from_millis(20);

/// For the last words of exchanges that are cut, and their lines in the log: twice as long as each has.
const CUT: Duration = Duration::from_secs(1);

/// For the last answers of the admin endpoint.
const ANSWERS: Duration = Duration::from_secs(2);

/// How often is looked whether clients have left a process that another one has replaced.
const LOOK: Duration = Duration::from_millis(50);

/// How long a new process waits for the first answers of endpoints whose health is checked, before it takes over: one
/// that is down would get requests until the first check.
const CHECKED: Duration = Duration::from_secs(5);

/// Stops a running gateway from within the process, as SIGTERM does from without.
#[derive(Clone)]
pub struct Handle(pub(super) Arc<Notify>);

impl Handle {
    /// Begins a graceful stop.
    pub fn stop(&self) {
        self.0.notify_one();
    }
}

/// Adds what stops the gateway to the admin endpoint.
pub(super) fn add(admin: Admin, handle: Handle) -> Admin {
    admin.post("/stop", "stops gracefully, as SIGTERM does", move |_| {
        tracing::info!("the admin endpoint is asked to stop the gateway");
        handle.stop();
        std::future::ready(Answer::text("stopping\n"))
    })
}

/// What Pingora's main loop waits for.
pub struct Stop {
    pub(super) asked: Arc<Notify>,
    /// Tells the rest of the process, step by step.
    pub(super) endings: Endings,
    pub(super) times: Arc<Mutex<Shutdown>>,
    /// Sockets that were open before this process.
    pub(super) inherited: Inherited,
    /// The process that this one takes over from.
    pub(super) predecessor: Option<Predecessor>,
    /// New processes that take over from this one.
    pub(super) upgrades: Upgrades,
    pub(super) upgrade: Arc<Mutex<Upgrade>>,
    /// Older processes, and what is counted of upgrades.
    pub(super) elders: Elders,
    pub(super) upgrade_metrics: UpgradeMetrics,
    pub(super) pid_file: Option<PidFile>,
    /// Counts client connections.
    pub(super) ledger: Arc<Ledger>,
    /// The upstreams that are kept up to date.
    pub(super) upstreams: InUse<Upstream>,
    /// What orders certificates.
    pub(super) acme: InUse<Acme>,
    pub(super) metrics: Metrics,
    /// The admin endpoint, if there is one.
    pub(super) reception: Option<Arc<Reception>>,
    pub(super) log: Option<Arc<AccessLog>>,
    /// Told once signals are received: who waits for these lines may send one.
    pub(super) stations: Arc<Mutex<Vec<Station>>>,
    /// Loads the configuration again, if it is that of a file.
    pub(super) reloads: Option<Reloads>,
    /// The watchers of a stop.
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
        // Also where nothing was drained: listeners whose watch just goes away would call that an error.
        self.close_listeners();
        self.end_answers().await;
        ShutdownSignal::FastShutdown
    }
}

impl Stop {
    /// Minds the signals until one says stop, and until that is done.
    async fn wait_and_drain(&self) {
        let mut signals = match Signals::install() {
            Ok(signals) => signals,
            Err(error) => {
                tracing::error!(%error, "signals cannot be received; stopping");
                return;
            }
        };
        if let Some(predecessor) = self.predecessor.clone() {
            let begun = tokio::select! {
                taken = self.take_over(predecessor) => taken,
                _ = signals.terminate.recv() => return,
                _ = signals.interrupt.recv() => return,
            };
            if let Err(why) = begun {
                tracing::error!("this process does not take over: {why}");
                return;
            }
        } else {
            self.serve();
        }
        self.supervisor.ready(1);
        if let Err(error) = self.supervisor.watch(self.metrics.clone()) {
            tracing::error!(%error, "the service manager does not hear that the workers live: no thread can be started");
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
                    // What comes of it is in the log.
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
        for Station { place, .. } in lock(&self.stations).iter() {
            tracing::info!(listener = place.listener, address = place.address, "listening");
        }
        for file in self.inherited.settle() {
            // The receiver may be gone already.
            let _ = fs::remove_file(file);
        }
        if let Some(file) = &self.pid_file
            && let Err(error) = file.put()
        {
            tracing::error!(%error, "server.pid_file: the number of this process is not there");
        }
        self.endings.begin.send_replace(true);
        self.endings.readiness.set(Ready::Ready);
    }

    /// Takes over from the process before, once all that a request could need is there.
    async fn take_over(&self, predecessor: Predecessor) -> Result<(), String> {
        // What is not known by then is found out while it serves.
        let _ = tokio::time::timeout(CHECKED, self.checked()).await;
        let asked = predecessor.clone();
        let waited = tokio::task::spawn_blocking(move || asked.take_over()).await;
        let taken = waited.map_err(|error| error.to_string())??;
        if taken == Taken::Alone {
            tracing::warn!("the process before has ended; this one serves in its place");
        }
        for Station { place, .. } in lock(&self.stations).iter() {
            if let Some((file, mode)) = &place.file
                && let Err(error) = fs::set_permissions(file, fs::Permissions::from_mode(mode.0))
            {
                tracing::warn!(listener = place.listener, %error, "the mode of the socket stays as it is");
            }
        }
        self.serve();
        let legacy = predecessor.legacy();
        tracing::info!(version = legacy.version, "this process has taken over");
        self.upgrade_metrics.begin(legacy.counted.iter().map(|(result, counted)| (&**result, *counted)));
        self.upgrade_metrics.count(UpgradeMetrics::DONE);
        let mut ends = legacy.elders;
        let watched = predecessor.end().and_then(|end| {
            ends.push(end);
            self.elders.watch(ends, self.upgrade_metrics.clone())
        });
        if let Err(error) = watched {
            tracing::warn!(%error, "it cannot be told when the processes before this one end");
        }
        let told = tokio::task::spawn_blocking(move || predecessor.begun()).await;
        told.map_err(|error| error.to_string())
    }

    /// Waits until something is known of every endpoint whose health is checked.
    async fn checked(&self) {
        while self.upstreams.now().iter().any(|upstream| upstream.is_unchecked()) {
            tokio::time::sleep(LOOK).await;
        }
    }

    /// Ends what is under way, where another process serves.
    async fn leave(&self) {
        let began = Instant::now();
        let (idle, deadline) = (lock(&self.upgrade).idle.0, lock(&self.times).deadline.0);
        let connections = self.ledger.open();
        self.endings.readiness.set(Ready::HandedOver);
        self.acme.set(Vec::new());
        // A connection ends with the answer to its next request. One that had none by the end of this time is closed.
        self.endings.stopping.send_replace(true);
        tracing::info!(
            ?deadline,
            connections,
            inflight = self.endings.inflight.count(),
            "leaving what is new to the other process"
        );
        tokio::time::sleep(SETTLE).await;
        while self.ledger.open() > 0 && began.elapsed() < idle.min(deadline) {
            tokio::time::sleep(LOOK).await;
        }
        self.close_listeners();
        self.end_by(deadline.saturating_sub(began.elapsed())).await;
    }

    /// Lets the admin endpoint say what it is about to say: the answer to what stops the process is among it.
    async fn end_answers(&self) {
        if let Some(reception) = &self.reception {
            reception.close();
            // A client that does not take its answer holds up nothing.
            let _ = tokio::time::timeout(ANSWERS, reception.answering().drained()).await;
        }
    }

    fn close_listeners(&self) {
        // An error would mean that no service is left to tell.
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
        // From now on clients are told to come back by another connection, which a balancer leads elsewhere once it has
        // noticed. Connections that are idle stay open meanwhile: a request that crosses their end would be lost.
        self.endings.stopping.send_replace(true);
        tokio::time::sleep(pause).await;
        self.close_listeners();
        tokio::time::sleep(SETTLE).await;
        self.end_by(deadline).await;
    }

    /// Waits until the last exchange has ended, and cuts what is left at the deadline.
    async fn end_by(&self, deadline: Duration) {
        if tokio::time::timeout(deadline, self.endings.inflight.drained()).await.is_ok() {
            tracing::info!("the last exchange has ended");
            return;
        }
        tracing::warn!(cut = self.endings.inflight.count(), "the deadline is over; the rest is cut");
        self.endings.cut.now();
        // What is left then are connections whose clients take their time to close them.
        let _ = tokio::time::timeout(CUT, self.endings.inflight.drained()).await;
    }
}
