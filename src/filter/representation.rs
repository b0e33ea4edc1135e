//! Header fields about a body (RFC 9110 §8), for filters that change the body.

use http::header::{
    ACCEPT_ENCODING, ACCEPT_RANGES, CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE, ETAG, VARY,
};
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode};
use pingora::http::{RequestHeader, ResponseHeader};

use crate::error::BuildError;

/// Digests of the original body (RFC 9530, and its predecessors).
pub(super) const DIGESTS: [&str; 4] = ["content-digest", "repr-digest", "content-md5", "digest"];

/// The items of a list header.
pub(super) fn items<'h>(headers: &'h HeaderMap, name: &HeaderName) -> impl Iterator<Item = &'h [u8]> {
    let lines = headers.get_all(name).iter();
    lines.flat_map(|line| line.as_bytes().split(|&byte| byte == b',')).map(<[u8]>::trim_ascii)
}

/// Whether a response has a complete body: not a part (206), and not none (1xx, 204, 205, 304). The response to HEAD
/// is treated as that to GET.
pub(super) fn is_whole(response: &ResponseHeader) -> bool {
    let status = response.status;
    let bodiless = [StatusCode::NO_CONTENT, StatusCode::RESET_CONTENT, StatusCode::NOT_MODIFIED].contains(&status);
    let partial = status == StatusCode::PARTIAL_CONTENT || response.headers.contains_key(CONTENT_RANGE);
    !(status.is_informational() || bodiless || partial)
}

/// Whether a body has a content coding. `identity` counts as none.
pub(super) fn is_coded(headers: &HeaderMap) -> bool {
    items(headers, &CONTENT_ENCODING).any(|coding| !coding.is_empty() && !coding.eq_ignore_ascii_case(b"identity"))
}

/// The announced length of a body.
pub(super) fn length(headers: &HeaderMap) -> Option<u64> {
    headers.get(CONTENT_LENGTH)?.to_str().ok()?.parse().ok()
}

/// The media type without its parameters, in lower case; empty if there is none.
pub(super) fn media_type(headers: &HeaderMap) -> Vec<u8> {
    let kind = headers.get(CONTENT_TYPE).map(HeaderValue::as_bytes).unwrap_or_default();
    kind.split(|&byte| byte == b';').next().unwrap_or_default().trim_ascii().to_ascii_lowercase()
}

/// The coding of the body has changed: removes the fields that are no longer true, and weakens the validator, since
/// the content is equivalent (RFC 9110 §8.8.3).
pub(super) fn recoded(response: &mut ResponseHeader) {
    if let Some(tag) = response.headers.get(ETAG).filter(|tag| !tag.as_bytes().starts_with(b"W/")) {
        match HeaderValue::from_bytes(&[b"W/", tag.as_bytes()].concat()) {
            // It replaces another field: there is room for it.
            Ok(weak) => _ = response.insert_header(ETAG, weak),
            Err(_) => drop(response.remove_header(&ETAG)),
        }
    }
    response.remove_header(&ACCEPT_RANGES);
    DIGESTS.iter().for_each(|name| drop(response.remove_header(*name)));
}

/// The request body has changed: removes its digests.
pub(super) fn drop_digests(request: &mut RequestHeader) {
    DIGESTS.iter().for_each(|name| drop(request.remove_header(*name)));
}

/// Removes `Accept-Encoding`, so that the endpoint sends a response without a coding.
pub(super) fn set_aside(request: &mut RequestHeader) -> Vec<HeaderValue> {
    let accepts = request.headers.get_all(ACCEPT_ENCODING).iter().cloned().collect();
    request.remove_header(&ACCEPT_ENCODING);
    accepts
}

/// Restores it as the client has sent it, for filters that process the response.
pub(super) fn put_back(request: &mut RequestHeader, accepts: Vec<HeaderValue>) {
    request.remove_header(&ACCEPT_ENCODING);
    for value in accepts {
        // As many as before.
        let _ = request.append_header(ACCEPT_ENCODING, value);
    }
}

/// Adds a name to the fields that the response depends on.
pub(super) fn vary(response: &mut ResponseHeader, name: &'static str) {
    let known = |item: &[u8]| item.eq_ignore_ascii_case(name.as_bytes()) || item == b"*";
    if !items(&response.headers, &VARY).any(known) {
        // One more field. If the header has no room for it, the response already has too many.
        let _ = response.append_header(VARY, HeaderValue::from_static(name));
    }
}

/// The response no longer depends on this field.
pub(super) fn unvary(response: &mut ResponseHeader, name: &str) {
    let is_it = |item: &[u8]| item.eq_ignore_ascii_case(name.as_bytes());
    if !items(&response.headers, &VARY).any(is_it) {
        return;
    }
    let left: Vec<&[u8]> = items(&response.headers, &VARY).filter(|item| !item.is_empty() && !is_it(item)).collect();
    match HeaderValue::from_bytes(&left.join(&b", "[..])) {
        Ok(left) if !left.is_empty() => _ = response.insert_header(VARY, left),
        _ => drop(response.remove_header(&VARY)),
    }
}

/// Media types: `text/html`, `text/*`, `application/*+json`, or `*/*`.
#[derive(Debug)]
pub(super) struct Type {
    before: Box<[u8]>,
    /// The text after a `*`, if there is one.
    behind: Option<Box<[u8]>>,
}

impl Type {
    /// Parses a list of types; the path of an error is `types[…]`.
    pub fn all(written: &[String]) -> Result<Vec<Type>, BuildError> {
        if written.is_empty() {
            return Err(BuildError::new("types", "no media type is named, so that this would do nothing"));
        }
        let kind = |(index, written): (usize, &String)| {
            let told = || {
                BuildError::new(
                    format!("types[{index}]"),
                    format!("`{written}` is not a media type: write `text/html`, `text/*` or `application/*+json`"),
                )
            };
            Type::build(written).ok_or_else(told)
        };
        written.iter().enumerate().map(kind).collect()
    }

    fn build(written: &str) -> Option<Type> {
        let written = written.to_ascii_lowercase();
        let sound = |byte: u8| byte.is_ascii_alphanumeric() || b"/.+-_!#$&^*".contains(&byte);
        if written == "*/*" {
            return Some(Type { before: Box::default(), behind: Some(Box::default()) });
        }
        let (kind, part) = written.split_once('/')?;
        if kind.is_empty() || part.is_empty() || part.contains('/') || kind.contains('*') || !written.bytes().all(sound)
        {
            return None;
        }
        match written.split_once('*') {
            None => Some(Type { before: written.as_bytes().into(), behind: None }),
            Some((_, behind)) if behind.contains('*') => None,
            Some((before, behind)) => {
                Some(Type { before: before.as_bytes().into(), behind: Some(behind.as_bytes().into()) })
            }
        }
    }

    /// Whether a type, in the form of [`media_type`], is in the list.
    pub fn covers(&self, kind: &[u8]) -> bool {
        match &self.behind {
            None => *self.before == *kind,
            Some(behind) => kind.strip_prefix(&*self.before).is_some_and(|rest| rest.ends_with(behind)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn media_types_are_covered() {
        let covers = |written: &str, kind: &str| Type::build(written).unwrap().covers(kind.as_bytes());
        assert!(covers("text/*", "text/html") && covers("*/*", "a/b") && covers("Text/HTML", "text/html"));
        assert!(
            covers("application/*+json", "application/a+json") && !covers("application/*+json", "application/json")
        );
        assert!(!covers("text/*", "texts/html") && !covers("text/html", "text/html5"));
        for wrong in ["", "text", "/x", "text/", "*/x", "a/b/c", "a/*b*", "a b/c"] {
            assert!(Type::build(wrong).is_none(), "{wrong}");
        }
    }

    fn response(fields: &[(&'static str, &str)]) -> ResponseHeader {
        let mut response = ResponseHeader::build(200, None).unwrap();
        fields.iter().for_each(|(name, value)| response.append_header(*name, *value).map(drop).unwrap());
        response
    }

    #[test]
    fn a_response_depends_on_what_it_says() {
        for (before, after) in [
            (&["Accept-Encoding"][..], None),
            (&["Origin, accept-encoding", "Cookie"], Some("Origin, Cookie")),
            (&["Origin"], Some("Origin")),
            (&[], None),
        ] {
            let fields: Vec<_> = before.iter().map(|value| ("vary", *value)).collect();
            let mut response = response(&fields);
            unvary(&mut response, "accept-encoding");
            let left: Vec<_> = response.headers.get_all(VARY).iter().map(|value| value.to_str().unwrap()).collect();
            assert_eq!(left, after.into_iter().collect::<Vec<_>>(), "{before:?}");
        }
    }

    #[test]
    fn what_is_coded_says_so() {
        let coded = |values: &[&str]| {
            let fields: Vec<_> = values.iter().map(|value| ("content-encoding", *value)).collect();
            is_coded(&response(&fields).headers)
        };
        assert!(coded(&["gzip"]) && coded(&["identity", "br"]) && coded(&["identity, x"]));
        assert!(!coded(&[]) && !coded(&["Identity"]) && !coded(&["", ","]));
    }
}
