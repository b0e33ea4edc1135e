//! Connections to endpoints: TLS and trust, unix sockets, the PROXY protocol, and how long connections are kept.

use serde_json::Value;

use crate::harness::client::request;
use crate::harness::gateway::Watched;
use crate::harness::metrics::Scrape;
use crate::harness::secure::{Authority, Layers, Secure};
use crate::harness::{Client, Gateway, H2Origin, Origin, Setup, eventually, ok};

/// The origin's facts about the connection of one more request.
fn told(client: &mut Client) -> Value {
    let answer = client.get("/");
    assert_eq!(answer.status, 200, "{}", answer.text());
    serde_json::from_str(answer.text()).expect("the facts of a connection")
}

/// A gateway in front of a TLS origin, with its authority and these further `tls` keys.
fn trusting(authority: &Authority, address: &str, keys: &str) -> Setup {
    let ca = authority.file();
    Setup::before_all(&[address]).upstream(&format!("tls: {{ ca: \"{}\"{keys} }}", ca.display()))
}

/// Asserts that the gateway responds with 502 because of TLS.
fn refuses(gateway: &Gateway) {
    assert_eq!(gateway.client().get("/").status, 502);
    assert_eq!(gateway.log_line().reason(), "connect.tls");
}

#[test]
fn http_1_over_tls_asks_for_the_host_of_the_address_and_verifies_it() {
    let authority = Authority::new();
    let origin = Secure::start(Layers::tls(&authority.issue(&["localhost"])));
    let gateway = trusting(&authority, &format!("localhost:{}", origin.port()), "").start();
    let mut client = gateway.client();
    let tls = told(&mut client)["tls"].clone();
    assert_eq!((tls["name"].as_str(), tls["alpn"].as_str()), (Some("localhost"), Some("http/1.1")));
    // `localhost` may have two addresses, and the other one is tried first.
    let kept = told(&mut client)["connection"].clone();
    assert_eq!(told(&mut client)["connection"], kept, "it is kept, as one without TLS is");
}

#[test]
fn a_certificate_of_an_authority_that_is_not_trusted_is_refused() {
    let [trusted, other] = [(); 2].map(|()| Authority::new());
    let origin = Secure::start(Layers::tls(&other.issue(&["localhost"])));
    refuses(&trusting(&trusted, &format!("localhost:{}", origin.port()), "").start());
    let system = Setup::before_all(&[format!("localhost:{}", origin.port())]).upstream("tls: {}");
    refuses(&system.start());
}

#[test]
fn a_certificate_of_somebody_else_is_refused() {
    let authority = Authority::new();
    let origin = Secure::start(Layers::tls(&authority.issue(&["other.test"])));
    refuses(&trusting(&authority, &format!("localhost:{}", origin.port()), "").start());
}

#[test]
fn another_name_may_be_asked_for_than_that_of_the_address() {
    let authority = Authority::new();
    let origin = Secure::start(Layers::tls(&authority.issue(&["shop.test"])));
    let gateway = trusting(&authority, origin.address(), ", server_name: shop.test").start();
    assert_eq!(told(&mut gateway.client())["tls"]["name"], "shop.test");
    refuses(&trusting(&authority, origin.address(), ", server_name: other.test").start());
}

#[test]
fn an_ip_address_is_verified_against_the_addresses_in_the_certificate() {
    let authority = Authority::new();
    let named = Secure::start(Layers::tls(&authority.issue(&["127.0.0.1"])));
    let gateway = trusting(&authority, named.address(), "").start();
    let facts = told(&mut gateway.client());
    assert_eq!(facts["tls"]["name"], Value::Null, "an address is no name to ask for");

    let elsewhere = Secure::start(Layers::tls(&authority.issue(&["127.0.0.2", "localhost"])));
    let gateway = trusting(&authority, elsewhere.address(), "").start();
    refuses(&gateway);
    assert_eq!(gateway.client().get("/").status, 502, "nor is its connection kept for the next one");
    assert_eq!(elsewhere.connections(), 2);
}

#[test]
fn an_endpoint_that_is_not_to_be_trusted_costs_no_request_as_long_as_another_is() {
    let [authority, other] = [(); 2].map(|()| Authority::new());
    let bad = Secure::start(Layers::tls(&other.issue(&["127.0.0.1"])));
    let wrong = Secure::start(Layers::tls(&authority.issue(&["127.0.0.9"])));
    let good = Secure::start(Layers::tls(&authority.issue(&["127.0.0.1"])));
    let tls = format!("tls: {{ ca: \"{}\" }}", authority.file().display());
    let gateway = Setup::before_all(&[bad.address(), wrong.address(), good.address()]).upstream(&tls).start();
    let mut client = gateway.client();
    for _ in 0..6 {
        assert_eq!(client.ask("POST", "/", "", "").status, 200, "nothing was sent yet, so a POST may go on");
    }
}

#[test]
fn who_says_so_trusts_anybody() {
    let origin = Secure::start(Layers::tls(&Authority::new().issue(&["other.test"])));
    let gateway = Setup::before_all(&[origin.address()]).upstream("tls: { verify: false }").start();
    assert_eq!(told(&mut gateway.client())["tls"]["alpn"], "http/1.1");
}

#[test]
fn an_origin_that_demands_a_certificate_gets_the_one_that_is_written() {
    let [servers, clients] = [(); 2].map(|()| Authority::new());
    let layers = Layers::mutual_tls(&servers.issue(&["127.0.0.1"]), &clients);
    let (origin, identity) = (Secure::start(layers), clients.issue(&["gateway.test"]));
    let keys = format!(", certificate: \"{}\", key: \"{}\"", identity.certificate.display(), identity.key.display());
    let gateway = trusting(&servers, origin.address(), &keys).start();
    assert_eq!(told(&mut gateway.client())["tls"]["client"], "gateway.test");

    let nobody = trusting(&servers, origin.address(), "").start();
    assert_eq!(nobody.client().get("/").status, 502, "in TLS 1.3 the handshake is done before the origin has its say");
}

#[test]
fn http_2_is_not_spoken_to_an_origin_that_does_not_agree_to_it() {
    let authority = Authority::new();
    let origin = Secure::start(Layers::tls(&authority.issue(&["127.0.0.1"])));
    refuses(&trusting(&authority, origin.address(), "").upstream("protocol: h2").start());
}

#[test]
fn a_unix_socket_is_as_good_as_an_address_for_each_protocol() {
    let (authority, dir) = (Authority::new(), tempfile::tempdir().expect("a directory"));
    let plain = Secure::on_unix(&dir.path().join("plain"), Layers::none());
    let gateway = Setup::before_all(&[plain.address()]).start();
    let mut client = gateway.client();
    assert_eq!([told(&mut client), told(&mut client)].map(|facts| facts["connection"].clone()), [1, 1]);

    let layers = Layers::tls(&authority.issue(&["shop.test"])).introduced();
    let secure = Secure::on_unix(&dir.path().join("secure"), layers);
    let setup = trusting(&authority, secure.address(), ", server_name: shop.test").upstream("proxy_protocol: v2");
    let facts = told(&mut setup.start().client());
    assert_eq!((facts["tls"]["name"].as_str(), facts["proxy"]["command"].as_str()), (Some("shop.test"), Some("proxy")));
}

#[test]
fn an_endpoint_is_told_whom_a_connection_is_for() {
    let origin = Secure::start(Layers::none().introduced());
    let gateway = Setup::before_all(&[origin.address()]).upstream("proxy_protocol: v2").start();
    let mut clients = [gateway.client(), gateway.client()];
    for client in &mut clients {
        let proxy = told(client)["proxy"].clone();
        let ends = [client.address(), gateway.web()].map(|end| Value::from(end.to_string()));
        assert_eq!([&proxy["client"], &proxy["gateway"]], [&ends[0], &ends[1]]);
        assert_eq!(proxy["command"], "proxy");
    }
    assert_eq!(clients.map(|mut client| told(&mut client)["connection"].clone()), [1, 2], "each goes on with its own");
}

#[test]
fn an_endpoint_is_told_of_the_client_that_a_trusted_proxy_speaks_for() {
    let origin = Secure::start(Layers::none().introduced());
    let setup = Setup::before_all(&[origin.address()]).upstream("proxy_protocol: v2");
    let gateway = setup.more("trusted_proxies: [127.0.0.0/8]").start();
    let mut proxy = gateway.client();
    let mut of = |client: &str| {
        let answer = proxy.ask("GET", "/", &format!("X-Forwarded-For: {client}\r\n"), "");
        let facts: Value = serde_json::from_str(answer.text()).expect("the facts of a connection");
        (facts["connection"].clone(), facts["proxy"]["client"].clone())
    };
    assert_eq!(of("192.0.2.1"), (1.into(), "192.0.2.1:0".into()));
    assert_eq!(of("192.0.2.2"), (2.into(), "192.0.2.2:0".into()));
    assert_eq!(of("192.0.2.1"), (1.into(), "192.0.2.1:0".into()));
}

#[test]
fn a_connection_ends_with_the_request_in_which_it_becomes_too_old() {
    let origin = Origin::named("origin");
    let gateway = Setup::before(&origin).upstream("keepalive: { max_age: 300ms }").start();
    let mut client = gateway.client();
    eventually("a second connection", || {
        assert_eq!(client.get("/").text(), "origin");
        (origin.connections() == 2).then_some(())
    });
    let reused = "forebay_upstream_connects_total{upstream=\"app\",outcome=\"reused\"}";
    gateway.wait_metric(reused, |count| count >= 1.0);
}

#[test]
fn with_http_2_requests_move_to_a_new_connection_when_theirs_becomes_too_old() {
    let origin = H2Origin::start();
    let setup = Setup::before_all(&[origin.address()]).upstream("protocol: h2c, keepalive: { max_age: 300ms }");
    let gateway = setup.start();
    let mut client = gateway.client();
    let made = || Scrape::of(gateway.admin()).sum("forebay_upstream_connects_total{upstream=\"app\",outcome=\"new\"}");
    eventually("a second connection", || {
        assert_eq!(client.get("/").status, 200);
        (made() == 2.0).then_some(())
    });
}

#[test]
fn no_more_connections_are_kept_than_the_pool_of_the_upstream_holds() {
    let origin = Origin::scripted();
    let gateway = Setup::before(&origin).upstream("keepalive: { pool: 1 }").start();
    let mut clients = [gateway.client(), gateway.client()];
    let mut asked = clients.each_mut().map(|client| {
        client.send(request("GET", "/", "", ""));
        let mut connection = origin.accept();
        connection.request();
        connection
    });
    for (client, connection) in clients.iter_mut().zip(&mut asked) {
        connection.answer("done");
        assert_eq!(client.response().text(), "done");
    }
    asked[1].closed();
    gateway.wait_metric("forebay_upstream_connections{upstream=\"app\"}", |open| open == 1.0);
}

#[test]
fn without_a_pool_each_request_has_a_connection_of_its_own() {
    let origin = Origin::answering(|request| ok(if request.method() == "POST" { "" } else { "a body" }));
    let gateway = Setup::before(&origin).upstream("keepalive: { pool: 0 }").start();
    let mut client = gateway.client();
    for method in ["GET", "HEAD", "POST", "GET"] {
        assert_eq!(client.ask(method, "/", "", "").status, 200);
    }
    assert_eq!(origin.connections(), 4);
    gateway.wait_metric("forebay_upstream_connections{upstream=\"app\"}", |open| open == 0.0);
}
