//! Activates a configuration: the parts of the process that depend on it, and the switch in one step.
//!
//! [`prepare`] builds a configuration separately and may fail; [`Stage::put_on`] cannot fail, and switches the next
//! request and the next connection to the new one. Unchanged parts are shared with the previous configuration.

use std::collections::{BTreeMap, HashSet};
use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use crate::acme::{self, Acme};
use crate::admin::status::{Configured, Listed, Shown};
use crate::client::acceptor::Acceptor;
use crate::client::listener::{Common, Listener};
use crate::client::tls::Tls;
use crate::config::Config;
use crate::config::server::{Shutdown, Upgrade};
use crate::error::BuildError;
use crate::metrics::RouteMetrics;
use crate::metrics::config::Generations;
use crate::proxy::epoch::Epoch;
use crate::proxy::forwarded::Additions;
use crate::proxy::generation::{Current, Generation};
use crate::proxy::header::Rules;
use crate::upkeep::InUse;
use crate::upstream::Upstream;

use super::parts::{Base, Fit, Parts, expired, fittings};
use super::privileges::User;
use super::running::{OpenListener, Running};
use super::sockets::{OpenSocket, Place, SocketAcceptor};
use super::web::Openings;

/// Why a configuration cannot be activated.
pub enum Obstacle {
    /// It has these errors.
    Wrong(Vec<BuildError>),
    /// A socket cannot be bound.
    Listen {
        /// The listener's index in the file.
        index: usize,
        /// The reason.
        source: io::Error,
    },
}

impl From<Vec<BuildError>> for Obstacle {
    fn from(errors: Vec<BuildError>) -> Self {
        Obstacle::Wrong(errors)
    }
}

/// Builds a configuration, and binds the sockets that are new in it. The previous one runs on unchanged in any
/// case.
///
/// # Errors
///
/// All errors of the configuration.
pub fn prepare(
    base: &Base,
    common: &Arc<Common>,
    user: Option<&User>,
    config: Config,
    before: Option<&Running>,
) -> Result<Running, Obstacle> {
    let parts = Parts::build(base, &config, before)?;
    let expired = before.map_or(Vec::new(), |before| newly_expired(&parts, before));
    if !expired.is_empty() {
        return Err(Obstacle::Wrong(expired));
    }
    assemble(parts, base, common, user, config, before)
}

/// Certificates that clients would reject, except those already in use: rejecting them would block all other
/// changes.
fn newly_expired(parts: &Parts, before: &Running) -> Vec<BuildError> {
    let served: HashSet<String> =
        before.secured().iter().flat_map(|tls| expired(Some(&**tls), "")).map(|error| error.message).collect();
    let listeners = parts.tls.iter().enumerate().map(|(index, fit)| (format!("listeners[{index}]"), fit));
    let all = listeners.chain([("admin".to_owned(), &parts.admin_tls)]);
    let found = all.flat_map(|(owner, fit)| expired(fit.as_ref().map(Fit::tls), &owner));
    found.filter(|error| !served.contains(&error.message)).collect()
}

/// As [`prepare`], for parts that are already built.
///
/// # Errors
///
/// The errors that building the parts does not detect.
pub fn assemble(
    mut parts: Parts,
    base: &Base,
    common: &Arc<Common>,
    user: Option<&User>,
    config: Config,
    before: Option<&Running>,
) -> Result<Running, Obstacle> {
    let number = before.map_or(1, |before| before.generation.epoch.number + 1);
    let mut listeners = Vec::with_capacity(config.listeners.len());
    for (index, written) in config.listeners.iter().enumerate() {
        let owner = format!("listeners[{index}]");
        let tls = parts.tls[index].take().map(|fit| fit.ready(&owner)).transpose().map_err(|error| vec![error])?;
        let listener = match before.and_then(|before| before.unchanged(written, tls.as_ref(), &parts.upstreams)) {
            Some(unchanged) => unchanged,
            None => {
                let earlier = before.and_then(|before| before.listener(&written.name));
                let fittings = fittings(written, tls, &parts.upstreams, &base.metrics);
                Arc::new(Listener::build(written, number, fittings, common, &base.metrics, earlier))
            }
        };
        let open_listener = match before.and_then(|before| before.open_at(written)) {
            Some(open) => OpenListener {
                acceptor: open.acceptor.clone(),
                place: Place {
                    listener: written.name.clone(),
                    written: written.address.0.clone(),
                    ..open.place.clone()
                },
                kept: true,
                listener,
            },
            None => {
                let failed = |source| Obstacle::Listen { index, source };
                let opened = base.inherited.open(&written.name, &written.address, written.mode);
                let socket = opened.map_err(failed)?;
                let place = Place::of(&written.name, &written.address, &socket);
                // If this configuration fails, the file of an inherited socket is not removed.
                let file = place.file.as_ref().filter(|_| socket.is_own()).map(|(file, _)| file.clone());
                let acceptor = Acceptor::new(socket.into_fd(), listener.clone(), file).map_err(failed)?;
                OpenListener { acceptor, place, kept: false, listener }
            }
        };
        listeners.push(open_listener);
    }
    let admin_tls = parts.admin_tls.take().map(|fit| fit.ready("admin")).transpose().map_err(|error| vec![error])?;
    let acme = match before.filter(|before| before.asks_the_same(&config)) {
        Some(before) => before.acme.clone(),
        None => {
            let acme = acme::build(parts.issuers, &base.challenges, &base.served, &base.metrics)?;
            if let Some(acme) = &acme {
                acme.prepare(user.and_then(User::to_become)).map_err(|error| vec![error])?;
                // At start, Forebay has not yet switched to `server.user`.
                before.map_or(Ok(()), |_| acme.probe()).map_err(|error| vec![error])?;
            }
            acme.map(Arc::new)
        }
    };
    let generation = Generation {
        epoch: Arc::new(Epoch { number }),
        routes: parts.routes,
        rules: Rules::of(&config),
        additions: Additions { forwarded: config.forwarded, via: config.via },
    };
    Ok(Running {
        generation: Arc::new(generation),
        upstreams: parts.upstreams,
        listeners,
        admin_tls,
        acme,
        listed: parts.listed,
        config,
    })
}

/// The parts of the process that depend on the configuration.
pub struct Stage {
    /// The base that configurations are built on.
    pub base: Base,
    /// Shared by all listeners.
    pub common: Arc<Common>,
    /// The user that Forebay switched to, if any.
    pub user: Option<User>,
    /// Metrics of requests that match no route.
    pub unrouted: Arc<RouteMetrics>,
    /// The part that requests use.
    pub current: Current,
    /// The state that the admin endpoint shows.
    pub shown: Shown,
    /// Opens sockets.
    pub openings: Openings,
    /// The active upstreams.
    pub upstreams: InUse<Upstream>,
    /// The active TLS settings.
    pub tls: InUse<Tls>,
    /// The active ACME client.
    pub acme: InUse<Acme>,
    /// The settings of a stop.
    pub shutdown: Arc<Mutex<Shutdown>>,
    /// The settings of an upgrade.
    pub upgrade: Arc<Mutex<Upgrade>>,
    /// The sockets that accept connections, including the admin endpoint's.
    pub open_sockets: Arc<Mutex<Vec<OpenSocket>>>,
    /// Counts exchanges and connections per generation.
    pub ledger: Arc<Ledger>,
}

impl Stage {
    /// Replaces the previous configuration. Cannot fail.
    pub fn put_on(&self, running: &Running, before: Option<&Running>) {
        let nothing = BTreeMap::new();
        let earlier = before.map_or(&nothing, |before| &before.upstreams);
        for (name, upstream) in &running.upstreams {
            match earlier.get(name) {
                Some(before) if Arc::ptr_eq(before, upstream) => continue,
                Some(before) => upstream.succeed(before),
                None => {}
            }
            let group: Weak<Upstream> = Arc::downgrade(upstream);
            upstream.metrics.count_endpoints(group);
        }
        for (name, old) in earlier {
            match running.upstreams.get(name) {
                Some(now) if Arc::ptr_eq(now, old) => {}
                successor => old.retire(successor),
            }
        }
        self.common.set_terms(&running.config);
        self.ledger.add(&running.generation);
        self.put_listeners_on(running, before);
        self.current.store(running.generation.clone());
        let mut routes = running.listed.clone();
        let unrouted = self.unrouted.clone();
        routes.push(Listed { metrics: unrouted, upstreams: Vec::new(), conditional: Vec::new() });
        self.shown.store(Arc::new(Configured {
            generation: running.generation.epoch.number,
            listeners: running
                .listeners
                .iter()
                .map(|open_listener| (open_listener.place.address.clone(), open_listener.listener.clone()))
                .collect(),
            routes,
            upstreams: running.upstreams.values().cloned().collect(),
        }));
        self.upstreams.set(running.upstreams.values().cloned().collect());
        let secured = running.secured();
        let kept = before.map(Running::secured).unwrap_or_default();
        // Kept certificates are read again: a reload may be the reaction to changed files.
        secured.iter().filter(|tls| kept.iter().any(|kept| Arc::ptr_eq(kept, tls))).for_each(|tls| tls.reload());
        self.base.served.store(Arc::new(secured.clone()));
        self.tls.set(secured);
        self.acme.set(running.acme.iter().cloned().collect());
        self.base.checks.set_limit(running.config.server.checks_at_once());
        *lock(&self.shutdown) = running.config.server.shutdown.clone();
        *lock(&self.upgrade) = running.config.server.upgrade.clone();
    }

    fn put_listeners_on(&self, running: &Running, before: Option<&Running>) {
        let mut open_sockets = lock(&self.open_sockets);
        for (open_listener, written) in running.listeners.iter().zip(&running.config.listeners) {
            open_listener.listener.begin();
            self.ledger.add_listener(&open_listener.listener);
            if !open_listener.kept {
                let acceptor = SocketAcceptor::Listener(open_listener.acceptor.clone());
                open_sockets.push(OpenSocket { place: open_listener.place.clone(), acceptor });
                self.openings.open(open_listener.acceptor.clone());
                continue;
            }
            if !Arc::ptr_eq(&open_listener.acceptor.listener(), &open_listener.listener) {
                open_listener.acceptor.set_listener(open_listener.listener.clone());
            }
            let (place, address) = (&open_listener.place, &open_listener.place.address);
            if let Some(open_socket) = open_sockets.iter_mut().find(|open_socket| open_socket.place.address == *address)
            {
                open_socket.place = place.clone();
            }
            if let Some((file, _)) = &place.file
                && let Err(error) = fs::set_permissions(file, fs::Permissions::from_mode(written.mode.0))
            {
                tracing::warn!(listener = open_listener.listener.name, %error, "the mode of the socket stays as it is");
            }
        }
        let now: HashSet<*const Acceptor> =
            running.listeners.iter().map(|open_listener| Arc::as_ptr(&open_listener.acceptor)).collect();
        for old in before.iter().flat_map(|before| &before.listeners) {
            if !now.contains(&Arc::as_ptr(&old.acceptor)) {
                tracing::info!(listener = old.place.listener, address = old.place.address, "no longer listening");
                old.acceptor.close();
                open_sockets.retain(|open_socket| open_socket.place.address != old.place.address);
                if let Some((file, _)) = &old.place.file {
                    // The receiver may already be gone.
                    let _ = fs::remove_file(file);
                }
            }
            if running.listener(&old.listener.name).is_none() {
                old.listener.leave();
            }
        }
        for open_listener in running.listeners.iter().filter(|open_listener| !open_listener.kept && before.is_some()) {
            tracing::info!(listener = open_listener.place.listener, address = open_listener.place.address, "listening");
        }
    }
}

/// Counts exchanges and connections per generation, on each scrape.
#[derive(Default)]
pub struct Ledger {
    generations: Mutex<Vec<(Weak<Epoch>, Weak<Generation>)>>,
    listeners: Mutex<Vec<Weak<Listener>>>,
}

impl Ledger {
    fn add(&self, generation: &Arc<Generation>) {
        let mut generations = lock(&self.generations);
        generations.retain(|(epoch, _)| epoch.strong_count() > 0);
        generations.push((Arc::downgrade(&generation.epoch), Arc::downgrade(generation)));
    }

    fn add_listener(&self, listener: &Arc<Listener>) {
        let mut listeners = lock(&self.listeners);
        listeners.retain(|known| known.strong_count() > 0 && known.as_ptr() != Arc::as_ptr(listener));
        listeners.push(Arc::downgrade(listener));
    }
}

impl Ledger {
    /// Number of open client connections.
    pub fn open(&self) -> u64 {
        lock(&self.listeners).iter().filter_map(Weak::upgrade).map(|listener| listener.open()).sum()
    }
}

impl Generations for Ledger {
    fn exchanges(&self) -> Vec<(u64, u64)> {
        let mut generations = lock(&self.generations);
        generations.retain(|(epoch, _)| epoch.strong_count() > 0);
        let counted = generations.iter().filter_map(|(epoch, generation)| {
            // Each exchange holds its epoch once, and so does the table while it exists.
            let table = usize::from(generation.strong_count() > 0);
            let number = epoch.upgrade()?.number;
            Some((number, epoch.strong_count().saturating_sub(table) as u64))
        });
        counted.collect()
    }

    fn connections(&self) -> Vec<(u64, u64)> {
        let mut listeners = lock(&self.listeners);
        listeners.retain(|listener| listener.strong_count() > 0);
        listeners.iter().filter_map(Weak::upgrade).map(|listener| (listener.generation, listener.open())).collect()
    }
}

/// Held for a short read or change, never on a worker.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
