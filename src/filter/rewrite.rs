//! `rewrite`: changes the path for the upstream. The query stays. Percent-encoding is neither added nor removed: the
//! path is in its normal form (`paths` of the configuration), so a regular expression matches `%C3%A4`, never `ä`.
//!
//! ```yaml
//! - rewrite: { path: { prefix: { from: /api, to: /v1 } } }
//! - rewrite: { path: { regex: { pattern: "/users/([0-9]+)", to: "/u/$1" } } }
//! ```

use async_trait::async_trait;
use bytes::Bytes;
use http::Uri;
use http::uri::PathAndQuery;
use pingora::http::RequestHeader;
use regex::Regex;
use schemars::JsonSchema;
use serde::Deserialize;

use super::groups::{self, Piece};
use super::{Filter, FilterType, Scope, Stages, Surroundings, Verdict};
use crate::error::{BuildError, Refusal};

/// Changes the path for the upstream; the query stays. Paths that do not match are not changed.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// How the path changes.
    pub path: PathRewrite,
}

/// How a path changes.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum PathRewrite {
    /// Replaces a prefix of whole segments: `/api` is a prefix of `/api` and `/api/x`, but not of `/apis`.
    Prefix {
        /// The prefix to replace.
        from: String,
        /// The new prefix; `/` removes the old one.
        to: String,
    },
    /// Replaces a path that a regular expression matches as a whole.
    Regex {
        /// The regular expression.
        pattern: String,
        /// The new path; `$1`, `${1}` or `$name` insert a group of the pattern, `$$` inserts `$`.
        to: String,
    },
}

static UNFIT: Refusal = Refusal::new("route.rewrite", 400, "The path of the request cannot be rewritten.");

/// Changes the path of requests.
pub struct Rewrite(Rule);

enum Rule {
    /// Both without a final slash, so that `/` is empty.
    Prefix {
        from: String,
        to: String,
    },
    Regex {
        pattern: Regex,
        to: Vec<Piece>,
    },
}

#[async_trait]
impl Filter for Rewrite {
    fn stages(&self) -> Stages {
        Stages::REQUEST
    }

    async fn request(&self, scope: &mut Scope<'_>) -> Verdict {
        // `*` of `OPTIONS *` is not a path (RFC 9112 §3.2.4).
        let path = scope.request.uri.path();
        let Some(path) = path.starts_with('/').then(|| self.0.apply(path)).flatten() else {
            return Verdict::Continue;
        };
        match set_path(scope.request, path) {
            Some(()) => Verdict::Continue,
            None => Verdict::from(&UNFIT),
        }
    }
}

impl FilterType for Rewrite {
    const KEY: &'static str = "rewrite";
    const REFUSALS: &'static [&'static Refusal] = &[&UNFIT];
    type Settings = Settings;

    fn build(settings: &Settings, _: &Surroundings<'_>) -> Result<Self, BuildError> {
        let rule = match &settings.path {
            PathRewrite::Prefix { from, to } => Rule::prefix(from, to).map_err(|error| error.under("path.prefix")),
            PathRewrite::Regex { pattern, to } => Rule::regex(pattern, to).map_err(|error| error.under("path.regex")),
        };
        rule.map(Rewrite)
    }
}

impl Rule {
    fn prefix(from: &str, to: &str) -> Result<Rule, BuildError> {
        check_path(from, from).and_then(|()| check_form(from)).map_err(|message| BuildError::new("from", message))?;
        check_path(to, to).map_err(|message| BuildError::new("to", message))?;
        let bare = |path: &str| path.trim_end_matches('/').to_owned();
        Ok(Rule::Prefix { from: bare(from), to: bare(to) })
    }

    fn regex(pattern: &str, to: &str) -> Result<Rule, BuildError> {
        let alone = |pattern: &str| Regex::new(pattern).map_err(|error| BuildError::new("pattern", error.to_string()));
        alone(pattern)?;
        let pattern = alone(&format!(r"\A(?:{pattern})\z"))?;
        let names: Vec<_> = pattern.capture_names().collect();
        let pieces = groups::pieces(to, &names).map_err(|message| BuildError::new("to", message))?;
        // A group may match nothing, so the text alone must be a valid path; a group at the beginning has its own
        // slash.
        // slash.
        let mut text = if let Some(Piece::Group(_)) = pieces.first() { "/".to_owned() } else { String::new() };
        text.extend(pieces.iter().map(|piece| if let Piece::Text(text) = piece { text } else { "" }));
        check_path(&text, to).map_err(|message| BuildError::new("to", message))?;
        Ok(Rule::Regex { pattern, to: pieces })
    }

    /// The new path; `None` if the path stays.
    fn apply(&self, path: &str) -> Option<String> {
        match self {
            Rule::Prefix { from, to } => {
                let rest = path.strip_prefix(from.as_str()).filter(|rest| rest.is_empty() || rest.starts_with('/'))?;
                Some(if to.is_empty() && rest.is_empty() { "/".to_owned() } else { format!("{to}{rest}") })
            }
            Rule::Regex { pattern, to } => {
                let groups = pattern.captures(path)?;
                let mut path = String::with_capacity(path.len());
                for piece in to {
                    path.push_str(match piece {
                        Piece::Text(text) => text,
                        Piece::Group(index) => groups.get(*index).map_or("", |group| group.as_str()),
                    });
                }
                Some(path)
            }
        }
    }
}

/// Checks that `path` can be a path; `written` is its form in the configuration.
fn check_path(path: &str, written: &str) -> Result<(), String> {
    if !path.starts_with('/') {
        return Err(format!("`{written}` must begin with `/`"));
    }
    if path.contains(['?', '#']) {
        let told =
            format!("`{written}` is more than a path: the query stays as it is, so `?` and `#` have no place here");
        return Err(told);
    }
    let fit = PathAndQuery::try_from(path).is_ok();
    if fit { Ok(()) } else { Err(format!("`{written}` is not a path: spaces and the like must be percent-encoded")) }
}

/// Whether a request can have this path: there, characters outside ASCII are encoded.
fn check_form(path: &str) -> Result<(), String> {
    if path.is_ascii() { Ok(()) } else { Err(format!("`{path}` is met by no request: write it percent-encoded")) }
}

/// Replaces the path before the query by `path`. `None` if the result is not a valid request target, or if the old
/// target is not UTF-8, so that `path` was made from a lossy copy.
/// `path` was made from a lossy copy.
fn set_path(request: &mut RequestHeader, path: String) -> Option<()> {
    if !path.starts_with('/') || !request.raw_path_is_utf8() {
        return None;
    }
    let target = match request.uri.query() {
        Some(query) => format!("{path}?{query}"),
        None => path,
    };
    // The rest of the target stays: in HTTP/2 it contains the `:authority`.
    let mut parts = request.uri.clone().into_parts();
    parts.path_and_query = Some(PathAndQuery::from_maybe_shared(Bytes::from(target)).ok()?);
    request.set_uri(Uri::from_parts(parts).ok()?);
    Some(())
}

#[cfg(test)]
mod tests {
    use super::super::rehearsal::{Rehearsal, chain, error, example};
    use super::*;

    const QUERY: &str = "the query stays as it is, so `?` and `#` have no place here";

    /// The upstream's target if the client requests `target`.
    fn rewritten(rewrite: &str, target: &str) -> String {
        let mut rehearsal = Rehearsal::of(&format!("- rewrite: {{ path: {rewrite} }}")).asking(target, &[]);
        String::from_utf8_lossy(rehearsal.pass().raw_path()).into_owned()
    }

    #[test]
    fn the_example_builds() {
        assert!(chain(&example(include_str!("rewrite.rs"))).is_ok());
    }

    #[test]
    fn a_prefix_is_replaced_by_whole_segments() {
        for (from, to) in [("/api", "/v1"), ("/api/", "/v1/")] {
            let rule = format!("{{ prefix: {{ from: {from}, to: {to} }} }}");
            assert_eq!(rewritten(&rule, "/api"), "/v1");
            assert_eq!(rewritten(&rule, "/api/"), "/v1/");
            assert_eq!(rewritten(&rule, "/api/x/api"), "/v1/x/api");
            assert_eq!(rewritten(&rule, "/apis"), "/apis");
            assert_eq!(rewritten(&rule, "/x/api"), "/x/api");
        }
    }

    #[test]
    fn a_slash_takes_a_prefix_away_or_puts_one_before_everything() {
        let away = "{ prefix: { from: /api, to: / } }";
        assert_eq!(rewritten(away, "/api"), "/");
        assert_eq!(rewritten(away, "/api/x"), "/x");
        let before = "{ prefix: { from: /, to: /v1 } }";
        assert_eq!(rewritten(before, "/"), "/v1/");
        assert_eq!(rewritten(before, "/x"), "/v1/x");
    }

    #[test]
    fn a_regex_matches_the_whole_path_or_nothing() {
        let rule = r#"{ regex: { pattern: "/users/(?<id>[0-9]+)|/u/(.*)", to: "/$$/${id}x/$2" } }"#;
        assert_eq!(rewritten(rule, "/users/12"), "/$/12x/");
        assert_eq!(rewritten(rule, "/u/a/b"), "/$/x/a/b");
        assert_eq!(rewritten(rule, "/users/12/edit"), "/users/12/edit");
        assert_eq!(rewritten(rule, "/x/users/12"), "/x/users/12");
    }

    #[test]
    fn the_query_and_the_encoding_stay() {
        let prefix = "{ prefix: { from: /a, to: /b } }";
        assert_eq!(rewritten(prefix, "/a/%2F%20+ü?x=%2F&y"), "/b/%2F%20+ü?x=%2F&y");
        assert_eq!(rewritten(prefix, "/a?"), "/b?");
        assert_eq!(rewritten(prefix, "/%61"), "/%61");
        assert_eq!(rewritten(r#"{ regex: { pattern: "/(.*)", to: "/b/$1" } }"#, "/x%2e?q=/a"), "/b/x%2e?q=/a");
    }

    #[test]
    fn the_authority_of_http2_stays() {
        let mut rehearsal = Rehearsal::of("- rewrite: { path: { prefix: { from: /a, to: /b } } }");
        rehearsal.request.set_uri(Uri::from_static("http://shop.example.com/a?c"));
        assert_eq!(rehearsal.pass().uri, "http://shop.example.com/b?c");
    }

    #[test]
    fn a_target_that_is_no_path_is_left_alone() {
        assert_eq!(rewritten(r#"{ regex: { pattern: ".*", to: /x } }"#, "*"), "*");
    }

    #[test]
    fn a_path_that_cannot_be_rewritten_is_refused() {
        let refused = |rewrite: &str, target: &[u8]| {
            let mut rehearsal = Rehearsal::of(&format!("- rewrite: {{ path: {rewrite} }}"));
            rehearsal.request.set_raw_path(target).unwrap();
            rehearsal.refused().refusal.reason
        };
        let bare = r#"{ regex: { pattern: "/x/(.*)", to: $1 } }"#;
        assert_eq!(rewritten(bare, "/x//y"), "/y");
        assert_eq!(refused(bare, b"/x/y"), "route.rewrite");
        let longer = r#"{ prefix: { from: /, to: /longer } }"#;
        assert_eq!(refused(longer, &[b"/", [b'x'; 65_530].as_slice()].concat()), "route.rewrite");
        assert_eq!(refused(longer, b"/\xff"), "route.rewrite");
    }

    #[test]
    fn wrong_prefixes_are_told_with_their_place() {
        let told = |prefix| error(&format!("- rewrite: {{ path: {{ prefix: {prefix} }} }}"));
        assert_eq!(told("{ from: api, to: / }"), "[0].rewrite.path.prefix.from: `api` must begin with `/`");
        assert_eq!(told("{ from: /a, to: '' }"), "[0].rewrite.path.prefix.to: `` must begin with `/`");
        let query = format!("[0].rewrite.path.prefix.to: `/b?c` is more than a path: {QUERY}");
        assert_eq!(told("{ from: /a, to: /b?c }"), query);
        let space = "[0].rewrite.path.prefix.to: `/b c` is not a path: spaces and the like must be percent-encoded";
        assert_eq!(told("{ from: /a, to: /b c }"), space);
        assert_eq!(told("{ from: /a }"), "[0].rewrite.path.prefix: missing field `to`");
        let encoded = "[0].rewrite.path.prefix.from: `/ä` is met by no request: write it percent-encoded";
        assert_eq!(told("{ from: /ä, to: /a }"), encoded);
        let unknown = "[0].rewrite.path.prefix.too: unknown field `too`, expected `from` or `to`";
        assert_eq!(told("{ from: /a, too: /b }"), unknown);
    }

    #[test]
    fn wrong_regexes_are_told_with_their_place() {
        let told = |regex: &str| error(&format!("- rewrite: {{ path: {{ regex: {regex} }} }}"));
        let unclosed = told("{ pattern: '/(a', to: / }");
        assert!(unclosed.starts_with("[0].rewrite.path.regex.pattern: regex parse error"), "{unclosed}");
        assert!(unclosed.contains("unclosed group"), "{unclosed}");
        let to = |text: &str| told(&format!("{{ pattern: '/(.)(.)', to: '{text}' }}"));
        let at = "[0].rewrite.path.regex.to:";
        assert_eq!(to("/$3"), format!("{at} the pattern has no group `3`, only 2"));
        assert_eq!(to("/$1x"), format!("{at} the pattern has no group `1x`; did you mean `${{1}}`?"));
        assert_eq!(to("/$id"), format!("{at} the pattern has no group `id`; write `$$` for a plain `$`"));
        assert_eq!(to("/${1"), format!("{at} `/${{1` has a `${{` without `}}`"));
        assert_eq!(to("/$1?$2"), format!("{at} `/$1?$2` is more than a path: {QUERY}"));
        assert_eq!(to("x$1"), format!("{at} `x$1` must begin with `/`"));
    }

    #[test]
    fn a_rewrite_of_nothing_is_told() {
        assert_eq!(error("- rewrite: {}"), "[0].rewrite: missing field `path`");
        let told = "[0].rewrite.path.suffix: unknown variant `suffix`, expected `prefix` or `regex`";
        assert_eq!(error("- rewrite: { path: { suffix: {} } }"), told);
    }
}
