//! Forebay's counts of an attack: refusals by reason, and handshakes. Pure; `attacks` requests the text.

use std::collections::BTreeMap;
use std::fmt;

/// Counts by name.
#[derive(Debug, Default, PartialEq)]
pub struct Counts(BTreeMap<String, f64>);

impl Counts {
    /// Parses the text of `/metrics`.
    pub fn of(metrics: &str) -> Counts {
        let mut found = BTreeMap::new();
        for line in metrics.lines() {
            let Some((series, value)) = line.rsplit_once(' ') else { continue };
            let label = |name: &str| series.split_once(&format!("{name}=\""))?.1.split('"').next();
            let name = match series.split('{').next() {
                Some("forebay_refusals_total") => label("reason").map(str::to_owned),
                Some("forebay_tls_handshakes_total") => label("resumed").map(|it| format!("handshakes, resumed: {it}")),
                _ => None,
            };
            if let (Some(name), Ok(value)) = (name, value.parse::<f64>()) {
                *found.entry(name).or_default() += value;
            }
        }
        Counts(found)
    }

    /// The increases since `before`.
    pub fn since(&self, before: &Counts) -> Counts {
        let grown = |(name, count): (&String, &f64)| {
            let more = count - before.0.get(name).copied().unwrap_or_default();
            (more > 0.0).then(|| (name.clone(), more))
        };
        Counts(self.0.iter().filter_map(grown).collect())
    }

    /// The names of all counts.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.0.keys().map(String::as_str)
    }
}

impl fmt::Display for Counts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let words: Vec<String> = self.0.iter().map(|(name, count)| format!("{name} {count}")).collect();
        f.write_str(if words.is_empty() { "nothing" } else { "" })?;
        f.write_str(&words.join("; "))
    }
}
