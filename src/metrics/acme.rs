//! What is counted of certificates that Forebay gets from issuers.

use prometheus::{IntCounter, IntCounterVec, IntGauge, IntGaugeVec};

use super::family;
use super::registry::Registry;

/// The families of all issuers.
pub(super) struct Families {
    orders: IntCounterVec,
    challenges: IntCounterVec,
    failures: IntGaugeVec,
    due: IntGaugeVec,
    active: IntGaugeVec,
}

/// The metrics of one issuer.
pub struct AcmeMetrics {
    /// Orders that ended with a certificate.
    pub issued: IntCounter,
    /// Orders that did not.
    pub failed: IntCounter,
    /// 1: this process gets the certificates.
    pub active: IntGauge,
    failures: IntGaugeVec,
    due: IntGaugeVec,
    issuer: Box<str>,
}

/// The metrics of the answers to issuers.
pub struct ChallengeMetrics {
    /// Requests for a token.
    pub http_01: IntCounter,
    /// Handshakes.
    pub tls_alpn_01: IntCounter,
}

impl Families {
    pub(super) fn register(registry: &Registry) -> Self {
        Families {
            orders: family::ACME_ORDERS.counter(registry),
            challenges: family::ACME_CHALLENGES.counter(registry),
            failures: family::ACME_FAILURES.gauge(registry),
            due: family::ACME_DUE.gauge(registry),
            active: family::ACME_ACTIVE.gauge(registry),
        }
    }

    pub(super) fn issuer(&self, issuer: &str) -> AcmeMetrics {
        AcmeMetrics {
            issued: self.orders.with_label_values(&[issuer, "issued"]),
            failed: self.orders.with_label_values(&[issuer, "failed"]),
            active: self.active.with_label_values(&[issuer]),
            failures: self.failures.clone(),
            due: self.due.clone(),
            issuer: issuer.into(),
        }
    }

    pub(super) fn challenges(&self) -> ChallengeMetrics {
        let challenge = |name| self.challenges.with_label_values(&[name]);
        ChallengeMetrics { http_01: challenge("http_01"), tls_alpn_01: challenge("tls_alpn_01") }
    }
}

impl AcmeMetrics {
    /// Shows of the certificate with this first name how often in a row no order for it came to anything, and when the
    /// next one is due, in seconds since 1970.
    pub fn show(&self, name: &str, failures: u32, due: i64) {
        self.failures.with_label_values(&[&*self.issuer, name]).set(failures.into());
        self.due.with_label_values(&[&*self.issuer, name]).set(due);
    }
}
