//! Drives filters through a chain with headers made by hand; for the tests beside them.

use std::net::IpAddr;

use futures::FutureExt;
use http::HeaderMap;
use pingora::http::{RequestHeader, ResponseHeader};

use super::{Answer, Catalog, Chain, Refused, States, Verdict, View};
use crate::config::filter::FilterEntry;
use crate::error::BuildError;
use crate::expression::Facts;

/// One exchange after another with the same filters.
pub struct Rehearsal {
    chain: Chain,
    states: States,
    /// Who asks: 192.0.2.1, unless told otherwise.
    pub client: Option<IpAddr>,
    /// What is asked: `GET /`, unless told otherwise.
    pub request: RequestHeader,
}

impl Rehearsal {
    /// The filters of a route as they are written in YAML.
    pub fn of(filters: &str) -> Rehearsal {
        let chain = chain(filters).unwrap_or_else(|errors| panic!("{errors:?}"));
        let states = chain.states();
        let client = Some(IpAddr::from([192, 0, 2, 1]));
        Rehearsal { chain, states, client, request: request("/", &[]) }
    }

    /// Asks for `target`, with these headers.
    pub fn asking(mut self, target: &str, headers: &[(&'static str, &str)]) -> Rehearsal {
        self.request = request(target, headers);
        self
    }

    /// Comes from this client.
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

    /// Goes through the request stage, which must let it pass.
    pub fn pass(&mut self) -> &RequestHeader {
        match self.verdict() {
            Verdict::Continue => &self.request,
            other => panic!("{other:?}"),
        }
    }

    /// Goes through the request stage, which must refuse it.
    pub fn refused(&mut self) -> Refused {
        match self.verdict() {
            Verdict::Refuse(refused) => refused,
            other => panic!("{other:?}"),
        }
    }

    /// Goes through the request stage, which must answer it.
    pub fn answer(&mut self) -> Answer {
        match self.verdict() {
            Verdict::Answer(answer) => answer,
            other => panic!("{other:?}"),
        }
    }

    /// What becomes of the headers of a response with status 200.
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

/// The one error of a `filters:` list, with its path, as the operator reads it.
pub fn error(filters: &str) -> String {
    let errors = chain(filters).err().unwrap_or_default();
    assert_eq!(errors.len(), 1, "{errors:?}");
    errors[0].to_string()
}

/// The first example in the module doc of a source file.
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
