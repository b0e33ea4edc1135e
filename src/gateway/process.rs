//! What belongs to the process and not to a generation of its configuration: workers, disk threads, open files.

use std::fs::File;
use std::path::Path;
use std::sync::Arc;

use nix::sys::resource::{Resource, getrlimit};
use pingora::server::configuration::{RuntimeMetricsPollTimeHistogramScale, ServerConf};

use crate::client::account::Accounts;
use crate::client::budget::{self, Budget};
use crate::client::descriptors::{Shares, lowest_free};
use crate::client::spool::Depot;
use crate::client::spool::disk::{self, Disk};
use crate::config::Config;
use crate::config::route::retry::ATTEMPTS_MAX;
use crate::config::server::{OpenFiles, Rung, Threads};
use crate::error::BuildError;
use crate::eventloop;
use crate::eventloop::runtime::{POLL_TIME_BUCKETS, POLL_TIME_FIRST_MICROS};
use crate::metrics::Metrics;
use crate::upstream;

/// The most that a thread can give way (setpriority(2)).
const NICE_MAX: i32 = 19;

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
