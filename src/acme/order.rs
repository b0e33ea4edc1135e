//! One order (RFC 8555 §7.4): prove every name, send a certificate request, download the certificate.

use std::sync::Arc;
use std::time::Duration;

use base64::Engine;
use base64::prelude::BASE64_URL_SAFE_NO_PAD;
use boring::asn1::Asn1Time;
use boring::error::ErrorStack;
use boring::hash::MessageDigest;
use boring::pkey::{PKey, Private};
use boring::stack::Stack;
use boring::x509::extension::SubjectAlternativeName;
use boring::x509::{X509, X509Extension, X509NameBuilder, X509Req};
use instant_acme::{
    Account, AuthorizationHandle, AuthorizationStatus, CertificateIdentifier, ChallengeHandle, ChallengeType, Error,
    Identifier, NewOrder, Order, OrderStatus, RetryPolicy,
};
use zeroize::Zeroizing;

use super::answers::{Answers, ChallengeResponse};
use super::failure::{Failure, is_of, told, words};
use super::store::Store;
use crate::client::challenges::Challenges;
use crate::client::tls::challenge;
use crate::config::acme::Challenge;

/// Time for other processes to read an answer from the store before the issuer is asked to check it.
const SPREAD: Duration = Duration::from_secs(1);

/// How names are proved.
pub struct Proof<'a> {
    /// The challenge type.
    pub challenge: Challenge,
    /// Answers challenges in this process.
    pub challenges: &'a Arc<Challenges>,
    /// Passes answers to other processes.
    pub store: &'a Store,
}

/// Orders a certificate and returns its chain and its key in PEM; `patience` limits the time the issuer takes to
/// check the proofs and to sign.
///
/// # Errors
///
/// Why there is no certificate.
///
/// Why there is none.
pub async fn order(
    account: &Account,
    names: &[String],
    proof: Proof<'_>,
    replaces: Option<CertificateIdentifier<'static>>,
    patience: Duration,
) -> Result<Zeroizing<Vec<u8>>, Failure> {
    let identifiers: Vec<Identifier> = names.iter().cloned().map(Identifier::Dns).collect();
    let mut order = begin(account, &identifiers, replaces).await?;
    // Answered until the order is ready: an issuer checks more than once, from several places.
    let mut answers = Answers::new(proof.challenges, proof.store);
    let mut authorizations = order.authorizations();
    while let Some(authorization) = authorizations.next().await {
        if let Some(offered) = offered(&mut authorization?, proof.challenge)? {
            answers.add(&answer(&offered, proof.challenge)?)?;
        }
    }
    if proof.store.is_followed() {
        tokio::time::sleep(SPREAD).await;
    }
    // The library keeps known authorizations, so this repeats no requests.
    let mut authorizations = order.authorizations();
    while let Some(authorization) = authorizations.next().await {
        if let Some(mut offered) = offered(&mut authorization?, proof.challenge)? {
            offered.set_ready().await?;
        }
    }
    let polls = RetryPolicy::new().initial_delay(Duration::from_millis(500)).backoff(1.3).timeout(patience);
    match order.poll_ready(&polls).await {
        Ok(OrderStatus::Ready) => {}
        Ok(status) => return Err(unproved(&mut order, format!("the order is {}", word(status))).await),
        Err(error) => return Err(unproved(&mut order, told(&error)).await),
    }
    drop(answers);
    let key = challenge::key()?;
    order.finalize_csr(&request(names, &key)?).await?;
    let chain = order.poll_certificate(&polls).await?;
    let chain = check(&chain, names, &key)?;
    let mut pem = Zeroizing::new(Vec::with_capacity(chain.len() + 1024));
    pem.extend_from_slice(&chain);
    pem.extend_from_slice(&Zeroizing::new(key.private_key_to_pem_pkcs8()?));
    Ok(pem)
}

/// Creates an order that names the certificate it replaces, if the issuer supports that; if the issuer rejects it,
/// creates one without (RFC 9773 §5).
async fn begin(
    account: &Account,
    identifiers: &[Identifier],
    replaces: Option<CertificateIdentifier<'static>>,
) -> Result<Order, Failure> {
    if let Some(replaces) = replaces {
        match account.new_order(&NewOrder::new(identifiers).replaces(replaces)).await {
            Ok(order) => return Ok(order),
            Err(error) if is_about_replacing(&error) => {
                tracing::debug!("an order that names the replaced certificate was rejected: {}", told(&error));
            }
            Err(error) => return Err(error.into()),
        }
    }
    Ok(account.new_order(&NewOrder::new(identifiers)).await?)
}

/// The challenge for a name. `None`: the name is already proved.
fn offered<'a>(
    authorization: &'a mut AuthorizationHandle<'a>,
    challenge: Challenge,
) -> Result<Option<ChallengeHandle<'a>>, Failure> {
    let name = authorization.identifier().to_string();
    match authorization.status {
        AuthorizationStatus::Valid => return Ok(None),
        AuthorizationStatus::Pending => {}
        _ => return Err(Failure::new(format!("`{name}` cannot be proved any more"))),
    }
    let kind = match challenge {
        Challenge::TlsAlpn01 => ChallengeType::TlsAlpn01,
        Challenge::Http01 => ChallengeType::Http01,
    };
    match authorization.challenge(kind) {
        Some(offered) => Ok(Some(offered)),
        None => Err(Failure::new(format!("the issuer does not take `{}` for `{name}`", challenge.name()))),
    }
}

fn answer(offered: &ChallengeHandle<'_>, challenge: Challenge) -> Result<ChallengeResponse, Failure> {
    let key_authorization = offered.key_authorization();
    Ok(match challenge {
        Challenge::Http01 => {
            ChallengeResponse::Http01 { token: offered.token.clone(), answer: key_authorization.as_str().to_owned() }
        }
        Challenge::TlsAlpn01 => {
            let digest = key_authorization.digest();
            let digest =
                digest.as_ref().try_into().map_err(|_| Failure::new("a digest that has not 32 bytes".to_owned()))?;
            ChallengeResponse::TlsAlpn01 { name: offered.identifier().to_string().to_ascii_lowercase(), digest }
        }
    })
}

/// Why an order is not ready: the problems of its names, or `otherwise`.
async fn unproved(order: &mut Order, otherwise: String) -> Failure {
    let mut problems = Vec::new();
    let mut authorizations = order.authorizations();
    while let Some(Ok(mut authorization)) = authorizations.next().await {
        let name = authorization.identifier().to_string();
        let Ok(state) = authorization.refresh().await else { continue };
        let found = state.challenges.iter().filter_map(|challenge| challenge.error.as_ref());
        problems.extend(found.map(|problem| format!("`{name}`: {}", words(problem))));
    }
    Failure::new(if problems.is_empty() { otherwise } else { problems.join("; ") })
}

/// A certificate request for these names, in DER (RFC 2986).
fn request(names: &[String], key: &PKey<Private>) -> Result<Vec<u8>, ErrorStack> {
    let mut request = X509Req::builder()?;
    request.set_version(0)?;
    // The names go into the SAN extension: a common name is limited to 64 characters and obsolete.
    request.set_subject_name(&X509NameBuilder::new()?.build())?;
    request.set_pubkey(key)?;
    let mut alternatives = SubjectAlternativeName::new();
    for name in names {
        alternatives.dns(name);
    }
    let mut extensions: Stack<X509Extension> = Stack::new()?;
    extensions.push(alternatives.build(&request.x509v3_context(None))?)?;
    request.add_extensions(&extensions)?;
    request.sign(key, MessageDigest::sha256())?;
    request.build().to_der()
}

/// Checks that the issued certificate matches the request and is valid now. Returns only the certificates in PEM: a
/// key in the response would be mistaken for the certificate's key.
fn check(chain: &str, names: &[String], key: &PKey<Private>) -> Result<Vec<u8>, Failure> {
    let wrong = |what: &str| Failure::new(format!("what was issued {what}"));
    let chain = X509::stack_from_pem(chain.as_bytes()).map_err(|_| wrong("is not a certificate in PEM"))?;
    let leaf = chain.first().ok_or_else(|| wrong("is not a certificate in PEM"))?;
    if !leaf.public_key().is_ok_and(|public| public.public_eq(key)) {
        return Err(wrong("is for another key"));
    }
    let now = Asn1Time::days_from_now(0).map_err(|_| wrong("cannot be compared with the clock"))?;
    if leaf.not_after() <= now {
        return Err(wrong(&format!("has expired on {}", leaf.not_after())));
    }
    let alternatives = leaf.subject_alt_names();
    let own: Vec<String> =
        alternatives.iter().flatten().filter_map(|name| name.dnsname()).map(str::to_ascii_lowercase).collect();
    match names.iter().find(|name| !own.contains(name)) {
        Some(missing) => Err(wrong(&format!("is not made out to `{missing}`"))),
        None => chain.iter().try_fold(Vec::new(), |mut pem, certificate| {
            pem.extend(certificate.to_pem().map_err(|_| wrong("cannot be written in PEM"))?);
            Ok(pem)
        }),
    }
}

/// The certificate identifier (RFC 9773 §4.1). `None`: the certificate has no authority key identifier.
pub fn identifier(leaf: &X509) -> Option<CertificateIdentifier<'static>> {
    let authority = leaf.authority_key_id()?.as_slice();
    let mut serial = leaf.serial_number().to_bn().ok()?.to_vec();
    // As in DER: a number whose first bit is set begins with a zero byte.
    if serial.first().is_none_or(|first| *first >= 0x80) {
        serial.insert(0, 0);
    }
    Some(CertificateIdentifier {
        authority_key_identifier: BASE64_URL_SAFE_NO_PAD.encode(authority).into(),
        serial: BASE64_URL_SAFE_NO_PAD.encode(serial).into(),
    })
}

/// Whether the order may succeed without naming the replaced certificate.
fn is_about_replacing(error: &Error) -> bool {
    match error {
        Error::Unsupported(_) | Error::Other(_) => true,
        Error::Api(problem) => ["alreadyReplaced", "malformed"].iter().any(|kind| is_of(problem, kind)),
        _ => false,
    }
}

fn word(status: OrderStatus) -> &'static str {
    match status {
        OrderStatus::Pending => "pending",
        OrderStatus::Ready => "ready",
        OrderStatus::Processing => "being processed",
        OrderStatus::Valid => "done",
        OrderStatus::Invalid => "invalid",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_has_all_names_and_is_signed_by_the_key() {
        let key = challenge::key().expect("a key");
        let names = ["a.test".to_owned(), "b.test".to_owned()];
        let der = request(&names, &key).expect("a request");
        let read = X509Req::from_der(&der).expect("a request");
        assert!(read.verify(&key).expect("a signature"));
        assert_eq!(read.extensions().expect("extensions").len(), 1);
        assert!(names.iter().all(|name| memchr::memmem::find(&der, name.as_bytes()).is_some()));
    }

    #[test]
    fn what_was_issued_must_fit_the_key_and_the_names() {
        let pair = rcgen::KeyPair::generate().expect("a key");
        let params = rcgen::CertificateParams::new(vec!["A.test".to_owned()]).expect("names");
        let chain = params.self_signed(&pair).expect("a certificate").pem();
        let key = PKey::private_key_from_pem(pair.serialize_pem().as_bytes()).expect("a key");
        let told = |chain: &str, name: &str, key: &PKey<Private>| {
            check(chain, &[name.to_owned()], key).err().map(|failure| failure.problem)
        };
        assert_eq!(told(&chain, "a.test", &key), None);
        assert_eq!(told(&chain, "b.test", &key).as_deref(), Some("what was issued is not made out to `b.test`"));
        assert_eq!(told("", "a.test", &key).as_deref(), Some("what was issued is not a certificate in PEM"));
        let mut ended = rcgen::CertificateParams::new(vec!["a.test".to_owned()]).expect("names");
        ended.not_after = rcgen::date_time_ymd(2001, 1, 1);
        let ended = ended.self_signed(&pair).expect("a certificate").pem();
        let told_of = told(&ended, "a.test", &key).unwrap_or_default();
        assert!(told_of.starts_with("what was issued has expired on Jan  1 "), "{told_of}");
        let stuffed = format!("{chain}{}\nNote: it is for you\n", pair.serialize_pem());
        let kept = check(&stuffed, &["a.test".to_owned()], &key).expect("a certificate");
        assert_eq!(String::from_utf8_lossy(&kept).replace('\r', ""), chain.replace('\r', ""), "and nothing else");
        let other = challenge::key().expect("a key");
        assert_eq!(told(&chain, "a.test", &other).as_deref(), Some("what was issued is for another key"));
    }

    /// The example of RFC 9773 §4.1.
    #[test]
    fn a_certificate_is_told_from_others_by_its_authority_and_its_number() {
        let pem = "-----BEGIN CERTIFICATE-----\n\
MIIBQzCB66ADAgECAgUAh2VDITAKBggqhkjOPQQDAjAVMRMwEQYDVQQDEwpFeGFt\n\
cGxlIENBMCIYDzAwMDEwMTAxMDAwMDAwWhgPMDAwMTAxMDEwMDAwMDBaMBYxFDAS\n\
BgNVBAMTC2V4YW1wbGUuY29tMFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAEeBZu\n\
7cbpAYNXZLbbh8rNIzuOoqOOtmxA1v7cRm//AwyMwWxyHz4zfwmBhcSrf47NUAFf\n\
qzLQ2PPQxdTXREYEnKMjMCEwHwYDVR0jBBgwFoAUaYhba4dGQEHhs3uEe6CuLN4B\n\
yNQwCgYIKoZIzj0EAwIDRwAwRAIge09+S5TZAlw5tgtiVvuERV6cT4mfutXIlwTb\n\
+FYN/8oCIClDsqBklhB9KAelFiYt9+6FDj3z4KGVelYM5MdsO3pK\n\
-----END CERTIFICATE-----\n";
        let leaf = X509::from_pem(pem.as_bytes()).expect("a certificate");
        assert_eq!(identifier(&leaf).expect("an identifier").to_string(), "aYhba4dGQEHhs3uEe6CuLN4ByNQ.AIdlQyE");
    }
}
