//! An OCSP response from a file (RFC 6960): checks its form, its certificate and its validity.
//!
//! It is sent unchanged; clients verify its signature. Other programs fetch it.

/// An OCSP response to send with a certificate.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Staple {
    /// The response, in DER.
    pub der: Vec<u8>,
    /// Time of the next update, in seconds since 1970.
    pub next_update: i64,
}

const SEQUENCE: u8 = 0x30;
const INTEGER: u8 = 0x02;
const OCTETS: u8 = 0x04;
const OBJECT: u8 = 0x06;
const ENUMERATED: u8 = 0x0a;
const TIME: u8 = 0x18;
/// Context-specific tags, explicit or constructed.
const TAG_0: u8 = 0xa0;
const TAG_1: u8 = 0xa1;
/// `good [0] IMPLICIT NULL`.
const GOOD: u8 = 0x80;
/// id-pkix-ocsp-basic, 1.3.6.1.5.5.7.48.1.1.
const BASIC: &[u8] = &[0x2b, 0x06, 0x01, 0x05, 0x05, 0x07, 0x30, 0x01, 0x01];

/// Parses DER from front to back.
struct Der<'a>(&'a [u8]);

impl<'a> Der<'a> {
    /// The contents of the next element, which must have this tag.
    fn take(&mut self, tag: u8) -> Option<&'a [u8]> {
        let (found, contents) = self.any()?;
        (found == tag).then_some(contents)
    }

    /// The contents of the next element if it has this tag; otherwise the element remains.
    fn optional(&mut self, tag: u8) -> Option<&'a [u8]> {
        if self.0.first() == Some(&tag) { self.take(tag) } else { None }
    }

    fn any(&mut self) -> Option<(u8, &'a [u8])> {
        let (&tag, rest) = self.0.split_first()?;
        let (&first, mut rest) = rest.split_first()?;
        let length = match first {
            0..=0x7f => usize::from(first),
            // 0x80 is an indefinite length, which DER does not permit.
            0x81..=0x83 => {
                let (bytes, after) = rest.split_at_checked(usize::from(first - 0x80))?;
                rest = after;
                bytes.iter().fold(0, |length, byte| length << 8 | usize::from(*byte))
            }
            _ => return None,
        };
        let (contents, after) = rest.split_at_checked(length)?;
        self.0 = after;
        Some((tag, contents))
    }
}

/// Parses a response and finds the certificate with this serial number, in hexadecimal.
///
/// # Errors
///
/// The error, as the end of a sentence that begins with the file name.
pub fn parse(der: &[u8], serial: &str) -> Result<Staple, &'static str> {
    let Some((status, basic)) = outer(der) else { return Err("is not an OCSP response in DER") };
    let Some(basic) = basic.filter(|_| status == [0]) else {
        return Err("is an OCSP response whose responder failed");
    };
    let Some(single) = find(basic, serial) else {
        return Err("is an OCSP response for another certificate, or for none");
    };
    if single.status != GOOD {
        return Err("is an OCSP response that reports the certificate as revoked or unknown");
    }
    let next_update = single.next_update.and_then(seconds);
    // Without it, newer information is always available (RFC 6960 §4.2.2.1), so the response cannot be stapled.
    let next_update = next_update.ok_or("is an OCSP response without the time of the next update")?;
    Ok(Staple { der: der.to_vec(), next_update })
}

/// The status of a response, and its basic response, if present.
fn outer(der: &[u8]) -> Option<(&[u8], Option<&[u8]>)> {
    let mut whole = Der(der);
    let mut answer = Der(whole.take(SEQUENCE)?);
    if !whole.0.is_empty() {
        return None;
    }
    let status = answer.take(ENUMERATED)?;
    let Some(bytes) = answer.optional(TAG_0) else { return Some((status, None)) };
    let mut bytes = Der(Der(bytes).take(SEQUENCE)?);
    (bytes.take(OBJECT)? == BASIC).then_some(())?;
    Some((status, Some(bytes.take(OCTETS)?)))
}

struct Single<'a> {
    status: u8,
    next_update: Option<&'a [u8]>,
}

/// The entry of a basic response for one certificate.
fn find<'a>(basic: &'a [u8], serial: &str) -> Option<Single<'a>> {
    let mut data = Der(Der(Der(basic).take(SEQUENCE)?).take(SEQUENCE)?);
    data.optional(TAG_0);
    // The responder, by name or by key.
    data.any().filter(|(tag, _)| [TAG_1, 0xa2].contains(tag))?;
    data.take(TIME)?;
    let mut responses = Der(data.take(SEQUENCE)?);
    while let Some(response) = responses.take(SEQUENCE) {
        let mut response = Der(response);
        let mut certificate = Der(response.take(SEQUENCE)?);
        certificate.take(SEQUENCE)?;
        certificate.take(OCTETS)?;
        certificate.take(OCTETS)?;
        let number = certificate.take(INTEGER)?;
        let (status, _) = response.any()?;
        response.take(TIME)?;
        let next_update = response.optional(TAG_0).and_then(|next| Der(next).take(TIME));
        if is_number(number, serial) {
            return Some(Single { status, next_update });
        }
    }
    None
}

/// Whether these bytes are the number that `written` gives in hexadecimal.
fn is_number(bytes: &[u8], written: &str) -> bool {
    let shown: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    let bare = |text: &str| text.trim_start_matches('0').to_ascii_lowercase();
    bare(&shown) == bare(written)
}

/// `YYYYMMDDHHMMSSZ`, the only form that DER permits here (RFC 5280 §4.1.2.5.2).
fn seconds(time: &[u8]) -> Option<i64> {
    let text = std::str::from_utf8(time).ok().filter(|text| text.len() == 15 && text.is_ascii())?;
    let rfc3339 =
        format!("{}-{}-{}T{}:{}:{}", &text[..4], &text[4..6], &text[6..8], &text[8..10], &text[10..12], &text[12..]);
    let time = humantime::parse_rfc3339(&rfc3339).ok()?;
    i64::try_from(time.duration_since(std::time::SystemTime::UNIX_EPOCH).ok()?.as_secs()).ok()
}

#[cfg(test)]
pub(in crate::client) mod tests {
    use super::*;
    use proptest::prelude::*;

    fn element(tag: u8, parts: &[&[u8]]) -> Vec<u8> {
        let contents = parts.concat();
        let length = u16::try_from(contents.len()).expect("a short element").to_be_bytes();
        [&[tag, 0x82][..], &length, &contents].concat()
    }

    /// An unsigned response for the certificate with this serial number.
    pub fn answer(serial: &[u8], status: u8, next_update: &str) -> Vec<u8> {
        let empty = element(SEQUENCE, &[]);
        let id =
            element(SEQUENCE, &[&empty, &element(OCTETS, &[]), &element(OCTETS, &[]), &element(INTEGER, &[serial])]);
        let this = element(TIME, &[b"20260101000000Z"]);
        let next = element(TAG_0, &[&element(TIME, &[next_update.as_bytes()])]);
        let single = element(SEQUENCE, &[&id, &element(status, &[]), &this, &next]);
        let data = element(SEQUENCE, &[&element(TAG_1, &[&empty]), &this, &element(SEQUENCE, &[&single])]);
        let basic = element(SEQUENCE, &[&data, &empty, &element(0x03, &[&[0]])]);
        let bytes = element(SEQUENCE, &[&element(OBJECT, &[BASIC]), &element(OCTETS, &[&basic])]);
        element(SEQUENCE, &[&element(ENUMERATED, &[&[0]]), &element(TAG_0, &[&bytes])])
    }

    #[test]
    fn an_answer_is_known_by_its_certificate_and_ends_with_its_time() {
        let good = answer(&[0x00, 0xab, 0xcd], GOOD, "20261231235959Z");
        assert_eq!(parse(&good, "ABCD").map(|staple| staple.next_update), Ok(1_798_761_599));
        assert_eq!(parse(&good, "ABCE"), Err("is an OCSP response for another certificate, or for none"));
        let revoked = answer(&[0x01], TAG_1, "20261231235959Z");
        assert_eq!(
            parse(&revoked, "01"),
            Err("is an OCSP response that reports the certificate as revoked or unknown")
        );
        let timeless = answer(&[0x01], GOOD, "tomorrow");
        assert_eq!(parse(&timeless, "01"), Err("is an OCSP response without the time of the next update"));
        assert_eq!(parse(b"\x30\x03\x0a\x01\x06", "01"), Err("is an OCSP response whose responder failed"));
        assert_eq!(parse(b"-----BEGIN", "01"), Err("is not an OCSP response in DER"));
        assert_eq!(parse(&[&good[..], b"\n"].concat(), "ABCD"), Err("is not an OCSP response in DER"));
    }

    proptest! {
        #[test]
        fn anything_may_stand_in_the_file(bytes in prop::collection::vec(any::<u8>(), 0..200), cut in 0usize..300) {
            let _ = parse(&bytes, "01");
            let good = answer(&[1], GOOD, "20261231235959Z");
            let cut = cut.min(good.len() - 1);
            prop_assert!(parse(&good[..cut], "01").is_err());
        }
    }
}
