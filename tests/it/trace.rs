//! `POST /trace` and `forebay trace`: the phases of the next matching exchanges, in order, with event loop cycles.

use std::io::{BufRead, BufReader, Read};
use std::net::SocketAddr;
use std::process::{Child, Command, Stdio};

use forebay::phase::journal;
use forebay::recorder::{Recorded, RecordedPhase};
use serde_json::Value;

use crate::harness::client::get;
use crate::harness::gateway::Watched;
use crate::harness::origin::response;
use crate::harness::wire::Wire;
use crate::harness::{Client, Gateway, Origin, Setup, end, ok};

/// An active recording, line by line.
struct Recording {
    wire: Wire,
    text: String,
}

impl Recording {
    fn begin(admin: SocketAddr, query: &str) -> Recording {
        let mut client = Client::connect(admin);
        // HTTP/1.0 has no chunked encoding.
        client.send(format!("POST /trace?{query} HTTP/1.0\r\nHost: test\r\nContent-Length: 0\r\n\r\n"));
        let mut wire = client.into_wire();
        let head = wire.head().expect("an answer");
        assert_eq!((head.status(), head.value("content-type")), (200, Some("application/x-ndjson")));
        let mut recording = Recording { wire, text: String::new() };
        assert!(recording.line()["recording"].is_object(), "the first line says that it has begun");
        recording
    }

    fn line(&mut self) -> Value {
        while !self.text.ends_with('\n') {
            self.text.push_str(&String::from_utf8_lossy(&self.wire.exactly(1).0));
        }
        serde_json::from_str(&std::mem::take(&mut self.text)).expect("JSON")
    }

    fn exchange(&mut self) -> Recorded {
        serde_json::from_value(self.line()["exchange"].take()).expect("an exchange")
    }
}

/// An upload in two halves, the second once the gateway waits for it.
fn upload_in_halves(gateway: &Gateway, path: &str) {
    let mut client = gateway.client();
    client.send(format!("POST {path}?secret=1 HTTP/1.1\r\nHost: test\r\nContent-Length: 8\r\n\r\nhalf"));
    gateway.wait_phase(forebay::phase::Phase::Buffer);
    client.send("body");
    assert_eq!(client.response().status, 200);
}

fn phase<'r>(recorded: &'r Recorded, name: &str) -> &'r RecordedPhase {
    recorded.phases.iter().find(|phase| phase.phase == name).unwrap_or_else(|| panic!("no {name} in {recorded:?}"))
}

#[test]
fn a_recording_has_every_phase_with_its_time_its_cycle_and_its_bytes() {
    let origin = Origin::answering(|request| ok(&request.body));
    let gateway = Setup::before(&origin).start();
    let mut recording = Recording::begin(gateway.admin(), "count=1");
    upload_in_halves(&gateway, "/slow");
    let recorded = recording.exchange();
    let names: Vec<_> = recorded.phases.iter().map(|phase| &*phase.phase).collect();
    let all =
        ["accept", "header", "route", "buffer", "select", "connect", "send", "wait", "receive", "write", "finish"];
    assert_eq!(names, all);
    assert_eq!((&*recorded.method, &*recorded.path, recorded.status, &*recorded.route), ("POST", "/slow", 200, "all"));
    assert_eq!((recorded.received, recorded.sent, recorded.attempts), (8, 8, 1));
    assert_eq!(gateway.log_line().number("received"), 8.0);
    for (one, next) in recorded.phases.iter().zip(&recorded.phases[1..]) {
        assert!((one.start_seconds + one.seconds - next.start_seconds).abs() < 1e-6, "they lie end to end: {one:?}");
        assert!(one.worker == Some(0) && one.cycle <= one.end_cycle && one.end_cycle == next.cycle, "{one:?} {next:?}");
        assert!(one.events <= next.events);
    }
    let sum: f64 = recorded.phases.iter().map(|phase| phase.seconds).sum();
    assert!((sum - recorded.total_seconds).abs() < 1e-6, "{sum} {recorded:?}");
    let (buffer, select) = (phase(&recorded, "buffer"), phase(&recorded, "select"));
    assert!(buffer.cycle < buffer.end_cycle, "the worker went on meanwhile: {buffer:?}");
    assert_eq!((buffer.received, select.received), (4, 8));
    assert!(
        phase(&recorded, "route").own_seconds < recorded.own_seconds && recorded.own_seconds < recorded.total_seconds
    );
    assert_eq!(recording.line()["end"], serde_json::json!({ "why": "count", "recorded": 1 }));
}

#[test]
fn only_what_matches_is_recorded_and_only_while_somebody_listens() {
    let origin = Origin::named("origin");
    let routes = "{ name: one, match: { path: { prefix: /1 } }, upstream: app }\n{ name: two, upstream: app }";
    let gateway = Setup::before(&origin).routes(routes).start();
    let mut recording =
        Recording::begin(gateway.admin(), "route=one&client=127.0.0.0/8&path=/1/a&status=2xx&count=5&for=30s");
    for path in ["/2", "/1/b", "/1/a", "/2", "/1/ab"] {
        get(gateway.web(), path);
    }
    assert_eq!((recording.exchange().path, recording.exchange().path), ("/1/a".to_owned(), "/1/ab".to_owned()));
    assert!(journal::wanted());
    drop(recording);
    gateway.wait_metric("forebay_admin_streams", |count| count == 0.0);
}

#[test]
fn a_recording_ends_in_time_and_what_it_cannot_be_is_told() {
    let origin = Origin::named("origin");
    let gateway = Setup::before(&origin).admin("streams: 1").start();
    let mut recording = Recording::begin(gateway.admin(), "for=300ms");
    let second = Client::connect(gateway.admin()).ask("POST", "/trace", "", "");
    assert_eq!((second.status, second.text().contains("admin.streams")), (503, true));
    assert_eq!(recording.line()["end"], serde_json::json!({ "why": "time", "recorded": 0 }));
    for (query, said) in
        [("route=none", "there are: all, _none"), ("count=0", "from 1 to 1000"), ("status=6xx", "404 or 5xx")]
    {
        let answer = Client::connect(gateway.admin()).ask("POST", &format!("/trace?{query}"), "", "");
        assert_eq!((answer.status, answer.text().contains(said)), (400, true), "{}", answer.text());
    }
    assert_eq!(get(gateway.admin(), "/trace").status, 405);
}

#[test]
fn an_exchange_that_is_tried_again_shows_every_attempt() {
    let [first, second] = crate::harness::origin::first_fails("/fault/reset");
    let gateway = Setup::before_all(&[first.address(), second.address()]).start();
    let mut recording = Recording::begin(gateway.admin(), "count=1");
    assert_eq!(get(gateway.web(), "/bytes/10").status, 200);
    let recorded = recording.exchange();
    let names: Vec<_> = recorded.phases.iter().map(|phase| &*phase.phase).collect();
    assert_eq!((names.iter().filter(|name| **name == "select").count(), recorded.attempts), (2, 2), "{names:?}");
}

/// `forebay trace` with this gateway, once it records.
fn traced(admin: SocketAddr, arguments: &[&str]) -> (Child, BufReader<std::process::ChildStdout>) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_forebay"));
    command.args(["trace", "--admin", &admin.to_string()]).args(arguments).env("COLUMNS", "110");
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("the program");
    let mut stdout = BufReader::new(child.stdout.take().expect("its output"));
    let mut first = String::new();
    stdout.read_line(&mut first).expect("a line");
    assert!(first.contains("ecording"), "{first}");
    (child, stdout)
}

#[test]
fn the_program_draws_a_waterfall_of_each() {
    let origin = Origin::answering(|request| ok(&request.body));
    let gateway = Setup::before(&origin).start();
    let (mut child, mut stdout) = traced(gateway.admin(), &["--route", "all", "-n", "1", "--for", "20s"]);
    upload_in_halves(&gateway, "/slow");
    let mut text = String::new();
    stdout.read_to_string(&mut text).expect("the rest");
    assert!(child.wait().expect("its end").success());
    assert!(text.contains("POST /slow  200  in "), "{text}");
    let bar = |name: &str| text.lines().find(|line| line.trim_start().starts_with(name)).unwrap_or_default().to_owned();
    assert!(bar("buffer").contains('█') && bar("buffer").contains("4 B received"), "{text}");
    assert!(bar("buffer").contains(" 0:") && bar("finish").contains(" 0:"), "{text}");
    let widths: Vec<_> =
        ["accept", "route", "wait"].map(|name| bar(name).find(" ms").or(bar(name).find(" µs"))).to_vec();
    assert!(widths.iter().all(Option::is_some), "{text}");
}

#[test]
fn the_program_says_when_there_was_nothing_and_when_nobody_answers() {
    let origin = Origin::named("origin");
    let gateway = Setup::before(&origin).start();
    let (mut child, _) = traced(gateway.admin(), &["--for", "200ms"]);
    assert_eq!(child.wait().expect("its end").code(), Some(1));
    let mut said = String::new();
    child.stderr.take().expect("its errors").read_to_string(&mut said).expect("text");
    assert!(said.contains("no matching exchange"), "{said}");
    let (mut child, stdout) = traced(gateway.admin(), &["--json", "-n", "1"]);
    get(gateway.web(), "/json");
    let lines: Vec<String> = stdout.lines().map_while(Result::ok).collect();
    assert!(lines[0].contains("\"path\":\"/json\"") && lines[1].contains("\"end\""), "{lines:?}");
    end(&mut child);
    let nobody =
        Command::new(env!("CARGO_BIN_EXE_forebay")).args(["trace", "--admin", "127.0.0.1:1"]).output().expect("it");
    assert_eq!(nobody.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&nobody.stderr).contains("connection refused"));
}

#[test]
fn http2_streams_are_recorded_too() {
    let origin = Origin::named("origin");
    let gateway = Setup::before(&origin).listener("protocols: [http1, h2c]").start();
    let mut recording = Recording::begin(gateway.admin(), "count=2");
    let client = crate::harness::H2Client::connect(gateway.web());
    client.get("/one");
    client.get("/two");
    let both = [recording.exchange(), recording.exchange()];
    assert_eq!(
        both.clone().map(|one| (one.path, one.protocol)),
        [("/one".to_owned(), "HTTP/2.0".to_owned()), ("/two".to_owned(), "HTTP/2.0".to_owned())]
    );
    assert!(both[0].began_seconds < both[1].began_seconds && both[0].phases[0].phase == "header");
    drop(client);
}

#[test]
fn the_manual_names_every_field_of_a_recording() {
    let recorded = Recorded { phases: vec![RecordedPhase::default()], ..Recorded::default() };
    let value = serde_json::to_value(&recorded).expect("JSON");
    let manual = include_str!("../../conf/manual/trace.md");
    let fields = value.as_object().expect("a map").keys().chain(value["phases"][0].as_object().expect("a map").keys());
    for field in fields {
        assert!(manual.contains(&format!("`{field}`")), "conf/manual/trace.md says nothing of `{field}`");
    }
}

#[test]
fn what_filters_did_is_below_the_phase_in_which_they_did_it() {
    let origin = Origin::answering(|_| response("200 OK", "Content-Type: text/plain\r\n", "a b"));
    let auth = Origin::answering(|_| response("204 No Content", "X-User: ada\r\n", ""));
    let filters = "forward_auth: { upstream: auth, path: /check, copy: [X-User] },
                   { access: { deny: [0.0.0.0/0] }, when: 'request.path == \"/no\"' },
                   body: { response: { replace: [ { text: a, with: c } ] } }";
    let gateway = Setup::before(&origin).also("auth", &auth).filters(filters).start();
    let mut recording = Recording::begin(gateway.admin(), "count=2");
    assert_eq!(get(gateway.web(), "/yes").text(), "c b");
    assert_eq!(get(gateway.web(), "/no").status, 403);
    let steps = |recorded: &Recorded, name: &str| -> Vec<String> {
        let phase = phase(recorded, name);
        for step in &phase.steps {
            assert!(step.start_seconds >= phase.start_seconds, "{step:?}");
            assert!(step.seconds <= recorded.total_seconds, "{step:?}");
        }
        let told = phase.steps.iter().map(|step| {
            let upstream = step.upstream.as_ref().map(|upstream| format!(" {upstream}")).unwrap_or_default();
            format!("{} {}{upstream}: {}", step.filter, step.stage, step.outcome)
        });
        told.collect()
    };
    let passed = recording.exchange();
    assert_eq!(
        steps(&passed, "route"),
        [
            "forward_auth request: continue",
            "forward_auth call auth: 204",
            "access when: skipped",
            "body request: continue"
        ]
    );
    let behind: Vec<String> = ["receive", "write"]
        .iter()
        .flat_map(|name| passed.phases.iter().filter(move |phase| phase.phase == *name))
        .flat_map(|phase| &phase.steps)
        .map(|step| format!("{} {}: {}", step.filter, step.stage, step.outcome))
        .collect();
    assert_eq!(behind, ["body response: continue", "body response_body: continue"]);
    let refused = recording.exchange();
    let in_route = steps(&refused, "route");
    assert_eq!(in_route.last().map(String::as_str), Some("access request: route.access"), "{in_route:?}");
}
