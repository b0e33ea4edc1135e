//! External authentication: the changing keys of `jwt`, the responses of `forward_auth`, and services that are
//! slow, down, or send invalid data.

use std::sync::{Arc, Mutex};
use std::time::{SystemTime, UNIX_EPOCH};

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use hmac::{Hmac, Mac};
use serde_json::{Value, json};
use sha2::Sha256;

use crate::harness::gateway::Watched;
use crate::harness::origin::{Closed, response};
use crate::harness::{Gateway, Origin, Setup, eventually, ok};

/// The secret of this key id.
fn secret(id: &str) -> [u8; 32] {
    let mut secret = [b'.'; 32];
    secret[..id.len()].copy_from_slice(id.as_bytes());
    secret
}

/// The key set with these ids.
pub fn set(ids: &[&str]) -> String {
    let key = |id: &&str| json!({ "kty": "oct", "kid": id, "alg": "HS256", "k": URL_SAFE_NO_PAD.encode(secret(id)) });
    json!({ "keys": ids.iter().map(key).collect::<Vec<_>>() }).to_string()
}

/// A token with these claims that expires in ten minutes, signed with the secret of this id.
pub fn token(id: &str, mut claims: Value) -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("a time after 1970").as_secs();
    claims["exp"] = (now + 600).into();
    signed(id, &claims)
}

/// A token with these claims, signed with the secret of this id.
fn signed(id: &str, claims: &Value) -> String {
    let part = |value: &Value| URL_SAFE_NO_PAD.encode(value.to_string());
    let message = format!("{}.{}", part(&json!({ "alg": "HS256", "kid": id })), part(claims));
    let mac = <Hmac<Sha256> as Mac>::new_from_slice(&secret(id)).expect("a key").chain_update(&message).finalize();
    format!("{message}.{}", URL_SAFE_NO_PAD.encode(mac.into_bytes()))
}

fn bearer(id: &str) -> String {
    format!("Authorization: Bearer {}\r\n", token(id, json!({ "sub": "ada", "roles": ["admin"] })))
}

/// A gateway whose `jwt` fetches keys from the service at this address.
fn asking(origin: &Origin, service: impl ToString, keys: &str) -> Gateway {
    let idp = format!("endpoints: [ {{ address: \"{}\" }} ]", service.to_string());
    let jwt = format!(
        "jwt: {{ keys: {{ service: {{ upstream: idp, path: /keys{keys} }} }}, algorithms: [HS256], claims: {{ X-User: sub }} }}"
    );
    let deny = "{ access: { deny: [0.0.0.0/0] }, when: '!(\"admin\" in jwt.claims.values(\"roles\"))' }";
    Setup::before(origin).also_upstream("idp", &idp).filters(&format!("{jwt}, {deny}")).start()
}

fn status(gateway: &Gateway, fields: &str) -> u16 {
    gateway.client().ask("GET", "/", fields, "").status
}

/// The reason for a refusal.
fn reason(gateway: &Gateway, fields: &str) -> String {
    let text = gateway.client().ask("GET", "/", fields, "").text().to_owned();
    text.split(' ').nth(1).unwrap_or_default().trim_end_matches(':').to_owned()
}

#[test]
fn keys_of_a_service_are_asked_for_once_and_again_when_they_are_rotated() {
    let origin = Origin::answering(|request| ok(format!("{:?}", request.value("x-user"))));
    let served = Arc::new(Mutex::new(set(&["one"])));
    let now = served.clone();
    let service = Origin::answering(move |_| ok(now.lock().unwrap().clone()));
    let gateway = asking(&origin, service.address(), ", retry: 1s");
    let answer = gateway.client().ask("GET", "/", &format!("{}X-User: root\r\n", bearer("one")), "");
    assert_eq!((answer.status, answer.text()), (200, "Some(\"ada\")"));
    assert_eq!((status(&gateway, &bearer("one")), service.requests().len()), (200, 1), "keys are kept");
    assert_eq!(service.requests()[0].target(), "/keys");
    // A missing role is checked by an expression.
    let other = token("one", json!({ "sub": "eve", "roles": ["dev"] }));
    assert_eq!(reason(&gateway, &format!("Authorization: Bearer {other}\r\n")), "route.access");

    *served.lock().unwrap() = set(&["two"]);
    eventually("the new key", || (status(&gateway, &bearer("two")) == 200).then_some(()));
    assert_eq!(reason(&gateway, &bearer("one")), "route.jwt_invalid", "a key that is gone is of no use");
    let asked = service.requests().len();
    for _ in 0..50 {
        assert_eq!(reason(&gateway, &bearer("three")), "route.jwt_invalid");
    }
    // Unknown keys do not cause unlimited fetches; how long the fifty take depends on the machine.
    assert!(service.requests().len() < asked + 25, "{} more", service.requests().len() - asked);
    assert_eq!(reason(&gateway, ""), "route.jwt_missing");
}

#[test]
fn a_token_that_is_not_in_force_or_meant_for_others_is_refused() {
    let origin = Origin::named("app");
    let service = Origin::answering(|_| ok(set(&["one"])));
    let gateway = asking(&origin, service.address(), "");
    let header = |claims: Value| format!("Authorization: Bearer {}\r\n", signed("one", &claims));
    assert_eq!(reason(&gateway, &header(json!({ "exp": 1_300_819_380, "roles": ["admin"] }))), "route.jwt_expired");
    let others = json!({ "exp": 4_000_000_000_u64, "aud": "others", "roles": ["admin"] });
    let answer = gateway.client().ask("GET", "/", &header(others), "");
    let challenge = "Bearer realm=\"Restricted\", error=\"invalid_token\"";
    assert_eq!((answer.status, answer.value("www-authenticate")), (401, Some(challenge)));
    assert!(answer.text().contains("route.jwt_audience"), "{}", answer.text());
    assert_eq!(origin.connections(), 0);
}

#[test]
fn a_service_that_is_down_closes_the_route_and_kept_keys_keep_it_open() {
    let origin = Origin::named("app");
    let gateway = asking(&origin, Closed::refusing().address(), "");
    let answer = gateway.client().ask("GET", "/", &bearer("one"), "");
    assert_eq!((answer.status, answer.value("retry-after")), (503, Some("5")));
    assert_eq!(reason(&gateway, &bearer("one")), "route.jwt_unavailable");
    gateway.wait_metric("forebay_filter_loads_total{filter=\"jwt\",outcome=\"failed\"}", |count| count == 1.0);
    assert_eq!(origin.connections(), 0);

    let fails = Arc::new(Mutex::new(false));
    let failing = fails.clone();
    let service = Origin::answering(move |_| match *failing.lock().unwrap() {
        false => ok(set(&["one"])),
        true => response("500 Internal Server Error", "", ""),
    });
    let gateway = asking(&origin, service.address(), ", refresh: 10ms, retry: 10ms");
    assert_eq!(status(&gateway, &bearer("one")), 200);
    *fails.lock().unwrap() = true;
    let failed = "forebay_filter_loads_total{filter=\"jwt\",outcome=\"failed\"}";
    eventually("the service to fail", || {
        assert_eq!(status(&gateway, &bearer("one")), 200, "the keys of before are still of use");
        (gateway.metric(failed) > 1.0).then_some(())
    });
}

#[test]
fn a_service_that_is_slow_or_says_nonsense_closes_the_route() {
    let origin = Origin::named("app");
    let silent = Origin::scripted();
    let gateway = asking(&origin, silent.address(), ", timeout: 200ms");
    assert_eq!(reason(&gateway, &bearer("one")), "route.jwt_unavailable");
    // While the keys are unknown, even junk is not reported as invalid.
    assert_eq!(reason(&gateway, "Authorization: Bearer junk\r\n"), "route.jwt_invalid");
    let large = "x".repeat(300 << 10);
    for junk in ["", "<html>", "{}", "{\"keys\":{}}", "{\"keys\":[]}", "\u{fffd}", &large] {
        let junk = junk.to_owned();
        let service = Origin::answering(move |_| ok(&junk));
        let gateway = asking(&origin, service.address(), "");
        assert_eq!(reason(&gateway, &bearer("one")), "route.jwt_unavailable");
    }
    assert_eq!(origin.connections(), 0);
}

#[test]
fn many_who_come_at_once_ask_for_the_keys_once() {
    let origin = Origin::named("app");
    let service = Origin::scripted();
    let gateway = asking(&origin, service.address(), "");
    let web = gateway.web();
    let come = move || crate::harness::Client::connect(web).ask("GET", "/", &bearer("one"), "").status;
    let clients: Vec<_> = (0..20).map(|_| std::thread::spawn(come)).collect();
    let mut asked = service.accept();
    asked.request();
    gateway.wait_metric("forebay_phase_active{phase=\"route\"}", |active| active == 20.0);
    asked.answer(set(&["one"]));
    let statuses: Vec<u16> = clients.into_iter().map(|client| client.join().expect("a client")).collect();
    assert_eq!(statuses, [200; 20]);
    gateway.wait_metric("forebay_filter_calls_total{filter=\"jwt\"}", |count| count == 1.0);
}

/// A gateway whose `forward_auth` uses the service at this address.
fn forwarding(origin: &Origin, service: impl ToString, keys: &str) -> Gateway {
    let auth = format!("endpoints: [ {{ address: \"{}\" }} ]", service.to_string());
    let copy = "copy: [X-User, X-Groups], copy_back: [X-Session], user: X-User";
    let filter = format!("forward_auth: {{ upstream: auth, path: '/verify?a=b', {copy}{keys} }}");
    let setup = Setup::before(origin).also_upstream("auth", &auth).filters(&filter);
    setup.access_log("fields: { user: { cel: auth.user } }").start()
}

#[test]
fn a_service_says_who_may_pass_and_who_it_is() {
    let origin =
        Origin::answering(|request| ok(format!("{:?} {:?}", request.value("x-user"), request.value("x-groups"))));
    let service = Origin::answering(|request| match request.value("cookie") {
        Some("sid=ada") => response("204 No Content", "X-User: ada\r\nX-Session: renewed\r\nX-Else: 1\r\n", ""),
        Some(_) => response("403 Forbidden", "Content-Type: text/html\r\n", "<p>not you"),
        None => response("302 Found", "Location: /login\r\nSet-Cookie: back=1\r\n", ""),
    });
    let gateway = forwarding(&origin, service.address(), "");
    let mut client = gateway.client();
    let forged = "X-User: root\r\nX-Groups: wheel\r\nX-Forwarded-Method: GET\r\nX-Forwarded-For: 9.9.9.9\r\n";
    let answer = client.ask("POST", "/a?b=c", &format!("Cookie: sid=ada\r\n{forged}"), "a body");
    assert_eq!((answer.status, answer.text()), (200, "Some(\"ada\") None"), "what a client sends is not believed");
    assert_eq!((answer.value("x-session"), answer.value("x-else")), (Some("renewed"), None));
    let asked = service.request();
    assert_eq!((asked.method(), asked.target(), asked.body.len()), ("GET", "/verify?a=b", 0));
    let told = ["method", "proto", "host", "uri", "for"].map(|name| asked.value(&format!("x-forwarded-{name}")));
    assert_eq!(told, [Some("POST"), Some("http"), Some("test"), Some("/a?b=c"), Some("127.0.0.1")]);
    assert_eq!((asked.value("cookie"), asked.value("x-user")), (Some("sid=ada"), Some("root")));

    let forbidden = client.ask("GET", "/", "Cookie: sid=eve\r\n", "");
    assert_eq!((forbidden.status, forbidden.text()), (403, "<p>not you"));
    let login = client.get("/");
    assert_eq!(
        (login.status, login.value("location"), login.value("set-cookie")),
        (302, Some("/login"), Some("back=1"))
    );
    assert_eq!(origin.requests().len(), 1);
    assert_eq!(gateway.log_lines(3)[0].text("user"), "ada");
    for (outcome, count) in [("granted", 1.0), ("forbidden", 2.0)] {
        let counted = format!("forebay_access_total{{filter=\"forward_auth\",outcome=\"{outcome}\"}}");
        gateway.wait_metric(&counted, |value| value == count);
    }
}

#[test]
fn a_service_gets_the_headers_that_are_named_and_no_other() {
    let origin = Origin::named("app");
    let service = Origin::answering(|_| ok(""));
    let gateway = forwarding(&origin, service.address(), ", send: [Authorization], method: HEAD");
    assert_eq!(gateway.client().ask("GET", "/", "Authorization: x\r\nCookie: y\r\n", "").status, 200);
    let asked = service.request();
    assert_eq!((asked.method(), asked.value("authorization"), asked.value("cookie")), ("HEAD", Some("x"), None));
}

#[test]
fn a_service_that_is_slow_dead_or_lying_closes_the_route_unless_that_says_open() {
    let origin = Origin::answering(|request| ok(format!("{:?}", request.value("x-user"))));
    let silent = Origin::scripted();
    let failing = Origin::answering(|_| response("500 Internal Server Error", "X-User: root\r\n", "trace"));
    let large = Origin::answering(|_| ok("x".repeat(100 << 10)));
    let stuffed = Origin::answering(|_| response("200 OK", &format!("X-User: {}\r\n", "x".repeat(20 << 10)), ""));
    let switching = Origin::answering(|_| response("101 Switching Protocols", "", ""));
    let garbled = Origin::answering(|_| b"hello\r\n\r\n".to_vec());
    let dead = Closed::refusing();
    let addresses = [
        silent.address(),
        failing.address(),
        large.address(),
        stuffed.address(),
        switching.address(),
        garbled.address(),
        dead.address(),
    ];
    for address in addresses {
        let gateway = forwarding(&origin, address, ", timeout: 300ms");
        let answer = gateway.client().ask("GET", "/", "X-User: root\r\n", "");
        assert_eq!((answer.status, answer.value("retry-after")), (503, Some("5")), "{address}");
        assert!(answer.text().contains("route.forward_auth"), "{}", answer.text());
        assert_eq!(origin.requests().len(), 0);
    }
    let gateway = forwarding(&origin, dead.address(), ", on_failure: pass");
    let answer = gateway.client().ask("GET", "/", "X-User: root\r\n", "");
    assert_eq!((answer.status, answer.text()), (200, "None"), "it passes, and nobody knows who it is");
    gateway.wait_metric("forebay_access_total{filter=\"forward_auth\",outcome=\"open\"}", |count| count == 1.0);
}

#[test]
fn what_a_service_has_granted_is_remembered_by_its_key() {
    let origin = Origin::answering(|request| ok(format!("{:?}", request.value("x-user"))));
    let service = Origin::answering(|request| match request.value("authorization") {
        Some("eve") => response("401 Unauthorized", "WWW-Authenticate: Bearer\r\n", ""),
        user => response("200 OK", &format!("X-User: {}\r\n", user.unwrap_or("nobody")), ""),
    });
    let gateway = forwarding(&origin, service.address(), ", cache: { key: { header: Authorization }, time: 1h }");
    let ask = |fields: &str| {
        let answer = gateway.client().ask("GET", "/", fields, "");
        (answer.status, answer.text().to_owned())
    };
    for _ in 0..3 {
        assert_eq!(ask("Authorization: ada\r\n"), (200, "Some(\"ada\")".to_owned()));
        assert_eq!(ask("Authorization: bob\r\nX-User: root\r\n"), (200, "Some(\"bob\")".to_owned()));
    }
    assert_eq!(service.requests().len(), 2);
    for _ in 0..2 {
        assert_eq!((ask("").1, ask("Authorization: eve\r\n").0), ("Some(\"nobody\")".to_owned(), 401));
    }
    assert_eq!(service.requests().len(), 6, "neither a refusal nor a request without the key is remembered");
    gateway.wait_metric("forebay_access_total{filter=\"forward_auth\",outcome=\"remembered\"}", |count| count == 4.0);
}

/// The filters in the example of a manual page, with files in the setup's directory.
fn example(setup: &Setup, page: &str) -> String {
    let path = format!("{}/conf/manual/{page}.md", env!("CARGO_MANIFEST_DIR"));
    let text = std::fs::read_to_string(path).expect("a page");
    let block = text.split("```yaml\n").nth(1).and_then(|rest| rest.split("```").next()).expect("an example");
    let written: serde_yaml::Value = serde_yaml::from_str(block).expect("YAML");
    let filters = serde_json::to_string(&written["filters"]).expect("JSON");
    let mut filters = filters.trim_start_matches('[').trim_end_matches(']').to_owned();
    for (file, text) in [
        ("users.htpasswd", "ada:$2b$04$NSVZohxgRPqCbGvPPBsZ2eTV7ov/7NXV8xzCnRBdxJMN.OtQAfoCC\n"),
        ("keys.txt", "shop:2bb80d537b1da3e38bd30361aa855686bde0eacd7162fef6a25fe97bf527a25b\n"),
        ("blocked.txt", "127.0.0.0/8\n"),
    ] {
        let path = setup.path(file);
        std::fs::write(&path, text).expect("a file");
        filters = filters.replace(&format!("\"{file}\""), &format!("\"{}\"", path.display()));
    }
    filters
}

/// An RSA key, and a function for tokens of the manual's identity provider.
fn of_provider() -> (String, impl Fn(&str) -> String) {
    use boring::hash::MessageDigest;
    use boring::pkey::PKey;
    use boring::rsa::Rsa;
    use boring::sign::Signer;
    let rsa = Rsa::generate(2048).expect("a key");
    let number = |number: &boring::bn::BigNumRef| URL_SAFE_NO_PAD.encode(number.to_vec());
    let keys = json!({ "keys": [ { "kty": "RSA", "kid": "k", "n": number(rsa.n()), "e": number(rsa.e()) } ] });
    let key = PKey::from_rsa(rsa).expect("a key");
    let signed = move |role: &str| {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("a time after 1970").as_secs();
        let claims = json!({
            "iss": "https://idp.example.com/", "aud": "shop", "sub": "ada", "exp": now + 600,
            "realm_access": { "roles": [role, "staff"] },
        });
        let part = |value: Value| URL_SAFE_NO_PAD.encode(value.to_string());
        let message = format!("{}.{}", part(json!({ "alg": "RS256", "kid": "k" })), part(claims));
        let mut signer = Signer::new(MessageDigest::sha256(), &key).expect("a signer");
        let signature = signer.sign_oneshot_to_vec(message.as_bytes()).expect("a signature");
        format!("Authorization: Bearer {message}.{}\r\n", URL_SAFE_NO_PAD.encode(signature))
    };
    (keys.to_string(), signed)
}

#[test]
fn each_example_of_the_manual_does_what_its_page_says() {
    let names = ["x-remote-user", "x-api-client", "x-user", "x-roles", "x-auth-user"];
    let origin = Origin::answering(move |request| {
        let told = names.map(|name| request.value(name).map(|value| format!("{name}={value}"))).into_iter().flatten();
        ok(told.collect::<Vec<_>>().join(" "))
    });
    let start = |page: &str, service: Option<(&str, &Origin)>| {
        let setup = Setup::before(&origin);
        let filters = example(&setup, page);
        let setup = service.into_iter().fold(setup, |setup, (name, service)| setup.also(name, service));
        setup.filters(&filters).start()
    };
    let ask = |gateway: &Gateway, method: &str, fields: &str| {
        let answer = gateway.client().ask(method, "/", fields, "");
        (answer.status, answer.text().to_owned())
    };
    let gateway = start("basic_auth", None);
    assert_eq!(ask(&gateway, "GET", "").0, 401);
    let right = "Authorization: Basic YWRhOnNlY3JldA==\r\n";
    assert_eq!(ask(&gateway, "GET", right), (200, "x-remote-user=ada".to_owned()));
    let gateway = start("api_key", None);
    assert_eq!(ask(&gateway, "GET", "").0, 401);
    assert_eq!(ask(&gateway, "GET", "X-Api-Key: secret\r\n"), (200, "x-api-client=shop".to_owned()));
    let gateway = start("ip_set", None);
    assert_eq!(ask(&gateway, "GET", "").0, 403);
    let gateway = start("cors", None);
    let preflight = "Origin: https://a.example.org\r\nAccess-Control-Request-Method: PUT\r\n";
    assert_eq!((ask(&gateway, "OPTIONS", preflight).0, ask(&gateway, "GET", "").0), (204, 200));

    let (keys, signed) = of_provider();
    let idp = Origin::answering(move |_| ok(&keys));
    let gateway = start("jwt", Some(("idp", &idp)));
    let told = "x-user=ada x-roles=admin, staff".to_owned();
    assert_eq!(ask(&gateway, "GET", &signed("admin")), (200, told));
    assert_eq!((ask(&gateway, "GET", &signed("guest")).0, ask(&gateway, "GET", "").0), (403, 401));

    let auth = Origin::answering(|request| match request.value("authorization") {
        Some(_) => response("200 OK", "X-Auth-User: ada\r\n", ""),
        None => response("401 Unauthorized", "", ""),
    });
    let gateway = start("forward_auth", Some(("auth", &auth)));
    assert_eq!(ask(&gateway, "GET", "Authorization: x\r\nX-Auth-User: root\r\n"), (200, "x-auth-user=ada".to_owned()));
    assert_eq!(ask(&gateway, "GET", "X-Auth-User: root\r\n").0, 401);
}
