//! Checks routes: what they match, where they lead, and whether a request can reach them.

use std::collections::{BTreeMap, HashMap};
use std::hash::Hash;
use std::net::Ipv6Addr;

use http::{HeaderName, Method};

use super::{Check, FirstPaths, value};
use crate::config::address::is_label;
use crate::config::explain::expected;
use crate::config::listener::Listener;
use crate::config::report::{Finding, FindingLocation};
use crate::config::route::retry::{ATTEMPTS_MAX, Backoff, Retry};
use crate::config::route::{BufferMode, Client, GrpcWeb, Match, PathMatch, Route, ValueMatch};
use crate::config::units::{ByteRate, Count, Size};
use crate::config::upstream::Protocol;
use crate::error::path::{self, join};

/// At most this many unknown upstream names get a suggestion: comparing thousands with thousands is slow.
const COMPARED_MAX: usize = 20;

impl Check<'_> {
    /// Whether routes are required. They are not on listeners that only forward connections, nor on those that
    /// redirect all clients to HTTPS.
    fn needs_routes(&self) -> bool {
        let passes_on = |listener: &Listener| {
            listener.tcp.is_some() || (listener.tls.is_none() && !listener.passthrough.is_empty())
        };
        let takes_requests = |listener: &Option<Listener>| {
            listener.as_ref().is_none_or(|listener| !passes_on(listener) && listener.redirect_https.is_none())
        };
        let listeners = self.parts.listeners.as_deref().unwrap_or_default();
        listeners.is_empty() || listeners.iter().any(takes_requests)
    }

    pub(super) fn routes(&mut self) {
        let title = "there are no routes, so every request would be refused";
        let Some(routes) = &self.parts.routes else {
            if self.needs_routes() && !self.parts.broken.at("routes") {
                let finding = Finding::error(FindingLocation::File, title);
                self.findings.push(finding.help("add `routes: [ { name: all, upstream: app } ]`"));
            }
            return;
        };
        if routes.is_empty() && self.needs_routes() {
            self.wrong(Finding::error(value("routes"), title).label("expected at least one"));
        }
        let mut names = FirstPaths::default();
        for (index, route) in routes.iter().enumerate() {
            let Some(route) = route else { continue };
            let path = format!("routes[{index}]");
            self.name(&route.name, value(format!("{path}.name")));
            if let Some(first) = names.first(&route.name, format!("{path}.name")) {
                self.twice(format!("{path}.name"), first, format!("two routes have the name `{}`", route.name));
            }
            self.destination(route, &path);
            self.matches(&route.matches, &format!("{path}.match"));
            self.buffering(route, &format!("{path}.buffering"));
            self.client(&route.client, &format!("{path}.client"));
            self.retry(&route.retry, &format!("{path}.retry"));
            self.deadline(route, &path);
            self.time(&format!("{path}.filter_timeout"), route.filter_timeout);
            self.mirror(route, &format!("{path}.mirror"));
        }
    }

    fn mirror(&mut self, route: &Route, path: &str) {
        let Some(mirror) = &route.mirror else { return };
        self.upstream_exists(&mirror.upstream, format!("{path}.upstream"));
        self.count(&format!("{path}.in_flight"), mirror.in_flight, 1, u32::MAX.into());
        if route.upstream.as_ref() == Some(&mirror.upstream) {
            let finding =
                Finding::warning(value(format!("{path}.upstream")), "requests and their copies go to one upstream");
            self.wrong(finding.label("it gets each of them twice"));
        }
    }

    fn deadline(&mut self, route: &Route, path: &str) {
        let (whole, per_try) = (format!("{path}.deadline"), format!("{path}.retry.per_try_timeout"));
        route.deadline.iter().for_each(|&time| self.time(&whole, time));
        route.retry.per_try_timeout.iter().for_each(|&time| self.time(&per_try, time));
        if let (Some(deadline), Some(timeout)) = (route.deadline, route.retry.per_try_timeout)
            && timeout >= deadline
            && !deadline.0.is_zero()
        {
            let finding = Finding::warning(value(per_try), "an attempt never takes as long as that");
            self.wrong(finding.label("not shorter than `deadline`").also(value(whole), "over before"));
        }
    }

    fn retry(&mut self, retry: &Retry, path: &str) {
        self.count(&format!("{path}.attempts"), retry.attempts, 1, ATTEMPTS_MAX);
        for (index, on) in retry.on.iter().enumerate() {
            if let Some(first) = retry.on[..index].iter().position(|earlier| earlier == on) {
                let list = format!("{path}.on");
                let (again, first) = (self.item(&list, index), self.item(&list, first));
                self.twice(again, first, format!("`{on}` is listed twice"));
            }
        }
        let Backoff { base, max } = retry.backoff;
        if base > max {
            let written = ["base", "max"].map(|key| format!("{path}.backoff.{key}"));
            let at = written.iter().find(|path| self.is_written(path)).unwrap_or(&written[0]);
            let finding = Finding::error(value(at), "`base` is longer than `max`");
            self.wrong(finding.label(format!("expected a `base` ({base}) of no more than `max` ({max})")));
        }
        self.count(&format!("{path}.budget_least"), retry.budget_least, 0, u64::MAX);
        let only_once = retry.attempts == Count(1);
        for key in ["on", "backoff", "budget", "budget_least", "same_endpoint"].map(|key| format!("{path}.{key}")) {
            if only_once && self.is_written(&key) {
                let finding =
                    Finding::warning(FindingLocation::Key(key), "there is no second attempt").label("never used");
                self.wrong(finding.also(value(format!("{path}.attempts")), "the first is the only one"));
            }
        }
    }

    fn buffering(&mut self, route: &Route, path: &str) {
        let (request, response) = (&route.buffering.request, &route.buffering.response);
        let directions = [
            ("request", request.mode, request.memory, request.disk),
            ("response", response.mode, response.memory, response.disk),
        ];
        for (direction, mode, memory, disk) in directions {
            let path = format!("{path}.{direction}");
            if mode == BufferMode::Full && memory == Size(0) && disk == Size(0) {
                let finding = Finding::error(value(format!("{path}.mode")), "buffering needs memory or disk space")
                    .label("`memory` and `disk` are both 0B");
                self.wrong(finding.help("make one of them larger, or write `mode: stream`"));
            }
            let Some(resources) = self.parts.rest.as_ref().map(|rest| &rest.resources) else { continue };
            self.fits(&format!("{path}.memory"), memory, "resources.memory", resources.memory);
            self.fits(&format!("{path}.disk"), disk, "resources.disk", resources.disk);
        }
        if request.max_body == Size(0) {
            let path = format!("{path}.request.max_body");
            let finding = Finding::error(value(&path), format!("`{path}` refuses every request with a body"));
            self.wrong(
                finding
                    .label("expected more than `0B`")
                    .help("if that is meant, take only methods without one: `match: { methods: [GET, HEAD] }`"),
            );
        }
    }

    /// The limit of one body must not exceed the total. A default above the total is lowered silently when the
    /// gateway is built, because the operator did not write it.
    fn fits(&mut self, path: &str, part: Size, whole: &str, limit: Size) {
        if part <= limit || !self.is_written(path) || self.parts.broken.within("resources") {
            return;
        }
        let finding = Finding::error(value(path), format!("`{path}` can never be reached"))
            .label(format!("expected no more than `{whole}`"));
        self.wrong(match self.is_written(whole) {
            true => finding.also(value(whole), "all bodies together end here"),
            false => finding.help(format!("`{whole}` is {limit} unless it is written: raise it, or lower this")),
        });
    }

    fn client(&mut self, client: &Client, path: &str) {
        let Client { body_total, body_idle, write_idle, half_close: _, min_rate, limit_rate } = client;
        self.time(&format!("{path}.body_total"), *body_total);
        self.time(&format!("{path}.body_idle"), *body_idle);
        self.time(&format!("{path}.write_idle"), *write_idle);
        let (total, idle) = (format!("{path}.body_total"), format!("{path}.body_idle"));
        if body_total < body_idle && !body_total.0.is_zero() && self.is_written(&idle) {
            let finding =
                Finding::warning(value(&idle), format!("`{idle}` is never met")).label("longer than `body_total`");
            self.wrong(match self.is_written(&total) {
                true => finding.also(value(&total), "over before"),
                false => finding.help(format!("`body_total` is {body_total} unless it is written")),
            });
        }
        let slowest = min_rate.read.max(min_rate.write);
        if slowest > ByteRate(0) {
            self.time(&format!("{path}.min_rate.grace"), min_rate.grace);
        }
        if limit_rate.as_ref().is_some_and(|limit| limit.rate == ByteRate(0)) {
            let path = format!("{path}.limit_rate.rate");
            let finding = Finding::error(value(&path), format!("`{path}` lets no answer through"));
            self.wrong(finding.label("expected more than `0B/s`").help("for no limit, leave `limit_rate` out"));
        }
    }

    /// The destination of a route: one upstream, several, or a filter that responds.
    fn destination(&mut self, route: &Route, path: &str) {
        let answers = |key: &&str| self.kinds.iter().any(|kind| kind.answers && kind.key == *key);
        let filters = route.filters.iter().filter_map(|filter| filter.decoded.as_ref());
        let always = filters.filter(|decoded| decoded.when.is_none());
        let answering = always.map(|decoded| decoded.key).find(answers);
        let (one, several) = (format!("{path}.upstream"), format!("{path}.upstreams"));
        match (&route.upstream, route.upstreams.is_empty()) {
            (Some(_), false) => {
                let finding = Finding::error(
                    FindingLocation::Key(several.clone()),
                    "a route has either `upstream` or `upstreams`",
                );
                self.wrong(finding.label("both are written").also(FindingLocation::Key(one.clone()), "the other one"));
            }
            (None, true) if answering.is_none() => self.leads_nowhere(path),
            _ => {}
        }
        if let Some(name) = &route.upstream {
            self.upstream_exists(name, one.clone());
        }
        let (mut names, mut cookies) = (FirstPaths::default(), FirstPaths::default());
        for (index, side) in route.upstreams.iter().enumerate() {
            let at = format!("{}.name", self.item(&several, index));
            if let Some(cookie) = self.sticky_cookie_of(&side.name)
                && let Some(first) = cookies.first(&cookie, at.clone())
            {
                let title = format!("these upstreams would overwrite each other's cookie `{cookie}`");
                let finding = Finding::error(value(&at), title).also(value(first), "the other one");
                self.wrong(finding.label("expected another `load_balancing.sticky.cookie.name`"));
            }
            self.upstream_exists(&side.name, at.clone());
            if let Some(first) = names.first(&side.name, at.clone()) {
                self.twice(at, first, format!("the upstream `{}` is listed twice", side.name));
            }
        }
        let key = if route.upstream.is_some() { "upstream" } else { "upstreams" };
        if let Some(filter) = answering.filter(|_| route.upstream.is_some() || !route.upstreams.is_empty()) {
            let title = format!("the filter `{filter}` answers every request of this route");
            self.wrong(Finding::warning(FindingLocation::Key(format!("{path}.{key}")), title).label("never asked"));
        }
        if route.grpc_web == GrpcWeb::Bridge {
            let mut asked = route.upstream.iter().chain(route.upstreams.iter().map(|side| &side.name));
            let over_http1 = asked.find(|&name| {
                let upstream = self.parts.upstreams.get(name).and_then(Option::as_ref);
                upstream.is_some_and(|upstream| upstream.protocol == Protocol::Http1)
            });
            if let Some(name) = over_http1 {
                let title = format!("gRPC is spoken over HTTP/2 only, and the upstream `{name}` is asked over HTTP/1");
                let finding = Finding::error(FindingLocation::Key(format!("{path}.grpc_web")), title);
                self.wrong(finding.label("expected an upstream with `protocol: h2` or `h2c`"));
            }
        }
        for key in ["buffering", "retry", "deadline", "grpc", "grpc_web", "mirror", "upgrades"]
            .map(|key| format!("{path}.{key}"))
        {
            if let Some(filter) = answering.filter(|_| self.is_written(&key)) {
                let title = format!("the filter `{filter}` answers every request of this route");
                self.wrong(
                    Finding::warning(FindingLocation::Key(key), title).label("never used: this is about upstreams"),
                );
            }
        }
    }

    /// The name of the stickiness cookie of an upstream.
    fn sticky_cookie_of(&self, upstream: &str) -> Option<String> {
        let upstream = self.parts.upstreams.get(upstream)?.as_ref()?;
        upstream.load_balancing.sticky.as_ref().map(|sticky| sticky.cookie.name.clone())
    }

    fn leads_nowhere(&mut self, path: &str) {
        let broken = |key: &str| self.parts.broken.within(&format!("{path}.{key}"));
        if ["upstream", "upstreams", "filters"].into_iter().any(broken) {
            return;
        }
        let answering: Vec<&str> = self.kinds.iter().filter(|kind| kind.answers).map(|kind| kind.key).collect();
        let mut finding =
            Finding::error(value(path), "the route has no destination").label("expected `upstream` or `upstreams`");
        if !answering.is_empty() {
            finding = finding.help(format!("or a filter that answers: `{}`", answering.join("`, `")));
        }
        self.wrong(finding);
    }

    pub(super) fn upstream_exists(&mut self, name: &str, path: String) {
        let upstreams = &self.parts.upstreams;
        if upstreams.contains_key(name) || self.parts.broken.at("upstreams") {
            return;
        }
        self.compared += 1;
        let compared = if self.compared > COMPARED_MAX { 0 } else { usize::MAX };
        let label = match upstreams.len() {
            0 => "there are no upstreams at all".to_owned(),
            1..=8 => expected(&upstreams.keys().map(String::as_str).collect::<Vec<_>>()),
            _ => "no upstream has this name".to_owned(),
        };
        let finding = Finding::error(value(path), format!("unknown upstream `{name}`")).label(label);
        self.wrong(finding.nearest(name, upstreams.keys().take(compared).map(String::as_str)));
    }

    fn matches(&mut self, matches: &Match, path: &str) {
        for (index, host) in matches.hosts.iter().enumerate() {
            if let Err(why) = host_pattern(host) {
                let finding = Finding::error(
                    value(self.item(&format!("{path}.hosts"), index)),
                    format!("`{host}` is not a host"),
                );
                self.wrong(finding.label(why));
            }
        }
        match &matches.path {
            Some(PathMatch::Exact(text)) => self.request_path(text, &format!("{path}.path.exact")),
            Some(PathMatch::Prefix(text)) => self.request_path(text, &format!("{path}.path.prefix")),
            Some(PathMatch::Regex(pattern)) => self.regex(pattern, &format!("{path}.path.regex")),
            None => {}
        }
        for (index, method) in matches.methods.iter().enumerate() {
            self.method(method, &self.item(&format!("{path}.methods"), index));
        }
        let mut names = FirstPaths::default();
        for (name, condition) in &matches.headers {
            let at = join(&format!("{path}.headers"), &path::key(name));
            if HeaderName::from_bytes(name.as_bytes()).is_err() {
                let finding =
                    Finding::error(FindingLocation::Key(at.clone()), format!("`{name}` is not the name of a header"));
                self.wrong(finding.label("expected letters, digits and `-`"));
            }
            if let Some(first) = names.first(&name.to_ascii_lowercase(), at.clone()) {
                let finding =
                    Finding::error(FindingLocation::Key(at.clone()), format!("the header `{name}` is listed twice"));
                self.wrong(
                    finding
                        .label("again here")
                        .also(FindingLocation::Key(first), "first here; case makes no difference"),
                );
            }
            self.condition(condition, &at);
        }
        for (name, condition) in &matches.queries {
            self.condition(condition, &join(&format!("{path}.queries"), &path::key(name)));
        }
    }

    fn condition(&mut self, condition: &ValueMatch, path: &str) {
        if let ValueMatch::Regex { regex } = condition {
            self.regex(regex, &format!("{path}.regex"));
        }
    }

    fn request_path(&mut self, text: &str, path: &str) {
        if !text.starts_with('/') {
            let finding = Finding::error(value(path), format!("`{text}` is not a path"));
            self.wrong(finding.label("a path begins with `/`"));
        } else if text.contains(['?', '#']) {
            let finding = Finding::error(value(path), format!("`{text}` is more than a path"));
            self.wrong(finding.label("a path ends before `?` and `#`").help("match query arguments by `queries:`"));
        }
    }

    fn regex(&mut self, pattern: &str, path: &str) {
        let Err(error) = regex::Regex::new(pattern) else { return };
        // The last line states the problem; the lines before draw the pattern, which the report shows anyway.
        let error = error.to_string();
        let why = error.lines().last().unwrap_or_default().trim_start_matches("error: ");
        self.wrong(Finding::error(value(path), format!("`{pattern}` is not a regular expression")).label(why));
    }

    fn method(&mut self, method: &str, path: &str) {
        let finding = |title: String| Finding::error(value(path), title);
        let standard = |text: &str| {
            ["GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH", "CONNECT", "TRACE"].contains(&text)
        };
        let capitals = method.to_ascii_uppercase();
        let finding = if matches!(method, "CONNECT" | "TRACE") {
            finding(format!("`{method}` is always refused")).label("a route never sees it: take it out")
        } else if Method::from_bytes(method.as_bytes()).is_err() {
            finding(format!("`{method}` is not a method")).label("expected a word such as `GET`")
        } else if method != capitals && standard(&capitals) {
            finding(format!("`{method}` is not a method that clients send"))
                .label(format!("write it in capitals: `{capitals}`"))
        } else {
            return;
        };
        self.wrong(finding);
    }

    /// Finds routes that never match because an earlier route has the same rank for all their requests.
    pub(super) fn unreachable_routes(&mut self) {
        let mut taken: HashMap<Claim<'_>, usize> = HashMap::new();
        for (index, route) in self.parts.routes.iter().flatten().enumerate() {
            let Some(route) = route else { continue };
            let path = format!("routes[{index}]");
            if self.parts.broken.within(&format!("{path}.match")) {
                continue;
            }
            let claims = Claim::of(&route.matches);
            let owners: Option<Vec<usize>> = claims.iter().map(|claim| taken.get(claim).copied()).collect();
            if let Some(first) = owners.as_deref().and_then(|owners| owners.iter().copied().min()) {
                let first_name =
                    self.parts.routes.iter().flatten().nth(first).and_then(Option::as_ref).map(|route| &route.name);
                let title = format!("no request reaches the route `{}`", route.name);
                let label = format!("its requests go to `{}`", first_name.map_or("an earlier one", String::as_str));
                let finding = Finding::error(value(format!("{path}.name")), title)
                    .label(label)
                    .also(value(format!("routes[{first}].name")), "this one matches the same and comes first");
                self.wrong(finding.help("take one of them out, or make what the later one matches more specific"));
            }
            for claim in claims {
                taken.entry(claim).or_insert(index);
            }
        }
    }
}

/// The key of a match. Two routes with an equal key have the same rank for the same requests.
#[derive(PartialEq, Eq, Hash)]
struct Claim<'r> {
    host: Option<&'r str>,
    /// `None`: any path.
    path: Option<PathMatch>,
    method: Option<&'r str>,
    headers: BTreeMap<String, &'r ValueMatch>,
    queries: &'r BTreeMap<String, ValueMatch>,
    when: Option<&'r str>,
}

impl<'r> Claim<'r> {
    fn of(matches: &'r Match) -> Vec<Claim<'r>> {
        fn each(list: &[String]) -> Vec<Option<&str>> {
            if list.is_empty() { vec![None] } else { list.iter().map(|text| Some(text.as_str())).collect() }
        }
        let path = match &matches.path {
            Some(PathMatch::Prefix(prefix)) => match prefix.trim_end_matches('/') {
                "" => None,
                prefix => Some(PathMatch::Prefix(prefix.to_owned())),
            },
            other => other.clone(),
        };
        let claim = |host, method| Claim {
            host,
            path: path.clone(),
            method,
            headers: matches.headers.iter().map(|(name, condition)| (name.to_ascii_lowercase(), condition)).collect(),
            queries: &matches.queries,
            when: matches.when.as_deref(),
        };
        let methods = each(&matches.methods);
        each(&matches.hosts)
            .into_iter()
            .flat_map(|host| methods.iter().map(move |&method| (host, method)))
            .map(|(host, method)| claim(host, method))
            .collect()
    }
}

fn host_pattern(host: &str) -> Result<(), &'static str> {
    let name = host.strip_prefix("*.").unwrap_or(host);
    if let Some(v6) = name.strip_prefix('[').and_then(|name| name.strip_suffix(']')) {
        return if v6.parse::<Ipv6Addr>().is_ok() && host == name {
            Ok(())
        } else {
            Err("this is not an IPv6 address")
        };
    }
    match name {
        "*" => Err("to match any host, leave `hosts` out"),
        _ if name.contains('*') => Err("`*` is allowed at the beginning only, as in `*.example.com`"),
        _ if name.contains("/") => Err("write the name only, without scheme and path"),
        _ if name.contains(':') => Err("write it without a port: a listener chooses the port"),
        _ if name.ends_with('.') => Err("write it without the dot at its end"),
        _ if name.len() <= 253 && name.split('.').all(is_label) => Ok(()),
        _ => Err("expected a name such as `shop.example.com` or `*.example.com`"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_are_names_or_begin_with_a_star() {
        for host in ["shop.example.com", "*.example.com", "localhost", "10.0.0.1", "[::1]", "a_b"] {
            assert_eq!(host_pattern(host), Ok(()), "{host}");
        }
        for host in
            ["*", "a.*.com", "*a.com", "a.com:80", "http://a.com", "a..b", "a.com.", "", "[x]", "*.[::1]", "a b"]
        {
            assert!(host_pattern(host).is_err(), "{host}");
        }
    }
}
