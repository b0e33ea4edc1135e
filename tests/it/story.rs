//! The seed story: one worker, and no client waits for a slow one.
//!
//! Client 1 reads slowly, client 2 sends half a body and the rest later, backend A responds late. A third client
//! comes last and is finished first.

use forebay::phase::Phase;

use crate::harness::client::request;
use crate::harness::gateway::Watched;
use crate::harness::nginx::noise;
use crate::harness::{Client, End, Origin, Setup, ms, ok};

#[test]
fn one_worker_never_waits_for_a_slow_one() {
    let large = noise(8_000_000);
    let answer = ok(&large);
    let backend_a = Origin::scripted();
    let backend_b =
        Origin::answering(move |request| if request.target() == "/large" { answer.clone() } else { ok(&request.body) });
    let gateway = Setup::before(&backend_b)
        .also("a", &backend_a)
        .routes("{ name: late, match: { path: { exact: /late } }, upstream: a }\n{ name: all, upstream: app }")
        .start();

    // H1_READ: client 1 requests more than it reads. The gateway has an unfinished write; the backend is released
    // as soon as it has responded.
    let mut client_1 = Client::slow(gateway.web());
    client_1.send(request("GET", "/large", "", ""));
    gateway.wait_phase(Phase::Write);

    // H2_READ: client 2 sends a part; no backend is involved.
    let mut client_2 = gateway.client();
    client_2.send("POST /parts HTTP/1.1\r\nHost: test\r\nContent-Length: 8\r\n\r\nhalf");
    gateway.wait_phase(Phase::Buffer);

    // P1_PROXY: backend A has its request and does not respond yet.
    let mut client_a = gateway.client();
    client_a.send(request("GET", "/late", "", ""));
    let mut connection_a = backend_a.accept();
    connection_a.request();
    gateway.wait_phase(Phase::Wait);

    // The fast client comes last and is finished meanwhile.
    let mut fast = gateway.client();
    assert_eq!(fast.ask("POST", "/fast", "", "fast").text(), "fast");
    let done: Vec<String> = gateway.log_lines(1).iter().map(|line| line.text("target").to_owned()).collect();
    assert_eq!(done, ["/fast"], "nobody else is done");
    assert!(backend_b.requests().iter().all(|request| request.target() != "/parts"), "half a request was passed on");

    // H3_READ: backend A responds. H4_READ: client 2 sends the rest. P3_WRITE: client 1 reads on.
    client_2.dawdle(ms(100));
    connection_a.answer("late");
    assert_eq!(client_a.response().text(), "late");
    gateway.log_line_of("/late");
    client_2.send("rest");
    assert_eq!(client_2.response().text(), "halfrest");
    gateway.log_line_of("/parts");
    let read = client_1.response();
    assert!(read.end == End::Complete && read.body == large);
    gateway.log_line_of("/large");

    let lines = gateway.log_lines(4);
    let paths: Vec<&str> = lines.iter().map(|line| line.text("target")).collect();
    assert_eq!(paths, ["/fast", "/late", "/parts", "/large"], "done in this order");
    use Phase::*;
    for line in &lines {
        let mut phases = line.phases();
        phases.retain(|phase| !matches!(phase, Buffer | Write));
        assert_eq!(phases, [Accept, Header, Route, Select, Connect, Send, Wait, Receive, Finish], "{line:?}");
    }
    let spent = |path: &str, phase: Phase| gateway.log_line_of(path).phase(phase).unwrap_or(0.0);
    assert!(spent("/late", Wait) >= 95.0, "backend A was late");
    assert!(spent("/parts", Buffer) >= 95.0, "client 2 sent late");
    assert!(spent("/large", Write) >= 95.0, "client 1 read late");
    assert!(lines[0].number("total_ms") < 95.0, "the fast client waited for someone: {:?}", lines[0]);
}
