//! The fast client: small GETs on keep-alive connections at a fixed rate, independent of the responses.
//!
//! It runs on its own thread, on the CPU of the load. It polls its few sockets itself, since the timers of an async
//! runtime are too coarse for latencies of a third of a millisecond.

use std::collections::VecDeque;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow};

use crate::latency::Sample;
use crate::machine::Place;
use crate::process::answer_is_short;
use crate::secure::{Link, Manner};

/// The rate.
#[derive(Clone, Copy)]
pub struct Pace {
    /// Time between two requests.
    pub interval: Duration,
    /// Number of connections. They are used in turn; on each, a request follows the response to the one before.
    pub connections: usize,
}

impl Pace {
    /// 1,000 requests a second on 64 connections.
    pub const USUAL: Pace = Pace { interval: Duration::from_millis(1), connections: 64 };
}

/// The requests, and the expected response.
#[derive(Clone, Copy)]
pub struct Question {
    /// The header of the request that is due at this time, for this address.
    pub header: fn(SocketAddr, Duration) -> String,
    /// The expected beginning of the response.
    pub answer: &'static [u8],
}

impl Question {
    /// A small GET with a 200 response.
    pub const SMALL: Question = Question {
        header: |address, _| format!("GET /small HTTP/1.1\r\nHost: {address}\r\n\r\n"),
        answer: b"HTTP/1.1 200",
    };
}

/// How long responses are awaited after the last request was due.
const PATIENCE: Duration = Duration::from_secs(15);

/// Maximum duration of one client, which limits its log.
const LONGEST: Duration = Duration::from_secs(300);

/// A running fast client.
pub struct FastClient {
    start: Instant,
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Result<Log>>,
}

/// The results of a client.
#[derive(Default)]
pub struct Log {
    /// All requests that were due.
    pub samples: Vec<Sample>,
    /// Number of requests without the expected response.
    pub failed: usize,
}

impl FastClient {
    /// Opens the connections and sends small GETs.
    pub fn start(place: Place, address: SocketAddr, manner: &Manner, pace: Pace) -> Result<FastClient> {
        FastClient::asking(place, address, manner, pace, Question::SMALL)
    }

    /// As [`FastClient::start`], with other requests.
    pub fn asking(
        place: Place,
        address: SocketAddr,
        manner: &Manner,
        pace: Pace,
        question: Question,
    ) -> Result<FastClient> {
        let open = |_| Lane::open(address, manner, question);
        let lanes = (0..pace.connections).map(open).collect::<Result<Vec<_>>>()?;
        let (start, stop) = (Instant::now(), Arc::new(AtomicBool::new(false)));
        let stopped = stop.clone();
        let thread = thread::Builder::new().name("fast client".to_owned()).spawn(move || {
            place.take()?;
            // By default, the kernel may wake this thread 50 µs late.
            // SAFETY: the call takes integers only and concerns this thread alone.
            unsafe { libc::prctl(libc::PR_SET_TIMERSLACK, 1) };
            run(lanes, pace.interval, start, &stopped)
        })?;
        Ok(FastClient { start, stop, thread })
    }

    /// Time since the start, which samples refer to.
    pub fn elapsed(&self) -> Duration {
        self.start.elapsed()
    }

    /// Waits until this time after the start.
    pub fn wait_until(&self, elapsed: Duration) {
        thread::sleep(elapsed.saturating_sub(self.elapsed()));
    }

    /// Stops sending, and waits for the outstanding responses.
    pub fn finish(self) -> Result<Log> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().map_err(|_| anyhow!("the fast client panicked"))?
    }
}

/// A connection and its due requests. The first of them is active.
struct Lane {
    address: SocketAddr,
    manner: Manner,
    question: Question,
    stream: Link,
    due: VecDeque<Duration>,
    answer: Vec<u8>,
}

fn run(mut lanes: Vec<Lane>, interval: Duration, start: Instant, stop: &AtomicBool) -> Result<Log> {
    let mut log = Log::default();
    let (mut next, mut last_call) = (0, None);
    loop {
        let now = start.elapsed();
        if last_call.is_none() && (stop.load(Ordering::Relaxed) || now > LONGEST) {
            last_call = Some(now + PATIENCE);
        }
        while last_call.is_none() && interval * next <= now {
            let turn = next as usize % lanes.len();
            let lane = &mut lanes[turn];
            lane.due.push_back(interval * next);
            if lane.due.len() == 1 {
                lane.reopen_if_closed();
                lane.ask(start, &mut log);
            }
            next += 1;
        }
        let wait = match last_call {
            None => (interval * next).saturating_sub(start.elapsed()),
            Some(last) if now > last || lanes.iter().all(|lane| lane.due.is_empty()) => break,
            Some(_) => Duration::from_millis(50),
        };
        for index in readable(&lanes, wait)? {
            lanes[index].hear(start, &mut log);
        }
    }
    for lane in &mut lanes {
        while !lane.due.is_empty() {
            lane.record(start, &mut log);
            log.failed += 1;
        }
    }
    Ok(log)
}

/// The lanes that await a response and are readable, within `wait`.
fn readable(lanes: &[Lane], wait: Duration) -> io::Result<Vec<usize>> {
    let asked: Vec<usize> = (0..lanes.len()).filter(|&index| !lanes[index].due.is_empty()).collect();
    let event = |&index: &usize| libc::pollfd {
        fd: lanes[index].stream.socket().as_raw_fd(),
        events: libc::POLLIN,
        revents: 0,
    };
    let mut events: Vec<libc::pollfd> = asked.iter().map(event).collect();
    let timeout = libc::timespec { tv_sec: wait.as_secs() as _, tv_nsec: wait.subsec_nanos().into() };
    // SAFETY: the kernel reads the timespec, and reads and writes as many pollfds as the length says; all outlive the
    // call.
    let ready = unsafe { libc::ppoll(events.as_mut_ptr(), events.len() as _, &timeout, std::ptr::null()) };
    match ready {
        0.. => Ok(asked.iter().zip(&events).filter(|(_, event)| event.revents != 0).map(|(&index, _)| index).collect()),
        _ => match io::Error::last_os_error() {
            interrupted if interrupted.kind() == ErrorKind::Interrupted => Ok(Vec::new()),
            error => Err(error),
        },
    }
}

impl Lane {
    fn open(address: SocketAddr, manner: &Manner, question: Question) -> Result<Lane> {
        let stream = manner.open(address)?;
        stream.socket().set_nonblocking(true)?;
        Ok(Lane { address, manner: manner.clone(), question, stream, due: VecDeque::new(), answer: Vec::new() })
    }

    /// Sends the first due request. A request this small always fits into the kernel's buffer.
    fn ask(&mut self, start: Instant, log: &mut Log) {
        while let Some(&due) = self.due.front() {
            let request = (self.question.header)(self.address, due);
            if self.stream.write_all(request.as_bytes()).is_ok() {
                return;
            }
            self.fail(start, log);
        }
    }

    fn hear(&mut self, start: Instant, log: &mut Log) {
        let mut buffer = [0; 4096];
        match self.stream.read(&mut buffer) {
            Ok(read) if read > 0 => self.answer.extend_from_slice(&buffer[..read]),
            Err(error) if error.kind() == ErrorKind::WouldBlock => return,
            _ => {
                self.fail(start, log);
                return self.ask(start, log);
            }
        }
        if answer_is_short(&self.answer).unwrap_or(false) {
            return;
        }
        if !self.answer.starts_with(self.question.answer) {
            log.failed += 1;
        }
        self.record(start, log);
        self.ask(start, log);
    }

    fn record(&mut self, start: Instant, log: &mut Log) {
        self.answer.clear();
        if let Some(due) = self.due.pop_front() {
            log.samples.push(Sample { due, latency: start.elapsed() - due });
        }
    }

    /// The active request is lost, and the next one needs a new connection. If none can be opened, the requests that
    /// tried it count as failed as well.
    fn fail(&mut self, start: Instant, log: &mut Log) {
        log.failed += usize::from(!self.due.is_empty());
        self.record(start, log);
        self.reopen();
    }

    /// A connection that the proxy has closed since its last response cannot be used for another request.
    fn reopen_if_closed(&mut self) {
        let closed = match self.stream.socket().peek(&mut [0]) {
            // TLS may send records of its own, such as a ticket. In clear text, unexpected bytes are no response to a
            // request.
            Ok(1..) => !self.manner.tls,
            Ok(_) => true,
            Err(error) => error.kind() != ErrorKind::WouldBlock,
        };
        if closed {
            self.reopen();
        }
    }

    fn reopen(&mut self) {
        let reopened = || -> Result<Link> {
            let socket = TcpStream::connect_timeout(&self.address, Duration::from_millis(100))?;
            let stream = self.manner.secure(socket)?;
            stream.socket().set_nonblocking(true)?;
            Ok(stream)
        };
        if let Ok(stream) = reopened() {
            self.stream = stream;
        }
    }
}
