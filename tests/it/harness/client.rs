//! The client of a story: it sends and reads exactly what the story says, at the story's pace.

use std::future::poll_fn;
use std::net::{IpAddr, SocketAddr};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use bytes::Bytes;
use h2::SendStream;
use h2::client::{ResponseFuture, SendRequest};
use http::HeaderMap;
use socket2::{Domain, Socket, Type};
use tokio::runtime::{Builder, Runtime};

use super::wire::{End, Response, Wire};
use super::{DEADLINE, eventually};

/// The maximum segment size of a slow client.
const SEGMENT_BYTES: u32 = 1400;

/// A client on one HTTP/1 connection.
pub struct Client {
    wire: Wire,
}

impl Client {
    /// Connects.
    pub fn connect(address: SocketAddr) -> Client {
        Client::with(address, None, None)
    }

    /// Connects from this local address: all of 127.0.0.0/8 is local.
    pub fn from(own: impl Into<IpAddr>, address: SocketAddr) -> Client {
        Client::with(address, Some(own.into()), None)
    }

    /// Connects with the smallest receive buffer of the kernel, so that unread data stays in the gateway.
    pub fn slow(address: SocketAddr) -> Client {
        Client::with(address, None, Some(1))
    }

    /// The same with a receive buffer of this size, which the kernel doubles.
    pub fn with_receive_buffer(address: SocketAddr, bytes: usize) -> Client {
        Client::with(address, None, Some(bytes))
    }

    /// Connects to a unix socket.
    pub fn unix(path: &Path) -> Client {
        Client { wire: Wire::new(UnixStream::connect(path).expect("the unix socket to accept")) }
    }

    /// Connects with this local address and receive buffer, if given.
    pub fn with(address: SocketAddr, own: Option<IpAddr>, receive_buffer: Option<usize>) -> Client {
        Client { wire: Wire::new(connected(address, own, receive_buffer)) }
    }

    /// Its own address.
    pub fn address(&self) -> SocketAddr {
        self.wire.address()
    }

    /// The connection itself.
    pub fn into_wire(self) -> Wire {
        self.wire
    }

    /// Sends all of it.
    ///
    /// # Panics
    /// If the gateway has gone.
    pub fn send(&mut self, bytes: impl AsRef<[u8]>) {
        self.wire.send(bytes).expect("the gateway to take bytes");
    }

    /// Sends, even if the gateway has gone.
    pub fn try_send(&mut self, bytes: impl AsRef<[u8]>) -> bool {
        self.wire.send(bytes).is_ok()
    }

    /// Sends byte by byte with pauses until the gateway responds; returns whether all was sent.
    pub fn drip(&mut self, bytes: impl AsRef<[u8]>, pause: Duration) -> bool {
        self.wire.drip(bytes, pause)
    }

    /// Sends this repeatedly until the gateway accepts nothing for a while.
    pub fn fill(&mut self, piece: &[u8]) {
        self.wire.fill_up(piece);
    }

    /// The available bytes, once there are any.
    pub fn what_is_there(&mut self) -> Vec<u8> {
        self.wire.what_is_there()
    }

    /// Whether there are no unread bytes from the gateway.
    pub fn is_silent(&mut self) -> bool {
        self.wire.is_silent()
    }

    /// Pauses. Use it to simulate a slow client, never to wait for the gateway.
    pub fn dawdle(&mut self, pause: Duration) {
        std::thread::sleep(pause);
    }

    /// Requests a path and reads the response.
    pub fn get(&mut self, path: &str) -> Response {
        self.ask("GET", path, "", "")
    }

    /// Sends a request with a Content-Length body and reads the response. `fields` are header lines with CRLF.
    pub fn ask(&mut self, method: &str, path: &str, fields: &str, body: impl AsRef<[u8]>) -> Response {
        self.send(request(method, path, fields, body));
        self.response_to(method)
    }

    /// Reads the response to a request with a method other than HEAD.
    pub fn response(&mut self) -> Response {
        self.response_to("GET")
    }

    /// Reads the response to a request with this method; each interim response (1xx) counts as one.
    ///
    /// # Panics
    ///
    /// If the connection ends before the header.
    pub fn response_to(&mut self, method: &str) -> Response {
        self.try_response_to(method).expect("an answer before the connection closes")
    }

    /// The same; `None` if the connection ends before it.
    pub fn try_response_to(&mut self, method: &str) -> Option<Response> {
        let head = self.wire.head()?;
        let (body, end) = self.wire.body(head.response_framing(method));
        Some(Response { status: head.status(), head, body, end })
    }

    /// Reads this many raw bytes.
    pub fn bytes(&mut self, count: usize) -> Vec<u8> {
        self.wire.exactly(count).0
    }

    /// Waits until the gateway closes the connection; returns the bytes before that.
    pub fn rest(&mut self) -> Vec<u8> {
        self.wire.rest()
    }

    /// Waits until the gateway closes the connection without sending anything.
    pub fn closed(&mut self) {
        assert_eq!(String::from_utf8_lossy(&self.rest()), "", "something came before the connection closed");
    }

    /// Shuts down the sending side; it can still read.
    pub fn end(&mut self) {
        self.wire.end();
    }

    /// The same, even if the gateway has gone.
    pub fn try_end(&mut self) -> bool {
        self.wire.try_end()
    }

    /// Closes with a reset.
    pub fn reset(self) {
        self.wire.reset();
    }
}

/// A connected socket with this local address and receive buffer, if given.
fn connected(address: SocketAddr, own: Option<IpAddr>, receive_buffer: Option<usize>) -> Socket {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, None).expect("a socket");
    if let Some(own) = own {
        socket.bind(&SocketAddr::new(own, 0).into()).expect("an address of this machine");
    }
    if let Some(size) = receive_buffer {
        socket.set_recv_buffer_size(size).expect("a small buffer");
        // As on Ethernet. With 64 KiB segments on loopback, the kernel would buffer megabytes.
        socket.set_tcp_mss(SEGMENT_BYTES).expect("a segment size");
    }
    socket.connect_timeout(&address.into(), DEADLINE).expect("the gateway to accept");
    socket.set_tcp_nodelay(true).expect("no delay");
    socket
}

/// Sends a GET on a new connection.
pub fn get(address: SocketAddr, path: &str) -> Response {
    Client::connect(address).get(path)
}

/// An HTTP/1.1 request with `Host: test`. A body gets a Content-Length; an empty one gets none.
pub fn request(method: &str, path: &str, fields: &str, body: impl AsRef<[u8]>) -> Vec<u8> {
    let body = body.as_ref();
    let length = if body.is_empty() { String::new() } else { format!("Content-Length: {}\r\n", body.len()) };
    let mut bytes = format!("{method} {path} HTTP/1.1\r\nHost: test\r\n{fields}{length}\r\n").into_bytes();
    bytes.extend_from_slice(body);
    bytes
}

/// Chunked encoding with chunks of `size`, last chunk included.
pub fn chunked(body: &[u8], size: usize) -> Vec<u8> {
    let mut bytes = Vec::new();
    for piece in body.chunks(size) {
        bytes.extend_from_slice(format!("{:x}\r\n", piece.len()).as_bytes());
        bytes.extend_from_slice(piece);
        bytes.extend_from_slice(b"\r\n");
    }
    bytes.extend_from_slice(b"0\r\n\r\n");
    bytes
}

/// A client on one clear-text HTTP/2 connection, with prior knowledge.
pub struct H2Client {
    runtime: Runtime,
    send: SendRequest<Bytes>,
    socket: Socket,
}

/// A response of HTTP/2.
#[derive(Debug)]
pub struct H2Response {
    /// Its status.
    pub status: u16,
    /// Its header.
    pub headers: HeaderMap,
    /// Its body.
    pub body: Vec<u8>,
    /// `Cut` if the stream was reset.
    pub end: End,
}

impl H2Client {
    /// Connects and exchanges settings.
    pub fn connect(address: SocketAddr) -> H2Client {
        H2Client::with(address, None, None)
    }

    /// Connects from this local address: all of 127.0.0.0/8 is local.
    pub fn from(own: impl Into<IpAddr>, address: SocketAddr) -> H2Client {
        H2Client::with(address, Some(own.into()), None)
    }

    /// Connects with a flow control window of this size.
    pub fn narrow(address: SocketAddr, window: u32) -> H2Client {
        H2Client::with(address, None, Some(window))
    }

    /// Connects with this local address and window, if given.
    pub fn with(address: SocketAddr, own: Option<IpAddr>, window: Option<u32>) -> H2Client {
        let socket = connected(address, own, None);
        let mut settings = h2::client::Builder::new();
        if let Some(window) = window {
            settings.initial_window_size(window);
        }
        let stream = std::net::TcpStream::from(socket.try_clone().expect("a second handle"));
        stream.set_nonblocking(true).expect("a socket that never blocks");
        // A separate thread keeps the connection alive while the story does something else.
        let runtime = Builder::new_multi_thread().worker_threads(1).enable_all().build().expect("a runtime");
        let send = runtime.block_on(async {
            let stream = tokio::net::TcpStream::from_std(stream).expect("a stream");
            let (send, connection) = settings.handshake(stream).await.expect("a handshake of HTTP/2");
            tokio::spawn(connection);
            send
        });
        H2Client { runtime, send, socket }
    }

    /// Runs one step of an exchange.
    ///
    /// # Panics
    /// If it does not end before the deadline.
    pub fn step<T>(&self, step: impl Future<Output = T>) -> T {
        let limited = async { tokio::time::timeout(DEADLINE, step).await };
        self.runtime.block_on(limited).expect("an end of the step before the deadline")
    }

    /// Runs one step of an exchange briefly; `None` if it does not complete.
    pub fn soon<T>(&self, step: impl Future<Output = T>) -> Option<T> {
        self.runtime.block_on(async { tokio::time::timeout(Duration::from_millis(20), step).await }).ok()
    }

    /// Begins a request; `end`: it has no body.
    pub fn begin(&self, request: http::Request<()>, end: bool) -> (ResponseFuture, SendStream<Bytes>) {
        self.step(async {
            let mut send = self.send.clone().ready().await.expect("a ready connection");
            send.send_request(request, end).expect("a stream")
        })
    }

    /// The next interim response (1xx); `None` if the final response comes next.
    pub fn interim(&self, response: &mut ResponseFuture) -> Option<http::Response<()>> {
        self.step(poll_fn(|cx| response.poll_informational(cx))).map(|interim| interim.expect("an interim answer"))
    }

    /// Waits until the gateway has ended the connection.
    pub fn closed(&self) {
        let ended = || self.step(async { self.send.clone().ready().await.is_err().then_some(()) });
        eventually("the end of the connection", ended);
    }

    /// Whether the gateway has said that it takes no more requests on this connection.
    pub fn is_leaving(&self) -> bool {
        self.step(async { self.send.clone().ready().await.is_err() })
    }

    /// Closes with a reset.
    pub fn reset(self) {
        self.socket.set_linger(Some(Duration::ZERO)).expect("linger");
    }

    /// Requests a path and reads the response.
    pub fn get(&self, path: &str) -> H2Response {
        self.ask(http::Request::get(format!("http://test{path}")).body(()).expect("a request"), b"").expect("an answer")
    }

    /// Sends a request and reads the response, or returns the error.
    pub fn ask(&self, request: http::Request<()>, body: &[u8]) -> Result<H2Response, h2::Error> {
        let exchange = async {
            let mut send = self.send.clone().ready().await?;
            let (response, mut stream) = send.send_request(request, body.is_empty())?;
            if !body.is_empty() {
                stream.send_data(Bytes::copy_from_slice(body), true)?;
            }
            let (head, mut incoming) = response.await?.into_parts();
            let (mut body, mut end) = (Vec::new(), End::Complete);
            while let Some(piece) = incoming.data().await {
                let Ok(piece) = piece else {
                    end = End::Cut;
                    break;
                };
                incoming.flow_control().release_capacity(piece.len())?;
                body.extend_from_slice(&piece);
            }
            Ok(H2Response { status: head.status.as_u16(), headers: head.headers, body, end })
        };
        self.step(exchange)
    }

    /// The gateway's limit on concurrent streams, once it was received.
    pub fn streams_max(&self) -> usize {
        eventually("the settings of the gateway", || {
            Some(self.send.current_max_send_streams()).filter(|streams| *streams < 1_000_000)
        })
    }

    /// Begins a request and resets its stream as soon as `reached` is true.
    pub fn abandon(&self, path: &str, what: &str, reached: impl Fn() -> bool) {
        let request = http::Request::get(format!("http://test{path}")).body(()).expect("a request");
        self.runtime.block_on(async {
            let mut send = self.send.clone().ready().await.expect("a ready connection");
            let _given_up_at_the_end = send.send_request(request, true).expect("a stream");
            eventually(what, || reached().then_some(()));
        });
    }
}
