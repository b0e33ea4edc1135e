//! The fields of an HTTP/1 header, with the spelling of their names.
//!
//! Field names are case-insensitive, but a peer should receive them as they were sent. Pingora keeps a second map for
//! the spelling, which costs more than the first. Here, the value of an unchanged field is a slice of the received
//! header, and its name precedes it there. The spelling is therefore found when the field is written.

use bytes::{BufMut, Bytes};
use http::{HeaderMap, HeaderName, HeaderValue};
use pingora::Result;
use pingora::http::{IntoCaseHeaderName, RequestHeader, ResponseHeader};

/// Builds the map of a header's fields; values are slices of the header. `None`: a field is invalid.
pub fn map(header: &Bytes, fields: &[httparse::Header<'_>]) -> Option<HeaderMap> {
    // Room for the one field that hooks usually add.
    let mut map = HeaderMap::with_capacity(fields.len() + 1);
    for field in fields {
        let name = HeaderName::from_bytes(field.name.as_bytes()).ok()?;
        map.try_append(name, value(header, field.value)?).ok()?;
    }
    Some(map)
}

/// A value in which spaces replace the line ends of a folded field (RFC 9112 §5.2).
pub fn value(header: &Bytes, value: &[u8]) -> Option<HeaderValue> {
    // A line end is invalid in a value, so the common case needs no search for one.
    if let Ok(value) = HeaderValue::from_maybe_shared(header.slice_ref(value)) {
        return Some(value);
    }
    let mut unfolded = value.to_vec();
    unfolded.iter_mut().filter(|byte| matches!(byte, b'\r' | b'\n')).for_each(|byte| *byte = b' ');
    HeaderValue::from_maybe_shared(Bytes::from(unfolded)).ok()
}

/// Writes the fields of a request whose received header is `written`.
pub fn write_request(request: &RequestHeader, written: &[u8], out: &mut impl BufMut) {
    if request.has_case() { request.header_to_h1_wire(out) } else { write(&request.headers, written, out) }
}

/// Writes the fields of a response whose received header is `written`.
pub fn write_answer(answer: &ResponseHeader, written: &[u8], out: &mut impl BufMut) {
    if answer.has_case() { answer.header_to_h1_wire(out) } else { write(&answer.headers, written, out) }
}

fn write(fields: &HeaderMap, written: &[u8], out: &mut impl BufMut) {
    for (name, value) in fields {
        if let Some(line) = line(name, value, written) {
            out.put_slice(line);
            continue;
        }
        match spelling(name, value, written) {
            Some(spelled) => out.put_slice(spelled),
            None => out.put_slice(name.into_case_header_name().as_slice()),
        }
        out.put_slice(b": ");
        out.put_slice(value.as_bytes());
        out.put_slice(b"\r\n");
    }
}

/// Stores the spelling of the names in the request itself, for filters that change fields and for Pingora.
///
/// # Errors
///
/// None in practice: the fields were parsed from a valid header.
pub fn spell_out(request: &mut RequestHeader, written: &[u8]) -> Result<()> {
    if request.has_case() || written.is_empty() {
        return Ok(());
    }
    let fields = request.headers.len();
    let mut spelled = RequestHeader::build(request.method.clone(), request.raw_path(), Some(fields))?;
    spelled.set_version(request.version);
    for (name, value) in &request.headers {
        match spelling(name, value, written) {
            Some(name) => spelled.append_header(Bytes::copy_from_slice(name), value.clone())?,
            None => spelled.append_header(name, value.clone())?,
        };
    }
    *spelled.extensions_mut() = std::mem::take(request.extensions_mut());
    *request = spelled;
    Ok(())
}

/// The received line of an unchanged field, if it has the form in which it would be written: `Name: value`, CR, LF.
fn line<'w>(name: &HeaderName, value: &HeaderValue, written: &'w [u8]) -> Option<&'w [u8]> {
    let (name, value) = (name.as_str().as_bytes(), value.as_bytes());
    let value_at = value.as_ptr().addr().checked_sub(written.as_ptr().addr())?;
    let line = written.get(value_at.checked_sub(name.len() + 2)?..value_at + value.len() + 2)?;
    let (spelled, rest) = line.split_at(name.len());
    (rest.starts_with(b": ") && rest.ends_with(b"\r\n") && spells(spelled, name)).then_some(line)
}

/// Whether `spelled` is this name in any letter case. `name` is lower-case and has the same length. Compares eight
/// bytes at a time.
fn spells(spelled: &[u8], name: &[u8]) -> bool {
    const ONES: u64 = 0x0101_0101_0101_0101;
    const HIGH: u64 = ONES << 7;
    let lower = |word: &[u8; 8]| {
        let word = u64::from_le_bytes(*word);
        let low = word & !HIGH;
        // The highest bit of each byte that is at least `A`, and of each that is greater than `Z`.
        let (from_a, beyond_z) = (low + ONES * (0x80 - b'A' as u64), low + ONES * (0x7f - b'Z' as u64));
        word | (!word & (from_a ^ beyond_z) & HIGH) >> 2
    };
    let same = |(spelled, name): (&[u8; 8], &[u8; 8])| lower(spelled) == u64::from_le_bytes(*name);
    match (spelled.last_chunk::<8>(), name.last_chunk::<8>()) {
        // The last eight bytes may overlap the ones before them.
        (Some(last), Some(end)) => {
            same((last, end)) && spelled.as_chunks::<8>().0.iter().zip(name.as_chunks::<8>().0).all(same)
        }
        _ => spelled.eq_ignore_ascii_case(name),
    }
}

/// The received spelling of a field's name. `None`: the field is not from this header, or was changed.
fn spelling<'w>(name: &HeaderName, value: &HeaderValue, written: &'w [u8]) -> Option<&'w [u8]> {
    let (name, value) = (name.as_str().as_bytes(), value.as_bytes());
    if value.is_empty() {
        return spelling_of_empty(name, written);
    }
    let begin = value.as_ptr().addr().checked_sub(written.as_ptr().addr())?;
    let before = written.get(..begin)?.trim_ascii_end().strip_suffix(b":")?.trim_ascii_end();
    let spelled = &before[before.len().checked_sub(name.len())?..];
    spelled.eq_ignore_ascii_case(name).then_some(spelled)
}

/// An empty value has no position in the header, so its name is searched for.
fn spelling_of_empty<'w>(name: &[u8], written: &'w [u8]) -> Option<&'w [u8]> {
    let lines = written.split(|&byte| byte == b'\n');
    lines.filter_map(|line| line.split_at_checked(name.len())).find_map(|(spelled, rest)| {
        (rest.trim_ascii_start().starts_with(b":") && spelled.eq_ignore_ascii_case(name)).then_some(spelled)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    use httparse::EMPTY_HEADER;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn letter_case_alone_makes_no_other_name(
            bytes in prop::collection::vec(any::<u8>(), 0..40),
            odd in any::<u8>(),
        ) {
            let name = bytes.to_ascii_lowercase();
            prop_assert!(spells(&bytes, &name));
            for place in 0..bytes.len() {
                let mut other = bytes.clone();
                other[place] = odd;
                prop_assert_eq!(spells(&other, &name), other.eq_ignore_ascii_case(&name));
            }
        }
    }

    const HEADER: &str = "HoSt: a\r\nX-Two:1\r\nx-two:   2\r\nX-eMpTy:\r\nDNT: 1\r\n\r\n";

    #[test]
    fn however_a_line_was_written_it_leaves_in_one_form() {
        for (came, leaves) in [
            ("X-One: a\r\n", "X-One: a\r\n"),
            ("X-One: a \t\r\n", "X-One: a\r\n"),
            ("X-One:\ta\r\n", "X-One: a\r\n"),
            ("X-One: a\n", "X-One: a\r\n"),
            ("X-One: : a\r\n", "X-One: : a\r\n"),
            ("X-One-And-More: a: b\r\n", "X-One-And-More: a: b\r\n"),
            ("X-One: a\r\nX-Two: b\r\n", "X-One: a\r\nX-Two: b\r\n"),
        ] {
            let header = Bytes::from(format!("{came}\r\n"));
            assert_eq!(written(&request(read(&header)), &header), leaves, "{came:?}");
        }
    }

    fn read(header: &Bytes) -> HeaderMap {
        let mut fields = [EMPTY_HEADER; 16];
        let parsed = httparse::parse_headers(header, &mut fields).expect("a header");
        map(header, parsed.unwrap().1).expect("fields")
    }

    fn request(fields: HeaderMap) -> RequestHeader {
        let (mut parts, ()) = http::Request::new(()).into_parts();
        parts.headers = fields;
        parts.into()
    }

    fn written(request: &RequestHeader, header: &[u8]) -> String {
        let mut out = Vec::new();
        write_request(request, header, &mut out);
        String::from_utf8(out).expect("text")
    }

    #[test]
    fn names_are_written_as_they_came() {
        let header = Bytes::from(HEADER);
        let mut request = request(read(&header));
        let expected = "HoSt: a\r\nX-Two: 1\r\nx-two: 2\r\nX-eMpTy: \r\nDNT: 1\r\n";
        assert_eq!(written(&request, &header), expected);
        assert_eq!(written(&request.clone(), &header), expected, "a copy is of the same header");
        spell_out(&mut request, &header).expect("a request");
        assert_eq!(written(&request, b""), expected, "it knows itself");
        request.insert_header("x-NEW", "3").expect("a field");
        assert!(written(&request, b"").ends_with("x-NEW: 3\r\n"));
    }

    #[test]
    fn a_field_that_was_changed_has_the_name_that_it_was_given() {
        let header = Bytes::from(HEADER);
        let mut request = request(read(&header));
        request.insert_header(http::header::HOST, "b").expect("a field");
        let moved = request.headers["dnt"].clone();
        request.insert_header(HeaderName::from_static("x-moved"), moved).expect("a field");
        request.remove_header("x-two");
        request.remove_header("dnt");
        let mut lines: Vec<_> = written(&request, &header).lines().map(str::to_owned).collect();
        lines.sort();
        assert_eq!(lines, ["Host: b", "X-eMpTy: ", "x-moved: 1"]);
        assert!(written(&request, &Bytes::from(HEADER)).contains("x-moved: 1"), "of another header nothing is known");
    }

    #[test]
    fn a_value_over_several_lines_becomes_one() {
        let header = Bytes::from("a: b\r\n\tc\r\n\r\n");
        let value = value(&header, &header[3..8]).expect("a value");
        assert_eq!(value, "b  \tc");
    }
}
