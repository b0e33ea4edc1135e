//! Certificates that Forebay requests itself, from a real authority that validates them: Debian's `pebble`.

use std::fs;
use std::net::{SocketAddr, TcpListener};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use crate::harness::gateway::Watched;
use crate::harness::pebble::{Pebble, Rules};
use crate::harness::secure::Authority;
use crate::harness::tls::{Tls, pair};
use crate::harness::{Client, Gateway, Setup, eventually};

/// A gateway that requests some of these certificates from this authority, and has a clear-text listener.
fn asking(pebble: &Pebble, certificates: &str, keys: &str) -> Setup {
    asking_at(&pebble.directory(), pebble, certificates, keys)
}

fn asking_at(directory: &str, pebble: &Pebble, certificates: &str, keys: &str) -> Setup {
    let setup = Setup::found("endpoints: [ { address: \"127.0.0.1:1\" } ]")
        .listener(&format!("tls: {{ certificates: [ {certificates} ] }}"))
        .also_listener("{ name: plain, address: \"127.0.0.1:0\", redirect_https: true }")
        .routes("{ name: all, filters: [ { respond: { body: served } } ], upstream: app }");
    let issuer = format!(
        "directory: \"{directory}\", ca: \"{}\", store: \"{}\", email: ops@example.com, retry: {{ first: 200ms, max: 1s }}{keys}",
        pebble.ca().display(),
        setup.path("store").display(),
    );
    setup.more(&format!("acme: {{ ours: {{ {issuer} }} }}"))
}

const HTTP_01: &str = ", challenge: http_01";

/// Makes the authority validate names at this gateway.
fn reachable(pebble: &Pebble, gateway: &Gateway) {
    pebble.validates(gateway.address("plain"), gateway.web());
}

/// The serial number of the certificate that clients receive for this name, once they receive one that they trust.
fn issued(pebble: &Pebble, web: SocketAddr, name: &str) -> String {
    eventually(&format!("a certificate for {name}"), || served(pebble, web, name).ok())
}

fn served(pebble: &Pebble, web: SocketAddr, name: &str) -> Result<String, String> {
    let (got, secured) = Tls::trusting(web, &pebble.root(), name).get("/")?;
    assert_eq!((got.status, &*got.body), (200, "served"));
    Ok(secured.serial())
}

fn orders(gateway: &impl Watched, outcome: &str) -> f64 {
    gateway.metric(&format!("forebay_acme_orders_total{{issuer=\"ours\",outcome=\"{outcome}\"}}"))
}

fn failures(gateway: &impl Watched, name: &str) -> f64 {
    gateway.metric(&format!("forebay_acme_failures{{issuer=\"ours\",name=\"{name}\"}}"))
}

/// Puts a certificate of another authority into the store, whose renewal is due. Returns that authority.
fn seed(store: &Path, name: &str) -> Authority {
    let authority = Authority::new();
    // The last third of its lifetime has begun, and it remains valid during the tests.
    let this_year = 1970 + i32::try_from(forebay::client::tls::now() / 31_556_952).expect("a year");
    let pem = authority.issue_for_years(name, [this_year - 9, this_year + 2]);
    fs::create_dir_all(store.join("ours")).expect("a directory");
    fs::write(store.join("ours").join(format!("{name}.pem")), pem).expect("a file");
    authority
}

#[test]
fn a_first_certificate_is_proved_by_requests_and_others_are_served_until_then() {
    let pebble = Pebble::knowing(&["a.test"]);
    let own = Authority::new();
    let file = pair(&own.issue(&["file.test"]));
    let setup = asking(&pebble, &format!("{{ acme: ours, names: [A.test] }}, {{ {file} }}"), HTTP_01);
    let gateway = setup.start();
    // The authority cannot validate yet.
    let early = Tls::trusting(gateway.web(), &pebble.root(), "a.test").connect().err().expect("no certificate yet");
    assert!(early.contains("INTERNAL_ERROR"), "{early}");
    gateway.wait_metric("forebay_refusals_total{reason=\"handshake.awaited\"}", |count| count == 1.0);
    assert_eq!(Tls::to(gateway.web(), &own, "file.test").get("/").expect("an answer").0.status, 200);

    reachable(&pebble, &gateway);
    issued(&pebble, gateway.web(), "a.test");
    assert!(gateway.metric("forebay_acme_challenges_total{challenge=\"http_01\"}") >= 1.0);
    assert_eq!((orders(&gateway, "issued"), orders(&gateway, "failed")), (1.0, 0.0));
    assert_eq!(gateway.metric("forebay_acme_active{issuer=\"ours\"}"), 1.0);
    let now = forebay::client::tls::now() as f64;
    assert!(gateway.metric("forebay_acme_due_timestamp_seconds{issuer=\"ours\",name=\"a.test\"}") > now);

    // A token without an order is redirected like any other path.
    let got = Client::connect(gateway.address("plain")).get("/.well-known/acme-challenge/other");
    assert_eq!(got.status, 308);
}

#[test]
fn a_certificate_with_several_names_is_proved_by_handshakes() {
    let pebble = Pebble::knowing(&["a.test", "b.test", "c.test"]);
    let gateway = asking(&pebble, "{ acme: ours, names: [a.test, b.test, c.test] }", "").start();
    reachable(&pebble, &gateway);
    let serial = issued(&pebble, gateway.web(), "a.test");
    for name in ["b.test", "c.test"] {
        assert_eq!(served(&pebble, gateway.web(), name).expect("it is in the certificate"), serial);
    }
    assert!(gateway.metric("forebay_acme_challenges_total{challenge=\"tls_alpn_01\"}") >= 3.0);
    assert_eq!(orders(&gateway, "issued"), 1.0);

    // No order is pending any more.
    let late = Tls::trusting(gateway.web(), &pebble.root(), "a.test").alpn(b"\x0aacme-tls/1").connect().err();
    assert!(late.expect("an alert").contains("NO_APPLICATION_PROTOCOL"));
}

#[test]
fn a_challenge_is_answered_with_the_certificate_that_the_standard_asks_for_and_nothing_follows() {
    let pebble = Pebble::knowing(&["a.test"]);
    let gateway = asking(&pebble, "{ acme: ours, names: [a.test] }", "").start();
    // While the authority waits at its gate, any client may request the challenge certificate.
    let mut asked = eventually("the challenge to be waited for", || {
        let client = Tls::trusting(gateway.web(), &pebble.root(), "a.test").unverified().alpn(b"\x0aacme-tls/1");
        client.connect().ok()
    });
    assert_eq!(asked.alpn().as_deref(), Some(&b"acme-tls/1"[..]));
    let der = asked.certificate();
    let extension =
        [0x06, 0x08, 0x2b, 0x06, 0x01, 0x05, 0x05, 0x07, 0x01, 0x1f, 0x01, 0x01, 0xff, 0x04, 0x22, 0x04, 0x20];
    assert!(der.windows(extension.len()).any(|window| window == extension), "{der:02x?}");
    assert_eq!(asked.rest().0, b"", "the connection ends");
    assert_eq!(gateway.metric("forebay_client_requests_total{listener=\"web\",protocol=\"http1\"}"), 0.0);
    reachable(&pebble, &gateway);
    issued(&pebble, gateway.web(), "a.test");
}

/// Obtains a certificate, and stops gracefully once everything is stored, so that another process finds it there.
fn once(pebble: &Pebble, setup: &Setup) -> String {
    let mut gateway = setup.spawn();
    pebble.validates(gateway.web(), gateway.web());
    let serial = issued(pebble, gateway.web(), "a.test");
    eventually("everything to be kept", || {
        let record = fs::read_to_string(setup.path("store/ours/a.test.json")).ok()?;
        record.contains("\"ask\": null").then_some(())
    });
    gateway.signal(libc::SIGTERM);
    assert!(gateway.ended().success());
    serial
}

#[test]
fn what_is_kept_is_for_forebay_alone_and_a_restart_asks_for_nothing() {
    let pebble = Pebble::knowing(&["a.test"]);
    let setup = asking(&pebble, "{ acme: ours, names: [a.test] }", "");
    let serial = once(&pebble, &setup);

    let mode = |path: &Path| fs::metadata(path).expect("a file").permissions().mode() & 0o777;
    let store = setup.path("store");
    assert_eq!([mode(&store), mode(&store.join("ours"))], [0o700; 2]);
    let files: Vec<_> =
        fs::read_dir(store.join("ours")).expect("files").map(|file| file.expect("a file").path()).collect();
    assert_eq!(files.len(), 5, "{files:?}");
    assert!(files.iter().all(|file| mode(file) == 0o600), "{files:?}");

    let asked = pebble.requests();
    assert!(asked > 5, "{asked}");
    let again = setup.spawn();
    assert_eq!(served(&pebble, again.web(), "a.test").expect("it is kept"), serial);
    let now = forebay::client::tls::now() as f64;
    again.wait_metric("forebay_acme_due_timestamp_seconds{issuer=\"ours\",name=\"a.test\"}", |due| due > now);
    assert_eq!(orders(&again, "issued") + orders(&again, "failed"), 0.0);
    assert_eq!(pebble.requests(), asked);

    let listed = certs(&setup);
    assert!(listed.contains("a.test") && listed.trim_end().ends_with('-'), "{listed}");
}

#[test]
fn a_renewal_fails_no_handshake() {
    let pebble = Pebble::knowing(&["a.test"]);
    let setup = asking(&pebble, "{ acme: ours, names: [a.test] }", HTTP_01);
    let old = seed(&setup.path("store"), "a.test");
    let gateway = setup.start();
    let both = setup.path("both.pem");
    let roots = [old.file(), pebble.root()].map(|file| fs::read_to_string(file).expect("a root"));
    fs::write(&both, roots.concat()).expect("a file");
    let (over, shaken) = (AtomicBool::new(false), AtomicU32::new(0));
    std::thread::scope(|scope| {
        let clients: Vec<_> = (0..3)
            .map(|_| {
                scope.spawn(|| {
                    while !over.load(Ordering::Relaxed) {
                        let (got, _) = Tls::trusting(gateway.web(), &both, "a.test").get("/").expect("a handshake");
                        assert_eq!(got.status, 200);
                        shaken.fetch_add(1, Ordering::Relaxed);
                    }
                })
            })
            .collect();
        eventually("some handshakes", || (shaken.load(Ordering::Relaxed) > 20).then_some(()));
        reachable(&pebble, &gateway);
        issued(&pebble, gateway.web(), "a.test");
        let before = shaken.load(Ordering::Relaxed);
        eventually("some more", || (shaken.load(Ordering::Relaxed) > before + 20).then_some(()));
        over.store(true, Ordering::Relaxed);
        for client in clients {
            client.join().expect("no handshake to fail");
        }
    });
    assert_eq!(orders(&gateway, "issued"), 1.0);
    assert!(Tls::to(gateway.web(), &old, "a.test").get("/").is_err(), "the old one is gone");
}

#[test]
fn while_the_issuer_is_away_the_old_certificate_is_served_and_waits_grow() {
    let mut pebble = Pebble::knowing(&["a.test"]);
    pebble.kill();
    let setup = asking(&pebble, "{ acme: ours, names: [a.test] }", "");
    let old = seed(&setup.path("store"), "a.test");
    let gateway = setup.spawn();
    eventually("some failures", || (failures(&gateway, "a.test") >= 3.0).then_some(()));
    assert_eq!(orders(&gateway, "issued"), 0.0);
    assert_eq!(Tls::to(gateway.web(), &old, "a.test").get("/").expect("the old one").0.status, 200);
    let told = gateway.stderr();
    let lines: Vec<_> = told.lines().filter(|line| line.contains("no certificate for a.test")).collect();
    assert!(
        lines.iter().all(|line| line.contains("refused the connection") && line.contains("ordered again in")),
        "{lines:?}"
    );
    assert!((3..20).contains(&lines.len()), "a line for each failure: {lines:?}");

    pebble.start_again();
    pebble.validates(gateway.web(), gateway.web());
    issued(&pebble, gateway.web(), "a.test");
    eventually("the failures to be over", || (failures(&gateway, "a.test") == 0.0).then_some(()));
}

#[test]
fn what_the_issuer_says_is_wrong_is_told_to_the_operator() {
    let pebble = Pebble::with(&["a.test"], &Rules { blocked: &["blocked.test"], binding: None });
    let setup = asking(&pebble, "{ acme: ours, names: [a.test] }, { acme: ours, names: [blocked.test] }", HTTP_01);
    let gateway = setup.spawn();
    // The authority validates at a listener that does not know the token.
    let stranger = Setup::found("endpoints: [ { address: \"127.0.0.1:1\" } ]")
        .routes("{ name: all, filters: [ { respond: { status: 404 } } ], upstream: app }")
        .start();
    pebble.validates(stranger.web(), stranger.web());
    for name in ["a.test", "blocked.test"] {
        eventually("a failure", || (failures(&gateway, name) >= 1.0).then_some(()));
    }
    gateway.says("`a.test`: ");
    gateway.says("(rejectedIdentifier)");
    let listed = certs(&setup);
    assert!(listed.contains("a.test") && listed.contains("it is not issued yet: `a.test`: "), "{listed}");
    assert!(listed.contains("(unauthorized)") && listed.contains("(rejectedIdentifier)"), "{listed}");
}

/// The output of `forebay certs`.
fn certs(setup: &Setup) -> String {
    let program =
        Command::new(env!("CARGO_BIN_EXE_forebay")).args(["certs", "-c"]).arg(setup.path("forebay.yaml")).output();
    String::from_utf8(program.expect("the program").stdout).expect("a text")
}

#[test]
fn names_are_taken_from_the_routes() {
    let pebble = Pebble::knowing(&["a.test", "b.test"]);
    let setup = asking(&pebble, "{ acme: ours, names: auto }", "").routes(
        "{ name: one, match: { hosts: [a.test, 127.0.0.1] }, filters: [ { respond: { body: served } } ], upstream: app }
         { name: two, match: { hosts: [b.test, a.test], path: { prefix: /x } }, upstream: app }
         { name: all, filters: [ { respond: { body: served } } ], upstream: app }",
    );
    let gateway = setup.start();
    reachable(&pebble, &gateway);
    let serial = issued(&pebble, gateway.web(), "a.test");
    assert_eq!(served(&pebble, gateway.web(), "b.test").expect("it is in the certificate"), serial);
}

#[test]
fn of_two_gateways_with_one_store_one_orders_both_answer_and_the_other_takes_over() {
    let pebble = Pebble::knowing(&["a.test"]);
    let setup = asking(&pebble, "{ acme: ours, names: [a.test] }", "");
    let mut first = setup.start();
    eventually("the first to have the store", || {
        (first.metric("forebay_acme_active{issuer=\"ours\"}") == 1.0).then_some(())
    });
    let second = setup.start();
    // The authority validates at the gateway that does not order.
    reachable(&pebble, &second);
    let serial = issued(&pebble, first.web(), "a.test");
    assert_eq!(issued(&pebble, second.web(), "a.test"), serial);
    let answered = "forebay_acme_challenges_total{challenge=\"tls_alpn_01\"}";
    assert!(second.metric(answered) >= 1.0 && first.metric(answered) == 0.0);
    assert_eq!((orders(&first, "issued"), orders(&second, "issued")), (1.0, 0.0));
    assert_eq!(second.metric("forebay_acme_active{issuer=\"ours\"}"), 0.0);
    first.stop();
    first.stopped();
    eventually("the second to take over", || {
        (second.metric("forebay_acme_active{issuer=\"ours\"}") == 1.0).then_some(())
    });
    assert_eq!(served(&pebble, second.web(), "a.test").expect("it is kept"), serial);
    assert_eq!(orders(&second, "issued"), 0.0);
}

#[test]
fn an_account_that_the_issuer_has_forgotten_is_made_anew() {
    let mut pebble = Pebble::knowing(&["a.test"]);
    let setup = asking(&pebble, "{ acme: ours, names: [a.test] }", "");
    once(&pebble, &setup);
    pebble.kill();
    pebble.start_again();
    for kept in ["pem", "json"] {
        fs::remove_file(setup.path(&format!("store/ours/a.test.{kept}"))).expect("to have it ordered again");
    }
    let again = setup.spawn();
    pebble.validates(again.web(), again.web());
    issued(&pebble, again.web(), "a.test");
    again.says("(accountDoesNotExist)");
    again.wait_metric("forebay_acme_orders_total{issuer=\"ours\",outcome=\"issued\"}", |issued| issued == 1.0);
}

#[test]
fn an_address_of_mail_that_has_changed_is_told_to_the_issuer() {
    let pebble = Pebble::knowing(&["a.test"]);
    let setup = asking(&pebble, "{ acme: ours, names: [a.test] }", "");
    once(&pebble, &setup);
    let files = fs::read_dir(setup.path("store/ours")).expect("files").map(|file| file.expect("a file").path());
    let account = files.filter(|file| file.display().to_string().contains("account-")).last().expect("an account");
    let kept = fs::read_to_string(&account).expect("an account");
    fs::write(&account, kept.replace("mailto:ops@", "mailto:earlier@")).expect("a file");
    for kept in ["pem", "json"] {
        fs::remove_file(setup.path(&format!("store/ours/a.test.{kept}"))).expect("to have it ordered again");
    }
    let again = setup.spawn();
    pebble.validates(again.web(), again.web());
    again.wait_metric("forebay_acme_orders_total{issuer=\"ours\",outcome=\"issued\"}", |issued| issued == 1.0);
    // The file is written only after the issuer has accepted the account.
    assert_eq!(fs::read_to_string(&account).expect("an account"), kept);
}

#[test]
fn an_account_may_be_bound_to_one_that_the_issuer_knows() {
    // 32 bytes in base64url.
    const KEY: &str = "zWNDZM6eQGHWpSRTPal5eIUYFTu7EajVIoguysqZ9wG44nMEtx3MUAsUDkMTQ12W";
    let pebble = Pebble::with(&["a.test"], &Rules { blocked: &[], binding: Some(("kid-1", KEY)) });
    let unbound = asking(&pebble, "{ acme: ours, names: [a.test] }", "").start();
    eventually("a failure", || (failures(&unbound, "a.test") >= 1.0).then_some(()));
    let keys = format!(", eab: {{ kid: kid-1, key: {KEY} }}");
    let gateway = asking(&pebble, "{ acme: ours, names: [a.test] }", &keys).start();
    reachable(&pebble, &gateway);
    issued(&pebble, gateway.web(), "a.test");
}

#[test]
fn an_issuer_whose_terms_are_not_agreed_to_makes_no_account() {
    let pebble = Pebble::knowing(&["a.test"]);
    let gateway = asking(&pebble, "{ acme: ours, names: [a.test] }", ", agree_to_terms: false").spawn();
    gateway.says("terms of service");
    assert_eq!(orders(&gateway, "issued"), 0.0);
}

#[test]
fn an_issuer_that_says_nothing_is_given_up_and_told_of() {
    let pebble = Pebble::knowing(&["a.test"]);
    // The kernel accepts its connections, and no program reads from them.
    let silent = TcpListener::bind("127.0.0.1:0").expect("a loopback port");
    let directory = format!("https://{}/dir", silent.local_addr().expect("its address"));
    let keys = ", timeouts: { request: 300ms, order: 1m }";
    asking_at(&directory, &pebble, "{ acme: ours, names: [a.test] }", keys).spawn().says("did not answer within 300ms");
    let keys = ", timeouts: { request: 1m, order: 300ms }";
    asking_at(&directory, &pebble, "{ acme: ours, names: [a.test] }", keys)
        .spawn()
        .says("it was not issued within 300ms");
}

#[test]
fn a_wildcard_from_a_file_serves_a_name_until_its_own_certificate_is_there() {
    let pebble = Pebble::knowing(&["a.b.test"]);
    let own = Authority::new();
    let file = pair(&own.issue(&["*.b.test"]));
    let gateway = asking(&pebble, &format!("{{ acme: ours, names: [a.b.test] }}, {{ {file} }}"), "").start();
    assert_eq!(Tls::to(gateway.web(), &own, "a.b.test").get("/").expect("an answer").0.status, 200);
    reachable(&pebble, &gateway);
    issued(&pebble, gateway.web(), "a.b.test");
    assert_eq!(Tls::to(gateway.web(), &own, "c.b.test").get("/").expect("an answer").0.status, 200);
}

#[test]
fn what_is_issued_is_kept_by_the_user_that_forebay_becomes() {
    let pebble = Pebble::knowing(&["a.test"]);
    // SAFETY: it has no arguments and cannot fail.
    let is_root = unsafe { libc::geteuid() } == 0;
    let user = if is_root { "threads: 1, user: nobody" } else { "threads: 1" };
    let setup = asking(&pebble, "{ acme: ours, names: [a.test] }", "").server(user);
    fs::set_permissions(setup.path("."), fs::Permissions::from_mode(0o755)).expect("a directory for all");
    let gateway = setup.spawn();
    pebble.validates(gateway.web(), gateway.web());
    issued(&pebble, gateway.web(), "a.test");
    let user: u32 = gateway.status("Uid")[0].parse().expect("a number");
    assert_ne!(user, 0, "root is given up");
    for kept in ["store", "store/ours", "store/ours/a.test.pem", "store/ours/lock"] {
        assert_eq!(fs::metadata(setup.path(kept)).expect("a file").uid(), user, "{kept}");
    }
}

#[test]
fn an_issuer_that_says_when_to_renew_is_heeded() {
    let pebble = Pebble::knowing(&["a.test"]).advising();
    let gateway = asking(&pebble, "{ acme: ours, names: [a.test] }", "").start();
    reachable(&pebble, &gateway);
    gateway.wait_metric("forebay_acme_orders_total{issuer=\"ours\",outcome=\"issued\"}", |issued| issued == 2.0);
    // The certificate is valid for years: two thirds of its lifetime are longer than a hundred days.
    let now = forebay::client::tls::now() as f64;
    gateway.wait_metric("forebay_acme_due_timestamp_seconds{issuer=\"ours\",name=\"a.test\"}", |due| {
        (99.0..102.0).contains(&((due - now) / 86_400.0))
    });
    let [first, second] = &pebble.asked_about()[..] else { panic!("{:?}", pebble.asked_about()) };
    assert_ne!(first, second);
    assert_eq!(orders(&gateway, "failed"), 0.0);
}

#[test]
fn a_name_that_is_added_is_ordered_and_the_others_are_served_meanwhile() {
    let pebble = Pebble::knowing(&["a.test", "b.test"]);
    let setup = asking(&pebble, "{ acme: ours, names: [a.test, b.test] }", "");
    let old = seed(&setup.path("store"), "a.test");
    let gateway = setup.start();
    assert_eq!(Tls::to(gateway.web(), &old, "a.test").get("/").expect("the old one").0.status, 200);
    let early = Tls::trusting(gateway.web(), &pebble.root(), "b.test").connect().err().expect("no certificate yet");
    assert!(early.contains("INTERNAL_ERROR"), "{early}");
    reachable(&pebble, &gateway);
    let serial = issued(&pebble, gateway.web(), "b.test");
    assert_eq!(served(&pebble, gateway.web(), "a.test").expect("it is in the certificate"), serial);
}

/// The output of `forebay check` for a listener with this certificate, and these issuers.
fn checked(certificate: &str, acme: &str) -> String {
    let text = format!(
        "listeners:\n- name: web\n  address: 127.0.0.1:0\n  tls:\n    certificates:\n    - {certificate}\n\
         upstreams: {{ app: {{ endpoints: [ {{ address: \"127.0.0.1:1\" }} ] }} }}\n\
         routes: [ {{ name: all, match: {{ hosts: [\"*.b.test\"] }}, upstream: app }} ]\n{acme}"
    );
    let builder = forebay::gateway::Gateway::builder();
    match builder.parse("test.yaml", &text) {
        Err(report) => report.render(false),
        Ok(config) => config.warnings().render(false) + &config.report(&builder.check(&config)).render(false),
    }
}

#[test]
fn what_no_issuer_can_be_asked_for_is_told_with_its_place() {
    let names = |names: &str| checked(&format!("{{ acme: letsencrypt, names: {names} }}"), "");
    let of = |acme: &str| checked("{ acme: ours, names: [a.test] }", &format!("acme: {{ ours: {{ {acme} }} }}"));
    let directory = "directory: \"https://ca.test/dir\"";
    for (told, title, place, label) in [
        (
            checked("{ acme: letsencrpt, names: [a.test] }", ""),
            "unknown issuer `letsencrpt`",
            "test.yaml:6:15",
            "letsencrypt",
        ),
        (names("[\"*.a.test\"]"), "no issuer is asked for `*.a.test`", "test.yaml:6:36", "prove a wildcard"),
        (names("[10.0.0.1]"), "no issuer is asked for `10.0.0.1`", "test.yaml:6:36", "an address is not a name"),
        (names("[bücher.test]"), "no issuer is asked for `bücher.test`", "test.yaml:6:36", "xn--"),
        (names("[a.test, A.test]"), "`A.test` is listed twice", "test.yaml:6:44", "again here"),
        (names("[]"), "needs `names`", "test.yaml:6:35", "names: auto"),
        (names("some"), "expected a list of names", "test.yaml:6:35", "or `auto`"),
        (names("auto"), "the host `*.b.test` of the route `all`", "test.yaml:6:35", "prove a wildcard"),
        (checked("{ acme: letsencrypt }", ""), "needs `names`", "test.yaml:6:7", "names: auto"),
        (
            checked("{ names: [a.test] }", ""),
            "nothing says where this certificate comes from",
            "test.yaml:6:7",
            "`cert` and `key`, or `acme`",
        ),
        (checked("{ cert: /a.pem }", ""), "`key` is missing", "test.yaml:6:9", "needs it beside it"),
        (
            checked("{ cert: /a.pem, key: /a.key, names: auto }", ""),
            "the names of a file are those in it",
            "test.yaml:6:43",
            "leave it out",
        ),
        (
            checked("{ acme: letsencrypt, names: [a.test], cert: /a.pem }", ""),
            "`cert` has no effect",
            "test.yaml:6:45",
            "leave it out",
        ),
        (of("email: ops@a.test"), "the issuer `ours` has no directory", "test.yaml:9:9", "directory: https://"),
        (of("directory: \"http://ca.test/\""), "not the URL of a directory", "test.yaml:9:28", "https://"),
        (of(&format!("{directory}, email: ops")), "not an address of mail", "test.yaml:9:58", "ops@example.com"),
        (of(&format!("{directory}, challenge: dns_01")), "challenge", "test.yaml:9:62", "http_01"),
        (
            of(&format!("{directory}, challenge: http_01")),
            "no listener could answer this challenge",
            "test.yaml:9:62",
            "in clear text",
        ),
        (
            of(&format!("{directory}, eab: {{ kid: a, key: \"+\" }}")),
            "not a key in base64url",
            "test.yaml:9:71",
            "letters",
        ),
        (
            of(&format!("{directory}, retry: {{ first: 1h, max: 1m }}")),
            "the first wait is longer",
            "test.yaml:9:76",
            "no more than",
        ),
        (of(&format!("{directory}, ca: /nonexistent.pem")), "/nonexistent.pem", "test.yaml:9:55", "No such file"),
        (
            of(&format!("{directory}, store: /dev/null")),
            "no certificate can be kept in `/dev/null`",
            "test.yaml:9:58",
            "",
        ),
    ] {
        assert!(
            told.contains(title) && told.contains(place) && told.contains(label),
            "{title}, {place}, {label}:\n{told}"
        );
    }
    let unused = checked("{ cert: /a.pem, key: /a.key }", &format!("acme: {{ ours: {{ {directory} }} }}"));
    assert!(unused.contains("no certificate is asked of `ours`"), "{unused}");
}
