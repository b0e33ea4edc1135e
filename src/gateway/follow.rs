//! Follows the file of the configuration (`run --watch`), and has it reloaded.
//!
//! Directories are watched and not files: an editor puts a new file in the place of the old one, and Kubernetes turns a
//! link to a directory in which a link to the file leads. The result is in the log and the metrics.

use std::path::{Path, PathBuf};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

use notify::{RecursiveMode, Watcher};

use super::reload::Reloads;

/// From the first word of a change until the file is read: editors and copies write in several steps.
const SETTLE: Duration = Duration::from_millis(200);

/// It is read after this time, however much is written there still.
const SETTLE_MAX: Duration = Duration::from_secs(2);

/// How often the file is read without any word of a change: network file systems tell of none.
const REFRESH: Duration = Duration::from_secs(30);

/// Watches these files on a thread of its own, to the end of the process.
///
/// # Errors
///
/// The system has no thread to give.
pub fn start(files: Vec<PathBuf>, reloads: Reloads) -> std::io::Result<()> {
    thread::Builder::new().name("watch".to_owned()).spawn(move || run(&files, &reloads)).map(drop)
}

fn run(files: &[PathBuf], reloads: &Reloads) {
    let (told, changes) = channel();
    let mut watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
        // That a file is read is an event as well, and ours.
        if !event.is_ok_and(|event| event.kind.is_access()) {
            // An error means that the watcher has ended.
            let _ = told.send(());
        }
    });
    for directory in directories(files) {
        let watched = match &mut watcher {
            Ok(watcher) => watcher.watch(&directory, RecursiveMode::NonRecursive),
            Err(error) => Err(notify::Error::generic(&error.to_string())),
        };
        match watched {
            Ok(()) => tracing::info!(directory = %directory.display(), "the configuration is watched"),
            Err(error) => tracing::warn!(
                directory = %directory.display(),
                "the configuration is looked at every {} s only: {error}",
                REFRESH.as_secs()
            ),
        }
    }
    loop {
        match changes.recv_timeout(REFRESH) {
            Ok(()) => {
                // What comes while it settles belongs to the same change. Something else may be written there all
                // the time, such as a log.
                let begun = Instant::now();
                while begun.elapsed() < SETTLE_MAX && changes.recv_timeout(SETTLE).is_ok() {}
            }
            Err(RecvTimeoutError::Timeout) => {}
            // Without a watcher there are only the regular looks.
            Err(RecvTimeoutError::Disconnected) => thread::sleep(REFRESH),
        }
        reloads.apply_if_changed("watch");
    }
}

/// The directories that the files are named in.
fn directories(files: &[PathBuf]) -> Vec<PathBuf> {
    let mut directories: Vec<PathBuf> = files
        .iter()
        .map(|file| match file.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent.to_owned(),
            _ => Path::new(".").to_owned(),
        })
        .collect();
    directories.sort();
    directories.dedup();
    directories
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_directory_is_watched_once() {
        let files = ["forebay.yaml", "conf/a.yaml", "conf/b.yaml", "/etc/forebay.yaml"].map(PathBuf::from);
        let watched: Vec<String> = directories(&files).iter().map(|path| path.display().to_string()).collect();
        assert_eq!(watched, ["/etc", ".", "conf"]);
    }
}
