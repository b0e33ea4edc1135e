//! The filters of one route, in order. The filters of each stage are determined when the chain is built.
//!
//! `proxy` calls chains, never filters; [`Catalog`](super::Catalog) builds chains. During an exchange a chain looks
//! nothing up by name. It allocates one list of states once a filter runs, and the futures of the filters that run. An
//! exchange in which no condition holds allocates nothing.

mod set;

use std::any::Any;
use std::borrow::Cow;
use std::future::Future;
use std::slice;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, HeaderName};
use pingora::http::{RequestHeader, ResponseHeader};
use prometheus::IntCounter;

use self::set::Set;
use super::{Answer, Filter, Outcome, Scope, Stages, Verdict};
use crate::error::refusal;
use crate::eventloop::Watched;
use crate::expression::facts::Response;
use crate::expression::{Asked, Author, Condition, Facts, Identity};
use crate::metrics::Metrics;
use crate::party::wait::{FAR, NoClient, within};
use crate::phase::journal::steps::Notebook;

/// The filters of one route.
#[derive(Default)]
pub struct Chain {
    links: Vec<ChainedFilter>,
    /// The time limit of one call of a filter. `None`: unlimited.
    patience: Option<Duration>,
    /// The stages of all links together.
    stages: Stages,
    /// The counters of exchanges in which filters were skipped; set once there are metrics.
    skips: Vec<Skips>,
    /// In the order of the calls, as all following lists.
    request: Vec<Turn>,
    response: Vec<Turn>,
    /// Indices into `links`.
    request_body: Vec<usize>,
    response_body: Vec<usize>,
    request_trailers: Vec<usize>,
    response_trailers: Vec<usize>,
    end: Vec<usize>,
}

/// A filter, with its name in the metrics of the event loop: its key or its label.
pub(super) struct ChainedFilter {
    watched: Watched,
    filter: Box<dyn Filter>,
    /// The stages at which it is called.
    wants: Stages,
    when: Option<When>,
    /// The fields that clients may not send in trailers.
    own: Box<[HeaderName]>,
}

/// The condition under which a filter acts.
struct When {
    condition: Condition,
    /// The number of exchanges for which it did not hold; set once there are metrics.
    skipped: Option<IntCounter>,
}

/// The counter of exchanges in which filters of one name were skipped. They are counted together, since an increment
/// of a shared counter costs more than a condition.
struct Skips {
    counter: IntCounter,
    of: Set,
}

/// A filter at the request or response header: all that an exchange reads of a filter that it skips.
struct Turn {
    index: usize,
    /// The condition that is evaluated at this stage, unless an earlier stage has evaluated it.
    when: Option<Condition>,
    /// Whether the filter is called at this stage if it acts.
    called: bool,
    /// Whether the filter is called even if it does not act, since it has prepared for a response.
    prepared: bool,
}

type State = Option<Box<dyn Any + Send + Sync>>;

/// The states of the filters of a chain for one exchange. The default fits every chain.
#[derive(Default)]
pub struct States {
    /// The filters whose conditions were evaluated.
    asked: Set,
    /// Those of them whose conditions did not hold.
    skipped: Set,
    /// One slot per filter; empty until a filter runs.
    slots: Vec<Slot>,
    /// The number of filters in the chain.
    filters: usize,
    /// The identity of the client, determined by a filter.
    identity: Option<Arc<Identity>>,
    /// The index of the filter whose answer replaces that of the endpoint.
    answered: Option<usize>,
    /// The record of the filters' calls, if one is kept.
    notebook: Option<Notebook>,
}

#[derive(Default)]
struct Slot {
    state: State,
    /// The filter does not process the request body.
    leaves_request_body: bool,
    /// The filter does not process the response body.
    leaves_body: bool,
    /// No part of the response may be sent before the filter has seen its body.
    holds_body: bool,
}

/// The exchange as all its filters see it: a [`Scope`] without the state of each filter.
pub struct View<'a> {
    /// The facts of the exchange.
    pub facts: Facts<'a>,
    /// The request header.
    pub request: &'a mut RequestHeader,
}

impl Chain {
    /// A chain of filters in the configured order.
    pub(super) fn new(links: Vec<ChainedFilter>) -> Chain {
        let inwards =
            |stage| -> Vec<usize> { (0..links.len()).filter(|&index| links[index].stages().contains(stage)).collect() };
        let outwards = |stage| -> Vec<usize> { inwards(stage).into_iter().rev().collect() };
        let turns = |order: Vec<usize>, stage| {
            order.into_iter().map(|index| links[index].turn(index, stage)).collect::<Vec<Turn>>()
        };
        Chain {
            patience: None,
            stages: links.iter().fold(Stages::NONE, |all, link| all | link.stages()),
            skips: Vec::new(),
            request: turns(inwards(Stages::REQUEST), Stages::REQUEST),
            response: turns(outwards(Stages::RESPONSE), Stages::RESPONSE),
            request_body: inwards(Stages::REQUEST_BODY),
            response_body: outwards(Stages::RESPONSE_BODY),
            request_trailers: inwards(Stages::REQUEST_TRAILERS),
            response_trailers: outwards(Stages::RESPONSE_TRAILERS),
            end: outwards(Stages::END),
            links,
        }
    }

    /// Measures the polls of its filters, and counts the exchanges of this route in which their conditions do not
    /// hold.
    pub fn timed(mut self, route: &str, metrics: &Metrics) -> Chain {
        let mut skips: Vec<(&str, Skips)> = Vec::new();
        for (index, link) in self.links.iter_mut().enumerate() {
            let label = link.label();
            link.watched.time(metrics.filter_polls(label));
            let Some(when) = &mut link.when else { continue };
            let counter = metrics.filter_skipped(route, label);
            when.skipped = Some(counter.clone());
            match skips.iter_mut().find(|(known, _)| *known == label) {
                Some((_, skips)) => skips.of.insert(index),
                None => skips.push((label, Skips { counter, of: Set::of(index) })),
            }
        }
        self.skips = skips.into_iter().map(|(_, skips)| skips).collect();
        self
    }

    /// Refuses the exchange (`route.filter_timeout`) if one call of a filter waits longer than `patience`.
    pub fn bounded(self, patience: Duration) -> Chain {
        Chain { patience: Some(patience), ..self }
    }

    /// Whether a filter is called at one of these stages.
    pub fn wants(&self, stages: Stages) -> bool {
        self.stages.intersects(stages)
    }

    /// The filters with a condition: their names, their conditions, and the number of exchanges of this route in
    /// which the condition did not hold. Filters without metrics are omitted.
    pub fn conditional(&self) -> impl Iterator<Item = (&'static str, &Condition, &IntCounter)> {
        self.links.iter().filter_map(|link| {
            let when = link.when.as_ref()?;
            Some((link.label(), &when.condition, when.skipped.as_ref()?))
        })
    }

    /// New states for one exchange. Allocates nothing.
    pub fn states(&self) -> States {
        States { filters: self.links.len(), ..States::default() }
    }

    /// The next of these filters that is called at this stage. The conditions of the filters before it are evaluated
    /// on the same facts, since nothing changes until a filter runs.
    fn next<'a>(
        &self,
        order: &mut slice::Iter<'_, Turn>,
        states: &mut States,
        asked: impl Fn() -> Asked<'a>,
    ) -> Option<(usize, &ChainedFilter)> {
        // Facts are not needed up to the first filter whose condition is open.
        while let Some(turn) = order.as_slice().first()
            && turn.open(states).is_none()
        {
            order.next();
            if turn.hears(states.may_act(turn.index)) {
                return Some((turn.index, &self.links[turn.index]));
            }
        }
        if order.as_slice().is_empty() {
            return None;
        }
        let (turns, asked) = (order.as_slice(), asked());
        let (mut skipped, mut found) = (Set::default(), None);
        for turn in order {
            let acts = match turn.open(states) {
                None => states.may_act(turn.index),
                Some(when) => {
                    states.asked.insert(turn.index);
                    let acts = when.holds(&asked);
                    if !acts {
                        skipped.insert(turn.index);
                    }
                    acts
                }
            };
            if turn.hears(acts) {
                found = Some((turn.index, &self.links[turn.index]));
                break;
            }
        }
        if !skipped.is_empty() {
            self.skip(turns, skipped, states);
        }
        found
    }

    /// Records and counts filters of these turns whose conditions did not hold.
    fn skip(&self, turns: &[Turn], skipped: Set, states: &mut States) {
        if let Some(notebook) = &states.notebook {
            let turns = turns.iter().filter(|turn| skipped.contains(turn.index));
            turns.for_each(|turn| notebook.skipped(self.links[turn.index].label()));
        }
        for skips in &self.skips {
            let times = skips.of.shared(&skipped);
            if times > 0 {
                skips.counter.inc_by(times as u64);
            }
        }
        states.skipped.add(skipped);
    }

    /// Whether this filter acts. Its condition is evaluated once, since filters may change what it reads.
    fn acts<'a>(&self, index: usize, states: &mut States, asked: impl FnOnce() -> Asked<'a>) -> bool {
        let link = &self.links[index];
        let Some(when) = &link.when else { return true };
        if let Some(acts) = states.decided(index) {
            return acts;
        }
        let acts = when.condition.holds(&asked());
        states.asked.insert(index);
        if !acts {
            states.skipped.insert(index);
            states.notebook.iter().for_each(|notebook| notebook.skipped(link.label()));
            when.skipped.iter().for_each(|counter| counter.inc());
        }
        acts
    }

    /// Evaluates the conditions up to the first filter that acts on the request, and returns whether there is one. If
    /// not, [`Chain::request`] need not be called.
    pub fn acts_on_request<'a>(&self, states: &mut States, asked: impl Fn() -> Asked<'a>) -> bool {
        self.next(&mut self.request.iter(), states, asked).is_some()
    }

    /// Whether another filter may act, now that the conditions on the request were evaluated.
    pub fn may_act(&self, states: &States) -> bool {
        states.skipped.len() < self.links.len()
    }

    /// Runs [`Filter::request`].
    pub async fn request(&self, states: &mut States, mut view: View<'_>) -> Verdict {
        let mut order = self.request.iter();
        loop {
            let identity = states.identity.clone();
            let facts = view.facts.of_whom(identity.as_deref());
            let asked = || facts.asked(view.request);
            let Some((index, link)) = self.next(&mut order, states, asked) else {
                return Verdict::Continue;
            };
            let notebook = states.notebook.clone();
            let mut scope = view.scope(states, index, facts);
            let verdict = link.run("request", link.filter.request(&mut scope), self.patience, notebook).await;
            let Verdict::Continue = verdict else { return verdict };
        }
    }

    /// Runs [`Filter::request_body`].
    pub async fn request_body(
        &self,
        states: &mut States,
        mut view: View<'_>,
        piece: &mut Option<Bytes>,
        end: bool,
    ) -> Verdict {
        let facts = view.facts;
        for &index in &self.request_body {
            let link = &self.links[index];
            if states.leaves_request_body(index) || !self.acts(index, states, || facts.asked(view.request)) {
                continue;
            }
            let notebook = states.notebook.clone();
            let mut scope = view.scope(states, index, facts);
            let call = link.filter.request_body(&mut scope, piece, end);
            let verdict = link.run("request_body", call, self.patience, notebook).await;
            let Verdict::Continue = verdict else { return link.late("request_body", verdict) };
        }
        Verdict::Continue
    }

    /// Evaluates the conditions up to the first filter that acts on this response, and returns whether there is one.
    /// If not, [`Chain::response`] need not be called.
    pub fn acts_on_response<'a>(&self, states: &mut States, asked: impl Fn() -> Asked<'a>) -> bool {
        states.begin_response();
        self.next(&mut self.response.iter(), states, asked).is_some()
    }

    /// Runs [`Filter::response`], the last filter first. The answer of a filter replaces the response: the filters
    /// outside of it process that answer, and the verdict is the result.
    pub async fn response(&self, states: &mut States, mut view: View<'_>, response: &mut ResponseHeader) -> Verdict {
        states.begin_response();
        let mut body = None;
        let mut order = self.response.iter();
        loop {
            let author = if states.answered.is_some() { Some(Author::Filter) } else { view.facts.author };
            let facts = Facts { status: response.status.as_u16(), author, ..view.facts };
            let asked = || facts.asked(view.request).answered(response);
            let Some((index, link)) = self.next(&mut order, states, asked) else { break };
            if !states.may_act(index) {
                link.filter.stand_down(&mut view.scope(states, index, facts));
                continue;
            }
            let notebook = states.notebook.clone();
            let mut scope = view.scope(states, index, facts);
            let call = link.filter.response(&mut scope, response);
            match link.run("response", call, self.patience, notebook).await {
                Verdict::Continue => {}
                Verdict::Refuse(refused) => return Verdict::Refuse(refused),
                Verdict::Answer(answer) => match answer.header() {
                    Ok(header) => {
                        *response = header;
                        body = Some(answer.body);
                        states.answered = Some(index);
                    }
                    Err(_) => return Verdict::from(&refusal::INTERNAL),
                },
            }
        }
        let Some(body) = body else { return Verdict::Continue };
        let headers = response.headers.iter().map(|(name, value)| (name.clone(), value.clone())).collect();
        Verdict::Answer(Answer { status: response.status, headers, body })
    }

    /// Runs [`Filter::response_body`], the last filter first. If a filter has answered in place of the endpoint, the
    /// filters inside of it do not process the body.
    pub async fn response_body(
        &self,
        states: &mut States,
        mut view: View<'_>,
        piece: &mut Option<Bytes>,
        end: bool,
    ) -> Verdict {
        let facts = view.facts;
        for &index in &self.response_body {
            let link = &self.links[index];
            if states.has_nothing_to_do(index) {
                continue;
            }
            if !self.acts(index, states, || facts.asked(view.request)) {
                continue;
            }
            let notebook = states.notebook.clone();
            let mut scope = view.scope(states, index, facts);
            let call = link.filter.response_body(&mut scope, piece, end);
            let verdict = link.run("response_body", call, self.patience, notebook).await;
            let Verdict::Continue = verdict else { return link.late("response_body", verdict) };
        }
        Verdict::Continue
    }

    /// The time limit of all its filters together in one stage.
    pub fn patience(&self) -> Duration {
        let filters = u32::try_from(self.links.len()).unwrap_or(u32::MAX);
        self.patience.map_or(FAR, |patience| patience.saturating_mul(filters))
    }

    /// Whether a filter processes the request body. Call it after the request stage.
    pub fn sees_request_body(&self, states: &States) -> bool {
        self.request_body.iter().any(|index| states.may_act(*index) && !states.leaves_request_body(*index))
    }

    /// Whether a filter processes the response body. Call it after the response stage.
    pub fn sees_body(&self, states: &States) -> bool {
        self.response_body.iter().any(|index| states.may_act(*index) && !states.has_nothing_to_do(*index))
    }

    /// Whether a filter holds the response until it has seen all of its body.
    pub fn holds_answer(&self, states: &States) -> bool {
        let holds = |index: &usize| states.slots.get(*index).is_some_and(|slot| slot.holds_body);
        self.response_body.iter().any(|index| holds(index) && !states.has_nothing_to_do(*index))
    }

    /// Removes from request trailers the fields that only filters may set, and runs [`Filter::request_trailers`].
    pub fn request_trailers(&self, states: &mut States, view: View<'_>, trailers: &mut HeaderMap) {
        for &index in self.request_trailers.iter().filter(|index| states.may_act(**index)) {
            self.links[index].own.iter().for_each(|name| drop(trailers.remove(name)));
        }
        self.at_once(&self.request_trailers, states, view, |filter, scope| filter.request_trailers(scope, trailers));
    }

    /// Runs [`Filter::response_trailers`], the last filter first.
    pub fn response_trailers(&self, states: &mut States, view: View<'_>, trailers: &mut HeaderMap) {
        self.at_once(&self.response_trailers, states, view, |filter, scope| filter.response_trailers(scope, trailers));
    }

    fn at_once(
        &self,
        order: &[usize],
        states: &mut States,
        mut view: View<'_>,
        mut call: impl FnMut(&dyn Filter, &mut Scope<'_>),
    ) {
        let facts = view.facts;
        for &index in order {
            let link = &self.links[index];
            if self.acts(index, states, || facts.asked(view.request)) {
                link.watched.call(|| call(&*link.filter, &mut view.scope(states, index, facts)));
            }
        }
    }

    /// Runs [`Filter::end`] of each filter with that stage, the last filter first, whatever happened before.
    pub fn end(&self, states: &mut States, mut view: View<'_>, outcome: Outcome) {
        let facts = Facts { status: outcome.status, ..view.facts };
        for &index in &self.end {
            let link = &self.links[index];
            let response = Some(Response { code: outcome.status, headers: None });
            if !self.acts(index, states, || Asked { response, ..facts.asked(view.request) }) {
                continue;
            }
            link.watched.call(|| link.filter.end(&mut view.scope(states, index, facts), outcome));
        }
    }
}

impl ChainedFilter {
    /// Runs one stage of the filter, and records it if a record is kept.
    async fn run(
        &self,
        stage: &'static str,
        call: impl Future<Output = Verdict> + Unpin,
        patience: Option<Duration>,
        notebook: Option<Notebook>,
    ) -> Verdict {
        match notebook {
            None => self.bounded(call, patience).await,
            Some(notebook) => notebook.stage(self.label(), stage, self.bounded(call, patience), told).await,
        }
    }

    /// Runs one call of the filter, and drops it at the time limit.
    async fn bounded(&self, call: impl Future<Output = Verdict> + Unpin, patience: Option<Duration>) -> Verdict {
        // The caller of the chain detects a client that leaves.
        let decided = within(patience.unwrap_or(FAR), NoClient::Within, self.watched.run(call)).await;
        decided.unwrap_or_else(|| {
            tracing::debug!(filter = self.label(), "a filter has not decided in time");
            Verdict::from(&refusal::ROUTE_FILTER_TIMEOUT)
        })
    }

    /// A filter with its `key` and its condition.
    pub(super) fn new(key: &str, filter: Box<dyn Filter>, when: Option<Condition>) -> ChainedFilter {
        let when = when.map(|condition| When { condition, skipped: None });
        let (wants, own) = (filter.stages(), filter.own_headers().into());
        ChainedFilter { watched: Watched::untimed(filter.label().unwrap_or(key)), filter, wants, when, own }
    }

    /// Whether its condition reads the response.
    fn decides_later(&self) -> bool {
        self.when.as_ref().is_some_and(|when| when.condition.reads_response())
    }

    /// The filter at the stage of a header. A condition on the response is not evaluated at the request: the filter is
    /// called there, and undoes what it has prepared if the condition does not hold.
    fn turn(&self, index: usize, stage: Stages) -> Turn {
        let early = self.decides_later() && stage == Stages::REQUEST;
        let when = self.when.as_ref().filter(|_| !early).map(|when| when.condition.clone());
        let prepared = self.decides_later() && stage == Stages::RESPONSE && self.filter.prepares();
        Turn { index, when, called: self.wants.contains(stage), prepared }
    }

    /// Its name in metrics and logs.
    fn label(&self) -> &'static str {
        self.watched.label()
    }

    /// The stages at which the filter is called or its condition is evaluated.
    fn stages(&self) -> Stages {
        let asked = match &self.when {
            None => Stages::NONE,
            Some(_) if self.decides_later() => Stages::RESPONSE,
            Some(_) => Stages::REQUEST,
        };
        let own = if self.own.is_empty() { Stages::NONE } else { Stages::REQUEST_TRAILERS };
        self.wants | asked | own
    }

    /// The verdict of a stage that is too late for an answer.
    fn late(&self, stage: &str, verdict: Verdict) -> Verdict {
        match verdict {
            Verdict::Answer(_) => {
                tracing::error!(filter = self.label(), stage, "a filter can answer at `request` and `response` only");
                Verdict::from(&refusal::INTERNAL)
            }
            verdict => verdict,
        }
    }
}

/// The result of a stage as a word.
fn told(verdict: &Verdict) -> Cow<'static, str> {
    match verdict {
        Verdict::Continue => "continue".into(),
        Verdict::Refuse(refused) => refused.refusal.reason.into(),
        Verdict::Answer(answer) => format!("answer {}", answer.status.as_u16()).into(),
    }
}

impl Turn {
    /// The condition, if it is to be evaluated now.
    fn open(&self, states: &States) -> Option<&Condition> {
        self.when.as_ref().filter(|_| !states.asked.contains(self.index))
    }

    /// Whether the filter is called at this stage; `acts`: its condition holds.
    fn hears(&self, acts: bool) -> bool {
        self.called && (acts || self.prepared)
    }
}

impl States {
    /// Sets the record of the filters' calls.
    pub fn note_in(&mut self, notebook: Notebook) {
        self.notebook = Some(notebook);
    }

    /// Whether this filter acts, if its condition was evaluated.
    fn decided(&self, index: usize) -> Option<bool> {
        self.asked.contains(index).then(|| self.may_act(index))
    }

    /// Starts a response, which replaces the previous one if there was one.
    fn begin_response(&mut self) {
        self.answered = None;
        self.slots.iter_mut().for_each(|slot| (slot.leaves_body, slot.holds_body) = (false, false));
    }

    /// The identity of the client, as determined by the filters.
    pub fn identity(&self) -> Option<&Arc<Identity>> {
        self.identity.as_ref()
    }

    /// Whether this filter does not process the response body: it declined, or a filter outside of it has answered.
    fn has_nothing_to_do(&self, index: usize) -> bool {
        let answered = self.answered.is_some_and(|answered| index >= answered);
        answered || self.slots.get(index).is_some_and(|slot| slot.leaves_body)
    }

    /// Whether the condition of this filter holds or was not evaluated.
    fn may_act(&self, index: usize) -> bool {
        !self.skipped.contains(index)
    }

    /// Whether this filter has declined to process the request body.
    fn leaves_request_body(&self, index: usize) -> bool {
        self.slots.get(index).is_some_and(|slot| slot.leaves_request_body)
    }

    /// Slots are added on demand: an exchange in which no filter runs needs none, and states of another chain cannot
    /// panic.
    fn slot(&mut self, index: usize) -> &mut Slot {
        if index >= self.slots.len() {
            self.slots.resize_with(self.filters.max(index + 1), Slot::default);
        }
        &mut self.slots[index]
    }
}

impl View<'_> {
    fn scope<'s>(&'s mut self, states: &'s mut States, index: usize, facts: Facts<'s>) -> Scope<'s> {
        states.slot(index);
        let States { slots, identity, .. } = states;
        let Slot { state, leaves_request_body, leaves_body, holds_body } = &mut slots[index];
        Scope { facts, request: self.request, state, identity, leaves_request_body, leaves_body, holds_body }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use async_trait::async_trait;
    use futures::FutureExt;
    use http::StatusCode;

    use super::super::Answer;
    use super::*;
    use crate::expression::Moment;

    /// Writes its name into the header or the body at each stage, and stops where the test requires it.
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
        Chain::new(
            witnesses.into_iter().map(|witness| ChainedFilter::new(witness.name, Box::new(witness), None)).collect(),
        )
    }

    /// The same filters; each acts only if its condition holds.
    fn chain_where<const N: usize>(witnesses: [(Witness, &str); N]) -> Chain {
        let link = |(witness, when): (Witness, &str)| {
            let when = Condition::build(when, Moment::Response).unwrap();
            ChainedFilter::new(witness.name, Box::new(witness), Some(when))
        };
        Chain::new(witnesses.into_iter().map(link).collect())
    }

    fn request() -> RequestHeader {
        RequestHeader::build("GET", b"/", None).unwrap()
    }

    fn view(request: &mut RequestHeader) -> View<'_> {
        View { facts: Facts::of("all", "/"), request }
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
    fn a_condition_is_asked_once_and_holds_for_every_stage() {
        let chain = chain_where([
            (witness("a"), r#"!("seen" in request.headers)"#),
            (witness("b"), r#"request.method == "POST""#),
            (witness("c"), r#"!("seen" in request.headers)"#),
        ]);
        let (mut request, mut states) = (request(), chain.states());
        let mut response = ResponseHeader::build(200, None).unwrap();
        let mut piece = None;
        chain.request(&mut states, view(&mut request)).now_or_never().unwrap();
        assert!(request.headers.contains_key("seen"), "the condition of `a` would not hold any more");
        chain.request_body(&mut states, view(&mut request), &mut piece, true).now_or_never().unwrap();
        chain.response(&mut states, view(&mut request), &mut response).now_or_never().unwrap();
        chain.end(&mut states, view(&mut request), OVER);

        assert_eq!(seen(&request.headers, "seen"), ["a"]);
        assert_eq!(piece.as_deref(), Some(b"a".as_slice()));
        assert_eq!(seen(&response.headers, "seen"), ["a"]);
        assert_eq!(seen(&request.headers, "ended"), ["a"]);
    }

    #[test]
    fn a_condition_on_the_response_is_asked_when_there_is_one() {
        let late = || Witness { stages: Stages::RESPONSE | Stages::RESPONSE_BODY | Stages::END, ..witness("a") };
        let on = |code: u16| {
            let chain = chain_where([(late(), "response.code >= 500")]);
            let (mut request, mut states) = (request(), chain.states());
            let mut response = ResponseHeader::build(code, None).unwrap();
            let mut piece = None;
            chain.request(&mut states, view(&mut request)).now_or_never().unwrap();
            chain.response(&mut states, view(&mut request), &mut response).now_or_never().unwrap();
            chain.response_body(&mut states, view(&mut request), &mut piece, true).now_or_never().unwrap();
            chain.end(&mut states, view(&mut request), OVER);
            (response.headers.contains_key("seen"), piece.is_some(), request.headers.contains_key("ended"))
        };
        assert_eq!(on(502), (true, true, true));
        assert_eq!(on(200), (false, false, false));
    }

    #[test]
    fn a_filter_that_only_prepares_hears_at_the_response_that_it_does_not_act() {
        struct Prepared;

        #[async_trait]
        impl Filter for Prepared {
            fn stages(&self) -> Stages {
                Stages::REQUEST | Stages::RESPONSE | Stages::RESPONSE_BODY
            }

            fn prepares(&self) -> bool {
                true
            }

            fn stand_down(&self, scope: &mut Scope<'_>) {
                scope.request.remove_header("ready");
            }

            async fn request(&self, scope: &mut Scope<'_>) -> Verdict {
                let _ = scope.request.insert_header("ready", "yes");
                Verdict::Continue
            }

            async fn response(&self, _: &mut Scope<'_>, response: &mut ResponseHeader) -> Verdict {
                let _ = response.insert_header("seen", "yes");
                Verdict::Continue
            }
        }

        let on = |code: u16| {
            let when = Condition::build("response.code >= 500", Moment::Response).unwrap();
            let chain = Chain::new(vec![ChainedFilter::new("prepared", Box::new(Prepared), Some(when))]);
            let (mut request, mut states) = (request(), chain.states());
            let mut response = ResponseHeader::build(code, None).unwrap();
            chain.request(&mut states, view(&mut request)).now_or_never().unwrap();
            assert!(request.headers.contains_key("ready"), "the condition is not asked yet");
            let facts = Facts { status: code, ..Facts::of("all", "/") };
            assert!(
                chain.acts_on_response(&mut states, || facts.asked(&request).answered(&response)),
                "it hears of it"
            );
            chain.response(&mut states, view(&mut request), &mut response).now_or_never().unwrap();
            let sees = chain.sees_body(&states);
            (request.headers.contains_key("ready"), response.headers.contains_key("seen"), sees)
        };
        assert_eq!(on(502), (true, true, true));
        assert_eq!(on(200), (false, false, false));
    }

    #[test]
    fn a_condition_that_was_not_asked_before_a_refusal_is_asked_behind_it() {
        let refuses = Witness { verdict: || Verdict::from(&refusal::HEADER_METHOD), ..witness("a") };
        let chain =
            chain_where([(refuses, "true"), (witness("b"), r#"request.method == "GET""#), (witness("c"), "false")]);
        let (mut request, mut states) = (request(), chain.states());
        let mut response = ResponseHeader::build(405, None).unwrap();
        chain.request(&mut states, view(&mut request)).now_or_never().unwrap();
        chain.response(&mut states, view(&mut request), &mut response).now_or_never().unwrap();
        chain.end(&mut states, view(&mut request), OVER);
        assert_eq!(seen(&request.headers, "seen"), ["a"]);
        assert_eq!(seen(&response.headers, "seen"), ["nothing", "a"], "`b` acts, and has kept nothing");
        assert_eq!(seen(&request.headers, "ended"), ["b", "a"]);
    }

    #[test]
    fn an_answer_takes_the_place_of_the_response_for_those_outside_of_it() {
        let answer = || Verdict::Answer(Answer { status: StatusCode::OK, headers: Vec::new(), body: "instead".into() });
        let answers = Witness { verdict: answer, ..witness("b") };
        let chain = chain([witness("a"), Witness { stages: Stages::RESPONSE, ..answers }, witness("c")]);
        let (mut request, mut states) = (request(), chain.states());
        let mut response = ResponseHeader::build(500, None).unwrap();
        chain.request(&mut states, view(&mut request)).now_or_never().unwrap();
        let verdict = chain.response(&mut states, view(&mut request), &mut response).now_or_never().unwrap();
        let Verdict::Answer(answer) = verdict else { panic!("{verdict:?}") };
        assert_eq!((answer.status, &answer.body[..]), (StatusCode::OK, &b"instead"[..]));
        assert_eq!(seen(&response.headers, "seen"), ["a"], "`c` has seen the answer that is gone");
        let mut piece = Some(answer.body);
        chain.response_body(&mut states, view(&mut request), &mut piece, true).now_or_never().unwrap();
        assert_eq!(piece.as_deref(), Some(b"insteada".as_slice()));

        // A response behind that is another one.
        let mut refused = ResponseHeader::build(502, None).unwrap();
        chain.response(&mut states, view(&mut request), &mut refused).now_or_never().unwrap();
        assert_eq!(states.answered, Some(1));
    }

    #[test]
    fn an_answer_while_a_body_passes_is_an_error_of_the_filter() {
        let answer = || Verdict::Answer(Answer { status: StatusCode::OK, headers: Vec::new(), body: Bytes::new() });
        let chain = chain([Witness { verdict: answer, ..witness("a") }]);
        let (mut request, mut states) = (request(), chain.states());
        let early = chain.request(&mut states, view(&mut request)).now_or_never().unwrap();
        assert!(matches!(early, Verdict::Answer(_)));
        let late = chain.request_body(&mut states, view(&mut request), &mut None, true).now_or_never().unwrap();
        assert!(matches!(late, Verdict::Refuse(refused) if refused.refusal == &refusal::INTERNAL));
        let late = chain.response_body(&mut states, view(&mut request), &mut None, true).now_or_never().unwrap();
        assert!(matches!(late, Verdict::Refuse(refused) if refused.refusal == &refusal::INTERNAL));
    }

    #[test]
    fn an_empty_chain_wants_nothing_and_allocates_nothing() {
        let chain = Chain::default();
        assert!(!chain.wants(Stages::ALL));
        assert_eq!(chain.states().slots.capacity(), 0);
    }

    #[test]
    fn an_exchange_in_which_no_condition_holds_allocates_nothing() {
        let metrics = Metrics::new(100, Vec::new());
        let chain = chain_where([(witness("a"), "false"), (witness("b"), r#"request.method == "POST""#)]);
        let chain = chain.timed("all", &metrics);
        let (mut request, mut states) = (request(), chain.states());
        let facts = Facts::of("all", "/");
        assert!(!chain.acts_on_request(&mut states, || facts.asked(&request)));
        assert!(!chain.may_act(&states));
        chain.end(&mut states, view(&mut request), OVER);
        assert_eq!(states.slots.capacity(), 0);
    }

    #[test]
    fn skipped_filters_are_counted_once_and_by_name() {
        let metrics = Metrics::new(100, Vec::new());
        let acts = |number: usize| number.is_multiple_of(3);
        // Some filters share a name, and there are more of them than fit into a word.
        let links = (0..100).map(|number| {
            let when = Condition::build(&acts(number).to_string(), Moment::Response).unwrap();
            let name = ["a", "b"][number % 2];
            ChainedFilter::new(name, Box::new(witness(name)), Some(when))
        });
        let chain = Chain::new(links.collect()).timed("all", &metrics);
        for _ in 0..2 {
            let (mut request, mut states) = (request(), chain.states());
            let mut response = ResponseHeader::build(200, None).unwrap();
            chain.request(&mut states, view(&mut request)).now_or_never().unwrap();
            chain.response(&mut states, view(&mut request), &mut response).now_or_never().unwrap();
            chain.end(&mut states, view(&mut request), OVER);
            let called: Vec<&str> =
                (0..100).filter(|number| acts(*number)).map(|number| ["a", "b"][number % 2]).collect();
            assert_eq!(seen(&request.headers, "seen"), called);
            assert!(chain.may_act(&states));
        }
        let counts: HashMap<&str, u64> = chain.conditional().map(|(name, _, skipped)| (name, skipped.get())).collect();
        let skipped = |parity| 2 * (0..100).filter(|number| !acts(*number) && number % 2 == parity).count() as u64;
        assert_eq!(counts, HashMap::from([("a", skipped(0)), ("b", skipped(1))]));
    }

    #[test]
    fn states_of_another_chain_never_panic() {
        let chain = chain([witness("a"), witness("b")]);
        let (mut request, mut response) = (request(), ResponseHeader::build(200, None).unwrap());
        chain.response(&mut States::default(), view(&mut request), &mut response).now_or_never().unwrap();
        assert_eq!(seen(&response.headers, "seen"), ["nothing", "nothing"]);
    }
}
