//! Keys of session tickets, with which clients resume sessions without a full handshake (RFC 5077, RFC 8446 §4.6.1).
//!
//! All contexts of a listener share the keys, so that a session survives a new certificate. The first key encrypts new
//! tickets; all keys decrypt. A used ticket is replaced, since TLS 1.3 clients use each only once. Keys in memory are
//! rotated by time; keys in a file, by the program that writes it.

use std::sync::Arc;

use arc_swap::ArcSwap;
use boring::error::ErrorStack;
use boring::hash::MessageDigest;
use boring::hmac::HmacCtxRef;
use boring::ssl::TicketKeyCallbackResult as Answer;
use boring::symm::{Cipher, CipherCtxRef};
use zeroize::Zeroize;

use super::certificate;
use crate::error::BuildError;

/// Length of a key in a file, in bytes: a name, a MAC key and an encryption key, in the order of nginx.
const KEY_BYTES: usize = 16 + 32 + 32;
/// Number of generated keys that are kept.
const KEYS_KEPT: usize = 3;
/// Maximum number of keys in a file.
const FILE_KEYS_MAX: usize = 64;

/// One key.
#[derive(Clone)]
struct Key {
    name: [u8; 16],
    mac: [u8; 32],
    aes: [u8; 32],
}

impl Drop for Key {
    fn drop(&mut self) {
        self.mac.zeroize();
        self.aes.zeroize();
    }
}

/// The current keys. Clones share them.
#[derive(Clone)]
pub struct Tickets(Arc<ArcSwap<Vec<Key>>>);

impl Key {
    fn random() -> Result<Key, ErrorStack> {
        let mut key = Key { name: [0; 16], mac: [0; 32], aes: [0; 32] };
        boring::rand::rand_bytes(&mut key.name)?;
        boring::rand::rand_bytes(&mut key.mac)?;
        boring::rand::rand_bytes(&mut key.aes)?;
        Ok(key)
    }

    fn of(bytes: &[u8]) -> Option<Key> {
        let (name, rest) = bytes.split_first_chunk()?;
        let (mac, aes) = rest.split_first_chunk()?;
        Some(Key { name: *name, mac: *mac, aes: *aes.first_chunk()? })
    }
}

impl Tickets {
    /// Generates keys, initially one.
    ///
    /// # Errors
    ///
    /// If the library lacks random numbers.
    pub fn random() -> Result<Tickets, ErrorStack> {
        Ok(Tickets(Arc::new(ArcSwap::from_pointee(vec![Key::random()?]))))
    }

    /// Reads the keys of a file.
    ///
    /// # Errors
    ///
    /// If it cannot be read, or contains no keys.
    pub fn from_file(path: &str) -> Result<Tickets, BuildError> {
        let tickets = Tickets(Arc::default());
        tickets.read(path)?;
        Ok(tickets)
    }

    /// Replaces the keys with those of the file.
    ///
    /// # Errors
    ///
    /// As for [`Tickets::from_file`]; the keys then remain unchanged.
    pub fn read(&self, path: &str) -> Result<(), BuildError> {
        let wrong = |what: String| BuildError::new("tickets.keys_file", format!("`{path}` {what}"));
        let bytes = certificate::read("tickets.keys_file", path, (KEY_BYTES * FILE_KEYS_MAX) as u64)?;
        if bytes.is_empty() || !bytes.len().is_multiple_of(KEY_BYTES) {
            let found = bytes.len();
            return Err(wrong(format!(
                "has {found} bytes, and keys have {KEY_BYTES} each: make one with `openssl rand {KEY_BYTES}`"
            )));
        }
        let keys: Vec<Key> = bytes.chunks_exact(KEY_BYTES).filter_map(Key::of).collect();
        if keys.iter().any(|key| key.mac == [0; 32] || key.aes == [0; 32]) {
            return Err(wrong("holds a key of zeros, which is not a secret".to_owned()));
        }
        self.0.store(Arc::new(keys));
        Ok(())
    }

    /// Generates a new key and drops the oldest.
    ///
    /// # Errors
    ///
    /// If the library lacks random numbers; the keys then remain unchanged.
    pub fn rotate(&self) -> Result<(), ErrorStack> {
        let mut keys = vec![Key::random()?];
        keys.extend(self.0.load().iter().take(KEYS_KEPT - 1).cloned());
        self.0.store(Arc::new(keys));
        Ok(())
    }

    /// Prepares the cipher of one ticket: a new one, or the one whose key has this name.
    pub(super) fn prepare(
        &self,
        name: &mut [u8; 16],
        iv: &mut [u8; 16],
        cipher: &mut CipherCtxRef,
        mac: &mut HmacCtxRef,
        makes: bool,
    ) -> Answer {
        let keys = self.0.load();
        let known = if makes { keys.first() } else { keys.iter().find(|key| key.name == *name) };
        let Some(key) = known else { return Answer::Noop };
        let aes = Cipher::aes_256_cbc();
        let ready = if makes {
            *name = key.name;
            boring::rand::rand_bytes(iv).and_then(|()| cipher.init_encrypt(&aes, &key.aes, iv))
        } else {
            cipher.init_decrypt(&aes, &key.aes, iv)
        };
        match ready.and_then(|()| mac.init(&key.mac, &MessageDigest::sha256())) {
            Err(_) => Answer::Error,
            Ok(()) if makes => Answer::Success,
            Ok(()) => Answer::DecryptSuccessRenew,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::client::tls::certificate::tests::put;

    fn names(tickets: &Tickets) -> Vec<[u8; 16]> {
        tickets.0.load().iter().map(|key| key.name).collect()
    }

    #[test]
    fn a_key_makes_tickets_for_one_turn_and_is_known_for_two_more() {
        let tickets = Tickets::random().expect("a key");
        let first = names(&tickets)[0];
        for age in 1..KEYS_KEPT {
            tickets.rotate().expect("a key");
            assert_eq!(names(&tickets)[age], first);
        }
        tickets.rotate().expect("a key");
        assert!(!names(&tickets).contains(&first));
        assert_eq!(names(&tickets).len(), KEYS_KEPT);
    }

    #[test]
    fn a_file_holds_one_key_after_the_other() {
        let dir = tempfile::tempdir().expect("a directory");
        let key = |byte| [byte; KEY_BYTES];
        let two = put(dir.path(), "two", &[key(1), key(2)].concat());
        let tickets = Tickets::from_file(&two).expect("keys");
        assert_eq!(names(&tickets), [[1; 16], [2; 16]]);

        let told = |bytes: &[u8]| tickets.read(&put(dir.path(), "wrong", bytes)).map_err(|error| error.message);
        let wrong = dir.path().join("wrong").display().to_string();
        assert_eq!(
            told(&key(1)[..48]),
            Err(format!("`{wrong}` has 48 bytes, and keys have 80 each: make one with `openssl rand 80`"))
        );
        assert!(told(b"").is_err());
        assert_eq!(told(&key(0)), Err(format!("`{wrong}` holds a key of zeros, which is not a secret")));
        assert_eq!(names(&tickets), [[1; 16], [2; 16]], "what cannot be read changes nothing");
    }
}
