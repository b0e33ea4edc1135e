//! The certificates by server name: exact names before wildcards, and a default for others.
//!
//! A table is built outside the workers and replaced atomically, so that a connection sees one consistent state.

use std::collections::HashMap;
use std::sync::Arc;

use boring::ssl::SslContext;

use crate::client::hello::{Hello, KeyKind};
use crate::client::names::Names;
use crate::error::{BuildError, Refusal, refusal};

/// Digest of the requirements for client certificates. `None`: no requirements.
pub type Policy = Option<[u8; 32]>;

/// A certificate that is ready for use.
#[derive(Clone)]
pub struct Served {
    /// Its names; a wildcard begins with `*.`.
    pub names: Vec<Box<str>>,
    /// Names that it should cover, and that the issuer has not issued yet.
    pub awaited: Vec<Box<str>>,
    /// The kind of its key.
    pub kind: KeyKind,
    /// The requirements for clients.
    pub policy: Policy,
    /// Its TLS context. `None`: it is not issued yet, for any of its names.
    pub context: Option<SslContext>,
}

/// The certificates of one name.
pub struct Host {
    /// In order of preference: a client that can verify several gets the cheapest for both sides. Empty until an issuer
    /// has issued one.
    contexts: Vec<(KeyKind, SslContext)>,
    policy: Policy,
}

/// All names of a listener.
#[derive(Default)]
pub struct Table {
    names: Names<Arc<Host>>,
    default: Option<Arc<Host>>,
    /// Whether names differ in their requirements for clients.
    mixed: bool,
}

impl Host {
    /// Chooses the context for a client. A client that cannot verify any certificate still gets one: the library then
    /// sends the proper alert.
    ///
    /// # Errors
    ///
    /// If the certificate is not issued yet.
    pub fn choose(&self, hello: &Hello) -> Result<&(KeyKind, SslContext), &'static Refusal> {
        let verifiable = self.contexts.iter().find(|(kind, _)| hello.verifies(*kind));
        verifiable.or(self.contexts.last()).ok_or(&refusal::HANDSHAKE_AWAITED)
    }

    /// The requirements for clients.
    pub fn policy(&self) -> Policy {
        self.policy
    }
}

impl Table {
    /// Builds the table of these certificates; `default` is the name for clients that request none of the names.
    ///
    /// # Errors
    ///
    /// A name with two certificates of one kind or with different requirements for clients; a default without a
    /// certificate.
    pub fn build(served: &[Served], default: Option<&str>) -> Result<Table, Vec<BuildError>> {
        let mut errors = Vec::new();
        let mut names: HashMap<&str, Vec<usize>> = HashMap::new();
        for (index, one) in served.iter().enumerate() {
            for name in one.names.iter().chain(&one.awaited) {
                let before = names.entry(name).or_default();
                let wrong = |what: &str| BuildError::new(format!("certificates[{index}]"), format!("`{name}` {what}"));
                if before.iter().any(|&other| served[other].kind == one.kind) {
                    errors.push(wrong(&format!(
                        "has two certificates with {} keys: say with `names` which one is used for it",
                        one.kind.name()
                    )));
                } else if before.iter().any(|&other| served[other].policy != one.policy) {
                    errors.push(wrong(
                        "has two certificates that ask different things of clients: give both the same `client`",
                    ));
                }
                before.push(index);
            }
        }
        let mut table = Table::default();
        let mut awaited = Vec::new();
        for (name, mut of) in names {
            of.sort_by_key(|&index| served[index].kind);
            let ready = of.iter().filter(|&&index| served[index].names.iter().any(|own| **own == *name));
            let contexts: Vec<_> =
                ready.filter_map(|&index| Some((served[index].kind, served[index].context.clone()?))).collect();
            let policy = served[of[0]].policy;
            if contexts.is_empty() {
                awaited.push((name, policy));
            } else {
                table.names.insert(name, Arc::new(Host { contexts, policy }));
            }
        }
        // Until a name has its own certificate, a matching wildcard serves it.
        let hosts = awaited.into_iter().map(|(name, policy)| {
            let wildcard = table.names.find(name).filter(|host| host.policy == policy).cloned();
            (name, wildcard.unwrap_or_else(|| Arc::new(Host { contexts: Vec::new(), policy })))
        });
        for (name, host) in hosts.collect::<Vec<_>>() {
            table.names.insert(name, host);
        }
        if let Some(written) = default {
            table.default = table.names.find(&written.to_ascii_lowercase()).cloned();
            if table.default.is_none() {
                let message = format!("no certificate is made out to `{written}`");
                errors.push(BuildError::new("default", message));
            }
        }
        let first = served.first().and_then(|one| one.policy);
        table.mixed = served.iter().any(|one| one.policy != first);
        if errors.is_empty() { Ok(table) } else { Err(errors) }
    }

    /// The certificates for this name, which is in lower case.
    ///
    /// # Errors
    ///
    /// If there are none for this name, or without a name.
    pub fn find(&self, name: Option<&str>) -> Result<&Arc<Host>, &'static Refusal> {
        let named = name.and_then(|name| self.names.find(name));
        let why = if name.is_some() { &refusal::HANDSHAKE_UNKNOWN_NAME } else { &refusal::HANDSHAKE_NO_NAME };
        named.or(self.default.as_ref()).ok_or(why)
    }

    /// Whether a connection with the requirements `policy` may be used for `host`. If not, the host has other
    /// requirements, and the client must open another connection (RFC 9110 §15.5.20).
    pub fn may_serve(&self, host: &str, policy: Policy) -> bool {
        if !self.mixed {
            return true;
        }
        let host = host.to_ascii_lowercase();
        // A host without a certificate has no requirements: it does not lead to the routes of another host.
        self.find(Some(&host)).map_or(policy.is_none(), |found| found.policy == policy)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pingora::tls::ssl::SslMethod;

    fn served(names: &[&str], kind: KeyKind, policy: u8) -> Served {
        let context = SslContext::builder(SslMethod::tls()).expect("a context").build();
        let policy = (policy > 0).then_some([policy; 32]);
        let names = names.iter().map(|&name| name.into()).collect();
        Served { names, awaited: Vec::new(), kind, policy, context: Some(context) }
    }

    fn kinds(host: &Host) -> Vec<KeyKind> {
        host.contexts.iter().map(|(kind, _)| *kind).collect()
    }

    fn told(served: &[Served], default: Option<&str>) -> Vec<String> {
        let errors = Table::build(served, default).err().unwrap_or_default();
        errors.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn an_exact_name_goes_before_a_wildcard_and_the_default_takes_the_rest() {
        let all = [
            served(&["*.a.test"], KeyKind::P256, 0),
            served(&["b.a.test"], KeyKind::P384, 0),
            served(&["c.test"], KeyKind::Ed25519, 0),
        ];
        let table = Table::build(&all, Some("C.test")).expect("a table");
        let found = |name| kinds(table.find(name).expect("a host"))[0];
        assert_eq!(found(Some("b.a.test")), KeyKind::P384);
        assert_eq!(found(Some("b.a.test.")), KeyKind::P384);
        assert_eq!(found(Some("d.a.test")), KeyKind::P256);
        assert_eq!(found(Some("d.b.a.test")), KeyKind::Ed25519, "a wildcard stands for one label");
        assert_eq!(found(Some("a.test")), KeyKind::Ed25519);
        assert_eq!(found(None), KeyKind::Ed25519);

        let strict = Table::build(&all, None).expect("a table");
        assert_eq!(strict.find(Some("a.test")).err(), Some(&refusal::HANDSHAKE_UNKNOWN_NAME));
        assert_eq!(strict.find(None).err(), Some(&refusal::HANDSHAKE_NO_NAME));
    }

    #[test]
    fn ecdsa_goes_before_rsa_where_a_name_has_both() {
        let all = [served(&["a.test"], KeyKind::Rsa, 0), served(&["a.test"], KeyKind::P256, 0)];
        let table = Table::build(&all, None).expect("a table");
        assert_eq!(kinds(table.find(Some("a.test")).expect("a host")), [KeyKind::P256, KeyKind::Rsa]);
    }

    #[test]
    fn a_name_whose_certificate_is_awaited_has_its_place_and_is_served_by_a_wildcard_until_then() {
        let awaited = |names: &[&str], policy| {
            let one = served(names, KeyKind::P256, policy);
            Served { names: Vec::new(), awaited: one.names, context: None, ..one }
        };
        let all = [
            served(&["*.a.test"], KeyKind::P384, 0),
            awaited(&["b.a.test", "c.test"], 0),
            awaited(&["closed.a.test"], 1),
            served(&["c.test"], KeyKind::Rsa, 0),
        ];
        let table = Table::build(&all, Some("closed.a.test")).expect("a table");
        let found = |name| table.find(Some(name)).expect("a host");
        assert_eq!(kinds(found("b.a.test")), [KeyKind::P384]);
        assert_eq!(kinds(found("c.test")), [KeyKind::Rsa], "the other of its two");
        let closed = found("closed.a.test");
        assert!(kinds(closed).is_empty() && closed.policy == Some([1; 32]), "a wildcard asks for something else");
        assert_eq!(closed.choose(&Hello::default()).err(), Some(&refusal::HANDSHAKE_AWAITED));
        assert!(!table.may_serve("closed.a.test", None));

        let twice = [awaited(&["a.test"], 0), served(&["a.test"], KeyKind::P256, 0)];
        assert_eq!(told(&twice, None).len(), 1, "found before it is issued");
    }

    #[test]
    fn what_contradicts_itself_is_refused_with_its_place() {
        assert_eq!(
            told(&[served(&["a.test"], KeyKind::P256, 0), served(&["b.test", "a.test"], KeyKind::P256, 0)], None),
            ["certificates[1]: `a.test` has two certificates with ECDSA P-256 keys: \
              say with `names` which one is used for it"]
        );
        assert_eq!(
            told(&[served(&["a.test"], KeyKind::P256, 0), served(&["a.test"], KeyKind::Rsa, 1)], None),
            ["certificates[1]: `a.test` has two certificates that ask different things of clients: \
              give both the same `client`"]
        );
        assert_eq!(
            told(&[served(&["a.test"], KeyKind::P256, 0)], Some("b.test")),
            ["default: no certificate is made out to `b.test`"]
        );
    }

    #[test]
    fn a_connection_serves_no_host_that_asks_something_else_of_clients() {
        let all = [served(&["open.test"], KeyKind::P256, 0), served(&["closed.test"], KeyKind::P256, 1)];
        let table = Table::build(&all, None).expect("a table");
        assert!(table.may_serve("open.test", None) && table.may_serve("Closed.test", Some([1; 32])));
        assert!(!table.may_serve("closed.test", None) && !table.may_serve("open.test", Some([1; 32])));
        assert!(!table.may_serve("CLOSED.test.", None));
        assert!(table.may_serve("elsewhere.test", None) && !table.may_serve("elsewhere.test", Some([1; 32])));
        let alike = Table::build(&all[..1], None).expect("a table");
        assert!(alike.may_serve("anything.test", None));
    }
}
