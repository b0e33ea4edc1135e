//! The TLS contexts of one name: one per key, created outside the workers.
//!
//! Everything that differs by name is in its context, so that nothing has to be chosen during a handshake.

use std::ffi::c_int;

use boring::ssl::{SslContext, SslContextBuilder};
use foreign_types_shared::ForeignType;
use pingora::tls::error::ErrorStack;
use pingora::tls::ssl::{
    AlpnError, SslAcceptor, SslMethod, SslMode, SslOptions, SslRef, SslSessionCacheMode, SslVerifyMode, SslVersion,
};
use pingora::tls::ssl_sys as ffi;
use pingora::tls::x509::store::X509StoreBuilder;

use super::certificate::{Clients, Loaded};
use super::rsa;
use super::tickets::Tickets;
use crate::config;
use crate::config::listener::Protocol;
use crate::config::listener::tls::{ClientMode, Version};
use crate::error::BuildError;

/// The settings that all contexts of a listener share.
pub struct Terms {
    min_version: SslVersion,
    ciphers: String,
    /// The operator defined the order of `ciphers`. Mozilla's default leaves the choice to clients.
    ordered: bool,
    groups: String,
    /// The ALPN protocols in wire format (RFC 7301 §3.1).
    alpn: Vec<u8>,
    tickets: Option<Tickets>,
}

impl Terms {
    /// Builds the settings from the configuration.
    ///
    /// # Errors
    ///
    /// Ciphers or groups that the library does not support.
    pub fn build(
        written: &config::listener::Tls,
        protocols: &[Protocol],
        tickets: Option<Tickets>,
    ) -> Result<Terms, Vec<BuildError>> {
        let mut errors = Vec::new();
        for (index, cipher) in written.ciphers.iter().enumerate() {
            if !is_cipher(cipher) {
                let message = format!("`{cipher}` is not a TLS 1.2 cipher suite of Forebay");
                errors.push(BuildError::new(format!("ciphers[{index}]"), message));
            }
        }
        let groups: Vec<&str> = written.groups.iter().map(|group| group.name()).collect();
        let mut alpn = Vec::new();
        for protocol in protocols {
            match protocol {
                Protocol::H2 => alpn.extend_from_slice(b"\x02h2"),
                Protocol::Http1 => alpn.extend_from_slice(b"\x08http/1.1\x08http/1.0"),
                Protocol::H2c => {}
            }
        }
        if protocols.contains(&Protocol::H2) && protocols.contains(&Protocol::Http1) {
            // HTTP/2 is preferred, whatever the order in the file.
            alpn = b"\x02h2\x08http/1.1\x08http/1.0".to_vec();
        }
        if !errors.is_empty() {
            return Err(errors);
        }
        Ok(Terms {
            min_version: match written.min_version {
                Version::Tls12 => SslVersion::TLS1_2,
                Version::Tls13 => SslVersion::TLS1_3,
            },
            ordered: written.ciphers != config::listener::Tls::default_ciphers(),
            ciphers: written.ciphers.join(":"),
            groups: groups.join(":"),
            alpn,
            tickets,
        })
    }

    /// Creates a context for this certificate. `policy` is the digest of the requirements for clients.
    ///
    /// # Errors
    ///
    /// The library's error; errors in files were found earlier.
    pub fn context(&self, loaded: &Loaded, policy: Option<[u8; 32]>) -> Result<SslContext, ErrorStack> {
        let mut context = SslAcceptor::mozilla_intermediate_v5(SslMethod::tls())?;
        context.set_min_proto_version(Some(self.min_version))?;
        context.set_max_proto_version(Some(SslVersion::TLS1_3))?;
        context.set_strict_cipher_list(&self.ciphers)?;
        context.set_curves_list(&self.groups)?;
        if self.ordered {
            context.set_options(SslOptions::CIPHER_SERVER_PREFERENCE);
        }
        context.set_options(SslOptions::NO_RENEGOTIATION);
        context.set_mode(SslMode::RELEASE_BUFFERS);

        let (leaf, others) = loaded.chain.split_first().ok_or_else(ErrorStack::get)?;
        context.set_certificate(leaf)?;
        for link in others {
            context.add_extra_chain_cert(link.clone())?;
        }
        context.set_private_key(&loaded.key)?;
        context.check_private_key()?;
        if let Some(signer) = rsa::Signer::of(&loaded.key) {
            context.set_private_key_method(signer);
        }

        let alpn = self.alpn.clone();
        // A client without a common protocol gets an alert (RFC 7301 §3.2).
        context.set_alpn_select_callback(move |_, offered| agree(&alpn, offered).ok_or(AlpnError::ALERT_FATAL));
        // Without a callback, the server name of a session resumed in TLS 1.2 would be unknown.
        context.set_servername_callback(|_, _| Ok(()));
        // A ticket contains this digest and is invalid elsewhere. A session of a name without client certificates must
        // not be resumed for a name that requires them, nor one that an authority verified that is no longer trusted.
        context.set_session_id_context(&policy.unwrap_or([0; 32]))?;
        context.set_session_cache_mode(SslSessionCacheMode::OFF);
        match &self.tickets {
            Some(tickets) => set_tickets(&mut context, tickets.clone()),
            None => {
                context.set_options(SslOptions::NO_TICKET);
            }
        }
        if let Some(clients) = &loaded.clients {
            ask_clients(&mut context, clients)?;
        }
        if let Some(staple) = &loaded.staple {
            let der = staple.der.clone();
            let show = move |ssl: &mut SslRef| ssl.set_ocsp_status(&der).map(|()| true).or(Ok(false));
            context.set_status_callback(show)?;
        }
        Ok(context.build().into_context())
    }
}

fn is_cipher(name: &str) -> bool {
    let is_word = name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_');
    let mut context = match SslContext::builder(SslMethod::tls()) {
        Ok(context) => context,
        Err(_) => return false,
    };
    let known = is_word && context.set_strict_cipher_list(name).is_ok();
    // A keyword such as `HIGH` is a list of suites, not the name of one.
    let known = known && context.ciphers().is_some_and(|list| list.iter().filter(|it| it.name() == name).count() == 1);
    // Removes the library's error, so that later calls do not report it.
    drop(ErrorStack::get());
    known
}

/// The first of our protocols that the client offers, as a slice of the offer.
fn agree<'o>(ours: &[u8], offered: &'o [u8]) -> Option<&'o [u8]> {
    protocols(ours).find_map(|ours| protocols(offered).find(|theirs| *theirs == ours))
}

/// The names in an ALPN list (RFC 7301 §3.1).
fn protocols(mut list: &[u8]) -> impl Iterator<Item = &[u8]> {
    std::iter::from_fn(move || {
        let (&length, rest) = list.split_first()?;
        let (name, rest) = rest.split_at_checked(usize::from(length))?;
        list = rest;
        Some(name)
    })
}

fn set_tickets(context: &mut SslContextBuilder, tickets: Tickets) {
    // SAFETY: `prepare` sets the name, the IV, the cipher and the MAC before it says that it did.
    unsafe {
        context.set_ticket_key_callback(move |_, name, iv, cipher, mac, makes| {
            tickets.prepare(name, iv, cipher, mac, makes)
        });
    }
}

/// Requires client certificates from these authorities.
fn ask_clients(context: &mut SslContextBuilder, clients: &Clients) -> Result<(), ErrorStack> {
    let mut store = X509StoreBuilder::new()?;
    for authority in &clients.authorities {
        store.add_cert(authority)?;
        context.add_client_ca(authority)?;
    }
    if let Some(pem) = &clients.crl {
        add_revoked(&mut store, pem)?;
    }
    context.set_cert_store_builder(store);
    let must = match clients.mode {
        ClientMode::Required => SslVerifyMode::FAIL_IF_NO_PEER_CERT,
        ClientMode::Optional => SslVerifyMode::NONE,
    };
    context.set_verify(SslVerifyMode::PEER | must);
    Ok(())
}

/// Adds revocation lists. As in nginx, each authority of a chain needs one.
fn add_revoked(store: &mut X509StoreBuilder, pem: &[u8]) -> Result<(), ErrorStack> {
    let length = ffi::ossl_ssize_t::try_from(pem.len()).map_err(|_| ErrorStack::get())?;
    // SAFETY: `bio` reads `pem`, which outlives it; each list is freed after the store has taken its own share of it.
    unsafe {
        let bio = ffi::BIO_new_mem_buf(pem.as_ptr().cast(), length);
        if bio.is_null() {
            return Err(ErrorStack::get());
        }
        let mut result = Ok(());
        loop {
            let list = ffi::PEM_read_bio_X509_CRL(bio, std::ptr::null_mut(), None, std::ptr::null_mut());
            if list.is_null() {
                break;
            }
            let added: c_int = ffi::X509_STORE_add_crl(store.as_ptr(), list);
            ffi::X509_CRL_free(list);
            if added != 1 {
                result = Err(ErrorStack::get());
            }
        }
        ffi::BIO_free(bio);
        // The end of the lists is recorded as an error.
        drop(ErrorStack::get());
        let flags = ffi::X509_V_FLAG_CRL_CHECK | ffi::X509_V_FLAG_CRL_CHECK_ALL;
        ffi::X509_STORE_set_flags(store.as_ptr(), flags as _);
        result
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn terms(yaml: &str) -> Result<Terms, Vec<String>> {
        let written = serde_yaml::from_str(&format!("{{ certificates: [], {yaml} }}")).expect("keys of TLS");
        let built = Terms::build(&written, &[Protocol::Http1, Protocol::H2], None);
        built.map_err(|errors| errors.iter().map(ToString::to_string).collect())
    }

    #[test]
    fn suites_are_called_by_their_names_and_not_by_words_for_many() {
        assert!(terms("ciphers: [ECDHE-RSA-AES128-GCM-SHA256, ECDHE-ECDSA-AES128-SHA]").is_ok());
        for wrong in ["HIGH", "ALL", "DHE-RSA-AES128-GCM-SHA256", "TLS_AES_128_GCM_SHA256", "a:b", ""] {
            let told = terms(&format!("ciphers: [\"{wrong}\"]")).err().expect("an error");
            assert_eq!(told, [format!("ciphers[0]: `{wrong}` is not a TLS 1.2 cipher suite of Forebay")]);
        }
    }

    #[test]
    fn http2_is_agreed_on_before_http1_whatever_the_order_in_the_file() {
        let terms = terms("").expect("terms");
        assert_eq!(agree(&terms.alpn, b"\x08http/1.1\x02h2"), Some(&b"h2"[..]));
        assert_eq!(agree(&terms.alpn, b"\x08http/1.1"), Some(&b"http/1.1"[..]));
        assert_eq!(agree(&terms.alpn, b"\x02h3"), None);
        assert_eq!(agree(&terms.alpn, b"\x09h2"), None, "cut short");
        assert_eq!(agree(&terms.alpn, b""), None);
    }
}
