//! Shared by the authentication filters: headers that only they may set, challenges and metrics.

use hmac::{Hmac, Mac};
use http::header::{AUTHORIZATION, WWW_AUTHENTICATE};
use http::{HeaderMap, HeaderName, HeaderValue};
use pingora::http::RequestHeader;
use sha2::Sha256;

use super::{Refused, Surroundings, Verdict, field};
use crate::error::{BuildError, Refusal};
use crate::metrics::filters::{Access, Admission};

/// The metrics of one kind of authentication filter.
pub(super) struct Gate(Option<Admission>);

impl Gate {
    /// The metrics of the filter that is built.
    pub fn of(around: &Surroundings<'_>) -> Gate {
        Gate(around.metrics.map(|metrics| metrics.admission(around.route, around.filter)))
    }

    /// Counts a request with this result.
    pub fn count(&self, access: Access) {
        self.0.iter().for_each(|admission| admission.count(access));
    }

    /// Counts the result, and refuses the request with these additional headers.
    pub fn refuse(
        &self,
        access: Access,
        refusal: &'static Refusal,
        headers: Vec<(HeaderName, HeaderValue)>,
    ) -> Verdict {
        self.count(access);
        Verdict::Refuse(Refused { refusal, headers })
    }
}

/// Checks the name of the request header that a filter sets, if it sets one.
pub(super) fn own_header(written: Option<&String>, key: &str) -> Result<Option<HeaderName>, BuildError> {
    let name = written.map(|written| field::free_name(written).map_err(|message| BuildError::new(key, message)));
    name.transpose()
}

/// Replaces the client's header of this name by `value`. If the value is missing or invalid, only removes the header.
pub(super) fn set_own(request: &mut RequestHeader, name: Option<&HeaderName>, value: Option<&str>) {
    let Some(name) = name else { return };
    request.remove_header(name);
    if let Some(value) = value.filter(|value| !value.is_empty()).and_then(|value| HeaderValue::from_str(value).ok()) {
        // The removed header has left room for this one.
        let _ = request.insert_header(name.clone(), value);
    }
}

/// The challenge of a 401 (RFC 9110 §11.6.1).
pub(super) fn challenge(value: &HeaderValue) -> Vec<(HeaderName, HeaderValue)> {
    vec![(WWW_AUTHENTICATE, value.clone())]
}

/// A realm as a quoted string of a challenge.
pub(super) fn realm(written: &str) -> Result<String, BuildError> {
    let plain = written.bytes().all(|byte| byte == b'\t' || (b' '..=b'~').contains(&byte));
    if !plain || written.is_empty() {
        return Err(BuildError::new("realm", "a realm is a line of ASCII text"));
    }
    Ok(written.replace('\\', "\\\\").replace('"', "\\\""))
}

/// The credentials in `Authorization` if it has this scheme (RFC 9110 §11.4). `Err`: there are several such fields,
/// and the backend could use another one.
pub(super) fn credentials<'h>(headers: &'h HeaderMap, scheme: &str) -> Result<Option<&'h str>, ()> {
    let mut fields = headers.get_all(AUTHORIZATION).iter();
    let Some(field) = fields.next() else { return Ok(None) };
    if fields.next().is_some() {
        return Err(());
    }
    let Some((found, rest)) = field.to_str().ok().and_then(|field| field.split_once(' ')) else { return Ok(None) };
    Ok(found.eq_ignore_ascii_case(scheme).then(|| rest.trim_matches(' ')))
}

/// Hashes credentials for a cache, with a random key of this filter. So the cache cannot be tested against a list of
/// passwords, and an attacker cannot cause a collision.
pub(super) struct Sealer([u8; 32]);

/// The hash of credentials.
pub(super) type Seal = [u8; 32];

impl Sealer {
    pub fn new() -> Sealer {
        Sealer(rand::random())
    }

    /// The seal of these parts. It depends on where the parts are split.
    pub fn seal(&self, parts: &[&[u8]]) -> Seal {
        let mut mac = <Hmac<Sha256> as Mac>::new_from_slice(&self.0).expect("a key of any length");
        for part in parts {
            mac.update(&(part.len() as u64).to_be_bytes());
            mac.update(part);
        }
        mac.finalize().into_bytes().into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn credentials_are_those_of_the_one_field() {
        let headers = |values: &[&str]| {
            let field = |value: &&str| (AUTHORIZATION, HeaderValue::from_str(value).unwrap());
            values.iter().map(field).collect::<Vec<_>>()
        };
        let of = |values: &[&str]| {
            let mut map = HeaderMap::new();
            headers(values).into_iter().for_each(|(name, value)| _ = map.append(name, value));
            credentials(&map, "Basic").map(|found| found.map(str::to_owned))
        };
        assert_eq!(of(&[]), Ok(None));
        assert_eq!(of(&["Basic abc"]), Ok(Some("abc".into())));
        assert_eq!(of(&["bAsIc   abc "]), Ok(Some("abc".into())));
        assert_eq!(of(&["Bearer abc"]), Ok(None));
        assert_eq!(of(&["Basic"]), Ok(None));
        assert_eq!(of(&["Basic abc", "Basic def"]), Err(()), "the backend may take the other one");
    }

    #[test]
    fn seals_tell_parts_apart_and_differ_from_filter_to_filter() {
        let (one, other) = (Sealer::new(), Sealer::new());
        assert_eq!(one.seal(&[b"ab", b"c"]), one.seal(&[b"ab", b"c"]));
        assert_ne!(one.seal(&[b"ab", b"c"]), one.seal(&[b"a", b"bc"]));
        assert_ne!(one.seal(&[b"a"]), other.seal(&[b"a"]));
    }

    #[test]
    fn a_realm_stays_within_its_quotes() {
        assert_eq!(realm(r#"a "b" \"#).unwrap(), r#"a \"b\" \\"#);
        assert!(realm("").is_err() && realm("a\r\nb").is_err() && realm("grüße").is_err());
    }
}
