//! Incremental SHA-256, with which both ends of a transfer compare it without storing it.

use std::fmt::Write as _;

use pingora::tls::hash::{Hasher, MessageDigest};

use super::behaviour::content_from;

/// The length and the SHA-256 of a stream of bytes.
pub struct Digest {
    length: u64,
    hasher: Hasher,
}

impl Default for Digest {
    fn default() -> Self {
        // The built-in OpenSSL always has SHA-256.
        Digest { length: 0, hasher: Hasher::new(MessageDigest::sha256()).expect("OpenSSL knows SHA-256") }
    }
}

impl Digest {
    /// The digest of the first `length` bytes of [`content`](super::content).
    pub fn of_content(length: u64) -> Digest {
        let mut digest = Digest::default();
        while digest.length < length {
            digest.add(content_from(digest.length, length - digest.length));
        }
        digest
    }

    /// Adds a piece.
    ///
    /// # Panics
    ///
    /// Only if memory is exhausted.
    pub fn add(&mut self, piece: &[u8]) {
        self.length += piece.len() as u64;
        self.hasher.update(piece).expect("memory to hash in");
    }

    /// Number of bytes added so far.
    pub fn length(&self) -> u64 {
        self.length
    }

    /// The SHA-256 in lower-case hex. Also resets the digest.
    ///
    /// # Panics
    ///
    /// Only if memory is exhausted.
    pub fn sha256(&mut self) -> String {
        self.length = 0;
        let hash = self.hasher.finish().expect("memory to hash in");
        hash.iter().fold(String::with_capacity(64), |mut hex, byte| {
            // Writing to memory cannot fail.
            let _ = write!(hex, "{byte:02x}");
            hex
        })
    }
}

#[cfg(test)]
mod tests {
    use super::super::content;
    use super::*;

    fn of(bytes: &[u8]) -> String {
        let mut digest = Digest::default();
        bytes.chunks(7).for_each(|piece| digest.add(piece));
        digest.sha256()
    }

    #[test]
    fn digests_are_those_of_the_standard() {
        // FIPS 180-4, example B.1, and the empty message.
        assert_eq!(of(b"abc"), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
        assert_eq!(of(b""), "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
    }

    #[test]
    fn the_digest_of_the_content_is_that_of_its_bytes() {
        assert_eq!(Digest::of_content(3_000_000).sha256(), of(&content(3_000_000)));
        assert_eq!(Digest::of_content(3_000_000).length(), 3_000_000);
    }
}
