//! A health check with `grpc.health.v1.Health/Check`, the gRPC health protocol.
//!
//! It encodes the two messages itself, since each has a single field: `string service = 1` in the request,
//! `ServingStatus status = 1` in the response.

use async_trait::async_trait;
use bytes::Bytes;
use http::uri::Authority;
use http::{HeaderMap, HeaderValue, header};
use pingora::Result;
use pingora::connectors::http::Connector;
use pingora::protocols::http::client::HttpSession;
use pingora_load_balancing::Backend;
use pingora_load_balancing::health_check::HealthCheck;

use super::connector::connector;
use super::http::{alone, host, request};
use super::target::{endpoint, sound, wrong};
use crate::config::upstream::health::GrpcCheck;
use crate::upstream::transport::limit::connected;
use crate::upstream::transport::readable;
use crate::upstream::transport::tls::Flaw;

const PATH: &str = "/grpc.health.v1.Health/Check";
/// A compression flag of one byte, and the length in four.
const PREFIX_BYTES: usize = 5;
/// Longer than any response of this protocol.
const RESPONSE_BYTES_MAX: usize = 4096;

/// A gRPC health check.
pub struct Grpc {
    connector: &'static Connector,
    host: Option<Authority>,
    question: Bytes,
}

impl Grpc {
    /// The configured check, already validated.
    pub fn new(written: &GrpcCheck) -> Grpc {
        Grpc {
            connector: connector(),
            host: written.host.as_deref().and_then(|host| host.parse().ok()),
            question: question(&written.service).into(),
        }
    }
}

#[async_trait]
impl HealthCheck for Grpc {
    async fn check(&self, target: &Backend) -> Result<()> {
        let endpoint = endpoint(target)?;
        let (peer, limit) = alone(endpoint);
        let (session, _) = connected(limit, self.connector.get_http_session(&peer)).await?;
        sound(Flaw::of(session.digest()))?;
        let HttpSession::H2(mut session) = session else { return wrong("it does not speak HTTP/2") };
        let host = host(self.host.as_ref(), endpoint);
        let mut request = request("POST", PATH, &host, Some(peer.is_tls()))?;
        request.insert_header(header::CONTENT_TYPE, "application/grpc")?;
        request.insert_header(header::TE, "trailers")?;
        session.write_request_header(Box::new(request), false)?;
        session.write_request_body(self.question.clone(), true).await?;
        session.read_response_header().await?;
        let Some(answer) = session.response_header() else { return wrong("it answered nothing") };
        if answer.status != 200 {
            return wrong(format!("it answered {} instead of 200", answer.status.as_u16()));
        }
        readable(answer, false)?;
        // A response without a message has the trailer fields in its header.
        judge_status(&answer.headers, false)?;
        let mut message = Vec::new();
        while let Some(piece) = session.read_response_body().await? {
            if message.len() + piece.len() > RESPONSE_BYTES_MAX {
                return wrong("its response is not a message of the health protocol");
            }
            message.extend_from_slice(&piece);
        }
        judge_status(&session.read_trailers().await?.unwrap_or_default(), true)?;
        judge(&message)
    }

    /// Not used: `upstream/health.rs` counts.
    fn health_threshold(&self, _: bool) -> usize {
        1
    }
}

/// The request message with its gRPC prefix.
fn question(service: &str) -> Vec<u8> {
    let mut message = Vec::new();
    if !service.is_empty() {
        message.push(1 << 3 | 2);
        let mut length = service.len();
        while length >= 0x80 {
            message.push(length as u8 | 0x80);
            length >>= 7;
        }
        message.push(length as u8);
        message.extend_from_slice(service.as_bytes());
    }
    let length = u32::try_from(message.len()).unwrap_or(u32::MAX);
    [&[0], &length.to_be_bytes()[..], &message].concat()
}

/// Checks `grpc-status`, which is required if `must`.
fn judge_status(fields: &HeaderMap, must: bool) -> Result<()> {
    match fields.get("grpc-status").map(HeaderValue::as_bytes) {
        Some(b"0") => Ok(()),
        None if !must => Ok(()),
        None => wrong("its answer has no grpc-status"),
        Some(status) => {
            let why = fields.get("grpc-message").map_or(&b""[..], HeaderValue::as_bytes);
            let [status, why] = [status, why].map(String::from_utf8_lossy);
            wrong(format!("grpc-status {status} {why}").trim_end())
        }
    }
}

/// Parses a message with its prefix.
fn judge(bytes: &[u8]) -> Result<()> {
    let message = bytes.split_at_checked(PREFIX_BYTES).filter(|(prefix, message)| {
        let length = u32::from_be_bytes([prefix[1], prefix[2], prefix[3], prefix[4]]);
        prefix[0] == 0 && usize::try_from(length) == Ok(message.len())
    });
    match message.and_then(|(_, message)| serving_status(message)) {
        Some(1) => Ok(()),
        Some(2) => wrong("it says that it is not serving"),
        Some(3) => wrong("it says that it does not know the service"),
        Some(status) => wrong(format!("it says of itself `unknown` ({status})")),
        None => wrong("its response is not a message of the health protocol"),
    }
}

/// The last `status` field of a message, 0 if it is missing; `None` for an invalid message.
fn serving_status(mut message: &[u8]) -> Option<u64> {
    let mut status = 0;
    while !message.is_empty() {
        let key = varint(&mut message)?;
        match (key >> 3, key & 7) {
            (1, 0) => status = varint(&mut message)?,
            (0, _) => return None,
            (_, 0) => drop(varint(&mut message)?),
            (_, 1) => message = message.get(8..)?,
            (_, 2) => {
                let length = usize::try_from(varint(&mut message)?).ok()?;
                message = message.get(length..)?;
            }
            (_, 5) => message = message.get(4..)?,
            _ => return None,
        }
    }
    Some(status)
}

fn varint(bytes: &mut &[u8]) -> Option<u64> {
    let mut value = 0_u64;
    for shift in (0..64).step_by(7) {
        let (&byte, rest) = bytes.split_first()?;
        *bytes = rest;
        value |= u64::from(byte & 0x7f) << shift;
        if byte < 0x80 {
            return Some(value);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    use proptest::prelude::*;
    use prost::Message;

    #[derive(Clone, PartialEq, Message)]
    struct Request {
        #[prost(string, tag = "1")]
        service: String,
    }

    #[derive(Clone, PartialEq, Message)]
    struct Response {
        #[prost(int32, tag = "1")]
        status: i32,
        #[prost(string, tag = "7")]
        more: String,
        #[prost(fixed64, tag = "8")]
        and: u64,
    }

    fn framed(message: &impl Message) -> Vec<u8> {
        let message = message.encode_to_vec();
        [&[0], &u32::try_from(message.len()).unwrap().to_be_bytes()[..], &message].concat()
    }

    fn said(bytes: &[u8]) -> String {
        let error = judge(bytes).err();
        error.map_or("serving".to_owned(), |error| error.context.as_ref().map_or("", |text| text.as_str()).to_owned())
    }

    #[test]
    fn only_who_serves_is_well() {
        let response = |status| framed(&Response { status, ..Response::default() });
        assert_eq!(said(&response(1)), "serving");
        assert_eq!(said(&response(2)), "it says that it is not serving");
        assert_eq!(said(&response(3)), "it says that it does not know the service");
        assert_eq!(said(&response(0)), "it says of itself `unknown` (0)", "it is left out where it is the default");
        assert_eq!(said(&framed(&Response { status: 1, more: "x".repeat(300), and: 7 })), "serving");
        for wrong in [&b""[..], b"\0\0\0\0", b"\0\0\0\0\x02\x08", b"\x01\0\0\0\x02\x08\x01", b"\0\0\0\0\x02\x08\xff"] {
            assert_eq!(said(wrong), "its response is not a message of the health protocol");
        }
    }

    #[test]
    fn the_status_of_the_call_is_in_the_trailers_or_in_the_header() {
        let fields =
            |status| HeaderMap::from_iter([("grpc-status".parse().unwrap(), HeaderValue::from_static(status))]);
        assert!(judge_status(&fields("0"), true).is_ok());
        assert!(judge_status(&HeaderMap::new(), false).is_ok() && judge_status(&HeaderMap::new(), true).is_err());
        let mut unimplemented = fields("12");
        unimplemented.insert("grpc-message", HeaderValue::from_static("no such service"));
        let error = judge_status(&unimplemented, false).unwrap_err();
        assert_eq!(error.context.as_ref().map(|text| text.as_str()), Some("grpc-status 12 no such service"));
    }

    proptest! {
        #[test]
        fn a_question_is_what_a_library_would_make_of_it(service in ".{0,200}") {
            prop_assert_eq!(question(&service), framed(&Request { service }));
        }

        #[test]
        fn no_answer_brings_it_down(bytes: Vec<u8>) {
            let _ = judge(&bytes);
            let length = u32::try_from(bytes.len()).unwrap();
            let _ = judge(&[&[0], &length.to_be_bytes()[..], &bytes].concat());
        }
    }
}
