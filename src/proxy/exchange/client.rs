//! The client of an exchange, and its connection.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use http::Uri;

use crate::client::connection::Connection;
use crate::client::http2::Control;
use crate::client::listener::UnderWay;
use crate::client::start::ExchangeStart;
use crate::client::stream::WeakBypass;
use crate::client::tls::handshake::Facts;
use crate::config::listener::OddNames;
use crate::error::Refusal;
use crate::expression::{Identity, Prefix, Secured};
use crate::party::Fault;
use crate::slow_client::waiting::Who;
use crate::upstream::transport::proxy_protocol::ClientAddresses;

/// The client of an exchange.
#[derive(Default)]
pub struct Client {
    /// The connection. `None` only for sessions that `client::DownstreamApp` did not create.
    pub connection: Option<Arc<Connection>>,
    /// The control of the stream, on HTTP/2.
    pub control: Option<Control>,
    /// The path past the session, on HTTP/1.
    pub bypass: Option<WeakBypass>,
    /// The client's address: the peer's, or the one that a trusted proxy names.
    pub address: Option<IpAddr>,
    /// The part of the address that identifies one client, for limits per client.
    pub prefix: Prefix,
    /// Whether the peer is a trusted proxy.
    pub peer_is_trusted: bool,
    /// The client's identity, once a filter has determined it.
    pub identity: Option<Arc<Identity>>,
    /// Whether its HTTP/1 connection closes once the exchange is settled.
    pub closes: bool,
    /// The entry among the active requests of the client.
    place: Option<UnderWay>,
}

impl Client {
    /// The client of a new exchange. Its address is determined from the header later.
    pub fn new(begin: Option<ExchangeStart>) -> Client {
        let Some(ExchangeStart { connection, control, bypass, .. }) = begin else { return Client::default() };
        Client { connection: Some(connection), control, bypass, ..Client::default() }
    }

    /// Counts the exchange among the active requests of its client.
    ///
    /// # Errors
    ///
    /// The refusal for the client, if it has too many active requests.
    pub fn take_place(&mut self) -> Result<(), &'static Refusal> {
        if let Some(connection) = &self.connection {
            self.place = Some(connection.begin_request()?);
        }
        Ok(())
    }

    /// The name of the listener; empty if the connection is unknown.
    pub fn listener(&self) -> &str {
        self.connection.as_ref().map_or("", |connection| &connection.listener.name)
    }

    /// The address of the peer: the client, or a proxy in front of Forebay.
    pub fn peer(&self) -> Option<SocketAddr> {
        self.connection.as_ref()?.peer
    }

    /// The client's port; 0 if a proxy names the client.
    pub fn port(&self) -> u16 {
        self.peer().filter(|peer| Some(peer.ip()) == self.address).map_or(0, |peer| peer.port())
    }

    /// The facts about TLS. `None`: the connection is in clear text.
    pub fn tls(&self) -> Option<&Facts> {
        self.connection.as_ref()?.tls()
    }

    /// The facts about TLS, for expressions.
    pub fn secured(&self) -> Secured<'_> {
        secured(self.connection.as_deref())
    }

    /// The fault that the stream found in the client's bytes, if any.
    pub fn fault(&self) -> Option<Fault> {
        self.connection.as_ref()?.fault()
    }

    /// How fields with unusual names are treated.
    pub fn odd_names(&self) -> OddNames {
        self.connection.as_ref().map_or(OddNames::Drop, |connection| connection.listener.terms.odd_names)
    }

    /// The client for waits, and for the account of held bodies: the peer, unless it acts for another client. `target`
    /// is the original target, if a filter may have changed it.
    pub fn who(&self, target: Option<Uri>) -> Who {
        let peer = self.peer().map(|peer| peer.ip());
        let account = self.connection.as_ref().and_then(|connection| connection.account());
        Who { client: self.address, account: account.filter(|_| self.address == peer).cloned(), target }
    }

    /// The two ends of the client's connection, as the endpoint may learn them.
    pub fn addresses(&self) -> Option<ClientAddresses> {
        let (connection, client) = (self.connection.as_ref()?, self.address?);
        Some(ClientAddresses { client: SocketAddr::new(client, self.port()), gateway: connection.local? })
    }
}

/// The facts about a connection's TLS, for expressions.
pub fn secured(connection: Option<&Connection>) -> Secured<'_> {
    let Some(tls) = connection.and_then(Connection::tls) else { return Secured::default() };
    let (version, sni) = (tls.version, tls.name.as_deref().unwrap_or_default());
    let Some(client) = &tls.client else { return Secured { version, sni, ..Secured::default() } };
    Secured { version, sni, subject: &client.subject, names: &client.names, fingerprint: &client.fingerprint }
}
