//! Turns records into steps: each phase that an exchange entered is a step, with its name in the classic picture of
//! nginx's event loop. Phases that an exchange passes in one cycle form one step.

use super::super::figures::bytes;
use crate::recorder::{Recorded, RecordedPhase};

/// Something that the worker did for an exchange.
#[derive(Clone, Debug, PartialEq)]
pub struct Step {
    /// Seconds since the first step.
    pub seconds: f64,
    /// The client.
    pub whose: &'static str,
    /// Its name in the classic picture.
    pub classic: String,
    /// The phases that were entered, in order.
    pub phases: Vec<String>,
    /// The description.
    pub what: String,
    /// The cycle of the worker's event loop.
    pub cycle: Option<u64>,
    /// Number of events that the kernel had reported to the worker by then.
    pub events: Option<u64>,
}

/// The steps of these exchanges in chronological order. New connections are numbered in the order of the kernel.
pub fn steps<'r>(exchanges: impl Iterator<Item = (&'static str, &'r Recorded)>) -> Vec<Step> {
    let mut all: Vec<Step> = exchanges.flat_map(|(whose, recorded)| steps_of(whose, recorded)).collect();
    all.sort_by(|a, b| a.seconds.total_cmp(&b.seconds));
    let first = all.first().map_or(0.0, |step| step.seconds);
    let mut connections = 0;
    for step in &mut all {
        step.seconds -= first;
        if step.classic == "EQ" {
            connections += 1;
            step.classic = format!("EQ{connections}");
        }
    }
    all
}

fn steps_of(whose: &'static str, recorded: &Recorded) -> Vec<Step> {
    let mut steps: Vec<Step> = Vec::new();
    for (place, phase) in recorded.phases.iter().enumerate() {
        let before = place.checked_sub(1).map(|place| &recorded.phases[place]);
        for (classic, what) in told(phase, before, recorded) {
            let step = Step {
                seconds: recorded.began_seconds + phase.start_seconds,
                whose,
                classic: classic.to_owned(),
                // It ends the wait of the previous phase.
                phases: vec![if classic == "H4_READ" { "buffer".to_owned() } else { phase.phase.clone() }],
                what,
                cycle: phase.cycle,
                events: phase.events,
            };
            match steps.last_mut() {
                Some(last) if last.classic == step.classic && last.cycle == step.cycle => {
                    last.phases.extend(step.phases);
                    last.what = format!("{}, {}", last.what, step.what);
                }
                _ => steps.push(step),
            }
        }
    }
    steps
}

/// The name and description of entering a phase. The end of waiting for a body is a step of its own.
fn told(phase: &RecordedPhase, before: Option<&RecordedPhase>, recorded: &Recorded) -> Vec<(&'static str, String)> {
    let came_from = before.map_or("", |before| &*before.phase);
    match &*phase.phase {
        "accept" => vec![("EQ", "its connection is ready in the kernel, and taken".to_owned())],
        "header" if came_from.is_empty() => vec![("H1_READ", "the first bytes of its header are here".to_owned())],
        "header" => vec![],
        "route" => vec![("H1_READ", "its header is whole, a route is found".to_owned())],
        "buffer" => {
            let (here, all) = (bytes(phase.received as f64), bytes(recorded.received as f64));
            vec![(
                "H2_READ",
                format!("{here} of {all} are here: interest in the rest is registered, the worker moves on"),
            )]
        }
        "select" if came_from == "buffer" => vec![
            (
                "H4_READ",
                format!(
                    "the rest is here, {} in all: only now a backend gets the request",
                    bytes(phase.received as f64)
                ),
            ),
            ("P1_PROXY", "a backend is chosen".to_owned()),
        ],
        "select" => vec![("P1_PROXY", "a backend is chosen".to_owned())],
        "queue" => vec![("P1_PROXY", "the upstream is full".to_owned())],
        "connect" => vec![("P1_PROXY", "connecting".to_owned())],
        "send" => vec![("P1_PROXY", "the request is sent".to_owned())],
        "wait" => vec![("P1_PROXY", "no thread waits for the response".to_owned())],
        "receive" => vec![("H3_READ", "the backend answers".to_owned())],
        "write" if left(phase) > 0 => {
            let (taken, left) = (bytes(phase.sent as f64), bytes(left(phase) as f64));
            vec![("P3_WRITE", format!("the client has taken {taken}; {left} are kept for it, the backend is free"))]
        }
        "write" => vec![("P3_WRITE", "the client takes it all; the backend is free".to_owned())],
        "finish" if before.is_some_and(|before| before.phase == "write" && left(before) > 0) => {
            vec![("P5_FINISH", format!("the last byte is out, {} in all", bytes(recorded.sent as f64)))]
        }
        "finish" => vec![("P4_FINISH", "the last byte is out".to_owned())],
        other => vec![("", other.to_owned())],
    }
}

/// Response bytes that had arrived and that the client had not yet taken.
fn left(phase: &RecordedPhase) -> u64 {
    phase.answered.saturating_sub(phase.sent)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Phases, each with its cycle, its start in seconds, and the bytes transferred by then.
    fn recorded(phases: &[(&str, u64, f64, [u64; 3])]) -> Recorded {
        let phase =
            |&(phase, cycle, start_seconds, [received, answered, sent]): &(&str, u64, f64, [u64; 3])| RecordedPhase {
                phase: phase.to_owned(),
                start_seconds,
                cycle: Some(cycle),
                received,
                answered,
                sent,
                ..RecordedPhase::default()
            };
        Recorded { began_seconds: 50.0, received: 8, phases: phases.iter().map(phase).collect(), ..Recorded::default() }
    }

    fn names(steps: &[Step]) -> Vec<String> {
        steps.iter().map(|step| format!("{} {}", step.whose, step.classic)).collect()
    }

    #[test]
    fn the_classic_picture_comes_out_of_the_records_of_two_clients() {
        let no = [0; 3];
        let slow = recorded(&[
            ("accept", 1, 0.0, no),
            ("header", 2, 0.1, no),
            ("route", 2, 0.1, no),
            ("select", 2, 0.11, no),
            ("connect", 2, 0.11, no),
            ("send", 3, 0.3, no),
            ("wait", 3, 0.3, no),
            ("receive", 5, 0.5, no),
            ("write", 5, 0.51, [0, 100, 40]),
            ("finish", 9, 0.9, [0, 100, 100]),
        ]);
        let half = recorded(&[
            ("accept", 1, 0.01, no),
            ("header", 2, 0.12, no),
            ("route", 2, 0.12, no),
            ("buffer", 2, 0.2, [4, 0, 0]),
            ("select", 6, 0.6, [8, 0, 0]),
            ("connect", 6, 0.6, no),
            ("receive", 7, 0.7, no),
            ("write", 7, 0.71, [8, 8, 8]),
            ("finish", 7, 0.71, no),
        ]);
        let steps = steps([("1", &slow), ("2", &half)].into_iter());
        assert_eq!(
            names(&steps),
            [
                "1 EQ1",
                "2 EQ2",
                "1 H1_READ",
                "1 P1_PROXY",
                "2 H1_READ",
                "2 H2_READ",
                "1 P1_PROXY",
                "1 H3_READ",
                "1 P3_WRITE",
                "2 H4_READ",
                "2 P1_PROXY",
                "2 H3_READ",
                "2 P3_WRITE",
                "2 P4_FINISH",
                "1 P5_FINISH"
            ]
        );
        assert_eq!(steps[3].phases, ["select", "connect"], "what is done in one cycle is one step");
        assert_eq!((steps[0].seconds, steps[5].cycle), (0.0, Some(2)));
        assert!(steps[5].what.starts_with("4 B of 8 B are here"), "{}", steps[5].what);
        assert!(steps[8].what.contains("taken 40 B; 60 B are kept"), "{}", steps[8].what);
    }

    #[test]
    fn other_times_give_another_order() {
        let one = |late: f64| recorded(&[("accept", 1, 0.0, [0; 3]), ("receive", 2, late, [0; 3])]);
        let (first, second) = (one(0.5), one(0.7));
        let order = |a, b| names(&steps([("1", a), ("2", b)].into_iter()));
        assert_eq!(order(&first, &second)[2..], ["1 H3_READ", "2 H3_READ"]);
        assert_eq!(order(&second, &first)[2..], ["2 H3_READ", "1 H3_READ"]);
    }
}
