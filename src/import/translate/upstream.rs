//! Backends: `upstream` blocks, and the targets of `proxy_pass`.

use super::super::grammar::Directive;
use super::super::text::{Piece, Variables, pieces};
use super::{Levels, Work, bytes, every, last, time};
use crate::config::write::{Map, Node};

/// The target of `proxy_pass` and similar directives.
#[derive(Clone, Debug, PartialEq)]
pub struct Target {
    /// The name of an `upstream`, a host with a port, or a unix socket.
    pub host: String,
    /// Whether it uses TLS.
    pub tls: bool,
    /// Whether it uses gRPC.
    pub grpc: bool,
    /// The path after the host, if there is one.
    pub path: Option<String>,
}

impl Target {
    /// Parses the argument of `proxy_pass` or `grpc_pass`.
    ///
    /// # Errors
    ///
    /// The part without an equivalent.
    pub fn read(directive: &Directive, variables: &Variables) -> Result<Target, String> {
        let written = directive.word(0);
        let url = match variables.made(written)? {
            super::Made::Fixed(url) => url,
            // A variable with the whole path is equivalent to no path.
            super::Made::Cel(_) => match pieces(written).split_last() {
                Some((Piece::Variable(last), rest)) if matches!(&**last, "request_uri" | "uri") && all_text(rest) => {
                    written[..written.rfind('$').unwrap_or(0)].trim_end_matches('/').to_owned()
                }
                _ => return Err("the backend depends on the request: write a route with `match` for each".to_owned()),
            },
        };
        let grpc = directive.name == "grpc_pass";
        let (scheme, rest) = url.split_once("://").unwrap_or((if grpc { "grpc" } else { "http" }, &url));
        let tls = match scheme {
            "http" | "grpc" => false,
            "https" | "grpcs" => true,
            _ => return Err(format!("`{scheme}` is not a backend scheme")),
        };
        if let Some(socket) = rest.strip_prefix("unix:") {
            let (socket, path) = socket.split_once(':').map_or((socket, None), |(socket, path)| (socket, Some(path)));
            return Ok(Target { host: format!("unix:{socket}"), tls, grpc, path: path.map(str::to_owned) });
        }
        let at = rest.find('/').unwrap_or(rest.len());
        let path = (at < rest.len()).then(|| rest[at..].to_owned());
        Ok(Target { host: rest[..at].to_owned(), tls, grpc, path })
    }

    /// nginx's default `Host` for the backend.
    pub fn proxy_host(&self) -> &str {
        if self.host.starts_with("unix:") { "localhost" } else { &self.host }
    }

    /// The URL without its path.
    pub fn origin(&self) -> String {
        format!("{}://{}", if self.tls { "https" } else { "http" }, self.host)
    }
}

fn all_text(pieces: &[Piece]) -> bool {
    pieces.iter().all(|piece| matches!(piece, Piece::Text(_)))
}

/// The name of the upstream for this target with the settings of this place; creates it if necessary.
pub fn upstream<'d>(work: &mut Work<'d>, target: &Target, levels: &Levels<'d>, blocks: &[&'d Directive]) -> String {
    let block = blocks.iter().copied().find(|block| block.word(0) == target.host);
    let mut map = Map::default();
    match (target.grpc, target.tls) {
        (true, true) => map.put("protocol", Node::text("h2")),
        (true, false) => map.put("protocol", Node::text("h2c")),
        _ => {}
    }
    if target.tls {
        map.put("tls", Node::Map(tls(work, levels, target.grpc)));
    }
    match block {
        Some(block) => endpoints(work, block, &mut map, if target.tls { 443 } else { 80 }),
        None => {
            let address = with_port(&target.host, if target.tls { 443 } else { 80 });
            let endpoint = Map::default().with("address", Node::text(address));
            map.put("endpoints", Node::List(vec![Node::Map(endpoint)]));
        }
    }
    let prefix = if target.grpc { "grpc" } else { "proxy" };
    for (name, key) in [("connect", "connect"), ("send", "send"), ("read", "receive")] {
        if let Some(directive) = last(levels, &format!("{prefix}_{name}_timeout")) {
            match time(directive.word(0)) {
                Some(time) => {
                    if key == "receive" {
                        map.at("timeouts").put("wait", Node::text(time.clone()));
                    }
                    map.at("timeouts").put(key, Node::text(time));
                    work.done(directive);
                }
                None => work.lost(directive, "a time is longer than nothing"),
            }
        }
    }
    let wanted = super::slug(block.map_or(&*target.host, |block| block.word(0)));
    for number in 1.. {
        let name = if number == 1 { wanted.clone() } else { format!("{wanted}-{number}") };
        match work.upstreams.iter().find(|(known, _)| *known == name) {
            Some((_, known)) if *known == map => return name,
            Some(_) => {}
            None => {
                work.upstreams.push((name.clone(), map));
                return name;
            }
        }
    }
    wanted
}

/// TLS settings of an upstream: nginx verifies certificates only if configured.
fn tls<'d>(work: &mut Work<'d>, levels: &Levels<'d>, grpc: bool) -> Map {
    let prefix = if grpc { "grpc_ssl" } else { "proxy_ssl" };
    let mut map = Map::default();
    let verify = work.value(levels, &format!("{prefix}_verify")) == Some("on");
    map.put("verify", Node::word(verify));
    for (name, key) in [
        ("trusted_certificate", "ca"),
        ("certificate", "certificate"),
        ("certificate_key", "key"),
        ("name", "server_name"),
    ] {
        let Some(directive) = last(levels, &format!("{prefix}_{name}")) else { continue };
        if directive.word(0).contains('$') {
            work.differs(directive, "the name of the endpoint is asked for");
        } else if key != "ca" || verify {
            map.put(key, Node::text(directive.word(0)));
            work.done(directive);
        }
    }
    work.value(levels, &format!("{prefix}_server_name"));
    work.value(levels, &format!("{prefix}_verify_depth"));
    map
}

/// The endpoints of an `upstream` block, and its load balancing.
pub fn endpoints<'d>(work: &mut Work<'d>, block: &'d Directive, map: &mut Map, port: u16) {
    let mut list = Vec::new();
    let (mut policy, mut hash) = (Some("round_robin"), None);
    work.done(block);
    for directive in block.inside() {
        match &*directive.name {
            "server" => {
                work.done(directive);
                let mut endpoint = Map::default().with("address", Node::text(with_port(directive.word(0), port)));
                let mut down = false;
                for word in directive.words.iter().skip(1) {
                    match word.split_once('=').unwrap_or((word, "")) {
                        ("weight", weight) => endpoint.put("weight", Node::word(weight)),
                        ("backup", _) => endpoint.put("backup", Node::word(true)),
                        ("down", _) => down = true,
                        ("max_fails", "0") => {
                            map.at("outlier_detection").put("connect_failures", Node::word("unlimited"))
                        }
                        ("max_fails", count) => map.at("outlier_detection").put("connect_failures", Node::word(count)),
                        ("fail_timeout", "0") => {}
                        ("fail_timeout", written) => match time(written) {
                            Some(time) => map.at("outlier_detection").put("base_ejection", Node::text(time)),
                            None => work.lost(directive, "an ejection has a time"),
                        },
                        ("max_conns", count) => {
                            map.at("limits").at("endpoint").put("connections", Node::word(count));
                        }
                        ("resolve", _) => {}
                        ("slow_start", written) => {
                            if let Some(time) = time(written) {
                                map.at("load_balancing").put("slow_start", Node::text(time));
                            }
                        }
                        (other, _) => work.differs(directive, format!("`{other}` has no equivalent")),
                    }
                }
                if down {
                    work.differs(directive, "an endpoint that is down is left out");
                } else {
                    list.push(Node::Map(endpoint));
                }
            }
            "least_conn" => {
                policy = None;
                work.done(directive);
            }
            "ip_hash" => {
                (policy, hash) = (Some("ring_hash"), Some(Node::text("client_ip")));
                work.differs(directive, "other clients share an endpoint than in nginx, and fewer move when one goes");
            }
            "random" => {
                policy = Some("random");
                work.done(directive);
            }
            "hash" => match key(directive.word(0)) {
                Some(key) => {
                    (policy, hash) = (Some("ring_hash"), Some(key));
                    work.differs(directive, "other keys share an endpoint than in nginx");
                }
                None => work.lost(directive, "this is not a key that Forebay can hash"),
            },
            "keepalive_timeout" => {
                if let Some(time) = time(directive.word(0)) {
                    map.at("keepalive").put("idle", Node::text(time));
                    work.done(directive);
                }
            }
            "keepalive_time" => {
                if let Some(time) = time(directive.word(0)) {
                    map.at("keepalive").put("max_age", Node::text(time));
                    work.done(directive);
                }
            }
            _ => {}
        }
    }
    if list.is_empty() {
        list.push(Node::Map(Map::default().with("address", Node::text("127.0.0.1:9"))));
        work.lost(block, "no endpoint is left: 127.0.0.1:9 is a placeholder");
    }
    if list.len() > 1 {
        if let Some(policy) = policy {
            map.at("load_balancing").put("policy", Node::text(policy));
        }
        if let Some(key) = hash {
            map.at("load_balancing").put("hash_key", Node::List(vec![key]));
        }
    }
    map.put("endpoints", Node::List(list));
}

/// The key of a hash or a limit.
pub fn key(written: &str) -> Option<Node> {
    let one = |key: &str, name: &str| Some(Node::Map(Map::default().with(key, Node::text(name))));
    match pieces(written).as_slice() {
        [Piece::Variable(name)] => match name.as_str() {
            "remote_addr" | "binary_remote_addr" => Some(Node::text("client_ip")),
            "uri" | "document_uri" => one("cel", "request.path"),
            name => match (name.strip_prefix("http_"), name.strip_prefix("cookie_"), name.strip_prefix("arg_")) {
                (Some(header), _, _) if header != "host" => one("header", &header.replace('_', "-")),
                (_, Some(cookie), _) => one("cookie", cookie),
                (_, _, Some(argument)) => one("query", argument),
                _ => Variables::default().made(written).ok().map(|made| Node::cel(made.expression())),
            },
        },
        _ => Variables::default().made(written).ok().map(|made| Node::cel(made.expression())),
    }
}

/// An address with a port; nginx allows it to be omitted.
fn with_port(host: &str, port: u16) -> String {
    let has = host.starts_with("unix:") || host.rsplit_once(':').is_some_and(|(_, port)| !port.contains(']'));
    if has { host.to_owned() } else { format!("{host}:{port}") }
}

/// When a request is retried at another endpoint.
pub fn retry<'d>(work: &mut Work<'d>, levels: &Levels<'d>, prefix: &str) -> Option<Map> {
    let mut map = Map::default();
    if let Some(directive) = last(levels, &format!("{prefix}_next_upstream")) {
        let mut on = Vec::new();
        work.done(directive);
        for word in &directive.words {
            match word.as_str() {
                "error" => on.extend(["connect_error".to_owned(), "reset".to_owned()]),
                "timeout" => on.push("timeout".to_owned()),
                "off" => map.put("attempts", Node::word(1)),
                "non_idempotent" => map.put("non_idempotent", Node::word(true)),
                "invalid_header" => work.differs(directive, "an invalid response counts as `reset`"),
                status => match status.strip_prefix("http_") {
                    Some(code) if code.starts_with('5') || code == "429" || code == "403" || code == "404" => {
                        on.push(code.to_owned());
                    }
                    _ => work.differs(directive, format!("`{status}` has no equivalent")),
                },
            }
        }
        if !on.is_empty() && map.find("attempts").is_none() {
            let word = |word: String| if word.parse::<u16>().is_ok() { Node::word(word) } else { Node::text(word) };
            map.put("on", Node::List(on.into_iter().map(word).collect()));
        }
    }
    if let Some(directive) = last(levels, &format!("{prefix}_next_upstream_tries"))
        && let Ok(tries) = directive.word(0).parse::<u32>()
    {
        work.done(directive);
        if tries > 0 {
            map.put("attempts", Node::word(tries.min(10)));
        }
    }
    (!map.is_empty()).then_some(map)
}

/// Buffering of bodies.
pub fn buffering<'d>(work: &mut Work<'d>, levels: &Levels<'d>) -> Map {
    let mut map = Map::default();
    if work.value(levels, "proxy_request_buffering") == Some("off") {
        map.at("request").put("mode", Node::text("stream"));
    }
    if let Some(size) = last(levels, "client_body_buffer_size") {
        work.done(size);
        if let Some(size) = super::size(size.word(0)) {
            map.at("request").put("memory", Node::text(size));
        }
    }
    // nginx's default is 1 MiB.
    let most = work.value(levels, "client_max_body_size").unwrap_or("1m");
    let most = if most == "0" { Some("1024GiB".to_owned()) } else { super::size(most) };
    map.at("request").put("max_body", Node::text(most.unwrap_or_else(|| "1MiB".to_owned())));
    if work.value(levels, "proxy_buffering") == Some("off") {
        map.at("response").put("mode", Node::text("stream"));
    }
    if let [directive] = every(levels, "proxy_buffers").as_slice() {
        work.done(directive);
        let size =
            directive.word(0).parse::<u64>().ok().zip(bytes(directive.word(1))).map(|(count, size)| count * size);
        if let Some(size) = size.filter(|size| *size >= 1024) {
            map.at("response").put("memory", Node::text(format!("{}KiB", size / 1024)));
        }
    }
    if let Some(directive) = last(levels, "proxy_max_temp_file_size") {
        work.done(directive);
        let size = if directive.word(0) == "0" { Some("0B".to_owned()) } else { super::size(directive.word(0)) };
        if let Some(size) = size {
            map.at("response").put("disk", Node::text(size));
        }
    }
    map
}
