//! A clear-text HTTP/2 backend with trailers and bidirectional streams.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bytes::Bytes;
use forebay::origin::Digest;
use h2::server::SendResponse;
use h2::{RecvStream, SendStream};
use http::request::Parts;
use http::{HeaderMap, HeaderValue, Request, Response};
use serde_json::json;
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::{Builder, Runtime};

use super::lateness::Lateness;
use super::ms;

/// A backend whose response depends on the path:
/// - `/trailers`: a body, then the trailer field `x-trailer`.
/// - `/announced`: the same with an announcement that includes forbidden fields, one of which is sent.
/// - `/announced-with-length`: the same with a Content-Length.
/// - `/hints`: two 103 responses at once, and the final one when the request is complete.
/// - `/request-trailers`: the announced and the received request trailers.
/// - `/echo`: every chunk of the request immediately, then `grpc-status: 0`.
/// - `/refused-once`: the first request is refused as unprocessed.
/// - `/unavailable-once`: the first request gets a header with `grpc-status: 14` only; then as `/echo`.
/// - `/ticks`: a byte every 50 ms, twenty of them, whether or not the request has ended, then `grpc-status: 0`.
/// - `/fields`: the names of the received fields.
/// - `/hung`: no response.
/// - `/large`: 16 MiB.
/// - The gRPC health protocol: the service `well` is serving, `sick` is not, others are unknown.
/// - Others: a report on the request as for `/headers` of the built-in origin, with `content_type` and `authority`.
///
/// A request with `expect` gets a 100 response.
pub struct H2Origin {
    address: SocketAddr,
    seen: Arc<Mutex<Vec<String>>>,
    own: Arc<OwnTime>,
    _runtime: Runtime,
}

/// The time that the backend itself takes: its only thread has something to do, and has not done it.
///
/// The thread parks when all that it has read is processed, and all that the peer's windows and sockets take is
/// written. So no step of an exchange takes longer than the thread takes to wake and then to park again.
#[derive(Default)]
struct OwnTime {
    /// How late the thread wakes.
    waking: Lateness,
    /// How long it is awake.
    working: Lateness,
    /// Since when it is awake.
    awake: Mutex<Option<Instant>>,
}

impl OwnTime {
    fn begin(&self) {
        *self.awake.lock().unwrap() = Some(Instant::now());
    }

    fn end(&self) {
        if let Some(began) = self.awake.lock().unwrap().take() {
            self.working.note(began);
        }
    }

    /// Records how late the thread wakes for a timer, and so for a socket.
    async fn watch(&self) {
        loop {
            let due = Instant::now() + ms(50);
            tokio::time::sleep_until(due.into()).await;
            self.waking.note(due);
        }
    }
}

impl H2Origin {
    /// Listens on a loopback port and serves requests.
    pub fn start() -> H2Origin {
        let own = Arc::<OwnTime>::default();
        let (begins, ends, watches) = (own.clone(), own.clone(), own.clone());
        let mut runtime = Builder::new_multi_thread();
        let runtime = runtime.on_thread_unpark(move || begins.begin()).on_thread_park(move || ends.end());
        let runtime = runtime.worker_threads(1).enable_all().build().expect("a runtime");
        let listener = runtime.block_on(TcpListener::bind("127.0.0.1:0")).expect("a port for the origin");
        let (address, seen) = (listener.local_addr().expect("its address"), Arc::default());
        runtime.spawn(accept(listener, Arc::clone(&seen)));
        runtime.spawn(async move { watches.watch().await });
        H2Origin { address, seen, own, _runtime: runtime }
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The longest time between the arrival of what it waits for and its response to that.
    pub fn late(&self) -> Duration {
        self.own.waking.worst() + self.own.working.worst()
    }

    /// The requested paths, in order.
    pub fn paths(&self) -> Vec<String> {
        self.seen.lock().unwrap().clone()
    }
}

async fn accept(listener: TcpListener, seen: Arc<Mutex<Vec<String>>>) {
    while let Ok((stream, _)) = listener.accept().await {
        tokio::spawn(converse(stream, seen.clone()));
    }
}

async fn converse(stream: TcpStream, seen: Arc<Mutex<Vec<String>>>) {
    let Ok(mut connection) = h2::server::handshake(stream).await else { return };
    while let Some(Ok((request, respond))) = connection.accept().await {
        let path = request.uri().path().to_owned();
        let first = !seen.lock().unwrap().contains(&path);
        seen.lock().unwrap().push(path);
        // A failed stream is up to the gateway; the story checks the effect.
        tokio::spawn(async move { answer(request, respond, first).await.ok() });
    }
}

async fn answer(request: Request<RecvStream>, mut respond: SendResponse<Bytes>, first: bool) -> Result<(), h2::Error> {
    let (head, mut body) = request.into_parts();
    if head.headers.contains_key("expect") {
        respond.send_informational(interim(100).body(()).expect("a response"))?;
    }
    match head.uri.path() {
        "/hints" => {
            for style in ["/a.css", "/b.css"] {
                respond.send_informational(
                    interim(103).header("link", format!("<{style}>")).body(()).expect("a response"),
                )?;
            }
            while next(&mut body).await?.is_some() {}
            respond.send_response(Response::new(()), true).map(drop)
        }
        "/request-trailers" => {
            while next(&mut body).await?.is_some() {}
            let trailers = body.trailers().await?.unwrap_or_default();
            let mut told: Vec<_> =
                trailers.iter().map(|(name, value)| format!("{name}: {}", value.to_str().unwrap_or("?"))).collect();
            told.sort();
            let announced = head.headers.get("trailer").and_then(|names| names.to_str().ok()).unwrap_or("none");
            let mut send = respond.send_response(Response::new(()), false)?;
            send.send_data(format!("announced {announced}; {}", told.join(", ")).into(), true)
        }
        "/trailers" => {
            while next(&mut body).await?.is_some() {}
            let mut send = respond.send_response(Response::new(()), false)?;
            send.send_data("A trailer follows.\n".into(), false)?;
            send.send_trailers(trailer("x-trailer", "the end"))
        }
        "/announced" | "/announced-with-length" => {
            while next(&mut body).await?.is_some() {}
            let mut header =
                Response::builder().header("trailer", "X-Trailer, Content-Length").header("trailer", "Set-Cookie");
            if head.uri.path() == "/announced-with-length" {
                header = header.header("content-length", "4");
            }
            let end = head.method == http::Method::HEAD;
            let mut send = respond.send_response(header.body(()).expect("a response"), end)?;
            if end {
                return Ok(());
            }
            send.send_data("body".into(), false)?;
            let mut trailers = trailer("x-trailer", "the end");
            trailers.extend(trailer("set-cookie", "a=b"));
            send.send_trailers(trailers)
        }
        "/hung" => std::future::pending().await,
        "/large" => {
            let mut send = respond.send_response(Response::new(()), false)?;
            send.send_data(vec![b'x'; 16 << 20].into(), true)
        }
        "/refused-once" if first => {
            respond.send_reset(h2::Reason::REFUSED_STREAM);
            Ok(())
        }
        "/unavailable-once" if first => {
            let unavailable =
                Response::builder().header("content-type", "application/grpc").header("grpc-status", "14");
            respond.send_response(unavailable.body(()).expect("a response"), true).map(drop)
        }
        "/echo" | "/unavailable-once" => {
            let mut send = respond.send_response(Response::new(()), false)?;
            while let Some(piece) = next(&mut body).await? {
                send.send_data(piece, false)?;
            }
            send.send_trailers(trailer("grpc-status", "0"))
        }
        "/fields" => {
            let mut names: Vec<_> = head.headers.keys().map(http::HeaderName::as_str).collect();
            names.sort_unstable();
            let mut send = respond.send_response(Response::new(()), false)?;
            send.send_data(names.join(" ").into(), true)
        }
        "/ticks" => {
            let mut send = respond.send_response(Response::new(()), false)?;
            for _ in 0..20 {
                tokio::time::sleep(ms(50)).await;
                send.send_data(".".into(), false)?;
            }
            send.send_trailers(trailer("grpc-status", "0"))
        }
        "/grpc.health.v1.Health/Check" => {
            let mut question = Vec::new();
            while let Some(piece) = next(&mut body).await? {
                question.extend_from_slice(&piece);
            }
            health(&question, respond)
        }
        _ => told(&head, &mut body, respond).await,
    }
}

fn health(question: &[u8], mut respond: SendResponse<Bytes>) -> Result<(), h2::Error> {
    let status = match question {
        b"\0\0\0\0\x06\x0a\x04well" => 1,
        b"\0\0\0\0\x06\x0a\x04sick" => 2,
        _ => {
            let mut unknown = Response::new(());
            unknown.headers_mut().extend(trailer("grpc-status", "5"));
            return respond.send_response(unknown, true).map(drop);
        }
    };
    let mut send = respond.send_response(Response::new(()), false)?;
    send.send_data(Bytes::copy_from_slice(&[0, 0, 0, 0, 2, 8, status]), false)?;
    send.send_trailers(trailer("grpc-status", "0"))
}

async fn told(head: &Parts, body: &mut RecvStream, mut respond: SendResponse<Bytes>) -> Result<(), h2::Error> {
    let mut digest = Digest::default();
    while let Some(piece) = next(body).await? {
        digest.add(&piece);
    }
    let value = |name| head.headers.get(name).and_then(|value| value.to_str().ok());
    let seen = json!({
        "authority": head.uri.authority().map(http::uri::Authority::as_str),
        "body_bytes": digest.length(),
        "body_sha256": digest.sha256(),
        "te": value("te"),
        "content_type": value("content-type"),
        "body_framing": value("content-length").map_or("none".to_owned(), |length| format!("content-length: {length}")),
    });
    let mut send: SendStream<Bytes> = respond.send_response(Response::new(()), false)?;
    send.send_data(seen.to_string().into(), true)
}

async fn next(body: &mut RecvStream) -> Result<Option<Bytes>, h2::Error> {
    let Some(piece) = body.data().await.transpose()? else { return Ok(None) };
    body.flow_control().release_capacity(piece.len())?;
    Ok(Some(piece))
}

fn interim(status: u16) -> http::response::Builder {
    Response::builder().status(status)
}

fn trailer(name: &'static str, value: &'static str) -> HeaderMap {
    HeaderMap::from_iter([(name.parse().expect("a name"), HeaderValue::from_static(value))])
}
