//! The status page: one file of HTML in the program, which shows what `/status/events` says.
//!
//! A browser gets it at `/` and at `/status`; whoever does not ask for HTML gets the index and the document. It needs
//! nothing else, and is allowed nothing else: its policy (CSP) names its own script and style by their digests.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use http::HeaderValue;
use http::header::{CONTENT_SECURITY_POLICY, REFERRER_POLICY, VARY};
use sha2::{Digest, Sha256};

use super::answer::Answer;

const PAGE: &str = include_str!("page.html");

/// The page, with the headers that it is sent with.
#[derive(Clone)]
pub struct Page {
    policy: HeaderValue,
}

impl Page {
    /// Works out what the page is allowed to do.
    pub fn new() -> Self {
        let (script, style) = (digest(inside(PAGE, "script")), digest(inside(PAGE, "style")));
        let policy = format!(
            "default-src 'none'; script-src '{script}'; style-src '{style}'; img-src data:; connect-src 'self'; \
             base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        );
        // Not reached, the other one: it is made of base64 and of what stands above.
        let policy = HeaderValue::from_str(&policy).unwrap_or(HeaderValue::from_static("default-src 'none'"));
        Page { policy }
    }

    /// The page as an answer.
    pub fn answer(&self) -> Answer {
        Answer::whole("text/html; charset=utf-8", PAGE)
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

/// What stands in the one element of this name.
fn inside<'p>(page: &'p str, element: &str) -> &'p str {
    let (open, close) = (format!("<{element}>"), format!("</{element}>"));
    page.split_once(&open).and_then(|(_, rest)| rest.split_once(&close)).map_or("", |(inside, _)| inside)
}

/// As CSP wants it (W3C CSP3 §2.3.1).
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
        // Through a tunnel or a proxy, it lives wherever it is.
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
