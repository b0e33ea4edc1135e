//! Waiting to be told to stop, for the test origin; the gateway has its own order of stopping.

use tokio::signal::unix::{SignalKind, signal};

/// Done on SIGINT or SIGTERM.
pub async fn asked() {
    let (Ok(mut interrupt), Ok(mut terminate)) = (signal(SignalKind::interrupt()), signal(SignalKind::terminate()))
    else {
        // Then the signals keep their default effect, which ends the process too.
        return std::future::pending().await;
    };
    tokio::select! {
        _ = interrupt.recv() => {}
        _ = terminate.recv() => {}
    }
}
