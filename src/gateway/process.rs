//! The parts of a gateway that belong to the process and outlive each configuration: workers, disk threads, open
//! files, outputs of finished exchanges, and the service that accepts connections.

use std::fs::File;
use std::mem::ManuallyDrop;
use std::path::Path;
use std::sync::Arc;

use nix::sys::resource::{Resource, getrlimit};
use pingora::connectors::ConnectorOptions;
use pingora::connectors::http::custom::Connector as CustomConnector;
use pingora::server::Server;
use pingora::server::configuration::{RuntimeMetricsPollTimeHistogramScale, ServerConf};
use pingora::services::listening::Service as ListeningService;
use pingora_proxy::{HttpProxy, ProcessCustomSession, ProxyServiceBuilder};
use tokio::sync::watch;

use super::parts::{Base, Parts};
use super::web::{Openings, Web};
use crate::access_log::AccessLog;
use crate::account::Accounts;
use crate::admin::Readiness;
use crate::client::cut::Cut;
use crate::client::descriptors::{Doorway, Shares, lowest_free};
use crate::client::driver::course::Reason;
use crate::client::driver::{self, Driver};
use crate::client::inflight::Inflight;
use crate::client::listener::Common;
use crate::client::{ConnectionContext, DownstreamApp, Ending};
use crate::config::Config;
use crate::config::route::retry::ATTEMPTS_MAX;
use crate::config::server::{OpenFiles, PressureAction, Threads};
use crate::error::BuildError;
use crate::eventloop::runtime::{POLL_TIME_BUCKETS, POLL_TIME_FIRST_MICROS};
use crate::eventloop::{self, Loops};
use crate::metrics::{Metrics, RouteMetrics};
use crate::proxy::finish::Settler;
use crate::proxy::generation::Current;
use crate::proxy::{Proxy, Steering};
use crate::recorder::Recorder;
use crate::scheduler::Schedulers;
use crate::spans::Tracer;
use crate::spool::Spools;
use crate::spool::budget::{self, Budget};
use crate::spool::disk::{self, Disk};
use crate::upstream;
use crate::upstream::transport::connector::Endpoints;

/// The highest nice value (setpriority(2)).
const NICE_MAX: i32 = 19;

/// The outputs of finished exchanges.
pub struct Outputs {
    /// The access log, unless it is off.
    pub log: Option<Arc<AccessLog>>,
    /// The tracer, unless tracing is off.
    pub tracer: Option<Arc<Tracer>>,
    /// Recordings.
    pub recorder: Recorder,
    /// The metrics of requests that match no route.
    pub unrouted: Arc<RouteMetrics>,
}

impl Outputs {
    /// Opens the access log and starts the tracer, with the additional fields of these parts.
    ///
    /// # Errors
    ///
    /// One of them cannot be opened.
    pub fn open(config: &Config, parts: &mut Parts, metrics: &Metrics) -> Result<Outputs, BuildError> {
        let observability = &config.observability;
        let fields = std::mem::take(&mut parts.log_fields);
        let log = AccessLog::open(&observability.access_log, fields, metrics.access_log())?.map(Arc::new);
        let attributes = std::mem::take(&mut parts.span_attributes);
        let tracer = Tracer::start(&observability.tracing, attributes, metrics.spans())?;
        Ok(Outputs { log, tracer, recorder: Recorder::default(), unrouted: metrics.unrouted() })
    }
}

/// Signals of a shutdown to the rest of the process, step by step.
pub struct Endings {
    /// From now on, every response is the last one of its connection.
    pub stopping: watch::Sender<bool>,
    /// From now on, connections are accepted.
    pub begin: watch::Sender<bool>,
    /// No new connections are accepted, and idle ones close.
    pub listeners: watch::Sender<bool>,
    /// Cuts the remaining exchanges.
    pub cut: Arc<Cut>,
    /// The active exchanges.
    pub inflight: Arc<Inflight>,
    /// The response of `/readyz`.
    pub readiness: Readiness,
}

impl Default for Endings {
    fn default() -> Self {
        Endings {
            stopping: watch::channel(false).0,
            begin: watch::channel(false).0,
            listeners: watch::channel(false).0,
            cut: Arc::default(),
            inflight: Arc::default(),
            readiness: Readiness::default(),
        }
    }
}

/// The parts that exist once per process.
pub struct Process {
    /// Pingora's server, which runs the services.
    pub server: Server,
    /// Number of workers.
    pub threads: usize,
    /// The shares of the open files.
    pub shares: Shares,
    /// Shared by all listeners.
    pub common: Arc<Common>,
    /// Stores buffered bodies.
    pub spools: Arc<Spools>,
    /// The event loops of the workers.
    pub loops: Loops,
    /// The signals of a shutdown.
    pub endings: Endings,
}

impl Process {
    /// Starts the disk threads and divides the open files.
    ///
    /// # Errors
    ///
    /// Spool files cannot be created, or no file can be opened.
    pub fn build(config: &Config, metrics: &Metrics) -> Result<Process, BuildError> {
        let threads = threads(config.server.threads);
        let shares = shares(config, threads)?;
        let accounts = Accounts::new(config.client_prefix(), &config.trusted_proxies, config.listeners.len());
        let spools = Arc::new(spools(config, &shares, accounts.clone(), metrics)?);
        metrics.set_workers(threads);
        Ok(Process {
            server: Server::new_with_opt_and_conf(None, server_conf(config, threads, &shares)),
            threads,
            common: Common::new(shares, accounts),
            shares,
            spools,
            loops: Loops::new(metrics, loop_terms(config)),
            endings: Endings::default(),
        })
    }

    /// Adds the service of the listeners, which runs exchanges with the `current` configuration.
    ///
    /// # Errors
    ///
    /// No file can be opened.
    pub fn serve(
        &mut self,
        config: &Config,
        current: Current,
        base: &Base,
        outputs: &Outputs,
    ) -> Result<Openings, BuildError> {
        let metrics = &base.metrics;
        let backlog = self.spools.disk.backlog();
        let schedulers = Schedulers::new(metrics.clone(), move || backlog.is_deep(), config.resources.turn.0);
        let settler = Arc::new(Settler {
            unrouted: outputs.unrouted.clone(),
            log: outputs.log.clone(),
            tracer: outputs.tracer.clone(),
            recorder: outputs.recorder.clone(),
        });
        let stopping = self.endings.stopping.subscribe();
        let proxy = Proxy {
            current,
            metrics: metrics.clone(),
            settler: settler.clone(),
            stopping: stopping.clone(),
            spools: self.spools.clone(),
            schedulers: schedulers.clone(),
            challenges: base.challenges.clone(),
            steering: Steering {
                on: uses_own_driver(),
                shares_tasks: config.server.work_stealing,
                metrics: Arc::new(metrics.driver(Reason::ALL.map(Reason::name))),
            },
        };
        let (cut, inflight) = (self.endings.cut.clone(), self.endings.inflight.clone());
        let ending = Ending { stopping, cut, inflight, settler };
        let (log, slow) = (outputs.log.clone(), self.spools.slow.clone());
        let desk = ConnectionContext::new(metrics.clone(), log, ending, slow, schedulers, outputs.unrouted.clone());
        let front = Arc::new(DownstreamApp::new(self.driver(proxy), Arc::new(desk)));
        let doorway =
            Doorway::new(self.shares.accepts_below(), metrics.doorway()).map_err(|error| no_open_files(&error))?;
        let (loops, threads) = (self.loops.clone(), self.threads);
        let find_workers = move || loops.attach(threads, pingora_runtime::current_handle);
        let (begin, stop) = (self.endings.begin.subscribe(), self.endings.listeners.subscribe());
        let (openings, web) = Web::new(front, doorway, threads, begin, stop, find_workers);
        self.server.add_service(web);
        Ok(openings)
    }

    /// Forebay's own driver, with Pingora's as a fallback.
    fn driver(&self, proxy: Proxy) -> Driver<Proxy> {
        let conf = &self.server.configuration;
        let kept = conf.upstream_keepalive_pool_size.div_ceil(self.threads);
        let terms = driver::Terms { pool: kept, attempts: conf.max_retries };
        let endpoints = Endpoints::new(ConnectorOptions::from_server_conf(conf));
        let unused: ProcessCustomSession<_, _> = Arc::new(|_, _, _| Box::pin(std::future::ready(None)));
        let builder = ProxyServiceBuilder::new(conf, proxy.clone()).custom(endpoints, unused);
        Driver::new(proxy, Arc::new(unpacked(builder.build())), terms)
    }
}

/// Extracts the proxy from its service. Pingora offers no other way to create one with a custom connector.
fn unpacked<P, C: CustomConnector>(service: ListeningService<HttpProxy<P, C>>) -> HttpProxy<P, C> {
    let service = ManuallyDrop::new(service);
    let proxy = service.app_logic().expect("a service that was just built has what it serves");
    // SAFETY: the service is never used or dropped afterwards, so the proxy has one owner.
    unsafe { std::ptr::read(proxy) }
}

/// Whether plain exchanges use Forebay's own driver. Tests can force Pingora's.
fn uses_own_driver() -> bool {
    std::env::var_os("FOREBAY_TEST_DRIVER").is_none_or(|driver| driver != "pingora")
}

/// The store of buffered bodies. Starts the disk threads, and checks that files can be created if disk space is
/// configured.
pub fn spools(
    config: &Config,
    shares: &Shares,
    accounts: Arc<Accounts>,
    metrics: &Metrics,
) -> Result<Spools, BuildError> {
    let (server, resources) = (&config.server, &config.resources);
    let spools = metrics.spools();
    let threads = usize::try_from(server.disk_threads.0).unwrap_or(usize::MAX);
    let queue = usize::try_from(server.disk_queue.0).unwrap_or(usize::MAX);
    let terms = disk::Terms { threads, queue, nice: i32::try_from(server.disk_nice.0).unwrap_or(NICE_MAX) };
    let disk = Disk::open(Path::new(&server.spool_dir), terms, &spools)
        .map_err(|error| no_spool_dir(&server.spool_dir, &error))?;
    let action = |action| resources.on_pressure.contains(&action);
    let resources = budget::Resources {
        memory: resources.memory.0,
        disk: resources.disk.0,
        files: shares.spools(),
        answers: resources.responses.ratio(),
        client: resources.per_client.ratio(),
        spill: action(PressureAction::Spill),
        pause: action(PressureAction::Pause),
        shed: action(PressureAction::Shed),
        pause_max: resources.pause.0,
    };
    Ok(Spools::new(disk, Budget::new(resources, spools), accounts))
}

/// The error if spool files cannot be created.
pub fn no_spool_dir(dir: &str, error: &std::io::Error) -> BuildError {
    BuildError::new("server.spool_dir", format!("server.spool_dir: no file can be made in `{dir}`: {error}"))
}

/// Number of workers.
pub fn threads(written: Threads) -> usize {
    match written {
        Threads::Fixed(threads) => threads.get(),
        Threads::Auto => std::thread::available_parallelism().map_or(1, |cores| cores.get()),
    }
}

/// The settings of the event loop monitoring.
pub fn loop_terms(config: &Config) -> eventloop::Terms {
    let written = &config.observability.event_loop;
    eventloop::Terms { stall_threshold: written.stall_threshold.0, heartbeat: written.heartbeat.0 }
}

/// The shares of the open files; logs a warning if they are lower than configured.
pub fn shares(config: &Config, threads: usize) -> Result<Shares, BuildError> {
    let known = File::open("/dev/null").map_err(|error| no_open_files(&error))?.into();
    let opened = lowest_free(&known).and_then(|next| u64::try_from(next).ok()).unwrap_or_default();
    // Twice, because a process that takes over holds duplicates.
    let sockets = 2 * (config.listeners.len() as u64 + u64::from(config.admin.enabled));
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

/// The error if no file can be opened.
pub fn no_open_files(error: &std::io::Error) -> BuildError {
    BuildError::new("", format!("no file can be opened: {error}"))
}

/// The settings of Pingora's server.
pub fn server_conf(config: &Config, threads: usize, shares: &Shares) -> ServerConf {
    let pool = config.server.keepalive_pool.0.min(shares.pool());
    ServerConf {
        threads,
        work_stealing: config.server.work_stealing,
        upstream_keepalive_pool_size: usize::try_from(pool).unwrap_or(usize::MAX),
        // The route's retry rules decide; one further attempt may be free.
        max_retries: ATTEMPTS_MAX as usize + 1,
        // Has no effect in Pingora without `tokio_unstable`.
        runtime_metrics_poll_time_histogram: true,
        runtime_metrics_poll_time_histogram_scale: Some(RuntimeMetricsPollTimeHistogramScale::Log),
        runtime_metrics_poll_time_histogram_resolution_micros: Some(POLL_TIME_FIRST_MICROS),
        runtime_metrics_poll_time_histogram_buckets: Some(POLL_TIME_BUCKETS),
        ..ServerConf::default()
    }
}
