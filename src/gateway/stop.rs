//! Signals, and the order of a graceful stop.
//!
//! Pingora would sleep through its whole grace period and then drop what is left. So Pingora's own watch is kept still,
//! and a watch of ours is flipped when it is time: not ready, and every answer says so; pause; no new connections, and
//! idle ones close; the exchanges in flight end, or are cut and logged; exit. The admin endpoint answers to the end.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use super::lock;
use super::process::Endings;
use super::reload::Reloads;
use super::sockets::Place;
use super::supervisor::Supervisor;
use async_trait::async_trait;
use pingora::server::{ShutdownSignal, ShutdownSignalWatch};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::Notify;

use crate::access_log::AccessLog;
use crate::admin::answer::Answer;
use crate::admin::{Admin, Ready};
use crate::config::server::Shutdown;

/// Lets a connection that was just accepted become an exchange before the last one is looked for.
const SETTLE: Duration = Duration::from_millis(20);

/// For the last words of exchanges that are cut, and their lines in the log: twice as long as each has.
const CUT: Duration = Duration::from_secs(1);

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
    pub(super) log: Option<Arc<AccessLog>>,
    /// Told once signals are received: who waits for these lines may send one.
    pub(super) places: Arc<Mutex<Vec<Place>>>,
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
}

impl Signals {
    fn install() -> std::io::Result<Signals> {
        Ok(Signals {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
            hangup: signal(SignalKind::hangup())?,
            user1: signal(SignalKind::user_defined1())?,
        })
    }
}

#[async_trait]
impl ShutdownSignalWatch for Stop {
    async fn recv(&self) -> ShutdownSignal {
        self.wait_and_drain().await;
        // Also where nothing was drained: listeners whose watch just goes away would call that an error.
        self.close_listeners();
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
        for Place { listener, address, .. } in lock(&self.places).iter() {
            tracing::info!(listener, address, "listening");
        }
        self.endings.readiness.set(Ready::Ready);
        self.supervisor.ready(1);
        loop {
            tokio::select! {
                _ = signals.terminate.recv() => break,
                _ = self.asked.notified() => break,
                _ = signals.interrupt.recv() => {
                    tracing::info!("interrupted; stopping at once");
                    return;
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
        tokio::select! {
            () = self.drain() => {}
            _ = signals.interrupt.recv() => tracing::info!("interrupted; stopping at once"),
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
        // From now on answers ask clients to come back by another connection, which a balancer leads elsewhere once it
        // has noticed. Connections that are idle stay open meanwhile: a request that crosses their end would be lost.
        self.endings.stopping.send_replace(true);
        tokio::time::sleep(pause).await;
        self.close_listeners();
        tokio::time::sleep(SETTLE).await;
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
