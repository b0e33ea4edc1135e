//! The built-in test origin: a small HTTP/1.1 server whose path says how it behaves, well or badly.
//!
//! It stands behind the gateway in `forebay run --demo` and in tests, and alone as `forebay origin`. It is written
//! on bare sockets because no HTTP library would agree to misbehave as it must. Nothing in it is meant for
//! production; it is bounded all the same: 10,000 connections, 64 KiB and 128 fields of header, and one minute
//! for a peer that sends or takes nothing.
//!
//! ```text
#![doc = include_str!("origin/paths.txt")]
//! ```
//!
//! The path is understood in `behaviour`, carried out in `answer` and `websocket`; `wire` is the connection, and
//! `digest` compares what came with what was sent.

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

/// What each path does, as `/` and `forebay origin --help` tell it.
pub const PATHS: &str = include_str!("origin/paths.txt");

/// Connections that are open at once; further ones wait in the kernel's queue.
const CONNECTIONS_MAX: usize = 10_000;

/// A pause after a failed `accept`, so that a lack of file descriptors does not become a busy loop.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// A test origin that listens, but does not answer yet.
pub struct Origin {
    listener: TcpListener,
    address: SocketAddr,
    counters: Arc<Counters>,
    detour: Arc<Detour>,
}

/// A mishap that befalls the first requests and no more, of all origins together that share it: whichever endpoint a
/// gateway asks first, that one fails and the next one does not.
#[derive(Default)]
pub struct Detour {
    left: AtomicU64,
    target: Uri,
}

impl Detour {
    /// The first `count` requests are answered as if they had asked for `target`, such as `/fault/reset/64KiB`.
    pub fn of_first(count: u64, target: Uri) -> Arc<Detour> {
        Arc::new(Detour { left: AtomicU64::new(count), target })
    }

    /// What this request is to be answered as, which is taken to ask for `target`.
    fn of<'t>(&'t self, target: &'t Uri) -> &'t Uri {
        let strikes = self.left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1));
        if strikes.is_ok() { &self.target } else { target }
    }
}

impl Origin {
    /// Listens on `address`; port 0 is a free one.
    ///
    /// # Errors
    /// Those of resolving the address and of listening on it.
    pub fn bind(address: impl ToSocketAddrs) -> io::Result<Origin> {
        let listener = TcpListener::bind(address)?;
        listener.set_nonblocking(true)?;
        let address = listener.local_addr()?;
        Ok(Origin { listener, address, counters: Arc::default(), detour: Arc::default() })
    }

    /// Lets a mishap befall its first requests.
    pub fn detour(self, detour: &Arc<Detour>) -> Origin {
        Origin { detour: detour.clone(), ..self }
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Answers on a thread of its own, until the returned handle is dropped.
    ///
    /// # Errors
    /// When the thread or its event loop cannot be made.
    pub fn spawn(self) -> io::Result<Running> {
        let (stop, stopped) = oneshot::channel::<()>();
        let (address, counters) = (self.address, self.counters.clone());
        let runtime = event_loop()?;
        let thread = thread::Builder::new().name("origin".to_owned()).spawn(move || {
            // The channel carries nothing: it ends when the handle is dropped.
            let served = runtime.block_on(self.serve(async move { _ = stopped.await }));
            if let Err(error) = served {
                tracing::error!(%error, "the test origin stopped");
            }
        })?;
        Ok(Running { address, counters, stop: Some(stop), thread: Some(thread) })
    }

    /// Answers on this thread, until `stop` is done.
    ///
    /// # Errors
    /// When the event loop cannot be made; a connection that fails is no error.
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

/// A test origin that answers, until this is dropped.
pub struct Running {
    address: SocketAddr,
    counters: Arc<Counters>,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Running {
    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Requests whose header came whole, since it was started.
    pub fn requests(&self) -> u64 {
        self.counters.requests.load(Ordering::Relaxed)
    }

    /// Connections that are open now.
    pub fn connections(&self) -> u64 {
        self.counters.connections.load(Ordering::Relaxed)
    }

    /// Connections accepted since it was started.
    pub fn accepted(&self) -> u64 {
        self.counters.accepted.load(Ordering::Relaxed)
    }

    /// Requests that were begun and whose answer the kernel has not taken whole.
    pub fn busy(&self) -> u64 {
        self.counters.busy.load(Ordering::Relaxed)
    }

    /// Bytes of request bodies that came since it was started, freed from their framing.
    pub fn body_bytes(&self) -> u64 {
        self.counters.body_bytes.load(Ordering::Relaxed)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            // Its panic, if it had one, is on stderr already.
            let _ = thread.join();
        }
    }
}

/// What tests ask an origin about.
#[derive(Default)]
struct Counters {
    requests: AtomicU64,
    connections: AtomicU64,
    accepted: AtomicU64,
    busy: AtomicU64,
    body_bytes: AtomicU64,
}

/// Counts a request, which is in the works for as long as this lives.
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

/// Counts one open connection for as long as it lives.
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

/// One thread is enough for a test origin, and leaves the other cores to what is tested.
fn event_loop() -> io::Result<Runtime> {
    Builder::new_current_thread().enable_all().build()
}

async fn accept(listener: tokio::net::TcpListener, counters: Arc<Counters>, detour: Arc<Detour>) {
    let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    // The semaphore is never closed, so a place is always given.
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

/// One connection: request after request, until one of the two sides has had enough.
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
