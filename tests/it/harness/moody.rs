//! A backend whose behaviour changes during a story while clients send requests, and these clients.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle, ScopedJoinHandle};
use std::time::{Duration, Instant};

use socket2::{Domain, Socket, Type};

use super::client::{Client, request};
use super::{Gateway, eventually, ms};

/// The behaviour of a backend.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Mood {
    /// Responds with 200 after this time.
    Well(Duration),
    /// Responds with 500 every n-th time, else with 200.
    Failing(usize),
    /// Accepts requests and never responds.
    Hung,
}

/// A backend with changeable behaviour.
pub struct Moody {
    address: SocketAddr,
    state: Arc<State>,
    accepting: Option<JoinHandle<()>>,
    /// Connections that fill the accept queue while it accepts nothing.
    deaf: Vec<Socket>,
}

struct State {
    mood: Mutex<Mood>,
    requests: AtomicUsize,
    stopped: AtomicBool,
    open: Mutex<Vec<TcpStream>>,
}

impl Moody {
    /// A healthy backend on its own loopback port.
    pub fn well() -> Moody {
        let state = State {
            mood: Mutex::new(Mood::Well(Duration::ZERO)),
            requests: AtomicUsize::new(0),
            stopped: AtomicBool::new(false),
            open: Mutex::default(),
        };
        let mut moody = Moody {
            address: SocketAddr::from(([127, 0, 0, 1], 0)),
            state: Arc::new(state),
            accepting: None,
            deaf: Vec::new(),
        };
        moody.listen();
        moody
    }

    /// Its address, even while it is stopped.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Number of received requests.
    pub fn requests(&self) -> usize {
        self.state.requests.load(Ordering::Relaxed)
    }

    /// Waits for this many more requests.
    pub fn wait_requests(&self, more: usize) {
        let wanted = self.requests() + more;
        let what = format!("{more} more requests at {}", self.address);
        eventually(&what, || (self.requests() >= wanted).then_some(()));
    }

    /// Sets its behaviour.
    pub fn set(&self, mood: Mood) {
        *self.state.mood.lock().unwrap() = mood;
    }

    /// Stops it: closes its connections and refuses new ones.
    pub fn kill(&mut self) {
        self.close_listener();
        for stream in self.state.open.lock().unwrap().drain(..) {
            // The peer may have closed it.
            let _ = stream.shutdown(Shutdown::Both);
        }
    }

    /// Starts it again at the same address, healthy.
    pub fn restart(&mut self) {
        self.kill();
        self.deaf.clear();
        self.set(Mood::Well(Duration::ZERO));
        self.listen();
    }

    /// It no longer responds to anything, not even to connection attempts.
    pub fn vanish(&mut self) {
        self.set(Mood::Hung);
        self.close_listener();
        let listener = Socket::new(Domain::IPV4, Type::STREAM, None).expect("a socket");
        listener.set_reuse_address(true).expect("an address to be used again");
        eventually("the address to be free", || listener.bind(&self.address.into()).ok());
        listener.listen(0).expect("to listen");
        self.deaf.push(listener);
        loop {
            let filler = Socket::new(Domain::IPV4, Type::STREAM, None).expect("a socket");
            match filler.connect_timeout(&self.address.into(), ms(100)) {
                Ok(()) => self.deaf.push(filler),
                Err(error) if error.kind() == ErrorKind::TimedOut => return,
                Err(error) => panic!("filling a queue of connections: {error}"),
            }
        }
    }

    fn listen(&mut self) {
        let listener = eventually("the address to be free", || TcpListener::bind(self.address).ok());
        self.address = listener.local_addr().expect("its address");
        self.state.stopped.store(false, Ordering::Relaxed);
        let state = Arc::clone(&self.state);
        self.accepting = Some(thread::spawn(move || {
            for stream in listener.incoming() {
                let stream = stream.expect("a connection");
                if state.stopped.load(Ordering::Relaxed) {
                    return;
                }
                stream.set_nodelay(true).expect("no delay");
                state.open.lock().unwrap().push(stream.try_clone().expect("a second handle"));
                let state = Arc::clone(&state);
                thread::spawn(move || serve(stream, &state));
            }
        }));
    }

    fn close_listener(&mut self) {
        if let Some(accepting) = self.accepting.take() {
            self.state.stopped.store(true, Ordering::Relaxed);
            let _wake = TcpStream::connect(self.address);
            accepting.join().expect("it to accept no more");
        }
    }
}

impl Drop for Moody {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Serves the requests of one connection; they have no bodies.
fn serve(mut stream: TcpStream, state: &State) {
    let (mut bytes, mut piece) = (Vec::new(), [0; 4096]);
    loop {
        while !bytes.ends_with(b"\r\n\r\n") {
            match stream.read(&mut piece) {
                Ok(read) if read > 0 => bytes.extend_from_slice(&piece[..read]),
                _ => return,
            }
        }
        bytes.clear();
        let number = state.requests.fetch_add(1, Ordering::Relaxed);
        let mood = *state.mood.lock().unwrap();
        let status = match mood {
            Mood::Well(pause) => {
                thread::sleep(pause);
                "200 OK"
            }
            Mood::Failing(every) if number.is_multiple_of(every) => "500 Internal Server Error",
            Mood::Failing(_) => "200 OK",
            // Another handle keeps it open.
            Mood::Hung => return,
        };
        if write!(stream, "HTTP/1.1 {status}\r\nContent-Length: 0\r\n\r\n").is_err() {
            return;
        }
    }
}

/// The results of some clients' requests.
#[derive(Debug, Default)]
pub struct Figures {
    /// The durations of successful requests.
    pub times: Vec<Duration>,
    /// The statuses of failed requests; 0: no response.
    pub failed: Vec<u16>,
}

impl Figures {
    /// The duration below which this percentage of requests took.
    pub fn percentile(&self, percent: usize) -> Duration {
        let mut times = self.times.clone();
        times.sort_unstable();
        times[(times.len() - 1) * percent / 100]
    }
}

/// Runs this many clients that send requests in a loop during the story.
pub fn under_load(gateway: &Gateway, clients: usize, story: impl FnOnce()) -> Figures {
    /// Stops the load even if the story panics.
    struct Over<'o>(&'o AtomicBool);
    impl Drop for Over<'_> {
        fn drop(&mut self) {
            self.0.store(true, Ordering::Relaxed);
        }
    }
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        let asking: Vec<ScopedJoinHandle<'_, Figures>> =
            (0..clients).map(|_| scope.spawn(|| ask(gateway, &over))).collect();
        {
            let _over = Over(&over);
            story();
        }
        let mut all = Figures::default();
        for figures in asking {
            let Figures { times, failed } = figures.join().expect("a client");
            all.times.extend(times);
            all.failed.extend(failed);
        }
        all
    })
}

fn ask(gateway: &Gateway, over: &AtomicBool) -> Figures {
    let (mut figures, mut client) = (Figures::default(), gateway.client());
    while !over.load(Ordering::Relaxed) {
        let began = Instant::now();
        let sent = client.try_send(request("GET", "/", "", ""));
        match sent.then(|| client.try_response_to("GET")).flatten() {
            Some(answer) if answer.status == 200 => figures.times.push(began.elapsed()),
            other => {
                figures.failed.push(other.map_or(0, |answer| answer.status));
                client = Client::connect(gateway.web());
            }
        }
    }
    figures
}
