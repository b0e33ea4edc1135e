//! Follows a chunked body (RFC 9112 §7.1) to find its end, byte for byte and strictly.
//!
//! It decides which bytes belong to the body, so that nobody who reads it sees a byte of the next request. Of a body that
//! is streamed Pingora decodes the chunks; of one that is held back, this does. What is odd (bare line feeds, signs, endless extensions) is an error: a lenient reader beside a
//! strict one is how requests are smuggled.

use super::head::is_token;

/// Bytes of chunk extensions and trailers that a body may have in all.
const EXTRA_BYTES_MAX: usize = 16 * 1024;

/// The body is not framed as RFC 9112 §7.1 says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Malformed;

/// Where in a chunked body the next byte stands.
#[derive(Clone, Debug)]
pub struct Chunks {
    at: At,
    left: u64,
    extra: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum At {
    FirstDigit,
    Digits(u8),
    Extension,
    SizeLf,
    Data,
    DataCr,
    DataLf,
    TrailerStart,
    TrailerName,
    Trailer,
    TrailerLf,
    LastLf,
    End,
}

impl Default for Chunks {
    fn default() -> Self {
        Chunks { at: At::FirstDigit, left: 0, extra: 0 }
    }
}

impl Chunks {
    /// Whether the last byte of the body has passed.
    pub fn ended(&self) -> bool {
        self.at == At::End
    }

    /// Takes `bytes` as they follow; tells how many of them belong to this body.
    pub fn take(&mut self, bytes: &[u8]) -> Result<usize, Malformed> {
        let mut taken = 0;
        while taken < bytes.len() && !self.ended() {
            if self.at == At::Data {
                taken += self.data(bytes.len() - taken);
            } else {
                self.step(bytes[taken])?;
                taken += 1;
            }
        }
        Ok(taken)
    }

    /// Takes `bytes` as they follow, and moves the data among them to the front. Tells how many of them belong to this body,
    /// and how much of that is data; between the two nothing is left.
    pub fn unwrap(&mut self, bytes: &mut [u8]) -> Result<(usize, usize), Malformed> {
        let (mut taken, mut data) = (0, 0);
        while taken < bytes.len() && !self.ended() {
            if self.at == At::Data {
                let some = self.data(bytes.len() - taken);
                if taken != data {
                    bytes.copy_within(taken..taken + some, data);
                }
                taken += some;
                data += some;
            } else {
                self.step(bytes[taken])?;
                taken += 1;
            }
        }
        Ok((taken, data))
    }

    /// Takes as much of the present chunk as there is; says how much that was.
    fn data(&mut self, there: usize) -> usize {
        let some = self.left.min(there as u64);
        self.left -= some;
        if self.left == 0 {
            self.at = At::DataCr;
        }
        some as usize
    }

    fn step(&mut self, byte: u8) -> Result<(), Malformed> {
        self.at = match (self.at, byte) {
            (At::FirstDigit, _) => self.digit(byte, 1)?,
            (At::Digits(count), b'0'..=b'9' | b'a'..=b'f' | b'A'..=b'F') => self.digit(byte, count + 1)?,
            (At::Digits(_) | At::Extension, b'\r') => At::SizeLf,
            (At::Digits(_), b';' | b' ' | b'\t') => self.spend(At::Extension)?,
            (At::Extension, b'\t' | b' '..=b'~' | 0x80..) => self.spend(At::Extension)?,
            (At::SizeLf, b'\n') if self.left == 0 => At::TrailerStart,
            (At::SizeLf, b'\n') => At::Data,
            (At::DataCr, b'\r') => At::DataLf,
            (At::DataLf, b'\n') => At::FirstDigit,
            (At::TrailerStart, b'\r') => At::LastLf,
            (At::TrailerStart | At::TrailerName, _) if is_token(byte) => self.spend(At::TrailerName)?,
            (At::TrailerName, b':') => self.spend(At::Trailer)?,
            (At::Trailer, b'\r') => At::TrailerLf,
            (At::Trailer, b'\t' | b' '..=b'~' | 0x80..) => self.spend(At::Trailer)?,
            (At::TrailerLf, b'\n') => At::TrailerStart,
            (At::LastLf, b'\n') => At::End,
            _ => return Err(Malformed),
        };
        Ok(())
    }

    /// One hexadecimal digit of a chunk's size; fifteen are 2⁶⁰ bytes and enough.
    fn digit(&mut self, byte: u8, count: u8) -> Result<At, Malformed> {
        let digit = char::from(byte).to_digit(16).ok_or(Malformed)?;
        if count > 15 {
            return Err(Malformed);
        }
        self.left = self.left * 16 + u64::from(digit);
        Ok(At::Digits(count))
    }

    fn spend(&mut self, at: At) -> Result<At, Malformed> {
        self.extra += 1;
        if self.extra > EXTRA_BYTES_MAX { Err(Malformed) } else { Ok(at) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn end_of(bytes: &[u8]) -> Result<Option<usize>, Malformed> {
        let mut chunks = Chunks::default();
        let taken = chunks.take(bytes)?;
        Ok(chunks.ended().then_some(taken))
    }

    #[test]
    fn the_end_is_found_and_the_next_request_left_alone() {
        assert_eq!(end_of(b"0\r\n\r\nGET"), Ok(Some(5)));
        assert_eq!(end_of(b"3\r\nabc\r\n0\r\n\r\nGET"), Ok(Some(13)));
        assert_eq!(end_of(b"a;x=\"y\"\r\n0123456789\r\n00\r\nT: v\r\n\r\n"), Ok(Some(33)));
        assert_eq!(end_of(b"3\r\nab"), Ok(None));
    }

    #[test]
    fn the_data_is_moved_to_the_front() {
        let whole = *b"3\r\nabc\r\n5;x=y\r\ndefgh\r\n0\r\nT: v\r\n\r\nGET";
        for cut in 1..whole.len() {
            let mut chunks = Chunks::default();
            let mut data = Vec::new();
            let mut taken = 0;
            for part in whole.chunks(cut) {
                let mut part = part.to_vec();
                let (belongs, some) = chunks.unwrap(&mut part).expect("well formed");
                data.extend_from_slice(&part[..some]);
                taken += belongs;
            }
            assert_eq!((&data[..], &whole[taken..]), (&b"abcdefgh"[..], &b"GET"[..]), "{cut}");
        }
    }

    #[test]
    fn what_is_odd_is_malformed() {
        for odd in [
            &b"\r\n"[..],
            b"3\nabc\r\n",
            b"3\r\nabcd\r\n",
            b"3\r\nabc\n0\r\n",
            b"-3\r\nabc",
            b"+3\r\nabc",
            b"0x3\r\nabc",
            b"g\r\n",
            b";x\r\n",
            b"1234567890abcdef\r\n",
            b"0\r\n\nGET",
            b"0\r\n folded\r\n\r\n",
            b"0\r\nno colon\r\n\r\n",
            b"0\r\n: nameless\r\n\r\n",
            b"3;\x00\r\nabc\r\n",
        ] {
            assert_eq!(end_of(odd), Err(Malformed), "{:?}", odd.escape_ascii().to_string());
        }
    }

    #[test]
    fn extensions_and_trailers_have_a_limit() {
        let endless = [b"0;".to_vec(), vec![b'x'; EXTRA_BYTES_MAX + 1]].concat();
        assert_eq!(end_of(&endless), Err(Malformed));
    }

    proptest! {
        #[test]
        fn a_well_formed_body_ends_where_it_was_written_to_however_it_is_cut(
            pieces in prop::collection::vec(prop::collection::vec(any::<u8>(), 1..50), 0..8),
            tail in prop::collection::vec(any::<u8>(), 0..20),
            cut in 1usize..17,
        ) {
            let mut wire = Vec::new();
            for piece in &pieces {
                wire.extend_from_slice(format!("{:x}\r\n", piece.len()).as_bytes());
                wire.extend_from_slice(piece);
                wire.extend_from_slice(b"\r\n");
            }
            wire.extend_from_slice(b"0\r\n\r\n");
            let end = wire.len();
            wire.extend_from_slice(&tail);

            let mut chunks = Chunks::default();
            let mut taken = 0;
            for part in wire.chunks(cut) {
                taken += chunks.take(part).expect("well-formed");
                if chunks.ended() {
                    break;
                }
            }
            prop_assert_eq!(taken, end);
        }

        #[test]
        fn no_bytes_make_it_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = end_of(&bytes);
        }
    }
}
