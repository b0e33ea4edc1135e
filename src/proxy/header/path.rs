//! The canonical path of a request, which Forebay and the endpoint both use.
//!
//! Backends treat many spellings of a path as equal. If the route were found by one spelling and the endpoint received
//! another, `//admin` would bypass a route for `/admin`, and `/x/../files/a` would take the route of `/x`. The path is
//! therefore made canonical when the request arrives, and only this form is used: for the route look-up, for filters
//! and keys, in the log and at the endpoint. A path that remains ambiguous is refused.

use std::borrow::Cow;

use crate::config;
use crate::config::paths::{DotSegments, EncodedSlash};
use crate::config::route::{Match, PathMatch};
use crate::error::BuildError;

/// The rules for canonical paths.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Paths {
    merge_slashes: bool,
    encoded_slash: EncodedSlash,
    dot_segments: DotSegments,
}

/// The error for a path without a canonical form.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Unfit;

impl Paths {
    /// Builds the rules from the configuration.
    pub fn new(written: &config::Paths) -> Paths {
        let config::Paths { merge_slashes, encoded_slash, dot_segments } = *written;
        Paths { merge_slashes, encoded_slash, dot_segments }
    }

    /// The canonical form of a path, without its query. Allocates only if the path is, or may be, in another form.
    ///
    /// - Codes of letters, digits, `-`, `.`, `_` and `~` are decoded (RFC 3986 §6.2.2.2), other codes have upper-case
    ///   digits, and characters that a path must not contain (RFC 3986 §3.3) are encoded, including a `%` that begins
    ///   no code.
    /// - `.` and `..` segments are removed, the latter with the segment before (RFC 3986 §5.2.4). The root has no
    ///   parent.
    /// - Empty segments are removed, except the last.
    /// - `%2F` remains, becomes a `/`, or the path is refused; this also applies to `%5C` and the backslash, which some
    ///   backends treat as a slash.
    ///
    /// A path is always refused if it contains a NUL, encoded or not, or if a backend would find `..` or `.` after
    /// decoding `%2F` or `%5C`, or after removing parameters (`/..;x/`). A target that does not begin with `/`, such as
    /// `*`, is not a path and remains unchanged.
    ///
    /// # Errors
    ///
    /// If the path must be refused.
    pub fn canonical<'p>(&self, path: &'p [u8]) -> Result<Cow<'p, [u8]>, Unfit> {
        if !path.starts_with(b"/") || self.is_plain(path) {
            return Ok(Cow::Borrowed(path));
        }
        self.normal(&self.decoded(path)?).map(Cow::Owned)
    }

    /// The canonical form of a path in the configuration, for comparison with those of requests.
    ///
    /// # Errors
    ///
    /// If no request can have this path.
    pub fn written(&self, path: &str) -> Result<String, BuildError> {
        let canonical = self.canonical(path.as_bytes()).ok().and_then(|path| String::from_utf8(path.into_owned()).ok());
        canonical.ok_or_else(|| {
            BuildError::new("", format!("`{path}` is met by no request: such paths are refused, see `paths`"))
        })
    }

    /// A route's match with its path in the canonical form of requests.
    ///
    /// # Errors
    ///
    /// If no request can have this path.
    pub fn in_matches(&self, matches: &Match) -> Result<Match, BuildError> {
        let path = match &matches.path {
            Some(PathMatch::Exact(path)) => {
                self.written(path).map(PathMatch::Exact).map_err(|error| error.under("exact"))?
            }
            Some(PathMatch::Prefix(path)) => {
                self.written(path).map(PathMatch::Prefix).map_err(|error| error.under("prefix"))?
            }
            _ => return Ok(matches.clone()),
        };
        Ok(Match { path: Some(path), ..matches.clone() })
    }

    /// Whether the path is certainly canonical.
    fn is_plain(&self, path: &[u8]) -> bool {
        let mut after_slash = false;
        path.iter().all(|&byte| {
            let odd = after_slash && (byte == b'.' || (byte == b'/' && self.merge_slashes));
            after_slash = byte == b'/';
            !odd && (byte == b'/' || is_pchar(byte))
        })
    }

    /// The path with canonical codes.
    fn decoded(&self, path: &[u8]) -> Result<Vec<u8>, Unfit> {
        let mut decoded = Vec::with_capacity(path.len() + 8);
        let mut rest = path;
        while let Some((&byte, after)) = rest.split_first() {
            rest = after;
            let byte = match (byte, code(after)) {
                (b'%', Some((byte, after))) => {
                    rest = after;
                    match byte {
                        0 => return Err(Unfit),
                        b'/' | b'\\' => {
                            self.slash(byte, &mut decoded)?;
                            continue;
                        }
                        byte if is_unreserved(byte) => {
                            decoded.push(byte);
                            continue;
                        }
                        byte => byte,
                    }
                }
                (b'\\', _) => {
                    self.slash(byte, &mut decoded)?;
                    continue;
                }
                (0, _) => return Err(Unfit),
                (byte, _) if byte == b'/' || is_pchar(byte) => {
                    decoded.push(byte);
                    continue;
                }
                (byte, _) => byte,
            };
            encode(byte, &mut decoded);
        }
        Ok(decoded)
    }

    /// Handles an encoded slash or a backslash.
    fn slash(&self, byte: u8, decoded: &mut Vec<u8>) -> Result<(), Unfit> {
        match self.encoded_slash {
            EncodedSlash::Refuse => return Err(Unfit),
            EncodedSlash::Decode => decoded.push(b'/'),
            EncodedSlash::Keep => encode(byte, decoded),
        }
        Ok(())
    }

    /// The decoded path without the segments to be removed.
    fn normal(&self, path: &[u8]) -> Result<Vec<u8>, Unfit> {
        let mut kept: Vec<&[u8]> = Vec::new();
        let mut segments = path.split(|&byte| byte == b'/').skip(1).peekable();
        while let Some(segment) = segments.next() {
            let last = segments.peek().is_none();
            match segment {
                b"." | b".." if self.dot_segments == DotSegments::Refuse => return Err(Unfit),
                b"." | b".." => {
                    if segment == b".." {
                        kept.pop();
                    }
                    // `/a/.` and `/a/b/..` are the folder `/a/`.
                    if last {
                        kept.push(b"");
                    }
                }
                b"" if self.merge_slashes && !last => {}
                _ if hides_dots(segment) => return Err(Unfit),
                _ => kept.push(segment),
            }
        }
        Ok(kept.iter().flat_map(|segment| [b"/", *segment]).flatten().copied().collect())
    }
}

/// Whether a backend that decodes `%2F` and `%5C`, or removes parameters, would find a dot segment here.
fn hides_dots(segment: &[u8]) -> bool {
    let mut begin = 0;
    let is_dots = |part: &[u8]| matches!(part.split(|&byte| byte == b';').next(), Some(b"." | b".."));
    for at in 0..segment.len() {
        if segment[at..].starts_with(b"%2F") || segment[at..].starts_with(b"%5C") {
            if is_dots(&segment[begin..at]) {
                return true;
            }
            begin = at + 3;
        }
    }
    is_dots(&segment[begin..])
}

/// The byte of a code after its `%`, and the rest of the path.
fn code(after: &[u8]) -> Option<(u8, &[u8])> {
    let digit = |digit: u8| char::from(digit).to_digit(16).map(|digit| digit as u8);
    let (&[high, low], after) = after.split_first_chunk()?;
    Some((digit(high)? << 4 | digit(low)?, after))
}

fn encode(byte: u8, path: &mut Vec<u8>) {
    const DIGITS: &[u8; 16] = b"0123456789ABCDEF";
    path.extend_from_slice(&[b'%', DIGITS[usize::from(byte >> 4)], DIGITS[usize::from(byte & 15)]]);
}

/// RFC 3986 §2.3.
fn is_unreserved(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"-._~".contains(&byte)
}

/// Whether a segment may contain this byte unencoded (RFC 3986 §3.3); excludes `%`.
fn is_pchar(byte: u8) -> bool {
    is_unreserved(byte) || b"!$&'()*+,;=:@".contains(&byte)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const KEEP: Paths =
        Paths { merge_slashes: true, encoded_slash: EncodedSlash::Keep, dot_segments: DotSegments::Resolve };

    fn canonical(paths: Paths, sent: &str) -> String {
        match paths.canonical(sent.as_bytes()) {
            Ok(path) => String::from_utf8(path.into_owned()).expect("ASCII"),
            Err(Unfit) => "refused".to_owned(),
        }
    }

    fn all(paths: Paths, cases: &[(&str, &str)]) {
        for (sent, expected) in cases {
            assert_eq!(canonical(paths, sent), *expected, "{sent}");
        }
    }

    #[test]
    fn paths_that_mean_the_same_are_the_same() {
        all(
            KEEP,
            &[
                ("/admin", "/admin"),
                ("/%61dmin", "/admin"),
                ("/%61%64%6d%69%6E", "/admin"),
                ("/public/../admin", "/admin"),
                ("/public/%2e%2E/admin", "/admin"),
                ("/public/.%2e/admin/", "/admin/"),
                ("/./admin/.", "/admin/"),
                ("/admin/x/..", "/admin/"),
                ("/../../admin", "/admin"),
                ("/x/../files/a", "/files/a"),
                ("/..", "/"),
                ("/.", "/"),
                ("/a/b/c/./../../g", "/a/g"),
                ("/a//../b", "/b"),
                ("//admin", "/admin"),
                ("///admin//x//", "/admin/x/"),
                ("/a/./", "/a/"),
                ("//", "/"),
                ("/", "/"),
                ("/.well-known/x", "/.well-known/x"),
                ("/...", "/..."),
                ("/..a/.b", "/..a/.b"),
                ("*", "*"),
                ("", ""),
            ],
        );
    }

    #[test]
    fn codes_have_one_form() {
        all(
            KEEP,
            &[
                ("/a%20b", "/a%20b"),
                ("/%7Euser", "/~user"),
                ("/caf%c3%a9", "/caf%C3%A9"),
                ("/caf\u{e9}", "/caf%C3%A9"),
                ("/a|b{c}\"^`<>[]", "/a%7Cb%7Bc%7D%22%5E%60%3C%3E%5B%5D"),
                ("/a:b@c!$&'()*+,;=", "/a:b@c!$&'()*+,;="),
                ("/%3a%40", "/%3A%40"),
                ("/100%", "/100%25"),
                ("/%zz%4", "/%25zz%254"),
                ("/%25%36%31", "/%2561"),
                ("/%%361dmin", "/%2561dmin"),
                ("/%\u{e9}", "/%25%C3%A9"),
                // A decoded byte does not become part of another code.
                ("/%5%61", "/%255a"),
                ("/%%35%61", "/%255a"),
                ("/%2%35%36%31", "/%252561"),
                ("/%25%35%61", "/%255a"),
                ("/%%5a", "/%25Z"),
            ],
        );
        assert_eq!(KEEP.canonical(b"/\xff").expect("a path"), &b"/%FF"[..]);
    }

    #[test]
    fn an_encoded_slash_stays_unless_a_backend_would_find_dots_behind_it() {
        all(
            KEEP,
            &[
                ("/a%2Fb", "/a%2Fb"),
                ("/a%2fb", "/a%2Fb"),
                ("/@scope%2fname", "/@scope%2Fname"),
                ("/a%5cb", "/a%5Cb"),
                ("/a\\b", "/a%5Cb"),
                ("/a%2Fb/../c", "/c"),
                ("/public/..%2fadmin", "refused"),
                ("/public/..%2Fadmin", "refused"),
                ("/public/%2e%2e%2fadmin", "refused"),
                ("/public%2f..%2fadmin", "refused"),
                ("/public%2f..", "refused"),
                ("/public/x%2f..%2f..%2fadmin", "refused"),
                ("/public/.%2fadmin", "refused"),
                ("/public/..%5cadmin", "refused"),
                ("/public\\..\\admin", "refused"),
                ("/public/..\\admin", "refused"),
                ("/..;/admin", "refused"),
                ("/..;x=1/admin", "refused"),
                ("/.;/admin", "refused"),
                ("/a%2f..;x", "refused"),
                ("/a;x=../b", "/a;x=../b"),
                ("/..a%2fb", "/..a%2Fb"),
                ("/a%00", "refused"),
                ("/a\0", "refused"),
                ("/%00/../admin", "refused"),
            ],
        );
    }

    #[test]
    fn an_encoded_slash_is_decoded_or_refused_where_that_is_said() {
        all(
            Paths { encoded_slash: EncodedSlash::Decode, ..KEEP },
            &[
                ("/a%2Fb", "/a/b"),
                ("/public/..%2fadmin", "/admin"),
                ("/public%2F..%2F%61dmin", "/admin"),
                ("/%2fadmin", "/admin"),
                ("/a\\..\\admin", "/admin"),
                ("/a%5Cb", "/a/b"),
                ("/a%252fb", "/a%252fb"),
                ("/%2f..;/x", "refused"),
            ],
        );
        let refuse = Paths { encoded_slash: EncodedSlash::Refuse, ..KEEP };
        all(refuse, &[("/a%2Fb", "refused"), ("/a%5cb", "refused"), ("/a\\b", "refused"), ("/a%252Fb", "/a%252Fb")]);
    }

    #[test]
    fn slashes_stay_and_dots_are_refused_where_that_is_said() {
        let two = Paths { merge_slashes: false, ..KEEP };
        all(two, &[("//admin", "//admin"), ("/a//../b", "/a/b"), ("/a//", "/a//"), ("/a/https://b/", "/a/https://b/")]);
        let refuse = Paths { dot_segments: DotSegments::Refuse, ..KEEP };
        for sent in ["/a/../b", "/a/./b", "/..", "/a/%2e%2e/b", "/a/."] {
            assert_eq!(canonical(refuse, sent), "refused", "{sent}");
        }
        all(refuse, &[("/a/b.c", "/a/b.c"), ("/...", "/..."), ("//a", "/a")]);
    }

    #[test]
    fn a_plain_path_costs_no_allocation() {
        for plain in ["/shop/cart.html", "/a;b=c:@!/", "/"] {
            assert!(matches!(KEEP.canonical(plain.as_bytes()), Ok(Cow::Borrowed(_))), "{plain}");
        }
    }

    #[test]
    fn what_an_operator_writes_is_what_requests_are_looked_up_by() {
        assert_eq!(KEEP.written("/caf\u{e9}//%61/").as_deref(), Ok("/caf%C3%A9/a/"));
        let refuse = Paths { encoded_slash: EncodedSlash::Refuse, ..KEEP };
        assert!(refuse.written("/a%2Fb").is_err());
    }

    fn any_paths() -> impl Strategy<Value = Paths> {
        let slash = prop_oneof![Just(EncodedSlash::Keep), Just(EncodedSlash::Decode), Just(EncodedSlash::Refuse)];
        let dots = prop_oneof![Just(DotSegments::Resolve), Just(DotSegments::Refuse)];
        (any::<bool>(), slash, dots).prop_map(|(merge_slashes, encoded_slash, dot_segments)| Paths {
            merge_slashes,
            encoded_slash,
            dot_segments,
        })
    }

    /// The path as a lenient backend reads it: decodes all codes, treats backslashes as slashes, removes parameters and
    /// resolves dots.
    fn resolved(path: &[u8]) -> Vec<Vec<u8>> {
        let (mut bytes, mut rest) = (Vec::new(), path);
        while let Some((&byte, after)) = rest.split_first() {
            let (byte, after) = code(after).filter(|_| byte == b'%').unwrap_or((byte, after));
            bytes.push(if byte == b'\\' { b'/' } else { byte });
            rest = after;
        }
        let mut kept = Vec::new();
        for segment in bytes.split(|&byte| byte == b'/') {
            match segment.split(|&byte| byte == b';').next().unwrap_or_default() {
                b"" | b"." => {}
                b".." => drop(kept.pop()),
                segment => kept.push(segment.to_vec()),
            }
        }
        kept
    }

    proptest! {
        #[test]
        fn the_one_form_of_a_path_is_its_own_and_no_backend_finds_another_path_in_it(
            paths in any_paths(),
            pieces in prop::collection::vec(
                prop_oneof![
                    Just("/".to_owned()), Just("..".to_owned()), Just(".".to_owned()), Just("%2e".to_owned()),
                    Just("%2F".to_owned()), Just("%5c".to_owned()), Just("\\".to_owned()), Just("%".to_owned()),
                    Just("%25".to_owned()), Just(";x".to_owned()), Just("%3b".to_owned()), Just("2".to_owned()),
                    Just("e".to_owned()), Just("a".to_owned()), "%[0-9a-f]", "%[2-7][0-9A-Fa-f]", "[ -~]", "\\PC",
                ],
                0..24,
            ),
        ) {
            let sent = format!("/{}", pieces.concat());
            if let Ok(path) = paths.canonical(sent.as_bytes()) {
                let path = path.into_owned();
                prop_assert!(path.starts_with(b"/") && path.is_ascii());
                let again = paths.canonical(&path).map(Cow::into_owned);
                prop_assert_eq!(again.as_ref(), Ok(&path), "it is its own form");
                // An endpoint that resolves the path again reaches the path that was looked up.
                let plain: Vec<_> = path.split(|&byte| byte == b'/').filter(|segment| !segment.is_empty()).collect();
                let depth = |path: &[u8]| resolved(path).len();
                let encoded = plain.iter().any(|segment| {
                    segment.windows(3).any(|code| [&b"%2F"[..], b"%5C", b"%3B"].contains(&code)) || segment.starts_with(b";")
                });
                prop_assert!(encoded || depth(&path) == plain.len(), "{}", String::from_utf8_lossy(&path));
                prop_assert!(!path.split(|&byte| byte == b'/').any(hides_dots));
            }
        }
    }
}
