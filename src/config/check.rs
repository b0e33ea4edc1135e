//! Checks meaning after decoding: duplicate names, unknown names, limits out of range, routes that no request can
//! reach.
//!
//! It checks every part that could be decoded, and skips parts that already have an error.

mod acme;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::hash::Hash;
use std::net::{IpAddr, Ipv6Addr};
use std::time::Duration;

use http::uri::{Authority, PathAndQuery};
use http::{HeaderName, HeaderValue, Method, Uri};
use serde_yaml::Value as Yaml;

use super::address::{Address, Target, is_label};
use super::decode::Parts;
use super::explain::{expected, halves};
use super::filter::FilterKind;
use super::key::Key;
use super::listener::tls::{Certificate, ClientMode, ProxyProtocol, RedirectHttps, Tickets};
use super::listener::{Http2, Limits, Listener, Protocol as ListenerProtocol, Tls};
use super::report::{Finding, Spot};
use super::route::retry::{ATTEMPTS_MAX, Backoff, Retry};
use super::route::{BufferMode, Client, GrpcWeb, Match, PathMatch, Route, ValueMatch};
use super::server::{AccessLog, Admin, EventLoop, OpenFiles, Resources, Tracing};
use super::text::Text;
use super::units::{ByteRate, Count, FileMode, Rate, Size, Time};
use super::upstream::health::{HealthCheck, HttpCheck};
use super::upstream::outlier::OutlierDetection;
use super::upstream::sticky::{Secrets, Sticky, StickyCookie};
use super::upstream::{CircuitBreaker, Dns, FileSource, LoadBalancing, Protocol, Upstream};
use crate::error::path::{self, join};

/// The label under which `/metrics` counts everything beyond a series limit.
const RESERVED_NAME: &str = "_other";
/// The access log writer preallocates a slot for each queued line.
const LOG_QUEUE_MAX: u64 = 1_000_000;
const ADMIN_STREAMS_MAX: u64 = 1024;
/// Shorter tokens can be guessed.
const TOKEN_BYTES_MIN: usize = 16;
/// More threads do not make a disk faster.
const DISK_THREADS_MAX: u64 = 64;
/// The disk queue preallocates a slot for each queued operation.
const DISK_QUEUE_MAX: u64 = 1_000_000;
/// The highest nice value.
const DISK_NICE_MAX: u64 = 19;
/// A client that waits for an upgrade holds an admin connection.
const UPGRADE_MAX: Duration = Duration::from_secs(600);
/// Draining processes are handed over in one message each.
const DRAINING_MAX: u64 = 64;
/// In percent. The rest is needed for connections to backends.
const OPEN_FILES_MAX: f64 = 90.0;
/// In percent. Less would buffer almost nothing.
const SHARE_MIN: f64 = 1.0;
/// Less than 1 MiB is used up by sixteen slow clients at the default memory of a route.
const MEMORY_MIN: Size = Size::kib(1024);
/// More failures in a row than this take hours.
const STREAK_MAX: u64 = 10_000;
/// More than any machine has processors.
const HANDSHAKE_THREADS_MAX: u64 = 256;
/// Each check uses a socket.
const CHECKS_AT_ONCE_MAX: u64 = 10_000;
/// A queued exchange keeps its memory, and no client waits behind a million others.
const QUEUE_MAX: u64 = 1_000_000;
/// More would be regular traffic, not a trial.
const PROBES_MAX: u64 = 1000;
/// An HTTP/2 frame has up to 16 KiB (RFC 9113 §4.2). The upper limit is about a hundredth of the 2 GiB that a
/// connection can have in flight.
const H2_WINDOW_LEAST: u64 = 16 << 10;
const H2_WINDOW_MOST: u64 = 16 << 20;
/// More often costs more than it shows.
const HEARTBEAT_MIN: Time = Time::milliseconds(1);
/// Less often, most stalls would be missed.
const HEARTBEAT_MAX: Time = Time::seconds(1);

/// A queued exchange has about ten spans of some hundred bytes.
const SPAN_QUEUE_MAX: u64 = 100_000;
/// A longer export would overflow the queue behind it.
const EXPORT_MAX: Time = Time::seconds(60);
/// A longer interval delays what operators see.
const GATHER_MAX: Time = Time::seconds(60);

/// At most this many unknown upstream names get a suggestion: comparing thousands with thousands is slow.
const COMPARED_MAX: usize = 20;

/// All errors of `parts` that decoding cannot find; `written` is the file they come from.
pub(super) fn check(parts: &Parts, written: &Yaml, kinds: &[FilterKind]) -> Vec<Finding> {
    let mut check = Check { parts, written, kinds, findings: Vec::new(), compared: 0 };
    check.globals();
    check.listeners();
    check.upstreams();
    check.routes();
    check.unreachable_routes();
    check.findings
}

struct Check<'a> {
    parts: &'a Parts,
    written: &'a Yaml,
    kinds: &'a [FilterKind],
    findings: Vec<Finding>,
    /// Number of unknown names that were compared with the known ones.
    compared: usize,
}

fn value(path: impl Into<String>) -> Spot {
    Spot::Value(path.into())
}

impl<'a> Check<'a> {
    /// Adds a finding unless its place already has an error.
    fn wrong(&mut self, finding: Finding) {
        if !finding.path().is_some_and(|path| self.parts.broken.at(path)) {
            self.findings.push(finding);
        }
    }

    fn item(&self, list: &str, index: usize) -> String {
        self.parts.broken.item(list, index)
    }

    /// Whether the file has a value at `path`; otherwise a default applies.
    fn is_written(&self, path: &str) -> bool {
        let mut steps = path::follow(self.written, path);
        steps.by_ref().for_each(drop);
        steps.is_whole() && !steps.at().is_null()
    }

    fn globals(&mut self) {
        let Some(rest) = &self.parts.rest else { return };
        if rest.version != 1 {
            let finding =
                Finding::error(value("version"), "this version of the format is not known").label("expected 1");
            self.wrong(finding.help("this Forebay reads version 1; a newer one may read the file"));
        }
        self.count("server.disk_threads", rest.server.disk_threads, 1, DISK_THREADS_MAX);
        self.count("server.disk_queue", rest.server.disk_queue, 1, DISK_QUEUE_MAX);
        self.count("server.disk_nice", rest.server.disk_nice, 0, DISK_NICE_MAX);
        self.count("server.health_checks", rest.server.health_checks, 1, CHECKS_AT_ONCE_MAX);
        self.open_files(&rest.server.open_files);
        self.time("server.shutdown.deadline", rest.server.shutdown.deadline);
        self.time("server.upgrade.deadline", rest.server.upgrade.deadline);
        if rest.server.upgrade.deadline.0 > UPGRADE_MAX {
            let path = "server.upgrade.deadline";
            let finding = Finding::error(value(path), format!("`{path}` is too long"));
            self.wrong(finding.label("expected at most `10m`"));
        }
        self.count("server.upgrade.processes", rest.server.upgrade.processes, 1, DRAINING_MAX);
        if rest.server.pid_file.as_ref().is_some_and(|path| !path.starts_with('/')) {
            let finding = Finding::error(value("server.pid_file"), "the path of this file must be absolute");
            self.wrong(finding.label("expected a path such as `/run/forebay/forebay.pid`"));
        }
        self.resources(&rest.resources);
        self.count("observability.access_log.queue", rest.observability.access_log.queue, 1, LOG_QUEUE_MAX);
        self.log_fields(&rest.observability.access_log.fields);
        self.count("observability.metrics.max_series", rest.observability.metrics.max_series, 1, u64::MAX);
        self.count("admin.connections", rest.admin.connections, 1, u64::MAX);
        self.count("admin.streams", rest.admin.streams, 1, ADMIN_STREAMS_MAX);
        self.mode("admin", &rest.admin.address, rest.admin.mode);
        for (index, host) in rest.admin.hosts.iter().enumerate() {
            if host.len() > 253 || !host.split('.').all(is_label) {
                let finding =
                    Finding::error(value(self.item("admin.hosts", index)), format!("`{host}` is not a host name"));
                self.wrong(finding.label("expected a name such as `gateway.example.com`, without a port"));
            }
        }
        self.event_loop(&rest.observability.event_loop);
        self.tracing(&rest.observability.tracing);
        self.admin(&rest.admin);
        self.issuers(&rest.acme);
    }

    fn admin(&mut self, admin: &Admin) {
        if let Some(tls) = &admin.tls {
            self.tls(tls, "admin.tls");
            if tls.hsts.is_some() {
                let finding =
                    Finding::error(Spot::Key("admin.tls.hsts".to_owned()), "the admin endpoint sends no `hsts`");
                self.wrong(finding.label("leave it out"));
            }
        }
        if admin.token.as_ref().is_some_and(|token| token.len() < TOKEN_BYTES_MIN) {
            let finding = Finding::error(value("admin.token"), "this token could be guessed");
            self.wrong(
                finding
                    .label(format!("expected at least {TOKEN_BYTES_MIN} letters"))
                    .help("make one with `openssl rand -base64 32`, and write `${VAR}` or `${file:/path}`"),
            );
        }
        if admin.token.as_ref().is_some_and(|token| !token.bytes().all(|byte| byte.is_ascii_graphic())) {
            let finding = Finding::error(value("admin.token"), "a token is one word of ASCII");
            self.wrong(finding.label("expected letters, digits and signs without spaces"));
        }
        if !admin.enabled || !is_open(&admin.address) {
            return;
        }
        let asks = admin.tls.as_ref().is_some_and(|tls| {
            let required = |one: &Certificate| one.client.as_ref().is_some_and(|it| it.mode == ClientMode::Required);
            tls.certificates.iter().all(required)
        });
        if admin.token.is_none() && !asks {
            let finding =
                Finding::warning(value("admin.address"), "everyone who can reach this machine can reach `admin`")
                    .label("not a loopback address");
            self.wrong(finding.help("give it a `token`, let it listen on 127.0.0.1, or keep others out by a firewall"));
        } else if admin.tls.is_none() {
            let finding =
                Finding::warning(value("admin.address"), "the token of `admin` goes over the network in clear text")
                    .label("not a loopback address");
            self.wrong(finding.help("give it `tls: { certificates: [ … ] }`, too"));
        }
    }

    fn open_files(&mut self, open_files: &OpenFiles) {
        let OpenFiles { clients, spools } = open_files;
        if clients.0 < 1.0 {
            let path = "server.open_files.clients";
            let finding = Finding::error(value(path), format!("`{path}` is out of range"));
            self.wrong(finding.label("expected a share of at least 1%"));
        }
        if clients.0 + spools.0 > OPEN_FILES_MAX {
            let finding =
                Finding::error(value("server.open_files"), "nearly all open files are for clients and spools");
            let both = format!("{clients} and {spools}; expected at most {OPEN_FILES_MAX}% together");
            self.wrong(finding.label(both).help("what is left is for connections to backends and for Forebay itself"));
        }
    }

    fn log_fields(&mut self, fields: &BTreeMap<String, Text>) {
        for name in fields.keys() {
            let at = join("observability.access_log.fields", &path::key(name));
            let fine = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.');
            if name.is_empty() || !name.chars().all(fine) {
                let finding = Finding::error(Spot::Key(at), format!("`{name}` is not a field name"));
                self.wrong(finding.label("expected letters, digits, `_`, `-` and `.`"));
            } else if AccessLog::FIELDS.contains(&name.as_str()) {
                let finding = Finding::error(Spot::Key(at), format!("a line has a field `{name}` already"));
                self.wrong(finding.label("expected another name"));
            }
        }
    }

    fn event_loop(&mut self, event_loop: &EventLoop) {
        let EventLoop { heartbeat, stall_threshold } = event_loop;
        let path = "observability.event_loop.heartbeat";
        if !(HEARTBEAT_MIN..=HEARTBEAT_MAX).contains(heartbeat) {
            let finding = Finding::error(value(path), format!("`{path}` is out of range"));
            self.wrong(finding.label(format!("expected a time from {HEARTBEAT_MIN} to {HEARTBEAT_MAX}")));
        } else if stall_threshold <= heartbeat {
            let written = self.is_written("observability.event_loop.stall_threshold");
            let path = if written { "observability.event_loop.stall_threshold" } else { path };
            let finding = Finding::error(value(path), "a worker would be called stalled between two heartbeats");
            let label = format!("expected a `stall_threshold` ({stall_threshold}) above the `heartbeat` ({heartbeat})");
            self.wrong(finding.label(label));
        }
    }

    fn tracing(&mut self, tracing: &Tracing) {
        let Tracing { endpoint, headers, timeout, queue, interval, .. } = tracing;
        let path = |key: &str| format!("observability.tracing.{key}");
        self.count(&path("queue"), *queue, 1, SPAN_QUEUE_MAX);
        self.time(&path("timeout"), *timeout);
        self.time(&path("interval"), *interval);
        for (key, most, time) in [("timeout", EXPORT_MAX, timeout), ("interval", GATHER_MAX, interval)] {
            if *time > most {
                let finding = Finding::error(value(path(key)), format!("`{}` is out of range", path(key)));
                self.wrong(finding.label(format!("expected a time of at most {most}")));
            }
        }
        for (name, text) in headers {
            let at = join(&path("headers"), &path::key(name));
            if HeaderName::from_bytes(name.as_bytes()).is_err() {
                let finding = Finding::error(Spot::Key(at.clone()), format!("`{name}` is not the name of a header"));
                self.wrong(finding.label("expected a name such as `Authorization`"));
            }
            if HeaderValue::from_str(text).is_err() {
                let finding = Finding::error(value(at), "this is not a valid header value");
                self.wrong(finding.label("expected visible ASCII characters"));
            }
        }
        if !tracing.is_on() {
            return;
        }
        let finding = Finding::error(value(path("endpoint")), "spans cannot be exported to this endpoint");
        if !cfg!(feature = "otel") {
            let finding = Finding::error(value(path("endpoint")), "this Forebay was built without tracing");
            let finding = finding.label("it makes no spans");
            self.wrong(
                finding.help("build it with the feature `otel`, which is on by default, or write `endpoint: off`"),
            );
        } else if endpoint.starts_with("https://") {
            let finding = finding.label("expected `http://`, without TLS");
            self.wrong(finding.help("use a local collector that forwards the spans"));
        } else if !is_http_url(endpoint) {
            self.wrong(finding.label("expected `http://host:port`, with a path or without, or `off`"));
        }
    }

    fn resources(&mut self, resources: &Resources) {
        if resources.memory < MEMORY_MIN {
            let finding = Finding::error(value("resources.memory"), "`resources.memory` is out of range");
            self.wrong(
                finding
                    .label(format!("expected a size of at least {MEMORY_MIN}"))
                    .help("to buffer nothing, write `mode: stream` for both directions of every route"),
            );
        }
        for (path, share) in
            [("resources.responses", resources.responses), ("resources.per_client", resources.per_client)]
        {
            if share.0 < SHARE_MIN {
                let finding = Finding::error(value(path), format!("`{path}` is out of range"));
                self.wrong(finding.label(format!("expected a share of at least {SHARE_MIN}%")));
            }
        }
        let rungs = &resources.on_pressure;
        if rungs.is_empty() && !self.parts.broken.within("resources.on_pressure") {
            let finding = Finding::error(value("resources.on_pressure"), "`on_pressure` is empty");
            self.wrong(finding.label("expected some of `spill`, `pause` and `shed`"));
        }
        for (index, rung) in rungs.iter().enumerate() {
            if let Some(first) = rungs[..index].iter().position(|earlier| earlier == rung) {
                let list = "resources.on_pressure";
                let (again, first) = (self.item(list, index), self.item(list, first));
                self.twice(again, first, "a rung is listed twice".to_owned());
            }
        }
        self.time("resources.pause", resources.pause);
        self.time("resources.turn", resources.turn);
    }

    fn listeners(&mut self) {
        let missing = Finding::error(Spot::File, "there are no listeners, so no client could connect")
            .help("add `listeners: [ { name: web, address: 127.0.0.1:8080 } ]`");
        let Some(listeners) = &self.parts.listeners else {
            if !self.parts.broken.at("listeners") {
                self.findings.push(missing);
            }
            return;
        };
        if listeners.is_empty() {
            self.wrong(
                Finding::error(value("listeners"), "there are no listeners, so no client could connect")
                    .label("expected at least one"),
            );
        }
        let mut names = Seen::default();
        let mut addresses = Seen::default();
        for (index, listener) in listeners.iter().enumerate() {
            let Some(listener) = listener else { continue };
            let path = format!("listeners[{index}]");
            self.name(&listener.name, value(format!("{path}.name")));
            if let Some(first) = names.first(&listener.name, format!("{path}.name")) {
                self.twice(format!("{path}.name"), first, format!("two listeners have the name `{}`", listener.name));
            }
            if let Some(first) = addresses.first_address(&listener.address, format!("{path}.address")) {
                let title = format!("two listeners have the address `{}`", listener.address);
                self.twice(format!("{path}.address"), first, title);
            }
            self.listener(listener, &path);
        }
        self.admin_address(&mut addresses);
    }

    fn admin_address(&mut self, addresses: &mut Seen<String>) {
        let Some(admin) = self.parts.rest.as_ref().map(|rest| &rest.admin).filter(|admin| admin.enabled) else {
            return;
        };
        if let Some(first) = addresses.first_address(&admin.address, "admin.address".to_owned()) {
            // The admin address may be a default, which the file does not contain.
            let title = format!("the admin endpoint and a listener have the address `{}`", admin.address);
            let finding = Finding::error(value(first), title).label("the listener's");
            self.wrong(finding.help("choose another `admin: { address: … }`, or write `admin: { enabled: false }`"));
        }
    }

    /// A TCP address has no file mode.
    fn mode(&mut self, path: &str, address: &Address, mode: FileMode) {
        if mode != FileMode::default() && address.unix_path().is_none() {
            let finding = Finding::error(Spot::Key(format!("{path}.mode")), "only a unix socket has a mode");
            self.wrong(finding.label(format!("`{address}` is none")));
        }
    }

    fn listener(&mut self, listener: &Listener, path: &str) {
        self.mode(path, &listener.address, listener.mode);
        self.protocols(listener, &format!("{path}.protocols"));
        self.passed_on(listener, path);
        if let Some(redirect) = &listener.redirect_https {
            self.redirect_https(redirect, listener.tls.is_some(), &format!("{path}.redirect_https"));
        }
        if let Some(tls) = &listener.tls {
            self.tls(tls, &format!("{path}.tls"));
        }
        if let Some(proxy) = &listener.proxy_protocol {
            self.proxy_protocol(proxy, &listener.address, &format!("{path}.proxy_protocol"));
        }
        self.listener_limits(&listener.limits, &format!("{path}.limits"));
        let Http2 { provoked_resets, continuations, empty_data, .. } = &listener.http2;
        self.count(&format!("{path}.http2.provoked_resets"), *provoked_resets, 1, u64::MAX);
        self.count(&format!("{path}.http2.continuations"), *continuations, 0, u64::MAX);
        self.count(&format!("{path}.http2.empty_data"), *empty_data, 0, 100);
        self.time(&format!("{path}.timeouts.header"), listener.timeouts.header);
        self.time(&format!("{path}.timeouts.idle"), listener.timeouts.idle);
    }

    /// Protocols of a listener: at least one, no duplicates, and consistent with `tls`.
    fn protocols(&mut self, listener: &Listener, path: &str) {
        let protocols = listener.spoken();
        let (clear, secure) = ("`http1` and `h2c`", "`http1` and `h2`");
        if protocols.is_empty() && !self.parts.broken.within(path) {
            let finding = Finding::error(value(path), "a listener must speak some protocol");
            let known = if listener.tls.is_some() { secure } else { clear };
            self.wrong(finding.label(format!("expected one or both of {known}")));
        }
        for (index, protocol) in protocols.iter().enumerate() {
            let at = self.item(path, index);
            match (protocol, &listener.tls) {
                (ListenerProtocol::H2, None) => {
                    let finding = Finding::error(value(at), "`h2` is HTTP/2 over TLS, and this listener has no `tls`");
                    self.wrong(finding.label(format!("expected one or both of {clear}")));
                }
                (ListenerProtocol::H2c, Some(_)) => {
                    let finding =
                        Finding::error(value(at), "`h2c` is HTTP/2 in clear text, and this listener has `tls`");
                    self.wrong(finding.label(format!("expected one or both of {secure}")));
                }
                _ => {}
            }
        }
        for (index, protocol) in protocols.iter().enumerate() {
            if let Some(first) = protocols[..index].iter().position(|earlier| earlier == protocol) {
                let (again, first) = (self.item(path, index), self.item(path, first));
                self.twice(again, first, "a protocol is listed twice".to_owned());
            }
        }
    }

    /// The HTTPS redirect of a listener; `secure`: the listener itself has `tls`.
    fn redirect_https(&mut self, redirect: &RedirectHttps, secure: bool, path: &str) {
        if secure {
            let finding =
                Finding::error(Spot::Key(path.to_owned()), "a listener with `tls` would send its clients to itself");
            self.wrong(finding.label("it belongs to a listener in clear text"));
        }
        if ![301, 302, 307, 308].contains(&redirect.status) {
            let finding = Finding::error(value(format!("{path}.status")), "this status is not a redirect that fits");
            self.wrong(finding.label("expected 301, 302, 307 or 308"));
        }
        if redirect.port == 0 {
            let finding = Finding::error(value(format!("{path}.port")), "nothing can be reached at port 0");
            self.wrong(finding.label("expected a port from 1 to 65535"));
        }
    }

    /// The peers that may send a PROXY protocol header.
    fn proxy_protocol(&mut self, proxy: &ProxyProtocol, address: &Address, path: &str) {
        self.time(&format!("{path}.timeout"), proxy.timeout);
        let unix = matches!(address.target(), Ok(Target::Unix(_)));
        if proxy.from.is_empty() && !unix && !self.parts.broken.within(path) {
            let finding = Finding::error(value(path), "no peer may use the PROXY protocol");
            self.wrong(
                finding
                    .label("expected `from` with at least one network")
                    .help("name the proxies: `from: [10.0.0.0/8]`"),
            );
        }
    }

    /// The limits of a listener.
    fn listener_limits(&mut self, limits: &Limits, path: &str) {
        let Limits {
            connections,
            connections_per_ip,
            connection_rate,
            connection_rate_per_ip,
            handshakes,
            handshakes_per_ip,
            handshake_rate,
            handshake_rate_per_ip,
            requests,
            requests_per_ip,
            headers,
            header_bytes,
            requests_per_connection,
            streams,
        } = limits;
        self.count(&format!("{path}.requests_per_ip"), *requests_per_ip, 1, u64::MAX);
        self.count(&format!("{path}.connections"), *connections, 1, u64::MAX);
        self.count(&format!("{path}.connections_per_ip"), *connections_per_ip, 1, u64::MAX);
        self.count(&format!("{path}.handshakes"), *handshakes, 1, u64::MAX);
        self.count(&format!("{path}.handshakes_per_ip"), *handshakes_per_ip, 1, u64::MAX);
        self.count(&format!("{path}.requests"), *requests, 1, u64::MAX);
        for (key, rate) in [
            ("connection_rate", connection_rate),
            ("connection_rate_per_ip", connection_rate_per_ip),
            ("handshake_rate", handshake_rate),
            ("handshake_rate_per_ip", handshake_rate_per_ip),
        ] {
            self.rate(&format!("{path}.{key}"), *rate);
        }
        self.count(&format!("{path}.headers"), *headers, 1, 256);
        self.count(&format!("{path}.requests_per_connection"), *requests_per_connection, 1, u64::MAX);
        self.count(&format!("{path}.streams"), *streams, 1, u64::MAX);
        if !(Size::kib(1)..=Size::kib(1024)).contains(header_bytes) {
            let path = format!("{path}.header_bytes");
            let finding = Finding::error(value(&path), format!("`{path}` is out of range"));
            self.wrong(finding.label("expected a size from 1KiB to 1MiB"));
        }
    }

    /// Checks that a rate is in a range that can be counted.
    fn rate(&mut self, path: &str, rate: Option<Rate>) {
        if rate.is_some_and(|rate| rate.events as f64 > rate.per.as_micros() as f64) {
            let finding = Finding::error(value(path), format!("`{path}` is out of range"));
            self.wrong(finding.label("expected at most one a microsecond"));
        }
    }

    /// TLS passthrough and TCP forwarding.
    fn passed_on(&mut self, listener: &Listener, path: &str) {
        let mut names = Seen::<String>::default();
        for (index, passthrough) in listener.passthrough.iter().enumerate() {
            let at = self.item(&format!("{path}.passthrough"), index);
            self.relay(&passthrough.upstream, passthrough.idle, &at);
            if passthrough.sni.is_empty() {
                let finding = Finding::error(value(format!("{at}.sni")), "no name is passed through");
                self.wrong(finding.label("expected at least one name"));
            }
            for (number, name) in passthrough.sni.iter().enumerate() {
                let spot = format!("{at}.sni[{number}]");
                let rest = name.strip_prefix("*.").unwrap_or(name);
                if !rest.split('.').all(is_label) {
                    let finding = Finding::error(value(&spot), format!("`{name}` is not a host name"));
                    self.wrong(finding.label("expected a name such as `db.example.com` or `*.example.com`"));
                } else if let Some(first) = Seen::first(&mut names, &name.to_ascii_lowercase(), spot.clone()) {
                    self.twice(spot, first, format!("`{name}` is passed through twice"));
                }
            }
        }
        let Some(tcp) = &listener.tcp else { return };
        self.relay(&tcp.upstream, tcp.idle, &format!("{path}.tcp"));
        let others = [
            ("tls", listener.tls.is_some()),
            ("passthrough", !listener.passthrough.is_empty()),
            ("redirect_https", listener.redirect_https.is_some()),
            ("protocols", listener.protocols.is_some()),
        ];
        for (key, _) in others.into_iter().filter(|(_, is_there)| *is_there) {
            let at = Spot::Key(format!("{path}.{key}"));
            let finding = Finding::error(at, format!("`{key}` has no effect where every connection is passed on"));
            self.wrong(finding.label("leave it out, or `tcp`"));
        }
    }

    fn relay(&mut self, upstream: &str, idle: Time, path: &str) {
        self.time(&format!("{path}.idle"), idle);
        match self.parts.upstreams.get(upstream) {
            None => self.upstream_exists(upstream, format!("{path}.upstream")),
            Some(Some(there)) if there.tls.is_some() || there.protocol == Protocol::H2 => {
                let at = value(format!("{path}.upstream"));
                let finding =
                    Finding::error(at, format!("the upstream `{upstream}` speaks TLS, and bytes pass as they are"));
                self.wrong(finding.label("expected an upstream without `tls`").help(
                    "what clients send is passed on, TLS included: take the upstream's `tls` away, or route HTTP to it",
                ));
            }
            Some(_) => {}
        }
    }

    fn tls(&mut self, tls: &Tls, path: &str) {
        let list = format!("{path}.certificates");
        if tls.certificates.is_empty() && !self.parts.broken.within(&list) {
            let finding = Finding::error(value(&list), "TLS needs a certificate");
            self.wrong(
                finding
                    .label("expected at least one")
                    .help("write `- { cert: /etc/forebay/shop.pem, key: /etc/forebay/shop.key }`"),
            );
        }
        self.certificates(&tls.certificates, path);
        if tls.groups.is_empty() && !self.parts.broken.within(&format!("{path}.groups")) {
            let finding = Finding::error(value(format!("{path}.groups")), "TLS needs a group for the key exchange");
            self.wrong(finding.label("expected at least one"));
        }
        if tls.ciphers.is_empty() && !self.parts.broken.within(&format!("{path}.ciphers")) {
            let finding = Finding::error(value(format!("{path}.ciphers")), "TLS 1.2 needs a cipher suite");
            self.wrong(
                finding.label("expected at least one").help("to speak TLS 1.3 alone, write `min_version: \"1.3\"`"),
            );
        }
        for (index, group) in tls.groups.iter().enumerate() {
            if let Some(first) = tls.groups[..index].iter().position(|earlier| earlier == group) {
                let list = format!("{path}.groups");
                let (again, first) = (self.item(&list, index), self.item(&list, first));
                self.twice(again, first, "a group is listed twice".to_owned());
            }
        }
        self.time(&format!("{path}.handshake_timeout"), tls.handshake_timeout);
        self.time(&format!("{path}.refresh"), tls.refresh);
        self.time(&format!("{path}.tickets.rotate"), tls.tickets.rotate);
        self.count(&format!("{path}.handshake_threads"), tls.handshake_threads, 0, HANDSHAKE_THREADS_MAX);
        let rotates = tls.tickets.rotate != Tickets::default().rotate;
        for (key, is_set) in [("rotate", rotates), ("keys_file", tls.tickets.keys_file.is_some())] {
            if !tls.tickets.enabled && is_set {
                let at = format!("{path}.tickets.{key}");
                let finding = Finding::error(Spot::Key(at), format!("`{key}` has no effect without tickets"));
                self.wrong(finding.label("leave it out, or `enabled: false`"));
            }
        }
        if tls.tickets.keys_file.is_some() && rotates {
            let finding = Finding::error(
                Spot::Key(format!("{path}.tickets.rotate")),
                "Forebay does not rotate the keys of a file: the program that writes the file does",
            );
            self.wrong(finding.label("leave it out, or `keys_file`"));
        }
    }

    fn upstreams(&mut self) {
        let used = self.used_upstreams();
        for (name, upstream) in &self.parts.upstreams {
            let path = join("upstreams", &path::key(name));
            self.name(name, Spot::Key(path.clone()));
            if used.as_ref().is_some_and(|used| !used.contains(name.as_str())) {
                let finding = Finding::warning(Spot::Key(path.clone()), format!("no route uses the upstream `{name}`"));
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
        let mut addresses = Seen::default();
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
                let finding = Finding::error(Spot::Key(format!("{at}.backup")), "an endpoint is in one tier");
                let other = Spot::Key(format!("{at}.priority"));
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
            let spot = if self.is_written(&longest) { &longest } else { &shortest };
            let finding = Finding::error(value(spot), "`open` is longer than `max_open`");
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
                let finding = Finding::error(Spot::Key(at(other)), title).label("here as well");
                self.wrong(finding.also(Spot::Key(at(first)), "the other one"));
            }
        }
        let endpoints = at("endpoints");
        // Sources that could not be decoded already have an error.
        let is_broken = ["endpoints", "dns", "file"].into_iter().any(|key| self.parts.broken.within(&at(key)));
        if upstream.endpoints.is_empty() && written.iter().all(|key| *key == "endpoints") && !is_broken {
            let spot = if written.is_empty() { Spot::Key(path.to_owned()) } else { value(endpoints) };
            let finding = Finding::error(spot, "an upstream needs at least one endpoint");
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
                let finding = Finding::error(Spot::Key(at(other)), "`srv` has the hosts and the ports");
                self.wrong(finding.label("of no effect").also(Spot::Key(at("srv")), "beside this"));
            }
            (Some(_), None, None) if !self.parts.broken.at(&at("port")) => {
                let finding = Finding::error(Spot::Key(at("name")), "`name` needs a `port` beside it");
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
                let spot = value(self.item(&at("servers"), index));
                let finding = Finding::error(spot, format!("`{server}` is not the address of a server"));
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
            let finding = Finding::error(Spot::Key(at), "`pool` counts connections that serve one request at a time");
            self.wrong(finding.label("only with `protocol: http1`"));
        }
        let (at, window) = (format!("{path}.http2.stream_window"), upstream.http2.stream_window.0);
        if upstream.protocol == Protocol::Http1 && upstream.http2 != Default::default() {
            let finding = Finding::error(Spot::Key(at), "`http2` is for endpoints that are spoken to over HTTP/2");
            self.wrong(finding.label("only with `protocol: h2` or `h2c`"));
        } else if !(H2_WINDOW_LEAST..=H2_WINDOW_MOST).contains(&window) {
            let finding = Finding::error(value(&at), format!("`{at}` is out of range"));
            self.wrong(finding.label("expected a size from `16KiB` to `16MiB`"));
        }
        let Some(tls) = &upstream.tls else { return };
        let at = |key: &str| format!("{path}.tls.{key}");
        if upstream.protocol == Protocol::H2c {
            let finding = Finding::error(Spot::Key(format!("{path}.tls")), "`protocol: h2c` is HTTP/2 in clear text");
            self.wrong(finding.label("there is no TLS").help("for HTTP/2 over TLS, write `protocol: h2`"));
        }
        for (one, other) in [("certificate", "key"), ("key", "certificate")] {
            if self.is_written(&at(one)) && !self.is_written(&at(other)) {
                let finding = Finding::error(Spot::Key(at(one)), format!("`{one}` needs a `{other}` beside it"));
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
                let finding = Finding::error(Spot::Key(at("ca")), "`ca` has no effect with `verify: false`");
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
                let finding = Finding::error(Spot::Key(key), "this policy hashes nothing");
                self.wrong(finding.label("only with `policy: ring_hash` or `policy: maglev`"));
            }
        }
        if policy.hashes() && hash_key.is_empty() && !self.parts.broken.within(&at) {
            let spot = if self.is_written(&at) { value(at.clone()) } else { value(format!("{path}.policy")) };
            let finding = Finding::error(spot, "this policy needs a `hash_key`").label("what is hashed?");
            self.wrong(finding.help("write `hash_key: client_ip`, `hash_key: { header: x-user }`, or a list of keys"));
        }
        for (index, key) in hash_key.0.iter().enumerate() {
            let Err(error) = key.check() else { continue };
            let item = self.item(&at, index);
            let item = if self.is_written(&item) { item } else { at.clone() };
            let at = join(&item, &error.path);
            let spot = match error.inside {
                Some(inside) => Spot::Inside(at, inside),
                None => value(at),
            };
            let (title, label) = halves(&error.message);
            self.wrong(Finding::error(spot, title).label(label).foreign());
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
                let finding = Finding::error(Spot::Key(path.to_owned()), "nothing says how endpoints are checked");
                self.wrong(
                    finding
                        .label("expected one of `http`, `tcp` and `grpc`")
                        .help("write `http: { path: /healthz }` or `tcp: {}`"),
                );
            }
            [first, others @ ..] => {
                for other in others {
                    let finding =
                        Finding::error(Spot::Key(format!("{path}.{other}")), "endpoints are checked in one way");
                    let first = Spot::Key(format!("{path}.{first}"));
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
                let finding = Finding::error(Spot::Key(format!("{path}.grpc")), "gRPC is spoken over HTTP/2 only");
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

    fn routes(&mut self) {
        let title = "there are no routes, so every request would be refused";
        let Some(routes) = &self.parts.routes else {
            if self.needs_routes() && !self.parts.broken.at("routes") {
                let finding = Finding::error(Spot::File, title);
                self.findings.push(finding.help("add `routes: [ { name: all, upstream: app } ]`"));
            }
            return;
        };
        if routes.is_empty() && self.needs_routes() {
            self.wrong(Finding::error(value("routes"), title).label("expected at least one"));
        }
        let mut names = Seen::default();
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
                let finding = Finding::warning(Spot::Key(key), "there is no second attempt").label("never used");
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
                let finding =
                    Finding::error(Spot::Key(several.clone()), "a route has either `upstream` or `upstreams`");
                self.wrong(finding.label("both are written").also(Spot::Key(one.clone()), "the other one"));
            }
            (None, true) if answering.is_none() => self.leads_nowhere(path),
            _ => {}
        }
        if let Some(name) = &route.upstream {
            self.upstream_exists(name, one.clone());
        }
        let (mut names, mut cookies) = (Seen::default(), Seen::default());
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
            self.wrong(Finding::warning(Spot::Key(format!("{path}.{key}")), title).label("never asked"));
        }
        if route.grpc_web == GrpcWeb::Bridge {
            let mut asked = route.upstream.iter().chain(route.upstreams.iter().map(|side| &side.name));
            let over_http1 = asked.find(|&name| {
                let upstream = self.parts.upstreams.get(name).and_then(Option::as_ref);
                upstream.is_some_and(|upstream| upstream.protocol == Protocol::Http1)
            });
            if let Some(name) = over_http1 {
                let title = format!("gRPC is spoken over HTTP/2 only, and the upstream `{name}` is asked over HTTP/1");
                let finding = Finding::error(Spot::Key(format!("{path}.grpc_web")), title);
                self.wrong(finding.label("expected an upstream with `protocol: h2` or `h2c`"));
            }
        }
        for key in ["buffering", "retry", "deadline", "grpc", "grpc_web", "mirror", "upgrades"]
            .map(|key| format!("{path}.{key}"))
        {
            if let Some(filter) = answering.filter(|_| self.is_written(&key)) {
                let title = format!("the filter `{filter}` answers every request of this route");
                self.wrong(Finding::warning(Spot::Key(key), title).label("never used: this is about upstreams"));
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

    fn upstream_exists(&mut self, name: &str, path: String) {
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
        let mut names = Seen::default();
        for (name, condition) in &matches.headers {
            let at = join(&format!("{path}.headers"), &path::key(name));
            if HeaderName::from_bytes(name.as_bytes()).is_err() {
                let finding = Finding::error(Spot::Key(at.clone()), format!("`{name}` is not the name of a header"));
                self.wrong(finding.label("expected letters, digits and `-`"));
            }
            if let Some(first) = names.first(&name.to_ascii_lowercase(), at.clone()) {
                let finding = Finding::error(Spot::Key(at.clone()), format!("the header `{name}` is listed twice"));
                self.wrong(finding.label("again here").also(Spot::Key(first), "first here; case makes no difference"));
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
    fn unreachable_routes(&mut self) {
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

    fn name(&mut self, name: &str, spot: Spot) {
        let fine = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.');
        if name == RESERVED_NAME {
            let finding = Finding::error(spot, format!("the name `{name}` is reserved"));
            self.wrong(finding.label("metrics use it for what is beyond a limit"));
        } else if name.is_empty() || !name.chars().all(fine) {
            let title =
                if name.is_empty() { "the name is empty".to_owned() } else { format!("`{name}` is not a name") };
            let finding = Finding::error(spot, title);
            self.wrong(finding.label("expected letters, digits, `-`, `_` and `.` only: it becomes a metric's label"));
        }
    }

    fn twice(&mut self, again: String, first: String, title: String) {
        self.wrong(Finding::error(value(again), title).label("again here").also(value(first), "first here"));
    }

    /// The message does not repeat the number because it may come from a secret; the report shows the line.
    fn count(&mut self, path: &str, Count(count): Count, least: u64, most: u64) {
        if (least..=most).contains(&count) {
            return;
        }
        let range = if most == u64::MAX { format!("of at least {least}") } else { format!("from {least} to {most}") };
        self.wrong(
            Finding::error(value(path), format!("`{path}` is out of range")).label(format!("expected a count {range}")),
        );
    }

    fn time(&mut self, path: &str, Time(time): Time) {
        if time.is_zero() {
            let finding = Finding::error(value(path), format!("`{path}` leaves no time at all"));
            self.wrong(finding.label("expected more than `0s`"));
        }
    }
}

/// Whether this is `http://host`, with optional port and path.
fn is_http_url(text: &str) -> bool {
    let Ok(url) = text.parse::<Uri>() else { return false };
    let plain =
        url.authority().is_some_and(|authority| !authority.as_str().contains('@') && !authority.host().is_empty());
    url.scheme_str() == Some("http") && plain && url.query().is_none()
}

/// Values seen so far, and the path of each.
struct Seen<T>(HashMap<T, String>);

impl<T> Default for Seen<T> {
    fn default() -> Self {
        Seen(HashMap::new())
    }
}

impl<T: Hash + Eq + Clone> Seen<T> {
    /// The path where `thing` was first seen; `None` if it is new.
    fn first(&mut self, thing: &T, path: String) -> Option<String> {
        let first = self.0.get(thing).cloned();
        self.0.entry(thing.clone()).or_insert(path);
        first
    }
}

impl Seen<String> {
    /// The same for addresses. Port 0 is a different port each time.
    fn first_address(&mut self, address: &Address, path: String) -> Option<String> {
        match address.target() {
            Ok(Target::Tcp(_, 0)) => None,
            _ => self.first(&address.0.to_ascii_lowercase(), path),
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

/// The upstreams that a filter calls: every `upstream` key in its settings, at any depth.
fn called(written: &serde_yaml::Value) -> Vec<&str> {
    match written {
        serde_yaml::Value::Mapping(map) => map
            .iter()
            .flat_map(|(key, value)| match (key.as_str(), value.as_str()) {
                (Some("upstream"), Some(name)) => vec![name],
                _ => called(value),
            })
            .collect(),
        serde_yaml::Value::Sequence(items) => items.iter().flat_map(called).collect(),
        _ => Vec::new(),
    }
}

/// The upstreams that a route uses.
fn asked(route: &Route) -> impl Iterator<Item = &str> {
    let copies = route.mirror.as_ref().map(|mirror| mirror.upstream.as_str());
    let sides = route.upstreams.iter().map(|side| side.name.as_str());
    route.upstream.as_deref().into_iter().chain(sides).chain(copies)
}

fn is_open(address: &Address) -> bool {
    match address.target() {
        Ok(Target::Tcp(host, _)) => host.parse().is_ok_and(|ip: IpAddr| !ip.is_loopback()),
        _ => false,
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

/// Finds sizes such as `64k`, alone or as a rate, which mean 64,000 bytes and are probably a mistake.
///
/// Only the schema knows which scalars are sizes.
pub(super) fn decimal_sizes(schema: &serde_json::Value, written: &Yaml) -> Vec<Finding> {
    let mut findings = Vec::new();
    sizes(schema, schema, written, String::new(), &mut |path, text, per| {
        let Some((number, binary)) = decimal(text) else { return };
        let (Ok(decimal), Ok(size)) = (text.parse::<Size>(), binary.parse::<Size>()) else { return };
        let title = format!("`{text}{per}` is {} bytes", decimal.0);
        let help = format!("write `{binary}{per}` for {} bytes, or `{number}B{per}` if this is what is meant", size.0);
        findings.push(Finding::warning(value(path), title).label("a decimal unit").help(help));
    });
    findings
}

/// Splits a size with a bare decimal unit into number and unit, and gives the same number with the binary unit.
fn decimal(text: &str) -> Option<(String, String)> {
    let digits = text.strip_suffix(['k', 'K', 'm', 'M', 'g', 'G', 't', 'T'])?.trim_end();
    let unit = text.chars().last()?.to_ascii_uppercase();
    digits.parse::<f64>().is_ok().then(|| (format!("{digits}{unit}"), format!("{digits}{unit}iB")))
}

/// Calls `found` for each scalar that is a size or a byte rate by `schema`, with the size and the unit of time.
fn sizes(
    root: &serde_json::Value,
    schema: &serde_json::Value,
    yaml: &Yaml,
    path: String,
    found: &mut impl FnMut(String, &str, &str),
) {
    if let Some(name) = schema["$ref"].as_str().and_then(|name| name.strip_prefix("#/$defs/")) {
        match yaml {
            Yaml::String(text) if name == "Size" => found(path.clone(), text, ""),
            Yaml::String(text) if name == "ByteRate" => {
                text.strip_suffix("/s").into_iter().for_each(|size| found(path.clone(), size.trim_end(), "/s"));
            }
            _ => sizes(root, &root["$defs"][name], yaml, path.clone(), found),
        }
    }
    for alternatives in ["anyOf", "oneOf", "allOf"] {
        for alternative in schema[alternatives].as_array().into_iter().flatten() {
            sizes(root, alternative, yaml, path.clone(), found);
        }
    }
    match yaml {
        Yaml::Mapping(map) => {
            for (key, inner) in map.iter().filter_map(|(key, inner)| Some((key.as_str()?, inner))) {
                let property = schema["properties"].get(key).unwrap_or(&schema["additionalProperties"]);
                sizes(root, property, inner, join(&path, &path::key(key)), found);
            }
        }
        Yaml::Sequence(items) => {
            for (index, item) in items.iter().enumerate() {
                sizes(root, &schema["items"], item, format!("{path}[{index}]"), found);
            }
        }
        _ => {}
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

    #[test]
    fn only_a_bare_decimal_unit_is_doubtful() {
        assert_eq!(decimal("64k"), Some(("64K".to_owned(), "64KiB".to_owned())));
        assert_eq!(decimal("8 M"), Some(("8M".to_owned(), "8MiB".to_owned())));
        for text in ["64KiB", "64kB", "64", "${SIZE}", "k"] {
            assert_eq!(decimal(text), None, "{text}");
        }
    }

    #[test]
    fn an_address_of_the_loopback_is_not_open() {
        let open = |text: &str| is_open(&Address(text.to_owned()));
        assert!(open("0.0.0.0:9100") && open("[::]:9100") && open("10.0.0.1:9100"));
        assert!(!open("127.0.0.1:9100") && !open("[::1]:9100") && !open("unix:/run/a.sock") && !open("localhost:9100"));
    }
}
