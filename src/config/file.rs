//! Reads files named in a configuration, and the configuration itself: regular files of a limited size.
//!
//! Opening a named pipe blocks until another process writes to it, and reading a device may never end. So this
//! module rejects everything but a regular file, or a link to one, before it opens it.

use std::fmt;
use std::fs::{self, File, FileType, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;

use super::units::Size;

/// Why a file could not be read.
#[derive(Debug)]
pub enum Unreadable {
    /// The system call failed.
    System(io::Error),
    /// The file is not a regular file, but this.
    NotPlain(&'static str),
    /// The file is larger than this limit.
    TooLarge(Size),
}

impl fmt::Display for Unreadable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Unreadable::System(error) => error.fmt(f),
            Unreadable::NotPlain(kind) => write!(f, "it is {kind} and not a plain file"),
            Unreadable::TooLarge(most) => write!(f, "it is larger than {most}"),
        }
    }
}

impl From<io::Error> for Unreadable {
    fn from(error: io::Error) -> Self {
        Unreadable::System(error)
    }
}

/// Opens a regular file and returns the size it reports. Some system files report a wrong size.
///
/// # Errors
///
/// The file is missing, not readable, or not a regular file.
pub fn open(path: &Path) -> Result<(File, u64), Unreadable> {
    // Checks before opening, since opening a device may have effects, and again afterwards to exclude a race.
    plain(fs::metadata(path)?.file_type())?;
    let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY).open(path)?;
    let metadata = file.metadata()?;
    plain(metadata.file_type())?;
    Ok((file, metadata.len()))
}

/// Reads a regular file of at most this size.
///
/// # Errors
///
/// As for [`open`], or the file is larger.
pub fn read(path: &Path, most: Size) -> Result<Vec<u8>, Unreadable> {
    let (file, length) = open(path)?;
    let mut bytes = Vec::new();
    if length <= most.0 {
        file.take(most.0.saturating_add(1)).read_to_end(&mut bytes)?;
    }
    if length.max(bytes.len() as u64) > most.0 { Err(Unreadable::TooLarge(most)) } else { Ok(bytes) }
}

fn plain(kind: FileType) -> Result<(), Unreadable> {
    let kind = match kind {
        _ if kind.is_file() => return Ok(()),
        _ if kind.is_dir() => "a directory",
        _ if kind.is_fifo() => "a named pipe",
        _ if kind.is_socket() => "a socket",
        _ => "a device",
    };
    Err(Unreadable::NotPlain(kind))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;
    use std::os::unix::net::UnixListener;

    use rustix::fs::{CWD, FileType, Mode, mknodat};

    use super::*;

    #[test]
    fn a_plain_file_is_read_to_its_end_also_by_a_link() {
        let dir = tempfile::tempdir().unwrap();
        let [file, link] = ["file", "link"].map(|name| dir.path().join(name));
        fs::write(&file, "text").unwrap();
        symlink(&file, &link).unwrap();
        for path in [file, link] {
            assert_eq!(read(&path, Size(4)).unwrap(), b"text");
            assert!(matches!(read(&path, Size(3)), Err(Unreadable::TooLarge(Size(3)))));
        }
        assert!(!read(Path::new("/proc/self/status"), Size(1 << 20)).unwrap().is_empty(), "one without a known size");
        assert!(matches!(read(Path::new("/proc/self/status"), Size(10)), Err(Unreadable::TooLarge(_))));
    }

    #[test]
    fn what_is_no_plain_file_is_refused_without_waiting_also_by_a_link() {
        let dir = tempfile::tempdir().unwrap();
        let [pipe, socket, link] = ["pipe", "socket", "link"].map(|name| dir.path().join(name));
        mknodat(CWD, &pipe, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
        let _socket = UnixListener::bind(&socket).unwrap();
        symlink(&pipe, &link).unwrap();
        let said = |path: &Path| read(path, Size(10)).unwrap_err().to_string();
        for path in [&pipe, &link] {
            assert_eq!(said(path), "it is a named pipe and not a plain file");
        }
        assert_eq!(said(&socket), "it is a socket and not a plain file");
        assert_eq!(said(Path::new("/dev/zero")), "it is a device and not a plain file");
        assert_eq!(said(dir.path()), "it is a directory and not a plain file");
    }

    #[test]
    fn what_the_system_says_is_passed_on() {
        let error = read(Path::new("/no/such/file"), Size(10)).unwrap_err();
        assert_eq!(error.to_string(), "No such file or directory (os error 2)");
    }
}
