//! Servers and their locations: which requests they match, and how these are handled.

use super::super::grammar::Directive;
use super::super::location::{self, Asks, Path, Placed};
use super::super::text::{Made, Piece, Variables, literal, pieces, regular, whole};
use super::upstream::{self, Target};
use super::{Levels, Work, any_of, bodies, checks, every, last, node, time};
use crate::config::write::{Map, Node};

/// A server.
pub struct Server<'d> {
    block: &'d Directive,
    /// The enclosing blocks and its own.
    pub levels: Levels<'d>,
    /// Its hosts, in the form of routes.
    pub hosts: Vec<String>,
    /// Conditions for further hosts: names that end with `.*`, the longest first, and patterns.
    patterns: Vec<(std::cmp::Reverse<usize>, String)>,
}

/// A location under construction.
struct Location<'d> {
    asks: Asks,
    block: &'d Directive,
    levels: Levels<'d>,
}

/// How the requests of a location are handled.
#[derive(Clone, Default)]
struct Content {
    filters: Vec<Node>,
    upstream: Option<String>,
    /// Further keys of the route.
    keys: Map,
    /// A proxy location that ends with a slash redirects requests without the slash to it.
    adds_slash: bool,
    /// Fields added to every response.
    fields: Vec<Node>,
    /// Comments for the reader.
    comments: Vec<String>,
}

impl Content {
    /// The same with a response of this status in place of a backend, and the reason as a comment.
    fn answered(mut self, status: u16, comment: &str) -> Content {
        self.filters.push(filter("respond", Map::default().with("status", Node::word(status))));
        self.comments.push(comment.to_owned());
        self
    }
}

/// The result of the rewrite module's directives.
#[derive(Default)]
struct Rewrites {
    filters: Vec<Node>,
    /// No request passes them.
    answers: bool,
    /// Conditions under which a path was rewritten.
    rewritten: Vec<String>,
}

impl<'d> Server<'d> {
    /// Parses the names of a server.
    pub fn new(work: &mut Work<'d>, block: &'d Directive, levels: Levels<'d>) -> Server<'d> {
        let mut hosts: Vec<String> = Vec::new();
        let mut patterns = Vec::new();
        for directive in block.inside().iter().filter(|one| one.name == "server_name") {
            work.done(directive);
            for word in &directive.words {
                let name = word.to_ascii_lowercase();
                let plain = |name: &str| {
                    !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b".-_".contains(&byte))
                };
                let mut add = |name: String| {
                    if !hosts.contains(&name) {
                        hosts.push(name);
                    }
                };
                if name == "_" || name.is_empty() {
                    // This matches no host: the server is meant for unknown hosts.
                } else if let Some(rest) = name.strip_prefix('.').filter(|rest| plain(rest)) {
                    add(rest.to_owned());
                    add(format!("*.{rest}"));
                } else if plain(&name) || name.strip_prefix("*.").is_some_and(plain) {
                    add(name);
                } else if let Some(begin) = name.strip_suffix('*').filter(|begin| begin.ends_with('.') && plain(begin))
                {
                    let condition = format!("request.host.startsWith({})", literal(begin));
                    patterns.push((std::cmp::Reverse(begin.len()), condition));
                } else if let Some(pattern) = word.strip_prefix('~') {
                    match regular(pattern, false) {
                        Ok(pattern) => {
                            let condition = format!("request.host.matches({})", literal(&pattern));
                            patterns.push((std::cmp::Reverse(0), condition));
                        }
                        Err(why) => work.lost(directive, why),
                    }
                } else {
                    work.lost(directive, format!("`{word}` is not a host name"));
                }
            }
        }
        work.done(block);
        Server { block, levels, hosts, patterns }
    }
}

/// Port and status of the redirect, if a server redirects all requests to the same URL with HTTPS.
pub fn to_https(server: &Server<'_>) -> Option<(u16, u16)> {
    let inside = server.block.inside();
    let only = |directives: &[Directive]| {
        let mut found = None;
        for directive in directives {
            match &*directive.name {
                "listen" | "server_name" | "access_log" | "error_log" | "server_tokens" | "http2" => {}
                "return" if found.is_none() => {
                    found = Some((directive.word(0).to_owned(), directive.word(1).to_owned()))
                }
                "location" if directive.word(0) == "/" && directive.words.len() == 1 && found.is_none() => {
                    match directive.inside() {
                        [inner] if inner.name == "return" => {
                            found = Some((inner.word(0).to_owned(), inner.word(1).to_owned()));
                        }
                        _ => return None,
                    }
                }
                _ => return None,
            }
        }
        found
    };
    let (status, url) = only(inside)?;
    let status = status.parse().ok().filter(|status| [301, 302, 303, 307, 308].contains(status))?;
    let rest = url.strip_prefix("https://$host")?;
    let (port, rest) = match rest.strip_prefix(':') {
        Some(rest) => rest.split_at(rest.find('$')?),
        None => ("443", rest),
    };
    (rest == "$request_uri").then_some((port.parse().ok()?, status))
}

/// Creates the routes of all servers.
pub fn servers<'d>(work: &mut Work<'d>, servers: &[Server<'d>], blocks: &[&'d Directive]) {
    // Listeners without routes.
    let plain: Vec<usize> = (0..work.listeners.len())
        .filter(|index| {
            let listener = &work.listeners[*index];
            listener.redirect.is_none() && listener.keys.find("tcp").is_none()
        })
        .collect();
    let of = |work: &Work<'d>, number: usize| -> Vec<usize> {
        plain.iter().copied().filter(|index| work.listeners[*index].servers.contains(&number)).collect()
    };
    let mut patterns: Vec<(std::cmp::Reverse<usize>, usize, String)> = Vec::new();
    for (number, server) in servers.iter().enumerate() {
        patterns.extend(server.patterns.iter().map(|(length, condition)| (*length, number, condition.clone())));
    }
    // Names before patterns, the longest name first; patterns in file order.
    patterns.sort_by_key(|(length, ..)| *length);
    let told_apart =
        (0..servers.len()).map(|number| of(work, number)).filter(|on| !on.is_empty()).any(|on| on != plain);
    for (number, server) in servers.iter().enumerate() {
        for directive in server.block.inside().iter().filter(|one| ["return", "location"].contains(&&*one.name)) {
            if of(work, number).is_empty() {
                work.done(directive);
                directive.inside().iter().for_each(|inner| work.done(inner));
            }
        }
        let on = of(work, number);
        let (default, named): (Vec<usize>, Vec<usize>) =
            on.iter().partition(|index| work.listeners[**index].default == number);
        if !named.is_empty() && server.hosts.is_empty() && server.patterns.is_empty() {
            work.lost(server.block, "no request reaches it: it has no name, and another server takes unknown hosts");
        }
        // The patterns of this server, those with priority over it, and those of all other servers.
        let mine: Vec<&String> = server.patterns.iter().map(|(_, condition)| condition).collect();
        let before: Vec<&String> =
            patterns.iter().take_while(|(_, owner, _)| *owner != number).map(|(.., it)| it).collect();
        let others: Vec<&String> =
            patterns.iter().filter(|(_, owner, _)| *owner != number).map(|(.., it)| it).collect();
        let any = |conditions: &[&String]| {
            let conditions: Vec<&str> = conditions.iter().map(|condition| condition.as_str()).collect();
            (!conditions.is_empty()).then(|| format!("({})", conditions.join(" || ")))
        };
        let not = |conditions: &[&String]| any(conditions).map(|it| format!("!{it}"));
        // Requests for unknown hosts, and for its own names, use the same routes.
        for (indices, hosts, conditions) in [
            (default, Vec::new(), vec![not(&others)]),
            (if server.hosts.is_empty() { Vec::new() } else { named.clone() }, server.hosts.clone(), Vec::new()),
            (if mine.is_empty() { Vec::new() } else { named }, Vec::new(), vec![any(&mine), not(&before)]),
        ] {
            if indices.is_empty() {
                continue;
            }
            let names: Vec<String> = indices.iter().map(|index| literal(&work.listeners[*index].name)).collect();
            let listeners = told_apart.then(|| match names.as_slice() {
                [one] => format!("connection.listener == {one}"),
                several => format!("connection.listener in [{}]", several.join(", ")),
            });
            let all: Vec<String> = listeners.into_iter().chain(conditions.into_iter().flatten()).collect();
            let when = (!all.is_empty()).then(|| all.join(" && "));
            let port = match indices.as_slice() {
                [one] => work.listeners[*one].address.rsplit_once(':').map(|(_, port)| port.to_owned()),
                _ => None,
            };
            routes(work, server, &hosts, when.as_deref(), port.as_deref(), blocks);
        }
    }
}

fn routes<'d>(
    work: &mut Work<'d>,
    server: &Server<'d>,
    hosts: &[String],
    when: Option<&str>,
    port: Option<&str>,
    blocks: &[&'d Directive],
) {
    let name = server.hosts.first().cloned().unwrap_or_else(|| "default".to_owned());
    let mut variables = super::variables(work, &server.levels);
    let constant = |text: &str| Made::Fixed(text.to_owned());
    variables.known.insert("server_name".into(), constant(server.hosts.first().map_or("", |host| host)));
    if let Some(port) = port {
        variables.known.insert("server_port".into(), constant(port));
    }
    let first = rewrites(work, &variables, &server.levels, server.block.inside(), None);
    let make = |work: &mut Work<'d>, content: &Content, placed: Option<&Placed>, path: Path, label: &str| {
        let mut conditions: Vec<String> = when.iter().map(|when| (*when).to_owned()).collect();
        if let Some(placed) = placed {
            let begins = |prefix: &String| format!("request.path.startsWith({})", literal(prefix));
            conditions.extend(placed.within.iter().map(begins));
            conditions.extend(placed.except.iter().map(|prefix| format!("!{}", begins(prefix))));
        }
        let route = route(work, content, hosts, path, &conditions, &format!("{name}-{label}"));
        work.routes.push(route);
    };
    if first.answers {
        let content =
            Content { filters: fields_first(work, &variables, &server.levels, first.filters), ..Content::default() };
        make(work, &content, None, Path::Any, "");
        return;
    }
    let (mut locations, mut named) = (Vec::new(), Vec::new());
    collect(work, server.block.inside(), &server.levels, None, &mut locations, &mut named);
    let asks: Vec<Asks> = locations.iter().map(|location| location.asks.clone()).collect();
    let contents: Vec<Content> =
        locations.iter().map(|location| content(work, &variables, location, &first.filters, &named, blocks)).collect();
    let (placed, lost) = location::routes(&asks);
    for (number, why) in lost {
        work.lost(locations[number].block, why);
    }
    let mut exact: Vec<String> =
        asks.iter().filter_map(|asks| if let Asks::Exact(path) = asks { Some(path.clone()) } else { None }).collect();
    let label = |asks: &Asks| match asks {
        Asks::Exact(path) | Asks::Prefix(path) | Asks::Firm(path) => path.clone(),
        Asks::Regex { pattern, .. } => pattern.clone(),
    };
    for placed in &placed {
        let (content, asks) = (&contents[placed.location], &asks[placed.location]);
        let bare = asks.prefix().and_then(|prefix| prefix.strip_suffix('/')).filter(|bare| !bare.is_empty());
        if let Some(bare) = bare
            && !exact.iter().any(|path| path == bare)
            && (content.adds_slash || matches!(placed.path, Path::Prefix(_)))
        {
            exact.push(bare.to_owned());
            let other = others(&locations, bare).map(|number| &contents[number]);
            let mut sent = slash(bare);
            let before = content.fields.iter().chain(&first.filters).cloned();
            sent.filters = before.chain(sent.filters).collect();
            let nothing = nothing();
            let content = if content.adds_slash { &sent } else { other.unwrap_or(&nothing) };
            make(work, content, None, Path::Exact(bare.to_owned()), &format!("{}-slash", label(asks)));
        }
        make(work, content, Some(placed), placed.path.clone(), &label(asks));
    }
    if !asks.iter().any(|asks| asks.prefix() == Some("/")) {
        let fallback = last(&vec![server.block.inside()], "try_files")
            .filter(|directive| directive.words.last().is_some_and(|word| word.starts_with('@')));
        let there = fallback.and_then(|directive| {
            work.differs(directive, "Forebay serves no files: all requests go to the named location");
            named.iter().find(|other| other.block.words.last() == directive.words.last())
        });
        let mut content = match there {
            Some(there) => content(work, &variables, there, &[], &[], blocks),
            None => nothing(),
        };
        content.filters = first.filters.into_iter().chain(content.filters).collect();
        make(work, &content, None, Path::Any, "rest");
    }
}

/// The location with the longest prefix of a path.
fn others(locations: &[Location<'_>], path: &str) -> Option<usize> {
    let prefixes =
        locations.iter().enumerate().filter_map(|(number, location)| Some((number, location.asks.prefix()?)));
    prefixes
        .filter(|(_, prefix)| path.starts_with(prefix))
        .max_by_key(|(_, prefix)| prefix.len())
        .map(|(number, _)| number)
}

/// The response if a server has no file for a path.
fn nothing() -> Content {
    Content { filters: vec![filter("respond", Map::default().with("status", Node::word(404)))], ..Content::default() }
}

/// The response to a path without the slash of its location.
fn slash(bare: &str) -> Content {
    let to = format!("{} + (request.query == \"\" ? \"\" : \"?\" + request.query)", literal(&format!("{bare}/")));
    let map = Map::default().with("to", Node::cel(to)).with("status", Node::word(301));
    Content { filters: vec![filter("redirect", map)], ..Content::default() }
}

fn filter(name: &str, settings: Map) -> Node {
    Node::Map(Map::default().with(name, Node::Map(settings)))
}

fn filter_when(name: &str, settings: Map, when: Option<&str>) -> Node {
    let map = Map::default().with(name, Node::Map(settings));
    Node::Map(match when {
        Some(when) => map.with("when", Node::text(when)),
        None => map,
    })
}

fn route(work: &mut Work<'_>, content: &Content, hosts: &[String], path: Path, when: &[String], name: &str) -> Map {
    let mut map = Map::default().with("name", Node::text(work.name(name)));
    for comment in &content.comments {
        map.comment("name", comment.clone());
    }
    let mut matches = Map::default();
    if !hosts.is_empty() {
        matches.put("hosts", Node::texts(hosts));
    }
    match path {
        Path::Any => {}
        Path::Exact(path) => matches.at("path").put("exact", Node::text(path)),
        Path::Prefix(path) => matches.at("path").put("prefix", Node::text(path)),
        Path::Regex(pattern) => matches.at("path").put("regex", Node::text(pattern)),
    }
    if !when.is_empty() {
        matches.put("when", Node::text(when.join(" && ")));
    }
    if !matches.is_empty() {
        map.put("match", Node::Map(matches));
    }
    if !content.filters.is_empty() {
        map.put("filters", Node::List(content.filters.clone()));
    }
    if let Some(upstream) = &content.upstream {
        map.put("upstream", Node::text(upstream));
        for (key, value) in content.keys.clone().into_entries() {
            map.put(key, value);
        }
    }
    map
}

/// Collects all locations, including nested ones.
fn collect<'d>(
    work: &mut Work<'d>,
    directives: &'d [Directive],
    levels: &Levels<'d>,
    within: Option<&str>,
    locations: &mut Vec<Location<'d>>,
    named: &mut Vec<Location<'d>>,
) {
    for block in directives.iter().filter(|one| one.name == "location" && one.block.is_some()) {
        work.done(block);
        let (mark, path) = match block.words.as_slice() {
            [mark, path] => (mark.as_str(), path.clone()),
            // The modifier may be directly in front of the path, without a blank.
            _ => {
                let word = block.word(0);
                let mark = ["^~", "~*", "~", "="].into_iter().find(|mark| word.starts_with(mark)).unwrap_or_default();
                (mark, word[mark.len()..].to_owned())
            }
        };
        let asks = match mark {
            "=" => Asks::Exact(path.clone()),
            "^~" => Asks::Firm(path.clone()),
            "~" | "~*" => {
                Asks::Regex { pattern: path.clone(), any_case: mark == "~*", within: within.map(str::to_owned) }
            }
            _ => Asks::Prefix(path.clone()),
        };
        let inner: Levels<'d> = levels.iter().copied().chain([block.inside()]).collect();
        let location = Location { asks, block, levels: inner.clone() };
        if path.starts_with('@') {
            named.push(location);
            continue;
        }
        let within = location.asks.prefix().map(str::to_owned).or_else(|| within.map(str::to_owned));
        locations.push(location);
        collect(work, block.inside(), &inner, within.as_deref(), locations, named);
    }
}

/// How the requests of a location are handled.
fn content<'d>(
    work: &mut Work<'d>,
    variables: &Variables,
    location: &Location<'d>,
    first: &[Node],
    named: &[Location<'d>],
    blocks: &[&'d Directive],
) -> Content {
    let levels = &location.levels;
    let inside = location.block.inside();
    let mut variables = variables.clone();
    let own = super::variables(work, &vec![inside]);
    variables.known.extend(own.known);
    let comment = format!("{}:{}: {}", location.block.place.file, location.block.place.line, location.block.line());
    let mut content = Content { comments: vec![comment], ..Content::default() };
    content.filters.extend(first.iter().cloned());
    let own = rewrites(work, &variables, levels, inside, Some(location));
    content.filters.extend(own.filters.iter().cloned());
    if own.answers {
        content.filters = fields_first(work, &variables, levels, content.filters);
        return content;
    }
    if let Some(internal) = last(&vec![inside], "internal") {
        work.done(internal);
        for passed in any_of(&vec![inside], &["proxy_pass", "grpc_pass"]) {
            work.note(passed, super::Fate::BuiltIn, "no request of a client comes here");
        }
        content.filters.push(filter("respond", Map::default().with("status", Node::word(404))));
        return content;
    }
    answers_first(work, levels, &mut content);
    limits(work, levels, &mut content);
    access(work, levels, &mut variables, blocks, &mut content);
    // Files are not served; the fallback of `try_files` may be a named location with a proxy.
    let passed = any_of(&vec![inside], &["proxy_pass", "grpc_pass"]).into_iter().next();
    let fallback = last(&vec![inside], "try_files").filter(|_| passed.is_none());
    if let Some(directive) = fallback
        && let Some(to) = directive.words.last().filter(|word| word.starts_with('@'))
        && let Some(there) = named.iter().find(|other| other.block.words.last() == Some(to))
    {
        work.differs(directive, "Forebay serves no files: all requests go to the named location");
        let mut other = self::content(work, &variables, there, &[], &[], blocks);
        content.filters.append(&mut other.filters);
        return Content { filters: content.filters, comments: content.comments, adds_slash: false, ..other };
    }
    let Some(passed) = passed else {
        return content.answered(404, "Nothing of this location has an equivalent: it is answered 404.");
    };
    let target = match Target::read(passed, &variables) {
        Ok(target) => target,
        Err(why) => {
            work.lost(passed, why);
            return content.answered(502, "Its backend is not known: it is answered 502.");
        }
    };
    work.done(passed);
    let prefix = if target.grpc { "grpc" } else { "proxy" };
    request_fields(work, &variables, levels, &target, prefix, &mut content);
    response_fields(work, &variables, levels, &target, location, &mut content);
    path(work, &target, location, &own.rewritten, passed, &mut content);
    content.filters.extend(bodies::substitutions(work, &variables, levels).map(|map| filter("body", map)));
    let decoded = bodies::decompress(work, levels);
    content.filters.extend(decoded.map(|(map, when)| filter_when("decompress", map, Some(when))));
    content.upstream = Some(upstream::upstream(work, &target, levels, blocks));
    let buffering = upstream::buffering(work, levels);
    content.keys.put("buffering", Node::Map(buffering));
    pace(work, levels, &mut content);
    if let Some(retry) = upstream::retry(work, levels, prefix) {
        content.keys.put("retry", Node::Map(retry));
    }
    content.adds_slash = location.asks.prefix().is_some_and(|path| path.len() > 1 && path.ends_with('/'));
    content
}

/// Rates and time limits of clients.
fn pace<'d>(work: &mut Work<'d>, levels: &Levels<'d>, content: &mut Content) {
    for (directive, key) in [("client_body_timeout", "body_idle"), ("send_timeout", "write_idle")] {
        if let Some(time) = work.value(levels, directive).and_then(time) {
            content.keys.at("client").put(key, Node::text(time));
        }
    }
    if let Some(rate) = work.value(levels, "limit_rate").and_then(super::size).filter(|rate| rate != "0B") {
        content.keys.at("client").at("limit_rate").put("rate", Node::text(format!("{rate}/s")));
        if let Some(after) = work.value(levels, "limit_rate_after").and_then(super::size) {
            content.keys.at("client").at("limit_rate").put("after", Node::text(after));
        }
    }
}

/// Translates `rewrite`, `return` and `if` in a block.
fn rewrites<'d>(
    work: &mut Work<'d>,
    variables: &Variables,
    levels: &Levels<'d>,
    directives: &'d [Directive],
    location: Option<&Location<'d>>,
) -> Rewrites {
    let mut rewrites = Rewrites::default();
    for directive in directives {
        match &*directive.name {
            "return" => {
                rewrites.filters.extend(answer(work, variables, levels, directive, None));
                rewrites.answers = true;
                return rewrites;
            }
            "rewrite" if rewrite(work, directive, location, None, &mut rewrites) => {
                rewrites.answers = true;
                return rewrites;
            }
            "break" => work.done(directive),
            "if" => condition(work, variables, levels, directive, location, &mut rewrites),
            "limit_except" => except(work, directive, &mut rewrites),
            _ => {}
        }
    }
    rewrites
}

fn condition<'d>(
    work: &mut Work<'d>,
    variables: &Variables,
    levels: &Levels<'d>,
    block: &'d Directive,
    location: Option<&Location<'d>>,
    rewrites: &mut Rewrites,
) {
    let when = match variables.condition(&block.words) {
        Ok(when) => when,
        Err(why) => {
            work.lost(block, why);
            block.inside().iter().for_each(|inner| work.lost(inner, "its condition has no equivalent"));
            return;
        }
    };
    work.done(block);
    for inner in block.inside() {
        match &*inner.name {
            "return" => {
                rewrites.filters.extend(answer(work, variables, levels, inner, Some(&when)));
                return;
            }
            "rewrite" => {
                rewrite(work, inner, location, Some(&when), rewrites);
            }
            "break" => work.done(inner),
            _ => work
                .lost(inner, "under a condition there are only `return` and `rewrite` here; write a route with `when`"),
        }
    }
}

/// Translates `limit_except`: access control for other methods.
fn except<'d>(work: &mut Work<'d>, block: &'d Directive, rewrites: &mut Rewrites) {
    let mut methods: Vec<String> = block.words.iter().map(|method| literal(method)).collect();
    if block.words.iter().any(|method| method == "GET") {
        methods.push(literal("HEAD"));
    }
    let when = format!("!(request.method in [{}])", methods.join(", "));
    work.done(block);
    let rules: Vec<&Directive> =
        block.inside().iter().filter(|inner| ["allow", "deny"].contains(&&*inner.name)).collect();
    if let Some(filter) = rules_filter(work, &rules, Some(&when)) {
        rewrites.filters.push(filter);
    }
}

/// Translates `return`.
fn answer<'d>(
    work: &mut Work<'d>,
    variables: &Variables,
    levels: &Levels<'d>,
    directive: &'d Directive,
    when: Option<&str>,
) -> Vec<Node> {
    let (status, text) = match directive.word(0).parse::<u16>() {
        Ok(status) => (status, directive.words.get(1).map(String::as_str)),
        Err(_) => (302, Some(directive.word(0))),
    };
    if let (301 | 302 | 303 | 307 | 308, Some(text)) = (status, text) {
        return match redirect(variables, text, status) {
            Ok(map) => {
                work.done(directive);
                vec![filter_when("redirect", map, when)]
            }
            Err(why) => {
                work.lost(directive, why);
                vec![filter_when("respond", Map::default().with("status", Node::word(404)), when)]
            }
        };
    }
    let mut map = Map::default();
    if status == 444 {
        map.put("status", Node::word(400));
        work.differs(directive, "a connection is not closed without an answer: it is answered 400");
        return vec![filter_when("respond", map, when)];
    }
    map.put("status", Node::word(status));
    match text.map(|text| variables.made(text)) {
        Some(Ok(made)) => {
            let kind = work.value(levels, "default_type").unwrap_or("text/plain");
            if !matches!(status, 204 | 205 | 304) && made != Made::Fixed(String::new()) {
                map.at("headers").put("Content-Type", Node::text(kind));
                map.put("body", node(made));
            }
            work.done(directive);
        }
        Some(Err(why)) => work.lost(directive, why),
        None if status >= 300 => work.differs(directive, "nginx's page is not in the body"),
        None => work.done(directive),
    }
    vec![filter_when("respond", map, when)]
}

/// The settings of a redirect to this text.
fn redirect(variables: &Variables, text: &str, status: u16) -> Result<Map, String> {
    let map = |to: Node| Map::default().with("to", to).with("status", Node::word(status));
    let mut template = String::new();
    for piece in pieces(text) {
        match piece {
            Piece::Text(text) if text.contains(['{', '}']) => return Err("a URL has no braces".to_owned()),
            Piece::Text(text) => template.push_str(&text),
            Piece::Variable(name) => match (name.as_str(), variables.known.get(&name)) {
                (_, Some(Made::Fixed(text))) => template.push_str(text),
                ("host", None) => template.push_str("{host}"),
                ("scheme", None) => template.push_str("{scheme}"),
                ("request_uri", None) => template.push_str("{path_and_query}"),
                ("uri" | "document_uri", None) => template.push_str("{path}"),
                ("args" | "query_string", None) => template.push_str("{query}"),
                _ => {
                    template.clear();
                    break;
                }
            },
        }
    }
    if !template.is_empty() && ["/", "http", "{scheme}", "{path"].iter().any(|begin| template.starts_with(begin)) {
        return Ok(map(Node::text(template)));
    }
    let made = variables.made(text)?;
    let hosts = text.split_once("://").map(|(_, rest)| rest.split(['/', '?', '$']).next().unwrap_or_default());
    let mut map = map(node(made));
    if let Some(host) = hosts.filter(|host| !host.is_empty()) {
        map.put("hosts", Node::texts([host.split(':').next().unwrap_or_default()]));
    }
    Ok(map)
}

/// Translates `rewrite`. `true` if it responds to every request.
fn rewrite<'d>(
    work: &mut Work<'d>,
    directive: &'d Directive,
    location: Option<&Location<'d>>,
    when: Option<&str>,
    rewrites: &mut Rewrites,
) -> bool {
    let (pattern, to, flag) = (directive.word(0), directive.word(1), directive.word(2));
    let (matched, found) = match (whole(pattern, false), regular(pattern, false)) {
        (Ok(whole), Ok(found)) => (whole, found),
        (Err(why), _) | (_, Err(why)) => {
            work.lost(directive, why);
            return false;
        }
    };
    let every_path = matches!(pattern, "^" | ".*" | "^.*$" | "^(.*)$" | "^/" | "^/(.*)$" | "^(.*)" | "^/(.*)");
    let condition = match (every_path, when) {
        (true, when) => when.map(str::to_owned),
        (false, None) => Some(format!("request.path.matches({})", literal(&found))),
        (false, Some(when)) => Some(format!("{when} && request.path.matches({})", literal(&found))),
    };
    let absolute = ["http://", "https://", "$scheme://"].into_iter().find(|scheme| to.starts_with(scheme));
    let status = match flag {
        "permanent" => Some(301),
        "redirect" => Some(302),
        _ => absolute.map(|_| 302),
    };
    let (base, path) = match absolute {
        Some(scheme) => to.split_at(scheme.len() + to[scheme.len()..].find('/').unwrap_or(to.len() - scheme.len())),
        None => ("", to),
    };
    let (path, query) = path.split_once('?').map_or((path, None), |(path, query)| (path, Some(query)));
    if query.is_some_and(|query| !query.is_empty()) {
        work.lost(directive, "a query cannot be changed: have the backend read the path");
        return false;
    }
    let takes = |name: &str| name.bytes().all(|byte| byte.is_ascii_digit());
    let new_path = pieces(path).into_iter().try_fold(String::new(), |mut made, piece| {
        match piece {
            Piece::Text(text) => made.push_str(&text.replace('$', "$$")),
            Piece::Variable(name) if takes(&name) => made.push_str(&format!("${{{name}}}")),
            Piece::Variable(name) => return Err(format!("there is nothing like `${name}` in a path")),
        }
        Ok(made)
    });
    let new_path = match new_path {
        // `$request_uri` and similar targets keep the path.
        Err(_) if matches!(path, "$request_uri" | "$uri") && status.is_some() => None,
        Ok(path) => Some(path),
        Err(why) => {
            work.lost(directive, why);
            return false;
        }
    };
    if status.is_none() && location.is_none() {
        work.lost(directive, "a route is chosen by the path that the client asked for: write `rewrite` on the route");
        return false;
    }
    if let Some(mut to) = new_path.filter(|path| !path.is_empty()) {
        // A path begins with a slash, possibly one in a group.
        if !to.starts_with(['/', '$']) {
            to.insert(0, '/');
        }
        let mut map = Map::default();
        let regex = Map::default().with("pattern", Node::text(matched)).with("to", Node::text(to));
        map.at("path").put("regex", Node::Map(regex));
        rewrites.filters.push(filter_when("rewrite", map, condition.as_deref()));
        rewrites.rewritten.push(condition.clone().unwrap_or_else(|| "true".to_owned()));
    }
    let Some(status) = status else {
        match flag {
            "break" => work.done(directive),
            _ => work.differs(directive, "the route stays the same: no other location is looked for"),
        }
        return false;
    };
    let rest = if query.is_some() { "$uri" } else { "$request_uri" };
    match redirect(&Variables::default(), &format!("{base}{rest}"), status) {
        Ok(map) => {
            rewrites.filters.push(filter_when("redirect", map, condition.as_deref()));
            work.done(directive);
        }
        Err(why) => work.lost(directive, why),
    }
    condition.is_none()
}

/// Translates `limit_req`.
fn limits<'d>(work: &mut Work<'d>, levels: &Levels<'d>, content: &mut Content) {
    for directive in every(levels, "limit_req") {
        let option = |name: &str| {
            directive.words.iter().find_map(|word| word.strip_prefix(name)?.strip_prefix('=').map(str::to_owned))
        };
        let zone = option("zone").and_then(|name| {
            let zones = every(levels, "limit_req_zone").into_iter();
            zones.into_iter().find(|zone| {
                zone.words
                    .iter()
                    .any(|word| word.strip_prefix("zone=").and_then(|word| word.split(':').next()) == Some(&name))
            })
        });
        let Some(zone) = zone else {
            work.lost(directive, "its `limit_req_zone` is not in the file");
            continue;
        };
        let rate = zone.words.iter().find_map(|word| word.strip_prefix("rate=")).unwrap_or_default();
        let rate =
            rate.strip_suffix("r/s").map(|n| format!("{n}/s")).or(rate.strip_suffix("r/m").map(|n| format!("{n}/m")));
        let (Some(rate), Some(key)) = (rate, upstream::key(zone.word(0))) else {
            work.lost(directive, "its rate or its key has no equivalent");
            continue;
        };
        work.done(zone);
        let burst = option("burst").and_then(|burst| burst.parse::<u64>().ok()).unwrap_or(0) + 1;
        let map = Map::default().with("key", key).with("rate", Node::text(rate)).with("burst", Node::word(burst));
        content.filters.push(filter("rate_limit", map));
        let status = work.value(levels, "limit_req_status").unwrap_or("503");
        let waits = burst > 1 && !directive.words.iter().any(|word| word == "nodelay");
        match (status, waits) {
            ("429", false) => work.done(directive),
            (_, true) => work.differs(
                directive,
                "a burst passes at once and does not wait; what is beyond is \
             answered 429, and each route counts for itself",
            ),
            _ => work.differs(
                directive,
                "what is beyond is answered 429 with `Retry-After`, and each route counts \
             for itself",
            ),
        }
    }
}

/// Translates `allow`, `deny`, and other ways to close a location.
fn access<'d>(
    work: &mut Work<'d>,
    levels: &Levels<'d>,
    variables: &mut Variables,
    blocks: &[&'d Directive],
    content: &mut Content,
) {
    let rules = any_of(levels, &["allow", "deny"]);
    if let Some(filter) = rules_filter(work, &rules, None) {
        content.filters.push(filter);
    }
    let token = last(levels, "auth_jwt").filter(|directive| directive.word(0) != "off");
    let checks = [
        ("basic_auth", checks::password(work, levels)),
        ("forward_auth", checks::service(work, levels, variables, blocks)),
        ("jwt", token.map(Err)),
    ];
    for (name, check) in checks {
        match check {
            None => {}
            Some(Ok(map)) => content.filters.push(filter(name, map)),
            Some(Err(directive)) => {
                closed(directive, content);
                return;
            }
        }
    }
}

/// A check without an equivalent: every request is refused.
fn closed(directive: &Directive, content: &mut Content) {
    content.filters.push(filter("access", Map::default().with("deny", Node::texts(["0.0.0.0/0", "::/0"]))));
    content.comments.push(format!(
        "{}:{}: {}: closed, until you put another check in place of `deny`.",
        directive.place.file,
        directive.place.line,
        directive.line()
    ));
}

/// Filters that see responses last, and therefore come first.
fn answers_first<'d>(work: &mut Work<'d>, levels: &Levels<'d>, content: &mut Content) {
    let compress = bodies::compress(work, levels).map(|map| filter("compress", map));
    let pages = bodies::pages(work, levels).map(|map| filter("error_page", map));
    content.filters.splice(0..0, compress.into_iter().chain(pages));
}

/// The first rule that matches the client decides.
fn rules_filter(work: &mut Work<'_>, rules: &[&Directive], when: Option<&str>) -> Option<Node> {
    let (mut allow, mut deny) = (Vec::new(), Vec::new());
    let mut order = Vec::new();
    for rule in rules {
        work.done(rule);
        let allows = rule.name == "allow";
        match rule.word(0) {
            "all" => {
                order.push((None, allows));
                break;
            }
            "unix:" => work.differs(rule, "clients of a unix socket are in no list"),
            network => {
                order.push((Some(network.to_owned()), allows));
                if allows { allow.push(network.to_owned()) } else { deny.push(network.to_owned()) }
            }
        }
    }
    let everybody = ["0.0.0.0/0", "::/0"];
    let last = order.last().filter(|(network, _)| network.is_none()).is_none_or(|(_, allows)| *allows);
    // `deny` has priority over `allow`, so rules in that order translate directly.
    let denies_first = order.iter().filter(|(network, _)| network.is_some()).is_sorted_by_key(|(_, allows)| *allows);
    let mut map = Map::default();
    match (last, denies_first) {
        (true, _) if deny.is_empty() => return None,
        (true, true) => map.put("deny", Node::texts(deny)),
        (false, true) if allow.is_empty() => map.put("deny", Node::texts(everybody)),
        (false, true) => {
            map.put("allow", Node::texts(allow));
            if !deny.is_empty() {
                map.put("deny", Node::texts(deny));
            }
        }
        _ => {
            let refused = order.iter().rev().fold(String::from("false"), |rest, (network, allows)| match network {
                None => (!allows).to_string(),
                Some(network) => {
                    format!("(cidr({}).containsIP(source.address) ? {} : {rest})", literal(&prefixed(network)), !allows)
                }
            });
            map.put("deny", Node::texts(everybody));
            let refused = when.map_or_else(|| refused.clone(), |when| format!("{when} && {refused}"));
            return Some(filter_when("access", map, Some(&refused)));
        }
    }
    Some(filter_when("access", map, when))
}

/// A network with its prefix length.
fn prefixed(network: &str) -> String {
    if network.contains('/') {
        return network.to_owned();
    }
    format!("{network}/{}", if network.contains(':') { 128 } else { 32 })
}

/// Fields that Forebay sets itself.
const OWN: [&str; 11] = [
    "connection",
    "upgrade",
    "te",
    "transfer-encoding",
    "content-length",
    "keep-alive",
    "proxy-connection",
    "trailer",
    "x-forwarded-for",
    "x-forwarded-proto",
    "x-forwarded-host",
];

/// Translates `proxy_set_header`.
fn request_fields<'d>(
    work: &mut Work<'d>,
    variables: &Variables,
    levels: &Levels<'d>,
    target: &Target,
    prefix: &str,
    content: &mut Content,
) {
    let mut variables = variables.clone();
    variables.known.insert("proxy_host".into(), Made::Fixed(target.proxy_host().to_owned()));
    let (mut set, mut remove, mut host) = (Map::default(), Vec::new(), false);
    for directive in every(levels, &format!("{prefix}_set_header")) {
        let (name, value) = (directive.word(0), directive.word(1));
        let lower = name.to_ascii_lowercase();
        if lower == "host" {
            host = true;
            if value == "$http_host" {
                work.done(directive);
                continue;
            }
        }
        if OWN.contains(&&*lower) {
            let usual = [
                "$http_upgrade",
                "upgrade",
                "$connection_upgrade",
                "",
                "close",
                "keep-alive",
                "$proxy_add_x_forwarded_for",
                "$remote_addr",
                "$scheme",
                "$host",
                "$http_host",
                "https",
                "http",
            ];
            let why = "Forebay writes this field itself";
            if usual.contains(&value) {
                work.note(directive, super::Fate::BuiltIn, why);
            } else {
                work.differs(directive, format!("{why}, and not as `{value}`"));
            }
            continue;
        }
        if value == format!("$http_{}", lower.replace('-', "_")) {
            work.done(directive);
            continue;
        }
        match variables.made(value) {
            Ok(Made::Fixed(text)) if text.is_empty() => {
                remove.push(name.to_owned());
                work.done(directive);
            }
            Ok(made) => {
                set.put(name, node(made));
                work.done(directive);
            }
            Err(why) => work.lost(directive, why),
        }
    }
    if !host {
        set.put("Host", Node::text(target.proxy_host()));
    }
    if set.is_empty() && remove.is_empty() {
        return;
    }
    let mut map = Map::default();
    if !remove.is_empty() {
        map.at("request").put("remove", Node::texts(remove));
    }
    if !set.is_empty() {
        map.at("request").put("set", Node::Map(set));
    }
    content.filters.push(filter("headers", map));
}

/// The statuses for which `add_header` adds a field without `always`.
const USUAL: &str = "response.code in [200, 201, 204, 206, 301, 302, 303, 304, 307, 308]";

/// Translates `add_header`, `expires` and similar directives.
fn added(work: &mut Work<'_>, variables: &Variables, levels: &Levels<'_>) -> Vec<Node> {
    let (mut always, mut usual) = (Map::default(), Map::default());
    for directive in every(levels, "add_header") {
        let (name, value) = (directive.word(0), directive.word(1));
        match variables.made(value) {
            Ok(Made::Fixed(text)) if text.is_empty() => work.done(directive),
            Ok(made) => {
                let map = if directive.word(2) == "always" { &mut always } else { &mut usual };
                map.put(name, node(made));
                work.done(directive);
            }
            Err(why) => work.lost(directive, why),
        }
    }
    let mut set = Map::default();
    if let Some(directive) = last(levels, "expires") {
        let written = directive.word(0);
        let value = match (written, time(written).as_deref().and_then(|_| seconds(written))) {
            ("off", _) => None,
            ("max", _) => Some("max-age=315360000".to_owned()),
            ("epoch" | "-1", _) => Some("no-cache".to_owned()),
            (_, Some(seconds)) => Some(format!("max-age={seconds}")),
            _ => {
                work.lost(directive, "`Cache-Control` says for how long, and not until when");
                None
            }
        };
        if let Some(value) = value {
            set.put("Cache-Control", Node::text(value));
            work.differs(directive, "`Cache-Control` says it, without `Expires`");
        }
    }
    let mut filters = Vec::new();
    let mut push = |key: &str, fields: Map, when: Option<&str>| {
        if !fields.is_empty() {
            let mut map = Map::default();
            map.at("response").put(key, Node::Map(fields));
            filters.push(filter_when("headers", map, when));
        }
    };
    push("add", always, None);
    push("add", usual, Some(USUAL));
    push("set", set, Some(USUAL));
    filters
}

fn seconds(written: &str) -> Option<u64> {
    let made = time(written)?;
    let (digits, factor) = match made.chars().last()? {
        'h' => (&made[..made.len() - 1], 3600),
        'm' => (&made[..made.len() - 1], 60),
        _ => (made.strip_suffix('s')?, 1),
    };
    Some(digits.parse::<u64>().ok()? * factor)
}

/// Puts added response fields before filters that respond, so that they apply to those responses, too.
fn fields_first<'d>(work: &mut Work<'d>, variables: &Variables, levels: &Levels<'d>, filters: Vec<Node>) -> Vec<Node> {
    let mut all = added(work, variables, levels);
    all.extend(filters);
    all
}

/// Translates changes of a backend's response.
fn response_fields<'d>(
    work: &mut Work<'d>,
    variables: &Variables,
    levels: &Levels<'d>,
    target: &Target,
    location: &Location<'d>,
    content: &mut Content,
) {
    let mut map = Map::default();
    let hidden: Vec<String> = every(levels, "proxy_hide_header")
        .into_iter()
        .map(|directive| {
            work.done(directive);
            directive.word(0).to_owned()
        })
        .collect();
    if !hidden.is_empty() {
        map.at("response").put("remove", Node::texts(hidden));
    }
    let told = last_host(levels);
    if let Some((from, to)) = redirects(work, levels, target, location, told) {
        let length = from.len();
        let location = "response.headers[\"location\"]";
        let made = format!(
            "{location}.startsWith({}) ? {} + {location}.substring({length}) : {location}",
            literal(&from),
            literal(&to)
        );
        map.at("response").at("set").put("Location", Node::cel(made));
    }
    if !map.is_empty() {
        content.filters.push(filter("headers", map));
    }
    content.fields = added(work, variables, levels);
    let filters = std::mem::take(&mut content.filters);
    content.filters = content.fields.iter().cloned().chain(filters).collect();
}

/// The `Host` for the backend, if configured.
fn last_host<'d>(levels: &Levels<'d>) -> Option<&'d str> {
    let fields = every(levels, "proxy_set_header").into_iter();
    fields.filter(|field| field.word(0).eq_ignore_ascii_case("host")).map(|field| field.word(1)).next_back()
}

/// Translates changes of `Location`.
fn redirects<'d>(
    work: &mut Work<'d>,
    levels: &Levels<'d>,
    target: &Target,
    location: &Location<'d>,
    host: Option<&str>,
) -> Option<(String, String)> {
    let default = || {
        // A backend that gets the client's `Host` uses it in `Location`.
        if target.grpc
            || target.host.starts_with("unix:")
            || host.is_some_and(|host| host.contains("host") && host != "$proxy_host")
        {
            return None;
        }
        let path = location.asks.prefix()?.to_owned();
        let written = format!("{}{}", target.origin(), target.path.as_deref().unwrap_or(&path));
        Some((written, path))
    };
    match last(levels, "proxy_redirect") {
        None => default(),
        Some(directive) => match (directive.word(0), directive.word(1)) {
            ("off", _) => {
                work.done(directive);
                None
            }
            ("default", _) => {
                work.done(directive);
                default()
            }
            (from, to) if !from.contains(['$', '~']) && !to.contains('$') && !to.is_empty() => {
                work.done(directive);
                Some((from.to_owned(), to.to_owned()))
            }
            _ => None,
        },
    }
}

/// The path for the backend: a path in `proxy_pass` replaces that of the location.
fn path<'d>(
    work: &mut Work<'d>,
    target: &Target,
    location: &Location<'d>,
    rewritten: &[String],
    passed: &'d Directive,
    content: &mut Content,
) {
    let Some(new) = &target.path else { return };
    // A path that was rewritten is not changed again.
    let when = (!rewritten.is_empty()).then(|| format!("!({})", rewritten.join(" || ")));
    if when.as_deref() == Some("!(true)") {
        return;
    }
    let mut map = Map::default();
    match &location.asks {
        Asks::Prefix(old) | Asks::Firm(old) if old == new => return,
        Asks::Prefix(old) | Asks::Firm(old) if old.ends_with('/') && new.ends_with('/') => {
            let bare =
                |path: &str| Some(path.trim_end_matches('/')).filter(|path| !path.is_empty()).unwrap_or("/").to_owned();
            let prefix = Map::default().with("from", Node::text(bare(old))).with("to", Node::text(bare(new)));
            map.at("path").put("prefix", Node::Map(prefix));
        }
        Asks::Prefix(old) | Asks::Firm(old) | Asks::Exact(old) => {
            let pattern = format!("{}(.*)", regex::escape(old));
            let to = format!("{}${{1}}", new.replace('$', "$$"));
            let regex = Map::default().with("pattern", Node::text(pattern)).with("to", Node::text(to));
            map.at("path").put("regex", Node::Map(regex));
        }
        Asks::Regex { .. } => {
            work.lost(passed, "in a location with a pattern nginx takes no path here, either");
            return;
        }
    }
    content.filters.push(filter_when("rewrite", map, when.as_deref()));
}
