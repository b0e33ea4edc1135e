//! A file with a list of endpoints: read at start, and again when it changes. A missing or invalid file changes
//! nothing.
//!
//! It watches the directory, so that renames and changed symbolic links are seen, and also checks the file
//! periodically, since not every file system sends notifications.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use notify::{RecommendedWatcher, RecursiveMode, Watcher};
use tokio::sync::Notify;
use tracing::warn;
use xxhash_rust::xxh3::xxh3_64;

use crate::config;
use crate::config::file::{self, Unreadable};
use crate::config::units::Size;
use crate::config::upstream::{Endpoint, FileSource};

/// Delay between the first event and reading: writing in place takes several writes.
const SETTLE: Duration = Duration::from_millis(100);

/// The file of one upstream.
#[derive(Clone, Debug)]
pub struct Listed {
    path: PathBuf,
    written: String,
    size_max: Size,
    refresh: Duration,
}

/// The content of the file, and a number that identifies it.
pub struct Contents {
    pub hash: u64,
    pub listed: Result<Vec<Endpoint>, String>,
}

impl Listed {
    pub fn new(written: &FileSource) -> Listed {
        let path = Path::new(&written.path);
        Listed {
            path: path.to_owned(),
            written: written.path.clone(),
            size_max: written.max_size,
            refresh: written.refresh.0,
        }
    }

    /// Its path in the configuration.
    pub fn path(&self) -> &str {
        &self.written
    }

    /// Reads the file. `last` identifies the last content: the same content is not parsed again.
    pub fn changed(&self, last: Option<u64>) -> Option<Contents> {
        let text = self.read();
        let hash = match &text {
            Ok(text) => xxh3_64(text.as_bytes()),
            Err(why) => !xxh3_64(why.as_bytes()),
        };
        if last == Some(hash) {
            return None;
        }
        let listed = text.and_then(|text| config::endpoints(&self.written, &text));
        Some(Contents { hash, listed })
    }

    fn read(&self) -> Result<String, String> {
        match file::read(&self.path, self.size_max) {
            Err(Unreadable::TooLarge(most)) => {
                Err(format!("`{}` is larger than {most}, which is its `max_size`", self.written))
            }
            Err(error) => Err(format!("`{}` cannot be read: {error}", self.written)),
            Ok(bytes) => String::from_utf8(bytes).map_err(|_| format!("`{}` is not UTF-8 text", self.written)),
        }
    }

    /// Starts to watch the file.
    pub fn watch(&self) -> Watch {
        let told = Arc::new(Notify::new());
        let watcher = self.watcher(told.clone());
        if let Err(error) = &watcher {
            warn!(
                "`{}` is checked every {:?} only because its directory cannot be watched: {error}",
                self.written, self.refresh
            );
        }
        Watch { told, refresh: self.refresh, _watcher: watcher.ok() }
    }

    fn watcher(&self, told: Arc<Notify>) -> notify::Result<RecommendedWatcher> {
        let mut watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
            // Ignores read access, which comes from Forebay itself.
            if !event.is_ok_and(|event| event.kind.is_access()) {
                told.notify_one();
            }
        })?;
        let dir = self.path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
        watcher.watch(dir, RecursiveMode::NonRecursive)?;
        Ok(watcher)
    }
}

/// Signals possible changes of the file.
pub struct Watch {
    told: Arc<Notify>,
    refresh: Duration,
    _watcher: Option<RecommendedWatcher>,
}

impl Watch {
    /// Waits until the file should be checked.
    pub async fn changed(&self) {
        tokio::select! {
            () = self.told.notified() => tokio::time::sleep(SETTLE.min(self.refresh)).await,
            () = tokio::time::sleep(self.refresh) => {}
        }
    }
}

/// Runs blocking work on its own thread.
pub async fn aside<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> io::Result<T> {
    tokio::task::spawn_blocking(work).await.map_err(io::Error::other)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn look(text: Option<&[u8]>, bytes_max: u64) -> Result<Vec<String>, String> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("endpoints.yaml");
        if let Some(text) = text {
            std::fs::write(&path, text).unwrap();
        }
        let refresh = Duration::from_secs(1);
        let listed = Listed { path, written: "endpoints.yaml".to_owned(), size_max: Size(bytes_max), refresh };
        let contents = listed.changed(None).unwrap();
        assert!(listed.changed(Some(contents.hash)).is_none(), "the same again is nothing new");
        contents.listed.map(|listed| listed.into_iter().map(|endpoint| endpoint.address.0).collect())
    }

    #[test]
    fn a_list_is_read_as_the_configuration_would_be() {
        let text = b"- address: 10.0.0.1:80\n- { address: app.test:80, weight: 3 }\n";
        assert_eq!(look(Some(text), 1024), Ok(vec!["10.0.0.1:80".to_owned(), "app.test:80".to_owned()]));
        assert_eq!(look(Some(b"[]"), 1024), Ok(vec![]));
    }

    #[test]
    fn what_is_wrong_is_told_with_its_place() {
        let said = |text: &[u8]| look(Some(text), 64).unwrap_err();
        assert_eq!(
            look(None, 64).unwrap_err(),
            "`endpoints.yaml` cannot be read: No such file or directory (os error 2)"
        );
        assert!(said(b"").contains("`[]`"), "an empty file may be half of one");
        assert!(said(b"- address: 10.0.0.1:80\n- addres: 10.0.0.2:80\n").starts_with("endpoints.yaml:2:"));
        assert!(said(b"- address: 10.0.0.1:80\n- address: 10.0.0.2\n").starts_with("endpoints.yaml:2:"));
        assert!(
            said(b"- address: 10.0.0.1:80\n- address: 10.0.0.2:0\n").starts_with("endpoints.yaml:2: [1].address: ")
        );
        let two_tiers = b"- { address: 10.0.0.1:80, backup: true, priority: 3 }\n";
        assert!(said(two_tiers).starts_with("endpoints.yaml:1: [0].backup: an endpoint is in one tier"));
        assert!(said(b"- { address: 10.0.0.1:80\n").contains("endpoints.yaml:"));
        assert_eq!(said(&[b'#'; 65]), "`endpoints.yaml` is larger than 64B, which is its `max_size`");
        assert_eq!(said(&[0xff, 0xfe]), "`endpoints.yaml` is not UTF-8 text");
    }
}
