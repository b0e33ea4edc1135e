//! Tests of the actors against each other, without a gateway, so that stories can rely on their results.

use crate::harness::client::{chunked, get, request};
use crate::harness::metrics::{Prometheus, Scrape, promtool};
use crate::harness::nginx::noise;
use crate::harness::origin::{Closed, built_in, first_fails, response};
use crate::harness::{Ask, Client, End, H2Origin, Leave, Nginx, Origin, Protocol, Setup, eventually, ms, ok};

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

#[test]
fn a_body_of_any_size_is_compared_by_its_digest_in_both_framings() {
    let origin = built_in();
    for length in [0, 1, 65_536, 3_000_000] {
        let framing = if length > 0 { format!("content-length: {length}") } else { "none".to_owned() };
        Ask::put(length).over(Protocol::Http1, origin.address()).arrived(length, &framing);
        Ask::put(length).chunked().over(Protocol::Http1, origin.address()).arrived(length, "chunked");
    }
    assert_eq!(origin.body_bytes(), 2 * 3_065_537);
}

#[test]
fn a_body_over_http_2_is_compared_the_same_way() {
    let origin = H2Origin::start();
    for length in [0, 1, 65_536, 3_000_000] {
        let (said, unsaid) = (Ask::put(length), Ask::put(length).chunked());
        said.over(Protocol::Http2, origin.address()).arrived(length, &format!("content-length: {length}"));
        unsaid.over(Protocol::Http2, origin.address()).arrived(length, "none");
    }
}

#[test]
fn an_answer_of_any_size_is_compared_by_its_digest_in_every_framing() {
    let origin = built_in();
    for framing in ["bytes", "chunked", "until-close"] {
        for length in [0, 1, 65_536, 3_000_000] {
            let ask = Ask::get(format!("/{framing}/{length}"));
            ask.over(Protocol::Http1, origin.address()).is_content(length);
            ask.narrow().over(Protocol::Http1, origin.address()).is_content(length);
        }
    }
    let half = Ask::get("/fault/half/200000").over(Protocol::Http1, origin.address());
    assert_eq!((half.length, half.end), (100_000, End::Cut));
}

#[test]
fn an_exchange_may_be_had_in_steps() {
    let origin = built_in();
    let mut exchange = Ask::put(1_000).to("/echo").begin(Protocol::Http1, origin.address());
    assert!(exchange.send(400));
    eventually("a part to arrive", || (origin.body_bytes() == 400).then_some(()));
    assert_eq!((origin.requests(), origin.busy()), (1, 1));
    assert!(exchange.finish_body());
    assert_eq!((exchange.status(), exchange.read(300), exchange.has_read()), (200, 300, 300));
    exchange.answer().is_content(1_000);
    assert_eq!(origin.body_bytes(), 1_000);
}

#[test]
fn a_paced_client_takes_its_time_either_way() {
    let origin = built_in();
    let started = std::time::Instant::now();
    Ask::put(1_000).sending(100, ms(10)).over(Protocol::Http1, origin.address()).arrived(1_000, "content-length: 1000");
    assert!(started.elapsed() >= ms(100), "{:?}", started.elapsed());
    Ask::get("/bytes/1000").reading(100, ms(10)).over(Protocol::Http1, origin.address()).is_content(1_000);
    assert!(started.elapsed() >= ms(200), "{:?}", started.elapsed());
}

#[test]
fn a_narrow_reader_takes_nothing_ahead_on_either_protocol() {
    let (origin, h2) = (built_in(), H2Origin::start());
    let mut slow = Ask::get("/bytes/64MiB").narrow().begin(Protocol::Http1, origin.address());
    assert_eq!(slow.read(1_000), 1_000);
    assert_eq!(origin.busy(), 1, "64 MiB are in the buffers of the kernel");
    drop(slow);
    eventually("the origin to notice", || (origin.busy() == 0).then_some(()));

    let mut slow = Ask::put(100_000).to("/echo").narrow().begin(Protocol::Http2, h2.address());
    assert!(slow.finish_body());
    assert_eq!((slow.read(2_000), slow.has_read()), (2_000, 2_000));
    slow.answer().is_content(100_000);
}

#[test]
fn trailers_and_interim_answers_are_seen() {
    let (origin, h2) = (built_in(), H2Origin::start());
    let answer = Ask::get("/trailers").over(Protocol::Http1, origin.address());
    assert_eq!(answer.trailers, ["X-Trailer: the end"]);
    let answer = Ask::get("/trailers").over(Protocol::Http2, h2.address());
    assert_eq!((answer.text(), &*answer.trailers), ("A trailer follows.\n", &["x-trailer: the end".to_owned()][..]));
    let answer = Ask::get("/early-hints").over(Protocol::Http1, origin.address());
    assert_eq!((answer.status, answer.interim), (200, vec![103]));
    assert_eq!(h2.paths(), ["/trailers"]);
}

#[test]
fn a_client_leaves_in_every_way() {
    let (origin, h2) = (built_in(), H2Origin::start());
    for how in [Leave::Close, Leave::Reset, Leave::Stream] {
        let mut exchange = Ask::put(1_000).begin(Protocol::Http1, origin.address());
        assert!(exchange.send(500));
        eventually("it to be heard", || (origin.busy() == 1).then_some(()));
        assert!(exchange.leave(how).is_none());
        eventually("it to be gone", || (origin.busy() == 0 && origin.connections() == 0).then_some(()));
        let mut exchange = Ask::put(1_000).begin(Protocol::Http2, h2.address());
        assert!(exchange.send(500));
        assert_eq!(exchange.leave(how).is_some(), how == Leave::Stream);
    }
}

#[test]
fn of_two_origins_the_first_that_is_asked_fails_in_the_middle_of_the_body() {
    let origins = first_fails("/fault/reset/1000");
    let mut exchange = Ask::put(2_000_000).begin(Protocol::Http1, origins[1].address());
    exchange.finish_body();
    assert_eq!(exchange.try_status(), None);
    Ask::put(2_000).over(Protocol::Http1, origins[0].address()).arrived(2_000, "content-length: 2000");
}

#[test]
fn a_program_has_a_small_disk_to_itself_and_shows_what_it_holds_open() {
    let origin = Origin::named("origin");
    let process = Setup::before(&origin).tmpfs("4m").spawn();
    let disks = process.spool_disks();
    assert!(disks.len() == 1 && disks[0].contains("tmpfs") && disks[0].contains("size=4096k"), "{disks:?}");
    assert!(process.open_files().iter().any(|file| file.starts_with("socket:")));
    assert!(process.spool_files().is_empty());
    assert_eq!(process.client().get("/").text(), "origin");
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
