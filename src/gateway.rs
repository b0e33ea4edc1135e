//! Builds a running gateway from a configuration. Parts of the process are built here, once; parts of a
//! configuration generation are built by `parts` and activated by `stage`, once per generation.
//!
//! Only here are names in the configuration resolved. Nothing here runs per request.

pub mod changes;
pub mod explain;
mod follow;
pub mod handover;
pub mod inherited;
mod older_processes;
mod parts;
mod pid_file;
pub mod privileges;
mod process;
pub mod reload;
mod running;
pub mod sockets;
mod stage;
pub mod stop;
mod supervisor;
pub mod takeover;
pub mod upgrade;
mod web;

use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use arc_swap::ArcSwap;
use pingora::server::{RunArgs, Server};
use tokio::sync::{Notify, watch};

use crate::access_log::AccessLog;
use crate::acme;
use crate::acme::plan::Asked;
use crate::admin::reception::Reception;
use crate::admin::status::{self, Shown, Sources, Status};
use crate::admin::{self, Admin, Hosts, trace};
use crate::client::tls::Tls;
use crate::config::{self, Config, Report};
use crate::error::{BuildError, refusal};
use crate::eventloop::Loops;
use crate::filter::{Catalog, FilterType};
use crate::metrics::{Metrics, RouteMetrics};
use crate::proxy::generation::Current;
use crate::spans::Tracer;
use crate::spool::disk::Disk;
use crate::upkeep;
use explain::Explainer;
use follow::Follower;
use inherited::Inherited;
use older_processes::OlderProcesses;
use parts::{Base, Fit, Parts, demands_certificates, expired, mismatched};
use pid_file::PidFile;
use privileges::User;
use process::{Outputs, Process, no_open_files, no_spool_dir};
use reload::{Engine, Load, Reloads};
use running::Running;
use sockets::{OpenSocket, Place, Socket, SocketAcceptor};
use stage::{Obstacle, Stage, assemble};
use stop::{Handle, Stop};
use supervisor::Supervisor;
use takeover::Predecessor;
use upgrade::{Changing, Needs, Program, Upgrades};
use web::Openings;

/// Why a gateway could not be started.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The configuration is invalid.
    #[error("{0}")]
    Build(Report),
    /// A socket cannot be bound.
    #[error("cannot listen on {address} (listener {listener}): {source}")]
    Listen {
        /// The name of the listener; `admin` is the admin endpoint.
        listener: String,
        /// The address as written.
        address: String,
        /// The system's error.
        source: std::io::Error,
    },
}

/// Holds the registered filters and builds gateways from configurations.
#[derive(Clone)]
pub struct Builder {
    catalog: Catalog,
    /// The file that a reload reads.
    file: Option<PathBuf>,
    watches: bool,
    inherited: Inherited,
    predecessor: Option<Predecessor>,
    program: Option<Program>,
}

impl Builder {
    /// Registers another filter.
    pub fn filter<T: FilterType>(mut self) -> Self {
        self.catalog = self.catalog.with::<T>();
        self
    }

    /// Enables reloads of this file, by SIGHUP or the admin endpoint.
    pub fn reloading(self, file: &Path) -> Self {
        Builder { file: Some(file.to_owned()), ..self }
    }

    /// Enables reloads whenever that file changes.
    pub fn watching(self) -> Self {
        Builder { watches: true, ..self }
    }

    /// Gives listeners these open sockets instead of new ones at the same addresses.
    pub fn inheriting(self, inherited: Inherited) -> Self {
        Builder { inherited, ..self }
    }

    /// Makes the gateway take over from this process, whose sockets it inherits.
    pub fn replacing(self, predecessor: Predecessor) -> Self {
        Builder { predecessor: Some(predecessor), ..self }
    }

    /// Sets the program that an upgrade starts; it must build its gateway in the same way.
    pub fn upgrading(self, program: Program) -> Self {
        Builder { program: Some(program), ..self }
    }

    /// The registered filters.
    pub fn catalog(&self) -> &Catalog {
        &self.catalog
    }

    /// Loads and checks a configuration file.
    pub fn load(&self, path: &Path) -> Result<Config, Report> {
        Config::load(path, self.catalog.kinds())
    }

    /// Parses and checks a configuration text; `file` is its name in errors.
    pub fn parse(&self, file: &str, text: &str) -> Result<Config, Report> {
        Config::parse(file, text, self.catalog.kinds())
    }

    /// The JSON Schema of a configuration.
    pub fn schema(&self) -> serde_json::Value {
        config::schema(self.catalog.kinds())
    }

    /// Builds everything that needs no listening socket or kept file, and returns the errors.
    pub fn check(&self, config: &Config) -> Vec<BuildError> {
        self.inspect(config).errors
    }

    /// As [`Builder::check`], with warnings.
    pub fn inspect(&self, config: &Config) -> Inspection {
        let mut warnings = Vec::new();
        let metrics = Metrics::new(config.observability.metrics.max_series.0, Vec::new());
        let base = Base::new(self.catalog.clone(), metrics.clone());
        let mut errors = self.catalog.conflicts().to_vec();
        match Parts::build(&base, config, None) {
            // A gateway would start despite these; only the check reports them.
            Ok(parts) => {
                errors.extend(parts.issuers.iter().filter_map(Asked::inspect));
                errors.extend(
                    acme::build(parts.issuers, &base.challenges, &base.served, &metrics).err().unwrap_or_default(),
                );
                let listeners = parts.tls.iter().enumerate().map(|(index, fit)| (format!("listeners[{index}]"), fit));
                for (owner, fit) in listeners.chain([("admin".to_owned(), &parts.admin_tls)]) {
                    let tls = fit.as_ref().map(Fit::tls);
                    errors.extend(expired(tls, &owner));
                    warnings.extend(mismatched(tls, &owner));
                }
            }
            Err(found) => errors.extend(found),
        }
        errors.extend(config.server.user.as_deref().and_then(|user| User::find(user).err()));
        let dir = &config.server.spool_dir;
        errors.extend(Disk::probe(Path::new(dir)).err().map(|error| no_spool_dir(dir, &error)));
        Inspection { errors, warnings }
    }

    /// Prepares a configuration for questions about requests.
    ///
    /// # Errors
    ///
    /// All errors of the configuration.
    pub fn explain(&self, config: Config) -> Result<Explainer, Vec<BuildError>> {
        Explainer::new(&self.catalog, config)
    }

    /// Builds the gateway and binds its sockets.
    pub fn build(self, config: Config) -> Result<Gateway, StartError> {
        Gateway::build(self, config)
    }
}

/// The result of [`Builder::inspect`].
#[derive(Clone, Debug, Default)]
pub struct Inspection {
    /// Errors that prevent the gateway from running as configured.
    pub errors: Vec<BuildError>,
    /// Probable mistakes that prevent nothing.
    pub warnings: Vec<BuildError>,
}

/// A gateway that is built and bound, but not yet running.
pub struct Gateway {
    server: Server,
    stop: Stop,
    upgrades: Upgrades,
    open_sockets: Arc<Mutex<Vec<OpenSocket>>>,
    admin: Option<SocketAddr>,
    log: Option<Arc<AccessLog>>,
    tracer: Option<Arc<Tracer>>,
    loops: Loops,
    /// Whether connections are accepted, or were.
    begun: watch::Receiver<bool>,
}

impl Gateway {
    /// A builder with the built-in filters.
    pub fn builder() -> Builder {
        Builder {
            catalog: Catalog::builtin(),
            file: None,
            watches: false,
            inherited: Inherited::default(),
            predecessor: None,
            program: None,
        }
    }

    /// The TCP address that a listener was bound to.
    pub fn address(&self, listener: &str) -> Option<SocketAddr> {
        lock(&self.open_sockets).iter().find(|open_socket| open_socket.place.listener == listener)?.place.tcp
    }

    /// The TCP address of the admin endpoint.
    pub fn admin_address(&self) -> Option<SocketAddr> {
        self.admin
    }

    /// Stops the gateway from another thread.
    pub fn handle(&self) -> Handle {
        Handle(self.stop.asked.clone())
    }

    /// Runs until a signal or a [`Handle`] stops it and all exchanges have ended.
    ///
    /// Call it once per process: without work stealing, Pingora keeps its runtimes per thread, and a gateway that
    /// starts after another one has stopped may get a runtime that has ended.
    pub fn run(self) {
        let Gateway { server, stop, upgrades, log, tracer, open_sockets, loops, begun, .. } = self;
        server.run(RunArgs { shutdown_signal: Box::new(stop) });
        loops.stop();
        // A process that never accepted connections keeps the files of inherited sockets, since the other process uses
        // them.
        let goes = |place: &Place| !upgrades.is_handed_over() && (*begun.borrow() || place.is_own);
        for OpenSocket { place, .. } in lock(&open_sockets).iter().filter(|open_socket| goes(&open_socket.place)) {
            if let Some((file, _)) = &place.file {
                // The file may already be gone.
                let _ = std::fs::remove_file(file);
            }
        }
        if let Some(tracer) = tracer {
            tracer.close();
        }
        if let Some(log) = log {
            log.close();
        }
    }

    fn build(builder: Builder, config: Config) -> Result<Gateway, StartError> {
        let Builder { catalog, file, watches, inherited, predecessor, program } = builder;
        let wrong = |errors: Vec<BuildError>| StartError::Build(config.report(&errors));
        let one = |error: BuildError| wrong(vec![error]);
        none_of(catalog.conflicts()).map_err(wrong)?;
        let metrics = counters(&config, &catalog);
        let mut base = Base::new(catalog.clone(), metrics.clone());
        base.inherited = inherited.clone();
        let mut parts = Parts::build(&base, &config, None).map_err(wrong)?;
        let user = config.server.user.as_deref().map(User::find).transpose().map_err(one)?;
        let outputs = Outputs::open(&config, &mut parts, &metrics).map_err(one)?;
        let mut process = Process::build(&config, &metrics).map_err(one)?;
        let running = assemble(parts, &base, &process.common, user.as_ref(), config.clone(), None);
        let running = running.map_err(|obstacle| not_started(obstacle, &config))?;
        let current = Current::new(ArcSwap::new(running.generation.clone()));
        let openings = process.serve(&config, current.clone(), &base, &outputs).map_err(one)?;
        let stage = stage(base, &mut process, &config, user.clone(), outputs.unrouted.clone(), current, openings);
        let reception = config.admin.enabled.then(|| admin_app(&config, &process, &stage, &outputs)).transpose()?;
        let admin = reception.as_ref().and_then(|(_, socket)| socket.tcp);
        go_on_unprivileged(user.as_ref(), &running, &config).map_err(one)?;
        stage.put_on(&running, None);
        metrics.config().show(1, &config.hash());
        let (times, upgrade) = (stage.shutdown.clone(), stage.upgrade.clone());
        let (ledger, upstreams, acme) = (stage.ledger.clone(), stage.upstreams.clone(), stage.acme.clone());
        let (admin_tls, open_sockets) = (running.admin_tls.clone(), stage.open_sockets.clone());
        let pid_file = config.server.pid_file.as_deref().map(PidFile::prepare).transpose().map_err(one)?.map(Arc::new);
        let (asked, changing) = (Arc::new(Notify::new()), Changing::default());
        let (supervisor, older_processes) = (Supervisor::of_environment(), OlderProcesses::default());
        let upgrades = Upgrades::new(Needs {
            program,
            open_sockets: open_sockets.clone(),
            inherited: inherited.clone(),
            times: upgrade.clone(),
            metrics: metrics.upgrades(),
            supervisor: supervisor.clone(),
            older_processes: older_processes.clone(),
            changing: changing.clone(),
            pid_file: pid_file.as_ref().map(Arc::downgrade).unwrap_or_default(),
        });
        let load: Load = Box::new(move |path| Config::load(path, catalog.kinds()));
        let reloads = file.map(|file| reloads(file, watches, load, stage, running, supervisor.clone(), changing));
        let reloads = reloads.transpose().map_err(|error| one(no_thread(&error)))?;
        let Process { mut server, loops, endings, .. } = process;
        let reception = reception.map(|(app, socket)| {
            let app = reload::add(stop::add(app, Handle(asked.clone())), reloads.clone());
            let reception = admit(upgrade::add(app, upgrades.clone()), socket, admin_tls, &config, &open_sockets)?;
            server.add_service(reception.service(endings.begin.subscribe()));
            Ok(reception)
        });
        let reception = reception.transpose().map_err(|error: io::Error| one(no_open_files(&error)))?;
        let Outputs { log, tracer, .. } = outputs;
        let begun = endings.begin.subscribe();
        let stop = Stop {
            asked,
            endings,
            times,
            inherited,
            predecessor,
            upgrades: upgrades.clone(),
            upgrade,
            older_processes,
            upgrade_metrics: metrics.upgrades(),
            pid_file,
            ledger,
            upstreams,
            acme,
            metrics,
            reception,
            log: log.clone(),
            open_sockets: open_sockets.clone(),
            reloads,
            supervisor,
        };
        Ok(Gateway { server, stop, upgrades, open_sockets, admin, log, tracer, loops, begun })
    }
}

/// Turns a non-empty list of errors into an `Err`.
fn none_of(errors: &[BuildError]) -> Result<(), Vec<BuildError>> {
    if errors.is_empty() { Ok(()) } else { Err(errors.to_vec()) }
}

/// The metrics, with all possible refusal reasons, including those of filters.
fn counters(config: &Config, catalog: &Catalog) -> Metrics {
    let refusals = refusal::ALL.iter().copied().chain(catalog.refusals()).collect();
    Metrics::new(config.observability.metrics.max_series.0, refusals)
}

/// The parts of the process that depend on the configuration, with their background services.
fn stage(
    base: Base,
    process: &mut Process,
    config: &Config,
    user: Option<User>,
    unrouted: Arc<RouteMetrics>,
    current: Current,
    openings: Openings,
) -> Stage {
    let (upstreams, upstreams_upkeep) = upkeep::service("upstreams");
    let (tls, tls_upkeep) = upkeep::service("tls");
    let (acme, acme_upkeep) = upkeep::service_from("acme", process.endings.begin.subscribe());
    process.server.add_service(upstreams_upkeep);
    process.server.add_service(tls_upkeep);
    process.server.add_service(base.files.background());
    process.server.add_service(acme_upkeep);
    let stage = Stage {
        common: process.common.clone(),
        user,
        unrouted,
        current,
        shown: Shown::default(),
        openings,
        upstreams,
        tls,
        acme,
        shutdown: Arc::new(Mutex::new(config.server.shutdown.clone())),
        upgrade: Arc::new(Mutex::new(config.server.upgrade.clone())),
        open_sockets: Arc::default(),
        ledger: Arc::default(),
        base,
    };
    stage.base.metrics.count_generations(stage.ledger.clone());
    stage
}

/// A thread that the gateway needs cannot be started.
fn no_thread(error: &io::Error) -> BuildError {
    BuildError::new("", format!("no thread can be started: {error}"))
}

/// Enables reloads of this file, and automatic ones if it is watched.
fn reloads(
    file: PathBuf,
    watches: bool,
    load: Load,
    stage: Stage,
    running: Running,
    supervisor: Supervisor,
    changing: Changing,
) -> io::Result<Reloads> {
    let follower = watches.then(|| Follower::new(running.config.directories()));
    let shown = stage.base.metrics.config();
    let engine = Engine::new(file, load, stage, shown, running, supervisor, changing);
    let reloads = engine.telling(follower.as_ref().map(Follower::watched)).start()?;
    follower.map_or(Ok(()), |follower| {
        follower.start({
            let reloads = reloads.clone();
            move || reloads.apply_if_changed("watch")
        })
    })?;
    Ok(reloads)
}

/// The admin endpoint of a process, and its socket.
fn admin_app(
    config: &Config,
    process: &Process,
    stage: &Stage,
    outputs: &Outputs,
) -> Result<(Admin, Socket), StartError> {
    let address = &config.admin.address;
    let opened = stage.base.inherited.open("admin", address, config.admin.mode);
    let socket = opened.map_err(|source| StartError::Listen {
        listener: "admin".to_owned(),
        address: address.0.clone(),
        source,
    })?;
    let sources = Sources {
        shown: stage.shown.clone(),
        metrics: stage.base.metrics.clone(),
        readiness: process.endings.readiness.clone(),
        loops: process.loops.clone(),
        slow: process.spools.slow.clone(),
    };
    let streams = usize::try_from(config.admin.streams.0).unwrap_or(usize::MAX);
    let connections = usize::try_from(process.shares.admin(config.admin.connections.0)).unwrap_or(usize::MAX);
    let hosts = Hosts::new(&config.admin);
    let app = Admin::new(sources.metrics.clone(), sources.readiness.clone(), connections, streams, hosts);
    let app = admin::upstreams::add(app, &sources.shown);
    let app = trace::add(app, outputs.recorder.clone(), &sources.shown);
    let app = status::add(app, Status::new(sources));
    let certified = config.admin.tls.as_ref().map(demands_certificates);
    Ok((app.with_token(config.admin.token.clone()).with_tls(certified), socket))
}

/// Makes the admin endpoint accept connections on its socket.
fn admit(
    app: Admin,
    socket: Socket,
    tls: Option<Arc<Tls>>,
    config: &Config,
    open_sockets: &Mutex<Vec<OpenSocket>>,
) -> io::Result<Arc<Reception>> {
    let place = Place::of("admin", &config.admin.address, &socket);
    let is_unix = socket.is_unix();
    let reception = Reception::new(app, socket.into_fd(), is_unix, tls)?;
    lock(open_sockets).insert(0, OpenSocket { place, acceptor: SocketAcceptor::Admin(reception.clone()) });
    Ok(reception)
}

/// Switches to `server.user` once everything that needs more rights is open, and checks that this user may write
/// the files that are written later.
fn go_on_unprivileged(user: Option<&User>, running: &Running, config: &Config) -> Result<(), BuildError> {
    if let Some(user) = user {
        user.become_it()
            .and_then(|()| Disk::probe(Path::new(&config.server.spool_dir)))
            .map_err(|error| BuildError::new("server.user", format!("Forebay cannot go on as this user: {error}")))?;
    }
    running.acme.as_ref().map_or(Ok(()), |acme| acme.probe())
}

fn not_started(obstacle: Obstacle, config: &Config) -> StartError {
    match obstacle {
        Obstacle::Wrong(errors) => StartError::Build(config.report(&errors)),
        Obstacle::Listen { index, source } => {
            let listener = &config.listeners[index];
            StartError::Listen { listener: listener.name.clone(), address: listener.address.0.clone(), source }
        }
    }
}

/// Held for a short read or change, never on a worker.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
