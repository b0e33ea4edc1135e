//! Mutations of a corpus: what `mutatis` does to bytes, and what it cannot know: words of the target's language, pieces
//! that are repeated or moved, and one input joined to another.
//!
//! Purely random bytes hardly ever get past the first check of a parser; these do.

use std::env;
use std::fs;
use std::panic::{self, AssertUnwindSafe};
use std::time::{Duration, Instant};

use mutatis::Session;
use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};

use super::{corpus, folder};

/// Bytes that parsers treat in a way of their own.
const SPECIAL: &[u8] = b"\0\t\n\r \"#$%&'()*+,-./0123456789:;<=>?@AZ[\\]^_`az{|}~\x7f\x80\xbf\xc2\xe2\xff";
/// Longer inputs take time and show nothing new.
const INPUT_BYTES_MAX: usize = 64 * 1024;

/// How long a target is explored: for a second, or as the environment says.
pub fn budget() -> Duration {
    let seconds = env::var("FOREBAY_FUZZ_SECONDS").ok();
    seconds.map_or(Duration::from_secs(1), |text| Duration::from_secs(text.parse().expect("a number of seconds")))
}

/// A seed from `FOREBAY_FUZZ_SEED`, or a new one.
pub fn seed() -> u64 {
    env::var("FOREBAY_FUZZ_SEED").map_or_else(|_| rand::random(), |text| text.parse().expect("a seed"))
}

/// Lets a target see its corpus and mutations of it. An input that makes it panic is kept in a file.
pub fn explore(target: &str, words: &[&str], check: impl Fn(&[u8])) {
    explore_from(target, corpus(target), words, check);
}

/// The same with another corpus, whose inputs the target sees first.
pub fn explore_from(target: &str, corpus: Vec<Vec<u8>>, words: &[&str], check: impl Fn(&[u8])) {
    corpus.iter().for_each(|input| check(input));
    let seed = seed();
    let mut mutator = Mutator::new(corpus, words, seed);
    explore_made(target, seed, || mutator.input(), check);
}

/// The same with inputs that `make` makes from this seed.
pub fn explore_made(target: &str, seed: u64, mut make: impl FnMut() -> Vec<u8>, check: impl Fn(&[u8])) {
    let (began, budget) = (Instant::now(), budget());
    let mut inputs = 0_u64;
    while began.elapsed() < budget {
        let input = make();
        inputs += 1;
        if let Err(panic) = panic::catch_unwind(AssertUnwindSafe(|| check(&input))) {
            let file = env::temp_dir().join(format!("forebay-fuzz-{target}-{seed}-{inputs}"));
            let kept = fs::write(&file, &input);
            eprintln!("{target}: {} fails ({kept:?}); add it to {}", file.display(), folder(target).display());
            panic::resume_unwind(panic);
        }
    }
    println!("{target}: {inputs} inputs with FOREBAY_FUZZ_SEED={seed}");
}

/// Makes one input after the other.
pub struct Mutator<'w> {
    seed: u64,
    dice: StdRng,
    session: Session,
    corpus: Vec<Vec<u8>>,
    words: &'w [&'w str],
}

impl<'w> Mutator<'w> {
    pub fn new(corpus: Vec<Vec<u8>>, words: &'w [&'w str], seed: u64) -> Self {
        Mutator { seed, dice: StdRng::seed_from_u64(seed), session: Session::new().seed(seed), corpus, words }
    }

    /// What makes these inputs.
    pub fn seed(&self) -> u64 {
        self.seed
    }

    /// The next input.
    pub fn input(&mut self) -> Vec<u8> {
        let mut input = self.corpus.choose(&mut self.dice).cloned().unwrap_or_default();
        for _ in 0..=self.dice.gen_range(0..8) {
            self.change(&mut input);
            input.truncate(INPUT_BYTES_MAX);
        }
        input
    }

    fn change(&mut self, input: &mut Vec<u8>) {
        let dice = &mut self.dice;
        let at = dice.gen_range(0..=input.len());
        let most = 1 << dice.gen_range(0..8);
        let len = dice.gen_range(0..=(input.len() - at).min(most));
        let piece = input[at..at + len].to_vec();
        match dice.gen_range(0..9) {
            // It fails where there is nothing left to change.
            0 | 1 => _ = self.session.mutate(input),
            2 => drop(input.splice(at..at, [SPECIAL[dice.gen_range(0..SPECIAL.len())]])),
            3 => drop(input.drain(at..at + len)),
            4 => drop(input.splice(at..at, piece.repeat(1 << dice.gen_range(0..6)))),
            5 => {
                let to = dice.gen_range(0..=input.len());
                drop(input.splice(to..to, piece));
            }
            6 => {
                let other = self.corpus.choose(dice).map_or(&[][..], Vec::as_slice);
                let from = dice.gen_range(0..=other.len());
                input.truncate(at);
                input.extend_from_slice(&other[from..]);
            }
            7 => input.truncate(at),
            _ => {
                let word = self.words.choose(dice).copied().unwrap_or_default();
                let over = if dice.r#gen() { len } else { 0 };
                drop(input.splice(at..at + over, word.bytes()));
            }
        }
    }
}

#[test]
fn a_seed_makes_the_same_inputs_again() {
    let inputs = |seed| {
        let mut mutator = Mutator::new(vec![b"GET / HTTP/1.1".to_vec(), b"a: b".to_vec()], &["Host", ": "], seed);
        (0..1_000).map(|_| mutator.input()).collect::<Vec<_>>()
    };
    assert_eq!(inputs(7), inputs(7));
    assert_ne!(inputs(7), inputs(8));
    assert!(inputs(7).iter().all(|input| input.len() <= INPUT_BYTES_MAX));
}
