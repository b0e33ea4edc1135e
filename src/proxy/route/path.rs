//! The path by which a request is routed: what a backend would make of the path that was sent.
//!
//! A route that guards `/admin` must not be gone round by `/%61dmin` or `/public/../admin`, which most backends take
//! for the same. So the route is looked up in `table` by the canonical path; the backend gets the path as it was sent.

use std::borrow::Cow;

/// The canonical form of a path (RFC 3986 §6.2.2): codes of unreserved characters are decoded, then dot segments are
/// removed. Allocates only if the path has a `%` or a segment that begins with a dot.
///
/// Codes of other characters stay, `%2F` among them, and so do empty segments: backends differ in what they make of
/// those. A target that is no path, such as `*`, stays as it is.
pub fn canonical(path: &str) -> Cow<'_, str> {
    if !path.starts_with('/') || !(path.contains('%') || path.contains("/.")) {
        return Cow::Borrowed(path);
    }
    Cow::Owned(without_dot_segments(&decode_unreserved(path)))
}

/// Replaces `%7E` by `~`, and so on for letters, digits, `-`, `.`, `_` and `~` (RFC 3986 §2.3).
fn decode_unreserved(path: &str) -> String {
    let mut decoded = String::with_capacity(path.len());
    let mut rest = path;
    while let Some(start) = rest.find('%') {
        decoded.push_str(&rest[..start]);
        let code = rest.get(start + 1..start + 3).filter(|code| code.bytes().all(|digit| digit.is_ascii_hexdigit()));
        let byte = code.and_then(|code| u8::from_str_radix(code, 16).ok());
        rest = match byte.map(char::from).filter(|char| char.is_ascii_alphanumeric() || "-._~".contains(*char)) {
            Some(char) => {
                decoded.push(char);
                &rest[start + 3..]
            }
            None => {
                decoded.push('%');
                &rest[start + 1..]
            }
        };
    }
    decoded.push_str(rest);
    decoded
}

/// Removes `.` and `..` segments, the latter with the one before (RFC 3986 §5.2.4). Nothing is above the root.
fn without_dot_segments(path: &str) -> String {
    let mut kept = Vec::new();
    let mut segments = path.split('/').skip(1).peekable();
    while let Some(segment) = segments.next() {
        match segment {
            "." => {}
            ".." => drop(kept.pop()),
            _ => kept.push(segment),
        }
        // `/a/.` and `/a/b/..` are the folder `/a/`.
        if segments.peek().is_none() && matches!(segment, "." | "..") {
            kept.push("");
        }
    }
    format!("/{}", kept.join("/"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_that_mean_the_same_are_the_same() {
        for (sent, expected) in [
            ("/admin", "/admin"),
            ("/%61dmin", "/admin"),
            ("/%61%64%6d%69%6E", "/admin"),
            ("/public/../admin", "/admin"),
            ("/public/%2e%2E/admin", "/admin"),
            ("/public/.%2e/admin/", "/admin/"),
            ("/./admin/.", "/admin/"),
            ("/admin/x/..", "/admin/"),
            ("/../../admin", "/admin"),
            ("/..", "/"),
            ("/a/b/c/./../../g", "/a/g"),
            ("/a//../b", "/a/b"),
            ("//admin", "//admin"),
            ("/a%2Fb", "/a%2Fb"),
            ("/a%20b%", "/a%20b%"),
            ("/%zz%4", "/%zz%4"),
            ("/%25%36%31", "/%2561"),
            ("/.well-known/x", "/.well-known/x"),
            ("/...", "/..."),
            ("/é%C3%A9", "/é%C3%A9"),
            ("/%é", "/%é"),
            ("*", "*"),
            ("", ""),
        ] {
            assert_eq!(canonical(sent), expected, "{sent}");
        }
    }

    #[test]
    fn a_plain_path_costs_no_allocation() {
        assert!(matches!(canonical("/shop/cart.html"), Cow::Borrowed(_)));
    }
}
