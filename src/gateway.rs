//! From a configuration to a running gateway: what belongs to the process is built here, once; what belongs to a
//! generation of the configuration is built by `parts` and put on by `stage`, once for each.
//!
//! The only place where names of the configuration become the things they name. Nothing here runs per request.

pub mod changes;
pub mod explain;
mod follow;
mod parts;
pub mod privileges;
mod process;
pub mod reload;
pub mod sockets;
mod stage;
pub mod stop;
mod supervisor;
mod web;

use std::mem::ManuallyDrop;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use arc_swap::ArcSwap;
use pingora::connectors::ConnectorOptions;
use pingora::connectors::http::custom::Connector as CustomConnector;
use pingora::server::{RunArgs, Server};
use pingora::services::listening::Service as ListeningService;
use pingora_proxy::{HttpProxy, ProcessCustomSession, ProxyServiceBuilder};
use tokio::sync::{Notify, watch};

use crate::access_log::AccessLog;
use crate::acme;
use crate::acme::plan::Asked;
use crate::admin::status::{self, Shown, Sources, Status};
use crate::admin::{self, Admin, Hosts, Readiness, trace};
use crate::client::account::Accounts;
use crate::client::connection::{Common, Inflight};
use crate::client::cut::Cut;
use crate::client::descriptors::{Doorway, Shares};
use crate::client::driver::course::Reason;
use crate::client::driver::{self, Driver};
use crate::client::lane::{Door, Lanes};
use crate::client::spool::disk::Disk;
use crate::client::{Desk, Ending, Front};
use crate::config::{self, Config, Report};
use crate::error::{BuildError, refusal};
use crate::eventloop::Loops;
use crate::filter::{Catalog, FilterType};
use crate::metrics::Metrics;
use crate::proxy::finish::Settler;
use crate::proxy::generation::Current;
use crate::proxy::{Proxy, Steering};
use crate::recorder::Recorder;
use crate::spans::Tracer;
use crate::upkeep;
use crate::upstream::transport::connector::Endpoints;
use explain::Explainer;
use follow::Follower;
use parts::{Fit, Ground, Parts, demands_certificates, expired, mismatched};
use privileges::User;
use process::{depot, loop_terms, no_open_files, no_spool_dir, server_conf, shares, threads};
use reload::{Engine, Load};
use sockets::{Bound, Place, Socket};
use stage::{Obstacle, Stage, assemble};
use stop::{Handle, Stop};
use supervisor::Supervisor;
use web::Web;

/// Why a gateway could not be started.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The configuration cannot be built.
    #[error("{0}")]
    Build(Report),
    /// A socket cannot be bound.
    #[error("cannot listen on {address} (listener {listener}): {source}")]
    Listen {
        /// The name of the listener; `admin` is the admin endpoint.
        listener: String,
        /// The address as written.
        address: String,
        /// What the system said.
        source: std::io::Error,
    },
}

/// Knows the filters; makes gateways of configurations.
#[derive(Clone)]
pub struct Builder {
    catalog: Catalog,
    /// The file that a reload reads.
    file: Option<PathBuf>,
    watches: bool,
}

impl Builder {
    /// Registers one more filter.
    pub fn filter<T: FilterType>(mut self) -> Self {
        self.catalog = self.catalog.with::<T>();
        self
    }

    /// Has the gateway load this file again on SIGHUP or at its admin endpoint.
    pub fn reloading(self, file: &Path) -> Self {
        Builder { file: Some(file.to_owned()), ..self }
    }

    /// Has it do so by itself whenever that file changes.
    pub fn watching(self) -> Self {
        Builder { watches: true, ..self }
    }

    /// The registered filters.
    pub fn catalog(&self) -> &Catalog {
        &self.catalog
    }

    /// Reads and checks a configuration file.
    pub fn load(&self, path: &Path) -> Result<Config, Report> {
        Config::load(path, self.catalog.kinds())
    }

    /// Reads and checks a configuration text; `file` is what errors call it.
    pub fn parse(&self, file: &str, text: &str) -> Result<Config, Report> {
        Config::parse(file, text, self.catalog.kinds())
    }

    /// The JSON Schema of a configuration.
    pub fn schema(&self) -> serde_json::Value {
        config::schema(self.catalog.kinds())
    }

    /// Builds all that can be built without binding a socket or keeping a file, and tells what cannot.
    pub fn check(&self, config: &Config) -> Vec<BuildError> {
        self.inspect(config).errors
    }

    /// The same, with what would run and is hardly meant.
    pub fn inspect(&self, config: &Config) -> Inspection {
        let mut warnings = Vec::new();
        let metrics = Metrics::new(config.observability.metrics.max_series.0, Vec::new());
        let ground = Ground::new(self.catalog.clone(), metrics.clone());
        let mut errors = self.catalog.conflicts().to_vec();
        match Parts::build(&ground, config, None) {
            // A gateway with these would start; whoever asks beforehand wants to know.
            Ok(parts) => {
                errors.extend(parts.issuers.iter().filter_map(Asked::inspect));
                errors.extend(
                    acme::build(parts.issuers, &ground.challenges, &ground.served, &metrics).err().unwrap_or_default(),
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

    /// Makes a configuration ready to be asked what becomes of requests.
    ///
    /// # Errors
    ///
    /// All that is wrong with it.
    pub fn explain(&self, config: Config) -> Result<Explainer, Vec<BuildError>> {
        Explainer::new(&self.catalog, config)
    }

    /// Builds the gateway and binds its sockets.
    pub fn build(self, config: Config) -> Result<Gateway, StartError> {
        Gateway::build(self, config)
    }
}

/// What [`Builder::inspect`] finds.
#[derive(Clone, Debug, Default)]
pub struct Inspection {
    /// What keeps the gateway from running as it is written.
    pub errors: Vec<BuildError>,
    /// What is hardly meant, and keeps nothing from running.
    pub warnings: Vec<BuildError>,
}

/// A gateway, built and bound, not yet running.
pub struct Gateway {
    server: Server,
    stop: Stop,
    places: Arc<Mutex<Vec<Place>>>,
    admin: Option<SocketAddr>,
    log: Option<Arc<AccessLog>>,
    tracer: Option<Arc<Tracer>>,
    loops: Loops,
}

impl Gateway {
    /// Begins to build one, with the built-in filters.
    pub fn builder() -> Builder {
        Builder { catalog: Catalog::builtin(), file: None, watches: false }
    }

    /// The TCP address that a listener was bound to.
    pub fn address(&self, listener: &str) -> Option<SocketAddr> {
        lock(&self.places).iter().find(|place| place.listener == listener)?.tcp
    }

    /// The TCP address of the admin endpoint.
    pub fn admin_address(&self) -> Option<SocketAddr> {
        self.admin
    }

    /// Stops the gateway from another thread.
    pub fn handle(&self) -> Handle {
        Handle(self.stop.asked.clone())
    }

    /// Runs until it is stopped, by a signal or a [`Handle`], and all is drained.
    ///
    /// Once in a process: without work stealing, Pingora keeps its runtimes by thread, and a gateway that starts
    /// after another has stopped may be handed a runtime that is gone.
    pub fn run(self) {
        let Gateway { server, stop, log, tracer, places, loops, .. } = self;
        server.run(RunArgs { shutdown_signal: Box::new(stop) });
        loops.stop();
        for file in lock(&places).iter().filter_map(|place| place.file.as_ref()) {
            // Nobody is left to tell if it is gone already.
            let _ = std::fs::remove_file(file);
        }
        if let Some(tracer) = tracer {
            tracer.close();
        }
        if let Some(log) = log {
            log.close();
        }
    }

    fn build(builder: Builder, config: Config) -> Result<Gateway, StartError> {
        let Builder { catalog, file, watches } = builder;
        let refusals: Vec<_> = refusal::ALL.iter().copied().chain(catalog.refusals()).collect();
        let metrics = Metrics::new(config.observability.metrics.max_series.0, refusals);
        let wrong = |errors: Vec<BuildError>| StartError::Build(config.report(&errors));
        if !catalog.conflicts().is_empty() {
            return Err(wrong(catalog.conflicts().to_vec()));
        }
        let ground = Ground::new(catalog.clone(), metrics.clone());
        let files = ground.files.clone();
        let mut parts = Parts::build(&ground, &config, None).map_err(wrong)?;
        let user = config.server.user.as_deref().map(User::find).transpose().map_err(|error| wrong(vec![error]))?;
        let log_fields = std::mem::take(&mut parts.log_fields);
        let log = AccessLog::open(&config.observability.access_log, log_fields, metrics.access_log())
            .map_err(|error| wrong(vec![error]))?
            .map(Arc::new);

        let tracing = &config.observability.tracing;
        let attributes = std::mem::take(&mut parts.span_attributes);
        let tracer = Tracer::start(tracing, attributes, metrics.spans()).map_err(|error| wrong(vec![error]))?;

        let threads = threads(config.server.threads);
        let shares = shares(&config, threads).map_err(|error| wrong(vec![error]))?;
        let accounts = Accounts::new(config.client_prefix(), &config.trusted_proxies, config.listeners.len());
        let depot = depot(&config, &shares, accounts.clone(), &metrics).map_err(|error| wrong(vec![error]))?;
        let depot = Arc::new(depot);
        metrics.set_workers(threads);
        let loops = Loops::new(&metrics, loop_terms(&config));
        let mut server = Server::new_with_opt_and_conf(None, server_conf(&config, threads, &shares));
        let (listeners_stop, stopped) = watch::channel(false);
        let (stopping, about_to_stop) = watch::channel(false);
        let cut = Arc::new(Cut::default());
        let inflight = Arc::new(Inflight::default());
        let readiness = Readiness::default();
        let common = Common::new(shares, accounts);
        let running = assemble(parts, &ground, &common, user.as_ref(), config.clone(), None);
        let running = running.map_err(|obstacle| match obstacle {
            Obstacle::Wrong(errors) => wrong(errors),
            Obstacle::Listen { index, source } => not_bound(&config.listeners[index], source),
        })?;

        let unrouted = metrics.unrouted();
        let lanes = Lanes::new(metrics.clone(), depot.disk.backlog(), config.resources.turn.0);
        let recorder = Recorder::default();
        let settler = Arc::new(Settler {
            unrouted: unrouted.clone(),
            log: log.clone(),
            tracer: tracer.clone(),
            recorder: recorder.clone(),
        });
        let current = Current::new(ArcSwap::new(running.generation.clone()));
        let proxy = Proxy {
            current: current.clone(),
            metrics: metrics.clone(),
            settler: settler.clone(),
            stopping: about_to_stop.clone(),
            depot: depot.clone(),
            lanes: lanes.clone(),
            challenges: ground.challenges.clone(),
            steering: Steering {
                on: uses_own_driver(),
                shares_tasks: config.server.work_stealing,
                metrics: Arc::new(metrics.driver(Reason::ALL.map(Reason::name))),
            },
        };
        let kept = server.configuration.upstream_keepalive_pool_size.div_ceil(threads);
        let terms = driver::Terms { pool: kept, attempts: server.configuration.max_retries };
        let endpoints = Endpoints::new(ConnectorOptions::from_server_conf(&server.configuration));
        let nobody: ProcessCustomSession<_, _> = Arc::new(|_, _, _| Box::pin(std::future::ready(None)));
        let builder = ProxyServiceBuilder::new(&server.configuration, proxy.clone()).custom(endpoints, nobody);
        let driver = Driver::new(proxy, Arc::new(unpacked(builder.build())), terms);
        let desk = Desk::new(
            metrics.clone(),
            log.clone(),
            Ending { stopping: about_to_stop, cut: cut.clone(), inflight: inflight.clone(), undertaker: settler },
            depot.slow.clone(),
            lanes,
            unrouted.clone(),
        );
        let front = Arc::new(Front::new(driver, Arc::new(desk)));
        let doorway = Doorway::new(shares.accepts_below(), metrics.doorway())
            .map_err(|error| wrong(vec![no_open_files(&error)]))?;
        let found = loops.clone();
        let find_workers = move || found.attach(threads, pingora_runtime::current_handle);
        let (openings, web) = Web::new(front, Door(doorway), threads, stopped, find_workers);
        server.add_service(web);
        let (upstreams, upstreams_upkeep) = upkeep::service("upstreams");
        let (tls, tls_upkeep) = upkeep::service("tls");
        let (acme, acme_upkeep) = upkeep::service("acme");
        server.add_service(upstreams_upkeep);
        server.add_service(tls_upkeep);
        server.add_service(files.background());
        server.add_service(acme_upkeep);
        let stage = Stage {
            ground,
            common,
            user: user.clone(),
            unrouted,
            current,
            shown: Shown::default(),
            openings,
            upstreams,
            tls,
            acme,
            shutdown: Arc::new(Mutex::new(config.server.shutdown.clone())),
            places: Arc::default(),
            ledger: Arc::default(),
        };
        metrics.count_generations(stage.ledger.clone());

        let asked = Arc::new(Notify::new());
        let (mut admin, mut reception) = (None, None);
        if config.admin.enabled {
            let sources = Sources {
                shown: stage.shown.clone(),
                metrics: metrics.clone(),
                readiness: readiness.clone(),
                loops: loops.clone(),
                slow: depot.slow.clone(),
            };
            let (app, socket) = admin_app(&config, &shares, sources, recorder)?;
            lock(&stage.places).push(Place::of("admin", &socket));
            admin = socket.tcp;
            reception = Some((app, socket));
        }
        if let Some(user) = user {
            become_user(&user, &config).map_err(|error| wrong(vec![error]))?;
        }
        if let Some(acme) = &running.acme {
            acme.probe().map_err(|error| wrong(vec![error]))?;
        }
        stage.put_on(&running, None);
        let (places, shutdown) = (stage.places.clone(), stage.shutdown.clone());
        let (shown, admin_tls) = (metrics.config(), running.admin_tls.clone());
        shown.show(1, &config.hash());
        let failed =
            |error: std::io::Error| wrong(vec![BuildError::new("", format!("no thread can be started: {error}"))]);
        let supervisor = Supervisor::of_environment();
        supervisor.watch(metrics.clone()).map_err(failed)?;
        let reloads = match file {
            Some(path) => {
                let load: Load = Box::new(move |path| Config::load(path, catalog.kinds()));
                let follower = watches.then(|| Follower::new(config.directories()));
                let engine = Engine::new(path, load, stage, shown, running, supervisor.clone());
                let reloads = engine.telling(follower.as_ref().map(Follower::watched)).start().map_err(failed)?;
                follower.map_or(Ok(()), |follower| follower.start(reloads.clone())).map_err(failed)?;
                Some(reloads)
            }
            None => None,
        };
        if let Some((app, socket)) = reception {
            let app = reload::add(stop::add(app, Handle(asked.clone())), reloads.clone());
            let service = admin::service(socket.key(), socket.permissions(), app, admin_tls);
            server.add_service(Bound::new(service, vec![socket]));
        }
        let stop = Stop {
            asked,
            readiness,
            times: shutdown,
            stopping,
            cut,
            listeners: listeners_stop,
            inflight,
            log: log.clone(),
            places: places.clone(),
            reloads,
            supervisor,
        };
        Ok(Gateway { server, stop, places, admin, log, tracer, loops })
    }
}

/// The admin endpoint of a process, and the socket on which it is to answer.
fn admin_app(
    config: &Config,
    shares: &Shares,
    sources: Sources,
    recorder: Recorder,
) -> Result<(Admin, Socket), StartError> {
    let socket = Socket::bind(&config.admin.address, config.admin.mode).map_err(|source| StartError::Listen {
        listener: "admin".to_owned(),
        address: config.admin.address.0.clone(),
        source,
    })?;
    let streams = usize::try_from(config.admin.streams.0).unwrap_or(usize::MAX);
    let connections = usize::try_from(shares.admin(config.admin.connections.0)).unwrap_or(usize::MAX);
    let hosts = Hosts::new(&config.admin);
    let app = Admin::new(sources.metrics.clone(), sources.readiness.clone(), connections, streams, hosts);
    let app = admin::upstreams::add(app, &sources.shown);
    let app = trace::add(app, recorder, &sources.shown);
    let app = status::add(app, Status::new(sources));
    let certified = config.admin.tls.as_ref().map(demands_certificates);
    Ok((app.with_token(config.admin.token.clone()).with_tls(certified), socket))
}

/// Goes on as the user of `server.user`, once everything that needs more rights is open.
fn become_user(user: &User, config: &Config) -> Result<(), BuildError> {
    user.become_it()
        .and_then(|()| Disk::probe(Path::new(&config.server.spool_dir)))
        .map_err(|error| BuildError::new("server.user", format!("Forebay cannot go on as this user: {error}")))
}

fn not_bound(listener: &config::Listener, source: std::io::Error) -> StartError {
    StartError::Listen { listener: listener.name.clone(), address: listener.address.0.clone(), source }
}

/// Held for a look or a change, never on a worker.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The proxy that a service was built round. Pingora makes one with a connector of ours in no other way.
fn unpacked<P, C: CustomConnector>(service: ListeningService<HttpProxy<P, C>>) -> HttpProxy<P, C> {
    let service = ManuallyDrop::new(service);
    let proxy = service.app_logic().expect("a service that was just built has what it serves");
    // SAFETY: the service is never used again and never dropped, so that the proxy has one owner.
    unsafe { std::ptr::read(proxy) }
}

/// Whether plain exchanges go by our own driver. Tests have them all go by Pingora's, too.
fn uses_own_driver() -> bool {
    std::env::var_os("FOREBAY_TEST_DRIVER").is_none_or(|driver| driver != "pingora")
}
