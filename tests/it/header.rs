//! Request headers: time limits, size limits, and invalid headers.
//!
//! Request smuggling relies on a proxy and its backend parsing a header differently. So unusual headers are refused
//! before a backend sees them: with a status, a reason in metric and log, and a closed connection.

use std::time::Instant;

use crate::harness::client::request;
use crate::harness::gateway::Watched;
use crate::harness::metrics::Scrape;
use crate::harness::{End, Gateway, H2Client, Origin, Setup, eventually, ms, ok};

/// An origin and a gateway in front of it.
fn strict() -> (Origin, Gateway) {
    let origin = Origin::answering(|request| ok(request.target()));
    let gateway = Setup::before(&origin).start();
    (origin, gateway)
}

/// Sends `bytes` on a new connection and returns the status and the logged reason; also checks the metric and the
/// closed connection.
fn refusal(gateway: &Gateway, bytes: impl AsRef<[u8]>) -> (u16, String) {
    let lines = gateway.log_lines(0).len();
    let before = Scrape::of(gateway.admin());
    let mut client = gateway.client();
    client.try_send(&bytes);
    let shown = || String::from_utf8_lossy(&bytes.as_ref()[..bytes.as_ref().len().min(200)]).into_owned();
    let answer = client.try_response_to("GET").unwrap_or_else(|| panic!("no answer to {:?}", shown()));
    assert!(answer.status >= 400, "{} for {:?}", answer.status, shown());
    assert_eq!(answer.end, End::Complete, "{:?}", shown());
    assert_eq!(answer.value("connection"), Some("close"), "{:?}", shown());
    client.closed();

    // The log line of the previous exchange may be late.
    let line = eventually(&format!("the log line of {:?}", shown()), || {
        gateway.log_lines(0).into_iter().skip(lines).find(|line| line.status() == u64::from(answer.status))
    });
    let selector = format!("forebay_refusals_total{{reason=\"{}\"}}", line.reason());
    gateway.wait_metric(&selector, |count| count == before.sum(&selector) + 1.0);
    (answer.status, line.reason().to_owned())
}

/// Asserts that all requests are refused with this reason and never reach the origin.
fn all_refused(status: u16, reason: &str, requests: &[&str]) {
    let (origin, gateway) = strict();
    for bytes in requests {
        assert_eq!(refusal(&gateway, bytes), (status, reason.to_owned()), "{bytes:?}");
    }
    assert_eq!(origin.connections(), 0, "the origin heard of it");
}

#[test]
fn a_header_that_trickles_is_cut_at_the_deadline_for_the_whole_of_it() {
    let origin = Origin::named("origin");
    let gateway = Setup::before(&origin).listener("timeouts: { header: 300ms }").start();
    let mut client = gateway.client();
    let started = Instant::now();
    let cut = !client.drip(request("GET", "/", "X-Long: a field of many letters\r\n", ""), ms(50));
    assert!(cut, "it was to be cut before all of it was sent");
    let answer = client.response();
    assert_eq!(answer.status, 408);
    assert!(started.elapsed() >= ms(300), "{:?}", started.elapsed());
    client.closed();

    let line = gateway.log_line();
    assert_eq!((line.status(), line.reason()), (408, "header.timeout"));
    gateway.refused_once("header.timeout");
    assert_eq!(origin.connections(), 0);
}

#[test]
fn the_header_deadline_holds_for_later_requests_of_a_connection_too() {
    let origin = Origin::named("origin");
    let gateway = Setup::before(&origin).listener("timeouts: { header: 300ms }").start();
    let mut client = gateway.client();
    assert_eq!(client.get("/").status, 200);
    client.send("GET / HTTP/1.1\r\n");
    assert_eq!(client.response().status, 408);
    client.closed();
}

#[test]
fn a_header_in_many_pieces_is_read_whole() {
    let (_origin, gateway) = strict();
    let mut client = gateway.client();
    let (pieces, last) = (request("GET", "/pieces", "", ""), 1);
    let (pieces, last) = pieces.split_at(pieces.len() - last);
    assert!(client.drip(pieces, ms(2)));
    client.send(last);
    assert_eq!(client.response().text(), "/pieces");
}

#[test]
fn as_many_fields_as_are_allowed_pass_and_one_more_is_refused() {
    let origin = Origin::named("origin");
    let gateway = Setup::before(&origin).listener("limits: { headers: 5 }").start();
    let fields = |count: usize| "X-Field: 1\r\n".repeat(count);
    assert_eq!(gateway.client().ask("GET", "/", &fields(4), "").status, 200, "Host is the fifth");
    assert_eq!(refusal(&gateway, request("GET", "/", &fields(5), "")), (431, "header.too_many".to_owned()));
}

#[test]
fn a_header_larger_than_allowed_is_refused_wherever_it_is_large() {
    let origin = Origin::named("origin");
    let gateway = Setup::before(&origin).listener("limits: { header_bytes: 1KiB }").start();
    let large = "a".repeat(1_024);
    for bytes in [
        request("GET", "/", &format!("X-Large: {large}\r\n"), ""),
        request("GET", &format!("/{large}"), "", ""),
        request("GET", "/", &format!("{large}: 1\r\n"), ""),
        request("GET", "/", &"X-Field: of 20\r\n".repeat(70), ""),
    ] {
        assert_eq!(refusal(&gateway, bytes), (431, "header.too_large".to_owned()));
    }
    assert_eq!(gateway.client().get(&format!("/{}", "a".repeat(900))).status, 200);
}

#[test]
fn a_header_that_never_ends_is_refused_as_soon_as_it_is_too_large() {
    let origin = Origin::named("origin");
    let gateway = Setup::before(&origin).start();
    let mut client = gateway.client();
    client.send("GET / HTTP/1.1\r\nHost: test\r\n");
    let endless = (0..100_000).take_while(|n| client.try_send(format!("X-{n}: endless\r\n"))).count();
    assert!(endless < 100_000, "the gateway took all of them");
    let line = gateway.log_line();
    assert_eq!(line.status(), 431);
    assert!(["header.too_large", "header.too_many"].contains(&line.reason()), "{}", line.reason());
}

#[test]
fn what_is_no_http_at_all_is_refused() {
    all_refused(
        400,
        "header.malformed",
        &[
            "hello\r\n\r\n",
            "\x16\x03\x01\x02\x00\x01\x00\x01\r\n\r\n",
            "\0\0\0\0\r\n\r\n",
            "GET\r\n\r\n",
            "GET /\r\n\r\n",
            "GET /<b> HTTP/1.1\r\nHost: test\r\n\r\n",
            "GET /?q=\"a\" HTTP/1.1\r\nHost: test\r\n\r\n",
            "SSH-2.0-OpenSSH_9.2\r\n\r\n",
            "GET / http/1.1\r\nHost: test\r\n\r\n",
            "GET / FTP/1.1\r\nHost: test\r\n\r\n",
            "GET  / HTTP/1.1\r\nHost: test\r\n\r\n",
            "GET / with spaces HTTP/1.1\r\nHost: test\r\n\r\n",
            " GET / HTTP/1.1\r\nHost: test\r\n\r\n",
            "G\tET / HTTP/1.1\r\nHost: test\r\n\r\n",
            "G(T / HTTP/1.1\r\nHost: test\r\n\r\n",
            "GET nowhere HTTP/1.1\r\nHost: test\r\n\r\n",
            "GET * HTTP/1.1\r\nHost: test\r\n\r\n",
        ],
    );
}

#[test]
fn a_field_that_two_parsers_could_read_differently_is_refused() {
    all_refused(
        400,
        "header.malformed",
        &[
            "GET / HTTP/1.1\r\nHost: test\r\nX-Space : 1\r\n\r\n",
            "GET / HTTP/1.1\r\nHost : test\r\n\r\n",
            "GET / HTTP/1.1\r\n Host: test\r\n\r\n",
            "GET / HTTP/1.1\r\nHost: test\r\nX-Folded: 1\r\n 2\r\n\r\n",
            "GET / HTTP/1.1\r\nHost: test\r\nX-Folded: 1\r\n\t2\r\n\r\n",
            "GET / HTTP/1.1\r\nHost: test\r\nX-Nul: a\0b\r\n\r\n",
            "GET / HTTP/1.1\r\nHost: test\r\nX-Cr: a\rb\r\n\r\n",
            "GET / HTTP/1.1\r\nHost: test\r\nno colon\r\n\r\n",
            "GET / HTTP/1.1\r\nHost: test\r\n: no name\r\n\r\n",
            "GET / HTTP/1.1\r\nHost: test\r\nX(Odd): 1\r\n\r\n",
            "GET /\0 HTTP/1.1\r\nHost: test\r\n\r\n",
            "GET / HTTP/1.1\r\nHost: test\r\nTransfer\0-Encoding: chunked\r\n\r\n",
        ],
    );
}

#[test]
fn a_line_that_ends_without_a_carriage_return_is_refused() {
    all_refused(
        400,
        "header.malformed",
        &[
            "GET / HTTP/1.1\nHost: test\n\n",
            "GET / HTTP/1.1\r\nHost: test\nX-Bare: 1\r\n\r\n",
            "GET / HTTP/1.1\nHost: test\r\n\r\n",
            "GET / HTTP/1.1\r\nHost: test\r\n\n",
        ],
    );
}

#[test]
fn a_version_that_is_not_spoken_is_refused() {
    let requests = ["HTTP/2.0", "HTTP/3.0", "HTTP/0.9", "HTTP/9.9"].map(|v| format!("GET / {v}\r\nHost: test\r\n\r\n"));
    all_refused(505, "header.version", &requests.each_ref().map(String::as_str));
}

#[test]
fn a_length_beside_chunks_is_refused() {
    all_refused(
        400,
        "header.framing",
        &[
            "POST / HTTP/1.1\r\nHost: test\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
            "POST / HTTP/1.1\r\nHost: test\r\nTransfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n",
            "POST / HTTP/1.1\r\nHost: test\r\nContent-Length: 0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
            "GET / HTTP/1.1\r\nHost: test\r\ncontent-length: 5\r\ntransfer-encoding:\tchunked\r\n\r\n0\r\n\r\n",
        ],
    );
}

#[test]
fn a_length_that_is_not_one_number_is_refused() {
    let lengths = [
        "+5",
        "-5",
        "0x5",
        "5 5",
        "5, 5",
        "5,6",
        "",
        "five",
        "5.0",
        "99999999999999999999",
        "5\r\nContent-Length: 6",
        "5\r\nContent-Length: 5",
    ];
    let requests = lengths.map(|n| format!("POST / HTTP/1.1\r\nHost: test\r\nContent-Length: {n}\r\n\r\nhello"));
    all_refused(400, "header.framing", &requests.each_ref().map(String::as_str));
}

#[test]
fn chunks_said_twice_or_to_http_1_0_are_refused() {
    all_refused(
        400,
        "header.framing",
        &[
            "POST / HTTP/1.1\r\nHost: test\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
            "POST / HTTP/1.1\r\nHost: test\r\nTransfer-Encoding: gzip\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
            "POST / HTTP/1.0\r\nHost: test\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        ],
    );
}

#[test]
fn a_transfer_coding_other_than_chunked_is_refused() {
    let codings =
        ["gzip, chunked", "gzip", "chunked, chunked", "chunked, identity", "xchunked", "identity", "\"chunked\"", ""];
    let requests =
        codings.map(|coding| format!("POST / HTTP/1.1\r\nHost: test\r\nTransfer-Encoding: {coding}\r\n\r\n0\r\n\r\n"));
    all_refused(501, "header.encoding", &requests.each_ref().map(String::as_str));
}

#[test]
fn a_host_that_is_missing_doubled_or_malformed_is_refused() {
    all_refused(
        400,
        "header.host",
        &[
            "GET / HTTP/1.1\r\n\r\n",
            "GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
            "GET / HTTP/1.1\r\nHost: a\r\nHost: a\r\n\r\n",
            "GET / HTTP/1.0\r\nHost: a\r\nHost: b\r\n\r\n",
            "GET / HTTP/1.1\r\nHost: a b\r\n\r\n",
            "GET / HTTP/1.1\r\nHost: a/b\r\n\r\n",
            "GET / HTTP/1.1\r\nHost: user@a\r\n\r\n",
            "GET / HTTP/1.1\r\nHost: a:80:80\r\n\r\n",
            "GET / HTTP/1.1\r\nHost: a:port\r\n\r\n",
            "GET / HTTP/1.1\r\nHost: a:99999\r\n\r\n",
            "GET / HTTP/1.1\r\nHost: [::1\r\n\r\n",
            "GET / HTTP/1.1\r\nHost: a, b\r\n\r\n",
            "GET / HTTP/1.1\r\nHost: a?b\r\n\r\n",
        ],
    );
}

#[test]
fn a_host_may_be_a_name_an_address_and_have_a_port() {
    let origin = Origin::answering(|request| ok(request.value("host").unwrap_or_default()));
    let gateway = Setup::before(&origin).start();
    let mut client = gateway.client();
    for host in ["a", "a.example", "a.example:8080", "127.0.0.1", "[::1]:80", "under_score.example", "A.Example", "a."]
    {
        client.send(format!("GET / HTTP/1.1\r\nHost: {host}\r\n\r\n"));
        assert_eq!(client.response().text(), host);
    }
}

#[test]
fn an_http_1_0_request_may_lack_a_host() {
    let (_origin, gateway) = strict();
    let mut client = gateway.client();
    client.send("GET /old HTTP/1.0\r\n\r\n");
    assert_eq!(client.response().text(), "/old");
}

#[test]
fn an_absolute_target_decides_the_host_and_reaches_the_origin_as_a_path() {
    let (origin, gateway) = strict();
    let mut client = gateway.client();
    client.send("GET http://a.example/path?q HTTP/1.1\r\nHost: a.example\r\n\r\n");
    assert_eq!(client.response().text(), "/path?q");

    // RFC 9112 §3.2.2 lets a proxy ignore a conflicting Host. Refusing it is safer; forwarding it would be wrong.
    let mut client = gateway.client();
    client.send("GET http://a.example/other HTTP/1.1\r\nHost: b.example\r\n\r\n");
    let status = client.response().status;
    assert!(status == 200 || status == 400, "{status}");
    for request in origin.requests() {
        assert_eq!(request.value("host"), Some("a.example"));
    }
}

#[test]
fn an_absolute_target_with_a_user_or_another_scheme_is_refused() {
    let (origin, gateway) = strict();
    for target in ["http://user:secret@test/", "ftp://test/", "http:///path", "http://"] {
        let (status, _) = refusal(&gateway, format!("GET {target} HTTP/1.1\r\nHost: test\r\n\r\n"));
        assert_eq!(status, 400, "{target}");
    }
    assert_eq!(origin.connections(), 0);
}

#[test]
fn connect_and_trace_are_refused() {
    all_refused(
        405,
        "header.method",
        &["CONNECT test:443 HTTP/1.1\r\nHost: test:443\r\n\r\n", "TRACE / HTTP/1.1\r\nHost: test\r\n\r\n"],
    );
}

#[test]
fn methods_that_nobody_knows_pass() {
    let origin = Origin::answering(|request| ok(request.method()));
    let gateway = Setup::before(&origin).start();
    for method in ["PATCH", "OPTIONS", "PROPFIND", "M-SEARCH", "BREW"] {
        assert_eq!(gateway.client().ask(method, "/", "", "").text(), method);
    }
}

#[test]
fn empty_lines_before_a_request_are_passed_over() {
    let (_origin, gateway) = strict();
    let mut client = gateway.client();
    client.send("\r\n\r\nGET /after HTTP/1.1\r\nHost: test\r\n\r\n");
    assert_eq!(client.response().text(), "/after");
}

#[test]
fn a_body_whose_chunks_are_malformed_is_refused_and_never_whole_at_the_origin() {
    let (origin, gateway) = strict();
    let long = format!("5;{}\r\nhello\r\n0\r\n\r\n", "x".repeat(200_000));
    let trailers = format!("0\r\n{}\r\n", "X-Trailer: 1\r\n".repeat(20_000));
    let bodies = [
        "g\r\nhello\r\n0\r\n\r\n",
        "\r\nhello\r\n0\r\n\r\n",
        "5x\r\nhello\r\n0\r\n\r\n",
        "0x5\r\nhello\r\n0\r\n\r\n",
        "-5\r\nhello\r\n0\r\n\r\n",
        "5 \nhello\r\n0\r\n\r\n",
        "5\nhello\r\n0\r\n\r\n",
        "5\r\nhello0\r\n\r\n",
        "5\r\nhello\n0\r\n\r\n",
        "5\r\nhello!\r\n0\r\n\r\n",
        "fffffffffffffffff\r\nhello\r\n0\r\n\r\n",
        "5\r\nhello\r\n0\r\nno colon\r\n\r\n",
        &long,
        &trailers,
    ];
    for body in bodies {
        let shown = &body[..body.len().min(40)];
        let bytes = format!("POST / HTTP/1.1\r\nHost: test\r\nTransfer-Encoding: chunked\r\n\r\n{body}");
        let mut client = gateway.client();
        client.try_send(bytes);
        assert_eq!(client.response().status, 400, "{shown:?}");
        client.closed();
    }
    assert_eq!(origin.connections(), 0, "the origin heard of one");
    let reasons: Vec<_> = gateway.log_lines(bodies.len()).iter().map(|line| line.reason().to_owned()).collect();
    assert!(reasons.iter().all(|reason| reason == "buffer.malformed"), "{reasons:?}");
}

#[test]
fn nothing_behind_a_refused_request_is_read_as_another() {
    let (origin, gateway) = strict();
    let smuggled = "POST / HTTP/1.1\r\nHost: test\r\nContent-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n\
                    0\r\n\r\nGET /smuggled HTTP/1.1\r\nHost: test\r\n\r\n";
    assert_eq!(refusal(&gateway, smuggled).0, 400);
    assert_eq!(origin.connections(), 0);
}

#[test]
fn a_refusal_is_json_for_a_client_that_asks_for_it() {
    let (_origin, gateway) = strict();
    let mut client = gateway.client();
    client.send("TRACE / HTTP/1.1\r\nHost: test\r\nAccept: application/json\r\n\r\n");
    let answer = client.response();
    assert_eq!(answer.value("content-type"), Some("application/json"));
    assert!(answer.json().to_string().contains("header.method"), "{}", answer.text());
}

#[test]
fn an_http_2_header_list_larger_than_allowed_is_refused() {
    let origin = Origin::named("origin");
    let gateway = Setup::before(&origin).listener("protocols: [h2c], limits: { header_bytes: 2KiB }").start();
    let client = H2Client::connect(gateway.web());
    let large = http::Request::get("http://test/").header("x-large", "a".repeat(4_096));
    let answer = client.ask(large.body(()).expect("a request"), b"");
    assert!(answer.as_ref().is_err() || answer.as_ref().is_ok_and(|a| a.status == 431), "{answer:?}");
    assert_eq!(origin.connections(), 0);
    assert_eq!(H2Client::connect(gateway.web()).get("/").status, 200);
}

#[test]
fn an_http_2_request_with_too_many_fields_is_refused() {
    let origin = Origin::named("origin");
    let gateway = Setup::before(&origin).listener("protocols: [h2c], limits: { headers: 5 }").start();
    let mut many = http::Request::get("http://test/");
    for n in 0..10 {
        many = many.header(format!("x-{n}"), "1");
    }
    let answer = H2Client::connect(gateway.web()).ask(many.body(()).expect("a request"), b"").expect("an answer");
    assert_eq!(answer.status, 431);
    assert_eq!(gateway.log_line().reason(), "header.too_many");
    assert_eq!(origin.connections(), 0);
}

#[test]
fn an_http_2_authority_and_a_host_that_disagree_are_refused() {
    let origin = Origin::answering(|request| ok(request.value("host").unwrap_or_default()));
    let gateway = Setup::before(&origin).listener("protocols: [h2c]").start();
    let client = H2Client::connect(gateway.web());
    let asked = |host: &str| {
        let request = http::Request::get("http://a.example/").header("host", host).body(()).expect("a request");
        client.ask(request, b"").expect("an answer")
    };
    assert_eq!(asked("b.example").status, 400);
    assert_eq!(gateway.log_line().reason(), "header.host");
    assert_eq!(asked("a.example").body, b"a.example");
    assert_eq!(origin.requests().len(), 1);
}

#[test]
fn what_http_1_cannot_say_is_refused_over_http_2() {
    let origin = Origin::named("origin");
    let gateway = Setup::before(&origin).listener("protocols: [h2c]").start();
    let client = H2Client::connect(gateway.web());
    let twice = http::Request::post("http://test/").header("content-length", "2").header("content-length", "2");
    assert_eq!(client.ask(twice.body(()).expect("a request"), b"ok").expect("an answer").status, 400);
    assert_eq!(gateway.log_line().reason(), "header.framing");
    let star = http::Request::get("*").header("host", "test").body(()).expect("a request");
    assert_eq!(client.ask(star, b"").expect("an answer").status, 400);
    assert_eq!(gateway.log_lines(2)[1].reason(), "header.malformed");
    assert_eq!(origin.connections(), 0);
}

#[test]
fn connect_and_trace_are_refused_over_http_2_too() {
    let origin = Origin::named("origin");
    let gateway = Setup::before(&origin).listener("protocols: [h2c]").start();
    let client = H2Client::connect(gateway.web());
    let trace = http::Request::builder().method("TRACE").uri("http://test/").body(()).expect("a request");
    let connect = http::Request::builder().method("CONNECT").uri("test:443").body(()).expect("a request");
    assert_eq!(client.ask(trace, b"").expect("an answer").status, 405);
    let connected = client.ask(connect, b"");
    assert!(connected.as_ref().map_or(true, |answer| answer.status == 405), "{connected:?}");
    assert_eq!(origin.connections(), 0);
}

#[test]
fn a_client_that_opens_http_2_and_then_says_nothing_is_closed_at_the_deadline() {
    let origin = Origin::named("origin");
    let gateway = Setup::before(&origin).listener("protocols: [h2c], timeouts: { header: 200ms, idle: 300ms }").start();
    let mut client = gateway.client();
    client.send("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n");
    client.rest();
}

#[test]
fn a_client_that_goes_away_in_the_middle_of_its_header_leaves_a_line_and_nothing_else() {
    let (origin, gateway) = strict();
    let mut client = gateway.client();
    client.send("GET / HTTP/1.1\r\nHost:");
    gateway.wait_metric("forebay_client_connections{listener=\"web\"}", |count| count == 1.0);
    client.reset();
    gateway.wait_metric("forebay_client_connections{listener=\"web\"}", |count| count == 0.0);
    gateway.wait_metric("forebay_phase_active", |count| count == 0.0);
    assert_eq!(origin.connections(), 0);
    let line = gateway.log_line();
    assert_eq!((line.status(), line.reason()), (499, "header.aborted"));
}
