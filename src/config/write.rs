//! Writes configuration files for people: block style for long values, flow style for short ones, and comments.
//!
//! Commands that create files build a [`Node`] and print it. The output is read like any other file.

use std::fmt::Write as _;

/// Lines are broken at this width where possible.
const WIDTH: usize = 100;

/// A value to write.
#[derive(Clone, Debug, PartialEq)]
pub enum Node {
    /// Text, quoted where YAML would read something else. `${` stays as it is.
    Text(String),
    /// A number, a boolean or another word, written as it is.
    Word(String),
    /// A list.
    List(Vec<Node>),
    /// A map.
    Map(Map),
}

/// A map whose keys keep their order.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Map(Vec<Entry>);

#[derive(Clone, Debug, PartialEq)]
struct Entry {
    key: String,
    value: Node,
    /// Lines above the entry.
    comments: Vec<String>,
}

impl Node {
    /// Text.
    pub fn text(text: impl Into<String>) -> Node {
        Node::Text(text.into())
    }

    /// A number or another unquoted word.
    pub fn word(word: impl ToString) -> Node {
        Node::Word(word.to_string())
    }

    /// An expression: `{ cel: … }`.
    pub fn cel(expression: impl Into<String>) -> Node {
        Node::Map(Map::default().with("cel", Node::text(expression)))
    }

    /// A list of texts.
    pub fn texts<T: Into<String>>(texts: impl IntoIterator<Item = T>) -> Node {
        Node::List(texts.into_iter().map(Node::text).collect())
    }

    /// The value in flow style; `None` if it contains a comment that needs its own line.
    fn flow(&self) -> Option<String> {
        match self {
            Node::Text(text) => Some(quoted(text)),
            Node::Word(word) => Some(word.clone()),
            Node::List(items) if items.is_empty() => Some("[]".to_owned()),
            Node::List(items) => {
                let items: Option<Vec<String>> = items.iter().map(Node::flow).collect();
                Some(format!("[{}]", items?.join(", ")))
            }
            Node::Map(Map(entries)) if entries.is_empty() => Some("{}".to_owned()),
            Node::Map(Map(entries)) => {
                let entry = |entry: &Entry| {
                    let plain = entry.comments.is_empty();
                    Some(format!("{}: {}", key(&entry.key), entry.value.flow().filter(|_| plain)?))
                };
                Some(format!("{{ {} }}", entries.iter().map(entry).collect::<Option<Vec<String>>>()?.join(", ")))
            }
        }
    }

    /// Appends the value to `out`; `used` columns of the line are taken.
    fn put(&self, out: &mut String, indent: usize, used: usize) {
        if let Some(flow) = self.flow().filter(|flow| self.is_simple() || used + flow.len() <= WIDTH) {
            out.push_str(&flow);
            out.push('\n');
            return;
        }
        match self {
            Node::Text(_) | Node::Word(_) => {}
            Node::List(items) => {
                end_line(out);
                for item in items {
                    let _ = write!(out, "{:indent$}- ", "");
                    match item {
                        Node::Map(map) if !item.fits(indent + 2) => map.entries(out, indent + 2, true),
                        other => other.put(out, indent + 2, indent + 2),
                    }
                }
            }
            Node::Map(map) => {
                end_line(out);
                map.entries(out, indent, false);
            }
        }
    }

    fn is_simple(&self) -> bool {
        matches!(self, Node::Text(_) | Node::Word(_))
    }

    fn fits(&self, used: usize) -> bool {
        self.flow().is_some_and(|flow| used + flow.len() <= WIDTH)
    }
}

impl Map {
    /// The map with one more entry.
    pub fn with(mut self, key: impl Into<String>, value: Node) -> Map {
        self.put(key, value);
        self
    }

    /// Adds an entry, or replaces the one with this key.
    pub fn put(&mut self, key: impl Into<String>, value: Node) {
        let key = key.into();
        match self.0.iter_mut().find(|entry| entry.key == key) {
            Some(entry) => entry.value = value,
            None => self.0.push(Entry { key, value, comments: Vec::new() }),
        }
    }

    /// The map at this key, created if missing.
    ///
    /// # Panics
    ///
    /// If the value at this key is not a map.
    pub fn at(&mut self, key: &str) -> &mut Map {
        if !self.0.iter().any(|entry| entry.key == key) {
            self.put(key, Node::Map(Map::default()));
        }
        match self.0.iter_mut().find(|entry| entry.key == key).map(|entry| &mut entry.value) {
            Some(Node::Map(map)) => map,
            _ => panic!("`{key}` is no map"),
        }
    }

    /// Adds a comment above the entry of this key.
    pub fn comment(&mut self, key: &str, comment: impl Into<String>) {
        if let Some(entry) = self.0.iter_mut().find(|entry| entry.key == key) {
            entry.comments.push(comment.into());
        }
    }

    /// Whether the map is empty.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The value of this key.
    pub fn find(&self, key: &str) -> Option<&Node> {
        self.0.iter().find(|entry| entry.key == key).map(|entry| &entry.value)
    }

    /// Its entries, without their comments.
    pub fn into_entries(self) -> impl Iterator<Item = (String, Node)> {
        self.0.into_iter().map(|entry| (entry.key, entry.value))
    }

    /// A file with this map as its root.
    pub fn file(&self) -> String {
        let mut out = String::new();
        for (index, entry) in self.0.iter().enumerate() {
            if index > 0 && (entry.value.flow().is_none() || !entry.value.fits(entry.key.len() + 2)) {
                out.push('\n');
            }
            Map(vec![entry.clone()]).entries(&mut out, 0, false);
        }
        out
    }

    /// Writes the entries in block style; the first one follows a `- ` if `behind_dash`.
    fn entries(&self, out: &mut String, indent: usize, behind_dash: bool) {
        for (index, Entry { key, value, comments }) in self.0.iter().enumerate() {
            let mut first = behind_dash && index == 0;
            for comment in comments {
                if !first {
                    let _ = write!(out, "{:indent$}", "");
                }
                let _ = writeln!(out, "# {comment}");
                first = false;
            }
            if !first {
                let _ = write!(out, "{:indent$}", "");
            }
            let key = self::key(key);
            let _ = write!(out, "{key}: ");
            value.put(out, indent + 2, indent + key.len() + 2);
        }
    }
}

/// Ends a line and removes a trailing blank.
fn end_line(out: &mut String) {
    out.truncate(out.trim_end_matches(' ').len());
    out.push('\n');
}

/// Writes a key. `on` needs no quotes for us, although YAML 1.1 reads it as a boolean.
fn key(text: &str) -> String {
    if text == "on" { text.to_owned() } else { quoted(text) }
}

/// Text in a form that YAML reads back unchanged, in flow and block style.
fn quoted(text: &str) -> String {
    let text = text.replace("${", "$${");
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '/' | '-' | '+' | '%' | ':' | '^');
    let begins = text.starts_with(|c: char| c.is_ascii_alphanumeric() || matches!(c, '/' | '_'));
    let word = ["true", "false", "yes", "no", "on", "off", "null", "y", "n"];
    let taken = text.parse::<f64>().is_ok() || word.contains(&&*text.to_ascii_lowercase());
    let number =
        !text.contains('.') && text.bytes().all(|byte| byte.is_ascii_digit() || b".:_xXoObeE+-".contains(&byte));
    if begins && text.chars().all(plain) && !text.ends_with(':') && !taken && !number {
        return text;
    }
    if text.chars().any(char::is_control) {
        return escaped(&text);
    }
    if text.contains(['"', '\\']) { format!("'{}'", text.replace('\'', "''")) } else { format!("\"{text}\"") }
}

/// In double quotes, with characters escaped as in YAML 1.2 §5.7.
fn escaped(text: &str) -> String {
    let mut quoted = String::from("\"");
    for one in text.chars() {
        match one {
            '"' | '\\' => quoted.extend(['\\', one]),
            '\n' => quoted.push_str("\\n"),
            '\t' => quoted.push_str("\\t"),
            _ if one.is_control() => {
                let _ = write!(quoted, "\\u{:04x}", u32::from(one));
            }
            _ => quoted.push(one),
        }
    }
    quoted + "\""
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_are_read_back_as_they_were() {
        for text in [
            "",
            "a",
            "127.0.0.1:8080",
            "::1",
            "*.example.com",
            "~",
            "yes",
            "8080",
            "1.5",
            "1e3",
            "0x10",
            "12:30",
            "a: b",
            "a #b",
            "it's",
            "say \"x\"",
            "back\\slash",
            "two\nlines",
            "{cel}",
            "[a]",
            "- a",
            "&a",
            "*a",
            "!a",
            "%a",
            "@a",
            "`a`",
            "a,b",
            "/users/([0-9]+)",
            "$1",
            " a ",
            "ü",
            "\u{7f}",
            "null",
            "Off",
            "a:",
            ">",
            "|",
            "?",
            "10/s",
            "2024-01-01",
        ] {
            for written in [
                Map::default().with("key", Node::text(text)).file(),
                Map::default().with("list", Node::texts([text, "b"])).file(),
            ] {
                let read: serde_yaml::Value = serde_yaml::from_str(&written).unwrap_or_else(|e| panic!("{written}{e}"));
                let back = read.get("key").unwrap_or_else(|| &read["list"][0]);
                assert_eq!(back.as_str(), Some(text), "{written}");
            }
        }
        assert_eq!(quoted("${a}"), "\"$${a}\"");
    }

    #[test]
    fn what_is_short_is_on_one_line_and_what_is_long_is_not() {
        let mut route = Map::default().with("name", Node::text("all"));
        route.at("match").put("hosts", Node::texts(["a.example", "b.example"]));
        let long = (0..12).map(|n| format!("host-{n}.example.com"));
        let other = Map::default()
            .with("name", Node::text("long"))
            .with("hosts", Node::texts(long))
            .with("size", Node::word(1));
        let mut file = Map::default().with("routes", Node::List(vec![Node::Map(route), Node::Map(other)]));
        file.comment("routes", "the most specific wins");
        assert_eq!(
            file.file(),
            "# the most specific wins\nroutes:\n  - { name: all, match: { hosts: [a.example, b.example] } }\n  - name: long\n    \
             hosts:\n      - host-0.example.com\n      - host-1.example.com\n      - host-2.example.com\n      - \
             host-3.example.com\n      - host-4.example.com\n      - host-5.example.com\n      - host-6.example.com\n      - \
             host-7.example.com\n      - host-8.example.com\n      - host-9.example.com\n      - host-10.example.com\n      - \
             host-11.example.com\n    size: 1\n"
        );
    }

    #[test]
    fn a_comment_has_a_line_of_its_own() {
        let mut route = Map::default().with("name", Node::text("all")).with("upstream", Node::text("app"));
        route.comment("name", "nginx.conf:3");
        let file = Map::default().with("routes", Node::List(vec![Node::Map(route)]));
        assert_eq!(file.file(), "routes:\n  - # nginx.conf:3\n    name: all\n    upstream: app\n");
    }
}
