//! The colours of all boards.
//!
//! Blue is the client's side, purple the backend's, and green Forebay itself and success. Orange needs attention, and
//! red is a failure. A value of a label has the same colour on every board.

/// Success.
pub const GOOD: &str = "green";
/// Needs attention.
pub const WARN: &str = "orange";
/// A failure.
pub const BAD: &str = "red";
/// Neutral information.
pub const NEUTRAL: &str = "blue";

/// The colour of each value of a label, and of each legend of a query.
///
/// The first column is the label; it is empty for legends.
const COLOURS: &[(&str, &str, &str)] = &[
    ("code_class", "1xx", "super-light-blue"),
    ("code_class", "2xx", GOOD),
    ("code_class", "3xx", NEUTRAL),
    ("code_class", "4xx", WARN),
    ("code_class", "5xx", BAD),
    ("code_class", "none", "text"),
    ("code_class", "other", "dark-red"),
    // Blue while waiting for the client, purple while waiting for the backend, green while Forebay works.
    ("phase", "accept", "super-light-blue"),
    ("phase", "handshake", "light-blue"),
    ("phase", "header", "blue"),
    ("phase", "route", "light-green"),
    ("phase", "buffer", "semi-dark-blue"),
    ("phase", "queue", "super-light-purple"),
    ("phase", "select", "green"),
    ("phase", "connect", "light-purple"),
    ("phase", "send", "purple"),
    ("phase", "wait", "semi-dark-purple"),
    ("phase", "receive", "dark-purple"),
    ("phase", "write", "dark-blue"),
    ("phase", "finish", "dark-green"),
    // From the client, and to the client.
    ("direction", "request", "blue"),
    ("direction", "received", "blue"),
    ("direction", "response", "purple"),
    ("direction", "sent", "purple"),
    ("store", "memory", GOOD),
    ("store", "disk", WARN),
    ("action", "spill", "yellow"),
    ("action", "pause", WARN),
    ("action", "shed", BAD),
    ("operation", "write", "dark-blue"),
    ("operation", "read", "dark-purple"),
    // States of a client's connection, then of an endpoint.
    ("state", "idle", "text"),
    ("state", "header", "blue"),
    ("state", "active", GOOD),
    ("state", "healthy", GOOD),
    ("state", "unknown", "text"),
    ("state", "draining", NEUTRAL),
    ("state", "ejected", WARN),
    ("state", "unhealthy", BAD),
    ("outcome", "ok", GOOD),
    ("outcome", "new", "blue"),
    ("outcome", "reused", GOOD),
    ("outcome", "failed", BAD),
    ("outcome", "exported", GOOD),
    ("outcome", "dropped", BAD),
    ("protocol", "http1", "blue"),
    ("protocol", "h2", "purple"),
    // Higher percentiles have warmer colours.
    ("", "mean", "light-green"),
    ("", "p50", GOOD),
    ("", "p90", "yellow"),
    ("", "p99", WARN),
    ("", "limit", BAD),
    ("", "dropped", BAD),
    ("", "written", GOOD),
    ("", "busy", WARN),
    ("", "held", "purple"),
    ("", "spared", GOOD),
];

/// The colours of a query: those of all values of the label in its legend, or that of its legend.
pub fn of(legend: &str) -> Vec<(&'static str, &'static str)> {
    let label = legend.strip_prefix("{{").and_then(|label| label.strip_suffix("}}"));
    let wanted = |&&(of, name, _): &&(&'static str, &'static str, &'static str)| match label {
        Some(label) => of == label,
        None => of.is_empty() && name == legend,
    };
    COLOURS.iter().filter(wanted).map(|&(_, name, colour)| (name, colour)).collect()
}

#[test]
fn every_phase_has_a_colour_of_its_own() {
    use forebay::phase::Phase;
    let colours: std::collections::HashMap<_, _> = of("{{phase}}").into_iter().collect();
    let distinct: std::collections::HashSet<_> = colours.values().collect();
    assert!(Phase::ALL.iter().all(|phase| colours.contains_key(phase.name())));
    assert_eq!(distinct.len(), Phase::COUNT);
}
