//! TLS towards clients: the choice of certificates, their updates from files, and the handshake.
//!
//! [`Tls`] is the TLS of one listener. Its table is built outside the workers from the configured files, and replaced
//! atomically when one of them changes; an invalid file changes nothing. `client/entrance.rs` reads the ClientHello and
//! searches the table.

pub mod certificate;
pub mod challenge;
mod context;
pub mod handshake;
mod rsa;
mod staple;
pub mod stream;
pub mod table;
mod tickets;
mod watch;

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use arc_swap::ArcSwap;

use crate::client::challenges::Challenges;
use crate::client::hello::KeyKind;
use crate::config;
use crate::config::listener::Protocol;
use crate::error::BuildError;
use crate::metrics::TlsMetrics;
use certificate::{Clients, Files, Loaded, Source};
use context::Terms;
use handshake::Threads;
use table::{Served, Table};
use tickets::Tickets;

/// Maximum time for a refused client to read the reason.
const FAREWELL: Duration = Duration::from_millis(200);

/// The TLS of one listener.
pub struct Tls {
    /// The certificates by server name.
    pub table: ArcSwap<Table>,
    /// Maximum time for the whole handshake, and for its first byte.
    pub timeout: Duration,
    /// The threads for handshakes with RSA keys.
    pub threads: Option<Threads>,
    /// Its metrics.
    pub metrics: TlsMetrics,
    /// Pending challenges of certificate issuers.
    pub challenges: Arc<Challenges>,
    listener: Box<str>,
    protocols: Box<[Protocol]>,
    terms: Terms,
    tickets: Option<Tickets>,
    written: config::listener::Tls,
    /// The sources of its certificates, in the order of the file.
    sources: Vec<Source>,
    /// The certificates in use; locked only while files are checked.
    current: Mutex<Vec<Current>>,
}

/// A configured certificate in use.
#[derive(Clone)]
struct Current {
    digest: [u8; 32],
    served: Served,
    /// `None`: the issuer has not issued it yet.
    facts: Option<CertificateFacts>,
    /// Digest of refused contents, so that they are reported once.
    refused: Option<[u8; 32]>,
}

/// The facts about a certificate, for reports.
#[derive(Clone, Debug)]
pub struct CertificateFacts {
    /// Its file.
    pub file: String,
    /// The names that it is used for.
    pub names: Vec<Box<str>>,
    /// Names that it should be valid for and is not.
    pub missing: Vec<Box<str>>,
    /// Names that it is used for although it is not valid for them.
    pub foreign: Vec<Box<str>>,
    /// The kind of its key.
    pub kind: KeyKind,
    /// Start of its validity, in seconds since 1970.
    pub not_before: i64,
    /// End of its validity, in seconds since 1970.
    pub not_after: i64,
    /// Its serial number, in hexadecimal.
    pub serial: String,
    /// Its issuer.
    pub issuer: String,
    /// The reason why clients do not accept it, if any.
    pub problem: Option<String>,
    /// Whether Forebay obtains it from an issuer and renews it.
    pub issued: bool,
}

impl Tls {
    /// Reads all files and prepares the configured TLS. Reuses the ticket keys of `before` if their configuration is
    /// the same.
    ///
    /// # Errors
    ///
    /// All errors, except expired certificates: see [`Tls::certificates`].
    pub fn build(
        written: &config::listener::Tls,
        sources: Vec<Source>,
        listener: &str,
        protocols: &[Protocol],
        challenges: Arc<Challenges>,
        metrics: TlsMetrics,
        before: Option<&Tls>,
    ) -> Result<Tls, Vec<BuildError>> {
        let mut errors = Vec::new();
        let same_tickets = before.filter(|before| before.written.tickets == written.tickets);
        let tickets = same_tickets.map_or_else(|| tickets(written), |before| Ok(before.tickets.clone()));
        let tickets = tickets.map_err(|error| errors.push(error)).ok().flatten();
        let terms = Terms::build(written, protocols, tickets.clone()).map_err(|found| errors.extend(found)).ok();
        let mut current = Vec::new();
        for (index, source) in sources.iter().enumerate() {
            let under = |found: Vec<BuildError>| {
                found.into_iter().map(move |error| error.under(&format!("certificates[{index}]"))).collect::<Vec<_>>()
            };
            match (read(source), &terms) {
                (Ok((loaded, files)), Some(terms)) => match serve(source, loaded.as_ref(), &files, terms) {
                    Ok(served) => current.push(served),
                    Err(error) => errors.extend(under(vec![error])),
                },
                (Err(found), _) => errors.extend(under(found)),
                (Ok(_), None) => {}
            }
        }
        let (Some(terms), true) = (terms, errors.is_empty()) else { return Err(errors) };
        let served: Vec<Served> = current.iter().map(|one| one.served.clone()).collect();
        let table = Table::build(&served, written.default.as_deref())?;
        let tls = Tls {
            table: ArcSwap::from_pointee(table),
            timeout: written.handshake_timeout.0,
            threads: None,
            metrics,
            challenges,
            listener: listener.into(),
            protocols: protocols.into(),
            terms,
            tickets,
            written: written.clone(),
            sources,
            current: Mutex::new(current),
        };
        tls.metrics.show(tls.current().iter().filter_map(Current::series));
        Ok(tls)
    }

    /// Starts the threads for handshakes, which a mere check of the configuration does not need.
    ///
    /// # Errors
    ///
    /// If the system cannot start them.
    pub fn start(&mut self) -> Result<(), BuildError> {
        let threads = usize::try_from(self.written.handshake_threads.0).unwrap_or(usize::MAX);
        if threads > 0 && self.current().iter().any(|one| one.served.kind == KeyKind::Rsa) {
            let failed = |error| BuildError::new("handshake_threads", format!("no threads for handshakes: {error}"));
            self.threads = Some(Threads::start(threads).map_err(failed)?);
        }
        Ok(())
    }

    /// The certificates in use, in the order of the file. `None`: the issuer has not issued it yet.
    pub fn certificates(&self) -> Vec<Option<CertificateFacts>> {
        let now = now();
        let current = self.current();
        current.iter().map(|one| one.facts.clone().map(|facts| facts.at(now))).collect()
    }

    /// Whether it was built from exactly this.
    pub fn is(&self, written: &config::listener::Tls, sources: &[Source], protocols: &[Protocol]) -> bool {
        self.written == *written && self.sources == sources && *self.protocols == *protocols
    }

    /// Whether one of its certificates is in this file.
    pub fn serves(&self, file: &str) -> bool {
        self.sources.iter().any(|source| source.cert == file)
    }

    /// Checks the files again. Valid changes are used from now on; invalid ones are logged once, and the previous
    /// contents stay in use.
    pub fn reload(&self) {
        let mut current = self.current();
        let mut taken = Vec::new();
        let mut wrong = 0;
        for (index, source) in self.sources.iter().enumerate() {
            match current[index].look(source, &self.terms) {
                FileCheck::Same => current[index].refused = None,
                FileCheck::Refused => wrong += 1,
                FileCheck::Wrong(digest, errors) => {
                    wrong += 1;
                    current[index].refused = Some(digest);
                    self.refuse(&errors);
                }
                FileCheck::Taken(one) => taken.push((index, *one)),
            }
        }
        if !taken.is_empty() {
            let mut next = current.clone();
            taken.iter().for_each(|(index, one)| next[*index] = one.clone());
            match self.table_of(&next) {
                Ok(table) => {
                    self.table.store(Arc::new(table));
                    *current = next;
                    self.metrics.reloaded.inc();
                    for (index, _) in &taken {
                        let file = &self.sources[*index].cert;
                        tracing::info!(listener = %self.listener, "the certificate in `{file}` was reloaded");
                    }
                }
                Err(errors) => {
                    wrong += taken.len();
                    taken.iter().for_each(|(index, one)| current[*index].refused = Some(one.digest));
                    self.refuse(&errors);
                }
            }
        }
        self.metrics.wrong.set(i64::try_from(wrong).unwrap_or(i64::MAX));
        self.metrics.show(current.iter().filter_map(Current::series));
    }

    /// Logs errors in changed files, once.
    fn refuse(&self, errors: &[BuildError]) {
        self.metrics.refused.inc();
        for error in errors {
            tracing::warn!(listener = %self.listener, "a changed certificate is not used, the old one stays: {error}");
        }
    }

    fn table_of(&self, current: &[Current]) -> Result<Table, Vec<BuildError>> {
        let served: Vec<Served> = current.iter().map(|one| one.served.clone()).collect();
        Table::build(&served, self.written.default.as_deref())
    }

    /// Creates a new ticket key, or reads those of the file.
    fn renew_tickets(&self) {
        let Some(tickets) = &self.tickets else { return };
        let renewed = match &self.written.tickets.keys_file {
            Some(path) => tickets.read(path).map_err(|error| error.to_string()),
            None => tickets.rotate().map_err(|error| error.to_string()),
        };
        if let Err(error) = renewed {
            tracing::warn!(listener = %self.listener, "the ticket keys remain unchanged: {error}");
        }
    }

    /// Locked while files are checked, outside the workers.
    fn current(&self) -> std::sync::MutexGuard<'_, Vec<Current>> {
        self.current.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Checks the files of one certificate. `None`: the issuer has not issued it yet.
///
/// # Errors
///
/// All errors in the files.
pub fn inspect(source: &Source) -> Result<Option<CertificateFacts>, Vec<BuildError>> {
    let files = Files::read(source)?;
    if files.awaited {
        return Ok(None);
    }
    Ok(Some(CertificateFacts::of(source, &Loaded::parse(source, &files)?)))
}

/// Reads a certificate at the start of the gateway. An unusable one from an issuer counts as missing: a new one is
/// ordered.
fn read(source: &Source) -> Result<(Option<Loaded>, Files), Vec<BuildError>> {
    let files = Files::read(source)?;
    if files.awaited {
        Clients::parse(source, &files)?;
        return Ok((None, files));
    }
    match Loaded::parse(source, &files) {
        Ok(loaded) => Ok((Some(loaded), files)),
        Err(found) if source.issued && found.iter().all(|error| ["cert", "key"].contains(&error.path.as_str())) => {
            found.iter().for_each(|error| tracing::warn!("an issued certificate is not used: {error}"));
            Ok((None, files))
        }
        Err(found) => Err(found),
    }
}

impl CertificateFacts {
    fn of(source: &Source, loaded: &Loaded) -> Self {
        CertificateFacts {
            file: source.cert.clone(),
            names: loaded.names.clone(),
            missing: loaded.missing.clone(),
            foreign: loaded.foreign.clone(),
            kind: loaded.kind,
            not_before: loaded.not_before,
            not_after: loaded.not_after,
            serial: loaded.serial.clone(),
            issuer: loaded.issuer.clone(),
            problem: loaded.problem(now()),
            issued: source.issued,
        }
    }

    /// The warning about names for which clients will not accept it, if any.
    pub fn mismatch(&self) -> Option<String> {
        let names: Vec<String> = self.foreign.iter().map(|name| format!("`{name}`")).collect();
        let names = (!names.is_empty()).then(|| names.join(", "))?;
        Some(format!("it is not made out to {names}: clients that check names will not accept it"))
    }

    /// Time of renewal, after two thirds of its validity, in seconds since 1970.
    pub fn renewal(&self) -> i64 {
        self.not_before + (self.not_after - self.not_before) / 3 * 2
    }

    /// The facts at this time.
    fn at(mut self, now: i64) -> Self {
        if self.problem.is_none() && now > self.not_after {
            self.problem = Some(format!("it expired on {}", certificate::date(self.not_after)));
        }
        self
    }

    /// The labels and the value of its series.
    fn series(&self) -> (&str, &'static str, i64) {
        (self.names.first().map_or("", |name| name), self.kind.name(), self.not_after)
    }
}

/// The result of a check of one certificate's files.
enum FileCheck {
    /// The contents in use.
    Same,
    /// Contents that were refused before.
    Refused,
    /// New invalid contents: their digest and the errors.
    Wrong([u8; 32], Vec<BuildError>),
    /// New valid contents.
    Taken(Box<Current>),
}

impl Current {
    /// The labels and the value of its series.
    fn series(&self) -> Option<(&str, &'static str, i64)> {
        self.facts.as_ref().map(CertificateFacts::series)
    }

    fn look(&self, source: &Source, terms: &Terms) -> FileCheck {
        let unreadable = |errors: Vec<BuildError>| {
            let told = errors.iter().map(ToString::to_string).collect::<String>();
            let mut digest = [0xff; 32];
            digest[..16].copy_from_slice(&xxhash_rust::xxh3::xxh3_128(told.as_bytes()).to_be_bytes());
            (digest, errors)
        };
        let (digest, errors) = match Files::read(source) {
            Err(errors) => unreadable(errors),
            // The certificate in use stays if its file was removed.
            Ok(files) if files.awaited => return FileCheck::Same,
            Ok(files) => {
                let digest = files.digest();
                if digest == self.digest {
                    return FileCheck::Same;
                }
                if self.refused == Some(digest) {
                    return FileCheck::Refused;
                }
                let taken = Loaded::parse(source, &files).and_then(|loaded| {
                    // A certificate that clients do not accept does not replace the previous one.
                    let problem =
                        loaded.problem(now()).map(|what| BuildError::new("cert", format!("`{}`: {what}", source.cert)));
                    problem.map_or(Ok(()), |problem| Err(vec![problem]))?;
                    serve(source, Some(&loaded), &files, terms).map_err(|error| vec![error])
                });
                match taken {
                    Ok(taken) => return FileCheck::Taken(Box::new(taken)),
                    Err(errors) => (digest, errors),
                }
            }
        };
        if self.refused == Some(digest) { FileCheck::Refused } else { FileCheck::Wrong(digest, errors) }
    }
}

/// Prepares a certificate for use. `None`: the issuer has not issued it yet, but its names have a place in the table.
fn serve(source: &Source, loaded: Option<&Loaded>, files: &Files, terms: &Terms) -> Result<Current, BuildError> {
    let (policy, digest) = (files.policy(source), files.digest());
    let Some(loaded) = loaded else {
        let awaited = source.names.iter().filter_map(|name| certificate::host(name).ok()).collect();
        let served = Served { names: Vec::new(), awaited, kind: certificate::ISSUED_KIND, policy, context: None };
        return Ok(Current { digest, served, facts: None, refused: None });
    };
    let context = terms
        .context(loaded, policy)
        .map_err(|error| BuildError::new("cert", format!("`{}` cannot be served: {error}", source.cert)))?;
    let (names, awaited) = (loaded.names.clone(), loaded.missing.clone());
    let served = Served { names, awaited, kind: loaded.kind, policy, context: Some(context) };
    let facts = CertificateFacts::of(source, loaded);
    Ok(Current { digest, served, facts: Some(facts), refused: None })
}

fn tickets(written: &config::listener::Tls) -> Result<Option<Tickets>, BuildError> {
    let failed = |error| BuildError::new("tickets", format!("no keys for tickets: {error}"));
    match &written.tickets {
        off if !off.enabled => Ok(None),
        config::listener::tls::Tickets { keys_file: Some(path), .. } => Tickets::from_file(path).map(Some),
        _ => Tickets::random().map(Some).map_err(failed),
    }
}

/// Seconds since 1970.
pub fn now() -> i64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_secs()).unwrap_or(i64::MAX)
}
