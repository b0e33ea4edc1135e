//! The syntax of nginx's configuration: words, quotes, comments, blocks and `include`. Only `include` and Lua
//! blocks, which have their own syntax, are treated specially.
//!
//! It must parse every file that nginx accepts, with directives of any module, and record the line of each.

use std::rc::Rc;

/// A directive: name, arguments and block.
#[derive(Clone, Debug, PartialEq)]
pub struct Directive {
    /// The name. In blocks such as `map`, the first word of a line.
    pub name: String,
    /// The arguments, without quotes.
    pub words: Vec<String>,
    /// The content of its block; `None` if it ends with a semicolon.
    pub block: Option<Vec<Directive>>,
    /// Its position.
    pub place: Place,
}

/// A line of a file.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Place {
    /// The file name as given.
    pub file: Rc<str>,
    /// Counted from 1.
    pub line: usize,
}

/// A syntax error.
#[derive(Clone, Debug, PartialEq)]
pub struct Fault {
    /// Its position.
    pub place: Place,
    /// The error.
    pub message: String,
}

/// Resolves an `include` pattern to files in order, with their text.
pub type Files<'f> = &'f dyn Fn(&str) -> Result<Vec<(String, String)>, String>;

/// Limit on nested blocks and files.
const DEPTH_MAX: usize = 64;
/// Limit on the directives of all files together.
const DIRECTIVES_MAX: usize = 200_000;

impl Directive {
    /// The argument with this index; empty if there is none.
    pub fn word(&self, index: usize) -> &str {
        self.words.get(index).map_or("", String::as_str)
    }

    /// The content of its block.
    pub fn inside(&self) -> &[Directive] {
        self.block.as_deref().unwrap_or_default()
    }

    /// The directive in normal form, without its block.
    pub fn line(&self) -> String {
        let words: String = self.words.iter().map(|word| format!(" {}", shown(word))).collect();
        format!("{}{words}", shown(&self.name))
    }
}

fn shown(word: &str) -> String {
    let plain = !word.is_empty() && !word.contains([' ', '\t', '\n', ';', '"', '\'']);
    if plain { word.to_owned() } else { format!("\"{}\"", word.replace('"', "\\\"").replace('\n', "\\n")) }
}

/// Parses a file and its includes. Includes that fail are reported to `missing` and skipped.
///
/// # Errors
///
/// The first syntax error.
pub fn read(
    file: &str,
    text: &str,
    files: Files<'_>,
    missing: &mut Vec<(Directive, String)>,
) -> Result<Vec<Directive>, Fault> {
    let mut left = DIRECTIVES_MAX;
    Reader { files, missing, left: &mut left, depth: 0 }.file(file, text)
}

struct Reader<'r> {
    files: Files<'r>,
    missing: &'r mut Vec<(Directive, String)>,
    left: &'r mut usize,
    depth: usize,
}

impl Reader<'_> {
    fn file(&mut self, file: &str, text: &str) -> Result<Vec<Directive>, Fault> {
        let mut tokens = Tokens { file: file.into(), rest: text, line: 1 };
        self.directives(&mut tokens, None)
    }

    /// Parses up to the end of a block or the file.
    fn directives(&mut self, tokens: &mut Tokens<'_>, opened: Option<usize>) -> Result<Vec<Directive>, Fault> {
        let mut found = Vec::new();
        self.depth += 1;
        if self.depth > DEPTH_MAX {
            return Err(tokens.fault("blocks and files are nested too deeply"));
        }
        loop {
            let Some(first) = tokens.next()? else {
                if let Some(line) = opened {
                    return Err(tokens.fault(&format!("the file ends in the block of line {line}")));
                }
                break;
            };
            let place = Place { file: tokens.file.clone(), line: first.line };
            let name = match first.kind {
                Kind::Word(name) => name,
                Kind::Close if opened.is_some() => break,
                Kind::Close => return Err(tokens.fault_at(first.line, "a `}` without a `{`")),
                Kind::Open => return Err(tokens.fault_at(first.line, "a `{` without a name before it")),
                Kind::End => return Err(tokens.fault_at(first.line, "a `;` without anything before it")),
            };
            let mut words = Vec::new();
            let block = loop {
                let Some(token) = tokens.next()? else {
                    return Err(tokens.fault_at(place.line, &format!("`{name}` has neither a `;` nor a block")));
                };
                match token.kind {
                    Kind::Word(word) => words.push(word),
                    Kind::End => break None,
                    Kind::Open if name.ends_with("_by_lua_block") => {
                        tokens.skip_lua(token.line)?;
                        break Some(Vec::new());
                    }
                    Kind::Open => break Some(self.directives(tokens, Some(token.line))?),
                    Kind::Close => {
                        return Err(tokens.fault_at(token.line, &format!("`{name}` has no `;` before the `}}`")));
                    }
                }
            };
            *self.left = self.left.checked_sub(1).ok_or_else(|| tokens.fault("there are too many directives"))?;
            let directive = Directive { name, words, block, place };
            if directive.name == "include" && directive.block.is_none() {
                found.extend(self.include(directive)?);
            } else {
                found.push(directive);
            }
        }
        self.depth -= 1;
        Ok(found)
    }

    fn include(&mut self, directive: Directive) -> Result<Vec<Directive>, Fault> {
        match (self.files)(directive.word(0)) {
            Ok(files) => {
                let mut found = Vec::new();
                for (name, text) in files {
                    found.extend(self.file(&name, &text)?);
                }
                Ok(found)
            }
            Err(why) => {
                self.missing.push((directive, why));
                Ok(Vec::new())
            }
        }
    }
}

/// A word or a mark, and its first line.
struct Token {
    kind: Kind,
    line: usize,
}

enum Kind {
    Word(String),
    Open,
    Close,
    End,
}

struct Tokens<'t> {
    file: Rc<str>,
    rest: &'t str,
    line: usize,
}

impl Tokens<'_> {
    fn fault(&self, message: &str) -> Fault {
        self.fault_at(self.line, message)
    }

    fn fault_at(&self, line: usize, message: &str) -> Fault {
        Fault { place: Place { file: self.file.clone(), line }, message: message.to_owned() }
    }

    fn peek(&self) -> Option<char> {
        self.rest.chars().next()
    }

    fn take(&mut self) -> Option<char> {
        let first = self.peek()?;
        self.rest = &self.rest[first.len_utf8()..];
        self.line += usize::from(first == '\n');
        Some(first)
    }

    fn next(&mut self) -> Result<Option<Token>, Fault> {
        while let Some(first) = self.peek() {
            if first == '#' {
                self.rest = &self.rest[self.rest.find('\n').unwrap_or(self.rest.len())..];
            } else if first.is_ascii_whitespace() || first == '\u{feff}' {
                self.take();
            } else {
                break;
            }
        }
        let line = self.line;
        let kind = match self.peek() {
            None => return Ok(None),
            Some(';') => Kind::End,
            Some('{') => Kind::Open,
            Some('}') => Kind::Close,
            Some(quote @ ('"' | '\'')) => {
                self.take();
                return Ok(Some(Token { kind: Kind::Word(self.quoted(quote, line)?), line }));
            }
            Some(_) => return Ok(Some(Token { kind: Kind::Word(self.bare()), line })),
        };
        self.take();
        Ok(Some(Token { kind, line }))
    }

    fn quoted(&mut self, quote: char, line: usize) -> Result<String, Fault> {
        let mut word = String::new();
        loop {
            match self.take() {
                None => return Err(self.fault_at(line, "a quote that is never closed")),
                Some('\\') => self.escaped(&mut word),
                Some(one) if one == quote => break,
                Some(one) => word.push(one),
            }
        }
        match self.peek() {
            None | Some(';' | '{' | '}' | ')') => Ok(word),
            Some(next) if next.is_ascii_whitespace() => Ok(word),
            Some(next) => Err(self.fault(&format!("a `{next}` behind a quote"))),
        }
    }

    /// An unquoted word. The brace of `${name}` does not begin a block.
    fn bare(&mut self) -> String {
        let mut word = String::new();
        while let Some(next) = self.peek() {
            let of_variable = next == '{' && word.ends_with('$');
            if next.is_ascii_whitespace() || next == ';' || (next == '{' && !of_variable) {
                break;
            }
            self.take();
            if next == '\\' { self.escaped(&mut word) } else { word.push(next) }
        }
        word
    }

    /// An escape sequence: nginx knows a few letters, and keeps the backslash before all others.
    fn escaped(&mut self, word: &mut String) {
        match self.take() {
            Some(one @ ('"' | '\'' | '\\')) => word.push(one),
            Some('t') => word.push('\t'),
            Some('r') => word.push('\r'),
            Some('n') => word.push('\n'),
            Some(one) => word.extend(['\\', one]),
            None => word.push('\\'),
        }
    }

    /// A Lua block: its braces are balanced, except in strings and comments.
    fn skip_lua(&mut self, line: usize) -> Result<(), Fault> {
        let mut open = 1;
        while let Some(one) = self.take() {
            match one {
                '{' => open += 1,
                '}' => open -= 1,
                '-' if self.rest.starts_with('-') => {
                    self.rest = &self.rest[self.rest.find('\n').unwrap_or(self.rest.len())..];
                }
                '"' | '\'' => {
                    while let Some(inner) = self.take() {
                        match inner {
                            '\\' => drop(self.take()),
                            _ if inner == one || inner == '\n' => break,
                            _ => {}
                        }
                    }
                }
                _ => {}
            }
            if open == 0 {
                return Ok(());
            }
        }
        Err(self.fault_at(line, "a block of Lua that is never closed"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(text: &str) -> Result<Vec<Directive>, String> {
        let files = |name: &str| match name {
            "inner.conf" => Ok(vec![("inner.conf".to_owned(), "c 3;\n".to_owned())]),
            "loop.conf" => Ok(vec![("loop.conf".to_owned(), "include loop.conf;".to_owned())]),
            _ => Err("no such file".to_owned()),
        };
        let told = |fault: Fault| format!("{}:{}: {}", fault.place.file, fault.place.line, fault.message);
        read("nginx.conf", text, &files, &mut Vec::new()).map_err(told)
    }

    /// Names, words and blocks on one line.
    fn flat(directives: &[Directive]) -> String {
        let one = |directive: &Directive| {
            let words: Vec<&str> = directive.words.iter().map(String::as_str).collect();
            let block = directive.block.as_ref().map(|block| format!("{{{}}}", flat(block))).unwrap_or_default();
            format!("{}[{}]{block}", directive.name, words.join("|"))
        };
        directives.iter().map(one).collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn words_quotes_comments_and_blocks() {
        for (text, read) in [
            ("a;", "a[]"),
            ("a b c ;# no\nd;", "a[b|c] d[]"),
            ("a { b 1; c { } }", "a[]{b[1] c[]{}}"),
            ("a{b 1;}", "a[]{b[1]}"),
            ("a 'b c' \"d # e\" f#g;", "a[b c|d # e|f#g]"),
            (r#"a "say \"x\"" 'it\'s' \.php$ "\d+";"#, r#"a[say "x"|it's|\.php$|\d+]"#),
            ("a ${b}c/$d;", "a[${b}c/$d]"),
            ("location ~ ^/[0-9]{2}$ { }", "location[~|^/[0-9]]{2[]{}"),
            (r#"location ~ "^/[0-9]{2}$" { }"#, "location[~|^/[0-9]{2}$]{}"),
            ("log_format main '$a '\n '\"$b\"';", "log_format[main|$a |\"$b\"]"),
            ("if ($a = \"b\") { return 403; }", "if[($a|=|b|)]{return[403]}"),
            ("map $a $b { default 1; ~x 2; }", "map[$a|$b]{default[1] ~x[2]}"),
            ("a; include inner.conf; include other.conf; b;", "a[] c[3] b[]"),
            ("content_by_lua_block { local t = { a = \"}\" } -- }\n } b;", "content_by_lua_block[]{} b[]"),
            ("", ""),
        ] {
            match parsed(text) {
                Ok(directives) => assert_eq!(flat(&directives), read, "{text}"),
                // nginx also rejects a brace in a word.
                Err(error) => assert!(text.contains("[0-9]{2}$ {"), "{text}: {error}"),
            }
        }
    }

    #[test]
    fn every_directive_knows_its_line() {
        let read = parsed("a;\n\n# x\nb 'two\nlines' {\n c;\n}\ninclude inner.conf;").expect("directives");
        let places: Vec<_> = read.iter().map(|one| (&*one.place.file, one.place.line)).collect();
        assert_eq!(places, [("nginx.conf", 1), ("nginx.conf", 4), ("inner.conf", 1)]);
        assert_eq!(read[1].inside()[0].place.line, 6);
        assert_eq!(read[1].line(), "b \"two\\nlines\"");
    }

    #[test]
    fn what_is_not_in_the_grammar_is_told_with_its_line() {
        for (text, told) in [
            ("a", "nginx.conf:1: `a` has neither a `;` nor a block"),
            ("a {\n b;", "nginx.conf:2: the file ends in the block of line 1"),
            ("a;\n}", "nginx.conf:2: a `}` without a `{`"),
            ("{ }", "nginx.conf:1: a `{` without a name before it"),
            (";", "nginx.conf:1: a `;` without anything before it"),
            ("a { b }", "nginx.conf:1: `b` has no `;` before the `}`"),
            ("a\n 'b", "nginx.conf:2: a quote that is never closed"),
            ("a 'b'c;", "nginx.conf:1: a `c` behind a quote"),
            ("x_by_lua_block { {", "nginx.conf:1: a block of Lua that is never closed"),
            ("include loop.conf;", "loop.conf:1: blocks and files are nested too deeply"),
        ] {
            assert_eq!(parsed(text).expect_err(text), told);
        }
        assert!(parsed(&"a {".repeat(100_000)).is_err(), "nothing overflows");
    }
}
