//! The grammar for sizes, times, counts, rates and shares: strings such as `64KiB`, `1m30s`, `50k`, `10/s`,
//! `512B/s`, `20%`.
//!
//! Bytes and times always need a unit, so that values are unambiguous.

use std::borrow::Cow;
use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::de::{self, Deserialize, Deserializer, Visitor};
use serde::{Serialize, Serializer};

/// A number of bytes: `512B`, `64KiB`, `8MiB`, `1GB`. Binary units are powers of 1,024, decimal ones of 1,000.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Size(pub u64);

/// A duration: `250ms`, `10s`, `1m30s`, `2h`; at most a year, so that adding it to a clock is safe.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Time(pub Duration);

/// A count: `100`, `50k`, `1M`, or `unlimited` ([`Count::UNLIMITED`]).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Count(pub u64);

/// Events per time: `10/s`, `600/m`, `5000/h`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rate {
    /// Number of events.
    pub events: u64,
    /// The unit of time: a second, a minute or an hour.
    pub per: Duration,
}

/// Bytes per second: `512B/s`, `64KiB/s`, `1MiB/s`. Each key documents the meaning of `0B/s`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ByteRate(pub u64);

/// A share: `20%`, `0.5%`, from `0%` to `100%`.
#[derive(Clone, Copy, Debug, PartialEq, PartialOrd)]
pub struct Percent(pub f64);

impl Percent {
    /// From 0 to 1.
    pub fn ratio(self) -> f64 {
        self.0 / 100.0
    }
}

impl Count {
    /// The value of `unlimited`.
    pub const UNLIMITED: Count = Count(u64::MAX);
}

impl FromStr for Size {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let expected =
            || format!("`{text}` is not a size: write a number and a unit, such as `512B`, `64KiB` or `8MiB`");
        if !text.ends_with(|last: char| last.is_ascii_alphabetic()) {
            return Err(expected());
        }
        let size = text.parse::<bytesize::ByteSize>().map_err(|_| expected())?.as_u64();
        // Larger values are capped silently.
        if size > Size::MAX {
            return Err(format!("`{text}` is too large: the largest size is below 8192PiB"));
        }
        Ok(Size(size))
    }
}

impl Time {
    const MAX: Duration = Duration::from_secs(366 * 24 * 3600);

    /// From seconds.
    pub const fn seconds(seconds: u64) -> Self {
        Time(Duration::from_secs(seconds))
    }

    /// From milliseconds.
    pub const fn milliseconds(milliseconds: u64) -> Self {
        Time(Duration::from_millis(milliseconds))
    }
}

impl Size {
    /// The largest size, in bytes.
    const MAX: u64 = i64::MAX as u64;

    /// From KiB.
    pub const fn kib(kib: u64) -> Self {
        Size(kib * 1024)
    }
}

impl FromStr for Time {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let expected =
            || format!("`{text}` is not a time: write a number and a unit, such as `250ms`, `10s` or `1m30s`");
        if text == "0" {
            return Err(expected());
        }
        let time = humantime::parse_duration(text).map_err(|_| expected())?;
        if time > Time::MAX {
            return Err(format!("`{text}` is too long: the longest time is a year"));
        }
        Ok(Time(time))
    }
}

impl FromStr for Count {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "unlimited" {
            return Ok(Count::UNLIMITED);
        }
        let (digits, factor) = match text.strip_suffix('k') {
            Some(digits) => (digits, 1_000),
            None => match text.strip_suffix('M') {
                Some(digits) => (digits, 1_000_000),
                None => (text, 1),
            },
        };
        digits.parse::<u64>().ok().and_then(|number| number.checked_mul(factor)).map(Count).ok_or_else(|| {
            format!("`{text}` is not a count: write a number such as `100`, `50k` or `1M`, or `unlimited`")
        })
    }
}

impl FromStr for Rate {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let expected =
            || format!("`{text}` is not a rate: write a number per `s`, `m` or `h`, such as `10/s` or `600/m`");
        let (events, unit) = text.split_once('/').ok_or_else(expected)?;
        let per = match unit.trim() {
            "s" => Duration::from_secs(1),
            "m" => Duration::from_secs(60),
            "h" => Duration::from_secs(3600),
            _ => return Err(expected()),
        };
        let Count(events) = events.trim().parse().map_err(|_| expected())?;
        if events == 0 || events == u64::MAX {
            return Err(expected());
        }
        Ok(Rate { events, per })
    }
}

impl FromStr for ByteRate {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let size = text.strip_suffix("/s").and_then(|size| size.trim_end().parse().ok());
        size.map(|Size(bytes)| ByteRate(bytes)).ok_or_else(|| {
            format!("`{text}` is not a rate of bytes: write a size per second, such as `512B/s` or `1MiB/s`")
        })
    }
}

impl FromStr for Percent {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let number = text.strip_suffix('%').and_then(|number| number.trim_end().parse().ok());
        number.filter(|number| (0.0..=100.0).contains(number)).map(Percent).ok_or_else(|| {
            format!("`{text}` is not a share: write a number from 0 to 100 and a percent sign, such as `20%`")
        })
    }
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const UNITS: [(&str, u64); 3] = [("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)];
        match UNITS.iter().find(|(_, unit)| self.0 > 0 && self.0.is_multiple_of(*unit)) {
            Some((name, unit)) => write!(f, "{}{name}", self.0 / unit),
            None => write!(f, "{}B", self.0),
        }
    }
}

impl fmt::Display for Time {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        humantime::format_duration(self.0).to_string().replace(' ', "").fmt(f)
    }
}

impl fmt::Display for Count {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            u64::MAX => f.write_str("unlimited"),
            n if n > 0 && n % 1_000_000 == 0 => write!(f, "{}M", n / 1_000_000),
            n if n > 0 && n % 1_000 == 0 => write!(f, "{}k", n / 1_000),
            n => n.fmt(f),
        }
    }
}

impl fmt::Display for Rate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let unit = match self.per.as_secs() {
            1 => "s",
            60 => "m",
            _ => "h",
        };
        write!(f, "{}/{unit}", Count(self.events))
    }
}

impl fmt::Display for ByteRate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/s", Size(self.0))
    }
}

impl fmt::Display for Percent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}%", self.0)
    }
}

/// The permissions of a file or a unix socket, in octal digits as for chmod(1): `"0660"`, the default, permits the
/// owner and the group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileMode(pub u32);

impl Default for FileMode {
    fn default() -> Self {
        FileMode(0o660)
    }
}

impl FromStr for FileMode {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let octal = (3..=4).contains(&text.len()) && text.bytes().all(|digit| matches!(digit, b'0'..=b'7'));
        let mode = u32::from_str_radix(text, 8).ok().filter(|&mode| octal && mode <= 0o777);
        mode.map(FileMode).ok_or_else(|| {
            format!("`{text}` is not a mode: write three octal digits after a zero, in quotes, such as `\"0660\"`")
        })
    }
}

impl fmt::Display for FileMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:04o}", self.0)
    }
}

impl Serialize for FileMode {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for FileMode {
    /// Accepts only text: YAML reads `0o660` as the number 432, which would go unnoticed.
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(Text("a mode in quotes such as `\"0660\"`"))?.parse().map_err(de::Error::custom)
    }
}

impl JsonSchema for FileMode {
    fn schema_name() -> Cow<'static, str> {
        "FileMode".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "type": "string",
            "pattern": r"^0?[0-7]{3}$|\$\{",
            "description": "a mode such as `\"0660\"`",
            "examples": ["0660", "0600"],
        })
    }
}

/// Deserializes text, but not numbers.
struct Text(&'static str);

impl Visitor<'_> for Text {
    type Value = String;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0)
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<String, E> {
        Ok(text.to_owned())
    }
}

/// Deserializes a scalar as text first, so that `50k`, `100` and `10/s` share one path and one error.
pub(super) struct Scalar(pub &'static str);

impl Visitor<'_> for Scalar {
    type Value = String;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0)
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<String, E> {
        Ok(text.to_owned())
    }

    fn visit_u64<E: de::Error>(self, number: u64) -> Result<String, E> {
        Ok(number.to_string())
    }

    fn visit_i64<E: de::Error>(self, number: i64) -> Result<String, E> {
        Ok(number.to_string())
    }

    fn visit_f64<E: de::Error>(self, number: f64) -> Result<String, E> {
        Ok(number.to_string())
    }
}

macro_rules! unit {
    ($name:ident, $expecting:literal, $pattern:literal, $examples:expr) => {
        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                deserializer.deserialize_any(Scalar($expecting))?.parse().map_err(de::Error::custom)
            }
        }

        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }

        impl JsonSchema for $name {
            fn schema_name() -> Cow<'static, str> {
                stringify!($name).into()
            }

            fn json_schema(_: &mut SchemaGenerator) -> Schema {
                json_schema!({
                    "type": ["string", "integer"],
                    "pattern": $pattern,
                    "description": $expecting,
                    "examples": $examples,
                })
            }
        }
    };
}

unit!(Size, "a size such as `64KiB`", r"^[0-9.]+ ?([KMGT]i?)?[Bb]?$|\$\{", ["64KiB", "8MiB"]);
unit!(Time, "a time such as `10s`", r"^([0-9]+ ?[a-z]+ ?)+$|\$\{", ["250ms", "10s"]);
unit!(Count, "a count such as `100` or `50k`", r"^([0-9]+[kM]?|unlimited)$|\$\{", ["100", "50k"]);
unit!(Rate, "a rate such as `10/s`", r"^[0-9]+[kM]?/[smh]$|\$\{", ["10/s", "600/m"]);
unit!(ByteRate, "a rate of bytes such as `512B/s`", r"^[0-9.]+ ?([KMGT]i?)?[Bb]? ?/s$|\$\{", ["512B/s", "1MiB/s"]);
unit!(Percent, "a share such as `20%`", r"^[0-9.]+ ?%$|\$\{", ["20%", "0.5%"]);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_times_counts_and_rates_read_as_they_are_written() {
        assert_eq!("64KiB".parse(), Ok(Size(65_536)));
        assert_eq!("64k".parse(), Ok(Size(64_000)));
        assert_eq!("512B".parse(), Ok(Size(512)));
        assert_eq!("1m30s".parse(), Ok(Time(Duration::from_secs(90))));
        assert_eq!("50k".parse(), Ok(Count(50_000)));
        assert_eq!("unlimited".parse(), Ok(Count::UNLIMITED));
        assert_eq!("512B/s".parse(), Ok(ByteRate(512)));
        assert_eq!("1.5MiB/s".parse(), Ok(ByteRate(1_572_864)));
        assert_eq!("0B/s".parse(), Ok(ByteRate(0)));
        assert_eq!("12.5%".parse(), Ok(Percent(12.5)));
        assert_eq!("600/m".parse(), Ok(Rate { events: 600, per: Duration::from_secs(60) }));
    }

    #[test]
    fn a_size_that_nothing_can_hold_is_refused_and_not_cut_off() {
        assert_eq!("8191PiB".parse::<Size>(), Ok(Size(8_191 << 50)));
        for text in ["8192PiB", "16EiB", "99999999999TiB", "1e30B", "99999999999999999999999999999999B"] {
            assert!(text.parse::<Size>().is_err(), "{text}");
            assert!(format!("{text}/s").parse::<ByteRate>().is_err(), "{text}/s");
        }
    }

    #[test]
    fn a_mode_is_octal_and_text() {
        for (text, mode) in [("0660", 0o660), ("600", 0o600), ("0777", 0o777), ("0000", 0)] {
            assert_eq!(text.parse(), Ok(FileMode(mode)), "{text}");
            let yaml: FileMode = serde_yaml::from_str(&format!("\"{text}\"")).expect("a mode");
            assert_eq!((yaml, yaml.to_string().len()), (FileMode(mode), 4));
        }
        for text in ["", "0", "66", "0888", "1660", "00660", "+660", "rw-", "0o660"] {
            assert!(text.parse::<FileMode>().is_err(), "{text}");
        }
        for number in ["660", "0o660", "432"] {
            assert!(serde_yaml::from_str::<FileMode>(number).is_err(), "{number} is a number in YAML");
        }
    }

    #[test]
    fn a_bare_number_is_neither_a_size_nor_a_time_nor_a_rate() {
        assert!("64".parse::<Size>().is_err());
        assert!("10".parse::<Time>().is_err());
        assert!("0".parse::<Time>().is_err());
        assert!("10".parse::<Rate>().is_err());
        assert!("0/s".parse::<Rate>().is_err());
        for text in ["512", "512/s", "512B", "1KiB/m", "-1B/s", "/s", ""] {
            assert!(text.parse::<ByteRate>().is_err(), "{text}");
        }
    }

    #[test]
    fn a_share_is_from_0_to_100_percent() {
        for text in ["20", "0.2", "101%", "-1%", "%", "NaN%", ""] {
            assert!(text.parse::<Percent>().is_err(), "{text}");
        }
    }

    #[test]
    fn a_time_of_more_than_a_year_is_refused() {
        assert!("366d".parse::<Time>().is_ok());
        assert!("367d".parse::<Time>().unwrap_err().contains("too long"));
    }

    #[test]
    fn what_is_printed_reads_back_the_same() {
        for text in ["64KiB", "8MiB", "1GiB", "0B", "1500B"] {
            assert_eq!(text.parse::<Size>().map(|s| s.to_string()), Ok(text.to_owned()));
        }
        for text in ["250ms", "10s", "1m30s", "2h", "0s"] {
            assert_eq!(text.parse::<Time>().map(|t| t.to_string()), Ok(text.to_owned()));
        }
        for text in ["100", "50k", "1M", "unlimited"] {
            assert_eq!(text.parse::<Count>().map(|c| c.to_string()), Ok(text.to_owned()));
        }
        for text in ["512B/s", "64KiB/s", "1MiB/s", "0B/s"] {
            assert_eq!(text.parse::<ByteRate>().map(|r| r.to_string()), Ok(text.to_owned()));
        }
        for text in ["0%", "0.5%", "20%", "100%"] {
            assert_eq!(text.parse::<Percent>().map(|p| p.to_string()), Ok(text.to_owned()));
        }
        for text in ["10/s", "600/m", "5k/h"] {
            assert_eq!(text.parse::<Rate>().map(|r| r.to_string()), Ok(text.to_owned()));
        }
    }
}
