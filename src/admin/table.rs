//! The table of the admin endpoint: one entry per method and path, and the index that is generated from them.
//!
//! A module that has something to show adds an entry to [`super::Admin`]; nothing else needs to change. A path
//! segment in braces, as in `/upstreams/{upstream}`, matches any one segment.

use std::fmt::Write;
use std::future::Future;
use std::pin::Pin;
use std::time::Duration;

use bytes::Bytes;
use http::{Method, Uri};

use super::guard::Voucher;
use super::reply::Reply;

type Later = Pin<Box<dyn Future<Output = Reply> + Send>>;

/// A request to the admin endpoint, as entries see it.
pub struct Ask {
    parts: Vec<(&'static str, String)>,
    query: String,
    html: bool,
    voucher: Voucher,
    /// The body: of a POST only, with limited length.
    pub body: Bytes,
}

impl Ask {
    pub(super) fn new(
        found: Vec<(&'static str, String)>,
        uri: &Uri,
        html: bool,
        voucher: Voucher,
        body: Bytes,
    ) -> Self {
        Ask { parts: found, query: uri.query().unwrap_or_default().to_owned(), html, voucher, body }
    }

    /// The decoded path segment for this name in the entry's path; empty if it has none.
    pub fn part(&self, name: &str) -> &str {
        self.parts.iter().find(|(of, _)| *of == name).map_or("", |(_, value)| value)
    }

    /// The first query argument with this name, decoded.
    pub fn query(&self, name: &str) -> Option<String> {
        self.arguments().find(|(of, _)| of == name).map(|(_, value)| value)
    }

    /// All query arguments, decoded, in order.
    pub fn arguments(&self) -> impl Iterator<Item = (String, String)> + '_ {
        let pairs = self.query.split('&').filter(|pair| !pair.is_empty());
        pairs.map(|pair| {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            (decoded(&name.replace('+', " ")), decoded(&value.replace('+', " ")))
        })
    }

    /// What entitles the client to operations that not every local user may run.
    pub fn voucher(&self) -> Voucher {
        self.voucher
    }

    /// Whether it comes from a browser that displays HTML.
    pub fn wants_html(&self) -> bool {
        self.html
    }
}

/// The handler of a method and a path.
pub struct Entry {
    /// GET, which also answers HEAD, or POST.
    pub method: Method,
    /// The path, with placeholders in braces.
    pub path: &'static str,
    says: &'static str,
    /// Time limit of the response.
    pub(super) patience: Duration,
    pub(super) answer: Box<dyn Fn(Ask) -> Later + Send + Sync>,
}

/// All entries.
#[derive(Default)]
pub struct Table(Vec<Entry>);

/// The result of a look-up.
pub enum Found<'t> {
    /// The entry, with the values of its placeholders.
    Entry(&'t Entry, Vec<(&'static str, String)>),
    /// The path exists, but only for these methods.
    Methods(String),
    /// No such path.
    Nothing,
}

impl Table {
    /// Adds an entry. `says` is its description in the index, `patience` the time limit of its response.
    pub fn add<F>(
        &mut self,
        method: Method,
        path: &'static str,
        says: &'static str,
        patience: Duration,
        answer: impl Fn(Ask) -> F + Send + Sync + 'static,
    ) where
        F: Future<Output = Reply> + Send + 'static,
    {
        self.0.push(Entry { method, path, says, patience, answer: Box::new(move |ask| Box::pin(answer(ask))) });
    }

    /// Looks up a method and a path.
    pub fn find(&self, method: &Method, path: &str) -> Found<'_> {
        let at_path: Vec<_> = self.0.iter().filter_map(|entry| Some((entry, matched(entry.path, path)?))).collect();
        if at_path.is_empty() {
            return Found::Nothing;
        }
        let wanted = if method == Method::HEAD { &Method::GET } else { method };
        let mut methods = Vec::new();
        for (entry, parts) in at_path {
            if entry.method == wanted {
                return Found::Entry(entry, parts);
            }
            let names: &[&str] = if entry.method == Method::GET { &["GET", "HEAD"] } else { &["POST"] };
            methods.extend_from_slice(names);
        }
        Found::Methods(methods.join(", "))
    }

    /// All entries, one per line.
    pub fn index(&self) -> String {
        let width = self.0.iter().map(|entry| entry.path.len()).max().unwrap_or_default();
        let mut text = "Forebay's admin endpoint\n\n".to_owned();
        for Entry { method, path, says, .. } in &self.0 {
            // Writing to a string cannot fail.
            let _ = writeln!(text, "{:<4} {path:<width$}  {says}", method.as_str());
        }
        text
    }
}

/// The decoded values of the placeholders in `pattern`; `None` if `path` does not match.
fn matched(pattern: &'static str, path: &str) -> Option<Vec<(&'static str, String)>> {
    let mut parts = Vec::new();
    let mut segments = path.split('/');
    for wanted in pattern.split('/') {
        let segment = segments.next()?;
        match wanted.strip_prefix('{').and_then(|name| name.strip_suffix('}')) {
            Some(_) if segment.is_empty() => return None,
            Some(name) => parts.push((name, decoded(segment))),
            None if wanted == segment => {}
            None => return None,
        }
    }
    segments.next().is_none().then_some(parts)
}

/// Decodes percent encoding (RFC 3986 §2.1); invalid sequences stay.
fn decoded(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&first, after)) = rest.split_first() {
        let code = after.get(..2).and_then(|code| u8::from_str_radix(std::str::from_utf8(code).ok()?, 16).ok());
        match code.filter(|_| first == b'%') {
            Some(byte) => (bytes.push(byte), rest = &after[2..]).1,
            None => (bytes.push(first), rest = after).1,
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table() -> Table {
        let mut table = Table::default();
        for (method, path) in [
            (Method::GET, "/status"),
            (Method::POST, "/upstreams/{upstream}/endpoints/{endpoint}/drain"),
            (Method::GET, "/upstreams/{upstream}"),
            (Method::POST, "/upstreams/{upstream}"),
        ] {
            table.add(method, path, "says it", Duration::ZERO, |_| std::future::ready(Reply::text("")));
        }
        table
    }

    fn parts(method: Method, path: &str) -> Option<Vec<(&'static str, String)>> {
        match table().find(&method, path) {
            Found::Entry(_, parts) => Some(parts),
            _ => None,
        }
    }

    #[test]
    fn a_segment_in_braces_takes_one_segment_whatever_is_in_it() {
        let found = parts(Method::POST, "/upstreams/shop/endpoints/%5b::1%5d:80/drain");
        assert_eq!(found, Some(vec![("upstream", "shop".into()), ("endpoint", "[::1]:80".into())]));
        assert_eq!(parts(Method::GET, "/upstreams/a%2fb"), Some(vec![("upstream", "a/b".into())]));
        for other in ["/upstreams/", "/upstreams", "/upstreams/a/b", "/status/", "status", ""] {
            assert!(matches!(table().find(&Method::GET, other), Found::Nothing), "{other}");
        }
    }

    #[test]
    fn a_path_without_the_method_tells_those_that_it_has() {
        let allowed = |method, path| match table().find(&method, path) {
            Found::Methods(methods) => methods,
            _ => String::new(),
        };
        assert_eq!(allowed(Method::POST, "/status"), "GET, HEAD");
        assert_eq!(allowed(Method::DELETE, "/upstreams/a"), "GET, HEAD, POST");
        assert_eq!(parts(Method::HEAD, "/status"), Some(Vec::new()));
        assert!(allowed(Method::HEAD, "/upstreams/a/endpoints/b/drain").contains("POST"));
    }

    #[test]
    fn arguments_are_decoded_and_what_is_no_code_stays() {
        let uri = Uri::from_static("/trace?route=a+b%26c&count&client=100%&%zz=1");
        let ask = Ask::new(Vec::new(), &uri, false, Voucher::Nothing, Bytes::new());
        assert_eq!(ask.query("route").as_deref(), Some("a b&c"));
        assert_eq!(ask.query("count").as_deref(), Some(""));
        assert_eq!(ask.query("client").as_deref(), Some("100%"));
        assert_eq!(ask.query("%zz").as_deref(), Some("1"));
        assert_eq!(ask.query("none"), None);
    }

    #[test]
    fn the_index_has_a_line_for_every_entry() {
        let index = table().index();
        assert_eq!(index.lines().count(), 2 + 4, "{index}");
        assert!(index.contains("GET  /status "), "{index}");
        assert!(index.contains("POST /upstreams/{upstream}/endpoints/{endpoint}/drain  says it\n"), "{index}");
    }
}
