//! Filters of response bodies: `gzip`, `error_page` and `sub_filter`.

use super::super::grammar::Directive;
use super::super::text::{Made, Variables};
use super::{Levels, Work, every, last, size};
use crate::config::write::{Map, Node};

/// Translates `gzip` to `compress`.
pub fn compress<'d>(work: &mut Work<'d>, levels: &Levels<'d>) -> Option<Map> {
    let directive = last(levels, "gzip")?;
    work.done(directive);
    if directive.word(0) != "on" {
        return None;
    }
    work.differs(directive, "answers of every status are compressed; the client's `Accept-Encoding` alone decides");
    let mut map = Map::default().with("codings", Node::texts(["gzip"]));
    map.put("types", types(work, levels, "gzip_types"));
    let least = last(levels, "gzip_min_length");
    least.iter().for_each(|least| work.done(least));
    map.put("min_size", Node::text(least.and_then(|least| size(least.word(0))).unwrap_or("20B".to_owned())));
    let level = last(levels, "gzip_comp_level");
    level.iter().for_each(|level| work.done(level));
    map.put("gzip_level", Node::word(level.map_or("1", |level| level.word(0))));
    Some(map)
}

/// HTML, and the types that a directive adds.
fn types<'d>(work: &mut Work<'d>, levels: &Levels<'d>, name: &str) -> Node {
    let mut types = vec!["text/html".to_owned()];
    if let Some(directive) = last(levels, name) {
        work.done(directive);
        let named = directive.words.iter().map(|kind| if kind == "*" { "*/*".to_owned() } else { kind.clone() });
        types.extend(named.filter(|kind| kind != "text/html"));
    }
    Node::texts(types)
}

/// Translates `error_page`, if it names a file.
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
