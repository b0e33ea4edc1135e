//! Runs filters through a chain with handmade headers, for the tests of filters.

use std::net::IpAddr;

use futures::FutureExt;
use http::HeaderMap;
use pingora::http::{RequestHeader, ResponseHeader};

use super::{Answer, Catalog, Chain, Refused, States, Verdict, View};
use crate::config::filter::FilterEntry;
use crate::error::BuildError;
use crate::expression::Facts;

/// A sequence of exchanges with the same filters.
pub struct Rehearsal {
    chain: Chain,
    states: States,
    /// The client's address; 192.0.2.1 by default.
    pub client: Option<IpAddr>,
    /// The request; `GET /` by default.
    pub request: RequestHeader,
}

impl Rehearsal {
    /// The filters of a route in YAML.
    pub fn of(filters: &str) -> Rehearsal {
        let chain = chain(filters).unwrap_or_else(|errors| panic!("{errors:?}"));
        let states = chain.states();
        let client = Some(IpAddr::from([192, 0, 2, 1]));
        Rehearsal { chain, states, client, request: request("/", &[]) }
    }

    /// Sets the target and the headers of the request.
    pub fn asking(mut self, target: &str, headers: &[(&'static str, &str)]) -> Rehearsal {
        self.request = request(target, headers);
        self
    }

    /// Sets the client.
    pub fn from(mut self, client: &str) -> Rehearsal {
        self.client = Some(client.parse().unwrap());
        self
    }

    /// The verdict of the request stage.
    pub fn verdict(&mut self) -> Verdict {
        let (path, facts) =
            (self.request.uri.path().to_owned(), Facts { client: self.client, ..Facts::of("shop", "") });
        let view = View { facts: Facts { path: &path, ..facts }, request: &mut self.request };
        self.chain.request(&mut self.states, view).now_or_never().expect("none of our filters waits")
    }

    /// Runs the request stage, which must let the request pass.
    pub fn pass(&mut self) -> &RequestHeader {
        match self.verdict() {
            Verdict::Continue => &self.request,
            other => panic!("{other:?}"),
        }
    }

    /// Runs the request stage, which must refuse the request.
    pub fn refused(&mut self) -> Refused {
        match self.verdict() {
            Verdict::Refuse(refused) => refused,
            other => panic!("{other:?}"),
        }
    }

    /// Runs the request stage, which must answer the request.
    pub fn answer(&mut self) -> Answer {
        match self.verdict() {
            Verdict::Answer(answer) => answer,
            other => panic!("{other:?}"),
        }
    }

    /// Runs the response stage on a response with status 200, and returns its headers.
    pub fn respond(&mut self, headers: &[(&'static str, &str)]) -> HeaderMap {
        let mut response = ResponseHeader::build(200, None).unwrap();
        for &(name, value) in headers {
            response.append_header(name, value).unwrap();
        }
        let (path, facts) =
            (self.request.uri.path().to_owned(), Facts { client: self.client, ..Facts::of("shop", "") });
        let view = View { facts: Facts { path: &path, ..facts }, request: &mut self.request };
        let verdict = self.chain.response(&mut self.states, view, &mut response).now_or_never();
        assert!(matches!(verdict, Some(Verdict::Continue)), "{verdict:?}");
        response.headers.clone()
    }
}

/// A `GET` with these headers.
pub fn request(target: &str, headers: &[(&'static str, &str)]) -> RequestHeader {
    let mut request = RequestHeader::build("GET", target.as_bytes(), None).unwrap();
    for &(name, value) in headers {
        request.append_header(name, value).unwrap();
    }
    request
}

/// The chain of a `filters:` list.
pub fn chain(filters: &str) -> Result<Chain, Vec<BuildError>> {
    let entries: Vec<FilterEntry> = serde_yaml::from_str(filters).unwrap();
    Catalog::builtin().chain(&entries)
}

/// The single error of a `filters:` list, with its path, as shown to the operator.
pub fn error(filters: &str) -> String {
    let errors = chain(filters).err().unwrap_or_default();
    assert_eq!(errors.len(), 1, "{errors:?}");
    errors[0].to_string()
}

/// The first example in the module documentation of a source file.
pub fn example(source: &str) -> String {
    let doc = source.lines().map_while(|line| line.strip_prefix("//!"));
    let block = doc.skip_while(|line| line.trim() != "```yaml").skip(1).take_while(|line| line.trim() != "```");
    let yaml: Vec<&str> = block.map(|line| line.strip_prefix(' ').unwrap_or(line)).collect();
    assert!(!yaml.is_empty(), "the module has no example");
    yaml.join("\n")
}

/// The values of one header.
pub fn values<'a>(headers: &'a HeaderMap, name: &str) -> Vec<&'a str> {
    headers.get_all(name).iter().map(|value| value.to_str().unwrap()).collect()
}
