//! `forebay timeline`, which `make demo` runs: the classic picture of an event loop, from the records of a gateway.

use std::process::Command;

/// A line of the timeline: its client, its name in the classic picture, and its cycle.
#[derive(Clone, Debug, PartialEq)]
struct Step {
    whose: String,
    classic: String,
    cycle: u64,
}

fn timeline(arguments: &[&str]) -> (Vec<Step>, String) {
    let run =
        Command::new(env!("CARGO_BIN_EXE_forebay")).arg("timeline").args(arguments).output().expect("the program");
    let text = String::from_utf8(run.stdout).expect("UTF-8");
    assert!(run.status.success(), "{}\n{text}", String::from_utf8_lossy(&run.stderr));
    let mut cycle = 0;
    let mut steps = Vec::new();
    for line in text.lines().take_while(|line| !line.starts_with("The same")) {
        if let Some(heading) = line.strip_prefix("── cycle ") {
            let digits: String = heading.chars().take_while(char::is_ascii_digit).collect();
            cycle = digits.parse().expect("a cycle");
        } else if let Some(step) = step(line, cycle) {
            steps.push(step);
        }
    }
    (steps, text)
}

fn step(line: &str, cycle: u64) -> Option<Step> {
    let whose =
        ["slow reader", "half a body", "late backend", "fast client"].into_iter().find(|whose| line.contains(whose))?;
    let (_, rest) = line.split_once(whose)?;
    let classic = rest.split_whitespace().next()?.to_owned();
    Some(Step { whose: whose.to_owned(), classic, cycle })
}

/// The position of a step among all steps.
fn place(steps: &[Step], whose: &str, classic: &str) -> usize {
    let found = steps.iter().position(|step| step.whose == whose && step.classic.starts_with(classic));
    found.unwrap_or_else(|| panic!("no {classic} of {whose} in {steps:#?}"))
}

#[test]
fn the_classic_picture_is_seen_live() {
    // Long compared to a step on a busy machine.
    let pauses = ["--fast-after", "500ms", "--backend-after", "1s", "--rest-after", "2s", "--reader-after", "3s"];
    let (steps, text) = timeline(&pauses);
    let order = [
        ("slow reader", "EQ1"),
        ("half a body", "EQ2"),
        ("late backend", "EQ3"),
        ("fast client", "EQ4"),
        ("fast client", "P4_FINISH"),
        ("late backend", "H3_READ"),
        ("half a body", "H4_READ"),
        ("half a body", "P4_FINISH"),
        ("slow reader", "P5_FINISH"),
    ];
    let of_the_slow_one = [
        ("slow reader", "EQ1"),
        ("slow reader", "H1_READ"),
        ("slow reader", "P1_PROXY"),
        ("slow reader", "H3_READ"),
        ("slow reader", "P3_WRITE"),
        ("slow reader", "P5_FINISH"),
    ];
    let of_the_half_body =
        [("half a body", "EQ2"), ("half a body", "H2_READ"), ("half a body", "H4_READ"), ("half a body", "P1_PROXY")];
    for order in [&order[..], &of_the_slow_one, &of_the_half_body] {
        let places: Vec<_> = order.iter().map(|(whose, classic)| place(&steps, whose, classic)).collect();
        assert!(places.is_sorted(), "{order:?}\n{text}");
    }
    assert!(steps.is_sorted_by_key(|step| step.cycle), "{text}");
    let waits = |classic: &str| steps[place(&steps, "half a body", classic)].cycle;
    assert!(waits("H2_READ") < waits("H4_READ"), "the worker had other cycles meanwhile: {text}");
    assert!(text.contains("4.0 KiB of 8.0 KiB are here") && text.contains("are kept for it"), "{text}");
}

#[test]
fn it_is_no_script_other_pauses_give_another_order() {
    let order = |arguments: &[&str]| {
        let (steps, _) = timeline(arguments);
        place(&steps, "late backend", "H3_READ") < place(&steps, "half a body", "H4_READ")
    };
    assert!(order(&["--backend-after", "100ms", "--rest-after", "1s"]), "the backend first");
    assert!(!order(&["--backend-after", "1s", "--rest-after", "100ms"]), "the rest of the body first");
}
