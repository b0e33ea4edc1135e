//! The actors against each other, without a gateway: a story can trust what they say.

use crate::harness::client::{chunked, get, request};
use crate::harness::metrics::{Prometheus, Scrape, promtool};
use crate::harness::nginx::noise;
use crate::harness::origin::{Closed, response};
use crate::harness::{Client, End, Nginx, Origin, eventually, ms, ok};

#[test]
fn a_client_reads_what_an_origin_answers_and_keeps_the_connection() {
    let origin = Origin::answering(|request| ok(request.target()));
    let mut client = Client::connect(origin.address());

    assert_eq!(client.get("/a").text(), "/a");
    assert_eq!(client.ask("HEAD", "/b", "", "").body, b"");
    assert_eq!(client.get("/c").end, End::Complete);
    assert_eq!(origin.connections(), 1);
    assert_eq!(origin.requests().len(), 3);
}

#[test]
fn an_origin_reads_bodies_of_both_framings() {
    let origin = Origin::answering(|request| ok(&request.body));
    let mut client = Client::connect(origin.address());
    let body = noise(100_000);

    assert_eq!(client.ask("POST", "/", "", &body).body, body);
    client.send(request("POST", "/", "Transfer-Encoding: chunked\r\n", ""));
    client.send(chunked(&body, 7_000));
    assert_eq!(client.response().body, body);
}

#[test]
fn an_answer_that_breaks_off_is_seen_as_cut_whatever_its_framing() {
    let origin = Origin::scripted();
    for half in
        ["Content-Length: 10\r\n\r\nhalf", "Transfer-Encoding: chunked\r\n\r\na\r\nhalf", "Content-Length: 1\r\n\r\n"]
    {
        let mut client = Client::connect(origin.address());
        client.send(request("GET", "/", "", ""));
        let mut connection = origin.accept();
        connection.request();
        connection.send(format!("HTTP/1.1 200 OK\r\n{half}"));
        connection.close();
        assert_eq!(client.response().end, End::Cut, "{half}");
    }
}

#[test]
fn a_reset_ends_a_connection_for_its_peer() {
    let origin = Origin::scripted();
    let mut client = Client::connect(origin.address());
    origin.accept().reset();
    client.closed();
}

#[test]
fn a_drip_stops_when_the_peer_speaks() {
    let origin = Origin::scripted();
    let mut client = Client::connect(origin.address());
    let mut connection = origin.accept();
    connection.send(response("400 Bad Request", "", ""));
    assert!(!client.drip("GET / HTTP/1.1\r\n", ms(20)));
    assert_eq!(client.response().status, 400);
}

#[test]
fn a_refusing_address_refuses_and_a_silent_one_is_silent() {
    let connect = |address| std::net::TcpStream::connect_timeout(&address, ms(100)).map_err(|e| e.kind());
    let (refusing, silent) = (Closed::refusing(), Closed::silent());
    assert_eq!(connect(refusing.address()).err(), Some(std::io::ErrorKind::ConnectionRefused));
    assert_eq!(connect(silent.address()).err(), Some(std::io::ErrorKind::TimedOut));
}

#[test]
fn nginx_serves_files_takes_uploads_and_has_a_chunked_answer() {
    let nginx = Nginx::start();
    let mut client = Client::connect(nginx.address());
    assert_eq!(client.get("/large").body, nginx.file("/large"));
    assert_eq!(client.get("/empty").body, b"");
    assert_eq!(client.get("/nothing").status, 204);

    let answer = client.get("/chunked");
    assert_eq!(answer.value("transfer-encoding"), Some("chunked"));
    assert_eq!(answer.body, nginx.file("/chunked"));

    assert_eq!(client.ask("PUT", "/put/x", "", "something").status, 201);
    assert_eq!(nginx.file("/put/x"), b"something");
}

#[test]
fn asking_once_needs_one_connection() {
    let origin = Origin::named("origin");
    assert_eq!(get(origin.address(), "/").text(), "origin");
    eventually("the connection to be counted", || (origin.connections() == 1).then_some(()));
}

const METRICS: &str = "\
# HELP story_total Stories.
# TYPE story_total counter
story_total{route=\"all\",code=\"200\"} 3
story_total{route=\"all\",code=\"404\"} 1
";

#[test]
fn a_selector_sums_the_samples_whose_labels_it_names() {
    let origin = Origin::answering(|_| ok(METRICS));
    let scrape = Scrape::of(origin.address());
    assert_eq!(scrape.sum("story_total"), 4.0);
    assert_eq!(scrape.sum("story_total{code=\"200\",route=\"all\"}"), 3.0);
    assert_eq!(scrape.sum("story_total{code=\"500\"}"), 0.0);
    assert_eq!(scrape.sum("story"), 0.0);
}

#[test]
fn a_real_prometheus_and_promtool_read_what_they_are_shown() {
    let content_type = "Content-Type: text/plain; version=0.0.4\r\n";
    let origin = Origin::answering(move |_| response("200 OK", content_type, METRICS));
    assert_eq!(promtool(METRICS), "");
    assert!(promtool(&METRICS.replace("story_total", "story_count")).contains("story_count"));
    assert_eq!(Prometheus::scraping(origin.address()).query("sum(story_total) == 4"), [4.0]);
}
