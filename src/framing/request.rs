//! The framing of request bodies. A request with several readings is refused.

use http::{HeaderValue, Version, header};
use pingora::http::RequestHeader;

use super::{Body, Coding, Length, LengthFields};
use crate::error::{Refusal, refusal};

/// Determines the framing of a request body from its length fields (RFC 9112 §6.3, RFC 9113 §8.1.1).
///
/// Where the RFC leaves a choice, this function makes the stricter one, since the endpoint may make the other. It
/// refuses a repeated length, a length next to a coding, and any coding in HTTP/1.0. On HTTP/2 the body ends with its
/// stream, and a `Content-Length` only announces the length.
///
/// # Errors
///
/// The refusal for the client.
pub fn read(version: Version, length_fields: &LengthFields) -> Result<Body, &'static Refusal> {
    let coded = length_fields.coding != Coding::Absent;
    if coded
        && (version != Version::HTTP_11 || length_fields.length != Length::Absent || length_fields.coding_fields > 1)
    {
        return Err(&refusal::HEADER_FRAMING);
    }
    match (length_fields.length, length_fields.coding) {
        (Length::Absent, Coding::Absent) if version == Version::HTTP_2 => Ok(Body::UntilEnd),
        (Length::Absent, Coding::Absent) => Ok(Body::None),
        (Length::One(length), Coding::Absent) => Ok(Body::Length(length)),
        (Length::Repeated(_) | Length::Faulty, Coding::Absent) => Err(&refusal::HEADER_FRAMING),
        (_, Coding::Chunked) if length_fields.coding_items == 1 => Ok(Body::Chunked),
        (_, _) => Err(&refusal::HEADER_ENCODING),
    }
}

/// The framing of a forwarded request. `version`: the version of the connection to the endpoint; `held`: the length of
/// a body that is completely buffered; `body`: the framing as received.
pub fn send(version: Version, held: Option<u64>, body: Body) -> Body {
    match (held, body) {
        // The buffered length replaces the client's length fields.
        (Some(length), _) => Body::Length(length),
        (None, Body::Chunked | Body::UntilEnd) if version == Version::HTTP_2 => Body::UntilEnd,
        (None, Body::Chunked | Body::UntilEnd) => Body::Chunked,
        (None, body) => body,
    }
}

/// Sets the length fields of a forwarded request according to `body`.
///
/// # Errors
///
/// None in practice: the values are valid.
pub fn apply(body: Body, header: &mut RequestHeader) -> Result<(), Box<pingora::Error>> {
    match body {
        Body::Length(length) => header.insert_header(header::CONTENT_LENGTH, length)?,
        Body::None | Body::Chunked | Body::UntilEnd => drop(header.remove_header(&header::CONTENT_LENGTH)),
    }
    match body {
        Body::Chunked => header.insert_header(header::TRANSFER_ENCODING, HeaderValue::from_static("chunked")),
        Body::None | Body::Length(_) | Body::UntilEnd => {
            header.remove_header(&header::TRANSFER_ENCODING);
            Ok(())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn length_fields(lengths: &[&str], codings: &[&str]) -> LengthFields {
        let mut length_fields = LengthFields::default();
        lengths.iter().for_each(|value| length_fields.add_length(value.as_bytes()));
        codings.iter().for_each(|value| length_fields.add_coding(value.as_bytes()));
        length_fields
    }

    /// The results for HTTP/1.0, HTTP/1.1 and HTTP/2.
    fn found(lengths: &[&str], codings: &[&str]) -> [Result<Body, &'static str>; 3] {
        [Version::HTTP_10, Version::HTTP_11, Version::HTTP_2]
            .map(|version| read(version, &length_fields(lengths, codings)).map_err(|refusal| refusal.reason))
    }

    #[test]
    fn a_body_ends_by_one_length_or_by_its_last_chunk() {
        let same = |body| [Ok(body); 3];
        assert_eq!(found(&[], &[]), [Ok(Body::None), Ok(Body::None), Ok(Body::UntilEnd)]);
        for length in ["0", "00", " 0 "] {
            assert_eq!(found(&[length], &[]), same(Body::Length(0)));
        }
        for length in ["12", "0012", "12\t"] {
            assert_eq!(found(&[length], &[]), same(Body::Length(12)));
        }
        for coding in ["chunked", "Chunked", "CHUNKED", " chunked "] {
            let refused = Err("header.framing");
            assert_eq!(found(&[], &[coding]), [refused, Ok(Body::Chunked), refused]);
        }
    }

    #[test]
    fn what_could_be_read_in_two_ways_is_refused() {
        let framing = [Err("header.framing"); 3];
        for lengths in
            [&["1", "1"][..], &["1, 1"], &["1", "2"], &["1, 2"], &["+1"], &["-1"], &["1 1"], &[""], &["0x1"], &["1,"]]
        {
            assert_eq!(found(lengths, &[]), framing, "{lengths:?}");
        }
        for coding in ["chunked", "gzip", "identity", ""] {
            assert_eq!(found(&["1"], &[coding]), framing, "{coding:?}");
        }
        for codings in [["chunked", "chunked"], ["gzip", "chunked"], ["", "chunked"], ["chunked", ""]] {
            assert_eq!(found(&[], &codings), framing, "{codings:?}");
        }
        let coding = [Err("header.framing"), Err("header.encoding"), Err("header.framing")];
        for codings in [
            "",
            "identity",
            "gzip",
            "gzip, chunked",
            "chunked, gzip",
            "chunked, chunked",
            ", chunked",
            "chunked,",
            "identity, chunked",
            "chunked;q=1",
            "\"chunked\"",
            "xchunked",
            "chunked x",
            "chun ked",
        ] {
            assert_eq!(found(&[], &[codings]), coding, "{codings:?}");
        }
    }

    #[test]
    fn a_request_is_framed_for_the_version_that_it_is_sent_on_with() {
        let (h1, h2) = (Version::HTTP_11, Version::HTTP_2);
        for (held, came, over_h1, over_h2) in [
            (None, Body::None, Body::None, Body::None),
            (None, Body::Length(0), Body::Length(0), Body::Length(0)),
            (None, Body::Length(5), Body::Length(5), Body::Length(5)),
            (None, Body::Chunked, Body::Chunked, Body::UntilEnd),
            (None, Body::UntilEnd, Body::Chunked, Body::UntilEnd),
            (Some(7), Body::Chunked, Body::Length(7), Body::Length(7)),
            (Some(7), Body::UntilEnd, Body::Length(7), Body::Length(7)),
            (Some(7), Body::Length(7), Body::Length(7), Body::Length(7)),
        ] {
            assert_eq!((send(h1, held, came), send(h2, held, came)), (over_h1, over_h2), "{held:?} {came:?}");
            let mut header = RequestHeader::build("PUT", b"/", None).expect("a request");
            for (name, value) in [("content-length", "9"), ("content-length", "8"), ("transfer-encoding", "gzip")] {
                header.append_header(name, value).expect("a field");
            }
            apply(over_h1, &mut header).expect("valid values");
            // `read` must understand the header as intended. Without a body, the endpoint must not wait for one.
            assert_eq!(read(h1, &LengthFields::of(&header.headers)), Ok(over_h1));
        }
    }
}
