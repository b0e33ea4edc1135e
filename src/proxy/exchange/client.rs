//! Who asks: the connection that an exchange came over, and the client behind it.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use http::Uri;

use crate::client::connection::{Begin, Connection, UnderWay};
use crate::client::http2::Control;
use crate::client::tls::handshake::Facts;
use crate::client::waiting::Who;
use crate::config::listener::OddNames;
use crate::error::Refusal;
use crate::expression::{Identity, Prefix, Secured};
use crate::party::Fault;
use crate::upstream::transport::greeting::Parties;

/// The client of an exchange.
#[derive(Default)]
pub struct Client {
    /// The connection it came over. `None` only for sessions that were not made by `client::Front`.
    pub connection: Option<Arc<Connection>>,
    /// What can be done with its stream, on HTTP/2.
    pub control: Option<Control>,
    /// The client's address: the peer's, or what a trusted proxy said.
    pub address: Option<IpAddr>,
    /// How much of it is one client, where limits are per client.
    pub prefix: Prefix,
    /// Whether the peer is a trusted proxy.
    pub peer_is_trusted: bool,
    /// Who asks, once a filter has found out.
    pub identity: Option<Arc<Identity>>,
    /// Its connection, of HTTP/1, is to end once the exchange is settled.
    pub closes: bool,
    /// The place of the exchange among the requests of its client that are under way.
    place: Option<UnderWay>,
}

impl Client {
    /// The client of an exchange that begins so. Its address is not known before the header was looked at.
    pub fn new(begin: Option<Begin>) -> Client {
        let Some(Begin { connection, control, .. }) = begin else { return Client::default() };
        Client { connection: Some(connection), control, ..Client::default() }
    }

    /// Counts the exchange among the requests of its client, unless too many are under way.
    ///
    /// # Errors
    ///
    /// The refusal for the client.
    pub fn take_place(&mut self) -> Result<(), &'static Refusal> {
        if let Some(connection) = &self.connection {
            self.place = Some(connection.begin_request()?);
        }
        Ok(())
    }

    /// The name of the listener; empty if the connection is not known.
    pub fn listener(&self) -> &str {
        self.connection.as_ref().map_or("", |connection| &connection.listener.name)
    }

    /// Who connected: the client, or a proxy before it.
    pub fn peer(&self) -> Option<SocketAddr> {
        self.connection.as_ref()?.peer
    }

    /// The port of the client; 0 where a proxy speaks for it.
    pub fn port(&self) -> u16 {
        self.peer().filter(|peer| Some(peer.ip()) == self.address).map_or(0, |peer| peer.port())
    }

    /// What is known of its TLS. `None`: it is in clear text.
    pub fn tls(&self) -> Option<&Facts> {
        self.connection.as_ref()?.tls()
    }

    /// The same, as expressions ask for it.
    pub fn secured(&self) -> Secured<'_> {
        secured(self.connection.as_deref())
    }

    /// What its stream found wrong with its bytes, if anything.
    pub fn fault(&self) -> Option<Fault> {
        self.connection.as_ref()?.fault()
    }

    /// What becomes of fields with odd names.
    pub fn odd_names(&self) -> OddNames {
        self.connection.as_ref().map_or(OddNames::Drop, |connection| connection.listener.odd_names)
    }

    /// Whom is waited for, and on whose account bodies are held: the peer's, unless that speaks for another client.
    /// `target` is what was asked for, where a filter may have changed that.
    pub fn who(&self, target: Option<Uri>) -> Who {
        let peer = self.peer().map(|peer| peer.ip());
        let account = self.connection.as_ref().and_then(|connection| connection.account());
        Who { client: self.address, account: account.filter(|_| self.address == peer).cloned(), target }
    }

    /// The two ends of the client's connection, as an endpoint may be told of them.
    pub fn parties(&self) -> Option<Parties> {
        let (connection, client) = (self.connection.as_ref()?, self.address?);
        Some(Parties { client: SocketAddr::new(client, self.port()), gateway: connection.local? })
    }
}

/// The TLS of a connection, as expressions ask for it.
pub fn secured(connection: Option<&Connection>) -> Secured<'_> {
    let Some(tls) = connection.and_then(Connection::tls) else { return Secured::default() };
    let (version, sni) = (tls.version, tls.name.as_deref().unwrap_or_default());
    let Some(client) = &tls.client else { return Secured { version, sni, ..Secured::default() } };
    Secured { version, sni, subject: &client.subject, names: &client.names, fingerprint: &client.fingerprint }
}
