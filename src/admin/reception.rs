//! Accepts connections to the admin endpoint, with or without TLS, on its own thread.
//!
//! It does not use Pingora's acceptor, so that the socket can move to another process while active responses finish
//! here.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use pingora::protocols::Stream;
use pingora::protocols::http::ServerSession;
use pingora::server::{ListenFds, ShutdownWatch};
use pingora::services::Service;
use tokio::sync::watch;

use crate::client::acceptor::Open;
use crate::client::entrance;
use crate::client::inflight::Inflight;
use crate::client::socket::Accepted;
use crate::client::tls::Tls;

use super::{Admin, KEPT_SECONDS};

/// Pause after an accept error, which would otherwise repeat at once.
const REST: Duration = Duration::from_millis(100);

/// The socket of the admin endpoint, and its handler.
pub struct Reception {
    admin: Arc<Admin>,
    tls: Option<Arc<Tls>>,
    /// `None` once connections are accepted on it.
    socket: Mutex<Option<OwnedFd>>,
    /// A duplicate for a process that takes over. It closes with the socket: an open one would keep clients waiting.
    duplicate: Mutex<Option<OwnedFd>>,
    is_unix: bool,
    close: watch::Sender<bool>,
}

impl Reception {
    /// Uses this socket, which must be bound, listening and non-blocking.
    ///
    /// # Errors
    ///
    /// The system has no descriptor left.
    pub fn new(admin: Admin, socket: OwnedFd, is_unix: bool, tls: Option<Arc<Tls>>) -> io::Result<Arc<Reception>> {
        let (close, _) = watch::channel(false);
        let duplicate = Mutex::new(Some(socket.try_clone()?));
        let socket = Mutex::new(Some(socket));
        Ok(Arc::new(Reception { admin: Arc::new(admin), tls, socket, duplicate, is_unix, close }))
    }

    /// A service that accepts connections once `begin` is true.
    pub fn service(self: &Arc<Self>, begin: watch::Receiver<bool>) -> impl Service + 'static {
        Desk { reception: self.clone(), begin }
    }

    /// Stops accepting. Active responses finish, streaming ones end, and connections close after the response to
    /// their next request.
    pub fn close(&self) {
        self.duplicate.lock().unwrap_or_else(PoisonError::into_inner).take();
        self.close.send_replace(true);
    }

    /// A duplicate of the socket, for another process; `None` once it is closed.
    ///
    /// # Errors
    ///
    /// The system has no descriptor left.
    pub fn duplicate(&self) -> io::Result<Option<OwnedFd>> {
        let duplicate = self.duplicate.lock().unwrap_or_else(PoisonError::into_inner);
        duplicate.as_ref().map(OwnedFd::try_clone).transpose()
    }

    /// The requests that are being answered.
    pub fn answering(&self) -> &Arc<Inflight> {
        &self.admin.answering
    }

    async fn serve(self: Arc<Self>, io: Stream) -> Option<()> {
        let closing = self.close.subscribe();
        let seat = self.admin.seats.take()?;
        let mut stream = match &self.tls {
            None => io,
            Some(tls) => match seat.wait(entrance::secure_with(io, tls)).await? {
                Ok(stream) => stream,
                Err(refusal) => {
                    tracing::debug!(reason = refusal.reason, "a connection to the admin endpoint was given up");
                    return None;
                }
            },
        };
        loop {
            let mut http = ServerSession::new_http1(stream);
            http.set_keepalive(Some(KEPT_SECONDS));
            stream = self.admin.serve(http, &seat, &closing).await?;
        }
    }
}

/// The service of a [`Reception`].
struct Desk {
    reception: Arc<Reception>,
    begin: watch::Receiver<bool>,
}

#[async_trait]
impl Service for Desk {
    async fn start_service(&mut self, _: Option<ListenFds>, mut shutdown: ShutdownWatch, _: usize) {
        let Some(socket) = self.reception.socket.lock().unwrap_or_else(PoisonError::into_inner).take() else { return };
        let mut closing = self.reception.close.subscribe();
        tokio::select! {
            begun = self.begin.wait_for(|begun| *begun) => if begun.is_err() { return },
            _ = shutdown.changed() => return,
        }
        let open = match Open::new(socket, self.reception.is_unix) {
            Ok(open) => open,
            Err(error) => {
                tracing::error!(%error, "the admin endpoint cannot accept connections");
                return;
            }
        };
        loop {
            let accepted = tokio::select! {
                accepted = open.accept() => accepted.and_then(Accepted::watch),
                _ = closing.wait_for(|closing| *closing) => return,
                _ = shutdown.changed() => return,
            };
            match accepted {
                Ok(socket) => {
                    tokio::spawn(self.reception.clone().serve(Box::new(socket)));
                }
                Err(error) => {
                    tracing::error!(%error, "the admin endpoint could not accept a connection");
                    tokio::time::sleep(REST).await;
                }
            }
        }
    }

    fn name(&self) -> &str {
        "admin"
    }

    fn threads(&self) -> Option<usize> {
        Some(1)
    }
}
