//! Finds the route of a request among many, at a cost that does not grow with their number.
//!
//! A pure type: it is built once from the `match:` blocks and performs no IO. If several rules match, the precedence is
//! that of `HTTPRoute` in the Kubernetes Gateway API, continuing on ties:
//!
//! 1. the host: exact, before the longest wildcard, before none;
//! 2. the path: exact, before the longest prefix, before a regular expression, before any path;
//! 3. a rule for certain methods, before one for all;
//! 4. the greater number of header conditions;
//! 5. the greater number of query conditions;
//! 6. a rule with a condition of its own (`when:`), before one without;
//! 7. the order in the file.
//!
//! The Gateway API does not define the rank of regular expressions. Here the prefix `/`, which matches every path,
//! ranks after them; otherwise an expression could not be used together with a catch-all.
//!
//! If no rule at a more specific place matches the request (because a header is missing, say), the next less specific
//! place is searched, down to rules without a host.
//!
//! Paths are compared byte for byte as the caller gives them: `/public/../admin` and `/%61dmin` are not below `/admin`
//! here, although a backend may treat them so. Build and search the table with paths made canonical by
//! [`Paths::canonical`](super::super::header::path::Paths::canonical).

use std::borrow::Cow;
use std::cmp::Reverse;
use std::collections::HashMap;
use std::iter;

use http::{HeaderMap, HeaderName, Method};
use regex::{RegexSet, RegexSetBuilder};
use regex_syntax::hir::literal::Extractor;

use crate::config::route::{Match, PathMatch, ValueMatch};
use crate::error::BuildError;
use crate::error::path::{self, join};
use crate::expression::{Condition, Moment};

/// A table of rules, each with its `T`.
#[derive(Debug)]
pub struct Table<T> {
    /// All rules, sorted by points 3 to 7 above, best first. The index is the [`Rank`].
    rules: Vec<Rule<T>>,
    hosts: HashMap<Box<[u8]>, Paths>,
    /// By the part after the `*.` of a wildcard.
    wildcards: HashMap<Box<[u8]>, Paths>,
    /// Number of labels of the longest wildcard: longer suffixes of a host need no look-up.
    wildcard_labels_max: usize,
    any_host: Paths,
}

/// The properties of a request that rules match.
#[derive(Clone, Copy, Debug)]
pub struct Query<'a> {
    /// The method.
    pub method: &'a Method,
    /// The host without its port, in any case; empty if there is none.
    pub host: &'a str,
    /// The path, without the query.
    pub path: &'a str,
    /// The part after the `?`.
    pub query: Option<&'a str>,
    /// The header fields.
    pub headers: &'a HeaderMap,
}

/// The rank of a rule among all rules: the smaller one wins if host and path are the same.
type Rank = u32;

/// All errors of one rule, each at a path such as `match.path.regex`.
pub fn errors_of(written: &Match) -> Vec<BuildError> {
    let mut errors = Vec::new();
    let mut report = |error: BuildError| errors.push(error.under("match"));
    Place::build(written, &mut report);
    Rule::build(written, (), &mut report);
    errors
}

impl<T> Table<T> {
    /// Builds the table of these rules, given in the order of the file.
    ///
    /// # Errors
    ///
    /// All invalid hosts, paths, methods, header names and regular expressions, each at a path such as
    /// `[3].match.path.regex`, where 3 is the number of the rule.
    pub fn build(rules: Vec<(&Match, T)>) -> Result<Table<T>, Vec<BuildError>> {
        let mut errors = Vec::new();
        let mut drafts = Vec::with_capacity(rules.len());
        for (index, (written, target)) in rules.into_iter().enumerate() {
            let mut report = |error: BuildError| errors.push(error.under(&format!("[{index}].match")));
            let place = Place::build(written, &mut report);
            drafts.push(Draft { place, rule: Rule::build(written, target, &mut report) });
        }
        if !errors.is_empty() {
            return Err(errors);
        }
        drafts.sort_by_key(|draft| draft.rule.precedence()); // stable: the file's order settles ties
        Ok(Self::place(drafts))
    }

    /// The best rule that matches the request.
    ///
    /// The time does not depend on the number of rules, with one exception: rules of one host whose regular expressions
    /// begin alike (`.*\.php`, `.*\.html`) are all tried, in 0.1 ms for 10,000 of them.
    ///
    /// CEL conditions are evaluated last, by `holds`, and only for rules that otherwise match.
    pub fn find<'t>(&'t self, query: &Query<'_>, mut holds: impl FnMut(&'t T, &'t Condition) -> bool) -> Option<&'t T> {
        let rank = self.search(query, |rank| {
            let rule = &self.rules[rank as usize];
            rule.takes(query) && rule.when.as_ref().is_none_or(|when| holds(&rule.target, when))
        })?;
        Some(&self.rules[rank as usize].target)
    }

    fn place(drafts: Vec<Draft<T>>) -> Table<T> {
        let mut table = Table {
            rules: Vec::with_capacity(drafts.len()),
            hosts: HashMap::new(),
            wildcards: HashMap::new(),
            wildcard_labels_max: 0,
            any_host: Paths::default(),
        };
        for (rank, draft) in drafts.into_iter().enumerate() {
            let Place { hosts, path } = &draft.place;
            for host in hosts {
                let paths = match host {
                    Host::Any => &mut table.any_host,
                    Host::Exact(name) => table.hosts.entry(name.clone()).or_default(),
                    Host::Below(suffix) => {
                        table.wildcard_labels_max = table.wildcard_labels_max.max(labels(suffix));
                        table.wildcards.entry(suffix.clone()).or_default()
                    }
                };
                paths.insert(path, rank as Rank, &draft.rule);
            }
            table.rules.push(draft.rule);
        }
        for paths in table.hosts.values_mut().chain(table.wildcards.values_mut()).chain([&mut table.any_host]) {
            paths.regexes.values_mut().for_each(Regexes::seal);
        }
        table
    }

    /// The first rule in the order of precedence that is at a place of this request and accepted by `takes`.
    fn search(&self, query: &Query<'_>, mut takes: impl FnMut(Rank) -> bool) -> Option<Rank> {
        let mut buffer = [0; HOST_BYTES_MAX];
        let host = normalise_host(query.host, &mut buffer).unwrap_or_default();
        self.places(host).find_map(|paths| paths.search(query, &mut takes))
    }

    /// The places for this host, the most specific first.
    fn places<'a>(&'a self, host: &'a [u8]) -> impl Iterator<Item = &'a Paths> {
        let skipped = labels(host).saturating_sub(self.wildcard_labels_max + 1);
        let suffixes = suffixes(host).skip(skipped);
        let wildcards = suffixes.filter_map(|suffix| self.wildcards.get(suffix));
        self.hosts.get(host).into_iter().chain(wildcards).chain([&self.any_host])
    }
}

/// A rule before it is added to the table.
struct Draft<T> {
    place: Place,
    rule: Rule<T>,
}

/// The place of a rule in the table: its host and path.
#[derive(Debug)]
struct Place {
    hosts: Vec<Host>,
    path: Path,
}

#[derive(Debug)]
enum Host {
    Any,
    Exact(Box<[u8]>),
    /// Names that end in this, after a dot.
    Below(Box<[u8]>),
}

#[derive(Debug)]
enum Path {
    Any,
    Exact(Box<str>),
    /// Without the final slash; not empty.
    Prefix(Box<str>),
    Regex {
        /// All matches begin with this and a slash; may be empty.
        folder: Box<str>,
        /// Anchored at both ends.
        pattern: String,
    },
}

impl Place {
    fn build(written: &Match, report: &mut impl FnMut(BuildError)) -> Place {
        let mut hosts = Vec::new();
        for (index, host) in written.hosts.iter().enumerate() {
            match Host::build(host) {
                Ok(host) => hosts.push(host),
                Err(message) => report(BuildError::new(format!("hosts[{index}]"), message)),
            }
        }
        if written.hosts.is_empty() {
            hosts.push(Host::Any);
        }
        let path = Path::build(written.path.as_ref()).unwrap_or_else(|error| {
            report(error.under("path"));
            Path::Any
        });
        Place { hosts, path }
    }
}

impl Host {
    fn build(written: &str) -> Result<Host, String> {
        let (name, below) = match written.strip_prefix("*.") {
            Some(suffix) => (suffix, true),
            None => (written, false),
        };
        let mut buffer = [0; HOST_BYTES_MAX];
        let normal = normalise_host(name, &mut buffer).unwrap_or_default();
        let v6 = name.starts_with('[') && name.ends_with(']');
        let plain = |&byte: &u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
        if normal.is_empty() || !(v6 && !below || normal.iter().all(plain)) {
            return Err(format!(
                "`{written}` is not a host: write a name such as `shop.example.com`, or `*.example.com`, without a port"
            ));
        }
        Ok(if below { Host::Below(normal.into()) } else { Host::Exact(normal.into()) })
    }
}

impl Path {
    fn build(written: Option<&PathMatch>) -> Result<Path, BuildError> {
        match written {
            None => Ok(Path::Any),
            Some(PathMatch::Exact(path)) if path.starts_with('/') => Ok(Path::Exact(path.as_str().into())),
            Some(PathMatch::Prefix(path)) if path.starts_with('/') => Ok(match path.trim_end_matches('/') {
                "" => Path::Any,
                prefix => Path::Prefix(prefix.into()),
            }),
            Some(PathMatch::Exact(path)) => Err(BuildError::new("exact", no_path(path))),
            Some(PathMatch::Prefix(path)) => Err(BuildError::new("prefix", no_path(path))),
            Some(PathMatch::Regex(pattern)) => {
                let whole = whole(pattern, regex::Regex::new)?;
                Ok(Path::Regex { folder: folder(pattern), pattern: whole.as_str().to_owned() })
            }
        }
    }
}

fn no_path(written: &str) -> String {
    format!("`{written}` is not a path: it must begin with `/`")
}

/// Compiles a pattern so that it matches a complete text.
fn whole<R>(pattern: &str, compile: impl Fn(&str) -> Result<R, regex::Error>) -> Result<R, BuildError> {
    // The unwrapped pattern is compiled first: `a)(b` would be valid once it is wrapped.
    let whole = compile(pattern).and_then(|_| compile(&format!(r"\A(?:{pattern})\z")));
    whole.map_err(|error| BuildError::new("regex", regex_message(pattern, &error)))
}

/// The folder that contains all complete matches of this expression: `/shop` for `/shop/[0-9]+`, and the empty text
/// without a common beginning. It separates expressions, so that not all of thousands must be tried.
fn folder(pattern: &str) -> Box<str> {
    let beginning = || {
        let literals = Extractor::new().extract(&regex_syntax::parse(pattern).ok()?);
        let beginning = literals.longest_common_prefix()?;
        let slash = beginning.iter().rposition(|&byte| byte == b'/')?;
        String::from_utf8(beginning[..slash].to_vec()).ok()
    };
    beginning().unwrap_or_default().into()
}

/// The error in one line. The library's text spans several lines with the pattern, which a report of the file shows
/// anyway.
fn regex_message(pattern: &str, error: &regex::Error) -> String {
    let told = error.to_string();
    let cause = told.lines().last().unwrap_or_default().trim_start_matches("error: ");
    format!("`{pattern}` is not a usable regular expression: {cause}")
}

/// The conditions of a rule besides host and path.
#[derive(Debug)]
struct Rule<T> {
    target: T,
    /// Any method, if empty.
    methods: Vec<Method>,
    headers: Vec<(HeaderName, ValueCondition)>,
    queries: Vec<(Box<str>, ValueCondition)>,
    when: Option<Condition>,
}

impl<T> Rule<T> {
    fn build(written: &Match, target: T, report: &mut impl FnMut(BuildError)) -> Rule<T> {
        let mut rule = Rule { target, methods: Vec::new(), headers: Vec::new(), queries: Vec::new(), when: None };
        for (index, name) in written.methods.iter().enumerate() {
            match method(name) {
                Ok(method) => rule.methods.push(method),
                Err(message) => report(BuildError::new(format!("methods[{index}]"), message)),
            }
        }
        for (name, value) in &written.headers {
            let place = join("headers", &path::key(name));
            match (name.parse(), ValueCondition::build(value)) {
                (Ok(name), Ok(condition)) => rule.headers.push((name, condition)),
                (Err(_), _) => report(BuildError::new(place, format!("`{name}` cannot be the name of a header"))),
                (_, Err(error)) => report(error.under(&place)),
            }
        }
        for (name, value) in &written.queries {
            match ValueCondition::build(value) {
                Ok(condition) => rule.queries.push((name.as_str().into(), condition)),
                Err(error) => report(error.under(&join("queries", &path::key(name)))),
            }
        }
        if let Some(written) = &written.when {
            match Condition::build(written, Moment::Match) {
                Ok(when) => rule.when = Some(when),
                Err(error) => report(error.under("when")),
            }
        }
        rule
    }

    /// The smaller value wins.
    fn precedence(&self) -> impl Ord + use<T> {
        (self.methods.is_empty(), Reverse(self.headers.len()), Reverse(self.queries.len()), self.when.is_none())
    }

    /// Whether the rule matches this request at its place.
    #[inline]
    fn takes(&self, query: &Query<'_>) -> bool {
        let asks_nothing = self.methods.is_empty() && self.headers.is_empty() && self.queries.is_empty();
        asks_nothing || self.takes_by_fields(query)
    }

    fn takes_by_fields(&self, query: &Query<'_>) -> bool {
        (self.methods.is_empty() || self.methods.contains(query.method))
            && self.headers.iter().all(|(name, condition)| condition.holds(header_value(query.headers, name)))
            && self.queries.iter().all(|(name, condition)| condition.holds(query_value(query.query, name)))
    }

    /// A value that a request must have to match this rule; used as the rule's index key.
    fn key(&self) -> Option<(Key, &str)> {
        let header =
            self.headers.iter().find_map(|(name, condition)| Some((Key::Header(name.clone()), condition.exact()?)));
        header.or_else(|| {
            self.queries.iter().find_map(|(name, condition)| Some((Key::Query(name.clone()), condition.exact()?)))
        })
    }
}

fn method(written: &str) -> Result<Method, String> {
    let upper = written.to_ascii_uppercase();
    if upper != written && ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"].contains(&upper.as_str()) {
        return Err(format!(
            "`{written}` would match nothing, since methods have case (RFC 9110 §9.1): write `{upper}`"
        ));
    }
    written.parse().map_err(|_| format!("`{written}` is not a method: write one such as `GET`"))
}

/// A condition on the value of a header or a query argument.
#[derive(Debug)]
enum ValueCondition {
    Exact(Box<str>),
    Regex(regex::bytes::Regex),
    Present(bool),
}

impl ValueCondition {
    fn build(written: &ValueMatch) -> Result<ValueCondition, BuildError> {
        match written {
            ValueMatch::Exact(value) => Ok(ValueCondition::Exact(value.as_str().into())),
            ValueMatch::Present { present } => Ok(ValueCondition::Present(*present)),
            ValueMatch::Regex { regex } => whole(regex, regex::bytes::Regex::new).map(ValueCondition::Regex),
        }
    }

    fn exact(&self) -> Option<&str> {
        match self {
            ValueCondition::Exact(value) => Some(value),
            ValueCondition::Regex(_) | ValueCondition::Present(_) => None,
        }
    }

    fn holds(&self, value: Option<Cow<'_, [u8]>>) -> bool {
        match self {
            ValueCondition::Present(present) => value.is_some() == *present,
            ValueCondition::Exact(expected) => value.is_some_and(|value| *value == *expected.as_bytes()),
            ValueCondition::Regex(regex) => value.is_some_and(|value| regex.is_match(&value)),
        }
    }
}

/// The rules of one host, by path.
#[derive(Debug, Default)]
struct Paths {
    exact: HashMap<Box<str>, Bucket>,
    prefixes: HashMap<Box<str>, Bucket>,
    /// Regular expressions by the folder of all their matches.
    regexes: HashMap<Box<str>, Regexes>,
    /// Length of the longest prefix or folder in bytes: only this much of a path is looked up, however many slashes it
    /// has.
    bytes_max: usize,
    any: Bucket,
}

impl Paths {
    fn insert<T>(&mut self, path: &Path, rank: Rank, rule: &Rule<T>) {
        match path {
            Path::Any => self.any.insert(rank, rule),
            Path::Exact(path) => self.exact.entry(path.clone()).or_default().insert(rank, rule),
            Path::Prefix(prefix) => {
                self.bytes_max = self.bytes_max.max(prefix.len());
                self.prefixes.entry(prefix.clone()).or_default().insert(rank, rule);
            }
            Path::Regex { folder, pattern } => {
                self.bytes_max = self.bytes_max.max(folder.len());
                self.regexes.entry(folder.clone()).or_default().ranked.push((rank, pattern.clone()));
            }
        }
    }

    fn search(&self, query: &Query<'_>, takes: &mut impl FnMut(Rank) -> bool) -> Option<Rank> {
        let above = prefixes(query.path, self.bytes_max);
        self.exact
            .get(query.path)
            .and_then(|bucket| bucket.search(query, takes))
            .or_else(|| above.clone().find_map(|prefix| self.prefixes.get(prefix)?.search(query, takes)))
            .or_else(|| {
                let regexes = above.filter_map(|folder| self.regexes.get(folder));
                regexes.fold(None, |best, regexes| regexes.search(query.path, best, takes))
            })
            .or_else(|| self.any.search(query, takes))
    }
}

/// The regular expressions of one host and folder.
#[derive(Debug, Default)]
struct Regexes {
    /// Best first.
    ranked: Vec<(Rank, String)>,
    /// The same in sets of [`Regexes::SET_MAX`], each of which is tried in one pass over the path.
    sets: Vec<RegexSet>,
}

impl Regexes {
    /// Maximum number of expressions per set. The automaton of a set is built lazily in limited memory; sets of
    /// thousands exceed it and are then slower than the single expressions.
    const SET_MAX: usize = 64;

    fn seal(&mut self) {
        let set = |ranked: &[(Rank, String)]| {
            let patterns = ranked.iter().map(|(_, pattern)| pattern);
            // Each expression was compiled alone within the usual size limit; without a limit, compiling the set cannot
            // fail.
            RegexSetBuilder::new(patterns).size_limit(usize::MAX).build().expect("valid expressions make a valid set")
        };
        self.sets = self.ranked.chunks(Self::SET_MAX).map(set).collect();
    }

    /// The first match, if it is better than `best`; else `best`.
    fn search(&self, path: &str, best: Option<Rank>, takes: &mut impl FnMut(Rank) -> bool) -> Option<Rank> {
        let matching = self
            .sets
            .iter()
            .zip(self.ranked.chunks(Self::SET_MAX))
            .flat_map(|(set, ranked)| set.matches(path).into_iter().map(|number| ranked[number].0));
        better(matching, best, takes)
    }
}

/// The first of `ranks` that is accepted, if it is better than `best`; else `best`.
fn better(ranks: impl Iterator<Item = Rank>, best: Option<Rank>, takes: &mut impl FnMut(Rank) -> bool) -> Option<Rank> {
    ranks.take_while(|&rank| best.is_none_or(|best| rank < best)).find(|&rank| takes(rank)).or(best)
}

/// The rules that share host and path, best first.
///
/// There may be thousands that differ in a tenant's header. A rule that requires an exact value of a header or an
/// argument is therefore indexed by that value, the first that it names.
#[derive(Debug, Default)]
struct Bucket {
    keyed: Vec<Keyed>,
    /// Rules without an exact value.
    others: Vec<Rank>,
}

/// Rules that require an exact value of the same header or argument.
#[derive(Debug)]
struct Keyed {
    key: Key,
    ranks_by_value: HashMap<Box<[u8]>, Vec<Rank>>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Key {
    Header(HeaderName),
    Query(Box<str>),
}

impl Key {
    fn value<'a>(&self, query: &Query<'a>) -> Option<Cow<'a, [u8]>> {
        match self {
            Key::Header(name) => header_value(query.headers, name),
            Key::Query(name) => query_value(query.query, name),
        }
    }
}

impl Bucket {
    fn insert<T>(&mut self, rank: Rank, rule: &Rule<T>) {
        let ranks = match rule.key() {
            None => &mut self.others,
            Some((key, value)) => {
                let known = self.keyed.iter().position(|keyed| keyed.key == key);
                let position = known.unwrap_or_else(|| {
                    self.keyed.push(Keyed { key, ranks_by_value: HashMap::new() });
                    self.keyed.len() - 1
                });
                self.keyed[position].ranks_by_value.entry(value.as_bytes().into()).or_default()
            }
        };
        ranks.push(rank);
    }

    fn search(&self, query: &Query<'_>, takes: &mut impl FnMut(Rank) -> bool) -> Option<Rank> {
        let others = better(self.others.iter().copied(), None, takes);
        self.keyed.iter().fold(others, |best, Keyed { key, ranks_by_value }| {
            let ranks = key.value(query).and_then(|value| ranks_by_value.get(&*value));
            better(ranks.into_iter().flatten().copied(), best, takes)
        })
    }
}

/// The length of the longest name in DNS (RFC 1035 §2.3.4).
const HOST_BYTES_MAX: usize = 253;

/// The host in lower case and without the final dot of the root. `None` if it is too long or begins with a dot: no rule
/// can match it.
fn normalise_host<'b>(host: &str, buffer: &'b mut [u8; HOST_BYTES_MAX]) -> Option<&'b [u8]> {
    let host = host.strip_suffix('.').unwrap_or(host);
    let normal = buffer.get_mut(..host.len()).filter(|_| !host.starts_with('.'))?;
    normal.copy_from_slice(host.as_bytes());
    normal.make_ascii_lowercase();
    Some(normal)
}

fn labels(host: &[u8]) -> usize {
    host.split(|&byte| byte == b'.').count()
}

/// The parts after the first dot, the second and so on: `a.b.c` gives `b.c`, `c`.
fn suffixes(host: &[u8]) -> impl Iterator<Item = &[u8]> {
    host.iter().enumerate().filter(|(_, byte)| **byte == b'.').map(|(dot, _)| &host[dot + 1..])
}

/// The path and its ancestors by whole segments, longest first, none longer than `bytes_max`: `/a/b` gives `/a/b`, `/a`
/// and the empty one.
fn prefixes(path: &str, bytes_max: usize) -> impl Iterator<Item = &str> + Clone {
    let longest = match path.as_bytes().get(..=bytes_max) {
        Some(start) => start.iter().rposition(|&byte| byte == b'/').unwrap_or(0),
        None => path.len(),
    };
    iter::successors(Some(&path[..longest]), |path| (!path.is_empty()).then(|| &path[..path.rfind('/').unwrap_or(0)]))
}

/// The value of a header; the values of a repeated field are joined by commas (RFC 9110 §5.2).
fn header_value<'a>(headers: &'a HeaderMap, name: &HeaderName) -> Option<Cow<'a, [u8]>> {
    let mut values = headers.get_all(name).iter();
    let first = values.next()?.as_bytes();
    let mut joined = Cow::Borrowed(first);
    for value in values {
        let joined = joined.to_mut();
        joined.extend_from_slice(b", ");
        joined.extend_from_slice(value.as_bytes());
    }
    Some(joined)
}

/// The first value of a query argument, decoded; empty for one without `=`.
fn query_value<'a>(query: Option<&'a str>, name: &str) -> Option<Cow<'a, [u8]>> {
    let value = query?.split('&').find_map(|pair| {
        let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
        decode(key).eq(name.bytes()).then_some(value)
    })?;
    Some(match value.contains(['%', '+']) {
        true => Cow::Owned(decode(value).collect()),
        false => Cow::Borrowed(value.as_bytes()),
    })
}

/// Decodes form encoding: `%41` is `A`, `+` is a space. A `%` that begins no code remains.
fn decode(text: &str) -> impl Iterator<Item = u8> {
    let mut rest = text.as_bytes();
    iter::from_fn(move || {
        let (byte, tail) = match *rest {
            [] => return None,
            [b'%', high, low, ref tail @ ..] if high.is_ascii_hexdigit() && low.is_ascii_hexdigit() => {
                (hex(high) << 4 | hex(low), tail)
            }
            [b'+', ref tail @ ..] => (b' ', tail),
            [byte, ref tail @ ..] => (byte, tail),
        };
        rest = tail;
        Some(byte)
    })
}

/// The value of a hexadecimal digit.
fn hex(digit: u8) -> u8 {
    match digit {
        b'0'..=b'9' => digit - b'0',
        _ => (digit | 0x20) - b'a' + 10,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    use std::collections::BTreeMap;

    use proptest::prelude::*;

    /// A request in the notation of these tests: `GET shop.test /cart?v=2`, and header fields.
    struct Request {
        method: Method,
        host: String,
        path: String,
        query: Option<String>,
        headers: HeaderMap,
    }

    impl Request {
        fn new(line: &str, headers: &[(&str, &str)]) -> Request {
            let [method, host, target] = line.split(' ').collect::<Vec<_>>().try_into().unwrap();
            let (path, query) = target.split_once('?').map_or((target, None), |(path, query)| (path, Some(query)));
            let field = |(name, value): &(&str, &str)| (name.parse::<HeaderName>().unwrap(), value.parse().unwrap());
            Request {
                method: method.parse().unwrap(),
                host: host.to_owned(),
                path: path.to_owned(),
                query: query.map(str::to_owned),
                headers: headers.iter().map(field).collect(),
            }
        }

        fn query(&self) -> Query<'_> {
            let Request { method, host, path, query, headers } = self;
            Query { method, host, path, query: query.as_deref(), headers }
        }
    }

    fn hosts(hosts: &[&str]) -> Match {
        Match { hosts: hosts.iter().map(|&host| host.to_owned()).collect(), ..Match::default() }
    }

    fn path(path: PathMatch) -> Match {
        Match { path: Some(path), ..Match::default() }
    }

    fn exact(text: &str) -> Match {
        path(PathMatch::Exact(text.to_owned()))
    }

    fn prefix(text: &str) -> Match {
        path(PathMatch::Prefix(text.to_owned()))
    }

    fn regex(text: &str) -> Match {
        path(PathMatch::Regex(text.to_owned()))
    }

    fn value(text: &str) -> ValueMatch {
        match text.split_once(':') {
            Some(("regex", regex)) => ValueMatch::Regex { regex: regex.to_owned() },
            Some(("present", present)) => ValueMatch::Present { present: present.parse().unwrap() },
            _ => ValueMatch::Exact(text.to_owned()),
        }
    }

    fn values(pairs: &[(&str, &str)]) -> BTreeMap<String, ValueMatch> {
        pairs.iter().map(|(name, text)| (name.to_string(), value(text))).collect()
    }

    fn headers(pairs: &[(&str, &str)]) -> Match {
        Match { headers: values(pairs), ..Match::default() }
    }

    fn queries(pairs: &[(&str, &str)]) -> Match {
        Match { queries: values(pairs), ..Match::default() }
    }

    fn methods(methods: &[&str]) -> Match {
        Match { methods: methods.iter().map(|&method| method.to_owned()).collect(), ..Match::default() }
    }

    fn table(rules: &[Match]) -> Table<usize> {
        Table::build(rules.iter().zip(0..).collect()).unwrap_or_else(|errors| panic!("{errors:?}"))
    }

    /// Asserts the rule among `rules` that each request gets; a request is `METHOD HOST TARGET`.
    #[track_caller]
    fn assert_found(rules: &[Match], cases: &[(&str, Option<usize>)]) {
        let table = table(rules);
        for (line, expected) in cases {
            assert_eq!(table.find(&Request::new(line, &[]).query(), |_, _| true).copied(), *expected, "{line}");
        }
    }

    #[test]
    fn a_condition_is_asked_last_and_of_candidates_only() {
        let conditional = |base: Match, when: &str| Match { when: Some(when.to_owned()), ..base };
        let rules = [
            prefix("/a"),
            conditional(prefix("/a"), "true"),
            conditional(prefix("/a"), "false"),
            conditional(prefix("/b"), "true"),
            conditional(Match { methods: vec!["POST".to_owned()], ..prefix("/a") }, "true"),
        ];
        let table = table(&rules);
        let asked = std::cell::RefCell::new(Vec::new());
        let found = |line: &str, holds: bool| {
            asked.borrow_mut().clear();
            table.find(&Request::new(line, &[]).query(), |rule, _| {
                asked.borrow_mut().push(*rule);
                holds
            })
        };
        assert_eq!(found("GET a /a", true), Some(&1));
        assert_eq!(*asked.borrow(), [1]);
        assert_eq!(found("GET a /a", false), Some(&0), "the rule without a condition is the last resort");
        assert_eq!(*asked.borrow(), [1, 2]);
        assert_eq!(found("GET a /c", true), None);
        assert_eq!(*asked.borrow(), [0; 0]);
    }

    #[test]
    fn a_condition_that_is_none_is_told_with_its_place() {
        let rule = Match { when: Some("request.pth".to_owned()), ..Match::default() };
        let errors = Table::build(vec![(&rule, 0)]).unwrap_err();
        let told =
            "[0].match.when (at 1:1 of the expression): nothing is called `request.pth`: did you mean `request.path`?";
        assert_eq!(errors[0].to_string(), told);
    }

    #[test]
    fn an_exact_host_goes_before_the_longest_wildcard_and_that_before_none() {
        let rules = [
            Match::default(),
            hosts(&["*.example.com"]),
            hosts(&["*.shop.example.com"]),
            hosts(&["a.shop.example.com", "other.test"]),
        ];
        assert_found(
            &rules,
            &[
                ("GET a.shop.example.com /", Some(3)),
                ("GET other.test /", Some(3)),
                ("GET b.shop.example.com /", Some(2)),
                ("GET c.b.shop.example.com /", Some(2)),
                ("GET shop.example.com /", Some(1)),
                ("GET x.y.z.example.com /", Some(1)),
                ("GET example.com /", Some(0)),
                ("GET badexample.com /", Some(0)),
                ("GET .example.com /", Some(0)),
                ("GET  /", Some(0)),
            ],
        );
    }

    #[test]
    fn a_host_matches_in_any_case_with_or_without_the_dot_of_the_root() {
        let cases: Vec<(String, Option<usize>)> =
            ["shop.test", "SHOP.Test", "shop.test."].iter().map(|host| (format!("GET {host} /"), Some(0))).collect();
        let cases: Vec<_> = cases.iter().map(|(line, expected)| (line.as_str(), *expected)).collect();
        assert_found(&[hosts(&["Shop.TEST"])], &cases);
        assert_found(&[hosts(&["[::1]"])], &[("GET [::1] /", Some(0)), ("GET [::2] /", None)]);
        let endless = format!("GET {}.shop.test /", "a.".repeat(5_000));
        assert_found(&[hosts(&["*.shop.test"])], &[(&endless, None)]);
    }

    /// The examples of `HTTPPathMatch` in the Gateway API.
    #[test]
    fn a_prefix_matches_whole_segments() {
        let cases = [
            ("/foo/bar", "/foo", true),
            ("/foo/bar", "/foo/", true),
            ("/foo", "/foo", true),
            ("/foo/", "/foo", true),
            ("/foo", "/foo/", true),
            ("/foobar", "/foo", false),
            ("/aaa/bbb", "/aaa/bbb/", true),
            ("/aaa/bbb/", "/aaa/bbb", true),
            ("/aaa/bbb/ccc", "/aaa/bbb", true),
            ("/aaa/bbbxyz", "/aaa/bbb", false),
            ("/aaa", "/", true),
            ("/", "/", true),
            ("*", "/", true),
            ("/fo", "/foo", false),
            ("/FOO", "/foo", false),
            ("/%66oo", "/foo", false),
            ("/foo//bar", "/foo", true),
            ("//foo", "/foo", false),
            ("/é/foo", "/é", true),
        ];
        for (requested, written, expected) in cases {
            let found = table(&[prefix(written)])
                .find(&Request::new(&format!("GET a {requested}"), &[]).query(), |_, _| true)
                .is_some();
            assert_eq!(found, expected, "{requested} below {written}");
        }
    }

    #[test]
    fn the_folder_of_a_regex_is_what_all_its_paths_begin_with() {
        for (pattern, expected) in [
            ("/shop/[0-9]+", "/shop"),
            ("/shop/cart", "/shop"),
            ("/shop/?", ""),
            ("/shop/cart/?", "/shop"),
            ("/a/b/x|/a/b/y/z", "/a/b"),
            ("/a/x|/b/y", ""),
            ("(?i)/shop/x", ""),
            (r"/a\.b/.*", "/a.b"),
            (".*", ""),
            ("", ""),
            ("^/shop/x$", "/shop"),
            ("(/shop)?/x/y", ""),
        ] {
            assert_eq!(&*folder(pattern), expected, "{pattern}");
        }
    }

    #[test]
    fn an_exact_path_is_that_path_only() {
        let rules = [exact("/foo")];
        assert_found(
            &rules,
            &[("GET a /foo", Some(0)), ("GET a /foo?x=1", Some(0)), ("GET a /foo/", None), ("GET a /fo", None)],
        );
    }

    #[test]
    fn a_regex_matches_the_whole_path() {
        let rules = [regex("/v[0-9]+|/w"), regex("(?i)/Img/.*")];
        assert_found(
            &rules,
            &[
                ("GET a /v12", Some(0)),
                ("GET a /w", Some(0)),
                ("GET a /v12/x", None),
                ("GET a /x/v12", None),
                ("GET a /ww", None),
                ("GET a /IMG/a.png", Some(1)),
            ],
        );
    }

    #[test]
    fn an_exact_path_goes_before_the_longest_prefix_and_that_before_a_regex_and_that_before_any_path() {
        let rules = [Match::default(), prefix("/"), regex("/a/.*"), prefix("/a/b"), prefix("/a/b/c"), exact("/a/b/c")];
        assert_found(
            &rules,
            &[
                ("GET a /a/b/c", Some(5)),
                ("GET a /a/b/c/d", Some(4)),
                ("GET a /a/b/d", Some(3)),
                ("GET a /a/x", Some(2)),
                ("GET a /x", Some(0)),
            ],
        );
    }

    #[test]
    fn methods_go_before_headers_and_headers_before_queries_and_the_first_wins_a_tie() {
        let both = Match { headers: values(&[("x-a", "1")]), ..queries(&[("v", "2"), ("w", "present:true")]) };
        let rules = [
            Match::default(),
            queries(&[("v", "2"), ("w", "present:true")]),
            headers(&[("x-a", "1")]),
            both,
            headers(&[("x-a", "1"), ("x-b", "present:false")]),
            methods(&["GET", "POST"]),
            methods(&["GET"]),
        ];
        let table = table(&rules);
        let found = |line: &str, fields: &[(&str, &str)]| {
            *table.find(&Request::new(line, fields).query(), |_, _| true).unwrap()
        };
        assert_eq!(found("GET a /?v=2&w=", &[("x-a", "1")]), 5, "a method counts more than any header");
        assert_eq!(found("PUT a /?v=2&w=", &[("x-a", "1")]), 4, "two headers count more than one and two arguments");
        assert_eq!(found("PUT a /?v=2&w=", &[("x-a", "1"), ("x-b", "")]), 3);
        assert_eq!(found("PUT a /?v=2", &[("x-a", "1"), ("x-b", "")]), 2);
        assert_eq!(found("PUT a /?v=2&w", &[]), 1);
        assert_eq!(found("PUT a /", &[]), 0);
    }

    #[test]
    fn where_the_best_place_refuses_the_next_is_asked_down_to_no_host() {
        let rules = [
            Match::default(),
            Match { path: Some(PathMatch::Prefix("/a".into())), ..hosts(&["*.test"]) },
            Match { path: Some(PathMatch::Exact("/a/b".into())), methods: vec!["PUT".into()], ..hosts(&["x.test"]) },
            Match { path: Some(PathMatch::Regex("/a/.".into())), methods: vec!["POST".into()], ..hosts(&["x.test"]) },
        ];
        assert_found(
            &rules,
            &[
                ("PUT x.test /a/b", Some(2)),
                ("POST x.test /a/b", Some(3)),
                ("GET x.test /a/b", Some(1)),
                ("GET x.test /b", Some(0)),
            ],
        );
    }

    #[test]
    fn headers_are_compared_by_name_in_any_case_and_by_value_as_sent() {
        type Case<'a> = (&'a str, &'a [(&'a str, &'a str)], bool);
        let cases: &[Case<'_>] = &[
            ("v2", &[("X-Version", "v2")], true),
            ("v2", &[("x-version", "V2")], false),
            ("v2", &[], false),
            ("regex:v[12]", &[("x-version", "v1")], true),
            ("regex:v[12]", &[("x-version", "v12")], false),
            ("present:true", &[("x-version", "")], true),
            ("present:true", &[], false),
            ("present:false", &[], true),
            ("present:false", &[("x-version", "")], false),
            ("v1, v2", &[("x-version", "v1"), ("x-version", "v2")], true),
            ("v1", &[("x-version", "v1"), ("x-version", "v2")], false),
        ];
        for (condition, fields, expected) in cases {
            let table = table(&[headers(&[("x-Version", condition)])]);
            assert_eq!(
                table.find(&Request::new("GET a /", fields).query(), |_, _| true).is_some(),
                *expected,
                "{condition} {fields:?}"
            );
        }
    }

    #[test]
    fn query_arguments_are_decoded_and_the_first_of_a_name_counts() {
        let cases = [
            ("v", "2", "v=2", true),
            ("v", "2", "a=1&v=2&b", true),
            ("v", "2", "v=3&v=2", false),
            ("v", "2", "v=2&v=3", true),
            ("v", "2", "V=2", false),
            ("v", "2", "%76=%32", true),
            ("v", "a b", "v=a+b", true),
            ("v", "a+b", "v=a%2Bb", true),
            ("v", "50%", "v=50%", true),
            ("v", "%zz", "v=%zz", true),
            ("v", "a=b", "v=a=b", true),
            ("ä b", "ö", "%C3%a4+b=%c3%B6", true),
            ("v", "present:true", "v", true),
            ("v", "present:true", "w", false),
            ("v", "present:false", "", true),
            ("v", "regex:[0-9]+", "v=1%32", true),
            ("v", "regex:[0-9]+", "v=1x", false),
        ];
        for (name, condition, query, expected) in cases {
            let request = Request { query: Some(query.to_owned()), ..Request::new("GET a /", &[]) };
            let found = table(&[queries(&[(name, condition)])]).find(&request.query(), |_, _| true).is_some();
            assert_eq!(found, expected, "{name} {condition} in {query}");
        }
        assert_found(&[queries(&[("v", "present:true")])], &[("GET a /", None)]);
    }

    #[test]
    fn everything_wrong_is_told_at_once_with_its_place() {
        let wrong = Match {
            hosts: vec!["shop.test:80".into(), "*".into(), "a.*.test".into(), "".into(), "ok.test".into()],
            path: Some(PathMatch::Regex("/a(".into())),
            methods: vec!["GET".into(), "get".into(), "A B".into()],
            headers: values(&[("x y", "1"), ("x-z", "regex:[")]),
            queries: values(&[("v", "regex:a)(b")]),
            when: Some("request.pth".to_owned()),
        };
        let rules = [Match::default(), wrong, prefix("api"), exact("api")];
        let errors = Table::build(rules.iter().zip(0..).collect()).unwrap_err();
        let places: Vec<&str> = errors.iter().map(|error| error.path.as_str()).collect();
        assert_eq!(
            places,
            [
                "[1].match.hosts[0]",
                "[1].match.hosts[1]",
                "[1].match.hosts[2]",
                "[1].match.hosts[3]",
                "[1].match.path.regex",
                "[1].match.methods[1]",
                "[1].match.methods[2]",
                "[1].match.headers.\"x y\"",
                "[1].match.headers.x-z.regex",
                "[1].match.queries.v.regex",
                "[1].match.when",
                "[2].match.path.prefix",
                "[3].match.path.exact",
            ]
        );
        assert_eq!(errors[4].message, "`/a(` is not a usable regular expression: unclosed group");
        assert_eq!(errors[11].message, "`api` is not a path: it must begin with `/`");
    }

    #[test]
    fn without_rules_nothing_is_found() {
        assert_found(&[], &[("GET a.test /", None)]);
    }

    /// Ten thousand routes are as fast as ten, measured in work instead of time.
    #[test]
    fn few_rules_are_looked_at_however_many_there_are() {
        let hosted = |number: usize| hosts(&[&format!("h{number}.test")]);
        let pathed = |number: usize| prefix(&format!("/p{number}/q"));
        let tenant = |number: usize| headers(&[("x-tenant", &number.to_string()), ("x-more", "present:true")]);
        let argument = |number: usize| queries(&[("tenant", &number.to_string())]);
        let pattern = |number: usize| regex(&format!("/p{number}/[a-z]/r"));
        let kinds: [&dyn Fn(usize) -> Match; 5] = [&hosted, &pathed, &tenant, &argument, &pattern];
        for kind in kinds {
            let rules: Vec<Match> = (0..10_000).map(kind).chain([Match::default()]).collect();
            let table = table(&rules);
            let request = Request::new("GET h77.test /p77/q/r?tenant=77", &[("x-tenant", "77"), ("x-more", "1")]);
            let mut looked_at = 0;
            let found = table.search(&request.query(), |rank| {
                looked_at += 1;
                table.rules[rank as usize].takes(&request.query())
            });
            assert_eq!(found.map(|rank| table.rules[rank as usize].target), Some(77));
            assert!(looked_at <= 2, "{looked_at} rules were looked at for {:?}", rules[77]);
        }
    }

    /// The reference for [`Table`]: examines every rule and takes the best by the list of the Gateway API.
    fn by_looking_at_all(rules: &[Match], request: &Request) -> Option<usize> {
        let holds = |condition: &ValueMatch, value: Option<&str>| match condition {
            ValueMatch::Exact(expected) => value == Some(expected),
            ValueMatch::Regex { regex } => value.is_some_and(|value| whole(regex).is_match(value)),
            ValueMatch::Present { present } => value.is_some() == *present,
        };
        let argument = |name: &str| {
            let pairs = request.query.as_deref()?.split('&').map(|pair| pair.split_once('=').unwrap_or((pair, "")));
            pairs.into_iter().find(|(key, _)| *key == name).map(|(_, value)| value)
        };
        let candidates = rules.iter().enumerate().filter_map(|(index, rule)| {
            let host = if rule.hosts.is_empty() {
                Some((0, 0))
            } else {
                rule.hosts.iter().filter_map(|host| rank_of_host(host, &request.host)).max()
            }?;
            let path = rank_of_path(rule.path.as_ref(), &request.path)?;
            let method =
                rule.methods.is_empty() || rule.methods.iter().any(|method| *method == request.method.as_str());
            let header = |name: &String| request.headers.get(name).map(|value| value.to_str().unwrap());
            let headers = rule.headers.iter().all(|(name, condition)| holds(condition, header(name)));
            let queries = rule.queries.iter().all(|(name, condition)| holds(condition, argument(name)));
            let numbers = (!rule.methods.is_empty(), rule.headers.len(), rule.queries.len());
            (method && headers && queries).then_some((host, path, numbers, Reverse(index)))
        });
        candidates.max().map(|(.., Reverse(index))| index)
    }

    fn whole(regex: &str) -> regex::Regex {
        regex::Regex::new(&format!("^(?:{regex})$")).unwrap()
    }

    fn rank_of_host(written: &str, host: &str) -> Option<(u8, usize)> {
        match written.strip_prefix('*') {
            Some(suffix) => (host.ends_with(suffix) && host != suffix).then_some((1, suffix.len())),
            None => (written == host).then_some((2, 0)),
        }
    }

    fn rank_of_path(written: Option<&PathMatch>, path: &str) -> Option<(u8, usize)> {
        match written {
            None => Some((0, 0)),
            Some(PathMatch::Exact(exact)) => (exact == path).then_some((3, 0)),
            Some(PathMatch::Regex(regex)) => whole(regex).is_match(path).then_some((1, 0)),
            Some(PathMatch::Prefix(prefix)) if prefix.trim_end_matches('/').is_empty() => Some((0, 0)),
            Some(PathMatch::Prefix(prefix)) => {
                let prefix = prefix.trim_end_matches('/');
                (path == prefix || path.starts_with(&format!("{prefix}/"))).then_some((2, prefix.len()))
            }
        }
    }

    fn some_values(names: [&'static str; 2]) -> impl Strategy<Value = BTreeMap<String, ValueMatch>> {
        let text = prop::sample::select(vec!["1", "2", "", "regex:1|2", "regex:.*", "present:true", "present:false"]);
        prop::collection::btree_map(
            prop::sample::select(names.to_vec()).prop_map(str::to_owned),
            text.prop_map(value),
            0..3,
        )
    }

    fn some_path() -> impl Strategy<Value = String> {
        prop::collection::vec(prop::sample::select(vec!["", "a", "b", "ab"]), 0..4)
            .prop_map(|segments| format!("/{}", segments.join("/")))
    }

    fn some_rule() -> impl Strategy<Value = Match> {
        let hosts = vec!["t", "a.t", "b.a.t", "*.t", "*.a.t", "*.b.a.t"];
        let hosts = prop::collection::vec(prop::sample::select(hosts).prop_map(str::to_owned), 0..3);
        let path = prop_oneof![
            some_path().prop_map(PathMatch::Exact),
            some_path().prop_map(PathMatch::Prefix),
            prop::sample::select(vec!["/a.*", "/[ab]", "/a|/b/a", ".*b", "/a/b/.*", "/a/.*|/a/b", "/b/a?"])
                .prop_map(|regex| PathMatch::Regex(regex.to_owned())),
        ];
        let methods = prop::collection::vec(prop::sample::select(vec!["GET", "PUT"]).prop_map(str::to_owned), 0..3);
        (hosts, prop::option::of(path), methods, some_values(["x-a", "x-b"]), some_values(["v", "w"])).prop_map(
            |(hosts, path, methods, headers, queries)| Match { hosts, path, methods, headers, queries, when: None },
        )
    }

    fn some_request() -> impl Strategy<Value = Request> {
        let method = prop::sample::select(vec![Method::GET, Method::PUT]);
        let host = prop::sample::select(vec!["", "t", "a.t", "b.a.t", "c.t", "c.b.a.t", "d.c.b.a.t", "at"])
            .prop_map(str::to_owned);
        let query = prop::collection::vec(prop::sample::select(vec!["v=1", "v=2", "w=1", "w", "x=1"]), 0..3);
        let field = prop::sample::select(vec![("x-a", "1"), ("x-a", "2"), ("x-b", "1"), ("x-b", "")]);
        let headers = prop::collection::btree_set(field, 0..3).prop_map(|fields| {
            // The last of repeated fields is used: the reference does not join values.
            fields.into_iter().map(|(name, value)| (HeaderName::from_static(name), value.parse().unwrap())).fold(
                HeaderMap::new(),
                |mut headers, (name, value)| {
                    headers.insert(name, value);
                    headers
                },
            )
        });
        (method, host, some_path(), prop::option::of(query), headers).prop_map(
            |(method, host, path, query, headers)| Request {
                method,
                host,
                path,
                query: query.map(|pairs| pairs.join("&")),
                headers,
            },
        )
    }

    impl std::fmt::Debug for Request {
        fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            self.query().fmt(f)
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2_000))]
        #[test]
        fn what_is_found_is_what_looking_at_every_rule_would_find(
            rules in prop::collection::vec(some_rule(), 0..12),
            requests in prop::collection::vec(some_request(), 1..6),
        ) {
            let table = table(&rules);
            for request in &requests {
                prop_assert_eq!(table.find(&request.query(), |_, _| true).copied(), by_looking_at_all(&rules, request), "{:?}", request);
            }
        }
    }
}
