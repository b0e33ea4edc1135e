//! A file that lists endpoints: read at start, and again when it changes. One that is missing or wrong changes nothing.
//!
//! The system tells of changes in its directory (so that a file that is renamed to it is seen, and a link that is
//! turned), and it is looked at every now and then as well, for not every file system tells.

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

/// Between the first word of a change and the look at it: who writes in place needs more than one write for it.
const SETTLE: Duration = Duration::from_millis(100);

/// The file of one upstream.
#[derive(Clone, Debug)]
pub struct Listed {
    path: PathBuf,
    written: String,
    size_max: Size,
    refresh: Duration,
}

/// What a look at the file showed, and a number that tells it from other looks.
pub struct Look {
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

    /// How it is called in the configuration.
    pub fn path(&self) -> &str {
        &self.written
    }

    /// Reads it. `last` is the number of the last look: what is the same is not read into a list again.
    pub fn look(&self, last: Option<u64>) -> Option<Look> {
        let text = self.read();
        let hash = match &text {
            Ok(text) => xxh3_64(text.as_bytes()),
            Err(why) => !xxh3_64(why.as_bytes()),
        };
        if last == Some(hash) {
            return None;
        }
        let listed = text.and_then(|text| config::endpoints(&self.written, &text));
        Some(Look { hash, listed })
    }

    fn read(&self) -> Result<String, String> {
        match file::read(&self.path, self.size_max) {
            Err(Unreadable::TooLarge(most)) => {
                Err(format!("`{}` is larger than {most}, which is its `max_size`", self.written))
            }
            Err(error) => Err(format!("`{}` cannot be read: {error}", self.written)),
            Ok(bytes) => String::from_utf8(bytes).map_err(|_| format!("`{}` is no text in UTF-8", self.written)),
        }
    }

    /// Begins to watch it.
    pub fn watch(&self) -> Watch {
        let told = Arc::new(Notify::new());
        let watcher = self.watcher(told.clone());
        if let Err(error) = &watcher {
            warn!(
                "`{}` is looked at every {:?} only, for its directory cannot be watched: {error}",
                self.written, self.refresh
            );
        }
        Watch { told, refresh: self.refresh, _watcher: watcher.ok() }
    }

    fn watcher(&self, told: Arc<Notify>) -> notify::Result<RecommendedWatcher> {
        let mut watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
            // That it is read is an event as well, and ours.
            if !event.is_ok_and(|event| event.kind.is_access()) {
                told.notify_one();
            }
        })?;
        let dir = self.path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
        watcher.watch(dir, RecursiveMode::NonRecursive)?;
        Ok(watcher)
    }
}

/// Says when the file may have changed.
pub struct Watch {
    told: Arc<Notify>,
    refresh: Duration,
    _watcher: Option<RecommendedWatcher>,
}

impl Watch {
    /// Waits until it is time to look at the file.
    pub async fn changed(&self) {
        tokio::select! {
            () = self.told.notified() => tokio::time::sleep(SETTLE.min(self.refresh)).await,
            () = tokio::time::sleep(self.refresh) => {}
        }
    }
}

/// Runs what blocks on a thread for it.
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
        let look = listed.look(None).unwrap();
        assert!(listed.look(Some(look.hash)).is_none(), "the same again is nothing new");
        look.listed.map(|listed| listed.into_iter().map(|endpoint| endpoint.address.0).collect())
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
        assert!(said(two_tiers).starts_with("endpoints.yaml:1: [0].backup: an endpoint stands in one tier"));
        assert!(said(b"- { address: 10.0.0.1:80\n").contains("endpoints.yaml:"));
        assert_eq!(said(&[b'#'; 65]), "`endpoints.yaml` is larger than 64B, which is its `max_size`");
        assert_eq!(said(&[0xff, 0xfe]), "`endpoints.yaml` is no text in UTF-8");
    }
}
