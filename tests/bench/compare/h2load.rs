//! What h2load prints after a run, and what it notes of each request, as figures. Pure: `measure` runs h2load.

use super::wrk::Summary;

impl Summary {
    /// Reads the whole output of a run by the clock, and its log; the error names what is missing.
    pub fn of_h2load(output: &str, log: &str) -> Result<Summary, String> {
        let missing = |what: &str| format!("h2load printed no {what}:\n{output}");
        let line = |start: &str| output.lines().find_map(|line| line.trim().strip_prefix(start));
        let seconds = line("finished in ").and_then(|rest| duration(rest.split(',').next()?));
        let counts = line("requests: ").ok_or_else(|| missing("number of requests"))?;
        let count = |word: &str| {
            let found = counts.split(',').find_map(|part| part.trim().strip_suffix(word)?.trim().parse::<u64>().ok());
            found.ok_or_else(|| missing(word))
        };
        // Microseconds of each request that was answered, in the third column.
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
            // Those that were under way at the end are not waited for, and count as none.
            failed: refused + count("errored")?,
        })
    }
}

/// `3.00s`, `812.00ms` or `1.02m` in seconds.
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
