//! The rules of Grafana's dashboard-linter, and additional ones, for the committed files.

use std::collections::BTreeSet;

use serde_json::Value;

use super::board::{BOARDS, uid};
use super::{committed, expressions, panels, query};

/// The allowed types of panels: those that Grafana 10 to 13 draw in the same way.
const TYPES: [&str; 6] = ["timeseries", "stat", "table", "heatmap", "bargauge", "state-timeline"];

/// Calls `rule` with each board and each of its panels, and names both in errors.
fn each_panel(rule: impl Fn(&Value) -> Result<(), String>) {
    for (file, _) in BOARDS {
        for (title, panel) in panels(&committed(file)) {
            rule(panel).unwrap_or_else(|fault| panic!("{file}, {title}: {fault}"));
        }
    }
}

/// An error with this message, unless the condition holds.
fn unless(holds: bool, fault: impl Into<String>) -> Result<(), String> {
    if holds { Ok(()) } else { Err(fault.into()) }
}

#[test]
fn a_board_is_classic_json_that_nobody_edits_in_place() {
    for (file, title) in BOARDS {
        let board = committed(file);
        assert_eq!(board["schemaVersion"], 41, "{file}");
        assert_eq!(board["editable"], false, "{file}");
        assert_eq!(board["uid"], uid(file), "{file}");
        assert!(board["title"].as_str().is_some_and(|said| said.ends_with(title)), "{file}");
        assert!(board["description"].as_str().is_some_and(|said| said.ends_with('.')), "{file}");
        // An import must not ask for inputs.
        assert!(board.get("__inputs").is_none() && board.get("id").is_none(), "{file}");
    }
}

#[test]
fn every_board_has_the_same_variables_and_shows_those_it_uses() {
    for (file, _) in BOARDS {
        let board = committed(file);
        let variables = board["templating"]["list"].as_array().expect("variables");
        let names: Vec<_> = variables.iter().map(|variable| variable["name"].as_str().expect("a name")).collect();
        assert_eq!(names, ["datasource", "job", "instance", "route", "upstream"], "{file}");
        let used: BTreeSet<_> =
            panels(&board).flat_map(|(_, panel)| expressions(panel)).flat_map(query::variables).collect();
        for variable in &variables[1..] {
            let name = variable["name"].as_str().expect("a name");
            assert_eq!(variable["refresh"], 2, "{file}: {name} must follow the time");
            assert_eq!(variable["hide"] == 0, used.contains(name), "{file}: {name}");
            let values =
                variable["definition"].as_str().and_then(|of| of.strip_prefix("label_values(")).expect("values");
            let (of, label) = values.rsplit_once(", ").expect("a metric and a label");
            let named = query::check(&query::filled(of, "1m").replace("(", ""));
            let strange = named.faults.iter().filter(|fault| !fault.contains("grows for ever"));
            assert_eq!(strange.count() + named.unknown.len(), 0, "{file}: {of}");
            assert!(named.labels.contains(label.trim_end_matches(')')), "{file}: {of} has no {label}");
        }
    }
}

#[test]
fn every_panel_says_what_it_shows_and_in_which_unit() {
    each_panel(|panel| {
        let kind = panel["type"].as_str().unwrap_or_default();
        unless(TYPES.contains(&kind), format!("{kind} is no type of ours"))?;
        unless(panel["title"].as_str().is_some_and(|title| !title.is_empty()), "no title")?;
        let about = panel["description"].as_str().unwrap_or_default();
        unless(about.len() > 10 && about.ends_with('.'), "its description is no sentence")?;
        unless(panel["fieldConfig"]["defaults"]["unit"].as_str().is_some_and(|unit| !unit.is_empty()), "no unit")?;
        unless(panel["datasource"]["uid"] == "${datasource}", "a data source of its own")?;
        unless(panel["targets"].as_array().is_some_and(|targets| !targets.is_empty()), "no query")
    });
}

#[test]
fn every_query_is_narrowed_down_to_the_jobs_and_instances_that_were_chosen() {
    each_panel(|panel| {
        for target in panel["targets"].as_array().expect("targets") {
            unless(target["datasource"]["uid"] == "${datasource}", "a query with a data source of its own")?;
        }
        for expr in expressions(panel) {
            // Each pair of braces is a selector; label lists are in parentheses.
            for matchers in expr.split('{').skip(1) {
                unless(matchers.starts_with("job=~\"$job\",instance=~\"$instance\""), expr)?;
            }
        }
        Ok(())
    });
}

#[test]
fn every_rate_is_over_the_interval_that_fits_the_screen() {
    each_panel(|panel| {
        for expr in expressions(panel) {
            for range in expr.split('[').skip(1) {
                unless(range.starts_with("$__rate_interval]"), expr)?;
            }
        }
        Ok(())
    });
}

#[test]
fn what_a_legend_names_is_in_the_result() {
    each_panel(|panel| {
        for target in panel["targets"].as_array().expect("targets") {
            let (expr, legend) =
                (target["expr"].as_str().expect("a query"), target["legendFormat"].as_str().expect("a legend"));
            for label in legend.split("{{").skip(1).filter_map(|rest| rest.split("}}").next()) {
                let kept = format!("by ({label})");
                let among = expr
                    .split(" by (")
                    .skip(1)
                    .any(|by| by.split(')').next().is_some_and(|list| list.split(", ").any(|l| l == label)));
                unless(among || expr.contains(&kept), format!("{label} is in the legend, but not in {expr}"))?;
            }
        }
        Ok(())
    });
}

#[test]
fn panels_lie_side_by_side_and_none_over_another() {
    for (file, _) in BOARDS {
        let mut taken = BTreeSet::new();
        for (title, panel) in panels(&committed(file)) {
            let [x, y, w, h] = ["x", "y", "w", "h"].map(|side| panel["gridPos"][side].as_u64().expect("a place"));
            assert!(x + w <= 24 && w >= 3, "{file}, {title}: {w} wide at {x}");
            for cell in (x..x + w).flat_map(|x| (y..y + h).map(move |y| (x, y))) {
                assert!(taken.insert(cell), "{file}, {title} lies over another panel");
            }
        }
    }
}

#[test]
fn links_lead_to_boards_that_there_are() {
    let known: BTreeSet<_> = BOARDS.iter().map(|(file, _)| format!("/d/{}", uid(file))).collect();
    for (file, _) in BOARDS {
        let text = committed(file).to_string();
        let links = text.split("\"url\":\"").skip(1).filter_map(|rest| rest.split(['"', '?']).next());
        let links: BTreeSet<_> = links.map(str::to_owned).collect();
        assert!(links.is_subset(&known), "{file}: {links:?}");
        assert!(links.len() >= BOARDS.len() - 1, "{file} does not link to all the others");
    }
}

#[test]
fn a_name_has_the_same_colour_on_every_board() {
    let mut colours = std::collections::BTreeMap::new();
    for (file, _) in BOARDS {
        for (title, panel) in panels(&committed(file)) {
            for change in panel["fieldConfig"]["overrides"].as_array().expect("overrides") {
                for property in
                    change["properties"].as_array().expect("properties").iter().filter(|p| p["id"] == "color")
                {
                    let name = change["matcher"]["options"].as_str().expect("a name").to_owned();
                    let colour = property["value"]["fixedColor"].as_str().expect("a colour").to_owned();
                    let first = colours.entry(name.clone()).or_insert_with(|| colour.clone());
                    assert_eq!(*first, colour, "{file}, {title}: {name}");
                }
            }
        }
    }
}
