//! Maintains the TLS of all listeners: changed files, and the rotation of ticket keys.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use futures::FutureExt;
use futures::future::BoxFuture;
use notify::{RecommendedWatcher, RecursiveMode, Watcher};
use tokio::sync::Notify;

use super::Tls;
use crate::upkeep::Kept;

/// Delay between a change and the check of the files: a certificate and its key are two files.
const SETTLE: Duration = Duration::from_millis(100);

impl Kept for Tls {
    fn keep(self: Arc<Self>) -> BoxFuture<'static, ()> {
        async move {
            tokio::join!(keep_files(&self), keep_tickets(&self));
        }
        .boxed()
    }
}

async fn keep_files(tls: &Arc<Tls>) {
    let told = Arc::new(Notify::new());
    let files = files(tls);
    let watcher = watcher(&files, told.clone());
    if let Err(error) = &watcher {
        let refresh = tls.written.refresh;
        tracing::warn!(listener = %tls.listener, "certificates are checked only every {refresh}: {error}");
    }
    loop {
        tokio::select! {
            () = told.notified() => tokio::time::sleep(SETTLE).await,
            () = tokio::time::sleep(tls.written.refresh.0) => {}
        }
        let looked_at = tls.clone();
        let look = move || {
            looked_at.reload();
            if looked_at.written.tickets.keys_file.is_some() {
                looked_at.renew_tickets();
            }
        };
        // The check reads files, so it runs on a blocking thread.
        if let Err(error) = tokio::task::spawn_blocking(look).await {
            tracing::error!("certificates could not be checked: {error}");
        }
    }
}

async fn keep_tickets(tls: &Arc<Tls>) {
    if tls.written.tickets.keys_file.is_some() {
        return;
    }
    loop {
        tokio::time::sleep(tls.written.tickets.rotate.0).await;
        tls.renew_tickets();
    }
}

/// All configured files.
fn files(tls: &Tls) -> Vec<&str> {
    let mut files = Vec::new();
    for one in &tls.sources {
        files.extend([Some(&one.cert), Some(&one.key), one.staple.as_ref()]);
        files.extend(one.client.as_ref().map(|client| &client.ca).map(Some));
        files.push(one.client.as_ref().and_then(|client| client.crl.as_ref()));
    }
    files.push(tls.written.tickets.keys_file.as_ref());
    files.into_iter().flatten().map(String::as_str).collect()
}

/// Watches the directories, so that renamed files and changed links are detected.
fn watcher(files: &[&str], told: Arc<Notify>) -> notify::Result<RecommendedWatcher> {
    let mut watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
        // Reading the files also causes events, which are ignored.
        if !event.is_ok_and(|event| event.kind.is_access()) {
            told.notify_one();
        }
    })?;
    let directory = |file: &&str| match Path::new(file).parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent.to_owned(),
        _ => PathBuf::from("."),
    };
    for directory in files.iter().map(directory).collect::<BTreeSet<_>>() {
        watcher.watch(&directory, RecursiveMode::NonRecursive)?;
    }
    Ok(watcher)
}
