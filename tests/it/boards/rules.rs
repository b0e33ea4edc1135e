//! The alerts: their metrics exist, they fire when they should, and they tell the reader what to do.

use std::collections::BTreeSet;
use std::process::Command;

use serde_yaml::Value;

use super::{path, query, read};

/// A file of `dashboards/` as YAML.
fn yaml(name: &str) -> Value {
    serde_yaml::from_str(&read(name)).unwrap_or_else(|e| panic!("dashboards/{name}: {e}"))
}

/// All rules of `alerts.yaml`, in order.
fn rules() -> Vec<Value> {
    let groups = yaml("alerts.yaml")["groups"].as_sequence().expect("groups").clone();
    groups.iter().flat_map(|group| group["rules"].as_sequence().expect("rules").clone()).collect()
}

/// The alerts among them, by name.
fn alerts() -> Vec<(String, Value)> {
    rules().into_iter().filter_map(|rule| Some((rule["alert"].as_str()?.to_owned(), rule))).collect()
}

/// The output of `promtool`, which must succeed.
fn promtool(arguments: [&str; 2], file: &str) {
    let output = Command::new("promtool").args(arguments).arg(path(file)).output().expect("promtool");
    let said = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "promtool {} {file}:\n{said}", arguments.join(" "));
}

#[test]
fn promtool_has_nothing_against_the_rules_and_the_configuration() {
    promtool(["check", "rules"], "alerts.yaml");
    promtool(["check", "config"], "prometheus.yaml");
}

#[test]
fn alerts_fire_when_they_should_and_not_before() {
    promtool(["test", "rules"], "alerts_test.yaml");
}

#[test]
fn each_rule_names_what_there_is() {
    let rules = rules();
    let recorded: BTreeSet<_> = rules.iter().filter_map(|rule| rule["record"].as_str()).collect();
    for rule in &rules {
        let expr = rule["expr"].as_str().expect("an expression");
        let named = query::check(expr);
        let unknown: Vec<_> = named.unknown.iter().filter(|name| !recorded.contains(name.as_str())).collect();
        assert!(named.faults.is_empty() && unknown.is_empty(), "{expr}: {:?} {unknown:?}", named.faults);
        let said = serde_yaml::to_string(&rule["annotations"]).expect("text");
        for label in said.split("$labels.").skip(1) {
            let label = label.split(|c: char| !c.is_ascii_alphanumeric() && c != '_').next().expect("a label");
            let there = named.labels.contains(label) || !named.unknown.is_empty() && label == "job";
            assert!(there, "{expr} has no label {label}");
        }
    }
}

#[test]
fn each_alert_is_tested_both_ways() {
    let tests = read("alerts_test.yaml");
    for (name, _) in alerts() {
        let named = format!("alertname=\"{name}\"");
        let of_it: Vec<_> = tests.lines().filter(|line| line.contains(&named)).collect();
        assert!(of_it.iter().any(|line| line.contains("value: 1")), "no test lets {name} fire");
        assert!(of_it.iter().any(|line| line.ends_with("exp_samples: [] }")), "no test keeps {name} quiet");
    }
}

#[test]
fn each_alert_says_who_should_care_and_has_a_runbook() {
    let runbooks = read("runbooks.md");
    let sections: Vec<(&str, &str)> =
        runbooks.split("\n## ").skip(1).map(|section| section.split_once('\n').expect("a section")).collect();
    for (name, alert) in alerts() {
        let severity = alert["labels"]["severity"].as_str().unwrap_or_default();
        assert!(["page", "ticket", "info"].contains(&severity), "{name}: {severity}");
        for text in ["summary", "description"] {
            assert!(alert["annotations"][text].as_str().is_some_and(|said| said.len() > 10), "{name} has no {text}");
        }
        let expected = format!("dashboards/runbooks.md#{}", name.to_lowercase());
        assert_eq!(alert["annotations"]["runbook_url"], expected.as_str(), "{name}");
        let (_, section) = sections.iter().find(|(title, _)| *title == name).unwrap_or_else(|| {
            panic!(
                "{name} has no \
         runbook"
            )
        });
        for part in ["**It means**", "**Look at**", "**Do**"] {
            assert!(section.contains(part), "the runbook of {name} lacks {part}");
        }
    }
    let known: Vec<String> = alerts().into_iter().map(|(name, _)| name).collect();
    let titles: Vec<_> = sections.iter().map(|(title, _)| *title).collect();
    assert_eq!(titles, known, "the runbooks are in the order of the alerts");
}
