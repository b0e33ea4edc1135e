//! Routing: by host, path, method, header and query, with the precedence of the Kubernetes Gateway API.

use crate::harness::client::get;
use crate::harness::gateway::Watched;
use crate::harness::{Client, Gateway, Origin, Setup, ok};

/// A gateway with these routes, one per line, to upstreams `a`, `b`, `c` and `d`, which return their names.
fn routed(routes: &str) -> Gateway {
    let [a, b, c, d] = ["a", "b", "c", "d"].map(Origin::named);
    let fallback = Origin::named("app");
    Setup::before(&fallback).also("a", &a).also("b", &b).also("c", &c).also("d", &d).routes(routes).start()
}

/// The upstream that responds to a GET for this host and path.
fn who(client: &mut Client, host: &str, path: &str) -> String {
    client.send(format!("GET {path} HTTP/1.1\r\nHost: {host}\r\n\r\n"));
    let answer = client.response();
    if answer.status == 200 { answer.text().to_owned() } else { answer.status.to_string() }
}

#[test]
fn an_exact_host_wins_over_a_wildcard_and_the_longer_wildcard_over_the_shorter() {
    let gateway = routed(
        "{ name: any, upstream: d }
         { name: short, match: { hosts: ['*.example.com'] }, upstream: c }
         { name: long, match: { hosts: ['*.shop.example.com'] }, upstream: b }
         { name: exact, match: { hosts: [www.shop.example.com] }, upstream: a }",
    );
    let mut client = gateway.client();
    for (host, expected) in [
        ("www.shop.example.com", "a"),
        ("WWW.Shop.Example.COM:8080", "a"),
        ("api.shop.example.com", "b"),
        ("v1.api.shop.example.com", "b"),
        ("shop.example.com", "c"),
        ("example.com", "d"),
        ("badexample.com", "d"),
        ("other", "d"),
    ] {
        assert_eq!(who(&mut client, host, "/"), expected, "{host}");
    }
}

#[test]
fn an_exact_path_wins_over_a_prefix_and_the_longer_prefix_over_the_shorter() {
    let gateway = routed(
        "{ name: root, match: { path: { prefix: / } }, upstream: d }
         { name: api, match: { path: { prefix: /api } }, upstream: c }
         { name: users, match: { path: { prefix: /api/users } }, upstream: b }
         { name: me, match: { path: { exact: /api/users/me } }, upstream: a }",
    );
    let mut client = gateway.client();
    for (path, expected) in [
        ("/api/users/me", "a"),
        ("/api/users/me?x=1", "a"),
        ("/api/users/me/too", "b"),
        ("/api/users", "b"),
        ("/api/users2", "c"),
        ("/api", "c"),
        ("/api/", "c"),
        ("/apis", "d"),
        ("/", "d"),
    ] {
        assert_eq!(who(&mut client, "test", path), expected, "{path}");
    }
}

#[test]
fn a_regular_expression_takes_whole_paths_only() {
    let gateway = routed(
        "{ name: item, match: { path: { regex: '/item/[0-9]+' } }, upstream: a }
         { name: any, upstream: d }",
    );
    let mut client = gateway.client();
    assert_eq!(who(&mut client, "test", "/item/42"), "a");
    assert_eq!(who(&mut client, "test", "/item/42/more"), "d");
    assert_eq!(who(&mut client, "test", "/an/item/42"), "d");
}

#[test]
fn a_host_decides_before_a_path() {
    let gateway = routed(
        "{ name: path, match: { path: { exact: /x } }, upstream: b }
         { name: host, match: { hosts: [shop] }, upstream: a }",
    );
    assert_eq!(who(&mut gateway.client(), "shop", "/x"), "a");
    assert_eq!(who(&mut gateway.client(), "other", "/x"), "b");
}

#[test]
fn a_method_then_more_headers_then_more_queries_decide_between_equal_paths() {
    let gateway = routed(
        "{ name: query, match: { queries: { v: '2' } }, upstream: c }
         { name: header, match: { headers: { x-beta: 'on' } }, upstream: b }
         { name: method, match: { methods: [PUT, POST] }, upstream: a }
         { name: any, upstream: d }",
    );
    let mut client = gateway.client();
    let mut ask = |method: &str, path: &str, fields: &str| client.ask(method, path, fields, "").text().to_owned();
    assert_eq!(ask("POST", "/?v=2", "X-Beta: on\r\n"), "a");
    assert_eq!(ask("GET", "/?v=2", "x-beta: on\r\n"), "b");
    assert_eq!(ask("GET", "/?a=1&v=2", "X-Beta: off\r\n"), "c");
    assert_eq!(ask("GET", "/?v=3", ""), "d");
    assert_eq!(ask("PUT", "/", ""), "a");
}

#[test]
fn headers_and_queries_match_by_pattern_and_by_being_there() {
    let gateway = routed(
        "{ name: regex, match: { headers: { x-version: { regex: 'v[0-9]+' } } }, upstream: a }
         { name: present, match: { queries: { debug: { present: true } } }, upstream: b }
         { name: absent, match: { headers: { cookie: { present: false } } }, upstream: c }
         { name: any, upstream: d }",
    );
    let mut client = gateway.client();
    let mut ask = |path: &str, fields: &str| client.ask("GET", path, fields, "").text().to_owned();
    assert_eq!(ask("/", "X-Version: v12\r\nCookie: a=1\r\n"), "a");
    assert_eq!(ask("/", "X-Version: v12b\r\nCookie: a=1\r\n"), "d");
    assert_eq!(ask("/?debug", "Cookie: a=1\r\n"), "b");
    assert_eq!(ask("/?debug=", "Cookie: a=1\r\n"), "b");
    assert_eq!(ask("/", ""), "c");
}

#[test]
fn of_two_equal_routes_the_first_written_wins() {
    let gateway = routed(
        "{ name: first, match: { headers: { x-a: '1' } }, upstream: a }
         { name: second, match: { headers: { x-b: '1' } }, upstream: b }
         { name: any, upstream: d }",
    );
    assert_eq!(gateway.client().ask("GET", "/", "X-B: 1\r\nX-A: 1\r\n", "").text(), "a");
}

#[test]
fn a_split_shares_requests_by_weight() {
    let [stable, canary] = ["stable", "canary"].map(Origin::named);
    let split = "upstreams: [ { name: app, weight: 3 }, { name: canary, weight: 1 } ]";
    let gateway = Setup::before(&stable).also("canary", &canary).route(split).start();
    let mut client = gateway.client();
    let answers: Vec<String> = (0..40).map(|_| client.get("/").text().to_owned()).collect();
    assert_eq!(answers.iter().filter(|who| *who == "canary").count(), 10);
    let upstreams: Vec<String> = gateway.log_lines(40).iter().map(|line| line.text("upstream").to_owned()).collect();
    assert_eq!(upstreams.iter().filter(|who| *who == "canary").count(), 10);
}

#[test]
fn a_request_that_no_route_takes_is_refused_404() {
    let gateway = routed("{ name: a, match: { path: { exact: /a } }, upstream: a }");
    let mut client = gateway.client();
    let answer = client.get("/b");
    assert_eq!(answer.status, 404);
    assert!(answer.value("content-type").is_some_and(|kind| kind.starts_with("text/plain")));
    assert_eq!(client.get("/a").text(), "a", "the connection goes on");

    let line = gateway.log_line();
    assert_eq!((line.status(), line.reason()), (404, "route.no_match"));
    gateway.refused_once("route.no_match");
    gateway.wait_metric("forebay_exchanges_total{route=\"_none\",code=\"404\"}", |count| count == 1.0);
}

#[test]
fn a_refusal_is_json_for_a_client_that_prefers_it() {
    let gateway = routed("{ name: a, match: { path: { exact: /a } }, upstream: a }");
    for accept in
        ["application/json", "text/html;q=0.5, application/json", "application/problem+json, application/json"]
    {
        let answer = gateway.client().ask("GET", "/b", &format!("Accept: {accept}\r\n"), "");
        assert_eq!(answer.status, 404);
        assert_eq!(answer.value("content-type"), Some("application/json"), "{accept}");
        assert!(answer.json().to_string().contains("route.no_match"), "{}", answer.text());
    }
}

#[test]
fn a_refusal_of_a_head_request_has_no_body() {
    let gateway = routed("{ name: a, match: { path: { exact: /a } }, upstream: a }");
    let mut client = gateway.client();
    assert_eq!(client.ask("HEAD", "/b", "", "").status, 404);
    assert_eq!(client.get("/a").text(), "a");
}

#[test]
fn each_exchange_is_counted_and_logged_under_its_route() {
    let origin = Origin::answering(|request| ok(request.target()));
    let gateway = Setup::before(&origin)
        .routes("{ name: one, match: { path: { exact: /1 } }, upstream: app }\n{ name: rest, upstream: app }")
        .start();
    for path in ["/1", "/2", "/3"] {
        get(gateway.web(), path);
    }
    gateway.wait_metric("forebay_exchanges_total{route=\"one\",code=\"200\"}", |count| count == 1.0);
    gateway.wait_metric("forebay_exchanges_total{route=\"rest\",code=\"200\"}", |count| count == 2.0);
    assert_eq!(gateway.log_line_of("/1").text("route"), "one");
    assert_eq!(gateway.log_line_of("/3").text("route"), "rest");
}
