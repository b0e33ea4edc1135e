//! The admin endpoint beyond loopback: a token, TLS, and commands that use both.

use std::fs;
use std::process::Command;

use crate::harness::client::{get, request};
use crate::harness::gateway::Watched;
use crate::harness::secure::Authority;
use crate::harness::tls::{Tls, pair};
use crate::harness::{Client, Origin, Setup};

const TOKEN: &str = "0123456789abcdef-token";

#[test]
fn whoever_asks_shows_the_token_but_for_probes() {
    let origin = Origin::named("app");
    let gateway = Setup::before(&origin).admin(&format!("token: {TOKEN}")).start();
    let refused = get(gateway.admin(), "/metrics");
    assert_eq!(refused.status, 401);
    assert_eq!(refused.head.value("www-authenticate"), Some("Bearer, Basic realm=\"forebay\""));
    assert_eq!(get(gateway.admin(), "/").status, 401);
    assert_eq!(get(gateway.admin(), "/no/such/path").status, 401, "not even what there is");
    assert_eq!(get(gateway.admin(), "/healthz").status, 200);
    assert_eq!(get(gateway.admin(), "/readyz").status, 200);
    let ask = |fields: &str| Client::connect(gateway.admin()).ask("GET", "/metrics", fields, "").status;
    assert_eq!(ask(&format!("Authorization: Bearer {TOKEN}\r\n")), 200);
    assert_eq!(ask("Authorization: Bearer 0123456789abcdef-other\r\n"), 401);
}

#[test]
fn it_speaks_tls_and_commands_reach_it() {
    let (authority, origin) = (Authority::new(), Origin::named("app"));
    let identity = authority.issue(&["admin.test"]);
    let keys = format!("token: {TOKEN}, tls: {{ certificates: [ {{ {} }} ] }}", pair(&identity));
    let setup = Setup::before(&origin).admin(&keys);
    let gateway = setup.start();
    let mut client = Tls::to(gateway.admin(), &authority, "admin.test").connect().expect("a handshake");
    let ask = |token: &str| format!("GET /metrics HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {token}\r\n\r\n");
    assert_eq!(client.ask(&ask("wrong-token-of-some-length")).expect("an answer").status, 401);
    let got = client.ask(&ask(TOKEN)).expect("an answer on the same connection");
    assert_eq!(got.status, 200);
    assert!(got.body.contains("forebay_tls_handshakes_total{listener=\"admin\""));
    let mut plain = Client::connect(gateway.admin());
    plain.send(request("GET", "/healthz", "", ""));
    assert_eq!(plain.response().status, 400);

    let file = setup.path("commands.yaml");
    let (before, admin) =
        setup.yaml().split_once("\nadmin:").map(|(a, b)| (a.to_owned(), b.to_owned())).expect("admin");
    let yaml = format!("{before}\nadmin:{}", admin.replacen("127.0.0.1:0", &gateway.admin().to_string(), 1));
    fs::write(&file, yaml).expect("a file");
    let run = |arguments: &[&str]| {
        let program = env!("CARGO_BIN_EXE_forebay");
        let output = Command::new(program).args(arguments).arg("-c").arg(&file).output().expect("the program runs");
        (output.status.success(), String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned())
    };
    let (ready, said) = run(&["healthcheck"]);
    assert!(ready, "{said}");
    // Only the certificate in the file is trusted, not another one from the same authority.
    crate::harness::tls::replace(&identity, &authority.issue(&["admin.test"]));
    let other = setup.path("other.pem");
    fs::copy(&authority.issue(&["admin.test"]).certificate, &other).expect("a copy");
    let yaml = fs::read_to_string(&file)
        .expect("a file")
        .replace(&identity.certificate.display().to_string(), &other.display().to_string());
    fs::write(&file, yaml).expect("a file");
    let (ready, said) = run(&["healthcheck"]);
    assert!(!ready && said.contains("it shows another certificate"), "{said}");
}

#[test]
fn a_certificate_of_the_client_may_stand_for_the_token() {
    let (authority, clients, origin) = (Authority::new(), Authority::new(), Origin::named("app"));
    let asks = format!("client: {{ ca: \"{}\" }}", clients.file().display());
    let keys = format!("tls: {{ certificates: [ {{ {}, {asks} }} ] }}", pair(&authority.issue(&["admin.test"])));
    let gateway = Setup::before(&origin).admin(&keys).start();
    let to = Tls::to(gateway.admin(), &authority, "admin.test");
    assert!(to.get("/metrics").is_err());
    assert_eq!(to.showing(&clients.issue(&["ops.test"])).get("/metrics").expect("an answer").0.status, 200);
}

#[test]
fn connections_that_say_nothing_leave_room_for_those_that_ask() {
    const CROWD: usize = 40;
    let origin = Origin::named("app");
    let gateway = Setup::before(&origin).admin("connections: 8").start();
    let mut crowd: Vec<_> = (0..CROWD).map(|_| Client::connect(gateway.admin())).collect();
    assert_eq!(get(gateway.admin(), "/metrics").status, 200);
    // The longest idle connections were closed for new ones.
    crowd[0].closed();
    assert!(gateway.metric("forebay_admin_connections") <= 8.0);
    assert!(gateway.metric("forebay_admin_connections_closed_total") >= (CROWD - 8) as f64);
    drop(crowd);
    gateway.wait_metric("forebay_admin_connections", |open| open <= 1.0);
}

#[test]
fn half_a_header_and_half_a_handshake_make_room_too() {
    let (authority, origin) = (Authority::new(), Origin::named("app"));
    let identity = authority.issue(&["admin.test"]);
    let keys = format!("connections: 2, tls: {{ certificates: [ {{ {} }} ] }}", pair(&identity));
    let gateway = Setup::before(&origin).admin(&keys).start();
    let mut silent: Vec<_> = (0..6).map(|_| Client::connect(gateway.admin())).collect();
    silent[0].closed();
    let mut begun = Tls::to(gateway.admin(), &authority, "admin.test").connect().expect("a handshake");
    begun.send("GET /healthz HTTP/1.1\r\nHos");
    for _ in 0..3 {
        let mut client = Tls::to(gateway.admin(), &authority, "admin.test").connect().expect("a handshake");
        assert_eq!(client.ask("GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n").expect("an answer").status, 200);
    }
}
