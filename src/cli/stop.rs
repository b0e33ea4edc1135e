//! Waits for the stop signal of the test origin. The gateway has its own shutdown sequence.

use tokio::signal::unix::{SignalKind, signal};

/// Completes on SIGINT or SIGTERM.
pub async fn asked() {
    let (Ok(mut interrupt), Ok(mut terminate)) = (signal(SignalKind::interrupt()), signal(SignalKind::terminate()))
    else {
        // The signals then keep their default effect, which also ends the process.
        return std::future::pending().await;
    };
    tokio::select! {
        _ = interrupt.recv() => {}
        _ = terminate.recv() => {}
    }
}
