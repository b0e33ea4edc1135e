//! `forebay fmt`: formats files and keeps their comments.

use std::fs;
use std::io::{self, Read};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use clap::Args;

use super::{ConfigFile, Failure, print};
use crate::config::units::Size;
use crate::config::{file, normal};
use crate::gateway::Builder;

/// Largest file that is read.
const FILE_MAX: Size = Size::kib(16 * 1024);

/// The arguments of `forebay fmt`.
#[derive(Args)]
pub struct Fmt {
    #[command(flatten)]
    config: ConfigFile,
    /// Change nothing; list the files that are not formatted, and exit with 1 if there are any
    #[arg(long)]
    check: bool,
    /// The files; `-` formats standard input to standard output. Default: the configuration and all files that it
    /// includes
    #[arg(value_name = "FILES", conflicts_with = "path")]
    files: Vec<PathBuf>,
}

/// Formats files and lists those that changed.
pub fn fmt(builder: &Builder, asked: Fmt) -> Result<(), Failure> {
    let Fmt { config, check, files } = asked;
    if files == [Path::new("-")] {
        return standard_input(check);
    }
    let files = match files.is_empty() {
        false => files,
        true => {
            let (_, config) = config.load(builder)?;
            config.files().map(PathBuf::from).collect()
        }
    };
    // All files are read first: if one has errors, none is changed.
    let mut changed = Vec::new();
    for path in files {
        let text = read(&path)?;
        let normal = normal(&path.display().to_string(), &text).map_err(Failure::Report)?;
        if normal != text {
            changed.push((path, normal));
        }
    }
    for (path, normal) in &changed {
        if !check {
            write(path, normal).map_err(Failure::io(&format!("write {}", path.display())))?;
        }
        print(&path.display().to_string())?;
    }
    match changed.len() {
        1.. if check => Err(Failure::Runtime(format!(
            "not in their normal form: {} files; `forebay fmt` brings them into it",
            changed.len()
        ))),
        _ => Ok(()),
    }
}

fn standard_input(check: bool) -> Result<(), Failure> {
    let mut text = String::new();
    let read = io::stdin().lock().take(FILE_MAX.0 + 1).read_to_string(&mut text);
    read.map_err(Failure::io("read from standard input"))?;
    if text.len() as u64 > FILE_MAX.0 {
        return Err(Failure::Config(format!("standard input is larger than {FILE_MAX}")));
    }
    let normal = normal("standard input", &text).map_err(Failure::Report)?;
    match check {
        true if normal != text => Err(Failure::Runtime("standard input is not in its normal form".to_owned())),
        true => Ok(()),
        false => print(normal.strip_suffix('\n').unwrap_or(&normal)),
    }
}

fn read(path: &Path) -> Result<String, Failure> {
    let wrong = |why: String| Failure::Config(format!("{} cannot be read: {why}", path.display()));
    let bytes = file::read(path, FILE_MAX).map_err(|error| wrong(error.to_string()))?;
    String::from_utf8(bytes).map_err(|_| wrong("it is not UTF-8 text".to_owned()))
}

/// Replaces a file atomically: readers never see a partial file. A symbolic link stays a link.
fn write(path: &Path, text: &str) -> io::Result<()> {
    let path = fs::canonicalize(path)?;
    let mode = fs::metadata(&path)?.permissions().mode();
    let mut fresh = tempfile::NamedTempFile::new_in(path.parent().unwrap_or(Path::new("/")))?;
    io::Write::write_all(&mut fresh, text.as_bytes())?;
    fresh.as_file().set_permissions(fs::Permissions::from_mode(mode))?;
    fresh.as_file().sync_all()?;
    fresh.persist(path).map(drop).map_err(|error| error.error)
}
