//! Reserves: clients cannot use up open files, memory and disk, and each client address has a limited share.
//!
//! All of 127.0.0.0/8 is local, so clients can use as many addresses as a story needs.

use std::net::Ipv4Addr;
use std::thread;

use forebay::origin::Running;

use crate::harness::client::get;
use crate::harness::gateway::Watched;
use crate::harness::origin::built_in;
use crate::harness::{Ask, Client, Gateway, H2Client, Origin, Process, Protocol, Setup, eventually, may_open_files};

/// The limit on open files of the program. It needs about 50 itself, which leaves about 230 for client connections.
const OPEN_FILES: usize = 512;

/// The address of the client with this number.
fn stranger(number: usize) -> Ipv4Addr {
    Ipv4Addr::from(u32::from(Ipv4Addr::new(127, 1, 0, 0)) + u32::try_from(number).expect("few of them"))
}

/// Opens this many silent connections from one address, even if the gateway closes them.
fn crowd(process: &Process, from: Ipv4Addr, size: usize) -> Vec<Client> {
    (0..size).map(|_| Client::from(from, process.web())).collect()
}

fn open(process: &Process) -> f64 {
    process.metric("forebay_client_connections{listener=\"web\"}")
}

#[test]
fn idle_clients_of_one_address_leave_room_for_those_of_others() {
    const CROWD: usize = 1_200;
    may_open_files(CROWD + 500);
    let origin = Origin::named("origin");
    let process = Setup::before(&origin).listener("protocols: [http1, h2c]").open_files(OPEN_FILES).spawn();
    let most = process.metric("forebay_client_connections_limit{listener=\"web\"}");
    assert!(most > 100.0 && most < OPEN_FILES as f64 / 2.0, "{most}");
    process.says("the open files allow fewer connections than limits.connections");

    let begun = std::time::Instant::now();
    let crowd = crowd(&process, stranger(0), CROWD);
    let of_one_client = (most * 0.75).ceil();
    process.wait_metric("forebay_refusals_total{reason=\"accept.connections_per_ip\"}", |refused| {
        refused >= CROWD as f64 - of_one_client
    });
    let held = open(&process);
    assert!(held <= of_one_client, "{held} of {most}");
    println!("{CROWD} idle clients came in {:?}; {held} of them may stay", begun.elapsed());
    for number in 1..=20 {
        assert_eq!(Client::from(stranger(number), process.web()).get("/").text(), "origin");
        assert_eq!(H2Client::from(stranger(number), process.web()).get("/").status, 200);
    }
    assert_eq!(get(process.admin(), "/readyz").status, 200);
    assert_eq!(process.metric("forebay_accept_pauses_total"), 0.0, "there were open files left");

    drop(crowd);
    process.wait_metric("forebay_client_connections{listener=\"web\"}", |open| open == 0.0);
    assert_eq!(
        Client::from(stranger(0), process.web()).get("/").text(),
        "origin",
        "places that are left are given away"
    );
}

#[test]
fn clients_of_many_addresses_leave_open_files_for_backends_and_the_admin_endpoint() {
    may_open_files(2_000);
    let origin = built_in();
    let process = Setup::before_all(&[origin.address()]).open_files(OPEN_FILES).spawn();
    let most = process.metric("forebay_client_connections_limit{listener=\"web\"}");
    let mut kept: Vec<Client> =
        (0..most as usize).map(|number| Client::from(stranger(number), process.web())).collect();
    eventually("all places to be taken", || (open(&process) == most).then_some(()));
    let late = Client::from(stranger(999), process.web()).get("/bytes/10");
    assert_eq!((late.status, late.value("connection")), (503, Some("close")));
    process.wait_metric("forebay_refusals_total{reason=\"accept.connections\"}", |refused| refused >= 1.0);

    // Connected clients are served, all at the same time, each with a connection to the backend.
    let served = 100;
    kept.truncate(served);
    thread::scope(|scope| {
        let asks = kept.iter_mut().map(|client| scope.spawn(|| client.get("/delay/300ms").status));
        let asks: Vec<_> = asks.collect();
        let statuses: Vec<u16> = asks.into_iter().map(|ask| ask.join().expect("a client")).collect();
        assert_eq!(statuses, vec![200; served]);
    });
    assert_eq!(get(process.admin(), "/readyz").status, 200);
}

#[test]
fn over_http_2_too_one_address_has_so_many_requests_under_way_and_no_more() {
    let origin = Origin::scripted();
    let listener = "protocols: [http1, h2c], limits: { requests_per_ip: 3 }";
    let gateway = Setup::before(&origin).listener(listener).upstream("keepalive: { pool: 0 }").start();
    let clients = [H2Client::from(stranger(1), gateway.web()), H2Client::from(stranger(1), gateway.web())];
    let begin =
        |client: &H2Client| client.begin(http::Request::get("http://test/").body(()).expect("a request"), true).0;
    let answers: Vec<_> = [0, 0, 1].iter().map(|&client| begin(&clients[client])).collect();
    let mut connections: Vec<_> = (0..3).map(|_| origin.accept()).collect();
    connections.iter_mut().for_each(|connection| drop(connection.request()));

    let refused = clients[1].get("/");
    assert_eq!(refused.status, 429);
    assert!(refused.headers.contains_key("retry-after"));
    assert_eq!(gateway.log_line_of_status(429).reason(), "route.requests_per_ip");
    let other = thread::spawn({
        let web = gateway.web();
        move || Client::from(stranger(2), web).get("/").status
    });
    let mut connection = origin.accept();
    connection.request();
    connection.answer("another address");
    assert_eq!(other.join().expect("another client"), 200);

    connections.iter_mut().for_each(|connection| connection.answer("done"));
    for (client, answer) in [0, 0, 1].into_iter().zip(answers) {
        assert_eq!(clients[client].step(answer).expect("an answer").status(), 200);
    }
    gateway.wait_metric("forebay_phase_active", |active| active == 0.0);
    let again = begin(&clients[1]);
    let mut connection = origin.accept();
    connection.request();
    connection.answer("its place was given back");
    assert_eq!(clients[1].step(again).expect("an answer").status(), 200);
}

#[test]
fn who_speaks_for_many_clients_is_not_limited_as_one() {
    let origin = Origin::named("origin");
    let setup = Setup::before(&origin).listener("limits: { connections_per_ip: 1, requests_per_ip: 1 }");
    let path = setup.path("web.sock");
    let local = format!("{{ name: local, address: \"unix:{}\", limits: {{ connections_per_ip: 1 }} }}", path.display());
    let gateway = setup.also_listener(&local).more("trusted_proxies: [127.1.0.0/16]").start();
    let mut proxied: Vec<Client> = (0..5).map(|_| Client::from(stranger(7), gateway.web())).collect();
    proxied.extend((0..5).map(|_| Client::unix(&path)));
    assert!(proxied.iter_mut().all(|client| client.get("/").text() == "origin"));
    let mut direct = [gateway.client(), gateway.client()];
    assert_eq!(direct[0].get("/").text(), "origin");
    assert_eq!(direct[1].response().status, 429);
}

#[test]
fn connections_wait_in_the_kernel_while_open_files_run_short_and_are_served_then() {
    const REQUEST: &str = "GET / HTTP/1.1\r\nHost: test\r\n\r\n";
    may_open_files(2_000);
    let origin = Origin::scripted();
    let shares = "threads: 1, open_files: { clients: 80%, spools: 1% }";
    let process = Setup::before(&origin).server(shares).open_files(256).spawn();
    // Each needs two: its own connection and one to the backend.
    let mut busy = Vec::new();
    while process.metric("forebay_accept_paused") == 0.0 {
        assert!(busy.len() < 128, "256 files are open and more are accepted");
        let mut client = Client::from(stranger(busy.len()), process.web());
        client.send(REQUEST);
        let served = eventually("a request to arrive, or none to be accepted", || match origin.try_accept() {
            Some(connection) => Some(Some(connection)),
            None => (process.metric("forebay_accept_paused") > 0.0).then_some(None),
        });
        busy.push((client, served));
    }
    process.says("no connection is accepted until some are closed");
    assert_eq!(get(process.admin(), "/readyz").status, 200);
    let mut late = Client::from(stranger(200), process.web());
    late.send(REQUEST);

    let mut waits = 1;
    for (mut client, served) in busy {
        let Some(mut connection) = served else {
            waits += 1;
            continue;
        };
        connection.request();
        connection.answer("served");
        assert_eq!(client.response().text(), "served");
    }
    for _ in 0..waits {
        let mut connection = origin.accept();
        connection.request();
        connection.answer("served late");
    }
    assert_eq!(late.response().text(), "served late");
    process.wait_metric("forebay_accept_paused", |paused| paused == 0.0);
    assert_eq!(process.stderr().matches("no connection is accepted").count(), 1, "it says so once");
}

const MIB: u64 = 1 << 20;

/// A gateway with 20 MiB of disk and little memory for bodies, of which responses may use four fifths.
fn sharing_20_mib(origin: &Running, per_client: &str) -> Setup {
    let request = "mode: full, memory: 16KiB, disk: 20MiB";
    let buffering = format!("buffering: {{ request: {{ {request} }}, response: {{ memory: 16KiB, disk: 20MiB }} }}");
    let resources = format!("resources: {{ memory: 16MiB, disk: 20MiB, responses: 80%, per_client: {per_client} }}");
    let setup = Setup::before_all(&[origin.address()]).listener("protocols: [http1, h2c]").spooling("");
    setup.route(&buffering).more(&resources)
}

fn on_disk(gateway: &Gateway, direction: &str) -> u64 {
    gateway.metric(&format!("forebay_spool_bytes{{direction=\"{direction}\",store=\"disk\"}}")) as u64
}

fn denied(gateway: &Gateway, direction: &str, limit: &str) -> f64 {
    gateway.metric(&format!("forebay_spool_denials_total{{direction=\"{direction}\",limit=\"{limit}\"}}"))
}

#[test]
fn sixteen_slow_readers_leave_room_on_the_disk_for_uploads_and_for_shorter_answers() {
    let origin = built_in();
    for protocol in Protocol::BOTH {
        let gateway = sharing_20_mib(&origin, "100%").start();
        let read = |number: usize, path: &str| {
            let mut reader = Ask::get(path).narrow().from(stranger(number)).begin(protocol, gateway.web());
            assert_eq!(reader.read(1_000), 1_000);
            reader
        };
        // None of them fits, even without the others.
        let readers: Vec<_> = (0..16).map(|number| read(number, "/bytes/32MiB")).collect();
        let held = || denied(&gateway, "response", "spool") + denied(&gateway, "response", "responses");
        eventually("all of them to be held", || (held() >= 16.0).then_some(()));
        assert_eq!(origin.busy(), 16, "their backends wait for them");
        assert!(on_disk(&gateway, "response") <= 16 * MIB);

        // One from another client, and one from a slow client.
        for from in [stranger(99), stranger(3)] {
            Ask::put(3 * MIB).from(from).over(protocol, gateway.web()).arrived(3 * MIB, "content-length: 3145728");
        }
        let short = read(98, "/bytes/500KiB");
        eventually("the backend of a shorter answer to be let go", || (origin.busy() == 16).then_some(()));
        short.answer().is_content(500 << 10);
        readers.into_iter().next().expect("the first").answer().is_content(32 * MIB);
        gateway.wait_at_rest();
    }
}

#[test]
fn uploads_of_one_client_leave_room_on_the_disk_for_those_of_others() {
    let origin = built_in();
    for protocol in Protocol::BOTH {
        let gateway = sharing_20_mib(&origin, "50%").start();
        let begin = |number: usize| Ask::put(6 * MIB).from(stranger(number)).begin(protocol, gateway.web());
        let mut uploads = [begin(1), begin(1)];
        assert!(uploads.iter_mut().all(|upload| upload.send(4 * MIB)));
        eventually("them to be on disk", || (on_disk(&gateway, "request") > 7 * MIB).then_some(()));
        let mut third = begin(1);
        third.finish_body();
        third.answer().refused(429, "buffer.per_client");
        assert!(denied(&gateway, "request", "client") >= 1.0);

        let other = Ask::put(3 * MIB).from(stranger(2));
        other.over(protocol, gateway.web()).arrived(3 * MIB, "content-length: 3145728");
        drop(uploads);
        gateway.wait_at_rest();
        begin(1).answer_to_all().arrived(6 * MIB, "content-length: 6291456");
    }
}

#[test]
fn clients_behind_a_trusted_proxy_have_a_share_each() {
    let origin = built_in();
    let gateway = sharing_20_mib(&origin, "50%").more("trusted_proxies: [127.1.0.0/16]").start();
    let begin = |client: &str| {
        let ask = Ask::put(6 * MIB).field("x-forwarded-for", client).from(stranger(1));
        ask.begin(Protocol::Http1, gateway.web())
    };
    let mut uploads = [begin("2001:db8::1"), begin("2001:db8::2")];
    assert!(uploads.iter_mut().all(|upload| upload.send(4 * MIB)));
    eventually("them to be on disk", || (on_disk(&gateway, "request") > 7 * MIB).then_some(()));
    begin("2001:db8::3").answer_to_all().refused(429, "buffer.per_client");
    for other in ["2001:db8:0:1::1", "192.0.2.1"] {
        begin(other).answer_to_all().arrived(6 * MIB, "content-length: 6291456");
    }
}
