//! Changes a JSON text at the places of JSON Pointers (RFC 6901), and keeps every other byte.
//!
//! The text is not parsed into values and serialized again, which would round numbers, lose duplicate members and
//! change whitespace. It is checked as a whole, then the places are found, and their bytes are removed or replaced.

use std::ops::Range;

use serde::de::IgnoredAny;

use super::Changed;

/// One or several places in a JSON text: `*` is each item of a list, or each member of an object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Pointer(Vec<Token>);

#[derive(Clone, Debug, PartialEq, Eq)]
enum Token {
    Name(String),
    Each,
}

/// The change at a place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Change<'v> {
    /// Sets this JSON text, whether or not there is a value. The enclosing object or list must exist.
    Set(&'v [u8]),
    /// Replaces an existing value by this JSON text.
    Replace(&'v [u8]),
    /// Removes an existing value.
    Remove,
}

impl Pointer {
    /// Parses a pointer.
    ///
    /// # Errors
    /// The mistake.
    pub fn read(written: &str) -> Result<Pointer, String> {
        if written.is_empty() {
            return Ok(Pointer(Vec::new()));
        }
        let Some(tokens) = written.strip_prefix('/') else {
            return Err(format!("`{written}` is not a JSON Pointer: it must begin with `/`, as in `/user/email`"));
        };
        let token = |token: &str| {
            let escapes = token.split('~').skip(1);
            if escapes.into_iter().any(|rest| !rest.starts_with(['0', '1'])) {
                return Err(format!("`{written}` has a `~` that means nothing: write `~0` for `~` and `~1` for `/`"));
            }
            Ok(if token == "*" { Token::Each } else { Token::Name(token.replace("~1", "/").replace("~0", "~")) })
        };
        tokens.split('/').map(token).collect::<Result<_, _>>().map(Pointer)
    }

    /// Whether it refers to the whole text.
    pub fn is_whole(&self) -> bool {
        self.0.is_empty()
    }

    /// The text with the change at all places of this pointer; `None` if nothing changes. The text must have been
    /// [`checked`].
    pub fn apply(&self, text: &[u8], change: Change<'_>) -> Option<Changed> {
        let mut reader = Reader { text, at: 0, edits: Vec::new() };
        reader.blanks();
        reader.value(Some(&self.0), change);
        if reader.edits.is_empty() {
            return None;
        }
        // Each edit is a place: a value, a part that goes, or one that comes.
        let places = reader.edits.len() as u64;
        let (mut changed, mut rest) = (Vec::with_capacity(text.len()), 0);
        for (place, pieces) in reader.edits {
            changed.extend_from_slice(&text[rest..place.start]);
            pieces.iter().for_each(|piece| changed.extend_from_slice(piece));
            rest = place.end;
        }
        changed.extend_from_slice(&text[rest..]);
        Some(Changed { bytes: changed, places })
    }
}

/// The nesting limit of objects and lists. The scanner recurses as deep as the text is nested.
const DEPTH_MAX: usize = 128;

/// Whether a body is one JSON text in UTF-8 within the nesting limit.
pub(super) fn checked(text: &[u8]) -> bool {
    // `serde_json` skips nested values without recursion.
    let sound = || std::str::from_utf8(text).is_ok() && serde_json::from_slice::<IgnoredAny>(text).is_ok();
    depth(text) <= DEPTH_MAX && sound()
}

/// The nesting depth of a text, if it is JSON.
fn depth(text: &[u8]) -> usize {
    let (mut depth, mut deepest, mut quoted, mut escaped) = (0_usize, 0, false, false);
    for byte in text {
        match byte {
            _ if escaped => escaped = false,
            b'\\' if quoted => escaped = true,
            b'"' => quoted = !quoted,
            b'[' | b'{' if !quoted => {
                depth += 1;
                deepest = deepest.max(depth);
            }
            b']' | b'}' if !quoted => depth = depth.saturating_sub(1),
            _ => {}
        }
    }
    deepest
}

/// Goes through a text that is known to be sound. Nothing that it finds makes it panic: behind the end there are zeros.
struct Reader<'t> {
    text: &'t [u8],
    at: usize,
    /// What is put in the place of which bytes, in their order.
    edits: Vec<(Range<usize>, Vec<Vec<u8>>)>,
}

/// A member of an object, or an item of a list: from its first byte to behind its last.
struct Part {
    place: Range<usize>,
    gone: bool,
}

impl Reader<'_> {
    fn byte(&self) -> u8 {
        self.text.get(self.at).copied().unwrap_or_default()
    }

    fn ends(&self) -> bool {
        self.at >= self.text.len()
    }

    fn blanks(&mut self) {
        while matches!(self.byte(), b' ' | b'\t' | b'\n' | b'\r') {
            self.at += 1;
        }
    }

    /// Passes over a value, and makes the change where `tokens` lead from it.
    fn value(&mut self, tokens: Option<&[Token]>, change: Change<'_>) {
        let begin = self.at;
        match (tokens, self.byte()) {
            (Some([]), _) => {
                self.value(None, change);
                if let Change::Set(value) | Change::Replace(value) = change {
                    self.edits.push((begin..self.at, vec![value.to_vec()]));
                }
            }
            (_, b'{') => self.object(tokens, change),
            (_, b'[') => self.list(tokens, change),
            (_, b'"') => drop(self.string()),
            _ => {
                while !self.ends() && !matches!(self.byte(), b',' | b']' | b'}' | b' ' | b'\t' | b'\n' | b'\r') {
                    self.at += 1;
                }
            }
        }
    }

    /// Passes over a text between quotes; its bytes without these.
    fn string(&mut self) -> Range<usize> {
        self.at += 1;
        let begin = self.at;
        while !self.ends() && self.byte() != b'"' {
            self.at += if self.byte() == b'\\' { 2 } else { 1 };
        }
        let end = self.at.min(self.text.len());
        self.at = (end + 1).min(self.text.len());
        begin.min(end)..end
    }

    fn object(&mut self, tokens: Option<&[Token]>, change: Change<'_>) {
        let open = self.at;
        let (first, rest) = split(tokens);
        let (mut parts, mut found): (Vec<Part>, bool) = (Vec::new(), false);
        self.at += 1;
        self.blanks();
        while !self.ends() && self.byte() != b'}' {
            let begin = self.at;
            let name = self.string();
            let matches = first.is_some_and(|first| first.names(&self.text[name]));
            found |= matches;
            self.blanks();
            // The colon.
            self.at += 1;
            self.blanks();
            let gone = self.part(matches.then_some(rest), change);
            self.next_part(begin, gone, &mut parts);
        }
        self.at = (self.at + 1).min(self.text.len());
        self.cut(&parts);
        if let (Some(Token::Name(name)), [], Change::Set(value), false) = (first, rest, change, found) {
            // `to_string` of a text cannot fail.
            let name = serde_json::to_string(name).unwrap_or_default().into_bytes();
            self.add(open, &parts, vec![name, b":".to_vec(), value.to_vec()]);
        }
    }

    fn list(&mut self, tokens: Option<&[Token]>, change: Change<'_>) {
        let open = self.at;
        let (first, rest) = split(tokens);
        let wanted = first.and_then(Token::index);
        let mut parts: Vec<Part> = Vec::new();
        self.at += 1;
        self.blanks();
        while !self.ends() && self.byte() != b']' {
            let begin = self.at;
            let matches = first == Some(&Token::Each) || wanted == Some(parts.len());
            let gone = self.part(matches.then_some(rest), change);
            self.next_part(begin, gone, &mut parts);
        }
        self.at = (self.at + 1).min(self.text.len());
        self.cut(&parts);
        // RFC 6901 §4: `-` is the item behind the last.
        let behind = matches!(first, Some(Token::Name(name)) if name == "-") || wanted == Some(parts.len());
        if let ([], Change::Set(value), true) = (rest, change, behind) {
            self.add(open, &parts, vec![value.to_vec()]);
        }
    }

    /// Passes over the value of a part, which may be what is looked for. `true`: it is to go.
    fn part(&mut self, tokens: Option<&[Token]>, change: Change<'_>) -> bool {
        let gone = tokens.is_some_and(<[Token]>::is_empty) && change == Change::Remove;
        self.value(if gone { None } else { tokens }, change);
        gone
    }

    /// Notes a part that began at `begin`, and goes on to the next.
    fn next_part(&mut self, begin: usize, gone: bool, parts: &mut Vec<Part>) {
        parts.push(Part { place: begin..self.at, gone });
        self.blanks();
        if self.byte() == b',' {
            self.at += 1;
            self.blanks();
        } else if self.at == begin {
            // Of no sound text; whatever it is, it comes to an end.
            self.at += 1;
        }
    }

    /// Cuts out the parts that are to go, each with one comma.
    fn cut(&mut self, parts: &[Part]) {
        let mut stays = false;
        for (index, part) in parts.iter().enumerate() {
            if !part.gone {
                stays = true;
                continue;
            }
            let place = match (stays, index.checked_sub(1), parts.get(index + 1)) {
                (true, Some(before), _) => parts[before].place.end..part.place.end,
                (false, _, Some(next)) => part.place.start..next.place.start,
                _ => part.place.clone(),
            };
            self.edits.push((place, Vec::new()));
        }
    }

    /// Adds a part behind the last one of what opens at `open`.
    fn add(&mut self, open: usize, parts: &[Part], mut pieces: Vec<Vec<u8>>) {
        let at = match parts.last() {
            Some(last) => {
                pieces.insert(0, b",".to_vec());
                last.place.end
            }
            None => open + 1,
        };
        self.edits.push((at..at, pieces));
    }
}

impl Token {
    /// Whether it names a member whose name stands so between quotes.
    fn names(&self, raw: &[u8]) -> bool {
        let Token::Name(name) = self else { return true };
        if !raw.contains(&b'\\') {
            return raw == name.as_bytes();
        }
        let quoted = [b"\"", raw, b"\""].concat();
        serde_json::from_slice::<String>(&quoted).is_ok_and(|decoded| decoded == *name)
    }

    /// The place in a list that it names: digits without a zero in front.
    fn index(&self) -> Option<usize> {
        let Token::Name(name) = self else { return None };
        let sound = name == "0" || (!name.starts_with('0') && name.bytes().all(|byte| byte.is_ascii_digit()));
        name.parse().ok().filter(|_| sound)
    }
}

fn split(tokens: Option<&[Token]>) -> (Option<&Token>, &[Token]) {
    match tokens {
        Some([first, rest @ ..]) => (Some(first), rest),
        Some([]) | None => (None, &[]),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::{Value, json};

    use super::*;

    const BODY: &str =
        r#"{ "a": {"b": 1.50, "b": [1, 2]} , "l":[ {"p":"x","q":0}, {"q":1}, [] ], "é\"": null, "e" : {} }"#;

    fn changed(body: &str, pointer: &str, change: Change<'_>) -> Option<String> {
        assert!(checked(body.as_bytes()), "{body}");
        let changed = Pointer::read(pointer).unwrap().apply(body.as_bytes(), change);
        changed.map(|Changed { bytes, .. }| {
            assert!(checked(&bytes), "{pointer} {change:?}: {}", String::from_utf8_lossy(&bytes));
            String::from_utf8(bytes).unwrap()
        })
    }

    #[test]
    fn what_is_there_is_replaced_and_nothing_else_is_touched() {
        assert_eq!(
            changed(BODY, "/a/b", Change::Replace(b"0")).as_deref(),
            Some(&*BODY.replace(r#"{"b": 1.50, "b": [1, 2]}"#, r#"{"b": 0, "b": 0}"#)),
            "each member of that name"
        );
        assert_eq!(changed(BODY, "/é\"", Change::Replace(b"1")).as_deref(), Some(&*BODY.replace("null", "1")));
        let masked = BODY.replace("\"q\":0", "\"q\":9").replace("\"q\":1", "\"q\":9");
        assert_eq!(changed(BODY, "/l/*/q", Change::Replace(b"9")).as_deref(), Some(&*masked));
        assert_eq!(changed(" 1 ", "", Change::Replace(b"[]")).as_deref(), Some(" [] "));
        for nowhere in ["/b", "/a/c", "/l/3", "/l/01", "/l/-", "/l/x", "/a/b/c", "/e/*", "/a/b/b"] {
            assert_eq!(changed(BODY, nowhere, Change::Replace(b"0")), None, "{nowhere}");
        }
    }

    #[test]
    fn each_place_that_is_changed_counts() {
        for (pointer, change, places) in [
            ("", Change::Replace(b"1"), 1),
            ("/l/*/q", Change::Replace(b"1"), 2),
            ("/l/*/z", Change::Set(b"1"), 2),
            ("/l/*", Change::Remove, 3),
            ("/*", Change::Remove, 4),
        ] {
            let changed = Pointer::read(pointer).unwrap().apply(BODY.as_bytes(), change);
            assert_eq!(changed.map(|changed| changed.places), Some(places), "{pointer}");
        }
    }

    #[test]
    fn a_name_is_found_however_it_is_written() {
        let body = r#"{"pass\u0077ord":"x","a\/b":1,"c~d":2}"#;
        assert_eq!(
            changed(body, "/password", Change::Replace(b"\"***\"")).as_deref(),
            Some(r#"{"pass\u0077ord":"***","a\/b":1,"c~d":2}"#)
        );
        assert_eq!(changed(body, "/a~1b", Change::Remove).as_deref(), Some(r#"{"pass\u0077ord":"x","c~d":2}"#));
        assert_eq!(changed(body, "/c~0d", Change::Remove).as_deref(), Some(r#"{"pass\u0077ord":"x","a\/b":1}"#));
        assert!(Pointer::read("a").is_err() && Pointer::read("/a~2").is_err() && Pointer::read("/a~").is_err());
    }

    #[test]
    fn what_is_taken_away_leaves_a_sound_text() {
        for (body, pointer, left) in [
            (r#"{"a":1}"#, "/a", r#"{}"#),
            (r#"{ "a" : 1 , "b" : 2 }"#, "/a", r#"{ "b" : 2 }"#),
            (r#"{ "a" : 1 , "b" : 2 }"#, "/b", r#"{ "a" : 1 }"#),
            (r#"{"a":1,"a":2,"b":3,"a":4}"#, "/a", r#"{"b":3}"#),
            (r#"{"b":3,"a":1,"a":2}"#, "/a", r#"{"b":3}"#),
            (r#"{"a":1,"a":2}"#, "/a", r#"{}"#),
            ("[1, 2, 3]", "/0", "[2, 3]"),
            ("[1, 2, 3]", "/1", "[1, 3]"),
            ("[1, 2, 3]", "/2", "[1, 2]"),
            ("[1, 2, 3]", "/*", "[]"),
            (r#"[{"a":1,"b":[]},{"a":2}]"#, "/*/a", r#"[{"b":[]},{}]"#),
        ] {
            assert_eq!(changed(body, pointer, Change::Remove).as_deref(), Some(left), "{body} {pointer}");
        }
    }

    #[test]
    fn what_is_set_is_there_whether_it_was_or_not() {
        for (body, pointer, set) in [
            (r#"{"a":1}"#, "/a", r#"{"a":7}"#),
            (r#"{}"#, "/a", r#"{"a":7}"#),
            (r#"{ "b": 1 }"#, "/a\"", r#"{ "b": 1,"a\"":7 }"#),
            (r#"{"a":{"b":[]}}"#, "/a/b/-", r#"{"a":{"b":[7]}}"#),
            ("[1]", "/1", "[1,7]"),
            ("[1]", "/0", "[7]"),
            (r#"[{},{"x":0}]"#, "/*/x", r#"[{"x":7},{"x":7}]"#),
            ("[]", "", "7"),
        ] {
            assert_eq!(changed(body, pointer, Change::Set(b"7")).as_deref(), Some(set), "{body} {pointer}");
        }
        for (body, pointer) in [("{}", "/a/b"), ("[1]", "/2"), ("1", "/a"), ("[]", "/*"), ("\"a\"", "/0")] {
            assert_eq!(changed(body, pointer, Change::Set(b"7")), None, "{body} {pointer}");
        }
    }

    #[test]
    fn what_is_no_json_is_none() {
        for body in ["", "{", "{'a':1}", "[1,]", "1 2", "nul", "\"\\x\"", "\u{feff}{}"] {
            assert!(!checked(body.as_bytes()), "{body}");
        }
        assert!(!checked(b"\"\xff\"") && !checked("[".repeat(200).as_bytes()));
        let nested = |deep: usize| format!("{}\"[[[\\\"[\"{}", "[".repeat(deep), "]".repeat(deep));
        assert!(checked(nested(DEPTH_MAX).as_bytes()), "what is between quotes is not nested");
        assert!(!checked(nested(DEPTH_MAX + 1).as_bytes()) && !checked(nested(300_000).as_bytes()), "too deep");
        let deepest = "/0".repeat(DEPTH_MAX);
        assert!(changed(&nested(DEPTH_MAX), &deepest, Change::Replace(b"1")).is_some());
    }

    fn any_json() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            "[a-c\"\\\\/~é\n]{0,4}".prop_map(Value::from),
        ];
        leaf.prop_recursive(4, 24, 4, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
                prop::collection::vec(("[a-c/~\"]{0,2}", inner), 0..4)
                    .prop_map(|members| Value::Object(members.into_iter().collect())),
            ]
        })
    }

    proptest! {
        /// Compared with `serde_json`, which knows pointers as well.
        #[test]
        fn the_same_place_is_changed_as_by_another_reader(
            body in any_json(),
            tokens in prop::collection::vec("[a-c/~\"0-2-]{0,2}", 0..4),
        ) {
            let pointer: String =
                tokens.iter().map(|token| format!("/{}", token.replace('~', "~0").replace('/', "~1"))).collect();
            for text in [body.to_string(), serde_json::to_string_pretty(&body).unwrap()] {
                let changed = changed(&text, &pointer, Change::Replace(b"[7]"));
                let mut expected = body.clone();
                let known = expected.pointer_mut(&pointer).map(|place| *place = json!([7]));
                prop_assert_eq!(changed.is_some(), known.is_some(), "{} {}", &text, &pointer);
                if let Some(changed) = changed {
                    prop_assert_eq!(serde_json::from_str::<Value>(&changed).unwrap(), expected);
                }
            }
        }

        #[test]
        fn no_bytes_make_the_reader_panic_or_go_on_for_ever(text in "[\\[\\]{}\",:\\\\ a1]{0,40}", pointer in "(/[*a1-]?){0,3}") {
            let pointer = Pointer::read(&pointer).unwrap();
            for change in [Change::Set(b"1"), Change::Replace(b"1"), Change::Remove] {
                if checked(text.as_bytes()) {
                    pointer.apply(text.as_bytes(), change);
                }
            }
        }
    }
}
