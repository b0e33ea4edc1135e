//! What filters that find out who asks have in common: headers that only they may set, challenges, and figures.

use hmac::{Hmac, Mac};
use http::header::{AUTHORIZATION, WWW_AUTHENTICATE};
use http::{HeaderMap, HeaderName, HeaderValue};
use pingora::http::RequestHeader;
use sha2::Sha256;

use super::{Refused, Surroundings, Verdict, field};
use crate::error::{BuildError, Refusal};
use crate::metrics::filters::{Access, Admission};

/// What a filter counts of those who come to it.
pub(super) struct Gate(Option<Admission>);

impl Gate {
    /// That of the filter that is built.
    pub fn of(around: &Surroundings<'_>) -> Gate {
        Gate(around.metrics.map(|metrics| metrics.admission(around.route, around.filter)))
    }

    /// One has come, and this became of it.
    pub fn count(&self, access: Access) {
        self.0.iter().for_each(|admission| admission.count(access));
    }

    /// Counts it, and refuses it with these further headers.
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

/// The name of a header of the request that a filter sets, if it sets one.
pub(super) fn own_header(written: Option<&String>, key: &str) -> Result<Option<HeaderName>, BuildError> {
    let name = written.map(|written| field::free_name(written).map_err(|message| BuildError::new(key, message)));
    name.transpose()
}

/// Puts `value` in place of what a client has sent under this name; without a value that can stand there, nothing.
pub(super) fn set_own(request: &mut RequestHeader, name: Option<&HeaderName>, value: Option<&str>) {
    let Some(name) = name else { return };
    request.remove_header(name);
    if let Some(value) = value.filter(|value| !value.is_empty()).and_then(|value| HeaderValue::from_str(value).ok()) {
        // A header that was taken away has left room for one.
        let _ = request.insert_header(name.clone(), value);
    }
}

/// The challenge of a 401 (RFC 9110 §11.6.1).
pub(super) fn challenge(value: &HeaderValue) -> Vec<(HeaderName, HeaderValue)> {
    vec![(WWW_AUTHENTICATE, value.clone())]
}

/// A realm, as it stands in a challenge between quotes.
pub(super) fn realm(written: &str) -> Result<String, BuildError> {
    let plain = written.bytes().all(|byte| byte == b'\t' || (b' '..=b'~').contains(&byte));
    if !plain || written.is_empty() {
        return Err(BuildError::new("realm", "a realm is a line of ASCII text"));
    }
    Ok(written.replace('\\', "\\\\").replace('"', "\\\""))
}

/// What follows the scheme in `Authorization`, if it is this scheme (RFC 9110 §11.4). `Err`: there is more than one
/// field, and the backend could take another one for the right one.
pub(super) fn credentials<'h>(headers: &'h HeaderMap, scheme: &str) -> Result<Option<&'h str>, ()> {
    let mut fields = headers.get_all(AUTHORIZATION).iter();
    let Some(field) = fields.next() else { return Ok(None) };
    if fields.next().is_some() {
        return Err(());
    }
    let Some((found, rest)) = field.to_str().ok().and_then(|field| field.split_once(' ')) else { return Ok(None) };
    Ok(found.eq_ignore_ascii_case(scheme).then(|| rest.trim_matches(' ')))
}

/// Hashes what is kept of credentials, under a random key of this filter: what is remembered cannot be tried
/// out against a list of passwords, nor can anybody bring about that two are the same.
pub(super) struct Sealer([u8; 32]);

/// What stands for credentials.
pub(super) type Seal = [u8; 32];

impl Sealer {
    pub fn new() -> Sealer {
        Sealer(rand::random())
    }

    /// The seal of these parts, which differs if they are split in another way.
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
