//! Session affinity with a signed cookie: after restarts, on other nodes, as long as the endpoint is available.

use std::collections::BTreeSet;

use crate::harness::client::{Client, request};
use crate::harness::origin::response;
use crate::harness::wire::Response;
use crate::harness::{Gateway, Origin, Setup, eventually};

/// A gateway with session affinity to these origins, and these cookie settings.
fn sticky(origins: &[Origin], keys: &str) -> Setup {
    let addresses: Vec<_> = origins.iter().map(Origin::address).collect();
    let cookie = format!("{{ name: stay, {keys} }}");
    Setup::before_all(&addresses)
        .upstream(&format!("load_balancing: {{ policy: round_robin, sticky: {{ cookie: {cookie} }} }}"))
}

const SECRET: &str = "secret: 0123456789abcdef";

fn origins() -> [Origin; 3] {
    ["a", "b", "c"].map(Origin::named)
}

/// The cookie set by a response: `stay=…`, and its attributes.
fn set(answer: &Response) -> Option<(String, String)> {
    let field = answer.value("set-cookie")?;
    let (pair, attributes) = field.split_once("; ").expect("attributes");
    Some((pair.to_owned(), attributes.to_owned()))
}

/// A new client's endpoint and cookie.
fn newcomer(gateway: &Gateway) -> (String, String) {
    let answer = gateway.client().get("/");
    (answer.text().to_owned(), set(&answer).expect("a cookie for a newcomer").0)
}

fn ask(gateway: &Gateway, cookie: &str) -> Response {
    gateway.client().ask("GET", "/", &format!("Cookie: theme=dark; {cookie}\r\n"), "")
}

/// Asserts that the client stays: the same origin responds this often and sets no cookie.
fn stays(gateway: &Gateway, cookie: &str, home: &str) {
    for _ in 0..7 {
        let answer = ask(gateway, cookie);
        assert_eq!((answer.text(), answer.value("set-cookie")), (home, None));
    }
}

#[test]
fn a_client_stays_where_it_was_served_and_is_told_once() {
    let origins = origins();
    let gateway = sticky(&origins, &format!("{SECRET}, ttl: 1h")).start();
    let answer = gateway.client().get("/");
    let (cookie, attributes) = set(&answer).expect("a cookie");
    assert_eq!(attributes, "Path=/; Max-Age=3600; HttpOnly; SameSite=Lax");
    assert!(!cookie.contains("127.0.0.1") && cookie.len() == "stay=".len() + 39, "{cookie}");
    stays(&gateway, &cookie, answer.text());
    let homes: BTreeSet<String> = (0..9).map(|_| newcomer(&gateway).0).collect();
    assert_eq!(homes.len(), 3, "newcomers are shared out by the policy");
}

#[test]
fn a_cookie_holds_at_another_node_that_knows_the_secret_and_at_no_other() {
    let origins = origins();
    let (home, cookie) = newcomer(&sticky(&origins, SECRET).start());
    stays(&sticky(&origins, SECRET).start(), &cookie, &home);

    let stranger = sticky(&origins, "secret: fedcba9876543210").start();
    let answers: Vec<Response> = (0..6).map(|_| ask(&stranger, &cookie)).collect();
    assert!(answers.iter().all(|answer| set(answer).is_some_and(|(other, _)| other != cookie)));
    assert_eq!(answers.iter().map(Response::text).collect::<BTreeSet<_>>().len(), 3, "it goes by the policy");
}

#[test]
fn a_forged_cookie_chooses_nothing() {
    let origins = origins();
    let gateway = sticky(&origins, SECRET).start();
    let (_, cookie) = newcomer(&gateway);
    let (before, after) = cookie.split_at(20);
    let changed = format!("{before}{}{}", if after.starts_with('A') { 'B' } else { 'A' }, &after[1..]);
    for forged in [&*changed, &cookie[..20], &format!("{cookie}x"), "stay=", "stay", "stay=127.0.0.1:80"] {
        let homes: BTreeSet<String> = (0..6)
            .map(|_| {
                let answer = ask(&gateway, forged);
                assert!(set(&answer).is_some(), "{forged} is replaced");
                answer.text().to_owned()
            })
            .collect();
        assert_eq!(homes.len(), 3, "{forged}");
    }
}

#[test]
fn a_secret_can_be_changed_and_clients_stay() {
    let origins = origins();
    let (home, old) = newcomer(&sticky(&origins, SECRET).start());
    let both = sticky(&origins, "secret: [fedcba9876543210, 0123456789abcdef]").start();
    let answer = ask(&both, &old);
    assert_eq!(answer.text(), home);
    let (new, _) = set(&answer).expect("a cookie under the new secret");
    stays(&both, &new, &home);
    stays(&sticky(&origins, "secret: fedcba9876543210").start(), &new, &home);
}

#[test]
fn a_client_whose_endpoint_is_out_moves_and_stays_where_it_has_come() {
    let origins = origins();
    let gateway = sticky(&origins, SECRET).start();
    let (home, cookie) = newcomer(&gateway);
    let its = |home: &str| origins[usize::from(home.as_bytes()[0] - b'a')].address();
    let order = |what: &str| {
        let path = format!("/upstreams/app/endpoints/{}/{what}", its(&home));
        assert_eq!(Client::connect(gateway.admin()).ask("POST", &path, "", "").status, 200);
    };
    order("drain");
    let answer = ask(&gateway, &cookie);
    let (moved, new_home) = (set(&answer).expect("another cookie").0, answer.text().to_owned());
    assert_ne!(new_home, home);
    stays(&gateway, &moved, &new_home);
    order("enable");
    eventually("it to be back", || (ask(&gateway, &cookie).text() == home).then_some(()));
    stays(&gateway, &moved, &new_home);
}

#[test]
fn a_cookie_of_an_endpoint_that_is_gone_is_replaced() {
    let origins = origins();
    let (_, cookie) = newcomer(&sticky(&origins[..1], SECRET).start());
    let answer = ask(&sticky(&origins[1..], SECRET).start(), &cookie);
    assert!(answer.status == 200 && set(&answer).is_some());
}

#[test]
fn an_endpoint_that_fails_is_left_for_another_and_the_client_stays_there() {
    let origins = [Origin::scripted(), Origin::named("other")];
    let (_alone, mut client, mut connection) = sticky(&origins[..1], SECRET).asked(&origins[0]);
    connection.answer("home");
    let (cookie, _) = set(&client.response()).expect("a cookie");
    let gateway = sticky(&origins, SECRET).start();
    let mut client = gateway.client();
    client.send(request("GET", "/", &format!("Cookie: {cookie}\r\n"), ""));
    let mut connection = origins[0].accept();
    connection.request();
    connection.reset();
    let answer = client.response();
    assert_eq!(answer.text(), "other");
    stays(&gateway, &set(&answer).expect("another cookie").0, "other");
}

#[test]
fn nobody_is_to_stay_where_a_request_fails() {
    let failing = Origin::answering(|_| response("500 Internal Server Error", "", "failed"));
    let gateway = sticky(&[failing], SECRET).start();
    assert_eq!(gateway.client().get("/").value("set-cookie"), None);
}

#[test]
fn over_https_the_cookie_is_secure() {
    let origins = origins();
    let gateway = sticky(&origins, SECRET).more("trusted_proxies: [127.0.0.1]").start();
    let answer = gateway.client().ask("GET", "/", "X-Forwarded-For: 192.0.2.1\r\nX-Forwarded-Proto: https\r\n", "");
    assert_eq!(set(&answer).expect("a cookie").1, "Path=/; Secure; HttpOnly; SameSite=Lax");
    let everywhere = sticky(&origins, &format!("{SECRET}, same_site: none")).start();
    let answer = everywhere.client().get("/");
    assert_eq!(set(&answer).expect("a cookie").1, "Path=/; Secure; HttpOnly; SameSite=None");
}

#[test]
fn cookies_of_the_endpoint_itself_are_left_alone() {
    let origin = Origin::answering(|_| response("200 OK", "Set-Cookie: session=1; Path=/\r\n", "ok"));
    let gateway = sticky(&[origin], SECRET).start();
    let answer = gateway.client().get("/");
    let set = answer.head.values("set-cookie");
    assert_eq!((set.len(), set[0]), (2, "session=1; Path=/"));
    assert!(set[1].starts_with("stay="));
}
