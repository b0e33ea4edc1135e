//! From a configuration to a running gateway: builds everything, in order, once.
//!
//! The only place where names of the configuration become the things they name. Nothing here runs per request.

pub mod privileges;
pub mod sockets;
pub mod stop;

use std::collections::BTreeMap;
use std::fs::File;
use std::mem::ManuallyDrop;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::atomic::AtomicU32;
use std::sync::{Arc, Weak};

use http::HeaderValue;
use nix::sys::resource::{Resource, getrlimit};
use pingora::connectors::ConnectorOptions;
use pingora::connectors::http::Connector;
use pingora::connectors::http::custom::Connector as CustomConnector;
use pingora::server::configuration::{RuntimeMetricsPollTimeHistogramScale, ServerConf};
use pingora::server::{RunArgs, Server};
use pingora::services::listening::Service as ListeningService;
use pingora_proxy::{HttpProxy, ProcessCustomSession, ProxyServiceBuilder};
use tokio::sync::{Notify, watch};

use crate::access_log::AccessLog;
use crate::acme;
use crate::acme::plan::{Asked, Plan};
use crate::admin::status::{self, Sources, Status};
use crate::admin::{self, Admin, Hosts, Readiness, trace};
use crate::client::account::Accounts;
use crate::client::budget::{self, Budget};
use crate::client::challenges::Challenges;
use crate::client::connection::{Common, Fittings, Inflight, Listener, Listeners};
use crate::client::cut::Cut;
use crate::client::descriptors::{Doorway, Shares, lowest_free};
use crate::client::driver::course::Reason;
use crate::client::driver::{self, Driver};
use crate::client::intake::IntakeTerms;
use crate::client::lane::{Door, Lanes};
use crate::client::names::Names;
use crate::client::pace::Pace;
use crate::client::relay::Relay;
use crate::client::spool::disk::Disk;
use crate::client::spool::{Depot, Limits};
use crate::client::tls::{self, Tls};
use crate::client::wire::{Leave, Manner, Throttle};
use crate::client::{Desk, Ending, Front};
use crate::config::listener::Protocol;
use crate::config::listener::tls::ClientMode;
use crate::config::route::retry::ATTEMPTS_MAX;
use crate::config::route::{BufferMode, Grpc, GrpcWeb, HalfClose, Match, OnDiskFull, PathMatch};
use crate::config::server::{OpenFiles, Resources, Rung, Threads};
use crate::config::text;
use crate::config::units::{FileMode, Size, Time};
use crate::config::{self, Config, Report};
use crate::error::{BuildError, refusal};
use crate::eventloop::runtime::{POLL_TIME_BUCKETS, POLL_TIME_FIRST_MICROS};
use crate::eventloop::worker::RouteTag;
use crate::eventloop::{self, Loops};
use crate::expression::named::Named;
use crate::filter::{Catalog, FilterType, Surroundings};
use crate::metrics::{Metrics, RouteMetrics, UNROUTED};
use crate::proxy::call::Directory;
use crate::proxy::finish::Settler;
use crate::proxy::header::upgrade::Upgrades;
use crate::proxy::header::{Rules, TrustedProxies};
use crate::proxy::mirror::Mirror;
use crate::proxy::retry;
use crate::proxy::route::path::Paths;
use crate::proxy::route::table::Table;
use crate::proxy::route::{Destination, Route};
use crate::proxy::send::Manners;
use crate::proxy::{Proxy, Steering};
use crate::recorder::Recorder;
use crate::spans::Tracer;
use crate::upstream::transport::connector::Endpoints;
use crate::upstream::{self, Split, Upstream};
use privileges::User;
use sockets::{Bound, Place, Socket};
use stop::{Handle, Stop};

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
}

impl Builder {
    /// Registers one more filter.
    pub fn filter<T: FilterType>(mut self) -> Self {
        self.catalog = self.catalog.with::<T>();
        self
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
        let metrics = Metrics::new(config.observability.metrics.max_series.0, Vec::new());
        let mut errors = self.catalog.conflicts().to_vec();
        match Parts::build(&self.catalog, config, &metrics) {
            // A gateway with these would start; whoever asks beforehand wants to know.
            Ok(parts) => {
                errors.extend(parts.issuers.iter().filter_map(Asked::inspect));
                errors.extend(acme::build(parts.issuers, &parts.challenges, &[], &metrics).err().unwrap_or_default());
                let listeners = parts.tls.iter().enumerate();
                errors.extend(listeners.flat_map(|(index, tls)| expired(tls.as_ref(), &format!("listeners[{index}]"))));
                errors.extend(expired(parts.admin_tls.as_ref(), "admin"));
            }
            Err(found) => errors.extend(found),
        }
        errors.extend(config.server.user.as_deref().and_then(|user| User::find(user).err()));
        let dir = &config.server.spool_dir;
        errors.extend(Disk::probe(Path::new(dir)).err().map(|error| no_spool_dir(dir, &error)));
        errors
    }

    /// Builds the gateway and binds its sockets.
    pub fn build(self, config: Config) -> Result<Gateway, StartError> {
        Gateway::build(&self.catalog, config)
    }
}

/// A gateway, built and bound, not yet running.
pub struct Gateway {
    server: Server,
    stop: Stop,
    places: Vec<Place>,
    admin: Option<SocketAddr>,
    log: Option<Arc<AccessLog>>,
    tracer: Option<Arc<Tracer>>,
    loops: Loops,
}

impl Gateway {
    /// Begins to build one, with the built-in filters.
    pub fn builder() -> Builder {
        Builder { catalog: Catalog::builtin() }
    }

    /// The TCP address that a listener was bound to.
    pub fn address(&self, listener: &str) -> Option<SocketAddr> {
        self.places.iter().find(|place| place.listener == listener)?.tcp
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
        for file in places.iter().filter_map(|place| place.file.as_ref()) {
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

    fn build(catalog: &Catalog, config: Config) -> Result<Gateway, StartError> {
        let refusals: Vec<_> = refusal::ALL.iter().copied().chain(catalog.refusals()).collect();
        let metrics = Metrics::new(config.observability.metrics.max_series.0, refusals);
        let wrong = |errors: Vec<BuildError>| StartError::Build(config.report(&errors));
        if !catalog.conflicts().is_empty() {
            return Err(wrong(catalog.conflicts().to_vec()));
        }
        let mut parts = Parts::build(catalog, &config, &metrics).map_err(wrong)?;
        let user = config.server.user.as_deref().map(User::find).transpose().map_err(|error| wrong(vec![error]))?;
        let log = AccessLog::open(&config.observability.access_log, parts.log_fields.clone(), metrics.access_log())
            .map_err(|error| wrong(vec![error]))?
            .map(Arc::new);

        let tracing = &config.observability.tracing;
        let tracer = Tracer::start(tracing, parts.span_attributes.clone(), metrics.spans())
            .map_err(|error| wrong(vec![error]))?;

        let threads = threads(config.server.threads);
        let shares = shares(&config, threads).map_err(|error| wrong(vec![error]))?;
        let accounts = Accounts::new(config.ipv6_prefix, &config.trusted_proxies, config.listeners.len());
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

        let mut listeners = Listeners::new();
        let mut listed = Vec::new();
        let mut sockets = Vec::new();
        let mut places = Vec::new();
        let mut secured = Vec::new();
        let common = Common::new(shares, accounts);
        for (index, written) in config.listeners.iter().enumerate() {
            let tls = parts.tls[index].take().map(|tls| started(tls, &format!("listeners[{index}]"))).transpose();
            let tls = tls.map_err(|error| wrong(vec![error]))?;
            let socket = bind(&written.address, written.mode, &written.name)?;
            secured.extend(tls.clone());
            let fittings = fittings(written, tls, &parts.upstreams, &metrics);
            let listener = Arc::new(Listener::build(written, index, fittings, &common, &metrics));
            listed.push((socket.key().to_owned(), listener.clone()));
            match socket.tcp {
                Some(address) => listeners.add_tcp(address, listener),
                None => listeners.add_unix(socket.key(), listener),
            }
            places.push(Place::of(&written.name, &socket));
            sockets.push(socket);
        }

        let unrouted = metrics.unrouted();
        let lanes = Lanes::new(metrics.clone(), depot.disk.backlog());
        let recorder = Recorder::default();
        let mut routes = parts.listed;
        routes.push((unrouted.clone(), Vec::new()));
        let settler = Arc::new(Settler {
            unrouted: unrouted.clone(),
            log: log.clone(),
            tracer: tracer.clone(),
            recorder: recorder.clone(),
        });
        let proxy = Proxy {
            routes: Arc::new(parts.routes),
            rules: Arc::new(Rules {
                trusted: TrustedProxies::new(&config.trusted_proxies),
                paths: Paths::new(&config.paths),
            }),
            manners: Manners { forwarded: config.forwarded, via: config.via },
            metrics: metrics.clone(),
            settler: settler.clone(),
            stopping: about_to_stop.clone(),
            depot: depot.clone(),
            lanes: lanes.clone(),
            challenges: parts.challenges.clone(),
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
            listeners,
            metrics.clone(),
            log.clone(),
            Ending { stopping: about_to_stop, cut: cut.clone(), inflight: inflight.clone(), undertaker: settler },
            depot.slow.clone(),
            lanes,
            unrouted.clone(),
        );
        let mut web = ListeningService::new("web".to_owned(), Front::new(driver, Arc::new(desk)));
        for socket in &sockets {
            web.add_listener(socket.listener_config());
        }
        let doorway = Doorway::new(shares.accepts_below(), metrics.doorway())
            .map_err(|error| wrong(vec![no_open_files(&error)]))?;
        web.set_connection_filter(Arc::new(Door(doorway)));
        web.threads = Some(threads);
        let found = loops.clone();
        let find_workers = move || found.attach(threads, pingora_runtime::current_handle);
        server.add_service(Bound::new(web, sockets, Some(stopped)).first(find_workers));
        server.add_service(upstream::background(parts.upstreams.values()));
        let admin_tls = parts.admin_tls.take().map(|tls| started(tls, "admin")).transpose();
        let admin_tls = admin_tls.map_err(|error| wrong(vec![error]))?;
        secured.extend(admin_tls.clone());
        let acme = acme::build(parts.issuers, &parts.challenges, &secured, &metrics).map_err(wrong)?;
        if let Some(acme) = &acme {
            acme.prepare(user.as_ref().and_then(User::to_become)).map_err(|error| wrong(vec![error]))?;
        }
        if !secured.is_empty() {
            server.add_service(tls::background(secured));
        }

        let mut admin = None;
        if config.admin.enabled {
            let socket = bind(&config.admin.address, config.admin.mode, "admin")?;
            places.push(Place::of("admin", &socket));
            admin = socket.tcp;
            let streams = usize::try_from(config.admin.streams.0).unwrap_or(usize::MAX);
            let connections = usize::try_from(shares.admin(config.admin.connections.0)).unwrap_or(usize::MAX);
            let hosts = Hosts::new(&config.admin);
            let app = Admin::new(metrics.clone(), readiness.clone(), connections, streams, hosts);
            let app = admin::upstreams::add(app, parts.upstreams.values().cloned().collect());
            let names = config.routes.iter().map(|route| route.name.clone()).chain([UNROUTED.to_owned()]);
            let app = trace::add(app, recorder, names.collect());
            let sources = Sources {
                generation: 1,
                metrics,
                readiness: readiness.clone(),
                loops: loops.clone(),
                slow: depot.slow.clone(),
                listeners: listed,
                routes,
                upstreams: parts.upstreams.into_values().collect(),
            };
            let app = status::add(app, Status::new(sources));
            let certified = config.admin.tls.as_ref().map(demands_certificates);
            let app = app.with_token(config.admin.token.clone()).with_tls(certified);
            let service = admin::service(socket.key(), socket.permissions(), app, admin_tls);
            server.add_service(Bound::new(service, vec![socket], None));
        }
        if let Some(user) = user {
            let become_it = user.become_it().and_then(|()| Disk::probe(Path::new(&config.server.spool_dir)));
            become_it.map_err(|error| {
                let message = format!("as this user, Forebay cannot go on: {error}");
                wrong(vec![BuildError::new("server.user", message)])
            })?;
        }
        if let Some(acme) = acme {
            acme.probe().map_err(|error| wrong(vec![error]))?;
            server.add_service(acme.background());
        }
        let stop = Stop {
            asked: Arc::new(Notify::new()),
            readiness,
            times: config.server.shutdown.clone(),
            stopping,
            cut,
            listeners: listeners_stop,
            inflight,
            log: log.clone(),
            places: places.clone(),
        };
        Ok(Gateway { server, stop, places, admin, log, tracer, loops })
    }
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

/// How many idle connections to upstreams of mirrors are kept.
const MIRROR_POOL: usize = 128;

/// What is built of a configuration without touching the system's sockets and files.
struct Parts {
    upstreams: BTreeMap<String, Arc<Upstream>>,
    routes: Table<Arc<Route>>,
    /// The routes as `/status` shows them, in the order of the file.
    listed: Vec<(Arc<RouteMetrics>, Vec<String>)>,
    /// The TLS of each listener, in the order of the file.
    tls: Vec<Option<Tls>>,
    /// That of the admin endpoint.
    admin_tls: Option<Tls>,
    /// Further fields of the access log.
    log_fields: Named,
    /// Further attributes of spans.
    span_attributes: Named,
    /// Who is asked for certificates.
    issuers: Vec<Asked>,
    /// What they may ask.
    challenges: Arc<Challenges>,
}

impl Parts {
    fn build(catalog: &Catalog, config: &Config, metrics: &Metrics) -> Result<Parts, Vec<BuildError>> {
        let mut errors = Vec::new();
        let mut upstreams = BTreeMap::new();
        for (name, written) in &config.upstreams {
            match Upstream::build(name, written, metrics.upstream(name)) {
                Ok(upstream) => {
                    let upstream = Arc::new(upstream);
                    let group: Weak<Upstream> = Arc::downgrade(&upstream);
                    upstream.metrics.count_endpoints(group);
                    upstreams.insert(name.clone(), upstream);
                }
                Err(found) => errors.extend(found),
            }
        }
        errors.extend(upstream::look_up(upstreams.values()));
        let challenges = Challenges::new(metrics.challenges());
        let Plan { listeners: sources, admin: admin_sources, issuers } = Plan::of(config).unwrap_or_else(|found| {
            errors.extend(found);
            Plan::default()
        });
        let mut tls = Vec::new();
        for (index, (written, sources)) in config.listeners.iter().zip(sources).enumerate() {
            let (name, spoken) = (&written.name, written.spoken());
            let built = written
                .tls
                .as_ref()
                .map(|tls| Tls::build(tls, sources, name, spoken, challenges.clone(), metrics.tls(name)));
            match built.transpose() {
                Ok(built) => tls.push(built),
                Err(found) => {
                    errors.extend(found.into_iter().map(|error| error.under(&format!("listeners[{index}].tls"))));
                }
            }
        }
        let mirrors = config.routes.iter().any(|route| route.mirror.is_some());
        let connector = mirrors.then(|| Arc::new(Connector::new(Some(ConnectorOptions::new(MIRROR_POOL)))));
        let admin_tls = config.admin.tls.as_ref().filter(|_| config.admin.enabled);
        let admin_tls = admin_tls.map(|tls| {
            // No issuer comes here.
            let unasked = Challenges::new(metrics.challenges());
            Tls::build(tls, admin_sources, "admin", &[Protocol::Http1], unasked, metrics.tls("admin"))
        });
        let admin_tls = admin_tls.transpose().unwrap_or_else(|found| {
            errors.extend(found.into_iter().map(|error| error.under("admin.tls")));
            None
        });
        let (mut rules, mut listed, paths) = (Vec::new(), Vec::new(), Paths::new(&config.paths));
        let callees = Directory::new(&upstreams, metrics);
        for (index, written) in config.routes.iter().enumerate() {
            let around = Surroundings::new(config.directory(), &written.name, metrics, &callees);
            match catalog.chain_in(&written.filters, &around) {
                Ok(chain) => {
                    let chain = chain.timed(&written.name, metrics).bounded(written.filter_timeout.0);
                    let mut route = route(written, chain, &upstreams, &config.resources, metrics);
                    route.mirror = mirror(written, &upstreams, connector.as_ref(), metrics);
                    let split = written.upstreams.iter().map(|side| side.name.clone());
                    listed.push((route.metrics.clone(), written.upstream.iter().cloned().chain(split).collect()));
                    match in_one_form(&written.matches, paths) {
                        Ok(matches) => rules.push((matches, Arc::new(route))),
                        Err(error) => errors.push(error.under(&format!("routes[{index}].match.path"))),
                    }
                }
                Err(found) => {
                    errors.extend(
                        found.into_iter().map(|error| error.under("filters").under(&format!("routes[{index}]"))),
                    );
                    // It has no place in the table, and what is wrong with its `match` is told all the same.
                    let alone = Table::build(vec![(&written.matches, ())]).err().unwrap_or_default();
                    errors.extend(alone.into_iter().map(|error| {
                        let path = error.path.trim_start_matches("[0]").to_owned();
                        BuildError { path: format!("routes[{index}]{path}"), ..error }
                    }));
                }
            }
        }
        let observability = &config.observability;
        let mut named = |written, path: &str| {
            text::named(written).unwrap_or_else(|found| {
                errors.extend(found.into_iter().map(|error| error.under(path)));
                Named::default()
            })
        };
        let log_fields = named(&observability.access_log.fields, "observability.access_log.fields");
        let span_attributes = named(&observability.tracing.attributes, "observability.tracing.attributes");
        match Table::build(rules.iter().map(|(matches, route)| (matches, route.clone())).collect()) {
            Ok(routes) if errors.is_empty() => {
                let parts = Parts {
                    upstreams,
                    routes,
                    listed,
                    tls,
                    admin_tls,
                    log_fields,
                    span_attributes,
                    issuers,
                    challenges,
                };
                Ok(parts)
            }
            Ok(_) => Err(errors),
            Err(found) => {
                errors.extend(found.into_iter().map(|error| error.under("routes")));
                Err(errors)
            }
        }
    }
}

/// What a listener has besides itself: TLS, and where connections are passed on to.
fn fittings(
    written: &config::Listener,
    tls: Option<Arc<Tls>>,
    upstreams: &BTreeMap<String, Arc<Upstream>>,
    metrics: &Metrics,
) -> Fittings {
    // The configuration was checked: there is an upstream of this name.
    let relay = |name: &String, idle: Time, label: &str| {
        let upstream = upstreams.get(name)?.clone();
        Some(Arc::new(Relay { upstream, idle: idle.0, metrics: metrics.relay(&written.name, label) }))
    };
    let mut passthrough = Names::default();
    for one in &written.passthrough {
        // One for each name, which is a label of its metrics.
        for name in &one.sni {
            let name = name.to_ascii_lowercase();
            if let Some(relay) = relay(&one.upstream, one.idle, &name) {
                passthrough.insert(&name, relay);
            }
        }
    }
    let tcp = written.tcp.as_ref().and_then(|tcp| relay(&tcp.upstream, tcp.idle, "tcp"));
    Fittings { tls, passthrough, tcp }
}

/// Whether nobody comes in without a certificate.
fn demands_certificates(tls: &config::listener::Tls) -> bool {
    let demands = |one: &config::listener::tls::ClientCertificates| one.mode == ClientMode::Required;
    tls.certificates.iter().all(|one| one.client.as_ref().is_some_and(demands))
}

/// What clients would not accept of the certificates of a listener, but for those that Forebay renews.
fn expired(tls: Option<&Tls>, owner: &str) -> Vec<BuildError> {
    let certificates = tls.map(Tls::certificates).unwrap_or_default();
    let problems = certificates.into_iter().enumerate().filter_map(|(index, facts)| {
        let (facts, path) = (facts.filter(|facts| !facts.issued)?, format!("{owner}.tls.certificates[{index}].cert"));
        facts.problem.map(|problem| BuildError::new(path, format!("`{}` is of no use: {problem}", facts.file)))
    });
    problems.collect()
}

/// Makes the TLS of a listener ready for clients, and tells of certificates that they will not accept.
fn started(mut tls: Tls, owner: &str) -> Result<Arc<Tls>, BuildError> {
    tls.start().map_err(|error| error.under("tls").under(owner))?;
    for error in expired(Some(&tls), owner) {
        tracing::warn!("{error}");
    }
    Ok(Arc::new(tls))
}

/// The same with its path in the form in which the paths of requests are looked up.
fn in_one_form(matches: &Match, paths: Paths) -> Result<Match, BuildError> {
    let path = match &matches.path {
        Some(PathMatch::Exact(path)) => {
            paths.written(path).map(PathMatch::Exact).map_err(|error| error.under("exact"))?
        }
        Some(PathMatch::Prefix(path)) => {
            paths.written(path).map(PathMatch::Prefix).map_err(|error| error.under("prefix"))?
        }
        _ => return Ok(matches.clone()),
    };
    Ok(Match { path: Some(path), ..matches.clone() })
}

fn route(
    written: &config::Route,
    chain: crate::filter::Chain,
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
        grpc,
        only_grpc,
        grpc_web: written.grpc_web == GrpcWeb::Bridge,
        holds_bodies: written.buffering.request.mode != BufferMode::Stream,
        intake: intake(written, resources, &metrics),
        manner: manner(written, resources, &metrics),
        write_idle: written.client.write_idle.0,
        half_close_aborts: written.client.half_close == HalfClose::Abort,
        mirror: None,
        deadline: written.deadline.map(|time| time.0),
        retry: retry::Rules::new(&written.retry),
        upgrades: Upgrades::new(&written.upgrades),
        tag: RouteTag::new(&written.name),
        metrics,
    }
}

/// Who gets copies of the requests of a route.
fn mirror(
    written: &config::Route,
    upstreams: &BTreeMap<String, Arc<Upstream>>,
    connector: Option<&Arc<Connector>>,
    metrics: &Metrics,
) -> Option<Arc<Mirror>> {
    let (name, mirror) = (&written.name, written.mirror.as_ref()?);
    Some(Arc::new(Mirror {
        upstream: upstreams.get(&mirror.upstream)?.clone(),
        share: mirror.percent.ratio(),
        most: u32::try_from(mirror.in_flight.0).unwrap_or(u32::MAX),
        // Names have been checked: they are all letters that a header may have.
        route: HeaderValue::from_str(name).unwrap_or(HeaderValue::from_static("unnamed")),
        metrics: metrics.mirror(&mirror.upstream),
        connector: connector?.clone(),
        inflight: AtomicU32::new(0),
    }))
}

/// How the request bodies of a route are taken.
fn intake(written: &config::Route, resources: &Resources, metrics: &Arc<RouteMetrics>) -> IntakeTerms {
    let (client, request) = (&written.client, &written.buffering.request);
    let stream_without_disk = request.on_disk_full == OnDiskFull::Stream;
    IntakeTerms {
        limits: limits(request.memory, request.disk, resources),
        stream_large: request.mode == BufferMode::Auto || stream_without_disk,
        stream_without_disk,
        max_body: request.max_body.0,
        announced: None,
        duplex: false,
        idle: client.body_idle.0,
        total: client.body_total.0,
        pace: Pace::new(client.min_rate.read.0, client.min_rate.grace.0),
        disk_max: resources.pause.0,
        route: metrics.clone(),
    }
}

/// How the answers of a route leave.
fn manner(written: &config::Route, resources: &Resources, metrics: &Arc<RouteMetrics>) -> Manner {
    let (client, response) = (&written.client, &written.buffering.response);
    Manner {
        leave: match response.mode {
            BufferMode::Auto => Leave::Auto,
            BufferMode::Full => Leave::Full,
            BufferMode::Stream => Leave::Stream,
        },
        limits: limits(response.memory, response.disk, resources),
        pace: Pace::new(client.min_rate.write.0, client.min_rate.grace.0),
        disk_max: resources.pause.0,
        write_idle: client.write_idle.0,
        throttle: client.limit_rate.as_ref().map(|limit| Throttle { rate: limit.rate.0, after: limit.after.0 }),
        route: metrics.clone(),
    }
}

/// What is not written may be more than all spools together may have.
fn limits(memory: Size, disk: Size, resources: &Resources) -> Limits {
    Limits { memory: memory.0.min(resources.memory.0), disk: disk.0.min(resources.disk.0) }
}

/// What bodies are held in. Starts the disk threads, and proves that there is a place for files if there are to be any.
fn depot(config: &Config, shares: &Shares, accounts: Arc<Accounts>, metrics: &Metrics) -> Result<Depot, BuildError> {
    let (server, resources) = (&config.server, &config.resources);
    let spools = metrics.spools();
    let threads = usize::try_from(server.disk_threads.0).unwrap_or(usize::MAX);
    let queue = usize::try_from(server.disk_queue.0).unwrap_or(usize::MAX);
    let disk = Disk::open(Path::new(&server.spool_dir), threads, queue, &spools)
        .map_err(|error| no_spool_dir(&server.spool_dir, &error))?;
    let rung = |rung| resources.on_pressure.contains(&rung);
    let resources = budget::Resources {
        memory: resources.memory.0,
        disk: resources.disk.0,
        files: shares.spools(),
        answers: resources.responses.ratio(),
        client: resources.per_client.ratio(),
        spill: rung(Rung::Spill),
        pause: rung(Rung::Pause),
        shed: rung(Rung::Shed),
        pause_max: resources.pause.0,
    };
    Ok(Depot::new(disk, Budget::new(resources, spools), accounts))
}

fn no_spool_dir(dir: &str, error: &std::io::Error) -> BuildError {
    BuildError::new("server.spool_dir", format!("server.spool_dir: no file can be made in `{dir}`: {error}"))
}

fn bind(address: &config::Address, mode: FileMode, listener: &str) -> Result<Socket, StartError> {
    Socket::bind(address, mode).map_err(|source| StartError::Listen {
        listener: listener.to_owned(),
        address: address.0.clone(),
        source,
    })
}

fn threads(written: Threads) -> usize {
    match written {
        Threads::Fixed(threads) => threads.get(),
        Threads::Auto => std::thread::available_parallelism().map_or(1, |cores| cores.get()),
    }
}

fn loop_terms(config: &Config) -> eventloop::Terms {
    let written = &config.observability.event_loop;
    eventloop::Terms { stall_threshold: written.stall_threshold.0, heartbeat: written.heartbeat.0 }
}

/// What of the open files is for whom; says so where that is less than was written.
fn shares(config: &Config, threads: usize) -> Result<Shares, BuildError> {
    let known = File::open("/dev/null").map_err(|error| no_open_files(&error))?.into();
    let opened = lowest_free(&known).and_then(|next| u64::try_from(next).ok()).unwrap_or_default();
    let sockets = config.listeners.len() as u64 + u64::from(config.admin.enabled);
    let limit = getrlimit(Resource::RLIMIT_NOFILE).map_or(u64::MAX, |(soft, _)| soft);
    let OpenFiles { clients, spools } = config.server.open_files;
    let shares = Shares::new(limit, Shares::own(opened + sockets, threads), clients.ratio(), spools.ratio());
    let (connections, spool_files) = (shares.clients(), shares.spools());
    upstream::transport::dial::leave_descriptors_from(shares.backends_below());
    tracing::info!(open_files = limit, connections, spool_files, "the open files are shared out");
    for listener in &config.listeners {
        let written = listener.limits.connections;
        if written.0 > shares.clients() {
            tracing::warn!(
                listener = listener.name,
                %written,
                connections,
                open_files = limit,
                "the open files allow fewer connections than limits.connections, over all listeners together"
            );
        }
    }
    Ok(shares)
}

fn no_open_files(error: &std::io::Error) -> BuildError {
    BuildError::new("", format!("no file can be opened: {error}"))
}

fn server_conf(config: &Config, threads: usize, shares: &Shares) -> ServerConf {
    let pool = config.server.keepalive_pool.0.min(shares.pool());
    ServerConf {
        threads,
        work_stealing: config.server.work_stealing,
        upstream_keepalive_pool_size: usize::try_from(pool).unwrap_or(usize::MAX),
        // The rules of a route decide; and one attempt may be free of them.
        max_retries: ATTEMPTS_MAX as usize + 1,
        // Pingora has no effect of these without `tokio_unstable`.
        runtime_metrics_poll_time_histogram: true,
        runtime_metrics_poll_time_histogram_scale: Some(RuntimeMetricsPollTimeHistogramScale::Log),
        runtime_metrics_poll_time_histogram_resolution_micros: Some(POLL_TIME_FIRST_MICROS),
        runtime_metrics_poll_time_histogram_buckets: Some(POLL_TIME_BUCKETS),
        ..ServerConf::default()
    }
}
