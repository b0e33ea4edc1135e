//! PromQL in the notation of the boards, and its expansion.
//!
//! A board contains `sum by (route) (rate(forebay_bytes_total{direction="sent"}[R]))`. [`expand`] adds to each metric
//! the matchers of the variables that it has labels for, and replaces `R` by `$__rate_interval`, so that no query can
//! miss them. [`check`] parses an expression with Prometheus' grammar and compares it with the table of metrics.

use std::collections::BTreeSet;

use forebay::metrics::family::{self, Kind};
use promql_parser::label::Matchers;
use promql_parser::parser::{self, Expr, LabelModifier, VectorSelector};
use promql_parser::util::{ExprVisitor, walk_expr};

/// The process metrics of the crate `prometheus`, and Prometheus' own metrics of a target.
pub const OTHERS: [&str; 8] = [
    "process_cpu_seconds_total",
    "process_max_fds",
    "process_open_fds",
    "process_resident_memory_bytes",
    "process_start_time_seconds",
    "process_threads",
    "process_virtual_memory_bytes",
    "up",
];

/// The labels that a scrape adds to each series.
const SCRAPED: [&str; 2] = ["job", "instance"];

/// The variables that restrict a board to values of a label. Each has the name of its label.
pub const VARIABLES: [&str; 4] = ["job", "instance", "route", "upstream"];

/// A metric in an expression: one of the table, or a part of its histogram.
#[derive(Clone, Debug, PartialEq)]
pub struct Metric {
    /// The name in the table, without the part.
    pub family: String,
    /// The labels of its samples.
    pub labels: Vec<&'static str>,
    /// Whether it is a counter, which is useful only as a rate.
    pub grows: bool,
}

/// The metric of this name; `None` if there is none.
pub fn metric(name: &str) -> Option<Metric> {
    if let Some(other) = OTHERS.iter().find(|&&other| other == name) {
        return Some(Metric { family: (*other).to_owned(), labels: SCRAPED.to_vec(), grows: name.ends_with("_total") });
    }
    let found = family::ALL.iter().find_map(|family| {
        let part = name.strip_prefix(family.name)?;
        let fits = match family.kind {
            Kind::Histogram(_) => ["_bucket", "_sum", "_count"].contains(&part),
            Kind::Counter | Kind::Gauge => part.is_empty(),
        };
        fits.then_some((family, part))
    });
    let (family, part) = found?;
    let mut labels = SCRAPED.to_vec();
    labels.extend(family.labels);
    labels.extend((part == "_bucket").then_some("le"));
    Some(Metric { family: family.name.to_owned(), labels, grows: family.kind != Kind::Gauge })
}

/// An expression as sent to Grafana. The error names an undeclared metric.
pub fn expand(written: &str) -> Result<String, String> {
    let mut expanded = String::new();
    let mut rest = written;
    while let Some(start) = rest.find(|c: char| c.is_ascii_lowercase() || c == '"') {
        expanded.push_str(&rest[..start]);
        rest = &rest[start..];
        // Text in quotes is a value and is not changed.
        if let Some(text) = rest.strip_prefix('"') {
            let end = text.find('"').map_or(rest.len(), |end| end + 2);
            expanded.push_str(&rest[..end]);
            rest = &rest[end..];
            continue;
        }
        let end = rest.find(|c: char| !c.is_ascii_alphanumeric() && c != '_' && c != ':').unwrap_or(rest.len());
        let (word, after) = rest.split_at(end);
        expanded.push_str(word);
        rest = after;
        if !word.starts_with("forebay_") && !OTHERS.contains(&word) {
            continue;
        }
        let metric = metric(word).ok_or_else(|| word.to_owned())?;
        let mut matchers: Vec<String> =
            VARIABLES.iter().filter(|v| metric.labels.contains(v)).map(|v| format!("{v}=~\"${v}\"")).collect();
        if let Some(inner) = rest.strip_prefix('{') {
            let (own, after) = inner.split_once('}').expect("matchers that end");
            matchers.push(own.to_owned());
            rest = after;
        }
        expanded.push_str(&format!("{{{}}}", matchers.join(",")));
    }
    expanded.push_str(rest);
    Ok(expanded.replace("[R]", "[$__rate_interval]"))
}

/// An expression as sent to Prometheus, with values for Grafana's variables.
pub fn filled(expr: &str, window: &str) -> String {
    let filled = expr.replace("$__rate_interval", window).replace("$job", "forebay");
    ["$instance", "$route", "$upstream"].into_iter().fold(filled, |filled, variable| filled.replace(variable, ".*"))
}

/// The variables in an expression.
pub fn variables(expr: &str) -> impl Iterator<Item = &'static str> {
    VARIABLES.into_iter().filter(move |variable| expr.contains(&format!("${variable}\"")))
}

/// The names in an expression.
#[derive(Default)]
pub struct Named {
    /// The names of families.
    pub families: BTreeSet<String>,
    /// Names that are not metrics of Forebay, such as those of recording rules.
    pub unknown: Vec<String>,
    /// The labels that its results may have.
    pub labels: BTreeSet<String>,
    /// The mistakes.
    pub faults: Vec<String>,
    /// The number of enclosing functions that evaluate a counter.
    rates: usize,
    /// The matchers of every selector.
    pub selectors: Vec<Matchers>,
    used: BTreeSet<String>,
}

/// Parses an expression and compares it with the table of metrics. Variables must have been replaced.
pub fn check(expr: &str) -> Named {
    let mut named = Named::default();
    match parser::parse(expr) {
        Err(error) => named.faults.push(error),
        Ok(parsed) => _ = walk_expr(&mut named, &parsed),
    }
    let known = &named.labels;
    let strange: Vec<_> = named.used.iter().filter(|label| !known.contains(*label)).cloned().collect();
    if named.unknown.is_empty() {
        named.faults.extend(strange.into_iter().map(|label| format!("no metric in it has the label {label}")));
    }
    named
}

/// The functions that evaluate a counter.
const OF_COUNTERS: [&str; 5] = ["rate", "irate", "increase", "resets", "changes"];

impl Named {
    fn selector(&mut self, selector: &VectorSelector) {
        let name = selector.name.clone().unwrap_or_default();
        let matchers = selector.matchers.matchers.iter().map(|matcher| matcher.name.clone());
        match metric(&name) {
            None => self.unknown.push(name),
            Some(metric) => {
                let strange = matchers.filter(|label| !metric.labels.contains(&&**label));
                self.faults.extend(strange.map(|label| format!("{name} has no label {label}")));
                self.families.insert(metric.family);
                self.labels.extend(metric.labels.iter().map(|&label| label.to_owned()));
                if metric.grows && self.rates == 0 {
                    self.faults.push(format!("{name} grows for ever: take its rate"));
                }
            }
        }
        self.selectors.push(selector.matchers.clone());
    }
}

impl ExprVisitor for Named {
    type Error = std::convert::Infallible;

    fn pre_visit(&mut self, expr: &Expr) -> Result<bool, Self::Error> {
        match expr {
            Expr::VectorSelector(selector) => self.selector(selector),
            Expr::MatrixSelector(matrix) => self.selector(&matrix.vs),
            Expr::Aggregate(aggregate) => {
                if let Some(LabelModifier::Include(labels) | LabelModifier::Exclude(labels)) = &aggregate.modifier {
                    self.used.extend(labels.labels.iter().cloned());
                }
            }
            Expr::Binary(binary) => {
                let matching = binary.modifier.as_ref().and_then(|modifier| modifier.matching.as_ref());
                if let Some(LabelModifier::Include(labels) | LabelModifier::Exclude(labels)) = matching {
                    self.used.extend(labels.labels.iter().cloned());
                }
            }
            Expr::Call(call) if OF_COUNTERS.contains(&call.func.name) => self.rates += 1,
            _ => {}
        }
        Ok(true)
    }

    fn post_visit(&mut self, expr: &Expr) -> Result<bool, Self::Error> {
        if let Expr::Call(call) = expr
            && OF_COUNTERS.contains(&call.func.name)
        {
            self.rates -= 1;
        }
        Ok(true)
    }
}

#[test]
fn a_query_is_narrowed_down_by_the_variables_that_its_metrics_have_labels_for() {
    let expanded = expand("sum by (route) (rate(forebay_bytes_total{direction=\"sent\"}[R]))").unwrap();
    let narrowed = r#"forebay_bytes_total{job=~"$job",instance=~"$instance",route=~"$route",direction="sent"}"#;
    assert_eq!(expanded, format!("sum by (route) (rate({narrowed}[$__rate_interval]))"));
    assert_eq!(expand("up").unwrap(), r#"up{job=~"$job",instance=~"$instance"}"#);
    assert_eq!(expand("forebay_nothing_total / 2").unwrap_err(), "forebay_nothing_total");
    assert_eq!(expand("forebay_bytes_total_bucket").unwrap_err(), "forebay_bytes_total_bucket");
}

#[test]
fn what_is_wrong_with_a_query_is_found() {
    for (wrong, fault) in [
        ("sum(rate(forebay_bytes_total[1m])", "unclosed left parenthesis"),
        ("sum by (phase) (rate(forebay_bytes_total[1m]))", "no metric in it has the label phase"),
        ("rate(forebay_bytes_total{phase=\"wait\"}[1m])", "forebay_bytes_total has no label phase"),
        ("sum(forebay_bytes_total)", "forebay_bytes_total grows for ever: take its rate"),
    ] {
        assert_eq!(check(wrong).faults, [fault], "{wrong}");
    }
    let right = check("sum by (le) (rate(forebay_own_seconds_bucket[1m])) > on () up");
    assert_eq!(right.faults, [] as [&str; 0]);
    assert_eq!(right.families.into_iter().collect::<Vec<_>>(), ["forebay_own_seconds", "up"]);
    assert_eq!(check("forebay_nothing").unknown, ["forebay_nothing"]);
}
