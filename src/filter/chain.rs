//! The filters of one route, in order: who is called at which stage is decided when the chain is built.
//!
//! `proxy` calls a chain and never a filter; [`Catalog`](super::Catalog) builds it. On the way of a request nothing is looked
//! up by name, and nothing is allocated but the futures of the filters that run and one list of states.

use std::any::Any;
use std::net::IpAddr;

use bytes::Bytes;
use pingora::http::{RequestHeader, ResponseHeader};

use super::{Filter, Outcome, Scope, Stages, Verdict};
use crate::error::refusal;
use crate::eventloop::Watched;
use crate::metrics::Metrics;

/// The filters of one route.
#[derive(Default)]
pub struct Chain {
    links: Vec<Link>,
    /// What at least one of the links wants.
    stages: Stages,
    /// Places in `links`, in the order in which they are called at each stage.
    request: Vec<usize>,
    request_body: Vec<usize>,
    response: Vec<usize>,
    response_body: Vec<usize>,
    end: Vec<usize>,
}

/// A filter, the key under which it was written, and how the event loop sees it.
struct Link {
    key: &'static str,
    watched: Watched,
    filter: Box<dyn Filter>,
}

type State = Option<Box<dyn Any + Send + Sync>>;

/// What the filters of a chain keep for one exchange: a slot each. The default suits every chain.
#[derive(Default)]
pub struct States(Vec<State>);

/// What all filters of an exchange see: a [`Scope`] without the state, which is each filter's own.
pub struct View<'a> {
    /// The client's address; `None` on a unix socket.
    pub client: Option<IpAddr>,
    /// `http` or `https`, as the client spoke it.
    pub scheme: &'static str,
    /// The name of the route.
    pub route: &'a str,
    /// The request header.
    pub request: &'a mut RequestHeader,
}

impl Chain {
    /// A chain of filters, each with its key, in the order in which they were written.
    pub(super) fn new(filters: Vec<(&'static str, Box<dyn Filter>)>) -> Chain {
        let links: Vec<Link> =
            filters.into_iter().map(|(key, filter)| Link { key, watched: Watched::untimed(key), filter }).collect();
        let inwards = |stage| -> Vec<usize> {
            (0..links.len()).filter(|&index| links[index].filter.stages().contains(stage)).collect()
        };
        let outwards = |stage| inwards(stage).into_iter().rev().collect();
        Chain {
            stages: links.iter().fold(Stages::NONE, |all, link| all | link.filter.stages()),
            request: inwards(Stages::REQUEST),
            request_body: inwards(Stages::REQUEST_BODY),
            response: outwards(Stages::RESPONSE),
            response_body: outwards(Stages::RESPONSE_BODY),
            end: outwards(Stages::END),
            links,
        }
    }

    /// Times the polls of its filters.
    pub fn timed(mut self, metrics: &Metrics) -> Chain {
        for link in &mut self.links {
            link.watched.time(metrics.filter_polls(link.key));
        }
        self
    }

    /// Whether a filter wants one of these stages; if not, there is no need to call them.
    pub fn wants(&self, stages: Stages) -> bool {
        self.stages.intersects(stages)
    }

    /// Fresh states for one exchange; an empty chain allocates nothing.
    pub fn states(&self) -> States {
        States(self.links.iter().map(|_| None).collect())
    }

    /// Runs [`Filter::request`].
    pub async fn request(&self, states: &mut States, mut view: View<'_>) -> Verdict {
        for &index in &self.request {
            let link = &self.links[index];
            let mut scope = view.scope(states, index);
            let verdict = link.watched.run(link.filter.request(&mut scope)).await;
            let Verdict::Continue = verdict else { return verdict };
        }
        Verdict::Continue
    }

    /// Runs [`Filter::request_body`].
    pub async fn request_body(
        &self,
        states: &mut States,
        mut view: View<'_>,
        piece: &mut Option<Bytes>,
        end: bool,
    ) -> Verdict {
        for &index in &self.request_body {
            let link = &self.links[index];
            let mut scope = view.scope(states, index);
            let call = link.filter.request_body(&mut scope, piece, end);
            let verdict = link.watched.run(call).await;
            let Verdict::Continue = verdict else { return link.late("request_body", verdict) };
        }
        Verdict::Continue
    }

    /// Runs [`Filter::response`], the last filter first.
    pub async fn response(&self, states: &mut States, mut view: View<'_>, response: &mut ResponseHeader) -> Verdict {
        for &index in &self.response {
            let link = &self.links[index];
            let mut scope = view.scope(states, index);
            let call = link.filter.response(&mut scope, response);
            let verdict = link.watched.run(call).await;
            let Verdict::Continue = verdict else { return link.late("response", verdict) };
        }
        Verdict::Continue
    }

    /// Runs [`Filter::response_body`], the last filter first.
    pub async fn response_body(
        &self,
        states: &mut States,
        mut view: View<'_>,
        piece: &mut Option<Bytes>,
        end: bool,
    ) -> Verdict {
        for &index in &self.response_body {
            let link = &self.links[index];
            let mut scope = view.scope(states, index);
            let call = link.filter.response_body(&mut scope, piece, end);
            let verdict = link.watched.run(call).await;
            let Verdict::Continue = verdict else { return link.late("response_body", verdict) };
        }
        Verdict::Continue
    }

    /// Runs [`Filter::end`], the last filter first: each one that wants it, whatever happened before.
    pub fn end(&self, states: &mut States, mut view: View<'_>, outcome: Outcome) {
        for &index in &self.end {
            let link = &self.links[index];
            link.watched.call(|| link.filter.end(&mut view.scope(states, index), outcome));
        }
    }
}

impl Link {
    /// The verdict of a stage that comes too late for an answer.
    fn late(&self, stage: &str, verdict: Verdict) -> Verdict {
        match verdict {
            Verdict::Answer(_) => {
                tracing::error!(filter = self.key, stage, "a filter can answer at `request` only");
                Verdict::from(&refusal::INTERNAL)
            }
            verdict => verdict,
        }
    }
}

impl States {
    /// Slots are added as they are asked for, so that states of another chain can never panic.
    fn slot(&mut self, index: usize) -> &mut State {
        if index >= self.0.len() {
            self.0.resize_with(index + 1, || None);
        }
        &mut self.0[index]
    }
}

impl View<'_> {
    fn scope<'s>(&'s mut self, states: &'s mut States, index: usize) -> Scope<'s> {
        Scope {
            client: self.client,
            scheme: self.scheme,
            route: self.route,
            request: self.request,
            state: states.slot(index),
        }
    }
}

#[cfg(test)]
mod tests {
    use async_trait::async_trait;
    use futures::FutureExt;
    use http::StatusCode;

    use super::super::Answer;
    use super::*;

    /// Writes its name into the header or the body at each stage, and stops where it is told to.
    struct Witness {
        name: &'static str,
        stages: Stages,
        verdict: fn() -> Verdict,
    }

    #[async_trait]
    impl Filter for Witness {
        fn stages(&self) -> Stages {
            self.stages
        }

        async fn request(&self, scope: &mut Scope<'_>) -> Verdict {
            scope.keep(self.name);
            let _ = scope.request.append_header("seen", self.name);
            (self.verdict)()
        }

        async fn request_body(&self, _: &mut Scope<'_>, piece: &mut Option<Bytes>, _: bool) -> Verdict {
            *piece = Some([piece.as_deref().unwrap_or_default(), self.name.as_bytes()].concat().into());
            (self.verdict)()
        }

        async fn response(&self, scope: &mut Scope<'_>, response: &mut ResponseHeader) -> Verdict {
            let kept = scope.kept::<&str>().copied().unwrap_or("nothing");
            let _ = response.append_header("seen", kept);
            (self.verdict)()
        }

        async fn response_body(&self, _: &mut Scope<'_>, piece: &mut Option<Bytes>, _: bool) -> Verdict {
            *piece = Some([piece.as_deref().unwrap_or_default(), self.name.as_bytes()].concat().into());
            (self.verdict)()
        }

        fn end(&self, scope: &mut Scope<'_>, _: Outcome) {
            let _ = scope.request.append_header("ended", self.name);
        }
    }

    fn witness(name: &'static str) -> Witness {
        Witness { name, stages: Stages::ALL, verdict: || Verdict::Continue }
    }

    fn chain(witnesses: impl IntoIterator<Item = Witness>) -> Chain {
        let boxed = |witness: Witness| (witness.name, Box::new(witness) as Box<dyn Filter>);
        Chain::new(witnesses.into_iter().map(boxed).collect())
    }

    fn request() -> RequestHeader {
        RequestHeader::build("GET", b"/", None).unwrap()
    }

    fn view(request: &mut RequestHeader) -> View<'_> {
        View { client: None, scheme: "http", route: "all", request }
    }

    fn seen<'a>(headers: &'a http::HeaderMap, name: &str) -> Vec<&'a str> {
        headers.get_all(name).iter().map(|value| value.to_str().unwrap()).collect()
    }

    const OVER: Outcome = Outcome { status: 200, refusal: None };

    #[test]
    fn requests_pass_inwards_and_responses_outwards() {
        let chain = chain([witness("a"), witness("b"), witness("c")]);
        let (mut request, mut states) = (request(), chain.states());
        let mut response = ResponseHeader::build(200, None).unwrap();
        let (mut up, mut down) = (None, None);

        chain.request(&mut states, view(&mut request)).now_or_never().unwrap();
        chain.request_body(&mut states, view(&mut request), &mut up, true).now_or_never().unwrap();
        chain.response(&mut states, view(&mut request), &mut response).now_or_never().unwrap();
        chain.response_body(&mut states, view(&mut request), &mut down, true).now_or_never().unwrap();
        chain.end(&mut states, view(&mut request), OVER);

        assert_eq!(seen(&request.headers, "seen"), ["a", "b", "c"]);
        assert_eq!(up.as_deref(), Some(b"abc".as_slice()));
        assert_eq!(seen(&response.headers, "seen"), ["c", "b", "a"], "each filter finds its own state");
        assert_eq!(down.as_deref(), Some(b"cba".as_slice()));
        assert_eq!(seen(&request.headers, "ended"), ["c", "b", "a"]);
    }

    #[test]
    fn the_first_refusal_ends_the_stage_and_yet_everyone_hears_of_the_end() {
        let refuses = Witness { verdict: || Verdict::from(&refusal::HEADER_METHOD), ..witness("b") };
        let chain = chain([witness("a"), refuses, witness("c")]);
        let (mut request, mut states) = (request(), chain.states());

        let verdict = chain.request(&mut states, view(&mut request)).now_or_never().unwrap();
        chain.end(&mut states, view(&mut request), OVER);

        assert!(matches!(verdict, Verdict::Refuse(refused) if refused.refusal == &refusal::HEADER_METHOD));
        assert_eq!(seen(&request.headers, "seen"), ["a", "b"]);
        assert_eq!(seen(&request.headers, "ended"), ["c", "b", "a"]);
    }

    #[test]
    fn a_filter_is_called_at_the_stages_it_wants_and_no_other() {
        let chain = chain([
            Witness { stages: Stages::RESPONSE, ..witness("a") },
            Witness { stages: Stages::REQUEST | Stages::END, ..witness("b") },
        ]);
        let (mut request, mut states) = (request(), chain.states());
        chain.request(&mut states, view(&mut request)).now_or_never().unwrap();
        chain.end(&mut states, view(&mut request), OVER);

        assert_eq!(seen(&request.headers, "seen"), ["b"]);
        assert_eq!(seen(&request.headers, "ended"), ["b"]);
        assert!(chain.wants(Stages::RESPONSE | Stages::RESPONSE_BODY));
        assert!(!chain.wants(Stages::REQUEST_BODY | Stages::RESPONSE_BODY));
    }

    #[test]
    fn an_answer_that_comes_too_late_is_an_error_of_the_filter() {
        let answer = || Verdict::Answer(Answer { status: StatusCode::OK, headers: Vec::new(), body: Bytes::new() });
        let chain = chain([Witness { verdict: answer, ..witness("a") }]);
        let (mut request, mut states) = (request(), chain.states());
        let mut response = ResponseHeader::build(200, None).unwrap();

        let early = chain.request(&mut states, view(&mut request)).now_or_never().unwrap();
        assert!(matches!(early, Verdict::Answer(_)));
        let late = chain.response(&mut states, view(&mut request), &mut response).now_or_never().unwrap();
        assert!(matches!(late, Verdict::Refuse(refused) if refused.refusal == &refusal::INTERNAL));
    }

    #[test]
    fn an_empty_chain_wants_nothing_and_allocates_nothing() {
        let chain = Chain::default();
        assert!(!chain.wants(Stages::ALL));
        assert_eq!(chain.states().0.capacity(), 0);
    }

    #[test]
    fn states_of_another_chain_never_panic() {
        let chain = chain([witness("a"), witness("b")]);
        let (mut request, mut response) = (request(), ResponseHeader::build(200, None).unwrap());
        chain.response(&mut States::default(), view(&mut request), &mut response).now_or_never().unwrap();
        assert_eq!(seen(&response.headers, "seen"), ["nothing", "nothing"]);
    }
}
