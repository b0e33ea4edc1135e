//! Work that is too long for a worker, and waits for nothing: it is done on a thread of its own.

use std::io;
use std::sync::{Arc, LazyLock};

use tokio::sync::Semaphore;

use crate::config::units::Count;
use crate::error::BuildError;

/// What works on a piece that is larger does so aside: that costs some 20 microseconds, and the work some hundred.
pub(super) const ASIDE_BYTES: usize = 16 << 10;

/// As much is done at a time, besides on the workers: more would only fight for the same CPU.
static TURNS: LazyLock<Arc<Semaphore>> = LazyLock::new(|| {
    let threads = std::thread::available_parallelism().map_or(1, |threads| threads.get());
    Arc::new(Semaphore::new(threads))
});

/// Places for the bodies that a filter may have under way, as its `concurrent` says.
///
/// # Errors
/// It is not a number from 1 to 1,000,000.
pub(super) fn places(concurrent: Count) -> Result<Arc<Semaphore>, BuildError> {
    let places = usize::try_from(concurrent.0).ok().filter(|places| (1..=1_000_000).contains(places));
    let wrong = || BuildError::new("concurrent", "write a number from 1 to 1000000");
    Ok(Arc::new(Semaphore::new(places.ok_or_else(wrong)?)))
}

/// Does `work` on another thread, when it is its turn.
///
/// # Errors
/// It has panicked.
pub(super) async fn aside<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> io::Result<T> {
    let turn = TURNS.clone().acquire_owned().await.map_err(io::Error::other)?;
    let aside = tokio::task::spawn_blocking(move || {
        let _turn = turn;
        work()
    });
    aside.await.map_err(io::Error::other)
}
