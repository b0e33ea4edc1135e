//! Access control: `auth_basic` and `auth_request`.

use super::super::grammar::Directive;
use super::super::text::{Made, Variables, literal};
use super::upstream::{self, Target};
use super::{Levels, Work, every, last};
use crate::config::write::{Map, Node};

/// Translates `auth_basic` with its file to `basic_auth`; `None` if it is not used.
///
/// # Errors
///
/// The check has no equivalent.
pub fn password<'d>(work: &mut Work<'d>, levels: &Levels<'d>) -> Option<Result<Map, &'d Directive>> {
    let directive = last(levels, "auth_basic").filter(|directive| directive.word(0) != "off")?;
    let file = last(levels, "auth_basic_user_file").filter(|file| !file.word(0).contains('$'));
    let Some(file) = file.filter(|_| !directive.word(0).contains('$')) else { return Some(Err(directive)) };
    work.done(file);
    work.differs(directive, "passwords must be of bcrypt or argon2: `htpasswd -B` makes such a file");
    let users = Map::default().with("path", Node::text(file.word(0)));
    // nginx forwards the password.
    let map = Map::default().with("users", Node::Map(users)).with("realm", Node::text(directive.word(0)));
    Some(Ok(map.with("forward", Node::word(true))))
}

/// Translates `auth_request` to `forward_auth`, if its location is a proxy; `None` if it is not used. Values from
/// `auth_request_set` become request header fields, and are added to `variables`.
///
/// # Errors
///
/// The check has no equivalent.
pub fn service<'d>(
    work: &mut Work<'d>,
    levels: &Levels<'d>,
    variables: &mut Variables,
    blocks: &[&'d Directive],
) -> Option<Result<Map, &'d Directive>> {
    let directive = last(levels, "auth_request").filter(|directive| directive.word(0) != "off")?;
    let uri = directive.word(0);
    let mut here = levels.iter().flat_map(|level| level.iter()).filter(|one| one.name == "location");
    let asked = here.rfind(|one| one.words.last().is_some_and(|path| path.trim_start_matches('=') == uri));
    let passed = asked.and_then(|location| location.inside().iter().find(|one| one.name == "proxy_pass"));
    let (Some(asked), Some(passed)) = (asked, passed) else { return Some(Err(directive)) };
    let Ok(target) = Target::read(passed, variables) else { return Some(Err(directive)) };
    let inner: Levels<'d> =
        levels.iter().copied().take(levels.len().saturating_sub(1)).chain([asked.inside()]).collect();
    let name = upstream::upstream(work, &target, &inner, blocks);
    work.done(passed);
    let path = target.path.clone().unwrap_or_else(|| uri.to_owned());
    let mut map = Map::default().with("upstream", Node::text(name)).with("path", Node::text(path));
    let mut copied = Vec::new();
    for set in every(levels, "auth_request_set") {
        let field = set.word(1).strip_prefix("$upstream_http_").map(|name| name.replace('_', "-"));
        let variable = set.word(0).strip_prefix('$');
        let (Some(field), Some(variable)) = (field, variable) else {
            work.lost(set, "only fields of the answer are taken over: write `copy`");
            continue;
        };
        variables.known.insert(variable.into(), Made::Cel(format!("request.headers[{}]", literal(&field))));
        copied.push(field);
        work.done(set);
    }
    if !copied.is_empty() {
        map.put("copy", Node::texts(copied));
    }
    work.differs(
        directive,
        "the service learns of the request from `X-Forwarded-Uri` and the like; the client gets its answer of 3xx \
         or 4xx",
    );
    Some(Ok(map))
}
