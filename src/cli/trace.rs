//! `forebay trace`: the phases of the next matching exchanges, as waterfalls.

use std::io::{self, IsTerminal};
use std::time::Duration;

use clap::Args;
use serde::Deserialize;

use super::admin::{AdminEndpoint, Lines, Where};
use super::waterfall::{Axis, Paint, bars, title};
use super::{Failure, colourful, print};
use crate::gateway::Builder;
use crate::printable::printable;
use crate::recorder::Recorded;

/// Default width if the terminal's width is unknown.
const WIDTH: usize = 100;
/// Columns besides the bar: name of the phase, time, cycles, bytes.
const BESIDE: usize = 68;
const BAR_LEAST: usize = 16;

#[derive(Args)]
pub struct Trace {
    #[command(flatten)]
    place: Where,
    /// Only exchanges of this route
    #[arg(long)]
    route: Option<String>,
    /// Only exchanges of this client address or network
    #[arg(long, value_name = "ADDRESS")]
    client: Option<String>,
    /// Only exchanges whose path begins with this prefix
    #[arg(long = "path", value_name = "PREFIX")]
    prefix: Option<String>,
    /// Only exchanges with this status, such as 404 or 5xx
    #[arg(long)]
    status: Option<String>,
    /// Only exchanges that take at least this long, such as 250ms
    #[arg(long, value_name = "TIME")]
    slower_than: Option<String>,
    /// Number of exchanges, up to 1000
    #[arg(short = 'n', long, default_value = "10")]
    count: u32,
    /// How long to record, up to 10m
    #[arg(long = "for", value_name = "TIME", default_value = "1m")]
    time: String,
    /// Print the raw recording, one line of JSON per exchange
    #[arg(long)]
    json: bool,
}

/// A line of the response.
#[derive(Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Told {
    /// The recording has begun.
    Recording { count: u32, for_seconds: f64 },
    /// An exchange has ended.
    Exchange(Box<Recorded>),
    /// The recording has ended because of its `count` or its `time`.
    End { why: String, recorded: u32 },
}

/// An active recording.
pub struct Telling(AdminEndpoint, Lines);

impl Telling {
    /// Requests a recording. It is active once the first line has arrived.
    pub fn begin(endpoint: AdminEndpoint, target: &str, patience: Duration) -> Result<Telling, Failure> {
        let lines = endpoint.post(target, patience).map_err(Failure::Runtime)?;
        Ok(Telling(endpoint, lines))
    }

    /// The next line, unparsed; `None` at the end.
    fn line(&mut self) -> Result<Option<String>, Failure> {
        self.1.next().transpose().map_err(|error| Failure::Runtime(self.0.failed(&error)))
    }

    /// The next line, parsed. A response without an end line was cut off.
    pub fn next(&mut self) -> Result<Told, Failure> {
        let at = &self.0.address;
        let broken = || Failure::Runtime(format!("the admin endpoint at {at} broke off: is the gateway stopping?"));
        let line =
            self.1.next().transpose().map_err(|error| Failure::Runtime(self.0.failed(&error)))?.ok_or_else(broken)?;
        serde_json::from_str(&line)
            .map_err(|error| Failure::Runtime(format!("{at} did not return a recording: {error}")))
    }
}

/// Prints exchanges as they end.
pub fn trace(builder: &Builder, asked: Trace) -> Result<(), Failure> {
    let target = asked.target();
    let endpoint = asked.place.find(builder)?;
    // The gateway ends the recording in time and sends an end line.
    let patience = humantime::parse_duration(&asked.time).unwrap_or_default() + Duration::from_secs(10);
    let mut telling = Telling::begin(endpoint, &target, patience)?;
    if asked.json {
        while let Some(line) = telling.line()? {
            print(&printable(&line))?;
        }
        return Ok(());
    }
    let paint = Paint(colourful(&io::stdout()));
    let width = bar_width();
    loop {
        match telling.next()? {
            Told::Recording { count, for_seconds } => {
                print(&paint.faint(&format!(
                    "Recording the next {count} exchanges that match, for {} at most. Cycles are worker:cycle of its loop.",
                    super::figures::time(for_seconds)
                )))?;
            }
            Told::Exchange(recorded) => {
                let axis = Axis::of([&*recorded], width);
                print(&format!("\n{}\n{:12}{}", title(&recorded, paint), "", paint.faint(&axis.scale())))?;
                print(&bars(&recorded, axis, paint).join("\n"))?;
            }
            Told::End { why, recorded } => {
                if recorded == 0 && why == "time" {
                    return Err(Failure::Runtime("no matching exchange has ended in that time".to_owned()));
                }
                return Ok(());
            }
        }
    }
}

impl Trace {
    fn target(&self) -> String {
        let count = self.count.to_string();
        let arguments = [
            ("route", self.route.as_ref()),
            ("client", self.client.as_ref()),
            ("path", self.prefix.as_ref()),
            ("status", self.status.as_ref()),
            ("slower_than", self.slower_than.as_ref()),
            ("count", Some(&count)),
            ("for", Some(&self.time)),
        ];
        let said = arguments.into_iter().filter_map(|(name, value)| Some(format!("{name}={}", encoded(value?))));
        format!("/trace?{}", said.collect::<Vec<_>>().join("&"))
    }
}

/// Percent-encodes a text for a query (RFC 3986 §3.4), except letters, digits and a few harmless characters.
pub fn encoded(text: &str) -> String {
    let byte = |byte: u8| match byte {
        b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' | b'/' | b':' => {
            char::from(byte).to_string()
        }
        _ => format!("%{byte:02X}"),
    };
    text.bytes().map(byte).collect()
}

/// Columns that are left for bars.
pub fn bar_width() -> usize {
    let screen = io::stdout().is_terminal().then(ratatui::crossterm::terminal::size).and_then(Result::ok);
    let written = || std::env::var("COLUMNS").ok()?.parse().ok();
    let width = screen.map(|(width, _)| usize::from(width)).or_else(written).unwrap_or(WIDTH);
    width.saturating_sub(BESIDE).clamp(BAR_LEAST, 120)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_asked_for_survives_the_query() {
        assert_eq!(encoded("a b&c=d/é"), "a%20b%26c%3Dd/%C3%A9");
    }

    #[test]
    fn the_lines_of_an_answer_are_understood() {
        let told = |line: &str| serde_json::from_str::<Told>(line).unwrap();
        assert!(matches!(told(r#"{"recording":{"count":3,"for_seconds":60.0}}"#), Told::Recording { count: 3, .. }));
        assert!(matches!(told(r#"{"exchange":{"status":200,"new":1}}"#), Told::Exchange(one) if one.status == 200));
        assert!(matches!(told(r#"{"end":{"why":"time","recorded":2}}"#), Told::End { recorded: 2, .. }));
    }
}
