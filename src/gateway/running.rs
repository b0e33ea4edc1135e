//! A built configuration, and which of its parts the next one can reuse.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::sockets::Place;
use crate::acme::Acme;
use crate::admin::status::Listed;
use crate::client::acceptor::Acceptor;
use crate::client::listener::Listener;
use crate::client::tls::Tls;
use crate::config::{self, Config};
use crate::proxy::generation::Generation;
use crate::upstream::Upstream;

/// A built configuration: active, or ready to be activated.
pub struct Running {
    /// The settings as written.
    pub config: Config,
    /// The part that requests use.
    pub generation: Arc<Generation>,
    /// The upstreams, by name.
    pub upstreams: BTreeMap<String, Arc<Upstream>>,
    /// The listeners, in file order.
    pub listeners: Vec<OpenListener>,
    /// The TLS of the admin endpoint.
    pub admin_tls: Option<Arc<Tls>>,
    /// The ACME client.
    pub acme: Option<Arc<Acme>>,
    /// The routes for `/status`.
    pub listed: Vec<Listed>,
}

/// A listener and its socket.
pub struct OpenListener {
    /// The listener.
    pub listener: Arc<Listener>,
    /// The acceptor of its connections.
    pub acceptor: Arc<Acceptor>,
    /// The bound address.
    pub place: Place,
    /// Whether the socket was already open.
    pub kept: bool,
}

impl Running {
    /// The listener of this name.
    pub fn listener(&self, name: &str) -> Option<&Listener> {
        Some(&self.listeners.iter().find(|open_listener| open_listener.listener.name == name)?.listener)
    }

    /// The settings of the listener of this name.
    pub fn written(&self, name: &str) -> Option<&config::Listener> {
        self.config.listeners.iter().find(|listener| listener.name == name)
    }

    /// The running listener with these settings, if it and its parts are unchanged.
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
        let open_listener =
            self.listeners.iter().find(|open_listener| same && open_listener.listener.name == written.name)?;
        same_tls(&open_listener.listener).then(|| open_listener.listener.clone())
    }

    /// The open socket at this listener's address, of any listener. For port 0, the socket of the listener with the
    /// same name.
    pub fn open_at(&self, written: &config::Listener) -> Option<&OpenListener> {
        let any_port = written.address.0.ends_with(":0");
        let mut named = self.config.listeners.iter().zip(&self.listeners);
        let found = named
            .find(|(earlier, _)| earlier.address == written.address && (!any_port || earlier.name == written.name));
        found.map(|(_, open_listener)| open_listener)
    }

    /// Whether the same certificates are requested from issuers.
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

    /// All TLS settings whose certificates are kept up to date.
    pub fn secured(&self) -> Vec<Arc<Tls>> {
        let listeners = self.listeners.iter().filter_map(|open_listener| open_listener.listener.tls.clone());
        listeners.chain(self.admin_tls.clone()).collect()
    }
}
