//! The ways in which an endpoint is asked whether it is well.
//!
//! All of them are a [`HealthCheck`] of Pingora's load balancing. Its own one for TCP is good enough in clear text. Its one for
//! HTTP is not: it reads no body, and has one server name for all endpoints. With TLS, too, each endpoint has its own name.

use std::sync::Arc;

use async_trait::async_trait;
use pingora::connectors::TransportConnector;
use pingora::{Error, ErrorType, Result};
use pingora_load_balancing::Backend;
use pingora_load_balancing::health_check::{HealthCheck, TcpHealthCheck};

use super::grpc::Grpc;
use super::http::Http;
use crate::config;
use crate::upstream::endpoint::{Endpoint, Transport};

/// A way of asking.
pub struct Probe(Box<dyn HealthCheck + Send + Sync>);

impl Probe {
    /// The way that is written; `transport` is how endpoints are spoken to.
    pub fn build(written: &config::upstream::HealthCheck, transport: &Transport) -> Probe {
        if let Some(http) = &written.http {
            return Probe(Box::new(Http::new(http)));
        }
        if let Some(grpc) = &written.grpc {
            return Probe(Box::new(Grpc::new(grpc)));
        }
        // The configuration was checked: it is one of the three.
        if transport.is_tls() {
            return Probe(Box::new(Handshake(TransportConnector::new(None))));
        }
        let mut connect = TcpHealthCheck::new();
        connect.peer_template.options = transport.options();
        Probe(connect)
    }

    /// Asks. Whoever wants an answer in time gives up after a while.
    ///
    /// # Errors
    ///
    /// What is wrong with the endpoint.
    pub async fn ask(&self, endpoint: &Arc<Endpoint>) -> Result<()> {
        let mut target = Backend { addr: endpoint.address.clone(), weight: 1, ext: Default::default() };
        target.ext.insert(Arc::clone(endpoint));
        self.0.check(&target).await
    }
}

/// The endpoint that [`Probe::ask`] asks.
pub(super) fn endpoint(target: &Backend) -> Result<&Arc<Endpoint>> {
    let missing = || Error::explain(ErrorType::InternalError, "a check of nobody");
    target.ext.get::<Arc<Endpoint>>().ok_or_else(missing)
}

/// What a check found wrong.
pub(super) fn wrong<T>(message: impl Into<String>) -> Result<T> {
    Err(Error::explain(ErrorType::Custom("health check"), message.into()))
}

/// A connection that comes about, and its TLS.
struct Handshake(TransportConnector);

#[async_trait]
impl HealthCheck for Handshake {
    async fn check(&self, target: &Backend) -> Result<()> {
        self.0.new_stream(&*endpoint(target)?.peer()).await.map(drop)
    }

    /// `upstream/health.rs` counts.
    fn health_threshold(&self, _: bool) -> usize {
        1
    }
}
