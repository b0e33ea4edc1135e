//! `forebay match` agrees with the running gateway.

use std::path::PathBuf;
use std::process::Command;

use forebay::gateway::Gateway;
use forebay::gateway::explain::Question;
use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};
use regex::Regex;

use crate::harness::{Origin, Setup};

/// Number of random requests.
const REQUESTS: usize = 10_000;

const HOSTS: [&str; 6] = ["a.test", "b.test", "x.a.test", "y.x.a.test", "A.Test.", "c.test"];
const PATHS: [&str; 9] =
    ["/", "/shop", "/shop/", "/shop/cart", "/shopping", "/item/12", "/item/x", "/a//b/../shop", "/%73hop"];
const METHODS: [&str; 4] = ["GET", "POST", "PUT", "HEAD"];

/// A route with random conditions that responds with its own name.
fn route(random: &mut StdRng, number: usize) -> String {
    let mut conditions = Vec::new();
    if random.gen_bool(0.6) {
        let host = ["a.test", "b.test", "'*.a.test'"].choose(random).expect("one");
        conditions.push(format!("hosts: [{host}]"));
    }
    if random.gen_bool(0.7) {
        let path = ["exact: /shop", "prefix: /shop", "prefix: /", "regex: '/item/[0-9]+'", "exact: /"];
        conditions.push(format!("path: {{ {} }}", path.choose(random).expect("one")));
    }
    if conditions.is_empty() || conditions == ["path: { prefix: / }"] {
        // A route for all requests would leave none to be refused.
        conditions = vec!["path: { prefix: /shop }".to_owned()];
    }
    if random.gen_bool(0.3) {
        conditions.push(format!("methods: [{}]", ["GET", "POST"].choose(random).expect("one")));
    }
    if random.gen_bool(0.4) {
        let header = ["X-Tenant: red", "X-Tenant: { regex: 'b.*' }", "X-Beta: { present: true }"];
        conditions.push(format!("headers: {{ {} }}", header.choose(random).expect("one")));
    }
    if random.gen_bool(0.2) {
        conditions.push("queries: { v: '2' }".to_owned());
    }
    if random.gen_bool(0.2) {
        conditions.push("when: 'request.headers[\"x-odd\"] == \"1\"'".to_owned());
    }
    let filter = format!("filters: [ {{ respond: {{ status: 200, body: \"r{number}\" }} }} ]");
    format!("{{ name: r{number}, match: {{ {} }}, {filter} }}", conditions.join(", "))
}

#[test]
fn it_agrees_with_the_running_gateway_on_ten_thousand_requests() {
    let mut random = StdRng::seed_from_u64(0x5eed);
    let mut routes: Vec<String> = (0..60).map(|number| route(&mut random, number)).collect();
    let origin = Origin::named("origin");
    let builder = Gateway::builder();
    let unreachable = Regex::new(r"no request reaches the route `(r\d+)`").expect("a pattern");
    let (setup, config) = loop {
        let listener = "limits: { requests_per_connection: unlimited }";
        let setup = Setup::before(&origin).routes(&routes.join("\n")).listener(listener);
        match builder.parse("test.yaml", &setup.yaml()) {
            Ok(config) => break (setup, config),
            // Two random routes are equal.
            Err(report) => {
                let told = report.to_string();
                let twins: Vec<&str> = unreachable
                    .captures_iter(&told)
                    .filter_map(|found| found.get(1))
                    .map(|name| name.as_str())
                    .collect();
                assert!(!twins.is_empty(), "{told}");
                routes.retain(|route| twins.iter().all(|twin| !route.starts_with(&format!("{{ name: {twin},"))));
            }
        }
    };
    assert!(routes.len() > 20, "{} routes", routes.len());
    let explainer = builder.explain(config).unwrap_or_else(|errors| panic!("{errors:?}"));
    let gateway = setup.start();
    let mut client = gateway.client();
    let (mut taken, mut refused) = (0, 0);
    for _ in 0..REQUESTS {
        let pick = |random: &mut StdRng, words: &[&str]| (*words.choose(random).expect("one")).to_owned();
        let (host, path, method) = (pick(&mut random, &HOSTS), pick(&mut random, &PATHS), pick(&mut random, &METHODS));
        let query = pick(&mut random, &["", "?v=2", "?v=1&v=2", "?w"]);
        let mut fields = vec![("Host".to_owned(), host)];
        for (name, values) in
            [("X-Tenant", &["red", "blue", "green"][..]), ("X-Beta", &["", "1"]), ("x-odd", &["1", "2"])]
        {
            if random.gen_bool(0.4) {
                fields.push((name.to_owned(), pick(&mut random, values)));
            }
        }
        let target = format!("{path}{query}");
        let written: String = fields.iter().map(|(name, value)| format!("{name}: {value}\r\n")).collect();
        let length = if ["POST", "PUT"].contains(&&*method) { "Content-Length: 0\r\n" } else { "" };
        client.send(format!("{method} {target} HTTP/1.1\r\n{written}{length}\r\n"));
        let answer = client.response_to(&method);
        let question = Question {
            method: method.clone(),
            url: format!("http://a.test{target}").parse().expect("a URL"),
            fields: fields.clone(),
            client: Question::CLIENT,
            listener: Some("web".to_owned()),
        };
        let said = explainer.route(&question).expect("an answer");
        let did = (answer.status == 200).then(|| answer.text().to_owned());
        match method.as_str() {
            // A HEAD response has no body with the route's name.
            "HEAD" => assert_eq!(said.is_some(), did.is_some(), "{method} {target} {fields:?}"),
            _ => assert_eq!(said, did, "{method} {target} {fields:?}: {}", answer.status),
        }
        match said {
            Some(_) => taken += 1,
            None => refused += 1,
        }
    }
    assert!(taken > 1_000 && refused > 100, "{taken} taken, {refused} refused");
}

#[test]
fn the_command_tells_it_in_words_and_in_json() {
    let origin = Origin::named("origin");
    let setup = Setup::before(&origin).also_route("{ name: shop, match: { path: { prefix: /shop } }, upstream: app }");
    setup.write();
    let file: PathBuf = setup.path("forebay.yaml");
    let asked = |arguments: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_forebay"));
        let output = command.arg("match").args(arguments).arg("-c").arg(&file).output().expect("the program");
        (output.status.code(), String::from_utf8(output.stdout).expect("text"))
    };
    let (code, text) = asked(&["GET", "http://a.test/shop", "--listener", "web"]);
    assert_eq!(code, Some(0));
    for part in ["listener   web: 127.0.0.1:0", "route      shop", "upstream   app", "(default)", "not taken  all"] {
        assert!(text.contains(part), "{part} is missing in\n{text}");
    }
    let (code, json) = asked(&["http://a.test/", "--listener", "web", "--format", "json"]);
    let json: serde_json::Value = serde_json::from_str(&json).expect("JSON");
    assert_eq!((code, &json["outcome"]["route"]["name"]), (Some(0), &"all".into()));
    assert_eq!(asked(&["TRACE", "http://a.test/", "--listener", "web"]).0, Some(1));
    assert_eq!(asked(&["http://a.test/", "--listener", "nobody"]).0, Some(2));
}
