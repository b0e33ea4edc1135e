//! `dashboards/metrics.md`: its tables are generated from the table of metrics and the boards; the text around them
//! is written by hand.
//!
//! A metric stays in its table. A new one is added to the table of the metric that is declared before it.

use std::collections::BTreeMap;

use forebay::metrics::{Metrics, RouteMetrics, family};

use super::board::BOARDS;
use super::{all, expressions, keep, panels, query, read};

/// The first two lines of each table.
const HEAD: &str = "| name | type | labels | what it tells | boards |\n|---|---|---|---|---|\n";

/// The text before the number of series that a route reserves.
const RESERVES: &str = "A route reserves ";

/// The row of each metric with its name, in the order of declaration.
fn rows() -> Vec<(String, String)> {
    let boards = shown();
    let row = |name: &str, kind: &str, labels: &[&str], help: &str| {
        let labels: Vec<_> = labels.iter().map(|label| format!("`{label}`")).collect();
        let boards = boards.get(name).map_or(String::new(), |boards| boards.join(", "));
        (name.to_owned(), format!("| `{name}` | {kind} | {} | {help} | {boards} |\n", labels.join(", ")))
    };
    let ours = family::ALL.iter().map(|family| row(family.name, family.kind.name(), family.labels, family.help));
    let text = String::from_utf8(Metrics::new(0, Vec::new()).render()).expect("text");
    let of_process = text.lines().filter_map(|line| line.strip_prefix("# HELP ")?.split_once(' '));
    let of_process = of_process.filter(|(name, _)| name.starts_with("process_")).map(|(name, help)| {
        let kind = if name.ends_with("_total") { "counter" } else { "gauge" };
        row(name, kind, &[], help)
    });
    ours.chain(of_process).collect()
}

/// The titles of the boards with a metric.
fn shown() -> BTreeMap<String, Vec<&'static str>> {
    let mut shown: BTreeMap<String, Vec<&'static str>> = BTreeMap::new();
    for (board, (_, title)) in all().iter().zip(BOARDS) {
        for expr in panels(&board.json()).flat_map(|(_, panel)| expressions(panel)) {
            for family in query::check(&query::filled(expr, "1m")).families {
                let titles = shown.entry(family).or_default();
                if titles.last() != Some(&title) {
                    titles.push(title);
                }
            }
        }
    }
    shown
}

/// The page with regenerated tables.
fn made_of(page: &str) -> String {
    let name_of = |line: &str| Some(line.strip_prefix("| `")?.split_once('`')?.0.to_owned());
    // The table of each metric. A table is identified by the number of other lines before it.
    let mut tables: BTreeMap<String, usize> = BTreeMap::new();
    let mut words = 0;
    for line in page.lines() {
        words += usize::from(!line.starts_with('|'));
        tables.extend(name_of(line).map(|name| (name, words)));
    }
    let mut rows_of: BTreeMap<usize, String> = BTreeMap::new();
    let mut table = *tables.values().min().expect("a table");
    for (name, row) in rows() {
        table = tables.get(&name).copied().unwrap_or(table);
        *rows_of.entry(table).or_default() += &row;
    }
    let mut made = String::new();
    let mut words = 0;
    for line in page.lines().filter(|line| !line.starts_with('|')) {
        let line = match line.find(RESERVES) {
            Some(start) => {
                let (before, after) = line.split_at(start + RESERVES.len());
                format!("{before}{}{}", RouteMetrics::SERIES, after.trim_start_matches(|c: char| c.is_ascii_digit()))
            }
            None => line.to_owned(),
        };
        made += &(line + "\n");
        words += 1;
        made.extend(rows_of.get(&words).map(|rows| format!("{HEAD}{rows}")));
    }
    made
}

#[test]
fn the_reference_lists_every_metric_and_where_it_is_shown() {
    keep("metrics.md", &made_of(&read("metrics.md")));
}

#[test]
fn a_new_metric_comes_behind_the_one_before_it_and_an_old_one_goes() {
    let page = made_of("# One\n| `forebay_workers` |\n# Two\n| `process_threads` |\n| `forebay_gone` |\n# Three\n");
    let order = ["# One", "| `forebay_workers`", "| `forebay_build_info`", "# Two", "| `process_threads`", "# Three"];
    let places: Vec<_> = order.into_iter().map(|text| page.find(text)).collect();
    assert!(places.is_sorted() && places[0].is_some() && !page.contains("forebay_gone"), "{page}");
}
