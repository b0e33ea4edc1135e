//! What of a gateway belongs to its process, whatever its configuration becomes: workers, disk threads, open files, the
//! outputs of what exchanges come to, and the service that accepts connections.

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

use super::parts::{Ground, Parts};
use super::web::{Openings, Web};
use crate::access_log::AccessLog;
use crate::admin::Readiness;
use crate::client::account::Accounts;
use crate::client::budget::{self, Budget};
use crate::client::connection::{Common, Inflight};
use crate::client::cut::Cut;
use crate::client::descriptors::{Doorway, Shares, lowest_free};
use crate::client::driver::course::Reason;
use crate::client::driver::{self, Driver};
use crate::client::lane::{Door, Lanes};
use crate::client::spool::Depot;
use crate::client::spool::disk::{self, Disk};
use crate::client::{Desk, Ending, Front};
use crate::config::Config;
use crate::config::route::retry::ATTEMPTS_MAX;
use crate::config::server::{OpenFiles, Rung, Threads};
use crate::error::BuildError;
use crate::eventloop::runtime::{POLL_TIME_BUCKETS, POLL_TIME_FIRST_MICROS};
use crate::eventloop::{self, Loops};
use crate::metrics::{Metrics, RouteMetrics};
use crate::proxy::finish::Settler;
use crate::proxy::generation::Current;
use crate::proxy::{Proxy, Steering};
use crate::recorder::Recorder;
use crate::spans::Tracer;
use crate::upstream;
use crate::upstream::transport::connector::Endpoints;

/// The most that a thread can give way (setpriority(2)).
const NICE_MAX: i32 = 19;

/// Where finished exchanges are reported.
pub struct Outputs {
    /// The access log, unless it is off.
    pub log: Option<Arc<AccessLog>>,
    /// Traces, if they are exported.
    pub tracer: Option<Arc<Tracer>>,
    /// Recordings.
    pub recorder: Recorder,
    /// The counters of requests that no route takes.
    pub unrouted: Arc<RouteMetrics>,
}

impl Outputs {
    /// Opens the log and starts the tracer, with the further fields that these parts have for them.
    ///
    /// # Errors
    ///
    /// Which of the two cannot be.
    pub fn open(config: &Config, parts: &mut Parts, metrics: &Metrics) -> Result<Outputs, BuildError> {
        let observability = &config.observability;
        let fields = std::mem::take(&mut parts.log_fields);
        let log = AccessLog::open(&observability.access_log, fields, metrics.access_log())?.map(Arc::new);
        let attributes = std::mem::take(&mut parts.span_attributes);
        let tracer = Tracer::start(&observability.tracing, attributes, metrics.spans())?;
        Ok(Outputs { log, tracer, recorder: Recorder::default(), unrouted: metrics.unrouted() })
    }
}

/// What a stop tells the rest of the process, step by step.
pub struct Endings {
    /// Answers say that they are the last of their connection from then on.
    pub stopping: watch::Sender<bool>,
    /// Connections are accepted from then on.
    pub begin: watch::Sender<bool>,
    /// No connection is accepted any more, and idle ones close.
    pub listeners: watch::Sender<bool>,
    /// What is left is cut.
    pub cut: Arc<Cut>,
    /// The exchanges that are waited for.
    pub inflight: Arc<Inflight>,
    /// The answer of `/readyz`.
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

/// What there is once in a process.
pub struct Process {
    /// Pingora's server, which runs the services.
    pub server: Server,
    /// How many workers there are.
    pub threads: usize,
    /// What of the open files is for whom.
    pub shares: Shares,
    /// What all listeners share.
    pub common: Arc<Common>,
    /// What bodies are held in.
    pub depot: Arc<Depot>,
    /// The event loops of the workers.
    pub loops: Loops,
    /// What a stop tells.
    pub endings: Endings,
}

impl Process {
    /// Starts the disk threads and shares the open files out.
    ///
    /// # Errors
    ///
    /// There is no place for spooled bodies, or no file can be opened.
    pub fn build(config: &Config, metrics: &Metrics) -> Result<Process, BuildError> {
        let threads = threads(config.server.threads);
        let shares = shares(config, threads)?;
        let accounts = Accounts::new(config.client_prefix(), &config.trusted_proxies, config.listeners.len());
        let depot = Arc::new(depot(config, &shares, accounts.clone(), metrics)?);
        metrics.set_workers(threads);
        Ok(Process {
            server: Server::new_with_opt_and_conf(None, server_conf(config, threads, &shares)),
            threads,
            common: Common::new(shares, accounts),
            shares,
            depot,
            loops: Loops::new(metrics, loop_terms(config)),
            endings: Endings::default(),
        })
    }

    /// Adds the service of the listeners: connections become exchanges, which go by `current`.
    ///
    /// # Errors
    ///
    /// No file can be opened.
    pub fn serve(
        &mut self,
        config: &Config,
        current: Current,
        ground: &Ground,
        outputs: &Outputs,
    ) -> Result<Openings, BuildError> {
        let metrics = &ground.metrics;
        let lanes = Lanes::new(metrics.clone(), self.depot.disk.backlog(), config.resources.turn.0);
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
            depot: self.depot.clone(),
            lanes: lanes.clone(),
            challenges: ground.challenges.clone(),
            steering: Steering {
                on: uses_own_driver(),
                shares_tasks: config.server.work_stealing,
                metrics: Arc::new(metrics.driver(Reason::ALL.map(Reason::name))),
            },
        };
        let (cut, inflight) = (self.endings.cut.clone(), self.endings.inflight.clone());
        let ending = Ending { stopping, cut, inflight, undertaker: settler };
        let (log, slow) = (outputs.log.clone(), self.depot.slow.clone());
        let desk = Desk::new(metrics.clone(), log, ending, slow, lanes, outputs.unrouted.clone());
        let front = Arc::new(Front::new(self.driver(proxy), Arc::new(desk)));
        let doorway =
            Doorway::new(self.shares.accepts_below(), metrics.doorway()).map_err(|error| no_open_files(&error))?;
        let (loops, threads) = (self.loops.clone(), self.threads);
        let find_workers = move || loops.attach(threads, pingora_runtime::current_handle);
        let (begin, stop) = (self.endings.begin.subscribe(), self.endings.listeners.subscribe());
        let (openings, web) = Web::new(front, Door(doorway), threads, begin, stop, find_workers);
        self.server.add_service(web);
        Ok(openings)
    }

    /// Our own driver, with Pingora's behind it.
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

/// What bodies are held in. Starts the disk threads, and proves that there is a place for files if there are to be any.
pub fn depot(
    config: &Config,
    shares: &Shares,
    accounts: Arc<Accounts>,
    metrics: &Metrics,
) -> Result<Depot, BuildError> {
    let (server, resources) = (&config.server, &config.resources);
    let spools = metrics.spools();
    let threads = usize::try_from(server.disk_threads.0).unwrap_or(usize::MAX);
    let queue = usize::try_from(server.disk_queue.0).unwrap_or(usize::MAX);
    let terms = disk::Terms { threads, queue, nice: i32::try_from(server.disk_nice.0).unwrap_or(NICE_MAX) };
    let disk = Disk::open(Path::new(&server.spool_dir), terms, &spools)
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

/// What is wrong where files cannot be made for spooled bodies.
pub fn no_spool_dir(dir: &str, error: &std::io::Error) -> BuildError {
    BuildError::new("server.spool_dir", format!("server.spool_dir: no file can be made in `{dir}`: {error}"))
}

/// How many workers there are.
pub fn threads(written: Threads) -> usize {
    match written {
        Threads::Fixed(threads) => threads.get(),
        Threads::Auto => std::thread::available_parallelism().map_or(1, |cores| cores.get()),
    }
}

/// When a worker counts as stalled.
pub fn loop_terms(config: &Config) -> eventloop::Terms {
    let written = &config.observability.event_loop;
    eventloop::Terms { stall_threshold: written.stall_threshold.0, heartbeat: written.heartbeat.0 }
}

/// What of the open files is for whom; says so where that is less than was written.
pub fn shares(config: &Config, threads: usize) -> Result<Shares, BuildError> {
    let known = File::open("/dev/null").map_err(|error| no_open_files(&error))?.into();
    let opened = lowest_free(&known).and_then(|next| u64::try_from(next).ok()).unwrap_or_default();
    // Each is there once more, for a process that takes over.
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

/// What is wrong where no file can be opened.
pub fn no_open_files(error: &std::io::Error) -> BuildError {
    BuildError::new("", format!("no file can be opened: {error}"))
}

/// The configuration of Pingora's server.
pub fn server_conf(config: &Config, threads: usize, shares: &Shares) -> ServerConf {
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
