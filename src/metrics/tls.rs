//! Metrics of the TLS of listeners.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use prometheus::{Histogram, IntCounter, IntGauge, IntGaugeVec};

use super::family::vectors;

/// The values of the label `version`.
const VERSIONS: [&str; 2] = ["TLSv1.2", "TLSv1.3"];

vectors! {
    /// The families of all listeners.
    struct Families {
        handshakes: counter TLS_HANDSHAKES,
        seconds: histogram TLS_HANDSHAKE_SECONDS,
        not_after: gauge TLS_CERTIFICATE_NOT_AFTER,
        reloads: counter TLS_RELOADS,
        wrong: gauge TLS_CERTIFICATES_REFUSED,
    }
}

/// The TLS metrics of one listener.
pub struct TlsMetrics {
    /// Handshakes by version and by whether a session was resumed.
    handshakes: [[IntCounter; 2]; 2],
    seconds: Histogram,
    /// Changed files that were loaded.
    pub reloaded: IntCounter,
    /// Changed files that were refused.
    pub refused: IntCounter,
    /// Certificates whose current files are invalid.
    pub wrong: IntGauge,
    not_after: IntGaugeVec,
    listener: Box<str>,
    /// The certificates with a series: name and key type.
    shown: Mutex<Vec<(String, &'static str)>>,
}

impl Families {
    pub(super) fn listener(&self, name: &str) -> TlsMetrics {
        let handshakes =
            |version| ["no", "yes"].map(|resumed| self.handshakes.with_label_values(&[name, version, resumed]));
        TlsMetrics {
            handshakes: VERSIONS.map(handshakes),
            seconds: self.seconds.with_label_values(&[name]),
            reloaded: self.reloads.with_label_values(&[name, "taken"]),
            refused: self.reloads.with_label_values(&[name, "refused"]),
            wrong: self.wrong.with_label_values(&[name]),
            not_after: self.not_after.clone(),
            listener: name.into(),
            shown: Mutex::default(),
        }
    }
}

impl TlsMetrics {
    /// Counts a completed handshake.
    pub fn shaken(&self, version: &str, resumed: bool, took: Duration) {
        self.seconds.observe(took.as_secs_f64());
        if let Some(version) = VERSIONS.iter().position(|known| *known == version) {
            self.handshakes[version][usize::from(resumed)].inc();
        }
    }

    /// Sets the expiry of these certificates: name, key type, seconds since 1970. Removes the series of others.
    pub fn show<'c>(&self, certificates: impl IntoIterator<Item = (&'c str, &'static str, i64)>) {
        // Held after files were read, off the workers.
        let mut shown = self.shown.lock().unwrap_or_else(PoisonError::into_inner);
        let before = std::mem::take(&mut *shown);
        for (name, key, not_after) in certificates {
            self.not_after.with_label_values(&[&*self.listener, name, key]).set(not_after);
            shown.push((name.to_owned(), key));
        }
        for gone in before.iter().filter(|one| !shown.contains(one)) {
            // It has a series, so removal succeeds.
            let _ = self.not_after.remove_label_values(&[&*self.listener, &gone.0, gone.1]);
        }
    }
}
