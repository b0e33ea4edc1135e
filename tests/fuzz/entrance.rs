//! The first bytes of a connection: the PROXY protocol and the ClientHello. They are read one by one or all at once,
//! and mean the same.

use std::net::IpAddr;

use forebay::client::hello::Reader;
use forebay::client::proxy_protocol::{Introduction, read, rule_out};

use super::mutate;

const PROXY_WORDS: &[&str] = &[
    "PROXY ",
    "TCP4 ",
    "TCP6 ",
    "UNKNOWN",
    "\r\n",
    "\n",
    " ",
    "192.0.2.1",
    "2001:db8::1",
    "::ffff:192.0.2.1",
    "65535",
    "65536",
    "00443",
    "+1",
    "\r\n\r\n\0\r\nQUIT\n",
    "\u{21}\u{11}\0\u{c}",
    "\u{20}\0\0\0",
];

#[test]
fn a_proxy_header_is_read_alike_however_its_bytes_arrive() {
    mutate::explore("proxy", PROXY_WORDS, |bytes: &[u8]| {
        let whole = read(bytes);
        for end in 0..bytes.len().min(4_200) {
            let part = read(&bytes[..end]);
            match &whole {
                // A header ends where it says, and not before.
                Ok(Some(header)) if end >= header.length => assert_eq!(part, whole, "{end} bytes"),
                Ok(_) => assert_eq!(part, Ok(None), "{end} bytes"),
                // What is wrong may be seen late; nothing is a header before.
                Err(_) => assert!(!matches!(part, Ok(Some(_))), "{end} bytes"),
            }
        }
        if let Ok(Some(header)) = whole {
            assert!(header.length <= bytes.len());
            assert!(rule_out(bytes).is_err(), "a header passes for none");
            if bytes.starts_with(b"PROXY ") {
                assert_eq!(Some(header), first_version(bytes), "{:?}", String::from_utf8_lossy(bytes));
            }
        }
    });
}

/// Version 1 as a reader takes it that was written for this test alone.
fn first_version(bytes: &[u8]) -> Option<Introduction> {
    let end = bytes.windows(2).position(|pair| pair == b"\r\n")?;
    let words: Vec<&str> = std::str::from_utf8(&bytes[..end]).ok()?.split(' ').collect();
    let length = end + 2;
    if words[1] == "UNKNOWN" {
        return Some(Introduction { length, parties: None });
    }
    let [_, family, source, target, source_port, target_port] = words[..] else { return None };
    let address = |text: &str| {
        let address: IpAddr = text.parse().ok()?;
        (address.is_ipv4() == (family == "TCP4")).then_some(address)
    };
    let port = |text: &str| text.parse::<u16>().ok().filter(|port| port.to_string() == text);
    let parties = ((address(source)?, port(source_port)?).into(), (address(target)?, port(target_port)?).into());
    matches!(family, "TCP4" | "TCP6").then_some(Introduction { length, parties: Some(parties) })
}

const HELLO_WORDS: &[&str] = &[
    "\u{16}\u{3}\u{1}\0",
    "\u{1}\0\0",
    "\0\0",
    "\0\u{10}\0",
    "\0\u{2b}\0",
    "\0\u{d}\0",
    "\u{2}h2",
    "acme-tls/1",
    "\u{7f}",
];

#[test]
fn a_client_hello_is_read_alike_however_its_bytes_arrive() {
    mutate::explore("hello", HELLO_WORDS, |bytes: &[u8]| {
        let whole = Reader::default().read(bytes);
        for size in [1, 5, 100, 1_000] {
            let mut reader = Reader::default();
            let ends = (size..bytes.len()).step_by(size).chain([bytes.len()]);
            let found = ends.map(|end| reader.read(&bytes[..end])).find(|found| !matches!(found, Ok(None)));
            assert_eq!(found.unwrap_or(Ok(None)), whole, "in pieces of {size}");
        }
        if let Ok(Some(hello)) = whole
            && let Some(name) = hello.name
        {
            assert!(!name.is_empty() && name.len() <= 255 && name.is_ascii(), "{name:?}");
            assert_eq!(name.to_ascii_lowercase(), *name);
        }
    });
}
