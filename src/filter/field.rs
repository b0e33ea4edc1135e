//! Header fields in settings: names, values and hosts, checked once and ready to send.
//!
//! The checks return the message for the operator; the caller adds the place.

use bytes::Bytes;
use http::HeaderValue;
use http::header::{self, HeaderName};
use http::uri::Authority;
use pingora::http::{RequestHeader, ResponseHeader};

use crate::config::Text;
use crate::error::BuildError;
use crate::expression::{self, Asked, Moment};

/// A field. Its name keeps the configured case, which HTTP/1 sends.
#[derive(Clone, Debug)]
pub(super) struct Field {
    pub name: Bytes,
    pub value: HeaderValue,
}

/// The value of a field: fixed, or computed for each exchange.
#[derive(Clone, Debug)]
pub(super) enum Words {
    Fixed(HeaderValue),
    Made(expression::Value),
}

impl Words {
    /// Builds the value that is `written`, for use at this moment. The path of an error is `cel` or empty.
    pub fn build(written: &Text, moment: Moment) -> Result<Words, BuildError> {
        match written {
            Text::Fixed(text) => value(text).map(Words::Fixed).map_err(|message| BuildError::new("", message)),
            Text::Made { cel } => {
                expression::Value::build(cel, moment).map(Words::Made).map_err(|error| error.under("cel"))
            }
        }
    }

    /// The value for this exchange. `None` if a computed value is empty or not valid in a header: with a line break,
    /// a client could add fields.
    pub fn value(&self, asked: &Asked<'_>) -> Option<HeaderValue> {
        match self {
            Words::Fixed(value) => Some(value.clone()),
            Words::Made(made) => {
                let made = made.of(asked);
                HeaderValue::from_bytes(&made).ok().filter(|value| !value.is_empty())
            }
        }
    }
}

/// The name of a header.
pub(super) fn name(written: &str) -> Result<HeaderName, String> {
    HeaderName::try_from(written).map_err(|_| format!("`{written}` is not a valid header name"))
}

/// The value of a header.
pub(super) fn value(written: &str) -> Result<HeaderValue, String> {
    HeaderValue::from_bytes(written.as_bytes())
        .map_err(|_| "a header value is one line of text, without control characters".to_owned())
}

/// The name of a header that a filter may change.
///
/// Excludes headers that frame the message or belong to the connection (RFC 9110 §7.6.1): Forebay writes these
/// itself, and other values would allow request smuggling. Also excludes `Host`, which needs other checks.
pub(super) fn free_name(written: &str) -> Result<HeaderName, String> {
    let name = name(written)?;
    match name {
        header::CONTENT_LENGTH
        | header::TRANSFER_ENCODING
        | header::CONNECTION
        | header::TE
        | header::TRAILER
        | header::UPGRADE => Err(format!("`{written}` belongs to the connection, and Forebay sets it itself")),
        header::HOST => Err("`Host` can only be set, and only on the request".to_owned()),
        _ if matches!(name.as_str(), "keep-alive" | "proxy-connection") => {
            Err(format!("`{written}` belongs to the connection, and Forebay sets it itself"))
        }
        _ => Ok(name),
    }
}

/// A host with or without a port, as in `Host` (RFC 9110 §7.2).
pub(super) fn host(written: &str) -> Option<Authority> {
    let authority = Authority::try_from(written).ok()?;
    let (host, whole) = (authority.host(), authority.as_str());
    let named = !host.is_empty() && host != "[]" && !whole.contains('@');
    (named && (host.len() == whole.len() || authority.port_u16().is_some())).then_some(authority)
}

/// The common operations on headers of requests and responses; Pingora has no trait for them.
///
/// Names and values were checked when the filter was built, so that none of these can fail.
pub(super) trait Fields {
    /// Replaces all fields of this name.
    fn set(&mut self, field: &Field);
    /// Adds a field after all others of its name.
    fn add(&mut self, field: &Field);
    /// Removes all fields of this name.
    fn remove(&mut self, name: &HeaderName);
}

macro_rules! fields {
    ($($header:ty),*) => {$(
        impl Fields for $header {
            fn set(&mut self, field: &Field) {
                let _ = self.insert_header(field.name.clone(), field.value.clone());
            }

            fn add(&mut self, field: &Field) {
                let _ = self.append_header(field.name.clone(), field.value.clone());
            }

            fn remove(&mut self, name: &HeaderName) {
                self.remove_header(name);
            }
        }
    )*};
}

fields!(RequestHeader, ResponseHeader);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_values_are_checked() {
        assert!(name("X-Id").is_ok());
        assert_eq!(name("X Id").unwrap_err(), "`X Id` is not a valid header name");
        assert_eq!(name("").unwrap_err(), "`` is not a valid header name");
        assert!(value("grüße, world").is_ok());
        assert_eq!(value("a\r\nb: c").unwrap_err(), "a header value is one line of text, without control characters");
    }

    #[test]
    fn fields_of_the_connection_are_not_free() {
        for taken in [
            "Content-Length",
            "transfer-encoding",
            "Connection",
            "Keep-Alive",
            "Proxy-Connection",
            "TE",
            "Trailer",
            "Upgrade",
        ] {
            let told = format!("`{taken}` belongs to the connection, and Forebay sets it itself");
            assert_eq!(free_name(taken).unwrap_err(), told);
        }
        assert_eq!(free_name("host").unwrap_err(), "`Host` can only be set, and only on the request");
        assert!(free_name("Cache-Control").is_ok());
    }

    #[test]
    fn a_host_is_a_name_or_an_address_and_maybe_a_port() {
        for good in ["example.com", "example.com:8080", "192.0.2.1", "[2001:db8::1]", "[::1]:80"] {
            assert!(host(good).is_some(), "{good}");
        }
        for bad in
            ["", "a b", "a/b", "user@example.com", "example.com:http", "example.com:", ":80", "a\r\nb", "a:99999"]
        {
            assert!(host(bad).is_none(), "{bad}");
        }
    }
}
