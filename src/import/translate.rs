//! The translation of directives, from the whole file down to a location.

mod bodies;
mod checks;
mod http;
mod place;
mod upstream;

use std::collections::BTreeMap;

use super::grammar::Directive;
use super::text::{Made, Variables, literal};
use super::{Fate, Imported, Row, known};
use crate::config::write::{Map, Node};

/// The directives in effect at some place: those of each enclosing block, the outermost first.
pub type Levels<'d> = Vec<&'d [Directive]>;

/// The configuration under construction, and the results for the directives.
#[derive(Default)]
pub struct Work<'d> {
    /// Listeners, in order of first use.
    pub listeners: Vec<Listener<'d>>,
    /// Upstreams, by their names in the file.
    pub upstreams: Vec<(String, Map)>,
    /// Routes in order.
    pub routes: Vec<Map>,
    /// The other keys at the top level.
    pub top: Map,
    /// Route names that are in use.
    names: BTreeMap<String, usize>,
    /// Results of directives, by their address in memory.
    noted: BTreeMap<usize, (Fate, String)>,
}

/// A listener under construction.
pub struct Listener<'d> {
    /// Its identity: a port on all addresses, or an address.
    pub key: String,
    /// Where it listens.
    pub address: String,
    /// Its name.
    pub name: String,
    /// Whether it uses TLS.
    pub tls: bool,
    /// Whether it speaks HTTP/2.
    pub http2: bool,
    /// Whether it expects the PROXY protocol.
    pub proxy_protocol: bool,
    /// The index of the server for requests with unknown hosts.
    pub default: usize,
    /// The indexes of its servers.
    pub servers: Vec<usize>,
    /// Its settings: the blocks around its default server.
    pub levels: Levels<'d>,
    /// Status and port of the redirect, if all of its servers only redirect to HTTPS.
    pub redirect: Option<(u16, u16)>,
    /// Further keys.
    pub keys: Map,
}

/// Translates a whole file; `None` if it contains no server.
pub fn all(name: &str, directives: &[Directive]) -> Option<Imported> {
    let mut work = Work::default();
    for directive in directives {
        match &*directive.name {
            "http" => {
                work.done(directive);
                http::http(&mut work, directives, directive.inside());
            }
            "stream" => {
                work.done(directive);
                http::stream(&mut work, directive.inside());
            }
            _ => {}
        }
    }
    // A file for `conf.d` begins inside `http`.
    if directives.iter().any(|directive| directive.name == "server") {
        http::http(&mut work, &[], directives);
    }
    if work.listeners.is_empty() {
        return None;
    }
    http::main(&mut work, directives);
    let mut rows = Vec::new();
    work.rows(directives, &mut rows);
    let yaml = work.file(name);
    Some(Imported { yaml, rows })
}

impl<'d> Work<'d> {
    /// Records the result of a directive. The worse of two results wins.
    pub fn note(&mut self, directive: &Directive, fate: Fate, why: impl Into<String>) {
        let why = why.into();
        let key = std::ptr::from_ref(directive).addr();
        let noted = self.noted.entry(key).or_insert_with(|| (fate, why.clone()));
        if fate > noted.0 {
            *noted = (fate, why);
        }
    }

    /// Translated.
    pub fn done(&mut self, directive: &Directive) {
        self.note(directive, Fate::Translated, "");
    }

    /// Without an equivalent.
    pub fn lost(&mut self, directive: &Directive, why: impl Into<String>) {
        self.note(directive, Fate::Lost, why);
    }

    /// Translated with a difference.
    pub fn differs(&mut self, directive: &Directive, why: impl Into<String>) {
        self.note(directive, Fate::Differs, why);
    }

    /// The value of a directive: its only argument, if it has exactly one.
    pub fn value(&mut self, levels: &Levels<'d>, name: &str) -> Option<&'d str> {
        let directive = last(levels, name)?;
        self.done(directive);
        Some(directive.word(0))
    }

    fn rows(&self, directives: &[Directive], rows: &mut Vec<Row>) {
        for directive in directives {
            let noted = self.noted.get(&std::ptr::from_ref(directive).addr());
            let (fate, why) = match noted {
                Some((fate, why)) => (*fate, why.clone()),
                None => {
                    let (fate, why) = known::fate(&directive.name);
                    (fate, why.to_owned())
                }
            };
            rows.push(Row::of(directive, fate, why));
            // The lines in such a block are not directives.
            let words = ["map", "geo", "types", "split_clients", "charset_map", "match"];
            if !words.contains(&&*directive.name) {
                self.rows(directive.inside(), rows);
            }
        }
    }

    /// A unique route name.
    pub fn name(&mut self, wanted: &str) -> String {
        let wanted = slug(wanted);
        let number = self.names.entry(wanted.clone()).or_insert(0);
        *number += 1;
        if *number == 1 { wanted } else { format!("{wanted}-{number}") }
    }

    fn file(self, name: &str) -> String {
        let mut file = Map::default().with("version", Node::word(1));
        file.comment("version", format!("Made of {name} by `forebay import`; its report says what has no equivalent."));
        for (key, value) in self.top.into_entries() {
            file.put(key, value);
        }
        let listeners = self.listeners.into_iter().map(|listener| Node::Map(listener.map())).collect();
        file.put("listeners", Node::List(listeners));
        if !self.upstreams.is_empty() {
            let mut upstreams = Map::default();
            for (name, map) in self.upstreams {
                upstreams.put(name, Node::Map(map));
            }
            file.put("upstreams", Node::Map(upstreams));
        }
        file.put("routes", Node::List(self.routes.into_iter().map(Node::Map).collect()));
        file.file()
    }
}

impl Listener<'_> {
    fn map(self) -> Map {
        let mut map = Map::default().with("name", Node::text(self.name)).with("address", Node::text(self.address));
        if let Some((port, status)) = self.redirect {
            let redirect = Map::default().with("port", Node::word(port)).with("status", Node::word(status));
            map.put("redirect_https", Node::Map(redirect));
        }
        for (key, value) in self.keys.into_entries() {
            map.put(key, value);
        }
        map
    }
}

/// The last directive with this name on the innermost level that has one.
pub fn last<'d>(levels: &Levels<'d>, name: &str) -> Option<&'d Directive> {
    levels.iter().rev().find_map(|level| level.iter().rev().find(|directive| directive.name == name))
}

/// All directives with this name on the innermost level that has one.
pub fn every<'d>(levels: &Levels<'d>, name: &str) -> Vec<&'d Directive> {
    any_of(levels, &[name])
}

/// All directives with these names on the innermost level that has one.
pub fn any_of<'d>(levels: &Levels<'d>, names: &[&str]) -> Vec<&'d Directive> {
    let on = |level: &'d [Directive]| level.iter().filter(|one| names.contains(&&*one.name)).collect::<Vec<_>>();
    levels.iter().rev().map(|level| on(level)).find(|found| !found.is_empty()).unwrap_or_default()
}

/// A name of letters, digits, dots and hyphens.
pub fn slug(text: &str) -> String {
    let mut slug = String::new();
    for one in text.chars() {
        match one {
            'a'..='z' | '0'..='9' | '.' => slug.push(one),
            'A'..='Z' => slug.push(one.to_ascii_lowercase()),
            _ if !slug.is_empty() && !slug.ends_with('-') => slug.push('-'),
            _ => {}
        }
    }
    let slug = slug.trim_matches(['-', '.']);
    if slug.is_empty() { "all".to_owned() } else { slug.to_owned() }
}

/// An nginx size (`8k`, `10m`, `1g`) in Forebay's form; `None` if it is invalid.
pub fn size(text: &str) -> Option<String> {
    let (digits, unit) = match text.to_ascii_lowercase() {
        text if text.ends_with('k') => (text[..text.len() - 1].to_owned(), "KiB"),
        text if text.ends_with('m') => (text[..text.len() - 1].to_owned(), "MiB"),
        text if text.ends_with('g') => (text[..text.len() - 1].to_owned(), "GiB"),
        text => (text, "B"),
    };
    digits.parse::<u64>().ok().map(|number| format!("{number}{unit}"))
}

/// An nginx size in bytes.
pub fn bytes(text: &str) -> Option<u64> {
    let text = text.to_ascii_lowercase();
    let factor = match text.chars().last() {
        Some('k') => 1 << 10,
        Some('m') => 1 << 20,
        Some('g') => 1 << 30,
        _ => 1,
    };
    let digits = text.trim_end_matches(['k', 'm', 'g']);
    digits.parse::<u64>().ok()?.checked_mul(factor)
}

/// An nginx time (`30`, `30s`, `1m30s`, `500ms`, `1d`) in Forebay's form; `None` if it is invalid or 0.
pub fn time(text: &str) -> Option<String> {
    let mut milliseconds = 0_u64;
    let mut rest = text.trim();
    if rest.is_empty() {
        return None;
    }
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len());
        let number: u64 = rest[..digits].parse().ok()?;
        let unit = rest[digits..].find(|c: char| c.is_ascii_digit()).map_or(rest.len(), |at| digits + at);
        let factor = match rest[digits..unit].trim() {
            "ms" => 1,
            "" | "s" => 1000,
            "m" => 60_000,
            "h" => 3_600_000,
            "d" => 86_400_000,
            "w" => 604_800_000,
            "M" => 2_592_000_000,
            "y" => 31_536_000_000,
            _ => return None,
        };
        milliseconds = milliseconds.checked_add(number.checked_mul(factor)?)?;
        rest = &rest[unit..];
    }
    // The longest time is a year.
    let milliseconds = milliseconds.min(31_536_000_000);
    match milliseconds {
        0 => None,
        whole if whole % 3_600_000 == 0 => Some(format!("{}h", whole / 3_600_000)),
        whole if whole % 60_000 == 0 => Some(format!("{}m", whole / 60_000)),
        whole if whole % 1000 == 0 => Some(format!("{}s", whole / 1000)),
        part => Some(format!("{part}ms")),
    }
}

/// The variables from `set`, `map` and `geo` on these levels.
pub fn variables(work: &mut Work<'_>, levels: &Levels<'_>) -> Variables {
    let mut variables = Variables::default();
    for level in levels {
        for directive in *level {
            match &*directive.name {
                "map" => match map(&variables, directive) {
                    Ok((name, made)) => {
                        work.done(directive);
                        variables.known.insert(name, made);
                    }
                    Err(why) => work.lost(directive, why),
                },
                "geo" => match geo(directive) {
                    Ok((name, made)) => {
                        work.done(directive);
                        variables.known.insert(name, made);
                    }
                    Err(why) => work.lost(directive, why),
                },
                "set" => match variables.made(directive.word(1)) {
                    Ok(made) => {
                        work.done(directive);
                        variables.known.insert(directive.word(0).trim_start_matches('$').to_owned(), made);
                    }
                    Err(why) => work.lost(directive, why),
                },
                _ => {}
            }
        }
    }
    variables
}

/// A `map`: selects a value by exact texts and patterns.
fn map(variables: &Variables, directive: &Directive) -> Result<(String, Made), String> {
    let asked = variables.made(directive.word(0))?.expression();
    let (mut fallback, mut exact, mut patterns) = (Made::Fixed(String::new()), Vec::new(), Vec::new());
    for line in directive.inside() {
        match &*line.name {
            "default" => fallback = variables.made(line.word(0))?,
            "hostnames" => return Err("names of hosts with wildcards have no equivalent in a map".to_owned()),
            "volatile" => {}
            name => match name.strip_prefix('~') {
                Some(pattern) => {
                    let (pattern, any_case) = pattern.strip_prefix('*').map_or((pattern, false), |rest| (rest, true));
                    let pattern = super::text::regular(pattern, any_case)?;
                    patterns.push((format!("{asked}.matches({})", literal(&pattern)), variables.made(line.word(0))?));
                }
                None => {
                    let name = name.strip_prefix('\\').unwrap_or(name);
                    exact.push((
                        format!("{asked}.lowerAscii() == {}", literal(&name.to_ascii_lowercase())),
                        variables.made(line.word(0))?,
                    ));
                }
            },
        }
    }
    Ok((directive.word(1).trim_start_matches('$').to_owned(), chosen(exact.into_iter().chain(patterns), fallback)?))
}

/// A `geo`: selects a value by the client's network. The smallest network wins, as in nginx.
fn geo(directive: &Directive) -> Result<(String, Made), String> {
    if directive.words.len() != 1 {
        return Err("only the client's own address can be asked for".to_owned());
    }
    let (mut fallback, mut networks) = (Made::Fixed(String::new()), Vec::new());
    for line in directive.inside() {
        match &*line.name {
            "default" => fallback = Made::Fixed(line.word(0).to_owned()),
            "proxy" | "proxy_recursive" | "ranges" | "delete" | "include" => {
                return Err(format!("`{}` has no equivalent in a choice by networks", line.name));
            }
            written => {
                let network: ipnet::IpNet = match written.parse() {
                    Ok(network) => network,
                    Err(_) => written
                        .parse::<std::net::IpAddr>()
                        .map(Into::into)
                        .map_err(|_| format!("`{written}` is not a network"))?,
                };
                networks.push((network, Made::Fixed(line.word(0).to_owned())));
            }
        }
    }
    networks.sort_by_key(|(network, _)| std::cmp::Reverse(network.prefix_len()));
    let asked =
        networks.into_iter().map(|(network, made)| (format!("cidr(\"{network}\").containsIP(source.address)"), made));
    Ok((directive.word(0).trim_start_matches('$').to_owned(), chosen(asked, fallback)?))
}

/// An expression for the first value whose condition is true.
fn chosen(choices: impl DoubleEndedIterator<Item = (String, Made)>, fallback: Made) -> Result<Made, String> {
    let made = choices.rev().fold(fallback, |otherwise, (condition, made)| {
        Made::Cel(format!("({condition} ? {} : {})", made.expression(), otherwise.expression()))
    });
    match &made {
        Made::Cel(expression) if expression.len() > 2048 => Err("it has too many lines for an expression".to_owned()),
        _ => Ok(made),
    }
}

/// Text, or an expression.
pub fn node(made: Made) -> Node {
    match made {
        Made::Fixed(text) => Node::text(text),
        Made::Cel(expression) => Node::cel(expression),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_and_times_of_nginx_are_those_of_forebay() {
        for (text, expected) in [("8k", "8KiB"), ("10M", "10MiB"), ("1g", "1GiB"), ("512", "512B")] {
            assert_eq!(size(text).as_deref(), Some(expected));
        }
        assert_eq!((size("x"), bytes("4k"), bytes("3")), (None, Some(4096), Some(3)));
        for (text, expected) in [
            ("30", "30s"),
            ("90s", "90s"),
            ("1m30s", "90s"),
            ("500ms", "500ms"),
            ("2h", "2h"),
            ("1d", "24h"),
            ("5m", "5m"),
        ] {
            assert_eq!(time(text).as_deref(), Some(expected));
        }
        assert_eq!([time("0"), time("x"), time("")], [None, None, None]);
        assert_eq!(slug("/api/v1/ Example.com"), "api-v1-example.com");
    }
}
