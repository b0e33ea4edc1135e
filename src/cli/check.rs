//! `forebay check`: reports errors and warnings of a configuration.

use std::io;

use super::{ConfigFile, Failure, colourful, complain, print};
use crate::gateway::{Builder, Inspection};

/// Prints a summary if the configuration is valid; otherwise all errors.
pub fn check(builder: &Builder, file: ConfigFile) -> Result<(), Failure> {
    let (path, config) = file.load(builder)?;
    let Inspection { errors, warnings } = builder.inspect(&config);
    if !errors.is_empty() {
        return Err(Failure::Report(config.report(&errors)));
    }
    let warnings = config.warnings_with(&warnings);
    if !warnings.is_empty() {
        complain(&warnings.render(colourful(&io::stderr())));
    }
    let mut text = format!(
        "{}: ok ({}, {}, {})",
        path.display(),
        counted(config.listeners.len(), "listener"),
        counted(config.routes.len(), "route"),
        counted(config.upstreams.len(), "upstream"),
    );
    config.files().skip(1).for_each(|file| text += &format!("\nincluded: {file}"));
    print(&text)
}

fn counted(number: usize, noun: &str) -> String {
    format!("{number} {noun}{}", if number == 1 { "" } else { "s" })
}
