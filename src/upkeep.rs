//! Work in the background for things that come and go with the configuration: upstreams, certificates, issuers.
//!
//! [`InUse`] says which of them are in use, [`Upkeep`] is the service that works for exactly these. What stays in use
//! from one configuration to the next is worked for without a break.

use std::collections::HashMap;
use std::sync::Arc;

use async_trait::async_trait;
use futures::future::BoxFuture;
use pingora::server::ShutdownWatch;
use pingora::services::background::{BackgroundService, GenBackgroundService};
use tokio::sync::watch;
use tokio::task::AbortHandle;

/// What has something done for it in the background for as long as it is in use.
pub trait Kept: Send + Sync + 'static {
    /// Does it. It is dropped at any `.await` when this is in use no longer.
    fn keep(self: Arc<Self>) -> BoxFuture<'static, ()>;
}

/// Says what is in use. Clones share it.
pub struct InUse<T>(Arc<watch::Sender<Vec<Arc<T>>>>);

impl<T> Clone for InUse<T> {
    fn clone(&self) -> Self {
        InUse(self.0.clone())
    }
}

impl<T: Kept> InUse<T> {
    /// These are in use from now on, and no others.
    pub fn set(&self, in_use: Vec<Arc<T>>) {
        self.0.send_replace(in_use);
    }

    /// Those that are in use now.
    pub fn now(&self) -> Vec<Arc<T>> {
        self.0.borrow().clone()
    }
}

/// The service that works for what is in use.
pub struct Upkeep<T> {
    in_use: watch::Receiver<Vec<Arc<T>>>,
    /// It begins when this says so.
    begin: watch::Receiver<bool>,
}

/// A service of this name, with a thread of its own, and what tells it what is in use: nothing yet.
pub fn service<T: Kept>(name: &str) -> (InUse<T>, GenBackgroundService<Upkeep<T>>) {
    let (_, at_once) = watch::channel(true);
    service_from(name, at_once)
}

/// The same for work that begins only when `begin` says so: until then another process may do it.
pub fn service_from<T: Kept>(name: &str, begin: watch::Receiver<bool>) -> (InUse<T>, GenBackgroundService<Upkeep<T>>) {
    let (sender, in_use) = watch::channel(Vec::new());
    let upkeep = Arc::new(Upkeep { in_use, begin });
    (InUse(Arc::new(sender)), GenBackgroundService::new(name.to_owned(), upkeep))
}

/// Stops its task when it is dropped.
struct Task(AbortHandle);

impl Drop for Task {
    fn drop(&mut self) {
        self.0.abort();
    }
}

#[async_trait]
impl<T: Kept> BackgroundService for Upkeep<T> {
    async fn start(&self, mut shutdown: ShutdownWatch) {
        let (mut told, mut begin) = (self.in_use.clone(), self.begin.clone());
        tokio::select! {
            // An error means that the gateway stops.
            begun = begin.wait_for(|begun| *begun) => if begun.is_err() { return },
            _ = shutdown.changed() => return,
        }
        let mut tasks: HashMap<usize, Task> = HashMap::new();
        loop {
            let in_use = told.borrow_and_update().clone();
            let mut kept = HashMap::with_capacity(in_use.len());
            for one in in_use {
                // A task holds what it works for, so that no other can have this address.
                let key = Arc::as_ptr(&one) as usize;
                let task = tasks.remove(&key).unwrap_or_else(|| Task(tokio::spawn(one.keep()).abort_handle()));
                kept.insert(key, task);
            }
            tasks = kept;
            tokio::select! {
                changed = told.changed() => if changed.is_err() {
                    // What is in use cannot change any more.
                    let _ = shutdown.changed().await;
                    return;
                },
                _ = shutdown.changed() => return,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use futures::FutureExt;

    use super::*;

    struct Thing(Arc<AtomicUsize>);

    struct Worked(Arc<AtomicUsize>);

    impl Drop for Worked {
        fn drop(&mut self) {
            self.0.fetch_sub(1, Ordering::SeqCst);
        }
    }

    impl Kept for Thing {
        fn keep(self: Arc<Self>) -> BoxFuture<'static, ()> {
            // Counts up by a hundred each time it begins, and by one for as long as it goes on.
            self.0.fetch_add(101, Ordering::SeqCst);
            let worked = Worked(self.0.clone());
            async move {
                let _worked = worked;
                std::future::pending().await
            }
            .boxed()
        }
    }

    async fn until(count: &AtomicUsize, wanted: usize) {
        while count.load(Ordering::SeqCst) != wanted {
            tokio::task::yield_now().await;
        }
    }

    #[tokio::test]
    async fn what_stays_in_use_is_worked_for_without_a_break() {
        let counts: [Arc<AtomicUsize>; 2] = Default::default();
        let [one, two] = counts.clone().map(|count| Arc::new(Thing(count)));
        let (told, receiver) = watch::channel(Vec::new());
        let (begin, begun) = watch::channel(false);
        let (in_use, upkeep) = (InUse(Arc::new(told)), Upkeep { in_use: receiver, begin: begun });
        let (stop, shutdown) = watch::channel(false);
        let service = tokio::spawn(async move { upkeep.start(shutdown).await });
        in_use.set(vec![one.clone()]);
        tokio::task::yield_now().await;
        assert_eq!(counts[0].load(Ordering::SeqCst), 0, "it is not to begin yet");
        begin.send(true).expect("the service listens");
        until(&counts[0], 101).await;
        in_use.set(vec![one.clone(), two.clone()]);
        until(&counts[1], 101).await;
        assert_eq!(counts[0].load(Ordering::SeqCst), 101, "begun once");
        in_use.set(vec![two]);
        until(&counts[0], 100).await;
        stop.send(true).expect("the service listens");
        service.await.expect("the service ends");
        until(&counts[1], 100).await;
    }
}
