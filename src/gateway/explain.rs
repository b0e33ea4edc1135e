//! Explains how a configuration handles a request, for `forebay match`.
//!
//! The listener, the header checks and the route selection run the same code as in production, on a request that is
//! never sent. No socket is bound, no name is resolved, no filter runs. The same code also explains why a route
//! does not match: with tables of that route alone, one condition after the other.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;

use http::{Method, Uri};
use pingora::http::RequestHeader;
use serde::Serialize;
use serde_json::Value;

use crate::account::Accounts;
use crate::client::challenges::Challenges;
use crate::client::connection::Connection;
use crate::client::descriptors::Shares;
use crate::client::head::{Scanner, inspect};
use crate::client::listener::{Common, Counted, Listener};
use crate::config::route::Match;
use crate::config::{self, Config};
use crate::error::path::{join, key};
use crate::error::{BuildError, Refusal, refusal};
use crate::filter::{Catalog, Verdict};
use crate::metrics::Metrics;
use crate::proxy::epoch::Epoch;
use crate::proxy::exchange::Exchange;
use crate::proxy::forwarded::Additions;
use crate::proxy::generation::Generation;
use crate::proxy::header::Rules;
use crate::proxy::route::{decide, holds, query};
use crate::proxy::routes::table::{Query, Table};

use super::parts::{Base, Fit, Parts, fittings};

/// Connection limits do not matter: no connection is made.
const UNLIMITED: u64 = 1 << 20;

/// A request to explain.
#[derive(Clone, Debug)]
pub struct Question {
    /// Its method.
    pub method: String,
    /// The whole URL. Its port and scheme select the listener.
    pub url: Uri,
    /// Its header fields except `Host`.
    pub fields: Vec<(String, String)>,
    /// The client's address.
    pub client: IpAddr,
    /// The listener, if the URL does not determine it.
    pub listener: Option<String>,
}

impl Question {
    /// The default client address.
    pub const CLIENT: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);
}

/// The explanation.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Explanation {
    /// The listener that receives the request.
    pub listener: Thing,
    /// The result.
    pub outcome: Outcome,
    /// The filters of its route, in order of execution.
    pub filters: Vec<Thing>,
    /// The upstreams of its route.
    pub upstreams: Vec<Thing>,
    /// The values that apply, and their positions.
    pub values: Vec<Held>,
    /// Why other routes do not match.
    pub others: Vec<Other>,
}

/// The result for a request.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "snake_case", tag = "is")]
pub enum Outcome {
    /// A route matches.
    Routed {
        /// The route.
        route: Thing,
    },
    /// Forebay refuses the request.
    Refused {
        /// The reason, as in metrics and logs.
        reason: String,
        /// The status sent to the client.
        status: u16,
    },
    /// Forebay responds itself.
    Answered {
        /// The status.
        status: u16,
        /// The target of a redirect.
        location: Option<String>,
    },
    /// The connection is forwarded unchanged.
    PassedOn {
        /// The destination.
        upstream: String,
    },
}

/// A position in a file.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Written {
    /// The file.
    pub file: String,
    /// The 1-based line.
    pub line: usize,
}

/// A named part of the configuration.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Thing {
    /// Its name.
    pub name: String,
    /// Its path.
    pub path: String,
    /// Its position.
    #[serde(flatten)]
    pub at: Option<Written>,
    /// A remark.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub more: String,
}

/// A value that applies.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Held {
    /// Its path.
    pub path: String,
    /// The value.
    pub value: String,
    /// Its position; `None`: it is a default.
    #[serde(flatten)]
    pub at: Option<Written>,
}

/// A route that does not match.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Other {
    /// Its name.
    pub route: String,
    /// Its position.
    #[serde(flatten)]
    pub at: Option<Written>,
    /// Why it does not match.
    pub why: String,
}

/// Why a request cannot be explained.
#[derive(Debug, thiserror::Error)]
pub enum Unclear {
    /// The request is invalid.
    #[error("{0}")]
    Request(String),
    /// Several listeners could receive it, or none.
    #[error("{0}")]
    Listener(String),
}

/// A configuration that can explain requests.
pub struct Explainer {
    config: Config,
    metrics: Metrics,
    challenges: Arc<Challenges>,
    generation: Generation,
    listeners: Vec<Arc<Listener>>,
}

impl Explainer {
    /// Builds routes, filters and listeners without binding a socket or resolving a name.
    ///
    /// # Errors
    ///
    /// All errors of the configuration.
    pub fn new(catalog: &Catalog, config: Config) -> Result<Explainer, Vec<BuildError>> {
        let metrics = Metrics::new(u64::MAX, Vec::new());
        let base = Base::offline(catalog.clone(), metrics.clone());
        let mut parts = Parts::build(&base, &config, None)?;
        let accounts = Accounts::new(config.client_prefix(), &config.trusted_proxies, config.listeners.len());
        let common = Common::new(Shares::new(UNLIMITED, 0, 0.5, 0.25), accounts);
        let mut listeners = Vec::new();
        for (index, written) in config.listeners.iter().enumerate() {
            let tls = parts.tls[index].take().map(Fit::unstarted);
            let fittings = fittings(written, tls, &parts.upstreams, &metrics);
            let listener = Listener::build(written, 1, fittings, &common, &metrics, None);
            listener.begin();
            listeners.push(Arc::new(listener));
        }
        let generation = Generation {
            epoch: Arc::new(Epoch { number: 1 }),
            routes: parts.routes,
            rules: Rules::of(&config),
            additions: Additions { forwarded: config.forwarded, via: config.via },
        };
        let challenges = base.challenges.clone();
        Ok(Explainer { config, metrics, challenges, generation, listeners })
    }

    /// The name of the matching route; `None`: no route matches.
    ///
    /// # Errors
    ///
    /// The request cannot be explained.
    pub fn route(&self, question: &Question) -> Result<Option<String>, Unclear> {
        let index = self.listener(question)?;
        let decided = self.decide(question, index)?;
        Ok(match decided.0 {
            Outcome::Routed { route } => Some(route.name),
            _ => None,
        })
    }

    /// Explains a request.
    ///
    /// # Errors
    ///
    /// The request cannot be explained.
    pub fn explain(&self, question: &Question) -> Result<Explanation, Unclear> {
        let index = self.listener(question)?;
        let written = &self.config.listeners[index];
        let listener = self.thing(&written.name, format!("listeners[{index}]"), &written.address.0);
        let (outcome, seen) = self.decide(question, index)?;
        let mut explanation = Explanation {
            listener,
            outcome,
            filters: Vec::new(),
            upstreams: Vec::new(),
            values: Vec::new(),
            others: Vec::new(),
        };
        let taken = match &explanation.outcome {
            Outcome::Routed { route } => self.config.routes.iter().position(|one| one.name == route.name),
            Outcome::Refused { reason, .. } if reason == refusal::ROUTE_NO_MATCH.reason => None,
            _ => return Ok(explanation),
        };
        if let Some(taken) = taken {
            self.describe(taken, &mut explanation);
        }
        if let Some((exchange, request)) = seen {
            explanation.others = self.others(taken, &exchange, &request);
        }
        Ok(explanation)
    }

    /// The index of the listener that receives a request: by name, else by port, else the only one with that
    /// protocol.
    fn listener(&self, question: &Question) -> Result<usize, Unclear> {
        let all = &self.config.listeners;
        if let Some(name) = &question.listener {
            let found = all.iter().position(|listener| listener.name == *name);
            return found.ok_or_else(|| Unclear::Listener(format!("there is no listener `{name}`")));
        }
        let https = question.url.scheme_str() == Some("https");
        let speaks =
            |listener: &config::Listener| (listener.tls.is_some() || !listener.passthrough.is_empty()) == https;
        let port = question.url.port_u16().unwrap_or(if https { 443 } else { 80 });
        let of_port = |listener: &config::Listener| listener.address.port() == Some(port);
        let candidates = |wanted: &dyn Fn(&config::Listener) -> bool| -> Vec<usize> {
            (0..all.len()).filter(|&index| wanted(&all[index])).collect()
        };
        let named = candidates(&|listener| of_port(listener) && (speaks(listener) || listener.tcp.is_some()));
        let found = if named.is_empty() && question.url.port_u16().is_none() { candidates(&speaks) } else { named };
        match &found[..] {
            [one] => Ok(*one),
            found => {
                let names: Vec<&str> = all.iter().map(|listener| &*listener.name).collect();
                let which = if found.is_empty() { "no listener" } else { "more than one listener" };
                let scheme = if https { "https" } else { "http" };
                Err(Unclear::Listener(format!(
                    "{which} takes {scheme} at port {port}: name one by --listener; there are: {}",
                    names.join(", ")
                )))
            }
        }
    }

    /// The result for a request, and the request as routes see it, if it gets that far.
    fn decide(
        &self,
        question: &Question,
        index: usize,
    ) -> Result<(Outcome, Option<(Exchange, RequestHeader)>), Unclear> {
        let listener = &self.listeners[index];
        let authority = question.url.authority().ok_or_else(|| {
            Unclear::Request(format!("`{}` is not a URL: write one such as https://host/path", question.url))
        })?;
        if let Some(relay) = &listener.relays.tcp {
            return Ok((Outcome::PassedOn { upstream: relay.upstream.name.to_string() }, None));
        }
        let name = authority.host().to_ascii_lowercase();
        if let Some(relay) = listener.relays.passthrough.find(&name) {
            return Ok((Outcome::PassedOn { upstream: relay.upstream.name.to_string() }, None));
        }
        if let Some(tls) = &listener.tls
            && let Err(why) = tls.table.load().find(Some(&name))
        {
            return Ok((refused(why), None));
        }
        let target = question.url.path_and_query().map_or("/", |target| target.as_str());
        let mut header = format!("{} {target} HTTP/1.1\r\n", question.method);
        if !question.fields.iter().any(|(name, _)| name.eq_ignore_ascii_case("host")) {
            header += &format!("Host: {authority}\r\n");
        }
        for (name, value) in &question.fields {
            header += &format!("{name}: {value}\r\n");
        }
        header += "\r\n";
        let whole = Scanner::default().scan(header.as_bytes(), listener.terms.head).and_then(|end| match end {
            Some(end) if end == header.len() => inspect(header.as_bytes()),
            _ => Err(&refusal::HEADER_MALFORMED),
        });
        if let Err(why) = whole {
            return Ok((refused(why), None));
        }
        let mut request = self.request(question, target, &header)?;
        let peer = SocketAddr::new(question.client, 0);
        let counted = Counted::take(listener).map_err(|why| Unclear::Request(why.reason.to_owned()))?;
        let mut exchange = Exchange::begin(None, &self.metrics);
        exchange.client.connection = Some(Connection::new(counted, Some(peer), None));
        if listener.tls.is_some() {
            exchange.request.scheme = "https";
        }
        let decided = decide(&mut exchange, &self.generation, &self.challenges, &mut request, |_, _| {});
        let outcome = match decided {
            Ok(route) => {
                let index = self.config.routes.iter().position(|one| one.name == route.name).unwrap_or_default();
                let route = self.thing(&route.name, format!("routes[{index}]"), "");
                Outcome::Routed { route }
            }
            Err(Verdict::Refuse(why)) => refused(why.refusal),
            Err(Verdict::Answer(answer)) => {
                let location = answer.headers.iter().find(|(name, _)| *name == http::header::LOCATION);
                let location = location.map(|(_, value)| String::from_utf8_lossy(value.as_bytes()).into_owned());
                Outcome::Answered { status: answer.status.as_u16(), location }
            }
            Err(Verdict::Continue) => refused(&refusal::INTERNAL),
        };
        Ok((outcome, Some((exchange, request))))
    }

    /// The request as parsed from a connection.
    fn request(&self, question: &Question, target: &str, header: &str) -> Result<RequestHeader, Unclear> {
        let wrong = |what: String| Unclear::Request(what);
        let method = Method::from_bytes(question.method.as_bytes())
            .map_err(|_| wrong(format!("`{}` is not a method", question.method)))?;
        let mut request = RequestHeader::build(method, target.as_bytes(), None)
            .map_err(|error| wrong(format!("`{target}` is not a request target: {error}")))?;
        for line in header.lines().skip(1).filter(|line| !line.is_empty()) {
            let (name, value) = line.split_once(':').unwrap_or((line, ""));
            let added = request.append_header(name.to_owned(), value.trim());
            added.map_err(|error| wrong(format!("`{line}` is not a header field: {error}")))?;
        }
        Ok(request)
    }

    fn describe(&self, index: usize, explanation: &mut Explanation) {
        let route = &self.config.routes[index];
        let at = format!("routes[{index}]");
        for (number, filter) in route.filters.iter().enumerate() {
            let Some(decoded) = &filter.decoded else { continue };
            let when = decoded.when.as_ref().map(|when| format!("when {when}")).unwrap_or_default();
            explanation.filters.push(self.thing(decoded.key, format!("{at}.filters[{number}]"), &when));
        }
        let shown = self.config.shown();
        for part in ["deadline", "filter_timeout", "buffering", "client", "retry", "upgrades", "mirror"] {
            self.values(&join(&at, part), shown["routes"][index].get(part), &mut explanation.values);
        }
        let sides = route.upstreams.iter().map(|side| &side.name);
        for name in route.upstream.iter().chain(sides) {
            let path = join("upstreams", &key(name));
            let Some(written) = self.config.upstreams.get(name) else { continue };
            let more =
                format!("{}, {} endpoints written", written.load_balancing.policy.name(), written.endpoints.len());
            explanation.upstreams.push(self.thing(name, path.clone(), &more));
            for part in ["protocol", "timeouts", "limits", "queue", "retry", "health_check"] {
                self.values(&join(&path, part), shown["upstreams"][name].get(part), &mut explanation.values);
            }
        }
    }

    /// All values at a path and below it.
    fn values(&self, path: &str, value: Option<&Value>, values: &mut Vec<Held>) {
        match value {
            None | Some(Value::Null) => {}
            Some(Value::Object(entries)) => {
                entries.iter().for_each(|(name, value)| self.values(&join(path, &key(name)), Some(value), values));
            }
            Some(value) => values.push(Held {
                at: self.written(path),
                path: path.to_owned(),
                value: value.as_str().map_or_else(|| value.to_string(), str::to_owned),
            }),
        }
    }

    /// Why all other routes do not match.
    fn others(&self, taken: Option<usize>, exchange: &Exchange, request: &RequestHeader) -> Vec<Other> {
        let name = taken.map(|taken| &*self.config.routes[taken].name);
        let others = self.config.routes.iter().enumerate().filter(|(index, _)| Some(*index) != taken);
        others
            .map(|(index, route)| Other {
                route: route.name.clone(),
                at: self.written(&format!("routes[{index}]")),
                why: match self.objection(&route.matches, &route.name, exchange, request) {
                    Some(why) => why.to_owned(),
                    None => format!("it would, but {} goes before it", name.unwrap_or("another")),
                },
            })
            .collect()
    }

    /// The first condition of a route that the request does not meet.
    fn objection(
        &self,
        matches: &Match,
        route: &str,
        exchange: &Exchange,
        request: &RequestHeader,
    ) -> Option<&'static str> {
        let matches = self.generation.rules.paths.in_matches(matches).ok()?;
        let query: Query<'_> = query(request);
        let takes = |matches: &Match| {
            let table = Table::build(vec![(matches, ())]).ok();
            table.is_some_and(|table| table.find(&query, |(), when| holds(exchange, route, request, when)).is_some())
        };
        let mut so_far = Match { hosts: matches.hosts.clone(), ..Match::default() };
        if !takes(&so_far) {
            return Some("another host");
        }
        so_far.path = matches.path.clone();
        if !takes(&so_far) {
            return Some("another path");
        }
        so_far.methods = matches.methods.clone();
        if !takes(&so_far) {
            return Some("another method");
        }
        so_far.headers = matches.headers.clone();
        if !takes(&so_far) {
            return Some("its headers are not met");
        }
        so_far.queries = matches.queries.clone();
        if !takes(&so_far) {
            return Some("its query is not met");
        }
        (!takes(&matches)).then_some("its `when` does not hold")
    }

    fn thing(&self, name: &str, path: String, more: &str) -> Thing {
        Thing { name: name.to_owned(), at: self.written(&path), path, more: more.to_owned() }
    }

    fn written(&self, path: &str) -> Option<Written> {
        self.config.place(path).map(|(file, line)| Written { file: file.to_owned(), line })
    }
}

fn refused(why: &'static Refusal) -> Outcome {
    Outcome::Refused { reason: why.reason.to_owned(), status: why.status }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FILE: &str = "
listeners:
  - { name: web, address: 127.0.0.1:8080 }
  - { name: old, address: 127.0.0.1:8081, redirect_https: true }
upstreams: { app: { endpoints: [ { address: 127.0.0.1:1 } ], timeouts: { connect: 3s } } }
routes:
  - { name: shop, match: { hosts: [shop.test], path: { prefix: /cart }, methods: [POST] }, upstream: app }
  - name: admin
    match: { hosts: [shop.test], headers: { x-admin: { present: true } } }
    filters: [ { access: { allow: [127.0.0.0/8] } } ]
    upstream: app
  - { name: rest, match: { hosts: [shop.test], when: 'request.path != \"/x\"' }, upstream: app }
";

    fn explainer() -> Explainer {
        let config =
            Config::parse("test.yaml", FILE, Catalog::builtin().kinds()).unwrap_or_else(|report| panic!("{report}"));
        Explainer::new(&Catalog::builtin(), config).unwrap_or_else(|errors| panic!("{errors:?}"))
    }

    fn asked(method: &str, url: &str, fields: &[(&str, &str)]) -> Question {
        let fields = fields.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        let (method, url) = (method.to_owned(), url.parse().expect("a URL"));
        Question { method, url, fields, client: Question::CLIENT, listener: None }
    }

    #[test]
    fn it_says_which_route_takes_a_request_and_why_the_others_do_not() {
        let explained =
            explainer().explain(&asked("GET", "http://shop.test:8080/cart", &[("X-Admin", "1")])).expect("clear");
        let Outcome::Routed { route } = &explained.outcome else { panic!("{explained:?}") };
        let at = |line| Some(Written { file: "test.yaml".to_owned(), line });
        assert_eq!((&*route.name, &route.at), ("admin", &at(8)));
        assert_eq!((&*explained.listener.name, &explained.listener.at), ("web", &at(3)));
        assert_eq!(explained.filters[0].name, "access");
        assert_eq!(explained.upstreams[0].name, "app");
        let others: Vec<_> = explained.others.iter().map(|other| (&*other.route, &*other.why)).collect();
        assert_eq!(others, [("shop", "another method"), ("rest", "it would, but admin goes before it")]);
        let value = |path: &str| explained.values.iter().find(|held| held.path == path).expect("a value");
        assert_eq!(
            (&*value("upstreams.app.timeouts.connect").value, &value("upstreams.app.timeouts.connect").at),
            ("3s", &at(5))
        );
        assert_eq!(value("upstreams.app.timeouts.wait").at, None, "a default");
    }

    #[test]
    fn every_condition_is_an_objection() {
        let explainer = explainer();
        let why = |method: &str, url: &str, fields: &[(&str, &str)], route: &str| {
            let explained = explainer.explain(&asked(method, url, fields)).expect("clear");
            explained.others.into_iter().find(|other| other.route == route).expect("another route").why
        };
        assert_eq!(why("POST", "http://other.test:8080/cart", &[], "shop"), "another host");
        assert_eq!(why("POST", "http://shop.test:8080/", &[], "shop"), "another path");
        assert_eq!(why("GET", "http://shop.test:8080/", &[], "admin"), "its headers are not met");
        assert_eq!(why("GET", "http://shop.test:8080/x", &[], "rest"), "its `when` does not hold");
    }

    #[test]
    fn what_never_comes_to_a_route_is_told_as_well() {
        let explainer = explainer();
        let outcome = |method: &str, url: &str, fields: &[(&str, &str)]| {
            explainer.explain(&asked(method, url, fields)).expect("clear").outcome
        };
        let refused = |reason: &str, status| Outcome::Refused { reason: reason.to_owned(), status };
        assert_eq!(outcome("GET", "http://other.test:8080/", &[]), refused("route.no_match", 404));
        assert_eq!(outcome("TRACE", "http://shop.test:8080/", &[]), refused("header.method", 405));
        assert!(matches!(
            outcome("GET", "http://shop.test:8080/", &[("Content-Length", "1, 2")]),
            Outcome::Refused { .. }
        ));
        let location = Some("https://shop.test/a?b".to_owned());
        assert_eq!(outcome("GET", "http://shop.test:8081/a?b", &[]), Outcome::Answered { status: 308, location });
        assert!(explainer.explain(&asked("GET", "https://shop.test/", &[])).is_err(), "no listener takes https");
        assert!(explainer.explain(&asked("GET", "http://shop.test:9/", &[])).is_err(), "no listener is there");
    }
}
