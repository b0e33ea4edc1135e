//! The endpoint of a check, and the errors of checks.

use std::sync::Arc;

use pingora::{Error, ErrorType, Result};
use pingora_load_balancing::Backend;

use crate::upstream::endpoint::Endpoint;
use crate::upstream::transport::tls::Flaw;

/// The endpoint passed to `Probe::ask`.
pub(super) fn endpoint(target: &Backend) -> Result<&Arc<Endpoint>> {
    let missing = || Error::explain(ErrorType::InternalError, "a check without an endpoint");
    target.ext.get::<Arc<Endpoint>>().ok_or_else(missing)
}

/// Returns an error if the connection has a flaw.
pub(super) fn sound(flaw: Option<Flaw>) -> Result<()> {
    flaw.map_or(Ok(()), |flaw| wrong(flaw.to_string()))
}

/// A failed check.
pub(super) fn wrong<T>(message: impl Into<String>) -> Result<T> {
    Err(Error::explain(ErrorType::Custom("health check"), message.into()))
}
