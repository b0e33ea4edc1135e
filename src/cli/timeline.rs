//! `forebay timeline` (`make demo`): one worker, four clients, and what its event loop did, cycle by cycle.
//!
//! A gateway with one worker runs in this process, in front of its own origin. One client reads slowly, one sends
//! half a body and the rest later, one requests a response that the backend delays, and one is fast. Their
//! exchanges are recorded like those of `forebay trace`, and [`steps()`] turns the records into the output: the order
//! of events is not hard-coded.

mod steps;

use std::env;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::thread;
use std::time::Duration;

use clap::Args;
use socket2::{Domain, Socket, Type};

use super::admin::AdminEndpoint;
use super::figures::time;
use super::trace::{Telling, Told, bar_width};
use super::waterfall::{Axis, Paint, bars};
use super::{Failure, colourful, logs, print};
use crate::gateway::{Builder, Gateway};
use crate::origin::Origin;
use crate::recorder::Recorded;
use steps::{Step, steps};

/// Time limit for each step of a client, and for all of them together.
const DEADLINE: Duration = Duration::from_secs(30);

/// Response size for the slow reader: more than the kernel buffers, less than the gateway does.
const ANSWER_BYTES: usize = 4 << 20;
const BODY_BYTES: usize = 8 << 10;

#[derive(Args)]
pub struct Timeline {
    /// When the slow client continues to read
    #[arg(long, value_name = "TIME", default_value = "500ms", value_parser = pause)]
    reader_after: Duration,
    /// When the rest of the half body is sent
    #[arg(long, value_name = "TIME", default_value = "300ms", value_parser = pause)]
    rest_after: Duration,
    /// The delay of the slow backend
    #[arg(long, value_name = "TIME", default_value = "200ms", value_parser = pause)]
    backend_after: Duration,
    /// When the fast client sends its request
    #[arg(long, value_name = "TIME", default_value = "100ms", value_parser = pause)]
    fast_after: Duration,
}

fn pause(text: &str) -> Result<Duration, String> {
    let time = humantime::parse_duration(text).map_err(|error| error.to_string())?;
    if time <= DEADLINE / 3 { Ok(time) } else { Err(format!("at most {}", humantime::format_duration(DEADLINE / 3))) }
}

/// The clients; the path of an exchange identifies its client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Client {
    Slow,
    Half,
    Late,
    Fast,
}

impl Client {
    const ALL: [Client; 4] = [Client::Slow, Client::Half, Client::Late, Client::Fast];

    fn name(self) -> &'static str {
        match self {
            Client::Slow => "slow reader",
            Client::Half => "half a body",
            Client::Late => "late backend",
            Client::Fast => "fast client",
        }
    }

    fn path(self) -> &'static str {
        match self {
            Client::Slow => "/bytes",
            Client::Half => "/echo",
            Client::Late => "/delay",
            Client::Fast => "/headers",
        }
    }

    fn of(recorded: &Recorded) -> Option<Client> {
        Client::ALL.into_iter().find(|client| recorded.path.starts_with(client.path()))
    }
}

/// Runs the scenario and prints the record.
pub fn timeline(builder: Builder, asked: &Timeline) -> Result<(), Failure> {
    if env::var_os("FOREBAY_LOG").is_some() {
        // Otherwise its log would disturb the output.
        logs::start()?;
    }
    let origin = Origin::bind("127.0.0.1:0").and_then(Origin::spawn).map_err(Failure::io("start the test origin"))?;
    let config = builder.parse("timeline", &config(origin.address())).map_err(Failure::Report)?;
    let gateway = builder.build(config).map_err(super::run::failure)?;
    let (web, admin) = addresses(&gateway)?;
    let stop = gateway.handle();
    let runs = thread::Builder::new().name("gateway".to_owned());
    let runs = runs.spawn(move || gateway.run()).map_err(Failure::io("start the gateway"))?;
    let recorded = record(asked, web, admin);
    stop.stop();
    // It has already printed the reason to stderr.
    let _ = runs.join();
    show(&recorded?)
}

/// One worker, with a heartbeat that rarely wakes it, so that its cycles come from the clients.
fn config(origin: SocketAddr) -> String {
    format!(
        "server: {{ threads: 1, shutdown: {{ deadline: 1s }} }}\n\
         listeners: [ {{ name: web, address: '127.0.0.1:0' }} ]\n\
         upstreams: {{ origin: {{ endpoints: [ {{ address: '{origin}' }} ] }} }}\n\
         routes: [ {{ name: all, upstream: origin, buffering: {{ response: {{ memory: 8MiB }} }} }} ]\n\
         admin: {{ address: '127.0.0.1:0' }}\n\
         observability: {{ access_log: {{ path: off }}, event_loop: {{ heartbeat: 1s, stall_threshold: 2s }} }}\n"
    )
}

fn addresses(gateway: &Gateway) -> Result<(SocketAddr, SocketAddr), Failure> {
    let both = gateway.address("web").zip(gateway.admin_address());
    both.ok_or_else(|| Failure::Runtime("the gateway of the timeline has no address".to_owned()))
}

/// Runs the clients and returns their exchanges in order of their start.
fn record(asked: &Timeline, web: SocketAddr, admin: SocketAddr) -> Result<Vec<Recorded>, Failure> {
    let endpoint = AdminEndpoint { address: admin.to_string(), token: None, certificate: None };
    let target = format!("/trace?count={}&for={}s", Client::ALL.len(), DEADLINE.as_secs());
    let mut telling = Telling::begin(endpoint, &target, DEADLINE)?;
    let mut recorded = Vec::new();
    let (mut clients, mut trouble) = (Vec::new(), None);
    loop {
        match telling.next()? {
            // From here on, every exchange is recorded.
            Told::Recording { .. } => {
                for client in Client::ALL {
                    // Connect in this order, so that the kernel reports the connections in this order.
                    let now = (client != Client::Fast).then(|| connect(web, client == Client::Slow));
                    let socket = now.transpose().map_err(Failure::io("connect to the gateway"))?;
                    let play = play(client, asked, web, socket);
                    clients.push(thread::spawn(move || play().map_err(Failure::io("play a client"))));
                }
            }
            Told::Exchange(one) => recorded.push(*one),
            Told::End { .. } => break,
        }
    }
    for client in clients {
        match client.join() {
            Ok(Ok(())) => {}
            Ok(Err(failure)) => trouble = Some(failure),
            Err(_) => trouble = Some(Failure::Runtime("a client of the timeline failed".to_owned())),
        }
    }
    recorded.sort_by(|a, b| a.began_seconds.total_cmp(&b.began_seconds));
    match trouble {
        Some(failure) => Err(failure),
        None if recorded.len() < Client::ALL.len() => {
            Err(Failure::Runtime(format!("{} of {} exchanges were recorded", recorded.len(), Client::ALL.len())))
        }
        None => Ok(recorded),
    }
}

/// What a client does. A client without a connection connects later.
fn play(
    client: Client,
    asked: &Timeline,
    web: SocketAddr,
    socket: Option<TcpStream>,
) -> impl FnOnce() -> io::Result<()> + Send + 'static {
    let Timeline { reader_after, rest_after, backend_after, fast_after } = *asked;
    move || {
        let get = |path: String| format!("GET {path} HTTP/1.1\r\nHost: timeline\r\nConnection: close\r\n\r\n");
        let mut socket = match socket {
            Some(socket) => socket,
            None => {
                thread::sleep(fast_after);
                connect(web, false)?
            }
        };
        match client {
            Client::Slow => {
                socket.write_all(get(format!("/bytes/{ANSWER_BYTES}")).as_bytes())?;
                thread::sleep(reader_after);
            }
            Client::Half => {
                let head = format!(
                    "POST /echo HTTP/1.1\r\nHost: timeline\r\nConnection: close\r\nContent-Length: {BODY_BYTES}\r\n\r\n"
                );
                let body = vec![b'x'; BODY_BYTES];
                socket.write_all(&[head.as_bytes(), &body[..BODY_BYTES / 2]].concat())?;
                thread::sleep(rest_after);
                socket.write_all(&body[BODY_BYTES / 2..])?;
            }
            Client::Late => {
                socket.write_all(get(format!("/delay/{}ms", backend_after.as_millis())).as_bytes())?;
            }
            Client::Fast => socket.write_all(get("/headers".to_owned()).as_bytes())?,
        }
        let mut answer = Vec::new();
        socket.read_to_end(&mut answer)?;
        if answer.starts_with(b"HTTP/1.1 200") {
            return Ok(());
        }
        let line = answer.split(|&byte| byte == b'\r').next().unwrap_or_default();
        Err(io::Error::other(format!("{}: {}", client.name(), String::from_utf8_lossy(line))))
    }
}

/// `narrow`: uses the smallest receive buffer of the kernel, so that unread data stays in the gateway.
fn connect(address: SocketAddr, narrow: bool) -> io::Result<TcpStream> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, None)?;
    if narrow {
        socket.set_recv_buffer_size(1)?;
    }
    socket.connect_timeout(&address.into(), DEADLINE)?;
    socket.set_read_timeout(Some(DEADLINE))?;
    socket.set_write_timeout(Some(DEADLINE))?;
    Ok(socket.into())
}

const INTRODUCTION: &str = "\
One worker and four clients, as the gateway recorded them: its event loop, cycle by cycle. A cycle is what the worker does
between two waits in the kernel (epoll_wait); within a cycle it never waits. Only the clients are scripted, so other
pauses give another order: forebay timeline --help.
";

fn show(recorded: &[Recorded]) -> Result<(), Failure> {
    let paint = Paint(colourful(&io::stdout()));
    let named: Vec<(Client, &Recorded)> = recorded.iter().filter_map(|one| Some((Client::of(one)?, one))).collect();
    let steps = steps(named.iter().map(|&(client, one)| (client.name(), one)));
    print(INTRODUCTION)?;
    print(&format!("{:>10}  {:<12}  {:<9}  {:<27} what happens", "time", "whose", "classic", "phase"))?;
    let mut last: Option<&Step> = None;
    for step in &steps {
        if last.is_none_or(|last| last.cycle != step.cycle) {
            print(&paint.faint(&format!("\n── {} {}", heading(step, last), "─".repeat(40))))?;
        }
        let phase = step.phases.join(", ");
        let first = step.phases.last().map_or("", |phase| phase);
        print(&format!(
            "{:>10}  {:<12}  {}  {} {}",
            time(step.seconds),
            step.whose,
            paint.bold(&format!("{:<9}", step.classic)),
            paint.phase(first, &format!("{phase:<27}")),
            step.what
        ))?;
        last = Some(step);
    }
    let axis = Axis::of(named.iter().map(|(_, one)| *one), bar_width());
    print(&format!(
        "\nThe same on one axis of time, with the cycles of the loop:\n{:12}{}",
        "",
        paint.faint(&axis.scale())
    ))?;
    for (client, one) in named {
        let head = format!("{}: {} {}, {}", client.name(), one.method, one.path, one.status);
        print(&format!("{}\n{}", paint.bold(&head), bars(one, axis, paint).join("\n")))?;
    }
    Ok(())
}

/// The heading of a cycle, printed before the first of its steps.
fn heading(step: &Step, last: Option<&Step>) -> String {
    let Some(cycle) = step.cycle else { return "cycle unknown".to_owned() };
    let before = last.and_then(|last| Some((last.cycle?, last.events?)));
    let mut heading = format!("cycle {cycle}");
    if let (Some((before, events)), Some(now)) = (before, step.events) {
        let came = now.saturating_sub(events);
        let events = if came == 1 { "event" } else { "events" };
        heading += &match cycle.saturating_sub(before) {
            1 => format!(": woken with {came} {events}"),
            cycles => format!(": {cycles} cycles and {came} {events} on"),
        };
    }
    heading
}
