//! What strangers write into the access log: a line stays one line, in JSON it says what was sent, and it steers no
//! terminal.

use forebay::access_log::line::{escape_combined, escape_json};

use super::mutate;

const WORDS: &[&str] = &[
    "\"",
    "\\",
    "\\u0000",
    "\\x41",
    "\n",
    "\r\n",
    "\u{1b}]0;",
    "\u{9b}31m",
    "\u{7f}",
    "\u{85}",
    "\u{2028}",
    "\u{202e}",
    "\u{e9}",
    "\u{1f600}",
    "%00",
    "</script>",
];

#[test]
fn a_field_of_the_log_stays_in_its_place_whatever_a_client_sends() {
    mutate::explore("line", WORDS, check);
}

fn check(bytes: &[u8]) {
    let escaped = |escape: fn(&mut Vec<u8>, &[u8])| {
        let mut text = Vec::new();
        escape(&mut text, bytes);
        let text = String::from_utf8(text).expect("text");
        assert!(!text.chars().any(|c| c.is_control() || matches!(c, '\u{2028}' | '\u{2029}')), "{text:?}");
        text
    };
    let json = escaped(escape_json);
    let read: String = serde_json::from_str(&format!("\"{json}\"")).unwrap_or_else(|error| panic!("{json}: {error}"));
    match std::str::from_utf8(bytes) {
        Ok(sent) => assert_eq!(read, sent),
        Err(_) => assert!(read.contains("\\x"), "{read:?}"),
    }
    let combined = escaped(escape_combined);
    assert!(combined.is_ascii() && !combined.contains('"'), "{combined:?}");
}
