//! Parses the output of h2load and its log of requests. Pure; `measure` runs h2load.

use super::wrk::Summary;

impl Summary {
    /// Parses the complete output of a run with a fixed duration, and its log. The error names the missing part.
    pub fn of_h2load(output: &str, log: &str) -> Result<Summary, String> {
        let missing = |what: &str| format!("h2load printed no {what}:\n{output}");
        let line = |start: &str| output.lines().find_map(|line| line.trim().strip_prefix(start));
        let seconds = line("finished in ").and_then(|rest| duration(rest.split(',').next()?));
        let counts = line("requests: ").ok_or_else(|| missing("number of requests"))?;
        let count = |word: &str| {
            let found = counts.split(',').find_map(|part| part.trim().strip_suffix(word)?.trim().parse::<u64>().ok());
            found.ok_or_else(|| missing(word))
        };
        // The third column of the log has the microseconds of each request with a response.
        let mut micros: Vec<u64> =
            log.lines().filter_map(|line| line.split('\t').nth(2)?.trim().parse().ok()).collect();
        micros.sort_unstable();
        let percentile = |share: usize| {
            let rank = (micros.len() * share).div_ceil(100).checked_sub(1)?;
            micros.get(rank).map(|micros| *micros as f64 / 1e3)
        };
        let status = line("status codes: ").ok_or_else(|| missing("status codes"))?;
        let refused = status.split(',').filter(|part| part.contains("4xx") || part.contains("5xx"));
        let refused = refused.filter_map(|part| part.split_whitespace().next()?.parse::<u64>().ok()).sum::<u64>();
        Ok(Summary {
            requests: count("done")?,
            seconds: seconds.ok_or_else(|| missing("duration"))?,
            p50_ms: percentile(50).ok_or("h2load noted no requests")?,
            p99_ms: percentile(99).ok_or("h2load noted no requests")?,
            // Requests that are active at the end are not awaited, and do not count.
            failed: refused + count("errored")?,
        })
    }
}

/// Parses `3.00s`, `812.00ms` or `1.02m` into seconds.
fn duration(text: &str) -> Option<f64> {
    let unit = text.find(|c: char| c.is_ascii_alphabetic())?;
    let (number, unit) = text.split_at(unit);
    let factor = match unit {
        "us" => 1e-6,
        "ms" => 1e-3,
        "s" => 1.0,
        "m" => 60.0,
        _ => return None,
    };
    Some(number.parse::<f64>().ok()? * factor)
}
