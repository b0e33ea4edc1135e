//! `server.pid_file`: the number of the process that serves, for those who send it signals.
//!
//! It is written beside the file first and then put in its place, so that no reader sees half a number, and a process that
//! does not come to serve changes nothing.

use std::fs;
use std::io;
use std::path::PathBuf;

use crate::error::BuildError;

/// The file of this process, not in its place yet.
pub struct PidFile {
    path: PathBuf,
    beside: PathBuf,
}

impl PidFile {
    /// Writes the number of this process beside the file.
    ///
    /// # Errors
    ///
    /// Nothing can be written there.
    pub fn prepare(path: &str) -> Result<PidFile, BuildError> {
        let own = std::process::id();
        let file = PidFile { path: path.into(), beside: format!("{path}.{own}").into() };
        let wrong = |error| BuildError::new("server.pid_file", format!("this file cannot be written: {error}"));
        fs::write(&file.beside, format!("{own}\n")).map_err(wrong)?;
        Ok(file)
    }

    /// Puts it in its place: this process serves.
    ///
    /// # Errors
    ///
    /// It cannot be put there.
    pub fn put(&self) -> io::Result<()> {
        fs::rename(&self.beside, &self.path)
    }
}

impl Drop for PidFile {
    /// Removes it, unless it is another process's by now.
    fn drop(&mut self) {
        // It is in its place.
        let _ = fs::remove_file(&self.beside);
        if fs::read_to_string(&self.path).is_ok_and(|text| text.trim() == std::process::id().to_string()) {
            // Somebody else may have removed it.
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
