//! Builds the parts of a configuration: resolves names, and finds every error.
//!
//! Nothing here touches a listening socket or keeps a file open, so `check` and a reload can build everything next
//! to the running configuration.

use std::collections::BTreeMap;
use std::sync::{Arc, OnceLock};

use pingora::connectors::ConnectorOptions;
use pingora::connectors::http::Connector;

use crate::acme::Served;
use crate::acme::plan::{Asked, Plan};
use crate::admin::status::{Conditional, Listed};
use crate::client::challenges::Challenges;
use crate::client::listener::Fittings;
use crate::client::names::Names;
use crate::client::relay::Relay;
use crate::client::tls::Tls;
use crate::client::tls::certificate::Source;
use crate::config::listener::Protocol;
use crate::config::listener::tls::ClientMode;
use crate::config::route::Match;
use crate::config::server::Server;
use crate::config::text;
use crate::config::units::Time;
use crate::config::{self, Config};
use crate::error::BuildError;
use crate::expression::named::Named;
use crate::files::Files;
use crate::filter::kept::Kept;
use crate::filter::{Catalog, Surroundings};
use crate::metrics::Metrics;
use crate::proxy::call::{Directory, Lines};
use crate::proxy::header::path::Paths;
use crate::proxy::mirror::Mirror;
use crate::proxy::routes::Route;
use crate::proxy::routes::table::{self, Table};
use crate::upstream::{self, Places, Upstream};

use super::inherited::Inherited;
use super::running::Running;

/// Limit on idle connections to mirror upstreams.
const MIRROR_POOL: usize = 128;

/// The base that configurations are built on. It belongs to the process and outlives each configuration.
pub struct Base {
    /// The filters.
    pub catalog: Catalog,
    /// The metrics.
    pub metrics: Metrics,
    /// The responses to challenges of issuers.
    pub challenges: Arc<Challenges>,
    /// The TLS listeners that serve certificates.
    pub served: Served,
    /// The files that filters use.
    pub files: Files,
    /// Sockets that were open before this process started.
    pub inherited: Inherited,
    /// The places for health checks.
    pub checks: Arc<Places>,
    /// State that filters keep across configurations.
    kept: Kept,
    /// Connections for requests that filters send.
    calls: Lines,
    /// Connections for mirrored requests, created for the first mirror.
    mirrors: OnceLock<Arc<Connector>>,
    /// Whether the base only serves explanations. Names are not resolved then.
    offline: bool,
}

impl Base {
    /// Creates the base of a new process.
    pub fn new(catalog: Catalog, metrics: Metrics) -> Base {
        let challenges = Challenges::new(metrics.challenges());
        let checks = Places::new(Server::default().checks_at_once(), metrics.check_places());
        Base {
            catalog,
            metrics,
            checks,
            challenges,
            served: Served::default(),
            files: Files::default(),
            inherited: Inherited::default(),
            kept: Kept::default(),
            calls: Lines::default(),
            mirrors: OnceLock::new(),
            offline: false,
        }
    }

    /// Creates a base for explanations only.
    pub fn offline(catalog: Catalog, metrics: Metrics) -> Base {
        Base { offline: true, ..Base::new(catalog, metrics) }
    }

    fn mirrors(&self) -> &Arc<Connector> {
        self.mirrors.get_or_init(|| Arc::new(Connector::new(Some(ConnectorOptions::new(MIRROR_POOL)))))
    }
}

/// Everything of a configuration that needs no system sockets or files.
pub struct Parts {
    /// The upstreams, by name.
    pub upstreams: BTreeMap<String, Arc<Upstream>>,
    /// The routing table.
    pub routes: Table<Arc<Route>>,
    /// The routes for `/status`, in file order.
    pub listed: Vec<Listed>,
    /// The TLS settings of each listener, in file order.
    pub tls: Vec<Option<Fit>>,
    /// The TLS settings of the admin endpoint.
    pub admin_tls: Option<Fit>,
    /// Additional fields of the access log.
    pub log_fields: Named,
    /// Additional attributes of spans.
    pub span_attributes: Named,
    /// The issuers and their certificates.
    pub issuers: Vec<Asked>,
}

/// TLS settings: newly built, or already in use and equal.
pub enum Fit {
    /// In use.
    Kept(Arc<Tls>),
    /// Newly built.
    New(Box<Tls>),
}

impl Fit {
    /// The TLS settings in use, if they are built from the same input; else the new ones.
    fn of(built: Tls, running: Option<&Arc<Tls>>, made_of: (&config::listener::Tls, &[Source], &[Protocol])) -> Fit {
        let (written, sources, protocols) = made_of;
        match running.filter(|running| running.is(written, sources, protocols)) {
            Some(running) => Fit::Kept(running.clone()),
            None => Fit::New(Box::new(built)),
        }
    }

    /// The TLS settings.
    pub fn tls(&self) -> &Tls {
        match self {
            Fit::Kept(tls) => tls,
            Fit::New(tls) => tls,
        }
    }

    /// The TLS settings, without starting handshake threads.
    pub fn unstarted(self) -> Arc<Tls> {
        match self {
            Fit::Kept(tls) => tls,
            Fit::New(tls) => Arc::from(tls),
        }
    }

    /// Starts its handshake threads.
    ///
    /// # Errors
    ///
    /// The system has no threads left.
    pub fn ready(self, owner: &str) -> Result<Arc<Tls>, BuildError> {
        match self {
            Fit::Kept(tls) => Ok(tls),
            Fit::New(tls) => started(*tls, owner),
        }
    }
}

impl Parts {
    /// Builds everything. Unchanged parts are shared with the previous configuration.
    ///
    /// # Errors
    ///
    /// All errors that were found.
    pub fn build(base: &Base, config: &Config, before: Option<&Running>) -> Result<Parts, Vec<BuildError>> {
        let mut errors = Vec::new();
        let upstreams = upstreams(base, config, before, &mut errors);
        let Plan { listeners: sources, admin: admin_sources, issuers } = kept(Plan::of(config), &mut errors);
        let tls = listeners_tls(base, config, sources, before, &mut errors);
        let admin_tls = admin_tls(base, config, admin_sources, before);
        let admin_tls = kept(admin_tls.map_err(|found| under("admin.tls", found)), &mut errors);
        let (rules, listed) = routes(base, config, &upstreams, &mut errors);
        let observability = &config.observability;
        let mut named =
            |written, path: &str| kept(text::named(written).map_err(|found| under(path, found)), &mut errors);
        let log_fields = named(&observability.access_log.fields, "observability.access_log.fields");
        let span_attributes = named(&observability.tracing.attributes, "observability.tracing.attributes");
        if !errors.is_empty() {
            // Routes with errors are not among the rules, whose numbers therefore are not those of the routes.
            errors.extend(errors_in_matches(config));
            return Err(errors);
        }
        let rules = rules.iter().map(|(matches, route)| (matches, route.clone())).collect();
        let routes = Table::build(rules).map_err(|found| under("routes", found))?;
        Ok(Parts { upstreams, routes, listed, tls, admin_tls, log_fields, span_attributes, issuers })
    }
}

/// The built value; on errors, adds them to `errors` and returns a default.
fn kept<T: Default>(built: Result<T, Vec<BuildError>>, errors: &mut Vec<BuildError>) -> T {
    built.unwrap_or_else(|found| {
        errors.extend(found);
        T::default()
    })
}

fn under(path: &str, found: Vec<BuildError>) -> Vec<BuildError> {
    found.into_iter().map(|error| error.under(path)).collect()
}

/// The upstreams by name, with the addresses of new ones resolved.
fn upstreams(
    base: &Base,
    config: &Config,
    before: Option<&Running>,
    errors: &mut Vec<BuildError>,
) -> BTreeMap<String, Arc<Upstream>> {
    let mut upstreams = BTreeMap::new();
    let running = |name: &String| before.and_then(|before| before.upstreams.get(name));
    for (name, written) in &config.upstreams {
        match Upstream::build_after(name, written, base.metrics.upstream(name), &base.checks, running(name)) {
            Ok(upstream) => drop(upstreams.insert(name.clone(), upstream)),
            Err(found) => errors.extend(found),
        }
    }
    let is_new = |name: &String, upstream: &Arc<Upstream>| running(name).is_none_or(|old| !Arc::ptr_eq(old, upstream));
    let new = upstreams.iter().filter(|(name, upstream)| !base.offline && is_new(name, upstream));
    errors.extend(upstream::look_up(new.map(|(_, upstream)| upstream)));
    upstreams
}

/// The TLS settings of each listener, in file order; `sources` are the sources of their certificates.
fn listeners_tls(
    base: &Base,
    config: &Config,
    sources: Vec<Vec<Source>>,
    before: Option<&Running>,
    errors: &mut Vec<BuildError>,
) -> Vec<Option<Fit>> {
    let mut all = Vec::new();
    for (index, (written, sources)) in config.listeners.iter().zip(sources).enumerate() {
        let (name, spoken) = (&written.name, written.spoken());
        let running = before.and_then(|before| before.listener(name)).and_then(|listener| listener.tls.as_ref());
        let built = written.tls.as_ref().map(|tls| {
            let (challenges, metrics) = (base.challenges.clone(), base.metrics.tls(name));
            let earlier = running.map(|tls| &**tls);
            let built = Tls::build(tls, sources.clone(), name, spoken, challenges, metrics, earlier);
            built.map(|built| Fit::of(built, running, (tls, &sources, spoken)))
        });
        match built.transpose() {
            Ok(built) => all.push(built),
            Err(found) => errors.extend(under(&format!("listeners[{index}].tls"), found)),
        }
    }
    all
}

/// The TLS settings of the admin endpoint, if it has any.
fn admin_tls(
    base: &Base,
    config: &Config,
    sources: Vec<Source>,
    before: Option<&Running>,
) -> Result<Option<Fit>, Vec<BuildError>> {
    const SPOKEN: &[Protocol] = &[Protocol::Http1];
    let Some(tls) = config.admin.tls.as_ref().filter(|_| config.admin.enabled) else { return Ok(None) };
    // Issuers do not connect to the admin endpoint.
    let unasked = Challenges::new(base.metrics.challenges());
    let running = before.and_then(|before| before.admin_tls.as_ref());
    let (metrics, earlier) = (base.metrics.tls("admin"), running.map(|tls| &**tls));
    let built = Tls::build(tls, sources.clone(), "admin", SPOKEN, unasked, metrics, earlier)?;
    Ok(Some(Fit::of(built, running, (tls, &sources, SPOKEN))))
}

/// The errors in the match conditions of routes, except for paths that cannot be written in their canonical form.
fn errors_in_matches(config: &Config) -> Vec<BuildError> {
    let paths = Paths::new(&config.paths);
    let errors = config.routes.iter().enumerate().flat_map(|(index, written)| {
        let matches = paths.in_matches(&written.matches).unwrap_or_else(|_| written.matches.clone());
        under(&format!("routes[{index}]"), table::errors_of(&matches))
    });
    errors.collect()
}

/// The routes with their match conditions, and for `/status`. Errors in match conditions are left to
/// [`errors_in_matches`].
fn routes(
    base: &Base,
    config: &Config,
    upstreams: &BTreeMap<String, Arc<Upstream>>,
    errors: &mut Vec<BuildError>,
) -> (Vec<(Match, Arc<Route>)>, Vec<Listed>) {
    let (mut rules, mut listed, paths) = (Vec::new(), Vec::new(), Paths::new(&config.paths));
    let metrics = &base.metrics;
    let callees = Directory::new(upstreams, metrics, &base.calls);
    let keeping = base.kept.begin();
    for (index, written) in config.routes.iter().enumerate() {
        let place = format!("routes[{index}]");
        let around = Surroundings::new(config.directory(), &written.name, metrics, &callees);
        let around = around.keeping(&keeping).watching(&base.files);
        match base.catalog.chain_in(&written.filters, &around) {
            Ok(chain) => {
                let chain = chain.timed(&written.name, metrics).bounded(written.filter_timeout.0);
                let mut route = Route::build(written, chain, upstreams, &config.resources, metrics);
                route.mirror = Mirror::build(written, upstreams, metrics, || base.mirrors().clone());
                let split = written.upstreams.iter().map(|side| side.name.clone());
                let conditional = route.chain.conditional().map(|(filter, when, skipped)| Conditional {
                    filter,
                    when: format!("{when:?}"),
                    skipped: skipped.clone(),
                });
                listed.push(Listed {
                    metrics: route.metrics.clone(),
                    upstreams: written.upstream.iter().cloned().chain(split).collect(),
                    conditional: conditional.collect(),
                });
                match paths.in_matches(&written.matches) {
                    Ok(matches) => rules.push((matches, Arc::new(route))),
                    Err(error) => errors.push(error.under(&format!("{place}.match.path"))),
                }
            }
            Err(found) => errors.extend(found.into_iter().map(|error| error.under("filters").under(&place))),
        }
    }
    (rules, listed)
}

/// Further parts of a listener: TLS, and where connections are forwarded to.
pub fn fittings(
    written: &config::Listener,
    tls: Option<Arc<Tls>>,
    upstreams: &BTreeMap<String, Arc<Upstream>>,
    metrics: &Metrics,
) -> Fittings {
    // The configuration was checked: the upstream exists.
    let relay = |name: &String, idle: Time, label: &str| {
        let upstream = upstreams.get(name)?.clone();
        Some(Arc::new(Relay { upstream, idle: idle.0, metrics: metrics.relay(&written.name, label) }))
    };
    let mut passthrough = Names::default();
    for one in &written.passthrough {
        // One per name, because the name is a label of its metrics.
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

/// Whether every client must present a certificate.
pub fn demands_certificates(tls: &config::listener::Tls) -> bool {
    let demands = |one: &config::listener::tls::ClientCertificates| one.mode == ClientMode::Required;
    tls.certificates.iter().all(|one| one.client.as_ref().is_some_and(demands))
}

/// Errors for certificates that clients would reject, except those that Forebay renews.
pub fn expired(tls: Option<&Tls>, owner: &str) -> Vec<BuildError> {
    let certificates = tls.map(Tls::certificates).unwrap_or_default();
    let problems = certificates.into_iter().enumerate().filter_map(|(index, facts)| {
        let (facts, path) = (facts.filter(|facts| !facts.issued)?, format!("{owner}.tls.certificates[{index}].cert"));
        facts.problem.map(|problem| BuildError::new(path, format!("`{}` is unusable: {problem}", facts.file)))
    });
    problems.collect()
}

/// Certificates that are used for names they do not contain. Only a warning because some clients do not check
/// names.
pub fn mismatched(tls: Option<&Tls>, owner: &str) -> Vec<BuildError> {
    let certificates = tls.map(Tls::certificates).unwrap_or_default();
    let warnings = certificates.into_iter().enumerate().filter_map(|(index, facts)| {
        let facts = facts?;
        let message = format!("`{}` is used for other names than its own: {}", facts.file, facts.mismatch()?);
        Some(BuildError::new(format!("{owner}.tls.certificates[{index}].names"), message))
    });
    warnings.collect()
}

/// Starts the TLS of a listener, and reports certificates that clients would reject.
pub fn started(mut tls: Tls, owner: &str) -> Result<Arc<Tls>, BuildError> {
    tls.start().map_err(|error| error.under("tls").under(owner))?;
    for error in expired(Some(&tls), owner).into_iter().chain(mismatched(Some(&tls), owner)) {
        tracing::warn!("{error}");
    }
    Ok(Arc::new(tls))
}
