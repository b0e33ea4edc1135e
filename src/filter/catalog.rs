//! The registered filters: those of Forebay, listed here, and those of other crates.
//!
//! It provides what `config` needs to check a file ([`Catalog::kinds`]), and builds chains from checked settings.

use std::sync::Arc;

use schemars::JsonSchema;
use serde_yaml::Value;

use super::access::Access;
use super::api_key::ApiKey;
use super::basic_auth::BasicAuth;
use super::body::Body;
use super::chain::{Chain, ChainedFilter};
use super::compress::Compress;
use super::cors::Cors;
use super::decompress::Decompress;
use super::error_page::ErrorPage;
use super::forward_auth::ForwardAuth;
use super::headers::Headers;
use super::ip_set::IpSet;
use super::jwt::Jwt;
use super::rate_limit::RateLimit;
use super::redirect::Redirect;
use super::request_id::RequestId;
use super::respond::Respond;
use super::rewrite::Rewrite;
use super::{Filter, FilterType, Stages, Surroundings};
use crate::config::filter::{self, DecodeError, Decoded, FilterEntry, FilterKind, Settings};
use crate::error::{BuildError, Refusal, path, refusal};
use crate::expression::{Condition, Moment};

/// The filters that a configuration can use.
#[derive(Clone, Default)]
pub struct Catalog {
    kinds: Vec<FilterKind>,
    /// The builder of each of `kinds`, at the same index.
    builders: Vec<Build>,
    refusals: Vec<&'static Refusal>,
    conflicts: Vec<BuildError>,
}

type Build = fn(&Settings, &Surroundings<'_>) -> Result<Box<dyn Filter>, BuildError>;

impl Catalog {
    /// The filters of Forebay.
    pub fn builtin() -> Catalog {
        Catalog::default()
            .with::<RequestId>()
            .with::<Headers>()
            .with::<Rewrite>()
            .with::<Redirect>()
            .with::<Respond>()
            .with::<RateLimit>()
            .with::<Access>()
            .with::<IpSet>()
            .with::<Cors>()
            .with::<BasicAuth>()
            .with::<ApiKey>()
            .with::<Jwt>()
            .with::<ForwardAuth>()
            .with::<Compress>()
            .with::<ErrorPage>()
            .with::<Decompress>()
            .with::<Body>()
    }

    /// Adds a filter. A duplicate key or reason is reported by [`Catalog::conflicts`].
    pub fn with<T: FilterType>(mut self) -> Catalog {
        if self.kinds.iter().any(|kind| kind.key == T::KEY) {
            let message = "two filters are registered under this key; one of them needs another `KEY`";
            self.conflicts.push(BuildError::at_key(T::KEY, message));
            return self;
        }
        self.declare(T::KEY, T::REFUSALS);
        self.kinds.push(FilterKind {
            key: T::KEY,
            answers: T::ANSWERS,
            decode: decode::<T>,
            schema: T::Settings::json_schema,
        });
        self.builders.push(build::<T>);
        self
    }

    /// The filters as `config` needs them, in the order of registration.
    pub fn kinds(&self) -> &[FilterKind] {
        &self.kinds
    }

    /// The refusals of all filters, without those of Forebay itself ([`refusal::ALL`]).
    pub fn refusals(&self) -> Vec<&'static Refusal> {
        self.refusals.clone()
    }

    /// Conflicts between filters; the path of each error is the key of a filter. A gateway with conflicts refuses to
    /// start.
    pub fn conflicts(&self) -> &[BuildError] {
        &self.conflicts
    }

    /// Builds one filter.
    ///
    /// # Errors
    /// The filter's error in its settings, with the path inside them.
    pub fn build(&self, decoded: &Decoded, around: &Surroundings<'_>) -> Result<Box<dyn Filter>, BuildError> {
        match self.kinds.iter().position(|kind| kind.key == decoded.key) {
            Some(index) => self.builders[index](&decoded.settings, &around.of(self.kinds[index].key, &self.refusals)),
            None => Err(unknown(decoded.key)),
        }
    }

    /// Builds a chain without surroundings, for tests of filters.
    ///
    /// # Errors
    /// As [`Catalog::chain_in`].
    pub fn chain(&self, entries: &[FilterEntry]) -> Result<Chain, Vec<BuildError>> {
        self.chain_in(entries, &Surroundings::rehearsal(&()))
    }

    /// Builds the chain of one route. Decodes entries that no configuration has decoded yet.
    ///
    /// # Errors
    /// All errors, with paths such as `[1].rate_limit.rate`.
    pub fn chain_in(&self, entries: &[FilterEntry], around: &Surroundings<'_>) -> Result<Chain, Vec<BuildError>> {
        let (mut filters, mut errors) = (Vec::with_capacity(entries.len()), Vec::new());
        for (index, entry) in entries.iter().enumerate() {
            match self.link(entry, around) {
                Ok(link) => filters.push(link),
                Err(error) => errors.push(error.under(&format!("[{index}]"))),
            }
        }
        if errors.is_empty() { Ok(Chain::new(filters)) } else { Err(errors) }
    }

    fn link(&self, entry: &FilterEntry, around: &Surroundings<'_>) -> Result<ChainedFilter, BuildError> {
        let decoded = match &entry.decoded {
            Some(decoded) => decoded.clone(),
            None => self.decode(&entry.written)?,
        };
        let filter = self.build(&decoded, around).map_err(|error| error.under(&path::key(decoded.key)))?;
        let when = match &decoded.when {
            Some(when) => Some(condition(when, &*filter).map_err(|error| error.under(FilterEntry::WHEN))?),
            None => None,
        };
        Ok(ChainedFilter::new(decoded.key, filter, when))
    }

    fn decode(&self, written: &Value) -> Result<Decoded, BuildError> {
        let entries = written.as_mapping().into_iter().flatten();
        let (when, keys): (Vec<_>, Vec<_>) = entries.partition(|(key, _)| *key == FilterEntry::WHEN);
        let when = match when.first() {
            None => None,
            Some((_, Value::String(when))) => Some(when.clone()),
            Some(_) => return Err(BuildError::new(FilterEntry::WHEN, "expected an expression in quotes")),
        };
        let [(Value::String(key), settings)] = &keys[..] else {
            return Err(BuildError::new("", "expected one filter and its settings, such as `request_id: {}`"));
        };
        let kind = self.kinds.iter().find(|kind| kind.key == key).ok_or_else(|| unknown(key))?;
        let settings = (kind.decode)((*settings).clone())
            .map_err(|error| BuildError::new(error.path, error.message).under(&path::key(kind.key)))?;
        Ok(Decoded { key: kind.key, settings, when })
    }

    /// Two rows with one reason would be two time series with the same labels, which Prometheus rejects.
    fn declare(&mut self, key: &'static str, refusals: &[&'static Refusal]) {
        for &new in refusals {
            match refusal::ALL.iter().chain(&self.refusals).find(|known| known.reason == new.reason) {
                None => self.refusals.push(new),
                Some(known) if std::ptr::eq(*known, new) => {}
                Some(_) => {
                    let message = format!("its refusal `{}` has a reason that is already taken", new.reason);
                    self.conflicts.push(BuildError::at_key(key, message));
                }
            }
        }
    }
}

/// Builds the condition of a filter. A filter that acts on requests needs the result before the response.
fn condition(written: &str, filter: &dyn Filter) -> Result<Condition, BuildError> {
    let on_requests = filter.stages().intersects(Stages::REQUEST | Stages::REQUEST_BODY) && !filter.prepares();
    Condition::build(written, if on_requests { Moment::Request } else { Moment::Response })
}

fn unknown(key: &str) -> BuildError {
    BuildError::at_key(key, format!("no filter is registered as `{key}`"))
}

fn decode<T: FilterType>(written: Value) -> Result<Settings, DecodeError> {
    Ok(Arc::new(filter::decode::<T::Settings>(&written)?))
}

fn build<T: FilterType>(settings: &Settings, around: &Surroundings<'_>) -> Result<Box<dyn Filter>, BuildError> {
    match settings.downcast_ref() {
        Some(settings) => Ok(Box::new(T::build(settings, around)?)),
        None => Err(BuildError::new("", "these settings were decoded for another filter")),
    }
}

#[cfg(test)]
mod tests {
    use async_trait::async_trait;
    use serde_json::Value;

    use super::super::rehearsal::{chain, error};
    use super::{
        Arc, BuildError, Catalog, Decoded, Filter, FilterEntry, FilterType, Refusal, Stages, Surroundings, refusal,
    };

    struct Stranger<const TWIN: bool>;

    static MINE: Refusal = Refusal::new("route.stranger", 403, "No.");
    static TAKEN: Refusal = Refusal::new("route.no_match", 404, "No.");

    #[async_trait]
    impl<const TWIN: bool> Filter for Stranger<TWIN> {
        fn stages(&self) -> Stages {
            Stages::REQUEST
        }
    }

    impl<const TWIN: bool> FilterType for Stranger<TWIN> {
        const KEY: &'static str = if TWIN { "access" } else { "stranger" };
        const REFUSALS: &'static [&'static Refusal] = if TWIN { &[] } else { &[&MINE, &TAKEN, &refusal::INTERNAL] };
        type Settings = ();

        fn build((): &(), _: &Surroundings<'_>) -> Result<Self, BuildError> {
            Ok(Stranger)
        }
    }

    #[test]
    fn the_builtin_filters_do_not_conflict() {
        let catalog = Catalog::builtin();
        assert_eq!(catalog.conflicts(), []);
        let keys: Vec<&str> = catalog.kinds().iter().map(|kind| kind.key).collect();
        let of_headers = ["request_id", "headers", "rewrite", "redirect", "respond", "rate_limit", "access"];
        let of_identity = ["ip_set", "cors", "basic_auth", "api_key", "jwt", "forward_auth"];
        let of_bodies = ["compress", "error_page", "decompress", "body"];
        assert_eq!(keys, [&of_headers[..], &of_identity, &of_bodies].concat());
        let answering: Vec<&str> = catalog.kinds().iter().filter(|kind| kind.answers).map(|kind| kind.key).collect();
        assert_eq!(answering, ["redirect", "respond"]);
    }

    #[test]
    fn every_setting_has_a_description_and_a_default_in_the_schema() {
        for kind in Catalog::builtin().kinds() {
            let schema = (kind.schema)(&mut schemars::SchemaGenerator::default());
            let required = schema.get("required").and_then(Value::as_array).cloned().unwrap_or_default();
            let settings = schema.get("properties").and_then(Value::as_object).cloned().unwrap_or_default();
            assert!(!settings.is_empty(), "{}", kind.key);
            for (name, setting) in settings {
                assert!(setting.get("description").is_some(), "{}.{name} has no description", kind.key);
                let open = required.iter().any(|required| *required == name);
                assert!(open != setting.get("default").is_some(), "{}.{name} has no default", kind.key);
            }
        }
    }

    #[test]
    fn a_filter_from_outside_is_one_line() {
        let entries: Vec<FilterEntry> = serde_yaml::from_str("- stranger:").unwrap();
        assert!(Catalog::builtin().with::<Stranger<false>>().chain(&entries).is_ok());
    }

    #[test]
    fn a_key_that_is_taken_is_a_conflict_and_replaces_nothing() {
        let catalog = Catalog::builtin().with::<Stranger<true>>();
        assert_eq!(catalog.kinds().len(), Catalog::builtin().kinds().len());
        let told = "access: two filters are registered under this key; one of them needs another `KEY`";
        assert_eq!(catalog.conflicts()[0].to_string(), told);
    }

    #[test]
    fn a_reason_that_is_taken_is_a_conflict_and_a_shared_refusal_is_none() {
        let catalog = Catalog::default().with::<Stranger<false>>();
        let told: Vec<String> = catalog.conflicts().iter().map(ToString::to_string).collect();
        assert_eq!(told, ["stranger: its refusal `route.no_match` has a reason that is already taken"]);
        assert_eq!(catalog.refusals(), [&MINE], "those of Forebay itself are counted there");
    }

    #[test]
    fn every_reason_of_a_filter_begins_with_a_phase() {
        use crate::phase::Phase;
        for row in Catalog::builtin().refusals() {
            let phase = row.reason.split('.').next().unwrap_or_default();
            assert!(Phase::ALL.iter().any(|known| known.name() == phase), "{}", row.reason);
        }
    }

    #[test]
    fn entries_that_are_no_filter_are_told_with_their_place() {
        assert_eq!(error("- acess: {}"), "[0].acess: no filter is registered as `acess`");
        let shape = "[0]: expected one filter and its settings, such as `request_id: {}`";
        assert_eq!(error("- request_id"), shape);
        assert_eq!(error("- { request_id: {}, access: {} }"), shape);
    }

    #[test]
    fn a_condition_stands_beside_the_filter() {
        let chain = chain(r#"[ { access: { deny: ["::1"] }, when: 'request.method == "GET"' } ]"#).unwrap_or_default();
        assert!(chain.wants(Stages::REQUEST));
        let told = "[0].when (at 1:1 of the expression): nothing is called `request.pth`: did you mean `request.path`?";
        assert_eq!(error("- { access: { deny: ['::1'] }, when: request.pth }"), told);
        let told = "[0].when (at 1:1 of the expression): `response.code` comes too early: \
                    there is no response yet where this is asked";
        assert_eq!(error("- { access: { deny: ['::1'] }, when: response.code == 500 }"), told);
        assert_eq!(error("- { access: { deny: ['::1'] }, when: true }"), "[0].when: expected an expression in quotes");
        assert_eq!(error("- when: 'true'"), "[0]: expected one filter and its settings, such as `request_id: {}`");
    }

    #[test]
    fn what_acts_on_responses_alone_may_ask_for_them() {
        let yaml = "- { headers: { response: { remove: [Server] } }, when: response.code >= 500 }";
        assert!(chain(yaml).unwrap_or_default().wants(Stages::RESPONSE));
        let both = "- { headers: { request: { remove: [A] }, response: { remove: [B] } }, when: response.code == 500 }";
        assert!(error(both).contains("comes too early"));
    }

    #[test]
    fn a_key_with_nothing_behind_it_takes_every_default() {
        assert!(chain("- request_id:").is_ok());
        assert_eq!(error("- rate_limit:"), "[0].rate_limit: missing field `rate`");
    }

    #[test]
    fn all_errors_of_a_chain_are_told_at_once() {
        let entries: Vec<FilterEntry> =
            serde_yaml::from_str("[ { acess: {} }, { request_id: {} }, { access: {} } ]").unwrap();
        let errors = Catalog::builtin().chain(&entries).err().unwrap_or_default();
        let paths: Vec<&str> = errors.iter().map(|error| error.path.as_str()).collect();
        assert_eq!(paths, ["[0].acess", "[2].access"]);
    }

    #[test]
    fn settings_of_one_filter_do_not_build_another() {
        let catalog = Catalog::builtin();
        let mixed = Decoded { key: "access", settings: Arc::new(()), when: None };
        let error = catalog.build(&mixed, &Surroundings::rehearsal(&())).err().map(|error| error.to_string());
        assert_eq!(error.as_deref(), Some(": these settings were decoded for another filter"));
    }
}
