//! Paths into a configuration, such as `routes[2].match.headers."x.y"`: writing, parsing and following them.
//!
//! A path is text, since it is shown to the operator. A step is the name of an entry or the index of an item. A name
//! with a dot, a bracket, a quote or white space is quoted, so that every path has only one meaning: `a.b` is the entry
//! `b` of `a`, and `"a.b"` is the entry with that name.

use std::borrow::Cow;

/// One step of a path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PathStep<'p> {
    /// To the entry of this name.
    Key(Cow<'p, str>),
    /// To the item at this index.
    Index(usize),
}

/// A tree that paths can be followed through.
pub trait Tree {
    /// The target of one step.
    fn child(&self, step: &PathStep<'_>) -> Option<&Self>;
}

/// Writes `name` as one step of a path: in quotes if it would be ambiguous without them.
pub fn key(name: &str) -> Cow<'_, str> {
    if !name.is_empty() && !name.contains(needs_quotes) {
        return name.into();
    }
    let mut quoted = String::with_capacity(name.len() + 2);
    quoted.push('"');
    for c in name.chars() {
        if matches!(c, '"' | '\\') {
            quoted.push('\\');
        }
        quoted.push(c);
    }
    quoted.push('"');
    quoted.into()
}

fn needs_quotes(c: char) -> bool {
    matches!(c, '.' | '[' | ']' | '"' | '\\') || c.is_whitespace() || c.is_control()
}

/// Appends the path `inner` to the path `outer`.
pub fn join(outer: &str, inner: &str) -> String {
    let joint = if outer.is_empty() || inner.is_empty() || inner.starts_with('[') { "" } else { "." };
    format!("{outer}{joint}{inner}")
}

/// The path of the map whose entry `name` is at `path`; `None` if `path` does not end with that name.
pub fn parent<'p>(path: &'p str, name: &str) -> Option<&'p str> {
    let map = path.strip_suffix(&*key(name))?;
    if map.is_empty() { Some(map) } else { map.strip_suffix('.') }
}

/// Whether `path` is `outer` or is below it.
pub fn is_within(path: &str, outer: &str) -> bool {
    path.strip_prefix(outer).is_some_and(|rest| outer.is_empty() || rest.is_empty() || rest.starts_with(['.', '[']))
}

/// Splits off the first step of a path. Returns the step and the rest; `None` if the path is empty or malformed.
fn split_first(path: &str) -> Option<(PathStep<'_>, &str)> {
    if let Some(index) = path.strip_prefix('[') {
        let (index, rest) = index.split_once(']')?;
        return Some((PathStep::Index(index.parse().ok()?), rest));
    }
    let path = path.strip_prefix('.').unwrap_or(path);
    if let Some(quoted) = path.strip_prefix('"') {
        return split_quoted(quoted);
    }
    let (name, rest) = path.split_at(path.find(['.', '[']).unwrap_or(path.len()));
    (!name.is_empty()).then_some((PathStep::Key(name.into()), rest))
}

/// Parses a quoted name up to its closing quote.
fn split_quoted(text: &str) -> Option<(PathStep<'_>, &str)> {
    let mut name = String::new();
    let mut chars = text.char_indices();
    while let Some((at, c)) = chars.next() {
        match c {
            '"' => return Some((PathStep::Key(name.into()), &text[at + 1..])),
            '\\' => name.push(chars.next()?.1),
            _ => name.push(c),
        }
    }
    None
}

/// The steps of a path, up to its first malformed step.
pub fn steps(path: &str) -> impl Iterator<Item = PathStep<'_>> {
    let mut rest = path;
    std::iter::from_fn(move || {
        let (step, after) = split_first(rest)?;
        rest = after;
        Some(step)
    })
}

/// Follows `path` from `root` step by step, as far as the steps exist.
pub fn follow<'t, 'p, T: Tree>(root: &'t T, path: &'p str) -> Follow<'t, 'p, T> {
    Follow { at: root, rest: path }
}

/// The existing steps of a path in a tree, each with its target.
pub struct Follow<'t, 'p, T> {
    at: &'t T,
    rest: &'p str,
}

impl<'t, T> Follow<'t, '_, T> {
    /// The target of the steps taken so far.
    pub fn at(&self) -> &'t T {
        self.at
    }

    /// Whether the path was followed to its end.
    pub fn is_whole(&self) -> bool {
        self.rest.is_empty()
    }
}

impl<'t, 'p, T: Tree> Iterator for Follow<'t, 'p, T> {
    type Item = (PathStep<'p>, &'t T);

    fn next(&mut self) -> Option<Self::Item> {
        let (step, rest) = split_first(self.rest)?;
        let child = self.at.child(&step)?;
        (self.at, self.rest) = (child, rest);
        Some((step, child))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Every step exists and leads to the same place.
    struct Anything;

    impl Tree for Anything {
        fn child(&self, _: &PathStep<'_>) -> Option<&Self> {
            Some(self)
        }
    }

    fn steps(path: &str) -> Option<Vec<PathStep<'_>>> {
        let mut follow = follow(&Anything, path);
        let steps = follow.by_ref().map(|(step, _)| step).collect();
        follow.is_whole().then_some(steps)
    }

    fn name(name: &str) -> PathStep<'_> {
        PathStep::Key(name.into())
    }

    #[test]
    fn a_path_has_one_meaning() {
        assert_eq!(steps(""), Some(vec![]));
        assert_eq!(steps("a.b[3].c"), Some(vec![name("a"), name("b"), PathStep::Index(3), name("c")]));
        assert_eq!(steps("[0][1]"), Some(vec![PathStep::Index(0), PathStep::Index(1)]));
        assert_eq!(steps(r#"a."b.c[0]".d"#), Some(vec![name("a"), name("b.c[0]"), name("d")]));
        assert_eq!(steps(r#"ü."\"\\"[1]"#), Some(vec![name("ü"), name("\"\\"), PathStep::Index(1)]));
    }

    #[test]
    fn what_is_no_path_leads_nowhere() {
        for path in ["a..b", "[", "[x]", "[-1]", "[1", "a.", "\"a", "a.\"b\\", "[99999999999999999999]"] {
            assert_eq!(steps(path), None, "{path}");
        }
    }

    #[test]
    fn only_names_that_could_be_misread_are_quoted() {
        for plain in ["a", "x-forwarded-for", "größe", "a/b", "*", "404"] {
            assert_eq!(key(plain), plain);
        }
        assert_eq!(key("my.app"), "\"my.app\"");
        assert_eq!(key("filter[name]"), "\"filter[name]\"");
        assert_eq!(key("two words"), "\"two words\"");
        assert_eq!(key(r#"a"b\"#), r#""a\"b\\""#);
        assert_eq!(key(""), "\"\"");
    }

    #[test]
    fn inside_means_by_whole_steps() {
        assert!(is_within("a.b", "a.b") && is_within("a.b.c", "a.b") && is_within("a.b[0]", "a.b"));
        assert!(is_within("a", "") && is_within("", ""));
        assert!(!is_within("a.bc", "a.b") && !is_within("a", "a.b") && !is_within("\"a.b\"", "a"));
    }

    proptest! {
        #[test]
        fn what_is_written_is_read_back(names in prop::collection::vec(any::<String>(), 0..5), index in 0usize..100) {
            let mut path = String::new();
            for name in &names {
                let outer = path.clone();
                path = join(&path, &key(name));
                prop_assert_eq!(parent(&path, name), Some(outer.as_str()));
                prop_assert!(is_within(&path, &outer));
            }
            let path = format!("{path}[{index}]");
            let mut expected: Vec<_> = names.iter().map(|text| name(text)).collect();
            expected.push(PathStep::Index(index));
            prop_assert_eq!(steps(&path), Some(expected));
        }

        #[test]
        fn any_text_can_be_followed(path in any::<String>()) {
            let taken = follow(&Anything, &path).count();
            prop_assert!(taken <= path.len());
        }
    }
}
