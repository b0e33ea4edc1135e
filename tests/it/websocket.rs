//! WebSockets over HTTP/2 (RFC 8441): frame by frame, and with a browser.

use crate::harness::browser::Browser;
use crate::harness::frames::{END_HEADERS, END_STREAM, Frame, Frames, code, kind};
use crate::harness::gateway::Watched;
use crate::harness::origin::built_in;
use crate::harness::secure::Authority;
use crate::harness::tls::pair;
use crate::harness::{Gateway, Origin, Setup, eventually, ok};

/// SETTINGS_ENABLE_CONNECT_PROTOCOL (RFC 8441 §3).
const ENABLE_CONNECT_PROTOCOL: [u8; 6] = [0, 8, 0, 0, 0, 1];
/// WebSocket frames (RFC 6455 §5.2): text, binary and close, all final.
const TEXT: u8 = 0x81;
const BINARY: u8 = 0x82;
const CLOSE: u8 = 0x88;

/// An extended CONNECT on this stream.
fn connect(stream: u32, protocol: &str, path: &str, more: &[(&str, &str)]) -> Frame {
    let fields = [(":method", "CONNECT"), (":protocol", protocol), (":scheme", "http"), (":path", path)];
    let mut block = Vec::new();
    for (name, value) in fields.iter().chain(&[(":authority", "test"), ("sec-websocket-version", "13")]).chain(more) {
        block.push(0);
        for text in [name, value] {
            block.push(u8::try_from(text.len()).expect("a short text"));
            block.extend_from_slice(text.as_bytes());
        }
    }
    Frame::new(kind::HEADERS, END_HEADERS, stream, block)
}

/// A masked client frame.
fn masked(opcode: u8, payload: &[u8]) -> Vec<u8> {
    const MASK: [u8; 4] = [1, 2, 3, 4];
    let length = match payload.len() {
        short @ 0..126 => vec![0x80 | short as u8],
        long => [&[0x80 | 127][..], &(long as u64).to_be_bytes()].concat(),
    };
    let hidden = payload.iter().zip(MASK.iter().cycle()).map(|(byte, mask)| byte ^ mask).collect();
    [vec![opcode], length, MASK.to_vec(), hidden].concat()
}

/// A client with enough credit, on a connection whose gateway offers WebSockets.
fn client(gateway: &Gateway) -> Frames {
    let mut client = Frames::connect(gateway.web());
    let settings = client.until(kind::SETTINGS).payload;
    assert!(settings.chunks(6).any(|setting| setting == ENABLE_CONNECT_PROTOCOL), "{settings:?}");
    client.send(&Frame::credit(0, 1 << 20));
    client
}

/// The status on a stream, and whether the stream has ended.
fn status(client: &mut Frames, stream: u32) -> (Option<u16>, bool) {
    let answer = client.until(kind::HEADERS);
    assert_eq!(answer.stream, stream);
    (answer.status(), answer.ends_stream())
}

/// This many bytes of DATA on this stream.
fn data(client: &mut Frames, stream: u32, count: usize) -> Vec<u8> {
    let mut data = Vec::new();
    while data.len() < count {
        let frame = client.until(kind::DATA);
        assert_eq!(frame.stream, stream);
        data.extend_from_slice(&frame.payload);
    }
    data
}

#[test]
fn a_websocket_comes_over_a_stream_beside_other_requests() {
    let origin = built_in();
    let gateway = Setup::before_all(&[origin.address()]).listener("protocols: [h2c]").start();
    let mut client = client(&gateway);
    client.send(&connect(1, "websocket", "/websocket", &[]));
    client.send(&Frame::credit(1, 1 << 20));
    assert_eq!(status(&mut client, 1), (Some(200), false));

    client.send(&Frame::new(kind::DATA, 0, 1, masked(TEXT, b"hello")));
    assert_eq!(data(&mut client, 1, 7), [&[TEXT, 5][..], b"hello"].concat());

    // A message larger than a window, in several frames.
    let large: Vec<u8> = (0..60_000_u32).map(|n| (n % 251) as u8).collect();
    for piece in masked(BINARY, &large).chunks(10_000) {
        client.send(&Frame::new(kind::DATA, 0, 1, piece));
    }
    let came = data(&mut client, 1, large.len() + 4);
    assert_eq!(&came[..4], [&[BINARY, 126][..], &(large.len() as u16).to_be_bytes()].concat());
    assert!(came[4..] == large);

    // Another request on the connection is served meanwhile.
    client.send(&Frame::get(3));
    assert_eq!(status(&mut client, 3).0, Some(200));
    while !client.next().expect("the rest of its answer").ends_stream() {}

    client.send(&Frame::new(kind::DATA, 0, 1, masked(CLOSE, &[3, 232])));
    assert_eq!(data(&mut client, 1, 4), [CLOSE, 2, 3, 232]);
    client.send(&Frame::new(kind::DATA, END_STREAM, 1, []));
    while !client.next().expect("the end of the stream").ends_stream() {}
    gateway.wait_at_rest();
    assert_eq!(gateway.log_line_of_status(101).text("target"), "/websocket");
    assert_eq!(gateway.metric("forebay_client_connections"), 1.0, "it is no further connection");
}

#[test]
fn a_client_that_gives_its_websocket_up_leaves_nothing_behind() {
    let origin = built_in();
    let gateway = Setup::before_all(&[origin.address()]).listener("protocols: [h2c]").start();
    let mut client = client(&gateway);
    client.send(&connect(1, "websocket", "/websocket", &[]));
    assert_eq!(status(&mut client, 1), (Some(200), false));
    client.send(&Frame::reset(1, code::CANCEL));
    gateway.wait_at_rest();
    client.send(&Frame::get(3));
    assert_eq!(status(&mut client, 3).0, Some(200), "the connection goes on");
}

#[test]
fn what_does_not_become_a_websocket_is_never_taken_for_one() {
    let origin = Origin::answering(|request| match request.head.target() {
        "/here" => ok("no websocket"),
        _ => "HTTP/1.1 404 Not Found\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nnot\r\n5\r\n here\r\n0\r\n\r\n".into(),
    });
    let gateway = Setup::before(&origin).listener("protocols: [h2c]").start();
    let mut client = client(&gateway);
    client.send(&connect(1, "connect-udp", "/", &[]));
    assert_eq!(status(&mut client, 1), (Some(501), true));
    client.send(&connect(3, "websocket", "/", &[("content-length", "5")]));
    assert_eq!(status(&mut client, 3), (Some(400), true));

    client.send(&connect(5, "websocket", "/there", &[]));
    assert_eq!(status(&mut client, 5), (Some(404), false));
    assert_eq!(data(&mut client, 5, 8), b"not here");

    // A 200 would mean that the WebSocket is open.
    client.send(&connect(7, "websocket", "/here", &[]));
    assert_eq!(status(&mut client, 7).0, Some(502));
    assert_eq!(gateway.log_line_of_status(502).reason(), "wait.malformed");
    gateway.wait_at_rest();
}

#[test]
fn a_filter_and_a_route_decide_on_websockets_over_http_2_too() {
    let origin = built_in();
    let gateway = Setup::before_all(&[origin.address()])
        .listener("protocols: [h2c]")
        .routes(
            "{ name: closed, match: { path: { exact: /closed } }, filters: [ { respond: { status: 403 } } ], upstream: app }
             { name: not, match: { path: { exact: /websocket } }, upgrades: [], upstream: app }",
        )
        .start();
    let mut client = client(&gateway);
    client.send(&connect(1, "websocket", "/closed", &[]));
    assert_eq!(status(&mut client, 1).0, Some(403));
    // Without `Upgrade`, the endpoint requires one.
    client.send(&connect(3, "websocket", "/websocket", &[]));
    assert_eq!(status(&mut client, 3).0, Some(426));
    gateway.wait_at_rest();
}

#[test]
fn an_operator_may_offer_none() {
    let origin = built_in();
    let setup = Setup::before_all(&[origin.address()]).listener("protocols: [h2c], http2: { websocket: false }");
    let gateway = setup.start();
    let mut client = Frames::connect(gateway.web());
    let settings = client.until(kind::SETTINGS).payload;
    assert!(settings.chunks(6).all(|setting| setting[..2] != ENABLE_CONNECT_PROTOCOL[..2]), "{settings:?}");
    client.send(&connect(1, "websocket", "/websocket", &[]));
    assert_eq!(client.until(kind::RST_STREAM).code(), code::PROTOCOL_ERROR);
}

#[test]
fn a_browser_opens_a_websocket_where_nothing_but_http_2_is_spoken() {
    let (authority, origin) = (Authority::new(), built_in());
    let tls = format!("tls: {{ certificates: [ {{ {} }} ] }}", pair(&authority.issue(&["localhost"])));
    let gateway = Setup::before_all(&[origin.address()]).listener(&tls).listener("protocols: [h2]").start();
    let port = gateway.web().port();
    let mut browser = Browser::start();
    browser.trust_anybody();
    browser.open(&format!("https://localhost:{port}/bytes/10"));
    let script = format!(
        "window.told = ''; window.socket = new WebSocket('wss://localhost:{port}/websocket');
         socket.onopen = () => socket.send('hello'); socket.onmessage = (message) => {{ told = message.data }};
         socket.onerror = () => {{ told = 'an error' }}; 1"
    );
    browser.eval(&script);
    let told = eventually("the browser to hear from its WebSocket", || {
        browser.eval("window.told").as_str().filter(|told| !told.is_empty()).map(str::to_owned)
    });
    assert_eq!(told, "hello", "{:?}", browser.complaints());
    browser.eval("socket.close(); 1");
    assert_eq!(gateway.log_line_of_status(101).text("target"), "/websocket");
    assert_eq!(gateway.metric("forebay_client_requests_total{protocol=\"http1\"}"), 0.0);
}
