//! Formats numbers for terminals: short, of constant width, with units.

/// A number, with k, M and G for powers of 1,000.
pub fn number(n: f64) -> String {
    match n {
        0.0 => "0".to_owned(),
        n if n < 0.1 => format!("{n:.2}"),
        n if n < 10.0 && n.fract() != 0.0 => format!("{n:.1}"),
        n if n < 10_000.0 => format!("{n:.0}"),
        n if n < 1e6 => format!("{:.1}k", n / 1e3),
        n if n < 1e9 => format!("{:.1}M", n / 1e6),
        n => format!("{:.1}G", n / 1e9),
    }
}

/// A time in seconds.
pub fn time(seconds: f64) -> String {
    match seconds {
        s if s <= 0.0 => "0".to_owned(),
        s if s < 0.001 => format!("{:.0} µs", (s * 1e6).max(1.0)),
        s if s < 0.01 => format!("{:.1} ms", s * 1e3),
        s if s < 1.0 => format!("{:.0} ms", s * 1e3),
        s if s < 60.0 => format!("{s:.1} s"),
        s if s < 3_600.0 => format!("{:.0}m{:02.0}s", (s / 60.0).floor(), (s % 60.0).floor()),
        s if s < 86_400.0 => format!("{:.0}h{:02.0}m", (s / 3_600.0).floor(), (s % 3_600.0 / 60.0).floor()),
        s => format!("{:.0}d{:02.0}h", (s / 86_400.0).floor(), (s % 86_400.0 / 3_600.0).floor()),
    }
}

/// Bytes, with powers of 1,024.
pub fn bytes(n: f64) -> String {
    let units = ["B", "KiB", "MiB", "GiB", "TiB"];
    let (mut n, mut unit) = (n, 0);
    while n >= 1024.0 && unit < units.len() - 1 {
        n /= 1024.0;
        unit += 1;
    }
    if unit == 0 || n >= 100.0 { format!("{n:.0} {}", units[unit]) } else { format!("{n:.1} {}", units[unit]) }
}

/// A ratio as a percentage.
pub fn share(part: f64) -> String {
    format!("{:.0}%", part * 100.0)
}

/// The value, or a dash if it is unknown.
pub fn or_dash(figure: Option<f64>, shown: impl Fn(f64) -> String) -> String {
    figure.filter(|figure| figure.is_finite()).map_or("–".to_owned(), shown)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_short_whatever_their_size() {
        let times = [0.0, 2e-7, 0.00042, 0.0042, 0.42, 4.2, 75.0, 3_700.0, 90_000.0].map(time);
        assert_eq!(times, ["0", "1 µs", "420 µs", "4.2 ms", "420 ms", "4.2 s", "1m15s", "1h01m", "1d01h"]);
        let numbers = [0.0, 0.04, 0.5, 3.0, 42.4, 9_999.0, 12_345.0, 2.5e6, 3e9].map(number);
        assert_eq!(numbers, ["0", "0.04", "0.5", "3", "42", "9999", "12.3k", "2.5M", "3.0G"]);
        assert_eq!([0.0, 1023.0, 1536.0, 3e8].map(bytes), ["0 B", "1023 B", "1.5 KiB", "286 MiB"]);
        assert_eq!(
            (share(0.456), or_dash(None, number), or_dash(Some(f64::NAN), number)),
            ("46%".into(), "–".into(), "–".into())
        );
    }
}
