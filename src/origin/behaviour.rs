//! Parses the path of a request into the test origin's behaviour, before any byte is sent.
//!
//! This is a pure decision that `answer` carries out. `paths.txt` documents the paths, and a test checks that both
//! agree.

use std::sync::LazyLock;
use std::time::Duration;

use http::{StatusCode, Uri};

use crate::config::units::{Size, Time};

const BYTES_MAX: u64 = 1 << 40;
const PIECES_MAX: u64 = 1_000_000;
const TIME_MAX: Duration = Duration::from_secs(3600);

/// Default number of events for `/sse`.
const EVENTS: u64 = 100;

/// Default length that `/fault/half` announces.
const HALF_OF_BYTES: u64 = 1000;

/// The behaviour for a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Behaviour {
    Index,
    Echo,
    Headers,
    Bytes(u64),
    Chunked(u64),
    UntilClose(u64),
    Delay,
    Drip { pieces: u64, pause: Duration },
    Status(StatusCode),
    Events(u64),
    WebSocket,
    EarlyHints,
    Trailers,
    Fault(Fault),
}

/// A kind of fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    Close,
    /// A reset after this number of bytes of the body; 0: as soon as the header was read.
    Reset(u64),
    Hang,
    Early,
    Garbage,
    /// Half of this number of bytes.
    Half(u64),
    HalfChunked,
    Stall,
    SlowHeader,
}

impl Fault {
    /// Whether the fault occurs as soon as the request header was read, without waiting for the body.
    pub fn ignores_body(self) -> bool {
        matches!(self, Fault::Close | Fault::Reset(_) | Fault::Hang | Fault::Early)
    }
}

/// A behaviour and the delay before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Plan {
    pub delay: Duration,
    pub behaviour: Behaviour,
}

/// The reason why a path is invalid.
#[derive(Debug, PartialEq, Eq)]
pub enum Unknown {
    /// The path does not exist.
    Path,
    /// The path exists, but its argument is invalid for this reason.
    Argument(String),
}

impl Plan {
    /// The plan for `target`.
    pub fn of(target: &Uri) -> Result<Plan, Unknown> {
        let segments: Vec<&str> = target.path().trim_start_matches('/').split('/').collect();
        let mut delay = Duration::ZERO;
        let behaviour = match segments[..] {
            [""] => Behaviour::Index,
            ["echo"] => Behaviour::Echo,
            ["headers"] => Behaviour::Headers,
            ["bytes", n] => Behaviour::Bytes(size(n)?),
            ["chunked", n] => Behaviour::Chunked(size(n)?),
            ["until-close", n] => Behaviour::UntilClose(size(n)?),
            ["delay", t] => {
                delay = time(t)?;
                Behaviour::Delay
            }
            ["drip", n, t] => Behaviour::Drip { pieces: pieces(n)?, pause: time(t)? },
            ["status", code] => Behaviour::Status(status(code)?),
            ["sse"] => Behaviour::Events(EVENTS),
            ["sse", n] => Behaviour::Events(pieces(n)?),
            ["websocket"] => Behaviour::WebSocket,
            ["early-hints"] => Behaviour::EarlyHints,
            ["trailers"] => Behaviour::Trailers,
            ["fault", "reset", n] => Behaviour::Fault(Fault::Reset(size(n)?)),
            ["fault", "half", n] => Behaviour::Fault(Fault::Half(size(n)?)),
            ["fault", name] => Behaviour::Fault(fault(name).ok_or(Unknown::Path)?),
            _ => return Err(Unknown::Path),
        };
        for pair in target.query().unwrap_or_default().split('&') {
            if let Some(more) = pair.strip_prefix("delay=") {
                delay += time(more)?;
            }
        }
        Ok(Plan { delay, behaviour })
    }
}

fn fault(name: &str) -> Option<Fault> {
    Some(match name {
        "close" => Fault::Close,
        "reset" => Fault::Reset(0),
        "hang" => Fault::Hang,
        "early" => Fault::Early,
        "garbage" => Fault::Garbage,
        "half" => Fault::Half(HALF_OF_BYTES),
        "half-chunked" => Fault::HalfChunked,
        "stall" => Fault::Stall,
        "slow-header" => Fault::SlowHeader,
        _ => return None,
    })
}

/// Parses a number of bytes. The unit is optional here, as in `/bytes/10`.
fn size(text: &str) -> Result<u64, Unknown> {
    let bytes = text.parse().or_else(|_| text.parse().map(|Size(bytes)| bytes));
    let expected = || Unknown::Argument(format!("`{text}` is not a size: write 1000 or 64KiB, at most 1TiB"));
    bytes.ok().filter(|bytes| *bytes <= BYTES_MAX).ok_or_else(expected)
}

/// Parses a time. A number without a unit is in milliseconds.
fn time(text: &str) -> Result<Duration, Unknown> {
    let time = text.parse().map(Duration::from_millis).or_else(|_| text.parse().map(|Time(time)| time));
    let expected = || Unknown::Argument(format!("`{text}` is not a time: write 250, 250ms or 2s, at most 1h"));
    time.ok().filter(|time| *time <= TIME_MAX).ok_or_else(expected)
}

fn pieces(text: &str) -> Result<u64, Unknown> {
    let expected = || Unknown::Argument(format!("`{text}` is not a number from 0 to {PIECES_MAX}"));
    text.parse().ok().filter(|pieces| *pieces <= PIECES_MAX).ok_or_else(expected)
}

fn status(text: &str) -> Result<StatusCode, Unknown> {
    let expected = || Unknown::Argument(format!("`{text}` is not a status from 200 to 599"));
    text.parse().ok().filter(|status: &StatusCode| (200..600).contains(&status.as_u16())).ok_or_else(expected)
}

/// A prime number, so that no buffer size divides the block. A lost or repeated buffer is then detected.
const BLOCK_LINES: usize = 65_521;

static BLOCK: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let lines = (0..BLOCK_LINES).map(|line| format!("{:015x}\n", line * 16));
    lines.collect::<String>().into_bytes()
});

/// The first `length` bytes of the body of `/bytes` and `/chunked`: lines of 16 bytes with their own offset in hex,
/// repeated every 1,048,336 bytes.
pub fn content(length: usize) -> Vec<u8> {
    BLOCK.iter().copied().cycle().take(length).collect()
}

/// Bytes of [`content`] from `offset` on: at least one and at most `limit`, which must not be 0.
pub fn content_from(offset: u64, limit: u64) -> &'static [u8] {
    // Both conversions fit: a remainder below a `usize`, and a minimum with a `usize`.
    let start = (offset % BLOCK.len() as u64) as usize;
    let length = limit.min((BLOCK.len() - start) as u64) as usize;
    &BLOCK[start..start + length]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(target: &str) -> Result<Plan, Unknown> {
        Plan::of(&target.parse().unwrap())
    }

    fn ms(n: u64) -> Duration {
        Duration::from_millis(n)
    }

    #[test]
    fn a_path_says_what_is_asked() {
        let now = |behaviour| Ok(Plan { delay: Duration::ZERO, behaviour });
        assert_eq!(plan("/"), now(Behaviour::Index));
        assert_eq!(plan("http://shop.example/bytes/64KiB"), now(Behaviour::Bytes(65_536)));
        assert_eq!(plan("/chunked/10"), now(Behaviour::Chunked(10)));
        assert_eq!(plan("/drip/3/20ms"), now(Behaviour::Drip { pieces: 3, pause: ms(20) }));
        assert_eq!(plan("/status/404"), now(Behaviour::Status(StatusCode::NOT_FOUND)));
        assert_eq!(plan("/fault/half"), now(Behaviour::Fault(Fault::Half(1_000))));
        assert_eq!(plan("/fault/half/2MiB"), now(Behaviour::Fault(Fault::Half(2 << 20))));
        assert_eq!(plan("/fault/reset/10"), now(Behaviour::Fault(Fault::Reset(10))));
    }

    #[test]
    fn a_delay_comes_from_the_path_and_from_the_query() {
        assert_eq!(plan("/delay/30"), Ok(Plan { delay: ms(30), behaviour: Behaviour::Delay }));
        assert_eq!(plan("/?x=1&delay=2s"), Ok(Plan { delay: ms(2_000), behaviour: Behaviour::Index }));
    }

    #[test]
    fn a_wrong_argument_is_told_from_an_unknown_path() {
        assert_eq!(plan("/nothing"), Err(Unknown::Path));
        assert_eq!(plan("/fault/none"), Err(Unknown::Path));
        for target in ["/bytes/x", "/bytes/2TiB", "/delay/2h", "/status/101", "/drip/-1/1", "/?delay=soon"] {
            assert!(matches!(plan(target), Err(Unknown::Argument(_))), "{target}");
        }
    }

    #[test]
    fn every_documented_path_is_understood() {
        let documented = super::super::PATHS.lines().filter(|line| line.starts_with('/'));
        let mut count = 0;
        for path in documented.filter_map(|line| line.split_whitespace().next()) {
            let path = path.replace("CODE", "200").replace("/N", "/1").replace("/T", "/1");
            assert!(plan(&path).is_ok(), "{path}");
            count += 1;
        }
        assert_eq!(count, 23);
    }

    #[test]
    fn the_content_is_the_same_in_pieces_and_as_a_whole() {
        let whole = content(3_000_000);
        let mut pieces = Vec::new();
        while pieces.len() < whole.len() {
            let left = (whole.len() - pieces.len()) as u64;
            pieces.extend_from_slice(content_from(pieces.len() as u64, left.min(70_000)));
        }
        assert!(whole == pieces);
        assert!(whole.starts_with(b"000000000000000\n000000000000010\n"));
    }
}
