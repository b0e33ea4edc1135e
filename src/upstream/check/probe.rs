//! The kinds of health checks.
//!
//! All of them implement Pingora's [`HealthCheck`]. Pingora's own implementations are not used: the one for HTTP
//! reads no body, and both connect to all endpoints with the same settings. Here a check connects like an exchange,
//! with the endpoint's own name.

use std::sync::Arc;

use async_trait::async_trait;
use pingora::Result;
use pingora::connectors::TransportConnector;
use pingora_load_balancing::Backend;
use pingora_load_balancing::health_check::HealthCheck;

use super::connector::transport;
use super::grpc::Grpc;
use super::http::Http;
use super::target::{endpoint, sound};
use crate::config;
use crate::upstream::endpoint::Endpoint;
use crate::upstream::transport::limit::{connected, take_limit};
use crate::upstream::transport::tls::Flaw;

/// A health check.
pub struct Probe(Box<dyn HealthCheck + Send + Sync>);

impl Probe {
    /// The configured check.
    pub fn build(written: &config::upstream::HealthCheck) -> Probe {
        if let Some(http) = &written.http {
            return Probe(Box::new(Http::new(http)));
        }
        if let Some(grpc) = &written.grpc {
            return Probe(Box::new(Grpc::new(grpc)));
        }
        // The configuration was checked: it is one of the three.
        Probe(Box::new(Connects(transport())))
    }

    /// Runs the check. The caller limits its time.
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

/// A check that only connects, TLS handshake included.
struct Connects(&'static TransportConnector);

#[async_trait]
impl HealthCheck for Connects {
    async fn check(&self, target: &Backend) -> Result<()> {
        let mut peer = endpoint(target)?.peer();
        let limit = take_limit(&mut peer);
        let stream = connected(limit, self.0.new_stream(&*peer)).await?;
        sound(Flaw::of_tls(stream.get_ssl_digest().as_deref()))
    }

    /// Not used: `upstream/health.rs` counts.
    fn health_threshold(&self, _: bool) -> usize {
        1
    }
}
