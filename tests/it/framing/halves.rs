//! A truncated response never ends like a complete one: for each framing, each way in which an endpoint can break
//! off, each version of the client, and each mode of buffering.

use crate::harness::gateway::Watched;
use crate::harness::raw_h2::{Ended, RawH2};
use crate::harness::wire::End;
use crate::harness::{Gateway, Origin, Setup};

/// How an endpoint breaks off.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Break {
    Close,
    Reset,
}

/// Headers, and the result for the body. If the body ends with the connection, only a reset truncates it.
const HALVES: &[(&str, &str)] = &[
    ("Content-Length: 400000\r\n", "half"),
    ("Content-Length: 400000, 400000\r\n", "half"),
    ("Transfer-Encoding: chunked\r\n", "4\r\nhalf\r\n"),
    ("Transfer-Encoding: chunked\r\n", "4\r\nhalf"),
    ("Transfer-Encoding: chunked\r\n", "40\r\nhalf"),
    ("Transfer-Encoding: chunked\r\n", "4\r\nhalf\r\n4"),
    ("Transfer-Encoding: chunked\r\n", "4\r\nhalf\r\n4;x=\""),
    ("Transfer-Encoding: chunked\r\n", "4\r\nhalf\r\n0"),
    ("Transfer-Encoding: chunked\r\n", "4\r\nhalf\r\n0\r\n"),
    ("Transfer-Encoding: chunked\r\n", "4\r\nhalf\r\n0\r\nT: 1\r\n"),
    ("Transfer-Encoding: chunked\r\n", "4\r\nhalf\r\nnonsense\r\n"),
    ("", "half"),
    ("Transfer-Encoding: identity\r\n", "half"),
];

/// Makes an endpoint send half a response, long enough that a part of it is passed on, and break off. Returns the
/// client's result: `None` if the client saw that the response failed, otherwise how it ended.
fn broken_off(gateway: &Gateway, origin: &Origin, half: (&str, &str), how: Break, version: &str) -> Option<End> {
    let case = format!("{half:?} {how:?} HTTP/{version}");
    let play = || {
        let mut connection = origin.accept();
        connection.request();
        connection.send(format!("HTTP/1.1 200 OK\r\n{}\r\n{}", half.0, half.1));
        // It is on its way, and the reset cannot overtake it.
        for phase in ["send", "wait"] {
            gateway.wait_metric(&format!("forebay_phase_active{{phase=\"{phase}\"}}"), |count| count == 0.0);
        }
        match how {
            Break::Close => connection.close(),
            Break::Reset => connection.reset(),
        }
    };
    let (status, end) = if version == "2" {
        let mut client = RawH2::client(gateway.web());
        client.headers(1, &[(":method", "GET"), (":scheme", "http"), (":authority", "a"), (":path", "/")], true);
        play();
        let outcome = client.outcome(1);
        (outcome.status, if outcome.end == Ended::Whole { End::Complete } else { End::Cut })
    } else {
        let mut client = gateway.client();
        client.send(format!("GET / HTTP/{version}\r\nHost: a\r\nConnection: close\r\n\r\n"));
        play();
        let answer = client.response();
        assert_eq!(client.rest(), b"", "{case}");
        (answer.status, answer.end)
    };
    assert!([0, 200, 502].contains(&status), "{case}: {status}");
    (status != 502).then_some(end)
}

#[test]
fn half_an_answer_is_never_a_whole_one() {
    for mode in ["auto", "full", "stream"] {
        let origin = Origin::scripted();
        let route = format!("buffering: {{ response: {{ mode: {mode} }} }}, retry: {{ attempts: 1 }}");
        let gateway = Setup::before(&origin).listener("protocols: [http1, h2c]").route(&route).start();
        for half in HALVES {
            for how in [Break::Close, Break::Reset] {
                if how == Break::Close && !half.0.contains("Length") && !half.0.contains("chunked") {
                    continue;
                }
                for version in ["1.0", "1.1", "2"] {
                    let end = broken_off(&gateway, &origin, *half, how, version);
                    assert_ne!(end, Some(End::Complete), "{half:?} {how:?} HTTP/{version} {mode}");
                }
            }
        }
        gateway.wait_at_rest();
    }
}

#[test]
fn an_answer_that_the_end_of_its_connection_ends_is_whole() {
    let origin = Origin::scripted();
    let gateway = Setup::before(&origin).listener("protocols: [http1, h2c]").start();
    for version in ["1.0", "1.1", "2"] {
        let end = broken_off(&gateway, &origin, ("", "whole"), Break::Close, version);
        assert_eq!(end, Some(End::Complete), "HTTP/{version}");
    }
}
