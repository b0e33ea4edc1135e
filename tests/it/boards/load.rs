//! A gateway under a mixed load, scraped by a real Prometheus, so that every panel has data.

use std::path::Path;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use super::board::BOARDS;
use super::{committed, expressions, panels, query, record};
use forebay::origin::Running;

use crate::calls::Ask;
use crate::harness::client::{H2Client, get, request};
use crate::harness::metrics::Prometheus;
use crate::harness::origin::{Closed, built_in};
use crate::harness::secure::Authority;
use crate::harness::tls::{Tls, pair};
use crate::harness::{Client, DEADLINE, Gateway, Setup, ms};

/// The interval of rates: all of the load, which is short.
const WINDOW: &str = "20s";

/// Repeats `load` until `over` is set.
fn repeat(over: &AtomicBool, mut load: impl FnMut()) {
    while !over.load(Ordering::Relaxed) {
        load();
    }
}

/// Ends the load when it is dropped, even after a panic.
struct Over<'o>(&'o AtomicBool);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// A gateway with all kinds of problems on both sides.
fn troubled() -> (Gateway, impl Drop) {
    let (origin, closed) = (built_in(), Closed::refusing());
    let certificate = pair(&authority().issue(&["a.test"]));
    let certificates = format!("{{ {certificate} }}, {{ acme: away, names: [c.test] }}");
    let secure = format!("{{ name: secure, address: \"127.0.0.1:0\", tls: {{ certificates: [ {certificates} ] }} }}");
    // It accepts everything and discards it, unlike the collector of stories.
    let tracing = format!("tracing: {{ endpoint: \"http://{}/status/200\", sample: 50% }}", origin.address());
    let setup = Setup::before_all(&[origin.address(), closed.address()]);
    let (spool, store, users) = (setup.spool_dir(), setup.path("store"), setup.path("users"));
    std::fs::write(&users, "ada:$2b$04$NSVZohxgRPqCbGvPPBsZ2eTV7ov/7NXV8xzCnRBdxJMN.OtQAfoCC\n").expect("a file");
    let away = format!(
        "acme: {{ away: {{ directory: \"https://{}/\", store: \"{}\", retry: {{ first: 1s, max: 1s }} }} }}",
        closed.address(),
        store.display()
    );
    let setup = setup
        .more(&away)
        .server(&format!("threads: 2, spool_dir: \"{}\"", spool.display()))
        .listener("protocols: [http1, h2c]")
        .also_listener(&secure)
        .also_listener("{ name: passed, address: \"127.0.0.1:0\", tcp: { upstream: copies } }")
        .upstream("limits: { requests: 1 }")
        .observability(&tracing)
        .filters("{ request_id: {} }, { access: { deny: ['::1'] }, when: 'request.method == \"DELETE\"' }")
        .filter::<Ask>()
        .also_route("{ name: files, match: { path: { prefix: /bytes } }, filters: [ ask: { upstream: copies, path: /status/200 } ], upstream: app }")
        .also_route(&guarded(&users))
        .also_route("{ name: uploads, match: { path: { prefix: /echo } }, upstream: app }")
        .also_route("{ name: checked, match: { path: { prefix: /delay } }, upstream: checked }")
        .more("resources: { memory: 4MiB, disk: 64MiB }")
        .also_upstream("checked", &checked(&origin, &closed))
        .also_at("copies", origin.address())
        .route("mirror: { upstream: copies, percent: 20% }");
    (setup.start(), Both(origin, closed))
}

/// A route whose clients send a password, and which changes bodies in every way.
fn guarded(users: &Path) -> String {
    let users = users.display();
    let filters = format!(
        "error_page: {{ pages: [ {{ text: wrong }} ] }}, basic_auth: {{ users: {{ path: \"{users}\" }} }}, \
         compress: {{ min_size: 0B }}, body: {{ response: {{ replace: [ {{ text: a, with: b }} ] }} }}, decompress: {{}}"
    );
    format!("{{ name: guarded, match: {{ path: {{ prefix: /guarded }} }}, filters: [ {filters} ], upstream: app }}")
}

/// An upstream with health checks, one healthy endpoint and one that is not.
fn checked(well: &Running, sick: &Closed) -> String {
    let endpoints =
        format!("endpoints: [ {{ address: \"{}\" }}, {{ address: \"{}\" }} ]", well.address(), sick.address());
    format!("{endpoints}, health_check: {{ http: {{ path: /status/204 }}, interval: 100ms }}")
}

/// Keeps both as long as it lives.
struct Both<A, B>(#[allow(dead_code, reason = "kept, not read")] A, #[allow(dead_code, reason = "kept, not read")] B);

impl<A, B> Drop for Both<A, B> {
    fn drop(&mut self) {}
}

/// A fast client, whose requests succeed, fail or are refused.
fn fast(gateway: &Gateway) {
    for path in
        ["/bytes/1KiB", "/delay/5ms", "/status/204", "/status/302", "/status/404", "/status/503", "/fault/reset"]
    {
        get(gateway.web(), path);
    }
    Client::connect(gateway.web()).ask("GET", "/", "Host: twice\r\n", "");
    // A wrong password is hashed each time.
    Client::connect(gateway.web()).ask("GET", "/guarded", "Authorization: Basic YWRhOndyb25n\r\n", "");
}

/// A client that sends half of its body at once, and the rest later.
fn slow_to_send(gateway: &Gateway) {
    let mut client = gateway.client();
    let upload = request("POST", "/echo", "", vec![b'x'; 300_000]);
    let (first, rest) = upload.split_at(200_000);
    client.send(first);
    client.dawdle(ms(50));
    client.send(rest);
    client.response();
}

/// A client that reads its response late.
fn slow_to_take(gateway: &Gateway) {
    let mut client = Client::slow(gateway.web());
    client.send(request("GET", "/bytes/2MiB", "", ""));
    client.dawdle(ms(200));
    client.response();
}

/// A client of a TCP listener, whose bytes are passed on.
fn passed(gateway: &Gateway) {
    get(gateway.address("passed"), "/bytes/1KiB");
}

/// A client that speaks TLS, and one that does not trust the certificate.
fn secure(gateway: &Gateway) {
    let client = Tls::to(gateway.address("secure"), authority(), "a.test");
    let (_, first) = client.get("/bytes/1KiB").expect("an answer");
    client.resuming(first.session()).get("/bytes/1KiB").expect("an answer");
    assert!(Tls::to(gateway.address("secure"), authority(), "b.test").connect().is_err());
}

/// The trusted certificates.
fn authority() -> &'static Authority {
    static AUTHORITY: OnceLock<Authority> = OnceLock::new();
    AUTHORITY.get_or_init(Authority::new)
}

/// A client that speaks HTTP/2.
fn h2(gateway: &Gateway) {
    H2Client::connect(gateway.web()).get("/bytes/1KiB");
}

#[test]
fn every_panel_of_every_board_shows_something_of_a_gateway_under_load() {
    let (gateway, _behind) = troubled();
    let prometheus = Prometheus::scraping(gateway.admin());
    let over = AtomicBool::new(false);
    let empty = std::thread::scope(|scope| {
        for client in [fast, slow_to_send, slow_to_take, h2, secure, passed] {
            let (gateway, over) = (&gateway, &over);
            scope.spawn(move || repeat(over, || client(gateway)));
        }
        let _end = Over(&over);
        let empty = unanswered(&prometheus);
        if let Some(folder) = std::env::var_os("BOARD_DATA") {
            record::record(&prometheus, Path::new(&folder));
        }
        empty
    });
    assert!(empty.is_empty(), "Prometheus knows nothing of:\n{}", empty.join("\n"));
}

/// The queries of all boards that have no result at the deadline.
fn unanswered(prometheus: &Prometheus) -> Vec<String> {
    let boards = BOARDS.map(|(file, _)| (file, committed(file)));
    let mut left: Vec<(String, String)> = boards
        .iter()
        .flat_map(|(file, board)| panels(board).map(move |panel| (file, panel)))
        .flat_map(|(file, (title, panel))| {
            expressions(panel).map(move |expr| (format!("{file}, {title}"), query::filled(expr, WINDOW)))
        })
        .collect();
    let started = Instant::now();
    while !left.is_empty() && started.elapsed() < DEADLINE {
        left.retain(|(_, expr)| {
            !prometheus.answer(expr).is_some_and(|values| values.iter().any(|value| value.is_finite()))
        });
        std::thread::park_timeout(ms(100));
    }
    left.into_iter().map(|(panel, expr)| format!("{panel}: {expr}")).collect()
}
