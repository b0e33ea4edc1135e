//! `forebay reload`, `diff`, `status` and `stop`, which talk to a running gateway, and `dump`, which reads a file.

use std::io;
use std::time::{Duration, Instant};

use clap::Args;

use super::admin::Where;
use super::{ConfigFile, Failure, colourful, complain, print};
use crate::admin::status::Document;
use crate::config::units::Time;
use crate::gateway::Builder;
use crate::gateway::changes;
use crate::gateway::reload::{Done, Outcome};
use crate::printable::shown;

/// For a reload: it resolves names and reads certificates.
const PATIENCE: Duration = Duration::from_secs(60);

/// Polling interval while waiting for a gateway to stop.
const LOOK: Duration = Duration::from_millis(100);

/// The arguments of `forebay stop`.
#[derive(Args)]
pub struct Stop {
    #[command(flatten)]
    place: Where,
    /// How long to wait until it has stopped; 0s does not wait
    #[arg(long, value_name = "TIME", default_value = "10m")]
    wait: Time,
}

/// Makes a running gateway reload its file, and prints the changes.
pub fn reload(builder: &Builder, place: Where) -> Result<(), Failure> {
    let outcome = ask(builder, place, "/reload")?;
    print(&format!("generation {} runs; {}", outcome.generation, differences(&outcome)))?;
    if !outcome.needs_new_process.is_empty() {
        complain(&format!(
            "forebay: needs a new process, unchanged until then: {}",
            outcome.needs_new_process.join(", ")
        ));
    }
    Ok(())
}

/// Prints what a reload would change, and what each change ends.
pub fn diff(builder: &Builder, place: Where) -> Result<(), Failure> {
    let outcome = ask(builder, place, "/reload?dry_run=yes")?;
    print(&differences(&outcome))
}

fn differences(outcome: &Outcome) -> String {
    match outcome.changes.is_empty() {
        true => "nothing differs".to_owned(),
        false => {
            format!("{} differ:\n{}", outcome.changes.len(), changes::told(&outcome.changes)).trim_end().to_owned()
        }
    }
}

/// Sends the request and prints warnings; a rejected configuration is an error with the same report as `check`.
fn ask(builder: &Builder, place: Where, target: &str) -> Result<Outcome, Failure> {
    let endpoint = place.find_running(builder)?;
    let (status, body) = endpoint.post_whole(target, PATIENCE).map_err(Failure::Runtime)?;
    let outcome = serde_json::from_slice::<Outcome>(&body);
    match outcome {
        Ok(outcome) if outcome.result == Done::Refused => {
            complain(outcome.report.trim_end());
            let message = format!("refused: generation {} stays active", outcome.generation);
            Err(Failure::Config(message))
        }
        Ok(outcome) => {
            if !outcome.report.is_empty() {
                complain(outcome.report.trim_end());
            }
            Ok(outcome)
        }
        Err(_) => Err(Failure::Runtime(endpoint.said(status, target, &body))),
    }
}

/// Prints the effective configuration of a file, including defaults, without secrets.
pub fn dump(builder: &Builder, file: ConfigFile) -> Result<(), Failure> {
    let (_, config) = file.load(builder)?;
    if !config.warnings().is_empty() {
        complain(&config.warnings().render(colourful(&io::stderr())));
    }
    let yaml = serde_yaml::to_string(&config.shown());
    let yaml = yaml.map_err(|error| Failure::Runtime(format!("the configuration cannot be written: {error}")))?;
    // A single file is the one that was named.
    let files = if config.files().count() > 1 { config.files().collect() } else { Vec::new() };
    let files: String = files.into_iter().map(|file| format!("# {}\n", shown(file, |_| false))).collect();
    print(&format!("{files}{}", yaml.trim_end()))
}

/// Prints a summary of a running gateway.
pub fn status(builder: &Builder, place: Where) -> Result<(), Failure> {
    let endpoint = place.find_running(builder)?;
    let body = endpoint.get("/status?routes=0&slow=0&endpoints=0").map_err(Failure::Runtime)?;
    let document: Document = serde_json::from_slice(&body).map_err(|error| {
        Failure::Runtime(format!("the admin endpoint at {} is not Forebay: {error}", endpoint.address))
    })?;
    print(&told(&document))?;
    match &*document.state {
        "ready" => Ok(()),
        state => Err(Failure::Runtime(format!("not ready: it is {state}"))),
    }
}

fn told(document: &Document) -> String {
    let Document { version, state, generation, uptime_seconds, .. } = document;
    let up = humantime::format_duration(Duration::from_secs(*uptime_seconds as u64));
    let mut text = format!("forebay {version}: {state}, up {up}, generation {generation} of the configuration");
    for listener in &document.listeners {
        let open: i64 = listener.connections.values().sum();
        let spoken = listener.protocols.join(", ");
        text += &format!("\nlistener {}: {} ({spoken}), {open} connections", listener.listener, listener.address);
    }
    for upstream in &document.upstreams {
        let states = upstream.states.iter().map(|(state, count)| format!("{count} {state}"));
        let (inflight, queued) = (upstream.inflight, upstream.queued);
        let states = states.collect::<Vec<_>>().join(", ");
        text += &format!("\nupstream {}: {states}; {inflight} in flight, {queued} queued", upstream.upstream);
    }
    text
}

/// Stops a running gateway gracefully, and waits until it has ended.
pub fn stop(builder: &Builder, asked: Stop) -> Result<(), Failure> {
    let endpoint = asked.place.find_running(builder)?;
    let (status, body) = endpoint.post_whole("/stop", PATIENCE).map_err(Failure::Runtime)?;
    if status != 200 {
        return Err(Failure::Runtime(endpoint.said(status, "/stop", &body)));
    }
    let begun = Instant::now();
    while begun.elapsed() < asked.wait.0 {
        if !endpoint.is_there() {
            return print("stopped");
        }
        std::thread::sleep(LOOK);
    }
    match asked.wait.0.is_zero() {
        true => print("stopping"),
        false => Err(Failure::Runtime(format!("it has not stopped within {}", asked.wait))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::admin::status::{ListenerStatus, UpstreamStatus};

    #[test]
    fn a_status_is_a_few_lines() {
        let document = Document {
            version: "1.2.3".to_owned(),
            state: "ready".to_owned(),
            generation: 4,
            uptime_seconds: 61.5,
            listeners: vec![ListenerStatus {
                listener: "web".to_owned(),
                address: "127.0.0.1:80".to_owned(),
                protocols: vec!["http1".to_owned()],
                connections: [("idle".to_owned(), 2), ("active".to_owned(), 1)].into(),
                ..ListenerStatus::default()
            }],
            upstreams: vec![UpstreamStatus {
                upstream: "app".to_owned(),
                states: [("healthy".to_owned(), 2)].into(),
                inflight: 1,
                ..UpstreamStatus::default()
            }],
            ..Document::default()
        };
        let expected = "forebay 1.2.3: ready, up 1m 1s, generation 4 of the configuration
listener web: 127.0.0.1:80 (http1), 3 connections
upstream app: 2 healthy; 1 in flight, 0 queued";
        assert_eq!(told(&document), expected);
    }
}
