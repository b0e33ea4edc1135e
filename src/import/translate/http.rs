//! Everything outside servers: the process, `http`, `stream`, and listeners.

use super::super::grammar::Directive;
use super::place::{self, Server};
use super::{Levels, Listener, Work, bytes, every, last, time, upstream};
use crate::config::write::{Map, Node};

/// Translates settings of the process.
pub fn main<'d>(work: &mut Work<'d>, directives: &'d [Directive]) {
    for directive in directives {
        match &*directive.name {
            "worker_processes" if directive.word(0) == "auto" => {
                work.top.at("server").put("threads", Node::text("auto"));
                work.done(directive);
            }
            "worker_processes" => {
                work.top.at("server").put("threads", Node::word(directive.word(0)));
                work.done(directive);
            }
            "user" => {
                work.top.at("server").put("user", Node::text(directive.word(0)));
                work.done(directive);
            }
            _ => {}
        }
    }
}

/// A parsed `listen`.
struct Listen<'d> {
    directive: Option<&'d Directive>,
    key: String,
    address: String,
    tls: bool,
    http2: bool,
    proxy_protocol: bool,
    default: bool,
}

/// Translates `http`.
pub fn http<'d>(work: &mut Work<'d>, main: &'d [Directive], directives: &'d [Directive]) {
    let blocks: Vec<&Directive> = directives.iter().filter(|one| one.name == "upstream").collect();
    let mut servers = Vec::new();
    for block in directives.iter().filter(|one| one.name == "server") {
        let number = servers.len();
        let levels: Levels<'_> = vec![main, directives, block.inside()];
        let mut listens: Vec<Listen<'_>> =
            block.inside().iter().filter(|one| one.name == "listen").map(|one| listen(work, one)).collect();
        if listens.is_empty() {
            listens.push(anywhere(None, "80"));
        }
        let http2 = last(&levels, "http2").filter(|directive| directive.word(0) == "on");
        if let Some(directive) = last(&levels, "http2") {
            work.done(directive);
        }
        let ssl = last(&levels, "ssl").filter(|directive| directive.word(0) == "on");
        for mut listen in listens {
            listen.tls |= ssl.is_some();
            listen.http2 |= http2.is_some();
            join(work, listen, number, &levels);
        }
        servers.push(Server::new(work, block, levels));
    }
    for index in 0..work.listeners.len() {
        settings(work, index, &servers);
    }
    proxies(work, directives);
    logs(work, directives);
    if servers.iter().any(|server| last(&server.levels, "merge_slashes").is_some_and(|it| it.word(0) == "off")) {
        work.top.at("paths").put("merge_slashes", Node::word(false));
    }
    for server in &servers {
        work.value(&server.levels, "merge_slashes");
    }
    place::servers(work, &servers, &blocks);
}

/// Translates `stream`: forwarded connections.
pub fn stream<'d>(work: &mut Work<'d>, directives: &'d [Directive]) {
    let blocks: Vec<&Directive> = directives.iter().filter(|one| one.name == "upstream").collect();
    for block in directives.iter().filter(|one| one.name == "server") {
        let levels: Levels<'_> = vec![directives, block.inside()];
        let Some(passed) = last(&levels, "proxy_pass") else { continue };
        if passed.word(0).contains('$') {
            work.lost(passed, "write `passthrough: [ { sni: [name], upstream: … } ]` on a listener for each name");
            continue;
        }
        work.done(block);
        work.done(passed);
        let mut map = Map::default();
        match blocks.iter().find(|one| one.word(0) == passed.word(0)) {
            Some(block) => upstream::endpoints(work, block, &mut map, 0),
            None => {
                let endpoint = Map::default().with("address", Node::text(passed.word(0)));
                map.put("endpoints", Node::List(vec![Node::Map(endpoint)]));
            }
        }
        if let Some(time) = work.value(&levels, "proxy_connect_timeout").and_then(time) {
            map.at("timeouts").put("connect", Node::text(time));
        }
        if work.value(&levels, "proxy_protocol") == Some("on") {
            map.put("proxy_protocol", Node::text("v2"));
        }
        let name = super::slug(passed.word(0));
        let name = if work.upstreams.iter().any(|(known, other)| *known == name && *other != map) {
            format!("{name}-tcp")
        } else {
            name
        };
        if !work.upstreams.iter().any(|(known, _)| *known == name) {
            work.upstreams.push((name.clone(), map));
        }
        for directive in block.inside().iter().filter(|one| one.name == "listen") {
            let listen = listen(work, directive);
            if listen.tls {
                work.lost(directive, "TLS that is ended here carries HTTP; `passthrough` passes it on as it is");
            }
            let mut tcp = Map::default().with("upstream", Node::text(name.clone()));
            if let Some(time) = work.value(&levels, "proxy_timeout").and_then(time) {
                tcp.put("idle", Node::text(time));
            }
            let number = usize::MAX;
            join(work, Listen { tls: false, ..listen }, number, &levels);
            if let Some(listener) = work.listeners.last_mut() {
                listener.name = listener.name.replace("http-", "tcp-");
                listener.keys.put("tcp", Node::Map(tcp));
            }
        }
    }
}

fn anywhere<'d>(directive: Option<&'d Directive>, port: &str) -> Listen<'d> {
    let (key, address) = (format!("*:{port}"), format!("0.0.0.0:{port}"));
    Listen { directive, key, address, tls: false, http2: false, proxy_protocol: false, default: false }
}

fn listen<'d>(work: &mut Work<'d>, directive: &'d Directive) -> Listen<'d> {
    let written = directive.word(0);
    work.done(directive);
    let mut listen = match written.rsplit_once(':').filter(|_| !written.starts_with("unix:")) {
        Some(("*" | "0.0.0.0", port)) => anywhere(Some(directive), port),
        // One listener serves IPv6 and IPv4 on the same port.
        Some(("[::]", port)) => Listen { address: format!("[::]:{port}"), ..anywhere(Some(directive), port) },
        Some((host, port)) if !port.contains(']') => {
            let address = format!("{host}:{port}");
            Listen { key: address.clone(), address, ..anywhere(Some(directive), port) }
        }
        _ if written.starts_with("unix:") => {
            Listen { key: written.to_owned(), address: written.to_owned(), ..anywhere(Some(directive), "") }
        }
        _ if written.bytes().all(|byte| byte.is_ascii_digit()) => anywhere(Some(directive), written),
        _ => {
            let address = format!("{written}:80");
            Listen { key: address.clone(), address, ..anywhere(Some(directive), "80") }
        }
    };
    for word in directive.words.iter().skip(1) {
        match word.split('=').next().unwrap_or_default() {
            "ssl" => listen.tls = true,
            "http2" | "spdy" => listen.http2 = true,
            "proxy_protocol" => listen.proxy_protocol = true,
            "default_server" | "default" => listen.default = true,
            "quic" => work.differs(directive, "there is no HTTP/3"),
            "reuseport" | "deferred" | "backlog" | "rcvbuf" | "sndbuf" | "so_keepalive" | "ipv6only" | "fastopen"
            | "bind" | "setfib" => {}
            other => work.differs(directive, format!("`{other}` has no equivalent")),
        }
    }
    listen
}

/// Adds a server to the listener of its `listen`.
fn join<'d>(work: &mut Work<'d>, listen: Listen<'d>, number: usize, levels: &Levels<'d>) {
    // HTTP/3 uses UDP, next to a TCP listener with the same port.
    if let Some(directive) = listen.directive
        && directive.words.iter().any(|word| word == "quic")
    {
        return;
    }
    let found = work.listeners.iter().position(|known| known.key == listen.key);
    let index = found.unwrap_or_else(|| {
        let kind = if listen.tls { "https" } else { "http" };
        let place = listen.key.trim_start_matches("*:");
        let name = super::slug(&format!("{kind}-{}", place.trim_start_matches("unix:")));
        work.listeners.push(Listener {
            key: listen.key.clone(),
            address: listen.address.clone(),
            name,
            tls: false,
            http2: false,
            proxy_protocol: false,
            default: number,
            servers: Vec::new(),
            levels: levels.clone(),
            redirect: None,
            keys: Map::default(),
        });
        work.listeners.len() - 1
    });
    let listener = &mut work.listeners[index];
    listener.tls |= listen.tls;
    listener.http2 |= listen.http2;
    listener.proxy_protocol |= listen.proxy_protocol;
    if listen.address.starts_with("[::]") {
        listener.address = listen.address;
    }
    if listen.default {
        listener.default = number;
        listener.levels = levels.clone();
    }
    if !listener.servers.contains(&number) {
        listener.servers.push(number);
    }
}

/// The settings of a listener, from its default server.
fn settings<'d>(work: &mut Work<'d>, index: usize, all: &[Server<'d>]) {
    let listener = &work.listeners[index];
    if listener.keys.find("tcp").is_some() {
        return;
    }
    let (levels, members) = (listener.levels.clone(), listener.servers.clone());
    let (secure, http2, proxy_protocol, default) =
        (listener.tls, listener.http2, listener.proxy_protocol, listener.default);
    let servers: Vec<&Server<'_>> = members.iter().filter_map(|number| all.get(*number)).collect();
    let mut keys = Map::default();
    match (secure, http2) {
        (true, false) => keys.put("protocols", Node::texts(["http1"])),
        (false, true) => keys.put("protocols", Node::texts(["http1", "h2c"])),
        _ => {}
    }
    if proxy_protocol {
        let from: Vec<String> = every(&levels, "set_real_ip_from").iter().map(|one| one.word(0).to_owned()).collect();
        let from = if from.is_empty() { vec!["0.0.0.0/0".to_owned(), "::/0".to_owned()] } else { from };
        keys.at("proxy_protocol").put("from", Node::texts(from));
    }
    if !secure {
        let redirects: Vec<_> = servers.iter().map(|server| place::to_https(server)).collect();
        if let Some(Some(first)) = redirects.first().copied()
            && redirects.iter().all(|redirect| *redirect == Some(first))
        {
            work.listeners[index].redirect = Some(first);
        }
    }
    if secure {
        keys.put("tls", Node::Map(tls(work, &servers, all.get(default), &levels)));
    }
    if matches!(work.value(&levels, "underscores_in_headers"), Some("on"))
        || matches!(work.value(&levels, "ignore_invalid_headers"), Some("off"))
    {
        keys.put("odd_header_names", Node::text("keep"));
    }
    limits(work, &levels, &mut keys);
    work.listeners[index].keys = keys;
}

fn limits<'d>(work: &mut Work<'d>, levels: &Levels<'d>, keys: &mut Map) {
    if let Some(directive) = last(levels, "large_client_header_buffers") {
        let count = directive.word(0).parse::<u64>().ok();
        if let Some(size) = count.zip(bytes(directive.word(1))).map(|(count, size)| count * size) {
            keys.at("limits").put("header_bytes", Node::text(format!("{}KiB", (size / 1024).clamp(1, 1024))));
            work.done(directive);
        }
    }
    if let Some(count) = work.value(levels, "keepalive_requests").filter(|count| count.parse::<u32>().is_ok()) {
        keys.at("limits").put("requests_per_connection", Node::word(count));
    }
    if let Some(count) = work.value(levels, "http2_max_concurrent_streams").filter(|count| count.parse::<u32>().is_ok())
    {
        keys.at("limits").put("streams", Node::word(count));
    }
    for directive in every(levels, "limit_conn") {
        let zone = every(levels, "limit_conn_zone").into_iter().find(|zone| {
            zone.word(1).strip_prefix("zone=").and_then(|zone| zone.split(':').next()) == Some(directive.word(0))
        });
        let by_address = zone.is_some_and(|zone| zone.word(0).contains("remote_addr"));
        if let Some(zone) = zone.filter(|_| by_address) {
            work.done(zone);
        }
        if by_address && directive.word(1).parse::<u32>().is_ok() {
            keys.at("limits").put("requests_per_ip", Node::word(directive.word(1)));
            work.differs(directive, "it holds for all of the listener, and one more is answered 429");
        }
    }
    if let Some(time) = work.value(levels, "client_header_timeout").and_then(time) {
        keys.at("timeouts").put("header", Node::text(time));
    }
    if let Some(directive) = last(levels, "keepalive_timeout") {
        work.done(directive);
        match time(directive.word(0)) {
            Some(time) => keys.at("timeouts").put("idle", Node::text(time)),
            None => keys.at("limits").put("requests_per_connection", Node::word(1)),
        }
    }
}

/// The TLS settings of a listener, with the certificates of all its servers.
fn tls<'d>(work: &mut Work<'d>, servers: &[&Server<'d>], default: Option<&Server<'d>>, levels: &Levels<'d>) -> Map {
    // Certificates with their keys and settings, and their names; empty: the names in the certificate.
    let mut certificates: Vec<(Map, Vec<String>)> = Vec::new();
    for server in servers {
        let chains = every(&server.levels, "ssl_certificate");
        let keys = every(&server.levels, "ssl_certificate_key");
        for (chain, key) in chains.into_iter().zip(keys) {
            if chain.word(0).contains('$') {
                work.lost(chain, "the file must be the same for all clients: name one for each host");
                continue;
            }
            work.done(chain);
            work.done(key);
            let mut map = Map::default().with("cert", Node::text(chain.word(0))).with("key", Node::text(key.word(0)));
            if let Some(client) = client(work, &server.levels) {
                map.put("client", Node::Map(client));
            }
            match certificates.iter_mut().find(|(known, _)| *known == map) {
                Some((_, names)) if names.is_empty() || server.hosts.is_empty() => names.clear(),
                Some((_, names)) => {
                    names.extend(server.hosts.iter().filter(|host| !names.contains(host)).cloned().collect::<Vec<_>>())
                }
                None => certificates.push((map, server.hosts.clone())),
            }
        }
    }
    if certificates.is_empty() {
        // A configuration that does not start is safer than one with clear text.
        if let Some(directive) = last(levels, "listen") {
            work.lost(directive, "no `ssl_certificate` is known here: name the files of one in `tls`");
        }
        let unknown = Map::default().with("cert", Node::text("/certificate.pem")).with("key", Node::text("/key.pem"));
        certificates.push((unknown, Vec::new()));
    }
    let list = certificates.into_iter().map(|(mut map, names)| {
        if !names.is_empty() {
            map.put("names", Node::texts(names));
        }
        Node::Map(map)
    });
    let mut tls = Map::default().with("certificates", Node::List(list.collect()));
    let name = default.and_then(|server| server.hosts.iter().find(|host| !host.starts_with('*')));
    if let Some(name) = name {
        tls.put("default", Node::text(name));
    }
    if let Some(directive) = last(levels, "ssl_protocols") {
        let old = directive.words.iter().any(|word| matches!(word.as_str(), "TLSv1" | "TLSv1.1" | "SSLv3" | "SSLv2"));
        if old {
            work.differs(directive, "TLS 1.2 is the oldest version that is spoken");
        } else {
            work.done(directive);
        }
        if !directive.words.iter().any(|word| word == "TLSv1.2") && !old {
            tls.put("min_version", Node::text("1.3"));
        }
    }
    tls
}

fn client<'d>(work: &mut Work<'d>, levels: &Levels<'d>) -> Option<Map> {
    let verify = last(levels, "ssl_verify_client").filter(|directive| directive.word(0) != "off")?;
    let ca = last(levels, "ssl_client_certificate");
    let Some(ca) = ca.filter(|_| verify.word(0) != "optional_no_ca") else {
        work.lost(verify, "a client certificate is checked against a CA: name it in `client.ca`");
        return None;
    };
    work.done(verify);
    work.done(ca);
    let mode = if verify.word(0) == "optional" { "optional" } else { "required" };
    let mut map = Map::default().with("mode", Node::text(mode)).with("ca", Node::text(ca.word(0)));
    if let Some(crl) = work.value(levels, "ssl_crl") {
        map.put("crl", Node::text(crl));
    }
    Some(map)
}

/// Translates trusted proxies.
fn proxies<'d>(work: &mut Work<'d>, directives: &'d [Directive]) {
    let blocks = directives.iter().filter(|one| one.name == "server").map(Directive::inside);
    let mut from: Vec<String> = Vec::new();
    for level in [directives].into_iter().chain(blocks) {
        for directive in level {
            match &*directive.name {
                "set_real_ip_from" => {
                    work.done(directive);
                    let network = directive.word(0).replace("unix:", "unix");
                    if !from.contains(&network) {
                        from.push(network);
                    }
                }
                "real_ip_header" => match directive.word(0).to_ascii_lowercase().as_str() {
                    "x-forwarded-for" | "proxy_protocol" => work.done(directive),
                    _ => work.lost(
                        directive,
                        "the client is read from `X-Forwarded-For`, `Forwarded` or the PROXY protocol",
                    ),
                },
                _ => {}
            }
        }
    }
    if !from.is_empty() {
        work.top.put("trusted_proxies", Node::texts(from));
    }
}

/// Translates access logs; Forebay has a single one.
fn logs<'d>(work: &mut Work<'d>, directives: &'d [Directive]) {
    fn collect<'d>(level: &'d [Directive], found: &mut Vec<&'d Directive>) {
        for directive in level {
            if directive.name == "access_log" {
                found.push(directive);
            }
            collect(directive.inside(), found);
        }
    }
    let mut found = Vec::new();
    collect(directives, &mut found);
    let off = |directive: &&&Directive| directive.word(0) == "off";
    let Some(first) = found.iter().find(|directive| !off(directive) && !directive.word(0).starts_with("syslog:"))
    else {
        for directive in &found {
            if off(&directive) {
                work.done(directive);
                work.top.at("observability").at("access_log").put("path", Node::word("off"));
            } else {
                work.lost(directive, "a log goes to standard output, to standard error or to a file");
            }
        }
        return;
    };
    let first = *first;
    let path = match first.word(0) {
        "/dev/stdout" => "stdout",
        "/dev/stderr" => "stderr",
        path => path,
    };
    let log = work.top.at("observability").at("access_log");
    log.put("path", Node::text(path));
    log.put("format", Node::text("combined"));
    match first.word(1) {
        "" | "combined" => work.done(first),
        other => work.differs(
            first,
            format!("the format is `combined` and not `{other}`; `format: json` has the phases as well"),
        ),
    }
    for directive in found.into_iter().filter(|other| !std::ptr::eq(*other, first)) {
        if directive.word(0) == first.word(0) {
            work.done(directive);
        } else {
            work.differs(directive, "there is one log for all: its lines have the listener, the host and the route");
        }
    }
}
