//! Bodies that are decoded and changed on their way: `decompress` and `body`, alone, together, and with `compress`.

use std::io::{Read, Write};

use flate2::Compression;
use flate2::read::MultiGzDecoder;
use flate2::write::{DeflateEncoder, GzEncoder, ZlibEncoder};

use crate::harness::client::chunked;
use crate::harness::gateway::Watched;
use crate::harness::origin::response;
use crate::harness::wire::{Request, Response};
use crate::harness::{Ask, End, Gateway, Origin, Protocol, Setup, eventually};

fn gzip(plain: impl AsRef<[u8]>) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::new(6));
    encoder.write_all(plain.as_ref()).expect("gzip");
    encoder.finish().expect("gzip")
}

fn coded(coding: &str, plain: &[u8]) -> Vec<u8> {
    let level = Compression::new(6);
    match coding {
        "gzip" => gzip(plain),
        "deflate" => {
            let mut encoder = ZlibEncoder::new(Vec::new(), level);
            encoder.write_all(plain).and_then(|()| encoder.finish()).expect("zlib")
        }
        "bare" => {
            let mut encoder = DeflateEncoder::new(Vec::new(), level);
            encoder.write_all(plain).and_then(|()| encoder.finish()).expect("deflate")
        }
        "br" => {
            let mut encoder = brotli::CompressorWriter::new(Vec::new(), 4096, 5, 22);
            encoder.write_all(plain).expect("brotli");
            encoder.into_inner()
        }
        "zstd" => zstd::encode_all(plain, 3).expect("zstd"),
        coding => panic!("{coding}"),
    }
}

fn text(bytes: usize) -> String {
    (0_u64..)
        .map(|n| format!("{} ", n * n % 9_973))
        .scan(0, |size, word| {
            *size += word.len();
            (*size <= bytes).then_some(word)
        })
        .collect()
}

/// An origin whose responses all have these fields and this body.
fn telling(fields: &str, body: impl AsRef<[u8]>) -> Origin {
    let whole = response("200 OK", fields, body);
    Origin::answering(move |_| whole.clone())
}

/// The last request that an origin received.
fn last(origin: &Origin) -> Request {
    origin.requests().pop().expect("a request")
}

/// Waits until this gateway has counted a refusal with this reason.
fn refused(gateway: &Gateway, reason: &str) {
    gateway.wait_metric(&format!("forebay_refusals_total{{reason=\"{reason}\"}}"), |count| count == 1.0);
}

fn get(gateway: &Gateway, fields: &str) -> Response {
    gateway.client().ask("GET", "/", fields, "")
}

#[test]
fn answers_of_every_coding_reach_the_client_as_they_are() {
    for size in [500, 400_000] {
        let body = text(size);
        for (coding, name) in
            [("gzip", "gzip"), ("deflate", "deflate"), ("bare", "deflate"), ("br", "BR"), ("zstd", "zstd")]
        {
            let fields = format!("Content-Encoding: {name}\r\nETag: \"a\"\r\nVary: Accept-Encoding\r\n");
            let origin = telling(&fields, coded(coding, body.as_bytes()));
            let setup = Setup::before(&origin).listener("protocols: [http1, h2c]");
            let gateway = setup.filters("decompress: { max_ratio: 1000 }").start();
            let answer = get(&gateway, "Accept-Encoding: compress, gzip, br, zstd, deflate\r\n");
            assert!(answer.body == body.as_bytes() && answer.end == End::Complete, "{coding}");
            let fields = ["content-encoding", "etag", "vary", "content-length"].map(|name| answer.value(name));
            assert_eq!(fields, [None, Some("W/\"a\""), None, None], "{coding}");
            assert_eq!(last(&origin).value("accept-encoding"), Some("gzip, br, zstd, deflate"));
            let over_http2 = Ask::get("/").over(Protocol::Http2, gateway.web());
            assert_eq!(over_http2.length, body.len() as u64, "{coding}");
            let head = gateway.client().ask("HEAD", "/", "", "");
            assert_eq!((head.value("content-encoding"), head.body.len()), (None, 0));
        }
    }
}

#[test]
fn requests_of_every_coding_reach_the_endpoint_as_they_are() {
    let origin = Origin::named("app");
    let gateway = Setup::before(&origin).filters("decompress: {}").start();
    let body = text(100_000);
    for coding in ["gzip", "deflate", "br", "zstd"] {
        let fields = format!("Content-Encoding: {coding}\r\nContent-Digest: sha-256=:x:\r\n");
        let answer = gateway.client().ask("POST", "/", &fields, coded(coding, body.as_bytes()));
        assert_eq!(answer.status, 200, "{coding}");
        let came = last(&origin);
        assert!(came.body == body.as_bytes(), "{coding}");
        assert_eq!((came.value("content-encoding"), came.value("content-digest")), (None, None));
        let pieces = chunked(&coded(coding, body.as_bytes()), 700);
        let mut client = gateway.client();
        client.send(format!(
            "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nContent-Encoding: {coding}\r\n\r\n"
        ));
        client.send(pieces);
        assert_eq!(client.response().status, 200);
        assert!(last(&origin).body == body.as_bytes(), "{coding} in chunks");
    }
    let plain = gateway.client().ask("POST", "/", "", "plain");
    assert_eq!(plain.status, 200);
    assert_eq!(last(&origin).value("content-length"), Some("5"), "what is not coded keeps its length");
}

#[test]
fn a_bomb_is_refused_with_its_reason_in_both_directions() {
    let zeros = vec![0; 12 << 20];
    for coding in ["gzip", "deflate", "br", "zstd"] {
        let bomb = coded(coding, &zeros);
        let fields = format!("Content-Encoding: {coding}\r\n");
        for (keys, of_request, of_answer) in [
            ("max_size: 1MiB, max_ratio: 100000", "send.decoded_size", "receive.decoded_size"),
            ("max_size: 1GiB, max_ratio: 50", "send.decoded_ratio", "receive.decoded_ratio"),
        ] {
            let origin = telling(&fields, &bomb);
            let gateway = Setup::before(&origin).filters(&format!("decompress: {{ {keys} }}")).start();
            assert_eq!(gateway.client().ask("POST", "/", &fields, &bomb).status, 413, "{coding}");
            refused(&gateway, of_request);
            let answer = get(&gateway, "");
            // The header may have been sent before the bomb was received.
            assert!(answer.status == 502 || answer.end != End::Complete, "{coding}: {}", answer.status);
            assert!(answer.body.len() <= 1 << 21, "{}", answer.body.len());
            refused(&gateway, of_answer);
            gateway.wait_at_rest();
        }
    }
}

#[test]
fn what_is_not_coded_as_it_says_is_refused() {
    let origin = telling("Content-Encoding: gzip\r\n", "no gzip at all");
    let gateway = Setup::before(&origin).filters("decompress: {}").start();
    let post =
        |coding: &str, body: &[u8]| gateway.client().ask("POST", "/", &format!("Content-Encoding: {coding}\r\n"), body);
    assert_eq!(post("gzip", b"no gzip at all").status, 400);
    refused(&gateway, "send.decoded_malformed");
    let unknown = post("compress", b"x");
    assert_eq!((unknown.status, unknown.value("accept-encoding")), (415, Some("gzip, deflate, br, zstd")));
    refused(&gateway, "route.coding");
    let answer = get(&gateway, "");
    assert!(answer.status == 502 || answer.end != End::Complete, "{}", answer.status);
    refused(&gateway, "receive.decoded_malformed");

    let odd = telling("Content-Encoding: compress\r\n", "x");
    let gateway = Setup::before(&odd).filters("decompress: {}").start();
    assert_eq!(get(&gateway, "").status, 502);
    refused(&gateway, "receive.coding");
    let gateway = Setup::before(&odd).filters("decompress: { unknown: pass }").start();
    let answer = get(&gateway, "");
    assert_eq!(
        (answer.text(), answer.value("content-encoding"), answer.value("content-length")),
        ("x", Some("compress"), Some("1"))
    );
}

const HOSTS: &str =
    "body: { response: { replace: [ { text: 'http://app.internal', with: 'https://www.example.com' } ] } }";

#[test]
fn an_answer_is_changed_whatever_its_framing_and_its_coding() {
    for size in [10, 600_000] {
        let (plain, changed) =
            ["http://app.internal", "https://www.example.com"].map(|host| format!("{}{host}/", text(size))).into();
        let chunks =
            "HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nTransfer-Encoding: chunked\r\nTrailer: X-Sum\r\n\r\n";
        let mut in_chunks = chunked(plain.as_bytes(), 5_000);
        in_chunks.truncate(in_chunks.len() - 2);
        in_chunks.extend(b"X-Sum: 7\r\nContent-Digest: x\r\n\r\n");
        let in_chunks = [chunks.as_bytes(), &in_chunks].concat();
        let of_length = response("200 OK", "Content-Type: text/html\r\nETag: \"a\"\r\n", &plain);
        let coded = response("200 OK", "Content-Type: text/html\r\nContent-Encoding: gzip\r\n", gzip(&plain));
        let origin = Origin::answering(move |request| match request.target() {
            "/chunks" => in_chunks.clone(),
            "/gzip" => coded.clone(),
            _ => of_length.clone(),
        });
        let setup = Setup::before(&origin).listener("protocols: [http1, h2c]");
        let gateway = setup.filters(&format!("compress: {{ codings: [gzip] }}, {HOSTS}, decompress: {{}}")).start();
        for path in ["/", "/chunks", "/gzip"] {
            let mut client = gateway.client();
            let answer = client.ask("GET", path, "TE: trailers\r\n", "");
            assert!(answer.text() == changed && answer.end == End::Complete, "{path}: {}", answer.body.len());
            assert_eq!((answer.value("etag"), answer.value("content-encoding")), (None, None), "{path}");
            // The same connection continues.
            let smaller = client.ask("GET", path, "Accept-Encoding: gzip\r\n", "");
            assert_eq!(smaller.value("content-encoding"), Some("gzip"), "{path}");
            let mut undone = String::new();
            MultiGzDecoder::new(&smaller.body[..]).read_to_string(&mut undone).expect("gzip");
            assert!(undone == changed, "{path}");
            assert_eq!(last(&origin).value("accept-encoding"), None, "{path}");
            let over_http2 = Ask::get(path).over(Protocol::Http2, gateway.web());
            assert_eq!(over_http2.length, changed.len() as u64, "{path}");
        }
    }
}

#[test]
fn trailers_pass_behind_a_changed_body() {
    let origin = Origin::playing(|mut connection| {
        while connection.next_request().is_some() {
            connection.send(
                "HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nTransfer-Encoding: chunked\r\nTrailer: X-Sum\r\n\r\n\
                 13\r\nhttp://app.internal\r\n0\r\nX-Sum: 7\r\nContent-Digest: x\r\n\r\n",
            );
        }
    });
    let gateway = Setup::before(&origin).filters(HOSTS).start();
    let mut client = gateway.client();
    client.send("GET / HTTP/1.1\r\nHost: a\r\nTE: trailers\r\nConnection: TE\r\n\r\n");
    let mut came = Vec::new();
    while !came.ends_with(b"0\r\nx-sum: 7\r\n\r\n") && !came.ends_with(b"0\r\nX-Sum: 7\r\n\r\n") {
        came.extend(client.bytes(1));
    }
    let came = String::from_utf8_lossy(&came).into_owned();
    assert!(came.contains("17\r\nhttps://www.example.com\r\n0\r\n"), "{came}");
}

#[test]
fn a_request_is_changed_and_sent_again_as_a_whole() {
    // The first endpoint takes the whole request, and closes.
    let (dead, origin) = (Origin::playing(|mut connection| drop(connection.next_request())), Origin::named("app"));
    let setup = Setup::weighted(&[(&dead, 1000), (&origin, 1)]).route("retry: { attempts: 3, non_idempotent: true }");
    let changes = "json: [ { at: /user, set: { cel: 'request.headers[\"x-user\"]' } }, { at: /debug, remove: true } ]";
    let gateway = setup.filters(&format!("body: {{ request: {{ {changes} }} }}")).start();
    let fields = "Content-Type: application/json\r\nX-User: ada\r\n";
    let sent = format!(r#"{{"debug":true,"n":1.50,"text":"{}"}}"#, text(60_000));
    let answer = gateway.client().ask("POST", "/", fields, &sent);
    assert_eq!(answer.status, 200);
    let came = last(&origin);
    let changed = sent.replace(r#""debug":true,"#, "").replace("\"}", r#"","user":"ada"}"#);
    assert!(came.body == changed.as_bytes(), "{}", String::from_utf8_lossy(&came.body[..100]));
    assert!(dead.connections() > 0 || origin.requests().len() == 1);

    for (fields, body, status, reason) in [
        (fields, "{", 400, "send.body_json"),
        ("Content-Type: application/json\r\nContent-Encoding: gzip\r\n", "x", 415, "route.body_coded"),
        (fields, &*format!("\"{}\"", "x".repeat(2 << 20)), 413, "send.body_size"),
    ] {
        let answer = gateway.client().ask("POST", "/", fields, body);
        assert_eq!(answer.status, status, "{reason}");
        refused(&gateway, reason);
    }
    let other = gateway.client().ask("POST", "/", "Content-Type: image/png\r\n", "png");
    assert_eq!(other.status, 200);
    assert_eq!(last(&origin).value("content-length"), Some("3"), "it keeps its length");
}

#[test]
fn an_answer_that_cannot_be_changed_is_refused_and_never_half_seen() {
    let large = format!(
        "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nConnection: close\r\n\r\n[{}1]",
        "1,".repeat(700_000)
    );
    let origin = Origin::answering_once(move |request| match request.target() {
        "/large" => large.clone().into_bytes(),
        "/coded" => {
            response("200 OK", "Content-Type: application/json\r\nContent-Encoding: gzip\r\nConnection: close\r\n", "x")
        }
        _ => response("200 OK", "Content-Type: application/json\r\nConnection: close\r\n", "{ \"secret\": "),
    });
    let gateway =
        Setup::before(&origin).filters("body: { response: { json: [ { at: /secret, remove: true } ] } }").start();
    for (path, reason) in
        [("/broken", "receive.body_json"), ("/large", "receive.body_size"), ("/coded", "receive.body_coded")]
    {
        let answer = gateway.client().get(path);
        assert_eq!((answer.status, answer.end), (502, End::Complete), "{path}");
        assert!(!answer.text().contains("secret"), "{}", answer.text());
        refused(&gateway, reason);
    }
}

#[test]
fn parts_and_answers_without_a_body_are_left_alone() {
    let text = "Content-Type: text/plain\r\nETag: \"a\"\r\n";
    let origin = Origin::answering(move |request| match request.target() {
        "/part" => {
            response("206 Partial Content", &format!("{text}Content-Range: bytes 0-18/99\r\n"), "http://app.internal")
        }
        "/none" => format!("HTTP/1.1 204 No Content\r\n{text}\r\n").into_bytes(),
        "/same" => format!("HTTP/1.1 304 Not Modified\r\n{text}\r\n").into_bytes(),
        _ => format!("HTTP/1.1 200 OK\r\n{text}Content-Length: 19\r\n\r\n").into_bytes(),
    });
    let gateway = Setup::before(&origin).filters(&format!("{HOSTS}, decompress: {{}}")).start();
    let mut client = gateway.client();
    for (path, status, body) in [("/part", 206, "http://app.internal"), ("/none", 204, ""), ("/same", 304, "")] {
        let answer = client.get(path);
        assert_eq!((answer.status, answer.text(), answer.value("etag")), (status, body, Some("\"a\"")), "{path}");
    }
    let head = client.ask("HEAD", "/", "", "");
    assert_eq!((head.status, head.value("content-length"), head.value("etag")), (200, None, None), "as of a GET");
    assert_eq!(client.get("/part").status, 206, "the connection goes on");
}

#[test]
fn a_copy_for_a_mirror_is_what_filters_have_made_of_the_body() {
    let (origin, mirror) = (Origin::named("app"), Origin::named("mirror"));
    let setup = Setup::before(&origin).also("mirror", &mirror).route("mirror: { upstream: mirror }");
    let gateway = setup.filters("decompress: {}, body: { request: { replace: [ { text: a, with: bb } ] } }").start();
    let fields = "Content-Type: text/plain\r\nContent-Encoding: gzip\r\n";
    assert_eq!(gateway.client().ask("POST", "/", fields, gzip("a cat")).status, 200);
    for origin in [&origin, &mirror] {
        // The mirrored copy is sent after the original.
        let came = eventually("the request", || origin.requests().pop());
        assert_eq!((&came.body[..], came.value("content-encoding")), (&b"bb cbbt"[..], None));
    }
}

#[test]
fn answers_of_our_own_are_changed_as_well() {
    let origin = Origin::named("app");
    let gateway =
        Setup::before(&origin).filters(&format!("{HOSTS}, respond: {{ body: 'see http://app.internal' }}")).start();
    let answer = gateway.client().get("/");
    assert_eq!((answer.text(), answer.value("content-length")), ("see https://www.example.com", Some("27")));
    let plain = Setup::before(&origin).filters(HOSTS).start();
    assert_eq!(plain.client().get("/").text(), "app");
}

/// An origin that sends half of its response to `/slow` and waits, and complete responses otherwise.
fn halting(fields: &'static str, body: Vec<u8>) -> Origin {
    let whole = response("200 OK", fields, body);
    Origin::playing(move |mut connection| {
        while let Some(request) = connection.next_request() {
            let sent = if request.target() == "/slow" { whole.len() - 5 } else { whole.len() };
            connection.send(&whole[..sent]);
        }
    })
}

#[test]
fn more_bodies_than_may_be_under_way_are_refused_for_now() {
    let zipped = gzip("a text of some length, and a bit more");
    let coded = "Content-Type: text/plain\r\nContent-Encoding: gzip\r\n";
    let changes = "{ replace: [ { text: a, with: b } ] }";
    let body = format!("body: {{ concurrent: 1, request: {changes}, response: {changes} }}");
    for (filter, fields, body, [of_request, of_answer, family]) in [
        (
            "decompress: { concurrent: 1 }",
            coded,
            zipped,
            ["route.decoders", "receive.decoders", "forebay_decompress_total"],
        ),
        (
            &*body,
            "Content-Type: text/plain\r\n",
            b"a text".to_vec(),
            ["send.bodies", "receive.bodies", "forebay_body_changes_total"],
        ),
    ] {
        let origin = halting(fields, body.clone());
        let setup = Setup::before(&origin).route("buffering: { request: { mode: stream } }");
        let gateway = setup.filters(filter).start();
        // A request that arrives before the slow one gets a slot and is served.
        let refuses = |ask: &dyn Fn() -> Response| {
            let answer = eventually("a refusal", || Some(ask()).filter(|answer| answer.status == 503));
            assert_eq!(answer.value("retry-after"), Some("5"), "{filter}");
        };
        let mut slow = gateway.client();
        slow.send(format!("POST / HTTP/1.1\r\nHost: a\r\n{fields}Content-Length: {}\r\n\r\n", body.len()));
        slow.send(&body[..3]);
        refuses(&|| gateway.client().ask("POST", "/", fields, &body));
        refused(&gateway, of_request);
        slow.send(&body[3..]);
        assert_eq!(slow.response().status, 200, "the answer has the place that the request had");

        let mut slow = gateway.client();
        slow.send("GET /slow HTTP/1.1\r\nHost: a\r\n\r\n");
        refuses(&|| get(&gateway, ""));
        refused(&gateway, of_answer);
        counted(&gateway, family, &[("direction=\"request\",outcome=\"busy\"", 1.0)]);
        // The message of the first refusal is a body as well, and may have been refused itself.
        gateway.wait_metric(&format!("{family}{{direction=\"response\",outcome=\"busy\"}}"), |count| count >= 1.0);
    }
}

#[test]
fn a_body_that_takes_too_long_to_be_changed_is_refused_in_both_directions() {
    // From each `a`, the pattern searches for a `b` up to the end of the body.
    let body = "a".repeat(1 << 20);
    let origin = telling("Content-Type: text/plain\r\n", &body);
    let changes = "{ max_size: 4MiB, replace: [ { pattern: 'a[^b]*b|a', with: a } ] }";
    for (direction, status, reason) in [("request", 413, "send.body_costly"), ("response", 502, "receive.body_costly")]
    {
        let gateway = Setup::before(&origin).filters(&format!("body: {{ {direction}: {changes} }}")).start();
        let answer = gateway.client().ask("POST", "/", "Content-Type: text/plain\r\n", &body);
        assert_eq!(answer.status, status);
        refused(&gateway, reason);
        let labels = format!("direction=\"{direction}\",outcome=\"costly\"");
        counted(&gateway, "forebay_body_changes_total", &[(&labels, 1.0)]);
        gateway.wait_at_rest();
    }
}

#[test]
fn changes_of_answers_may_depend_on_the_answer() {
    let origin = Origin::answering(|request| {
        let fields = "Content-Type: text/html\r\n";
        match request.target() {
            "/fails" => response("500 Internal Server Error", fields, "at app.internal"),
            "/coded" => response(
                "500 Internal Server Error",
                &format!("{fields}Content-Encoding: gzip\r\n"),
                gzip("at app.internal"),
            ),
            _ => response("200 OK", fields, "at app.internal"),
        }
    });
    let failed = "when: response.code >= 500";
    let change = "body: { response: { replace: [ { text: app.internal, with: a backend } ] } }";
    let filters = format!(
        "compress: {{ codings: [gzip], min_size: 1B }}, {{ {change}, {failed} }}, {{ decompress: {{ request: false \
         }}, {failed} }}"
    );
    let gateway = Setup::before(&origin).filters(&filters).start();
    let mut client = gateway.client();
    for (path, expected) in [("/", "at app.internal"), ("/fails", "at a backend"), ("/coded", "at a backend")] {
        let plain = client.ask("GET", path, "", "");
        assert_eq!(plain.text(), expected, "{path}");
        // The outer filter sees the field that these filters remove from the request to the endpoint.
        let coded = client.ask("GET", path, "Accept-Encoding: gzip\r\n", "");
        assert_eq!(coded.value("content-encoding"), Some("gzip"), "{path}");
        let mut text = String::new();
        MultiGzDecoder::new(&coded.body[..]).read_to_string(&mut text).expect("gzip");
        assert_eq!(text, expected, "{path}");
    }
}

/// Waits until samples of a family have these values.
fn counted(gateway: &Gateway, family: &str, samples: &[(&str, f64)]) {
    for (labels, value) in samples {
        gateway.wait_metric(&format!("{family}{{{labels}}}"), |count| count == *value);
    }
}

#[test]
fn decoded_bodies_and_their_bytes_are_counted() {
    let body = text(50_000);
    let (plain, zipped, both) = (body.len() as f64, gzip(&body), coded("zstd", &gzip(&body)));
    let [zipped_len, both_len] = [&zipped, &both].map(|coded| coded.len() as f64);
    let of_gzip = response("200 OK", "Content-Encoding: gzip\r\n", &zipped);
    let of_both = response("200 OK", "Content-Encoding: gzip, zstd\r\n", &both);
    let origin = Origin::answering(move |request| match request.target() {
        "/gzip" => of_gzip.clone(),
        "/both" => of_both.clone(),
        "/odd" => response("200 OK", "Content-Encoding: compress\r\n", "x"),
        _ => response("200 OK", "", "plain"),
    });
    let gateway = Setup::before(&origin).filters("decompress: { max_size: 1MiB, unknown: pass }").start();
    let mut client = gateway.client();
    for path in ["/gzip", "/gzip", "/both", "/odd", "/"] {
        assert_eq!(client.get(path).status, 200, "{path}");
    }
    let post = |coding: &str, body: &[u8]| {
        gateway.client().ask("POST", "/", &format!("Content-Encoding: {coding}\r\n"), body).status
    };
    assert_eq!(post("gzip", &zipped), 200);
    assert_eq!(post("compress", b"x"), 200);
    assert_eq!(post("gzip", b"no gzip at all"), 400);
    assert_eq!(post("br", &coded("br", &vec![0; 2 << 20])), 413);
    let outcomes = [
        ("route=\"all\",direction=\"response\",outcome=\"decoded\"", 3.0),
        ("direction=\"response\",outcome=\"passed\"", 1.0),
        ("direction=\"request\",outcome=\"decoded\"", 1.0),
        ("direction=\"request\",outcome=\"passed\"", 1.0),
        ("direction=\"request\",outcome=\"malformed\"", 1.0),
        ("outcome=\"too_large\"", 0.0),
        ("direction=\"request\",outcome=\"too_dense\"", 1.0),
    ];
    counted(&gateway, "forebay_decompress_total", &outcomes);
    counted(&gateway, "forebay_decompress_total", &[("route=\"all\"", 8.0)]);
    let bytes = [
        ("direction=\"response\",coding=\"gzip\",side=\"in\"", 2.0 * zipped_len),
        ("direction=\"response\",coding=\"gzip\",side=\"out\"", 2.0 * plain),
        ("direction=\"response\",coding=\"several\",side=\"in\"", both_len),
        ("direction=\"response\",coding=\"several\",side=\"out\"", plain),
        ("direction=\"request\",coding=\"gzip\",side=\"in\"", zipped_len + 14.0),
        ("direction=\"request\",coding=\"gzip\",side=\"out\"", plain),
    ];
    counted(&gateway, "forebay_decompressed_bytes_total", &bytes);

    let gateway = Setup::before(&origin).filters("decompress: { request: false }").start();
    assert_eq!(gateway.client().get("/odd").status, 502);
    counted(&gateway, "forebay_decompress_total", &[("direction=\"response\",outcome=\"unknown_coding\"", 1.0)]);
}

#[test]
fn changed_bodies_and_the_places_in_them_are_counted() {
    let (html, json) = ("Content-Type: text/html\r\n", "Content-Type: application/json\r\n");
    let origin = Origin::answering(move |request| match request.target() {
        "/three" => response("200 OK", html, "app, app and app"),
        "/none" => response("200 OK", html, "nothing here"),
        "/coded" => response("200 OK", &format!("{html}Content-Encoding: gzip\r\n"), "x"),
        "/large" => response("200 OK", html, "app ".repeat(1_000)),
        _ => response("200 OK", "Content-Type: image/png\r\n", "app"),
    });
    let of_answers = "response: { max_size: 1KiB, replace: [ { text: app, with: api } ] }";
    let of_requests = "request: { json: [ { at: '/l/*/mail', remove: true }, { at: /by, set: edge } ] }";
    let gateway = Setup::before(&origin).filters(&format!("body: {{ {of_answers}, {of_requests} }}")).start();
    for (path, status) in [("/three", 200), ("/none", 200), ("/coded", 502), ("/large", 502), ("/", 200)] {
        assert_eq!(gateway.client().get(path).status, status, "{path}");
    }
    let post = |body: &str| gateway.client().ask("POST", "/", json, body).status;
    assert_eq!(post(r#"{"l":[{"mail":"a"},{},{"mail":"b"}]}"#), 200);
    assert_eq!((post("[]"), post("{ no json"), post("")), (200, 400, 200));
    let outcomes = [
        ("route=\"all\",direction=\"response\",outcome=\"changed\"", 1.0),
        // Including the messages of the three refusals.
        ("direction=\"response\",outcome=\"unchanged\"", 4.0),
        ("direction=\"response\",outcome=\"coded\"", 1.0),
        ("direction=\"response\",outcome=\"too_large\"", 1.0),
        ("direction=\"request\",outcome=\"changed\"", 1.0),
        ("direction=\"request\",outcome=\"unchanged\"", 2.0),
        ("direction=\"request\",outcome=\"not_json\"", 1.0),
    ];
    counted(&gateway, "forebay_body_changes_total", &outcomes);
    counted(&gateway, "forebay_body_changes_total", &[("direction=\"response\"", 7.0)]);
    let places = [("route=\"all\",direction=\"response\"", 3.0), ("route=\"all\",direction=\"request\"", 3.0)];
    counted(&gateway, "forebay_body_replacements_total", &places);
}
