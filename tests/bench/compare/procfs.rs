//! Parses files of `/proc` about processes and CPUs (proc(5)). Pure; `process` and `machine` read the files.

/// Ticks per second in the times of `/proc`: the kernel's USER_HZ, 100 on every architecture that Debian builds for.
const TICKS_PER_SECOND: f64 = 100.0;

/// CPU seconds of all threads of a process, user and system: fields 14 and 15 of `/proc/PID/stat`.
pub fn cpu_seconds(stat: &str) -> Option<f64> {
    stat_seconds(stat, 14..=15)
}

/// CPU seconds of a process and of its children that were waited for: fields 14 to 17 of `/proc/PID/stat`.
pub fn cpu_seconds_with_children(stat: &str) -> Option<f64> {
    stat_seconds(stat, 14..=17)
}

/// Sums fields, which are numbered from 1. The second is the name in brackets, which may contain spaces and brackets.
fn stat_seconds(stat: &str, fields: std::ops::RangeInclusive<usize>) -> Option<f64> {
    let (_, behind_name) = stat.rsplit_once(')')?;
    let behind_name: Vec<&str> = behind_name.split_whitespace().collect();
    let ticks = behind_name.get(fields.start() - 3..=fields.end() - 3)?;
    ticks.iter().map(|field| field.parse::<u64>().ok()).sum::<Option<u64>>().map(seconds)
}

/// Resident bytes: the line `Rss:` of `/proc/PID/smaps_rollup`, which is exact where `VmRSS` of `status` may lag by
/// some pages per CPU.
pub fn resident_bytes(smaps_rollup: &str) -> Option<u64> {
    let line = smaps_rollup.lines().find_map(|line| line.strip_prefix("Rss:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok().map(|kib| kib * 1024)
}

/// The peak of resident bytes: the line `VmHWM:` of `/proc/PID/status`.
pub fn peak_bytes(status: &str) -> Option<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok().map(|kib| kib * 1024)
}

/// Seconds in which the CPUs were not idle, summed over all CPUs and including stolen time: the first line of
/// `/proc/stat`.
pub fn busy_seconds(stat: &str) -> Option<f64> {
    let fields: Option<Vec<u64>> =
        stat.lines().next()?.strip_prefix("cpu ")?.split_whitespace().map(|f| f.parse().ok()).collect();
    // user nice system idle iowait irq softirq steal; guest time is part of user.
    let [user, nice, system, _idle, _iowait, irq, softirq, steal, ..] = fields?[..] else { return None };
    Some(seconds(user + nice + system + irq + softirq + steal))
}

/// The CPUs in the line `Cpus_allowed_list:` of `/proc/PID/status`, such as `0-3,8`.
pub fn allowed_cpus(status: &str) -> Option<Vec<usize>> {
    let list = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:"))?;
    let mut cpus = Vec::new();
    for range in list.trim().split(',') {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        cpus.extend(first.parse::<usize>().ok()?..=last.parse().ok()?);
    }
    Some(cpus)
}

fn seconds(ticks: u64) -> f64 {
    ticks as f64 / TICKS_PER_SECOND
}
