//! The slow clients: many connections in one thread, which reads from each at a fixed rate, or not at all.

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use socket2::{Domain, Socket, Type};

use crate::machine::Place;

/// The announced size of an upload, and the number of bytes sent before the pause.
const UPLOAD_BYTES: usize = 1 << 20;
const SENT_BYTES: usize = 16 << 10;

/// A reader's receive buffer, set before it connects so that the initial window is small. The kernel doubles it for its
/// own bookkeeping.
const RECEIVE_BUFFER_BYTES: usize = 16 << 10;

/// The size of a read, and the number of reads per second: 20 KiB/s.
const PIECE_BYTES: usize = 5 << 10;
const PIECES_PER_SECOND: u32 = 4;

/// Readers take turns within the interval of a read, in this number of groups.
const GROUPS: u32 = 25;

/// Maximum time of a connect or of sending a request.
const PATIENCE: Duration = Duration::from_secs(10);

/// Maximum duration of reading.
const LONGEST: Duration = Duration::from_secs(120);

/// Clients that have sent the beginning of an upload and hold their connections open.
pub struct Uploaders(Vec<TcpStream>);

impl Uploaders {
    /// Opens `count` connections, one after the other, as fast as they are accepted.
    pub fn arrive(place: Place, count: usize, address: SocketAddr) -> Result<Uploaders> {
        let head = format!("POST /upload HTTP/1.1\r\nHost: {address}\r\nContent-Length: {UPLOAD_BYTES}\r\n\r\n");
        let begun = [head.into_bytes(), vec![b'x'; SENT_BYTES]].concat();
        let arrive = || -> Result<TcpStream> {
            let mut stream = TcpStream::connect_timeout(&address, PATIENCE)?;
            stream.set_write_timeout(Some(PATIENCE))?;
            stream.write_all(&begun)?;
            stream.set_nonblocking(true)?;
            Ok(stream)
        };
        let all_arrive = || -> Result<Vec<TcpStream>> {
            place.take()?;
            (0..count).map(|_| arrive()).collect::<Result<_>>().context("an uploader")
        };
        let streams = thread::scope(|scope| scope.spawn(all_arrive).join());
        Ok(Uploaders(streams.map_err(|_| anyhow!("the uploaders panicked"))??))
    }

    /// The number of clients that got a response or were cut off before they continued. It must be small for meaningful
    /// figures.
    pub fn lost(&self) -> usize {
        let waits =
            |stream: &TcpStream| matches!(stream.peek(&mut [0]), Err(error) if error.kind() == ErrorKind::WouldBlock);
        self.0.iter().filter(|stream| !waits(stream)).count()
    }
}

/// Clients that read a large response slowly.
pub struct Readers {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Result<Tally>>,
}

/// The results of the readers.
#[derive(Debug, Default)]
pub struct Tally {
    /// Time until the last reader has sent its request.
    pub arrived_within: Duration,
    /// Bytes that all readers have read.
    pub bytes: u64,
    /// Duration of reading.
    pub time: Duration,
    /// Number of readers that were refused or cut off.
    pub lost: usize,
}

impl Readers {
    /// Opens `count` connections at once, and starts to read.
    pub fn arrive(place: Place, count: usize, address: SocketAddr) -> Result<Readers> {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let thread = thread::Builder::new().name("slow readers".to_owned()).spawn(move || {
            place.take()?;
            read_slowly(count, address, &stopped)
        })?;
        Ok(Readers { stop, thread })
    }

    /// Closes all connections.
    pub fn finish(self) -> Result<Tally> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().map_err(|_| anyhow!("the slow readers panicked"))?
    }
}

struct Reader {
    stream: TcpStream,
    answered: bool,
    lost: bool,
}

fn read_slowly(count: usize, address: SocketAddr, stop: &AtomicBool) -> Result<Tally> {
    let start = Instant::now();
    let mut readers = (0..count).map(|_| Reader::arrive(address)).collect::<Result<Vec<_>>>().context("a reader")?;
    let mut tally = Tally { arrived_within: start.elapsed(), ..Tally::default() };
    let (start, mut buffer) = (Instant::now(), vec![0; PIECE_BYTES]);
    let mut turn = 0;
    while !stop.load(Ordering::Relaxed) && start.elapsed() < LONGEST {
        for reader in readers.iter_mut().skip((turn % GROUPS) as usize).step_by(GROUPS as usize) {
            tally.bytes += reader.read(&mut buffer) as u64;
        }
        turn += 1;
        let next = Duration::from_secs(1) * turn / (PIECES_PER_SECOND * GROUPS);
        thread::sleep(next.saturating_sub(start.elapsed()));
    }
    tally.time = start.elapsed();
    tally.lost = readers.iter().filter(|reader| reader.lost).count();
    Ok(tally)
}

impl Reader {
    fn arrive(address: SocketAddr) -> Result<Reader> {
        let socket = Socket::new(Domain::for_address(address), Type::STREAM, None)?;
        socket.set_recv_buffer_size(RECEIVE_BUFFER_BYTES)?;
        socket.connect_timeout(&address.into(), PATIENCE)?;
        let mut stream = TcpStream::from(socket);
        stream.set_write_timeout(Some(PATIENCE))?;
        stream.write_all(format!("GET /4m HTTP/1.1\r\nHost: {address}\r\n\r\n").as_bytes())?;
        stream.set_nonblocking(true)?;
        Ok(Reader { stream, answered: false, lost: false })
    }

    /// Reads an available piece; returns its size.
    fn read(&mut self, buffer: &mut [u8]) -> usize {
        if self.lost {
            return 0;
        }
        match self.stream.read(buffer) {
            Ok(read) if read > 0 && (self.answered || buffer.starts_with(b"HTTP/1.1 200")) => {
                self.answered = true;
                read
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => 0,
            // No reader reaches the end of 4 MiB within a sample.
            _ => {
                self.lost = true;
                0
            }
        }
    }
}
