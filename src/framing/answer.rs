//! The framing of response bodies, as received and as sent to the client.
//!
//! Pingora reads the responses of HTTP/1 endpoints. The rules here match its behaviour (`v1::client` and `v1::common`):
//! the last word of the last `Transfer-Encoding` decides, a body with any other coding than `chunked` ends with the
//! connection, and a `Content-Length` next to a coding is removed. If other readers could read the same header
//! differently, or if the client could not read the body, the response is faulty. All other responses get new framing
//! for their client.

use http::{HeaderValue, Version, header};
use pingora::Result;
use pingora::http::ResponseHeader;

use super::{Body, Coding, Length, LengthFields};

/// The framing of a response, as received and as sent to the client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Framed {
    /// Framing as received.
    pub read: Body,
    /// Framing as sent.
    pub write: Body,
    /// The `Content-Length` for the client. If no body follows, it is the length that the body would have (RFC 9110
    /// §8.6).
    pub length: Option<u64>,
}

/// The reason why a response cannot be forwarded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Its lengths differ, or one of them is not a number.
    Length,
    /// Its body has a coding that the client did not request, or that readers interpret differently.
    Coding,
    /// It switches to another protocol (101) in a version of HTTP without that status.
    Switch,
}

impl Fault {
    /// A description for the log.
    pub fn words(self) -> &'static str {
        match self {
            Fault::Length => "its Content-Length is not a number, or more than one",
            Fault::Coding => "its Transfer-Encoding is not `chunked`, or unclear",
            Fault::Switch => "it switches protocols, which only HTTP/1.1 can",
        }
    }
}

/// Whether a response has no body, whatever its header announces (RFC 9112 §6.3): the request method was HEAD, or the
/// status permits none.
pub fn is_bodiless(head: bool, status: u16) -> bool {
    head || matches!(status, 100..=199 | 204 | 304)
}

/// Determines the framing of a response, from its length fields. `from`: the version of the received response; `to`:
/// the client's version; `head`: the request method was HEAD.
///
/// # Errors
///
/// If the response cannot be forwarded. The client must receive no part of it.
pub fn frame(
    head: bool,
    status: u16,
    from: Version,
    length_fields: &LengthFields,
    to: Version,
) -> Result<Framed, Fault> {
    if status == 101 && from != Version::HTTP_11 {
        // RFC 9110 §7.8, RFC 9113 §8.6.
        return Err(Fault::Switch);
    }
    let length = match length_fields.length {
        // Transfer-Encoding overrides Content-Length (RFC 9112 §6.3).
        _ if length_fields.coding != Coding::Absent && from != Version::HTTP_2 => None,
        Length::Absent => None,
        Length::One(length) | Length::Repeated(length) => Some(length),
        Length::Faulty => return Err(Fault::Length),
    };
    if is_bodiless(head, status) {
        // RFC 9110 §8.6: 1xx and 204 have no Content-Length.
        let length = length.filter(|_| !matches!(status, 100..=199 | 204));
        return Ok(Framed { read: Body::None, write: Body::None, length });
    }
    let read = match (length_fields.coding, length) {
        (Coding::Absent, Some(length)) => Body::Length(length),
        (Coding::Absent, None) => Body::UntilEnd,
        // RFC 9113 §8.2.2.
        _ if from == Version::HTTP_2 => return Err(Fault::Coding),
        (Coding::Plain, _) => Body::UntilEnd,
        (Coding::Chunked, _) => Body::Chunked,
        // The client does not know of the coding and would read the coded bytes as content.
        (Coding::ChunkedUnclearly | Coding::Other, _) => return Err(Fault::Coding),
    };
    let write = match read {
        Body::None | Body::Length(_) => read,
        Body::Chunked | Body::UntilEnd if to == Version::HTTP_11 => Body::Chunked,
        // HTTP/1.0 has no chunks, and HTTP/2 has its own framing.
        Body::Chunked | Body::UntilEnd => Body::UntilEnd,
    };
    Ok(Framed { read, write, length })
}

impl Framed {
    /// The framing of a response that ended with its header. A body of unknown length now has length 0.
    pub fn ended(self) -> Framed {
        match self.write {
            Body::Chunked | Body::UntilEnd => Framed { write: Body::Length(0), length: Some(0), ..self },
            Body::None | Body::Length(_) => self,
        }
    }

    /// Whether the response is complete with its header.
    pub fn is_whole(&self) -> bool {
        matches!(self.read, Body::None | Body::Length(0))
    }

    /// Sets the length fields of `header`, whose received fields were `length_fields`, according to `write`.
    ///
    /// # Errors
    ///
    /// None in practice: the values are valid.
    pub fn apply(&self, length_fields: &LengthFields, header: &mut ResponseHeader) -> Result<()> {
        let says_length = match length_fields.length {
            Length::Absent => None,
            Length::One(length) => Some(Some(length)),
            Length::Repeated(_) | Length::Faulty => Some(None),
        };
        // Usually the header has this length already.
        match self.length {
            Some(length) if says_length != Some(Some(length)) => {
                header.insert_header(header::CONTENT_LENGTH, length)?
            }
            None if says_length.is_some() => drop(header.remove_header(&header::CONTENT_LENGTH)),
            _ => {}
        }
        let says_chunked =
            length_fields.coding == Coding::Chunked && length_fields.coding_items == 1 && !length_fields.coding_differs;
        match self.write {
            Body::Chunked if !says_chunked => {
                header.insert_header(header::TRANSFER_ENCODING, HeaderValue::from_static("chunked"))?;
            }
            Body::Chunked => {}
            _ if length_fields.coding != Coding::Absent => drop(header.remove_header(&header::TRANSFER_ENCODING)),
            _ => {}
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const V10: Version = Version::HTTP_10;
    const V11: Version = Version::HTTP_11;
    const V2: Version = Version::HTTP_2;

    /// The framing in a word: `-` for no body, a number for a length, `chunked`, `end`.
    fn word(body: Body) -> String {
        match body {
            Body::None => "-".to_owned(),
            Body::Length(length) => length.to_string(),
            Body::Chunked => "chunked".to_owned(),
            Body::UntilEnd => "end".to_owned(),
        }
    }

    /// A response: its version, its status, its fields (`l` for a length, `c` for a coding), and the expected result.
    struct Row(Version, u16, &'static [(char, &'static str)], Expected);

    enum Expected {
        /// For GET: the framing as received, and as sent to clients of HTTP/1.0, HTTP/1.1 and HTTP/2. For HEAD: the
        /// `Content-Length`.
        Passes(&'static str, [&'static str; 3], Option<u64>),
        /// A fault for GET and HEAD; `FaultyBody` is a fault for GET only.
        Faulty(Fault),
        FaultyBody(Fault),
    }

    use Expected::{Faulty, FaultyBody, Passes};
    use Fault::{Coding as BadCoding, Length as BadLength};

    const ANY: [&str; 3] = ["end", "chunked", "end"];
    const FIVE: [&str; 3] = ["5", "5", "5"];
    const ZERO: [&str; 3] = ["0", "0", "0"];
    const NO: [&str; 3] = ["-", "-", "-"];

    #[rustfmt::skip]
    const TABLE: &[Row] = &[
        // A valid length.
        Row(V11, 200, &[('l', "5")], Passes("5", FIVE, Some(5))),
        Row(V10, 200, &[('l', "5")], Passes("5", FIVE, Some(5))),
        Row(V2, 200, &[('l', "5")], Passes("5", FIVE, Some(5))),
        Row(V11, 200, &[('l', "0")], Passes("0", ZERO, Some(0))),
        Row(V11, 200, &[('l', "005")], Passes("5", FIVE, Some(5))),
        Row(V11, 200, &[('l', "5, 5")], Passes("5", FIVE, Some(5))),
        Row(V11, 200, &[('l', "5"), ('l', "5")], Passes("5", FIVE, Some(5))),
        Row(V11, 200, &[('l', "5, 5"), ('l', "05")], Passes("5", FIVE, Some(5))),
        Row(V2, 200, &[('l', "5"), ('l', "5")], Passes("5", FIVE, Some(5))),
        Row(V11, 404, &[('l', "5")], Passes("5", FIVE, Some(5))),
        Row(V11, 206, &[('l', "5")], Passes("5", FIVE, Some(5))),
        Row(V11, 205, &[('l', "0")], Passes("0", ZERO, Some(0))),
        Row(V11, 301, &[('l', "5")], Passes("5", FIVE, Some(5))),
        Row(V11, 999, &[('l', "5")], Passes("5", FIVE, Some(5))),
        // An invalid length.
        Row(V11, 200, &[('l', "5, 6")], Faulty(BadLength)),
        Row(V11, 200, &[('l', "5"), ('l', "6")], Faulty(BadLength)),
        Row(V2, 200, &[('l', "5"), ('l', "6")], Faulty(BadLength)),
        Row(V11, 200, &[('l', "")], Faulty(BadLength)),
        Row(V11, 200, &[('l', "5,")], Faulty(BadLength)),
        Row(V11, 200, &[('l', "+5")], Faulty(BadLength)),
        Row(V11, 200, &[('l', "-5")], Faulty(BadLength)),
        Row(V11, 200, &[('l', "5 5")], Faulty(BadLength)),
        Row(V11, 200, &[('l', "0x5")], Faulty(BadLength)),
        Row(V11, 200, &[('l', "5.0")], Faulty(BadLength)),
        Row(V11, 200, &[('l', "five")], Faulty(BadLength)),
        Row(V11, 200, &[('l', "99999999999999999999")], Faulty(BadLength)),
        Row(V11, 204, &[('l', "5"), ('l', "6")], Faulty(BadLength)),
        Row(V11, 304, &[('l', "x")], Faulty(BadLength)),
        // No field: the body ends with the connection or the stream.
        Row(V11, 200, &[], Passes("end", ANY, None)),
        Row(V10, 200, &[], Passes("end", ANY, None)),
        Row(V2, 200, &[], Passes("end", ANY, None)),
        Row(V11, 500, &[], Passes("end", ANY, None)),
        Row(V11, 205, &[], Passes("end", ANY, None)),
        // Chunks.
        Row(V11, 200, &[('c', "chunked")], Passes("chunked", ANY, None)),
        Row(V11, 200, &[('c', "Chunked")], Passes("chunked", ANY, None)),
        Row(V11, 200, &[('c', "CHUNKED ")], Passes("chunked", ANY, None)),
        Row(V11, 200, &[('c', ", chunked")], Passes("chunked", ANY, None)),
        Row(V11, 200, &[('c', ""), ('c', "chunked")], Passes("chunked", ANY, None)),
        Row(V11, 200, &[('c', "identity, chunked")], Passes("chunked", ANY, None)),
        Row(V11, 200, &[('c', "identity"), ('c', "chunked")], Passes("chunked", ANY, None)),
        Row(V10, 200, &[('c', "chunked")], Passes("chunked", ANY, None)),
        Row(V11, 500, &[('c', "chunked")], Passes("chunked", ANY, None)),
        Row(V11, 205, &[('c', "chunked")], Passes("chunked", ANY, None)),
        Row(V11, 200, &[('c', "chunked"), ('l', "5")], Passes("chunked", ANY, None)),
        Row(V11, 200, &[('l', "5, 6"), ('c', "chunked")], Passes("chunked", ANY, None)),
        // Values that name no coding.
        Row(V11, 200, &[('c', "")], Passes("end", ANY, None)),
        Row(V11, 200, &[('c', ",")], Passes("end", ANY, None)),
        Row(V11, 200, &[('c', "identity")], Passes("end", ANY, None)),
        Row(V11, 200, &[('c', "Identity")], Passes("end", ANY, None)),
        Row(V10, 200, &[('c', "identity")], Passes("end", ANY, None)),
        Row(V11, 200, &[('c', "identity"), ('l', "5")], Passes("end", ANY, None)),
        Row(V11, 200, &[('c', "identity"), ('c', "")], Passes("end", ANY, None)),
        // Codings that the client did not request, and unclear chunks.
        Row(V11, 200, &[('c', "gzip")], FaultyBody(BadCoding)),
        Row(V11, 200, &[('c', "gzip, chunked")], FaultyBody(BadCoding)),
        Row(V11, 200, &[('c', "gzip"), ('c', "chunked")], FaultyBody(BadCoding)),
        Row(V11, 200, &[('c', "chunked, gzip")], FaultyBody(BadCoding)),
        Row(V11, 200, &[('c', "chunked"), ('c', "gzip")], FaultyBody(BadCoding)),
        Row(V11, 200, &[('c', "chunked, chunked")], FaultyBody(BadCoding)),
        Row(V11, 200, &[('c', "chunked"), ('c', "chunked")], FaultyBody(BadCoding)),
        Row(V11, 200, &[('c', "chunked,")], FaultyBody(BadCoding)),
        Row(V11, 200, &[('c', "chunked"), ('c', "")], FaultyBody(BadCoding)),
        Row(V11, 200, &[('c', "chunked, identity")], FaultyBody(BadCoding)),
        Row(V11, 200, &[('c', "chunked;q=1")], FaultyBody(BadCoding)),
        Row(V11, 200, &[('c', "\"chunked\"")], FaultyBody(BadCoding)),
        Row(V11, 200, &[('c', "xchunked")], FaultyBody(BadCoding)),
        Row(V11, 200, &[('c', "chunked x")], FaultyBody(BadCoding)),
        Row(V11, 200, &[('c', "gzip"), ('l', "5")], FaultyBody(BadCoding)),
        Row(V10, 200, &[('c', "deflate")], FaultyBody(BadCoding)),
        Row(V2, 200, &[('c', "chunked")], FaultyBody(BadCoding)),
        Row(V2, 200, &[('c', "identity")], FaultyBody(BadCoding)),
        // No body, whatever the fields announce.
        Row(V11, 204, &[], Passes("-", NO, None)),
        Row(V11, 204, &[('l', "5")], Passes("-", NO, None)),
        Row(V11, 204, &[('l', "0")], Passes("-", NO, None)),
        Row(V11, 204, &[('c', "chunked")], Passes("-", NO, None)),
        Row(V11, 204, &[('c', "gzip")], Passes("-", NO, None)),
        Row(V2, 204, &[('l', "5")], Passes("-", NO, None)),
        Row(V11, 304, &[], Passes("-", NO, None)),
        Row(V11, 304, &[('l', "5")], Passes("-", NO, Some(5))),
        Row(V11, 304, &[('l', "5"), ('l', "5")], Passes("-", NO, Some(5))),
        Row(V11, 304, &[('c', "chunked")], Passes("-", NO, None)),
        Row(V11, 304, &[('c', "chunked"), ('l', "5")], Passes("-", NO, None)),
        Row(V2, 304, &[('l', "5")], Passes("-", NO, Some(5))),
        Row(V11, 100, &[('l', "5")], Passes("-", NO, None)),
        Row(V11, 103, &[('c', "chunked")], Passes("-", NO, None)),
        Row(V11, 101, &[('l', "5"), ('c', "chunked")], Passes("-", NO, None)),
        Row(V11, 199, &[], Passes("-", NO, None)),
        Row(V10, 101, &[], Faulty(Fault::Switch)),
        Row(V2, 101, &[], Faulty(Fault::Switch)),
    ];

    fn header(row: &Row) -> ResponseHeader {
        let mut header = ResponseHeader::build(row.1, None).expect("a header");
        for (kind, value) in row.2 {
            let name = if *kind == 'l' { header::CONTENT_LENGTH } else { header::TRANSFER_ENCODING };
            header.append_header(name, HeaderValue::from_bytes(value.as_bytes()).expect("a value")).expect("a field");
        }
        header
    }

    /// The values of a field, joined.
    fn values(header: &ResponseHeader, name: http::HeaderName) -> Vec<String> {
        let values = header.headers.get_all(name).iter();
        values.map(|value| String::from_utf8_lossy(value.as_bytes()).into_owned()).collect()
    }

    #[test]
    fn each_answer_is_framed_for_each_client_or_is_faulty() {
        assert!(TABLE.len() >= 60, "{} answers", TABLE.len());
        for (number, row) in TABLE.iter().enumerate() {
            let length_fields = LengthFields::of(&header(row).headers);
            for (client, to) in [V10, V11, V2].into_iter().enumerate() {
                for head in [false, true] {
                    let framed = frame(head, row.1, row.0, &length_fields, to);
                    let case = format!("row {number}: {:?} {} {:?} to {to:?}, HEAD: {head}", row.0, row.1, row.2);
                    match &row.3 {
                        Faulty(fault) => assert_eq!(framed, Err(*fault), "{case}"),
                        FaultyBody(fault) if !head => assert_eq!(framed, Err(*fault), "{case}"),
                        FaultyBody(_) => {
                            let none = framed.expect(&case);
                            assert_eq!((none.read, none.write, none.length), (Body::None, Body::None, None), "{case}");
                        }
                        Passes(_, _, length) if head => {
                            let none = framed.expect(&case);
                            assert_eq!(
                                (none.read, none.write, none.length),
                                (Body::None, Body::None, *length),
                                "{case}"
                            );
                        }
                        Passes(read, write, _) => {
                            let framed = framed.expect(&case);
                            assert_eq!((&*word(framed.read), &*word(framed.write)), (*read, write[client]), "{case}");
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn the_header_says_how_the_body_leaves_and_nothing_else() {
        for row in TABLE {
            for to in [V10, V11, V2] {
                for head in [false, true] {
                    let mut header = header(row);
                    let length_fields = LengthFields::of(&header.headers);
                    let Ok(framed) = frame(head, row.1, row.0, &length_fields, to) else { continue };
                    framed.apply(&length_fields, &mut header).expect("valid values");
                    let case = format!("{:?} {} {:?} to {to:?}, HEAD: {head}", row.0, row.1, row.2);
                    let codings = values(&header, header::TRANSFER_ENCODING);
                    let lengths = values(&header, header::CONTENT_LENGTH);
                    let lengths: Vec<u64> = lengths.iter().map(|length| length.parse().expect(&case)).collect();
                    match framed.write {
                        Body::Chunked => {
                            assert_eq!((codings.len(), lengths.len()), (1, 0), "{case}");
                            assert_eq!(codings[0].trim(), "chunked", "{case}");
                        }
                        Body::Length(length) => assert_eq!((codings.len(), lengths), (0, vec![length]), "{case}"),
                        Body::UntilEnd => assert_eq!((codings.len(), lengths.len()), (0, 0), "{case}"),
                        Body::None => {
                            assert_eq!(codings.len(), 0, "{case}");
                            assert_eq!(lengths, Vec::from_iter(framed.length), "{case}");
                        }
                    }
                    // The sent header has one reading only, the intended one.
                    let length_fields = LengthFields::of(&header.headers);
                    let over = if row.1 == 101 { V11 } else { to };
                    let again = frame(head, row.1, over, &length_fields, to).expect(&case);
                    assert_eq!((again.read, again.length), (framed.write, framed.length), "{case}");
                }
            }
        }
    }

    #[test]
    fn an_answer_that_ends_with_its_header_has_a_length() {
        for (from, to) in [(V11, V10), (V2, V11), (V2, V2)] {
            let framed = frame(false, 200, from, &LengthFields::default(), to).expect("an answer").ended();
            assert_eq!((framed.write, framed.length), (Body::Length(0), Some(0)));
        }
        let head = frame(true, 200, V2, &LengthFields::default(), V11).expect("an answer").ended();
        assert_eq!((head.write, head.length), (Body::None, None));
    }
}
