//! Custom error pages for errors of Forebay, filters and endpoints, in the format that the client accepts.

use std::fs;

use crate::harness::gateway::Watched;
use crate::harness::origin::{Closed, response};
use crate::harness::{Ask, End, Gateway, Origin, Protocol, Setup, eventually};

const PAGES: &str = "error_page: { endpoints: true, pages: [
    { on: [404], html: '<h1>Nothing at {{ request.args.b }}</h1>', problem: {} },
    { on: [429, 401], json: '{ \"why\": \"{{ response.reason }}\" }' },
    { on: [5xx], text: 'Sorry: {{ response.message.orValue(\"later\") }}' } ] }";

fn asked(gateway: &Gateway, method: &str, accept: &str) -> crate::harness::wire::Response {
    gateway.client().ask(method, "/a?b=%3Cb%3E", &format!("Accept: {accept}\r\n"), "")
}

#[test]
fn an_error_of_an_endpoint_gets_the_form_that_the_client_asks_for() {
    let fields = "Content-Type: text/plain\r\nSet-Cookie: a=1\r\nETag: \"x\"\r\nContent-Encoding: gzip\r\n";
    let origin = Origin::answering(move |_| response("404 Not Found", fields, "no text at all"));
    let gateway = Setup::before(&origin).listener("protocols: [http1, h2c]").filters(PAGES).start();
    let html = "<h1>Nothing at &lt;b&gt;</h1>";
    let page = asked(&gateway, "GET", "text/html,*/*;q=0.8");
    assert_eq!((page.status, page.text(), page.end), (404, html, End::Complete));
    assert_eq!(page.value("content-length"), Some(&*html.len().to_string()));
    assert_eq!((page.value("content-type"), page.value("set-cookie")), (Some("text/html; charset=utf-8"), Some("a=1")));
    assert_eq!((page.value("etag"), page.value("content-encoding"), page.value("vary")), (None, None, Some("Accept")));

    let problem = asked(&gateway, "GET", "application/json");
    assert_eq!(problem.value("content-type"), Some("application/problem+json"));
    assert_eq!(problem.text(), "{\"type\":\"about:blank\",\"title\":\"Not Found\",\"status\":404}\n");

    let head = asked(&gateway, "HEAD", "text/html");
    assert_eq!((head.status, head.body.len(), head.end), (404, 0, End::Complete));
    assert_eq!(head.value("content-length"), Some(&*html.len().to_string()), "as long as the page would be");

    let over_http2 = Ask::get("/a?b=%3Cb%3E").field("accept", "text/html").over(Protocol::Http2, gateway.web());
    assert_eq!((over_http2.status, over_http2.text()), (404, html));
    assert_eq!(gateway.log_line().status(), 404);
}

#[test]
fn refusals_get_pages_and_keep_what_they_tell_beside_them() {
    let origin = Origin::named("app");
    let setup = Setup::before(&origin);
    let users = setup.path("users");
    fs::write(&users, "ada:$2b$04$NSVZohxgRPqCbGvPPBsZ2eTV7ov/7NXV8xzCnRBdxJMN.OtQAfoCC\n").expect("a file");
    let guard = format!("basic_auth: {{ users: {{ path: \"{}\" }} }}", users.display());
    let limit = "rate_limit: { key: { header: X-Key }, rate: 1/h, burst: 1 }";
    let gateway = setup.filters(&format!("{PAGES}, {limit}, {guard}")).start();
    let mut client = gateway.client();
    let refused = client.get("/");
    assert_eq!((refused.status, refused.text()), (401, "{ \"why\": \"route.basic_auth_missing\" }"));
    assert!(refused.value("www-authenticate").is_some_and(|challenge| challenge.starts_with("Basic realm=")));
    let limited = client.get("/");
    assert_eq!((limited.status, limited.text()), (429, "{ \"why\": \"route.rate_limit\" }"));
    assert!(limited.value("retry-after").is_some());
    gateway.wait_metric("forebay_refusals_total{reason=\"route.rate_limit\"}", |count| count == 1.0);

    let closed = Closed::refusing();
    let gateway = Setup::before_all(&[closed.address()]).filters(PAGES).start();
    let page = gateway.client().get("/");
    assert_eq!((page.status, page.text()), (502, "Sorry: The backend refused the connection."));
    gateway.refused_once("connect.refused");
}

#[test]
fn what_an_operator_has_written_is_seen_and_what_is_empty_gets_a_page() {
    let origin = Origin::named("app");
    let with = |respond: &str| Setup::before(&origin).filters(&format!("{PAGES}, respond: {respond}")).start();
    assert_eq!(with("{ status: 503, body: Closed. }").client().get("/").text(), "Closed.");
    let page = with("{ status: 503, headers: { Retry-After: '60' } }").client().get("/");
    assert_eq!((page.text(), page.value("retry-after")), ("Sorry: later", Some("60")));
    assert_eq!(origin.connections(), 0);
}

#[test]
fn answers_that_are_none_of_its_business_pass() {
    let origin = Origin::answering(|request| match request.target() {
        "/fine" => response("200 OK", "", "fine"),
        "/moved" => response("302 Found", "Location: /\r\n", ""),
        _ => response("418 I'm a teapot", "", "tea"),
    });
    let gateway = Setup::before(&origin).filters(PAGES).start();
    let mut client = gateway.client();
    for (path, status, body) in [("/fine", 200, "fine"), ("/moved", 302, ""), ("/pot", 418, "tea")] {
        let answer = client.get(path);
        assert_eq!((answer.status, answer.text()), (status, body));
    }
    let of_forebay_alone = "error_page: { pages: [ { text: x } ] }";
    let gateway = Setup::before(&origin).filters(of_forebay_alone).start();
    assert_eq!(gateway.client().get("/pot").text(), "tea");
}

#[test]
fn a_grpc_call_gets_its_status_and_no_page() {
    let origin = Origin::named("app");
    let setup = Setup::before(&origin).listener("protocols: [h2c]");
    let gateway = setup.filters("error_page: { pages: [ { html: x } ] }, access: { deny: [ 127.0.0.0/8 ] }").start();
    let call = Ask::post(0).grpc().over(Protocol::Http2, gateway.web());
    assert_eq!((call.status, call.value("grpc-status"), call.body.len()), (200, Some("7"), 0));
    let plain = Ask::get("/").over(Protocol::Http2, gateway.web());
    assert_eq!((plain.status, plain.text()), (403, "x"));
}

#[test]
fn a_page_in_a_file_is_read_again_when_it_changes() {
    let origin = Origin::answering(|_| response("500 Internal Server Error", "", "stack trace"));
    let setup = Setup::before(&origin);
    let file = setup.path("500.html");
    fs::write(&file, "<p>One {{ response.code }}").expect("a file");
    let source = format!("{{ path: \"{}\", refresh: 1s }}", file.display());
    let gateway = setup.filters(&format!("error_page: {{ endpoints: true, pages: [ {{ html: {source} }} ] }}")).start();
    assert_eq!(gateway.client().get("/").text(), "<p>One 500");
    let replace = |text: &str| {
        let beside = file.with_extension("new");
        fs::write(&beside, text).and_then(|()| fs::rename(&beside, &file)).expect("a file");
    };
    replace("<p>{{ wrong");
    let failed = "forebay_filter_loads_total{filter=\"error_page\",outcome=\"failed\",route=\"all\"}";
    gateway.wait_metric(failed, |count| count == 1.0);
    assert_eq!(gateway.client().get("/").text(), "<p>One 500", "what was right last stays");
    replace("<p>Two {{ response.code }}");
    eventually("the new page", || (gateway.client().get("/").text() == "<p>Two 500").then_some(()));
}

#[test]
fn pages_are_counted_by_the_class_of_the_error_and_their_form() {
    let origin = Origin::answering(|request| match request.target() {
        "/missing" => response("404 Not Found", "", "none"),
        "/broken" => response("500 Internal Server Error", "", "trace"),
        "/pot" => response("418 I'm a teapot", "", "tea"),
        _ => response("200 OK", "", "fine"),
    });
    let gateway = Setup::before(&origin).filters(PAGES).start();
    let get = |path: &str, accept: &str| gateway.client().ask("GET", path, &format!("Accept: {accept}\r\n"), "").status;
    let asked = [
        ("/missing", "text/html", 404),
        ("/missing", "*/*", 404),
        ("/missing", "application/json", 404),
        ("/broken", "text/html", 500),
        ("/pot", "*/*", 418),
        ("/", "*/*", 200),
    ];
    for (path, accept, status) in asked {
        assert_eq!(get(path, accept), status, "{path} {accept}");
    }
    for (labels, pages) in [
        ("route=\"all\",code_class=\"4xx\",form=\"html\"", 2.0),
        ("route=\"all\",code_class=\"4xx\",form=\"problem\"", 1.0),
        ("route=\"all\",code_class=\"5xx\",form=\"text\"", 1.0),
        ("route=\"all\"", 4.0),
    ] {
        gateway.wait_metric(&format!("forebay_error_pages_total{{{labels}}}"), |count| count == pages);
    }
}
