//! Background work for objects of the configuration: upstreams, certificates, issuers.
//!
//! [`InUse`] holds the objects in use, and [`Upkeep`] is the service that works for them. For an object that stays in
//! use across configurations, the work continues without a break.

use std::collections::HashMap;
use std::sync::Arc;

use async_trait::async_trait;
use futures::future::BoxFuture;
use pingora::server::ShutdownWatch;
use pingora::services::background::{BackgroundService, GenBackgroundService};
use tokio::sync::watch;
use tokio::task::AbortHandle;

/// An object with background work for as long as it is in use.
pub trait Kept: Send + Sync + 'static {
    /// Does the work. The future is dropped at any `.await` once the object is no longer in use.
    fn keep(self: Arc<Self>) -> BoxFuture<'static, ()>;
}

/// Sets the objects in use. Clones share them.
pub struct InUse<T>(Arc<watch::Sender<Vec<Arc<T>>>>);

impl<T> Clone for InUse<T> {
    fn clone(&self) -> Self {
        InUse(self.0.clone())
    }
}

impl<T: Kept> InUse<T> {
    /// Replaces the objects in use.
    pub fn set(&self, in_use: Vec<Arc<T>>) {
        self.0.send_replace(in_use);
    }

    /// The objects in use.
    pub fn now(&self) -> Vec<Arc<T>> {
        self.0.borrow().clone()
    }
}

/// The service that works for the objects in use.
pub struct Upkeep<T> {
    in_use: watch::Receiver<Vec<Arc<T>>>,
    /// The work begins once this is true.
    begin: watch::Receiver<bool>,
}

/// Creates a service with this name and a thread of its own, and the handle that sets its objects; initially none.
pub fn service<T: Kept>(name: &str) -> (InUse<T>, GenBackgroundService<Upkeep<T>>) {
    let (_, at_once) = watch::channel(true);
    service_from(name, at_once)
}

/// Creates a service that starts only once `begin` is true; until then another process may do the work.
pub fn service_from<T: Kept>(name: &str, begin: watch::Receiver<bool>) -> (InUse<T>, GenBackgroundService<Upkeep<T>>) {
    let (sender, in_use) = watch::channel(Vec::new());
    let upkeep = Arc::new(Upkeep { in_use, begin });
    (InUse(Arc::new(sender)), GenBackgroundService::new(name.to_owned(), upkeep))
}

/// A task that is aborted on drop.
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
            // An error means that the gateway shuts down.
            begun = begin.wait_for(|begun| *begun) => if begun.is_err() { return },
            _ = shutdown.changed() => return,
        }
        let mut tasks: HashMap<usize, Task> = HashMap::new();
        loop {
            let in_use = told.borrow_and_update().clone();
            let mut kept = HashMap::with_capacity(in_use.len());
            for one in in_use {
                // The task keeps its object alive, so no other object can have the same address.
                let key = Arc::as_ptr(&one) as usize;
                let task = tasks.remove(&key).unwrap_or_else(|| Task(tokio::spawn(one.keep()).abort_handle()));
                kept.insert(key, task);
            }
            tasks = kept;
            tokio::select! {
                changed = told.changed() => if changed.is_err() {
                    // The objects in use cannot change any more.
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
            // Adds 101 on each start; 100 remain once the work has stopped.
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
