//! The log of the process on stderr. The access log is separate (`access_log`).

use std::io::Write;
use std::{env, io};

use tracing_subscriber::EnvFilter;

use super::{Failure, colourful};
use crate::printable::shown;

/// Errors of clients and backends are in the access log, with their reason. Pingora and h2 log them here too,
/// mostly as warnings, so that strangers could flood the log; and Pingora's connector logs a closed idle connection
/// as an error. DNS responses can be forged with a single datagram, and the resolver warns of each one that it
/// ignores.
const DEFAULT: &str = "info,pingora=error,pingora_core=error,pingora_core::apps=off,pingora_core::connectors=off,\
                       pingora_proxy=error,h2=error,hickory_net=error";

/// Starts logging as `FOREBAY_LOG` and `FOREBAY_LOG_FORMAT` say. An existing logger of the program is kept.
pub fn start() -> Result<(), Failure> {
    let wrong = |name: &str, why: String| Failure::Config(format!("${name}: {why}"));
    let written = env::var("FOREBAY_LOG").ok().filter(|text| !text.is_empty());
    let filter = EnvFilter::try_new(written.as_deref().unwrap_or(DEFAULT))
        .map_err(|error| wrong("FOREBAY_LOG", error.to_string()))?;
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(|| Shown(io::stderr()));
    let format = env::var("FOREBAY_LOG_FORMAT").unwrap_or_default();
    let started = match format.as_str() {
        "" | "compact" => log.compact().with_ansi(colourful(&io::stderr())).try_init(),
        "json" => log.json().flatten_event(true).with_ansi(false).try_init(),
        other => return Err(wrong("FOREBAY_LOG_FORMAT", format!("`{other}` is neither `compact` nor `json`"))),
    };
    // The only possible error: a logger was already set.
    let _ = started;
    Ok(())
}

/// Escapes everything that could control a terminal, except the log's own colours. The log itself escapes control
/// characters in fields, but not characters that change the direction of writing.
struct Shown<W>(W);

impl<W: Write> Write for Shown<W> {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        let text = String::from_utf8_lossy(line);
        self.0.write_all(shown(&text, |character| matches!(character, '\n' | '\t' | '\u{1b}')).as_bytes())?;
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_of_the_log_keeps_its_colours_and_nothing_else_that_steers() {
        let mut written = Shown(Vec::new());
        written.write_all("\u{1b}[2mwarn\u{1b}[0m \u{202e}a\u{9b}b\n".as_bytes()).expect("a vector grows");
        assert_eq!(String::from_utf8(written.0).expect("text"), "\u{1b}[2mwarn\u{1b}[0m \\u202ea\\u009bb\n");
    }
}
