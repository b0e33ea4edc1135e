//! A waterfall: the phases of an exchange as bars on a common time axis.

use super::figures::{bytes, time};
use crate::printable::printable;
use crate::recorder::{Recorded, RecordedPhase, RecordedStep};

/// The time interval that the bars are drawn on.
#[derive(Clone, Copy, Debug)]
pub struct Axis {
    /// Its start, in `began_seconds`.
    pub begin: f64,
    /// Its length.
    pub seconds: f64,
    /// Its width in characters.
    pub width: usize,
}

/// The characters of a bar, by the number of eighths filled from the left.
const EIGHTHS: [char; 9] = [' ', '▏', '▎', '▍', '▌', '▋', '▊', '▉', '█'];

impl Axis {
    /// An axis that covers all of these exchanges.
    pub fn of<'r>(recorded: impl IntoIterator<Item = &'r Recorded> + Clone, width: usize) -> Axis {
        let begin = recorded.clone().into_iter().map(|one| one.began_seconds).fold(f64::INFINITY, f64::min);
        let end = recorded.into_iter().map(|one| one.began_seconds + one.total_seconds).fold(0.0, f64::max);
        Axis { begin, seconds: (end - begin).max(1e-6), width }
    }

    /// A bar between two times. Even the shortest bar is visible.
    pub fn bar(&self, from: f64, seconds: f64) -> String {
        let eighths = self.width * 8;
        let at = |time: f64| {
            ((time - self.begin) / self.seconds * eighths as f64).round().clamp(0.0, eighths as f64) as usize
        };
        let begin = at(from).min(eighths - 1);
        let end = at(from + seconds).max(begin + 1);
        let cell = |place: usize| match (place * 8, place * 8 + 8) {
            (left, right) if right <= begin || left >= end => ' ',
            (left, right) if left < begin && right <= end && begin - left >= 4 => '▐',
            (_, right) if right <= end => '█',
            (left, _) => EIGHTHS[end - left.max(begin).min(end - 1)],
        };
        (0..self.width).map(cell).collect()
    }

    /// The scale above the bars: the times at its start, middle and end.
    pub fn scale(&self) -> String {
        let (middle, end) = (time(self.seconds / 2.0), time(self.seconds));
        let half = self.width / 2;
        let left = format!("{:<half$}", "0");
        let right = self.width.saturating_sub(half + middle.chars().count());
        format!("{left}{middle}{end:>right$}")
    }
}

/// Colours for a terminal, or none.
#[derive(Clone, Copy, Debug)]
pub struct Paint(pub bool);

impl Paint {
    /// In the colour of the side that this phase waits for; see dashboards/README.md.
    pub fn phase(self, phase: &str, text: &str) -> String {
        self.with(
            match phase {
                "accept" | "handshake" | "header" | "buffer" | "write" => "34",
                "queue" | "connect" | "send" | "wait" | "receive" => "35",
                _ => "32",
            },
            text,
        )
    }

    /// For less important text.
    pub fn faint(self, text: &str) -> String {
        self.with("2", text)
    }

    /// For important text.
    pub fn bold(self, text: &str) -> String {
        self.with("1", text)
    }

    fn with(self, code: &str, text: &str) -> String {
        if self.0 { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
    }
}

/// The title of an exchange. Clients control much of its text, so it is escaped.
pub fn title(recorded: &Recorded, paint: Paint) -> String {
    let Recorded { method, path, status, route, upstream, endpoint, client, reason, .. } = recorded;
    let asked = format!("{method} {path}");
    let mut words = vec![format!("{}  {status}", paint.bold(&printable(&asked)))];
    words.extend(reason.iter().map(|reason| format!("({})", printable(reason))));
    words.push(format!("in {}, of which {} its own", time(recorded.total_seconds), time(recorded.own_seconds)));
    let upstream = upstream.as_ref().map(|upstream| format!(" → {upstream}")).unwrap_or_default();
    let endpoint = endpoint.as_ref().map(|endpoint| format!(" {endpoint}")).unwrap_or_default();
    let attempts = if recorded.attempts > 1 { format!(", {} attempts", recorded.attempts) } else { String::new() };
    words.push(paint.faint(&printable(&format!("{route}{upstream}{endpoint}{attempts}"))));
    let client = client.map_or("a unix socket".to_owned(), |client| client.to_string());
    words.push(paint.faint(&format!("from {client}")));
    words.join("  ")
}

/// The bars, one line per phase: name, bar, duration, cycles and worker, transferred bytes.
pub fn bars(recorded: &Recorded, axis: Axis, paint: Paint) -> Vec<String> {
    let mut lines = Vec::new();
    for (place, phase) in recorded.phases.iter().enumerate() {
        let bar = axis.bar(recorded.began_seconds + phase.start_seconds, phase.seconds);
        let next = recorded.phases.get(place + 1);
        lines.push(format!(
            "  {:<9} {} {:>8}  {}  {}",
            printable(&phase.phase),
            paint.phase(&phase.phase, &bar),
            time(phase.seconds),
            paint.faint(&format!("{:<18}", cycles(phase))),
            passed(phase, next, recorded)
        ));
        lines.extend(phase.steps.iter().map(|step| step_line(step, &phase.phase, recorded, axis, paint)));
    }
    if recorded.left_out > 0 {
        lines.push(format!("  … {} further phases had no place", recorded.left_out));
    }
    if recorded.steps_left_out > 0 {
        lines.push(format!("  … {} further steps of filters had no place", recorded.steps_left_out));
    }
    lines.iter().map(|line| line.trim_end().to_owned()).collect()
}

/// A filter call within a phase: bar, duration, filter, stage and outcome.
fn step_line(step: &RecordedStep, phase: &str, recorded: &Recorded, axis: Axis, paint: Paint) -> String {
    let bar = axis.bar(recorded.began_seconds + step.start_seconds, step.seconds);
    let what = match (&*step.stage, &step.upstream) {
        ("call", Some(upstream)) => format!("{} asks {upstream}: {}", step.filter, step.outcome),
        ("when", _) => format!("{} is skipped", step.filter),
        (stage, _) => format!("{} {stage}: {}", step.filter, step.outcome),
    };
    let pieces = if step.times > 1 { format!(", {} pieces", step.times) } else { String::new() };
    let said = paint.faint(&printable(&format!("{what}{pieces}")));
    format!("  {:<9} {} {:>8}  {said}", "  ·", paint.phase(phase, &bar), time(step.seconds))
}

fn cycles(phase: &RecordedPhase) -> String {
    match (phase.worker, phase.cycle, phase.end_cycle) {
        (Some(worker), Some(begin), Some(end)) if begin == end => format!("{worker}:{begin}"),
        (Some(worker), Some(begin), Some(end)) => format!("{worker}:{begin}–{end}"),
        (_, _, Some(end)) => format!("…–{end}"),
        _ => String::new(),
    }
}

/// The bytes that were transferred during a phase.
fn passed(phase: &RecordedPhase, next: Option<&RecordedPhase>, recorded: &Recorded) -> String {
    let now = (phase.received, phase.answered, phase.sent);
    // The last count of response bytes from the endpoint also holds for the later phases.
    let then = next
        .map_or((recorded.received, phase.answered, recorded.sent), |next| (next.received, next.answered, next.sent));
    let grown = [(now.0, then.0, "received"), (now.1, then.1, "answered"), (now.2, then.2, "sent")];
    let said = grown.into_iter().filter(|(before, after, _)| after > before);
    said.map(|(before, after, what)| format!("{} {what}", bytes((after - before) as f64)))
        .collect::<Vec<_>>()
        .join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn phase(name: &str, start: f64, seconds: f64, cycles: (u64, u64), sent: u64) -> RecordedPhase {
        RecordedPhase {
            phase: name.to_owned(),
            start_seconds: start,
            seconds,
            worker: Some(0),
            cycle: Some(cycles.0),
            end_cycle: Some(cycles.1),
            sent,
            ..RecordedPhase::default()
        }
    }

    fn recorded() -> Recorded {
        Recorded {
            began_seconds: 100.0,
            total_seconds: 1.0,
            own_seconds: 0.002,
            method: "GET".to_owned(),
            path: "/a".to_owned(),
            status: 200,
            route: "all".to_owned(),
            upstream: Some("app".to_owned()),
            sent: 5 << 20,
            phases: vec![
                phase("header", 0.0, 0.5, (7, 7), 0),
                phase("wait", 0.5, 0.25, (7, 9), 0),
                phase("write", 0.75, 0.25, (9, 40), 1 << 20),
            ],
            ..Recorded::default()
        }
    }

    #[test]
    fn a_bar_lies_where_its_time_is() {
        let axis = Axis { begin: 10.0, seconds: 8.0, width: 8 };
        assert_eq!(axis.bar(10.0, 8.0), "████████");
        assert_eq!(axis.bar(12.0, 2.0), "  ██    ");
        assert_eq!(axis.bar(12.0, 2.5), "  ██▌   ");
        assert_eq!(axis.bar(12.5, 1.5), "  ▐█    ");
        assert_eq!(axis.bar(13.0, 0.0), "   ▏    ", "however short, it is seen");
        assert_eq!(axis.bar(18.0, 0.0).chars().count(), 8);
        assert_ne!(axis.bar(18.0, 0.0).trim(), "");
    }

    #[test]
    fn all_bars_of_an_exchange_have_one_axis() {
        let one = recorded();
        let axis = Axis::of([&one], 16);
        assert_eq!(
            axis.scale(),
            "0       500 ms1.0 s".to_owned().replace("ms1.0", "ms 1.0").replace("ms 1.0 s", "ms1.0 s")
        );
        let lines = bars(&one, axis, Paint(false));
        assert_eq!(
            lines,
            [
                "  header    ████████           500 ms  0:7",
                "  wait              ████       250 ms  0:7–9               1.0 MiB sent",
                "  write                 ████   250 ms  0:9–40              4.0 MiB sent",
            ]
        );
        assert!(title(&one, Paint(false)).starts_with("GET /a  200  in 1.0 s, of which 2.0 ms its own  all → app"));
        assert!(bars(&one, axis, Paint(true))[1].contains("\x1b[35m"));
    }

    #[test]
    fn what_filters_did_stands_below_its_phase() {
        let mut one = recorded();
        let step = |filter: &str, stage: &str, start_seconds, outcome: &str| RecordedStep {
            filter: filter.to_owned(),
            stage: stage.to_owned(),
            start_seconds,
            seconds: 0.125,
            times: 1,
            outcome: outcome.to_owned(),
            ..RecordedStep::default()
        };
        let call = RecordedStep { upstream: Some("idp".to_owned()), ..step("jwt", "call", 0.25, "200") };
        one.phases[0].steps = vec![step("jwt", "request", 0.25, "continue"), call, step("access", "when", 0.375, "x")];
        one.phases[2].steps = vec![RecordedStep { times: 3, ..step("body", "response_body", 0.75, "continue") }];
        one.steps_left_out = 2;
        let lines = bars(&one, Axis::of([&one], 16), Paint(false));
        assert_eq!(lines[1], "    ·           ██             125 ms  jwt request: continue");
        assert_eq!(lines[2], "    ·           ██             125 ms  jwt asks idp: 200");
        assert_eq!(lines[3], "    ·             ██           125 ms  access is skipped");
        assert_eq!(lines[6], "    ·                   ██     125 ms  body response_body: continue, 3 pieces");
        assert_eq!(lines[7], "  … 2 further steps of filters had no place");
    }

    #[test]
    fn what_a_client_chose_steers_no_terminal() {
        let nasty = "\u{1b}]0;owned\u{7}\u{9b}31m\u{202e}fdp";
        let one = Recorded { path: nasty.to_owned(), route: nasty.to_owned(), ..recorded() };
        let said = title(&one, Paint(false));
        assert!(!said.chars().any(crate::printable::steers), "{said:?}");
        assert!(said.contains("\\u001b]0;owned\\u0007\\u009b31m\\u202efdp"), "{said}");
    }

    #[test]
    fn several_exchanges_share_an_axis() {
        let (first, second) = (recorded(), Recorded { began_seconds: 101.0, ..recorded() });
        let axis = Axis::of([&first, &second], 16);
        assert!(bars(&first, axis, Paint(false))[0].starts_with("  header    ████            "));
        assert!(bars(&second, axis, Paint(false))[2].contains("              ██ "));
    }
}
