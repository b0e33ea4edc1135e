//! Answers to the challenges of an order, given by every process that shares the store: the issuer may connect to
//! any of them.
//!
//! The ordering process writes each answer into the store; the other processes read it there ([`Followed`]).

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;

use boring::error::ErrorStack;
use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::xxh3_64;

use super::failure::Failure;
use super::store::{self, Store};
use crate::client::challenges::{Awaited, Challenges};
use crate::client::tls::challenge;

/// The answer to one challenge.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ChallengeResponse {
    /// For HTTP requests.
    Http01 {
        /// The token.
        token: String,
        /// The response body.
        answer: String,
    },
    /// For TLS handshakes.
    TlsAlpn01 {
        /// The name, in lower case.
        name: String,
        /// The digest in the certificate.
        digest: [u8; 32],
    },
}

/// The answers of one order; they are withdrawn on drop.
pub struct Answers<'a> {
    awaited: Awaited,
    store: &'a Store,
    files: Vec<PathBuf>,
}

/// The answers of the ordering process, as seen by another process.
#[derive(Default)]
pub struct Followed(HashMap<PathBuf, Awaited>);

impl<'a> Answers<'a> {
    /// No answers yet.
    pub fn new(challenges: &Arc<Challenges>, store: &'a Store) -> Self {
        Answers { awaited: challenges.wait(), store, files: Vec::new() }
    }

    /// Publishes an answer, in this process and in the store.
    ///
    /// # Errors
    ///
    /// The library has no random numbers, or the store cannot be written.
    pub fn add(&mut self, answer: &ChallengeResponse) -> Result<(), Failure> {
        give(&mut self.awaited, answer)?;
        let what = match answer {
            ChallengeResponse::Http01 { token, .. } => token,
            ChallengeResponse::TlsAlpn01 { name, .. } => name,
        };
        let file = self.store.challenge(xxh3_64(what.as_bytes()));
        let kept = store::replace_json(&file, answer);
        kept.map_err(|error| Failure::new(format!("a challenge cannot be kept: {error}")))?;
        self.files.push(file);
        Ok(())
    }
}

impl Drop for Answers<'_> {
    fn drop(&mut self) {
        for file in &self.files {
            if let Err(error) = std::fs::remove_file(file) {
                tracing::warn!("`{}` stays: {error}", file.display());
            }
        }
    }
}

impl Followed {
    /// Reads the current answers from the store.
    pub fn look(&mut self, store: &Store, challenges: &Arc<Challenges>) {
        let there = store.challenges();
        self.0.retain(|file, _| there.contains(file));
        for file in there {
            // A file that has vanished or cannot be read is reported by the other process.
            if !self.0.contains_key(&file)
                && let Ok(Some(answer)) = store::read_json(&file)
            {
                let mut awaited = challenges.wait();
                if give(&mut awaited, &answer).is_ok() {
                    self.0.insert(file, awaited);
                }
            }
        }
    }
}

fn give(awaited: &mut Awaited, answer: &ChallengeResponse) -> Result<(), ErrorStack> {
    match answer {
        ChallengeResponse::Http01 { token, answer } => awaited.token(token, answer),
        ChallengeResponse::TlsAlpn01 { name, digest } => awaited.name(name, &challenge::context(name, digest)?),
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::client::hello::Hello;
    use crate::metrics::Metrics;

    #[test]
    fn what_one_process_answers_the_others_answer_for_as_long() {
        let dir = tempfile::tempdir().expect("a directory");
        let store = Store::of(dir.path().to_str().expect("a path"), "ours");
        store.prepare(None).expect("a directory");
        let [here, there] = [(); 2].map(|()| Challenges::new(Metrics::new(10, Vec::new()).challenges()));
        let mut hello = Hello::default();
        (hello.name, hello.acme) = (Some("a.test".into()), true);
        let path = "/.well-known/acme-challenge/abc";

        let mut answers = Answers::new(&here, &store);
        let token = ChallengeResponse::Http01 { token: "abc".to_owned(), answer: "abc.key".to_owned() };
        answers.add(&token).expect("a file");
        answers.add(&ChallengeResponse::TlsAlpn01 { name: "a.test".to_owned(), digest: [7; 32] }).expect("a file");
        let mut followed = Followed::default();
        for challenges in [&here, &there] {
            followed.look(&store, &there);
            assert_eq!(challenges.http(path).as_deref(), Some("abc.key"));
            assert!(challenges.tls(&hello).is_some());
        }
        drop(answers);
        followed.look(&store, &there);
        for challenges in [&here, &there] {
            assert!(challenges.http(path).is_none() && challenges.tls(&hello).is_none());
        }
        assert_eq!(store.challenges(), Vec::<PathBuf>::new());
    }
}
