//! The handshake: turns a context and a client's first bytes into a TLS connection or a refusal.
//!
//! A handshake with an ECDSA key takes about 0.1 ms and runs on the worker. One with an RSA key takes about a
//! millisecond and runs on separate threads ([`Threads`]), so that it does not delay other connections.

use std::pin::Pin;

use boring::ssl::SslContext;
use foreign_types_shared::ForeignType;
use pingora::tls::hash::MessageDigest;
use pingora::tls::ssl::{ErrorCode, NameType, Ssl, SslRef, SslVersion};
use pingora::tls::ssl_sys as ffi;
use pingora::tls::tokio_ssl::SslStream;
use pingora::tls::x509::X509;

use super::certificate;
use super::stream::{Raw, TlsStream};
use super::table::Policy;
use crate::client::hello::{Hello, KeyKind};
use crate::error::{Refusal, refusal};
use crate::net;
use crate::party::wait::{NoClient, within};

/// The result of a handshake, as far as it is used later.
#[derive(Debug)]
pub struct Facts {
    /// The requested server name.
    pub name: Option<Box<str>>,
    /// The version, such as `TLSv1.3`.
    pub version: &'static str,
    /// The cipher suite, by its name in the standard.
    pub cipher: &'static str,
    /// Whether ALPN selected HTTP/2.
    pub h2: bool,
    /// Whether a session was resumed.
    pub resumed: bool,
    /// The requirements for the client's certificate.
    pub policy: Policy,
    /// The verified certificate of the client.
    pub client: Option<ClientCertificate>,
}

/// A client's identity from its certificate.
#[derive(Debug)]
pub struct ClientCertificate {
    /// Its subject, such as `CN=Ada,O=Example`.
    pub subject: String,
    /// Its alternative names: hosts, mail addresses and URIs, separated by commas. A comma within a name is written
    /// `%2C`, so that it cannot imitate two names.
    pub names: String,
    /// Its SHA-256 fingerprint, in hexadecimal.
    pub fingerprint: String,
    /// Its serial number, in hexadecimal.
    pub serial: String,
}

/// Threads for handshakes that would delay a worker.
pub struct Threads(Option<tokio::runtime::Runtime>);

impl Threads {
    /// Starts this number of threads.
    ///
    /// # Errors
    ///
    /// If the system cannot start them.
    pub fn start(threads: usize) -> std::io::Result<Threads> {
        let mut runtime = tokio::runtime::Builder::new_multi_thread();
        runtime.worker_threads(threads).thread_name("handshakes").enable_all();
        Ok(Threads(Some(runtime.build()?)))
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        // Dropping must not block.
        if let Some(runtime) = self.0.take() {
            runtime.shutdown_background();
        }
    }
}

/// Runs a handshake, on the threads if there are any and the key is RSA.
///
/// # Errors
///
/// The reason of its failure. Alerts for the client were already sent.
pub async fn shake(
    context: SslContext,
    kind: KeyKind,
    raw: Raw,
    threads: Option<&Threads>,
) -> Result<SslStream<Raw>, &'static Refusal> {
    let threads = threads.filter(|_| kind == KeyKind::Rsa).and_then(|threads| threads.0.as_ref());
    match threads {
        Some(threads) => {
            // Cancelled with the connection: dropping this future drops the guard, and the task with it.
            let task = Given(threads.spawn(accept(context, raw)));
            task.await.unwrap_or(Err(&refusal::HANDSHAKE_FAILED))
        }
        None => accept(context, raw).await,
    }
}

/// A task that is aborted when its waiter is dropped.
struct Given<T>(tokio::task::JoinHandle<T>);

impl<T> Future for Given<T> {
    type Output = Result<T, tokio::task::JoinError>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut std::task::Context<'_>) -> std::task::Poll<Self::Output> {
        Pin::new(&mut self.0).poll(cx)
    }
}

impl<T> Drop for Given<T> {
    fn drop(&mut self) {
        self.0.abort();
    }
}

async fn accept(context: SslContext, raw: Raw) -> Result<SslStream<Raw>, &'static Refusal> {
    let ssl = Ssl::new(&context).map_err(|_| &refusal::HANDSHAKE_FAILED)?;
    // Frees data that only the handshake needs: 1.2 KB per connection.
    // SAFETY: it takes the connection's own object; nothing here asks for its configuration later.
    unsafe { ffi::SSL_set_shed_handshake_config(ssl.as_ptr(), 1) };
    let mut stream = SslStream::new(ssl, raw).map_err(|_| &refusal::HANDSHAKE_FAILED)?;
    let shaken = Pin::new(&mut stream).accept().await;
    if let Err(error) = shaken {
        let mut why = reason(&error);
        if why == &refusal::HANDSHAKE_FAILED && stream.get_ref().alerted() {
            why = &refusal::HANDSHAKE_ALERT;
        }
        if why != &refusal::HANDSHAKE_ABORTED {
            farewell(stream.get_mut()).await;
        }
        return Err(why);
    }
    let ssl = stream.ssl();
    let is_answered = ssl.version2() == Some(SslVersion::TLS1_2) && !ssl.session_reused();
    if !is_answered && may_hold_back(stream.get_ref().front()) {
        net::acknowledge(stream.get_ref().id());
    }
    Ok(stream)
}

/// Whether the client may hold a request back until the host acknowledges its last flight, as Nagle's algorithm does:
/// for about 40 ms. The library has sent its tickets before that flight, so no other packet acknowledges it, except at
/// the end of a full handshake of TLS 1.2. `front` are the received bytes behind the flight: if they are whole records,
/// the client holds nothing back, and the response acknowledges them.
fn may_hold_back(mut front: &[u8]) -> bool {
    if front.is_empty() {
        return true;
    }
    while let [_, _, _, high, low, rest @ ..] = front {
        let length = usize::from(u16::from_be_bytes([*high, *low]));
        let Some(next) = rest.get(length..) else { return true };
        front = next;
    }
    !front.is_empty()
}

/// Sends the remaining bytes, and reads before the close: a socket closed with unread bytes is reset, and the reset can
/// overtake the alert.
async fn farewell(raw: &mut Raw) {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let leaves = async {
        raw.shutdown().await?;
        let mut waste = [0; 1024];
        while raw.read(&mut waste).await? > 0 {}
        std::io::Result::Ok(())
    };
    let _ = within(super::FAREWELL, NoClient::ItsIo, leaves).await;
}

/// Closes a connection that carries no further bytes.
pub async fn close(mut stream: SslStream<Raw>) {
    use tokio::io::AsyncWriteExt;
    // An error means that the client has already closed.
    let _ = within(super::FAREWELL, NoClient::ItsIo, stream.shutdown()).await;
    farewell(stream.get_mut()).await;
}

/// Sends a fatal alert in place of a handshake.
pub async fn alert(raw: &mut Raw, description: u8) {
    use tokio::io::AsyncWriteExt;
    // `raw` buffers the bytes until the flush, so only the flush can fail.
    let _ = raw.write_all(&[21, 3, 3, 0, 2, 2, description]).await;
    farewell(raw).await;
}

/// The connection and the facts about its handshake.
///
/// # Errors
///
/// If the library parsed another server name than Forebay.
pub fn complete(stream: SslStream<Raw>, hello: &Hello, policy: Policy) -> Result<(TlsStream, Facts), &'static Refusal> {
    let ssl = stream.ssl();
    // Two parsers must not disagree about the server name.
    let named = ssl.servername(NameType::HOST_NAME).map(str::to_ascii_lowercase);
    if named.as_deref() != hello.name.as_deref() {
        return Err(&refusal::HANDSHAKE_MALFORMED);
    }
    let facts = Facts {
        name: hello.name.clone(),
        version: ssl.version_str(),
        cipher: ssl.current_cipher().and_then(|cipher| cipher.standard_name()).unwrap_or_default(),
        h2: ssl.selected_alpn_protocol() == Some(b"h2"),
        resumed: ssl.session_reused(),
        policy,
        client: client(ssl),
    };
    Ok((TlsStream::new(stream), facts))
}

fn client(ssl: &SslRef) -> Option<ClientCertificate> {
    let certificate: X509 = ssl.peer_certificate()?;
    let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    let alternatives = certificate.subject_alt_names();
    let names = alternatives.iter().flatten().filter_map(|name| name.dnsname().or(name.email()).or(name.uri()));
    Some(ClientCertificate {
        subject: certificate::text(certificate.subject_name()),
        names: names.map(|name| name.replace(',', "%2C")).collect::<Vec<_>>().join(","),
        fingerprint: certificate.digest(MessageDigest::sha256()).map(|digest| hex(&digest)).unwrap_or_default(),
        serial: certificate::serial(&certificate),
    })
}

/// The refusal for a failed handshake, by the library's error.
fn reason(error: &pingora::tls::ssl::Error) -> &'static Refusal {
    if let Some(stack) = error.ssl_error() {
        let codes = stack.errors().iter().map(|error| error.reason_code());
        return codes.map(of_code).find(|why| *why != &refusal::HANDSHAKE_FAILED).unwrap_or(&refusal::HANDSHAKE_FAILED);
    }
    // The client closed, reset, or stopped sending: the library has no error of its own.
    match error.code() {
        ErrorCode::SYSCALL | ErrorCode::ZERO_RETURN => &refusal::HANDSHAKE_ABORTED,
        _ => &refusal::HANDSHAKE_FAILED,
    }
}

fn of_code(code: i32) -> &'static Refusal {
    match code {
        ffi::SSL_R_UNSUPPORTED_PROTOCOL | ffi::SSL_R_WRONG_VERSION_NUMBER | ffi::SSL_R_INAPPROPRIATE_FALLBACK => {
            &refusal::HANDSHAKE_VERSION
        }
        ffi::SSL_R_NO_SHARED_CIPHER | ffi::SSL_R_NO_SHARED_GROUP | ffi::SSL_R_NO_COMMON_SIGNATURE_ALGORITHMS => {
            &refusal::HANDSHAKE_CIPHER
        }
        ffi::SSL_R_NO_APPLICATION_PROTOCOL => &refusal::HANDSHAKE_PROTOCOL,
        ffi::SSL_R_PEER_DID_NOT_RETURN_A_CERTIFICATE => &refusal::HANDSHAKE_NO_CERTIFICATE,
        ffi::SSL_R_CERTIFICATE_VERIFY_FAILED => &refusal::HANDSHAKE_CERTIFICATE,
        // Alerts from the client have the code 1000 plus their number. OpenSSL sends a TLS 1.3 alert in clear text if
        // it refuses the certificate; BoringSSL reports this as a record that it cannot decrypt, and `Raw` recognises
        // it.
        1000..=1255 => &refusal::HANDSHAKE_ALERT,
        _ => &refusal::HANDSHAKE_FAILED,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_client_whose_records_have_come_whole_holds_nothing_back() {
        let record = [23, 3, 3, 0, 2, 7, 7];
        assert!(!may_hold_back(&record));
        assert!(!may_hold_back(&record.repeat(3)));
        for (front, what) in [
            (vec![], "no request has come"),
            (record[..6].to_vec(), "half a record"),
            (record[..4].to_vec(), "half a header"),
            ([&record[..], &record[..1]].concat(), "the start of another"),
        ] {
            assert!(may_hold_back(&front), "{what}");
        }
    }
}
