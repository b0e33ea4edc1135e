//! Patterns of `matches`, with CEL's semantics and bounded cost.
//!
//! The time of a search is linear in the text, but the cost per byte depends on the pattern: about a nanosecond with
//! an automaton of moderate size, and tens of microseconds if thousands of ways to match must be followed in
//! parallel. The client chooses the text, so a header could keep a worker busy for seconds. Therefore all states of
//! the automaton are visited when the file is loaded, and a pattern with too many states is refused.

use std::collections::HashSet;
use std::ops::Range;

use regex::{Regex, RegexBuilder, bytes};
use regex_automata::hybrid::dfa::DFA;
use regex_automata::nfa::thompson::{self, WhichCaptures};
use regex_automata::util::syntax;
use regex_automata::{Anchored, Input};
use regex_syntax::ast::{self, Ast, ClassPerl, ClassPerlKind, ClassSetItem, Visitor};

/// The size limit of a compiled pattern, without its automaton.
const BYTES_MAX: usize = 1 << 20;
/// The size limit of its automaton. The automaton is built on demand, and fits completely.
const AUTOMATON_BYTES_MAX: usize = 2 << 20;
/// The limit on states with a slower matcher, for patterns that need it for characters outside ASCII.
const SLOW_STATES_MAX: usize = 100;
/// The limit on states of a pattern with groups: a slower matcher finds the groups in each match.
const GROUPS_STATES_MAX: usize = 400;

/// Compiles a pattern.
///
/// # Errors
/// The reason for refusing the pattern.
pub(super) fn compile(written: &str) -> Result<Regex, String> {
    let pattern = read(written)?;
    // `.` also matches a line break: otherwise `%0A` in an argument would hide the following text from `a.*b`.
    let mut builder = RegexBuilder::new(&pattern);
    builder.dot_matches_new_line(true).size_limit(BYTES_MAX).dfa_size_limit(2 * AUTOMATON_BYTES_MAX);
    let compiled = builder.build().map_err(told)?;
    if is_bounded(&pattern, SLOW_STATES_MAX) { Ok(compiled) } else { Err(TOO_COSTLY.to_owned()) }
}

/// Compiles a pattern for bodies, optionally with groups. Here `.` does not match a line break.
///
/// # Errors
/// The reason for refusing the pattern.
pub(crate) fn in_bytes(written: &str) -> Result<bytes::Regex, String> {
    let pattern = format!("(?-s:{})", read(written)?);
    let mut builder = bytes::RegexBuilder::new(&pattern);
    builder.size_limit(BYTES_MAX).dfa_size_limit(2 * AUTOMATON_BYTES_MAX);
    let compiled = builder.build().map_err(told)?;
    let slow = if compiled.captures_len() > 1 { Some(GROUPS_STATES_MAX) } else { None };
    let states_max = slow.unwrap_or(SLOW_STATES_MAX);
    let bounded = is_bounded(&pattern, states_max) && slow.is_none_or(|most| states(&pattern) <= most);
    if bounded { Ok(compiled) } else { Err(TOO_COSTLY.to_owned()) }
}

fn read(written: &str) -> Result<String, String> {
    let ast = ast::parse::Parser::new().parse(written).map_err(|error| error.kind().to_string())?;
    Ok(in_ascii(written, &ast))
}

fn told(error: regex::Error) -> String {
    let told = error.to_string();
    told.lines().last().unwrap_or_default().trim().trim_start_matches("error: ").to_owned()
}

const TOO_COSTLY: &str = "a long text would take too long; count less, or let it begin with `^`";

/// In RE2, which CEL requires, `\d`, `\s`, `\w` and `\b` are for ASCII. The Unicode classes would take a hundred
/// times as many states.
fn in_ascii(written: &str, ast: &Ast) -> String {
    let mut pattern = String::with_capacity(written.len());
    let mut rest = 0;
    for (place, plain) in ast::visit(ast, Found::default()).unwrap_or_default() {
        pattern.push_str(&written[rest..place.start]);
        pattern.push_str(plain);
        rest = place.end;
    }
    pattern + &written[rest..]
}

/// The replacements in a pattern, in their order.
#[derive(Default)]
struct Found(Vec<(Range<usize>, &'static str)>);

impl Found {
    fn note(&mut self, span: &ast::Span, plain: &'static str) {
        self.0.push((span.start.offset..span.end.offset, plain));
    }

    fn class(&mut self, class: &ClassPerl) {
        let plain = match (&class.kind, class.negated) {
            (ClassPerlKind::Digit, false) => "[0-9]",
            (ClassPerlKind::Digit, true) => "[^0-9]",
            (ClassPerlKind::Space, false) => r"[\t\n\x0b\x0c\r ]",
            (ClassPerlKind::Space, true) => r"[^\t\n\x0b\x0c\r ]",
            (ClassPerlKind::Word, false) => "[0-9A-Za-z_]",
            (ClassPerlKind::Word, true) => "[^0-9A-Za-z_]",
        };
        self.note(&class.span, plain);
    }
}

impl Visitor for Found {
    type Output = Vec<(Range<usize>, &'static str)>;
    type Err = ();

    fn finish(self) -> Result<Self::Output, ()> {
        Ok(self.0)
    }

    fn visit_post(&mut self, ast: &Ast) -> Result<(), ()> {
        match ast {
            Ast::ClassPerl(class) => self.class(class),
            Ast::Assertion(assertion) if assertion.kind == ast::AssertionKind::WordBoundary => {
                self.note(&assertion.span, r"(?-u:\b)");
            }
            _ => {}
        }
        Ok(())
    }

    fn visit_class_set_item_post(&mut self, item: &ClassSetItem) -> Result<(), ()> {
        if let ClassSetItem::Perl(class) = item {
            self.class(class);
        }
        Ok(())
    }
}

/// The number of states if every way to match is followed; `usize::MAX` if there are too many to compile.
fn states(pattern: &str) -> usize {
    thompson::NFA::new(pattern).map_or(usize::MAX, |nfa| nfa.states().len())
}

/// Whether the complete automaton of a pattern fits into its limits. Visits all states. A pattern that needs the
/// slower matcher for some texts may have `slow_max` states there.
fn is_bounded(pattern: &str, slow_max: usize) -> bool {
    let config = DFA::config()
        .cache_capacity(AUTOMATON_BYTES_MAX)
        .minimum_cache_clear_count(Some(0))
        .unicode_word_boundary(true);
    let automaton = DFA::builder()
        .configure(config)
        .syntax(syntax::Config::new().dot_matches_new_line(true))
        .thompson(thompson::Config::new().which_captures(WhichCaptures::None))
        .build(pattern);
    // An automaton is not built if a single state is too large.
    let Ok(automaton) = automaton else { return false };
    let mut cache = automaton.create_cache();
    let Ok(start) = automaton.start_state_forward(&mut cache, &Input::new("").anchored(Anchored::No)) else {
        return false;
    };
    let (mut known, mut open, mut quits) = (HashSet::from([start]), vec![start], false);
    while let Some(state) = open.pop() {
        for byte in automaton.byte_classes().representatives(0..=u8::MAX).filter_map(|unit| unit.as_u8()) {
            let Ok(next) = automaton.next_state(&mut cache, state, byte) else { return false };
            quits |= next.is_quit();
            // The search ends at a match.
            if !(next.is_quit() || next.is_dead() || next.is_match()) && known.insert(next) {
                open.push(next);
            }
        }
    }
    !quits || automaton.get_nfa().states().len() <= slow_max
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::{Duration, Instant};

    #[test]
    fn classes_are_those_of_re2() {
        for (pattern, text, matches) in [
            (r"^\w+$", "a_Z9", true),
            (r"^\w$", "ä", false),
            (r"^[\w.-]+$", "a.b-c", true),
            (r"^[^\w]$", "ä", true),
            (r"^\W$", "ä", true),
            (r"^\d$", "٣", false),
            (r"^\D\S\s$", "a\u{e4}\t", true),
            (r"\bbot\b", "a bot, b", true),
            (r"\bbot\b", "robot", false),
            (r"\bbot\b", "ä-bot\u{e4}", true),
            (r"(?x) \d  # \w", "7", true),
            (r"\\d", "\\d", true),
            (r"^\p{L}$", "ä", true),
            (r"(?i)^ÄÖ$", "äö", true),
            ("a.b", "a\nb", true),
            ("(?-s)a.b", "a\nb", false),
        ] {
            assert_eq!(compile(pattern).map(|regex| regex.is_match(text)), Ok(matches), "{pattern} {text}");
        }
    }

    #[test]
    fn what_people_write_is_taken() {
        for pattern in [
            r"(?i)bot|crawler|spider|scrapy|curl|python-requests|go-http-client|libwww|headless",
            r"^/api/v\d+/(users|orders)/[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$",
            r"^[\w.+-]{1,64}@[\w-]{1,63}(\.[\w-]{1,63}){1,4}$",
            r"(?i)(union\s+(all\s+)?select|insert\s+into|drop\s+table|\bor\b\s+1=1)",
            r"^(?:[A-Za-z0-9_-]{2,400}\.){2}[A-Za-z0-9_-]{2,400}$",
            r"^(25[0-5]|2[0-4]\d|1?\d?\d)(\.(25[0-5]|2[0-4]\d|1?\d?\d)){3}$",
            r"(\.\./|%2e%2e|\x00)",
            r"^.{0,200}$",
            r"(?i)^(.*\.)?example\.(com|org)$",
            r"[^\x20-\x7e]",
        ] {
            assert!(compile(pattern).is_ok(), "{pattern}: {:?}", compile(pattern));
        }
    }

    #[test]
    fn no_pattern_takes_long_whatever_the_text() {
        let texts = [
            (0..30_000u32).map(|at| if (at * at / 7 + at / 3) % 3 == 0 { 'a' } else { 'b' }).collect::<String>(),
            "a".repeat(30_000),
            "ab ".repeat(10_000) + "\u{e4}",
        ];
        let mut refused = 0;
        for pattern in [
            r"[ab]*a[ab]{12}[^ab]",
            r"[ab]*a[ab]{4000}[^ab]",
            r"([ab]{1,60}){1,60}[^a-z]",
            r"([ab][ab]?){1,2000}[^a-z]",
            r"(a?){500}a{500}[^a-z]",
            r"(\w+\s*){2,10}[^a-z ]",
            r"\B([ab][ab]?){1,2000}[^a-z]",
            r"(.*a.{12})+z",
            r"(?i)(x|y|.*)*(a|b|ab)*\p{L}{1,9}!",
            r"((a{0,9}){0,9}){0,9}[^a]",
        ] {
            let begun = Instant::now();
            let Ok(regex) = compile(pattern) else {
                refused += 1;
                assert!(begun.elapsed() < Duration::from_secs(30), "{pattern} took {:?} to refuse", begun.elapsed());
                continue;
            };
            for text in &texts {
                // The first search builds the automaton.
                regex.is_match(text);
                let best = (0..3).map(|_| {
                    let begun = Instant::now();
                    regex.is_match(text);
                    begun.elapsed()
                });
                // About 50 µs with optimisation on an idle machine.
                assert!(best.min().unwrap_or_default() < Duration::from_millis(100), "{pattern}");
            }
        }
        assert!(refused >= 3, "{refused}");
    }
}
