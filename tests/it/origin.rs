//! The built-in test origin, checked over a raw socket, since other tests rely on it.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::time::{Duration, Instant};

use forebay::origin::{Detour, Origin, PATHS, Running, content};

fn origin() -> Running {
    Origin::bind("127.0.0.1:0").unwrap().spawn().unwrap()
}

fn connect(origin: &Running) -> TcpStream {
    let stream = TcpStream::connect(origin.address()).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    stream
}

fn send(stream: &mut TcpStream, request: &str) {
    stream.write_all(request.as_bytes()).unwrap();
}

/// All bytes until the origin closes.
fn rest(stream: &mut TcpStream) -> Vec<u8> {
    let mut bytes = Vec::new();
    match stream.read_to_end(&mut bytes) {
        Err(error) if error.kind() != ErrorKind::ConnectionReset => panic!("{error}"),
        _ => bytes,
    }
}

/// Sends one request on a new connection; returns header and body of the response.
fn ask(origin: &Running, request: &str) -> (String, Vec<u8>) {
    let mut stream = connect(origin);
    send(&mut stream, request);
    split(rest(&mut stream))
}

fn split(answer: Vec<u8>) -> (String, Vec<u8>) {
    let end = answer.windows(4).position(|window| window == b"\r\n\r\n").expect("a whole header") + 4;
    (String::from_utf8(answer[..end].to_vec()).unwrap(), answer[end..].to_vec())
}

fn get(origin: &Running, path: &str) -> (String, Vec<u8>) {
    ask(origin, &format!("GET {path} HTTP/1.1\r\nHost: o\r\nConnection: close\r\n\r\n"))
}

fn dechunked(mut body: &[u8]) -> Vec<u8> {
    let mut whole = Vec::new();
    loop {
        let line = body.windows(2).position(|window| window == b"\r\n").unwrap();
        let size = usize::from_str_radix(std::str::from_utf8(&body[..line]).unwrap(), 16).unwrap();
        if size == 0 {
            return whole;
        }
        whole.extend_from_slice(&body[line + 2..line + 2 + size]);
        body = &body[line + 2 + size + 2..];
    }
}

#[test]
fn the_first_page_lists_the_paths() {
    let (header, body) = get(&origin(), "/");
    assert!(header.starts_with("HTTP/1.1 200 OK\r\n"), "{header}");
    assert_eq!(body, PATHS.as_bytes());
}

#[test]
fn a_body_is_echoed_byte_for_byte_with_its_type() {
    let origin = origin();
    let mut stream = connect(&origin);
    let body = content(300_000);
    send(
        &mut stream,
        "POST /echo HTTP/1.1\r\nHost: o\r\nConnection: close\r\nContent-Type: x/y\r\nContent-Length: 300000\r\n\r\n",
    );
    stream.write_all(&body).unwrap();
    let (header, echoed) = split(rest(&mut stream));
    assert!(header.contains("Content-Type: x/y\r\n"), "{header}");
    assert!(echoed == body);
}

#[test]
fn a_chunked_body_is_understood_with_extensions_and_trailers() {
    let request = "POST /echo HTTP/1.1\r\nHost: o\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n\
                   5;name=value\r\nhello\r\n1\r\n!\r\n0\r\nX-Trailer: yes\r\n\r\n";
    assert_eq!(ask(&origin(), request).1, b"hello!");
}

#[test]
fn a_body_is_asked_for_where_the_client_waits() {
    let origin = origin();
    let mut stream = connect(&origin);
    send(
        &mut stream,
        "POST /echo HTTP/1.1\r\nHost: o\r\nConnection: close\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\n",
    );
    let mut interim = [0; 25];
    stream.read_exact(&mut interim).unwrap();
    assert_eq!(&interim, b"HTTP/1.1 100 Continue\r\n\r\n");
    send(&mut stream, "ok");
    assert_eq!(split(rest(&mut stream)).1, b"ok");
}

#[test]
fn the_request_is_shown_as_json() {
    let request =
        "PUT /headers?a=1 HTTP/1.1\r\nHost: o\r\nX-A: 1\r\nx-a: 2\r\nConnection: close\r\nContent-Length: 3\r\n\r\nabc";
    let origin = origin();
    let (_, body) = ask(&origin, request);
    let seen: serde_json::Value = serde_json::from_slice(&body).unwrap();
    assert_eq!(seen["method"], "PUT");
    assert_eq!(seen["target"], "/headers?a=1");
    assert_eq!(seen["headers"]["x-a"], serde_json::json!(["1", "2"]));
    assert_eq!(seen["body_bytes"], 3);
    assert_eq!(seen["body_sha256"], "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
    assert_eq!(seen["body_framing"], "content-length: 3");
    assert_eq!(origin.body_bytes(), 3);
}

#[test]
fn bytes_come_whole_in_either_framing() {
    let origin = origin();
    let (header, body) = get(&origin, "/bytes/2MiB");
    assert!(header.contains("Content-Length: 2097152\r\n"), "{header}");
    assert!(body == content(2 << 20));

    let (header, body) = get(&origin, "/chunked/2MiB");
    assert!(header.contains("Transfer-Encoding: chunked\r\n"), "{header}");
    assert!(dechunked(&body) == content(2 << 20));

    let (_, body) = ask(&origin, "GET /chunked/100 HTTP/1.0\r\n\r\n");
    assert_eq!(body, content(100));

    let (header, body) = ask(&origin, "GET /until-close/2MiB HTTP/1.1\r\nHost: o\r\n\r\n");
    assert!(!header.contains("Content-Length") && !header.contains("Transfer-Encoding"), "{header}");
    assert!(body == content(2 << 20));
}

#[test]
fn head_gets_the_header_of_get_and_no_body() {
    let origin = origin();
    for (path, framing) in
        [("/bytes/1TiB", "Content-Length: 1099511627776"), ("/chunked/9", "Transfer-Encoding: chunked")]
    {
        let (header, body) = ask(&origin, &format!("HEAD {path} HTTP/1.1\r\nHost: o\r\nConnection: close\r\n\r\n"));
        assert!(header.contains(framing), "{header}");
        assert_eq!(body, b"");
    }
}

#[test]
fn pipelined_requests_are_answered_in_order_on_one_connection() {
    let origin = origin();
    let mut stream = connect(&origin);
    let first = "POST /echo HTTP/1.1\r\nHost: o\r\nContent-Length: 3\r\n\r\none";
    let last = "GET /status/404 HTTP/1.1\r\nHost: o\r\nConnection: close\r\n\r\n";
    send(&mut stream, &format!("{first}{last}"));
    let answers = String::from_utf8(rest(&mut stream)).unwrap();
    let (one, two) = answers.split_once("oneHTTP/1.1 ").unwrap();
    assert!(one.starts_with("HTTP/1.1 200 OK") && two.starts_with("404 Not Found"), "{answers}");
    assert_eq!((origin.requests(), origin.accepted()), (2, 1));
}

#[test]
fn a_status_has_a_body_only_where_it_may() {
    let origin = origin();
    let (header, body) = get(&origin, "/status/503");
    assert!(header.starts_with("HTTP/1.1 503 Service Unavailable\r\n"), "{header}");
    assert_eq!(body, b"503 Service Unavailable\n");
    for status in [204, 304] {
        let (header, body) = get(&origin, &format!("/status/{status}"));
        assert!(!header.contains("Content-Length"), "{header}");
        assert_eq!(body, b"");
    }
}

#[test]
fn delays_add_up_and_drips_take_their_time() {
    let origin = origin();
    let started = Instant::now();
    get(&origin, "/delay/50?delay=50ms");
    assert!(started.elapsed() >= Duration::from_millis(100));

    let started = Instant::now();
    let (_, body) = get(&origin, "/drip/3/50ms");
    assert!(started.elapsed() >= Duration::from_millis(100));
    assert_eq!(dechunked(&body), b"piece 1 of 3\npiece 2 of 3\npiece 3 of 3\n");
}

#[test]
fn events_hints_and_trailers_look_as_they_should() {
    let origin = origin();
    let (header, body) = get(&origin, "/sse/2");
    assert!(header.contains("Content-Type: text/event-stream\r\n"), "{header}");
    assert_eq!(dechunked(&body), b"id: 1\ndata: event 1\n\nid: 2\ndata: event 2\n\n");

    let (header, rest) = get(&origin, "/early-hints");
    assert!(header.starts_with("HTTP/1.1 103 Early Hints\r\nLink: "), "{header}");
    assert!(rest.starts_with(b"HTTP/1.1 200 OK\r\n"));

    let (_, body) = get(&origin, "/trailers");
    assert!(body.ends_with(b"\r\n0\r\nX-Trailer: the end\r\n\r\n"));
}

#[tokio::test]
async fn a_websocket_echoes_every_message() {
    use futures::{SinkExt, StreamExt};
    use tokio_tungstenite::tungstenite::Message;

    let origin = origin();
    let (mut socket, _) =
        tokio_tungstenite::connect_async(format!("ws://{}/websocket", origin.address())).await.unwrap();
    for message in [Message::text("hello"), Message::binary(content(70_000)), Message::binary(content(300))] {
        socket.send(message.clone()).await.unwrap();
        assert_eq!(socket.next().await.unwrap().unwrap(), message);
    }
    socket.send(Message::Ping("are you there".into())).await.unwrap();
    assert_eq!(socket.next().await.unwrap().unwrap(), Message::Pong("are you there".into()));
    socket.close(None).await.unwrap();
    assert!(matches!(socket.next().await, Some(Ok(Message::Close(_)))));
}

#[test]
fn a_websocket_wants_an_upgrade() {
    let (header, _) = get(&origin(), "/websocket");
    assert!(header.starts_with("HTTP/1.1 426 ") && header.contains("Upgrade: websocket\r\n"), "{header}");
}

#[test]
fn faults_break_off_where_they_say() {
    let origin = origin();
    let raw = |path: &str| {
        let mut stream = connect(&origin);
        send(&mut stream, &format!("GET {path} HTTP/1.1\r\nHost: o\r\n\r\n"));
        rest(&mut stream)
    };
    assert_eq!(raw("/fault/close"), b"");
    assert!(raw("/fault/garbage").starts_with(b"\0"));
    let (header, body) = split(raw("/fault/half"));
    assert!(header.contains("Content-Length: 1000\r\n"));
    assert_eq!(body, content(500));
    assert!(split(raw("/fault/half/200000")).1 == content(100_000));
    assert!(raw("/fault/half-chunked").ends_with(b"\r\n\r\n5\r\nhello\r\n"));
}

#[test]
fn a_reset_is_one() {
    let origin = origin();
    let mut stream = connect(&origin);
    send(&mut stream, "GET /fault/reset HTTP/1.1\r\nHost: o\r\n\r\n");
    assert_eq!(stream.read(&mut [0]).unwrap_err().kind(), ErrorKind::ConnectionReset);
}

#[test]
fn a_reset_may_wait_for_a_part_of_the_body() {
    let origin = origin();
    let mut stream = connect(&origin);
    send(&mut stream, "PUT /fault/reset/4 HTTP/1.1\r\nHost: o\r\nContent-Length: 10\r\n\r\nthr");
    wait_until(|| origin.body_bytes() == 3);
    assert_eq!((origin.connections(), origin.busy()), (1, 1));
    send(&mut stream, "ee");
    assert_eq!(stream.read(&mut [0]).unwrap_err().kind(), ErrorKind::ConnectionReset);
    wait_until(|| origin.busy() == 0);
}

#[test]
fn a_detour_takes_the_first_requests_of_all_origins_that_share_it() {
    let detour = Detour::of_first(2, "/status/503".parse().unwrap());
    let origins = [(); 2].map(|()| Origin::bind("127.0.0.1:0").unwrap().detour(&detour).spawn().unwrap());
    let status = |origin| get(origin, "/status/200").0[9..12].to_owned();
    assert_eq!([0, 1, 0, 1].map(|n| status(&origins[n])), ["503", "503", "200", "200"]);
}

#[test]
fn an_early_answer_comes_while_the_body_is_still_on_its_way() {
    let origin = origin();
    let mut stream = connect(&origin);
    send(&mut stream, "POST /fault/early HTTP/1.1\r\nHost: o\r\nContent-Length: 1000\r\n\r\nthe first piece");
    let mut answer = [0; 12];
    stream.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"HTTP/1.1 413");
    stream.write_all(&[0; 500]).expect("it still takes what comes");
}

#[test]
fn silent_faults_say_nothing_and_end_with_their_peer() {
    let origin = origin();
    for (path, said) in [("/fault/hang", 0), ("/fault/stall", 1), ("/fault/slow-header", 1), ("/delay/1h", 0)] {
        let mut stream = connect(&origin);
        send(&mut stream, &format!("GET {path} HTTP/1.1\r\nHost: o\r\n\r\n"));
        stream.read_exact(&mut vec![0; said]).unwrap();
        wait_until(|| origin.connections() == 1);
        stream.shutdown(Shutdown::Both).unwrap();
        wait_until(|| origin.connections() == 0);
    }
    assert_eq!(origin.requests(), 4);
}

fn wait_until(done: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while !done() {
        assert!(Instant::now() < deadline, "not within ten seconds");
        std::thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn a_slow_header_comes_byte_by_byte() {
    let origin = origin();
    let mut stream = connect(&origin);
    send(&mut stream, "GET /fault/slow-header HTTP/1.1\r\nHost: o\r\n\r\n");
    let started = Instant::now();
    stream.read_exact(&mut [0; 4]).unwrap();
    assert!(started.elapsed() >= Duration::from_millis(200), "four bytes, three pauses of 100 ms");
}

#[test]
fn wrong_requests_are_told_so() {
    let origin = origin();
    let many = "X: y\r\n".repeat(129);
    let large = format!("X: {}\r\n", "y".repeat(70_000));
    for (request, status) in [
        ("SSH-2.0-OpenSSH_9.2\r\n\r\n".to_owned(), "400"),
        ("GET /nowhere HTTP/1.1\r\nHost: o\r\nConnection: close\r\n\r\n".to_owned(), "404"),
        ("GET /bytes/many HTTP/1.1\r\nHost: o\r\nConnection: close\r\n\r\n".to_owned(), "400"),
        (format!("GET / HTTP/1.1\r\n{many}\r\n"), "431"),
        (format!("GET / HTTP/1.1\r\n{large}\r\n"), "431"),
        ("POST /echo HTTP/1.1\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n".to_owned(), "400"),
        ("POST /echo HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nx\r\n\r\n".to_owned(), "400"),
        ("POST /echo HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nabc\r\n\r\n".to_owned(), "400"),
    ] {
        let (header, _) = ask(&origin, &request);
        assert_eq!(header.get(9..12), Some(status), "{header}\nfor {}", &request[..request.len().min(80)]);
    }
}

#[test]
fn a_dropped_origin_listens_no_more() {
    let origin = origin();
    let address = origin.address();
    let mut open = connect(&origin);
    drop(origin);
    assert_eq!(open.read(&mut [0]).unwrap_or(0), 0);
    assert_eq!(TcpStream::connect(address).unwrap_err().kind(), ErrorKind::ConnectionRefused);
}
