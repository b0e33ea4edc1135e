//! Fuzz targets: what strangers and operators may send, as any bytes at all.
//!
//! A target is a test. It sees every input of its corpus (`corpus/<target>`), and then mutations of these for a second,
//! or for as long as `FOREBAY_FUZZ_SECONDS` says. `README.md` says what to do with a finding.

mod answers;
mod bodies;
mod config;
mod entrance;
mod frames;
mod head;
mod lines;
mod mix;
pub mod mutate;
mod paths;
mod rules;

use std::fs;
use std::path::PathBuf;

/// The inputs that a target always sees.
fn folder(target: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fuzz/corpus").join(target)
}

/// The inputs of a target's corpus, in the order of their names.
fn corpus(target: &str) -> Vec<Vec<u8>> {
    let entries = fs::read_dir(folder(target)).expect("a corpus").map(|entry| entry.expect("an entry"));
    let mut files: Vec<PathBuf> = entries.map(|entry| entry.path()).collect();
    files.sort();
    files.iter().map(|file| fs::read(file).expect("an input")).collect()
}

#[test]
fn every_corpus_belongs_to_a_target() {
    let sources: String = ["answers", "bodies", "config", "entrance", "frames", "head", "lines", "paths", "rules"]
        .iter()
        .map(|name| fs::read_to_string(format!("tests/fuzz/{name}.rs")).expect("a target"))
        .collect();
    for folder in fs::read_dir("tests/fuzz/corpus").expect("the corpora") {
        let name = folder.expect("an entry").file_name().into_string().expect("a name");
        assert!(sources.contains(&format!("\"{name}\"")), "no target reads `tests/fuzz/corpus/{name}`");
        assert!(!corpus(&name).is_empty(), "{name}");
    }
}
