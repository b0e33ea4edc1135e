//! `redirect`: redirects the client, without an upstream.
//!
//! ```yaml
//! - redirect:
//!     to: "https://{host}{path_and_query}"
//!     status: 308                # 301, 302, 303, 307, 308
//! ```
//!
//! Phishers use redirects of well-known sites, so neither the path nor the query can decide the host of a redirect:
//! they cannot be part of the host in `to`, and a `to` without a host stays on the same host, even if the path begins
//! with several slashes. With `to: { cel: "…" }` the host must be that of the request, or one of `hosts`.

use async_trait::async_trait;
use bytes::Bytes;
use http::header::{HOST, LOCATION};
use http::uri::Authority;
use http::{HeaderValue, StatusCode, Uri};
use pingora::http::RequestHeader;
use schemars::JsonSchema;
use serde::Deserialize;

use super::{Answer, Filter, FilterType, Scope, Stages, Surroundings, Verdict, field};
use crate::config::Text;
use crate::error::{BuildError, Refusal};
use crate::expression::{self, Moment};

/// Redirects the client, without an upstream.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// The target: a URL, or a path on the same host. Placeholders: `{scheme}`, `{host}` (without port), `{path}`,
    /// `{query}` (without `?`) and `{path_and_query}`. Or `{ cel: … }`, which computes it; an invalid result is
    /// answered with 400.
    pub to: Text,
    /// 301, 302, 303, 307 or 308. With 307 and 308 the client keeps method and body.
    #[serde(default = "Settings::status")]
    #[schemars(extend("enum" = [301, 302, 303, 307, 308]))]
    pub status: u16,
    /// The allowed hosts of `to: { cel: … }`, in addition to that of the request.
    #[serde(default)]
    pub hosts: Vec<String>,
}

impl Settings {
    fn status() -> u16 {
        308
    }
}

static UNFIT: Refusal =
    Refusal::new("route.redirect", 400, "The request cannot be redirected: its Host or path is malformed.");

/// Answers with a redirect.
pub struct Redirect {
    status: StatusCode,
    to: Target,
}

/// The target.
enum Target {
    Pieces {
        pieces: Vec<Piece>,
        /// Whether the target has no host, so that the client must stay on the same one.
        local: bool,
    },
    Made {
        place: expression::Value,
        /// In lower case.
        hosts: Vec<String>,
    },
}

/// A part of the target.
#[derive(Clone, Debug, PartialEq)]
enum Piece {
    Text(String),
    Scheme,
    Host,
    Path,
    Query,
    PathAndQuery,
}

const PLACEHOLDERS: [(&str, Piece); 5] = [
    ("scheme", Piece::Scheme),
    ("host", Piece::Host),
    ("path", Piece::Path),
    ("query", Piece::Query),
    ("path_and_query", Piece::PathAndQuery),
];

#[async_trait]
impl Filter for Redirect {
    fn stages(&self) -> Stages {
        Stages::REQUEST
    }

    async fn request(&self, scope: &mut Scope<'_>) -> Verdict {
        let location = match &self.to {
            Target::Pieces { pieces, local } => location(scope, pieces, *local),
            Target::Made { place, hosts } => {
                let asked = scope.asked();
                made(&place.of(&asked), hosts, host(scope.request))
            }
        };
        match location {
            Some(location) => {
                Verdict::Answer(Answer { status: self.status, headers: vec![(LOCATION, location)], body: Bytes::new() })
            }
            None => Verdict::from(&UNFIT),
        }
    }
}

impl FilterType for Redirect {
    const KEY: &'static str = "redirect";
    const ANSWERS: bool = true;
    const REFUSALS: &'static [&'static Refusal] = &[&UNFIT];
    type Settings = Settings;

    fn build(settings: &Settings, _: &Surroundings<'_>) -> Result<Self, BuildError> {
        let status = match settings.status {
            code @ (301 | 302 | 303 | 307 | 308) => StatusCode::from_u16(code).ok(),
            _ => None,
        };
        let status = status.ok_or_else(|| {
            BuildError::new(
                "status",
                format!("`{}` is not a redirect status: write 301, 302, 303, 307 or 308", settings.status),
            )
        })?;
        let at = |message| BuildError::new("to", message);
        let to = match &settings.to {
            Text::Fixed(_) if !settings.hosts.is_empty() => {
                return Err(BuildError::new(
                    "hosts",
                    "only an expression needs leave: take it out, or write `to: { cel: … }`",
                ));
            }
            Text::Fixed(to) => {
                let pieces = template(to).map_err(at)?;
                let local = check(to, &pieces).map_err(at)?;
                Target::Pieces { pieces, local }
            }
            Text::Made { cel } => {
                let place =
                    expression::Value::build(cel, Moment::Request).map_err(|error| error.under("cel").under("to"))?;
                let host = |(index, written): (usize, &String)| match field::host(written) {
                    Some(host) if host.port().is_none() => Ok(host.host().to_ascii_lowercase()),
                    _ => {
                        let told =
                            format!("`{written}` is not a host: write one such as `example.com`, without a port");
                        Err(BuildError::new(format!("hosts[{index}]"), told))
                    }
                };
                Target::Made { place, hosts: settings.hosts.iter().enumerate().map(host).collect::<Result<_, _>>()? }
            }
        };
        Ok(Redirect { status, to })
    }
}

/// The target; `None` if the request lacks a part of it.
fn location(scope: &Scope<'_>, pieces: &[Piece], local: bool) -> Option<HeaderValue> {
    if !scope.request.raw_path_is_utf8() {
        return None;
    }
    let uri = &scope.request.uri;
    // `OPTIONS *` has no path.
    let path = if uri.path().starts_with('/') { uri.path() } else { "/" };
    let mut location = String::with_capacity(128);
    for piece in pieces {
        match piece {
            Piece::Text(text) => location.push_str(text),
            Piece::Scheme => location.push_str(scope.facts.scheme),
            Piece::Host => location.push_str(host(scope.request)?.host()),
            Piece::Path => push_encoded(&mut location, path),
            Piece::Query => push_encoded(&mut location, uri.query().unwrap_or_default()),
            Piece::PathAndQuery => {
                push_encoded(&mut location, path);
                if let Some(query) = uri.query() {
                    location.push('?');
                    push_encoded(&mut location, query);
                }
            }
        }
    }
    if local {
        stay(&mut location);
    }
    HeaderValue::try_from(location).ok()
}

/// Browsers treat `//evil.example` and `/\evil.example` as another host.
fn stay(location: &mut String) {
    let slashes = location.find(|c| !matches!(c, '/' | '\\')).unwrap_or(location.len());
    location.replace_range(..slashes, "/");
}

/// Checks the target that an expression returned: a path on this host, or a URL on it or on one of `hosts`. `None`
/// for anything else.
fn made(place: &[u8], hosts: &[String], asked: Option<Authority>) -> Option<HeaderValue> {
    let mut location = String::with_capacity(place.len());
    push_encoded(&mut location, std::str::from_utf8(place).ok()?);
    if location.starts_with('/') {
        stay(&mut location);
    } else {
        // The URL parser and browsers treat `\` differently; it is valid in neither's grammar.
        let uri = location.parse::<Uri>().ok().filter(|_| !location.contains('\\'))?;
        let known = matches!(uri.scheme_str(), Some("http" | "https"));
        let host = uri.authority().and_then(|host| field::host(host.as_str())).filter(|_| known)?;
        let host = host.host().to_ascii_lowercase();
        if !hosts.contains(&host) && asked.is_none_or(|asked| !asked.host().eq_ignore_ascii_case(&host)) {
            return None;
        }
    }
    HeaderValue::try_from(location).ok()
}

/// The host of the request, if it is valid.
fn host(request: &RequestHeader) -> Option<Authority> {
    match request.uri.authority() {
        Some(authority) => field::host(authority.as_str()),
        None => field::host(request.headers.get(HOST)?.to_str().ok()?),
    }
}

/// Appends a part of the request target to `location`. Characters outside ASCII are not valid in a URL (RFC 3986 §2).
fn push_encoded(location: &mut String, part: &str) {
    for byte in part.bytes() {
        if byte.is_ascii_graphic() {
            location.push(char::from(byte));
        } else {
            location.push_str(&format!("%{byte:02X}"));
        }
    }
}

/// Splits `to` into text and placeholders.
fn template(to: &str) -> Result<Vec<Piece>, String> {
    let mut pieces = Vec::new();
    let mut rest = to;
    while let Some((text, after)) = rest.split_once('{') {
        pieces.push(Piece::Text(text.to_owned()));
        let (name, after) = after.split_once('}').ok_or_else(|| format!("`{to}` has a `{{` without `}}`"))?;
        let known = PLACEHOLDERS.iter().find(|(known, _)| *known == name);
        let (_, piece) = known.ok_or_else(|| {
            let names: Vec<String> = PLACEHOLDERS.iter().map(|(name, _)| format!("`{{{name}}}`")).collect();
            format!("`{{{name}}}` is not a placeholder; the placeholders are {}", names.join(", "))
        })?;
        pieces.push(piece.clone());
        rest = after;
    }
    pieces.push(Piece::Text(rest.to_owned()));
    pieces.retain(|piece| !matches!(piece, Piece::Text(text) if text.is_empty()));
    Ok(pieces)
}

/// Checks the possible targets of `to`. `true` if it has no host.
fn check(to: &str, pieces: &[Piece]) -> Result<bool, String> {
    if to.starts_with("//") {
        return Err(format!("`{to}` leaves the scheme out; write `{{scheme}}:{to}`"));
    }
    let local = to.starts_with('/') || matches!(pieces.first(), Some(Piece::Path | Piece::PathAndQuery));
    if !local {
        check_host(to)?;
    }
    let sample: String = pieces.iter().map(Piece::sample).collect();
    let fit = sample.parse::<Uri>().is_ok() && HeaderValue::from_str(&sample).is_ok();
    if fit { Ok(local) } else { Err(format!("`{to}` is not a URL: spaces and the like must be percent-encoded")) }
}

/// Checks that an absolute `to` has a host, and that only `{host}` in it comes from the client.
fn check_host(to: &str) -> Result<(), String> {
    let (scheme, rest) = to.split_once("://").unwrap_or_default();
    if !["https", "http", "{scheme}"].contains(&scheme) {
        return Err(format!("`{to}` must begin with `https://`, `http://`, `{{scheme}}://` or `/`"));
    }
    let host = rest.split(['/', '?', '#']).next().unwrap_or_default();
    // `{path}` and `{path_and_query}` begin with a slash.
    let host = host.split("{path").next().unwrap_or_default();
    if host.contains("{query}") || host.contains("{scheme}") {
        return Err(format!("in `{to}` the client could choose the host: put a `/` or a `?` behind the host"));
    }
    field::host(&host.replace("{host}", "host"))
        .map(drop)
        .ok_or_else(|| format!("`{to}` has no host, or none that is one"))
}

impl Piece {
    /// An example value, to check that the whole can be a URL.
    fn sample(&self) -> &str {
        match self {
            Piece::Text(text) => text,
            Piece::Scheme => "https",
            Piece::Host => "host",
            Piece::Path => "/path",
            Piece::Query => "query",
            Piece::PathAndQuery => "/path?query",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::rehearsal::{Rehearsal, chain, error, example};
    use super::*;

    const HOST: (&str, &str) = ("host", "shop.example.com:8080");

    fn rehearsal(to: &str, target: &str) -> Rehearsal {
        Rehearsal::of(&format!("- redirect: {{ to: '{to}' }}")).asking(target, &[HOST])
    }

    fn location(answer: &Answer) -> &str {
        assert_eq!(answer.headers.len(), 1);
        answer.headers[0].1.to_str().unwrap()
    }

    /// The target of `to` for a client that requests `target` from shop.example.com:8080.
    fn led(to: &str, target: &str) -> String {
        location(&rehearsal(to, target).answer()).to_owned()
    }

    #[test]
    fn the_example_builds() {
        assert!(chain(&example(include_str!("redirect.rs"))).is_ok());
    }

    #[test]
    fn placeholders_stand_for_parts_of_the_request() {
        assert_eq!(led("https://{host}{path_and_query}", "/a/b?c=d"), "https://shop.example.com/a/b?c=d");
        assert_eq!(led("https://{host}:8443{path_and_query}", "/a"), "https://shop.example.com:8443/a");
        assert_eq!(led("{scheme}://www.{host}/x{path}", "/a?c"), "http://www.shop.example.com/x/a");
        assert_eq!(led("https://new.example.com?from={path}&{query}", "/a?c=d"), "https://new.example.com?from=/a&c=d");
        assert_eq!(led("/moved#{query}", "/a"), "/moved#");
        assert_eq!(led("https://example.com/x", "/a?b"), "https://example.com/x");
    }

    #[test]
    fn the_status_is_308_unless_told_otherwise() {
        assert_eq!(rehearsal("/x", "/").answer().status, 308);
        for status in [301, 302, 303, 307, 308] {
            let mut rehearsal = Rehearsal::of(&format!("- redirect: {{ to: /x, status: {status} }}"));
            assert_eq!(rehearsal.answer().status, status);
        }
    }

    #[test]
    fn the_host_of_http2_comes_from_the_target() {
        let mut rehearsal = Rehearsal::of("- redirect: { to: 'https://{host}{path}' }");
        rehearsal.request.set_uri(Uri::from_static("http://[2001:db8::1]:80/a"));
        assert_eq!(location(&rehearsal.answer()), "https://[2001:db8::1]/a");
    }

    #[test]
    fn an_expression_leads_where_it_may_and_nowhere_else() {
        let to = r#"- redirect: { to: { cel: 'request.args["to"]' }, hosts: [Login.example.com] }"#;
        let asking = |target: &str| Rehearsal::of(to).asking(target, &[HOST]);
        for (target, expected) in [
            ("/?to=/a/b%3fc%3dd", "/a/b?c=d"),
            ("/?to=//evil.example/x", "/evil.example/x"),
            ("/?to=/%5cevil.example", "/evil.example"),
            ("/?to=https://shop.example.com/x", "https://shop.example.com/x"),
            ("/?to=http://LOGIN.example.com:8443/x", "http://LOGIN.example.com:8443/x"),
            ("/?to=/a%0d%0aset-cookie:x", "/a%0D%0Aset-cookie:x"),
        ] {
            assert_eq!(location(&asking(target).answer()), expected, "{target}");
        }
        for target in [
            "/?to=https://evil.example/x",
            "/?to=https://shop.example.com@evil.example/",
            "/?to=https://shop.example.com%5c.evil.example/",
            "/?to=https://evil.example%5c@shop.example.com/",
            "/?to=javascript:alert(1)",
            "/?to=evil.example",
            "/?to=",
            "/",
        ] {
            assert_eq!(asking(target).refused().refusal, &UNFIT, "{target}");
        }
    }

    #[test]
    fn an_expression_that_leads_nowhere_is_told_with_its_place() {
        let told = error("- redirect: { to: { cel: request.pth } }");
        assert!(told.starts_with("[0].redirect.to.cel (at 1:1 of the expression): nothing is called"), "{told}");
        let told = "[0].redirect.hosts: only an expression needs leave: take it out, or write `to: { cel: … }`";
        assert_eq!(error("- redirect: { to: /x, hosts: [a] }"), told);
        let told = "[0].redirect.hosts[0]: `a:80` is not a host: write one such as `example.com`, without a port";
        assert_eq!(error("- redirect: { to: { cel: request.path }, hosts: ['a:80'] }"), told);
    }

    #[test]
    fn a_path_never_chooses_the_host() {
        for (target, local) in [
            ("//evil.example/x", "/evil.example/x"),
            ("/\\evil.example", "/evil.example"),
            ("///\\/evil.example", "/evil.example"),
            ("//", "/"),
        ] {
            assert_eq!(led("{path}", target), local);
            assert_eq!(led("{path_and_query}", target), local);
            assert_eq!(led("/{path}", target), local);
        }
        assert_eq!(led("/{query}", "/?/evil.example"), "/evil.example");
        assert_eq!(led("https://a.example{path}", "//evil.example"), "https://a.example//evil.example");
        assert_eq!(led("https://a.example{path}", "*"), "https://a.example/");
    }

    #[test]
    fn what_is_not_ascii_is_encoded() {
        assert_eq!(led("{path_and_query}", "/grün?q=é"), "/gr%C3%BCn?q=%C3%A9");
        assert_eq!(led("{path}", "/%0d%0aset-cookie:%20a"), "/%0d%0aset-cookie:%20a");
    }

    #[test]
    fn a_request_without_a_usable_host_or_path_is_refused() {
        for host in ["", "a b", "user@evil.example", "a:b"] {
            let mut rehearsal = Rehearsal::of("- redirect: { to: 'https://{host}/' }").asking("/", &[("host", host)]);
            assert_eq!(rehearsal.refused().refusal.reason, "route.redirect", "{host}");
        }
        let mut without = Rehearsal::of("- redirect: { to: 'https://{host}/' }");
        assert_eq!(without.refused().refusal, &UNFIT);
        let mut garbled = Rehearsal::of("- redirect: { to: '{path}' }");
        garbled.request.set_raw_path(b"/\xff").unwrap();
        assert_eq!(garbled.refused().refusal, &UNFIT);
    }

    #[test]
    fn wrong_settings_are_told_with_their_place() {
        let told = |to| error(&format!("- redirect: {{ to: '{to}' }}"));
        let known = "the placeholders are `{scheme}`, `{host}`, `{path}`, `{query}`, `{path_and_query}`";
        assert_eq!(told("/{uri}"), format!("[0].redirect.to: `{{uri}}` is not a placeholder; {known}"));
        assert_eq!(told("/{path"), "[0].redirect.to: `/{path` has a `{` without `}`");
        assert_eq!(
            told("//a/{path}"),
            "[0].redirect.to: `//a/{path}` leaves the scheme out; write `{scheme}://a/{path}`"
        );
        for to in ["", "example.com", "ftp://a/", "{host}/x", "{query}", "javascript:alert(1)"] {
            let begin =
                format!("[0].redirect.to: `{to}` must begin with `https://`, `http://`, `{{scheme}}://` or `/`");
            assert_eq!(told(to), begin);
        }
        for to in ["https://", "https:///x", "https://{path}", "https://a@b/", "https://a b/"] {
            assert_eq!(told(to), format!("[0].redirect.to: `{to}` has no host, or none that is one"));
        }
        for to in ["https://a.example{query}", "https://a.example:{query}/", "https://{scheme}.example/"] {
            let choose = "the client could choose the host: put a `/` or a `?` behind the host";
            assert_eq!(told(to), format!("[0].redirect.to: in `{to}` {choose}"));
        }
        let space = "[0].redirect.to: `/a b` is not a URL: spaces and the like must be percent-encoded";
        assert_eq!(told("/a b"), space);
        let split = error(r#"- redirect: { to: "/a\r\nSet-Cookie: b" }"#);
        assert!(split.ends_with("is not a URL: spaces and the like must be percent-encoded"), "{split}");
    }

    #[test]
    fn wrong_statuses_are_told_with_their_place() {
        let told = "[0].redirect.status: `304` is not a redirect status: write 301, 302, 303, 307 or 308";
        assert_eq!(error("- redirect: { to: /x, status: 304 }"), told);
        assert_eq!(error("- redirect: {}"), "[0].redirect: missing field `to`");
        let told = "[0].redirect.code: unknown field `code`, expected one of `to`, `status`, `hosts`";
        assert_eq!(error("- redirect: { to: /x, code: 301 }"), told);
    }
}
