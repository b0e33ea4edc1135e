//! Records the data for the pictures of the boards: Prometheus' results of each query over a minute of load.
//!
//! Runs only if `BOARD_DATA` names a directory; `dashboards/render/` draws the pictures.

use std::fs;
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde_json::{Map, Value, json};

use super::board::BOARDS;
use super::{committed, panels, query};
use crate::harness::metrics::Prometheus;

/// The time range of the pictures.
const COURSE: Duration = Duration::from_secs(75);
/// The interval of rates.
const WINDOW: &str = "10s";

/// Waits for as much load as the pictures show, and writes the results.
pub fn record(prometheus: &Prometheus, folder: &Path) {
    std::thread::sleep(COURSE);
    let to = SystemTime::now().duration_since(UNIX_EPOCH).expect("a time after 1970").as_secs();
    let from = to - COURSE.as_secs();
    for (file, _) in BOARDS {
        let answers: Map<String, Value> = panels(&committed(file))
            .map(|(_, panel)| {
                let targets = panel["targets"].as_array().expect("targets").iter();
                let answers = targets.map(|target| {
                    let expr = query::filled(target["expr"].as_str().expect("an expression"), WINDOW);
                    match target["instant"] == true {
                        true => prometheus.results("query", &expr, ""),
                        false => prometheus.course(&expr, from, to),
                    }
                });
                (panel["id"].to_string(), answers.collect())
            })
            .collect();
        let all = json!({ "from": from, "to": to, "step": 1, "panels": answers });
        fs::write(folder.join(format!("{file}.json")), all.to_string()).expect("a place for the data");
    }
}
