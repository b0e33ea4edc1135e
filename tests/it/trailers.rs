//! Trailers: between the versions that can carry them, without the fields that must not be there, and announced as they
//! come.

use crate::harness::client::request;
use crate::harness::{Ask, End, H2Client, H2Origin, Origin, Protocol, Setup, ok};

fn before(origin: &H2Origin) -> Setup {
    Setup::before_all(&[origin.address()]).upstream("protocol: h2c").listener("protocols: [http1, h2c]")
}

#[test]
fn they_pass_without_what_must_not_be_in_them_and_are_announced_so() {
    let origin = H2Origin::start();
    let gateway = before(&origin).start();
    for protocol in Protocol::BOTH {
        let answer = Ask::get("/announced").over(protocol, gateway.web());
        assert_eq!((answer.text(), answer.end), ("body", End::Complete));
        assert_eq!(answer.trailers, ["x-trailer: the end"], "{protocol:?}");
        assert_eq!(answer.value("trailer"), Some("X-Trailer"), "{protocol:?}");
    }
}

#[test]
fn over_http_1_they_need_a_chunked_body() {
    let origin = H2Origin::start();
    let gateway = before(&origin).start();
    let with_length = Ask::get("/announced-with-length").over(Protocol::Http2, gateway.web());
    assert_eq!(
        (with_length.value("trailer"), &with_length.trailers[..]),
        (Some("X-Trailer"), &["x-trailer: the end".to_owned()][..])
    );
    let mut client = gateway.client();
    for (path, version) in [("/announced-with-length", "1.1"), ("/announced", "1.0"), ("/announced-with-length", "1.0")]
    {
        let mut old = gateway.client();
        let asked = if version == "1.0" { &mut old } else { &mut client };
        asked.send(format!("GET {path} HTTP/{version}\r\nHost: test\r\n\r\n"));
        let answer = asked.response();
        assert_eq!((answer.text(), answer.value("trailer")), ("body", None), "{path} {version}");
    }
    let head = client.ask("HEAD", "/announced", "", "");
    assert_eq!((head.status, head.value("trailer")), (200, None), "there is no body for them to follow");
    assert_eq!(client.get("/announced").status, 200, "and the connection is where it should be");
}

#[test]
fn those_of_a_request_reach_an_endpoint_of_http_2() {
    let origin = H2Origin::start();
    for mode in ["full", "auto", "stream"] {
        let gateway = before(&origin).route(&format!("buffering: {{ request: {{ mode: {mode} }} }}")).start();
        let client = H2Client::connect(gateway.web());
        let post = http::Request::post("http://test/request-trailers").header("trailer", "X-Sum, Host");
        let (answer, mut body) = client.begin(post.body(()).expect("a request"), false);
        body.send_data("body".into(), false).expect("a stream");
        let fields = [("x-sum", "1"), ("authorization", "no"), ("x-time", "2")];
        let fields = fields.map(|(name, value)| (name.parse().expect("a name"), value.parse().expect("a value")));
        body.send_trailers(http::HeaderMap::from_iter(fields)).expect("a stream");
        let told = client.step(async move {
            let mut body = answer.await.expect("an answer").into_body();
            body.data().await.expect("a body").expect("a piece")
        });
        assert_eq!(told, "announced X-Sum; x-sum: 1, x-time: 2", "{mode}");
    }
}

#[test]
fn none_are_announced_that_do_not_come() {
    let chunks = "Transfer-Encoding: chunked\r\nTrailer: X-Sum\r\n";
    let origin = Origin::answering(move |request| {
        if request.value("trailer").is_some() {
            return ok("announced");
        }
        format!("HTTP/1.1 200 OK\r\n{chunks}\r\n4\r\nbody\r\n0\r\nX-Sum: 1\r\n\r\n").into_bytes()
    });
    let gateway = Setup::before(&origin).start();
    let mut client = gateway.client();
    client.send([request("POST", "/", chunks, ""), b"0\r\nX-Sum: 1\r\n\r\n".to_vec()].concat());
    let answer = client.response();
    assert_eq!((answer.text(), answer.value("trailer")), ("body", None));
}
