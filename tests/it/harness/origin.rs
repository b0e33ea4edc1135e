//! The backend of a story: raw sockets that respond, stall, misbehave or close as the story says.

use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use forebay::origin::{Detour, Running};
use socket2::{Domain, Socket, Type};

use super::wire::{Framing, Head, Request, Wire, find};
use super::{DEADLINE, ms};

/// A backend on a loopback port of its own.
pub struct Origin {
    address: SocketAddr,
    accepted: Receiver<Connection>,
    seen: Arc<Seen>,
}

/// What an origin received.
#[derive(Default)]
struct Seen {
    connections: Mutex<usize>,
    requests: Mutex<Vec<Request>>,
    answered: Mutex<usize>,
}

/// One connection to an origin, controlled by the story.
pub struct Connection {
    wire: Wire,
    seen: Arc<Seen>,
}

/// An address where connections fail.
pub struct Closed {
    address: SocketAddr,
    _held: Vec<Socket>,
}

impl Origin {
    /// An origin whose connections the story handles itself: see [`Origin::accept`].
    pub fn scripted() -> Origin {
        Origin::start(|connection, accepted| {
            let _ = accepted.send(connection);
        })
    }

    /// An origin that responds to each request at once with the bytes from `answer`, and keeps connections. For
    /// HEAD it sends the header only.
    pub fn answering(answer: impl Fn(&Request) -> Vec<u8> + Send + Sync + 'static) -> Origin {
        Origin::start(answer_all(answer))
    }

    /// An origin that responds with 200 and its `name`.
    pub fn named(name: &'static str) -> Origin {
        Origin::answering(move |_| ok(name))
    }

    /// An origin that responds to this many requests of a connection, reads one more, and closes.
    pub fn closing_after(answers: usize) -> Origin {
        Origin::start(move |mut connection, _| {
            thread::spawn(move || {
                for _ in 0..answers {
                    if connection.next_request().is_none() || connection.wire.send(ok("ok")).is_err() {
                        return;
                    }
                }
                let _ = connection.next_request();
            });
        })
    }

    /// An origin that handles every connection with this function, each on its own thread.
    pub fn playing(play: impl Fn(Connection) + Send + Sync + 'static) -> Origin {
        let play = Arc::new(play);
        Origin::start(move |connection, _| {
            let play = play.clone();
            thread::spawn(move || play(connection));
        })
    }

    /// An origin that responds to one request per connection with the bytes from `answer`, and closes. For HEAD it
    /// sends the header only.
    pub fn answering_once(answer: impl Fn(&Request) -> Vec<u8> + Send + Sync + 'static) -> Origin {
        let answer = Arc::new(answer);
        Origin::start(move |mut connection, _| {
            let answer = answer.clone();
            thread::spawn(move || {
                if let Some(request) = connection.next_request() {
                    // The story checks whether the gateway accepts all of it.
                    let _ = connection.wire.send(without_body(&request, answer(&request)));
                }
            });
        })
    }

    /// The same on a socket of the story's.
    pub fn named_on(listener: TcpListener, name: &'static str) -> Origin {
        let serve = answer_all(move |_| ok(name));
        Origin::start_on(listener, serve)
    }

    fn start(serve: impl Fn(Connection, &Sender<Connection>) + Send + 'static) -> Origin {
        Origin::start_on(TcpListener::bind("127.0.0.1:0").expect("a port for the origin"), serve)
    }

    fn start_on(listener: TcpListener, serve: impl Fn(Connection, &Sender<Connection>) + Send + 'static) -> Origin {
        let address = listener.local_addr().expect("its address");
        let seen = Arc::new(Seen::default());
        let (sender, accepted) = channel();
        let noted = seen.clone();
        thread::spawn(move || {
            for stream in listener.incoming() {
                let stream: TcpStream = stream.expect("a connection to the origin");
                stream.set_nodelay(true).expect("no delay");
                *noted.connections.lock().unwrap() += 1;
                serve(Connection { wire: Wire::new(stream), seen: noted.clone() }, &sender);
            }
        });
        Origin { address, accepted, seen }
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Waits for the next connection.
    ///
    /// # Panics
    ///
    /// On timeout.
    pub fn accept(&self) -> Connection {
        self.accepted.recv_timeout(DEADLINE).expect("a connection to the origin")
    }

    /// The next connection, if it is there already.
    pub fn try_accept(&self) -> Option<Connection> {
        self.accepted.try_recv().ok()
    }

    /// Number of connections made to it.
    pub fn connections(&self) -> usize {
        *self.seen.connections.lock().unwrap()
    }

    /// Number of responses that the kernel has accepted completely.
    pub fn answered(&self) -> usize {
        *self.seen.answered.lock().unwrap()
    }

    /// All received requests, in order.
    pub fn requests(&self) -> Vec<Request> {
        self.seen.requests.lock().unwrap().clone()
    }

    /// The only request it received.
    ///
    /// # Panics
    ///
    /// If it received none, or several.
    pub fn request(&self) -> Request {
        let mut requests = self.requests();
        assert_eq!(requests.len(), 1, "requests that came to the origin");
        requests.remove(0)
    }
}

/// Serves each connection on its own thread.
fn answer_all(
    answer: impl Fn(&Request) -> Vec<u8> + Send + Sync + 'static,
) -> impl Fn(Connection, &Sender<Connection>) + Send + 'static {
    let answer = Arc::new(answer);
    move |mut connection, _| {
        let answer = answer.clone();
        thread::spawn(move || {
            while let Some(request) = connection.next_request() {
                if connection.wire.send(without_body(&request, answer(&request))).is_err() {
                    return;
                }
                *connection.seen.answered.lock().unwrap() += 1;
            }
        });
    }
}

/// A response as sent: for HEAD, only its header.
fn without_body(request: &Request, mut answer: Vec<u8>) -> Vec<u8> {
    if let Some(end) = find(&answer, b"\r\n\r\n").filter(|_| request.method() == "HEAD") {
        answer.truncate(end + 4);
    }
    answer
}

impl Connection {
    /// Reads a whole request; `None` if the peer closed instead.
    pub fn next_request(&mut self) -> Option<Request> {
        let head = self.wire.head()?;
        let framing = head.request_framing();
        let (body, end) = self.wire.body(framing);
        let trailers = if framing == Framing::Chunked { self.wire.trailers().to_vec() } else { Vec::new() };
        let request = Request { head, body, end, trailers };
        self.seen.requests.lock().unwrap().push(request.clone());
        Some(request)
    }

    /// Reads a whole request.
    pub fn request(&mut self) -> Request {
        self.next_request().expect("a request at the origin")
    }

    /// Reads the header of a request and leaves its body unread.
    pub fn header(&mut self) -> Head {
        self.wire.head().expect("a request header at the origin")
    }

    /// Reads this many raw bytes of a body.
    pub fn bytes(&mut self, count: usize) -> Vec<u8> {
        self.wire.exactly(count).0
    }

    /// Sends all bytes.
    ///
    /// # Panics
    ///
    /// If the gateway does not accept them.
    pub fn send(&mut self, bytes: impl AsRef<[u8]>) {
        self.wire.send(bytes).expect("the gateway to take bytes");
    }

    /// Sends as long as the gateway accepts data; returns whether it accepted all.
    pub fn try_send(&mut self, bytes: impl AsRef<[u8]>) -> bool {
        self.wire.send(bytes).is_ok()
    }

    /// Sends byte by byte with pauses until the gateway sends something; returns whether all was sent.
    pub fn drip(&mut self, bytes: impl AsRef<[u8]>, pause: Duration) -> bool {
        self.wire.drip(bytes, pause)
    }

    /// Sends a whole response with this body.
    pub fn answer(&mut self, body: impl AsRef<[u8]>) {
        self.send(ok(body));
    }

    /// The socket, for another protocol.
    pub fn into_socket(self) -> Socket {
        self.wire.into_socket()
    }

    /// The connection itself.
    pub fn into_wire(self) -> Wire {
        self.wire
    }

    /// Closes it.
    pub fn close(self) {}

    /// Closes it with a reset.
    pub fn reset(self) {
        self.wire.reset();
    }

    /// Waits until the gateway closes it.
    pub fn closed(&mut self) {
        self.wire.rest();
    }
}

impl Closed {
    /// An address that refuses connections; the port stays reserved while this lives.
    pub fn refusing() -> Closed {
        let socket = bound();
        Closed { address: address_of(&socket), _held: vec![socket] }
    }

    /// An address that never accepts: it listens, but its accept queue is full.
    pub fn silent() -> Closed {
        let listener = bound();
        listener.listen(0).expect("to listen");
        let address = address_of(&listener);
        let mut held = vec![listener];
        loop {
            let filler = Socket::new(Domain::IPV4, Type::STREAM, None).expect("a socket");
            match filler.connect_timeout(&address.into(), ms(100)) {
                Ok(()) => held.push(filler),
                Err(e) if e.kind() == io::ErrorKind::TimedOut => return Closed { address, _held: held },
                Err(e) => panic!("filling a queue of connections: {e}"),
            }
        }
    }

    /// The address.
    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

fn bound() -> Socket {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None).expect("a socket");
    socket.bind(&SocketAddr::from(([127, 0, 0, 1], 0)).into()).expect("a loopback port");
    socket
}

fn address_of(socket: &Socket) -> SocketAddr {
    socket.local_addr().ok().and_then(|address| address.as_socket()).expect("its address")
}

/// The built-in test origin, for bodies too large to keep.
pub fn built_in() -> Running {
    running(&Arc::default())
}

/// Two test origins: whichever is asked first responds once as for `path`.
pub fn first_fails(path: &str) -> [Running; 2] {
    let detour = Detour::of_first(1, path.parse().expect("a path"));
    [(); 2].map(|()| running(&detour))
}

fn running(detour: &Arc<Detour>) -> Running {
    let origin = forebay::origin::Origin::bind("127.0.0.1:0").expect("a port for the origin");
    origin.detour(detour).spawn().expect("an origin")
}

/// A whole response: 200, with its length.
pub fn ok(body: impl AsRef<[u8]>) -> Vec<u8> {
    response("200 OK", "", body)
}

/// A whole response with its length; `fields` are further header lines with CRLF.
pub fn response(status: &str, fields: &str, body: impl AsRef<[u8]>) -> Vec<u8> {
    let body = body.as_ref();
    let mut bytes = format!("HTTP/1.1 {status}\r\n{fields}Content-Length: {}\r\n\r\n", body.len()).into_bytes();
    bytes.extend_from_slice(body);
    bytes
}
