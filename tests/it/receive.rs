//! Receiving responses: backends that disconnect, stall or break their framing in the middle of a response.
//!
//! The client already has the status. So its connection must end in a way that shows that the response is
//! incomplete.

use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;

use forebay::phase::Phase;

use crate::harness::client::request;
use crate::harness::gateway::Watched;
use crate::harness::origin::Connection;
use crate::harness::{Client, End, Gateway, H2Client, Origin, Setup, ok};

const HALF_A_LENGTH: &str = "HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf";
const HALF_OF_CHUNKS: &str = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n";

/// A client, the gateway and the origin's side of the exchange, after the client has read the first bytes.
fn half_way(setup: &Setup, origin: &Origin, half: &str) -> (Gateway, Client, Connection) {
    let gateway = setup.start();
    let mut client = gateway.client();
    client.send(request("GET", "/", "", ""));
    let mut connection = origin.accept();
    connection.request();
    connection.send(half);
    gateway.wait_phase(Phase::Receive);
    (gateway, client, connection)
}

/// Asserts that the client got 200, half a body and a cut, and that log and metric have the reason.
fn cut(gateway: &Gateway, mut client: Client, reason: &str) {
    let answer = client.response();
    assert_eq!((answer.status, answer.text(), answer.end), (200, "half", End::Cut));
    client.closed();
    let line = gateway.log_line();
    assert_eq!((line.status(), line.reason()), (200, reason));
    gateway.refused_once(reason);
}

#[test]
fn an_answer_that_breaks_off_before_its_length_is_cut_for_the_client() {
    let origin = Origin::scripted();
    let (gateway, client, connection) = half_way(&Setup::before(&origin), &origin, HALF_A_LENGTH);
    connection.close();
    cut(&gateway, client, "receive.reset");
}

#[test]
fn an_answer_that_breaks_off_between_chunks_is_cut_for_the_client() {
    let origin = Origin::scripted();
    let (gateway, client, connection) = half_way(&Setup::before(&origin), &origin, HALF_OF_CHUNKS);
    connection.close();
    cut(&gateway, client, "receive.reset");
}

#[test]
fn an_answer_that_ends_in_a_reset_is_cut_for_the_client() {
    for half in [HALF_A_LENGTH, HALF_OF_CHUNKS] {
        let origin = Origin::scripted();
        let (gateway, client, connection) = half_way(&Setup::before(&origin), &origin, half);
        connection.reset();
        cut(&gateway, client, "receive.reset");
    }
}

#[test]
fn an_answer_that_stalls_is_cut_for_the_client() {
    for half in [HALF_A_LENGTH, HALF_OF_CHUNKS] {
        let origin = Origin::scripted();
        let setup = Setup::before(&origin).upstream("timeouts: { receive: 200ms }");
        let (gateway, client, mut connection) = half_way(&setup, &origin, half);
        cut(&gateway, client, "receive.timeout");
        connection.closed();
    }
}

#[test]
fn an_answer_whose_chunks_are_malformed_is_cut_for_the_client() {
    for rest in ["nonsense\r\nrest\r\n0\r\n\r\n", "-4\r\nrest\r\n0\r\n\r\n", "4\r\nrest!0\r\n\r\n"] {
        let origin = Origin::scripted();
        let (gateway, mut client, mut connection) = half_way(&Setup::before(&origin), &origin, HALF_OF_CHUNKS);
        connection.send(rest);
        let answer = client.response();
        assert_eq!((answer.status, answer.end), (200, End::Cut), "{rest:?}");
        connection.closed();
        assert_eq!(gateway.log_line().reason(), "receive.malformed", "{rest:?}");
    }
}

#[test]
fn an_http_2_client_sees_the_cut_as_a_reset_stream_and_keeps_its_connection() {
    let origin = Origin::scripted();
    let gateway = Setup::before(&origin).listener("protocols: [h2c]").start();
    let client = H2Client::connect(gateway.web());
    for half in [HALF_A_LENGTH, HALF_OF_CHUNKS] {
        std::thread::scope(|scope| {
            let asked = scope.spawn(|| client.get("/"));
            let mut connection = origin.accept();
            connection.request();
            connection.send(half);
            gateway.wait_phase(Phase::Receive);
            connection.close();
            let answer = asked.join().expect("an answer");
            assert_eq!((answer.status, answer.end), (200, End::Cut));
        });
    }
    assert!(gateway.log_lines(2).iter().all(|line| line.reason() == "receive.reset"));
}

#[test]
fn an_answer_without_a_length_ends_with_the_connection() {
    let origin = Origin::scripted();
    let (gateway, mut client, mut connection) = Setup::before(&origin).asked(&origin);
    connection.send("HTTP/1.1 200 OK\r\n\r\nall there is");
    connection.close();
    let answer = client.response();
    assert_eq!((answer.text(), answer.end), ("all there is", End::Complete));
    assert_eq!(gateway.log_line().reason(), "");
}

#[test]
fn an_answer_without_a_length_that_ends_in_a_reset_is_cut_for_the_client() {
    let origin = Origin::scripted();
    let (gateway, client, connection) = half_way(&Setup::before(&origin), &origin, "HTTP/1.1 200 OK\r\n\r\nhalf");
    connection.reset();
    cut(&gateway, client, "receive.reset");
}

#[test]
fn bytes_beyond_an_answer_spoil_the_connection_and_nothing_else() {
    let origin =
        Origin::answering(|_| [ok("whole"), b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\npoison".to_vec()].concat());
    let gateway = Setup::before(&origin).start();
    let mut client = gateway.client();
    for _ in 0..3 {
        assert_eq!(client.get("/").text(), "whole");
    }
    assert_eq!(origin.connections(), 3);
}

#[test]
fn a_body_where_none_may_be_spoils_the_connection_and_nothing_else() {
    let origin = Origin::answering(|_| b"HTTP/1.1 204 No Content\r\n\r\npoison".to_vec());
    let gateway = Setup::before(&origin).start();
    let mut client = gateway.client();
    for _ in 0..3 {
        assert_eq!(client.get("/").status, 204);
    }
}

#[test]
fn a_client_that_goes_away_in_the_middle_of_its_answer_lets_the_backend_go() {
    let origin = Origin::scripted();
    let (gateway, mut client, mut connection) = half_way(&Setup::before(&origin), &origin, HALF_OF_CHUNKS);
    client.bytes(17);
    client.reset();
    connection.closed();
    let line = gateway.log_line();
    assert_eq!(line.reason(), "receive.aborted");
    gateway.refused_once("receive.aborted");
    gateway.wait_metric("forebay_phase_active", |count| count == 0.0);
}

#[test]
fn an_answer_is_passed_on_while_it_comes() {
    let origin = Origin::scripted();
    let (_gateway, mut client, mut connection) = half_way(&Setup::before(&origin), &origin, HALF_A_LENGTH);
    let mut seen = Vec::new();
    while !seen.ends_with(b"half") {
        seen.extend(client.bytes(1));
    }
    connection.send(" more ");
    assert_eq!(client.bytes(6), b" more ");
}

#[test]
fn half_an_answer_without_a_length_ends_in_a_reset_for_an_http_1_0_client() {
    let origin = Origin::scripted();
    let gateway = Setup::before(&origin).start();
    let mut client = TcpStream::connect(gateway.web()).expect("a connection");
    client.write_all(b"GET / HTTP/1.0\r\nHost: test\r\n\r\n").expect("a request");
    let mut connection = origin.accept();
    connection.header();
    connection.send("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n");
    let mut read = Vec::new();
    while !read.ends_with(b"\r\n\r\nhalf") {
        let mut piece = [0; 512];
        let count = client.read(&mut piece).expect("the half");
        read.extend_from_slice(&piece[..count]);
    }
    connection.close();
    assert_eq!(client.read(&mut [0]).map_err(|error| error.kind()), Err(ErrorKind::ConnectionReset));
}

#[test]
fn an_upgrade_that_nobody_asked_for_is_a_502() {
    let origin = Origin::scripted();
    let gateway = Setup::before(&origin).start();
    let mut client = gateway.client();
    client.send("GET / HTTP/1.1\r\nHost: test\r\n\r\nhello, raw");
    let mut connection = origin.accept();
    connection.header();
    connection.send("HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n");
    assert_eq!(client.response().status, 502);
    assert_eq!(gateway.log_line().reason(), "wait.malformed");
    connection.closed();
}
