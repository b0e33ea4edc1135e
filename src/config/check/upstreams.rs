//! Checks upstreams: their endpoints, connections, health checks and limits.

use std::collections::HashSet;
use std::net::IpAddr;
use std::time::Duration;

use http::uri::{Authority, PathAndQuery};

use super::{CHECKS_AT_ONCE_MAX, Check, FirstPaths, asked, called, value};
use crate::config::address::is_label;
use crate::config::explain::halves;
use crate::config::key::Key;
use crate::config::report::{Finding, FindingLocation};
use crate::config::route::Route;
use crate::config::units::{Count, Size};
use crate::config::upstream::health::{HealthCheck, HttpCheck};
use crate::config::upstream::outlier::OutlierDetection;
use crate::config::upstream::sticky::{Secrets, Sticky, StickyCookie};
use crate::config::upstream::{CircuitBreaker, Dns, FileSource, LoadBalancing, Protocol, Upstream};
use crate::error::path::{self, join};

/// More failures in a row than this take hours.
const STREAK_MAX: u64 = 10_000;
/// A queued exchange keeps its memory, and no client waits behind a million others.
const QUEUE_MAX: u64 = 1_000_000;
/// More would be regular traffic, not a trial.
const PROBES_MAX: u64 = 1000;
/// An HTTP/2 frame has up to 16 KiB (RFC 9113 §4.2). The upper limit is about a hundredth of the 2 GiB that a
/// connection can have in flight.
const H2_WINDOW_LEAST: u64 = 16 << 10;
const H2_WINDOW_MOST: u64 = 16 << 20;

impl<'a> Check<'a> {
    pub(super) fn upstreams(&mut self) {
        let used = self.used_upstreams();
        for (name, upstream) in &self.parts.upstreams {
            let path = join("upstreams", &path::key(name));
            self.name(name, FindingLocation::Key(path.clone()));
            if used.as_ref().is_some_and(|used| !used.contains(name.as_str())) {
                let finding = Finding::warning(
                    FindingLocation::Key(path.clone()),
                    format!("no route uses the upstream `{name}`"),
                );
                self.wrong(finding.label("never asked"));
            }
            if let Some(upstream) = upstream {
                self.upstream(upstream, &path);
            }
        }
    }

    /// The upstreams that routes use; `None` if a route has errors.
    fn used_upstreams(&self) -> Option<HashSet<&'a str>> {
        let written = self.parts.routes.as_ref().filter(|routes| !routes.is_empty())?;
        let routes: Option<Vec<&Route>> = written.iter().map(Option::as_ref).collect();
        let listeners = self.parts.listeners.iter().flatten().flatten();
        let passed_on = listeners.flat_map(|listener| {
            let names = listener.passthrough.iter().map(|passthrough| passthrough.upstream.as_str());
            names.chain(listener.tcp.as_ref().map(|tcp| tcp.upstream.as_str()))
        });
        let used: HashSet<&str> = routes?.into_iter().flat_map(asked).chain(passed_on).collect();
        let all_exist = used.iter().all(|name| self.parts.upstreams.contains_key(*name));
        let filters = written.iter().flatten().flat_map(|route| &route.filters);
        let called = filters.flat_map(|entry| called(&entry.written));
        (all_exist && !self.parts.broken.within("routes")).then(|| used.into_iter().chain(called).collect())
    }

    fn upstream(&mut self, upstream: &Upstream, path: &str) {
        self.sources(upstream, path);
        let mut addresses = FirstPaths::default();
        for (index, endpoint) in upstream.endpoints.iter().enumerate() {
            let at = format!("{}.address", self.item(&format!("{path}.endpoints"), index));
            if endpoint.has_port_0() {
                let finding = Finding::error(value(&at), "nothing can be reached at port 0");
                self.wrong(finding.label("expected a port from 1 to 65535"));
            }
            if let Some(first) = addresses.first_address(&endpoint.address, at.clone()) {
                let title = format!("the endpoint `{}` is listed twice", endpoint.address);
                let finding = Finding::error(value(at), title).label("again here").also(value(first), "first here");
                self.wrong(finding.help("to give it more requests, give it a greater `weight`"));
            }
            if endpoint.has_two_tiers() {
                let at = self.item(&format!("{path}.endpoints"), index);
                let finding =
                    Finding::error(FindingLocation::Key(format!("{at}.backup")), "an endpoint is in one tier");
                let other = FindingLocation::Key(format!("{at}.priority"));
                self.wrong(finding.label("this is `priority: 1`").also(other, "and this another one"));
            }
        }
        self.load_balancing(&upstream.load_balancing, &format!("{path}.load_balancing"));
        if let Some(written) = &upstream.health_check {
            self.health_check(written, upstream.protocol, &format!("{path}.health_check"));
        }
        self.transport(upstream, path);
        self.outlier_detection(&upstream.outlier_detection, &format!("{path}.outlier_detection"));
        self.time(&format!("{path}.timeouts.connect"), upstream.timeouts.connect);
        self.time(&format!("{path}.timeouts.send"), upstream.timeouts.send);
        self.time(&format!("{path}.timeouts.wait"), upstream.timeouts.wait);
        self.time(&format!("{path}.timeouts.receive"), upstream.timeouts.receive);
        self.limits(upstream, path);
        if let Some(breaker) = &upstream.circuit_breaker {
            self.circuit_breaker(breaker, &format!("{path}.circuit_breaker"));
        }
    }

    fn limits(&mut self, upstream: &Upstream, path: &str) {
        let (limits, at) = (&upstream.limits, format!("{path}.limits"));
        let each = &limits.endpoint;
        for (key, limit, whole) in [
            ("requests", limits.requests, None),
            ("connections", limits.connections, None),
            ("endpoint.requests", each.requests, Some(("requests", limits.requests))),
            ("endpoint.connections", each.connections, Some(("connections", limits.connections))),
        ] {
            let key = format!("{at}.{key}");
            self.count(&key, limit, 1, u64::MAX);
            if let Some((whole, most)) = whole
                && limit > most
                && most > Count(0)
                && self.is_written(&key)
            {
                let whole = format!("{at}.{whole}");
                let finding = Finding::warning(value(&key), format!("`{key}` is never met"));
                self.wrong(finding.label("more than all endpoints together").also(value(whole), "their limit"));
            }
        }
        self.count(&format!("{path}.queue.size"), upstream.queue.size, 0, QUEUE_MAX);
        self.time(&format!("{path}.queue.timeout"), upstream.queue.timeout);
    }

    fn circuit_breaker(&mut self, breaker: &CircuitBreaker, path: &str) {
        let CircuitBreaker { failures, window, min_requests, consecutive, open, max_open, probes, probe_client: _ } =
            breaker;
        if failures.ratio() <= 0.0 {
            let finding = Finding::error(value(format!("{path}.failures")), "this breaker opens without any failure");
            self.wrong(finding.label("expected more than `0%`"));
        }
        self.time(&format!("{path}.window"), *window);
        self.count(&format!("{path}.min_requests"), *min_requests, 1, u64::MAX);
        self.count(&format!("{path}.consecutive"), *consecutive, 1, u64::MAX);
        if (*min_requests, *consecutive) == (Count::UNLIMITED, Count::UNLIMITED) {
            let finding = Finding::error(value(format!("{path}.min_requests")), "this breaker never opens");
            self.wrong(finding.label("`consecutive` is `unlimited`, too").help("lower one of them, or leave it out"));
        }
        self.time(&format!("{path}.open"), *open);
        self.count(&format!("{path}.probes"), *probes, 1, PROBES_MAX);
        let (shortest, longest) = (format!("{path}.open"), format!("{path}.max_open"));
        if max_open < open {
            let location = if self.is_written(&longest) { &longest } else { &shortest };
            let finding = Finding::error(value(location), "`open` is longer than `max_open`");
            self.wrong(finding.label(format!("expected an `open` ({open}) of no more than `max_open` ({max_open})")));
        }
    }

    /// An upstream has exactly one source of endpoints.
    fn sources(&mut self, upstream: &Upstream, path: &str) {
        let at = |key: &str| format!("{path}.{key}");
        let written: Vec<&str> =
            ["endpoints", "dns", "file"].into_iter().filter(|key| self.is_written(&at(key))).collect();
        if let [first, others @ ..] = &written[..] {
            for other in others {
                let title = "an upstream has one source of endpoints";
                let finding = Finding::error(FindingLocation::Key(at(other)), title).label("here as well");
                self.wrong(finding.also(FindingLocation::Key(at(first)), "the other one"));
            }
        }
        let endpoints = at("endpoints");
        // Sources that could not be decoded already have an error.
        let is_broken = ["endpoints", "dns", "file"].into_iter().any(|key| self.parts.broken.within(&at(key)));
        if upstream.endpoints.is_empty() && written.iter().all(|key| *key == "endpoints") && !is_broken {
            let location = if written.is_empty() { FindingLocation::Key(path.to_owned()) } else { value(endpoints) };
            let finding = Finding::error(location, "an upstream needs at least one endpoint");
            self.wrong(finding.label("expected `endpoints: [ { address: host:port } ]`, `dns` or `file`"));
        }
        if let Some(dns) = &upstream.dns {
            self.dns(dns, &at("dns"));
        }
        if let Some(file) = &upstream.file {
            let FileSource { path: file, refresh, max_size } = file;
            if file.is_empty() {
                let finding = Finding::error(value(at("file.path")), "the path of a file is missing");
                self.wrong(finding.label("expected one such as `/etc/forebay/shop.yaml`"));
            }
            self.time(&at("file.refresh"), *refresh);
            if *max_size == Size(0) {
                let finding = Finding::error(value(at("file.max_size")), "no file is small enough");
                self.wrong(finding.label("expected more than `0B`"));
            }
        }
    }

    fn dns(&mut self, dns: &Dns, path: &str) {
        let at = |key: &str| format!("{path}.{key}");
        match (&dns.name, dns.port, &dns.srv) {
            (Some(_), Some(_), None) | (None, None, Some(_)) => {}
            (None, None, None) if self.parts.broken.within(path) => {}
            (_, _, Some(_)) => {
                let other = if dns.name.is_some() { "name" } else { "port" };
                let finding = Finding::error(FindingLocation::Key(at(other)), "`srv` has the hosts and the ports");
                self.wrong(finding.label("of no effect").also(FindingLocation::Key(at("srv")), "beside this"));
            }
            (Some(_), None, None) if !self.parts.broken.at(&at("port")) => {
                let finding = Finding::error(FindingLocation::Key(at("name")), "`name` needs a `port` beside it");
                self.wrong(
                    finding
                        .label("a name has addresses and no ports")
                        .help("where the ports are in the DNS, too, write `srv`"),
                );
            }
            (None, _, None) => {
                let finding = Finding::error(value(path), "nothing says what to look up");
                self.wrong(finding.label("expected `name` and `port`, or `srv`"));
            }
            _ => {}
        }
        for (key, name) in [("name", &dns.name), ("srv", &dns.srv)] {
            let Some(name) = name else { continue };
            let name = name.strip_suffix('.').unwrap_or(name);
            if name.parse::<IpAddr>().is_ok() || name.len() > 253 || !name.split('.').all(is_label) {
                let finding = Finding::error(value(at(key)), format!("`{name}` is not a name that can be looked up"));
                self.wrong(finding.label("expected one such as `app.example.com`"));
            }
        }
        if dns.port == Some(0) {
            let finding = Finding::error(value(at("port")), "nothing can be reached at port 0");
            self.wrong(finding.label("expected a port from 1 to 65535"));
        }
        for (index, server) in dns.servers.iter().enumerate() {
            if Dns::server(server).is_none() {
                let location = value(self.item(&at("servers"), index));
                let finding = Finding::error(location, format!("`{server}` is not the address of a server"));
                self.wrong(
                    finding.label("expected an IP address such as `10.0.0.53`, or one with a port: `10.0.0.53:5353`"),
                );
            }
        }
        self.time(&at("refresh"), dns.refresh);
        self.time(&at("timeout"), dns.timeout);
    }

    fn transport(&mut self, upstream: &Upstream, path: &str) {
        self.time(&format!("{path}.keepalive.idle"), upstream.keepalive.idle);
        self.time(&format!("{path}.keepalive.max_age"), upstream.keepalive.max_age);
        if upstream.protocol != Protocol::Http1 && upstream.keepalive.pool != Count::UNLIMITED {
            let at = format!("{path}.keepalive.pool");
            let finding =
                Finding::error(FindingLocation::Key(at), "`pool` counts connections that serve one request at a time");
            self.wrong(finding.label("only with `protocol: http1`"));
        }
        let (at, window) = (format!("{path}.http2.stream_window"), upstream.http2.stream_window.0);
        if upstream.protocol == Protocol::Http1 && upstream.http2 != Default::default() {
            let finding =
                Finding::error(FindingLocation::Key(at), "`http2` is for endpoints that are spoken to over HTTP/2");
            self.wrong(finding.label("only with `protocol: h2` or `h2c`"));
        } else if !(H2_WINDOW_LEAST..=H2_WINDOW_MOST).contains(&window) {
            let finding = Finding::error(value(&at), format!("`{at}` is out of range"));
            self.wrong(finding.label("expected a size from `16KiB` to `16MiB`"));
        }
        let Some(tls) = &upstream.tls else { return };
        let at = |key: &str| format!("{path}.tls.{key}");
        if upstream.protocol == Protocol::H2c {
            let finding =
                Finding::error(FindingLocation::Key(format!("{path}.tls")), "`protocol: h2c` is HTTP/2 in clear text");
            self.wrong(finding.label("there is no TLS").help("for HTTP/2 over TLS, write `protocol: h2`"));
        }
        for (one, other) in [("certificate", "key"), ("key", "certificate")] {
            if self.is_written(&at(one)) && !self.is_written(&at(other)) {
                let finding =
                    Finding::error(FindingLocation::Key(at(one)), format!("`{one}` needs a `{other}` beside it"));
                self.wrong(finding.label(format!("without a `{other}`")));
            }
        }
        if let Some(name) = &tls.server_name
            && name.parse::<IpAddr>().is_err()
            && (name.len() > 253 || !name.split('.').all(is_label))
        {
            let finding = Finding::error(value(at("server_name")), format!("`{name}` is not the name of a server"));
            self.wrong(finding.label("expected a name such as `app.example.com`, or an IP address"));
        }
        if !tls.verify {
            if self.is_written(&at("ca")) {
                let finding = Finding::error(FindingLocation::Key(at("ca")), "`ca` has no effect with `verify: false`");
                self.wrong(finding.label("of no effect").also(value(at("verify")), "said here"));
            }
            let finding =
                Finding::warning(value(at("verify")), "an attacker on the network can impersonate the backend");
            self.wrong(
                finding
                    .label("certificates are not verified")
                    .help("for a self-signed certificate, name it as `ca` and leave `verify` out"),
            );
        }
    }

    fn load_balancing(&mut self, balancing: &LoadBalancing, path: &str) {
        let LoadBalancing { policy, hash_key, bounded_load, sticky, .. } = balancing;
        if let Some(Sticky { cookie }) = sticky {
            self.sticky_cookie(cookie, &format!("{path}.sticky.cookie"));
        }
        if self.parts.broken.at(&format!("{path}.policy")) {
            return;
        }
        let at = format!("{path}.hash_key");
        for key in ["hash_key", "bounded_load"].into_iter().filter(|_| !policy.hashes()) {
            let key = format!("{path}.{key}");
            if self.is_written(&key) {
                let finding = Finding::error(FindingLocation::Key(key), "this policy hashes nothing");
                self.wrong(finding.label("only with `policy: ring_hash` or `policy: maglev`"));
            }
        }
        if policy.hashes() && hash_key.is_empty() && !self.parts.broken.within(&at) {
            let location = if self.is_written(&at) { value(at.clone()) } else { value(format!("{path}.policy")) };
            let finding = Finding::error(location, "this policy needs a `hash_key`").label("what is hashed?");
            self.wrong(finding.help("write `hash_key: client_ip`, `hash_key: { header: x-user }`, or a list of keys"));
        }
        for (index, key) in hash_key.0.iter().enumerate() {
            let Err(error) = key.check() else { continue };
            let item = self.item(&at, index);
            let item = if self.is_written(&item) { item } else { at.clone() };
            let at = join(&item, &error.path);
            let location = match error.inside {
                Some(inside) => FindingLocation::Inside(at, inside),
                None => value(at),
            };
            let (title, label) = halves(&error.message);
            self.wrong(Finding::error(location, title).label(label).foreign());
        }
        if bounded_load.is_some_and(|factor| !(factor > 1.0 && factor.is_finite())) {
            let finding = Finding::error(value(format!("{path}.bounded_load")), "`bounded_load` leaves no room");
            self.wrong(finding.label("expected a number greater than 1, such as 1.25"));
        }
    }

    fn health_check(&mut self, written: &HealthCheck, protocol: Protocol, path: &str) {
        let kinds: Vec<&str> = written.kinds().collect();
        match &kinds[..] {
            [] if !self.parts.broken.within(path) => {
                let finding =
                    Finding::error(FindingLocation::Key(path.to_owned()), "nothing says how endpoints are checked");
                self.wrong(
                    finding
                        .label("expected one of `http`, `tcp` and `grpc`")
                        .help("write `http: { path: /healthz }` or `tcp: {}`"),
                );
            }
            [first, others @ ..] => {
                for other in others {
                    let finding = Finding::error(
                        FindingLocation::Key(format!("{path}.{other}")),
                        "endpoints are checked in one way",
                    );
                    let first = FindingLocation::Key(format!("{path}.{first}"));
                    self.wrong(finding.label("either this").also(first, "or this"));
                }
            }
            [] => {}
        }
        if let Some(http) = &written.http {
            self.http_check(http, &format!("{path}.http"));
        }
        if let Some(grpc) = &written.grpc {
            self.check_host(grpc.host.as_deref(), &format!("{path}.grpc.host"));
            if protocol == Protocol::Http1 {
                let finding =
                    Finding::error(FindingLocation::Key(format!("{path}.grpc")), "gRPC is spoken over HTTP/2 only");
                self.wrong(finding.label("expected `protocol: h2` or `protocol: h2c` for this upstream"));
            }
        }
        self.time(&format!("{path}.interval"), written.interval);
        self.time(&format!("{path}.timeout"), written.timeout);
        self.count(&format!("{path}.unhealthy_after"), written.unhealthy_after, 1, STREAK_MAX);
        self.count(&format!("{path}.healthy_after"), written.healthy_after, 1, STREAK_MAX);
        self.count(&format!("{path}.at_once"), written.at_once, 1, CHECKS_AT_ONCE_MAX);
    }

    fn outlier_detection(&mut self, written: &OutlierDetection, path: &str) {
        self.count(&format!("{path}.consecutive_5xx"), written.consecutive_5xx, 1, u64::MAX);
        let gateway_errors = written.consecutive_gateway_errors;
        self.count(&format!("{path}.consecutive_gateway_errors"), gateway_errors, 1, u64::MAX);
        self.count(&format!("{path}.connect_failures"), written.connect_failures, 1, u64::MAX);
        if let Some(rate) = &written.success_rate {
            let path = format!("{path}.success_rate");
            self.factor(&format!("{path}.factor"), rate.factor, 0.0);
            self.count(&format!("{path}.endpoints"), rate.endpoints, 2, u64::MAX);
            self.count(&format!("{path}.requests"), rate.requests, 1, u64::MAX);
        }
        if let Some(latency) = &written.latency {
            let path = format!("{path}.latency");
            self.factor(&format!("{path}.factor"), latency.factor, 1.0);
            self.count(&format!("{path}.endpoints"), latency.endpoints, 3, u64::MAX);
            self.count(&format!("{path}.requests"), latency.requests, 1, u64::MAX);
        }
        self.time(&format!("{path}.base_ejection"), written.base_ejection);
        self.time(&format!("{path}.interval"), written.interval);
        let (base, max) = (format!("{path}.base_ejection"), format!("{path}.max_ejection"));
        if written.max_ejection < written.base_ejection {
            let [at, other] = if self.is_written(&max) { [max, base] } else { [base, max] };
            let finding = Finding::error(value(&at), "`base_ejection` is longer than `max_ejection`");
            let label = format!(
                "expected a `base_ejection` ({}) of no more than `max_ejection` ({})",
                written.base_ejection, written.max_ejection
            );
            let finding = finding.label(label);
            self.wrong(if self.is_written(&other) { finding.also(value(&other), "the other one") } else { finding });
        }
    }

    fn factor(&mut self, path: &str, factor: f64, least: f64) {
        if !(factor >= least && factor.is_finite()) {
            let finding = Finding::error(value(path), format!("`{path}` is out of range"));
            self.wrong(finding.label(format!("expected a number of at least {least}")));
        }
    }

    fn http_check(&mut self, written: &HttpCheck, path: &str) {
        self.check_host(written.host.as_deref(), &format!("{path}.host"));
        let at = format!("{path}.path");
        if !written.path.starts_with('/') || written.path.parse::<PathAndQuery>().is_err() {
            let finding = Finding::error(value(at), format!("`{}` is not a path", written.path));
            self.wrong(finding.label("expected one such as `/healthz`"));
        }
        let at = format!("{path}.statuses");
        if written.statuses.is_empty() && !self.parts.broken.within(&at) {
            let finding = Finding::error(value(at), "no response would pass the check");
            self.wrong(finding.label("expected statuses such as 200 and ranges such as 200-299"));
        }
        if written.body.as_ref().is_some_and(String::is_empty) {
            let finding = Finding::error(value(format!("{path}.body")), "every body has an empty text in it");
            self.wrong(finding.label("expected the text that only a well endpoint answers with"));
        }
    }

    fn check_host(&mut self, host: Option<&str>, path: &str) {
        if let Some(host) = host.filter(|host| host.parse::<Authority>().is_err() || host.contains('@')) {
            let finding = Finding::error(value(path), format!("`{host}` is not a host"));
            self.wrong(finding.label("expected a name such as `shop.example.com`, with a port or without"));
        }
    }

    fn sticky_cookie(&mut self, cookie: &StickyCookie, path: &str) {
        let StickyCookie { name, secret: Secrets(secrets), ttl, same_site: _ } = cookie;
        if let Err(error) = Key::Cookie(name.clone()).check() {
            self.wrong(Finding::error(value(format!("{path}.name")), error.message));
        }
        let at = format!("{path}.secret");
        if !(1..=StickyCookie::SECRETS_MAX).contains(&secrets.len()) {
            let finding = Finding::error(value(&at), "a signed cookie has one secret, or a few while they change");
            self.wrong(finding.label(format!("expected from 1 to {} secrets", StickyCookie::SECRETS_MAX)));
        }
        for (index, secret) in secrets.iter().enumerate() {
            let item = self.item(&at, index);
            let item = if self.is_written(&item) { item } else { at.clone() };
            let least = StickyCookie::SECRET_BYTES_MIN;
            if secret.len() < least {
                let finding = Finding::error(value(item), "this secret can be guessed");
                let finding = finding.label(format!("expected at least {least} bytes"));
                self.wrong(
                    finding.help("make one with `openssl rand -base64 32`, and write `${VAR}` or `${file:/path}`"),
                );
            }
        }
        if ttl.is_some_and(|ttl| ttl.0 < Duration::from_secs(1)) {
            let finding = Finding::error(value(format!("{path}.ttl")), "a cookie lives for whole seconds");
            self.wrong(finding.label("expected at least `1s`"));
        }
    }
}
