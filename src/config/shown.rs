//! The effective configuration without secrets, for display.
//!
//! Interpolated values are shown as written (`${…}`), since they may be secrets. Values of keys that hold secrets
//! are hidden even if they are in the file.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde_json::Value;

use super::{Config, Report};
use crate::error::path::{PathStep, is_within, steps};

/// The text shown instead of a secret.
pub const REDACTED: &str = "<redacted>";

/// The keys whose values are secrets, at any path.
const SECRET_KEYS: [&str; 6] = ["secret", "secrets", "token", "tokens", "password", "passwords"];

impl Config {
    /// The effective values, defaults included, without secrets.
    pub fn shown(&self) -> Value {
        // The error cannot happen: the value consists of structs and maps with text keys.
        let mut whole = serde_json::to_value(self).unwrap_or_default();
        self.conceal("", &mut whole);
        whole
    }

    /// Hides secrets in `value`, the effective value at this path.
    pub fn conceal(&self, path: &str, value: &mut Value) {
        for secret in self.source.secrets.iter().filter(|secret| is_within(&secret.path, path)) {
            if let Some(value) = find(value, &secret.path[path.len()..]) {
                *value = Value::String(secret.written.clone());
            }
        }
        hide(value, false);
    }

    /// The same without listeners, upstreams and routes.
    pub fn without_named(&self) -> Config {
        Config {
            version: self.version,
            include: self.include.clone(),
            server: self.server.clone(),
            trusted_proxies: self.trusted_proxies.clone(),
            ipv4_prefix: self.ipv4_prefix,
            ipv6_prefix: self.ipv6_prefix,
            forwarded: self.forwarded,
            via: self.via,
            paths: self.paths,
            listeners: Vec::new(),
            upstreams: BTreeMap::new(),
            routes: Vec::new(),
            acme: self.acme.clone(),
            resources: self.resources.clone(),
            admin: self.admin.clone(),
            observability: self.observability.clone(),
            source: Arc::clone(&self.source),
            warnings: Report::default(),
        }
    }
}

fn find<'v>(value: &'v mut Value, path: &str) -> Option<&'v mut Value> {
    steps(path).try_fold(value, |at, step| match step {
        PathStep::Key(name) => at.get_mut(&*name),
        PathStep::Index(index) => at.get_mut(index),
    })
}

/// Hides values whose key marks them as secret; `binding`: the key of an ACME account (`acme.*.eab`).
fn hide(value: &mut Value, binding: bool) {
    match value {
        Value::Object(entries) => {
            for (name, value) in entries {
                match SECRET_KEYS.contains(&&**name) || (binding && name == "key") {
                    true => redact(value),
                    false => hide(value, name == "eab"),
                }
            }
        }
        Value::Array(items) => items.iter_mut().for_each(|item| hide(item, false)),
        _ => {}
    }
}

fn redact(value: &mut Value) {
    match value {
        // Shown as written in the file, such as `${TOKEN}`.
        Value::String(text) if text.contains("${") => {}
        Value::String(text) => *text = REDACTED.to_owned(),
        Value::Array(items) => items.iter_mut().for_each(redact),
        Value::Object(entries) => entries.values_mut().for_each(redact),
        Value::Number(_) => *value = Value::String(REDACTED.to_owned()),
        Value::Null | Value::Bool(_) => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::parse;
    use crate::filter::Catalog;

    #[test]
    fn what_comes_from_outside_is_shown_as_it_is_written_and_a_secret_not_at_all() {
        let text = "
listeners: [ { name: web, address: 127.0.0.1:8080 } ]
upstreams:
  app:
    endpoints: [ { address: \"${HOST}:80\" } ]
    load_balancing: { sticky: { cookie: { name: at, secret: [ 0123456789abcdef, \"${OLD}\" ] } } }
routes: [ { name: all, upstream: app } ]
admin: { token: open-sesame-0123456789 }
";
        let variable = |name: &str| match name {
            "HOST" => Some("10.9.8.7".to_owned()),
            "OLD" => Some("fedcba9876543210".to_owned()),
            _ => None,
        };
        let config = parse::parse("test.yaml", text, Catalog::builtin().kinds(), &variable);
        let shown = config.unwrap_or_else(|report| panic!("{report}")).shown();
        assert_eq!(shown["upstreams"]["app"]["endpoints"][0]["address"], "${HOST}:80");
        let secret = &shown["upstreams"]["app"]["load_balancing"]["sticky"]["cookie"]["secret"];
        assert_eq!(*secret, serde_json::json!([REDACTED, "${OLD}"]));
        assert_eq!(shown["admin"]["token"], REDACTED);
        let whole = shown.to_string();
        for secret in ["10.9.8.7", "0123456789", "fedcba98", "sesame"] {
            assert!(!whole.contains(secret), "{secret} in {whole}");
        }
        assert_eq!(shown["listeners"][0]["limits"]["headers"], "100", "defaults are in effect, too");
    }
}
