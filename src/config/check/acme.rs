//! Checks issuers and the certificates of listeners that use them.

use http::Uri;
use std::collections::BTreeMap;

use super::{Check, FirstPaths, value};
use crate::config::acme::{Challenge, Eab, Issuer, NAMES_MAX, issuable};
use crate::config::address::is_label;
use crate::config::explain::expected;
use crate::config::listener::tls::{Certificate, CertificateNames};
use crate::config::report::{Finding, FindingLocation};
use crate::error::path::{self, join};

impl Check<'_> {
    /// The settings of issuers.
    pub(super) fn issuers(&mut self, issuers: &BTreeMap<String, Issuer>) {
        for (name, issuer) in issuers {
            let at = join("acme", &path::key(name));
            self.name(name, FindingLocation::Key(at.clone()));
            self.issuer(name, issuer, &at);
        }
    }

    fn issuer(&mut self, name: &str, issuer: &Issuer, path: &str) {
        let at = |key: &str| format!("{path}.{key}");
        if name.starts_with('.') {
            let finding =
                Finding::error(FindingLocation::Key(path.to_owned()), format!("`{name}` is not the name of an issuer"));
            self.wrong(finding.label("expected a letter or a digit first: it becomes a directory's name"));
        }
        let Issuer { directory, email, agree_to_terms: _, challenge: _, store, ca, eab, timeouts, retry } = issuer;
        if issuer.directory(name).is_none() && !self.parts.broken.at(&at("directory")) {
            let finding =
                Finding::error(FindingLocation::Key(path.to_owned()), format!("the issuer `{name}` has no directory"));
            self.wrong(
                finding
                    .label("expected a `directory: https://…`")
                    .help("its authority tells the URL; `letsencrypt` and `letsencrypt-staging` are known without one"),
            );
        }
        if directory.as_ref().is_some_and(|directory| !is_https_url(directory)) {
            let finding = Finding::error(value(at("directory")), "this is not the URL of a directory");
            self.wrong(finding.label("expected one such as `https://ca.example.com/acme/directory`"));
        }
        if email.as_ref().is_some_and(|email| !is_email(email)) {
            let finding = Finding::error(value(at("email")), "this is not an address of mail");
            self.wrong(finding.label("expected one such as `ops@example.com`"));
        }
        for (key, path) in [("store", Some(store)), ("ca", ca.as_ref())] {
            if path.is_some_and(String::is_empty) {
                let finding = Finding::error(value(at(key)), format!("the path of `{key}` is missing"));
                self.wrong(finding.label("expected one such as `/var/lib/forebay/acme`"));
            }
        }
        if let Some(eab) = eab {
            self.eab(eab, &at("eab"));
        }
        self.time(&at("timeouts.request"), timeouts.request);
        self.time(&at("timeouts.order"), timeouts.order);
        self.time(&at("retry.first"), retry.first);
        if retry.max < retry.first {
            let (shortest, longest) = (at("retry.first"), at("retry.max"));
            let location = if self.is_written(&longest) { longest } else { shortest };
            let finding = Finding::error(value(location), "the first wait is longer than any may be");
            self.wrong(
                finding.label(format!("expected a `first` ({}) of no more than `max` ({})", retry.first, retry.max)),
            );
        }
        if self.is_asked(name) == Some(false) {
            let finding =
                Finding::warning(FindingLocation::Key(path.to_owned()), format!("no certificate is asked of `{name}`"));
            self.wrong(finding.label("never asked").help(format!(
                "write `tls: {{ certificates: [ {{ acme: {name}, names: [ www.example.com ] }} ] }}` at a listener"
            )));
        }
        if issuer.challenge == Challenge::Http01 && self.is_asked(name) == Some(true) {
            self.answers_http(path);
        }
    }

    fn eab(&mut self, eab: &Eab, path: &str) {
        if eab.kid.is_empty() {
            let finding = Finding::error(value(format!("{path}.kid")), "the identifier of the account is missing");
            self.wrong(finding.label("expected what the issuer gave with the key"));
        }
        if eab.key().is_none() {
            let finding = Finding::error(value(format!("{path}.key")), "this is not a key in base64url");
            self.wrong(finding.label("expected letters, digits, `-` and `_`"));
        }
    }

    /// HTTP-01 needs a clear-text listener: the issuer connects to port 80.
    fn answers_http(&mut self, path: &str) {
        let Some(listeners) = &self.parts.listeners else { return };
        let speaks_http = |listener: &crate::config::Listener| {
            listener.tls.is_none() && listener.passthrough.is_empty() && listener.tcp.is_none()
        };
        if listeners.iter().any(|listener| listener.as_ref().is_none_or(speaks_http)) {
            return;
        }
        let finding = Finding::error(value(format!("{path}.challenge")), "no listener could answer this challenge");
        self.wrong(
            finding
                .label("a listener in clear text is asked for it")
                .help("add `{ name: http, address: 0.0.0.0:80, redirect_https: true }`, or take `tls_alpn_01`"),
        );
    }

    /// Whether any certificate uses this issuer; `None` if a listener has errors.
    fn is_asked(&self, name: &str) -> Option<bool> {
        let listeners = self.parts.listeners.as_ref()?;
        let listeners: Vec<_> = listeners.iter().map(Option::as_ref).collect::<Option<_>>()?;
        if self.parts.broken.within("listeners") {
            return None;
        }
        let admin = self.parts.rest.as_ref().and_then(|rest| rest.admin.tls.as_ref());
        let all = listeners.iter().filter_map(|listener| listener.tls.as_ref()).chain(admin);
        Some(all.flat_map(|tls| &tls.certificates).any(|one| one.acme.as_deref() == Some(name)))
    }

    /// The certificates of a listener, or of the admin endpoint.
    pub(super) fn certificates(&mut self, certificates: &[Certificate], path: &str) {
        let list = format!("{path}.certificates");
        for (index, certificate) in certificates.iter().enumerate() {
            let at = self.item(&list, index);
            let broken = ["cert", "key", "acme"].iter().any(|key| self.parts.broken.at(&format!("{at}.{key}")));
            match &certificate.acme {
                Some(issuer) => self.issued(certificate, issuer, &at),
                None if broken => {}
                None => self.files(certificate, &at),
            }
        }
    }

    fn files(&mut self, certificate: &Certificate, path: &str) {
        let whole = "write `{ cert: /etc/forebay/shop.pem, key: /etc/forebay/shop.key }`, or `{ acme: letsencrypt, names: [ … ] }`";
        match (&certificate.cert, &certificate.key) {
            (Some(_), Some(_)) => {}
            (None, None) => {
                let finding = Finding::error(value(path), "nothing says where this certificate comes from");
                self.wrong(finding.label("expected `cert` and `key`, or `acme`").help(whole));
            }
            (cert, _) => {
                let (there, missing) = if cert.is_some() { ("cert", "key") } else { ("key", "cert") };
                let finding =
                    Finding::error(FindingLocation::Key(format!("{path}.{there}")), format!("`{missing}` is missing"));
                self.wrong(finding.label(format!("`{there}` needs it beside it")).help(whole));
            }
        }
        if certificate.names == CertificateNames::Auto {
            let finding = Finding::error(value(format!("{path}.names")), "the names of a file are those in it");
            self.wrong(finding.label("leave it out, or write the names"));
        }
    }

    /// A certificate from an issuer.
    fn issued(&mut self, certificate: &Certificate, issuer: &str, path: &str) {
        for (key, is_there) in [
            ("cert", certificate.cert.is_some()),
            ("key", certificate.key.is_some()),
            ("staple", certificate.staple.is_some()),
        ] {
            if is_there {
                let at = FindingLocation::Key(format!("{path}.{key}"));
                let finding = Finding::error(at, format!("`{key}` has no effect on a certificate of an issuer"));
                self.wrong(finding.label("leave it out, or `acme`"));
            }
        }
        self.issuer_exists(issuer, format!("{path}.acme"));
        let at = format!("{path}.names");
        match &certificate.names {
            CertificateNames::Auto if path.starts_with("admin.") => {
                let finding =
                    Finding::error(value(at), "the admin endpoint has no routes whose hosts could be its names");
                self.wrong(finding.label("expected a list of names"));
            }
            CertificateNames::Auto => {}
            CertificateNames::These(names) if names.is_empty() && !self.parts.broken.within(&at) => {
                let location = if self.is_written(&at) { value(at) } else { value(path) };
                let finding = Finding::error(location, "a certificate from an issuer needs `names`");
                self.wrong(finding.label("expected `names: [ www.example.com ]`, or `names: auto`"));
            }
            CertificateNames::These(names) => self.issued_names(names, &at),
        }
    }

    fn issued_names(&mut self, names: &[String], path: &str) {
        if names.len() > NAMES_MAX {
            let finding = Finding::error(value(path), "these are too many names for one certificate");
            self.wrong(finding.label(format!("expected at most {NAMES_MAX}")).help("write several certificates"));
        }
        let mut seen = FirstPaths::default();
        for (index, name) in names.iter().enumerate() {
            let at = self.item(path, index);
            if let Err(objection) = issuable(name) {
                let finding = Finding::error(value(at), format!("no issuer is asked for `{name}`"));
                self.wrong(finding.label(objection));
            } else if let Some(first) = seen.first(&name.to_ascii_lowercase(), at.clone()) {
                self.twice(at, first, format!("`{name}` is listed twice"));
            }
        }
    }

    fn issuer_exists(&mut self, name: &str, path: String) {
        let Some(rest) = &self.parts.rest else { return };
        let at = join("acme", &path::key(name));
        if rest.issuer(name).is_some() || self.parts.broken.within("acme") || self.parts.broken.within(&at) {
            return;
        }
        let known: Vec<&str> =
            rest.acme.keys().map(String::as_str).chain(Issuer::WELL_KNOWN.map(|(name, _)| name)).collect();
        let finding = Finding::error(value(path), format!("unknown issuer `{name}`")).label(expected(&known));
        let finding = finding.nearest(name, known);
        self.wrong(finding.help(format!("add `acme: {{ {name}: {{ directory: https://… }} }}`")));
    }
}

fn is_https_url(text: &str) -> bool {
    let Ok(url) = text.parse::<Uri>() else { return false };
    let authority = url.authority().map(|authority| authority.as_str()).unwrap_or_default();
    url.scheme_str() == Some("https") && !authority.contains('@') && url.host().is_some_and(|host| !host.is_empty())
}

/// A rough check: an issuer would read text behind `mailto:` as a URI.
fn is_email(text: &str) -> bool {
    let fine = |byte: u8| byte.is_ascii_graphic() && !b",<>()[]:;\\\"?#%".contains(&byte);
    text.bytes().all(fine)
        && text.split_once('@').is_some_and(|(user, host)| !user.is_empty() && host.split('.').all(is_label))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_is_an_https_url_and_a_contact_is_an_address() {
        assert!(is_https_url("https://ca.test:14000/dir"));
        for wrong in ["http://ca.test/dir", "ca.test/dir", "https://", "https://a@ca.test/", ""] {
            assert!(!is_https_url(wrong), "{wrong}");
        }
        assert!(is_email("ops+tls@example.com"));
        for wrong in ["ops", "@example.com", "ops@", "a@b@c", "mailto:a@b.test", "a b@c.test", "a@b.test,c@d.test"] {
            assert!(!is_email(wrong), "{wrong}");
        }
    }
}
