//! The parts of a configuration: names become the things they name, and every error is found.
//!
//! Nothing here touches a socket of a listener or keeps a file, so that `check` and a reload can build all of it beside
//! the configuration that runs.

use std::collections::BTreeMap;
use std::sync::{Arc, OnceLock};

use pingora::connectors::ConnectorOptions;
use pingora::connectors::http::Connector;

use crate::acme::Served;
use crate::acme::plan::{Asked, Plan};
use crate::admin::status::{Conditional, Listed};
use crate::client::challenges::Challenges;
use crate::client::connection::Fittings;
use crate::client::names::Names;
use crate::client::relay::Relay;
use crate::client::tls::Tls;
use crate::client::tls::certificate::Source;
use crate::config::listener::Protocol;
use crate::config::listener::tls::ClientMode;
use crate::config::route::Match;
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
use crate::proxy::routes::table::Table;
use crate::upstream::{self, Upstream};

use super::inherited::Inherited;
use super::running::Running;

/// How many idle connections to upstreams of mirrors are kept.
const MIRROR_POOL: usize = 128;

/// What configurations are built on: it belongs to the process and outlives each of them.
pub struct Ground {
    /// The filters.
    pub catalog: Catalog,
    /// What is counted.
    pub metrics: Metrics,
    /// What issuers of certificates may ask.
    pub challenges: Arc<Challenges>,
    /// Those who serve certificates now.
    pub served: Served,
    /// The files that filters go by.
    pub files: Files,
    /// Sockets that were open before this process.
    pub inherited: Inherited,
    /// What filters keep from one configuration to the next.
    kept: Kept,
    /// Connections for the calls of filters.
    calls: Lines,
    /// Connections for copies, made for the first mirror.
    mirrors: OnceLock<Arc<Connector>>,
    /// Names are not resolved: it is only asked what would be done.
    offline: bool,
}

impl Ground {
    /// That of a process that begins.
    pub fn new(catalog: Catalog, metrics: Metrics) -> Ground {
        let challenges = Challenges::new(metrics.challenges());
        Ground {
            catalog,
            metrics,
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

    /// The same for who asks what would be done.
    pub fn offline(catalog: Catalog, metrics: Metrics) -> Ground {
        Ground { offline: true, ..Ground::new(catalog, metrics) }
    }

    fn mirrors(&self) -> &Arc<Connector> {
        self.mirrors.get_or_init(|| Arc::new(Connector::new(Some(ConnectorOptions::new(MIRROR_POOL)))))
    }
}

/// What is built of a configuration without touching the system's sockets and files.
pub struct Parts {
    /// The upstreams, by name.
    pub upstreams: BTreeMap<String, Arc<Upstream>>,
    /// Which request goes where.
    pub routes: Table<Arc<Route>>,
    /// The routes as `/status` shows them, in the order of the file.
    pub listed: Vec<Listed>,
    /// The TLS of each listener, in the order of the file.
    pub tls: Vec<Option<Fit>>,
    /// That of the admin endpoint.
    pub admin_tls: Option<Fit>,
    /// Further fields of the access log.
    pub log_fields: Named,
    /// Further attributes of spans.
    pub span_attributes: Named,
    /// Who is asked for certificates.
    pub issuers: Vec<Asked>,
}

/// TLS that was built, or that runs already and is the same.
pub enum Fit {
    /// It runs.
    Kept(Arc<Tls>),
    /// It was built.
    New(Box<Tls>),
}

impl Fit {
    /// The TLS that runs, if it is what these make; else the one that was built.
    fn of(built: Tls, running: Option<&Arc<Tls>>, made_of: (&config::listener::Tls, &[Source], &[Protocol])) -> Fit {
        let (written, sources, protocols) = made_of;
        match running.filter(|running| running.is(written, sources, protocols)) {
            Some(running) => Fit::Kept(running.clone()),
            None => Fit::New(Box::new(built)),
        }
    }

    /// The TLS.
    pub fn tls(&self) -> &Tls {
        match self {
            Fit::Kept(tls) => tls,
            Fit::New(tls) => tls,
        }
    }

    /// The same, without threads for handshakes.
    pub fn unstarted(self) -> Arc<Tls> {
        match self {
            Fit::Kept(tls) => tls,
            Fit::New(tls) => Arc::from(tls),
        }
    }

    /// Makes it ready for clients.
    ///
    /// # Errors
    ///
    /// The system has no threads for it.
    pub fn ready(self, owner: &str) -> Result<Arc<Tls>, BuildError> {
        match self {
            Fit::Kept(tls) => Ok(tls),
            Fit::New(tls) => started(*tls, owner),
        }
    }
}

impl Parts {
    /// Builds all of it. What is as it was in the configuration before is the same thing.
    ///
    /// # Errors
    ///
    /// Everything that is wrong.
    pub fn build(ground: &Ground, config: &Config, before: Option<&Running>) -> Result<Parts, Vec<BuildError>> {
        let mut errors = Vec::new();
        let upstreams = upstreams(ground, config, before, &mut errors);
        let Plan { listeners: sources, admin: admin_sources, issuers } = kept(Plan::of(config), &mut errors);
        let tls = listeners_tls(ground, config, sources, before, &mut errors);
        let admin_tls = admin_tls(ground, config, admin_sources, before);
        let admin_tls = kept(admin_tls.map_err(|found| under("admin.tls", found)), &mut errors);
        let (rules, listed) = routes(ground, config, &upstreams, &mut errors);
        let observability = &config.observability;
        let mut named =
            |written, path: &str| kept(text::named(written).map_err(|found| under(path, found)), &mut errors);
        let log_fields = named(&observability.access_log.fields, "observability.access_log.fields");
        let span_attributes = named(&observability.tracing.attributes, "observability.tracing.attributes");
        match Table::build(rules.iter().map(|(matches, route)| (matches, route.clone())).collect()) {
            Ok(routes) if errors.is_empty() => {
                Ok(Parts { upstreams, routes, listed, tls, admin_tls, log_fields, span_attributes, issuers })
            }
            Ok(_) => Err(errors),
            Err(found) => {
                errors.extend(under("routes", found));
                Err(errors)
            }
        }
    }
}

/// What was built; what is wrong with it goes to `errors`, and nothing stands for it meanwhile.
fn kept<T: Default>(built: Result<T, Vec<BuildError>>, errors: &mut Vec<BuildError>) -> T {
    built.unwrap_or_else(|found| {
        errors.extend(found);
        T::default()
    })
}

fn under(path: &str, found: Vec<BuildError>) -> Vec<BuildError> {
    found.into_iter().map(|error| error.under(path)).collect()
}

/// The upstreams by name, with the addresses of those that are new.
fn upstreams(
    ground: &Ground,
    config: &Config,
    before: Option<&Running>,
    errors: &mut Vec<BuildError>,
) -> BTreeMap<String, Arc<Upstream>> {
    let mut upstreams = BTreeMap::new();
    let running = |name: &String| before.and_then(|before| before.upstreams.get(name));
    for (name, written) in &config.upstreams {
        match Upstream::build_after(name, written, ground.metrics.upstream(name), running(name)) {
            Ok(upstream) => drop(upstreams.insert(name.clone(), upstream)),
            Err(found) => errors.extend(found),
        }
    }
    let is_new = |name: &String, upstream: &Arc<Upstream>| running(name).is_none_or(|old| !Arc::ptr_eq(old, upstream));
    let new = upstreams.iter().filter(|(name, upstream)| !ground.offline && is_new(name, upstream));
    errors.extend(upstream::look_up(new.map(|(_, upstream)| upstream)));
    upstreams
}

/// The TLS of each listener, in the order of the file; `sources` are those of their certificates.
fn listeners_tls(
    ground: &Ground,
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
            let (challenges, metrics) = (ground.challenges.clone(), ground.metrics.tls(name));
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

/// The TLS of the admin endpoint, if it has any.
fn admin_tls(
    ground: &Ground,
    config: &Config,
    sources: Vec<Source>,
    before: Option<&Running>,
) -> Result<Option<Fit>, Vec<BuildError>> {
    const SPOKEN: &[Protocol] = &[Protocol::Http1];
    let Some(tls) = config.admin.tls.as_ref().filter(|_| config.admin.enabled) else { return Ok(None) };
    // No issuer comes here.
    let unasked = Challenges::new(ground.metrics.challenges());
    let running = before.and_then(|before| before.admin_tls.as_ref());
    let (metrics, earlier) = (ground.metrics.tls("admin"), running.map(|tls| &**tls));
    let built = Tls::build(tls, sources.clone(), "admin", SPOKEN, unasked, metrics, earlier)?;
    Ok(Some(Fit::of(built, running, (tls, &sources, SPOKEN))))
}

/// The routes with what each matches, and as `/status` shows them. Of one whose filters are wrong, the rest is looked
/// at all the same.
fn routes(
    ground: &Ground,
    config: &Config,
    upstreams: &BTreeMap<String, Arc<Upstream>>,
    errors: &mut Vec<BuildError>,
) -> (Vec<(Match, Arc<Route>)>, Vec<Listed>) {
    let (mut rules, mut listed, paths) = (Vec::new(), Vec::new(), Paths::new(&config.paths));
    let metrics = &ground.metrics;
    let callees = Directory::new(upstreams, metrics, &ground.calls);
    let keeping = ground.kept.begin();
    for (index, written) in config.routes.iter().enumerate() {
        let place = format!("routes[{index}]");
        let around = Surroundings::new(config.directory(), &written.name, metrics, &callees);
        let around = around.keeping(&keeping).watching(&ground.files);
        match ground.catalog.chain_in(&written.filters, &around) {
            Ok(chain) => {
                let chain = chain.timed(&written.name, metrics).bounded(written.filter_timeout.0);
                let mut route = Route::build(written, chain, upstreams, &config.resources, metrics);
                route.mirror = Mirror::build(written, upstreams, metrics, || ground.mirrors().clone());
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
            Err(found) => {
                errors.extend(found.into_iter().map(|error| error.under("filters").under(&place)));
                // It has no place in the table, and what is wrong with its `match` is reported all the same.
                let alone = Table::build(vec![(&written.matches, ())]).err().unwrap_or_default();
                errors.extend(alone.into_iter().map(|error| {
                    let path = error.path.trim_start_matches("[0]").to_owned();
                    BuildError { path: format!("{place}{path}"), ..error }
                }));
            }
        }
    }
    (rules, listed)
}

/// What a listener has besides itself: TLS, and where connections are passed on to.
pub fn fittings(
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

/// Whether every client needs a certificate.
pub fn demands_certificates(tls: &config::listener::Tls) -> bool {
    let demands = |one: &config::listener::tls::ClientCertificates| one.mode == ClientMode::Required;
    tls.certificates.iter().all(|one| one.client.as_ref().is_some_and(demands))
}

/// What clients would not accept of the certificates of a listener, but for those that Forebay renews.
pub fn expired(tls: Option<&Tls>, owner: &str) -> Vec<BuildError> {
    let certificates = tls.map(Tls::certificates).unwrap_or_default();
    let problems = certificates.into_iter().enumerate().filter_map(|(index, facts)| {
        let (facts, path) = (facts.filter(|facts| !facts.issued)?, format!("{owner}.tls.certificates[{index}].cert"));
        facts.problem.map(|problem| BuildError::new(path, format!("`{}` is of no use: {problem}", facts.file)))
    });
    problems.collect()
}

/// Certificates that are used for names to which they are not made out. Some clients look at no names, so that this is
/// no error.
pub fn mismatched(tls: Option<&Tls>, owner: &str) -> Vec<BuildError> {
    let certificates = tls.map(Tls::certificates).unwrap_or_default();
    let warnings = certificates.into_iter().enumerate().filter_map(|(index, facts)| {
        let facts = facts?;
        let message = format!("`{}` is used for other names than its own: {}", facts.file, facts.mismatch()?);
        Some(BuildError::new(format!("{owner}.tls.certificates[{index}].names"), message))
    });
    warnings.collect()
}

/// Makes the TLS of a listener ready for clients, and tells of certificates that they will not accept.
pub fn started(mut tls: Tls, owner: &str) -> Result<Arc<Tls>, BuildError> {
    tls.start().map_err(|error| error.under("tls").under(owner))?;
    for error in expired(Some(&tls), owner).into_iter().chain(mismatched(Some(&tls), owner)) {
        tracing::warn!("{error}");
    }
    Ok(Arc::new(tls))
}
