//! Reads `/metrics` for stories, and runs a real Prometheus.

use std::fs::File;
use std::io::Write;
use std::net::SocketAddr;
use std::process::{Child, Command, Stdio};

use serde_json::Value;
use tempfile::TempDir;

use super::client::get;
use super::{end, eventually, listening};

/// One reading of `/metrics`.
pub struct Scrape(String);

impl Scrape {
    /// Reads `/metrics` of the admin endpoint at this address.
    pub fn of(admin: SocketAddr) -> Scrape {
        let response = get(admin, "/metrics");
        assert_eq!(response.status, 200, "/metrics");
        Scrape(response.text().to_owned())
    }

    /// The text as it was read.
    pub fn text(&self) -> &str {
        &self.0
    }

    /// The sum of all samples that match a selector such as `forebay_exchanges_total{route="all"}`; labels that it
    /// does not mention may have any value. Zero without samples.
    pub fn sum(&self, selector: &str) -> f64 {
        self.samples(selector).iter().sum()
    }

    /// The samples that match a selector.
    pub fn samples(&self, selector: &str) -> Vec<f64> {
        let (name, wanted) = series(selector);
        let lines = self.0.lines().filter(|line| !line.starts_with('#'));
        lines
            .filter_map(|line| {
                let (written, value) = line.rsplit_once(' ')?;
                let (found, labels) = series(written);
                let taken = found == name && wanted.iter().all(|label| labels.contains(label));
                taken.then(|| value.parse().expect("the value of a sample"))
            })
            .collect()
    }
}

/// A name and its labels, each as `name="value"`. No value in these stories contains a comma.
fn series(written: &str) -> (&str, Vec<&str>) {
    match written.split_once('{') {
        Some((name, labels)) => (name, labels.trim_end_matches('}').split(',').filter(|l| !l.is_empty()).collect()),
        None => (written, Vec::new()),
    }
}

/// The complaints of `promtool check metrics` about a text; empty if there are none.
pub fn promtool(text: &str) -> String {
    let mut child = Command::new("promtool")
        .args(["check", "metrics"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("promtool, which `make test` installs with prometheus");
    child.stdin.take().expect("its input").write_all(text.as_bytes()).expect("promtool to read");
    let output = child.wait_with_output().expect("its end");
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

/// A real Prometheus that scrapes one admin endpoint five times a second.
pub struct Prometheus {
    child: Child,
    address: SocketAddr,
    _dir: TempDir,
}

impl Prometheus {
    /// Starts it.
    pub fn scraping(admin: SocketAddr) -> Prometheus {
        let dir = tempfile::tempdir().expect("a directory");
        let config = dir.path().join("prometheus.yml");
        let scrape = format!(
            "global: {{ scrape_interval: 200ms, scrape_timeout: 200ms }}\n\
             scrape_configs: [ {{ job_name: forebay, static_configs: [ {{ targets: ['{admin}'] }} ] }} ]\n"
        );
        std::fs::write(&config, scrape).expect("its configuration");
        let (child, [address]) = listening("prometheus", |[port]| {
            let log = File::create(dir.path().join("log")).expect("its log");
            Command::new("prometheus")
                .arg(format!("--config.file={}", config.display()))
                .arg(format!("--storage.tsdb.path={}", dir.path().join("data").display()))
                .arg(format!("--web.listen-address=127.0.0.1:{port}"))
                .stdout(Stdio::null())
                .stderr(log)
                .spawn()
                .expect("prometheus, which `make test` installs")
        });
        Prometheus { child, address, _dir: dir }
    }

    /// Waits until an instant query has results, and returns their values.
    pub fn query(&self, query: &str) -> Vec<f64> {
        eventually(&format!("Prometheus to know {query}"), || self.answer(query).filter(|values| !values.is_empty()))
    }

    /// The values of an instant query; `None` if the query is invalid.
    pub fn answer(&self, query: &str) -> Option<Vec<f64>> {
        let results = self.results("query", query, "")?;
        results.as_array()?.iter().map(|r| r["value"][1].as_str()?.parse().ok()).collect()
    }

    /// The results of a range query with a step of one second.
    pub fn course(&self, query: &str, from: u64, to: u64) -> Option<Value> {
        self.results("query_range", query, &format!("&start={from}&end={to}&step=1"))
    }

    /// The results of a query in Prometheus's format; `None` if the query is invalid.
    pub fn results(&self, kind: &str, query: &str, more: &str) -> Option<Value> {
        let escaped: String = query.bytes().map(|byte| format!("%{byte:02X}")).collect();
        let response = get(self.address, &format!("/api/v1/{kind}?query={escaped}{more}"));
        (response.status == 200).then(|| response.json()["data"]["result"].take())
    }
}

impl Drop for Prometheus {
    fn drop(&mut self) {
        end(&mut self.child);
    }
}
