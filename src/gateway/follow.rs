//! Watches the files of the configuration (`run --watch`) and triggers reloads.
//!
//! It watches directories, not files: an editor replaces a file by a new one, and Kubernetes switches a symbolic
//! link to a directory. The set of directories may change with every reload because files can include others.
//! Results of reloads are in the log and the metrics.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use notify::{RecommendedWatcher, RecursiveMode, Watcher};

/// Delay between the first event and the reload: editors and copies write in several steps.
const SETTLE: Duration = Duration::from_millis(200);

/// Longest delay, even if events continue.
const SETTLE_MAX: Duration = Duration::from_secs(2);

/// How often the file is checked without an event: network file systems send none.
const REFRESH: Duration = Duration::from_secs(30);

/// The directories with files of the configuration.
#[derive(Clone)]
pub struct Watched {
    directories: Arc<Mutex<BTreeSet<PathBuf>>>,
    /// Wakes the watcher.
    told: Sender<()>,
}

impl Watched {
    /// Replaces the set of directories.
    pub fn set(&self, directories: &BTreeSet<PathBuf>) {
        self.change(|known| *known = whole(directories));
    }

    /// Adds directories.
    pub fn add(&self, directories: &BTreeSet<PathBuf>) {
        self.change(|known| known.extend(whole(directories)));
    }

    fn change(&self, change: impl FnOnce(&mut BTreeSet<PathBuf>)) {
        let mut directories = self.lock();
        let before = directories.clone();
        change(&mut directories);
        if *directories != before {
            // An error means that no watcher exists.
            let _ = self.told.send(());
        }
    }

    /// Held for a short read or change, never on a worker.
    fn lock(&self) -> MutexGuard<'_, BTreeSet<PathBuf>> {
        self.directories.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The same directories as absolute paths.
fn whole(directories: &BTreeSet<PathBuf>) -> BTreeSet<PathBuf> {
    directories.iter().map(|path| std::path::absolute(path).unwrap_or_else(|_| path.clone())).collect()
}

/// Watches the files.
pub struct Follower {
    watched: Watched,
    changes: Receiver<()>,
}

impl Follower {
    /// A follower that starts with these directories.
    pub fn new(directories: &BTreeSet<PathBuf>) -> Follower {
        let (told, changes) = channel();
        Follower { watched: Watched { directories: Arc::new(Mutex::new(whole(directories))), told }, changes }
    }

    /// The watched directories.
    pub fn watched(&self) -> Watched {
        self.watched.clone()
    }

    /// Watches on its own thread until the process ends, and calls `reload` when files may have changed.
    ///
    /// # Errors
    ///
    /// The system has no thread left.
    pub fn start(self, reload: impl Fn() + Send + 'static) -> std::io::Result<()> {
        thread::Builder::new().name("watch".to_owned()).spawn(move || self.run(&reload)).map(drop)
    }

    fn run(self, reload: &impl Fn()) {
        let told = self.watched.told.clone();
        let mut watch = Watch::new(move |event: notify::Result<notify::Event>| {
            // Ignores read access, which comes from Forebay itself.
            if !event.is_ok_and(|event| event.kind.is_access()) {
                // An error means that the follower has ended.
                let _ = told.send(());
            }
        });
        loop {
            let new = watch.look_at(&self.watched.lock().clone());
            if new {
                // Detects changes from before the watch began.
                reload();
            }
            if self.changes.recv_timeout(REFRESH).is_ok() {
                // Events during the delay belong to the same change. Other files, such as a log, may cause events
                // all the time.
                let begun = Instant::now();
                while begun.elapsed() < SETTLE_MAX && self.changes.recv_timeout(SETTLE).is_ok() {}
            }
            reload();
        }
    }
}

/// The directories that are watched.
struct Watch {
    watcher: notify::Result<RecommendedWatcher>,
    /// Each with its device and inode number: a directory that was recreated under the same name is different.
    known: BTreeMap<PathBuf, Option<(u64, u64)>>,
}

impl Watch {
    fn new(told: impl notify::EventHandler) -> Watch {
        Watch { watcher: notify::recommended_watcher(told), known: BTreeMap::new() }
    }

    /// Watches exactly these directories; returns whether any of them is new.
    fn look_at(&mut self, directories: &BTreeSet<PathBuf>) -> bool {
        let number = |path: &PathBuf| fs::metadata(path).ok().map(|data| (data.dev(), data.ino()));
        let wanted: BTreeMap<PathBuf, _> = directories.iter().map(|path| (path.clone(), number(path))).collect();
        let gone = self.known.iter().filter(|(path, number)| wanted.get(*path) != Some(*number));
        if let Ok(watcher) = &mut self.watcher {
            for (path, _) in gone {
                // The directory may no longer exist; then its watch is gone, too.
                let _ = watcher.unwatch(path);
            }
        }
        let mut any = false;
        for directory in
            wanted.iter().filter(|(path, number)| self.known.get(*path) != Some(*number)).map(|(path, _)| path)
        {
            any = true;
            let watched = match &mut self.watcher {
                Ok(watcher) => watcher.watch(directory, RecursiveMode::NonRecursive),
                Err(error) => Err(notify::Error::generic(&error.to_string())),
            };
            match watched {
                Ok(()) => tracing::info!(directory = %directory.display(), "the configuration is watched"),
                Err(error) => tracing::warn!(
                    directory = %directory.display(),
                    "the configuration is checked every {} s only: {error}",
                    REFRESH.as_secs()
                ),
            }
        }
        self.known = wanted;
        any
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_watcher_is_woken_when_the_directories_are_others() {
        let set = |paths: &[&str]| -> BTreeSet<PathBuf> { paths.iter().map(PathBuf::from).collect() };
        let follower = Follower::new(&set(&["/a"]));
        let watched = follower.watched();
        watched.set(&set(&["/a"]));
        watched.add(&set(&["/a"]));
        assert!(follower.changes.try_recv().is_err(), "they are the same");
        watched.add(&set(&["/b"]));
        watched.set(&set(&["/c", "/a"]));
        assert_eq!(follower.changes.try_iter().count(), 2);
        assert_eq!(*watched.lock(), set(&["/a", "/c"]));
    }

    #[test]
    fn a_directory_that_is_made_anew_is_watched_anew() {
        let dir = tempfile::tempdir().unwrap();
        let inner = dir.path().join("conf.d");
        let wanted = BTreeSet::from([inner.clone()]);
        fs::create_dir(&inner).unwrap();
        let (told, changes) = channel();
        let mut watch = Watch::new(move |_| _ = told.send(()));
        assert!(watch.look_at(&wanted) && !watch.look_at(&wanted));
        // The new one is created first, so that it cannot get the inode number of the old one.
        let other = dir.path().join("other");
        fs::create_dir(&other).unwrap();
        fs::remove_dir(&inner).unwrap();
        fs::rename(&other, &inner).unwrap();
        assert!(watch.look_at(&wanted));
        changes.try_iter().for_each(drop);
        fs::write(inner.join("a.yaml"), "").unwrap();
        assert!(changes.recv_timeout(Duration::from_secs(60)).is_ok(), "a change in the new one is told");
    }
}
