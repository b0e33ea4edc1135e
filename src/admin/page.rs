//! The status page: a single HTML file in the program, which displays the events of `/status/events`.
//!
//! A browser gets it at `/` and `/status`; other clients get the index and the document. The page needs no other
//! resources, and its content security policy (CSP) allows none: it names the digests of its own script and style.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use http::HeaderValue;
use http::header::{CONTENT_SECURITY_POLICY, REFERRER_POLICY, VARY};
use sha2::{Digest, Sha256};

use super::reply::Reply;

const PAGE: &str = include_str!("page.html");

/// The page and its headers.
#[derive(Clone)]
pub struct Page {
    policy: HeaderValue,
}

impl Page {
    /// Computes the content security policy.
    pub fn new() -> Self {
        let (script, style) = (digest(inside(PAGE, "script")), digest(inside(PAGE, "style")));
        let policy = format!(
            "default-src 'none'; script-src '{script}'; style-src '{style}'; img-src data:; connect-src 'self'; \
             base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        );
        // Cannot happen: the value consists of base64 and the text above.
        let policy = HeaderValue::from_str(&policy).unwrap_or(HeaderValue::from_static("default-src 'none'"));
        Page { policy }
    }

    /// The response with the page.
    pub fn answer(&self) -> Reply {
        Reply::whole("text/html; charset=utf-8", PAGE)
            .with_header(CONTENT_SECURITY_POLICY, self.policy.clone())
            .with_header(REFERRER_POLICY, HeaderValue::from_static("no-referrer"))
            .with_header(VARY, HeaderValue::from_static("Accept"))
    }
}

impl Default for Page {
    fn default() -> Self {
        Page::new()
    }
}

/// The content of the only element with this name.
fn inside<'p>(page: &'p str, element: &str) -> &'p str {
    let (open, close) = (format!("<{element}>"), format!("</{element}>"));
    page.split_once(&open).and_then(|(_, rest)| rest.split_once(&close)).map_or("", |(inside, _)| inside)
}

/// A hash source of CSP (W3C CSP3 §2.3.1).
fn digest(text: &str) -> String {
    format!("sha256-{}", STANDARD.encode(Sha256::digest(text)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_needs_nothing_from_elsewhere() {
        assert!(!inside(PAGE, "script").is_empty() && !inside(PAGE, "style").is_empty());
        assert_eq!((PAGE.matches("<script").count(), PAGE.matches("<style").count()), (1, 1));
        let addresses: Vec<_> = PAGE.match_indices("http://").map(|(at, _)| &PAGE[at..at + 18]).collect();
        assert!(addresses.iter().all(|address| *address == "http://www.w3.org/"), "{addresses:?}");
        assert!(!PAGE.contains("https://") && !PAGE.contains("style=\"") && !PAGE.contains("innerHTML"));
        // Links are relative, so the page works behind a tunnel or a proxy at any path.
        for attribute in ["href=\"/", "src=\"/", "EventSource('/"] {
            assert!(!PAGE.contains(attribute), "{attribute}");
        }
    }

    #[test]
    fn a_digest_is_what_a_browser_expects() {
        assert_eq!(digest("alert('Hello, world.');"), "sha256-qznLcsROx4GACP2dm0UCKCzCG+HiZ1guq6ZZDob/Tng=");
        assert_eq!(inside("<a><script>x()</script>", "script"), "x()");
    }
}
