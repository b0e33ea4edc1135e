//! Endpoints that change while requests are active: no request is dropped, no busy endpoint is forgotten, nothing
//! leaks.

use std::fs;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use forebay::admin::upstreams::UpstreamDetail;
use socket2::{Domain, Socket, Type};

use crate::harness::client::get;
use crate::harness::metrics::Scrape;
use crate::harness::{Origin, Setup, eventually};

const ENDPOINTS: usize = 10_000;
const CHANGES: usize = 8;

/// Replaces a list atomically.
fn list(path: &Path, text: &str) {
    let beside = path.with_extension("new");
    fs::write(&beside, text).and_then(|()| fs::rename(&beside, path)).expect("a file of endpoints");
}

/// A gateway whose endpoints come from this file.
fn listed_in(text: &str, keys: &str) -> (Setup, std::path::PathBuf) {
    let setup = Setup::found("");
    let path = setup.path("endpoints.yaml");
    list(&path, text);
    (setup.upstream(&format!("file: {{ path: \"{}\", refresh: 200ms }}, {keys}", path.display())), path)
}

fn upstream(admin: SocketAddr) -> UpstreamDetail {
    serde_json::from_slice(&get(admin, "/upstreams/app").body).expect("an upstream")
}

/// Port, state and active exchanges of each endpoint in `/upstreams`.
fn states(admin: SocketAddr) -> Vec<(String, String, u32)> {
    let of =
        |one: forebay::admin::upstreams::EndpointDetail| (one.status.address, one.status.state, one.status.inflight);
    upstream(admin).endpoints.into_iter().map(of).collect()
}

#[test]
fn what_an_endpoint_has_is_remembered_when_the_list_changes_and_forgotten_when_it_is_done() {
    let (a, b) = (Origin::scripted(), Origin::named("b"));
    let [to_a, to_b] = [&a, &b].map(|origin| format!("- address: {}\n", origin.address()));
    let (setup, path) = listed_in(&to_a, "load_balancing: { policy: round_robin }");
    let (gateway, mut client, mut connection) = setup.asked(&a);
    let state = |origin: &Origin, state: &str, inflight| (origin.address().to_string(), state.to_owned(), inflight);
    let becomes = |wanted: Vec<_>| {
        eventually("the endpoints", || (states(gateway.admin()) == wanted).then_some(()));
    };
    becomes(vec![state(&a, "unknown", 1)]);
    list(&path, &format!("{to_a}  weight: 3\n{to_b}"));
    becomes(vec![state(&a, "unknown", 1), state(&b, "unknown", 0)]);
    list(&path, &to_b);
    becomes(vec![state(&b, "unknown", 0), state(&a, "draining", 1)]);
    assert_eq!(get(gateway.web(), "/").text(), "b", "it is given nothing new");
    connection.answer("late");
    assert_eq!(client.response().text(), "late");
    becomes(vec![state(&b, "unknown", 0)]);
}

/// An origin at every address of this machine's loopback, and nowhere else.
fn everywhere() -> Origin {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None).expect("a socket");
    let (level, option, device) = (libc::SOL_SOCKET, libc::SO_BINDTODEVICE, b"lo\0");
    // SAFETY: the name has the given length and outlives the call; the descriptor is open.
    let bound =
        unsafe { libc::setsockopt(socket.as_raw_fd(), level, option, device.as_ptr().cast(), device.len() as _) };
    assert_eq!(bound, 0, "to stay on the loopback");
    socket.bind(&SocketAddr::from(([0, 0, 0, 0], 0)).into()).expect("a port");
    socket.listen(1024).expect("to listen");
    Origin::named_on(TcpListener::from(socket), "origin")
}

/// Ten thousand addresses with this port, a tenth of which each change replaces.
fn addresses(port: u16, change: usize) -> String {
    let numbers = (0..ENDPOINTS).map(|number| number + change * ENDPOINTS / 10);
    numbers.map(|number| format!("- address: 127.1.{}.{}:{port}\n", number / 250, 1 + number % 250)).collect()
}

#[test]
fn ten_thousand_endpoints_change_every_second_under_load_and_nobody_notices() {
    let origin = everywhere();
    let port = origin.address().port();
    let (setup, path) = listed_in(&addresses(port, 0), "load_balancing: { policy: least_request }");
    let process = setup.server("threads: 1, keepalive_pool: 32").spawn();
    let (over, served) = (AtomicBool::new(false), AtomicUsize::new(0));
    let mut resident = Vec::new();
    thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while !over.load(Ordering::Relaxed) {
                    // A connection is closed after 10,000 requests.
                    let mut client = process.client();
                    for _ in 0..1_000 {
                        assert_eq!(client.get("/").status, 200);
                        served.fetch_add(1, Ordering::Relaxed);
                    }
                }
            });
        }
        let _over = Over(&over);
        for change in 1..=CHANGES {
            list(&path, &addresses(port, change));
            // This is how often it changes, and not a wait for the gateway.
            thread::sleep(Duration::from_secs(1));
            resident.push(process.resident_bytes());
        }
    });
    let first = format!("127.1.{}.1:{port}", CHANGES * ENDPOINTS / 10 / 250);
    eventually("the last list and nothing else", || {
        let addresses: Vec<String> = states(process.admin()).into_iter().map(|(address, ..)| address).collect();
        (addresses.len() == ENDPOINTS && addresses[0] == first).then_some(())
    });
    assert!(served.load(Ordering::Relaxed) > 100, "there was load");
    let (early, late) = (resident[2], resident[CHANGES - 1]);
    assert!(late < 2 * early, "memory grows: {resident:?}");
    assert_eq!(Scrape::of(process.admin()).sum("forebay_upstream_endpoints"), ENDPOINTS as f64);
}

/// Stops the load on drop, even after a panic.
struct Over<'o>(&'o AtomicBool);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}
