//! `server.pid_file`: the PID of the serving process.
//!
//! It is first written to a file next to the target and then renamed, so that readers never see a partial number, and a
//! process that fails to start changes nothing.

use std::fs;
use std::io;
use std::path::PathBuf;

use crate::error::BuildError;

/// The PID file of this process, not yet renamed.
pub struct PidFile {
    path: PathBuf,
    beside: PathBuf,
}

impl PidFile {
    /// Writes the PID to a file next to the target.
    ///
    /// # Errors
    ///
    /// The directory is not writable.
    pub fn prepare(path: &str) -> Result<PidFile, BuildError> {
        let file = PidFile { path: path.into(), beside: format!("{path}.{}", std::process::id()).into() };
        let wrong = |error| BuildError::new("server.pid_file", format!("this file cannot be written: {error}"));
        file.write().map_err(wrong)?;
        Ok(file)
    }

    fn write(&self) -> io::Result<()> {
        fs::write(&self.beside, format!("{}\n", std::process::id()))
    }

    /// Renames it to the target: this process serves now.
    ///
    /// # Errors
    ///
    /// The file cannot be renamed.
    pub fn put(&self) -> io::Result<()> {
        fs::rename(&self.beside, &self.path)
    }

    /// Restores the number of this process, which still serves, after a process that failed to take over replaced it.
    ///
    /// # Errors
    ///
    /// The file cannot be written.
    pub fn keep(&self) -> io::Result<()> {
        if self.is_in_place() {
            return Ok(());
        }
        self.write()?;
        self.put()
    }

    fn is_in_place(&self) -> bool {
        fs::read_to_string(&self.path).is_ok_and(|text| text.trim() == std::process::id().to_string())
    }
}

impl Drop for PidFile {
    /// Removes it, unless another process has replaced it.
    fn drop(&mut self) {
        // It was already renamed.
        let _ = fs::remove_file(&self.beside);
        if self.is_in_place() {
            // Another process may have removed it.
            let _ = fs::remove_file(&self.path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_there_while_this_process_serves_and_stays_if_it_is_anothers() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("forebay.pid").display().to_string();
        fs::write(&path, "1\n").expect("a file");
        let file = PidFile::prepare(&path).expect("a file");
        assert_eq!(fs::read_to_string(&path).expect("a file"), "1\n", "this process does not serve yet");
        file.put().expect("a place");
        assert_eq!(fs::read_to_string(&path).expect("a file"), format!("{}\n", std::process::id()));
        fs::write(&path, "1\n").expect("a file");
        file.keep().expect("a place");
        assert_eq!(fs::read_to_string(&path).expect("a file"), format!("{}\n", std::process::id()));
        file.keep().expect("it is in its place");
        drop(file);
        assert_eq!(fs::read_dir(folder.path()).expect("a folder").count(), 0);
        let file = PidFile::prepare(&path).expect("a file");
        file.put().expect("a place");
        fs::write(&path, "1\n").expect("a file");
        drop(file);
        assert_eq!(fs::read_to_string(&path).expect("a file"), "1\n");
        assert!(PidFile::prepare("/proc/missing/forebay.pid").is_err());
    }
}
