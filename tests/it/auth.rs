//! Access control: `basic_auth`, `api_key`, `ip_set` and `cors`, over real sockets and with changing files.

use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;

use crate::harness::gateway::Watched;
use crate::harness::{Ask, Client, Gateway, Origin, Protocol, Setup, eventually, ok};

/// `secret`, made by Python's `bcrypt` at costs 4, 7 and 10, and by its `argon2-cffi`.
const CHEAP: &str = "$2b$04$NSVZohxgRPqCbGvPPBsZ2eTV7ov/7NXV8xzCnRBdxJMN.OtQAfoCC";
const DEAR: &str = "$2b$07$28yXbK7yf0YC6qciuv3K1OkHsIhHjjIkmcNUrtK.kihEABNI0jepG";
const DEAREST: &str = "$2b$10$lbiKD4BYL9oVv1gYiRSG5efvIFkV.0E70pNdEo3vOj2h/POeOsJzi";
const ARGON2: &str = "$argon2id$v=19$m=64,t=1,p=1$5hb+6ox52A4UsxtllO0CIQ$4QtJCQllOkkk9y63H7Ye/PM4F7BXocVjbo9ROjqspUE";

fn basic(user: &str, password: &str) -> String {
    format!("Authorization: Basic {}\r\n", STANDARD.encode(format!("{user}:{password}")))
}

/// Writes a file of this gateway, and returns its name for a filter.
fn file(setup: &Setup, name: &str, text: &str) -> String {
    let path = setup.path(name);
    std::fs::write(&path, text).expect("a file");
    format!("{{ path: \"{}\", refresh: 1h }}", path.display())
}

/// Replaces a file atomically.
fn replace(path: &Path, text: &str) {
    let beside = path.with_extension("new");
    std::fs::write(&beside, text).and_then(|()| std::fs::rename(&beside, path)).expect("a file");
}

fn counted(gateway: &Gateway, filter: &str, outcome: &str, count: f64) {
    let selector = format!("forebay_access_total{{filter=\"{filter}\",outcome=\"{outcome}\",route=\"all\"}}");
    gateway.wait_metric(&selector, |value| value == count);
}

/// A gateway with `basic_auth` and these users, in front of an origin that returns the user name it received.
fn guarded(users: &str, keys: &str) -> (Origin, Setup, Gateway) {
    let origin = Origin::answering(|request| {
        ok(format!("{:?} {:?}", request.value("x-remote-user"), request.value("authorization")))
    });
    let setup = Setup::before(&origin).listener("protocols: [http1, h2c]");
    let source = file(&setup, "users", users);
    let setup = setup.filters(&format!("basic_auth: {{ users: {source}, user_header: X-Remote-User{keys} }}"));
    let setup = setup.access_log("fields: { user: { cel: auth.user } }");
    let gateway = setup.start();
    (origin, setup, gateway)
}

#[test]
fn a_name_and_a_password_let_in_and_the_upstream_gets_the_name_alone() {
    let (_origin, _setup, gateway) = guarded(&format!("ada:{CHEAP}\neve:{ARGON2}\n"), "");
    let mut client = gateway.client();
    let mut ask = |fields: &str| client.ask("GET", "/", fields, "");
    for user in ["ada", "eve"] {
        let answer = ask(&format!("{}X-Remote-User: root\r\n", basic(user, "secret")));
        assert_eq!((answer.status, answer.text()), (200, &*format!("Some(\"{user}\") None")));
    }
    let challenge = Some("Basic realm=\"Restricted\", charset=\"UTF-8\"");
    for (fields, reason) in [
        (String::new(), "route.basic_auth_missing"),
        ("X-Remote-User: ada\r\n".to_owned(), "route.basic_auth_missing"),
        (basic("ada", "Secret"), "route.basic_auth_wrong"),
        (basic("ada", ""), "route.basic_auth_wrong"),
        (basic("bob", "secret"), "route.basic_auth_wrong"),
        (basic("", ""), "route.basic_auth_wrong"),
        ("Authorization: Basic !!\r\n".to_owned(), "route.basic_auth_wrong"),
        (format!("{}{}", basic("ada", "secret"), basic("ada", "secret")), "route.basic_auth_wrong"),
    ] {
        let answer = ask(&fields);
        assert_eq!((answer.status, answer.value("www-authenticate")), (401, challenge), "{fields}");
        assert!(answer.text().contains(reason), "{fields}: {}", answer.text());
    }
    counted(&gateway, "basic_auth", "granted", 2.0);
    counted(&gateway, "basic_auth", "missing", 2.0);
    counted(&gateway, "basic_auth", "wrong", 6.0);
    ask(&basic("ada", "secret"));
    counted(&gateway, "basic_auth", "remembered", 1.0);
    assert_eq!(gateway.log_lines(1)[0].text("user"), "ada");
    gateway.wait_metric("forebay_password_seconds_count", |count| count >= 6.0);
    gateway.wait_metric("forebay_passwords_waiting", |waiting| waiting == 0.0);
}

#[test]
fn a_changed_file_of_users_is_in_force_and_a_wrong_one_is_not() {
    let (_origin, setup, gateway) = guarded(&format!("ada:{CHEAP}\n"), ", forward: true");
    let status = |user: &str| gateway.client().ask("GET", "/", &basic(user, "secret"), "").status;
    assert_eq!((status("ada"), status("eve")), (200, 401));
    replace(&setup.path("users"), &format!("eve:{CHEAP}\n"));
    eventually("the new users", || (status("eve") == 200).then_some(()));
    assert_eq!(status("ada"), 401, "what was remembered of her is of no use any more");
    replace(&setup.path("users"), "junk\n");
    let failed = "forebay_filter_loads_total{filter=\"basic_auth\",outcome=\"failed\",route=\"all\"}";
    gateway.wait_metric(failed, |count| count == 1.0);
    assert_eq!((status("ada"), status("eve")), (401, 200));
    let forwarded = gateway.client().ask("GET", "/", &basic("eve", "secret"), "");
    assert!(forwarded.text().contains("Basic "), "{}", forwarded.text());
}

/// The durations of requests without a password, sent in a loop for this time.
fn beside(gateway: &Gateway, time: Duration) -> Vec<Duration> {
    let (begun, mut took, mut client) = (Instant::now(), Vec::new(), gateway.client());
    while begun.elapsed() < time || took.len() < 100 {
        let asked = Instant::now();
        let answer = client.get("/open");
        took.push(asked.elapsed());
        assert_eq!(answer.status, 200);
        // A connection has a limited number of requests.
        if answer.value("connection") == Some("close") {
            client = gateway.client();
        }
    }
    took.sort_unstable();
    took
}

/// The scheduling policy (sched(7)) and the nice value of each thread with this name. Gateways run in this process.
fn ranks(name: &str) -> Vec<(i64, i64)> {
    let tasks = std::fs::read_dir("/proc/self/task").expect("the threads");
    let rank = |task: std::fs::DirEntry| {
        let stat = std::fs::read_to_string(task.path().join("stat")).ok()?;
        let (before, after) = stat.rsplit_once(") ")?;
        // proc_pid_stat(5): the text after the name begins with field 3.
        let field = |number: usize| after.split_whitespace().nth(number - 3)?.parse().ok();
        before.ends_with(&format!("({name}")).then_some((field(41)?, field(19)?))
    };
    tasks.flatten().filter_map(rank).collect()
}

#[test]
fn two_hundred_wrong_passwords_a_second_leave_others_as_they_are() {
    const ATTACKERS: u32 = 8;
    const EACH_SECOND: u32 = 200;
    const TIME: Duration = Duration::from_secs(1);
    const ROUNDS: u32 = 4;
    const SCHED_IDLE: i64 = 5;
    let origin = Origin::named("app");
    let setup = Setup::before(&origin);
    let users = file(&setup, "users", &format!("ada:{DEAR}\n"));
    let guard = format!("filters: [ basic_auth: {{ users: {users}, queue: 4 }} ]");
    let routes = format!(
        "{{ name: open, match: {{ path: {{ prefix: /open }} }}, upstream: app }}\n{{ name: all, upstream: app, {guard} }}"
    );
    let gateway = setup.routes(&routes).start();
    let right = basic("ada", "secret");
    assert_eq!(gateway.client().ask("GET", "/", &right, "").status, 200);

    let web = gateway.web();
    // Each attacker sends at a fixed rate, independent of earlier responses: a waiting wrong password delays no other.
    // Each password is different, so that each is hashed or refused.
    let attack = move |round: u32, attacker: u32| {
        let (begun, pause) = (Instant::now(), Duration::from_secs(1) * ATTACKERS / EACH_SECOND);
        let mut asked = Vec::new();
        for number in 0..TIME.as_secs() as u32 * EACH_SECOND / ATTACKERS {
            thread::park_timeout((begun + pause * number).saturating_duration_since(Instant::now()));
            let mut client = Client::connect(web);
            let wrong = basic("ada", &format!("{round}.{attacker}.{number}"));
            client.send(format!("GET / HTTP/1.1\r\nHost: test\r\nConnection: close\r\n{wrong}\r\n"));
            asked.push(client);
        }
        asked.into_iter().map(|mut client| client.response().status).collect::<Vec<_>>()
    };
    // Alternates, so that other load on this machine affects both.
    let (mut alone, mut during, mut statuses, mut hashers) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for round in 0..ROUNDS {
        alone.push(beside(&gateway, TIME));
        let attackers: Vec<_> = (0..ATTACKERS).map(|attacker| thread::spawn(move || attack(round, attacker))).collect();
        during.push(beside(&gateway, TIME));
        // The reason for the isolation: a hashing thread only uses CPU time that no other thread needs. If no CPU time
        // is left, another thread helps, with a smaller share than a worker.
        hashers.extend(eventually("threads that give way", || {
            let ranks = ranks("password");
            ranks.iter().all(|(policy, nice)| *policy == SCHED_IDLE || *nice > 0).then_some(ranks)
        }));
        statuses.extend(attackers.into_iter().flat_map(|attacker| attacker.join().expect("an attacker")));
    }
    assert_eq!(gateway.client().ask("GET", "/", &right, "").status, 200, "who was let in before is remembered");
    assert_eq!(statuses.len(), 800);
    assert!(statuses.iter().all(|status| [401, 503].contains(status)), "{statuses:?}");
    assert!(statuses.contains(&503) && statuses.contains(&401), "some are hashed, and the rest is turned away");
    let middle = |rounds: &[Vec<Duration>], part: usize| {
        let mut each: Vec<_> = rounds.iter().map(|took| took[took.len() * part / 100]).collect();
        each.sort_unstable();
        each[each.len() / 2]
    };
    for part in [50, 99] {
        let (alone, during) = (middle(&alone, part), middle(&during, part));
        println!("p{part}: alone {alone:?}, beside the attack {during:?}");
        // The limit is generous, since both ends, the attackers and other programs share the cores. A worker that
        // hashed would be blocked for five milliseconds at a time, half of the time, which the median and lower
        // percentiles would show.
        let most = alone * 5 + Duration::from_millis(if part == 50 { 20 } else { 200 });
        assert!(during < most, "p{part}: {alone:?} to {during:?}");
    }
    assert!(hashers.iter().any(|(policy, _)| *policy == SCHED_IDLE), "{hashers:?}");
    let polls = |part: &str| gateway.metric(&format!("forebay_filter_poll_seconds_{part}{{filter=\"basic_auth\"}}"));
    assert!(polls("sum") < polls("count") * 0.01, "a worker hashes: {} s in {} polls", polls("sum"), polls("count"));
}

#[test]
fn the_same_password_of_many_at_once_is_hashed_once() {
    let (_origin, _setup, gateway) = guarded(&format!("ada:{DEAREST}\n"), ", queue: 1");
    let web = gateway.web();
    let ask = move || Client::connect(web).ask("GET", "/", &basic("ada", "secret"), "").status;
    let clients: Vec<_> = (0..20).map(|_| thread::spawn(ask)).collect();
    let statuses: Vec<u16> = clients.into_iter().map(|client| client.join().expect("a client")).collect();
    assert_eq!(statuses, [200; 20]);
    gateway.wait_metric("forebay_password_seconds_count", |count| count == 1.0);
}

#[test]
fn too_many_passwords_are_turned_away_with_a_reason() {
    let (_origin, _setup, gateway) = guarded(&format!("ada:{DEAREST}\n"), ", queue: 1");
    let web = gateway.web();
    let clients: Vec<_> = (0..12)
        .map(|number| {
            thread::spawn(move || Client::connect(web).ask("GET", "/", &basic("ada", &number.to_string()), ""))
        })
        .collect();
    let answers: Vec<_> = clients.into_iter().map(|client| client.join().expect("a client")).collect();
    let busy = answers.iter().find(|answer| answer.status == 503).expect("one that is turned away");
    assert!(busy.text().contains("route.basic_auth_busy") && busy.value("retry-after") == Some("1"), "{busy:?}");
}

/// `secret`, hashed by `sha256sum`.
const KEY: &str = "2bb80d537b1da3e38bd30361aa855686bde0eacd7162fef6a25fe97bf527a25b";

#[test]
fn a_key_lets_in_until_it_is_taken_out_of_the_file() {
    let origin = Origin::answering(|request| ok(format!("{} {:?}", request.target(), request.value("x-client"))));
    let setup = Setup::before(&origin);
    let keys = file(&setup, "keys", &format!("shop:{KEY}\n"));
    let setup = setup.filters(&format!("api_key: {{ keys: {keys}, query: key, user_header: X-Client }}"));
    let gateway = setup.start();
    let ask = |path: &str, fields: &str| gateway.client().ask("GET", path, fields, "");
    assert_eq!(ask("/a", "X-Api-Key: secret\r\nX-Client: root\r\n").text(), "/a Some(\"shop\")");
    assert_eq!(ask("/a?x=1&key=secret", "").text(), "/a?x=1 Some(\"shop\")");
    let missing = ask("/a", "X-Client: shop\r\n");
    assert_eq!((missing.status, missing.value("www-authenticate")), (401, Some("ApiKey realm=\"keys\"")));
    assert!(missing.text().contains("route.api_key_missing"));
    assert!(ask("/a", "X-Api-Key: guess\r\n").text().contains("route.api_key_unknown"));
    for (outcome, count) in [("granted", 2.0), ("missing", 1.0), ("wrong", 1.0)] {
        counted(&gateway, "api_key", outcome, count);
    }
    replace(&setup.path("keys"), &format!("other:{}\n", KEY.replace('2', "3")));
    eventually("the key to be gone", || (ask("/a", "X-Api-Key: secret\r\n").status == 401).then_some(()));
}

#[test]
fn a_set_of_addresses_is_a_file_that_changes() {
    let origin = Origin::named("app");
    let setup = Setup::before(&origin);
    let set = file(&setup, "set", "# nobody yet\n");
    let setup = setup.filters(&format!("ip_set: {{ source: {set} }}"));
    let gateway = setup.start();
    assert_eq!(gateway.client().get("/").status, 200);
    replace(&setup.path("set"), "127.0.0.0/8\n");
    eventually("the new set", || (gateway.client().get("/").status == 403).then_some(()));
    assert!(gateway.client().get("/").text().contains("route.ip_set"));
    replace(&setup.path("set"), "localhost\n");
    gateway.wait_metric("forebay_filter_loads_total{filter=\"ip_set\",outcome=\"failed\"}", |count| count == 1.0);
    assert_eq!(gateway.client().get("/").status, 403);
    replace(&setup.path("set"), "");
    eventually("the empty set", || (gateway.client().get("/").status == 200).then_some(()));
}

#[test]
fn a_page_of_another_origin_asks_before_and_reads_after() {
    let origin =
        Origin::answering(|_| crate::harness::origin::response("200 OK", "Access-Control-Allow-Origin: *\r\n", "data"));
    let setup = Setup::before(&origin).listener("protocols: [http1, h2c]");
    let users = file(&setup, "users", &format!("ada:{CHEAP}\n"));
    let cors = "cors: { origins: ['https://app.test'], credentials: true, methods: [PUT], headers: [Authorization] }";
    let gateway = setup.filters(&format!("{cors}, basic_auth: {{ users: {users} }}")).start();
    let mut client = gateway.client();
    let page = "Origin: https://app.test\r\n";
    let preflight =
        format!("{page}Access-Control-Request-Method: PUT\r\nAccess-Control-Request-Headers: authorization\r\n");
    let answer = client.ask("OPTIONS", "/", &preflight, "");
    assert_eq!((answer.status, answer.value("access-control-allow-methods")), (204, Some("PUT")));
    let allowed = |answer: &crate::harness::wire::Response| {
        ["access-control-allow-origin", "access-control-allow-credentials"]
            .map(|name| answer.value(name).map(str::to_owned))
    };
    let told = [Some("https://app.test".to_owned()), Some("true".to_owned())];
    assert_eq!(allowed(&answer), told);
    assert_eq!(origin.connections(), 0, "a preflight shows nobody, and asks no upstream");
    let refused = client.ask("PUT", "/", page, "");
    assert_eq!((refused.status, allowed(&refused)), (401, told.clone()), "the page may read that it must log in");
    let answer = client.ask("PUT", "/", &format!("{page}{}", basic("ada", "secret")), "");
    assert_eq!((answer.status, allowed(&answer)), (200, told));
    let stranger = client.ask("PUT", "/", &format!("Origin: https://evil.test\r\n{}", basic("ada", "secret")), "");
    assert_eq!((stranger.status, allowed(&stranger)), (200, [None, None]));
    assert_eq!(stranger.value("vary"), Some("Origin"));
    assert_eq!(Ask::get("/").over(Protocol::Http2, gateway.web()).status, 401);
}
