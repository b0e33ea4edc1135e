//! Automatic certificates (ACME, RFC 8555): ordered in the background, stored in files, served like any others.
//!
//! [`plan`] computes the certificates of each issuer. One loop per issuer orders what is due ([`schedule`]), one
//! order at a time ([`order`]), and saves certificates in the [`store`], from which listeners read them. A failed
//! order is retried later; meanwhile the old certificate is served. Workers only answer challenges
//! (`client/challenges.rs`). If several processes share a store, one orders and all answer challenges (`answers`).

mod answers;
mod failure;
mod http;
pub mod order;
pub mod plan;
pub mod schedule;
pub mod store;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use arc_swap::ArcSwap;
use futures::FutureExt;
use futures::future::{BoxFuture, join_all};
use instant_acme::{Account, AccountCredentials, ExternalAccountKey, NewAccount};
use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::xxh3_64;

use crate::client::challenges::Challenges;
use crate::client::tls::Tls;
use crate::client::tls::certificate::{self, Files, Loaded, Source};
use crate::config::listener::tls::Certificate;
use crate::error::{BuildError, path};
use crate::metrics::{AcmeMetrics, Metrics};
use crate::party::wait::{NoClient, within};
use crate::printable::printable;
use crate::upkeep;
use answers::Followed;
use failure::Failure;
use http::Http;
use order::Proof;
use plan::{Asked, Wanted};
use schedule::{Held, Record, seconds};

/// How often a process that does not order reads the challenges to answer, and checks whether the ordering process
/// has ended.
const FOLLOW_INTERVAL: Duration = Duration::from_millis(250);
/// Longest sleep, since the clock may be set and the machine may be suspended.
const LOOK_INTERVAL: Duration = Duration::from_secs(600);

/// Longest pause that an issuer can request. It keeps a mistake of the issuer from letting certificates expire.
const BUSY_MAX: Duration = Duration::from_secs(7 * 86_400);
/// The recorded problem of an order that has not ended.
const INTERRUPTED: &str = "the process ended in the middle of the last order";

/// The TLS listeners that serve certificates.
pub type Served = Arc<ArcSwap<Vec<Arc<Tls>>>>;

/// Orders certificates.
pub struct Acme {
    issuers: Vec<Issuer>,
}

/// An issuer and its certificates.
struct Issuer {
    asked: Asked,
    http: Http,
    challenges: Arc<Challenges>,
    /// The listeners that serve its certificates.
    listeners: Served,
    metrics: AcmeMetrics,
}

/// A certificate and its state.
struct State<'a> {
    wanted: &'a Wanted,
    record: Record,
    /// When the next order is due.
    due: SystemTime,
}

/// A stored account.
#[derive(Serialize, Deserialize)]
struct Kept {
    contact: Option<String>,
    credentials: AccountCredentials,
}

/// Prepares the clients of all issuers; sends nothing.
///
/// # Errors
///
/// CA files that are missing or invalid.
pub fn build(
    plan: Vec<Asked>,
    challenges: &Arc<Challenges>,
    listeners: &Served,
    metrics: &Metrics,
) -> Result<Option<Acme>, Vec<BuildError>> {
    let (mut errors, mut issuers) = (Vec::new(), Vec::new());
    for asked in plan {
        let http = match Http::build(&asked.written) {
            Ok(http) => http,
            Err(found) => {
                let under = path::join("acme", &path::key(&asked.name));
                errors.extend(found.into_iter().map(|error| error.under(&under)));
                continue;
            }
        };
        let (challenges, listeners, metrics) = (challenges.clone(), listeners.clone(), metrics.acme(&asked.name));
        issuers.push(Issuer { asked, http, challenges, listeners, metrics });
    }
    if errors.is_empty() { Ok((!issuers.is_empty()).then_some(Acme { issuers })) } else { Err(errors) }
}

impl Acme {
    /// Creates the stores, owned by this user and group if given.
    ///
    /// # Errors
    ///
    /// A store cannot be created.
    pub fn prepare(&self, owner: Option<(u32, u32)>) -> Result<(), BuildError> {
        let asked = |issuer: &Issuer| issuer.asked.store.prepare(owner).map_err(|error| issuer.asked.unusable(&error));
        self.issuers.iter().try_for_each(asked)
    }

    /// Checks that the stores are writable.
    ///
    /// # Errors
    ///
    /// A store is not writable.
    pub fn probe(&self) -> Result<(), BuildError> {
        let asked = |issuer: &Issuer| issuer.asked.store.probe().map_err(|error| issuer.asked.unusable(&error));
        self.issuers.iter().try_for_each(asked)
    }
}

impl upkeep::Kept for Acme {
    /// Orders what is due. Uses its own runtime because it reads and writes files and parses certificates.
    fn keep(self: Arc<Self>) -> BoxFuture<'static, ()> {
        async move {
            join_all(self.issuers.iter().map(Issuer::keep)).await;
        }
        .boxed()
    }
}

impl Issuer {
    /// Waits until no other process orders for this store, then takes over.
    async fn keep(&self) {
        let (mut told, issuer, store) = (false, &self.asked.name, &self.asked.store);
        let (mut followed, mut following) = (Followed::default(), None);
        let _lock = loop {
            let found = store.lock();
            match &found {
                _ if told => {}
                Ok(None) => tracing::info!(%issuer, "another process orders the certificates of this store"),
                Err(error) => tracing::warn!(%issuer, "the store cannot be locked, and nothing is ordered: {error}"),
                Ok(Some(_)) => {}
            }
            if let Ok(Some(lock)) = found {
                break lock;
            }
            told = true;
            following = following.or_else(|| store.follow().ok().flatten());
            followed.look(store, &self.challenges);
            tokio::time::sleep(FOLLOW_INTERVAL).await;
        };
        drop((followed, following));
        // Challenges that the previous process left behind.
        for left in store.challenges() {
            let _ = std::fs::remove_file(left);
        }
        self.metrics.active.set(1);
        self.run().await;
    }

    /// Orders what is due, in an endless loop.
    async fn run(&self) {
        let mut states: Vec<_> = self.asked.certificates.iter().map(|wanted| self.state(wanted)).collect();
        let mut account = None;
        loop {
            states.iter().for_each(|state| self.show(state));
            let now = SystemTime::now();
            let Some(first) = states.iter_mut().min_by_key(|state| state.next()) else { return };
            if let Ok(wait) = first.next().duration_since(now)
                && !wait.is_zero()
            {
                tokio::time::sleep(wait.min(LOOK_INTERVAL)).await;
            } else if first.due <= now {
                self.attempt(first, &mut account).await;
            } else {
                self.ask_window(first, &mut account).await;
            }
        }
    }

    fn state<'a>(&self, wanted: &'a Wanted) -> State<'a> {
        let record = record(&self.asked, wanted).unwrap_or_default();
        let (now, retry) = (seconds(SystemTime::now()), self.asked.written.retry);
        let held = held(wanted);
        let due = record.at_start(held.as_ref(), &self.asked.directory, now, retry.first.0, rand::random());
        State { wanted, due: at(due), record: Record { due, ..record } }
    }

    fn show(&self, state: &State<'_>) {
        let due = i64::try_from(seconds(state.due)).unwrap_or(i64::MAX);
        self.metrics.show(state.wanted.name(), state.record.failures, due);
    }

    /// Orders a certificate and records the result.
    async fn attempt(&self, state: &mut State<'_>, account: &mut Option<Account>) {
        let (began, written) = (SystemTime::now(), &self.asked.written);
        state.record.attempted = seconds(began);
        // Recorded as a failure in advance: if the process restarts again and again during orders, the delay still
        // grows.
        let failures = state.record.failures.saturating_add(1);
        let unfinished = Record {
            directory: self.asked.directory.clone(),
            failures,
            problem: Some(INTERRUPTED.to_owned()),
            due: seconds(began + written.retry.first.0),
            ..state.record.clone()
        };
        self.note(state.wanted, &unfinished);
        let patience = written.timeouts.order;
        let ordered = match within(patience.0, NoClient::Issuer, self.order(state.wanted, account)).await {
            Some(ordered) => ordered,
            None => Err(Failure::new(format!("it was not issued within {patience}"))),
        };
        let issuer = &self.asked.name;
        let names = state.wanted.names.join(", ");
        match ordered {
            Ok(held) => {
                self.metrics.issued.inc();
                let soonest = seconds(began + written.retry.first.0);
                let due = schedule::renewal(held.not_before, held.not_after, rand::random()).max(soonest);
                let until = certificate::date(i64::try_from(held.not_after).unwrap_or(i64::MAX));
                tracing::info!(%issuer, "a certificate for {names} was issued, which is valid until {until}");
                state.record = Record {
                    directory: self.asked.directory.clone(),
                    serial: Some(held.serial),
                    due,
                    attempted: state.record.attempted,
                    // The renewal window is requested at once.
                    ask: Some(seconds(began)),
                    ..Record::default()
                };
                state.due = at(due);
                self.take(state.wanted);
            }
            Err(failure) => {
                self.metrics.failed.inc();
                if failure.is_unknown {
                    self.forget_account(account);
                }
                let (first, max) = (written.retry.first.0, written.retry.max.0);
                let wait = schedule::backoff(first, max, failures, rand::random());
                let now = SystemTime::now();
                let busy = self.http.take_busy_until().map(|until| until.min(now + BUSY_MAX));
                state.due = busy.into_iter().fold(now + wait, SystemTime::max);
                let again = state.due.duration_since(now).unwrap_or_default();
                let again = humantime::format_duration(Duration::from_secs(again.as_secs().max(1)));
                tracing::warn!(%issuer, "no certificate for {names}: {}; it is ordered again in {again}", failure.problem);
                state.record = Record { problem: Some(failure.problem), due: seconds(state.due), ..unfinished };
            }
        }
        self.note(state.wanted, &state.record);
    }

    async fn order(&self, wanted: &Wanted, account: &mut Option<Account>) -> Result<Held, Failure> {
        let written = &self.asked.written;
        let account = self.account(account).await?;
        let replaces = load(wanted).and_then(|loaded| order::identifier(loaded.chain.first()?));
        let proof = Proof { challenge: written.challenge, challenges: &self.challenges, store: &self.asked.store };
        let pem = order::order(&account, &wanted.names, proof, replaces, written.timeouts.order.0).await?;
        let kept = store::replace(&wanted.path, &pem);
        kept.map_err(|error| Failure::new(format!("the issued certificate cannot be saved: {error}")))?;
        held(wanted).ok_or_else(|| Failure::new("the issued certificate cannot be read back".to_owned()))
    }

    /// The account: from memory, from the store, or a new one.
    async fn account(&self, at_hand: &mut Option<Account>) -> Result<Account, Failure> {
        if let Some(account) = at_hand {
            return Ok(account.clone());
        }
        let file = self.account_path();
        let contact = self.asked.written.email.as_ref().map(|email| format!("mailto:{email}"));
        let contacts: Vec<&str> = contact.as_deref().into_iter().collect();
        let kept: Option<Kept> = store::read_json(&file).unwrap_or_else(|error| {
            tracing::warn!(issuer = %self.asked.name, "the stored account is unusable, a new one is created: {error}");
            None
        });
        let builder = Account::builder_with_http(Box::new(self.http.clone()));
        let account = if let Some(kept) = kept {
            let known = kept.contact;
            let account = builder.from_credentials(kept.credentials).await?;
            if known != contact {
                account.update_contacts(&contacts).await?;
                // The credentials type cannot be cloned, only deserialized.
                if let Ok(Some(kept)) = store::read_json::<Kept>(&file) {
                    self.keep_account(&file, &Kept { contact, ..kept })?;
                }
            }
            account
        } else {
            let wanted = NewAccount {
                contact: &contacts,
                terms_of_service_agreed: self.asked.written.agree_to_terms,
                only_return_existing: false,
            };
            let binding = self.asked.written.eab.as_ref();
            let binding = binding.and_then(|eab| Some(ExternalAccountKey::new(eab.kid.clone(), &eab.key()?)));
            let created = builder.create(&wanted, self.asked.directory.clone(), binding.as_ref()).await;
            let (account, credentials) = created?;
            self.keep_account(&file, &Kept { contact, credentials })?;
            tracing::info!(issuer = %self.asked.name, "an account was created: {}", printable(account.id()));
            account
        };
        *at_hand = Some(account.clone());
        Ok(account)
    }

    fn keep_account(&self, path: &Path, kept: &Kept) -> Result<(), Failure> {
        let failed = |error| Failure::new(format!("the account cannot be saved: {error}"));
        store::replace_json(path, kept).map_err(failed)
    }

    /// The next order creates a new account.
    fn forget_account(&self, at_hand: &mut Option<Account>) {
        *at_hand = None;
        if let Err(error) = std::fs::remove_file(self.account_path()) {
            tracing::warn!(issuer = %self.asked.name, "the account that the issuer does not know stays: {error}");
        }
    }

    /// Accounts with different external account bindings are stored separately.
    fn account_path(&self) -> PathBuf {
        let bound = self.asked.written.eab.as_ref().map(|eab| &*eab.kid).unwrap_or_default();
        self.asked.store.account(xxh3_64(format!("{}\n{bound}", self.asked.directory).as_bytes()))
    }

    /// Requests the renewal window of a certificate, if the issuer supports it (RFC 9773).
    async fn ask_window(&self, state: &mut State<'_>, account: &mut Option<Account>) {
        let now = seconds(SystemTime::now());
        let asked = async {
            let loaded = load(state.wanted);
            let id = loaded.as_ref().and_then(|loaded| order::identifier(loaded.chain.first()?));
            let Some((id, held)) = id.zip(loaded.map(Held::from)) else { return Ok(None) };
            match self.account(account).await?.renewal_info(&id).await {
                Ok((info, again)) => Ok(Some((info.suggested_window, again, held))),
                Err(instant_acme::Error::Unsupported(_)) => Ok(None),
                Err(error) => Err(Failure::from(error)),
            }
        };
        match within(self.asked.written.timeouts.order.0, NoClient::Issuer, asked).await {
            Some(Ok(None)) => state.record.ask = None,
            Some(Ok(Some((window, again, held)))) => {
                let [start, end] = [window.start, window.end].map(|point| point.unix_timestamp());
                let window = (u64::try_from(start).unwrap_or_default(), u64::try_from(end).unwrap_or_default());
                // Limits the order rate for an issuer that wants every certificate replaced at once.
                let soonest = state.record.attempted + self.asked.written.retry.first.0.as_secs();
                state.record.window(window, &held, soonest, rand::random());
                state.record.ask_again(now, again);
                state.due = at(state.record.due);
            }
            Some(Err(failure)) => {
                tracing::debug!(issuer = %self.asked.name, "the issuer gave no renewal time: {}", failure.problem);
                state.record.ask = Some(now + schedule::ASK_AGAIN.as_secs());
            }
            None => state.record.ask = Some(now + schedule::ASK_AGAIN.as_secs()),
        }
        self.note(state.wanted, &state.record);
    }

    /// Makes the listeners serve an issued certificate.
    fn take(&self, wanted: &Wanted) {
        let path = wanted.path.to_string_lossy();
        self.listeners.load().iter().filter(|tls| tls.serves(&path)).for_each(|tls| tls.reload());
    }

    /// Saves the record of a certificate.
    fn note(&self, wanted: &Wanted, record: &Record) {
        let path = self.asked.store.record(wanted.name());
        if let Err(error) = store::replace_json(&path, record) {
            tracing::warn!(issuer = %self.asked.name, "`{}` cannot be written: {error}", path.display());
        }
    }
}

/// The saved record of a certificate; `None` before its first order.
pub fn record(asked: &Asked, wanted: &Wanted) -> Option<Record> {
    store::read_json(&asked.store.record(wanted.name())).ok().flatten()
}

impl State<'_> {
    /// When the next action for it is due.
    fn next(&self) -> SystemTime {
        // While orders fail, the renewal window does not matter.
        let ask = self.record.ask.filter(|_| self.record.failures == 0).map(at);
        ask.into_iter().fold(self.due, SystemTime::min)
    }
}

/// Loads the stored certificate, if its file is valid and contains the key.
fn load(wanted: &Wanted) -> Option<Loaded> {
    let source = Source::issued(&wanted.path.to_string_lossy(), wanted.names.clone(), &Certificate::default());
    let files = Files::read(&source).ok().filter(|files| !files.awaited)?;
    Loaded::parse(&source, &files).ok()
}

fn held(wanted: &Wanted) -> Option<Held> {
    load(wanted).map(Held::from)
}

impl From<Loaded> for Held {
    fn from(loaded: Loaded) -> Held {
        Held {
            not_before: u64::try_from(loaded.not_before).unwrap_or_default(),
            not_after: u64::try_from(loaded.not_after).unwrap_or_default(),
            is_whole: loaded.missing.is_empty(),
            serial: loaded.serial,
        }
    }
}

/// The time at these seconds since 1970, capped at the end of the year 9999, which every clock can represent.
fn at(seconds: u64) -> SystemTime {
    const FAR: u64 = 253_402_300_799;
    SystemTime::UNIX_EPOCH + Duration::from_secs(seconds.min(FAR))
}
