//! The framing of message bodies: where a body ends (RFC 9112 §6, RFC 9113 §8.1.1).
//!
//! [`request::read`] decides the framing of requests and [`answer::frame`] that of responses, for every version of
//! HTTP. All code that reads, writes, buffers, copies, checks or refuses a message uses these two functions. If two
//! readers of a message disagreed, a client could smuggle a request, or read the next response as the rest of the
//! current one. The functions perform no IO.
//!
//! [`LengthFields`] collects the length fields of a header, and [`Body`] is the resulting framing. [`chunked`] parses
//! a chunked body byte by byte. [`follow`] extracts trailers where a library discards them.

pub mod answer;
pub mod chunked;
pub mod follow;
pub mod request;

use std::borrow::Borrow;

use http::{HeaderMap, HeaderName, header};

/// The framing of a body.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Body {
    /// No body, whatever length the header announces.
    None,
    /// This number of bytes, which can be 0.
    Length(u64),
    /// Chunked (RFC 9112 §7.1); HTTP/1.1 only.
    Chunked,
    /// Until the end of the stream on HTTP/2, or of the connection on HTTP/1. On HTTP/1 only a response may end so.
    UntilEnd,
}

/// The values of all fields `Content-Length` and `Transfer-Encoding` of a header.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LengthFields {
    length: Length,
    coding: Coding,
    /// Number of fields `Transfer-Encoding`, and of items in all of them. Both stop at 2, since larger numbers make no
    /// difference.
    coding_fields: u8,
    coding_items: u8,
    /// Whether a coding is spelled differently from `chunked`, letter case included.
    coding_differs: bool,
}

/// All values of `Content-Length` (RFC 9110 §8.6).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Length {
    #[default]
    Absent,
    /// One number in one field.
    One(u64),
    /// The same number several times, in a list or in several fields.
    Repeated(u64),
    /// Different numbers, or something that is not a number.
    Faulty,
}

/// All values of `Transfer-Encoding` (RFC 9112 §6.1), in order.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Coding {
    #[default]
    Absent,
    /// No coding: an empty value, or `identity`, which earlier versions of HTTP defined.
    Plain,
    /// `chunked` only, as the last value.
    Chunked,
    /// `chunked`, followed by a value that names no coding. Some readers treat such a body as chunked and others do
    /// not.
    ChunkedUnclearly,
    /// Another coding, or `chunked` twice.
    Other,
}

impl LengthFields {
    /// Collects the length fields of `headers`.
    pub fn of(headers: &HeaderMap) -> LengthFields {
        let mut length_fields = LengthFields::default();
        // One pass costs less than two look-ups.
        for (name, value) in headers {
            match *name {
                header::CONTENT_LENGTH => length_fields.add_length(value.as_bytes()),
                header::TRANSFER_ENCODING => length_fields.add_coding(value.as_bytes()),
                _ => {}
            }
        }
        length_fields
    }

    /// Whether the header has any length field.
    pub fn is_any(&self) -> bool {
        *self != LengthFields::default()
    }

    /// Adds a field `Content-Length`.
    pub fn add_length(&mut self, value: &[u8]) {
        for item in items(value) {
            self.length = match (self.length, decimal(item)) {
                (Length::Absent, Some(number)) => Length::One(number),
                (Length::One(before) | Length::Repeated(before), Some(number)) if before == number => {
                    Length::Repeated(number)
                }
                _ => Length::Faulty,
            };
        }
    }

    /// Adds a field `Transfer-Encoding`.
    pub fn add_coding(&mut self, value: &[u8]) {
        self.coding_fields = (self.coding_fields + 1).min(2);
        for item in items(value) {
            self.coding_items = (self.coding_items + 1).min(2);
            self.coding_differs |= item != b"chunked";
            let names_none = item.is_empty() || item.eq_ignore_ascii_case(b"identity");
            self.coding = match self.coding {
                Coding::Absent | Coding::Plain if names_none => Coding::Plain,
                Coding::Absent | Coding::Plain if item.eq_ignore_ascii_case(b"chunked") => Coding::Chunked,
                Coding::Chunked | Coding::ChunkedUnclearly if names_none => Coding::ChunkedUnclearly,
                _ => Coding::Other,
            };
        }
    }
}

/// The items of a list (RFC 9110 §5.6.1), empty ones included.
pub fn items(list: &[u8]) -> impl Iterator<Item = &[u8]> {
    list.split(|&byte| byte == b',').map(trim)
}

/// Removes surrounding white space: spaces and tabs only (RFC 9110 §5.6.3).
fn trim(mut bytes: &[u8]) -> &[u8] {
    while let [b' ' | b'\t', rest @ ..] | [rest @ .., b' ' | b'\t'] = bytes {
        bytes = rest;
    }
    bytes
}

/// Whether one of these lists of tokens contains `token`, ignoring case.
pub fn names<V: Borrow<[u8]>>(lists: impl IntoIterator<Item = V>, token: &str) -> bool {
    lists.into_iter().any(|list| items(list.borrow()).any(|item| item.eq_ignore_ascii_case(token.as_bytes())))
}

/// The members of a list, over all fields of this name (RFC 9110 §5.6.1).
pub fn members<'h>(headers: &'h HeaderMap, name: &HeaderName) -> impl Iterator<Item = &'h [u8]> {
    let members = headers.get_all(name).iter().flat_map(|value| value.as_bytes().split(|&byte| byte == b','));
    members.map(<[u8]>::trim_ascii).filter(|member| !member.is_empty())
}

/// Whether `TE` names `trailers` (RFC 9110 §10.1.4).
pub fn takes_trailers(headers: &HeaderMap) -> bool {
    let mut codings = members(headers, &header::TE).filter_map(|coding| coding.split(|&byte| byte == b';').next());
    codings.any(|coding| coding.trim_ascii().eq_ignore_ascii_case(b"trailers"))
}

/// Whether a field `Content-Type` names this media type, ignoring case and parameters (RFC 9110 §8.3.1).
pub fn is_media_type(value: &[u8], kind: &str) -> bool {
    let named = value.split(|&byte| byte == b';').next().unwrap_or_default();
    trim(named).eq_ignore_ascii_case(kind.as_bytes())
}

/// Parses a decimal number. `None`: the text is empty, has another character, or the number is not below 2⁶³, which
/// every reader can represent.
pub fn decimal(digits: &[u8]) -> Option<u64> {
    if digits.is_empty() {
        return None;
    }
    let number = digits.iter().try_fold(0_u64, |number, digit| {
        let digit = digit.is_ascii_digit().then(|| u64::from(digit - b'0'))?;
        number.checked_mul(10)?.checked_add(digit)
    })?;
    (number <= i64::MAX as u64).then_some(number)
}

/// Whether a byte may occur in a token (RFC 9110 §5.6.2).
pub fn is_token(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn length_fields(lengths: &[&str], codings: &[&str]) -> LengthFields {
        let mut length_fields = LengthFields::default();
        lengths.iter().for_each(|value| length_fields.add_length(value.as_bytes()));
        codings.iter().for_each(|value| length_fields.add_coding(value.as_bytes()));
        length_fields
    }

    #[test]
    fn lengths_are_one_number_or_none() {
        for (values, length) in [
            (&[][..], Length::Absent),
            (&["0"], Length::One(0)),
            (&["007"], Length::One(7)),
            (&[" 7\t"], Length::One(7)),
            (&["9223372036854775807"], Length::One(i64::MAX as u64)),
            (&["7, 7"], Length::Repeated(7)),
            (&["7", "7"], Length::Repeated(7)),
            (&["7,07", "7 , 7"], Length::Repeated(7)),
        ] {
            assert_eq!(length_fields(values, &[]).length, length, "{values:?}");
        }
        for values in [
            &[""][..],
            &["7,"],
            &[",7"],
            &["7,,7"],
            &["7, 8"],
            &["7", "8"],
            &["7", ""],
            &["+7"],
            &["-7"],
            &["0x7"],
            &["7.0"],
            &["7 7"],
            &["7;7"],
            &["\"7\""],
            &["1e3"],
            &["9223372036854775808"],
            &["18446744073709551616"],
            &["\u{661}"],
        ] {
            assert_eq!(length_fields(values, &[]).length, Length::Faulty, "{values:?}");
        }
    }

    #[test]
    fn codings_are_told_by_name_in_whatever_case_and_however_many_fields() {
        for (values, coding) in [
            (&[][..], Coding::Absent),
            (&[""], Coding::Plain),
            (&["identity"], Coding::Plain),
            (&["Identity", ""], Coding::Plain),
            (&["chunked"], Coding::Chunked),
            (&["Chunked"], Coding::Chunked),
            (&[" CHUNKED\t"], Coding::Chunked),
            (&[",chunked"], Coding::Chunked),
            (&["", "chunked"], Coding::Chunked),
            (&["identity, chunked"], Coding::Chunked),
            (&["chunked,"], Coding::ChunkedUnclearly),
            (&["chunked", ""], Coding::ChunkedUnclearly),
            (&["chunked, identity"], Coding::ChunkedUnclearly),
            (&["chunked, chunked"], Coding::Other),
            (&["chunked", "chunked"], Coding::Other),
            (&["gzip"], Coding::Other),
            (&["gzip, chunked"], Coding::Other),
            (&["gzip", "chunked"], Coding::Other),
            (&["chunked, gzip"], Coding::Other),
            (&["chunked;q=1"], Coding::Other),
            (&["\"chunked\""], Coding::Other),
            (&["xchunked"], Coding::Other),
            (&["chunked chunked"], Coding::Other),
            (&["chunked\u{b}"], Coding::Other),
            (&["chunked\u{c}"], Coding::Other),
        ] {
            assert_eq!(length_fields(&[], values).coding, coding, "{values:?}");
        }
    }

    #[test]
    fn fields_are_collected_from_a_map_in_order() {
        let mut headers = HeaderMap::new();
        for (name, value) in [("transfer-encoding", "gzip"), ("content-length", "3"), ("Transfer-Encoding", "chunked")]
        {
            headers.append(
                http::HeaderName::from_bytes(name.as_bytes()).expect("a name"),
                value.parse().expect("a value"),
            );
        }
        assert_eq!(LengthFields::of(&headers), length_fields(&["3"], &["gzip", "chunked"]));
        assert!(LengthFields::of(&headers).is_any() && !LengthFields::of(&HeaderMap::new()).is_any());
    }

    #[test]
    fn a_media_type_is_known_in_whatever_case_and_with_whatever_parameters() {
        for kind in
            ["text/event-stream", "Text/Event-Stream", " text/event-stream ; charset=utf-8", "text/event-stream;x"]
        {
            assert!(is_media_type(kind.as_bytes(), "text/event-stream"), "{kind:?}");
        }
        for kind in ["", "text/event-streams", "text/event-stream, text/plain", "text/plain; a=text/event-stream"] {
            assert!(!is_media_type(kind.as_bytes(), "text/event-stream"), "{kind:?}");
        }
    }

    #[test]
    fn a_token_is_found_in_any_field_and_case() {
        assert!(names([&b"x"[..], b"keep-alive , Close"], "close"));
        assert!(!names([&b"closed, not-close"[..], b""], "close"));
    }
}
