//! Reads cookies and query arguments of a request.

use http::HeaderMap;
use http::header::COOKIE;

/// RFC 6265 §4.2.1: pairs separated by semicolons. HTTP/2 may split them over several fields (RFC 9113 §8.2.3).
pub fn cookie<'s>(headers: &'s HeaderMap, name: &[u8]) -> Option<&'s [u8]> {
    cookies(headers, name).next()
}

/// The values of all cookies of this name.
pub fn cookies<'s>(headers: &'s HeaderMap, name: &[u8]) -> impl Iterator<Item = &'s [u8]> {
    let fields = headers.get_all(COOKIE).iter();
    let pairs = fields.flat_map(|field| field.as_bytes().split(|&byte| byte == b';'));
    pairs.filter_map(move |pair| pair.trim_ascii().strip_prefix(name)?.strip_prefix(b"="))
}

/// The value of the first argument of this name in `query`, as it was sent; [`decoded`] decodes it.
pub fn argument<'q>(query: &'q str, name: &[u8]) -> Option<&'q str> {
    arguments(query, name).next()
}

/// The values of all arguments of this name, as they were sent.
pub fn arguments<'q>(query: &'q str, name: &[u8]) -> impl Iterator<Item = &'q str> {
    let pairs = query.split('&').map(|pair| pair.split_once('=').unwrap_or((pair, "")));
    pairs.filter(move |(key, _)| decoded(key).eq(name.iter().copied())).map(|(_, value)| value)
}

/// Decodes `%41` and `+`, as in forms. A `%` without two hex digits is kept.
pub fn decoded(text: &str) -> impl Iterator<Item = u8> + '_ {
    let mut rest = text.as_bytes();
    std::iter::from_fn(move || {
        let (&byte, after) = rest.split_first()?;
        let escaped = if byte == b'%' { after.split_at_checked(2).and_then(hex) } else { None };
        let (byte, after) = escaped.unwrap_or((if byte == b'+' { b' ' } else { byte }, after));
        rest = after;
        Some(byte)
    })
}

/// The byte for two hex digits, and the rest.
fn hex<'t>((digits, after): (&'t [u8], &'t [u8])) -> Option<(u8, &'t [u8])> {
    let digit = |byte: u8| char::from(byte).to_digit(16).and_then(|digit| u8::try_from(digit).ok());
    Some((digit(digits[0])? << 4 | digit(digits[1])?, after))
}
