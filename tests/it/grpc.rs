//! gRPC by a real library at both ends, tonic: every kind of call, errors, cancellation, deadlines and refusals, over
//! h2c and TLS.

use std::convert::Infallible;
use std::fs;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::task::{Context, Poll};
use std::time::Duration;

use futures::future::pending;
use futures::stream::{self, Stream, StreamExt};
use http::uri::PathAndQuery;
use tokio::runtime::{Builder, Runtime};
use tonic::codegen::{BoxFuture, Service};
use tonic::metadata::{AsciiMetadataKey, MetadataMap};
use tonic::transport::server::TcpIncoming;
use tonic::transport::{Channel, Endpoint, Identity, Server, ServerTlsConfig};
use tonic::{Code, Request, Response, Status, Streaming};
use tonic_prost::ProstCodec;

use crate::harness::gateway::Watched;
use crate::harness::secure::Authority;
use crate::harness::{DEADLINE, Gateway, H2Client, Setup};

#[derive(Clone, PartialEq, prost::Message)]
struct Word {
    #[prost(string, tag = "1")]
    text: String,
}

fn word(text: &str) -> Word {
    Word { text: text.to_owned() }
}

type Words = Pin<Box<dyn Stream<Item = Result<Word, Status>> + Send>>;

/// The service, as `protoc` would have it made: `Say` one word, `Repeat` it, `Join` several, `Echo` each.
#[derive(Clone)]
struct Dictionary {
    cancelled: Sender<String>,
}

impl tonic::server::NamedService for Dictionary {
    const NAME: &'static str = "test.Dictionary";
}

/// Tells that a call was given up, unless it came to its end.
struct Unfinished {
    name: &'static str,
    cancelled: Sender<String>,
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        let _ = self.cancelled.send(self.name.to_owned());
    }
}

impl Dictionary {
    fn unfinished(&self, name: &'static str) -> Unfinished {
        Unfinished { name, cancelled: self.cancelled.clone() }
    }
}

impl tonic::server::UnaryService<Word> for Dictionary {
    type Response = Word;
    type Future = BoxFuture<Response<Word>, Status>;

    fn call(&mut self, request: Request<Word>) -> Self::Future {
        let this = self.clone();
        Box::pin(async move {
            match &*request.get_ref().text {
                "unknown" => {
                    let mut more = MetadataMap::new();
                    more.insert("x-why", "no such word".parse().expect("a value"));
                    Err(Status::with_metadata(Code::NotFound, "unknown word", more))
                }
                "never" => {
                    let _unfinished = this.unfinished("say");
                    pending().await
                }
                text => Ok(Response::new(word(text))),
            }
        })
    }
}

impl tonic::server::ServerStreamingService<Word> for Dictionary {
    type Response = Word;
    type ResponseStream = Words;
    type Future = BoxFuture<Response<Words>, Status>;

    fn call(&mut self, request: Request<Word>) -> Self::Future {
        let (this, word) = (self.clone(), request.into_inner());
        Box::pin(async move {
            if word.text == "forever" {
                let first = stream::iter([Ok(word)]);
                let unfinished = this.unfinished("repeat");
                let rest = stream::once(async move {
                    let _unfinished = unfinished;
                    pending::<Result<Word, Status>>().await
                });
                return Ok(Response::new(Box::pin(first.chain(rest)) as Words));
            }
            let three = [Ok(word.clone()), Ok(word.clone()), Ok(word), Err(Status::out_of_range("three is enough"))];
            Ok(Response::new(Box::pin(stream::iter(three)) as Words))
        })
    }
}

impl tonic::server::ClientStreamingService<Word> for Dictionary {
    type Response = Word;
    type Future = BoxFuture<Response<Word>, Status>;

    fn call(&mut self, request: Request<Streaming<Word>>) -> Self::Future {
        Box::pin(async move {
            let (mut words, mut all) = (request.into_inner(), String::new());
            while let Some(word) = words.message().await? {
                all.push_str(&word.text);
            }
            Ok(Response::new(word(&all)))
        })
    }
}

impl tonic::server::StreamingService<Word> for Dictionary {
    type Response = Word;
    type ResponseStream = Words;
    type Future = BoxFuture<Response<Words>, Status>;

    fn call(&mut self, request: Request<Streaming<Word>>) -> Self::Future {
        Box::pin(async move { Ok(Response::new(Box::pin(request.into_inner()) as Words)) })
    }
}

impl Service<http::Request<tonic::body::Body>> for Dictionary {
    type Response = http::Response<tonic::body::Body>;
    type Error = Infallible;
    type Future = BoxFuture<Self::Response, Self::Error>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<tonic::body::Body>) -> Self::Future {
        let this = self.clone();
        Box::pin(async move {
            let mut grpc = tonic::server::Grpc::new(ProstCodec::<Word, Word>::default());
            Ok(match request.uri().path() {
                "/test.Dictionary/Say" => grpc.unary(this, request).await,
                "/test.Dictionary/Repeat" => grpc.server_streaming(this, request).await,
                "/test.Dictionary/Join" => grpc.client_streaming(this, request).await,
                _ => grpc.streaming(this, request).await,
            })
        })
    }
}

/// A server, a gateway before it and a client, on a runtime of their own.
struct Call {
    runtime: Runtime,
    client: tonic::client::Grpc<Channel>,
    cancelled: Receiver<String>,
    gateway: Gateway,
}

impl Call {
    /// With h2c between all of them.
    fn clear() -> Call {
        Call::with(Server::builder(), |address| Setup::before_all(&[address]).upstream("protocol: h2c"))
    }

    /// With TLS to the server.
    fn secure() -> Call {
        let authority = Authority::new();
        let identity = authority.issue(&["127.0.0.1"]);
        let [certificate, key] = [&identity.certificate, &identity.key].map(|file| fs::read(file).expect("a file"));
        let tls = ServerTlsConfig::new().identity(Identity::from_pem(certificate, key));
        let keys = format!("protocol: h2, tls: {{ ca: \"{}\" }}", authority.file().display());
        let server = Server::builder().tls_config(tls).expect("TLS");
        Call::with(server, |address| Setup::before_all(&[address]).upstream(&keys))
    }

    fn with(mut server: Server, setup: impl FnOnce(SocketAddr) -> Setup) -> Call {
        let runtime = Builder::new_multi_thread().worker_threads(1).enable_all().build().expect("a runtime");
        let (sender, cancelled) = channel();
        let _inside = runtime.enter();
        let incoming = TcpIncoming::bind(SocketAddr::from(([127, 0, 0, 1], 0))).expect("a port for the server");
        let address = incoming.local_addr().expect("its address");
        runtime.spawn(server.add_service(Dictionary { cancelled: sender }).serve_with_incoming(incoming));
        let gateway = setup(address).listener("protocols: [h2c]").start();
        let url = format!("http://{}", gateway.web());
        let channel = Endpoint::from_shared(url).expect("a URL").connect_lazy();
        drop(_inside);
        Call { runtime, client: tonic::client::Grpc::new(channel), cancelled, gateway }
    }

    /// Takes a step, which ends at the deadline of stories.
    fn step<T>(&self, step: impl Future<Output = T>) -> T {
        self.runtime.block_on(async { tokio::time::timeout(DEADLINE, step).await.expect("a step of the story") })
    }

    fn ready(&self) -> tonic::client::Grpc<Channel> {
        let mut client = self.client.clone();
        self.step(client.ready()).expect("a connection to the gateway");
        client
    }

    fn say(&self, request: Request<Word>) -> Result<String, Status> {
        let mut client = self.ready();
        let said = self.step(client.unary(request, path("Say"), ProstCodec::<Word, Word>::default()));
        said.map(|said| said.into_inner().text)
    }

    fn repeat(&self, text: &str) -> Streaming<Word> {
        let mut client = self.ready();
        let request = Request::new(word(text));
        let repeated = client.server_streaming(request, path("Repeat"), ProstCodec::<Word, Word>::default());
        self.step(repeated).expect("a stream").into_inner()
    }

    /// Waits for the server to hear that this call is given up.
    fn hears_of(&self, name: &str) {
        assert_eq!(self.cancelled.recv_timeout(DEADLINE).expect("the server to hear of it"), name);
    }
}

/// One way to be refused: what differs in the gateway, what is called, and what the client and the log are told.
pub struct Refusing {
    /// The reason in the log; empty for an answer of the filter `respond`.
    pub reason: &'static str,
    /// The status in the log.
    pub http_status: u16,
    /// The status of gRPC.
    pub code: u8,
    /// What `Say` is called with.
    pub word: &'static str,
    /// The last of so many calls is refused.
    pub calls: usize,
    /// How many fields of metadata the call has.
    pub fields: u32,
    setup: fn(Setup) -> Setup,
}

impl Refusing {
    const fn new(reason: &'static str, http_status: u16, code: u8, setup: fn(Setup) -> Setup) -> Refusing {
        Refusing { reason, http_status, code, word: "one", calls: 1, fields: 0, setup }
    }

    /// The setup with what makes it refuse.
    pub fn setup(&self, setup: Setup) -> Setup {
        (self.setup)(setup)
    }

    /// How the message to the client begins.
    pub fn message(&self) -> &str {
        if self.reason.is_empty() { "Back in two minutes." } else { self.reason }
    }

    /// Finds it in the log.
    #[track_caller]
    pub fn is_logged(&self, gateway: &Gateway) {
        let line = gateway.log_lines(self.calls).remove(self.calls - 1);
        let found = (line.number("status"), line.number("grpc_status"));
        assert_eq!(found, (f64::from(self.http_status), f64::from(self.code)), "{line:?}");
        assert_eq!(line.reason(), self.reason);
    }
}

/// Each kind of refusal that needs no more than one client to come about.
pub const REFUSALS: &[Refusing] = &[
    Refusing::new("route.no_match", 404, 12, |setup| setup.route("match: { path: { prefix: /elsewhere } }")),
    Refusing::new("route.access", 403, 7, |setup| setup.filters("access: { deny: [127.0.0.0/8] }")),
    Refusing::new("", 401, 16, |setup| setup.filters("respond: { status: 401, body: Back in two minutes. }")),
    Refusing::new("", 503, 14, |setup| setup.filters("respond: { status: 503, body: Back in two minutes. }")),
    Refusing {
        calls: 2,
        ..Refusing::new("route.rate_limit", 429, 8, |setup| setup.filters("rate_limit: { rate: 1/m }"))
    },
    Refusing {
        fields: 40,
        ..Refusing::new("header.too_many", 431, 8, |setup| setup.listener("limits: { headers: 30 }"))
    },
    Refusing { word: "never", ..Refusing::new("wait.deadline", 504, 4, |setup| setup.route("deadline: 300ms")) },
    Refusing {
        word: "never",
        ..Refusing::new("wait.timeout", 504, 4, |setup| setup.upstream("timeouts: { wait: 300ms }"))
    },
];

fn path(method: &str) -> PathAndQuery {
    format!("/test.Dictionary/{method}").parse().expect("a path")
}

/// Every kind of call, and how each ends.
fn every_kind_of_call_passes(call: &Call) {
    assert_eq!(call.say(Request::new(word("one"))).expect("an answer"), "one");

    let mut three = call.repeat("two");
    for _ in 0..3 {
        assert_eq!(call.step(three.message()).expect("a message"), Some(word("two")));
    }
    assert_eq!(call.step(three.message()).expect_err("the status in the trailers").code(), Code::OutOfRange);

    let mut client = call.ready();
    let words = Request::new(stream::iter(["a", "b", "c"].map(word)));
    let joined = call.step(client.client_streaming(words, path("Join"), ProstCodec::<Word, Word>::default()));
    assert_eq!(joined.expect("an answer").into_inner(), word("abc"));

    let mut client = call.ready();
    let (said, heard) = tokio::sync::mpsc::unbounded_channel::<Word>();
    let heard = stream::unfold(heard, |mut heard| async move { Some((heard.recv().await?, heard)) });
    let echoes = client.streaming(Request::new(heard), path("Echo"), ProstCodec::<Word, Word>::default());
    said.send(word("first")).expect("the stream");
    let mut echoes = call.step(echoes).expect("a stream").into_inner();
    for text in ["first", "second", "third"] {
        assert_eq!(call.step(echoes.message()).expect("a message"), Some(word(text)), "before the next is said");
        let next = if text == "first" { "second" } else { "third" };
        let _ = said.send(word(next));
    }
    drop(said);
    assert_eq!(call.step(echoes.message()).expect("a message"), Some(word("third")));
    assert_eq!(call.step(echoes.message()).expect("the end"), None);
}

#[test]
fn every_kind_of_call_passes_in_clear_text() {
    every_kind_of_call_passes(&Call::clear());
}

#[test]
fn every_kind_of_call_passes_over_tls() {
    every_kind_of_call_passes(&Call::secure());
}

#[test]
fn an_error_arrives_with_all_that_is_said_of_it() {
    for call in [Call::clear(), Call::secure()] {
        let error = call.say(Request::new(word("unknown"))).expect_err("an error");
        assert_eq!((error.code(), error.message()), (Code::NotFound, "unknown word"));
        assert_eq!(error.metadata().get("x-why").map(|why| why.as_bytes()), Some(&b"no such word"[..]));
    }
}

#[test]
fn the_server_hears_that_a_call_is_given_up() {
    for call in [Call::clear(), Call::secure()] {
        let mut forever = call.repeat("forever");
        assert_eq!(call.step(forever.message()).expect("a message"), Some(word("forever")));
        drop(forever);
        call.hears_of("repeat");
        call.gateway.wait_metric("forebay_phase_active", |count| count == 0.0);
    }
}

#[test]
fn a_deadline_ends_a_call_at_both_ends() {
    let call = Call::clear();
    let mut request = Request::new(word("never"));
    request.set_timeout(Duration::from_millis(300));
    let error = call.say(request).expect_err("its time is over");
    // The client's own clock is Cancelled, the gateway's answer DeadlineExceeded.
    assert!(matches!(error.code(), Code::Cancelled | Code::DeadlineExceeded), "{error}");
    call.hears_of("say");
    assert_eq!(call.say(Request::new(word("next"))).expect("an answer"), "next");
}

#[test]
fn what_is_refused_has_the_status_of_its_reason() {
    for refusing in REFUSALS {
        let call = Call::with(Server::builder(), |address| {
            refusing.setup(Setup::before_all(&[address]).upstream("protocol: h2c"))
        });
        let said = || {
            let mut request = Request::new(word(refusing.word));
            for n in 0..refusing.fields {
                let name: AsciiMetadataKey = format!("x-{n}").parse().expect("a name");
                request.metadata_mut().insert(name, "1".parse().expect("a value"));
            }
            call.say(request)
        };
        (1..refusing.calls).for_each(|_| assert!(said().is_ok(), "{}", refusing.reason));
        let error = said().expect_err("a refusal");
        assert_eq!(error.code(), Code::from(i32::from(refusing.code)), "{}: {error}", refusing.reason);
        assert!(error.message().starts_with(refusing.message()), "{}: {error}", refusing.reason);
        if refusing.http_status == 429 {
            assert!(error.metadata().contains_key("retry-after"), "{error}");
        }
        refusing.is_logged(&call.gateway);
    }
}

#[test]
fn a_refusal_is_one_frame() {
    let gateway = Setup::before_all(&["127.0.0.1:1"])
        .listener("protocols: [h2c]")
        .filters("access: { deny: [127.0.0.0/8] }")
        .start();
    let client = H2Client::connect(gateway.web());
    let call = |kind: &str| {
        let request = http::Request::post("http://test/test.Dictionary/Say");
        request.header("content-type", kind).header("te", "trailers").body(()).expect("a request")
    };
    let (answer, _request) = client.begin(call("application/grpc+proto"), false);
    let (head, body) = client.step(answer).expect("an answer").into_parts();
    assert_eq!((head.status.as_u16(), body.is_end_stream()), (200, true), "END_STREAM is on the header");
    assert_eq!(head.headers["content-type"], "application/grpc");
    assert_eq!(head.headers["grpc-status"], "7");
    assert!(!head.headers.contains_key("content-length"), "{head:?}");

    let page = client.ask(call("text/plain"), b"").expect("an answer");
    assert_eq!((page.status, page.headers.contains_key("grpc-status")), (403, false), "as over HTTP");
}
