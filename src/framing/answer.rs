//! How the body of an answer is marked off: where it comes from, and where it goes to.
//!
//! Pingora reads the answers of endpoints on HTTP/1. What is decided here is what it really does (its `v1::client` and
//! `v1::common`): it goes by the last word of the last `Transfer-Encoding`, reads to the end of the connection whatever
//! is not `chunked` by that, and has taken away a length beside a coding. Where that is one reading of several, or
//! leaves a body that the client could not read, the answer is faulty; all others are framed anew for their client.

use http::{HeaderValue, Version, header};
use pingora::Result;
use pingora::http::ResponseHeader;

use super::{Body, Coding, Length, Said};

/// How an answer is framed at its source and for its client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Framed {
    /// How its body comes.
    pub read: Body,
    /// How its body leaves.
    pub write: Body,
    /// The `Content-Length` for the client. Where no body follows, it is the length that the body would have (RFC 9110
    /// §8.6).
    pub length: Option<u64>,
}

/// Why an answer cannot be passed on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Its lengths differ, or one of them is not a number.
    Length,
    /// Its body has a coding that the client did not ask for, or that readers understand differently.
    Coding,
    /// It switches to another protocol (101) in a version that does not know of it.
    Switch,
}

impl Fault {
    /// What is wrong, for a log.
    pub fn words(self) -> &'static str {
        match self {
            Fault::Length => "its Content-Length is not a number, or more than one",
            Fault::Coding => "its Transfer-Encoding is not `chunked`, or unclear",
            Fault::Switch => "it switches protocols, which only HTTP/1.1 can",
        }
    }
}

/// Whether there is no body after such a header, whatever it says (RFC 9112 §6.3): the request had the method HEAD, or
/// it is the status that says so.
pub fn is_bodiless(head: bool, status: u16) -> bool {
    head || matches!(status, 100..=199 | 204 | 304)
}

/// How an answer is framed that comes over the version `from` and whose header says this, for a client of the version
/// `to`. `head`: the request had the method HEAD.
///
/// # Errors
///
/// The answer cannot be passed on; nothing of it must reach the client.
pub fn frame(head: bool, status: u16, from: Version, said: &Said, to: Version) -> Result<Framed, Fault> {
    if status == 101 && from != Version::HTTP_11 {
        // RFC 9110 §7.8, RFC 9113 §8.6.
        return Err(Fault::Switch);
    }
    let length = match said.length {
        // A coding overrides it (RFC 9112 §6.3).
        _ if said.coding != Coding::Absent && from != Version::HTTP_2 => None,
        Length::Absent => None,
        Length::One(length) | Length::Repeated(length) => Some(length),
        Length::Faulty => return Err(Fault::Length),
    };
    if is_bodiless(head, status) {
        // RFC 9110 §8.6: neither has a length, not even one that there would have been.
        let length = length.filter(|_| !matches!(status, 100..=199 | 204));
        return Ok(Framed { read: Body::None, write: Body::None, length });
    }
    let read = match (said.coding, length) {
        (Coding::Absent, Some(length)) => Body::Length(length),
        (Coding::Absent, None) => Body::UntilEnd,
        // RFC 9113 §8.2.2.
        _ if from == Version::HTTP_2 => return Err(Fault::Coding),
        (Coding::Plain, _) => Body::UntilEnd,
        (Coding::Chunked, _) => Body::Chunked,
        // The client does not know of the coding, and would take the coded bytes for the plain ones.
        (Coding::ChunkedUnclearly | Coding::Other, _) => return Err(Fault::Coding),
    };
    let write = match read {
        Body::None | Body::Length(_) => read,
        Body::Chunked | Body::UntilEnd if to == Version::HTTP_11 => Body::Chunked,
        // HTTP/1.0 knows no chunks, and HTTP/2 has its own.
        Body::Chunked | Body::UntilEnd => Body::UntilEnd,
    };
    Ok(Framed { read, write, length })
}

impl Framed {
    /// The same for an answer that ends with its header: of a body whose length was not said it is known now.
    pub fn ended(self) -> Framed {
        match self.write {
            Body::Chunked | Body::UntilEnd => Framed { write: Body::Length(0), length: Some(0), ..self },
            Body::None | Body::Length(_) => self,
        }
    }

    /// Whether the answer is whole once its header is here.
    pub fn is_whole(&self) -> bool {
        matches!(self.read, Body::None | Body::Length(0))
    }

    /// Has the header, which `said` this, say how the body leaves, and nothing else.
    ///
    /// # Errors
    ///
    /// None that can be met: the values are valid.
    pub fn apply(&self, said: &Said, header: &mut ResponseHeader) -> Result<()> {
        let says_length = match said.length {
            Length::Absent => None,
            Length::One(length) => Some(Some(length)),
            Length::Repeated(_) | Length::Faulty => Some(None),
        };
        // Mostly it says so already, and costs nothing.
        match self.length {
            Some(length) if says_length != Some(Some(length)) => {
                header.insert_header(header::CONTENT_LENGTH, length)?
            }
            None if says_length.is_some() => drop(header.remove_header(&header::CONTENT_LENGTH)),
            _ => {}
        }
        let says_chunked = said.coding == Coding::Chunked && said.coding_items == 1 && !said.coding_differs;
        match self.write {
            Body::Chunked if !says_chunked => {
                header.insert_header(header::TRANSFER_ENCODING, HeaderValue::from_static("chunked"))?;
            }
            Body::Chunked => {}
            _ if said.coding != Coding::Absent => drop(header.remove_header(&header::TRANSFER_ENCODING)),
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

    /// How a body is framed, in a word: `-` there is none, a number its length, `chunked`, `end`.
    fn word(body: Body) -> String {
        match body {
            Body::None => "-".to_owned(),
            Body::Length(length) => length.to_string(),
            Body::Chunked => "chunked".to_owned(),
            Body::UntilEnd => "end".to_owned(),
        }
    }

    /// An answer: its version, its status and its fields (`l` a length, `c` a coding), and what becomes of it.
    struct Row(Version, u16, &'static [(char, &'static str)], Expected);

    enum Expected {
        /// To GET: how it comes, and how it leaves for clients of HTTP/1.0, HTTP/1.1 and HTTP/2. To HEAD: its
        /// `Content-Length`.
        Passes(&'static str, [&'static str; 3], Option<u64>),
        /// A fault of both; or one of GET, where HEAD passes with this length.
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
        // A length.
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
        // No length that can be believed.
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
        // Nothing: the end of the connection, or of the stream.
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
        // Codings that are none.
        Row(V11, 200, &[('c', "")], Passes("end", ANY, None)),
        Row(V11, 200, &[('c', ",")], Passes("end", ANY, None)),
        Row(V11, 200, &[('c', "identity")], Passes("end", ANY, None)),
        Row(V11, 200, &[('c', "Identity")], Passes("end", ANY, None)),
        Row(V10, 200, &[('c', "identity")], Passes("end", ANY, None)),
        Row(V11, 200, &[('c', "identity"), ('l', "5")], Passes("end", ANY, None)),
        Row(V11, 200, &[('c', "identity"), ('c', "")], Passes("end", ANY, None)),
        // Codings that no client asked for, and chunks of which it is not clear whether they are any.
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
        // No body, whatever is said.
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
            let said = Said::of(&header(row).headers);
            for (client, to) in [V10, V11, V2].into_iter().enumerate() {
                for head in [false, true] {
                    let framed = frame(head, row.1, row.0, &said, to);
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
                    let said = Said::of(&header.headers);
                    let Ok(framed) = frame(head, row.1, row.0, &said, to) else { continue };
                    framed.apply(&said, &mut header).expect("valid values");
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
                    // What leaves is read in one way only, and as it was meant.
                    let said = Said::of(&header.headers);
                    let over = if row.1 == 101 { V11 } else { to };
                    let again = frame(head, row.1, over, &said, to).expect(&case);
                    assert_eq!((again.read, again.length), (framed.write, framed.length), "{case}");
                }
            }
        }
    }

    #[test]
    fn an_answer_that_ends_with_its_header_has_a_length() {
        for (from, to) in [(V11, V10), (V2, V11), (V2, V2)] {
            let framed = frame(false, 200, from, &Said::default(), to).expect("an answer").ended();
            assert_eq!((framed.write, framed.length), (Body::Length(0), Some(0)));
        }
        let head = frame(true, 200, V2, &Said::default(), V11).expect("an answer").ended();
        assert_eq!((head.write, head.length), (Body::None, None));
    }
}
