//! A request header: what is let through is what any careful reader takes it for, however the bytes arrive.

use forebay::client::head::{HeadLimits, Scanner, Target, in_origin_form, inspect};
use forebay::framing::Body;

use super::mutate;

const WORDS: &[&str] = &[
    "GET ",
    "POST ",
    "OPTIONS ",
    "CONNECT ",
    " HTTP/1.1\r\n",
    " HTTP/1.0\r\n",
    " HTTP/2.0\r\n",
    "\r\n",
    "\n",
    "\r",
    "\r\n\r\n",
    "Host: ",
    "host:",
    "Content-Length: ",
    "Transfer-Encoding: chunked\r\n",
    "Transfer-Encoding: gzip, chunked\r\n",
    "Connection: ",
    "Upgrade: websocket\r\n",
    ": ",
    " :",
    "http://a/",
    "https://[::1]:80/",
    "*",
    "%2e%2e",
    "/../",
    "?",
    "#",
    "@",
    "18446744073709551615",
    "999999999999999999",
    "+1",
    "0x10",
    "1, 1",
    "\t",
    " ",
    "\u{b}",
    "\u{e9}",
];

const LIMITS: HeadLimits = HeadLimits { fields: 100, bytes: 16 * 1024 };

#[test]
fn a_request_header_is_read_as_any_careful_reader_reads_it() {
    mutate::explore("head", WORDS, check);
}

fn check(bytes: &[u8]) {
    let whole = Scanner::default().scan(bytes, LIMITS);
    // However it is cut into pieces, the end is found at the same byte, or nothing is let through either way.
    for pieces in [1, 2, 7, 1000] {
        let found = scan_in_pieces(bytes, pieces);
        match whole {
            Ok(end) => assert_eq!(found.ok(), Some(end), "in pieces of {pieces}"),
            Err(_) => assert!(found.is_err(), "refused as a whole and not in pieces of {pieces}"),
        }
    }
    let Ok(Some(end)) = whole else { return };
    assert!(end <= LIMITS.bytes);
    // `forebay` reads each of these of headers that were refused as well.
    let header = &bytes[..end];
    forebay::client::head::request_line(header);
    forebay::client::head::wants_json(header);
    if let Ok(head) = inspect(header) {
        let seen = Seen::of(header).unwrap_or_else(|| panic!("let through: {:?}", String::from_utf8_lossy(header)));
        seen.agrees(head.body);
        if let Target::Absolute { names_host } = head.target {
            let formed = in_origin_form(header, names_host);
            let again = Seen::of(&formed).unwrap_or_else(|| panic!("formed: {:?}", String::from_utf8_lossy(&formed)));
            seen.is_formed(&again, names_host);
            let once_more = inspect(&formed).map(|formed| (formed.body, formed.closes, formed.target));
            assert_eq!(once_more, Ok((head.body, head.closes, Target::Origin)));
        }
    }
}

/// Where the header ends for one who is shown so many bytes more at a time.
fn scan_in_pieces(bytes: &[u8], size: usize) -> Result<Option<usize>, ()> {
    let mut scanner = Scanner::default();
    let mut there = 0;
    while there < bytes.len() {
        there = (there + size).min(bytes.len());
        if let Some(end) = scanner.scan(&bytes[..there], LIMITS).map_err(drop)? {
            return Ok(Some(end));
        }
    }
    Ok(None)
}

/// A header as a reader sees it that was written for this test alone, after RFC 9112 and without any leniency.
struct Seen<'h> {
    method: &'h str,
    target: &'h str,
    minor: u8,
    fields: Vec<(&'h str, &'h [u8])>,
}

impl<'h> Seen<'h> {
    fn of(header: &'h [u8]) -> Option<Seen<'h>> {
        let mut lines = Vec::new();
        let mut rest = header;
        while let Some(at) = rest.windows(2).position(|pair| pair == b"\r\n") {
            lines.push(&rest[..at]);
            rest = &rest[at + 2..];
        }
        let ([first, fields @ .., last], true) = (lines.as_slice(), rest.is_empty()) else { return None };
        let mut words = std::str::from_utf8(first).ok()?.split(' ');
        let (method, target, version) = (words.next()?, words.next()?, words.next()?);
        let minor = match version {
            "HTTP/1.1" => 1,
            "HTTP/1.0" => 0,
            _ => return None,
        };
        let sound = last.is_empty() && words.next().is_none() && is_token(method) && !target.is_empty();
        let fields = fields.iter().map(|line| field(line)).collect::<Option<Vec<_>>>()?;
        sound.then_some(Seen { method, target, minor, fields })
    }

    fn values(&self, name: &str) -> Vec<&'h [u8]> {
        self.fields.iter().filter(|(found, _)| found.eq_ignore_ascii_case(name)).map(|(_, value)| *value).collect()
    }

    /// Whether a body that ends so is the one that this header announces.
    fn agrees(&self, body: Body) {
        let (lengths, codings) = (self.values("content-length"), self.values("transfer-encoding"));
        match body {
            Body::None => assert!(lengths.is_empty() && codings.is_empty()),
            Body::Length(length) => {
                assert!(codings.is_empty() && lengths.len() == 1);
                let digits = std::str::from_utf8(lengths[0]).expect("digits");
                assert!(digits.bytes().all(|digit| digit.is_ascii_digit()), "{digits}");
                assert_eq!(digits.parse(), Ok(length));
            }
            Body::Chunked => {
                assert!(lengths.is_empty() && self.minor == 1);
                assert!(codings.len() == 1 && codings[0].eq_ignore_ascii_case(b"chunked"));
            }
            Body::UntilEnd => panic!("no request over HTTP/1 ends with its connection"),
        }
        let hosts = self.values("host");
        assert!(hosts.len() == 1 || hosts.is_empty() && self.minor == 0, "{hosts:?}");
        assert!(hosts.iter().all(|host| !host.is_empty() && host.iter().all(u8::is_ascii_graphic)), "{hosts:?}");
        assert!(!["CONNECT", "TRACE"].contains(&self.method));
        // What comes next in the way of a request takes it as well.
        self.target.parse::<http::Uri>().expect("a target that a Uri can hold");
        self.method.parse::<http::Method>().expect("a method");
        for (name, value) in &self.fields {
            name.parse::<http::HeaderName>().expect("a name");
            http::HeaderValue::from_bytes(value).expect("a value");
        }
    }

    /// Whether `formed` is this header with its target in origin form (RFC 9112 §3.2.1), and a host in any case.
    fn is_formed(&self, formed: &Seen<'_>, names_host: bool) {
        let (_, rest) = self.target.split_once("://").expect("an absolute target");
        let at = rest.find(['/', '?']).unwrap_or(rest.len());
        let (authority, path) = rest.split_at(at);
        let path = match path {
            "" if self.method == "OPTIONS" => "*".to_owned(),
            _ if path.starts_with('/') => path.to_owned(),
            _ => format!("/{path}"),
        };
        assert_eq!((formed.method, formed.minor, formed.target), (self.method, self.minor, path.as_str()));
        let mut fields = self.fields.clone();
        if !names_host {
            fields.insert(0, ("Host", authority.as_bytes()));
        }
        assert_eq!(formed.fields, fields);
    }
}

fn field(line: &[u8]) -> Option<(&str, &[u8])> {
    let colon = line.iter().position(|&byte| byte == b':')?;
    let name = std::str::from_utf8(&line[..colon]).ok().filter(|name| is_token(name))?;
    let value = line[colon + 1..].trim_ascii();
    let sound = value.iter().all(|&byte| byte == b'\t' || byte >= b' ' && byte != 0x7f);
    sound.then_some((name, value))
}

fn is_token(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte))
}
