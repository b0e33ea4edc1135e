//! `forebay import`: converts an nginx configuration and reports what has no equivalent.

use std::path::PathBuf;

use clap::Args;

use super::init::write_new;
use super::{Failure, complain, print};
use crate::config::with_schema;
use crate::gateway::Builder;
use crate::import::{self, Error, Fate};

/// The arguments of `forebay import`.
#[derive(Args)]
#[command(after_help = "\
The configuration goes to standard output, or to the file of --output; the report goes to standard error.
Files that are included are read from the folder of the first one.

Example:
  forebay import /etc/nginx/nginx.conf --output forebay.yaml
  forebay check -c forebay.yaml")]
pub struct Import {
    /// The nginx configuration
    file: PathBuf,
    /// The file to write; it must not exist yet
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Fail if a line has no equivalent
    #[arg(long)]
    strict: bool,
}

/// Converts the file and reports on its lines.
pub fn import(builder: &Builder, asked: &Import) -> Result<(), Failure> {
    let imported = import::file(&asked.file).map_err(|error| match error {
        Error::Unreadable(path, error) => Failure::io(&format!("read {}", path.display()))(error),
        Error::Fault(fault) => Failure::Config(format!("{}:{}: {}", fault.place.file, fault.place.line, fault.message)),
        Error::NoServer(file) => Failure::Config(format!("{file} has no `server`: there is nothing to import")),
    })?;
    let written = with_schema(&imported.yaml);
    match &asked.output {
        Some(path) => write_new(path, &written)?,
        None => print(written.trim_end())?,
    }
    complain(imported.report().trim_end());
    let name = asked.output.as_ref().map_or("forebay.yaml".into(), |path| path.display().to_string());
    builder.parse(&name, &imported.yaml).map_err(Failure::Report)?;
    match imported.count(Fate::Lost) {
        0 => Ok(()),
        lost if asked.strict => Err(Failure::Runtime(format!("{lost} directives have no equivalent"))),
        _ => Ok(()),
    }
}
