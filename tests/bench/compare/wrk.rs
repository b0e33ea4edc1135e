//! Parses the output of wrk. Pure; `measure` runs wrk and passes its output.

/// One run of `wrk --latency`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Summary {
    /// Received responses, with any status.
    pub requests: u64,
    /// Duration of the run in seconds.
    pub seconds: f64,
    /// Median latency in milliseconds.
    pub p50_ms: f64,
    /// 99th percentile of the latency in milliseconds.
    pub p99_ms: f64,
    /// Socket errors, timeouts, and responses with a status of 400 or above.
    pub failed: u64,
}

impl Summary {
    /// Parses the complete output of a run. The error names the missing part.
    pub fn parse(output: &str) -> Result<Summary, String> {
        let find = |what: &str, value: Option<f64>| value.ok_or_else(|| format!("wrk printed no {what}:\n{output}"));
        let (requests, seconds) = output
            .lines()
            .find_map(|line| line.trim().split_once(" requests in "))
            .and_then(|(requests, rest)| Some((requests.parse().ok()?, rest.split(',').next()?)))
            .ok_or_else(|| format!("wrk printed no number of requests:\n{output}"))?;
        Ok(Summary {
            requests,
            seconds: find("duration", seconds_of(seconds))?,
            p50_ms: find("50% latency", percentile(output, "50%"))? * 1e3,
            p99_ms: find("99% latency", percentile(output, "99%"))? * 1e3,
            failed: socket_errors(output) + refused(output),
        })
    }
}

/// The line `     99%    2.05ms` of the distribution, in seconds.
fn percentile(output: &str, label: &str) -> Option<f64> {
    output.lines().find_map(|line| {
        let mut words = line.split_whitespace();
        (words.next() == Some(label)).then(|| seconds_of(words.next()?)).flatten()
    })
}

/// Sums the line `Socket errors: connect 0, read 3, write 0, timeout 0`; wrk omits it if all are 0.
fn socket_errors(output: &str) -> u64 {
    let Some(errors) = output.lines().find_map(|line| line.trim().strip_prefix("Socket errors:")) else { return 0 };
    errors.split(',').filter_map(|error| error.split_whitespace().last()?.parse::<u64>().ok()).sum()
}

/// Parses the line `Non-2xx or 3xx responses: 5`; wrk omits it at 0.
fn refused(output: &str) -> u64 {
    let line = output.lines().find_map(|line| line.trim().strip_prefix("Non-2xx or 3xx responses:"));
    line.and_then(|count| count.trim().parse().ok()).unwrap_or(0)
}

/// Parses `812.00us`, `2.05ms`, `3.00s`, `1.20m` or `1.00h` into seconds.
fn seconds_of(text: &str) -> Option<f64> {
    let unit = text.find(|c: char| c.is_ascii_alphabetic())?;
    let (number, unit) = text.split_at(unit);
    let factor = match unit {
        "us" => 1e-6,
        "ms" => 1e-3,
        "s" => 1.0,
        "m" => 60.0,
        "h" => 3600.0,
        _ => return None,
    };
    Some(number.parse::<f64>().ok()? * factor)
}
