//! Waiting for responses: backends that hang, drip, misbehave or close, and clients that leave.

use forebay::phase::Phase;

use crate::harness::client::request;
use crate::harness::gateway::Watched;
use crate::harness::origin::Connection;
use crate::harness::{Gateway, Origin, Setup, ms, ok};

/// The client's response and the logged reason if the backend handles a request like this.
fn answered(play: impl FnOnce(Connection)) -> (u16, String) {
    let origin = Origin::scripted();
    let (gateway, mut client, connection) = Setup::before(&origin).asked(&origin);
    play(connection);
    let status = client.response().status;
    let line = gateway.log_line();
    assert_eq!(line.status(), u64::from(status));
    gateway.refused_once(line.reason());
    (status, line.reason().to_owned())
}

fn impatient(origin: &Origin) -> Gateway {
    Setup::before(origin).upstream("timeouts: { wait: 200ms }").start()
}

#[test]
fn a_backend_that_hangs_is_a_504() {
    let origin = Origin::scripted();
    let gateway = impatient(&origin);
    let mut client = gateway.client();
    client.send(request("GET", "/", "", ""));
    let mut connection = origin.accept();
    connection.request();
    assert_eq!(client.response().status, 504);
    connection.closed();
    let line = gateway.log_line();
    assert_eq!((line.status(), line.reason()), (504, "wait.timeout"));
    let spent = line.phase(Phase::Wait).expect("time in wait");
    assert!(spent >= 195.0, "{spent} ms");
}

#[test]
fn a_backend_that_drips_its_header_does_not_gain_time_by_it() {
    let origin = Origin::scripted();
    let gateway = impatient(&origin);
    let mut client = gateway.client();
    client.send(request("GET", "/", "", ""));
    let mut connection = origin.accept();
    connection.request();
    let cut = !connection.drip(ok("a header of some eighty letters takes four seconds"), ms(50));
    assert!(cut, "it was to be given up before all of it was sent");
    assert_eq!(client.response().status, 504);
    assert_eq!(gateway.log_line().reason(), "wait.timeout");
}

#[test]
fn a_slow_upload_is_not_the_fault_of_the_backend() {
    let origin = Origin::answering(|request| ok(&request.body));
    let stream = "buffering: { request: { mode: stream } }";
    let gateway = Setup::before(&origin).upstream("timeouts: { wait: 1500ms }").route(stream).start();
    let mut client = gateway.client();
    client.send("POST / HTTP/1.1\r\nHost: test\r\nContent-Length: 10\r\n\r\n");
    assert!(client.drip("ten bytes!", ms(200)), "the gateway spoke before the upload was over");
    assert_eq!(client.response().text(), "ten bytes!");
    let line = gateway.log_line();
    assert!(line.phase(Phase::Send).expect("time in send") > 1_600.0, "longer than it waits for an answer");
    assert!(line.phase(Phase::Wait).expect("time in wait") < 1_500.0);
}

#[test]
fn a_backend_that_closes_or_resets_without_an_answer_is_a_502() {
    assert_eq!(answered(Connection::close), (502, "wait.reset".to_owned()));
    assert_eq!(answered(Connection::reset), (502, "wait.reset".to_owned()));
}

#[test]
fn a_backend_that_closes_in_the_middle_of_its_header_is_a_502() {
    let half = answered(|mut connection| {
        connection.send("HTTP/1.1 200 OK\r\nContent-Le");
        connection.close();
    });
    assert_eq!(half, (502, "wait.reset".to_owned()));
}

#[test]
fn a_backend_that_answers_garbage_is_a_502() {
    for garbage in
        ["hello\r\n\r\n", "\0\x01\x02\x03\r\n\r\n", "HTTP/1.1 abc Odd\r\n\r\n", "HTTP/1.1 200 OK\r\nno colon\r\n\r\n"]
    {
        let (status, reason) = answered(|mut connection| {
            connection.send(garbage);
            connection.close();
        });
        assert_eq!((status, &*reason), (502, "wait.malformed"), "{garbage:?}");
    }
}

#[test]
fn an_answer_of_two_minds_about_its_length_is_a_502() {
    for fields in ["Content-Length: 4\r\nContent-Length: 5\r\n", "Content-Length: 4x\r\n"] {
        let (status, reason) = answered(|mut connection| {
            connection.send(format!("HTTP/1.1 200 OK\r\n{fields}\r\nbody!"));
            connection.close();
        });
        assert_eq!((status, &*reason), (502, "wait.malformed"), "{fields:?}");
    }
}

#[test]
fn a_client_that_does_not_wait_lets_the_backend_go() {
    let origin = Origin::scripted();
    let (gateway, client, mut connection) = Setup::before(&origin).asked(&origin);
    gateway.wait_phase(Phase::Wait);
    client.reset();
    connection.closed();
    let line = gateway.log_line();
    assert_eq!((line.status(), line.reason()), (499, "wait.aborted"));
    gateway.refused_once("wait.aborted");
    gateway.wait_metric("forebay_phase_active", |count| count == 0.0);
}

#[test]
fn a_late_answer_is_an_answer() {
    let origin = Origin::scripted();
    let (gateway, mut client, mut connection) = Setup::before(&origin).asked(&origin);
    gateway.wait_phase(Phase::Wait);
    connection.answer("late");
    assert_eq!(client.response().text(), "late");
    assert!(gateway.log_line().phase(Phase::Wait).expect("time in wait") > 0.0);
}

#[test]
fn a_refusal_after_a_backend_failed_is_json_for_a_client_that_asks_for_it() {
    let origin = Origin::scripted();
    let gateway = impatient(&origin);
    let answer = gateway.client().ask("GET", "/", "Accept: application/json\r\n", "");
    assert_eq!((answer.status, answer.value("content-type")), (504, Some("application/json")));
    assert!(answer.json().to_string().contains("wait.timeout"), "{}", answer.text());
}

#[test]
fn an_endpoint_that_breaks_the_rules_of_http_2_has_not_closed_its_connection() {
    fn frame(kind: u8, flags: u8, stream: u8, payload: &[u8]) -> Vec<u8> {
        let length = u8::try_from(payload.len()).expect("a short one");
        [&[0, 0, length, kind, flags, 0, 0, 0, stream][..], payload].concat()
    }
    let settings = frame(4, 0, 0, b"");
    // `:status: 200` by its index in RFC 7541's table, and `content-length: 10`.
    let header = b"\x88\x0f\x0d\x0210";
    let short = [settings.clone(), frame(1, 4, 1, header), frame(0, 1, 1, b"four")].concat();
    let without_status = [settings, frame(1, 5, 1, &header[1..])].concat();
    let http1 = b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n".to_vec();
    for (said, reason) in [(http1, "wait.malformed"), (without_status, "wait.malformed"), (short, "receive.malformed")]
    {
        let origin = Origin::playing(move |mut connection| {
            connection.bytes(24);
            // Skips settings and other frames before the request header.
            while {
                let frame = connection.bytes(9);
                connection.bytes(usize::from(frame[1]) << 8 | usize::from(frame[2]));
                frame[3] != 1
            } {}
            connection.send(&said);
            connection.into_wire().rest();
        });
        let gateway = Setup::before(&origin).upstream("protocol: h2c").route("retry: { attempts: 1 }").start();
        assert_eq!(gateway.client().get("/").status, 502, "{reason}");
        assert_eq!(gateway.log_line().reason(), reason);
    }
}
