//! A gateway with a filter of its own, `badge`, and all that Forebay has besides: the command line, `check` and
//! `schema`, which know it, metrics, and reloads.
//!
//! ```console
//! $ cargo run -- check -c forebay.yaml
//! $ cargo run -- run -c forebay.yaml
//! ```

use std::collections::BTreeSet;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use async_trait::async_trait;
use forebay::error::{BuildError, Refusal};
use forebay::filter::{Filter, FilterType, Scope, Stages, Surroundings, Verdict};
use forebay::gateway::Gateway;
use http::{HeaderName, HeaderValue};
use pingora::http::ResponseHeader;
use schemars::JsonSchema;
use serde::Deserialize;

fn main() -> ExitCode {
    forebay::cli::main(Gateway::builder().filter::<Badge>(), std::env::args_os())
}

/// What is written below `badge:`. Its comments are what `forebay schema` says of each key.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct Settings {
    /// Where a client shows its badge.
    header: String,
    /// The badges that are known.
    known: Vec<String>,
}

/// Lets those in who show a badge that is known.
struct Badge {
    header: HeaderName,
    known: BTreeSet<String>,
    /// How many have come in. It outlives a reload.
    guests: Arc<AtomicU64>,
}

/// Each reason is counted by itself, is in the log, and may have a page of its own (`error_page`).
static NO_BADGE: Refusal = Refusal::new("route.badge_missing", 401, "Show your badge.");
static UNKNOWN: Refusal = Refusal::new("route.badge_unknown", 403, "This badge is not known here.");

const GUEST: HeaderName = HeaderName::from_static("x-guest");

#[async_trait]
impl Filter for Badge {
    fn stages(&self) -> Stages {
        Stages::REQUEST | Stages::RESPONSE
    }

    async fn request(&self, scope: &mut Scope<'_>) -> Verdict {
        let Some(badge) = scope.request.headers.get(&self.header) else { return Verdict::from(&NO_BADGE) };
        if !badge.to_str().is_ok_and(|badge| self.known.contains(badge)) {
            return Verdict::from(&UNKNOWN);
        }
        let number = 1 + self.guests.fetch_add(1, Ordering::Relaxed);
        // What is kept here is found again at the later stages of this exchange.
        scope.keep(number);
        Verdict::Continue
    }

    async fn response(&self, scope: &mut Scope<'_>, response: &mut ResponseHeader) -> Verdict {
        if let Some(number) = scope.kept::<u64>() {
            // There is room for one more field, or there is none.
            let _ = response.insert_header(GUEST, HeaderValue::from(*number));
        }
        Verdict::Continue
    }
}

impl FilterType for Badge {
    const KEY: &'static str = "badge";
    const REFUSALS: &'static [&'static Refusal] = &[&NO_BADGE, &UNKNOWN];
    type Settings = Settings;

    fn build(settings: &Settings, around: &Surroundings<'_>) -> Result<Self, BuildError> {
        // An error carries the key that it is about; `check` adds the rest of the path, and shows the line.
        let header = settings.header.parse();
        let header = header.map_err(|_| BuildError::new("header", format!("`{}` is no header", settings.header)))?;
        if settings.known.is_empty() {
            return Err(BuildError::new("known", "no badge is listed: every request would be refused"));
        }
        let known = settings.known.iter().cloned().collect();
        Ok(Badge { header, known, guests: around.keep("guests", AtomicU64::default) })
    }
}

#[cfg(test)]
mod tests {
    use forebay::config::filter::FilterEntry;
    use forebay::expression::Facts;
    use forebay::filter::{Catalog, View};
    use pingora::http::RequestHeader;

    use super::*;

    #[tokio::test(flavor = "current_thread")]
    async fn a_badge_that_is_known_comes_in() {
        let entries = "[ { badge: { header: X-Badge, known: [ gold ] } } ]";
        let entries: Vec<FilterEntry> = serde_yaml::from_str(entries).expect("a list");
        let chain = Catalog::builtin().with::<Badge>().chain(&entries).expect("a chain");
        for (badge, reason) in [("gold", None), ("tin", Some("route.badge_unknown"))] {
            let mut request = RequestHeader::build("GET", b"/", None).expect("a request");
            request.insert_header("X-Badge", badge).expect("a field");
            let view = View { facts: Facts::of("all", "/"), request: &mut request };
            let refused = match chain.request(&mut chain.states(), view).await {
                Verdict::Refuse(refused) => Some(refused.refusal.reason),
                _ => None,
            };
            assert_eq!(refused, reason, "{badge}");
        }
    }
}
