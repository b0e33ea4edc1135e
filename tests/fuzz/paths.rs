//! The path that a request is routed by: one path for all ways to write it.

use forebay::config::Paths as Written;
use forebay::config::paths::{DotSegments, EncodedSlash};
use forebay::proxy::header::path::Paths;

use super::mutate;

const WORDS: &[&str] = &[
    "/", "//", "/.", "/..", "/./", "/../", "/..;a/", "%2e", "%2E", "%2f", "%5C", "\\", "%00", "%61", "%7E", "%", "%%",
    "%2", "%zz", "a", "\u{e9}",
];

#[test]
fn a_path_has_one_canonical_form() {
    mutate::explore("path", WORDS, |bytes: &[u8]| {
        for merge_slashes in [true, false] {
            for encoded_slash in [EncodedSlash::Keep, EncodedSlash::Decode, EncodedSlash::Refuse] {
                for dot_segments in [DotSegments::Resolve, DotSegments::Refuse] {
                    check(&Written { merge_slashes, encoded_slash, dot_segments }, bytes);
                }
            }
        }
    });
}

fn check(written: &Written, path: &[u8]) {
    let paths = Paths::new(written);
    let Ok(once) = paths.canonical(path) else { return };
    let told = || format!("{:?} became {:?}", String::from_utf8_lossy(path), String::from_utf8_lossy(&once));
    let again = paths.canonical(&once).unwrap_or_else(|_| panic!("{}, which is refused", told()));
    assert_eq!(again, once, "the canonical form is its own: {}", told());
    if !path.starts_with(b"/") {
        assert_eq!(once, path, "what is no path stays as it is");
        return;
    }
    assert!(once.starts_with(b"/"), "{}", told());
    assert!(once.iter().all(|&byte| byte.is_ascii_graphic() && !b"\\?#\"<>".contains(&byte)), "{}", told());
    // What a backend finds that decodes it once.
    let decoded = decoded(&once);
    let decoded = decoded.split(|byte| matches!(byte, b'/' | b'\\'));
    assert!(!decoded.into_iter().any(|segment| matches!(segment, b"." | b"..")), "{}", told());
    let empty = once[1..].split(|&byte| byte == b'/').rev().skip(1).any(<[u8]>::is_empty);
    assert!(!(written.merge_slashes && empty), "{}", told());
    // Written with codes for all that needs none, it is still the same.
    let coded: Vec<u8> = once.iter().flat_map(|&byte| coded(byte)).collect();
    if !once.contains(&b'%') {
        assert_eq!(paths.canonical(&coded).as_deref(), Ok(&*once), "{}", String::from_utf8_lossy(&coded));
    }
}

fn coded(byte: u8) -> Vec<u8> {
    let plain = byte.is_ascii_alphanumeric() || b"-._~".contains(&byte);
    if plain { format!("%{byte:02x}").into_bytes() } else { vec![byte] }
}

fn decoded(path: &[u8]) -> Vec<u8> {
    let mut decoded = Vec::new();
    let mut rest = path;
    while let Some((&byte, after)) = rest.split_first() {
        let code = after
            .get(..2)
            .filter(|code| byte == b'%' && code.iter().all(u8::is_ascii_hexdigit))
            .and_then(|code| std::str::from_utf8(code).ok());
        let byte_of_code = code.and_then(|code| u8::from_str_radix(code, 16).ok());
        decoded.push(byte_of_code.unwrap_or(byte));
        rest = if byte_of_code.is_some() { &after[2..] } else { after };
    }
    decoded
}
