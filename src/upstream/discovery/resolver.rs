//! DNS look-ups with hickory-resolver: never on a worker, and with a time limit.

use std::fs;
use std::future::Future;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use async_trait::async_trait;
use futures::future::join_all;
use hickory_resolver::TokioResolver;
use hickory_resolver::config::{
    ConnectionConfig, LookupIpStrategy, NameServerConfig, ResolveHosts, ResolverConfig, ResolverOpts,
};
use hickory_resolver::net::NetError;
use hickory_resolver::net::runtime::TokioRuntimeProvider;
use hickory_resolver::proto::rr::{RData, RecordType};
use hickory_resolver::system_conf::read_system_conf;

use super::memory::QueryResult;
use crate::party::pauses::paused;
use crate::party::wait::{NoClient, within};

/// The system's resolver files; read again when they change, and only if they are regular files.
const SYSTEM_FILES: [&str; 2] = ["/etc/resolv.conf", "/etc/hosts"];

/// How often an unresponsive server is asked within the time limit of a look-up.
const TRIES: u32 = 3;

/// Resolves names.
#[async_trait]
pub trait Resolve: Send + Sync {
    /// The addresses of `host`.
    async fn addresses(&self, host: &str) -> QueryResult<IpAddr>;

    /// The SRV records of `name`.
    async fn services(&self, name: &str) -> QueryResult<Service>;
}

/// One SRV record (RFC 2782), with the addresses of its host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Service {
    pub priority: u16,
    pub weight: u16,
    pub port: u16,
    pub addresses: Vec<IpAddr>,
}

/// The resolver of one upstream.
pub struct Resolver {
    /// The DNS servers; empty: those of the system.
    servers: Vec<SocketAddr>,
    timeout: Duration,
    current: Mutex<Option<Current>>,
}

/// A resolver with the settings of the system's files, bound to the runtime that created it.
struct Current {
    resolver: Arc<TokioResolver>,
    runtime: tokio::runtime::Id,
    stamps: [Option<SystemTime>; 2],
}

impl Resolver {
    /// A resolver for these servers; without any, for those of the system.
    pub fn new(servers: Vec<SocketAddr>, timeout: Duration) -> Resolver {
        Resolver { servers, timeout, current: Mutex::new(None) }
    }

    fn current(&self) -> Result<Arc<TokioResolver>, NetError> {
        let runtime = tokio::runtime::Handle::current().id();
        let stamps = match self.servers.is_empty() {
            true => SYSTEM_FILES.map(|file| fs::metadata(file).and_then(|file| file.modified()).ok()),
            false => [None; 2],
        };
        let mut current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(current) = &*current
            && current.runtime == runtime
            && current.stamps == stamps
        {
            return Ok(current.resolver.clone());
        }
        let resolver = Arc::new(self.make()?);
        *current = Some(Current { resolver: resolver.clone(), runtime, stamps });
        Ok(resolver)
    }

    fn make(&self) -> Result<TokioResolver, NetError> {
        let (config, mut options) = if self.servers.is_empty() {
            // The default server is the local machine (resolv.conf(5)).
            let itself = || ResolverConfig::from_parts(None, Vec::new(), vec![server(&([127, 0, 0, 1], 53).into())]);
            let [resolv, hosts] = SYSTEM_FILES.map(|file| !fs::metadata(file).is_ok_and(|file| !file.is_file()));
            let read = if resolv { read_system_conf().ok() } else { None };
            let (config, mut options) = read.unwrap_or_else(|| (itself(), ResolverOpts::default()));
            if !hosts {
                options.use_hosts_file = ResolveHosts::Never;
            }
            (config, options)
        } else {
            let servers = self.servers.iter().map(server).collect();
            let mut options = ResolverOpts::default();
            options.use_hosts_file = ResolveHosts::Never;
            (ResolverConfig::from_parts(None, Vec::new(), servers), options)
        };
        options.timeout = self.timeout / TRIES;
        options.attempts = TRIES as usize - 1;
        options.ip_strategy = LookupIpStrategy::Ipv4AndIpv6;
        // No cache: a repeated query must see changes.
        options.cache_size = 0;
        TokioResolver::builder_with_config(config, TokioRuntimeProvider::default()).with_options(options).build()
    }

    async fn look_up(&self, host: &str) -> QueryResult<IpAddr> {
        let asked = async { self.current()?.lookup_ip(host).await };
        match asked.await {
            Ok(found) => {
                let addresses: Vec<IpAddr> = found.iter().collect();
                match addresses.is_empty() {
                    true => QueryResult::None(format!("`{host}` has no address")),
                    false => QueryResult::Found(addresses, left(found.valid_until())),
                }
            }
            Err(error) => told(host, &error),
        }
    }

    async fn look_up_service(&self, name: &str) -> QueryResult<Service> {
        let asked = async { self.current()?.lookup(name, RecordType::SRV).await };
        let found = match asked.await {
            Ok(found) => found,
            Err(error) => return told(name, &error),
        };
        let mut ttl = left(found.valid_until());
        let records = found.answers().iter().filter_map(|record| match &record.data {
            // A host of `.` means that the service is not available (RFC 2782).
            RData::SRV(record) if !record.target.is_root() => Some(record),
            _ => None,
        });
        let hosts = records.map(|record| async move { (record, self.look_up(&record.target.to_utf8()).await) });
        let mut services = Vec::new();
        for (record, answer) in join_all(hosts).await {
            match answer {
                QueryResult::Found(addresses, host_ttl) => {
                    ttl = ttl.min(host_ttl);
                    let (priority, weight, port) = (record.priority, record.weight, record.port);
                    services.push(Service { priority, weight, port, addresses });
                }
                QueryResult::None(_) => {}
                // Without it, the result would lack a server that may exist.
                QueryResult::Failed(why) => {
                    return QueryResult::Failed(format!("`{name}` names a host that is unknown: {why}"));
                }
            }
        }
        match services.is_empty() {
            true => QueryResult::None(format!("`{name}` lists no server that has an address")),
            false => QueryResult::Found(services, ttl),
        }
    }

    async fn in_time<T, F: Future<Output = QueryResult<T>>>(&self, name: &str, ask: impl Fn() -> F) -> QueryResult<T> {
        let late =
            || QueryResult::Failed(format!("no answer with the addresses of `{name}` came within {:?}", self.timeout));
        let since = Instant::now();
        let answer = within(self.timeout, NoClient::Discovery, ask()).await.unwrap_or_else(late);
        // The clocks of hickory-resolver run on while the gateway is suspended: its servers get their time again, once.
        if matches!(answer, QueryResult::Failed(_)) && !paused(since, Instant::now(), None).is_zero() {
            return within(self.timeout, NoClient::Discovery, ask()).await.unwrap_or_else(late);
        }
        answer
    }
}

#[async_trait]
impl Resolve for Resolver {
    async fn addresses(&self, host: &str) -> QueryResult<IpAddr> {
        self.in_time(host, || self.look_up(host)).await
    }

    async fn services(&self, name: &str) -> QueryResult<Service> {
        self.in_time(name, || self.look_up_service(name)).await
    }
}

fn server(address: &SocketAddr) -> NameServerConfig {
    let mut server = NameServerConfig::udp_and_tcp(address.ip());
    server.connections.iter_mut().for_each(|connection: &mut ConnectionConfig| connection.port = address.port());
    server
}

fn left(until: Instant) -> Duration {
    until.saturating_duration_since(Instant::now())
}

fn told<T>(name: &str, error: &NetError) -> QueryResult<T> {
    if error.is_nx_domain() {
        QueryResult::None(format!("there is no `{name}`"))
    } else if error.is_no_records_found() {
        QueryResult::None(format!("`{name}` has no address"))
    } else {
        QueryResult::Failed(format!("`{name}` could not be resolved: {error}"))
    }
}
