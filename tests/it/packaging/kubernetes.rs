//! The chart, and the plain manifests that are generated from it.
//!
//! Helm's library renders the chart, and the schemas of Kubernetes validate the result (`chart.py`).

use std::fs;
use std::io::Write;
use std::process::{Command, Stdio};

use serde_json::{Value as Json, json};

use super::{forebay, here, pypi, said, text, tree};
use crate::boards::query;

const CHART: &str = "conf/k8s/chart";

/// The chart's result for each of these values: manifests, or an error.
fn rendered(values: &[Json]) -> Vec<Result<Vec<Json>, String>> {
    let mut command = Command::new(pypi("python"));
    command.arg(tree("tests/it/packaging/chart.py")).arg(tree(CHART));
    let mut process = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut stdin = process.stdin.take().unwrap();
    stdin.write_all(json!(values).to_string().as_bytes()).unwrap();
    drop(stdin);
    let output = process.wait_with_output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let answers: Vec<Json> = serde_json::from_slice(&output.stdout).unwrap();
    let answer = |answer: Json| match answer["refused"].as_str() {
        Some(why) => Err(why.to_owned()),
        None => Ok(answer["documents"].as_array().unwrap().clone()),
    };
    answers.into_iter().map(answer).collect()
}

fn manifests(values: Json) -> Vec<Json> {
    rendered(&[values]).remove(0).unwrap()
}

/// The only document of a kind.
fn of_kind<'d>(documents: &'d [Json], kind: &str) -> &'d Json {
    let mut found = documents.iter().filter(|document| document["kind"] == kind);
    let document = found.next().unwrap_or_else(|| panic!("no {kind}"));
    assert!(found.next().is_none(), "two of {kind}");
    document
}

/// All features of the chart at once.
fn everything() -> Json {
    json!({
        "watch": true,
        "autoscaling": { "enabled": true, "metrics": [
            { "name": "forebay_loop_busy_ratio", "averageValue": "600m" },
            { "name": "forebay_exchanges_active", "averageValue": "500" },
        ] },
        "podMonitor": { "enabled": true, "labels": { "release": "prometheus" } },
        "admin": { "port": 9200, "token": { "name": "forebay-admin", "key": "token" } },
        "secrets": ["shop-tls"],
        "env": [{ "name": "REGION", "value": "north" }],
        "service": { "type": "LoadBalancer", "externalTrafficPolicy": "Local", "annotations": { "a/b": "c" } },
        "podAnnotations": { "team": "edge" },
        "podLabels": { "tier": "edge" },
        "imagePullSecrets": [{ "name": "registry" }],
        "nodeSelector": { "kubernetes.io/os": "linux" },
        "tolerations": [{ "operator": "Exists" }],
        "affinity": { "podAntiAffinity": { "preferredDuringSchedulingIgnoredDuringExecution": [] } },
        "spool": { "size": "1Gi", "medium": "Memory" },
    })
}

#[test]
fn kubernetes_accepts_what_the_chart_makes_of_good_values() {
    let daemon = json!({ "kind": "DaemonSet", "networkPolicy": { "enabled": false } });
    for made in rendered(&[json!({}), everything(), daemon]) {
        let made = made.unwrap();
        let workload = made.iter().find(|made| made["kind"] == "Deployment" || made["kind"] == "DaemonSet").unwrap();
        let labels = &workload["spec"]["template"]["metadata"]["labels"];
        let selectors = [&workload["spec"]["selector"]["matchLabels"], &of_kind(&made, "Service")["spec"]["selector"]];
        for selector in selectors {
            for (key, value) in selector.as_object().unwrap() {
                assert_eq!(&labels[key], value);
            }
        }
    }
}

#[test]
fn the_chart_refuses_values_that_cannot_work_and_says_why() {
    let wrong = [
        (json!({ "kind": "StatefulSet" }), "kind"),
        (json!({ "kind": "DaemonSet", "autoscaling": { "enabled": true } }), "a DaemonSet has a pod on each node"),
        (json!({ "config": { "server": { "shutdown": { "pause": "1s" } } } }), "server"),
        (json!({ "config": { "admin": { "address": "127.0.0.1:1" } } }), "admin"),
        (json!({ "drain": { "pauseSeconds": "5s" } }), "pauseSeconds"),
        (json!({ "admin": { "token": { "name": "without-a-key" } } }), "token"),
        (json!({ "service": { "ports": [] } }), "ports"),
        (json!({ "replica": 3 }), "replica"),
    ];
    let values: Vec<_> = wrong.iter().map(|(values, _)| values.clone()).collect();
    for (answer, (values, named)) in rendered(&values).into_iter().zip(&wrong) {
        let why = answer.expect_err(&values.to_string());
        assert!(why.contains(named), "{values}: {why}");
    }
}

#[test]
fn forebay_accepts_the_configuration_and_the_arguments_of_the_chart() {
    let directory = tempfile::tempdir().unwrap();
    for (values, port) in [(json!({}), 9100), (everything(), 9200)] {
        let made = manifests(values);
        let config = of_kind(&made, "ConfigMap")["data"]["forebay.yaml"].as_str().unwrap();
        assert!(config.contains(&format!("0.0.0.0:{port}")), "{config}");
        let path = directory.path().join("forebay.yaml");
        fs::write(&path, here(config, directory.path())).unwrap();
        let token = "0123456789abcdef0123456789abcdef";
        said(forebay(&["check", "-c", path.to_str().unwrap()]).env("FOREBAY_ADMIN_TOKEN", token));
    }
    for (watch, arguments) in [(true, &["run", "--watch"][..]), (false, &["run"])] {
        let made = manifests(json!({ "watch": watch }));
        let container = &of_kind(&made, "Deployment")["spec"]["template"]["spec"]["containers"][0];
        let whole = [arguments, &["-c", "/etc/forebay/forebay.yaml"]].concat();
        assert_eq!(container["args"], json!(whole));
        let help = said(&mut forebay(&["run", "--help"]));
        assert!(whole.iter().filter(|word| word.starts_with('-')).all(|option| help.contains(option)), "{help}");
    }
}

#[test]
fn a_pod_has_the_time_to_drain_and_its_probes_ask_the_admin_endpoint() {
    let drain = json!({ "drain": { "preStopSeconds": 7, "pauseSeconds": 11, "deadlineSeconds": 120 } });
    let made = manifests(drain);
    let pod = &of_kind(&made, "Deployment")["spec"]["template"]["spec"];
    assert_eq!(pod["terminationGracePeriodSeconds"], 7 + 11 + 120 + 10);
    let container = &pod["containers"][0];
    assert_eq!(container["lifecycle"]["preStop"]["exec"]["command"], json!(["sleep", "7"]));
    let config = of_kind(&made, "ConfigMap")["data"]["forebay.yaml"].as_str().unwrap();
    let config: Json = serde_yaml::from_str(config).unwrap();
    assert_eq!(config["server"]["shutdown"], json!({ "pause": "11s", "deadline": "120s" }));
    let admin = container["ports"].as_array().unwrap().iter().find(|port| port["name"] == "admin").unwrap();
    assert!(config["admin"]["address"].as_str().unwrap().ends_with(&format!(":{}", admin["containerPort"])));
    for (probe, path) in [("startupProbe", "/healthz"), ("livenessProbe", "/healthz"), ("readinessProbe", "/readyz")] {
        assert_eq!(container[probe]["httpGet"], json!({ "path": path, "port": "admin" }), "{probe}");
    }
}

#[test]
fn a_changed_configuration_restarts_pods_unless_forebay_watches_it() {
    let note = |mut values: Json, watch: bool| {
        values["watch"] = json!(watch);
        let made = manifests(values);
        let pod = &of_kind(&made, "Deployment")["spec"]["template"]["metadata"];
        pod["annotations"]["checksum/config"].as_str().map(str::to_owned)
    };
    let other = json!({ "config": { "resources": { "memory": "64MiB" } } });
    assert_ne!(note(json!({}), false).expect("a checksum"), note(other, false).expect("a checksum"));
    assert_eq!(note(json!({}), true), None);
    let watching = manifests(json!({}));
    let container = &of_kind(&watching, "Deployment")["spec"]["template"]["spec"]["containers"][0];
    assert_eq!(container["args"][1], "--watch");
    // A file that is mounted with subPath is never updated.
    for mount in container["volumeMounts"].as_array().unwrap() {
        assert!(mount["subPath"].is_null(), "{mount}");
    }
}

#[test]
fn pods_are_scaled_by_metrics_that_there_are() {
    let made = manifests(everything());
    let scaler = &of_kind(&made, "HorizontalPodAutoscaler")["spec"];
    assert!(of_kind(&made, "Deployment")["spec"]["replicas"].is_null(), "two would decide how many pods there are");
    let rules: Json = serde_yaml::from_str(&text("conf/k8s/prometheus-adapter.yaml")).unwrap();
    let rules = rules["rules"]["custom"].as_array().unwrap();
    for metric in scaler["metrics"].as_array().unwrap() {
        let name = &metric["pods"]["metric"]["name"];
        assert!(rules.iter().any(|rule| &rule["name"]["as"] == name), "no rule of the adapter makes {name}");
    }
    for rule in rules {
        let query = rule["metricsQuery"].as_str().unwrap();
        let query = query.replace("<<.LabelMatchers>>", r#"instance="a""#).replace("<<.GroupBy>>", "instance");
        let found = query::check(&query);
        assert!(found.faults.is_empty() && found.unknown.is_empty(), "{query}: {:?} {:?}", found.faults, found.unknown);
        let series = rule["seriesQuery"].as_str().unwrap().split('{').next().unwrap();
        assert!(query::metric(series).is_some(), "{series}");
    }
}

#[test]
fn prometheus_finds_the_pods_and_shows_the_token() {
    let made = manifests(everything());
    let monitor = &of_kind(&made, "PodMonitor")["spec"];
    let endpoint = &monitor["podMetricsEndpoints"][0];
    assert_eq!((&endpoint["port"], &endpoint["path"]), (&json!("admin"), &json!("/metrics")));
    assert_eq!(endpoint["authorization"]["credentials"], json!({ "name": "forebay-admin", "key": "token" }));
    let pod = &of_kind(&made, "Deployment")["spec"]["template"];
    for (key, value) in monitor["selector"]["matchLabels"].as_object().unwrap() {
        assert_eq!(&pod["metadata"]["labels"][key], value);
    }
    let variable = &pod["spec"]["containers"][0]["env"][0];
    assert_eq!(variable["valueFrom"]["secretKeyRef"], json!({ "name": "forebay-admin", "key": "token" }));
}

#[test]
fn a_pod_may_do_no_more_than_it_needs() {
    let made = manifests(json!({}));
    let pod = &of_kind(&made, "Deployment")["spec"]["template"]["spec"];
    assert_eq!(pod["securityContext"]["runAsNonRoot"], true);
    assert_eq!(pod["automountServiceAccountToken"], false);
    let container = &pod["containers"][0]["securityContext"];
    assert_eq!(container["readOnlyRootFilesystem"], true);
    assert_eq!(container["allowPrivilegeEscalation"], false);
    assert_eq!(container["capabilities"]["drop"], json!(["ALL"]));
    // The numeric user of the image.
    let user = pod["securityContext"]["runAsUser"].to_string();
    assert!(text("Dockerfile").contains(&format!("\nUSER {user}:{user}\n")));
    let rules = of_kind(&made, "NetworkPolicy")["spec"]["ingress"].as_array().unwrap();
    let open = rules.iter().find(|rule| rule["from"].is_null()).expect("clients");
    assert_eq!(open["ports"], json!([{ "port": "http", "protocol": "TCP" }]));
}

#[test]
fn the_plain_manifests_are_what_the_chart_makes_by_default() {
    let mut made = manifests(json!({}));
    for document in &mut made {
        let metadata = document["metadata"].as_object_mut().unwrap();
        metadata.remove("namespace");
        // Helm does not manage these resources.
        metadata["labels"]
            .as_object_mut()
            .unwrap()
            .retain(|label, _| !label.contains("managed-by") && !label.contains("helm"));
    }
    let mut wanted = String::from(
        "# What the chart beside this makes of its default values, for kubectl:\n\
         #\n\
         #   kubectl create namespace edge && kubectl -n edge apply -f forebay.yaml\n",
    );
    for document in &made {
        wanted.push_str("---\n");
        wanted.push_str(&serde_yaml::to_string(document).unwrap().replace("edge-forebay", "forebay"));
    }
    let path = tree("conf/k8s/forebay.yaml");
    if std::env::var_os("UPDATE_MANIFESTS").is_some() {
        fs::write(&path, &wanted).unwrap();
    }
    assert!(
        fs::read_to_string(&path).unwrap_or_default() == wanted,
        "conf/k8s/forebay.yaml is out of step with the chart; this brings it back:\n\
         UPDATE_MANIFESTS=1 cargo nextest run --locked -E 'test(plain_manifests)'"
    );
}

#[test]
fn the_chart_is_of_the_version_of_the_program() {
    let chart: Json = serde_yaml::from_str(&text("conf/k8s/chart/Chart.yaml")).unwrap();
    assert_eq!(chart["appVersion"], env!("CARGO_PKG_VERSION"));
}
