//! Computes from the configuration the source of every certificate, and the certificates of every issuer.

use std::net::IpAddr;
use std::path::PathBuf;

use super::store::Store;
use crate::client::names::Names;
use crate::client::tls;
use crate::client::tls::certificate::Source;
use crate::config::acme::{Issuer, NAMES_MAX, issuable};
use crate::config::listener::tls::{Certificate, CertificateNames};
use crate::config::{self, Config};
use crate::error::BuildError;
use crate::error::path::{join, key};

/// The sources of all certificates.
#[derive(Default)]
pub struct Plan {
    /// Those of each listener, in file order; empty for a listener without TLS.
    pub listeners: Vec<Vec<Source>>,
    /// Those of the admin endpoint.
    pub admin: Vec<Source>,
    /// The issuers that are used.
    pub issuers: Vec<Asked>,
}

/// An issuer and its certificates.
pub struct Asked {
    /// Its name.
    pub name: String,
    /// Its settings.
    pub written: Issuer,
    /// The URL of its directory.
    pub directory: String,
    /// Its part of the store.
    pub store: Store,
    /// Its certificates, each once, even if several listeners use it.
    pub certificates: Vec<Wanted>,
    /// Its path in the configuration.
    at: String,
}

/// A certificate to request from an issuer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// Its names, in lower case.
    pub names: Vec<String>,
    /// The file where it is stored.
    pub path: PathBuf,
}

impl Wanted {
    /// Its first name, which identifies it.
    pub fn name(&self) -> &str {
        self.names.first().map_or("", |name| name)
    }
}

impl Plan {
    /// Computes the plan. Reads certificate files if `names: auto` depends on them.
    ///
    /// # Errors
    ///
    /// Names that issuers do not accept, and two certificates with the same first name.
    pub fn of(config: &Config) -> Result<Plan, Vec<BuildError>> {
        let mut plan = Plan::default();
        let mut errors = Vec::new();
        for (index, listener) in config.listeners.iter().enumerate() {
            let (certificates, at) = (written(listener.tls.as_ref()), format!("listeners[{index}].tls"));
            let passthrough = listener.passthrough.iter().flat_map(|one| &one.sni).map(String::as_str).collect();
            let sources = plan.sources(config, certificates, passthrough, &at, &mut errors);
            plan.listeners.push(sources);
        }
        let certificates = written(config.admin.tls.as_ref().filter(|_| config.admin.enabled));
        plan.admin = plan.sources(config, certificates, Vec::new(), "admin.tls", &mut errors);
        if errors.is_empty() { Ok(plan) } else { Err(errors) }
    }

    fn sources(
        &mut self,
        config: &Config,
        certificates: &[Certificate],
        passthrough: Vec<&str>,
        at: &str,
        errors: &mut Vec<BuildError>,
    ) -> Vec<Source> {
        let mut sources = Vec::new();
        for (index, written) in certificates.iter().enumerate() {
            let Some(issuer) = &written.acme else {
                sources.push(Source::written(written));
                continue;
            };
            let at = format!("{at}.certificates[{index}]");
            let names = match &written.names {
                CertificateNames::These(names) => {
                    Ok(names.iter().map(|name| name.trim_end_matches('.').to_ascii_lowercase()).collect())
                }
                CertificateNames::Auto => {
                    let others = certificates.iter().enumerate().filter(|(other, _)| *other != index);
                    hosts(config, others.map(|(_, other)| other), &passthrough)
                }
            };
            let planned = names
                .map_err(|message| BuildError::new("names", message))
                .and_then(|names| self.ask(config, issuer, names, &at));
            match planned {
                Ok(wanted) => {
                    let path = wanted.path.to_string_lossy().into_owned();
                    sources.push(Source::issued(&path, wanted.names, written));
                }
                Err(error) => errors.push(error.under(&at)),
            }
        }
        sources
    }

    /// Adds a certificate with these names to an issuer.
    fn ask(&mut self, config: &Config, issuer: &str, names: Vec<String>, at: &str) -> Result<Wanted, BuildError> {
        // The configuration was checked: the issuer exists and has a directory.
        let unknown = || BuildError::new("acme", format!("there is no issuer `{issuer}` with a directory"));
        let index = match self.issuers.iter().position(|asked| asked.name == issuer) {
            Some(index) => index,
            None => {
                let written = config.issuer(issuer).ok_or_else(unknown)?;
                self.issuers.push(Asked {
                    name: issuer.to_owned(),
                    directory: written.directory(issuer).ok_or_else(unknown)?.to_owned(),
                    store: Store::of(&written.store, issuer),
                    certificates: Vec::new(),
                    at: match config.acme.contains_key(issuer) {
                        true => join(&join("acme", &key(issuer)), "store"),
                        false => format!("{at}.acme"),
                    },
                    written,
                });
                self.issuers.len() - 1
            }
        };
        let asked = &mut self.issuers[index];
        let first = names.first().map_or("", |name| name);
        let wanted = Wanted { path: asked.store.certificate(first), names };
        match asked.certificates.iter().find(|other| other.path == wanted.path) {
            Some(other) if *other == wanted => {}
            Some(_) => {
                let message = format!(
                    "`{}` comes first in another certificate of `{issuer}` with other names: write the same names, or \
                     another one first",
                    wanted.name()
                );
                return Err(BuildError::new("names", message));
            }
            None => asked.certificates.push(wanted.clone()),
        }
        Ok(wanted)
    }
}

impl Asked {
    /// The error if its part of the store cannot be created.
    pub fn inspect(&self) -> Option<BuildError> {
        self.store.inspect().err().map(|error| self.unusable(&error))
    }

    /// The error for an unusable store.
    pub fn unusable(&self, error: &std::io::Error) -> BuildError {
        let store = &self.written.store;
        BuildError::new(&self.at, format!("no certificate can be kept in `{store}`: {error}"))
    }
}

fn written(tls: Option<&config::listener::Tls>) -> &[Certificate] {
    tls.map(|tls| &*tls.certificates).unwrap_or_default()
}

/// The hosts of all routes that no other certificate of the listener covers.
fn hosts<'c>(
    config: &Config,
    others: impl Iterator<Item = &'c Certificate>,
    passthrough: &[&str],
) -> Result<Vec<String>, String> {
    let mut taken = Names::default();
    for other in others {
        let source = Source::written(other);
        let names = match source.names.is_empty() {
            false => source.names,
            // Errors in the file are reported when it is loaded for serving.
            true if other.acme.is_none() => match tls::inspect(&source) {
                Ok(Some(facts)) => facts.names.iter().map(ToString::to_string).collect(),
                _ => Vec::new(),
            },
            true => Vec::new(),
        };
        for name in names {
            taken.insert(&name.to_ascii_lowercase(), ());
        }
    }
    for name in passthrough {
        taken.insert(&name.to_ascii_lowercase(), ());
    }
    let mut names: Vec<String> = Vec::new();
    for route in &config.routes {
        for host in &route.matches.hosts {
            let name = host.trim_end_matches('.');
            if is_address(name) || taken.find(name).is_some() || names.iter().any(|known| known == name) {
                continue;
            }
            issuable(name).map_err(|why| format!("the host `{name}` of the route `{}`: {why}", route.name))?;
            names.push(name.to_owned());
        }
    }
    match names.len() {
        0 => {
            Err("no route has a host that this certificate could be for: write `match: { hosts: [ … ] }`, or the names"
                .to_owned())
        }
        1..=NAMES_MAX => Ok(names),
        many => {
            Err(format!("the routes have {many} hosts, and a certificate at most {NAMES_MAX} names: write several"))
        }
    }
}

fn is_address(host: &str) -> bool {
    host.trim_matches(['[', ']']).parse::<IpAddr>().is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gateway::Gateway;

    fn plan(listeners: &str, hosts: &str, more: &str) -> Result<Plan, Vec<String>> {
        let text = format!(
            "listeners: [ {listeners} ]\nupstreams: {{ app: {{ endpoints: [ {{ address: \"127.0.0.1:1\" }} ] }} }}\n\
             routes: [ {{ name: all, match: {{ hosts: [ {hosts} ] }}, upstream: app }} ]\n{more}"
        );
        let config =
            Gateway::builder().parse("test.yaml", &text).unwrap_or_else(|report| panic!("{}", report.render(false)));
        Plan::of(&config).map_err(|errors| errors.iter().map(ToString::to_string).collect())
    }

    fn web(certificates: &str) -> String {
        format!("{{ name: web, address: \"127.0.0.1:0\", tls: {{ certificates: [ {certificates} ] }} }}")
    }

    #[test]
    fn auto_takes_the_hosts_that_nothing_else_is_for() {
        let listener = "{ name: web, address: \"127.0.0.1:0\", passthrough: [ { sni: [db.test], upstream: app } ], tls: { certificates: [ \
             { acme: letsencrypt, names: auto }, { acme: letsencrypt, names: [Own.test, x.own.test] } ] } }";
        let found = plan(listener, "B.test, a.test, db.test, b.test, own.test, 10.0.0.1", "").expect("a plan");
        let [asked] = &found.issuers[..] else { panic!("one issuer") };
        assert_eq!(
            asked.certificates.iter().map(|one| one.names.join(" ")).collect::<Vec<_>>(),
            ["b.test a.test", "own.test x.own.test"]
        );
        assert_eq!(asked.certificates[0].path, PathBuf::from("/var/lib/forebay/acme/letsencrypt/b.test.pem"));
        assert!(found.listeners[0].iter().all(|source| source.issued && source.cert == source.key));
    }

    #[test]
    fn what_auto_cannot_take_is_told_with_its_route() {
        let told = |hosts: &str| {
            plan(&web("{ acme: letsencrypt, names: auto }"), hosts, "").err().expect("an error").remove(0)
        };
        assert_eq!(
            told("a.test, \"*.b.test\""),
            "listeners[0].tls.certificates[0].names: the host `*.b.test` of the route `all`: `tls_alpn_01` and \
             `http_01` cannot prove a wildcard: list the names, or use a certificate file"
        );
        assert!(told("").contains("no route has a host"), "{}", told(""));
    }

    #[test]
    fn one_certificate_on_two_listeners_is_ordered_once_and_two_are_told_apart() {
        let second = |names: &str| {
            let one = "{ acme: letsencrypt, names: [a.test, b.test] }";
            let other = format!(
                "{{ name: other, address: \"127.0.0.2:0\", tls: {{ certificates: [ {{ acme: letsencrypt, names: [{names}] }} ] }} }}"
            );
            plan(&format!("{}, {other}", web(one)), "", "")
        };
        assert_eq!(second("a.test, b.test").expect("a plan").issuers[0].certificates.len(), 1);
        assert_eq!(second("b.test, a.test").expect("a plan").issuers[0].certificates.len(), 2);
        let told = second("a.test").err().expect("an error");
        assert!(told[0].starts_with("listeners[1].tls.certificates[0].names: `a.test` comes first"), "{told:?}");
    }
}
