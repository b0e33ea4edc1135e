//! A configuration that is built: what of it a next one can take over.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::sockets::Place;
use crate::acme::Acme;
use crate::admin::status::Listed;
use crate::client::acceptor::Acceptor;
use crate::client::connection::Listener;
use crate::client::tls::Tls;
use crate::config::{self, Config};
use crate::proxy::generation::Generation;
use crate::upstream::Upstream;

/// A configuration that is built: it runs, or is ready to.
pub struct Running {
    /// As it is written.
    pub config: Config,
    /// What requests go by.
    pub generation: Arc<Generation>,
    /// The upstreams, by name.
    pub upstreams: BTreeMap<String, Arc<Upstream>>,
    /// The listeners, in the order of the file.
    pub listeners: Vec<Standing>,
    /// The TLS of the admin endpoint.
    pub admin_tls: Option<Arc<Tls>>,
    /// What orders certificates.
    pub acme: Option<Arc<Acme>>,
    /// The routes as `/status` shows them.
    pub listed: Vec<Listed>,
}

/// A listener and the socket that it has.
pub struct Standing {
    /// The listener.
    pub listener: Arc<Listener>,
    /// What accepts its connections.
    pub acceptor: Arc<Acceptor>,
    /// Where it was bound to.
    pub place: Place,
    /// The socket was open before.
    pub kept: bool,
}

impl Running {
    /// The listener of this name.
    pub fn listener(&self, name: &str) -> Option<&Listener> {
        Some(&self.listeners.iter().find(|standing| standing.listener.name == name)?.listener)
    }

    /// The listener of this name, as it is written.
    pub fn written(&self, name: &str) -> Option<&config::Listener> {
        self.config.listeners.iter().find(|listener| listener.name == name)
    }

    /// The listener that is written so, if nothing of it differs, nor of what it has besides.
    pub fn unchanged(
        &self,
        written: &config::Listener,
        tls: Option<&Arc<Tls>>,
        upstreams: &BTreeMap<String, Arc<Upstream>>,
    ) -> Option<Arc<Listener>> {
        let same_upstream = |name: &String| match (self.upstreams.get(name), upstreams.get(name)) {
            (Some(before), Some(now)) => Arc::ptr_eq(before, now),
            _ => false,
        };
        let same_tls = |listener: &Listener| match (&listener.tls, tls) {
            (Some(before), Some(now)) => Arc::ptr_eq(before, now),
            (None, None) => true,
            _ => false,
        };
        let mut relayed =
            written.passthrough.iter().map(|one| &one.upstream).chain(written.tcp.iter().map(|tcp| &tcp.upstream));
        let same = self.written(&written.name) == Some(written) && relayed.all(same_upstream);
        let standing = self.listeners.iter().find(|standing| same && standing.listener.name == written.name)?;
        same_tls(&standing.listener).then(|| standing.listener.clone())
    }

    /// The socket that is open at the address of this listener, whosever it is. One at a port of the system's choice is
    /// that of the listener of the same name.
    pub fn open_at(&self, written: &config::Listener) -> Option<&Standing> {
        let any_port = written.address.0.ends_with(":0");
        let mut named = self.config.listeners.iter().zip(&self.listeners);
        let found = named
            .find(|(earlier, _)| earlier.address == written.address && (!any_port || earlier.name == written.name));
        found.map(|(_, standing)| standing)
    }

    /// Whether issuers are asked for the same as by this configuration.
    pub fn asks_the_same(&self, config: &Config) -> bool {
        let tls = |config: &Config| -> Vec<_> {
            let listeners =
                config.listeners.iter().map(|listener| (listener.tls.clone(), listener.passthrough.clone()));
            listeners.collect()
        };
        let hosts =
            |config: &Config| -> Vec<_> { config.routes.iter().map(|route| route.matches.hosts.clone()).collect() };
        self.config.acme == config.acme && tls(&self.config) == tls(config) && hosts(&self.config) == hosts(config)
    }

    /// Everything whose certificates are kept up to date.
    pub fn secured(&self) -> Vec<Arc<Tls>> {
        let listeners = self.listeners.iter().filter_map(|standing| standing.listener.tls.clone());
        listeners.chain(self.admin_tls.clone()).collect()
    }
}
