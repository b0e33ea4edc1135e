//! The boards in `dashboards/`: committed files equal the generated ones, and every query returns data.
//!
//! `UPDATE_BOARDS=1 cargo nextest run --locked -E 'test(boards)'` regenerates the files.

mod board;
mod buffering;
mod colour;
mod event_loop;
mod lint;
mod load;
mod overview;
mod phrases;
mod process;
pub mod query;
mod record;
mod reference;
mod routes;
mod rules;
mod upstreams;

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use board::{BOARDS, Board};
use forebay::metrics::family;
use serde_json::Value;

/// Metrics that panels use and that do not exist yet.
const AWAITED: &[&str] = &[];

/// Every board, in the order of [`BOARDS`].
fn all() -> [Board; BOARDS.len()] {
    [overview::board(), routes::board(), upstreams::board(), buffering::board(), event_loop::board(), process::board()]
}

/// A file of `dashboards/`.
fn path(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("dashboards").join(name)
}

/// A file of `dashboards/`, read.
fn read(name: &str) -> String {
    fs::read_to_string(path(name)).unwrap_or_else(|e| panic!("dashboards/{name}: {e}"))
}

/// Compares a file in `dashboards/` with its expected content, or writes it on request.
fn keep(name: &str, made: &str) {
    if std::env::var_os("UPDATE_BOARDS").is_some() {
        // Under another name first: other tests read the files meanwhile.
        let beside = path(&format!(".{name}.new"));
        let written = fs::write(&beside, made).and_then(|()| fs::rename(&beside, path(name)));
        written.unwrap_or_else(|e| panic!("dashboards/{name}: {e}"));
    }
    let there = fs::read_to_string(path(name)).unwrap_or_default();
    assert!(
        there == made,
        "dashboards/{name} is out of step with the code; this brings it back:\nUPDATE_BOARDS=1 cargo nextest run \
            --locked -E 'test(boards)'"
    );
}

/// A committed board.
fn committed(file: &str) -> Value {
    serde_json::from_str(&read(&format!("{file}.json"))).unwrap_or_else(|e| panic!("dashboards/{file}.json: {e}"))
}

/// The panels of a board, each with its title.
fn panels(board: &Value) -> impl Iterator<Item = (&str, &Value)> {
    board["panels"].as_array().expect("panels").iter().map(|panel| (panel["title"].as_str().expect("a title"), panel))
}

/// The expressions of a panel.
fn expressions(panel: &Value) -> impl Iterator<Item = &str> {
    panel["targets"].as_array().expect("targets").iter().map(|target| target["expr"].as_str().expect("an expression"))
}

#[test]
fn the_files_are_what_the_code_makes() {
    for (board, (file, _)) in all().iter().zip(BOARDS) {
        assert_eq!(board.file(), file);
        keep(&format!("{file}.json"), &(serde_json::to_string_pretty(&board.json()).unwrap() + "\n"));
    }
}

#[test]
fn every_metric_is_on_some_board() {
    let boards = BOARDS.map(|(file, _)| committed(file));
    let asked = boards.iter().flat_map(panels).flat_map(|(_, panel)| expressions(panel));
    let shown: BTreeSet<String> = asked.flat_map(|expr| query::check(&query::filled(expr, "1m")).families).collect();
    let there = family::ALL.iter().map(|family| family.name).chain(query::OTHERS);
    let hidden: Vec<_> = there.filter(|&name| !shown.contains(name)).collect();
    assert!(hidden.is_empty(), "no board shows {hidden:?}: draw them in tests/it/boards/");
}

#[test]
fn every_query_is_promql_and_names_what_there_is() {
    for (file, _) in BOARDS {
        for (title, panel) in panels(&committed(file)) {
            for expr in expressions(panel) {
                let named = query::check(&query::filled(expr, "1m"));
                assert!(
                    named.faults.is_empty() && named.unknown.is_empty(),
                    "{file}, {title}: {expr}: {:?} {:?}",
                    named.faults,
                    named.unknown
                );
            }
        }
    }
}
