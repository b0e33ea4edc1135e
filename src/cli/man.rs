//! `forebay man`: writes the manual pages for packages, one per command and one for the configuration file.
//!
//! The pages are generated from `--help` and `conf/full.yaml`, so they are always current. The command is hidden
//! because installed packages already contain the pages.

use std::fs;
use std::path::Path;

use clap::CommandFactory;

use super::{CommandLine, Failure};

const FULL: &str = include_str!("../../conf/full.yaml");

/// Writes `forebay.1`, `forebay-COMMAND.1` for each command, and `forebay.yaml.5` into `directory`, which is
/// created.
///
/// # Errors
///
/// The directory or a page cannot be written.
pub fn man(directory: &Path) -> Result<(), Failure> {
    fs::create_dir_all(directory).map_err(Failure::io("make the directory"))?;
    clap_mangen::generate_to(CommandLine::command(), directory).map_err(Failure::io("write the manual pages"))?;
    fs::write(directory.join("forebay.yaml.5"), page_of_the_file(FULL)).map_err(Failure::io("write the manual pages"))
}

/// The page for the configuration file; it shows the file verbatim.
fn page_of_the_file(full: &str) -> String {
    let mut page = format!(
        ".TH forebay.yaml 5 \"\" \"forebay {}\"\n\
         .SH NAME\n\
         forebay.yaml \\- the configuration of forebay\n\
         .SH DESCRIPTION\n\
         .B forebay run\n\
         reads its configuration from the file of\n\
         .BR \\-c ,\n\
         else from the one that $FOREBAY_CONFIG names, else from ./forebay.yaml, else from /etc/forebay/forebay.yaml.\n\
         .B forebay check\n\
         reports all errors of a file, and\n\
         .B forebay schema\n\
         prints its JSON Schema.\n\
         .SH EXAMPLE\n\
         All keys, with their defaults:\n\
         .PP\n\
         .nf\n",
        env!("CARGO_PKG_VERSION")
    );
    for line in full.lines() {
        page.push_str(&verbatim(line));
        page.push('\n');
    }
    page.push_str(".fi\n.SH SEE ALSO\n.BR forebay (1)\n");
    page
}

/// A line that roff prints verbatim. A leading dot or apostrophe would be a request.
fn verbatim(line: &str) -> String {
    let mut text = String::from(if line.starts_with('.') { "\\&" } else { "" });
    for character in line.chars() {
        match character {
            '\\' => text.push_str("\\e"),
            '-' => text.push_str("\\-"),
            '\'' => text.push_str("\\(aq"),
            '`' => text.push_str("\\(ga"),
            '^' => text.push_str("\\(ha"),
            '~' => text.push_str("\\(ti"),
            character if character.is_ascii() => text.push(character),
            other => text.push_str(&format!("\\[u{:04X}]", u32::from(other))),
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_of_yaml_is_no_request_of_roff() {
        assert_eq!(verbatim(".TH a\\.b"), "\\&.TH a\\e.b");
        assert_eq!(verbatim("'tis: a-b…"), "\\(aqtis: a\\-b\\[u2026]");
    }

    #[test]
    fn the_page_of_the_file_holds_every_line_of_it() {
        let page = page_of_the_file("one:\n  two: three\n");
        assert!(page.contains("\n.nf\none:\n  two: three\n.fi\n"), "{page}");
    }
}
