//! Files that filters use and that are reloaded when they change: users, keys, lists of networks. One watcher serves
//! all.
//!
//! The owner of a file's content registers the names with [`Files::keep`] and is called when it should check them. The
//! system reports changes in the directories of the files, so a file that is replaced by a rename and a changed
//! symbolic link are noticed. Each file is also checked periodically, because not every file system reports changes.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use async_trait::async_trait;
use notify::{EventKind, RecommendedWatcher, RecursiveMode, Watcher};
use pingora::server::ShutdownWatch;
use pingora::services::background::{BackgroundService, GenBackgroundService};
use tokio::sync::Notify;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, sleep_until};

/// The delay between the first report of a change and the check of the files: a certificate and its key are two files,
/// and a program that writes a file in place may need several writes.
const SETTLE: Duration = Duration::from_millis(100);

/// The owner of what files hold.
pub trait Keeper: Send + Sync + 'static {
    /// The files may have changed. Runs on a thread that may block, and never twice at a time.
    fn look(&self);
}

/// All files that are watched. Clones share everything.
#[derive(Clone, Default)]
pub struct Files(Arc<Inner>);

#[derive(Default)]
struct Inner {
    kept: Mutex<Vec<Kept>>,
    /// Notified when an owner is added.
    added: Notify,
}

struct Kept {
    /// The name in the log.
    what: String,
    directories: Vec<PathBuf>,
    refresh: Duration,
    due: Instant,
    keeper: Weak<dyn Keeper>,
    look: Option<JoinHandle<()>>,
}

impl Files {
    /// Calls `keeper` when one of these files may have changed, and also every `refresh`, until `keeper` is dropped.
    /// `what` names it in the log.
    pub fn keep<K: Keeper>(&self, what: &str, files: &[&Path], refresh: Duration, keeper: &Arc<K>) {
        let keeper: Arc<dyn Keeper> = keeper.clone();
        let directories: BTreeSet<_> = files.iter().map(|file| directory(file)).collect();
        self.kept().push(Kept {
            what: what.to_owned(),
            directories: directories.into_iter().collect(),
            refresh,
            due: Instant::now() + refresh,
            keeper: Arc::downgrade(&keeper),
            look: None,
        });
        self.0.added.notify_one();
    }

    /// The service that watches the files.
    pub fn background(&self) -> GenBackgroundService<Files> {
        GenBackgroundService::new("files".to_owned(), Arc::new(self.clone()))
    }

    fn kept(&self) -> MutexGuard<'_, Vec<Kept>> {
        self.0.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Watches the files in an endless loop.
    async fn run(&self) {
        let told = Arc::new(Told::default());
        let mut watched = Watched::new(told.clone());
        loop {
            let due = self.attend(&mut watched);
            tokio::select! {
                () = self.0.added.notified() => continue,
                () = told.any.notified() => sleep(SETTLE).await,
                () = sleep_until(due) => {}
            }
            let changed = told.take();
            watched.forget(&changed);
            self.look(&changed);
        }
    }

    /// Watches the directories of new owners, and removes owners that were dropped. Returns the time of the next
    /// periodic check.
    fn attend(&self, watched: &mut Watched) -> Instant {
        let mut kept = self.kept();
        kept.retain(|kept| kept.keeper.strong_count() > 0);
        for Kept { what, directories, refresh, .. } in kept.iter() {
            for directory in directories {
                watched.watch(directory, what, *refresh);
            }
        }
        watched.keep_only(&kept.iter().flat_map(|kept| &kept.directories).collect());
        kept.iter().map(|kept| kept.due).min().unwrap_or_else(|| Instant::now() + Duration::from_secs(3600))
    }

    /// Starts the checks that are due, and those whose files may have changed.
    fn look(&self, changed: &Changed) {
        let now = Instant::now();
        for kept in self.kept().iter_mut() {
            if !changed.concerns(&kept.directories) && kept.due > now {
                continue;
            }
            if kept.look.as_ref().is_some_and(|look| !look.is_finished()) {
                // The previous check is still running and may have begun before this change.
                kept.due = now + SETTLE;
                continue;
            }
            kept.due = now + kept.refresh;
            let keeper = kept.keeper.clone();
            kept.look = Some(tokio::task::spawn_blocking(move || {
                if let Some(keeper) = keeper.upgrade() {
                    keeper.look();
                }
            }));
        }
    }
}

#[async_trait]
impl BackgroundService for Files {
    async fn start(&self, mut shutdown: ShutdownWatch) {
        tokio::select! {
            () = self.run() => {}
            _ = shutdown.changed() => {}
        }
    }
}

/// The absolute directory of a file, as the system reports it.
fn directory(file: &Path) -> PathBuf {
    let directory = file.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    std::path::absolute(directory).unwrap_or_else(|_| directory.to_owned())
}

/// The changes that the system reported since the last [`Told::take`].
#[derive(Default)]
struct Told {
    changed: Mutex<Changed>,
    any: Notify,
}

#[derive(Default)]
struct Changed {
    paths: BTreeSet<PathBuf>,
    /// Any file may have changed.
    all: bool,
}

impl Told {
    fn tell(&self, event: notify::Result<notify::Event>) {
        let mut changed = self.changed.lock().unwrap_or_else(PoisonError::into_inner);
        match event {
            // Reads are events, too, and come from Forebay itself.
            Ok(event) if matches!(event.kind, EventKind::Access(_)) => return,
            Ok(event) if !event.need_rescan() => changed.paths.extend(event.paths),
            _ => changed.all = true,
        }
        drop(changed);
        self.any.notify_one();
    }

    fn take(&self) -> Changed {
        std::mem::take(&mut *self.changed.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Changed {
    fn concerns(&self, directories: &[PathBuf]) -> bool {
        let within = |directory: &PathBuf| {
            self.paths.contains(directory) || self.paths.iter().any(|path| path.parent() == Some(directory))
        };
        self.all || directories.iter().any(within)
    }
}

/// The directories that are watched.
struct Watched {
    watcher: Option<RecommendedWatcher>,
    directories: BTreeSet<PathBuf>,
    /// Directories that cannot be watched; each was logged once.
    refused: BTreeSet<PathBuf>,
}

impl Watched {
    fn new(told: Arc<Told>) -> Watched {
        let watcher = notify::recommended_watcher(move |event| told.tell(event));
        if let Err(error) = &watcher {
            tracing::warn!("no file can be watched; each is checked only periodically: {error}");
        }
        Watched { watcher: watcher.ok(), directories: BTreeSet::new(), refused: BTreeSet::new() }
    }

    fn watch(&mut self, directory: &Path, what: &str, refresh: Duration) {
        let Some(watcher) = self.watcher.as_mut().filter(|_| !self.directories.contains(directory)) else { return };
        match watcher.watch(directory, RecursiveMode::NonRecursive) {
            Ok(()) => {
                self.refused.remove(directory);
                self.directories.insert(directory.to_owned());
            }
            Err(error) => {
                if self.refused.insert(directory.to_owned()) {
                    tracing::warn!(
                        "the files of {what} cannot be watched; they are checked every {refresh:?}: {error}"
                    );
                }
            }
        }
    }

    /// Ends the watch of directories that were removed or replaced, so that they are watched again.
    fn forget(&mut self, changed: &Changed) {
        for path in &changed.paths {
            if self.directories.remove(path)
                && let Some(watcher) = &mut self.watcher
            {
                // It may be gone.
                let _ = watcher.unwatch(path);
            }
        }
    }

    fn keep_only(&mut self, wanted: &BTreeSet<&PathBuf>) {
        let unwanted: Vec<_> =
            self.directories.iter().filter(|directory| !wanted.contains(directory)).cloned().collect();
        for directory in unwanted {
            if let Some(watcher) = &mut self.watcher {
                let _ = watcher.unwatch(&directory);
            }
            self.directories.remove(&directory);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::time::Duration;

    use super::*;

    #[derive(Default)]
    struct Looks(AtomicUsize);

    impl Keeper for Looks {
        fn look(&self) {
            self.0.fetch_add(1, Ordering::SeqCst);
        }
    }

    impl Looks {
        async fn reach(&self, count: usize) {
            let long = Duration::from_secs(45);
            let reached = async {
                while self.0.load(Ordering::SeqCst) < count {
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
            };
            tokio::time::timeout(long, reached).await.expect("it looks");
        }
    }

    const NEVER: Duration = Duration::from_secs(3600);

    #[tokio::test]
    async fn the_owner_of_a_file_looks_when_it_changes_however_it_is_replaced() {
        let (dir, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let (files, looks, others) = (Files::default(), Arc::new(Looks::default()), Arc::new(Looks::default()));
        let file = dir.path().join("users");
        std::fs::write(&file, "a").unwrap();
        files.keep("users", &[&file], NEVER, &looks);
        files.keep("others", &[&other.path().join("keys")], NEVER, &others);
        let run = tokio::spawn({
            let files = files.clone();
            async move { files.run().await }
        });
        // Nothing reports when the watch is set up: writing goes on until it is seen.
        let written = async {
            while looks.0.load(Ordering::SeqCst) == 0 {
                std::fs::write(&file, "b").unwrap();
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(45), written).await.expect("a change is seen");
        let before = looks.0.load(Ordering::SeqCst);
        let new = dir.path().join("new");
        std::fs::write(&new, "c").unwrap();
        std::fs::rename(&new, &file).unwrap();
        looks.reach(before + 1).await;
        assert_eq!(others.0.load(Ordering::SeqCst), 0, "theirs are elsewhere");

        let late = Arc::new(Looks::default());
        files.keep("late", &[&file], Duration::from_millis(10), &late);
        late.reach(3).await;
        drop(late);
        run.abort();
    }

    #[test]
    fn a_change_concerns_who_has_a_file_in_its_directory() {
        let changed = Changed { paths: [PathBuf::from("/a/b")].into(), all: false };
        assert!(changed.concerns(&["/a".into()]) && changed.concerns(&["/a/b".into()]));
        assert!(!changed.concerns(&["/".into(), "/a/b/c".into(), "/b".into()]));
        assert!(Changed { paths: BTreeSet::new(), all: true }.concerns(&["/b".into()]));
    }

    #[test]
    fn a_file_without_a_directory_is_in_the_working_directory() {
        assert_eq!(directory(Path::new("users")), std::env::current_dir().unwrap());
        assert_eq!(directory(Path::new("/etc/users")), Path::new("/etc"));
    }
}
