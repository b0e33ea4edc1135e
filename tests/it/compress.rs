//! Compressed responses for clients that accept them.

use std::io::Read;

use crate::harness::gateway::Watched;
use crate::harness::origin::response;
use crate::harness::{Ask, End, Origin, Protocol, Setup};

fn plain(coding: &str, bytes: &[u8]) -> Vec<u8> {
    let mut plain = Vec::new();
    match coding {
        "gzip" => flate2::read::MultiGzDecoder::new(bytes).read_to_end(&mut plain),
        "br" => brotli::Decompressor::new(bytes, 4096).read_to_end(&mut plain),
        "zstd" => zstd::Decoder::new(bytes).expect("a decoder").read_to_end(&mut plain),
        coding => panic!("{coding}"),
    }
    .expect("a whole body");
    plain
}

/// Pseudo-random words, which compress to some degree.
fn text(bytes: usize) -> String {
    let words = ["edge", "gateway", "origin", "client", "phase", "filter", "spool"];
    let mut text = String::new();
    let mut state = 1_u32;
    while text.len() < bytes {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        text.push_str(words[(state >> 16) as usize % words.len()]);
        text.push(if state & 1 << 20 == 0 { ' ' } else { '\n' });
    }
    text
}

const HTML: &str = "Content-Type: text/html\r\n";

#[test]
fn a_large_answer_is_smaller_on_the_way_and_the_same_behind_it() {
    for size in [2_000, 3_000_000] {
        let body = text(size);
        let sent = body.clone();
        let origin = Origin::answering(move |_| response("200 OK", HTML, &sent));
        let setup = Setup::before(&origin).listener("protocols: [http1, h2c]");
        let gateway = setup.filters("compress: {}").start();
        for coding in ["gzip", "br", "zstd"] {
            let accept = format!("Accept-Encoding: {coding}\r\n");
            let answer = gateway.client().ask("GET", "/", &accept, "");
            assert_eq!((answer.value("content-encoding"), answer.end), (Some(coding), End::Complete));
            assert_eq!((answer.value("content-length"), answer.value("vary")), (None, Some("Accept-Encoding")));
            assert!(answer.body.len() < body.len() / 2, "{coding}: {} of {}", answer.body.len(), body.len());
            assert!(plain(coding, &answer.body) == body.as_bytes(), "{coding}");
        }
        let as_it_is = gateway.client().get("/");
        assert_eq!(as_it_is.value("content-length"), Some(&*body.len().to_string()), "it keeps its length");
        assert!(as_it_is.body == body.as_bytes());
        let head = gateway.client().ask("HEAD", "/", "Accept-Encoding: gzip\r\n", "");
        assert_eq!((head.value("content-encoding"), head.value("content-length")), (Some("gzip"), None));
        let over_http2 = Ask::get("/").over(Protocol::Http2, gateway.web());
        assert_eq!(over_http2.value("content-encoding"), None);
        let came = |coding| format!("forebay_compressed_bytes_total{{coding=\"{coding}\",side=\"in\"}}");
        let bytes = body.len() as f64;
        for coding in ["gzip", "br", "zstd"] {
            gateway.wait_metric(&came(coding), |came| came == bytes);
        }
    }
}

#[test]
fn an_answer_over_http_2_is_whole_though_its_client_takes_it_in_windows() {
    // Still larger than the window of a stream when compressed.
    let body = text(3_000_000);
    let origin = Origin::answering(move |_| response("200 OK", HTML, &body));
    let setup = Setup::before(&origin).listener("protocols: [http1, h2c]");
    let gateway = setup.filters("compress: { codings: [gzip] }").start();
    let answer = Ask::get("/").field("accept-encoding", "gzip").over(Protocol::Http2, gateway.web());
    assert_eq!((answer.value("content-encoding"), answer.end), (Some("gzip"), End::Complete));
    assert!(answer.length > 128 << 10, "{}", answer.length);
}

#[test]
fn what_is_no_text_keeps_its_length() {
    let origin = Origin::answering(|_| response("200 OK", "Content-Type: image/png\r\n", "x".repeat(5_000)));
    let gateway = Setup::before(&origin).filters("compress: {}").start();
    let answer = gateway.client().ask("GET", "/", "Accept-Encoding: gzip\r\n", "");
    assert_eq!((answer.value("content-length"), answer.value("content-encoding")), (Some("5000"), None));
    assert_eq!(answer.body.len(), 5_000);
}

#[test]
fn a_piece_that_comes_alone_leaves_at_once() {
    let origin = Origin::scripted();
    let setup = Setup::before(&origin).filters("compress: { codings: [gzip] }");
    let gateway = setup.route("buffering: { response: { mode: stream } }").start();
    let mut client = gateway.client();
    client.send("GET / HTTP/1.1\r\nHost: test\r\nAccept-Encoding: gzip\r\n\r\n");
    let mut connection = origin.accept();
    connection.request();
    connection.send(format!("HTTP/1.1 200 OK\r\n{HTML}Transfer-Encoding: chunked\r\n\r\n5\r\nfirst\r\n"));
    // The header, and then a chunk from which the first piece can be decoded, before the second piece is sent.
    let mut came = Vec::new();
    let mut first = [0; 5];
    while !came.windows(4).any(|four| four == b"\r\n\r\n") {
        came.extend(client.bytes(1));
    }
    let mut coded = Vec::new();
    loop {
        let mut size = Vec::new();
        while !size.ends_with(b"\r\n") {
            size.extend(client.bytes(1));
        }
        let size = usize::from_str_radix(std::str::from_utf8(&size).expect("text").trim(), 16).expect("a size");
        coded.extend(client.bytes(size));
        client.bytes(2);
        if flate2::read::GzDecoder::new(&coded[..]).read_exact(&mut first).is_ok() {
            break;
        }
    }
    assert_eq!(&first, b"first");
    connection.send("0\r\n\r\n");
}

#[test]
fn answers_of_our_own_are_compressed_as_well() {
    let origin = Origin::named("app");
    let body = "again and again, ".repeat(200);
    let setup = Setup::before(&origin).filters(&format!("compress: {{}}, respond: {{ body: '{body}' }}"));
    let gateway = setup.start();
    let mut client = gateway.client();
    let answer = client.ask("GET", "/", "Accept-Encoding: gzip\r\n", "");
    assert_eq!(answer.value("content-encoding"), Some("gzip"));
    assert_eq!(answer.value("content-length"), Some(&*answer.body.len().to_string()));
    assert_eq!(plain("gzip", &answer.body), body.as_bytes());
    assert_eq!(client.get("/").text(), body);
}

#[test]
fn a_client_that_leaves_gives_its_place_back() {
    let body = text(3_000_000);
    let origin = Origin::answering(move |_| response("200 OK", HTML, &body));
    let gateway = Setup::before(&origin).filters("compress: { concurrent: 1 }").start();
    for _ in 0..3 {
        let mut client = gateway.client();
        client.send("GET / HTTP/1.1\r\nHost: test\r\nAccept-Encoding: gzip\r\n\r\n");
        client.bytes(100);
        client.reset();
        gateway.wait_at_rest();
    }
    let answer = gateway.client().ask("GET", "/", "Accept-Encoding: gzip\r\n", "");
    assert_eq!(answer.value("content-encoding"), Some("gzip"));
}
