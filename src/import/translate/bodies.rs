//! What is done to answers: `gzip`, `brotli`, `zstd`, `gunzip`, `error_page` and `sub_filter`.

use std::ops::RangeInclusive;

use super::super::grammar::Directive;
use super::super::text::{Made, Variables};
use super::{Levels, Work, bytes, every, last, size};
use crate::config::write::{Map, Node};

/// A coding of nginx or of one of its modules.
struct Coding {
    /// What its directives begin with.
    name: &'static str,
    /// How it is called in headers.
    coding: &'static str,
    /// The key of its level here, which levels that has, and what nginx takes without one.
    level: (&'static str, RangeInclusive<u32>, u32),
}

/// In the order in which a client that likes several gets them.
const CODINGS: [Coding; 3] = [
    Coding { name: "zstd", coding: "zstd", level: ("zstd_level", 1..=12, 1) },
    Coding { name: "brotli", coding: "br", level: ("br_level", 0..=9, 6) },
    Coding { name: "gzip", coding: "gzip", level: ("gzip_level", 1..=9, 1) },
];

/// What nginx sends as it is, unless a directive says otherwise.
const MIN_BYTES: u64 = 20;

/// `gzip`, `brotli` and `zstd` as `compress`.
pub fn compress<'d>(work: &mut Work<'d>, levels: &Levels<'d>) -> Option<Map> {
    let (mut codings, mut named, mut least, mut efforts) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for Coding { name, coding, level: (key, range, usual) } in CODINGS {
        let Some(directive) = last(levels, name) else { continue };
        work.done(directive);
        if directive.word(0) != "on" {
            continue;
        }
        codings.push(coding);
        work.differs(directive, "answers of every status are compressed; the client's `Accept-Encoding` alone decides");
        let types = last(levels, &format!("{name}_types"));
        if named.iter().any(|other: &Option<&Directive>| other.map(|one| &one.words) != types.map(|one| &one.words)) {
            work.differs(directive, "each type that one of the codings names is compressed with all of them");
        }
        types.iter().for_each(|types| work.done(types));
        named.push(types);
        let min = last(levels, &format!("{name}_min_length"));
        min.iter().for_each(|min| work.done(min));
        least.push(min.and_then(|min| Some((bytes(min.word(0))?, size(min.word(0))?))));
        let written = last(levels, &format!("{name}_comp_level"));
        let level = written.and_then(|level| level.word(0).parse().ok()).unwrap_or(usual);
        let taken = level.clamp(*range.start(), *range.end());
        if let Some(written) = written {
            work.done(written);
            if taken != level {
                work.differs(written, format!("`{key}` is a number from {} to {}", range.start(), range.end()));
            }
        }
        efforts.push((key, taken));
    }
    if codings.is_empty() {
        return None;
    }
    let mut types = vec!["text/html".to_owned()];
    for words in named.into_iter().flatten() {
        for kind in kinds(words) {
            if !types.contains(&kind) {
                types.push(kind);
            }
        }
    }
    let least = least.into_iter().map(|min| min.unwrap_or_else(|| (MIN_BYTES, format!("{MIN_BYTES}B"))));
    let (_, least) = least.min().unwrap_or_default();
    let mut map = Map::default().with("codings", Node::texts(codings)).with("types", Node::texts(types));
    map.put("min_size", Node::text(least));
    efforts.into_iter().for_each(|(key, level)| map.put(key, Node::word(level)));
    Some(map)
}

/// `gunzip` as `decompress`, and when it acts.
pub fn decompress<'d>(work: &mut Work<'d>, levels: &Levels<'d>) -> Option<(Map, &'static str)> {
    let directive = last(levels, "gunzip")?;
    work.done(directive);
    if directive.word(0) != "on" {
        return None;
    }
    work.differs(directive, "an answer of more than 8MiB when it is decoded is refused: see `max_size`");
    let map = Map::default().with("request", Node::word(false)).with("codings", Node::texts(["gzip"]));
    let map = map.with("unknown", Node::text("pass"));
    Some((map, r#"!request.headers["accept-encoding"].contains("gzip")"#))
}

/// HTML, and the types that a directive adds.
fn types<'d>(work: &mut Work<'d>, levels: &Levels<'d>, name: &str) -> Node {
    let mut types = vec!["text/html".to_owned()];
    if let Some(directive) = last(levels, name) {
        work.done(directive);
        types.extend(kinds(directive).filter(|kind| kind != "text/html"));
    }
    Node::texts(types)
}

/// The types that a directive names.
fn kinds(directive: &Directive) -> impl Iterator<Item = String> {
    directive.words.iter().map(|kind| if kind == "*" { "*/*".to_owned() } else { kind.clone() })
}

/// `error_page`, where it names a file that nginx would read.
pub fn pages<'d>(work: &mut Work<'d>, levels: &Levels<'d>) -> Option<Map> {
    let mut pages = Vec::new();
    for directive in every(levels, "error_page") {
        match page(work, levels, directive) {
            Ok(page) => {
                pages.push(Node::Map(page));
                work.differs(directive, "the file is read as a template: `{{` in it begins an expression");
            }
            Err(why) => work.lost(directive, why),
        }
    }
    if pages.is_empty() {
        return None;
    }
    let mut map = Map::default();
    if let Some(directive) = last(levels, "proxy_intercept_errors") {
        work.done(directive);
        map.put("endpoints", Node::word(directive.word(0) == "on"));
    }
    map.put("pages", Node::List(pages));
    Some(map)
}

fn page<'d>(work: &mut Work<'d>, levels: &Levels<'d>, directive: &'d Directive) -> Result<Map, &'static str> {
    let Some((uri, before)) = directive.words.split_last() else { return Err("it names no page") };
    if !uri.starts_with('/') || uri.contains('$') {
        return Err(
            "a redirect, or another location, has no equivalent: write `error_page` with a page, or `redirect`",
        );
    }
    let mut status = None;
    let mut on = Vec::new();
    for word in before {
        match word.strip_prefix('=') {
            None => on.push(Node::word(word.parse::<u16>().map_err(|_| "it names something that is not a status")?)),
            Some(other) => {
                status = Some(other.parse::<u16>().map_err(|_| "a page that says its status has no equivalent")?)
            }
        }
    }
    let mut page = Map::default().with("on", Node::List(on));
    if let Some(status) = status {
        page.put("status", Node::word(status));
    }
    let here = levels.iter().flat_map(|level| level.iter()).filter(|one| one.name == "location");
    let mut named = here.filter(|one| one.words.last().is_some_and(|path| path.trim_start_matches('=') == uri));
    let location = named.next_back();
    let inside = location.map(Directive::inside).unwrap_or_default();
    let root = inside.iter().find(|one| ["root", "alias"].contains(&&*one.name)).or_else(|| last(levels, "root"));
    let Some(root) = root.filter(|root| !root.word(0).contains('$')) else {
        return Err("its page is not a file: write `error_page` with the text");
    };
    work.differs(root, "pages for errors are read from there; Forebay serves no other files");
    let folder = root.word(0).trim_end_matches('/');
    let path = if root.name == "alias" { folder.to_owned() } else { format!("{folder}{uri}") };
    page.put("html", Node::Map(Map::default().with("path", Node::text(path))));
    Ok(page)
}

/// Translates `sub_filter` to `body`.
pub fn substitutions<'d>(work: &mut Work<'d>, variables: &Variables, levels: &Levels<'d>) -> Option<Map> {
    let once = last(levels, "sub_filter_once");
    once.iter().for_each(|once| work.done(once));
    let first = once.is_none_or(|once| once.word(0) == "on");
    let mut rules = Vec::new();
    for directive in every(levels, "sub_filter") {
        let (Ok(Made::Fixed(text)), Ok(with)) = (variables.made(directive.word(0)), variables.made(directive.word(1)))
        else {
            work.lost(directive, "what it looks for is another text for each request");
            continue;
        };
        // nginx ignores case here.
        let pattern = format!("(?i){}", regex::escape(&text));
        let mut rule = Map::default().with("pattern", Node::text(pattern));
        rule.put(
            "with",
            match with {
                Made::Fixed(with) => Node::text(with.replace('$', "$$")),
                Made::Cel(with) => Node::cel(with),
            },
        );
        if first {
            rule.put("first", Node::word(true));
        }
        rules.push(Node::Map(rule));
        work.differs(directive, "a body of more than 1MiB is refused: see `max_size`");
    }
    if rules.is_empty() {
        return None;
    }
    let mut response = Map::default().with("types", types(work, levels, "sub_filter_types"));
    response.put("replace", Node::List(rules));
    Some(Map::default().with("response", Node::Map(response)))
}
