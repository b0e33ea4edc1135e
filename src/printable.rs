//! Escaping of text from clients, so that it can neither control a terminal nor look like other text.
//!
//! A client chooses its path, its host and more, and an operator reads them on a terminal. Control characters (C0 and
//! C1) move the cursor and change colours. Characters that change the direction of writing, and characters without a
//! width, make a text look like another one. The access log and the command line both escape the characters listed
//! here.

use std::borrow::Cow;
use std::io::Write;
use std::net::IpAddr;

/// Whether a character has an invisible effect: a control character, one that changes the direction of writing, one
/// without a width, or one that ends a line.
pub fn steers(character: char) -> bool {
    character.is_control()
        || matches!(character,
            '\u{ad}' | '\u{61c}' | '\u{180e}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}'
            | '\u{2060}'..='\u{206f}' | '\u{feff}' | '\u{fff9}'..='\u{fffb}' | '\u{e0000}'..='\u{e007f}')
}

/// Escapes each character that [`steers`] as JSON does: `\u009b`. A line of JSON stays one line with the same meaning.
/// The text is copied only if it has such a character.
pub fn printable(text: &str) -> Cow<'_, str> {
    shown(text, |_| false)
}

/// As [`printable`], except for the characters for which `stay` is true.
pub fn shown(text: &str, stay: impl Fn(char) -> bool) -> Cow<'_, str> {
    let escaped = |character: char| steers(character) && !stay(character);
    if !text.chars().any(escaped) {
        return Cow::Borrowed(text);
    }
    let mut shown = String::with_capacity(text.len() + 16);
    for character in text.chars() {
        if escaped(character) {
            escape(character, |unit| shown.push_str(&format!("\\u{unit:04x}")));
        } else {
            shown.push(character);
        }
    }
    Cow::Owned(shown)
}

/// Calls `each` for each of the one or two UTF-16 units of the JSON escape of a character (RFC 8259 §7).
pub fn escape(character: char, each: impl FnMut(u16)) {
    character.encode_utf16(&mut [0; 2]).iter().copied().for_each(each);
}

/// Writes an address. IPv4 has its own code, since each exchange writes an address.
pub fn address(text: &mut Vec<u8>, address: IpAddr) {
    let IpAddr::V4(address) = address else {
        // Writing to a vector cannot fail.
        let _ = write!(text, "{address}");
        return;
    };
    for (place, byte) in address.octets().into_iter().enumerate() {
        if place > 0 {
            text.push(b'.');
        }
        digits(text, byte.into(), 1);
    }
}

/// Writes a number with at least `least` digits.
#[inline]
pub fn digits(text: &mut Vec<u8>, number: u64, least: usize) {
    if number >= 1_000 || least > 3 {
        return many_digits(text, number, least);
    }
    let [hundreds, tens, ones] = three_digits(number as u32);
    if number >= 100 || least == 3 {
        text.extend_from_slice(&[hundreds, tens, ones]);
    } else if number >= 10 || least == 2 {
        text.extend_from_slice(&[tens, ones]);
    } else {
        text.push(ones);
    }
}

/// The three digits of a number less than 1,000.
#[inline]
pub fn three_digits(number: u32) -> [u8; 3] {
    [number / 100, number / 10 % 10, number % 10].map(|digit| b'0' + digit as u8)
}

fn many_digits(text: &mut Vec<u8>, mut number: u64, least: usize) {
    // `u64::MAX` has twenty digits.
    let mut written = [b'0'; 20];
    let mut start = written.len();
    while number > 0 {
        start -= 1;
        written[start] = b'0' + (number % 10) as u8;
        number /= 10;
    }
    text.extend_from_slice(&written[start.min(written.len() - least)..]);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_and_numbers_are_written_as_they_are_read() {
        for address in ["0.0.0.0", "10.0.0.9", "255.255.255.255", "192.168.1.42", "::1", "2001:db8::1"] {
            let mut text = Vec::new();
            super::address(&mut text, address.parse().expect("an address"));
            assert_eq!(text, address.as_bytes());
        }
        for (number, least, written) in [
            (0, 1, "0"),
            (7, 1, "7"),
            (7, 3, "007"),
            (7, 4, "0007"),
            (10, 1, "10"),
            (10, 3, "010"),
            (99, 2, "99"),
            (100, 1, "100"),
            (999, 3, "999"),
            (1_000, 1, "1000"),
            (1_234, 3, "1234"),
            (u64::MAX, 1, "18446744073709551615"),
        ] {
            let mut text = Vec::new();
            digits(&mut text, number, least);
            assert_eq!(text, written.as_bytes());
        }
    }

    #[test]
    fn what_is_only_seen_stays_as_it_is() {
        for text in ["", "GET /cart?id=7", "/käse/日本/🧀", "a\u{301}"] {
            assert!(matches!(printable(text), Cow::Borrowed(shown) if shown == text), "{text}");
        }
    }

    #[test]
    fn what_steers_a_terminal_is_written_out() {
        for (text, shown) in [
            ("\u{1b}[31m", "\\u001b[31m"),
            ("a\r\n\tb\u{7f}", "a\\u000d\\u000a\\u0009b\\u007f"),
            ("\u{9b}31m", "\\u009b31m"),
            ("\u{85}\u{2028}\u{2029}", "\\u0085\\u2028\\u2029"),
            ("/\u{202e}gpj.exe", "/\\u202egpj.exe"),
            ("\u{2066}a\u{2069}\u{61c}\u{200f}", "\\u2066a\\u2069\\u061c\\u200f"),
            ("\u{feff}\u{200b}", "\\ufeff\\u200b"),
            ("\u{e0041}", "\\udb40\\udc41"),
        ] {
            assert_eq!(printable(text), shown);
            assert!(!printable(text).chars().any(steers));
        }
    }

    #[test]
    fn a_line_of_json_means_the_same_afterwards() {
        let nasty = "\u{9b}\u{202e}\u{e0041}ü\"\\";
        let line = serde_json::json!({ "path": nasty }).to_string();
        let shown = printable(&line);
        assert!(!shown.chars().any(steers));
        assert_eq!(serde_json::from_str::<serde_json::Value>(&shown).expect("JSON")["path"], nasty);
    }
}
