//! Metrics of certificates from ACME issuers.

use prometheus::{IntCounter, IntGauge, IntGaugeVec};

use super::family::vectors;

vectors! {
    /// The families of all issuers.
    struct Families {
        orders: counter ACME_ORDERS,
        challenges: counter ACME_CHALLENGES,
        failures: gauge ACME_FAILURES,
        due: gauge ACME_DUE,
        active: gauge ACME_ACTIVE,
    }
}

/// The metrics of one issuer.
pub struct AcmeMetrics {
    /// Orders that ended with a certificate.
    pub issued: IntCounter,
    /// Orders that ended without one.
    pub failed: IntCounter,
    /// 1 if this process requests the certificates.
    pub active: IntGauge,
    failures: IntGaugeVec,
    due: IntGaugeVec,
    issuer: Box<str>,
}

/// The metrics of responses to challenges.
pub struct ChallengeMetrics {
    /// HTTP requests for a token.
    pub http_01: IntCounter,
    /// TLS handshakes.
    pub tls_alpn_01: IntCounter,
}

impl Families {
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
    /// Sets the metrics of the certificate with this first name: consecutive failed orders, and when the next one
    /// is due, in seconds since 1970.
    pub fn show(&self, name: &str, failures: u32, due: i64) {
        self.failures.with_label_values(&[&*self.issuer, name]).set(failures.into());
        self.due.with_label_values(&[&*self.issuer, name]).set(due);
    }
}
