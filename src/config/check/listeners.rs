//! Checks listeners, and the limits, TLS and relays of each.

use super::{Check, FirstPaths, value};
use crate::config::address::{Address, Target, is_label};
use crate::config::listener::tls::{ProxyProtocol, RedirectHttps, Tickets};
use crate::config::listener::{Http2, Limits, Listener, Protocol as ListenerProtocol, Tls};
use crate::config::report::{Finding, FindingLocation};
use crate::config::units::{FileMode, Rate, Size, Time};
use crate::config::upstream::Protocol;

/// More than any machine has processors.
const HANDSHAKE_THREADS_MAX: u64 = 256;

impl Check<'_> {
    pub(super) fn listeners(&mut self) {
        let missing = Finding::error(FindingLocation::File, "there are no listeners, so no client could connect")
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
        let mut names = FirstPaths::default();
        let mut addresses = FirstPaths::default();
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

    fn admin_address(&mut self, addresses: &mut FirstPaths<String>) {
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
    pub(super) fn mode(&mut self, path: &str, address: &Address, mode: FileMode) {
        if mode != FileMode::default() && address.unix_path().is_none() {
            let finding = Finding::error(FindingLocation::Key(format!("{path}.mode")), "only a unix socket has a mode");
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
            let finding = Finding::error(
                FindingLocation::Key(path.to_owned()),
                "a listener with `tls` would send its clients to itself",
            );
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
        let mut names = FirstPaths::<String>::default();
        for (index, passthrough) in listener.passthrough.iter().enumerate() {
            let at = self.item(&format!("{path}.passthrough"), index);
            self.relay(&passthrough.upstream, passthrough.idle, &at);
            if passthrough.sni.is_empty() {
                let finding = Finding::error(value(format!("{at}.sni")), "no name is passed through");
                self.wrong(finding.label("expected at least one name"));
            }
            for (number, name) in passthrough.sni.iter().enumerate() {
                let location = format!("{at}.sni[{number}]");
                let rest = name.strip_prefix("*.").unwrap_or(name);
                if !rest.split('.').all(is_label) {
                    let finding = Finding::error(value(&location), format!("`{name}` is not a host name"));
                    self.wrong(finding.label("expected a name such as `db.example.com` or `*.example.com`"));
                } else if let Some(first) = FirstPaths::first(&mut names, &name.to_ascii_lowercase(), location.clone())
                {
                    self.twice(location, first, format!("`{name}` is passed through twice"));
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
            let at = FindingLocation::Key(format!("{path}.{key}"));
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

    pub(super) fn tls(&mut self, tls: &Tls, path: &str) {
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
                let finding =
                    Finding::error(FindingLocation::Key(at), format!("`{key}` has no effect without tickets"));
                self.wrong(finding.label("leave it out, or `enabled: false`"));
            }
        }
        if tls.tickets.keys_file.is_some() && rotates {
            let finding = Finding::error(
                FindingLocation::Key(format!("{path}.tickets.rotate")),
                "Forebay does not rotate the keys of a file: the program that writes the file does",
            );
            self.wrong(finding.label("leave it out, or `keys_file`"));
        }
    }
}
