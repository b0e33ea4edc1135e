//! The service of the listeners. Its runtime is the workers, which accept and serve the connections.

use std::sync::Arc;

use async_trait::async_trait;
use futures::stream::{FuturesUnordered, StreamExt};
use pingora::server::{ListenFds, ShutdownWatch};
use pingora::services::Service;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::sync::watch;

use crate::client::DownstreamApp;
use crate::client::acceptor::Acceptor;
use crate::client::descriptors::Doorway;
use crate::client::driver::Driven;

/// Adds sockets to accept connections on.
#[derive(Clone)]
pub struct Openings(UnboundedSender<Arc<Acceptor>>);

impl Openings {
    /// Accepts connections on this socket, from the start of the workers until it or all listeners are closed.
    pub fn open(&self, acceptor: Arc<Acceptor>) {
        // An error means that the gateway stops and accepts nothing more.
        let _ = self.0.send(acceptor);
    }
}

/// The service of all listeners.
pub struct Web<P> {
    front: Arc<DownstreamApp<P>>,
    doorway: Arc<Doorway>,
    threads: usize,
    openings: UnboundedReceiver<Arc<Acceptor>>,
    begin: watch::Receiver<bool>,
    stop: ShutdownWatch,
    first: Option<Box<dyn FnOnce() + Send + Sync>>,
}

impl<P> Web<P> {
    /// A service with this number of workers, whose connections go to `front`, from the signal `begin` until
    /// `stop`, and its handle for adding sockets. It runs `first` before anything else, on its runtime.
    pub fn new(
        front: Arc<DownstreamApp<P>>,
        doorway: Doorway,
        threads: usize,
        begin: watch::Receiver<bool>,
        stop: ShutdownWatch,
        first: impl FnOnce() + Send + Sync + 'static,
    ) -> (Openings, Web<P>) {
        let (sender, openings) = unbounded_channel();
        let web =
            Web { front, doorway: Arc::new(doorway), threads, openings, begin, stop, first: Some(Box::new(first)) };
        (Openings(sender), web)
    }
}

#[async_trait]
impl<P> Service for Web<P>
where
    P: Driven + Send + Sync + 'static,
    P::CTX: Send + Sync + 'static,
{
    async fn start_service(&mut self, _: Option<ListenFds>, _: ShutdownWatch, _: usize) {
        if let Some(first) = self.first.take() {
            first();
        }
        let mut accepting = FuturesUnordered::new();
        let mut stop = self.stop.clone();
        tokio::select! {
            biased;
            // An error means that the gateway stops.
            begun = self.begin.wait_for(|begun| *begun) => if begun.is_err() { return },
            // Waiting connections belong to the process that passed these sockets.
            _ = stop.wait_for(|stop| *stop) => return,
        }
        loop {
            tokio::select! {
                Some(acceptor) = self.openings.recv() => {
                    let task = acceptor.run(self.front.clone(), self.doorway.clone(), self.stop.clone());
                    accepting.push(pingora_runtime::current_handle().spawn(task));
                }
                Some(_) = accepting.next(), if !accepting.is_empty() => {}
                _ = stop.wait_for(|stop| *stop) => break,
            }
        }
        while accepting.next().await.is_some() {}
    }

    fn name(&self) -> &str {
        "web"
    }

    fn threads(&self) -> Option<usize> {
        Some(self.threads)
    }
}
