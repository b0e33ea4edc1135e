//! The built-in test origin: a small HTTP/1.1 server whose behaviour, correct or faulty, the path selects.
//!
//! It is the endpoint in `forebay run --demo` and in tests, and runs alone as `forebay origin`. It uses plain sockets
//! because no HTTP library can produce its faults. It is not meant for production, but has limits: 10,000 connections,
//! 64 KiB and 128 fields of header, and one minute without progress of the peer.
//!
//! ```text
#![doc = include_str!("origin/paths.txt")]
//! ```
//!
//! `behaviour` parses the path, and `answer` and `websocket` carry it out. `wire` is the connection. `digest` compares
//! received bytes with sent ones.

mod answer;
mod behaviour;
mod digest;
mod websocket;
mod wire;

use std::future::Future;
use std::io;
use std::net::{SocketAddr, TcpListener, ToSocketAddrs};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use http::Uri;
use tokio::net::TcpStream;
use tokio::runtime::{Builder, Runtime};
use tokio::sync::{Semaphore, oneshot};

pub use behaviour::{content, content_from};
pub use digest::Digest;

/// The description of each path, for `/` and `forebay origin --help`.
pub const PATHS: &str = include_str!("origin/paths.txt");

/// Maximum number of open connections. Further ones wait in the kernel's queue.
const CONNECTIONS_MAX: usize = 10_000;

/// The pause after a failed `accept`. It prevents a busy loop while file descriptors are exhausted.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// A test origin that listens, but does not respond yet.
pub struct Origin {
    listener: TcpListener,
    address: SocketAddr,
    counters: Arc<Counters>,
    detour: Arc<Detour>,
}

/// A fault for the first requests only, counted over all origins that share it: the first endpoint that a gateway
/// selects fails, and the next one does not.
#[derive(Default)]
pub struct Detour {
    left: AtomicU64,
    target: Uri,
}

impl Detour {
    /// The first `count` requests receive the response for `target`, such as `/fault/reset/64KiB`.
    pub fn of_first(count: u64, target: Uri) -> Arc<Detour> {
        Arc::new(Detour { left: AtomicU64::new(count), target })
    }

    /// The target for this request: the detour's, or the request's own `target`.
    fn of<'t>(&'t self, target: &'t Uri) -> &'t Uri {
        let strikes = self.left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1));
        if strikes.is_ok() { &self.target } else { target }
    }
}

impl Origin {
    /// Listens on `address`; port 0 selects a free port.
    ///
    /// # Errors
    ///
    /// If the address cannot be resolved, or listening on it fails.
    pub fn bind(address: impl ToSocketAddrs) -> io::Result<Origin> {
        let listener = TcpListener::bind(address)?;
        listener.set_nonblocking(true)?;
        let address = listener.local_addr()?;
        Ok(Origin { listener, address, counters: Arc::default(), detour: Arc::default() })
    }

    /// Applies `detour` to its first requests.
    pub fn detour(self, detour: &Arc<Detour>) -> Origin {
        Origin { detour: detour.clone(), ..self }
    }

    /// The address of the listener.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Serves requests on a thread of its own until the returned handle is dropped.
    ///
    /// # Errors
    ///
    /// If the thread or its event loop cannot be created.
    pub fn spawn(self) -> io::Result<Running> {
        let (stop, stopped) = oneshot::channel::<()>();
        let (address, counters) = (self.address, self.counters.clone());
        let runtime = event_loop()?;
        let thread = thread::Builder::new().name("origin".to_owned()).spawn(move || {
            // The channel carries no messages; it closes when the handle is dropped.
            let served = runtime.block_on(self.serve(async move { _ = stopped.await }));
            if let Err(error) = served {
                tracing::error!(%error, "the test origin stopped");
            }
        })?;
        Ok(Running { address, counters, stop: Some(stop), thread: Some(thread) })
    }

    /// Serves requests on this thread until `stop` completes.
    ///
    /// # Errors
    ///
    /// If the event loop cannot be created. A failed connection is not an error.
    pub fn run(self, stop: impl Future<Output = ()>) -> io::Result<()> {
        event_loop()?.block_on(self.serve(stop))
    }

    async fn serve(self, stop: impl Future<Output = ()>) -> io::Result<()> {
        let listener = tokio::net::TcpListener::from_std(self.listener)?;
        tokio::select! {
            () = accept(listener, self.counters, self.detour) => {}
            () = stop => {}
        }
        Ok(())
    }
}

/// A running test origin. It stops on drop.
pub struct Running {
    address: SocketAddr,
    counters: Arc<Counters>,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Running {
    /// The address of the listener.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Number of requests with a complete header, since the start.
    pub fn requests(&self) -> u64 {
        self.counters.requests.load(Ordering::Relaxed)
    }

    /// Number of open connections.
    pub fn connections(&self) -> u64 {
        self.counters.connections.load(Ordering::Relaxed)
    }

    /// Number of accepted connections since the start.
    pub fn accepted(&self) -> u64 {
        self.counters.accepted.load(Ordering::Relaxed)
    }

    /// Number of requests in progress: the kernel has not accepted their whole response yet.
    pub fn busy(&self) -> u64 {
        self.counters.busy.load(Ordering::Relaxed)
    }

    /// Bytes of request bodies since the start, without their framing.
    pub fn body_bytes(&self) -> u64 {
        self.counters.body_bytes.load(Ordering::Relaxed)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            // The thread has already printed its panic, if any, to stderr.
            let _ = thread.join();
        }
    }
}

/// The counters for tests.
#[derive(Default)]
struct Counters {
    requests: AtomicU64,
    connections: AtomicU64,
    accepted: AtomicU64,
    busy: AtomicU64,
    body_bytes: AtomicU64,
}

/// Counts a request, as in progress until this is dropped.
struct Busy<'c>(&'c Counters);

impl<'c> Busy<'c> {
    fn new(counters: &'c Counters) -> Self {
        counters.requests.fetch_add(1, Ordering::Relaxed);
        counters.busy.fetch_add(1, Ordering::Relaxed);
        Busy(counters)
    }
}

impl Drop for Busy<'_> {
    fn drop(&mut self) {
        self.0.busy.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Counts an open connection until this is dropped.
struct Open(Arc<Counters>);

impl Open {
    fn new(counters: Arc<Counters>) -> Self {
        counters.accepted.fetch_add(1, Ordering::Relaxed);
        counters.connections.fetch_add(1, Ordering::Relaxed);
        Open(counters)
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.0.connections.fetch_sub(1, Ordering::Relaxed);
    }
}

/// One thread is sufficient for a test origin, and leaves the other cores to the tested gateway.
fn event_loop() -> io::Result<Runtime> {
    Builder::new_current_thread().enable_all().build()
}

async fn accept(listener: tokio::net::TcpListener, counters: Arc<Counters>, detour: Arc<Detour>) {
    let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    // The semaphore is never closed, so acquiring it cannot fail.
    while let Ok(place) = places.clone().acquire_owned().await {
        match listener.accept().await {
            Ok((stream, _)) => {
                let open = Open::new(counters.clone());
                let detour = detour.clone();
                tokio::spawn(async move {
                    converse(stream, &open.0, &detour).await;
                    drop((open, place));
                });
            }
            Err(error) => {
                tracing::warn!(%error, "the test origin could not accept a connection");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

/// Serves one connection, request by request, until either side closes it.
async fn converse(stream: TcpStream, counters: &Counters, detour: &Detour) {
    let mut wire = wire::Wire::new(stream);
    loop {
        let answered = match wire.request().await {
            Ok(None) => return,
            Ok(Some(request)) => {
                let _busy = Busy::new(counters);
                answer::answer(&mut wire, &request, detour.of(&request.target), counters).await
            }
            Err(broken) => Err(broken),
        };
        match answered {
            Ok(answer::Next::Request) => {}
            Ok(answer::Next::Close) => return,
            Err(broken) => return answer::give_up(&mut wire, broken).await,
        }
    }
}
