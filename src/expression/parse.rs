//! Parses text to a tree with the `cel` crate, and translates its error messages.

use std::ops::Range;

use cel::common::ast::{Expr, IdedExpr, SourceInfo};
use cel::parser::{ParseError, Parser};

use super::Mistake;

/// The nesting limit of brackets; deeper expressions are unreadable. The parser's own limit is 96.
const BRACKETS_MAX: usize = 64;

/// A parsed expression with the place of each node.
pub(super) struct Tree<'w> {
    pub root: IdedExpr,
    written: &'w str,
    places: SourceInfo,
}

/// Parses what is `written`.
pub(super) fn tree(written: &str) -> Result<Tree<'_>, Mistake> {
    if let Some(at) = too_deep(written) {
        let told = format!("brackets stand in each other more than {BRACKETS_MAX} deep here: take some apart");
        return Err(Mistake::new(at..at + 1, told));
    }
    match Parser::new().parse_with_source_info(written) {
        Ok((root, places)) => Ok(Tree { root, written, places }),
        Err(errors) => Err(errors.errors.first().map_or_else(
            || Mistake::new(0..written.len(), "this expression is not understood"),
            |error| mistake(written, error),
        )),
    }
}

/// The first bracket beyond the limit. Brackets in literals do not count.
fn too_deep(written: &str) -> Option<usize> {
    let (mut depth, mut quote, mut escaped) = (0usize, None, false);
    for (at, byte) in written.bytes().enumerate() {
        match (quote, byte) {
            (Some(_), _) if escaped => escaped = false,
            (Some(_), b'\\') => escaped = true,
            (Some(open), _) if open == byte => quote = None,
            (Some(_), _) => {}
            (None, b'"' | b'\'') => quote = Some(byte),
            (None, b'(' | b'[' | b'{') => {
                depth += 1;
                if depth > BRACKETS_MAX {
                    return Some(at);
                }
            }
            (None, b')' | b']' | b'}') => depth = depth.saturating_sub(1),
            (None, _) => {}
        }
    }
    None
}

/// The first error of the parser. Its own message names tokens of a grammar.
fn mistake(written: &str, error: &ParseError) -> Mistake {
    let start = byte_of(written, error.pos);
    let here = start..end_of_token(written, start);
    let message = error.msg.trim_start_matches("Syntax error: ");
    if start >= written.trim_end().len() {
        let end = written.trim_end().len();
        let told = match missing(message) {
            Some(token) => format!("the expression ends too early: `{token}` is missing"),
            None => "the expression ends too early: something is missing behind this".to_owned(),
        };
        return Mistake::new(last_char(written, end)..end, told);
    }
    let found = &written[here.clone()];
    let told = if message.starts_with("token recognition error") {
        match found.chars().next() {
            Some('"' | '\'') => "this text has no closing quote, or a `\\` in it that means nothing: \
                                 write `\\\\` for a backslash, or `r\"…\"` around a pattern"
                .to_owned(),
            Some('=') => "`=` is not an operator: write `==`".to_owned(),
            Some('&') => "`&` is not an operator: write `&&`".to_owned(),
            Some('|') => "`|` is not an operator: write `||`".to_owned(),
            Some(other) => format!("`{other}` has no meaning in an expression"),
            None => "this has no meaning in an expression".to_owned(),
        }
    } else if message.contains("has() macro") {
        "`has` takes a field such as `request.headers.host`: for a name with a `-`, write `\"x-user\" in request.headers`"
            .to_owned()
    } else if message.starts_with("reserved identifier") {
        format!("`{found}` is a word that CEL keeps for itself")
    } else if message.starts_with("unsupported syntax") {
        "this way of writing is not offered: what is missing reads as an empty text anyway".to_owned()
    } else if message.starts_with("invalid int literal") || message.starts_with("invalid uint literal") {
        format!("`{found}` is not an integer of 64 bits")
    } else if message.starts_with("invalid double literal") {
        format!("`{found}` is not a number")
    } else if message.contains("argument must be a simple name") || message.contains("cannot be") {
        LOOPS.to_owned()
    } else if let Some(token) = missing(message) {
        format!("`{token}` is missing before `{found}`")
    } else {
        format!("`{found}` is not expected here")
    };
    Mistake::new(here, told)
}

/// The message for `all`, `map` and the like.
pub(super) const LOOPS: &str = "`all`, `exists`, `exists_one`, `map` and `filter` are not offered, so that the cost of an \
                                expression is bounded: name what you look for, as in `\"a\" in request.headers[\"x\"].split(\",\")`";

/// The single token that the parser expected.
fn missing(message: &str) -> Option<&str> {
    message.strip_prefix("missing '")?.split_once('\'').map(|(token, _)| token)
}

/// The byte at a line and a column. Both count from 1, the column in characters.
fn byte_of(written: &str, (line, column): (isize, isize)) -> usize {
    let (line, column) = (usize::try_from(line).unwrap_or(1).max(1), usize::try_from(column).unwrap_or(1).max(1));
    let start: usize = written.split_inclusive('\n').take(line - 1).map(str::len).sum();
    let rest = &written[start..];
    start + rest.char_indices().nth(column - 1).map_or(rest.len(), |(at, _)| at)
}

fn last_char(written: &str, end: usize) -> usize {
    written[..end].char_indices().next_back().map_or(0, |(at, _)| at)
}

/// The end of the word, number or sign at `start`.
fn end_of_token(written: &str, start: usize) -> usize {
    let rest = &written[start..];
    let word = rest.find(|c: char| !is_word(c)).unwrap_or(rest.len());
    start + if word > 0 { word } else { rest.chars().next().map_or(0, char::len_utf8) }
}

fn is_word(c: char) -> bool {
    c.is_ascii_alphanumeric() || c == '_'
}

impl Tree<'_> {
    /// The bytes of a node, without brackets around it.
    pub fn place(&self, node: &IdedExpr) -> Range<usize> {
        let token = self.token(node);
        match &node.expr {
            // For the parser, `has(a.b)` is a selection at the place of the bracket.
            Expr::Select(select) if select.test => self.word_before(token.start)..self.closing(token.start),
            Expr::Select(select) => {
                let operand = self.place(&select.operand);
                operand.start.min(token.start)..self.word_behind(token.end)
            }
            Expr::Call(call) => match &call.target {
                Some(target) => self.place(target).start..self.closing(token.start),
                None if is_operator(&call.func_name) => {
                    let mut places = call.args.iter().map(|arg| self.place(arg)).chain([token]);
                    let first = places.next().unwrap_or_default();
                    let whole = places.fold(first, |all, one| all.start.min(one.start)..all.end.max(one.end));
                    if call.func_name == "_[_]" { whole.start..self.closing(self.token(node).start) } else { whole }
                }
                None => self.word_before(token.start)..self.closing(token.start),
            },
            Expr::List(_) | Expr::Map(_) | Expr::Struct(_) => token.start..self.closing(token.start),
            // The token of a literal does not include its sign.
            Expr::Literal(_) if self.written[..token.start].ends_with('-') => token.start - 1..token.end,
            _ => token,
        }
    }

    /// The name of the called function.
    pub fn name_of(&self, node: &IdedExpr) -> Range<usize> {
        let bracket = self.token(node).start;
        let end = self.written[..bracket].trim_end().len();
        self.word_before(bracket)..end
    }

    /// The name of the selected field.
    pub fn field_of(&self, node: &IdedExpr) -> Range<usize> {
        let end = self.word_behind(self.token(node).end);
        let start = self.written[..end].rfind(|c: char| !is_word(c)).map_or(0, |at| at + 1);
        start..end
    }

    /// The text at `place`.
    pub fn text(&self, place: Range<usize>) -> &str {
        self.written.get(place).unwrap_or_default()
    }

    /// The bytes of the token to which the parser assigned the node. For generated nodes, the whole expression.
    fn token(&self, node: &IdedExpr) -> Range<usize> {
        let Some((first, last)) = self.places.offset_for(node.id) else { return 0..self.written.len() };
        let within = |at: u32| usize::try_from(at).unwrap_or(usize::MAX).min(self.written.len());
        let (start, end) = (within(first), within(last.saturating_add(1)));
        if self.written.is_char_boundary(start) && self.written.is_char_boundary(end) && start <= end {
            start..end
        } else {
            0..self.written.len()
        }
    }

    /// The start of the word that ends before `at`.
    fn word_before(&self, at: usize) -> usize {
        let before = self.written[..at].trim_end();
        before.rfind(|c: char| !is_word(c)).map_or(0, |at| at + before[at..].chars().next().map_or(1, char::len_utf8))
    }

    /// The end of the word that begins after `at`.
    fn word_behind(&self, at: usize) -> usize {
        let rest = &self.written[at..];
        let blank = rest.len() - rest.trim_start().len();
        let word = &rest[blank..];
        at + blank + word.find(|c: char| !is_word(c)).unwrap_or(word.len())
    }

    /// The byte after the bracket that closes the one at `at`.
    fn closing(&self, at: usize) -> usize {
        let (mut depth, mut quote, mut escaped) = (0usize, None, false);
        for (offset, byte) in self.written.bytes().enumerate().skip(at) {
            match (quote, byte) {
                (Some(_), _) if escaped => escaped = false,
                (Some(_), b'\\') => escaped = true,
                (Some(open), _) if open == byte => quote = None,
                (Some(_), _) => {}
                (None, b'"' | b'\'') => quote = Some(byte),
                (None, b'(' | b'[' | b'{') => depth += 1,
                (None, b')' | b']' | b'}') => {
                    depth = depth.saturating_sub(1);
                    if depth == 0 {
                        return offset + 1;
                    }
                }
                (None, _) => {}
            }
        }
        self.written.len()
    }
}

/// Operators have names that functions cannot have: `_+_`, `!_`, `@in`.
fn is_operator(name: &str) -> bool {
    name.bytes().any(|byte| !byte.is_ascii_alphanumeric() && byte != b'_' && byte != b'.')
}
