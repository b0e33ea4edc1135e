//! Why an order failed, in words for an operator.

use boring::error::ErrorStack;
use instant_acme::{Error, Identifier, Problem};

use crate::printable::printable;

/// Limit on the length of an issuer's error text.
const PROBLEM_CHARS_MAX: usize = 600;

/// Why an order failed.
#[derive(Debug)]
pub struct Failure {
    /// The reason.
    pub problem: String,
    /// The issuer does not know the account.
    pub is_unknown: bool,
}

impl Failure {
    /// A failure with this reason.
    pub fn new(problem: String) -> Failure {
        let shown = printable(&problem);
        let problem = match shown.char_indices().nth(PROBLEM_CHARS_MAX) {
            Some((end, _)) => format!("{}…", &shown[..end]),
            None => shown.into_owned(),
        };
        Failure { problem, is_unknown: false }
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Failure {
        let is_unknown = matches!(&error, Error::Api(problem) if is_of(problem, "accountDoesNotExist"));
        Failure { is_unknown, ..Failure::new(told(&error)) }
    }
}

impl From<ErrorStack> for Failure {
    fn from(error: ErrorStack) -> Failure {
        Failure::new(format!("the TLS library failed: {error}"))
    }
}

/// The text of an error for operators.
pub(super) fn told(error: &Error) -> String {
    match error {
        Error::Api(problem) => words(problem),
        Error::Json(error) => format!("its response violates the protocol: {error}"),
        Error::Timeout(_) => "it timed out".to_owned(),
        other => other.to_string(),
    }
}

/// The text of an issuer's problem document (RFC 7807).
pub(super) fn words(problem: &Problem) -> String {
    let of = |detail: &Option<String>, kind: &Option<String>| {
        let kind = kind.as_deref().map(|kind| kind.strip_prefix(KIND).unwrap_or(kind));
        match (detail, kind) {
            (Some(detail), Some(kind)) => format!("{detail} ({kind})"),
            (Some(detail), None) => detail.clone(),
            (None, kind) => kind.unwrap_or("it does not say what is wrong").to_owned(),
        }
    };
    let parts = problem.subproblems.iter().map(|part| {
        let name = part.identifier.clone().map(|identifier| match identifier {
            Identifier::Dns(name) => format!("`{name}`: "),
            _ => String::new(),
        });
        name.unwrap_or_default() + &of(&part.detail, &part.r#type)
    });
    [of(&problem.detail, &problem.r#type)].into_iter().chain(parts).collect::<Vec<_>>().join("; ")
}

/// The prefix of the error types in RFC 8555 §6.7.
const KIND: &str = "urn:ietf:params:acme:error:";

/// Whether a problem has this error type (RFC 8555 §6.7).
pub(super) fn is_of(problem: &Problem, kind: &str) -> bool {
    problem.r#type.as_deref().and_then(|it| it.strip_prefix(KIND)) == Some(kind)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_problem_is_told_in_words_that_cannot_steer_a_terminal() {
        let problem: Problem = serde_json::from_str(
            r#"{ "type": "urn:ietf:params:acme:error:malformed", "detail": "no\u001b[31m", "subproblems": [
                 { "identifier": { "type": "dns", "value": "a.test" }, "detail": "not public" } ] }"#,
        )
        .expect("a problem");
        let failure = Failure::from(Error::Api(problem));
        assert_eq!(failure.problem, "no\\u001b[31m (malformed); `a.test`: not public");
        assert!(!failure.is_unknown);
        let gone: Problem =
            serde_json::from_str(r#"{ "type": "urn:ietf:params:acme:error:accountDoesNotExist" }"#).expect("a problem");
        let gone = Failure::from(Error::Api(gone));
        assert!(gone.is_unknown && gone.problem == "accountDoesNotExist");
        assert_eq!(Failure::new("ä".repeat(2000)).problem.chars().count(), PROBLEM_CHARS_MAX + 1);
    }
}
