//! Checks what belongs to the process: the server, its observability, its resources, the admin endpoint.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::Duration;

use http::{HeaderName, HeaderValue, Uri};

use super::{CHECKS_AT_ONCE_MAX, Check, value};
use crate::config::address::{Address, Target, is_label};
use crate::config::listener::tls::{Certificate, ClientMode};
use crate::config::report::{Finding, FindingLocation};
use crate::config::server::{AccessLog, Admin, EventLoop, OpenFiles, Resources, Tracing};
use crate::config::text::Text;
use crate::config::units::{Size, Time};
use crate::error::path::{self, join};

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

impl Check<'_> {
    pub(super) fn globals(&mut self) {
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
                let finding = Finding::error(
                    FindingLocation::Key("admin.tls.hsts".to_owned()),
                    "the admin endpoint sends no `hsts`",
                );
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
                let finding = Finding::error(FindingLocation::Key(at), format!("`{name}` is not a field name"));
                self.wrong(finding.label("expected letters, digits, `_`, `-` and `.`"));
            } else if AccessLog::FIELDS.contains(&name.as_str()) {
                let finding = Finding::error(FindingLocation::Key(at), format!("a line has a field `{name}` already"));
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
                let finding =
                    Finding::error(FindingLocation::Key(at.clone()), format!("`{name}` is not the name of a header"));
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
        let actions = &resources.on_pressure;
        if actions.is_empty() && !self.parts.broken.within("resources.on_pressure") {
            let finding = Finding::error(value("resources.on_pressure"), "`on_pressure` is empty");
            self.wrong(finding.label("expected some of `spill`, `pause` and `shed`"));
        }
        for (index, action) in actions.iter().enumerate() {
            if let Some(first) = actions[..index].iter().position(|earlier| earlier == action) {
                let list = "resources.on_pressure";
                let (again, first) = (self.item(list, index), self.item(list, first));
                self.twice(again, first, "an action is listed twice".to_owned());
            }
        }
        self.time("resources.pause", resources.pause);
        self.time("resources.turn", resources.turn);
    }
}

/// Whether this is `http://host`, with optional port and path.
fn is_http_url(text: &str) -> bool {
    let Ok(url) = text.parse::<Uri>() else { return false };
    let plain =
        url.authority().is_some_and(|authority| !authority.as_str().contains('@') && !authority.host().is_empty());
    url.scheme_str() == Some("http") && plain && url.query().is_none()
}

fn is_open(address: &Address) -> bool {
    match address.target() {
        Ok(Target::Tcp(host, _)) => host.parse().is_ok_and(|ip: IpAddr| !ip.is_loopback()),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_of_the_loopback_is_not_open() {
        let open = |text: &str| is_open(&Address(text.to_owned()));
        assert!(open("0.0.0.0:9100") && open("[::]:9100") && open("10.0.0.1:9100"));
        assert!(!open("127.0.0.1:9100") && !open("[::1]:9100") && !open("unix:/run/a.sock") && !open("localhost:9100"));
    }
}
