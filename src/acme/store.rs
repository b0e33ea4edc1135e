//! The store of accounts, keys and certificates: `STORE/ISSUER/`, with files only Forebay can read, replaced
//! atomically.
//!
//! Each certificate has `NAME.pem`, with the certificate, its chain and its key, and `NAME.json`, with its record.
//! If several processes share a store, the one that holds the lock on `lock` orders; all serve the files.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, chown};
use std::path::{Path, PathBuf};

use rustix::fs::{Access, FlockOperation, access, flock};
use serde::Serialize;
use serde::de::DeserializeOwned;

/// Largest file of the store.
const FILE_BYTES_MAX: u64 = 1 << 20;
/// The prefix of challenge files.
const CHALLENGE: &str = "challenge-";

/// The files of one issuer.
#[derive(Clone, Debug)]
pub struct Store {
    dir: PathBuf,
}

/// A locked file: exclusive for the ordering process, shared for the followers.
#[derive(Debug)]
pub struct Lock(#[expect(dead_code, reason = "it is locked while it is open")] File);

impl Store {
    /// The store of this issuer.
    pub fn of(store: &str, issuer: &str) -> Store {
        Store { dir: Path::new(store).join(issuer) }
    }

    /// The file of the certificate with this first name.
    pub fn certificate(&self, name: &str) -> PathBuf {
        self.dir.join(format!("{name}.pem"))
    }

    /// The file of its record.
    pub fn record(&self, name: &str) -> PathBuf {
        self.dir.join(format!("{name}.json"))
    }

    /// The file of an account; `key` identifies it.
    pub fn account(&self, key: u64) -> PathBuf {
        self.dir.join(format!("account-{key:016x}.json"))
    }

    /// The file of a challenge's answer; `key` identifies it.
    pub fn challenge(&self, key: u64) -> PathBuf {
        self.dir.join(format!("{CHALLENGE}{key:016x}.json"))
    }

    /// The files of all current answers.
    pub fn challenges(&self) -> Vec<PathBuf> {
        let files = fs::read_dir(&self.dir).into_iter().flatten().flatten();
        let named = files.filter(|file| {
            let name = file.file_name();
            let name = name.to_string_lossy();
            name.starts_with(CHALLENGE) && name.ends_with(".json")
        });
        named.map(|file| file.path()).collect()
    }

    /// Creates its directory and the parents, owned by this user and group if given.
    ///
    /// # Errors
    ///
    /// The system call failed.
    pub fn prepare(&self, owner: Option<(u32, u32)>) -> io::Result<()> {
        let missing: Vec<&Path> = self.dir.ancestors().take_while(|dir| !dir.exists()).collect();
        for dir in missing.into_iter().rev().filter(|dir| !dir.as_os_str().is_empty()) {
            match DirBuilder::new().mode(0o700).create(dir) {
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                made => made?,
            }
            if let Some((user, group)) = owner {
                chown(dir, Some(user), Some(group))?;
            }
        }
        Ok(())
    }

    /// Checks that it is writable.
    ///
    /// # Errors
    ///
    /// The system call failed.
    pub fn probe(&self) -> io::Result<()> {
        let path = self.dir.join(format!("probe-{}", std::process::id()));
        let made = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&path);
        made.and_then(|_| fs::remove_file(&path))
    }

    /// Locks the store, unless another process has.
    ///
    /// # Errors
    ///
    /// The system call failed.
    pub fn lock(&self) -> io::Result<Option<Lock>> {
        self.try_lock("lock", FlockOperation::NonBlockingLockExclusive)
    }

    /// Shows the ordering process that this one also answers challenges, while the lock is held.
    ///
    /// # Errors
    ///
    /// The system call failed.
    pub fn follow(&self) -> io::Result<Option<Lock>> {
        self.try_lock("followers", FlockOperation::NonBlockingLockShared)
    }

    /// Whether other processes also answer challenges.
    pub fn is_followed(&self) -> bool {
        matches!(self.try_lock("followers", FlockOperation::NonBlockingLockExclusive), Ok(None))
    }

    fn try_lock(&self, file: &str, operation: FlockOperation) -> io::Result<Option<Lock>> {
        let path = self.dir.join(file);
        let file = OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(path)?;
        match flock(&file, operation) {
            Ok(()) => Ok(Some(Lock(file))),
            Err(rustix::io::Errno::WOULDBLOCK) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// Whether the directory could be created; creates nothing.
    ///
    /// # Errors
    ///
    /// The system call failed.
    pub fn inspect(&self) -> io::Result<()> {
        let there = self.dir.ancestors().find(|dir| dir.exists()).unwrap_or(Path::new("."));
        if !fs::metadata(there)?.is_dir() {
            return Err(io::Error::from(io::ErrorKind::NotADirectory));
        }
        Ok(access(there, Access::WRITE_OK | Access::EXEC_OK)?)
    }
}

/// Replaces a file atomically and durably: a reader gets the whole old or the whole new content.
///
/// # Errors
///
/// The system call failed; the old content is still there.
pub fn replace(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let beside = path.with_extension("new");
    // A left-over file may have another mode.
    match fs::remove_file(&beside) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        removed => removed?,
    }
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&beside)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    fs::rename(&beside, path)?;
    File::open(path.parent().unwrap_or(Path::new(".")))?.sync_all()
}

/// The same for a value, as JSON.
///
/// # Errors
///
/// As for [`replace`].
pub fn replace_json(path: &Path, value: &impl Serialize) -> io::Result<()> {
    replace(path, &zeroize::Zeroizing::new(serde_json::to_vec_pretty(value)?))
}

/// Reads a value from a JSON file. `None`: the file does not exist.
///
/// # Errors
///
/// The system call failed, or the file has other content.
pub fn read_json<T: DeserializeOwned>(path: &Path) -> io::Result<Option<T>> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    let mut bytes = zeroize::Zeroizing::new(Vec::new());
    file.take(FILE_BYTES_MAX).read_to_end(&mut bytes)?;
    Ok(Some(serde_json::from_slice(&bytes)?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    fn mode(path: &Path) -> u32 {
        fs::metadata(path).expect("a file").permissions().mode() & 0o777
    }

    #[test]
    fn what_is_kept_is_for_its_owner_alone_and_whole_at_any_time() {
        let dir = tempfile::tempdir().expect("a directory");
        let root = dir.path().join("lib/acme");
        let store = Store::of(root.to_str().expect("a path"), "ours");
        store.inspect().expect("it could be made");
        store.prepare(None).expect("a directory");
        store.probe().expect("files can be made");
        assert_eq!([mode(&root), mode(&root.join("ours"))], [0o700; 2]);

        let path = store.certificate("a.test");
        replace(&path, b"one").expect("a file");
        fs::write(path.with_extension("new"), b"left behind").expect("a file");
        replace(&path, b"two").expect("a file");
        assert_eq!((fs::read(&path).expect("a file").as_slice(), mode(&path)), (&b"two"[..], 0o600));
        assert_eq!(fs::read_dir(root.join("ours")).expect("files").count(), 1, "nothing is left beside it");

        assert_eq!(read_json::<u32>(&store.record("a.test")).expect("none"), None);
        replace_json(&store.record("a.test"), &7).expect("a file");
        assert_eq!(read_json::<u32>(&store.record("a.test")).expect("a number"), Some(7));
        assert!(read_json::<u32>(&path).is_err(), "no JSON");
    }

    #[test]
    fn one_process_has_the_lock() {
        let dir = tempfile::tempdir().expect("a directory");
        let store = Store { dir: dir.path().to_owned() };
        let first = store.lock().expect("a lock file").expect("the lock");
        assert!(store.lock().expect("a lock file").is_none());
        drop(first);
        assert!(store.lock().expect("a lock file").is_some());

        assert!(!store.is_followed());
        let followers = [store.follow(), store.follow()];
        assert!(followers.iter().all(|lock| matches!(lock, Ok(Some(_)))) && store.is_followed());
        drop(followers);
        assert!(!store.is_followed());
    }

    #[test]
    fn a_store_that_cannot_be_made_is_found_out() {
        let dir = tempfile::tempdir().expect("a directory");
        fs::write(dir.path().join("file"), b"").expect("a file");
        let store = Store::of(dir.path().join("file").to_str().expect("a path"), "ours");
        assert_eq!(store.inspect().expect_err("an error").kind(), io::ErrorKind::NotADirectory);
        assert!(store.prepare(None).is_err());
    }
}
