//! TLS towards clients: which certificate a client gets, kept up to date with the files, and the handshake.
//!
//! [`Tls`] is what a listener has of it. Its table is made off the workers, of the files that are named, and swapped
//! whole when one of them changes; what is wrong changes nothing. `client/entrance.rs` reads the ClientHello and asks
//! the table.

pub mod certificate;
pub mod challenge;
mod context;
pub mod handshake;
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

/// How long a client that is refused may take to read why.
const FAREWELL: Duration = Duration::from_millis(200);

/// The TLS of one listener.
pub struct Tls {
    /// Which name is served with what.
    pub table: ArcSwap<Table>,
    /// For a handshake, from its first byte on; and for that byte.
    pub timeout: Duration,
    /// Where handshakes with RSA keys run.
    pub threads: Option<Threads>,
    /// Its counters.
    pub metrics: TlsMetrics,
    /// What issuers of certificates are waited for to ask.
    pub challenges: Arc<Challenges>,
    listener: Box<str>,
    protocols: Box<[Protocol]>,
    terms: Terms,
    tickets: Option<Tickets>,
    written: config::listener::Tls,
    /// Where its certificates come from, in the order of the file.
    sources: Vec<Source>,
    /// What is served now of each certificate; taken only when files are looked at.
    current: Mutex<Vec<Current>>,
}

/// One certificate of the configuration as it is served.
#[derive(Clone)]
struct Current {
    digest: [u8; 32],
    served: Served,
    /// `None`: an issuer has given none yet.
    facts: Option<CertificateFacts>,
    /// Contents that were refused, so that this is told once.
    refused: Option<[u8; 32]>,
}

/// What is told of a certificate.
#[derive(Clone, Debug)]
pub struct CertificateFacts {
    /// The file that it is in.
    pub file: String,
    /// Its names.
    pub names: Vec<Box<str>>,
    /// Names that it was wanted for and that it is not made out to.
    pub missing: Vec<Box<str>>,
    /// Names that it is used for though it is not made out to them.
    pub foreign: Vec<Box<str>>,
    /// What its key signs with.
    pub kind: KeyKind,
    /// When it begins to be valid, in seconds since 1970.
    pub not_before: i64,
    /// When it ceases to be valid, in seconds since 1970.
    pub not_after: i64,
    /// Its number, in hexadecimal.
    pub serial: String,
    /// Who issued it.
    pub issuer: String,
    /// Why clients do not accept it, if so.
    pub problem: Option<String>,
    /// Whether Forebay has it from an issuer, and renews it.
    pub issued: bool,
}

impl Tls {
    /// Reads all files, and makes ready what is written. Tickets of clients are those of `before`, if they are written
    /// so there.
    ///
    /// # Errors
    ///
    /// Everything that is wrong with it, but for certificates that have expired: see [`Tls::certificates`].
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

    /// Starts the threads for handshakes, which nobody needs who only checks.
    ///
    /// # Errors
    ///
    /// The system has none to give.
    pub fn start(&mut self) -> Result<(), BuildError> {
        let threads = usize::try_from(self.written.handshake_threads.0).unwrap_or(usize::MAX);
        if threads > 0 && self.current().iter().any(|one| one.served.kind == KeyKind::Rsa) {
            let failed = |error| BuildError::new("handshake_threads", format!("no threads for handshakes: {error}"));
            self.threads = Some(Threads::start(threads).map_err(failed)?);
        }
        Ok(())
    }

    /// What is served now, in the order of the file. `None`: an issuer has given none yet.
    pub fn certificates(&self) -> Vec<Option<CertificateFacts>> {
        let now = now();
        let current = self.current();
        current.iter().map(|one| one.facts.clone().map(|facts| facts.at(now))).collect()
    }

    /// Whether it is what these make.
    pub fn is(&self, written: &config::listener::Tls, sources: &[Source], protocols: &[Protocol]) -> bool {
        self.written == *written && self.sources == sources && *self.protocols == *protocols
    }

    /// Whether one of its certificates is in this file.
    pub fn serves(&self, file: &str) -> bool {
        self.sources.iter().any(|source| source.cert == file)
    }

    /// Looks at the files again. What changed and is right is served from now on; what is wrong is logged once, and
    /// what was served before goes on to be served.
    pub fn reload(&self) {
        let mut current = self.current();
        let mut taken = Vec::new();
        let mut wrong = 0;
        for (index, source) in self.sources.iter().enumerate() {
            match current[index].look(source, &self.terms) {
                Look::Same => current[index].refused = None,
                Look::Refused => wrong += 1,
                Look::Wrong(digest, errors) => {
                    wrong += 1;
                    current[index].refused = Some(digest);
                    self.refuse(&errors);
                }
                Look::Taken(one) => taken.push((index, *one)),
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
                        tracing::info!(listener = %self.listener, "the certificate in `{file}` was read anew");
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

    /// Tells what is wrong with what has changed, once.
    fn refuse(&self, errors: &[BuildError]) {
        self.metrics.refused.inc();
        for error in errors {
            tracing::warn!(listener = %self.listener, "a changed certificate is not taken, the one before stays: {error}");
        }
    }

    fn table_of(&self, current: &[Current]) -> Result<Table, Vec<BuildError>> {
        let served: Vec<Served> = current.iter().map(|one| one.served.clone()).collect();
        Table::build(&served, self.written.default.as_deref())
    }

    /// Makes a new key for tickets, or reads those of the file.
    fn renew_tickets(&self) {
        let Some(tickets) = &self.tickets else { return };
        let renewed = match &self.written.tickets.keys_file {
            Some(path) => tickets.read(path).map_err(|error| error.to_string()),
            None => tickets.rotate().map_err(|error| error.to_string()),
        };
        if let Err(error) = renewed {
            tracing::warn!(listener = %self.listener, "the keys of tickets stay as they are: {error}");
        }
    }

    /// Held while files are looked at, off the workers.
    fn current(&self) -> std::sync::MutexGuard<'_, Vec<Current>> {
        self.current.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Looks at the files of one certificate. `None`: an issuer has given none yet.
///
/// # Errors
///
/// Everything that is wrong with them.
pub fn inspect(source: &Source) -> Result<Option<CertificateFacts>, Vec<BuildError>> {
    let files = Files::read(source)?;
    if files.awaited {
        return Ok(None);
    }
    Ok(Some(CertificateFacts::of(source, &Loaded::parse(source, &files)?)))
}

/// Reads what is to be served when the gateway starts. One from an issuer that is of no use is as good as none: a new
/// one is asked for.
fn read(source: &Source) -> Result<(Option<Loaded>, Files), Vec<BuildError>> {
    let files = Files::read(source)?;
    if files.awaited {
        Clients::parse(source, &files)?;
        return Ok((None, files));
    }
    match Loaded::parse(source, &files) {
        Ok(loaded) => Ok((Some(loaded), files)),
        Err(found) if source.issued && found.iter().all(|error| ["cert", "key"].contains(&error.path.as_str())) => {
            found.iter().for_each(|error| tracing::warn!("a certificate that was issued is not served: {error}"));
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

    /// What clients that look at it will not accept, if any.
    pub fn mismatch(&self) -> Option<String> {
        let names: Vec<String> = self.foreign.iter().map(|name| format!("`{name}`")).collect();
        let names = (!names.is_empty()).then(|| names.join(", "))?;
        Some(format!("it is not made out to {names}: clients that check names will not accept it"))
    }

    /// When two thirds of its time are over: from then on it is to be renewed, in seconds since 1970.
    pub fn renewal(&self) -> i64 {
        self.not_before + (self.not_after - self.not_before) / 3 * 2
    }

    /// The same, at this time.
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

/// What a look at the files of one certificate showed.
enum Look {
    /// What is served.
    Same,
    /// What was refused before.
    Refused,
    /// Something new that is wrong, and what tells it from other things.
    Wrong([u8; 32], Vec<BuildError>),
    /// Something new.
    Taken(Box<Current>),
}

impl Current {
    /// The labels and the value of its series.
    fn series(&self) -> Option<(&str, &'static str, i64)> {
        self.facts.as_ref().map(CertificateFacts::series)
    }

    fn look(&self, source: &Source, terms: &Terms) -> Look {
        let unreadable = |errors: Vec<BuildError>| {
            let told = errors.iter().map(ToString::to_string).collect::<String>();
            let mut digest = [0xff; 32];
            digest[..16].copy_from_slice(&xxhash_rust::xxh3::xxh3_128(told.as_bytes()).to_be_bytes());
            (digest, errors)
        };
        let (digest, errors) = match Files::read(source) {
            Err(errors) => unreadable(errors),
            // What is served stays, should anybody have taken the file away.
            Ok(files) if files.awaited => return Look::Same,
            Ok(files) => {
                let digest = files.digest();
                if digest == self.digest {
                    return Look::Same;
                }
                if self.refused == Some(digest) {
                    return Look::Refused;
                }
                let taken = Loaded::parse(source, &files).and_then(|loaded| {
                    // One that clients do not accept is no better than the one before.
                    let problem =
                        loaded.problem(now()).map(|what| BuildError::new("cert", format!("`{}`: {what}", source.cert)));
                    problem.map_or(Ok(()), |problem| Err(vec![problem]))?;
                    serve(source, Some(&loaded), &files, terms).map_err(|error| vec![error])
                });
                match taken {
                    Ok(taken) => return Look::Taken(Box::new(taken)),
                    Err(errors) => (digest, errors),
                }
            }
        };
        if self.refused == Some(digest) { Look::Refused } else { Look::Wrong(digest, errors) }
    }
}

/// What is served of a certificate. `None`: an issuer has given none yet, and its names have a place all the same.
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
