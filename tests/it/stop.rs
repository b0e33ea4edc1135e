//! Shutdown: active exchanges finish properly, idle connections do not delay it.

use std::net::{SocketAddr, TcpStream};
use std::os::unix::process::ExitStatusExt;
use std::process::Command;
use std::time::Instant;

use forebay::phase::Phase;

use crate::harness::client::{Client, H2Client, get, request};
use crate::harness::gateway::Watched;
use crate::harness::origin::Connection;
use crate::harness::{Origin, Process, Setup, eventually, ms};

/// A running program with one active exchange: the client and the origin's side of it.
fn in_flight(origin: &Origin, shutdown: &str) -> (Process, Client, Connection) {
    let process = Setup::before(origin).server(&format!("threads: 1, shutdown: {{ {shutdown} }}")).spawn();
    let mut client = process.client();
    client.send(request("GET", "/in-flight", "", ""));
    let mut connection = origin.accept();
    connection.request();
    process.wait_phase(Phase::Wait);
    (process, client, connection)
}

/// Whether the story runs alone in this process; if not, runs it in a new one: see [`crate::harness::Gateway`].
fn in_a_process_of_its_own(story: &str) -> bool {
    const ALONE: &str = "FOREBAY_STORY_ALONE";
    if std::env::var_os(ALONE).is_some() {
        return true;
    }
    let program = std::env::current_exe().expect("the path of this program");
    let output = Command::new(program).args(["--exact", story]).env(ALONE, "1").output().expect("this program again");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
    false
}

pub fn refuses(address: SocketAddr) {
    eventually("the listener to close", || TcpStream::connect(address).is_err().then_some(()));
}

#[test]
fn on_term_what_is_in_flight_ends_well_and_then_the_process_ends_at_once() {
    let origin = Origin::scripted();
    let (mut process, mut client, mut connection) = in_flight(&origin, "pause: 0s, deadline: 10m");
    process.signal(libc::SIGTERM);
    refuses(process.web());
    assert!(process.runs(), "an exchange is in flight");
    assert_eq!(get(process.admin(), "/readyz").status, 503);
    assert_eq!(get(process.admin(), "/healthz").status, 200, "the admin endpoint answers to the end");

    connection.answer("to the last byte");
    let answer = client.response();
    assert_eq!((answer.status, answer.text()), (200, "to the last byte"));
    assert_eq!(answer.value("connection"), Some("close"), "the client is told that its connection ends");
    client.closed();
    assert_eq!(process.ended().code(), Some(0));
    assert_eq!(process.log_line().text("target"), "/in-flight", "its log line is not lost");
}

#[test]
fn on_term_readiness_goes_first_and_whoever_comes_in_the_pause_is_served() {
    let origin = Origin::scripted();
    let (process, _client, _connection) = in_flight(&origin, "pause: 10m, deadline: 10m");
    process.signal(libc::SIGTERM);
    eventually("readiness to go", || (get(process.admin(), "/readyz").status == 503).then_some(()));
    let mut late = process.client();
    late.send(request("GET", "/late", "", ""));
    let mut late_connection = origin.accept();
    late_connection.request();
    late_connection.answer("still served");
    assert_eq!(late.response().text(), "still served");
}

#[test]
fn once_it_is_not_ready_every_answer_says_that_its_connection_ends() {
    let origin = Origin::named("origin");
    let setup = Setup::before(&origin).listener("protocols: [http1, h2c]");
    let mut process = setup.server("threads: 1, shutdown: { pause: 10m, deadline: 10m }").spawn();
    let (mut kept, mut other) = (process.client(), process.client());
    for client in [&mut kept, &mut other] {
        assert_ne!(client.get("/").value("connection"), Some("close"));
    }
    let h2 = H2Client::connect(process.web());
    assert_eq!(h2.get("/").status, 200);
    process.signal(libc::SIGTERM);
    eventually("readiness to go", || (get(process.admin(), "/readyz").status == 503).then_some(()));

    h2.closed();
    let answer = kept.get("/");
    assert_eq!((answer.status, answer.value("connection")), (200, Some("close")));
    kept.closed();
    // Refusals also close the connection, whatever the client asks for.
    for (fields, status) in [("Connection: keep-alive\r\n", 200), ("Connection: keep-alive, host\r\n", 400)] {
        let answer = process.client().ask("GET", "/", fields, "");
        assert_eq!((answer.status, answer.value("connection")), (status, Some("close")));
    }
    // A client that connects only now is served once, and then told to leave.
    let late = H2Client::connect(process.web());
    assert_eq!(late.get("/").status, 200);
    late.closed();
    // An idle connection stays open while a request may be on its way.
    let answer = other.get("/");
    assert_eq!((answer.status, answer.value("connection")), (200, Some("close")));
    assert!(process.runs());
}

#[test]
fn at_the_end_of_the_pause_idle_connections_are_closed_first() {
    let origin = Origin::scripted();
    let (mut process, mut client, mut connection) = in_flight(&origin, "pause: 300ms, deadline: 10m");
    let mut idle = process.client();
    process.wait_metric("forebay_client_connections{state=\"idle\"}", |idle| idle == 1.0);
    process.signal(libc::SIGTERM);
    idle.closed();
    assert!(process.runs(), "an exchange is in flight");
    connection.answer("done");
    assert_eq!(client.response().text(), "done");
    assert_eq!(process.ended().code(), Some(0));
}

#[test]
fn on_term_half_a_header_is_refused_at_once() {
    let origin = Origin::named("origin");
    let listener = "protocols: [http1, h2c], timeouts: { header: 10m }";
    let mut process = Setup::before(&origin).listener(listener).server("shutdown: { deadline: 10m }").spawn();
    let mut halves = ["GET / HTTP/1.1\r\nHost: te", "PRI * HTTP/2.0\r\n"].map(|half| {
        let mut client = process.client();
        client.send(half);
        client
    });
    process.wait_metric("forebay_client_connections{state=\"header\"}", |count| count == 2.0);
    let begun = Instant::now();
    process.signal(libc::SIGTERM);
    let answer = halves[0].response();
    assert_eq!((answer.status, answer.value("connection")), (503, Some("close")));
    assert!(answer.text().contains("finish.shutdown"), "{}", answer.text());
    // Both clients are still connected.
    assert_eq!(process.ended().code(), Some(0));
    assert!(begun.elapsed() < ms(20_000), "{:?}", begun.elapsed());
    for line in process.log_lines(2) {
        assert_eq!((line.status(), line.reason()), (503, "finish.shutdown"));
    }
    drop(halves);
}

#[test]
fn on_term_the_listeners_close_after_the_pause() {
    let origin = Origin::scripted();
    let (mut process, mut client, mut connection) = in_flight(&origin, "pause: 500ms, deadline: 10m");
    let started = Instant::now();
    process.signal(libc::SIGTERM);
    refuses(process.web());
    assert!(started.elapsed() >= ms(500), "{:?}", started.elapsed());
    connection.answer("done");
    assert_eq!(client.response().text(), "done");
    assert_eq!(process.ended().code(), Some(0));
}

#[test]
fn on_term_what_is_not_done_by_the_deadline_is_cut() {
    let origin = Origin::scripted();
    let (mut process, mut client, mut connection) = in_flight(&origin, "deadline: 300ms");
    connection.send("HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf");
    process.wait_phase(Phase::Receive);
    let started = Instant::now();
    process.signal(libc::SIGTERM);
    let status = process.ended();
    assert_eq!(status.code(), Some(0));
    assert!(started.elapsed() >= ms(300), "{:?}", started.elapsed());
    assert_eq!(client.response().end, crate::harness::End::Cut);
    let line = process.log_line();
    assert_eq!((line.status(), line.reason(), line.text("target")), (200, "finish.shutdown", "/in-flight"));
}

#[test]
fn on_term_idle_connections_hold_up_nothing() {
    let origin = Origin::named("origin");
    let setup = Setup::before(&origin).listener("protocols: [http1, h2c]").server("shutdown: { deadline: 10m }");
    let mut process = setup.spawn();
    let (mut kept, mut silent) = (process.client(), process.client());
    assert_eq!(kept.get("/").status, 200);
    let h2 = H2Client::connect(process.web());
    assert_eq!(h2.get("/").status, 200);
    process.signal(libc::SIGTERM);
    kept.closed();
    silent.closed();
    assert_eq!(process.ended().code(), Some(0));
}

#[test]
fn on_int_the_process_ends_at_once() {
    let origin = Origin::scripted();
    let (mut process, mut client, _connection) = in_flight(&origin, "pause: 10m, deadline: 10m");
    process.signal(libc::SIGINT);
    process.ended();
    assert!(client.try_response_to("GET").is_none_or(|answer| answer.status >= 500));
}

#[test]
fn a_second_term_changes_nothing_and_int_during_a_drain_ends_it() {
    let origin = Origin::scripted();
    let (mut process, _client, _connection) = in_flight(&origin, "deadline: 10m");
    process.signal(libc::SIGTERM);
    refuses(process.web());
    process.signal(libc::SIGTERM);
    assert_eq!(get(process.admin(), "/healthz").status, 200);
    assert!(process.runs());
    process.signal(libc::SIGINT);
    process.ended();
}

#[test]
fn on_hup_it_says_that_reload_is_not_there_yet_and_goes_on() {
    let origin = Origin::scripted();
    let (mut process, mut client, mut connection) = in_flight(&origin, "deadline: 1s");
    process.signal(libc::SIGHUP);
    process.says("reload");
    assert!(process.runs());
    connection.answer("none the worse");
    assert_eq!(client.response().text(), "none the worse");
    assert_eq!(get(process.admin(), "/readyz").status, 200);
}

#[test]
fn on_usr1_it_goes_on() {
    let origin = Origin::named("origin");
    let mut process = Setup::before(&origin).spawn();
    process.signal(libc::SIGUSR1);
    assert_eq!(process.client().get("/").status, 200);
    assert!(process.runs());
}

#[test]
fn a_gateway_in_a_program_of_ones_own_stops_when_told_and_returns() {
    let name = "stop::a_gateway_in_a_program_of_ones_own_stops_when_told_and_returns";
    if !in_a_process_of_its_own(name) {
        return;
    }
    let origin = Origin::scripted();
    let mut gateway = Setup::before(&origin).start();
    let mut client = gateway.client();
    client.send(request("GET", "/", "", ""));
    let mut connection = origin.accept();
    connection.request();
    gateway.stop();
    refuses(gateway.web());
    connection.answer("done");
    assert_eq!(client.response().text(), "done");
    gateway.stopped();
}

#[test]
fn a_unix_socket_is_gone_when_the_process_is() {
    let origin = Origin::named("origin");
    let setup = Setup::before(&origin);
    let path = setup.path("web.sock");
    let mut process = setup.also_listener(&format!("{{ name: local, address: \"unix:{}\" }}", path.display())).spawn();
    assert_eq!(Client::unix(&path).get("/").status, 200);
    process.signal(libc::SIGTERM);
    let status = process.ended();
    assert_eq!((status.code(), status.signal()), (Some(0), None));
    assert!(!path.exists(), "the socket is still there");
}

#[test]
fn an_upgraded_connection_is_in_flight_until_the_deadline() {
    let origin = Origin::scripted();
    let mut process = Setup::before(&origin).server("shutdown: { deadline: 500ms }").spawn();
    let mut client = process.client();
    let upgrade = "Connection: Upgrade\r\nUpgrade: websocket\r\n";
    client.send(format!("GET / HTTP/1.1\r\nHost: test\r\n{upgrade}\r\n"));
    let mut connection = origin.accept();
    assert_eq!(connection.header().value("upgrade"), Some("websocket"));
    connection.send(format!("HTTP/1.1 101 Switching Protocols\r\n{upgrade}\r\n"));
    assert_eq!(client.response().status, 101);
    process.signal(libc::SIGTERM);
    refuses(process.web());
    connection.send("still here");
    assert_eq!(client.bytes(10), b"still here");
    client.send("so am I");
    assert_eq!(connection.bytes(7), b"so am I");
    assert_eq!(process.ended().code(), Some(0));
    client.rest();
    let line = process.log_line();
    assert_eq!((line.status(), line.reason(), line.text("method")), (101, "finish.shutdown", "GET"));
    assert_eq!((line.number("received"), line.number("sent")), (7.0, 10.0));
}
