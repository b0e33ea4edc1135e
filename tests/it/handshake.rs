//! Phase `handshake`: TLS with clients from three libraries, and with invalid clients.

use std::io::{self, Write as _};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use forebay::phase::Phase;
use pingora::tls::ssl::SslVersion;

use crate::harness::gateway::Watched;
use crate::harness::secure::{Authority, Identity};
use crate::harness::tls::{Tls, pair, replace, swap_file};
use crate::harness::{Client, DEADLINE, Gateway, Origin, Setup, eventually, ms};

const VERSIONS: [SslVersion; 2] = [SslVersion::TLS1_2, SslVersion::TLS1_3];

/// A gateway that responds with 200 over TLS, with these certificates and these `tls` keys.
fn answering(certificates: &[String], keys: &str) -> Setup {
    let listed = certificates.iter().map(|one| format!("{{ {one} }}")).collect::<Vec<_>>().join(", ");
    Setup::found("endpoints: [ { address: \"127.0.0.1:1\" } ]")
        .listener(&format!("tls: {{ certificates: [ {listed} ]{keys} }}"))
        .routes("{ name: all, filters: [ { respond: { body: served } } ], upstream: app }")
}

/// As [`answering`], with one certificate for `a.test`.
fn simple(keys: &str) -> (Authority, Identity, Gateway) {
    let authority = Authority::new();
    let identity = authority.issue(&["a.test"]);
    let gateway = answering(&[pair(&identity)], keys).start();
    (authority, identity, gateway)
}

fn refusals(gateway: &Gateway, reason: &str) -> impl Fn() -> f64 {
    let (address, selector) = (gateway.admin(), format!("forebay_refusals_total{{reason=\"{reason}\"}}"));
    move || crate::harness::metrics::Scrape::of(address).sum(&selector)
}

/// Calls `does`, and waits until one more refusal with this reason is counted.
fn refused_as<T>(gateway: &Gateway, reason: &str, does: impl FnOnce() -> T) -> T {
    let count = refusals(gateway, reason);
    let before = count();
    let done = does();
    eventually(&format!("{reason} to be counted"), || (count() > before).then_some(()));
    done
}

#[test]
fn a_client_gets_the_certificate_of_the_name_that_it_asks_for() {
    let authority = Authority::new();
    let (a, any) = (authority.issue(&["a.test"]), authority.issue(&["*.b.test", "b.test"]));
    let gateway = answering(&[pair(&a), pair(&any)], "").start();
    let serial = |name: &str| {
        Tls::to(gateway.web(), &authority, name).get("/").map(|(got, secured)| {
            assert_eq!((got.status, &*got.body), (200, "served"));
            secured.serial()
        })
    };
    let (of_a, of_b) = (serial("a.test").unwrap(), serial("b.test").unwrap());
    assert_ne!(of_a, of_b);
    assert_eq!(serial("x.b.test").unwrap(), of_b);
    assert_eq!(serial("A.Test").unwrap(), of_a);

    let unknown = refused_as(&gateway, "handshake.unknown_name", || serial("c.test").unwrap_err());
    assert!(unknown.contains("UNRECOGNIZED_NAME"), "{unknown}");
    let nameless = Tls::to(gateway.web(), &authority, "").nameless();
    let told = refused_as(&gateway, "handshake.no_name", || nameless.get("/").map(|_| ()).unwrap_err());
    assert!(told.contains("UNRECOGNIZED_NAME"), "{told}");

    let gateway = answering(&[pair(&a), pair(&any)], ", default: b.test").start();
    let nameless = Tls::to(gateway.web(), &authority, "").nameless();
    assert_eq!(nameless.get("/").unwrap().1.serial(), of_b);
}

#[test]
fn a_name_may_have_two_certificates_and_a_client_gets_one_that_it_can_verify() {
    let authority = Authority::new();
    let (rsa, ecdsa) = (authority.issue_rsa(&["a.test"]), authority.issue(&["a.test"]));
    let gateway = answering(&[pair(&rsa), pair(&ecdsa)], "").start();
    let client = Tls::to(gateway.web(), &authority, "a.test");
    for version in VERSIONS {
        let is_rsa = |client: Tls| client.version(version).get("/").unwrap().1.is_rsa();
        assert!(!is_rsa(client.clone()));
        assert!(is_rsa(client.clone().rsa_only()));
    }
    // With one thread for RSA keys, and with none.
    let gateway = answering(&[pair(&rsa)], ", handshake_threads: 0").start();
    assert!(Tls::to(gateway.web(), &authority, "a.test").get("/").unwrap().1.is_rsa());
}

#[test]
fn a_client_hello_may_come_byte_by_byte() {
    let (authority, _, gateway) = simple("");
    let client = Tls::to(gateway.web(), &authority, "a.test").dripping();
    assert_eq!(client.get("/").unwrap().0.body, "served");
    let line = gateway.log_line();
    assert!(line.phase(Phase::Handshake).is_some_and(|took| took > 10.0), "{line:?}");
    assert_eq!(
        gateway.metric("forebay_tls_handshakes_total{listener=\"web\",version=\"TLSv1.3\",resumed=\"no\"}"),
        1.0
    );
}

#[test]
fn http_2_is_spoken_where_alpn_agrees_on_it() {
    let (authority, _, gateway) = simple("");
    let client = Tls::to(gateway.web(), &authority, "a.test");
    let mut h2 = client.clone().alpn(b"\x02h2\x08http/1.1").connect().unwrap();
    assert_eq!(h2.alpn().as_deref(), Some(&b"h2"[..]));
    // The preface and an empty SETTINGS; the server responds with its own.
    h2.send(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0");
    assert_eq!(h2.bytes(9)[3], 4);
    assert_eq!(client.clone().alpn(b"\x08http/1.1").connect().unwrap().alpn().as_deref(), Some(&b"http/1.1"[..]));
    let other = refused_as(&gateway, "handshake.protocol", || client.clone().alpn(b"\x02h3").connect().err());
    assert!(other.unwrap().contains("NO_APPLICATION_PROTOCOL"));

    // Only the negotiated protocol is accepted.
    let mut http1 = client.connect().unwrap();
    http1.send(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0");
    assert!(String::from_utf8_lossy(&http1.rest().0).starts_with("HTTP/1.1 400 "));
    let mut h2 = client.alpn(b"\x02h2").connect().unwrap();
    h2.send(b"GET / HTTP/1.1\r\nHost: a.test\r\n\r\n");
    let (came, _) = h2.rest();
    assert!(!String::from_utf8_lossy(&came).contains("served"), "{came:?}");
}

#[test]
fn plain_http_on_a_tls_port_is_told_so() {
    let (_, _, gateway) = simple("");
    let mut client = Client::connect(gateway.web());
    let answer = client.get("/");
    assert_eq!(answer.status, 400);
    assert!(answer.text().starts_with("400 handshake.http: "), "{}", answer.text());
    client.closed();
    assert_eq!(gateway.log_line().reason(), "handshake.http");
}

#[test]
fn what_is_no_tls_is_closed_and_counted() {
    let (_, _, gateway) = simple("");
    for (bytes, reason) in [
        (&b"\x80\x2e\x01\x03\x01"[..], "handshake.not_tls"),
        (b"\x16\x03\x01\x00\x04\x02\x00\x00\x00", "handshake.malformed"),
        (b"\x16\x03\x01\x00\x04\x01\xff\xff\xff", "handshake.too_large"),
    ] {
        let mut client = Client::connect(gateway.web());
        refused_as(&gateway, reason, || client.send(bytes));
        client.rest();
    }
    // A client that closes during the handshake.
    refused_as(&gateway, "handshake.aborted", || Client::connect(gateway.web()).send(b"\x16\x03\x01"));
    gateway.wait_at_rest();
    gateway.wait_metric("forebay_client_connections", |open| open == 0.0);
}

#[test]
fn a_client_that_ends_the_handshake_with_an_alert_is_counted() {
    let (_, _, gateway) = simple("");
    // It trusts a different authority.
    let stranger = Authority::new();
    for version in VERSIONS {
        let client = Tls::to(gateway.web(), &stranger, "a.test").version(version);
        refused_as(&gateway, "handshake.alert", || assert!(client.get("/").is_err()));
    }
    // OpenSSL sends this alert unencrypted with TLS 1.3; it still counts.
    for version in ["-tls1_2", "-tls1_3"] {
        let said = refused_as(&gateway, "handshake.alert", || s_client(&gateway, &stranger, &[version]));
        assert!(said.contains("certificate verify failed"), "{said}");
    }
    assert_eq!(refusals(&gateway, "handshake.failed")(), 0.0);
    gateway.wait_metric("forebay_client_connections", |open| open == 0.0);
}

/// Forwards a connection to `to`, and changes the first byte of the client's second record.
fn tampering(to: SocketAddr) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = listener.local_addr().expect("an address");
    thread::spawn(move || {
        let (mut client, _) = listener.accept().expect("a client");
        let mut server = TcpStream::connect(to).expect("the gateway");
        let mut hello = vec![0; 5];
        io::Read::read_exact(&mut client, &mut hello).expect("the head of a record");
        hello.resize(5 + usize::from(u16::from_be_bytes([hello[3], hello[4]])), 0);
        io::Read::read_exact(&mut client, &mut hello[5..]).expect("a record");
        server.write_all(&hello).expect("a gateway that reads");
        let (mut from_server, mut to_client) =
            (server.try_clone().expect("a socket"), client.try_clone().expect("one"));
        let back = thread::spawn(move || io::copy(&mut from_server, &mut to_client));
        let mut more = vec![0; 16 << 10];
        let count = io::Read::read(&mut client, &mut more).expect("a second flight");
        more[5] ^= 1;
        server.write_all(&more[..count]).expect("a gateway that reads");
        let _ = back.join();
        let _ = client.shutdown(Shutdown::Both);
    });
    address
}

#[test]
fn a_handshake_that_was_changed_on_its_way_fails_and_is_counted() {
    let (authority, _, gateway) = simple("");
    let client = Tls::to(tampering(gateway.web()), &authority, "a.test");
    refused_as(&gateway, "handshake.failed", || assert!(client.get("/").is_err()));
    gateway.wait_metric("forebay_client_connections", |open| open == 0.0);
}

#[test]
fn a_handshake_that_does_not_end_is_given_up_in_time() {
    let (_, _, gateway) = simple(", handshake_timeout: 200ms");
    let mut begun = Client::connect(gateway.web());
    refused_as(&gateway, "handshake.timeout", || begun.send(b"\x16\x03\x01"));
    begun.closed();
    // A silent client has the same time limit.
    Client::connect(gateway.web()).closed();
    gateway.wait_metric("forebay_client_connections", |open| open == 0.0);
}

#[test]
fn sessions_are_resumed_with_a_new_certificate_too() {
    let (authority, identity, gateway) = simple("");
    for version in VERSIONS {
        let client = Tls::to(gateway.web(), &authority, "a.test").version(version);
        let (_, first) = client.get("/").unwrap();
        assert!(!first.resumed());
        let before = first.serial();
        let session = first.session();

        replace(&identity, &authority.issue(&["a.test"]));
        eventually("the new certificate", || (client.get("/").unwrap().1.serial() != before).then_some(()));
        let (got, second) = client.clone().resuming(session).get("/").unwrap();
        assert!(second.resumed() && got.body == "served", "{version:?}");
        // A used ticket is replaced.
        assert!(client.resuming(second.session()).get("/").unwrap().1.resumed());
    }
    assert!(gateway.metric("forebay_tls_handshakes_total{resumed=\"yes\"}") >= 4.0);
}

#[test]
fn tickets_may_be_shared_by_a_file_or_not_be_had_at_all() {
    let authority = Authority::new();
    let identity = authority.issue(&["a.test"]);
    let setup = answering(&[pair(&identity)], "");
    let keys = setup.path("tickets.keys");
    std::fs::write(&keys, [7; 80]).unwrap();
    let shared = format!(", tickets: {{ keys_file: \"{}\" }}, refresh: 100ms", keys.display());
    let [one, two] = [(); 2].map(|()| answering(&[pair(&identity)], &shared).start());
    let (_, first) = Tls::to(one.web(), &authority, "a.test").get("/").unwrap();
    let at_two = Tls::to(two.web(), &authority, "a.test");
    assert!(at_two.clone().resuming(first.session()).get("/").unwrap().1.resumed());

    // With another key, old tickets are invalid.
    std::fs::write(setup.path("other.keys"), [9; 80]).unwrap();
    swap_file(&setup.path("other.keys"), &keys);
    eventually("the old key to be forgotten", || {
        let (_, fresh) = at_two.get("/").unwrap();
        let (_, other) = Tls::to(one.web(), &authority, "a.test").resuming(fresh.session()).get("/").unwrap();
        let old = Tls::to(one.web(), &authority, "a.test");
        let (_, first) = old.get("/").unwrap();
        let again = at_two.clone().resuming(first.session()).get("/").unwrap().1.resumed();
        (other.resumed() && again).then_some(())
    });

    let none = answering(&[pair(&identity)], ", tickets: { enabled: false }").start();
    let client = Tls::to(none.web(), &authority, "a.test").version(SslVersion::TLS1_2);
    let (_, first) = client.get("/").unwrap();
    assert!(!client.clone().resuming(first.session()).get("/").unwrap().1.resumed());
}

#[test]
fn certificates_are_swapped_under_load_and_no_handshake_fails() {
    let authority = Authority::new();
    let served = authority.issue(&["a.test"]);
    let others = [authority.issue(&["a.test", "one"]), authority.issue(&["a.test", "two"])];
    let gateway = answering(&[pair(&served)], ", refresh: 50ms").start();
    let client = Tls::to(gateway.web(), &authority, "a.test");
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        let shaking = (0..2).map(|_| {
            scope.spawn(|| {
                let mut serials = std::collections::BTreeSet::new();
                while !done.load(Ordering::Relaxed) {
                    serials.insert(client.get("/").expect("a handshake").1.serial());
                }
                serials
            })
        });
        let shaking: Vec<_> = shaking.collect();
        for round in 0..6 {
            let reloads = gateway.metric("forebay_tls_reloads_total{outcome=\"taken\"}");
            replace(&served, &others[round % 2]);
            gateway.wait_metric("forebay_tls_reloads_total{outcome=\"taken\"}", |count| count > reloads);
        }
        done.store(true, Ordering::Relaxed);
        let seen: std::collections::BTreeSet<_> = shaking.into_iter().flat_map(|one| one.join().unwrap()).collect();
        assert!(seen.len() >= 3, "{seen:?}");
    });
}

#[test]
fn a_pair_that_does_not_fit_is_not_taken_and_the_old_one_stays() {
    let (authority, identity, gateway) = simple(", refresh: 50ms");
    let client = Tls::to(gateway.web(), &authority, "a.test");
    let serial = || client.get("/").unwrap().1.serial();
    let before = serial();
    swap_file(&authority.issue(&["other.test"]).key, &identity.key);
    gateway.wait_metric("forebay_tls_reloads_total{outcome=\"refused\"}", |count| count == 1.0);
    assert_eq!(gateway.metric("forebay_tls_certificates_refused{listener=\"web\"}"), 1.0);
    assert_eq!(serial(), before);

    std::fs::write(&identity.certificate, "-----BEGIN CERTIFICATE-----\nabc").unwrap();
    gateway.wait_metric("forebay_tls_reloads_total{outcome=\"refused\"}", |count| count >= 2.0);
    std::fs::remove_file(&identity.certificate).unwrap();
    gateway.wait_metric("forebay_tls_reloads_total{outcome=\"refused\"}", |count| count >= 3.0);
    assert_eq!(serial(), before);

    replace(&identity, &authority.issue(&["a.test"]));
    eventually("the new pair", || (serial() != before).then_some(()));
    gateway.wait_metric("forebay_tls_certificates_refused", |wrong| wrong == 0.0);
}

#[test]
fn client_certificates_are_asked_for_by_name_and_told_to_the_upstream() {
    let (servers, clients, strangers) = (Authority::new(), Authority::new(), Authority::new());
    let ca = clients.file();
    let asks = |mode: &str| format!("client: {{ mode: {mode}, ca: \"{}\" }}", ca.display());
    let gateway = answering(
        &[
            pair(&servers.issue(&["open.test"])),
            format!("{}, {}", pair(&servers.issue(&["must.test"])), asks("required")),
            format!("{}, {}", pair(&servers.issue(&["may.test"])), asks("optional")),
        ],
        "",
    )
    .start();
    let to = |name: &str| Tls::to(gateway.web(), &servers, name);
    let (good, bad) = (clients.issue(&["ada.test"]), strangers.issue(&["eve.test"]));
    for version in VERSIONS {
        let status = |client: Tls| client.version(version).get("/").map(|(got, _)| got.status);
        assert_eq!(status(to("open.test")), Ok(200));
        assert_eq!(status(to("may.test")), Ok(200));
        assert_eq!(status(to("may.test").showing(&good)), Ok(200));
        assert_eq!(status(to("must.test").showing(&good)), Ok(200));
        refused_as(&gateway, "handshake.no_certificate", || status(to("must.test")).unwrap_err());
        refused_as(&gateway, "handshake.certificate", || status(to("must.test").showing(&bad)).unwrap_err());
        refused_as(&gateway, "handshake.certificate", || status(to("may.test").showing(&bad)).unwrap_err());

        // A session without a client certificate does not give access where one is required.
        let (_, open) = to("open.test").version(version).get("/").unwrap();
        assert!(status(to("must.test").resuming(open.session())).is_err());
    }
}

#[test]
fn who_a_client_has_proved_to_be_is_known_to_routes_upstreams_and_the_log() {
    let (servers, clients) = (Authority::new(), Authority::new());
    let origin = Origin::named("app");
    let asks = format!("client: {{ mode: optional, ca: \"{}\" }}", clients.file().display());
    let tls = format!("tls: {{ certificates: [ {{ {}, {asks} }} ] }}", pair(&servers.issue(&["a.test"])));
    let only_ada = "{ name: ada, match: { headers: { x-client-cert-subject: { regex: \"(^|,)CN=ada.test(,|$)\" } } }, upstream: app }";
    let gateway = Setup::before(&origin).listener(&tls).routes(only_ada).start();
    let to = Tls::to(gateway.web(), &servers, "a.test");
    let ask = "GET / HTTP/1.1\r\nHost: a.test\r\nX-Client-Cert-Subject: CN=ada.test\r\n\r\n";
    assert_eq!(to.connect().unwrap().ask(ask).unwrap().status, 404, "a client cannot say so itself");
    let mut ada = to.showing(&clients.issue(&["ada.test", "ada.example"])).connect().unwrap();
    assert_eq!(ada.ask(ask).unwrap().status, 200);
    let head = origin.request().head;
    assert!(head.value("x-client-cert-subject").is_some_and(|said| said.contains("CN=ada.test")), "{head:?}");
    assert_eq!(head.value("x-client-cert-names"), Some("ada.test,ada.example"));
    assert_eq!(head.value("x-client-cert-fingerprint").map(str::len), Some(64));
    let line = gateway.log_line_of_status(200);
    assert_eq!(line.text("tls"), "TLSv1.3");
    assert!(line.text("client_subject").contains("CN=ada.test"));
}

#[test]
fn a_host_with_other_terms_for_clients_is_served_over_a_connection_of_its_own() {
    let (servers, clients) = (Authority::new(), Authority::new());
    let asks = format!("client: {{ ca: \"{}\" }}", clients.file().display());
    let closed = format!("{}, {asks}", pair(&servers.issue(&["closed.test"])));
    let gateway = answering(&[pair(&servers.issue(&["open.test"])), closed], "").start();
    let mut open = Tls::to(gateway.web(), &servers, "open.test").connect().unwrap();
    let status = |host: &str| format!("GET / HTTP/1.1\r\nHost: {host}\r\n\r\n");
    assert_eq!(open.ask(&status("open.test:443")).unwrap().status, 200);
    assert_eq!(open.ask(&status("closed.test")).unwrap().status, 421);
    assert_eq!(open.ask(&status("CLOSED.test.:443")).unwrap().status, 421);
    assert_eq!(open.ask(&status("open.test")).unwrap().status, 200, "and the connection goes on");
    assert_eq!(gateway.log_line_of_status(421).reason(), "header.misdirected");
    let mut closed =
        Tls::to(gateway.web(), &servers, "closed.test").showing(&clients.issue(&["ada.test"])).connect().unwrap();
    assert_eq!(closed.ask(&status("closed.test")).unwrap().status, 200);
}

#[test]
fn the_upstream_hears_that_it_was_https() {
    let authority = Authority::new();
    let origin = Origin::named("app");
    let tls = format!("tls: {{ certificates: [ {{ {} }} ] }}", pair(&authority.issue(&["a.test"])));
    let gateway = Setup::before(&origin).listener(&tls).start();
    assert_eq!(Tls::to(gateway.web(), &authority, "a.test").get("/").unwrap().0.status, 200);
    assert_eq!(origin.request().head.value("x-forwarded-proto"), Some("https"));
}

#[test]
fn a_small_answer_is_one_record() {
    let authority = Authority::new();
    let origin = Origin::named("app");
    let tls = format!("tls: {{ certificates: [ {{ {} }} ] }}", pair(&authority.issue(&["a.test"])));
    let gateway = Setup::before(&origin).listener(&tls).start();
    for version in VERSIONS {
        let mut client = Tls::to(gateway.web(), &authority, "a.test").version(version).connect().unwrap();
        let ask = "GET / HTTP/1.1\r\nHost: a.test\r\n\r\n";
        client.ask(ask).unwrap();
        client.forget_records();
        assert_eq!(client.ask(ask).unwrap().status, 200);
        assert_eq!(client.records().len(), 1, "{:?}", client.records());
    }
}

#[test]
fn large_bodies_pass_whole_both_ways() {
    let authority = Authority::new();
    let origin = Origin::answering(|request| crate::harness::ok(&request.body));
    let tls = format!("tls: {{ certificates: [ {{ {} }} ] }}", pair(&authority.issue(&["a.test"])));
    let gateway = Setup::before(&origin).listener(&tls).start();
    let body: String = (0..3_000_000).map(|n| char::from(b'a' + (n % 23) as u8)).collect();
    for version in VERSIONS {
        let mut client = Tls::to(gateway.web(), &authority, "a.test").version(version).connect().unwrap();
        for _ in 0..2 {
            let length = body.len();
            let got = client.ask(&format!("POST / HTTP/1.1\r\nHost: a.test\r\nContent-Length: {length}\r\n\r\n{body}"));
            assert!(got.unwrap().body == body);
        }
    }
}

#[test]
fn the_end_of_an_answer_is_said_before_the_connection_closes() {
    let (authority, _, gateway) = simple("");
    for version in VERSIONS {
        let (_, mut connection) = Tls::to(gateway.web(), &authority, "a.test").version(version).get("/").unwrap();
        let (rest, said) = connection.rest();
        assert!(rest.is_empty() && said, "close_notify");
    }
}

#[test]
fn the_end_of_half_an_answer_is_not_said() {
    let (authority, origin) = (Authority::new(), Origin::scripted());
    let identity = authority.issue(&["a.test"]);
    let tls = format!("tls: {{ certificates: [ {{ {} }} ] }}", pair(&identity));
    let gateway = Setup::before(&origin).listener(&tls).start();
    for version in VERSIONS {
        for framing in ["Content-Length: 8\r\n\r\nhalf", "Transfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n"] {
            let mut client = Tls::to(gateway.web(), &authority, "a.test").version(version).connect().unwrap();
            client.send("GET / HTTP/1.1\r\nHost: a.test\r\n\r\n");
            let mut connection = origin.accept();
            connection.request();
            connection.send(format!("HTTP/1.1 200 OK\r\n{framing}"));
            gateway.wait_phase(Phase::Receive);
            connection.close();
            let (rest, said) = client.rest();
            assert!(rest.windows(4).any(|four| four == b"half") && !said, "{framing:?}");
        }
    }
}

#[test]
fn old_versions_and_ciphers_that_are_not_listed_are_refused() {
    let authority = Authority::new();
    let identity = authority.issue(&["a.test"]);
    let gateway = answering(&[pair(&identity)], ", min_version: \"1.3\", groups: [X25519MLKEM768, P-256]").start();
    let client = Tls::to(gateway.web(), &authority, "a.test");
    refused_as(&gateway, "handshake.version", || {
        client.clone().version(SslVersion::TLS1_2).get("/").map(|_| ()).unwrap_err()
    });
    let (_, secured) = client.get("/").unwrap();
    assert_eq!((secured.version(), secured.group()), ("TLSv1.3", Some("X25519MLKEM768")));

    let gateway = answering(&[pair(&identity)], ", ciphers: [ECDHE-ECDSA-AES256-GCM-SHA384]").start();
    let s_client = |more: &[&str]| s_client(&gateway, &authority, &[&["-tls1_2"], more].concat());
    assert!(s_client(&[]).contains("ECDHE-ECDSA-AES256-GCM-SHA384"));
    refused_as(&gateway, "handshake.cipher", || s_client(&["-cipher", "ECDHE-ECDSA-AES128-GCM-SHA256"]));
}

#[test]
fn a_staple_is_shown_to_who_asks_for_it() {
    let authority = Authority::new();
    let identity = authority.issue(&["a.test"]);
    let setup = answering(&[pair(&identity)], "");
    let staple = setup.path("staple.der");
    let (request, index) = (setup.path("request.der"), setup.path("index.txt"));
    std::fs::write(&index, "").unwrap();
    let file = |path: &Path| path.display().to_string();
    let ca = authority.identity();
    let serial = openssl(&["x509", "-noout", "-serial", "-in", &file(&identity.certificate)]);
    let serial = serial.trim().strip_prefix("serial=").unwrap().to_owned();
    std::fs::write(&index, format!("V\t491231235959Z\t\t{serial}\tunknown\t/CN=a.test\n")).unwrap();
    openssl(&[
        "ocsp",
        "-issuer",
        &file(&ca.certificate),
        "-cert",
        &file(&identity.certificate),
        "-reqout",
        &file(&request),
    ]);
    openssl(&[
        "ocsp",
        "-index",
        &file(&index),
        "-rsigner",
        &file(&ca.certificate),
        "-rkey",
        &file(&ca.key),
        "-CA",
        &file(&ca.certificate),
        "-reqin",
        &file(&request),
        "-respout",
        &file(&staple),
        "-ndays",
        "3",
    ]);
    let gateway = answering(&[format!("{}, staple: \"{}\"", pair(&identity), staple.display())], "").start();
    let expected = std::fs::read(&staple).unwrap();
    for version in VERSIONS {
        let (_, secured) = Tls::to(gateway.web(), &authority, "a.test").version(version).get("/").unwrap();
        assert_eq!(secured.staple().as_deref(), Some(&expected[..]));
    }
    assert!(s_client(&gateway, &authority, &["-status"]).contains("OCSP Response Status: successful"));
}

/// The output of `openssl s_client` that requests a renegotiation on a TLS 1.2 connection.
pub fn renegotiate(address: SocketAddr, authority: &Authority) -> String {
    let mut child = Command::new("timeout")
        .args(["15", "openssl", "s_client", "-tls1_2", "-servername", "a.test", "-connect", &address.to_string()])
        .arg("-CAfile")
        .arg(authority.file())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("openssl s_client");
    let mut input = child.stdin.take().expect("its standard input");
    // The line is read after the handshake. The input stays open, because `s_client` exits at its end.
    let _ = input.write_all(b"R\n");
    let output = child.wait_with_output().expect("its end");
    drop(input);
    String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned()
}

fn openssl(arguments: &[&str]) -> String {
    let output = Command::new("openssl").args(arguments).output().expect("openssl runs");
    assert!(output.status.success(), "openssl {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// The output of `openssl s_client`, which requests `/` and closes.
fn s_client(gateway: &Gateway, authority: &Authority, arguments: &[&str]) -> String {
    let (address, ca) = (gateway.web().to_string(), authority.file().display().to_string());
    let mut child = Command::new("timeout")
        .args(["15", "openssl", "s_client", "-connect", &address, "-CAfile", &ca, "-servername", "a.test"])
        .args(["-verify_return_error", "-ign_eof"])
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("openssl s_client");
    let request = b"GET / HTTP/1.1\r\nHost: a.test\r\nConnection: close\r\n\r\n";
    // It may already have exited.
    let _ = child.stdin.take().expect("its standard input").write_all(request);
    let output = child.wait_with_output().expect("its end");
    String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned()
}

#[test]
fn openssl_s_client_is_served_with_both_versions() {
    let (authority, _, gateway) = simple("");
    for version in ["-tls1_2", "-tls1_3"] {
        let said = s_client(&gateway, &authority, &[version]);
        assert!(said.contains("Verify return code: 0 (ok)") && said.contains("\r\n\r\nserved"), "{said}");
    }
    for old in ["-tls1_1", "-tls1"] {
        let said = refused_as(&gateway, "handshake.version", || {
            s_client(&gateway, &authority, &[old, "-cipher", "ALL:@SECLEVEL=0"])
        });
        assert!(said.contains("alert protocol version"), "{said}");
    }
    let said = s_client(&gateway, &authority, &["-tls1_2", "-alpn", "http/1.1"]);
    assert!(said.contains("ALPN protocol: http/1.1"), "{said}");
}

#[test]
fn a_client_of_tls_1_2_that_wants_to_shake_hands_again_is_cut_off_and_counted() {
    let (authority, _, gateway) = simple("");
    let said = refused_as(&gateway, "handshake.renegotiation", || renegotiate(gateway.web(), &authority));
    assert!(said.contains("RENEGOTIATING") && said.contains("no renegotiation"), "{said}");
    gateway.wait_metric("forebay_client_connections", |open| open == 0.0);
}

/// ClientHellos recorded from programs in other languages, and those of OpenSSL and BoringSSL: the file, and
/// whether it contains a share of X25519MLKEM768.
const HELLOS: [(&str, &str, bool); 4] = [
    ("Go 1.19", include_str!("hellos/go-1.19.hex"), false),
    ("Java 17", include_str!("hellos/java-17.hex"), false),
    ("Node 20", include_str!("hellos/node-20.hex"), false),
    ("Chromium", include_str!("hellos/chromium.hex"), true),
];

#[test]
fn hellos_of_go_java_node_and_a_browser_are_answered_in_their_terms() {
    const TLS13_SUITES: [u16; 3] = [0x1301, 0x1302, 0x1303];
    const X25519: u16 = 29;
    const P256: u16 = 23;
    const X25519MLKEM768: u16 = 4588;
    let authority = Authority::new();
    let gateway = answering(&[pair(&authority.issue(&["localhost"]))], ", default: localhost").start();
    for (whose, hex, post_quantum) in HELLOS {
        let digits: Vec<u8> = hex.bytes().filter(u8::is_ascii_hexdigit).collect();
        let byte = |two: &[u8]| u8::from_str_radix(std::str::from_utf8(two).unwrap(), 16).unwrap();
        let hello: Vec<u8> = digits.chunks(2).map(byte).collect();
        let mut client = Client::connect(gateway.web()).into_wire().into_socket();
        client.write_all(&hello).unwrap();
        let mut head = [0; 5];
        io::Read::read_exact(&mut client, &mut head).unwrap();
        assert_eq!(head[0], 22, "{whose}: a handshake and no alert");
        let mut answer = vec![0; usize::from(u16::from_be_bytes([head[3], head[4]]))];
        io::Read::read_exact(&mut client, &mut answer).unwrap();
        let (suite, group) = server_hello(&answer).expect("a ServerHello of TLS 1.3");
        assert!(TLS13_SUITES.contains(&suite), "{whose}: {suite:#x}");
        assert_eq!(group == X25519MLKEM768, post_quantum, "{whose}: {group}");
        assert!([X25519, P256, X25519MLKEM768].contains(&group), "{whose}: {group}");
    }
}

/// The cipher suite and group of a ServerHello (RFC 8446 §4.1.3); `None` for another version.
fn server_hello(message: &[u8]) -> Option<(u16, u16)> {
    let number = |at: usize| Some(u16::from_be_bytes([*message.get(at)?, *message.get(at + 1)?]));
    (message.first() == Some(&2)).then_some(())?;
    // Type, length, version and random; then the session id.
    let session = 4 + 2 + 32;
    let suite = session + 1 + usize::from(*message.get(session)?);
    let mut extension = suite + 2 + 1 + 2;
    let (mut tls13, mut group) = (false, None);
    while let (Some(kind), Some(length)) = (number(extension), number(extension + 2)) {
        match kind {
            43 => tls13 = number(extension + 4) == Some(0x0304),
            51 => group = number(extension + 4),
            _ => {}
        }
        extension += 4 + usize::from(length);
    }
    Some((number(suite)?, group.filter(|_| tls13)?))
}

#[test]
fn a_certificate_that_was_revoked_opens_no_door_from_then_on() {
    let (servers, clients) = (Authority::new(), Authority::new());
    let (ada, eve) = (clients.issue(&["ada.test"]), clients.issue(&["eve.test"]));
    let list = clients.revoking("clients.crl", &[]);
    let asks = format!("client: {{ ca: \"{}\", crl: \"{}\" }}", clients.file().display(), list.display());
    let certificate = format!("{}, {asks}", pair(&servers.issue(&["a.test"])));
    let gateway = answering(&[certificate], ", refresh: 100ms").start();
    let to = Tls::to(gateway.web(), &servers, "a.test");
    for version in VERSIONS {
        let as_she = |identity: &Identity| to.clone().version(version).showing(identity);
        swap_file(&clients.revoking("none.crl", &[]), &list);
        let session = eventually("a list that names nobody", || Some(as_she(&eve).get("/").ok()?.1.session()));
        assert!(as_she(&ada).get("/").is_ok());

        swap_file(&clients.revoking("eve.crl", &[&eve]), &list);
        eventually("the list that names her", || as_she(&eve).get("/").is_err().then_some(()));
        let told = refused_as(&gateway, "handshake.certificate", || as_she(&eve).get("/").map(|_| ()).unwrap_err());
        assert!(told.contains("REVOKED"), "{told}");
        assert!(as_she(&ada).get("/").is_ok(), "others are let in");
        // Resuming an older session also fails.
        assert!(as_she(&eve).resuming(session).get("/").is_err());
    }

    // An invalid list is refused, and the old one stays in use.
    std::fs::write(&list, "nobody is revoked").unwrap();
    gateway.wait_metric("forebay_tls_reloads_total{outcome=\"refused\"}", |count| count >= 1.0);
    assert!(to.clone().showing(&eve).get("/").is_err());
    assert!(to.showing(&ada).get("/").is_ok());
}

#[test]
fn a_client_that_speaks_another_protocol_than_it_has_agreed_on_is_refused_with_a_reason() {
    let (authority, _, gateway) = simple("");
    let http1 = "GET / HTTP/1.1\r\nHost: a.test\r\n\r\n";
    let preface = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
    for (offered, said) in [(&b"\x02h2"[..], http1), (b"\x08http/1.1", preface)] {
        let mut client = Tls::to(gateway.web(), &authority, "a.test").alpn(offered).connect().expect("TLS");
        let answer = refused_as(&gateway, "header.alpn", || client.ask(said).expect("an answer"));
        assert_eq!(answer.status, 400, "{said}");
        assert_eq!(client.rest().0, b"", "the connection closes");
    }
    // Without ALPN, HTTP/1 is used (RFC 9113 §3.2).
    let mut client = Tls::to(gateway.web(), &authority, "a.test").alpn(b"").connect().expect("TLS");
    assert_eq!(refused_as(&gateway, "header.alpn", || client.ask(preface).expect("an answer")).status, 400);
}

#[test]
fn curl_is_served_over_http_2_and_http_1() {
    let (authority, _, gateway) = simple("");
    let port = gateway.web().port();
    for (flag, shown) in [("--http2", "served 2 200"), ("--http1.1", "served 1.1 200")] {
        let output = Command::new("curl")
            .args(["-sS", "--max-time", "15", flag, "--resolve", &format!("a.test:{port}:127.0.0.1"), "--cacert"])
            .arg(authority.file())
            .args(["-w", " %{http_version} %{http_code}", &format!("https://a.test:{port}/")])
            .output()
            .expect("curl runs");
        assert_eq!(String::from_utf8_lossy(&output.stdout), shown, "{}", String::from_utf8_lossy(&output.stderr));
    }
}

#[test]
fn the_ssl_module_of_python_is_served_and_does_not_wait_for_nagle() {
    const SCRIPT: &str = r#"
import socket, ssl, sys, time
context = ssl.create_default_context(cafile=sys.argv[2])
waited = []
for _ in range(20):
    with socket.create_connection(("127.0.0.1", int(sys.argv[1]))) as plain:
        with context.wrap_socket(plain, server_hostname="a.test") as tls:
            begun = time.monotonic()
            tls.sendall(b"GET / HTTP/1.1\r\nHost: a.test\r\nConnection: close\r\n\r\n")
            answer = b""
            while piece := tls.recv(4096):
                answer += piece
            waited.append(time.monotonic() - begun)
            assert answer.endswith(b"served"), answer
            version = tls.version()
# Had the end of the handshake not been acknowledged at once, the first request of each would have waited for that: 40 ms.
assert min(waited) < 0.03, waited
print(version)
"#;
    let (authority, _, gateway) = simple("");
    let output = Command::new("timeout")
        .args(["20", "python3", "-c", SCRIPT, &gateway.web().port().to_string()])
        .arg(authority.file())
        .output()
        .expect("python3 runs");
    assert_eq!(
        String::from_utf8_lossy(&output.stdout).trim(),
        "TLSv1.3",
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
}

#[test]
fn a_client_that_reads_slowly_over_tls_is_waited_for_and_one_that_takes_nothing_is_not() {
    let authority = Authority::new();
    let origin = Origin::answering(|_| crate::harness::ok(vec![b'x'; 8_000_000]));
    let tls = format!("tls: {{ certificates: [ {{ {} }} ] }}", pair(&authority.issue(&["a.test"])));
    let gateway = Setup::before(&origin)
        .listener(&tls)
        .route("client: { write_idle: 1500ms, min_rate: { write: 1B/s, grace: 60s } }")
        .start();
    let mut silent = Tls::to(gateway.web(), &authority, "a.test").connect().unwrap();
    silent.send("GET / HTTP/1.1\r\nHost: a.test\r\n\r\n");
    assert_eq!(gateway.log_line().reason(), "write.timeout");

    let mut slow = Tls::to(gateway.web(), &authority, "a.test").connect().unwrap();
    slow.send("GET / HTTP/1.1\r\nHost: a.test\r\nConnection: close\r\n\r\n");
    let mut taken = 0;
    // The kernel asks for more bytes only once a third of its buffer is free again, which may take half a second.
    while taken < 5_000_000 {
        taken += slow.bytes(100_000).len();
        thread::sleep(ms(40));
    }
    let (rest, said) = slow.rest();
    assert!(said && taken + rest.len() > 8_000_000, "{said}, {taken} and {} bytes", rest.len());
    drop(silent);
}

#[test]
fn a_stop_waits_for_no_handshake() {
    let (authority, _, mut gateway) = simple("");
    let client = Tls::to(gateway.web(), &authority, "a.test");
    let kept = client.connect().unwrap();
    let mut begun = TcpStream::connect(gateway.web()).unwrap();
    begun.set_read_timeout(Some(DEADLINE)).unwrap();
    begun.write_all(b"\x16\x03").unwrap();
    gateway.wait_metric("forebay_client_connections{state=\"handshake\"}", |count| count == 1.0);
    gateway.stop();
    gateway.stopped();
    drop(kept);
}

#[test]
fn clients_are_sent_to_https_and_told_to_stay_there() {
    let authority = Authority::new();
    let tls = ", hsts: { max_age: 1h, include_subdomains: true }";
    let identity = authority.issue(&["a.test"]);
    let gateway = answering(&[pair(&identity)], tls)
        .also_listener("{ name: plain, address: \"127.0.0.1:0\", redirect_https: true }")
        .also_listener("{ name: moved, address: \"127.0.0.1:0\", redirect_https: { port: 8443, status: 301 } }")
        .start();
    let head = Tls::to(gateway.web(), &authority, "a.test").get("/").unwrap().0.head.to_ascii_lowercase();
    assert!(head.contains("strict-transport-security: max-age=3600; includesubdomains\r\n"), "{head}");
    let mut plain = Client::connect(gateway.address("plain"));
    plain.send("POST /x?y=1 HTTP/1.1\r\nHost: shop.test:80\r\nContent-Length: 4\r\n\r\nbody");
    let answer = plain.response();
    assert_eq!((answer.status, answer.head.value("location")), (308, Some("https://shop.test/x?y=1")));
    assert_eq!(answer.head.value("strict-transport-security"), None, "in clear text it means nothing");
    let mut moved = Client::connect(gateway.address("moved"));
    moved.send("GET / HTTP/1.1\r\nHost: shop.test\r\n\r\n");
    let answer = moved.response();
    assert_eq!((answer.status, answer.head.value("location")), (301, Some("https://shop.test:8443/")));
}

/// Versions and suites that a scanner would try, oldest first.
const OFFERS: [(&str, &str); 16] = [
    ("-tls1", "ALL"),
    ("-tls1_1", "ALL"),
    ("-tls1_2", "AES128-GCM-SHA256"),
    ("-tls1_2", "AES256-SHA"),
    ("-tls1_2", "DHE-RSA-AES128-GCM-SHA256"),
    ("-tls1_2", "ECDHE-RSA-AES128-SHA"),
    ("-tls1_2", "ECDHE-ECDSA-AES256-SHA384"),
    ("-tls1_2", "ECDHE-RSA-AES128-GCM-SHA256"),
    ("-tls1_2", "ECDHE-RSA-AES256-GCM-SHA384"),
    ("-tls1_2", "ECDHE-RSA-CHACHA20-POLY1305"),
    ("-tls1_2", "ECDHE-ECDSA-AES128-GCM-SHA256"),
    ("-tls1_2", "ECDHE-ECDSA-AES256-GCM-SHA384"),
    ("-tls1_2", "ECDHE-ECDSA-CHACHA20-POLY1305"),
    ("-tls1_3", "TLS_AES_128_GCM_SHA256"),
    ("-tls1_3", "TLS_AES_256_GCM_SHA384"),
    ("-tls1_3", "TLS_CHACHA20_POLY1305_SHA256"),
];

/// The markers around the table in the manual.
const MARKS: [&str; 2] = ["<!-- the table of a scan: made by a test -->\n", "<!-- its end -->\n"];

#[test]
fn the_manual_says_which_versions_and_suites_a_scan_finds() {
    let authority = Authority::new();
    let certificates = [pair(&authority.issue_rsa(&["a.test"])), pair(&authority.issue(&["a.test"]))];
    let gateway = answering(&certificates, "").start();
    let mut table = String::from("| version | offered | served |\n|---|---|---|\n");
    for (version, suite) in OFFERS {
        let old = format!("{suite}:@SECLEVEL=0");
        let offer = if version == "-tls1_3" { ["-ciphersuites", suite] } else { ["-cipher", &old] };
        let said = s_client(&gateway, &authority, &[&[version], &offer[..]].concat());
        let served = said.contains("Verify return code: 0 (ok)") && said.contains("served");
        let shown = version.trim_start_matches("-tls").replace('_', ".");
        let answer = if served { "yes" } else { "no" };
        table += &format!("| TLS {} | {suite} | {answer} |\n", if shown == "1" { "1.0" } else { &shown });
    }
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/conf/manual/tls.md");
    let manual = std::fs::read_to_string(path).expect("the manual");
    let (before, rest) = manual.split_once(MARKS[0]).expect("a mark");
    let (_, behind) = rest.split_once(MARKS[1]).expect("a mark");
    let made = [before, MARKS[0], &table, MARKS[1], behind].concat();
    if std::env::var_os("UPDATE_MANUAL").is_some() {
        std::fs::write(path, &made).expect("to write the manual");
    }
    assert_eq!(std::fs::read_to_string(path).expect("the manual"), made, "UPDATE_MANUAL=1 writes it anew");
}
