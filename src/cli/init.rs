//! `forebay init`: writes a small, commented configuration that is ready to run.

use std::fs::File;
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};

use clap::Args;

use super::proxy::{Backend, backend, from};
use super::{Failure, print};
use crate::config::{Address, with_schema};
use crate::gateway::Builder;

/// The arguments of `forebay init`.
#[derive(Args)]
pub struct Init {
    /// The file to write; it must not exist yet
    #[arg(default_value = "forebay.yaml")]
    file: PathBuf,
    /// Where clients connect: `127.0.0.1:8080`, `:8080` for all addresses of this machine, or `unix:/path`
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:8080", value_parser = from)]
    from: Address,
    /// Your backend: `host:3000`, or `:3000` for this machine
    #[arg(long, value_name = "BACKEND", default_value = "127.0.0.1:3000", value_parser = backend)]
    to: Backend,
}

/// Writes the file and prints the next steps.
pub fn init(builder: &Builder, asked: &Init) -> Result<(), Failure> {
    let text = text(&asked.from, &asked.to);
    // An error here would be a bug; it is better found before the file exists.
    builder.parse(&asked.file.display().to_string(), &text).map_err(Failure::Report)?;
    write_new(&asked.file, &text)?;
    let file = asked.file.display();
    print(&format!(
        "\
{file} is written: requests to {} go to {}.

  forebay check -c {file}   reports all errors in it, with their lines
  forebay run -c {file}     runs it until Ctrl-C

  forebay schema > forebay.schema.json   beside it lets editors complete and explain its keys",
        asked.from, asked.to.address
    ))
}

/// Writes a new file; fails if it exists.
pub fn write_new(path: &Path, text: &str) -> Result<(), Failure> {
    let wrong = |error: std::io::Error| match error.kind() {
        ErrorKind::AlreadyExists => {
            Failure::Runtime(format!("{} exists already, and is left as it is; name another file", path.display()))
        }
        _ => Failure::io(&format!("write {}", path.display()))(error),
    };
    let mut file = File::create_new(path).map_err(wrong)?;
    file.write_all(text.as_bytes()).and_then(|()| file.sync_all()).map_err(wrong)
}

fn text(from: &Address, to: &Backend) -> String {
    with_schema(include_str!("init/forebay.yaml"))
        .replace("FROM", &format!("\"{from}\""))
        .replace("TO", &format!("\"{}\"", to.address))
        .replace("    # SPEAKS\n", &to.speaks.keys().map_or(String::new(), |keys| format!("    {keys}\n")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gateway::Gateway;

    fn written() -> String {
        text(&from("127.0.0.1:8080").expect("an address"), &backend("https://app.test").expect("a backend"))
    }

    #[test]
    fn what_is_written_is_right_and_every_comment_with_a_key_is_right_as_well() {
        let builder = Gateway::builder();
        builder.parse("forebay.yaml", &written()).unwrap_or_else(|report| panic!("{report}"));
        // A line that begins with `# ` and a lower-case key is a key that the user can enable.
        let is_key = |line: &str| {
            let rest = line.trim_start().strip_prefix("# ").unwrap_or_default();
            let word = rest.trim_start().trim_start_matches("- ").split(':').next().unwrap_or_default();
            rest.contains(':') && !word.is_empty() && word.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'_')
        };
        let keys = written().lines().filter(|line| is_key(line)).count();
        assert!(keys >= 8, "{keys}");
        let all: String = written()
            .lines()
            .map(|line| if is_key(line) { line.replacen("# ", "", 1) } else { line.into() } + "\n")
            .collect();
        builder.parse("forebay.yaml", &all).unwrap_or_else(|report| panic!("{all}\n{report}"));
    }
}
