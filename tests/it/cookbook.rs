//! The cookbook, `conf/examples`: every file is loaded, run, and does what it promises.
//!
//! Files are run unchanged, except for addresses, certificates and directories of the machine.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use regex::Regex;

use crate::harness::client::request;
use crate::harness::collector::Collector;
use crate::harness::gateway::{Watched, read_lines};
use crate::harness::grpcio::{GrpcClient, GrpcServer};
use crate::harness::origin::{built_in, response};
use crate::harness::pebble::Pebble;
use crate::harness::secure::{Authority, Identity, Layers, Secure};
use crate::harness::tls::Tls;
use crate::harness::wire::Response;
use crate::harness::{Client, Gateway, Origin, Setup, eventually, ok};
use crate::tokens;

const EXAMPLES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/conf/examples");

/// One file of the cookbook on its way to a running gateway.
struct Recipe {
    name: &'static str,
    text: String,
}

impl Recipe {
    fn of(name: &'static str) -> Recipe {
        let text = fs::read_to_string(format!("{EXAMPLES}/{name}.yaml")).unwrap_or_else(|e| panic!("{name}: {e}"));
        Recipe { name, text }
    }

    /// Replaces a text in the file by a local value.
    fn at(mut self, written: &str, here: impl ToString) -> Recipe {
        assert!(self.text.contains(written), "{} has no {written}", self.name);
        self.text = self.text.replace(written, &here.to_string());
        self
    }

    /// Puts these origins in place of `127.0.0.1:3000`, `:3001` and so on.
    fn before(self, origins: &[&Origin]) -> Recipe {
        let written = (3000..).map(|port| format!("127.0.0.1:{port}"));
        origins.iter().zip(written).fold(self, |recipe, (origin, written)| recipe.at(&written, origin.address()))
    }

    /// Puts this certificate in place of that of the site.
    fn showing(self, identity: &Identity) -> Recipe {
        let recipe = self.at("/etc/forebay/site.pem", identity.certificate.display());
        recipe.at("/etc/forebay/site.key", identity.key.display())
    }

    fn start(self) -> Gateway {
        let everywhere = Regex::new(r"0\.0\.0\.0:\d+").expect("a pattern");
        let text = everywhere.replace_all(&self.text, "127.0.0.1:0").into_owned();
        let left = Regex::new(r"127\.0\.0\.1:[34]\d\d\d\b|/etc/|/var/|/run/").expect("a pattern");
        assert!(!left.is_match(&text), "{} has something of another machine: {text}", self.name);
        Setup::whole(&text).start()
    }
}

/// Requests a path of a host, with additional header lines.
fn ask(gateway: &Gateway, host: &str, path: &str, fields: &str) -> Response {
    let mut client = gateway.client();
    client.send(format!("GET {path} HTTP/1.1\r\nHost: {host}\r\n{fields}\r\n"));
    client.response()
}

fn get(gateway: &Gateway, path: &str) -> Response {
    gateway.client().get(path)
}

/// Sends a request from another address of this machine.
fn get_from(own: [u8; 4], gateway: &Gateway, path: &str, fields: &str) -> Response {
    Client::from(own, gateway.web()).ask("GET", path, fields, "")
}

/// The files of the cookbook with their titles and descriptions.
fn files() -> Vec<(String, String, String)> {
    let names = fs::read_dir(EXAMPLES).expect("the cookbook").map(|entry| entry.expect("a file").path());
    let mut names: Vec<_> =
        names.filter(|path| path.extension().is_some_and(|extension| extension == "yaml")).collect();
    names.sort();
    names.iter().map(|path| head(path)).collect()
}

fn head(path: &Path) -> (String, String, String) {
    let text = fs::read_to_string(path).expect("a file");
    let name = path.file_stem().expect("a name").to_string_lossy().into_owned();
    // The first line is for editors.
    let mut lines = text.lines().skip(1).map(|line| line.strip_prefix("# ").unwrap_or_default().to_owned());
    let (title, when) = (lines.next().unwrap_or_default(), lines.next().unwrap_or_default());
    assert!(!title.is_empty() && when.starts_with("Use it when ") && when.ends_with('.'), "{name}: {title}: {when}");
    (name, title, when)
}

#[test]
fn every_file_is_short_says_when_to_use_it_and_has_a_test() {
    let files = files();
    assert!(files.len() >= 25, "{}", files.len());
    let source = include_str!("cookbook.rs");
    let titles: BTreeSet<_> = files.iter().map(|(_, title, _)| title).collect();
    assert_eq!(titles.len(), files.len(), "every title is another");
    for (name, _, _) in &files {
        assert!(source.contains(&format!("Recipe::of(\"{name}\")")), "no test runs conf/examples/{name}.yaml");
        let text = fs::read_to_string(format!("{EXAMPLES}/{name}.yaml")).expect("a file");
        assert!(text.lines().count() <= 31, "{name} is not short");
        assert!(text.lines().all(|line| line.chars().count() <= 140), "{name} has a long line");
        let config = forebay::gateway::Gateway::builder().parse(name, &text).unwrap_or_else(|e| panic!("{e}"));
        assert!(config.warnings().is_empty(), "{name}: {}", config.warnings());
    }
}

/// The index, on a page from which the files are found by this path.
fn index(folder: &str) -> String {
    let row = |(name, title, when): (String, String, String)| format!("| [{title}]({folder}{name}.yaml) | {when} |\n");
    let rows: String = files().into_iter().map(row).collect();
    format!(
        "# Cookbook\n\nShort configurations, one for each job. Copy one, change its addresses, and try it:\n\n\
         ```console\n$ forebay check -c conf/examples/canary.yaml\n$ forebay run -c conf/examples/canary.yaml\n```\n\n\
         Each file is run by a test of `tests/it/cookbook.rs`, which proves what the file promises.\n\n\
         | file | when |\n|---|---|\n{rows}"
    )
}

#[test]
fn the_index_of_the_cookbook_is_made_of_the_files() {
    for (path, page) in [("../examples/README.md", index("")), ("cookbook.md", index("../examples/"))] {
        let path = format!("{EXAMPLES}/../manual/{path}");
        if std::env::var_os("UPDATE_MANUAL").is_some() {
            fs::write(&path, &page).expect("the index");
        }
        let there = fs::read_to_string(&path).unwrap_or_default();
        assert!(there == page, "{path} is out of step; `UPDATE_MANUAL=1` with this test writes it anew");
    }
}

#[test]
fn virtual_hosts_have_a_backend_each() {
    let (shop, blog) = (Origin::named("shop"), Origin::named("blog"));
    let gateway = Recipe::of("virtual-hosts").before(&[&shop, &blog]).start();
    for (host, status, body) in [
        ("shop.example.com", 200, "shop"),
        ("WWW.shop.example.com:8080", 200, "shop"),
        ("anna.blog.example.com", 200, "blog"),
        ("blog.example.com", 404, "There is no such site here."),
        ("127.0.0.1", 404, "There is no such site here."),
    ] {
        let answer = ask(&gateway, host, "/", "");
        assert_eq!((answer.status, answer.text()), (status, body), "{host}");
    }
}

#[test]
fn services_are_found_by_their_paths() {
    let front = Origin::named("front");
    let api = Origin::answering(|request| ok(format!("api {}", request.target())));
    let gateway = Recipe::of("paths-to-services").before(&[&front, &api]).start();
    for (path, body) in [("/", "front"), ("/apis", "front"), ("/api", "api /"), ("/api/v1?x=1", "api /v1?x=1")] {
        assert_eq!(get(&gateway, path).text(), body, "{path}");
    }
}

#[test]
fn a_canary_gets_a_tenth_and_testers_get_it_always() {
    let (stable, canary) = (Origin::named("stable"), Origin::named("canary"));
    let gateway = Recipe::of("canary").before(&[&stable, &canary]).start();
    for _ in 0..5 {
        assert_eq!(ask(&gateway, "a", "/", "Cookie: a=b; canary=1\r\n").text(), "canary");
    }
    let mut client = gateway.client();
    let canaries = (0..200).filter(|_| client.get("/").text() == "canary").count();
    assert!((5..=45).contains(&canaries), "{canaries} of 200");
}

#[test]
fn green_takes_over_from_blue_when_the_file_says_so() {
    let (blue, green) = (Origin::named("blue"), Origin::named("green"));
    let dir = tempfile::tempdir().expect("a directory");
    let live = dir.path().join("live.yaml");
    fs::write(&live, format!("- address: {}\n", blue.address())).expect("a file");
    let recipe = Recipe::of("blue-green").at("/etc/forebay/live.yaml", live.display());
    // The comment of the file has the address of blue.
    let gateway = recipe.at("127.0.0.1:3000", "127.0.0.1:1").at("127.0.0.1:3001", green.address()).start();
    assert_eq!(eventually("blue", || Some(get(&gateway, "/")).filter(|answer| answer.status == 200)).text(), "blue");
    assert_eq!(ask(&gateway, "a", "/", "X-Preview: green\r\n").text(), "green");
    let beside = dir.path().join("live.yaml.new");
    fs::write(&beside, format!("- address: {}\n", green.address())).expect("a file");
    fs::rename(&beside, &live).expect("a switch in one step");
    eventually("green", || (get(&gateway, "/").text() == "green").then_some(()));
}

#[test]
fn a_client_stays_at_the_backend_that_has_its_session() {
    let (one, two) = (Origin::named("one"), Origin::named("two"));
    let gateway = Recipe::of("sticky").before(&[&one, &two]).start();
    for _ in 0..4 {
        let first = get(&gateway, "/");
        let cookie = first.value("set-cookie").expect("a cookie").split(';').next().expect("a pair").to_owned();
        assert!(cookie.starts_with("backend="), "{cookie}");
        for _ in 0..5 {
            assert_eq!(ask(&gateway, "a", "/", &format!("Cookie: {cookie}\r\n")).text(), first.text());
        }
    }
}

#[test]
fn requests_of_one_user_meet_one_backend() {
    let origins = ["one", "two", "three"].map(Origin::named);
    let gateway = Recipe::of("hash-by-user").before(&origins.each_ref()).start();
    let home = |user: usize| ask(&gateway, "a", "/", &format!("X-User: user-{user}\r\n")).text().to_owned();
    let homes: Vec<String> = (0..24).map(home).collect();
    assert_eq!((0..24).map(home).collect::<Vec<_>>(), homes);
    assert!(homes.iter().collect::<BTreeSet<_>>().len() >= 2, "{homes:?}");
}

#[test]
fn grpc_calls_pass() {
    let server = GrpcServer::start();
    let gateway = Recipe::of("grpc").at("127.0.0.1:3000", server.address()).start();
    let outcome = GrpcClient::to(gateway.web()).say("hello");
    assert_eq!((&outcome["code"], &outcome["replies"][0]), (&0.into(), &"hello".into()), "{outcome}");
}

#[test]
fn calls_of_grpc_web_become_calls_of_grpc() {
    let server = GrpcServer::start();
    let gateway = Recipe::of("grpc-web").at("127.0.0.1:3000", server.address()).start();
    let message = [&[0, 0, 0, 0, 5][..], b"hello"].concat();
    let kind = "Content-Type: application/grpc-web+proto\r\n";
    let answer = gateway.client().ask("POST", "/test.Peer/Say", kind, &message);
    assert_eq!((answer.status, answer.value("content-type")), (200, Some("application/grpc-web")));
    assert!(answer.body.starts_with(&message), "{:?}", answer.body);
    assert!(String::from_utf8_lossy(&answer.body).contains("grpc-status: 0\r\n"), "{:?}", answer.body);
}

#[test]
fn a_websocket_passes_where_it_is_allowed() {
    let origin = Origin::scripted();
    let gateway = Recipe::of("websocket").at("127.0.0.1:3000", origin.address()).start();
    let upgrade = "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n\
                   Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n";
    let mut client = gateway.client();
    client.send(request("GET", "/websocket", upgrade, ""));
    let mut connection = origin.accept();
    assert_eq!(connection.request().value("upgrade"), Some("websocket"));
    connection.send(
        "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
         Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\nfrom there",
    );
    assert_eq!(client.response().status, 101);
    assert_eq!(client.bytes(10), b"from there");
    client.send("from here");
    assert_eq!(connection.bytes(9), b"from here");
    let mut client = gateway.client();
    client.send(request("GET", "/elsewhere", upgrade, ""));
    let mut connection = origin.accept();
    assert_eq!(connection.request().value("upgrade"), None);
    connection.answer("plain");
    assert_eq!(client.response().text(), "plain");
}

#[test]
fn no_backend_is_asked_before_a_large_upload_is_here() {
    const LENGTH: usize = 3 << 20;
    let store = Origin::answering(|request| response("201 Created", "", request.body.len().to_string()));
    let dir = tempfile::tempdir().expect("a directory");
    let recipe = Recipe::of("large-uploads").before(&[&store]);
    let gateway = recipe.at("/var/lib/forebay/spool", dir.path().display()).start();
    let mut client = gateway.client();
    client.send(format!("POST /upload/film HTTP/1.1\r\nHost: a\r\nContent-Length: {LENGTH}\r\n\r\n"));
    client.send(vec![b'x'; LENGTH / 2]);
    gateway.wait_metric("forebay_spool_bytes", |bytes| bytes > 1e6);
    assert_eq!(store.connections(), 0, "half a file is no reason to ask a backend");
    client.send(vec![b'x'; LENGTH / 2]);
    let answer = client.response_to("POST");
    assert_eq!((answer.status, answer.text()), (201, &*LENGTH.to_string()));
    for (path, length) in [("/upload/film", 21_u64 << 30), ("/comment", 2 << 20)] {
        let mut client = gateway.client();
        client.send(format!("POST {path} HTTP/1.1\r\nHost: a\r\nContent-Length: {length}\r\n\r\n"));
        assert_eq!(client.response_to("POST").status, 413, "{path}");
    }
}

#[test]
fn an_event_leaves_at_once() {
    let origin = Origin::scripted();
    let gateway = Recipe::of("server-sent-events").at("127.0.0.1:3000", origin.address()).start();
    let mut client = gateway.client();
    client.send(request("GET", "/sse/news", "", ""));
    let mut connection = origin.accept();
    connection.request();
    connection.send("HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n");
    let mut wire = client.into_wire();
    let mut left = wire.head().expect("a header").response_framing("GET").begin();
    for event in ["data: one\n\n", "data: two\n\n"] {
        connection.send(format!("{:x}\r\n{event}\r\n", event.len()));
        assert_eq!(wire.piece(&mut left, event.len()), event.as_bytes(), "before anything follows");
    }
}

#[test]
fn only_clients_with_a_certificate_come_in() {
    let authority = Authority::new();
    let app = Origin::named("app");
    let recipe = Recipe::of("mtls").before(&[&app]).showing(&authority.issue(&["site.test"]));
    let gateway = recipe.at("/etc/forebay/clients.pem", authority.file().display()).start();
    let site = || Tls::to(gateway.web(), &authority, "site.test");
    assert!(site().get("/").is_err(), "without a certificate");
    let (ada, bob) = (authority.issue(&["ada.example.com"]), authority.issue(&["bob.example.com"]));
    let (got, _) = site().showing(&bob).get("/").expect("an answer");
    assert_eq!((got.status, &*got.body), (200, "app"));
    let subject = app.request().value("x-client-cert-subject").expect("the subject").to_owned();
    assert!(subject.contains("bob.example.com"), "{subject}");
    assert_eq!(site().showing(&bob).get("/admin").expect("an answer").0.status, 403);
    assert_eq!(site().showing(&ada).get("/admin").expect("an answer").0.status, 200);
}

#[test]
fn a_certificate_comes_from_an_issuer() {
    let pebble = Pebble::knowing(&["www.example.com"]);
    let app = Origin::named("app");
    let dir = tempfile::tempdir().expect("a directory");
    let issuer = format!(
        "email: ops@example.com, directory: \"{}\", ca: \"{}\", retry: {{ first: 200ms, max: 1s }}",
        pebble.directory(),
        pebble.ca().display()
    );
    let recipe = Recipe::of("https-by-acme").before(&[&app]).at("email: ops@example.com", issuer);
    let gateway = recipe.at("/var/lib/forebay/acme", dir.path().display()).start();
    pebble.validates(gateway.address("plain"), gateway.web());
    let (got, _) =
        eventually("a certificate", || Tls::trusting(gateway.web(), &pebble.root(), "www.example.com").get("/").ok());
    assert_eq!((got.status, &*got.body), (200, "app"));
}

#[test]
fn clients_are_sent_to_https_and_remember_it() {
    let authority = Authority::new();
    let app = Origin::named("app");
    let gateway = Recipe::of("https-only").before(&[&app]).showing(&authority.issue(&["site.test"])).start();
    let mut client = Client::connect(gateway.address("plain"));
    client.send("GET /a?b=c HTTP/1.1\r\nHost: site.test\r\n\r\n");
    let answer = client.response();
    assert_eq!((answer.status, answer.value("location")), (308, Some("https://site.test/a?b=c")));
    let (got, _) = Tls::to(gateway.web(), &authority, "site.test").get("/").expect("an answer");
    assert!(got.head.to_ascii_lowercase().contains("strict-transport-security: max-age=3600; includesubdomains"));
    assert_eq!((got.status, &*got.body), (200, "app"));
}

#[test]
fn clients_are_led_to_where_things_are_now() {
    let app = Origin::named("app");
    let gateway = Recipe::of("redirects").before(&[&app]).start();
    for (host, path, status, place) in [
        ("old.example.com", "/a/b?c=d", 301, Some("https://new.example.com/a/b?c=d")),
        ("new.example.com", "/about-us?x", 301, Some("/about")),
        ("new.example.com", "/article/17?page=2", 308, Some("/articles/17?page=2")),
        ("new.example.com", "/article/x", 200, None),
    ] {
        let answer = ask(&gateway, host, path, "");
        assert_eq!((answer.status, answer.value("location")), (status, place), "{host}{path}");
    }
}

#[test]
fn what_comes_above_a_rate_is_refused() {
    let app = Origin::named("app");
    let gateway = Recipe::of("rate-limit").before(&[&app]).start();
    let login = || gateway.client().ask("POST", "/login", "", "name=a");
    for _ in 0..5 {
        assert_eq!(login().status, 200);
    }
    let answer = login();
    assert!(answer.status == 429 && answer.value("retry-after").is_some(), "{}", answer.status);
    assert_eq!(get(&gateway, "/login").status, 200, "another route has a limit of its own");
    assert_eq!(
        Client::from([127, 0, 0, 2], gateway.web()).ask("POST", "/login", "", "x").status,
        200,
        "so has another client"
    );
}

#[test]
fn every_key_has_a_limit_of_its_own() {
    let api = Origin::named("api");
    let gateway = Recipe::of("rate-limit-by-key").before(&[&api]).start();
    let status = |fields: &str| ask(&gateway, "a", "/", fields).status;
    for key in ["X-Api-Key: one\r\n", "X-Api-Key: two\r\n", ""] {
        assert_eq!([status(key), status(key), status(key)], [200, 200, 429], "{key}");
    }
    for _ in 0..10 {
        assert_eq!(status("X-Api-Key: one\r\nX-Plan: gold\r\n"), 200);
    }
}

#[test]
fn one_address_does_not_get_all_connections() {
    let app = Origin::named("app");
    let gateway = Recipe::of("per-client-limits").before(&[&app]).start();
    let mut clients: Vec<Client> = (0..20).map(|_| gateway.client()).collect();
    for client in &mut clients {
        assert_eq!(client.get("/").status, 200);
    }
    assert_eq!(get(&gateway, "/").status, 429);
    assert_eq!(get_from([127, 0, 0, 2], &gateway, "/", "").status, 200);
    drop(clients);
    eventually("room for another connection", || (get(&gateway, "/").status == 200).then_some(()));
}

#[test]
fn visitors_see_a_page_while_the_own_network_sees_the_backend() {
    let app = Origin::named("app");
    let gateway = Recipe::of("maintenance").before(&[&app]).start();
    let answer = get(&gateway, "/");
    assert_eq!((answer.status, answer.value("retry-after")), (503, Some("600")));
    assert!(
        answer.text().contains("Back in ten minutes")
            && answer.value("content-type") == Some("text/html; charset=utf-8")
    );
    assert_eq!(get_from([127, 0, 0, 2], &gateway, "/", "").text(), "app");
}

#[test]
fn a_new_version_gets_copies() {
    let (app, next) = (Origin::named("app"), Origin::named("next"));
    let gateway = Recipe::of("mirror").before(&[&app, &next]).start();
    assert_eq!(gateway.client().ask("POST", "/a", "", "body").text(), "app");
    let copy = eventually("a copy", || next.requests().pop());
    assert_eq!((copy.target(), &*copy.body), ("/a", &b"body"[..]));
    assert!(copy.value("x-forebay-mirror").is_some());
}

#[test]
fn some_names_are_not_decrypted_here() {
    let authority = Authority::new();
    let there = Secure::start(Layers::tls(&authority.issue(&["db.example.com"])));
    let app = Origin::named("app");
    let recipe = Recipe::of("tcp-by-sni").at("127.0.0.1:3001", there.address()).before(&[&app]);
    let gateway = recipe.showing(&authority.issue(&["site.test"])).start();
    let (got, _) = Tls::to(gateway.web(), &authority, "db.example.com").get("/").expect("an answer");
    assert!(got.body.contains("\"name\":\"db.example.com\""), "{}", got.body);
    let (got, _) = Tls::to(gateway.web(), &authority, "site.test").get("/").expect("an answer");
    assert_eq!(got.body, "app");
}

#[test]
fn a_connection_of_any_protocol_passes_to_the_first_that_is_well() {
    let (first, spare) = (Origin::named("first"), Origin::named("spare"));
    let gateway = Recipe::of("tcp").before(&[&first, &spare]).start();
    let answer = Client::connect(gateway.address("postgres")).get("/whatever");
    assert_eq!(answer.text(), "first");
    assert!(spare.requests().is_empty());
}

#[test]
fn the_true_client_is_known_on_both_sides() {
    let app = Secure::start(Layers::none().introduced());
    let gateway = Recipe::of("proxy-protocol").at("127.0.0.1:3000", app.address()).start();
    let mut client = gateway.client();
    client.send("PROXY TCP4 203.0.113.7 192.0.2.1 4711 443\r\n");
    let answer = client.get("/");
    assert!(answer.text().contains("203.0.113.7:4711"), "{}", answer.text());
    assert_eq!(gateway.log_line().text("client"), "203.0.113.7");
}

#[test]
fn rules_may_ask_for_several_things_at_once() {
    let app = Origin::answering(|request| match request.target() {
        "/fail" => response("500 Internal Server Error", "", "failed"),
        _ => ok("app"),
    });
    let gateway = Recipe::of("cel-rules").before(&[&app]).start();
    let robot = "User-Agent: Scrapy/2.11\r\n";
    assert_eq!(ask(&gateway, "acme.example.com", "/", robot).status, 403);
    assert_eq!(ask(&gateway, "acme.example.com", "/public/a", robot).status, 200);
    let answer = ask(&gateway, "acme.example.com", "/", "");
    assert_eq!((answer.status, answer.value("cache-control")), (200, None));
    assert_eq!(app.requests().pop().expect("a request").value("x-tenant"), Some("acme"));
    assert_eq!(get(&gateway, "/fail").value("cache-control"), Some("no-store"));
}

#[test]
fn headers_are_taken_away_and_put_in() {
    let app = Origin::answering(|_| response("200 OK", "Server: secret/1.0\r\nX-Powered-By: a\r\n", "app"));
    let gateway = Recipe::of("headers").before(&[&app]).start();
    let answer = ask(&gateway, "a", "/", "X-Internal-User: root\r\nX-Request-Id: mine\r\n");
    assert_eq!((answer.value("server"), answer.value("x-powered-by")), (None, None));
    assert_eq!(
        (answer.value("x-frame-options"), answer.value("x-content-type-options")),
        (Some("DENY"), Some("nosniff"))
    );
    let asked = app.request();
    assert_eq!((asked.value("x-internal-user"), asked.value("x-edge")), (None, Some("forebay")));
    let id = answer.value("x-request-id").expect("an id");
    assert!(id.len() == 32 && asked.value("x-request-id") == Some(id), "{id}");
}

#[test]
fn a_backend_that_fails_is_tried_no_more_and_no_client_notices() {
    let bad = Origin::answering(|_| response("503 Service Unavailable", "", "bad"));
    let (one, two) = (Origin::named("one"), Origin::named("two"));
    let gateway = Recipe::of("retries").before(&[&bad, &one, &two]).start();
    let mut client = gateway.client();
    for _ in 0..40 {
        assert_eq!(client.get("/").status, 200);
    }
    assert!(bad.requests().len() <= 6, "{} requests came to the one that fails", bad.requests().len());
}

#[test]
fn who_stops_in_the_middle_of_a_body_is_refused_and_no_backend_knows() {
    let app = Origin::named("app");
    let gateway = Recipe::of("slow-clients").before(&[&app]).start();
    let mut client = gateway.client();
    client.send("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1000\r\n\r\nthe beginning");
    assert_eq!(client.response_to("POST").status, 408);
    assert_eq!(app.connections(), 0);
    assert_eq!(gateway.client().ask("POST", "/", "", "all of it").text(), "app");
}

#[test]
fn an_answer_that_never_changes_needs_no_backend() {
    let app = Origin::named("app");
    let gateway = Recipe::of("fixed-answers").before(&[&app]).start();
    assert_eq!(get(&gateway, "/healthz").text(), "ok");
    let robots = get(&gateway, "/robots.txt");
    assert_eq!(
        (robots.text(), robots.value("cache-control")),
        ("User-agent: *\nDisallow: /private/\n", Some("max-age=3600"))
    );
    assert_eq!(get(&gateway, "/whoami").json(), serde_json::json!({ "address": "127.0.0.1" }));
    assert_eq!(app.connections(), 0);
    assert_eq!(get(&gateway, "/").text(), "app");
}

#[test]
fn spans_of_a_request_come_to_a_collector() {
    let (app, collector) = (Origin::named("app"), Collector::start());
    let gateway = Recipe::of("tracing").before(&[&app]).at("127.0.0.1:4318", collector.address()).start();
    assert_eq!(ask(&gateway, "a", "/traced", "X-Tenant: acme\r\n").status, 200);
    let spans = collector.exchange("/traced");
    assert_eq!(spans[0].text("tenant"), "acme");
    assert!(spans.iter().any(|span| span.name == "wait"), "phases are spans");
    assert!(collector.resources().contains(&"service.name=edge".to_owned()));
}

#[test]
fn a_spare_steps_in_for_a_backend_that_is_not_well() {
    let sick = Arc::new(AtomicBool::new(false));
    let told = sick.clone();
    let first = Origin::answering(move |request| match (request.target(), told.load(Ordering::SeqCst)) {
        ("/healthz", true) => response("503 Service Unavailable", "", ""),
        _ => ok("first"),
    });
    let spare = Origin::named("spare");
    let gateway = Recipe::of("health-checks").before(&[&first, &spare]).start();
    assert_eq!(get(&gateway, "/").text(), "first");
    sick.store(true, Ordering::SeqCst);
    eventually("the spare", || (get(&gateway, "/").text() == "spare").then_some(()));
    sick.store(false, Ordering::SeqCst);
    eventually("the first again", || (get(&gateway, "/").text() == "first").then_some(()));
}

#[test]
fn what_a_backend_cannot_take_waits_in_line_and_what_is_beyond_is_refused() {
    let app = Origin::scripted();
    let gateway = Recipe::of("overload").before(&[&app]).start();
    let mut clients = [gateway.client(), gateway.client()];
    clients[0].send(request("GET", "/first", "", ""));
    let mut connection = app.accept();
    connection.request();
    clients[1].send(request("GET", "/second", "", ""));
    gateway.wait_metric("forebay_upstream_queue{upstream=\"app\"}", |waiting| waiting == 1.0);
    assert_eq!(get(&gateway, "/third").status, 503);
    connection.answer("first");
    assert_eq!(clients[0].response().text(), "first");
    assert_eq!(connection.request().target(), "/second");
    connection.answer("second");
    assert_eq!(clients[1].response().text(), "second");
}

#[test]
fn a_part_of_a_site_is_for_some_addresses() {
    let app = Origin::named("app");
    let gateway = Recipe::of("access-lists").before(&[&app]).start();
    let told = |client: &str| {
        get_from([127, 0, 0, 3], &gateway, "/internal/a", &format!("X-Forwarded-For: {client}\r\n")).status
    };
    assert_eq!(get(&gateway, "/internal").status, 403);
    assert_eq!(get(&gateway, "/").status, 200);
    assert_eq!(get_from([127, 0, 0, 2], &gateway, "/internal", "").status, 200);
    assert_eq!([told("10.1.2.3"), told("10.0.13.37"), told("192.0.2.1")], [200, 403, 403]);
}

#[test]
fn clients_and_backends_meet_by_files() {
    let dir = tempfile::tempdir().expect("a directory");
    let (web, app) = (dir.path().join("web.sock"), dir.path().join("app.sock"));
    let _app = Secure::on_unix(&app, Layers::none());
    let recipe = Recipe::of("unix-sockets").at("/run/forebay/web.sock", web.display());
    let gateway = recipe.at("/run/app/app.sock", app.display()).start();
    assert_eq!(get(&gateway, "/").status, 200);
    assert_eq!(Client::unix(&web).get("/").status, 200);
}

#[test]
fn a_download_has_a_rate_after_its_beginning() {
    let origin = built_in();
    let gateway = Recipe::of("bandwidth").at("127.0.0.1:3000", origin.address()).start();
    let started = Instant::now();
    let answer = get(&gateway, "/bytes/768KiB");
    assert_eq!((answer.status, answer.body.len()), (200, 768 << 10));
    // Half a MiB at 256KiB/s takes two seconds.
    assert!(started.elapsed() >= Duration::from_millis(1500), "{:?}", started.elapsed());
}

#[test]
fn the_log_has_fields_of_its_own_and_no_queries() {
    let app = Origin::named("app");
    let dir = tempfile::tempdir().expect("a directory");
    let log = dir.path().join("log");
    // This story is about the access log that the file itself configures.
    let recipe = Recipe::of("access-log").before(&[&app]).at("/var/log/forebay/access.log", log.display());
    let gateway = Setup::whole(&recipe.text.replace("0.0.0.0:8080", "127.0.0.1:0")).start();
    assert_eq!(ask(&gateway, "a", "/a?token=secret", "X-Tenant: acme\r\n").status, 200);
    let line = gateway.log_line();
    assert_eq!((line.text("target"), line.text("tenant"), line.text("slow")), ("/a", "acme", "no"));
    assert!(!read_lines(&gateway.log_file(), 1)[0].contains("secret"));
}

#[test]
fn a_token_lets_in_and_names_who_asks() {
    let app = Origin::answering(|request| ok(request.value("x-user").unwrap_or_default()));
    let login = Origin::answering(|_| ok(tokens::set(&["one"])));
    let gateway = Recipe::of("jwt").before(&[&app, &login]).start();
    let bearer = |claims: serde_json::Value| format!("Authorization: Bearer {}\r\n", tokens::token("one", claims));
    let claims = |role: &str| {
        let issuer = "https://login.example.com";
        serde_json::json!({ "sub": "ada", "iss": issuer, "aud": "shop", "roles": [role] })
    };
    let answer = ask(&gateway, "a", "/", &format!("{}X-User: root\r\n", bearer(claims("guest"))));
    assert_eq!((answer.status, answer.text()), (200, "ada"));
    assert_eq!(ask(&gateway, "a", "/", "").status, 401);
    assert_eq!(ask(&gateway, "a", "/admin", &bearer(claims("guest"))).status, 403);
    assert_eq!(ask(&gateway, "a", "/admin", &bearer(claims("staff"))).status, 200);
    let mut other = claims("staff");
    other["aud"] = "blog".into();
    assert_eq!(ask(&gateway, "a", "/", &bearer(other)).status, 401);
}

#[test]
fn a_part_of_a_site_asks_for_a_password() {
    let app = Origin::answering(|request| ok(request.value("x-remote-user").unwrap_or_default()));
    let dir = tempfile::tempdir().expect("a directory");
    let users = dir.path().join("users");
    // `secret`.
    fs::write(&users, "ada:$2b$04$NSVZohxgRPqCbGvPPBsZ2eTV7ov/7NXV8xzCnRBdxJMN.OtQAfoCC\n").expect("a file");
    let gateway = Recipe::of("passwords").before(&[&app]).at("/etc/forebay/users.htpasswd", users.display()).start();
    let asked = get(&gateway, "/");
    assert_eq!(asked.status, 401);
    assert!(asked.value("www-authenticate").is_some_and(|challenge| challenge.contains("realm=\"staging\"")));
    assert_eq!(ask(&gateway, "a", "/", "Authorization: Basic YWRhOnNlY3JldA==\r\n").text(), "ada");
    assert_eq!(ask(&gateway, "a", "/", "Authorization: Basic YWRhOndyb25n\r\n").status, 401);
    assert_eq!(get(&gateway, "/healthz").status, 200);
}

#[test]
fn a_program_shows_its_key_and_has_a_rate_of_its_own() {
    let app = Origin::answering(|request| ok(request.value("x-client").unwrap_or_default()));
    let dir = tempfile::tempdir().expect("a directory");
    let keys = dir.path().join("keys");
    // SHA-256 of `secret`, and of `other`.
    fs::write(
        &keys,
        "shop:2bb80d537b1da3e38bd30361aa855686bde0eacd7162fef6a25fe97bf527a25b\n\
         blog:d9298a10d1b0735837dc4bd85dac641b0f3cef27a47e5d53a54f2f3f5b2fcffa\n",
    )
    .expect("a file");
    let gateway = Recipe::of("api-keys").before(&[&app]).at("/etc/forebay/keys.txt", keys.display()).start();
    let by = |key: &str| ask(&gateway, "a", "/", &format!("X-Api-Key: {key}\r\n"));
    assert_eq!(by("secret").text(), "shop");
    assert_eq!((by("wrong").status, get(&gateway, "/").status), (401, 401));
    let limited = (0..10).filter(|_| by("secret").status == 429).count();
    assert!(limited >= 3, "{limited} of 10");
    assert_eq!(by("other").text(), "blog", "its rate is its own");
}

#[test]
fn a_service_says_who_may_come_in() {
    let app = Origin::answering(|request| ok(request.value("x-user").unwrap_or_default()));
    let login = Origin::answering(|request| match request.value("cookie") {
        Some("sid=1") => response("200 OK", "X-User: ada\r\n", ""),
        _ => response("302 Found", "Location: https://login.example.com/\r\n", ""),
    });
    let gateway = Recipe::of("forward-auth").before(&[&app, &login]).start();
    assert_eq!(ask(&gateway, "a", "/", "Cookie: sid=1\r\nX-User: root\r\n").text(), "ada");
    let sent = ask(&gateway, "a", "/", "Cookie: sid=2\r\n");
    assert_eq!((sent.status, sent.value("location")), (302, Some("https://login.example.com/")));
    assert_eq!(login.requests()[0].target(), "/check");
}

#[test]
fn pages_of_another_site_may_call() {
    let app = Origin::named("app");
    let gateway = Recipe::of("cors").before(&[&app]).start();
    let preflight = |origin: &str| {
        let fields = format!("Origin: {origin}\r\nAccess-Control-Request-Method: POST\r\n");
        gateway.client().ask("OPTIONS", "/", &fields, "")
    };
    let allowed = preflight("https://shop.example.com");
    assert_eq!(allowed.value("access-control-allow-origin"), Some("https://shop.example.com"));
    assert_eq!(preflight("https://evil.example").value("access-control-allow-origin"), None);
    let answer = ask(&gateway, "a", "/", "Origin: https://shop.example.com\r\n");
    assert_eq!((answer.text(), answer.value("access-control-allow-credentials")), ("app", Some("true")));
    assert_eq!(app.requests().len(), 1, "preflights are answered here");
}

#[test]
fn answers_are_smaller_for_those_who_can_undo_it() {
    let page = "a page that says the same again and again. ".repeat(100);
    let sent = page.clone();
    let app = Origin::answering(move |_| response("200 OK", "Content-Type: text/html\r\n", &sent));
    let gateway = Recipe::of("compression").before(&[&app]).start();
    let smaller = ask(&gateway, "a", "/", "Accept-Encoding: gzip\r\n");
    assert!(smaller.value("content-encoding") == Some("gzip") && smaller.body.len() < page.len() / 10);
    assert!(get(&gateway, "/").text() == page);
    let secret = ask(&gateway, "a", "/", "Accept-Encoding: gzip\r\nCookie: session=1\r\n");
    assert_eq!(secret.value("content-encoding"), None);
}

#[test]
fn errors_have_pages() {
    let app = Origin::answering(|request| match request.target() {
        "/fails" => response("500 Internal Server Error", "", "a stack trace"),
        _ => response("404 Not Found", "", "no such file"),
    });
    let gateway = Recipe::of("error-pages").before(&[&app]).start();
    let shown = |host: &str, path: &str, accept: &str| {
        let answer = ask(&gateway, host, path, &format!("Accept: {accept}\r\n"));
        (answer.status, answer.text().to_owned())
    };
    let nothing = (404, "<h1>Nothing is here</h1><p>/%3Ca%3E".to_owned());
    assert_eq!(shown("shop.example.com", "/%3Ca%3E", "text/html"), nothing);
    assert_eq!(shown("shop.example.com", "/fails", "text/html"), (500, "<h1>Back soon</h1><p>500 ".to_owned()));
    let (status, problem) = shown("other.example.com", "/", "application/json");
    assert!(status == 404 && problem.contains("\"title\":\"Not Found\""), "{problem}");
}

#[test]
fn bodies_are_changed_both_ways() {
    let app = Origin::answering(|request| {
        let users = r#"{"users":{"1":{"email":"ada@example.com"}},"link":"http://app.internal/a","got":"#;
        let body = format!("{users}{}}}", String::from_utf8_lossy(&request.body));
        response("200 OK", "Content-Type: application/json\r\n", body)
    });
    let gateway = Recipe::of("body-changes").before(&[&app]).start();
    let mut client = gateway.client();
    client.send(
        "POST / HTTP/1.1\r\nHost: acme.example.com\r\nContent-Type: application/json\r\nContent-Length: 31\r\n\r\n\
         {\"tenant\":\"root\",\"debug\":true }",
    );
    let told = r#"{"users":{"1":{"email":"hidden"}},"link":"https://www.example.com/a","got":{"tenant":"acme"}}"#;
    assert_eq!(client.response().text().replace(' ', ""), told);
}
