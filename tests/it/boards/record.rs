//! What the pictures of the boards are drawn from: what Prometheus answers to each of their queries over a minute of
//! load.
//!
//! Only where `BOARD_DATA` names a folder; `dashboards/render/` makes the pictures.

use std::fs;
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde_json::{Map, Value, json};

use super::board::BOARDS;
use super::{committed, panels, query};
use crate::harness::metrics::Prometheus;

/// How much of the load is in the picture.
const COURSE: Duration = Duration::from_secs(75);
/// Over what rates are taken.
const WINDOW: &str = "10s";

/// Waits for as much load as is shown, and writes what is known of it.
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
