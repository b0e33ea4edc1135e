//! Files of filters: users, keys and networks. A file is read when the filter is built, so that mistakes in it are
//! errors of `check`, and again when it changes. If it is then missing or invalid, the previous content stays in use.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use arc_swap::{ArcSwap, Guard};
use schemars::JsonSchema;
use serde::Deserialize;
use xxhash_rust::xxh3::xxh3_64;

use super::Surroundings;
use crate::config::file;
use crate::config::units::{Size, Time};
use crate::error::BuildError;
use crate::files::Keeper;
use crate::metrics::filters::Loads;

/// A file and how it is watched.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Source {
    /// The file. A relative path refers to the directory of the configuration.
    pub path: String,
    /// How often it is checked, in addition to the notifications of the system.
    #[serde(default = "Source::refresh")]
    pub refresh: Time,
    /// The size limit; a larger file is not read.
    #[serde(default = "Source::max_size")]
    pub max_size: Size,
}

impl Source {
    fn refresh() -> Time {
        Time(Duration::from_secs(60))
    }

    fn max_size() -> Size {
        Size(16 << 20)
    }
}

/// The content of a file, as it was last valid.
pub(super) struct Listed<T> {
    path: PathBuf,
    written: String,
    max_size: Size,
    parse: fn(&str) -> Result<T, String>,
    now: ArcSwap<T>,
    /// The digest of the last reading, so that the same content is not parsed again, and the same mistake not
    /// reported twice.
    hash: AtomicU64,
    loads: Option<Loads>,
}

impl<T: Send + Sync + 'static> Listed<T> {
    /// Reads the file, and watches it.
    ///
    /// # Errors
    /// The file is unreadable or invalid. The path is relative to the source.
    pub fn build(
        source: &Source,
        around: &Surroundings<'_>,
        parse: fn(&str) -> Result<T, String>,
    ) -> Result<Arc<Listed<T>>, BuildError> {
        if source.refresh.0.is_zero() {
            return Err(BuildError::new("refresh", "a file cannot be looked at all the time: write `1s` or more"));
        }
        let path = around.directory.join(&source.path);
        let (hash, text) = look(&path, &source.path, source.max_size);
        let now = text.and_then(|text| parse(&text).map_err(|told| format!("`{}`: {told}", source.path)));
        let listed = Arc::new(Listed {
            path,
            written: source.path.clone(),
            max_size: source.max_size,
            parse,
            now: ArcSwap::from_pointee(now.map_err(|told| BuildError::new("path", told))?),
            hash: AtomicU64::new(hash),
            loads: around.metrics.map(|metrics| metrics.loads(around.route, around.filter)),
        });
        around.look_after(&listed.path, source.refresh.0, &listed);
        Ok(listed)
    }

    /// The present content.
    pub fn now(&self) -> Guard<Arc<T>> {
        self.now.load()
    }
}

impl<T: Send + Sync + 'static> Keeper for Listed<T> {
    fn look(&self) {
        let (hash, text) = look(&self.path, &self.written, self.max_size);
        if self.hash.swap(hash, Ordering::Relaxed) == hash {
            return;
        }
        let read = text.and_then(|text| (self.parse)(&text).map_err(|told| format!("`{}`: {told}", self.written)));
        self.loads.iter().for_each(|loads| loads.count(read.is_ok()));
        match read {
            Ok(now) => {
                self.now.store(Arc::new(now));
                tracing::info!("`{}` was read again", self.written);
            }
            Err(told) => tracing::error!("{told}; what it held before stays in force"),
        }
    }
}

/// The text of a file, and a number that identifies it.
fn look(path: &std::path::Path, written: &str, most: Size) -> (u64, Result<String, String>) {
    let text = match file::read(path, most) {
        Ok(bytes) => String::from_utf8(bytes).map_err(|_| format!("`{written}` is not text in UTF-8")),
        Err(error) => Err(format!("`{written}` cannot be read: {error}")),
    };
    let hash = match &text {
        Ok(text) => xxh3_64(text.as_bytes()),
        Err(told) => !xxh3_64(told.as_bytes()),
    };
    (hash, text)
}

/// The lines of a file that are neither empty nor comments, with their numbers from 1.
pub(super) fn lines(text: &str) -> impl Iterator<Item = (usize, &str)> {
    let lines = text.lines().enumerate().map(|(index, line)| (index + 1, line.trim()));
    lines.filter(|(_, line)| !line.is_empty() && !line.starts_with('#'))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(text: &str) -> Result<Vec<String>, String> {
        lines(text)
            .map(|(number, line)| if line == "bad" { Err(format!("line {number}")) } else { Ok(line.to_owned()) })
            .collect()
    }

    #[test]
    fn what_a_file_holds_is_what_it_held_when_it_was_right_last() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("words");
        let write = |text: &str| std::fs::write(&file, text).unwrap();
        write("# a list\none\n\n  two\n");
        let yaml = format!("path: {}", file.display());
        let source: Source = serde_yaml::from_str(&yaml).unwrap();
        let around = Surroundings::rehearsal(&());
        let listed = Listed::build(&source, &around, words).unwrap();
        assert_eq!(**listed.now(), ["one", "two"]);
        write("three");
        listed.look();
        assert_eq!(**listed.now(), ["three"]);
        write("four\nbad");
        listed.look();
        assert_eq!(**listed.now(), ["three"]);
        std::fs::remove_file(&file).unwrap();
        listed.look();
        assert_eq!(**listed.now(), ["three"]);

        let told = |yaml: &str| {
            let source: Source = serde_yaml::from_str(yaml).unwrap();
            Listed::build(&source, &around, words).err().unwrap().to_string()
        };
        assert!(told(&yaml).contains("cannot be read: No such file"), "{}", told(&yaml));
        write("a\nbad");
        assert!(told(&yaml).ends_with("words`: line 2"), "{}", told(&yaml));
        assert!(told(&format!("{yaml}\nmax_size: 2B")).contains("it is larger than 2B"));
        assert!(told(&format!("{yaml}\nrefresh: 0s")).starts_with("refresh: "));
    }
}
