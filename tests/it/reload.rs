//! Reload: a new configuration applies from the next request on, active exchanges are not affected, and an invalid
//! one changes nothing.

use std::fs;
use std::os::unix::fs::symlink;
use std::thread;
use std::time::Instant;

use forebay::phase::Phase;
use serde_json::Value;

use crate::harness::client::{Client, H2Client, get, request};
use crate::harness::gateway::Watched;
use crate::harness::{Origin, Process, Setup, eventually, ms};
use crate::mix::Mix;
use crate::stop::refuses;

/// A route that responds with a text.
fn saying(text: &str) -> String {
    format!("{{ name: all, filters: [ {{ respond: {{ status: 200, body: \"{text}\" }} }} ] }}")
}

/// Makes the program reload the current file.
fn reloaded(process: &Process) -> Value {
    let answer = Client::connect(process.admin()).ask("POST", "/reload", "", "");
    assert_eq!(answer.status, 200, "{}", answer.text());
    answer.json()
}

/// Makes it reload the current file, which it refuses.
fn refused(process: &Process) -> String {
    let answer = Client::connect(process.admin()).ask("POST", "/reload", "", "");
    assert_eq!(answer.status, 422, "{}", answer.text());
    answer.json()["report"].as_str().expect("a report").to_owned()
}

fn generation(process: &Process) -> f64 {
    process.metric("forebay_config_generation")
}

#[test]
fn the_next_request_of_a_kept_connection_goes_by_the_new_configuration() {
    let origin = Origin::named("origin");
    let setup = Setup::before(&origin).listener("protocols: [http1, h2c]");
    let process = setup.clone().routes(&saying("one")).spawn();
    let (mut kept, h2) = (process.client(), H2Client::connect(process.web()));
    assert_eq!((kept.get("/").text(), generation(&process)), ("one", 1.0));
    assert_eq!(h2.get("/").body, b"one");
    setup.routes(&saying("two")).write();
    let outcome = reloaded(&process);
    assert_eq!((&outcome["result"], &outcome["generation"]), (&"applied".into(), &2.into()));
    assert_eq!(kept.get("/").text(), "two");
    assert_eq!(h2.get("/").body, b"two");
    assert_eq!(generation(&process), 2.0);
    assert_eq!(process.metric("forebay_config_reloads_total{result=\"applied\"}"), 1.0);
    let hash = outcome["hash"].as_str().expect("a hash");
    assert_eq!(process.metric(&format!("forebay_config_info{{hash=\"{hash}\"}}")), 1.0);
    let status = get(process.admin(), "/status").json();
    assert_eq!(status["generation"], 2);
}

#[test]
fn an_exchange_ends_on_the_configuration_that_it_began_with() {
    let (old, new) = (Origin::scripted(), Origin::named("new"));
    let process = Setup::before(&old).spawn();
    let mut client = process.client();
    client.send(request("GET", "/", "", ""));
    let mut connection = old.accept();
    connection.request();
    process.wait_phase(Phase::Wait);
    Setup::before(&new).in_place_of(&process).write();
    reloaded(&process);
    assert_eq!(process.client().get("/").text(), "new");
    let held =
        |generation: u32| process.metric(&format!("forebay_generation_exchanges{{generation=\"{generation}\"}}"));
    assert_eq!(held(1), 1.0);
    connection.answer("from the old one");
    assert_eq!(client.response().text(), "from the old one");
    eventually("the first generation to be gone", || {
        (!process.scrape().text().contains("forebay_generation_exchanges{generation=\"1\"")).then_some(())
    });
    assert_eq!(client.get("/").text(), "new", "the same connection, and its next request");
}

#[test]
fn whoever_waits_for_a_body_that_comes_slowly_is_served_by_the_endpoint_of_its_configuration() {
    let (old, new) = (Origin::named("old"), Origin::named("new"));
    let process = Setup::before(&old).spawn();
    let mut client = process.client();
    client.send("POST / HTTP/1.1\r\nHost: test\r\nContent-Length: 4\r\n\r\nab");
    process.wait_phase(Phase::Buffer);
    Setup::before(&new).in_place_of(&process).write();
    reloaded(&process);
    client.send("cd");
    assert_eq!(client.response().text(), "old");
}

#[test]
fn a_wrong_configuration_changes_nothing_and_is_told_as_check_tells_it() {
    let origin = Origin::named("origin");
    let setup = Setup::before(&origin).routes(&saying("still here"));
    let process = setup.spawn();
    let file = setup.path("forebay.yaml");
    let sound = setup.yaml();
    let mut kept = process.client();
    let wrong = [
        (sound.replace("filters:", "filtres:"), "did you mean `filters`?"),
        (sound.replace("upstreams: { app: { endpoints:", "upstreams: { app: { endpoints: [], more:"), "`more`"),
        (sound[..sound.len() / 2].to_owned(), "forebay.yaml"),
        (String::new(), "forebay.yaml"),
        ("#".repeat(50 << 20), "the file is larger than 16MiB"),
        (sound.replace("name: web, address: \"127.0.0.1:0\"", "name: web, address: \"192.0.2.1:81\""), "listened on"),
    ];
    for (number, (text, told)) in wrong.iter().enumerate() {
        fs::write(&file, text).expect("the file");
        let report = refused(&process);
        assert!(report.contains(told), "{told} is missing in\n{report}");
        assert_eq!(kept.get("/").text(), "still here");
        assert_eq!(process.client().get("/").text(), "still here");
        assert_eq!(process.metric("forebay_config_reloads_total{result=\"refused\"}"), number as f64 + 1.0);
        assert_eq!((generation(&process), process.metric("forebay_config_reload_failed")), (1.0, 1.0));
    }
    fs::remove_file(&file).expect("to remove the file");
    assert!(refused(&process).contains("cannot be read"));
    assert_eq!(kept.get("/").text(), "still here");
    process.says("the new configuration is refused, the previous one stays in force");
    setup.routes(&saying("again")).write();
    reloaded(&process);
    assert_eq!((kept.get("/").text(), process.metric("forebay_config_reload_failed")), ("again", 0.0));
}

#[test]
fn a_hangup_reloads_and_says_so() {
    let origin = Origin::named("origin");
    let setup = Setup::before(&origin);
    let process = setup.clone().routes(&saying("one")).spawn();
    setup.routes(&saying("two")).write();
    process.signal(libc::SIGHUP);
    process.says("the configuration was reloaded");
    assert_eq!(process.client().get("/").text(), "two");
}

#[test]
fn listeners_open_and_close_while_it_runs() {
    let origin = Origin::named("origin");
    let setup = Setup::before(&origin);
    let process = setup.spawn();
    setup.clone().also_listener("{ name: more, address: \"127.0.0.1:0\" }").write();
    let outcome = reloaded(&process);
    assert_eq!(outcome["changes"][0]["effect"], "listener_opens");
    let more = process.listens("more");
    let mut kept = Client::connect(more);
    assert_eq!(kept.get("/").text(), "origin");
    assert!(process.scrape().text().contains("listener=\"more\""));
    let mut web = process.client();
    assert_eq!(web.get("/").text(), "origin");

    setup.write();
    let outcome = reloaded(&process);
    assert_eq!(
        (&outcome["changes"][0]["effect"], &outcome["changes"][0]["drains"]),
        (&"listener_closes".into(), &1.into())
    );
    refuses(more);
    let last = kept.get("/");
    assert_eq!((last.text(), last.value("connection")), ("origin", Some("close")), "no request is lost");
    kept.closed();
    eventually("the series of the listener to go", || {
        (!process.scrape().text().contains("listener=\"more\"")).then_some(())
    });
    assert_ne!(web.get("/").value("connection"), Some("close"), "the other listener is as it was");
}

#[test]
fn a_listener_that_changes_holds_for_new_connections_and_keeps_the_old_ones() {
    let origin = Origin::named("origin");
    let setup = Setup::before(&origin);
    let process = setup.spawn();
    let mut kept = process.client();
    assert_eq!(kept.get("/").text(), "origin");
    setup.listener("limits: { requests_per_connection: 1, connections: 2 }").write();
    reloaded(&process);
    for _ in 0..3 {
        assert_ne!(kept.get("/").value("connection"), Some("close"), "it was open before");
    }
    let mut new = process.client();
    assert_eq!(new.get("/").value("connection"), Some("close"));
    new.closed();
    drop(new);
    process.wait_metric("forebay_client_connections", |open| open == 1.0);
    let open =
        |generation: u32| process.metric(&format!("forebay_generation_connections{{generation=\"{generation}\"}}"));
    assert_eq!(open(1), 1.0);
    // The connection that was already open counts against the limit.
    let _second = process.client();
    process.wait_metric("forebay_client_connections{state=\"idle\"}", |idle| idle == 2.0);
    let mut third = process.client();
    third.send(request("GET", "/", "", ""));
    assert_eq!(third.response().status, 503);
}

#[test]
fn an_endpoint_that_is_removed_gets_nothing_new_and_ends_what_it_has() {
    let (stays, goes) = (Origin::named("stays"), Origin::scripted());
    let process = Setup::before(&goes).spawn();
    let mut client = process.client();
    client.send(request("GET", "/", "", ""));
    let mut connection = goes.accept();
    connection.request();
    process.wait_phase(Phase::Wait);
    Setup::before(&stays).in_place_of(&process).write();
    let outcome = reloaded(&process);
    let drained =
        outcome["changes"].as_array().expect("changes").iter().find(|one| one["effect"] == "endpoint_drained");
    assert_eq!(drained.expect("an endpoint that is drained")["drains"], 1);
    for _ in 0..4 {
        assert_eq!(process.client().get("/").text(), "stays");
    }
    connection.answer("gone soon");
    assert_eq!(client.response().text(), "gone soon");
    let label = format!("endpoint=\"{}\"", goes.address());
    eventually("its series to go", || (!process.scrape().text().contains(&label)).then_some(()));
}

#[test]
fn connections_that_are_kept_to_an_endpoint_end_when_it_is_removed() {
    let (stays, goes) = (Origin::named("stays"), Origin::scripted());
    let process = Setup::before(&goes).upstream("keepalive: { idle: 1h }").spawn();
    let mut client = process.client();
    client.send(request("GET", "/", "", ""));
    let mut kept = goes.accept();
    kept.request();
    kept.answer("still here");
    assert_eq!(client.response().text(), "still here");
    Setup::before(&stays).in_place_of(&process).write();
    reloaded(&process);
    kept.closed();
    assert_eq!(client.get("/").text(), "stays");
}

#[test]
fn with_a_hash_no_client_moves_that_need_not() {
    let origins: Vec<Origin> = ["a", "b", "c", "d"].map(Origin::named).into();
    let policy = "load_balancing: { policy: ring_hash, hash_key: { header: X-Key } }";
    let before = |number: usize| {
        let addresses: Vec<_> = origins[..number].iter().map(|origin| origin.address().to_string()).collect();
        Setup::before_all(&addresses).upstream(policy)
    };
    let process = before(3).spawn();
    let placed = || -> Vec<String> {
        let mut client = process.client();
        (0..200).map(|key| client.ask("GET", "/", &format!("X-Key: {key}\r\n"), "").text().to_owned()).collect()
    };
    let first = placed();
    before(4).in_place_of(&process).write();
    reloaded(&process);
    let second = placed();
    let moved = first.iter().zip(&second).filter(|(one, other)| one != other);
    assert!(moved.clone().all(|(_, to)| to == "d"), "whoever moves goes to the one that came");
    assert!((20..=100).contains(&moved.count()), "about a quarter");
    before(3).in_place_of(&process).write();
    reloaded(&process);
    assert_eq!(placed(), first);
}

#[test]
fn what_did_not_change_lives_on() {
    let origin = Origin::scripted();
    let limit = "filters: [ { rate_limit: { rate: 1/h, burst: 3 } } ]";
    let setup = Setup::before(&origin).route(limit).route("upgrades: [echo]");
    let process = setup.spawn();
    let asks = |process: &Process| {
        let mut client = process.client();
        client.send(request("GET", "/", "", ""));
        let mut connection = origin.accept();
        connection.request();
        connection.send("HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
        client.response().status
    };
    // A tunnel, a drained endpoint, and a limit that is half used.
    let mut tunnel = process.client();
    tunnel.send("GET / HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\r\n");
    let mut endpoint = origin.accept();
    endpoint.request();
    endpoint.send("HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\r\n");
    assert_eq!(tunnel.response().status, 101);
    assert_eq!(asks(&process), 200);
    let inflight = format!("forebay_endpoint_inflight{{endpoint=\"{}\"}}", origin.address());
    process.wait_metric(&inflight, |inflight| inflight == 1.0);

    for text in ["timeouts: { idle: 70s }", "timeouts: { idle: 80s }"] {
        setup.clone().listener(text).more("via: true").write();
        reloaded(&process);
    }
    assert_eq!(process.metric(&inflight), 1.0, "the tunnel is counted still");
    tunnel.send("from the client");
    assert_eq!(endpoint.bytes(15), b"from the client");
    endpoint.send("from the endpoint");
    assert_eq!(tunnel.bytes(17), b"from the endpoint");
    assert_eq!(asks(&process), 200, "the third of three");
    assert_eq!(process.client().get("/").status, 429, "the limit has not begun anew");
}

#[test]
fn health_and_orders_outlive_a_change_of_the_upstream() {
    let (one, two) = (Origin::named("one"), Origin::named("two"));
    let addresses = [one.address().to_string(), two.address().to_string()];
    let process = Setup::before_all(&addresses).spawn();
    let drain = format!("/upstreams/app/endpoints/{}/drain", one.address());
    assert_eq!(Client::connect(process.admin()).ask("POST", &drain, "", "").status, 200);
    for change in ["timeouts: { connect: 3s }", "load_balancing: { policy: random }", "limits: { requests: 50 }"] {
        Setup::before_all(&addresses).upstream(change).in_place_of(&process).write();
        reloaded(&process);
        for _ in 0..6 {
            assert_eq!(process.client().get("/").text(), "two", "{change}");
        }
    }
}

#[test]
fn what_only_a_new_process_can_change_is_named_and_the_rest_is_applied() {
    let origin = Origin::named("origin");
    let setup = Setup::before(&origin);
    let process = setup.clone().routes(&saying("one")).spawn();
    let changed = setup.routes(&saying("two")).server("threads: 2").more("resources: { memory: 300MiB }");
    changed.write();
    let outcome = reloaded(&process);
    assert_eq!(outcome["needs_new_process"], serde_json::json!(["resources.memory", "server.threads"]));
    assert_eq!(process.client().get("/").text(), "two");
    process.says("these need a new process");
}

#[test]
fn a_dry_run_tells_what_would_change_and_changes_nothing() {
    let origin = Origin::named("origin");
    let setup = Setup::before(&origin);
    let process = setup.clone().routes(&saying("one")).spawn();
    let socket = setup.path("more.sock");
    let more = format!("{{ name: more, address: \"unix:{}\" }}", socket.display());
    setup.routes(&saying("two")).also_listener(&more).write();
    let answer = Client::connect(process.admin()).ask("POST", "/reload?dry_run=yes", "", "");
    let outcome = answer.json();
    assert_eq!((answer.status, &outcome["result"]), (200, &"checked".into()));
    assert_eq!(outcome["changes"].as_array().map(Vec::len), Some(2), "{outcome}");
    assert_eq!((process.client().get("/").text(), generation(&process)), ("one", 1.0));
    assert!(!socket.exists(), "nothing is left of a socket that was tried");
    assert!(!process.scrape().text().contains("listener=\"more\""));
    assert_eq!(Client::connect(process.admin()).ask("POST", "/reload?dry_run=maybe", "", "").status, 400);
}

#[test]
fn routes_and_upstreams_that_are_gone_leave_no_series() {
    let origin = Origin::named("origin");
    let setup = Setup::before(&origin);
    let process = setup
        .clone()
        .also("old", &origin)
        .also_route("{ name: older, match: { path: { prefix: /old } }, upstream: old }")
        .spawn();
    assert_eq!(process.client().get("/old").text(), "origin");
    assert!(process.scrape().text().contains("upstream=\"old\""));
    setup.write();
    reloaded(&process);
    for series in ["upstream=\"old\"", "route=\"older\""] {
        eventually(&format!("{series} to go"), || (!process.scrape().text().contains(series)).then_some(()));
    }
    assert_eq!(process.client().get("/").text(), "origin");
}

#[test]
fn a_directory_that_is_watched_is_enough_of_a_reload() {
    // Like a ConfigMap in Kubernetes: the file is a link through a link to a directory, which is switched.
    let origin = Origin::named("origin");
    let setup = Setup::before(&origin);
    let mount = setup.path("mount");
    let put = |version: &str, said: &str| {
        let data = mount.join(version);
        fs::create_dir_all(&data).expect("a directory");
        fs::write(data.join("forebay.yaml"), setup.clone().routes(&saying(said)).yaml()).expect("a file");
        let (fresh, link) = (mount.join("..data_tmp"), mount.join("..data"));
        symlink(version, &fresh).expect("a link");
        fs::rename(&fresh, &link).expect("to turn the link");
    };
    put("..1", "one");
    symlink("..data/forebay.yaml", mount.join("forebay.yaml")).expect("a link");
    let process = setup.spawn_at(&mount.join("forebay.yaml"), &["--watch"]);
    assert_eq!(process.client().get("/").text(), "one");
    put("..2", "two");
    eventually("the new configuration to hold", || (process.client().get("/").text() == "two").then_some(()));
    fs::write(mount.join("..2/forebay.yaml"), "listeners: [").expect("half a file");
    put("..3", "broken ]]] {{{\"");
    process.wait_metric("forebay_config_reloads_total{result=\"refused\"}", |count| count >= 1.0);
    assert_eq!(process.client().get("/").text(), "two");
    put("..4", "four");
    eventually("the next one to hold", || (process.client().get("/").text() == "four").then_some(()));
}

#[test]
fn clients_of_every_kind_do_not_notice_a_reload_each_second() {
    let mix = Mix::new();
    let setup = mix.setup();
    let process = setup.spawn();
    let reloads = std::env::var("FOREBAY_STORY_SECONDS").ok().and_then(|seconds| seconds.parse().ok()).unwrap_or(20);
    let (mut early, mut early_files) = (0, 0);
    mix.ask_while(&setup, process.web(), process.listens("secure"), |progress| {
        let begun = Instant::now();
        for number in 0..reloads {
            // Each reload changes the listener, the upstream and the route.
            setup
                .clone()
                .listener(&format!("timeouts: {{ idle: {}s }}", 60 + number))
                .upstream(&format!("timeouts: {{ connect: {}s }}", 5 + number % 2))
                .route(&format!("deadline: {}s", 300 + number))
                .write();
            reloaded(&process);
            progress.wait_for_more(20);
            while begun.elapsed() < ms(1_000 * (number + 1)) {
                thread::park_timeout(ms(20));
            }
            if number == reloads / 4 {
                (early, early_files) = (process.resident_bytes(), process.open_files().len());
            }
        }
        progress.wait_for_each(2);
        let (late, late_files) = (process.resident_bytes(), process.open_files().len());
        // What grows with each reload would show: the clients are as many as before.
        assert!(late < early + early / 4 + (16 << 20), "{early} bytes, then {late}");
        assert!(late_files < early_files + 16, "{early_files} open files, then {late_files}");
    });
    assert_eq!(process.metric("forebay_refusals_total"), 0.0);
    assert_eq!(process.metric("forebay_upstream_connects_total{outcome=\"failed\"}"), 0.0);
    let lines = process.log_lines(0);
    assert!(lines.len() > 100, "{} lines", lines.len());
    for line in lines {
        assert!(line.reason().is_empty() && [101, 200].contains(&line.status()), "{line:?}");
    }
    // No earlier generation is kept.
    process.wait_metric("forebay_generation_exchanges", |count| count == 0.0);
    eventually("the generations before to be gone", || {
        (process.scrape().samples("forebay_generation_exchanges").len() == 1).then_some(())
    });
}

#[test]
fn a_process_that_is_killed_while_it_reloads_leaves_a_file_that_serves() {
    let origin = Origin::named("origin");
    let setup = Setup::before(&origin);
    let mut process = setup.spawn();
    let file = setup.path("forebay.yaml");
    // A file that takes a while to read.
    let routes = |number: usize| {
        let route =
            |index| format!("{{ name: r{index}, match: {{ path: {{ exact: /{number}/{index} }} }}, upstream: app }}");
        (0..2_000).map(route).collect::<Vec<_>>().join("\n")
    };
    let written = setup.clone().routes(&routes(1)).also_route("{ name: all, upstream: app }");
    for _ in 0..3 {
        written.write();
        let before = fs::read(&file).expect("the file");
        process.signal(libc::SIGHUP);
        process.signal(libc::SIGKILL);
        process.ended();
        assert_eq!(fs::read(&file).expect("the file"), before, "a reload writes nothing");
        process = written.spawn();
        assert_eq!(process.client().get("/").text(), "origin");
    }
}
