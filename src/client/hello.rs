//! The ClientHello: a TLS client's first message, parsed before any TLS library reads a byte (RFC 8446 §4.1.2, RFC 5246
//! §7.4.1.2).
//!
//! The server name decides whether a connection is passed through, refused or served, and with which certificates; the
//! client's algorithms decide between several certificates. [`Reader`] collects the message from its records and knows
//! no socket. Any peer can send these bytes, so it reads no more than [`HELLO_BYTES_MAX`].

/// Maximum length of a ClientHello, in bytes. One with a post-quantum key share has about 1,800.
pub const HELLO_BYTES_MAX: usize = 16 << 10;
/// Maximum length of the records of one ClientHello, in bytes: enough for records of a few bytes each.
pub const RECORDS_BYTES_MAX: usize = 32 << 10;

const RECORD_HEADER_BYTES: usize = 5;
const MESSAGE_HEADER_BYTES: usize = 4;
/// The record type and the message type.
const HANDSHAKE: u8 = 22;
const CLIENT_HELLO: u8 = 1;

/// The content of a ClientHello.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Hello {
    /// The requested server name (SNI, RFC 6066 §3), in lower case and otherwise unchanged.
    pub name: Option<Box<str>>,
    /// Whether the client supports TLS 1.3.
    pub tls13: bool,
    /// Whether the client supports TLS 1.2.
    pub tls12: bool,
    /// Whether an issuer verifies the control of the name (RFC 8737): `acme-tls/1` is its only protocol.
    pub acme: bool,
    /// Whether a TLS 1.2 suite for ECDSA or EdDSA certificates is offered.
    ecdsa_suite: bool,
    /// Whether the extension for signature schemes is present.
    lists_schemes: bool,
    rsa: bool,
    p256: bool,
    p384: bool,
    p521: bool,
    ed25519: bool,
    /// The supported curves. A client without the extension accepts any (RFC 8422 §4).
    curves: Option<Curves>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Curves {
    p256: bool,
    p384: bool,
    p521: bool,
}

/// The signature algorithm of a certificate's key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum KeyKind {
    /// ECDSA with P-256.
    P256,
    /// ECDSA with P-384.
    P384,
    /// ECDSA with P-521.
    P521,
    /// Ed25519.
    Ed25519,
    /// RSA.
    Rsa,
}

impl KeyKind {
    /// The usual name.
    pub fn name(self) -> &'static str {
        match self {
            KeyKind::P256 => "ECDSA P-256",
            KeyKind::P384 => "ECDSA P-384",
            KeyKind::P521 => "ECDSA P-521",
            KeyKind::Ed25519 => "Ed25519",
            KeyKind::Rsa => "RSA",
        }
    }
}

/// The reason why the first bytes of a connection are not a ClientHello.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// An HTTP request in clear text.
    Http,
    /// Not TLS.
    NotTls,
    /// A malformed ClientHello.
    Malformed,
    /// A ClientHello that exceeds the limit.
    TooLarge,
}

impl Hello {
    /// Whether the client can verify a certificate with this kind of key.
    pub fn verifies(&self, kind: KeyKind) -> bool {
        let curves = self.curves;
        let curve = |knows: fn(Curves) -> bool| curves.is_none_or(knows);
        let any_ecdsa = self.p256 || self.p384 || self.p521;
        // In TLS 1.3, a scheme includes its curve; before, the scheme names only the hash, and another extension the
        // curves.
        let ecdsa = |scheme: bool, curve: bool| {
            (self.tls13 && scheme) || (self.tls12 && any_ecdsa && self.ecdsa_suite && curve)
        };
        match kind {
            KeyKind::P256 => ecdsa(self.p256, curve(|curves| curves.p256)),
            KeyKind::P384 => ecdsa(self.p384, curve(|curves| curves.p384)),
            KeyKind::P521 => ecdsa(self.p521, curve(|curves| curves.p521)),
            KeyKind::Ed25519 => self.ed25519 && (self.tls13 || self.ecdsa_suite),
            // Before TLS 1.2 there was no such list, and all clients supported RSA.
            KeyKind::Rsa => self.rsa || !self.lists_schemes,
        }
    }
}

/// Collects a ClientHello from its records.
#[derive(Debug, Default)]
pub struct Reader {
    /// Start of the next record.
    at: usize,
    message: Vec<u8>,
}

impl Reader {
    /// Examines all `bytes` of a connection so far; later calls must extend them. `None`: more bytes are needed.
    ///
    /// # Errors
    ///
    /// A [`Fault`] as soon as it is certain, whatever bytes may follow.
    pub fn read(&mut self, bytes: &[u8]) -> Result<Option<Hello>, Fault> {
        while let Some(record) = bytes.get(self.at..) {
            let [kind, major, _, high, low, rest @ ..] = record else {
                return self.unfinished(bytes, record);
            };
            self.check_start(*kind, *major, bytes)?;
            let length = usize::from(u16::from_be_bytes([*high, *low]));
            if length == 0 || length > 1 << 14 {
                return Err(Fault::Malformed);
            }
            let Some(fragment) = rest.get(..length) else { return self.unfinished(bytes, record) };
            self.message.extend_from_slice(fragment);
            self.at += RECORD_HEADER_BYTES + length;
            if let Some(body) = self.body()? {
                return parse(body).map(Some).ok_or(Fault::Malformed);
            }
        }
        self.unfinished(bytes, &[])
    }

    /// The body of the message, if it is complete.
    fn body(&self) -> Result<Option<&[u8]>, Fault> {
        let [kind, length @ ..] = &self.message[..] else { return Ok(None) };
        if *kind != CLIENT_HELLO {
            return Err(Fault::Malformed);
        }
        let [a, b, c, body @ ..] = length else { return Ok(None) };
        let length = u32::from_be_bytes([0, *a, *b, *c]) as usize;
        if length + MESSAGE_HEADER_BYTES > HELLO_BYTES_MAX {
            return Err(Fault::TooLarge);
        }
        Ok(body.get(..length))
    }

    /// Checks an incomplete record: the bytes so far must be valid, and must not exceed the limit.
    fn unfinished(&self, bytes: &[u8], record: &[u8]) -> Result<Option<Hello>, Fault> {
        match record {
            [] => {}
            [kind] => self.check_start(*kind, 3, bytes)?,
            [kind, major, ..] => self.check_start(*kind, *major, bytes)?,
        }
        if bytes.len() >= RECORDS_BYTES_MAX { Err(Fault::TooLarge) } else { Ok(None) }
    }

    fn check_start(&self, kind: u8, major: u8, bytes: &[u8]) -> Result<(), Fault> {
        match (kind, major) {
            (HANDSHAKE, 3) => Ok(()),
            // Another record type within a ClientHello.
            _ if self.at > 0 => Err(Fault::Malformed),
            // All HTTP methods begin with a letter, and no TLS record does.
            _ if bytes.first().is_some_and(u8::is_ascii_alphabetic) => Err(Fault::Http),
            _ => Err(Fault::NotTls),
        }
    }
}

/// Parses TLS vectors from the front of bytes.
struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    fn take(&mut self, length: usize) -> Option<&'a [u8]> {
        let (head, tail) = self.0.split_at_checked(length)?;
        self.0 = tail;
        Some(head)
    }

    fn number(&mut self) -> Option<u16> {
        self.take(2).map(|bytes| u16::from_be_bytes([bytes[0], bytes[1]]))
    }

    /// Takes a vector whose length has `width` bytes.
    fn vector(&mut self, width: usize) -> Option<Input<'a>> {
        let length = self.take(width)?.iter().fold(0, |length, byte| length << 8 | usize::from(*byte));
        self.take(length).map(Input)
    }

    /// The rest as numbers of two bytes each. `None`: there are none, or a byte is left over.
    fn numbers(self) -> Option<impl Iterator<Item = u16>> {
        let whole = !self.0.is_empty() && self.0.len().is_multiple_of(2);
        whole.then(|| self.0.chunks_exact(2).map(|bytes| u16::from_be_bytes([bytes[0], bytes[1]])))
    }

    fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// Parses the body of a ClientHello. `None`: it is malformed.
fn parse(body: &[u8]) -> Option<Hello> {
    const VERSION_AND_RANDOM_BYTES: usize = 34;
    let mut input = Input(body);
    let version = u16::from_be_bytes([*body.first()?, *body.get(1)?]);
    input.take(VERSION_AND_RANDOM_BYTES)?;
    if input.vector(1)?.0.len() > 32 {
        return None;
    }
    let mut hello = Hello { tls12: version >= 0x0303, ..Hello::default() };
    hello.ecdsa_suite = input.vector(2)?.numbers()?.any(is_ecdsa);
    if input.vector(1)?.is_empty() {
        return None;
    }
    if input.is_empty() {
        return Some(hello);
    }
    let mut extensions = input.vector(2)?;
    if !input.is_empty() {
        return None;
    }
    let mut seen = Vec::new();
    while !extensions.is_empty() {
        let kind = extensions.number()?;
        // Extensions must not repeat (RFC 8446 §4.2). Two parsers could choose different names.
        if seen.contains(&kind) {
            return None;
        }
        seen.push(kind);
        extension(&mut hello, kind, extensions.vector(2)?)?;
    }
    Some(hello)
}

fn extension(hello: &mut Hello, kind: u16, mut data: Input<'_>) -> Option<()> {
    match kind {
        0 => {
            let mut list = data.vector(2)?;
            // A list with exactly one name of type host name: no other type was ever defined.
            let is_host = list.take(1)? == [0];
            let name = list.vector(2)?;
            if !is_host || !list.is_empty() || !data.is_empty() {
                return None;
            }
            hello.name = Some(host_name(name.0)?);
        }
        10 => {
            let mut curves = Curves::default();
            for curve in data.vector(2)?.numbers()? {
                match curve {
                    23 => curves.p256 = true,
                    24 => curves.p384 = true,
                    25 => curves.p521 = true,
                    _ => {}
                }
            }
            hello.curves = Some(curves);
        }
        13 => {
            hello.lists_schemes = true;
            for scheme in data.vector(2)?.numbers()? {
                match scheme {
                    0x0403 => hello.p256 = true,
                    0x0503 => hello.p384 = true,
                    0x0603 => hello.p521 = true,
                    0x0807 => hello.ed25519 = true,
                    0x0401 | 0x0501 | 0x0601 | 0x0804 | 0x0805 | 0x0806 | 0x0201 => hello.rsa = true,
                    _ => {}
                }
            }
        }
        16 => {
            let mut list = data.vector(2)?;
            let (mut count, mut acme) = (0, false);
            while !list.is_empty() {
                let protocol = list.vector(1)?;
                acme |= protocol.0 == b"acme-tls/1";
                count += 1;
            }
            hello.acme = acme && count == 1;
        }
        43 => {
            // If present, this extension alone defines the versions.
            hello.tls12 = false;
            for version in data.vector(1)?.numbers()? {
                hello.tls13 |= version == 0x0304;
                hello.tls12 |= version == 0x0303;
            }
        }
        _ => {}
    }
    Some(())
}

/// A DNS name in ASCII, in lower case (RFC 6066 §3). An IP address is not a valid name; its look-up finds nothing.
fn host_name(bytes: &[u8]) -> Option<Box<str>> {
    let is_letter = |byte: &u8| byte.is_ascii_alphanumeric() || b"-._".contains(byte);
    if bytes.is_empty() || bytes.len() > 255 || !bytes.iter().all(is_letter) {
        return None;
    }
    std::str::from_utf8(bytes).ok().map(|name| name.to_ascii_lowercase().into())
}

/// BoringSSL's TLS 1.2 suites for such certificates: ECDHE-ECDSA with AES-GCM, ChaCha20 and AES-CBC.
fn is_ecdsa(suite: u16) -> bool {
    matches!(suite, 0xc02b | 0xc02c | 0xcca9 | 0xc009 | 0xc00a | 0xc023)
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A vector whose length has `width` bytes.
    fn vector(width: usize, bytes: &[u8]) -> Vec<u8> {
        [&(bytes.len() as u32).to_be_bytes()[4 - width..], bytes].concat()
    }

    fn numbers(numbers: &[u16]) -> Vec<u8> {
        numbers.iter().flat_map(|number| number.to_be_bytes()).collect()
    }

    fn extension(kind: u16, data: &[u8]) -> Vec<u8> {
        [&kind.to_be_bytes()[..], &vector(2, data)].concat()
    }

    fn sni(name: &[u8]) -> Vec<u8> {
        extension(0, &vector(2, &[&[0][..], &vector(2, name)].concat()))
    }

    /// A message with these suites and extensions, as in a record.
    fn message(suites: &[u16], extensions: &[Vec<u8>]) -> Vec<u8> {
        let suites = vector(2, &numbers(suites));
        let body = [&[3, 3][..], &[7; 32], &[0], &suites, &[1, 0], &vector(2, &extensions.concat())].concat();
        [&[CLIENT_HELLO][..], &vector(3, &body)].concat()
    }

    /// The message in records of this size, in bytes.
    pub fn records(message: &[u8], size: usize) -> Vec<u8> {
        message.chunks(size).flat_map(|part| [&[HANDSHAKE, 3, 1][..], &vector(2, part)].concat()).collect()
    }

    fn read(bytes: &[u8]) -> Result<Option<Hello>, Fault> {
        Reader::default().read(bytes)
    }

    fn hello(suites: &[u16], extensions: &[Vec<u8>]) -> Option<Hello> {
        read(&records(&message(suites, extensions), 1 << 14)).ok().flatten()
    }

    fn schemes(schemes: &[u16]) -> Vec<u8> {
        extension(13, &vector(2, &numbers(schemes)))
    }

    fn versions(versions: &[u16]) -> Vec<u8> {
        extension(43, &vector(1, &numbers(versions)))
    }

    const GCM: &[u16] = &[0x1301, 0xc02b, 0xc02f];

    #[test]
    fn the_name_is_what_stands_in_the_message_in_lower_case() {
        assert_eq!(hello(GCM, &[sni(b"Shop.Example.com")]).expect("a hello").name.as_deref(), Some("shop.example.com"));
        assert_eq!(hello(GCM, &[]).expect("a hello").name, None);
        // Without extensions, as a very old client.
        let bare = [&[3, 1][..], &[7; 32], &[0], &vector(2, &numbers(&[0xc014])), &[1, 0]].concat();
        let bare = [&[CLIENT_HELLO][..], &vector(3, &bare)].concat();
        assert_eq!(read(&records(&bare, 100)), Ok(Some(Hello::default())));
    }

    #[test]
    fn what_two_parsers_could_read_differently_is_refused() {
        for wrong in [
            vec![sni(b"a.test"), sni(b"b.test")],
            vec![sni(b"")],
            vec![sni(b"a\0.test")],
            vec![sni("ä.test".as_bytes())],
            vec![sni(&[b'a'; 256])],
            vec![extension(0, &[])],
            vec![extension(0, &vector(2, &[&[0][..], &vector(2, b"a"), &[0], &vector(2, b"b")].concat()))],
            vec![extension(0, &vector(2, &[&[1][..], &vector(2, b"a")].concat()))],
            vec![extension(13, &vector(2, &[4]))],
            vec![extension(16, &vector(2, &[9, b'h']))],
            vec![vec![0, 0, 0]],
        ] {
            assert_eq!(hello(GCM, &wrong), None, "{wrong:?}");
        }
        assert_eq!(hello(&[], &[]), None, "no suites");
    }

    #[test]
    fn which_certificates_a_client_can_verify() {
        let kinds = [KeyKind::P256, KeyKind::P384, KeyKind::P521, KeyKind::Ed25519, KeyKind::Rsa];
        let can = |suites: &[u16], extensions: &[Vec<u8>]| {
            let hello = hello(suites, extensions).expect("a hello");
            kinds.into_iter().filter(|kind| hello.verifies(*kind)).collect::<Vec<_>>()
        };
        use KeyKind::*;
        let tls13 = versions(&[0x0a0a, 0x0304, 0x0303]);
        // As current browsers.
        let browser = [tls13.clone(), schemes(&[0x0403, 0x0804, 0x0401, 0x0503])];
        assert_eq!(can(GCM, &browser), [P256, P384, P521, Rsa], "by TLS 1.2, a scheme is not bound to a curve");
        assert_eq!(can(&[0x1301], &[versions(&[0x0304]), schemes(&[0x0403, 0x0804])]), [P256, Rsa]);
        assert_eq!(can(&[0x1301], &[versions(&[0x0304]), schemes(&[0x0807])]), [Ed25519]);
        // TLS 1.2 requires the suite, the scheme and the curve.
        assert_eq!(can(&[0xc02f], &[schemes(&[0x0403, 0x0401])]), [Rsa], "no suite");
        assert_eq!(can(GCM, &[schemes(&[0x0401])]), [Rsa], "no scheme");
        let p256 = extension(10, &vector(2, &numbers(&[29, 23])));
        assert_eq!(can(GCM, &[p256, schemes(&[0x0403, 0x0503, 0x0401])]), [P256, Rsa], "one curve");
        assert_eq!(can(GCM, &[]), [Rsa], "TLS 1.2 without the list");
    }

    #[test]
    fn an_authority_that_verifies_a_name_is_known_by_its_protocol() {
        let alpn = |protocols: &[&[u8]]| {
            extension(16, &vector(2, &protocols.iter().flat_map(|it| vector(1, it)).collect::<Vec<_>>()))
        };
        assert!(hello(GCM, &[alpn(&[b"acme-tls/1"])]).expect("a hello").acme);
        assert!(!hello(GCM, &[alpn(&[b"acme-tls/1", b"h2"])]).expect("a hello").acme);
        assert!(!hello(GCM, &[alpn(&[b"h2", b"http/1.1"])]).expect("a hello").acme);
    }

    #[test]
    fn whatever_is_no_client_hello_is_known_by_its_first_bytes() {
        assert_eq!(read(b"GET / HTTP/1.1\r\n"), Err(Fault::Http));
        assert_eq!(read(b"G"), Err(Fault::Http));
        assert_eq!(read(b"SSH-2.0-x\r\n"), Err(Fault::Http), "as far as its first letter goes");
        assert_eq!(read(b"\x80\x2e\x01\x03\x01"), Err(Fault::NotTls), "SSL 2");
        assert_eq!(read(b"\x15\x03\x01\x00\x02\x01\x00"), Err(Fault::NotTls), "an alert");
        assert_eq!(read(b"\x16\x02"), Err(Fault::NotTls));
        assert_eq!(read(b"\x16\x03\x01\x00\x00"), Err(Fault::Malformed), "an empty record");
        assert_eq!(read(b"\x16\x03\x01\x40\x01"), Err(Fault::Malformed), "a record that is too long");
        assert_eq!(read(b"\x16\x03\x01\x00\x04\x02\x00\x00\x00"), Err(Fault::Malformed), "a ServerHello");
        assert_eq!(read(b"\x16\x03\x01\x00\x04\x01\x00\x40\x00"), Err(Fault::TooLarge));
        let interrupted = [&records(&message(GCM, &[]), 8)[..13], b"\x17\x03\x03"].concat();
        assert_eq!(read(&interrupted), Err(Fault::Malformed));
        for short in [&b""[..], b"\x16", b"\x16\x03", b"\x16\x03\x01\x00\x04\x01"] {
            assert_eq!(read(short), Ok(None));
        }
    }

    #[test]
    fn one_in_too_many_records_is_too_large() {
        let long = message(GCM, &[extension(21, &[0; 12_000])]);
        assert!(matches!(read(&records(&long, 1 << 14)), Ok(Some(_))));
        assert!(matches!(read(&records(&long, 4)), Ok(Some(_))));
        let crumbs = records(&long, 1);
        assert_eq!(read(&crumbs[..RECORDS_BYTES_MAX]), Err(Fault::TooLarge));
        let huge = message(GCM, &[extension(21, &[0; HELLO_BYTES_MAX])]);
        assert_eq!(read(&records(&huge, 1 << 14)), Err(Fault::TooLarge));
    }

    proptest! {
        #[test]
        fn one_that_comes_in_pieces_is_the_same(size in 1usize..200, cut in 1usize..100) {
            let message = message(GCM, &[sni(b"a.test"), versions(&[0x0304]), schemes(&[0x0403])]);
            let bytes = records(&message, size);
            let mut reader = Reader::default();
            let mut end = 0;
            while end + cut < bytes.len() {
                end += cut;
                prop_assert_eq!(reader.read(&bytes[..end]), Ok(None));
            }
            prop_assert_eq!(reader.read(&bytes), read(&records(&message, 1 << 14)));
        }

        #[test]
        fn anything_may_be_sent(
            bytes in prop::collection::vec(any::<u8>(), 0..400),
            changed in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..4),
        ) {
            let _ = read(&bytes);
            let mut real = records(&message(GCM, &[sni(b"a.test"), versions(&[0x0304]), schemes(&[0x0403])]), 1 << 14);
            for (at, byte) in changed {
                let at = at.index(real.len());
                real[at] = byte;
            }
            if let Ok(Some(Hello { name: Some(name), .. })) = read(&real) {
                let is_letter = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b"-._".contains(&byte);
                prop_assert!(!name.is_empty() && name.bytes().all(is_letter), "{name:?}");
            }
        }

        #[test]
        fn one_with_a_share_of_a_post_quantum_group_comes_in_several_segments(cuts in prop::collection::vec(1usize..1800, 0..5)) {
            // A share of X25519MLKEM768 has 1,216 bytes (group 0x11ec), so that the message exceeds an Ethernet frame.
            let share = [&numbers(&[0x11ec])[..], &vector(2, &[7; 1_216])].concat();
            let shares = extension(51, &vector(2, &share));
            let message = message(GCM, &[sni(b"a.test"), versions(&[0x0304]), schemes(&[0x0403]), shares]);
            let bytes = records(&message, 1 << 14);
            let mut reader = Reader::default();
            let mut ends: Vec<usize> = cuts.into_iter().filter(|&cut| cut < bytes.len()).collect();
            ends.sort_unstable();
            for end in ends {
                prop_assert_eq!(reader.read(&bytes[..end]), Ok(None));
            }
            let whole = reader.read(&bytes).expect("no fault").expect("all of it");
            prop_assert!(whole.tls13 && whole.verifies(KeyKind::P256));
            prop_assert_eq!(whole.name.as_deref(), Some("a.test"));
        }
    }
}
